"""log.txt of a run: what it said, over all its starts; never a reason for it to fail, and never in anybody's file."""

import errno
import json
import os
import re
import signal
import threading

import pytest

from cola_ds import notices
from cola_ds.commands.export import export
from cola_ds.config.schema import RunConfig
from cola_ds.run import log
from cola_ds.run.folder import RunDir
from cola_ds.run.log import RunLog, add_error
from tests.support.jobs import at_heartbeat, fill_the_disk, run_job
from tests.support.recorded import recorded
from tests.support.toys import run_config, save_run
from tests.training.test_api import python
from tests.training.test_faults import small_disk  # noqa: F401

FIRST = r"== \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d on \S+, 2 processes: .*"


def text_of(folder):
    return (folder / "log.txt").read_text(encoding="utf-8")


def test_it_grows_over_starts(tmp_path):
    """A killed process's last line ends before the next start's first."""
    RunLog(RunDir(recorded(tmp_path)), 2).add("one\ntwo")
    with open(tmp_path / "log.txt", "a", encoding="utf-8") as out:
        out.write("half a li")
    RunLog(RunDir(tmp_path), 2).add("three\udcff\n")
    lines = text_of(tmp_path).splitlines()
    assert [line for line in lines if not line.startswith("==")] == ["one", "two", "half a li", "three\\udcff"]
    assert all(re.fullmatch(FIRST, line) for line in (lines[0], lines[4]))
    assert "log.txt" in RunDir(tmp_path).mine.wrote


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_somebody_elses_stays(tmp_path, capsys, kind):
    recorded(tmp_path)
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    if kind == "folder":
        (tmp_path / "log.txt").mkdir()
    elif kind == "link":
        (tmp_path / "log.txt").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "log.txt").write_text("mine", encoding="utf-8")
    held = RunLog(RunDir(tmp_path), 1)
    held.add("a line")
    add_error(tmp_path, 1, "why")
    assert capsys.readouterr().err.count("log.txt cannot be written") == 1
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"
    assert kind == "folder" or text_of(tmp_path) == "mine"
    RunDir(tmp_path).check_is_ours(RunConfig.model_validate(run_config(tmp_path, tmp_path / "t", tmp_path)))


def test_a_folder_that_holds_nothing_but_a_log_is_free(tmp_path):
    """As `cola-ds train run.yaml > RUN_DIR/log.txt` makes it."""
    (tmp_path / "log.txt").write_text("mine", encoding="utf-8")
    RunDir(tmp_path).check_is_ours(RunConfig.model_validate(run_config(tmp_path, tmp_path / "t", tmp_path)))


def test_lines_of_several_threads(tmp_path):
    log = RunLog(RunDir(recorded(tmp_path)), 1)
    threads = [threading.Thread(target=lambda: [log.add("a line") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert text_of(tmp_path).splitlines()[1:] == ["a line"] * 2000


def test_a_link_in_the_place_of_its_own_file_is_not_followed(tmp_path, capsys):
    held = RunLog(RunDir(recorded(tmp_path)), 1)
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.txt").symlink_to(tmp_path / "mine")
    held.add("a line")
    add_error(tmp_path, 1, "why")
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_costs_no_line(tmp_path, monkeypatch, capsys):
    """Room for a part of what is written, then for none, then again: nothing is lost, and one warning says so."""
    held = RunLog(RunDir(recorded(tmp_path)), 2)
    inner, room = os.write, [5]

    def write(number, content):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        took = inner(number, content[: room[0]])
        room[0] -= took
        return took

    monkeypatch.setattr(log.os, "write", write)
    held.add("first line")
    held.add("second line")
    room[0] = 10_000
    held.add("third line")
    assert text_of(tmp_path).splitlines()[1:] == ["first line", "second line", "third line"]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_another_process_adds_why_it_ends(tmp_path):
    add_error(tmp_path, 3, "cola-ds: no run here")
    recorded(tmp_path)
    add_error(tmp_path, 3, "cola-ds: no log yet")
    assert not (tmp_path / "log.txt").exists()
    RunLog(RunDir(tmp_path), 4).add("begun")
    add_error(tmp_path, 3, "Traceback\n  and so on")
    lines = text_of(tmp_path).splitlines()[1:]
    assert lines[0] == "begun"
    assert re.fullmatch(r"process 3 on \S+:", lines[1])
    assert lines[2:] == ["Traceback", "  and so on"]


# -- real runs ---------------------------------------------------------------------------------------------------------


def start(toy, folder, **sections):
    model, train, dev = toy
    config = run_config(model, train, folder / "run", data={"eval": str(dev)}, eval={"every": "link"}, **sections)
    config["checkpoint"] = {"every_steps": 2}
    return ["train", save_run(folder / "run.yaml", config)]


def fail_in_step(rank):
    """Process 1 alone has a defect."""
    if rank == 1:
        from cola_ds.training import loop

        def step(*args):
            raise LookupError("a defect of process 1")

        loop.train_step = step


def test_a_run_keeps_what_it_says(toy, tmp_path, monkeypatch, capsys):
    """Killed, failed on one process, and gone on with --quiet: all is there, in order, and no bar."""
    words = start(toy, tmp_path)
    statuses, said = run_job(tmp_path, words, sabotage=at_heartbeat, arguments=((1,), 13, signal.SIGKILL))
    assert statuses == [3, -signal.SIGKILL], said
    first = text_of(tmp_path / "run").splitlines()
    assert re.fullmatch(FIRST, first[0])
    assert any(line.startswith("method      cola") for line in first)  # said before there was a folder
    assert re.search(r"process 1 on \S+ .*died", first[-1])
    statuses, said = run_job(tmp_path, words, sabotage=fail_in_step)
    assert statuses == [3, 3], said
    second = text_of(tmp_path / "run").splitlines()
    assert second[: len(first)] == first
    assert "LookupError: a defect of process 1" in second
    assert any(line.startswith("cola-ds: going on from step") for line in second[len(first) :])
    statuses, said = run_job(tmp_path, [*words, "--quiet"])
    assert statuses == [0, 0], said
    lines = text_of(tmp_path / "run").splitlines()
    assert lines[: len(second)] == second
    third = lines[len(second) :]
    done = f"done: {tmp_path / 'run'}"
    for begin in ("== ", "method      cola", "cola-ds: going on from step", "knot: link 2", "held-out at step 6", done):
        assert sum(line.startswith(begin) for line in third) == 1, begin
    ours = [line for line in said.splitlines() if line.startswith(("cola-ds", "knot", "held-out", "method", "done"))]
    assert [line for line in ours if not line.startswith("cola-ds: warning: ")] == [done]
    assert not re.search(r"\r|\x1b|\d%\|", text_of(tmp_path / "run"))
    monkeypatch.setattr(notices, "TELLS_EVERY_S", -1)
    capsys.readouterr()
    export(tmp_path / "run", "hf", tmp_path / "merged")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cola-ds ... exporting: ")]
    assert told and told[-1] == "cola-ds ... exporting: 0.0 of 0.0 GB after 0 s"
    statuses, said = run_job(tmp_path, [*words, "--fresh"])
    assert statuses == [0, 0], said
    assert text_of(tmp_path / "run").count("\n== ") == 0  # another run's


def fill_and_talk(rank, folder, full_from, full_until):
    """The disk is full, and process 0 says more than its log's last page has room for."""
    fill_the_disk(rank, folder, full_from, full_until)
    from cola_ds.training import loop

    inner, seen = loop.train_step, [0]

    def step(*args):
        done = inner(*args)
        seen[0] += 1
        if rank == 0 and seen[0] == full_from:
            notices.line(f"talk {'x' * 9000} end of talk")
        return done

    loop.train_step = step


def test_a_log_on_a_full_disk_fails_nothing(toy, tmp_path, small_disk):  # noqa: F811
    words = [*start(toy, tmp_path), f"run.dir={small_disk / 'run'}", "chain.length=1", "eval.every=2"]
    statuses, said = run_job(tmp_path, words, sabotage=fill_and_talk, arguments=(small_disk, 3, 6))
    assert statuses == [0, 0], said
    assert "log.txt cannot be written (No space left on device)" in said
    lines = text_of(small_disk / "run").splitlines()
    assert [step for step in (2, 4, 6) if any(f"held-out at step {step}:" in line for line in lines)] == [2, 4, 6]
    assert any("warning: no checkpoint at step 4" in line for line in lines)
    assert sum(len(line) > 9000 and line.endswith("end of talk") for line in lines) == 1


def test_an_evaluations_scores_are_results(toy, tmp_path):
    model, train, dev = toy
    config = run_config(
        model, train, tmp_path / "run", method="zero-shot", chain={"length": 1}, data={"eval": str(dev)}
    )
    path = save_run(tmp_path / "run.yaml", config)
    statuses, said = run_job(tmp_path, ["train", path, "--quiet"], world_size=1)
    assert statuses == [0], said
    assert "built successfully" not in said
    ours = [line for line in said.splitlines() if line.startswith(("held-out", "done", "cola-ds", "method"))]
    assert [line.split(":")[0] for line in ours] == ["held-out at step 0", "done"]
    assert json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))["scores"]


FROM_PYTHON = """
import cola_ds
from cola_ds import notices
from cola_ds.training import loop
config = cola_ds.load_config("run.yaml")
inner = loop.train_step
loop.train_step = lambda *args: 1 / 0
try:
    cola_ds.train(config)
except ZeroDivisionError:
    print("raised")
print(notices._log, notices._early)
loop.train_step = inner
cola_ds.train(config)
"""


def test_a_run_from_python_keeps_it_too(toy, tmp_path):
    """What is raised to the caller is kept, although the run begins anew, as it had no checkpoint; afterwards nothing that the
    process says is the run's."""
    start(toy, tmp_path)
    said = python(tmp_path, FROM_PYTHON)
    assert said.index("raised") + 1 == said.index("None None")
    lines = text_of(tmp_path / "run").splitlines()
    assert sum(line.startswith("== ") for line in lines) == 2
    assert sum(line == "cola-ds: ZeroDivisionError: division by zero" for line in lines) == 1
    assert lines[-1] == f"done: {tmp_path / 'run'}"
