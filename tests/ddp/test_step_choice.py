"""The choice between compressing and not by the time of steps, on clocks that the tests set."""

import copy
import itertools
from unittest import mock

import pytest
from ddp_model import backward, wrap
from distributed import assert_same_on_all_ranks, gathered, world

import qcomm
from qcomm.collectives import Settled
from qcomm.communicator import completed, failed
from qcomm.ddp import step_choice
from qcomm.ddp.step_choice import COUNTED, REST, TURNS, StepChoice
from qcomm.ddp.steps import StepEnd
from qcomm.errors import CollectiveError

TURN = COUNTED + 2
COMPRESSES = Settled("two_phase", "none", 10)


def run(choice, steps, seconds, buckets=(COMPRESSES, COMPRESSES), agree=completed):
    """Steps of ``seconds(uncompressed)``; whether each of them was uncompressed."""
    taken = []
    for _ in range(steps):
        choice.begin(seconds(taken[-1]) if taken else 0, agree)
        taken.append(choice.uncompressed)
        for index, settled in enumerate(buckets):
            choice.note(index, index == len(buckets) - 1, settled)
    return taken


SCENES = {  # seconds with and without compression, of one bucket's uncompressed exchange, whether it is compressed
    "hidden behind backward, and the codec takes its cores": (110, 100, 10, False),
    "hidden behind backward, at no cost": (100, 100, 10, False),
    "a step that is a hundredth shorter is not worth the accuracy": (99, 100, 10, False),
    "exposed in part": (100, 130, 40, True),
    "exposed: no step is lost": (100, 800, 400, True),
}


@pytest.mark.parametrize("scene", SCENES)
def test_the_shorter_steps_win(scene):
    compressed, plain, exchange, expected = SCENES[scene]
    steps = 1 + TURN + 2 * TURNS * TURN
    buckets = [Settled("two_phase", "none", exchange)] * 2
    taken = run(StepChoice(), steps + 20, lambda is_plain: plain if is_plain else compressed, buckets)
    assert set(taken[steps:]) == {not expected}
    assert sum(taken[:steps]) == (0 if 2 * exchange > compressed else TURNS * TURN)


@pytest.mark.parametrize(
    "buckets",
    [[Settled("none", "none", 10)] * 2, [Settled("two_phase", "none", 10), Settled("")], []],
    ids=["nothing is compressed", "strategies are under trial", "nothing is known"],
)
def test_nothing_is_tried_where_there_is_nothing_to_choose(buckets):
    agreements = []
    taken = run(StepChoice(), 200, lambda is_plain: 100, buckets, agreements.append)
    assert not any(taken) and not agreements


def test_a_choice_is_looked_at_again():
    plain = [100]

    def seconds(is_plain):
        return plain[0] if is_plain else 110

    choice = StepChoice()
    first = 1 + TURN + 2 * TURNS * TURN
    assert run(choice, first + 1, seconds)[-1]
    plain[0] = 200  # another link
    later = run(choice, REST + 2 * TURNS * TURN + 10, seconds)
    assert later[REST - 2] and not later[-1]


def test_a_choice_that_stays_is_looked_at_less_often():
    taken = run(StepChoice(), 8 * REST, lambda is_plain: 100 if is_plain else 110)
    lengths = [len(list(steps)) for is_plain, steps in itertools.groupby(taken) if is_plain]
    rests = [length for length in lengths if length > 2 * TURN]
    assert [round(length / REST) for length in rests[:3]] == [1, 2, 4]


def test_buckets_that_ddp_rebuilt_do_not_count():
    choice = StepChoice()
    for index in range(3):
        choice.note(index, index == 2, Settled(""))
    taken = run(choice, 100, lambda is_plain: 100, [COMPRESSES])
    assert any(taken)


def test_ranks_with_other_clocks_decide_alike():
    """Each has its own times, and all know the smallest."""
    choices, told = [StepChoice() for _ in range(3)], {}
    clocks = [lambda plain, rank=rank: (50 if plain else 60) + 7 * rank for rank in range(3)]
    taken = [[False] for _ in choices]
    for step in range(150):
        mine = [clock(history[-1]) for clock, history in zip(clocks, taken, strict=True)]
        for choice, time, history in zip(choices, mine, taken, strict=True):

            def agree(_, step=step, mine=mine):
                told[step] = min(mine)
                return completed(told[step])

            choice.begin(time, agree)
            choice.note(0, True, COMPRESSES)
            history.append(choice.uncompressed)
    assert taken[0] == taken[1] == taken[2] and taken[0][-1]


@pytest.mark.parametrize("outcome", [completed(0), failed(CollectiveError("gone"))], ids=["unknown", "failed"])
def test_times_that_are_not_known_choose_nothing(outcome):
    taken = run(StepChoice(), 200, lambda is_plain: 100, agree=lambda _: outcome)
    assert not any(taken)


def test_a_step_that_was_not_waited_for_has_no_time():
    asked = []

    def agree(time):
        asked.append(time)
        return completed(time)

    run(StepChoice(), 30, lambda is_plain: 0, agree=agree)
    assert set(asked) == {0}


def test_copies_begin_anew():
    choice = StepChoice()
    run(choice, 2 + TURN + 2 * TURNS * TURN + 1, lambda is_plain: 100 if is_plain else 110)
    assert choice.uncompressed and not copy.deepcopy(choice).uncompressed


@world(2)
def test_ddp_takes_the_shorter_steps(rank, world_size):
    """By the exchange's clock buckets are compressed, and steps are said to take longer so."""
    state_of = {}

    def begin(self):
        self._exchanges = []
        return 100 if state_of["state"].reducer.choice.uncompressed else 110 + rank

    with (
        mock.patch("qcomm.collectives.strategies.automatic_strategies", return_value=("none", "two_phase")),
        mock.patch("qcomm.collectives.tuner.WARM_UP", 1),
        mock.patch("qcomm.collectives.tuner.WORTH_COMPRESSING", 1e-9),  # whatever this machine's clock says
        mock.patch.object(StepEnd, "begin", begin),
        mock.patch.object(step_choice, "COUNTED", 2),
        mock.patch.object(step_choice.Settled, "uncompressed_nanoseconds", 1, create=True),
    ):
        model = wrap()
        state = state_of["state"] = qcomm.attach(model, min_elements=100)
        seen = []
        for step in range(75):
            got = backward(model, rank, step)
            seen.append(set(state.stats()["strategies"].values()))
        assert_same_on_all_ranks(*got)
    assert {"two_phase"} in seen and seen[-1] == {"none"}
    assert gathered(seen) == [seen] * world_size
    assert state.reducer.choice.uncompressed
