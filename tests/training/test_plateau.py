"""Knots placed by the loss: where a written-out computation says, on any number of processes, through kill and resume, and with
the knots given the same bits."""

import json
import signal
from types import SimpleNamespace as Part

import pytest
import torch

from cola_ds.config.loading import apply_override, check_config, load_config
from cola_ds.config.steps import Epochs, StepPlan
from cola_ds.evaluation.evaluators import TaskScore
from cola_ds.training import plateau, state, validation
from tests.support.jobs import at_call, run_job
from tests.support.runs import record, three_links, train_in
from tests.support.toys import REPOSITORY, rows, save_run, thorough

ZERO2 = str(REPOSITORY / "ds_configs/zero2.json")


# -- the criterion, written out once more -------------------------------------------------------------------------------


def written_out(losses, window, share, patience, least, most, length):
    """The knots before the last, from the loss of every step."""
    knots, begin, total = [], 0, len(losses)
    while len(knots) < length - 1:
        means, knot = [], None
        for step in range(begin + 1, total + 1):
            if (step - begin) % window == 0:
                within = [loss for loss in losses[step - window : step] if loss is not None]
                means += [sum(within) / len(within)] if within else []
                last = range(len(means) - patience, len(means))
                flat = last[0] > 0 and all(means[i] >= (1 - share) * min(means[:i]) for i in last)
                if flat and step - begin >= least and total - step >= least:
                    knot = step
                    break
            if most and step - begin == most and total - step >= least:
                knot = step
                break
        if knot is None:
            break
        knots.append(knot)
        begin = knot
    return knots


# -- without a model ----------------------------------------------------------------------------------------------------


def fake_chain(keys, total, length, **options):
    """A chain that takes losses, and has no engine."""
    overrides = [f"chain.length={length}", "data.eval=e", *(f"{key}={value}" for key, value in options.items())]
    run = {
        "model": {"path": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}, "optim": {"lr": 1.0, "max_steps": total},
        "chain": {"knots": {"plateau": keys}},
    }  # fmt: skip
    config = check_config(run, overrides, "run.yaml")
    told = []
    plan = StepPlan(
        epochs=Epochs(9, 9), global_batch_size=9, total_steps=total, knots=(total,), micro_steps=1,
        least_steps=keys.get("least_steps") or keys.get("window", 1),
    )  # fmt: skip
    return Part(
        config=config, state=state.ChainState(), step_plan=plan.deciding(config.chain, []), told=told, held_out=True,
        folder=None, links=length, is_scored=False,
        logger=Part(say=lambda line: told.append(line), event=lambda what, **facts: told.append(facts),
                    stop_clock=lambda: None, evaluation=lambda where, found: told.append(found)),
    )  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(plateau.collectives, "all_reduce_sum", lambda loss: loss)


def run_steps(chain, curve):
    """Take `curve(step, step_in_link)`, None where it is not finite, of every step, as the loop does. Returns all losses."""
    now, losses = chain.state, []
    while now.step < chain.step_plan.total_steps:
        while now.step < chain.step_plan.knots[now.link - 1]:
            losses.append(curve(now.step, now.step_in_link))
            now.step, now.step_in_link = now.step + 1, now.step_in_link + 1
            bad = losses[-1] is None
            plateau.take_step_loss(chain, torch.tensor(float("nan") if bad else losses[-1]).double(), bad)
        now.link, now.step_in_link = now.link + 1, 0
        plateau.begin_losses(chain)
    return losses


CURVES = {
    "flattens": lambda step, age: 2.0 + 2.0 ** -(age / 3) + 0.001 * (step % 2),
    "flattens earlier in each link": lambda step, age: 2.0 + 2.0 ** -((age + step / 4) / 3),
    "falls for ever": lambda step, age: 4.0 * 0.99**step,
    "rises": lambda step, age: 1.0 + step,
    "is not finite now and then": lambda step, age: None if step % 7 < 4 else 2.0 + 2.0 ** -(age / 3),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    "keys", [{}, {"least_steps": 23}, {"most_steps": 13}, {"least_steps": 9, "most_steps": 17}], ids=str
)
def test_knots_fall_where_the_written_out_computation_says(alone, curve, keys):
    given = {"window": 3, "patience": 2, "min_improvement": 0.01, **keys}
    chain = fake_chain(given, total=100, length=5)
    losses = run_steps(chain, CURVES[curve])
    least, most = keys.get("least_steps", 3), keys.get("most_steps")
    expected = written_out(losses, 3, 0.01, 2, least, most, 5)
    assert chain.state.decided == expected == list(chain.step_plan.knots[:-1])
    assert chain.step_plan.knots[-1] == 100
    if most is None:
        assert bool(expected) == (curve != "falls for ever")


def test_links_that_most_steps_ends_are_in_the_plan_beforehand(alone):
    chain = fake_chain({"window": 3, "most_steps": 10}, total=40, length=4)
    assert chain.step_plan.knots == (10, 20, 30, 40)
    run_steps(chain, lambda step, age: 2.0 if step < 20 else 4.0 * 0.9**age)
    assert chain.step_plan.knots == (9, 18, 28, 40)  # the third has its flat beginning, and then falls
    assert [row["ended_by"] for row in chain.told if isinstance(row, dict)] == ["plateau", "plateau", "most_steps"]


def test_the_journal_has_the_figures(alone):
    chain = fake_chain({"window": 2, "patience": 2}, total=40, length=2)
    run_steps(chain, lambda step, age: [4.0, 2.0, 2.0, 2.0, 2.5, 2.5][min(age, 5)])
    row, line = chain.told
    assert row == {
        "link": 1, "step": 8, "ended_by": "plateau", "loss": "train", "losses": [3.0, 2.0, 2.5, 2.5], "best": 2.0,
        "threshold": 1.98,
    }  # fmt: skip
    assert line == (
        "link 1 ends at step 8: train loss 2.5000, loss 2.5000; the last had to be better than loss 1.9800 (chain.knots)"
    )


def test_a_window_without_a_finite_loss_says_nothing(alone):
    chain = fake_chain({"window": 2, "patience": 1}, total=40, length=2)
    run_steps(chain, lambda step, age: None if age in (2, 3, 4) else max(3.0, 4.0 - age / 8))
    assert chain.told[0]["losses"] == [3.9375, 3.375, 3.1875, 3.0, 3.0]


def test_evaluations_of_a_task_decide_by_its_dev_score(monkeypatch):
    """0.5, 0.6, 0.6: no better, and the link ends; neither is that evaluation logged, nor test scored for it."""
    scores = iter([0.5, 0.6, 0.6])
    scored = []

    def score(chain, split):
        scored.append(split)
        value = next(scores) if split == "dev" else 0.4
        return TaskScore(split=split, metric="accuracy", score=value, examples=10, seconds=0.0)

    monkeypatch.setattr(validation, "_score", score)
    chain = fake_chain({"loss": "held_out", "patience": 1}, total=40, length=2, **{"eval.every": 2})
    chain.is_scored = True
    chain.config = chain.config.model_copy(
        update={"checkpoint": chain.config.checkpoint.model_copy(update={"best": False})}
    )
    for step in (2, 4, 6):
        chain.state.step = chain.state.step_in_link = step
        validation.evaluate_if_due(chain)
    assert scored == ["dev", "test", "dev", "test", "dev"]
    assert (chain.step_plan.knots, chain.state.evaluated_step, chain.state.no_better) == ((6, 40), 4, 0)
    logged = [found.score for found in chain.told if isinstance(found, TaskScore)]
    assert logged == [0.5, 0.4, 0.6, 0.4]
    assert chain.told[-1].startswith("link 1 ends at step 6: held-out 60.00; the last had to be better than 60.60")


# -- whole runs ---------------------------------------------------------------------------------------------------------

KNOTS = {"window": 2, "patience": 1, "min_improvement": 0.01}


def by_loss(toy, micro_batch_size=8, **sections):
    """Sixteen steps, whose training loss flattens in each of up to four links; a checkpoint in every other window."""
    options = {
        "lora": {"rank": [8, 4, 4, 2], "dropout": 0.0},
        "chain": {"length": 4, "knots": {"plateau": KNOTS}},
        "optim": {"max_steps": 16, "lr": 3e-2, "micro_batch_size": micro_batch_size},
        "eval": {"every": 8},
        "checkpoint": {"every_steps": 3},
        "run": {"log_every_steps": 1},
    }
    for name, values in sections.items():
        options[name] = {**options.get(name, {}), **values} if isinstance(values, dict) else values
    return three_links(toy, **options)


def of_several(toy):
    """ZeRO-3 in fp32, for up to four processes: the held-out loss places the knots."""
    knots = {"plateau": {"loss": "held_out", "patience": 1, "min_improvement": 0.01}}
    return by_loss(toy, micro_batch_size=2, chain={"knots": knots}, eval={"every": 2})


def held_out(toy):
    knots = {"plateau": {"loss": "held_out", "patience": 1, "min_improvement": 0.01}}
    return by_loss(toy, model={"dtype": "bf16"}, deepspeed=ZERO2, chain={"knots": knots}, eval={"every": 2})


def test_what_is_known_beforehand_is_said(toy, tmp_path):
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    path = save_run(
        tmp_path / "run.yaml", by_loss(toy, chain={"length": 4, "knots": {"plateau": {**KNOTS, "most_steps": 5}}})
    )
    said = summarize(prepare(load_config(path), 1), 1).splitlines()
    assert [line for line in said if line.startswith(("plateau", "link"))] == [
        "plateau     a link ends where the mean training loss of 2 steps has once not improved by 1% of its best; at least 2 "
        "steps, at most 5; the last ends with the run",
        "link 1      at most 5 steps, LoRA rank 8, 1,792 trainable parameters",
        "link 2      at most 5 steps, LoRA rank 4, 896 trainable parameters",
        "link 3      at most 5 steps, LoRA rank 4, 896 trainable parameters",
        "link 4      at most 4 steps, LoRA rank 2, 448 trainable parameters",
    ]


@pytest.mark.parametrize(("least", "warned"), [(8, 0), (9, 1)])
def test_a_loss_that_can_end_no_link_is_said(toy, tmp_path, least, warned):
    """Of sixteen steps: two links of eight, or one."""
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    chain = {"length": 4, "knots": {"plateau": {**KNOTS, "least_steps": least}}}
    path = save_run(tmp_path / "run.yaml", by_loss(toy, chain=chain, lora={"rank": 8}))
    said = summarize(prepare(load_config(path), 1), 1)
    assert said.count("warning     the loss cannot end a link in 16 steps, of which each link has 9 at least") == warned
    assert said.count("\nlink ") == 2 - warned


def test_room_is_asked_for_links_that_can_begin(toy, tmp_path):
    """Sixteen steps have room for four links of four steps at least: two windows of two."""
    from cola_ds.training.prepare import prepare
    from cola_ds.training.start import _space_needed

    def needed(length):
        chain = {"length": length, "knots": {"plateau": KNOTS}}
        path = save_run(tmp_path / "run.yaml", by_loss(toy, chain=chain, lora={"rank": 8}))
        return _space_needed(prepare(load_config(path), 1), 1)

    assert needed(3) < needed(4) == needed(400)


def test_switches_of_links_that_the_loss_ends_are_said(toy, tmp_path):
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    chain = {"merge_weight": [1, 0.5], "optimizer_at_knot": {"prune": 0.9}, "length": 2}
    sections = {"lora": {"rank": 8, "train": "B"}, "chain": {**chain, "knots": {"plateau": KNOTS}}}
    said = summarize(prepare(load_config(save_run(tmp_path / "run.yaml", by_loss(toy, **sections))), 1), 1).splitlines()
    assert "switches    lora.train B, chain.merge_weight [1.0, 0.5], chain.optimizer_at_knot {prune: 0.9}" in said
    assert "link 1      at most 16 steps, LoRA rank 8, B alone, 768 trainable parameters" in said


def replayed(config, run):
    """The run's config with its knots given, as its result says."""
    again = json.loads(json.dumps(config))
    for word in json.loads((run / "result.json").read_text(encoding="utf-8"))["replay"]:
        apply_override(again, word)
    return again


def learnt(run):
    """The record of a run, but for what knots.jsonl says of a link that the loss has ended."""
    found = record(run)
    for row in found["knots.jsonl"]:
        row.pop("ended_by", None), row.pop("losses", None)
    return found


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The run that was never stopped, alone: its weights and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train_in(folder, by_loss(toy), 1), folder / "run"


@pytest.fixture(scope="module")
def whole_held_out(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    return train_in(folder, held_out(toy), 1), folder / "run"


def test_a_run_places_its_knots(whole):
    _, run = whole
    losses = [row["loss"] for row in rows(run / "metrics.jsonl")]
    expected = written_out(losses, window=2, share=0.01, patience=1, least=2, most=None, length=4)
    knots = rows(run / "knots.jsonl")
    assert [row["step"] for row in knots] == [*expected, 16]
    assert len(expected) > 1
    assert [row["lora_rank"] for row in knots] == [8, 4, 4, 2][: len(knots)]
    assert [row["ended_by"] for row in knots] == ["plateau"] * len(expected) + ["end of run"]
    told = [row for row in rows(run / "events.jsonl") if row["event"] == "plateau"]
    assert [(row["link"], row["step"]) for row in told] == list(enumerate(expected, start=1))
    begin = 0
    for row in told:
        means = [(losses[i] + losses[i + 1]) / 2 for i in range(begin, row["step"], 2)]
        assert row["losses"] == means
        assert row["best"] == min(means[:-1])
        assert row["threshold"] == pytest.approx(0.99 * row["best"], rel=1e-15)
        assert means[-1] >= row["threshold"]
        begin = row["step"]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert (result["knots"], result["links"]) == ([*expected, 16], len(expected) + 1)


@pytest.fixture(scope="module")
def given(toy, whole, tmp_path_factory):
    """The run with the knots of `whole` given, and a row every five steps and at knots."""
    folder = tmp_path_factory.mktemp("given")
    config = replayed(by_loss(toy, run={"log_every_steps": 5}), whole[1])
    assert set(config["chain"]["knots"]) == {"steps"}
    return train_in(folder, config, 1), folder / "run"


def test_with_its_knots_given_a_run_has_the_same_bits(whole, given):
    assert given[0] == whole[0]
    found, expected = learnt(given[1]), learnt(whole[1])
    losses = {row["step"]: row["loss"] for row in found.pop("metrics.jsonl")}
    assert sorted(losses) == sorted({5, 10, 15, *(row["step"] for row in found["knots.jsonl"])})
    assert losses[16] == expected.pop("metrics.jsonl")[15]["loss"]  # the row before is of step 15
    assert found == expected


def test_a_replay_has_the_values_of_each_link(toy, tmp_path):
    """Of a chain that might have had six links: what is trained, and the ties' factors, are those of the links there were."""
    by_link = {"lora": {"rank": 4, "train": ["B", "A", "both", "B", "A", "A"]}}
    chain = {"length": 6, "knots": {"plateau": KNOTS}, "merge_weight": [0.5, 1.0, 0.25, 0.75, 1.0, 0.3]}
    config = by_loss(toy, **by_link, chain=chain)
    weights = train_in(tmp_path, config, 1)
    again = replayed(config, tmp_path / "run")
    links = again["chain"]["length"]
    assert 1 < links < 6
    assert again["lora"]["train"] == by_link["lora"]["train"][:links]
    assert again["chain"]["merge_weight"] == chain["merge_weight"][:links]
    assert train_in(tmp_path / "again", again, 1) == weights
    assert learnt(tmp_path / "again/run") == learnt(tmp_path / "run")


def test_stopped_before_at_and_after_a_decision(toy, whole, given, tmp_path):
    """After step 5, in a window; after step 6, where the link is to end; after step 8, where the next link's first window ends.
    What it logs is what the run with its knots given logs."""
    weights, run = given
    assert rows(run / "knots.jsonl")[0]["step"] == 6
    config = by_loss(toy, run={"log_every_steps": 5})
    assert train_in(tmp_path, config, 1, stops=[("step", 5), ("step", 1), ("step", 2)]) == weights
    assert learnt(tmp_path / "run") == learnt(run)
    decided, expected = (rows(each / "knots.jsonl") for each in (tmp_path / "run", whole[1]))
    assert [(row["ended_by"], row["losses"]) for row in decided] == [(r["ended_by"], r["losses"]) for r in expected]


def test_killed_before_at_and_after_a_decision(toy, whole, tmp_path):
    """In step 6, to go on from step 3; between the decision and the tie; in step 8, to go on from the decision."""
    _, run = whole
    path = save_run(tmp_path / "run.yaml", by_loss(toy, run={"dir": str(tmp_path / "run")}))
    for module, name, number in (("loop", "train_step", 6), ("knot", "tie_knot", 1), ("loop", "train_step", 2)):
        sabotage = ((0,), f"cola_ds.training.{module}", name, number, signal.SIGKILL)
        statuses, text = run_job(tmp_path / "job", ["train", path], world_size=1, sabotage=at_call, arguments=sabotage)
        assert statuses == [-signal.SIGKILL], text
    statuses, text = run_job(tmp_path / "job", ["train", path], world_size=1)
    assert statuses == [0], text
    assert "going on from step 6, in link 1" in text
    assert "values throughout): chain.length=4 'chain.knots={steps: [6, " in text
    assert record(tmp_path / "run") == record(run)


@pytest.mark.parametrize("world_size", thorough([4], [2]))
def test_processes_agree(toy, whole, tmp_path, world_size):
    train_in(tmp_path, by_loss(toy, micro_batch_size=2), world_size)
    expected, found = record(whole[1]), record(tmp_path / "run")
    for name, keys in (("metrics.jsonl", ("loss", "grad_norm")), ("knots.jsonl", ("delta_norm",))):
        for a, b in zip(found[name], expected[name], strict=True):
            assert (a["step"], a["link"]) == (b["step"], b["link"])
            assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-5)
    for a, b in zip(found["knots.jsonl"], expected["knots.jsonl"], strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)


def test_held_out_losses_place_knots(whole_held_out):
    _, run = whole_held_out
    knots, evaluations = rows(run / "knots.jsonl"), rows(run / "evals.jsonl")
    assert [row["step"] for row in evaluations] == [
        2,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
    ]  # one after each knot, and no other there
    begin = 0
    for row in knots[:-1]:
        assert row["ended_by"] == "plateau"
        within = [found["loss"] for found in evaluations if begin < found["step"] < row["step"]]
        assert row["losses"][:-1] == within
        assert [i for i in range(1, len(row["losses"])) if row["losses"][i] >= 0.99 * min(row["losses"][:i])] == [
            len(within)
        ]
        (merged,) = [found["loss"] for found in evaluations if found["step"] == row["step"]]
        assert row["losses"][-1] == pytest.approx(merged, rel=1e-2)
        begin = row["step"]
    assert len(knots) > 2


def test_with_knots_of_held_out_losses_given_a_run_has_the_same_bits(toy, whole_held_out, tmp_path):
    """Its evaluations, too."""
    weights, run = whole_held_out
    assert train_in(tmp_path, replayed(held_out(toy), run), 1) == weights
    assert learnt(tmp_path / "run") == learnt(run)


def test_stopped_in_the_evaluation_that_decides(toy, whole_held_out, tmp_path):
    weights, run = whole_held_out
    number = len(rows(run / "knots.jsonl")[0]["losses"])
    assert train_in(tmp_path, held_out(toy), 1, stops=[("evaluation", number), ("evaluation", 2)]) == weights
    assert record(tmp_path / "run") == record(run)


@pytest.fixture(scope="module")
def of_two(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("of-two")
    return train_in(folder, of_several(toy), 2), folder / "run"


@pytest.mark.parametrize("world_size", thorough([1], [4]))
def test_processes_agree_on_held_out_losses(toy, of_two, tmp_path, world_size):
    train_in(tmp_path, of_several(toy), world_size)
    found, expected = (rows(run / "knots.jsonl") for run in (tmp_path / "run", of_two[1]))
    assert [row["step"] for row in found] == [row["step"] for row in expected] and len(found) > 2
    for a, b in zip(found, expected, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)


def test_two_processes_stopped_in_the_evaluation_that_decides(toy, of_two, tmp_path):
    weights, run = of_two
    number = len(rows(run / "knots.jsonl")[0]["losses"])
    assert train_in(tmp_path, of_several(toy), 2, stops=[("evaluation", number), ("evaluation", 2)]) == weights
    assert record(tmp_path / "run") == record(run)


def test_one_of_two_processes_is_killed_after_the_decision(toy, of_two, tmp_path):
    """Before the tie, whose figures process 0 waits for."""
    path = save_run(
        tmp_path / "run.yaml", {**(config := of_several(toy)), "run": {**config["run"], "dir": str(tmp_path / "run")}}
    )
    sabotage = ((1,), "cola_ds.training.knot", "tie_knot", 1, signal.SIGKILL)
    statuses, text = run_job(tmp_path / "job", ["train", path], world_size=2, sabotage=at_call, arguments=sabotage)
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0, text
    statuses, text = run_job(tmp_path / "job", ["train", path], world_size=2)
    assert statuses == [0, 0], text
    assert record(tmp_path / "run") == record(of_two[1])


def test_patience_may_end_a_run_at_a_knot_of_the_loss(toy, tmp_path):
    """Nothing is learnt: links end at steps 4 and 8, and the third evaluation without a new best, at step 8, ends the run."""
    knots = {"plateau": {"loss": "held_out", "patience": 1}}
    config = by_loss(toy, optim={"lr": 1e-30}, chain={"knots": knots}, eval={"every": 2, "patience": 3})
    weights = train_in(tmp_path, config, 1)
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert (result["ended_early"], result["steps"], result["links"], result["knots"]) == (True, 8, 2, [4, 8])
    assert result["replay"] == ["chain.length=3", "chain.knots={steps: [4, 8]}", "lora.rank=[8, 4, 4]"]
    assert train_in(tmp_path / "again", replayed(config, tmp_path / "run"), 1) == weights
    assert learnt(tmp_path / "again/run") == learnt(tmp_path / "run")
    # Killed just before its end, it ends where it did.
    before = record(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    assert train_in(tmp_path, config, 1) == weights
    assert record(tmp_path / "run") == before
