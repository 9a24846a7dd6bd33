"""An application's arguments: our own settings and Serve's, and everything wrong with them at once."""

from __future__ import annotations

import logging
import pickle
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gralora_server.errors import ConfigInvalidError
from gralora_server.ray.local import SERVICES
from gralora_server.ray.plan import plan_of
from gralora_server.ray.rpcs import rpcs
from gralora_server.ray.scaling import REQUESTS, by_requests
from gralora_server.tenants.roles import ROLES

ROOT = Path(__file__).parent.parent.parent
MODEL = {"model": "/srv/model"}


def test_tables_are_settings_as_the_file_has_them() -> None:
    plan = plan_of({"engine": {**MODEL, "max_queue": 5}, "adapters": {"sources": ["/srv/adapters", "hf://org,hold"]}})

    assert plan.settings.engine.model == Path("/srv/model")
    assert plan.settings.engine.max_queue == 5
    assert [source.uri for source in plan.settings.adapters.sources] == ["/srv/adapters", "hf://org"]
    assert plan.max_calls > plan.settings.engine.max_num_seqs + 5


def test_a_file_is_read_and_tables_count_before_it(tmp_path: Path) -> None:
    file = tmp_path / "gralora.toml"
    file.write_text('[engine]\nmodel = "model"\nmax_queue = 1\nmax_num_seqs = 2\n[tenants.acme]\n')
    plan = plan_of({"config": str(file), "engine": {"max_queue": 9}})

    assert plan.settings.engine.model == tmp_path / "model"
    assert (plan.settings.engine.max_queue, plan.settings.engine.max_num_seqs) == (9, 2)
    assert set(plan.settings.tenants) == {"acme"}


def test_a_replica_reads_what_whoever_deploys_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRALORA_ENGINE_MAX_QUEUE", "3")
    plan = plan_of({"engine": MODEL})
    monkeypatch.chdir(tmp_path)
    there = pickle.loads(pickle.dumps(plan.layers)).read()

    assert there.settings == plan.settings
    assert there.settings.engine.max_queue != 3


@pytest.mark.parametrize(("given", "number", "most"), [(3, 3, None), ("3", 3, None), ({"number": 1, "most": 4}, 1, 4)])
def test_replicas_are_a_number_or_a_table(given: object, number: int, most: int | None) -> None:
    replicas = plan_of({"engine": MODEL, "replicas": given}).replicas

    assert (replicas.number, replicas.most) == (number, most)


@pytest.mark.parametrize(
    ("cpus", "engine", "threads"), [(2, {}, 2), (2, {"threads": 7}, 7), (0.5, {}, None), (0, {}, None)]
)
def test_a_replica_computes_on_the_cores_that_it_has(cpus: float, engine: dict[str, int], threads: int | None) -> None:
    plan = plan_of({"engine": MODEL | engine, "replicas": {"cpus": cpus}})

    assert plan.settings.engine.threads == threads


def test_the_file_for_a_cluster_is_one_that_the_application_takes() -> None:
    said = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    (application,) = said["applications"]
    module, _, name = application["import_path"].partition(":")
    functions = said["grpc_options"]["grpc_servicer_functions"]
    plan = plan_of(application["args"] | {"config": str(ROOT / "deploy" / "gralora.toml")})

    assert callable(getattr(import_module(module), name))
    assert functions == [*SERVICES]
    for function in functions:
        module, _, name = function.partition(":")
        assert callable(getattr(import_module(module), name))
    assert plan.replicas.most is not None


WRONG = {
    "no model": ({}, "engine.model is missing"),
    "a relative path": ({"engine": {"model": "here"}}, "engine.model must be absolute"),
    "a relative source": ({"engine": MODEL, "adapters": {"sources": ["here"]}}, "adapters.sources must be absolute"),
    "an unknown table": ({"engines": {}}, "'engines' is no argument"),
    "no table": ({"engine": 3}, "'engine' is no argument"),
    "an unknown setting": ({"engine": {"max_que": 3}}, "did you mean engine.max_queue?"),
    "a wrong value": ({"engine": {**MODEL, "max_queue": "x"}}, "--max-queue"),
    "certificates": (
        {"engine": MODEL, "server": {"tls_cert": "/c", "tls_key": "/k", "tls_client_ca": "/a"}},
        "server.tls_client_ca has no place on Ray Serve",
    ),
    "no replicas": ({"engine": MODEL, "replicas": 0}, "replicas.number"),
    "a part of a replica": ({"engine": MODEL, "replicas": {"numbers": 3}}, "there is no setting replicas.numbers"),
    "fewer at most": ({"engine": MODEL, "replicas": {"number": 3, "most": 2}}, "replicas.most must be at least"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    arguments, problem = WRONG[case]
    with pytest.raises(ConfigInvalidError, match=problem.replace("?", r"\?").replace(".", r"\.")):
        plan_of(arguments)


def test_settings_of_ports_have_no_effect_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    plan_of({"engine": MODEL, "server": {"http_address": "127.0.0.1:1", "grace_s": 5}})

    (record,) = caplog.records
    assert "server.http_address" in record.getMessage()
    assert "grace_s" not in record.getMessage()


def test_tenants_that_are_known_by_certificates_cannot_be_served(tmp_path: Path) -> None:
    """Who a connection is from the proxy does not say, and nobody must be served as anybody else."""
    file = tmp_path / "gralora.toml"
    file.write_text('[engine]\nmodel = "/m"\n[[tenants.acme.certificates]]\nsubject = "acme"\n')
    with pytest.raises(ConfigInvalidError, match=r"tenants\.acme\.certificates"):
        plan_of({"config": str(file)})


def test_every_method_that_needs_a_role_is_answered_by_its_name() -> None:
    known = {rpc.path for rpc in rpcs(kserve=True).values()}

    assert {path for path in ROLES if not path.startswith("/vllm.")} <= known  # that one is not served there
    assert {name for name, rpc in rpcs(kserve=True).items() if rpc.streams} == {
        "StreamGenerate",
        "WatchAdapters",
        "Watch",
        "ModelStreamInfer",
    }
    assert "ModelInfer" not in rpcs(kserve=False)


def scaled(told: dict[str, float], *, current: int, target: float = 4.0) -> float:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: target)
    wanted, _ = by_requests(
        SimpleNamespace(
            aggregated_metrics={REQUESTS: told} if told else None,
            current_num_replicas=current,
            target_num_replicas=current,
            config=config,
        )
    )
    return wanted


@pytest.mark.parametrize(
    ("told", "current", "wanted"),
    [
        ({"a": 8.0, "b": 8.0}, 2, 4.0),
        ({"a": 0.0, "b": 0.0}, 2, 0.0),
        ({"a": 4.0, "b": 4.0}, 2, 2.0),
        ({"a": 8.0}, 2, 4.0),  # one has told nothing yet: it is taken to be as busy as the others
        ({}, 2, 2.0),
    ],
)
def test_there_are_as_many_replicas_as_requests_ask_for(told: dict[str, float], current: int, wanted: float) -> None:
    assert scaled(told, current=current) == wanted
