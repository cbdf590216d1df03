"""Noise scale and tail index of gradients over training, by layer, and what quantization adds to them.

Sources: S. McCandlish et al., arXiv:1812.06162 (the noise scale); U. Simsekli, L. Sagun and M. Gurbuzbalaban, ICML 2019
(tails); L. Sagun's overview of empirical studies, which describes SGD as ``theta - eta g + eta / sqrt(S) eps`` with eps
~ N(0, C).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

import qcomm
from qcomm.codec import CPU
from qcomm.ddp import tail_index
from qcomm.paper import COLOURS, deviation, figure, plus_minus, spread
from qcomm.recipes import Split
from qcomm.studies.networks import NETWORKS
from qcomm.studies.records import Run
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.study import Claim, Document, Study, claim_row, runs_of
from qcomm.studies.workers import Exchange, Gradients, drawn, gradient, step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Arm -> network and step of the SigmaGrid; None exchanges exact gradients.
ARMS: dict[str, tuple[str, float | None]] = {
    "mlp, exact": ("mlp", None),
    "mlp, step 1": ("mlp", 1.0),
    "mlp, step 3.2": ("mlp", 3.2),
    "cnn, exact": ("cnn", None),
}
EXACT = ("mlp, exact", "cnn, exact")
WINDOWS = 5
FROZEN_STEPS = 64
FROZEN_BATCHES = (8, 32, 128)
LARGE = str(FROZEN_BATCHES[-1])
PER_SAMPLE_CHUNK = 100
MIN_TAILS = 1024  # elements of a tensor whose tail index is taken


def windows(steps: int) -> list[int]:
    """Returns the steps after which a window ends; each is about twice as long as the one before.

    Example:
        >>> windows(320)
        [20, 40, 80, 160, 320]
    """
    return sorted({max(1, round(steps / 2**number)) for number in range(WINDOWS)})


def measure(settings: StudySettings, key: RunKey) -> Run:
    """Trains one arm with one seed, and measures its noise in windows; then with frozen weights."""
    data, first = settings.load()
    split = Split(data.normalise(first.images), first.labels)
    name, grid_step = ARMS[key.arm]
    torch.manual_seed(key.seed)
    model = NETWORKS[name](data.channels)
    generator = torch.Generator().manual_seed(1000 + key.seed)
    exchange = Exchange(None if grid_step is None else qcomm.SigmaGrid(grid_step), settings.workers)
    noise, ends, history = qcomm.GradientNoise(settings.batch_size), windows(settings.steps), []
    for number in range(1, settings.steps + 1):
        images = [drawn(split, settings.batch_size, generator) for _ in range(settings.workers)]
        gradients = [gradient(model, *batch) for batch in images]
        mean = exchange.mean(gradients)
        noise.add(gradients[0], mean, settings.workers)
        step(model, mean, settings.learning_rate)
        if number in ends:
            tensors = {tensor: asdict(found) for tensor, found in noise.tensors().items()}
            history.append({"end": number, "total": asdict(noise.total()), "tensors": tensors})
            noise.reset()
    samples = settings.workers * settings.batch_size
    result: Run = {"samples": samples, "history": history, "loss": _loss(model, split)}
    if key.arm in EXACT:
        result["frozen"] = _frozen(model, split, settings.workers, generator)
        result["direct"] = _direct(model, split)
    return result


def _loss(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(split.images), split.labels))


def _frozen(model: nn.Module, split: Split, workers: int, generator: torch.Generator) -> Run:
    """Measures the noise at fixed weights with several batch sizes, and the tails of a Gaussian control."""
    found: Run = {}
    for batch in FROZEN_BATCHES:
        noise, exchange, squares = qcomm.GradientNoise(batch), Exchange(None, workers), dict[str, torch.Tensor]()
        last: Gradients = {}
        for _ in range(FROZEN_STEPS):
            gradients = [gradient(model, *drawn(split, batch, generator)) for _ in range(workers)]
            mean = exchange.mean(gradients)
            noise.add(gradients[0], mean, workers)
            last = {name: gradients[0][name] - mean[name] for name in mean}
            for name, values in last.items():
                squares[name] = squares.get(name, torch.zeros_like(values)) + values.square() / FROZEN_STEPS
        widths = {name: values.sqrt() for name, values in squares.items() if values.numel() >= MIN_TAILS}
        found[str(batch)] = {
            "total": asdict(noise.total()),
            "control": _inverse_mean([widths[name] * _normal(widths[name], generator) for name in widths]),
            "last": _inverse_mean([last[name] for name in widths]),
        }
    return found


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, dtype=torch.float32, device=CPU, generator=generator)


def _inverse_mean(tensors: Sequence[torch.Tensor]) -> float:
    """Returns the tail index of some tensors, as the mean of its inverse."""
    return 1 / statistics.fmean(1 / tail_index(tensor) for tensor in tensors)


def _direct(model: nn.Module, split: Split) -> dict[str, float]:
    """Returns trace and squared norm from the gradient of every sample."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(model, values, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(output, label.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    squared, total = 0.0, {name: torch.zeros_like(value) for name, value in parameters.items()}
    for images, labels in _chunks(split):
        for name, values in each(parameters, images, labels).items():
            squared += float(values.square().sum()) / len(split)
            total[name] += values.sum(0) / len(split)
    norm = sum(float(values.square().sum()) for values in total.values())
    return {"trace": squared - norm, "squared_norm": norm, "noise_scale": (squared - norm) / norm}


def _chunks(split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(split.images.split(PER_SAMPLE_CHUNK), split.labels.split(PER_SAMPLE_CHUNK), strict=True)


def _values(runs: Sequence[Run], read: Callable[[Run], float | None]) -> list[float]:
    return [value for run in runs if (value := read(run)) is not None]


def _shown(values: Sequence[float], digits: int = 2) -> str:
    return plus_minus(spread(values), digits) if values else "not found"


def _added(window: Run, samples: int) -> float | None:
    """Returns the error of quantization in units of the noise of the mean over ``samples`` samples."""
    total = window["total"]
    return float(total["quantization"] / total["trace"] * samples) if total["trace"] > 0 else None


def claim(runs: Sequence[Run]) -> list[Claim]:
    """Compares each claim of the sources with the runs; means and standard deviations over seeds."""
    claims = []
    for arm in EXACT:
        chosen = runs_of(runs, arm)
        claims += _claims_of_scale(arm, chosen) + _claims_of_tails(arm, chosen)
    for arm in ("mlp, step 1", "mlp, step 3.2"):
        chosen, exact = runs_of(runs, arm), runs_of(runs, "mlp, exact")
        scale = [_last_scale(run) for run in chosen], [_last_scale(run) for run in exact]
        ratios = [a / b for a, b in zip(*scale, strict=True) if a is not None and b is not None]
        claims.append(
            claim_row(
                f"error by quantization in a step, in units of the noise of the mean; {arm}",
                "adds to the noise",
                _shown(_values(chosen, lambda run: _added(run["history"][-1], run["samples"]))),
                "confirmed for one step; with error feedback it cancels over steps",
            )
        )
        claims.append(
            claim_row(f"noise scale, last window: {arm} to exact", "not given", _shown(ratios), "measured; no claim")
        )
    return claims


def _last_scale(run: Run) -> float | None:
    scale = run["history"][-1]["total"]["noise_scale"]
    return None if scale is None else float(scale)


def _claims_of_scale(arm: str, runs: Sequence[Run]) -> list[Claim]:
    first = [run["history"][0]["total"]["noise_scale"] for run in runs]
    last = [run["history"][-1]["total"]["noise_scale"] for run in runs]
    pairs = [(a, b) for a, b in zip(first, last, strict=True) if a is not None and b is not None]
    grows = sum(a < b for a, b in pairs)
    ratios = [run["frozen"]["32"]["total"]["trace"] / run["direct"]["trace"] for run in runs]
    by_batch = {
        batch: [run["frozen"][str(batch)]["total"]["trace"] / run["direct"]["trace"] for run in runs]
        for batch in FROZEN_BATCHES
    }
    flat = all(abs(statistics.fmean(values) - 1) < 0.1 for values in by_batch.values())
    return [
        claim_row(
            f"noise scale, first -> last window; {arm}",
            "grows while the loss falls",
            f"{_shown([a for a, _ in pairs], 0)} -> {_shown([b for _, b in pairs], 0)}",
            f"{'confirmed' if grows == len(runs) else 'refuted' if not grows else 'open'}: "
            f"it grows in {grows} of {len(runs)} seeds",
        ),
        claim_row(
            f"tr Σ from two workers, to that from every sample's gradient; {arm}",
            "equal in the mean",
            _shown(ratios),
            "confirmed" if abs(statistics.fmean(ratios) - 1) < 0.1 else "refuted",
        ),
        claim_row(
            f"noise scale at fixed weights, from two workers of {LARGE}; from every sample's gradient; {arm}",
            "equal in the mean",
            f"{_shown(_values(runs, _frozen_scale), 0)}; {_shown([run['direct']['noise_scale'] for run in runs], 0)}",
            f"{sum(map(_is_near, runs))} of {len(runs)} seeds within 2 standard errors of each",
        ),
        claim_row(
            f"tr Σ with {', '.join(map(str, FROZEN_BATCHES))} images a worker, to that of every sample; {arm}",
            "noise is C / S for S samples",
            ", ".join(_shown(values) for values in by_batch.values()),
            "confirmed" if flat else "refuted",
        ),
    ]


def _frozen_scale(run: Run) -> float | None:
    scale = run["frozen"][LARGE]["total"]["noise_scale"]
    return None if scale is None else float(scale)


def _is_near(run: Run) -> bool:
    """Returns whether the noise scale from two workers is that of every sample, within 2 standard errors."""
    found, scale = run["frozen"][LARGE]["total"], _frozen_scale(run)
    return scale is not None and abs(scale - run["direct"]["noise_scale"]) < 2 * float(found["noise_scale_error"])


def _below_two(values: Sequence[float]) -> str:
    """Returns whether the mean is below 2 by more than the half of its 95 % interval (t test)."""
    if len(values) < 2:
        return "open: one seed"
    from scipy import stats  # comes with scikit-learn

    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    return "below 2" if statistics.fmean(values) + half < 2 else "2 is within the interval"


def _claims_of_tails(arm: str, runs: Sequence[Run]) -> list[Claim]:
    elements = _values(runs, lambda run: run["frozen"]["32"]["total"]["tail_index"])
    control = [run["frozen"]["32"]["control"] for run in runs]
    totals = {batch: [run["frozen"][str(batch)]["total"] for run in runs] for batch in FROZEN_BATCHES}
    steps = {batch: _values(of, lambda total: total["tail_index_over_steps"]) for batch, of in totals.items()}
    return [
        claim_row(
            f"tail index over elements; of Gaussian noise of the same widths; {arm}",
            "below 2: heavy tails",
            f"{_shown(elements)}; {_shown(control)}",
            "below 2, but no evidence: Gaussian elements of these widths are below 2 as well",
        ),
        claim_row(
            f"tail index of each element over steps, {', '.join(map(str, FROZEN_BATCHES))} images a worker; {arm}",
            "below 2: heavy tails, eps not Gaussian",
            ", ".join(_shown(values) for values in steps.values()),
            "; ".join(f"{batch}: {_below_two(values)}" for batch, values in steps.items()),
        ),
    ]


def _curve(panel: "Axes", runs: Sequence[Run], read: Callable[[Run], float | None], label: str, colour: str) -> None:
    """Draws the mean over seeds, with a bar of one standard deviation."""
    ends = [window["end"] for window in runs[0]["history"]]
    columns = [_values([run["history"][number] for run in runs], read) for number in range(len(ends))]
    found = [(end, values) for end, values in zip(ends, columns, strict=True) if values]
    panel.errorbar(
        [end for end, _ in found],
        [statistics.fmean(values) for _, values in found],
        [deviation(values) for _, values in found],
        fmt="o-",
        color=colour,
        label=label,
        capsize=3,
        markersize=4,
        linewidth=1.3,
    )
    panel.set_xscale("log")
    panel.set_xticks(ends, labels=[str(end) for end in ends])
    panel.xaxis.minorticks_off()
    panel.set_xlabel("step (end of the window)")


def draw(document: Document) -> "Figure":
    """Draws noise scale, error of quantization, tail indices, and the layers' noise scales."""
    runs = document["runs"]
    settings = document["settings"]
    title = f"Gradient noise ({settings['dataset']}, {settings['workers']} workers of {settings['batch_size']})"
    drawn_figure, panels = figure(2, 2, title, 4.8, 3.4)
    for number, arm in enumerate(ARMS):
        chosen, colour = runs_of(runs, arm), COLOURS[number]
        _curve(panels[0][0], chosen, lambda window: window["total"]["noise_scale"], arm, colour)
        if arm in EXACT:
            _curve(panels[1][0], chosen, lambda window: window["total"]["tail_index"], f"{arm}, over elements", colour)
            name, other = f"{arm}, over steps", COLOURS[number + 1]
            _curve(panels[1][0], chosen, lambda window: window["total"]["tail_index_over_steps"], name, other)
        else:
            _curve(panels[0][1], chosen, partial(_added, samples=chosen[0]["samples"]), arm, colour)
    layers = [name for name in runs[0]["history"][0]["tensors"] if name.endswith("weight")]
    for number, name in enumerate(layers):
        read = _layer_scale(name)
        _curve(panels[1][1], runs_of(runs, "mlp, exact"), read, f"mlp, {name}", COLOURS[number])
    for row, column, label in (
        (0, 0, "noise scale, samples"),
        (0, 1, "error by quantization / noise of the mean"),
        (1, 0, "tail index (Gaussian: 2)"),
        (1, 1, "noise scale by layer, samples"),
    ):
        panels[row][column].set_ylabel(label)
        panels[row][column].legend(fontsize=7)
    for row, column in ((0, 0), (0, 1), (1, 1)):
        panels[row][column].set_yscale("log")
    panels[1][0].margins(y=0.35)  # for the legend
    return drawn_figure


def _layer_scale(name: str) -> Callable[[Run], float | None]:
    def read(window: Run) -> float | None:
        scale = window["tensors"][name]["noise_scale"]
        return None if scale is None else float(scale)

    return read


STUDY = Study(
    name="noise-scale",
    help="Noise scale and tail index of gradients over training, by layer, and what quantization adds.",
    arms=tuple(ARMS),
    measure=measure,
    claim=claim,
    draw=draw,
)
