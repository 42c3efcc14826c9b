"""An output with its report, which tests of reports share."""

import shutil
from pathlib import Path

import pytest

import reattend

SOURCE_CARD = """---
license: other
license_name: community
license_link: LICENSE.txt
language: [en, fr]
datasets: [org/text]
base_model: other/parent
model-index: [{name: parent, results: []}]
tags: [conversational]
---

# The source
"""


@pytest.fixture(scope="session")
def told(models, tmp_path_factory) -> Path:
    """The tiny llama in int8, of a source with card and licence, compared with it; not to be changed."""
    place = tmp_path_factory.mktemp("told")
    source = shutil.copytree(models("llama"), place / "source")
    (source / "README.md").write_text(SOURCE_CARD)
    (source / "LICENSE.txt").write_text("the terms")
    (source / "NOTICE").write_text("notice")
    reattend.apply("int8", source, place / "out")
    reattend.report(place / "out", against=source, base="org/source")
    return place / "out"
