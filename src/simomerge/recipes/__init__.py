"""Recipes: what a run does, and the run that does it."""
