"""Which files a config names: the ready DeepSpeed JSONs by their names, and paths as they are."""

import os
from pathlib import Path

import pytest

from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.inputs import engine_file, files_of, named_file, ready_configs
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from tests.support.toys import REPOSITORY

RUN = {"model": {"path": "m"}, "data": {"train": "t"}, "optim": {"lr": 1.0, "epochs": 1}, "run": {"dir": "r"}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(**changes):
    return RunConfig.model_validate({**RUN, **changes})


def test_ready_configs_are_those_of_the_repository():
    assert ready_configs() == {path.stem: path for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert len(ready_configs()) >= 5


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_ready_config_is_found_by_its_name_from_any_folder(path):
    dtype = "bf16" if "bf16" in path.stem else "fp32"
    by_name, by_path = (config(deepspeed=name, model={"path": "m", "dtype": dtype}) for name in (path.stem, str(path)))
    assert read_engine_config(by_name) == read_engine_config(by_path)
    assert next(files_of(by_name)) == path


def test_the_default_is_ready():
    assert config().deepspeed == "auto"
    assert engine_file("auto") == str(REPOSITORY / "ds_configs/auto.json")


def test_a_path_stays_a_path():
    for name in ("ds_configs/zero3.json", "none.json", "none/zero3", "./zero3"):
        assert engine_file(name) == name
        with pytest.raises(UserError, match=f"^cannot read the DeepSpeed JSON {name}: No such file or directory$"):
            read_engine_config(config(deepspeed=name))
    os.mkdir("zero3")
    assert engine_file("zero3") == str(REPOSITORY / "ds_configs/zero3.json")
    Path("zero2").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    assert engine_file("zero2") == "zero2"
    assert read_engine_config(config(deepspeed="zero2"))["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("name", ["zero4", "Zero3", "zero3.jsonl", "x" * 200])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    known = "auto, zero2, zero3, zero3_bf16, zero3_bf16_offload_cpu, zero3_offload_cpu"
    with pytest.raises(UserError) as caught:
        read_engine_config(config(deepspeed=name))
    said = str(caught.value)
    assert said == f"cannot read the DeepSpeed JSON {name}: there is no such file; ready ones are {known}"
    assert list(files_of(config(deepspeed=name))) == []


def test_named_files():
    assert named_file("data.task", "rte") is None
    assert named_file("data.task", None) is None
    assert named_file("data.task", "mine/own.yaml") == Path("mine/own.yaml")
    assert named_file("deepspeed", "zero2") == REPOSITORY / "ds_configs/zero2.json"
