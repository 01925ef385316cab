"""Packed rows on real models: losses and gradients are those of the examples alone, and models that mix them up are refused."""

import pytest
import torch

from cola_ds.data.batch import PackedBatch
from cola_ds.data.batcher import Batcher
from cola_ds.data.order import Order
from cola_ds.data.packing import check_packable
from cola_ds.errors import UserError
from cola_ds.evaluation import logits, separation
from cola_ds.evaluation.loss import loss_sum
from tests.data.test_packing import Data
from tests.evaluation.test_scoring import make_engine, plain_model, skeleton, trained
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import save_model, thorough

TRAINED = ("llama", "qwen2", "opt")
LENGTHS = [3, 9, 14, 2, 20, 7, 7, 7, 12, 5, 1, 18, 4, 4, 11, 16, 2, 8, 13, 6, 10]


class Vocabulary(Data):
    """Examples of a vocabulary of 300, the first third of each not trained."""

    def _example(self, index):
        length = self.lengths[index]
        return [(37 * index + 11 * place) % 297 + 3 for place in range(length)], [(length // 3, length)]

    def __init__(self, lengths):
        super().__init__(lengths)
        self.loss_tokens = self.predictions = [length - max(length // 3, 1) for length in lengths]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models whose weights are large, so that whatever a query should not see would change its logits."""
    found = {}
    for name in TRAINED:
        options = {"init_std" if name == "opt" else "initializer_range": 0.2}
        found[name] = str(save_model(tmp_path_factory.mktemp(name), name, **options))
    return found


def plainly(folder):
    """Loss and gradient of every example alone, in one process without an engine: the mean over all trained ids."""
    model, data = plain_model(folder), Vocabulary(LENGTHS)
    loss = sum(loss_sum(model, data.collate([index])) for index in range(len(data))) / sum(data.loss_tokens)
    gradient = torch.autograd.grad(loss, list(trained(model).values()))
    return loss.detach(), dict(zip(trained(model), gradient, strict=True))


def gradient_of(engine, process, batch, loss_tokens):
    from deepspeed.utils import safe_get_full_grad

    from cola_ds.distributed import collectives

    engine.train()
    loss = loss_sum(engine, batch) / loss_tokens
    engine.backward(loss * process.world_size)
    gradient = {name: safe_get_full_grad(param).clone() for name, param in trained(engine.module).items()}
    engine.step()
    return collectives.all_reduce_sum(loss.detach().clone()), gradient


def train_here(process, folders):
    """Loss and gradient of an epoch in one step: unpacked, packed, and with each row's examples in another order."""
    process_group(process)
    data, found = Vocabulary(LENGTHS), {}
    order = Order(data.lengths, capacity=24)
    assert order.count(0, 0) == 8
    for name, folder in folders.items():
        engine = make_engine(folder)
        alone = Batcher(data, process.rank, process.world_size).step(0, 0, 24, 24 // process.world_size)
        packed = Batcher(data, process.rank, process.world_size, order).step(0, 0, 8, 8 // process.world_size)
        assert packed.loss_tokens == alone.loss_tokens
        rows = order.rows(0, 0).between(0, 8)[process.rank :: process.world_size]
        turned = data.collate_packed([row[::-1] for row in rows])
        batches = {"alone": alone.micro_batches[0], "packed": packed.micro_batches[0], "turned": turned}
        found[name] = {what: gradient_of(engine, process, batch, alone.loss_tokens) for what, batch in batches.items()}
    return found


@pytest.mark.parametrize("world_size", thorough([1, 4], [2]))
def test_packed_rows_train_as_their_examples_do(folders, world_size):
    for found in run_distributed(train_here, world_size, folders):
        for name, folder in folders.items():
            loss, gradient = plainly(folder)
            for what, (its_loss, its_gradient) in found[name].items():
                torch.testing.assert_close(its_loss, loss, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
                for param, expected in gradient.items():
                    assert expected.abs().max() > 1e-3
                    torch.testing.assert_close(its_gradient[param], expected, rtol=1e-5, atol=1e-5)
            for param, expected in found[name]["packed"][1].items():
                torch.testing.assert_close(found[name]["turned"][1][param], expected, rtol=1e-6, atol=1e-6)


# -- which models --------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {**GROUPED, "sliding_window": 6}  # shorter than the proof's examples
OLDER = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**GROUPED, "num_local_experts": 4}
RIGHT = {
    "llama": GROUPED, "qwen2": GROUPED, "qwen3": GROUPED, "mistral": WINDOW, "gemma": GROUPED, "gemma2": WINDOW,
    "gemma3_text": WINDOW, "phi3": SIZES, "gpt2": OLDER, "gpt_neox": SIZES, "mixtral": EXPERTS,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    # What alibi adds to a key's score, its place in the row makes larger by one number for a whole example.
    "falcon": {**FALCON, "alibi": False}, "falcon with alibi": {**FALCON, "alibi": True},
}  # fmt: skip


def make_model(name, options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **options)
    setattr(config, "init_std" if name == "opt" else "initializer_range", 0.2)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def as_engine(model):
    """A model where the proof expects an engine."""
    from torch import nn

    class Engine(nn.Module):
        optimizer = None

        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, **inputs):
            return self.module(**inputs)

    return Engine()


def prove(monkeypatch, model):
    """Whether the proof lets a model through; what it says if not."""
    monkeypatch.setattr(separation.collectives, "all_reduce_max", lambda values: torch.tensor(values))
    try:
        check_packable(model)
        separation.check_separation(as_engine(model), 299)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", RIGHT)
def test_models_that_keep_examples_apart(monkeypatch, name):
    model = make_model(name, RIGHT[name]).train()
    assert prove(monkeypatch, model) == ""
    assert model.training  # as before
    # Without positions, and without a mask, a row is one text.
    monkeypatch.setattr(separation, "labelled_logits", whole_row)
    assert "examples of a packed row see each other" in prove(monkeypatch, model)


def whole_row(model, batch, **more):
    if isinstance(batch, PackedBatch):
        return model(input_ids=batch.input_ids, use_cache=False, **more).logits[:, batch.positions]
    return logits.labelled_logits(model, batch)


def test_opt_does_not_without_a_mask_of_ours(monkeypatch):
    """Should Transformers learn to, this fails, and `_MASKS_WITHOUT_POSITIONS` can go."""
    monkeypatch.setattr(logits, "_MASKS_WITHOUT_POSITIONS", ())
    said = prove(monkeypatch, make_model("opt", RIGHT["opt"]))
    assert said == "OPTForCausalLM: examples of a packed row see each other (attention sdpa); set data.packing=none"


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_positions_that_do_not_restart_are_found(monkeypatch, name):
    """Examples that are apart, but where another example would stand."""

    def shifted(model, batch):
        mask = batch.attention_mask(torch.float32) if isinstance(batch, PackedBatch) else None
        places = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        return whole_row(model, batch, attention_mask=mask, position_ids=places)

    monkeypatch.setattr(separation, "labelled_logits", shifted)
    said = prove(monkeypatch, make_model(name, RIGHT[name]))
    assert bool(said) == (name == "gpt2")  # rotary positions are relative: nothing depends on where an example stands


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "mamba",
            "MambaForCausalLM: examples of a packed row would see each other: it is recurrent; set data.packing=none",
        ),
        ("rwkv", "RwkvForCausalLM: .* it is recurrent"),
        ("recurrent_gemma", "it is recurrent"),
        ("bloom", "BloomForCausalLM: .* it takes no position_ids"),
        ("mpt", "it takes no position_ids"),
    ],
)
def test_models_that_are_refused_before_their_weights_are_read(kind, reason):
    with pytest.raises(UserError, match=reason):
        check_packable(skeleton(kind))


def prove_here(process, folders):
    """The proof on real engines; what it says of each, and whether the engine trains afterwards."""
    process_group(process)
    found = {}
    for name, folder in folders.items():
        engine = make_engine(folder)
        engine.train()
        said = ""
        if name == "opt":
            logits._MASKS_WITHOUT_POSITIONS = ()
        try:
            separation.check_separation(engine, 299)
        except UserError as error:
            said = str(error)
        found[name] = (said, engine.module.training)
    return found


def test_the_proof_under_zero_3(folders):
    for found in run_distributed(prove_here, 2, folders):
        assert found["llama"] == found["qwen2"] == ("", True)
        said, trains = found["opt"]
        assert trains and said.startswith("OPTForCausalLM: examples of a packed row see each other")
