"""Experts in, one model out: check that the experts fit together, merge them, choose scales, re-align the heads."""
