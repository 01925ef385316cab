"""What a knot does beside the tie as the paper has it: moments that are kept or pruned, links that are tied with a factor."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.commands.export import export
from cola_ds.config.loading import load_config
from cola_ds.distributed.moments import smallest
from cola_ds.errors import UserError
from cola_ds.run.learnt import read_learnt
from tests.support.distributed import CountedCollectives, run_distributed
from tests.support.reference import chain_of_lora
from tests.support.runs import record, three_links, train_in
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run, save_sums
from tests.training.test_chain import make_chain, whole_weights

STEPS, KNOTS = 12, (4, 8, 12)
ENGINES = {name: str(REPOSITORY / f"ds_configs/{name}.json") for name in ("zero2", "zero3_offload_cpu")}
SHARDED = str(REPOSITORY / "tests/support/zero3_sharded.json")
PRUNE = {"prune": 0.9}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("at-knot")
    dev = save_sums(folder / "dev.jsonl", 12, seed=1)
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50), dev


def config_for(toy, optimizer="adamw", engine=SHARDED, rank=8, micro=4, **chain):
    optim = {
        "name": optimizer,
        "lr": 5e-3 if optimizer == "adamw" else 1e-2,
        "max_steps": STEPS,
        "micro_batch_size": micro,
        "max_grad_norm": 0.1,
    }
    return run_config(
        *toy[:2], "unused", lora={"rank": rank}, chain={"length": 3, **chain}, optim=optim, deepspeed=engine,
        checkpoint={"every_steps": 3, "keep": 9},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {"optimizer_at_knot": "keep"}),
        pytest.param(2, {"optimizer_at_knot": PRUNE}, marks=pytest.mark.core),
        (2, {"optimizer_at_knot": "keep"}),
        (4, {"optimizer_at_knot": "keep", "micro": 2}),
        (1, {"optimizer_at_knot": PRUNE, "merge_weight": [0.5, 0.25, 1.0]}),
        (1, {"optimizer_at_knot": PRUNE, "engine": ENGINES["zero2"]}),
        (2, {"optimizer_at_knot": "keep", "optimizer": "adagrad", "engine": ENGINES["zero2"]}),
        (2, {"optimizer_at_knot": PRUNE, "engine": ENGINES["zero3_offload_cpu"]}),
        (2, {"merge_weight": [0.5, 0.25, 1.0], "rank": [8, 4, 4]}),
        (4, {"optimizer_at_knot": PRUNE, "merge_weight": [0.5, 0.25, 1.0], "micro": 2}),
    ],
)
def test_it_follows_a_plain_reference(toy, tmp_path, world_size, options):
    """Losses and weights, to 1e-5; and the export has what the reference has merged."""
    config = config_for(toy, **options)
    losses, model = chain_of_lora(config, KNOTS)
    train_in(tmp_path, config, world_size)
    found = [row["loss"] for row in rows(tmp_path / "run/metrics.jsonl")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    exported = load_file(export(tmp_path / "run", "hf", tmp_path / "merged") / "model.safetensors")
    expected = model.state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    knots = rows(tmp_path / "run/knots.jsonl")
    if options.get("optimizer_at_knot") == PRUNE:
        # Each moment's share is rounded to whole elements.
        assert [row.get("moments_zeroed") for row in knots] == [pytest.approx(0.9, abs=2e-3)] * 2 + [None]
    else:
        assert all("moments_zeroed" not in row for row in knots)


def test_a_link_is_saved_as_it_was_tied(toy, tmp_path):
    """The factor is in the alpha of its adapter; and a knot whose factor is below 1 changes the loss, which its row shows."""
    train_in(tmp_path, config_for(toy, merge_weight=[0.5, 0.25, 1.0]), 1)
    links = read_learnt(tmp_path / "run").links
    assert [(link.alpha, link.scaling) for link in links] == [(4.0, 0.5), (2.0, 0.25), (8.0, 1.0)]
    for link, alpha in enumerate((4.0, 2.0, 8.0), 1):
        path = tmp_path / f"run/chain/link-{link:04d}/adapter_config.json"
        assert json.loads(path.read_text(encoding="utf-8"))["lora_alpha"] == alpha
    changes = [abs(row["loss_after"] / row["loss_before"] - 1) for row in rows(tmp_path / "run/knots.jsonl")]
    assert changes[0] > 1e-4
    assert changes[1] > 1e-4
    assert changes[2] < 1e-6


@pytest.mark.parametrize(
    "sections",
    [
        {"chain": {"optimizer_at_knot": PRUNE, "merge_weight": [0.5, 1.0, 0.7]}},
        {
            "chain": {"optimizer_at_knot": "keep", "merge_weight": 0.3},
            "model": {"dtype": "bf16"},
            "deepspeed": ENGINES["zero2"],
        },
    ],
    ids=["fp32", "bf16"],
)
def test_a_stopped_run_ends_with_the_same_bits(toy, tmp_path, sections):
    """Before a knot, after it, and in the last link."""
    config = three_links(toy, lora={"rank": 8}, **sections)
    weights = train_in(tmp_path / "straight", config)
    stops = [("step", 4), ("step", 1), ("step", 3), ("step", 2)]
    assert train_in(tmp_path / "stopped", config, stops=stops) == weights
    assert record(tmp_path / "stopped/run") == record(tmp_path / "straight/run")


def pruned(process, path):
    """Moments before and after the pruning, the step count, and what the pruning moved."""
    from cola_ds.distributed.engine_state import kept, optimizer_scalars, trained
    from cola_ds.distributed.moments import _whole, prune_moments
    from cola_ds.training.loop import tune_lora

    assert kept
    chain = make_chain(process, path)
    nothing = prune_moments(chain.engine, 0.9)
    tune_lora(chain)
    params = trained(chain.engine)

    def moments():
        return {
            f"{kind} {name}": _whole(chain.engine, kind, params[name])
            for kind in ("exp_avg", "exp_avg_sq")
            for name in params
        }

    before = moments()
    with CountedCollectives() as counted:
        share = prune_moments(chain.engine, 0.9)
    return nothing, before, moments(), share, optimizer_scalars(chain.engine), [size for _, size in counted.calls]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_smallest_of_each_moment_are_zero_and_no_other(toy, tmp_path, world_size):
    config = config_for(toy, optimizer_at_knot=PRUNE)
    config["run"] = {**config["run"], "dir": str(tmp_path / "run")}
    found = run_distributed(pruned, world_size, save_run(tmp_path / "run.yaml", config))
    for nothing, before, after, share, scalars, sizes in found:
        assert nothing is None
        assert scalars["step"] == KNOTS[0]
        assert share == sum(float((moment == 0).sum()) for moment in after.values()) / sum(
            m.numel() for m in after.values()
        )
        for name, moment in before.items():
            count = round(0.9 * moment.numel())
            second = before[name.replace("exp_avg ", "exp_avg_sq ")]  # which of them are pruned, this one says
            kept = second.sort(descending=True).indices[: moment.numel() - count]
            assert torch.equal(after[name][kept], moment[kept])
            assert int((after[name] == 0).sum()) == count
        assert max(sizes) == 4 * max(moment.numel() for moment in before.values())  # one moment of one A or B at a time


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_links_stay_as_large_as_with_all_their_moments(toy, tmp_path, share):
    """What is left of a first moment must not be divided by a second one of zero: links would grow ten thousandfold."""
    sizes = {}
    for at_knot in ("keep", {"prune": share}):
        folder = tmp_path / ("kept" if at_knot == "keep" else "pruned")
        folder.mkdir()
        train_in(folder, config_for(toy, optimizer_at_knot=at_knot, engine=ENGINES["zero2"]), 1)
        sizes[folder.name] = [row["delta_norm"] for row in rows(folder / "run/knots.jsonl")]
    assert sizes["pruned"][0] == sizes["kept"][0]
    for pruned_size, kept_size in zip(sizes["pruned"], sizes["kept"], strict=True):
        assert pruned_size < 5 * kept_size


def through_a_knot(process, path):
    """Moments and step counts before and after a knot; masters and what is trained after it."""
    from cola_ds.distributed.engine_state import optimizer_scalars, trained
    from cola_ds.distributed.moments import _whole
    from cola_ds.training.knot import pass_knot
    from cola_ds.training.loop import tune_lora
    from cola_ds.training.place_start import place_start

    chain = make_chain(process, path)
    place_start(chain, 1)
    tune_lora(chain)

    def moments():
        params = trained(chain.engine)
        kinds = [(kind, name) for kind in ("exp_avg", "exp_avg_sq") for name in params]
        return {f"{kind} {name}": _whole(chain.engine, kind, params[name]) for kind, name in kinds}

    before = moments()
    pass_knot(chain)
    masters = {name: _whole(chain.engine, "master", param) for name, param in trained(chain.engine).items()}
    whole = {name: value.flatten() for name, value in whole_weights(chain).items() if name in masters}
    return before, moments(), optimizer_scalars(chain.engine), masters, whole


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
def test_moments_go_on_where_a_link_begins_elsewhere(toy, tmp_path, init):
    """What the start puts in place is in the masters; moments and step counts are those of the link before."""
    config = config_for(toy, optimizer_at_knot="keep")
    config = {
        **config,
        "lora": {**config["lora"], "init": init},
        "run": {**config["run"], "dir": str(tmp_path / "run")},
    }
    for before, after, scalars, masters, whole in run_distributed(
        through_a_knot, 2, save_run(tmp_path / "run.yaml", config)
    ):
        assert scalars["step"] == KNOTS[0]
        for name, moment in before.items():
            assert moment.abs().max() > 0, name
            assert torch.equal(after[name], moment), name
        for name, master in masters.items():
            assert torch.equal(master, whole[name]), name
            # From pissa's factors a link has gone nowhere yet.
            assert bool(master.any()) == (init != "pissa" and "lora_A" in name), name


def test_smallest():
    assert smallest(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5).tolist() == [False, True, True, False]
    assert not smallest(torch.tensor([3.0, -1.0]), 0.2).any()


def test_pruning_without_a_warm_up_is_warned_of(toy, tmp_path):
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    path = save_run(tmp_path / "run.yaml", config_for(toy, optimizer_at_knot=PRUNE))
    for warmup_steps, at_knot, warned in ((0, "{prune: 0.9}", 1), (2, "{prune: 0.9}", 0), (0, "keep", 0)):
        words = [f"optim.warmup_steps={warmup_steps}", f"chain.optimizer_at_knot={at_knot}"]
        said = summarize(prepare(load_config(path, words), 1), 1)
        assert said.count("warning     moments are pruned at knots without optim.warmup_steps") == warned


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chain.optimizer_at_knot=forget"], "chain.optimizer_at_knot must be reset, keep or {prune: 0.9}"),
        (["chain.optimizer_at_knot={prune: 1}"], "with a share between 0 and 1; it is {'prune': 1}"),
        (["chain.optimizer_at_knot={prune: true}"], "chain.optimizer_at_knot must be"),
        (["chain.optimizer_at_knot=keep", "chain.length=1"], "'keep' needs a link after the first"),
        (
            ["chain.optimizer_at_knot=keep", "lora.rank=[8, 8, 4]"],
            "needs links of one LoRA rank, whose moments have one shape",
        ),
        (
            ["chain.optimizer_at_knot={prune: 0.9}", "optim.name=sgd"],
            "has nothing to keep: optim.name sgd has no moments",
        ),
        (["chain.merge_weight=0"], "chain.merge_weight must be a number above 0, to 1"),
        (["chain.merge_weight=1.5"], "it is 1.5"),
        (["chain.merge_weight=[1, 2, true]"], "chain.merge_weight must be"),
        (["chain.merge_weight=[1, 0.5]"], "chain.merge_weight [1.0, 0.5] names 2 links, but chain.length is 3"),
        (["chain.merge_weight=0.5", "method=lora", "chain.length=1"], "is for a chain: method lora takes 1.0"),
    ],
)
def test_refusals(toy, tmp_path, overrides, message):
    path = save_run(tmp_path / "run.yaml", config_for(toy))
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
