"""What a CUDA graph was captured with. A replay launches exactly that, so a step that needs more must be refused."""

from __future__ import annotations

from collections.abc import Iterator

from gralora_kernels.work import StepWork


class ReplayError(ValueError):
    """This step does not fit into the captured graph: run it without, or with a larger one."""

    def __init__(self, what: str, needed: int, captured: int) -> None:
        super().__init__(f"the step needs {what} {needed}, but the graph was captured with {captured}")
        self.what = what
        self.needed = needed
        self.captured = captured


class ReplayGuard:
    """Compares steps with the captured one."""

    def __init__(self, captured: StepWork) -> None:
        self._captured = captured

    def check(self, step: StepWork) -> None:
        """Raise `ReplayError` unless the captured launches compute all of `step`."""
        captured = self._captured
        if len(step.groups) != len(captured.groups):
            raise ReplayError("groups", len(step.groups), len(captured.groups))
        for (what, needed), (_, available) in zip(_sizes(step), _sizes(captured), strict=True):
            if needed > available:
                raise ReplayError(what, needed, available)
        for (what, given), (_, promised) in zip(_alignments(step), _alignments(captured), strict=True):
            if given < promised:  # the captured kernels' loads would be misaligned
                raise ReplayError(what, given, promised)


def _sizes(work: StepWork) -> Iterator[tuple[str, int]]:
    yield "tokens", work.num_tokens
    yield "adapted tokens", len(work.order)
    yield "tokens per tile", work.tile_tokens
    yield "columns of u", work.num_columns
    yield "items in all lists", len(work.items)
    for i, group in enumerate(work.groups):
        yield f"shrink items in group {i}", group.num_shrink_items
        yield f"expand items in group {i}", group.num_expand_items


def _alignments(work: StepWork) -> Iterator[tuple[str, int]]:
    for i, group in enumerate(work.groups):
        yield f"an alignment of input blocks in group {i} of", group.in_alignment
        yield f"an alignment of output blocks in group {i} of", group.out_alignment
