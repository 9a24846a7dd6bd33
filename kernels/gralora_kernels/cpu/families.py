"""What is compiled before a server serves, by families. Where nothing ever was, a second process does some of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gralora_kernels.cpu import adapters, attention, embedding, linear, microkernel, operations, placing, sha256
from gralora_kernels.cpu.cache import is_empty
from gralora_kernels.cpu.separate import Loadable
from gralora_kernels.stages import StartStage, untold

FAMILIES: dict[str, tuple[Loadable, ...]] = {
    "products": (
        microkernel.multiply,
        microkernel.multiply_float16,
        microkernel.multiply_bfloat16,
        microkernel.multiply_panel,
        microkernel.multiply_panel_float16,
        microkernel.multiply_panel_bfloat16,
        linear.linear_piece,
    ),
    "attention": (attention.attend_piece,),
    "sums": (microkernel.add_panels_native, microkernel.add_panels_float16, microkernel.add_panels_bfloat16),
    "rows": (operations.row_piece,),
    "hashing": (sha256.hash_stretches,),
    "placing": (placing.place_16_bits, placing.place_32_bits),
    "adapters": (adapters.shrink_piece, adapters.expand_piece, embedding.look_up_rows),  # call products and sums
    "steps": (operations.run,),  # calls all others
}
BESIDE = ("sums", "rows", "hashing", "placing")  # call no others, and take about as long as those before them
LOAD_BESIDE = "from gralora_kernels.cpu.families import load_beside; load_beside()"


def load_families(stage: StartStage) -> None:
    """All of them, from the cache or compiled, which takes about 20 s of a Zen 4 core."""
    with _compiling_beside(is_empty()) as process:
        for name, kernels in FAMILIES.items():
            with stage(f"Kernels: {name}") as tell:
                if process is not None and name in BESIDE:
                    process.wait()  # however it ends: what it has not done is done here
                    load(kernels)
                    tell("compiled beside the others")
                else:
                    tell("compiled" if load(kernels) else "cached")


def load(kernels: tuple[Loadable, ...]) -> bool:
    """Whether one had to be compiled."""
    compiled = [kernel.load() for kernel in kernels]  # all of them
    return any(compiled)


@contextmanager
def _compiling_beside(wanted: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    if not wanted:
        yield None
        return
    with subprocess.Popen([sys.executable, "-c", LOAD_BESIDE], stdin=subprocess.DEVNULL) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.kill()


def load_beside() -> None:
    """What the other process does."""
    for name in BESIDE:
        load(FAMILIES[name])


if __name__ == "__main__":
    load_families(untold)
