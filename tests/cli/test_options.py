"""Options from dataclasses: Typer's view of the fields, and errors of a dataclass as one line."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qcomm.cli.options import option, takes
from qcomm.cli.train import TrainOptions
from qcomm.recipes import TrainConfig


@dataclass(frozen=True)
class Cake:
    """A field of each kind that commands have."""

    flour: str = field(default="rye", metadata=option("One of {choices}.", "Dough", choices=("rye", "spelt")))
    eggs: int | None = field(default=None, metadata=option("Whole ones.", "Dough", shown="one per guest"))
    degrees: float = field(default=180.0, metadata=option("Of the oven.", flag="--heat"))
    fan: bool = field(default=True, metadata=option("Moves the air."))
    vegan: bool = field(default=False, metadata=option("Without eggs.", flag="--vegan"))
    out: Path = field(default=Path("cake"), metadata=option("Where it goes."))

    def __post_init__(self):
        if self.vegan and self.eggs:
            raise ValueError("--eggs contradicts --vegan")
        if self.degrees > 300:
            raise TypeError("a defect")


@pytest.fixture
def baked():
    return []


@pytest.fixture
def invoke(baked):
    @takes(Cake, ValueError)
    def bake(options: Cake) -> None:
        baked.append(options)

    app = typer.Typer(rich_markup_mode="rich")
    app.command(help="Bake.")(bake)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


def test_the_command_gets_the_defaults_of_the_fields(invoke, baked):
    assert invoke().exit_code == 0
    assert baked == [Cake()]


def test_values_are_converted_to_the_types_of_the_fields(invoke, baked):
    given = ["--flour", "spelt", "--eggs", "3", "--heat", "200", "--no-fan", "--out", "tin"]
    assert invoke(*given).exit_code == 0
    assert baked == [Cake(flour="spelt", eggs=3, degrees=200.0, fan=False, out=Path("tin"))]


def test_help_has_texts_panels_choices_and_defaults(invoke):
    text = invoke("--help").stdout
    for part in ("Bake.", "Dough", "One of rye, spelt.", "default: rye", "one per guest", "--heat", "--no-fan"):
        assert part in text
    for part in ("--degrees", "--no-vegan", "{choices}"):
        assert part not in text


def test_an_expected_error_is_one_line_and_exits_with_2(invoke, baked):
    result = invoke("--vegan", "--eggs", "1")
    assert (result.exit_code, result.stderr) == (2, "error: --eggs contradicts --vegan\n")
    assert not baked


def test_any_other_error_keeps_its_traceback(invoke):
    result = invoke("--heat", "400")
    assert isinstance(result.exception, TypeError)


def test_training_offers_every_field_of_its_configuration():
    assert {field.name for field in fields(TrainOptions)} == {field.name for field in fields(TrainConfig)} | {"ranks"}
