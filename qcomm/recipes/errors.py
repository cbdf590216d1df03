"""The exception that the recipes raise for errors that a user can correct."""


class RecipeError(ValueError):
    """An error of a setting, a data file or a checkpoint that is not usable; the message names the remedy.

    The command line prints the message and exits with code 2; any other exception is a defect and keeps its traceback.

    Example:
        >>> raise RecipeError("--epochs is 0; it must be at least 1")
        Traceback (most recent call last):
        ...
        qcomm.recipes.errors.RecipeError: --epochs is 0; it must be at least 1
    """
