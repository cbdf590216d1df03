"""torchft: training goes on compressed while replicas die and join, in its DDP, its LocalSGD and its DiLoCo."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import qcomm

pytest.importorskip("torchft", reason="torchft is not installed: make test-frameworks")

import torchft
from torch.distributed.distributed_c10d import AllreduceOptions, ReduceOp
from torchft_replicas import replicas, weights_grid

from qcomm.integrations.torchft import CompressedProcessGroup

STEPS = 3


def assert_equal_weights(first, second):
    """Bit for bit, after each step that both have taken; returns these steps."""
    common = sorted(set(first["weights"]) & set(second["weights"]))
    for step in common:
        for one, other in zip(first["weights"][step], second["weights"][step], strict=True):
            assert torch.equal(one, other), step
    return common


def assert_same_totals(first, second):
    assert first.keys() == second.keys() and first
    for name, owed in first.items():
        assert torch.allclose(owed, second[name], atol=1e-6), name


def trained(members, steps):
    """The reports of replicas that have taken so many steps together."""
    for member in members:
        member.ask("train", steps, len(members))
    for member in members:
        member.answer()
    return [reported(member) for member in members]


def reported(member):
    member.ask("report")
    return member.answer()


@pytest.mark.world
def test_replicas_train_die_and_join():
    with replicas("ddp", 2) as (start, members):
        reports = trained(members, STEPS)
        assert len(assert_equal_weights(*reports)) >= STEPS
        for report in reports:
            assert 0 < report["bytes_sent"] < report["bytes_uncompressed"] / 4
            assert report["residual_norm"] > 0 and report["steps"] >= STEPS

        # An error of the group ends no process: the step is discarded on both, with what it did to residuals.
        survivor, victim = members
        last = max(reports[0]["weights"])
        victim.ask("differ_at", last + 1, 3)
        victim.answer()
        before, reports = reports, trained(members, STEPS)
        assert last + STEPS in assert_equal_weights(*reports)
        for report, earlier in zip(reports, before, strict=True):
            assert len(report["quorums"]) > len(earlier["quorums"]) and report["quorums"][-1]["step"] == last + 1
            assert_same_totals(report["quorums"][-1]["after"], report["totals"][last + 1])

        # One is killed while the other waits for it in the middle of a step.
        last = max(reports[0]["weights"])
        victim.ask("die_at", last + 1, 3)
        victim.answer()
        victim.ask("train", STEPS, 2)
        survivor.ask("train", STEPS, 1)
        survivor.answer()
        victim.process.join()
        alone = reported(survivor)
        quorum = alone["quorums"][-1]
        assert quorum["world_size"] == 1 and quorum["step"] == last + 1
        assert_same_totals(quorum["after"], alone["totals"][last + 1])  # of the last step that was taken
        assert_same_totals(alone["totals"][max(alone["totals"])], quorum["after"])

        # Another one joins, and has the survivor's weights after its first step.
        joined = start()
        newcomer, report = trained([joined, survivor], STEPS)
        common = assert_equal_weights(newcomer, report)
        assert common == sorted(newcomer["weights"]) and len(common) >= STEPS
        quorum = report["quorums"][-1]
        assert quorum["world_size"] == 2 and quorum["step"] == common[0] - 1
        assert_same_totals(quorum["before"], alone["quorums"][-1]["after"])
        assert_same_totals(quorum["after"], quorum["before"])
        assert not newcomer["quorums"][-1]["after"]


@pytest.mark.world
@pytest.mark.parametrize(("kind", "options"), [("local_sgd", {"grid": weights_grid()}), ("diloco", {})])
def test_local_sgd_and_diloco(kind, options):
    with replicas(kind, 2, **options) as (_, members):
        first, second = trained(members, STEPS)
        assert len(assert_equal_weights(first, second)) >= STEPS
        most = 0.5 if kind == "local_sgd" else 0.25
        assert 0 < first["bytes_sent"] < most * first["bytes_uncompressed"]
        assert first["residual_norm"] > 0
        fragments = {name.partition(".")[0] for name in first["totals"][max(first["totals"])]}
        assert fragments == ({"0", "1"} if kind == "diloco" else {"0"})


def group(**options):
    return CompressedProcessGroup(torchft.ProcessGroupGloo(timeout=timedelta(seconds=30)), **options)


def configure(made, store, name, rank=0, world_size=1):
    made.configure(f"localhost:{store.port}/{name}", "replica", rank, world_size, 1, 0, 1, [rank])


def test_a_group_that_is_aborted_says_so_until_it_is_configured_anew():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    made, values = group(), torch.arange(3.0)
    configure(made, store, "first")
    assert made.size() == 1 and made.errored() is None
    work = made.allreduce([values], AllreduceOptions())
    assert work.wait() and work.is_completed() and torch.equal(work.get_future().wait(), torch.arange(3.0))
    with pytest.raises(ValueError, match="tensors must hold one tensor"):
        made.allreduce([values, values], ReduceOp.SUM)
    made.abort()
    assert "aborted" in str(made.errored())
    assert made.allreduce([values], AllreduceOptions()).wait()  # which does nothing
    configure(made, store, "second")
    assert made.errored() is None and made.allreduce([values], ReduceOp.AVG).wait()
    integers, largest = torch.arange(3), torch.arange(3.0)
    made.allreduce([integers], AllreduceOptions()).wait()  # by the group that it wraps
    made.allreduce([largest], ReduceOp.MAX).wait()
    assert torch.equal(integers, torch.arange(3)) and made.stats()["bytes_sent"] == 0
    made.shutdown()


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="pg must be a group of torchft's"):
        CompressedProcessGroup(None)
    with pytest.raises(ValueError, match="fragments must be 1 without step, got 2; pass step=lambda"):
        group(fragments=2)
    with pytest.raises(ValueError, match="fragments must be an int of at least 1, got 0"):
        group(fragments=0)
    with pytest.raises(TypeError, match="step must be a function"):
        group(step=3)
    for strategy in ("auto", "none", "hierarchical"):
        with pytest.raises(ValueError, match=r"strategy must be one of .* under torchft, got '" + strategy):
            group(strategy=strategy)
    with pytest.raises(ValueError, match="device_codec must be False"):
        group(device_codec=True)
    with pytest.raises(ValueError, match="step must be at most"):
        group(grid=qcomm.SigmaGrid(step=5.0))
    assert group(grid=qcomm.SigmaGrid(step=5.0), error_feedback=False).state_dict()["residuals"] == {}
    with pytest.raises(ValueError, match="link_rates must be None"):
        group(link_rates=[1, 2])
