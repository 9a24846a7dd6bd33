"""Run by test_triton.py in a process of its own, under TRITON_INTERPRET=1: prints the error of each case as JSON."""

from __future__ import annotations

import json

import torch
from support.kernel_cases import CPU, MIXED, make_case, token_slots

from gralora_kernels.dispatch import resolve_backend

backend = resolve_backend("triton", CPU)
errors: dict[str, float] = {}
for in_features, out_features in ((576, 192), (72 * 8, 1536), (192, 72 * 8), (48, 40)):
    case = make_case(in_features, out_features, MIXED)
    for num_tokens in (1, 7, 31, 97):
        slots = token_slots(num_tokens, len(MIXED), seed=num_tokens)
        slots[0] = 3
        errors[f"mixed {in_features}->{out_features}, {num_tokens} tokens"] = case.error(backend, slots)
for r, k in ((1, 1), (2, 2), (3, 1), (8, 4), (12, 4), (64, 8)):
    case = make_case(576, 144, [[(r, k)], [(r, k), (5, 1)]])
    errors[f"r={r}, k={k}"] = case.error(backend, [0, -1, 1, 0, 0, 1, 1])
errors["33 adapters"] = make_case(192, 64, [MIXED[i % 7] for i in range(33)]).error(backend, list(range(33)))
errors["one tile and a half"] = make_case(64, 64, [[(4, 2)]]).error(backend, [0] * 48)

case = make_case(192, 192, MIXED)
slots = token_slots(31, len(MIXED))
x, y, grouping = case.step(slots)
base = [t for t, slot in enumerate(slots) if slot in (-1, 7)]
untouched = torch.equal(y[base], case.apply(backend, x, y, grouping)[base])
grouping.fill([-1] * 31, {-1: 0})
untouched_alone = torch.equal(y, case.apply(backend, x, y, grouping))
print(json.dumps({"errors": errors, "base_untouched": untouched and untouched_alone and len(base) > 1}))
