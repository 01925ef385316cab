"""Run folders in which anything may stand: each reader succeeds, or refuses in one short line, in bounded time; and nothing in
the folder changes.

COLA_DS_FUZZ=50 before pytest tries fifty times as many.
"""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_ds.checkpoint.decide import Identity, ResumeOptions, choose_start
from cola_ds.commands.evaluate import evaluation_config
from cola_ds.commands.export import export
from cola_ds.commands.inspect import inspect
from cola_ds.config.loading import load_config
from cola_ds.errors import UserError
from cola_ds.report.report import report
from cola_ds.run.folder import RunDir
from tests.run.test_ownership import tree
from tests.support.toys import run_config, save_run

EXAMPLES = 60 * int(os.environ.get("COLA_DS_FUZZ", 1))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=20_000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
FACTS = {"base": "ab" * 32, "base_links": None, "identity": {"engine": {}, "train": "x", "eval": None}}
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has finished, without any training."""
    place = tmp_path_factory.mktemp("whole")
    config = load_config(
        save_run(
            place / "run.yaml", run_config(place / "model", place / "train.jsonl", place / "run", chain={"length": 1})
        )
    )
    folder = RunDir(place / "run")
    folder.create(config, {"packages": {}, "hosts": ["a"]}, FACTS)
    folder.event("started", step=0, world_size=1)
    for step in (1, 2, 3):
        folder.append("metrics.jsonl", {"step": step, "link": 1, "epoch": 0.1, "loss": 2.0, "lr": 1e-3, "tokens": 5})
    folder.append("evals.jsonl", {"step": 3, "link": 1, "epoch": 1.0, "loss": 2.0, "perplexity": 7.4, "examples": 3})
    folder.append("knots.jsonl", {"step": 3, "link": 1, "lora_rank": 4, "delta_norm": 0.1, "rounding_error": None})
    link = {f"{LAYER}.lora_A.weight": torch.ones(4, 8), f"{LAYER}.lora_B.weight": torch.ones(6, 4)}
    folder.write_link(config, 1, [LAYER], link)
    scores = {"loss": 2.0, "perplexity": 7.4, "examples": 3}
    numbers = {
        "steps": 3,
        "links": 1,
        "training_flops": 1,
        "profiled_flops": None,
        "wall_time_s": 1.0,
        "peak_memory_bytes": 1,
    }
    folder.write_result({"method": "cola", "task": None, "seed": 0, "scores": scores, "ended_early": False, **numbers})
    return place


FILES = [
    "run.json", "run.yaml", "environment.json", "metrics.jsonl", "evals.jsonl", "knots.jsonl", "events.jsonl", "result.json",
    "chain/link-0001/adapter_config.json", "chain/link-0001/adapter_model.safetensors", "lock.json",
    "checkpoints/step-00000003/manifest.json", "checkpoints/latest",
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.lists(VALUES, min_size=1, max_size=3).map(
        lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    ),
    st.sampled_from(
        [b"[" * 50_000, b'{"a":' * 20_000, b"9" * 100_000, b"\xff\xfe\n", b"\0" * 64, b'{"step": NaN}\n', b"{}\n"]
    ),
)


@st.composite
def damages(draw):
    """A file, and what becomes of it: other content, a part of its own, its own with a JSON value changed, a folder, a link."""
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["content", "cut", "value", "folder", "link", "gone"]))
    return name, kind, draw(CONTENTS), draw(VALUES), draw(st.integers(0, 1000))


def apply(run, name, kind, content, value, number):
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/null" if number % 2 else "nowhere")
    elif kind == "cut":
        path.write_bytes(before[: number * len(before) // 1000])
    elif kind == "value":
        path.write_bytes(changed(before, value, number))
    elif kind == "content":
        path.write_bytes(content)


def changed(before, value, number):
    """The first row, or the object, with one of its values changed."""
    try:
        line, end, rest = (
            before.partition(b"\n") if before.count(b"\n") > 1 and before[:2] != b"{\n" else (before, b"", b"")
        )
        held = json.loads(line)
        keys = sorted(held)
        held[keys[number % len(keys)]] = value
        return json.dumps(held).encode() + end + rest
    except (ValueError, TypeError, IndexError):
        return json.dumps(value).encode()


@SETTINGS
@given(damages())
def test_a_run_folder_in_which_anything_stands(whole, tmp_path, damage):
    run = tmp_path / "run"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    shutil.copytree(whole / "run", run)
    apply(run, *damage)
    before = tree(run)
    config = load_config(whole / "run.yaml", [f"run.dir={run}"])
    for read in (
        lambda: choose_start(RunDir(run), config, Identity({}, "x", None), ResumeOptions(), None),
        lambda: export(run, "peft", tmp_path / "out"),
        lambda: inspect(str(run)),
        lambda: report([str(run)], None, None, None, None),
        lambda: evaluation_config(str(run), "zero-shot", "cb", "cb", str(tmp_path / "evaluation"), 1, []),
    ):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
        assert tree(run) == before
