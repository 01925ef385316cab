"""The ladder against the Trainer: on a toy model, from its rows to the profile; a rung with other losses has no speed."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cola_ds.errors import UserError
from tests.bench import ladder
from tests.bench.arms import Arm, Plan
from tests.bench.timed import ArmFailedError
from tests.bench.trainer import deal
from tests.bench.where import PARTS, REST, part_of, seconds_of
from tests.bench.work import WORKLOADS, save_rows
from tests.support.launching import clean_environment
from tests.support.toys import REPOSITORY, save_model


@pytest.mark.launchers
def test_packed_rung_stands_beside_the_trainer(tmp_path):
    """Its losses are the Trainer's, of the same examples; then the table, and where a step's time goes."""
    model = save_model(tmp_path / "model", max_position_embeddings=160)
    words = [
        str(model),
        "--processes",
        "1",
        "--rungs",
        "packed",
        "--repeats",
        "1",
        "--steps",
        "4",
        "--timed-steps",
        "3",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.ladder", *words], cwd=REPOSITORY, env=clean_environment(), text=True,
        capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packed: losses are those of rung 0 to" in done.stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:2] == "| "]
    table = {row[0]: dict(enumerate(row)) for row in cells if len(row) == len(ladder.COLUMNS) and row[0] != "---"}
    assert list(table) == ["rung", "0", "1 packed"]
    for rung in ("0", "1 packed"):
        assert all(float(table[rung][at]) > 0 for at in (2, 3, 5, 6, 7, 8, 9, 10))
    times = float(table["1 packed"][2]) / float(table["0"][2])
    assert float(table["1 packed"][3]) == pytest.approx(times, abs=0.01)  # of one pair the medians' ratio is its own
    assert float(table["1 packed"][12]) <= ladder.TOLERANCE
    parts = {row[0]: float(row[1]) for row in cells if len(row) == 3 and row[0] not in ("part", "---")}
    assert set(parts) == {*(part for part, _ in PARTS), REST}
    assert parts["matrix products"] > 0 and parts["loss"] > 0 and parts["attention"] > 0


class Runs:
    """What `ladder.check` needs of Arms, without a run: the Trainer's losses are 1, 2; a rung's differ by what its override
    says."""

    def __init__(self):
        self.args, self.ran = SimpleNamespace(steps=2), []

    def filled(self, overrides):
        return overrides

    def prepared(self, overrides):
        if "lacks" in overrides:
            raise UserError("unknown key lacks")
        return overrides

    def plan(self, prepared, steps):
        return Plan([[0], [1]], 1, 1, [1, 1], [1, 1], [1, 1])

    def run_trainer(self, plan):
        return Arm([1.0, 2.0], 1, 1, 1, 1, 1)

    def run_cola(self, overrides, plan):
        self.ran.append(overrides)
        if "dies" in overrides:
            raise ArmFailedError("Killed")
        off = sum(float(each.partition("=")[2] or 0) for each in overrides)
        return Arm([1.0, 2.0 + off], 1, 1, 1, 1, 1)


def test_rung_that_fails_or_is_not_there_is_no_part_of_the_next(monkeypatch, capsys):
    rungs = {
        "first": ["a=0.00004"], "off": ["b=0.001"], "not a number": ["c=nan"], "dead": ["dies"], "not there": ["lacks"],
        "last": ["d=0.00004"],
    }  # fmt: skip
    monkeypatch.setattr(ladder, "RUNGS", {name: (name, overrides) for name, overrides in rungs.items()})
    runs = Runs()
    found = {rung.name: rung for rung in ladder.check(runs, list(rungs))}
    assert [name for name, rung in found.items() if not rung.failed] == ["first", "last"]
    assert "0.001" in found["off"].failed and "Killed" in found["dead"].failed and found["not a number"].failed
    assert "not there: skipped: unknown key lacks" in capsys.readouterr().out
    assert found["last"].overrides == ["a=0.00004", "d=0.00004"] == runs.ran[-1]


def test_script_ends_with_what_failed(monkeypatch):
    """Nothing has passed: nothing is measured."""
    monkeypatch.setattr(sys, "argv", ["ladder", "MODEL", "--rungs", "json"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ladder, "Arms", lambda *words: None)
    monkeypatch.setattr(ladder, "check", lambda *words: [ladder.Rung("json", "", [], failed="its losses differ")])
    with pytest.raises(SystemExit, match="json: its losses differ"):
        ladder.main()


def test_trainer_deals_batch_after_batch():
    assert deal([*range(8)], 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert deal([*range(7)], 2, 1) == [[[0, 1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(("kind", "least", "most"), [("short", 20, 60), ("mixed", 12, 513), ("long", 512, 513)])
def test_rows_have_their_lengths(tmp_path, kind, least, most):
    """Those that are as long as can be have one more, and are cut."""
    from transformers import AutoTokenizer

    from tests.support.toys import save_tokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    save_rows(tmp_path / "rows.jsonl", WORKLOADS[kind], 40, tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    assert len(rows) == 40 and least <= min(lengths) and max(lengths) <= most
    assert all(row["prompt"] and row["completion"] for row in rows)
    drawn = random.Random(1)
    assert sum(min(WORKLOADS[kind].length(drawn), 512) for _ in range(1000)) / 1000 > 2 * least or kind == "long"


def test_parts_of_a_step_add_up_to_it():
    """Of the thread that trains alone; what has no operation is the rest."""
    event = lambda name, thread, micros: SimpleNamespace(name=name, thread=thread, self_cpu_time_total=micros)  # noqa: E731
    names = [
        "a step of the ladder",
        "aten::mm",
        "aten::_log_softmax",
        "aten::_scaled_dot_product_flash_attention",
        "aten::mul",
    ]
    events = [event(name, 1, 1e6) for name in names] + [event("gloo:all_gather", 2, 5e6)]
    found = seconds_of(events, 10.0, on_cpu=True)
    assert found.pop(REST) == 6.0
    assert {part for part, seconds in found.items() if seconds} == {
        "matrix products",
        "loss",
        "attention",
        "element-wise",
    }
    assert sum(found.values()) == 4.0
    assert part_of("aten::_foreach_add_") == "optimizer" and part_of("aten::copy_") == "copies"
