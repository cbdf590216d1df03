"""GPUs and links: their rates in training, and the sources of the figures.

A rate is that of a whole training step: three times the forward operations of a batch over the time of a step on one
GPU. It includes optimizer and input pipeline, at a batch that fills the GPU. The sources are all for one GPU of several
in a server:

resnet       images/s of ResNet-50: NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5,
             container 21.03 (V100: DGX-1 16 GB; A100: DGX A100 80 GB, where fp32 is TF32); P100: TensorFlow's benchmark
             page of 2017.
vgg          resnet's rate times VGG_FP32 (cuDNN's Winograd convolutions; from the P100's 154 images/s of VGG16) or, on
             tensor cores, VGG_TENSOR (from an RTX 3090's 455 images/s of VGG16 against 1182 of ResNet-50 in fp16).
transformer  V100: BERT-base of Oneflow-Inc/DLPerf, NVIDIADeepLearningExamples/PyTorch/BERT, batch 48 and 96; A100:
             BERT-large, NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT, container 21.11, length 128.

The other entries are derived, not measured, and their uncertainty is larger. T4: the V100's rates times the ratio of
inference rates in the README above. H100 and H200: the A100's rates times the ratio of memory bandwidths. For
transformers the factor is the geometric mean of that ratio and the ratio of tensor-core peaks.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qcomm.collectives import LinkProfile
from qcomm.planner.errors import PlanError

__all__ = [
    "FABRICS",
    "GPUS",
    "INSIDE",
    "Fabric",
    "Gpu",
    "default_fabric",
    "gpu_named",
    "inside_link",
    "is_infiniband",
    "parse_bandwidth",
    "pcie_among",
]

PRECISIONS = ("fp32", "amp")
VGG_FP32, VGG_TENSOR = 2.66, 1.46


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU in training.

    Args:
        name: name in tables.
        rates: 10^12 operations a second of a training step, by (family of the model, precision).
        memory_gb_per_s: memory bandwidth, 10^9 bytes a second.
        inside: key of ``INSIDE`` for its usual link in a node.
        uncertainty: uncertainty of the rates, as a fraction.
        memory_gb: of its largest version, 10^9 bytes.
        codec_gb_per_s: speed of qcomm's encoder and decoder by the model of its kernels, 10^9 bytes of fp32 gradients
            a second; None where there is no model.
    """

    name: str
    rates: Mapping[tuple[str, str], float]
    memory_gb_per_s: float
    inside: str
    uncertainty: float
    memory_gb: float
    codec_gb_per_s: tuple[float, float] | None = None

    def flops_per_second(self, family: str, precision: str) -> float:
        """Returns the operations a second of a training step.

        Raises:
            PlanError: the precision is unknown, or this GPU gains nothing from it.
        """
        if precision not in PRECISIONS:
            raise PlanError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
        if (family, precision) not in self.rates:
            raise PlanError(f"precision is {precision!r}, but {self.name} has no tensor cores; use fp32")
        return 1e12 * self.rates[family, precision]


def _rates(
    resnet: tuple[float, ...], transformer: tuple[float, ...], vgg: tuple[float, ...]
) -> dict[tuple[str, str], float]:
    """Returns rates by family and precision, from (fp32, amp); VGG's are a factor of ResNet's."""
    rates = {}
    for number, precision in enumerate(PRECISIONS[: len(resnet)]):
        rates["resnet", precision] = resnet[number]
        rates["vgg", precision] = resnet[number] * vgg[number]
        rates["transformer", precision] = transformer[number]
    return rates


_A100 = (23.0, 60.6), (76.2, 139.5)  # 938 and 2470 images/s; 317 and 580 sequences/s


def _as_a100(memory: float, tensor: float) -> dict[tuple[str, str], float]:
    """Returns the A100's rates times ratios of peaks."""
    wide = (memory * tensor) ** 0.5
    resnet, transformer = _A100
    return _rates(tuple(memory * r for r in resnet), tuple(wide * r for r in transformer), (VGG_TENSOR, VGG_TENSOR))


# Encoding with a residual and decoding, a bucket of 25 MiB in pairs: bench/results/cuda_model.json, in which the longer
# times of smaller buckets are, too. The model follows compiled code and has seen no GPU. An H200 has an H100's
# processors, and its larger bandwidth is not what a bucket of that size waits for.
_CODEC_A100, _CODEC_H100 = (249.0, 822.0), (450.0, 989.0)

GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # 219 images/s; BERT by the ratio of fp32 peaks to the V100.
        Gpu("p100", _rates((5.37,), (5.7,), (VGG_FP32,)), 732.0, "pcie", 0.15, 17.0),
        # 367 and 1200 images/s; 121.9 and 462 sequences/s.
        Gpu("v100", _rates((9.01, 29.4), (8.5, 32.3), (VGG_FP32, VGG_TENSOR)), 900.0, "nvlink2", 0.1, 34.0),
        # 428 of 1261 and 1198 of 3382 images/s of inference.
        Gpu("t4", _rates((3.06, 10.4), (2.9, 11.4), (VGG_FP32, VGG_TENSOR)), 320.0, "pcie", 0.3, 16.0),
        Gpu("a100", _rates(*_A100, (VGG_TENSOR, VGG_TENSOR)), 2039.0, "nvlink3", 0.1, 85.0, _CODEC_A100),
        Gpu("h100", _as_a100(3350 / 2039, 989 / 312), 3350.0, "nvlink4", 0.3, 85.0, _CODEC_H100),
        Gpu("h200", _as_a100(4800 / 2039, 989 / 312), 4800.0, "nvlink4", 0.3, 151.0, _CODEC_H100),
    )
}

# Between the GPUs of a node: GB/s that nccl-tests calls bus bandwidth, of all GPUs at once, typical of DGX-1V, DGX A100
# and DGX H100, and of two GPUs behind one PCIe 3.0 x16 switch; latency of a hop from NCCL's own model
# (src/graph/tuning.cc, ring, protocol Simple).
INSIDE: Mapping[str, LinkProfile] = {
    "pcie": LinkProfile(10.0, 5.7),
    "nvlink2": LinkProfile(120.0, 3.4),
    "nvlink3": LinkProfile(230.0, 3.4),
    "nvlink4": LinkProfile(360.0, 3.4),
}
# Without NVLink the GPUs of a node share bridges: a ring's copies pass an uplink once for each pair of GPUs, and with
# more than four there are two sockets, whose connection carries less. An assumption; --inside takes a measured rate.
PCIE_SHARING, PCIE_A_SOCKET, ACROSS_SOCKETS = 2, 4, 0.7


def pcie_among(gpus: int) -> LinkProfile:
    """Returns the link of each of a node's GPUs that only PCIe connects.

    Example:
        >>> [pcie_among(gpus).gb_per_s for gpus in (2, 4, 8)]
        [10.0, 5.0, 1.75]
    """
    pcie = INSIDE["pcie"]
    rate = pcie.gb_per_s * min(1.0, PCIE_SHARING / gpus) * (ACROSS_SOCKETS if gpus > PCIE_A_SOCKET else 1.0)
    return LinkProfile(rate, pcie.latency_us)


@dataclass(frozen=True)
class Fabric:
    """A kind of network: the usable share of its nominal rate, and its latency.

    Args:
        name: name in tables.
        efficiency: share of the nominal rate that carries gradients.
        most_gb_per_s: maximum rate that hosts can drive, regardless of the nominal rate.
        latency_us: latency of one hop.
        congestion: fraction of the time added per doubling of the nodes beyond ``ONE_SWITCH``, for flows that share a
            link between switches and for more distant switches.
        is_gloo: whether torch's gloo moves uncompressed gradients, rather than NCCL.

    Raises:
        PlanError: a number is out of its range.
    """

    name: str
    efficiency: float
    most_gb_per_s: float
    latency_us: float
    congestion: float
    is_gloo: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.latency_us < 1e6:
            raise PlanError(f"latency_us is {self.latency_us}; it must be positive, such as 14 for RDMA or 50 for TCP")
        if not 0 <= self.congestion < 10:
            raise PlanError(f"congestion is {self.congestion}; it must be at least 0, such as 0.02")

    def link(self, gb_per_s: float, nodes: int, efficiency: float | None = None) -> LinkProfile:
        """Returns the link of one node while all ``nodes`` send."""
        share = self.efficiency if efficiency is None else efficiency
        doublings = max(0.0, math.log2(nodes / ONE_SWITCH))
        return LinkProfile(
            min(gb_per_s * share, self.most_gb_per_s) / (1 + self.congestion * doublings), self.latency_us
        )


# Nodes that one switch connects, in which no flows share a link.
ONE_SWITCH = 8

FABRICS: Mapping[str, Fabric] = {
    fabric.name: fabric
    for fabric in (
        # 1448 bytes of values in the 1538 that a full Ethernet frame takes. Zhang et al., "Is network the bottleneck of
        # distributed training?" (NetAI 2020): sockets carry at most 32 Gb/s.
        Fabric("tcp", 0.94, 4.0, 50.0, 0.04),
        # TCP, but with gloo's rings in place of NCCL's: groups of CPUs.
        Fabric("gloo", 0.94, 4.0, 50.0, 0.04, is_gloo=True),
        # InfiniBand or RoCE with GPUDirect; NCCL's model has 14 us for a hop.
        Fabric("rdma", 0.9, 1e6, 14.0, 0.04),
        # One switch without congestion, and the rate is all for values: for effective bandwidths.
        Fabric("exact", 1.0, 1e6, 50.0, 0.0),
    )
}


def default_fabric(gb_per_s: float) -> str:
    """Returns "tcp" below 40 Gb/s, where most networks are Ethernet with TCP, and "rdma" otherwise: a guess."""
    return "tcp" if gb_per_s < 5.0 else "rdma"


# Of four lanes, in Gb/s. Whoever names a generation of InfiniBand has RDMA.
INFINIBAND: Mapping[str, float] = {
    "qdr": 32,
    "fdr": 54.5,
    "edr": 100,
    "hdr": 200,
    "hdr100": 100,
    "ndr": 400,
    "xdr": 800,
}


def gpu_named(name: str) -> Gpu:
    """Returns one of ``GPUS``.

    Raises:
        PlanError: there is no such preset.
    """
    if name.lower() not in GPUS:
        raise PlanError(
            f"gpu is {name!r}; it must be one of {', '.join(GPUS)}, or give --samples-per-second of one GPU of yours"
        )
    return GPUS[name.lower()]


_UNITS = {"bit": 0.125, "bps": 0.125, "b": 0.125, "b/s": 0.125, "bit/s": 0.125}
_BYTES = {"Bps": 1.0, "B": 1.0, "B/s": 1.0}
_PREFIXES = {"k": 1e-6, "m": 1e-3, "g": 1.0, "t": 1e3}


def parse_bandwidth(text: str, name: str = "network") -> float:
    """Parses a rate into GB/s: a small b is bits, a large B is bytes.

    A network may also be called by its Ethernet, such as 10GbE or 25G, or by its InfiniBand, such as HDR.

    Raises:
        PlanError: the text is not a positive rate; the message shows a valid one.

    Example:
        >>> parse_bandwidth("100Gbps"), parse_bandwidth("1gbit"), parse_bandwidth("12.5 GB/s")
        (12.5, 0.125, 12.5)
        >>> parse_bandwidth("10GbE"), parse_bandwidth("25G"), parse_bandwidth("HDR")
        (1.25, 3.125, 25.0)
    """
    if name == "network":
        if is_infiniband(text):
            return INFINIBAND[text.strip().lower()] / 8
        ethernet = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:G|GE|GbE|Gig|GigE)\s*", text, re.IGNORECASE)
        text = f"{ethernet[1]}Gbps" if ethernet else text
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kKmMgGtT])\s*([a-zA-Z/]+)\s*", text)
    unit = None if found is None else _BYTES.get(found[3], _UNITS.get(found[3].lower() if found[3][0] != "B" else ""))
    if found is None or unit is None or not math.isfinite(float(found[1])):
        raise PlanError(f"{name} is {text!r}; write a rate with its unit, such as 100Gbps, 25Gb/s, 100mbit or 12.5GB/s")
    value = float(found[1]) * _PREFIXES[found[2].lower()] * unit
    if value <= 0:
        raise PlanError(
            f"{name} is {text!r}; it must be above zero, such as 100Gbps: without a link nothing is exchanged"
        )
    return value


def is_infiniband(text: str) -> bool:
    """Returns whether a network is called by its generation of InfiniBand."""
    return text.strip().lower() in INFINIBAND


def inside_link(text: str) -> LinkProfile:
    """Parses a key of ``INSIDE``, or a rate, whose latency is then NVLink's.

    Raises:
        PlanError: the text is neither.
    """
    if text in INSIDE:
        return INSIDE[text]
    if not re.search(r"\d\s*[kKmMgGtT]", text) or text.startswith("nvlink"):
        raise PlanError(f"inside is {text!r}; it must be one of {', '.join(INSIDE)}, or a rate such as 40GB/s")
    return LinkProfile(parse_bandwidth(text, "inside"), INSIDE["nvlink2"].latency_us)
