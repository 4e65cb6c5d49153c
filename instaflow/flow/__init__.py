"""The mathematics of flows: tensors in, tensors out."""
