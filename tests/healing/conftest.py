"""A tiny teacher with a tokenizer, and a student that is the teacher with noise in its projections."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from reattend import demo
from tiny_models import GQA

TEXTS = {"text": demo.EVAL_TEXT, "selection": demo.SELECT_TEXT}
QUICK = {
    "window": 32, "selection_windows": 3, "steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 3e-3,
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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("healing") / "teacher", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def student(teacher, tmp_path_factory):
    return disturb(teacher, tmp_path_factory.mktemp("healing") / "student")
