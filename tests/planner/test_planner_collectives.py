"""Collectives of the planner against closed forms, and the simulator against schedules that can be told by hand."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcomm.collectives.cost_model import (
    MESSAGE_SECONDS,
    LinkProfile,
    Profile,
    TwoPhase,
    Workload,
    bytes_sent,
    seconds,
)
from qcomm.collectives.two_phase_schedule import MOST_SLICES
from qcomm.planner import PlanError
from qcomm.planner.collectives import Cluster, all_gather, all_reduce, gloo_ring, hierarchical, ring, torus, tree
from qcomm.planner.compute import ComputeTimes
from qcomm.planner.hardware import FABRICS, GPUS, inside_link, parse_bandwidth
from qcomm.planner.methods import Codec, Setting, Work, method_named
from qcomm.planner.models import built_in
from qcomm.planner.plan import Request, predict
from qcomm.planner.profiles import ModelProfile, ParameterTensor
from qcomm.planner.schedulers import Ddp, Horovod
from qcomm.planner.simulator import Job, chrome_trace, simulate, slowest_factors

SLOW, FAST = LinkProfile(10.0, 20.0), LinkProfile(100.0, 5.0)
GB = 10**9


def cluster(gpus, per_node, between=SLOW, inside=FAST):
    return Cluster(gpus, per_node, between, inside)


def test_closed_forms():
    # 16 GPUs on 4 nodes, 1 GB: the ring carries 2 * 15 / 16 GB over the node's link, and visits 12 near and 4 far hops.
    c = cluster(16, 4)
    hops = 12 * 5e-6 + 4 * 20e-6
    assert ring(c, GB) == pytest.approx(2 * 15 / 16 * (0.1 + hops))
    assert tree(c, GB) == pytest.approx(2 * 0.1 + 2 * (2 * 20e-6 + 3 * 5e-6))
    assert all_gather(c, GB) == pytest.approx(15 * 0.1 + 15 / 16 * hops)
    near = 2 * 3 * (0.25 / 100 + 5e-6)
    assert hierarchical(c, GB) == pytest.approx(near + 2 * 3 / 4 * (0.1 + 4 * 20e-6))
    assert torus(c, GB) == pytest.approx(hierarchical(c, GB))
    # On one GPU a node the ring is the cost model's, which also has headers and the time for each message.
    flat = Workload(GB // 4, 8)
    alone = Profile(SLOW, Codec(1.0, 1.0, on_gpu=False, assumed=False).profile(1.0))
    assert ring(cluster(8, 1), GB) + 20e-6 + 21 * MESSAGE_SECONDS == pytest.approx(seconds("none", flat, alone))
    assert 1e-10 * bytes_sent("none", flat, 1.0)[0] == pytest.approx(ring(cluster(8, 1, LinkProfile(10.0, 1e-9)), GB))


def gloo_by_events(ranks, size, rate, latency):
    """Seconds of gloo's ring by its own rules, one segment after another; all ranks do the same at once."""
    segments = max(2, math.ceil(size / 2**20 / ranks))
    one = size / ranks / segments / rate
    now = 0.0
    for _ in ("reduce-scatter", "all-gather"):
        arrived, link_free = [], now
        for number in range((ranks - 1) * segments):
            began = now if number < 2 else arrived[number - 2]
            link_free = max(link_free, began + 2 * latency) + one
            arrived.append(link_free)
        now = arrived[-1]
    return now


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("size", [1000, 5.3e6, 25 * 2**20])
@pytest.mark.parametrize("latency_us", [50.0, 2_000.0, 50_000.0])
def test_gloo_waits_for_its_receivers_with_two_segments_under_way(ranks, size, latency_us):
    link = LinkProfile(0.1, latency_us)
    taken = sum(seconds for _, seconds in gloo_ring(cluster(ranks, 1, link, link), size))
    assert taken == pytest.approx(gloo_by_events(ranks, size, 1e8, 1e-6 * latency_us), rel=1e-9)
    assert taken == pytest.approx(all_reduce(Cluster(ranks, 1, link, link, is_gloo=True), size))


def test_gloos_fabric_has_two_collectives_under_way():
    far = replace(FABRICS["gloo"], latency_us=50_000.0)
    layers = ModelProfile(
        "layers", "resnet", tuple(ParameterTensor(f"{i}", (520, 520), 1.0) for i in range(5)), "s", 1, 1
    )
    request = Request(
        layers, 1, 2, 1, 0.12, fabric=far, scheduler=Ddp(first_mib=2**-20, bucket_mib=2**-20), samples_per_second=1e9
    )
    for method in ("fp32", "bf16"):
        # Two phases of two latencies each, for three turns of two buckets.
        assert 3 * 4 * 0.05 < predict(request, method_named(method)).seconds < 3 * 4 * 0.05 + 0.06
    assert predict(replace(request, fabric=replace(far, is_gloo=False)), method_named("fp32")).seconds > 5 * 2 * 0.05


def test_nccl_does_not_see_a_long_latency():
    # 25 MiB on 16 nodes with 10 GB/s each go through a ring, however far the nodes are: 30 latencies and not 8.
    far = cluster(16, 1, LinkProfile(10.0, 20_000.0))
    assert tree(far, 25 * 2**20) < ring(far, 25 * 2**20) == all_reduce(far, 25 * 2**20)
    assert all_reduce(far, 25 * 2**20) == pytest.approx(30 * 0.02, rel=0.01)
    # A few bytes go through a tree.
    assert all_reduce(far, 100) == tree(far, 100)


def test_gpus_behind_pcie_share_it():
    def inside(gpus, **changes):
        request = Request(built_in("resnet18"), 8, gpus, 8, 1.25, gpu=GPUS["t4"], **changes)
        return request.cluster.inside.gb_per_s

    assert [inside(gpus) for gpus in (2, 4, 8, 16)] == [10.0, 5.0, 1.75, 1.75]
    assert inside(8, inside=inside_link("pcie")) == 1.75
    assert inside(8, inside=inside_link("10GB/s")) == 10.0  # as measured


def test_a_torus_takes_fewer_steps_than_a_ring():
    # 4 x 4 single GPUs: 2 * 3 + 2 * 3 latencies and not 2 * 15; nothing but latency is left of one byte.
    c = cluster(16, 1)
    assert torus(c, 1, columns=4) == pytest.approx(12 * 20e-6, rel=1e-4)
    assert ring(c, 1) == pytest.approx(30 * 20e-6, rel=1e-4)
    assert torus(c, GB, columns=1) == pytest.approx(ring(c, GB))


@pytest.mark.parametrize(("gpus", "gpus_per_node", "columns"), [(16, 1, 0), (16, 1, 3), (16, 1, 32), (24, 4, 6)])
def test_columns_that_do_not_divide_a_torus_are_refused(gpus, gpus_per_node, columns):
    match = f"columns is {columns}; it must divide 16" if gpus == 16 else f"columns is {columns}"
    with pytest.raises(PlanError, match=match):
        torus(cluster(gpus, gpus_per_node), GB, columns=columns)


CLUSTERS = st.builds(
    lambda nodes, local, rate, latency, near: Cluster(
        nodes * local, local, LinkProfile(rate, latency), LinkProfile(rate * near, latency)
    ),
    st.integers(1, 8192),
    st.integers(1, 8),
    st.floats(0.01, 100.0),
    st.floats(0.1, 100.0),
    st.floats(1.0, 50.0),
)


@settings(max_examples=150, deadline=None)
@given(c=CLUSTERS, size=st.floats(1, 1e10), factor=st.floats(1.0, 10.0))
def test_more_bytes_and_slower_links_never_take_less(c, size, factor):
    slower = Cluster(
        c.gpus, c.gpus_per_node, LinkProfile(c.between.gb_per_s / factor, c.between.latency_us * factor), c.inside
    )
    for way in (ring, tree, hierarchical, torus, all_gather, all_reduce):
        time = way(c, size)
        assert (time > 0) == (c.gpus > 1)
        if way not in (hierarchical, all_reduce):  # NCCL chooses without a look at the latencies
            assert way(c, size * factor) >= time * (1 - 1e-12)
            assert way(slower, size) >= time * (1 - 1e-12)
        # No algorithm moves less over a node's link than the data that others lack.
        if c.nodes > 1 and way is not all_gather:
            assert time >= 2 * (c.nodes - 1) / c.nodes * size / (1e9 * c.between.gb_per_s) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("gpus", "per_node", "match"),
    [(0, 4, "gpus is 0"), (4, 0, "gpus_per_node is 0"), (13, 8, "gpus is 13, .* 8 or 16 would be whole nodes")],
)
def test_impossible_clusters(gpus, per_node, match):
    with pytest.raises(PlanError, match=match):
        cluster(gpus, per_node)


def test_part_of_a_node_is_one_node():
    c = cluster(3, 8)
    assert (c.nodes, c.local) == (1, 3)
    assert ring(c, GB) == pytest.approx(2 * 2 / 3 * (0.01 + 3 * 5e-6))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100Gbps", 12.5), ("100 gbps", 12.5), ("1gbit", 0.125), ("100mbit", 0.0125), ("25 Gb/s", 3.125),
        ("10GbE", 1.25), ("100gbe", 12.5), ("25G", 3.125), ("2.5 GigE", 0.3125), ("HDR", 25.0), ("edr", 12.5),
        ("HDR100", 12.5), ("4.1Gbps", 0.5125), ("12.5GB/s", 12.5), ("1Tbps", 125.0), ("40GBps", 40.0),
        ("500kbit", 62.5e-6),
    ],
)  # fmt: skip
def test_bandwidths_are_read_as_written(text, expected):
    assert parse_bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "100", "fast", "Gbps", "-1Gbps", "1 Gx", "nanGbps", "1GBit", "1e400Gbps"])
def test_bandwidths_without_a_rate_and_a_unit_are_refused(text):
    with pytest.raises(PlanError, match=r"network is .*; write a rate with its unit, such as 100Gbps"):
        parse_bandwidth(text)


def test_a_bandwidth_of_zero_is_refused():
    with pytest.raises(PlanError, match="must be above zero, such as 100Gbps"):
        parse_bandwidth("0Gbps")


def test_links_inside_a_node_have_names_or_rates():
    assert inside_link("nvlink2").gb_per_s == 120.0
    assert inside_link("40GB/s").gb_per_s == 40.0
    with pytest.raises(PlanError, match="inside is 'nvlink9'; it must be one of pcie, nvlink2"):
        inside_link("nvlink9")


def test_fabrics():
    tcp = FABRICS["tcp"]
    assert tcp.link(1.25, 1).gb_per_s == tcp.link(1.25, 8).gb_per_s == pytest.approx(1.25 * 0.94)  # one switch
    assert tcp.link(12.5, 2).gb_per_s == pytest.approx(4.0)  # sockets reach no more
    assert tcp.link(1.25, 256).gb_per_s == pytest.approx(1.25 * 0.94 / 1.2)
    assert FABRICS["exact"].link(0.5125, 16).gb_per_s == 0.5125


SEND = (Work("link", 1.5, "all-reduce"),)


def test_the_link_carries_one_bucket_after_the_other():
    times = ComputeTimes(1.0, (1.0, 2.0))
    step = simulate(times, [Job(1.0, 0.0, [SEND]), Job(2.0, 0.0, [SEND])], link_share=0.0)
    assert (step.seconds, step.exposed, step.link) == (5.0, 2.0, 3.0)
    assert step.overlap == pytest.approx(1 / 3)
    # Twice as slow a rank: the first bucket is there after 4, the second after 6.
    slow = simulate(times, [Job(1.0, 0.0, [SEND]), Job(2.0, 0.0, [SEND])], factor=2.0, link_share=0.0)
    assert (slow.seconds, slow.exposed) == (7.5, 1.5)


def test_a_shared_link_serves_all_that_wait_in_turns():
    times = ComputeTimes(0.0, (0.0,))
    long, short = (Work("link", 1.0, "long"),), (Work("wait", 0.3, ""), Work("link", 0.2, "short"))
    jobs = [Job(0.0, 0.0, [long]), Job(0.0, 0.0, [short])]
    alone, shared = (simulate(times, jobs, link_share=0.0, shares_link=shares) for shares in (False, True))
    assert [alone.seconds, shared.seconds, alone.link, shared.link] == pytest.approx([1.2] * 4)
    # Side by side from 0.3 on, the short one takes twice its time, and does not wait for the long one's end.
    ends = [max(span.end for span in step.spans if span.label == "short") for step in (alone, shared)]
    assert ends == pytest.approx([1.2, 0.3 + 2 * 0.2], abs=0.02)
    assert sum(span.end - span.begin for span in shared.spans if span.label == "long") == pytest.approx(1.0)


def test_the_link_slows_backward_down():
    # From second 2 on the link takes a tenth of the GPU: in 1.5 seconds 1.35 of backward, and 8.65 are left.
    step = simulate(ComputeTimes(1.0, (1.0, 11.0)), [Job(1.0, 0.0, [SEND])], link_share=0.1)
    assert step.seconds == pytest.approx(1.0 + 11.0 + 0.15)
    assert step.exposed == 0.0


def test_a_codec_on_the_gpu_stops_backward_and_one_elsewhere_does_not():
    chain = (Work("codec", 0.5, "encode"), Work("link", 0.25, "packets"), Work("wait", 0.1, "latency"))
    times, jobs = ComputeTimes(1.0, (1.0, 2.0)), [Job(1.0, 0.0, [chain]), Job(2.0, 0.0, [chain])]
    assert simulate(times, jobs, codec_share=1.0, link_share=0.0).seconds == pytest.approx(1 + 2 + 0.5 + 0.85)
    assert simulate(times, jobs, codec_share=0.0, link_share=0.0).seconds == pytest.approx(1 + 2 + 0.85)


def test_slices_overlap_as_in_the_library():
    values, codec = 4 * 2**23, Codec(2.0, 4.0, on_gpu=False, assumed=False, ratio=8.0)
    for rate in (0.01, 0.1, 1.0, 10.0):
        link = LinkProfile(rate, 50.0)
        chains = method_named("qcomm-1").chains(
            [ParameterTensor("weight", (values // 4,))], Setting(cluster(4, 1, link, link), codec, 900.0)
        )
        assert len(chains) == MOST_SLICES
        simulated = simulate(ComputeTimes(0.0, (0.0,)), [Job(0.0, 0.0, chains)], codec_share=0.0).seconds
        # The simulator takes what is ready first, the library a fixed order that is as good but for a slice.
        exact = seconds("two_phase", Workload(values // 4, 4), Profile(link, codec.profile(1.0)))
        assert simulated == pytest.approx(exact, rel=0.12)


@settings(max_examples=200, deadline=None)
@given(
    slices=st.integers(1, 8),
    times=st.tuples(*[st.floats(0.0, 10.0) for _ in range(5)]),
)
def test_slices_never_take_longer_than_one_after_another(slices, times):
    latency, encode, exchange, reduce, decode = times
    steps = TwoPhase(slices, latency, encode, exchange, reduce, decode)
    serial = slices * (encode + exchange + reduce + exchange + decode) + 2 * slices * latency
    assert steps.seconds() <= serial * (1 + 1e-9)
    assert steps.seconds() >= max(slices * (encode + reduce + decode), 2 * slices * exchange) * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    ready=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=8).map(sorted),
    chain=st.lists(st.tuples(st.sampled_from(["codec", "link", "wait"]), st.floats(0.0, 2.0)), min_size=1, max_size=5),
    shares=st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 0.1, 0.5])),
    factor=st.floats(0.5, 3.0),
)
def test_a_step_ends_and_nothing_is_lost(ready, chain, shares, factor):
    times = ComputeTimes(0.5, tuple(ready))
    work = tuple(Work(resource, time, "w") for resource, time in chain)
    step = simulate(
        times, [Job(at, 0.0, [work]) for at in ready], factor=factor, codec_share=shares[0], link_share=shares[1]
    )
    totals = {name: len(ready) * sum(w.seconds for w in work if w.resource == name) for name in ("codec", "link")}
    assert (step.codec, step.link) == (pytest.approx(totals["codec"]), pytest.approx(totals["link"]))
    alone = factor * (0.5 + ready[-1])
    longest = alone + sum(totals.values()) * 2 + len(ready) * sum(w.seconds for w in work)
    assert alone - 1e-9 <= step.seconds <= longest + 1e-9
    assert step.seconds >= max(totals.values()) - 1e-9
    assert 0 <= step.overlap <= 1 + 1e-9
    for lane in ("codec", "link"):
        spans = sorted((s.begin, s.end) for s in step.spans if s.lane == lane)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))  # one at a time


def test_a_trace_shows_the_step():
    step = simulate(ComputeTimes(1.0, (1.0, 2.0)), [Job(1.0, 0.0, [SEND])], link_share=0.0)
    events = [event for event in json.loads(chrome_trace(step))["traceEvents"] if event["ph"] == "X"]
    assert {(event["name"], event["ts"], event["dur"]) for event in events} == {
        ("forward", 0.0, 1e6),
        ("backward", 1e6, 2e6),
        ("all-reduce", 2e6, 1.5e6),
    }


def test_the_slowest_of_many():
    assert slowest_factors(64, 0.0) == [1.0]
    mean = sum(slowest_factors(1, 0.02)) / len(slowest_factors(1, 0.02))
    assert mean == pytest.approx(1.0)
    # The expected largest of N normal draws: 1.03 deviations of 4, 3.24 of 1000 (tables of order statistics).
    for ranks, deviations in ((4, 1.029), (1000, 3.241)):
        factors = slowest_factors(ranks, 0.01, draws=400)
        assert sum(factors) / 400 == pytest.approx(1 + 0.01 * deviations, abs=2e-4)
    with pytest.raises(PlanError, match=r"straggler is 0.7; it must be in 0..0.5"):
        slowest_factors(4, 0.7)


def test_horovod_waits_for_its_cycle_and_fuses():
    times = ComputeTimes(0.0, (0.0011, 0.0012, 0.0030))
    model = type("Model", (), {"tensors": tuple(ParameterTensor(str(i), (2**20,)) for i in range(3))})
    scheduler = Horovod(cycle_ms=2.0, fusion_mib=8.0)
    buckets = scheduler.buckets(model, times, 1)
    assert [[t.name for t in bucket.tensors] for bucket in buckets] == [["0", "1"], ["2"]]
    assert [bucket.ready + bucket.delay for bucket in buckets] == [pytest.approx(0.002), pytest.approx(0.004)]
    # Agreeing is slower among many; tensors larger than the buffer travel alone.
    assert scheduler.negotiation(1) == 0.0
    assert scheduler.negotiation(1024) == pytest.approx(2 * 10 * 30e-6 + 1023 * 4e-6)
    # Of the ten levels of a tree seven cross the network of 128 nodes, each way.
    assert scheduler.negotiation(1024, 128, 5000.0) == pytest.approx(2 * (3 * 30e-6 + 7 * 5e-3) + 1023 * 4e-6)
    alone = Horovod(cycle_ms=2.0, fusion_mib=4.0).buckets(model, times, 1)
    assert [len(bucket.tensors) for bucket in alone] == [1, 1, 1]
    with pytest.raises(PlanError, match="cycle_ms is 0"):
        Horovod(cycle_ms=0)


def test_methods_cost_what_they_send():
    bucket = [ParameterTensor("weight", (512, 1024)), ParameterTensor("bias", (512,))]
    setting = Setting(cluster(8, 1), Codec(25.0, 25.0, on_gpu=True, assumed=True), 900.0)
    elements = 512 * 1024 + 512

    def link(name):
        return [
            work.seconds
            for chain in method_named(name).chains(bucket, setting)
            for work in chain
            if work.resource == "link"
        ]

    assert link("fp32") == [pytest.approx(all_reduce(setting.cluster, 4 * elements))]
    assert link("bf16") == link("fp16") == [pytest.approx(all_reduce(setting.cluster, 2 * elements))]
    assert link("powersgd-4") == [
        pytest.approx(all_reduce(setting.cluster, 4 * (512 * 4 + 512))),
        pytest.approx(all_reduce(setting.cluster, 4 * 1024 * 4)),
    ]
    packets, messages = elements * 2.14 / 8 * 7 / 8, 7 * MESSAGE_SECONDS
    assert link("qcomm-1") == [pytest.approx(packets / 10e9 + messages)] * 2
    assert link("qcomm-3.4") == [pytest.approx(packets * 0.4 / 2.14 / 10e9 + messages)] * 2
    assert link("averager-10") == link("qcomm-1")


@pytest.mark.parametrize(
    "name",
    [
        "fp8",
        "qcomm",
        "qcomm-3",
        "qcomm-x",
        "averager",
        "averager-1",
        "averager-x",
        "powersgd-0",
        "powersgd-",
        "powersgd-1.5",
        "powersgd-999",
        "",
    ],
)
def test_unknown_methods_are_refused(name):
    with pytest.raises(PlanError, match=f"method is '{name}'; it must be fp32"):
        method_named(name)


def test_on_nodes_only_what_crosses_them_is_compressed():
    bucket = [ParameterTensor("weight", (4096, 1024))]
    codec = Codec(100.0, 100.0, on_gpu=True, assumed=True, collective_seconds=0.0)
    several = method_named("qcomm-1").chains(bucket, Setting(cluster(32, 8), codec, 900.0))
    (chain,) = several
    labels = [work.label for work in chain if work.label not in ("begin", "latency")]
    assert labels[0] == "reduce-scatter" and labels[-1] == "all-gather"
    between = sum(work.seconds for work in chain if work.label in ("packets", "means"))
    assert between == pytest.approx(2 * 3 / 4 * 4096 * 1024 * 2.14 / 8 / 10e9)
    # In one piece it takes what the cost model says.
    profile = Profile(LinkProfile(10.0 / 8, 20.0), codec.profile(1.0), FAST)
    exact = seconds("hierarchical", Workload(4096 * 1024, 32, ranks_per_node=8), profile)
    assert sum(work.seconds for work in chain) == pytest.approx(exact)


def test_a_single_node_is_compressed_over_its_own_links():
    bucket = [ParameterTensor("weight", (4096, 1024))]
    codec = Codec(100.0, 100.0, on_gpu=True, assumed=True)
    setting = Setting(cluster(8, 8, inside=LinkProfile(2.0, 5.0)), codec, 900.0)
    chains = method_named("qcomm-1").chains(bucket, setting)
    carried = sum(work.seconds for chain in chains for work in chain if work.label in ("packets", "means"))
    bytes_each = 4096 * 1024 * 2.14 / 8 * 7 / 8
    assert carried == pytest.approx(2 * bytes_each / 2e9 + 2 * len(chains) * 7 * MESSAGE_SECONDS)


def test_buckets_wait_for_their_channel():
    """Five exchanges with a latency of 1 and next to no bytes, all ready at once, on one channel, on four, without."""
    chain = (Work("link", 0.01, "packets"), Work("wait", 1.0, "latency"))
    times = ComputeTimes(0.0, (0.0,))

    def step(channels):
        jobs = [Job(0.0, 0.0, [chain, chain], i % channels if channels else None) for i in range(5)]
        return simulate(times, jobs).seconds

    assert step(1) == pytest.approx(5 * 1.02)
    assert step(4) == pytest.approx(1.02 + 1.02)
    assert step(0) == pytest.approx(1.1)
    # A job without work leaves its channel free.
    assert simulate(times, [Job(0.0, 0.0, [], 0), Job(0.0, 0.0, [chain], 0)]).seconds == pytest.approx(1.01)
