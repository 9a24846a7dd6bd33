"""What an operator says of an application on Ray Serve: our own settings, by the file or as a table, and its replicas.

Nothing is read from the environment, as a replica has another one than whoever deploys it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.config import AdapterSource
from gralora_server.errors import ConfigInvalidError
from gralora_server.settings.document import dotted
from gralora_server.settings.layers import Layers
from gralora_server.settings.problems import complaint
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS, sections
from gralora_server.tenants.settings import Count, Positive, Strict

CONFIG, REPLICAS = "config", "replicas"
# Beside what an engine runs and queues: lists, health, watches.
OTHER_CALLS = 128
# Serve's proxy has the ports, and does not hand on who a connection is from.
REFUSED = ("server.tls_cert", "server.tls_key", "server.tls_client_ca", "server.vllm_grpc")
UNUSED = (
    "server.address",
    "server.http_address",
    "server.max_connection_age_s",
    "server.metrics_address",
    "server.reflection",
    "server.supervise",
    "server.ui_address",
)

_log = logging.getLogger(__name__)


class ReplicaSettings(Strict):
    """The table `replicas` of an application's arguments."""

    number: Count = 1  # at least, if there is a `most`
    most: Count | None = None  # Serve's autoscaler may start so many; None: there is none
    requests: Positive = 16.0  # running and waiting ones of a replica, that the autoscaler aims at
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 0  # of new replicas beside the old ones, in an update


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of one application. `layers` read the same wherever they are read."""

    layers: Layers
    replicas: ReplicaSettings
    settings: Settings

    @property
    def max_calls(self) -> int:
        """That one replica takes: our own limits refuse before this one makes calls wait where nobody sees them."""
        return self.settings.engine.max_num_seqs + self.settings.engine.max_queue + OTHER_CALLS


def plan_of(arguments: Mapping[str, Any]) -> Plan:
    """Of `config`, `replicas`, and tables as the file has them. Raises `ConfigInvalidError`."""
    given = dict(arguments)
    file, said = given.pop(CONFIG, None), given.pop(REPLICAS, {})
    replicas = _replicas(said)
    layers = Layers(None if file is None else Path(file).absolute(), {}, _options(given))
    settings = layers.read().settings
    if settings.engine.threads is None and replicas.cpus >= 1:
        # Every replica of a machine would take all of its cores.
        layers = Layers(layers.file, {}, {**layers.options, "engine.threads": int(replicas.cpus)})
        settings = layers.read().settings
    _check(settings)
    return Plan(layers=layers, replicas=replicas, settings=settings)


def _replicas(said: Any) -> ReplicaSettings:
    """A table, or only a number."""
    try:
        replicas: ReplicaSettings = ReplicaSettings.model_validate(
            said if isinstance(said, Mapping) else {"number": said}
        )
    except ValidationError as error:
        raise ConfigInvalidError([_problem(found) for found in error.errors()]) from error
    if replicas.most is not None and replicas.most < replicas.number:
        raise ConfigInvalidError([f"replicas.most must be at least replicas.number, got {replicas.most}"])
    return replicas


def _problem(found: ErrorDetails) -> str:
    keys = (REPLICAS, *found["loc"])
    if found["type"] == "extra_forbidden":
        return f"there is no setting {dotted(keys)}; there are {', '.join(ReplicaSettings.model_fields)}"
    return f"{dotted(keys)} {complaint(found, keys)}"


def _options(tables: Mapping[str, Any]) -> dict[str, Any]:
    """By the settings' keys, as a command line gives them."""
    known = {setting.key for setting in SETTINGS}
    problems, options = [], {}
    for section, table in tables.items():
        if section not in sections() or not isinstance(table, Mapping):
            allowed = ", ".join((CONFIG, REPLICAS, *sections()))
            problems.append(f"{section!r} is no argument of this application: there are {allowed}")
            continue
        for name, value in table.items():
            key = f"{section}.{name}"
            near = similar_name(key, known)
            if key in known:
                options[key] = value
            else:
                problems.append(f"there is no setting {key}" + (f"; did you mean {near}?" if near else ""))
    if problems:
        raise ConfigInvalidError(problems)
    return options


def _check(settings: Settings) -> None:
    """Raises what cannot be served by replicas, and warns of what has no effect there."""
    values = {setting.key: (setting, setting.value(settings)) for setting in SETTINGS}
    changed = {key for key, (setting, value) in values.items() if value != setting.default}
    problems = [f"{key} has no place on Ray Serve, whose proxy has the port" for key in REFUSED if key in changed]
    problems += [
        f"tenants.{name}.certificates: Serve's proxy has the connections, and does not hand on whose they are"
        for name, tenant in settings.tenants.items()
        if tenant.certificates
    ]
    if settings.engine.model is None:
        problems.append("engine.model is missing: name a directory that every replica finds")
    for key, (_, value) in values.items():
        problems += [f"{key} must be absolute, as replicas start elsewhere, got {path}" for path in _relative(value)]
    if problems:
        raise ConfigInvalidError(problems)
    unused = [key for key in UNUSED if key in changed]
    if unused:
        _log.warning("of no effect on Ray Serve, whose proxy has the port: %s", ", ".join(unused))


def _relative(value: Any) -> Iterator[str]:
    """Paths that mean something else in another directory."""
    for one in value if isinstance(value, tuple) else (value,):
        path = one if isinstance(one, Path) else None
        if isinstance(one, AdapterSource) and "://" not in one.uri:
            path = Path(one.uri)
        if path is not None and not path.is_absolute():
            yield str(path)
