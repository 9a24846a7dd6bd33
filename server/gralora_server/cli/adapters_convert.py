"""`gralora adapters convert`: the same adapter in another dialect, or as a plain LoRA that any server knows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import human_bytes, print_json, stdout


class To(StrEnum):
    """The names that `inspect` gives to dialects."""

    GRALORA = "gralora"
    AUTHORS = "gralora-authors"
    LORA = "lora"


def convert(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    out: Annotated[Path, typer.Argument(help="A new directory, or an empty one.")],
    to: Annotated[To, typer.Option(help="gralora: PEFT's GraLoRA; gralora-authors: their fork's; lora: a plain LoRA.")],
    json: Json = False,
) -> None:
    """Write an adapter down in another dialect, exactly: weights keep their bits, and alpha takes the scale.

    Any GraLoRA equals a plain LoRA of rank k * r + hybrid_r, which takes k times the bytes. A LoRA becomes a GraLoRA of
    one block if all its modules have the same rank and alpha.
    """
    from gralora_runtime.adapters.checkpoint.conversion import convert as convert_adapter
    from gralora_runtime.adapters.checkpoint.header import inspect
    from gralora_runtime.adapters.checkpoint.spec import Dialect
    from gralora_runtime.adapters.checkpoint.whole import read_whole
    from gralora_runtime.adapters.checkpoint.writer import write_adapter

    converted = convert_adapter(read_whole(adapter), Dialect(to.value))
    write_adapter(out, converted.config, converted.tensors)
    written = inspect(out)
    if json:
        print_json(
            {
                "path": str(out),
                "dialect": written.dialect,
                "r": written.rank,
                "k": written.blocks,
                "hybrid_r": written.hybrid_rank,
                "scale": written.spec.scale,
                "tensor_bytes": written.tensor_bytes,
            }
        )
        return
    rank = f"r = {written.rank}, k = {written.blocks}, hybrid_r = {written.hybrid_rank}, scale {written.spec.scale:g}"
    line = f"{out}: {written.dialect}, {rank}, {human_bytes(written.tensor_bytes)}"
    stdout().print(line, markup=False, soft_wrap=True)
