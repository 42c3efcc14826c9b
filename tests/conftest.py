"""Models that tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

from tiny_models import write_model

# The machines that run this are shared: a slow example is no finding.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = write_model(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get
