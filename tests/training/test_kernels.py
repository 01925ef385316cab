"""Kernels: chosen where they can be had; elsewhere a line says why not. What they compute is looked at in tests/gpu."""

import sys
from types import ModuleType

import pytest

from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError
from cola_ds.training import kernels
from tests.evaluation.test_scoring import skeleton


@pytest.fixture
def liger(monkeypatch):
    """A Liger that patches what the real one patches: norms of the instance, and names of the model's module."""
    from transformers.models.llama import modeling_llama

    def patch(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        assert not cross_entropy and not fused_linear_cross_entropy and rope and rms_norm and swiglu
        modeling_llama.apply_rotary_pos_emb = lambda query, *rest, **words: "fast"
        modeling_llama.LlamaRMSNorm = str
        model.model.norm.patched = True

    package, transformers, monkey = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    monkey.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}
    for name, module in [
        ("liger_kernel", package), ("liger_kernel.transformers", transformers),
        ("liger_kernel.transformers.monkey_patch", monkey),
    ]:  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return modeling_llama


def test_without_cuda_or_the_package_torch_has_it(monkeypatch):
    model = skeleton("llama")
    assert not kernels.check_kernels(ModelConfig(path="x"), model)
    with pytest.raises(UserError, match=r"model.kernels liger is not for this run: Liger.s kernels are not for cpu"):
        kernels.check_kernels(ModelConfig(path="x", kernels="liger"), model)
    monkeypatch.setattr(kernels.accelerator, "kind", lambda: "cuda")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert not kernels.check_kernels(ModelConfig(path="x"), model)
    with pytest.raises(UserError, match=r"liger-kernel is not installed: pip install 'cola_ds\[kernels\]'"):
        kernels.check_kernels(ModelConfig(path="x", kernels="liger"), model)


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path):
    """As one that does not go with this torch or Transformers."""
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("raise AttributeError('no triton.language here\\nand more')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(kernels.accelerator, "kind", lambda: "cuda")
    model = skeleton("llama")
    assert not kernels.check_kernels(ModelConfig(path="x", dtype="bf16"), model)
    said = r"liger-kernel cannot be imported here \(.*no triton.language here\); use torch$"
    with pytest.raises(UserError, match=said):
        kernels.check_kernels(ModelConfig(path="x", kernels="liger"), model)


def test_on_cuda_they_are_for_models_that_liger_knows(monkeypatch, liger):
    monkeypatch.setattr(kernels.accelerator, "kind", lambda: "cuda")
    llama, opt = skeleton("llama"), skeleton("opt")
    assert kernels.check_kernels(ModelConfig(path="x", dtype="bf16"), llama)
    assert not kernels.check_kernels(ModelConfig(path="x", dtype="bf16", kernels="torch"), llama)
    assert not kernels.check_kernels(ModelConfig(path="x", dtype="fp32"), llama)
    assert not kernels.check_kernels(ModelConfig(path="x", dtype="bf16", compile=True), llama)
    with pytest.raises(UserError, match=r"liger is not for this run: model.compile compiles what they do; use torch"):
        kernels.check_kernels(ModelConfig(path="x", dtype="bf16", compile=True, kernels="liger"), llama)
    assert kernels.check_kernels(ModelConfig(path="x", dtype="fp32", kernels="liger"), llama)
    assert not kernels.check_kernels(ModelConfig(path="x", dtype="bf16"), opt)
    with pytest.raises(UserError, match="Liger has none for opt"):
        kernels.check_kernels(ModelConfig(path="x", kernels="liger"), opt)


def test_later_models_of_the_process_are_as_they_were(liger):
    from types import SimpleNamespace

    norm, rope = liger.LlamaRMSNorm, liger.apply_rotary_pos_emb
    model = skeleton("llama")
    for _ in range(2):
        kernels.use_kernels(model)
        assert model.model.norm.patched
        assert liger.LlamaRMSNorm is norm
        assert liger.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True)) == "fast"
    import torch

    query, turn = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    found = liger.apply_rotary_pos_emb(query, query, turn, turn)  # on the CPU, as on the meta device
    for one, other in zip(found, rope(query, query, turn, turn), strict=True):
        assert torch.equal(one, other)
