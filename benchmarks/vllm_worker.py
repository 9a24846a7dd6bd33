"""vLLM as a rival, run by whichever interpreter has it: imports nothing of ours. Speaks as `worker.Worker` expects.

The first line says what to load, each further line is one run. The engine is stepped in this process, so that the time
of each token is known without a server between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    """Until stdin ends."""
    from vllm import LLM, SamplingParams, __version__
    from vllm.lora.request import LoRARequest

    setup = json.loads(sys.stdin.readline())
    loras = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(setup["loras"].items())}
    options: dict[str, Any] = {"model": setup["model"], "dtype": "float32", "enable_prefix_caching": False}
    options |= {"max_model_len": setup["max_model_len"], "max_num_seqs": setup["max_num_seqs"], "seed": 0}
    if loras:
        options |= {"enable_lora": True, "max_loras": len(loras), "max_lora_rank": setup["max_lora_rank"]}
    engine = LLM(**options).llm_engine
    print(json.dumps({"version": __version__}), flush=True)
    for number, line in enumerate(sys.stdin):
        requests = json.loads(line)["requests"]
        started_s = time.perf_counter()
        for i, request in enumerate(requests):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
            )
            prompt = {"prompt_token_ids": request["prompt"]}
            lora = loras.get(request["adapter"])
            engine.add_request(f"{number}-{i}", prompt, sampling, lora_request=lora)
        print(json.dumps({"answers": _step(engine, number, len(requests), started_s)}), flush=True)


def _step(engine: Any, number: int, count: int, started_s: float) -> list[dict[str, list[Any]]]:
    answers: dict[str, dict[str, list[Any]]] = {f"{number}-{i}": {"tokens": [], "times_s": []} for i in range(count)}
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = answers[output.request_id]
            answer["tokens"] = list(output.outputs[0].token_ids)
            new = len(answer["tokens"]) - len(answer["times_s"])
            answer["times_s"] += [time.perf_counter() - started_s] * new
    return list(answers.values())


if __name__ == "__main__":
    main()
