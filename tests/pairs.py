"""A tiny teacher with a tokenizer, and a student that is the teacher with noise in its projections."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from tiny_models import GQA

TEXTS = {"text": demo.EVAL_TEXT, "selection": demo.SELECT_TEXT}
QUICK = {
    "window": 32, "selection_windows": 3, "steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2,
    "warmup": 2, "evaluate_every": 2, "save_every": 2,
}  # fmt: skip


def tiny(folder, **changes):
    """Write a tiny random llama with the tokenizer of the bundled model; return its folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GQA | {"vocab_size": 2048, "initializer_range": 0.2} | changes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / file, folder / file)
    return folder


def disturb(source, folder, scale=0.3):
    """Copy a model and add noise to its projections, of `scale` times their standard deviation."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if "_proj" in name:
            noise = torch.randn(value.shape, generator=generator) * value.float().std()
            tensors[name] = (value.float() + scale * noise).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def heal(student: Path, out: Path, teacher: Path | None, run=None, **settings):
    """Heal with the quick settings, changed by `settings`; return the findings."""
    texts = {key: settings.pop(key, text) for key, text in TEXTS.items()}
    reattend.heal(student, out, teacher=teacher, settings=QUICK | settings, **texts, **(run or {}))
    return json.loads((out / "reattend.json").read_text())["findings"][-1]


def weights(folder: Path):
    return load_file(folder / "model.safetensors")
