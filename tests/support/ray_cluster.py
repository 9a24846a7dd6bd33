"""Two replicas of a tiny model on a real Ray Serve, in processes of their own that end with the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from typing import IO

import grpc
import psutil
from support.peft_adapters import gralora_config, lora_config
from support.workspaces import save_workspace

from gralora.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2_grpc

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "ray_local.py"
TOKEN = "a-token-of-the-operators"
NAMES = ("a0", "a1", "a2", "a3")
HOMES = ("h0", "h1", "h2", "h3", "h4", "h5")  # that no other test asks
SOON_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    replica: str


@dataclass(frozen=True, slots=True)
class Cluster:
    process: subprocess.Popen[str]
    grpc: str
    http: str
    folder: Path  # the adapters' source
    channel: grpc.Channel = field(init=False)
    generation: generation_pb2_grpc.GenerationServiceStub = field(init=False)
    adapters: adapters_pb2_grpc.AdapterServiceStub = field(init=False)
    server: server_pb2_grpc.ServerServiceStub = field(init=False)

    def __post_init__(self) -> None:
        channel = grpc.insecure_channel(self.grpc)
        object.__setattr__(self, "channel", channel)
        object.__setattr__(self, "generation", generation_pb2_grpc.GenerationServiceStub(channel))
        object.__setattr__(self, "adapters", adapters_pb2_grpc.AdapterServiceStub(channel))
        object.__setattr__(self, "server", server_pb2_grpc.ServerServiceStub(channel))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {TOKEN}"),)

    def ask(self, adapter: str, *, max_tokens: int = 8, hint: str | None = None) -> Answer:
        """Greedily. `hint`: of the client's own; "": any replica will do."""
        request = generation_pb2.GenerateRequest(
            token_ids={"ids": [5, 6, 7]},
            adapter=adapter,
            sampling={"temperature": 0.0},
            stopping={"max_tokens": max_tokens, "ignore_eos": True},
        )
        metadata = (*self.metadata, *(() if hint is None else (("multiplexed_model_id", hint),)))
        answer, call = self.generation.Generate.with_call(request, metadata=metadata, timeout=60)
        return Answer(tuple(answer.token_ids), dict(call.trailing_metadata())["gralora-replica"])

    def ask_both(self, adapter: str) -> set[tuple[int, ...]]:
        """What the replicas answer."""
        return {answer.token_ids for answer in self.answers(adapter).values()}

    def answers(self, adapter: str) -> dict[str, Answer]:
        """By the replicas' names, once both have answered."""
        answers: dict[str, Answer] = {}
        until_s = time.monotonic() + SOON_S
        while len(answers) < 2:
            assert time.monotonic() < until_s, f"only {set(answers)} answered"
            answer = self.ask(adapter, hint="")
            answers[answer.replica] = answer
        return answers

    def used(self) -> dict[str, set[str]]:
        """The adapters that each replica has answered with."""
        used: dict[str, set[str]] = {}
        until_s = time.monotonic() + SOON_S
        while len(used) < 2:
            assert time.monotonic() < until_s, f"only {set(used)} answered"
            request = adapters_pb2.ListAdaptersRequest()
            listed, call = self.adapters.ListAdapters.with_call(request, metadata=self.metadata, timeout=60)
            replica = dict(call.trailing_metadata())["gralora-replica"]
            used[replica] = {adapter.name for adapter in listed.adapters if adapter.HasField("last_used")}
        return used

    def stream(self, adapter: str, *, max_tokens: int) -> grpc.Call:
        request = generation_pb2.StreamGenerateRequest(
            token_ids={"ids": [5, 6, 7]},
            adapter=adapter,
            sampling={"temperature": 0.0},
            stopping={"max_tokens": max_tokens, "ignore_eos": True},
        )
        return self.generation.StreamGenerate(request, metadata=self.metadata, timeout=120)

    def replicas(self) -> list[psutil.Process]:
        """Their processes."""
        return self.processes("ServeReplica:")

    def processes(self, word: str) -> list[psutil.Process]:
        """Those that have the word in what Ray calls them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if word in _title(child)]

    def put(self, name: str, like: str) -> None:
        """Another adapter into the source, with the weights of one that is there."""
        copytree(self.folder / like, self.folder / name)

    def load(self, name: str) -> None:
        """From files of another name."""
        request = adapters_pb2.LoadAdapterRequest(name=name, path=str(self.folder / "kept"))
        self.adapters.LoadAdapter(request, metadata=self.metadata, timeout=60)

    def lose(self, process: psutil.Process) -> None:
        process.kill()
        process.wait(30)

    def resume(self) -> None:
        """Returns when there are two replicas."""
        until_s = time.monotonic() + SOON_S
        while len(self.replicas()) < 2:
            assert time.monotonic() < until_s, "no other replica was started"
            time.sleep(0.1)

    def deploy(self, changes: dict[str, object]) -> None:
        """A rolling update, which is over on return."""
        _stream(self.process.stdin).write(json.dumps(changes) + "\n")
        _stream(self.process.stdin).flush()
        assert json.loads(_announcement(_stream(self.process.stdout))) == {"deployed": True}


@contextmanager
def ray_cluster(folder: Path) -> Iterator[Cluster]:
    """Files go below `folder`."""
    configs = [gralora_config("llama", 8, 2), lora_config("llama", 5), lora_config("llama", 3)]
    workspace = save_workspace(folder, {name: configs[i % 3] for i, name in enumerate((*NAMES, *HOMES, "kept"))})
    (folder / "tokens").write_text(f"{TOKEN} admin\n")
    config = folder / "gralora.toml"
    config.write_text(
        f'[engine]\nmodel = "{workspace}/model"\nthreads = 1\nmax_num_seqs = 8\nkernel_backend = "reference"\n'
        f'[memory]\nkv_cache_bytes = "64MiB"\nadapter_pool_bytes = "32MiB"\n'
        f'[adapters]\nsources = ["{workspace}/adapters"]\n'
        f'state_dir = "{folder}/state"\n'
        f'[server]\ntoken_file = "{folder}/tokens"\ngrace_s = 30\n'
    )
    command = [sys.executable, str(SCRIPT), "--config", str(config), "--grpc-port", "0", "--http-port", "0", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            told = json.loads(_announcement(_stream(process.stdout)))
            yield Cluster(process, told["grpc"], told["http"], workspace / "adapters")
        finally:
            process.terminate()
            assert process.wait(60) == 0


def _announcement(lines: IO[str]) -> str:
    """Ray says things of its own."""
    for line in lines:
        if line.startswith("{"):
            return line
    raise AssertionError("the cluster did not start")


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""
