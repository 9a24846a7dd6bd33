"""Tensors of KServe's protocol, read and written: whatever a client puts there is one element, or refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kserve import Request, Response, add_input, infer, said

from gralora_runtime.errors import InvalidRequestError
from gralora_server.kserve.tensors import add_output, read_inputs, string_bytes

TEXTS = st.text(st.characters(codec="utf-8"))


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_texts_and_flags_are_read_both_ways(raw: bool) -> None:
    request = infer("ab\0c é", raw=raw, stream=True, exclude_input_in_output=False, sampling={"top_k": 1})

    assert read_inputs(request) == {
        "text_input": "ab\0c é",
        "sampling_parameters": '{"top_k": 1}',
        "stream": True,
        "exclude_input_in_output": False,
    }


@given(text=TEXTS, raw=st.booleans())
def test_any_text_is_read_as_it_was_written(text: str, raw: bool) -> None:
    assert read_inputs(infer(text, raw=raw)) == {"text_input": text}


@given(text=TEXTS)
def test_any_text_is_written_as_their_clients_read_it(text: str) -> None:
    response = Response()
    add_output(response, "text_output", text)
    add_output(response, "num_input_tokens", 2**32 - 1)

    assert said(response) == {"text_output": text, "num_input_tokens": 2**32 - 1}
    assert [output.datatype for output in response.outputs] == ["BYTES", "UINT32"]


@given(raw=st.binary(max_size=40))
def test_any_bytes_are_one_string_or_refused(raw: bytes) -> None:
    request = infer(None)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(raw)
    text = blamed = None
    try:
        text = read_inputs(request)["text_input"]
    except InvalidRequestError as error:
        blamed = error.field

    assert blamed == "text_input" if text is None else string_bytes(text) == raw


@pytest.mark.parametrize(
    ("name", "datatype", "raw", "problem"),
    [
        ("text_input", "BYTES", b"", "must be one string"),
        ("text_input", "BYTES", b"\1\0\0", "must be one string"),
        ("text_input", "BYTES", b"\2\0\0\0a", "must be one string"),
        ("text_input", "BYTES", string_bytes("a") + string_bytes("b"), "must be one string"),
        ("text_input", "BYTES", b"\1\0\0\0\xff", "must be UTF-8"),
        ("text_input", "BOOL", b"\1", "must be of the datatype BYTES"),
        ("stream", "BYTES", string_bytes("true"), "must be of the datatype BOOL"),
        ("stream", "BOOL", b"", "must be one byte"),
        ("stream", "BOOL", b"\1\0", "must be one byte"),
    ],
)
def test_an_input_that_is_not_one_element_of_its_type_is_refused(
    name: str, datatype: str, raw: bytes, problem: str
) -> None:
    request = Request()
    request.inputs.add(name=name, datatype=datatype, shape=[1])
    request.raw_input_contents.append(raw)
    with pytest.raises(InvalidRequestError, match=f"{name}: {problem}") as caught:
        read_inputs(request)

    assert caught.value.field == name


@pytest.mark.parametrize("shape", [[2], [0], [1, 2], [-1]])
def test_an_input_of_another_shape_is_refused(shape: list[int]) -> None:
    request = infer()
    request.inputs[0].shape[:] = shape
    with pytest.raises(InvalidRequestError, match=r"text_input: must have one element: shape \[1\]"):
        read_inputs(request)


@pytest.mark.parametrize("shape", [[], [1, 1]])
def test_one_element_is_one_in_any_number_of_dimensions(shape: list[int]) -> None:
    request = infer("a")
    request.inputs[0].shape[:] = shape

    assert read_inputs(request) == {"text_input": "a"}


def test_typed_contents_have_one_element() -> None:
    none, two = infer(raw=False), infer(raw=False)
    none.inputs[0].contents.Clear()
    two.inputs[0].contents.bytes_contents.append(b"more")
    for request in (none, two):
        with pytest.raises(InvalidRequestError, match="text_input: must have one element"):
            read_inputs(request)


def test_raw_contents_are_there_for_each_input_or_for_none() -> None:
    """As where one of them lies in shared memory, which would shift the others."""
    request = infer(stream=True)
    del request.raw_input_contents[1]
    with pytest.raises(InvalidRequestError, match="must have an entry for each input, and there are 2"):
        read_inputs(request)


def test_unknown_inputs_and_repeated_ones_are_refused() -> None:
    unknown, twice = infer(image="a"), infer()
    add_input(twice, "text_input", "again", raw=True)
    with pytest.raises(InvalidRequestError, match=r"inputs: is an input that this server does not know.*'image'"):
        read_inputs(unknown)
    with pytest.raises(InvalidRequestError, match=r"inputs: is there twice.*'text_input'"):
        read_inputs(twice)
