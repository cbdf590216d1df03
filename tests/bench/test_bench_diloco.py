"""The benches of DiLoCo: the sparse rival, methods by their names, and the time that a delay hides."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import assert_same_on_all_ranks, world
from studies import BENCH


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/."""
    pytest.importorskip("scipy", reason="scipy, which has the t distribution, is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_diloco
    import sparse_outer

    return bench_diloco, sparse_outer


def test_what_arrives_of_a_vector_is_its_largest_values_by_two_magnitudes(bench):
    _, sparse_outer = bench
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    arrived = sparse_outer.sparse(values)
    for begin in range(0, 10_000, 4096):
        chunk, sent = values[begin : begin + 4096], arrived[begin : begin + 4096]
        largest = chunk.abs().topk(64).indices
        assert sent.count_nonzero() == 64 and bool((sent[largest].sign() == chunk[largest].sign()).all())
        assert sent.abs().unique().numel() == 3  # two, and 0
        torch.testing.assert_close(sent.abs().sum(), chunk[largest].abs().sum())


def test_methods_are_named_with_both_steps(bench):
    study, _ = bench
    options = study.options_of("k=2/1.5 streamed")
    assert options["grid"].step == 2.0 and options["mean_step"] == 1.5 and options["fragments"] == 3
    assert "mean_step" not in study.options_of("k=2")
    for wrong in ("k", "sparse", "fp16", "k=2 later"):
        with pytest.raises(ValueError, match="method is"):
            study.options_of(wrong)


def record(study, method, seed, loss, **counted):
    stats = dict.fromkeys(study.COUNTERS[:2], 3000.0) | counted
    key = {"parameters": 1000, "steps": 10, "period": 5, "method": method, "seed": seed}
    return {**key, "held_out_loss": loss, "stats": stats}


def test_ways_are_counted_apart_where_runs_have_them(bench):
    study, _ = bench
    ways = {"bytes_of_values": 1000.0, "bytes_of_means": 1750.0, "bytes_of_headers": 250.0}
    records = [record(study, "fp32", seed, 2.0) for seed in range(3)]
    records += [record(study, "k=1", seed, 2.0 + 0.001 * seed, **(ways if seed else {})) for seed in range(3)]
    before, now = study.summarise(records)
    assert before["bits_sent"] == now["bits_sent"] == 2.4 and "bits_of_values" not in before
    assert [now[f"bits_of_{way}"] for way in ("values", "means", "headers")] == [0.8, 1.4, 0.2]
    assert now["seeds_of_ways"] == 2
    assert now["verdict"] == "no loss" and now["minus_fp32"]["difference"] == pytest.approx(0.001)


@world(2)
def test_values_and_means_make_up_all_bytes(rank, world_size):
    pytest.importorskip("scipy", reason="scipy, which has the t distribution, is not installed")
    with mock.patch.object(sys, "path", [str(BENCH), *sys.path]):
        import bench_diloco as study
        import transformer_training
    text = transformer_training.Text("qcomm counts the ways of an exchange apart. " * 40)
    setting = transformer_training.Setting(ranks=2, steps=4, batch=2, context=16, width=32, depth=1, heads=2)
    found = {}
    for method, period in (("ddp", 0), ("fp32", 2), ("k=1", 2), ("k=2/2", 2), ("sparse=1", 2)):
        stats = study.train(study.Run(method, period, setting), text)["stats"]
        counted = torch.tensor([stats[name] for name in study.COUNTERS], dtype=torch.float64)
        dist.all_reduce(counted)  # one rank's means are larger than the other's
        found[method] = dict(zip(study.COUNTERS, counted.tolist(), strict=True))
        sent, received, *ways = counted.tolist()
        assert sent == received and (sum(ways) == sent or method == "sparse=1"), method
    assert found["ddp"]["bytes_of_values"] == 2 * found["fp32"]["bytes_of_values"]
    assert found["k=2/2"]["bytes_of_means"] < found["k=1"]["bytes_of_means"] < found["fp32"]["bytes_of_means"] / 8
    assert found["k=2/2"]["bytes_of_values"] < found["k=1"]["bytes_of_values"]


@world(2)
def test_the_rival_moves_all_ranks_alike(rank, world_size):
    with mock.patch.object(sys, "path", [str(BENCH), *sys.path]):
        from sparse_outer import SparseOuter
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    outer, before = SparseOuter(model, period=2), model.weight.detach().clone()
    for step in range(1, 7):
        with torch.no_grad():
            model.weight.sub_(0.1 * (rank + 1))
        outer.step()
        if step % 2 == 0:
            assert_same_on_all_ranks(model.weight.detach())
            moved = before - model.weight.detach()
            assert float(moved.min()) >= 0 and 0 < int(moved.count_nonzero()) <= 64 * world_size
            before -= moved
    stats = outer.stats()
    assert stats["bytes_sent"] == 3 * (64 * 14 + 64) / 8 and stats["bytes_received"] == stats["bytes_sent"]


@pytest.mark.world
def test_waits_are_measured_with_and_without_a_delay(tmp_path):
    out = tmp_path / "waits.json"
    options = ["--rate=none", "--hosts=2", "--turns=2", "--steps=4", "--delay=2", "--width=32", "--step-seconds=0.001"]
    command = [sys.executable, BENCH / "bench_diloco_wan.py", *options, "--methods", "k=1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    bare, at_once, later = json.loads(out.read_text())["rows"]
    assert bare["bits_sent"] == 0 < at_once["bits_sent"] == pytest.approx(later["bits_sent"], rel=0.5)
    assert (at_once["delay"], later["delay"]) == (0, 2) and isinstance(later["hidden"], float)
