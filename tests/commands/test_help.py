"""What the command says of itself: --help with its examples, in no time, and --version."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from cola_ds.cli import main
from cola_ds.commands.parser import make_parser, parse
from cola_ds.report.paper import PAPER_TABLES
from cola_ds.run.environment import version_of

COMMANDS = [
    "train",
    "evaluate",
    "export",
    "plan",
    "doctor",
    "data",
    "inspect",
    "sweep",
    "report",
    "schema",
    "completion",
]
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
    assert re.findall(r"^    (\w+)(?:  |$)", said_by(capsys, "--help"), re.MULTILINE) == COMMANDS


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


def test_every_word_has_its_help():
    """In one form: no capital, no full stop."""
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    for name, parser in commands.choices.items():
        for action in parser._actions:
            said = action.help or ""
            assert said and not said.endswith(".") and (said[0].islower() or said.startswith("GPUs")), (
                name,
                action.dest,
            )


def test_overrides_may_stand_anywhere():
    args = parse(["train", "run.yaml", "optim.lr=1", "--fresh", "lora.rank=4"])
    assert (args.fresh, args.overrides) == (True, ["optim.lr=1", "lora.rank=4"])


@pytest.mark.parametrize(
    "words", [["train", "run.yaml", "--frsh"], ["inspect", "run", "a=1"], ["train", "r", "--fresh", "x"]]
)
def test_words_that_mean_nothing_are_refused(capsys, words):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err == f"cola-ds: {words[0]}: {words[-1]} means nothing here; see cola-ds {words[0]} --help\n"
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: COMMAND; see cola-ds --help"),
        (["trian"], "'trian'"),
        (["train"], "train: the following arguments are required: RUN.yaml; see cola-ds train --help"),
        (["export", "r", "--to", "x", "--out", "y"], "export: argument --to: invalid choice: 'x' (choose from "),
        (["train", "r", "--processes", "x"], "train: argument --processes: invalid int value: 'x'; see"),
        (["inspect", "r", "a\nb" * 900], "means nothing here"),
    ],
)
def test_mistakes_in_words_are_one_line(capsys, monkeypatch, words, says):
    """From process 0 alone, as all are called alike."""
    monkeypatch.setattr("cola_ds.cli._LAST_WORDS_S", 0)
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 2
    said = capsys.readouterr()
    assert (says in said.err, said.err.count("\n"), said.out) == (True, 1, "")
    assert len(said.err) < 600
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (main(words), capsys.readouterr().err) == (2, "")


def test_version(capsys):
    assert said_by(capsys, "--version") == f"cola-ds {version_of('cola_ds')}\n"


def test_help_takes_no_time():
    """Less than half a second of a core; nothing that takes longer than that is imported for it."""
    took = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "cola_ds", "--help"], capture_output=True, text=True, timeout=60)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: cola-ds [-h] [--version] COMMAND ...")
    assert min(took) < 0.5
    loaded = "import sys, cola_ds.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60)
    assert "cola_ds.commands.parser" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())
