"""The HTML page, from its template, which escapes what it is given: names and errors are whatever users wrote."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from gralora_server.loadtest.report import findings
from gralora_server.loadtest.report.overload_findings import overload_said, reasons
from gralora_server.loadtest.report.plots import plots
from gralora_server.loadtest.result import LoadTestResult

TOP_ADAPTERS = 10


def write_report(result: LoadTestResult, directory: Path) -> Path:
    """Write report.html and a PNG for each plot; returns the page's path. Raises ConfigError without matplotlib.

    The directory is made if there is none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots(result)
    for plot in drawn:
        (directory / f"{plot.name}.png").write_bytes(plot.png)
    page = directory / "report.html"
    page.write_text(
        _environment()
        .get_template("report.html.jinja")
        .render(
            rows=[(findings.row_name(result, run), run) for run in result.runs],
            result=result,
            comparison=findings.is_comparison(result),
            answer=findings.answer(result),
            limits=findings.limits(result),
            warnings=findings.warnings(result),
            plots=drawn,
            predictions=[(run, found) for run in result.runs if (found := findings.comparisons(run))],
            overloads=[(run, overload_said(run.overload, run.summary.slo)) for run in result.runs if run.overload],
            stories=[(run.summary.label, findings.explanation(run.server)) for run in result.runs if run.server],
            top_adapters=TOP_ADAPTERS,
            json_base64=base64.b64encode(result.model_dump_json(indent=1).encode()).decode(),
        )
    )
    return page


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gralora_server.loadtest.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = findings.seconds
    environment.filters["reasons"] = reasons
    environment.tests["survived"] = findings.survived
    return environment
