"""What other tools make of an export: Transformers' pipeline, CTranslate2, llama.cpp, and vLLM's own checks of an adapter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from cola_ds.commands.export import export
from tests.support.runs import train_in
from tests.support.toys import REPOSITORY, run_config, save_model, save_sums

SMOLLM2 = REPOSITORY / "build/SmolLM2-135M-Instruct"
# The folder of llama.cpp's source, where a machine has it. The source of llama-cpp-python carries it as vendor/llama.cpp:
#   pip download --no-deps --no-binary :all: llama-cpp-python
LLAMA_CPP = os.environ.get("COLA_DS_LLAMA_CPP")
ZERO2 = str(REPOSITORY / "ds_configs/zero2.json")


def exports(folder: Path, model: Path) -> dict[str, Path]:
    """The base, and all exports of a chain of two links of unequal ranks on it that has moved far enough to be seen."""
    rows = save_sums(folder / "train.jsonl", 40)
    sections = {"lora": {"rank": [8, 4], "alpha": 16}, "optim": {"lr": 3e-2, "max_steps": 4}, "deepspeed": ZERO2}
    train_in(folder, run_config(model, rows, folder / "run", **sections), 1)
    return {"base": model} | {to: export(folder / "run", to, folder / to) for to in ("hf", "peft")}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    return exports(folder, save_model(folder / "model", hidden_size=64, initializer_range=0.2))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not SMOLLM2.is_dir():
        pytest.skip(f"there is no {SMOLLM2}: ./launch/quickstart.sh makes it")
    return exports(tmp_path_factory.mktemp("real"), SMOLLM2)


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:  # -> (tokens, vocabulary)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_transformers_pipeline(toy):
    """The merged model and the adapter answer alike, by their folders alone, and not as the base does."""
    from transformers import pipeline

    said = {}
    for name, folder in toy.items():
        answer = pipeline("text-generation", model=str(folder), tokenizer=str(toy["hf"]), device="cpu")
        said[name] = answer("12+30=", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said["hf"] == said["peft"] != said["base"]


def test_ctranslate2(toy, tmp_path):
    """A converter and a serving engine of its own kernels."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer

    converter = ctranslate2.converters.TransformersConverter(str(toy["hf"]), load_as_float16=False)
    converter.convert(str(tmp_path / "converted"))
    tokenizer = AutoTokenizer.from_pretrained(toy["hf"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("1234+56=1290").input_ids)
    found = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32").forward_batch(
        [tokens]
    )
    found = torch.from_numpy(numpy.array(found))[0]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    torch.testing.assert_close(found, logits_of(toy["hf"], ids), rtol=1e-4, atol=1e-4)
    assert (found - logits_of(toy["base"], ids)).abs().max() > 1e-2


@pytest.fixture(scope="module")
def llama_cpp():
    if not LLAMA_CPP:
        pytest.skip("COLA_DS_LLAMA_CPP names no folder of llama.cpp's source, which has the converter")
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python")


@pytest.mark.beyond_ci
def test_llama_cpp(llama_cpp, real, tmp_path):
    """llama.cpp's converter writes a GGUF in fp16 that has the exported weights, rounded to it, and its engine answers with it as
    Transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "model.gguf"
    command = [sys.executable, f"{LLAMA_CPP}/convert_hf_to_gguf.py", real["hf"], "--outtype", "f16", "--outfile", file]
    environment = os.environ | {"PYTHONPATH": f"{LLAMA_CPP}/gguf-py"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(real["hf"]).state_dict().items():
        rounded = weight if "norm" in name else weight.half().float()
        assert torch.equal(read_back[name], rounded), name

    ids = AutoTokenizer.from_pretrained(real["hf"])("The sum of 12 and 30 is").input_ids
    engine = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    assert engine.tokenize(b"The sum of 12 and 30 is", add_bos=False) == ids
    engine.eval(ids)
    found, expected = torch.from_numpy(engine.scores[: len(ids)].copy()), logits_of(real["hf"], ids)
    distance = (found - expected).norm() / expected.norm()
    assert distance < 3e-3  # 8e-4 was seen: the weights are rounded to fp16
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (logits_of(real["base"], ids) - expected).norm() / expected.norm() > 10 * distance


@pytest.mark.beyond_ci
def test_vllm_takes_the_adapter(toy):
    """Its own checks of the config, at the ranks that it can be told to take."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(toy["peft"]), 128)
    assert (helper.r, helper.vllm_lora_scaling_factor) == (12, 1.0)
    helper.validate_legal(LoRAConfig(max_lora_rank=16))
    with pytest.raises(ValueError, match="LoRA rank 12 is greater than max_lora_rank 8"):
        helper.validate_legal(LoRAConfig(max_lora_rank=8))
