"""The report says what the result says, escapes what users wrote, and can be read wide, narrow, light and dark."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.report import findings, merge, write_report
from gralora_server.loadtest.report.overload_findings import overload_said
from gralora_server.loadtest.result import LoadTestResult, Refusal, RunResult
from gralora_server.loadtest.summary import Generator, Window

from .made_up import HEALTHY, comparison, four_systems, overloaded, result_of, run_of, single

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def page_of(result: LoadTestResult, folder: Path) -> str:
    return write_report(result, folder).read_text()


def words(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def test_a_single_run_is_answered_in_words_first(tmp_path: Path) -> None:
    run = run_of("server", 8)
    summary = run.summary

    page = words(page_of(result_of(run), tmp_path))

    assert f"{summary.tokens_per_s:.0f} tokens a second for 8 adapters" in page
    assert f"{summary.goodput_share:.0%} of the requests met the objective" in page
    assert f"99 % within {findings.seconds(summary.ttft_s.p99)}" in page
    assert page.index("tokens a second for 8 adapters") < page.index("Figures")
    assert "customer-07" in page
    assert "forward passes with 14.2 requests each took 95% of the steps' time" in page
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["delays.png", "phases.png", "timeline.png"]


def test_a_comparison_says_how_many_times_and_what_survives(tmp_path: Path) -> None:
    result = comparison()

    page = words(page_of(result, tmp_path))

    ours, theirs = result.runs[2].summary.tokens_per_s, result.runs[6].summary.tokens_per_s
    assert f"With 16 adapters, together gives {ours:.0f} tokens a second: {ours / theirs:.2g} times in turn" in page
    assert "together: 64; in turn: 4" in page  # 16 in turn miss the objective, 64 do not fit
    assert "in turn with 64 adapters: not run. 64 merged models need 34 GB" in page
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "memory.png",
        "steps.png",
        "throughput.png",
        "ttft-p50.png",
        "ttft.png",
    ]


def test_what_must_not_be_believed_stands_before_the_figures(tmp_path: Path) -> None:
    tired = Generator(send_lag_p99_s=0.3, wake_lag_p99_s=0.2, cpu_share=1.1, limited=True)

    page = words(page_of(result_of(run_of("server", 2, generator=tired, failed=3)), tmp_path))

    assert page.index("the load generator was the bottleneck") < page.index("Figures")
    assert "3 of 60 requests failed (3 x RESOURCE_EXHAUSTED)" in page


def test_a_healthy_run_has_no_warnings(tmp_path: Path) -> None:
    assert "Before you believe it" not in page_of(result_of(run_of("server", 2)), tmp_path)


def test_a_result_without_runs_has_a_page(tmp_path: Path) -> None:
    assert "Nothing could be run" in page_of(result_of(), tmp_path)


def test_names_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = run_of(evil, 1, label=evil, names=(evil,), failed=1)

    page = page_of(result_of(run, run_of(evil, 2)), tmp_path) + page_of(result_of(run), tmp_path)

    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    outside = [url for url in re.findall(r"(?:src|href)=\"([^\"]+)", page) if not url.startswith(("#", "data:"))]
    assert outside == []


@pytest.mark.parametrize("result", [comparison(), result_of(overloaded())], ids=["comparison", "overload"])
def test_the_page_carries_the_whole_result(result: LoadTestResult, tmp_path: Path) -> None:

    found = re.search(r"data:application/json;base64,([^\"]+)", page_of(result, tmp_path))

    assert found
    assert LoadTestResult.model_validate(json.loads(base64.b64decode(found[1]))) == result


def test_every_plot_has_its_figures_as_text(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)

    labels = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(labels) == 5
    assert all(re.search(r"\d", label) for label in labels)


def test_ids_of_the_drawings_do_not_clash(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)

    clip_paths = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clip_paths) == len(set(clip_paths)) >= 3


def test_results_of_several_runs_become_one(tmp_path: Path) -> None:
    first, second = result_of(run_of("a", 2, label="run")), result_of(run_of("b", 2, label="run"))
    second = second.model_copy(update={"machine": {"CPU": "another", "cores": "2"}})

    merged = merge([first, second])

    assert [run.summary.label for run in merged.runs] == ["run (1)", "run (2)"]
    assert merged.machine == {"CPU": "none / another", "cores": "2"}
    page = words(page_of(merged, tmp_path))
    assert page.index("The runs are not of one machine (CPU: none / another)") < page.index("Figures")
    assert [path.name for path in tmp_path.glob("*.png")] == ["throughput.png"]


def test_runs_of_one_machine_need_no_note() -> None:
    assert merge([result_of(run_of("a", 2)), result_of(run_of("b", 2))]).notes == ()


def test_what_stopped_each_system_is_said() -> None:
    assert findings.limits(four_systems()) == [
        "merged models in turn with 16 adapters: not run. 16 merged models need 34 GB.",
        "merged models in turn with 64 adapters: not run. 64 merged models need 130 GB.",
        "merged models, swapped with 16 adapters: 1 of 60 requests failed (1 x RESOURCE_EXHAUSTED).",
    ]


def test_a_system_that_could_never_run_is_named() -> None:
    result = result_of(run_of("a", 1), run_of("a", 2), refusals=(Refusal(system="b", num_adapters=2, why="no room."),))

    assert "a: 2; b: none" in findings.answer(result)[-1]
    assert findings.limits(result) == ["b with 2 adapters: not run. no room."]


def rounds(system: str, num_adapters: int, itl_s: Sequence[float]) -> list[RunResult]:
    """One run for each mean time between tokens."""
    return [
        run_of(system, num_adapters, itl_s=one, label=f"{system}, {num_adapters}, round {i}")
        for i, one in enumerate(itl_s, 1)
    ]


def test_of_several_rounds_the_median_is_said_and_the_range(tmp_path: Path) -> None:
    ours, theirs = rounds("a", 4, [0.02, 0.09, 0.04]), rounds("b", 4, [0.3, 0.1, 0.2])
    result = result_of(*rounds("a", 2, [0.02, 0.02, 0.03]), *ours, *theirs)

    slow, middle, fast = sorted(run.summary.tokens_per_s for run in ours)
    other = sorted(run.summary.tokens_per_s for run in theirs)[1]
    said = findings.answer(result)[0]
    assert said == (
        f"With 4 adapters, a gives {middle:.0f} tokens a second (median of 3, {slow:.0f} to {fast:.0f}): "
        f"{middle / other:.2g} times b ({other:.0f})."
    )
    page = words(page_of(result, tmp_path))
    assert all(run.summary.label in page for run in result.runs)  # every round has its row
    assert f"b: {other:.3g} at 4" in re.findall(r'aria-label="(Throughput[^"]+)"', page_of(result, tmp_path))[0]


def test_a_system_alone_is_said_at_each_number_of_adapters() -> None:
    result = result_of(*rounds("a", 2, [0.02, 0.02]), *rounds("a", 4, [0.04]))

    two, four = (point.median(findings.throughput) for point in findings.curve(result, "a"))
    said = findings.answer(result)[0]
    assert said.startswith(f"a gives {two:.0f} tokens a second (median of 2, ")
    assert said.endswith(f"with 2 adapters; {four:.0f} tokens a second with 4 adapters.")


def test_a_number_of_adapters_is_survived_if_every_round_of_it_is() -> None:
    fine, failing = rounds("a", 4, [0.02, 0.02])[0], run_of("a", 4, failed=3, label="a, 4, round 2")

    assert findings.answer(result_of(run_of("a", 2), fine, failing))[-1].endswith("a: 2.")
    assert findings.limits(result_of(run_of("a", 2), fine, failing)) == [
        "a with 4 adapters: 3 of 60 requests failed (3 x RESOURCE_EXHAUSTED)."
    ]


def test_memory_is_plotted_for_those_of_which_it_is_known(tmp_path: Path) -> None:
    unknown = run_of("elsewhere", 4).model_copy(update={"memory_bytes": None})

    page = words(page_of(result_of(run_of("here", 1), run_of("here", 4), unknown), tmp_path))

    assert "Memory of the server in GB over the number of adapters. here:" in page
    assert "not known" in page


def test_an_overload_is_told_in_words_figures_and_plots(tmp_path: Path) -> None:
    run = overloaded()
    assert run.overload is not None
    flood = run.overload.tenants["flood"]

    page = words(page_of(result_of(run), tmp_path))

    assert f"{run.overload.total.good_requests_per_s:.2f} requests and" in page
    assert "(first token within 2 s, then at most 200 ms a token, all of it within 10 s); of 187 requests: " in page
    assert "143 in time, 22 late, 22 refused" in page
    assert "66 tries were refused (44 x TOO_LATE, 22 x QUEUE_FULL), the first 20.50 s after the start" in page
    assert "half of the refusals came within 4.0 ms" in page
    assert "half told to come again within 2.00 s" in page
    assert "44 requests came again when they were told to; 22 were let in, 100% of them at the first retry" in page
    assert "after 1.00 times what they were told (median; quartiles 1.00 and 1.00)" in page
    assert "165 of all requests were in time" in page
    assert "Normal again 2 s after the overload from 20 s to 40 s" in page
    assert f"by their weights is {run.overload.jain:.2f}" in page
    assert "22 x QUEUE_FULL" in page[page.index("first token p50") :]
    assert f"{flood.served_per_s:.1f}" in page
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"timeline", "delays", "overload", "served", "memory", "phases"}
    assert "Resident memory in GB: 1.00 at first" in page


def test_who_is_refused_in_an_overload_is_no_warning(tmp_path: Path) -> None:
    page = page_of(result_of(overloaded()), tmp_path)

    assert "Before you believe it" not in page
    assert "none failed" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peak": None}, None),
        ({"peak": (10.0, 30.0), "window": Window(5, 40)}, "the first token was not normal again"),
        ({"peak": (2.0, 40.0)}, "there is no normal to come back to"),
    ],
)
def test_what_is_said_of_the_time_after_an_overload(changes: dict[str, object], said: str | None) -> None:
    run = overloaded(**changes)
    assert run.overload is not None

    found = [sentence for sentence in overload_said(run.overload, run.summary.slo) if "normal" in sentence.lower()]

    assert [said in sentence for sentence in found] == ([] if said is None else [True])


def test_of_several_runs_each_has_its_overload(tmp_path: Path) -> None:
    before, after = (result_of(overloaded(patience=Patience(deadline_s=deadline_s))) for deadline_s in (10.0, 3.0))

    page = words(page_of(merge([before, after]), tmp_path))

    first, second = page.index("Overload: server (1)"), page.index("Overload: server (2)")
    assert "all of it within 10 s" in page[first:second]
    assert "all of it within 3 s" in page[second:]


def test_an_overload_without_tenants_has_no_table_of_them(tmp_path: Path) -> None:
    run = overloaded()
    assert run.overload is not None
    alone = run.model_copy(update={"overload": run.overload.model_copy(update={"tenants": {}, "jain": None})})

    page = page_of(result_of(alone), tmp_path)

    assert "Jain&#39;s index" not in page
    assert "What each tenant got" not in page
    assert not (tmp_path / "served.png").exists()


@pytest.mark.parametrize("kept", sorted(RESULTS.glob("loadtest*/result.json")), ids=lambda kept: kept.parent.name)
def test_results_that_were_kept_stay_readable(kept: Path, tmp_path: Path) -> None:
    """A result must open in later releases, or `VERSION` must rise."""
    result = LoadTestResult.read(kept)

    page = page_of(result, tmp_path)

    assert all(run.summary.label in page for run in result.runs if run.server)


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from gralora_runtime.errors import ConfigError\n"
        "try:\n    import gralora_server.loadtest.report\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert "pip install 'gralora-server[loadtest]'" in done.stdout


def luminance(colour: str) -> float:
    """As WCAG defines it, of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted([luminance(first), luminance(second)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_aa_asks_for(scheme: int, tmp_path: Path) -> None:
    blocks = re.findall(r":root \{(\s*--paper.*?)\}", page_of(result_of(run_of("server", 2)), tmp_path), re.DOTALL)

    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme]))
    text = [("ink", "paper"), ("soft", "paper"), ("ink", "panel"), ("alarm", "alarm-paper"), ("series-0", "paper")]
    assert all(contrast(colour[ink], colour[paper]) >= 4.5 for ink, paper in text)
    assert all(contrast(colour[f"series-{i}"], colour["paper"]) >= 3 for i in range(5))


def test_who_failed_did_not_survive() -> None:
    assert findings.survived(run_of("x", 2))
    assert not findings.survived(run_of("x", 2, failed=1))
    assert not findings.survived(run_of("x", 2, ttft_s=9.0))
    assert HEALTHY.limited is False


CHROMIUM = shutil.which("chromium")
PAPER = {"light": (255, 255, 255), "dark": (15, 20, 26)}
FIRST_SERIES = {"light": (0, 114, 178), "dark": (86, 180, 233)}
PAGES = {"comparison": four_systems(), "single": single(), "overload": result_of(overloaded())}
# The browser's own window is never narrower than 500 pixels, so the page is shown in a frame of the wanted width.
FRAME = """<body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:5000px" srcdoc="{page}"></iframe>
<script>f.onload = () => {{
  const root = f.contentDocument.documentElement;
  document.body.dataset.widths = [root.scrollWidth, root.clientWidth].join();
}}</script></body>"""


def chromium(page: Path, scheme: str, *options: str) -> str:
    assert CHROMIUM is not None
    settings = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", settings]
    command += ["--window-size=1300,5000", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("result", PAGES.values(), ids=PAGES)
def test_the_page_in_a_browser(result: LoadTestResult, width: int, scheme: str, tmp_path: Path) -> None:
    frame, shot = tmp_path / "frame.html", tmp_path / "shot.png"
    frame.write_text(FRAME.format(width=width, page=html.escape(page_of(result, tmp_path))))

    found = re.search(r'data-widths="(\d+),(\d+)"', chromium(frame, scheme, "--dump-dom"))
    chromium(frame, scheme, f"--screenshot={shot}")

    assert found
    assert int(found[1]) == int(found[2]) == width  # nothing makes the page scroll sideways
    image = Image.open(shot).convert("RGB").crop((0, 0, width, 3000))
    colours = {colour: count for count, colour in image.getcolors(1 << 24) or []}
    assert image.getpixel((2, 2)) == PAPER[scheme]
    assert max(colours, key=lambda colour: colours[colour]) == PAPER[scheme]
    assert colours.get(FIRST_SERIES[scheme], 0) > 50  # the curves are drawn, in the colours of the theme
