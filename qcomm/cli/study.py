"""The commands ``qcomm study``: one for each study. All have the same options, and some have further ones."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import typer

from qcomm.cli.options import option, takes
from qcomm.recipes import RecipeError
from qcomm.studies import DATASETS, STUDIES, FilterSettings, Study, StudySettings, perform, write_page

app = typer.Typer(
    name="study",
    help="Check what other sources claim about gradients; docs/studies.md has results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_DATA, _FILTER, _RUNS = "Data and training", "Filter", "Runs"
_EXAMPLES = (
    "\n\nExamples:\n\n"
    "qcomm study {name}  ({time}; continues where it was interrupted)\n\n"
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


@dataclass(frozen=True)
class FilterOptions(StudyOptions):
    """The options of ``qcomm study data-filter``. :class:`FilterSettings` checks its fields."""

    train_images: int = field(
        default=FilterSettings.train_images, metadata=option("Filter and train on the first so many.", _DATA)
    )
    steps: int = field(default=FilterSettings.steps, metadata=option("Of training, in all arms.", _DATA))
    lr: float = field(
        default=FilterSettings.learning_rate,
        metadata=option("Learning rate of the first step; it falls linearly to 0.", _DATA),
    )
    runs: int = field(default=FilterSettings.runs, metadata=option("Seeds for each arm.", _RUNS))
    feature_steps: int = field(
        default=FilterSettings.feature_steps,
        metadata=option("Of training the network whose features are taken.", _FILTER),
    )
    noise: float = field(
        default=FilterSettings.noise, metadata=option("Share of the labels that is replaced by wrong ones.", _FILTER)
    )
    min_samples: int = field(default=FilterSettings.min_samples, metadata=option("Of DBSCAN.", _FILTER))
    eps_factor: float = field(
        default=FilterSettings.eps_factor,
        metadata=option("eps of a class / the median distance to the min_samples-th neighbour in it.", _FILTER),
    )
    html: Path | None = field(
        default=None,
        metadata=option("Write the first seed's map as a web page: images on hover, sliders for DBSCAN.", _RUNS),
    )

    def __post_init__(self) -> None:
        if self.html is not None and self.html.is_dir():
            raise RecipeError(f"--html is {str(self.html)!r}, a directory; it must be a file")

    @property
    def settings(self) -> FilterSettings:
        """The settings that all runs share."""
        own = {name: getattr(self, name) for name in ("feature_steps", "noise", "min_samples", "eps_factor")}
        return FilterSettings(**vars(super().settings), **own)


def _reproduce(study: Study[Any], settings: StudySettings) -> list[str]:
    """Returns the command line with every option that the result depends on."""
    words = ["qcomm", "study", study.name]
    for each in fields(settings):
        if each.name != "data_dir":
            name = "lr" if each.name == "learning_rate" else each.name.replace("_", "-")
            words += [f"--{name}", str(getattr(settings, each.name))]
    return words


def _command(study: Study[Any], options_of: type[StudyOptions]) -> Callable[..., None]:
    @takes(options_of, RecipeError)
    def run(options: StudyOptions) -> None:
        settings = options.settings
        command = _reproduce(study, settings)
        document = perform(study, settings, options.out, command)
        for claim in document["claims"]:
            typer.echo(f"{claim['quantity']}: {claim['source']} / here {claim['here']}; {claim['verdict']}")
        typer.echo(f"Results: {options.out / study.name}.json and .png. To repeat: {shlex.join(command)}")
        if isinstance(options, FilterOptions) and options.html is not None:
            write_page(options.settings, options.html)
            typer.echo(f"Map of seed {settings.seed} with planted labels: {options.html}")

    return run


_OPTIONS: dict[str, type[StudyOptions]] = {"data-filter": FilterOptions}
_TIMES = {"data-filter": "half an hour of a shared core"}
_MORE_EXAMPLES = {
    "data-filter": "\n\nqcomm study data-filter --noise 0.2 --out runs/noise-20 --html runs/noise-20/map.html",
}
for _study in STUDIES.values():
    _examples = _EXAMPLES.format(name=_study.name, time=_TIMES.get(_study.name, "a few minutes on one core"))
    _help = _study.help + _examples + _MORE_EXAMPLES.get(_study.name, "")
    app.command(_study.name, help=_help)(_command(_study, _OPTIONS.get(_study.name, StudyOptions)))
