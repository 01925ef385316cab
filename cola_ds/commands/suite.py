"""`cola-ds evaluate --suite lm-eval:TASK,...`: tasks of lm-eval, the public evaluation harness, on a (sharded) model."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola_ds import notices
from cola_ds.commands.evaluate import evaluation_config
from cola_ds.config.deepspeed_json import complete
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import resolve
from cola_ds.errors import UserError, cut, first_line, inline, quoted
from cola_ds.run.atomic import write_atomically

FILE = "lm-eval.json"
_PREFIX = "lm-eval:"
_PLACE = "rte"  # a run's config names data: of a suite's, the harness knows, and nothing of this is read


def suite_tasks(suite: str) -> list[str]:
    """The names in lm-eval:TASK,... Raises UserError for another form, and where lm-eval is not installed."""
    tasks = [name.strip() for name in suite.removeprefix(_PREFIX).split(",")]
    if not suite.startswith(_PREFIX) or not all(tasks):
        raise UserError(f"--suite {quoted(suite)} must be lm-eval:TASK,..., such as lm-eval:arc_easy,hellaswag")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--suite {cut(suite)} needs lm-eval, which is not installed: pip install 'cola_ds[lm-eval]'")
    return list(dict.fromkeys(tasks))


def suite_config(target: str, out: str | None, world_size: int, overrides: list[str]) -> RunConfig:
    """The config that a model's folder or hub name, or a finished run's folder, is evaluated with. run.dir is where the scores
    go. Raises UserError."""
    if wrong := next((word for word in overrides if word.startswith("data.")), None):
        raise UserError(f"override {cut(wrong)}: the tasks of --suite say themselves what their data are; leave it out")
    config = evaluation_config(target, "zero-shot", _PLACE, None, out, world_size, overrides)
    if out is None and not any(word.startswith("run.dir=") for word in overrides):
        folder = str(Path(config.run.dir).with_name("lm-eval"))
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    return config


def run_suite(
    config: RunConfig, process: Any, tasks: list[str], folder: str | None, limit: int | None, fresh: bool,
    end: Callable[[int], Any],
) -> None:  # fmt: skip
    """Evaluate on tasks, of lm-eval's own or of the YAMLs in `folder`, at most the first `limit` examples of each; print the
    scores, and write them to FILE in run.dir. Collective.

    Raises UserError for tasks that are not known or whose data cannot be had, and for a model that a run refuses.
    """
    out = Path(config.run.dir) / FILE
    if out.exists() and not fresh:
        raise UserError(f"{out} already exists; name another folder by --out, or write it anew with --fresh")
    from cola_ds.training.api import quiet_libraries

    quiet_libraries(process)
    if process.rank != 0 or notices.is_quiet():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of tasks whose YAMLs leave something out
    known = _task_manager(tasks, folder)
    engine, tokenizer = _engine(config, process, end)
    found = _evaluate(engine, tokenizer, known, tasks, config.eval.batch_size or 8, limit)
    if process.rank == 0:
        table = {name: _scores(found, name) for name in found["results"]}
        notices.result(_shown(table))
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "model": config.model.path, "links": config.model.links, "adapter": config.model.adapter, "tasks": table,
            "limit": limit, "versions": found["versions"], "lm_eval": importlib.metadata.version("lm_eval"),
        }  # fmt: skip
        write_atomically(out, (json.dumps(kept, indent=2, default=str) + "\n").encode())
        notices.result(f"wrote {out}")


def _task_manager(tasks: list[str], folder: str | None) -> Any:
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--suite-dir {cut(folder)} is not a folder; name one that holds YAMLs of lm-eval's tasks")
    from lm_eval.tasks import TaskManager

    try:
        known = TaskManager(include_path=folder)
    except Exception as error:  # whatever is wrong with a YAML there
        raise UserError(f"--suite-dir {folder}: {first_line(error)}") from None
    for task in tasks:
        if task not in known.all_tasks:
            near = difflib.get_close_matches(task, known.all_tasks, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "name a folder of its YAML by --suite-dir"
            raise UserError(f"--suite: lm-eval has no task {quoted(task)}; {hint}")
    return known


def _engine(config: RunConfig, process: Any, end: Callable[[int], Any]) -> tuple[Any, Any]:
    """The model in an engine that only evaluates, a run's links tied to it, and its tokenizer. Collective."""
    from cola_ds.data.tokenizer import load_tokenizer
    from cola_ds.distributed import accelerator, collectives, watchdog
    from cola_ds.distributed.engine import build_engine, check_engine_config
    from cola_ds.distributed.loading import load_model
    from cola_ds.distributed.nodes import make_groups
    from cola_ds.evaluation.attention import choose_attention
    from cola_ds.run.fingerprint import model_fingerprint
    from cola_ds.training.earlier import tie_earlier
    from cola_ds.training.optim import optimizer_of
    from cola_ds.training.prepare import describe
    from cola_ds.training.settle import computes_on_host, settle

    described = describe(config, weights=True)
    config = described.config
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path {config.model.path}: its tokenizer has no EOS token, which lm-eval's tasks need")
    attention = choose_attention(config.model, described.skeleton, described.max_length, is_text=False)
    accelerator.take_device(process)
    accelerator.check_dtype(config.model.dtype)
    collectives.init_process_group(
        process,
        begin_watch=lambda share: watchdog.begin(process, config.run.hang_after_s, end, share),
    )
    engine_config = complete(described.engine_json, config, resolve(config, process.world_size, process.world_size))
    settled = settle(
        described, engine_config["zero_optimization"], 1, described.max_length, collectives.hosts(),
        collectives.least_memory, computes_on_host(),
    )  # fmt: skip
    engine_config = {**engine_config, "zero_optimization": settled.zero}
    check_engine_config({**described.engine_json, **engine_config}, config.deepspeed)
    model = load_model(config.model, engine_config, attention, make_groups(settled.nodes) if settled.nodes else None)
    model.requires_grad_(False)
    base = collectives.on_rank_0(lambda: model_fingerprint(config.model))
    if config.has_earlier:
        tie_earlier(model, config, base, [], {}, reads=process.rank == 0)
    engine = build_engine(model, engine_config, optimizer_of(config.optim, model))
    engine.train(False)
    return engine, tokenizer


def _evaluate(
    engine: Any, tokenizer: Any, known: Any, tasks: list[str], batch_size: int, limit: int | None
) -> dict[str, Any]:
    """What lm-eval finds: the same on every process, each of which goes through all tasks. Collective."""
    import lm_eval
    import lm_eval.api.task as of_tasks
    import lm_eval.evaluator

    from cola_ds.evaluation.harness import ShardedLM

    of_tasks.tqdm = functools.partial(of_tasks.tqdm, disable=True)  # a bar for each task on each process
    # Of the folder that this is called in, where git complains if it is no repository.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    model = ShardedLM(engine, tokenizer, batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=known, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except Exception as error:  # whatever the hub, the network, or a task's YAML or its code raise
        if model.asked:
            raise
        raise UserError(f"--suite: the data of {', '.join(tasks)} cannot be had: {first_line(error)}") from None
    return found or {}  # it gathers on the first process of each node alone


def _scores(found: dict[str, Any], task: str) -> dict[str, Any]:
    """A task's metrics by name, each with its standard error; and how many examples it had."""
    said = found["results"][task]
    metrics = {}
    for name, value in said.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = said.get(f"{metric}_stderr,{kind}")
            metrics[metric if kind == "none" else name] = {
                "value": value, "stderr": error if isinstance(error, (int, float)) else None
            }  # fmt: skip
    return {"examples": found["n-samples"].get(task, {}).get("effective"), "metrics": metrics}


def _shown(table: dict[str, Any]) -> str:
    lines = ["| task | examples | metric | value |", "| --- | --- | --- | --- |"]
    for task, said in table.items():
        for metric, score in said["metrics"].items():
            error = "" if score["stderr"] is None else f" ±{score['stderr']:.4f}"
            examples = "" if said["examples"] is None else f"{said['examples']:,}"
            value = f"{score['value']:.4f}" if abs(score["value"]) < 1e6 else f"{score['value']:.4g}"  # a perplexity
            names = [inline(name).replace("|", "\\|") for name in (task, metric)]
            lines.append(f"| {names[0]} | {examples} | {names[1]} | {value}{error} |")
    return "\n".join(lines)
