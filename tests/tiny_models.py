"""Tiny random models of every family."""

from pathlib import Path

import torch
import transformers

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA = {**SMALL, "intermediate_size": 56, "num_key_value_heads": 2}
CONFIGS = {
    "llama": ("Llama", GQA | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", GQA | {"head_dim": 8, "sliding_window": 64}),
    "qwen2": ("Qwen2", GQA),
    "qwen3": ("Qwen3", GQA | {"head_dim": 16}),
    "gemma2": ("Gemma2", GQA | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", GQA),
    "mixtral": ("Mixtral", GQA | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "opt": ("OPT", SMALL | {"ffn_dim": 56, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "bert": ("Bert", SMALL | {"intermediate_size": 56}),
}


def write_model(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: object) -> Path:
    """Save a tiny random model of `family`; `options` go to save_pretrained."""
    name, settings = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    head = "ForMaskedLM" if family == "bert" else ("LMHeadModel" if family == "gpt2" else "ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(config).to(dtype)
    model.save_pretrained(folder, **options)
    (folder / "notes").mkdir()
    (folder / "notes" / "extra.txt").write_bytes(b"kept \xff as it is")
    return folder
