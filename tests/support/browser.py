"""Chromium without a window, told what to do through a pipe, in the words of its DevTools protocol."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
# It reads what it is told from its file 3, and answers to 4. Not every shell knows files beyond 9.
START = 'exec "$0" "$@" 3<&{told} 4>&{answers}'
ANSWER_S = 60.0


class Browser:
    """One page. What its console complained of is kept."""

    def __init__(self, told: int, answers: int) -> None:
        self.complaints: list[str] = []
        self._told, self._answers = told, answers
        self._unread = b""
        self._numbers = itertools.count(1)
        self._session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """What the browser answers to a command."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._told, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._listen(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page, or what its promise comes to."""
        done = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str, timeout_s: float = 30.0) -> Any:
        """The first value of the expression that is true."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := self.run(script)):
            assert time.monotonic() < deadline_s, f"never: {script}"
            time.sleep(0.05)
        return found

    def look(self, width: int, height: int, scheme: str) -> None:
        """The size of the window, and "light" or "dark"."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def picture(self, path: Path) -> None:
        """Of what the window shows."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def axe(self) -> list[dict[str, Any]]:
        """What axe-core finds wrong with the page as it is."""
        spec = importlib.util.find_spec("axe_playwright_python")
        assert spec is not None, "axe-playwright-python is not installed (make install)"
        assert spec.submodule_search_locations is not None
        self.run((Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text() + "; 1")
        found: list[dict[str, Any]] = self.run("axe.run().then(found => found.violations)")
        return found

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser is gone"
            self._unread += more
        message, self._unread = self._unread.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _listen(self, event: dict[str, Any]) -> None:
        facts = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(facts["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if facts["type"] in ("error", "warning"):
                self.complaints.append(str(facts["args"]))
            case "Log.entryAdded" if facts["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(facts["entry"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """`folder`: for what it keeps."""
    assert CHROMIUM is not None
    told, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    command = ["bash", "-c", START.format(told=told, answers=answers), CHROMIUM, *options]
    with subprocess.Popen(
        [*command, f"--user-data-dir={folder}"],
        pass_fds=(told, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(told)
        os.close(answers)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            process.terminate()
            os.close(to_browser)
            os.close(from_browser)
