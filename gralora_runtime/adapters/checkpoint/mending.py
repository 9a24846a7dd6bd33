"""What the owner of an adapter directory can do where one of its files is missing, in words. Reads no file."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

MAX_ENTRIES = 1000  # of a directory that are looked at
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")  # as transformers' Trainer calls them, by the step


def name_instead(directory: Path, file: str) -> str:
    """The directory in this one, as Trainer leaves them, that has the file: the end of a sentence, or ""."""
    newest = _newest_checkpoint(directory, file)
    return f"; {Path(directory.name) / newest} has one: name that directory" if newest else ""


def save_as_safetensors(directory: Path) -> str:
    """What does so where the pickle in it was made: the end of a sentence."""
    name = directory.name or "."
    line = f"PeftModel.from_pretrained(base_model, {name!r}).save_pretrained({name!r}, safe_serialization=True)"
    return f"; where it was made, {line} writes what is"


def _newest_checkpoint(directory: Path, file: str) -> str:
    try:
        with os.scandir(directory) as entries:
            matches = [_CHECKPOINT.fullmatch(entry.name) for entry in islice(entries, MAX_ENTRIES)]
        found = sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True)
        return next((name for _, name in found if (directory / name / file).is_file()), "")
    except OSError:
        return ""  # nobody can say, and what is missing is told all the same
