"""How a merge method is applied to named tensors: streaming, exact order statistics, depth, checks."""
