"""Sealed messages between processes: the same results as without, nothing open on the wire, and who is kept out."""

import secrets
import shutil
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import check_works
from averager_model import averager, move, network
from ddp_model import AGREED, backward, error_of, exact_mean, mlp, wrap
from distributed import TIMEOUT, assert_same_on_all_ranks, die, gathered, sliced, world
from mpirun import environment, find_mpirun

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import CHANNELS, get_communicator
from qcomm.ddp import bypass
from qcomm.transport import GlooTransport
from qcomm.transport.sealed import Direction, SealedTransport

pytest.importorskip("cryptography", reason="cryptography is not installed")
pytestmark = pytest.mark.world

SUPPORT = Path(__file__).parents[1] / "support"
STRATEGIES = ("none", "bf16", "exact_sum", "all_gather", "hierarchical", "two_phase")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
UNPROVEN = "did not prove to have the same secret"


@pytest.fixture
def key(tmp_path):
    return write_key(tmp_path / "key")


@pytest.fixture
def other_key(tmp_path):
    return write_key(tmp_path / "other")


def write_key(path):
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


def values(rank, count, dtype=torch.float32):
    return torch.randn(count, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def nodes(strategy, world_size):
    return {"ranks_per_node": 2 if world_size % 2 == 0 else 1} if strategy == "hierarchical" else {}


@world(2, 3, 4)
def test_every_strategy_has_the_bits_that_it_has_without(rank, world_size, key):
    sealed, plain = dist.new_group(), dist.new_group()
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "min_elements": 0, **nodes(strategy, world_size)}
        for count in (0, 1, 33, 4097, 20_003):
            for dtype in DTYPES if count == 4097 else DTYPES[:1]:
                mine, theirs = values(rank, count, dtype), values(rank, count, dtype)
                with sliced(1000):
                    work = qcomm.all_reduce(mine, group=sealed, secret=key, async_op=True, **options)
                    work.wait()
                    qcomm.all_reduce(theirs, group=plain, **options)
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), (strategy, count, dtype)
                assert_same_on_all_ranks(mine)
    for group in (sealed, plain):
        dist.destroy_process_group(group)


@world(2)
def test_nothing_travels_open(rank, world_size, key):
    """Neither values nor headers: twelve equal bytes of either would not be there by chance."""
    group, sent, start = dist.new_group(), [], GlooTransport.start_send

    def record(transport, target, message, tag):
        sent.append(bytes(message.view(torch.uint8).tolist()))
        return start(transport, target, message, tag)

    tensor = torch.full((4000,), 1.25)
    with (
        mock.patch.object(GlooTransport, "start_send", record),
        mock.patch.object(GlooTransport, "sum", side_effect=AssertionError("this sum is open")),
    ):
        for strategy in STRATEGIES:
            qcomm.all_reduce(tensor, group=group, strategy=strategy, secret=key, **nodes(strategy, world_size))
    sealed = [message for message in sent if len(message) != 80]  # a greeting of each channel
    assert len(sent) - len(sealed) == CHANNELS and len(sealed) > len(STRATEGIES), [len(message) for message in sent]
    for message in sealed:
        for pattern in (torch.tensor([1.25, 1.25, 1.25]), torch.tensor([0.625, 0.625, 0.625])):
            assert bytes(pattern.view(torch.uint8).tolist()) not in message
        assert b"mmocq" not in message and bytes(12) not in message
    dist.destroy_process_group(group)


@world(2, 3)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_hook_has_the_bits_that_it_has_without(rank, world_size, key, strategy):
    groups = [dist.new_group(), dist.new_group()]
    options = {"strategy": strategy, "min_elements": 100, **nodes(strategy, world_size)}
    models = [wrap(process_group=group) for group in groups]
    state = qcomm.attach(models[0], secret=str(key), verify="step", **options)
    qcomm.attach(models[1], **options)
    assert isinstance(get_communicator(groups[0], state.options.connection_options)._transport, SealedTransport)
    for step in range(4):
        mine, theirs = (backward(model, rank, step) for model in models)
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True)), step
    assert_same_on_all_ranks(*mine)
    for group in groups:
        dist.destroy_process_group(group)


@world(2)
@pytest.mark.parametrize("strategy", ["none", "auto"])
def test_no_step_bypasses_the_sealed_messages(rank, world_size, key, strategy):
    group = dist.new_group()
    model = wrap(process_group=group)
    state = qcomm.attach(model, strategy=strategy, secret=key)
    for step in range(AGREED + 5):
        backward(model, rank, step)
    with mock.patch.object(bypass.Bypass, "reduce", side_effect=AssertionError("this sum is open")):
        found = backward(model, rank, 7)
    assert state.reducer.bypass.bypassing(0) == (0, {})
    if strategy == "none":
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, exact_mean(rank, world_size, 7), strict=True))
    assert_same_on_all_ranks(*found)
    dist.destroy_process_group(group)


@world(2)
def test_a_hook_that_is_registered_by_hand_connects_at_the_first_bucket(rank, world_size, key):
    group = dist.new_group()
    model = wrap(process_group=group)
    state = qcomm.CompressionState(group, strategy="two_phase", secret=key)
    model.register_comm_hook(state, qcomm.compression_hook)
    backward(model, rank)
    assert isinstance(get_communicator(group, state.options.connection_options)._transport, SealedTransport)
    dist.destroy_process_group(group)


@world(2)
def test_weights_are_averaged_and_broadcast(rank, world_size, key):
    results = []
    for secret in (None, key):
        group, model = dist.new_group(), network()
        average = averager(process_group=group, secret=secret)
        move(model, rank, 0)
        qcomm.broadcast_parameters(model, process_group=group, secret=secret)
        for step in range(3):
            move(model, rank, step)
            average.average_parameters(model.parameters())
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        dist.destroy_process_group(group)
    assert torch.equal(*results)


@world(2)
def test_ddp_starts_without_an_open_weight(rank, world_size, key):
    """The recipe of docs/secure.md: DDP does not broadcast, ``broadcast_parameters`` does."""
    group = dist.new_group()
    module = mlp()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(rank)
    with mock.patch.object(dist, "_broadcast_coalesced", side_effect=AssertionError("these weights are open")):
        with pytest.raises(AssertionError, match="these weights are open"):
            wrap(process_group=group)
        qcomm.broadcast_parameters(module, process_group=group, lossless=True, secret=key)
        model = wrap(module, process_group=group, init_sync=False, broadcast_buffers=False)
        qcomm.attach(model, strategy="two_phase", secret=key)
        backward(model, rank)
    assert_same_on_all_ranks(*model.parameters(), *[parameter.grad for parameter in model.parameters()])
    dist.destroy_process_group(group)


@world(3)
@pytest.mark.parametrize("stranger", [0, 2])
def test_a_rank_with_another_secret_is_kept_out_and_named(rank, world_size, key, other_key, stranger):
    group, secret = dist.new_group(), other_key if rank == stranger else key
    with pytest.raises(qcomm.CollectiveError, match=UNPROVEN) as caught:
        qcomm.attach(wrap(process_group=group), strategy="two_phase", secret=secret)
    named = [stranger] if rank != stranger else [other for other in range(world_size) if other != rank]
    assert f"rank {rank}: rank(s) {', '.join(map(str, named))} {UNPROVEN}" in str(caught.value)
    assert str(secret.read_text()) not in str(caught.value)
    # With the right one they meet on the same group.
    qcomm.attach(wrap(process_group=group), strategy="two_phase", secret=key)
    tensor = values(rank, 5000)
    qcomm.all_reduce(tensor, group=group, strategy="two_phase", secret=key)
    assert_same_on_all_ranks(tensor)
    dist.destroy_process_group(group)


@world(3)
@pytest.mark.parametrize("without", [(0,), (2,), (0, 1)], ids=str)
def test_ranks_of_which_only_some_have_a_secret(rank, world_size, key, without):
    group, secret = dist.new_group(), None if rank in without else key
    with pytest.raises(qcomm.ConfigMismatchError, match="differently in secret: rank") as caught:
        qcomm.attach(wrap(process_group=group), strategy="two_phase", secret=secret)
    others = [other for other in range(world_size) if (other in without) != (rank in without)]
    assert f"rank(s) {', '.join(map(str, others))} have" in str(caught.value)
    dist.destroy_process_group(group)


@world(3, seconds=60)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("call", ["all_reduce", "broadcast_parameters"])
def test_a_rank_that_cannot_read_the_key_file(rank, world_size, key, tmp_path, first, call):
    """It gets its own error, and the others get one long before the timeout."""
    group = dist.new_group(timeout=timedelta(minutes=30))
    if not first:
        qcomm.all_reduce(values(rank, 5000), group=group, secret=key)
    secret, kind = (tmp_path / "nowhere", OSError) if rank == 1 else (key, qcomm.CollectiveError)
    if call == "all_reduce":
        act = partial(qcomm.all_reduce, values(rank, 5000), group=group)
    else:
        act = partial(qcomm.broadcast_parameters, mlp(), process_group=group)
    with pytest.raises((kind, qcomm.ConfigMismatchError)) as caught:
        act(secret=secret)
    assert rank == 1 or ("rank(s) 1 have none" if first else "rank 1 failed") in str(caught.value), caught.value
    dist.destroy_process_group(group)


@world(4, seconds=60)
@pytest.mark.parametrize("strategy", ["none", "all_gather", "two_phase"])
def test_a_rank_without_memory_to_seal_blames_nobody_else(rank, world_size, key, strategy):
    """The others hear of it at once, and name it alone."""
    group = dist.new_group(timeout=timedelta(minutes=30))
    qcomm.all_reduce(values(rank, 5000), group=group, secret=key, strategy=strategy)
    empty = mock.patch.object(torch, "empty", side_effect=RuntimeError("no memory"))
    starve = mock.patch.object(Direction, "seal", seal_without_memory(Direction.seal, empty))
    with starve if rank == 1 else nullcontext(), pytest.raises((MemoryError, qcomm.CollectiveError)) as caught:
        qcomm.all_reduce(values(rank, 5000), group=group, secret=key, strategy=strategy)
    if rank == 1:
        assert isinstance(caught.value, MemoryError) and "no memory for a message" in str(caught.value)
    else:
        assert "no answer from rank(s) 1 (" in str(caught.value), caught.value
    dist.destroy_process_group(group)


def seal_without_memory(seal, empty):
    """Direction.seal, for which torch finds no memory."""

    def starving(direction, message, tag):
        with empty:
            return seal(direction, message, tag)

    return starving


@world(2)
def test_all_uses_of_a_group_have_its_secret(rank, world_size, key, other_key):
    group, plain = dist.new_group(), dist.new_group()
    qcomm.all_reduce(values(rank, 5000), group=group, strategy="two_phase", secret=key)
    check_works(rank, world_size, plain)
    model = wrap(process_group=group)
    for secret, where in ((None, group), (other_key, group), (key, plain)):
        with pytest.raises(ValueError, match="secret must be the same for all uses of a group, got"):
            qcomm.all_reduce(values(rank, 5000), group=where, strategy="two_phase", secret=secret)
        with pytest.raises(qcomm.CollectiveError, match="secret must be the same"):
            qcomm.broadcast_parameters(mlp(), process_group=where, secret=secret)
        with pytest.raises(qcomm.CollectiveError, match="secret must be the same"):
            averager(process_group=where, secret=secret).average_parameters(mlp().parameters())
    # One rank alone forgets it, and tells the others.
    given, told = None if rank == 1 else key, "rank 1 failed while preparing the exchange: ValueError: secret must be"
    kind, text = (ValueError, "secret must be the same") if rank == 1 else (qcomm.CollectiveError, told)
    with pytest.raises(kind, match=text):
        qcomm.all_reduce(values(rank, 5000), group=group, strategy="two_phase", secret=given)
    with pytest.raises(qcomm.CollectiveError, match=told):
        averager(process_group=group, secret=given).average_parameters(mlp().parameters())
    with pytest.raises(ValueError, match="secret must be the same"):
        qcomm.attach(model, strategy="none")
    state = qcomm.attach(model, strategy="none", secret=key)
    backward(model, rank)
    state.reconfigure(secret=None)
    for _ in range(2):
        assert "secret must be the same for all uses of a group, got none" in str(error_of(model, rank))
    state.reconfigure(secret=key)
    backward(model, rank)
    for ended in (group, plain):
        dist.destroy_process_group(ended)


@world(3)
def test_faults_are_told_through_sealed_messages(rank, world_size, key):
    group = dist.new_group()

    def attempt(**options):
        try:
            given = {"strategy": "two_phase", "secret": key, **options}
            qcomm.all_reduce(values(rank, 5000), group=group, **given)
        except (qcomm.CollectiveError, qcomm.ConfigMismatchError, FileNotFoundError) as error:
            return error
        return None

    for name, phase in (("encode", "compressing its values"), ("reduce", "averaging its chunk")):
        boom = mock.patch.object(MeanSteps, name, side_effect=ZeroDivisionError("boom"))
        with boom if rank == 1 else nullcontext():
            assert f"rank 1 failed while {phase}: ZeroDivisionError: boom" in str(attempt())
        assert attempt() is None
    assert "min_elements: 10 on ranks 0 2, 11 on rank 1" in str(attempt(min_elements=10 + rank % 2))
    # A key file is read at each call.
    error = attempt(secret=key.with_name("none") if rank == 1 else key)
    assert isinstance(error, FileNotFoundError if rank == 1 else qcomm.CollectiveError), error
    assert rank == 1 or "rank 1 failed while preparing the exchange: FileNotFoundError" in str(error)
    assert attempt() is None
    dist.destroy_process_group(group)


@world(2)
def test_connections_made_again_have_new_keys(rank, world_size, key):
    """The first proof, one zero byte at one place, is never the same twice."""
    proofs, start = [], GlooTransport.start_send

    def record(transport, target, message, tag):
        proofs.append(bytes(message.view(torch.uint8).tolist()))
        return start(transport, target, message, tag)

    for _ in range(3):
        group = dist.new_group()
        with mock.patch.object(GlooTransport, "start_send", record):
            qcomm.all_reduce(values(rank, 2000), group=group, strategy="two_phase", secret=key)
        dist.destroy_process_group(group)
    sealed = [message for message in proofs if len(message) == 25]
    everywhere = [proof for of_rank in gathered(tuple(sealed)) for proof in of_rank]
    assert len(everywhere) == len(set(everywhere)) == 2 * 3 * CHANNELS


@world(3, alone=True, timeout=TIMEOUT, seconds=30)
@pytest.mark.parametrize(
    ("strategy", "phase"),
    [
        ("two_phase", "waiting for slice"),
        ("all_gather", "exchanging packets after compressing its values"),
        ("none", "summing values"),
    ],
)
def test_an_altered_message_ends_the_collective_on_all_ranks_at_once(rank, world_size, key, strategy, phase):
    """Long before the timeout. The rank that gets it names the sender and the phase."""

    def attempt():
        try:
            qcomm.all_reduce(values(rank, 50_000), strategy=strategy, secret=key)
        except qcomm.CollectiveError as error:
            return str(error)
        return ""

    def open_altered(direction, sealed, *arguments):
        if len(sealed) > 1000:  # longer than headers
            sealed[500] ^= 4
        return opens(direction, sealed, *arguments)

    assert attempt() == ""
    opens = Direction.open
    with mock.patch.object(Direction, "open", open_altered) if rank == 0 else nullcontext():
        error = attempt()
    if rank == 0:
        assert error.startswith(f"rank 0, {phase}") and "is not the one that was sealed for this place" in error, error
    else:  # who has all packets of the only exchange hears of it in the next collective
        error = error or (attempt() if strategy == "all_gather" else "")
        assert "no answer from rank(s)" in error, error
    assert "an earlier collective left this group without connections" in attempt()


@world(3, alone=True, dying=(1,), timeout=timedelta(seconds=20))
def test_a_rank_that_dies_is_named_and_no_other(rank, world_size, key):
    def attempt():
        qcomm.all_reduce(values(rank, 50_000), strategy="two_phase", secret=key)

    attempt()
    if rank == 1:
        with mock.patch.object(MeanSteps, "reduce", side_effect=die):
            attempt()
    with pytest.raises(qcomm.CollectiveError, match=r"no answer from rank\(s\) 1 "):
        attempt()


def test_over_mpi(key):
    cases = str(SUPPORT / "mpi_cases.py")
    ended = find_mpirun()(3, cases, "sealed", cwd=key.parent, PYTHONPATH=f"{environment()['PYTHONPATH']}:{SUPPORT}")
    assert ended.returncode == 0, ended.stdout + ended.stderr


# Two ranks that average until a bit is flipped. Arguments: rank, store, key, file that arms the flipping.
VICTIM = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import qcomm

rank, (store, key, armed, strategy) = int(sys.argv[1]), sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
for step in range(30):
    if step == 3 and rank == 1:
        Path(armed).touch()
    tensor = torch.full((300_000,), 1.0 + rank)
    tensor[::2] += 1e-3 * torch.arange(150_000)
    try:
        qcomm.all_reduce(tensor, strategy=strategy, secret=key)
    except qcomm.CollectiveError as error:
        print(step, error)
        sys.exit(7)
print("never")
"""


@pytest.mark.parametrize("strategy", ["none", "two_phase"])
def test_bits_that_are_flipped_in_tcp(tmp_path, key, strategy):
    """In the kernel's answers to gloo, on rank 1, once in a block that is longer than gloo's own headers."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and LD_PRELOAD")
    library, armed = tmp_path / "flip.so", tmp_path / "armed"
    source = SUPPORT / "flip_bits.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", VICTIM, str(rank), tmp_path / "store", key, armed, strategy]
        flips = {"LD_PRELOAD": str(library), "FLIP_WHEN": str(armed)} if rank == 1 else {}
        ranks.append(
            subprocess.Popen(
                command, env=environment(**flips), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    (out, log), (out_1, log_1) = (rank.communicate(timeout=100) for rank in ranks)
    assert "flipped a bit" in log_1, (log, log_1)
    assert [rank.returncode for rank in ranks] == [7, 7], (out, log, out_1, log_1)
    assert "the message of rank(s) 0 is not the one that was sealed for this place" in out_1
    assert "rank 1, " in out_1 and ("waiting for slice" in out_1 or "summing values" in out_1)
    assert "no answer from rank(s) 1" in out
