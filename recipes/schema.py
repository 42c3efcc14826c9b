"""Read a recipe: ordered steps with flat parameters, every unknown key refused by name."""

import difflib
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from reattend.errors import Refusal
from reattend.recipes.table import TRANSFORMS

_Model = TypeVar("_Model", bound=BaseModel)


def builtin_recipes() -> dict[str, str]:
    """Return name -> YAML text of the recipes that ship with the package."""
    found = sorted(files("reattend.recipes").iterdir(), key=lambda entry: entry.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in found if f.name.endswith(".yaml")}


class Recipe(BaseModel):
    """Ordered steps, and the texts and settings that they share. Paths are relative to where one runs it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    calibration: str | None = Field(None, description="text file, or dataset:PATH?name=..&split=..&column=..")
    selection: str | None = Field(None, description="another text, on which steps choose their parameters")
    windows: int = Field(64, ge=1, description="windows drawn from the calibration text")
    selection_windows: int = Field(16, ge=1, description="windows drawn from the selection text")
    window: int = Field(1024, ge=2, description="tokens in a window")
    seed: int = Field(0, ge=0, description="seed of the draw")
    max_shard_bytes: int = Field(5_000_000_000, ge=1, description="size at which the output is split")
    steps: tuple[SerializeAsAny[BaseModel], ...] = Field(min_length=1)


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """Return a recipe, given as a YAML file's path or a built-in name.

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


def parse_recipe(content: Any, where: str) -> Recipe:
    """Return a recipe given as parsed YAML."""
    if not isinstance(content, dict):
        raise Refusal(f"{where}: a recipe is a map with the key 'steps'")
    for key in content:
        _check_key(key, tuple(Recipe.model_fields), where)
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise Refusal(f"{where}: steps must be a list of at least one step")
    parsed = [parse_step(step, f"{where}: steps[{i}]") for i, step in enumerate(steps)]
    return _validated(Recipe, {**content, "steps": parsed}, where)


def parse_step(step: Any, where: str) -> BaseModel:
    """Return one step, validated by its class."""
    if not isinstance(step, Mapping) or not isinstance(step.get("step"), str):
        raise Refusal(f"{where}: needs the key 'step' with one of {', '.join(TRANSFORMS)}")
    _check_key(step["step"], tuple(TRANSFORMS), where)
    kind = step_class(step["step"])
    for key in step:
        _check_key(key, tuple(kind.model_fields), where)
    return _validated(kind, step, where)


def _validated(kind: type[_Model], content: Mapping[str, Any], where: str) -> _Model:
    try:
        return kind(**content)
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
    schema = Recipe.model_json_schema()
    steps = [step_class(name).model_json_schema() for name in TRANSFORMS]
    schema["properties"]["steps"]["items"] = {"anyOf": steps}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_recipe(recipe: Recipe) -> str:
    """Return the YAML of a recipe with every parameter written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check_key(key: Any, allowed: tuple[str, ...], where: str) -> None:
    if key in allowed:
        return
    near = difflib.get_close_matches(str(key), allowed, 1, 0.0)
    raise Refusal(f"{where}: unknown {key!r}; nearest is {near[0]!r}, allowed are {', '.join(allowed)}")
