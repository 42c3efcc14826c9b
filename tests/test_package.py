"""The picture in ARCHITECTURE.md, held against the code."""

import ast
import re
import sys
from pathlib import Path

import pytest
import transformers

import reattend
from reattend.families.portable import FORMAT, PORTABLE
from reattend.families.rows import FAMILIES
from reattend.modeling.portable import configuration_reattend
from reattend.recipes.schema import builtin_recipes, load_recipe

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "convert": "convert",
    "quantize": "quantize",
    "kernels": "kernels",
    "recipes": "recipes",
    "src/reattend": "",
}
# package -> what of ours it may import
ALLOWED = {
    "__main__": {"cli"},
    "errors": set(),
    "progress": set(),
    "processes": {"errors"},
    "demo": set(),
    "checkpoint": {"errors"},
    "families": {"checkpoint", "errors"},
    "transform": {"calibration", "checkpoint", "families", "progress"},
    "texts": {"errors"},
    "modeling": {"checkpoint", "errors", "families", "kernels", "quantize"},
    "calibration": {"errors", "families", "kernels", "texts"},
    "evaluation": {
        "calibration",
        "checkpoint",
        "errors",
        "families",
        "kernels",
        "modeling",
        "processes",
        "progress",
        "texts",
    },
    "healing": {
        "calibration",
        "checkpoint",
        "errors",
        "families",
        "modeling",
        "processes",
        "progress",
        "transform",
    },
    "kernels": set(),
    "convert": {"calibration", "checkpoint", "convert", "errors", "families", "kernels", "modeling", "transform"},
    "quantize": {"calibration", "checkpoint", "errors", "families", "kernels", "quantize", "transform"},
    "recipes": {"errors"},
    "pipeline": {
        "calibration",
        "checkpoint",
        "errors",
        "families",
        "modeling",
        "processes",
        "progress",
        "recipes",
        "texts",
        "transform",
    },
    "reporting": {
        "checkpoint",
        "errors",
        "evaluation",
        "pipeline",
        "processes",
        "progress",
        "recipes",
        "texts",
    },
    "hub": {"checkpoint", "errors", "processes", "progress", "reporting"},
    "serving": {"families"},
    "cli": {"demo", "errors", "evaluation", "modeling", "pipeline", "processes", "progress", "recipes", "reporting"},
}


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            yield (package or relative.parts[0].removesuffix(".py")), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reattend."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "reattend":
            yield from (a.name for a in node.names if a.name in ALLOWED)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("reattend."))


def test_imports_follow_the_picture():
    for package, path in modules():
        if package == "__init__":
            continue  # the root names everything, late
        extra = set(imported(path)) - ALLOWED[package] - {package}
        assert not extra, f"{path} imports {extra}"


def test_package_list_equals_the_folders():
    listed = set(re.findall(r'^    "(reattend[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = ("reattend", package, *path.parent.relative_to(ROOT / folder).parts)
            found.add(".".join(part for part in parts if part))
    assert listed == found


def test_the_wheel_is_what_is_tested():
    assert ROOT not in Path(reattend.__file__).parents or "site-packages" in reattend.__file__
    # The root on the path would let our kernels/ stand in for the package of that name.
    assert str(ROOT) not in sys.path
    assert str(ROOT / "src") not in sys.path


def test_public_names():
    assert reattend.__all__ == sorted(reattend.__all__)
    assert all(getattr(reattend, name).__doc__ for name in reattend.__all__)


def test_every_recipe_parses():
    assert all(load_recipe(name) for name in builtin_recipes())


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_in_docs_exist(name):
    text = (ROOT / name).read_text("utf-8")
    for path in re.findall(r"`((?:src|convert|quantize|kernels|recipes|tests|scripts|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_changelog_names_the_version():
    assert f"## {reattend.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(row):
    if row.model_type in PORTABLE:
        config = getattr(configuration_reattend, PORTABLE[row.model_type].config)()
    else:
        config = transformers.AutoConfig.for_model(row.model_type)
    for key, value in row.defaults.items():
        assert getattr(config, key) == value, key
    assert all(hasattr(config, key) for s, key in row.keys.items() if s not in ("head_dim", "kv_heads", "experts"))


def test_code_that_stands_alone_agrees_on_its_format_and_imports_nothing_of_ours():
    assert configuration_reattend.FORMAT == FORMAT
    for classes in PORTABLE.values():
        for name, content in classes.code():
            assert b"import reattend" not in content, name
            assert b"from reattend" not in content, name
