"""Processes beside us: the protocol, and how their deaths are told. vLLM is a stub here."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks import vllm_process
from benchmarks.worker import Worker, WorkerError
from benchmarks.workload import Request

STUB = '''
__version__ = "0"

class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, **options):
        print("chatter on stdout")
        self.llm_engine = Engine()

class Output:
    def __init__(self, request_id, tokens):
        self.request_id, self.token_ids, self.outputs = request_id, tokens, [self]

class Engine:
    """Counts up from the last prompt token, plus 100 with a LoRA."""

    def __init__(self):
        self.running = {}

    def add_request(self, request_id, prompt, sampling, lora_request):
        start = prompt["prompt_token_ids"][-1] + (100 if lora_request else 0)
        self.running[request_id] = (start, [], sampling.max_tokens)

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        outputs = []
        for request_id, (start, tokens, most) in list(self.running.items()):
            tokens.append(start + len(tokens) + 1)
            outputs.append(Output(request_id, list(tokens)))
            if len(tokens) == most:
                del self.running[request_id]
        return outputs
'''


@pytest.fixture
def stub_vllm(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text("class LoRARequest:\n    def __init__(self, *_):\n        pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("stub_vllm")
def test_vllm_answers_with_its_tokens_and_their_times(tmp_path):
    requests = [Request("", (5, 6), 3), Request("lora", (7,), 2)]
    with vllm_process.running(
        sys.executable,
        tmp_path,
        max_num_seqs=2,
        max_model_len=8,
        loras={"lora": tmp_path},
        max_lora_rank=4,
        num_threads=1,
    ) as worker:
        for _ in range(2):
            run = worker.run(requests)

            assert [answer.tokens for answer in run.answers] == [(7, 8, 9), (108, 109)]
            assert [len(answer.times_s) for answer in run.answers] == [3, 2]
            assert run.answers[0].times_s[0] < run.answers[0].times_s[2]


@pytest.mark.usefixtures("stub_vllm")
def test_vllm_is_there_when_its_interpreter_can_import_it():
    assert vllm_process.why_not(sys.executable) is None


def test_without_vllm_the_reason_is_given(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('no such library: libfast')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert vllm_process.why_not(sys.executable) == "ImportError: no such library: libfast"


def test_a_worker_that_dies_says_why():
    command = [sys.executable, "-c", "input(); raise SystemExit('out of luck')"]

    with Worker(command, environment=os.environ) as worker, pytest.raises(WorkerError, match="status 1: out of luck"):
        worker.ask({})
