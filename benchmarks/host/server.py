"""The real service over the pretended device, in a process of its own: `python -m benchmarks.host.server ROWS STEP_MS`.

Prints its address as a line of JSON. To each line on stdin it answers with when each step ended until now, and which
one made each adapter's first token. Ends with stdin. A request for adapter `7` has slot 7; no weights are behind it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvloop
from tokenizers import Tokenizer

from benchmarks.host.device import EOS, VOCAB
from benchmarks.host.engine import MAX_MODEL_LEN, lease_of, make_engine
from benchmarks.sequences import Everybody
from gralora_runtime.assemble import EngineParts
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.info import EngineInfo
from gralora_runtime.model.tokenization import PromptTokenizer
from gralora_server.config import ServerConfig
from gralora_server.model_fetch import ensure_default_model
from gralora_server.service import GrpcServer, sparing_collector


async def main(rows: int, step_s: float) -> None:
    """Until stdin ends."""
    model_dir = ensure_default_model()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    engine, device = make_engine(rows, step_s, pipelined=True)
    info = EngineInfo(
        model="pretended", model_type="llama", model_digest="", dtype="bfloat16", device="cuda", kernel_backend="",
        max_model_len=MAX_MODEL_LEN, max_num_seqs=rows, max_num_batched_tokens=4096, page_size=16, num_pages=0,
        vocab_size=VOCAB, adapter_pool_bytes=0, max_adapter_slots=rows, version="0",
    )  # fmt: skip
    base = SimpleNamespace(tokenizer=tokenizer, eos_token_ids=EOS)
    everybody = Everybody(lambda name: lease_of(int(name)))
    parts = EngineParts(
        engine, cast("Any", None), cast("Any", everybody), cast("Any", base), PromptTokenizer(tokenizer, None, VOCAB),
        info, lambda: None,
    )  # fmt: skip
    with sparing_collector():
        served = AsyncEngine(parts, EngineConfig(model=Path(), max_num_seqs=rows, max_num_batched_tokens=4096))
    server = GrpcServer(ServerConfig(port=0))
    port = await server.start()
    await server.open(served)
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({"ends_s": device.ends_s, "first_steps": device.first_steps}), flush=True)
    await served.close()
    await server.stop()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]) / 1e3))
