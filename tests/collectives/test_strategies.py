"""Plain and compressed means behind one interface, and the choice between them, alike on all ranks."""

import random
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, exact_mean, wrap
from distributed import all_reduce, assert_same_on_all_ranks, attach, gathered, world
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_strategies import all_slow_but

import qcomm
from qcomm.collectives import strategies
from qcomm.collectives import tuner as chooser
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.tuner import Chooser
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator.handshake import Took, agreed_time

CANDIDATES = ("none", "two_phase")


def choose(choosers, costs, count):
    """``count`` collectives on all ranks; ``costs(rank, strategy, number)``. What was run."""
    ran = []
    for number in range(count):
        chosen = [c.next("kind", CANDIDATES) for c in choosers]
        assert len(set(chosen)) == 1
        agreed = agreed_time([c.own_time("kind") for c in choosers])
        for rank, c in enumerate(choosers):
            took = costs(rank, chosen[0], number)
            c.finished("kind", agreed, took if isinstance(took, Took) else Took(took))
        ran.append(chosen[0])
    return ran


@pytest.mark.parametrize(
    ("plain", "compressed", "winner"),
    [(100, 50, "two_phase"), (50, 100, "none"), (100, 99, "none"), (100, 81, "none"), (100, 77, "two_phase")],
)
def test_the_faster_way_is_kept_where_it_is_worth_it(plain, compressed, winner):
    costs = {"none": plain, "two_phase": compressed}
    ran = choose([Chooser() for _ in range(3)], lambda rank, strategy, number: costs[strategy], 100)
    trials = [*list(CANDIDATES) * chooser.ROUNDS, CANDIDATES[0]]
    first, second = len(trials), len(trials) + chooser.WARM_UP
    # Close ones are tried more often, but not with the first trials.
    worth = [plain, chooser.WORTH_COMPRESSING * compressed]
    close = max(worth) <= chooser.CLOSE * min(worth)
    duel = [*list(CANDIDATES) * chooser.DUEL_ROUNDS, CANDIDATES[0]] if close else []
    end = second + len(trials) + len(duel)
    assert ran[:first] == trials and ran[second:end] == trials + duel
    assert set(ran[first:second]) == set(ran[end:]) == {winner}


@pytest.mark.parametrize(
    ("costs", "winner"),
    [
        ({"none": 100, "bf16": 99, "two_phase": 90}, "none"),
        ({"none": 100, "bf16": 90, "two_phase": 80}, "bf16"),
        ({"none": 100, "bf16": 90, "two_phase": 70}, "two_phase"),
        ({"none": 100, "all_gather": 71, "two_phase": 70}, "all_gather"),
    ],
)
def test_of_ways_that_are_equally_fast_the_exact_one_is_kept(costs, winner):
    c = Chooser()
    for _ in range(80):
        way = c.next("kind", tuple(costs))
        c.finished("kind", c.own_time("kind").work, Took(costs[way]))
    assert c.next("kind", tuple(costs)) == winner


def test_a_way_that_was_slow_only_at_first_is_found():
    def cost(rank, strategy, number):
        return 70 if strategy == "two_phase" else (300 if number < 10 else 50)

    ran = choose([Chooser() for _ in range(2)], cost, 100)
    assert ran[2 * chooser.ROUNDS + 1] == "two_phase" and set(ran[50:]) == {"none"}


def test_waiting_for_a_slow_rank_is_not_taken_for_cost():
    # Rank 0 always comes late, so the others wait for it, longest in compressed collectives.
    def cost(rank, strategy, number):
        return Took(40 if strategy == "two_phase" else 80, (1000 if rank else 1) * (1 + number % 2))

    assert choose([Chooser() for _ in range(2)], cost, 50)[-1] == "two_phase"


def test_the_rank_with_the_most_work_and_the_price_of_headers_count():
    # Rank 1 finds everything there when it comes: its own time says nothing of all_gather, nor of none.
    def cost(rank, strategy, number):
        return {"none": Took(60 if rank == 0 else 10), "two_phase": Took(45 if rank == 0 else 1, 5)}[strategy]

    assert choose([Chooser() for _ in range(2)], cost, 80)[-1] == "none"


@pytest.mark.parametrize("bad", range(chooser.ROUNDS))
@pytest.mark.parametrize("factor", [0.1, 10])
def test_one_bad_trial_does_not_decide(bad, factor):
    calls = dict.fromkeys(CANDIDATES, 0)

    def cost(rank, strategy, number):
        calls[strategy] += rank == 0
        usual = 1000 if strategy == "none" else 500
        return round(usual * (factor if calls[strategy] % chooser.ROUNDS == bad else 1))

    trials = chooser.ROUNDS * len(CANDIDATES) + 1
    ran = choose([Chooser() for _ in range(2)], cost, 2 * trials + chooser.WARM_UP + 10)
    assert set(ran[trials : trials + chooser.WARM_UP]) == set(ran[-10:]) == {"two_phase"}


def test_what_stays_the_same_is_tried_less_and_less_often():
    costs = {"none": 100, "two_phase": 90}
    ran = choose([Chooser()], lambda rank, strategy, number: costs[strategy], 100 + 100 * chooser.RECHECK)
    rounds = len(CANDIDATES) * (chooser.ROUNDS + chooser.DUEL_ROUNDS) // 2
    assert ran[-1] == "none" and 4 * rounds <= ran[100:].count("two_phase") <= 12 * rounds


def test_trials_tell_ways_apart_that_are_close():
    """Ways 10 % apart, times that vary by 10 % to either side: eleven trials choose the wrong one in 2 cases of 100."""
    costs, right = {"none": 110, "bf16": 100}, 0
    for seed in range(200):
        generator, c = random.Random(seed), Chooser()
        for _ in range(80):
            chosen = c.next("kind", tuple(costs))
            took = round(1e6 * costs[chosen] * generator.uniform(0.9, 1.1))
            c.finished("kind", c.own_time("kind").work, Took(took))
        right += chosen == "bf16"
    assert right >= 190


def test_the_other_way_is_tried_again_when_the_link_becomes_slow():
    def cost(rank, strategy, number):
        return 70 if strategy == "two_phase" else (50 if number < 300 else 500)

    ran = choose([Chooser() for _ in range(2)], cost, 300 + 3 * chooser.RECHECK)
    assert ran[299] == "none" and ran[-1] == "two_phase"
    # While nothing changes, nothing is tried.
    assert ran[50:300].count("two_phase") == 0 and ran[-chooser.RECHECK :].count("none") == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_stay_in_step_whatever_fails(data):
    """Times of 0 are collectives that failed at the end, on some ranks only."""
    choosers = [Chooser() for _ in range(3)]
    times = st.integers(0, 9)
    choose(choosers, lambda rank, strategy, number: data.draw(times), 60)


def test_kinds_are_forgotten_when_there_are_too_many():
    c = Chooser()
    for kind in range(3 * chooser.MOST_KINDS):
        c.next(kind, CANDIDATES)
        c.finished(kind, 0, Took(5))
    assert len(c._kinds) == chooser.MOST_KINDS
    assert c.own_time(0) == Took() and c.own_time(3 * chooser.MOST_KINDS - 1) == Took(5)
    with pytest.raises(KeyError):
        c.finished("unknown", 0, Took())


@world(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_plain_mean(rank, world_size, dtype):
    x = torch.randn(5001, generator=torch.Generator().manual_seed(rank)).to(dtype)
    tensor = x.clone()
    work = all_reduce(tensor, strategy="none", async_op=True)
    work.wait()
    assert_same_on_all_ranks(tensor)
    wanted = sum(x.double() for x in gathered(x)) / world_size
    assert float((tensor.double() - wanted).abs().max()) <= 8 * torch.finfo(dtype).eps * float(wanted.abs().max() + 1)
    stats = work.stats()
    itemsize = x.element_size()
    assert stats["bits_per_element"] == 8 * itemsize == stats["bits_per_element_phase1"]
    assert stats["bytes_sent_phase1"] == 5001 * itemsize * (world_size - 1) // world_size
    assert stats["strategies"] == {0: "none"}
    bad = torch.ones(5001, dtype=dtype)
    bad[7] = torch.inf if rank == 1 else 1.0
    all_reduce(bad, strategy="none")
    assert not bad[7].isfinite() and bad.isfinite().sum() == 5000


def test_collectives_without_an_agreement_count():
    c, calls = Chooser(), 0
    costs = {"none": 1000, "two_phase": 900}
    for _ in range(len(CANDIDATES) * (2 * chooser.ROUNDS + chooser.DUEL_ROUNDS) + 3 + chooser.WARM_UP + 1):
        way = c.next("kind", CANDIDATES)
        c.finished("kind", c.own_time("kind").work, Took(costs[way]))
    assert c.settled("kind") == CANDIDATES[0]
    # The other way is close: when it looks again, it tries both.
    while c.settled("kind"):
        c.next("kind", CANDIDATES)
        c.finished("kind", 1000, Took(1000), count=31)
        calls += 1
    looks = c._kinds["kind"].patience
    assert looks <= 2 and calls == looks * -(-chooser.RECHECK // 31)


@world(2, 3)
def test_a_plain_step_sends_what_error_feedback_kept(rank, world_size):
    """Compressed steps, then a plain one: what was kept arrives, and nothing is lost or kept."""
    model = wrap()
    state = attach(model, min_elements=100, grad_scale=4.0)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(6):
        state.reconfigure(strategy="none" if step == 5 else "two_phase")
        got = backward(model, rank, step, scale=4.0)
        for total, g, wanted in zip(sums, got, exact_mean(rank, world_size, step), strict=True):
            total.add_(g.double() / 4 - wanted)
        if step == 4:
            assert state.stats()["residual_norm"] > 0 and max(float(total.abs().max()) for total in sums) > 1e-3
    assert state.stats()["residual_norm"] == 0.0
    assert max(float(total.abs().max()) for total in sums) < 1e-4
    assert state.stats()["strategies"] == dict.fromkeys(state.stats()["strategies"], "none")
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world()
@pytest.mark.parametrize(
    ("world_size", "names", "options"),
    [
        (3, ("two_phase", "all_gather", "exact_sum"), {}),
        (4, ("two_phase", "hierarchical", "exact_sum"), {"ranks_per_node": 2}),
        (4, ("hierarchical", "all_gather", "two_phase"), {"ranks_per_node": 4}),
    ],
)
def test_ways_hand_their_residuals_to_each_other(rank, world_size, names, options):
    """Whatever one way keeps, the others send."""
    model = wrap()
    state = attach(model, min_elements=100, grad_scale=4.0, **options)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(9):
        state.reconfigure(strategy="none" if step == 8 else names[step % len(names)])
        got = backward(model, rank, step, scale=4.0)
        for total, g, wanted in zip(sums, got, exact_mean(rank, world_size, step), strict=True):
            total.add_(g.double() / 4 - wanted)
        assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
        if step == 7:
            assert state.stats()["residual_norm"] > 0 and max(float(total.abs().max()) for total in sums) > 1e-3
    assert state.stats()["residual_norm"] == 0.0
    assert max(float(total.abs().max()) for total in sums) < 1e-4


def error_of_auto(tensor):
    """What an all-reduce raises, or None; and how it was done."""
    work = qcomm.all_reduce(tensor, strategy="auto", async_op=True)
    try:
        work.wait()
    except qcomm.CollectiveError as error:
        return str(error), {}
    return None, work.stats()["strategies"]


@world()
@pytest.mark.parametrize(
    ("world_size", "winner", "elements"),
    [(2, "two_phase", 5003), (2, "none", 5004), (2, "all_gather", 5005), (3, "two_phase", 5006)],
)
def test_auto_takes_the_faster_way(rank, world_size, winner, elements):
    tried = strategies.automatic_ways(
        BucketLayout([TensorSpec("", 0, elements, True)], world_size), torch.float32, ReduceOptions()
    )
    assert winner in tried
    with all_slow_but(winner, 0.03):
        for _ in range(len(tried) * chooser.ROUNDS + 1):
            assert error_of_auto(torch.randn(elements))[0] is None
        # A fault of one rank in between does not take the ranks out of step, at either end of a collective.
        for name in ("encode", "decode"):
            failing = mock.patch.object(MeanSteps, name, side_effect=ZeroDivisionError("boom"))
            with failing if rank == 1 else nullcontext():
                errors = [error_of_auto(torch.randn(elements))[0] for _ in range(2)]
            assert any(errors) == (winner == "two_phase")
        for _ in range(3):
            error, ways = error_of_auto(torch.randn(elements))
        assert error is None and gathered(ways) == [{0: winner}] * world_size


@world(4)
def test_auto_considers_nodes_where_it_is_told_of_them(rank, world_size):
    work = None
    with all_slow_but("hierarchical", 0.05):
        for _ in range(len(strategies.AUTOMATIC) * chooser.ROUNDS + 2):
            work = qcomm.all_reduce(torch.randn(30_011), strategy="auto", ranks_per_node=2, async_op=True)
            work.wait()
    assert work.stats()["strategies"] == {0: "hierarchical"}


@world(2)
def test_auto_chooses_for_each_bucket(rank, world_size):
    group = dist.new_group()  # with a chooser that knows nothing yet
    model = wrap(process_group=group)
    state = qcomm.attach(model, min_elements=100)
    with all_slow_but("two_phase", 0.06):
        for step in range(len(strategies.AUTOMATIC) * chooser.ROUNDS + 2):
            backward(model, rank, step)
            assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    ways = state.stats()["strategies"]
    assert gathered(ways) == [ways] * world_size
    # The first step had one bucket of everything; those of the steps after it had time for their trials.
    assert [ways[index] for index in sorted(ways)][1:] == ["two_phase"] * (len(ways) - 1)
    assert error_of(model, rank) is None
    dist.destroy_process_group(group)
