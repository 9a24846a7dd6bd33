"""`python -m benchmarks.generator`: how many messages a second the load generator takes before it is the bottleneck.

A fake server in another process paces its streams, one message each 20 ms; clients are added step by step. A rate is
sustained when 98 % of what was offered came and the generator does not call itself limited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fake_server import VOCAB_SIZE
from benchmarks.machine import busy_share, facts
from gralora_server.client.connection import Connection
from gralora_server.loadtest.driver import Driver
from gralora_server.loadtest.summary import Slo, Window, generator_health, summarise
from gralora_server.loadtest.trace import Trace, TraceRequest

OUT = Path(__file__).parent / "results" / "generator.json"
ITL_S = 0.02
TOKENS = 200
CLIENTS = (20, 50, 100, 125, 150, 200, 300)
WARMUP_S, DURATION_S = 3.0, 13.0


@dataclass(frozen=True, slots=True)
class Rate:
    """One step."""

    offered_per_s: float
    received_per_s: float
    itl_p50_s: float
    itl_p99_s: float
    wake_lag_p99_s: float
    cpu_share: float
    limited: bool
    sustained: bool


def measure(address: str, clients: int) -> Rate:
    one = TraceRequest(arrival_s=0, adapter=f"itl={ITL_S}", prompt_tokens=64, output_tokens=TOKENS, seed=0)
    trace = Trace(requests=(one,) * (clients * 10), warmup_s=WARMUP_S, duration_s=DURATION_S, concurrency=clients)
    driven = asyncio.run(Driver(Connection(target=address, max_attempts=1), VOCAB_SIZE).run(trace))
    health = generator_health(driven.records, driven.wake_lags_s, driven.cpu_share)
    window = Window(WARMUP_S, DURATION_S)
    summary = summarise("generator", driven.records, window=window, slo=Slo(), generator=health)
    offered = clients / ITL_S
    return Rate(
        offered_per_s=offered,
        received_per_s=summary.tokens_per_s,
        itl_p50_s=summary.itl_s.p50,
        itl_p99_s=summary.itl_s.p99,
        wake_lag_p99_s=health.wake_lag_p99_s,
        cpu_share=health.cpu_share,
        limited=health.limited,
        sustained=not health.limited and summary.tokens_per_s >= 0.98 * offered,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    busy = busy_share()
    command = [sys.executable, "-m", "benchmarks.fake_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        rates = []
        for clients in CLIENTS:
            rates.append(measure(address, clients))
            print(rates[-1], flush=True)
        server.communicate()
    sustained = [rate.offered_per_s for rate in rates if rate.sustained]
    result = {
        "machine": facts() | {"busy_share_before": busy},
        "rates": [asdict(rate) for rate in rates],
        "sustained_messages_per_s": max(sustained, default=0.0),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
