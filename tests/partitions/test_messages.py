"""Headers and batches from a peer that lies, sends damaged bytes, or asks for memory."""

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.partitions import messages
from qcomm.partitions.messages import HEADER_BYTES, WORDS, Kind, control, decoded, encoded, end_header, parsed
from qcomm.partitions.stage import Batch

LIMIT = 1 << 20
EXPECTED = (Kind.BATCH, Kind.END)


def batch(*shape, dtype=torch.float32, label_dtype=torch.int64):
    values = torch.randn(*shape).to(dtype)
    return Batch(values, torch.arange(shape[0]).to(label_dtype))


def altered(header, **words):
    """The header with some of its words, ``w5=...``, replaced under a right checksum."""
    found = list(WORDS.unpack(bytes(header.numpy())))
    for name, value in words.items():
        found[int(name[1:])] = value
    raw = messages.CHECKED.pack(*found[:-1])
    return torch.frombuffer(bytearray(raw + struct.pack("<q", zlib.crc32(raw))), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", messages.FEATURE_DTYPES)
@pytest.mark.parametrize("label_dtype", messages.LABEL_DTYPES)
@pytest.mark.parametrize("shape", [(1,), (31, 1), (4, 3, 5, 7), (2, 1, 1, 1, 1, 3)])
def test_round_trip(dtype, label_dtype, shape):
    sent = batch(*shape, dtype=dtype, label_dtype=label_dtype)
    header, payload = encoded(sent, None, 3, 4, LIMIT)
    found = decoded(parsed(header, EXPECTED, 3, 4, LIMIT), payload)
    assert torch.equal(found.values, sent.values) and found.values.dtype == dtype
    assert torch.equal(found.labels, sent.labels) and found.labels.dtype == label_dtype


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 5000])
def test_compressed_values_are_the_codecs_and_labels_are_exact(bits, size):
    sent, grid = batch(3, size), qcomm.RangeGrid(num_bits=bits)
    header, payload = encoded(sent, grid, 0, 0, LIMIT)
    found = decoded(parsed(header, EXPECTED, 0, 0, LIMIT), payload)
    assert torch.equal(found.values, qcomm.decompress(qcomm.compress(sent.values, grid)))
    assert torch.equal(found.labels, sent.labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_arrive(value):
    sent = batch(8, 100)
    sent.values[3, 5] = value
    header, payload = encoded(sent, qcomm.RangeGrid(num_bits=6), 0, 0, LIMIT)
    assert torch.equal(
        decoded(parsed(header, EXPECTED, 0, 0, LIMIT), payload).values.nan_to_num(), sent.values.nan_to_num()
    )


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"w0": 7}, "a header starts with"),
        ({"w1": Kind.CREDIT}, "a header starts with"),
        ({"w1": 99}, "a header starts with"),
        ({"w2": 1}, "BATCH or END 0 of epoch 0 is due"),
        ({"w3": 1}, "BATCH or END 0 of epoch 0 is due"),
        ({"w4": 4}, "describes no tensors"),
        ({"w4": -1}, "describes no tensors"),
        ({"w5": 7}, "describes no tensors"),
        ({"w5": 0}, "describes no tensors"),
        ({"w12": 6}, "describes no tensors"),
        ({"w13": 5}, "describes no tensors"),
        ({"w18": 2}, "describes no tensors"),
        ({"w6": -4}, "not of equally many samples"),
        ({"w6": 5}, "not of equally many samples"),
        ({"w7": 0}, "not of equally many samples"),
        ({"w7": 1 << 62}, "above max_batch_bytes=1048576"),
        ({"w6": 1 << 62, "w14": 1 << 62}, "above max_batch_bytes=1048576"),
        ({"w19": 3}, "take 3 bytes"),
        ({"w19": -1}, "take -1 bytes"),
        ({"w18": 1, "w19": 4 * 4 * 9 + 129}, "take 273 bytes"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_asked_for(words, match):
    header, _ = encoded(batch(4, 9), None, 0, 0, LIMIT)
    assert parsed(header, EXPECTED, 0, 0, LIMIT).payload_bytes == 4 * 4 * 9 + 8 * 4
    with pytest.raises(qcomm.PacketError, match=match):
        parsed(altered(header, **words), EXPECTED, 0, 0, LIMIT)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), right=st.booleans())
def test_arbitrary_headers(data, right):
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with pytest.raises(qcomm.PacketError):
        parsed(altered(message, w0=messages.MAGIC) if right else message, EXPECTED, 0, 0, LIMIT)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.integers(-2, 9) | st.integers(-(2**63), 2**63 - 1), min_size=17, max_size=17))
def test_arbitrary_descriptions_are_refused_or_within_the_limit(words):
    header = altered(control(Kind.BATCH, 0, 0), **{f"w{4 + place}": word for place, word in enumerate(words)})
    try:
        found = parsed(header, EXPECTED, 0, 0, LIMIT)
    except qcomm.PacketError:
        return
    assert 0 < found.payload_bytes <= LIMIT + messages.PACKET_OVERHEAD


@pytest.mark.parametrize("place", [0, 10, 100, HEADER_BYTES - 1])
def test_a_flipped_bit_in_a_header_is_found(place):
    header, _ = encoded(batch(4, 9), None, 0, 0, LIMIT)
    header[place] ^= 4
    with pytest.raises(qcomm.PacketError, match="a header was damaged on its way"):
        parsed(header, EXPECTED, 0, 0, LIMIT)


@pytest.mark.parametrize("grid", [None, qcomm.RangeGrid(num_bits=6)])
def test_a_flipped_bit_in_a_batch_is_found(grid):
    header, payload = encoded(batch(4, 50), grid, 0, 0, LIMIT)
    for place in (0, payload.numel() // 2, payload.numel() - 1):
        damaged = payload.clone()
        damaged[place] ^= 4
        with pytest.raises(qcomm.PacketError, match="a batch was damaged on its way"):
            decoded(parsed(header, EXPECTED, 0, 0, LIMIT), damaged)


def test_a_packet_of_other_values_under_a_right_checksum():
    header, _ = encoded(batch(4, 50), qcomm.RangeGrid(num_bits=6), 0, 0, LIMIT)
    for other in (torch.zeros(5, 50), torch.zeros(4, 50, dtype=torch.float64), torch.zeros(1 << 20)):
        payload = torch.cat([qcomm.compress(other), torch.zeros(32, dtype=torch.uint8)])
        lying = parsed(header, EXPECTED, 0, 0, LIMIT)._replace(
            feature_bytes=payload.numel() - 32, checksum=zlib.crc32(payload.numpy().data)
        )
        with pytest.raises(qcomm.PacketError, match=r"a packet holds|claims"):
            decoded(lying, payload)


def test_ends_and_credits():
    assert parsed(end_header(2, 7), EXPECTED, 2, 7, LIMIT).kind == Kind.END
    assert parsed(control(Kind.DONE, 2, 7), (Kind.DONE,), 2, 7, 0).payload_bytes == 0
    with pytest.raises(qcomm.PacketError, match="END 7 of epoch 2 is due"):
        parsed(end_header(2, 6), (Kind.END,), 2, 7, LIMIT)


@pytest.mark.parametrize(
    ("values", "labels", "error", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), TypeError, "features must be of one of"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64), TypeError, "labels must be of one of"),
        (torch.zeros(()), torch.zeros(1), ValueError, "features must have 1 to 6 dimensions"),
        (torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(1), ValueError, "features must have 1 to 6 dimensions"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, "must be of equally many samples"),
        (torch.zeros(0, 3), torch.zeros(0), ValueError, "at least one"),
        (torch.zeros(2, 1 << 18), torch.zeros(2), ValueError, "max_batch_bytes is 1048576; a batch has 2097160 bytes"),
    ],
)
def test_a_batch_that_cannot_be_sent_is_refused_here(values, labels, error, match):
    with pytest.raises(error, match=match):
        encoded(Batch(values, labels), None, 0, 0, LIMIT)
