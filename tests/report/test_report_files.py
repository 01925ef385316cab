"""What a report writes and reads of other people's: names that are formulas or break tables, files that are not its own, damaged
runs and sweeps."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cola_ds.cli import main
from cola_ds.errors import inline
from cola_ds.report.files import csv_bytes
from cola_ds.report.tables import markdown, plain
from tests.commands import test_cli
from tests.report.test_tables import COLA, LORA, save_result, save_sweep, tables
from tests.support.recorded import recorded
from tests.support.sweeps import save_base, write_sweep


def said_in_one_line(capsys, *words):
    """What a command that is refused says: status 2, and one short line."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cola-ds: ")
    assert err.count("\n") == 1
    assert len(err) < 1500
    return err


# -- names -------------------------------------------------------------------------------------------------------------


def test_no_cell_of_a_csv_is_a_formula():
    texts = [
        "=1+1",
        "+1",
        "-1",
        "@x",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        " =1",
        "\ufeff@x",
        "a=1",
        "a,b",
        'a"b',
        "a\nb",
        "\udcff",
        "",
    ]
    numbers = [-0.5, -3, 1e9, None]
    cells = csv_bytes([{"x": value} for value in [*texts, *numbers]], ("x",))
    found = [row["x"] for row in csv.DictReader(io.StringIO(cells.decode(), newline=""))]
    harmless = [f"'{text}" for text in texts[:10]] + ["a=1", "a,b", 'a"b', "a\nb", "\\udcff", ""]
    assert found == [*harmless, "-0.5", "-3", "1000000000.0", ""]


def test_names_from_folders_are_harmless(tmp_path, capsys):
    """In the table, in the CSV and in the pictures."""
    names = ["=cmd|'x'!A0", "-2+3", "two\nlines | here", "$\\frac$", "_hidden", "\u202eleft", "\x1b[31mred"]
    for number, name in enumerate(names):
        folder = save_result(tmp_path / "runs" / name, 0.5, losses=[2.0, 1.0], seed=number, **LORA)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        result |= {"task": None, "scores": {"loss": 2.5, "perplexity": 12.18, "examples": 3}}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        recorded(folder)
    save_result(tmp_path / "runs/task", 0.5, task="=HYPERLINK(1)\n|x", losses=[2.0], **LORA)
    words = [
        "report",
        tmp_path / "runs",
        "--csv",
        tmp_path / "a.csv",
        "--plot",
        tmp_path / "a.png",
        "--figures",
        tmp_path / "f",
    ]
    for _ in range(2):  # and again over its own files
        assert main([str(word) for word in words]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(names)
    assert {line.replace("\\|", "").count("|") for line in table} == {9}
    assert "| two lines \\| here | lora |" in "\n".join(table)
    assert not {"\x1b", "\u202e"} & set("".join(table))
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as held:
        cells = [cell for row in csv.reader(held) for cell in row]
    assert "'=cmd|'x'!A0" in cells
    assert "'=HYPERLINK(1)\n|x" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "-2+"))]
    assert "2.5" in cells  # a loss is the dev of a run without a task


def test_markdown_and_lines():
    assert markdown(["a"], [["x\r\ny|z\u2028\x85"]]) == "| a |\n| --- |\n| x y\\|z  |"
    assert inline("a\tb\x00c\udcff") == "a b c\\udcff"
    assert inline("x" * 5000) == "x" * 1000 + "..."


LINKS = ["https://x.example", "www.x.example", "a@x.example", "<https://x.example>", "[a](b)", "![a](b)"]
PIECES = [
    *"\\`*_~$<>&|[]()!#-+=:.@/ab1 \n\t\r",
    "\\|",
    "**",
    "&lt;",
    "&#60;",
    "<b>",
    "<script>",
    "</td>",
    "```",
    "---",
    *LINKS,
]


def read_markdown(text):
    """What another's reader makes of it: the kinds of all that is in it, and the texts of a table's cells."""
    inlines = [
        token for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text) if token.children
    ]
    kinds = {child.type for token in inlines for child in token.children}
    return kinds, ["".join(child.content for child in token.children) for token in inlines]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join))
def test_no_text_becomes_markdown(text):
    """In a cell and in a line it is read as it was written. (Spaces at its ends are the table's.)"""
    expected = inline(text).strip()
    kinds, cells = read_markdown(markdown(["x", "y"], [[text, "1"]]))
    assert cells == ["x", "y", *([expected] if expected else []), "1"]
    assert kinds <= {"text", "text_special"}
    kinds, lines = read_markdown(f"Failed: {plain(text)}.")
    assert "".join(lines) == f"Failed: {inline(text)}."
    assert kinds <= {"text", "text_special"}


def test_addresses_become_no_links():
    """GitHub makes links of them without any mark, which the reader above does not."""
    for text in LINKS[:3]:
        assert plain(text) != text
        assert plain(text).replace("\\", "") == text
    assert (
        plain("lora_rank of /runs/my_run, [8, 4]: 1e-3 & 5%, a-b")
        == "lora_rank of /runs/my_run, [8, 4]: 1e-3 & 5%, a-b"
    )


# -- files that are there ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = save_result(tmp_path / "runs/a", 0.5, losses=[2.0, 1.0], **LORA)
    for name in ("evals.jsonl", "knots.jsonl", "events.jsonl", "lock.json", "chain/link-0001/adapter_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    (tmp_path / "runs/sweep.json").write_text('{"groups": []}', encoding="utf-8")
    (tmp_path / "runs/seed=0.log").write_text("loading\n", encoding="utf-8")
    (tmp_path / "mine.csv").write_text("name,score\nx,1\n", encoding="utf-8")
    (tmp_path / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"holiday" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "link.csv").symlink_to(folder / "result.json")
    return folder


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_file_of_a_run_or_a_user_is_overwritten(run, tmp_path, capsys):
    before = snapshot(tmp_path)
    targets = [path for path in before if path.suffix != ".lock"]
    new = [run / "deepspeed.json", run / "chain/x.csv", run / "checkpoints/step-00000001/x.png", tmp_path / "b/metrics.jsonl",
           tmp_path / "seed=3.log", run, tmp_path / "nul\0", tmp_path / ("x" * 300), tmp_path / "mine.csv/x"]  # fmt: skip
    for target in [*targets, *new]:
        for option in ("--csv", "--plot"):
            assert option in said_in_one_line(capsys, "report", run, option, target)
    assert "--figures" in said_in_one_line(capsys, "report", run, "--figures", tmp_path / "mine.csv")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/loss-cb.png").write_bytes(before[tmp_path / "mine.png"])
    assert "loss-cb.png is there already" in said_in_one_line(capsys, "report", run, "--figures", tmp_path / "figures")
    (tmp_path / "figures/loss-cb.png").unlink()
    assert snapshot(tmp_path) == before


def test_a_report_s_own_files_are_replaced(run, tmp_path, capsys):
    """In the run's folder, too, as the README has it; by a link, what it names."""
    (tmp_path / "loss.png").symlink_to(run / "loss.png")
    words = ["report", run, "--csv", run / "runs.csv", "--plot", tmp_path / "loss.png", "--figures", run / "figures"]
    for _ in range(2):
        assert main([str(word) for word in words]) == 0
    assert (tmp_path / "loss.png").is_symlink()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "loss.png").stat().st_mode & 0o044
    assert (run / "runs.csv").read_text(encoding="utf-8").startswith("task,name,state,chosen,")
    assert not [path for path in tmp_path.rglob(".*")]


# -- damaged runs and sweeps -------------------------------------------------------------------------------------------

DEEP, LONG = "[" * 100_000, "9" * 100_000
BAD_RESULTS = {
    "empty": "", "a list": "[]", "garbage": "\udcff?", "no keys": "{}", "deep": '{"scores": ' + DEEP, "null": "null",
    "scores": ("scores", []), "score": ("scores", {"dev": "1", "test": 1}), "NaN": ("scores", {"dev": float("nan"), "test": 1}),
    "a score above 1": ("scores", {"dev": 1, "test": 1e300}), "no dev": ("scores", {"test": 0.5}), "method": ("method", 3),
    "links": ("links", "2"), "steps": ("steps", -1), "seconds": ("wall_time_s", None), "flops": ("training_flops", "much"),
    "infinite": ("wall_time_s", float("inf")), "a long number": '{"steps": ' + LONG + "}",
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_RESULTS)
def test_a_damaged_result(tmp_path, capsys, fault):
    """Alone it is refused; of several runs it is named below the table."""
    good, bad = save_result(tmp_path / "r/good", 0.5, **LORA), save_result(tmp_path / "r/bad", 0.5, seed=1, **LORA)
    change = BAD_RESULTS[fault]
    if isinstance(change, tuple):
        result = json.loads((bad / "result.json").read_text(encoding="utf-8"))
        change = json.dumps({**result, change[0]: change[1]})
    (bad / "result.json").write_bytes(change.encode(errors="surrogateescape"))
    said_in_one_line(capsys, "report", bad)
    assert main(["report", str(tmp_path / "r"), "--csv", str(tmp_path / "x.csv")]) == 0
    text = capsys.readouterr().out
    assert f"Failed: {bad}: {bad / 'result.json'} is not what the run in this folder wrote" in text
    assert "| cb | accuracy | 50.00 (1) |" in text
    assert main(["report", str(good)]) == 0


def test_a_result_without_figures(tmp_path):
    """null where they could not be found."""
    for number, figures in enumerate(({"training_flops": None, "profiled_flops": None, "peak_memory_bytes": None},)):
        for seed in range(2):
            for kind, options in (("lora", LORA), ("cola", COLA), ("step", {**COLA, "lora": {"rank": [8, 4]}})):
                folder = save_result(tmp_path / f"{number}/{kind}{seed}", 0.5, seed=seed, **options)
                result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
                for key in ("training_flops", "profiled_flops", "peak_memory_bytes"):
                    del result[key]
                (folder / "result.json").write_text(json.dumps(result | figures), encoding="utf-8")
                recorded(folder)
        text = tables(tmp_path / str(number), csv_file=tmp_path / f"{number}.csv")
        assert "| cb | -; - | -; - | -; - |" in text
        assert "50.00; - |" in text


BAD_YAML = {"empty": b"", "garbage": b"\xff\xfe", "a list": b"[]", "an unknown key": b"x: 1\n", "not YAML": b"a: [\n"}


@pytest.mark.parametrize("fault", BAD_YAML)
def test_a_damaged_run_yaml(tmp_path, capsys, fault):
    save_result(tmp_path / "r/good", 0.5, **LORA)
    bad = save_result(tmp_path / "r/bad", 0.5, seed=1, **LORA)
    (bad / "run.yaml").write_bytes(BAD_YAML[fault])
    said_in_one_line(capsys, "report", bad)
    said_in_one_line(capsys, "inspect", bad)
    text = tables(tmp_path / "r")
    assert f"Unreadable: {bad}: " in text
    assert "| cb | accuracy | 50.00 (1) |" in text
    save_sweep(tmp_path / "s", {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6, "lr=1/seed=1": 0.5})
    broken = tmp_path / "s/cb/lora/lr=1/seed=0"
    (broken / "run.yaml").write_bytes(BAD_YAML[fault])
    text = tables(tmp_path / "s", csv_file=tmp_path / "s.csv", figures=tmp_path / "f")
    assert f"Unreadable: {broken}: " in text


BAD_SWEEPS = {
    "empty": "", "a list": "[]", "deep": '{"groups": ' + DEEP, "no group": '{"groups": [3]}', "garbage": "\udcff",
    "out of the folder": ("paths", [["", 0, "../../elsewhere"]]), "absolute": ("paths", [["", 0, "/etc"]]),
    "no path": ("paths", []), "no points": ("points", []), "names": ("name", 3), "seeds": ("seeds", [1.5]),
    "NUL": ("paths", [["", 0, "a\0"]]), "a long number": '{"groups": [{"seeds": [' + LONG + "]}]}",
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_SWEEPS)
def test_a_damaged_sweep(tmp_path, capsys, fault):
    change = BAD_SWEEPS[fault]
    if isinstance(change, tuple):
        group = {
            "task": "cb",
            "name": "lora",
            "points": [""],
            "seeds": [0],
            "search_seeds": [0],
            "paths": [["", 0, "a"]],
        }
        change = json.dumps({"groups": [group | dict([change])]})
    (tmp_path / "sweep.json").write_bytes(change.encode(errors="surrogateescape"))
    assert f"{tmp_path / 'sweep.json'} is not what cola-ds sweep writes (" in said_in_one_line(
        capsys, "report", tmp_path
    )


_END = b"cola-ds sweep: exit status "
BAD_LOGS = {
    "garbage": b"\xff\x00\x1b" * 100,
    "a status that is none": b"cola-ds sweep: x\n" + _END + LONG.encode(),
    "no time": b"cola-ds sweep: \n" + _END + b"0\n",
    "another time": b"cola-ds sweep: 9999999-1 y\n" + _END + b"0\n",
    "one long line": b"cola-ds sweep: now\n" + b"x" * 5_000_000 + b"\n" + _END + b"3\n",
    "a folder": None,
}


@pytest.mark.parametrize("fault", BAD_LOGS)
def test_a_damaged_log(tmp_path, capsys, fault):
    """The list of a sweep, and its report."""
    save_base(tmp_path)
    sweep = write_sweep(tmp_path, tasks={"cb": {"data.train": "x.jsonl"}}, methods={"lora": None}, grid={}, seeds=[0])
    save_result(tmp_path / "runs/cb/lora/seed=0", 0.5, **LORA)
    log = tmp_path / "runs/cb/lora/seed=0.log"
    if BAD_LOGS[fault] is None:
        log.mkdir()
    else:
        log.write_bytes(BAD_LOGS[fault])
    assert main(["sweep", str(sweep), "--list"]) == 0
    group = {
        "task": "cb",
        "name": "lora",
        "points": [""],
        "seeds": [0],
        "search_seeds": [0],
        "paths": [["", 0, "cb/lora/seed=0"]],
    }
    (tmp_path / "runs/sweep.json").write_text(json.dumps({"groups": [group]}), encoding="utf-8")
    assert main(["report", str(tmp_path / "runs")]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert len(out) < 5000
    assert not err


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals.jsonl", "knots.jsonl", "events.jsonl"])
def test_damaged_rows(tmp_path, capsys, name):
    """What test_reported.py finds in them is a line with the file and the row."""
    folder = save_result(tmp_path / "a", 0.5, losses=[2.0], **LORA)
    (folder / name).write_text('{"step": 1, "loss": 2, "link": 1, "lora_rank": 8, "delta_norm": 1, "event": "x"}\n{}\n')
    assert f"{folder / name}, row 2: " in said_in_one_line(capsys, "inspect", folder)
    if name != "events.jsonl":
        assert f"{folder / name}, row 2: " in said_in_one_line(capsys, "report", folder, "--plot", tmp_path / "x.png")
    if name == "metrics.jsonl":
        said_in_one_line(capsys, "report", folder, "--figures", tmp_path / "f")
    assert not (tmp_path / "x.png").exists()


def test_rows_that_lack_what_they_may_lack(tmp_path, capsys):
    folder = save_result(tmp_path / "a", 0.5, **LORA)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 0}\n')
    (folder / "evals.jsonl").write_text('{"step": 1}\n{"step": 1, "split": "dev"}\n')
    (folder / "knots.jsonl").write_text('{"step": 1, "link": 1, "lora_rank": 8, "delta_norm": 1}\n')
    (folder / "events.jsonl").write_text('{"event": "stopped"}\n{"event": "skipped"}\n')
    (folder / "result.json").unlink()
    recorded(folder)
    assert main(["inspect", str(folder)]) == 0
    assert "stopped on ? after step ?" in capsys.readouterr().out
    save_result(tmp_path / "b", 0.5, **LORA)
    for name in ("metrics", "evals", "knots"):
        (tmp_path / f"b/{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    tables(tmp_path / "b", plot=tmp_path / "x.png", figures=tmp_path / "f")


def test_what_cannot_be_printed(tmp_path):
    """An encoding that lacks letters of a name."""
    save_result(tmp_path / "ü", 0.5, **LORA)
    done = test_cli.run(*test_cli.COMMAND, "report", tmp_path / "ü", PYTHONIOENCODING="ascii")
    assert (done.returncode, "50.00 (1)" in done.stdout) == (0, True), done.stderr


def test_a_report_that_somebody_has_added_to_is_theirs(tmp_path, capsys):
    """A column, a line of notes: only a report's own columns and rows make a CSV a report's own."""
    save_result(tmp_path / "r", 0.5, **LORA)
    words = ["report", str(tmp_path / "r"), "--csv"]
    assert main([*words, str(tmp_path / "own.csv")]) == main([*words, str(tmp_path / "own.csv")]) == 0
    capsys.readouterr()
    own = (tmp_path / "own.csv").read_text(encoding="utf-8")
    lines = own.splitlines()
    for name, text in (
        ("column.csv", "\n".join([lines[0] + ",my_notes", *(line + ",great" for line in lines[1:])])),
        ("notes.csv", own + "\nmy summary: 42\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert "only a file that has a report's columns and nothing else" in said_in_one_line(
            capsys, *words, tmp_path / name
        )
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert "known are" in said_in_one_line(capsys, "report", tmp_path / "r", "--paper", "nope")
