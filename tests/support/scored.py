"""The command `cola-ds train` on a task, with a copy of the scores that its accuracy comes from."""

import json
import sys
from pathlib import Path

from tests.support.toys import rows


def train_scored(path: Path, timeout_s: float = 300) -> tuple[list[dict], dict]:
    """Run a config as one process. Returns the test examples in order, with a score for each candidate, and result.json."""
    from tests.commands.test_cli import run

    scores = path.with_suffix(".scores")
    code = f"from tests.support import scored; scored.copy_scores({str(scores)!r}); from cola_ds.cli import main; exit(main())"
    done = run(sys.executable, "-c", code, "train", path, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    result = path.parent / "run/result.json"
    return rows(scores), json.loads(result.read_text(encoding="utf-8"))


def copy_scores(path: str) -> None:
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
