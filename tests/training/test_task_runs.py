"""Whole runs on tasks, chosen on dev and scored on test, at every world size; all eleven scored as plain Transformers does."""

import json
import re

import pytest
import torch
import yaml

from cola_ds.commands.freeze import freeze
from cola_ds.commands.inspect import inspect
from cola_ds.config.loading import load_config
from cola_ds.data.tasks.catalog import TASKS
from cola_ds.data.tokens import PROMPT_BEGIN
from cola_ds.errors import UserError
from cola_ds.report.report import report
from tests.commands.test_cli import cola_ds
from tests.data.test_tasks import BY_HAND
from tests.support.distributed import process_group, run_distributed
from tests.support.runs import record, train_in
from tests.support.toys import rows, run_config, save_model, save_run, thorough

REVIEWS = [
    ("a warm and funny film", 1), ("dull from start to end", 0), ("the best of the year", 1), ("a waste of time", 0),
    ("moving , clever and brave", 1), ("it never finds its feet", 0), ("what a joy", 1), ("tedious", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tasks") / "model", max_position_embeddings=1024)


def write(path, rows_of_a_split):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_a_split), encoding="utf-8")


def task_run(model, folder, name, train, validation, **sections):
    """A run's config on a task whose rows are given."""
    write(folder / name / "train.jsonl", train)
    write(folder / name / "validation.jsonl", validation)
    options = {
        "chain": {"length": 2},
        "lora": {"rank": [8, 4]},
        "optim": {"max_steps": None, "epochs": 3, "lr": 5e-3, "global_batch_size": 8, "micro_batch_size": 2},
        "data": {"task": name, "dir": str(folder / name), "num_train": 16, "num_dev": 7, "num_test": 9},
        "eval": {"every": "epoch", "batch_size": 2},
    }
    for key, values in sections.items():
        options[key] = {**options.get(key, {}), **values} if isinstance(values, dict) else values
    config = run_config(model, folder, folder / "run", **options)
    config["data"] = options["data"]
    del config["optim"]["max_steps"]
    return config


def reviews(count):
    return [{"sentence": f"{text} {number}", "label": label} for number, (text, label) in enumerate(REVIEWS * count)]


def by_hand(name):
    return [row for task, row, _ in BY_HAND if task == name]


# -- all eleven, against plain Transformers ----------------------------------------------------------------------------


def score_here(process, paths):
    """The scores of each candidate, or the generated answers, of this process's share of each task's test examples."""
    from cola_ds.evaluation.candidates import score_candidates
    from cola_ds.evaluation.generation import generate_answers
    from cola_ds.training.build import build_chain
    from cola_ds.training.prepare import prepare

    process_group(process)
    found, engine = {}, None
    for path in paths:
        prepared = prepare(load_config(path), process.world_size)
        engine = engine or build_chain(prepared, process, None).engine
        encoded = prepared.test.encoded
        if prepared.test.task.generates:
            share = generate_answers(engine, encoded, prepared.tokenizer, 3, lambda: False)
        else:
            share = score_candidates(engine, encoded, 3, lambda: False)
        found[prepared.test.task.name] = json.dumps(share)
    return found


def plain_scores(model, tokenizer, example):
    """One forward pass a candidate, over the whole text; the mean log-probability of its last ids."""
    prompt = tokenizer(example.prompt.strip(" ")).input_ids
    scores = []
    for candidate in example.candidates:
        ids = torch.tensor([tokenizer((example.prompt + candidate).strip(" ")).input_ids])
        logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        scores.append(float(logs[len(prompt) - 1 :].mean()))
    return scores


def plain_answer(model, tokenizer, example):
    """Greedy, one id after another, no cache."""
    ids = tokenizer(example.prompt).input_ids
    begin = len(ids)
    for _ in range(50):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[begin:]):
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True).split("\n")[0].strip()


@pytest.mark.parametrize("world_size", [1, 4])
def test_all_tasks_score_as_plain_transformers_does(model, tmp_path, world_size):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    paths, sampled = [], {}
    for name in TASKS:
        data = {"num_train": 2, "num_dev": 1, "num_test": 3}
        config = task_run(model, tmp_path, name, by_hand(name) * 3, by_hand(name) * 2, data=data, method="zero-shot")
        config["chain"], config["lora"] = {"length": 1}, {"rank": 4}
        paths.append(save_run(tmp_path / f"{name}.yaml", config))
        from cola_ds.training.prepare import prepare

        sampled[name] = prepare(load_config(paths[-1]), 1).test.examples
    shares = run_distributed(score_here, world_size, paths)
    for name, examples in sampled.items():
        found = [(int(place), each) for share in shares for place, each in json.loads(share[name]).items()]
        assert sorted(place for place, _ in found) == list(range(len(examples)))  # each once, somewhere
        for place, each in found:
            with torch.no_grad():
                if TASKS[name].generates:
                    assert each == plain_answer(plain, tokenizer, examples[place])
                else:
                    expected = plain_scores(plain, tokenizer, examples[place])
                    assert each == pytest.approx(expected, rel=0, abs=1e-4)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dev", "test"), thorough([("sst2", 7, 9), ("squad", 2, 3)], [("copa", 7, 9)]))
def test_training_on_a_task_is_the_same_at_every_world_size(model, tmp_path, name, dev, test):
    """Classification, a choice taught by its answer, and generation."""
    train = reviews(3) if name == "sst2" else by_hand(name) * 12
    validation = reviews(2) if name == "sst2" else by_hand(name) * 5
    records = {}
    for world_size in (1, 2, 4):
        config = task_run(
            model, tmp_path / str(world_size), name, train, validation, data={"num_dev": dev, "num_test": test}
        )
        train_in(tmp_path / f"in-{world_size}", config, world_size)
        records[world_size] = record(tmp_path / f"in-{world_size}/run")
    one = records[1]
    for found in (records[2], records[4]):
        mine, theirs = ([row["loss"] for row in each["metrics.jsonl"]] for each in (found, one))
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert found["result"]["scores"] == one["result"]["scores"]
    losses = [row["loss"] for row in one["metrics.jsonl"]]
    assert losses[-1] < losses[0]
    result = json.loads((tmp_path / "in-2/run/result.json").read_text(encoding="utf-8"))
    assert (result["task"], result["seed"]) == (name, 0)
    scores, evaluations = result["scores"], rows(tmp_path / "in-2/run/evals.jsonl")
    assert scores["metric"] == TASKS[name].metric
    assert (scores["dev_examples"], scores["test_examples"]) == (dev, test)
    on_dev = [(row["step"], row["score"]) for row in evaluations if row["split"] == "dev"]
    assert [step for step, _ in on_dev] == [2, 4, 6]
    best = max(score for _, score in on_dev)
    assert (scores["best_step"], scores["dev"]) == next((step, score) for step, score in on_dev if score == best)
    tested = {row["step"]: row["score"] for row in evaluations if row["split"] == "test"}
    assert scores["test"] == tested[scores["best_step"]]  # of the best by dev, not the best of test
    assert f"best         {scores['metric']} {best:.4f} on dev at step {scores['best_step']}" in inspect(
        str(tmp_path / "in-2/run")
    )


def test_classification_learns_what_language_modelling_of_the_answer_would(model, tmp_path):
    """The loss begins at what two candidates of like score give, and the run learns the reviews by heart."""
    config = task_run(model, tmp_path, "sst2", reviews(3), reviews(3), optim={"epochs": 30, "lr": 3e-2})
    train_in(tmp_path / "in", config, 2)
    losses = [row["loss"] for row in rows(tmp_path / "in/run/metrics.jsonl")]
    assert losses[0] == pytest.approx(0.6931, abs=0.05)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_stopped_task_run_ends_with_the_same_bits(model, tmp_path):
    config = task_run(model, tmp_path, "sst2", reviews(3), reviews(2), lora={"dropout": 0.1})
    whole = train_in(tmp_path / "whole", config)
    stopped = train_in(tmp_path / "stopped", config, stops=[("step", 2, 1), ("step", 2, 2)])
    assert stopped == whole
    assert json.dumps(record(tmp_path / "stopped/run")) == json.dumps(record(tmp_path / "whole/run"))


def test_methods_without_training(model, tmp_path):
    """zero-shot, and icl with the training examples in front; through the command."""
    scores = {}
    for method in ("zero-shot", "icl"):
        config = task_run(model, tmp_path / method, "sst2", reviews(3), reviews(2), method=method)
        config["chain"], config["lora"] = {"length": 1}, {"rank": 4}
        config["data"]["demonstrations"] = 2
        done = cola_ds("train", save_run(tmp_path / f"{method}.yaml", config))
        assert done.returncode == 0, done.stderr
        assert "sst2: train 16, dev 7, test 9" in done.stdout
        result = json.loads((tmp_path / method / "run/result.json").read_text(encoding="utf-8"))
        assert (result["method"], result["steps"], result["training_flops"]) == (method, 0, 0.0)
        scores[method] = result["scores"]
        assert scores[method].keys() == {"metric", "best_step", "dev", "dev_examples", "test", "test_examples"}
    from cola_ds.training.prepare import prepare

    prepared = prepare(load_config(tmp_path / "icl.yaml"), 1)
    shown = prepared.train.examples[:2]
    for example in prepared.test.examples:
        before, rest = example.prompt.split("\n\n")[:2], example.prompt.split("\n\n")[2:]
        assert before == [each.prompt + each.answer for each in shown]
        assert rest[0].endswith(" It was")


def test_a_users_own_task(model, tmp_path):
    text = "prompt: 'Review: {sentence}\\nGood? '\ncandidates: ['no', 'yes']\nlabel: label\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    config = task_run(model, tmp_path, "rows", reviews(3), reviews(2))
    config["data"]["task"] = str(tmp_path / "mine.yaml")
    frozen = freeze(load_config(save_run(tmp_path / "run.yaml", config)), tmp_path / "frozen")
    (tmp_path / "mine.yaml").unlink()  # a job that waited has its own copy
    train_in(tmp_path / "in", yaml.safe_load(frozen.read_text(encoding="utf-8")))
    result = json.loads((tmp_path / "in/run/result.json").read_text(encoding="utf-8"))
    assert (result["task"], result["scores"]["metric"]) == ("mine", "accuracy")


def test_a_task_with_no_more_than_answers(model, tmp_path):
    """The held-out loss on dev is its only score: of the best by that, and a sweep's table has none for it."""
    text = "prompt: 'Review: {sentence}\\nIn short: '\nanswer: '{label}'\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    config = task_run(model, tmp_path, "rows", reviews(3), reviews(2))
    config["data"]["task"] = str(tmp_path / "mine.yaml")
    train_in(tmp_path / "in", config, 2)
    result = json.loads((tmp_path / "in/run/result.json").read_text(encoding="utf-8"))
    evaluations = rows(tmp_path / "in/run/evals.jsonl")
    assert result["scores"]["loss"] == evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert result["scores"]["examples"] == 7
    text = report([str(tmp_path / "in/run")], None, None, None, None)
    assert f"{result['scores']['loss']:.4f}" in text, text
    # What is said beforehand of knots that the held-out split places.
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    config["chain"] = {"length": 2, "knots": {"plateau": {"loss": "held_out"}}}
    for task, what in ((config["data"]["task"], "the held-out loss"), ("sst2", "the dev score")):
        config["data"]["task"] = task
        if task == "sst2":
            config["data"]["dir"] = str(
                task_run(model, tmp_path / "sst2", "sst2", reviews(3), reviews(2))["data"]["dir"]
            )
        said = summarize(prepare(load_config(save_run(tmp_path / "run.yaml", config)), 1), 1)
        assert f"plateau     a link ends where {what} has 2 times" in said


def test_full_fine_tuning_on_a_task(model, tmp_path):
    config = task_run(model, tmp_path, "sst2", reviews(3), reviews(2), method="full", chain={"length": 1})
    del config["lora"]
    for world_size in (1, 2):
        train_in(tmp_path / f"in-{world_size}", config, world_size)
    one, two = (record(tmp_path / f"in-{world_size}/run") for world_size in (1, 2))
    losses = [[row["loss"] for row in each["metrics.jsonl"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-4)
    assert losses[0][-1] < losses[0][0]
    # What is left is the last step's model: plain Transformers scores it as the run has.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cola_ds.training.prepare import prepare

    folder = tmp_path / "in-2/run/model"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prepared = prepare(load_config(save_run(tmp_path / "run.yaml", config)), 1)
    with torch.no_grad():
        scores = [plain_scores(plain, tokenizer, example) for example in prepared.held_out.examples]
    right = [
        float(max(range(2), key=each.__getitem__) in e.correct)
        for each, e in zip(scores, prepared.held_out.examples, strict=True)
    ]
    last = [row for row in rows(tmp_path / "in-2/run/evals.jsonl") if row["split"] == "dev"][-1]
    assert (last["step"], last["score"]) == (6, pytest.approx(sum(right) / len(right)))


def test_texts_too_long_are_counted(model, tmp_path):
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    long = [{**row, "sentence": "x" * 200 + row["sentence"]} for row in reviews(1)[:3]]
    config = task_run(
        model, tmp_path, "sst2", reviews(3), [*long, *reviews(1)], data={"max_length": 100, "num_test": 11}
    )
    prepared = prepare(load_config(save_run(tmp_path / "run.yaml", config)), 1)
    assert [each.lost for each in (prepared.train, prepared.held_out, prepared.test)] == [{}, {}, {PROMPT_BEGIN: 3}]
    assert "test 11; 3 lost the beginning of their prompt, too long for data.max_length" in summarize(prepared, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.task=sst3"], "unknown task sst3; did you mean sst2?"),
        (["data.dir=nowhere"], "nowhere has no train.jsonl, which the task's train split is read from"),
        (["data.num_train=5", "data.num_dev=24"], "leave none to train on"),
        (["data.prompt=x"], "data.prompt contradicts data.task"),
        (["data.max_length=2048"], "data.max_length 2048 is more than the model's 1024 positions"),
        (["data.task=null"], "data.dir needs data.task"),
        (["data.task=missing.yaml"], "cannot read data.task missing.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, words, message):
    from cola_ds.training.prepare import prepare

    path = save_run(tmp_path / "run.yaml", task_run(model, tmp_path, "sst2", reviews(3), reviews(2)))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(load_config(path, words), 1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_yaml_of_text_becomes_a_tasks_on_the_command_line(model, tmp_path):
    """What a key says anyway contradicts nothing."""
    config = task_run(model, tmp_path, "sst2", reviews(3), reviews(2))
    task, folder = config["data"].pop("task"), config["data"].pop("dir")
    config["data"] |= {"train": "train.jsonl", "eval": "dev.jsonl", "packing": "none"}
    path = save_run(tmp_path / "run.yaml", config)
    words = [f"data.task={task}", f"data.dir={folder}"]
    assert load_config(path, [*words, "data.train=null", "data.eval=null"]).data.task == "sst2"
    with pytest.raises(UserError, match=r"data\.eval contradicts data\.task"):
        load_config(path, words)


def test_a_bad_row_is_named(model, tmp_path):
    bad = [*reviews(2), {"sentence": "no label"}]
    path = save_run(tmp_path / "run.yaml", task_run(model, tmp_path, "sst2", bad, reviews(2)))
    done = cola_ds("train", path, "--dry-run")
    assert done.returncode == 2
    assert f"{tmp_path / 'sst2/train.jsonl'}:17:" in done.stderr
