"""Running a config to its end: what `cola-ds train` does, and `cola_ds.train` from Python."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ds import notices
from cola_ds.checkpoint.decide import ResumeOptions
from cola_ds.config.schema import RunConfig
from cola_ds.data.tokenize import Found, tokenize
from cola_ds.distributed import signals, watchdog
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.session import joined
from cola_ds.errors import UserError, quoted
from cola_ds.run.folder import RunDir
from cola_ds.training.prepare import check, prepare, with_data
from cola_ds.training.prepared import Checked
from cola_ds.training.settle import settle_engine
from cola_ds.training.summary import summarize


@dataclass(frozen=True)
class RunResult:
    """What a run has come to."""

    folder: Path
    ran: bool
    """False where the run had finished before: there was nothing to do."""
    result: dict[str, Any]
    """result.json: scores, steps, links, seconds, peak memory, training FLOPs."""

    @property
    def scores(self) -> dict[str, Any]:
        """The held-out loss and perplexity, or a task's metric on dev and test; empty where nothing was held out."""
        return dict(self.result["scores"])


def train(
    config: RunConfig, *, resume: str | Path = "auto", fresh: bool = False, allow_change: Sequence[str] = ()
) -> RunResult:
    """Train as the config says, and write the run's folder: what `cola-ds train` does, in this process.

    Under a launcher each of the run's processes calls it, once, and it is collective; without one it is a run of one process. The
    keyword arguments are the command's options. In the main thread a signal (SIGINT, SIGTERM, SIGUSR1, SIGUSR2) ends the run
    after its step, with a checkpoint. Afterwards handlers, launcher's variables and process group are what they were, and
    engine and model are gone; torch's seed and, with run.deterministic, its choice of kernels stay. Only where another process of
    the run dies, or another run has taken its folder over, is this one ended too: no collective can be left.

    Raises UserError for a mistake in config, data or model, TrainingFailedError for losses, gradients or adapters that are not
    finite, and StoppedError where a signal stopped it: the same call goes on from there.
    """
    if not isinstance(config, RunConfig):
        raise UserError(f"cola_ds.train takes a RunConfig, as cola_ds.load_config(FILE) gives; it is {quoted(config)}")
    changes = (allow_change,) if isinstance(allow_change, str) else tuple(allow_change)
    with joined() as (process, end):
        return run_config(config, process, ResumeOptions(str(resume), fresh, changes), end, frees=True)


def run_config(
    config: RunConfig, process: Process, options: ResumeOptions, end: Callable[[int], Any], frees: bool = False
) -> RunResult:
    """Run a config to its end, or what is left of it. Collective. `end` ends this process, where another one died or hangs;
    with `frees`, engine and model are gone afterwards."""
    quiet_libraries(process)
    if process.rank == 0:
        notices.begin_log()
    checked = check(config)
    model = checked.config.model
    prepared = None
    if process.world_size == 1:  # nobody waits for it: a mistake in the data is said at once
        prepared = with_data(checked, 1, lambda: _tokenize(checked))
    from cola_ds.distributed import (  # deepspeed takes seconds more: not for a mistake in the config
        accelerator,
        collectives,
    )
    from cola_ds.training.run import run_prepared
    from cola_ds.training.tokenizing import tokenize_together

    if process.rank == 0:  # before the others wait for it
        check_folder(config)
    accelerator.take_device(process)  # what it can do is that of its own
    accelerator.check_dtype(config.model.dtype)
    limit_s = config.run.hang_after_s
    collectives.init_process_group(
        process,
        begin_watch=lambda share: watchdog.begin(process, limit_s, end, share),
    )
    prepared = prepared or with_data(
        checked, process.world_size, lambda: tokenize_together(config.data, checked.tokenizer, model, process)
    )
    prepared = settle_engine(prepared, collectives.hosts(), collectives.least_memory)
    if process.rank == 0:
        tell(summarize(prepared, process.world_size))
    ran = run_prepared(prepared, process, options, frees)
    folder = Path(config.run.dir)
    result = collectives.broadcast_object(
        json.loads((folder / "result.json").read_bytes()) if process.rank == 0 else None
    )
    signals.finished()
    watchdog.leave(0)
    collectives.destroy_process_group()
    if process.rank == 0:
        notices.result(f"{'done' if ran else 'this run is finished already'}: {config.run.dir}")
    return RunResult(folder, ran, result)


def _tokenize(checked: Checked) -> Found:
    """By this process alone, which says how far it is."""
    with notices.Progress("tokenizing", "row") as progress:
        return tokenize(checked.config.data, checked.tokenizer, checked.config.model, progress=progress.at)


def describe(config: RunConfig, process: Process, world_size: int) -> str:
    """What a run of the config would be on so many processes, for people: `cola-ds train --dry-run`. Raises UserError."""
    quiet_libraries(process)
    prepared = prepare(config, world_size)
    if process.rank == 0:
        check_folder(config)
    return summarize(prepared, world_size)


def check_folder(config: RunConfig) -> None:
    """Raise UserError for a run folder that cannot be written, or that holds one of the run's inputs."""
    data = config.data
    inputs = [config.model.path, *filter(None, (config.model.links, config.model.adapter, data.dir)), *data.local_names]
    RunDir(config.run.dir).check_inputs(inputs)


def tell(summary: str) -> None:
    """A run's summary; with --quiet the warnings in it alone."""
    notices.line(summary)
    for line in summary.splitlines() if notices.is_quiet() else ():
        if line.startswith("warning "):
            notices.warning(line.removeprefix("warning ").lstrip())


def quiet_libraries(process: Process) -> None:
    """One progress bar from one process: the libraries' own bars and notices stay away, but for the bars of what is fetched;
    with --quiet these, too. Warnings of theirs come from one process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import huggingface_hub
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if process.rank == 0 and notices.at_terminal() and not notices.is_quiet():  # what is fetched may take an hour
        huggingface_hub.utils.enable_progress_bars()
        datasets.enable_progress_bars()
    if process.rank != 0:
        transformers.utils.logging.set_verbosity_error()
