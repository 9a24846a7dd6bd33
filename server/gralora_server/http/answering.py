"""Deltas in OpenAI's forms: chat completions and text completions, whole or in pieces. Knows no HTTP.

`model` is what really served: an adapter with its version. A request that its deadline or an abort cut short has the
finish reason "length", as clients know no other, and says more in `stop_reason`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gralora_runtime.request import Delta, Finished, FinishReason, TokenLogprob
from gralora_server.http.tool_calls import FoundCall, ToolScanner

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0  # JSON has no infinity
TextOf = Callable[[int], str]  # a token's text

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.DEADLINE: "length",
    FinishReason.CANCELLED: "length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What all that is said about one request begins with."""

    request_id: str
    model: str
    text_of: TextOf
    token_ids: bool = False  # are wanted, too
    created: int = field(default_factory=lambda: int(time.time()))


class Form(Protocol):
    """One of the two."""

    def whole(self, heading: Heading, deltas: Sequence[Delta], usage: Json) -> Json:
        """An answer of one choice for each delta."""

    def piece(self, heading: Heading, index: int, delta: Delta) -> Json:
        """What one choice went on with."""

    def usage_piece(self, heading: Heading, usage: Json) -> Json:
        """The last piece, if it was asked for."""


class ChatForm:
    """Of `/v1/chat/completions`. `scanner` finds calls of tools; None: there are no tools, and so no calls."""

    def __init__(self, scanner: Callable[[], ToolScanner] | None = None) -> None:
        self._make_scanner = scanner
        self._scanned: dict[int, _Scanned] = {}  # by choice

    def whole(self, heading: Heading, deltas: Sequence[Delta], usage: Json) -> Json:
        choices = [self._choice(heading, index, delta) for index, delta in enumerate(deltas)]
        return _headed(heading, "chatcmpl", "chat.completion", choices) | {"usage": usage}

    def piece(self, heading: Heading, index: int, delta: Delta) -> Json:
        text, calls = self._scan(index, delta)
        said: Json = {"content": text}
        if delta.started is not None:
            said = {"role": "assistant"} | said
        if calls:
            said["tool_calls"] = calls
        choice = self._ended(heading, index, delta) | {"delta": said, "logprobs": _chat_logprobs(heading, delta)}
        return _headed(heading, "chatcmpl", "chat.completion.chunk", [choice])

    def _choice(self, heading: Heading, index: int, delta: Delta) -> Json:
        text, calls = self._scan(index, delta)
        message: Json = {"role": "assistant", "content": text}
        if calls:
            message |= {
                "content": text or None,
                "tool_calls": [{k: v for k, v in call.items() if k != "index"} for call in calls],
            }
        said = {"message": message, "logprobs": _chat_logprobs(heading, delta)}
        return self._ended(heading, index, delta) | said

    def _scan(self, index: int, delta: Delta) -> tuple[str, list[Json]]:
        """What of it is text, and which calls it completes."""
        if self._make_scanner is None:
            return delta.text, []
        scanned = self._scanned.setdefault(index, _Scanned(self._make_scanner()))
        return scanned.take(delta)

    def _ended(self, heading: Heading, index: int, delta: Delta) -> Json:
        ended = _ended(heading, index, delta)
        if ended["finish_reason"] == "stop" and index in self._scanned and self._scanned[index].num_calls:
            ended["finish_reason"] = "tool_calls"
        return ended

    def usage_piece(self, heading: Heading, usage: Json) -> Json:
        return _headed(heading, "chatcmpl", "chat.completion.chunk", []) | {"usage": usage}


class _Scanned:
    """One choice, by what was found in it so far."""

    def __init__(self, scanner: ToolScanner) -> None:
        self._scanner = scanner
        self.num_calls = 0

    def take(self, delta: Delta) -> tuple[str, list[Json]]:
        """See `ChatForm`."""
        found = list(self._scanner.push(delta.text))
        if delta.finished is not None:
            found += self._scanner.end()
        calls = []
        for one in found:
            if isinstance(one, FoundCall):
                function = {"name": one.name, "arguments": one.arguments}
                call_id = f"call_{uuid.uuid4().hex[:24]}"
                calls.append({"index": self.num_calls, "id": call_id, "type": "function", "function": function})
                self.num_calls += 1
        return "".join(one for one in found if isinstance(one, str)), calls


class TextForm:
    """Of `/v1/completions`."""

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}  # of each choice's text in pieces, in characters

    def whole(self, heading: Heading, deltas: Sequence[Delta], usage: Json) -> Json:
        choices = [self._choice(heading, index, delta, 0) for index, delta in enumerate(deltas)]
        return _headed(heading, "cmpl", "text_completion", choices) | {"usage": usage}

    def piece(self, heading: Heading, index: int, delta: Delta) -> Json:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(delta.text)
        return _headed(heading, "cmpl", "text_completion", [self._choice(heading, index, delta, offset)])

    def usage_piece(self, heading: Heading, usage: Json) -> Json:
        return _headed(heading, "cmpl", "text_completion", []) | {"usage": usage}

    def _choice(self, heading: Heading, index: int, delta: Delta, offset: int) -> Json:
        said = {"text": delta.text, "logprobs": _text_logprobs(heading, delta, offset)}
        return _ended(heading, index, delta) | said


def usage_of(ends: Sequence[Finished], num_choices: int) -> Json:
    """Of all choices, `num_choices` of each prompt, which counts once."""
    prompts = ends[::num_choices]
    return _usage(
        prompt=sum(end.prompt_tokens for end in prompts),
        output=sum(end.output_tokens for end in ends),
        cached=sum(end.cached_tokens for end in prompts),
    )


class RunningUsage:
    """Of one choice, as far as it has come."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._output = 0

    def after(self, delta: Delta) -> Json:
        self._output += len(delta.token_ids)
        if delta.started is not None:
            self._prompt, self._cached = delta.started.prompt_tokens, delta.started.cached_tokens
        return _usage(prompt=self._prompt, output=self._output, cached=self._cached)


def _usage(*, prompt: int, output: int, cached: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _headed(heading: Heading, prefix: str, kind: str, choices: list[Json]) -> Json:
    return {
        "id": f"{prefix}-{heading.request_id}",
        "object": kind,
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
    }


def _ended(heading: Heading, index: int, delta: Delta) -> Json:
    choice: Json = {"index": index, "finish_reason": None}
    if delta.finished is not None:
        choice |= {"finish_reason": _REASONS[delta.finished.reason], "stop_reason": _stop_reason(delta.finished)}
    if heading.token_ids:
        choice["token_ids"] = list(delta.token_ids)
        if delta.started is not None:
            choice["prompt_token_ids"] = list(delta.started.prompt_token_ids)
    return choice


def _stop_reason(finished: Finished) -> str | int | None:
    """Which stop string or token; of an answer that was cut short, why."""
    if not finished.reason.is_whole:
        return finished.reason.value
    return finished.stop_string if finished.stop_string is not None else finished.stop_token_id


def _chat_logprobs(heading: Heading, delta: Delta) -> Json | None:
    if not delta.logprobs:
        return None
    return {"content": [_chat_logprob(heading.text_of, one) for one in delta.logprobs], "refusal": None}


def _chat_logprob(text_of: TextOf, one: TokenLogprob) -> Json:
    top = [_of_token(text_of, token, logprob) for token, logprob in one.top]
    return _of_token(text_of, one.token_id, one.logprob) | {"top_logprobs": top}


def _of_token(text_of: TextOf, token: int, logprob: float) -> Json:
    text = text_of(token)
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}


def _text_logprobs(heading: Heading, delta: Delta, offset: int) -> Mapping[str, Any] | None:
    """A token's offset is that of the text that was there before the piece, and of the tokens' own texts within it."""
    if not delta.logprobs:
        return None
    tokens = [heading.text_of(one.token_id) for one in delta.logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in delta.logprobs],
        "top_logprobs": [
            {heading.text_of(token): max(logprob, LEAST_LOGPROB) for token, logprob in one.top}
            for one in delta.logprobs
        ],
        "text_offset": offsets,
    }
