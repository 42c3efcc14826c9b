"""Every built-in recipe, run on the bundled model: planned, applied, verified, measured."""

import math

import pytest
from huggingface_hub import ModelCard

import reattend
from pairs import disturb
from reattend import demo
from reattend.recipes.schema import Recipe, builtin_recipes, load_recipe, override

# What does not fit a model of 5 layers and 96 numbers, or would take long.
CHANGES = {
    "mla": {"latent_rank": 48, "rope_dim": 8, "refit_steps": 2},
    "heal": {"steps": 4, "batch": 2, "micro_batch": 1, "teacher": str(demo.MODEL), "learning_rate": 1e-5},
    "attention-sharing": {"budget": 0.5, "refit_steps": 2},
    "attention-drop": {"budget": 0.5},
}
TEXTS = {"calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT)}


def small(name: str) -> Recipe:
    recipe = load_recipe(name)
    steps = tuple(step.model_copy(update=CHANGES.get(name, {})) for step in recipe.steps)
    settings = {"windows": 4, "selection_windows": 2, "window": 128}
    return override(recipe.model_copy(update={"steps": steps}), settings | TEXTS)


@pytest.mark.parametrize("name", builtin_recipes())
def test_on_the_bundled_model(name, tmp_path):
    source = disturb(demo.MODEL, tmp_path / "student", 0.05) if name == "heal" else demo.MODEL
    planned = reattend.plan(small(name), source).summary()
    done = reattend.apply(small(name), source, tmp_path / "out").summary()
    assert done["bytes_after"] <= planned["bytes_after"]
    told = reattend.report(tmp_path / "out", against=source, base="org/demo")
    assert told["verification"]["problems"] == []
    assert told["engines"] == done["engines"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/demo"
    assert card.data.tags[:2] == ["reattend", planned["steps"][0]["step"].replace("_", "-")]
    model, tokenizer = reattend.load(tmp_path / "out")
    loss = model(**tokenizer("The town lies on the river", return_tensors="pt")).logits.float().logsumexp(-1)
    assert math.isfinite(float(loss.detach().mean()))


def test_the_changes_are_of_recipes_that_exist():
    assert set(CHANGES) <= set(builtin_recipes())
