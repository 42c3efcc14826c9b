"""Numbers and switches of recipes take what they say and nothing that merely could be turned into it."""

import typing

import pytest

from reattend import Refusal
from reattend.recipes.schema import Recipe, override, parse_step, parse_yaml, step_class
from reattend.recipes.table import TRANSFORMS

CLASSES = {"recipe": Recipe} | {name: step_class(name) for name in TRANSFORMS}
WRONG = {int: (True, "4", 4.5), float: (True, "0.5", float("inf"), float("nan")), bool: (1, "yes", "true")}


def kinds(annotation):
    """The plain types that an annotation allows, unions and annotated types opened."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return kinds(inner[0])
    return [annotation] if annotation in WRONG else [kind for part in inner for kind in kinds(part)]


FIELDS = [
    (name, field, value)
    for name, kind in CLASSES.items()
    for field, annotation in typing.get_type_hints(kind, include_extras=True).items()
    if field in kind.model_fields and typing.get_origin(annotation) is not tuple
    for plain in kinds(annotation)
    for value in WRONG[plain]
]


def test_numbers_are_written_as_yaml_1_2_has_them():
    text = "[1e-3, 2E+2, -1.5e3, 1e5, 1.0e-3, 12, e5, 1e, x1e-3]"
    assert parse_yaml(text, "text") == [1e-3, 200.0, -1500.0, 1e5, 1e-3, 12, "e5", "1e", "x1e-3"]


def test_there_are_fields_to_test():
    assert {name for name, _, _ in FIELDS} >= {"recipe", "int8", "mla"}


def parse(name, settings):
    if name == "recipe":
        return override(Recipe(steps=(step_class("int8")(),)), settings)
    return parse_step({"step": name, **settings}, "recipe.yaml")


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_what_is_no_number_and_no_switch_is_refused_by_name(name, field, value):
    with pytest.raises(Refusal, match=field):
        parse(name, {field: value})
