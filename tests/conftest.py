"""Models that tests share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

import reattend
from tiny_models import write_model

# The machines that run this are shared: a slow example is no finding.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws is the same in every run: one that fails by chance says nothing."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = write_model(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def sound(models, tmp_path_factory) -> Path:
    """The tiny llama in int8, of an undisturbed run and verified: an output with these bytes is as good."""
    out = tmp_path_factory.mktemp("sound") / "out"
    reattend.apply("int8", models("llama"), out)
    assert reattend.verify(out)["problems"] == []
    return out
