"""What a name's requests may be answered with, and when, by what operators were told. Judges answers; asks nobody.

All times are this machine's monotonic clock. What an operator asked for may be so from when it was sent, and is so from
when it was acknowledged; in between both answers are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

ABSENT = -1  # in a content's place: the name is not registered


class Verdict(Enum):
    """Of one answer."""

    RIGHT = "right"
    STALE = "stale"  # a content that the name had, but not at any time of the request
    FOREIGN = "foreign"  # a content that the name never had


@dataclass(slots=True)
class Span:
    """A time in which the name may stand for a content."""

    content: int
    from_s: float
    to_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Excuse:
    """A time in which a request may fail for these reasons."""

    reasons: frozenset[str]
    from_s: float
    to_s: float


@dataclass(slots=True)
class History:
    """Of one name. Operators change a name one after the other."""

    spans: list[Span]
    had: set[int] = field(default_factory=set)  # every content that could be read under the name
    excuses: list[Excuse] = field(default_factory=list)

    @classmethod
    def of(cls, content: int) -> History:
        return cls([Span(content, -math.inf)], {content})

    @property
    def current(self) -> int:
        """What the name stands for, as far as the last acknowledgement says."""
        return self.spans[-1].content

    def change(self, content: int, sent_s: float, acknowledged_s: float) -> None:
        """The name stands for this content now."""
        for span in self.spans:
            span.to_s = min(span.to_s, acknowledged_s)
        self.spans.append(Span(content, sent_s))
        if content != ABSENT:
            self.had.add(content)

    def share(self, content: int, from_s: float, to_s: float) -> None:
        """It was a canary then."""
        self.spans.insert(0, Span(content, from_s, to_s))

    def excuse(self, reasons: frozenset[str], from_s: float, to_s: float) -> None:
        self.excuses.append(Excuse(reasons, from_s, to_s))

    def judge(self, content: int | None, sent_s: float, ended_s: float) -> Verdict:
        """An answer to the bare name. None: a content that nobody wrote."""
        if any(span.content == content for span in self._overlapping(sent_s, ended_s)):
            return Verdict.RIGHT
        return Verdict.STALE if content in self.had else Verdict.FOREIGN

    def is_excused(self, reason: str, sent_s: float, ended_s: float) -> bool:
        """Whether a request may have failed so."""
        if reason == "ADAPTER_NOT_FOUND" and any(s.content == ABSENT for s in self._overlapping(sent_s, ended_s)):
            return True
        return any(reason in one.reasons and one.from_s <= ended_s and one.to_s >= sent_s for one in self.excuses)

    def _overlapping(self, sent_s: float, ended_s: float) -> list[Span]:
        return [span for span in self.spans if span.from_s <= ended_s and span.to_s >= sent_s]
