"""What a real server logs of its requests: who, what and how long, and never what was said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx2
import pytest

from e2e.conftest import GRALORA
from gralora_server import Client

SECRET = "xyzzy-plugh-secret-prompt"


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_line_a_request_and_neither_prompt_nor_answer_in_any(
    tiny_workspace: Path, tmp_path: Path, log_format: str
) -> None:
    command = [GRALORA, "serve", "--model", tiny_workspace / "model", "--adapters", tiny_workspace / "adapters"]
    command += ["--address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--json", "--threads", "1"]
    command += ["--log-level", "debug", "--log-format", log_format]
    words = [str(word) for word in command]
    written = tmp_path / "log"
    with (
        written.open("w") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        assert server.stdout is not None
        announced = json.loads(server.stdout.readline())
        with Client(announced["address"]) as client:
            answer = client.generate(SECRET, adapter="a1", max_tokens=12, ignore_eos=True, request_id="by-grpc")
            body = {"model": "a0", "prompt": SECRET, "max_tokens": 12, "n": 2, "temperature": 1.0, "ignore_eos": True}
            url = f"http://{announced['http_address']}/v1/completions"
            choices = httpx2.post(url, json=body, headers={"X-Request-Id": "by-http"}, timeout=60).json()["choices"]
            with pytest.raises(Exception, match="top_p"):
                client.generate(SECRET, top_p=7.0)
        server.terminate()
        server.wait(60)
    log = written.read_text()

    said = [SECRET, answer.text, *(choice["text"] for choice in choices)]
    assert all(len(text) > 5 for text in said), "too short to be looked for"
    for text in said:
        assert text not in log
        assert json.dumps(text)[1:-1] not in log
    asked = [line for line in log.splitlines() if "by-grpc" in line]
    assert len(asked) == 1
    if log_format == "json":
        line = json.loads(asked[0])
        assert (line["adapter"], line["version"], line["outcome"], line["code"]) == ("a1@1", 1, "length", "OK")
        assert (line["prompt_tokens"], line["generated_tokens"]) == (answer.usage.prompt_tokens, 12)
        assert {"queued_ms", "load_ms", "prefill_ms", "decode_ms", "first_token_ms"} <= line.keys()
    else:
        assert "adapter=a1@1 " in asked[0]
        assert "generated_tokens=12 " in asked[0]
    assert sum("by-http" in line for line in log.splitlines() if "generated_tokens" in line) == 2
