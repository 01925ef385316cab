"""What is only reported fails no run: figures, monitors, what is printed, what describes the machine."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cola_ds import notices
from cola_ds.errors import UserError
from cola_ds.run import environment
from cola_ds.run.environment import describe_environment
from cola_ds.run.folder import RunDir
from tests.support.jobs import run_job
from tests.support.recorded import recorded
from tests.support.toys import rows, run_config, save_model, save_run


class Full:
    """A stream on a disk without room, or closed at the other end."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = fileno = lambda self: self.write("")


def slow_everything(rank):
    """Steps take a third of a second at least, evaluations and checkpoints two."""
    from cola_ds.training import loop, save, validation

    def slowed(module, name, seconds):
        inner = getattr(module, name)

        def slow(*args, **options):
            time.sleep(seconds)
            return inner(*args, **options)

        setattr(module, name, slow)

    slowed(loop, "train_step", 0.3)
    slowed(validation, "held_out_loss", 2)
    slowed(save, "save_chain", 2)


def test_evaluations_and_checkpoints_between_two_rows_are_no_time_of_steps(toy, tmp_path):
    """Nor do they take away the time of the steps before them."""
    config = run_config(
        *toy[:2], tmp_path / "run", data={"eval": str(toy[2])}, optim={"max_steps": 8}, eval={"every": 2},
        checkpoint={"every_steps": 3}, run={"log_every_steps": 4},
    )  # fmt: skip
    statuses, said = run_job(
        tmp_path / "log", ["train", save_run(tmp_path / "run.yaml", config)], sabotage=slow_everything
    )
    assert statuses == [0, 0], said
    found = rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in found] == [4, 8]
    for before, row in zip([{"step": 0}, *found], found, strict=False):
        assert 0.3 <= row["step_s"] < 0.9, row
        steps = row["step"] - before["step"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / (row["step_s"] * steps))


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def spoil(rank):
    """Everything that is only reported goes wrong: both outputs are full, a monitor fails, the first link is gone once it is
    tied, git hangs, a package's metadata are missing, and nobody knows what a step needs or the device can."""
    from cola_ds.distributed.monitor import Monitor
    from cola_ds.run import environment
    from cola_ds.training import knot, start

    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    write, tie = Monitor.write, knot.tie_link

    def failing(self, step, values):
        self._master = SimpleNamespace(enabled=True, write_events=no_space)
        write(self, step, values)

    def tie_without_the_first(*args, **options):
        tied = tie(*args, **options)
        for path in spoil.run.glob("chain/link-0001/*"):
            path.unlink()
        return tied

    Monitor.write, knot.tie_link = failing, tie_without_the_first
    start.work_of = start.peak_tflops = no_space
    environment._PACKAGES = ("torch", "no-such-package")
    environment._GIT_WITHIN_S = 0.01
    os.environ["PATH"] = f"{spoil.run.parent}/bin:{os.environ['PATH']}"


def spoil_in(rank, run):
    spoil.run = run
    spoil(rank)


def test_a_run_whose_every_figure_fails(toy, tmp_path):
    """Status 0, and a result with null for what could not be had; an event says why."""
    model = save_model(
        tmp_path / "model", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    (tmp_path / "bin/git").chmod(0o755)
    config = run_config(model, toy[1], tmp_path / "run", data={"eval": str(toy[2])}, optim={"max_steps": 3})
    config["chain"]["length"] = 3
    path = save_run(tmp_path / "run.yaml", config)
    statuses, _ = run_job(
        tmp_path / "job", ["train", path], world_size=1, sabotage=spoil_in, arguments=(tmp_path / "run",)
    )
    assert statuses == [0]
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["profiled_flops"] is None
    assert result["training_flops"] > 0
    assert result["steps"] == 3
    events = rows(tmp_path / "run/events.jsonl")
    lost = {row["figure"]: row["reason"] for row in events if row["event"] == "no figure"}
    assert lost["profiled_flops"].startswith("the forward pass on the meta device: Tensor.item() cannot be called")
    assert "rounding_error" not in lost
    assert "No space" in lost["tflops"] and "No space" in lost["peak_share"]
    speeds = {(row["tflops"], row["peak_share"]) for row in rows(tmp_path / "run/metrics.jsonl")}
    assert speeds == {(None, None)} == {(result["tflops"], result["peak_share"])}
    assert [row["rounding_error"] is None for row in rows(tmp_path / "run/knots.jsonl")] == [False, False, False]
    environment = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert environment["git_revision"] is None
    assert environment["packages"]["no-such-package"] == "unknown"


# -- flops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["values", "hang", "exit", "memory"])
def test_a_forward_pass_that_cannot_be_counted(toy, tmp_path, monkeypatch, fault):
    from cola_ds.training import flops
    from tests.training.test_flops import prepared

    def forward(*args):
        if fault == "hang":
            time.sleep(60)
        raise {"values": RuntimeError("Tensor.item()"), "exit": SystemExit(3), "memory": MemoryError()}[fault]

    monkeypatch.setattr(flops, "_COUNT_WITHIN_S", 0.2)
    monkeypatch.setattr(flops, "forward_flops", forward)
    with pytest.raises(RuntimeError, match="the forward pass on the meta device"):
        flops.profiled_flops(prepared(toy, tmp_path), [10, 10])


@pytest.fixture
def logger(tmp_path):
    from cola_ds.training.metrics import MetricLogger

    monitor = SimpleNamespace(write=lambda *args: None)
    return MetricLogger(RunDir(recorded(tmp_path)), monitor, 5, 1)


def test_a_figure_that_cannot_be_found(logger, tmp_path, capsys):
    assert logger.figure("speed", lambda: 3) == 3
    assert logger.figure("speed", lambda: 1 / 0) is None
    assert capsys.readouterr().err == "cola-ds: warning: no speed: division by zero\n"
    (row,) = rows(tmp_path / "events.jsonl")
    assert (row["event"], row["figure"], row["reason"]) == ("no figure", "speed", "division by zero")


def test_steps_where_there_is_no_terminal(logger, monkeypatch, capsys):
    """A line every half minute, and no bar; none with --quiet."""
    assert logger.bar.disable
    logger._move(1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(notices, "TELLS_EVERY_S", -1)
    logger.in_short = "; loss 1.5"
    logger._move(2)
    assert re.fullmatch(r"cola-ds ... step 3 of 5, 0:00:0\d left at \S+ s a step; loss 1.5\n", capsys.readouterr().err)
    monkeypatch.setattr(notices, "_quiet", True)
    logger._move(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ValueError("closed"), UnicodeEncodeError("a", "b", 0, 1, "c")]
)
def test_outputs_that_take_nothing(logger, tmp_path, monkeypatch, error):
    """What the logger itself says; what others print: see streams.py."""
    monkeypatch.setattr(sys, "stdout", Full(error))
    monkeypatch.setattr(sys, "stderr", Full(error))
    logger.say("ü")
    logger.knot(
        {"link": 1, "lora_rank": 2, "step": 3, "tie_s": 0.0, "rebuild_s": None, "delta_norm": math.nan, "loss_before": 1.0,
         "loss_after": 1.0}
    )  # fmt: skip
    logger.close()
    assert rows(tmp_path / "knots.jsonl")[0]["delta_norm"] is None


def test_outputs_that_are_closed():
    """What is opened next must not take their numbers: it would be printed into."""
    code = "from cola_ds.commands import streams; streams.harden(); print(1); exit(open('/dev/null').fileno() < 3)"
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code])
    assert done.returncode == 0


# -- monitors, and what describes the machine --------------------------------------------------------------------------


def test_a_monitor_that_fails_is_turned_off(monkeypatch, capsys):
    from cola_ds.distributed import monitor as monitoring
    from cola_ds.distributed.monitor import Monitor

    calls = []

    def write(events):
        calls.append(events)
        no_space()

    monkeypatch.setattr(monitoring, "MonitorMaster", lambda config: SimpleNamespace(enabled=True, write_events=write))
    monitor = Monitor({})
    monitor.write(1, {"loss": 1.0})
    monitor.write(2, {"loss": 1.0})
    assert len(calls) == 1
    said = "cola-ds: warning: the monitors are off from here on: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(monitoring, "MonitorMaster", no_space)
    Monitor({}).write(1, {"loss": 1.0})
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("git", ["hangs", "missing", "asks for ownership", "says what is no commit"])
def test_an_environment_that_cannot_be_described(tmp_path, monkeypatch, git):
    what = {
        "hangs": "exec sleep 60",
        "asks for ownership": "echo fatal >&2; exit 128",
        "says what is no commit": "printf '\\377x'",
    }
    if git != "missing":
        (tmp_path / "git").write_text(f"#!/bin/sh\n{what[git]}\n", encoding="utf-8")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if git != "missing" else str(tmp_path))
    monkeypatch.setattr(environment, "_GIT_WITHIN_S", 0.3)
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    found = describe_environment(["a", "a"], "cpu")
    assert found["git_revision"] is None
    assert found["packages"]["no-such-package"] == "unknown"
    assert found["packages"]["torch"] != "unknown"


def names_of_processes(process):
    from cola_ds.distributed import collectives
    from tests.support.distributed import process_group

    process_group(process)
    return collectives.all_gather_texts(["h\udcfft", "", "ü" * 200][process.rank])


def test_hosts_whose_names_are_no_text():
    from tests.support.distributed import run_distributed

    for found in run_distributed(names_of_processes, 3):
        assert found == ["h?t", "", "ü" * 128]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_that_wait_are_read_too(tmp_path, monkeypatch, capsys):
    folder = RunDir(recorded(tmp_path))
    folder.append("evals.jsonl", {"step": 1, "loss": 2.0})
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "_write_waiting", no_space)
        folder.append("evals.jsonl", {"step": 2, "loss": math.inf, "more": [math.nan, {"x": math.nan}], "s": "\udcff"})
    assert capsys.readouterr().err.count("\n") == 1
    last = {"step": 2, "loss": None, "more": [None, {"x": None}], "s": "?"}
    assert folder.rows("evals.jsonl") == [{"step": 1, "loss": 2.0}, last]
    assert len(rows(tmp_path / "evals.jsonl")) == 1
    folder.write_json("result.json", {"a": math.nan, "b": {"c": math.inf}})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"a": None, "b": {"c": None}}


BAD_ROWS = {
    "garbage": b"?",
    "no object": b"[1]",
    "a missing key": b'{"link": 1}',
    "another type": b'{"step": "1", "link": 1}',
    "a number that is none": b'{"step": 1, "link": 1, "loss": NaN}',
    "a number out of range": b'{"step": 1, "link": 1, "loss": 1e999}',
    "a long number": b'{"step": ' + b"9" * 100_000 + b"}",
    "deep": b'{"step": 1, "x": ' + b"[" * 100_000,
    "no text": b'{"step": 1, "x": "\xff"}',
    "empty": b"",
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals.jsonl", "knots.jsonl", "watch.jsonl", "events.jsonl"])
@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_damaged_row(tmp_path, name, fault):
    good = b'{"step": 1, "link": 1, "event": "started", "loss": 2.0, "lora_rank": 8, "delta_norm": 1.0}'
    bad = BAD_ROWS[fault].replace(b'"loss"', b'"delta_norm"' if name == "knots.jsonl" else b'"loss"')
    (tmp_path / name).write_bytes(good + b"\n" + bad + b"\n" + good + b"\n" + good[:20])
    with pytest.raises(UserError) as raised:
        RunDir(tmp_path).rows(name)
    assert str(raised.value).startswith(f"{tmp_path / name}, row 2: ")
    assert len(str(raised.value)) < 300 + len(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert RunDir(tmp_path).rows(name, skip_damaged=True) == [json.loads(good)] * 2
