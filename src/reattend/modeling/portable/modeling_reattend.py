"""The Llama family with optional parts, named by the config. Copied into checkpoints: needs transformers only.

Llama, Mistral (sliding window), Qwen2 (biases) and Qwen3 (query and key norms) are one model here. What they share is
taken from transformers' Llama; what the parts change is below.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_reattend import OptionalParts, init_optional_parts
from .configuration_reattend import ReattendConfig
from .dictionary_reattend import ReattendDictionary, init_dictionary_parts, projection
from .latent_reattend import ReattendLatentAttention, init_latent_parts
from .sharing_reattend import ReattendFollower, count_tokens


class ReattendAttention(OptionalParts):
    """Grouped-query attention with optional norms, gate and clipped softmax."""

    is_causal = True

    def __init__(self, config, layer_idx, bank=None):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, projection(config, name, layer_idx, bank, config.attention_bias))
        self.o_proj = projection(config, "o_proj", layer_idx, bank, config.output_bias)
        norms = [LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"]
        self.q_norm, self.k_norm = norms
        self.leads = layer_idx in (config.attention_sharing or ())
        self.add_optional_parts(config, layer_idx, self.head_dim)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, cache=None, shared_attention=None, **kwargs
    ):
        """Return the output (B, S, E) and the weights, where the attention function returns them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        row: dict | None = {} if self.leads else None
        if self.leads:
            shared_attention[self.layer_idx] = query, key, row
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


class ReattendDecoderLayer(LlamaDecoderLayer):
    """A Llama layer around one of our attentions, or around none."""

    def __init__(self, config, layer_idx, bank=None):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        if layer_idx in (config.attention_drop or ()):
            self.self_attn = self.input_layernorm = None
        else:
            shared = {} if bank is None else {"bank": bank}
            self.self_attn = _attention_of(config, layer_idx)(config, layer_idx, **shared)

    def forward(self, hidden_states, cache=None, **kwargs):
        """Return the layer's output (B, S, E)."""
        if self.self_attn is not None:
            return super().forward(hidden_states, cache=cache, **kwargs)
        if cache is not None:
            count_tokens(cache, hidden_states, self.layer_idx)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _attention_of(config, layer_idx):
    if config.latent_attention is not None:
        return ReattendLatentAttention
    follows = config.attention_sharing is not None and config.attention_sharing[layer_idx] is not None
    return ReattendFollower if follows else ReattendAttention


class ReattendPreTrainedModel(LlamaPreTrainedModel):
    """What the models have in common."""

    config: ReattendConfig
    config_class = ReattendConfig
    _no_split_modules = ["ReattendDecoderLayer"]
    _can_record_outputs = {"hidden_states": ReattendDecoderLayer, "attentions": OptionalParts}

    def _init_weights(self, module):
        super()._init_weights(module)
        init_optional_parts(module, self.config.initializer_range)
        init_latent_parts(module, self.config)
        init_dictionary_parts(module, self.config.initializer_range)


class ReattendModel(ReattendPreTrainedModel):
    """Embedding, layers and last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dictionary = None if config.weight_dictionary is None else ReattendDictionary(config)
        layers = (ReattendDecoderLayer(config, i, self.dictionary) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.latent_attention is not None or self.dictionary is not None:  # which no plan here splits
            self._tp_plan = {name: how for name, how in vars(self)["_tp_plan"].items() if "self_attn" not in name}

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None,
        **kwargs,
    ):  # fmt: skip
        """Return the last hidden states (B, S, E) and the cache. Takes either `input_ids` or `inputs_embeds`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(hidden, cache)
        masks = self._masks(hidden, attention_mask, cache, position_ids)
        rotation = self.rotary_emb(hidden, position_ids=position_ids)
        if self.config.attention_sharing is not None:
            kwargs["shared_attention"] = {}  # what leaders leave for their followers, in this call
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden = layer(
                hidden, attention_mask=masks[kind], position_embeddings=rotation, position_ids=position_ids,
                cache=cache, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), cache=cache)

    def _masks(self, hidden, attention_mask, cache, position_ids):
        """Return the mask of each type of layer; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        given = {"attention_mask": attention_mask, "cache": cache, "position_ids": position_ids}
        return {
            kind: makers[kind](config=self.config, inputs_embeds=hidden, **given)
            for kind in dict.fromkeys(self.config.layer_types)
        }


def _positions(hidden, cache):
    seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(hidden.shape[1], device=hidden.device)[None] + seen


class ReattendForCausalLM(ReattendPreTrainedModel, LlamaForCausalLM):
    """The model with its output embedding."""

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # that of LlamaForCausalLM would make a Llama
        self.model = ReattendModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
