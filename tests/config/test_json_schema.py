"""The JSON Schemas of runs and sweeps: up to date, named by every ready YAML, and of one mind with the loader."""

import json
import os
import re

import pytest
from jsonschema import Draft202012Validator
from pydantic import BeforeValidator, ValidationError

from cola_ds.config.json_schema import BY_VALIDATORS, run_schema, written
from cola_ds.config.keys import default_of, flat_keys
from cola_ds.config.loading import apply_override
from cola_ds.config.parsing import parse_yaml
from cola_ds.config.schema import SECTIONS, RunConfig
from cola_ds.errors import UserError
from cola_ds.sweep import json_schema as of_sweeps
from cola_ds.sweep.json_schema import sweep_schema
from cola_ds.sweep.plan import Sweep
from tests.config import test_config
from tests.launch.test_documents import DOCUMENTS, blocks
from tests.support.toys import REPOSITORY

SCHEMAS = {"run": run_schema(), "sweep": sweep_schema()}
READY = sorted((REPOSITORY / "launch").rglob("*.yaml"))
SWEEP = "{base: b.yaml, dir: d, tasks: [rte], methods: {lora: null}, seeds: [0]}"
UNSAID = {"chain.knots={steps: [9, 3]}", "lora.alpha=.inf", "optim.lr=.inf"}
"""What JSON Schema has no word for: an order, and numbers that JSON does not have."""


def refusals(kind, content):
    return [error.message for error in Draft202012Validator(SCHEMAS[kind]).iter_errors(content)]


def loader_refuses(raw):
    """Whether a value or a key is wrong by itself: not for what keys say of each other."""
    try:
        RunConfig.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return any(
            each["type"] != "value_error" or len(each["loc"]) > 1 or each["loc"] == ("deepspeed",) for each in found
        )
    return False


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_files_are_the_schemas(kind):
    path = REPOSITORY / f"launch/{kind}.schema.json"
    assert path.read_text(encoding="utf-8") == written(SCHEMAS[kind]), (
        f"cola-ds schema {kind} > launch/{kind}.schema.json"
    )
    Draft202012Validator.check_schema(SCHEMAS[kind])
    json.loads(written(SCHEMAS[kind]), parse_constant=lambda name: pytest.fail(name))


def test_every_key_is_described():
    for kind, top in SCHEMAS.items():
        inner = [each.get("properties", {}) for name, each in top["$defs"].items() if name != "Grid"]
        said = [top["properties"], *inner]
        for key, value in ((key, value) for properties in said for key, value in properties.items()):
            assert "$ref" in value or value.get("description"), (kind, key)
            assert "\n" not in value.get("description", "")


def test_what_python_validates_is_said_once_more():
    def validated(model):
        fields = model.model_fields.items()
        return {key for key, field in fields if any(isinstance(mark, BeforeValidator) for mark in field.metadata)}

    models = [RunConfig.model_fields[name].annotation for name in SECTIONS]
    found = {model.__name__: validated(model) for model in models}
    assert {name: keys for name, keys in found.items() if keys} == {
        name: {*keys} for name, keys in BY_VALIDATORS.items()
    }
    assert {*of_sweeps.BY_VALIDATORS} == (validated(Sweep) | {"grid"}) - {"launcher"}  # a command is any text


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_ready_yaml_names_its_schema_and_follows_it(path):
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    content = parse_yaml(text, str(path))
    kind = "sweep" if "base" in content else "run"
    expected = os.path.relpath(REPOSITORY / f"launch/{kind}.schema.json", path.parent)
    assert first == f"# yaml-language-server: $schema={expected}"
    assert refusals(kind, content) == []


def test_the_documents_examples_follow_them():
    kinds = []
    for document in DOCUMENTS:
        for block in blocks(document, "yaml"):
            content = parse_yaml(block, document)
            if {"model", "run"} <= content.keys() or "base" in content:
                kinds.append("sweep" if "base" in content else "run")
                assert refusals(kinds[-1], content) == [], document
    assert {*kinds} == {*SCHEMAS}


OF_THE_LOADER = [
    case[0]
    for test in (test_config.test_refusals_name_key_value_and_remedy, test_config.test_values_in_messages_are_cut)
    for mark in test.pytestmark
    for case in mark.args[1]
]


@pytest.mark.parametrize("override", OF_THE_LOADER, ids=lambda override: override[:40])
def test_what_the_loader_refuses_for_type_or_key_the_schema_does(override):
    raw = parse_yaml(test_config.MINIMAL, "it")
    assert refusals("run", raw) == []
    try:
        apply_override(raw, override)
    except UserError:
        return  # no YAML could say it
    assert bool(refusals("run", raw)) == (loader_refuses(raw) and override not in UNSAID)


VALUES = [
    None, True, 0, 1, -1, 0.5, 1.5, 2**31, "", "x", "even", "epoch", "both", [], [1], [0], [1, 2], ["x"], [""], [None], {},
    {"x": 1}, {"epochs": [1]}, {"steps": []}, {"plateau": {}}, {"plateau": {"windw": 1}}, {"plateau": {"window": 0}},
    {"prune": 0.5}, {"prune": 1}, [{"path": "a"}], [{"path": "a", "weight": 0}],
]  # fmt: skip
KEYS = sorted(flat_keys(RunConfig.model_validate(parse_yaml(test_config.MINIMAL, "it")).model_dump()))


@pytest.mark.parametrize("key", KEYS)
def test_loader_and_schema_agree_on_every_key(key):
    """Each of its values that is wrong by itself, and none that is not."""
    for value in [*VALUES, default_of(key)]:
        raw = parse_yaml(test_config.MINIMAL, "it")
        section, _, name = key.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[name] = value
        assert bool(refusals("run", raw)) == loader_refuses(raw), (key, value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("base", 3), ("dirr", "x"), ("tasks", []), ("tasks", {"rte": {"lora.rnk": 3}}), ("tasks", {"rte": {"lora.rank": 0}}),
        ("methods", {}), ("methods", {"x": {"run.seed": 3}}), ("methods", {"x": {"lora": {"rank": 3}}}),
        ("methods", {"x": {"grid": {"optim.lr": []}}}), ("grid", {"optim.lr": [1e-3, 1e-3]}), ("grid", {"lora.rank": "paper"}),
        ("grid", {"optim.lr": "papers"}), ("grid", {"data.task": ["a", "b"]}), ("seeds", [1, 1]), ("seeds", [-1]),
        ("search_seeds", "any"), ("launcher", 3),
    ],
)  # fmt: skip
def test_what_a_sweep_cannot_say(word, value):
    good = parse_yaml(SWEEP, "it")
    assert refusals("sweep", good) == []
    assert refusals("sweep", {**good, word: value})


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("tasks", {"a": None, "b": {"data.train": [{"path": "x"}], "chain.knots.steps": [3]}}),
        ("methods", {"x": {"lora.rank": [8, 4], "chain.knots": {"plateau": {}}}}),
        ("methods", {"x": {"grid": {"optim.lr": [0.1], "chain.length": [1, 2]}}}),
        ("grid", {"optim.lr": "paper"}), ("search_seeds", "all"), ("search_seeds", None),
    ],
)  # fmt: skip
def test_what_a_sweep_can_say(word, value):
    assert refusals("sweep", {**parse_yaml(SWEEP, "it"), word: value}) == []


def test_paths_in_the_first_lines_lead_to_files():
    for path in READY:
        (named,) = re.findall(r"\$schema=(\S+)", path.read_text(encoding="utf-8").splitlines()[0])
        assert (path.parent / named).resolve().is_file()
