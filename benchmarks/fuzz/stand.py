"""What mutated requests are sent to: a server over a tiny model, adapters that they act on, one that they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.catalogue.base import base_of, save_tiny_llama
from benchmarks.faults.stage import Stage
from benchmarks.fuzz.seeds import Seeds
from gralora_server.loadtest.local_server import LocalServer

VICTIMS = ("b0", "b1", "b2")
UNDISTURBED = "undisturbed"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
# Little of everything: whatever grows is then full, and a valid generation short.
LITTLE = ("--threads", "1", "--max-model-len", "64", "--kv-cache-bytes", "1MiB", "--adapter-pool-bytes", "4MiB",
          "--host-cache-bytes", "4MiB", "--kserve", "--vllm-grpc")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stand:
    """`stage` is its own, and written."""

    stage: Stage

    @classmethod
    def write(cls, folder: Path) -> Stand:
        """Into an empty directory."""
        model = save_tiny_llama(folder / "model")
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (folder / "gralora.toml").write_text("")
        stage = Stage(base_of("tiny", model), folder, (*VICTIMS, UNDISTURBED))
        stage.write_adapters()
        return cls(stage)

    @property
    def seeds(self) -> Seeds:
        return Seeds(VICTIMS, self.stage.adapters / VICTIMS[0])

    @contextmanager
    def server(self) -> Iterator[LocalServer]:
        with self.stage.server("--config", str(self.stage.folder / "gralora.toml"), *LITTLE) as server:
            yield server
