"""Read a recipe: ordered steps with flat parameters, every unknown key refused by name."""

import difflib
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from reattend.errors import Refusal
from reattend.recipes.table import TRANSFORMS


def builtin_recipes() -> dict[str, str]:
    """Return name -> YAML text of the recipes that ship with the package."""
    found = sorted(files("reattend.recipes").iterdir(), key=lambda entry: entry.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in found if f.name.endswith(".yaml")}


def load_recipe(recipe: str | os.PathLike[str]) -> list[BaseModel]:
    """Return the steps of a recipe, given as a YAML file's path or a built-in name.

    Raises `Refusal` naming the key, and the nearest allowed one.
    """
    text = builtin_recipes().get(str(recipe))
    if text is None:
        text = _read(Path(recipe))
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise Refusal(f"{recipe}: not valid YAML ({' '.join(str(error).split())})") from error
    return parse_recipe(content, str(recipe))


def _read(path: Path) -> str:
    if not path.is_file():
        raise Refusal(f"{path}: no such recipe; built in are {', '.join(builtin_recipes())}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 text") from error


def parse_recipe(content: Any, where: str) -> list[BaseModel]:
    """Return the steps of a recipe given as parsed YAML."""
    if not isinstance(content, dict):
        raise Refusal(f"{where}: a recipe is a map with the key 'steps'")
    for key in content:
        _check_key(key, ("description", "steps"), where)
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise Refusal(f"{where}: steps must be a list of at least one step")
    return [parse_step(step, f"{where}: steps[{i}]") for i, step in enumerate(steps)]


def parse_step(step: Any, where: str) -> BaseModel:
    """Return one step, validated by its class."""
    if not isinstance(step, Mapping) or not isinstance(step.get("step"), str):
        raise Refusal(f"{where}: needs the key 'step' with one of {', '.join(TRANSFORMS)}")
    _check_key(step["step"], tuple(TRANSFORMS), where)
    kind = step_class(step["step"])
    for key in step:
        _check_key(key, tuple(kind.model_fields), where)
    try:
        return kind(**step)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Refusal(f"{where}: {key}: {first['msg']}, not {first['input']!r}") from error


def step_class(name: str) -> type[BaseModel]:
    """Return the class of a step."""
    module, attribute = TRANSFORMS[name].split(":")
    kind: type[BaseModel] = getattr(import_module(module), attribute)
    return kind


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    steps = [step_class(name).model_json_schema() for name in TRANSFORMS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "description": {"type": "string"},
            "steps": {"type": "array", "minItems": 1, "items": {"anyOf": steps}},
        },
    }


def dump_recipe(steps: list[BaseModel]) -> str:
    """Return the YAML of a recipe with every parameter written out."""
    content = {"steps": [step.model_dump(mode="json") for step in steps]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _check_key(key: Any, allowed: tuple[str, ...], where: str) -> None:
    if key in allowed:
        return
    near = difflib.get_close_matches(str(key), allowed, 1, 0.0)
    raise Refusal(f"{where}: unknown {key!r}; nearest is {near[0]!r}, allowed are {', '.join(allowed)}")
