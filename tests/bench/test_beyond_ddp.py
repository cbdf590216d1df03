"""The comparison "Beyond DDP": the same rows before and after the runs, and figures only from files."""

import json

import pytest
from studies import BENCH


@pytest.fixture
def beyond(monkeypatch):
    """tools/result_tables/beyond_ddp.py."""
    monkeypatch.syspath_prepend(str(BENCH.parent / "tools"))
    from result_tables import beyond_ddp

    return beyond_ddp


def test_rows_without_runs_are_unmeasured(beyond):
    def nothing(name):
        raise FileNotFoundError(name)

    rows = beyond.rows(nothing)
    assert {len(row) for row in rows} == {len(beyond.HEADINGS)}
    assert {row[2] for row in rows} == {beyond.UNMEASURED} and {row[5] for row in rows} == {""}
    assert len({row[0] for row in rows}) == len(rows)


def test_rows_with_runs_name_command_and_file(beyond):
    difference = {"difference": 0.1, "interval": [-0.2, 0.4]}
    diloco = {"method": "k=1", "period": 30, "steps": 600, "seeds": 5, "bits_sent": 0.1, "minus_fp32": difference}
    sharded = {"task": "resnet20", "ranks": 2, "method": "k=1", "seeds": 3, "steps": 300, "minus_fp32": difference}
    documents = {
        "diloco.json": {"summary": [diloco | {"verdict": "loss"}]},
        "fsdp_accuracy.json": {
            "summary": [sharded | {"verdict": "parity", "bits_of_gradients": 2.1, "bits_of_weights": 0.0}]
        },
        "diloco_wan.json": {"rows": [{"method": "k=1", "delay": 60, "hidden": 0.97, "bits_sent": 0.03}]},
        "fsdp.json": {
            "rows": [
                {"rate": "1gbit", "ranks": 2, "method": beyond.TIMED[0], "seconds_to_bf16": 0.5, "bytes_to_bf16": 0.7}
            ]
        },
    }
    rows = [row for row in beyond.rows(documents.__getitem__) if row[2] != beyond.UNMEASURED]
    results = [row[2] for row in rows]
    assert results == [
        "+0.100 nats [-0.200, +0.400], 5 seeds, loss",
        "97.0 % of the wait is hidden",
        "+0.10 points [-0.20, +0.40], 3 seeds of 300 steps, parity",
        "2.00 times as fast a step",
    ]
    assert all(row[4].startswith("`python bench/bench_") and row[5].endswith(".json)") for row in rows)


def test_every_bench_that_a_row_names_is_there(beyond):
    def committed(name):
        return json.loads((BENCH / "results" / name).read_text())

    commands = [row[4].strip("`").split()[1] for row in beyond.rows(committed) if row[4]]
    assert commands and all((BENCH.parent / command).is_file() for command in commands)
