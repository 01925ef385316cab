"""Checkpoints as files: each damage is found and named, nothing foreign is loaded, and the last good one is never deleted."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from cola_ds.checkpoint.format import DamagedError, read_checkpoint
from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.run.folder import RunDir
from tests.commands.test_cli import cola_ds
from tests.support.jobs import run_job
from tests.support.runs import record, three_links, train_in
from tests.support.toys import rows, save_sums

FILES = [
    "manifest.json", "state.json", "random.safetensors", "trained-00001.safetensors", "link-0001.safetensors",
    "link-0002.safetensors",
]  # fmt: skip
NEWEST, BEFORE = "step-00000011", "step-00000010"


@pytest.fixture(scope="module")
def stopped(toy, tmp_path_factory):
    """A run that stopped after 11 of 12 steps, with a checkpoint of each; and what it leaves when it goes on."""
    folder = tmp_path_factory.mktemp("stopped")
    config = three_links(toy, checkpoint={"every_steps": 1, "keep": 99})
    train_in(folder / "whole", config)
    train_in(folder, config, stops=[("step", 11)], end=False)
    return folder, record(folder / "whole/run")


def damaged_run(stopped, tmp_path):
    """A copy of that run, and the words that start it."""
    folder = shutil.copytree(stopped[0] / "run", tmp_path / "run")
    (folder / "result.json").unlink(missing_ok=True)
    return folder, ["train", stopped[0] / "run.yaml", f"run.dir={folder}"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(bytes(content))


def point_elsewhere(path):
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


class Exploit:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['COLA_DS_TEST_EXPLOIT']}",)


def become_a_pickle(path):
    path.write_bytes(pickle.dumps(Exploit()))


DAMAGES = {
    "truncated": truncate, "a byte flipped": flip, "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(), "a link to a file elsewhere": point_elsewhere, "a folder": become_a_folder,
    "a pickle": become_a_pickle,
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_found(stopped, tmp_path, monkeypatch, file, damage):
    monkeypatch.setenv("COLA_DS_TEST_EXPLOIT", str(tmp_path / "exploited"))
    folder, _ = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    read_checkpoint(path)
    DAMAGES[damage](path / file)
    with pytest.raises(DamagedError, match=file.replace(".", r"\.")):
        read_checkpoint(path)
    assert not (tmp_path / "exploited").exists()
    read_checkpoint(folder / "checkpoints" / BEFORE)


def rewrite_manifest(path, change):
    """A manifest that vouches for whatever is there: what a hostile checkpoint would bring."""
    from cola_ds.checkpoint.format import manifest

    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_bytes(manifest(change(files)))


@pytest.mark.parametrize("file", ["random.safetensors", "trained-00001.safetensors", "link-0001.safetensors"])
def test_a_pickle_with_a_manifest_that_vouches_for_it(stopped, tmp_path, monkeypatch, file):
    monkeypatch.setenv("COLA_DS_TEST_EXPLOIT", str(tmp_path / "exploited"))
    folder, _ = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    (path / file).unlink()
    for content in (pickle.dumps(Exploit()), None):
        if content is None:
            torch.save({"model": torch.ones(3)}, path / file)
        else:
            (path / file).write_bytes(content)
        rewrite_manifest(path, lambda files: files)
        with pytest.raises(DamagedError, match=f"{file} is not (a safetensors file|the link that was tied)"):
            read_checkpoint(path)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "/etc/passwd", "link-0001.safetensors/../state.json", "x.pt", ""]
)
def test_names_that_lead_elsewhere_are_refused(stopped, tmp_path, name):
    folder, _ = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    rewrite_manifest(path, lambda files: {**files, name: files["state.json"]})
    with pytest.raises(DamagedError, match="which is no file of a checkpoint"):
        read_checkpoint(path)


def test_a_foreign_state_is_refused(stopped, tmp_path):
    folder, _ = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    state = json.loads((path / "state.json").read_bytes())
    counters = state["chain"]
    hostile = [{**counters, **change} for change in ({"link": "x"}, {"link": 10**12}, {"step": -1}, {"surprise": 1})]
    hostile += [{key: value for key, value in counters.items() if key != "step_in_link"}]
    for change in (
        {"format": 2},
        {"surprise": 1},
        {"knots": "4"},
        {"rows": {}},
        *({"chain": held} for held in hostile),
    ):
        (path / "state.json").write_text(json.dumps({**state, **change}), encoding="utf-8")
        rewrite_manifest(path, lambda files: files)
        with pytest.raises(DamagedError, match=r"state\.json is not of this version's format"):
            read_checkpoint(path)
    path.rename(path.with_name("step-00000099"))
    (path.with_name("step-00000099") / "state.json").write_text(json.dumps(state), encoding="utf-8")
    rewrite_manifest(path.with_name("step-00000099"), lambda files: files)
    with pytest.raises(DamagedError, match=r"state\.json is of step 11"):
        read_checkpoint(path.with_name("step-00000099"))


def test_a_link_that_was_not_tied_is_refused(stopped, tmp_path):
    """Whatever the manifest says: its hash stands beside the counters, since its knot."""
    from safetensors.torch import load_file, save_file

    folder, words = damaged_run(stopped, tmp_path)
    link = folder / "chain/link-0001/adapter_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(link).items()}, link, metadata={"format": "pt"})
    path = folder / "checkpoints" / NEWEST
    read_checkpoint(path)  # it has a copy of its own
    shutil.copy(link, path / "link-0001.safetensors")
    rewrite_manifest(path, lambda files: files)
    with pytest.raises(DamagedError, match=r"link-0001\.safetensors is not the link that was tied"):
        read_checkpoint(path)
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert record(folder) == stopped[1]  # from the one before, and the link in chain/ is written again
    save_file({name: tensor + 1e-3 for name, tensor in load_file(link).items()}, link, metadata={"format": "pt"})
    done = cola_ds("export", folder, "--to", "hf", "--out", tmp_path / "merged")
    assert (done.returncode, "is not the link that the run tied" in done.stderr) == (2, True)


def change_tensors(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(key for key in t if key.startswith("exp_avg/"))), "it has exp_avg/"),
        (lambda t: t.update({"surprise/x": torch.ones(2)}), "holds surprise, which no optimizer here keeps"),
        (lambda t: t.update({next(key for key in t if "sq/" in key): torch.ones(2)}), "of shape (2,), the model wants"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(stopped, tmp_path, change, message):
    """Before any of them is sent to another process."""
    folder, words = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    change_tensors(path / "trained-00001.safetensors", change)
    rewrite_manifest(path, lambda files: files)
    statuses, said = run_job(tmp_path, words)
    assert statuses == [2, 2], said
    assert message in said


def test_a_checkpoint_that_is_a_link_is_not_taken(stopped, tmp_path):
    folder, _ = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / NEWEST
    path.rename(tmp_path / NEWEST)
    path.symlink_to(tmp_path / NEWEST)
    with pytest.raises(DamagedError, match="it is not a folder of its own"):
        read_checkpoint(path)


def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path):
    """Two are damaged: the run goes on from the third, says so, and ends with the same bits."""
    folder, words = damaged_run(stopped, tmp_path)
    flip(folder / "checkpoints" / NEWEST / "trained-00001.safetensors")
    truncate(folder / "checkpoints" / BEFORE / "manifest.json")
    shown = cola_ds("inspect", folder).stdout
    assert f"{NEWEST}  DAMAGED: trained-00001.safetensors has changed: its SHA-256 does not hold, latest" in shown
    assert f"{BEFORE}  DAMAGED: manifest.json " in shown
    assert "step-00000009  checksums hold" in shown
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert (
        f"{NEWEST} is damaged: trained-00001.safetensors has changed: its SHA-256 does not hold; using the one before it"
        in said
    )
    assert f"{BEFORE} is damaged: manifest.json " in said
    assert "going on from step 9, in link 3" in said
    assert record(folder) == stopped[1]


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(stopped, tmp_path):
    folder, words = damaged_run(stopped, tmp_path)
    path = folder / "checkpoints" / BEFORE
    flip(path / "link-0001.safetensors")
    statuses, said = run_job(tmp_path, [*words, "--resume", path])
    assert statuses == [2, 2]
    assert f"cola-ds: checkpoint {path} is damaged: link-0001.safetensors has changed" in said
    assert "it is not loaded" in said
    statuses, said = run_job(tmp_path, [*words, "--resume", tmp_path / "nowhere"])
    assert statuses == [2, 2]
    assert "nowhere is not a checkpoint's folder" in said


def test_what_a_kill_leaves_of_a_folder_that_begins(stopped, tmp_path):
    """run.json without anything else; a start from elsewhere before its first checkpoint; a result that is undone."""
    folder, words = damaged_run(stopped, tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(folder / "run.json", begun)
    killed = {"sabotage": die_in, "arguments": ("write_link",)}
    statuses, said = run_job(tmp_path, [*words, f"run.dir={begun}", "--resume", folder], **killed)
    assert statuses == [-9, 3], said
    (begun / "run.yaml").unlink()
    statuses, said = run_job(tmp_path, [*words, f"run.dir={begun}", "--resume", folder])
    assert statuses == [0, 0], said
    assert "has checkpoints of its own: it goes on from them" in said
    assert record(begun)["result"] == stopped[1]["result"]
    earlier = begun / "checkpoints/step-00000012"
    statuses, said = run_job(tmp_path, [*words, f"run.dir={begun}", "--resume", earlier], **killed)
    assert statuses == [-9, 3], said
    statuses, said = run_job(tmp_path, [*words, f"run.dir={begun}"])
    assert (statuses, "finished already" in said) == ([0, 0], False)
    assert record(begun)["result"] == stopped[1]["result"]


def die_in(rank, name):
    """Process 0 is killed when it first writes a link."""
    if rank == 0:
        setattr(RunDir, name, lambda *args: os.kill(os.getpid(), 9))


def test_a_start_from_elsewhere_contradicts_fresh(stopped, tmp_path):
    folder, words = damaged_run(stopped, tmp_path)
    statuses, said = run_job(tmp_path, [*words, "--fresh", "--resume", folder], world_size=1)
    assert (statuses, "goes on: give one of them" in said) == ([2], True)
    assert (folder / "checkpoints" / NEWEST).is_dir()


def test_all_damaged_is_refused(stopped, tmp_path):
    folder, words = damaged_run(stopped, tmp_path)
    for path in (folder / "checkpoints").glob("step-*"):
        flip(path / "random.safetensors")
    statuses, said = run_job(tmp_path, words)
    assert statuses == [2, 2]
    assert "has no checkpoint that can be used, but has had some" in said
    assert not (folder / "result.json").exists()


def test_the_last_good_checkpoint_is_never_deleted(stopped, tmp_path):
    """The newest are damaged while the run goes on: with `keep` 2, those that verify count."""
    folder, _ = damaged_run(stopped, tmp_path)
    checkpoints = CheckpointFolder(RunDir(folder))
    flip(checkpoints.at(9) / "state.json")
    truncate(checkpoints.at(8) / "random.safetensors")
    checkpoints.tidy(11, keep=3, best_step=5)
    assert [path.name[-2:] for path in checkpoints.steps()] == ["11", "10", "07", "05"]
    assert checkpoints.pointer("best") == "step-00000005"
    assert checkpoints.pointer("latest") == NEWEST


# -- what may change between two starts --------------------------------------------------------------------------------


def test_a_changed_config_is_refused_with_the_list(stopped, tmp_path):
    folder, words = damaged_run(stopped, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change, message in {
        "optim.lr=0.1": "optim.lr 0.005 -> 0.1 (to go on in spite of it: --allow-change optim.lr;",
        "run.seed=7": "run.seed 0 -> 7",
        "lora.alpha=32": "lora.alpha 8.0 -> 32.0 (lora.alpha cannot change within a run;",
        "lora.rank=[8, 4, 2]": "lora.rank [8, 4, 4] -> [8, 4, 2] (lora.rank cannot change",
        "model.dtype=bf16": "model.dtype fp32 -> bf16 (model.dtype cannot change",
        "data.max_length=8": "data.max_length 64 -> 8",
        "eval.every=end": "eval.every epoch -> end",
        "deepspeed=ds_configs/zero2.json": "deepspeed: ds_configs/zero2.json does not say what the run began with",
    }.items():
        statuses, said = run_job(tmp_path, [*words, change], world_size=1)
        assert statuses == [2], (change, said)
        assert "the config has changed since" in said
        assert message in said, said
    statuses, said = run_job(tmp_path, [*words, "optim.lr=0.1", "run.seed=7"], world_size=1)
    assert "optim.lr 0.005 -> 0.1; run.seed 0 -> 7" in said
    statuses, said = run_job(tmp_path, [*words, "lora.alpha=32", "--allow-change", "lora.alpha"], world_size=1)
    assert statuses == [2], said
    statuses, said = run_job(tmp_path, [*words, "--allow-change", "optim.rl"], world_size=1)
    assert (statuses, "--allow-change optim.rl: there is no such key" in said) == ([2], True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_cannot_change_the_result_may_change(stopped, toy, tmp_path):
    """Logging, saving, and where the same model and the same data lie."""
    folder, words = damaged_run(stopped, tmp_path)
    model = shutil.copytree(toy[0], tmp_path / "moved")
    data = shutil.copy(toy[1], tmp_path / "moved.jsonl")
    words += [f"model.path={model}", f"data.train={data}", "checkpoint.keep=1", "run.hang_after_s=null"]
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert record(folder) == stopped[1]


def test_a_change_that_is_allowed(stopped, tmp_path):
    folder, words = damaged_run(stopped, tmp_path)
    words += ["optim.max_steps=14", "--allow-change", "optim.max_steps"]
    statuses, said = run_job(tmp_path, words)  # even knots would then lie elsewhere
    assert statuses == [2, 2]
    assert "the run has tied links at steps [4, 8], the changed config would at [5, 10, 14]" in said
    words += ["chain.knots={steps: [4, 8]}", "--allow-change", "chain.knots"]
    statuses, said = run_job(tmp_path, words)
    assert statuses == [0, 0], said
    assert json.loads((folder / "result.json").read_bytes())["steps"] == 14


def test_another_base_model_is_refused(stopped, toy, tmp_path):
    """Same shapes, same names, one element changed."""
    from safetensors.torch import load_file, save_file

    folder, words = damaged_run(stopped, tmp_path)
    model = shutil.copytree(toy[0], tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    statuses, said = run_job(tmp_path, [*words, f"model.path={model}"])
    assert statuses == [2, 2]
    assert f"model.path {model} is not the base model of {folder / 'checkpoints' / NEWEST}: its fingerprint is " in said
    assert not (folder / "result.json").exists()


def test_other_data_is_refused(stopped, toy, tmp_path):
    _, words = damaged_run(stopped, tmp_path)
    data = save_sums(tmp_path / "other.jsonl", 40, seed=3)
    statuses, said = run_job(tmp_path, [*words, f"data.train={data}"])
    assert statuses == [2, 2]
    assert f"data.train {toy[1]} -> {data}" in said
    statuses, said = run_job(tmp_path, [*words, f"data.train={data}", "--allow-change", "data.train"])
    assert statuses == [0, 0], said


def test_a_finished_run_of_another_config_is_not_overwritten(stopped, tmp_path):
    folder = shutil.copytree(stopped[0] / "whole/run", tmp_path / "run")
    words = ["train", stopped[0] / "run.yaml", f"run.dir={folder}"]
    statuses, said = run_job(tmp_path, words, world_size=1)
    assert (statuses, "this run is finished already" in said) == ([0], True)
    statuses, said = run_job(tmp_path, [*words, "optim.max_skips_in_a_row=1", "checkpoint.keep=9"], world_size=1)
    assert (statuses, "this run is finished already" in said) == ([0], True)
    statuses, said = run_job(tmp_path, [*words, "optim.lr=1"], world_size=1)
    assert statuses == [2]
    assert f"the config has changed since {folder}: optim.lr 0.005 -> 1.0" in said
    statuses, said = run_job(tmp_path, [*words, "--resume", "never"], world_size=1)
    assert (statuses, "already holds a run; name another, or start it anew with --fresh" in said) == ([2], True)


def test_inspect_of_a_stopped_run(stopped, tmp_path):
    folder, _ = damaged_run(stopped, tmp_path)
    shutil.rmtree(folder / "chain/link-0002")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write('{"step": 1')  # a process that was killed while it wrote
    done = cola_ds("inspect", folder)
    assert done.returncode == 0, done.stderr
    for line in (
        "status       stopped on SIGTERM after step 11; the same command goes on (",
        "steps        10 of 12 logged, loss ",
        "best         held-out loss ",
        "links        1 of 3 tied",
        "  link 2     step 8, LoRA rank 4, |delta| ",
        "checkpoints  11",
        f"  {NEWEST}  checksums hold (but chain/link-0002/adapter_model.safetensors is not the link in it), latest",
    ):
        assert line in done.stdout, done.stdout
    done = cola_ds("inspect", tmp_path / "nothing")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    started, loaded = rows(folder / "events.jsonl")[:2]
    assert (started["event"], loaded["event"]) == ("started", "loaded")
    model = Path(json.loads((folder / "run.json").read_bytes())["facts"]["config"]["model"]["path"])
    assert loaded["bytes"] == (model / "model.safetensors").stat().st_size
    assert loaded["gb_per_s"] == pytest.approx(loaded["bytes"] / 1e9 / loaded["seconds"])
