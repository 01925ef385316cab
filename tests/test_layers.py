"""The layers of the package: what each room may import, wherever in a file it does so (see cola_ds/README.md)."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.toys import REPOSITORY

LOWER = {"errors", "notices", "config"}
MIDDLE = LOWER | {"data", "distributed", "run"}
MAY_IMPORT = {
    "errors": set(),
    "notices": set(),
    "config": {"errors"},
    "data": LOWER,
    "distributed": LOWER,
    "run": LOWER,
    "lora": MIDDLE,
    "evaluation": MIDDLE,
    "checkpoint": MIDDLE | {"lora", "evaluation"},
    "training": MIDDLE | {"lora", "evaluation", "checkpoint"},
    "sweep": LOWER | {"run"},
    "report": LOWER | {"run", "sweep"},
    "theory": {"errors", "run", "report"},
    "plan": MIDDLE | {"lora", "evaluation", "training"},
    "commands": MIDDLE | {"lora", "evaluation", "checkpoint", "training", "plan"},
}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
ALSO = {("sweep", "cola_ds.distributed.signals")}  # a sweep passes on the signals that its runs listen to
FOREIGN = {"deepspeed": {"distributed"}, "torch.distributed": {"distributed"}}
"""Packages of others, and the rooms that may import them."""


def sources():
    """The text of every module by its name, but for those that only lead to others."""
    found = {}
    for path in sorted((REPOSITORY / "cola_ds").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("cola_ds", "cola_ds.__main__"):
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(text):
    """The names of all modules that a text imports, and of what it takes from them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not told apart here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name, known):
    """The module that a name is, or is in."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else None


def violations(texts):
    """A line for each import that goes up, sideways or where it must not."""
    found = []
    for name, text in texts.items():
        room = name.split(".")[1]
        for what in imports(text):
            target = module_of(what, texts)
            if target:
                other = target.split(".")[1]
                if other != room and other not in MAY_IMPORT[room] and (room, target) not in ALSO:
                    found.append(f"{name} imports {target}")
            for package, rooms in FOREIGN.items():
                if f"{what}.".startswith(f"{package}.") and room not in rooms:
                    found.append(f"{name} imports {what}")
    return found


def cycle(texts):
    """Modules that import each other in a circle; None where there is no circle."""
    graph = {name: {module_of(what, texts) for what in imports(text)} - {None, name} for name, text in texts.items()}
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    try:
        TopologicalSorter({name: targets - packages for name, targets in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_layers():
    texts = sources()
    assert {name.split(".")[1] for name in texts} == set(MAY_IMPORT)
    assert violations(texts) == []
    assert cycle(texts) is None


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cola_ds.config.steps", "from cola_ds.run import folder"),  # up
        ("cola_ds.data.text", "import cola_ds.distributed.collectives"),  # sideways
        ("cola_ds.run.lock", "from cola_ds.data.text import TokenizedData"),
        ("cola_ds.distributed.engine", "from cola_ds.lora.layers import LoRALinear"),  # it knows nothing of chains
        ("cola_ds.lora.tie", "from cola_ds.evaluation.loss import loss_sum"),
        ("cola_ds.evaluation.loss", "if True:\n    from cola_ds.lora.layers import inject"),
        ("cola_ds.checkpoint.store", "from cola_ds.training.state import Chain"),
        ("cola_ds.training.loop", "def late():\n    from cola_ds.commands.export import export"),
        ("cola_ds.commands.doctor", "from cola_ds.sweep.plan import Plan"),
        ("cola_ds.sweep.plan", "from cola_ds.training.prepare import prepare"),
        ("cola_ds.sweep.plan", "from cola_ds.distributed import collectives"),
        ("cola_ds.report.tables", "from cola_ds.checkpoint.format import Checkpoint"),
        (
            "cola_ds.theory.chains",
            "from cola_ds.lora.layers import LoRALinear",
        ),  # it is told apart from what it is about
        ("cola_ds.training.knot", "import deepspeed"),
        ("cola_ds.lora.tie", "from deepspeed.zero import GatheredParameters"),
        ("cola_ds.data.batcher", "import torch.distributed"),
        ("cola_ds.data.batcher", "from torch import distributed"),
    ],
)
def test_a_forbidden_import_is_found(module, line):
    texts = sources()
    texts[module] += f"\n{line}\n"
    assert [found.split()[0] for found in violations(texts)] == [module]


def test_a_circle_is_found():
    texts = sources()
    texts["cola_ds.data.batch"] += "\nfrom cola_ds.data.batcher import Batcher\n"
    assert set(cycle(texts)) >= {"cola_ds.data.batch", "cola_ds.data.batcher"}
