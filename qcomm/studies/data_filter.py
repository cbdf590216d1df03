"""Training on what a density filter keeps, against a random drop of the same number and against all images.

Source: S. Gahlot et al., "Data optimization for large batch distributed training of deep neural networks": penultimate
activations of a ResNet are mapped to the plane by t-SNE, DBSCAN runs in each class, and its noise is dropped.
``class_filter`` has the rule for ``eps``. Wrong labels are planted besides, so that it is known what a filter should
find. Arms with planted labels are measured on clean test images.

All arms take the same number of steps with the same learning rate and weight decay. The source gives each of its sets a
weight decay of its own.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qcomm.codec import CPU
from qcomm.paper import COLOURS, deviation, figure, plus_minus, points, spread
from qcomm.recipes import RecipeError, Split, load_dataset
from qcomm.studies.class_filter import LIBRARY_EPS, LIBRARY_MIN_SAMPLES, drop_at_random, keep, plant, scores
from qcomm.studies.features import accuracy, check_sklearn, embed, features, train
from qcomm.studies.records import Run
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.study import Claim, Document, Study, claim_row, runs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLEAN, PLANTED = "clean", "planted"
FULL, FILTERED, RANDOM, PERFECT = "full", "filtered", "random drop", "wrong ones removed"
# Arm -> the labels, and the choice of images.
ARMS: dict[str, tuple[str, str]] = {
    f"{labels}, {choice}": (labels, choice)
    for labels, choices in ((CLEAN, (FULL, FILTERED, RANDOM)), (PLANTED, (FULL, FILTERED, RANDOM, PERFECT)))
    for choice in choices
}
TEST_IMAGES = 5000
SWEEP = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)  # factors whose precision and recall are drawn
# Table I of the source: images kept of 50,000, and the two percentages as printed.
TABLE_1 = {
    "ResNet-152": (49380, 98.76, -1.24),
    "ResNet-101": (47438, 94.87, -5.12),
    "ResNet-50": (46333, 92.66, -7.34),
    "ResNet-34": (46725, 93.45, -6.55),
    "ResNet-18": (46895, 93.79, -6.21),
}


@dataclass(frozen=True)
class FilterSettings(StudySettings):
    """The settings of this study.

    Attributes:
        learning_rate: of the first step; it falls linearly to 0.
        feature_steps: steps of the network whose features are taken.
        noise: share of the labels that is replaced in arms with planted labels.
        min_samples: of DBSCAN.
        eps_factor: of the rule for ``eps``.

    Raises:
        RecipeError: a field is out of its range.
    """

    train_images: int = 2000
    steps: int = 310
    learning_rate: float = 0.1
    runs: int = 5
    feature_steps: int = 100
    noise: float = 0.1
    min_samples: int = 5
    eps_factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("train_images", 20), ("feature_steps", 1), ("min_samples", 2)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.noise < 1:
            raise RecipeError(f"--noise is {self.noise}; it must be between 0 and 1")
        if not 0 < self.eps_factor < math.inf:
            raise RecipeError(f"--eps-factor is {self.eps_factor}; it must be positive and finite")


class Map(NamedTuple):
    """The training images of a seed on the plane.

    Attributes:
        images: uint8 ``[n, channels, 32, 32]``.
        truth: the data set's labels.
        labels: those that are trained on.
        planted: True where they differ.
        places: float32 ``[n, 2]``, by t-SNE.
    """

    images: Tensor
    truth: Tensor
    labels: Tensor
    planted: Tensor
    places: Tensor

    def kept(self, settings: FilterSettings, factor: float | None = None) -> Tensor:
        """Returns True for the images that the filter keeps."""
        factor = settings.eps_factor if factor is None else factor
        return keep(self.places, self.labels, settings.min_samples, factor=factor)


@lru_cache(maxsize=2)  # for the arms of one seed and one labelling
def image_map(settings: FilterSettings, labelling: str, seed: int) -> Map:
    """Trains the network for features on all images, and maps these to the plane.

    Args:
        settings: of the study.
        labelling: ``"clean"`` or ``"planted"``.
        seed: of the planted labels, of the network and of t-SNE.
    """
    data, first = settings.load()
    labels, planted = plant(first.labels, settings.noise if labelling == PLANTED else 0.0, seed)
    images, batch = data.normalise(first.images), settings.workers * settings.batch_size
    model = train(Split(images, labels), settings.feature_steps, batch, settings.learning_rate, 500 + seed)
    return Map(first.images, first.labels, labels, planted, embed(features(model, images), seed))


def measure(settings: FilterSettings, key: RunKey) -> Run:
    """Trains one arm with one seed; with the filter's own figures in the arms that it filters."""
    check_sklearn()
    data, (labelling, choice) = load_dataset(settings.dataset, settings.data_dir), ARMS[key.arm]
    found = image_map(settings, labelling, key.seed)
    count = len(found.labels)
    result: Run = {}
    kept = torch.ones(count, dtype=torch.bool, device=CPU)
    if choice in {FILTERED, RANDOM}:
        kept = found.kept(settings)
    if choice == RANDOM:
        kept = drop_at_random(count, int((~kept).sum()), key.seed)
    elif choice == PERFECT:
        kept = ~found.planted
    elif choice == FILTERED:
        result["filter"] = scores(kept, found.planted)._asdict()
        result["sweep"] = [
            {"factor": factor, **scores(found.kept(settings, factor), found.planted)._asdict()} for factor in SWEEP
        ]
        library = keep(found.places, found.labels, LIBRARY_MIN_SAMPLES, eps=LIBRARY_EPS)
        result["library"] = scores(library, found.planted)._asdict()
        result["extent"] = float((found.places.amax(0) - found.places.amin(0)).max())
    if (labelling, choice) == (PLANTED, FILTERED):
        as_long = replace(settings, feature_steps=settings.steps)
        longer = image_map(as_long, labelling, key.seed)
        result["longer"] = {"steps": settings.steps, **scores(longer.kept(as_long), longer.planted)._asdict()}
    split, test = Split(data.normalise(found.images[kept]), found.labels[kept]), data.test.first(TEST_IMAGES)
    batch = settings.workers * settings.batch_size
    model = train(split, settings.steps, batch, settings.learning_rate, key.seed)
    return {
        "images": len(split),
        "wrong_labels": int((kept & found.planted).sum()),
        "accuracy": accuracy(model, data.normalise(test.images), test.labels),
        **result,
    }


def _percent(runs: Sequence[Run], part: str, field: str) -> str:
    return f"{plus_minus(spread([100 * run[part][field] for run in runs]), 1)} %"


def differences(runs: Sequence[Run], arm: str, other: str) -> list[float]:
    """Returns points of accuracy of an arm above another one, by seed."""
    found = {run["seed"]: run["accuracy"] for run in runs_of(runs, other)}
    return [run["accuracy"] - found[run["seed"]] for run in runs_of(runs, arm)]


def compared(values: Sequence[float], least: float | None) -> str:
    """Returns what the 95 % interval of the mean (t test) says about a gain, and about the least that a source has.

    Example:
        >>> compared([1.0, 1.2, 1.1], 0.5), compared([0.0, 0.2, -0.1], 2.0)
        ('confirmed: above 0', 'refuted here: below +2.0, and 0 is within the interval')
    """
    if len(values) < 2:
        return "open: one seed"
    from scipy import stats  # comes with scikit-learn

    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    sign = "above 0" if low > 0 else "below 0" if high < 0 else "0 is within the interval"
    if least is None:
        return f"measured; no claim: {sign}"
    if high < least:
        return f"refuted here: below +{least}, and {sign}"
    return f"confirmed: {sign}" if low > 0 else f"open: the interval of the mean is ±{half:.1f} points"


def _claims_of_table() -> Claim:
    """Computes the percentages of the source's table from its counts."""
    wrong, total = [], 0
    for name, (kept, share, change) in TABLE_1.items():
        for printed, right in ((share, kept / 500), (change, kept / 500 - 100)):
            total += 1
            if f"{printed:.2f}" != f"{right:.2f}":
                wrong.append(f"{name} {right:.2f} (printed {printed:.2f})")
    verdict = f"refuted for {len(wrong)} of {total} figures, confirmed for the others"
    return claim_row("percentages of the source's Table I from its counts", "printed", "; ".join(wrong), verdict)


def _claims_of_kept(runs: Sequence[Run]) -> list[Claim]:
    filtered, noisy = runs_of(runs, f"{CLEAN}, {FILTERED}"), runs_of(runs, f"{PLANTED}, {FILTERED}")
    shares = [share for _, share, _ in TABLE_1.values()]
    known = f"{min(shares)} to {max(shares)} % by network"
    library = 100 * statistics.fmean(run["library"]["kept"] for run in filtered)
    kept = 100 * statistics.fmean(run["filter"]["kept"] for run in filtered)
    inside = min(shares) <= kept <= max(shares)
    extent = plus_minus(spread([run["extent"] for run in filtered]), 0)
    better = sum(
        all(run["filter"][field] > run["filter"][f"chance_{field}"] for field in ("precision", "recall"))
        for run in noisy
    )
    worse = sum(run["longer"]["recall"] < run["filter"]["recall"] for run in noisy)
    scale = "confirmed" if library >= min(shares) else "refuted here: eps in units of the map depends on its density"
    found = ", ".join(_percent(noisy, "filter", field) for field in ("precision", "recall"))
    chance = ", ".join(_percent(noisy, "filter", field) for field in ("chance_precision", "chance_recall"))
    return [
        claim_row(
            "clean: share kept, eps by the rule",
            known,
            _percent(filtered, "filter", "kept"),
            f"{'within' if inside else 'outside'} the source's range, by another rule for eps",
        ),
        claim_row(
            f"clean: share kept by the library's eps of {LIBRARY_EPS}; extent of the map",
            f"{known}; 5,000 images a class",
            f"{_percent(filtered, 'library', 'kept')}; {extent} units",
            scale,
        ),
        claim_row("planted: share kept, eps by the rule", "not given", _percent(noisy, "filter", "kept"), "measured"),
        claim_row(
            "planted: precision, recall; of a random drop of the same number",
            "drops noise; not measured",
            f"{found}; {chance}",
            f"{'confirmed' if better == len(noisy) else 'open'}: above chance in {better} of {len(noisy)} seeds",
        ),
        claim_row(
            f"planted: precision, recall with features of {noisy[0]['longer']['steps']} steps",
            "not given",
            ", ".join(_percent(noisy, "longer", field) for field in ("precision", "recall")),
            f"measured: recall is lower in {worse} of {len(noisy)} seeds",
        ),
    ]


def claim(runs: Sequence[Run]) -> list[Claim]:
    """Compares each claim of the source with the runs; means and standard deviations over seeds."""
    claims = [_claims_of_table(), *_claims_of_kept(runs)]
    for labels, choice, other, source, least in (
        (CLEAN, FILTERED, RANDOM, "+2.2 to +2.6 points (batches of 64 to 256)", 2.2),
        (CLEAN, FILTERED, FULL, "+0.6 points (batch of 256, each its own weight decay)", 0.6),
        (PLANTED, FILTERED, RANDOM, "not given", None),
        (PLANTED, FILTERED, FULL, "not given", None),
        (PLANTED, PERFECT, FULL, "not given", None),
    ):
        values = differences(runs, f"{labels}, {choice}", f"{labels}, {other}")
        here = f"{plus_minus(spread(values))} points"
        claims.append(claim_row(f"{labels}: accuracy, {choice} minus {other}", source, here, compared(values, least)))
    for quantity, source, why in (
        ("filtered minus full with batches of 6,272 and more", "+2.3 points", "open: it needs 50,000 images"),
        ("share kept by deeper networks' features", "98.76 % of ResNet-152", "open: one small network"),
    ):
        claims.append(claim_row(quantity, source, "not measured here", why))
    return claims


def draw(document: Document) -> "Figure":
    """Draws accuracy by arm, the kept share and precision and recall by the factor of ``eps``."""
    runs, settings = document["runs"], document["settings"]
    title = f"Density filter ({settings['dataset']}, {settings['train_images']} images, noise {settings['noise']})"
    drawn, (panels,) = figure(1, 3, title, 4.2, 3.8)
    for place, arm in enumerate(ARMS):
        colour = COLOURS[(FULL, FILTERED, RANDOM, PERFECT).index(ARMS[arm][1])]
        points(panels[0], place, [run["accuracy"] for run in runs_of(runs, arm)], colour)
    panels[0].set_xticks(range(len(ARMS)), labels=list(ARMS), rotation=30, ha="right", fontsize=7)
    panels[0].set_ylabel("test accuracy, %")
    for number, labels in enumerate((CLEAN, PLANTED)):
        _sweep(panels[1], runs_of(runs, f"{labels}, {FILTERED}"), "kept", labels, COLOURS[number])
    panels[1].set_ylabel("share kept, %")
    noisy = runs_of(runs, f"{PLANTED}, {FILTERED}")
    for number, field in enumerate(("precision", "recall")):
        _sweep(panels[2], noisy, field, field, COLOURS[number])
        _sweep(panels[2], noisy, f"chance_{field}", f"{field} by chance", COLOURS[number], "--")
    panels[2].set_ylabel("of planted labels, %")
    for panel in panels[1:]:
        panel.axvline(settings["eps_factor"], color="#777777", linewidth=1.0, linestyle=":")
        panel.set_xlabel("eps / median distance (dotted: the rule)")
        panel.set_ylim(-3, 103)
        panel.legend(fontsize=7)
    return drawn


def _sweep(panel: "Axes", runs: Sequence[Run], field: str, label: str, colour: str, style: str = "-") -> None:
    columns = list(zip(*([100 * entry[field] for entry in run["sweep"]] for run in runs), strict=True))
    means, around = [statistics.fmean(values) for values in columns], [deviation(values) for values in columns]
    panel.errorbar(SWEEP, means, around, fmt="o" + style, color=colour, label=label, capsize=3, markersize=3)


STUDY = Study(
    name="data-filter",
    help="Training on what a density filter keeps (features, t-SNE, DBSCAN by class), against controls.",
    arms=tuple(ARMS),
    measure=measure,
    claim=claim,
    draw=draw,
)
