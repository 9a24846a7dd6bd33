"""Who may import whom. Reads the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "gralora_kernels": ROOT / "kernels" / "gralora_kernels",
    "gralora_runtime": ROOT / "gralora_runtime",
    "gralora_server": ROOT / "server" / "gralora_server",
}
MAY_IMPORT = {
    "gralora_kernels": {"gralora_kernels"},
    "gralora_runtime": {"gralora_runtime", "gralora_kernels"},
    "gralora_server": {"gralora_server", "gralora_runtime", "gralora_kernels", "gralora"},
}
# library -> the only places that may import it (globs of "package/path")
CONFINED = {
    "grpc": ["gralora_server/*"],
    "grpc_health": ["gralora_server/*"],
    "grpc_reflection": ["gralora_server/*"],
    "google": ["gralora_server/*"],
    "starlette": ["gralora_server/http/calls.py"],
    "uvicorn": ["gralora_server/http/listener.py", "gralora_server/http/protocol.py"],
    "prometheus_client": ["gralora_server/metrics/*", "gralora_server/loadtest/metrics_page.py"],
    "transformers": ["gralora_runtime/model/*"],
    "safetensors": [
        "gralora_runtime/adapters/checkpoint/writer.py",
        "gralora_server/loadtest/headers.py",
        "gralora_server/loadtest/synthetic.py",
    ],
    "triton": ["gralora_kernels/triton_ops/*"],
    "numba": ["gralora_kernels/cpu/*"],
    "jwt": ["gralora_server/tenants/web_tokens.py"],
    "cryptography": ["gralora_server/tls.py"],
    "watchfiles": ["gralora_runtime/adapters/catalogue/watcher.py"],
    "regex": ["gralora_runtime/adapters/checkpoint/targets.py"],
    "huggingface_hub": ["gralora_runtime/adapters/catalogue/sources/hub.py"],
    "httpx2": [
        "gralora_runtime/adapters/catalogue/sources/hub.py",
        "gralora_runtime/adapters/catalogue/sources/web.py",
    ],
    "s3fs": ["gralora_runtime/adapters/catalogue/sources/s3.py"],
    "fsspec": ["gralora_runtime/adapters/catalogue/sources/s3.py"],
    "botocore": ["gralora_runtime/adapters/catalogue/sources/s3.py"],
    "aiohttp": ["gralora_runtime/adapters/catalogue/sources/s3.py"],
    "filelock": [
        "gralora_runtime/adapters/catalogue/*",
        "gralora_server/model_fetch.py",
        "gralora_server/ray/places.py",
    ],
    "sqlite3": ["gralora_runtime/adapters/catalogue/*", "gralora_server/tenants/usage_file.py"],
    "argparse": [],
    "typer": ["gralora_server/cli*"],
    "peft": [],
    "ray": [
        "gralora_server/ray/deployment.py",
        "gralora_server/ray/local.py",
        "gralora_server/ray/remote_log.py",
        "gralora_server/ray_app.py",
    ],
    "matplotlib": ["gralora_server/loadtest/report/drawing.py", "gralora_server/loadtest/report/*plots.py"],
    "llguidance": ["gralora_runtime/structured/*"],
    "opentelemetry": ["gralora_server/tracing/exporter.py"],
    "jinja2": ["gralora_runtime/model/*", "gralora_server/loadtest/report/page.py"],
}
NO_TORCH = [
    "gralora_runtime/scheduling/scheduler.py",
    "gralora_runtime/scheduling/pages.py",
    "gralora_runtime/plan.py",
    "gralora_runtime/request.py",
    "gralora_runtime/errors.py",
    "gralora_runtime/config.py",
    "gralora_runtime/sampling/outcome.py",
    "gralora_runtime/sampling/state.py",
    "gralora_runtime/structured/compiler.py",
    "gralora_runtime/structured/grammar.py",
    "gralora_runtime/structured/masks.py",
    "gralora_runtime/structured/matcher.py",
    "gralora_runtime/structured/vocabulary.py",
    "gralora_runtime/adapters/residency/arena.py",
    "gralora_runtime/adapters/residency/eviction.py",
    "gralora_runtime/adapters/residency/compaction.py",
    "gralora_runtime/adapters/residency/lease.py",
    "gralora_runtime/adapters/residency/share.py",
    "gralora_runtime/adapters/checkpoint/config_keys.py",
    "gralora_runtime/adapters/checkpoint/experts.py",
    "gralora_runtime/adapters/checkpoint/naming.py",
    "gralora_runtime/adapters/checkpoint/spec.py",
    "gralora_runtime/adapters/catalogue/database.py",
    "gralora_runtime/adapters/catalogue/journal.py",
    "gralora_runtime/adapters/catalogue/store.py",
    "gralora_runtime/adapters/catalogue/manifest.py",
    "gralora_runtime/adapters/catalogue/upload.py",
    "gralora_runtime/adapters/catalogue/uploads.py",
    "gralora_runtime/observation/histogram.py",
    "gralora_runtime/observation/usage.py",
    "gralora_runtime/observation/requests.py",
    "gralora_runtime/observation/steps.py",
]


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield f"{package}/{path.relative_to(folder)}", path


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(("place", "path"), list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way_and_libraries_stay_in_their_place(place: str, path: Path) -> None:
    package, names = place.split("/", maxsplit=1)[0], imported(path)

    ours = {name for name in names if name.startswith("gralora")}
    strays = {name for name in names & CONFINED.keys() if not any(fnmatch(place, glob) for glob in CONFINED[name])}

    assert ours <= MAY_IMPORT[package]
    assert strays == set()
    assert not (place in NO_TORCH and "torch" in names)


def test_policy_files_exist() -> None:
    """A renamed policy file must not slip out of the rule above."""
    assert set(NO_TORCH) <= {place for place, _ in sources()}


def test_every_package_of_the_tree_is_in_the_distribution() -> None:
    """An editable install finds what a wheel would lack."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        ".".join((package, *init.parent.relative_to(folder).parts))
        for package, folder in PACKAGES.items()
        for init in folder.rglob("__init__.py")
    }

    assert {name for name in declared if name.partition(".")[0] in PACKAGES} == there


def test_folders_that_would_shadow_a_library_are_no_packages() -> None:
    """A top-level package `kernels` breaks transformers; `proto` is proto-plus's name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()


@pytest.mark.parametrize("place", [p for p, _ in sources() if not fnmatch(p, "gralora_server/cli*")])
def test_only_the_command_line_reads_the_environment(place: str) -> None:
    package, _, rest = place.partition("/")
    text = (PACKAGES[package] / rest).read_text()

    assert "os.environ" not in text
    assert "getenv" not in text
    assert "sys.argv" not in text
