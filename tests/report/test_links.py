"""What a report says of links, from rows that are written by hand."""

import json
import math

import pytest

from cola_ds.errors import UserError
from cola_ds.report.links import means, overlaps
from tests.report.test_tables import COLA, save_result, tables
from tests.support.recorded import recorded

KNOTS = [
    {"link": 1, "step": 4, "lora_rank": 8, "delta_norm": 1.5, "rounding_error": 0.01, "effective_rank": 2.0,
     "sum_effective_rank": 2.0, "row_overlap": None, "column_overlap": None},
    {"link": 2, "step": 8, "lora_rank": 4, "delta_norm": 0.5, "rounding_error": None, "effective_rank": 3.25,
     "sum_effective_rank": 4.5, "row_overlap": 0.125, "column_overlap": 0.75, "intruders": 3, "intruder_layers": 2},
]  # fmt: skip
LAYER = {
    "lora_rank": 1, "norm": 1.0, "effective_rank": 1.0, "sum_norm": 1.0, "sum_effective_rank": None, "row_overlap": None,
    "column_overlap": None, "singular_values": [1.0], "sum_singular_values": [1.0, None], "row_overlaps": [],
    "column_overlaps": [],
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    folder = save_result(tmp_path / "a", 0.5, **COLA)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result |= {"task": None, "scores": {"loss": 2.5, "perplexity": 12.18, "examples": 3}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    write(folder / "knots.jsonl", KNOTS)
    write(folder / "evals.jsonl", [{"step": 3, "loss": 9.0}, {"step": 8, "loss": 2.5}])
    return recorded(folder)


def test_a_run_that_nobody_looked_at_has_no_table_of_links(run):
    assert "effective rank" not in tables(run)


def test_table_of_links(run):
    write(run / "watch.jsonl", [{"step": 0, "loss": 3.0}, {"step": 4, "loss": 3.5}, {"step": 8, "loss": 2.75}])
    lines = tables(recorded(run)).splitlines()
    assert "| a | 1 | 4 | 8 | 1.5 | 1.00% | 2.00 | 2.00 | - | - | - | 3.5000 (+0.5000) | - |" in lines
    assert "| a | 2 | 8 | 4 | 0.5 | - | 3.25 | 4.50 | 0.125 | 0.750 | 2.5000 | 2.7500 (-0.2500) | 3 (2) |" in lines


def test_figures_of_links(run, tmp_path):
    layers = [
        {**LAYER, "link": 1, "step": 4, "layer": "x"},
        {**LAYER, "link": 2, "step": 8, "layer": "x", "row_overlaps": [0.5], "column_overlaps": [None]},
    ]
    write(run / "links.jsonl", layers)
    said = tables(recorded(run), figures=tmp_path / "figures")
    assert "| a | 2 | 8 |" in said
    assert (tmp_path / "figures/links-a.png").read_bytes().startswith(b"\x89PNG")
    write(run / "links.jsonl", [{**layers[0], "singular_values": "many"}])
    with pytest.raises(UserError, match=r"links\.jsonl, row 1: singular_values: .*; the row is damaged"):
        tables(recorded(run), figures=tmp_path / "figures")


def test_overlaps_lie_at_the_numbers_of_their_links():
    """Of a run whose diagnostics were switched on after its first two links."""
    nothing = pytest.approx(math.nan, nan_ok=True)
    assert overlaps({3: [0.1, 0.2], 4: [0.3, 0.4, 0.5]}) == [
        [nothing] * 4, [nothing] * 4, [0.1, 0.2, nothing, nothing], [0.3, 0.4, 0.5, nothing],
    ]  # fmt: skip
    assert overlaps({1: []}) == [[nothing]]


def test_a_run_without_links_is_in_the_table_too(run):
    """Method full: no knots."""
    write(run / "knots.jsonl", [])
    write(run / "watch.jsonl", [{"step": 0, "loss": 3.0}, {"step": 8, "loss": 2.75}])
    lines = tables(recorded(run)).splitlines()
    assert "| a | - | 8 | - | - | - | - | - | - | - | 2.5000 | 2.7500 (-0.2500) | - |" in lines
    assert not [line for line in lines if line.startswith("| a | - | 0 |")]
    write(run / "watch.jsonl", [{"step": 0, "loss": 3.0}])  # zero-shot: one look
    assert "| a | - | 0 | - | - | - | - | - | - | - | - | 3.0000 | - |" in tables(recorded(run)).splitlines()


def test_means_of_places():
    assert means([[1.0, 2.0], [3.0, None], [5.0]]) == [3.0, 2.0]
