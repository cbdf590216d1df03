"""The tuner: every edge of its diagram, its choices between fast and exact strategies, and the lockstep of ranks."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcomm.collectives import tuner
from qcomm.collectives.tuner import Stage, Tuner
from qcomm.communicator.handshake import UNTIMED, Took, agreed_time

CANDIDATES = ("none", "two_phase")
THREE = ("none", "all_gather", "two_phase")
FIRST_TRIALS, WARMING_UP, TRIALS, DUEL, SETTLED = Stage
EDGES = {
    (FIRST_TRIALS, WARMING_UP),
    (WARMING_UP, TRIALS),
    (TRIALS, DUEL),
    (TRIALS, SETTLED),
    (DUEL, SETTLED),
    (SETTLED, TRIALS),
}


def choose(tuners, costs, count, candidates=CANDIDATES):
    """Runs ``count`` collectives on all ranks and returns their strategies; ``costs(rank, strategy, number)``."""
    ran = []
    for number in range(count):
        chosen = [c.next("kind", candidates) for c in tuners]
        assert len(set(chosen)) == 1
        agreed = agreed_time([c.own_time("kind") for c in tuners])
        for rank, c in enumerate(tuners):
            took = costs(rank, chosen[0], number)
            c.finished("kind", agreed, took if isinstance(took, Took) else Took(took))
        ran.append(chosen[0])
    return ran


def path(candidates, costs, count):
    """Runs ``count`` collectives and returns the stages in which they ran, each with its strategies."""
    c, ran = Tuner(), []
    for number in range(count):
        strategy = c.next("kind", candidates)
        ran.append((c.stage("kind"), strategy))
        c.finished("kind", c.own_time("kind").work, Took(costs(strategy, number)))
    by_stage = itertools.groupby(ran, lambda pair: pair[0])
    return [(stage, [strategy for _, strategy in pairs]) for stage, pairs in by_stage]


def turns(strategies, rounds=tuner.ROUNDS):
    return [*list(strategies) * rounds, strategies[0]]


def constant(**costs):
    return lambda strategy, number: costs[strategy]


def failing(numbers, **costs):
    """Costs of collectives of which some fail."""
    return lambda strategy, number: 0 if number in numbers else costs[strategy]


def until_trials(candidates, best):
    """Stages until all candidates are tried for the second time."""
    return [(FIRST_TRIALS, turns(candidates)), (WARMING_UP, [best] * tuner.WARM_UP), (TRIALS, turns(candidates))]


FIRST = len(turns(CANDIDATES))
SECOND = FIRST + tuner.WARM_UP
END_OF_TRIALS = SECOND + FIRST


@pytest.mark.parametrize(
    ("candidates", "costs", "stages"),
    [
        pytest.param(
            CANDIDATES,
            failing(range(FIRST), none=100, two_phase=40),
            # The last trial's time is not known yet, so the only candidate with a time is taken.
            [(FIRST_TRIALS, [*turns(CANDIDATES), *CANDIDATES]), (WARMING_UP, ["none"])],
            id="1-FIRST_TRIALS-FIRST_TRIALS-all-failed",
        ),
        pytest.param(
            CANDIDATES,
            constant(none=100, two_phase=40),
            [(FIRST_TRIALS, turns(CANDIDATES)), (WARMING_UP, ["two_phase"])],
            id="2-FIRST_TRIALS-WARMING_UP",
        ),
        pytest.param(
            CANDIDATES,
            constant(none=100, two_phase=90),
            [(FIRST_TRIALS, turns(CANDIDATES)), (WARMING_UP, ["none"])],
            id="2-FIRST_TRIALS-WARMING_UP-close-ones-have-no-duel",
        ),
        pytest.param(
            CANDIDATES,
            failing(range(0, FIRST, 2), none=100, two_phase=40),  # every trial of the first candidate
            [(FIRST_TRIALS, turns(CANDIDATES)), (WARMING_UP, ["two_phase"])],
            id="2-FIRST_TRIALS-WARMING_UP-some-failed",
        ),
        pytest.param(
            CANDIDATES,
            constant(none=100, two_phase=40),
            until_trials(CANDIDATES, "two_phase"),
            id="3-WARMING_UP-TRIALS",
        ),
        pytest.param(
            CANDIDATES,
            failing(range(SECOND, END_OF_TRIALS), none=100, two_phase=40),
            [
                *until_trials(CANDIDATES, "two_phase")[:2],
                (TRIALS, [*turns(CANDIDATES), *CANDIDATES]),
                (SETTLED, ["none"]),
            ],
            id="4-TRIALS-TRIALS-all-failed",
        ),
        pytest.param(
            THREE,
            constant(none=100, all_gather=400, two_phase=90),
            [*until_trials(THREE, "none"), (DUEL, turns(CANDIDATES, tuner.DUEL_ROUNDS))],
            id="5-TRIALS-DUEL",
        ),
        pytest.param(
            CANDIDATES,
            constant(none=100, two_phase=40),
            [*until_trials(CANDIDATES, "two_phase"), (SETTLED, ["two_phase"])],
            id="6-TRIALS-SETTLED",
        ),
        pytest.param(
            ("none",),
            constant(none=100),
            [*until_trials(("none",), "none"), (SETTLED, ["none"])],
            id="6-TRIALS-SETTLED-of-one-candidate",
        ),
        pytest.param(
            CANDIDATES,
            lambda strategy, number: {"none": 100, "two_phase": 90 if number < END_OF_TRIALS else 70}[strategy],
            [
                *until_trials(CANDIDATES, "none"),
                (DUEL, turns(CANDIDATES, tuner.DUEL_ROUNDS)),
                (SETTLED, ["two_phase"]),
            ],
            id="7-DUEL-SETTLED",
        ),
        pytest.param(
            THREE,
            # It costs a quarter more in the end, but not enough for a rival.
            lambda strategy, number: {"none": 100, "all_gather": 400, "two_phase": 40 if number < 50 else 60}[strategy],
            [
                *until_trials(THREE, "two_phase"),
                (SETTLED, ["two_phase"] * tuner.RECHECK),
                (TRIALS, turns(THREE)),
                (SETTLED, ["two_phase"]),
            ],
            id="8-SETTLED-TRIALS-of-all",
        ),
        pytest.param(
            THREE,
            constant(none=100, all_gather=400, two_phase=90),
            [
                *until_trials(THREE, "none"),
                (DUEL, turns(CANDIDATES, tuner.DUEL_ROUNDS)),
                (SETTLED, ["none"] * 2 * tuner.RECHECK),
                (TRIALS, turns(("two_phase", "none"))),
                (DUEL, turns(CANDIDATES, tuner.DUEL_ROUNDS)),
                (SETTLED, ["none"]),
            ],
            id="9-SETTLED-TRIALS-of-rivals",
        ),
        pytest.param(
            CANDIDATES,
            constant(none=100, two_phase=40),
            [*until_trials(CANDIDATES, "two_phase"), (SETTLED, ["two_phase"] * 20 * tuner.RECHECK)],
            id="10-SETTLED-SETTLED-without-rivals",
        ),
        pytest.param(
            CANDIDATES,
            failing(range(END_OF_TRIALS + 5, 10**6), none=100, two_phase=40),
            [*until_trials(CANDIDATES, "two_phase"), (SETTLED, ["two_phase"] * 20 * tuner.RECHECK)],
            id="10-SETTLED-SETTLED-failures-cost-nothing",
        ),
    ],
)
def test_edges(candidates, costs, stages):
    count = sum(len(strategies) for _, strategies in stages)
    assert path(candidates, costs, count) == stages


def test_patience_grows_with_each_confirmation():
    stages = path(CANDIDATES, constant(none=100, two_phase=90), 60 * tuner.RECHECK)
    checks = [len(strategies) / tuner.RECHECK for stage, strategies in stages if stage is SETTLED]
    assert checks[:5] == [2, 4, 8, tuner.MAX_PATIENCE, tuner.MAX_PATIENCE]


def test_a_new_choice_has_little_patience():
    def costs(strategy, number):
        return 100 if strategy == "none" else (90 if number < 8 * tuner.RECHECK else 72)

    stages = path(CANDIDATES, costs, 20 * tuner.RECHECK)
    settled = [(set(strategies), len(strategies)) for stage, strategies in stages if stage is SETTLED]
    changed = next(index for index, (chosen, _) in enumerate(settled) if chosen == {"two_phase"})
    assert settled[changed][1] == tuner.RECHECK and settled[changed + 1] == ({"two_phase"}, 2 * tuner.RECHECK)


def test_a_check_sees_the_recent_times_only():
    check = END_OF_TRIALS + 3 * tuner.RECHECK
    # The last collective's time is not known at the check. Of the times before it, just more than half are slow.
    slow = check - 1 - (tuner.RECENT + 1) // 2

    def costs(strategy, number):
        return 100 if strategy == "none" else (40 if number < slow else 60)

    stages = path(CANDIDATES, costs, check + 1)
    assert stages[-2:] == [(SETTLED, ["two_phase"] * 3 * tuner.RECHECK), (TRIALS, ["none"])]


def test_settled_begins_with_the_first_collective_of_the_choice():
    c = Tuner()
    for number in range(END_OF_TRIALS + 1):
        assert c.settled("kind") == "" and (c.stage("kind") is TRIALS) == (number >= SECOND)
        strategy = c.next("kind", CANDIDATES)
        assert c.settled("kind") == ("two_phase" if number == END_OF_TRIALS else "")
        c.finished("kind", c.own_time("kind").work, Took({"none": 100, "two_phase": 40}[strategy]))
    assert c.settled("kind") == "two_phase"


def test_collectives_without_an_agreement_count():
    c, costs, calls = Tuner(), {"none": 1000, "two_phase": 900}, 0
    choose([c], lambda rank, strategy, number: costs[strategy], END_OF_TRIALS + len(turns(CANDIDATES, 8)) + 1)
    assert c.settled("kind") == "none"
    # The other strategy is close, so the second check tries both.
    while c.settled("kind"):
        c.next("kind", CANDIDATES)
        c.finished("kind", 1000, Took(1000), count=31)
        calls += 1
    # The first collective of the choice was the only one that counted once.
    assert 2 * (tuner.RECHECK // 31) < calls <= 2 * (tuner.RECHECK // 31 + 1)


@pytest.mark.parametrize(
    ("plain", "compressed", "winner"),
    [(100, 50, "two_phase"), (50, 100, "none"), (100, 99, "none"), (100, 81, "none"), (100, 77, "two_phase")],
)
def test_compression_is_chosen_where_it_is_worth_it(plain, compressed, winner):
    stages = path(CANDIDATES, constant(none=plain, two_phase=compressed), 100)
    worth = [plain, tuner.WORTH_COMPRESSING * compressed]
    close = max(worth) <= tuner.CLOSE * min(worth)
    assert [stage for stage, _ in stages][-2:] == ([DUEL, SETTLED] if close else [TRIALS, SETTLED])
    assert set(stages[1][1]) == set(stages[-1][1]) == {winner}


@pytest.mark.parametrize(
    ("costs", "winner"),
    [
        ({"none": 100, "bf16": 99, "two_phase": 90}, "none"),
        ({"none": 100, "bf16": 90, "two_phase": 80}, "bf16"),
        ({"none": 100, "bf16": 90, "two_phase": 70}, "two_phase"),
        ({"none": 100, "all_gather": 71, "two_phase": 70}, "all_gather"),
    ],
)
def test_the_exact_one_of_equally_fast_strategies_is_chosen(costs, winner):
    assert choose([Tuner()], lambda rank, strategy, number: costs[strategy], 81, tuple(costs))[-1] == winner


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(80, 130), min_size=5, max_size=5),
    chosen=st.sets(st.integers(0, 4), min_size=1),
)
def test_the_most_exact_strategy_within_a_tie_wins(costs, chosen):
    order = ("none", "bf16", "all_gather", "hierarchical", "two_phase")
    candidates = tuple(order[index] for index in sorted(chosen))
    worth = {
        name: cost * (1 if name in ("none", "bf16") else tuner.WORTH_COMPRESSING)
        for name, cost in zip(order, costs, strict=True)
        if name in candidates
    }
    winner = next(name for name in candidates if worth[name] <= tuner.TIE * min(worth.values()))
    c = Tuner()
    ran = choose([c], lambda rank, strategy, number: costs[order.index(strategy)], 110, candidates)
    assert ran[-1] == c.settled("kind") == winner


def test_a_strategy_that_was_slow_only_at_first_is_found():
    def cost(rank, strategy, number):
        return 70 if strategy == "two_phase" else (300 if number < 10 else 50)

    ran = choose([Tuner() for _ in range(2)], cost, 100)
    assert ran[FIRST] == "two_phase" and set(ran[50:]) == {"none"}


def test_the_wait_for_a_slow_rank_is_not_a_cost():
    # Rank 0 always comes late, so the others wait for it, longest in compressed collectives.
    def cost(rank, strategy, number):
        return Took(40 if strategy == "two_phase" else 80, (1000 if rank else 1) * (1 + number % 2))

    assert choose([Tuner() for _ in range(2)], cost, 50)[-1] == "two_phase"


def test_the_rank_with_the_most_work_and_the_price_of_headers_count():
    # Rank 1 finds everything there when it comes: its own time says nothing of either strategy.
    def cost(rank, strategy, number):
        return {"none": Took(60 if rank == 0 else 10), "two_phase": Took(45 if rank == 0 else 1, 5)}[strategy]

    assert choose([Tuner() for _ in range(2)], cost, 80)[-1] == "none"


@pytest.mark.parametrize("bad", range(tuner.ROUNDS))
@pytest.mark.parametrize(("strategy", "factor"), [("none", 0.1), ("two_phase", 10)])
def test_one_bad_trial_does_not_decide(bad, strategy, factor):
    calls = 0

    def cost(rank, ran, number):
        nonlocal calls
        calls += ran == strategy and rank == 0
        usual = {"none": 1000, "two_phase": 600}[ran]
        return round(usual * (factor if ran == strategy and calls % tuner.ROUNDS == bad else 1))

    ran = choose([Tuner() for _ in range(2)], cost, END_OF_TRIALS + 10)
    assert set(ran[FIRST:SECOND]) == set(ran[-10:]) == {"two_phase"}


def test_trials_tell_close_strategies_apart():
    """Costs differ by 10 %, and times vary by 10 % to either side: eleven trials err in 2 cases of 100."""
    costs, right = {"none": 110, "bf16": 100}, 0
    for seed in range(200):
        generator = random.Random(seed)

        def cost(rank, strategy, number, generator=generator):
            return round(1e6 * costs[strategy] * generator.uniform(0.9, 1.1))

        right += choose([Tuner()], cost, 80, tuple(costs))[-1] == "bf16"
    assert right >= 190


def test_the_other_strategy_is_tried_again_when_the_link_becomes_slow():
    def cost(rank, strategy, number):
        return 70 if strategy == "two_phase" else (50 if number < 300 else 500)

    ran = choose([Tuner() for _ in range(2)], cost, 300 + 3 * tuner.RECHECK)
    assert ran[299] == "none" and ran[-1] == "two_phase"
    # While nothing changes, nothing is tried.
    assert ran[50:300].count("two_phase") == 0 and ran[-tuner.RECHECK :].count("none") == 0


@settings(max_examples=40, deadline=None)
@given(
    collectives=st.lists(
        # Work of 0 is a collective that failed at the end, on some ranks only.
        st.tuples(st.tuples(*[st.integers(0, 9)] * 3), st.sampled_from([1, 31, tuner.RECHECK])),
        min_size=60,
        max_size=150,
    ),
    candidates=st.sampled_from([CANDIDATES, THREE, ("none", "bf16", "all_gather", "two_phase")]),
)
def test_ranks_stay_in_lockstep_on_the_edges_of_the_diagram(collectives, candidates):
    tuners = [Tuner() for _ in range(3)]
    stage = FIRST_TRIALS
    for own, count in collectives:
        agreed = agreed_time([c.own_time("kind") for c in tuners])
        seen = set()
        for c, work in zip(tuners, own, strict=True):
            strategy, running, settled = c.next("kind", candidates), c.stage("kind"), c.settled("kind")
            assert strategy in candidates and settled == (strategy if running is SETTLED else "")
            c.finished("kind", agreed, Took(work), count)
            seen.add((strategy, running, c.stage("kind"), c.settled("kind")))
        assert len(seen) == 1
        _, running, after, _ = seen.pop()
        assert {(stage, running), (running, after)} <= EDGES | {(each, each) for each in Stage}
        stage = after


def test_kinds_are_forgotten_when_there_are_too_many():
    c, kinds = Tuner(), range(3 * tuner.MAX_KINDS)
    for kind in kinds:
        c.next(kind, CANDIDATES)
        c.finished(kind, 0, Took(5))
    assert [kind for kind in kinds if c.own_time(kind) != UNTIMED] == list(kinds[-tuner.MAX_KINDS :])
    assert c.stage(0) is FIRST_TRIALS and c.settled(0) == ""


def test_a_kind_is_known_only_when_its_collective_has_run():
    c = Tuner()
    assert c.next("kind", CANDIDATES) == c.next("kind", CANDIDATES) == "none"
    with pytest.raises(KeyError, match="next was not called for 'unknown'"):
        c.finished("unknown", 0, UNTIMED)
    c.finished("kind", 0, Took(5))
    assert c.next("kind", CANDIDATES) == "two_phase" and c.own_time("kind") == Took(5)
