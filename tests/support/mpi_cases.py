"""The ranks of test_mpi.py, under mpirun: ``python mpi_cases.py CASE ...``. A case fails by raising."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from mpi4py import MPI
from strategy_twins import TWINS

import qcomm
from qcomm.collectives import two_phase
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import pipeline
from qcomm.communicator.pipeline import Pipeline
from qcomm.transport import mpi as mpi_transport
from qcomm.transport.base import MESSAGE_BYTES, TransportError

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def values(count, dtype=torch.float32, seed=RANK):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@contextmanager
def sliced(elements):
    with mock.patch.object(two_phase, "SLICE_ELEMENTS", elements):
        yield


def error_of(group, count=5000, **options):
    try:
        qcomm.all_reduce(values(count), group=group, **{"strategy": "two_phase", **options})
    except (qcomm.CollectiveError, qcomm.ConfigMismatchError, MemoryError) as error:
        return error
    return None


def everywhere(value):
    return WORLD.allgather(value)


def same_as_gloo():
    """Every strategy, dtype and awkward size: the bits of the same call over gloo."""
    import torch.distributed as dist

    qcomm.init_from_environment(timeout=timedelta(seconds=60))
    group = qcomm.MpiGroup(timeout=timedelta(seconds=60))
    assert (group.rank, group.size) == (RANK, SIZE)
    for strategy in [*TWINS, "none", "bf16"]:
        options = {"ranks_per_node": 2 if SIZE % 2 == 0 else 1} if strategy == "hierarchical" else {}
        for count in (0, 1, 33, 4097, 20_003):
            for dtype in DTYPES if count == 4097 else DTYPES[:1]:
                over_mpi, over_gloo = values(count, dtype), values(count, dtype)
                stats = []
                for tensor, over in ((over_mpi, group), (over_gloo, None)):
                    with sliced(1000):
                        work = qcomm.all_reduce(
                            tensor, group=over, strategy=strategy, min_elements=0, async_op=True, **options
                        )
                        work.wait()
                    stats.append(work.stats())
                assert torch.equal(over_mpi.view(torch.uint8), over_gloo.view(torch.uint8)), (strategy, count, dtype)
                for name in ("bytes_sent", "bytes_received", "bits_per_element"):
                    assert stats[0][name] == stats[1][name], (strategy, name)
    # Segments of several MiB, as gloo cuts them.
    over_mpi, over_gloo = values(1_200_001), values(1_200_001)
    qcomm.all_reduce(over_mpi, group=group, strategy="none")
    qcomm.all_reduce(over_gloo, strategy="none")
    assert torch.equal(over_mpi, over_gloo)
    # Messages larger than MPI can count, in pieces, also where a piece ends with the message.
    # Receives are posted ahead for messages of one piece, so the packets are tails here.
    with (
        mock.patch.object(mpi_transport, "PIECE_BYTES", 256),
        mock.patch.object(pipeline, "ROOM", 100),
        qcomm.MpiGroup() as pieces,
    ):
        over_mpi, over_gloo = values(10_240), values(10_240)
        for strategy in ("none", "two_phase"):
            qcomm.all_reduce(over_mpi, group=pieces, strategy=strategy)
            qcomm.all_reduce(over_gloo, strategy=strategy)
            assert torch.equal(over_mpi, over_gloo), strategy
    # Messages are MPI's own, so there is nothing to measure.
    over_mpi, over_gloo = values(4097), values(4097)
    qcomm.all_reduce(over_mpi, group=group, strategy="two_phase", connections="auto")
    qcomm.all_reduce(over_gloo, strategy="two_phase")
    assert torch.equal(over_mpi, over_gloo)
    train_same(dist, group)
    group.close()
    dist.destroy_process_group()


def sealed():
    """With the secret in the file "key": the bits of open messages; a rank without it, or with another, is kept out."""
    if RANK == 0:
        Path("other").touch(mode=0o600)
        Path("other").write_text("0123456789abcdef" * 4)
    WORLD.Barrier()
    timeout = timedelta(seconds=60)
    with qcomm.MpiGroup(timeout=timeout) as closed, qcomm.MpiGroup(timeout=timeout) as plain:
        for strategy in (*TWINS, "none", "bf16"):
            options = {"ranks_per_node": 1} if strategy == "hierarchical" else {}
            mine, theirs = values(20_003), values(20_003)
            with sliced(1000):
                qcomm.all_reduce(mine, group=closed, strategy=strategy, secret="key", **options)
                qcomm.all_reduce(theirs, group=plain, strategy=strategy, **options)
            assert torch.equal(mine, theirs), strategy
        error = error_of(closed, min_elements=10 + RANK % 2, secret="key")
        assert "min_elements: 10 on ranks 0 2, 11 on rank 1" in str(error), error
    for secret, text in ((None, "differently in secret"), ("other", "did not prove to have the same secret")):
        with qcomm.MpiGroup(timeout=timeout) as group:
            error = error_of(group, secret=secret if RANK == 1 else "key")
            assert text in str(error), error


def train_same(dist, group):
    """DDP with gradients over MPI: the weights of one with gradients over gloo."""
    weights = []
    for over in (group, None):
        torch.manual_seed(1)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()))
        state = qcomm.attach(model, process_group=over, strategy="two_phase", min_elements=100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(values(640, seed=100 * step + RANK).view(10, 64)).square().mean().backward()
            optimizer.step()
        assert state.stats()["bytes_sent_phase1"] > 0
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)
    other = qcomm.MpiGroup(WORLD.Split(0, SIZE - RANK))  # ranks in another order
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    message = error_text(lambda: qcomm.attach(model, process_group=other))
    middle = 2 * RANK == SIZE - 1
    assert middle or "process_group must have the model's ranks: this is its rank" in message, message
    other.close()


def alone():
    """Without torch.distributed; groups of parts of the world, closed, made again, deleted."""
    assert not torch.distributed.is_initialized()
    mean = torch.stack([values(3000, seed=seed) for seed in range(SIZE)]).mean(0)
    bound = 0.5 * (sum(float(values(3000, seed=seed).square().mean().sqrt()) for seed in range(SIZE)) / SIZE + 1.1)
    before = threading.active_count()
    for _ in range(3):
        with qcomm.MpiGroup() as group:
            for strategy in ("two_phase", "auto"):
                tensor = values(3000)
                qcomm.all_reduce(tensor, group=group, strategy=strategy)
                assert float((tensor - mean).abs().max()) <= bound
                assert all(torch.equal(tensor, other) for other in everywhere(tensor))
            assert threading.active_count() == before + 1
        assert threading.active_count() == before and group._transport._comm == MPI.COMM_NULL
        message = error_text(lambda group=group: qcomm.all_reduce(values(3000), group=group))
        assert "group is closed" in message, message
    group = qcomm.MpiGroup()
    child = multiprocessing.get_context("fork").Process(target=threading.active_count)
    child.start()
    child.join()
    assert child.exitcode == 0
    check_works(group)
    group.close()
    half = WORLD.Split(RANK % 2, RANK)
    group = qcomm.MpiGroup(half)
    assert (group.rank, group.size) == (RANK // 2, (SIZE + 1 - RANK % 2) // 2)
    tensor = torch.full((3000,), float(RANK))
    qcomm.all_reduce(tensor, group=group, strategy="two_phase")
    members = range(RANK % 2, SIZE, 2)
    assert torch.allclose(tensor, torch.full((3000,), sum(members) / len(members)))
    assert group._transport.ranks == tuple(members)  # as the world knows them
    del group
    message = error_text(lambda: qcomm.all_reduce(tensor, group=WORLD))
    assert "qcomm.MpiGroup(comm)" in message, message
    message = error_text(lambda: qcomm.all_reduce(tensor))
    assert "torch.distributed is not initialised" in message, message


def error_text(call):
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def check_works(group):
    tensor = values(5000)
    qcomm.all_reduce(tensor, group=group, strategy="two_phase")
    assert tensor.isfinite().all() and all(torch.equal(tensor, other) for other in everywhere(tensor))


def faults():
    """One rank's fault is every rank's error; what cannot be announced ends the group at once, and no other group."""
    group = qcomm.MpiGroup(timeout=timedelta(seconds=60))
    boom = ZeroDivisionError("boom")
    for name, phase in (("encode", "compressing its values"), ("reduce", "averaging its chunk")):
        with mock.patch.object(MeanSteps, name, side_effect=boom) if RANK == 1 else nullcontext():
            error = error_of(group)
        assert f"rank 1 failed while {phase}: ZeroDivisionError: boom" in str(error), error
        check_works(group)
    error = error_of(group, min_elements=RANK)
    assert isinstance(error, qcomm.ConfigMismatchError) and "min_elements: 0 on rank 0, 1 on rank 1" in str(error)
    check_works(group)
    # A failure where none is expected: the others hear of it by a farewell, long before the timeout.
    send = Pipeline.send

    def out_of_memory(self, exchange, *arguments):
        if exchange == 2:
            raise MemoryError("no memory")
        send(self, exchange, *arguments)

    other = qcomm.MpiGroup(timeout=timedelta(hours=1))
    with mock.patch.object(Pipeline, "send", out_of_memory) if RANK == 1 else nullcontext(), sliced(1000):
        error = error_of(other, 50_000)
    assert isinstance(error, MemoryError) if RANK == 1 else "no answer from rank(s) 1" in str(error), error
    assert "left this group without connections" in str(error_of(other))
    other.close()
    # The same in the ring of an uncompressed mean, and with messages that MPI hands over only when the receiver asks.
    other = qcomm.MpiGroup(timeout=timedelta(hours=1))
    with mock.patch("qcomm.transport.mpi.ring_sum", side_effect=MemoryError) if RANK == 1 else nullcontext():
        error = error_of(other, 1_000_000, strategy="none")
    assert isinstance(error, MemoryError if RANK == 1 else TransportError), error
    # A rank that leaves because another did is not blamed by its neighbor in the ring.
    assert RANK == 1 or "no answer from rank(s) 1 (" in str(error), error
    other.close()
    # A message that is larger than the receiver can know.
    other = qcomm.MpiGroup(timeout=timedelta(hours=1))
    message = Pipeline._message

    def too_long(self, *arguments):
        return torch.cat([message(self, *arguments), torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)])

    with mock.patch.object(Pipeline, "_message", too_long) if RANK == 1 else nullcontext():
        error = error_of(other)
    assert isinstance(error, TransportError), error
    other.close()
    check_works(group)


def silent():
    """A rank that does not come is an error after the timeout, in a collective and in making a group."""
    group = qcomm.MpiGroup(timeout=timedelta(seconds=60))
    check_works(group)
    group.transport.timeout = timedelta(seconds=3)
    if RANK == 1:
        gate, encode = threading.Event(), MeanSteps.encode

        def late(self, number):
            assert gate.wait(60)
            return encode(self, number)

        with mock.patch.object(MeanSteps, "encode", late):
            work = qcomm.all_reduce(values(5000), group=group, strategy="two_phase", async_op=True)
            WORLD.Barrier()
            gate.set()
            message = error_text(lambda: work.wait(60))
        assert "no answer from rank(s)" in message, message
    else:
        error = error_of(group)
        assert isinstance(error, TransportError) and "silent for 3 s" in str(error) and " 1" in str(error), error
        WORLD.Barrier()
    group.close()
    if RANK != 1:
        message = error_text(lambda: qcomm.MpiGroup(timeout=timedelta(seconds=1)))
        assert "some other rank did not within 1 s" in message, message
    print(f"rank {RANK} is well", flush=True)
    # A duplicate that one rank never asked for is under way for ever, so MPI cannot be finalized.
    WORLD.Barrier()
    os._exit(0)


def leaves():
    """A rank that ends with an exception: nobody waits for the timeout, and the job has failed."""
    group = qcomm.MpiGroup(timeout=timedelta(hours=1))
    check_works(group)
    if RANK == 1:
        raise ValueError("rank 1 has had enough")
    error = error_of(group)
    assert isinstance(error, TransportError) and "no answer from rank(s) 1" in str(error), error
    print(f"rank {RANK} is well", flush=True)


def killed():
    """Under mpirun a rank that dies ends the job."""
    group = qcomm.MpiGroup(timeout=timedelta(hours=1))
    check_works(group)
    if RANK == 1:
        with mock.patch.object(MeanSteps, "reduce", side_effect=lambda *_: os.kill(os.getpid(), 9)):
            error_of(group)
    error_of(group)
    raise AssertionError("a collective without rank 1 has ended")


def stopped():
    """A rank that is stopped, as by a debugger: the others get an error, handle it, and end the job."""
    group = qcomm.MpiGroup(timeout=timedelta(seconds=60))
    check_works(group)
    Path(f"rank-{RANK}").write_text(str(os.getpid()))
    group.transport.timeout = timedelta(seconds=3)
    if RANK == 1:

        def stop(*_):
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # this thread may run a little longer than the others

        with mock.patch.object(MeanSteps, "reduce", side_effect=stop):
            error_of(group)
        raise AssertionError("a stopped rank went on")
    error = error_of(group)
    assert isinstance(error, TransportError) and " 1" in str(error), error
    print(f"rank {RANK} is well", flush=True)
    group.close()


def late():
    """A rank that comes after the others' timeout, and leaves: nobody ends the job."""
    group = qcomm.MpiGroup(timeout=timedelta(seconds=60))
    check_works(group)
    group.transport.timeout = timedelta(seconds=1)
    if RANK == 1:
        WORLD.Barrier()
    error = error_of(group)
    assert isinstance(error, TransportError), error
    if RANK != 1:
        WORLD.Barrier()
    group.close()
    print(f"rank {RANK} is well", flush=True)


def alone_in_the_world():
    """One process; and what an MpiGroup refuses."""
    with qcomm.MpiGroup() as group:
        assert repr(group) == "MpiGroup(rank 0 of 1)"
        for strategy in ("two_phase", "none", "auto"):
            tensor = values(3000)
            qcomm.all_reduce(tensor, group=group, strategy=strategy)
            assert strategy == "two_phase" or torch.equal(tensor, values(3000))
    assert repr(group) == "MpiGroup(rank 0 of 1, closed)"
    for arguments, text in (
        (("world",), "comm must be an mpi4py.MPI.Intracomm, got str"),
        ((MPI.Intracomm(),), "comm must not be MPI.COMM_NULL"),
        ((None, 30.0), "timeout must be a datetime.timedelta, got float"),
        ((None, timedelta(0)), "timeout must be positive, got 0:00:00"),
    ):
        message = error_text(lambda arguments=arguments: qcomm.MpiGroup(*arguments))
        assert text in message, message
    left = qcomm.MpiGroup()
    MPI.Finalize()  # with a group that nobody closed
    assert "import mpi4py.MPI before qcomm.init_from_environment" in error_text(qcomm.MpiGroup)
    left.close()


def abort_job(kind, error, frames):
    """Ends all ranks: the others may be waiting for this one in calls of MPI's own, which have no timeout."""
    traceback.print_exception(kind, error, frames)
    WORLD.Abort(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        sys.excepthook = sys.__excepthook__ if name == "leaves" else abort_job
        globals()[name]()
