"""Published measurements, each with the request that stands for it: a test of the planner's accuracy.

There are three parts. ``PUBLISHED``: the planner's parts were built with these at hand, so they prove little. The rates
of presets come from other runs, except for BERT-base with one GPU. ``CALIBRATION`` and ``CHECK``: the two halves of
``published_tables``, divided by a rule before anything was fitted. TENSOR_SECONDS, the jitter, and the errors of the
model in ``plan`` were chosen on the first half and not changed after the second had been looked at. Computing is that
of the tables' own first rows, with one GPU.

Assumptions where a source is silent stand beside the request. docs/planner.md compares these figures with predictions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcomm.planner.hardware import FABRICS, GPUS, inside_link
from qcomm.planner.models import built_in
from qcomm.planner.plan import Request
from qcomm.planner.published_tables import TABLES, half
from qcomm.planner.schedulers import Ddp, Horovod, Scheduler

__all__ = ["CALIBRATION", "CHECK", "PUBLISHED", "Point"]


@dataclass(frozen=True)
class Point:
    """A published figure.

    Args:
        name: name of the experiment.
        source: publication of the figure.
        request: the experiment as a request.
        published: the figure.
        tolerance: permitted error of the prediction, as a fraction; tests enforce it for ``PUBLISHED``.
        measure: the corresponding field of a prediction, "samples_per_second" or "efficiency".
        method: method by which gradients were exchanged.
    """

    name: str
    source: str
    request: Request
    published: float
    tolerance: float
    measure: str = "samples_per_second"
    method: str = "fp32"


DLPERF = "Oneflow-Inc/DLPerf, NVIDIADeepLearningExamples/PyTorch"
_V100, _P100 = GPUS["v100"], GPUS["p100"]

# 4 nodes of 8 V100 SXM2, InfiniBand of 100 Gb/s; torch's DDP.
_RESNET = Request(built_in("resnet50"), 128, 1, 8, 12.5, gpu=_V100)
# NVIDIA's BERT exchanges after all micro-batches, and so after backward.
_BERT = Request(built_in("bert-base"), 32, 1, 8, 12.5, gpu=_V100, scheduler=Ddp(overlap=False))
# DeepSpeed, also after backward; 4 V100 a node, Ethernet of 40 Gb/s of which 4.1 are effective.
_ONE_BIT = Request(
    built_in("bert-large"), 16, 8, 4, 4.1 / 8, gpu=_V100, precision="amp", fabric=FABRICS["exact"],
    scheduler=Ddp(overlap=False),
)  # fmt: skip
# 4 P100 a node, RoCE of 25 Gb/s; Horovod of 2017 with its defaults of then.
_HOROVOD = Request(
    built_in("resnet101"), 64, 16, 4, 25 / 8, gpu=_P100, scheduler=Horovod(cycle_ms=5.0, fusion_mib=64.0)
)
# 6 V100 a node, two rails of InfiniBand of 100 Gb/s; NVLink of 50 GB/s and X-bus inside a node, of which a ring is
# taken to get 40. The abstract says neither batch nor framework.
_SUMMIT = Request(
    built_in("resnet50"), 128, 6144, 6, 25.0, gpu=_V100, inside=inside_link("40GB/s"), scheduler=Horovod()
)


def _series(
    name: str, source: str, base: Request, figures: dict[int, float], tolerance: float, method: str = "fp32"
) -> Iterator[Point]:
    for gpus, published in figures.items():
        yield Point(name, source, replace(base, gpus=gpus), published, tolerance, method=method)


PUBLISHED: tuple[Point, ...] = (
    *_series(
        "ResNet-50 fp32, batch 128, 8 V100 a node, IB 100 Gb/s", f"{DLPERF}/resnet50v1.5", _RESNET,
        {1: 367.29, 4: 1449.48, 8: 2887.65, 16: 5716.79, 32: 10917.09}, 0.05,
    ),
    *_series(
        "ResNet-50 AMP, batch 256, 8 V100 a node, IB 100 Gb/s, from 802.9 on one", f"{DLPERF}/resnet50v1.5",
        replace(_RESNET, batch=256, precision="amp", samples_per_second=802.9),
        {4: 3137.44, 8: 6154.66, 16: 11991.94, 32: 22551.16}, 0.12,
    ),
    *_series(
        "BERT-base fp32, batch 32, 8 V100 a node, IB 100 Gb/s", f"{DLPERF}/BERT", _BERT,
        {1: 119.6, 4: 457.72, 8: 921.32, 16: 1499.4, 32: 2885.81}, 0.08,
    ),
    *_series(
        "BERT-base AMP, batch 96, 8 V100 a node, IB 100 Gb/s", f"{DLPERF}/BERT",
        replace(_BERT, batch=96, precision="amp"), {1: 462.35, 4: 1727.93, 8: 3287.12, 16: 5426.07, 32: 10349.12}, 0.12,
    ),
    *_series(
        "BERT-base AMP, batch 64, 8 V100 a node, IB 100 Gb/s", f"{DLPERF}/BERT",
        replace(_BERT, batch=64, precision="amp"), {1: 444.51, 4: 1671.66, 8: 3251.7, 16: 4936.92, 32: 9331.72}, 0.12,
    ),
    *_series(
        "BERT-large fp16, batch 16, 4 V100 a node, 4.1 Gb/s effective", "1-bit Adam, arXiv:2102.02888, and DeepSpeed",
        _ONE_BIT, {8: 46.0, 16: 88.0}, 0.16, method="fp16",
    ),
    *_series(
        "ResNet-101 fp32, batch 64, 4 P100 a node, RoCE 25 Gb/s", "Horovod, docs/benchmarks.rst",
        _HOROVOD, {16: 1656.82}, 0.1,
    ),
    *(
        Point(name, "Horovod, README and docs/benchmarks.rst", replace(_HOROVOD, model=built_in(model), gpus=gpus),
              efficiency, 0.12, measure="efficiency")
        for name, model, gpus, efficiency in (
            ("ResNet-101 fp32, 4 P100 a node, RoCE 25 Gb/s", "resnet101", 128, 0.90),
            ("ResNet-101 fp32, 4 P100 a node, RoCE 25 Gb/s", "resnet101", 512, 0.90),
            ("VGG16 fp32, 4 P100 a node, RoCE 25 Gb/s", "vgg16", 128, 0.79),
            ("VGG16 fp32, 4 P100 a node, RoCE 25 Gb/s", "vgg16", 512, 0.68),
        )
    ),
    Point(
        "ResNet-50, 6 V100 a node, 2 IB 100 Gb/s (Summit)", "J. Yin et al., DLS at SC 2019 (abstract)", _SUMMIT, 0.87,
        0.1, measure="efficiency",
    ),
)  # fmt: skip

# Horovod of 2019 and 2020 with its defaults of then.
_EXCHANGES: dict[str, Scheduler] = {"ddp": Ddp(), "horovod": Horovod(cycle_ms=5.0, fusion_mib=64.0)}
TOLERANCE = 0.15


def _of_half(wanted: str) -> Iterator[Point]:
    for table in TABLES:
        if half(table.source) != wanted:
            continue
        base = Request(
            built_in(table.model, table.sequence), table.batch, 1, table.gpus_per_node, 12.5, gpu=GPUS[table.gpu],
            precision=table.precision, scheduler=_EXCHANGES[table.exchange], samples_per_second=table.rates[1],
        )  # fmt: skip
        rates = {gpus: rate for gpus, rate in table.rates.items() if gpus > 1}
        yield from _series(f"{table.model}: {table.name}", table.source, base, rates, TOLERANCE)


CALIBRATION, CHECK = tuple(_of_half("calibration")), tuple(_of_half("check"))
