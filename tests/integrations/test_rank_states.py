"""Every rank's residuals in a framework's checkpoint: gathered by rank 0, or in a file of each rank.

No framework is needed here.
"""

import copy
import io
import random
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from damaged_files import flipped, truncated, with_other_pickles
from ddp_model import backward, wrap
from distributed import gathered, run, world

import qcomm
from qcomm.integrations import GatheredState, rank_files

OPTIONS = {"strategy": "two_phase", "min_elements": 100}


def trained(rank, steps, kind=qcomm.CompressionState):
    model = wrap()
    state = qcomm.attach(model, state=kind(**OPTIONS))
    for step in range(steps):
        backward(model, rank, step)
    return model, state


def kept(states, world_size):
    """By parameter the sum over ranks of what is still to be sent, from the states' feedback."""
    total = {}
    for state in states:
        for name, residual in state["local"].items():
            total[name] = total.get(name, 0) + residual.double() / world_size
        for name, (start, residual) in state["owner"].items():
            total[name][start : start + residual.numel()] += residual.double()
    return total


def feedback_of(state):
    return copy.deepcopy(qcomm.CompressionState.state_dict(state)["error_feedback"])


def same(one, other):
    """Whether two results of ``feedback_of`` have the same bits."""
    parts = [
        {**state["local"], **{(key, part[0]): part[1] for key, part in state["owner"].items()}}
        for state in (one, other)
    ]
    return parts[0].keys() == parts[1].keys() and all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])


def saves(rank, world_size, folder):
    _, state = trained(rank, 3, GatheredState)
    rank_files.save(folder, state)
    everything = state.state_dict()
    names = [f"rank {number} of {world_size}" for number in range(world_size)]
    assert list(everything) == (names if rank == 0 else [names[rank]])
    if rank == 0:
        torch.save(everything, f"{folder}/gathered.pt")
    return feedback_of(state)


def loads(rank, world_size, folder, how):
    model, state = trained(rank, 0, GatheredState)
    if how == "files":
        assert rank_files.load(folder, state)
    else:
        state.load_state_dict(torch.load(f"{folder}/gathered.pt", weights_only=True))
    loaded = feedback_of(state)
    backward(model, rank, 3)  # ranks agree that they go on from the same step
    assert state.stats()["steps"] == 1
    return loaded


@pytest.mark.world
@pytest.mark.parametrize("how", ["files", "gathered"])
@pytest.mark.parametrize(("old", "new"), [(2, 2), (2, 3), (3, 2)])
def test_residuals_survive_with_any_number_of_ranks(tmp_path, old, new, how):
    saved = run(old, saves, str(tmp_path))
    loaded = run(new, loads, str(tmp_path), how)
    before, after = kept(saved, old), kept(loaded, old)  # the next exchange scales them
    assert before.keys() == after.keys() and before
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=0, atol=1e-6), name
        assert bool(value.any()), name
    if old == new:
        for mine, yours in zip(saved, loaded, strict=True):
            assert all(torch.equal(yours["local"][name], residual) for name, residual in mine["local"].items())


@world(2)
def test_a_resumed_run_is_bit_exact_with_files(rank, world_size, tmp_path):
    model, state = trained(rank, 4)
    rank_files.save(tmp_path, state)
    expected = backward(model, rank, 4)
    model, state = trained(rank, 0)
    assert rank_files.load(tmp_path, state)
    assert all(map(torch.equal, backward(model, rank, 4), expected))


@world(2)
def test_a_folder_without_files_changes_nothing(rank, world_size, tmp_path):
    _, state = trained(rank, 2)
    before = feedback_of(state)
    assert not rank_files.load(tmp_path, state)
    assert not rank_files.load(tmp_path / "absent", state)
    rank_files.save(tmp_path, state, index=1)  # of another model
    dist.barrier()
    assert not rank_files.load(tmp_path, state)
    assert all(torch.equal(feedback_of(state)["local"][name], value) for name, value in before["local"].items())


@world(2)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "missing",
            "rank 1: ValueError: a checkpoint must hold the state of every rank of one job, got .'rank 0 of 2'",
        ),
        ("truncated", r"rank 1: ValueError: qcomm_0_rank_1_of_2.pt is damaged, or of another kind: BadZipFile: "),
        ("a flipped bit", r"rank 1: ValueError: qcomm_0_rank_1_of_2.pt is damaged, .* has another checksum"),
        ("of another rank", "rank 1: ValueError: qcomm_0_rank_1_of_2.pt must hold the state of rank 1 of 2, got"),
        ("no dictionary", "rank 1: ValueError: qcomm_0_rank_1_of_2.pt must hold the state of rank 1 of 2, got 5"),
        ("not finite", "rank 1: ValueError: state is damaged: .* not finite"),
        ("code", "rank 1: ValueError: qcomm_0_rank_1_of_2.pt is .*: UnpicklingError: Weights only load failed"),
        ("elsewhere", "rank 1: no file of it"),
    ],
)
def test_a_file_that_one_rank_cannot_load_is_an_error_on_all(rank, world_size, tmp_path, damage, message):
    _, state = trained(rank, 2)
    folder = tmp_path / str(rank)  # as on machines without a common file system
    rank_files.save(folder, state)
    file = folder / f"qcomm_0_rank_{rank}_of_2.pt"
    if rank == 1:
        saved = torch.load(file, weights_only=True)
        if damage in ("missing", "elsewhere"):
            file.unlink()
        if damage == "missing":
            torch.save({"rank 0 of 2": ()}, folder / "qcomm_0_rank_0_of_2.pt")
        elif damage == "truncated":
            file.write_bytes(file.read_bytes()[:100])
        elif damage == "a flipped bit":
            residual = next(iter(saved["rank 1 of 2"][0]["error_feedback"]["local"].values())).numpy().tobytes()
            content = file.read_bytes()
            file.write_bytes(content.replace(residual, bytes([residual[0] ^ 1]) + residual[1:]))
        elif damage == "of another rank":
            torch.save({"rank 0 of 2": saved["rank 1 of 2"]}, file)
        elif damage == "no dictionary":
            torch.save(5, file)
        elif damage == "not finite":
            next(iter(saved["rank 1 of 2"][0]["error_feedback"]["local"].values()))[0] = float("nan")
            torch.save(saved, file)
        elif damage == "code":
            torch.save(Path("x"), file)
    model, state = trained(rank, 1)
    before = feedback_of(state)
    with pytest.raises(ValueError, match=message) as caught:
        rank_files.load(folder, state)
    assert str(caught.value).startswith(str(folder)) and "rank 0" not in str(caught.value).partition("of the ranks")[0]
    # Also on rank 0, whose file is whole, nothing has changed: ranks go on from one step.
    assert same(feedback_of(state), before)
    backward(model, rank, 1)
    assert state.stats()["steps"] == 2


@world(2)
def test_saving_replaces_files_and_removes_those_of_other_numbers_of_ranks(rank, world_size, tmp_path):
    _, state = trained(rank, 2)
    if rank == 0:
        for name in ("qcomm_0_rank_2_of_3.pt", "qcomm_1_rank_2_of_3.pt", "qcomm_notes.pt"):
            (tmp_path / name).write_bytes(b"")
    dist.barrier()
    rank_files.save(tmp_path, state)
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "qcomm_0_rank_0_of_2.pt",
        "qcomm_0_rank_1_of_2.pt",
        "qcomm_1_rank_2_of_3.pt",
        "qcomm_notes.pt",
    ]
    dist.barrier()
    before = (tmp_path / f"qcomm_0_rank_{rank}_of_2.pt").read_bytes()
    with mock.patch("torch.save", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        rank_files.save(tmp_path, state)
    dist.barrier()
    assert (tmp_path / f"qcomm_0_rank_{rank}_of_2.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


@world(2)
def test_a_rank_that_fails_after_the_agreement_is_an_error_on_all(rank, world_size, tmp_path):
    _, state = trained(rank, 2)
    rank_files.save(tmp_path, state)
    error = {"side_effect": MemoryError("no memory")} if rank == 1 else {}
    with (
        mock.patch.object(qcomm.CompressionState, "load_state_dict", **error),
        pytest.raises(ValueError, match="cannot be loaded: rank 1: MemoryError: no memory"),
    ):
        rank_files.load(tmp_path, state)


def alone():
    """A state of one process, with residuals."""
    state = qcomm.CompressionState(**OPTIONS)
    values = torch.Generator().manual_seed(5)
    local = {"a": torch.randn(40, generator=values), "b": torch.randn(9, generator=values)}
    rms = {"local": {"a": 0.5}, "owner": {}}
    feedback = {"format": 2, "world_size": 1, "local": local, "owner": {"a": (8, local["a"][:20].clone())}, "rms": rms}
    entries = {"format": 2, "steps": 3, "run": "one", "has_names": True, "world_size": 1, "error_feedback": feedback}
    state.load_state_dict({"rank 0 of 1": (entries,)})
    return state


def refusal(folder, state):
    """The error of a load, "" without one."""
    try:
        assert rank_files.load(folder, state)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_whatever_is_in_a_file_is_a_value_error_or_the_state_that_was_saved(tmp_path):
    """Every kind of damage that can reach one rank alone, while the others wait for its answer."""
    state = alone()
    saved = feedback_of(state)
    rank_files.save(tmp_path, state)
    (file,) = tmp_path.iterdir()
    whole, dice, refused = file.read_bytes(), random.Random(3), 0
    for damaged in [*flipped(whole, dice, 600), *truncated(whole, dice, 60), *with_other_pickles(whole, dice, 600)]:
        file.write_bytes(damaged.content)
        before = feedback_of(state)
        if text := refusal(tmp_path, state):
            assert "qcomm's files of the ranks cannot be loaded: rank 0: " in text
            assert same(feedback_of(state), before)
            refused += 1
        else:
            assert damaged.has_checksums or same(feedback_of(state), saved)
    assert refused > 600


def test_what_a_killed_process_left_is_removed_by_the_next_one_of_its_rank(tmp_path):
    left = f".qcomm_0_rank_0_of_1.pt.{'0a' * 8}"
    others = [
        f".qcomm_0_rank_1_of_2.pt.{'0a' * 8}",
        f".qcomm_1_rank_0_of_1.pt.{'0a' * 8}",
        ".qcomm_0_rank_0_of_1.pt.old",
    ]
    for name in (left, *others):
        (tmp_path / name).write_bytes(b"")
    rank_files.save(tmp_path, alone())
    assert {path.name for path in tmp_path.iterdir()} == {"qcomm_0_rank_0_of_1.pt", *others}


@world(2)
def test_a_gathered_state_that_lacks_ranks_is_refused(rank, world_size):
    _, state = trained(rank, 2, GatheredState)
    everything = gathered(state.state_dict())[0]
    if rank == 1:
        del everything["rank 1 of 2"]
        with pytest.raises(ValueError, match="a checkpoint must hold the state of every rank of one job"):
            state.load_state_dict(everything)
    with pytest.raises(ValueError, match="a checkpoint must hold the state of every rank of one job, got"):
        state.load_state_dict({3: 4})
    # This rank's own is enough, also as torch.save and torch.load return it, and with entries set beside it.
    file = io.BytesIO()
    torch.save(qcomm.CompressionState.state_dict(state), file)
    file.seek(0)
    state.load_state_dict({**torch.load(file, weights_only=True), "error_feedback": None})
    assert state.stats()["residual_norm"] == 0


def test_a_state_that_rank_0_gathers_has_no_secret(tmp_path):
    """Its parts would travel unsealed."""
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("00112233445566778899aabbccddeeff" * 2)
    with pytest.raises(ValueError, match=f"secret must be None for a state that rank 0 gathers.*{key}"):
        GatheredState(secret=key)
