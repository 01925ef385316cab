"""What a link begins with: draws, rows orthogonal to earlier ones, directions found from products alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cola_ds.config.schema import LoraConfig
from cola_ds.errors import UserError
from cola_ds.lora import starts
from cola_ds.lora.layers import (
    LoRALinear,
    delta_weight,
    draw_factors,
    draw_lora_A,
    frozen_factors,
    start_link,
)

SHAPES = (4, 50), (30, 4)


def test_draws():
    """Gaussian or uniform, of one variance; by the inputs of the factor that is drawn."""
    for init, bound in (("gaussian", None), ("kaiming", 1.0)):
        A, B = draw_factors(0, 1, "q", ((400, 50), (30, 400)), init, "both")
        assert B is None
        assert A.var().item() == pytest.approx(1 / 150, rel=0.03)
        none, B = draw_factors(0, 1, "q", ((400, 50), (3000, 400)), init, "A")
        assert none is None
        assert B.var().item() == pytest.approx(1 / 1200, rel=0.03)
        if bound:
            assert 0.99 / 50**0.5 < A.abs().max() <= 1 / 50**0.5
            assert B.abs().max() <= 1 / 400**0.5
        assert torch.equal(draw_factors(0, 1, "q", ((400, 50), (30, 400)), init, "B")[0], A)
    assert torch.equal(draw_factors(0, 2, "q", SHAPES, "gaussian", "both")[0], draw_lora_A(0, 2, "q", SHAPES[0]))
    assert torch.equal(draw_factors(0, 2, "q", SHAPES, "orthogonal", "B")[0], draw_lora_A(0, 2, "q", SHAPES[0]))


@pytest.mark.parametrize("train", ["both", "A", "B"])
@pytest.mark.parametrize("started", [False, True])
def test_a_link_adds_nothing_at_birth_and_trains_what_it_says(train, started):
    model = nn.ModuleDict({"q": LoRALinear(nn.Linear(50, 30), dropout=0.0, train_bias=False)})
    layer = model["q"]
    for lora_rank in (4, 3):  # anew, over what was there before
        start_link(model, 1, lora_rank, 8.0, 0, torch.device("cpu"), "gaussian", train, started)
        if started:
            draw = torch.randn
            layer.start_A.copy_(draw(lora_rank, 50))
            layer.start_B.copy_(draw(30, lora_rank))
        x = torch.randn(5, 50)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        trained = {name for name, param in model.named_parameters() if param.requires_grad}
        assert trained == {f"q.lora_{half}" for half in ("AB" if train == "both" else train)}
        beside = {"q.start_A", "q.start_B"} if started else set()
        assert frozen_factors(model).keys() == beside | {"q.lora_A", "q.lora_B"} - trained
        assert all(held.dtype == layer.weight.dtype for held in frozen_factors(model).values())
    assert not {name for name in model.state_dict() if "start" in name}


def test_a_started_link_is_what_its_factors_say():
    """Forwards and backwards, with dropout's path and without."""
    for dropout in (0.0, 1e-9):
        layer = LoRALinear(nn.Linear(50, 30), dropout=dropout, train_bias=False)
        layer.reset(torch.randn(4, 50), 2.0, torch.device("cpu"), torch.randn(30, 4), started=True)
        layer.start_A.copy_(torch.randn(4, 50))
        layer.start_B.copy_(torch.randn(30, 4))
        x = torch.randn(5, 50, requires_grad=True)
        A, B = (half.detach().clone().requires_grad_() for half in (layer.lora_A, layer.lora_B))
        B0, A0 = layer.start_B, layer.start_A
        expected = nn.functional.linear(x, layer.weight + 2.0 * ((B0 + B) @ (A0 + A) - B0 @ A0), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
        for mine, theirs in zip(found, torch.autograd.grad(expected.square().sum(), [x, A, B]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)


def difference(A, B, A0, B0):
    """The two products as one might have them: a link of A0 + A and B0 + B, less its start."""
    return torch.cat([A0 + A, A0]), torch.cat([B0 + B, -B0], dim=1)


def far_from(expected, found):
    return float((found.detach().double() - expected).norm() / expected.norm())


def test_a_small_change_of_a_large_start_is_not_lost_in_bf16():
    """Outputs and gradients against fp64, of the same bf16 numbers; the difference of two products loses the half of them."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(50, 30, bias=False).bfloat16(), dropout=0.0, train_bias=False)
    layer.reset(1e-3 * torch.randn(4, 50), 2.0, torch.device("cpu"), 1e-3 * torch.randn(30, 4), started=True)
    layer.start_A.copy_(torch.randn(4, 50))
    layer.start_B.copy_(torch.randn(30, 4))
    A, B, A0, B0 = (x.detach().double() for x in (layer.lora_A, layer.lora_B, layer.start_A, layer.start_B))
    expected = 2.0 * ((B0 + B) @ (A0 + A) - B0 @ A0)
    assert far_from(expected, delta_weight(*layer.factors(), 2.0)) < 0.005
    of_two = difference(layer.lora_A, layer.lora_B, layer.start_A, layer.start_B)
    assert far_from(expected, delta_weight(*of_two, 2.0)) > 0.5

    x, wanted = torch.randn(64, 50).bfloat16(), torch.randn(64, 30).bfloat16()
    found = torch.autograd.grad((layer(x) * wanted).sum(), [layer.lora_A, layer.lora_B])
    G = 2.0 * wanted.double().T @ x.double()
    assert far_from((B0 + B).T @ G, found[0]) < 0.01
    assert far_from(G @ (A0 + A).T, found[1]) < 0.01


def tuned(dtype, form, steps=30):
    """What a link has learnt of a change of a weight, (30, 50), in some steps of AdamW on fp32 masters: `form` makes its factors
    of copies of them in dtype, as in a step. With `difference` A0 + A and B0 + B are trained themselves."""
    draw = torch.Generator().manual_seed(0)
    x, target = torch.randn(200, 50, generator=draw).to(dtype), 1e-3 * torch.randn(30, 50, generator=draw)
    starts_at = [torch.randn(*shape, generator=draw).bfloat16().float() for shape in SHAPES]
    whole = form is difference
    masters = [nn.Parameter(start.clone() if whole else torch.zeros_like(start)) for start in starts_at]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0)
    copies = [master.detach().to(dtype).requires_grad_() for master in masters]
    A0, B0 = (start.to(dtype) for start in starts_at)

    def factors():
        return form(copies[0] - A0, copies[1] - B0, A0, B0) if whole else form(*copies, A0, B0)

    for _ in range(steps):
        A, B = factors()
        loss = ((x @ A.T) @ B.T - x @ target.to(dtype).T).float().square().mean()
        for master, grad in zip(masters, torch.autograd.grad(loss, copies), strict=True):
            master.grad = grad.float()
        optimizer.step()
        for copy, master in zip(copies, masters, strict=True):
            copy.data.copy_(master.detach())
    return delta_weight(*factors(), 1.0).detach()


def as_a_link_has_it(A, B, A0, B0):
    layer = SimpleNamespace(lora_A=A, lora_B=B, start_A=A0, start_B=B0)
    return LoRALinear.factors(layer)


def test_training_from_a_start_in_bf16_follows_fp32():
    exact = tuned(torch.float32, difference).double()
    torch.testing.assert_close(tuned(torch.float32, as_a_link_has_it).double(), exact, rtol=1e-3, atol=1e-5)
    assert far_from(exact, tuned(torch.bfloat16, as_a_link_has_it)) < 0.1
    assert far_from(exact, tuned(torch.bfloat16, difference)) > 0.5


def test_orthogonal_rows():
    earlier, drawn = torch.randn(20, 50), torch.randn(4, 50)
    found = starts.orthogonal_rows(drawn, earlier)
    assert (earlier.double() @ found.double().T).abs().max() < 1e-5
    assert found.norm().item() == pytest.approx(drawn.norm().item())
    # Of no row more than had to be taken: what is left is that of the drawn rows.
    past = earlier.double()
    projected = drawn.double() @ (torch.eye(50, dtype=torch.float64) - torch.linalg.pinv(past) @ past)
    torch.testing.assert_close(found.double(), projected * (drawn.norm() / projected.norm()), rtol=1e-5, atol=1e-5)


def leading(matrix, lora_rank, rounds):
    k = starts.sketch_width(lora_rank, matrix.shape)
    Q = starts.orthonormal(matrix @ starts.draw_sketch(0, 1, "q", (matrix.shape[1], k)))
    Z = matrix.T @ Q
    for _ in range(rounds):
        Q = starts.orthonormal(matrix @ starts.orthonormal(Z))
        Z = matrix.T @ Q
    return starts.singular(Q, Z)


@pytest.mark.parametrize(("shape", "decay"), [((33, 28), 0.99), ((28, 33), 0.99), ((120, 90), 0.85)])
def test_directions_are_those_of_the_matrix(shape, decay):
    """Exactly where k is as large as the matrix; as far as fp32 goes where its values fall."""
    wide = min(shape)
    U, V = torch.linalg.qr(torch.randn(shape[0], wide))[0], torch.linalg.qr(torch.randn(shape[1], wide))[0]
    values = torch.tensor(decay).pow(torch.arange(wide))
    matrix, r, scaling = (U * values) @ V.T, 6, 2.0
    found_U, found_S, found_V = leading(matrix, r, rounds=4)
    torch.testing.assert_close(found_S[:r].float(), values[:r], rtol=1e-5, atol=1e-6)
    assert (found_V.gather(0, found_V.abs().argmax(dim=0, keepdim=True)) > 0).all()
    A0, B0 = starts.pissa_factors(found_U, found_S, found_V, r, scaling)
    torch.testing.assert_close(scaling * B0 @ A0, (U[:, :r] * values[:r]) @ V[:, :r].T, rtol=1e-4, atol=2e-5)
    assert B0.norm().item() == pytest.approx(A0.norm().item(), rel=1e-5)
    A0, B0 = starts.gradient_factors(found_U, found_V, r)
    assert (B0.norm() * A0.norm()).item() == pytest.approx(shape[0] ** 0.5 * r / starts.GAMMA, rel=1e-4)
    torch.testing.assert_close(
        (U[:, r : 2 * r].T @ B0).abs(), torch.eye(r) * shape[0] ** 0.25 / 4, rtol=1e-3, atol=5e-3
    )
    torch.testing.assert_close((A0 @ V[:, :r]).abs(), torch.eye(r) * shape[0] ** 0.25 / 4, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("init", "ranks", "message"),
    [
        (
            "orthogonal",
            [8, 8, 8],
            "lora.init orthogonal: the links' ranks add up to 24, and q has 20; use a lower lora.rank",
        ),
        ("pissa", [8, 17], "lora.init pissa: 17 directions are wanted, and q has 16"),
        ("gradient", [8, 9], "lora.init gradient: 18 directions are wanted, and q has 16"),
        ("orthogonal", [8, 8, 4], None),
        ("pissa", [16], None),
        ("gradient", [8, 8, 8], None),
        ("gaussian", [99], None),
    ],
)
def test_a_layer_too_small_is_refused(init, ranks, message):
    config = SimpleNamespace(lora=LoraConfig(init=init), lora_ranks=ranks)
    layers = {"q": nn.Linear(20, 16)}
    if message is None:
        starts.check_starts(config, layers)
        return
    with pytest.raises(UserError) as caught:
        starts.check_starts(config, layers)
    assert message in str(caught.value)
