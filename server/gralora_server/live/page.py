"""The live page's port: a thread and a loop of its own, so that whoever looks holds up neither streams nor steps."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress

from gralora_runtime.errors import ConfigError
from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.http.calls import Calls
from gralora_server.http.certificate import HttpCertificate
from gralora_server.http.listener import HttpListener
from gralora_server.live.endpoints import LOOPBACK, LiveEndpoints
from gralora_server.live.view import View
from gralora_server.parts import Parts

SAMPLE_S = 1.0
MAX_BODY_BYTES = 1024  # nobody sends one


class LivePage:
    """Open from its making until `close`."""

    def __init__(self, config: HttpConfig, service: ServerConfig, parts: Parts) -> None:
        """Raises ConfigError: the address cannot be had, or anybody could look."""
        if parts.tenancy.current.identities.is_open and config.host not in LOOPBACK:
            raise ConfigError(
                f"ui_address is {config.host}:{config.port}, where anybody could look: without tokens it has to be "
                "a loopback address"
            )
        self._config = config
        self._service = service
        self._parts = parts
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._opened: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, name="gralora-live", daemon=True)
        self._thread.start()
        self.port = self._opened.result()

    def close(self) -> None:
        """Blocks until the port is closed."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        view = View(self._parts.gate, self._parts.tenancy, self._parts.usage)
        try:
            listener = self._listener(view)
            self._opened.set_result(await listener.start())
        except Exception as problem:  # whoever opens the page raises it
            self._opened.set_exception(problem)
            return
        try:
            while not self._stopped.is_set():
                view.note()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), SAMPLE_S)
        finally:
            await listener.stop()

    def _listener(self, view: View) -> HttpListener:
        tenancy, tls = self._parts.tenancy, self._service.tls
        calls = Calls(LiveEndpoints(view, tenancy).all(), tenancy, max_body_bytes=MAX_BODY_BYTES)
        return HttpListener(self._config, HttpCertificate(tls) if tls else None, calls, shares_port=False)
