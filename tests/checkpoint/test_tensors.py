"""Reading of tensors, against what the safetensors library wrote."""

import os

import torch
from safetensors.torch import save_file

from reattend.checkpoint.index import open_checkpoint
from reattend.checkpoint.tensors import ShardReader
from tiny_models import write_model

SHAPES = {"odd": (7,), "one": (1,), "none": (0, 4), "matrix": (33, 5), "long": (3 << 20,)}
DTYPES = [torch.bool, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]


def test_a_group_is_read_whole_into_memory_that_is_used_again(tmp_path):
    folder = tmp_path / "model"
    write_model("llama", folder)
    generator = torch.Generator().manual_seed(0)
    written = {
        f"{name}.{number}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
        for number, dtype in enumerate(DTYPES)
    }
    save_file(written, folder / "model.safetensors")
    stored = open_checkpoint(folder).tensors
    reader = ShardReader(folder)
    whole = reader.read_group([stored[name] for name in sorted(written)])
    for name, tensor in written.items():
        assert whole[name].dtype == tensor.dtype
        assert whole[name].shape == tensor.shape
        assert torch.equal(whole[name].view(torch.uint8), tensor.view(torch.uint8)), name
    first = sorted(written)[0]
    again = reader.read_group([stored["matrix.2"]])["matrix.2"]
    assert again.untyped_storage().data_ptr() == whole[first].untyped_storage().data_ptr()
    assert torch.equal(again, written["matrix.2"])
    reader.close()


def test_what_is_read_next_is_announced_to_the_last_byte_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_model("llama", folder)
    save_file(
        {"none": torch.empty(0, 3), "long": torch.zeros(3 << 18, 2), "odd": torch.zeros(5)},
        folder / "model.safetensors",
    )
    stored = open_checkpoint(folder).tensors
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: announced.append((start, length)))
    reader = ShardReader(folder)
    reader.expect([stored[name] for name in ("none", "long", "odd")])
    reader.close()
    assert all(0 < length <= 1 << 20 for _, length in announced)  # Linux heeds no more of a call
    bytes_ = {offset for start, length in announced for offset in range(start, start + length)}
    wanted = {stored[n].start + i for n in ("long", "odd") for i in range(stored[n].spec.nbytes)}
    assert bytes_ == wanted
