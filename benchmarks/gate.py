"""Correctness before speed: every token that a contender gives must be the one that transformers gives.

The reference is the merged model: the base with the adapter merged into it by PEFT. Tokens are checked by one forward
pass over prompt and answer: if each is the best after those before it, the answer is the greedy one, by induction. This
is stricter than comparing two generations, since nothing is excused after a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from benchmarks.measurement import Answer, Run
from examples.peft_oracle import TIE_MARGIN, GreedyAnswer, compare

BATCH = 8  # answers in one reference pass


class GateRedError(Exception):
    """A contender's tokens are wrong: no time may be reported."""


@dataclass(slots=True)
class Gate:
    """`reference(adapter)` is the merged model. What was checked once is remembered, so rounds cost nothing."""

    reference: Callable[[str], PreTrainedModel]
    same_as: dict[str, str] = field(default_factory=dict)  # adapters that must answer like another one
    num_checked: int = 0
    num_ties: int = 0
    max_logit_gap: float = 0.0  # the largest that was excused as a tie
    _expected: dict[tuple[str, tuple[int, ...]], list[GreedyAnswer]] = field(default_factory=dict)

    def check(self, run: Run) -> None:
        """Raise `GateRedError` unless every token of every answer is right."""
        by_adapter: dict[str, list[Answer]] = {}
        for answer in run.answers:
            if len(answer.tokens) != answer.request.max_tokens:
                raise GateRedError(f"{_name(answer)} gave {len(answer.tokens)} of {answer.request.max_tokens} tokens")
            if not self._is_known(answer):
                by_adapter.setdefault(self._oracle(answer), []).append(answer)
        for adapter, answers in by_adapter.items():
            model = self.reference(adapter)
            for i in range(0, len(answers), BATCH):
                self._check_against(model, answers[i : i + BATCH])

    def _check_against(self, model: PreTrainedModel, answers: Sequence[Answer]) -> None:
        by_shape: dict[tuple[int, int], list[Answer]] = {}
        for answer in answers:
            by_shape.setdefault((len(answer.request.prompt), len(answer.tokens)), []).append(answer)
        for group in by_shape.values():
            for answer, expected in zip(group, expected_along(model, group), strict=True):
                self._check_one(answer, expected)

    def _check_one(self, answer: Answer, expected: Expected) -> None:
        for position, gap in enumerate(expected.gaps):
            if gap > TIE_MARGIN:
                raise GateRedError(
                    f"{_name(answer)}: token {position} is {answer.tokens[position]}, whose logit is {gap:.4f} below "
                    f"that of transformers' {expected.greedy.token_ids[position]}"
                )
            self.num_ties += gap > 0
            self.max_logit_gap = max(self.max_logit_gap, gap)
        self.num_checked += 1
        self._expected.setdefault(self._key(answer), []).append(expected.greedy)

    def _is_known(self, answer: Answer) -> bool:
        """Whether these very tokens were checked before. Others than those get a pass of their own."""
        known = self._expected.get(self._key(answer), [])
        return any(compare(answer.tokens, expected).first_difference is None for expected in known)

    def _oracle(self, answer: Answer) -> str:
        return self.same_as.get(answer.request.adapter, answer.request.adapter)

    def _key(self, answer: Answer) -> tuple[str, tuple[int, ...]]:
        return self._oracle(answer), answer.request.prompt


@dataclass(frozen=True, slots=True)
class Expected:
    """The best tokens along an answer, and how far below the best the answer's own are."""

    greedy: GreedyAnswer
    gaps: tuple[float, ...]


@torch.inference_mode()
def expected_along(model: PreTrainedModel, answers: Sequence[Answer]) -> list[Expected]:
    """What `model` would say after each prefix of the answers. Prompts are equally long, and so are answers."""
    ids = torch.tensor([[*answer.request.prompt, *answer.tokens[:-1]] for answer in answers])
    num_tokens = len(answers[0].tokens)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_tokens).logits.float()  # [answers, tokens, vocab]
    best = logits.topk(2)
    chosen = logits.gather(2, torch.tensor([answer.tokens for answer in answers])[..., None])[..., 0]
    return [
        Expected(
            GreedyAnswer(
                tuple(best.indices[i, :, 0].tolist()), tuple((best.values[i, :, 0] - best.values[i, :, 1]).tolist())
            ),
            tuple((best.values[i, :, 0] - chosen[i]).tolist()),
        )
        for i in range(len(answers))
    ]


def _name(answer: Answer) -> str:
    return f"an answer of {answer.request.adapter or 'the base model'}"
