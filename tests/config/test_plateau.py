"""Knots placed by the loss: the keys, the criterion, and what is known of the knots beforehand."""

import pytest
import yaml

from cola_ds.config.keys import flat_keys
from cola_ds.config.loading import check_config, load_config
from cola_ds.config.plateau import PlateauConfig, describe, is_flat, known_knots, longest_links, replay_words
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import resolve, with_longest_chain
from cola_ds.errors import UserError

RUN = {
    "model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "run": {"dir": "r"}, "chain": {"length": 3},
    "optim": {"lr": 1.0, "max_steps": 100},
}  # fmt: skip


def run(*overrides, **plateau):
    return check_config({**RUN, "chain": {"length": 3, "knots": {"plateau": plateau}}}, list(overrides), "run.yaml")


@pytest.mark.parametrize(
    ("losses", "patience", "flat_from"),
    [
        ([4.0, 3.0, 2.0, 1.98, 1.97], 2, 5),  # the fourth is 1% below the third, and that is not below
        ([4.0, 3.0, 2.0, 1.98, 1.97], 1, 4),
        ([4.0, 3.0, 2.0, 1.97, 1.95, 1.94], 2, None),  # 1.97 is below 1.98, then 1.95 below 1.9503; 1.94 alone is flat
        ([4.0, 5.0, 3.9, 3.9, 4.1], 2, 5),  # one that improves begins the count anew
        ([4.0, 3.99, 3.98], 2, 3),  # each is compared with the lowest before it, not with the last that improved
        ([0.0, 0.0], 1, 2),
        ([-0.5, -0.504, -0.51, -0.51], 2, None),  # scores: 0.505 is wanted, and found; then 0.5151
        ([-0.5, -0.504, -0.505], 2, 3),
        ([1.0], 1, None),
    ],
)
def test_where_a_link_is_flat(losses, patience, flat_from):
    plateau = PlateauConfig(patience=patience)
    flat = [number for number in range(1, len(losses) + 1) if is_flat(losses[:number], plateau)]
    assert (flat[:1] or [None]) == [flat_from]


def test_any_improvement_counts_where_none_is_asked_for():
    plateau = PlateauConfig(min_improvement=0.0, patience=1)
    assert not is_flat([1.0, 0.9999], plateau)
    assert is_flat([1.0, 1.0], plateau)


@pytest.mark.parametrize(
    ("decided", "most", "length", "total", "expected"),
    [
        ((), None, 4, 100, (100,)),
        ((13,), None, 4, 100, (13, 100)),
        ((), 30, 4, 100, (30, 60, 90, 100)),
        ((), 30, 4, 99, (30, 60, 99)),  # nine would be left, and a link has ten
        ((13,), 30, 4, 100, (13, 43, 73, 100)),
        ((13, 26, 39), 30, 4, 100, (13, 26, 39, 100)),
        ((13, 26), 30, 2, 100, (13, 100)),  # a chain that was allowed to become shorter
        ((), 30, 1, 100, (100,)),
    ],
)
def test_known_knots(decided, most, length, total, expected):
    assert known_knots(decided, PlateauConfig(window=10, most_steps=most), 10, length, total) == expected


@pytest.mark.parametrize(
    ("keys", "least", "length", "total", "expected"),
    [
        ({"window": 10, "patience": 2}, 10, 3, 100, [100, 70, 40]),
        ({"window": 10, "patience": 2, "least_steps": 35}, 35, 3, 100, [100, 60]),  # the third cannot begin by step 65
        ({"window": 10, "patience": 2, "most_steps": 25}, 10, 3, 100, [25, 25, 50]),
        ({"window": 10}, 10, 3, 25, [25]),
        ({"window": 10}, 10, 1, 100, [100]),
    ],
)
def test_longest_links(keys, least, length, total, expected):
    assert longest_links(PlateauConfig(**keys), least, length, total) == expected


@pytest.mark.parametrize(
    ("keys", "least", "total", "expected"),
    [
        ({"patience": 2}, 10, 100, [100, 70, 40]),  # the first evaluation of a link has improved, the third may end it
        ({"patience": 1}, 10, 100, [100, 80, 60]),
        ({"patience": 1}, 25, 100, [100, 70, 40]),  # the first evaluation after 25 steps
        ({"patience": 2, "most_steps": 20}, 10, 100, [20, 20, 60]),
        (
            {"patience": 1, "most_steps": 35},
            10,
            100,
            [35, 35, 78],
        ),  # the second may be evaluated after 5 steps, and after 15
        ({"patience": 2}, 10, 30, [30]),
    ],
)
def test_the_longest_links_of_held_out_loss(keys, least, total, expected):
    """With an evaluation every ten steps."""
    assert longest_links(PlateauConfig(loss="held_out", **keys), least, 3, total, 10) == expected


def test_the_criterion_in_a_sentence():
    plateau = PlateauConfig(window=5, min_improvement=0.005, most_steps=40)
    assert describe(plateau, 5, is_scored=False) == (
        "a link ends where the mean training loss of 5 steps has 2 times in a row not improved by 0.5% of its best; at least 5 "
        "steps, at most 40; the last ends with the run"
    )
    plateau = PlateauConfig(loss="held_out", patience=1, min_improvement=0.0)
    assert "where the held-out loss has once not improved at all; at least 7 steps; the" in describe(plateau, 7, False)
    assert "where the dev score has once" in describe(plateau, 7, is_scored=True)


def test_the_words_of_a_replay():
    assert replay_words([4, 9], {"lora.rank": 8}) == ["chain.length=3", "chain.knots={steps: [4, 9]}"]
    assert replay_words([], {}) == ["chain.length=1", "chain.knots=even", "chain.optimizer_at_knot=reset"]
    lists = {"lora.rank": [8, 4, 2], "chain.merge_weight": [1.0, 0.5, 0.25]}
    assert replay_words([4], lists)[1:] == [
        "chain.knots={steps: [4]}",
        "lora.rank=[8, 4]",
        "chain.merge_weight=[1.0, 0.5]",
    ]


def test_the_longest_chain_has_the_links_that_can_begin():
    """Of 100 steps, links of 30 at least; the fourth has 10 left."""
    lists = ["lora.rank=[8, 4, 4, 2, 64]", "lora.train=[B, B, A, A, both]", "chain.merge_weight=[1, 1, 1, 0.5, 0.25]"]
    found = run("chain.length=5", *lists, window=10)
    longest = with_longest_chain(found, 10, 100)
    assert (longest.chain.length, longest.lora_ranks) == (4, [8, 4, 4, 2])
    assert (longest.lora_trains, longest.tied_weights) == (["B", "B", "A", "A"], [1, 1, 1, 0.5])
    assert (found.chain.length, len(found.lora_ranks)) == (5, 5)
    assert with_longest_chain(found, 10, 1000) == found
    given = run("chain.length=5", "chain.knots=even")
    assert with_longest_chain(given, 10, 100) is given


def test_a_replay_is_a_config():
    found = run("lora.rank=[8, 4, 2]", *replay_words([4], {"lora.rank": [8, 4, 2]}))
    assert (found.chain.knots, found.chain.plateau, found.lora_ranks) == ({"steps": [4]}, None, [8, 4])


@pytest.mark.parametrize(
    ("plateau", "overrides", "expected"),
    [
        ({"window": 0}, [], r"chain.knots plateau.window must be greater than or equal to 1; it is"),
        ({"window": 2.5}, [], r"plateau.window must be a valid integer"),
        ({"patience": 0}, [], r"plateau.patience must be greater"),
        ({"min_improvement": 1.0}, [], r"plateau.min_improvement must be less than 1"),
        ({"min_improvement": float("nan")}, [], r"plateau.min_improvement"),
        ({"loss": "dev"}, [], r"plateau.loss must be 'train' or 'held_out'"),
        ({"windw": 3}, [], r"plateau has no key windw: known are loss, window, min_improvement"),
        ({"most_steps": 10}, [], r"plateau: most_steps 10 is below window 20"),
        ({"least_steps": 30, "most_steps": 25}, [], r"plateau: most_steps 25 is below least_steps 30"),
        ({"loss": "held_out", "window": 5}, [], r"plateau: window is for loss train; with held_out, eval.every says"),
        ({"loss": "held_out"}, ["eval.every=link"], r"within links: eval.every link has none; use epoch, or a number of steps$"),
        ({"loss": "held_out"}, ["eval.every=end"], r"within links: eval.every end has none"),
        ({"loss": "held_out"}, ["data.eval=null"], r"within links: name data.eval or data.task$"),
        ({}, ["optim.schedule_over=link"], r"optim.schedule_over link and optim.schedule linear want to know beforehand"),
        ({}, ["chain.knots={plateau: null}"], r"chain.knots must give plateau its keys"),
        ({}, ["chain.knots={plateau: {}, steps: [3]}"], r"chain.knots must be even, .* or \{plateau: \{\}\}"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_a_line(plateau, overrides, expected):
    with pytest.raises(UserError, match=expected) as refused:
        run(*overrides, **plateau)
    assert "\n" not in str(refused.value)


def test_what_agrees():
    assert run("optim.schedule_over=link", "optim.schedule=constant").chain.plateau == PlateauConfig()
    assert run("chain.knots.plateau.window=7").chain.plateau.window == 7
    # Plain LoRA of the same YAML: nothing is to be placed.
    lora = run("method=lora", "chain.length=1", "optim.schedule_over=link", "eval.every=end", loss="held_out")
    assert resolve(lora, 800, 1).knots == (100,)


@pytest.mark.parametrize(
    ("plateau", "overrides", "least"),
    [
        ({}, [], 20),
        ({"window": 7}, [], 7),
        ({"window": 7, "least_steps": 3}, [], 3),
        ({"loss": "held_out"}, ["eval.every=6"], 6),
        ({"loss": "held_out"}, ["eval.every=6", "chain.knots.plateau.most_steps=5"], 5),
        ({"loss": "held_out"}, [], 5),  # an epoch: 40 examples
    ],
)
def test_the_least_steps_of_a_link(plateau, overrides, least):
    plan = resolve(run(*overrides, **plateau), 40, 1)
    assert (plan.least_steps, plan.total_steps) == (least, 100)


def test_a_warm_up_that_might_outlast_a_link_is_refused():
    assert resolve(run("optim.warmup_steps=9", window=10), 800, 1).knots == (100,)
    said = "the shortest link has 10 steps; set fewer, or a greater chain.knots.plateau.least_steps"
    with pytest.raises(UserError, match=said):
        resolve(run("optim.warmup_steps=10", window=10), 800, 1)


def test_all_of_it_is_compared_when_a_run_goes_on(tmp_path):
    """Defaults spelled out: a later version's others would be another run."""
    config = run(window=7)
    said = flat_keys(config.model_dump(mode="json"))["chain.knots"]
    assert said == {"plateau": {**PlateauConfig(window=7).model_dump()}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)), encoding="utf-8")
    again = load_config(tmp_path / "run.yaml")
    assert again == config
    assert RunConfig.model_validate_json(config.model_dump_json(exclude_unset=True)) == config
