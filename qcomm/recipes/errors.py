"""The one exception the recipes raise for what a user can put right."""


class RecipeError(ValueError):
    """A setting, a data file or a checkpoint is not usable; the message names it and says what would be.

    The command line prints the message and exits with code 2; any other exception is a defect and keeps its traceback.

    Example:
        >>> raise RecipeError("--epochs is 0; it must be at least 1")
        Traceback (most recent call last):
        ...
        qcomm.recipes.errors.RecipeError: --epochs is 0; it must be at least 1
    """
