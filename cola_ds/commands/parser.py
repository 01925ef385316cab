"""The words of the command `cola-ds`: its subcommands, their options, and what their --help says."""

from __future__ import annotations

import argparse
import shlex
from typing import Any, NoReturn

from cola_ds.errors import UserError, cut

_RUN = "the run's YAML: launch/KEYS.md has its keys"
_KEY = "a key of the YAML, and what it is instead"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What the words of a command say. Raises UserError, in one line, for what they cannot."""
    args, rest = make_parser().parse_known_args(argv)
    # argparse gives up on positional arguments that follow an option; overrides may stand anywhere.
    if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
        if rest:
            words = " ".join(map(quoted_word, rest))
            raise UserError(f"{args.command}: {words} means nothing here; see cola-ds {args.command} --help")
    else:
        args.overrides = [*args.overrides, *rest]
    return args


def quoted_word(word: str) -> str:
    """A word of the command line, as a shell takes it."""
    return cut(shlex.quote(word))


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        # argparse's prog of a subcommand is the line that calls it
        command = self.prog.partition(" ")[2]
        raise UserError(f"{command}{': ' * bool(command)}{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(prog="cola-ds", description="Chain of LoRA under DeepSpeed ZeRO-3.")
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and stop")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (
        _add_train, _add_evaluate, _add_export, _add_plan, _add_doctor, _add_data, _add_inspect, _add_sweep, _add_report,
        _add_schema, _add_completion,
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
    parser.add_argument("--quiet", action="store_true", help="no bars and notices: results, warnings and errors alone")
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
    train.add_argument("config", metavar="RUN.yaml", help=_RUN)
    train.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
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
            "cola-ds evaluate runs/rte --suite lm-eval:arc_easy,hellaswag --limit 100",
        ],
    )
    evaluate.add_argument(
        "target", metavar="MODEL|RUN_DIR", help="a model's folder or hub name, or a finished run's folder"
    )
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="NAME", help="one of the eleven, or a task's YAML")
    what.add_argument(
        "--suite", metavar="lm-eval:TASK,...", help="instead: tasks of lm-eval, where that is installed (extra lm-eval)"
    )
    evaluate.add_argument("--suite-dir", metavar="FOLDER", help="with --suite: also tasks whose YAMLs are in there")
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="with --suite: the first N examples of each task alone"
    )
    evaluate.add_argument(
        "--method",
        choices=["zero-shot", "icl"],
        default="zero-shot",
        help="without examples, or with solved ones (zero-shot)",
    )
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
    export.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")
    export.add_argument(
        "--to",
        choices=["hf", "peft", "links"],
        required=True,
        help="hf: the merged model; peft: the whole chain as one adapter; links: an adapter for each link",
    )
    export.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    export.add_argument("--upto", type=int, metavar="LINK", help="leave out the links after this one, counted from 1")
    export.add_argument(
        "--svd-rank",
        type=int,
        metavar="R",
        help="with peft: the nearest adapter of this LoRA rank; what it loses is said",
    )
    export.add_argument(
        "overrides", nargs="*", default=[], metavar="model.path=FOLDER", help="where the base model lies now"
    )


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
    plan.add_argument("config", metavar="RUN.yaml", help=_RUN)
    plan.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
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
    doctor.add_argument("config", nargs="?", metavar="RUN.yaml", help=_RUN)
    doctor.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
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
    data.add_argument("config", metavar="RUN.yaml", help=_RUN)
    data.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
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
        commands, "inspect", "say how far a run is, and whether its checkpoints hold", ["cola-ds inspect runs/rte"]
    )
    inspect.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")


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
    sweep.add_argument("config", metavar="SWEEP.yaml", help="the sweep's YAML: launch/sweeps has some")
    sweep.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=_KEY)
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
            "cola-ds report runs/cola --html report.html",
        ],
    )
    report.add_argument("runs", nargs="+", metavar="RUN_DIR|SWEEP_DIR", help="folders of runs, or of sweeps")
    report.add_argument("--plot", metavar="FILE.png", help="also draw their loss curves")
    report.add_argument(
        "--html", metavar="FILE.html", help="also write a page of all that is known of them, of any state"
    )
    report.add_argument("--csv", metavar="FILE.csv", help="also write a line for every run of a task or a sweep")
    report.add_argument("--figures", metavar="DIR", help="also draw training loss, and score by chain length and rank")
    report.add_argument("--paper", metavar="TABLE", help="put the paper's numbers of that table beside ours")


def _add_schema(commands: Any) -> None:
    schema = _add_command(
        commands,
        "schema",
        "print the JSON Schema of a YAML, for editors",
        ["cola-ds schema", "cola-ds schema sweep"],
    )
    schema.add_argument("of", nargs="?", choices=["run", "sweep"], default="run", help="of which YAML (run)")


def _add_completion(commands: Any) -> None:
    completion = _add_command(
        commands,
        "completion",
        "print what completes the words of this command in a shell",
        ["cola-ds completion bash", "cola-ds completion zsh"],
    )
    completion.add_argument("shell", choices=["bash", "zsh"], help="the shell")
