"""Replicas that come and go: sums travel compressed, residuals keep their sum, and nobody waits for the dead."""

from datetime import timedelta

import late_device
import pytest
import torch
from distributed import world
from late_device import ORDERS
from quorums import connected, exchanged, flat_total, residuals_of, total, two_phase

import qcomm
from qcomm.integrations.quorum_residuals import QuorumResiduals

ELEMENTS = 70_000  # two pieces


def gradients(step, count, elements=ELEMENTS):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(elements, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum"])
def test_sums_over_all_quorums_differ_from_exact_ones_by_the_residuals_alone(strategy):
    options, residuals = two_phase(strategy=strategy), residuals_of(3)
    sent, received = torch.zeros(ELEMENTS, dtype=torch.float64), torch.zeros(ELEMENTS, dtype=torch.float64)
    for step, world_size in enumerate([2, 2, 3, 3, 1, 2]):
        members = residuals[:world_size]
        quorum = connected(world_size, options)
        before = flat_total(*residuals) if step else None
        for replica in residuals:
            replica.regroup()
        if before is not None:
            assert torch.allclose(flat_total(*residuals), before, atol=1e-5)
        values = gradients(step, world_size)
        results = exchanged(quorum, members, values)
        assert all(torch.equal(result, results[0]) for result in results)
        sent += sum(value.double() for value in values)
        received += results[0].double()
        for replica in members:
            replica.commit()
        for replica in quorum:
            replica.close()
    owed = flat_total(*residuals)
    assert owed.norm() > 0.1 * sent.norm()
    assert torch.allclose(sent - received, owed, atol=1e-3)


def test_bytes_are_a_few_bits_a_value_and_a_mean_is_divided():
    quorum = connected(2, two_phase())
    values = gradients(0, 2)
    sums = exchanged(quorum, [None, None], values)
    sent = quorum[0]._telemetry.stats()["bytes_sent"]  # of both replicas
    assert 0 < sent < 2 * ELEMENTS * 4 / 8
    means = exchanged(quorum, [None, None], values, is_mean=True)
    assert torch.equal(sums[0], 2 * means[0])
    assert float((means[0] - sum(values) / 2).abs().max()) < 1.1  # half a step of the values, and of the means
    for replica in quorum:
        replica.close()


@world(1, on_device=True)
def test_tensors_on_a_device_get_the_bits_of_the_cpu(rank, world_size):
    for seed in ORDERS[:2]:
        with late_device.order(seed):
            outcomes = []
            for device in ("cpu", "late"):
                quorum, residuals = connected(2, two_phase()), residuals_of(2)
                for step in range(2):
                    values = [(value.to(device) * 2).div_(2) for value in gradients(step, 2, 5000)]
                    results = exchanged(quorum, residuals, values)
                outcomes.append([(result * 1).cpu() for result in results])
                for replica in quorum:
                    assert replica.close()
            assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_replica_that_is_alone_sends_nothing_and_keeps_its_residuals():
    (quorum,) = connected(1, two_phase())
    residuals = QuorumResiduals()
    residuals.of("0")[0].local("0.0", ELEMENTS).fill_(1.0)
    value = gradients(0, 1)
    (result,) = exchanged([quorum], [residuals], value)
    assert torch.equal(result, value[0]) and float(flat_total(residuals).sum()) == ELEMENTS
    quorum.close()


def test_a_step_that_is_discarded_takes_nothing_and_gives_nothing():
    residuals = residuals_of(2)
    quorum = connected(2, two_phase())
    exchanged(quorum, residuals, gradients(0, 2))
    for replica in residuals:
        replica.commit()
    before = [flat_total(replica) for replica in residuals]
    exchanged(quorum, residuals, gradients(1, 2))
    assert not torch.equal(flat_total(residuals[0]), before[0])
    for replica, owed in zip(residuals, before, strict=True):
        replica.undo()
        assert torch.allclose(flat_total(replica), owed, atol=1e-5)
        replica.undo()  # which has nothing left to take back
        assert torch.allclose(flat_total(replica), owed, atol=1e-5)
    for replica in quorum:
        replica.close()


def test_an_exchange_with_a_silent_replica_ends_when_the_quorum_does():
    quorum, residuals = connected(2, two_phase(), timedelta(minutes=10)), QuorumResiduals()
    feedback, keep = residuals.of("0")
    ticket = quorum[0].start(gradients(0, 1)[0], 0, False, feedback, keep)  # the other one never begins
    assert quorum[0].error() is None and not quorum[0].close()
    assert ticket.is_completed() and isinstance(quorum[0].error(), qcomm.CollectiveError)
    residuals.undo()
    assert all(not bool(owed.any()) for owed in total(residuals.state_dict()).values())
    # The other one gets an error, too, and at once.
    late = quorum[1].start(gradients(0, 1)[0], 0, False, None)
    late.join()
    assert isinstance(quorum[1].error(), qcomm.CollectiveError)
    quorum[1].close()


def test_replicas_that_differ_in_what_they_reduce_get_an_error():
    quorum = connected(2, two_phase())
    tickets = [replica.start(torch.ones(100 + rank), 0, False, None) for rank, replica in enumerate(quorum)]
    for ticket in tickets:
        ticket.join()
        assert "elements" in str(ticket.exception())
        assert isinstance(ticket.exception(), qcomm.ConfigMismatchError)
    # What one replica cannot send is an error of all.
    tickets = [
        quorum[0].start(torch.ones(3, dtype=torch.int64), 0, False, None),
        quorum[1].start(torch.ones(3), 0, False, None),
    ]
    for ticket in tickets:
        ticket.join()
    assert "int64" in str(tickets[0].exception()) and isinstance(tickets[1].exception(), qcomm.CollectiveError)
    for replica in quorum:
        replica.close()


def test_residuals_survive_a_checkpoint_and_damaged_ones_change_nothing():
    residuals = QuorumResiduals()
    residuals.of("0")[0].local("0.0", 3).fill_(1.0)
    saved = residuals.state_dict()
    resumed = QuorumResiduals()
    saved["residuals"]["0"]["world_size"] = 2
    resumed.load_state_dict(saved)
    assert torch.equal(flat_total(resumed), torch.ones(3, dtype=torch.float64))
    saved["residuals"]["0"]["local"]["0.0"][1] = float("nan")
    for damaged in (saved, {}, None, {"format": 1, "residuals": None}, {"format": 1, "residuals": {1: {}}}):
        with pytest.raises(ValueError, match="state"):
            resumed.load_state_dict(damaged)
    assert torch.equal(flat_total(resumed), torch.ones(3, dtype=torch.float64))
