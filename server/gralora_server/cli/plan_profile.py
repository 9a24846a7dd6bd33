"""The profile that `gralora plan` reads, or measures when there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import ConfigError
from gralora_server.cli.environment import cache_dir, offline_environment
from gralora_server.cli.progress import stages
from gralora_server.settings.values import default_of

if TYPE_CHECKING:  # torch takes a while to import, and `--help` does without it
    from gralora_server.planner.profile import Profile

SETTINGS = ("max_num_batched_tokens", "page_size")


def profile_of(path: Path | None, model: Path, folder: Path, names: Sequence[str], max_num_seqs: int) -> Profile:
    """The one in the file, or this machine's; measured and kept where there is none.

    Raises ConfigError if it is of another model or of other settings.
    """
    from gralora_server.loadtest.headers import shapes_digest
    from gralora_server.loadtest.machine import facts
    from gralora_server.planner.profile import Profile

    name = re.sub(r"[^\w.]+", "-", f"{shapes_digest(model)}-{folder.name}-{max_num_seqs}.json")
    kept = path if path is not None else cache_dir() / "profiles" / name
    found = Profile.read(kept) if kept.exists() else None
    if found is None or (path is None and found.machine != facts()):
        found = _measure(model, folder, names, max_num_seqs)
        found.write(kept)
    if (found.model, found.settings["max_num_seqs"]) != (model.name, max_num_seqs):
        raise ConfigError(
            f"the profile {kept} is of {found.model} with max_num_seqs {found.settings['max_num_seqs']}, "
            f"not of {model.name} with {max_num_seqs}"
        )
    return found


def _measure(model: Path, folder: Path, names: Sequence[str], max_num_seqs: int) -> Profile:
    from gralora_server.planner.measure import Subject, measure
    from gralora_server.planner.mix import adapter_bytes, applied_to_any_prompt, kv_token_bytes

    with stages() as on_progress:
        return measure(
            Subject(
                model=model,
                adapters=folder,
                adapter_bytes=adapter_bytes(model, folder, applied_to_any_prompt(folder, names)),
                described=folder.name,
                settings={"max_num_seqs": max_num_seqs, **{name: default_of(EngineConfig, name) for name in SETTINGS}},
                kv_token_bytes=kv_token_bytes(model),
                environment=offline_environment(),
            ),
            on_progress,
        )
