"""Answers that have to match something, over real gRPC: each format, each way to be wrong, and the real model."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from personas import PERSONAS
from support.structured import BOOLEAN, COLOURS, SCHEMAS, an_object, array, integer, matches, string

from gralora_server import Client
from gralora_server.client import FinishReason, InvalidArgumentError

RIGHT: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": r"[a-f]{3}\d"}, r"[a-f]{3}\d"),
    "grammar": ({"grammar": 'start: ("a" | "b") "!"'}, "[ab]!"),
    "choice": ({"choice": ["yes", "no"]}, "yes|no"),
    "schema": ({"json_schema": {"enum": ["yes", "no"]}}, '"(yes|no)"'),
}
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no-json": ({"json_schema": "{"}, "json_schema", "line 1 column 2"),
    "no-schema": ({"json_schema": {"type": "objekt"}}, "json_schema", "objekt"),
    "expression": ({"regex": "a("}, "regex", "unclosed"),
    "rule": ({"grammar": "start: nothing"}, "grammar", "nothing"),
    "too-long": ({"regex": "a" * 9000}, "regex", "must be at most 8192 bytes"),
    "no-choice": ({"choice": []}, "choice.texts", "must not be empty"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_every_format_holds_as_a_stream_and_at_once(client: Client, case: str) -> None:
    options, pattern = RIGHT[case]
    for seed in range(3):
        whole = client.generate("say it", max_tokens=50, seed=seed, **options)
        streamed = client.stream("say it", max_tokens=50, seed=seed, **options).read()

        assert re.fullmatch(pattern, whole.text), whole.text
        assert whole.finish_reason is FinishReason.STOP
        assert streamed.token_ids == whole.token_ids


def test_sixteen_schemas_at_once_hold_beside_adapters(client: Client) -> None:
    def ask(number: int) -> str:
        adapter = ("", "a0", "a1", "a2")[number % 4]
        schema = json.dumps(SCHEMAS[number])
        return client.generate(f"number {number}", adapter=adapter, max_tokens=400, seed=1, json_schema=schema).text

    with ThreadPoolExecutor(len(SCHEMAS)) as pool:
        texts = list(pool.map(ask, range(len(SCHEMAS))))

    assert all(matches(json.loads(text), schema) for text, schema in zip(texts, SCHEMAS, strict=True)), texts


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_an_invalid_argument_by_its_field(client: Client, case: str) -> None:
    options, field, problem = WRONG[case]
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate("say it", max_tokens=5, **options)

    assert caught.value.reason == "INVALID_REQUEST"
    assert [violation.field for violation in caught.value.field_violations] == [f"structured_output.{field}"]
    assert problem in str(caught.value)


PERSON = an_object(
    name=string(30, 1),
    age=integer(0, 130),
    married=BOOLEAN,
    colours=array(COLOURS, 3),
    home=an_object(city=string(30, 1)),
)


@pytest.mark.slow
def test_the_real_model_fills_a_schema_for_every_adapter_at_once(real_server: str) -> None:
    """Greedily, and with the same tokens as each of them alone."""
    names = ["", *(persona.name for persona in PERSONAS)]

    def ask(name: str) -> tuple[str, FinishReason, tuple[int, ...]]:
        found = client.generate(
            messages=[{"role": "user", "content": "Describe a person as JSON."}],
            adapter=name, max_tokens=300, temperature=0.0, json_schema=PERSON,
        )  # fmt: skip
        return found.text, found.finish_reason, found.token_ids

    with Client(real_server) as client, ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(ask, names))
        alone = [ask(name) for name in names[:3]]

    for text, reason, _ in together:
        assert matches(json.loads(text), PERSON), text
        assert reason is FinishReason.STOP
    assert together[:3] == alone
