"""Looking into thousands of directories at start: what one of them holds delays neither the others nor serving."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from adapters.harness import WAIT_S, Gate, lease, managing, quiesce, until, use, write_units
from support.checkpoints import edit_config, write_gralora

from gralora_runtime.adapters import discovery
from gralora_runtime.adapters.catalogue import scan
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint import header
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterRejectedError


class Slow:
    """Stands before `inspect` and holds back what it is asked about `name`."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.go_on = threading.Event()
        self._name, self._inspect = name, header.inspect
        patch.setattr(discovery, "inspect", self._slowly)

    def _slowly(self, path: Path, *, name: str, **options: Any) -> Any:
        if name == self._name:
            assert self.go_on.wait(WAIT_S)
        return self._inspect(path, name=name, **options)


def test_serving_begins_while_a_directory_is_still_being_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    monkeypatch.setattr(scan.Scan.wait, "__defaults__", (0.1,))
    slow = Slow(monkeypatch, "a")
    with managing(tmp_path) as adapters:
        until(lambda: adapters.get("b").summary and adapters.get("c").summary)
        assert adapters.get("a").summary is None
        assert use(adapters, "a").name == "a"  # a request does not wait for it
        loaded = adapters.get("a").summary
        slow.go_on.set()
        until(lambda: not adapters._discovery._scan._threads)
        assert adapters.get("a").summary is loaded is not None


def test_what_the_scan_finds_too_late_does_not_overrule_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory was broken when the server started, and has been mended since."""
    write_units(tmp_path, ["a"])
    monkeypatch.setattr(scan.Scan.wait, "__defaults__", (0.05,))
    slow = Slow(monkeypatch, "a")
    with managing(tmp_path) as adapters:
        use(adapters, "a")
        edit_config(tmp_path / "a", gralora_k=3)
        slow.go_on.set()
        until(lambda: not adapters._discovery._scan._threads)
        assert adapters.get("a").state is AdapterState.RESIDENT
        assert adapters.get("a").error == ""


def test_a_bug_met_in_one_directory_is_told_there_and_keeps_no_other_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_units(tmp_path, ["a", "b"])
    inspect = header.inspect

    def broken(path: Path, *, name: str, **options: Any) -> Any:
        if name == "a":
            raise MemoryError
        return inspect(path, name=name, **options)

    monkeypatch.setattr(discovery, "inspect", broken)
    with managing(tmp_path) as adapters:
        assert "looking into it failed (MemoryError" in adapters.get("a").error
        assert adapters.get("b").summary is not None
        assert use(adapters, "a").name == "a"  # a request tries anew


def files_of(error: BaseException | None) -> set[str]:
    """The sources whose frames an error keeps alive, and with them all that those held."""
    found: set[str] = set()
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            found.add(Path(traceback.tb_frame.f_code.co_filename).name)
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__
    return found


def test_what_is_known_of_a_broken_adapter_is_a_sentence_and_not_its_files(tmp_path: Path) -> None:
    """Thousands of them, each with a header of megabytes in the frames of its error, would fill the memory."""
    (write_gralora(tmp_path / "a", r=4) / CONFIG_FILE).write_bytes(b"{")
    with managing(tmp_path) as adapters:
        record = adapters._store.get("a").current
        assert files_of(record.error) == set()
        for _ in range(3):
            with pytest.raises(AdapterRejectedError, match="is not JSON"):
                lease(adapters, "a")
        kept = files_of(record.error)
        assert "mover.py" in kept
        assert not kept & {"header.py", "file.py", "loader.py", "spec.py", "tensors.py"}


def test_refused_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a broken adapter in a loop would keep the readers from all others'."""
    path = write_gralora(tmp_path / "a", r=4)
    good = (path / CONFIG_FILE).read_bytes()
    edit_config(path, gralora_k=3)
    with managing(tmp_path) as adapters:
        reads = Gate(monkeypatch)
        for _ in range(5):
            with pytest.raises(AdapterRejectedError, match="gralora_k: 3 does not divide"):
                lease(adapters, "a")
        assert reads.names == ["a"]

        (path / CONFIG_FILE).write_bytes(good)
        assert use(adapters, "a").name == "a"
        quiesce(adapters)
        assert reads.names == ["a", "a"]
