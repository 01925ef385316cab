"""Build conversations from the documentation of Python's standard library, which is on every machine.

    python launch/chat/data.py OUT_DIR [TRAIN_CONVERSATIONS HELD_OUT_CONVERSATIONS]

The user asks what a function, method or class does, and then where it lives; the assistant answers both in a fixed style. The
functions, and which of them are held out, are those of the quickstart. Writes OUT_DIR/train.jsonl and OUT_DIR/dev.jsonl, whose
rows have `messages`, and the first question that is held out as OUT_DIR/question.txt.
"""

import json
import re
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from data import collect, split  # the quickstart's


def conversation(prompt: str, completion: str) -> list[dict[str, str]]:
    """A question as the quickstart asks it, its answer, and the same of the place."""
    kind, name = re.match(r"What does the Python (\w+) `([\w.]+)", prompt).groups()  # type: ignore[union-attr]
    owner, _, own = name.rpartition(".")
    return [
        {"role": "user", "content": prompt.strip()},
        {"role": "assistant", "content": f"Name: {own}\nKind: {kind}\nDoes: {completion}"},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": f"In: {owner}"},
    ]


def main() -> None:
    """Write all files; see the top of this one."""
    if len(sys.argv) not in (2, 4):
        sys.exit("usage: python launch/chat/data.py OUT_DIR [TRAIN_CONVERSATIONS HELD_OUT_CONVERSATIONS]")
    out = Path(sys.argv[1])
    sizes = [int(word) for word in sys.argv[2:]] or [None, None]
    out.mkdir(parents=True, exist_ok=True)
    halves = split(collect(Path(sysconfig.get_path("stdlib"))))
    (out / "question.txt").write_text(halves[1][0][0].strip() + "\n", encoding="utf-8")
    for name, examples, size in zip(("train", "dev"), halves, sizes, strict=True):
        rows = [json.dumps({"messages": conversation(*example)}) for example in examples[:size]]
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"wrote {out / name}.jsonl: {len(rows)} of {len(examples)} conversations")


if __name__ == "__main__":
    main()
