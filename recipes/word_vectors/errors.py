"""The one error that the recipe raises on purpose."""


class RecipeError(Exception):
    """What went wrong and what to do about it, in one sentence for the person at the terminal."""
