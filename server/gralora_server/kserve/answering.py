"""The deltas of one generation as answers of this protocol. Knows no stream."""

from __future__ import annotations

from collections.abc import Iterator

from gralora.foreign import kserve_pb2
from gralora_runtime.request import Delta, FinishReason
from gralora_server.explanation import Explanation, clip
from gralora_server.kserve.asking import Asked
from gralora_server.kserve.naming import BASE_VERSION
from gralora_server.kserve.tensors import add_output
from gralora_server.validation import MAX_REFERENCE_CHARS, MAX_REQUEST_ID_CHARS

FINAL = "triton_final_response"
NOT_FINISHED = "None"  # as Triton's backend writes it

# vLLM's words; what was broken off has one alone.
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "abort",
}


class Answering:
    """Of one request, whose deltas it is told in their order."""

    def __init__(self, asked: Asked, served_by: str) -> None:
        self._asked = asked
        self._version = served_by.rpartition("@")[2] or BASE_VERSION
        self._lead = asked.lead
        self._prompt_tokens = 0

    def answer(self, delta: Delta) -> kserve_pb2.ModelInferResponse:
        """With all outputs that are wanted."""
        if delta.started is not None:
            self._prompt_tokens = delta.started.prompt_tokens
        answer = self._heading()
        for name in self._asked.outputs:
            add_output(answer, name, self._value(name, delta))
        self._lead = ""
        return answer

    def pieces(self, delta: Delta) -> Iterator[kserve_pb2.ModelStreamInferResponse]:
        """What a stream says of a delta: nothing if that has neither text nor tokens and is not the last."""
        ends = delta.finished is not None
        answer = self.answer(delta)
        if delta.text or delta.token_ids or ends:
            yield _streamed(answer, final=ends and not self._asked.wants_final)
        if ends and self._asked.wants_final:
            yield _streamed(self._heading(), final=True)

    def _heading(self) -> kserve_pb2.ModelInferResponse:
        return kserve_pb2.ModelInferResponse(
            model_name=self._asked.model_name, model_version=self._version, id=self._asked.id
        )

    def _value(self, name: str, delta: Delta) -> str | int:
        match name:
            case "text_output":
                return self._lead + delta.text
            case "finish_reason":
                return NOT_FINISHED if delta.finished is None else _REASONS[delta.finished.reason]
            case "num_input_tokens":
                return self._prompt_tokens
            case _:
                assert name == "num_output_tokens", name
                return len(delta.token_ids)


def refusal(request: kserve_pb2.ModelInferRequest, told: Explanation) -> kserve_pb2.ModelStreamInferResponse:
    """What a stream says of a request that failed."""
    about = kserve_pb2.ModelInferResponse(
        model_name=clip(request.model_name, MAX_REFERENCE_CHARS), id=clip(request.id, MAX_REQUEST_ID_CHARS)
    )
    about.parameters[FINAL].bool_param = True
    return kserve_pb2.ModelStreamInferResponse(error_message=f"{told.reason}: {told.message}", infer_response=about)


def _streamed(answer: kserve_pb2.ModelInferResponse, *, final: bool) -> kserve_pb2.ModelStreamInferResponse:
    answer.parameters[FINAL].bool_param = final
    return kserve_pb2.ModelStreamInferResponse(infer_response=answer)
