"""How fast is the codec on one core, and how small are its packets? Against general-purpose compressors.

    python bench/bench_codec.py [--json FILE] [--elements 6553600] [--repeats 9] [--quick]

Every result is checked before it is timed; a wrong one ends the bench with status 1. Times are of this thread's CPU,
the median of the repeats with p10 and p90; GB/s are of float32 input. The peers (zlib, and zstd and lz4 where the
packages zstandard and lz4 are installed) compress the symbols that qcomm's grid produced, so quantization is not
counted on their side and their bytes have no headers.

Data sets: a, Laplace with a log-normal scale for each 1000 values, 6 bits; b, Gaussian, 8 bits; c, heavy-tailed
Laplace, 10 bits; k1 and k2, the sigma grid on a.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import qcomm
from qcomm import _native
from qcomm.codec import Segment, decode_into, encode
from qcomm.quantize import dequantize, plan, quantize
from qcomm.statistics import measure


@dataclass(frozen=True)
class Case:
    """A data set and the grid it goes through."""

    name: str
    make: Callable[[int, torch.Generator], torch.Tensor]
    grid: qcomm.grids.Grid


def laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(n, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


def scaled_laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    scale = torch.randn(-(-n // 1000), generator=generator).exp().repeat_interleave(1000)[:n]
    return laplace(n, generator) * scale


def gaussian(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


def heavy_laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    return laplace(n, generator) * torch.randn(n, generator=generator).mul(0.7).exp()


CASES = (
    Case("a", scaled_laplace, qcomm.RangeGrid(num_bits=6)),
    Case("b", gaussian, qcomm.RangeGrid(num_bits=8)),
    Case("c", heavy_laplace, qcomm.RangeGrid(num_bits=10)),
    Case("k1", scaled_laplace, qcomm.SigmaGrid(1.0)),
    Case("k1 single", scaled_laplace, qcomm.SigmaGrid(1.0, coding="single")),
    Case("k1 pair", scaled_laplace, qcomm.SigmaGrid(1.0, coding="pair")),
    Case("k2", scaled_laplace, qcomm.SigmaGrid(2.0)),
)


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Median, p10 and p90 of the thread's CPU seconds, after one run that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        begin = time.thread_time()
        function()
        seconds.append(time.thread_time() - begin)
    seconds.sort()
    return [statistics.median(seconds), seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10]]


def check(ok: bool, what: str) -> None:
    """Ends the bench on a wrong result."""
    if not ok:
        sys.exit(f"wrong result: {what}")


def measure_qcomm(case: Case, values: torch.Tensor, version: str, repeats: int) -> dict[str, object]:
    """Statistics, encode, encode with error feedback, decode and accumulate with one version of the inner loops."""
    with _native.using_cpu_feature(version):
        quantizer = plan(measure(values), case.grid, values)
        packet = encode([Segment(values, quantizer)]).clone()
        symbols = quantize(values, case.grid)[0]
        out, residual = torch.empty_like(values), torch.zeros_like(values)
        decode_into(packet, out)
        expected = dequantize(symbols, quantizer)
        inside = symbols != 2**quantizer.num_bits - 1 if quantizer.grid == _native.GridKind.SIGMA else symbols >= 0
        check(bool((out == expected)[inside].all()) and out[~inside].equal(values[~inside]), f"{case.name} {version}")
        seconds = {
            "plan": timed(lambda: plan(measure(values), case.grid, values), repeats),
            "encode": timed(lambda: encode([Segment(values, quantizer)]), repeats),
            "encode_ef": timed(lambda: encode([Segment(values, quantizer, residual)]), repeats),
            "decode": timed(lambda: decode_into(packet, out), repeats),
            "decode_accumulate": timed(lambda: decode_into(packet, out, accumulate=True), repeats),
        }
    info = qcomm.inspect(packet)
    return {
        "codec": f"qcomm {version}",
        "bits": info.bits_per_element,
        "entropy": info.entropy_bits,
        "coding": f"{info.coding}, table {info.segments[0].table}",
        "seconds": seconds,
    }


def peers() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Compressors that are installed: name -> (compress, decompress)."""
    found = {"zlib -1": (lambda data: zlib.compress(data, 1), zlib.decompress)}
    if importlib.util.find_spec("zstandard"):
        import zstandard  # optional

        found["zstd -1"] = (zstandard.ZstdCompressor(level=1).compress, zstandard.ZstdDecompressor().decompress)
    if importlib.util.find_spec("lz4"):
        import lz4.frame  # optional

        found["lz4"] = (lz4.frame.compress, lz4.frame.decompress)
    return found


def measure_peer(
    name: str, codec: tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]], data: bytes, count: int, repeats: int
) -> dict[str, object]:
    """One general-purpose compressor on the symbols, as bytes or, above 8 bits, as 16-bit words."""
    compress, decompress = codec
    packed = compress(data)
    check(decompress(packed) == data, name)
    seconds = {"encode": timed(lambda: compress(data), repeats), "decode": timed(lambda: decompress(packed), repeats)}
    return {"codec": name, "bits": 8 * len(packed) / count, "seconds": seconds}


def show(case: str, row: dict[str, object], count: int) -> None:
    """One line of the table: GB/s of float32 input."""
    seconds = row["seconds"]
    speeds = [f"{4 * count / seconds[key][0] / 1e9:8.2f}" if key in seconds else " " * 8 for key in COLUMNS]
    entropy = f"{row['entropy']:8.4f}" if "entropy" in row else " " * 8
    print(
        f"{case:10}{row['codec']:16}{row['bits']:8.4f}{entropy}{''.join(speeds)}  {row.get('coding', '')}", flush=True
    )


COLUMNS = ("encode", "encode_ef", "decode", "decode_accumulate")


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--elements", type=int, default=6_553_600, help="float32 values in a data set (25 MiB)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="100,000 values, 3 repeats: does it run?")
    options = parser.parse_args()
    count, repeats = (100_000, 3) if options.quick else (options.elements, options.repeats)
    torch.set_num_threads(1)

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    header = {
        "torch": torch.__version__,
        "cpu": processor(),
        "features": list(qcomm.cpu_features()),
        "commit": commit,
        "elements": count,
        "repeats": repeats,
    }
    copied = torch.empty(count)
    source = gaussian(count, torch.Generator().manual_seed(0))
    header["copy_gb_per_s"] = 4 * count / timed(lambda: copied.copy_(source), repeats)[0] / 1e9
    print("# " + ", ".join(f"{key} {value}" for key, value in header.items()))
    print(
        f"{'data':10}{'codec':16}{'bits':>8}{'entropy':>8}"
        + "".join(f"{c[:8]:>8}" for c in ("encode", "enc_ef", "decode", "dec_acc"))
    )
    results = []
    for case in CASES:
        values = case.make(count, torch.Generator().manual_seed(1))
        rows = [measure_qcomm(case, values, version, repeats) for version in qcomm.cpu_features()]
        symbols, quantizer = quantize(values, case.grid)
        data = symbols.to(torch.uint8 if quantizer.num_bits <= 8 else torch.int16).numpy().tobytes()
        if " " not in case.name:
            rows += [measure_peer(name, codec, data, count, max(1, repeats // 3)) for name, codec in peers().items()]
        for row in rows:
            show(case.name, row, count)
        results.append({"case": case.name, "grid": case.grid.describe(), "rows": rows})
    if options.json is not None:
        options.json.write_text(json.dumps({**header, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
