"""Recipes: what a run does, and the run that does it."""

from simomerge.recipes.file import RecipeFile, read_recipe
from simomerge.recipes.recipe import ALL_TASKS, DEMO_TASKS, ROOMS_HEADS, Recipe, demo_recipe
from simomerge.recipes.run import plan_of, run_recipe
from simomerge.recipes.search import search_recipe
from simomerge.recipes.space import SearchSettings

__all__ = [
    "ALL_TASKS",
    "DEMO_TASKS",
    "ROOMS_HEADS",
    "Recipe",
    "RecipeFile",
    "SearchSettings",
    "demo_recipe",
    "plan_of",
    "read_recipe",
    "run_recipe",
    "search_recipe",
]
