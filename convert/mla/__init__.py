"""GQA to MLA: the mathematics of the conversion. Tensors in, tensors out."""
