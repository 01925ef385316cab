"""Completion: what `cola-ds completion` prints, in real shells, at their prompts."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from cola_ds.commands.completion import script
from cola_ds.config.keys import flat_keys
from cola_ds.config.schema import RunConfig
from cola_ds.report.paper import PAPER_TABLES
from tests.commands.test_help import COMMANDS


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for name in ("run.yaml", "notes.txt"):
        (folder / name).write_text("", encoding="utf-8")
    (folder / "runs").mkdir()
    (folder / "my runs").mkdir()
    for shell in ("bash", "zsh"):
        (folder / f"completion.{shell}").write_text(script(shell, PAPER_TABLES), encoding="utf-8")
    return folder


@pytest.fixture
def offered(here):
    """What bash is offered for a line, by the script's own function."""

    def offered(line):
        code = 'source completion.bash; COMP_LINE=$0; COMP_POINT=${#0}; _cola_ds; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-c", code, line], cwd=here, capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stderr == ""
        return [word for word in done.stdout.splitlines() if word]

    return offered


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cola-ds ", [*COMMANDS, "--help", "--version"]),
        ("cola-ds tr", ["train"]),
        ("cola-ds train --re", ["--resume"]),
        ("cola-ds train --resume ", ["auto", "never"]),
        ("cola-ds train ", ["my runs", "runs", "run.yaml"]),
        ("cola-ds train run.yaml --freeze ", ["my runs", "runs"]),
        ("cola-ds train run.yaml --processes ", []),
        ("cola-ds inspect ", ["my runs", "runs"]),
        ("cola-ds export runs --to ", ["hf", "peft", "links"]),
        ("cola-ds export runs ", ["model.path=", "model.revision="]),
        ("cola-ds evaluate m --task sq", ["squad"]),
        ("cola-ds report runs --paper ma", ["main"]),
        ("cola-ds schema ", ["run", "sweep"]),
        ("cola-ds train run.yaml model.dt", ["model.dtype="]),
        ("cola-ds train run.yaml optim.lr", ["optim.lr=", "optim.lr_ratio="]),
        ("cola-ds train run.yaml meth", ["method="]),
        ("cola-ds train run.yaml model.dtype=", ["fp32", "bf16", "fp16"]),
        ("cola-ds train run.yaml --fresh model.compile=t", ["true"]),
        ("cola-ds train run.yaml lora.train=", ["both", "A", "B"]),
        ("cola-ds train run.yaml data.train=n", ["notes.txt"]),
        ("cola-ds train run.yaml --allow-change optim.sch", ["optim.schedule", "optim.schedule_over"]),
        ("cola-ds inspect runs x", []),
    ],
)
def test_what_bash_is_offered(offered, line, words):
    assert offered(line) == words


def test_every_key_is_offered(offered):
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"train": "t"}, "optim": {"lr": 1, "epochs": 1}, "run": {"dir": "r"}}
    )
    assert {word.rstrip("=") for word in offered("cola-ds train run.yaml ")} == {*flat_keys(config.model_dump())}


def typed(shell, folder, keys):
    """What a shell makes of a line that is typed at its prompt: the words that an `echo` of it prints."""
    number, terminal = pty.fork()
    if number == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "dumb", "PS1": "$ ", "HOME": str(folder)}
        os.execvp(shell[0], shell)
    seen = b""

    def until(what, within_s=20):
        nonlocal seen
        deadline = time.monotonic() + within_s
        while what not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096)
        seen = seen.partition(what)[2]

    try:
        os.write(
            terminal, f"source completion.{shell[0]}; cola-ds() {{ printf '<%s>' \"$@\"; }}; echo rea''dy\n".encode()
        )
        until(b"ready")
        os.write(terminal, keys.encode() + b"\t")
        time.sleep(1)
        os.write(terminal, b"\necho o''ver\n")
        until(b"<")
        end = seen
        until(b"over")
        return "<" + end.decode().partition(">\r")[0].partition("\n")[0].rpartition(">")[0] + ">"
    finally:
        os.close(terminal)
        os.waitpid(number, 0)


TYPED = [
    ("cola-ds tra", "<train>"),
    ("cola-ds export r --to p", "<export><r><--to><peft>"),
    ("cola-ds train run.yaml model.dtype=b", "<train><run.yaml><model.dtype=bf16>"),
    ("cola-ds train run.yaml chain.tie=l", "<train><run.yaml><chain.tie=local>"),
    ("cola-ds train run.yaml model.ada", "<train><run.yaml><model.adapter=>"),
    ("cola-ds train run.yaml model.adapter=runs", "<train><run.yaml><model.adapter=runs/>"),
    ("cola-ds inspect my", "<inspect><my runs/>"),
    ("cola-ds train run.yaml model.ada\tsomewhere/x", "<train><run.yaml><model.adapter=somewhere/x>"),
]


@pytest.mark.parametrize(("keys", "words"), TYPED)
def test_a_tab_at_the_prompt_of_bash(here, keys, words):
    assert typed(["bash", "--norc", "-i"], here, keys) == words


@pytest.mark.beyond_ci
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("keys", "words"), TYPED)
def test_a_tab_at_the_prompt_of_zsh(here, keys, words):
    assert typed(["zsh", "-f", "-i"], here, keys) == words
