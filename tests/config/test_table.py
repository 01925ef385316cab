"""The table of keys says what the schema says."""

from cola_ds.config.schema import SECTIONS, RunConfig
from cola_ds.config.table import key_table
from tests.support.toys import REPOSITORY


def test_the_table_is_the_schemas():
    assert (REPOSITORY / "launch/KEYS.md").read_text(encoding="utf-8") == key_table(), (
        "python -m cola_ds.config.table > launch/KEYS.md"
    )


def test_every_key_has_a_meaning():
    for name, field in RunConfig.model_fields.items():
        inner = field.annotation.model_fields if name in SECTIONS else {name: field}
        for key, said in inner.items():
            assert said.description, f"{name}.{key}"
            assert f"| `{key}` | " in key_table()
