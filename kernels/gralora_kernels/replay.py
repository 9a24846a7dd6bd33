"""What a CUDA graph was captured for. A replay launches exactly that, so a step that needs more must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gralora_kernels.listing import Listing


class ReplayError(ValueError):
    """This step does not fit into the captured graph: run it without, or with a larger one."""

    def __init__(self, what: str, needed: int, captured: int) -> None:
        super().__init__(f"the step needs {what} {needed}, but the graph was captured with {captured}")
        self.what = what
        self.needed = needed
        self.captured = captured


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayGuard:
    """What captured launches can compute: sizes of the memory they know, and what they promised their compiler."""

    tokens: int
    columns: int  # of u
    items: int
    tile_tokens: int
    is_split: bool
    in_alignments: tuple[int, ...]  # elements, by group
    out_alignments: tuple[int, ...]

    def check(self, step: Listing) -> None:
        """Raise `ReplayError` unless the captured launches compute all of `step`."""
        if len(step.heads) != len(self.in_alignments):
            raise ReplayError("groups", len(step.heads), len(self.in_alignments))
        for what, needed, available in self._sizes(step):
            if needed > available:
                raise ReplayError(what, needed, available)
        if step.is_split != self.is_split:
            raise ReplayError("split sums", int(step.is_split), int(self.is_split))
        for what, alignments, promised in (
            ("input", step.in_alignments, self.in_alignments),
            ("output", step.out_alignments, self.out_alignments),
        ):
            for group, (given, captured) in enumerate(zip(alignments.tolist(), promised, strict=True)):
                if given < captured:  # the captured kernels' loads would be misaligned
                    raise ReplayError(f"an alignment of {what} blocks in group {group} of", given, captured)

    def _sizes(self, step: Listing) -> Iterator[tuple[str, int, int]]:
        yield "tokens", step.num_tokens, self.tokens
        yield "tokens per tile", step.tile_tokens, self.tile_tokens
        yield "columns of u", step.num_columns, self.columns
        yield "items in all lists", step.num_items, self.items
