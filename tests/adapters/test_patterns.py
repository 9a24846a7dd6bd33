"""Patterns of strangers: they mean what they mean to `re`, with which PEFT matches, and none of them hangs anybody."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import HOSTILE_PATTERNS

from gralora_runtime.adapters.checkpoint.targets import (
    ANY_LAYER_NUMBER,
    LAYER_NUMBER,
    MAX_PATTERN_LENGTH,
    MODULE_ENDING,
    MatchingBudget,
    Pattern,
    PatternError,
    PatternTable,
    PlainKey,
    SlowPatternError,
    compile_key,
    compile_pattern,
)


@pytest.fixture(autouse=True, scope="module")
def other_tests_garbage() -> Iterator[None]:
    """Not collected here: in this large process that takes tenths of a second, which would count as a pattern's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


NAMES = [
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 7, 10, 31) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.{p}_proj" for i in (0, 31) for p in ("gate", "up", "down")),
    "model.layers.3.block_sparse_moe.experts.17.w1",
    "model.layers.3.mlp.experts.101.gate_proj",
    "model.layers.12.self_attn.qkv_proj",
    "transformer.h.5.attn.c_attn",
    "transformer.h.5.mlp.c_fc",
    "model.visual.blocks.2.attn.qkv",
    "model.language_model.layers.9.self_attn.q_proj",
    "vision_tower.encoder.layers.1.mlp.fc1",
    "lm_head",
    "embed_out",
    "my_q_proj",
    "q_proj",
    "a{2}.[x]",
    "",
]
PROJECTIONS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "c_attn",
    "fc1",
    "w1",
    "qkv",
]
PLACES = ["self_attn", "mlp", "attn", "experts", "layers", "h", "blocks", "encoder", "language_model"]


# What PEFT does with a pattern: a target, a key of a table, and what stands before the number of a layer.
USES = {"{}": "fullmatch", MODULE_ENDING: "match", LAYER_NUMBER: "match"}


def re_says(pattern: str, names: list[str]) -> list[tuple[bool, str | None]]:
    """For each use and name: whether it matches, and the number of the layer. Raises `re.error`."""
    return [
        (match is not None, match["layer_number"] if match and inside == LAYER_NUMBER else None)
        for inside, how in USES.items()
        for match in map(getattr(re.compile(inside.replace("{}", pattern)), how), names)
    ]


def we_say(pattern: str, names: list[str]) -> list[tuple[bool, str | None]]:
    budget = MatchingBudget()
    return [
        (match is not None, match["layer_number"] if match and inside == LAYER_NUMBER else None)
        for inside, how in USES.items()
        for compiled in [compile_pattern(pattern, budget, inside=inside)]
        for match in [getattr(compiled, how)(name, budget) for name in names]
    ]


PREFIXES = [
    *(
        "",
        ".*",
        r".*\.",
        "^",
        r"model\.layers\.\d+\.",
        r"model\.layers\.(?:[0-9]|1[0-9])\.",
        r"(?:.*\.)?",
        "model.layers.",
    ),
    *(r".*layers\.(?:0|7|31)\..*", r"^(?!.*lm_head).*", r"^(?!.*visual).*\.", r"model\.language_model(?=\.).*\."),
    *(r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?)", r"transformer\.h\.\d{1,2}\.", r".*experts\.\d+\."),
    *(r"(?i)MODEL.*", r"[^.]+\.layers\.[\d]{1,}\.", r"\b", r"(?P<layer>.*)\."),
]
ENDS = [".*proj.*", r"\w+_proj", r"(?:[qkvo]|gate|up|down)_proj(?!\.)", r"w\d+", "(KINDS)_proj", "[qkv]_proj"]
ENDS_OF_ONE = ["{}", "{}$", r"{}\b", "(?<!my_){}"]
ENDS_OF_SOME = ["{}", "({})", "(?:{})$", "(?:(?:{}))"]


def realistic_pattern(rng: random.Random) -> str:
    """Put together from what configs in the wild are made of."""
    some = rng.sample(PROJECTIONS, rng.randint(1, 5))
    prefix = rng.choice(PREFIXES)
    middle = rng.choice(["", f"(?:{'|'.join(rng.sample(PLACES, 2))})\\.", rng.choice(PLACES) + r"\.", r"(?:\w+\.)*"])
    kinds = [p.removesuffix("_proj") for p in some if p.endswith("_proj")] or ["q"]
    ends = [end.format(some[0]) for end in ENDS_OF_ONE] + [end.format("|".join(some)) for end in ENDS_OF_SOME]
    end = rng.choice(ENDS + ends).replace("KINDS", "|".join(kinds))
    return prefix + middle + end


def test_thousands_of_realistic_patterns_match_what_peft_matches() -> None:
    rng = random.Random(0)
    patterns = {realistic_pattern(rng) for _ in range(3_000)}
    assert len(patterns) > 1_500
    matched = 0
    for pattern in sorted(patterns):
        try:
            expected = re_says(pattern, NAMES)
        except re.error:  # (?i) inside of PEFT's own pattern
            with pytest.raises(PatternError):
                we_say(pattern, NAMES)
            continue
        assert we_say(pattern, NAMES) == expected, pattern
        matched += sum(does for does, _ in expected)
    assert matched > 10_000


ATOMS = [
    *(
        "a",
        "b",
        ".",
        "-",
        "]",
        "{",
        "}",
        "{}",
        "{,}",
        "{2}",
        "{e}",
        "{i<=1}",
        "[ab]",
        "[^a]",
        "[]a]",
        "[^]a]",
        "[[:alpha:]]",
    ),
    *(
        "[a[b]",
        "[a{2}]",
        "[{]",
        r"[\]a]",
        r"\d",
        r"\w",
        r"\W",
        r"\.",
        r"\{",
        r"\[",
        r"\b",
        r"\B",
        "^",
        "$",
        r"\Z",
        r"\A",
    ),
    *("\\x61", r"\141", r"\N{DIGIT TWO}", "(?#[{)", "~~", "[a--b]", "[a||b]", "(?:)", "|"),
]
REPEATS = ["", "", "", "*", "+", "?", "*?", "??", "{2}", "{,2}", "{1,}", "{1,2}", "{,}", "{0}", "*+", "{2}?", "{ 2}"]
GROUPS = [
    "({})",
    "(?:{})",
    "(?={})",
    "(?!{})",
    "(?<={})",
    "(?<!{})",
    "(?>{})",
    "(?i:{})",
    "(?-i:{})",
    r"({})\1",
    "({})?(?(1)a|b)",
]


def small_patterns() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(ATOMS)

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        grouped = st.builds(lambda group, text: group.replace("{}", text), st.sampled_from(GROUPS), inner)
        return st.lists(st.tuples(grouped | inner, st.sampled_from(REPEATS)), min_size=1, max_size=3).map(
            lambda parts: "".join(map("".join, parts))
        )

    return st.recursive(atoms, grown, max_leaves=5)


@settings(max_examples=2_000, deadline=None, derandomize=True, database=None)
@given(pattern=small_patterns(), text=st.text("ab2.{}[]-e<=1i:", min_size=1, max_size=6))
def test_whatever_re_can_read_is_read_the_same(pattern: str, text: str) -> None:
    """Fuzzy matching, POSIX classes, set operations and what else `regex` knows and `re` does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `re` announces set operations
        try:
            expected = re.fullmatch(pattern, text) is not None
        except re.error:
            with pytest.raises(PatternError):
                compile_pattern(pattern, MatchingBudget())
            return
        pattern_of_ours = compile_pattern(pattern, MatchingBudget())
    assert (pattern_of_ours.fullmatch(text, MatchingBudget()) is not None) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "(?x)(a+) # x\n+b",
        "x" * (MAX_PATTERN_LENGTH + 1),
        "(",
        "a)(b",
        "(?P<a",
        "\\",
        "(" * 1000,
        r"\p{L}",
        "(?V1)a",
        "(?e)a",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_broken_patterns_and_those_of_another_language_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        compile_pattern(pattern, MatchingBudget())


def test_equal_patterns_are_equal_so_that_plans_are_kept() -> None:
    one, other, third = (compile_pattern(text, MatchingBudget()) for text in ("q.*", "q.*", "k.*"))

    assert one == other
    assert hash(one) == hash(other)
    assert one != third


class Neighbour:
    """A thread that only wants to run now and then, as the one that decodes does."""

    def __init__(self) -> None:
        self.longest_gap_s = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        last_s = time.perf_counter()
        while not self._stopped:
            time.sleep(0.0005)
            now_s = time.perf_counter()
            self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s


@pytest.mark.alone
@pytest.mark.parametrize("kind", HOSTILE_PATTERNS)
@pytest.mark.parametrize("inside", ["{}", MODULE_ENDING, LAYER_NUMBER], ids=["target", "key", "layer"])
def test_a_hostile_pattern_takes_its_budget_at_most_and_lets_others_run(kind: str, inside: str) -> None:
    started_s = time.thread_time()
    with Neighbour() as neighbour:
        try:
            budget = MatchingBudget(0.1)
            pattern = compile_pattern(HOSTILE_PATTERNS[kind], budget, inside=inside)
            for name in NAMES:
                assert pattern.match(name, budget) is None
                assert pattern.fullmatch(name, budget) is None
        except (PatternError, SlowPatternError):
            pass

    assert time.thread_time() - started_s < 0.4
    assert neighbour.longest_gap_s < 0.2


def test_the_limit_is_what_stops_them() -> None:
    """Or the test above would pass because `regex` had got better at these."""
    for kind in ("empty-alternatives", "two-ways", "counted"):
        pattern = compile_pattern(HOSTILE_PATTERNS[kind], MatchingBudget())
        with pytest.raises(SlowPatternError):
            pattern.fullmatch("model.layers.10.self_attn.q_proj", MatchingBudget(0.1))


def test_patterns_that_are_slow_together_are_stopped() -> None:
    """Each of thousands takes a moment; the budget ends the sum."""
    slow = compile_pattern(".*.*.*.*.*[!?]", MatchingBudget(), inside=MODULE_ENDING)
    table = PatternTable(((slow, 1.0),) * 100_000)

    with pytest.raises(SlowPatternError):
        table.find("model.layers.0.self_attn.q_proj", MatchingBudget(budget_s=0.05))


def test_thousands_of_patterns_are_stopped_while_they_are_compiled() -> None:
    budget = MatchingBudget(0.05)

    def compile_all() -> None:
        for number in range(100_000):
            compile_pattern(f"(a|b|c)*{number}", budget)

    with pytest.raises(PatternError, match="to compile"):
        compile_all()


def test_a_table_with_a_key_for_each_module_of_a_large_model_is_planned_in_time() -> None:
    """EVA writes a rank for each module, by its whole path."""
    modules = [f"model.layers.{i}.{place}_proj" for i in range(80) for place in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    budget = MatchingBudget(0.3)
    table = PatternTable(tuple((compile_key(module, budget), float(i)) for i, module in enumerate(modules)))

    assert [table.find(module, budget) for module in modules] == [float(i) for i in range(560)]
    assert Pattern(ANY_LAYER_NUMBER.text) == ANY_LAYER_NUMBER


@pytest.mark.parametrize(
    "key", ["q_proj", "q.proj", ".", "...", "self_attn.q_proj", "layers.0", "lm_head", "model", "x" * 99, "proj"]
)
def test_plain_keys_match_as_the_patterns_that_they_are(key: str) -> None:
    assert isinstance(compile_key(key, MatchingBudget()), PlainKey)
    for name in [*NAMES, key, f"a.{key}", f"a{key}", key.replace("_", "."), key.replace(".", "_")]:
        expected = re.match(MODULE_ENDING.replace("{}", key), name) is not None
        assert bool(compile_key(key, MatchingBudget()).match(name, MatchingBudget())) == expected, name
