"""Packets that never change: they pin the wire format.

``python tests/support/golden_cases.py`` writes tests/golden/ anew, for a new version of the format only.
"""

import json
import zlib
from pathlib import Path

import torch

import qcomm
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, encode
from qcomm.codec.quantize import Quantizer, plan
from qcomm.codec.quantizers import Coding, GridKind

FOLDER = Path(__file__).parents[1] / "golden"
UNPROTECTED = ("no_checksums", "runs_no_checksums")


def bell(n: int, seed: int) -> torch.Tensor:
    """A bell-shaped sample made of integers, so that no library's random numbers or logarithms can change it."""
    values = []
    state = seed
    for _ in range(n):
        total = 0
        for _ in range(6):
            state = (state * 1664525 + 1013904223) % 2**32
            total += state >> 16
        values.append((total - 6 * 32768) / 4096.0)
    return torch.tensor(values)


def with_tail(n: int, seed: int) -> torch.Tensor:
    x = bell(n, seed)
    x[:: max(1, n // 7)] *= 40.0
    return x


def several_segments() -> torch.Tensor:
    x, y = bell(600, 5), bell(100, 6)
    residual = bell(600, 7) / 16
    return encode(
        [
            Segment(
                x, plan(measure(x, residual, 0.5), qcomm.SigmaGrid(2.0, coding="pair"), x, residual, 0.5), residual
            ),
            Segment(y, Quantizer.raw()),
            Segment(y, Quantizer.constant(float("nan"))),
            Segment(x, plan(measure(x), qcomm.RangeGrid(num_bits=6), x)),
        ],
        inv_scale=0.5,
        block_steps=8,
    )


def runs(values: torch.Tensor, step: float) -> Segment:
    """A segment of zero runs, with a residual of a few parts in a hundred of the values."""
    return Segment(values, Quantizer(GridKind.SIGMA, 3, Coding.RUNS, 0, 0.0, step), bell(values.numel(), 11) / 16)


def sparse(n: int) -> torch.Tensor:
    """Runs of zeros of many lengths, longer than a skip among them, and values beyond three levels of 24."""
    x = torch.zeros(n)
    position = 0
    for i, value in enumerate(bell(n, 12).tolist()):
        position += 1 + i * i
        if position >= n:
            break
        x[position] = 8 * value
    return x


def run_segments() -> torch.Tensor:
    """Borders of segments inside of blocks, an empty segment among them, and other codings between."""
    x, y = bell(1500, 13), bell(100, 14)
    segments = [
        runs(x[:600], 16.0),
        Segment(y, Quantizer.raw()),
        runs(x[:0], 48.0),
        runs(y, 8.0),
        Segment(x[:200], plan(measure(x), qcomm.SigmaGrid(1.0, coding="pair"), x)),
        runs(x[600:], 24.0),
        Segment(y, Quantizer.constant(0.5)),
    ]
    return encode(segments, inv_scale=0.5, block_steps=6)


def run_cases() -> dict[str, torch.Tensor]:
    """Packets of zero runs: blocks that are coded, zeros, fixed and not finite."""
    not_finite = bell(1500, 15)
    not_finite[701] = float("nan")
    return {
        "runs": encode([runs(torch.cat([bell(4096, 16), torch.zeros(2048)]), 24.0)], block_steps=16),
        "runs_dense": encode([runs(bell(200, 17), 3.0)]),
        "runs_not_finite": encode([runs(not_finite, 48.0)], block_steps=4),
        "runs_float64": encode([runs(sparse(9000).double(), 24.0)]),
        "runs_segments": run_segments(),
        "runs_no_checksums": encode([runs(bell(900, 18), 20.0)], checksum=False, block_steps=8),
    }


def cases() -> dict[str, torch.Tensor]:
    """Packets by name, computed now."""
    sigma, ranged = qcomm.SigmaGrid, qcomm.RangeGrid
    return {
        "sigma1_pair": qcomm.compress(bell(1201, 1), sigma(1.0, coding="pair"), block_steps=8),
        "sigma2_pair_tail": qcomm.compress(with_tail(999, 2), sigma(2.0, coding="pair")),
        "sigma1_single_tail": qcomm.compress(with_tail(999, 2), sigma(1.0, coding="single"), block_steps=16),
        "sigma2_own_table": qcomm.compress(bell(1500, 3), sigma(2.0, coding="table")),
        "sigma_fine_fixed": qcomm.compress(bell(300, 3), sigma(2.0**-10)),
        "sigma_half_float16": qcomm.compress(with_tail(700, 4).half(), sigma(0.5)),
        "sigma1_bfloat16": qcomm.compress(bell(700, 4).bfloat16(), sigma(1.0, coding="single")),
        "sigma1_float64": qcomm.compress(with_tail(700, 4).double(), sigma(1.0)),
        "range_paper": qcomm.compress(bell(2000, 8).reshape(4, 5, 100), ranged("paper")),
        "range_endpoint_6": qcomm.compress(bell(2000, 9), ranged(num_bits=6), block_steps=4),
        "range_fixed_14": qcomm.compress(bell(333, 9), ranged(num_bits=14)),
        "range_float64": qcomm.compress(bell(500, 9).double(), ranged(c=2)),
        "no_checksums": qcomm.compress(bell(700, 1), sigma(1.0, coding="pair"), checksum=False),
        "zeros": qcomm.compress(torch.zeros(3, 4)),
        "mostly_zero": qcomm.compress(torch.eye(50), sigma(1.0, coding="single")),
        "raw": qcomm.compress(torch.tensor([1.5, float("nan"), -float("inf")])),
        "empty": qcomm.compress(torch.empty(2, 0, 3, dtype=torch.float16)),
        "segments": several_segments(),
        **run_cases(),
    }


def read(name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray((FOLDER / f"{name}.qcm").read_bytes()), dtype=torch.uint8)


def fingerprint(x: torch.Tensor) -> int:
    """Of shape-less contents; NaN's bits count too."""
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy().tobytes()) if x.numel() else 0


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    decoded = {}
    for name, packet in cases().items():
        (FOLDER / f"{name}.qcm").write_bytes(packet.numpy().tobytes())
        decoded[name] = fingerprint(qcomm.decompress(packet))
    (FOLDER / "decoded.json").write_text(json.dumps(decoded, indent=2) + "\n")
    print(f"wrote {len(decoded)} packets to {FOLDER}")
