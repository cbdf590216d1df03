"""State dicts in files: what comes back, what is refused, and what damaged or hostile bytes do."""

import json
import math
import resource
import zlib
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcomm
from qcomm.state_dicts.format import CRC, DTYPES, MAGIC, PREAMBLE, pack_state, unpack_state

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def packed(state, grid=qcomm.RangeGrid(), min_elements=1024, lossless=()):
    return pack_state(state, grid, min_elements, lossless)


def same_bits(a, b):
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def same(a, b):
    """Equal, and of the same types, all the way down; an OrderedDict counts as a dict."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


@st.composite
def tensors(draw):
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(count)).bool()
    content = draw(st.binary(min_size=count, max_size=count))
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[:count].clone().view(dtype).view(shape)


keys = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), tensors()
)
states = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=3),
            st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(states)
def test_what_is_small_comes_back_bit_for_bit(state):
    assert same(state, unpack_state(packed(state)))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1024, 20_000),
    st.sampled_from(FLOATS),
    st.sampled_from([qcomm.RangeGrid(), qcomm.RangeGrid(num_bits=8), qcomm.SigmaGrid(0.25)]),
    st.integers(0, 100),
)
def test_what_is_large_comes_back_within_the_grids_bound(count, dtype, grid, seed):
    weights = (torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)
    data = packed({"w": weights}, grid)
    restored = unpack_state(data)["w"]
    info = qcomm.inspect(qcomm.compress(weights, grid)).segments[0]
    wide = weights.double()
    step = info.step if info.grid == "sigma" else float(wide.max() - wide.min()) / (2**info.num_bits - 1)
    rounding = 2 * torch.finfo(dtype).eps * float(wide.abs().max())
    assert restored.dtype == dtype and float((restored.double() - wide).abs().max()) <= step / 2 + rounding
    assert data.numel() < weights.nbytes + 400


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 5), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 10))


def trained():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_a_model_and_its_optimizer(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "checkpoint.qcomm"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "loss": 0.25}
    qcomm.save(state, path)
    restored = qcomm.load(path)
    other, its_optimizer = network(), torch.optim.AdamW(network().parameters())
    other.load_state_dict(restored["model"])
    its_optimizer.load_state_dict(restored["optimizer"])
    assert restored["epoch"] == 3 and restored["loss"] == 0.25
    assert restored["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    for name, tensor in model.state_dict().items():
        got = other.state_dict()[name]
        if tensor.is_floating_point() and tensor.numel() >= 1024:
            assert 0 < float((got - tensor).abs().max()) <= float(tensor.max() - tensor.min()) / 2**7, name
        else:
            assert same_bits(got, tensor), name
    for number, moments in optimizer.state_dict()["state"].items():
        got = restored["optimizer"]["state"][number]
        assert same_bits(got["exp_avg_sq"], moments["exp_avg_sq"]) and same_bits(got["step"], moments["step"])
        assert same_bits(got["exp_avg"], moments["exp_avg"]) == (moments["exp_avg"].numel() < 1024)


def test_options(tmp_path):
    model, _ = trained()
    sizes = {}
    for name, options in {
        "default": {},
        "fine": {"grid": qcomm.RangeGrid(num_bits=12)},
        "two keys": {"lossless": ["3.*", "0.weight"]},
        "all": {"lossless": ["*"]},
        "nothing small": {"min_elements": 10**9},
    }.items():
        qcomm.save(model.state_dict(), tmp_path / name, **options)
        restored, sizes[name] = qcomm.load(tmp_path / name), (tmp_path / name).stat().st_size
        exact = {key for key, tensor in model.state_dict().items() if same_bits(tensor, restored[key])}
        wanted = set(model.state_dict()) - ({"0.weight", "3.weight"} if name in ("default", "fine") else set())
        assert exact == wanted, name
    raw = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sizes["default"] < raw / 2.5 < sizes["fine"] < raw < sizes["all"] < raw + 4096
    assert sizes["all"] == sizes["nothing small"] == sizes["two keys"]


def test_tied_strided_and_odd_tensors():
    shared = torch.randn(2000)
    state = {
        "a": shared,
        "b": nn.Parameter(shared),
        "part": shared[:1500],
        "channels_last": torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last),
        "expanded": torch.ones(3).expand(50, 3),
        "infinite": torch.full((3000,), float("inf")),
        "nan": torch.where(torch.arange(3000) == 7, float("nan"), torch.randn(3000)),
        "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(5),
    }
    data = packed(state)
    restored = unpack_state(data)
    assert restored["a"] is restored["b"] and restored["part"] is not restored["a"]
    for name in ("expanded", "infinite", "nan", "conjugated", "empty", "scalar"):
        assert same_bits(state[name].resolve_conj(), restored[name]), name
    assert type(restored["b"]) is torch.Tensor
    bound = float(state["channels_last"].max() - state["channels_last"].min()) / 2**7
    assert float((state["channels_last"] - restored["channels_last"]).abs().max()) < bound
    # Wanted exactly in one place and not in the other, it is stored both ways.
    twice = unpack_state(packed({"a": shared, "b": shared}, lossless=["b"]))
    assert same_bits(twice["b"], shared) and not same_bits(twice["a"], shared)


class Money(int):
    pass


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (object(), TypeError, r"state_dict\['a'\]\[1\] is a object"),
        (b"bytes", TypeError, r"state_dict\['a'\]\[1\] is a bytes"),
        ({1, 2}, TypeError, "is a set"),
        (Money(3), TypeError, "is a Money"),
        (torch.Size([3]), TypeError, "is a Size"),
        (2**63, ValueError, "must fit 64 bits"),
        ({1.5: 2}, TypeError, r"keys of state_dict\['a'\]\[1\] must be strings or integers of 64 bits, got 1.5"),
        ({True: 2}, TypeError, "got True"),
        (torch.eye(3).to_sparse(), TypeError, r"state_dict\['a'\]\[1\] must be a dense tensor"),
        (torch.empty(3, device="meta"), TypeError, "on meta"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, value, error, match):
    path = tmp_path / "state"
    path.write_bytes(b"as it was")
    with pytest.raises(error, match=match):
        qcomm.save({"a": [1, value]}, path)
    assert path.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [path]


def test_a_state_that_contains_itself_is_refused(tmp_path):
    endless = {}
    endless["self"] = endless
    with pytest.raises(ValueError, match="deeper than 64 levels; does it contain itself"):
        qcomm.save(endless, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "options", "error", "match"),
    [
        ({}, {"grid": 8}, TypeError, "grid must be"),
        ({}, {"min_elements": -1}, ValueError, "min_elements must be >= 0, got -1"),
        ({}, {"num_threads": 0}, ValueError, "num_threads must be at least 1"),
        ({}, {"lossless": "*.bias"}, TypeError, "lossless must be a sequence of patterns"),
        ([], {}, TypeError, "state_dict must be a dictionary, got list"),
    ],
    ids=["grid", "min_elements", "num_threads", "lossless", "state_dict"],
)
def test_bad_arguments(tmp_path, state, options, error, match):
    with pytest.raises(error, match=match):
        qcomm.save(state, tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        qcomm.save({}, tmp_path / "none" / "x")
    with pytest.raises(FileNotFoundError):
        qcomm.load(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        qcomm.save({"a": torch.ones(3)}, tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_file_that_has_no_room_leaves_the_old_one(tmp_path):
    path, (soft, hard) = tmp_path / "state", resource.getrlimit(resource.RLIMIT_FSIZE)
    qcomm.save({"a": torch.ones(3)}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            qcomm.save({"a": torch.arange(5000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path] and torch.equal(qcomm.load(path)["a"], torch.ones(3))


SAMPLE = {"w": torch.linspace(-1, 1, 1500), "n": torch.arange(3), "list": [1, 2.5, None, ("x", math.inf)]}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_files(tmp_path_factory, data):
    whole = bytes(packed(SAMPLE).tolist())
    kind = data.draw(st.sampled_from(["cut", "flip", "more"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "more":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=20))
    else:
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(qcomm.PacketError, match="damaged: "):
        qcomm.load(path)


def forged(header, payload=b"", header_bytes=None):
    """What an enemy writes: the checksum fits."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = PREAMBLE.pack(MAGIC, len(text) if header_bytes is None else header_bytes) + text
    body += b"\0" * (-len(body) % 8) + payload if payload else b""
    data = torch.frombuffer(bytearray(body + b"\0" * 4), dtype=torch.uint8)
    data[-4:] = torch.frombuffer(bytearray(CRC.pack(zlib.crc32(body))), dtype=torch.uint8)
    return data


def record(**changes):
    return {"coding": "raw", "dtype": "int32", "shape": [1], "bytes": 4, **changes}


PACKET = bytes(qcomm.compress(torch.linspace(0, 1, 2000)).tolist())
HOSTILE = {
    "no json": (b"{", b"", "not JSON"),
    "deep json": (b"[" * 100_000, b"", "not JSON"),
    "endless number": (b"1" * 10_000, b"", "not JSON"),
    "no header": ([], b"", "must have a state"),
    "other keys": ({"state": 1, "tensors": [], "code": "x"}, b"", "must have a state"),
    "no list": ({"state": 1, "tensors": {}}, b"", "must have a state"),
    "record": ({"state": 1, "tensors": [7]}, b"", "describes tensor 0 as 7"),
    "negative size": ({"state": 1, "tensors": [record(shape=[-1])]}, b"abcd", "has the shape"),
    "boolean size": ({"state": 1, "tensors": [record(shape=[True])]}, b"abcd", "has the shape"),
    "dtype": ({"state": 1, "tensors": [record(dtype="object")]}, b"abcd", "has the dtype 'object'"),
    "unhashable dtype": ({"state": 1, "tensors": [record(dtype=[])]}, b"abcd", "has the dtype"),
    "coding": ({"state": 1, "tensors": [record(coding="pickle")]}, b"abcd", "the coding 'pickle'"),
    "bytes": ({"state": 1, "tensors": [record(bytes=3)]}, b"abc", "takes 4 bytes, and the header says 3"),
    "negative bytes": ({"state": 1, "tensors": [record(bytes=-4)]}, b"abcd", "has -4 bytes"),
    "beyond the end": ({"state": 1, "tensors": [record(shape=[2], bytes=8)]}, b"abcd", "more than there are"),
    "left over": ({"state": 1, "tensors": [record()]}, b"abcdefghijkl", "follow the last tensor"),
    "integer packet": ({"state": 1, "tensors": [record(coding="packet")]}, b"abcd", "in a packet"),
    "no packet": ({"state": 1, "tensors": [record(coding="packet", dtype="float32")]}, b"abcd", "tensor 0"),
    "another shape": (
        {"state": 1, "tensors": [record(coding="packet", dtype="float32", shape=[1999], bytes=len(PACKET))]},
        PACKET,
        "tensor 0",
    ),
    "another dtype": (
        {"state": 1, "tensors": [record(coding="packet", dtype="float64", shape=[2000], bytes=len(PACKET))]},
        PACKET,
        "tensor 0",
    ),
    "terabytes": (
        {"state": 1, "tensors": [record(coding="packet", dtype="float32", shape=[2**60], bytes=len(PACKET))]},
        PACKET,
        "no memory for tensor 0",
    ),
    "overflow": (
        {"state": 1, "tensors": [record(coding="packet", dtype="float32", shape=[2**62, 2**62], bytes=len(PACKET))]},
        PACKET,
        "no memory for tensor 0",
    ),
    "boolean": ({"state": 1, "tensors": [record(dtype="bool", bytes=1)]}, b"\2", "other bytes than 0 and 1"),
    "no such tensor": ({"state": {"tensor": 0}, "tensors": []}, b"", "stands for nothing"),
    "negative tensor": ({"state": {"tensor": -1}, "tensors": [record()]}, b"abcd", "stands for nothing"),
    "two kinds": ({"state": {"list": [], "tuple": []}, "tensors": []}, b"", "stands for nothing"),
    "bare list": ({"state": [1], "tensors": []}, b"", "stands for nothing"),
    "bare nan": (b'{"state": NaN, "tensors": []}', b"", "stands for nothing"),
    "float": ({"state": {"float": "1"}, "tensors": []}, b"", "stands for nothing"),
    "one key twice": ({"state": {"dict": [["a", 1], ["a", 2]]}, "tensors": []}, b"", "no pair of a new key"),
    "list as key": ({"state": {"dict": [[[], 1]]}, "tensors": []}, b"", "no pair of a new key"),
    "triple": ({"state": {"dict": [["a", 1, 2]]}, "tensors": []}, b"", "no pair of a new key"),
    "empty of 2^124": ({"state": 1, "tensors": [record(shape=[2**62, 2**62, 0], bytes=0)]}, b"", "tensor 0"),
    "boolean as a number": ({"state": {"tensor": True}, "tensors": [record()] * 2}, b"a" * 12, "stands for nothing"),
    "bytes that are no integer": ({"state": 1, "tensors": [record(bytes=4.0)]}, b"abcd", "tensor 0"),
    "no UTF-8": (b'{"state": {"dict": [["\xff", 1]]}, "tensors": []}', b"", "not JSON"),
    "a key of the header twice": (b'{"state": 1, "tensors": [], "tensors": [7]}', b"", "tensor 0"),
    "a number without end": (b'{"state": 1e999, "tensors": []}', b"", "stands for nothing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name):
    header, payload, match = HOSTILE[name]
    with pytest.raises(qcomm.PacketError, match=match):
        unpack_state(forged(header, payload))


@pytest.mark.parametrize("claimed", [0, 1, 10**6, 2**64 - 1])
def test_a_header_of_another_size_than_it_claims(claimed):
    with pytest.raises(qcomm.PacketError, match=r"claims|not JSON"):
        unpack_state(forged({"state": 1, "tensors": []}, header_bytes=claimed))


def test_a_state_that_is_too_deep():
    state = 1
    for _ in range(80):
        state = {"list": [state]}
    with pytest.raises(qcomm.PacketError, match="deeper than 64"):
        unpack_state(forged({"state": state, "tensors": []}))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (bytes(forged({"state": 1, "tensors": []}).tolist()), "holds no dictionary"),
        (b"PK\3\4 a zip file, as torch.save writes", "state: a state dict begins with"),
    ],
    ids=["a_number", "a_zip_file"],
)
def test_files_of_something_else(tmp_path, content, match):
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(qcomm.PacketError, match=match):
        qcomm.load(path)


def test_a_small_file_of_large_tensors(tmp_path):
    path = tmp_path / "zeros"
    qcomm.save({"zeros": torch.zeros(10**6)}, path)
    assert path.stat().st_size < 400
    with pytest.raises(qcomm.PacketError, match="take 4000000 bytes, more than max_bytes=3999999"):
        qcomm.load(path, max_bytes=3_999_999)
    assert qcomm.load(path, max_bytes=4_000_000)["zeros"].numel() == 10**6
