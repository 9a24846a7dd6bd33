"""Buckets are upper bounds, and nothing falls between them."""

from __future__ import annotations

from gralora_runtime.observation.histogram import Histogram, Owner


def test_a_value_counts_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    read = histogram.read()

    assert read.counts == (2, 2, 1)
    assert read.count == 5
    assert read.sum == 7.5


def test_a_value_can_count_several_times() -> None:
    histogram = Histogram([1.0])
    histogram.observe(0.25, 4)

    assert histogram.read().counts == (4, 0)
    assert histogram.read().sum == 1.0


def test_what_was_read_does_not_change_afterwards() -> None:
    histogram = Histogram([1.0])
    read = histogram.read()
    histogram.observe(0.5)

    assert read.counts == (0, 0)


def test_the_difference_of_two_moments_is_what_came_between() -> None:
    histogram = Histogram([1.0, 2.0])
    histogram.observe(0.5)
    before = histogram.read()
    histogram.observe(1.5, 2)
    between = histogram.read().since(before)

    assert between.counts == (0, 2, 0)
    assert between.sum == 3.0


def test_a_quantile_lies_in_its_bucket_as_prometheus_reckons_it() -> None:
    histogram = Histogram([1.0, 2.0, 4.0])
    histogram.observe(0.5, 10)
    histogram.observe(3.0, 10)
    read = histogram.read()

    assert read.quantile(0.25) == 0.5
    assert read.quantile(0.5) == 1.0
    assert read.quantile(0.75) == 3.0
    histogram.observe(100.0, 1000)
    assert histogram.read().quantile(0.99) == 4.0
    assert Histogram([1.0]).read().quantile(0.5) is None


def test_a_bucket_remembers_whose_value_came_last_if_it_is_told() -> None:
    histogram = Histogram([1.0, 2.0])
    assert histogram.read().exemplars == ()

    for value, whose in ((0.5, Owner("a")), (0.6, Owner("b")), (9.0, Owner("c", "trace")), (1.5, None)):
        histogram.observe(value, whose=whose)
    found = histogram.read().exemplars

    assert [one and (one.whose, one.value) for one in found] == [(Owner("b"), 0.6), None, (Owner("c", "trace"), 9.0)]
