"""In-context learning with a real model on real data, against a plain script: MeZO's prompts, one forward pass a candidate."""

import json

import numpy
import pytest
import torch

from tests.support.scored import train_scored
from tests.support.toys import REAL_TASKS, REPOSITORY, run_config, save_run

MODEL = REPOSITORY / "build/SmolLM2-135M-Instruct"
ROWS = 8
pytestmark = pytest.mark.beyond_ci


@pytest.fixture
def folder(name):
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip(f"there is no {MODEL}: ./launch/quickstart.sh makes it")
    if not (REAL_TASKS / name).is_dir():
        pytest.skip(f"there is no {REAL_TASKS / name}: COLA_DS_TASKS names the folder of the tasks' data")
    return REAL_TASKS / name


# -- the script; nothing of cola_ds ------------------------------------------------------------------------------------


def sst2(row):
    return f"{row['sentence'].strip()} It was", [" terrible", " great"]


def copa(row):
    choices = [row["choice1"], row["choice2"]]
    choices = [c if c.split(" ")[0] == "I" else c[0].lower() + c[1:] for c in choices]
    premise = row["premise"].rstrip()
    premise = premise[:-1] if premise.endswith(".") else premise
    return premise + {"effect": " so", "cause": " because"}[row["question"]], [" " + choice for choice in choices]


def drawn(path, seed, count):
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n")
    numpy.random.seed(seed)
    return [json.loads(lines[index]) for index in numpy.random.permutation(len(lines))[:count]]


def answer_score(model, tokenizer, prompt, candidate):
    """The mean log-probability of the candidate's ids."""
    begin, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + candidate).input_ids
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
    return float(torch.stack([log_probs[t - 1, ids[t]] for t in range(begin, len(ids))]).mean())


def plain_icl(build, folder, seed, shown, count, max_length):
    """[(prompt, candidates, scores, right?)] of `count` rows, each after the last of `shown` solved rows that fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    solved = []
    for row in drawn(folder / "train.jsonl", seed, shown):
        prompt, candidates = build(row)
        solved.append(prompt + candidates[row["label"]])
    found = []
    for row in drawn(folder / "validation.jsonl", seed, count):
        question, candidates = build(row)
        before = list(solved)
        while True:
            prompt = "\n\n".join([*before, question])
            if max(len(tokenizer(prompt + candidate).input_ids) for candidate in candidates) <= max_length:
                break
            del before[0]
        with torch.no_grad():
            scores = [answer_score(model, tokenizer, prompt, candidate) for candidate in candidates]
        found.append((prompt, candidates, scores, scores.index(max(scores)) == row["label"]))
    return found


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "build", "shown", "max_length"),
    [("sst2", sst2, 4, 2048), ("copa", copa, 8, 96)],  # all are shown; as many as fit
)
def test_icl_is_what_a_plain_script_finds(folder, name, build, shown, max_length, tmp_path):
    seed = 1
    config = run_config(
        MODEL, tmp_path, tmp_path / "run", method="icl", chain={"length": 1}, eval={"batch_size": 2}, run={"seed": seed}
    )
    config["data"] = {"task": name, "dir": str(folder), "num_train": 16, "num_dev": 1, "num_test": ROWS}
    config["deepspeed"] = str(REPOSITORY / "ds_configs/zero3.json")
    config["data"] |= {"demonstrations": shown, "max_length": max_length}
    scored, result = train_scored(save_run(tmp_path / "run.yaml", config))
    expected = plain_icl(build, folder, seed, shown, ROWS, max_length)
    lengths = {prompt.count("\n\n") for prompt, *_ in expected}
    assert lengths == {shown} if name == "sst2" else max(lengths) < shown and len(lengths) > 1
    assert [row["prompt"] for row in scored] == [prompt for prompt, *_ in expected]
    for row, (_, candidates, scores, _) in zip(scored, expected, strict=True):
        assert row["candidates"] == candidates
        assert row["scores"] == pytest.approx(scores, abs=1e-4)
    right = sum(right for *_, right in expected)
    assert result["scores"]["test"] == right / ROWS
    assert 0 < right < ROWS
