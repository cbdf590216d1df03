"""A partition that fails, dies, lies or falls silent is an error on all, soon, that names it."""

import secrets
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
from distributed import die, world
from partition_models import batches, optimizer, same, stage, trained

import qcomm
from qcomm import CollectiveError, PartitionPipeline
from qcomm.partitions import line as line_module
from qcomm.partitions import links, messages
from qcomm.partitions.messages import Kind, control

pytestmark = pytest.mark.world

_silent: list[PartitionPipeline] = []


def pipeline(rank, partitions, **options):
    own = stage(rank)
    return PartitionPipeline(own, optimizer(own), partitions, **options)


def error_of(line, data=None):
    with pytest.raises(CollectiveError) as caught:
        line.run_epoch((batches(6) if data is None else data) if line.is_first else None)
    with pytest.raises(CollectiveError, match="an earlier failure left this pipeline without connections"):
        line.run_epoch(batches(1) if line.is_first else None)
    return caught.value


@contextmanager
def failing_after(count, error):
    """Makes the losses of this rank raise after ``count`` batches."""
    whole, calls = torch.nn.functional.cross_entropy, []

    def fails(*arguments, **options):
        calls.append(None)
        if len(calls) > count:
            raise error
        return whole(*arguments, **options)

    with mock.patch("torch.nn.functional.cross_entropy", fails):
        yield


@world(3)
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_partition_that_fails_is_named_on_all(rank, world_size, failing, after):
    line = pipeline(rank, 3, queue_batches=1)
    with failing_after(after, ZeroDivisionError("boom")) if rank == failing else nullcontext():
        error = error_of(line)
    assert f"partition {failing}" in str(error) and "ZeroDivisionError: boom" in str(error), error
    assert f"rank {failing}" in str(error) or f"rank(s) {failing}" in str(error), error
    assert (rank == failing) == isinstance(error.__cause__, ZeroDivisionError)


@world(3)
def test_data_that_cannot_be_read_is_an_error_on_all(rank, world_size):
    def data():
        yield from batches(2)
        raise OSError("no such file: train.bin")

    assert "no such file: train.bin" in str(error_of(pipeline(rank, 3), data()))


@world(3)
def test_data_in_the_wrong_partition_is_an_error_on_all(rank, world_size):
    line = pipeline(rank, 3)
    with pytest.raises(CollectiveError, match="batches must be None in partition 1"):
        line.run_epoch(batches(2) if rank in (0, 1) else None)


@world(3)
def test_a_batch_above_the_limit_is_an_error_on_all(rank, world_size):
    """The first partition may send it, the second may not take it."""
    line = pipeline(rank, 3, max_batch_bytes=1000 if rank == 1 else 1 << 20, grid=None)
    error = error_of(line)
    assert "from rank 0: a batch claims 1728 bytes, above max_batch_bytes=1000" in str(error), error


@world(3)
@pytest.mark.parametrize("part", ["header", "payload"])
def test_a_damaged_message_is_an_error_on_all(rank, world_size, part):
    def damaged(*arguments):
        header, payload = messages.encoded(*arguments)
        (header if part == "header" else payload)[20] ^= 1
        return header, payload

    line = pipeline(rank, 3)
    with mock.patch.object(line_module, "encoded", damaged) if rank == 0 else nullcontext():
        error = error_of(line)
    what = "a header was damaged" if part == "header" else "a batch was damaged"
    assert f"from rank 0: {what}" in str(error), error


@world(3)
def test_a_credit_that_lies_is_an_error_on_all(rank, world_size):
    def lying(kind, epoch, number):
        return control(kind, epoch, number + 1 if kind == Kind.CREDIT else number)

    line = pipeline(rank, 3, queue_batches=1)
    with mock.patch.object(links, "control", lying) if rank == 2 else nullcontext():
        error = error_of(line)
    assert "from rank 2: a header starts with" in str(error), error


def die_at_once(*_, **__):
    die()


@world(4, alone=True, dying=(2,))
def test_a_partition_that_dies_is_named_on_all(rank, world_size):
    line = pipeline(rank, 4)
    with mock.patch("torch.nn.functional.cross_entropy", side_effect=die_at_once) if rank == 2 else nullcontext():
        assert "rank(s) 2 " in str(error_of(line))


@world(3, alone=True, timeout=timedelta(seconds=3))
def test_a_partition_that_falls_silent_is_an_error_within_the_timeout(rank, world_size):
    line = pipeline(rank, 3)
    if rank == 1:
        _silent.append(line)  # it never takes part in the epoch; process and connections live
        return
    assert "rank(s) 1" in str(error_of(line))


@world(2)
def test_an_interrupt_ends_the_epoch_on_all(rank, world_size):
    line = pipeline(rank, 2)
    error = KeyboardInterrupt if rank == 1 else CollectiveError
    with failing_after(2, KeyboardInterrupt()) if rank == 1 else nullcontext(), pytest.raises(error) as caught:
        line.run_epoch(batches(9) if line.is_first else None)
    assert rank == 1 or "KeyboardInterrupt" in str(caught.value)


@world(2)
def test_a_closed_pipeline_is_an_error_on_the_other(rank, world_size):
    line = pipeline(rank, 2)
    if rank == 1:
        line.close()
        with pytest.raises(CollectiveError, match="it was closed"):
            line.run_epoch()
    else:
        assert "rank(s) 1" in str(error_of(line))


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


@world(2)
def test_sealed_messages(rank, world_size, key):
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    own = stage(rank)
    line = PartitionPipeline(own, optimizer(own), 2, secret=key)
    line.run_epoch(batches(3) if line.is_first else None)
    line.close()
    assert same(own.state_dict(), trained(2, [batches(3)], qcomm.RangeGrid(num_bits=6))[rank])
