"""Attention that layers share. Copied into checkpoints: needs transformers only.

A follower attends with the queries and keys of an earlier layer, its leader, to values of its own: it has no q_proj
and k_proj, and caches its values alone (EchoAtt, arXiv 2409.14595). A dropped layer has no attention (arXiv
2406.15786).

Legend: B batch, S queries, T keys, H query heads, G key heads, D head dim, E hidden size.
"""

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .attention_reattend import OptionalParts


class ReattendFollower(OptionalParts):
    """Attention by the queries and keys of the layer `leader`."""

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.leader = config.attention_sharing[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        hidden = config.hidden_size
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=config.output_bias)
        self.add_optional_parts(config, layer_idx, self.head_dim)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, cache=None, shared_attention=None, **kwargs
    ):
        """Return the output (B, S, E) and the weights; `shared_attention` holds each leader's queries and keys."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key, row = shared_attention[self.leader]
        if cache is not None:
            value = cached_alone(cache, value, self.layer_idx, kwargs)
        options = self.row_options(row)
        if self.sliding_window is not None:
            options["sliding_window"] = self.sliding_window
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attention = self.clipped(attention)
        found, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0, **options, **kwargs,
        )  # fmt: skip
        found = self.gated(hidden_states, found.view(shape))
        return self.o_proj(found.flatten(-2)), weights


def cached_alone(cache, value, layer_idx, kwargs):
    """Put values (B, G, S, D) into a layer's cache, which holds no keys; return all that it holds.

    They take the place of the keys, whose length is what a cache tells and reorders by; the values are of width 0.
    """
    return cache.update(value, value[..., :0], layer_idx, kwargs=kwargs)[0]


def count_tokens(cache, hidden_states, layer_idx):
    """Tell the cache of a layer that stores nothing how many tokens have passed: cropping looks at each layer."""
    nothing = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
    cache.update(nothing, nothing, layer_idx)
