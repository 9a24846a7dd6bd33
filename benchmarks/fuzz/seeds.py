"""Valid requests of every RPC, with all of their fields filled: what mutations begin with.

A field's value follows from its name and type, so that a new field is filled, too. Only three kinds are made by hand:
uploads, whose messages belong together, what KServe's protocol calls an inference, whose tensors do, and generations of
vLLM's protocol, half of whose fields are there to be refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from benchmarks.fuzz.methods import Method
from benchmarks.fuzz.structure import fields_of
from gralora.foreign import kserve_pb2, vllm_pb2
from gralora.v1 import adapters_pb2
from gralora_server.client.push import Push
from gralora_server.kserve.tensors import BOOL, BYTES, string_bytes

PUSHED, NUM_PUSHED = "pushed-", 8  # names of uploads: few, so that calls get in each other's way
# Fields that take a text of a certain kind; each is drawn anew for each request.
_WORDS = {"text": "w3 w4 w5", "content": "w6 w7", "role": "user", "version": "1", "canary_key": "somebody"}
_WORDS |= {"json_schema": '{"type": "boolean"}', "regex": "w[0-9]", "grammar": 'start: "w"'}
# The first is refused whatever it says: the stand's model has words, which are no bytes.
_SELDOM = {"structured_output": 0.25, "adapters": 0.25}
_NAMED = frozenset({"adapter", "name", "prefix", "path", "model_name", "lora_name", "source_path"})
_EMPTY = frozenset({"page_token", "tenant", "repository_name"})  # what else they may be, a server says
_SAMPLING = {
    "temperature": "0.5", "top_p": 0.9, "top_k": "7", "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": "1",
    "frequency_penalty": 1, "seed": 5, "logit_bias": {"5": 1}, "max_tokens": 4, "min_tokens": "1", "stop": ["w9"],
    "stop_token_ids": [9], "ignore_eos": True, "n": 1, "canary_key": "somebody",
}  # fmt: skip
MAX_SIDE_BY_SIDE = 3  # requests of one stream


class Seeds:
    """`names` are the adapters that requests act on; `pushed` is a directory that may be uploaded under any name."""

    def __init__(self, names: Sequence[str], pushed: Path) -> None:
        self._names = names
        pushes = [Push.of(pushed, f"{PUSHED}{number}", pin=False, progress=None) for number in range(NUM_PUSHED)]
        self._uploads = [list(push.messages({})) for push in pushes]

    def draw(self, rng: random.Random, method: Method) -> list[Message]:
        """The messages of one call."""
        if method.request is kserve_pb2.ModelInferRequest:
            count = rng.randint(1, MAX_SIDE_BY_SIDE) if method.sends_many else 1
            return [self._inference(rng, in_pieces=method.sends_many) for _ in range(count)]
        if method.request is vllm_pb2.GenerateRequest:
            return [self._vllm_generation(rng)]
        if method.sends_many:
            return [method.request.FromString(part.SerializeToString()) for part in rng.choice(self._uploads)]
        message = method.request()
        self._fill(rng, message)
        return [message]

    def _inference(self, rng: random.Random, *, in_pieces: bool) -> kserve_pb2.ModelInferRequest:
        """With its tensors raw or not."""
        message = kserve_pb2.ModelInferRequest(model_name=rng.choice(self._names), id=f"fuzzed-{rng.getrandbits(48):x}")
        raw = rng.random() < 0.5
        for name, value in (
            ("text_input", _WORDS["text"]),
            ("sampling_parameters", json.dumps(_SAMPLING)),
            ("stream", in_pieces),
            ("exclude_input_in_output", True),
            ("return_finish_reason", True),
        ):
            _add_tensor(message, name, value, raw=raw)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        message.parameters["timeout"].int64_param = 10_000_000
        return message

    def _vllm_generation(self, rng: random.Random) -> vllm_pb2.GenerateRequest:
        """With all that is served."""
        message = vllm_pb2.GenerateRequest(
            request_id=f"fuzzed-{rng.getrandbits(48):x}",
            temperature=0.5,
            priority=1,
            session_id="somebody",
            lora_name=rng.choice(self._names),
            sampling=vllm_pb2.RandomSampling(num_sequences=1, top_k=7, top_p=0.9, min_p=0.1, seed=5),
            decoding=vllm_pb2.DecodingParameters(
                presence_penalty=1, frequency_penalty=1, repetition_penalty=1.1, logit_bias={5: 1}
            ),
            stopping=vllm_pb2.StoppingCriteria(
                max_new_tokens=4, min_new_tokens=1, stop_token_ids=[9], stop_strings=["w9"]
            ),
            response=vllm_pb2.ResponseOptions(output_token_ids=True, output_logprobs=True, prompt_token_ids=True),
        )
        message.response.output_candidates.top_n = 2
        if rng.random() < 0.5:
            message.text = _WORDS["text"]
        else:
            message.token_ids.ids.extend([3, 4, 5])
        return message

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
        if getattr(message, "adapters", None) and hasattr(message, "adapter"):
            message.ClearField("adapter")  # several stand in the place of one

    def _fill_field(self, rng: random.Random, message: Message, field: FieldDescriptor) -> None:
        there = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is None:  # parameters of the others none knows
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


def _add_tensor(message: kserve_pb2.ModelInferRequest, name: str, value: bool | str, *, raw: bool) -> None:
    tensor = message.inputs.add(name=name, datatype=BOOL if isinstance(value, bool) else BYTES, shape=[1])
    if raw:
        message.raw_input_contents.append(bytes([value]) if isinstance(value, bool) else string_bytes(value))
    elif isinstance(value, bool):
        tensor.contents.bool_contents.append(value)
    else:
        tensor.contents.bytes_contents.append(value.encode())
