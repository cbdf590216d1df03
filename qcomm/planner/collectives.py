"""Times of collectives on a cluster of nodes, in the alpha-beta model.

N GPUs on n nodes, g = N / n of them each; S bytes a GPU; B and alpha of a node's link, b and a of the links inside a
node. All of a node's GPUs share its link::

    ring          2 (N - 1) / N * S / min(B, b) + 2 ((N - n) a + n alpha)       one ring through all nodes
    tree          2 S / min(B, b) + 2 ceil(log2 n) alpha + 2 (g - 1) a          double binary tree, chains inside
    hierarchical  2 (g - 1) (S / (g b) + a) + all-reduce of S / g among nodes, by all g GPUs at once
    torus         hierarchical with rings both ways on a grid of x times N / x GPUs
    all_gather    (N - 1) S / min(B, b) + (N - n) a + n alpha                   ring
    gloo          a ring in segments, of which two are under way: gloo_ring

NCCL takes of ring and tree what would be the faster one with the latencies of its own model, whatever those of the
links are. Y. Ueno and R. Yokota, "Exhaustive study of hierarchical allreduce patterns",
CCGRID 2019; H. Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash", arXiv:1811.05233
(torus); P. Sanders et al., "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing
35, 2009.
"""

import math
from dataclasses import dataclass, replace

from qcomm.collectives import LinkProfile
from qcomm.planner.errors import PlanError

__all__ = ["GLOO_AT_ONCE", "Cluster", "all_gather", "all_reduce", "gloo_ring", "hierarchical", "ring", "torus", "tree"]

# Latencies of a hop in NCCL's model (src/graph/tuning.cc, protocol Simple).
NCCL_NETWORK_US, NCCL_INSIDE_US = 14.0, 3.4
# gloo's ring cuts a buffer into segments of at most so many bytes, at least so many a rank, and has as many under way.
GLOO_SEGMENT_BYTES, GLOO_SEGMENTS = 1 << 20, 2
GLOO_AT_ONCE = 2  # collectives of a group of torch's gloo, which has two threads for them


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links.

    Args:
        gpus: at least 1.
        gpus_per_node: GPUs of a full node. With fewer GPUs than that there is one node; otherwise nodes are full.
        between: link of a whole node, shared by its GPUs.
        inside: link of each GPU to the others of its node.
        is_gloo: whether torch's gloo moves uncompressed gradients, rather than NCCL.

    Raises:
        PlanError: the numbers do not describe a cluster.

    Example:
        >>> cluster = Cluster(16, 8, LinkProfile(12.5, 10.0), LinkProfile(120.0, 3.4))
        >>> cluster.nodes, all_reduce(cluster, 0)
        (2, 0.0)
    """

    gpus: int
    gpus_per_node: int
    between: LinkProfile
    inside: LinkProfile
    is_gloo: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise PlanError(
                f"gpus is {self.gpus}, which {self.gpus_per_node} GPUs a node do not divide; "
                f"{below} or {below + self.gpus_per_node} would be whole nodes"
            )

    @property
    def nodes(self) -> int:
        """Returns the number of nodes."""
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def local(self) -> int:
        """Returns the number of GPUs on each node."""
        return self.gpus // self.nodes


def _hops(cluster: Cluster) -> float:
    """Returns the seconds of latency once around the ring, which crosses every node's link once."""
    if cluster.nodes == 1:
        return cluster.gpus * 1e-6 * cluster.inside.latency_us
    away, near = cluster.nodes, cluster.gpus - cluster.nodes
    return 1e-6 * (away * cluster.between.latency_us + near * cluster.inside.latency_us)


def _slowest(cluster: Cluster) -> float:
    """Returns the bytes a second of a ring's slowest link."""
    rates = [cluster.inside.gb_per_s] if cluster.local > 1 else []
    rates += [cluster.between.gb_per_s] if cluster.nodes > 1 else []
    return 1e9 * min(rates)


def ring(cluster: Cluster, size: float) -> float:
    """Returns the seconds of an all-reduce of ``size`` bytes in one ring."""
    if cluster.gpus == 1 or size == 0:
        return 0.0
    share = (cluster.gpus - 1) / cluster.gpus
    return 2 * share * size / _slowest(cluster) + 2 * share * _hops(cluster)


def gloo_ring(cluster: Cluster, size: float) -> list[tuple[str, float]]:
    """Returns what gloo's all-reduce of ``size`` bytes does one after another: seconds of "wait" and of "link".

    A segment travels when its receiver has told that it waits for it, two latencies after both have begun. Two segments
    are under way, so that a pair takes two latencies and a segment's time, or two segments' time where that is longer.

    Example:
        >>> far = LinkProfile(1.0, 50_000.0)
        >>> steps = gloo_ring(Cluster(2, 1, far, far), 25 * 2**20)
        >>> round(sum(seconds for _, seconds in steps), 2)  # 0.03 of them for the bytes
        1.41
    """
    if cluster.gpus == 1 or size == 0:
        return []
    ranks = cluster.gpus
    segments = max(GLOO_SEGMENTS, math.ceil(size / GLOO_SEGMENT_BYTES / ranks))  # of each rank's part
    one = size / (ranks * segments) / _slowest(cluster)
    trips = 2 * _hops(cluster) / ranks
    most = (ranks - 1) * segments
    phase = [("wait", min(trips, one))]
    for begin in range(0, most, GLOO_SEGMENTS):
        together = min(GLOO_SEGMENTS, most - begin)
        phase += [("wait", max(0.0, trips - one)), ("link", together * one)]
    return 2 * phase


def tree(cluster: Cluster, size: float) -> float:
    """Returns the seconds of an all-reduce of ``size`` bytes in a double binary tree of nodes."""
    if cluster.gpus == 1 or size == 0:
        return 0.0
    levels = math.ceil(math.log2(cluster.nodes))
    near = (cluster.local - 1) * cluster.inside.latency_us
    return 2 * size / _slowest(cluster) + 2e-6 * (levels * cluster.between.latency_us + near)


def _grid(size: float, columns: int, inner: LinkProfile, rows: int, outer: LinkProfile) -> float:
    """Returns the seconds of an all-reduce on a grid: along rows of ``columns``, then a part of it along columns."""
    time = 0.0
    if columns > 1:
        time += 2 * (columns - 1) * (size / columns / (1e9 * inner.gb_per_s) + 1e-6 * inner.latency_us)
    if rows > 1:
        part = size / columns / rows
        time += 2 * (rows - 1) * (part / (1e9 * outer.gb_per_s) + 1e-6 * outer.latency_us)
    return time


def hierarchical(cluster: Cluster, size: float) -> float:
    """Returns the seconds of an all-reduce inside nodes, then between them as NCCL would, then inside again."""
    if cluster.gpus == 1 or size == 0:
        return 0.0
    near = _grid(size, cluster.local, cluster.inside, 1, cluster.between)
    if cluster.nodes == 1:
        return near
    # The g GPUs of a node each exchange S / g at once: the node's link carries as much as for one GPU with all of it.
    nodes = Cluster(cluster.nodes, 1, cluster.between, cluster.inside)
    return near + all_reduce(nodes, size)


def torus(cluster: Cluster, size: float, columns: int | None = None) -> float:
    """Returns the seconds of an all-reduce by rings on a grid of ``columns`` times the rest; a row defaults to a node.

    Raises:
        PlanError: the columns do not divide the GPUs, or rows are neither whole nodes nor parts of one.
    """
    x = cluster.local if columns is None else columns
    if x < 1 or cluster.gpus % x or (x % cluster.local and cluster.local % x):
        raise PlanError(
            f"columns is {x}; it must divide {cluster.gpus} GPUs and be a part or multiple of {cluster.local}"
        )
    if cluster.gpus == 1 or size == 0:
        return 0.0
    # Of a node's GPUs those in different columns share its link; a row of several nodes crosses it once.
    sharing = min(x, cluster.local)
    shared = LinkProfile(cluster.between.gb_per_s / sharing, cluster.between.latency_us)
    row = cluster.inside if x <= cluster.local else cluster.between
    column = shared if cluster.nodes > 1 else cluster.inside
    return _grid(size, x, row, cluster.gpus // x, column)


def all_gather(cluster: Cluster, size: float) -> float:
    """Returns the seconds until every GPU has the ``size`` bytes of every other, in a ring."""
    if cluster.gpus == 1 or size == 0:
        return 0.0
    share = (cluster.gpus - 1) / cluster.gpus
    return (cluster.gpus - 1) * size / _slowest(cluster) + share * _hops(cluster)


def all_reduce(cluster: Cluster, size: float) -> float:
    """Returns the seconds of NCCL's all-reduce of ``size`` bytes, or of gloo's."""
    if cluster.is_gloo:
        return sum(seconds for _, seconds in gloo_ring(cluster, size))
    believed = replace(
        cluster,
        between=LinkProfile(cluster.between.gb_per_s, NCCL_NETWORK_US),
        inside=LinkProfile(cluster.inside.gb_per_s, NCCL_INSIDE_US),
    )
    return ring(cluster, size) if ring(believed, size) <= tree(believed, size) else tree(cluster, size)
