"""SHA-256 of many stretches is hashlib's, with OpenSSL's function at hand or without."""

from __future__ import annotations

import hashlib
import hmac
import math
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_kernels.cpu import digests
from gralora_kernels.cpu.digests import find_sha256, sha256_of_each
from gralora_kernels.packing import hash_each

SIZES = st.integers(0, 300) | st.sampled_from([4095, 4096, 70_000])


@pytest.mark.parametrize("way", [sha256_of_each, hash_each])
@settings(deadline=None)
@given(sizes=st.lists(SIZES, max_size=6), gap=st.integers(0, 3))
def test_each_stretch_has_the_digest_of_its_bytes(way, sizes: list[int], gap: int) -> None:
    ends = np.cumsum([size + gap for size in sizes], dtype=np.int64)
    spans = np.stack([ends - sizes, ends], axis=1) if sizes else np.zeros((0, 2), np.int64)
    data = np.random.default_rng(sum(sizes)).integers(0, 256, int(ends.max(initial=0)), np.uint8)

    found = way(data, spans)

    assert [digest.tobytes() for digest in found] == [
        hashlib.sha256(data[begin:end].tobytes()).digest() for begin, end in spans
    ]


def test_threads_do_not_disturb_one_another() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    spans = np.array([(begin, begin + 4096) for begin in range(0, len(data), 4096)])
    expected = hash_each(data, spans)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: sha256_of_each(data, spans), range(16)))

    assert all(np.array_equal(expected, one) for one in found)


@pytest.mark.parametrize("span", [(-1, 3), (0, 11), (5, 4)])
def test_a_stretch_outside_of_its_memory_is_refused(span: tuple[int, int]) -> None:
    if not find_sha256():
        pytest.skip("hashlib checks what it is given")
    with pytest.raises(AssertionError):
        sha256_of_each(np.zeros(10, np.uint8), np.array([span]))


def test_without_openssl_hashlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, spans = np.arange(100, dtype=np.uint8), np.array([(0, 40), (40, 100)])
    expected = hash_each(data, spans)
    monkeypatch.setattr(digests, "_SHA256", 0)

    assert np.array_equal(expected, sha256_of_each(data, spans))


@pytest.mark.parametrize("module", [types.ModuleType("built_in"), math, hmac], ids=lambda module: module.__name__)
def test_a_hashlib_that_is_built_otherwise_has_no_such_function(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked into the interpreter, or a library without it, or no library at all."""
    monkeypatch.setitem(sys.modules, hashlib.sha256.__module__, module)

    assert find_sha256() == 0
