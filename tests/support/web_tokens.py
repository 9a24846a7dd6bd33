"""An issuer of web tokens: its keys, the file that its public ones are in, and what it signs."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from gralora_server.tenants.settings import JwtSettings

ISSUER, AUDIENCE = "https://issuer.example", "gralora"
KINDS = ("RS256", "PS384", "ES256", "ES384", "ES512", "EdDSA", "EdDSA-448")


@cache
def private_key(kind: str) -> Any:
    """Made once for each algorithm: RSA takes its time."""
    match kind:
        case "ES256" | "ES384" | "ES512":
            return ec.generate_private_key(
                {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}[kind]()
            )
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case "EdDSA-448":
            return ed448.Ed448PrivateKey.generate()
        case "small":
            return rsa.generate_private_key(65537, 1024)
        case _:
            return rsa.generate_private_key(65537, 2048)


def jwk(kind: str, key: Any = None, **fields: object) -> dict[str, object]:
    """The public half, as a JWKS file has it; its kid is the kind. Fields that are None are left out."""
    public = (private_key(kind) if key is None else key).public_key()
    algorithm = jwt.get_algorithm_by_name(algorithm_of(kind))
    made = json.loads(algorithm.to_jwk(public)) | {"kid": kind} | fields
    return {name: value for name, value in made.items() if name != "key_ops" and value is not None}


def algorithm_of(kind: str) -> str:
    return {"EdDSA-448": "EdDSA", "small": "RS256"}.get(kind, kind)


def write_jwks(path: Path, *keys: object) -> Path:
    path.write_text(json.dumps({"keys": keys}))
    return path


def issuer(directory: Path, *kinds: str, **settings: object) -> JwtSettings:
    """What a configuration says of an issuer with one key of each kind."""
    path = write_jwks(directory / "jwks.json", *(jwk(kind) for kind in kinds or ("ES256",)))
    return JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks_file=path, **settings)


def claims(**changes: object) -> dict[str, object]:
    """Of a token that is good for a minute. Claims that are None are left out."""
    all_of_them = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": time.time() + 60,
        "tenant": "acme",
        "role": "manage",
    } | changes
    return {name: value for name, value in all_of_them.items() if value is not None}


def signed(kind: str = "ES256", *, kid: str | None = "", key: Any = None, **changes: object) -> str:
    """A token with these claims. `kid` "": that of the kind."""
    headers = {} if kid is None else {"kid": kid or kind}
    key = private_key(kind) if key is None else key
    return jwt.encode(claims(**changes), key, algorithm=algorithm_of(kind), headers=headers)
