"""How each kind of `reattend_attention` quantises: what the step measures is what `load()` runs."""

from reattend.families.attention_kinds import INT8_FP8, INT8_FP16
from reattend.kernels.attention_int8 import Quantization

# The fastest first. With a scale for 64 keys at a time 1 - cosine was a quarter larger on a real model; smoothing
# values made e4m3 worse there.
HOW = {
    INT8_FP8: Quantization(values="fp8", key_scales="token"),
    INT8_FP16: Quantization(values="fp16", key_scales="token"),
}
