"""`gralora adapters`: the server's catalogue, and a look at an adapter directory without any server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_server.cli.options import Json
from gralora_server.cli.output import CommandError, ExitCode, human_bytes, print_json, stdout
from gralora_server.cli.progress import stages
from gralora_server.cli.remote import needs_server

if TYPE_CHECKING:
    from gralora_runtime.adapters.checkpoint.header import AdapterHeader
    from gralora_runtime.adapters.checkpoint.spec import ModuleShape
    from gralora_server.client import Adapter, Client


class Order(StrEnum):
    """What a list is sorted by."""

    NAME = "name"
    STATE = "state"
    SIZE = "size"
    USED = "used"
    IN_FLIGHT = "in-flight"


_ORDERS: dict[Order, Callable[[Adapter], Any]] = {
    Order.NAME: lambda one: one.name,
    Order.STATE: lambda one: (one.state.value, one.name),
    Order.SIZE: lambda one: (-one.pool_bytes, one.name),
    Order.USED: lambda one: (-one.last_used.timestamp() if one.last_used else 0.0, one.name),
    Order.IN_FLIGHT: lambda one: (-one.in_flight, one.name),
}
MAX_LINES = 40  # of one row of a table

app = typer.Typer(no_args_is_help=True, help="Manage the server's adapters, or inspect one on disk.")

Name = Annotated[str, typer.Argument(help="The adapter's name.")]


@app.command("list")
@needs_server
def list_adapters(
    client: Client,
    *,
    prefix: Annotated[str, typer.Argument(help="Only names that begin so.")] = "",
    state: Annotated[
        list[AdapterState] | None, typer.Option(help="Only adapters in this state; may be given several times.")
    ] = None,
    sort: Annotated[Order, typer.Option(help="By what.")] = Order.NAME,
    json: Json = False,
) -> None:
    """List the adapters that the server knows."""
    adapters = sorted(client.adapters.list(prefix, states=state or ()), key=_ORDERS[sort])
    if json:
        print_json({"adapters": [asdict(adapter) for adapter in adapters]})
    else:
        _print_table(adapters)
        if any(adapter.warnings for adapter in adapters):
            stdout().print("`gralora adapters versions NAME` says what the warnings are.")


@app.command("load")
@needs_server
def load(
    client: Client,
    *,
    name: Name,
    path: Annotated[
        str, typer.Argument(help="On the server, below its adapters directory. Default: the name says it.")
    ] = "",
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    json: Json = False,
) -> None:
    """Register an adapter and load it. Loading the same content again changes nothing."""
    _print_one(client.adapters.load(name, path, pin=pin), as_json=json)


@app.command("push")
@needs_server
def push(
    client: Client,
    *,
    directory: Annotated[Path, typer.Argument(help="An adapter directory of this machine.")],
    name: Annotated[str, typer.Option(help="The name that it gets.")],
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    json: Json = False,
) -> None:
    """Send an adapter to the server and load it. A push that broke off goes on where it was."""
    try:
        with stages() as report:
            adapter = client.adapters.push(directory, name, pin=pin, progress=partial(report, "sending files"))
    except OSError as cause:
        raise CommandError(ExitCode.USAGE, f"cannot read {cause.filename}: {cause.strerror}") from cause
    _print_one(adapter, as_json=json)


@app.command("pin")
@needs_server
def pin(
    client: Client,
    *,
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Allow its eviction again.")] = False,
    json: Json = False,
) -> None:
    """Keep an adapter in the pool."""
    _print_one(client.adapters.pin(name, pinned=not off), as_json=json)


@app.command("promote")
@needs_server
def promote(
    client: Client,
    *,
    name: Name,
    version: Annotated[str, typer.Argument(help="A number, or sha256:DIGITS. Default: the newest.")] = "",
    json: Json = False,
) -> None:
    """Let a name stand for one of its versions. Requests from now on get that; streams end on theirs."""
    _print_one(client.adapters.promote(name, version), as_json=json)


@app.command("rollback")
@needs_server
def rollback(client: Client, *, name: Name, json: Json = False) -> None:
    """Let a name stand for what it stood for before."""
    _print_one(client.adapters.rollback(name), as_json=json)


@app.command("canary")
@needs_server
def canary(
    client: Client,
    *,
    name: Name,
    version: Annotated[str, typer.Argument(help="A number, or sha256:DIGITS.")] = "",
    share: Annotated[float, typer.Option(help="Of the name's requests, 0 to 1; 0 ends the canary.")] = 0.0,
    json: Json = False,
) -> None:
    """Give a version a share of a name's requests before it is promoted."""
    _print_one(client.adapters.set_canary(name, version, share), as_json=json)


@app.command("versions")
@needs_server
def versions(client: Client, *, name: Name, json: Json = False) -> None:
    """List the versions of an adapter, and say which one its name stands for."""
    adapter = client.adapters.get(name)
    if json:
        print_json(adapter)
    else:
        _print_versions(adapter)


@app.command("watch")
@needs_server
def watch(
    client: Client, *, prefix: Annotated[str, typer.Argument(help="Only names that begin so.")] = "", json: Json = False
) -> None:
    """Print where adapters are, and each change of it, until Ctrl-C."""
    for news in client.adapters.watch(prefix):
        if json:
            print_json(news)
            continue
        for adapter in news.adapters:
            line = f"{adapter.name}@{adapter.version} {adapter.state.value} {adapter.in_flight} in flight"
            stdout().print(f"{line} {human_bytes(adapter.pool_bytes)} {adapter.digest[:12]}", markup=False)
        for name in news.removed:
            stdout().print(f"{name} removed", markup=False)


@app.command("unload")
@needs_server
def unload(
    client: Client,
    *,
    name: Name,
    delete_upload: Annotated[
        bool, typer.Option("--delete-upload", help="Delete what was pushed under that name, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove an adapter, or NAME@3, from memory and from the list. Refused while requests use it."""
    freed = client.adapters.unload(name, delete_upload=delete_upload)
    if json:
        print_json(freed)
        return
    pool, host = human_bytes(freed.pool_bytes_freed), human_bytes(freed.host_bytes_freed)
    deleted = "; what was pushed is deleted" if delete_upload else ""
    stdout().print(f"{name}: unloaded; {pool} freed in the pool, {host} in host memory{deleted}", markup=False)


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter directory.")],
    model: Annotated[Path | None, typer.Option(help="A base model's directory: does the adapter fit it?")] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the weights, too, and the model's: warn of what is odd about them.")
    ] = False,
    allow_unknown_config_key: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="As the same option of `gralora serve`.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what an adapter on disk is, from its headers alone, and whether it fits a base model."""
    from gralora_runtime.adapters.checkpoint.header import inspect as read_header

    header = read_header(path, allowed_keys=allow_unknown_config_key or ())
    modules = None if model is None else _module_shapes(model)
    problems = [] if model is None or modules is None else [*header.fits(modules), *_not_invoked(header, model)]
    warnings = [] if problems else _doubts_of_names(header, model)
    if weights and not problems:
        warnings += _doubts_of_weights(path, model, modules, allow_unknown_config_key or ())
    facts = _facts(header, modules, problems, warnings)
    if json:
        print_json(facts)
    else:
        _print_facts(path.name, facts)
    if problems:
        raise CommandError(ExitCode.UNFIT_ADAPTER, f"{path} does not fit {model}: {problems[0]}")


def _module_shapes(model: Path) -> list[ModuleShape]:
    from gralora_runtime.model.module_shapes import module_shapes

    return module_shapes(model)


def _not_invoked(header: AdapterHeader, model: Path) -> list[str]:
    from gralora_runtime.adapters.checkpoint.spec import not_in_vocabulary
    from gralora_runtime.model.module_shapes import vocab_size

    return not_in_vocabulary(header.spec.invocation, vocab_size(model)) if header.spec.invocation else []


def _doubts_of_names(header: AdapterHeader, model: Path | None) -> list[str]:
    from gralora_runtime.adapters.checkpoint.doubts import about_names

    served = "" if model is None else model.resolve().name
    return [*about_names(header.spec.base_model, served), *header.spec.notes]


def _doubts_of_weights(
    path: Path, model: Path | None, modules: Sequence[ModuleShape] | None, allowed_keys: Sequence[str]
) -> list[str]:
    from gralora_runtime.adapters.checkpoint.doubts import about_weights
    from gralora_runtime.adapters.checkpoint.whole import read_whole

    whole = read_whole(path, modules, allowed_keys=allowed_keys)
    norms = {} if model is None else _weight_norms(model)
    return about_weights(whole.updates(), norms, brings_more=whole.brings_more)


def _weight_norms(model: Path) -> dict[str, float]:
    from gralora_runtime.model.adaptable import weight_norms
    from gralora_runtime.model.loading import load_as_stored

    return weight_norms(load_as_stored(model))


def _facts(
    header: AdapterHeader, modules: Sequence[ModuleShape] | None, problems: Sequence[str], warnings: Sequence[str]
) -> dict[str, Any]:
    from gralora_runtime.adapters.checkpoint.implied import implied_shapes

    plan = header.plan(modules or implied_shapes(header))
    facts: dict[str, Any] = {
        "dialect": header.dialect,
        "r": header.rank,
        "k": header.blocks,
        "hybrid_r": header.hybrid_rank,
        "lora_equivalent_rank": header.equivalent_rank,
        "scale": header.spec.scale,
        "targets": patterns(header.targets),
        "num_modules": len(header.targets),
        "tensor_bytes": header.tensor_bytes,
        "base_model": header.spec.base_model,
        "invocation": list(header.spec.invocation),
        "replaces": [one.module.name for one in plan if one.replaces],
        "added_tokens": max((one.added_tokens for one in plan), default=0),
        "tensor_names": header.naming(modules or ()).told(),
        "fits": None,
        "problems": list(problems),
        "warnings": list(warnings),
    }
    if modules is not None:
        facts["fits"] = not problems
        if not problems:
            facts["cpu_pool_bytes"] = header.cpu_pool_bytes(modules)
    return facts


def patterns(targets: Sequence[str]) -> dict[str, int]:
    """Module names with their layer numbers as *, and how many modules each stands for."""
    return dict(Counter(re.sub(r"\.\d+\.", ".*.", target) for target in targets))


def _print_facts(name: str, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, title=Text(name, style="bold"), title_justify="left")
    targets = _first([f"{pattern} ({count})" for pattern, count in facts["targets"].items()])
    hybrid = f" + hybrid rank {facts['hybrid_r']}" if facts["hybrid_r"] else ""
    table.add_row("dialect", facts["dialect"])
    table.add_row("rank", f"r = {facts['r']}, k = {facts['k']}{hybrid}, scale {facts['scale']:g}")
    table.add_row("exact as LoRA", f"of rank {facts['lora_equivalent_rank']}")
    table.add_row("targets", Text(targets))  # Text: what a stranger wrote is not markup
    table.add_row("size", human_bytes(facts["tensor_bytes"]))
    table.add_row("trained for", Text(facts["base_model"] or "(not said)"))
    if facts["replaces"]:
        table.add_row("own weights of", Text(_first(facts["replaces"])))
    if facts["added_tokens"]:
        table.add_row("added tokens", f"{facts['added_tokens']}, behind the base model's")
    for strange in facts["tensor_names"]:
        table.add_row("tensor names", Text(strange))
    if facts["fits"] is not None:
        table.add_row("fits", Text("yes" if facts["fits"] else f"no: {_first(facts['problems'])}"))
    for warning in facts["warnings"]:
        table.add_row("warning", Text(warning, style="yellow"))
    stdout().print(table)


def _first(lines: Sequence[str]) -> str:
    """A stranger's checkpoint may have tens of thousands of them."""
    left = len(lines) - MAX_LINES
    return "\n".join([*lines[:MAX_LINES], *([f"and {left} more"] if left > 0 else [])])


def _print_one(adapter: Adapter, *, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        _print_table([adapter])
        _print_warnings(adapter.name, adapter.warnings)


def _print_table(adapters: Sequence[Adapter]) -> None:
    table = Table(box=None)
    for heading in ("name", "version", "state", "kind", "rank", "size", "in flight", "pinned", "digest", "warnings"):
        table.add_column(
            heading, justify="right" if heading in ("size", "in flight", "warnings") else "left", no_wrap=True
        )
    for one in adapters:
        table.add_row(
            one.name,
            str(one.version),
            one.state.value,
            one.kind,
            _rank(one),
            human_bytes(one.pool_bytes),
            str(one.in_flight),
            "yes" if one.pinned else "",
            one.digest[:8],
            str(len(one.warnings) or ""),
        )
    stdout().print(table)
    for one in adapters:
        if one.error:
            stdout().print(f"{one.name}: {one.error}", style="red", markup=False, soft_wrap=True)


def _print_versions(adapter: Adapter) -> None:
    table = Table(box=None, title=Text(adapter.name, style="bold"), title_justify="left")
    for heading in ("version", "", "state", "in flight", "pinned", "since", "digest"):
        table.add_column(heading, justify="right" if heading == "in flight" else "left", no_wrap=True)
    roles = {
        adapter.canary_version: f"canary {adapter.canary_share:.0%}",
        adapter.previous_version: "previous",
        adapter.version: "promoted",
    }
    for one in adapter.versions:
        table.add_row(
            str(one.number),
            roles.get(one.number, ""),
            one.state.value,
            str(one.in_flight),
            "yes" if one.pinned else "",
            f"{one.created:%Y-%m-%d %H:%M}",
            one.digest[:12],
        )
    stdout().print(table)
    for one in adapter.versions:
        _print_warnings(f"{adapter.name}@{one.number}", one.warnings)


def _print_warnings(name: str, warnings: Sequence[str]) -> None:
    for warning in warnings:
        stdout().print(f"{name}: {warning}", style="yellow", markup=False, soft_wrap=True)


def _rank(adapter: Adapter) -> str:
    """For example `8, k=2, +4`: r, blocks, and a hybrid's plain rank."""
    parts = [str(adapter.rank)] if adapter.rank else []
    if adapter.k > 1:
        parts.append(f"k={adapter.k}")
    if adapter.hybrid_rank:
        parts.append(f"+{adapter.hybrid_rank}")
    return ", ".join(parts)
