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


PROMPTS = ["The capital of France is", "Once upon a time there was a king who lived in a castle and", "Water"]


def test_attention_is_that_of_sdpa_and_padded_batches_are_single_runs(source):
    import torch
    import transformers

    reattend.register_attention()
    kind, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer.from_pretrained(source)
    names = ("sdpa", "reattend", "reattend_int8")
    models = [kind.from_pretrained(source, dtype=torch.float32, attn_implementation=name) for name in names]
    ids = tokenizer(demo.EVAL_TEXT.read_text()[:4000], return_tensors="pt").input_ids
    with torch.inference_mode():
        exact, *ours = (model(ids, use_cache=False).logits for model in models)
        for logits in ours:  # on a CPU the second is exact too
            assert float((logits - exact).norm() / exact.norm()) < 1e-5
        rounded = models[1].to(torch.bfloat16)(ids, use_cache=False).logits.float()
        assert float((rounded - exact).norm() / exact.norm()) < 0.03
    models[1].float()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    batch = models[1].generate(**tokenizer(PROMPTS, return_tensors="pt", padding=True), **options)[:, -16:]
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone = models[1].generate(**tokenizer([prompt], return_tensors="pt"), **options)[0, -16:]
        assert torch.equal(row, alone)


def test_int8_attention_changes_perplexity_by_less_than_a_thousandth(source, tmp_path):
    from reattend.quantize.attention.transform import Int8Attention
    from reattend.recipes.schema import Recipe

    step = Int8Attention(values="fp16")
    recipe = Recipe(steps=(step,), calibration=str(demo.SELECT_TEXT), windows=1, window=512)
    reattend.apply(recipe, source, tmp_path / "out")
    settings = {"against": source, "window": 512, "windows": 4, "dtype": "float32"}
    report = reattend.evaluate(tmp_path / "out", demo.EVAL_TEXT, **settings)
    assert report["attention"] == "reattend_int8_simulated"
    assert 0 < report["kl_mean"] < 0.002
    assert abs(report["delta"]) < 2e-3 * report["base_perplexity"]
