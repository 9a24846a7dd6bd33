"""Which modules an adapter's config names: PEFT's matching rules, on patterns that a stranger wrote. No torch.

PEFT matches with `re`, which holds the interpreter lock for as long as it backtracks: for ever, if a pattern was made
so, and every request with it. Here the `regex` package matches, without the lock and with a time limit. A pattern has
to be valid for `re` all the same, and what `regex` reads differently is rewritten to mean what it means to `re`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import regex

MAX_PATTERN_LENGTH = 2048
MAX_PATTERNS = 8192  # in one table; a model of 80 layers has 560 modules
MATCHING_BUDGET_S = 1.0

_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")  # its comments would hide brackets from `_as_regex_reads_it`
_REPEAT = re.compile(r"\{(?!\})(\d*)(?:(,)(\d*))?\}")
_SET = re.compile(r"(\[\^?)(\]?)")  # a bracket that follows at once does not close it
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.]+")


class SlowPatternError(Exception):
    """The patterns of one config took more than `MATCHING_BUDGET_S` of processor time."""


class MatchingBudget:
    """Processor time of this thread that one adapter's patterns may take, to be compiled or to be matched."""

    def __init__(self, budget_s: float = MATCHING_BUDGET_S) -> None:
        self._end_s = time.thread_time() + budget_s

    def left_s(self) -> float:
        """Above 0; raises `SlowPatternError` when nothing is left."""
        left_s = self._end_s - time.thread_time()
        if left_s <= 0:
            raise SlowPatternError
        return left_s


class PatternError(ValueError):
    """Why we refuse to run a pattern."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression in `re`'s language. Equal if the text is."""

    text: str
    _compiled: Any = field(compare=False, repr=False, default=None)

    def match(self, module: str, budget: MatchingBudget) -> Any:
        """`re`'s match object, or None. Raises `SlowPatternError`."""
        return self._try(self._compiled.match, module, budget)

    def fullmatch(self, module: str, budget: MatchingBudget) -> Any:
        """`re`'s match object, or None. Raises `SlowPatternError`."""
        return self._try(self._compiled.fullmatch, module, budget)

    def _try(self, match: Any, module: str, budget: MatchingBudget) -> Any:
        try:
            # The limit is of the whole process's processor time, so it comes early where other threads compute: by as
            # much as there are cores. What anybody means to write takes microseconds.
            return match(module, timeout=budget.left_s(), concurrent=True)
        except (TimeoutError, MemoryError) as cause:
            raise SlowPatternError from cause


def compile_pattern(pattern: str, budget: MatchingBudget, *, inside: str = "{}") -> Pattern:
    """The pattern put into `inside`, which is how PEFT matches it; refused if it is broken or takes too long."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern of {len(pattern)} characters (at most {MAX_PATTERN_LENGTH})")
    if _VERBOSE.search(pattern):
        raise PatternError(f"{pattern!r} sets the verbose flag")
    try:
        budget.left_s()
        re.compile(pattern)  # by itself, so that stray parentheses cannot close a group of ours
        re.compile(inside.replace("{}", pattern))
        return _compiled(inside.replace("{}", pattern))
    except SlowPatternError as cause:
        raise PatternError(f"its patterns take more than {MATCHING_BUDGET_S:g} s to compile") from cause
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as cause:
        raise PatternError(f"{pattern!r} is not a regular expression ({cause})") from cause


def _compiled(text: str) -> Pattern:
    return Pattern(text, regex.compile(_as_regex_reads_it(text), regex.VERSION0, cache_pattern=False))


@dataclass(frozen=True, slots=True)
class PlainKey:
    """A key of a table that is a path, or the end of one. To `re`, and so here, a dot in it stands for any character.

    Some tools write one for each module: compiling hundreds would take half a second.
    """

    text: str
    ending: str  # behind its last dot: most modules differ there

    def match(self, module: str, _budget: MatchingBudget) -> bool:
        """As `MODULE_ENDING` around it would."""
        if not module.endswith(self.ending):
            return False
        start = len(module) - len(self.text)
        if start < 0 or (start and module[start - 1] != "."):
            return False
        return all(mine in (".", other) for mine, other in zip(self.text, module[start:], strict=True))


def compile_key(key: str, budget: MatchingBudget) -> Pattern | PlainKey:
    """A key of `rank_pattern` or `alpha_pattern`. Raises `PatternError`."""
    if _PLAIN_KEY.fullmatch(key):
        return PlainKey(key, key.rpartition(".")[2])
    return compile_pattern(key, budget, inside=MODULE_ENDING)


def _as_regex_reads_it(pattern: str) -> str:
    """In `re` a brace that is no repetition is a brace, where `regex` sees fuzzy matching; and a bracket inside of
    brackets is a bracket, where `regex` sees a class of POSIX.
    """
    written: list[str] = []
    at, in_set = 0, False
    while at < len(pattern):
        size, piece = _piece(pattern, at, in_set=in_set)
        in_set = piece.startswith("[") or (in_set and piece != "]")
        written.append(piece)
        at += size
    return "".join(written)


def _piece(pattern: str, at: int, *, in_set: bool) -> tuple[int, str]:
    """How long the next piece of the pattern is, and how it is written for `regex`."""
    first, same = pattern[at], pattern[at : at + 1]
    if (named := pattern.startswith("\\N{", at)) or (pattern.startswith("(?#", at) and not in_set):
        same = pattern[at : pattern.index("}" if named else ")", at) + 1]
    elif first == "\\":
        same = pattern[at : at + 2]
    elif first == "[":
        if in_set:
            return 1, "\\["
        head = _SET.match(pattern, at)
        assert head is not None
        return len(head[0]), head[1] + ("\\]" if head[2] else "")
    elif first == "{" and not in_set:
        if repeat := _REPEAT.match(pattern, at):
            low, comma, high = repeat.groups("")
            return len(repeat[0]), f"{{{low or 0}{comma}{high}}}"
        return 1, "\\{"
    return len(same), same


# As PEFT writes them, to the letter: odd keys match the same.
MODULE_ENDING = r"(.*\.)?({})$"
LAYER_NUMBER = r"(?:^|.*?\.){}\.(?P<layer_number>\d+)\."
ANY_LAYER_NUMBER = _compiled(r".*?\.[^.]*\.(?P<layer_number>\d+)\.")

# PEFT's "all-linear" leaves the output layer out, which has one of these names in the causal LMs of transformers.
ALL_LINEAR = _compiled(r"(?!(.*\.)?(lm_head|embed_out)$).*")


@dataclass(frozen=True, slots=True)
class PatternTable:
    """PEFT's `rank_pattern` and `alpha_pattern`: the first pattern that matches the end of a module's path wins."""

    rows: tuple[tuple[Pattern | PlainKey, float], ...] = ()

    def find(self, module: str, budget: MatchingBudget) -> float | None:
        budget.left_s()  # plain keys do not ask, and there may be thousands
        return next((value for pattern, value in self.rows if pattern.match(module, budget)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRule:
    """`target_modules` and what narrows it. A string is a pattern over the whole path, a list holds path endings."""

    target_modules: Pattern | frozenset[str]
    exclude_modules: Pattern | frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()  # endings of their paths: PEFT holds nothing else against them
    layers: frozenset[int] = frozenset()  # empty: all
    layer_patterns: tuple[Pattern, ...] = (ANY_LAYER_NUMBER,)

    def matches(self, module: str, budget: MatchingBudget) -> bool:
        if self.exclude_modules and _names(self.exclude_modules, module, budget):
            return False
        if not _names(self.target_modules, module, budget):
            return False
        # A whole path in the list is taken at its word, whatever the layers are.
        named_in_full = isinstance(self.target_modules, frozenset) and module in self.target_modules
        return named_in_full or not self.layers or self._layer(module, budget) in self.layers

    def matches_parameter(self, path: str) -> bool:
        return _ends_in(self.parameters, path)

    def _layer(self, module: str, budget: MatchingBudget) -> int | None:
        """The first number in the path (after the first of the layer patterns that matches)."""
        for pattern in self.layer_patterns:
            if match := pattern.match(module, budget):
                return int(match["layer_number"]) if match["layer_number"] else None
        return None


def _names(names: Pattern | frozenset[str], module: str, budget: MatchingBudget) -> bool:
    """Whether a pattern matches the whole path, or one of its endings is in the set."""
    if isinstance(names, Pattern):
        return names.fullmatch(module, budget) is not None
    return _ends_in(names, module)


def _ends_in(names: frozenset[str], path: str) -> bool:
    start = 0
    while path[start:] not in names:
        start = path.find(".", start) + 1
        if start == 0:
            return False
    return True
