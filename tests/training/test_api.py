"""A run from Python: it does what the command does, returns, and leaves the process as it was."""

import os
import subprocess
import sys

import pytest

from cola_ds.distributed.launcher import free_port
from tests.support.distributed import run_distributed
from tests.support.toys import REPOSITORY, run_config, save_run

WHAT_IS_LEFT = """
import os, signal, sys, threading
def left():
    import torch.distributed
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
    launchers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    ours = ("signals", "watch", "rendezvous", "lock", "ahead")
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name in ours)
    return handlers, launchers, threads, torch.distributed.is_initialized()
def held():
    import gc
    gc.collect()
    kinds = [type(each).__name__ for each in gc.get_objects()]
    open_files = len(os.listdir("/proc/self/fd"))
    return [sum(kind in names for kind in kinds) for names in (("DeepSpeedEngine",), ("LlamaForCausalLM",))], open_files
import torch
before = left()
"""


def python(folder, code, timeout_s=240):
    """What a program of its own prints, which must end well."""
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(  # a shell may have these left, and each run needs a port of its own
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **launched}, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def place(toy, tmp_path):
    """A folder with a run's YAML."""
    model, train, dev = toy
    config = run_config(model, train, tmp_path / "run", data={"eval": str(dev)}, checkpoint={"every_steps": 2})
    save_run(tmp_path / "my_run.yaml", config)
    return tmp_path


def test_names_cost_nothing_before_they_are_used():
    used = "cola_ds.RunConfig, cola_ds.load_config, cola_ds.UserError"
    code = f"import sys, cola_ds; {used}; print('torch' in sys.modules, *dir(cola_ds))"
    (line,) = python(REPOSITORY, code)
    assert line.startswith("False ")
    assert {"RunConfig", "load_config", "prepare", "train", "evaluate", "export"} <= set(line.split())
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        getattr(__import__("cola_ds"), "tu" + "ne")


def test_a_run_leaves_the_process_as_it_was(place):
    """Also one that was refused, one that a signal stopped, and the next, which ends with the bits of an uninterrupted run."""
    said = python(
        place,
        WHAT_IS_LEFT
        + """
import cola_ds
from cola_ds.errors import StoppedError, UserError
from cola_ds.training import loop

def config(name, *words):
    return cola_ds.load_config("my_run.yaml", [f"run.dir={name}", *words])

whole = cola_ds.train(config("whole"))
assert whole.ran and left() == before, (left(), before)
assert str(whole.folder) == "whole" and whole.scores["loss"] > 0
assert not cola_ds.train(config("whole")).ran  # finished already
first = held()
cola_ds.train(config("once more"))
assert held()[0] == [0, 0] and held()[1] <= first[1], (first, held())
try:
    cola_ds.train(config("refused", "model.path=no/such/model"))
except UserError as error:
    print("refused:", error)
assert left() == before and not os.path.exists("refused")
step = loop.train_step
def stopping(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)
loop.train_step = stopping
try:
    cola_ds.train(config("stopped"))
except StoppedError as error:
    print("stopped:", error)
assert left() == before, (left(), before)
loop.train_step = step
again = cola_ds.train(config("stopped"))
assert again.ran and again.result["link_sha256"] == whole.result["link_sha256"]
try:
    cola_ds.train(config("whole"), resume="never")
except UserError as error:
    print("never:", error)
for wrong, call in {
    "no config": lambda: cola_ds.train("my_run.yaml"),
    "no form": lambda: cola_ds.export("whole", "PEFT", "other"),
    "trains": lambda: cola_ds.evaluate(config("whole").model.path, "rte", method="full"),
}.items():
    try:
        call()
    except UserError as error:
        print(wrong, error)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
try:
    cola_ds.train(config("grouped"))
except UserError as error:
    print("group:", error)
assert torch.distributed.is_initialized()
torch.distributed.destroy_process_group()
print("export:", cola_ds.export("whole", "peft", "adapter"))
assert left() == before
print("all of it")
""",
    )
    text = "\n".join(said)
    assert "refused: model.path no/such/model is not a folder" in text
    assert "stopped: stopped on SIGTERM after step 1, with a checkpoint" in text
    assert "never: run.dir whole already holds a run" in text
    assert "no config cola_ds.train takes a RunConfig, as cola_ds.load_config(FILE) gives; it is 'my_run.yaml'" in text
    assert "no form --to PEFT: an export is hf, peft or links" in text
    assert "trains method full trains: an evaluation's is zero-shot or icl" in text
    assert "group: torch.distributed has begun in this process" in text
    assert "export: adapter" in text
    assert said[-1] == "all of it"


def test_interrupted_before_the_first_step(place):
    """As by the button of a notebook while the model loads."""
    said = python(
        place,
        WHAT_IS_LEFT
        + """
import time
import cola_ds
from cola_ds.training import build

since = time.monotonic()

def loading(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)

build.load_model = loading
try:
    cola_ds.train(cola_ds.load_config("my_run.yaml"))
except KeyboardInterrupt:
    assert time.monotonic() - since < 25
    print("interrupted")
assert left() == before, (left(), before)
""",
    )
    assert said[-1] == "interrupted"


def train_from_python(process, path):
    import torch

    import cola_ds

    torch.set_num_threads(1)
    return cola_ds.train(cola_ds.load_config(path)).result["link_sha256"]


def test_of_two_processes(place):
    """Each calls it, and each has the result."""
    first, second = run_distributed(train_from_python, 2, place / "my_run.yaml")
    assert first == second
    assert len(first) == 2
