"""What is drawn has the distribution that was asked for, and the same seed draws the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.arrivals import Arrivals, Bursts, Closed, Renewal, Steps, parse_arrivals, peak
from gralora_server.loadtest.trace import Trace
from gralora_server.loadtest.workload import Popularity, Workload, parse_lengths, parse_popularity

DURATION_S = 500.0


def times(arrivals: Arrivals, seed: int = 1) -> np.ndarray:
    return arrivals.times_s(np.random.default_rng(seed), DURATION_S)


def kolmogorov_smirnov(values: Sequence[float], distribution: Callable[[float], float]) -> float:
    """The largest distance of the empirical distribution from the given one, times the root of the count."""
    expected = np.array([distribution(value) for value in sorted(values)])
    count = len(expected)
    above = np.arange(1, count + 1) / count - expected
    below = expected - np.arange(count) / count
    return float(max(above.max(), below.max()) * math.sqrt(count))


def gamma(shape: float, value: float) -> float:
    """The distribution function."""
    return float(torch.special.gammainc(torch.tensor(shape).double(), torch.tensor(value).double()))


CRITICAL = 1.628  # of Kolmogorov's distribution at 1 %


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.8, 4.0, 50.0])
def test_poisson_arrivals_have_exponential_gaps(rate: float, seed: int) -> None:
    gaps = np.diff(times(Renewal(rate), seed), prepend=0.0)

    assert kolmogorov_smirnov(gaps, lambda gap: 1 - math.exp(-rate * gap)) < CRITICAL
    assert len(gaps) == pytest.approx(rate * DURATION_S, abs=4 * math.sqrt(rate * DURATION_S))


@pytest.mark.parametrize("cv", [0.5, 2.5])
def test_gamma_arrivals_have_gamma_gaps(cv: float) -> None:
    rate, shape = 8.0, cv**-2
    gaps = np.diff(times(Renewal(rate, cv)), prepend=0.0)

    assert kolmogorov_smirnov(gaps, lambda gap: gamma(shape, gap * rate * shape)) < CRITICAL
    assert kolmogorov_smirnov(gaps, lambda gap: 1 - math.exp(-rate * gap)) > CRITICAL  # the test can fail


def test_constant_arrivals_are_a_metronome() -> None:
    assert np.diff(times(Renewal(4.0, cv=0.0))) == pytest.approx(0.25)


def test_bursts_come_together_at_the_rate() -> None:
    found = Counter(times(Bursts(rate_per_s=4.0, size=8)).tolist())

    assert set(found.values()) == {8}
    assert np.diff(sorted(found)) == pytest.approx(2.0)


STEPS = Steps(((2.0, 100.0), (0.0, 50.0), (40.0, 50.0), (2.0, 10.0)))


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_a_poisson_process_of_each_rate_in_turn(seed: int) -> None:
    """Time that runs as fast as requests are expected makes one Poisson process of it."""
    found = times(STEPS, seed)

    starts, rates = [0.0, 100.0, 150.0, 200.0, DURATION_S], [2.0, 0.0, 40.0, 2.0]
    counts = np.histogram(found, starts)[0]
    expected = np.diff(starts) * rates
    assert counts[1] == 0
    assert counts == pytest.approx(expected, abs=4 * math.sqrt(expected.max()))
    gaps = np.diff(np.interp(found, starts, np.concatenate(([0.0], np.cumsum(expected)))), prepend=0.0)
    assert kolmogorov_smirnov(gaps, lambda gap: 1 - math.exp(-gap)) < CRITICAL
    assert kolmogorov_smirnov(np.diff(found), lambda gap: 1 - math.exp(-gap * len(found) / DURATION_S)) > CRITICAL


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        (["step:1,20,10,20,1,20"], (20.0, 40.0)),
        (["step:1,20,10,20,1,5,0.5,5"], (20.0, 40.0)),
        (["step:1,5,10,5,10,5,2,5"], (5.0, 15.0)),
        (["step:0,10,5,10,0,10", "step:1,15,5,10,1,10", "poisson:100"], (15.0, 20.0)),
        (["step:1,20,10,70,1,20"], None),  # it ends after the run does
        (["step:10,20,1,20"], None),
        (["step:1,20"], None),
        (["poisson:4", "closed:8"], None),
    ],
)
def test_the_peak_is_where_most_comes(arrivals: list[str], expected: tuple[float, float] | None) -> None:
    assert peak([parse_arrivals(one) for one in arrivals], 60.0) == expected


@pytest.mark.parametrize("arrivals", [Renewal(8.0), Renewal(8.0, 2.0), Bursts(8.0, 4), STEPS])
def test_a_share_of_arrivals_is_of_the_same_kind(arrivals: Arrivals) -> None:
    share = arrivals.scaled(0.25)

    assert type(share) is type(arrivals)
    assert len(times(share)) == pytest.approx(len(times(arrivals)) / 4, rel=0.15)


def test_a_closed_loop_has_no_shares() -> None:
    with pytest.raises(ConfigError, match="a closed loop has no rate"):
        Closed(4).scaled(0.5)


@pytest.mark.parametrize(
    ("popularity", "expected"),
    [
        (Popularity("uniform"), [1 / 4] * 4),
        (Popularity("zipf", alpha=1.0), [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        (Popularity("hot-set", hot=1, share=0.7), [0.7, 0.1, 0.1, 0.1]),
        (Popularity("hot-set", hot=9, share=0.7), [1 / 4] * 4),
        (Popularity("identical"), [1, 0, 0, 0]),
    ],
)
def test_popularity(popularity: Popularity, expected: list[float]) -> None:
    assert popularity.weights(4) == pytest.approx(expected)


def workload(**changes) -> Workload:
    settings = {
        "arrivals": Renewal(20.0),
        "adapters": ["a", "b", "c"],
        "popularity": Popularity("zipf"),
        "prompt": parse_lengths("16-128"),
        "output": parse_lengths("lognormal:64,0.5,256"),
        "duration_s": 100.0,
        "warmup_s": 10.0,
        "seed": 3,
    }
    return Workload(**(settings | changes))


def test_a_trace_has_the_lengths_and_adapters_that_were_asked_for() -> None:
    requests = workload().trace().requests

    prompts, outputs = [one.prompt_tokens for one in requests], [one.output_tokens for one in requests]
    shares = Counter(one.adapter for one in requests)
    assert (min(prompts), max(prompts)) == (16, 128)
    assert np.mean(prompts) == pytest.approx(72, rel=0.05)
    assert np.median(outputs) == pytest.approx(64, rel=0.05)
    assert np.std(np.log(outputs)) == pytest.approx(0.5, rel=0.1)
    assert max(outputs) <= 256
    assert shares["a"] / len(requests) == pytest.approx(6 / 11, rel=0.1)


def test_the_seed_decides_and_distributions_do_not_disturb_each_other() -> None:
    first, other = workload().trace(), workload(seed=4).trace()
    shorter = workload(prompt=parse_lengths("8")).trace()

    assert workload().trace() == first
    assert other.requests != first.requests
    assert [(one.arrival_s, one.adapter, one.output_tokens) for one in shorter.requests] == [
        (one.arrival_s, one.adapter, one.output_tokens) for one in first.requests
    ]


def test_a_closed_loop_has_more_requests_than_can_be_answered() -> None:
    trace = workload(arrivals=Closed(4), duration_s=10, warmup_s=1).trace()

    assert trace.concurrency == 4
    assert len(trace.requests) == 2004
    assert {one.arrival_s for one in trace.requests} == {0.0}


def test_without_adapters_the_base_model_is_asked() -> None:
    assert {one.adapter for one in workload(adapters=[]).trace().requests} == {""}


def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request would be counted"):
        workload(warmup_s=100.0).trace()


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_arrivals, "poisson"),
        (parse_arrivals, "poisson:0"),
        (parse_arrivals, "poisson:nan"),
        (parse_arrivals, "gamma:4"),
        (parse_arrivals, "burst:4,0"),
        (parse_arrivals, "often:4"),
        (parse_arrivals, "step:"),
        (parse_arrivals, "step:4"),
        (parse_arrivals, "step:4,10,2"),
        (parse_arrivals, "step:4,0"),
        (parse_arrivals, "step:0,10"),
        (parse_arrivals, "step:-1,10,2,10"),
        (parse_popularity, "zipf"),
        (parse_popularity, "hot-set:1,1.5"),
        (parse_lengths, "0"),
        (parse_lengths, "9-3"),
        (parse_lengths, "lognormal:64"),
        (parse_lengths, "many"),
    ],
)
def test_what_is_not_understood_is_named_with_examples(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood \(examples: ") as caught:
        parse(text)

    assert repr(text) in str(caught.value)


def test_arrivals_are_parsed() -> None:
    assert parse_arrivals("poisson:4") == Renewal(4.0)
    assert parse_arrivals("gamma:4,2.5") == Renewal(4.0, 2.5)
    assert parse_arrivals("constant:4") == Renewal(4.0, 0.0)
    assert parse_arrivals("burst:4,8") == Bursts(4.0, 8)
    assert parse_arrivals("step:1,20,10,5.5") == Steps(((1.0, 20.0), (10.0, 5.5)))
    assert parse_arrivals("closed:16") == Closed(16)


def test_a_trace_is_read_as_it_was_written(tmp_path) -> None:
    trace = workload(arrivals=Steps(((1.0, 40.0), (9.0, 20.0), (1.0, 40.0)))).trace()
    assert trace.peak == (40.0, 60.0)

    trace.write(tmp_path / "trace.jsonl")

    assert Trace.read(tmp_path / "trace.jsonl") == trace


HEADER = '{"gralora_trace": 1, "warmup_s": 0, "duration_s": 1, "concurrency": null}\n'
LINE = '{"arrival_s": 0.5, "adapter": "a", "prompt_tokens": 8, "output_tokens": 8, "seed": 1}\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: not JSON"),
        ("[]\n", "line 1: must be an object"),
        ('{"gralora_trace": 2}\n', "no trace of version 1"),
        (HEADER, "has no requests"),
        (HEADER + LINE.replace("8", "0"), "line 2: prompt_tokens must be a number of at least 1, got 0"),
        (HEADER + LINE.replace('"a"', "null"), "line 2: adapter must be a name, got None"),
        (HEADER + LINE.replace("}", ', "tenant": 3}'), "line 2: tenant must be a name, got 3"),
        (HEADER.replace("}", ', "peak": [2, 1]}') + LINE, r"peak must be null or two times .* got \[2, 1\]"),
        (HEADER + LINE.replace("seed", "sede"), "line 2: .*sede"),
        (HEADER + LINE + LINE.replace("0.5", "0.1"), "not in the order"),
        (HEADER.replace("null", "0") + LINE, "concurrency must be null or a number of at least 1, got 0"),
        (HEADER.replace('"duration_s": 1', '"duration_s": "x"') + LINE, "duration_s must be a number"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, text: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)

    with pytest.raises(ConfigError, match=problem):
        Trace.read(path)


def test_prompts_have_no_special_tokens() -> None:
    request = workload().trace().requests[0]

    assert min(request.prompt_ids(49152)) >= 1000
    assert len(request.prompt_ids(100)) == request.prompt_tokens
    assert request.prompt_ids(49152) == request.prompt_ids(49152)
