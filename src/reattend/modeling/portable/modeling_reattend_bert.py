"""BERT with optional parts, named by the config. Copied into checkpoints: needs transformers only."""

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertLayer,
    BertModel,
    BertPreTrainedModel,
    BertSelfAttention,
    eager_attention_forward,
)

from .attention_reattend import OptionalParts, init_optional_parts
from .configuration_reattend import ReattendBertConfig


class ReattendBertSelfAttention(OptionalParts, BertSelfAttention):
    """BERT's self-attention with gate and clipped softmax."""

    def __init__(self, config, layer_idx):
        super().__init__(config, is_causal=False, layer_idx=layer_idx)
        self.add_optional_parts(config, layer_idx, self.attention_head_size)

    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        """Return what the heads found (B, S, H V) and the weights, where the attention function returns them."""
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.query, self.key, self.value)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attention = self.clipped(attention)
        found, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.gated(hidden_states, found.reshape(shape)).flatten(-2), weights


class ReattendBertPreTrainedModel(BertPreTrainedModel):
    """What the models have in common."""

    config: ReattendBertConfig
    config_class = ReattendBertConfig
    _can_record_outputs = {"hidden_states": BertLayer, "attentions": ReattendBertSelfAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        init_optional_parts(module, self.config.initializer_range)


class ReattendBertModel(ReattendBertPreTrainedModel, BertModel):
    """BERT's encoder around `ReattendBertSelfAttention`."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer)
        for index, layer in enumerate(self.encoder.layer):
            layer.attention.self = ReattendBertSelfAttention(config, index)
        self.post_init()


class ReattendBertForMaskedLM(ReattendBertPreTrainedModel, BertForMaskedLM):
    """The encoder with its masked-language head."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = ReattendBertModel(config, add_pooling_layer=False)
        self.post_init()
