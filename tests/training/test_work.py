"""Model FLOPs of a step: against torch's own count, packed and padded, from link to link, and in the rows of runs."""

import json
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cola_ds.config.loading import load_config
from cola_ds.data.batch import StepExamples
from cola_ds.data.batcher import Batcher
from cola_ds.lora.layers import LoRALinear, inject, start_link
from cola_ds.lora.targets import find_targets
from cola_ds.training.work import LinkWork, link_work, pairs, work_of
from tests.support.runs import three_links, train_in
from tests.support.toys import ARCHITECTURES, rows, run_config, save_model, save_run

LENGTH, EXAMPLES, LORA_RANK = 24, 3, 5


@pytest.fixture(autouse=True)
def products_that_torch_counts(monkeypatch):
    """Its count does not know products that add to a matrix in place: LoRA by as many of the others."""

    def forward(self, x):
        small = F.linear(x, self.lora_A)
        return F.linear(x, self.weight, self.bias) + F.linear(small, self.lora_B) * self.scaling

    monkeypatch.setattr(LoRALinear, "forward", forward)


def like_prepared(skeleton, method, targets, lora_ranks=(LORA_RANK,)):
    config = SimpleNamespace(
        lora_ranks=list(lora_ranks), lora_trains=["both"] * len(lora_ranks), starts_elsewhere=False, method=method
    )
    return SimpleNamespace(skeleton=skeleton, targets=targets, config=config)


def load(folder):
    """In fp32, with attention that computes the whole square, as torch's count can see it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().train()


def of_lengths(*lengths, predictions=0):
    return StepExamples(
        micro_batches=[], examples=len(lengths), tokens=sum(lengths), loss_tokens=0, predictions=predictions, indices=[],
        lengths=list(lengths),
    )  # fmt: skip


def counted(model, predicted):
    """What torch counts in a forward and backward pass over EXAMPLES texts without padding, by product."""
    ids = torch.randint(3, 250, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=predicted).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, :predicted].flatten()).backward()
    return sum(counter.get_flop_counts()["Global"].values())


def hidden_half(model, factor=3, layers=None):
    """What eager attention computes of the pairs that its mask hides."""
    hidden = EXAMPLES * (LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2)
    return factor * 4 * model.config.hidden_size * hidden * (layers or model.config.num_hidden_layers)


def not_needed(model, block):
    """Gradients of a block's inputs, which nothing needs in the first that is trained: by q, k and v and their A, and those of k
    and v themselves where they have no A."""
    attention = model.get_decoder().layers[block].self_attn
    total = 0
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        total += (
            2 * EXAMPLES * LENGTH * (layer.weight.numel() + (layer.lora_A.numel() if hasattr(layer, "lora_A") else 0))
        )
        if not hasattr(layer, "lora_A"):
            total += 2 * EXAMPLES * LENGTH * LENGTH * model.config.hidden_size
    return total


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "opt", "qwen2"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora_needs_what_torch_counts(tmp_path, architecture, targets):
    """To the last FLOP, but for what is computed and not needed, and what is not computed in the first layer alone."""
    model = load(save_model(tmp_path / "model", architecture))
    names = find_targets(model, targets)
    (work,) = work_of(like_prepared(model, "lora", names))
    inject(model, names, dropout=0.0, train_bias=False)
    start_link(model, 1, LORA_RANK, 8.0, 0, torch.device("cpu"))
    needed = work.of(of_lengths(*[LENGTH] * EXAMPLES, predictions=EXAMPLES * 7))
    assert counted(model, 7) == needed + hidden_half(model) - not_needed(model, 0)


@pytest.mark.parametrize(("train", "started"), [("A", False), ("B", False), ("both", True)])
def test_a_factor_that_is_not_trained_needs_less(tmp_path, train, started):
    """No gradient of its own; where a link starts elsewhere, that stands beside it."""
    model = load(save_model(tmp_path / "model"))
    names = find_targets(model, "all-linear")
    prepared = like_prepared(model, "lora", names)
    both, these = link_work(prepared, LORA_RANK), link_work(prepared, LORA_RANK, train, started)
    inner, outer = (sum(getattr(model.get_submodule(n), f"{which}_features") for n in names) for which in ("in", "out"))
    apart = {"A": -2 * outer, "B": -2 * inner}.get(train, 4 * (inner + outer))
    assert these.per_token - both.per_token == LORA_RANK * apart
    assert (these.per_prediction, these.per_pair) == (both.per_prediction, both.per_pair)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_full_fine_tuning_needs_what_torch_counts(tmp_path, architecture):
    model = load(save_model(tmp_path / "model", architecture))
    (work,) = work_of(like_prepared(model, "full", []))
    needed = work.of(of_lengths(*[LENGTH] * EXAMPLES, predictions=EXAMPLES * 7))
    assert counted(model, 7) == needed + hidden_half(model)


def test_where_no_gradient_goes_none_is_counted(tmp_path):
    """Of three layers the last has the targets: the ones before it are computed forwards alone."""
    model = load(save_model(tmp_path / "model", num_hidden_layers=3))
    names = ["model.layers.2.self_attn.q_proj"]
    (work,) = work_of(like_prepared(model, "lora", names))
    inject(model, names, dropout=0.0, train_bias=False)
    start_link(model, 1, LORA_RANK, 8.0, 0, torch.device("cpu"))
    needed = work.of(of_lengths(*[LENGTH] * EXAMPLES, predictions=EXAMPLES * 7))
    hidden = hidden_half(model, 1, 2) + hidden_half(model, 3, 1)
    assert counted(model, 7) == needed + hidden - not_needed(model, 2)


def test_six_for_frozen_weights_would_be_half_as_much_again(tmp_path):
    model = load(save_model(tmp_path / "model"))
    (lora,) = work_of(like_prepared(model, "lora", find_targets(model, "all-linear"), [1]))
    (full,) = work_of(like_prepared(model, "full", []))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head)
    ends = sum(sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head)
    assert lora.per_token == 4 * weights + 6 * ends
    assert full.per_token == 1.5 * (lora.per_token - 6 * ends)
    assert full.per_prediction == 1.5 * lora.per_prediction == 6 * 300 * 32
    assert full.per_pair == lora.per_pair == {None: 12 * 32 * 2}


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_pairs_of_positions(window):
    lengths = [1, 2, 7, 8]
    expected = 0
    for length in lengths:
        query, key = numpy.mgrid[:length, :length]
        expected += ((key <= query) & (query - key < (window or length))).sum()
    assert pairs(lengths, window) == expected
    assert pairs([], window) == 0


def test_a_window_bounds_attention_in_its_layers():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 6}
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=300, sliding_window=16, num_key_value_heads=2, **sizes,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (work,) = work_of(like_prepared(model, "lora", find_targets(model, ["q_proj"])))
    assert work.per_pair == {16: 12 * 24 * 2, None: 12 * 24}


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("mixtral", {"num_key_value_heads": 2}, "experts"),
        ("mamba", {}, "no matrix"),
        ("qwen3_next", {"num_experts": 0, "num_experts_per_tok": 0}, "linear_attention|no matrix"),
    ],
)
def test_models_whose_work_is_another_are_not_guessed_at(name, more, said):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=300, **sizes, **more))
    with pytest.raises(ValueError, match=said):
        work_of(like_prepared(model, "full", []))


# -- data ---------------------------------------------------------------------------------------------------------------


def prepared(path, world_size=1):
    from cola_ds.training.prepare import prepare

    return prepare(load_config(path), world_size)


def step_work(run, step, world_size=1):
    """What a step (from 0) needs, by the batches of it that all processes have."""
    link = run.step_plan.link_of(step + 1)
    batcher = Batcher(run.train, 0, world_size, run.order)
    optim = run.config.optim
    examples = batcher.step(step, run.config.run.seed, run.step_plan.global_batch_size, optim.micro_batch_size)
    return work_of(run)[link - 1].of(examples), examples


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_need_the_same(toy, tmp_path, architecture):
    """Of an epoch, of whose rows the packed have several examples each."""
    model = save_model(tmp_path / "model", architecture)
    found = {}
    for packing in ("none", "best_fit"):
        method = {"method": "full" if architecture == "gpt2" else "lora", "chain": {"length": 1}}
        options = {"data": {"packing": packing}, "optim": {"max_steps": None, "epochs": 1}, **method}
        config = run_config(model, toy[1], tmp_path, **options)
        run = prepared(save_run(tmp_path / f"{packing}.yaml", config))
        works, examples = zip(*(step_work(run, step) for step in range(run.step_plan.total_steps)), strict=True)
        found[packing] = sum(works), sum(each.examples for each in examples)
        rows_of_micro_batch = examples[0].micro_batches[0].input_ids.shape[0]
        if packing == "best_fit":
            assert examples[0].examples > 2 * 8 >= 2 * rows_of_micro_batch
    assert found["none"] == found["best_fit"]
    assert found["none"][1] == 40


def test_candidates_are_predicted_alike_and_counted_once():
    """The head is needed wherever one of them has an id, the loss counts the example."""
    from cola_ds.data.batch import Encoded
    from cola_ds.data.candidates import join_candidates
    from cola_ds.data.tasks.catalog import Example, task_named
    from cola_ds.data.tasks.dataset import TaskData

    encoded = [Encoded([[1, 5, 6], [1, 7, 8, 9]], [2, 3], [1], ""), Encoded([[1, 2], [1, 3]], [1, 1], [1], "")]
    data = TaskData(
        task=task_named("cb"), examples=[Example("", correct=(0,))] * 2, encoded=encoded, lengths=[5, 2],
        loss_tokens=[1, 1], lost={}, largest_id=9,
    )  # fmt: skip
    examples = Batcher(data, 0, 1).step(0, 0, 2, 2)
    assert (examples.loss_tokens, examples.predictions) == (2, 7)
    assert (join_candidates(encoded).labels != -100).sum() == 7


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_rows_say_what_their_links_and_devices_need(toy, tmp_path):
    """Links of ranks 8, 4 and 4; stopped in the middle of the first row, and gone on with by one process instead of two."""
    config = three_links(toy)
    train_in(tmp_path, config, [2, 1], stops=[("step", 3)])
    run = prepared(tmp_path / "run.yaml")
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [4, 5, 8, 10, 12]
    firsts = [0, *(row["step"] for row in metrics)]
    for first, row in zip(firsts, metrics, strict=False):
        steps = range(first, row["step"])
        expected = sum(step_work(run, step)[0] / (2 if step < 3 else 1) for step in steps)
        assert row["tflops"] * 1e12 * row["step_s"] * len(steps) == pytest.approx(expected, rel=1e-9)
        assert row["peak_share"] is None
        assert row["memory_bytes"] > 2**26
    ranks = [work_of(run)[row["link"] - 1] for row in metrics]
    assert ranks[0].per_token > ranks[-1].per_token
    memory = [row["memory_bytes"] for row in metrics]
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert memory[1] <= memory[-1] <= result["peak_memory_bytes"]
    assert result["tflops"] == sorted(row["tflops"] for row in metrics)[2]
    assert result["peak_share"] is None


def with_a_peak(process, path):
    """On a device that is in the table."""
    from cola_ds.training import start
    from tests.support.runs import run_once

    start.peak_tflops = lambda name, dtype: {("cpu", "fp32"): 2.0}[name, dtype]
    return run_once(process, path)


def test_the_share_of_a_peak(toy, tmp_path):
    from tests.support.distributed import run_distributed

    config = run_config(toy[0], toy[1], tmp_path / "run", optim={"max_steps": 2})
    run_distributed(with_a_peak, 1, save_run(tmp_path / "run.yaml", config))
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert [row["peak_share"] for row in metrics] == [row["tflops"] / 2.0 for row in metrics]
    assert all(row["tflops"] > 0 for row in metrics)


def with_a_slow_start(process, path):
    """The first link's start takes two seconds."""
    import time

    from cola_ds.training import loop
    from tests.support.runs import run_once

    loop.place_start = lambda chain, link: time.sleep(2)
    return run_once(process, path)


def test_a_start_is_no_steps_time(toy, tmp_path):
    from tests.support.distributed import run_distributed

    config = run_config(toy[0], toy[1], tmp_path / "run", optim={"max_steps": 2})
    run_distributed(with_a_slow_start, 1, save_run(tmp_path / "run.yaml", config))
    assert all(row["step_s"] < 2 for row in rows(tmp_path / "run/metrics.jsonl"))


def test_what_the_bar_says():
    from cola_ds.training.metrics import _in_short

    speed = {
        "tokens_per_s": 12473.2, "tflops": 402.3, "peak_share": 0.4066, "memory_bytes": 70 * 2**30, "step_s": 2.0,
        "data_wait_s": 0.019,
    }  # fmt: skip
    assert _in_short(speed) == "12473 tokens/s, 402 TFLOP/s (41%), 70.0 GiB"
    speed |= {"tflops": 0.01234, "peak_share": float("nan"), "data_wait_s": 0.5}
    assert _in_short(speed) == "12473 tokens/s, 0.0123 TFLOP/s, 70.0 GiB, waiting 25%"
    assert _in_short({**speed, "tflops": float("nan")}) == "12473 tokens/s, 70.0 GiB, waiting 25%"


def test_a_checkpoint_that_does_not_say_the_work(tmp_path, monkeypatch):
    """Of before it was measured: its row has none, the next one has."""
    from cola_ds.checkpoint.format import Unlogged
    from cola_ds.distributed import collectives
    from cola_ds.run.folder import RunDir
    from cola_ds.training.metrics import MetricLogger
    from tests.support.recorded import recorded

    monkeypatch.setattr(collectives, "all_reduce_sum", lambda value: value)
    monkeypatch.setattr(collectives, "all_reduce_max", lambda values: [float(value) for value in values])
    logger = MetricLogger(RunDir(recorded(tmp_path)), SimpleNamespace(write=lambda *args: None), 5, 2)
    logger.work = lambda link, examples: LinkWork(1000, 0, {}).of(examples) / 1
    unlogged = Unlogged(loss=[1.0], losses=1, steps=1, tokens=5, seconds=0.0)
    logger.go_on(unlogged.model_dump(), 0, 1, 1)
    for step in (2, 3, 4):
        logger.step({"step": step, "link": 1}, torch.ones(()), of_lengths(5), 0.0, False, lr=1.0)
    first, second = rows(tmp_path / "metrics.jsonl")[-2:]
    assert first["tflops"] is None
    assert second["tflops"] * second["step_s"] * 2 * 1e12 == pytest.approx(2 * 5 * 1000)
    assert logger.in_short.startswith("; loss 1.0000, link 1, ") and "TFLOP/s, " in logger.in_short
