"""`reattend.load` on folders that it must refuse before transformers is asked."""

import shutil

import pytest

import reattend
from reattend import demo
from reattend.errors import Refusal

BAD_CONFIGS = {
    "missing": (None, "has no config.json"),
    "a list": (b"[]", "not a JSON object"),
    "a number": (b"3", "not a JSON object"),
    "not UTF-8": ('{"model_type": "llama", "note": "\u00e9"}'.encode("latin-1"), "UTF-8"),
    "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "UTF-8"),
    "cut short": (b'{"model_type": "llama"', "JSON"),
    "empty": (b"", "JSON"),
    "architectures a number": (b'{"architectures": 3}', "architectures is not a list"),
    "quantisation a word": (b'{"quantization_config": "int8"}', "quantization_config is not a dict"),
    "nested": (b"[" * 100_000, "nested"),
}


@pytest.mark.parametrize(("data", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_one_line(tmp_path, data, words):
    folder = shutil.copytree(demo.MODEL, tmp_path / "model")
    (folder / "config.json").unlink()
    if data is not None:
        (folder / "config.json").write_bytes(data)
    with pytest.raises(Refusal, match=words) as caught:
        reattend.load(folder)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no/such/folder", "absent", "./absent", demo.MODEL / "config.json"])
def test_what_is_no_folder_is_refused(path):
    with pytest.raises(Refusal, match="not a folder"):
        reattend.load(path)


def test_a_good_folder_loads():
    model, tokenizer = reattend.load(demo.MODEL, dtype="float32")
    assert model.config.num_hidden_layers == 5
    assert tokenizer.decode(tokenizer("the river").input_ids) == "the river"
