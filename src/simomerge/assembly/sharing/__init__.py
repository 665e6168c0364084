"""Models between one encoder and one per task: trees of shared blocks."""
