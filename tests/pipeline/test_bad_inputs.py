"""Inputs that must be refused in one line, with nothing written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import reattend
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.cli import cli
from reattend.errors import Refusal
from reattend.recipes.schema import step_class
from tiny_models import write_model

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def raw_config(data):
    return lambda folder: (folder / "config.json").write_bytes(data)


def tensors(change):
    def edit(folder):
        content = load_file(folder / "model.safetensors")
        content = {k: v.clone() for k, v in content.items()}
        change(content)
        save_file(content, folder / "model.safetensors", {"format": "pt"})

    return edit


def index(change):
    def edit(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def duplicate(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = {k: v.clone() for k, v in load_file(second).items()}
    name, tensor = next(iter(load_file(first).items()))
    save_file(content | {name: tensor.clone()}, second, {"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def corrupt(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20] + b"\xff" * 100 + path.read_bytes()[120:])


def put(name, value):
    def change(content):
        content[name].view(-1)[3] = value

    return tensors(change)


SINGLE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not UTF-8": (raw_config(b"\xff\xfe{}"), "UTF-8"),
    "config not JSON": (raw_config(b"{"), "JSON"),
    "config a list": (raw_config(b"[]"), "object"),
    "config nested": (raw_config(b"[" * 100_000), "nested"),
    "unknown family": (config(model_type="mamba"), "'mamba'"),
    "family no string": (config(model_type=3), "model_type"),
    "no model_type": (config(model_type=None), "model_type"),
    "hidden size lies": (config(hidden_size=64), "has shape"),
    "heads lie": (config(num_attention_heads=8, head_dim=8), "q_proj"),
    "kv heads lie": (config(num_key_value_heads=4), "k_proj"),
    "layers lie": (config(num_hidden_layers=3), "layers.2"),
    "vocabulary lies": (config(vocab_size=97), "embed_tokens"),
    "zero layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "layers a string": (config(num_hidden_layers="2"), "num_hidden_layers"),
    "tied a string": (config(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "truncated": (truncate, "truncated"),
    "corrupt header": (corrupt, "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "missing tensor": (tensors(lambda t: t.pop(Q)), Q),
    "integer weight": (tensors(lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int32)})), Q),
    "NaN in a linear": (put(Q, float("nan")), Q),
    "inf in a linear": (put(Q, float("inf")), Q),
    "NaN in a norm": (put("model.norm.weight", float("nan")), "model.norm.weight"),
    "inf in the embedding": (put("model.embed_tokens.weight", float("-inf")), "embed_tokens"),
    "name collision": (tensors(lambda t: t.update({Q + "_scale": torch.ones(1)})), Q + "_scale"),
}
SHARDED = {
    "absent shard": (lambda f: next(f.glob("*-00001-*")).unlink(), "00001"),
    "traversal": (index(lambda m: m.update({Q: "../x.safetensors"})), "../x.safetensors"),
    "absolute shard": (index(lambda m: m.update({Q: "/etc/passwd"})), "/etc/passwd"),
    "shard a number": (index(lambda m: m.update({Q: 3})), "plain file name"),
    "shard a pickle": (index(lambda m: m.update({Q: "config.json"})), "config.json"),
    "tensor not in shard": (index(lambda m: m.update({"ghost": m[Q]})), "ghost"),
    "empty map": (index(lambda m: m.clear()), "weight_map"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), INDEX),
    "duplicate tensor": (duplicate, "both"),
    "single and index": (lambda f: shutil.copy(next(f.glob("*-00001-*")), f / "model.safetensors"), "stale"),
}


# What a step refuses, or planning it: these see a model, and not the folder that it lies in.
BY_THE_STEP = ("config.json: quantization_config", "int8: tensor", "model.safetensors: tensor")


def check_refused(folder, out, words):
    with pytest.raises(Refusal) as caught:
        reattend.apply("int8", folder, out)
    assert words in str(caught.value)
    assert str(caught.value).startswith((str(folder), *BY_THE_STEP))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in out.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize(("edit", "words"), SINGLE.values(), ids=SINGLE)
def test_bad_single_file(models, tmp_path, edit, words):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    edit(folder)
    check_refused(folder, tmp_path / "out", words)


def test_a_refusal_names_the_file_of_a_shard(tmp_path):
    folder = write_model("llama", tmp_path / "in", max_shard_size="20KB")
    shard = json.loads((folder / INDEX).read_text())["weight_map"][Q]
    config(num_attention_heads=8, head_dim=8)(folder)
    says = f"{folder}/{shard}: tensor '{Q}' has shape [32, 32], config.json says [64, 32]"
    with pytest.raises(Refusal, match=f"^{re.escape(says)}$"):
        reattend.plan("int8", folder)


@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_a_nan_is_named_with_its_file(tmp_path, name):
    folder = write_model("llama", tmp_path / "in", max_shard_size="20KB")
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    content = {k: v.clone() for k, v in load_file(shard).items()}
    content[name].view(-1)[-1] = float("nan")
    save_file(content, shard, {"format": "pt"})
    with pytest.raises(Refusal, match=f"^{re.escape(f'{shard}: tensor {name!r} holds NaN or inf')}$"):
        reattend.apply("int8", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_nan_of_the_step_is_laid_to_the_step(models, tmp_path, monkeypatch):
    def broken(self, group, tensors, statistics, source):
        codes, scale = group.writes
        infinite = torch.full(scale.shape, float("inf"), dtype=TORCH_DTYPES[scale.dtype])
        return {codes.name: torch.zeros(codes.shape, dtype=torch.int8), scale.name: infinite}

    monkeypatch.setattr(step_class("int8"), "apply", broken)
    file = models("llama") / "model.safetensors"
    says = rf"^{file}: tensor '(.*)' is finite, but the step makes NaN or inf of it, in '\1_scale'$"
    with pytest.raises(Refusal, match=says):
        reattend.apply("int8", models("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("edit", "words"), SHARDED.values(), ids=SHARDED)
def test_bad_shards(tmp_path, edit, words):
    folder = write_model("llama", tmp_path / "in", max_shard_size="20KB")
    edit(folder)
    check_refused(folder, tmp_path / "out", words)


RECIPES = {
    "unknown step": ("steps: [{step: int9}]", "nearest is 'int8'"),
    "unknown key": ("steps: [{step: int8, formt: bitsandbytes}]", "nearest is 'format'"),
    "unknown top key": ("stepz: []", "nearest is 'steps'"),
    "wrong value": ("steps: [{step: int8, format: gguf}]", "format"),
    "no steps": ("steps: []", "at least one"),
    "not a map": ("[1]", "map"),
    "not YAML": ("steps: [", "YAML"),
    "no match": ("steps: [{step: int8, select: ['*.attn.*']}]", "'*.attn.*'"),
    "nothing left": ("steps: [{step: int8, keep: ['*']}]", "no layer"),
    "python object": ("steps: !!python/object/apply:os.system ['true']", "YAML"),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES)
def test_bad_recipe(models, tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    result = CliRunner().invoke(cli, ["plan", str(tmp_path / "r.yaml"), str(models("llama"))])
    assert isinstance(result.exception, Refusal)
    assert words in str(result.exception)


def test_places_that_are_refused(models, tmp_path):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out in (
        folder,
        folder / "out",
        tmp_path,
        tmp_path / "full",
        tmp_path / "no" / "out",
        folder / "config.json",
        Path("/proc/out"),
    ):
        with pytest.raises(Refusal):
            reattend.apply("int8", folder, out)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "in"]


@pytest.mark.parametrize(("family", "word"), [("gpt2", "Conv1D"), ("mixtral", "experts")])
def test_unsupported_families_are_refused_by_name(models, family, word):
    with pytest.raises(Refusal, match=word):
        reattend.plan("int8", models(family))
