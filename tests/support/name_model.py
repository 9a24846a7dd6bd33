"""What a name stands for by the catalogue's rules, in a few fields: what tests hold a real catalogue against.

Contents are small numbers. Knows no files, and nothing of who waits for what.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(slots=True)
class NameModel:
    """One name. Of its sources, what was uploaded comes before its directory."""

    on_disk: int | None = None  # content of its directory
    uploaded: int | None = None  # content of the last upload that was accepted
    versions: dict[int, int] = field(default_factory=dict)  # number -> content, those that were read
    promoted: int = 0
    previous: int = 0
    newest: int = 0
    last: int = 0  # number that was given
    canary: tuple[int, float] | None = None
    pinned: bool = False
    unloaded: bool = False

    @property
    def source(self) -> int | None:
        """The content that the name would be found with."""
        return self.on_disk if self.uploaded is None else self.uploaded

    @property
    def served(self) -> int:
        """The number that every request gets. Only where a canary has all of them, or there is none."""
        assert self.canary is None or self.canary[1] == 1.0
        return self.canary[0] if self.canary else self.promoted

    def see(self, content: int) -> None:
        """The source has this content now, and somebody has read it."""
        number = next((number for number, had in self.versions.items() if had == content), self.last + 1)
        self.last = max(self.last, number)
        self.versions[number] = content
        if number != self.newest:
            self.newest = number
            if self.promoted:
                self.stand_for(number)
            else:
                self.promoted = number

    def stand_for(self, number: int) -> None:
        if number != self.promoted:
            self.previous, self.promoted = self.promoted, number
        if self.canary and self.canary[0] == number:
            self.canary = None

    def prune(self, limit: int, held: Collection[int]) -> None:
        """The oldest go, but for those that the name points at, and those that somebody reads."""
        kept = {self.promoted, self.previous, self.newest, self.canary[0] if self.canary else 0, *held}
        too_many = max(0, len(self.versions) - limit)
        for number in [number for number in sorted(self.versions) if number not in kept][:too_many]:
            del self.versions[number]
