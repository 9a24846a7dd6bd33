"""What an overload did, in words. Every figure comes from the result."""

from __future__ import annotations

from collections.abc import Mapping

from gralora_server.loadtest.overload import Overload, TenantSummary
from gralora_server.loadtest.recovery import TIMES_AS_LONG, Recovery
from gralora_server.loadtest.report.findings import seconds
from gralora_server.loadtest.summary import Slo


def overload_said(overload: Overload, slo: Slo) -> list[str]:
    """Sentences, the most important first."""
    total = overload.total
    said = [_in_time(overload, slo)]
    if total.refusals:
        said.append(_refused(total))
    if total.retries.came_again:
        said.append(_retries(total))
    if overload.recovery is not None:
        said.append(_recovered(overload.recovery))
    if overload.jain is not None:
        said.append(
            f"Jain's index of what the tenants were served by their weights is {overload.jain:.2f}: 1 is all alike; "
            "who asks for less than its share lowers it."
        )
    return said


def _in_time(overload: Overload, slo: Slo) -> str:
    total = overload.total
    deadline = "" if overload.deadline_s is None else f", all of it within {overload.deadline_s:g} s"
    objective = f"first token within {slo.ttft_s:g} s, then at most {1000 * slo.itl_s:g} ms a token{deadline}"
    rates = f"{total.good_requests_per_s:.2f} requests and {total.good_tokens_per_s:.0f} tokens a second"
    ends = {
        "in time": total.in_time,
        "late": total.late,
        "refused": sum(total.refused.values()),
        "past the deadline": total.deadline_exceeded,
        "failed otherwise": sum(total.errors.values()),
    }
    counts = ", ".join(f"{count} {end}" for end, count in ends.items() if count)
    return f"{rates} were in time ({objective}); of {total.requests} requests: {counts or 'nothing became'}."


def _refused(total: TenantSummary) -> str:
    first = "" if total.first_refusal_s is None else f", the first {seconds(total.first_refusal_s)} after the start"
    return (
        f"{sum(total.refusals.values())} tries were refused ({reasons(total.refusals)}){first}; half of the refusals "
        f"came within {seconds(total.refusal_s.p50)}, 99 % within {seconds(total.refusal_s.p99)}; half told to come "
        f"again within {seconds(total.told_s.p50)}, all within {seconds(total.told_s.max)}."
    )


def _retries(total: TenantSummary) -> str:
    found = total.retries
    if not found.let_in:
        return f"{found.came_again} requests came again when they were told to, and none was let in."
    return (
        f"{found.came_again} requests came again when they were told to; {found.let_in} were let in, "
        f"{found.at_first_retry / found.let_in:.0%} of them at the first retry, after {found.wait_p50:.2f} times what "
        f"they were told (median; quartiles {found.wait_p25:.2f} and {found.wait_p75:.2f}). "
        f"Counted from when they were let in, {total.in_time_once_let_in} of all requests were in time."
    )


def _recovered(recovery: Recovery) -> str:
    span = f"the overload from {recovery.from_s:g} s to {recovery.to_s:g} s"
    if recovery.before_p99_s is None:
        return f"Before {span} not even 99 % of the requests had a first token: there is no normal to come back to."
    normal = f"{TIMES_AS_LONG:g} times the {seconds(recovery.before_p99_s)} from before"
    if recovery.after_s is None:
        return f"After {span} the first token was not normal again: its 99th percentile never came within {normal}."
    return (
        f"Normal again {recovery.after_s:g} s after {span}: from then on 99 % of the first tokens of "
        f"{recovery.requests} requests came within {normal}."
    )


def reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason or 'no reason'}" for reason, count in counts.items())
