"""The words of the command `cola-ds`: its subcommands, their options, and what their --help says."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What the words of a command say. Exits with status 2 for what they cannot."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positional arguments that follow an option; overrides may stand anywhere.
    if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cola-ds", description="Chain of LoRA under DeepSpeed ZeRO-3.")
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and stop")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (
        _add_train, _add_evaluate, _add_export, _add_plan, _add_doctor, _add_data, _add_inspect, _add_sweep, _add_report,
    ):  # fmt: skip
        add(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from cola_ds.run.environment import version_of

        print(f"cola-ds {version_of('cola_ds')}")
        parser.exit()


def _add_command(commands: Any, name: str, purpose: str, examples: list[str]) -> argparse.ArgumentParser:
    """A subcommand, whose help ends with examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_train(commands: Any) -> None:
    train = _add_command(
        commands,
        "train",
        "train as a run's YAML says: alone, or under deepspeed or torchrun",
        [
            "cola-ds train run.yaml --dry-run --processes 8",
            "cola-ds train run.yaml optim.lr=1e-4 chain.length=3 deepspeed=zero3_bf16",
            "torchrun --nproc-per-node 8 -m cola_ds train run.yaml",
        ],
    )
    train.add_argument("config", metavar="RUN.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the resolved run, and stop")
    train.add_argument("--processes", type=int, metavar="N", help="with --dry-run: resolve for N processes")
    train.add_argument(
        "--freeze",
        metavar="DIR",
        help="write the config as it is now, and its DeepSpeed JSON, to a new folder, and stop",
    )
    train.add_argument(
        "--fresh", action="store_true", help="remove what an earlier run left in run.dir, and start anew"
    )
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): go on if run.dir holds this run; never: it must not; or from this checkpoint or run folder",
    )
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on although this key of the config has changed",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = _add_command(
        commands,
        "evaluate",
        "score a model, or what a run has learnt, on a task",
        [
            "cola-ds evaluate runs/rte --task rte --dir data/rte",
            "cola-ds evaluate facebook/opt-1.3b --task sst2 --method icl --out runs/icl",
        ],
    )
    evaluate.add_argument("target", metavar="MODEL|RUN_DIR")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--task", required=True, metavar="NAME", help="one of the eleven, or a task's YAML")
    evaluate.add_argument("--method", choices=["zero-shot", "icl"], default="zero-shot")
    evaluate.add_argument("--dir", metavar="FOLDER", help="the task's data; without it, the hub's")
    evaluate.add_argument("--out", metavar="DIR", help="the evaluation's own run folder (runs/evaluate/...)")
    evaluate.add_argument("--fresh", action="store_true", help="remove what an earlier one left there")
    evaluate.set_defaults(resume="auto")


def _add_export(commands: Any) -> None:
    export = _add_command(
        commands,
        "export",
        "write a finished run's model in another form",
        [
            "cola-ds export runs/rte --to hf --out models/rte",
            "cola-ds export runs/rte --to peft --out adapters/rte model.path=models/opt-1.3b",
        ],
    )
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument(
        "--to",
        choices=["hf", "peft", "links"],
        required=True,
        help="hf: the merged model; peft: the whole chain as one adapter; links: an adapter for each link",
    )
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("overrides", nargs="*", metavar="model.path=FOLDER", help="where the base model lies now")


def _add_plan(commands: Any) -> None:
    plan = _add_command(
        commands,
        "plan",
        "say what a run will need on a cluster, before it is there: memory, traffic, time",
        [
            "cola-ds plan run.yaml --nodes 8 --gpus 8 --memory 80GiB",
            "cola-ds plan run.yaml --gpus 8 --device A100 --memory 40GiB --host-memory 1TiB optim.micro_batch_size=1",
            "cola-ds plan run.yaml --gpus 8 --table 1,2,4,8,16",
        ],
    )
    plan.add_argument("config", metavar="RUN.yaml")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.add_argument("--nodes", metavar="N", help="nodes (1)")
    plan.add_argument("--gpus", default="1", metavar="G", help="GPUs of a node, each with one process (1)")
    plan.add_argument(
        "--device", default="H100", metavar="NAME", help="what they are, as torch names it; or cpu (H100)"
    )
    plan.add_argument("--memory", default="80GiB", metavar="SIZE", help="what each of them has (80GiB)")
    plan.add_argument("--host-memory", metavar="SIZE", help="what a node's host has")
    plan.add_argument("--network", default="50GB/s", metavar="RATE", help="of a node to the others, each way (50GB/s)")
    plan.add_argument(
        "--node-network",
        default="300GB/s",
        metavar="RATE",
        help="of a GPU to the others of its node, each way (300GB/s)",
    )
    plan.add_argument("--disk", default="2GB/s", metavar="RATE", help="at which a node reads files (2GB/s)")
    plan.add_argument("--table", metavar="N,N,...", help="a row for each of these numbers of nodes instead")


def _add_doctor(commands: Any) -> None:
    doctor = _add_command(
        commands,
        "doctor",
        "tell whether a run would work here: alone, or under any launcher",
        ["cola-ds doctor", "cola-ds doctor run.yaml", "srun --ntasks 16 cola-ds doctor run.yaml --wait 300"],
    )
    doctor.add_argument("config", nargs="?", metavar="RUN.yaml")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value")
    doctor.add_argument(
        "--dir", metavar="DIR", help="without RUN.yaml: the folder that runs will be in, instead of this one"
    )
    doctor.add_argument(
        "--wait", type=float, default=60, metavar="SECONDS", help="how long to wait for all processes to arrive (60)"
    )


def _add_data(commands: Any) -> None:
    data = _add_command(
        commands,
        "data",
        "show what a run would be trained on: counts, lengths, examples",
        [
            "cola-ds data run.yaml --show 3",
            "cola-ds data run.yaml --plot lengths.png data.max_length=1024",
            "cola-ds data run.yaml --clean",
        ],
    )
    data.add_argument("config", metavar="RUN.yaml")
    data.add_argument("overrides", nargs="*", metavar="section.key=value")
    data.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="also the first N examples, with what is trained of them marked",
    )
    data.add_argument("--plot", metavar="FILE.png", help="also draw their lengths")
    data.add_argument("--clean", action="store_true", help="remove what is kept in data.cache's folder, and stop")


def _add_inspect(commands: Any) -> None:
    inspect = _add_command(
        commands, "inspect", "how far a run is, and whether its checkpoints hold", ["cola-ds inspect runs/rte"]
    )
    inspect.add_argument("run_dir", metavar="RUN_DIR")


def _add_sweep(commands: Any) -> None:
    sweep = _add_command(
        commands,
        "sweep",
        "run tasks x methods x seeds, the best of a grid chosen on dev",
        [
            "cola-ds sweep sweep.yaml --list",
            'cola-ds sweep sweep.yaml --launcher "./launch/local.sh {run} 2" optim.epochs=3',
        ],
    )
    sweep.add_argument("config", metavar="SWEEP.yaml")
    sweep.add_argument("overrides", nargs="*", metavar="section.key=value")
    sweep.add_argument("--list", action="store_true", help="say which runs there are and how far they are, and stop")
    sweep.add_argument("--only", type=int, metavar="N", help="the run of that number in the list, and its exit status")
    sweep.add_argument("--launcher", metavar="COMMAND", help="what starts a run, instead of what SWEEP.yaml says")
    sweep.add_argument("--freeze", metavar="DIR", help="write the sweep as it is now to a new folder, and stop")


def _add_report(commands: Any) -> None:
    report = _add_command(
        commands,
        "report",
        "runs side by side, as tables",
        [
            "cola-ds report runs/lora runs/cola --plot loss.png",
            "cola-ds report runs/sweep --csv runs.csv --paper opt-1.3b",
        ],
    )
    report.add_argument("runs", nargs="+", metavar="RUN_DIR|SWEEP_DIR")
    report.add_argument("--plot", metavar="FILE.png", help="also draw their loss curves")
    report.add_argument("--csv", metavar="FILE.csv", help="also write a line for every run of a task or a sweep")
    report.add_argument("--figures", metavar="DIR", help="also draw training loss, and score by chain length and rank")
    report.add_argument("--paper", metavar="TABLE", help="put the paper's numbers of that table beside ours")
