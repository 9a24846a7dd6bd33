"""Chooses the next token of each row of a step where its logits are. The host sends rules, and reads results later.

What a request is sampled by lies in a row of its seat: it is written when the request takes the seat, and from then on
only its place in the random stream changes. With penalties a seat also has a history on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gralora_kernels.philox import uniforms
from gralora_kernels.sampling_rules import RULE, Masks, Rules, SamplingRules, rule
from gralora_kernels.triton_ops.memory import staged
from gralora_kernels.triton_ops.sampling_launch import MASK_BITS, RowSampler
from gralora_kernels.triton_ops.sampling_launch import Sampled as OnDevice
from gralora_runtime.request import TokenLogprob
from gralora_runtime.sampling.host import advance
from gralora_runtime.sampling.outcome import Sampled, SampledToken
from gralora_runtime.sampling.state import SamplerState

NO_MASKS: Masks = np.empty((0, 0), np.int32)
RESULTS = 3  # of each row, of 4 bytes: token, peak, best


class Results:
    """What a step chose, on its way to the host."""

    def __init__(self, states: Sequence[SamplerState], found: OnDevice) -> None:
        self._states = states
        self._read: list[Sampled] | None = None
        rows = len(states)
        self._any_report = any(state.num_top is not None for state in states)
        wanted: list[Tensor] = [found.tokens, found.peaks, found.bests]
        if self._any_report:
            wanted += [found.logprobs, found.top_ids, found.top_logprobs]
        self._values = [_to_host(tensor[:rows]) for tensor in wanted]
        self._arrived = None
        if found.tokens.device.type == "cuda":
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a thread that waits takes no core
            self._arrived.record()

    def read(self) -> list[Sampled]:
        """Waits for the step, the first time. Each state then knows its token."""
        if self._read is None:
            self._read = self._wait()
        return self._read

    def _wait(self) -> list[Sampled]:
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, peaks, bests = (value.numpy() for value in self._values[:RESULTS])
        results: list[Sampled] = [SampledToken(token) for token in tokens.tolist()]
        if self._any_report:
            self._report(results)
        for row in np.flatnonzero(~(np.isfinite(peaks) & np.isfinite(bests))).tolist():
            results[row] = self._states[row].failure(float(peaks[row]), float(bests[row]))
        return advance(self._states, results)

    def _report(self, results: list[Sampled]) -> None:
        logprobs, top_ids, top_logprobs = (value.tolist() for value in self._values[RESULTS:])
        for row, state in enumerate(self._states):
            result = results[row]
            if state.num_top is not None and isinstance(result, SampledToken):
                count = min(state.num_top, state.vocab_size)
                top = tuple(zip(top_ids[row][:count], top_logprobs[row][:count], strict=True))
                results[row] = SampledToken(result.token_id, TokenLogprob(result.token_id, logprobs[row], top))


class DeviceSampler:
    """For steps of at most `max_rows` rows. Calls belong on the stream of the steps."""

    def __init__(self, *, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._device = device
        self._rows = RowSampler(vocab_size, max_rows, device)
        self._rows.reserve()
        self._shape = max_rows, vocab_size
        self._history: Tensor | None = None  # int32 [seats, vocab], from the first request with penalties on
        # By seat:
        self._states: list[SamplerState | None] = [None] * max_rows
        self._rules = np.zeros(max_rows, RULE)
        self._keys = np.zeros(max_rows, np.uint64)
        self._positions = np.zeros(max_rows, np.uint64)
        self._first_unbanned = np.zeros(max_rows, np.uint64)
        self._has_biases = np.zeros(max_rows, np.bool_)

    @property
    def tokens(self) -> Tensor:
        """int32 [max_rows], on the device: what the rows of the last step chose."""
        return self._rows.sampled.tokens

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel, so that no request waits for it."""
        logits = torch.zeros(1, self._shape[1], dtype=dtype, device=self._device)
        history = torch.zeros(1, self._shape[1], dtype=torch.int32, device=self._device)
        everything = rule(temperature=1.0, top_k=5, repetition_penalty=1.1, num_top=1)
        everything["history_slot"] = 0
        self._rows.sample(logits, SamplingRules(rule()))
        self._rows.sample(logits, SamplingRules(everything), history)

    def sample(self, logits: Tensor, states: Sequence[SamplerState], seats: Sequence[int]) -> Results:
        """Row i of `logits` [rows, vocab] by `states[i]`, which has `seats[i]` to itself. Masks are filled by now.

        If it fails, all of them take their seats anew: what is kept of them here may be a token ahead.
        """
        try:
            return self._sample(logits, states, seats)
        except BaseException:
            self.forget(seats)
            raise

    def forget(self, seats: Sequence[int]) -> None:
        """Whoever has one of them takes it anew."""
        for seat in seats:
            self._states[seat] = None

    def _sample(self, logits: Tensor, states: Sequence[SamplerState], seats: Sequence[int]) -> Results:
        for state, seat in zip(states, seats, strict=True):
            if self._states[seat] is not state:
                self._take_seat(state, seat)
        at = np.array(seats, np.intp)
        rules, positions = self._rules[at], self._positions[at]
        if (rules["temperature"] > 0).any():
            rules["uniform"] = uniforms(self._keys[at], positions)
        self._positions[at] += np.uint64(1)
        history = self._history if (rules["history_slot"] >= 0).any() else None
        masks = self._set_masks(rules, states)
        found = self._rows.sample(logits, self._with_biases(rules, masks, at, positions), history)
        return Results(states, found)

    def _take_seat(self, state: SamplerState, seat: int) -> None:
        params = state.params
        self._states[seat] = state
        self._keys[seat], self._positions[seat] = state.random_key, state.position
        self._first_unbanned[seat], self._has_biases[seat] = state.first_unbanned, state.has_biases
        self._rules[seat] = rule(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            num_top=-1 if state.num_top is None else state.num_top,
        )[0]
        if state.history is not None:
            if self._history is None:
                self._history = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            words = torch.from_numpy(state.history.as_words())
            row = self._history[seat]
            row[: len(words)].copy_(staged(words, self._device), non_blocking=True)
            row[len(words) :].zero_()  # of tokens that this request does not have
            self._rules[seat]["history_slot"] = seat

    def _set_masks(self, rules: Rules, states: Sequence[SamplerState]) -> Masks:
        """[masked rows, words]"""
        masks: list[Masks] = []
        for row, state in enumerate(states):
            if state.matcher is not None:
                assert state.matcher.mask is not None, "a token is chosen before its mask is filled"
                rules[row]["mask"] = len(masks)
                # What is behind the base model's tokens may not be chosen.
                behind = max(0, -(-self._shape[1] // MASK_BITS) - len(state.matcher.mask))
                masks.append(np.pad(state.matcher.mask, (0, behind)))
        return np.stack(masks) if masks else NO_MASKS

    def _with_biases(
        self, rules: Rules, masks: Masks, at: npt.NDArray[np.intp], positions: npt.NDArray[np.uint64]
    ) -> SamplingRules:
        biased = np.flatnonzero(self._has_biases[at] | (positions < self._first_unbanned[at]))
        if not len(biased):
            return SamplingRules(rules, masks=masks)
        ids, biases, first = [], [], 0
        for row in biased.tolist():
            state = self._states[at[row]]
            assert state is not None
            of_row, values = state.biases_at(int(positions[row]))
            rules[row]["first_bias"], rules[row]["num_biases"] = first, len(of_row)
            first += len(of_row)
            ids.append(of_row)
            biases.append(values.astype(np.float64))
        return SamplingRules(rules, np.concatenate(ids), np.concatenate(biases), masks)


def _to_host(tensor: Tensor) -> Tensor:
    """Without waiting for it. A copy, because the next step writes where it lies."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)
