"""What is compiled before a server serves, by families. Where nothing ever was, a second process does some of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gralora_kernels.cpu import (
    adapters,
    attention,
    block_tiles,
    embedding,
    linear,
    microkernel,
    operations,
    placing,
    sha256,
)
from gralora_kernels.cpu.cache import is_empty
from gralora_kernels.cpu.separate import Loadable
from gralora_kernels.stages import StartStage, untold

# In the order in which they are waited for: a family calls only those before it.
FAMILIES: dict[str, tuple[Loadable, ...]] = {
    "products": (
        microkernel.multiply,
        microkernel.multiply_panel,
        microkernel.multiply_bfloat16,
        microkernel.multiply_panel_bfloat16,
    ),
    "products of blocks": (block_tiles.multiply_fours, block_tiles.multiply_eights),
    "products of float16": (microkernel.multiply_float16, microkernel.multiply_panel_float16),
    "linear": (linear.linear_piece,),
    "sums": (microkernel.add_panels_native, microkernel.add_panels_float16, microkernel.add_panels_bfloat16),
    "adapters": (adapters.shrink_piece, adapters.expand_piece, embedding.look_up_rows),
    "rows": (operations.row_piece,),
    "attention": (attention.attend_piece,),
    "steps": (operations.run,),  # calls all others
    "hashing": (sha256.hash_stretches,),
    "placing": (placing.place_16_bits, placing.place_32_bits),
}
# Each is done there when the first process has done the others before it, or soon after. Attention calls the products:
# the first process had to do these before.
BESIDE = ("products of float16", "sums", "rows", "attention", "hashing", "placing")
LOAD_BESIDE = "from gralora_kernels.cpu.families import load_beside; load_beside()"


def load_families(stage: StartStage) -> None:
    """All of them, from the cache or compiled, which takes about 20 s of a Zen 4 core."""
    with _compiling_beside(is_empty()) as done:
        for name, kernels in FAMILIES.items():
            with stage(f"Kernels: {name}") as tell:
                beside = name in BESIDE and name in done  # waits; however that process ends, the rest is done here
                compiled = load(kernels)
                tell("compiled beside the others" if beside else "compiled" if compiled else "cached")


def load(kernels: tuple[Loadable, ...]) -> bool:
    """Whether one had to be compiled."""
    compiled = [kernel.load() for kernel in kernels]  # all of them
    return any(compiled)


@contextmanager
def _compiling_beside(wanted: bool) -> Iterator[Iterator[str]]:
    """The families that another process does, as it gets them done."""
    if not wanted:
        yield iter(())
        return
    command = [sys.executable, "-c", LOAD_BESIDE]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        try:
            yield (line.removesuffix("\n") for line in process.stdout)
        finally:
            process.kill()


def load_beside() -> None:
    """What the other process does. It prints the name of each family that is done."""
    for name in BESIDE:
        load(FAMILIES[name])
        print(name, flush=True)


if __name__ == "__main__":
    load_families(untold)
