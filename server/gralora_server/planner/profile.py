"""What a step costs on a machine, measured once. The planner's only knowledge of how fast anything is."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from gralora_runtime.errors import ConfigError
from gralora_runtime.plan import StepPlan
from gralora_server.loadtest.summary import Frozen

VERSION = 1


class StepPoint(Frozen):
    """A step of the base model at short contexts."""

    tokens: int
    seconds: float


class Profile(Frozen):
    """Of one model under one server's settings on one machine. A step's time is a sum:

    base(tokens of the step) + for each distinct adapter its bytes * (adapter_byte_s + (its tokens - 1) *
    adapter_token_byte_s) + context of the rows that decode * context_token_s + for each chunk of a prompt its tokens *
    the context before it * prefill_context_s.

    Weights are read once a step, which `adapter_byte_s` is about; what is computed grows with the tokens.
    """

    version: int = VERSION
    model: str
    made_at: str  # ISO 8601
    machine: Mapping[str, str]
    settings: Mapping[str, int]  # of the server that was measured: max_num_seqs, max_num_batched_tokens, page_size
    adapters: str  # which were measured, as a reader calls them
    step_s: tuple[StepPoint, ...]  # by rising tokens, at least two
    adapter_byte_s: float
    adapter_token_byte_s: float
    context_token_s: float
    prefill_context_s: float
    request_s: float  # of a request's way in and of its first token's way out, beside the steps
    load_byte_s: float  # from disk into the pool, while steps are computed; by bytes of the pool
    load_slowdown: float  # steps take so much longer meanwhile: 0.5 is half as long again
    server_bytes: int  # resident without pools, caches and adapters
    kv_token_bytes: int  # keys and values of a token

    def base_s(self, tokens: int) -> float:
        """Between the points along a line, above the last one along the last line."""
        points = self.step_s
        after = min(max(1, bisect_right(points, tokens, key=lambda point: point.tokens)), len(points) - 1)
        left, right = points[after - 1], points[after]
        slope = (right.seconds - left.seconds) / (right.tokens - left.tokens)
        return max(0.0, left.seconds + slope * (tokens - left.tokens))

    def plan_s(self, plan: StepPlan, adapter_bytes: Mapping[int, int]) -> float:
        """Of one step; `adapter_bytes`: by slot, without the base model's."""
        tokens_of: dict[int, int] = {}
        context_s = 0.0
        for row in plan.rows:
            count, slot = len(row.token_ids), row.adapter.slot
            context_s += row.start * (self.context_token_s if count == 1 else count * self.prefill_context_s)
            tokens_of[slot] = tokens_of.get(slot, 0) + count
        adapters_s = sum(
            adapter_bytes[slot] * (self.adapter_byte_s + (count - 1) * self.adapter_token_byte_s)
            for slot, count in tokens_of.items()
            if slot in adapter_bytes
        )
        return self.base_s(plan.num_tokens) + adapters_s + context_s

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Raises ConfigError for what is no profile of this version."""
        try:
            profile = cls.model_validate_json(path.read_text())
        except OSError as cause:
            raise ConfigError(f"the profile {path} cannot be read: {cause.strerror}") from cause
        except ValidationError as cause:
            first = cause.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise ConfigError(f"{path} is no profile: {where}: {first['msg']}") from cause
        except ValueError as cause:  # its text is no UTF-8, or its name one that no file has
            raise ConfigError(f"the profile {str(path)!r} cannot be read: {cause}") from cause
        if profile.version != VERSION or not _rising(point.tokens for point in profile.step_s):
            raise ConfigError(
                f"{path} is no profile of version {VERSION} with two or more step_s of rising tokens: measure it again"
            )
        return profile


def _rising(values: Iterable[int]) -> bool:
    pairs = list(itertools.pairwise(values))
    return bool(pairs) and all(left < right for left, right in pairs)
