"""`reattend.load`: what it refuses before transformers is asked, what fails later, and where weights go."""

import gc
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, Refusal
from reattend.modeling import loading

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
    "architecture a number": (b'{"architectures": [3]}', "holds 3"),
    "a function": (b'{"architectures": ["pipeline"]}', "architecture 'pipeline' is unknown"),
    "no model": (b'{"architectures": ["AutoTokenizer"]}', "architecture 'AutoTokenizer' is unknown"),
    "no module": (b'{"architectures": ["integrations"]}', "architecture 'integrations' is unknown"),
    "another quantisation": (b'{"quantization_config": {"quant_method": "gptq"}}', "quant_method 'gptq'"),
    "no method": (b'{"quantization_config": {"bits": 4}}', "quant_method None"),
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


def changed(tmp_path, **changes):
    folder = shutil.copytree(demo.MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "nope"}, {"dtype": "foo"}, {"hidden_size": "many"}, {"hidden_size": 190}, {"vocab_size": -1},
     {"rope_parameters": {"rope_type": "nope"}}, {"num_key_value_heads": 0}, {"model_type": ["llama"]}],
    ids=str,
)  # fmt: skip
def test_what_transformers_stumbles_over_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, changes):
    folder = changed(tmp_path, **changes)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with pytest.raises(Failure) as caught:
        reattend.load(folder, offload=True)
    assert str(caught.value).startswith(f"{folder}: transformers can't load it: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not list((tmp_path / "scratch").iterdir())


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    import transformers

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reattend.load(demo.MODEL, offload=True)
    assert not list(tmp_path.iterdir())


def test_codes_that_nothing_decodes_are_refused(tmp_path):
    folder = shutil.copytree(demo.MODEL, tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=f"model.safetensors: tensor '{name}' is stored as I8.*no quantization_config"):
        reattend.load(folder)


@pytest.mark.parametrize("device", ["meta", "cpu:3", "", "disk", "cuda:99", "tpu", "cpu, please", "cuda:-1"])
def test_an_odd_device_is_refused_shortly(device):
    with pytest.raises(Refusal) as caught:
        loading.check_device(device)
    assert str(caught.value).startswith(f"device {device!r}: ")
    assert len(str(caught.value)) < 100


def test_an_odd_dtype_is_refused_alike_by_load_and_evaluate():
    for dtype in ("foo", "int8", "Tensor", "float8_e5m2", None):
        words = f"dtype {dtype!r}: expected auto, float32, bfloat16, float16 or float64"
        with pytest.raises(Refusal, match=f"^{words}$"):
            reattend.load(demo.MODEL, dtype=dtype)
        with pytest.raises(Refusal, match=f"^{words}$"):
            reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, window=64, dtype=dtype)


def test_a_scratch_folder_is_made_where_weights_are_offloaded_and_lives_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: made.append(mkdtemp(**options)) or made[-1])
    reattend.load(demo.MODEL)
    assert not made
    model, _ = reattend.load(demo.MODEL, offload=True)
    assert [Path(folder) for folder in made] == list(tmp_path.iterdir())
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_quantised_weights_are_not_offloaded_by_hand_either(tmp_path):
    folder = changed(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(Refusal, match="can't be offloaded") as caught:
        reattend.load(folder, offload=True)
    assert "fit" not in str(caught.value)


def test_weights_go_to_the_asked_device_and_the_cpu_alone(monkeypatch):
    free = {"cuda:1": 1_000, "cpu": 10_000}
    monkeypatch.setattr(loading, "free_bytes", free.__getitem__)
    places = loading._placement(open_checkpoint(demo.MODEL), "auto", "cuda:1", None)
    assert places == {"device_map": "auto", "max_memory": {1: 800, "cpu": 8_000}}


def test_a_packed_word_is_four_numbers(tmp_path):
    folder = Path(shutil.copytree(demo.MODEL, tmp_path / "model"))
    words = {"a.weight_packed": torch.zeros(10, 5, dtype=torch.int32)}
    save_file(words, folder / "model.safetensors", {"format": "pt"})
    groups = {"group_0": {"weights": {"num_bits": 8}}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert loading._load_bytes(checkpoint, "auto") == 10 * 5 * 4 * 2
    assert loading._load_bytes(checkpoint, "float32") == 10 * 5 * 4 * 4


@pytest.mark.parametrize("recipe", ["int8", "int8-weights", "int8-bitsandbytes"])
def test_int8_runs_on_our_kernels_and_gives_what_stock_gives(tmp_path, recipe):
    from reattend.modeling.int8 import on_kernels

    reattend.apply(recipe, demo.MODEL, tmp_path / "out")
    ids = torch.arange(48)[None]
    with torch.inference_mode():
        ours, stock = (reattend.load(tmp_path / "out", dtype="float32", runtime=r).model for r in ("auto", "stock"))
        assert (on_kernels(ours), on_kernels(stock)) == (True, False)
        error = (ours(ids).logits - stock(ids).logits).norm() / stock(ids).logits.norm()
    # compressed-tensors simulates activations with absmax / 127.5, bitsandbytes computes in fp16.
    assert error < {"int8": 0.01, "int8-weights": 1e-4, "int8-bitsandbytes": 0.02}[recipe]
