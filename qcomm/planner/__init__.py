"""Predictions of a training step on a cluster: the gain of compressed gradients, and the scaling of training.

``profiles`` describes a model, by formula (``networks``, ``transformers``, ``models``) or measured (``measure``).
``hardware`` has the rates of GPUs and links, and ``compute`` the times of forward and backward. ``collectives`` and
``methods`` give the cost of an exchange, ``schedulers`` its earliest start, and ``simulator`` runs the step. ``plan``
combines them with error bars; ``sweeps``, ``advice``, ``estimate``, ``report`` and ``plots`` present the result.
docs/planner.md has the model, its parameters with their sources, and the measured errors of predictions.
"""

from qcomm.planner.advice import bandwidth_text, no_verdict, verdict
from qcomm.planner.errors import PlanError
from qcomm.planner.estimate import estimate
from qcomm.planner.hardware import (
    FABRICS,
    GPUS,
    INSIDE,
    Fabric,
    default_fabric,
    gpu_named,
    inside_link,
    is_infiniband,
    parse_bandwidth,
)
from qcomm.planner.measure import profile
from qcomm.planner.methods import Codec, Method, method_named
from qcomm.planner.models import MODEL_NAMES, built_in
from qcomm.planner.plan import (
    ASSUMED_CODEC,
    JITTER,
    Prediction,
    Request,
    anchored,
    assumed_codec,
    predict,
    speedup,
    trace_step,
)
from qcomm.planner.plots import check_plots, plot_efficiency, plot_heat_map
from qcomm.planner.profiles import ModelProfile, ParameterTensor
from qcomm.planner.report import assumptions, document, print_estimate, print_table
from qcomm.planner.schedulers import SCHEDULERS, Ddp, Horovod, Scheduler
from qcomm.planner.simulator import chrome_trace
from qcomm.planner.sweeps import SWEEPS, heat_map, sweep

__all__ = [
    "ASSUMED_CODEC",
    "FABRICS",
    "GPUS",
    "INSIDE",
    "JITTER",
    "MODEL_NAMES",
    "SCHEDULERS",
    "SWEEPS",
    "Codec",
    "Ddp",
    "Fabric",
    "Horovod",
    "Method",
    "ModelProfile",
    "ParameterTensor",
    "PlanError",
    "Prediction",
    "Request",
    "Scheduler",
    "anchored",
    "assumed_codec",
    "assumptions",
    "bandwidth_text",
    "built_in",
    "check_plots",
    "chrome_trace",
    "default_fabric",
    "document",
    "estimate",
    "gpu_named",
    "heat_map",
    "inside_link",
    "is_infiniband",
    "method_named",
    "no_verdict",
    "parse_bandwidth",
    "plot_efficiency",
    "plot_heat_map",
    "predict",
    "print_estimate",
    "print_table",
    "profile",
    "speedup",
    "sweep",
    "trace_step",
    "verdict",
]
