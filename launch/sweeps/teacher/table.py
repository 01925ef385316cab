"""What is left to learn from a teacher of known rank, by method and by link: tables, a CSV and a picture.

    python launch/sweeps/teacher/table.py SWEEP_DIR... [--csv FILE] [--figure FILE]

Reads the runs of sweeps beside this file. A residual is (a run's held-out loss - the teacher's) / (the base's - the teacher's): 1
where nothing has been learnt, 0 where all has. Of a method the learning rate is shown whose mean loss is lowest over the seeds
that all of its learning rates have.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import yaml
from scipy import stats


class Run(NamedTuple):
    """A finished run of a sweep."""

    task: str
    method: str
    point: str
    seed: int
    rank: int
    """Of the teacher's update."""
    links: int
    residuals: list[float]
    """After each link."""


def read_run(folder: Path) -> Run:
    """A run from its folder, TASK/METHOD/POINT/seed=N of a sweep's."""
    *_, task, method, point, seed = folder.parts
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    facts = json.loads(Path(config["data"]["train"]).with_name("teacher.json").read_text(encoding="utf-8"))
    with open(folder / "evals.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    losses = list({row["link"]: row["loss"] for row in rows}.values())  # the last of each link is that of its knot
    span = facts["base_loss"] - facts["teacher_loss"]
    residuals = [(loss - facts["teacher_loss"]) / span for loss in losses]
    return Run(task, method, point, int(seed.partition("=")[2]), facts["rank"], len(losses), residuals)


def chosen(runs: list[Run]) -> list[Run]:
    """Those of the learning rate that is best over the seeds which all of them have."""
    by_point: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        by_point[run.point][run.seed] = run
    common = set.intersection(*(set(seeds) for seeds in by_point.values()))
    best = min(by_point.values(), key=lambda seeds: statistics.fmean(seeds[seed].residuals[-1] for seed in common))
    return [best[seed] for seed in sorted(best)]


def interval(values: list[float]) -> float:
    """Half of the mean's 95% interval by Student's t; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def draw(cells: dict[tuple[str, str], list[Run]], path: Path) -> None:
    """The residual by link, a panel for each task."""
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in cells))
    methods = sorted({method for _, method in cells})
    colours = {method: f"C{number % 10}" for number, method in enumerate(methods)}
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4), layout="constrained", squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        for (of, method), runs in cells.items():
            if of != task:
                continue
            counts = {run.links for run in runs}
            if counts == {1} or len(counts) > 1:  # no common links: what is left at the end, as a line to compare with
                left = statistics.fmean(run.residuals[-1] for run in runs)
                axes.axhline(left, linestyle="--", label=method, color=colours[method])
                continue
            means = [statistics.fmean(each) for each in zip(*(run.residuals for run in runs), strict=True)]
            share = [(number + 1) / len(means) for number in range(len(means))]
            axes.plot(share, means, "o-", label=method, markersize=4, color=colours[method])
        axes.set(title=task, xlabel="share of the steps", ylabel="residual", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    """Print the tables; see the top of this file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for folder in args.folders:
        for result in sorted(folder.glob("*/*/*/seed=*/result.json")):
            try:
                run = read_run(result.parent)
            except OSError as error:
                parser.error(f"{result.parent} has no residual: {error.filename} cannot be read ({error.strerror})")
            found[run.task, run.method].append(run)
    if not found:
        parser.error(f"no finished run of a sweep is in {', '.join(map(str, args.folders))}")
    cells = {where: chosen(runs) for where, runs in found.items()}
    print("| task | method | links | chosen | residual | seeds |\n| --- | --- | --- | --- | --- | --- |")
    for (task, method), runs in cells.items():
        last = [run.residuals[-1] for run in runs]
        said = f"{statistics.fmean(last):.3f} ±{interval(last):.3f}"
        links = "-".join(
            str(count) for count in sorted({min(run.links for run in runs), max(run.links for run in runs)})
        )
        print(f"| {task} | {method} | {links} | {runs[0].point} | {said} | {len(runs)} |")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["task", "method", "point", "seed", "rank", "link", "residual"])
            for runs in cells.values():
                for run in runs:
                    for link, residual in enumerate(run.residuals, 1):
                        writer.writerow([run.task, run.method, run.point, run.seed, run.rank, link, f"{residual:.5f}"])
    if args.figure:
        draw(cells, args.figure)


if __name__ == "__main__":
    main()
