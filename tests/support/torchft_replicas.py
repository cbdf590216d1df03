"""Replica groups of torchft: processes that train under a Manager over compressed all-reduces."""

import os
import signal
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.forkserver import ForkServer
from unittest import mock

import torch
import torch.distributed as dist
import torchft
from frameworks import BUCKET_MB, mlp
from quorums import total
from torch import nn
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD

import qcomm
from qcomm.integrations.torchft import CompressedProcessGroup

SECONDS = 60.0  # most that an answer may take
TIMEOUT = timedelta(seconds=30)
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "torchft", "torchft_replicas"]
SYNC_EVERY = 2
_server = ForkServer()


@contextmanager
def lighthouse():
    """The address of a lighthouse that takes a replica for dead after a second, and waits for no others."""
    server = LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=20, heartbeat_timeout_ms=1000
    )
    try:
        yield server.address()
    finally:
        server.shutdown()


class Replica:
    """A process with one :class:`Member`."""

    def __init__(self, name, address, kind, **options):
        context = get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, address, kind, options), daemon=True)
        _server.set_forkserver_preload(PRELOADED)
        with mock.patch("multiprocessing.forkserver.connect_to_new_process", _server.connect_to_new_process):
            self.process.start()
        theirs.close()

    def ask(self, method, *args):
        self._connection.send((method, args))

    def answer(self):
        assert self._connection.poll(SECONDS), "no answer"
        well, result = self._connection.recv()
        assert well, result
        return result

    def kill(self):
        self.process.kill()
        self.process.join()


@contextmanager
def replicas(kind, count, **options):
    """A function that starts a further replica, and the first ``count``."""
    with ExitStack() as stack:
        address = stack.enter_context(lighthouse())
        started = []

        def start():
            started.append(Replica(f"replica_{len(started)}", address, kind, **options))
            stack.callback(started[-1].kill)
            return started[-1]

        yield start, [start() for _ in range(count)]


def _serve(connection, name, address, kind, options):
    torch.set_num_threads(1)
    member = Member(name, address, kind, **options)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(member, method)(*args)))
        except Exception as error:  # noqa: BLE001 - any: it belongs to the test
            connection.send((False, f"{type(error).__name__}: {error}"))


class Member:
    """A model that is trained under a Manager.

    Args:
        name: of the replica, which ends in its number.
        address: of the lighthouse.
        kind: "ddp", "local_sgd" or "diloco".
        **options: of the group.
    """

    def __init__(self, name, address, kind, **options):
        self.number = int(name.rpartition("_")[2])
        self.model = mlp()
        with torch.no_grad():  # other weights on each replica, which torchft makes equal at the first step
            self.model[0].bias.fill_(float(self.number))
        self.fragments = [self.model[:4], self.model[4:]] if kind == "diloco" else [self.model]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        if kind == "diloco":
            options = {"step": self.current_step, "fragments": 2, **options}
        self.group = CompressedProcessGroup(torchft.ProcessGroupGloo(timeout=TIMEOUT), min_elements=100, **options)
        self.manager = torchft.Manager(
            pg=self.group,
            load_state_dict=self.load,
            state_dict=self.save,
            min_replica_size=1,
            use_async_quorum=kind == "ddp",
            timeout=TIMEOUT,
            quorum_timeout=TIMEOUT,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self.store.port,
            lighthouse_addr=address,
            replica_id=name,
            hostname="localhost",
        )
        self.weights, self.totals, self.quorums = {}, {}, []
        self.dies_at = self.differs_at = None
        self._watch()
        self._step = getattr(self, f"_{kind}")()

    def current_step(self):
        return self.manager.current_step()

    def save(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train(self, steps, members):
        """Takes so many steps in a quorum of so many replicas, and whatever others there are between them."""
        taken = 0
        while taken < steps:
            before = self.manager.current_step()
            self._step()
            step = self.manager.current_step()
            if step > before:
                # A step of DiLoCo's makes a fragment equal, and the others are under way.
                part = self.fragments[(step - 1) % len(self.fragments)]
                self.weights[step] = [parameter.detach().clone() for parameter in part.parameters()]
                self.totals[step] = total(self.group.state_dict())
                taken += self.quorums[-1]["world_size"] == members
        return step

    def die_at(self, step, number):
        """Ends the process at an all-reduce of a step, which the others then wait for."""
        self.dies_at = step, number

    def differ_at(self, step, number):
        """Passes another dtype to an all-reduce of a step, once."""
        self.differs_at = step, number

    def report(self):
        stats = self.group.stats()
        shown = {name: stats[name] for name in ("steps", "bytes_sent", "bytes_uncompressed", "residual_norm")}
        return {**shown, "weights": self.weights, "totals": self.totals, "quorums": self.quorums}

    def _watch(self):
        """Notes the residuals around each new quorum."""
        configure, allreduce, reduced = self.group.configure, self.group.allreduce, {}

        def configured(*args):
            entry = {
                "step": self.manager.current_step(),
                "world_size": args[3],
                "before": total(self.group.state_dict()),
            }
            configure(*args)
            self.quorums.append({**entry, "after": total(self.group.state_dict())})

        def counted(tensors, opts):
            step = self.manager.current_step()
            reduced[step] = reduced.get(step, 0) + 1
            if (step, reduced[step]) == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if (step, reduced[step]) == self.differs_at:
                tensors = [tensors[0].double()]
            return allreduce(tensors, opts)

        self.group.configure, self.group.allreduce = configured, counted

    def _backward(self, model):
        generator = torch.Generator().manual_seed(100 * self.number + self.manager.current_step())
        values = torch.randn(8, 48, generator=generator)
        nn.functional.cross_entropy(model(values), values[:, :4].argmax(1)).backward()

    def _ddp(self):
        model = torchft.DistributedDataParallel(self.manager, self.model, bucket_cap_mb=BUCKET_MB)
        optimizer = torchft.Optimizer(self.manager, self.optimizer)

        def step():
            optimizer.zero_grad()
            self._backward(model)
            optimizer.step()

        return step

    def _inner_steps(self, algorithm, count):
        algorithm.__enter__()  # for as long as the process lives

        def step():
            for _ in range(count):
                self.optimizer.zero_grad()
                self._backward(self.model)
                self.optimizer.step()

        return step

    def _local_sgd(self):
        return self._inner_steps(LocalSGD(self.manager, self.model, self.optimizer, SYNC_EVERY), SYNC_EVERY)

    def _diloco(self):
        outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in self.fragments]
        diloco = DiLoCo(self.manager, self.fragments, self.optimizer, outer, sync_every=2 * SYNC_EVERY)
        return self._inner_steps(diloco, SYNC_EVERY)


def weights_grid():
    """For LocalSGD, which averages weights."""
    return qcomm.RangeGrid()
