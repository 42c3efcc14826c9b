"""Calibration, sensitivity and evaluation in several processes: the bytes and the numbers of one."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from children import together
from pairs import QUICK, disturb, tiny
from reattend import demo
from reattend.calibration.divided import STOPPED, DividedStatistics, any_missing, missing, undivided
from reattend.errors import Failure, Refusal
from reattend.recipes.schema import parse_recipe

WINDOWS = {
    "window": 32, "windows": 4, "selection_windows": 3,
    "calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT),
}  # fmt: skip
MLA = {"step": "mla", "target": "portable", "rope_dim": 8, "refit_steps": 3, "refit_windows": 2}
STEPS = {
    "int8 smoothed": [{"step": "int8", "outliers": "smooth", "rounding": "compensated"}],
    "int8 static, kept": [{"step": "int8", "outliers": "static", "keep": "auto", "keep_budget": 0.5}],
    "int8 attention": [{"step": "int8_attention"}],
    "clipped softmax": [{"step": "clipped_softmax", "epsilon": 0.01}],
    "mla, divided budget": [MLA | {"latent_rank": "auto", "cache_budget": 0.8, "refit": False}],
    "mla, fitted": [MLA | {"latent_rank": 16}],
    "sharing": [{"step": "attention_sharing", "followers": 1, "refit_steps": 2}],
    "dropping": [{"step": "attention_drop", "count": 1}],
    "dictionary": [{"step": "dictionary", "export": "factors", "solver": "basis", "reduction": 0.3}],
    "two steps": [MLA | {"latent_rank": 16, "refit": False}, {"step": "int8_attention"}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("several") / "model", num_hidden_layers=3)


def recipe(steps, **changes):
    return parse_recipe({"steps": steps} | WINDOWS | changes, "test")


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_apply_gives_the_bytes_of_one_process(model, tmp_path, steps):
    for count in (1, 2):
        codes, _ = together("apply", recipe(steps), model, tmp_path / str(count), processes=count)
        assert codes == [0] * count
    for file in sorted(path.name for path in (tmp_path / "1").iterdir() if path.is_file()):
        assert (tmp_path / "2" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_training_may_be_one_of_several_steps(model, tmp_path):
    student = disturb(model, tmp_path / "student")
    heal = {"step": "heal", "teacher": str(model)} | {k: v for k, v in QUICK.items() if "window" not in k}
    steps = recipe([heal, {"step": "int8", "rounding": "compensated"}])
    assert together("apply", steps, student, tmp_path / "out")[0] == [0, 0]
    healed, rounded = json.loads((tmp_path / "out/reattend.json").read_text())["findings"]
    assert healed["kept_step"] > 0
    assert rounded == {}
    assert reattend.verify(tmp_path / "out")["problems"] == []


def test_evaluate_gives_the_numbers_of_one_process(model, tmp_path):
    other = disturb(model, tmp_path / "other", scale=0.1)
    options = {"against": other, "window": 32, "windows": 5}
    (_, [alone]) = together("evaluate", model, demo.EVAL_TEXT, processes=1, **options)
    codes, found = together("evaluate", model, demo.EVAL_TEXT, processes=3, **options)
    assert codes == [0, 0, 0]
    assert found == [alone] * 3


def test_sensitivity_gives_the_numbers_of_one_process(model):
    steps = recipe([{"step": "int8", "outliers": "smooth", "keep": "auto", "keep_budget": 0.01}])
    (_, [alone]) = together("sensitivity", steps, model, processes=1)
    codes, found = together("sensitivity", steps, model)
    assert codes == [0, 0]
    assert found == [alone] * 2
    assert len(alone["sensitivity"]) == 21


def test_one_that_fails_stops_all(model, tmp_path):
    broken = disturb(model, tmp_path / "broken", scale=0)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    codes, _ = together("apply", recipe(STEPS["int8 smoothed"]), broken, tmp_path / "out")
    assert codes == [1, 1]
    assert not (tmp_path / "out").exists()


def test_refused_in_several_processes(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="outliers: are measured by a single process"):
        reattend.evaluate(model, demo.EVAL_TEXT, window=32, outliers=True)
    monkeypatch.setattr("reattend.pipeline.execution.check_device", lambda device: None)
    with pytest.raises(Refusal, match="device 'cuda:1': several processes take cpu, or cuda and then each its own"):
        reattend.apply("int8", model, tmp_path / "out", device="cuda:1")


class TestDividedStatistics:
    def views(self, folder, count=2):
        stored = {}
        return stored, [DividedStatistics(stored, folder, rank, count) for rank in range(count)]

    def test_each_entry_has_one_maker(self, tmp_path):
        stored, views = self.views(tmp_path)
        names = ["0", "1", "moments-12", "moments-13", "model"]
        assert [[missing(view, name) for name in names] for view in views] == [
            [True, False, True, False, True],
            [False, True, False, True, False],
        ]
        views[1]["0"] = {"of": torch.tensor(1)}
        assert stored == {}
        views[0]["0"] = {"of": torch.tensor(0)}
        assert int(views[1]["0"]["of"]) == 0
        assert not missing(views[0], "0")
        assert undivided(views[0]) is stored
        assert undivided(views[1]) is None

    def test_what_was_not_asked_for_is_not_there(self, tmp_path):
        _, (first, second) = self.views(tmp_path)
        assert "columns" not in second
        assert second.get("columns") is None
        second["columns"] = {}
        assert "columns" in second
        assert list(second) == ["columns"]
        assert list(first) == []

    def test_reading_waits(self, tmp_path):
        _, (first, second) = self.views(tmp_path)
        assert any_missing(second, ["0", "1"])

        def later():
            time.sleep(0.2)
            first["0"] = {"made": torch.tensor(5)}

        maker = threading.Thread(target=later)
        maker.start()
        assert int(second["0"]["made"]) == 5
        maker.join()

    def test_waiting_ends_where_another_stopped(self, tmp_path):
        _, (_, second) = self.views(tmp_path)
        second["model"] = {}
        (tmp_path / STOPPED).touch()
        with pytest.raises(Failure, match="another process stopped before it had made 'model'"):
            second["model"]

    def test_waiting_ends_where_the_folder_is_gone(self, tmp_path):
        _, (_, second) = self.views(tmp_path / "gone")
        missing(second, "0")
        with pytest.raises(Failure, match="another process stopped"):
            second["0"]
