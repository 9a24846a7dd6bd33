"""What a client announces before it sends an adapter: a name, and each file's size and hash. Touches no disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from gralora_runtime.adapters.catalogue.names import check_name
from gralora_runtime.adapters.catalogue.sources.files import KNOWN_FILES
from gralora_runtime.errors import InvalidRequestError

UPLOADED_FILES = (*KNOWN_FILES, "README.md")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFile:
    """One file as it will be when it is whole."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An adapter as a client has it. There is none that breaks a rule: raises InvalidRequestError with wire fields."""

    name: str
    files: tuple[UploadFile, ...]

    def __post_init__(self) -> None:
        check_name("header.name", self.name)
        _check_names([file.name for file in self.files])
        for index, file in enumerate(self.files):
            if file.size < 0:
                raise InvalidRequestError(f"header.files[{index}].size", file.size, "must be at least 0")
            if _SHA256.fullmatch(file.sha256) is None:
                problem = "must be 64 hexadecimal digits in lower case"
                raise InvalidRequestError(f"header.files[{index}].sha256", file.sha256, problem)

    @property
    def digest(self) -> str:
        """Of the files, in whatever order they were announced. The name is no part of it."""
        files = [asdict(file) for file in sorted(self.files, key=lambda file: file.name)]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def file(self, name: str) -> UploadFile | None:
        return next((file for file in self.files if file.name == name), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Of what `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        found: dict[str, Any] = json.loads(text)
        return cls(name=found["name"], files=tuple(UploadFile(**file) for file in found["files"]))


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise InvalidRequestError("header.files", [], "must not be empty")
    for index, name in enumerate(names):
        if name not in UPLOADED_FILES:
            raise InvalidRequestError(
                f"header.files[{index}].name", name, f"must be one of {', '.join(UPLOADED_FILES)}"
            )
        if name in names[:index]:
            raise InvalidRequestError(f"header.files[{index}].name", name, "is there twice")
