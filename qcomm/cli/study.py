"""The commands ``qcomm study``: one for each study, all with the same options."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import typer

from qcomm.cli.options import option, takes
from qcomm.recipes import RecipeError
from qcomm.studies import DATASETS, STUDIES, Study, StudySettings, perform

app = typer.Typer(
    name="study",
    help="Check what other sources claim about gradients; docs/studies.md has results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_DATA, _RUNS = "Data and training", "Runs"
_EXAMPLES = (
    "\n\nExamples:\n\n"
    "qcomm study {name}  (a few minutes on one core; continues where it was interrupted)\n\n"
    "qcomm study {name} --dataset digits --train-images 1000 --runs 1 --steps 40 --out runs/quick"
)


@dataclass(frozen=True)
class StudyOptions:
    """The options of every study. :class:`StudySettings` checks its fields."""

    dataset: str = field(default=StudySettings.dataset, metadata=option("One of {choices}.", _DATA, choices=DATASETS))
    data_dir: Path | None = field(default=None, metadata=option("Directory with the data set's files.", _DATA))
    train_images: int = field(default=StudySettings.train_images, metadata=option("Train on the first so many.", _DATA))
    steps: int = field(default=StudySettings.steps, metadata=option("Of training.", _DATA))
    workers: int = field(default=StudySettings.workers, metadata=option("Simulated in one process.", _DATA))
    batch_size: int = field(default=StudySettings.batch_size, metadata=option("Images per worker and step.", _DATA))
    lr: float = field(default=StudySettings.learning_rate, metadata=option("Learning rate of SGD, constant.", _DATA))
    runs: int = field(default=StudySettings.runs, metadata=option("Seeds for each arm.", _RUNS))
    seed: int = field(default=StudySettings.seed, metadata=option("The first of them.", _RUNS))
    out: Path = field(
        default=Path("runs/study"), metadata=option("Directory for results, plots and finished runs.", _RUNS)
    )

    @property
    def settings(self) -> StudySettings:
        """The settings that all runs share."""
        return StudySettings(
            dataset=self.dataset,
            data_dir=self.data_dir,
            train_images=self.train_images,
            steps=self.steps,
            workers=self.workers,
            batch_size=self.batch_size,
            learning_rate=self.lr,
            runs=self.runs,
            seed=self.seed,
        )


def _reproduce(study: Study, settings: StudySettings) -> list[str]:
    """Returns the command line with every option that the result depends on."""
    options = {
        "--dataset": settings.dataset,
        "--train-images": settings.train_images,
        "--steps": settings.steps,
        "--workers": settings.workers,
        "--batch-size": settings.batch_size,
        "--lr": settings.learning_rate,
        "--runs": settings.runs,
        "--seed": settings.seed,
    }
    return ["qcomm", "study", study.name, *(str(word) for pair in options.items() for word in pair)]


def _command(study: Study) -> Callable[..., None]:
    @takes(StudyOptions, RecipeError)
    def run(options: StudyOptions) -> None:
        command = _reproduce(study, options.settings)
        document = perform(study, options.settings, options.out, command)
        for claim in document["claims"]:
            typer.echo(f"{claim['quantity']}: {claim['source']} / here {claim['here']}; {claim['verdict']}")
        typer.echo(f"Results: {options.out / study.name}.json and .png. To repeat: {shlex.join(command)}")

    return run


for _study in STUDIES.values():
    app.command(_study.name, help=_study.help + _EXAMPLES.format(name=_study.name))(_command(_study))
