"""Which point of a grid is selected, by scores of a task and by held-out losses."""

import json
from dataclasses import replace

import pytest

from cola_ds.errors import UserError
from cola_ds.sweep.groups import read_groups, write_groups
from cola_ds.sweep.selection import Choice, choose
from tests.report.test_tables import make_group, save_result
from tests.support.recorded import recorded

POINTS = ("a", "b", "c")


def save_search(folder, found, is_loss):
    """A finished search of one seed a point, with those dev scores or held-out losses."""
    group = make_group("cb", "lora", {(point, 0): folder / point for point in found}, tuple(found), seeds=(0,))
    for point, value in found.items():
        run = save_result(folder / point, 0.5, dev=value)
        if is_loss:
            result = json.loads((run / "result.json").read_text(encoding="utf-8"))
            scores = {"loss": value, "perplexity": 9.0, "examples": 3}
            (run / "result.json").write_text(json.dumps({**result, "task": None, "scores": scores}), encoding="utf-8")
            recorded(run)
    return group


@pytest.mark.parametrize(
    ("is_loss", "values", "choice"),
    [
        (False, (0.5, 0.75, 0.625), Choice("b", -0.75, "")),
        (False, (0.5, 0.75, 0.75), Choice("b", -0.75, "")),
        (False, (0.0, 0.0, 0.0), Choice("a", 0.0, "")),
        (True, (2.5, 2.75, 2.25), Choice("c", 2.25, "")),
        (True, (2.5, 2.0, 2.0), Choice("b", 2.0, "")),
        (True, (None, 3.0, 4.0), Choice("b", 3.0, "")),
        (True, (None, None, None), Choice(None, None, "every point of its grid diverged")),
    ],
)
def test_the_best_point_is_the_first_of_the_best(tmp_path, is_loss, values, choice):
    """A loss of null was not finite."""
    assert choose(save_search(tmp_path, dict(zip(POINTS, values, strict=True)), is_loss)) == choice


def test_the_mean_over_the_search_seeds_counts(tmp_path):
    """The best single run is at a point whose mean is worse."""
    group = save_search(tmp_path, {"a": 0.9, "b": 0.6}, is_loss=False)
    paths = {**group.paths, ("a", 1): tmp_path / "a1", ("b", 1): tmp_path / "b1"}
    save_result(tmp_path / "a1", 0.5, dev=0.2, seed=1)
    save_result(tmp_path / "b1", 0.5, dev=0.7, seed=1)
    both = replace(group, paths=paths, seeds=(0, 1), search_seeds=(0, 1))
    assert choose(both).point == "b"
    assert choose(group).point == "a"


def test_a_sweep_whose_runs_are_not_all_named_is_refused(tmp_path):
    group = make_group("cb", "lora", {("a", 0): tmp_path / "x"}, ("a", "b"), seeds=(0,))
    write_groups(tmp_path, [group])
    with pytest.raises(UserError, match=r"is not what cola-ds sweep writes \(groups: no path for \('b', 0\)\)"):
        read_groups(tmp_path)
