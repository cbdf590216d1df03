"""The agreement on keys: who passes it, what an attacker on the wires can do to it, and what recorded bytes reveal."""

import secrets
import struct
import traceback
import zlib

import pytest
import torch
from wires import Wires, on_all_ranks

import qcomm
from qcomm.communicator.handshake import header_checksum
from qcomm.transport import ConnectionOptions, KeyFile, TransportError, secure
from qcomm.transport.sealed import SealedTransport
from qcomm.transport.secure import CHECKSUM, GREETING

pytest.importorskip("cryptography", reason="cryptography is not installed")

GREETING_BYTES = GREETING.size + CHECKSUM.size
UNPROVEN = r"rank(s) {} did not prove to have the same secret: give every rank a copy of one key file"


@pytest.fixture
def keys(tmp_path):
    """Three key files."""
    made = []
    for number in range(3):
        path = tmp_path / f"key{number}"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        made.append(KeyFile.of(path))
    return made


def agree(secrets_of_ranks, meddle=None, world_size=None):
    """The secured transport or the error of each rank, and the wires."""
    wires = Wires()
    wires.meddle = meddle
    world_size = len(secrets_of_ranks) if world_size is None else world_size
    return on_all_ranks(world_size, lambda t: secure(t, ConnectionOptions(secrets_of_ranks[t.rank])), wires), wires


def greet_again(public_key, has=1, magic=None):
    """Changes a greeting, with the right checksum."""

    def change(data):
        words = GREETING.pack(magic or GREETING.unpack_from(data)[0], has, public_key, 1)
        return words + struct.pack("<q", zlib.crc32(words))

    return change


def between(change, source=0, target=1):
    """Meddles with the greeting from one rank to another, its first message."""
    seen = []

    def meddle(sender, receiver, tag, data):
        if (sender, receiver) != (source, target) or seen:
            return [data]
        seen.append(data)
        return [change(data)]

    return meddle


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_with_one_secret_talk(keys, world_size):
    def talk(transport):
        sealed = secure(transport, ConnectionOptions(keys[0]))
        assert isinstance(sealed, SealedTransport)
        outgoing = [torch.tensor([100 * transport.rank + peer]) for peer in range(world_size)]
        return torch.cat(sealed.exchange_small(outgoing, "testing")).tolist()

    found = on_all_ranks(world_size, talk)
    assert found == [[100 * peer + rank for peer in range(world_size)] for rank in range(world_size)]


def test_without_a_secret_the_transport_stays():
    found, _ = agree([None] * 3)
    assert not any(isinstance(transport, (SealedTransport, Exception)) for transport in found)
    [alone] = on_all_ranks(1, lambda transport: secure(transport, ConnectionOptions()) is transport)
    assert alone is True


@pytest.mark.parametrize("stranger", [0, 1, 2])
def test_a_rank_with_another_secret_is_named_by_all(keys, stranger):
    errors, _ = agree([keys[rank == stranger] for rank in range(3)])
    for rank, error in enumerate(errors):
        others = [10 + other for other in range(3) if other != rank and stranger in (rank, other)]
        assert isinstance(error, TransportError)
        assert UNPROVEN.format(", ".join(map(str, others))) in str(error), error


@pytest.mark.parametrize("stranger", [0, 2])
def test_a_rank_without_a_secret_is_named_by_all(keys, stranger):
    errors, _ = agree([None if rank == stranger else keys[0] for rank in range(3)])
    others = ", ".join(str(10 + rank) for rank in range(3) if rank != stranger)
    for rank, error in enumerate(errors):
        assert isinstance(error, qcomm.ConfigMismatchError)
        said = f"rank {10 + rank} has none, rank(s) {others} have one"
        if rank != stranger:
            said = f"rank {10 + rank} has one, rank(s) {10 + stranger} have none"
        assert f"differently in secret: {said}. Every rank must pass" in str(error)


def test_no_error_has_the_secret_in_its_variables(keys):
    """Some handlers show the variables of every frame of a traceback."""
    low_order = between(greet_again(bytes(32)))
    for files, meddle in (([keys[0], keys[1]], None), ([keys[0], None], None), ([keys[0]] * 2, low_order)):
        errors, _ = agree(files, meddle)
        for error in errors:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            shown = repr([frame.f_locals for frame in frames])
            assert "_seal" in [frame.f_code.co_name for frame in frames] or isinstance(error, qcomm.ConfigMismatchError)
            assert not any(file.read().decode() in shown for file in keys)


def test_a_secret_that_is_gone_is_that_ranks_error(keys):
    keys[0].path.unlink()
    [error] = on_all_ranks(2, lambda t: secure(t, ConnectionOptions(keys[0])))[:1]
    assert isinstance(error, FileNotFoundError)


def test_keys_are_of_one_direction_of_one_pair_of_one_run(keys):
    """So that nothing opens elsewhere, and no nonce meets another message with the same key."""
    seen = set()
    for _ in range(2):
        _, wires = agree([keys[0]] * 3)
        proofs = [data for _, _, _, data in wires.carried if len(data) != GREETING_BYTES]
        assert len(proofs) == 6  # all of one byte, 0, at the same place
        seen.update(proofs)
    assert len(seen) == 12


@pytest.mark.parametrize("field", range(16, 48), ids=lambda byte: f"byte {byte}")
def test_an_altered_public_key_is_noticed_on_both_sides(keys, field):
    def change(data):
        key = bytearray(GREETING.unpack_from(data)[2])
        key[field - 16] ^= 1
        return greet_again(bytes(key))(data)

    errors, _ = agree([keys[0]] * 2, between(change))
    # Of the last byte's top bit X25519 takes no notice, but the keys do.
    assert UNPROVEN.format(11) in str(errors[0]) and UNPROVEN.format(10) in str(errors[1])


LOW_ORDER = [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_public_key_that_gives_everybody_the_same_result_is_refused(keys, point):
    errors, _ = agree([keys[0]] * 2, between(greet_again(point.to_bytes(32, "little"))))
    assert UNPROVEN.format(10) in str(errors[1])


def test_an_attacker_between_two_ranks_gets_nowhere(keys):
    """It greets both with keys of its own, but lacks the secret that is mixed in."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    own = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def meddle(source, target, tag, data):
        return [greet_again(own)(data) if len(data) == GREETING_BYTES else data]

    errors, _ = agree([keys[0]] * 2, meddle)
    assert UNPROVEN.format(11) in str(errors[0]) and UNPROVEN.format(10) in str(errors[1])


def test_an_attacker_that_sends_everything_back_gets_nowhere(keys):
    """Rank 0 hears itself, with the same secret; rank 1 hears nothing but itself, too."""
    wires = Wires()

    def reflect(source, target, tag, data):
        wires.queue_of(target, source, tag).put(data)
        return []

    wires.meddle = reflect
    errors = on_all_ranks(2, lambda t: secure(t, ConnectionOptions(keys[0])), wires)
    assert all(isinstance(error, TransportError) for error in errors)  # the slower one hears that the other has left
    assert UNPROVEN.format(11) in str(errors[0]) or UNPROVEN.format(10) in str(errors[1])


def test_a_recorded_run_does_not_open_the_next(keys):
    """Rank 0's greeting and proof are those of an earlier run."""
    _, earlier = agree([keys[0]] * 2)
    old = [data for source, _, _, data in earlier.carried if source == 0]
    left = list(old)
    errors, _ = agree([keys[0]] * 2, lambda source, target, tag, data: [left.pop(0) if source == 0 else data])
    assert UNPROVEN.format(10) in str(errors[1])


def test_a_link_cannot_be_talked_out_of_its_secret(keys):
    errors, _ = agree([keys[0]] * 2, between(greet_again(bytes(32), has=0)))
    assert isinstance(errors[1], qcomm.ConfigMismatchError)


@pytest.mark.parametrize("secret", [False, True], ids=["open", "sealed"])
def test_a_damaged_greeting_and_that_of_another_version(keys, secret):
    secrets_of_ranks = [keys[0] if secret else None] * 2
    for change in (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], greet_again(bytes(32), has=2)):
        errors, _ = agree(secrets_of_ranks, between(change))
        assert "the greeting of rank 10 was damaged, or that rank runs another version" in str(errors[1])
    errors, _ = agree(secrets_of_ranks, between(greet_again(bytes(32), magic=7)))
    assert "another version of qcomm" in str(errors[1])


def test_a_version_without_greetings_takes_one_for_a_header():
    """So that its rank says that versions differ; gloo would end a process whose buffer is too small."""
    _, wires = agree([None] * 2)
    for *_, data in wires.carried:
        words = struct.unpack("<10q", data)
        assert len(data) == GREETING_BYTES and words[-1] == header_checksum(words[:-1])


def test_recorded_bytes_do_not_open_with_the_secret_alone(keys):
    """Forward secrecy: the private keys of a run are not in its messages, nor derived from the secret."""
    _, wires = agree([keys[0]] * 2)
    _, again = agree([keys[0]] * 2)
    messages = [data for *_, data in wires.carried + again.carried]
    public = {GREETING.unpack_from(data)[2] for data in messages if len(data) == GREETING_BYTES}
    assert len(public) == 4
