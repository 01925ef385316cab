"""`python -m cola_ds.theory`: its files, its mistakes, its statistics."""

import csv
import math
import re
import typing

import numpy
import pytest

from cola_ds.theory import study
from cola_ds.theory.__main__ import main
from cola_ds.theory.frank_wolfe import idealised_cola
from cola_ds.theory.problems import least_squares
from tests.support.toys import REPOSITORY

SMALL = ["--seeds", "2", "--longest", "32"]


@pytest.fixture(scope="module", autouse=True)
def short_chains():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LINKS", 5)  # a study in a second; tests/theory/test_chains.py has the chains themselves
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_chains):
    folder = tmp_path_factory.mktemp("theory") / "out"
    assert main([str(folder), *SMALL]) == 0
    return folder


def rows(path):
    with open(path, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_files(folder):
    gaps, rates, chains = (rows(folder / f"{name}.csv") for name in ("gaps", "rates", "chains"))
    assert len(gaps) == 2 * (2 * (1 + 2 + 2) + 1)  # T = 16, 32: two problems with batches, and the steep one
    assert all(float(row["mean_gap"]) <= float(row["corrected_bound"]) for row in gaps)
    above = {row["problem"] for row in gaps if float(row["mean_gap"]) > float(row["printed_bound"])}
    assert above == {"steep"}
    assert {(row["problem"], row["batch"]) for row in gaps} == {(row["problem"], row["batch"]) for row in rates}
    assert len(chains) == 4 * 3 * 8 * 2 * (study.LINKS + 1)
    assert {row["loss"] for row in chains if row["link"] == "0"} == {"1.0"}
    for name in ("gaps", "chains"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    assert main([str(tmp_path / "again"), *SMALL]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_a_batch_s_name_says():
    """T rows where it grows, 32 where it is fixed, and all of them."""
    problem = least_squares(0)
    for row in list(study.gap_rows(0, 1, [16]))[:3]:
        size = {"all": None, "fixed": 32, "growing": 16}[row.batch]
        trace = idealised_cola(problem, 16, row.eta, size, numpy.random.default_rng(0))
        assert row.mean_gap == trace.gaps.mean() and row.mean_error == trace.errors.mean()


def test_another_seed_does_not():
    one, other = (next(iter(study.gap_rows(seed, 1, [16]))) for seed in (0, 1))
    assert one.mean_gap != other.mean_gap


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "gaps.csv").write_text("mine")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said and "name a new folder" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file/out"), *SMALL]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", [["--longest", "16"], ["--seeds", "0"], ["--seed", "-1"], ["--seeds", "x"]])
def test_wrong_options(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "out"), *option])
    assert end.value.code == 2 and option[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interval_by_hand():
    """1, 2, 3: deviation 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3)."""
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert study.interval([4.0]) == (4.0, 4.0, 4.0)


def test_the_exponent_of_a_power_is_found():
    made = [
        study.GapRow("p", "fixed", T, seed, 0.1, 3 * T**-0.5 * math.exp(seed), 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        for T in (16, 32, 64)
        for seed in (0, 1)
    ]
    (rate,) = study.rate_rows(made)
    assert (rate.exponent, rate.low, rate.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_what_the_page_shows_is_what_is_computed():
    """Its rates follow from the rows beside it, of which the cheap ones are run again."""
    beside = REPOSITORY / "launch/theory"
    page, gaps = (beside / "README.md").read_text(encoding="utf-8"), rows(beside / "gaps.csv")
    kinds = typing.get_type_hints(study.GapRow)
    rates = list(
        study.rate_rows([study.GapRow(**{key: kinds[key](text) for key, text in row.items()}) for row in gaps])
    )
    assert [rate.exponent for rate in rates] == pytest.approx(
        [float(row["exponent"]) for row in rows(beside / "rates.csv")]
    )
    for rate in rates:
        shown = f"{rate.exponent:.2f}" + (f" [{rate.low:.2f}, {rate.high:.2f}]" if rate.batch != "all" else "")
        assert re.search(rf"^\| {rate.problem} \|.* {re.escape(shown)} \|", page, re.MULTILINE), shown
    again = {(row.problem, row.steps): row.mean_gap for row in study.gap_rows(0, 0, [16, 64])}
    for row in gaps:
        if row["batch"] == "all" and row["steps"] in ("16", "64"):
            assert float(row["mean_gap"]) == pytest.approx(again[row["problem"], int(row["steps"])], rel=1e-9)
