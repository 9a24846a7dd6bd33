"""Which modules an adapter's config names: PEFT's matching rules, on patterns that a stranger wrote. No torch.

Python's `re` holds the interpreter lock while it backtracks, so one hostile pattern would stop every request. Patterns
are therefore limited in shape (no repeated groups, few quantifiers) and in total matching time.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

MAX_PATTERN_LENGTH = 2048
# Enough for the longest patterns that trainers write (five, around three lists of names); six nested scans of a module
# name of 56 characters took 0.3 s, five 0.04 s.
MAX_QUANTIFIERS = 6
MATCHING_BUDGET_S = 5.0

# PEFT's "all-linear" leaves the output layer out, which has one of these names in the causal LMs of transformers.
ALL_LINEAR = re.compile(r"(?!(.*\.)?(lm_head|embed_out)$).*")

_QUANTIFIER = re.compile(r"(?<!\()[*+?{]\??")
_REPEATED_GROUP = re.compile(r"\)[*+{]|\(\?[a-zA-Z-]*x")  # verbose mode could hide a repetition behind a comment


class SlowPatternError(Exception):
    """The patterns of one config took more than `MATCHING_BUDGET_S` of processor time."""


class MatchingBudget:
    """Processor time of this thread that one adapter's patterns may spend; checked between two matches."""

    def __init__(self, budget_s: float = MATCHING_BUDGET_S) -> None:
        self._end_s = time.thread_time() + budget_s

    def check(self) -> None:
        if time.thread_time() > self._end_s:
            raise SlowPatternError


class PatternError(ValueError):
    """Why we refuse to run a pattern."""


def compile_pattern(pattern: str, *, inside: str = "{}") -> re.Pattern[str]:
    """The pattern put into `inside`, which is how PEFT matches it; refused if it is broken or could be slow."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern of {len(pattern)} characters (at most {MAX_PATTERN_LENGTH})")
    if _REPEATED_GROUP.search(pattern) or len(_QUANTIFIER.findall(pattern)) > MAX_QUANTIFIERS:
        raise PatternError(f"{pattern!r} repeats a group or has more than {MAX_QUANTIFIERS} quantifiers")
    try:
        re.compile(pattern)  # by itself, so that stray parentheses cannot close a group of ours
        return re.compile(inside.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError) as cause:
        raise PatternError(f"{pattern!r} is not a regular expression ({cause})") from cause


# As PEFT writes them, to the letter: odd keys match the same.
MODULE_ENDING = r"(.*\.)?({})$"
LAYER_NUMBER = r"(?:^|.*?\.){}\.(?P<layer_number>\d+)\."
ANY_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer_number>\d+)\.")


@dataclass(frozen=True, slots=True)
class PatternTable:
    """PEFT's `rank_pattern` and `alpha_pattern`: the first pattern that matches the end of a module's path wins."""

    rows: tuple[tuple[re.Pattern[str], float], ...] = ()

    def find(self, module: str, budget: MatchingBudget) -> float | None:
        for pattern, value in self.rows:
            budget.check()
            if pattern.match(module):
                return value
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRule:
    """`target_modules` and what narrows it. A string is a pattern over the whole path, a list holds path endings."""

    target_modules: re.Pattern[str] | frozenset[str]
    exclude_modules: re.Pattern[str] | frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()  # empty: all
    layer_patterns: tuple[re.Pattern[str], ...] = (ANY_LAYER_NUMBER,)

    def matches(self, module: str, budget: MatchingBudget) -> bool:
        if self.exclude_modules and _names(self.exclude_modules, module, budget):
            return False
        if not _names(self.target_modules, module, budget):
            return False
        # A whole path in the list is taken at its word, whatever the layers are.
        named_in_full = isinstance(self.target_modules, frozenset) and module in self.target_modules
        return named_in_full or not self.layers or self._layer(module, budget) in self.layers

    def _layer(self, module: str, budget: MatchingBudget) -> int | None:
        """The first number in the path (after the first of the layer patterns that matches)."""
        for pattern in self.layer_patterns:
            budget.check()
            if match := pattern.match(module):
                return int(match["layer_number"]) if match["layer_number"] else None
        return None


def _names(names: re.Pattern[str] | frozenset[str], module: str, budget: MatchingBudget) -> bool:
    """Whether a pattern matches the whole path, or one of its endings is in the set."""
    if isinstance(names, re.Pattern):
        budget.check()
        return names.fullmatch(module) is not None
    start = 0
    while module[start:] not in names:
        start = module.find(".", start) + 1
        if start == 0:
            return False
    return True
