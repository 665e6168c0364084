"""Merge, edit, compare and compress checkpoints from disk to disk, a tensor at a time: no models, no torch."""
