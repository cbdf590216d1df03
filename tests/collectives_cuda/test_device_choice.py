"""The choice of a strategy for a bucket on a device, over emulated kernels, between processes, with its own clocks."""

import math
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, wrap
from device_buckets import Side, buffer_of, make_layout, mean_of_residuals
from distributed import assert_same_on_all_ranks, gathered, run, world
from emulated_core import emulated_device

import qcomm
from qcomm import SigmaGrid
from qcomm.collectives import tuner
from qcomm.collectives_cuda import strategies as device_choice
from qcomm.collectives_cuda import uncompressed
from qcomm.collectives_cuda.handshake import DevicePart
from qcomm.collectives_cuda.strategies import TRIAL, DeviceChoice, Stopwatch
from qcomm.collectives_cuda.two_phase import DeviceMean
from qcomm.collectives_cuda.uncompressed import UncompressedDeviceMean
from qcomm.communicator.faults import Fault, Phase
from qcomm.communicator.groups import get_communicator

pytestmark = pytest.mark.world

FINE, COARSE = SigmaGrid(1 / 64), SigmaGrid(1.0)  # finer than bfloat16, which is then not tried, and coarser
STRATEGIES = {FINE: ("none", "two_phase"), COARSE: ("none", "bf16", "two_phase")}
CPU = torch.device("cpu")
# What takes hundreds of collectives, of emulated kernels, sooner.
PERIOD, WARM_UP, RECHECK = 6, 4, 24
PERIODS = 60  # steps after which all ranks have agreed anew, for slots are kept for 50


def trials(count):
    """Collectives until all strategies have been tried twice, and a turn of what was chosen has begun."""
    return TRIAL * ((2 * tuner.ROUNDS + tuner.DUEL_ROUNDS) * count + 5) + WARM_UP + TRIAL


@contextmanager
def costs(taken):
    """Each strategy takes so many nanoseconds; yields the strategies that were taken."""
    now, chosen = [0], []

    class OwnClock(Stopwatch):
        def _mark(self, number):
            self._times.append(now[0])

    def counted(original, strategy_of):
        def average(self, task, scale, *rest, **options):
            chosen.append(strategy_of(rest))
            now[0] += taken[chosen[-1]]
            return original(self, task, scale, *rest, **options)

        return average

    with (
        mock.patch.multiple(device_choice, Stopwatch=OwnClock, PERIOD=PERIOD),
        mock.patch.multiple(tuner, WARM_UP=WARM_UP, RECHECK=RECHECK),
        mock.patch.object(DeviceMean, "average", counted(DeviceMean.average, lambda _: "two_phase")),
        mock.patch.object(
            UncompressedDeviceMean, "average", counted(UncompressedDeviceMean.average, lambda rest: rest[0])
        ),
    ):
        yield chosen


def make_choice(side):
    return DeviceChoice(dist.group.WORLD, get_communicator(dist.group.WORLD), side.telemetry, CPU)


def auto_task(side, buffer, layout, grid):
    task = side.task(buffer, layout, grid)
    return DevicePart.of(replace(task, options=replace(task.options, strategy="auto")))


@world(1, 3)
@pytest.mark.parametrize(
    ("grid", "fastest"), [(grid, name) for grid, names in STRATEGIES.items() for name in names], ids=str
)
def test_the_fastest_strategy_is_taken(rank, world_size, emulated_path, grid, fastest):
    layout, side = make_layout("small", world_size), Side(error_feedback=True)
    # Only the rank that waits for nobody, here another one for each strategy, tells what a strategy takes.
    taken = {
        name: (100 if name == fastest else 200) * (1 if rank == number % world_size else 10)
        for number, name in enumerate(STRATEGIES[grid])
    }
    with emulated_device(emulated_path), costs(taken) as chosen:
        choice = make_choice(side)
        place = torch.empty(layout.elements)
        steps = trials(len(STRATEGIES[grid])) + 2 * PERIOD
        for step in range(steps):
            choice.average(auto_task(side, place.copy_(buffer_of(layout, rank, step, torch.float32, "")), layout, grid))
            assert_same_on_all_ranks(place)
        choice.flush()
    assert len(chosen) == steps
    assert set(chosen[: TRIAL * tuner.ROUNDS * len(STRATEGIES[grid])]) == set(STRATEGIES[grid])
    assert set(chosen[-2 * PERIOD :]) == {fastest}
    assert all(other == chosen for other in gathered(chosen))
    assert set(side.telemetry.stats()["strategies"].values()) == {fastest}


@world(2)
def test_what_has_become_slow_is_left(rank, world_size, emulated_path):
    """What was chosen becomes slow: the others are tried again."""
    layout, side = make_layout("small", world_size), Side(error_feedback=True)
    taken = {"none": 200, "two_phase": 100}
    with emulated_device(emulated_path), costs(taken) as chosen:
        choice = make_choice(side)
        place = torch.empty(layout.elements)
        for step in range(trials(2) + 2 * RECHECK + tuner.RECENT * PERIOD):
            if step == trials(2) + PERIOD:
                taken["two_phase"] = 1000
            choice.average(auto_task(side, place.copy_(buffer_of(layout, rank, step, torch.float32, "")), layout, FINE))
    assert chosen[trials(2)] == "two_phase"
    assert chosen[-1] == "none"
    assert all(other == chosen for other in gathered(chosen))


@world(1, 2, 3)
@pytest.mark.parametrize("kind", ["", "zero"])
def test_nothing_is_lost_between_strategies(rank, world_size, emulated_path, kind):
    """Whatever strategies are tried in turn: what has not been sent is in the residuals."""
    layout, side = make_layout("uneven", world_size), Side(error_feedback=True)
    sums = [torch.zeros(layout.elements, dtype=torch.float64) for _ in range(2)]
    with emulated_device(emulated_path), costs({"none": 100, "two_phase": 100}) as chosen:
        choice = make_choice(side)
        place = torch.empty(layout.elements)
        for step in range(trials(2)):
            buffer = buffer_of(layout, rank, step, torch.float32, kind)
            choice.average(auto_task(side, place.copy_(buffer), layout, FINE), 1.0)
            sums[0] += place.double()
            sums[1] += sum(gathered(buffer.double())) / world_size
    assert set(chosen) == {"none", "two_phase"}
    kept = mean_of_residuals(side, layout, world_size)
    assert torch.allclose(sums[1] - sums[0], kept, rtol=0, atol=1e-6)


@world(2)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_unfit_gradient_takes_no_residual(rank, world_size, emulated_path, value):
    """A gradient that is not finite, or zero as of a parameter that was not used, takes no residual with it."""
    layout, side = make_layout("one tensor", world_size), Side(error_feedback=True)
    with emulated_device(emulated_path):
        mean = DeviceMean(dist.group.WORLD, get_communicator(dist.group.WORLD), side.telemetry)
        other = make_uncompressed(rank)
        mean.average(DevicePart.of(side.task(buffer_of(layout, rank, 0, torch.float32, ""), layout, COARSE)))
        before = side.feedback.norm()
        assert before > 0
        unfit = torch.zeros(layout.elements) if value == 0 else buffer_of(layout, rank, 1, torch.float32, "")
        unfit[5] = value
        other.average(
            DevicePart.of(side.task(unfit, layout, COARSE)), 1.0, "none", dist.group.WORLD, with_residuals=True
        )
        assert side.feedback.norm() == before
        other.average(
            DevicePart.of(side.task(torch.ones(layout.elements), layout, COARSE)), 8.0, "none", dist.group.WORLD, True
        )
        assert side.feedback.norm() == 0


def make_uncompressed(rank):
    return UncompressedDeviceMean(get_communicator(dist.group.WORLD), rank)


def case_faults(rank, world_size, path, failing, known):
    """A rank that fails goes on in step with the others, whatever strategy they take then."""
    layout, side = make_layout("uneven", world_size), Side(error_feedback=True)
    failed = []
    with emulated_device(path), costs({"none": 100, "bf16": 100, "two_phase": 50}) as chosen:
        choice = make_choice(side)
        place = torch.empty(layout.elements)
        for step in range(trials(3)):
            task = auto_task(side, place.copy_(buffer_of(layout, rank, step, torch.float32, "")), layout, COARSE)
            if rank == 1 and step == failing:
                error = ValueError("boom")
                fault, nothing = Fault(Phase.PREPARE, error), None if not known else layout
                task = DevicePart(task.index, place, side.telemetry, nothing, None, fault)
            try:
                fault = choice.average(task)
                if fault is not None:
                    raise fault.error
            except (ValueError, qcomm.CollectiveError) as error:
                failed.append((step, str(error)))
            else:
                assert bool(place.isnan().any()) == (step == failing), step
                assert step == failing or not place.isnan().any()
                if step != failing:
                    assert_same_on_all_ranks(place)
    since = len(chosen) - (trials(3) - failing - 1)
    assert all(other == chosen[since:] for other in gathered(chosen[since:]))
    return failed


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 5, 40])
def test_a_rank_that_fails_stays_in_step(emulated_path, failing, known):
    mine, theirs = run(2, case_faults, str(emulated_path), failing, known)[::-1]
    assert [step for step, _ in mine] == [failing] and "boom" in mine[0][1]
    # Before all know the bucket, they hear of it at once.
    assert theirs == [] or (theirs[0][0] == failing and "rank 1 failed" in theirs[0][1])
    assert theirs or failing not in (0,)


@world(2)
def test_the_hook(rank, world_size, emulated_path):
    with emulated_device(emulated_path), costs({"none": 100, "bf16": 300, "two_phase": 200}):
        model = wrap()
        state = qcomm.attach(model, device_codec=True)
        for step in range(trials(3)):
            assert_same_on_all_ranks(*backward(model, rank, step))
        stats = state.stats()
    assert set(stats["strategies"].values()) == {"none"}
    assert stats["steps"] == trials(3)


@world(2, seconds=40)
@pytest.mark.parametrize("strategy", ["none", "auto", "two_phase"])
def test_a_fault_right_after_warm_up(rank, world_size, emulated_path, strategy):
    """The first step after warm-up has other layouts of the same size: a rank with a fault knows that all agree."""
    with emulated_device(emulated_path):
        model = wrap()
        scales = iter([1.0, 1.0, -1.0 if rank == 1 else 1.0])
        qcomm.attach(model, strategy=strategy, warmup_steps=2, grad_scale=lambda: next(scales, 1.0), device_codec=True)
        for step in range(6):
            error = error_of(model, rank)
            assert (error is not None) == (step == 2), (step, error)
            if error is None:
                assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])
        assert error is None


@world(2, alone=True)
def test_a_rank_that_ends_half_way_stays_out(rank, world_size, emulated_path):
    """A rank that cannot even take part without values does not go on with another collective."""
    with emulated_device(emulated_path):
        model = wrap()
        scales = iter([1.0, 1.0, 1.0, -1.0 if rank == 1 else 1.0])
        state = qcomm.attach(model, strategy="two_phase", grad_scale=lambda: next(scales, 1.0), device_codec=True)
        for _ in range(3):
            backward(model, rank)
        if rank == 0:
            return
        with mock.patch.object(DeviceMean, "_take_part", side_effect=RuntimeError("out of memory")):
            assert "out of memory" in str(error_of(model, rank))
        assert "an earlier collective ended half way on this rank" in str(error_of(model, rank))
        assert "an earlier collective ended half way" in str(state.exception())


@world(2)
def test_a_way_without_memory(rank, world_size, emulated_path):
    """A rank without memory for a strategy tells the others before they begin with it."""
    layout, side = make_layout("uneven", world_size), Side(error_feedback=True)
    original, errors = uncompressed.UncompressedValues, []

    def make(strategy, *rest):
        if rank == 1 and strategy == "bf16" and not errors:
            raise MemoryError("no room")
        return original(strategy, *rest)

    with (
        emulated_device(emulated_path),
        mock.patch.object(uncompressed, "UncompressedValues", make),
        costs(dict.fromkeys(STRATEGIES[COARSE], 9)),
    ):
        choice = make_choice(side)
        place = torch.empty(layout.elements)
        for step in range(trials(3)):
            try:
                choice.average(
                    auto_task(side, place.copy_(buffer_of(layout, rank, step, torch.float32, "")), layout, COARSE)
                )
            except qcomm.CollectiveError as error:
                errors.append(str(error))
            else:
                assert_same_on_all_ranks(place)
    assert len(errors) == 1 and "rank 1 failed while preparing the exchange: MemoryError: no room" in errors[0]


@world(2, alone=True)
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_a_rank_that_cannot_prepare_takes_part_and_goes_on(rank, world_size, emulated_path, strategy):
    """Preparing a known bucket fails on one rank: it takes part without values, and nobody waits for its next one."""
    place, name = {"two_phase": (DeviceMean, "_prepare"), "none": (uncompressed, "_add_residuals")}[strategy]
    with emulated_device(emulated_path):
        model = wrap()
        qcomm.attach(model, strategy=strategy, device_codec=True)
        original, calls = getattr(place, name), []

        def fail_once(*arguments):
            calls.append(arguments)
            if rank == 1 and len(calls) == 1:
                raise MemoryError("no room")
            return original(*arguments)

        for _ in range(3):
            backward(model, rank)
        with mock.patch.object(place, name, fail_once):
            errors = [error_of(model, rank) for _ in range(PERIODS + 10)]
        if rank == 1:
            assert any("no room" in str(error) for error in errors)
        assert not any("ended half way" in str(error) for error in errors)
        assert errors[-1] is None
        assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])
