"""The command `cola-ds train` on a task, with a copy of the scores that its accuracy comes from."""

import json
from pathlib import Path

from tests.support.jobs import run_job
from tests.support.toys import rows


def train_scored(path: Path) -> tuple[list[dict], dict]:
    """Run a config as one process. Returns the test examples in order, with a score for each candidate, and result.json."""
    scores = path.with_suffix(".scores")
    statuses, said = run_job(path.parent, ["train", path], world_size=1, sabotage=copy_scores, arguments=(str(scores),))
    assert statuses == [0], said
    result = path.parent / "run/result.json"
    return rows(scores), json.loads(result.read_text(encoding="utf-8"))


def copy_scores(rank: int, path: str) -> None:
    """From here on the scores of the test split go to this file as well."""
    from cola_ds.evaluation import evaluators
    from cola_ds.training import validation

    task_score, score_candidates = validation.task_score, evaluators.score_candidates
    examples = []

    def note(engine, data, split, *args):
        examples[:] = data.examples if split == "test" else []
        return task_score(engine, data, split, *args)

    def copy(*args):
        found = score_candidates(*args)
        with open(path, "a", encoding="utf-8") as out:
            for place, example in enumerate(examples):
                row = {"prompt": example.prompt, "candidates": example.candidates, "scores": found[place]}
                out.write(json.dumps(row) + "\n")
        return found

    validation.task_score, evaluators.score_candidates = note, copy
