"""docs/reference.md, which is written from the dataclasses of the code."""

import dataclasses
import typing

import pytest

from experiments.config.schema import Config
from experiments.reference import PATH, reference


@pytest.mark.slow  # imports all commands
def test_reference_is_current():
    assert PATH.read_text(encoding="utf-8") == reference(), "run python -m experiments.reference"


def fields(schema, path=""):
    """Yield path and field of every key of an experiment."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        item = typing.get_args(hint)[-1] if typing.get_args(hint) else None
        nested = hint if dataclasses.is_dataclass(hint) else item if dataclasses.is_dataclass(item) else None
        if not dataclasses.is_dataclass(hint):
            yield f"{path}{field.name}", field, hint
        if nested:
            yield from fields(nested, f"{path}{field.name}.")


def test_every_key_has_a_meaning_and_every_number_has_bounds():
    for path, field, hint in fields(Config):
        assert field.metadata.get("help"), path
        if {int, float} & {hint, *typing.get_args(hint)}:
            assert field.metadata["bounds"], path
