"""Tasks: candidates' scores and generated answers are those of plain Transformers on the CPU, and of an evaluation of the run."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cola_ds.config.loading import load_config
from tests.gpu.support import ON_CPU, run, take_down, three_links
from tests.support.toys import rows, save_run

TOPICS = [
    "the river",
    "a small town",
    "an old clock",
    "the last train",
    "some green tea",
    "a long winter",
    "two brothers",
]
ROWS = [
    {"text": f"{topic} in year {1900 + 7 * place}", "label": int(place % 4 == 0), "answer": topic.split()[-1]}
    for place, topic in enumerate(TOPICS * 4)
]
TASKS = {
    "candidates": {"prompt": "About {text}: ", "candidates": ["good", "rather bad", "so so"], "label": "label"},
    "generation": {"prompt": "About {text}: ", "answer": "{answer}", "generate": True, "metric": "f1"},
}
# A mean log-probability, or a logit, may lie that far from the CPU's: see LOSS in test_chains.py.
SCORE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


def task_run(toy, folder, kind, engine, dtype):
    folder.mkdir(exist_ok=True)
    for split, chosen in (("train", ROWS[:16]), ("validation", ROWS[16:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    (folder / "task.yaml").write_text(yaml.safe_dump(TASKS[kind]), encoding="utf-8")
    data = {"task": str(folder / "task.yaml"), "dir": str(folder), "num_train": 12, "num_dev": 4, "num_test": 9}
    path, config = three_links(toy, folder, engine, dtype, eval={"every": "end", "batch_size": 4})
    return save_run(path, {**config, "data": data})


def plain_scores(model, encoded):
    """A forward pass for each candidate: the mean log-probability of its ids."""
    scores = []
    for ids, count in zip(encoded.candidate_ids, encoded.answer_lengths, strict=True):
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
        places = range(len(ids) - count, len(ids))
        scores.append(float(sum(logits[place - 1, ids[place]] for place in places)) / count)
    return scores


def whole_model(chain, path):
    """The engine's weights, its links tied, in plain Transformers on the CPU in fp32."""
    from tests.training.test_chain import whole_weights

    weights = {name: value for name, value in whole_weights(chain).items() if "lora_" not in name}
    model = AutoModelForCausalLM.from_pretrained(load_config(path).model.path, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.parametrize(
    ("engine", "dtype"), [("zero3", "fp32"), ("zero2", "bf16"), ("offload", "bf16"), ("zero3", "fp16")]
)
def test_candidates_are_scored_as_on_the_cpu(process, toy, tmp_path, monkeypatch, engine, dtype):
    if dtype == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed's CPU accelerator lacks fp16")
    from cola_ds.evaluation.candidates import score_candidates

    path = task_run(toy, tmp_path, "candidates", engine, dtype)
    with run(process, path, monkeypatch) as (chain, prepared):
        encoded = prepared.test.encoded
        found = score_candidates(chain.engine, encoded, 4, lambda: False)
        plain = whole_model(chain, path)
    assert len(found) == 9
    with torch.no_grad():
        for place, scores in found.items():
            torch.testing.assert_close(scores, plain_scores(plain, encoded[place]), rtol=0, atol=SCORE[dtype])
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.01
    # What the run has learnt, tied again from its links, scores the same.
    last = rows(tmp_path / "run/evals.jsonl")[-2:]
    again = evaluate(process, tmp_path, path, monkeypatch)
    assert {row["split"]: row["score"] for row in again} == {row["split"]: row["score"] for row in last}


def evaluate(process, folder, path, monkeypatch):
    """The rows that `cola-ds evaluate` of the run writes."""
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.commands.evaluate import evaluation_config
    from cola_ds.training import start
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared

    config = load_config(path)
    evaluation = evaluation_config(
        str(folder / "run"), "zero-shot", config.data.task, config.data.dir, str(folder / "evaluation"), 1, []
    )
    kept, build = [], start.build_chain
    with monkeypatch.context() as patch:
        patch.setattr(start, "build_chain", lambda *args: kept.append(build(*args)) or kept[0])
        assert run_prepared(prepare(evaluation, 1), process, ResumeOptions())
    take_down(kept)
    return rows(folder / "evaluation/evals.jsonl")


@pytest.mark.parametrize(("engine", "dtype"), [("zero3", "fp32"), ("offload", "bf16")])
def test_answers_are_generated_as_on_the_cpu(process, toy, tmp_path, monkeypatch, engine, dtype):
    from cola_ds.distributed.engine import evaluating
    from cola_ds.evaluation.generation import end_ids, generate_ids

    path = task_run(toy, tmp_path, "generation", engine, dtype)
    with run(process, path, monkeypatch) as (chain, prepared):
        prompts = [encoded.prompt_ids for encoded in prepared.test.encoded]
        stops = end_ids(chain.engine.module, prepared.tokenizer)
        with evaluating(chain.engine):
            found = generate_ids(chain.engine, prompts, stops, 12)
        plain = whole_model(chain, path)
    assert len({len(ids) for ids in prompts}) > 1, "no padding on the left"
    with torch.no_grad():
        for prompt, answer in zip(prompts, found, strict=True):
            assert answer is not None  # no NaN, in rows of padding either
            logits = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(answer)[:, None]).flatten()
            # The most likely id, or one that is as likely within the rounding.
            assert float((logits.max(dim=-1).values - chosen).max()) <= 2 * SCORE[dtype]
            assert len(answer) == 12 or answer[-1] in stops
    scores = [row["score"] for row in rows(tmp_path / "run/evals.jsonl")]
    assert all(0 <= score <= 1 for score in scores)
