"""DiLoCo between real processes: the algorithm's own arithmetic, equal anchors, nothing lost."""

import pytest
import torch
from averager_model import exact_mean, flat, move
from diloco_model import SlowDiLoCo, diloco, network, train_step
from distributed import assert_same_on_all_ranks, counting_bytes, gathered, world
from torch import nn

import qcomm
from qcomm.local_sgd.fragments import cut_evenly, due_fragment
from qcomm.local_sgd.outer import nesterov

pytestmark = pytest.mark.world


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


SCHEDULES = {
    "plain": {"period": 4},
    "every step": {"period": 1},
    "fragments": {"period": 6, "fragments": 3},
    "uneven fragments": {"period": 7, "fragments": 4},
    "delay": {"period": 6, "delay": 3},
    "longest delay": {"period": 6, "delay": 5, "alpha": 0.25},
    "dropped steps": {"period": 6, "delay": 2, "alpha": 0.0},
    "mixed at once": {"period": 4, "alpha": 0.75},
    "streaming": {"period": 8, "fragments": 2, "delay": 3},
    "another outer": {"period": 4, "outer": adamw},
}


@world(2, 3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_uncompressed_it_is_the_algorithm(rank, world_size, name):
    """Two ranks have the bits of the slow reference; of three, gloo's ring adds in another order."""
    options = {"outer": nesterov, **SCHEDULES[name]}
    model = network()
    ours = diloco(model, strategy="none", **options)
    alpha = options.get("alpha", 0.5 if options.get("delay") else 0.0)
    fragments = ours._fragments
    slow = SlowDiLoCo(
        network(), world_size, options["outer"], options["period"], fragments, options.get("delay", 0), alpha
    )
    for step in range(1, 20):
        train_step(model, rank, step)
        for number, one in enumerate(slow.models):
            train_step(one, number, step)
        ours.step()
        slow.step()
        expected = [*slow.models[rank].parameters(), *slow.anchor.values()]
        found = [*model.parameters(), *ours.anchor().values()]
        if world_size == 2:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), step
        torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=2e-6)
    assert len(fragments) == options.get("fragments", 1) and ours.steps == 19
    assert float((flat(model.parameters()) - flat(network().parameters())).abs().max()) > 0.004


OPTIONS = {
    "defaults": {},
    "k=3.2": {"grid": qcomm.SigmaGrid(step=3.2)},
    "range": {"grid": qcomm.RangeGrid(c=2)},
    "no feedback": {"error_feedback": False},
    "all_gather": {"strategy": "all_gather"},
    "exact_sum": {"strategy": "exact_sum"},
    "bf16": {"strategy": "bf16"},
    "auto": {"strategy": "auto"},
    "small alone": {"small_step": None},
    "fragments, delay": {"period": 6, "fragments": 3, "delay": 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@world()
@pytest.mark.parametrize(
    ("world_size", "name"),
    [(size, name) for size in (1, 2, 3, 4) for name in (OPTIONS if size == 2 else ["defaults", "auto", "k=3.2"])],
)
def test_anchors_are_equal_and_near_the_algorithms(rank, world_size, name):
    options = {"period": 4, **OPTIONS[name]}
    dtype = options.pop("dtype", torch.float32)
    model = network(dtype)
    ours = diloco(model, **options)
    alpha = 0.5 if options.get("delay") else 0.0
    slow = SlowDiLoCo(
        network(), world_size, nesterov, options["period"], ours._fragments, options.get("delay", 0), alpha
    )
    start, exchanges = flat(model.parameters()), 0
    for step in range(1, 25):
        train_step(model, rank, step)
        for number, one in enumerate(slow.models):
            train_step(one, number, step)
        ours.step()
        slow.step()
        assert_same_on_all_ranks(*ours.anchor().values())
        exchanges += due_fragment(step, options["period"], options.get("fragments", 1)) is not None
        if step % options["period"] == 0 and not options.get("delay"):
            assert_same_on_all_ranks(*model.parameters())
    moved = float((flat(slow.anchor.values()) - start).norm())
    missed = float((flat(ours.anchor().values()) - flat(slow.anchor.values())).norm())
    assert missed < (0.7 if name == "k=3.2" else 0.3) * moved
    assert exchanges == 24 // options["period"] * options.get("fragments", 1)
    assert ours.stats()["steps"] == exchanges - ("delay" in options)  # the last one is not merged yet


def plain(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


@world(2, 3)
def test_nothing_is_lost(rank, world_size):
    """With an outer step that adds the movement, the anchor has moved by all movements but for what ranks keep."""
    model = network()
    ours = diloco(model, plain, period=1, grid=qcomm.SigmaGrid(step=3.2))
    begin, moved = flat(ours.anchor().values()), 0
    for step in range(12):
        before = flat(model.parameters())
        move(model, rank, step)
        moved = moved + exact_mean([flat(model.parameters()) - before])
        ours.step()
    left = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
    for of_rank in gathered(ours.state_dict()["exchanges"][0]["error_feedback"]):
        for name, residual in of_rank["local"].items():
            left[name] += residual.double() / world_size
        for name, (start, residual) in of_rank["owner"].items():
            left[name][start : start + residual.numel()] += residual.double()
    kept = torch.cat(list(left.values()))
    assert float(kept.abs().max()) > 0.003 and set(left) == set(dict(model.named_parameters()))
    torch.testing.assert_close(flat(ours.anchor().values()) - begin + kept, moved, rtol=0, atol=2e-6)


@world(2)
def test_bytes_are_those_that_were_sent(rank, world_size):
    model = network()
    ours = diloco(model, period=5, grid=qcomm.SigmaGrid(step=3.2))
    with counting_bytes() as counting:
        for step in range(1, 21):
            move(model, rank, step)
            ours.step()
    stats, received = ours.stats(), counting.received()
    assert (stats["bytes_sent"], stats["bytes_received"]) == (counting.sent, received)
    elements = sum(p.numel() for p in model.parameters())
    assert (stats["steps"], stats["bytes_uncompressed"]) == (4, 4 * 4 * elements)
    assert 0 < stats["bits_per_element_compressed"] < 1.5 and stats["residual_norm"] > 0
    assert 8 * stats["bytes_sent"] / (20 * elements) < 0.6  # bits a parameter and step, handshakes included


@world(2)
def test_buffers(rank, world_size):
    """They are set to their mean with the last fragment; by default they are a rank's own."""
    models = [nn.Sequential(nn.Linear(48, 48), nn.BatchNorm1d(48), nn.Linear(48, 48)) for _ in range(2)]
    for model in models:
        qcomm.broadcast_parameters(model, lossless=True)
    with_buffers, without = models
    ours = diloco(with_buffers, period=2, fragments=2, buffers_of=with_buffers)
    other = diloco(without, period=2, fragments=2)
    for step in range(1, 5):
        for one in models:
            train_step(one, rank, step)
        wanted = exact_mean([with_buffers[1].running_mean, with_buffers[1].running_var])
        ours.step()
        other.step()
        found = flat([with_buffers[1].running_mean, with_buffers[1].running_var])
        equal = float((found - wanted).abs().max()) < 1e-6
        assert equal == (step % 2 == 0), step
    assert_same_on_all_ranks(with_buffers[1].running_mean)
    assert len(set(gathered(float(without[1].running_mean[0])))) == 2
    assert int(with_buffers[1].num_batches_tracked) == 4


class Tied(nn.Module):
    """An embedding that is the last layer, too; a frozen layer; a scalar; 16-bit weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(48, 48), nn.Linear(48, 48, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.low = nn.Linear(48, 48).to(torch.bfloat16)

    def forward(self, x):
        hidden = self.low(self.frozen(x).to(torch.bfloat16)).float() * self.scale
        return self.head(hidden + self.embedding(x.argmax(1)))


@world(2)
def test_tied_frozen_and_mixed_parameters(rank, world_size):
    model = Tied()
    frozen = flat(model.frozen.parameters())
    ours = diloco(model, period=3, fragments=2)
    for step in range(1, 13):
        train_step(model, rank, step)
        ours.step()
    ours.finish()
    assert_same_on_all_ranks(*model.parameters())
    assert list(ours.anchor()) == ["scale", "embedding.weight", "low.weight", "low.bias"]
    assert model.head.weight is model.embedding.weight and model.low.weight.dtype == torch.bfloat16
    assert torch.equal(flat(model.frozen.parameters()), frozen)
    assert {a.dtype for a in ours._outer.anchor.values()} == {torch.float32}


@world(2)
def test_an_anchor_keeps_what_16_bits_would_round_away(rank, world_size):
    """Movements below half a step of bfloat16 add up."""
    model = nn.Linear(48, 48, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    ours = diloco(model, lambda parameters: torch.optim.SGD(parameters, lr=0.125), period=1, strategy="none")
    for _ in range(16):
        with torch.no_grad():
            model.weight.add_(2**-7)  # one step of bfloat16, of which the outer step takes an eighth
        ours.step()
    assert bool((model.weight == 1 + 2 * 2**-7).all())


@world(2)
def test_layouts_in_memory(rank, world_size):
    torch.manual_seed(0)
    model = nn.Conv2d(16, 24, 3).to(memory_format=torch.channels_last)
    strides, pointer = model.weight.stride(), model.weight.data_ptr()
    ours = diloco(model, period=1)
    for step in range(3):
        move(model, rank, step)
        ours.step()
        assert_same_on_all_ranks(model.weight)
    assert model.weight.stride() == strides != model.weight.contiguous().stride()
    assert model.weight.data_ptr() == pointer


@world(3)
def test_finish(rank, world_size):
    """The end of training between two exchanges, and with one under way."""
    for options in ({"period": 5}, {"period": 6, "fragments": 2, "delay": 2}, {"period": 4, "alpha": 0.5}):
        model = network()
        ours = diloco(model, plain, strategy="none", **options)
        for step in range(1, 9):
            train_step(model, rank, step)
            ours.step()
        wanted = exact_mean(model.parameters())
        ours.finish()
        assert_same_on_all_ranks(*model.parameters())
        assert torch.equal(flat(model.parameters()), flat(ours.anchor().values()))
        if "fragments" not in options and "alpha" not in options:
            # The outer step adds the mean movement, so the end is the mean of the weights.
            assert float((flat(model.parameters()) - wanted).abs().max()) < 1e-5
        before = flat(model.parameters())
        ours.finish()  # nothing has moved
        assert torch.equal(flat(model.parameters()), before)


@world(4)
def test_a_group_of_some_ranks(rank, world_size):
    group = torch.distributed.new_group([0, 2])
    model = network()
    ours = diloco(model, period=1, process_group=group)
    move(model, rank, 0)
    before = flat(model.parameters())
    ours.step()
    ours.finish()
    weights = gathered(flat(model.parameters()))
    assert torch.equal(weights[0], weights[2]) and (rank in (0, 2)) != torch.equal(before, weights[rank])
    torch.distributed.barrier()
    if rank in (0, 2):
        torch.distributed.destroy_process_group(group)


@world(2)
def test_a_scheduler_of_the_outer_rate(rank, world_size):
    model = network()
    ours = diloco(model, plain, period=2, strategy="none")
    scheduler = torch.optim.lr_scheduler.StepLR(ours.outer, step_size=1, gamma=0.0)
    train_step(model, rank, 1)
    ours.step()
    ours.step()
    scheduler.step()
    anchor = flat(ours.anchor().values())
    for step in (2, 3):
        train_step(model, rank, step)
        ours.step()
    assert torch.equal(flat(ours.anchor().values()), anchor) and torch.equal(flat(model.parameters()), anchor)


def test_fragments_are_contiguous_and_nearly_equal():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 30, (), generator=generator))
        sizes = (10 ** (4 * torch.rand(count, generator=generator))).int().tolist()
        parts = int(torch.randint(1, count + 1, (), generator=generator))
        cut = cut_evenly(sizes, parts)
        assert [item for part in cut for item in sizes[part]] == sizes and len(cut) == parts
        sums = [sum(sizes[part]) for part in cut]
        assert all(part.stop > part.start for part in cut) and max(sums) <= sum(sizes) / parts + max(sizes)


def test_every_fragment_is_due_once_a_period():
    for period in range(1, 12):
        for fragments in range(1, period + 1):
            due = [due_fragment(step, period, fragments) for step in range(1, 2 * period + 1)]
            assert [found for found in due if found is not None] == 2 * list(range(fragments))
            assert due[:period] == due[period:] and due[-1] == fragments - 1
