"""Checkpoints of method full: each process writes and reads what it keeps, and no process has a whole model of it."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cola_ds.checkpoint import shards
from cola_ds.checkpoint.format import hash_of, read_checkpoint
from cola_ds.commands.export import export
from cola_ds.commands.inspect import inspect
from cola_ds.distributed import collectives
from cola_ds.distributed.shards import Part
from cola_ds.errors import UserError
from cola_ds.training.save import space_needed
from tests.distributed.test_loading import private_bytes
from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.runs import record, run_once, three_links, train_in
from tests.support.toys import REPOSITORY, save_model, save_run, thorough

OFFLOAD = str(REPOSITORY / "ds_configs/zero3_offload_cpu.json")
ZERO_2 = str(REPOSITORY / "ds_configs/zero2.json")
FULL = {
    "method": "full", "chain": {"length": 1}, "lora": {"rank": 8}, "checkpoint": {"every_steps": 3, "keep": 9},
    "run": {"log_every_steps": 1},
}  # fmt: skip
VARIANTS = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "tied embeddings": {"model": {"architecture": "llama-tied"}},
    "auto": {"deepspeed": "auto"},
    "stage 2": {"deepspeed": ZERO_2},
    "stage 2 bf16": {"deepspeed": ZERO_2, "model": {"dtype": "bf16"}},
    "offload": {"deepspeed": OFFLOAD},
    "offload bf16": {"deepspeed": OFFLOAD, "model": {"dtype": "bf16", "architecture": "opt"}},
    "adagrad": {"optim": {"name": "adagrad"}},
    "sgd": {"optim": {"name": "sgd"}},
}


@pytest.fixture(scope="module")
def config_of(toy, tmp_path_factory):
    """Twelve steps of method full, with a checkpoint every third one."""
    models = {}

    def config(variant="fp32", **sections):
        chosen = {name: dict(s) if isinstance(s, dict) else s for name, s in VARIANTS[variant].items()}
        architecture = chosen.get("model", {}).pop("architecture", "llama")
        if architecture not in models:
            models[architecture] = save_model(tmp_path_factory.mktemp(architecture), architecture)
        model = {"path": str(models[architecture]), **chosen.pop("model", {})}
        return three_links(toy, **{**FULL, **chosen, **sections, "model": model})

    return config


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    """The run that was never stopped, by variant: its weights, its record and its folder. Run when first asked for."""
    found = {}

    def run(variant="fp32"):
        if variant not in found:
            folder = tmp_path_factory.mktemp("whole")
            weights = train_in(folder, config_of(variant))
            found[variant] = weights, record(folder / "run"), folder / "run"
        return found[variant]

    return run


@pytest.mark.parametrize(
    "variant",
    thorough(
        ["fp32", "tied embeddings", "stage 2 bf16", "offload bf16"],
        ["bf16", "auto", "stage 2", "offload", "adagrad", "sgd"],
    ),
)
def test_a_stopped_run_ends_with_the_same_bits(config_of, whole, tmp_path, variant):
    weights, expected, _ = whole(variant)
    assert train_in(tmp_path, config_of(variant), stops=[("step", 2), ("step", 5)]) == weights
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("sizes", "variant"),
    thorough(
        [((2, 1), "fp32"), ((2, 4), "fp32"), ((4, 1, 2), "tied embeddings"), ((2, 4, 1), "stage 2")],
        [((1, 2), "fp32"), ((4, 2), "fp32"), ((1, 2), "offload")],
    ),
)
def test_at_another_world_size(config_of, whole, tmp_path, sizes, variant):
    """Within fp32's tolerance, with the same examples; the model too."""
    stops = [("step", 6), ("step", 2)][: len(sizes) - 1]
    _, expected, straight = whole(variant)
    train_in(tmp_path, config_of(variant), world_size=sizes, stops=stops)
    found = record(tmp_path / "run")
    assert [row["tokens"] for row in found["metrics.jsonl"]] == [row["tokens"] for row in expected["metrics.jsonl"]]
    for name, keys in (("metrics.jsonl", ("loss", "grad_norm")), ("evals.jsonl", ("loss",))):
        for a, b in zip(found[name], expected[name], strict=True):
            for key in keys:
                assert a[key] == pytest.approx(b[key], rel=1e-5)
    a, b = model_of(straight), model_of(tmp_path / "run")
    for key in a:
        assert (a[key] - b[key]).abs().max() <= 1e-4 * a[key].abs().max()


def model_of(run):
    from safetensors.torch import load_file

    return load_file(run / "model/model.safetensors")


# -- what lies where ---------------------------------------------------------------------------------------------------


def partitioned(tensors, count):
    """What each of `count` processes keeps of some tensors, as ZeRO-3 cuts them."""
    found = []
    for rank in range(count):
        parts = []
        for key, tensor in tensors.items():
            size = -(-tensor.numel() // count)
            values = tensor.flatten()[rank * size : (rank + 1) * size].clone()
            if values.numel():
                parts.append(Part(key, tuple(tensor.shape), rank * size, values))
        found.append(parts)
    return found


def written(folder, tensors, count):
    """The shard files of `count` processes, in a folder."""
    names = []
    for rank, parts in enumerate(partitioned(tensors, count)):
        for name, content in shards.shard_files(rank, parts, ["master", "sum"]):
            (folder / name).write_bytes(content)
            names.append(name)
    return names


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = {"a": (7, 11), "b": (1,), "c": (64,), "d": (3, 5, 2)}
    return {f"{kind}/{name}": torch.randn(shape) for kind in ("master", "sum") for name, shape in shapes.items()}


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("elements", [5, 40, 10**6])
def test_every_element_comes_back(tmp_path, monkeypatch, tensors, writers, readers, elements):
    """Whatever the number of processes, and into how many files they cut what they keep."""
    monkeypatch.setattr(shards, "_ELEMENTS_A_FILE", elements)
    names = written(tmp_path, tensors, writers)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for rank, parts in enumerate(partitioned(tensors, readers)):
        wanted = [Part(part.key, part.shape, part.start, torch.zeros_like(part.values)) for part in parts]
        files = [tmp_path / name for name in shards.nearest_first(names, rank, readers, writers)]
        reads = shards.find(files, wanted, shapes)
        if readers == writers:  # its own files are enough
            assert all(read.file.name.startswith(f"shard-{rank:05d}-") for read in reads)
        assert sum(read.into.numel() for read in reads) == sum(part.values.numel() for part in parts)
        shards.take(reads)
        for part, found in zip(parts, wanted, strict=True):
            assert torch.equal(part.values, found.values), part.key


def test_files_of_other_processes_are_not_opened(tmp_path, tensors):
    names = written(tmp_path, tensors, 4)
    for rank in (0, 2, 3):
        (tmp_path / shards.first_of(rank)).write_bytes(b"nobody reads it")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    files = [tmp_path / name for name in shards.nearest_first(names, 1, 4, 4)]
    assert shards.find(files, partitioned(tensors, 4)[1], shapes)


def test_what_does_not_fit_is_said(tmp_path, tensors):
    """Nothing is read where an element is missing, is there twice, or is of another shape."""
    names = [tmp_path / name for name in written(tmp_path, tensors, 2)]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = partitioned(tensors, 1)[0]
    with pytest.raises(ValueError, match="it has elements of master/a not at all, from number 39 on"):
        shards.find(names[:1], wanted, shapes)
    (overlapping := tmp_path / "more").mkdir()
    more = [overlapping / name for name in written(overlapping, tensors, 3)]
    with pytest.raises(ValueError, match="it has elements of master/a twice, from number 39 on"):
        shards.find([names[0], more[1], more[2], names[1]], wanted, shapes)
    with pytest.raises(ValueError, match=r"it has master/a of shape \(7, 11\), the model wants \(11, 7\)"):
        shards.find(names, wanted, {**shapes, "master/a": (11, 7)})
    with pytest.raises(ValueError, match=r"it has sum/d of shape \(3, 5, 2\), the model wants None"):
        shards.find(names, wanted, {key: shape for key, shape in shapes.items() if key != "sum/d"})


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"master/a": torch.ones(4)}, None),
        ({"master/a": torch.ones(4)}, {"shard": "{"}),
        ({"master/a": torch.ones(4)}, {"shard": '{"kinds": ["master"], "parts": {}}'}),
        ({"master/a": torch.ones(4)}, {"shard": '{"kinds": ["master"], "parts": {"master/a": [-1, [4]]}}'}),
        ({"master/a": torch.ones(4)}, {"shard": '{"kinds": ["master"], "parts": {"master/a": [1, [2, 2]]}}'}),
        ({"master/a": torch.ones(4)}, {"shard": '{"kinds": ["sum"], "parts": {"master/a": [0, [4]]}}'}),
        ({"master/a": torch.ones(2, 2)}, {"shard": '{"kinds": ["master"], "parts": {"master/a": [0, [4]]}}'}),
        ({"master/a": torch.ones(4).half()}, {"shard": '{"kinds": ["master"], "parts": {"master/a": [0, [4]]}}'}),
    ],
)
def test_headers_that_lie(tmp_path, tensors, metadata):
    file = tmp_path / "shard-00000-00001.safetensors"
    file.write_bytes(save(tensors, metadata))
    with pytest.raises(ValueError, match=r"its header|in it is no part|of none of the kinds"):
        shards.read_header(file)


# -- what each process takes -------------------------------------------------------------------------------------------


def train_and_watch(process, path):
    """What each checkpoint of a run adds to this process's memory at most, and what the collectives carry meanwhile."""
    from cola_ds.training import save as saving

    inner, seen = saving.save_chain, []
    shards._ELEMENTS_A_FILE = 2**18  # 1 MiB

    def watched(chain):
        before, peak, done = private_bytes(), [0], threading.Event()

        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], private_bytes())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with CountedCollectives() as counted:
            wrong = inner(chain)
        done.set()
        watcher.join()
        seen.append([peak[0] - before, counted.bytes])
        return wrong

    saving.save_chain = watched
    run_once(process, path)
    return seen


def test_no_process_writes_more_than_its_own_part(toy, tmp_path):
    """Nor has or sends it more: a checkpoint costs 1/4 of 12 bytes a parameter on the disk, and a few MiB of memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = save_model(tmp_path / "model", **sizes)
    options = {"optim": {"max_steps": 2, "micro_batch_size": 1}, "checkpoint": {"every_steps": 1, "keep": 9}}
    config = three_links(toy, **{**FULL, **options, "model": {"path": str(model)}})
    config["run"]["dir"] = str(tmp_path / "run")
    seen = run_distributed(train_and_watch, 4, save_run(tmp_path / "run.yaml", config), timeout_s=400)
    parameters = sum(tensor.numel() for tensor in model_of(tmp_path / "run").values())
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        wrote = [sum(file.stat().st_size for file in path.glob(f"shard-{rank:05d}-*")) for rank in range(4)]
        assert all(3 * parameters < size < 1.02 * 3 * parameters for size in wrote), wrote
        rest = [file for file in path.iterdir() if not file.name.startswith("shard-")]
        assert sum(file.stat().st_size for file in rest) < 2**17
    for saves in seen:
        assert len(saves) == 2
        for grown, carried in saves:
            assert grown < 0.2 * 4 * parameters, (grown, parameters)
            assert carried < 2**17


def test_the_space_that_is_asked_for(config_of, whole):
    """As much as a run's checkpoints take, and not much more."""
    from cola_ds.config.schema import RunConfig

    _, _, run = whole()
    config = RunConfig.model_validate({**config_of(), "run": {"dir": str(run)}})
    weights = model_of(run)
    needed = space_needed(config, [sum(tensor.numel() for tensor in weights.values())], len(weights), 2)
    each = [sum(file.stat().st_size for file in path.iterdir()) for path in (run / "checkpoints").glob("step-*")]
    assert max(each) <= needed / (config.checkpoint.keep + 2) < max(each) + 2**18


def test_the_space_that_is_asked_for_holds_the_headers(config_of, tmp_path):
    """Of many small weights they take more than the weights."""
    from cola_ds.config.schema import RunConfig

    count, processes, kinds = 500, 4, ["master", "exp_avg", "exp_avg_sq"]
    tensors = {f"{kind}/model.layers.{n}.mlp.gate_proj.weight": torch.ones(8) for kind in kinds for n in range(count)}
    wrote = 0
    for rank, parts in enumerate(partitioned(tensors, processes)):
        wrote += sum(len(content) for _, content in shards.shard_files(rank, parts, kinds))
    config = RunConfig.model_validate({**config_of(), "run": {"dir": str(tmp_path)}})
    assert wrote > 4 * 12 * 8 * count
    assert wrote <= space_needed(config, [8 * count], count, processes) / (config.checkpoint.keep + 2)


def hash_together(process, path):
    """How many files this process hashes of a checkpoint, where all help; then where what others say is wrong, or nothing."""
    process_group(process)
    asked = []
    for said in (None, "wrong", "nothing"):

        def work(file, said=said):
            asked.append(file)
            return {None: hash_of(file), "wrong": "0" * 64, "nothing": None}[said if process.rank else None]

        collectives.on_rank_0_with_all(
            lambda ask: read_checkpoint(Path(path), lambda p: ask(list(map(str, p)))).step, work
        )
    return len(asked)


def test_all_processes_hash(whole):
    """Each its share; and what another process sees in that place damages nothing."""
    path = whole()[2] / "checkpoints/step-00000003"
    files = len(list(path.iterdir())) - 1
    assert run_distributed(hash_together, 2, str(path)) == [3 * (files // 2), 3 * (files // 2)]


def disagree(process):
    process_group(process)
    said = []
    for mistaken in (0, 1, None):

        def action(mistaken=mistaken):
            if process.rank == mistaken:
                raise UserError(f"a mistake of process {mistaken}")
            return f"process {process.rank}"

        for collective in (
            lambda action=action: collectives.on_all(action),
            lambda action=action: collectives.on_rank_0_with_all(
                lambda ask: [*ask(["x"]), action()], lambda entry: entry
            ),
        ):
            try:
                said.append(str(collective()))
            except UserError as error:
                said.append(f"refused: {error}")
    return "; ".join(said)


def test_a_mistake_of_one_is_one_of_all():
    for rank, said in enumerate(run_distributed(disagree, 2)):
        mistakes = ["refused: a mistake of process 0"] * 2 + ["refused: a mistake of process 1"]
        assert said.split("; ") == [*mistakes, "['x', 'process 0']", f"process {rank}", "['x', 'process 0']"]


# -- where they come from ----------------------------------------------------------------------------------------------


def run_as_before(process, path):
    """Stop after step 7, with checkpoints as method full wrote them once."""
    from cola_ds.training import save as saving

    def add(chain, attempt):
        for piece in saving.trained_tensors(chain.engine):
            if attempt and piece:
                attempt.do(lambda writer, piece=piece: writer.add_trained(piece))

    saving._add_shards = add
    return run_once(process, path, ("step", 7))


@pytest.mark.parametrize("world_size", [2, 1])
def test_from_a_checkpoint_of_whole_tensors(config_of, whole, tmp_path, world_size):
    config = config_of()
    config["run"]["dir"] = str(tmp_path / "run")
    assert run_distributed(run_as_before, 2, save_run(tmp_path / "run.yaml", config)) == ["stopped"] * 2
    old = read_checkpoint(tmp_path / "run/checkpoints/step-00000007")
    assert (old.shards, "trained-00001.safetensors" in old.files) == ([], True)
    weights = train_in(tmp_path, config, world_size)
    expected, rows = whole()[:2]
    assert read_checkpoint(tmp_path / "run/checkpoints/step-00000012").shards
    if world_size == 2:
        assert (weights, record(tmp_path / "run")) == (expected, rows)
    else:
        assert record(tmp_path / "run")["evals.jsonl"][-1]["loss"] == pytest.approx(
            rows["evals.jsonl"][-1]["loss"], rel=1e-5
        )


def test_from_elsewhere_and_from_the_best(config_of, whole, tmp_path):
    """A copy in another folder becomes one of the run's own; the best is there, and whole."""
    weights, expected, run = whole()
    kept = shutil.copytree(run / "checkpoints/step-00000006", tmp_path / "elsewhere/step-00000006")
    assert train_in(tmp_path, config_of(), words={"resume": str(kept)}) == weights
    assert record(tmp_path / "run")["result"] == expected["result"]
    names = {path.name for path in (tmp_path / "run/checkpoints/step-00000006").iterdir()}
    assert names == {path.name for path in kept.iterdir()} == {
        "manifest.json", "state.json", "random.safetensors", "shard-00000-00001.safetensors",
        "shard-00001-00001.safetensors",
    }  # fmt: skip
    best = (run / "checkpoints/best").read_text(encoding="utf-8").strip()
    assert read_checkpoint(run / "checkpoints" / best).shards
    shown = inspect(str(run))
    assert f"{best}  checksums hold, " in shown
    assert "DAMAGED" not in shown
    exported = export(str(run), "hf", tmp_path / "model")
    assert (exported / "model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
