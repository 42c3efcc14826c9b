"""Multi-head latent attention of the Llama family. Copied into checkpoints: needs transformers only.

Per token and layer the cache holds a latent and rotary numbers that all heads share (DeepSeek-V2, arXiv 2405.04434,
section 2.1). Which of the model's frequencies turn them is each layer's own choice, and so is the latent's rank.
Query and key norms act per head, before the maps to latent and rotary numbers.

Legend: B batch, S queries, T keys, H query heads, G key heads, D head dim (of values too, and of queries and keys
without RoPE), E hidden size, L latent rank, R rotary numbers (first all real, then all imaginary parts).
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, rotate_half

from .attention_reattend import OptionalParts


class ReattendLatentAttention(OptionalParts):
    """Latent attention with optional norms, gate and clipped softmax.

    Without norms queries and rows are one linear map of the input each. With them `q_rope` (H, R, D) and
    `kv_a_proj_with_mqa` map what the norms put out: the query without RoPE is the normed query itself.
    """

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # every head has keys and values of its own once they are expanded
        self.kv_lora_rank = config.latent_rank(layer_idx)
        self.qk_rope_head_dim = config.latent_attention["rope_dim"]
        self.qk_nope_head_dim = self.v_head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self._add_projections(config)
        pairs = torch.tensor(config.latent_attention["pairs"][layer_idx])
        self.register_buffer("pairs", pairs.repeat(2), persistent=False)  # the config is what holds it
        self.add_optional_parts(config, layer_idx, self.v_head_dim)

    def _add_projections(self, config):
        hidden, heads, bias, width = config.hidden_size, self.num_heads, config.attention_bias, config.head_dim
        rows, keys = self.kv_lora_rank + self.qk_rope_head_dim, config.num_key_value_heads * width
        if config.qk_norm:
            self.q_proj = nn.Linear(hidden, heads * width, bias=bias)
            self.k_proj, self.v_proj = (nn.Linear(hidden, keys, bias=bias) for _ in "kv")
            self.q_norm, self.k_norm = (LlamaRMSNorm(width, config.rms_norm_eps) for _ in "qk")
            self.q_rope = nn.Parameter(torch.empty(heads, self.qk_rope_head_dim, width))
            self.kv_a_proj_with_mqa = nn.Linear(2 * keys, rows, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, heads * (width + self.qk_rope_head_dim), bias=bias)
            self.kv_a_proj_with_mqa = nn.Linear(hidden, rows, bias=bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * 2 * width, bias=False)
        self.o_proj = nn.Linear(heads * width, hidden, bias=config.output_bias)

    def rotate(self, x, position_embeddings):
        """Turn (B, .., S, R) by the layer's frequencies; cosine and sine (B, S, D) are those of all of them."""
        cos, sin = (part[..., self.pairs].unsqueeze(1) for part in position_embeddings)
        return x * cos + rotate_half(x) * sin

    def queries(self, hidden_states, position_embeddings):
        """Return the queries' parts without RoPE (B, H, S, D) and with it (B, H, S, R)."""
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], self.num_heads, -1)
        if self.config.qk_norm:
            free = self.q_norm(query).transpose(1, 2)
            rope = free @ self.q_rope.transpose(1, 2)
        else:
            free, rope = query.transpose(1, 2).split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return free, self.rotate(rope, position_embeddings)

    def rows(self, hidden_states, position_embeddings):
        """Return what is cached: latents (B, 1, S, L) and rotary numbers (B, 1, S, R)."""
        read = hidden_states
        if self.config.qk_norm:
            key = self.k_proj(read).view(*read.shape[:-1], -1, self.qk_nope_head_dim)
            read = torch.cat([self.k_norm(key).flatten(-2), self.v_proj(read)], -1)
        latent, rope = (
            self.kv_a_proj_with_mqa(read).unsqueeze(1).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        )
        return latent, self.rotate(rope, position_embeddings)

    def expand(self, latent, rope):
        """Return every head's keys (B, H, T, D + R) and values (B, H, T, D)."""
        both = self.kv_b_proj(latent[:, 0]).view(*latent.shape[:1], latent.shape[2], self.num_heads, -1)
        key, value = both.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], -1)
        return torch.cat([key, rope.expand(-1, self.num_heads, -1, -1)], -1), value

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """Return the output (B, S, E) and the weights, where the attention function returns them."""
        query = torch.cat(self.queries(hidden_states, position_embeddings), -1)
        latent, rope = self.rows(hidden_states, position_embeddings)
        if cache is not None:
            latent, rope = cache.update(latent, rope, self.layer_idx, kwargs=kwargs)
        key, value = self.expand(latent, rope)
        options = {} if self.sliding_window is None else {"sliding_window": self.sliding_window}
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attention = self.clipped(attention)
        found, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0, **options, **kwargs,
        )  # fmt: skip
        return self.output(hidden_states, found), weights

    def output(self, hidden_states, found):
        """Gate and project what the heads found (B, S, H, D)."""
        return self.o_proj(self.gated(hidden_states, found).flatten(-2))


def init_latent_parts(module, config):
    """To be called by `_init_weights` of a model for each of its modules."""
    if isinstance(module, ReattendLatentAttention):
        pairs = torch.tensor(config.latent_attention["pairs"][module.layer_idx])
        init.copy_(module.pairs, pairs.repeat(2))
        if config.qk_norm:
            init.normal_(module.q_rope, mean=0.0, std=config.initializer_range)
