"""The state of a chain on its way."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from cola_ds.checkpoint.decide import Identity
from cola_ds.checkpoint.format import Counters
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import StepPlan
from cola_ds.data.batch import StepExamples
from cola_ds.data.batcher import Batcher
from cola_ds.data.tasks.dataset import TaskData
from cola_ds.distributed.engine import Engine
from cola_ds.lora.remainders import Remainder
from cola_ds.lora.tie import Links
from cola_ds.run.earlier import Earlier
from cola_ds.run.folder import RunDir
from cola_ds.training.metrics import MetricLogger


@dataclass(kw_only=True)
class ChainState:
    """All that changes while a chain runs, besides the engine. Steps are optimizer updates, those left out included."""

    link: int = 1
    """The one that is being tuned; length + 1 when the last is tied."""
    step: int = 0
    step_in_link: int = 0
    examples_seen: int = 0
    link_tokens: list[int] = field(default_factory=lambda: [0])
    """Tokens that each link was trained on so far."""
    skipped_steps: int = 0
    """Updates that were left out because the loss or a gradient was not finite."""
    skipped_in_link: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    """The step after which the last evaluation was."""
    best_step: int = 0
    best: float = math.inf
    """The lowest objective (run/scores.py) so far, and the step it was found after."""
    no_better: int = 0
    """Evaluations since then."""
    ended_step: int | None = None
    """Where eval.patience has ended the run."""
    decided: list[int] = field(default_factory=list)
    """Knots that the loss has placed (chain.knots: {plateau: ...}), those of most_steps with them."""
    link_losses: list[float] = field(default_factory=list)
    """What it goes by in this link: the means of its windows, or the objectives of its evaluations."""
    window_loss: float = 0.0
    """The sum of the finite training losses of the window that is under way, and how many they are."""
    window_steps: int = 0
    change_square: float = 0.0
    """Squared norm of all links' sum: of the change of the base weights that was wanted; below 0 where an earlier version did not
    know it."""
    link_hashes: list[str] = field(default_factory=list)
    """SHA-256 of each tied link's file. On process 0 alone."""
    remainders: dict[str, Remainder] = field(default_factory=dict)
    """By target layer in bf16 or fp16, on the host: what rounding has kept out of the weights that this process ties."""
    earlier: dict[str, Links] = field(default_factory=dict)
    """By target layer, on the host: the links that were tied before, of the layers that this process minds (`tie_link`)."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What every checkpoint of a run says alike. On process 0 alone."""

    config: RunConfig
    identity: Identity
    model: str
    """The base model's fingerprint."""
    base_links: list[str] | None
    """SHA-256 of what was tied to that before the run's own links."""
    versions: dict[str, str]
    elapsed_s: float
    """Seconds that earlier starts of the run took."""
    since: float
    """When this start began (time.perf_counter)."""


@dataclass(kw_only=True)
class Chain:
    """A chain on its way: the engine, what it learns from, and how far it is."""

    config: RunConfig
    base: str
    """The base model's fingerprint."""
    earlier: Earlier | None = None
    """What was tied to that before the chain's own links, if anything. On process 0 alone."""
    drawn_before: int = 0
    """How many links that were."""
    step_plan: StepPlan
    engine: Engine
    engine_config: dict[str, Any]
    world_size: int
    train: Batcher
    held_out: Batcher | None
    watched: Batcher | None
    """data.watch."""
    test: TaskData | None
    """Of a task: what is scored whenever `held_out`, its dev split, is better than before."""
    tokenizer: Any
    logger: MetricLogger
    in_nodes: bool
    """Whether each node keeps the base in shards of its own."""
    folder: RunDir | None
    """Takes the tied links; None on every process but 0."""
    restored: bool = False
    """Whether it was put where a checkpoint left it: what its link begins with is there."""
    loaded: dict[str, float] = field(default_factory=dict)
    """How long the weights took, their bytes, and GB/s. On process 0 alone."""
    state: ChainState = field(default_factory=ChainState)
    facts: RunFacts | None = None
    """What every checkpoint of the run says alike; None on every process but 0, and where nothing is saved."""

    @property
    def links(self) -> int:
        """Its length: chain.length, unless eval.patience has ended it before. Where the loss places the knots, as far as it is
        known."""
        return len(self.step_plan.knots)

    @property
    def is_scored(self) -> bool:
        """Whether a task's metric, and not the held-out loss, says which step is the best."""
        return self.test is not None and self.test.is_scored

    @property
    def eval_batch_size(self) -> int:
        """Examples per forward pass and process in an evaluation."""
        return self.config.eval.batch_size or self.config.optim.micro_batch_size


def step_examples(chain: Chain, step: int) -> StepExamples:
    """This process's share of the examples of a step, counted from 0."""
    size = chain.step_plan.global_batch_size
    return chain.train.step(step, chain.config.run.seed, size, chain.config.optim.micro_batch_size)


def position(chain: Chain) -> dict[str, Any]:
    """Where the chain is, for a row: the link is that of the last step."""
    step = chain.state.step
    return {"step": step, "link": chain.step_plan.link_of(step), "epoch": chain.step_plan.epochs.passed(step)}


def counters(state: ChainState) -> dict[str, Any]:
    """A chain's state as JSON can say it: without what tying the links again gives back."""
    again = ("remainders", "earlier")
    found = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in again}
    return {name: None if value == math.inf else value for name, value in found.items()}


def from_counters(found: Counters) -> ChainState:
    """What `counters` was given."""
    known = found.model_dump()
    return ChainState(**{**known, "best": math.inf if found.best is None else found.best})
