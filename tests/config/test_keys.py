"""What each key means to a run that is resumed, read or swept: the marks of the schema, held to a table of all keys."""

import pytest

from cola_ds.config import keys
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.keys import flat_keys
from cola_ds.config.schema import CheckpointConfig, DataConfig, Mark, ModelConfig, OptimConfig, RunConfig, RunSection

# By key: f free, x fixed, c compared by content, p a place, n names a file, r one of each run of a sweep; nothing: compared.
ANSWERS = {
    "model.path": "cp", "model.dtype": "x", "model.revision": "p", "model.trust_remote_code": "",
    "model.links": "cp", "model.adapter": "cp", "model.activation_checkpointing": "",
    "model.attention": "", "model.compile": "", "model.kernels": "",
    "model.shards": "f",
    "method": "x",
    "lora.rank": "x", "lora.alpha": "x", "lora.scaling": "x", "lora.train": "x", "lora.init": "x",
    "lora.dropout": "", "lora.targets": "x", "lora.bias": "x",
    "chain.length": "", "chain.knots": "", "chain.tie": "", "chain.merge": "x",
    "chain.merge_weight": "x", "chain.optimizer_at_knot": "", "chain.diagnostics": "f",
    "data.watch": "cp", "data.task": "cn", "data.dir": "cp", "data.num_train": "c", "data.num_dev": "c", "data.num_test": "c",
    "data.demonstrations": "c", "data.train": "cp", "data.eval": "cp", "data.hub": "c", "data.hub_config": "c",
    "data.revision": "c", "data.prompt": "c", "data.completion": "c", "data.text": "c", "data.max_length": "c",
    "data.eval_fraction": "c", "data.eval_examples": "c", "data.format": "c", "data.chat_template": "cp", "data.loss_on": "c",
    "data.system": "c", "data.tools": "cp", "data.too_long": "c", "data.duplicates": "c", "data.packing": "c",
    "data.cache": "f", "data.workers": "f", "optim.global_batch_tokens": "",
    "optim.lr": "", "optim.lr_ratio": "",
    "optim.name": "x", "optim.schedule": "", "optim.schedule_over": "", "optim.warmup_steps": "",
    "optim.weight_decay": "", "optim.max_grad_norm": "", "optim.epochs": "", "optim.max_steps": "",
    "optim.global_batch_size": "", "optim.micro_batch_size": "", "optim.max_skips_in_a_row": "f",
    "eval.every": "", "eval.patience": "", "eval.batch_size": "",
    "checkpoint.every_steps": "f", "checkpoint.keep": "f", "checkpoint.best": "f", "checkpoint.on_error": "f",
    "run.dir": "fr", "run.seed": "r", "run.log_every_steps": "f", "run.hang_after_s": "f", "run.deterministic": "",
    "deepspeed": "cpn",
}  # fmt: skip
QUESTIONS = {
    "f": keys.is_free, "x": keys.is_fixed, "c": keys.by_content, "p": keys.is_place, "n": keys.names_file,
    "r": keys.is_per_run,
}  # fmt: skip


def answers(key):
    return "".join(letter for letter, question in QUESTIONS.items() if question(key))


def test_every_key_has_its_answers():
    config = RunConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        optim=OptimConfig(lr=1.0, epochs=1),
        run=RunSection(dir="r"),
        checkpoint=CheckpointConfig(),
    )
    assert {key: answers(key) for key in flat_keys(config.model_dump())} == ANSWERS


@pytest.mark.parametrize(
    ("key", "expected"),
    [("lora.gone", ""), ("gone", ""), ("gone.too", ""), ("checkpoint.gone", "f"), ("data.gone", "c")],
)
def test_a_key_without_a_mark_is_compared(key, expected):
    """As is one that only another version knows; a section that is marked speaks for all its keys."""
    assert answers(key) == expected


def test_marks_of_how_a_change_is_taken_exclude_each_other():
    for key in ANSWERS:
        assert len(set("fxc") & set(answers(key))) <= 1, key
    assert len(Mark) == len(QUESTIONS)


def test_dtypes_are_those_of_the_schema_and_of_torch():
    import torch

    assert list(DTYPES) == list(RunConfig.model_json_schema()["$defs"]["ModelConfig"]["properties"]["dtype"]["enum"])
    for dtype in DTYPES.values():
        assert getattr(torch, dtype.torch_name).itemsize == dtype.element_bytes
