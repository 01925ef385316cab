"""What a finished run leaves: the result, and with method full the model. Process 0 writes."""

from __future__ import annotations

import shlex
import statistics
import time
from typing import Any

import torch

from cola_ds.config.plateau import replay_words
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.shards import whole_state_dict
from cola_ds.run.folder import RunDir
from cola_ds.run.model_folder import write_model_folder
from cola_ds.training.flops import profiled_flops, training_flops
from cola_ds.training.prepared import Prepared
from cola_ds.training.state import Chain


def finish(chain: Chain, prepared: Prepared, loading_s: float) -> None:
    """Write what a finished run leaves, the result last."""
    watchdog.rest()
    if chain.config.method == "full":
        _save_whole_model(chain, prepared)
    chain.logger.close()
    peak = int(collectives.all_reduce_max([accelerator.peak_memory_bytes()])[0])
    held = torch.tensor([sum(r.kept.nbytes for r in chain.state.remainders.values())], device=accelerator.device())
    remainder_bytes = int(collectives.all_reduce_sum(held))
    if chain.folder:
        assert chain.facts is not None
        wall_time_s = chain.facts.elapsed_s + time.perf_counter() - chain.facts.since
        times = {"loading_s": loading_s, "wall_time_s": wall_time_s}
        memory = {"peak_memory_bytes": peak, "remainder_bytes": remainder_bytes}
        _write_result(chain, prepared, chain.folder, times | memory)


def _write_result(chain: Chain, prepared: Prepared, folder: RunDir, more: dict[str, Any]) -> None:
    """result.json, and beside it what is only reported: what of that fails costs no result."""
    try:
        folder.flush_rows()
    except OSError as error:
        chain.logger.warn(f"the last rows of {folder.path} are not written: {error.strerror or error}")
    result = {**_result(prepared, chain, folder), **more}
    folder.write_result(result)
    folder.event("finished", step=chain.state.step)
    if result["replay"]:
        throughout = "the same bits, if it had as many processes and the same values throughout"
        chain.logger.say(f"to run it again with these knots given ({throughout}): {shlex.join(result['replay'])}")
    # Counting runs the model's own code, which may do anything: the result is there already.
    tokens = chain.state.link_tokens
    counted = chain.logger.figure("profiled_flops", lambda: profiled_flops(prepared, tokens, chain.train.joined))
    if counted is not None:
        whole = {**result, "profiled_flops": counted}
        chain.logger.figure("profiled_flops", lambda: folder.write_result(whole))


def _result(prepared: Prepared, chain: Chain, folder: RunDir) -> dict[str, Any]:
    config = prepared.config
    return {
        "method": config.method,
        "task": prepared.test.task.name if prepared.test else None,
        "seed": config.run.seed,
        "scores": _task_scores(folder, chain.state.best_step) if chain.is_scored else _scores(folder),
        "steps": chain.state.step,
        "examples": chain.state.examples_seen,
        "ended_early": chain.state.ended_step is not None,
        "links": chain.links if config.trains_lora else 0,
        "knots": list(chain.step_plan.knots) if config.trains_lora else [],
        "replay": _replay(chain),
        "tokens": sum(chain.state.link_tokens),
        "skipped_steps": chain.state.skipped_steps,
        "world_size": chain.world_size,
        "data_wait_s": chain.logger.figure("data_wait_s", lambda: _waited_s(folder)),
        "tflops": chain.logger.figure("tflops", lambda: _median(folder, "tflops")),
        "peak_share": chain.logger.figure("peak_share", lambda: _median(folder, "peak_share")),
        "training_flops": chain.logger.figure(
            "training_flops", lambda: training_flops(prepared, chain.state.link_tokens)
        ),
        "profiled_flops": None,  # it follows
        "link_sha256": chain.state.link_hashes,
    }


def _replay(chain: Chain) -> list[str] | None:
    """The overrides that give a run the knots which the loss has placed, None where it was not to place any. The same bits come
    of them if nothing changed on the way: no number of processes, no value by --allow-change."""
    config = chain.config
    by_link = {
        "lora.rank": config.lora.rank,
        "lora.train": config.lora.train,
        "chain.merge_weight": config.chain.merge_weight,
    }
    return None if config.chain.plateau is None else replay_words(chain.state.decided, by_link)


def _waited_s(folder: RunDir) -> float:
    """Seconds that the steps waited for their examples, all starts of the run together."""
    metrics = folder.rows("metrics.jsonl", skip_damaged=True)
    firsts = [0, *(row["step"] for row in metrics)]
    return sum(row.get("data_wait_s", 0.0) * (row["step"] - first) for first, row in zip(firsts, metrics, strict=False))


def _median(folder: RunDir, figure: str) -> float | None:
    """The median of a figure over the rows of metrics.jsonl that have it: first steps, which take longer, hardly move it."""
    found = [row[figure] for row in folder.rows("metrics.jsonl", skip_damaged=True) if row.get(figure) is not None]
    return statistics.median(found) if found else None


def _scores(folder: RunDir) -> dict[str, Any]:
    evaluations = folder.rows("evals.jsonl", skip_damaged=True)
    return {key: evaluations[-1][key] for key in ("loss", "perplexity", "examples")} if evaluations else {}


def _task_scores(folder: RunDir, best_step: int) -> dict[str, Any]:
    """Of the best step by dev. The rows of a step are written together."""
    evaluations = folder.rows("evals.jsonl", skip_damaged=True)
    rows = {row["split"]: row for row in evaluations if row["step"] == best_step}
    scores = {"metric": rows["dev"]["metric"], "best_step": best_step}
    for split, row in rows.items():
        scores |= {split: row["score"], f"{split}_examples": row["examples"]}
    return scores


def _save_whole_model(chain: Chain, prepared: Prepared) -> None:
    model, folder = chain.engine.module, chain.folder
    state = whole_state_dict(model)
    if folder:
        folder.write_model(lambda out: write_model_folder(model, prepared.config.model, out, state))
