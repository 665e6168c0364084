"""How a merge method is applied to named tensors: streaming, thresholds, depth, checks."""
