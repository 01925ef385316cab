"""Faults of checkpoints in shards: damaged, misfitting or unseen ones, a process that cannot write, and one killed at a write."""

import errno
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from cola_ds.checkpoint import shards
from cola_ds.checkpoint.format import DamagedError, read_checkpoint
from cola_ds.checkpoint.store import CheckpointWriter
from tests.checkpoint.test_checkpoint import DAMAGES, flip, rewrite_manifest
from tests.checkpoint.test_shards import FULL
from tests.support.jobs import at_file_event, run_job
from tests.support.runs import record, three_links, train_in
from tests.support.toys import rows, save_run

SHARDS = ["shard-00000-00001.safetensors", "shard-00001-00001.safetensors"]
NEWEST, BEFORE = "step-00000004", "step-00000003"


def start(toy, folder, **checkpoint):
    """The words of a command that trains five steps, with a checkpoint at each."""
    sections = {
        "optim": {"max_steps": 5}, "eval": {"every": "end"},
        "checkpoint": {"every_steps": 1, "keep": 9, "best": False, **checkpoint},
    }  # fmt: skip
    config = three_links(toy, **{**FULL, **sections})
    config["run"]["dir"] = str(folder / "run")
    folder.mkdir(exist_ok=True)
    return config, ["train", save_run(folder / "run.yaml", config)]


def left(run):
    """All that a run leaves, the model's bits with it."""
    return record(run), (run / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(toy, tmp_path_factory):
    """A run that stopped after 4 of 5 steps, and what it leaves when it goes on."""
    folder = tmp_path_factory.mktemp("stopped")
    config, _ = start(toy, folder)
    train_in(folder / "whole", config)
    train_in(folder, config, stops=[("step", 4)], end=False)
    return folder, left(folder / "whole/run")


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of that run, the words that start it, and what it is to leave."""
    folder = shutil.copytree(stopped[0] / "run", tmp_path / "run")
    return folder, ["train", stopped[0] / "run.yaml", f"run.dir={folder}"], stopped[1]


@pytest.mark.parametrize("file", SHARDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_shard_is_found(copied, tmp_path, monkeypatch, file, damage):
    monkeypatch.setenv("COLA_DS_TEST_EXPLOIT", str(tmp_path / "exploited"))
    path = copied[0] / "checkpoints" / NEWEST
    DAMAGES[damage](path / file)
    with pytest.raises(DamagedError, match=file.replace(".", r"\.")):
        read_checkpoint(path)
    assert not (tmp_path / "exploited").exists()


def test_shards_that_were_swapped_or_vouched_for(copied):
    """Of another process, of another step; and a manifest that vouches for what is there, or not."""
    path = copied[0] / "checkpoints" / NEWEST
    contents = [(path / name).read_bytes() for name in SHARDS]
    for name, content in zip(SHARDS, reversed(contents), strict=True):
        (path / name).write_bytes(content)
    with pytest.raises(DamagedError, match=SHARDS[0]):
        read_checkpoint(path)
    shutil.copy(path.with_name(BEFORE) / SHARDS[0], path)
    (path / SHARDS[1]).write_bytes(contents[1])
    with pytest.raises(DamagedError, match=f"{SHARDS[0]} has changed: its SHA-256 does not hold"):
        read_checkpoint(path)
    (path / SHARDS[0]).write_bytes(contents[0])
    rewrite_manifest(path, lambda files: {name: entry for name, entry in files.items() if name != SHARDS[1]})
    with pytest.raises(DamagedError, match=f"{SHARDS[1]} is not in its manifest"):
        read_checkpoint(path)
    shutil.copy(path / "random.safetensors", path / SHARDS[1])
    rewrite_manifest(path, lambda files: files)
    with pytest.raises(
        DamagedError, match=f"{SHARDS[1]} is not a shard: its header does not say where its tensors lie"
    ):
        read_checkpoint(path)


def test_a_damaged_shard_is_passed_over(copied, tmp_path):
    """And so is a file beside the shards that the manifest does not know."""
    folder, words, expected = copied
    flip(folder / "checkpoints" / NEWEST / SHARDS[1])
    (folder / "checkpoints" / BEFORE / "shard-00000-00000.safetensors").write_bytes(b"nobody vouches for it")
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert f"{NEWEST} is damaged: {SHARDS[1]} has changed: its SHA-256 does not hold; using the one before it" in said
    assert left(folder) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kinds, parts: ([*kinds, "surprise"], parts), "holds surprise, which no optimizer here keeps"),
        (lambda kinds, parts: ([*kinds, "sum"], parts), "does not fit the model: it has elements of sum/"),
        (
            lambda kinds, parts: (kinds, [(key, start, (99, 99, 99), values) for key, start, _, values in parts]),
            "of shape (99, 99, 99), the model wants (",
        ),
        (lambda kinds, parts: (kinds, parts[1:]), "does not fit the model: it has elements of "),
    ],
)
def test_shards_that_do_not_fit_are_refused(copied, tmp_path, change, message):
    """By all processes, before any value is read."""
    from safetensors.torch import load_file

    from cola_ds.distributed.shards import Part

    folder, words, _ = copied
    path = folder / "checkpoints" / NEWEST
    kinds, placed = shards.read_header(path / SHARDS[1])
    tensors = load_file(path / SHARDS[1])
    kinds, parts = change(kinds, [(key, at.start, at.shape, tensors[key]) for key, at in sorted(placed.items())])
    ((_, content),) = shards.shard_files(1, [Part(key, shape, start, v) for key, start, shape, v in parts], kinds)
    (path / SHARDS[1]).write_bytes(content)
    rewrite_manifest(path, lambda files: files)
    statuses, said = run_job(tmp_path, words)
    assert statuses == [2, 2], said
    assert message in said


def see_another_folder(rank):
    """Process 1 does not see what process 0 does."""
    from cola_ds.checkpoint import restore

    if rank == 1:
        restore.hash_of = lambda path: None


def test_a_checkpoint_that_one_process_does_not_see_is_refused(copied, tmp_path):
    statuses, said = run_job(tmp_path, copied[1], sabotage=see_another_folder)
    assert statuses == [2, 2], said
    assert f"{NEWEST} on {os.uname().nodename} (process 1) is not the one that process 0 sees" in said


# -- while they are written --------------------------------------------------------------------------------------------


def no_room(rank, victim, calls):
    """One process finds no room for its shard in some of its attempts, counted from 1; half of it is written by then."""
    from cola_ds.checkpoint import store

    inner, seen = store.write_synced, [0]

    def write(path, content):
        if path.name.startswith("shard-"):
            seen[0] += 1
            if seen[0] in calls:
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(path, content)

    if rank == victim:
        store.write_synced = write


@pytest.mark.parametrize("victim", [0, 1])
def test_no_room_for_one_process(toy, stopped, tmp_path, victim):
    """All give the attempt up, and go on."""
    _, words = start(toy, tmp_path)
    statuses, said = run_job(tmp_path, words, sabotage=no_room, arguments=(victim, (2, 3)))
    assert statuses == [0, 0], said
    where = f"process {victim} on {os.uname().nodename}: No space left on device ({tmp_path / 'run/checkpoints'}, "
    assert said.count(f"warning: no checkpoint at step 2: {where}") == 1
    assert "MiB free); the checkpoints before it stay" in said
    kept = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert kept == ["latest", "step-00000001", "step-00000004", "step-00000005"]  # and nothing half-written
    events = [
        (row["event"], row["step"]) for row in rows(tmp_path / "run/events.jsonl") if "checkpoint" in row["event"]
    ]
    assert events == [
        ("checkpoint", 1),
        *((("checkpoint failed", step)) for step in (2, 3)),
        ("checkpoint", 4),
        ("checkpoint", 5),
    ]
    assert left(tmp_path / "run") == stopped[1]


def test_no_room_for_one_process_and_stopping(toy, stopped, tmp_path):
    _, words = start(toy, tmp_path, on_error="stop")
    statuses, said = run_job(tmp_path, words, sabotage=no_room, arguments=(1, (3,)))
    assert statuses == [3, 3], said
    assert "training failed: no checkpoint could be written at step 3: process 1 on " in said
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert "going on from step 2" in said
    assert left(tmp_path / "run") == stopped[1]


def test_a_shard_that_process_0_does_not_see_is_no_part_of_a_checkpoint(tmp_path):
    """Each process says what it has written; a file that is not here, or not whole, ends the attempt."""
    writer, entry = SimpleNamespace(scratch=tmp_path, files={}), {"bytes": 3, "sha256": "0" * 64}
    for content in (None, b"12", b"1234"):
        if content is not None:
            (tmp_path / SHARDS[1]).write_bytes(content)
        with pytest.raises(OSError, match=f"{SHARDS[1]} is not here as its process wrote it"):
            CheckpointWriter.add_files(writer, {SHARDS[1]: entry})
    assert not writer.files
    (tmp_path / SHARDS[1]).write_bytes(b"123")
    CheckpointWriter.add_files(writer, {SHARDS[1]: entry})
    assert writer.files == {SHARDS[1]: entry}


def killed_at(rank, victim, number):
    """A process is killed at a write, rename or removal; what it keeps goes into several files."""
    shards._ELEMENTS_A_FILE = 2**15
    at_file_event(int(rank != victim), number)


def killed_half_way(rank, victim, number):
    """A process is killed when it has written half of a shard."""
    from cola_ds.checkpoint import store

    inner, seen = store.write_synced, [0]

    def write(path, content):
        seen[0] += path.name.startswith("shard-")
        if seen[0] == number:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        inner(path, content)

    if rank == victim:
        store.write_synced = write


@pytest.mark.parametrize(
    ("victim", "sabotage", "least"), [(0, killed_at, 20), (1, killed_at, 5), (1, killed_half_way, 2)]
)
def test_killed_at_every_write(toy, stopped, tmp_path, victim, sabotage, least):
    """Each start is killed one write later than the one before, until one gets to the end: it has the bits of one that nothing
    happened to, and only whole checkpoints are ever shown."""
    _, words = start(toy, tmp_path, keep=2)
    for number in range(1, 80):
        statuses, said = run_job(tmp_path, words, sabotage=sabotage, arguments=(victim, number))
        for path in (tmp_path / "run/checkpoints").glob("step-*"):
            if (path / "manifest.json").exists():  # else it was being removed
                read_checkpoint(path)
        if statuses == [0, 0]:
            break
        assert statuses == ([-signal.SIGKILL, 3] if victim == 0 else [3, -signal.SIGKILL]), said
    assert number > least
    assert left(tmp_path / "run") == stopped[1]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
