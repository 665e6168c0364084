"""Models: an encoder with its heads, and how models of other projects are imported."""
