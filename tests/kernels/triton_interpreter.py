"""Run by test_triton.py in a process of its own, under TRITON_INTERPRET=1: prints what it found as JSON."""

from __future__ import annotations

import json

import torch
from support.kernel_cases import CPU, MIXED, make_case, token_slots

from benchmarks import gpu
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.replay import ReplayError

# Memory that nobody has written is NaN (in every dtype all bits set are one), and no item of any list.
empty = torch.empty
torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).view(torch.uint8).fill_(255).view(kwargs["dtype"])

backend = resolve_backend("triton", CPU)
errors: dict[str, float] = {}
widths = [(576, [192]), (72 * 8, [1536]), (192, [72 * 8]), (48, [40])]
widths += [(576, [576, 192, 192]), (64, [24, 8, 8]), (40, [72, 72])]
for in_features, outs in widths:
    case = make_case(in_features, outs, MIXED)
    for num_tokens in (1, 7, 31) if sum(outs) > 576 else (1, 7, 31, 97):
        slots = token_slots(num_tokens, len(MIXED), seed=num_tokens)
        slots[0] = 3
        errors[f"mixed {in_features}->{outs}, {num_tokens} tokens"] = case.error(backend, slots)
for r, k in ((1, 1), (2, 2), (3, 1), (8, 4), (12, 4), (64, 8)):
    case = make_case(576, 144, [[(r, k)], [(r, k), (5, 1)]])
    errors[f"r={r}, k={k}"] = case.error(backend, [0, -1, 1, 0, 0, 1, 1])
errors["33 adapters"] = make_case(192, 64, [MIXED[i % 7] for i in range(33)]).error(backend, list(range(33)))
errors["one tile and a half"] = make_case(64, 64, [[(4, 2)]]).error(backend, [0] * 48)
errors["hybrid of two ks"] = make_case(96, [48, 96], [[(4, 2), (6, 3)]]).error(backend, [0] * 3)

case = make_case(192, [192, 64], MIXED)
slots = token_slots(31, len(MIXED))
x, y, grouping = case.step(slots)
# MIXED has one empty layout: slot 7 has no adapter in the first module, slot 6 none in the second.
together = case.apply(backend, x, y, grouping)
base = [t for t, slot in enumerate(slots) if slot == -1]
first, second = ([t for t, slot in enumerate(slots) if slot == bare] for bare in (7, 6))
untouched = (
    torch.equal(y[base], together[base])
    and torch.equal(y[first, :192], together[first, :192])
    and torch.equal(y[second, 192:], together[second, 192:])
)
alone = [case.apply(backend, x[t : t + 1], y[t : t + 1], case.grouping([slots[t]]))[0] for t in range(31)]
grouping.fill([-1] * 31, {-1: 0})
untouched_alone = torch.equal(y, case.apply(backend, x, y, grouping))


def replayed() -> tuple[bool, str]:
    """Steps through an instance frozen at a larger one, as a CUDA graph replays them; and one that is too large."""
    frozen = resolve_backend("triton", CPU)
    frozen.prepare([case.group], case.grouping([0, 1, 2, 3, 4, 5, 6, 7]))
    frozen.freeze()
    right = True
    for step_slots in ([3, 4, 4, 0, 2, -1], [-1, -1], [4, 3]):
        sx, sy, step = case.step(step_slots)
        right &= torch.equal(case.apply(backend, sx, sy, step), case.apply(frozen, sx, sy, step))
    try:
        frozen.prepare([case.group], case.grouping([4] * 9))
    except ReplayError as error:
        return right, str(error)
    return right, "no error"


gpu.check(
    gpu.build_case([(96, [64, 32]), (64, [96])], [1, 40, 3], r=8, k=2, device=CPU, dtype=torch.float32), backend, 2
)

print(
    json.dumps(
        {
            "errors": errors,
            "base_untouched": untouched and untouched_alone and min(map(len, (base, first, second))) > 0,
            "batch_invariant": all(torch.equal(row, together[t]) for t, row in enumerate(alone)),
            "replayed": replayed(),
            "benchmark_gate": "passed",  # it raises otherwise
        }
    )
)
