"""What the steps that write the portable model have in common: all but what each of them changes."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from reattend.convert.portable.form import check_portable, code_files, portable_config
from reattend.families.source import Source
from reattend.transform import Group, Passes, Statistics

_Step = TypeVar("_Step", bound="PortableStep")


class PortableStep(BaseModel):
    """A step without calibration that keeps every tensor; see `Transform` for the methods."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str

    @property
    def tolerance(self) -> float:
        """The same computation: what rounding in another order may leave."""
        return 1e-5

    @property
    def texts(self) -> tuple[str, ...]:
        """None are needed."""
        return ()

    def check(self, source: Source) -> list[str]:
        """Refuse a source without a portable form."""
        check_portable(source, self.step)
        return ["the output holds code of its own: stock transformers loads it with trust_remote_code=True"]

    def parts(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the keys of the config that the step adds."""
        return {}

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Learn nothing."""

    def statistics_bytes(self, source: Source) -> int:
        """The code that goes along, at most."""
        return 1 << 17

    @property
    def undecided(self) -> bool:
        """What is written to the weights depends on no calibration."""
        return False

    def settled(self: _Step, findings: Mapping[str, Any]) -> _Step:
        """Return the step."""
        return self

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield nothing: every tensor is kept."""
        yield from ()

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Raise: there are no groups."""
        raise AssertionError(group)

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the portable config with the step's parts."""
        return portable_config(source, self.parts(source, statistics))

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield the code."""
        yield from code_files(source)

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def engines(self, source: Source) -> dict[str, str]:
        """Engines run it through their transformers backends."""
        backend = "through its transformers backend, with trust_remote_code; not run here"
        return {"transformers": "yes, with trust_remote_code=True", "vllm": backend, "sglang": backend}
