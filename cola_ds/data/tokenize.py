"""Tokenizing: the sources of a split become token ids, once: what the cache has already is taken from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import find_files
from cola_ds.config.parsing import parse_json, read_text
from cola_ds.config.schema import DataConfig, ModelConfig
from cola_ds.data.cache import CacheError, Tokens, cache_folder, hold_tokens, keep_tokens, key_of, open_tokens
from cola_ds.data.encode import NOTHING_LEFT, TOO_LONG, Counts, Recipe
from cola_ds.data.sources import OpenSource, sources_of
from cola_ds.data.tokenizer import tokenizer_hash
from cola_ds.data.workers import Batch, encode_all
from cola_ds.errors import UserError

_BATCH_ROWS, _BATCH_LETTERS = 1000, 2_000_000  # of what is tokenized at once
_ROW_LETTERS = (
    10_000_000  # of a pair or a conversation: a tokenizer needs some 200 bytes for each, and is killed unnamed
)
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The tokens of the sources of each split, in their order, and what is to be said of it."""

    splits: dict[str, list[Tokens]]
    warnings: list[str]

    def places(self) -> dict[str, list[str]] | None:
        """Where they are kept; None where some are in memory."""
        if any(tokens.place is None for each in self.splits.values() for tokens in each):
            return None
        return {split: [str(tokens.place) for tokens in each] for split, each in self.splits.items()}


def splits_of(config: DataConfig) -> list[str]:
    """The splits that have sources of their own."""
    return ["train", *(split for split in ("eval", "watch") if getattr(config, split) is not None)]


def check_sources(config: DataConfig) -> None:
    """Raise UserError for a local file that is not there; no row is read."""
    tools_of(config)
    chat_template_of(config)
    for split in splits_of(config):
        try:
            for source in sources_of(config, split):
                if source.path is not None:
                    find_files(source.path)
        except UserError as error:
            raise UserError(f"data.{split} {error}") from None


def tokenize(
    config: DataConfig,
    tokenizer: Any,
    model: ModelConfig | None = None,
    progress: Progress = lambda rows: None,
    share: int = 1,
) -> Found:
    """Tokenize all sources, or find them in the cache. `progress` hears how many rows of a source are done; `share` is the
    number of processes that do the same beside this one on its host.

    Raises UserError for a file that is missing, empty or cannot be parsed and, with file and row, for a row that is no example.
    """
    work = _Work(config, tokenizer, model, progress, share)
    found: dict[str, list[Tokens]] = {}
    for split in splits_of(config):
        try:
            found[split] = [work.tokens_of(source.open()) for source in sources_of(config, split)]
        except UserError as error:
            raise UserError(f"data.{split} {error}") from None
    _check_options(config, {tokens.kind for each in found.values() for tokens in each})
    return Found(splits=found, warnings=work.warnings)


def _check_options(config: DataConfig, kinds: set[str]) -> None:
    """Raise UserError for an option of conversations where there are none."""
    if kinds <= {"pairs", "text"}:
        for name in ("chat_template", "loss_on", "system", "tools"):
            if getattr(config, name) != type(config).model_fields[name].default:
                raise UserError(
                    f"data.{name} is for conversations, and there are none: set data.format=chat, or leave it out"
                )


def open_found(places: dict[str, list[str]], warnings: list[str]) -> Found:
    """What another process has tokenized, from where it is kept. Raises UserError where it cannot be read."""
    found: dict[str, list[Tokens]] = {}
    for split, names in places.items():
        found[split] = []
        for name in names:
            try:
                tokens = open_tokens(Path(name), verify=False)
            except CacheError as error:
                raise UserError(f"data.cache {name} cannot be read: {error}") from None
            if tokens is None:
                raise UserError(f"data.cache {name} has been removed or changed while the run began; start it again")
            found[split].append(tokens)
    return Found(splits=found, warnings=warnings)


class _Work:
    def __init__(
        self, config: DataConfig, tokenizer: Any, model: ModelConfig | None, progress: Progress, share: int
    ) -> None:
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.progress, self.share = progress, share
        self.known_as = tokenizer_hash(tokenizer)
        self.folder = cache_folder(config)
        self.warnings: list[str] = []
        self._template = chat_template_of(config)

    def tokens_of(self, source: OpenSource) -> Tokens:
        recipe = self._recipe(source)
        tokens = self._kept(source, recipe)
        if tokens is None:
            tokens = hold_tokens(self._encoded(source, recipe), source.kind)
        _check(source.source.name, tokens.counts)
        return tokens

    def _kept(self, source: OpenSource, recipe: Recipe) -> Tokens | None:
        """From the cache, or as it is kept there from now on; None where there is no cache, or it cannot be used."""
        if self.folder is None:
            return None
        place = self.folder.absolute() / key_of(source.content(), source.source.limit, recipe, self.known_as)
        try:
            found = open_tokens(place, verify=True)
            return found or keep_tokens(place, self._encoded(source, recipe), source.kind)
        except CacheError as error:
            if self.config.cache is not None:
                raise UserError(
                    f"needs the cache {self.folder}, which cannot be used: {error}; name another folder in data.cache, or none"
                ) from None
            self.warnings.append(
                f"the cache {self.folder} cannot be used ({error}): tokenized in memory, as with data.cache=none"
            )
            self.folder = None
            return None

    def _recipe(self, source: OpenSource) -> Recipe:
        config, chat = self.config, source.kind not in ("pairs", "text")
        recipe = Recipe(
            kind=source.kind, columns=dataclasses.asdict(source.source.columns), max_length=config.max_length,
            too_long=config.too_long,
        )  # fmt: skip
        if not chat:
            return recipe
        return dataclasses.replace(
            recipe, chat_template=self._template, loss_on=config.loss_on, system=config.system, tools=tools_of(config)
        )

    def _encoded(self, source: OpenSource, recipe: Recipe) -> Iterator[tuple[Any, Counts]]:
        workers = self.config.workers
        done = 0
        for batch, counts in encode_all(
            _batches(source.rows(), None if source.kind == "text" else _ROW_LETTERS),
            recipe,
            self.tokenizer,
            self.model,
            self.known_as,
            workers,
            self.share,
        ):
            done += counts.rows
            self.progress(done)
            yield batch, counts
        source.check_unchanged()


def chat_template_of(config: DataConfig) -> str | None:
    """The text of data.chat_template; None for the tokenizer's own. Raises UserError."""
    return None if config.chat_template is None else read_text(config.chat_template, "data.chat_template")


def tools_of(config: DataConfig) -> list[dict[str, Any]] | None:
    """The tools that data.tools says, or its file. Raises UserError."""
    if not isinstance(config.tools, str):
        return config.tools
    said = parse_json(read_text(config.tools, "data.tools"), f"data.tools {config.tools}")
    if not isinstance(said, list) or not said or not all(isinstance(each, dict) for each in said):
        raise UserError(f"data.tools {config.tools} must hold a list of tools, each a JSON schema of a function")
    return said


def _batches(rows: Iterator[tuple[str, Any]], most: int | None) -> Iterator[Batch]:
    """Rows to tokenize together: as many as hold a few million letters, so that little memory is needed at a time. Raises
    UserError for a row of more than `most` letters."""
    batch: Batch = []
    letters = 0
    for place, row in rows:
        own = sum(map(len, row)) if isinstance(row, list) else _letters(row)
        if most is not None and own > most:
            raise UserError(
                f"{place} has {own:,} letters, more than the {most:,} of the longest row: split it, or leave it out"
            )
        batch.append((place, row))
        letters += own
        if len(batch) == _BATCH_ROWS or letters > _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _letters(said: Any) -> int:
    """About how many letters a row of JSON has."""
    if isinstance(said, str):
        return len(said)
    if isinstance(said, dict):
        return sum(map(_letters, said.values()))
    return sum(map(_letters, said)) if isinstance(said, list) else 8


def _check(name: str, counts: Counts) -> None:
    """Raise UserError for a source without an example, or with nothing to learn."""
    if not counts.rows:
        raise UserError(f"{name} is empty: it needs at least one row")
    left_out = sum(counts.dropped.values())
    if not counts.examples and left_out:
        why = TOO_LONG if counts.dropped[TOO_LONG] else NOTHING_LEFT
        raise UserError(f"{name} has no example left: all {left_out} are {why}; raise it")
    if not sum(counts.trained.values()):
        raise UserError(f"{name} leaves nothing to predict: it has no text of two tokens or more")
