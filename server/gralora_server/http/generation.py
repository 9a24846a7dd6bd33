"""Completions and chat completions: one request of the engine for each choice, and their answers in one response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import Delta, Finished
from gralora_server.base_model import base_name
from gralora_server.delivery import collect, deliver
from gralora_server.gate import Gate
from gralora_server.generating import Generating
from gralora_server.http.answering import ChatForm, Form, Heading, RunningUsage, TextForm, usage_of
from gralora_server.http.asking import called_tools, chat_requests, completion_requests
from gralora_server.http.bodies import ChatBody, CompletionBody, Sampled
from gralora_server.http.calls import Endpoint
from gralora_server.http.exchange import Exchange
from gralora_server.http.forced_calls import grammar_of_calls
from gralora_server.http.tool_calls import FORMATS, ToolFormat
from gralora_server.repeats import Answer

RPC = "/gralora.v1.GenerationService/StreamGenerate"

T = TypeVar("T")
Asked = Sequence[generation_pb2.StreamGenerateRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """The answers to one request, one for each choice, and how they are to be told."""

    body: Sampled
    asked: Asked
    answers: Sequence[Answer]
    heading: Heading
    form: Form


class GenerationEndpoints:
    """What `Generating` answers, in OpenAI's forms."""

    def __init__(self, gate: Gate, generating: Generating, *, write_timeout_s: float) -> None:
        self._gate = gate
        self._generating = generating
        self._write_timeout_s = write_timeout_s

    def all(self) -> list[Endpoint]:
        return [
            Endpoint(
                verb="POST",
                path="/v1/chat/completions",
                rpc=RPC,
                says="The next turn of a conversation, by the model's chat template.",
                serve=self._chat,
                body=ChatBody,
            ),
            Endpoint(
                verb="POST",
                path="/v1/completions",
                rpc=RPC,
                says="What a text, or tokens, go on with.",
                serve=self._complete,
                body=CompletionBody,
            ),
        ]

    async def _chat(self, exchange: Exchange, _path: dict[str, str]) -> None:
        body = await exchange.body(ChatBody)
        asked = chat_requests(body, base=self._base(), request_id=exchange.header("x-request-id"))
        format_ = self._tool_format(asked)
        with _force_calls(body, asked, format_):
            await self._answer(exchange, body, asked, ChatForm(None if format_ is None else format_.scanner))

    async def _complete(self, exchange: Exchange, _path: dict[str, str]) -> None:
        body = await exchange.body(CompletionBody)
        asked = completion_requests(body, base=self._base(), request_id=exchange.header("x-request-id"))
        await self._answer(exchange, body, asked, TextForm())

    async def _answer(self, exchange: Exchange, body: Sampled, asked: Asked, form: Form) -> None:
        exchange.asked = asked[0]
        await exchange.while_connected(self._tell(exchange, body, asked, form))

    async def _tell(self, exchange: Exchange, body: Sampled, asked: Asked, form: Form) -> None:
        async with self._opened(exchange, body, asked, form) as opened:
            if body.stream:
                await self._stream(exchange, opened)
            else:
                await self._whole(exchange, opened)

    async def _whole(self, exchange: Exchange, opened: _Opened) -> None:
        deltas = await _together([collect(answer) for answer in opened.answers])
        usage = usage_of([_end(delta) for delta in deltas], opened.body.n)
        await exchange.respond(200, opened.form.whole(opened.heading, deltas, usage), _headers(opened.heading))

    async def _stream(self, exchange: Exchange, opened: _Opened) -> None:
        await exchange.begin_events(_headers(opened.heading))
        ends: dict[int, Finished] = {}
        so_far = [RunningUsage() for _ in opened.answers] if opened.body.includes_running_usage else None

        async def write(index: int, delta: Delta) -> None:
            if delta.finished is not None:
                ends[index] = delta.finished
            usage = {} if so_far is None else {"usage": so_far[index].after(delta)}
            await exchange.event(opened.form.piece(opened.heading, index, delta) | usage)

        await _together(
            [
                deliver(
                    answer,
                    partial(write, index),
                    request_id=opened.asked[index].request_id,
                    min_tokens=1,
                    write_timeout_s=self._write_timeout_s,
                    on_slow=answer.hold,
                    on_read=answer.go_on,
                )
                for index, answer in enumerate(opened.answers)
            ]
        )
        if opened.body.includes_usage:
            usage = usage_of([ends[index] for index in range(len(ends))], opened.body.n)
            await exchange.event(opened.form.usage_piece(opened.heading, usage))
        await exchange.end_events()

    @asynccontextmanager
    async def _opened(self, exchange: Exchange, body: Sampled, asked: Asked, form: Form) -> AsyncIterator[_Opened]:
        """All choices, or none: whoever is refused hears of it as a response's status."""
        async with AsyncExitStack() as stack:
            answers = []
            for one in asked:
                one.response.echo_prompt_token_ids = body.return_token_ids
                opening = self._generating.opened(one, remaining_s=exchange.remaining_s())
                answers.append(await stack.enter_async_context(opening))
            engine = self._gate.engine
            heading = Heading(
                request_id=exchange.header("x-request-id") or asked[0].request_id,
                model=answers[0].served_by or self._base(),
                text_of=engine.token_text,
                token_ids=body.return_token_ids,
            )
            yield _Opened(body=body, asked=asked, answers=answers, heading=heading, form=form)

    def _tool_format(self, asked: Asked) -> ToolFormat | None:
        """None: there are no tools. Raises InvalidRequestError where calls could not be found in its text."""
        tools = asked[0].messages.tools
        if not tools:
            return None
        name = self._gate.engine.info().tool_format
        if name not in FORMATS:
            names = [tool.name for tool in tools]
            problem = "nobody has told this server how the model calls tools: its chat template shows no known format"
            raise InvalidRequestError("tools", names, problem)
        return FORMATS[name]

    def _base(self) -> str:
        return base_name(self._gate.engine.info())


@contextmanager
def _force_calls(body: ChatBody, asked: Asked, format_: ToolFormat | None) -> Iterator[None]:
    """Answers are nothing but calls, if the body wants that. What is wrong with the grammar is wrong with the tools."""
    tools = called_tools(body, asked[0].messages.tools)
    if not tools or format_ is None:
        yield
        return
    only_one = body.tool_choice != "required" or body.parallel_tool_calls is False
    grammar = grammar_of_calls(tools, format_, only_one=only_one)
    for one in asked:
        one.structured_output.grammar = grammar
    try:
        yield
    except InvalidRequestError as error:
        if error.field == "structured_output.grammar":
            raise InvalidRequestError("tools", [tool.name for tool in tools], error.problem) from None
        raise


async def _together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; of errors, the first. A single one needs no task of its own."""
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _end(delta: Delta) -> Finished:
    assert delta.finished is not None
    return delta.finished


def _headers(heading: Heading) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", heading.request_id.encode())]
