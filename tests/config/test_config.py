"""The run's YAML and the DeepSpeed JSON: what is read, refused and derived."""

import json
import math
import os
import re
import time

import pytest
import yaml

from cola_ds.config.deepspeed_json import complete, read_engine_config
from cola_ds.config.loading import dump_config, load_config
from cola_ds.config.parsing import parse_yaml
from cola_ds.config.steps import Epochs, place_knots, resolve
from cola_ds.data.tasks.dataset import find_task
from cola_ds.errors import UserError
from cola_ds.sweep.plan import read_yaml
from cola_ds.training.optim import learning_rate
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import REPOSITORY

MINIMAL = """
model: {path: some/model}
data: {train: train.jsonl}
optim: {lr: 5e-4, epochs: 5}
run: {dir: runs/x}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=MINIMAL, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load


def test_minimal_run_has_the_papers_defaults(load):
    config = load()
    assert config.optim.lr == 5e-4  # YAML 1.1 would read 5e-4 as text
    assert (config.lora_ranks, config.lora.alpha, config.lora.targets) == ([8], 16, ["q_proj", "v_proj"])
    assert (config.optim.name, config.optim.schedule, config.optim.weight_decay) == ("adamw", "linear", 0)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.lr=1e-3", lambda c: c.optim.lr == 1e-3),
        ("lora.rank=16", lambda c: c.lora_ranks == [16]),
        ("lora.targets=all-linear", lambda c: c.lora.targets == "all-linear"),
        ("lora.targets=[q_proj]", lambda c: c.lora.targets == ["q_proj"]),
        ("eval.every=50", lambda c: c.eval.every == 50),
        ("optim.max_grad_norm=null", lambda c: c.optim.max_grad_norm is None),
        ("data.text=text", lambda c: c.data.text == "text"),
        ("model.dtype=fp16", lambda c: c.model.dtype == "fp16"),
    ],
)
def test_overrides(load, override, read):
    assert read(load(MINIMAL, override))


def test_a_links_scaling_is_always_its_alpha_by_its_rank(load):
    config = load(MINIMAL, "chain.length=2", "lora.rank=[9, 4]")
    assert [config.alpha_of(link) for link in (1, 2)] == [config.tied_alpha(link) for link in (1, 2)] == [16, 16]
    assert (config.lora_trains, config.tied_rank(1)) == (["both", "both"], 9)
    config = load(MINIMAL, "chain.length=2", "lora.rank=[9, 4]", "lora.scaling=alpha/sqrt(r)", "lora.train=[B, both]")
    assert [config.alpha_of(link) / r for link, r in ((1, 9), (2, 4))] == [16 / 3, 8]
    assert config.lora_trains == ["B", "both"]
    config = load(MINIMAL, "lora.rank=4", "lora.init=pissa")
    assert (config.tied_rank(1), config.tied_alpha(1)) == (8, 32)  # the same scaling


def test_later_override_wins_and_several_apply_together(load):
    config = load(
        MINIMAL, "chain.length=2", "lora.rank=[8, 4]", "optim.lr=1", "optim.lr=2", "chain.knots={epochs: [3]}"
    )
    assert (config.lora_ranks, config.optim.lr, config.chain.knots) == ([8, 4], 2, {"epochs": [3]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
        ("optm.lr=1", "unknown key optm; did you mean optim?"),
        ("model=null", "model must be a section, with its keys below it; it is None"),
        ("lora=8", "lora must be a section, with its keys below it; it is 8"),
        ("lora.zzz=8", "unknown key lora.zzz; known are rank, alpha, scaling, train, init, dropout, targets, bias"),
        (
            "lora.rank=0",
            "lora.rank must be a whole number of at least 1, or one such number per link, like [8, 4]; it is 0",
        ),
        ("lora.rank=[8, 0]", "it is [8, 0]"),
        ("lora.rank=true", "it is True"),
        ("lora.train=C", "lora.train must be both, A or B, or one of these per link, like [both, B]; it is 'C'"),
        ("lora.train=[B, A]", "lora.train ['B', 'A'] names 2 links, but chain.length is 1"),
        ("optim.lr_ratio=0", "optim.lr_ratio must be greater than 0; it is 0"),
        ("lora.rank=[8, 4]", "lora.rank [8, 4] names 2 links, but chain.length is 1"),
        ("optim.lr='5e-4'", "optim.lr must be a number; it is '5e-4' (text: write numbers without quotes)"),
        ("optim.lr=fast", "optim.lr must be a number; it is 'fast'"),
        ("optim.lr=0", "optim.lr must be greater than 0; it is 0"),
        ("optim.lr=.inf", "optim.lr must be a finite number"),
        ("optim.micro_batch_size=2.5", "optim.micro_batch_size must be an integer; it is 2.5"),
        ("optim.name=lion", "optim.name must be 'adamw', 'sgd' or 'adagrad'; it is 'lion'"),
        ("optim.epochs=null", "optim.epochs or optim.max_steps must say how long to train"),
        ("method=prefix", "method must be 'cola', 'lora', 'full', 'icl' or 'zero-shot'; it is 'prefix'"),
        ("method=zero-shot", "method zero-shot only evaluates: name data.eval"),
        ("lora.targets=q_proj", "lora.targets must be all-linear or a list"),
        ("lora.dropout=1", "lora.dropout must be less than 1; it is 1"),
        ("chain.length=0", "chain.length must be greater than or equal to 1; it is 0"),
        ("chain.knots=odd", "chain.knots must be even, {epochs: [3]} or {steps: [125, 250]}"),
        ("chain.knots={steps: [9, 3]}", "chain.knots are out of order"),
        ("chain.knots={steps: [3, 9]}", "chain.knots names 2 knots; chain.length 1 takes 0"),
        ("data.train=[]", "{path: ..., weight: ...}; it is []"),
        ("data.train=[a.jsonl, 3]", "{path: ..., weight: ...}; it is ['a.jsonl', 3]"),
        ("data.train=''", "data.train must name a file, a folder, a glob or"),
        ("data={hub: x, train: [a, b]}", "data.hub takes one split each for data.train and data.eval"),
        ("data={hub: x, train: a, watch: [a, b]}", "data.hub takes one split each"),
        ("data={task: rte, watch: w.jsonl}", "data.watch contradicts data.task: a task says itself what its rows are"),
        ("data.watch=[]", "{path: ..., weight: ...}; it is []"),
        ("chain.diagnostics=1", "chain.diagnostics must be a boolean; it is 1"),
        ("data.revision=main", "data.hub_config and data.revision need data.hub"),
        ("lora.alpha=.inf", "lora.alpha must be a finite number"),
        ("run.seed=99999999999", "run.seed must be less than 2147483648"),
        ("eval.every=never", "eval.every must be epoch, link, end or a positive number of steps; it is 'never'"),
        ("run=3", "run must be a"),
        ("optim.lr", "override 'optim.lr' must look like section.key=value"),
        ("optim.lr.x=3", "override optim.lr.x: lr is a value, not a section"),
        ("optim.lr=[", "override optim.lr is not valid YAML"),
    ],
)
def test_refusals_name_key_value_and_remedy(load, override, message):
    with pytest.raises(UserError) as caught:
        load(MINIMAL, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora", "chain.length=3"], "method lora contradicts chain.length 3"),
        (["method=full", "chain.length=2"], "method full contradicts chain.length 2"),
        (
            ["lora.init=orthogonal", "lora.train=A"],
            "lora.init orthogonal says how A is drawn, and lora.train A",
        ),
        (["method=full", "optim.lr_ratio=4"], "optim.lr_ratio 4 is for B, which method full has not"),
        (["lora.train=A", "optim.lr_ratio=4"], "optim.lr_ratio 4 is for B, which lora.train A does not train"),
        (["data.text=text", "data.prompt=q"], "data.text contradicts data.prompt and data.completion"),
    ],
)
def test_contradictions(load, overrides, message):
    with pytest.raises(UserError, match=message):
        load(MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("a: [", "is not valid YAML"),
        (MINIMAL + "run: {dir: twice}", "key run is given twice"),
        ("model: {path: m}\ndata: {train: t}\noptim: {lr: 1, epochs: 1}", "missing key run"),
        ("model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_files_that_cannot_be_a_run(load, text, message):
    with pytest.raises(UserError, match=message):
        load(text)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: " + "[" * 5000, "line 1: more than 50 levels lie in each other"),
        ("{a: " * 5000, "line 1: more than 50 levels lie in each other"),
        ("- " * 5000, "line 1: more than 50 levels lie in each other"),
        (BOMB + MINIMAL, "line 5: its aliases written out, it has more than 50,000 values"),
        (MINIMAL + "lora:\n  targets:\n" + re.sub("(?m)^a.*?: ", "  - ", BOMB), "it has more than 50,000 values"),
        (MERGE_BOMB + MINIMAL, "its aliases written out, it has more than 50,000 values"),
        ("a0: &a0 {}\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), "more than 50 levels"),
        ("x: &a [1, *a]", "line 1: an alias stands for what it is a part of"),
        ("x: &a {<<: *a}", "line 1: an alias stands for what it is a part of"),
        ("x: !!int ''", "line 1: '' cannot be read as int"),
        ("x: !!float x", "line 1: 'x' cannot be read as float"),
        ("x: !!bool x", "line 1: 'x' cannot be read as bool"),
        ("a: 1\nx: 2021-02-31", "line 2: '2021-02-31' cannot be read as date"),
        ("x: " + "9" * 200_000, "line 1: a number has 200,000 digits"),
        ("x: 1" + ":10" * 50_000, "line 1: a number has 150,001 digits"),
        ("x: " + "a" * 300_000, "it has more than 262,144 bytes"),
        ("? [a]\n: 3", "line 1: while constructing a mapping, found unhashable key"),
        ("x: \0", "character 4 is #x0000, which YAML does not allow"),
        ('x: "\\0"', "line 1: a text holds what is no character"),
        ('x: "\\ud800"', "line 1: a text holds what is no character"),
        ("a:\n\tb: 3", "line 2: while scanning for the next token, found character '\\t' that cannot start any token"),
        ("x: !!python/name:os.system", "line 1: could not determine a constructor for the tag"),
        (MINIMAL + "---\n" + MINIMAL, "expected a single document in the stream"),
        ("a: {<<: {}, <<: {}}", "key << is given twice"),
        ("1: a\n1: b", "key 1 is given twice"),
        ("".join(f"k{n}: 1\n" for n in range(5000)), "missing key run; and 5000 more"),
    ],
)
def test_hostile_yaml_is_one_short_line(load, text, message):
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(text)
    said = str(caught.value)
    assert message in said
    assert len(said) < 500
    assert "\n" not in said
    assert time.monotonic() - begin < 5


def test_yaml_as_other_systems_write_it(load, tmp_path):
    plain = load()
    assert load("\ufeff" + MINIMAL) == plain
    assert load(MINIMAL.replace("\n", "\r\n")) == plain
    (tmp_path / "latin.yaml").write_bytes(MINIMAL.encode() + b"# \xe4")
    with pytest.raises(UserError, match=r"latin.yaml: its byte \d+ is not UTF-8; save it as such"):
        load_config(tmp_path / "latin.yaml")


def test_merge_keys(load):
    """What `<<` brings in gives way to what is said, in a section and across sections; the words of others are whole again."""
    text = """
model: {path: some/model}
data: &data {train: train.jsonl, max_length: 64}
optim: &optim {lr: 5e-4, epochs: 5, <<: {weight_decay: 0.5, lr: 9}}
run: {dir: runs/x}
"""
    config = load(text)
    assert (config.optim.lr, config.optim.weight_decay) == (5e-4, 0.5)
    several = """
x: &x {train: x.jsonl, max_length: 64}
y: &y {train: y.jsonl, eval: y.jsonl, <<: *x}
data: {<<: [*y, *x], eval: z.jsonl}
"""
    read = parse_yaml(several, "it")
    assert read["y"] == {"train": "y.jsonl", "eval": "y.jsonl", "max_length": 64}
    assert read["data"] == {"train": "y.jsonl", "eval": "z.jsonl", "max_length": 64}
    inner = parse_yaml("o: {in: &o {<<: {x: 1}, x: 2}}\np: {<<: *o}", "it")  # merged before it was itself made
    assert inner == {"o": {"in": {"x": 2}}, "p": {"x": 2}}
    with pytest.raises(UserError, match=r"unknown key eval2; did you mean eval\?$"):
        load(text + "eval2: {<<: *optim}")
    assert parse_yaml(text + "eval2: {<<: *optim}", "it")["eval2"] == parse_yaml(text, "it")["optim"]
    with pytest.raises(UserError, match="<< takes a mapping, or a list of mappings"):
        load(MINIMAL + "lora: {<<: 3}")


def test_an_override_changes_one_section(load):
    config = load(MINIMAL + "checkpoint: &c {}\neval: *c", "checkpoint.keep=1")
    assert (config.checkpoint.keep, config.eval.model_fields_set) == (1, set())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a" * 300 + ".yaml", "File name too long"),
        ("a\0b.yaml", "embedded null"),
        (".", "it is a folder"),
        ("/dev/zero", "it is a pipe or a device; name a file"),
        ("pipe", "it is a pipe or a device; name a file"),
        ("no/such.yaml", "No such file or directory"),
    ],
)
def test_paths_that_lead_to_no_text(load, tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    config = load()
    for read in (
        load_config,
        lambda path: read_engine_config(config.model_copy(update={"deepspeed": path})),
        lambda path: read_yaml(path, "the sweep's YAML"),
        lambda path: find_task(path if path.endswith(".yaml") else os.path.join(path, "x.yaml")),
    ):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith("cannot read ")
        assert len(str(caught.value)) < 400
    with pytest.raises(UserError, match=reason):
        load_config(path)


@pytest.mark.parametrize("key", ["run.dir", "model.path", "data.train", "data.eval", "deepspeed"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("a" * 300, "has a name of 300 letters, and file systems take 255"), ("a/" * 4000, "is no path; it is 'a/a/")],
)
def test_paths_in_a_config_that_no_file_system_takes(load, key, value, message):
    with pytest.raises(UserError) as caught:
        load(MINIMAL, f"{key}={value}")
    assert f"{key} {message}" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chain.length=1000000000", "chain.length must be less than or equal to 9999"),
        ("optim.max_steps=" + "9" * 100, "optim.max_steps must be less than 2147483648; it is a number of about"),
        ("lora.rank=" + "9" * 100, "lora.rank must be a whole number of at least 1"),
        ("lora.targets=[" + "[x]," * 2000 + "]", "lora.targets must be all-linear or a list of module name suffixes"),
        ("lora.rnk" + "k" * 5000 + "=1", "unknown key lora.rnk"),
        ("optim.lr=" + "x" * 5000, "optim.lr must be a number; it is 'xxx"),
        ("x" * 5000, "must look like section.key=value"),
        ("a." * 3000 + "b=1", "unknown key a; known are"),
    ],
)
def test_values_in_messages_are_cut(load, override, message):
    with pytest.raises(UserError) as caught:
        load(MINIMAL, override)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the run's YAML .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_dumped_config_loads_equal(load, tmp_path):
    # A commit's hash that YAML could take for a number
    config = load(MINIMAL, "chain.length=2", "lora.rank=[8, 4]", "chain.knots={steps: [7]}", "model.revision='1234e56'")
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


# -- derived -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knots", "length", "total", "placed"),
    [
        ("even", 1, 10, (10,)),
        ("even", 3, 10, (4, 7, 10)),  # differ by at most one step, the earlier links longer
        ("even", 3, 11, (4, 8, 11)),
        ("even", 4, 4, (1, 2, 3, 4)),
        ({"epochs": [3]}, 2, 625, (375, 625)),  # the paper's length 2: epochs 1-3, then 4-5
        ({"steps": [2, 9]}, 3, 10, (2, 9, 10)),
    ],
)
def test_knots(knots, length, total, placed):
    assert place_knots(knots, length, total, Epochs(125, 1)) == placed


@pytest.mark.parametrize(
    ("knots", "length", "message"),
    [
        ("even", 11, "chain.length 11 needs at least one step per link"),
        ({"steps": [10]}, 2, "step 10 is at or past the end of the run, which has 10 steps"),
        ({"epochs": [5]}, 2, r"epoch 5 \(step 10\) is at or past the end"),
    ],
)
def test_knots_outside_the_run(knots, length, message):
    with pytest.raises(UserError, match=message):
        place_knots(knots, length, 10, Epochs(2, 1))


def test_step_plan(load):
    config = load(MINIMAL, "chain.length=3", "optim.global_batch_size=8", "optim.micro_batch_size=2")
    step_plan = resolve(config, rows=1001, world_size=2)
    assert (step_plan.epochs.steps(0), step_plan.total_steps, step_plan.micro_steps) == (126, 630, 2)
    assert [step_plan.link_steps(link) for link in (1, 2, 3)] == [210, 210, 210]
    assert resolve(load(MINIMAL, "optim.max_steps=7"), 1001, 1).total_steps == 7


def test_batch_that_does_not_divide(load):
    with pytest.raises(
        UserError, match=r"optim.global_batch_size 8 does not divide .* 3 processes; use a multiple of 12"
    ):
        resolve(load(), rows=10, world_size=3)


def test_warm_up_that_outlasts_its_link(load):
    with pytest.raises(UserError, match=r"optim.warmup_steps 3 never ends: the shortest link has 3 steps"):
        resolve(load(MINIMAL, "optim.max_steps=7", "chain.length=2", "optim.warmup_steps=3"), 100, 1)


def rates(load, *overrides, steps=10):
    config = load(MINIMAL, "optim.lr=1", f"optim.max_steps={steps}", "chain.length=2", *overrides)
    step_plan = resolve(config, 8, 1)
    return [
        learning_rate(config.optim, step_plan, link, step)
        for link in (1, 2)
        for step in range(step_plan.link_steps(link))
    ]


def test_learning_rates(load):
    assert rates(load) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(load, "optim.schedule_over=link") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2] * 2)
    assert rates(load, "optim.schedule=constant") == [1.0] * 10
    cosine = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates(load, "optim.schedule=cosine") == pytest.approx(cosine)
    warm = rates(load, "optim.schedule=constant", "optim.warmup_steps=4")
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1] * 2)  # anew in each link


def test_linear_schedule_is_transformers_own(load):
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 10)
    expected = []
    for _ in range(10):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(load) == pytest.approx(expected)


# -- the DeepSpeed JSON ------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(load, tmp_path):
    def engine(content, *overrides):
        path = tmp_path / "engine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        config = load(MINIMAL, f"deepspeed={path}", *overrides)
        return complete(read_engine_config(config), config, resolve(config, 100, 1))

    return engine


ZERO3 = {"zero_optimization": {"stage": 3}}


def test_engine_config_is_completed(engine):
    found = engine({**ZERO3, "train_batch_size": "auto", "tensorboard": {"enabled": True}}, "model.dtype=bf16")
    assert found["train_batch_size"] == 8
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"] == {"enabled": True}
    assert "tensorboard" not in found  # the run feeds the monitors itself


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "a key is given twice"),
        ({"zero_optimization": 3}, "zero_optimization must be an object like {...}; it is 3"),
        ({**ZERO3, "bf16": True}, "bf16 must be an object like {...}; it is true"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            'offload_param must be an object like {...}; it is "cpu"',
        ),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, "zero_optimization.zenflow {} is not supported"),
        ({}, "zero_optimization.stage is None; a chain runs at stage 2 or 3"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is 1; a chain runs at stage 2 or 3"),
        ({"zero_optimizaton": {"stage": 3}}, "key zero_optimizaton; did you mean zero_optimization?"),
        ({**ZERO3, "train_batch_size": 9}, "train_batch_size 9 contradicts optim.global_batch_size 8"),
        ({**ZERO3, "train_micro_batch_size_per_gpu": 1}, "contradicts optim.micro_batch_size 4"),
        ({**ZERO3, "gradient_accumulation_steps": 5}, "gradient_accumulation_steps 5 contradicts the 2 that follow"),
        ({**ZERO3, "gradient_clipping": 3}, "gradient_clipping 3 contradicts optim.max_grad_norm 1.0"),
        ({**ZERO3, "optimizer": {"type": "AdamW"}}, "remove optimizer; the run's YAML says it"),
        ({**ZERO3, "scheduler": {}}, "remove scheduler; the run's YAML says it"),
        (
            {**ZERO3, "compile": {"deepcompile": True}},
            "compile is not supported; remove it (model.compile=true",
        ),
        ({**ZERO3, "fp16": {"enabled": True}}, "fp16.enabled true contradicts model.dtype bf16"),
        ({**ZERO3, "bf16": {"enabled": False}}, "bf16.enabled false contradicts model.dtype bf16"),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_hpz_partition_size 2 is not supported; remove it, and set model.shards=node",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'offload_param.device "nvme" is not',
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
    ],
)
def test_engine_files_that_are_refused(engine, content, message):
    with pytest.raises(UserError) as caught:
        engine(content)
    assert message in str(caught.value)


LLAMA_FACTORY = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"zero_force_ds_cpu_optimizer": False, "optimizer": "auto", "scheduler": "auto"},
        {"amp": {"enabled": "auto", "opt_level": "auto"}, "steps_per_print": 10},
        {"amp": {"enabled": False}, "sparse_gradients": False, "wall_clock_breakdown": False},
    ],
)
def test_what_is_set_anyway_may_be_said(engine, more):
    """As in the JSONs of other trainers, with a byte order mark or without."""
    found = engine(json.dumps(LLAMA_FACTORY | more))
    assert found == engine("\ufeff" + json.dumps(LLAMA_FACTORY | more))
    assert (found["zero_allow_untested_optimizer"], found["zero_force_ds_cpu_optimizer"]) == (True, False)
    assert not {"amp", "sparse_gradients", "optimizer"} & found.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 50_000, "is not valid JSON: more than 50 levels lie in each other"),
        ('{"a": ' * 400 + "1" + "}" * 400, "is not valid JSON: more than 50 levels lie in each other"),
        ('{"a": ' + "9" * 200_000 + "}", "a number has 200,000 digits"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "a key is given twice: 'stage'"),
        ('"x"', 'must hold a JSON object; it is "x"'),
        ("null", "must hold a JSON object; it is null"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; a chain runs at stage 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3"; a chain runs at stage 2 or 3'),
        ({"zero_optimization": [3]}, "zero_optimization must be an object like {...}; it is [3]"),
        ({**ZERO3, "bf16": {"enabled": "yes"}}, 'bf16.enabled must be true or false; it is "yes"'),
        ({**ZERO3, "fp16": {"enabled": 0}}, "fp16.enabled must be true or false; it is 0"),
        ({**ZERO3, "flops_profiler": {"enabled": None}}, "flops_profiler.enabled must be true or false; it is null"),
        ({**ZERO3, "wall_clock_breakdown": 1}, "wall_clock_breakdown must be true or false; it is 1"),
        ({**ZERO3, "steps_per_print": "x"}, 'steps_per_print must be a positive number; it is "x"'),
        ({**ZERO3, "steps_per_print": 0}, "steps_per_print must be a positive number; it is 0"),
        ({**ZERO3, "aio": "x"}, 'aio must be an object like {...}; it is "x"'),
        ({**ZERO3, "timers": None}, "timers must be an object like {...}; it is null"),
        ({**ZERO3, "fp16": [[[["x" * 5000] * 9] * 5]]}, "fp16 must be an object like {...}; it is [[[["),
        (
            {"zero_optimization": {"stage": 3, "offload_param": 0}},
            "offload_param must be an object like {...}; it is 0",
        ),
        ({**ZERO3, "zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer false is not supported"),
        ({**ZERO3, "zero_force_ds_cpu_optimizer": 0}, "zero_force_ds_cpu_optimizer 0 is not supported; remove it"),
        ({**ZERO3, "amp": {"enabled": True}}, "amp {'enabled': True} is not supported; remove it"),
        ({**ZERO3, "k" * 5000: 1}, "unknown or unsupported key kkk"),
        ({**ZERO3, "train_batch_size": "x" * 5000}, 'train_batch_size "xxx'),
        (
            {**ZERO3, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}},
            "remove optimizer; the run's YAML says it (optim.name and optim.lr)",
        ),
        (
            {**ZERO3, "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}}},
            "remove scheduler; the run's YAML says it (optim.schedule)",
        ),
    ],
)
def test_hostile_engine_files_are_one_short_line(engine, content, message):
    with pytest.raises(UserError) as caught:
        engine(content)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def refused_by_deepspeed(process, contents):
    from cola_ds.distributed.engine import check_engine_config

    process_group(process)
    said = []
    for content in contents:
        with pytest.raises(UserError) as caught:
            check_engine_config({**content, "train_batch_size": 1}, "mine.json")
        said.append(str(caught.value))
    return said


def test_what_deepspeed_trips_over_is_one_line():
    """Of wrong types where its config is no schema."""
    contents = [
        {"zero_optimization": {"stage": 3, "leaf_module": "x"}},
        {**ZERO3, "communication_data_type": 3},
        {**ZERO3, "checkpoint": {"tag_validation": None}},
        {**ZERO3, "checkpoint": {"parallel_write": []}},
    ]
    (found,) = run_distributed(refused_by_deepspeed, 1, contents)
    for said in found:
        assert re.match("mine.json: DeepSpeed refuses the config: .", said)
        assert len(said.splitlines()) == 1


def test_missing_engine_file(load):
    with pytest.raises(UserError, match=r"cannot read the DeepSpeed JSON none\.json"):
        read_engine_config(load(MINIMAL, "deepspeed=none.json"))


READY_RUNS = sorted([*(REPOSITORY / "launch/runs").glob("*.yaml"), REPOSITORY / "launch/quickstart/run.yaml"])


@pytest.mark.parametrize("path", READY_RUNS, ids=lambda path: path.stem)
def test_every_run_file_loads_and_says_how_it_is_started(path):
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    name = re.escape(str(path.relative_to(REPOSITORY)))
    assert re.search(rf"#   \./(launch/local|slurm/submit)\.sh .*{name}", text.split("\nmodel:")[0])
    assert (REPOSITORY / config.deepspeed).is_file()
    assert yaml.safe_load(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.patience=2"], "eval.patience goes by evaluations under way"),
        (["eval.patience=2", "data.eval=dev.jsonl", "eval.every=end"], "eval.patience goes by evaluations under way"),
        (["model.links=runs/x", "method=full", "chain.length=1"], "method full contradicts model.links"),
        (["model.links=runs/x", "model.adapter=y"], "model.links contradicts model.adapter"),
        (["model.adapter=y", "lora.init=orthogonal"], "lora.init orthogonal knows this run's own links alone"),
    ],
)
def test_keys_of_evaluation_that_cannot_be_meant(load, overrides, message):
    with pytest.raises(UserError, match=message):
        load(MINIMAL, *overrides)
    assert load(MINIMAL, "eval.patience=2", "data.eval=dev.jsonl").eval.patience == 2
