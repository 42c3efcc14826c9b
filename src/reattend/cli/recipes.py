"""The command `recipes` and what is below it."""

import json
from pathlib import Path

import click

from reattend.cli.console import show
from reattend.cli.streams import put
from reattend.errors import Refusal

as_json = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")


@click.group()
def recipes() -> None:
    """List, show and copy the built-in recipes; print the JSON schema."""


@recipes.command("list")
@as_json
def list_recipes(as_json: bool) -> None:
    """List the built-in recipes."""
    import yaml

    from reattend.recipes.schema import builtin_recipes

    texts = builtin_recipes()
    show({name: yaml.safe_load(text)["description"] for name, text in texts.items()}, as_json=as_json)


def _builtin(name: str) -> str:
    from reattend.recipes.schema import builtin_recipes

    texts = builtin_recipes()
    if name not in texts:
        raise Refusal(f"{name}: no such recipe; built in are {', '.join(texts)}")
    return texts[name]


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a built-in recipe."""
    put(_builtin(name), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("file")
def copy_recipe(name: str, file: str) -> None:
    """Copy a built-in recipe to FILE, to be edited."""
    text = _builtin(name)
    try:
        with Path(file).open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise Refusal(f"{file}: {error.strerror}") from error


@recipes.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes."""
    from reattend.recipes.schema import json_schema

    put(json.dumps(json_schema(), indent=2))
