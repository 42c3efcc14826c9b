"""latent_rank: auto with a perplexity budget, against the checkpoints that it stands for."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reattend
from reattend import Refusal, demo
from reattend.calibration.tokens import sample_tokens
from reattend.convert.mla import budget
from reattend.convert.mla.transform import Mla
from reattend.modeling.loading import load_tokenizer
from reattend.recipes.schema import Recipe
from reattend.texts.reading import read_text

SELECTION = demo.EVAL_TEXT.with_name("select.txt")
AUTO = {"latent_rank": "auto", "perplexity_budget": 0.05}


def recipe(**settings):
    texts = {"calibration": str(demo.EVAL_TEXT), "selection": str(SELECTION)}
    step = Mla(**{"rope_dim": 16, "refit": False, **settings})
    return Recipe(steps=(step,), windows=8, selection_windows=2, window=128, **texts)


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "out"
    planned = reattend.apply(recipe(**AUTO), demo.MODEL, out)
    (findings,) = json.loads((out / "reattend.json").read_text())["findings"]
    return out, planned, findings


def perplexity(folder):
    ids = sample_tokens(
        read_text(SELECTION), load_tokenizer(demo.MODEL), windows=2, window=128, seed=0, bos_each=False
    )
    model = reattend.load(folder, dtype="float32").model
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss for row in ids]).mean().exp().item()


@pytest.mark.parametrize(
    ("rises", "limit", "rank"),
    [
        ({16: 0.2, 32: 0.1, 48: 0.05, 64: 0.0}, 0.06, 48),
        ({16: 0.2, 32: 0.1, 48: 0.05, 64: 0.0}, 0.001, 64),
        ({16: 0.2, 32: 0.1, 48: 0.05, 64: 0.0}, 0.5, 16),
        ({16: 0.0}, 0.1, 16),
    ],
)
def test_the_rank_is_the_least_within_the_budget(rises, limit, rank):
    class Table:
        """Losses by rank, in place of a model: its layers pass the rank on as what they put out."""

        def __call__(self, *texts, windows=None):
            assert texts == ("selection",)
            yield SimpleNamespace(hidden={"selection": torch.zeros(1, 1, 1)})

        def losses(self, text, hidden):
            found = int(hidden.max())
            asked.append(found)
            return torch.tensor([3 + math.log1p(rises.get(found, 0.0))], dtype=torch.float64)

    asked = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(budget, "run_converted", lambda layer, attention, states: states.fill_(attention))
        statistics = {}
        found = budget.decide_rank(Table(), statistics, lambda layer, rank: rank, max(rises) + 5, limit)
        assert found == rank
        assert len(asked) == len(set(asked))
        assert (
            budget.decide_rank(Table(), statistics, None, max(rises) + 5, limit) == rank
        )  # nothing is measured again
    statistics["rank"] = {"latent_rank": torch.tensor(found)}
    told = budget.rank_findings(statistics)
    assert told["latent_rank"] == rank
    assert told["selection_perplexity"][f"closed form, {rank}"] == pytest.approx(
        math.exp(3) * (1 + rises[rank]), rel=1e-5
    )


def test_what_is_measured_is_what_is_written(decided):
    out, _, findings = decided
    measured = findings["selection_perplexity"]
    assert perplexity(demo.MODEL) == pytest.approx(measured["source"], rel=1e-5)
    # The output is rounded to bf16.
    assert perplexity(out) == pytest.approx(measured[f"closed form, {findings['latent_rank']}"], rel=5e-3)


def test_the_output_is_that_of_the_rank_given_by_hand(decided, tmp_path):
    out, planned, findings = decided
    by_hand = reattend.apply(recipe(latent_rank=findings["latent_rank"]), demo.MODEL, tmp_path / "out")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes()
    assert planned.layout.nbytes == by_hand.layout.nbytes
    assert not reattend.verify(out, against=demo.MODEL)["problems"]


def test_before_calibration_sizes_are_those_of_the_largest_rank():
    planned, largest = (reattend.plan(recipe(**settings), demo.MODEL) for settings in (AUTO, {"latent_rank": 112}))
    assert planned.disk_bytes >= largest.disk_bytes
    assert any("calibration decides" in remark for remark in planned.remarks)


def test_a_budget_that_no_rank_meets_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_losses", lambda passes, convert, rank: torch.tensor([2.0 if rank else 1.0]))
    with pytest.raises(Refusal, match=r"perplexity_budget: 0.05 is not met by latent_rank \d+"):
        reattend.apply(recipe(**AUTO), demo.MODEL, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@given(st.integers(2, 4), st.integers(0, 2**31), st.booleans())
def test_ranks_are_divided_as_by_trying_everything(layers, seed, convex):
    """Where errors are convex the sum is the least of all divisions."""
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(layers, 4, generator=generator)
    falls = falls.sort(1, descending=True).values if convex else falls
    errors = (4 - falls.cumsum(1)).tolist()
    given_steps = budget.divide(errors, 2 * layers)
    total = sum(row[steps - 1] for row, steps in zip(errors, given_steps, strict=True))
    assert sum(given_steps) == 2 * layers
    assert min(given_steps) >= 1
    if convex:
        every = (c for c in itertools.product(range(1, 5), repeat=layers) if sum(c) == 2 * layers)
        least = min(sum(row[steps - 1] for row, steps in zip(errors, c, strict=True)) for c in every)
        assert total == pytest.approx(least)


def test_a_step_that_pays_only_with_the_next_is_taken_with_it():
    assert budget.divide([[1.0, 1.0, 0.0], [1.0, 0.6, 0.5]], 4) == [3, 1]
