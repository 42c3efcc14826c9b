"""The memory that `plan` says calibration takes: by hand, and against a process that does it."""

import subprocess
import sys

import pytest
import torch
import transformers

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.families.source import source_of
from reattend.pipeline.memory import PROCESS_BYTES, calibration_bytes
from reattend.recipes.schema import parse_recipe

HIDDEN, FFN, KV, VOCAB, LAYERS = 192, 512, 64, 2048, 5


def test_by_hand_for_the_bundled_model():
    settings = {"windows": 3, "selection_windows": 2, "window": 100}
    planned = reattend.plan(
        parse_recipe({"steps": [{"step": "int8", "outliers": "smooth"}], **settings}, "test"), demo.MODEL
    )
    layer = 2 * HIDDEN * (HIDDEN + KV) + 3 * HIDDEN * FFN + 2 * HIDDEN
    outside = VOCAB * HIDDEN + HIDDEN  # the head is the embedding
    assert planned.source.parameters == LAYERS * layer + outside
    states = 100 * HIDDEN
    held = LAYERS * layer + outside + max(2 * 3 * states, (3 + 2 * 2) * states)
    offloaded = max(outside + 7 * states, layer + 5 * states)
    assert planned.summary()["calibration_memory_at_least_bytes"] == {
        "weights_held": PROCESS_BYTES + 4 * held, "weights_offloaded": PROCESS_BYTES + 4 * offloaded
    }  # fmt: skip
    assert reattend.plan("int8", demo.MODEL).summary()["calibration_memory_at_least_bytes"] == {}


def test_what_followers_wait_for_by_hand(tmp_path):
    """Two followers of one leader, then one of another: at no time is more than one leader's awaited."""
    steps = [{"step": "attention_sharing", "pairs": {1: 0, 2: 0, 4: 3}, "refit": False}, {"step": "int8_attention"}]
    texts = {"calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT)}
    settings = {"windows": 3, "selection_windows": 2, "window": 100, **texts}
    reattend.apply(parse_recipe({"steps": steps[:1], **settings}, "test"), demo.MODEL, tmp_path / "shared")
    planned = reattend.plan(parse_recipe({"steps": steps[1:], **settings}, "test"), tmp_path / "shared")
    running = 3 * 100 * (HIDDEN + HIDDEN + KV)  # hidden states, queries of as many numbers, keys
    assert planned.summary()["calibration_memory_at_least_bytes"]["weights_held"] == (
        PROCESS_BYTES + 4 * (planned.source.parameters + running)
    )


RUN = """
import gc, sys, torch
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.families.source import source_of
from reattend.modeling.loading import load
source = source_of(open_checkpoint(sys.argv[1]))
for offload in (True, False):  # the smaller peak first, as what is read is the highest so far
    model, _ = load(sys.argv[1], dtype="float32", offload=offload)
    passes = layer_passes(model, source.family, {"calibration": torch.randint(0, 32000, (24, 1024))})
    next(passes)
    passes.close()
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    del model, passes
    gc.collect()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_process_takes_what_was_said(tmp_path):
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 5000, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True)
    said = calibration_bytes(source_of(open_checkpoint(tmp_path)), [24 * 1024])
    mapped = (tmp_path / "model.safetensors").stat().st_size
    for kind, measured in zip(("weights_offloaded", "weights_held"), done.stdout.split(), strict=True):
        assert 0.85 * said[kind] < 1024 * int(measured) < 1.15 * said[kind] + mapped, kind
