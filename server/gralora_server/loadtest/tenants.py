"""What each tenant of a load test does, as a command line or a TOML file says it, and the one trace of all of them."""

from __future__ import annotations

import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from gralora_runtime.errors import ConfigError
from gralora_server.client.connection import Connection
from gralora_server.loadtest.arrivals import parse_arrivals, peak
from gralora_server.loadtest.run import adapter_names
from gralora_server.loadtest.summary import Frozen
from gralora_server.loadtest.trace import Trace
from gralora_server.loadtest.workload import Workload, checked, parse_lengths, parse_popularity
from gralora_server.tenants.settings import Positive


class TenantLoad(Frozen):
    """What is None is as the command line has it for all."""

    token: str | None = Field(default=None, repr=False)
    weight: Positive = 1.0  # as the server's configuration has it
    share: Positive = 1.0  # of the command line's arrivals, relative to the other tenants' that have such a share
    arrivals: str | None = None  # its own, and no share
    popularity: str | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    adapters: tuple[str, ...] | None = None  # globs of names

    def workload(self, common: Workload, name: str, adapters: Sequence[str], share: float) -> Workload:
        """Raises ConfigError for what is not understood, and for a closed loop, of which a tenant can have no share."""
        arrivals = common.arrivals.scaled(share)
        if self.arrivals is not None:
            arrivals = parse_arrivals(self.arrivals).scaled(1.0)
        return replace(
            common,
            arrivals=arrivals,
            adapters=adapters,
            popularity=common.popularity if self.popularity is None else parse_popularity(self.popularity),
            prompt=common.prompt if self.prompt_tokens is None else parse_lengths(self.prompt_tokens),
            output=common.output if self.output_tokens is None else parse_lengths(self.output_tokens),
            # By its name, so that what one tenant does does not depend on who the others are.
            seed=(common.seed << 32) | zlib.crc32(name.encode()),
        )

    @property
    def described(self) -> str:
        """Without its token."""
        said = self.model_dump(exclude={"token"}, exclude_defaults=True)
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items()) or "as all"


@dataclass(frozen=True, slots=True)
class Tenants:
    """By name."""

    loads: Mapping[str, TenantLoad]
    tokens: Mapping[str, str]

    @property
    def weights(self) -> dict[str, float]:
        return {name: load.weight for name, load in self.loads.items()}

    def connection(self, given: Connection) -> Connection:
        """For what is asked on nobody's behalf: without a token of its own a tenant's will do."""
        return replace(given, token=given.token or next(iter(self.tokens.values()), None))

    async def adapters(self, connection: Connection, most: int | None) -> dict[str, list[str]]:
        """Whose requests are for which, `most` for each: what the server lists to a tenant's token.

        A server that knows no tenants takes each adapter for one: who has neither token nor globs shares all adapters
        with those like it, so that no two have one in common.
        """
        found: dict[str, list[str]] = {}
        for name, load in self.loads.items():
            listed = await adapter_names(replace(connection, token=self.tokens.get(name, connection.token)))
            found[name] = listed if load.adapters is None else _matching(name, load.adapters, listed)
        alike = [name for name in found if name not in self.tokens and self.loads[name].adapters is None]
        for number, name in enumerate(alike):
            if len(found[name]) < len(alike):
                raise ConfigError(f"{len(alike)} tenants without tokens share {len(found[name])} adapters: too few")
            found[name] = found[name][number :: len(alike)]
        return {name: names[:most] for name, names in found.items()}

    def trace(self, common: Workload, adapters: Mapping[str, Sequence[str]]) -> Trace:
        """`common`: what the command line says for all. Raises ConfigError as `TenantLoad.workload` does."""
        sharing = sum(load.share for load in self.loads.values() if load.arrivals is None)
        workloads = {
            name: load.workload(common, name, adapters[name], load.share / sharing if sharing else 0.0)
            for name, load in self.loads.items()
        }
        requests = [replace(one, tenant=name) for name, load in workloads.items() for one in load.requests()]
        return checked(
            Trace(
                requests=tuple(sorted(requests, key=lambda one: one.arrival_s)),
                warmup_s=common.warmup_s,
                duration_s=common.duration_s,
                peak=peak([load.arrivals for load in workloads.values()], common.duration_s),
            )
        )


def read_tenants(text: str, tokens: Path | None) -> Tenants:
    """`light:1,flood:50`, names and shares, or the path of a TOML file with a table for each tenant.

    `tokens`: a file of lines `TENANT TOKEN`. Raises ConfigError.
    """
    loads = _from_file(Path(text)) if text.endswith(".toml") else _from_shares(text)
    own = {name: load.token for name, load in loads.items() if load.token is not None}
    return Tenants(loads, own | ({} if tokens is None else _read_tokens(tokens)))


def _from_shares(text: str) -> dict[str, TenantLoad]:
    loads: dict[str, TenantLoad] = {}
    for part in text.split(",") if text else ():
        name, _, share = part.partition(":")
        load = _sharing(share)
        if load is None or not name or name in loads:
            raise ConfigError(
                f"tenants {text!r} is not understood at {part!r} (examples: light:1,flood:50, or tenants.toml)"
            )
        loads[name] = load
    return loads


def _sharing(share: str) -> TenantLoad | None:
    """None if it is no share."""
    try:
        return TenantLoad(share=float(share))
    except ValueError:
        return None


def _from_file(path: Path) -> dict[str, TenantLoad]:
    try:
        return TypeAdapter(dict[str, TenantLoad]).validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as cause:
        raise ConfigError(f"the tenants {path} cannot be read: {cause.strerror}") from cause
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        got = "" if "token" in where else f", got {first['input']!r}"
        raise ConfigError(f"{path}: {where}: {first['msg']}{got}") from cause
    except ValueError as cause:
        raise ConfigError(f"{path} is no TOML: {cause}") from cause


def _read_tokens(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as cause:
        raise ConfigError(f"the tokens {path} cannot be read: {cause.strerror}") from cause
    tokens = {}
    for number, line in enumerate(lines, start=1):
        match line.split():
            case [] | ["#", *_]:
                continue
            case [name, token]:
                tokens[name] = token
            case parts:  # which are secrets: they are counted and not shown
                raise ConfigError(f"{path}, line {number}: must be a tenant and its token, got {len(parts)} words")
    return tokens


def _matching(tenant: str, globs: Sequence[str], names: Sequence[str]) -> list[str]:
    found = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    if not found:
        raise ConfigError(f"tenant {tenant}: the server lists no adapter that matches {', '.join(globs)}")
    return found
