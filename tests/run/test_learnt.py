"""What leaves a run is what was trained: whatever reads a run checks what is there against what the run recorded, or refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cola_ds.checkpoint.decide import Identity, ResumeOptions, choose_start
from cola_ds.commands.evaluate import evaluation_config
from cola_ds.commands.export import export
from cola_ds.commands.inspect import inspect
from cola_ds.config.loading import load_config
from cola_ds.errors import UserError
from cola_ds.report.report import report
from cola_ds.run.folder import RunDir
from cola_ds.run.learnt import read_learnt
from cola_ds.run.marker import Marker
from tests.commands.test_cli import cola_ds
from tests.support.toys import run_config, save_model, save_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy):
    """The folder of a finished run of two links, and beside it its YAML and its base model."""
    place = tmp_path_factory.mktemp("learnt")
    model = shutil.copytree(toy[0], place / "model")
    config = run_config(
        model, toy[1], place / "run", lora={"rank": [8, 4]}, data={"eval": str(toy[2])}, optim={"max_steps": 4, "lr": 1e-2},
        checkpoint={"every_steps": 2, "keep": 9},
    )  # fmt: skip
    done = cola_ds("train", save_run(place / "run.yaml", config))
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def edit_yaml(key, value):
    def edit(run):
        text = (run / "run.yaml").read_text(encoding="utf-8")
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
        (run / "run.yaml").write_text(text.replace(line, line.partition(":")[0] + f": {value}"), encoding="utf-8")

    return edit


def edit_json(name, change):
    def edit(run):
        held = json.loads((run / name).read_bytes())
        change(held)
        (run / name).write_text(json.dumps(held), encoding="utf-8")

    return edit


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


def change_link(run):
    path = run / "chain/link-0002/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")


def swap_links(run):
    """Each whole, and each of this run."""
    one, two = run / "chain/link-0001", run / "chain/link-0002"
    one.rename(run / "x"), two.rename(one), (run / "x").rename(two)


EDITS = {
    "alpha": (edit_yaml("alpha", 800), r"run\.yaml says lora\.alpha 800\.0, and run\.json 8\.0"),
    "dtype": (edit_yaml("dtype", "bf16"), r"run\.yaml says model\.dtype bf16, and run\.json fp32"),
    "length": (edit_yaml("length", 3), r"run\.yaml: lora\.rank .* names 2 links|chain\.length 3"),
    "seed": (edit_yaml("dir", "elsewhere\n  seed: 7"), r"run\.yaml says run\.seed 7, and run\.json 0"),
    "link of another rank": (
        edit_json("chain/link-0001/adapter_config.json", lambda held: held.update(r=16)),
        r"link-0001/adapter_config\.json is not what the run wrote",
    ),
    "shortened": (
        edit_json("result.json", lambda held: held.update(links=1, link_sha256=held["link_sha256"][:1])),
        r"result\.json is not what the run in this folder wrote",
    ),
    "shortened record": (
        edit_json("run.json", lambda held: held["facts"].update(links=held["facts"]["links"][:1])),
        r"run\.json is not what a run wrote",
    ),
    "score": (edit_json("result.json", lambda held: held["scores"].update(loss=0.1)), r"result\.json is not what the run"),
    "empty result": (write("result.json", b""), r"result\.json is not what the run in this folder wrote"),
    "result of a list": (write("result.json", b"[]"), r"result\.json is not what the run in this folder wrote"),
    "changed link": (change_link, r"link-0002/adapter_model\.safetensors is not the link that the run tied"),
    "swapped links": (swap_links, r"link-0001/adapter_model\.safetensors is not the link that the run tied"),
    "removed link": (lambda run: shutil.rmtree(run / "chain/link-0002"), "lacks chain/link-0002"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_run_is_read_by_nobody(run, tmp_path, edit):
    """Not by an export, an evaluation, a report, nor as a run that has finished; inspect shows what is wrong."""
    change, message = EDITS[edit]
    read_learnt(run)
    change(run)
    task = [str(run), "zero-shot", "cb", "cb", str(tmp_path / "evaluation"), 1, []]
    for reader in (
        lambda: export(run, "hf", tmp_path / "hf"),
        lambda: export(run, "peft", tmp_path / "peft"),
        lambda: export(run, "links", tmp_path / "links"),
        lambda: evaluation_config(*task),
    ):
        with pytest.raises(UserError, match=message) as caught:
            reader()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    for said in (lambda: inspect(str(run)), lambda: report([str(run)], None, None, None, None)):
        try:
            shown = said()
        except UserError as error:
            shown = str(error)
        assert re.search(message, shown), shown


@pytest.mark.parametrize(
    "edit", ["empty result", "result of a list", "score", "changed link", "removed link", "shortened"]
)
def test_existence_is_not_completion(finished, run, edit):
    """A result that is not this run's, or links that are not those that were tied, are no finished run."""
    change, message = EDITS[edit]
    config = load_config(finished.parent / "run.yaml", [f"run.dir={run}"])
    identity = Identity(**Marker.read(run).facts["identity"])
    assert choose_start(RunDir(run), config, identity, ResumeOptions(), None) == "finished"
    change(run)
    with pytest.raises(UserError, match=message):
        choose_start(RunDir(run), config, identity, ResumeOptions(), None)
    (run / "result.json").unlink()  # the remedy that it names
    assert choose_start(RunDir(run), config, identity, ResumeOptions(), None).step == 4


def test_a_forged_record_is_compared_with_the_links(run, tmp_path):
    """Its hash holds, but each link's own config says otherwise."""
    for change in ({"lora_alpha": 80.0}, {"lora_rank": 4}, {"layers": ["model.layers.0.self_attn.q_proj"]}):
        marker = Marker.read(run)
        before = dict(marker.facts["links"][0])
        marker.facts["links"][0] |= change
        marker.write()
        with pytest.raises(UserError, match=r"link-0001/adapter_config\.json and .*run\.json contradict each other"):
            export(run, "links", tmp_path / "links")
        marker.facts["links"][0] = before
        marker.write()
    read_learnt(run)


def test_a_runs_own_links_are_what_is_evaluated(run):
    with pytest.raises(UserError, match=r"override model\.links=x contradicts the run"):
        evaluation_config(str(run), "zero-shot", "cb", "cb", None, 1, ["model.links=x"])


def test_the_result_of_another_run(finished, run, tmp_path):
    """Where this one has not finished, or has: neither is taken for its own, nor removed."""
    other = json.loads((run / "result.json").read_bytes()) | {"run": "0" * 32}
    (run / "result.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(UserError, match="put that back, or remove it, and the run's own command goes on"):
        read_learnt(run)
    begun = tmp_path / "begun"
    folder = RunDir(begun)
    config = load_config(finished.parent / "run.yaml", [f"run.dir={begun}"])
    folder.create(config, {}, {"identity": {"engine": {}, "train": "", "eval": None}})
    shutil.copy(run / "result.json", begun)
    with pytest.raises(UserError, match=r"holds result\.json, but no run left it there"):
        choose_start(RunDir(begun), config, Identity({}, "", None), ResumeOptions(), None)
    assert (begun / "result.json").read_bytes() == (run / "result.json").read_bytes()


# -- the base model ----------------------------------------------------------------------------------------------------


def changed_model(source, target):
    """The same shapes and names, one element changed."""
    from safetensors.torch import load_file, save_file

    if source != target:
        shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_base_that_has_moved_or_changed(finished, run, tmp_path):
    base = finished.parent / "model"
    moved, other = shutil.copytree(base, tmp_path / "moved"), changed_model(base, tmp_path / "other")
    expected = weights(export(run, "hf", tmp_path / "there"))
    base.rename(finished.parent / "gone")
    try:
        with pytest.raises(UserError, match=rf"model\.path {base}, the base model of {run}, is not there any more"):
            export(run, "hf", tmp_path / "hf")
        with pytest.raises(
            UserError, match=rf"model\.path {other} is not the base model of {run}: its fingerprint is "
        ):
            export(run, "hf", tmp_path / "hf", [f"model.path={other}"])
        with pytest.raises(UserError, match=r"an export takes model\.path and model\.revision"):
            export(run, "hf", tmp_path / "hf", [f"model.path={moved}", "lora.alpha=3"])
        assert not (tmp_path / "hf").exists()
        assert "licence is not known here" in (export(run, "peft", tmp_path / "peft") / "README.md").read_text()
        done = cola_ds("export", run, "--to", "hf", "--out", tmp_path / "hf", f"model.path={moved}")
        assert done.returncode == 0, done.stderr
        assert weights(tmp_path / "hf") == expected
        task = tmp_path / "sums.yaml"
        task.write_text('prompt: "{prompt}"\nanswer: "{completion}"\n', encoding="utf-8")
        for name, source in (("train", "train"), ("validation", "train")):
            data = load_config(finished.parent / "run.yaml").data
            shutil.copy(getattr(data, source), tmp_path / f"{name}.jsonl")
        words = [
            "evaluate",
            run,
            "--task",
            task,
            "--dir",
            tmp_path,
            "data.num_train=2",
            "data.num_dev=2",
            "data.num_test=2",
        ]
        done = cola_ds(*words, "--out", tmp_path / "of-gone")
        assert (done.returncode, str(base) in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
        done = cola_ds(*words, "--out", tmp_path / "of-moved", f"model.path={moved}")
        assert done.returncode == 0, done.stderr
    finally:
        (finished.parent / "gone").rename(base)


def weights(folder):
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_other_weights_in_the_bases_folder_are_not_exported(finished, run, tmp_path):
    """Silently wrong before: the folder is the one that the run names."""
    base = finished.parent / "model"
    shutil.copytree(base, tmp_path / "kept")
    changed_model(base, base)
    try:
        with pytest.raises(UserError, match="is not the base model of"):
            export(run, "hf", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
        with pytest.raises(UserError, match="is not the base model of"):  # which the adapter would name
            export(run, "peft", tmp_path / "peft")
    finally:
        shutil.rmtree(base)
        shutil.move(tmp_path / "kept", base)


def test_an_evaluation_exports_nothing(finished, run, tmp_path):
    """Of a run's links, or of a bare model: neither has learnt anything."""
    for links, message in (
        (str(finished), f"what the run in {finished} learnt: export that"),
        (None, "nothing of its own"),
    ):
        folder = RunDir(tmp_path / f"evaluation-{links is None}")
        words = ["method=zero-shot", "chain.length=1", "lora.rank=8", f"model.links={links or 'null'}"]
        folder.create(load_config(finished.parent / "run.yaml", words), {}, {"base": "x", "base_links": None})
        folder.write_result({"steps": 0})
        with pytest.raises(UserError, match=message):
            export(folder.path, "hf", tmp_path / "hf")


def test_method_full_exports_what_it_trained(toy, tmp_path):
    model, train, _ = toy
    config = run_config(model, train, tmp_path / "run", method="full", chain={"length": 1}, optim={"max_steps": 1})
    done = cola_ds("train", save_run(tmp_path / "run.yaml", config))
    assert done.returncode == 0, done.stderr
    assert weights(export(tmp_path / "run", "hf", tmp_path / "hf")) != weights(model)
    same_files(model, tmp_path / "hf")
    changed_model(tmp_path / "run/model", tmp_path / "run/model")
    with pytest.raises(UserError, match=r"model/model\.safetensors is not the model that the run trained"):
        export(tmp_path / "run", "hf", tmp_path / "again")


def same_files(base, exported):
    """What describes the model is the base's own, to the byte."""
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in exported.iterdir()} == {path.name for path in base.iterdir()} | {"README.md"}


# -- more of a finished run --------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_asked_for_more(finished, run, tmp_path):
    """Trained on where there is something to train, refused with what to do where there is not; never "finished already"."""
    words = ["train", finished.parent / "run.yaml", f"run.dir={run}"]
    for more, message in (
        (["optim.lr=1e-3", "--allow-change", "optim.lr"], "it is at step 4, where the changed config ends"),
        (["optim.max_steps=6"], "to go on in spite of it: --allow-change optim.max_steps"),
        (
            ["optim.max_steps=6", "--allow-change", "optim.max_steps"],
            "the run has tied links at steps [2], the changed config",
        ),
    ):
        done = cola_ds(*words, *more)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "finished already" not in done.stdout
    assert read_learnt(run).result["steps"] == 4
    knots = [
        "chain.knots={steps: [2]}",
        "--allow-change",
        "chain.knots",
        "optim.max_steps=6",
        "--allow-change",
        "optim.max_steps",
    ]
    done = cola_ds(*words, *knots)
    assert done.returncode == 0, done.stderr
    assert "going on from step 4, in link 2" in done.stderr
    assert read_learnt(run).result["steps"] == 6
    done = cola_ds(*words, *knots)
    assert (done.returncode, "finished already" in done.stdout) == (0, True)


# -- other programs ----------------------------------------------------------------------------------------------------


def test_a_left_over_adapter_is_refused(toy, tmp_path):
    """peft, where it is installed, would have it applied on top of the whole model."""
    model = shutil.copytree(toy[0], tmp_path / "model")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}', encoding="utf-8")
    config = run_config(model, toy[1], tmp_path / "run")
    done = cola_ds("train", save_run(tmp_path / "run.yaml", config), "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{model} holds adapter_config.json" in done.stderr


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """A Python with a Transformers 4 of its own; all else is this environment's."""
    packages = tmp_path_factory.mktemp("transformers-4")
    wanted = ["transformers==4.57.3", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, *wanted],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"pip cannot install Transformers 4: {done.stderr.strip().splitlines()[-1]}")
    return packages


OPEN = """
import json, sys, torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.")
base, merged = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sys.argv[1:3])
for path, scaling in zip(sys.argv[3::2], map(float, sys.argv[4::2])):
    link = load_file(path)
    for name in [n for n in link if n.endswith(".lora_A.weight")]:
        weight = base.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight"))
        weight.data += scaling * link[name.replace("lora_A", "lora_B")] @ link[name]
ids = [AutoTokenizer.from_pretrained(path)("12+30=42").input_ids for path in sys.argv[1:3]]
assert ids[0] == ids[1], ids
with torch.no_grad():
    one, other = (model(torch.tensor([ids[0] * 8])).logits for model in (base, merged))
print(json.dumps([float((one - other).abs().max()), merged.config.rope_theta, one.tolist()]))
"""


def test_an_export_opens_in_transformers_4(toy, tmp_path, transformers_4):
    """A base that Transformers 4 wrote, with a rope_theta at the top level, which version 5 keeps elsewhere: base plus links, as
    that version sees them, are the export as it sees it. And version 5 sees the same."""
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "model")
    said = json.loads((model / "config.json").read_bytes())
    del said["rope_parameters"], said["dtype"]
    said |= {"rope_theta": 500000.0, "torch_dtype": "float32", "transformers_version": "4.43.0"}
    (model / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    tokenizer = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = run_config(model, toy[1], tmp_path / "run", lora={"rank": [8, 4]}, optim={"max_steps": 2, "lr": 1e-2})
    done = cola_ds("train", save_run(tmp_path / "run.yaml", config))
    assert done.returncode == 0, done.stderr
    merged = export(tmp_path / "run", "hf", tmp_path / "merged")
    same_files(model, merged)
    links = [str(word) for link in read_learnt(tmp_path / "run").links for word in (link.file, link.scaling)]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, model, merged, *links], env={"PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference, theta, logits = json.loads(done.stdout.splitlines()[-1])
    assert (difference < 1e-5, theta) == (True, 500000.0)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(merged)("12+30=42").input_ids
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(merged)(torch.tensor([ids * 8])).logits
    torch.testing.assert_close(here, torch.tensor(logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "x": 1}, {"dtype": "bfloat16", "x": 1}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        ({"x": "\u00e9"}, {"x": "\u00e9", "torch_dtype": "bfloat16"}),
    ],
)
def test_of_the_config_the_dtype_alone_changes(tmp_path, said, expected):
    from cola_ds.run.model_folder import _set_dtype

    path = tmp_path / "config.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    _set_dtype(path, "bfloat16")
    assert json.loads(path.read_text(encoding="utf-8")) == expected
