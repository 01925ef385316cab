"""lm-eval, the public evaluation harness, gives each candidate the score that ours gives, and so finds the same accuracy."""

import datasets
import pytest

from tests.support.scored import train_scored
from tests.support.toys import save_model, save_run
from tests.training.test_task_runs import task_run

pytestmark = pytest.mark.beyond_ci  # it brings 35 packages, 350 MB


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[test,lm-eval]'")
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    return lm_eval.evaluator, HFLM


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights large enough for scores that are far apart. Its tokenizer makes each byte an id."""
    return save_model(tmp_path_factory.mktemp("harness") / "model", max_position_embeddings=512, initializer_range=0.2)


def sst2_text(row):
    return row["sentence"].strip() + " It was"


def cb_text(row):
    return f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'


def copa_text(row):
    return row["premise"].rstrip(".") + {"effect": " so", "cause": " because"}[row["question"]]


def copa_choices(row):
    return [" " + row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]


SENTENCES = [
    "a joy ", "dull , slow and sad ", "moving", "it never finds its feet ", "naïve but charming ", "no", "fine ", "a mess",
]  # fmt: skip
PREMISES = [
    ("The café closed.", "cause", "Nobody came.", "It had won a prize."),
    ("I forgot the umbrella.", "effect", "My coat got wet.", "The sun shone."),
    ("She opened the window.", "cause", "The room was hot.", "Snow fell."),
    ("The dog barked.", "effect", "The thief ran.", "The déjà vu of the old man came back to him."),
    ("He was late.", "cause", "His train broke down.", "He woke early."),
    ("The glass fell.", "effect", "It broke.", "Water rose to the ceiling."),
    ("We sang.", "cause", "It was her birthday.", "We slept."),
    ("Prices rose.", "effect", "People bought less.", "All was free."),
]
TASKS = {
    "sst2": (
        sst2_text,
        [" terrible", " great"],
        [{"sentence": text, "label": n % 2} for n, text in enumerate(SENTENCES)],
    ),
    "copa": (
        copa_text,
        copa_choices,
        [
            {"premise": premise, "question": question, "choice1": one, "choice2": two, "label": n % 2}
            for n, (premise, question, one, two) in enumerate(PREMISES)
        ],
    ),
    "cb": (
        cb_text,
        ["Yes", "No", "Maybe"],
        [{"premise": row[0], "hypothesis": row[2], "label": n % 3} for n, row in enumerate(PREMISES)],
    ),
}


def harness_run(harness, model, name):
    """The harness's own task on the rows. Returns its log-likelihood of each text, (prompt, candidate) -> sum, and its result."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    evaluator, HFLM = harness
    text, choices, rows = TASKS[name]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": "label",
        "target_delimiter": "",
        # The sum over a candidate's bytes, which here are its ids, by their number: its acc_norm would divide by characters.
        "metric_list": [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}],
    }
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
    found = evaluator.evaluate(lm, {name: ConfigurableTask(config=config)}, bootstrap_iters=0)
    sums = {}
    for sample in found["samples"][name]:
        for arguments, (log_likelihood, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            sums[tuple(arguments)] = float(log_likelihood)
    # White space at the end of a prompt, here the newline of cb, it scores as the beginning of the answer. MeZO, and so ours,
    # leaves it to the prompt: what the harness itself gives to the newline is taken off again.
    ends = sorted(
        {(prompt.rstrip(), prompt[len(prompt.rstrip()) :]) for prompt, _ in sums if prompt != prompt.rstrip()}
    )
    asked = [Instance("loglikelihood", {}, end, number) for number, end in enumerate(ends)]
    of_ends = {
        "".join(end): value for end, (value, _) in zip(ends, lm.loglikelihood(asked, disable_tqdm=True), strict=True)
    }
    assert len(of_ends) == (len(rows) if name == "cb" else 0)
    return {key: value - of_ends.get(key[0], 0.0) for key, value in sums.items()}, found["results"][name]


@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_agrees(harness, model, name, tmp_path):
    rows = TASKS[name][2]
    config = task_run(model, tmp_path, name, rows[:2], rows, method="zero-shot", chain={"length": 1}, lora={"rank": 4})
    config["data"] |= {"num_train": 1, "num_dev": 1, "num_test": len(rows)}
    scored, result = train_scored(save_run(tmp_path / "run.yaml", config))
    ours = {
        (row["prompt"], candidate): score * len(candidate.encode())
        for row in scored
        for candidate, score in zip(row["candidates"], row["scores"], strict=True)
    }
    theirs, metrics = harness_run(harness, model, name)
    assert ours.keys() == theirs.keys()  # the same prompts, each followed by the same candidates
    assert len(ours) == len(rows) * (3 if name == "cb" else 2)
    for key, log_likelihood in theirs.items():
        assert ours[key] == pytest.approx(log_likelihood, rel=1e-5, abs=1e-4)
    text, _, _ = TASKS[name]
    right = 0
    for row in rows:
        means = [
            value / len(candidate.encode()) for (prompt, candidate), value in theirs.items() if prompt == text(row)
        ]
        right += means.index(max(means)) == row["label"]
    assert result["scores"]["test"] == right / len(rows)
    assert 0 < right < len(rows)
    if name != "cb":  # there its own accuracy counts the newline in
        assert metrics["acc_bytes,none"] == right / len(rows)
