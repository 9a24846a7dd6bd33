"""What both clients are made of, apart from waiting: settings, channel, stubs, and the arguments that each RPC gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import grpc

from gralora_server.client.connection import ChannelOptions, ClientTls, Connection, Timeouts
from gralora_server.client.requests import Call, GenerateOptions, Stubs

Channel = TypeVar("Channel", grpc.Channel, grpc.aio.Channel)


class ClientBase(Generic[Channel]):
    """Opens the channel at once; gRPC connects when the first call needs it. Safe to share between threads or tasks."""

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTls | None = None,
        token: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        max_attempts: int = 4,
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        self._connection = Connection(
            target=target,
            tls=tls,
            token=token,
            metadata=metadata if metadata is not None else {},
            timeouts=timeouts if timeouts is not None else Timeouts(),
            max_attempts=max_attempts,
            options=options,
        )
        self._metadata = self._connection.call_metadata()
        self._channel: Channel = self._open(target, self._connection.credentials(), self._connection.channel_options())
        self._stubs = Stubs(self._channel)

    def _open(self, target: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions) -> Channel:
        raise NotImplementedError

    def _call_arguments(self, call: Call[Any]) -> dict[str, Any]:
        return {"timeout": call.timeout_s(self._connection.timeouts), "metadata": self._metadata}

    def _push_arguments(self) -> dict[str, Any]:
        return {"timeout": self._connection.timeouts.push_adapter_s, "metadata": self._metadata}

    def _generate_arguments(self, options: GenerateOptions) -> dict[str, Any]:
        """An explicit None in the options means no timeout."""
        timeout_s = options.get("timeout_s", self._connection.timeouts.generate_s)
        return {"timeout": timeout_s, "metadata": self._metadata}
