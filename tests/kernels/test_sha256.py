"""SHA-256 of many stretches is hashlib's, on a processor with instructions for it and without."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_kernels.cpu import sha256
from gralora_kernels.cpu.sha256 import has_instructions, sha256_of_each
from gralora_kernels.packing import hash_each

SIZES = st.integers(0, 300) | st.sampled_from([4095, 4096, 70_000])


def spans_of(sizes: list[int], gap: int = 0) -> np.ndarray:
    ends = np.cumsum([size + gap for size in sizes], dtype=np.int64)
    return np.stack([ends - sizes, ends], axis=1) if sizes else np.zeros((0, 2), np.int64)


def expected_digests(data: np.ndarray, spans: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(data[begin:end].tobytes()).digest() for begin, end in spans]


@pytest.mark.parametrize("way", [sha256_of_each, hash_each])
@settings(deadline=None, max_examples=300)
@given(sizes=st.lists(SIZES, max_size=7), gap=st.integers(0, 3))
def test_each_stretch_has_the_digest_of_its_bytes(way, sizes: list[int], gap: int) -> None:
    spans = spans_of(sizes, gap)
    data = np.random.default_rng(sum(sizes)).integers(0, 256, int(spans.max(initial=0)), np.uint8)

    assert [digest.tobytes() for digest in way(data, spans)] == expected_digests(data, spans)


@pytest.mark.parametrize("beside", [0, 64, 1000])
def test_every_length_up_to_several_blocks_is_padded_right(beside: int) -> None:
    """Alone, and in the second lane beside one that begins or ends at another time."""
    spans = spans_of([size for length in range(260) for size in (beside, length)])
    data = np.random.default_rng(0).integers(0, 256, int(spans.max()), np.uint8)

    assert [digest.tobytes() for digest in sha256_of_each(data, spans)] == expected_digests(data, spans)


def test_what_the_standard_says_of_abc() -> None:
    (digest,) = sha256_of_each(np.frombuffer(b"abc", np.uint8), np.array([(0, 3)]))

    assert digest.tobytes().hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_threads_do_not_disturb_one_another() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    spans = spans_of([4096] * 256)
    expected = hash_each(data, spans)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: sha256_of_each(data, spans), range(16)))

    assert all(np.array_equal(expected, one) for one in found)


@pytest.mark.skipif(not has_instructions(), reason="hashlib checks what it is given")
@pytest.mark.parametrize("span", [(-1, 3), (0, 11), (5, 4)])
def test_a_stretch_outside_of_its_memory_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        sha256_of_each(np.zeros(10, np.uint8), np.array([span]))


def test_without_instructions_hashlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, spans = np.arange(100, dtype=np.uint8), spans_of([40, 60])
    monkeypatch.setattr(sha256, "_HAS_INSTRUCTIONS", False)
    monkeypatch.setattr(sha256, "hash_stretches", None)

    assert [digest.tobytes() for digest in sha256_of_each(data, spans)] == expected_digests(data, spans)


@pytest.mark.parametrize(
    ("features", "told", "expected"),
    [({"sha": True}, None, True), ({"sha": True}, "generic", False), ({"sha": False}, None, False), ({}, None, False)],
)
def test_instructions_are_used_where_numba_compiles_for_a_processor_that_has_them(
    features: dict[str, bool], told: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(numba.config, "CPU_NAME", told)

    assert has_instructions() is expected
