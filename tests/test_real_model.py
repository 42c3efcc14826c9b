"""int8 on the real SmolLM2-135M-Instruct, where REATTEND_REAL_MODEL names the folder that scripts/fetch_real_model made."""

import os
from pathlib import Path

import pytest

import reattend
from reattend import demo

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def source():
    named = os.environ.get("REATTEND_REAL_MODEL")
    if not named:
        pytest.skip("REATTEND_REAL_MODEL names no folder: scripts/fetch_real_model makes one")
    return Path(named)


@pytest.fixture(scope="module", params=["int8", "int8-bitsandbytes"])
def output(request, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / request.param
    reattend.apply(request.param, source, out)
    return out


def tensor_bytes(folder):
    """Bytes of all tensors: the file less its header, whose length its first eight bytes hold."""
    path = folder / "model.safetensors"
    with path.open("rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def test_size(source, output):
    # 106 of the 134.5 million parameters are in linear layers: (28.3 * 2 + 106.2) / (134.5 * 2), and the scales.
    assert 0.6 < tensor_bytes(output) / tensor_bytes(source) <= 0.62


def test_verified(source, output):
    assert reattend.verify(output, against=source)["problems"] == []


def test_perplexity(source, output):
    report = reattend.evaluate(output, demo.EVAL_TEXT, against=source, window=512, windows=4, dtype="float32")
    assert 10 < report["base_perplexity"] < 60
    assert abs(report["delta"]) < 0.05 * report["base_perplexity"]
    assert 0 < report["kl_mean"] < 0.1
    assert report["top1_agreement"] > 0.85
