"""Quorums of replicas that are threads of one process, and what they exchange; and the sums of residuals."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from qcomm.collectives import ReduceOptions, Telemetry
from qcomm.integrations.quorum import Quorum
from qcomm.integrations.quorum_residuals import QuorumResiduals
from qcomm.transport import Meeting

TIMEOUT = timedelta(seconds=30)


def total(saved):
    """All that a replica still has to send, as a sum for each tensor: local residuals, and W times the owner's.

    Args:
        saved: state of a QuorumResiduals.
    """
    sums = {}
    for key, state in saved["residuals"].items():
        for name, local in state["local"].items():
            whole = local.double()
            if name in state["owner"]:
                start, owner = state["owner"][name]
                whole[start : start + owner.numel()] += state["world_size"] * owner.double()
            sums[f"{key} {name}"] = whole
    return sums


def flat_total(*replicas):
    """The sum over replicas of :func:`total`, flat."""
    totals = [total(residuals.state_dict()) for residuals in replicas]
    names = sorted({name for of_replica in totals for name in of_replica})
    return torch.cat([sum(of_replica[name] for of_replica in totals if name in of_replica) for name in names])


def connected(world_size, options, timeout=TIMEOUT):
    """A new quorum, as each of its replicas has it."""
    store, telemetry = dist.HashStore(), Telemetry()

    def connect(rank):
        return Quorum(Meeting(store, range(world_size), rank, timeout), options, telemetry)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(connect, range(world_size)))


def exchanged(quorum, residuals, tensors, number=0, is_mean=False):
    """The tensors of all replicas after an all-reduce."""
    results = [tensor.clone() for tensor in tensors]
    tickets = []
    for replica, kept, result in zip(quorum, residuals, results, strict=True):
        feedback, keep = (None, None) if kept is None else kept.of(str(number))
        tickets.append(replica.start(result, number, is_mean, feedback, keep))
    for ticket in tickets:
        ticket.wait()
    return results


def residuals_of(count):
    return [QuorumResiduals() for _ in range(count)]


def two_phase(**options):
    return ReduceOptions(**{"strategy": "two_phase", "min_elements": 64, **options})
