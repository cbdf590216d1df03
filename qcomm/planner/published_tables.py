"""Tables of training rates that others published, from one GPU on: half of them for calibration, half for checks.

The half of a source is decided by :func:`half`, from the name of the source alone, so that its tables stay together.
Left out are rows whose source says that reading data limits them, and rows with accumulated gradients.

All machines of DLPerf are 4 nodes of 8 V100-SXM2-16GB with InfiniBand of 100 Gb/s. The others are single nodes: DGX-1
(V100), DGX-2 (16 V100 with NVSwitch) and DGX A100. Rates are images or sequences a second of all GPUs.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["TABLES", "Table", "half"]


class Table(NamedTuple):
    """A column of a published table.

    Args:
        source: repository and folder of the README, or report.
        name: of the column.
        model: one of the planner's models.
        precision: "fp32" (on an A100 TF32) or "amp".
        batch: samples a GPU.
        exchange: "ddp" for buckets that are exchanged during backward, or "horovod".
        rates: samples a second, by the number of GPUs; that of one GPU is the measured computing rate.
        gpu: of the planner's presets.
        gpus_per_node: GPUs of a full node.
        sequence: tokens, where it is not the model's usual number.
    """

    source: str
    name: str
    model: str
    precision: str
    batch: int
    exchange: str
    rates: Mapping[int, float]
    gpu: str = "v100"
    gpus_per_node: int = 8
    sequence: int | None = None


def half(source: str) -> str:
    """Returns "calibration" or "check" by the first byte of the SHA-256 of a source's name.

    Example:
        >>> half("Oneflow-Inc/DLPerf, MxNet/BERT"), half("Oneflow-Inc/DLPerf, OneFlow")
        ('calibration', 'check')
    """
    return "check" if hashlib.sha256(source.encode()).digest()[0] % 2 else "calibration"


_DLPERF, _NVIDIA = "Oneflow-Inc/DLPerf, ", "NVIDIA/DeepLearningExamples, "
_TORCH = f"{_DLPERF}PyTorch/resnet50v1.5"
_MXNET_NGC = f"{_DLPERF}NVIDIADeepLearningExamples/MxNet/Classification/RN50v1.5"
_TF_NGC = f"{_DLPERF}NVIDIADeepLearningExamples/TensorFlow/Classification/ConvNets/resnet50v1.5"
_TF_BERT_NGC = f"{_DLPERF}NVIDIADeepLearningExamples/TensorFlow/LanguageModeling/BERT"
_MXNET_BERT = f"{_DLPERF}MxNet/BERT"
_TF_BERT = f"{_DLPERF}TensorFlow/bert"
_PADDLE_BERT = f"{_DLPERF}PaddlePaddle/bert"
_ONEFLOW = f"{_DLPERF}OneFlow"
_TORCH_BERT = f"{_NVIDIA}PyTorch/LanguageModeling/BERT"
_TF_LARGE = f"{_NVIDIA}TensorFlow/LanguageModeling/BERT"
_MXNET = f"{_NVIDIA}MxNet/Classification/RN50v1.5"
_TF = f"{_NVIDIA}TensorFlow/Classification/ConvNets/resnet50v1.5"
_TORCH_RESNET = f"{_NVIDIA}PyTorch/Classification/ConvNets/resnet50v1.5"
_SQUAD = 384  # tokens of fine-tuning on SQuAD

# fmt: off
TABLES: tuple[Table, ...] = (
    Table(_TORCH, "DataLoader, 48 workers", "resnet50", "fp32", 128, "ddp",
          {1: 348.62, 4: 1226.38, 8: 2632.93, 16: 5115.4, 32: 10021.29}),
    Table(_TORCH, "DALI, 48 workers", "resnet50", "fp32", 128, "ddp",
          {1: 350.66, 4: 1306.49, 8: 2707.42, 16: 5193.09, 32: 10032.72}),
    Table(_MXNET_NGC, "fp32", "resnet50", "fp32", 128, "horovod",
          {1: 392.24, 8: 3006.98, 16: 5758.49, 32: 11331.93}),
    Table(_MXNET_NGC, "fp32, batch 96", "resnet50", "fp32", 96, "horovod",
          {1: 389.71, 8: 2947.72, 16: 5684.68, 32: 10419.21}),
    Table(_MXNET_NGC, "AMP", "resnet50", "amp", 256, "horovod",
          {1: 1393.87, 8: 9621.31, 16: 16219.03, 32: 30713.68}),
    Table(_TF_NGC, "fp32", "resnet50", "fp32", 128, "horovod",
          {1: 362.44, 4: 1391.28, 8: 2721.98, 16: 5099.42, 32: 9514.64}),
    Table(_TF_NGC, "AMP", "resnet50", "amp", 224, "horovod", {1: 945.18, 8: 6903.42, 16: 12021.09, 32: 24734.22}),
    Table(_TF_NGC, "AMP, XLA", "resnet50", "amp", 224, "horovod",
          {1: 1198.55, 8: 8588.45, 16: 14931.03, 32: 29171.69}),
    Table(_TF_BERT_NGC, "fp32, batch 32", "bert-base", "fp32", 32, "horovod",
          {1: 107.33, 8: 790.03, 16: 1404.04, 32: 2727.90}),
    Table(_TF_BERT_NGC, "fp32, batch 48", "bert-base", "fp32", 48, "horovod",
          {1: 112.76, 8: 855.45, 16: 1576.88, 32: 3089.74}),
    Table(_TF_BERT_NGC, "AMP", "bert-base", "amp", 64, "horovod",
          {1: 183.25, 4: 721.56, 8: 1452.59, 16: 2653.74, 32: 5189.07}),
    Table(_TF_BERT_NGC, "AMP, XLA, batch 64", "bert-base", "amp", 64, "horovod",
          {1: 422.53, 4: 1552.11, 8: 3112.73, 16: 5050.86, 32: 9409.2}),
    Table(_TF_BERT_NGC, "AMP, XLA, batch 96", "bert-base", "amp", 96, "horovod",
          {1: 468.10, 8: 3559.8, 16: 5960.14, 32: 11650.0}),
    Table(_MXNET_BERT, "fp32, batch 32", "bert-base", "fp32", 32, "horovod",
          {1: 150.11, 2: 270.28, 4: 538.5, 8: 1058.6, 16: 1845.65, 32: 3671.45}),
    Table(_MXNET_BERT, "fp32, batch 48", "bert-base", "fp32", 48, "horovod",
          {1: 153.75, 2: 287.77, 4: 572.64, 8: 1127.41, 16: 2067.72, 32: 4105.29}),
    Table(_MXNET_BERT, "fp32, batch 64", "bert-base", "fp32", 64, "horovod",
          {1: 156.76, 2: 295.42, 4: 587.71, 8: 1153.08, 16: 2172.62, 32: 4340.89}),
    Table(_MXNET_BERT, "fp16, batch 64", "bert-base", "amp", 64, "horovod",
          {1: 473.76, 2: 811.6, 4: 1623.56, 8: 3107.1, 16: 5723.26, 32: 11269.14}),
    Table(_MXNET_BERT, "fp16, batch 96", "bert-base", "amp", 96, "horovod",
          {1: 516.54, 2: 925.52, 4: 1837.08, 8: 3579.0, 16: 6684.57, 32: 13376.76}),
    Table(_MXNET_BERT, "fp16, batch 128", "bert-base", "amp", 128, "horovod",
          {1: 544.31, 2: 1000.15, 4: 1970.59, 8: 3825.21, 16: 7327.5, 32: 14822.31}),
    Table(f"{_DLPERF}MxNet/Classification/RN50v1b", "fp32", "resnet50", "fp32", 128, "horovod",
          {1: 384.19, 8: 2556.03, 16: 4855.34, 32: 9579.74}),
    Table(f"{_DLPERF}PaddlePaddle/resnet50v1.5", "fp32", "resnet50", "fp32", 128, "ddp",
          {1: 352.72, 2: 644.66, 4: 1358.64, 8: 2625.38, 16: 4895.27, 32: 9348.17}),
    Table(_PADDLE_BERT, "fp32, batch 32", "bert-base", "fp32", 32, "ddp",
          {1: 132.64, 8: 615.12, 16: 1116.02, 32: 2073.60}),
    Table(_PADDLE_BERT, "fp32, batch 96", "bert-base", "fp32", 96, "ddp",
          {1: 136.97, 8: 868.60, 16: 1631.36, 32: 3167.68}),
    Table(_PADDLE_BERT, "AMP, batch 160", "bert-base", "amp", 160, "ddp",
          {1: 309.68, 8: 1666.54, 16: 2969.85, 32: 5452.35}),
    Table(f"{_DLPERF}TensorFlow/resnet50v1.5", "fp32", "resnet50", "fp32", 128, "ddp",
          {1: 321.80, 8: 2458.74, 16: 4849.68, 32: 9418.44}),
    Table(f"{_DLPERF}TensorFlow/resnet50v1.5", "AMP", "resnet50", "amp", 256, "ddp",
          {1: 1075.27, 8: 6898.00, 16: 9870.15, 32: 19314.31}),
    Table(_TF_BERT, "fp32, batch 32", "bert-base", "fp32", 32, "ddp", {1: 103.58, 2: 177.18, 4: 347.83, 8: 675.82}),
    Table(_TF_BERT, "fp32, batch 48", "bert-base", "fp32", 48, "ddp", {1: 108.94, 2: 194.29, 4: 384.59, 8: 752.21}),
    Table(_TF_BERT, "fp32, batch 64", "bert-base", "fp32", 64, "ddp", {1: 112.99, 2: 204.16, 4: 402.02, 8: 805.43}),
    Table(_TF_BERT, "fp16, batch 64", "bert-base", "amp", 64, "ddp", {1: 228.66, 2: 385.19, 4: 746.9, 8: 1402.41}),
    Table(_ONEFLOW, "ResNet-50 fp32", "resnet50", "fp32", 128, "ddp",
          {1: 397.64, 8: 3130.34, 16: 6260.30, 32: 12411.97}),
    Table(_ONEFLOW, "ResNet-50 AMP", "resnet50", "amp", 256, "ddp",
          {1: 1472.72, 8: 10629.32, 16: 17920.40, 32: 33141.02}),
    Table(_ONEFLOW, "BERT-base fp32, batch 32", "bert-base", "fp32", 32, "ddp",
          {1: 152.89, 8: 1105.55, 16: 2015.78, 32: 3689.80}),
    Table(_ONEFLOW, "BERT-base fp32, batch 32, no clipping", "bert-base", "fp32", 32, "ddp",
          {1: 153.94, 8: 1194.48, 16: 2181.51, 32: 4019.45}),
    Table(_ONEFLOW, "BERT-base fp32, batch 96", "bert-base", "fp32", 96, "ddp",
          {1: 156.02, 8: 1201.70, 16: 2352.92, 32: 4664.10}),
    Table(_ONEFLOW, "BERT-base fp32, batch 96, no clipping", "bert-base", "fp32", 96, "ddp",
          {1: 156.25, 8: 1234.65, 16: 2425.97, 32: 4799.64}),
    Table(_ONEFLOW, "BERT-base AMP, batch 64", "bert-base", "amp", 64, "ddp",
          {1: 534.72, 8: 3399.43, 16: 5745.56, 32: 9911.78}),
    Table(_ONEFLOW, "BERT-base AMP, batch 64, no clipping", "bert-base", "amp", 64, "ddp",
          {1: 552.48, 8: 3897.19, 16: 6669.93, 32: 11195.72}),
    Table(_ONEFLOW, "BERT-base AMP, batch 160", "bert-base", "amp", 160, "ddp",
          {1: 605.11, 8: 4381.66, 16: 8075.16, 32: 15724.70}),
    Table(_ONEFLOW, "BERT-base AMP, batch 160, no clipping", "bert-base", "amp", 160, "ddp",
          {1: 613.93, 8: 4683.36, 16: 8777.57, 32: 17210.63}),
    Table(_TORCH_RESNET, "A100, TF32", "resnet50", "fp32", 256, "ddp", {1: 938, 8: 7248}, "a100"),
    Table(_TORCH_RESNET, "A100, AMP", "resnet50", "amp", 256, "ddp", {1: 2470, 8: 16621}, "a100"),
    Table(_TORCH_RESNET, "V100 16 GB, fp32", "resnet50", "fp32", 128, "ddp", {1: 367, 8: 2855}),
    Table(_TORCH_RESNET, "V100 16 GB, AMP", "resnet50", "amp", 256, "ddp", {1: 1200, 8: 8322}),
    Table(_TORCH_RESNET, "V100 32 GB, fp32", "resnet50", "fp32", 128, "ddp", {1: 356, 8: 2766}),
    Table(_TORCH_RESNET, "V100 32 GB, AMP", "resnet50", "amp", 256, "ddp", {1: 1156, 8: 8056}),
    Table(_TORCH_BERT, "DGX-1 16 GB, SQuAD fp32, batch 4", "bert-large", "fp32", 4, "ddp",
          {1: 8.96, 4: 31.04, 8: 64.64}, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-1 16 GB, SQuAD AMP, batch 4", "bert-large", "amp", 4, "ddp",
          {1: 35.88, 4: 120.00, 8: 227.84}, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-1 16 GB, SQuAD AMP, batch 10", "bert-large", "amp", 10, "ddp",
          {1: 45.2, 4: 163.6, 8: 327.2}, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-1 32 GB, SQuAD AMP, batch 10", "bert-large", "amp", 10, "ddp",
          {1: 46.0, 4: 164.0, 8: 325.6}, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-2, SQuAD fp32, batch 4", "bert-large", "fp32", 4, "ddp",
          {1: 9.92, 4: 35.52, 8: 71.36, 16: 141.40}, gpus_per_node=16, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-2, SQuAD AMP, batch 4", "bert-large", "amp", 4, "ddp",
          {1: 38.16, 4: 122.08, 8: 241.28, 16: 462.08}, gpus_per_node=16, sequence=_SQUAD),
    Table(_TORCH_BERT, "DGX-2, SQuAD AMP, batch 10", "bert-large", "amp", 10, "ddp",
          {1: 47.40, 4: 165.60, 8: 325.60, 16: 648.00}, gpus_per_node=16, sequence=_SQUAD),
    Table(_TF_LARGE, "DGX-1 32 GB, SQuAD AMP, batch 24", "bert-large", "amp", 24, "horovod",
          {1: 51.02, 4: 181.37, 8: 314.6}, sequence=_SQUAD),
    Table(_TF_LARGE, "DGX-1 32 GB, SQuAD fp32, batch 10", "bert-large", "fp32", 10, "horovod",
          {1: 10.42, 4: 39.77, 8: 79.37}, sequence=_SQUAD),
    Table(_TF_LARGE, "DGX-2, SQuAD AMP, batch 24", "bert-large", "amp", 24, "horovod",
          {1: 55.28, 4: 199.53, 8: 341.55, 16: 683.37}, gpus_per_node=16, sequence=_SQUAD),
    Table(_TF_LARGE, "DGX-2, SQuAD fp32, batch 10", "bert-large", "fp32", 10, "horovod",
          {1: 11.15, 4: 42.91, 8: 85.08, 16: 156.29}, gpus_per_node=16, sequence=_SQUAD),
    Table(_MXNET, "A100, AMP", "resnet50", "amp", 256, "horovod", {1: 2180, 2: 4332, 4: 8587, 8: 16925}, "a100"),
    Table(_MXNET, "A100, TF32", "resnet50", "fp32", 256, "horovod", {1: 1022, 2: 2032, 4: 4035, 8: 8001}, "a100"),
    Table(_MXNET, "DGX-1, AMP", "resnet50", "amp", 192, "horovod", {1: 1376, 2: 2768, 4: 5357, 8: 10723}),
    Table(_MXNET, "DGX-1, fp32", "resnet50", "fp32", 96, "horovod", {1: 384, 2: 763, 4: 1513, 8: 3005}),
    Table(_MXNET, "DGX-2, AMP", "resnet50", "amp", 256, "horovod",
          {1: 1492, 2: 2935, 4: 5726, 8: 11368, 16: 21484}, gpus_per_node=16),
    Table(_MXNET, "DGX-2, fp32", "resnet50", "fp32", 128, "horovod",
          {1: 417, 2: 821, 4: 1623, 8: 3223, 16: 6338}, gpus_per_node=16),
    Table(_TF, "A100, TF32", "resnet50", "fp32", 256, "horovod", {1: 909, 8: 7000}, "a100"),
    Table(_TF, "A100, AMP", "resnet50", "amp", 256, "horovod", {1: 2375, 8: 17400}, "a100"),
    Table(_TF, "V100, fp32", "resnet50", "fp32", 128, "horovod", {1: 412, 8: 3170}),
    Table(_TF, "V100, AMP", "resnet50", "amp", 256, "horovod", {1: 1270, 8: 9510}),
)
# fmt: on
