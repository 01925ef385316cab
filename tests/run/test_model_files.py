"""A model's folder that is damaged, cut off or made to mislead: refused in one line before anything is built from it."""

import importlib.util
import json
import shutil
import struct

import pytest

from cola_ds.config.schema import ModelConfig
from cola_ds.data.tokenizer import load_tokenizer
from cola_ds.errors import UserError
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.model_files import weight_files
from cola_ds.training.prepare import _model_path, _skeleton_of
from tests.config.test_config import MINIMAL
from tests.support.toys import save_model


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "toy", hidden_size=8, intermediate_size=8, num_hidden_layers=1)


@pytest.fixture
def model(toy_model, tmp_path):
    return shutil.copytree(toy_model, tmp_path / "model")


def refusal(model):
    with pytest.raises(UserError) as caught:
        _model_path(str(model), weights=True)
    said = str(caught.value)
    assert str(model) in said
    assert len(said) < 500
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "describes no model: it must hold a JSON object; it holds []"),
        ('"' + "x" * 5000 + '"', "describes no model: it must hold a JSON object; it holds 'xxx"),
        ("[" * 100_000, "is not valid JSON: more than 50 levels lie in each other"),
        ('{"a":' * 100 + "1" + "}" * 100, "is not valid JSON: more than 50 levels lie in each other"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "is not valid JSON: a number has 10,000 digits"),
        ('{"num_hidden_layers": 1000000000}', "describes no model that there is: 'num_hidden_layers' is 1000000000"),
        ('{"text_config": {"n_layer": 20000}}', "describes no model that there is: 'n_layer' is 20000"),
        ('{"num_local_experts": 1000000}', "describes no model that there is: 'num_local_experts' is 1000000"),
        ('{"transformers_weights": "other.safetensors"}', "names its weights by transformers_weights"),
    ],
)
def test_a_config_that_describes_no_model(model, content, message):
    (model / "config.json").write_text(content, encoding="utf-8")
    assert message in refusal(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "many"}, "model: "),
        ({"hidden_size": 10**18}, "model: "),
        ({"num_attention_heads": 0}, "model: "),
        ({"vocab_size": -1}, "model: "),
        ({"model_type": "no-such-model"}, "model: "),
        ({"model_type": ["llama"]}, "model: "),
        ({"rope_parameters": [1]}, "model: "),
    ],
)
def test_what_transformers_makes_of_it_is_one_short_line(model, tmp_path, changes, message):
    content = json.loads((model / "config.json").read_bytes()) | changes
    (model / "config.json").write_text(json.dumps(content), encoding="utf-8")
    refused_by_transformers(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_a_tokenizer_that_is_damaged(model, tmp_path, name, content):
    (model / name).unlink()
    if content is not None:
        (model / name).write_text(content, encoding="utf-8")
    refused_by_transformers(model, tmp_path)


def refused_by_transformers(model, tmp_path):
    from cola_ds.config.loading import load_config

    (tmp_path / "run.yaml").write_text(MINIMAL, encoding="utf-8")
    config = load_config(tmp_path / "run.yaml", [f"model.path={_model_path(str(model), weights=True)}"])
    with pytest.raises(UserError) as caught:
        _skeleton_of(config.model)
        load_tokenizer(config.model)
    assert str(caught.value).startswith(f"model.path {model}: ")
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def index_of(model, content):
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    (model / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must have a weight_map of tensors' names to files"),
        ({}, "must have a weight_map of tensors' names to files"),
        ({"weight_map": {}}, "must have a weight_map of tensors' names to files"),
        ({"weight_map": []}, "must have a weight_map of tensors' names to files"),
        ({"weight_map": {"a": ["model-1.safetensors"]}}, "must have a weight_map of tensors' names to files"),
        ("[" * 100_000, "is not valid JSON: more than 50 levels lie in each other"),
        ("", "is not valid JSON"),
        (
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}},
            "names 3 files, of which 2 are not there, such as 'model-2.safetensors'; copy the model anew",
        ),
        ({"weight_map": {"a": "../model/model-1.safetensors"}}, "which is no safetensors file of that folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', which is no safetensors file of that folder"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "which is no safetensors file of that folder"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "1 are not there, such as 'x\\x00.safetensors'"),
        ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "1 are not there, such as 'xxx"),
    ],
)
def test_an_index_that_misleads(model, content, message):
    index_of(model, content)
    assert message in refusal(model)
    with pytest.raises(UserError):
        model_fingerprint(ModelConfig(path=str(model)))


def test_an_index_that_leads_to_the_weights(model):
    index_of(model, {"weight_map": {"lm_head.weight": "model-1.safetensors"}})
    assert _model_path(str(model), weights=True) == str(model)
    assert [path.name for path in weight_files(model)] == ["model-1.safetensors"]


def test_of_a_single_file_and_an_index_the_single_one_is_read(model):
    """As transformers does: the fingerprint is that of the weights that are loaded."""
    from transformers import AutoModelForCausalLM

    before = model_fingerprint(ModelConfig(path=str(model)))
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(model)  # though there is no model-1
    assert model_fingerprint(ModelConfig(path=str(model))) == before


def header(content, said=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if said is None else said) + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: header({}, said=2**63),
        lambda content: header({}, said=10**6),
        lambda content: header(b"no JSON"),
        lambda content: header(b"[" * 5000),
        lambda content: header([]),
        lambda content: header({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}),
        lambda content: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}}),
        lambda content: header({"a": {"dtype": "pickle", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
    ],
)
def test_weights_whose_header_is_damaged(model, damage):
    path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is damaged: " in refusal(model)
    with pytest.raises(UserError, match="is damaged"):
        model_fingerprint(ModelConfig(path=str(model)))


@pytest.mark.parametrize("absent", ["sentencepiece", "google.protobuf"])
def test_a_tokenizer_of_sentencepiece_alone_names_sentencepiece(model, monkeypatch, absent):
    """Not tiktoken, whose files have the same name, and which transformers asks for."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    config = ModelConfig(path=str(model))
    with pytest.raises(
        UserError, match=r"its tokenizer, tokenizer\.model, is SentencePiece's, which is not installed: pip install"
    ):
        load_tokenizer(config)
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    with pytest.raises(UserError, match="tiktoken"):
        load_tokenizer(config)


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "no/such/model", "/dev/null", "x" * 5000])
def test_paths_that_lead_to_no_model(path):
    with pytest.raises(
        UserError, match=r"^model\.path .* is not a folder, and cannot be a name on the Hugging Face hub"
    ) as caught:
        _model_path(path, weights=True)
    assert len(str(caught.value)) < 400


def test_whoever_reads_a_models_config_reads_its_weights(model, tmp_path):
    from transformers import AutoModelForCausalLM

    from cola_ds.config.schema import ModelConfig
    from cola_ds.run.model_folder import write_model_folder

    out = tmp_path / "out"
    write_model_folder(AutoModelForCausalLM.from_pretrained(model), ModelConfig(path=str(model), dtype="fp32"), out)
    assert len({path.stat().st_mode & 0o777 for path in out.iterdir()}) == 1
    assert list(out.glob("*.safetensors"))
