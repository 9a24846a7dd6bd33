"""Writes `deploy/grafana/` again, after a change of `grafana_panels.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent.parent / "deploy" / "grafana"
WIDTH = 24  # of a dashboard, in Grafana's columns
SERIES = re.compile(r"\b((?:gralora_|process_|vllm:)\w+)(\{)?")
CHOSEN = 'instance=~"$instance"'


def of_chosen(expression: str) -> str:
    """The same of the chosen servers' series alone."""
    return SERIES.sub(lambda found: f"{found[1]}{{{CHOSEN}" + (", " if found[2] else "}"), expression)


def document(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana 10 and later import it."""
    return {
        "uid": f"gralora-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["gralora"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "GraLoRA", "tags": ["gralora"], "keepTime": True}],
        "templating": {"list": [_datasource(), _instance()]},
        "panels": list(_placed(dashboard.panels)),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _instance() -> dict[str, Any]:
    query = "label_values(gralora_build_info, instance)"
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "instances"},
        "definition": query,
        "refresh": 2,  # when the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed(panels: tuple[Panel, ...]) -> Iterator[dict[str, Any]]:
    """From left to right, and below one another where a row is full."""
    x = y = height = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y, height = 0, y + height, 0
        yield _panel(panel, number) | {"gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height}}
        x, height = x + panel.width, max(height, panel.height)


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    is_table = panel.kind == "table"
    targets = [
        {
            "refId": letter,
            "datasource": datasource,
            "expr": of_chosen(query.expression),
            "legendFormat": query.legend or "__auto",
            "instant": panel.kind != "timeseries",
            "exemplar": "_bucket[" in query.expression and panel.kind == "timeseries",
            "format": "table" if is_table else "time_series",
        }
        for letter, query in zip("ABCDEFGH", panel.queries, strict=False)
    ]
    found: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": datasource,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    }
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        custom = {"fillOpacity": 40 if panel.stacked else 8, "showPoints": "never", "stacking": stacking}
        found["fieldConfig"]["defaults"]["custom"] = custom
        found["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if is_table:
        found["transformations"] = [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"renameByName": panel.names, "excludeByName": {"Time": True}}},
        ]
    return found


def files() -> dict[Path, str]:
    """What there should be."""
    return {
        FOLDER / f"{dashboard.name}.json": json.dumps(document(dashboard), indent=1, ensure_ascii=False) + "\n"
        for dashboard in DASHBOARDS
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
