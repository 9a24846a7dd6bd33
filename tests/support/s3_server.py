"""A bucket on loopback: moto's server, behind one that breaks off and stalls on demand."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from support.faulty_server import Answer, FaultyServer, Request, serving

BUCKET = "bucket"


class S3Front(FaultyServer):
    """Hands everything on to `port_behind`."""

    def __init__(self, port_behind: int) -> None:
        super().__init__()
        self._port_behind = port_behind
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port_behind}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, name: str, files: dict[str, bytes], **options: str) -> None:
        for file, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=f"prefix/{name}/{file}", Body=data, **options)

    def answer(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port_behind)
        try:
            connection.request(request.method, request.target, headers=dict(request.headers))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()


@contextmanager
def moto_server() -> Iterator[int]:
    """Its port. What it keeps is the process's, not the server's."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@contextmanager
def empty_bucket(port_behind: int) -> Iterator[S3Front]:
    connection = http.client.HTTPConnection("127.0.0.1", port_behind)
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().status == 200
    connection.close()
    front = S3Front(port_behind)
    with serving(front):
        yield front
    front.client.close()
