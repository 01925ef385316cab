"""The model card of an export, README.md: what it is, what it was made from, and how. No path of the machine that made it stands
there but its last part; nothing of others' text is markup."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import is_hub_name
from cola_ds.config.parsing import dump_yaml, parse_json, parse_yaml, read_text
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, inline
from cola_ds.run.environment import version_of
from cola_ds.run.learnt import Learnt, SavedLink

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#!|~$&@]|(?<=:)//|(?<=www)\.)")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENCE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.+-]{0,60}")
_LINK = re.compile(r"https://[a-zA-Z0-9./_-]{1,200}|[a-zA-Z0-9][a-zA-Z0-9._-]{0,60}")


def write_card(
    learnt: Learnt,
    config: RunConfig,
    links: list[SavedLink],
    to: str,
    base: Path | None,
    out: Path,
    compressed: Any = None,
) -> None:
    """Write README.md into an export's folder. `links` are those that are in it; `base` is the base model's folder, if it is
    here; `compressed` what --svd-rank has found."""
    licence = _licence(base)
    name = _short(config.model.path)
    header = {
        "base_model": name,
        **licence,
        "library_name": "transformers" if to == "hf" else "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "cola_ds",
            "chain-of-lora" if learnt.config.trains_lora else "full-fine-tuning",
            *(["lora"] if links else []),
        ],
    }
    what = "model" if to == "hf" else "PEFT adapter"
    body = [f"# {_plain(name)}: a fine-tuned {what}", "", _made(learnt, links, to, name, licence), ""]
    cut = compressed and compressed["lora_rank"] < compressed["lora_rank_before"]
    if cut:
        error = compressed["total"]["relative_error"]
        body += [
            f"Cut from LoRA rank {compressed['lora_rank_before']} to {compressed['lora_rank']} by singular values: a relative "
            f"error of {error:.2%} in the Frobenius norm; by layer in `svd.json`.", "",
        ]  # fmt: skip
    if links:
        body += [
            "## Chain",
            "",
            *_table(["link", "LoRA rank", "alpha", "knot at step", "layers"], _chain_rows(learnt, links)),
            "",
        ]
    body += ["## Data", "", *(f"- {_plain(each)}" for each in _sources(config))]
    body += ["- what the links before this run's own were trained on is not recorded here"] if learnt.earlier else []
    body += [""]
    if scores := [] if cut else _scores(learnt, links):
        body += ["## Scores", "", *_of_another_step(learnt), *_table(["", ""], scores), ""]
    body += ["## Versions", "", *_table(["package", "version"], _versions(learnt)), ""]
    text = f"---\n{dump_yaml(header)}---\n\n" + "\n".join(body)
    (out / "README.md").write_text(text, encoding="utf-8")


def _made(learnt: Learnt, links: list[SavedLink], to: str, name: str, licence: dict[str, str]) -> str:
    config = learnt.config
    if config.method == "full":
        how = f"{_plain(name)}, all of whose weights were trained"
    else:
        count = f"{len(links)} link{'s' * (len(links) != 1)}"
        method = "a chain of LoRA (COLA, arXiv 2401.04151)" if len(links) > 1 else "LoRA"
        left_out = len(learnt.chain) - len(links)
        how = f"{method} of {count} on {_plain(name)}"
        how += f", the last {left_out} of the run left out" if left_out else ""
        how += ", merged into its weights" if to == "hf" else ", as one adapter; it changes that base model alone"
    named = ", ".join(_plain(text) for text in licence.values())
    licensed = f"The base model's licence: {named}." if named else "The base model's licence is not known here."
    return f"Made with cola\\_ds: {how}. Weights of the base in {config.model.dtype}. {licensed}"


def _chain_rows(learnt: Learnt, links: list[SavedLink]) -> list[list[str]]:
    knots, rows = _knots(learnt), []
    for number, link in enumerate(links, start=1):
        own = number - len(learnt.earlier)
        at = str(knots.get(own, "?")) if own > 0 else "of an earlier run" if learnt.config.model.links else "an adapter"
        layers = sorted({layer.rpartition(".")[2] for layer in link.layers})
        rows.append(
            [str(number), str(link.lora_rank), f"{link.alpha:g}", at, f"{len(link.layers)}: {', '.join(layers[:8])}"]
        )
    return rows


def _knots(learnt: Learnt) -> dict[int, int]:
    found = learnt.result.get("knots") or []
    return {number: step for number, step in enumerate(found, start=1) if isinstance(step, int)}


def _sources(config: RunConfig) -> list[str]:
    data = config.data
    if data.task is not None:
        return [f"task {_short(data.task)}"]
    found = []
    for what, given in (("train", data.train), ("held out", data.eval)):
        for each in given if isinstance(given, list) else [given] if given else []:
            named = each if isinstance(each, str) else each.path or each.hub or ""
            split = each if isinstance(each, str) else each.split
            if data.hub is not None:
                found.append(f"{what}: {_short(data.hub)}, {split}")
            else:
                found.append(f"{what}: {named if is_hub_name(named) else Path(named).name}")
    return found


def _scores(learnt: Learnt, links: list[SavedLink]) -> list[list[str]]:
    """Of the whole chain: of a shorter one nothing is known."""
    if len(links) < len(learnt.chain):
        return []
    return [
        [key, f"{value:.6g}" if isinstance(value, float) else str(value)]
        for key, value in learnt.result.get("scores", {}).items()
        if isinstance(value, (int, float, str)) and value is not None
    ]


def _of_another_step(learnt: Learnt) -> list[str]:
    """What is to be said where a task's scores are not those of the weights that are here."""
    best, last = learnt.result["scores"].get("best_step"), learnt.result.get("steps")
    if best is None or best == last:
        return []
    return [f"These are of step {best}, the best on dev; the weights here are those of the last step, {last}.", ""]


def _versions(learnt: Learnt) -> list[list[str]]:
    held: Any = {}
    with contextlib.suppress(UserError):
        held = parse_json(read_text(learnt.folder / "environment.json", "the run's"), "environment.json")
    packages = held.get("packages") if isinstance(held, dict) else None
    rows = [[str(name), str(version)] for name, version in (packages if isinstance(packages, dict) else {}).items()]
    trained = held.get("cola_ds") if isinstance(held, dict) else None
    return [["cola_ds", str(trained or version_of("cola_ds"))], *rows]


def _licence(base: Path | None) -> dict[str, str]:
    """The base model's, by its card or its config.json: license, and license_name and license_link where its card has them; none
    where it is not known."""
    if base is None:
        return {}
    found: Any = None
    beside: dict[str, str] = {}
    with contextlib.suppress(UserError):
        text = read_text(base / "README.md", "the base's card")
        match = re.match(r"---\r?\n(.*?\r?\n)---", text, re.DOTALL)
        header = parse_yaml(match[1], "the base's card") if match else None
        header = header if isinstance(header, dict) else {}
        found = header.get("license")
        for key, form in (("license_name", _LICENCE), ("license_link", _LINK)):
            if isinstance(header.get(key), str) and form.fullmatch(header[key]):
                beside[key] = header[key]
    if found is None:
        with contextlib.suppress(UserError):
            said = parse_json(read_text(base / "config.json", "the base's", 2**26), "config.json")
            found = said.get("license") if isinstance(said, dict) else None
    return {"license": found, **beside} if isinstance(found, str) and _LICENCE.fullmatch(found) else {}


def _short(path: str) -> str:
    """A name on the hub as it is; of a path its last part."""
    if _NAME.fullmatch(path) and not Path(path).exists():
        return path
    return Path(path).name or path


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """A text of others that stays text in Markdown: in one line, its marks escaped."""
    return _MARKUP.sub(r"\\\1", inline(text, 200))
