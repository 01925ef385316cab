"""Build the quickstart's dataset from the documentation of Python's standard library, which is on every machine.

    python launch/quickstart/data.py OUT_DIR [TRAIN_EXAMPLES HELD_OUT_EXAMPLES]

prompt: the signature of a function or class, and the question what it does; completion: the first paragraph of its docstring.
The sources are parsed, never imported. Training and held-out examples come from different modules (whole top-level packages),
and no docstring appears twice, so nothing held out was seen in training. Writes OUT_DIR/train.jsonl and OUT_DIR/dev.jsonl.
"""

import ast
import hashlib
import json
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LONGEST = 240  # characters of prompt or completion: long examples cost time and teach this task little
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "__pycache__",
    "__phello__",
}


def documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of the public functions, classes and methods of one module."""
    for owner in [
        tree,
        *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")),
    ]:
        prefix = f"{module}.{owner.name}" if isinstance(owner, ast.ClassDef) else module
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node)
            if not text:
                continue
            kind = "class" if isinstance(node, ast.ClassDef) else "function" if owner is tree else "method"
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            paragraph = " ".join(text.split("\n\n")[0].split())
            yield f"What does the Python {kind} `{prefix}.{node.name}{arguments}` do?\n", paragraph


def collect(library: Path) -> dict[str, list[tuple[str, str]]]:
    """Examples by top-level package, in a fixed order, without repeated docstrings."""
    found: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a file in another encoding, not a module of the library
        module = ".".join(part for part in parts if part != "__init__")
        for prompt, completion in documented(tree, module):
            words = completion.lower()
            if words not in seen and 20 <= len(completion) <= LONGEST and len(prompt) <= LONGEST:
                seen.add(words)
                found.setdefault(parts[0], []).append((prompt, completion))
    return found


def split(found: dict[str, list[tuple[str, str]]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and held-out examples: a fifth of the packages is held out, by a hash of the name."""
    train, held_out = [], []
    for package, examples in found.items():
        digest = hashlib.sha256(package.encode()).digest()
        (held_out if digest[0] % 5 == 0 else train).extend(examples)
    for examples in (train, held_out):
        random.Random(0).shuffle(examples)
    return train, held_out


def main() -> None:
    """Write both files; see the top of this one."""
    if len(sys.argv) not in (2, 4):
        sys.exit("usage: python launch/quickstart/data.py OUT_DIR [TRAIN_EXAMPLES HELD_OUT_EXAMPLES]")
    out = Path(sys.argv[1])
    sizes = [int(word) for word in sys.argv[2:]] or [None, None]
    out.mkdir(parents=True, exist_ok=True)
    for name, examples, size in zip(
        ("train", "dev"), split(collect(Path(sysconfig.get_path("stdlib")))), sizes, strict=True
    ):
        rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in examples[:size]]
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"wrote {out / name}.jsonl: {len(rows)} of {len(examples)} examples")


if __name__ == "__main__":
    main()
