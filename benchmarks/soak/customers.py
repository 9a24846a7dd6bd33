"""Who the customers are, and the server that knows them: a configuration file, adapters, and who may what."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.catalogue.fleet import Fleet

ADMIN = "soak-admin"
LIMITED = "limited"


@dataclass(frozen=True, slots=True)
class Customer:
    """Adapters are its own by the last digit of their names."""

    name: str
    digits: str
    share: float  # of the requests
    limits: str = ""  # TOML

    @property
    def token(self) -> str:
        return f"soak-{self.name}"

    def owns(self, adapter: str) -> bool:
        return adapter[-1] in self.digits


CUSTOMERS = (
    Customer("large", "01234", 0.5),
    Customer("middle", "567", 0.25),
    Customer("small", "8", 0.15),
    Customer(LIMITED, "9", 0.1, "limits = {requests_per_s = 0.5, burst_s = 4, streams = 2}"),
)


def write_configuration(path: Path, round_number: int = 0) -> None:
    """One that says the same of all that is looked at, and something else of what is not, each time."""
    lines = [f"[objectives]\nfirst_token_s = {1000 + round_number}", "[[admin_tokens]]", f'sha256 = "{_hash(ADMIN)}"']
    for one in CUSTOMERS:
        lines += [f"[tenants.{one.name}]", f'adapters = ["a????[{one.digits}]"]', one.limits]
        lines += [f"[[tenants.{one.name}.tokens]]", f'sha256 = "{_hash(one.token)}"']
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(path)


def command(fleet: Fleet, room: int, folder: Path, max_model_len: int) -> Sequence[str]:
    """`gralora serve` with room for so many adapters."""
    room_bytes = room * fleet.contents.mean_bytes()
    arguments = ["serve", "--config", folder / "gralora.toml", "--state-dir", folder / "state", "--device", "cpu"]
    arguments += ["--model", fleet.contents.base.path, "--adapters", fleet.directory, "--address", "127.0.0.1:0"]
    arguments += ["--metrics-address", "127.0.0.1:0", "--log-level", "error", "--max-model-len", max_model_len]
    arguments += ["--max-adapter-slots", room, "--adapter-pool-bytes", room_bytes, "--kv-cache-bytes", "64MiB"]
    arguments += ["--host-cache-bytes", room_bytes // 2]
    return list(map(str, arguments))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
