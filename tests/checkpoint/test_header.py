import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reattend import Refusal
from reattend.checkpoint.header import BITS, TensorSpec, read_header, render_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def parse(data: bytes):
    return read_header(lambda start, length: data[start : start + length], len(data), "file")


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


BAD = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond file": pack({}, length=99),
    "huge length": pack({}, length=2**63),
    "not JSON": pack(b"{"),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "list": pack([]),
    "NaN": pack(b'{"a": NaN}'),
    "deep": pack(b'{"a":' + b"[" * 100_000),
    "twice": pack(b'{"a": 1, "a": 2}'),
    "entry no map": pack({"a": 1}),
    "missing key": pack({"a": {"dtype": "F32", "shape": [2]}}, b"0" * 8),
    "extra key": pack({"a": ONE | {"x": 1}}, b"0" * 8),
    "unknown dtype": pack({"a": ONE | {"dtype": "F33"}}, b"0" * 8),
    "dtype no string": pack({"a": ONE | {"dtype": ["F32"]}}, b"0" * 8),
    "negative shape": pack({"a": ONE | {"shape": [-2]}}, b"0" * 8),
    "boolean shape": pack({"a": ONE | {"shape": [True, 2]}}, b"0" * 8),
    "float shape": pack({"a": ONE | {"shape": [2.0]}}, b"0" * 8),
    "overflowing shape": pack({"a": ONE | {"shape": [2**70]}}, b"0" * 8),
    "offsets reversed": pack({"a": ONE | {"data_offsets": [8, 0]}}, b"0" * 8),
    "one offset": pack({"a": ONE | {"data_offsets": [8]}}, b"0" * 8),
    "size disagrees": pack({"a": ONE | {"shape": [3]}}, b"0" * 8),
    "truncated data": pack({"a": ONE}, b"0" * 7),
    "trailing data": pack({"a": ONE}, b"0" * 9),
    "overlap": pack({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, b"0" * 12),
    "hole": pack({"a": ONE, "b": ONE | {"data_offsets": [9, 17]}}, b"0" * 17),
    "metadata": pack({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_header_is_refused_with_the_file(data):
    with pytest.raises(Refusal, match=r"^file: "):
        parse(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_or_refused(data):
    for candidate in (data, pack(data), pack({"a": ONE}, data)):
        try:
            header = parse(candidate)
        except Refusal:
            continue
        assert sum(t.spec.nbytes for t in header.tensors) <= len(candidate)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), x))  # fmt: skip


@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), JSON, max_size=3))
def test_any_json_is_parsed_or_refused(header):
    message = "file: parsed"
    try:
        parse(pack(header))
    except Refusal as refusal:
        message = str(refusal)
    assert message.startswith("file: ")


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "s": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    header = parse(data)
    assert header.metadata == {"format": "pt"}
    assert {t.spec.name: t.spec.shape for t in header.tensors} == {"a": (2, 3), "b": (5,), "s": ()}
    place = {t.spec.name: t.start for t in header.tensors}
    assert data[place["a"] : place["a"] + 48] == tensors["a"].numpy().tobytes()


def test_safetensors_reads_what_we_write_whatever_the_order(tmp_path):
    specs = [TensorSpec("odd", "U8", (3,)), TensorSpec("b", "F32", (2,)), TensorSpec("none", "F16", (0, 4))]
    header, starts = render_header(specs, {"format": "pt"})
    data = bytearray(header + bytes(11))
    data[starts["odd"] : starts["odd"] + 3] = b"\1\2\3"
    (tmp_path / "x.safetensors").write_bytes(data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["odd"].tolist() == [1, 2, 3]
    assert loaded["none"].shape == (0, 4)
    assert all(start * 8 % BITS[s.dtype] == 0 for s in specs if (start := starts[s.name]) >= 0)
