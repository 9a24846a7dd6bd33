"""Generates the Python stubs beside the protos. `--check` changes nothing and fails with a diff when they are stale."""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parent.parent / "proto"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Runs protoc into `out`, with the plugins that are installed beside this Python."""
    plugins = Path(sys.executable).parent
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO_ROOT}"),
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *protos,
    ]
    subprocess.run(command, check=True)  # noqa: S603 - every argument is ours


def stubs(root: Path) -> dict[Path, str]:
    """Every generated file below `root`, by its path relative to it."""
    found = {path for pattern in STUB_PATTERNS for path in root.rglob(pattern)}
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in sorted(found)}


def difference(fresh: dict[Path, str], checked_in: dict[Path, str]) -> str:
    """A unified diff from the stubs that are checked in to the fresh ones; empty when they are equal."""
    lines: list[str] = []
    for path in sorted(fresh.keys() | checked_in.keys()):
        old, new = checked_in.get(path, ""), fresh.get(path, "")
        lines += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"checked in/{path}", f"generated/{path}"
        )
    return "".join(lines)


def check() -> int:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = difference(stubs(Path(folder)), stubs(PROTO_ROOT))
    if stale:
        sys.stderr.write(f"{stale}\nThe stubs are stale: run `make proto`.\n")
    return 1 if stale else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail with a diff when the stubs are stale")
    if parser.parse_args().check:
        return check()
    generate(PROTO_ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
