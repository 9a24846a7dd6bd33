"""What an `adapter_config.json` asks for, in one vocabulary for all dialects; refuses what we would serve wrongly.

Knows neither files nor tensors nor torch. The mathematics of the three dialects meets in `Part`: rank, blocks, scale.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from gralora_runtime.adapters.checkpoint.config_keys import (
    GRALORA_KEYS,
    INVOCATION,
    LORA_KEYS,
    NOT_BESIDE_PARAMETERS,
    OTHER_HEADS,
    PASSED_OVER,
    SAVED,
    TOKENS,
    Key,
    is_off,
    unknown,
)
from gralora_runtime.adapters.checkpoint.targets import (
    ALL_LINEAR,
    ANY_LAYER_NUMBER,
    LAYER_NUMBER,
    MAX_PATTERNS,
    MatchingBudget,
    Pattern,
    PatternError,
    PatternTable,
    PlainKey,
    TargetRule,
    compile_key,
    compile_pattern,
)
from gralora_runtime.errors import AdapterRejectedError

Error = TypeVar("Error", bound=BaseException)

MAX_PROBLEMS = 20  # in one message; the rest is counted
MAX_PROBLEM_CHARS = 1500  # the name of a tensor may have 1,024
MAX_RANK = 1 << 20
MAX_INVOCATION = 1024
_MAX_TOKEN_ID = (1 << 31) - 1  # of any model
_MAX_FLOAT32 = 3.4e38


class Biases(StrEnum):
    """Whose biases were trained, and come in the place of the base model's."""

    NONE = "none"
    TARGETED = "targeted"
    ALL = "all"


class Dialect(StrEnum):
    """Who wrote the config: PEFT (GraLoRA or LoRA) or the fork of PEFT by GraLoRA's authors."""

    PEFT_GRALORA = "gralora"
    AUTHORS_GRALORA = "gralora-authors"
    LORA = "lora"


class LayerKind(StrEnum):
    """What an adapter may change of a base model."""

    LINEAR = "linear layer"
    HEAD = "output head"  # which is linear, too
    EMBEDDING = "embedding"
    NORM = "norm"
    ADDED_EMBEDDING = "embedding of added tokens"  # that the base model does not have: see `added_shapes`
    ADDED_HEAD = "output head of added tokens"
    EXPERTS = "parameter of experts"
    ROUTER = "weight of a router"


PARAMETERS = (LayerKind.EXPERTS, LayerKind.ROUTER)  # that no linear layer has: `target_parameters` names them
EMBEDDINGS = (LayerKind.EMBEDDING, LayerKind.ADDED_EMBEDDING)  # whose rows are looked up
ADDED = (LayerKind.ADDED_EMBEDDING, LayerKind.ADDED_HEAD)
MAX_ADDED_TOKENS = 256
MAX_ADDED_OPTION = "--max-added-tokens"


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A layer of the base model. `name` is its path inside the causal LM, as PEFT sees it.

    An embedding is a linear layer that reads which token it is: [vocabulary, hidden]. A norm has as many outputs as
    inputs. A parameter of experts is as many linear layers, and its `name` ends in its own.
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False  # Conv1D: the base weight is [in, out]; an adapter's tensors look the same
    has_bias: bool = False
    kind: LayerKind = LayerKind.LINEAR
    tied_to: str = ""  # of an output head: the embedding that has the same weight
    experts: int = 1  # whose matrices it holds


def added_shapes(modules: Sequence[ModuleShape], max_added_tokens: int) -> list[ModuleShape]:
    """Where adapters may have rows of tokens that the base model with these modules does not have, so many at most.

    They are modules apart, so that the others stay as wide as the base model's. Token i of them reads input 1 + i of
    the embedding, whose input 0 is any token of the base model; and is output i of the head.
    """
    by_kind = {module.kind: module for module in modules}
    embedding, head = by_kind.get(LayerKind.EMBEDDING), by_kind.get(LayerKind.HEAD)
    if not max_added_tokens or embedding is None or head is None:
        return []
    return [
        ModuleShape(
            added_name(embedding.name), 1 + max_added_tokens, embedding.out_features, kind=LayerKind.ADDED_EMBEDDING
        ),
        ModuleShape(added_name(head.name), head.in_features, max_added_tokens, kind=LayerKind.ADDED_HEAD),
    ]


def added_name(module: str) -> str:
    """No module of a model has such a name."""
    return f"{module} of added tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One low-rank pair on one module: rank r in k blocks, `scale` times its product is added. LoRA is k = 1."""

    r: int
    k: int
    scale: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The tokens whose rows of an embedding, or of an output head, were trained."""

    module: str  # how its path ends; "": the embedding
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A parsed config. For GraLoRA `rank` is that of the blocks: without the hybrid part, in either dialect."""

    dialect: Dialect
    rank: int
    blocks: int
    hybrid_rank: int
    scale: float
    targets: TargetRule
    base_model: str = ""
    notes: tuple[str, ...] = ()  # what else its config says that a person should hear of, in sentences
    biases: Biases = Biases.NONE
    use_dora: bool = False  # each output is scaled to a trained magnitude
    lora_bias: bool = False  # B has biases
    # The tokens of a prompt from whose last place on it is applied (aLoRA); none: from the start.
    invocation: tuple[int, ...] = ()
    saved: tuple[str, ...] = ()  # how modules' paths end that were trained as a whole
    token_rows: tuple[TokenRows, ...] = ()
    ties: bool = False  # what the embedding has, an output head that is tied to it has too
    alpha: float = 0.0  # LoRA only, as are the three below: its scale can differ from module to module
    use_rslora: bool = False
    rank_pattern: PatternTable = field(default_factory=PatternTable)
    alpha_pattern: PatternTable = field(default_factory=PatternTable)

    def parts(self, module: str, budget: MatchingBudget) -> tuple[Part, ...]:
        """The pairs this adapter puts on a module it targets: one, or two for a hybrid."""
        if self.dialect is not Dialect.LORA:
            block = Part(r=self.rank, k=self.blocks, scale=self.scale)
            if self.hybrid_rank == 0:
                return (block,)
            return (block, Part(r=self.hybrid_rank, k=1, scale=self.scale))
        rank = int(self.rank_pattern.find(module, budget) or self.rank)
        alpha = self.alpha_pattern.find(module, budget)
        scale = _lora_scale(self.alpha if alpha is None else alpha, rank, use_rslora=self.use_rslora)
        return (Part(r=rank, k=1, scale=scale),)


def parse_config(name: str, config: Mapping[str, Any], allowed_keys: Collection[str] = ()) -> AdapterSpec:
    """Read a config of any dialect, or raise with every reason why it cannot be served.

    `allowed_keys`: keys that are passed over, although nobody here knows them.
    """
    reader = _ConfigReader(config, allowed_keys)
    peft_type = config.get("peft_type")
    spec: AdapterSpec | None = None
    if peft_type == "GRALORA":
        spec = reader.gralora()
    elif peft_type == "LORA":
        spec = reader.lora()
    else:
        reader.problems.append(f"peft_type: {peft_type!r} is not supported (GRALORA and LORA are)")
    if reader.problems or spec is None:
        raise rejected(name, reader.problems)
    return spec


def not_in_vocabulary(invocation: Sequence[int], vocab_size: int) -> list[str]:
    """What is wrong with an invocation that no prompt of this model could have. `vocab_size` 0: that is not known."""
    return [
        f"{INVOCATION}[{at}]: {token} is not a token id of this model (0 to {vocab_size - 1})"
        for at, token in enumerate(invocation)
        if 0 < vocab_size <= token
    ]


def rejected(name: str, problems: list[str]) -> AdapterRejectedError:
    """The error for these problems; a long list is cut and the rest counted."""
    shown = [clipped(problem, MAX_PROBLEM_CHARS) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        shown.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
    return AdapterRejectedError(name, shown)


def to_keep(error: Error) -> Error:
    """Without where it came from: a traceback holds what its frames did, which is a stranger's whole header."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _lora_scale(alpha: float, rank: int, *, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


class _ConfigReader:
    """Reads keys one by one and collects problems instead of stopping at the first. Bad values read as a harmless 1."""

    def __init__(self, config: Mapping[str, Any], allowed_keys: Collection[str]) -> None:
        self.config = config
        self.problems: list[str] = []
        self._allowed_keys = allowed_keys
        self._budget = MatchingBudget()

    def gralora(self) -> AdapterSpec:
        notes = self._judge(GRALORA_KEYS)
        r, k = self._rank("r"), self._rank("gralora_k")
        hybrid = self._integer("hybrid_r", minimum=0) if "hybrid_r" in self.config else 0
        authors = "gralora_alpha" in self.config
        if authors == ("alpha" in self.config):
            self.problems.append(
                f"alpha: {self.config.get('alpha')!r} and gralora_alpha: {self.config.get('gralora_alpha')!r}: "
                "exactly one must be present, because it tells which dialect the config is written in"
            )
        # The authors count the hybrid rank into r, PEFT adds it.
        total = r if authors else r + hybrid
        rank = r - hybrid if authors else r
        self._check_blocks(rank, k, hybrid)
        alpha = self._number("gralora_alpha" if authors else "alpha")
        return AdapterSpec(
            dialect=Dialect.AUTHORS_GRALORA if authors else Dialect.PEFT_GRALORA,
            rank=rank,
            blocks=k,
            hybrid_rank=hybrid,
            scale=self._scale(alpha / total),
            targets=self._targets(),
            base_model=self._base_model(),
            notes=notes,
            biases=self._biases("gralora_only"),
            invocation=self._invocation(),
            saved=self._saved(),
        )

    def lora(self) -> AdapterSpec:
        notes = self._judge(LORA_KEYS)
        rank, alpha = self._rank("r"), self._number("lora_alpha")
        use_rslora = self._flag("use_rslora")
        spec = AdapterSpec(
            dialect=Dialect.LORA,
            rank=rank,
            blocks=1,
            hybrid_rank=0,
            scale=self._scale(_lora_scale(alpha, rank, use_rslora=use_rslora)),
            targets=self._targets(self._parameters()),
            base_model=self._base_model(),
            notes=notes,
            biases=self._biases("lora_only"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            invocation=self._invocation(),
            saved=self._saved(),
            token_rows=self._token_rows(),
            ties=self._flag("ensure_weight_tying"),
            alpha=alpha,
            use_rslora=use_rslora,
            rank_pattern=self._pattern_table("rank_pattern"),
            alpha_pattern=self._pattern_table("alpha_pattern"),
        )
        if spec.targets.parameters:
            for key in NOT_BESIDE_PARAMETERS:
                if not is_off(self.config.get(key)):
                    self.problems.append(f"{key}: {_shown(self.config[key])} is not supported beside target_parameters")
        if spec.use_dora:  # PEFT has neither
            for key, value in (("lora_bias", spec.lora_bias), (INVOCATION, list(spec.invocation))):
                if value:
                    self.problems.append(f"{key}: {_shown(value)} is not supported beside use_dora")
        return spec

    def _judge(self, keys: Mapping[str, Key]) -> tuple[str, ...]:
        """Refuses what changes the mathematics, and returns what else is to be told."""
        notes = []
        for name in sorted(self.config):
            value = self.config[name]
            key = keys.get(name) or (PASSED_OVER if name in self._allowed_keys else unknown(name))
            if not key.neutral(value):
                self.problems.append(f"{name}: {_shown(value)} {key.otherwise}")
            elif key.told and not is_off(value) and key.tells(value):
                notes.append(f"its config has {name}: {_shown(value)}, {key.told}")
        return tuple(notes)

    def _check_blocks(self, rank: int, k: int, hybrid: int) -> None:
        if rank < 1:
            self.problems.append(f"r: {self.config.get('r')!r} leaves no rank beside hybrid_r: {hybrid}")
        elif rank % k:
            self.problems.append(f"gralora_k: {k} does not divide the rank of the blocks, {rank}")

    def _integer(self, key: str, *, minimum: int) -> int:
        value = self.config.get(key)
        if type(value) is int and minimum <= value <= MAX_RANK:
            return value
        self.problems.append(f"{key}: {_shown(value)} is not an integer from {minimum} to {MAX_RANK}")
        return 1

    def _rank(self, key: str) -> int:
        return self._integer(key, minimum=1)

    def _number(self, key: str) -> float:
        value = self.config.get(key)
        if value is not None and _is_finite(value):
            return float(value)
        self.problems.append(f"{key}: {_shown(value)} is not a finite number")
        return 1.0

    def _scale(self, scale: float) -> float:
        if abs(scale) > _MAX_FLOAT32:
            self.problems.append(f"the scale {scale} is too large for float32")
        return scale

    def _flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problems.append(f"{key}: {_shown(value)} is neither true nor false")
        return False

    def _biases(self, targeted: str) -> Biases:
        """`targeted`: what PEFT calls those of targeted modules in this dialect."""
        value = self.config.get("bias")
        known = {"none": Biases.NONE, targeted: Biases.TARGETED, "all": Biases.ALL}
        if value is None:
            return Biases.NONE
        if isinstance(value, str) and value in known:
            if known[value] is not Biases.NONE:
                self._refuse_beside_invocation("bias")
            return known[value]
        self.problems.append(f"bias: {_shown(value)} is not supported ({', '.join(known)} are)")
        return Biases.NONE

    def _refuse_beside_invocation(self, key: str) -> None:
        """What PEFT applies from the first token on, though that token's pages are shared with the base model."""
        if not is_off(self.config.get(INVOCATION)):
            self.problems.append(f"{key}: {_shown(self.config[key])} is not supported beside {INVOCATION}")

    def _saved(self) -> tuple[str, ...]:
        value = self.config.get(SAVED)
        if is_off(value):
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.problems.append(f"{SAVED}: {_shown(value)} is not a list of modules' names")
            return ()
        names = tuple(name for name in value if name not in OTHER_HEADS)
        if names:
            self._refuse_beside_invocation(SAVED)
        return names

    def _token_rows(self) -> tuple[TokenRows, ...]:
        value = self.config.get(TOKENS)
        if is_off(value):
            return ()
        self._refuse_beside_invocation(TOKENS)
        by_module: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for module, tokens in by_module.items():
            where = f"{TOKENS}[{module!r}]" if module else TOKENS
            if not isinstance(tokens, list) or not tokens or not all(map(_is_token_id, tokens)):
                self.problems.append(f"{where}: {_shown(tokens)} is not a list of token ids")
                return ()
            if len(set(tokens)) < len(tokens):
                self.problems.append(f"{where}: {_shown(tokens)} names a token twice")
        return tuple(TokenRows(module, tuple(tokens)) for module, tokens in by_module.items())

    def _base_model(self) -> str:
        value = self.config.get("base_model_name_or_path")
        return value[:256] if isinstance(value, str) else ""

    def _invocation(self) -> tuple[int, ...]:
        value = self.config.get(INVOCATION)
        if is_off(value):  # a plain LoRA, to PEFT too
            return ()
        if not isinstance(value, list) or len(value) > MAX_INVOCATION:
            self.problems.append(f"{INVOCATION}: {_shown(value)} is not a list of 1 to {MAX_INVOCATION} token ids")
            return ()
        for at, token in enumerate(value):
            if not _is_token_id(token):
                self.problems.append(f"{INVOCATION}[{at}]: {_shown(token)} is not a token id")
                return ()
        return tuple(value)

    def _pattern_table(self, key: str) -> PatternTable:
        table = self.config.get(key) or {}
        if not isinstance(table, dict):
            self.problems.append(f"{key}: {_shown(table)} is not an object")
            return PatternTable()
        if len(table) > MAX_PATTERNS:
            self.problems.append(f"{key}: {len(table)} patterns are too many (at most {MAX_PATTERNS})")
            return PatternTable()
        rows: list[tuple[Pattern | PlainKey, float]] = []
        for pattern, value in table.items():
            if key == "rank_pattern" and not (type(value) is int and 1 <= value <= MAX_RANK):
                self.problems.append(f"{key}[{pattern!r}]: {_shown(value)} is not an integer from 1 to {MAX_RANK}")
            elif not (_is_finite(value) and abs(value) <= _MAX_FLOAT32):
                self.problems.append(f"{key}[{pattern!r}]: {_shown(value)} is not a finite number")
            try:
                rows.append((compile_key(pattern, self._budget), value))
            except PatternError as problem:
                self.problems.append(f"{key}: {problem}")
        return PatternTable(tuple(rows))

    def _pattern(self, key: str, pattern: str, *, inside: str = "{}") -> Pattern:
        try:
            return compile_pattern(pattern, self._budget, inside=inside)
        except PatternError as problem:
            self.problems.append(f"{key}: {problem}")
            return ANY_LAYER_NUMBER

    def _targets(self, parameters: frozenset[str] = frozenset()) -> TargetRule:
        target_modules = self._names("target_modules")
        layers = self.config.get("layers_to_transform")
        if not target_modules and not parameters:
            self.problems.append(f"target_modules: {_shown(self.config.get('target_modules'))} names no module")
        if isinstance(target_modules, Pattern) and layers not in (None, []):
            self.problems.append(f"layers_to_transform: {_shown(layers)} needs target_modules to be a list")
        return TargetRule(
            target_modules=target_modules,
            exclude_modules=self._names("exclude_modules"),
            parameters=parameters,
            layers=frozenset(self._layers(layers)),
            layer_patterns=self._layer_patterns(),
        )

    def _parameters(self) -> frozenset[str]:
        value = self.config.get("target_parameters") or []
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return frozenset(value)
        self.problems.append(f"target_parameters: {_shown(value)} is not a list of strings")
        return frozenset()

    def _names(self, key: str) -> Pattern | frozenset[str]:
        value = self.config.get(key)
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return frozenset(value)
        if isinstance(value, str):
            return ALL_LINEAR if value.lower() == "all-linear" else self._pattern(key, value)
        if value is not None:
            self.problems.append(f"{key}: {_shown(value)} is neither a string nor a list of strings")
        return frozenset()

    def _layers(self, layers: Any) -> Iterator[int]:
        for layer in layers if isinstance(layers, list) else [layers]:
            if type(layer) is int:
                yield layer
            elif layer is not None:
                self.problems.append(f"layers_to_transform: {_shown(layer)} is not an integer")

    def _layer_patterns(self) -> tuple[Pattern, ...]:
        value = self.config.get("layers_pattern") or []
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            self.problems.append(f"layers_pattern: {_shown(value)} is neither a string nor a list of strings")
            patterns = []
        if len(patterns) > MAX_PATTERNS:
            self.problems.append(f"layers_pattern: {len(patterns)} patterns are too many (at most {MAX_PATTERNS})")
            patterns = []
        compiled = (self._pattern("layers_pattern", pattern, inside=LAYER_NUMBER) for pattern in patterns)
        return tuple(compiled) or (ANY_LAYER_NUMBER,)


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_TOKEN_ID


def _is_finite(value: Any) -> bool:
    """JSON integers can be too large for a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def clipped(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else text[: num_chars - 3] + "..."


class _Shown(reprlib.Repr):
    """Values as Python writes them, without going through all of a large or a deep one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxdict = 24
        self.maxstring = self.maxlong = self.maxother = 120


def _shown(value: object) -> str:
    return clipped(_SHOWN.repr(value), 120)


_SHOWN = _Shown()
