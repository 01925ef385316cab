"""What evaluation takes: a task's candidates one at a time and as the project scores them, and answers likewise.

    python -m tests.bench.evaluation [MODEL] [--examples 24] [--rounds 3] [--batch-size 8] [--processes 1] [--deepspeed zero3]

MODEL is a folder; without it a model of SmolLM2-135M's shape and random weights is made. The rows are random ids in the shape of
the paper's tasks: prompts of 50 to 250 ids, two to four candidates, answers that end at different places. One at a time is what
needs no thought: a forward pass for each candidate's whole text, and Transformers' own generate for each prompt. It runs through
the same engine, and is the reference too: in fp32 all scores must agree to 1e-4, and all answers be the same ids. The ways take
turns; the figures are medians. launch/bench.sh evaluation runs it, for a few minutes on two cores; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.distributed import process_group, run_distributed
from tests.support.toys import REPOSITORY, save_model

SMOL = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
WAYS = ("one at a time", "as the project does")
TOLERANCE = 1e-4
NEW_TOKENS = 50
ENDS = 8  # one id in so many ends an answer


def make_rows(count: int, vocabulary: int, shortest: int, longest: int) -> list[Any]:
    """Examples of a task, as ids: prompts as long as that, and two to four candidates of one id or of a few."""
    from cola_ds.data.batch import Encoded

    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    rows = []
    for _ in range(count):
        prompt = ids(draw.randint(shortest, longest))
        lengths = [draw.choice((1, 1, 1, 3, 10)) for _ in range(draw.randint(2, 4))]
        rows.append(Encoded([prompt + ids(length) for length in lengths], lengths, prompt, ""))
    return rows


def share(items: list[Any], rank: int, world_size: int) -> list[Any]:
    """A process's own, as many as every other has: under ZeRO-3 all run as many forward passes. Some are then done twice."""
    padded = items + items[:1] * (-len(items) % world_size)
    return padded[rank::world_size]


def plain_score(engine: Any, ids: list[int], count: int) -> float:
    """The mean log-probability of the last `count` ids, from a forward pass over all."""
    import torch

    from cola_ds.distributed import accelerator

    logits = engine(torch.tensor([ids], device=accelerator.device()), use_cache=False).logits  # (1, T, V)
    log_probs = logits[0, -count - 1 : -1].float().log_softmax(-1)
    return float(log_probs.gather(1, torch.tensor(ids[-count:], device=log_probs.device)[:, None]).mean())


def scores_one_by_one(engine: Any, rows: list[Any], rank: int) -> dict[tuple[int, int], float]:
    """By example and candidate."""
    from cola_ds.distributed.engine import evaluating

    texts = [
        ((place, number), ids, count)
        for place, row in enumerate(rows)
        for number, (ids, count) in enumerate(zip(row.candidate_ids, row.answer_lengths, strict=True))
    ]
    with evaluating(engine):
        return {key: plain_score(engine, ids, count) for key, ids, count in share(texts, rank, engine.world_size)}


def scores_of_project(engine: Any, rows: list[Any], batch_size: int) -> dict[tuple[int, int], float]:
    """By example and candidate."""
    from cola_ds.evaluation.candidates import score_candidates

    found = score_candidates(engine, rows, batch_size, lambda: False)
    assert found is not None
    return {(place, number): score for place, scores in found.items() for number, score in enumerate(scores)}


def ids_one_by_one(engine: Any, rows: list[Any], rank: int, stop_ids: list[int], tokens: int) -> dict[int, list[int]]:
    """By example, up to an id that ends the answer and with it."""
    import torch

    from cola_ds.distributed import accelerator
    from cola_ds.distributed.engine import evaluating

    found = {}
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": stop_ids, "pad_token_id": 0}
    with evaluating(engine):
        for place, row in share(list(enumerate(rows)), rank, engine.world_size):
            prompt = torch.tensor([row.prompt_ids], device=accelerator.device())
            ids = engine.module.generate(
                prompt, attention_mask=torch.ones_like(prompt), synced_gpus=engine.world_size > 1, **options
            )
            found[place] = ids[0, prompt.shape[1] :].tolist()
    return found


def ids_of_project(
    engine: Any, rows: list[Any], stop_ids: list[int], tokens: int, batch_size: int
) -> dict[int, list[int]]:
    """By example, as `generate_answers` has them before they become text."""
    from cola_ds.evaluation import generation

    class Ids:
        """A tokenizer whose text is the ids themselves."""

        eos_token_id = stop_ids[0]

        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in stop_ids}

        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return ["\n" for _ in rows]

        def decode(self, ids: list[int], **_: Any) -> str:
            return json.dumps(ids)

    found = generation.generate_answers(engine, rows, Ids(), batch_size, lambda: False, tokens)
    assert found is not None
    return {place: json.loads(text or "null") for place, text in found.items()}


def measure(process: Any, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both ways in every round, this process's results of each, and the peak of its memory. Collective."""
    import torch

    from cola_ds.config.schema import ModelConfig
    from cola_ds.distributed.engine import build_engine
    from cola_ds.distributed.loading import load_model
    from tests.bench.knots import peak_mib, reset_peak, timed

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // process.world_size))
    process_group(process)
    engine_config = json.loads((REPOSITORY / f"ds_configs/{options['deepspeed']}.json").read_text(encoding="utf-8"))
    engine_config |= {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31}
    loaded = load_model(ModelConfig(path=model, dtype=options["dtype"]), engine_config).requires_grad_(False)
    engine = build_engine(loaded, engine_config, lambda params: torch.optim.SGD(params, lr=0.0))
    # What a model's folder says of generation, sampling say, is for none of the ways.
    engine.module.generation_config = type(engine.module.generation_config)(eos_token_id=ENDS)
    vocabulary = engine.module.config.vocab_size
    rows = make_rows(options["examples"], vocabulary, *options["lengths"])
    stop_ids, size, tokens = list(range(ENDS, vocabulary, ENDS)), options["batch_size"], options["new_tokens"]
    ways: dict[str, tuple[Callable[[list[Any]], Any], Callable[[list[Any]], Any]]] = {
        "candidates": (
            lambda rows: scores_one_by_one(engine, rows, process.rank),
            lambda rows: scores_of_project(engine, rows, size),
        ),
        "answers": (
            lambda rows: ids_one_by_one(engine, rows, process.rank, stop_ids, tokens),
            lambda rows: ids_of_project(engine, rows, stop_ids, tokens, size),
        ),
    }
    found: dict[str, Any] = {}
    for what, both in ways.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        peaks, results = [0.0, 0.0], [[], []]
        for action in both:  # the first forward pass under ZeRO-3 records what the others fetch ahead
            action(rows[:2])
        for _ in range(options["rounds"]):
            for way, action in enumerate(both):
                reset_peak()
                took, each = timed(action, rows)
                seconds[way].append(took)
                peaks[way], results[way] = max(peaks[way], peak_mib()), list(each.items())
        found[what] = {"seconds": seconds, "results": results, "peak_mib": peaks}
    return found


def checked(found: list[dict[str, Any]], what: str, dtype: str) -> tuple[int, str]:
    """How many examples there are, and how well both ways agree. Exits where they do not."""
    plain, ours = (
        {key: value for each in found for key, value in each[what]["results"][way]} for way in range(len(WAYS))
    )
    assert plain.keys() == ours.keys()
    if what == "candidates":
        apart = max(abs(plain[key] - ours[key]) for key in plain)
        agree, count = apart <= TOLERANCE, len({place for place, _ in plain})
        said = f"scores agree to {apart:.1e}"
    else:
        same = sum(plain[key] == ours[key] for key in plain)
        agree, count = same == len(plain), len(plain)
        said = f"{same} of {count} answers are the same ids, {statistics.fmean(map(len, ours.values())):.1f} on average"
    if dtype == "fp32" and not agree:
        sys.exit(f"evaluation: {what}: {said}")
    return count, said


def report(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The table, under the machine and the command that it is of."""
    from cola_ds.distributed.accelerator import accelerator_name

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(f"\n{accelerator_name()}; Python {sys.version.split()[0]}, {packages}; `{args.command}`")
    print(f"\n| examples a second | {' | '.join(WAYS)} | times | peak memory, MiB |\n| --- | --- | --- | --- | --- |")
    notes = []
    for what in ("candidates", "answers"):
        count, said = checked(found, what, args.dtype)
        notes.append(said)
        # Every process measured the slowest of all.
        plain, ours = (count / statistics.median(seconds) for seconds in found[0][what]["seconds"])
        before, now = found[0][what]["peak_mib"]
        print(f"| {what} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} | {before:.0f}, {now:.0f} |")
    print(f"\n{'; '.join(notes)}")


def main() -> None:
    """Measure both ways, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="eval.batch_size")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--deepspeed", default="zero3", help="a JSON of ds_configs, by its name")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--lengths", type=int, nargs=2, default=(50, 250), help="of prompts, in tokens")
    args = parser.parse_args()
    if args.model is not None and not Path(args.model, "config.json").is_file():
        parser.error(f"{args.model} is no model's folder")
    if not (REPOSITORY / f"ds_configs/{args.deepspeed}.json").is_file():
        parser.error(f"--deepspeed {args.deepspeed} is none of ds_configs")
    if min(args.examples, args.rounds, args.batch_size, args.processes, args.new_tokens) < 1:
        parser.error("--examples, --rounds, --batch-size, --processes and --new-tokens must be at least 1")
    args.command = " ".join(["python -m tests.bench.evaluation", *sys.argv[1:]])
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = {key: value for key, value in vars(args).items() if key not in ("model", "command", "processes")}
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(save_model(Path(scratch), **SMOL))
        found = run_distributed(measure, args.processes, model, options, timeout_s=3600)
    report(found, args)


if __name__ == "__main__":
    main()
