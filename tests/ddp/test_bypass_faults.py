"""Bypassed steps that fail, and groups and processes that end while a bypassed sum is under way."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import AGREED, backward, error_of, wrap
from distributed import TIMEOUT, assert_same_on_all_ranks, die, gathered, run, world

import qcomm
from qcomm.collectives import BYPASSED, strategies
from qcomm.ddp import bypass
from qcomm.ddp import gloo_exit as callbacks

pytestmark = pytest.mark.world

PATHS = os.pathsep.join([str(Path(qcomm.__file__).parents[1]), str(Path(__file__).parents[1] / "support")])


@world(3)
def test_a_fault_of_a_bypassed_step_is_told_later(rank, world_size):
    model = wrap()
    scales = iter([1.0, 1.0, 1.0, -1.0 if rank == 1 else 1.0])
    state = qcomm.attach(model, strategy="none", grad_scale=lambda: next(scales, 1.0))
    # A sum does not need the scale; all ranks hear of the wrong one when they next agree.
    for _ in range(AGREED + BYPASSED):
        assert error_of(model, rank) is None
    error = error_of(model, rank)
    assert "rank 1 failed while preparing the exchange: ValueError: grad_scale must be positive" in str(error)
    assert isinstance(state.exception(), qcomm.CollectiveError)
    for _ in range(BYPASSED + 5):
        assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])


@world(3)
@pytest.mark.parametrize("name", ["fingerprint", "store"])
@pytest.mark.parametrize("boom", [MemoryError("boom"), RuntimeError("boom")], ids=["MemoryError", "RuntimeError"])
def test_a_rank_that_fails_after_a_bypassed_sum_says_so_later(rank, world_size, name, boom):
    """The others have their mean by then; a failure that stayed unknown would leave ranks with different weights."""
    model = wrap()
    state = qcomm.attach(model, strategy="bf16", min_elements=0)
    for _ in range(AGREED):
        backward(model, rank)
    with mock.patch.object(bypass.UncompressedValues, name, side_effect=boom) if rank == 1 else nullcontext():
        error = error_of(model, rank)
    assert (error is not None) == (rank == 1)
    if rank == 1:
        assert f"not stored on this rank: {type(boom).__name__}: boom" in str(error), error
        assert "was averaged" in str(state.exception())
    errors = [str(error) for _ in range(BYPASSED + 1) if (error := error_of(model, rank)) is not None]
    told = f"rank 1 failed while decoding the result: {type(boom).__name__}: boom"
    assert len(errors) == 1 and told in errors[0], errors
    for _ in range(BYPASSED + 5):
        assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])


def case_destroyed(rank, world_size):
    """gloo's own threads must not be the last to hold a group: they would wait for themselves, and abort."""

    def bypass_once():
        group = dist.new_group()
        model = wrap(process_group=group)
        qcomm.attach(model, strategy="none")
        for _ in range(AGREED + 1):
            backward(model, rank)
        dist.destroy_process_group(group)

    for _ in range(50):
        bypass_once()
    assert gathered(rank) == list(range(world_size))


def test_a_group_may_end_right_after_a_sum():
    run(2, case_destroyed)
    run(2, case_alive)  # which fails if a process has ended since


def case_alive(rank, world_size):
    assert gathered(rank) == list(range(world_size))


# Rank 0 ends while sums of its are under way, because its backward has failed, and rank 1 comes late.
LEAVING = """
import atexit
import sys
import torch.distributed as dist
atexit.register(lambda: print(all(future.done() for future in sums)))  # the first to be registered is the last called
from ddp_model import backward, wrap
import qcomm

def fail(*_):
    raise ValueError("boom")

rank, folder, end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/groups", rank=rank, world_size=2)
words, sums = dist.FileStore(f"{folder}/words", 2), []
model = wrap()
state = qcomm.attach(model, strategy="none")
for _ in range(3):
    backward(model, rank)
if rank == 1:
    words.wait(["leaving"])
    backward(model, rank)
else:
    atexit.register(words.set, "leaving", "")
    model.module[2].register_full_backward_hook(fail)
    try:
        backward(model, rank)
    except ValueError:
        sums += [lane.under_way for lane in state.reducer.bypass._lanes.values() if lane.under_way is not None]
        assert not all(future.done() for future in sums)
        exec(end)
"""


@pytest.mark.parametrize("end", ["sys.exit(0)", "dist.destroy_process_group()", "model = state = None"])
def test_a_process_does_not_end_during_a_sum(tmp_path, end):
    """gloo's threads would find no Python any more, and abort."""

    def start(rank):
        command = [sys.executable, "-c", LEAVING, str(rank), str(tmp_path), end]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PATHS})

    leaving, late = start(0), start(1)
    output, _ = leaving.communicate(timeout=60)
    late.communicate(timeout=60)
    assert (leaving.returncode, output) == (0, "True\n")


def test_a_forked_process_does_not_wait_for_its_parents_sums():
    token = callbacks.CallbackToken()
    with mock.patch.object(callbacks, "_callbacks", callbacks._callbacks):
        callbacks._forget()
        del token
        assert callbacks._callbacks._count == 0


@world(3, alone=True, dying=(1,))
def test_a_rank_that_dies_is_an_error_on_the_others(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, strategy="none")
    for _ in range(AGREED + 1):
        backward(model, rank)
    if rank == 1:
        die()
    error = error_of(model, rank)
    assert "was not averaged" in str(error) and isinstance(state.exception(), qcomm.CollectiveError)


@world(2)
def test_backward_does_not_leave_sums_behind(rank, world_size):
    """A step fails in one bucket while the sum of another, large one is under way: backward waits for it."""
    large = torch.nn.Sequential(torch.nn.Linear(48, 30_000), torch.nn.Linear(30_000, 48))
    model = torch.nn.parallel.DistributedDataParallel(large, bucket_cap_mb=1.0)
    state = qcomm.attach(model)
    original, waited = strategies.average, []

    def strategy_of(task):
        return "none" if task.index else "two_phase"

    def by_size(task, communicator, *arguments):
        options = replace(task.options, strategy=strategy_of(task))
        original(replace(task, options=options), communicator, *arguments)

    def slow(*arguments):
        deadline = time.perf_counter() + 0.3
        while rank == 1 and time.perf_counter() < deadline:  # as a rank whose backward takes longer
            pass
        return reduce(*arguments)

    def drained(*arguments):
        waited.append(len([lane for lane in state.reducer.bypass._lanes.values() if lane.under_way is not None]))
        return drain(*arguments)

    reduce, drain = state.reducer.bypass.reduce, state.reducer.bypass.drain
    with (
        mock.patch("qcomm.ddp.reducer.average", by_size),
        mock.patch("qcomm.ddp.reducer.settled", lambda task, *_: strategies.Settled(strategy_of(task))),
        mock.patch.object(state.reducer.bypass, "reduce", slow),
        mock.patch.object(state.reducer.bypass, "drain", drained),
    ):
        for step in range(AGREED + 3):
            failing = mock.patch("qcomm.collectives.two_phase_steps.encode", side_effect=ZeroDivisionError("boom"))
            with failing if step == AGREED + 1 else nullcontext():
                error = error_of(model, rank)
            assert (error is not None) == (step == AGREED + 1), error
            if error is not None:
                sums = [lane.under_way for lane in state.reducer.bypass._lanes.values() if lane.under_way is not None]
                assert sums and all(future.done() for future in sums) and waited
            else:
                assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])


@world(2, alone=True, timeout=timedelta(seconds=3))
def test_a_rank_without_memory(rank, world_size):
    """A rank that cannot take part in a sum says so, and adds to no other."""
    model = wrap()
    qcomm.attach(model, strategy="bf16", min_elements=0)
    for _ in range(AGREED):
        backward(model, rank)
    out_of_memory = mock.patch.object(
        bypass.UncompressedValues, "load", side_effect=RuntimeError("can't allocate memory")
    )
    with out_of_memory if rank == 1 else nullcontext():
        error = error_of(model, rank)
    assert ("can't allocate memory" if rank == 1 else "was not averaged") in str(error), error
    store = dist.distributed_c10d._get_default_store()
    store.set(f"failed on {rank}", "")
    store.wait([f"failed on {other}" for other in range(world_size)], TIMEOUT)  # rank 0 after the group's timeout
    # The group is gone, and when ranks next agree, over connections of qcomm's own, all hear why.
    errors = [str(error_of(model, rank)) for _ in range(BYPASSED)]
    assert "rank 1 failed while compressing its values: RuntimeError: can't allocate memory" in errors[-1], errors[-1]
