"""The schema of a run's YAML: sections, keys, defaults, and what contradicts what.

What follows from its fields is worked out beside it: steps.py, keys.py, deepspeed_json.py.
"""

from __future__ import annotations

import enum
import itertools
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cola_ds.errors import quoted

_LIMIT = 2**31  # nothing is counted as far
_Count = Annotated[int, Field(ge=1, lt=_LIMIT)]


class Mark(enum.Enum):
    """What a key means where a run is resumed, read or swept; keys.py answers by it. A mark of a section is one of all its keys.

    A key without a mark is compared: a run goes on with another value only by --allow-change.
    """

    FREE = "cannot change a result: where things lie, what is logged and saved"
    FIXED = (
        "what tied links and the optimizer's state were made with: not even --allow-change lets another value through"
    )
    CONTENT = "what it names is compared when a run goes on, and not the name"
    PLACE = "where something lies that was fingerprinted: whoever reads a run may find it elsewhere"
    FILE = "names a file, or something ready-made; a sweep is frozen with a copy, and compared by what it says"
    PER_RUN = "a sweep gives each of its runs its own"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def _counts(value: Any) -> bool:
    return type(value) is int and 1 <= value < _LIMIT


def _lora_ranks(value: Any) -> Any:
    ranks = value if isinstance(value, list) else [value]
    if not ranks or not all(_counts(r) for r in ranks):
        raise ValueError("must be a whole number of at least 1, or one such number per link, like [8, 4]")
    return value


def _knots(value: Any) -> Any:
    if value == "even":
        return value
    if isinstance(value, dict) and len(value) == 1 and set(value) <= {"epochs", "steps"}:
        (at,) = value.values()
        if isinstance(at, list) and at and all(_counts(k) for k in at):
            if any(b <= a for a, b in itertools.pairwise(at)):
                raise ValueError("are out of order: each knot must come after the one before it")
            return value
    raise ValueError("must be even, {epochs: [3]} or {steps: [125, 250]} with positive whole numbers")


def _targets(value: Any) -> Any:
    if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(t, str) and t for t in value)):
        return value
    raise ValueError("must be all-linear or a list of module name suffixes, like [q_proj, v_proj]")


def _path(value: str) -> str:
    if "\0" in value or len(os.fsencode(value)) > 3000:
        raise ValueError("is no path")
    if longest := [part for part in value.split("/") if len(os.fsencode(part)) > 255]:
        raise ValueError(f"has a name of {len(longest[0])} letters, and file systems take 255")
    return value


_Path = Annotated[str, Field(min_length=1), AfterValidator(_path)]


def _eval_every(value: Any) -> Any:
    if value in ("epoch", "link", "end") or _counts(value):
        return value
    raise ValueError("must be epoch, link, end or a positive number of steps")


def _sources(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value if value is None else _path(value)
    if not isinstance(value, list) or not value:
        raise ValueError(_SOURCES)
    found: list[str | SourceConfig] = []
    for number, each in enumerate(value, 1):
        if isinstance(each, (SourceConfig, dict)):
            found.append(_source(number, each))
        elif isinstance(each, str) and each:
            found.append(_path(each))
        else:
            raise ValueError(_SOURCES)
    weights = [each.weight is None for each in found if isinstance(each, SourceConfig)]
    if not all(weights) and (any(weights) or len(weights) < len(found)):
        raise ValueError("gives some of its sources a weight, and some not: give one to each, or to none")
    return found


def _source(number: int, value: Any) -> SourceConfig:
    try:
        return SourceConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"])
        said = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"source {number}: {f'{where}: ' if where else ''}{said[:1].lower()}{said[1:]}") from None


_SOURCES = (
    "must name a file, a folder, a glob or a dataset of the hub, or be a list of these and of {path: ..., weight: ...}"
)


def _tools(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value if value is None else _path(value)
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return value
    raise ValueError("must be a list of tools, each a JSON schema of a function, or name a .json file with such a list")


class ModelConfig(_Section):
    path: Annotated[_Path, Mark.CONTENT, Mark.PLACE]
    """A Hugging Face hub name or a local folder with safetensors weights."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], Mark.FIXED] = "bf16"
    """What the weights are stored in and computed in; DeepSpeed keeps fp32 masters of what is trained."""
    revision: Annotated[str | None, Mark.PLACE] = None
    """A branch, tag or commit of the hub's model; null: its main branch."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings with it."""
    links: Annotated[_Path | None, Mark.PLACE] = None
    """With methods zero-shot and icl: the folder of a finished run of this model, whose links are tied to it first."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""


class LoraConfig(_Section):
    rank: Annotated[int | list[int], BeforeValidator(_lora_ranks), Mark.FIXED] = 8
    """One LoRA rank for all links, or one per link."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), Mark.FIXED] = 16.0
    """scaling = alpha / rank, link by link."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of A, while training."""
    targets: Annotated[str | list[str], BeforeValidator(_targets), Mark.FIXED] = ["q_proj", "v_proj"]
    """Suffixes of module names, or all-linear (every nn.Linear but the output head)."""
    bias: Annotated[Literal["none", "lora_only"], Mark.FIXED] = "none"
    """lora_only also trains the target layers' own biases, where they have one."""


class ChainConfig(_Section):
    length: int = Field(default=1, ge=1, le=10_000)
    """Number of links; 1 is plain LoRA."""
    knots: Annotated[str | dict[str, list[int]], BeforeValidator(_knots)] = "even"
    """Where links end: even, {epochs: [3]} or {steps: [125, 250]}. The last link ends with the run; an explicit list names the
    length - 1 knots before it."""
    tie: Literal["local", "gathered"] = "local"
    """local: each process adds its part of the link to its own shard, and only A and B move. gathered: whole weights move."""
    merge: Annotated[Literal["exact", "plain"], Mark.FIXED] = "exact"
    """exact: what rounding keeps out of bf16 or fp16 weights is added back at the next knot. plain: it is lost, and reported."""


class SourceConfig(_Section):
    """One of several sources of `data.train` or `data.eval`. What it leaves out, `data` says for all."""

    path: _Path | None = None
    """A file, a folder of shards or a glob; this or `hub`."""
    hub: Annotated[str | None, Field(min_length=1)] = None
    """A dataset on the Hugging Face hub."""
    hub_config: str | None = None
    """The dataset's configuration, where it has several."""
    revision: str | None = None
    """A branch, tag or commit of the dataset."""
    split: str | None = None
    """The hub's split; null: train for `data.train`, validation for `data.eval`."""
    weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Its share of an epoch, beside the others' weights; null for all: every example once."""
    limit: _Count | None = None
    """Its first rows alone."""
    format: Literal["auto", "pairs", "chat", "text"] | None = None
    """As data.format."""
    prompt: str | None = None
    """As data.prompt."""
    completion: str | None = None
    """As data.completion."""
    text: str | None = None
    """As data.text."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("needs either path or hub")
        if self.hub is None and (wrong := [k for k in ("hub_config", "revision", "split") if getattr(self, k)]):
            raise ValueError(f"{wrong[0]} needs hub")
        return self


class DataConfig(_Section):
    task: Annotated[_Path | None, Mark.FILE] = None
    """A task's name, such as rte, or the path of a task's YAML; instead of `train` and `eval`."""
    dir: Annotated[_Path | None, Mark.PLACE] = None
    """The task's folder, with train.jsonl and validation.jsonl; null: the Hugging Face hub."""
    num_train: _Count = 1000
    """The task's training examples, drawn by run.seed."""
    num_dev: _Count | None = None
    """The task's held-out examples, taken from its training split; null: 100 for cb and copa, 500 for the others."""
    num_test: _Count = 1000
    """The task's test examples, drawn from its validation split."""
    demonstrations: _Count = 32
    """Solved examples in front of each prompt, with method icl."""
    train: Annotated[str | list[str | SourceConfig] | None, BeforeValidator(_sources), Mark.PLACE] = None
    """A .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow or .txt file (.gz and .zst of text too), a folder of such, one that
    Dataset.save_to_disk wrote, a glob, or the name of a dataset on the hub; or a list of these and of sources,
    `{path or hub, split, weight, limit, format ...}`, mixed by their weights. With `hub`, the name of a split."""
    eval: Annotated[str | list[str | SourceConfig] | None, BeforeValidator(_sources), Mark.PLACE] = None
    """Held-out data, likewise."""
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `eval`: this part of the training examples is held out, by content: rows of the same content are on one side,
    whatever the seed."""
    eval_examples: _Count | None = None
    """Likewise, so many examples."""
    hub: str | None = None
    """A dataset on the Hugging Face hub."""
    hub_config: str | None = None
    """The dataset's configuration, where it has several."""
    revision: str | None = None
    """A branch, tag or commit of the dataset, or of the task's data on the hub."""
    prompt: str = "prompt"
    """The prompt's column."""
    completion: str = "completion"
    """The completion's column. The loss is on the completion, and the end-of-sequence token after it, alone. Prompt and
    completion are tokenized as one text; a token that has letters of both is the completion's."""
    text: str | None = None
    """Column of plain text instead: the loss is on all of it, cut into windows of max_length."""
    format: Literal["auto", "pairs", "chat", "text"] = "auto"
    """What a row is. pairs: a prompt and a completion. chat: a conversation, in `messages`, ShareGPT's `conversations`, Alpaca's
    instruction, input and output, or a prompt and a completion, rendered by the chat template. text: plain text. auto: by the
    columns of a source's first row, where a prompt and a completion that are text stay as they are."""
    chat_template: Annotated[_Path | None, Mark.PLACE] = None
    """A Jinja file; null: the tokenizer's own chat template."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Of a conversation, what is trained: the assistant's turns, the last of them, or all that the template writes."""
    system: str | None = None
    """The system message of conversations that have none of their own."""
    tools: Annotated[str | list[dict[str, Any]] | None, BeforeValidator(_tools), Mark.PLACE] = None
    """The tools of conversations that name none of their own, as the chat template takes them: a list, or a .json file of one."""
    max_length: int = Field(default=512, ge=2, lt=_LIMIT)
    """Tokens per example, and per row where examples are packed. With a task it is 2048 by default, or the model's positions if
    they are fewer."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a longer example. truncate: it loses the beginning of its prompt (the BOS token stays), then the end of its
    completion; a conversation its end. drop: it is left out, and counted. error: the run is refused, and the row named."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of a row whose content was there before; they are counted either way."""
    packing: Literal["none", "best_fit"] = "none"
    """none: a row is an example, padded. best_fit: rows of max_length are filled with whole examples, which see nothing of each
    other; then optim's batches count rows."""
    cache: Annotated[_Path | None, Mark.FREE] = None
    """The folder that tokenized data is kept in; null: $XDG_CACHE_HOME/cola_ds or ~/.cache/cola_ds; none: tokenized at each
    start."""
    workers: Annotated[_Count | None, Mark.FREE] = None
    """Processes that tokenize; null: as many as there are processors."""

    @model_validator(mode="after")
    def _one_kind_of_example(self) -> DataConfig:
        if self.text is not None and (
            self.model_fields_set & {"prompt", "completion"} or self.format in ("pairs", "chat")
        ):
            other = "data.prompt and data.completion" if self.format == "auto" else f"data.format {self.format}"
            raise ValueError(f"data.text contradicts {other}: name either the one or the other")
        if self.hub is not None and self.train is None:
            raise ValueError("data.hub needs data.train, the name of a split, such as train")
        if self.eval_fraction is not None and self.eval_examples is not None:
            raise ValueError("data.eval_fraction contradicts data.eval_examples: give one of them")
        if self.eval is not None and self.holds_out:
            raise ValueError("data.eval contradicts data.eval_fraction and data.eval_examples: give one of them")
        if self.hub is not None and (isinstance(self.train, list) or isinstance(self.eval, list)):
            raise ValueError(
                "data.hub takes one split each for data.train and data.eval, such as train[:1000], not a list"
            )
        if self.hub is None and self.task is None and (self.hub_config or self.revision):
            raise ValueError("data.hub_config and data.revision need data.hub")
        given = self.model_fields_set - {"task", "max_length"}
        of_tasks = {"dir", "num_train", "num_dev", "num_test", "demonstrations"}
        if self.task is None and (wrong := sorted(given & of_tasks)):
            raise ValueError(f"data.{wrong[0]} needs data.task")
        if self.task is not None and (wrong := sorted(given - of_tasks - {"revision"})):
            raise ValueError(f"data.{wrong[0]} contradicts data.task: a task says itself what its rows are")
        if self.task is None and self.train is None:
            raise ValueError("data.train or data.task must say what to learn from")
        return self

    @property
    def local_names(self) -> list[str]:
        """What the local files of data are named by."""
        names: list[str | SourceConfig] = []
        for given in (self.train, self.eval) if self.hub is None else ():
            names += given if isinstance(given, list) else [given] if given else []
        paths = [each.path if isinstance(each, SourceConfig) else each for each in names]
        paths += [self.chat_template, self.tools if isinstance(self.tools, str) else None]
        return [path for path in paths if path]

    @property
    def holds_out(self) -> bool:
        """Whether held-out examples are taken from those of `train`."""
        return self.eval_fraction is not None or self.eval_examples is not None

    @property
    def has_eval(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.task is not None or self.eval is not None or self.holds_out


class OptimConfig(_Section):
    lr: float = Field(gt=0, allow_inf_nan=False)
    """The learning rate that the schedule begins at."""
    name: Annotated[Literal["adamw", "sgd", "adagrad"], Mark.FIXED] = "adamw"
    """torch's optimizer."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls: to zero, or not at all."""
    schedule_over: Literal["chain", "link"] = "chain"
    """Whether the schedule runs once over the whole chain, or anew in each link."""
    warmup_steps: int = Field(default=0, ge=0, lt=_LIMIT)
    """Linear warm-up at the start of each link, in steps."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """As the optimizer has it: decoupled with adamw, in the gradient with the others."""
    max_grad_norm: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Global gradient norm to clip to; null or 0 turns clipping off."""
    epochs: _Count | None = None
    """Epochs of the whole run, whatever its links; these or `max_steps` must be given."""
    max_steps: _Count | None = None
    """Steps of the whole run, whatever its epochs; null: the epochs decide."""
    global_batch_size: _Count = 8
    """Examples per step, over all processes; rows of packed examples with data.packing."""
    global_batch_tokens: _Count | None = None
    """With data.packing instead: tokens per step, over all processes; a step has as many rows of data.max_length as this has room
    for."""
    micro_batch_size: _Count = 4
    """Examples (packed rows) per forward pass and process."""
    max_skips_in_a_row: Annotated[int, Field(ge=0, lt=_LIMIT), Mark.FREE] = 5
    """Updates left out because the loss or a gradient was not finite: one more in a row, and training has failed."""

    @model_validator(mode="after")
    def _some_length(self) -> OptimConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("optim.epochs or optim.max_steps must say how long to train")
        if self.global_batch_tokens is not None and "global_batch_size" in self.model_fields_set:
            raise ValueError("optim.global_batch_tokens contradicts optim.global_batch_size: give one of them")
        return self


class EvalConfig(_Section):
    every: Annotated[str | int, BeforeValidator(_eval_every)] = "epoch"
    """epoch, link, end, or a number of steps. The end of the run is always evaluated."""
    patience: _Count | None = None
    """Evaluations in a row without a new best after which the run ends; null: it goes on."""
    batch_size: _Count | None = None
    """Examples per forward pass and process; null: as in training."""


class CheckpointConfig(_Section):
    every_steps: _Count | None = 200
    """Steps between checkpoints; null: only when a signal stops the run, and before its last knot."""
    keep: _Count = 2
    """The newest checkpoints that are kept."""
    best: bool = True
    """Also write and keep a checkpoint of the lowest held-out loss."""
    on_error: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be written does to the run; the ones before it stay."""


class RunSection(_Section):
    dir: Annotated[_Path, Mark.FREE, Mark.PER_RUN]
    """The run's folder, made by it: its rows, links, checkpoints and result."""
    seed: Annotated[int, Field(ge=0, lt=_LIMIT), Mark.PER_RUN] = 0
    """What adapters, the order of examples, dropout and a task's examples are drawn from."""
    log_every_steps: Annotated[_Count, Mark.FREE] = 10
    """Steps between rows of metrics.jsonl."""
    hang_after_s: Annotated[_Count | None, Mark.FREE] = 600
    """Seconds without progress of some process after which it is named and the run ends; null: never."""
    deterministic: bool = False
    """Have the accelerator give the same bits each time, as the CPU does anyway."""


TRAINING = ("cola", "lora", "full")
"""The methods that train."""


class RunConfig(_Section):
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
    deepspeed: Annotated[_Path, Mark.CONTENT, Mark.PLACE, Mark.FILE] = "zero3"
    """The DeepSpeed JSON: a file, or the name of a ready one of ds_configs/, such as zero3 or zero3_bf16."""

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        ranks, length = self.lora.rank, self.chain.length
        if self.method != "cola" and length > 1:
            raise ValueError(
                f"method {self.method} contradicts chain.length {length}: set chain.length=1 or method=cola"
            )
        if isinstance(ranks, list) and len(ranks) != length:
            raise ValueError(f"lora.rank {quoted(ranks)} names {len(ranks)} links, but chain.length is {length}")
        if isinstance(self.chain.knots, dict):
            (at,) = self.chain.knots.values()
            if len(at) != length - 1:
                raise ValueError(
                    f"chain.knots names {len(at)} knots; chain.length {length} takes {length - 1}, the last ends with the run"
                )
        if self.method == "zero-shot" and not self.data.has_eval:
            raise ValueError("method zero-shot only evaluates: name data.eval or data.task")
        if self.model.links is not None and self.trains:
            raise ValueError(
                f"method {self.method} contradicts model.links, which is for evaluation; train a model made by cola-ds export"
            )
        if self.eval.patience is not None and (self.eval.every == "end" or not self.data.has_eval):
            raise ValueError(
                "eval.patience goes by evaluations under way: name data.eval or data.task, and another eval.every"
            )
        if self.optim.global_batch_tokens is not None and self.data.packing == "none":
            raise ValueError("optim.global_batch_tokens needs data.packing=best_fit, whose rows are full")
        if self.method == "icl" and self.data.task is None:
            raise ValueError("method icl shows solved examples of a task: name data.task")
        return self

    @property
    def trains(self) -> bool:
        return self.method in TRAINING

    @property
    def trains_lora(self) -> bool:
        return self.method in ("cola", "lora")

    @property
    def lora_ranks(self) -> list[int]:
        """The LoRA rank of each link, one per link."""
        return self.lora.rank if isinstance(self.lora.rank, list) else [self.lora.rank] * self.chain.length


SECTIONS = tuple(
    name
    for name, f in RunConfig.model_fields.items()
    if isinstance(f.annotation, type) and issubclass(f.annotation, _Section)
)


def is_task_file(task: str) -> bool:
    """Whether data.task is a user's own, in a file."""
    return task.endswith((".yaml", ".yml"))
