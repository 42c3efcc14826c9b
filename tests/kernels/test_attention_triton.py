"""The Triton route of attention: in the interpreter, and what it declines."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from interpreter import run_in_interpreter

from reattend.kernels import launching
from reattend.kernels.attention import (
    Options,
    attention,
    kernel,
    kernel_backward,
    kernel_decode,
    kernel_tiles,
    triton_route,
)


def test_triton_in_the_interpreter():
    printed = run_in_interpreter("attention_triton_cases.py")
    forward, backward, decode = (int(count) for count in printed.split()[:6:2])
    assert forward > 50, printed
    assert backward > 40, printed
    assert decode > 25, printed


def case(width=64, wide=64, dtype=torch.float16):
    return [torch.zeros(1, 2, 3, size, dtype=dtype) for size in (width, width, wide)]


@pytest.fixture
def anywhere(monkeypatch):
    """As if every tensor were on a GPU that will do."""
    monkeypatch.setattr(triton_route, "_unable", lambda query: None)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (case(), Options(causal=False, mask=torch.ones(1, 1, 3, 3, dtype=torch.bool)), "no mask, only ranges"),
        (case(dtype=torch.float64), Options(), r"torch.float64, not fp32, fp16 or bf16"),
        (case(width=257), Options(), "257 and 64 numbers wide, not 1 to 256"),
        (case(wide=264), Options(), "64 and 264 numbers wide"),
        (case(wide=0), Options(), "64 and 0 numbers wide"),
        (case(), Options(slopes=torch.ones(2, requires_grad=True)), "no gradient of slopes"),
        (case(), Options(gamma=torch.zeros(2, requires_grad=True)), "no gradient of gamma"),
        ([torch.zeros(1, 1, 1, 1).half().expand(65536, -1, -1, -1)] * 3, Options(), "more than 65535 sequences"),
    ],
    ids=str,
)
def test_what_it_declines(tensors, options, words):
    with pytest.raises(RuntimeError, match=words):
        attention(*tensors, options, backend="triton")


@pytest.mark.usefixtures("anywhere")
def test_what_it_takes():
    sinks = torch.ones(2, requires_grad=True)
    fixed = torch.ones(2, requires_grad=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for widths in ((1, 1), (256, 256), (192, 128)):
            assert triton_route.unfit(*case(*widths, dtype), Options(sinks=sinks, softcap=3.0, window=2)) is None
    with torch.no_grad():
        assert triton_route.unfit(*case(), Options(slopes=fixed)) is None
        assert triton_route.unfit(*case(), Options(gamma=fixed, zeta=1.1)) is None


def test_devices(monkeypatch):
    assert triton_route.unfit(*case(), Options()) == "tensors are on cpu"
    card = SimpleNamespace(is_cuda=True, device="cuda:1", dtype=torch.float16)
    for capability, reason in (
        ((7, 5), "the GPU's compute capability is below 8.0"),
        ((8, 0), None),
        ((12, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.get)
        assert triton_route._unable(card) == reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_route._unable(card) == "its tiles are made for NVIDIA GPUs"


def test_tensors_are_copied_where_tiles_would_not_reach():
    for shape, strides, copied in (
        ((2, 3, 500, 64), (64, 128, 1 << 23, 1), False),
        ((2, 3, 500, 64), (64, 128, (1 << 23) + 1, 1), True),
        ((2, 3, 500, 64), (96000, 32000, 1, 500), True),
        ((2, 3, 500, 64), (0, 0, 0, 1), False),
    ):
        tensor = torch.empty(0, device="meta").as_strided(shape, strides)
        assert launching.readable(tensor).stride() == ((96000, 32000, 64, 1) if copied else strides)


def test_tiles_are_no_wider_than_they_must_be():
    for width in range(1, 257):
        tile = kernel_tiles.chunks(width)
        assert set(tile) <= {0, 16, 32, 64, 128}
        assert tile[0]
        assert kernel_tiles.padded(width) == sum(tile) >= width
        assert sum(tile) - width < max(16, sum(tile) / 3)
        parts, share = kernel.value_parts(width)
        assert parts == 1 + (width > 128)
        assert share <= 128
        # No part is without values.
        assert (parts - 1) * share < width <= parts * share < width + 32


@pytest.mark.parametrize(
    ("width", "tile"),
    [(64, (64, 0)), (40, (32, 16)), (72, (64, 16)), (96, (64, 32)), (128, (64, 64)), (192, (128, 64))],
)
def test_tiles_by_hand(width, tile):
    assert kernel_tiles.chunks(width) == tile


def test_which_tile_a_call_gets():
    slopes = torch.zeros(2)

    def chosen(options=Options(), **sizes):  # noqa: B008
        query, _, value = case(**sizes)
        return kernel.config_for(query, value, options)

    assert chosen(width=64) == chosen(width=128, wide=256) == kernel._ROOMY
    assert chosen(Options(sinks=slopes, window=3), width=128) == kernel._ROOMY
    for options in (Options(softcap=1.0), Options(slopes=slopes), Options(zeta=1.1)):
        assert chosen(options) == kernel._TIGHT
    assert chosen(width=72) == chosen(wide=130) == chosen(width=96, wide=128) == kernel._TIGHT
    assert chosen(width=192) == chosen(width=256, wide=256) == kernel._WIDE
    assert chosen(width=64, dtype=torch.float32) == chosen(wide=256, dtype=torch.float32) == kernel._FP32
    few, many, single = kernel_decode.CONFIGS[128]
    assert [kernel_decode.config_for(rows, 96, torch.float16) for rows in (16, 17)] == [few, many]
    assert kernel_decode.config_for(1, 128, torch.float32) == single
    queries, _, keys, _ = kernel_backward.CONFIGS[128]
    assert kernel_backward.configs_for(32, torch.bfloat16, True) == (kernel_backward.CONFIGS[32][0], keys, keys)
    assert kernel_backward.configs_for(128, torch.bfloat16, False) == (queries, keys, keys)
    assert kernel_backward.configs_for(80, torch.bfloat16, True) == (queries, keys, kernel.Config(32, 128, 8, 1))
    assert kernel_backward.configs_for(129, torch.float32, True)[2] == kernel_backward.CONFIGS[256][3]
    assert [kernel_backward.is_split(width, torch.float16) for width in (64, 65, 128, 129)] == [
        False,
        True,
        True,
        False,
    ]


def test_parts_of_keys():
    config = kernel.Config(16, 64, 4, 3)
    assert kernel_decode._parts(64, 1, config) == 1
    assert kernel_decode._parts(65, 1, config) == 2
    assert kernel_decode._parts(1 << 20, 8, config) == kernel_decode._PROGRAMS // 8
    assert kernel_decode._parts(1 << 20, 10000, config) == 1
