"""How candidates are timed on a device, and how wrong ones are refused."""

import statistics
import time
from collections.abc import Callable

import torch

# Relative L2: the rounding of the result, and codes that differ by one where 127 / absmax rounds differently.
LIMITS = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}
MOST_SECONDS = 0.2  # that one candidate's calls take in a turn

Calls = dict[str, Callable[[], object]]


class Bench:
    """The device, and how calls are timed on it."""

    def __init__(self, device: str, runs: int) -> None:
        self.device, self.runs = device, runs
        self.generator = torch.Generator(device=device).manual_seed(0)
        # The interpreter computes bf16 products wrongly.
        self.dtypes = [torch.float16, torch.float32, *([torch.bfloat16] if device == "cuda" else [])]
        self.timed = torch.bfloat16 if device == "cuda" else torch.float16

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def codes(self, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random codes and scales of a layer."""
        size = (outputs, inputs)
        codes = torch.randint(-127, 128, size, dtype=torch.int8, generator=self.generator, device=self.device)
        return codes, torch.rand(outputs, generator=self.generator, device=self.device) * 0.01

    def medians(self, calls: Calls) -> dict[str, float]:
        """Milliseconds per call of each candidate."""
        repeats = {name: self._repeats(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.runs):
            for name, call in calls.items():
                times[name].append(self._time(call, repeats[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def _repeats(self, call: Callable[[], object]) -> int:
        call()  # compiles
        once = max(self._time(call, 3), 1e-3)
        return int(max(1, min(1000, MOST_SECONDS * 1e3 / once)))

    def _time(self, call: Callable[[], object], repeats: int) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) * 1e3 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / repeats


def check(got: torch.Tensor, want: torch.Tensor, what: object, limit: float | None = None) -> None:
    """Refuse to time anything that is wrong."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error < (limit or LIMITS[got.dtype]):
        raise SystemExit(f"wrong: {what}: differs by {error:.1e} of its norm")
