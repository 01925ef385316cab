"""The page of a report: its figures are the rows of the runs' files, whatever state these are in, and no text of theirs is
markup."""

import json
import math
import random
import re
import statistics

import pytest
import yaml

from cola_ds.cli import main
from cola_ds.report.page.chart import kept_places, labels, ticks
from cola_ds.report.statistics import confidence_interval
from cola_ds.run.lock import RunLock
from cola_ds.run.marker import Marker
from tests.report.test_links import KNOTS, LAYER, write
from tests.report.test_report_files import said_in_one_line, snapshot
from tests.report.test_tables import COLA, LORA, save_result, save_sweep
from tests.support.html_tree import read_html, rows_of
from tests.support.recorded import recorded
from tests.support.toys import REPOSITORY

ALLOWED = {
    "html", "head", "meta", "link", "title", "style", "body", "a", "header", "h1", "h2", "h3", "p", "fieldset", "legend",
    "label", "input", "nav", "ul", "li", "main", "section", "div", "table", "thead", "tbody", "tr", "th", "td", "strong",
    "small", "bdi", "details", "summary", "figure", "figcaption", "svg", "path", "text", "circle", "rect",
}  # fmt: skip
METRICS = ("loss", "lr", "grad_norm", "tokens_per_s", "tflops", "step_s")


def draw_metrics(count, seed=0):
    """Rows of metrics.jsonl with values of their own in every column."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, count + 1):
        row = {key: draw.uniform(1.0, 2.0) for key in METRICS}
        row |= {"step": step, "link": 1 + (step > 4), "memory_bytes": draw.randrange(2**30, 2**31)}
        rows.append(row | {"data_wait_s": row["step_s"] * draw.random()})
    return rows


def save_run_of(folder, metrics, **files):
    """A finished chain without a task, with those rows in its files."""
    save_result(folder, 0.5, **COLA)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result |= {"task": None, "scores": {"loss": 2.5, "perplexity": 12.18, "examples": 3}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    for name, rows in {"metrics": metrics, **files}.items():
        write(folder / f"{name}.jsonl", rows)
    return recorded(folder)


def page_of(*paths, at):
    """The page of some runs as a tree. It is written to `at`."""
    assert main(["report", *map(str, paths), "--html", str(at)]) == 0
    return read_html(at.read_text(encoding="utf-8"))


def figures_of(tree):
    """By title: a figure's node and its table."""
    found = {}
    for figure in tree.all("figure"):
        if any(figure.all("figcaption")):
            title = figure.one("figcaption").inner[0].strip()
            assert title not in found
            found[title] = (figure, rows_of(figure))
    return found


def six(value):
    return f"{value:.6g}"


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path):
    """A chain of two links with all that a run can log."""
    layers = [
        {**LAYER, "link": 1, "step": 4, "layer": "x", "singular_values": [3.0, 1.0], "sum_singular_values": [3.0, 1.0]},
        {**LAYER, "link": 1, "step": 4, "layer": "y", "singular_values": [5.0, 3.0], "sum_singular_values": [5.0, 3.0]},
        {**LAYER, "link": 2, "step": 8, "layer": "x", "singular_values": [2.0], "sum_singular_values": [4.0, 2.0],
         "row_overlaps": [0.25], "column_overlaps": [0.75]},
    ]  # fmt: skip
    return save_run_of(
        tmp_path / "chain", draw_metrics(8), knots=[{**knot, "tie_s": 0.5, "bytes_moved": 7} for knot in KNOTS], links=layers,
        evals=[{"step": 4, "link": 1, "loss": 2.75, "perplexity": 15.6}, {"step": 8, "link": 2, "loss": 2.5, "perplexity": 12.2}],
        watch=[{"step": 0, "loss": 3.0}, {"step": 4, "loss": 3.5}, {"step": 8, "loss": 3.25}],
        events=[{"event": "started", "step": 0, "time": "then", "world_size": 2}, {"event": "checkpoint", "step": 4},
                {"event": "resumed", "step": 4, "time": "later"}, {"event": "skipped", "step": 5, "examples": [1, 2]},
                {"event": "skipped", "step": 5}, {"event": "skipped", "step": 6}],
    )  # fmt: skip


def test_figures_are_the_rows_of_the_run(chain, tmp_path):
    metrics = draw_metrics(8)
    figures = {title: rows for title, (_, rows) in figures_of(page_of(chain, at=tmp_path / "x.html")).items()}
    steps = [str(row["step"]) for row in metrics]
    for title, key, unit in (
        ("Learning rate", "lr", 1), ("Gradient norm", "grad_norm", 1), ("Tokens per second", "tokens_per_s", 1),
        ("Seconds of a step", "step_s", 1), ("Memory (GiB)", "memory_bytes", 2**30), ("TFLOP/s of a device", "tflops", 1),
    ):  # fmt: skip
        assert figures[title][1:] == [[step, six(row[key] / unit)] for step, row in zip(steps, metrics, strict=True)]
    waiting = [[str(r["step"]), six(100 * r["data_wait_s"] / r["step_s"])] for r in metrics]
    assert figures["Waiting for examples (% of the time)"][1:] == waiting
    loss = [[str(r["step"]), six(r["loss"]), "-", "-"] for r in metrics]
    loss[3][2:], loss[7][2:] = ["2.75", "3.5"], ["2.5", "3.25"]
    assert figures["Loss (nats per token)"] == [
        ["step", "training", "held-out", "data.watch"], ["0", "-", "-", "3"], *loss
    ]  # fmt: skip
    assert figures["Norm of each link"][1:] == [["1", "1.5"], ["2", "0.5"]]
    assert figures["Rounding error at each knot (%)"][1:] == [["1", "1"], ["2", "-"]]
    assert figures["Effective rank"][1:] == [["1", "2", "2"], ["2", "3.25", "4.5"]]
    assert figures["Overlap with the sum before"][1:] == [["1", "-", "-"], ["2", "0.125", "0.75"]]
    assert figures["Singular values of each link (mean over layers)"][1:] == [["1", "4", "2"], ["2", "2", "-"]]
    assert figures["Singular values of the sum so far (mean over layers)"][1:] == [["1", "4", "4"], ["2", "2", "2"]]
    assert figures["Share of each link's row space in those before (mean over layers)"] == [
        ["link", "in 1", "in 2"], ["1", "-", "-"], ["2", "0.25", "-"]
    ]  # fmt: skip
    assert figures["Share of each link's column space in those before (mean over layers)"][2] == ["2", "0.75", "-"]


def test_what_stands_beside_the_figures(chain, tmp_path):
    tree = page_of(chain, at=tmp_path / "x.html")
    regions = {each.attributes.get("aria-label"): each for each in tree.all("div")}
    (head, row) = rows_of(regions["Runs"])
    shown = dict(zip(head, row, strict=True))
    assert (shown["run"], shown["state"], shown["steps"], shown["held-out"]) == ("chain", "finished", "8", "2.5000")
    assert (shown["restarts"], shown["skipped steps"], shown["links"]) == ("1", "2", "2")
    assert "checkpoint: 1; resumed: 1; skipped: 3; started: 1" in tree.text
    events = rows_of(regions["Events of chain"])
    assert events[1] == ["then", "started", "0", "world_size 2"]
    assert [row[1] for row in events[1:]] == ["started", "resumed", "skipped", "skipped", "skipped"]
    assert rows_of(regions["Evaluations of chain"])[1] == ["4", "1", "held-out", "2.75", "15.6", "-"]
    assert rows_of(regions["Links of chain"])[2][:4] == ["2", "8", "4", "0.5"]
    assert rows_of(regions["Knots of chain"])[1] == ["1", "4", "0.5", "7"]
    config = dict(map(tuple, rows_of(regions["Config"])))
    assert (config["lora.rank"], config["optim.lr"]) == ("8", "0.002")
    assert "run.dir" not in config


def places(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def axis(figure, name, place):
    """From a place on an axis to a value, by the axis's own labels."""
    found = [
        (float(text.attributes[place]), float(text.text.replace("k", "e3")))
        for text in figure.one("svg").all("text")
        if text.attributes["class"] == name and re.fullmatch(r"-?[\d.]+(e-?\d+)?k?", text.text)
    ]
    (one, low), (other, high) = found[0], found[-1]
    return lambda at: low + (at - one) / (other - one) * (high - low)


def test_lines_lie_where_their_values_are(chain, tmp_path):
    """As the axes' labels say, to half a pixel; dashed lines at the knots."""
    checked = 0
    for title, (figure, rows) in figures_of(page_of(chain, at=tmp_path / "x.html")).items():
        lines = [path for path in figure.one("svg").all("path") if path.attributes["class"].startswith("line ")]
        if title.startswith("Share"):
            continue
        x, y = axis(figure, "x", "x"), axis(figure, "y", "y")
        for column, line in enumerate(lines, 1):
            drawn = places(line.attributes["d"])
            values = [(float(row[0]), float(row[column])) for row in rows[1:] if row[column] != "-"]
            assert len(drawn) == len(values), title
            per_pixel = abs(x(1) - x(0)), abs(y(5) - y(0)) / 5
            for place, value in zip(drawn, values, strict=True):
                assert x(place[0]) == pytest.approx(value[0], abs=0.5 * per_pixel[0]), title
                assert y(place[1] + 4) == pytest.approx(value[1], abs=0.5 * per_pixel[1]), title
                checked += 1
        knots = [path for path in figure.one("svg").all("path") if path.attributes["class"] == "knot"]
        assert [round(x(at)) for at, _ in places("".join(k.attributes["d"] for k in knots))] == (
            [4] if rows[0][0] == "step" else []
        )
    assert checked > 60


def test_long_curves_keep_their_peaks(tmp_path):
    """The first, the last, and the least and greatest of each part: of 5,000 rows one is far above, one below, one is missing."""
    losses = [2.0 + math.sin(step / 50) for step in range(5000)]
    losses[1234], losses[2345], losses[3456] = 99.0, -99.0, math.nan
    kept = kept_places(losses, 400)
    assert {0, 1234, 2345, 4999} <= set(kept)
    assert len(kept) <= 400
    assert kept == sorted(kept)
    assert len(kept_places([math.nan] * 1000, 100)) <= 100
    gap = kept_places([1.0] * 1000 + [math.nan] * 1000 + [1.0] * 1000, 60)
    assert len(gap) <= 60 and any(1000 <= place < 2000 for place in gap)  # no line is drawn across
    assert kept_places([1.0, 2.0], 4) == [0, 1]
    rows = [{"step": at, "loss": None if math.isnan(loss) else loss} for at, loss in enumerate(losses)]
    figure, table = figures_of(page_of(save_run_of(tmp_path / "a", rows), at=tmp_path / "x.html"))[
        "Loss (nats per token)"
    ]
    assert re.search(r"Data: (\d+) of 5000 steps", figure.text)
    assert len(table) <= 401
    assert {("1234", "99"), ("2345", "-99")} <= {tuple(row) for row in table}
    for step, loss in table[1:]:
        assert loss == ("-" if int(step) == 3456 else six(losses[int(step)]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1, 1600), (4.31, 4.79), (-3e-9, 2e-9), (-1e299, 1e300), (0, 1e-200), (1e6, 1e6 + 3), (0.5, 99)]
)  # fmt: skip
def test_axes_have_round_numbers_that_differ(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low) for value in found)
    assert len(set(labels(found))) == len(found)


def test_a_gap_is_no_line(tmp_path):
    """Where a loss is not finite the line is broken, and a value alone is a dot."""
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([1.0, 2.0, None, 3.0, None, 4.0, 5.0], 1)]
    figure, table = figures_of(page_of(save_run_of(tmp_path / "a", rows), at=tmp_path / "x.html"))[
        "Loss (nats per token)"
    ]
    line = next(path for path in figure.all("path") if path.attributes["class"].startswith("line"))
    assert [len(places("M" + part)) for part in line.attributes["d"].split("M")[1:]] == [2, 1, 2]
    assert [row[1] for row in table[1:]] == ["1", "2", "-", "3", "-", "4", "5"]


def test_nor_are_damaged_rows(tmp_path):
    run = save_run_of(tmp_path / "a", draw_metrics(6))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:4] = [b"garbage\n", b"{}\n"]
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    figure, _ = figures_of(page_of(run, at=tmp_path / "x.html"))["Gradient norm"]
    line = next(path for path in figure.all("path") if path.attributes["class"].startswith("line"))
    assert [len(places("M" + part)) for part in line.attributes["d"].split("M")[1:]] == [2, 2]


# -- runs beside each other --------------------------------------------------------------------------------------------


def test_how_runs_differ(tmp_path):
    for number, options in enumerate((LORA, COLA)):
        save_result(tmp_path / f"r/{number}", 0.5, task=f"t{number}", losses=[2.0, 1.0 + number], **options)
    tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
    regions = {
        each.attributes.get("aria-label"): rows_of(each) for each in tree.all("div") if each.attributes.get("role")
    }
    assert regions["How the runs differ"] == [
        ["key", "0", "1"], ["method", "lora", "cola"], ["chain.length", "1", "2"]
    ]  # fmt: skip
    common = dict(map(tuple, regions["Config"]))
    assert common["optim.lr"] == "0.002"
    assert not {"method", "chain.length"} & common.keys()
    beside = next(rows for title, (_, rows) in figures_in(tree, "curves") if title == "Training loss (nats per token)")
    assert beside == [["step", "0", "1"], ["1", "2", "2"], ["2", "1", "2"]]
    for number in range(2, 9):
        save_result(tmp_path / f"r/{number}", 0.5, task=f"t{number}", seed=number, **LORA)
    tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
    regions = {
        each.attributes.get("aria-label"): rows_of(each) for each in tree.all("div") if each.attributes.get("role")
    }
    assert regions["How the runs differ"][:2] == [
        ["run", "method", "chain.length", "run.seed"],
        ["0", "lora", "1", "0"],
    ]
    assert len(regions["How the runs differ"]) == 10


def figures_in(tree, section):
    (node,) = (each for each in tree.all("section") if each.attributes["id"] == section)
    return figures_of(node).items()


def test_intervals_of_a_sweep(tmp_path):
    """60 to 64 points: mean 62, deviation sqrt(2.5), Student's t of 4 degrees 2.7764: 62 ± 2.7764 * sqrt(2.5 / 5)."""
    half = 2.776445 * math.sqrt(0.5)
    assert confidence_interval([60, 61, 62, 63, 64]) == pytest.approx((62 - half, 62 + half), abs=1e-5)
    assert confidence_interval([60.0]) is None
    for seed in range(5):
        save_result(tmp_path / f"r/l{seed}", (60 + seed) / 100, seed=seed, losses=[2.0 + seed, 1.0], **LORA)
    save_result(tmp_path / "r/c0", 0.7, **COLA)
    tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
    (section,) = (each for each in tree.all("section") if each.attributes["id"] == "sweep")
    assert rows_of(section) == [
        ["method", "chosen on dev", "seeds", "test score x 100, mean", "deviation", "95% from", "to"],
        ["cola-2", "-", "1 of 5", "70", "-", "-", "-"],
        ["lora", "-", "5 of 5", "62", six(statistics.stdev(range(5))), six(62 - half), six(62 + half)],
    ]
    x = axis(section, "x", "x")
    dots = [float(each.attributes["cx"]) for each in section.all("circle")]
    assert [x(at) for at in dots] == pytest.approx([70, 62], abs=0.05)
    line = [path for path in section.all("path") if path.attributes["class"] == "line c0"][1].attributes["d"]
    ends = [float(at) for at in re.fullmatch(r"M([\d.]+) \d+H([\d.]+)", line).groups()]
    assert [x(at) for at in ends] == pytest.approx([62 - half, 62 + half], abs=0.05)


def test_a_sweep_of_a_grid(tmp_path):
    """The search, the means of the seeds at the chosen point by step, and the runs that are there."""
    log = "cola-ds sweep: now\ncola-ds: <b>no</b> memory\ncola-ds sweep: exit status 3\n"
    save_sweep(tmp_path / "s", {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6, "lr=1/seed=1": 0.5, "lr=1/seed=2": log})
    for number, losses in enumerate(([4.0, 2.0], [2.0, 1.0])):
        write(
            tmp_path / f"s/cb/lora/lr=1/seed={number}/metrics.jsonl",
            [{"step": i, "loss": v} for i, v in enumerate(losses)],
        )
    tree = page_of(tmp_path / "s", at=tmp_path / "x.html")
    regions = {
        each.attributes.get("aria-label"): rows_of(each) for each in tree.all("div") if each.attributes.get("role")
    }
    assert [row[:2] for row in regions["Runs"][1:]] == [
        ["cb/lora/lr=1/seed=0", "finished"], ["cb/lora/lr=1/seed=1", "finished"], ["cb/lora/lr=1/seed=2", "failed"],
        ["cb/lora/lr=2/seed=0", "finished"],
    ]  # fmt: skip
    assert regions["The search on dev"][1:] == [
        ["cb-100", "lora", "lr=1", "1", "60.00", "chosen"], ["cb-100", "lora", "lr=2", "1", "40.00", ""]
    ]  # fmt: skip
    assert "status 3: <b>no</b> memory" in tree.text


# -- states ------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on(tmp_path):
    """And one that is stopped: they have no result, and a last row that is half written."""
    for name in ("on", "stopped"):
        folder = save_run_of(tmp_path / "r" / name, draw_metrics(8))
        (folder / "result.json").unlink()
        recorded(folder)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as rows:
            rows.write('{"step": 9, "lo')
    lock = RunLock(tmp_path / "r/on")
    lock.take()
    try:
        tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
        alone = page_of(tmp_path / "r/on", at=tmp_path / "y.html")
    finally:
        lock.release()
    (_, *rows) = rows_of(next(each for each in tree.all("div") if each.attributes.get("aria-label") == "Runs"))
    assert [row[:5] for row in rows] == [
        ["on", "running", "cola", "0 of 2", "8"],
        ["stopped", "stopped", "cola", "0 of 2", "8"],
    ]
    assert "damaged" not in tree.text
    assert len(figures_of(alone)["Loss (nats per token)"][1]) == 9


def test_every_knot_of_a_run_that_goes_on_is_drawn(tmp_path):
    """Of one that has finished all but the last, which is its end."""
    folder = save_run_of(tmp_path / "run", draw_metrics(8), knots=[{**KNOTS[0], "step": 3}, {**KNOTS[1], "step": 6}])
    for finished in (True, False):
        if not finished:
            (folder / "result.json").unlink()
            recorded(folder)
        figure, _ = figures_of(page_of(folder, at=tmp_path / f"{finished}.html"))["Loss (nats per token)"]
        (knots,) = [path for path in figure.one("svg").all("path") if path.attributes["class"] == "knot"]
        assert knots.attributes["d"].count("M") == (1 if finished else 2)


def test_a_run_whose_training_failed(tmp_path):
    """As its own log has it, of its last start: it is neither stopped nor without a reason."""
    why = "training failed: no update of link 1 could be applied: no gradient was finite"
    starts = ["== now: cola-ds train x.yaml", f"cola-ds: {why}"]
    for name, log in (("failed", starts), ("again", [*starts, "== later: cola-ds train x.yaml", "knot: link 1"])):
        folder = save_run_of(tmp_path / "r" / name, draw_metrics(8))
        (folder / "result.json").unlink()
        recorded(folder)
        (folder / "log.txt").write_text("\n".join(log) + "\n", encoding="utf-8")
    tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
    (_, *rows) = rows_of(next(each for each in tree.all("div") if each.attributes.get("aria-label") == "Runs"))
    assert [row[:2] for row in rows] == [["again", "stopped"], ["failed", "diverged"]]
    assert f"status 3: {why}" in tree.text


def test_what_has_no_links_and_what_has_a_task(tmp_path):
    """Evaluations without a link; and losses of candidates, which are no token's."""
    full = {"method": "full", "chain": {"length": 1}, "data": {"train": None, "task": "cb"}}
    save_result(tmp_path / "full", 0.5, losses=(2.0, 1.0), **full)
    write(tmp_path / "full/evals.jsonl", [{"step": 2, "link": 1, "split": "dev", "loss": 1.5}])
    tree = page_of(recorded(tmp_path / "full"), at=tmp_path / "x.html")
    assert "Loss (nats)" in figures_of(tree)
    regions = {each.attributes["aria-label"]: each for each in tree.all("div") if "aria-label" in each.attributes}
    assert rows_of(regions["Evaluations of full"])[1][:4] == ["2", "-", "dev", "1.5"]


def test_links_that_others_have_tied_before(chain, tmp_path):
    note = "test_run has 2 links before its own, which cola-ds export --upto counts, too."
    run = chain.rename(chain.with_name("test_run"))
    assert note not in page_of(run, at=tmp_path / "a.html").text
    marker = Marker.read(run)
    row = {"lora_rank": 2, "lora_alpha": 4.0, "layers": ["q"], "sha256": "0" * 64, "config_sha256": "0" * 64}
    marker.facts["earlier"] = [{"link": link, **row} for link in (1, 2)]
    marker.write()
    assert note in page_of(run, at=tmp_path / "b.html").text


FILES = ("metrics", "evals", "knots", "links", "watch", "events")


@pytest.mark.parametrize("name", FILES)
def test_damaged_rows_are_left_out_and_counted(chain, tmp_path, name):
    before = (chain / f"{name}.jsonl").read_bytes()
    garbage = [b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, b'{"step": "x"}', b'{"step": -1, "event": 3}', b""]
    (chain / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in garbage) + before)
    tree = page_of(chain, at=tmp_path / "x.html")
    assert f"{name}.jsonl: 7 damaged rows are left out; the first is row 1 (" in tree.text
    assert len(figures_of(tree)["Gradient norm"][1]) == 9
    (chain / f"{name}.jsonl").unlink()
    (chain / f"{name}.jsonl").mkdir()
    page_of(chain, at=tmp_path / "x.html")


HOSTILE_ROWS = [
    {"step": 2**53, "loss": 1e308, "lr": "much", "grad_norm": [1], "step_s": 0.0, "data_wait_s": 1.0, "memory_bytes": True},
    {"step": 0, "loss": -1e308, "lr": 5e-324, "grad_norm": 10**400, "step_s": -1, "tokens_per_s": {"a": 1}},
    {"step": 0, "loss": 0.0, "lr": 1e-300, "link": 2**53},
]  # fmt: skip


def test_rows_of_any_numbers(tmp_path):
    """Too large for a float, too small to tell apart, of other types, and links with numbers like 2^53."""
    layer = {**LAYER, "step": 1, "layer": "x", "singular_values": [1e308, None, -1e308], "row_overlaps": [1e300, None]}
    folder = save_run_of(
        tmp_path / "a", HOSTILE_ROWS, evals=[{"step": 1}, {"step": 2, "split": "dev", "score": 1e308, "metric": "m"}],
        knots=[{"link": 2**53, "step": 0, "lora_rank": 1, "delta_norm": 1e308},
               {"link": 0, "step": 2**53, "lora_rank": 1, "delta_norm": -1e308, "rounding_error": 1e308}],
        links=[{**layer, "link": 2**53}, {**layer, "link": 0}], watch=[{"step": 2**53}],
        events=[{"event": "x", "step": 2**53, "facts": {"deep": [[[1]]]}}],
    )  # fmt: skip
    tree = page_of(folder, at=tmp_path / "x.html")
    assert not re.search(r"\b(nan|inf)\b", "".join(path.attributes.get("d", "") for path in tree.all("path")))


@pytest.mark.parametrize("name", ["run.yaml", "result.json", "environment.json"])
def test_a_run_whose_files_are_damaged(chain, tmp_path, name):
    for content in (b"", b"\xff\xfe", b"[]", b"a: [\n", b"[" * 100_000):
        (chain / name).write_bytes(content)
        figures = figures_of(page_of(chain, at=tmp_path / "x.html"))
        assert len(figures["Gradient norm"][1]) == 9


# -- texts of anybody's ------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</svg></title></style><b>", "' onload='alert(1)", "&lt;i&gt;",
    "{{ 7 * 7 }}{% raw %}", "]]><!--", "`a` | **b** ~~c~~ [d](javascript:1)", "\u202etxt.exe\u200f", "\x1b[31mred\n<hr>",
]  # fmt: skip


def test_no_text_of_a_run_becomes_markup(tmp_path):
    """Names of folders, tasks, methods and metrics, values of the YAML, of rows and of the environment, and errors."""
    for number, text in enumerate(HOSTILE):
        folder = save_run_of(tmp_path / "r" / text.replace("/", "\u2215"), draw_metrics(3))
        config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        config["run"]["seed"], config["model"]["path"], config["data"]["prompt"] = number, text, text
        (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps({text: {text: [text]}}), encoding="utf-8")
        write(folder / "events.jsonl", [{"event": text, "time": text, text: {text: text}}])
        write(
            folder / "evals.jsonl", [{"step": 1, "split": text, "metric": text, "score": 0.5}, {"step": 1, text: "x"}]
        )
        write(folder / "knots.jsonl", [{**KNOTS[0], "ended_by": text}, {**KNOTS[1], "intruder_layers": 3}])
        recorded(folder)
        save_result(tmp_path / f"r/task{number}", 0.5, task=text, losses=[1.0], **LORA)
    (tmp_path / "r/<i>bad").mkdir()
    (tmp_path / "r/<i>bad/run.json").write_text("<script>", encoding="utf-8")
    tree = page_of(tmp_path / "r", at=tmp_path / "x.html")
    assert {node.tag for node in tree.all()} <= ALLOWED
    names = {name for node in tree.all() for name in node.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("style", "src", "srcset")}
    assert {node.attributes["href"][0] for node in tree.all() if "href" in node.attributes} == {"#", "d"}
    text = tree.text
    for each in HOSTILE[:8]:
        assert each in text
    assert not {"\u202e", "\u200f", "\x1b"} & set(text)


def test_a_policy_allows_nothing_but_the_page_s_own_style(chain, tmp_path):
    tree = page_of(chain, at=tmp_path / "x.html")
    policy = next(n.attributes["content"] for n in tree.all("meta") if n.attributes.get("http-equiv"))
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("style-src").startswith("'sha256-")
    assert allowed == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


# -- colours -----------------------------------------------------------------------------------------------------------


def colors(scheme):
    css = (REPOSITORY / "cola_ds/report/page/page.css").read_text(encoding="utf-8")
    return {name: pair[scheme] for name, *pair in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", css)}


def linear(color):
    """Red, green and blue of light, 0 to 1 (sRGB)."""
    values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def luminance(color):
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear(color), strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme):
    """Of texts and of curves with the page: 4.5, as WCAG asks of texts."""
    found = colors(scheme)
    assert len(found) == 12
    for name in found.keys() - {"page", "rule"}:
        low, high = sorted((luminance(found[name]), luminance(found["page"])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


SEEN = {  # Machado, Oliveira, Fernandes 2009, of severity 1
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(light):
    r, g, b = (min(max(value, 0), 1) for value in light)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("eye", SEEN)
def test_curves_are_told_apart_by_every_eye(scheme, eye):
    """CIE76: 2.3 is just seen; a line is thin, so ten times that."""
    found = colors(scheme)
    seen = [
        lab([sum(m * v for m, v in zip(row, linear(found[f"c{n}"]), strict=True)) for row in SEEN[eye]])
        for n in range(6)
    ]
    assert min(math.dist(one, other) for at, one in enumerate(seen) for other in seen[:at]) > 23


# -- the file ----------------------------------------------------------------------------------------------------------


def test_only_an_own_page_is_replaced(chain, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><p>holiday", encoding="utf-8")
    before = snapshot(tmp_path)
    for target in [
        mine,
        *(path for path in chain.rglob("*") if path.is_file()),
        chain,
        chain / "chain/x.html",
        tmp_path / "nul\0",
    ]:
        assert "--html" in said_in_one_line(capsys, "report", chain, "--html", target)
    assert snapshot(tmp_path) == before
    own = tmp_path / "own.html"
    for _ in range(2):
        page_of(chain, at=own)
    capsys.readouterr()
    own.write_text(own.read_text(encoding="utf-8").replace("<h1>", "<h1>My notes: "), encoding="utf-8")
    assert "a report's page, unchanged, is replaced" in said_in_one_line(capsys, "report", chain, "--html", own)


def test_a_sweep_of_two_hundred_is_a_few_megabytes(tmp_path):
    """Of 250 runs with 300 rows each 200 are on the page, and the page says so."""
    for number in range(250):
        save_result(tmp_path / f"r/{number:03}", 0.5, seed=number, **LORA)
        write(
            tmp_path / f"r/{number:03}/metrics.jsonl",
            [{k: v for k, v in row.items() if k in ("step", "loss", "lr")} for row in draw_metrics(300, number)],
        )
    at = tmp_path / "x.html"
    tree = page_of(tmp_path / "r", at=at)
    assert at.stat().st_size < 4 * 2**20
    assert len([each for each in tree.all("details") if each.attributes.get("class") == "run"]) == 200
    assert "50 more runs are not on this page" in tree.text
    assert not [
        each for each in tree.all("details") if each.attributes.get("class") == "run" and "open" in each.attributes
    ]
