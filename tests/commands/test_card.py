"""The model card of an export: what stands in it, and that nothing of others' text is markup."""

import dataclasses
import json
import re

import pytest
import yaml

from cola_ds.commands import export as exporting
from cola_ds.commands.card import write_card
from cola_ds.config.loading import check_config
from tests.commands.test_export import learnt_from
from tests.support.toys import save_model

HOSTILE = "www.evil https://evil x\n---\nlicense: evil\n---\n# <b>alert(1)</b> | [a](javascript:b) ![i](j) `c` *d* _e_ ${f} @g"


def front_matter(text):
    """As the hub reads it, and what follows."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    return yaml.safe_load(match[1]), match[2]


@pytest.fixture
def learnt(tmp_path, monkeypatch):
    found = learnt_from(tmp_path, save_model(tmp_path / "base"), dtype="fp32", links=2)
    result = {"scores": {"loss": 1.25, "examples": 20}, "knots": [3, 6]}
    found = dataclasses.replace(found, result=result)
    monkeypatch.setattr(exporting, "read_learnt", lambda run: found)
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n", encoding="utf-8")
    versions = {"cola_ds": "1.2.3", "packages": {"torch": "9.8"}}
    (tmp_path / "environment.json").write_text(json.dumps(versions), encoding="utf-8")
    return found


@pytest.mark.parametrize(("to", "library"), [("hf", "transformers"), ("peft", "peft")])
def test_what_stands_in_it(learnt, tmp_path, to, library):
    out = exporting.export("run", to, tmp_path / "out")
    header, body = front_matter((out / "README.md").read_text(encoding="utf-8"))
    assert header == {
        "base_model": "base", "license": "apache-2.0", "library_name": library, "pipeline_tag": "text-generation",
        "tags": ["cola_ds", "chain-of-lora", "lora"],
    }  # fmt: skip
    assert "a chain of LoRA (COLA, arXiv 2401.04151) of 2 links on base" in body
    assert "| 1 | 3 | 8 | 3 | 4: q\\_proj, v\\_proj |" in body
    assert "| 2 | 3 | 8 | 6 |" in body
    assert "- train: t.jsonl" in body
    assert "| loss | 1.25 |" in body
    assert "| torch | 9.8 |" in body
    assert "| cola\\_ds | 1.2.3 |" in body
    assert str(tmp_path) not in body + str(header)
    assert "licence: apache-2.0" in body
    cut = (exporting.export("run", to, tmp_path / "cut", upto=1) / "README.md").read_text(encoding="utf-8")
    assert "the last 1 of the run left out" in cut
    assert "Scores" not in cut  # which are the whole chain's


def test_scores_of_another_step_than_the_weights(learnt, tmp_path):
    """A task's are those of the best step, and what is exported is the last."""
    for best, said in ((6, False), (4, True)):
        result = {"scores": {"best_step": best, "test": 0.5}, "steps": 6, "knots": [3, 6]}
        other = dataclasses.replace(learnt, result=result)
        write_card(other, learnt.config, learnt.links, "hf", None, tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("These are of step 4, the best on dev; the weights here are those of the last step, 6." in text) == said


def test_of_links_before_the_run_s_own(learnt, tmp_path):
    for other in (learnt, dataclasses.replace(learnt, earlier=learnt.links[:1], links=learnt.links[1:])):
        write_card(other, learnt.config, other.chain, "hf", None, tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("what the links before this run's own were trained on is not recorded" in text) == bool(other.earlier)


def test_of_a_compressed_adapter(learnt, tmp_path):
    out = exporting.export("run", "peft", tmp_path / "out", svd_rank=2, say=lambda line: None)
    text = (out / "README.md").read_text()
    assert "Cut from LoRA rank 6 to 2 by singular values: a relative error of" in text
    assert "Scores" not in text  # which are those of all six
    whole = exporting.export("run", "peft", tmp_path / "whole", svd_rank=6, say=lambda line: None)
    assert "| loss | 1.25 |" in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: mit\n---\n", {}, "mit"),
        (None, {"license": "llama2"}, "llama2"),
        ("no front matter", {"license": "cc-by-4.0"}, "cc-by-4.0"),
        ("---\nlicense: [a, b]\n---\n", {}, None),
        ("---\nlicense: 'a: b\n---\n", {}, None),
        (f"---\nlicense: {json.dumps(HOSTILE)}\n---\n", {}, None),
        (None, {}, None),
    ],
)
def test_the_bases_licence(learnt, tmp_path, card, config, expected):
    (tmp_path / "base/README.md").unlink()
    if card is not None:
        (tmp_path / "base/README.md").write_text(card, encoding="utf-8")
    (tmp_path / "base/config.json").write_text(json.dumps(config), encoding="utf-8")
    write_card(learnt, learnt.config, learnt.links, "hf", tmp_path / "base", tmp_path)
    header, body = front_matter((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert header.get("license") == expected
    assert ("is not known here" in body) == (expected is None)


def test_a_licence_by_its_name(learnt, tmp_path):
    """As the hub has it for a licence of one's own; nothing of another form."""
    for link, kept in (("https://example.org/a/LICENSE.md", True), ("LICENSE", True), ("javascript:alert(1)", False)):
        card = f"---\nlicense: other\nlicense_name: their-own\nlicense_link: {link}\n---\n"
        (tmp_path / "base/README.md").write_text(card, encoding="utf-8")
        write_card(learnt, learnt.config, learnt.links, "hf", tmp_path / "base", tmp_path)
        header, body = front_matter((tmp_path / "README.md").read_text(encoding="utf-8"))
        assert (header["license"], header["license_name"]) == ("other", "their-own")
        assert header.get("license_link") == (link if kept else None)
        assert "licence: other, their-own" in body


def test_text_of_others_is_no_markup(learnt, tmp_path):
    """Not in the front matter, whose keys stay what they are, nor in the Markdown."""
    raw = learnt.config.model_dump(exclude_unset=True)
    raw["model"]["path"] = f"/home/someone/{HOSTILE.replace('/', ' ')}"
    raw["data"]["train"] = [f"/home/someone/{HOSTILE.replace('/', ' ')}", "org/dataset"]
    links = [dataclasses.replace(link, layers=[HOSTILE]) for link in learnt.links]
    learnt = dataclasses.replace(
        learnt, links=links, config=check_config(raw, [], "test"), result={"scores": {HOSTILE: HOSTILE}, "knots": []}
    )
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {HOSTILE: HOSTILE}}), encoding="utf-8")
    write_card(learnt, learnt.config, links, "peft", None, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    header, body = front_matter(text)
    assert set(header) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "someone" not in text
    assert "- train: org/dataset" in body
    for mark in ("<", "]", "!", "`", r"\*", "_", "{", "@", r"\("):
        assert not re.search(rf"(?<!\\){mark}(?!COLA)", body), mark
    assert "\n---" not in body
    assert "://" not in body
    assert "www." not in body
    for line in body.splitlines():
        if line.startswith("|") and "---" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 6), line
