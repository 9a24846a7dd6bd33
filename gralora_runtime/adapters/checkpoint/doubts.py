"""What is odd about an adapter that can be served all the same, in sentences for a person. Knows no file and no model.

About weights: 0.7 to 1.6 ms per MB of float32 on one core (r of 8 to 64, k of 1 to 8), once to twice what hashing them
takes. Torch does it, on as many threads as it has where it is called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from gralora_runtime.adapters.checkpoint.update import Update, rough_norm

FAR_OUTSIDE = 10.0  # times its weight's norm; what training gives is a hundredth of it, or a tenth
SHOWN = 3  # modules in a sentence
_COMMIT = re.compile("[0-9a-f]{40}")
CHANGES_NOTHING = "it changes nothing: in every module A, B or the scale is zero, as B is before any training"


def about_names(trained_for: str, served_model: str) -> list[str]:
    """`trained_for`: the base model that the config names. A name that is not known, "", raises no doubts.

    Only its end counts: that of a path, or of a repository's name behind its owner. In the Hub's cache a model's
    directory is called by a commit, which is no name either.
    """
    ours, theirs = (name.rstrip("/").rpartition("/")[2].casefold() for name in (served_model, trained_for))
    if ours in ("", theirs) or not theirs or _COMMIT.fullmatch(ours) or _COMMIT.fullmatch(theirs):
        return []
    return [f"its config names the base model {trained_for!r}, and this one is called {served_model!r}"]


def about_weights(
    updates: Mapping[str, Update], base_norms: Mapping[str, float], *, brings_more: bool = False
) -> list[str]:
    """`base_norms`: Frobenius norms of the weights that updates are added to; modules without one raise no doubts.
    `brings_more`: than updates."""
    if not brings_more and not any(map(_changes_something, updates.values())):
        return [CHANGES_NOTHING]
    return _about_sizes(updates, base_norms)


def beyond(bounds: Mapping[str, float], base_norms: Mapping[str, float]) -> frozenset[str]:
    """Modules whose update may be as large as `about_weights` tells of, if nothing but a bound of its norm is known."""
    return frozenset(
        module for module in bounds.keys() & base_norms.keys() if bounds[module] > FAR_OUTSIDE * base_norms[module]
    )


def _changes_something(update: Update) -> bool:
    return any(pair.scale != 0 and bool(pair.b.any()) and bool(pair.a.any()) for pair in update)


def _about_sizes(updates: Mapping[str, Update], base_norms: Mapping[str, float]) -> list[str]:
    ratios = {module: _times(updates[module], base_norms[module]) for module in updates.keys() & base_norms.keys()}
    far = sorted((-ratio, module) for module, ratio in ratios.items() if ratio > FAR_OUTSIDE)
    if not far:
        return []
    largest = ", ".join(f"{module} ({-ratio:.3g} times)" for ratio, module in far[:SHOWN])
    more = f", and {len(far) - SHOWN} more" if len(far) > SHOWN else ""
    where = f"in {len(far)} of {len(ratios)} modules"
    return [f"{where} it adds more than {FAR_OUTSIDE:g} times the weight's own norm: {largest}{more}"]


def _times(update: Update, base_norm: float) -> float:
    """How many times the weight's norm the update's is; infinite if float32 does not hold that, or the weight is 0."""
    size = rough_norm(update)
    if size == 0:
        return 0.0
    return size / base_norm if math.isfinite(size) and base_norm > 0 else math.inf
