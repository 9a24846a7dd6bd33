"""SmolLM2 and the committed example adapters, over real gRPC, against PEFT: 64 greedy tokens each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft_oracle import GreedyAnswer, compare, greedy, load_base
from personas import PERSONAS

from gralora_server import Client

from .conftest import EXAMPLES

PROMPT = "What is the capital of France?"
NUM_TOKENS = 64
NAMES = ("", *(persona.name for persona in PERSONAS))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompt_token_ids(real_server: str) -> tuple[int, ...]:
    with Client(real_server) as client:
        return client.tokenize(messages=[{"role": "user", "content": PROMPT}]).token_ids


@pytest.fixture(scope="module")
def expected(smollm2: Path, prompt_token_ids: tuple[int, ...]) -> dict[str, GreedyAnswer]:
    base = load_base(smollm2)
    return {name: greedy(base, EXAMPLES / name if name else None, prompt_token_ids, NUM_TOKENS) for name in NAMES}


def serve(client: Client, name: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    return client.generate(
        token_ids=token_ids, adapter=name, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    ).token_ids


def check(served: dict[str, tuple[int, ...]], expected: dict[str, GreedyAnswer]) -> None:
    for name in NAMES:
        verdict = compare(served[name], expected[name])
        assert len(served[name]) == NUM_TOKENS
        assert verdict.equal, f"{name or 'base'}: differs from PEFT at token {verdict.first_difference}"
        if verdict.flip_at is not None:
            print(f"{name or 'base'}: PEFT's own tie at token {verdict.flip_at} went the other way")


def test_every_adapter_alone_has_pefts_tokens(
    real_server: str, prompt_token_ids: tuple[int, ...], expected: dict[str, GreedyAnswer]
) -> None:
    with Client(real_server) as client:
        served = {name: serve(client, name, prompt_token_ids) for name in NAMES}

    check(served, expected)


def test_all_adapters_in_one_batch_have_pefts_tokens(
    real_server: str, prompt_token_ids: tuple[int, ...], expected: dict[str, GreedyAnswer]
) -> None:
    with Client(real_server) as client, ThreadPoolExecutor(len(NAMES)) as pool:
        served = dict(zip(NAMES, pool.map(lambda name: serve(client, name, prompt_token_ids), NAMES), strict=True))

    check(served, expected)
    assert len({answer.token_ids for answer in expected.values()}) == len(NAMES), "adapters do not differ"
