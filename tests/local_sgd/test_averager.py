"""The averagers between real processes: equal bits, the exact mean but for what is kept."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from averager_model import averager, exact_mean, flat, move, network, post_local_sgd, train
from distributed import assert_same_on_all_ranks, counting_bytes, gathered, world
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

import qcomm

pytestmark = pytest.mark.world


CASES = {
    "differences": {},
    "differences k=2": {"grid": qcomm.SigmaGrid(step=2.0)},
    "differences k=1/8": {"grid": qcomm.SigmaGrid(step=0.125)},
    "differences on a range": {"grid": qcomm.RangeGrid(c=2)},
    "no feedback": {"error_feedback": False},
    "weights": {"exchange": "weights"},
    "weights as in the paper": {"exchange": "weights", "grid": qcomm.RangeGrid("paper")},
    "all_gather": {"strategy": "all_gather"},
    "exact_sum": {"strategy": "exact_sum"},
    "auto": {"strategy": "auto"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
}


# Movements have an RMS of 0.01 and reach 0.04. What is off are the old and the new residuals, of values and of means,
# each within half a step: 2 * step and some margin, as the RMS of a movement and a residual is larger. Weights lie
# within 0.2 and have 7 bits or more; they are quantized twice.
BOUNDS = {
    "differences k=2": 0.05,
    "differences k=1/8": 0.003,
    "differences on a range": 0.01,
    "weights": 0.4 / 2**7,
    "weights as in the paper": 0.4 / 2**7,
}


@world()
@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        (world_size, name)
        for world_size in (1, 2, 3, 4)
        for name in (
            CASES if world_size == 2 else ["differences", "differences k=1/8", "weights", "all_gather", "auto"]
        )
    ],
)
def test_ranks_are_equal_and_near_the_mean(rank, world_size, name):
    options = dict(CASES[name])
    dtype = options.pop("dtype", torch.float32)
    model = network(dtype)
    compressed = averager(**options)
    move(model, rank, 0)
    for step in range(1, 5):
        wanted, addresses = exact_mean(model.parameters()), [p.data_ptr() for p in model.parameters()]
        before = flat(model.parameters())
        compressed.average_parameters(model.parameters())
        assert_same_on_all_ranks(*model.parameters())
        assert addresses == [p.data_ptr() for p in model.parameters()]
        error = float((flat(model.parameters()) - wanted).abs().max())
        if world_size == 1 and compressed._options.reduce.strategy == "auto":
            assert torch.equal(flat(model.parameters()), before)
        elif step == 1 and compressed._options.exchange == "difference":
            # Nothing was common yet: uncompressed, rounded once to the parameters' dtype.
            assert error <= 2 * torch.finfo(dtype).eps
        else:
            assert error <= BOUNDS.get(name, 0.025) + 2 * torch.finfo(dtype).eps, (name, step, error)
        move(model, rank, step)
    assert compressed.step == 4
    assert compressed.stats()["steps"] == (0 if world_size == 1 and name == "auto" else 4)


@world(2, 3)
def test_nothing_is_lost(rank, world_size):
    """With feedback the sum of all means is that of all movements but for the residuals that are left."""
    model = network()
    compressed = averager(min_elements=100)
    compressed.average_parameters(model.named_parameters())
    begin, moved = flat(model.parameters()), 0
    for step in range(12):
        anchor = flat(model.parameters())
        move(model, rank, step)
        moved = moved + exact_mean([flat(model.parameters()) - anchor])
        compressed.average_parameters(model.named_parameters())
    state = compressed.state_dict()["exchanges"][0]["error_feedback"]
    left = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
    for of_rank in gathered(state):
        for name, residual in of_rank["local"].items():
            left[name] += residual.double() / world_size
        for name, (start, residual) in of_rank["owner"].items():
            left[name][start : start + residual.numel()] += residual.double()
    kept = torch.cat(list(left.values()))
    assert float(kept.abs().max()) > 0.003
    torch.testing.assert_close(flat(model.parameters()) - begin + kept, moved, rtol=0, atol=2e-6)


@world(2)
def test_bytes_are_those_that_were_sent(rank, world_size):
    model = nn.Linear(300, 300)
    compressed = averager(4)
    compressed.average_parameters(model.parameters())
    uncompressed = compressed.stats()
    compressed.reset_stats()
    with counting_bytes() as counting:
        for step in range(1, 13):
            move(model, rank, step)
            compressed.average_parameters(model.parameters())
    stats, received = compressed.stats(), counting.received()
    assert (stats["bytes_sent"], stats["bytes_received"]) == (counting.sent, received)
    assert (stats["steps"], stats["bytes_uncompressed"]) == (3, 3 * 4 * 90_300)
    assert 0 < stats["bits_per_element_compressed"] < 2.4 and stats["residual_norm"] > 0
    assert uncompressed["bytes_sent"] > 12 * stats["bytes_sent"] / 3


@world(2)
@pytest.mark.parametrize(("warmup", "period"), [(0, 3), (4, 2)])
def test_averages_are_those_of_torchs_averager(rank, world_size, warmup, period):
    """Both are due at the same steps, and uncompressed both give the same weights but for rounding."""
    models = network(), network()
    mine = averager(period, warmup, min_elements=10**9)
    theirs = PeriodicModelAverager(period, warmup)
    for step in range(9):
        for model, one in zip(models, (mine, theirs), strict=True):
            move(model, rank, step)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            one.average_parameters(model.parameters())
        torch.testing.assert_close(flat(models[0].parameters()), flat(models[1].parameters()), rtol=0, atol=1e-6)
    assert mine.step == theirs.step == 9


@world(2)
def test_post_local_sgd_optimizer(rank, world_size):
    model = network()
    compressed = averager(4, warmup_steps=2, buffers_of=model)
    assert isinstance(compressed, torch.distributed.algorithms.model_averaging.averagers.ModelAverager)
    optimizer = post_local_sgd(model, compressed, momentum=0.9)
    equal = []

    def compare(step):
        others = gathered(flat([*model.parameters(), model[1].running_mean, model[1].running_var]))
        equal.append(all(torch.equal(other, others[0]) for other in others))

    train(model, optimizer, rank, 14, compare)
    # The average is taken after the step, so weights are equal where one was due.
    assert equal == [step >= 2 and (step - 2) % 4 == 0 for step in range(14)]
    assert optimizer.state_dict()["step"] == compressed.step == 14
    # Named parameters keep their names through the optimizer's groups.
    assert set(compressed.stats()["tensors"]) == {"0.weight", "3.weight"}


@world(3)
def test_ranks_that_lack_gradients(rank, world_size):
    """torch's averager leaves parameters without a gradient out, on this rank only."""
    model = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
    compressed = averager()
    for step in range(4):
        model.zero_grad(set_to_none=True)
        used = model[(rank + step) % 2]
        used(torch.randn(4, 48)).square().sum().backward()
        with torch.no_grad():
            for parameter in used.parameters():
                parameter.sub_(0.01 * parameter.grad)
        compressed.average_parameters(model.parameters())
        assert_same_on_all_ranks(*model.parameters())
    model.zero_grad(set_to_none=True)  # none at all
    move(model, rank, 7)
    compressed.average_parameters(model.parameters())
    assert_same_on_all_ranks(*model.parameters())


@world(2)
def test_ranks_that_skip_steps(rank, world_size):
    """One rank's gradient overflows, its GradScaler skips the step: the loop's averaging goes on."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    compressed, skipped = averager(2), 0
    for step in range(8):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 48)).square().mean()
        scaler.scale(loss * (float("inf") if rank == 1 and step in (2, 3, 6) else 1.0)).backward()
        before = flat(model.parameters())
        scaler.step(optimizer)
        skipped += bool(torch.equal(before, flat(model.parameters())))
        scaler.update()
        compressed.average_parameters(model.parameters())
        if step % 2 == 0:
            assert_same_on_all_ranks(*model.parameters())
    assert skipped == (3 if rank == 1 else 0) and bool(flat(model.parameters()).isfinite().all())


@world(2)
def test_ranks_that_skip_steps_within_the_optimizer(rank, world_size):
    """There a skipped step is not counted either: averagings meet by their number, a step later on that rank."""
    model = network()
    compressed = averager(2)
    optimizer = post_local_sgd(model, compressed)
    while compressed.step < 7:
        if rank == 1 and compressed.step == 3 and not hasattr(compressed, "skipped"):
            compressed.skipped = True
            continue
        optimizer.zero_grad()
        model(torch.randn(16, 48)).square().mean().backward()
        optimizer.step()
        if compressed.step % 2 == 1:
            assert_same_on_all_ranks(*model.parameters())


@world(2)
def test_layouts_in_memory(rank, world_size):
    torch.manual_seed(0)
    model = nn.Conv2d(16, 24, 3)
    other = copy.deepcopy(model)
    model = model.to(memory_format=torch.channels_last)
    strides, pointer = model.weight.stride(), model.weight.data_ptr()
    one, two = averager(), averager()
    for step in range(4):
        move(model, rank, step)
        move(other, rank, step)
        one.average_parameters(model.parameters())
        two.average_parameters(other.parameters())
        # Row-major in the packets whatever the layout in memory, so the values are the same, too.
        assert torch.equal(model.weight, other.weight)
    assert model.weight.stride() == strides != other.weight.stride() and model.weight.data_ptr() == pointer
    assert_same_on_all_ranks(model.weight)


@world(2)
def test_mixed_dtypes_and_shapes(rank, world_size):
    """Dtypes side by side, scalars, empty tensors, a frozen layer; parameters that come later."""
    torch.manual_seed(rank)
    parameters = [
        nn.Parameter(torch.randn(60, 50, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    parameters += [nn.Parameter(torch.randn(())), nn.Parameter(torch.empty(0, 4))]
    parameters.append(nn.Parameter(torch.randn(40, 40), requires_grad=False))
    compressed = averager()
    groups = [{"params": parameters[:3]}, {"params": parameters[3:]}]
    for step in range(3):
        wanted = exact_mean(parameters)
        compressed.average_parameters(groups)
        assert_same_on_all_ranks(*parameters)
        if step == 0:
            assert float((flat(parameters) - wanted).abs().max()) < 0.02
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.001 * torch.randn(parameter.shape).to(parameter.dtype))
    new = nn.Parameter(torch.randn(50, 50))
    wanted = exact_mean([new])
    compressed.average_parameters([*groups, {"params": [new]}])
    assert float((flat([new]) - wanted).abs().max()) < 1e-6  # uncompressed, as it has no anchor
    assert_same_on_all_ranks(*parameters, new)
    # Weights that did not move stay as they are, whatever residuals wait.
    before = flat([*parameters, new])
    compressed.average_parameters([*groups, {"params": [new]}])
    assert torch.equal(before, flat([*parameters, new]))


@world(2)
def test_buffers(rank, world_size):
    model = network()
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    model.register_buffer("steps", torch.tensor(rank))
    alone = copy.deepcopy(model)
    for one in (model, alone):
        one(torch.randn(32, 48) + rank)
    wanted = exact_mean([model[1].running_mean, model[1].running_var])
    averager(buffers_of=model).average_parameters(model.parameters())
    averager().average_parameters(alone.parameters())
    found = flat([model[1].running_mean, model[1].running_var])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert_same_on_all_ranks(model[1].running_mean, model[1].running_var)
    assert len(set(gathered(float(alone[1].running_mean[0])))) == world_size  # left alone
    assert bool((model.mask == float("-inf")).all()) and int(model.steps) == rank
    for tensor in (model[1].running_var, model[3].weight):
        if rank == 1:
            tensor.data.view(-1)[3] = float("nan")
    fresh, before = averager(buffers_of=model), flat(model.parameters())
    with pytest.raises(qcomm.CollectiveError, match=r"rank 1 failed while preparing.*'3.weight' has 1 of 2304 values"):
        fresh.average_parameters(model.named_parameters())
    model[3].weight.data.nan_to_num_()
    with pytest.raises(qcomm.CollectiveError, match=r"rank 1 failed.*'buffer 1.running_var' has 1 of 48 values"):
        fresh.average_parameters(model.named_parameters())
    assert fresh.step == 2 and (rank == 1 or torch.equal(before, flat(model.parameters())))


@world(4)
def test_groups_in_levels(rank, world_size):
    model = network()
    levels = OrderedDict([(2, 2), (4, 4)])
    compressed = qcomm.HierarchicalCompressedModelAverager(levels, warmup_steps=1, strategy="two_phase")
    distinct = []
    for step in range(13):
        move(model, rank, step)
        compressed.average_parameters(model.parameters())
        weights = gathered(flat(model.parameters()))
        assert step % 2 or step < 1 or (torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3]))
        distinct.append(len({bytes(w.numpy().tobytes()) for w in weights}))
    assert distinct == [4, 4, 2, 4, 1, 4, 2, 4, 1, 4, 2, 4, 1]
    assert compressed.stats()["steps"] == 6
    # The first of each group was uncompressed: what all had in common, pairs had too.
    pair, whole = (exchange["identity"] for exchange in compressed.state_dict()["exchanges"])
    assert pair == whole != "none yet"
    continued = qcomm.HierarchicalCompressedModelAverager(levels, warmup_steps=1, strategy="two_phase")
    continued.load_state_dict(compressed.state_dict())
    twin = copy.deepcopy(model)
    for step in range(13, 17):
        for one, its_averager in ((model, compressed), (twin, continued)):
            move(one, rank, step)
            its_averager.average_parameters(one.parameters())
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@world(4)
@pytest.mark.parametrize(
    ("levels", "error", "match"),
    [
        ({}, TypeError, "must be a dictionary of period to group size"),
        ({4: 2, 2: 4}, ValueError, "must have ascending periods"),
        ({2: 4, 4: 4}, ValueError, "must have ascending group sizes"),
        ({2: 3, 4: 4}, ValueError, "group sizes that divide each other, the last one 4"),
        ({2: 2}, ValueError, "the last one 4"),
        ({0: 2, 4: 4}, ValueError, "each of the periods must be >= 1, got 0"),
    ],
    ids=["empty", "periods", "equal_sizes", "indivisible", "last_size", "period_0"],
)
def test_levels_that_cannot_be_are_refused(rank, world_size, levels, error, match):
    with pytest.raises(error, match=match):
        qcomm.HierarchicalCompressedModelAverager(levels)


@world(4)
def test_a_group_of_some_ranks(rank, world_size):
    """A group of some ranks; the others call it, too, and nothing happens to them."""
    group = dist.new_group([0, 2])
    model = network()
    move(model, rank, 0)
    before = flat(model.parameters())
    compressed = averager(process_group=group)
    compressed.average_parameters(model.parameters())
    weights = gathered(flat(model.parameters()))
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
    assert (rank in (0, 2)) != torch.equal(before, flat(model.parameters())) and compressed.step == 1
    dist.barrier()
    if rank in (0, 2):
        dist.destroy_process_group(group)
