"""The schema of a run's YAML: sections, keys, defaults, and what contradicts what.

What follows from its fields is worked out beside it: steps.py, keys.py, deepspeed_json.py.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cola_ds.config.at_knot import check_at_knot, moments_of_next_link, weights_of_links
from cola_ds.config.data_section import DataConfig
from cola_ds.config.fields import LIMIT, Count, Mark, Path, Section
from cola_ds.config.plateau import PlateauConfig, read_plateau
from cola_ds.errors import quoted


def _counts(value: Any) -> bool:
    return type(value) is int and 1 <= value < LIMIT


def _lora_ranks(value: Any) -> Any:
    ranks = value if isinstance(value, list) else [value]
    if not ranks or not all(_counts(r) for r in ranks):
        raise ValueError("must be a whole number of at least 1, or one such number per link, like [8, 4]")
    return value


def _lora_trains(value: Any) -> Any:
    trains = value if isinstance(value, list) else [value]
    if not trains or not all(each in ("both", "A", "B") for each in trains):
        raise ValueError("must be both, A or B, or one of these per link, like [both, B]")
    return value


def _knots(value: Any) -> Any:
    if value == "even":
        return value
    if isinstance(value, dict) and set(value) == {"plateau"}:
        return {"plateau": read_plateau(value["plateau"])}
    if isinstance(value, dict) and len(value) == 1 and set(value) <= {"epochs", "steps"}:
        (at,) = value.values()
        if isinstance(at, list) and at and all(_counts(k) for k in at):
            if any(b <= a for a, b in itertools.pairwise(at)):
                raise ValueError("are out of order: each knot must come after the one before it")
            return value
    raise ValueError(
        "must be even, {epochs: [3]} or {steps: [125, 250]} with positive whole numbers, or {plateau: {}}: placed by the loss"
    )


def _targets(value: Any) -> Any:
    if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(t, str) and t for t in value)):
        return value
    raise ValueError("must be all-linear or a list of module name suffixes, like [q_proj, v_proj]")


def _eval_every(value: Any) -> Any:
    if value in ("epoch", "link", "end") or _counts(value):
        return value
    raise ValueError("must be epoch, link, end or a positive number of steps")


class ModelConfig(Section):
    path: Annotated[Path, Mark.CONTENT, Mark.PLACE]
    """A Hugging Face hub name or a local folder with safetensors weights."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], Mark.FIXED] = "bf16"
    """What the weights are stored in and computed in; DeepSpeed keeps fp32 masters of what is trained."""
    revision: Annotated[str | None, Mark.PLACE] = None
    """A branch, tag or commit of the hub's model; null: its main branch."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings with it."""
    links: Annotated[Path | None, Mark.CONTENT, Mark.PLACE] = None
    """The folder of a finished run of this model, whose links are tied to it first. Training goes on from there with links of its
    own, and keeps a copy of those: what it leaves is the whole chain."""
    adapter: Annotated[Path | None, Mark.CONTENT, Mark.PLACE] = None
    """The folder of a PEFT LoRA adapter of this model (safetensors), which is tied to it first, as the first link of the chain;
    likewise."""
    shards: Annotated[Literal["auto", "world", "node"], Mark.FREE] = "auto"
    """Where ZeRO-3 keeps frozen weights. node: each node has all of them in shards of its own, and none crosses a node, in a step
    or at a knot; every node has as many processes. world: in shards over all processes. auto: node where it fits."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex", "varlen", "eager"] = "auto"
    """The attention kernel. varlen: the examples of a micro batch one after the other in a row, nothing padded, by torch's own
    varlen on CUDA. auto: varlen where model, device and data can have it, else what Transformers chooses. Tasks, whose candidates
    share a prompt, have what Transformers chooses in varlen's place, too."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """For norms, rotary embeddings and gated MLPs. auto: on CUDA in bf16 or fp16 Liger's, where it is installed (pip install
    'cola_ds[kernels]') and knows the model."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, once a LoRA rank; ZeRO stage 2, text and attention varlen alone. Every micro
    batch is padded to one length, so that data.packing belongs to it."""


class LoraConfig(Section):
    rank: Annotated[int | list[int], BeforeValidator(_lora_ranks), Mark.FIXED] = 8
    """One LoRA rank for all links, or one per link."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), Mark.FIXED] = 16.0
    """scaling = alpha / rank, link by link; or as `scaling` says."""
    scaling: Annotated[Literal["alpha/r", "alpha/sqrt(r)"], Mark.FIXED] = "alpha/r"
    """What B A is multiplied by. alpha/sqrt(r): rank-stabilised LoRA (arXiv 2312.03732)."""
    train: Annotated[str | list[str], BeforeValidator(_lora_trains), Mark.FIXED] = "both"
    """Which of A and B a link trains, one for all links or one per link: both, A or B. The other is drawn anew in each link and
    stays as it is (RAC-LoRA, arXiv 2410.08305); what is trained begins at zero then."""
    init: Annotated[Literal["gaussian", "kaiming", "orthogonal", "pissa", "gradient"], Mark.FIXED] = "gaussian"
    """What a link begins with. gaussian: A drawn with variance 1 / (3 in), B zero. kaiming: A uniform, of that variance, as
    PEFT's. orthogonal: A's rows orthogonal to those of all earlier links. pissa: the leading singular directions of the weight as
    it is (arXiv 2404.02948). gradient: those of its first gradient (LoRA-GA, arXiv 2407.05000). With the last two a link
    begins at B0 A0, and trains how far A and B go from there: outputs are unchanged, and so is the weight."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of A, while training."""
    targets: Annotated[str | list[str], BeforeValidator(_targets), Mark.FIXED] = Field(default=["q_proj", "v_proj"])
    """Suffixes of module names, or all-linear (every linear layer but the output head; refused where experts are fused)."""
    bias: Annotated[Literal["none", "lora_only"], Mark.FIXED] = "none"
    """lora_only also trains the target layers' own biases, where they have one."""


class ChainConfig(Section):
    length: int = Field(default=1, ge=1, le=9999)
    """Number of links; 1 is plain LoRA. With chain.knots {plateau: ...} the most links."""
    knots: Annotated[str | dict[str, list[int] | PlateauConfig], BeforeValidator(_knots)] = "even"
    """Where links end: even, {epochs: [3]} or {steps: [125, 250]}. The last link ends with the run; an explicit list names the
    length - 1 knots before it. {plateau: {window: 20}}: where the loss no longer falls; its keys are below."""
    tie: Literal["local", "gathered"] = "local"
    """local: each process adds its part of the link to its own shard, and only A and B move. gathered: whole weights move."""
    merge: Annotated[Literal["exact", "plain"], Mark.FIXED] = "exact"
    """exact: what rounding keeps out of bf16 or fp16 weights is added back at the next knot. plain: it is lost, and reported."""
    merge_weight: Annotated[float | list[float], BeforeValidator(weights_of_links), Mark.FIXED] = 1.0
    """The factor that a link is tied with, W <- W + merge_weight * scaling * B A: one for all links, or one per link. Below 1 the
    outputs change at a knot. As the step size of Frank-Wolfe in the paper's idealised COLA (arXiv 2401.04151, algorithm 2), but
    that what came before is not shrunk."""
    optimizer_at_knot: Annotated[str | dict[str, float], BeforeValidator(moments_of_next_link)] = "reset"
    """What the next link's optimizer starts with. reset: nothing. keep: the moments and step counts of the link before.
    {prune: 0.9}: these, without those of the 0.9 of elements whose squared gradients have been smallest (after ReLoRA, arXiv
    2307.05695, which prunes each moment by itself, and warms up after each: optim.warmup_steps)."""
    diagnostics: Annotated[bool, Mark.FREE] = False
    """Find out at each knot what the link has learnt, from A and B alone: spectra, effective ranks and overlaps with earlier
    links, layer by layer, into links.jsonl; at the last knot intruder dimensions, too, of some layers where there are many. No
    result changes. (Held-out losses by link: eval.every link.)"""

    @property
    def plateau(self) -> PlateauConfig | None:
        """What says where links end, where the loss does."""
        found = self.knots.get("plateau") if isinstance(self.knots, dict) else None
        return found if isinstance(found, PlateauConfig) else None


class OptimConfig(Section):
    lr: float = Field(gt=0, allow_inf_nan=False)
    """The learning rate that the schedule begins at."""
    lr_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """B's learning rate as a multiple of lr, which stays A's (LoRA+, arXiv 2402.12354)."""
    name: Annotated[Literal["adamw", "sgd", "adagrad"], Mark.FIXED] = "adamw"
    """torch's optimizer."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls: to zero, or not at all."""
    schedule_over: Literal["chain", "link"] = "chain"
    """Whether the schedule runs once over the whole chain, or anew in each link."""
    warmup_steps: int = Field(default=0, ge=0, lt=LIMIT)
    """Linear warm-up at the start of each link, in steps."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """As the optimizer has it: decoupled with adamw, in the gradient with the others. It pulls to zero; with lora.init pissa and
    gradient to where the link began."""
    max_grad_norm: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Global gradient norm to clip to; null or 0 turns clipping off."""
    epochs: Count | None = None
    """Epochs of the whole run, whatever its links; these or `max_steps` must be given."""
    max_steps: Count | None = None
    """Steps of the whole run, whatever its epochs; null: the epochs decide."""
    global_batch_size: Count = 8
    """Examples per step, over all processes; rows of packed examples with data.packing."""
    global_batch_tokens: Count | None = None
    """With data.packing instead: tokens per step, over all processes; a step has as many rows of data.max_length as this has room
    for."""
    micro_batch_size: Count = 4
    """Examples (packed rows) per forward pass and process."""
    max_skips_in_a_row: Annotated[int, Field(ge=0, lt=LIMIT), Mark.FREE] = 5
    """Updates left out because the loss or a gradient was not finite: one more in a row, and training has failed."""

    @model_validator(mode="after")
    def _some_length(self) -> OptimConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("optim.epochs or optim.max_steps must say how long to train")
        if self.global_batch_tokens is not None and "global_batch_size" in self.model_fields_set:
            raise ValueError("optim.global_batch_tokens contradicts optim.global_batch_size: give one of them")
        return self


class EvalConfig(Section):
    every: Annotated[str | int, BeforeValidator(_eval_every)] = "epoch"
    """epoch, link, end, or a number of steps. The end of the run is always evaluated."""
    patience: Count | None = None
    """Evaluations in a row without a new best after which the run ends; null: it goes on."""
    batch_size: Count | None = None
    """The longest examples per forward pass and process, or more that are shorter, of as many tokens; null: as in training."""


class CheckpointConfig(Section):
    every_steps: Count | None = 200
    """Steps between checkpoints; null: only when a signal stops the run, and before its last knot."""
    keep: Count = 2
    """The newest checkpoints that are kept."""
    best: bool = True
    """Also write and keep a checkpoint of the lowest held-out loss."""
    on_error: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be written does to the run; the ones before it stay."""


class RunSection(Section):
    dir: Annotated[Path, Mark.FREE, Mark.PER_RUN]
    """The run's folder, made by it: its rows, links, checkpoints and result."""
    seed: Annotated[int, Field(ge=0, lt=LIMIT), Mark.PER_RUN] = 0
    """What adapters, the order of examples, dropout and a task's examples are drawn from."""
    log_every_steps: Annotated[Count, Mark.FREE] = 10
    """Steps between rows of metrics.jsonl."""
    hang_after_s: Annotated[Count | None, Mark.FREE] = 600
    """Seconds without progress of some process after which it is named and the run ends; null: never."""
    deterministic: bool = False
    """Have the accelerator give the same bits each time, as the CPU does anyway."""


TRAINING = ("cola", "lora", "full")
"""The methods that train."""


class RunConfig(Section):
    """The run's YAML, checked. Paths in it are relative to the working directory."""

    model: ModelConfig
    method: Annotated[Literal["cola", "lora", "full", "icl", "zero-shot"], Mark.FIXED] = "cola"
    """What is done: a chain of LoRA, plain LoRA, full fine-tuning, or an evaluation alone, with solved examples or without."""
    lora: LoraConfig = LoraConfig()
    chain: ChainConfig = ChainConfig()
    data: Annotated[DataConfig, Mark.CONTENT]
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, Mark.FREE] = CheckpointConfig()
    run: RunSection
    deepspeed: Annotated[Path, Mark.CONTENT, Mark.PLACE, Mark.FILE] = "auto"
    """The DeepSpeed JSON: a file, or the name of a ready one of ds_configs/, such as zero3 or zero3_bf16. auto: ZeRO's stage 2
    where every process has the memory for it, else 3."""

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        ranks, length = self.lora.rank, self.chain.length
        if self.method != "cola" and length > 1:
            raise ValueError(
                f"method {self.method} contradicts chain.length {length}: set chain.length=1 or method=cola"
            )
        if isinstance(ranks, list) and len(ranks) != length:
            raise ValueError(f"lora.rank {quoted(ranks)} names {len(ranks)} links, but chain.length is {length}")
        if isinstance(self.lora.train, list) and len(self.lora.train) != length:
            raise ValueError(
                f"lora.train {quoted(self.lora.train)} names {len(self.lora.train)} links, but chain.length is {length}"
            )
        if self.lora.init == "orthogonal" and "A" in self.lora_trains:
            raise ValueError(
                "lora.init orthogonal says how A is drawn, and lora.train A begins it at zero; use B or both"
            )
        if self.optim.lr_ratio != 1 and not self.trains_lora:
            raise ValueError(
                f"optim.lr_ratio {self.optim.lr_ratio:g} is for B, which method {self.method} has not; use cola or lora, or 1"
            )
        if self.optim.lr_ratio != 1 and set(self.lora_trains) == {"A"}:
            raise ValueError(
                f"optim.lr_ratio {self.optim.lr_ratio:g} is for B, which lora.train A does not train; use 1"
            )
        if isinstance(self.chain.knots, dict):
            (at,) = self.chain.knots.values()
            if isinstance(at, list) and len(at) != length - 1:
                raise ValueError(
                    f"chain.knots names {len(at)} knots; chain.length {length} takes {length - 1}, the last ends with the run"
                )
        check_at_knot(self)
        if self.method == "zero-shot" and not self.data.has_eval:
            raise ValueError("method zero-shot only evaluates: name data.eval or data.task")
        if self.method == "full" and self.model.shards == "node":
            raise ValueError("method full trains every weight, and model.shards node is for frozen ones; use world")
        self._check_earlier()
        if self.eval.patience is not None and (self.eval.every == "end" or not self.data.has_eval):
            raise ValueError(
                "eval.patience goes by evaluations under way: name data.eval or data.task, and another eval.every"
            )
        if self.optim.global_batch_tokens is not None and self.data.packing == "none":
            raise ValueError("optim.global_batch_tokens needs data.packing=best_fit, whose rows are full")
        if self.method == "icl" and self.data.task is None:
            raise ValueError("method icl shows solved examples of a task: name data.task")
        return self

    def _check_earlier(self) -> None:
        key = "model.links" if self.model.links is not None else "model.adapter"
        if self.model.links is not None and self.model.adapter is not None:
            raise ValueError("model.links contradicts model.adapter: give one of them")
        if self.has_earlier and self.method == "full":
            raise ValueError(
                f"method full contradicts {key}: it trains the weights that links are of; train a model made by cola-ds export"
            )
        if self.has_earlier and self.trains and self.lora.init == "orthogonal":
            raise ValueError(
                f"lora.init orthogonal knows this run's own links alone, and {key} brings earlier ones; use another lora.init"
            )

    @model_validator(mode="after")
    def _agree_with_plateau(self) -> RunConfig:
        plateau = self.chain.plateau
        if plateau is None or self.chain.length == 1:
            return self
        if plateau.loss == "held_out" and (self.eval.every in ("link", "end") or not self.data.has_eval):
            remedy = f"eval.every {self.eval.every} has none; use epoch, or a number of steps"
            if not self.data.has_eval:
                remedy = "name data.eval or data.task"
            raise ValueError(f"chain.knots: plateau with loss held_out goes by evaluations within links: {remedy}")
        if self.optim.schedule_over == "link" and self.optim.schedule != "constant":
            raise ValueError(
                f"optim.schedule_over link and optim.schedule {self.optim.schedule} want to know beforehand how long a link is, "
                "which chain.knots plateau does not say; use optim.schedule_over=chain, or optim.schedule=constant"
            )
        return self

    @property
    def trains(self) -> bool:
        return self.method in TRAINING

    @property
    def trains_lora(self) -> bool:
        return self.method in ("cola", "lora")

    @property
    def has_earlier(self) -> bool:
        """Whether links are tied to the base before the run's own."""
        return self.model.links is not None or self.model.adapter is not None

    @property
    def lora_ranks(self) -> list[int]:
        """The LoRA rank of each link, one per link."""
        return self.lora.rank if isinstance(self.lora.rank, list) else [self.lora.rank] * self.chain.length

    @property
    def lora_trains(self) -> list[str]:
        """What each link trains, one per link: both, A or B."""
        return self.lora.train if isinstance(self.lora.train, list) else [self.lora.train] * self.chain.length

    @property
    def starts_elsewhere(self) -> bool:
        """Whether links begin at factors that are not zero, of which only the change is learnt."""
        return self.lora.init in ("pissa", "gradient")

    def tied_rank(self, link: int) -> int:
        """The LoRA rank of a link as it is tied and saved: one that begins elsewhere has that start beside it."""
        return self.lora_ranks[link - 1] * (2 if self.starts_elsewhere else 1)

    @property
    def tied_weights(self) -> list[float]:
        """chain.merge_weight, one per link."""
        weight = self.chain.merge_weight
        return weight if isinstance(weight, list) else [weight] * self.chain.length

    def tied_alpha(self, link: int) -> float:
        """The alpha that a link, counted from 1, is tied with and saved as: its own, times its chain.merge_weight, and doubled
        where `tied_rank` is, so that the scaling is the same."""
        return self.alpha_of(link) * self.tied_weights[link - 1] * (2 if self.starts_elsewhere else 1)

    def alpha_of(self, link: int) -> float:
        """A link's alpha: what B A is multiplied by is always alpha_of(link) / r, for all that read a link."""
        by_root = self.lora.scaling == "alpha/sqrt(r)"
        return self.lora.alpha * (self.lora_ranks[link - 1] ** 0.5 if by_root else 1.0)


SECTIONS = tuple(
    name
    for name, f in RunConfig.model_fields.items()
    if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
)


def is_task_file(task: str) -> bool:
    """Whether data.task is a user's own, in a file."""
    return task.endswith((".yaml", ".yml"))
