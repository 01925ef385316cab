"""The documents: what they name is there, and every command in them runs, in a copy of the repository."""

import json
import re
import shlex
import string
from pathlib import Path

import pytest
import yaml

from tests.support.forked import shared_command
from tests.support.launching import in_copy
from tests.support.toys import REPOSITORY, save_model, save_sums

FOLDERS = (".github", "cola_ds", "ds_configs", "launch", "slurm", "tests")
_BELOW = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.md"))
DOCUMENTS = ["README.md", *(str(path.relative_to(REPOSITORY)) for path in _BELOW)]
README, LAUNCH, SWEEPS, THEORY, ENGINE, SLURM = (
    f"{folder}README.md" for folder in ("", "launch/", "launch/sweeps/", "launch/theory/", "ds_configs/", "slurm/")
)
# What cannot run in the copy, and the test that runs it instead.
ELSEWHERE = {
    "./launch/quickstart.sh": "tests/launch/test_launch.py",
    "./launch/chat.sh": "tests/launch/test_launch.py",
    "./slurm/submit.sh": "tests/launch/test_slurm.py",
    "./slurm/sweep.sh": "tests/launch/test_slurm_sweep.py",
    "srun ": "tests/commands/test_doctor.py",
    "./launch/test.sh": ".ci/run",
    "./launch/setup.sh": "launch/test.sh",
    "ruff ": ".ci/run",
    "mypy": ".ci/run",
}
OF_THE_SYSTEM = (
    "source ",
    "squeue ",
    "tail ",
)  # in_copy has sourced; the others show what is there to somebody who waits

quick = pytest.mark.core  # no process: what a contributor runs has them


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), flags=re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[str]:
    """Every command of a document that runs in the copy, with its continuation lines joined."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    every = [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]
    return [command for command in every if not command.startswith((*ELSEWHERE, *OF_THE_SYSTEM))]


def anchors(document: str) -> set[str]:
    """The headings, as GitHub writes them in a link."""
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.DOTALL | re.MULTILINE)
    letters = str.maketrans("", "", string.punctuation.replace("-", "").replace("_", ""))
    return {line.lower().translate(letters).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@quick
def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 150


@quick
@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document):
    text = read(document)
    here = (REPOSITORY / document).parent
    for path in re.findall(r"`(?:\./)?((?:launch|ds_configs|cola_ds|slurm|tests|\.ci|\.github)/[\w./-]+)[`\s]", text):
        assert (REPOSITORY / path).exists(), path
    for target in re.findall(r"!?\[[^\]]*\]\(([^)]*)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        led = (here / path).resolve() if path else REPOSITORY / document
        assert led.is_file(), target
        assert not anchor or anchor in anchors(str(led.relative_to(REPOSITORY))), target


@quick
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_blocks_of_a_document_are_what_they_say(document):
    for block in blocks(document, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for block in blocks(document, "json"):
        assert {"prompt", "completion"} <= set(json.loads(block))
    for block in blocks(document, "python"):
        compile(block, document, "exec")
    assert set(re.findall(r"^```(\w+)$", read(document), re.MULTILINE)) <= {"bash", "json", "python", "yaml"}


@quick
def test_what_runs_elsewhere_does():
    """What these tests leave out is in the file that is said to run it."""
    every = "\n".join(block for document in DOCUMENTS for block in blocks(document, "bash"))
    for begin, path in ELSEWHERE.items():
        assert re.search(rf"^{re.escape(begin)}", every, re.MULTILINE), begin
        assert begin.split("/")[-1].strip() in read(path), begin


@quick
def test_the_hooks_are_what_ci_checks():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert len(repository["hooks"]) == 3
    for hook in repository["hooks"]:
        words = hook["entry"].split()
        assert " ".join(word for word in words if not word.startswith("-")) in read(".ci/run")


@quick
def test_every_document_with_commands_is_run_here():
    ours = {document for document in DOCUMENTS if commands(document)}
    assert ours == {README, LAUNCH, SWEEPS, THEORY, ENGINE, SLURM}


def save_named(copy: Path, document: str, *names: str) -> None:
    """The YAML files that a document shows, by the names that it gives them."""
    for name in names:
        (text,) = re.findall(rf"this\s+`{name}.yaml`:\n\n```yaml\n(.*?)```", read(document), flags=re.DOTALL)
        (copy / f"{name}.yaml").write_text(text, encoding="utf-8")


def save_task(folder: Path) -> None:
    """Rows that are examples of sst2 and of cb."""
    folder.mkdir(parents=True)
    for name, count in (("train", 700), ("validation", 10)):
        rows = ({"sentence": f"a {n}", "premise": f"b {n}", "hypothesis": "c", "label": n % 2} for n in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def reader(copy):
    """The copy of somebody who has followed the README, with a toy model and data for the reader's own. `cola-ds` is forked
    from a process that has imported it, which saves seconds a command; what starts processes of its own is the real thing."""
    save_model(copy / "models/my-llama")
    (copy / "data").mkdir(exist_ok=True)
    save_sums(copy / "data/train.jsonl", 40)
    save_sums(copy / "data/dev.jsonl", 12, seed=1)
    save_named(copy, README, "my_run")
    (copy / "bin").mkdir()
    (copy / "bin/cola-ds").write_text(f'#!/bin/sh\nexec {shlex.join(shared_command())} "$@"\n', encoding="utf-8")
    (copy / "bin/cola-ds").chmod(0o755)
    for command in commands(README):
        in_copy(copy, command)
    return copy


def test_the_first_run(reader):
    assert len(commands(README)) >= 5
    assert (reader / "my-merged-model/model.safetensors").is_file()
    assert (reader / "my-adapter/adapter_model.safetensors").is_file()
    assert (reader / "runs/my-run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (reader / "runs/my-run/report.html").read_bytes().startswith(b"<!doctype html>")


def test_from_python(reader):
    """The README's lines, as the script that they are."""
    (block,) = blocks(README, "python")
    (reader / "lines.py").write_text(block, encoding="utf-8")
    said = in_copy(reader, "python lines.py").splitlines()[-1]
    held_out = json.loads((reader / "runs/notebook/result.json").read_text(encoding="utf-8"))["scores"]
    assert said == f"{held_out} 2"
    assert (reader / "my-notebook-model/model.safetensors").is_file()


def test_running(reader):
    said = [in_copy(reader, command) for command in commands(LAUNCH)]
    assert len(said) >= 5


def test_engine_files(reader):
    assert [in_copy(reader, command) for command in commands(ENGINE)]


def test_the_theory(copy):
    for command in commands(THEORY):
        in_copy(copy, command)
    assert (copy / "theory-study/gaps.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_sweeps_and_tables(reader):
    """One of the 46 runs of the sweep is a real one, with a knot; what the others leave is made up."""
    save_named(reader, SWEEPS, "my_base", "my_sweep")
    save_task(reader / "tasks/sst2")
    save_task(reader / "tasks/cb")
    names = in_copy(reader, "cola-ds sweep my_sweep.yaml --list").splitlines()
    number = next(line.split()[0] for line in names if line.endswith("cb/cola/lr=0.001/seed=0"))
    in_copy(reader, f"cola-ds sweep my_sweep.yaml optim.epochs=5 --only {number}")
    (reader / "told.json").write_text('{"fail": {}, "scores": {}}', encoding="utf-8")
    with open(reader / "my_sweep.yaml", "a", encoding="utf-8") as out:
        out.write("launcher: python tests/support/stand_in.py . {run}\n")
    for command in commands(SWEEPS):
        in_copy(reader, command)
    assert len((reader / "starts").read_text(encoding="utf-8").splitlines()) == 45
    table = in_copy(reader, "cola-ds report runs/low-data --paper low-data").replace("*", "")
    made_up = re.escape("52.00 ±1.58 (5)")
    assert re.search(rf"\| cb \| accuracy \| {made_up} \| {made_up} \[72.76\] \| .* \(5\) \[73.21\] \|", table)
    assert (reader / "runs/low-data/runs.csv").is_file()
    assert (reader / "runs/low-data/figures/loss-cb.png").is_file()
    for command in commands(SLURM):  # what it says of this sweep and of the README's run
        in_copy(reader, command)
