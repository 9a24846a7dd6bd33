"""A backend is chosen once; a choice that cannot be met is an error and never another backend."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numba
import pytest
import torch

from gralora_kernels import dispatch
from gralora_kernels.cpu import threads
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.warmup import warm_up_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "expected"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_choice_on_the_cpu(name, expected, caplog):
    caplog.set_level("INFO")

    backend = resolve_backend(name, CPU)

    assert backend.name == expected
    assert f"adapter kernels: {expected} on cpu (asked for: {name})" in caplog.text


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cuda", CPU, "must be one of auto, reference, cpu, triton, got 'cuda'"),
        ("cpu", CUDA, "backend 'cpu' cannot serve device cuda"),
        ("triton", CPU, "cannot serve the CPU"),
    ],
)
def test_a_choice_that_cannot_be_met_raises(name, device, message):
    with pytest.raises(ValueError, match=message):
        resolve_backend(name, device)


@pytest.mark.parametrize("missing", ["numba", "triton"])
def test_a_missing_package_is_named(missing, monkeypatch):
    for module in [m for m in sys.modules if m.startswith(("gralora_kernels.cpu", "gralora_kernels.triton_ops"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    name, device = ("cpu", CPU) if missing == "numba" else ("triton", CUDA)

    with pytest.raises(RuntimeError, match=f"backend '{name}' needs .*{missing}"):
        resolve_backend(name, device)


@pytest.mark.parametrize(("package", "found"), [("torch", "2.8.0+cu128"), ("triton", "3.3.1")])
def test_a_version_that_is_too_old_is_named(package, found, monkeypatch):
    real = dispatch.version
    monkeypatch.setattr(dispatch, "version", lambda name: found if name == package else real(name))

    with pytest.raises(RuntimeError, match=rf"backend 'triton' needs {package} [\d.]+ or later, this is {found[:5]}"):
        resolve_backend("triton", CUDA)


def test_the_oldest_versions_are_those_that_are_declared():
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]

    declared = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    for package, least in dispatch.OLDEST.items():
        assert any(requirement.startswith(f"{package}>={least}") for requirement in declared)


def test_importing_the_package_imports_no_compiler():
    code = (
        "import sys, gralora_kernels, gralora_kernels.dispatch, gralora_kernels.warmup\n"
        "print([m for m in ('numba', 'triton') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_warm_up_runs_every_variant(name):
    warm_up_backend(resolve_backend(name, CPU), device=CPU, dtype=torch.float32)


def test_threads_are_configured_for_the_calling_thread():
    before = numba.get_num_threads()
    try:
        threads.configure(1)

        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)
    with pytest.raises(ValueError, match="num_threads must be in 1"):
        threads.configure(10**6)


def test_a_missing_openmp_means_the_workqueue(monkeypatch, caplog):
    """The server must start, and say so, where no libgomp is installed."""

    def fail(name):
        raise ImportError("libgomp.so.1.0.0: cannot open shared object file")

    monkeypatch.setattr(threads.importlib, "import_module", fail)

    assert threads.choose_layer() == "workqueue"
    assert "libgomp.so.1.0.0" in caplog.text
