"""Checkpoints of method full: each process writes and reads what it keeps, and no process has a whole model of it."""

import pytest
import torch
from safetensors.torch import save

from cola_ds.checkpoint import shards
from cola_ds.distributed.shards import Part
from tests.support.runs import record, three_links, train_in
from tests.support.toys import REPOSITORY, save_model

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_ends_with_the_same_bits(config_of, whole, tmp_path, variant):
    weights, expected, _ = whole(variant)
    assert train_in(tmp_path, config_of(variant), stops=[("step", 2), ("step", 5)]) == weights
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("sizes", "variant"),
    [
        *((sizes, "fp32") for sizes in ((2, 1), (1, 2), (2, 4), (4, 2))),
        ((4, 1, 2), "tied embeddings"),
        ((1, 2), "offload"),
        ((2, 4, 1), "stage 2"),
    ],
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
    (tmp_path / "shard-00003-00001.safetensors").write_bytes(b"nobody reads it")
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
