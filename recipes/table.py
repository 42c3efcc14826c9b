"""Every step by its name in a recipe, and where its class lives (resolved when a recipe is read)."""

TRANSFORMS = {
    "int8": "reattend.quantize.int8.transform:Int8",
    "int8_layout": "reattend.quantize.int8.layout:Int8Layout",
    "int8_attention": "reattend.quantize.attention.transform:Int8Attention",
    "portable": "reattend.convert.portable.transform:Portable",
    "gates": "reattend.convert.gates.transform:Gates",
    "clipped_softmax": "reattend.convert.clipped_softmax.transform:ClippedSoftmax",
    "mla": "reattend.convert.mla.transform:Mla",
    "attention_sharing": "reattend.convert.attention_sharing.transform:AttentionSharing",
    "attention_drop": "reattend.convert.attention_drop.transform:AttentionDrop",
    "dictionary": "reattend.convert.dictionary.transform:Dictionary",
    "heal": "reattend.healing.step:Heal",
}

# Steps that several processes take together, each with a whole model of its own or a part of one.
COLLECTIVE = ("heal",)

# Steps that take layers of any shape, so that a plan can promise them after a step whose calibration decides shapes.
ANY_SHAPES = ("heal", "int8", "int8_layout")

# Calibrating steps that only watch layers run: these may share attention, have none, or be stored as factors.
ANY_LAYERS = ("int8_attention",)
