"""The dtypes that a model can be loaded and measured in; without torch, as the command line names them."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
