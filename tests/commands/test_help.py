"""What the command says of itself: --help with its examples, in no time, and --version."""

import re
import shlex
import subprocess
import sys
import time

import pytest

from cola_ds.cli import main
from cola_ds.commands.parser import parse
from cola_ds.report.paper import PAPER_TABLES
from cola_ds.run.environment import version_of

COMMANDS = ["train", "evaluate", "export", "plan", "doctor", "data", "inspect", "sweep", "report"]
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "numpy", "pyarrow", "pydantic", "safetensors"}


def said_by(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples_of(text):
    """The lines below `examples:`."""
    _, found, rest = text.partition("\nexamples:\n")
    assert found, text
    return [line.strip() for line in rest.splitlines()]


def test_help_names_every_command(capsys):
    assert re.findall(r"^    (\w+)  ", said_by(capsys, "--help"), re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_a_call_that_parses(capsys, command):
    """Those under a launcher as well: its own words come first."""
    examples = examples_of(said_by(capsys, command, "--help"))
    assert examples
    for example in examples:
        words = shlex.split(example.replace("-m cola_ds ", "cola-ds "))
        args = parse(words[words.index("cola-ds") + 1 :])
        assert args.command == command
        assert all(re.fullmatch(r"[\w.]+=\S+", word) for word in getattr(args, "overrides", []))
        assert getattr(args, "paper", None) in (None, *PAPER_TABLES)


def test_overrides_may_stand_anywhere():
    args = parse(["train", "run.yaml", "optim.lr=1", "--fresh", "lora.rank=4"])
    assert (args.fresh, args.overrides) == (True, ["optim.lr=1", "lora.rank=4"])


@pytest.mark.parametrize(
    "words", [["train", "run.yaml", "--frsh"], ["inspect", "run", "a=1"], ["train", "r", "--fresh", "x"]]
)
def test_words_that_mean_nothing_are_refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"cola-ds: error: unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_version(capsys):
    assert said_by(capsys, "--version") == f"cola-ds {version_of('cola_ds')}\n"


def test_help_takes_no_time():
    """Less than half a second; nothing that takes longer than that is imported for it."""
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cola_ds", "--help"], capture_output=True, text=True, timeout=60)
        took.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: cola-ds [-h] [--version] COMMAND ...")
    assert min(took) < 0.5
    loaded = "import sys, cola_ds.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60)
    assert "cola_ds.commands.parser" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())
