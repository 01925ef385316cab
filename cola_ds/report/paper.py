"""Published results: the numbers of COLA's paper (arXiv 2401.04151), and the cells that they stand beside."""

from __future__ import annotations

from collections.abc import Sequence

from cola_ds.config.schema import RunConfig
from cola_ds.config.switches import switches
from cola_ds.report.cells import Cell

PAPER_TABLES = {
    "main": """lora full cola
        sst2 - 93.33 93.32
        wsc 56.53 60.00 60.19
        cb 75.35 72.50 76.42
        wic 63.47 62.73 64.26
        boolq 70.70 68.44 72.08
        multirc 68.94 70.36 70.63
        rte 72.49 71.62 74.15
        drop - 31.34 31.49
        squad 83.23 83.07 83.56
        copa 75.80 77.50 76.80
        record - 72.14 71.02""",
    "opt-1.3b": """lora cola-2 cola-3
        wsc 56.53±7.67 59.81±4.10 60.19±3.77
        squad 83.23±1.42 83.28±1.35 83.55±0.80
        multirc 68.94±3.06 69.44±1.55 70.63±2.12
        cb 75.35±4.84 76.78±6.38 76.42±4.97
        copa 75.8±2.40 76.8±1.83 76.8±1.60
        rte 72.49±2.39 72.63±1.46 74.15±1.36""",
    "llama-2-7b": """zero-shot icl full lora cola
        wsc 36.53 62.50 62.30 57.30 59.80
        rte 62.09 72.56 86.35 85.70 86.21
        copa 79.00 91.00 86.40 84.59 85.60
        squad 55.84 86.81 91.19 90.66 90.76
        cb 32.14 82.14 90.35 - -""",
    "ranks": """lora (8,8) (8,6) (8,4) (8,2)
        cb 75.35 76.78 76.43;3.60e11 75.35;7.20e11 76.07;1.08e12
        wsc 56.53 59.81 58.26;4.28e10 57.30;8.56e10 57.30;1.28e11
        wic 63.47 63.51 63.85;5.21e11 64.04;1.04e12 63.19;1.56e12""",
    "sgd": """lora cola
        wsc 52.31 55.0
        cb 69.29 70.71
        wic 58.97 60.40
        copa 76.60 77.40
        squad 82.19 82.63""",
    "adagrad": """lora cola
        wsc 56.73 61.92
        cb 69.29 73.21
        wic 63.42 64.23
        copa 76.60 76.60
        squad 83.09 83.24""",
    "low-data": """lora cola
        sst2 89.80 90.00
        wsc 61.60 63.20
        cb 72.76 73.21
        wic 58.80 60.40
        boolq 61.60 64.19
        multirc 59.00 60.60
        rte 59.20 63.40
        squad 78.99 79.63
        drop 27.99 29.01
        copa 75.60 76.19
        record 70.00 70.20""",
    "low-data-50": """lora cola
        sst2 87.60 89.60
        wsc 60.80 61.60
        cb 70.00 70.80
        wic 60.00 62.40
        boolq 64.80 67.60
        multirc 56.80 61.20
        rte 59.20 62.80
        squad 78.03 78.59
        drop 22.32 24.10
        copa 76.40 78.00
        record 68.80 70.00""",
    "data-5000": """lora cola
        wic 68.18 69.53
        sst2 94.56 94.89
        boolq 77.02 77.66""",
    "lora-ranks": """lora-16 cola-16 lora-32 cola-32 lora-64 cola-64
        sst2 93.07 93.53 93.14 93.56 92.95 93.62
        wsc 55.96 57.88 57.50 61.15 54.80 63.08
        wic 62.31 62.60 62.94 63.73 62.28 64.23
        rte 72.70 73.72 72.49 74.51 75.66 75.60
        squad 83.22 83.57 83.18 83.57 82.97 83.44""",
}
"""By name: a line of columns, each a method, a chain's length or its LoRA ranks, and a line for each task; - where the copy of
the paper that these are from has no number to read. LoRA's in `main` are those that its other tables have."""
_NUM_TRAIN = {"low-data": 100, "low-data-50": 50, "data-5000": 5000}


def numbers_of(table: str) -> dict[tuple[str, str], str]:
    """By task and column, what a table of the paper says."""
    columns, *rows = (line.split() for line in PAPER_TABLES[table].splitlines())
    cells = {(row[0], column): text for row in rows for column, text in zip(columns, row[1:], strict=True)}
    return {where: text for where, text in cells.items() if text != "-"}


def published_scores(cells: Sequence[Cell], table: str) -> dict[tuple[str, str], str]:
    """Scores that a table of the paper has for those of our cells that are like its own, by task and name."""
    numbers, found = numbers_of(table), {}
    for cell in cells:
        if cell.config is None:
            continue
        task = next((outcome.result.get("task") for outcome in cell.finished), None) or cell.group.task
        for column in published_columns(cell.config, table):
            if text := numbers.get((task, column)):
                found[cell.group.task, cell.group.name] = text.replace("±", " ±").replace(";", "; ")
    return found


def left_out(cells: Sequence[Cell]) -> list[str]:
    """Why no number of the paper stands beside methods whose links are not its own: a line, or none."""
    found = {
        f"{cell.group.name} ({', '.join(unlike)})": None
        for cell in cells
        if cell.config is not None and cell.config.trains_lora and (unlike := _unlike(cell.config))
    }
    return [f"Without a number of the paper, which has no such links: {'; '.join(found)}."] if found else []


def _unlike(config: RunConfig) -> list[str]:
    """What of a run's links is not as the paper has it. Of other ranks than 8 it does not say alpha."""
    lora, found = config.lora, switches(config)
    if sorted(lora.targets) != ["q_proj", "v_proj"]:
        found.append(f"lora.targets {lora.targets if isinstance(lora.targets, str) else ', '.join(lora.targets)}")
    if config.lora_ranks[0] == 8 and lora.alpha != 16:
        found.append(f"lora.alpha {lora.alpha:g}")
    if lora.dropout:
        found.append(f"lora.dropout {lora.dropout:g}")
    if config.chain.plateau is not None:
        found.append("chain.knots plateau")
    return found


def published_columns(config: RunConfig, table: str) -> list[str]:
    """Columns of a table of the paper that this method stands in; none where it has nothing like it."""
    optimizer = table if table in ("sgd", "adagrad") else "adamw"
    if config.trains and (config.optim.name != optimizer or config.data.num_train != _NUM_TRAIN.get(table, 1000)):
        return []
    if not config.trains_lora:
        return [config.method]
    if _unlike(config):
        return []
    ranks = config.lora_ranks
    if table == "lora-ranks":
        return [f"{'lora' if len(ranks) == 1 else 'cola'}-{ranks[0]}"] if ranks in ([ranks[0]], [ranks[0]] * 3) else []
    if len(ranks) == 1:
        return ["lora"] if ranks == [8] else []
    if table == "main" and len(ranks) != 3:  # as its chains' scores are those of three links in the other tables
        return []
    # Where another table says cola, the paper does not say how many links.
    return [f"({','.join(map(str, ranks))})", *(["cola", f"cola-{len(ranks)}"] if set(ranks) == {8} else [])]
