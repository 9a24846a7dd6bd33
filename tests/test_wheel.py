"""The wheel as a user installs it: another environment, another directory, no source tree in sight."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has our wheel and, to save minutes, this one's third-party packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site_packages,) = (folder / "env" / "lib").glob("python3*/site-packages")
    # A plain path: .pth files in it, such as an editable install of this very checkout, are not followed.
    (site_packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(installed: Path, tmp_path: Path, *command: str) -> str:
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    assert "serve" in run(installed, tmp_path, "gralora", "--help")


def test_every_package_is_in_the_wheel_with_stubs_protos_and_types(installed: Path, tmp_path: Path) -> None:
    script = (
        "import gralora_server, gralora_runtime.async_engine, gralora_kernels.cpu.adapters, gralora_server.service\n"
        "from gralora.v1 import generation_pb2, generation_pb2_grpc, adapters_pb2_grpc, server_pb2_grpc\n"
        "from gralora.foreign import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc\n"
        "from pathlib import Path\n"
        "import gralora, gralora_kernels, gralora_runtime\n"
        "print(generation_pb2.__file__)\n"
        "v1 = Path(generation_pb2.__file__).parent\n"
        "assert {'generation.proto', 'adapters.proto', 'server.proto'} <= {p.name for p in v1.iterdir()}\n"
        "assert (v1 / 'generation_pb2.pyi').exists()\n"
        "assert (Path(kserve_pb2.__file__).parent / 'kserve.proto').exists()\n"
        "assert (Path(vllm_pb2.__file__).parent / 'vllm.proto').exists()\n"
        "live = Path(gralora_server.__file__).parent / 'live' / 'files'\n"
        "assert {'index.html', 'live.css', 'live.js', 'live.svg'} <= {p.name for p in live.iterdir()}\n"
        "for package in (gralora, gralora_kernels, gralora_runtime, gralora_server):\n"
        "    assert (Path(package.__file__).parent / 'py.typed').exists(), package\n"
    )
    where = run(installed, tmp_path, "python", "-c", script)

    assert str(installed.parent) in where


def test_transformers_is_undisturbed(installed: Path, tmp_path: Path) -> None:
    """A top-level package called `kernels` would be taken for Hugging Face's, and the import would fail."""
    script = (
        "import gralora_server, transformers, importlib.util\n"
        "from transformers import LlamaForCausalLM\n"
        "print(importlib.util.find_spec('kernels'), importlib.util.find_spec('proto'))"
    )

    assert run(installed, tmp_path, "python", "-c", script).split() == ["None", "None"]
