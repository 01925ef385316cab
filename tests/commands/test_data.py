"""`cola-ds data`: what it says of rows is so; what it shows cannot drive a terminal; what it removes is its own."""

import json
import re

import pytest

from cola_ds.cli import main
from tests.support.toys import run_config, save_run

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% endfor %}"
)


@pytest.fixture
def place(toy, tmp_path, monkeypatch):
    """A folder with rows of pairs, in bytes 2 + 3, 10 + 1 twice and 70 long, and a run's YAML of them."""
    pairs = [("ab", "cde"), ("0123456789", "x"), ("0123456789", "x"), ("a" * 40, "b" * 30)]
    write(tmp_path / "train.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    config = run_config(toy[0], tmp_path / "train.jsonl", tmp_path / "run", data={"cache": str(tmp_path / "cache")})
    save_run(tmp_path / "run.yaml", config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def said(capsys, *words):
    status = main(["data", "run.yaml", *words])
    found = capsys.readouterr()
    assert status == 0, found.err
    return found.out


def test_counts(place, capsys):
    """Lengths with BOS and EOS are 7, 13, 13 and 64; a completion and its EOS are trained."""
    text = " ".join(said(capsys).split())
    assert "source " + str(place / "train.jsonl") + " (pairs, tokenized now): 4 rows, 4 examples" in text
    assert "examples 4: 97 tokens, 39 of them trained" in text  # 4 + 2 + 2 + 31
    assert "lengths 7 to 64 tokens, median 13, mean 24.2" in text
    assert "7 - 12 1 " in text and "13 - 18 2 " in text
    assert "an example each, 37.9% of data.max_length 64 full; with data.packing=best_fit 2 rows of 64 tokens" in text
    assert "duplicates 1 row there twice" in text
    assert re.search(r"cut 1 lost .*, too long for data.max_length", text)
    again = " ".join(said(capsys, "data.packing=best_fit").split())
    assert "(pairs, from the cache): 4 rows" in again
    assert "rows packed: 2 rows of 64 tokens, 75.8% full" in again  # 97 / 128


def test_what_is_left_out(place, capsys):
    text = " ".join(said(capsys, "data.too_long=drop", "data.duplicates=drop", "data.eval_examples=1").split())
    assert "left out 1: longer than data.max_length" in text
    assert "duplicates 1 row there twice, and left out" in text
    assert "held out 1 example" in text or "held out 2 examples" in text
    assert "eval source held out of data.train" in text
    assert text.count("examples 1:") == 2


def test_examples_with_what_is_trained(place, capsys, monkeypatch):
    write(place / "train.jsonl", [{"prompt": "a\x1b[2Jb\n\u202e⟦", "completion": "c\x07d"}])
    shown = said(capsys, "--show", "9").split("  example 0\n")[1]
    assert shown.splitlines() == [r"    <s>a\x1b[2Jb", r"    \u202e\u27e6⟦c\x07d</s>⟧"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert r"    \u202e\u27e6" + "\x1b[32m" + r"c\x07d</s>" + "\x1b[0m" in said(capsys, "--show", "1").splitlines()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in said(capsys, "--show", "1")


def test_roles_of_conversations(place, capsys):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    write(place / "train.jsonl", [{"messages": turns}] * 2)
    (place / "chat.jinja").write_text(CHATML, encoding="utf-8")
    cut = said(capsys, "data.chat_template=chat.jinja")
    assert re.search(r"  role +assistant: \d+ tokens, \d+ of them trained\n", cut)
    text = said(capsys, "data.chat_template=chat.jinja", "data.max_length=128", "--show", "1")
    roles = dict(re.findall(r"  role +(\w+): \d+ tokens, (\d+) of them trained", text))
    assert roles["prompt"] == "0"  # all that is not the assistant's
    assert int(roles["assistant"]) >= 2 * len("you<|im_end|>")
    assert f"{sum(map(int, roles.values()))} of them trained (" in text  # of the examples
    assert "⟦you<|im_end|>" in text
    assert "⟦hi" not in text


def test_the_plot(place, capsys):
    said(capsys, "--plot", "lengths.png", "data.eval_examples=1")
    assert (place / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_clean_removes_what_is_its_own(place, capsys):
    said(capsys)
    (place / "cache/mine").mkdir()
    (place / "cache/mine/notes").write_text("mine", encoding="utf-8")
    size = sum(path.stat().st_size for path in (place / "cache").rglob("*") if path.is_file()) - 4
    assert said(capsys, "--clean") == f"removed 1 tokenized source, {size:,} bytes, from {place / 'cache'}\n"
    assert sorted(path.name for path in (place / "cache").rglob("*")) == ["mine", "notes"]
    assert said(capsys, "--clean").startswith("removed 0 tokenized sources, 0 bytes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clean", "--show", "1"], "--show takes a number of examples, and --clean stands alone"),
        (["--show", "-1"], "--show takes a number of examples"),
        (["--clean", "data.cache=none"], "data.cache none keeps nothing"),
        (["data.train=none.jsonl"], "data.train none.jsonl"),
        (["model.path=no/such/model"], "model.path no/such/model"),
        (["--plot", "run.yaml"], "--plot run.yaml"),
    ],
)
def test_mistakes(place, capsys, words, message):
    assert main(["data", "run.yaml", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cola-ds: ")]
    assert message in line


def test_a_task_is_another_matter(place, toy, capsys):
    save_run(place / "task.yaml", {**run_config(toy[0], "x", place / "run"), "data": {"task": "rte", "dir": "x"}})
    assert main(["data", "task.yaml"]) == 2
    assert "data.task rte: cola-ds data looks at data.train" in capsys.readouterr().err
