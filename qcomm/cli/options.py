"""Options of a command as the fields of a dataclass, each with its help text and panel as metadata.

Typer reads the options of a command from a function's signature. :func:`takes` makes that signature from the fields.
The command then receives one value that its dataclass has checked.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from qcomm.recipes import USER_ERROR

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["fail", "option", "takes"]

Options = TypeVar("Options", bound="DataclassInstance")


def option(
    text: str,
    panel: str | None = None,
    *,
    flag: str | None = None,
    choices: Iterable[str] = (),
    shown: bool | str = True,
) -> dict[str, Any]:
    """Returns the metadata of a field that is an option of a command.

    Args:
        text: help text, in which ``{choices}`` stands for the choices.
        panel: heading in ``--help`` under which the option is listed; None for the general one.
        flag: spelling on the command line; None derives it from the field's name.
        choices: allowed values, as far as the help text lists them. The dataclass checks the value.
        shown: the default as ``--help`` prints it; True prints the field's own.

    Example:
        >>> option("One of {choices}.", "Model", choices=("a", "b"))["help"]
        'One of a, b.'
    """
    return {
        "help": text.replace("{choices}", ", ".join(choices)),
        "rich_help_panel": panel,
        "flags": () if flag is None else (flag,),
        "show_default": shown,
    }


def takes(
    options: type[Options], *errors: type[Exception]
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorates a function of one ``options`` value, so that Typer offers the fields as options of a command.

    Args:
        options: dataclass whose fields have defaults and the metadata of :func:`option`. Its ``__post_init__`` checks
            single values and conflicts.
        errors: exceptions that the user can put right. The command prints their message and exits with code 2.
    """

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(run)
        def command(**given: Any) -> None:
            try:
                run(options(**given))
            except errors as error:
                fail(str(error))

        signed: Any = command
        signed.__signature__ = inspect.Signature([_parameter(field) for field in dataclasses.fields(options)])
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    flags, rest = field.metadata["flags"], {key: field.metadata[key] for key in field.metadata if key != "flags"}
    default = typer.Option(field.default, *flags, **rest)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def fail(message: str) -> NoReturn:
    """Prints one line on stderr and exits with the code of a user's error."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(USER_ERROR)
