"""How clients of this protocol name services, adapters and fields, where our own messages name them otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from gralora_runtime.errors import InvalidRequestError
from gralora_server.field_names import Names, renamed

SERVICES = ("vllm.Inference", "vllm.Control")
ID_BITS = 53  # those that every reader of JSON keeps

GENERATION: Names = (
    ("adapter", "lora_name"),
    ("canary_key", "session_id"),
    ("sampling.temperature", "temperature"),
    ("sampling.presence_penalty", "decoding.presence_penalty"),
    ("sampling.frequency_penalty", "decoding.frequency_penalty"),
    ("sampling.repetition_penalty", "decoding.repetition_penalty"),
    ("sampling.logit_bias", "decoding.logit_bias"),
    ("stopping.max_tokens", "stopping.max_new_tokens"),
    ("stopping.min_tokens", "stopping.min_new_tokens"),
    ("stopping.stop_token_ids", "stopping.stop_token_ids"),
    ("stopping.stop", "stopping.stop_strings"),
    ("structured_output.json_schema", "decoding.json"),
    ("structured_output.choice.texts", "decoding.choice.choices"),
    ("structured_output.", "decoding."),
)
LIFECYCLE: Names = (("name", "lora_name"), ("path", "source_path"), ("request_id", "request_ids"))


@contextmanager
def in_their_words(names: Names) -> Iterator[None]:
    """Errors about a field of ours say theirs."""
    try:
        yield
    except InvalidRequestError as error:
        raise renamed(error, names) from None


def lora_id(name: str) -> int:
    """Above 0, and the same everywhere and always. Among ten thousand names two share one in one of 10^8 cases."""
    digest = hashlib.sha256(name.encode()).digest()
    return 1 + (int.from_bytes(digest[:8]) >> (64 - ID_BITS))
