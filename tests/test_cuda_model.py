"""The model of the kernels' times: its arithmetic on made-up counts, and the committed instructions beside today's."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import cuda_model as model
from cuda_schedule import Instruction

GPU = model.Gpu(80, processors=10, gigahertz=1.0, memory_gb_per_s=100, l2_bytes=1e6, l2_cycles=200, memory_cycles=400)
RESULT = json.loads((model.ROOT / "bench/results/cuda_model.json").read_text())


def counts(blocks=10, warps=40, instructions=40_000, longest=1000, sectors=0, launches=1):
    return {"launches": launches, "blocks": blocks, "warps": warps, "instructions": instructions,
            "longest_warp": longest, "load_sectors": sectors, "store_sectors": 0}  # fmt: skip


def four_cycles(kernel, warps):
    """Four cycles of one warp, and as much for each of four that share a scheduler's pipes."""
    return {1: 4.0, 4: 10.0}[warps]


def test_sums_grow_on_a_line_and_the_longest_warp_with_the_logarithm():
    small, large = {"k": counts(blocks=4, longest=100)}, {"k": counts(blocks=16, longest=120)}
    at = model.at_size(small, large, (1 << 10, 1 << 12), 1 << 14)["k"]
    assert at["blocks"] == 64 and at["longest_warp"] == pytest.approx(140) and at["launches"] == 1


def test_a_scheduler_with_one_warp_takes_that_warp():
    assert model.warp_microseconds("k", counts(), GPU, four_cycles) == pytest.approx(4.0)


@pytest.mark.parametrize(("blocks", "microseconds"), [(20, 6.0), (40, 10.0), (41, 12.5), (80, 20.0)])
def test_warps_share_a_scheduler(blocks, microseconds):
    row = counts(blocks=blocks, warps=4 * blocks, instructions=4000 * blocks)
    assert model.warp_microseconds("k", row, GPU, four_cycles) == pytest.approx(microseconds)


def test_the_longest_of_three_bounds_counts():
    def time(sectors, moved):
        return model.kernel_microseconds("k", counts(sectors=sectors), moved, GPU, four_cycles)

    assert time(0, 0) == pytest.approx(4.0)
    assert time(200_000, 0) == pytest.approx(32 * 200_000 / 640e9 * 1e6)
    assert time(0, 1e6) == pytest.approx(10.0)


def test_an_operation_is_the_sum_of_its_kernels_and_the_gaps_between_them():
    kernels = {"decode_packets<float32>": counts(), "read_packets<float32>": counts(longest=250, launches=2),
               model.CLEAR: counts(0, 0, 0, 0, launches=2)}  # fmt: skip
    row = model.model_row("decode", 100_000, 20_000, kernels, GPU, {200: four_cycles, 400: None})
    # 3 launches and 2 clears; the first kernel waits for 420,000 bytes, the second has the mean warp's instructions.
    assert row["between_kernels"] == 7.5 and row["memory_floor"] == 4.2
    assert row["by_kernel"] == {"decode_packets<float32>": 4.2, "read_packets<float32>": 4.0}
    assert row["microseconds"] == pytest.approx(15.7)


def test_large_tensors_wait_for_memory_instead_of_the_l2_cache():
    kernels = {"decode_packets<float32>": counts(longest=1_000_000)}
    rates = {200: lambda kernel, warps: 1.0, 400: lambda kernel, warps: 2.0}
    near, far = (
        model.model_row("decode", values, 0, kernels, GPU, rates)["by_kernel"]["decode_packets<float32>"]
        for values in (240_000, 260_000)
    )
    assert (near, far) == (1000.0, 2000.0)


def test_the_longest_warp_does_alone_what_others_have_not():
    # Two warps share a scheduler, at 6 cycles an instruction, until the mean warp has ended.
    row = counts(blocks=20, warps=80, instructions=80_000, longest=1500)
    assert model.warp_microseconds("k", row, GPU, four_cycles) == pytest.approx(6.0 + 0.5 * 4.0)


LOOP = model.Signature(votes=1, loads=0, stores=0)


def rate_with(loops, instructions=1000.0, kernel="k"):
    # Ten instructions that wait 3 cycles each.
    body = [Instruction("IADD3", 3, 7, 7, 0)] * 10
    warp = {"k": model.LongestWarp(instructions, loops)}
    return model.rate_of({kernel: {"loop": model.Turn(body, 1, LOOP)}}, warp, 200)("k", 1)


def test_turns_take_the_cycles_of_what_ptxas_made_of_them():
    # 50 turns are 1000 instructions in PTX and 500 in SASS, of 3 cycles.
    assert rate_with({LOOP: (50, 1000)}) == pytest.approx(1.5)
    # What is outside the loop has no fewer in SASS.
    assert rate_with({LOOP: (50, 750)}) == pytest.approx(1.5 + 250 * 3 / 1000)


def test_kernels_without_a_hot_loop_have_an_assumed_rate():
    assert rate_with({}) == model.OTHER_CYCLES
    assert rate_with({LOOP: (50, 1000)}, kernel="another") == model.OTHER_CYCLES


def test_the_committed_figures_name_what_they_assume():
    assert RESULT["measured"].startswith("nothing")
    assert RESULT["commit"] and not RESULT["commit"].endswith("-dirty")
    assert set(RESULT["assumed"]["gpus"]) == {"A100", "H100"} and RESULT["tolerance"] == 0.3
    cases = {(row["operation"], row["mebibytes"], row["gpu"]) for row in RESULT["rows"]}
    assert len(cases) == len(RESULT["rows"]) == len(model.OPERATIONS) * len(model.MEBIBYTES) * len(model.GPUS)
    assert all(row["microseconds"] > row["memory_floor"] for row in RESULT["rows"])


@pytest.mark.skipif(os.environ.get("QCOMM_PTX") != "all", reason="compiles for a minute; QCOMM_PTX=all asks for it")
@pytest.mark.parametrize("architecture", [80, 90])
def test_hot_loops_have_no_more_instructions_than_are_committed(architecture):
    nvcc, nvdisasm = shutil.which("nvcc"), model.find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        pytest.skip("there is no nvcc, or no nvdisasm")
    committed = dict(RESULT["hot_loops"][f"sm_{architecture}"])
    for kernel, turns in model.compiled_turns(nvcc, nvdisasm, architecture, model.FILES).items():
        for name, turn in turns.items():
            assert len(turn.body) / turn.values <= 1.1 * committed.pop(f"{kernel} {name}"), (kernel, name)
    assert not committed
