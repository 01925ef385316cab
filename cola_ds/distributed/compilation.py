"""Compilation: torch.compile of a model's blocks, one by one (regional compilation), so that alike blocks share what is compiled.

Shapes are static but for how many examples a row holds, of which no generated code knows: what is compiled follows from the
LoRA rank and the sizes of the run alone, and not from which batch came first. A run that goes on computes with the same code,
and so the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cola_ds.distributed.accelerator import device
from cola_ds.errors import UserError, first_line

_VARIANTS = 1024
"""Of each piece of code; torch would run it uncompiled from the ninth LoRA rank on, without a word."""
_state = {"compiled": False}


def check_compiler() -> None:
    """Raise UserError where torch cannot compile for this device: a function of one line is compiled."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device()))
    except Exception as error:  # whatever the lack of a compiler, of Triton or of a writable folder makes torch raise
        needs = "a C++ compiler (CXX, g++)" if device().type == "cpu" else "Triton and a C compiler (CC, gcc)"
        raise UserError(
            f"model.compile: torch cannot compile here, it needs {needs}; install that, or set model.compile=false "
            f"({first_line(error)})"
        ) from None


def compile_blocks(model: Any) -> None:
    """Compile each of the model's blocks, in place, when it is first called. Raises UserError for a model that names none."""
    import torch._dynamo
    import torch._inductor.config

    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(f"model.compile: {type(model).__name__} names no blocks (_no_split_modules); set it to false")
    torch._dynamo.reset()  # what another run of this process has compiled may not lead this one elsewhere
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _VARIANTS
    if hasattr(torch._inductor.config, "deterministic"):  # kernels are not chosen by the clock
        torch._inductor.config.deterministic = True
    for block in blocks:
        block.compile(dynamic=False)
    _state["compiled"] = True


def mark_dynamic(places: Tensor) -> None:
    """Let compiled blocks take a tensor (n,) of any length from 2 on; nothing where none is compiled."""
    if _state["compiled"]:
        torch._dynamo.mark_dynamic(places, 0)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Blocks run as they are written inside the block: other shapes compile nothing there."""
    if not _state["compiled"]:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
