"""The switches of a chain (lora.scaling, lora.train, lora.init, optim.lr_ratio): each against plain torch on whole matrices,
under ZeRO 2 and 3, by one process and several; and what a run with them leaves."""

import gc
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cola_ds.commands.export import export
from cola_ds.config.loading import load_config
from cola_ds.lora.layers import LoRALinear, lora_layers
from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.runs import record, three_links, train_in
from tests.support.switches import switched_chain
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run, save_sums, thorough
from tests.training.test_chain import ENGINES, make_chain, next_batch, outputs, whole_weights

LINKS, STEPS, KNOTS = 3, 9, (3, 6, 9)
SWITCHES = {  # a link begins in place where it has the rank of the one before and trains the same
    "trained": {"rank": [8, 4, 4], "train": ["B", "A", "A"], "scaling": "alpha/sqrt(r)", "init": "kaiming"},
    "orthogonal": {"rank": [8, 8, 4], "train": ["B", "B", "both"], "init": "orthogonal"},
    "pissa": {"rank": [8, 8, 4], "train": ["both", "both", "B"], "init": "pissa"},
    "gradient": {"rank": [2, 2, 1], "train": ["both"] * 3, "init": "gradient", "scaling": "alpha/sqrt(r)"},
}
DECAY = {"trained": 0.0, "orthogonal": 0.0, "pissa": 5.0, "gradient": 0.0}
RATIO = {"trained": 1, "orthogonal": 4, "pissa": 1, "gradient": 2}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switches")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50)


def config_for(toy, which, run_dir, engine="zero3", **optim):
    return run_config(
        *toy, run_dir, lora={"alpha": 8, **SWITCHES[which]}, chain={"length": LINKS}, deepspeed=ENGINES[engine],
        optim={"max_steps": STEPS, "max_grad_norm": 0.5, "lr_ratio": RATIO[which], "weight_decay": DECAY[which], **optim},
    )  # fmt: skip


@pytest.fixture(scope="module")
def references(toy):
    return {which: switched_chain(config_for(toy, which, "unused"), KNOTS) for which in SWITCHES}


def run_all(process, paths):
    """What `cola-ds train` does, of several runs one after the other."""
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared

    process_group(process)
    for path in paths:
        run_prepared(prepare(load_config(path), process.world_size), process, ResumeOptions(), frees=True)


@pytest.mark.parametrize(
    ("engine", "world_size"), thorough([("zero3", 1), ("zero3", 2), ("zero3", 4)], [("zero2", 1), ("zero2", 2)])
)
def test_switches_follow_plain_torch(toy, references, tmp_path, engine, world_size):
    paths = []
    for which in SWITCHES:
        config = config_for(toy, which, tmp_path / which, engine, micro_batch_size=2 if world_size < 4 else 1)
        paths.append(save_run(tmp_path / f"{which}.yaml", config))
    run_distributed(run_all, world_size, paths)
    for which in SWITCHES:
        losses, model, links = references[which]
        found = [row["loss"] for row in rows(tmp_path / which / "metrics.jsonl")]
        assert found == pytest.approx(losses, rel=1e-5), which
        for row in rows(tmp_path / which / "knots.jsonl"):
            assert row["loss_after"] == pytest.approx(row["loss_before"], rel=1e-5), which
        exported = load_file(export(tmp_path / which, "hf", tmp_path / f"{which}-merged") / "model.safetensors")
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-5, msg=f"{which} {name}")
        for number, learnt in enumerate(links, start=1):
            check_link(tmp_path / which / f"chain/link-{number:04d}", learnt, which)


def test_shards_in_each_node_start_alike(toy, references, tmp_path):
    """Each node finds its own weights' directions, and all begin at those of process 0."""
    config = config_for(toy, "pissa", "unused", micro_batch_size=1)
    train_in(tmp_path, {**config, "model": {**config["model"], "shards": "node"}}, 4, hosts=[["a", "b", "a", "b"]])
    found = [row["loss"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert found == pytest.approx(references["pissa"][0], rel=1e-5)
    environment = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert environment["shards"] == "node"


def check_link(folder, learnt, which):
    """A tied link is a PEFT adapter of what was learnt: its start too, where it has one."""
    tensors = load_file(folder / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name, (A, B, A0, B0, scaling) in learnt.items():
        lora_A, lora_B = (tensors[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        assert len(lora_A) == said["r"] == (2 if B0.any() else 1) * len(A)
        assert said["lora_alpha"] / said["r"] == pytest.approx(scaling)
        expected = scaling * (B @ A - B0 @ A0)
        torch.testing.assert_close(scaling * lora_B @ lora_A, expected, rtol=1e-4, atol=2e-6, msg=f"{which} {name}")


def test_a_run_with_a_start_is_one_peft_adapter(toy, tmp_path):
    """The whole chain as PEFT's adapter has the logits of the merged model, and the base is what it was."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = save_run(tmp_path / "run.yaml", config_for(toy, "pissa", tmp_path / "run", "zero2"))
    run_distributed(run_all, 1, [path])
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "hf", tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(toy[0])
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, export(tmp_path / "run", "peft", tmp_path / "adapter"))
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    assert (adapted(ids).logits - before).abs().max() > 1e-2


def test_what_is_said_and_counted_beforehand(toy, tmp_path):
    """Per unit of LoRA rank two layers' q_proj and v_proj have 4 x 32 inputs and 2 x (32 + 16) outputs."""
    from cola_ds.training.prepare import prepare
    from cola_ds.training.prepared import frozen_of_links, tied_of_links, trained_of_links
    from cola_ds.training.summary import summarize

    def prepared(which):
        return prepare(load_config(save_run(tmp_path / f"{which}.yaml", config_for(toy, which, tmp_path / "run"))), 1)

    trained, pissa = prepared("trained"), prepared("pissa")
    assert trained_of_links(trained) == [8 * 96, 4 * 128, 4 * 128]
    assert frozen_of_links(trained) == [8 * 128, 4 * 96, 4 * 96]
    assert tied_of_links(trained) == [8 * 224, 4 * 224, 4 * 224]
    assert trained_of_links(pissa) == [8 * 224, 8 * 224, 4 * 96]
    assert frozen_of_links(pissa) == [8 * 224, 8 * 224, 4 * 128 + 4 * 224]
    assert tied_of_links(pissa) == [16 * 224, 16 * 224, 8 * 224]
    said = summarize(trained, 1)
    assert "switches    lora.init kaiming, lora.scaling alpha/sqrt(r), lora.train [B, A, A]\n" in said
    assert "link 1      steps 1-3, LoRA rank 8, B alone, 768 trainable parameters" in said
    said = summarize(prepared("orthogonal"), 1)
    assert "switches    lora.init orthogonal, lora.train [B, B, both], B's learning rate 4 times A's\n" in said


# -- going on ----------------------------------------------------------------------------------------------------------

GOING_ON = {  # dropout is on in all of them
    "pissa bf16": {"lora": {"rank": [8, 4, 4], "init": "pissa", "train": ["both", "B", "B"]}, "model": {"dtype": "bf16"}},
    "gradient stage 2": {
        "lora": {"rank": [2, 2, 4], "init": "gradient"}, "optim": {"lr_ratio": 4}, "deepspeed": ENGINES["zero2"],
    },
    "orthogonal offloaded": {
        "lora": {"rank": [4, 4, 8], "init": "orthogonal", "train": ["B", "B", "both"], "scaling": "alpha/sqrt(r)"},
        "model": {"dtype": "bf16"}, "optim": {"lr_ratio": 4}, "deepspeed": str(REPOSITORY / "ds_configs/zero3_offload_cpu.json"),
    },
}  # fmt: skip


@pytest.mark.parametrize("which", GOING_ON)
def test_a_stopped_run_ends_with_the_same_bits(toy, tmp_path, which):
    """Stopped in the first link, and in the first step of the second: frozen factors and starts are the bits that they were."""
    config = three_links((*toy, toy[1]), **GOING_ON[which])
    weights = train_in(tmp_path / "whole", config)
    assert train_in(tmp_path / "stopped", config, stops=[("step", 2), ("step", 3)]) == weights
    assert record(tmp_path / "stopped/run") == record(tmp_path / "whole/run")


def frozen(checkpoint):
    """What a checkpoint holds of the link beside what is trained."""
    held = {}
    for path in sorted(checkpoint.glob("trained-*.safetensors")):
        held |= {name: tensor for name, tensor in load_file(path).items() if name.startswith("frozen/")}
    return held


def test_a_start_that_was_placed_is_not_placed_again(toy, tmp_path):
    """Stopped before the first step: the same bits, and at another number of processes the start that was found."""
    watched = {"watch": str(save_sums(tmp_path / "watch.jsonl", 9, seed=2))}
    config = three_links((*toy, toy[1]), lora={"rank": [2, 2, 4], "init": "gradient"}, data=watched)
    weights = train_in(tmp_path / "whole", config)
    assert train_in(tmp_path / "stopped", config, stops=[("watch", 1)]) == weights
    assert record(tmp_path / "stopped/run") == record(tmp_path / "whole/run")
    config["checkpoint"] = {"every_steps": 2, "keep": 9}
    train_in(tmp_path / "fewer", config, stops=[("watch", 1), ("step", 2)], world_size=(2, 1, 1), end=False)
    first, later = (frozen(tmp_path / f"fewer/run/checkpoints/step-0000000{step}") for step in (0, 2))
    assert {name.rpartition(".")[2] for name in first} == {"start_A", "start_B"}
    for name, held in first.items():
        assert torch.equal(later[name], held), name


# -- the first gradient ------------------------------------------------------------------------------------------------


def starts_of(chain, link=1):
    """Where each layer of a link starts."""
    from cola_ds.training.place_start import place_start

    place_start(chain, link)
    layers = lora_layers(chain.engine.module).items()
    return {f"{name}.{half}": getattr(layer, half).clone() for name, layer in layers for half in ("start_A", "start_B")}


def numbers_that_drop(chain):
    modules = chain.engine.module.named_modules()
    return {f"{name}.{key}": value for name, module in modules for key, value in vars(module).items() if "drop" in key}


def find_starts(process, paths):
    found = []
    for path in paths:
        chain = make_chain(process, path)
        dropping = numbers_that_drop(chain)
        found.append(starts_of(chain))
        assert numbers_that_drop(chain) == dropping  # they are back
    return found


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_no_dropout_of_a_model_is_in_its_first_gradient(tmp_path, engine):
    """OPT drops in its blocks, and whole blocks, by numbers of their own; with activation checkpointing these are in training."""
    drops = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    data, paths = save_sums(tmp_path / "train.jsonl", 20), []
    for name, dropout, recomputes in (("plain", {}, False), ("off", drops, False), ("on", drops, True)):
        path = save_model(tmp_path / name, "opt", **dropout)
        config = run_config(
            path, data, tmp_path / f"{name}-run", lora={"rank": 2, "init": "gradient"}, deepspeed=ENGINES[engine],
            model={"activation_checkpointing": recomputes}, chain={"length": 1},
        )  # fmt: skip
        paths.append(save_run(tmp_path / f"{name}.yaml", config))
    plain, *others = run_distributed(find_starts, 1, paths)[0]
    for other in others:
        for name, start in plain.items():
            torch.testing.assert_close(other[name], start, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("dtype", "dynamic", "scale"), [("half", False, 128), ("half", True, 256), ("bfloat16", False, 1)]
)
def test_a_first_gradient_has_the_loss_scale_of_its_engine(monkeypatch, dtype, dynamic, scale):
    """As DeepSpeed makes its scalers of "loss_scale": 128, or 0 with an initial one of 256."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    from cola_ds.training import first_gradient

    dynamic_args = {
        "init_scale": 256, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False,
    }  # fmt: skip
    made = CreateLossScaler(getattr(torch, dtype), 128, dynamic, dynamic_args)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=made, loss_scale=made.cur_scale))
    examples = SimpleNamespace(micro_batches=[], loss_tokens=10)
    monkeypatch.setattr(first_gradient, "step_examples", lambda chain, step: examples)
    chain = SimpleNamespace(engine=engine, state=SimpleNamespace(step=3))
    products = first_gradient.GradientProducts(chain)
    products._take([examples])
    assert products._factor == scale / 10


def overflow(process, path, nothing):
    """Starts as they are, with a loss that overflows until it is divided twice, and with one that always does."""
    from cola_ds.errors import TrainingFailedError
    from cola_ds.training import first_gradient

    chain, found = make_chain(process, path), []
    for scale in (1.0, 2.0**134, nothing):
        first_gradient.loss_scale = lambda engine, scale=scale: scale
        try:
            found.append(starts_of(chain))
        except TrainingFailedError as error:
            found.append(str(error))
    return found


def test_a_gradient_that_overflows_is_found_with_a_smaller_loss(toy, tmp_path):
    path = save_run(tmp_path / "run.yaml", config_for(toy, "gradient", tmp_path / "run"))
    for plain, smaller, none in run_distributed(overflow, 2, path, float("inf")):
        for name, start in plain.items():
            torch.testing.assert_close(smaller[name], start, rtol=1e-3, atol=1e-5, msg=name)
        assert none == (
            "lora.init gradient: no gradient is finite from step 0 on (steps tried: 6); look at the data, or use another "
            "lora.init"
        )


def poisoned(process, path, steps):
    """Starts with the loss of some steps no number, on the last process alone; and what those of the step after them are."""
    from cola_ds.training import first_gradient

    chain, inner = make_chain(process, path), (first_gradient.step_examples, first_gradient.loss_sum)
    chain.state.step = steps
    expected, taken, events = starts_of(chain), [], []
    chain.state.step = 0
    first_gradient.step_examples = lambda chain, step: (taken.append(step), inner[0](chain, step))[1]
    bad = float("nan") if process.rank == process.world_size - 1 else 1.0
    first_gradient.loss_sum = lambda *facts: inner[1](*facts) * (bad if taken[-1] < steps else 1.0)
    chain.logger.event = lambda what, **facts: events.append((facts["step"], facts["reason"]))
    found = starts_of(chain)
    return all(torch.equal(found[name], expected[name]) for name in expected), taken, events


def test_a_step_whose_gradient_is_not_finite_is_passed_over(toy, tmp_path):
    """As training leaves it out: the link begins at the next one's gradient, and the journal says why."""
    path = save_run(tmp_path / "run.yaml", config_for(toy, "gradient", tmp_path / "run"))
    events = [(0, "it is not finite"), (1, "it is not finite")]
    assert run_distributed(poisoned, 2, path, 2) == [(True, [0, 1, 2], events)] * 2


def test_an_output_head_has_a_first_gradient(tmp_path):
    """Under ZeRO-3, its loss fused in training: the directions are those of the dense gradient in plain torch."""
    model, data = save_model(tmp_path / "model", tie_word_embeddings=False), save_sums(tmp_path / "train.jsonl", 20)
    config = run_config(
        model, data, tmp_path / "run", lora={"rank": 2, "init": "gradient", "targets": ["q_proj", "lm_head"]},
        chain={"length": 1}, deepspeed=ENGINES["zero3"], optim={"micro_batch_size": 2},
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    first, second = run_distributed(head_starts, 2, path)
    for name, start in first[0].items():
        assert torch.equal(start, second[0][name])
    plain = run_distributed(head_starts, 1, path)[0]
    (head,) = {name.rpartition(".")[0] for name in first[0] if "lm_head" in name}
    _, _, Vh = torch.linalg.svd(plain[1].double(), full_matrices=False)
    for starts in (first[0], plain[0]):
        rows_of_A = torch.linalg.qr(starts[f"{head}.start_A"].double().T)[0]
        assert ((Vh[:2] @ rows_of_A).square().sum(1) > 0.99).all()


def head_starts(process, path):
    """Starts, with the loss fused as training has it; by one process also the dense gradient of the head."""
    from cola_ds.data.batch import IGNORED
    from cola_ds.evaluation import fused_loss
    from cola_ds.evaluation.logits import labelled_logits
    from cola_ds.training.state import step_examples

    chain = make_chain(process, path)
    assert fused_loss.allow(chain.engine)
    starts = starts_of(chain)
    assert chain.engine.module in fused_loss._FUSED
    gradient = None
    if process.world_size == 1:
        model, total = chain.engine.module, 0.0
        inputs = []
        hook = model.lm_head.register_forward_hook(lambda _, args, out: inputs.append((args[0], out)))
        chain.engine.eval()
        for batch in step_examples(chain, 0).micro_batches:
            with fused_loss.unfused(model):
                labelled_logits(chain.engine, batch)
            hidden, logits = inputs.pop()
            hidden, logits, labels = (each.flatten(0, 1) for each in (hidden, logits, batch.labels.unsqueeze(-1)))
            labels = labels.squeeze(-1)
            probabilities = logits.detach().float().softmax(-1)
            kept = labels != IGNORED
            probabilities[kept, labels[kept]] -= 1
            total = total + probabilities[kept].T @ hidden.detach().float()[kept]
        hook.remove()
        gradient = total
    return {name: start for name, start in starts.items() if "lm_head" in name}, gradient


def cut_off(process, path, on, link=1):
    """Let no gradient reach the second block's attention, on some of the processes."""
    from cola_ds.errors import UserError

    chain = make_chain(process, path)
    chain.state.step = KNOTS[0] if link > 1 else 0
    if process.rank in on:
        attention = chain.engine.module.model.layers[1].self_attn
        attention.register_forward_hook(lambda _, args, out: (out[0].detach(), *out[1:]))
    try:
        return {name: float(start.norm()) for name, start in starts_of(chain, link).items()}
    except UserError as error:
        return str(error)


def cut_off_once(process, path):
    """The first step's gradient does not reach the first block's attention. Returns how much of each layer's directions are
    those of the second step there, and of both elsewhere, with nothing cut off; and how many steps' examples were taken."""
    from cola_ds.training import first_gradient, place_start

    chain, taken, kind = make_chain(process, path), [], first_gradient.GradientProducts

    class Both(kind):
        def __init__(self, chain):
            super().__init__(chain)
            self._take([first_gradient.step_examples(chain, step) for step in (0, 1)])
            self._settled = True

    place_start.GradientProducts = Both
    of_both = starts_of(chain)
    place_start.GradientProducts = kind
    chain.state.step = 1
    of_second = starts_of(chain)
    chain.state.step = 0
    is_first, inner = [], (first_gradient.step_examples, first_gradient.loss_sum, kind._take, kind._products)
    chain.engine.module.model.layers[0].self_attn.register_forward_hook(
        lambda _, args, out: (out[0].detach(), *out[1:]) if is_first[0] else out
    )

    def of_a_batch(model, batch):
        loss = inner[1](model, batch)
        is_first.pop(0)
        return loss

    def take(self, of_steps):
        self.firsts = [each is taken[0] for each in of_steps for _ in each.micro_batches]
        inner[2](self, of_steps)

    def products(self, *facts):
        is_first[:] = self.firsts
        return inner[3](self, *facts)

    first_gradient.step_examples = lambda chain, step: (taken.append(inner[0](chain, step)), taken[-1])[1]
    first_gradient.loss_sum, kind._take, kind._products = of_a_batch, take, products
    shares = {}
    for name, start in starts_of(chain).items():
        expected = (of_second if ".layers.0." in name else of_both)[name].double()
        one, two = (
            torch.linalg.qr(each.T if name.endswith("start_A") else each)[0] for each in (start.double(), expected)
        )
        shares[name] = float((one.T @ two).square().sum() / one.shape[1])
    return shares, len(taken)


def test_a_layer_that_the_first_step_does_not_reach_has_the_next_one_s_gradient(toy, tmp_path):
    path = save_run(tmp_path / "run.yaml", config_for(toy, "gradient", tmp_path / "run"))
    for shares, taken in run_distributed(cut_off_once, 2, path):
        assert taken == 2 and len(shares) == 8
        assert all(share > 0.99 for share in shares.values()), shares


def test_a_layer_that_no_gradient_reaches_is_named_by_all(toy, tmp_path):
    path = save_run(tmp_path / "run.yaml", config_for(toy, "gradient", tmp_path / "run"))
    for said in run_distributed(cut_off, 2, path, [0, 1]):
        assert said == (
            "lora.init gradient: no example of steps 0 to 5 has a gradient that reaches model.layers.1.self_attn.q_proj (and 1 "
            "more); leave it out of lora.targets, or use another lora.init"
        )
    # A link that follows cannot have another lora.init, nor other targets: it begins there anyhow.
    first, second = run_distributed(cut_off, 2, path, [0, 1], 2)
    assert first == second
    assert all(size > 0 for size in first.values())
    # At stage 3 all must gather what any one does: there no layer can be left out by some of them.
    path = save_run(tmp_path / "run.yaml", config_for(toy, "gradient", tmp_path / "run", "zero2"))
    first, second = run_distributed(cut_off, 2, path, [1])
    assert first == second
    assert all(size > 0 for size in first.values())


class _Dense:
    """Products with whole gradients, in `GradientProducts`' place, that note how much there is of as many columns."""

    gradients: ClassVar[dict[str, torch.Tensor]] = {}
    most: ClassVar[int] = 0

    def __init__(self, chain):
        pass

    def _products(self, by, transposed):
        found = {n: (self.gradients[n].T if transposed else self.gradients[n]) @ each for n, each in by.items()}
        type(self).most = max(self.most, bytes_of(30))
        return found

    def times(self, right):
        return self._products(right, False)

    def transposed_times(self, left):
        return self._products(left, True)


def bytes_of(columns):
    """Of all tensors that there are of so many columns."""
    alive = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum(each.nbytes for each in alive if each.ndim == 2 and each.shape[1] == columns)


def test_directions_of_a_gradient_take_one_product_by_rows_and_one_by_columns(monkeypatch):
    """As the plan counts: (in + out) k fp32 numbers of all layers, k being 2 * 7 + 16."""
    from cola_ds.training import place_start

    sizes = {"q": (50, 40), "k": (64, 33), "v": (32, 70)}
    model = nn.ModuleDict({name: LoRALinear(nn.Linear(*size), 0.0, train_bias=False) for name, size in sizes.items()})
    _Dense.gradients = {
        name: torch.randn(out, 14) @ torch.diag(0.8 ** torch.arange(14)) @ torch.randn(14, into)
        for name, (into, out) in sizes.items()
    }
    monkeypatch.setattr(place_start, "GradientProducts", _Dense)
    config = SimpleNamespace(lora_ranks=[7], run=SimpleNamespace(seed=0))
    chain = SimpleNamespace(engine=SimpleNamespace(module=model), config=config)
    before, held = bytes_of(30), sum(4 * 30 * sum(size) for size in sizes.values())
    for name, _, S, V in place_start._of_gradient(chain, 1):
        _, expected, Vh = torch.linalg.svd(_Dense.gradients[name].double(), full_matrices=False)
        torch.testing.assert_close(S[:7], expected[:7], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((V[:, :7].T @ Vh[:7].T).abs(), torch.eye(7).double(), rtol=1e-3, atol=1e-3)
    assert _Dense.most - before == held


# -- what starts cost --------------------------------------------------------------------------------------------------


def count_starts(process, paths):
    """What the collectives of a start carry, and of a step; whether a start is without a trace; what it finds."""
    from cola_ds.training.first_gradient import GradientProducts
    from cola_ds.training.loop import tune_lora
    from cola_ds.training.place_start import place_start

    found = {}
    for init, path in paths.items():
        chain = make_chain(process, path)
        outputs(chain, next_batch(chain))
        with CountedCollectives() as start:
            place_start(chain, 1)
        with CountedCollectives() as steps:
            tune_lora(chain)
        given = [size for name, size in start.calls if "reduce" in name]
        found[init] = [size for _, size in start.calls], [size for _, size in steps.calls], given
    for way in ("plain", "measured"):  # dropout is on
        chain = make_chain(process, paths["gaussian"])
        for step in range(4):
            if way == "measured" and step < 2:  # before any step, and between two
                layers = lora_layers(chain.engine.module).items()
                GradientProducts(chain).times({name: torch.ones(layer.in_features, 2) for name, layer in layers})
                assert not any(param.grad is not None for param in chain.engine.module.parameters())
            with CountedCollectives() as steps:
                step_once(chain)
        found[way] = whole_weights(chain), sum(size for _, size in steps.calls)
    return found


def step_once(chain):
    from cola_ds.training.loop import train_step
    from cola_ds.training.state import step_examples

    train_step(chain.engine, step_examples(chain, chain.state.step), 1e-2, chain.world_size)
    chain.state.step += 1


@pytest.mark.parametrize(("engine", "recomputes"), [("zero3", True), ("zero2", False)])
def test_a_start_moves_no_more_than_a_layer_at_a_time_and_leaves_no_trace(tmp_path, engine, recomputes):
    model, data = (
        save_model(tmp_path / "model", hidden_size=96, intermediate_size=64),
        save_sums(tmp_path / "t.jsonl", 20),
    )
    paths = {}
    for init in ("gaussian", "pissa", "gradient"):
        config = run_config(
            model, data, tmp_path / init, lora={"rank": 1, "init": init, "dropout": 0.2}, chain={"length": 1},
            model={"activation_checkpointing": recomputes}, optim={"max_steps": 3, "micro_batch_size": 2},
            deepspeed=ENGINES[engine],
        )  # fmt: skip
        paths[init] = save_run(tmp_path / f"{init}.yaml", config)
    weight, k = 4 * 96 * 96, 2 * 1 + 16
    for found in run_distributed(count_starts, 2, paths):
        assert found["gaussian"][0] == []
        sizes, steps, _ = found["pissa"]
        assert max(sizes) == (4 * 96 * k if engine == "zero3" else 4 * 2 * 96)  # products, and what process 0 has found
        assert max(sizes) < weight / 2
        sizes, steps, _ = found["gradient"]
        assert max(sizes) <= max(*steps, weight)  # weights as they are gathered in any pass
        assert max(found["gradient"][2]) <= 4 * 96 * k < weight / 2  # of gradients products alone
        reduced = [size for size in sizes if size == 4 * 96 * k]
        assert len(reduced) >= 4 * 2  # four passes, of two layers' q_proj at least
        for name, tensor in found["plain"][0].items():
            assert torch.equal(found["measured"][0][name], tensor), name
        assert found["measured"][1] == found["plain"][1]


def test_a_switch_at_its_default_is_no_switch(toy, tmp_path):
    """Spelled out, too, all of them leave the bits of a run that names none."""
    spelled = {
        "lora": {"alpha": 8, "train": "both", "init": "gaussian", "scaling": "alpha/r", "bias": "none", "dropout": 0.0},
        "chain": {
            "length": LINKS,
            "optimizer_at_knot": "reset",
            "merge_weight": 1.0,
            "knots": "even",
            "diagnostics": False,
        },
        "optim": {"max_steps": STEPS, "lr_ratio": 1.0},
    }
    plain = {"lora": {"alpha": 8}, "chain": {"length": LINKS}, "optim": {"max_steps": STEPS}}
    found = []
    for name, sections in (("spelled", spelled), ("plain", plain)):
        weights = train_in(tmp_path / name, run_config(*toy, "unused", **sections))
        losses = [row["loss"] for row in rows(tmp_path / name / "run/metrics.jsonl")]
        found.append((weights, losses))
    assert found[0] == found[1]
