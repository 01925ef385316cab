"""The section `data` of a run's YAML: what is learnt from, and what becomes of it before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cola_ds.config.fields import LIMIT, Count, Mark, Path, Section, check_path


def _sources(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value if value is None else check_path(value)
    if not isinstance(value, list) or not value:
        raise ValueError(_SOURCES)
    found: list[str | SourceConfig] = []
    for number, each in enumerate(value, 1):
        if isinstance(each, (SourceConfig, dict)):
            found.append(_source(number, each))
        elif isinstance(each, str) and each:
            found.append(check_path(each))
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
        return value if value is None else check_path(value)
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return value
    raise ValueError("must be a list of tools, each a JSON schema of a function, or name a .json file with such a list")


class SourceConfig(Section):
    """One of several sources of `data.train`, `data.eval` or `data.watch`. What it leaves out, `data` says for all."""

    path: Path | None = None
    """A file, a folder of shards or a glob; this or `hub`."""
    hub: Annotated[str | None, Field(min_length=1)] = None
    """A dataset on the Hugging Face hub."""
    hub_config: str | None = None
    """The dataset's configuration, where it has several."""
    revision: str | None = None
    """A branch, tag or commit of the dataset."""
    split: str | None = None
    """The hub's split; null: train for `data.train`, validation for the others."""
    weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Its share of an epoch, beside the others' weights; null for all: every example once."""
    limit: Count | None = None
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


class DataConfig(Section):
    task: Annotated[Path | None, Mark.FILE] = None
    """A task's name, such as rte, or the path of a task's YAML; instead of `train` and `eval`."""
    dir: Annotated[Path | None, Mark.PLACE] = None
    """The task's folder, with train.jsonl and validation.jsonl; null: the Hugging Face hub."""
    num_train: Count = 1000
    """The task's training examples, drawn by run.seed."""
    num_dev: Count | None = None
    """The task's held-out examples, taken from its training split; null: 100 for cb and copa, 500 for the others."""
    num_test: Count = 1000
    """The task's test examples, drawn from its validation split."""
    demonstrations: Count = 32
    """Solved examples in front of each prompt, with method icl."""
    train: Annotated[str | list[str | SourceConfig] | None, BeforeValidator(_sources), Mark.PLACE] = None
    """A .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow or .txt file (.gz and .zst of text too), a folder of such, one that
    Dataset.save_to_disk wrote, a glob, or the name of a dataset on the hub; or a list of these and of sources,
    `{path or hub, split, weight, limit, format ...}`, mixed by their weights. With `hub`, the name of a split."""
    eval: Annotated[str | list[str | SourceConfig] | None, BeforeValidator(_sources), Mark.PLACE] = None
    """Held-out data, likewise."""
    watch: Annotated[str | list[str | SourceConfig] | None, BeforeValidator(_sources), Mark.PLACE] = None
    """A second set of held-out data, likewise, such as text of what the model knew before: its loss is found before the first
    step and after each knot, into watch.jsonl. It shows what is forgotten, and decides nothing."""
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `eval`: this part of the training examples is held out, by content: rows of the same content are on one side,
    whatever the seed."""
    eval_examples: Count | None = None
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
    chat_template: Annotated[Path | None, Mark.PLACE] = None
    """A Jinja file; null: the tokenizer's own chat template."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Of a conversation, what is trained: the assistant's turns, the last of them, or all that the template writes."""
    system: str | None = None
    """The system message of conversations that have none of their own."""
    tools: Annotated[str | list[dict[str, Any]] | None, BeforeValidator(_tools), Mark.PLACE] = None
    """The tools of conversations that name none of their own, as the chat template takes them: a list, or a .json file of one."""
    max_length: int = Field(default=512, ge=2, lt=LIMIT)
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
    cache: Annotated[Path | None, Mark.FREE] = None
    """The folder that tokenized data is kept in; null: $XDG_CACHE_HOME/cola_ds or ~/.cache/cola_ds; none: tokenized at each
    start."""
    workers: Annotated[Count | None, Mark.FREE] = None
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
        if self.hub is not None and any(isinstance(each, list) for each in (self.train, self.eval, self.watch)):
            raise ValueError(
                "data.hub takes one split each for data.train and data.eval, such as train[:1000], not a list"
            )
        if self.hub is None and self.task is None and (self.hub_config or self.revision):
            raise ValueError("data.hub_config and data.revision need data.hub")
        said = self.model_fields_set - {"task", "max_length"}
        # A value that a key has anyway says nothing: on the command line it takes back what the YAML says.
        given = {
            key
            for key in said
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)
        }
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
        for given in (self.train, self.eval, self.watch) if self.hub is None else ():
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
