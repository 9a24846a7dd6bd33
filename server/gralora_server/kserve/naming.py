"""How clients of this protocol name models and fields, where our own messages name them otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.names import Reference, parse_reference
from gralora_runtime.errors import InvalidRequestError

SERVICE = "inference.GRPCInferenceService"
BASE_VERSION = "1"  # the base model has only one, and Triton counts from here
OUR_PARTS = {"sampling.": "", "stopping.": "", "structured_output.": "structured_outputs."}  # and theirs


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a request names, by two of its fields. `prefix`: of those fields' names."""

    name: str
    version: str = ""
    prefix: str = "model_"

    def is_base(self, base: str) -> bool:
        """Raises InvalidRequestError if it is nothing, or a version that the base model does not have."""
        if not self.name:
            raise InvalidRequestError(f"{self.prefix}name", self.name, "must not be empty")
        if self.name != base:
            return False
        if self.version not in ("", BASE_VERSION):
            problem = f"must be empty or {BASE_VERSION!r} for the base model"
            raise InvalidRequestError(f"{self.prefix}version", self.version, problem)
        return True

    @property
    def adapter(self) -> str:
        """As our requests name it."""
        return f"{self.name}@{self.version}" if self.version else self.name

    def parsed(self) -> Reference:
        """Raises InvalidRequestError."""
        return parse_reference(f"{self.prefix}name", self.adapter)


@contextmanager
def in_their_words(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of ours say theirs: `names` has them, but for those that only lie deeper in our messages."""
    try:
        yield
    except InvalidRequestError as error:
        raise error.renamed(_theirs(error.field, names)) from None


def _theirs(field: str, names: Mapping[str, str]) -> str:
    for ours, theirs in OUR_PARTS.items():
        if field.startswith(ours):
            return theirs + field.removeprefix(ours)
    return names.get(field, field)
