"""What a run says while it runs: rows, a progress bar, a line per knot, the monitors. Process 0 alone speaks."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from cola_ds import notices
from cola_ds.data.batch import StepExamples
from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.monitor import Monitor
from cola_ds.errors import first_line
from cola_ds.evaluation.evaluators import HeldOut, TaskScore
from cola_ds.run.folder import RunDir

T = TypeVar("T")
_WAITING_SHOWN = 0.01  # of the time: less of it is not worth a place on the bar


class MetricLogger:
    """Takes every step, knot and evaluation of a chain. All processes call it alike: a logged step is a collective."""

    def __init__(self, folder: RunDir | None, monitor: Monitor, total_steps: int, log_every_steps: int):
        """`folder` is None on every process but 0."""
        self.folder, self.monitor, self.log_every_steps = folder, monitor, log_every_steps
        self.speaks = folder is not None and total_steps > 0
        self.bar = notices.bar(total=total_steps, unit="step", mininterval=0.5) if self.speaks else None
        self.total_steps, self.steps, self._begun_at = total_steps, 0, 0
        self._begun = self._said = time.monotonic()
        self.in_short = ""
        """What the last row has found."""
        self.work: Callable[[int, StepExamples], float] | None = None
        """FLOPs that a step of a link needs, per device (work.py); None: not known."""
        self.peak_tflops: float | None = None
        """What one device could at most; None: not known."""
        self._loss = torch.zeros((), device=accelerator.device())
        self._steps = self._losses = self._tokens = 0
        self._carried_s = self._waited_s = self._flops = 0.0
        self._since: float | None = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the next row has gathered so far. Collective."""
        losses = collectives.all_gather_numbers(self._loss.item())
        seconds = self._seconds()
        return {
            "loss": losses,
            "losses": self._losses,
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds": seconds,
            "waited_s": collectives.all_reduce_max([self._waited_s])[0],
            "flops": self._flops if math.isfinite(self._flops) else None,
        }

    def go_on(self, state: dict[str, Any], rank: int, world_size: int, step: int) -> None:
        """Continue from what `state` returned, after `step` steps; at another world size process 0 takes all of it."""
        loss = state["loss"] if len(state["loss"]) == world_size else [sum(state["loss"]), *[0.0] * (world_size - 1)]
        self._loss.fill_(loss[rank])
        self._losses, self._steps, self._tokens = state["losses"], state["steps"], state["tokens"]
        self._carried_s, self._waited_s = state["seconds"], state["waited_s"]
        # Of steps that a checkpoint does not say it of, it stays unknown.
        self._flops = math.nan if state["flops"] is None and state["steps"] else state["flops"] or 0.0
        self._move(step)
        self._begun_at = step

    def say(self, message: str) -> None:
        """One line, from process 0."""
        if self.folder:
            notices.notice(message)

    def warn(self, message: str) -> None:
        """One line, from process 0, of what may have been meant otherwise."""
        if self.folder:
            notices.warning(message)

    def figure(self, name: str, find: Callable[[], T]) -> T | None:
        """What `find` returns: a figure that is only reported. Whatever keeps it from being found costs that figure alone: it is
        None then, and a line and an event say why."""
        try:
            return find()
        except Exception as error:
            self.warn(f"no {name}: {first_line(error)}")
            self.event("no figure", figure=name, reason=first_line(error))
            return None

    def event(self, what: str, **facts: Any) -> None:
        """Something that happened to the run."""
        if self.folder:
            self.folder.event(what, **facts)

    def _move(self, steps: int) -> None:
        """So many steps more are done: the bar moves, or, where there is none, a line every half minute says how far it is."""
        self.steps += steps
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self.bar.update(steps)
        now = time.monotonic()
        if self.speaks and not notices.at_terminal() and now - self._said > notices.TELLS_EVERY_S:
            self._said = now
            step_s = (now - self._begun) / max(1, self.steps - self._begun_at)
            left = datetime.timedelta(seconds=round((self.total_steps - self.steps) * step_s))
            notices.going(
                f"step {self.steps} of {self.total_steps}, {left} left at {step_s:.3g} s a step{self.in_short}"
            )

    def _seconds(self) -> float:
        """What the steps since the last row have taken."""
        return self._carried_s + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop_clock(self) -> None:
        """Leave out of step_s what follows, until `restart_clock`: an evaluation, a knot, a checkpoint."""
        self._carried_s, self._since = self._seconds(), None

    def restart_clock(self) -> None:
        """From here on it is steps again that take their time."""
        self._since = time.perf_counter()

    def step(
        self,
        where: dict[str, Any],
        loss: Tensor | None,
        examples: StepExamples,
        waited_s: float,
        now: bool,
        **facts: Any,
    ) -> None:
        """Take a step's share of the loss (on this process's device), or None if it is not finite, and the seconds that this
        process waited for its examples. Writes a row every log_every_steps, or if `now`: its loss is the mean over the steps
        that have one.

        Between rows nothing is copied from the device.
        """
        if loss is not None:
            self._loss += loss
            self._losses += 1
        self._steps += 1
        self._tokens += examples.tokens
        self._waited_s += waited_s
        self._flops += self.work(where["link"], examples) if self.work else math.nan
        self._move(1)
        if where["step"] % self.log_every_steps and not now:
            return
        total = collectives.all_reduce_sum(self._loss).item()
        mean_loss = total / self._losses if self._losses else math.nan
        seconds = self._seconds()
        # The others wait for the one that waits longest; and the device that holds most is the one that may be full.
        waited_s, memory_bytes = collectives.all_reduce_max([self._waited_s, accelerator.peak_memory_bytes()])
        tokens_per_s = self._tokens / seconds if seconds > 0 else math.nan  # a clock may be coarse
        tflops = self._flops / seconds / 1e12 if seconds > 0 else math.nan
        speed = {
            "tokens_per_s": tokens_per_s,
            "tflops": tflops,
            "peak_share": tflops / self.peak_tflops if self.peak_tflops else math.nan,
            "memory_bytes": int(memory_bytes),
            "step_s": seconds / self._steps,
            "data_wait_s": waited_s / self._steps,
        }
        if self.folder:
            row = {
                **where,
                "loss": mean_loss,
                **{key: float(value) if isinstance(value, Tensor) else value for key, value in facts.items()},
                "tokens": self._tokens,
                **speed,
            }
            self.folder.append("metrics.jsonl", row)
        found = f"loss {mean_loss:.4f}, link {where['link']}, {_in_short(speed)}"
        self.in_short = f"; {found}"
        if self.bar is not None:
            self.bar.set_postfix_str(found, refresh=False)
        self.monitor.write(
            where["step"], {"Train/loss": mean_loss, "Train/lr": facts["lr"], "Train/link": where["link"]}
        )
        self._loss.zero_()
        self._steps = self._losses = self._tokens = 0
        self._carried_s = self._waited_s = self._flops = 0.0
        self.restart_clock()

    def knot(self, row: dict[str, Any]) -> None:
        """Take a knot."""
        if self.folder:
            self.folder.append("knots.jsonl", row)
            seconds = f"tied in {row['tie_s']:.2f} s"
            if row["rebuild_s"] is not None:
                seconds += f", rebuilt in {row['rebuild_s']:.2f} s"
            notices.line(
                f"knot: link {row['link']} (LoRA rank {row['lora_rank']}) tied at step {row['step']}: "
                f"|delta| {row['delta_norm']:.4g}, loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}, {seconds}"
            )
        self.restart_clock()

    def evaluation(self, where: dict[str, Any], found: HeldOut | TaskScore) -> None:
        """Take an evaluation."""
        if isinstance(found, HeldOut):
            line = f"held-out at step {where['step']}: loss {found.loss:.4f}, perplexity {found.perplexity:.2f}"
            scalars = {"Eval/loss": found.loss, "Eval/perplexity": found.perplexity}
        else:
            line = f"{found.split} at step {where['step']}: {found.metric} {found.score:.4f}"
            scalars = {f"Eval/{found.split}_{found.metric}": found.score}
        if self.folder:
            self.folder.append("evals.jsonl", {**where, **asdict(found)})
            self._found(line)
        self.monitor.write(where["step"], scalars)
        self.restart_clock()

    def watched(self, where: dict[str, Any], found: HeldOut) -> None:
        """Take the loss on data.watch."""
        if self.folder:
            self.folder.append("watch.jsonl", {**where, **asdict(found)})
            self._found(f"watched at step {where['step']}: loss {found.loss:.4f}, perplexity {found.perplexity:.2f}")
        self.monitor.write(where["step"], {"Watch/loss": found.loss, "Watch/perplexity": found.perplexity})
        self.restart_clock()

    def close(self) -> None:
        """Take the bar down."""
        bar, self.bar = self.bar, None
        if bar is not None:
            notices.close_bar(bar)

    def _found(self, line: str) -> None:
        """What an evaluation has found: on the way of a training run, or what the command is for."""
        if self.speaks:
            notices.line(line)
        else:
            notices.result(line)


def _in_short(speed: Mapping[str, float]) -> str:
    """What the bar says of a row's speed: what is not known is left out, and waiting where there is little of it."""
    parts = [f"{speed['tokens_per_s']:.0f} tokens/s"]
    if math.isfinite(tflops := speed["tflops"]):
        share = f" ({speed['peak_share']:.0%})" if math.isfinite(speed["peak_share"]) else ""
        number = f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"
        parts.append(f"{number} TFLOP/s{share}")
    parts.append(f"{speed['memory_bytes'] / 2**30:.1f} GiB")
    if speed["step_s"] > 0 and (waiting := speed["data_wait_s"] / speed["step_s"]) > _WAITING_SHOWN:
        parts.append(f"waiting {waiting:.0%}")
    return ", ".join(parts)
