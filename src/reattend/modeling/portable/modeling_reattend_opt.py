"""OPT with optional parts, named by the config. Copied into checkpoints: needs transformers only."""

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTDecoder,
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTModel,
    OPTPreTrainedModel,
    eager_attention_forward,
)

from .attention_reattend import OptionalParts, init_optional_parts
from .configuration_reattend import ReattendOPTConfig


class ReattendOPTAttention(OptionalParts, OPTAttention):
    """OPT's attention with gate and clipped softmax."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.add_optional_parts(config, layer_idx, self.head_dim)

    def forward(self, hidden_states, cache=None, attention_mask=None, output_attentions=False, **kwargs):
        """Return the output (B, S, E) and the weights, where the attention function returns them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # Scaled before heads are split, as OPT does it: scores round differently otherwise.
        query = (self.q_proj(hidden_states) * self.scaling).view(shape).transpose(1, 2)
        key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attention = self.clipped(attention)
        found, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=1.0,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        found = self.gated(hidden_states, found.reshape(shape))
        return self.out_proj(found.flatten(-2)), weights


class ReattendOPTPreTrainedModel(OPTPreTrainedModel):
    """What the models have in common."""

    config: ReattendOPTConfig
    config_class = ReattendOPTConfig
    _can_record_outputs = {"hidden_states": OPTDecoderLayer, "attentions": ReattendOPTAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        init_optional_parts(module, self.config.init_std)


class ReattendOPTDecoder(ReattendOPTPreTrainedModel, OPTDecoder):
    """OPT's decoder around `ReattendOPTAttention`."""

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = ReattendOPTAttention(config, index)
        self.post_init()


class ReattendOPTModel(ReattendOPTPreTrainedModel, OPTModel):
    """The decoder, as OPT wraps it."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = ReattendOPTDecoder(config)
        self.post_init()


class ReattendOPTForCausalLM(ReattendOPTPreTrainedModel, OPTForCausalLM):
    """The model with its output embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.model = ReattendOPTModel(config)
        self.post_init()
