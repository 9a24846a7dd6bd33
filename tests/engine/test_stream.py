"""What a client reads: deltas that it was too busy for are one, and their text is made when it reads them."""

from __future__ import annotations

import pytest

from gralora_runtime.errors import RequestFailedError
from gralora_runtime.request import Delta, Finished, FinishReason
from gralora_runtime.stream import RequestStream, merge_deltas


class Spelling:
    """Token 7 is the text "<7>"; half a character is held back until the flush."""

    def push_all(self, token_ids: tuple[int, ...]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    def flush(self) -> str:
        return "."


class Broken(Spelling):
    def push_all(self, token_ids: tuple[int, ...]) -> str:
        raise KeyError("a bug")


def stream_of(*deltas: Delta, detokenizer: object = None) -> tuple[RequestStream, list[str]]:
    aborted: list[str] = []
    stream = RequestStream("r", aborted.append)
    stream.detokenizer = detokenizer  # type: ignore[assignment]
    for delta in deltas:
        stream.put(delta)
    return stream, aborted


def token(token_id: int, reason: FinishReason | None = None, stop_token_id: int | None = None) -> Delta:
    finished = None
    if reason is not None:
        finished = Finished(
            reason=reason, prompt_tokens=1, cached_tokens=0, output_tokens=1, stop_token_id=stop_token_id
        )
    return Delta(token_ids=(token_id,), finished=finished)


async def test_what_was_not_read_in_time_is_one_delta_in_order_and_what_is_read_at_once_is_not() -> None:
    stream, _ = stream_of(token(1), token(2), token(3), detokenizer=Spelling())
    first = await anext(stream)
    stream.put(token(4))
    second = await anext(stream)

    assert (first.token_ids, first.text) == ((1, 2, 3), "<1><2><3>")
    assert (second.token_ids, second.text) == ((4,), "<4>")


@pytest.mark.parametrize(
    ("last", "text"),
    [
        pytest.param(token(9, FinishReason.STOP, 9), "<1>.", id="the token that stops is no text"),
        pytest.param(token(9, FinishReason.LENGTH), "<1><9>.", id="what was held back comes at the end"),
        pytest.param(
            Delta(finished=token(0, FinishReason.CANCELLED).finished), "<1>", id="who cancels gets what was whole"
        ),
    ],
)
async def test_the_end_of_the_text(last: Delta, text: str) -> None:
    for at_once in (True, False):
        stream, _ = stream_of(token(1), *([last] if at_once else []), detokenizer=Spelling())
        deltas = [await anext(stream)]
        if not at_once:
            stream.put(last)
            deltas.append(await anext(stream))

        assert merge_deltas(deltas).text == text
        assert deltas[-1].finished == last.finished
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_text_that_came_with_its_tokens_stays_as_it_is() -> None:
    stream, _ = stream_of(Delta(text="as the engine says", token_ids=(1,)))

    assert (await anext(stream)).text == "as the engine says"


async def test_a_bug_in_making_text_ends_its_request_alone() -> None:
    stream, aborted = stream_of(token(1), detokenizer=Broken())

    with pytest.raises(RequestFailedError):
        await anext(stream)
    assert aborted == ["r"]
