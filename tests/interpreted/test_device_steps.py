"""Steps that are launched one behind the other, and sampled on the device: what the host chooses, step after step."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from support.served import Served, serving
from support.structured import compiled

from gralora_kernels.triton_ops import sampling_launch
from gralora_kernels.triton_ops.tokens import follow
from gralora_runtime.assemble import EngineParts
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.errors import GraloraError, MemoryShortageError
from gralora_runtime.model.programs.gpu.runner import GpuRunner
from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.request import (
    Delta,
    FinishReason,
    ResponseParams,
    SamplingParams,
    StoppingParams,
    StructuredOutput,
)
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.sequence import Sequence
from gralora_runtime.stepping.device_executor import OnDevice
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.executor import InTurn
from gralora_runtime.stepping.fence import StepFence
from gralora_runtime.structured.matcher import Matcher
from gralora_runtime.structured.vocabulary import Vocabulary

SIZES = {
    "all_ranks": False,
    "pipeline": "on",
    "kernel_backend": "triton",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
}
PROMPTS = ([5, 6, 7, 8], [9, 3], [200, 17, 31])
GREEDY, SEEDED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)
ALL_RULES = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3,
    frequency_penalty=0.2, logit_bias={7: -3.0, 11: 2.0},
)  # fmt: skip
# Greedy beside seeded ones, with and without an adapter; the last is banned from ending for a while.
REQUESTS = (
    ("", GREEDY, StoppingParams(max_tokens=5, ignore_eos=True), ResponseParams()),
    ("lora", SEEDED, StoppingParams(max_tokens=6), ResponseParams(logprobs=True, top_logprobs=3)),
    ("gralora-r8-k2", ALL_RULES, StoppingParams(max_tokens=6, min_tokens=4), ResponseParams()),
)  # fmt: skip


def test_tokens_follow_where_they_are_unknown_and_only_there():
    token_ids = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    follow(token_ids, torch.tensor([-1, 2, -1, 0], dtype=torch.int32), torch.tensor([11, 12, 13], dtype=torch.int32))

    assert token_ids.tolist() == [5, 13, 7, 11]


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_pipelined_steps_choose_on_the_device_what_the_host_chooses_step_after_step(build, tmp_path):
    """For GPT-2 by transformers' forward pass."""
    with serving(build, tmp_path / "model", tmp_path / "adapters", cuda_graphs=(2, 4), **SIZES) as served:
        on_device = served.parts.engine
        assert isinstance(on_device.executor, OnDevice)
        assert on_device.pipelined
        assert isinstance(served.parts.runner, GpuRunner) == (build == "llama")
        observation = StepObservation()
        on_host = Engine(
            on_device.scheduler, on_device.batch, InTurn(served.parts.runner, observation), observation, StepFence()
        )
        expected, actual = (answers(served, engine) for engine in (on_host, on_device))

    assert {request_id: tokens(deltas) for request_id, deltas in actual.items()} == {
        request_id: tokens(deltas) for request_id, deltas in expected.items()
    }
    for request_id, deltas in expected.items():
        assert finish(actual[request_id]) == finish(deltas)
        for one, other in zip(logprobs(deltas), logprobs(actual[request_id]), strict=True):
            assert [pair[0] for pair in one.top] == [pair[0] for pair in other.top]
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
    assert len(logprobs(expected["1"])) == len(tokens(expected["1"]))


def test_answers_that_have_to_match_something_do_so_on_the_device_beside_others(tmp_path):
    """The second goes on to its last token, the third is complete before."""
    wanted = {1: StructuredOutput(regex="[xyz]{40}"), 2: StructuredOutput(choice=("no", "yes"))}
    with serving("llama", tmp_path / "model", tmp_path / "adapters", cuda_graphs=(2, 4), **SIZES) as served:
        on_device = served.parts.engine
        observation = StepObservation()
        on_host = Engine(
            on_device.scheduler, on_device.batch, InTurn(served.parts.runner, observation), observation, StepFence()
        )
        expected, actual = (answers(served, engine, wanted) for engine in (on_host, on_device))
        free = answers(served, on_device)

    assert {request_id: tokens(deltas) for request_id, deltas in actual.items()} == {
        request_id: tokens(deltas) for request_id, deltas in expected.items()
    }
    assert tokens(free["0"]) == tokens(actual["0"])
    texts = ["".join(delta.text for delta in actual[request_id]) for request_id in ("1", "2")]
    assert re.fullmatch("[xyz]+", texts[0])
    assert texts[1] in ("no", "yes")
    assert [finish(actual[request_id])[0] for request_id in ("1", "2")] == [FinishReason.LENGTH, FinishReason.STOP]
    for one, other in zip(logprobs(expected["1"]), logprobs(actual["1"]), strict=True):
        assert [pair[0] for pair in one.top] == [pair[0] for pair in other.top]
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)


def test_what_is_left_of_a_step_that_ran_out_of_memory_while_it_sampled_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    """The device was told of a token that was never chosen: its place in the random stream, and its history."""
    with serving("llama", tmp_path / "model", tmp_path / "adapters", cuda_graphs=(), **SIZES) as served:
        engine = served.parts.engine
        expected = answers(served, engine)
        rows, calls = engine.executor._sampler.base._rows, []
        sample = rows.sample

        def run_out(*args):
            calls.append(args)
            if len(calls) == 4:
                raise torch.OutOfMemoryError
            return sample(*args)

        monkeypatch.setattr(rows, "sample", run_out)
        monkeypatch.setitem(globals(), "REQUESTS", REQUESTS[::-1])  # whoever has all rules is the oldest
        monkeypatch.setitem(globals(), "PROMPTS", PROMPTS[::-1])
        found, errors = outputs(served, engine, {})

    assert tokens(found["0"]) == tokens(expected["2"])
    assert {request_id: type(error) for request_id, error in errors.items()} == {
        "1": MemoryShortageError,
        "2": MemoryShortageError,
    }


def test_a_vocabulary_that_is_too_large_for_the_device_is_sampled_on_the_host(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sampling_launch, "MAX_VOCAB", 100)
    with serving("llama", tmp_path / "model", tmp_path / "adapters", cuda_graphs=(), **SIZES) as served:
        found = answers(served, served.parts.engine)
        served.parts.engine.close()

    assert not isinstance(served.parts.engine.executor, OnDevice)
    assert "sampled on the host, step after step: " in caplog.text
    assert len(tokens(found["0"])) == 5


def answers(
    served: Served, engine: Engine, wanted: Mapping[int, StructuredOutput] | None = None
) -> dict[str, list[Delta]]:
    found, errors = outputs(served, engine, wanted or {})
    assert errors == {}
    return found


def outputs(
    served: Served, engine: Engine, wanted: Mapping[int, StructuredOutput]
) -> tuple[dict[str, list[Delta]], dict[str, GraloraError]]:
    """`wanted`: what some of the requests have to match."""
    base, vocab_size = served.parts.base, served.parts.info.vocab_size
    vocabulary = Vocabulary(base.tokenizer, eos_token_ids=base.eos_token_ids, vocab_size=vocab_size, num_threads=1)
    scheduler, found, errors = engine.scheduler, dict[str, list[Delta]](), dict[str, GraloraError]()
    for number, (adapter, sampling, stopping, response) in enumerate(REQUESTS):
        output = wanted.get(number)
        matcher = None if output is None else Matcher(compiled(output, vocabulary), stopping)
        scheduler.add(sequence(served.parts, str(number), adapter, sampling, stopping, response, matcher))
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = output.error
            else:
                found.setdefault(output.request_id, []).append(output.delta)
        scheduler.check_integrity()
    vocabulary.close()
    return found, errors


def sequence(
    parts: EngineParts,
    request_id: str,
    adapter: str,
    sampling: SamplingParams,
    stopping: StoppingParams,
    response: ResponseParams,
    matcher: Matcher | None,
) -> Sequence:
    prompt = list(PROMPTS[int(request_id)])
    eos = parts.base.eos_token_ids
    return Sequence(
        request_id=request_id,
        adapter_name=adapter,
        tokens=prompt,
        num_prompt=len(prompt),
        max_tokens=stopping.max_tokens or 1,
        stopping=stopping,
        eos_token_ids=eos,
        lease=parts.adapters.acquire(adapter).result(30),
        sampler=SamplerState(
            sampling, stopping, response, seed=3, prompt_token_ids=prompt, eos_token_ids=eos,
            vocab_size=parts.info.vocab_size, matcher=matcher,
        ),
        detokenizer=Detokenizer(parts.base.tokenizer),
        arrival_s=0.0,
        seed=3,
    )  # fmt: skip


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def logprobs(deltas: list[Delta]):
    return [logprob for delta in deltas for logprob in delta.logprobs]


def finish(deltas: list[Delta]) -> tuple[FinishReason, int]:
    last = deltas[-1].finished
    assert last is not None
    return last.reason, last.output_tokens
