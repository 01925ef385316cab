"""Stopped, killed and gone on with: the same bits, with run.deterministic."""

import signal
import subprocess
import sys

import pytest

from tests.gpu.support import ON_CPU, run, three_links
from tests.support.runs import record, weights_hash
from tests.support.toys import REPOSITORY, rows

DETERMINISTIC = {"deterministic": True, "log_every_steps": 1}


def stop_at(monkeypatch, place, number):
    """Ask for a stop, as a signal does, when `watchdog.heartbeat(place)` is called for the n-th time."""
    from cola_ds.distributed import signals, watchdog

    beat, seen = watchdog.heartbeat, [0]

    def counted(doing, **step):
        beat(doing, **step)
        seen[0] += doing == place
        if doing == place and seen[0] == number:
            signals._requested = signal.SIGTERM

    monkeypatch.setattr(watchdog, "heartbeat", counted)


@pytest.mark.parametrize(
    ("engine", "dtype", "stops"),
    [
        ("zero2", "bf16", [("micro batch 2", 6)]),
        ("offload", "bf16", [("micro batch 1", 3), ("micro batch 1", 8)]),  # in each start: steps 3 and 11
        ("zero3", "fp32", [("examples", 9)]),
        ("zero3", "fp16", [("micro batch 2", 10)]),
    ],
    ids="{0[0]}".format,
)
def test_stopped_and_resumed_is_never_stopped(process, toy, tmp_path, monkeypatch, engine, dtype, stops):
    if dtype == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed's CPU accelerator lacks fp16")
    sections = {"lora": {"dropout": 0.1}, "run": DETERMINISTIC}
    whole, _ = three_links(toy, tmp_path / "whole", engine, dtype, **sections)
    with run(process, whole, monkeypatch) as (chain, _):
        assert chain.train.joined == (
            ON_CPU or dtype != "fp32"
        )  # varlen, whose backward pass must give the same bits too
        expected = weights_hash(chain)
    parts, _ = three_links(toy, tmp_path / "parts", engine, dtype, **sections)
    for place, number in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, place, number)
            with run(process, parts, patch) as (chain, _):
                assert chain is None
    with run(process, parts, monkeypatch) as (chain, _):
        assert weights_hash(chain) == expected
    assert record(tmp_path / "parts/run") == record(tmp_path / "whole/run")
    events = [row["event"] for row in rows(tmp_path / "parts/run/events.jsonl")]
    assert events.count("resumed") == len(stops)


# `cola-ds train` in a process of its own, which at its n-th beat gets a signal.
COMMAND = """
import sys
from tests.support.jobs import at_heartbeat
at_heartbeat(0, [0], int(sys.argv[1]), int(sys.argv[2]))
from cola_ds.cli import main
sys.exit(main(["train", *sys.argv[3:]]))
"""


def command(path, number, signum):
    words = [sys.executable, "-c", COMMAND, str(number), str(int(signum)), str(path)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def environment():
    """Without what the tests' own group has set: cola-ds alone is a run of one process."""
    import os

    own = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUBLAS_WORKSPACE_CONFIG",
    )
    found = {name: value for name, value in os.environ.items() if name not in own}
    return {**found, "PYTHONPATH": f"{REPOSITORY}:{found.get('PYTHONPATH', '')}"}


def test_signals_and_a_kill_end_in_the_same_bits(process, toy, tmp_path, monkeypatch):
    sections = {"lora": {"dropout": 0.1}, "run": DETERMINISTIC}
    whole, _ = three_links(toy, tmp_path / "whole", "zero3", "bf16", **sections)
    with run(process, whole, monkeypatch):
        pass
    parts, _ = three_links(toy, tmp_path / "parts", "zero3", "bf16", **sections)
    # Each step beats once for its examples and once for each of its two micro batches.
    status, said = command(parts, 3 * 4 + 2, signal.SIGUSR1)  # in step 5, after the first knot and what it beats
    assert status == 75, said
    status, said = command(parts, 10, signal.SIGKILL)
    assert status == -signal.SIGKILL, said
    with run(process, parts, monkeypatch):  # another process than those
        pass
    events = [row["event"] for row in rows(tmp_path / "parts/run/events.jsonl")]
    assert events.count("resumed") == 2
    assert record(tmp_path / "parts/run") == record(tmp_path / "whole/run")
