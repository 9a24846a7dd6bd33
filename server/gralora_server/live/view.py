"""What the page shows of a server now, as JSON. Reads in the page's own thread; prompts and answers are not in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from gralora_runtime.observation.activity import RequestActivity
from gralora_runtime.observation.timeline import Stage, Timeline
from gralora_server.gate import Gate
from gralora_server.live.history import History
from gralora_server.live.rates import Rates
from gralora_server.live.roll import COLUMNS as ADAPTER_COLUMNS
from gralora_server.live.roll import AdapterRoll
from gralora_server.live.table import Asked, Row, shown
from gralora_server.ports import Engine
from gralora_server.tenants.quotas import UNLIMITED
from gralora_server.tenants.request_ids import as_asked, owner, scoped, unscoped
from gralora_server.tenants.tenancy import Tenancy
from gralora_server.tenants.usage import Usage
from gralora_server.waterfalls import to_explanation

REQUEST_COLUMNS = ("age_s", "id", "tenant", "adapter", "version", "stage", "prompt_tokens", "output_tokens", "ahead")
ENDED_COLUMNS = ("ended_at", "id", "tenant", "adapter", "outcome", "total_s", "first_token_s", "output_tokens")
TENANT_COLUMNS = (
    *("tenant", "weight", "running", "waiting", "share", "tokens_per_s"),
    *("requests", "prompt_tokens", "output_tokens", "refused"),
)
OPERATOR = "(operator)"

Json = dict[str, Any]


class View:
    """Belongs to the page's loop."""

    def __init__(self, gate: Gate, tenancy: Tenancy, usage: Usage) -> None:
        self._gate = gate
        self._tenancy = tenancy
        self._usage = usage
        self._history = History()
        self._roll = AdapterRoll()
        self._rates = Rates()

    def note(self) -> None:
        """Once a second."""
        engine = self._gate.loaded
        if engine is not None:
            self._history.note(time.time(), engine.activity())

    def explanation(self, tenant: str | None, request_id: str) -> Json | None:
        """Where the time of a recent request went; None: there is none of that id. `tenant`: whose it is; None: of
        whoever was the last to call a request so."""
        engine = self._gate.loaded
        timeline = None
        if engine is not None and tenant is not None:
            timeline = engine.timelines.find(scoped(tenant, request_id))
        elif engine is not None:
            named = (one for one in engine.timelines.recent() if unscoped(one.request_id) == request_id)
            timeline = max(named, key=lambda one: one.received_s, default=None)
        found = to_explanation(timeline, request_id, str)
        return MessageToDict(found.explanation, preserving_proto_field_name=True) if timeline is not None else None

    async def now(self, query: Mapping[str, str], after_s: float) -> Json:
        """All of it; of the history what came after a moment. Raises InvalidRequestError."""
        asked = {
            "requests": Asked.read(query, "requests", REQUEST_COLUMNS),
            "ended": Asked.read(query, "ended", ENDED_COLUMNS),
            "adapters": Asked.read(query, "adapters", ADAPTER_COLUMNS),
            "tenants": Asked.read(query, "tenants", TENANT_COLUMNS),
        }
        engine = self._gate.loaded
        found: Json = {"at_s": time.time(), "phase": self._gate.phase.name.lower(), "stuck": self._gate.stuck}
        if engine is None:
            return found
        under_way = [as_asked(one) for one in engine.under_way()]
        return found | {
            "server": _server(engine),
            "load": _load(engine),
            "phases": dict(self._history.step_phases()),
            "history": self._history.points(after_s),
            "requests": shown(_requests(under_way), asked["requests"], ("id", "tenant", "adapter")),
            "ended": shown(_ended(engine.timelines.recent()), asked["ended"], ("id", "tenant", "adapter", "outcome")),
            "adapters": shown(await self._roll.rows(engine), asked["adapters"], ("name",)),
            "tenants": self._with_limits(shown(self._tenants(under_way), asked["tenants"], ("tenant",))),
        }

    def _tenants(self, under_way: Sequence[RequestActivity]) -> list[Row]:
        """Whoever has settings, requests, or has used something since the start."""
        settings = self._tenancy.current.settings.tenants
        used, others = self._usage.since_start()
        used = {**used, "(others)": others} if others.requests else used
        rates = self._rates.look({tenant: counts.output_tokens for tenant, counts in used.items()}, time.monotonic())
        computed = Counter(one.tenant for one in under_way if one.stage in (Stage.PREFILL, Stage.DECODE))
        waiting = Counter(one.tenant for one in under_way) - computed
        whole = sum(rates.values())
        rows: list[Row] = []
        for tenant in {*settings, *used, *computed, *waiting}:
            counts = used.get(tenant)
            rows.append(
                {
                    "tenant": tenant or OPERATOR,
                    "weight": settings.get(tenant, UNLIMITED).weight,
                    "running": computed[tenant],
                    "waiting": waiting[tenant],
                    "share": rates[tenant] / whole if whole and tenant in rates else None,
                    "tokens_per_s": rates.get(tenant),
                    "requests": counts.requests if counts else 0,
                    "prompt_tokens": counts.prompt_tokens if counts else 0,
                    "output_tokens": counts.output_tokens if counts else 0,
                    "refused": counts.refused if counts else 0,
                }
            )
        return rows

    def _with_limits(self, page: Json) -> Json:
        """Of the tenants that are shown."""
        settings = self._tenancy.current.settings.tenants
        for row in page["rows"]:
            row["limits"] = settings.get(row["tenant"], UNLIMITED).limits.model_dump(exclude_defaults=True)
        return page


def _load(engine: Engine) -> Json:
    load = engine.load()
    return {
        "running": load.running,
        "waiting": load.waiting,
        "preparing": load.waiting_for_adapter,
        "paused": load.paused,
        "pages": {"leased": load.pages_leased, "cached": load.pages_cached, "free": load.pages_free},
        "pool": {"used": load.adapter_pool_bytes_used, "total": load.adapter_pool_bytes_total},
        "slots": {"used": load.adapter_slots_used, "total": load.adapter_slots_total},
        "steps": load.steps,
        "preemptions": load.preemptions,
        "failures": load.request_failures + load.step_failures,
    }


def _server(engine: Engine) -> Json:
    info = engine.info()
    return {
        "model": info.model,
        "version": info.version,
        "device": info.device,
        "dtype": info.dtype,
        "kernels": info.kernel_backend,
        "rows": info.max_num_seqs,
        "page_tokens": info.page_size,
    }


def _requests(under_way: Sequence[RequestActivity]) -> list[Row]:
    return [
        {
            "id": one.request_id,
            "tenant": one.tenant or OPERATOR,
            "adapter": one.adapter,
            "version": one.version or None,
            "stage": one.stage.value,
            "age_s": round(one.age_s, 2),
            "prompt_tokens": one.prompt_tokens or None,
            "computed_tokens": one.computed_tokens,
            "output_tokens": one.output_tokens,
            "max_tokens": one.max_tokens or None,
            "preemptions": one.preemptions,
            "hold": one.hold,
            "ahead": one.ahead,
        }
        for one in under_way
    ]


def _ended(timelines: Sequence[Timeline]) -> list[Row]:
    """Of a thousand, each second: no more is computed than is shown."""
    rows: list[Row] = []
    for one in timelines:
        if one.ended_s is None:
            continue
        total_s = max(one.ended_s, one.left_s or 0.0) - one.received_s
        rows.append(
            {
                "ended_at": one.received_at + total_s,
                "id": unscoped(one.request_id),
                "tenant": owner(one.tenant) or OPERATOR,
                "adapter": one.served_by or one.asked_for,
                "outcome": one.outcome,
                "total_s": total_s,
                "first_token_s": one.first_token_s,
                "output_tokens": one.output_tokens,
            }
        )
    return rows
