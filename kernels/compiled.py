"""C sources of kernels, built once with the host's compiler and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

_FLAGS = ("-O3", "-mavx2", "-mfma", "-mf16c", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def unavailable(source: Path) -> str | None:
    """Return why this host can't run a compiled source, or None; compiles on the first call."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        return "native code is for x86-64 on POSIX systems"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the CPU has no AVX2"
    if _compiler() is None:
        return "no C compiler (cc, gcc or clang) is on the path"
    try:
        library(source)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"native.c could not be built: {str(getattr(error, 'stderr', None) or error).strip()[:300]}"
    return None


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """Return the library of a source and the headers beside it, from the user's cache or built into it."""
    compiler = str(_compiler())
    code = {file.name: file.read_bytes() for file in [source, *sorted(source.parent.glob("*.h"))]}
    key = hashlib.sha256(repr((code, compiler, _FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reattend"
    built = cache / f"{source.parent.name}-{key}.so"
    if not built.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _build(compiler, code, source.name, Path(folder)).replace(built)
    return ctypes.CDLL(str(built))


def _build(compiler: str, files: Mapping[str, bytes], source: str, folder: Path) -> Path:
    code, unit, made = folder / source, folder / "native.o", folder / "native.so"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # Torch's own OpenMP library: a second one would start threads that fight torch's for the cores.
    lib = Path(torch.__file__).parent
    found = [*lib.glob("lib/libgomp*.so*"), *lib.parent.glob("torch.libs/libgomp*.so*")]
    openmp = str(found[0]) if found else "-lgomp"
    for command in ((*_FLAGS, "-c", code, "-o", unit), ("-shared", unit, openmp, "-lm", "-o", made)):
        subprocess.run([compiler, *map(str, command)], check=True, capture_output=True, text=True)
    return made
