"""The compiled CPU route: `native.c`, built once with the host's C compiler, called through ctypes.

Torch's own operators are wrong or slow on x86 hosts without VNNI: `qlinear` saturates at full-range codes,
`_int_mm` is scalar code, `_weight_int8pack_mm` is quick for bf16 alone and returns bf16.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from reattend.kernels.int8_linear.reference import Outliers

_FLAGS = ("-O3", "-mavx2", "-mfma", "-mf16c", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Above this, packing W into panels costs less than reading each of its rows again per row of x (measured).
FEW_ROWS = 6
# An exact int32 sum of products of codes: I * 127^2 < 2^31.
MAX_INPUTS = 133_144
# Below this many products a second thread costs more than it saves.
_THREAD_PRODUCTS = 1 << 17


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "bias", "columns", "slice", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "outliers", "stride_x")),
        *((name, ctypes.c_int) for name in ("dtype", "quantize", "threads")),
    )


@functools.cache
def unavailable() -> str | None:
    """Return why this host can't run the compiled route, or None; compiles on the first call."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        return "native code is for x86-64 on POSIX systems"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the CPU has no AVX2"
    if _compiler() is None:
        return "no C compiler (cc, gcc or clang) is on the path"
    try:
        _library()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"native.c could not be built: {str(getattr(error, 'stderr', None) or error).strip()[:300]}"
    return None


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("native.c").read_bytes()
    compiler = str(_compiler())
    key = hashlib.sha256(repr((source, compiler, _FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reattend"
    built = cache / f"int8_linear-{key}.so"
    if not built.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _build(compiler, source, Path(folder)).replace(built)
    library = ctypes.CDLL(str(built))
    library.reattend_int8_linear.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


def _build(compiler: str, source: bytes, folder: Path) -> Path:
    code, unit, library = folder / "native.c", folder / "native.o", folder / "native.so"
    code.write_bytes(source)
    # Torch's own OpenMP library: a second one would start threads that fight torch's for the cores.
    lib = Path(torch.__file__).parent
    found = [*lib.glob("lib/libgomp*.so*"), *lib.parent.glob("torch.libs/libgomp*.so*")]
    openmp = str(found[0]) if found else "-lgomp"
    for command in ((*_FLAGS, "-c", code, "-o", unit), ("-shared", unit, openmp, "-lm", "-o", library)):
        subprocess.run([compiler, *map(str, command)], check=True, capture_output=True, text=True)
    return library


def too_wide(inputs: int) -> str | None:
    """Return why rows of this many inputs can't go the compiled route, or None."""
    return f"more than {MAX_INPUTS} inputs overflow an int32 sum" if inputs > MAX_INPUTS else None


def int8_linear(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, outliers: Outliers | None, quantize: bool
) -> Tensor:
    """Both forms of the linear in one call: quantisation, product, epilogue, outliers. Returns (M, O)."""
    rows, inputs = x_MI.shape
    outputs = codes_OI.shape[0]
    y_MO = torch.empty(rows, outputs, dtype=x_MI.dtype)
    if rows == 0 or outputs == 0:
        return y_MO
    bias = bias_O if bias_O is None else bias_O.float().contiguous()
    columns, weight = (None, None) if outliers is None else outliers
    weight = None if weight is None else weight.float().contiguous()
    threads = torch.get_num_threads() if rows * inputs * outputs >= _THREAD_PRODUCTS else 1
    linear = _Linear(
        x_MI.data_ptr(), codes_OI.data_ptr(), scale_O.data_ptr(),
        None if bias is None else bias.data_ptr(), None if columns is None else columns.data_ptr(),
        None if weight is None else weight.data_ptr(), y_MO.data_ptr(),
        rows, inputs, outputs, 0 if columns is None else len(columns), x_MI.stride(0),
        _DTYPES[x_MI.dtype], quantize, threads,
    )  # fmt: skip
    if _library().reattend_int8_linear(ctypes.addressof(linear), FEW_ROWS):
        raise MemoryError("int8_linear: no memory for the scratch of one call")
    return y_MO
