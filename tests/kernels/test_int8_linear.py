"""int8_linear on the CPU against its reference, whose sums are fp64."""

import contextlib
import copy
import logging
import os
import subprocess
import sys

import pytest
import torch

from reattend.kernels import int8_linear as op
from reattend.kernels.int8_linear import Outliers, cpu, int8_linear, native, reference

BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(bool(native.unavailable()), reason="no native"))]
# Relative L2. fp32: one chain of 4097 sums (2^-24 sqrt(4097) = 4e-6); 16 bit: the rounding of the result, and for bf16 a second one in the packed route.
LIMITS = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SHAPES = [
    (1, 1, 1),
    (1, 33, 5),
    (3, 100, 17),
    (6, 64, 16),
    (7, 64, 16),
    (12, 191, 70),
    (63, 130, 35),
    (100, 575, 33),
    (13, 4097, 20),
]


# Hosts with AVX512 must also be right with the instructions of those without.
WIDE = not native.unavailable() and (native.has_vnni() or native.has_bf16())
INSTRUCTIONS = ["best", "avx2"] if WIDE else ["best"]


@pytest.fixture(autouse=True, params=INSTRUCTIONS)
def _instructions(request, monkeypatch):
    if request.param == "avx2":
        monkeypatch.setattr(native, "has_vnni", lambda: False)
        monkeypatch.setattr(native, "has_bf16", lambda: False)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    real = torch.empty

    def empty(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(99)

    monkeypatch.setattr(torch, "empty", empty)


def layer(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    return codes, torch.rand(outputs, generator=generator) * 0.01 + 1e-4, torch.randn(outputs, generator=generator)


def rows(count, inputs, dtype=torch.float32, seed=1):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, shape, dtype):
    count, inputs, outputs = shape
    codes, scale, bias = layer(outputs, inputs)
    x = rows(count, inputs, dtype)
    for given in (None, bias):
        got = int8_linear(x, codes, scale, given, backend=backend)
        assert got.dtype == dtype
        assert relative(got, reference.w8a8(x, codes, scale, given)) < LIMITS[dtype]
        got = int8_linear(x, codes, scale, given, activations="none", backend=backend)
        assert relative(got, reference.w8a16(x, codes, scale, given)) < LIMITS[dtype]


@pytest.mark.parametrize("count", [1, 3, 63])
@pytest.mark.parametrize("columns", [[5], [0, 7, 8, 99], list(range(50)), list(range(100))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_static_outliers(backend, columns, count):
    codes, scale, bias = layer(35, 100)
    x = rows(count, 100)
    x[:, columns] *= 30
    outliers = Outliers(torch.tensor(columns), rows(35, len(columns), seed=3))
    got = int8_linear(x, codes, scale, bias, outliers=outliers, backend=backend)
    assert relative(got, reference.w8a8(x, codes, scale, bias, outliers)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_static_outliers_leave_rows_independent(backend):
    codes, scale, bias = layer(35, 100)
    x = rows(20, 100)
    outliers = Outliers(torch.tensor([3]), rows(35, 1, seed=3))
    whole = int8_linear(x, codes, scale, bias, outliers=outliers, backend=backend)
    alone = torch.cat([int8_linear(r, codes, scale, bias, outliers=outliers, backend=backend) for r in x.split(1)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


def test_dynamic_outliers_are_at_or_over_the_threshold():
    x = torch.tensor([[1.0, 6.0, -7.0, 5.99], [0.0, 0.0, 0.0, -5.99]])
    assert reference.outlier_columns(x, 6.0).tolist() == [1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_outliers(backend):
    codes, scale, bias = layer(35, 100)
    for factor in (0.1, 30):  # none, and one column
        x = rows(9, 100)
        x[2, 4] = 2 * factor
        got = int8_linear(x, codes, scale, bias, threshold=6.0, backend=backend)
        want = reference.w8a8(x, codes, scale, bias, reference.dynamic_outliers(x, codes, scale, 6.0))
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 4, 30])
def test_zero_rows_give_the_bias_and_bad_rows_nan(backend, count):
    codes, scale, bias = layer(19, 64)
    x = rows(count + 3, 64)
    x[0], x[1, 5], x[2, 6] = 0, torch.nan, -torch.inf
    y = int8_linear(x, codes, scale, bias, backend=backend)
    assert torch.equal(y[0], bias)
    assert y[1:3].isnan().all()
    assert y[3:].isfinite().all()
    assert int8_linear(x[:1], codes, scale, bias, backend=backend).equal(bias[None])


@pytest.mark.skipif(bool(native.unavailable()), reason="no native")
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_exact_at_full_range(count, sign):
    # All-127 operands are what saturates in 16-bit pair sums; as many as fit also wrap sums of unsigned bytes.
    x = torch.full((count, native.MAX_INPUTS), 127.0)
    codes = torch.full((17, native.MAX_INPUTS), 127 * sign, dtype=torch.int8)
    y = int8_linear(x, codes, torch.ones(17), backend="native")
    assert torch.equal(y, torch.full_like(y, float(127 * 127 * native.MAX_INPUTS * sign)))


def test_any_leading_shape_and_strides():
    codes, scale, bias = layer(8, 32)
    x = rows(2 * 3 * 5, 64).reshape(2, 3, 5, 64)[..., ::2]
    y = int8_linear(x, codes, scale, bias)
    assert y.shape == (2, 3, 5, 8)
    assert relative(y.reshape(-1, 8), reference.w8a8(x.reshape(-1, 32), codes, scale, bias)) < 1e-6
    sliced = rows(6, 64)[:, 16:48]  # rows a stride apart, as a fused projection leaves them
    assert relative(int8_linear(sliced, codes, scale), reference.w8a8(sliced, codes, scale)) < 1e-6
    assert int8_linear(rows(0, 32), codes, scale).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_outliers_as_slices_leave_them(backend):
    codes, scale, bias = layer(12, 48)
    bias, weight = bias.repeat_interleave(2)[::2], torch.randn(3, 12).T
    outliers = Outliers(torch.tensor([2, 1 << 40, 9, 1 << 40, 40])[::2], weight)
    x = rows(7, 48)
    want = reference.w8a8(x, codes, scale, bias, outliers)
    assert relative(int8_linear(x, codes, scale, bias, outliers=outliers, backend=backend), want) < 1e-6


def test_quantised_rows_by_hand():
    codes, scale = reference.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0]]))
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_scales_and_their_inverses_are_rounded_once():
    """At ties, where an ulp of the inverse is another code."""
    absmax = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    x = torch.cat([absmax, (torch.arange(126) + 0.5) * absmax / 127], 1)
    codes, scale = reference.quantize_rows(x)
    inverse = (127 / absmax.double()).float()
    assert torch.equal(codes, (x * inverse).round().to(torch.int8))
    assert torch.equal(scale, (absmax[:, 0].double() / 127).float())


def test_planted_outliers():
    # Three channels scaled x20: one code step of a row grows with its largest number.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=generator)
    weight = torch.randn(1024, 1024, generator=generator) * 0.02
    columns = torch.tensor([10, 400, 800])
    x[:, columns] *= 20
    codes, scale = reference.quantize_rows(weight)
    want = x.double() @ weight.double().T
    static = int8_linear(x, codes, scale, outliers=Outliers(columns, weight[:, columns]))
    dynamic = int8_linear(x, codes, scale, threshold=6.0)
    assert 0.035 < relative(int8_linear(x, codes, scale), want) < 0.055
    assert relative(static, want) < 0.01
    assert relative(dynamic, want) < 0.01
    assert relative(static, want) < relative(dynamic, want)


def test_close_to_bitsandbytes(tmp_path):
    with (tmp_path / "chatter").open("w") as chatter, contextlib.redirect_stdout(chatter):
        functional = pytest.importorskip("bitsandbytes").functional
        codes, scale, _ = layer(24, 64)
        for count, threshold in ((1, 0.0), (9, 0.0), (1, 6.0)):
            x = rows(count, 64, torch.float16)
            x[0, 3] = 9 if threshold else 1
            x_codes, stats, columns = functional.int8_vectorwise_quant(x, threshold=threshold)
            sums = functional.int8_linear_matmul(x_codes, codes)
            want = functional.int8_mm_dequant(sums, stats, scale * 127).float()
            if columns is not None:
                want += x[:, columns].float() @ (codes[:, columns].float() * scale[:, None]).T
            got = int8_linear(x.float(), codes, scale, threshold=threshold or None)
            assert relative(got, want) < 1e-3  # theirs rounds to fp16


@pytest.mark.skipif(not cpu.has_vnni(), reason="needs VNNI")
def test_packed_copy_follows_its_codes():
    codes, scale, _ = layer(24, 64)
    x = rows(40, 64)
    int8_linear(x, codes, scale, backend="torch")
    codes.neg_()
    assert relative(int8_linear(x, codes, scale, backend="torch"), reference.w8a8(x, codes, scale)) < 1e-6


def test_wrong_inputs_are_refused():
    codes, scale, bias = layer(8, 32)
    x = rows(2, 32)
    for match, call in {
        "not fp32": lambda: int8_linear(x.double(), codes, scale),
        "int8 matrix": lambda: int8_linear(x, codes.float(), scale),
        "contiguous": lambda: int8_linear(rows(2, 8), codes.T, torch.ones(32)),
        "does not fit codes": lambda: int8_linear(rows(2, 31), codes, scale),
        "scale must be": lambda: int8_linear(x, codes, scale[:7]),
        "bias": lambda: int8_linear(x, codes, scale, bias[:7]),
        "activations=": lambda: int8_linear(x, codes, scale, activations="int4"),
        "backend=": lambda: int8_linear(x, codes, scale, backend="cuda"),
        "belong to": lambda: int8_linear(x, codes, scale, activations="none", threshold=6.0),
        "exclude": lambda: int8_linear(
            x, codes, scale, threshold=6.0, outliers=Outliers(torch.tensor([0]), rows(8, 1))
        ),
        "number of columns": lambda: int8_linear(x, codes, scale, outliers=Outliers(torch.tensor([0]), rows(8, 2))),
        "outside": lambda: int8_linear(x, codes, scale, outliers=Outliers(torch.tensor([32]), rows(8, 1))),
        "not positive": lambda: int8_linear(x, codes, scale, threshold=-1.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_auto_says_once_what_it_took(caplog):
    op._log_once.cache_clear()
    op._route.cache_clear()
    codes, scale, _ = layer(8, 32)
    with caplog.at_level(logging.INFO, "reattend.kernels.int8_linear"):
        int8_linear(rows(2, 32), codes, scale)
        int8_linear(rows(3, 32), codes, scale)
    assert len(caplog.records) == 1
    assert "because" in caplog.text


def test_without_a_compiler_auto_takes_torch_and_native_raises():
    code = (
        "import torch; from reattend.kernels.int8_linear import int8_linear, _fastest\n"
        "print(_fastest('cpu', 32))\n"
        "int8_linear(torch.ones(2, 32), torch.ones(4, 32, dtype=torch.int8), torch.ones(4), backend='native')"
    )
    environment = os.environ | {"PATH": "", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "('torch'" in run.stdout
    assert "RuntimeError: int8_linear: backend 'native' can't run" in run.stderr


def test_helpers_do_not_write_to_their_inputs():
    codes, scale, bias = layer(8, 32)
    x = rows(4, 32)
    before = copy.deepcopy((x, codes, scale, bias))
    for backend in ("torch", "auto"):
        int8_linear(x, codes, scale, bias, threshold=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((x, codes, scale, bias), before, strict=True))
