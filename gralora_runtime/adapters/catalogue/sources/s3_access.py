"""How a bucket is reached. Apart from what reaches it, so that nobody needs the libraries to say so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Access:
    """Without a key the machine's own credentials are used, wherever AWS's libraries find them."""

    endpoint: str | None = None  # None: AWS itself
    region: str | None = None
    key: str | None = None
    secret: str | None = None
    token: str | None = None  # of a session
    anonymous: bool = False
