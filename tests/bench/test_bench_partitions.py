"""bench_partitions runs and has figures of every method, and its backprop over a line is that of the whole model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import gathered, world
from torch import nn

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.world
def test_it_runs(tmp_path):
    out = tmp_path / "partitions.json"
    options = ["--rates", "none", "--batches", "2", "--batch-size", "8", "--repeats", "2", "--json", out]
    command = [sys.executable, BENCH / "bench_partitions.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 5 and all(row["samples_per_second"] > 0 and 0 < row["busy"] <= 1 for row in rows.values())
    values = 2 * 8 * 16 * 16 * 16
    sent = {name: row["bytes_sent"] for name, row in rows.items()}
    assert sent["one process"] == 0 and sent["backprop"] == sent["GPipe, m=4"] == 4 * values
    assert 4 * values < sent["partitions, raw"] < 4.1 * values and sent["partitions, 6 bits"] < values


@world(2, 4)
@pytest.mark.parametrize("micro", [1, 4])
def test_backprop_over_a_line_is_that_of_the_whole_model(rank, world_size, micro):
    sys.path.insert(0, str(BENCH))
    try:
        import bench_partitions
    finally:
        sys.path.remove(str(BENCH))
    torch.manual_seed(0)
    parts = bench_partitions.stages(1, bench_partitions._cuts(world_size)[:-1])
    whole = nn.Sequential(*(part.partition for part in parts), parts[-1].head)
    before = [parameter.clone() for parameter in whole.parameters()]
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 1, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(3)
    ]
    epoch = bench_partitions.Backprop(parts, micro).run_epoch(batches)  # each rank trains its part of ``whole``
    trained = nn.Sequential(*(part.partition for part in parts)), parts[-1].head
    mine = [*trained[0][rank].parameters(), *(trained[1].parameters() if rank == world_size - 1 else ())]
    after = [parameter.detach().clone() for parameter in mine]
    for parameter, value in zip(whole.parameters(), before, strict=True):
        parameter.data.copy_(value)
    optimizer = torch.optim.SGD(whole.parameters(), lr=bench_partitions.RATE)
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images), labels).backward()
        optimizer.step()
    for got, wanted in zip(after, mine, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert 0 < epoch.busy_seconds < epoch.seconds
    assert sum(int(each) for each in gathered(torch.tensor([epoch.sent_bytes]))) > 0
