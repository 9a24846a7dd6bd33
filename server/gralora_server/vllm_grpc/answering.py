"""The deltas of one generation as answers of this protocol. Knows no stream."""

from __future__ import annotations

from collections.abc import Iterator

from gralora.foreign import vllm_pb2
from gralora_runtime.request import Delta, Finished, FinishReason, Started, TokenLogprob
from gralora_server.vllm_grpc.asking import Asked

BELOW_ALL = 0  # a rank that nobody has looked for

FinishInfo = vllm_pb2.FinishInfo
Candidates = vllm_pb2.CandidateTokenInfo

_REASONS = {
    FinishReason.STOP: FinishInfo.STOP,
    FinishReason.LENGTH: FinishInfo.LENGTH,
    FinishReason.CANCELLED: FinishInfo.ABORTED,
    FinishReason.DEADLINE: FinishInfo.ABORTED,
}


class Answering:
    """Of one request, whose deltas it is told in their order."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._text = ""  # that was not told yet

    def pieces(self, delta: Delta) -> Iterator[vllm_pb2.GenerateResponse]:
        """What a stream says of a delta: nothing if that has no tokens, and is neither the first nor the last."""
        if delta.started is not None or delta.token_ids or delta.finished is not None:
            yield self.answer(delta)
        else:
            self._text += delta.text

    def answer(self, delta: Delta) -> vllm_pb2.GenerateResponse:
        answer = vllm_pb2.GenerateResponse()
        if delta.started is not None:
            answer.prompt_info.CopyFrom(_prompt_info(delta.started))
        self._text += delta.text
        # Their clients pass over text that comes without tokens, unless it is the last.
        if delta.token_ids or delta.finished is not None:
            answer.outputs.CopyFrom(self._outputs(delta))
            self._text = ""
        return answer

    def _outputs(self, delta: Delta) -> vllm_pb2.SequenceOutput:
        asked = self._asked
        output = vllm_pb2.SequenceOutput(
            text=self._text if asked.text else "",
            num_tokens=len(delta.token_ids),
            token_ids=delta.token_ids if asked.token_ids else (),
        )
        if asked.logprobs:
            output.logprobs.extend(one.logprob for one in delta.logprobs)
            output.ranks.extend(_rank(one) for one in delta.logprobs)
            output.candidate_tokens.extend(_candidates(one, asked.num_candidates) for one in delta.logprobs)
        if delta.finished is not None:
            output.finish_info.CopyFrom(self._finish_info(delta.finished))
        return output

    def _finish_info(self, finished: Finished) -> FinishInfo:
        info = FinishInfo(num_output_tokens=finished.output_tokens, finish_reason=_REASONS[finished.reason])
        stop_string, token_id = finished.stop_string, finished.stop_token_id
        if stop_string is not None:
            info.stop_string = stop_string
        elif token_id is not None and token_id in self._asked.generation.stopping.stop_token_ids:
            info.stop_token_id = token_id
        elif token_id is not None:
            info.eos_token_id = token_id
        return info


def _prompt_info(started: Started) -> vllm_pb2.PromptInfo:
    return vllm_pb2.PromptInfo(num_prompt_tokens=started.prompt_tokens, token_ids=started.prompt_token_ids)


def _rank(logprob: TokenLogprob) -> int:
    ids = [token_id for token_id, _ in logprob.top]
    return 1 + ids.index(logprob.token_id) if logprob.token_id in ids else BELOW_ALL


def _candidates(logprob: TokenLogprob, count: int) -> Candidates:
    """Of the first so many, those that the token is not itself."""
    return Candidates(
        tokens=[
            Candidates.TokenInfo(id=token_id, logprob=value, rank=rank)
            for rank, (token_id, value) in enumerate(logprob.top[:count], start=1)
            if token_id != logprob.token_id
        ]
    )
