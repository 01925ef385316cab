"""launch/sweeps/teacher: the teacher that is made, and what is said of a mistake. Its table: tests/report/test_teachers.py."""

import csv
import json
import runpy

import pytest
import torch

from tests.support.toys import REPOSITORY, save_model

SMALL = ["--rank", "2", "--rows", "8", "--tokens", "4"]


def call(script, words, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    return runpy.run_path(str(REPOSITORY / f"launch/sweeps/teacher/{script}"), run_name="__main__")


def test_a_teacher_is_the_base_and_an_update_of_its_rank(tmp_path, monkeypatch):
    made = call("make.py", [tmp_path / "out", *SMALL], monkeypatch)
    base, teacher = made["small_model"](0), made["small_model"](0)
    made["add_update"](teacher, 2, 1.0, 100)
    for before, after in zip(made["changed"](base), made["changed"](teacher), strict=True):
        values = torch.linalg.svdvals((after.weight - before.weight).double())
        assert values[1] > 0.01 * values[0] and values[2] < 1e-5 * values[0]
        assert ((after.weight - before.weight).norm() / before.weight.norm()).item() == pytest.approx(1, rel=1e-4)
    same = {name for name, weight in base.state_dict().items() if torch.equal(weight, teacher.state_dict()[name])}
    assert len(base.state_dict()) - len(same) == len(made["changed"](base)) == 4
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(row["text"]) for row in rows] == [4] * 8
    facts = json.loads((tmp_path / "out/teacher.json").read_text(encoding="utf-8"))
    assert facts["teacher_loss"] < facts["base_loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "0"], "--rank, --rows and --dev-rows must be 1 or more"),
        (["--rank", "2", "--rows", "0"], "--rank, --rows and --dev-rows must be 1 or more"),
        (["--rank", "99"], "projections has a higher one than 64"),
    ],
)
def test_what_makes_no_teacher_leaves_nothing(tmp_path, monkeypatch, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        call("make.py", [tmp_path / "out", *words], monkeypatch)
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_teacher_is_not_taken_for_the_one_that_is_there(tmp_path, monkeypatch, capsys):
    facts = {"rank": 4, "norm": 1.0, "seed": 0, "rows": 25_600, "dev_rows": 1024, "tokens": 32, "base": None}
    (tmp_path / "teacher.json").write_text(json.dumps(facts), encoding="utf-8")
    call("make.py", [tmp_path, "--rank", "4"], monkeypatch)
    with pytest.raises(SystemExit):
        call("make.py", [tmp_path, "--rank", "8"], monkeypatch)
    assert "was made with --rank 4; name another folder" in capsys.readouterr().err
    save_model(tmp_path / "llama")
    with pytest.raises(SystemExit):
        call("make.py", [tmp_path, "--rank", "4", "--base", tmp_path / "llama"], monkeypatch)
    assert "was made without --base; name another folder" in capsys.readouterr().err
    del facts["base"]
    (tmp_path / "teacher.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(SystemExit):
        call("make.py", [tmp_path, "--rank", "4", "--base", tmp_path / "llama"], monkeypatch)
    assert "was made by an older version, which did not keep its --base; name another" in capsys.readouterr().err


def test_a_base_that_no_update_is_for(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "gpt2", "gpt2")
    for base, said in (("gpt2", "no layers named q_proj and v_proj"), ("missing", "not a model's folder")):
        with pytest.raises(SystemExit) as ended:
            call("make.py", [tmp_path / "out", "--rank", "2", "--base", tmp_path / base], monkeypatch)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_real_base_is_kept_in_mind(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "llama")
    call("make.py", [tmp_path / "out", *SMALL, "--base", tmp_path / "llama"], monkeypatch)
    made = json.loads((tmp_path / "out/teacher.json").read_text(encoding="utf-8"))["base"]
    assert made.startswith("llama ")
    call("make.py", [tmp_path / "out", *SMALL, "--base", tmp_path / "llama"], monkeypatch)
    save_model(tmp_path / "another/llama", rms_norm_eps=1e-5)
    for other in (["--base", tmp_path / "another/llama"], []):
        with pytest.raises(SystemExit):
            call("make.py", [tmp_path / "out", *SMALL, *other], monkeypatch)
        assert f"was made with --base {made}; name another folder" in capsys.readouterr().err
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch/sweeps/teacher"))
    with pytest.raises(SystemExit) as ended:
        call("control.py", [tmp_path / "out"], monkeypatch)
    assert ended.value.code == 2 and "was made with --base llama" in capsys.readouterr().err


def test_a_table_of_nothing_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call("table.py", [tmp_path], monkeypatch)
    assert ended.value.code == 2 and "no finished run of a sweep is in" in capsys.readouterr().err


def test_a_table_by_hand(tmp_path, monkeypatch, capsys):
    """Base 4, teacher 2: a loss of 3 leaves a half. The rate is that whose mean is the lower over the seeds that both have."""
    facts = {"rank": 16, "base_loss": 4.0, "teacher_loss": 2.0}
    (tmp_path / "teacher.json").write_text(json.dumps(facts), encoding="utf-8")
    losses = {
        ("lr=0.1", 0): [3.8, 3.0], ("lr=0.1", 1): [3.0, 3.2], ("lr=0.2", 0): [3.9, 3.1], ("lr=0.01", 0): [2.5, 4.0],
    }  # fmt: skip
    for (point, seed), by_link in losses.items():
        run = tmp_path / f"sweep/t/chain/{point}/seed={seed}"
        run.mkdir(parents=True)
        (run / "run.yaml").write_text(f"data: {{train: {tmp_path / 'train.jsonl'}}}", encoding="utf-8")
        evals = [{"link": 1, "loss": 3.95}, *({"link": link, "loss": loss} for link, loss in enumerate(by_link, 1))]
        (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals), encoding="utf-8")
        (run / "result.json").write_text("{}", encoding="utf-8")
    words = [tmp_path / "sweep", "--csv", tmp_path / "out.csv", "--figure", tmp_path / "out.png"]
    call("table.py", words, monkeypatch)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| t | chain | 2 | lr=0.1 | 0.550 ±0.635 | 2 |"
    ]  # t(0.975, 1) 0.05
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines() == [
        "task,method,point,seed,rank,link,residual",
        "t,chain,lr=0.1,0,16,1,0.90000", "t,chain,lr=0.1,0,16,2,0.50000",
        "t,chain,lr=0.1,1,16,1,0.50000", "t,chain,lr=0.1,1,16,2,0.60000",
    ]  # fmt: skip
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "teacher.json").rename(tmp_path / "teacher.old")
    with pytest.raises(SystemExit) as ended:
        call("table.py", words, monkeypatch)
    assert ended.value.code == 2 and "teacher.json cannot be read (No such file" in capsys.readouterr().err
    (tmp_path / "teacher.old").rename(tmp_path / "teacher.json")
    # A run of another number of links, as knots by the loss may make them.
    with open(tmp_path / "sweep/t/chain/lr=0.1/seed=1/evals.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"link": 3, "loss": 3.2}) + "\n")
    call("table.py", words, monkeypatch)
    assert "| t | chain | 2-3 | lr=0.1 | 0.550 ±0.635 | 2 |" in capsys.readouterr().out


def test_the_control_trains_all_arms(tmp_path, monkeypatch, capsys):
    """Each at three rates by seed 0, and the best by the other seed."""
    call("make.py", [tmp_path / "teacher", *SMALL, "--dev-rows", "64"], monkeypatch)
    words = [tmp_path / "teacher", "--seeds", "2", "--steps", "16", "--csv", tmp_path / "out.csv"]
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch/sweeps/teacher"))
    capsys.readouterr()
    call("control.py", words, monkeypatch)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    arms = {(row["targets"], row["method"]) for row in rows}
    assert len(arms) == 2 * 5 and len(rows) == len(arms) * (3 + 1)
    assert capsys.readouterr().out.count("\n") == 2 + len(arms)


@pytest.mark.parametrize(("words", "said"), [([], "has no teacher.json"), (["--seeds", "0"], "must be 1 or more")])
def test_what_the_control_is_not_for(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch/sweeps/teacher"))
    with pytest.raises(SystemExit) as ended:
        call("control.py", [tmp_path, *words], monkeypatch)
    assert ended.value.code == 2 and said in capsys.readouterr().err
