"""Worlds of gloo processes that tests share: one world of each size runs all tests.

``@world(3)`` above a test makes its body run on all ranks of a world at once, in the default process group. A test that
compares the ranks' results calls ``run`` with a case instead: a top-level function ``case(rank, world_size, *args)``
that fails by raising.
"""

import atexit
import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from unittest import mock

import late_device
import pytest
import torch
import torch.distributed as dist

import qcomm
from qcomm.collectives import two_phase
from qcomm.communicator.groups import CHANNELS, _places, get_communicator

TIMEOUT = timedelta(seconds=60)  # of the default process group: most that a rank waits for another
CASE_SECONDS = 120.0


# What a rank imports: torch, and what DDP imports when it is first used.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "pytest", "hypothesis", "qcomm"]


@functools.cache
def _fork_server(number):
    """A process that has imported torch, of which ranks are forked: the imports are most of a launch.

    There are two, for even and for odd ranks: strings have other hashes in each, so that neighbours iterate over a set
    in different orders, as processes that a launcher starts do.
    """
    server = forkserver.ForkServer()
    server.set_forkserver_preload(PRELOADED)
    server.ensure_running()  # without waiting: both import at the same time
    return server


def _serve(rank, world_size, folder, timeout, device, connection):
    torch.set_num_threads(1)
    if device is not None:
        late_device.load(device)
    connection.recv()  # all ranks are there, so that none spends its timeout while another still imports
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout
    )
    while (message := connection.recv()) is not None:
        case, args = pickle.loads(message)
        torch.manual_seed(rank)
        before = set(dist.distributed_c10d._world.pg_map)
        try:
            result = case(rank, world_size, *args)
        except BaseException:  # noqa: BLE001 - an assertion of pytest's, or whatever: it belongs to the parent
            connection.send((False, traceback.format_exc()))
        else:
            if device is None:  # late_device keeps a group for all cases
                _end_groups_since(before)
            connection.send((True, result))
    dist.destroy_process_group()


def _end_groups_since(before):
    """Destroys the groups that a case has made and left: each has a thread of gloo's that wakes 100 times a second."""
    if dist.group.WORLD not in before:  # the case has ended torch.distributed, and perhaps begun it anew
        return
    groups = dist.distributed_c10d._world.pg_map
    # torch keeps the groups of a device mesh for the next mesh that equals it.
    left = [group for group in groups if group not in before and not group.group_desc.startswith("mesh")]
    for group in left:
        dist.destroy_process_group(group)
    if left:
        del group, left
        gc.collect()


class World:
    """``world_size`` processes that wait for cases."""

    def __init__(self, world_size, timeout=TIMEOUT, on_device=False):
        device = late_device.build() if on_device else None
        self.world_size = world_size
        self.folder = tempfile.mkdtemp(prefix="qcomm-test-")
        context = multiprocessing.get_context("forkserver")
        self.connections, self.processes = [], []
        servers = [_fork_server(number) for number in range(2)]
        for rank in range(world_size):
            server = servers[rank % 2]
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self.folder, timeout, device, theirs), daemon=True
            )
            with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        for connection in self.connections:
            connection.send("begin")

    def run(self, case, *args, seconds=CASE_SECONDS, dying=()):
        """Results of ``case``, one a rank, or AssertionError with the tracebacks of the ranks that failed.

        Ranks in ``dying`` have to end instead.
        """
        message = pickle.dumps((case, args))
        for connection in self.connections:
            connection.send(message)
        replies = {}
        waiting = dict(zip(self.connections, range(self.world_size), strict=True))
        while waiting:
            failed = any(not well for well, _ in replies.values())
            ready = wait(
                list(waiting), timeout=5.0 if failed else seconds
            )  # the others may be waiting for the rank that failed
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    self.processes[rank].join()
                    replies[rank] = rank in dying, f"process ended with exit code {self.processes[rank].exitcode}"
        for rank in waiting.values():
            replies[rank] = False, f"no result within {seconds} s"
        failures = [
            f"rank {rank} of {self.world_size}:\n{replies[rank][1]}"
            for rank in range(self.world_size)
            if not replies[rank][0]
        ]
        assert not failures, "\n".join(failures)
        return [replies[rank][1] for rank in range(self.world_size)]

    def exit_codes(self):
        """By rank, of the processes that have ended."""
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def close(self, kill=False):
        for process, connection in zip(self.processes, self.connections, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                connection.send(None)
        for process in self.processes:
            process.join(20)
            if process.exitcode is None:
                process.kill()
                process.join()
        shutil.rmtree(self.folder)


# Of all worlds of a process, which is what those of 2, 3 and 4 ranks have. Idle ones cost time, too: each of gloo's
# threads wakes 100 times a second.
MOST_RANKS = 9
_worlds = {}  # the one that was used last comes last


def run(world_size, case, *args, on_device=False, **options):
    """Runs a case in the shared world of that size. A world in which a case failed is not used again."""
    key = world_size, on_device
    if key in _worlds and (ended := _worlds[key].exit_codes()):
        _worlds.pop(key).close(kill=True)
        raise AssertionError(f"after the last case, processes of the world ended with exit codes {ended}")
    if key not in _worlds:
        while _worlds and sum(size for size, _ in _worlds) + world_size > MOST_RANKS:
            _worlds.pop(next(iter(_worlds))).close()
        _worlds[key] = World(world_size, on_device=on_device)
    _worlds[key] = _worlds.pop(key)
    try:
        return _worlds[key].run(case, *args, **options)
    except AssertionError:
        _worlds.pop(key).close(kill=True)
        raise


def run_alone(world_size, case, *args, timeout=TIMEOUT, on_device=False, **options):
    """Runs a case in a world of its own, for cases that leave it unusable."""
    world = World(world_size, timeout, on_device)
    try:
        return world.run(case, *args, **options)
    finally:
        world.close(kill=True)


def world(*sizes, alone=False, **options):
    """Makes the body of a test run on all ranks of a world.

    The test is a top-level function ``test(rank, world_size, <arguments>)``. It fails with the tracebacks of the ranks
    that failed. Its other arguments come from ``pytest.mark.parametrize`` and from fixtures, and are pickled for the
    ranks.

    Several sizes parametrize ``world_size``, with ids as ``world_of_2``. No size at all leaves this to the test's own
    ``parametrize``, where a size depends on another argument.

    ::

        @world(2, 3)
        @pytest.mark.parametrize("strategy", ["none", "bf16"])
        def test_mean(rank, world_size, strategy): ...

    Args:
        *sizes: Numbers of ranks.
        alone: Runs the test in a world of its own, which it may leave unusable.
        on_device: Runs the test in processes that know the device ``late`` (tests/device).
        **options: As of ``World.run``: ``seconds`` that a rank may take, and ``dying`` ranks. With ``alone`` also the
            ``timeout`` of the process group.
    """

    def decorate(body):
        start = run_alone if alone else run

        @functools.wraps(body)
        def test(world_size=sizes[0] if sizes else None, **arguments):
            start(world_size, _run_body, body.__module__, body.__qualname__, arguments, **options)

        # The arguments that pytest has to find: not the rank, and no size where there is only one.
        rank, world_size, *others = inspect.signature(body).parameters.values()
        assert (rank.name, world_size.name) == ("rank", "world_size"), f"{body.__qualname__} needs rank and world_size"
        shown = others if len(sizes) == 1 else [world_size, *others]
        test.__signature__ = inspect.Signature(shown)
        if len(sizes) > 1:
            test = pytest.mark.parametrize("world_size", sizes, ids=[f"world_of_{size}" for size in sizes])(test)
        return pytest.mark.world(test)

    return decorate


def _run_body(rank, world_size, module, name, arguments):
    """Finds a test by its name, which on pickling stands for the decorated function, and runs its body."""
    return getattr(importlib.import_module(module), name).__wrapped__(rank, world_size, **arguments)


@atexit.register
def _close_all():
    for world in _worlds.values():
        world.close()


def attach(model, **options):
    """``qcomm.attach``, compressing also where that is slower, as it is between processes of one machine."""
    if "state" not in options:
        options.setdefault("strategy", "two_phase")
    return qcomm.attach(model, **options)


def all_reduce(tensor, *arguments, **options):
    """``qcomm.all_reduce``, compressing also where that is slower."""
    options.setdefault("strategy", "two_phase")
    return qcomm.all_reduce(tensor, *arguments, **options)


def gathered(value):
    """``value`` of every rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_same_on_all_ranks(*tensors):
    """Bit for bit."""
    mine = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    for rank, other in enumerate(others):
        assert torch.equal(mine, other), f"rank {rank} differs in {int((mine != other).sum())} of {mine.numel()} bytes"


_counting = threading.Lock()  # the channels' workers send at the same time


class CountingGloo:
    """Stands before the gloo connections of a channel and counts the bytes handed to them, by the rank they go to.

    What is received is what the others sent here: a buffer may be larger than the message.
    """

    def __init__(self, gloo, sent_to):
        self.gloo, self.sent_to = gloo, sent_to

    @property
    def sent(self):
        return sum(self.sent_to)

    def received(self):
        """Bytes that the others sent to this rank; every rank has to ask."""
        return sum(sent_to[dist.get_rank()] for sent_to in gathered(self.sent_to))

    def send(self, tensors, target, tag):
        with _counting:
            self.sent_to[target] += sum(tensor.nbytes for tensor in tensors)
        return self.gloo.send(tensors, target, tag)

    def recv(self, tensors, source, tag):
        return self.gloo.recv(tensors, source, tag)


@contextmanager
def counting_bytes():
    """Counts what the default group's communicator sends meanwhile."""
    get_communicator(dist.group.WORLD, channels=CHANNELS)
    transports = [communicator._transport for communicator in _places[dist.group.WORLD].communicators]
    counts = [0] * dist.get_world_size()
    for transport in transports:
        transport._gloo = CountingGloo(transport._gloo, counts)
    yield transports[0]._gloo
    for transport in transports:
        transport._gloo = transport._gloo.gloo


@contextmanager
def sliced(elements):
    """Cuts buffers in slices of about so many elements a chunk."""
    with mock.patch.object(two_phase, "SLICE_ELEMENTS", elements):
        yield


def die(*_):
    """Ends the process at once, as a crash would."""
    os._exit(3)
