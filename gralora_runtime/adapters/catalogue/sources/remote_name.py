"""What a client's word for an adapter asks a remote for. Knows no remote.

Clients choose these words, and they end up in addresses and paths: only what is parsed here gets there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMPONENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"(?:(?P<org>{_COMPONENT})/)?(?P<name>{_COMPONENT})(?:@(?P<revision>{_COMPONENT}))?")
_ORG = re.compile(_COMPONENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteName:
    """`name`, `org/name`, `name@revision` or `org/name@revision`."""

    org: str  # "": none was given
    name: str
    revision: str  # "": whatever is newest

    @property
    def repo(self) -> str:
        return f"{self.org}/{self.name}" if self.org else self.name

    @property
    def folder(self) -> str:
        """One path component, and another one for each repo: no component of a name has a `+`."""
        return self.repo.replace("/", "+")


def parse_name(text: str) -> RemoteName | None:
    """None: that is no such name."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    return RemoteName(org=match["org"] or "", name=match["name"], revision=match["revision"] or "")


def is_org(text: str) -> bool:
    return _ORG.fullmatch(text) is not None
