"""chain.diagnostics and data.watch in whole runs: what the rows say, and that nothing else changes."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.report.report import report
from cola_ds.run.folder import RunDir
from cola_ds.run.peft_files import layers_of, lora_names, read_link
from tests.lora.test_spectra import dense, expected_intruders, expected_look
from tests.support.distributed import run_distributed
from tests.support.jobs import run_job
from tests.support.runs import record, run_once, three_links, train_in
from tests.support.toys import REPOSITORY, rows, save_model, save_run, save_sums

ZERO2 = str(REPOSITORY / "ds_configs/zero2.json")
ON = {"chain": {"diagnostics": True}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnostics")
    save_sums(folder / "watch.jsonl", 9, seed=2)
    return (
        save_model(folder / "model"),
        save_sums(folder / "train.jsonl", 50),
        save_sums(folder / "dev.jsonl", 12, seed=1),
    )


def watching(toy):
    return {"data": {"watch": str(toy[1].with_name("watch.jsonl"))}}


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    """A run without either: its weights, and what it leaves."""
    folder = tmp_path_factory.mktemp("plain")
    return train_in(folder, three_links(toy)), record(folder / "run")


@pytest.fixture(scope="module")
def looked_at(toy, tmp_path_factory):
    """The same run with both."""
    folder = tmp_path_factory.mktemp("looked-at")
    return train_in(folder, three_links(toy, **ON, **watching(toy))), folder / "run"


def without_figures(found):
    """A record without what both add to it."""
    added = {"effective_rank", "sum_effective_rank", "row_overlap", "column_overlap", "intruders", "intruder_layers"}
    knots = [{key: value for key, value in row.items() if key not in added} for row in found["knots.jsonl"]]
    return {key: value for key, value in found.items() if key not in ("links.jsonl", "watch.jsonl")} | {
        "knots.jsonl": knots
    }


@pytest.mark.core
def test_nothing_else_changes(plain, looked_at):
    weights, folder = looked_at
    assert weights == plain[0]
    assert without_figures(record(folder)) == plain[1]


def check_rows(run, model, lora_ranks, exact_base):
    """Every row of links.jsonl against whole matrices, from the saved links."""
    links = [
        read_link(run / f"chain/link-{link:04d}/adapter_model.safetensors") for link in range(1, len(lora_ranks) + 1)
    ]
    layers = layers_of(links[0])
    found = rows(run / "links.jsonl")
    assert [(row["link"], row["layer"]) for row in found] == [
        (link, n) for link in range(1, len(links) + 1) for n in layers
    ]
    base = load_file(model / "model.safetensors")
    for row in found:
        ranks, (A, B) = lora_ranks[: row["link"]], lora_names(row["layer"])
        held = links[: row["link"]]
        scalings = torch.cat([torch.full((r, 1), 8 / r, dtype=torch.float64) for r in ranks])
        whole = (torch.cat([link[A] for link in held]), torch.cat([link[B] for link in held], dim=1), scalings)
        deltas = dense(whole, ranks)
        seen = torch.tensor(
            [
                *row["singular_values"],
                *(row["sum_singular_values"] + [0.0] * sum(ranks))[: sum(ranks)],
                *(row["row_overlaps"] + ([row["row_overlap"]] if len(ranks) > 1 else [])),
                *(row["column_overlaps"] + ([row["column_overlap"]] if len(ranks) > 1 else [])),
            ]
        )
        torch.testing.assert_close(seen, expected_look(deltas, ranks).float(), rtol=1e-5, atol=1e-5)
        assert row["norm"] == pytest.approx(float(deltas[-1].norm()), rel=1e-5)
        assert row["sum_norm"] == pytest.approx(float(sum(deltas).norm()), rel=1e-5)
        assert (row["row_overlap"] is None) == (row["link"] == 1)
        if row["link"] == len(lora_ranks) and exact_base:
            start = base[f"{row['layer']}.weight"].double()
            assert row["intruders"] == expected_intruders(start + sum(deltas), start)
        assert ("intruders" in row) == (row["link"] == len(lora_ranks))


def test_rows_are_those_of_whole_matrices(toy, looked_at):
    """At two processes under ZeRO-3, with ranks [8, 4, 4]; and what knots.jsonl says are their means."""
    _, run = looked_at
    check_rows(run, toy[0], [8, 4, 4], exact_base=True)
    layers, knots = rows(run / "links.jsonl"), rows(run / "knots.jsonl")
    for knot in knots:
        of_link = [row for row in layers if row["link"] == knot["link"]]
        for key in (
            "effective_rank",
            "sum_effective_rank",
            *(("row_overlap", "column_overlap") if knot["link"] > 1 else ()),
        ):
            assert knot[key] == pytest.approx(sum(row[key] for row in of_link) / len(of_link))
        assert knot["delta_norm"] == pytest.approx(sum(row["norm"] ** 2 for row in of_link) ** 0.5)
    assert knots[0]["row_overlap"] is None
    assert (knots[-1]["intruders"], knots[-1]["intruder_layers"]) == (
        sum(row["intruders"] for row in of_link),
        len(of_link),
    )


def test_rows_at_one_process_with_a_factor(toy, tmp_path):
    """ZeRO-2, bf16, one rank; links that are tied with a factor are looked at as they were tied."""
    config = three_links(
        toy, model={"dtype": "bf16"}, lora={"rank": 4}, chain={"diagnostics": True, "merge_weight": 0.5}
    )
    train_in(tmp_path, {**config, "deepspeed": ZERO2}, world_size=1)
    knots, layers = rows(tmp_path / "run/knots.jsonl"), rows(tmp_path / "run/links.jsonl")
    for knot in knots:
        norms = [row["norm"] for row in layers if row["link"] == knot["link"]]
        assert knot["delta_norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5, rel=1e-6)
    assert knots[-1]["intruder_layers"] == len(norms)


def test_the_watch_is_kept(looked_at, plain):
    """Before the first step and after each knot, never taken for an evaluation."""
    found = rows(looked_at[1] / "watch.jsonl")
    assert [(row["step"], row["link"], row["examples"]) for row in found] == [
        (0, 1, 9),
        (4, 1, 9),
        (8, 2, 9),
        (12, 3, 9),
    ]
    assert len({row["loss"] for row in found}) == 4
    result = json.loads((looked_at[1] / "result.json").read_text(encoding="utf-8"))
    assert result["scores"]["examples"] == plain[1]["evals.jsonl"][-1]["examples"] == 12


@pytest.mark.parametrize(
    "stops",
    [
        [("step", 4), ("step", 1), ("evaluation", 1)],
        [("watch", 1), ("watch", 2), ("watch", 1)],
        [("step", 12), ("watch", 1)],
    ],
    ids=["around knots", "inside the watch", "at the end"],
)
def test_a_stopped_run_ends_with_the_same_rows(toy, looked_at, tmp_path, stops):
    weights, run = looked_at
    assert train_in(tmp_path, three_links(toy, **ON, **watching(toy)), stops=stops) == weights
    assert record(tmp_path / "run") == record(run)


def test_rows_behind_a_checkpoint_are_taken_back(toy, looked_at, tmp_path):
    """A run that had gone on past a knot, and goes back to a checkpoint before it."""
    weights, run = looked_at
    config = three_links(toy, **ON, **watching(toy), checkpoint={"keep": 2})
    train_in(tmp_path, config, stops=[("step", 3), ("step", 3)], end=False)
    assert len(rows(tmp_path / "run/watch.jsonl")) == 2
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    assert train_in(tmp_path, config) == weights
    assert record(tmp_path / "run") == record(run)


def test_another_world_size_has_the_rows_of_its_links(toy, tmp_path):
    train_in(tmp_path, three_links(toy, **ON), world_size=(2, 1), stops=[("step", 6)])
    check_rows(tmp_path / "run", toy[0], [8, 4, 4], exact_base=True)


def with_a_budget(process, path):
    """Of four weights of 1024, 512, 1024 and 512 elements."""
    from cola_ds.training import diagnostics

    diagnostics._ENTRIES = 2600
    return run_once(process, path)


def test_some_layers_are_decomposed(toy, looked_at, tmp_path):
    """Where all would be too many: rows and journal name them, and say of them what they said; nothing else changes."""
    config = three_links(toy, **ON, **watching(toy), run={"dir": str(tmp_path / "run")})
    found = run_distributed(with_a_budget, 2, save_run(tmp_path / "run.yaml", config))
    assert found == [looked_at[0]] * 2
    all_rows = [row for row in rows(looked_at[1] / "links.jsonl") if row["link"] == 3]
    some = [row for row in rows(tmp_path / "run/links.jsonl") if row["link"] == 3]
    assert [row["intruders"] for row in some] == [*(row["intruders"] for row in all_rows[:3]), None]
    (told,) = (row for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "intruder dimensions")
    assert (told["layers"], told["of_layers"]) == ([row["layer"] for row in some[:3]], 4)
    assert rows(tmp_path / "run/knots.jsonl")[-1]["intruder_layers"] == 3


def test_which_layers_are_decomposed():
    """As many as the budget has room for, of every kind and depth; large ones never."""
    from cola_ds.training.diagnostics import _ENTRIES, _decomposed

    kinds = {
        "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576),
        "down": (576, 1536), "head": (2048, 2048),
    }  # fmt: skip
    shapes = {f"{block}.{kind}": shape for block in range(30) for kind, shape in kinds.items()}
    chosen = _decomposed(shapes)
    assert chosen == [name for name in shapes if name in chosen]
    assert 0.9 * _ENTRIES < sum(math.prod(shapes[name]) for name in chosen) <= _ENTRIES
    assert {name.partition(".")[2] for name in chosen} == {*kinds} - {"head"}
    blocks = [int(name.partition(".")[0]) for name in chosen]
    assert all(any(third <= block < third + 10 for block in blocks) for third in (0, 10, 20))
    q_and_v = {name: shape for name, shape in shapes.items() if name.endswith((".q", ".v"))}
    assert _decomposed(q_and_v) == list(q_and_v)
    assert _decomposed({"a": (1024, 2**14), "b": (1024, 2**14), "c": (1024, 2**14 + 1)}) == ["a"]
    assert _decomposed({"a": (2048, 2048), "b": (1024, 2**18)}) == []


def without_memory(process, path):
    """Process 1 has none for fp64 copies of weights, and none for its second layer's spectra."""
    from cola_ds.training import diagnostics

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("none is left")

    if process.rank == 1:
        diagnostics._copied = out_of_memory
        look, calls = diagnostics.look, iter(range(100))
        diagnostics.look = lambda *facts: out_of_memory() if next(calls) == 1 else look(*facts)
    return run_once(process, path)


def test_what_one_process_cannot_find_is_left_out(toy, looked_at, tmp_path):
    """The run ends as it would have, the journal says what is missing, and the rest is there."""
    config = three_links(toy, **ON, **watching(toy), run={"dir": str(tmp_path / "run")})
    found = run_distributed(without_memory, 2, save_run(tmp_path / "run.yaml", config))
    assert found == [looked_at[0]] * 2
    told = [row for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "no figure"]
    layers = [row["layer"] for row in rows(tmp_path / "run/links.jsonl")][:4]
    assert [(row["process"], row["figure"], row["more"], row["reason"]) for row in told] == [
        (1, f"spectra of {layers[3]}", 0, "none is left"),
        (1, f"intruder dimensions of {layers[1]}", 1, "none is left"),
    ]
    expected = rows(looked_at[1] / "links.jsonl")
    lost = {"link": 1, "layer": layers[3]}
    for row, whole in zip(rows(tmp_path / "run/links.jsonl"), expected, strict=True):
        if {key: row[key] for key in lost} == lost:
            assert row["effective_rank"] is None
        elif row["link"] == 3 and row["layer"] in (layers[1], layers[3]):
            assert row == {**whole, "intruders": None}
        else:
            assert row == whole
    assert rows(tmp_path / "run/knots.jsonl")[-1]["intruder_layers"] == 2


def test_a_base_that_plain_merges_have_rounded_away_has_no_intruders(toy, tmp_path):
    config = three_links(toy, model={"dtype": "bf16"}, lora={"rank": 4}, chain={"diagnostics": True, "merge": "plain"})
    train_in(tmp_path, config, world_size=1)
    last = rows(tmp_path / "run/knots.jsonl")[-1]
    assert (last["intruders"], last["intruder_layers"]) == (None, 0) and last["effective_rank"] > 0
    assert [row["intruders"] for row in rows(tmp_path / "run/links.jsonl")[-4:]] == [None] * 4
    assert "| - |" in report([str(tmp_path / "run")])


def test_each_process_decomposes_one_at_a_time():
    from cola_ds.training.diagnostics import _rounds

    numbers = {name: number for number, name in enumerate("abcdefgh")}
    assert list(_rounds(list("abdefh"), numbers, 2)) == [["a", "b"], ["d", "e"], ["f"], ["h"]]
    assert list(_rounds(list("ac"), numbers, 1)) == [["a"], ["c"]]
    assert list(_rounds([], numbers, 2)) == []


def test_a_watch_that_is_added_under_way(toy, tmp_path):
    """Refused in a line; where it is allowed, the looks that are left are taken, and it is said which one is not."""
    train_in(tmp_path, three_links(toy), 1, stops=[("step", 6)], end=False)
    words = ["train", tmp_path / "run.yaml", f"data.watch={watching(toy)['data']['watch']}"]
    statuses, said = run_job(tmp_path / "job", words, world_size=1)
    assert statuses == [2], said
    assert "data.watch None -> " in said and "to go on in spite of it: --allow-change data.watch" in said
    statuses, said = run_job(tmp_path / "job", [*words, "--allow-change", "data.watch"], world_size=1)
    assert statuses == [0], said
    assert "data.watch was added under way: its loss before the first step is not known" in said
    assert [row["step"] for row in rows(tmp_path / "run/watch.jsonl")] == [8, 12]


def test_another_watch_under_way(toy, tmp_path):
    """What was looked at before is no start for it, and what it found is taken back where the first one goes on after all."""
    run, allowed = tmp_path / "run", {"allow_change": ("data.watch",)}
    config = three_links(toy, **watching(toy), checkpoint={"keep": 2})
    other = {**config, "data": {**config["data"], "watch": str(toy[2])}}
    train_in(tmp_path, config, 1, stops=[("step", 3)], end=False)
    shutil.copytree(tmp_path, tmp_path / "other")
    train_in(tmp_path, other, 1, stops=[("step", 3)], words=allowed, end=False)
    assert [(row["step"], row["examples"]) for row in rows(run / "watch.jsonl")] == [(0, 9), (4, 12)]
    path = save_run(tmp_path / "other.yaml", {**other, "run": {**other["run"], "dir": str(tmp_path / "other/run")}})
    words = ["train", path, "--allow-change", "data.watch"]
    statuses, said = run_job(tmp_path / "job", words, world_size=1)
    assert statuses == [0], said
    assert "data.watch was exchanged under way: its loss before the first step is not known" in said
    found = rows(tmp_path / "other/run/watch.jsonl")
    assert [(row["step"], row["examples"]) for row in found] == [(0, 9), (4, 12), (8, 12), (12, 12)]
    assert found[0]["data"] != found[1]["data"] == found[3]["data"]
    assert f"| {found[-1]['loss']:.4f} |" in report([str(tmp_path / "other/run")])  # no change since the start
    shutil.rmtree(run / "checkpoints/step-00000006")
    train_in(tmp_path, config, 1)
    assert [(row["step"], row["examples"]) for row in rows(run / "watch.jsonl")] == [(0, 9), (4, 9), (8, 9), (12, 9)]


def beats_of(process, path):
    """How often each process has told the watch that it goes on in its diagnostics."""
    from cola_ds.distributed import watchdog

    inner, beats = watchdog.heartbeat, []
    watchdog.heartbeat = lambda what, **facts: (beats.append(what), inner(what, **facts))[1]
    without_memory(process, path)
    return beats


def test_processes_tell_the_watch_alike(toy, tmp_path):
    """Of three layers one process minds two; the other cannot find a figure. The watch names who has told it least."""
    config = three_links(toy, **ON, run={"dir": str(tmp_path / "run")})
    config["lora"]["targets"] = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]
    first, second = run_distributed(beats_of, 2, save_run(tmp_path / "run.yaml", config))
    assert first == second and first.count("diagnostics") == 3 * 3 + 2


def test_a_look_behind_a_run_that_has_ended_early_is_finished(toy, tmp_path):
    """eval.patience ends it behind a knot without a checkpoint: what is asked to stop in the last look ends as it would have."""
    config = three_links(
        toy, **watching(toy), optim={"lr": 1e-30}, eval={"every": "link", "patience": 1}, chain={"length": 3}
    )
    weights = train_in(tmp_path / "whole", config)
    assert json.loads((tmp_path / "whole/run/result.json").read_text(encoding="utf-8"))["ended_early"]
    path = save_run(tmp_path / "run.yaml", {**config, "run": {**config["run"], "dir": str(tmp_path / "run")}})
    assert run_distributed(run_once, 2, path, ("watch", 3)) == [weights] * 2
    assert record(tmp_path / "run") == record(tmp_path / "whole/run")


def test_full_fine_tuning_is_watched(toy, tmp_path):
    """Before the first step and at the end; a report has a row of it."""
    config = three_links(toy, **watching(toy), method="full", chain={"length": 1}, lora={"rank": 8})
    train_in(tmp_path, config, 1)
    first, last = rows(tmp_path / "run/watch.jsonl")
    assert (first["step"], last["step"]) == (0, 12)
    text = report([str(tmp_path / "run")])
    assert f"| {last['loss']:.4f} ({last['loss'] - first['loss']:+.4f}) | - |" in text


def test_with_node_shards_too(toy, looked_at, tmp_path):
    """Two nodes of one process: the weights that are decomposed are gathered in a node."""
    weights, run = looked_at
    config = three_links(toy, **ON, **watching(toy), model={"shards": "node"})
    assert train_in(tmp_path, config, hosts=[("a", "b")]) == weights
    assert record(tmp_path / "run") == record(run)


def test_rows_are_read_back(looked_at):
    folder = RunDir(looked_at[1])
    assert folder.rows("links.jsonl") == rows(looked_at[1] / "links.jsonl")
    assert folder.row_counts() == {"metrics": 5, "evals": 2, "knots": 3, "links": 12, "watch": 4}
