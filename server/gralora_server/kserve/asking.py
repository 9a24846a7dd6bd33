"""A request of this protocol to a message of ours, and to what its client wants to hear. Decides nothing about either:
what a generation may be is checked where gRPC's requests are.
"""

from __future__ import annotations

from dataclasses import dataclass

from gralora.foreign import kserve_pb2
from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.kserve import parameters
from gralora_server.kserve.naming import ModelName, in_their_words
from gralora_server.kserve.tensors import OUTPUTS, is_output, read_inputs
from gralora_server.validation import validate_request_id

FINAL_WANTED = "triton_enable_empty_final_response"
TEXT_OUTPUT = "text_output"
FLAGGED = tuple(one.name for one in OUTPUTS if one.name != TEXT_OUTPUT)
MICROSECONDS = (1, 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. `generation` is ours, and is written to on its way through the server."""

    generation: generation_pb2.StreamGenerateRequest
    model_name: str
    adapter_field: str  # which of theirs named the adapter
    id: str  # comes back with each answer
    in_pieces: bool
    lead: str  # said before the text
    outputs: tuple[str, ...]
    wants_final: bool  # an empty answer after the last one
    timeout_s: float | None


def read_request(request: kserve_pb2.ModelInferRequest, *, base: str) -> Asked:
    """`base`: the base model's name. Raises InvalidRequestError naming a field, an input or a parameter."""
    with in_their_words({"request_id": "id"}):
        validate_request_id(request.id)
    given = _parameters(request)
    given |= read_inputs(request)
    wants_final = parameters.flag(FINAL_WANTED, given.pop(FINAL_WANTED, False))
    timeout_s = _timeout_s(given.pop("timeout", None))
    in_pieces = parameters.flag("stream", given.pop("stream", False))
    prompt = _prompt(given)
    lead = _lead(prompt, given, in_pieces=in_pieces)
    outputs = _outputs(request, given)
    given |= _sampling_parameters(given)
    lora = _lora(given)
    generation = generation_pb2.StreamGenerateRequest(text=prompt, adapter=_adapter(request, lora, base))
    parameters.put(given, generation)
    return Asked(
        generation=generation,
        model_name=request.model_name,
        adapter_field="lora_name" if lora else "model_name",
        id=request.id,
        in_pieces=in_pieces,
        lead=lead,
        outputs=outputs,
        wants_final=wants_final,
        timeout_s=timeout_s,
    )


def _parameters(request: kserve_pb2.ModelInferRequest) -> dict[str, object]:
    """None where one has no value."""
    found: dict[str, object] = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        found[name] = None if kind is None else getattr(parameter, kind)
    return found


def _timeout_s(given: object) -> float | None:
    return None if given is None else parameters.integer("timeout", given, MICROSECONDS) / 1e6


def _sampling_parameters(given: dict[str, object]) -> dict[str, object]:
    written = parameters.text("sampling_parameters", given.pop("sampling_parameters", "{}"))
    return parameters.json_object("sampling_parameters", written)


def _lora(given: dict[str, object]) -> str:
    name = given.pop("lora_name", None)
    return "" if name is None else parameters.text("lora_name", name)


def _prompt(given: dict[str, object]) -> str:
    if "text_input" not in given:
        raise InvalidRequestError("text_input", None, "must be there")
    return parameters.text("text_input", given.pop("text_input"))


def _lead(prompt: str, given: dict[str, object], *, in_pieces: bool) -> str:
    """What Triton's backend says first: the prompt, unless it is told otherwise or answers in pieces."""
    excluded = parameters.flag("exclude_input_in_output", given.pop("exclude_input_in_output", in_pieces))
    if in_pieces and not excluded:
        raise InvalidRequestError("exclude_input_in_output", excluded, "must be true, or not be there, with stream")
    return "" if excluded else prompt


def _outputs(request: kserve_pb2.ModelInferRequest, given: dict[str, object]) -> tuple[str, ...]:
    """Those that are named; if none is, the text and those that flags ask for."""
    flagged = [name for name in FLAGGED if parameters.flag(f"return_{name}", given.pop(f"return_{name}", False))]
    named = [output.name for output in request.outputs[: len(OUTPUTS) + 1]]
    for name in named:
        if not is_output(name):
            raise InvalidRequestError("outputs", name, "is an output that this server does not have")
    if len(named) != len(set(named)):
        raise InvalidRequestError("outputs", named, "must name each output once")
    if any(output.parameters for output in request.outputs):
        raise InvalidRequestError("outputs", named, "must have no parameters: neither classes nor shared memory")
    return tuple(named or (TEXT_OUTPUT, *flagged))


def _adapter(request: kserve_pb2.ModelInferRequest, lora: str, base: str) -> str:
    model = ModelName(request.model_name, request.model_version)
    if model.is_base(base):
        return lora
    if lora:
        problem = f"is for requests to the base model, {base!r}: model_name names an adapter already"
        raise InvalidRequestError("lora_name", lora, problem)
    return model.adapter
