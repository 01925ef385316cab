"""Faults made for real, on real processes: killed, hung, poisoned, full, taken. Damaged checkpoints are in test_checkpoint.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.support.jobs import Job, at_call, at_file_event, at_heartbeat, fill_the_disk, poison, run_job
from tests.support.runs import record, three_links, train_in
from tests.support.toys import rows, save_run, save_sums
from tests.training.test_task_runs import reviews, task_run, write


@pytest.fixture(scope="module")
def untouched(toy, tmp_path_factory):
    """What the run of `start` leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("untouched")
    train_in(folder, three_links(toy))
    return record(folder / "run")


def start(toy, folder, **sections):
    """The words of a command that trains three links, with a checkpoint at every step."""
    sections["checkpoint"] = {"every_steps": 1, "keep": 2, **sections.get("checkpoint", {})}
    config = three_links(toy, **sections)
    config["run"]["dir"] = str(folder / "run")
    return ["train", save_run(folder / "run.yaml", config)]


def test_killed_again_and_again(toy, untouched, tmp_path):
    """Twelve times over a run of three links: one process, either of them, or both, at random points, and where a start
    begins at a knot, twice between tie and extend. Then it may end."""
    draw, words, between = random.Random(5), start(toy, tmp_path), {4: 0, 8: 0}
    for _ in range(12):
        victims = draw.choice([(0,), (1,), (0, 1)])
        sabotage, arguments = at_heartbeat, (victims, draw.randint(2, 11), signal.SIGKILL)  # four beats a step
        newest = max([0, *(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*"))])
        if between.get(newest, 2) < 2:  # the next thing that happens is the knot
            between[newest] += 1
            sabotage, arguments = at_call, (victims, "cola_ds.training.knot", "extend_chain", 1, signal.SIGKILL)
        begin = time.monotonic()
        statuses, said = run_job(tmp_path, words, sabotage=sabotage, arguments=arguments)
        assert time.monotonic() - begin < 30
        for rank in range(2):
            assert statuses[rank] == (-signal.SIGKILL if rank in victims else 3), said
        if len(victims) == 1:
            assert f"process {victims[0]} on " in said
            assert " died; it was at " in said
    assert between[4] == 2
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert record(tmp_path / "run") == untouched


def test_killed_at_every_write_and_rename(toy, tmp_path):
    """Each start is killed one write, rename, link or removal later than the one before, until one gets to the end. A process
    alone: it is process 0 that writes, and those that lose it end in the test above."""
    train_in(tmp_path / "untouched", three_links(toy), 1)
    words = start(toy, tmp_path)
    for number in range(1, 80):
        statuses, said = run_job(tmp_path, words, world_size=1, sabotage=at_file_event, arguments=(number,))
        if statuses == [0]:
            break
        assert statuses == [-signal.SIGKILL], said
    assert number > 20  # a checkpoint takes about fifteen of them
    assert record(tmp_path / "run") == record(tmp_path / "untouched/run")


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGTERM, True), *((n, False) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))],
)
def test_signals(toy, untouched, tmp_path, number, everyone):
    """All processes finish the step, write a checkpoint and exit 75; the same command goes on."""
    words = start(toy, tmp_path, checkpoint={"every_steps": None})
    ranks = (0, 1) if everyone else (1,)
    statuses, said = run_job(tmp_path, words, sabotage=at_heartbeat, arguments=(ranks, 8, number))
    assert statuses == [75, 75], said
    assert f"stopped on {number.name} after step 3, with a checkpoint; the same command goes on from there" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000003"]
    assert rows(tmp_path / "run/events.jsonl")[-1]["signal"] == number.name
    assert not (tmp_path / "run/lock.json").exists()
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert "going on from step 3, in link 1" in said
    assert record(tmp_path / "run") == untouched


def test_a_signal_before_the_first_step(toy, tmp_path):
    """Nothing to save, and no half-made folder."""
    words = start(toy, tmp_path)
    statuses, said = run_job(
        tmp_path,
        words,
        sabotage=at_call,
        arguments=((0, 1), "cola_ds.training.build", "build_engine", 1, signal.SIGTERM),
    )
    assert statuses == [75, 75], said
    assert not (tmp_path / "run").exists()


def slow_to_write_it_down(rank):
    """Process 1 is asked to stop; process 0 takes longer over the word for it than the others wait for one who is to leave."""
    from cola_ds.distributed import signals
    from cola_ds.training import loop
    from cola_ds.training.metrics import MetricLogger

    inner, event = loop.train_step, MetricLogger.event

    def step(*args):
        signals._requested = signal.SIGTERM if rank == 1 else 0
        return inner(*args)

    def slow(self, what, **facts):
        if rank == 0 and what == "stopped":
            time.sleep(12)
        event(self, what, **facts)

    loop.train_step, MetricLogger.event = step, slow


def test_nobody_leaves_before_the_stop_is_written_down(toy, tmp_path):
    statuses, said = run_job(tmp_path, start(toy, tmp_path), sabotage=slow_to_write_it_down)
    assert statuses == [75, 75], said
    assert rows(tmp_path / "run/events.jsonl")[-1]["signal"] == "SIGTERM"
    assert "stopped on SIGTERM after step 1, with a checkpoint" in said


def test_a_second_signal_stops_at_once(toy, tmp_path):
    """Even where the main thread waits inside a collective, for a process that sleeps."""
    words = start(toy, tmp_path)
    with Job(tmp_path, words, sabotage=at_heartbeat, arguments=((1,), 5, ("sleep", 300))) as job:
        job.wait_for("asleep")
        time.sleep(1)
        for _ in range(2):
            job.send(0, signal.SIGTERM)
            job.wait_for("SIGTERM: stopping after this step")
            time.sleep(3)
        assert job.processes[0].exitcode == 128 + signal.SIGTERM, job.text()
        assert "a second signal, SIGTERM: stopping at once" in job.text(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named(toy, tmp_path, victim):
    # far more than it sleeps and a silence takes to show (3 s): else it might have made no progress, which is as true
    words = start(toy, tmp_path, run={"hang_after_s": 8})
    stops = [("sleep", 1.5), signal.SIGSTOP]  # it speaks once a second, and steps may be quicker than that
    with Job(tmp_path, words, sabotage=at_heartbeat, arguments=((victim,), 9, stops)) as job:
        other = 1 - victim
        deadline = time.monotonic() + 120
        while job.processes[other].exitcode is None:
            assert time.monotonic() < deadline, job.text()
            time.sleep(0.1)
        assert job.processes[other].exitcode == 3
        said = job.text(other)
        assert (
            f"process {victim} on {os.uname().nodename} (pid {job.processes[victim].pid}) has said nothing for " in said
        )
        assert "; it was at s" in said  # a step: where it was when it last spoke
        assert f"threads of process {other}" in said  # where it waited
        assert time.monotonic() < deadline - 30


def test_a_process_that_hangs_is_named_with_its_stack(toy, tmp_path):
    """Asleep in the data loader: it goes on talking, but does not move, and the others wait for it."""
    words = start(toy, tmp_path, run={"hang_after_s": 4})
    sabotage = ((1,), "cola_ds.training.loop", "step_examples", 3, ("sleep", 300))
    begin = time.monotonic()
    statuses, said = run_job(tmp_path, words, sabotage=at_call, arguments=sabotage)
    assert statuses == [3, 3]
    assert time.monotonic() - begin < 40
    assert "process 1 on " in said
    assert " made no progress for " in said
    assert ", at step 3, examples" in said
    assert "threads of process 1" in said
    assert "in step_examples" in said or "in called" in said  # its stack


def test_no_false_alarm(toy, tmp_path):
    """Loading, building an engine and writing a whole model may take longer than a step ever does."""
    words = start(toy, tmp_path, run={"hang_after_s": 2})
    slow = ((0, 1), "cola_ds.training.build", "load_model", 1, ("sleep", 5))
    statuses, said = run_job(tmp_path, words, sabotage=at_call, arguments=slow)
    assert statuses == [0, 0], said


# -- not a number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["tests/support/zero3_sharded.json", "ds_configs/zero2.json"])
def test_a_poisoned_batch_is_left_out(toy, tmp_path, dtype, engine):
    """On one process's loss alone: all leave out the update, and say which examples it was."""
    words = [*start(toy, tmp_path), f"model.dtype={dtype}", f"deepspeed={engine}"]
    statuses, said = run_job(tmp_path, words, sabotage=poison, arguments=((1,), (3, 6, 7)))
    assert statuses == [0, 0], said
    skips = [row for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "skipped"]
    assert [(row["step"], row["link"], len(row["examples"])) for row in skips] == [(3, 1, 8), (6, 2, 8), (7, 2, 8)]
    assert (
        said.count("step 3: a loss is not finite; its update is left out. Its examples (from 0, in data.train): ") == 1
    )
    assert record(tmp_path / "run")["result"]["skipped_steps"] == 3
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert all(row["loss"] is not None for row in metrics)
    assert all(row["rounding_error"] is None or row["rounding_error"] < 1 for row in rows(tmp_path / "run/knots.jsonl"))


def test_too_many_poisoned_batches_stop_the_run(toy, tmp_path):
    words = [*start(toy, tmp_path), "optim.max_skips_in_a_row=2"]
    statuses, said = run_job(tmp_path, words, sabotage=poison, arguments=((0,), tuple(range(6, 99))))
    assert statuses == [3, 3], said
    assert "3 updates in a row left out up to step 8" in said
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "run/chain").iterdir()] == ["link-0001"]  # nothing poisoned was tied
    newest = json.loads((tmp_path / "run/checkpoints/step-00000007/state.json").read_text(encoding="utf-8"))
    assert newest["chain"]["skipped_in_a_row"] == 2


def ruin_an_adapter(rank, layer):
    """An adapter that is not finite when its knot comes, whatever kept the engine from noticing."""
    from cola_ds.training import loop

    inner = loop.pass_knot

    def knot(chain):
        from cola_ds.distributed.engine import evaluating
        from cola_ds.distributed.shards import local_shard
        from cola_ds.lora.layers import lora_layers

        with evaluating(chain.engine):
            pass
        part, _ = local_shard(list(lora_layers(chain.engine.module).values())[layer].lora_B)
        if rank == 1:
            part[:1] = float("inf")
        return inner(chain)

    loop.pass_knot = knot


def test_what_is_not_finite_is_never_tied(toy, tmp_path):
    words = start(toy, tmp_path)
    statuses, said = run_job(tmp_path, words, sabotage=ruin_an_adapter, arguments=(1,))
    assert statuses == [3, 3], said
    assert "link 1 is not finite at step 4; it was neither tied nor saved" in said
    assert not (tmp_path / "run/chain").exists()


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_going_on(toy, untouched, tmp_path, small_disk):
    words = [*start(toy, tmp_path), f"run.dir={small_disk / 'run'}"]
    statuses, said = run_job(tmp_path, words, sabotage=fill_the_disk, arguments=(small_disk, 6, 8))
    assert statuses == [0, 0], said
    assert "warning: no checkpoint at step 6: No space left on device" in said
    assert f"({small_disk / 'run/checkpoints'}, 0.0 MiB free); the checkpoints before it stay" in said
    assert record(small_disk / "run") == untouched  # its rows, too: they waited for room
    events = [(row["event"], row["step"]) for row in rows(small_disk / "run/events.jsonl")]
    assert ("checkpoint", 5) in events
    assert ("checkpoint failed", 6) in events
    assert ("checkpoint", 8) in events


def test_a_full_disk_and_stopping(toy, untouched, tmp_path, small_disk):
    words = [*start(toy, tmp_path, checkpoint={"on_error": "stop"}), f"run.dir={small_disk / 'run'}"]
    statuses, said = run_job(tmp_path, words, sabotage=fill_the_disk, arguments=(small_disk, 6, 99))
    assert statuses == [3, 3], said
    assert "training failed: no checkpoint could be written at step 6: No space left on device" in said
    assert (small_disk / "run/checkpoints/latest").read_text(encoding="utf-8") == "step-00000005\n"
    (small_disk / "filler").unlink()
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert "going on from step 5" in said
    assert record(small_disk / "run") == untouched


def test_a_full_disk_at_a_knot(toy, untouched, tmp_path, small_disk):
    """A link that cannot be written ends the run, whatever is configured: a chain without it could not be exported."""
    words = [*start(toy, tmp_path), f"run.dir={small_disk / 'run'}"]
    statuses, said = run_job(tmp_path, words, sabotage=fill_the_disk, arguments=(small_disk, 8, 99))
    assert statuses == [3, 3], said
    assert "training failed: link 2 cannot be written: No space left on device" in said
    (small_disk / "filler").unlink()
    assert run_job(tmp_path, words)[0] == [0, 0]
    assert record(small_disk / "run") == untouched


def test_too_little_room_from_the_start(toy, tmp_path, small_disk):
    with open(small_disk / "filler", "wb") as out:
        out.write(bytes(2_600_000))
    words = [*start(toy, tmp_path), f"run.dir={small_disk / 'run'}", "checkpoint.keep=5"]
    statuses, said = run_job(tmp_path, words)
    assert statuses == [2, 2], said
    assert "MiB are free there, and the run's links and checkpoints take up to 1 MiB; make room" in said
    assert not (small_disk / "run").exists()


# -- one folder, one run -----------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(toy, untouched, tmp_path):
    words = start(toy, tmp_path)
    until = ((0, 1), 9, ("until", tmp_path / "go on"))
    with Job(tmp_path / "first", words, sabotage=at_heartbeat, arguments=until) as job:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/checkpoints/latest").exists():
            assert time.monotonic() < deadline, job.text()
            time.sleep(0.1)
        statuses, said = run_job(tmp_path / "second", words)
        assert statuses == [2, 2], said
        assert "belongs to a run that is still going: process " in said
        statuses, said = run_job(tmp_path / "third", [*words, "--fresh"])
        assert statuses == [2, 2], said
        (tmp_path / "go on").touch()
        assert job.wait() == [0, 0]
    assert record(tmp_path / "run") == untouched


def test_a_dead_runs_lock_is_taken_over(toy, untouched, tmp_path):
    words = start(toy, tmp_path)
    run_job(tmp_path, words, sabotage=at_heartbeat, arguments=((0, 1), 9, signal.SIGKILL))
    assert (tmp_path / "run/lock.json").exists()
    assert run_job(tmp_path, words)[0] == [0, 0]
    assert record(tmp_path / "run") == untouched
    assert not (tmp_path / "run/lock.json").exists()


# -- what is in the folder ---------------------------------------------------------------------------------------------


def test_no_silent_restart(toy, untouched, tmp_path):
    words = start(toy, tmp_path)
    assert run_job(tmp_path, words, sabotage=at_heartbeat, arguments=((1,), 22, signal.SIGTERM))[0] == [75, 75]
    for latest in (None, "", "step-00000001\n"):  # removed, empty, stale
        (tmp_path / "run/checkpoints/latest").unlink(missing_ok=True)
        if latest is not None:
            (tmp_path / "run/checkpoints/latest").write_text(latest, encoding="utf-8")
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"copy-{latest!r:.6}")
        statuses, said = run_job(tmp_path, [*words, f"run.dir={folder}"])
        assert statuses == [0, 0], said
        assert "latest says " in said
        assert record(folder) == untouched
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        shutil.rmtree(path)
    statuses, said = run_job(tmp_path, words)
    assert statuses == [2, 2], said
    assert (
        "has no checkpoint that can be used, but has had some; put one back, or start the run anew with --fresh" in said
    )
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run_job(tmp_path, words)[0] == [2, 2]  # the folder itself gone
    statuses, said = run_job(tmp_path, [*words, "--fresh"])
    assert statuses == [0, 0], said
    assert record(tmp_path / "run") == untouched


def test_a_run_that_died_before_its_first_checkpoint_starts_again(toy, untouched, tmp_path):
    words = start(toy, tmp_path, checkpoint={"every_steps": None})
    run_job(tmp_path, words, sabotage=at_heartbeat, arguments=((0, 1), 4, signal.SIGKILL))
    assert (tmp_path / "run/run.yaml").exists()
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert "ended before its first checkpoint: it starts again from step 0" in said
    assert record(tmp_path / "run") == untouched


# -- nodes that are not alike ------------------------------------------------------------------------------------------


def work_elsewhere(rank, folder):
    """The second process finds relative paths in a folder of its own, as a node with its own disk does."""
    os.chdir(folder / f"node-{rank}")


def another_version(rank):
    """The second process has another version of a package."""
    if rank == 1:
        import importlib.metadata

        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.0.1" if name == "transformers" else version(name)


@pytest.fixture
def two_nodes(toy, tmp_path):
    """A folder for each process, with a copy of the data."""
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        shutil.copy(toy[1], tmp_path / f"node-{rank}/train.jsonl")
    return [*start(toy, tmp_path), "data.train=train.jsonl"]


def test_other_data_on_one_node(two_nodes, tmp_path):
    """Where each tokenizes its own; with a cache that both see, it is process 0's that both train on."""
    save_sums(tmp_path / "node-1/train.jsonl", 40, seed=9)
    without_cache = [*two_nodes, "data.cache=none"]
    statuses, said = run_job(tmp_path, without_cache, sabotage=work_elsewhere, arguments=(tmp_path,))
    assert statuses == [2, 2], said
    node = os.uname().nodename
    assert f"process 1 on {node} differs from process 0 on {node}: training data 40 examples (" in said
    assert not (tmp_path / "run").exists()


def test_other_test_rows_on_one_node(toy, tmp_path):
    """Of a task whose train and dev, from the other file, are the same."""
    for rank in range(2):
        write(tmp_path / f"node-{rank}/train.jsonl", reviews(4))
        write(tmp_path / f"node-{rank}/validation.jsonl", reviews(2)[rank:])
    config = task_run(toy[0], tmp_path, "sst2", reviews(4), reviews(2), data={"task": "sst2", "dir": "."})
    statuses, said = run_job(
        tmp_path,
        ["train", save_run(tmp_path / "run.yaml", config), "data.num_train=8", "data.num_dev=4", "data.max_length=64"],
        sabotage=work_elsewhere,
        arguments=(tmp_path,),
    )
    assert statuses == [2, 2], said
    assert ": test data 9 examples (" in said
    assert not (tmp_path / "run").exists()


def test_another_package_version_on_one_node(toy, tmp_path):
    statuses, said = run_job(tmp_path, start(toy, tmp_path), sabotage=another_version)
    assert statuses == [2, 2], said
    assert "differs from process 0 on " in said
    assert ": transformers 0.0.1 / " in said


def test_a_run_folder_that_one_node_does_not_see(two_nodes, tmp_path):
    words = [*two_nodes, "run.dir=run"]
    statuses, said = run_job(tmp_path, words, sabotage=work_elsewhere, arguments=(tmp_path,))
    assert statuses == [2, 2], said
    assert "(process 1) is not the folder that it is on " in said
    assert not list((tmp_path / "node-0").glob("run*"))


def test_an_interrupted_compilation(toy, tmp_path, monkeypatch):
    lock = tmp_path / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    from tests.commands.test_cli import cola_ds

    done = cola_ds(*start(toy, tmp_path), timeout_s=120)
    assert done.returncode == 2, done.stderr
    assert f"{lock} is 60 minutes old: a compilation was interrupted" in done.stderr
