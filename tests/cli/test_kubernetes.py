"""What `deploy/kubernetes/` says is Kubernetes, and fits the program. No cluster has run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from gralora_server.cli.app import app
from gralora_server.service import FAREWELL_S
from gralora_server.settings.layers import Layers
from gralora_server.settings.table import SETTINGS
from gralora_server.settings.values import parse_address

ROOT = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
BASE = ROOT / "base"
VERSIONS = ("1.30", "1.35")
PATCHES = {ROOT / "gpu" / "gpu.yaml"}  # a part of an object


def objects(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


def kustomizations() -> list[Path]:
    return sorted(ROOT.glob("*/kustomization.yaml"))


def labelled(found: dict[str, Any]) -> dict[str, Any]:
    """With what kustomize adds: selectors are its business."""
    labels = next(iter(objects(BASE / "kustomization.yaml")))["labels"][0]["pairs"]
    if found["kind"] == "StatefulSet":
        found["spec"]["selector"] = {"matchLabels": labels}
        found["spec"]["template"]["metadata"] = {"labels": labels}
    return found


@pytest.fixture(scope="module")
def servers() -> dict[str, Any]:
    (found,) = objects(BASE / "servers.yaml")
    return found["spec"]


@pytest.fixture(scope="module")
def container(servers: dict[str, Any]) -> dict[str, Any]:
    (found,) = servers["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def settings() -> Any:
    return Layers(BASE / "gralora.toml", {}, {}).read().settings


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "path", [path for path in sorted(ROOT.glob("*/*.yaml")) if path not in PATCHES], ids=lambda path: path.name
)
def test_objects_are_what_kubernetes_takes(path: Path, version: str) -> None:
    for found in objects(path):
        if found["apiVersion"].startswith(("kustomize.config.k8s.io", "monitoring.coreos.com")):
            continue  # not in Kubernetes' own schemas
        kubernetes_validate.validate(labelled(found), version, strict=True)


@pytest.mark.parametrize("path", kustomizations(), ids=lambda path: path.parent.name)
def test_every_file_belongs_to_its_kustomization(path: Path) -> None:
    (found,) = objects(path)
    named = {*found["resources"], *(patch["path"] for patch in found.get("patches", ()))}
    named |= {name for one in found.get("configMapGenerator", ()) for name in one["files"]}
    there = {one.name for one in path.parent.iterdir()} - {path.name}

    assert {name for name in named if not name.startswith("..")} == there
    assert all((path.parent / name).exists() for name in named)


def test_ports_are_those_of_the_configuration(container: dict[str, Any], settings: Any) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (service, headless) = objects(BASE / "service.yaml")
    (monitor,) = objects(ROOT / "monitoring" / "podmonitor.yaml")
    server = settings.server

    assert ports == {
        "grpc": parse_address(server.address)[1],
        "http": parse_address(server.http_address)[1],
        "metrics": parse_address(server.metrics_address)[1],
    }
    for found in (service, headless):
        assert all(ports[port["targetPort"]] == port["port"] for port in found["spec"]["ports"])
    assert {probe["grpc"]["port"] for name, probe in container.items() if "grpc" in (probe or {})} == {ports["grpc"]}
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports


def test_a_pod_is_given_the_time_to_drain(servers: dict[str, Any], container: dict[str, Any], settings: Any) -> None:
    pod = servers["template"]["spec"]
    waits_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])

    assert pod["terminationGracePeriodSeconds"] > waits_s + settings.server.grace_s + 2 * FAREWELL_S


def test_commands_and_variables_are_the_program_s(container: dict[str, Any]) -> None:
    command: Any = typer.main.get_command(app)
    (patch,) = objects(ROOT / "gpu" / "gpu.yaml")
    (patched,) = patch["spec"]["template"]["spec"]["containers"]
    variables = {name for setting in SETTINGS for name in setting.variables}

    assert container["args"][0] in command.commands
    assert {one["name"] for one in patched["env"]} <= variables
    assert patched["name"] == container["name"]


def test_what_the_configuration_reads_and_writes_is_mounted(container: dict[str, Any], settings: Any) -> None:
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}

    def is_in(path: object, *, writable: bool) -> bool:
        return any(Path(str(path)).is_relative_to(place) and not (writable and ro) for place, ro in mounts.items())

    assert is_in(settings.engine.model, writable=False)
    assert all(is_in(source.uri, writable=False) for source in settings.adapters.sources)
    assert is_in(settings.adapters.state_dir, writable=True)
    assert container["securityContext"]["readOnlyRootFilesystem"]
