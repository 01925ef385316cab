"""Nobody's files are removed, and nobody's run is mistaken for another: what a run did not write stays as it is, whatever its
name and whatever the command."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cola_ds.cli import main
from cola_ds.commands.export import export
from cola_ds.errors import UserError
from cola_ds.run.folder import RunDir
from cola_ds.run.marker import Marker
from tests.commands.test_cli import cola_ds
from tests.support.sweeps import SCORES, save_base, tell, write_sweep
from tests.support.toys import rows, run_config, save_run

# Beside a run's own files, and inside its own folders: names that it might take for its own, or for scratch of its own.
FOREIGN = [
    "removed-holiday/photo.txt", "notes.txt", "run.yaml.partial", "result.json.partial", "lock.json.old", ".hidden/x",
    "run.json.bak", "chain/notes.txt", "chain/link-0001/notes.txt", "chain/link-0001.partial/x", "chain/link-0099/x",
    "checkpoints/mine.txt", "checkpoints/partial-step-00000003/x", "checkpoints/aside-step-00000003/x",
    "checkpoints/step-00000003/notes.txt", "checkpoints/step-00000006/notes.txt", "checkpoints/step-00000003-copy/state.json",
    "checkpoints/latest.bak", "model/config.json", "model/weights.safetensors",
]  # fmt: skip


def tree(folder: Path, but=()) -> dict:
    """Every file below, with its content and its times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not any(name.startswith(part) for part in but):
            found[name] = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
    return found


def plant(folder: Path, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}", encoding="utf-8")


def foreign(folder: Path) -> dict:
    return {name: held for name, held in tree(folder).items() if held[0].startswith(b"mine: ")}


@pytest.fixture(scope="module")
def run_file(toy, tmp_path_factory):
    place = tmp_path_factory.mktemp("owned")
    model, train, dev = toy
    config = run_config(
        model, train, place / "run", data={"eval": str(dev)}, checkpoint={"every_steps": 3}, eval={"every": "link"}
    )
    plant(place / "run", ["removed-holiday/photo.txt", "notes.txt", "run.yaml.partial"])
    done = cola_ds("train", save_run(place / "run.yaml", config))
    assert done.returncode == 0, done.stderr
    return place / "run.yaml"


def test_no_command_changes_what_no_run_wrote(run_file, toy, tmp_path):
    """Runs, resumed and begun anew, exports, reports, evaluations, inspections, doctor: the tree of foreign files around and
    inside the run is the same to the byte, times included."""
    place = run_file.parent
    run = place / "run"
    plant(run, FOREIGN)
    plant(place, [f"{name}.partial/x" for name in ("hf", "peft", "links")] + ["reports/loss.png.txt", "runs.csv.bak"])
    task = tmp_path / "sums.yaml"
    task.write_text('prompt: "{prompt}"\ncandidates: ["1", "2"]\nlabel: gold\n', encoding="utf-8")
    for split in ("train", "validation"):
        lines = [json.dumps({"prompt": f"{n}+1=", "gold": n % 2}) for n in range(6)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    before, inputs = foreign(place), tree(toy[0].parent)
    assert len(before) >= len(FOREIGN)
    for words in (
        ["train", run_file],
        ["train", run_file, "--resume", run / "checkpoints/step-00000003"],
        ["train", run_file, "--fresh", "optim.max_steps=4"],
        ["train", run_file, "--fresh", "method=full", "chain.length=1", f"run.dir={place / 'full'}"],
        ["export", run, "--to", "hf", "--out", place / "hf"],
        ["export", run, "--to", "peft", "--out", place / "peft"],
        ["export", run, "--to", "links", "--out", place / "links"],
        ["report", run, "--plot", place / "reports/loss.png", "--csv", place / "runs.csv"],
        [
            "evaluate",
            run,
            "--task",
            task,
            "--dir",
            tmp_path,
            "--out",
            place / "evaluation",
            "data.num_train=2",
            "data.num_dev=2",
        ],
        ["inspect", run],
        ["doctor", run_file],
    ):
        if words[0] in ("export", "report", "inspect"):  # quicker without a process of their own
            assert main([str(word) for word in words]) == 0, words
        else:
            done = cola_ds(*words)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert foreign(place) == before, words
    assert tree(toy[0].parent) == inputs
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["steps"] == 4
    # Its own are gone, or are those of the new run; nothing of its own scratch is left.
    own = {name for name in tree(run) if name not in foreign(run)}
    assert {name for name in own if name.startswith("checkpoints/step-")} >= {"checkpoints/step-00000004/manifest.json"}
    assert not [name for name in own if "step-00000006" in name or Path(name).name.startswith(".")]
    assert [row["event"] for row in rows(run / "events.jsonl")].count("started") == 1


def test_a_sweep_changes_what_it_wrote_alone(tmp_path):
    save_base(tmp_path)
    tell(tmp_path, scores=SCORES)
    config = write_sweep(tmp_path, seeds=[0], grid=None, tasks={"easy": {"data.train": "easy.jsonl"}})
    plant(tmp_path / "runs", ["sweep.json.partial", "easy/notes.txt", "easy/lora/seed=0.log.old", "easy/lora/seed=1/x"])
    before = foreign(tmp_path)
    assert main(["sweep", str(config)]) == 0
    assert foreign(tmp_path) == before
    for name in ("runs/sweep.json", "runs/easy/lora/seed=0.log"):
        shutil.rmtree(tmp_path / "runs")
        plant(tmp_path, [name])
        before = foreign(tmp_path)
        assert main(["sweep", str(config)]) == 2
        assert foreign(tmp_path) == before


# -- what is no run ----------------------------------------------------------------------------------------------------


def looks_like_a_run(folder, toy):
    """The files of a user, by the names of a run's."""
    plant(
        folder,
        ["environment.json", "metrics.jsonl", "model/config.json", "chain/x", "checkpoints/step-00000001/state.json"],
    )
    return save_run(folder.parent / "run.yaml", run_config(toy[0], toy[1], folder))


@pytest.mark.parametrize("words", [[], ["--fresh"], ["--resume", "never"]])
@pytest.mark.parametrize(
    "name", ["environment.json", "metrics.jsonl", "model/config.json", "checkpoints/a", "run.json", "run.yaml"]
)
def test_a_folder_of_somebody_elses_is_refused(toy, tmp_path, words, name):
    from cola_ds.checkpoint.decide import Identity, ResumeOptions, choose_start
    from cola_ds.config.loading import load_config

    config = load_config(looks_like_a_run(tmp_path / "mine", toy))
    shutil.rmtree(tmp_path / "mine")
    plant(tmp_path / "mine", [name])
    before = tree(tmp_path / "mine")
    options = ResumeOptions(resume="never" if "never" in words else "auto", fresh="--fresh" in words)
    with pytest.raises(UserError, match=r"no run left it there|is not what a run wrote") as caught:
        choose_start(RunDir(tmp_path / "mine"), config, Identity({}, "", None), options, None)
    assert str(tmp_path / "mine") in str(caught.value)
    assert tree(tmp_path / "mine") == before


def test_the_command_refuses_it_too(toy, tmp_path):
    path = looks_like_a_run(tmp_path / "mine", toy)
    before = tree(tmp_path)
    done = cola_ds("train", path, "--fresh")
    assert (done.returncode, "holds metrics.jsonl, but no run left it there" in done.stderr) == (2, True), done.stderr
    assert tree(tmp_path) == before


# -- the marker --------------------------------------------------------------------------------------------------------


def marked(folder):
    folder.mkdir(exist_ok=True)
    marker = Marker(folder)
    marker.begun = True
    marker.own(["run.yaml", "metrics.jsonl", "chain/link-0001/adapter_config.json"])
    return marker


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "7",
        "[" * 100_000,
        '{"run": 1e999}',
        "\0",
        '{"cola_ds": 1, "sha256": "x"}',
        "1" * 10**6,
        "/dev/zero",
    ],
)
def test_a_damaged_marker_vouches_for_nothing(tmp_path, text):
    if text == "/dev/zero":
        (tmp_path / "run.json").symlink_to(text)
    else:
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is not what a run wrote") as caught:
        RunDir(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "chain/../../x", "notes.txt", "model/..", "checkpoints/step-1/x", "chain"]
)
def test_a_marker_that_names_what_no_run_writes_is_refused(tmp_path, name):
    """Though its hash holds: a folder that was made to have files removed."""
    marker = marked(tmp_path)
    marker.wrote.add(name)
    marker.write()
    with pytest.raises(UserError, match="it names what no run writes"):
        Marker.read(tmp_path)


def test_own_files_alone_are_removed(tmp_path):
    marker = marked(tmp_path)
    plant(tmp_path, ["run.yaml", "metrics.jsonl", "chain/link-0001/adapter_config.json", "chain/notes", "evals.jsonl"])
    os.symlink(tmp_path / "evals.jsonl", tmp_path / "linked")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # a folder in its place is somebody's
    marker.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "chain", "evals.jsonl", "linked", "metrics.jsonl"}
    assert [path.name for path in (tmp_path / "chain").iterdir()] == ["notes"]
    with pytest.raises(FileExistsError):
        marker.own(["evals.jsonl"])


def test_a_run_that_is_half_removed_is_begun_anew(toy, tmp_path):
    """Killed while --fresh removes: what is left is no run to go on with, and the next start removes the rest."""
    from cola_ds.config.loading import load_config

    config = load_config(save_run(tmp_path / "run.yaml", run_config(toy[0], toy[1], tmp_path / "run")))
    folder = RunDir(tmp_path / "run")
    folder.create(config, {}, {})
    folder.event("checkpoint", step=3)
    folder.mine.begun = False
    folder.mine.write()
    again = RunDir(tmp_path / "run")
    assert not again.holds_a_run()
    again.check_is_free(config, fresh=False)
    first = again.mine.id
    again.create(config, {}, {})
    assert not (tmp_path / "run/events.jsonl").exists()
    assert RunDir(tmp_path / "run").mine.id != first


@pytest.mark.parametrize(
    "facts", [None, {}, 5, {"config": 5}, {"links": [{}]}, {"links": [], "surprise": 1}, {"result": "x"}]
)
def test_a_marker_of_other_facts_is_refused(tmp_path, facts):
    """Though its hash holds. Without facts it is a run of which nothing is known: no defect of this program."""
    marker = marked(tmp_path)
    marker.facts = facts
    marker.write()
    if facts == {}:
        assert Marker.read(tmp_path).facts["links"] == []
        return
    with pytest.raises(UserError, match=r"run\.json is not what a run wrote"):
        Marker.read(tmp_path)


def test_no_link_is_followed(toy, tmp_path):
    """A run's folder in which chain, checkpoints or one of these leads to another run's, or to the user's own."""
    from cola_ds.checkpoint.store import CheckpointFolder
    from cola_ds.config.loading import load_config

    config = load_config(save_run(tmp_path / "run.yaml", run_config(toy[0], toy[1], tmp_path / "run")))
    theirs = tmp_path / "theirs"
    plant(
        theirs, ["chain/link-0001/adapter_config.json", "checkpoints/step-00000003/manifest.json", "checkpoints/latest"]
    )
    before = tree(theirs)
    for name in ("chain", "checkpoints", "checkpoints/step-00000003"):
        folder = RunDir(tmp_path / name.replace("/", "-"))
        folder.create(config, {}, {})
        folder.mine.own(
            ["chain/link-0001/adapter_config.json", "checkpoints/step-00000003/manifest.json", "checkpoints/latest"]
        )
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).symlink_to(theirs / name)
        if name.endswith("3"):
            assert not CheckpointFolder(folder).is_own(folder.path / name)
        if "/" not in name:
            with pytest.raises(UserError, match=f"holds {name}, but no run left it there"):
                folder.check_is_free(config, fresh=True)
            with pytest.raises(FileExistsError):
                folder.mine.own([f"{name}/link-0002/adapter_config.json" if name == "chain" else f"{name}/best"])
        folder.mine.remove()
        folder.mine.clear_scratch()
        assert tree(theirs) == before


@pytest.mark.parametrize(
    "name", ["environment.json", "result.json", "metrics.jsonl", "run.yaml", "chain", "checkpoints"]
)
def test_nothing_is_removed_before_everything_is_looked_at(toy, tmp_path, name):
    """With a folder of the user's in the place of a file, or the other way round, --fresh is refused, and the old run stands."""
    from cola_ds.config.loading import load_config

    config = load_config(save_run(tmp_path / "run.yaml", run_config(toy[0], toy[1], tmp_path / "run")))
    folder = RunDir(tmp_path / "run")
    folder.create(config, {}, {})
    folder.event("started")
    (folder.path / name).unlink(missing_ok=True)
    plant(folder.path, [name if "." not in name else f"{name}/mine"])
    before = tree(folder.path)
    with pytest.raises(UserError, match=f"holds {name}, but no run left it there"):
        folder.check_is_free(config, fresh=True)
    assert tree(folder.path) == before


def test_an_evaluation_takes_no_trained_runs_place(toy, tmp_path):
    """Neither that of the run whose links it reads nor that of any other, --fresh or not."""
    from cola_ds.config.loading import load_config

    path = save_run(tmp_path / "run.yaml", run_config(toy[0], toy[1], tmp_path / "run", data={"eval": str(toy[2])}))
    folder = RunDir(tmp_path / "run")
    folder.create(load_config(path), {}, {})
    config = load_config(path, ["method=zero-shot", "chain.length=1", f"model.links={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"run, which the run reads; name a folder of its own"):
        folder.check_inputs([config.model.links])
    with pytest.raises(UserError, match="holds a run that has trained, which no evaluation takes the place of"):
        folder.check_is_free(config, fresh=True)


# -- exports -----------------------------------------------------------------------------------------------------------


def test_exports_do_not_share_scratch(run_file, tmp_path, monkeypatch):
    """Two to one folder at the same time: one is there, whole, and the other says so; a failed one leaves nothing."""
    from cola_ds.commands import export as exporting

    run, inner = run_file.parent / "run", exporting.adapter_files

    def another_is_quicker(*args, **options):
        monkeypatch.setattr(exporting, "adapter_files", inner)
        export(run, "peft", tmp_path / "out/adapter")
        return inner(*args, **options)

    monkeypatch.setattr(exporting, "adapter_files", another_is_quicker)
    with pytest.raises(UserError, match=r"--out .*adapter already exists: another export was quicker"):
        export(run, "peft", tmp_path / "out/adapter")
    assert {path.name for path in (tmp_path / "out/adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "cola_ds.json",
        "README.md",
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        export(run, "links", tmp_path / "file/x")
