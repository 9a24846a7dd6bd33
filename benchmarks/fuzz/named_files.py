"""The files that settings name, nearly right, by number: bearer tokens, keys of web tokens, a machine's profile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz import octets
from benchmarks.fuzz.configs import Read, measured
from gralora_server.planner.prices import prices_of
from gralora_server.planner.profile import Profile
from gralora_server.tenants.settings import JwtSettings
from gralora_server.tenants.token_file import read_token_file
from gralora_server.tenants.web_tokens import WebTokens

BYTES_SHARE = 0.3
_TOKENS = b"# of the operator\nan-admin-token-0123456789\n\na-generate-token-0123456789 generate\n"
_KEYS = {
    "keys": [
        {"kty": "RSA", "kid": "r", "use": "sig", "alg": "RS256", "e": "AQAB", "n": "_" * 341 + "w"},
        {
            "kty": "EC", "kid": "e", "crv": "P-256",
            "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
        },
        {"kty": "OKP", "kid": "o", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPjHURo"},
    ]
}  # fmt: skip
_PROFILE = {
    "version": 1, "model": "m", "made_at": "2026-01-01T00:00:00Z", "machine": {"cores": "2"}, "adapters": "a",
    "settings": {"max_num_seqs": 32, "max_num_batched_tokens": 256, "page_size": 16},
    "step_s": [{"tokens": 1, "seconds": 0.01}, {"tokens": 256, "seconds": 0.2}],
    "adapter_byte_s": 2e-9, "adapter_token_byte_s": 3e-11, "context_token_s": 4e-6, "prefill_context_s": 5e-8,
    "request_s": 0.004, "load_byte_s": 2e-9, "load_slowdown": 0.5, "server_bytes": 1, "kv_token_bytes": 1,
}  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 1 << 63, 10**400, 0.5, 1e308, 5e-324, float("nan"), float("inf"), "", "x", "\0", "é",
    "\ud800", "A" * 5000, "AA==", "AQAB", "*", "RSA", "EC", "oct", "P-521", "Ed448", "ES256", "PS512", "enc", [], {},
    [1], [{}], {"": {}},
)  # fmt: skip
_NAMES = ("kid", "kty", "crv", "alg", "use", "k", "d", "n", "e", "x", "y", "x5c", "tokens", "version", "keys", "")


def _read_keys(file: Path) -> object:
    return WebTokens(JwtSettings(issuer="i", audience="a", jwks_file=file), lambda *_: None)


_KINDS: tuple[tuple[bytes, Callable[[Path], object]], ...] = (
    (_TOKENS, read_token_file),
    (json.dumps(_KEYS).encode(), _read_keys),
    (json.dumps(_PROFILE).encode(), lambda file: prices_of(Profile.read(file))),
)
NUM_KINDS = len(_KINDS)


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """All that one seed makes; of each kind every third."""

    seed: int

    def make(self, number: int) -> bytes:
        rng = random.Random(f"{self.seed}/{number}")
        raw, _ = _KINDS[number % NUM_KINDS]
        if raw is _TOKENS or rng.random() < BYTES_SHARE:
            return octets.mutated(rng, raw, rng.choice(_KINDS)[0])
        document = json.loads(raw)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            _change(rng, document)
        return json.dumps(document).encode()

    def read(self, number: int, file: Path) -> Read:
        """As a server does that is started with it."""
        _, reads = _KINDS[number % NUM_KINDS]
        return measured(lambda: reads(file))


def _change(rng: random.Random, document: Any) -> None:
    """One change, anywhere in it."""
    inside = rng.choice([one for one in _containers(document) if one] or [document])
    names = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
    if not names:
        return
    name = rng.choice(names)
    how = rng.random()
    if how < 0.2:
        del inside[name]
    elif how < 0.3 and isinstance(inside, list):
        inside.append(deepcopy(inside[name]))
    elif how < 0.4 and isinstance(inside, dict):
        inside[rng.choice(_NAMES)] = deepcopy(inside[name])
    else:
        inside[name] = deepcopy(rng.choice(_VALUES))


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    below = value.values() if isinstance(value, dict) else value
    return [value, *(found for one in below for found in _containers(one))]
