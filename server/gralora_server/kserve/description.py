"""What a model takes and gives, as KServe and as Triton describe it: the same for the base model and every adapter."""

from __future__ import annotations

from collections.abc import Sequence

from gralora.foreign import kserve_pb2
from gralora_server.kserve.tensors import BOOL, BYTES, INPUTS, OUTPUTS, UINT32, Tensor

PLATFORM = "gralora"
EXTENSIONS = ("model_repository", "model_repository(unload_dependents)", "model_configuration", "parameters")

_TYPES = {BYTES: kserve_pb2.TYPE_STRING, BOOL: kserve_pb2.TYPE_BOOL, UINT32: kserve_pb2.TYPE_UINT32}

TensorMetadata = kserve_pb2.ModelMetadataResponse.TensorMetadata


def metadata(name: str, versions: Sequence[str]) -> kserve_pb2.ModelMetadataResponse:
    return kserve_pb2.ModelMetadataResponse(
        name=name,
        versions=versions,
        platform=PLATFORM,
        inputs=[_described(tensor) for tensor in INPUTS],
        outputs=[_described(tensor) for tensor in OUTPUTS],
    )


def configuration(name: str) -> kserve_pb2.ModelConfig:
    return kserve_pb2.ModelConfig(
        name=name,
        backend=PLATFORM,
        input=[
            kserve_pb2.ModelInput(name=one.name, data_type=_TYPES[one.datatype], dims=[1], optional=one.is_optional)
            for one in INPUTS
        ],
        output=[kserve_pb2.ModelOutput(name=one.name, data_type=_TYPES[one.datatype], dims=[1]) for one in OUTPUTS],
        model_transaction_policy=kserve_pb2.ModelTransactionPolicy(decoupled=True),
    )


def _described(tensor: Tensor) -> TensorMetadata:
    return TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[1])
