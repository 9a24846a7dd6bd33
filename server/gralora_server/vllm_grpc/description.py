"""The server, its base model and its adapters as this protocol describes them."""

from __future__ import annotations

from pathlib import Path

from gralora.foreign import vllm_pb2
from gralora.v1 import adapters_pb2
from gralora_runtime.info import EngineInfo
from gralora_server.base_model import base_name
from gralora_server.vllm_grpc.naming import lora_id

API_VERSION = "vllm"  # Dynamo takes no other


def server_info(info: EngineInfo, instance_id: str) -> vllm_pb2.ServerInfo:
    alone = vllm_pb2.ParallelismInfo(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        data_parallel_rank=0,
        decode_context_parallel_size=1,
        world_size=1,
    )
    return vllm_pb2.ServerInfo(
        engine_version=info.version,
        api_version=API_VERSION,
        instance_id=instance_id,
        parallelism=alone,
        max_model_len=info.max_model_len,
        kv_block_size=info.page_size,
        total_kv_blocks=info.num_pages,
        max_running_requests=info.max_num_seqs,
        max_batched_tokens=info.max_num_batched_tokens,
        max_loras=info.max_adapter_slots,
    )


def model_info(info: EngineInfo, directory: Path) -> vllm_pb2.ModelInfo:
    """`directory`: where frontends find tokenizer and chat template."""
    return vllm_pb2.ModelInfo(
        model_id=str(directory.absolute()),
        served_model_name=base_name(info),
        supports_text_input=True,
        supports_token_ids_input=True,
        supports_lora=True,
    )


def described(adapter: adapters_pb2.Adapter) -> vllm_pb2.LoraAdapter:
    # Whoever was never read has no source yet, and theirs must not be empty.
    return vllm_pb2.LoraAdapter(
        lora_id=lora_id(adapter.name), lora_name=adapter.name, source_path=adapter.source or adapter.name
    )
