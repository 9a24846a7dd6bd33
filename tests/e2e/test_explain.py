"""`gralora explain` on a real server: its parts are what a client measures, for a mixed load."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

from e2e.conftest import GRALORA, serving
from gralora_server.client import AsyncClient, Explanation

NUM_REQUESTS = 200
CRAMPED = ("--threads", "1", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--page-size", "4")
# So little memory that requests give way to one another, and adapters leave the pool.
CRAMPED += ("--kv-cache-bytes", "200KiB", "--max-model-len", "110", "--max-adapter-slots", "1")
CRAMPED += ("--max-queue-tokens", "20000")  # all of them may wait


async def ask(client: AsyncClient, at: int) -> tuple[str, float]:
    """A request of the mix, by its number: its id, and what its client measured."""
    await asyncio.sleep(0.001 * at)  # they come faster than anything answers them, and not all at once
    began_s = time.perf_counter()
    answer = await client.generate(
        token_ids=[3 + (at * 7 + place) % 290 for place in range(5 + at % 60)],
        adapter=("", "a0", "a1", "a2")[at % 4],
        max_tokens=10 + at % 35,
        ignore_eos=True,
        request_id=f"mix{at}",
    )
    return answer.request_id, time.perf_counter() - began_s


async def mixed(address: str) -> list[tuple[float, Explanation]]:
    async with AsyncClient(address) as client:
        asked = await asyncio.gather(*(ask(client, at) for at in range(NUM_REQUESTS)))
        told = []
        for request_id, measured_s in asked:
            found = await client.explain(request_id)
            assert found is not None
            told.append((measured_s, found))
        return told


def test_the_parts_of_a_mixed_load_are_what_its_clients_measure(tiny_workspace: Path) -> None:
    with serving(tiny_workspace / "model", tiny_workspace / "adapters", *CRAMPED) as address:
        told = asyncio.run(mixed(address))

    stages = {part.stage for _, found in told for part in found.parts}
    assert {"tokenize", "adapter", "queue", "prefill", "decode", "preempted", "delivery"} <= stages, "too easy a load"
    assert {"read", "room", "copy"} <= {part.station for _, found in told for part in found.parts}
    for measured_s, found in told:
        assert sum(part.duration_s for part in found.parts) == pytest.approx(found.total_s)
        assert found.total_s <= measured_s
    # What lies before and behind is the client's and gRPC's; `benchmarks/seeing.py` says how much on a quiet machine.
    assert statistics.median(found.total_s / measured_s for measured_s, found in told) > 0.5


def test_the_command_shows_a_waterfall_and_both_sentences(tiny_server: str) -> None:
    async def one() -> None:
        async with AsyncClient(tiny_server) as client:
            await client.generate("hello", max_tokens=5, ignore_eos=True, request_id="shown")

    asyncio.run(one())
    command = [str(GRALORA), "explain", "shown", "--address", tiny_server]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "shown: the base model" in shown
    assert "decode" in shown
    assert "went to" in shown
    assert "What would have helped: " in shown
    document = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert document["outcome"] == "length"
    assert sum(part["duration_s"] for part in document["parts"]) == pytest.approx(document["total_s"])

    unknown = subprocess.run([*command[:2], "nobody", *command[3:]], check=False, capture_output=True, text=True)
    assert unknown.returncode == 1
    assert "no recent request is called 'nobody'" in unknown.stderr


@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_answer_over_http_says_the_id_by_which_it_is_explained(tiny_http: str, num_choices: int) -> None:
    body = {"model": "a0", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, "n": num_choices, "temperature": 1}
    answer = httpx2.post(f"{tiny_http}/v1/completions", json=body, timeout=60)
    request_id = answer.headers["x-request-id"]
    found = httpx2.get(f"{tiny_http}/v1/requests/{request_id}/explanation", timeout=60)
    assert found.status_code == 200, found.text
    assert found.json()["adapter"] == "a0@1"
    assert found.json()["output_tokens"] == 5
