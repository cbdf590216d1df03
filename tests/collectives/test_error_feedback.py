"""Residuals: kept by parameter, moved without loss when buckets or the number of ranks change."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed import attach, gathered, world
from hypothesis import given, settings
from hypothesis import strategies as st
from residuals import owed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.codec import Segment, encode, measure, plan
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout, Piece, TensorSpec, merge_small
from qcomm.collectives.rank_state import parts_of
from qcomm.local_sgd.options import ExchangeOptions
from qcomm.reference import equilibrium_step

SIZES = {"a": 700, "b": 33, "c": 5000}


def layout(world_size, names=("a", "b", "c"), merged=0):
    """Tensors of up to ``merged`` elements are one tensor of the layout."""
    specs, offset = [], 0
    for name in names:
        specs.append(TensorSpec(name, offset, SIZES[name], True))
        offset += SIZES[name]
    return BucketLayout(merge_small(specs, lambda tensor: tensor.numel <= merged), world_size)


def filled(world_size, seed=0):
    """The residuals of all ranks after some collective."""
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for rank in range(world_size):
        feedback, chunks = ErrorFeedback(), layout(world_size)
        feedback.adopt(chunks, rank)
        for name, numel in SIZES.items():
            feedback.local(name, numel).copy_(torch.randn(numel, generator=generator))
        for piece in chunks.chunks[rank].pieces:
            feedback.owner(chunks.tensors[piece.tensor].key, piece.start, piece.length).copy_(
                torch.randn(piece.length, generator=generator)
            )
        ranks.append(feedback)
    return ranks


def kept(ranks):
    """mean(e) + o, what will still be sent: name -> float64 tensor."""
    states = [feedback.state_dict() for feedback in ranks]
    return {name: owed(states, name, numel) for name, numel in SIZES.items()}


def assert_kept(ranks, before):
    for name, value in kept(ranks).items():
        assert torch.allclose(value, before[name], rtol=1e-5, atol=1e-5), name


def own_all(feedback, chunks, rank, fill):
    """Sets all residuals of a rank in a layout to what ``fill`` returns."""
    residuals = feedback.for_two_phase(chunks, rank)
    for kept_residuals in (residuals.local, residuals.owner):
        for residual in kept_residuals.values():
            residual.copy_(fill(residual.numel()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_merged_residuals_are_those_of_their_members(world_size):
    """Tensors are merged, apart again, merged in another order and among other ranks: nothing is lost."""
    ranks = [ErrorFeedback() for _ in range(world_size)]
    generator = torch.Generator().manual_seed(3)
    for rank, feedback in enumerate(ranks):
        own_all(feedback, layout(world_size, merged=700), rank, lambda n: torch.randn(n, generator=generator))
    before = kept(ranks)
    for names, merged in (("abc", 700), ("abc", 0), ("cba", 5000), ("bca", 33), ("abc", 700)):
        for rank, feedback in enumerate(ranks):
            feedback.for_two_phase(layout(world_size, tuple(names), merged), rank)
        assert_kept(ranks, before)
    states = [feedback.state_dict() for feedback in ranks]
    for number, feedback in enumerate(ranks):
        chunks, again = layout(world_size, merged=700), feedback.for_two_phase(layout(world_size, merged=700), number)
        for copied in (pickle.loads(pickle.dumps(feedback)), copy.deepcopy(feedback)):
            residuals = copied.for_two_phase(chunks, number)
            for mine, other in ((residuals.local, again.local), (residuals.owner, again.owner)):
                assert mine.keys() == other.keys()
                for key, residual in mine.items():
                    assert torch.equal(residual, other[key]) and residual.data_ptr() != other[key].data_ptr()
            for residual in residuals.local.values():
                residual.zero_()
            assert copied.norm() == 0.0  # the tables hold views of what the collective changes
        assert feedback.norm() == pytest.approx(
            math.sqrt(sum(float(x.double().square().sum()) for x in states[number]["local"].values()))
        )
    restored = [ErrorFeedback() for _ in ranks]
    for rank, feedback in enumerate(restored):
        feedback.load_state_dict(states[rank])
        feedback.for_two_phase(layout(world_size, merged=700), rank)
    assert_kept(restored, before)


def test_a_merged_owner_residual_survives_a_checkpoint_in_place():
    """The same layout goes on with the same owner residual, bit for bit, and does not move it."""
    chunks, feedback, restored = layout(2, merged=700), ErrorFeedback(), ErrorFeedback()
    own_all(feedback, chunks, 1, torch.randn)
    restored.load_state_dict(feedback.state_dict())
    for ours, theirs in zip(feedback.for_two_phase(chunks, 1)[:2], restored.for_two_phase(chunks, 1)[:2], strict=True):
        assert all(torch.equal(ours[number], theirs[number]) for number in ours) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_rebuilt_bucket_moves_owner_residuals(world_size):
    ranks = filled(world_size)
    before = kept(ranks)
    for rank, feedback in enumerate(ranks):
        feedback.adopt(layout(world_size), rank)
        assert feedback.state_dict()["owner"] or world_size > 1  # the same layout moves nothing
    assert_kept(ranks, before)
    for rank, feedback in enumerate(ranks):
        for names in (("c", "a"), ("b",)):  # other buckets, in another order
            feedback.adopt(layout(world_size, names), rank)
    assert_kept(ranks, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda feedback: feedback.local("a", 700),
        lambda feedback: feedback.take("a", 700),
        lambda feedback: feedback.adopt(layout(2, ("c", "a")), 0),  # the owner residual moves
        lambda feedback: feedback.load_state_dict(feedback.state_dict()),
        lambda feedback: feedback.clear(),
    ],
    ids=["local", "take", "adopt", "load_state_dict", "clear"],
)
def test_what_is_spent_is_forgotten_when_somebody_may_change_it(change):
    feedback = ErrorFeedback()
    feedback.adopt(layout(2), 0)
    feedback.local("a", 700)
    feedback.owner("a", 0, 700).fill_(1.0)
    feedback.spend([("a", Piece(0, 0, 700, ((0, 700),)))])
    assert feedback.is_spent("a", 0, 700) and not feedback.is_spent("a", 0, 64)
    change(feedback)
    assert not feedback.is_spent("a", 0, 700)


@given(st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_another_number_of_ranks(old, new):
    saved = [feedback.state_dict() for feedback in filled(old)]
    before = kept(filled(old))
    ranks = []
    for rank in range(new):
        feedback = ErrorFeedback()
        if rank < old:
            feedback.load_state_dict([saved[other] for other in range(rank, old, new)])
        feedback.adopt(layout(new), rank)
        ranks.append(feedback)
    assert_kept(ranks, before)


def test_state_dict_is_a_copy_and_round_trips():
    ranks = filled(2)
    state = pickle.loads(pickle.dumps(ranks[0].state_dict()))
    ranks[0].local("a", 700).zero_()
    restored = ErrorFeedback()
    restored.load_state_dict(state)
    again = restored.state_dict()
    assert again["world_size"] == 2 and again["local"].keys() == state["local"].keys()
    assert all(torch.equal(again["local"][name], value) for name, value in state["local"].items())
    assert all(torch.equal(again["owner"][name][1], value) for name, (_, value) in state["owner"].items())
    restored.local("a", 700).zero_()
    assert bool(state["local"]["a"].any())


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda good: {**good, "format": 7}, "state has format 7"),
        (lambda good: [good, filled(3)[0].state_dict()], "saved by 2 and by 3 ranks"),
        (lambda good: [], "at least one"),
        (lambda good: {**good, "owner": {"a": (690, torch.zeros(50))}}, "owner residual of 'a' does not fit"),
        (lambda good: {**good, "owner": {"z": (0, torch.zeros(5))}}, "owner residual of 'z' does not fit"),
    ],
    ids=["format", "other_ranks", "none", "place", "name"],
)
def test_wrong_checkpoints_are_refused_and_change_nothing(damage, match):
    feedback = filled(2)[0]
    before = feedback.state_dict()
    with pytest.raises(ValueError, match=match):
        feedback.load_state_dict(damage(feedback.state_dict()))
    assert torch.equal(feedback.state_dict()["local"]["a"], before["local"]["a"])


def test_a_parameter_of_another_size_is_refused():
    feedback = filled(2)[0]
    with pytest.raises(ValueError, match="residual of 'a' has 700 elements, the parameter 5"):
        feedback.local("a", 5)
    feedback.clear()
    assert feedback.norm() == 0.0


def model():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(48, 48), nn.Tanh())])


def train(ddp_model, plain, group, seeds, sums):
    """Steps on both models; adds gradients to ``sums``: (averaged, exact mean)."""
    size = dist.get_world_size(group)
    for seed in seeds:
        inputs = torch.randn(8, 48, generator=torch.Generator().manual_seed(100 * seed + dist.get_rank()))
        ddp_model.zero_grad()
        plain.zero_grad()
        ddp_model(inputs).square().sum().backward()
        plain(inputs).square().sum().backward()
        exact = torch.cat([p.grad.reshape(-1) for p in plain.parameters()]).double()
        dist.all_reduce(exact, group=group)
        sums[0] += torch.cat([p.grad.reshape(-1) for p in ddp_model.parameters()]).double()
        sums[1] += exact / size


def remaining(states, names):
    """mean(e) + o of the given ranks' saved states, flat in the order of ``names`` (name -> numel)."""
    total = []
    for name, numel in names.items():
        value = torch.zeros(numel, dtype=torch.float64)
        for state in states:
            residuals = parts_of(state)[0]["error_feedback"]
            if name in residuals["local"]:
                value += residuals["local"][name].double() / len(states)
            if name in residuals["owner"]:
                start, residual = residuals["owner"][name]
                value[start : start + residual.numel()] += residual.double()
        total.append(value)
    return torch.cat(total)


def new_ddp(plain, group):
    return DistributedDataParallel(copy.deepcopy(plain), process_group=group, bucket_cap_mb=0.005)


@world(3)
@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid(c=2)], ids=["sigma", "range"])
def test_checkpoint_and_another_number_of_ranks(rank, world_size, grid):
    """Trains with each number of ranks in turn, through saved states and new models. Nothing may be lost on the way."""
    plain = model()
    names = {name: p.numel() for name, p in plain.named_parameters()}
    sums = [torch.zeros(sum(names.values()), dtype=torch.float64) for _ in range(2)]
    states, seed = None, 0
    for size in (3, 3, 2, 3):
        group = dist.new_group(list(range(size)))
        saved = None
        if rank < size:
            ddp_model = new_ddp(plain, group)
            state = attach(ddp_model, grid=grid, min_elements=0)
            if states is not None and rank < len(states):
                state.load_state_dict([states[other] for other in range(rank, len(states), size)])
            elif states is not None:
                state.load_state_dict({**states[0], "error_feedback": None})
            train(ddp_model, plain, group, range(seed, seed + 3), sums)
            saved = state.state_dict()
            assert saved["steps"] == seed + 3
        seed += 3
        states = [value for value in gathered(saved) if value is not None]
        # Ranks that took no part did not see the sums either.
        dist.broadcast(sums[0], 0)
        dist.broadcast(sums[1], 0)
        assert torch.allclose(sums[1] - sums[0], remaining(states, names), rtol=0, atol=1e-4)
        assert float((sums[1] - sums[0]).abs().max()) > 1e-3
        if rank < size:
            dist.destroy_process_group(group)


@world(2)
def test_a_pickled_state_goes_on(rank, world_size):
    plain = model()
    ddp_model = new_ddp(plain, None)
    state = attach(ddp_model, min_elements=0)
    names = {name: p.numel() for name, p in plain.named_parameters()}
    sums = [torch.zeros(sum(names.values()), dtype=torch.float64) for _ in range(2)]
    train(ddp_model, plain, None, range(3), sums)
    with pytest.warns(UserWarning, match="has no process group"):
        restored = pickle.loads(pickle.dumps(state))
    assert restored.process_group is None and restored.stats()["steps"] == 3
    # Residuals under names cannot be found again by a hook that does not know names.
    unnamed = new_ddp(plain, None)
    unnamed.register_comm_hook(restored, qcomm.compression_hook)
    with pytest.raises(RuntimeError, match="residuals belong to named parameters"):
        unnamed(torch.ones(1, 48)).sum().backward()
    ddp_model = new_ddp(plain, None)
    assert attach(ddp_model, state=restored) is restored
    train(ddp_model, plain, None, range(3, 6), sums)
    assert torch.allclose(sums[1] - sums[0], remaining(gathered(restored.state_dict()), names), rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match="state must not be combined with options"):
        attach(new_ddp(plain, None), state=restored, min_elements=3)


def residual_rms(grid, steps, count=4096):
    """RMS of the residual after each of ``steps`` steps of white noise of RMS 1, as the codec keeps it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator)
    starts = torch.randint(noise.numel() - count, (steps,), generator=generator).tolist()
    residual, found = torch.zeros(count), []
    for start in starts:
        values = noise[start : start + count]
        statistics = measure(values, residual)
        encode([Segment(values, plan(statistics, grid, values, residual), residual)])
        found.append(float(residual.norm()) / count**0.5)
    return torch.tensor(found)


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, 3.2, 3.4])
def test_the_step_comes_to_rest_where_the_formula_says(k):
    rms = residual_rms(qcomm.SigmaGrid(step=k, coding="single"), steps=10_000)
    assert float(rms[5000:].mean()) == pytest.approx(equilibrium_step(k) / 12**0.5, rel=0.03)


@pytest.mark.parametrize(
    "grid", [qcomm.SigmaGrid(step=4.0, coding="single"), qcomm.RangeGrid(num_bits=1)], ids=["sigma", "range"]
)
def test_a_grid_that_is_refused_has_no_rest(grid):
    rms = residual_rms(grid, steps=4000)
    assert float(rms[-1]) > 1.5 * float(rms[1000]) > 1.5**2 * float(rms[250])


REFUSED = [
    ({"grid": qcomm.SigmaGrid(step=3.5)}, "step must be at most 3.4 with error feedback, got 3.5: .* take step=3.4"),
    ({"mean_step": 3.41}, "mean_step must be at most 3.4 with error feedback, got 3.41"),
    ({"grid": qcomm.RangeGrid(num_bits=1)}, "grid must have more than one bit with error feedback"),
    ({"grid": qcomm.RangeGrid(max_bits=1)}, "grid must have more than one bit with error feedback"),
    ({"grid": qcomm.RangeGrid(c=0.5, entropy_bits=1)}, "grid must have more than one bit with error feedback"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_grids_without_rest_are_refused_wherever_feedback_is(options, message):
    with pytest.raises(ValueError, match=message):
        qcomm.CompressionState(**options)
    with pytest.raises(ValueError, match=message):
        qcomm.CompressedModelAverager(period=2, **options)
    state = qcomm.CompressionState()
    with pytest.raises(ValueError, match=message):
        state.reconfigure(**options)
    assert state.options == qcomm.CompressionState().options
    qcomm.CompressionState(error_feedback=False, **options)
    qcomm.CompressionState(error_feedback=False).reconfigure(**options)
    ExchangeOptions.of(error_feedback=False, **options)


def test_the_coarsest_grids_with_feedback_are_taken():
    state = qcomm.CompressionState(grid=qcomm.SigmaGrid(step=3.4))
    assert state.options.mean_grid.step == 3.4
    qcomm.CompressionState(grid=qcomm.RangeGrid(num_bits=1, reconstruction="center"))
