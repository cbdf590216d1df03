"""Section 3.1: savings of lossless compression of the raw floats."""

import importlib
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from qcomm.paper import lzw, plots
from qcomm.paper.evaluation import Row, Run, spread
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.network import initial
from qcomm.paper.results import Document
from qcomm.paper.settings import INITS, Exchange, Settings
from qcomm.paper.training import train
from qcomm.recipes import augmentation_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = Exchange()
STATES = ("initial", "trained")
_ZLIB_LEVEL = 9
_ZSTD_LEVEL = 19


class Codec(NamedTuple):
    """A lossless codec: two functions from bytes to bytes."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def codecs() -> dict[str, Codec]:
    """Returns the available codecs: zstd comes with Python 3.14 or with the package zstandard."""
    found = {
        "LZW": Codec(lzw.compress, lzw.decompress),
        "zlib": Codec(partial(zlib.compress, level=_ZLIB_LEVEL), zlib.decompress),
    }
    for module in ("compression.zstd", "zstandard"):
        try:
            zstd = importlib.import_module(module)
        except ImportError:
            continue
        found["zstd"] = Codec(partial(zstd.compress, level=_ZSTD_LEVEL), zstd.decompress)
        break
    return found


def measure(settings: Settings, in_processes: bool) -> dict[str, Any]:
    """Trains, then compresses the bytes of all initial and all final weights.

    Raises:
        RuntimeError: a codec does not return its input.
    """
    networks = {
        "initial": initial(settings.init, augmentation_generator(settings.seed, 0, settings.workers)),
        "trained": train(settings, in_processes).network,
    }
    rows = []
    for state, network in networks.items():
        data = b"".join(weight.numpy().tobytes() for weight, _ in network)
        for name, codec in codecs().items():
            start = time.perf_counter()
            compressed = codec.compress(data)
            seconds = time.perf_counter() - start
            if codec.decompress(compressed) != data:
                raise RuntimeError(f"{name} does not return the {len(data)} bytes that it was given")
            rows.append(
                {
                    "state": state,
                    "codec": name,
                    "ratio": round(len(data) / len(compressed), 5),
                    "mb_per_s": round(len(data) / 1e6 / seconds, 3),
                }
            )
    return {"history": {}, "codecs": rows}


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns a row per initialisation, state of the weights and codec."""
    rows = []
    for init in INITS:
        entries = [entry for run in runs if run["init"] == init for entry in run["codecs"]]
        for state, codec in dict.fromkeys((entry["state"], entry["codec"]) for entry in entries):
            chosen = [entry for entry in entries if (entry["state"], entry["codec"]) == (state, codec)]
            rows.append(
                {
                    "init": init,
                    "state": state,
                    "codec": codec,
                    "ratio": spread([entry["ratio"] for entry in chosen]),
                    "mb_per_s": spread([entry["mb_per_s"] for entry in chosen]),
                }
            )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Compares the ratios of trained weights."""
    claims = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        chosen = [row for row in rows if row["codec"] == codec and row["state"] == "trained"]
        claims.append(
            {
                "quantity": f"ratio of {codec} on trained float32 weights; {', '.join(INITS)} initialisation",
                "paper": "little, if any, reduction" if codec == "LZW" else "not given",
                "here": "; ".join(f"{row['ratio']['mean']:.3f}" for row in chosen),
            }
        )
    return claims


def draw(document: Document) -> "Figure":
    """Draws ratios by codec, trained and initial weights side by side, a panel for each initialisation."""
    title = f"Lossless compression of float32 weights ({document['settings']['dataset']})"
    figure, [panels] = plots.figure(1, len(INITS), title, 3.4, 3.2, sharey=True)
    names = list(dict.fromkeys(row["codec"] for row in document["summary"]))
    for panel, init in zip(panels, INITS, strict=True):
        for position, name in enumerate(names):
            for number, state in enumerate(STATES):
                values = [
                    entry["ratio"]
                    for run in document["runs"]
                    for entry in run["codecs"]
                    if (run["init"], entry["codec"], entry["state"]) == (init, name, state)
                ]
                plots.points(panel, position + 0.3 * number - 0.15, values, plots.COLOURS[number])
        panel.axhline(1.0, color=plots.BASELINE_COLOUR, linestyle="--", linewidth=1.0)
        panel.set_xticks(range(len(names)), names)
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.set_title(f"{init} initialisation", fontsize=10)
    panels[0].set_ylabel("ratio, bytes before / after")
    for number, state in enumerate(STATES):
        panels[0].plot([], [], "D", color=plots.COLOURS[number], label=f"{state} weights")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="lossless",
    help="Section 3.1: LZW, zlib and zstd on the raw floats.",
    arms=tuple((init, FLOAT) for init in INITS),
    quantities=(),
    summarise=summarise,
    claim=claim,
    draw=draw,
    kind="lossless",
    measurement=measure,
)
