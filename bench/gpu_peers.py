"""nvCOMP on the symbols that qcomm codes, for bench_gpu.py: ANS and GDeflate, where its wheels are installed.

Through its Python interface, which may wait for the device: GPU time is from the first launch to the last, gaps
included. Its licence allows comparison.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

import qcomm

MIB = 1 << 20
# (name, options of nvcomp.Codec)
CODECS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nvCOMP ANS", {"algorithm": "ANS"}),
    ("nvCOMP GDeflate, entropy only", {"algorithm": "GDeflate", "algorithm_type": 0}),
)

Timer = Callable[[Callable[[], object], int, torch.Tensor | None], dict[str, float]]


def peers(mebibytes: int, timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """A row for each peer: bits a symbol and times, or the reason why there are none."""
    try:
        nvcomp = import_module("nvidia.nvcomp")
    except ImportError as error:
        return [{"mib": mebibytes, "codec": "nvCOMP", "unavailable": str(error)}]
    values = torch.randn(mebibytes * MIB // 4, generator=torch.Generator().manual_seed(1))
    symbols = qcomm.codec.quantize.quantize(values, qcomm.RangeGrid(num_bits=8))[0].to(torch.uint8).cuda()
    rows = []
    for name, options in CODECS:
        row: dict[str, Any] = {"mib": mebibytes, "codec": name}
        try:
            codec = nvcomp.Codec(**options, cuda_stream=torch.cuda.current_stream().cuda_stream)
            array = nvcomp.as_array(symbols)
            encoded = codec.encode(array)
            restored = torch.as_tensor(codec.decode(encoded), device="cuda").view(torch.uint8)
            row["wrong"] = int((restored != symbols).sum())
            row["bits_per_element"] = 8 * encoded.buffer_size / symbols.numel()
            encode = timer(lambda codec=codec, array=array: codec.encode(array), rounds, None)
            decode = timer(lambda codec=codec, encoded=encoded: codec.decode(encoded), rounds, None)
            row["gpu_us"] = {"encode": encode, "decode": decode}
        except Exception as error:  # noqa: BLE001 - any: a peer's failure is a finding, and the figures go on
            row["unavailable"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows
