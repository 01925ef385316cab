"""`cola-ds evaluate --suite`: lm-eval's tasks on the sharded model find what lm-eval's own model of the export finds."""

import importlib.util
import json

import pytest
import yaml

from cola_ds.commands import suite
from cola_ds.commands.export import export
from cola_ds.errors import UserError
from tests.support.distributed import process_group, run_distributed
from tests.support.jobs import run_job
from tests.support.runs import train_in
from tests.support.toys import rows, run_config, save_model, save_sums

TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "toy_answer": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n", "3"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the YAMLs of three tasks, of every kind of request, and rows; texts are longer than the model's window."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [
        {
            "prompt": row["prompt"], "choices": [row["completion"], "7", "1" * (n % 4 + 1)], "label": n % 3,
            "text": f"{row} " * (n + 1),
        }
        for n, row in enumerate(rows(save_sums(folder / "sums.jsonl", 11, seed=5)))
    ]  # fmt: skip
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    data = {"data_files": {"validation": str(folder / "docs.jsonl")}}
    for name, said in TASKS.items():
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "validation_split": "validation",
            **said,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained chain, its weights far enough apart that scores differ, and its export."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[test,lm-eval]'")
    folder = tmp_path_factory.mktemp("suite")
    model = save_model(folder / "model", initializer_range=0.2)
    config = run_config(
        model, save_sums(folder / "train.jsonl", 40), folder / "run", optim={"lr": 2e-2, "max_steps": 12}
    )
    train_in(folder, config)
    return folder / "run", export(folder / "run", "hf", folder / "merged"), model


def theirs(model, tasks, names=TASKS):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
    found = lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=TaskManager(include_path=str(tasks)))
    return found["results"]


def expected(found):
    """Their results, by task and metric."""
    return {
        task: {
            name.partition(",")[0]: value
            for name, value in said.items()
            if name.endswith(",none") and "stderr" not in name
        }
        for task, said in found.items()
    }


def ours(path):
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {name: {metric: score["value"] for metric, score in said["metrics"].items()} for name, said in tasks.items()}


@pytest.mark.beyond_ci
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_suites_scores_are_those_of_the_export(run, tasks, tmp_path, world_size):
    folder, merged, model = run
    said = expected(theirs(merged, tasks))
    names = f"lm-eval:{','.join(TASKS)}"
    words = ["evaluate", folder, "--suite", names, "--suite-dir", tasks, "--out", tmp_path / "out", "--quiet"]
    statuses, printed = run_job(tmp_path / "job", words, world_size=world_size)
    assert statuses == [0] * world_size, printed
    found = ours(tmp_path / "out/lm-eval.json")
    assert found == {task: pytest.approx(scores, rel=1e-5) for task, scores in said.items()}
    assert found != expected(theirs(model, tasks))
    assert f"| toy_choice | 11 | acc | {found['toy_choice']['acc']:.4f} ±" in printed
    assert 0 < found["toy_choice"]["acc"] < 1
    statuses, printed = run_job(tmp_path / "job", words, world_size=1)
    assert statuses == [2]
    assert "lm-eval.json already exists; name another folder by --out, or write it anew with --fresh" in printed


@pytest.mark.beyond_ci
def test_a_suite_on_a_base_model_alone(run, tasks, tmp_path):
    words = [
        "evaluate",
        run[2],
        "--suite",
        "lm-eval:toy_choice",
        "--suite-dir",
        tasks,
        "--out",
        tmp_path / "out",
        "--limit",
        4,
    ]
    words += ["model.dtype=fp32", "deepspeed=zero3"]
    statuses, printed = run_job(tmp_path / "job", words, world_size=1)
    assert statuses == [0], printed
    assert (
        json.loads((tmp_path / "out/lm-eval.json").read_text(encoding="utf-8"))["tasks"]["toy_choice"]["examples"] == 4
    )


def answers(process, folder, requests):
    """What the sharded model of a run answers."""
    from lm_eval.api.instance import Instance

    from cola_ds.evaluation.harness import ShardedLM

    config = suite.suite_config(str(folder), str(folder.parent / "unused"), process.world_size, [])
    process_group(process)
    engine, tokenizer = suite._engine(config, process, lambda status: None)
    lm = ShardedLM(engine, tokenizer, 2)
    made = {kind: [Instance(kind, {}, args, n) for n, args in enumerate(each)] for kind, each in requests.items()}
    return {kind: getattr(lm, kind)(asked) for kind, asked in made.items()}


@pytest.mark.beyond_ci
def test_every_answer_is_that_of_their_own_model(run):
    """Contexts that are empty, end in a space, are longer than the model's window; answers of two lengths and ends."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, merged, _ = run
    texts = ["12+30=", "a b ", "", "99+1=" * 40, "<s>3", "7"]
    short, long = {"until": ["\n"], "max_gen_toks": 5}, {"until": ["5", "ab"], "max_gen_toks": 20, "do_sample": False}
    requests = {
        "loglikelihood": [(text, wanted) for text in texts for wanted in ("42", " 7", "1")],
        "loglikelihood_rolling": [(text * 9,) for text in texts if text],
        # Theirs gives a context that begins with BOS a second one, unless it is the first of its batch.
        "generate_until": [(text, options) for text in texts if text and text[0] != "<" for options in (short, long)],
    }
    found = run_distributed(answers, 2, folder, requests)
    assert found[0] == found[1]
    lm = HFLM(pretrained=str(merged), device="cpu", dtype="float32", batch_size=3)
    for kind, each in requests.items():
        wanted = getattr(lm, kind)([Instance(kind, {}, args, n) for n, args in enumerate(each)])
        if kind == "loglikelihood":
            assert [score for score, _ in found[0][kind]] == pytest.approx(
                [score for score, _ in wanted], rel=1e-4, abs=1e-4
            )
            assert [greedy for _, greedy in found[0][kind]] == [greedy for _, greedy in wanted]
        else:
            assert found[0][kind] == (pytest.approx(wanted, rel=1e-4) if kind == "loglikelihood_rolling" else wanted)
    assert len(set(found[0]["generate_until"])) > 3


@pytest.mark.beyond_ci
@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        ("lm-eval:toy_choise", True, "lm-eval has no task 'toy_choise'; did you mean toy_choice?"),
        ("lm-eval:toy_choice", False, "--suite-dir no-such-folder is not a folder"),
        ("lm-eval:toy_gone", True, "the data of toy_gone cannot be had: "),
    ],
)
def test_tasks_that_cannot_be_had(run, tasks, tmp_path, names, folder, message):
    content = yaml.safe_load((tasks / "toy_choice.yaml").read_text(encoding="utf-8"))
    content |= {"task": "toy_gone", "dataset_kwargs": {"data_files": {"validation": str(tasks / "gone.jsonl")}}}
    (tasks / "gone.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    there = tasks if folder else "no-such-folder"
    words = ["evaluate", run[0], "--suite", names, "--suite-dir", there, "--out", tmp_path / "out"]
    statuses, printed = run_job(tmp_path / "job", words, world_size=1)
    assert (statuses, message in printed) == ([2], True), printed
    assert not (tmp_path / "out").exists()


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm-eval, which is not installed: pip install 'cola_ds\[lm-eval\]'"):
        suite.suite_tasks("lm-eval:arc_easy")


@pytest.mark.parametrize("text", ["arc_easy", "lm-eval:", "lm-eval:a,,b", "other:arc_easy"])
def test_what_is_no_suite(text):
    with pytest.raises(UserError, match="must be lm-eval:TASK,"):
        suite.suite_tasks(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "lm-eval:a", "--method", "icl"], "--suite stands without --method and --dir"),
        (["--suite", "lm-eval:a", "--limit", "0"], "--limit takes a number of at least 1"),
        (["--task", "rte", "--limit", "3"], "--suite-dir and --limit are for --suite; leave them out"),
        (["--task", "rte", "--suite", "lm-eval:a"], "argument --suite: not allowed with argument --task"),
        ([], "one of the arguments --task --suite is required; see cola-ds evaluate --help"),
    ],
)
def test_words_that_contradict_each_other(tmp_path, words, message):
    statuses, printed = run_job(tmp_path / "job", ["evaluate", tmp_path, *words], world_size=1)
    assert (statuses, message in printed) == ([2], True), printed


def test_a_suites_data_are_its_own():
    with pytest.raises(
        UserError, match=r"override data.num_test=3: the tasks of --suite say themselves what their data are"
    ):
        suite.suite_config("some/model", None, 1, ["data.num_test=3"])
