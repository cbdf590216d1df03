"""A measured machine: what measuring refuses to believe, what auto makes of a profile, and ``qcomm bench``."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import error_of, wrap
from distributed import gathered, world
from hypothesis import given
from hypothesis import strategies as st
from mpirun import environment, find_mpirun
from typer.testing import CliRunner

import qcomm
from qcomm.cli.main import app
from qcomm.collectives import machine
from qcomm.collectives.cost_model import CodecProfile, LinkProfile, Profile
from qcomm.collectives.machine import measure_codec, measure_link, slowest
from qcomm.collectives.options import ReduceOptions
from qcomm.transport.gloo import GlooTransport

SLOW = Profile(LinkProfile(0.0001, 5.0), CodecProfile(2.0, 4.0, 15.0))
FAST = Profile(LinkProfile(12.5, 10.0), CodecProfile(0.5, 1.0, 15.0))
RATES = st.floats(1e-3, 1e6)
PROFILES = st.builds(
    Profile,
    st.builds(LinkProfile, RATES, RATES),
    st.builds(CodecProfile, RATES, RATES, st.floats(1.0, 32.0)),
    st.none() | st.builds(LinkProfile, RATES, RATES),
)


@given(one=PROFILES, other=PROFILES)
def test_a_description_tells_profiles_apart(one, other):
    assert (one.describe() == other.describe()) == (one == other)


def test_a_profile_is_an_object_or_its_file(tmp_path):
    path = tmp_path / "profile.json"
    SLOW.save(path)
    assert all(ReduceOptions(profile=given).machine == SLOW for given in (path, str(path), SLOW))
    with pytest.raises(ValueError, match=r"profile must be given with strategy 'auto'.*got strategy 'two_phase'"):
        qcomm.CompressionState(profile=SLOW, strategy="two_phase")
    with pytest.raises(TypeError, match=r"profile must be a qcomm.collectives.Profile or its file, got int"):
        qcomm.CompressionState(profile=3)
    with pytest.raises(FileNotFoundError):
        qcomm.CompressionState(profile=tmp_path / "nothing.json")


@pytest.mark.parametrize("grid", [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid("paper")])
def test_the_codec_is_checked_before_it_is_believed(grid):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = measure_codec(values, grid, num_threads=2, repeats=2)
    assert found.ratio == pytest.approx(4 * 20_000 / qcomm.compress(values, grid).numel(), rel=0.02)
    with (
        mock.patch.object(machine, "unpack", lambda packet, out, sender, num_threads: out.zero_()),
        pytest.raises(qcomm.CollectiveError, match="the codec is wrong"),
    ):
        measure_codec(values, grid, repeats=1)


@world(4)
@mock.patch.object(machine, "LATENCY_REPEATS", 3)
def test_all_ranks_get_the_slowest_link(rank, world_size):
    transport = GlooTransport(dist.group.WORLD)
    row = range(rank % 2, world_size, 2)
    link, inside = measure_link(transport, row, 10_000, 3), measure_link(transport, [rank - rank % 2, rank | 1], 100, 3)
    profile = slowest(transport, Profile(link, CodecProfile(1.0 + rank, 9.0 - rank, 2.0 + rank), inside))
    assert gathered(profile) == [profile] * world_size
    links = gathered(link)
    assert profile.codec == CodecProfile(1.0, 6.0, 3.5)
    assert profile.link == LinkProfile(min(one.gb_per_s for one in links), max(one.latency_us for one in links))
    assert slowest(transport, Profile(link, CodecProfile(1.0, 1.0, 1.0))).inside is None
    transfer = GlooTransport.transfer

    def damage(self, incoming, outgoing, sources, targets, what):
        transfer(self, incoming, outgoing, sources, targets, what)
        incoming[sources[0]][0] = 77

    with (
        mock.patch.object(GlooTransport, "transfer", damage),
        pytest.raises(qcomm.CollectiveError, match="the link is wrong"),
    ):
        measure_link(transport, row, 10, 1)
    transport.close()


@pytest.fixture
def slow_profile(tmp_path):
    SLOW.save(tmp_path / "slow.json")
    return tmp_path / "slow.json"


@world(3)
def test_auto_tries_what_may_be_fast_on_the_measured_machine(rank, world_size, slow_profile):
    """A profile decides what is tried; without one, or with another, everything may be."""

    def tried(count, **options):
        tried = []
        for _ in range(10):
            work = qcomm.all_reduce(torch.randn(count), async_op=True, **options)
            work.wait()
            tried.append(work.stats()["strategies"][0])
        return set(tried)

    count = 200_000
    assert tried(count, profile=FAST) == {"none", "bf16"}
    # Compression is far ahead on this link; the others are tried all the same: a profile may be old.
    assert tried(count, profile=slow_profile) == {"none", "bf16", "two_phase"}
    assert len(tried(50_001)) == 4
    with pytest.raises(
        qcomm.ConfigMismatchError, match=r"profile: link 0\.0001 GB/s .* on rank 0, None on rank"
    ) as error:
        qcomm.all_reduce(torch.randn(5000), profile=SLOW if rank == 0 else None)
    assert "strategy" not in str(error.value)
    # A file that one rank does not have.
    with pytest.raises(FileNotFoundError if rank == 1 else qcomm.CollectiveError, match="nothing"):
        qcomm.all_reduce(torch.randn(5000), profile=slow_profile.with_name("nothing") if rank == 1 else slow_profile)
    model = wrap()
    qcomm.attach(model, profile=slow_profile)
    assert error_of(model, rank) is None
    model = wrap()
    state = qcomm.attach(model, profile=FAST if rank else SLOW)
    assert "profile: link 0.0001" in str(error_of(model, rank))
    assert isinstance(state.exception(), qcomm.ConfigMismatchError)


QUICK = ["--mib", "0.2", "--message-mib", "0.1", "--repeats", "2"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False, env={"COLUMNS": "160"})


def test_bench_measures_the_codec_of_given_values(tmp_path):
    torch.save(torch.ones(3, 1000).cumsum(1).bfloat16(), tmp_path / "values.pt")
    result = bench(*QUICK, "--data", str(tmp_path / "values.pt"), "--grid", "range", "--c", "2")
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["codec,", "encode"],
        ["codec,", "decode"],
        ["codec,", "ratio"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mib", "0"], "--mib is 0.0; it must be positive"),
        (["--grid", "log"], "--grid is 'log'; it must be one of sigma, range"),
        (["--step", "-1"], "--grid sigma: step must be"),
        (["--data", "cauchy"], "--data is 'cauchy'; it must be one of gauss, laplace, or a file"),
        (["--save-profile", "p.json"], "--save-profile needs a link to measure"),
        (["--ranks", "4", "--ranks-per-node", "3"], "--ranks-per-node is 3; 4 ranks must be several such nodes"),
        (["--ranks", "2", "--mpi"], "--mpi needs the ranks of mpirun"),
    ],
)
def test_bench_says_what_is_wrong(arguments, message):
    result = bench(*QUICK, *arguments)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensor", "is no file of torch.save's"),
        ({"weight": torch.ones(3)}, "must hold a tensor of floating-point values, it holds dict"),
        (torch.tensor([1.0, torch.inf]), "must hold finite values"),
        (torch.empty(0), "must hold a tensor of floating-point values"),
    ],
)
def test_bench_refuses_files_that_hold_no_values(content, message, tmp_path):
    path = tmp_path / "values.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    result = bench(*QUICK, "--data", str(path))
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.world
@pytest.mark.parametrize("how", ["ranks", "mpirun"])
def test_bench_writes_a_profile_that_can_be_read(how, tmp_path):
    path = tmp_path / "profile.json"
    command = ["-m", "qcomm", "bench", *QUICK, "--data", "laplace", "--save-profile", str(path)]
    if how == "ranks":
        command += ["--ranks", "2"]
        ended = subprocess.run(
            [sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=100, check=False
        )
    else:
        ended = find_mpirun()(4, *command, "--mpi", "--ranks-per-node", "2")
    assert ended.returncode == 0, ended.stderr
    profile = Profile.load(path)
    assert profile.codec.ratio > 8 and (profile.inside is None) == (how == "ranks")
    assert f"written to {path}" in ended.stdout
    assert ended.stdout.count("link, rate") == 1 == ended.stdout.count("codec, ratio")
