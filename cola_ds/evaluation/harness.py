"""A sharded model as lm-eval, the public evaluation harness, calls models. To be imported where lm-eval is installed.

Every process of the run goes through the same tasks and asks for the same things in the same order; here what is asked is divided
among them, batch by batch, and each gets all the answers. Tokens, windows and what ends an answer are those of lm-eval's own
Hugging Face model (read in 0.4.13), so that scores are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cola_ds import notices
from cola_ds.data.batch import IGNORED, PADDING, Batch
from cola_ds.data.batcher import batches_by_length
from cola_ds.data.collate import counted_labels
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine
from cola_ds.errors import TrainingFailedError, UserError, counted, some_of
from cola_ds.evaluation.generation import generate_over_shares
from cola_ds.evaluation.logits import labelled_logits
from cola_ds.evaluation.shares import over_shares

Result = TypeVar("Result")
_DEFAULT_LENGTH = 2048  # positions of a model that names none
_NEW_TOKENS = 256  # of an answer, where its task names none


class ShardedLM(TemplateLM):
    """The model of an engine. Each method is collective: all processes call it with the same requests."""

    backend = "causal"

    def __init__(self, engine: Engine, tokenizer: Any, batch_size: int):
        """`batch_size`: of the longest examples, per forward pass and process."""
        super().__init__()
        self.engine, self.tokenizer, self.batch_size = engine, tokenizer, batch_size
        limit = getattr(engine.module.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = limit if isinstance(limit, int) and limit > 0 else _DEFAULT_LENGTH
        self.asked = False
        """Whether anything has been asked yet: until then it is the tasks' own data that lm-eval works at."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        words = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **words))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the sum of the continuation's log-probabilities (nats), and whether it is greedy's."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Of each text the sum of its log-probabilities (nats), in windows that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += score
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        self.asked = True
        if (most := max((len(wanted) for _, _, wanted in requests), default=0)) > self.max_length:
            raise UserError(
                f"a task of --suite has answers of {most} tokens, and the model has {self.max_length} positions; leave it out"
            )
        rows = [((context + wanted)[-self.max_length - 1 :], len(wanted)) for _, context, wanted in requests]

        def score(indices: list[int]) -> list[tuple[float, bool]]:
            batch = _batch([rows[index] for index in indices]).to(accelerator.device())
            with torch.no_grad():
                logits = labelled_logits(self.engine, batch)  # (B, K, V)
            return [_scored(*row) for row in zip(logits, batch.labels, strict=True)][: len(indices)]

        found = self._over_all([len(ids) - 1 for ids, _ in rows], "scoring", score)
        lost = sum(not math.isfinite(score) for score, _ in found)
        if lost:
            raise TrainingFailedError(
                f"the model's outputs are not finite for {lost} of {counted(len(found), 'request')}"
            )
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """The greedy answer to each (context, options), up to what ends it. Raises UserError for a task that samples."""
        self.asked = True
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], _NEW_TOKENS)
            tasks = {str(requests[number].task_name) for number in numbers}
            texts = self._answers(
                [requests[number].args[0] for number in numbers], dict(options), some_of(sorted(tasks))
            )
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _answers(self, contexts: list[str], options: dict[str, Any], tasks: str) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        ends = handle_stop_sequences(options.get("until"), eos=eos)
        most = int(options["max_gen_toks"])
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise UserError(f"--suite: {tasks} samples its answers, and here they are greedy; leave it out")
        if most >= self.max_length:
            raise UserError(
                f"--suite: {tasks} wants answers of {most} tokens, and the model has {self.max_length} positions; leave it out"
            )
        prompts = [self.tok_encode(context)[-(self.max_length - most) :] for context in contexts]
        stop_ids = sorted({self.eot_token_id, *self._ids_that_hold(ends)})
        with notices.Progress("generating", "batch", shown=self.engine.global_rank == 0, plural="batches") as progress:
            mine = generate_over_shares(self.engine, prompts, self.batch_size, _tick(progress), stop_ids, most)
        assert mine is not None
        ids = self._gathered(mine, len(prompts))
        if lost := sum(each is None for each in ids):
            raise TrainingFailedError(f"the model's outputs are not finite for {lost} of {counted(len(ids), 'prompt')}")
        texts = [self.tokenizer.decode(each, skip_special_tokens=True) for each in ids]
        return [postprocess_generated_text(text, stop=ends, think_end_token=None) for text in texts]

    def _ids_that_hold(self, ends: list[str]) -> list[int]:
        """Ids whose own text holds what ends an answer: nothing after them counts. An end of several ids is cut off later."""
        ids = sorted(self.tokenizer.get_vocab().values())
        texts = self.tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
        return [token for token, text in zip(ids, texts, strict=True) if any(end and end in text for end in ends)]

    def _over_all(self, lengths: list[int], what: str, work: Callable[[list[int]], list[Result]]) -> list[Result]:
        """What `work` makes of all examples, on every process; each does its share."""
        batches = len(list(batches_by_length(lengths, self.batch_size, self.engine.world_size)))
        speaks = self.engine.global_rank == 0
        with notices.Progress(what, "batch", batches, shown=speaks, plural="batches") as progress:
            mine = over_shares(self.engine, lengths, self.batch_size, _tick(progress), work)
        assert mine is not None
        return self._gathered(mine, len(lengths))

    def _gathered(self, mine: dict[int, Result], count: int) -> list[Result]:
        """Of all processes. What comes next is lm-eval's own, tokenising or statistics, and takes as long as it takes."""
        by_index = {i: result for pairs in collectives.all_gather_objects(list(mine.items())) for i, result in pairs}
        watchdog.rest()
        return [by_index[index] for index in range(count)]


def _tick(progress: notices.Progress) -> Callable[[], bool]:
    """Hears of each batch, and never asks to stop."""
    done = -1

    def tick() -> bool:
        nonlocal done
        done += 1
        progress.at(done)
        return False

    return tick


def _batch(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """Ids, of which the last so many are scored, padded on the right; the last id of all is only a label. Without rows a batch
    that counts nothing."""
    rows = rows or [([PADDING, PADDING], 0)]
    width = max(len(ids) for ids, _ in rows) - 1
    input_ids = numpy.full((len(rows), width), PADDING)  # (B, T)
    mask, next_ids = numpy.zeros_like(input_ids), numpy.full_like(input_ids, IGNORED)
    for row, (ids, wanted) in enumerate(rows):
        end = len(ids) - 1
        input_ids[row, :end], mask[row, :end] = ids[:-1], 1
        next_ids[row, end - wanted : end] = ids[len(ids) - wanted :]
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), *counted_labels(next_ids))


def _scored(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, bool]:  # (K, V), (K,)
    """A row's: in fp32, a row at a time, as all at once would be several times the model's own logits."""
    counts = labels != IGNORED
    logits, labels = logits[counts].float(), labels[counts]
    found = logits.log_softmax(-1).gather(-1, labels[:, None])
    return float(found.sum()), bool((logits.argmax(-1) == labels).all())
