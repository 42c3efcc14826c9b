import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8.formulas import (
    channel_scale,
    pack_codes,
    quantize_channels,
    round_up,
    unpack_codes,
)
from reattend.quantize.int8.transform import Int8


def test_hand_computed():
    # absmax 127 -> scale 1; ties go to even; a zero row keeps zero codes and scale 1.
    codes, scale = quantize_channels(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0]]), torch.float32)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [1.0]]


def test_round_up_by_hand():
    # bf16 has 8 significant bits: 1 + 2^-9 lies between 1 and 1 + 2^-7.
    values = torch.tensor([1.0, 1 + 2**-9, 0.0])
    assert round_up(values, torch.bfloat16).tolist() == [1.0, 1 + 2**-7, 0.0]


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([1e-6, 1e-2, 1.0, 300.0]))
def test_error_is_at_most_half_a_step(rows, columns, seed, size):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    before = w.clone()
    codes, scale = quantize_channels(w, torch.float32)
    assert torch.equal(w, before)
    assert codes.abs().max() <= 127
    exact = w.double().abs().amax(1, keepdim=True) / 127
    assert (scale.double() >= exact * (1 - 2**-23)).all()
    assert (scale.double() <= exact * (1 + 2**-6)).all()
    assert torch.equal(scale.bfloat16().float(), scale)
    assert ((codes.double() * scale.double() - w.double()).abs() <= scale / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (63, 1000), (700, 513)])
def test_codes_equal_the_fp64_reference(dtype, shape):
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    codes, scale = quantize_channels(w, dtype)
    assert torch.equal(codes, torch.round(w.double() / scale.double()).to(torch.int8))


def test_fp16_scales_survive_fp16():
    w = torch.logspace(-7, 0, 200)[:, None]
    scale = channel_scale(w, torch.float16)
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert (w <= scale * 127 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_reaches_the_scale(bad):
    w = torch.ones(3, 4)
    w[1, 2] = bad
    assert torch.isfinite(quantize_channels(w, torch.float32)[1]).flatten().tolist() == [True, False, True]


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_packed_codes_are_those_of_compressed_tensors(rows, columns, seed):
    codes = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_codes(codes)
    assert torch.equal(packed, pack_to_int32(codes, 8))
    assert torch.equal(unpack_codes(packed, torch.tensor([rows, columns])), codes)


def test_bitsandbytes_without_quantised_activations_is_refused():
    with pytest.raises(Refusal, match="activations"):
        Int8(format="bitsandbytes", activations="none").check(Source({}, None, {}, ""))
