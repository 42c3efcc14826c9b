"""Read a recipe: ordered steps with flat parameters, every unknown key refused by name."""

import difflib
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from reattend.errors import Refusal
from reattend.recipes.table import TRANSFORMS

_Model = TypeVar("_Model", bound=BaseModel)


def builtin_recipes() -> dict[str, str]:
    """Return name -> YAML text of the recipes that ship with the package."""
    found = sorted(files("reattend.recipes").iterdir(), key=lambda entry: entry.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in found if f.name.endswith(".yaml")}


class Evaluation(BaseModel):
    """How the output is measured against its source, as `eval` would: what its report says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, description="a third text: text file, or dataset:PATH")
    window: int | None = Field(
        None, ge=2, strict=True, description="tokens in a window, as in calibration by default"
    )
    windows: int | None = Field(None, ge=1, strict=True, description="windows to measure, all by default")
    dtype: str = Field("auto", description="what models run in")
    outliers: bool = Field(False, strict=True, description="also inf-norms, kurtosis and sinks, layer by layer")


class Recipe(BaseModel):
    """Ordered steps, and the texts and settings that they share. Paths are relative to where one runs it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    calibration: str | None = Field(None, description="text file, or dataset:PATH?name=..&split=..&column=..")
    selection: str | None = Field(None, description="another text, on which steps choose their parameters")
    windows: int = Field(64, ge=1, strict=True, description="windows drawn from the calibration text")
    selection_windows: int = Field(16, ge=1, strict=True, description="windows drawn from the selection text")
    window: int = Field(1024, ge=2, strict=True, description="tokens in a window")
    seed: int = Field(0, ge=0, le=2**63 - 1, strict=True, description="seed of the draw")
    max_shard_bytes: int = Field(5_000_000_000, ge=1, strict=True, description="size at which the output is split")
    evaluate: Evaluation | None = Field(None, description="measure the output when it is there, and write a report")
    steps: tuple[SerializeAsAny[BaseModel], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_writable(self) -> "Recipe":
        """An output holds its recipe: text that UTF-8 can't hold is refused, instead of found out then."""
        try:
            self.model_dump_json()
        except ValueError as error:
            raise ValueError("holds text that can't be encoded as UTF-8") from error
        return self


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """Return a recipe, given as a YAML file's path or a built-in name.

    Raises `Refusal` naming the key, and the nearest allowed one.
    """
    if not str(recipe):
        raise Refusal("the name of a recipe is empty: expected a YAML file, or a built-in name")
    text = builtin_recipes().get(str(recipe))
    if text is None:
        text = _read(Path(recipe))
    return parse_recipe(parse_yaml(text, str(recipe)), str(recipe))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise Refusal(f"{path}: no such recipe; built in are {', '.join(builtin_recipes())}") from error
    except IsADirectoryError as error:
        raise Refusal(f"{path}: is a folder, expected a recipe's YAML file") from error
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 text") from error


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key which stands twice: YAML forbids it, and PyYAML takes the last.

    And it takes 1e-3 for a number, as YAML 1.2 does.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See the class."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Return parsed YAML. Raises `Refusal` in one line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise Refusal(f"{where}: not valid YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError) as error:
        quotes = "; a value that starts with * or & needs quotes" if "alias" in str(error) else ""
        raise Refusal(f"{where}: not valid YAML ({' '.join(str(error).split())}{quotes})") from error


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other settings; what they are is checked as in a file."""
    return _validated(Recipe, {**dict(recipe), **settings}, "command line")


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
        first, *others = error.errors()
        alike = [other for other in others if other["loc"][:1] == first["loc"][:1] != ()]  # branches of one union
        loc = first["loc"][:1] if alike else first["loc"]
        key = "".join(f"{part}: " for part in [".".join(map(str, loc))] if part)
        says = " or ".join(dict.fromkeys(_says(each) for each in (first, *alike)))
        raise Refusal(f"{where}: {key}{says}{_given(first)}") from error


def _says(error: Any) -> str:
    form = ", written as [a, b]" if error["type"] in ("list_type", "tuple_type") else ""
    return str(error["msg"]).removeprefix("Value error, ") + form


def _given(error: Any) -> str:
    """Say what was given, shortened: YAML's aliases can make a few lines into gigabytes."""
    if not error["loc"]:
        return ""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return f", not {short.repr(error['input'])}"


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
