"""Facts and rates, on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks import machine


def test_facts_name_versions_and_commit_but_no_path_and_no_host():
    facts = machine.facts()

    assert {"torch", "transformers", "peft", "numba"} <= facts["versions"].keys()
    assert facts["cores"] >= 1
    assert str(Path.home()) not in json.dumps(facts)


def test_rates_are_measured_by_every_method():
    rates = machine.measure_rates(1 << 20, {"small": (16, 32, 8)})

    assert set(rates.read_bytes_per_s) == {"torch sum", "Numba sum"}
    assert set(rates.gemm_flop_per_s) == {"small"}
    assert min(*rates.read_bytes_per_s.values(), *rates.gemm_flop_per_s.values()) > 0


def test_the_numba_sum_reads_every_chunk():
    """A loop that skipped some would report a bandwidth that the machine does not have."""
    values = np.ones(3 * machine.CHUNK, np.float32)
    values[:: machine.CHUNK] = 5

    assert machine.chunked_sum(values) == 3 * (machine.CHUNK + 4)


def test_the_best_rate_is_taken_method_by_method():
    first = machine.Rates(read_bytes_per_s={"a": 1.0, "b": 5.0}, gemm_flop_per_s={"g": 2.0})
    second = machine.Rates(read_bytes_per_s={"a": 3.0, "b": 4.0}, gemm_flop_per_s={"g": 1.0})

    best = machine.best_of(first, second)

    assert best == machine.Rates(read_bytes_per_s={"a": 3.0, "b": 5.0}, gemm_flop_per_s={"g": 2.0})
