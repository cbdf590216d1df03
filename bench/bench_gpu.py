"""Time of the kernels on a GPU, held against codec goals and against nvCOMP on the same symbols in the same process.

    python bench/bench_gpu.py --json FILE [--quick]

GPU time by CUDA events, the host having been given a lead, so that gaps between launches do not count; 25 MiB with a
warm L2 and with a flushed one. GB/s are of float32 input. Every result is compared with the CPU's bytes before it is
timed, and the program ends with 1 where one differs. Exits 77 where there is no GPU.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_peers import peers

import qcomm
from qcomm.codec import CodedRange, DecodeTask, PacketSlot, _native_cuda
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, default_block_steps, encode
from qcomm.codec.plans_cuda import (
    ACCOUNT,
    QUANTIZER_BYTES,
    Decoder,
    DeviceTensor,
    Encoder,
    Workspace,
    address,
    own_code_bits,
)
from qcomm.codec.quantize import plan

MIB = 1 << 20
LEAD_CYCLES = 3_000_000  # about 1.5 ms: longer than the host takes to launch an operation
FLUSH_BYTES = 256 * MIB  # more than any L2 holds
RANKS = 8  # packets of a sum

GRIDS: dict[str, qcomm.codec.Grid] = {
    "k=1, static pair": qcomm.SigmaGrid(1.0, coding="pair"),
    "k=1, static single": qcomm.SigmaGrid(1.0, coding="single"),
    "k=1, chosen": qcomm.SigmaGrid(1.0),
    "8 bits, own code": qcomm.RangeGrid(num_bits=8),
    "10 bits, own code": qcomm.RangeGrid(num_bits=10),
}
# GPU microseconds on an H200: (MiB, case, operation) -> limit
GOALS = {
    (25, "8 bits, own code", "encode"): 45,
    (25, "k=1, static pair", "encode"): 25,
    (25, "8 bits, own code", "decode"): 20,
    (256, "8 bits, own code", "encode"): 300,
    (256, "k=1, static pair", "encode"): 105,
    (256, "8 bits, own code", "decode"): 98,
}


def gpu_microseconds(operation: Callable[[], object], rounds: int, flush: torch.Tensor | None) -> dict[str, float]:
    """Median, p10 and p90 of an operation's time on the current stream."""
    times = []
    for turn in range(rounds + 2):
        if flush is not None:
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LEAD_CYCLES)
        begin.record()
        operation()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(1000 * begin.elapsed_time(end))
    times.sort()
    tail = len(times) // 10
    return {"median": statistics.median(times), "p10": times[tail], "p90": times[-1 - tail]}


class Case:
    """One tensor on one grid: encoder, decoder and sum, and whether they write what the CPU writes."""

    def __init__(self, values: torch.Tensor, grid: qcomm.codec.Grid) -> None:
        self.count, self.device = values.numel(), torch.device("cuda", torch.cuda.current_device())
        self.values = values.to(self.device)
        self.residual = torch.zeros(self.count, device=self.device)
        self.workspace = Workspace(self.device)
        self.account = torch.zeros(len(ACCOUNT), dtype=torch.int64, device=self.device)
        self.quantizers = torch.zeros(QUANTIZER_BYTES, dtype=torch.uint8, device=self.device)
        self.faults = torch.zeros(RANKS, dtype=torch.int32, device=self.device)
        self.grid, self.steps = grid, default_block_steps(self.count)
        bound = self._encoder(None, 0, feedback=False).bound()
        self.out = torch.zeros(-(-bound // 16) * 16, dtype=torch.uint8, device=self.device)
        self.encoder = self._encoder(self.out, self.out.numel(), feedback=False)
        self.encoder_ef = self._encoder(self.out, self.out.numel(), feedback=True)
        self.decoded = torch.empty(self.count, device=self.device)
        self.wrong = self._verify(values)

    def _encoder(self, out: torch.Tensor | None, capacity: int, feedback: bool) -> Encoder:
        residual = address(self.residual) if feedback else 0
        tensor = DeviceTensor(self.values.data_ptr(), self.count, self.grid, residual)
        segment, packet = CodedRange(0, 0, self.count, residual), PacketSlot(1, address(out), capacity)
        return Encoder(torch.float32, self.steps, [tensor], [segment], [packet], self.workspace)

    def _decoder(self, packets: int) -> Decoder:
        task = DecodeTask(self.out.data_ptr(), self.nbytes, self.decoded.data_ptr(), self.count)
        bits = own_code_bits(self.grid)
        return Decoder(torch.float32, self.steps, 1, [task] * packets, bits, self.workspace)

    def _verify(self, values: torch.Tensor) -> int:
        """Bytes and values that differ from the CPU's."""
        self.encode_ef()
        quantizer, kept = plan(measure(values), self.grid, values), torch.zeros(self.count)
        encode([Segment(values, quantizer, kept)])
        wrong = int((self.residual.cpu() != kept).sum())
        self.residual.zero_()
        self.encode()
        packet = encode([Segment(values, quantizer)])
        self.nbytes = packet.numel()
        wrong += int((self.out[: self.nbytes].cpu() != packet).sum())
        self.decoder, self.adder = self._decoder(1), self._decoder(RANKS)
        self.decode()
        decoded = qcomm.decompress(packet)
        wrong += int((self.decoded.cpu() != decoded).sum())
        self.decode_sum()
        total = decoded.clone()
        for _ in range(RANKS - 1):
            total += decoded
        return wrong + int((self.decoded.cpu() != total).sum())

    def encode(self) -> None:
        """Values to a packet."""
        self.encoder.run(self.account, self.quantizers)

    def encode_ef(self) -> None:
        """With error feedback: the residual is read and written."""
        self.encoder_ef.run(self.account, self.quantizers)

    def decode(self) -> None:
        """The packet to values."""
        self.decoder.decode(self.faults.data_ptr())

    def decode_sum(self) -> None:
        """So many packets to their sum."""
        self.adder.decode_sum(self.faults.data_ptr(), add=False)


def kernel_times(operation: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of an operation, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            operation()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 10 for event in profiler.key_averages() if event.device_time_total}


def measured(mebibytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case and operation."""
    values = torch.randn(mebibytes * MIB // 4, generator=torch.Generator().manual_seed(1))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    source = values.cuda()
    target = torch.empty_like(source)
    copy = gpu_microseconds(lambda: target.copy_(source), rounds, None)
    yield {"mib": mebibytes, "case": "copy", "operation": "copy", "l2": "warm", "gpu_us": copy, "wrong": 0}
    for name, grid in GRIDS.items():
        case = Case(values, grid)
        kernels = {}
        try:
            kernels = {"encode": kernel_times(case.encode), "decode": kernel_times(case.decode)}
        except RuntimeError as error:  # a profiler may be forbidden on a machine; the other figures do not need it
            kernels = {"unavailable": {str(error): 0.0}}
        for operation in ("encode", "encode_ef", "decode", "decode_sum"):
            for l2, scratch in (("warm", None), ("flushed", flush)):
                times = gpu_microseconds(getattr(case, operation), rounds, scratch)
                yield {
                    "mib": mebibytes,
                    "case": name,
                    "operation": operation,
                    "l2": l2,
                    "gpu_us": times,
                    "gb_per_s": 4 * case.count / times["median"] / 1000,
                    "of_copy": copy["median"] / times["median"],
                    "bits_per_element": 8 * case.nbytes / case.count,
                    "kernels_us": kernels.get(operation, kernels.get("unavailable", {})),
                    "wrong": case.wrong,
                }


def verdicts(rows: list[dict[str, Any]], of_peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that these rows tell of."""
    found = []
    times = {(r["mib"], r["case"], r["operation"]): r["gpu_us"]["median"] for r in rows if r["l2"] == "warm"}
    for key, limit in GOALS.items():
        if key in times:
            reached = times[key] <= limit
            found.append({"what": list(key), "unit": "us", "is": times[key], "at_most": limit, "reached": reached})
    for (mib, case, operation), value in times.items():
        if case.startswith("10 bits") and operation == "encode":
            kernels = next(r["kernels_us"] for r in rows if (r["mib"], r["case"]) == (mib, case))
            codebook = [us for name, us in kernels.items() if "make_codes" in name]
            if codebook:
                row = {"what": [mib, "codebook of 1024 symbols"], "unit": "us", "is": codebook[0], "at_most": 15}
                found.append({**row, "reached": codebook[0] <= 15, "of": value})
    for operation in ("encode", "decode"):
        for mib, least in ((25, 2.5), (256, 1.5)):
            theirs = [p["gpu_us"][operation]["median"] for p in of_peers if p["mib"] == mib and "gpu_us" in p]
            mine = times.get((mib, "8 bits, own code", operation))
            if theirs and mine:
                ratio = min(theirs) / mine
                row = {"what": [mib, operation, "times the best peer"], "unit": "x", "is": ratio, "at_least": least}
                found.append({**row, "reached": ratio >= least})
    return found


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="1 MiB only, few rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: there is no CUDA device", file=sys.stderr)
        return 77
    _native_cuda.core()
    rows: list[dict[str, Any]] = []
    of_peers: list[dict[str, Any]] = []
    for mebibytes in (1,) if arguments.quick else (25, 256):
        rows += measured(mebibytes, 5 if arguments.quick else 30)
        of_peers += peers(mebibytes, gpu_microseconds, 5 if arguments.quick else 20)
        # What is known so far is kept, whatever comes after it.
        result = {"environment": environment(), "rows": rows, "peers": of_peers, "goals": verdicts(rows, of_peers)}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        times = row["gpu_us"]
        print(
            f"{row['mib']:4d} MiB  {row['case']:20s} {row['operation']:11s} {row['l2']:8s} {times['median']:9.1f} us "
            f"({times['p10']:.1f}-{times['p90']:.1f})  {row.get('gb_per_s', 0):8.1f} GB/s  #wrong {row['wrong']}"
        )
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
