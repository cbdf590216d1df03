"""Reproduction of the experiments of RangeGrid's paper: compressed exchange of weights, once per epoch.

A. Oland and B. Raj, "Reducing communication overhead in distributed learning by an order of magnitude (almost)", ICASSP
2015. ``qcomm paper`` is the command-line interface of this package; docs/paper.md has the results.
"""

from qcomm.paper import ablation, bit_allocation, bit_rate, entropy, gradient_rms, lossless, quantization_levels
from qcomm.paper.evaluation import deviation, paired, plus_minus, spread, with_interval
from qcomm.paper.experiment import Experiment, perform
from qcomm.paper.plots import COLOURS, check_available, figure, points, save
from qcomm.paper.results import to_text, write_atomically
from qcomm.paper.settings import DATASETS, Settings

# By their names in `qcomm paper`, in the paper's order.
EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (quantization_levels, gradient_rms, entropy, bit_allocation, bit_rate, lossless, ablation)
}

__all__ = [
    "COLOURS",
    "DATASETS",
    "EXPERIMENTS",
    "Experiment",
    "Settings",
    "check_available",
    "deviation",
    "figure",
    "paired",
    "perform",
    "plus_minus",
    "points",
    "save",
    "spread",
    "to_text",
    "with_interval",
    "write_atomically",
]
