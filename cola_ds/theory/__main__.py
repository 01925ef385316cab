"""Run the theory's study, and write its CSV files and pictures:

python -m cola_ds.theory FOLDER [--seed N] [--seeds N] [--longest T]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from cola_ds.errors import UserError
from cola_ds.report.files import csv_bytes
from cola_ds.run.atomic import write_folder
from cola_ds.theory import figures, study

SHORTEST = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line about the user's mistake."""
    parser = argparse.ArgumentParser(
        "python -m cola_ds.theory", description="The theory of Chain of LoRA, run on small problems."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder, for CSV files and pictures")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="the first seed of all that is drawn (default 0)")
    parser.add_argument(
        "--seeds", type=_at_least(1), default=5, help="runs with stochastic gradients, and chains (default 5)"
    )
    parser.add_argument(
        "--longest", type=_at_least(2 * SHORTEST), default=1024, help="T goes from 16 to it (default 1024)"
    )
    options = parser.parse_args(arguments)
    try:
        _study(options.folder, options.seed, options.seeds, options.longest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _study(folder: Path, seed: int, seeds: int, longest: int) -> None:
    """Raises UserError where the folder is not new or cannot be, or without matplotlib: before anything is computed."""
    plt = figures.pyplot()
    try:
        if folder.exists():
            raise UserError(
                f"{folder} is there already, and nothing in it is replaced; name a new folder, or remove it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; name a folder that can be made") from None
    lengths = [SHORTEST * 2**n for n in range(longest.bit_length()) if SHORTEST * 2**n <= longest]
    gaps = list(study.gap_rows(seed, seeds, lengths))
    rates = list(study.rate_rows(gaps))
    chains = list(study.chain_rows(seed, seeds))
    files = {"gaps.png": figures.draw_gaps(plt, gaps), "chains.png": figures.draw_chains(plt, chains)}
    for name, rows, kind in (
        ("gaps", gaps, study.GapRow), ("rates", rates, study.RateRow), ("chains", chains, study.ChainRow),
    ):  # fmt: skip
        files[f"{name}.csv"] = csv_bytes(map(study.cells, rows), [field.name for field in fields(kind)])
    try:
        write_folder(folder, files)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    for rate in rates:
        print(f"{rate.problem}, {rate.batch}: mean gap ~ T^{rate.exponent:.2f} [{rate.low:.2f}, {rate.high:.2f}]")
    print(f"written: {', '.join(str(folder / name) for name in files)}")


if __name__ == "__main__":
    raise SystemExit(main())
