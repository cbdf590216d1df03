"""Key files: what counts as a secret, who may read it, and where its bytes never appear."""

import builtins
import copy
import os
import pickle
import secrets
import traceback
from pathlib import Path

import pytest
import torch

import qcomm
from qcomm.collectives import ReduceOptions
from qcomm.transport import KeyFile

pytest.importorskip("cryptography", reason="cryptography is not installed")


def write(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def key(tmp_path):
    return write(tmp_path / "key", secrets.token_hex(32).encode() + b"\n")


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"0123456789abcdef" * 4 + b"\n", b"0123456789abcdef" * 4),
        (b"0123456789ABCDEF" * 4 + b"\r\n", b"0123456789ABCDEF" * 4),
        (b"mHhKbZ0l3pQ2vUuYcT8rWxNqAeSdFgJiOoLkMnBv0Cw=", b"mHhKbZ0l3pQ2vUuYcT8rWxNqAeSdFgJiOoLkMnBv0Cw="),
        (bytes(range(225, 256)) + b"\n", bytes(range(225, 256)) + b"\n"),  # no text, so this is no line's end
    ],
    ids=["hexadecimal", "hexadecimal of Windows", "base64", "bytes"],
)
def test_secrets_as_text_and_as_bytes(tmp_path, content, secret):
    assert KeyFile.of(write(tmp_path / "key", content)).read() == secret


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"x" * 31, b"0123456789abcdef" * 3, b"0123456789abcdef" * 4 + b"\n" * 5000, bytes(32), b"ab" * 100],
    ids=["empty", "a line", "short", "24 bytes in hexadecimal", "long", "zeros", "a pattern"],
)
def test_what_is_no_secret_is_refused(tmp_path, content):
    path = write(tmp_path / "key", content)
    with pytest.raises(ValueError, match=r"secret must be a file of at least 32 random bytes"):
        KeyFile.of(path)


def test_an_error_says_how_to_make_a_key(tmp_path):
    with pytest.raises(ValueError, match=r"key is none: make one with .*openssl rand -hex 32 > key") as caught:
        KeyFile.of(write(tmp_path / "key", b"correct horse battery staple"))
    assert "horse" not in str(caught.value)
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert len(frames) > 2 and not any("horse" in repr(frame.f_locals) for frame in frames[1:])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_file_that_others_may_use_is_refused(key, mode):
    key.chmod(mode)
    with pytest.raises(ValueError, match=rf"secret must be a file that its owner alone can read, .* is {mode:04o}"):
        KeyFile.of(key)


def test_what_is_no_file_is_refused(tmp_path, key):
    with pytest.raises(FileNotFoundError):
        KeyFile.of(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        KeyFile.of(tmp_path)
    with pytest.raises(ValueError, match="must be a regular file, /dev/zero is none"):
        KeyFile.of("/dev/zero")
    for secret in (key.read_bytes(), 7, ["key"], True):
        with pytest.raises(TypeError, match="secret must be the path of a key file or None, got"):
            ReduceOptions(secret=secret)


def test_all_paths_of_a_file_are_one_secret(key, monkeypatch):
    monkeypatch.chdir(key.parent)
    monkeypatch.setenv("HOME", str(key.parent))
    (key.parent / "folder").mkdir()
    (key.parent / "link").symlink_to(key)
    paths = ["key", "~/key", key, "folder/../key", "link", KeyFile(Path("key"))]
    assert {KeyFile.of(path) for path in paths} == {KeyFile(key.resolve())}


def test_the_extra_is_named_where_it_is_missing(key, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"secret needs the package cryptography: pip install 'qcomm\[secure\]'"):
        ReduceOptions(secret=key)


def test_without_a_secret_nothing_of_the_extra_is_imported(monkeypatch):
    importing = builtins.__import__

    def forbid(name, *arguments):
        assert not name.startswith("cryptography")
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", forbid)
    assert ReduceOptions().key_file is None


def test_the_secret_stays_in_its_file(key):
    """Not in options, states, pickles, fields, representations, and what a copy of the state says."""
    secret = key.read_text().strip()
    options = ReduceOptions(secret=key)
    state = qcomm.CompressionState(secret=str(key), strategy="two_phase")
    with pytest.warns(UserWarning, match="pickled"):
        shown = [pickle.dumps(state), repr(state.__dict__), repr(copy.deepcopy(state).options)]
    shown += [
        repr(options),
        str(options.describe()),
        repr(state.state_dict()),
        repr(state.stats()),
        pickle.dumps(options),
    ]
    for text in shown:
        assert (secret.encode() if isinstance(text, bytes) else secret) not in text
    assert "secret" not in options.describe()
    assert pickle.loads(pickle.dumps(options)).key_file == KeyFile(key)


def test_options_keep_their_secret_when_others_change(key):
    state = qcomm.CompressionState(secret=key)
    state.reconfigure(grid=qcomm.SigmaGrid(step=2.0))
    assert state.options.key_file == KeyFile(key) and state.options.for_world(4).key_file == KeyFile(key)


def test_messages_of_the_device_codec_are_not_sealed(key):
    from qcomm.collectives_cuda import check_device_options

    check_device_options(ReduceOptions())
    with pytest.raises(ValueError, match=f"secret must be None with device_codec, .* got {key}"):
        check_device_options(ReduceOptions(secret=key))


def test_a_file_that_cannot_be_read(key):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    key.chmod(0)
    with pytest.raises(PermissionError):
        KeyFile.of(key)


def test_a_secret_of_one_rank_alone_has_nobody_to_meet(tmp_path, key):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tensor = torch.linspace(-1, 1, 5000)
        qcomm.all_reduce(tensor, strategy="two_phase", secret=key)
        with pytest.raises(
            ValueError, match=f"secret must be the same .* got none: its ranks are connected with {key}"
        ):
            qcomm.all_reduce(tensor, strategy="two_phase")
        other = write(Path(tmp_path / "other"), secrets.token_bytes(32))
        with pytest.raises(ValueError, match=f"got {other}: its ranks are connected with {key}"):
            qcomm.all_reduce(tensor, strategy="two_phase", secret=other)
    finally:
        torch.distributed.destroy_process_group()
