"""Valid requests of every RPC, with all of their fields filled: what mutations begin with.

A field's value follows from its name and type, so that a new field is filled, too. Only uploads are made by hand: their
messages belong together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from benchmarks.fuzz.methods import Method
from benchmarks.fuzz.structure import fields_of
from gralora.v1 import adapters_pb2
from gralora_server.client.push import Push

PUSHED, NUM_PUSHED = "pushed-", 8  # names of uploads: few, so that calls get in each other's way
# Fields that take a text of a certain kind; each is drawn anew for each request.
_WORDS = {"text": "w3 w4 w5", "content": "w6 w7", "role": "user", "version": "1", "canary_key": "somebody"}
_WORDS |= {"json_schema": '{"type": "boolean"}', "regex": "w[0-9]", "grammar": 'start: "w"'}
_SELDOM = {"structured_output": 0.25}  # refused whatever it says: the stand's model has words, which are no bytes
_NAMED = frozenset({"adapter", "name", "prefix", "path"})
_EMPTY = frozenset({"page_token", "tenant"})  # what else they may be, a server says


class Seeds:
    """`names` are the adapters that requests act on; `pushed` is a directory that may be uploaded under any name."""

    def __init__(self, names: Sequence[str], pushed: Path) -> None:
        self._names = names
        pushes = [Push.of(pushed, f"{PUSHED}{number}", pin=False, progress=None) for number in range(NUM_PUSHED)]
        self._uploads = [list(push.messages({})) for push in pushes]

    def draw(self, rng: random.Random, method: Method) -> list[Message]:
        """The messages of one call."""
        if method.sends_many:
            return [method.request.FromString(part.SerializeToString()) for part in rng.choice(self._uploads)]
        message = method.request()
        self._fill(rng, message)
        return [message]

    def _fill(self, rng: random.Random, message: Message) -> None:
        if isinstance(message, adapters_pb2.AdapterUploadHeader):
            message.CopyFrom(rng.choice(self._uploads)[0].header)
            return
        oneofs: Any = message.DESCRIPTOR.oneofs
        chosen = {rng.choice(oneof.fields).name for oneof in oneofs}
        for field in fields_of(message):
            is_drawn = field.name not in _SELDOM or rng.random() < _SELDOM[field.name]
            if is_drawn and (field.containing_oneof is None or field.name in chosen):
                self._fill_field(rng, message, field)

    def _fill_field(self, rng: random.Random, message: Message, field: FieldDescriptor) -> None:
        there = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            there[5] = 1.0
        elif field.message_type is not None:
            self._fill(rng, there.add() if field.is_repeated else there)
        elif field.is_repeated:
            there.append(self._value(rng, field))
        else:
            setattr(message, field.name, self._value(rng, field))

    def _value(self, rng: random.Random, field: FieldDescriptor) -> Any:
        if field.name in _NAMED:
            return rng.choice(self._names)
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            default = "" if field.name in _EMPTY else f"fuzzed-{rng.getrandbits(48):x}"
            return _WORDS.get(field.name, default)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return field.name not in ("pin", "pinned", "delete_upload")  # nothing could be brought into a pool of those
        return 4 if field.name == "max_tokens" else 1  # which everything that is a number may be
