"""vLLM beside us, where there is an interpreter that has it; where there is none, the reason why it is skipped.

vLLM pins a torch of its own, so it usually lives in an environment of its own: `--vllm-python PATH`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.worker import ROOT, Worker

WORKER = ROOT / "benchmarks" / "vllm_worker.py"


def why_not(python: str) -> str | None:
    """None if `python` can import vLLM."""
    probe = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, check=False, cwd="/")
    if probe.returncode == 0:
        return None
    lines = probe.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {probe.returncode}"


@contextmanager
def running(
    python: str,
    model_dir: Path,
    *,
    max_num_seqs: int,
    max_model_len: int,
    loras: Mapping[str, Path],
    max_lora_rank: int,
    num_threads: int,
) -> Iterator[Worker]:
    """One model, with LoRA support only if there are LoRAs, since it costs even requests without one."""
    # Its own choice binds all threads to one core on small machines.
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # -P: this folder must not become a place to import from, its names are too plain.
    with Worker([python, "-P", str(WORKER)], environment=environment) as worker:
        worker.ask(
            {
                "model": str(model_dir),
                "max_num_seqs": max_num_seqs,
                "max_model_len": max_model_len,
                "loras": {name: str(path) for name, path in loras.items()},
                "max_lora_rank": max_lora_rank,
            }
        )
        yield worker
