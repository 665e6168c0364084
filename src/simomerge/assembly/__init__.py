"""Experts in, one model out: check that they belong together, merge, choose what is not given, re-align."""
