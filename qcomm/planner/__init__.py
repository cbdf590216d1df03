"""Predicts a training step on a cluster: will compressed gradients pay there, and how far does training scale?

``profiles`` says what a model asks, by formula (``networks``, ``transformers``, ``models``) or measured (``measure``);
``hardware`` what GPUs and links give, ``compute`` the times of forward and backward; ``collectives`` and ``methods``
what an exchange costs, ``schedulers`` when it may begin, and ``simulator`` what then happens. ``plan`` puts it together
with error bars, ``sweeps``, ``advice``, ``estimate``, ``report`` and ``plots`` say it. docs/planner.md has the model,
its parameters with their sources, and how far predictions were off.
"""

from qcomm.planner.errors import PlanError
from qcomm.planner.measure import profile
from qcomm.planner.methods import method_named
from qcomm.planner.models import MODEL_NAMES, built_in
from qcomm.planner.plan import Prediction, Request, predict, speedup
from qcomm.planner.profiles import ModelProfile, ParameterTensor

__all__ = [
    "MODEL_NAMES",
    "ModelProfile",
    "ParameterTensor",
    "PlanError",
    "Prediction",
    "Request",
    "built_in",
    "method_named",
    "predict",
    "profile",
    "speedup",
]
