"""Figure 3.5: bits per parameter against the epoch, in the paper's account and with all bytes counted."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcomm.paper import plots
from qcomm.paper.evaluation import Row, Run, epoch_mean, plus_minus, select, spread
from qcomm.paper.experiment import Claim, Experiment
from qcomm.paper.network import LAYERS, WEIGHT_COUNTS
from qcomm.paper.results import Document
from qcomm.paper.settings import INITS, Exchange
from qcomm.paper.training import ENTROPY_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT_BITS = 32
FLOORS = (5, 6)
PAPER = {5: (6.8, 3.55), 6: (None, 3.78)}  # raw and Huffman bits


def _exchange(floor: int) -> Exchange:
    return Exchange("grid", c=floor, entropy_bits=ENTROPY_BITS)


def paper_table_bits(run: Run) -> float:
    """Returns the bits per weight of the paper's table of 2**N floats per layer, mean over the epochs."""
    tables = [sum(FLOAT_BITS * 2.0 ** float(bits) for bits in epoch) for epoch in run["history"]["layer_raw_bits"]]
    return statistics.fmean(tables) / sum(WEIGHT_COUNTS)


def identity_error(run: Run) -> float:
    """Returns the largest distance of layer 1's Huffman rate from H + N - M over the epochs.

    The identity holds where weights are smooth.
    """
    history = run["history"]
    return max(
        abs(float(huffman[0] - (entropy[0] + raw[0] - ENTROPY_BITS)))
        for huffman, entropy, raw in zip(
            history["layer_huffman_bits"], history["entropy"], history["layer_raw_bits"], strict=True
        )
    )


def _overall_entropy(run: Run) -> float:
    """Returns H of the layers weighted by their sizes, mean over the epochs."""
    return statistics.fmean(
        sum(values[k] * WEIGHT_COUNTS[k] for k in range(LAYERS)) / sum(WEIGHT_COUNTS)
        for values in run["history"]["entropy"]
    )


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns a row per initialisation and floor."""
    rows = []
    for init in INITS:
        for floor in FLOORS:
            chosen = select(runs, _exchange(floor), init)
            packet = [epoch_mean("packet_bits")(run) for run in chosen]
            huffman = [epoch_mean("huffman_bits")(run) for run in chosen]
            rows.append(
                {
                    "init": init,
                    "c": floor,
                    "entropy": spread([_overall_entropy(run) for run in chosen]),
                    "raw_bits": spread([epoch_mean("raw_bits")(run) for run in chosen]),
                    "huffman_bits": spread(huffman),
                    "last_huffman_bits": spread([run["history"]["huffman_bits"][-1] for run in chosen]),
                    "paper_table_bits": spread([paper_table_bits(run) for run in chosen]),
                    "packet_bits": spread(packet),
                    "paper_ratio": round(FLOAT_BITS / statistics.fmean(huffman), 3),
                    "honest_ratio": round(FLOAT_BITS / statistics.fmean(packet), 3),
                    "identity_error": round(max(identity_error(run) for run in chosen), 4),
                }
            )
    return rows


def claim(runs: Sequence[Run], rows: Sequence[Row]) -> list[Claim]:
    """Compares the rates, the cost of one more bit, and the ratio with all bytes counted."""
    found = {(row["init"], row["c"]): row for row in rows}
    claims = []
    for floor in FLOORS:
        for number, (name, key) in enumerate((("raw", "raw_bits"), ("Huffman", "huffman_bits"))):
            expected = PAPER[floor][number]
            claims.append(
                {
                    "quantity": f"{name} bits per weight at c = {floor}; {', '.join(INITS)} initialisation",
                    "paper": "not given" if expected is None else str(expected),
                    "here": "; ".join(plus_minus(found[init, floor][key]) for init in INITS),
                }
            )
    steps = [found[init, 6]["huffman_bits"]["mean"] - found[init, 5]["huffman_bits"]["mean"] for init in INITS]
    claims.append(
        {
            "quantity": "Huffman bits from c = 5 to c = 6",
            "paper": "+0.23",
            "here": "; ".join(f"{step:+.2f}" for step in steps),
        }
    )
    for floor, paper in zip(FLOORS, ("9.01", "8.47"), strict=True):
        ratios = "; ".join(
            f"{found[init, floor]['paper_ratio']:.2f} ({found[init, floor]['honest_ratio']:.2f})" for init in INITS
        )
        claims.append(
            {"quantity": f"ratio to 32 bits at c = {floor} (all bytes counted)", "paper": paper, "here": ratios}
        )
    return claims


def draw(document: Document) -> "Figure":
    """Draws a panel for each initialisation: raw, Huffman and all bytes, for c = 5 and c = 6."""
    title = f"Bits per parameter, mean ± deviation over seeds ({document['settings']['dataset']})"
    figure, [panels] = plots.figure(1, len(INITS), title, 3.8, 3.6, sharey=True)
    for panel, init in zip(panels, INITS, strict=True):
        for floor, colour in zip(FLOORS, plots.COLOURS, strict=False):
            histories = [run["history"] for run in select(document["runs"], _exchange(floor), init)]
            for name, key, style in (
                ("raw (N)", "raw_bits", "--"),
                ("all bytes sent", "packet_bits", ":"),
                ("Huffman codewords", "huffman_bits", "-"),
            ):
                plots.curve(panel, [history[key] for history in histories], f"c = {floor}: {name}", colour, style)
            panel.axhline(PAPER[floor][1] or 0.0, color=colour, linestyle="-.", linewidth=0.9)
        panel.set_title(f"{init} initialisation", fontsize=10)
        plots.name_epochs(panel)
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("bits per parameter")
    panels[0].annotate("the paper's means after Huffman: 3.55, 3.78", (1, PAPER[5][1] or 0.0), (1, 2.9), fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="bit-rate",
    help="Figure 3.5: raw and Huffman bits per parameter at c = 5 and c = 6, and all bytes that are sent.",
    arms=tuple((init, _exchange(floor)) for init in INITS for floor in FLOORS),
    quantities=(
        "raw_bits",
        "huffman_bits",
        "packet_bits",
        "entropy",
        "layer_raw_bits",
        "layer_huffman_bits",
        "layer_packet_bits",
    ),
    summarise=summarise,
    claim=claim,
    draw=draw,
)
