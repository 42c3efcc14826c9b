"""keep: auto, against the models that it stands for."""

import hashlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import reattend
from reattend import Failure, Refusal, demo
from reattend.calibration.search import fewest, stored_loss
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.staging import Staging
from reattend.cli import cli
from reattend.modeling.loading import load_tokenizer
from reattend.pipeline.planning import plan
from reattend.quantize.int8 import keeping
from reattend.quantize.int8.keeping import Keeping
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe, parse_step
from reattend.texts.reading import read_text

SELECTION = demo.EVAL_TEXT.with_name("select.txt")
TEXTS = {
    "calibration": str(demo.EVAL_TEXT),
    "selection": str(SELECTION),
    "windows": 4,
    "selection_windows": 3,
    "window": 64,
}
SETTINGS = {
    "W8A8": {},
    "W8A16": {"activations": "none"},
    "bitsandbytes": {"format": "bitsandbytes", "threshold": 3.0},
    "static": {"outliers": "static"},
    "smooth": {"outliers": "smooth"},
    "compensated": {"rounding": "compensated"},
}


def recipe(**settings):
    return Recipe(steps=(Int8(**settings),), **TEXTS)


def findings(out):
    return json.loads((out / "reattend.json").read_text())["findings"][-1]


def weights(out):
    return {f.relative_to(out): hashlib.sha256(f.read_bytes()).digest() for f in sorted(out.rglob("*.safetensors"))}


def losses(folder):
    """Mean losses of the selection windows, by the model that reattend.load makes of a folder."""
    ids = sample_tokens(
        read_text(SELECTION), load_tokenizer(demo.MODEL), windows=3, window=64, seed=0, bos_each=False
    )
    model = reattend.load(folder, dtype="float32").model
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss for row in ids]).double()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The demo model with one layer whose weights int8 can't hold: a huge number in each row of up_proj."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(demo.MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][:, 7] = 40.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_measured_is_what_is_written(tmp_path, settings):
    """Of settings with nothing kept, and with the linears that the first run found worst."""
    reattend.apply(recipe(**settings, keep="auto", keep_budget=50.0), demo.MODEL, tmp_path / "auto")
    measured = findings(tmp_path / "auto")
    assert measured["kept"] == []
    assert set(measured["selection_perplexity"]) == {"source", "0 kept"}
    written = losses(tmp_path / "auto").mean().exp().item()
    source = losses(demo.MODEL).mean().exp().item()
    assert measured["selection_perplexity"]["source"] == pytest.approx(source, rel=1e-5)
    # Smoothing rounds the norms that hold its factors, which the measurement leaves out.
    assert measured["selection_perplexity"]["0 kept"] == pytest.approx(
        written, rel=1e-3 if "smooth" in str(settings) else 1e-5
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_measured_with_some_kept_is_what_is_written(planted, tmp_path, settings, monkeypatch):
    """Seven are kept; static columns are shared out anew then, which can only help, and is not measured again."""
    monkeypatch.setattr(keeping, "fewest", lambda least, most, fits: (fits(7), 7)[1])
    reattend.apply(recipe(**settings, keep="auto"), planted, tmp_path / "auto")
    found = findings(tmp_path / "auto")
    assert len(found["kept"]) == 7
    written = losses(tmp_path / "auto").mean().exp().item()
    loose = "smooth" in str(settings) or "static" in str(settings)
    assert found["selection_perplexity"]["7 kept"] == pytest.approx(written, rel=1e-3 if loose else 1e-5)
    if "static" in str(settings):
        beside = {n for f in (tmp_path / "auto" / "int8_outliers").iterdir() for n in load_file(f)}
        assert beside
        assert not any(name.rpartition(".")[0] in found["kept"] for name in beside)
        with_columns = {
            f"model.layers.{layer}.{linear}" for linear, counts in found["static_columns"].items() for layer, n in
            enumerate(counts) if n
        }  # fmt: skip
        assert with_columns <= {name.rpartition(".")[0] for name in beside}


def test_the_layer_that_int8_cannot_hold_is_kept(planted, tmp_path):
    done = reattend.apply(recipe(keep="auto", keep_budget=0.02), planted, tmp_path / "auto")
    found = findings(tmp_path / "auto")
    worst = "model.layers.2.mlp.up_proj"
    assert next(iter(found["sensitivity"])) == worst
    assert worst in found["kept"]
    perplexity = found["selection_perplexity"]
    assert perplexity["0 kept"] > 1.02 * perplexity["source"] >= perplexity[f"{len(found['kept'])} kept"]
    assert perplexity.get(f"{len(found['kept']) - 1} kept", 1e9) > 1.02 * perplexity["source"]
    reattend.apply(recipe(keep=tuple(found["kept"])), planted, tmp_path / "by-hand")
    assert weights(tmp_path / "auto") == weights(tmp_path / "by-hand")
    size = (tmp_path / "auto" / "model.safetensors").stat().st_size
    assert done.layout.nbytes + len(done.layout.headers["model.safetensors"]) == size
    assert not reattend.verify(tmp_path / "auto", against=planted)["problems"]


def test_the_error_of_a_linear_alone(planted, tmp_path):
    """Against the layer's output with the dequantised weight put in by hand (W8A16: nothing else is rounded)."""
    measured = reattend.sensitivity(recipe(activations="none", keep="auto"), planted)["sensitivity"]
    ids = sample_tokens(read_text(SELECTION), load_tokenizer(planted), windows=3, window=64, seed=0, bos_each=False)
    for name in ("model.layers.2.mlp.up_proj", "model.layers.1.self_attn.v_proj"):
        source = reattend.load(planted, dtype="float32").model
        layer = source.get_submodule(".".join(name.split(".")[:3]))
        seen = []
        handle = layer.register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.append((args[0].clone(), kwargs, out.clone())),
            with_kwargs=True,
        )
        with torch.no_grad():
            for row in ids:
                source(row[None], use_cache=False)
            handle.remove()
            linear = source.get_submodule(name)
            scale = (linear.weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
            scale = torch.where(scale * 127 < linear.weight.abs().amax(1, keepdim=True), scale * (1 + 2**-7), scale)
            scale = scale.bfloat16().float()
            linear.weight.copy_((linear.weight / scale).round() * scale)
            errors = [
                ((layer(x, **kwargs) - out).square().sum(-1) / out.square().sum(-1)).mean() for x, kwargs, out in seen
            ]
        assert measured[name] == pytest.approx(float(torch.stack(errors).mean()), rel=0.02)


def test_an_interrupted_decision_is_resumed(planted, tmp_path, monkeypatch):
    whole = recipe(keep="auto", keep_budget=0.02)
    reattend.apply(whole, planted, tmp_path / "whole")
    real, calls = Keeping._losses, []

    def losses_until(last):
        def measured(*args):
            calls.append(args)
            if len(calls) == last:
                raise Failure("interrupted")
            return real(*args)

        return measured

    with monkeypatch.context() as patched:
        patched.setattr(Keeping, "_losses", losses_until(4))
        with pytest.raises(Failure, match="interrupted"):
            reattend.apply(whole, planted, tmp_path / "out")
    assert (tmp_path / ".out.partial/work/statistics/sensitivity.safetensors").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Keeping, "_losses", losses_until(0))
        patched.setattr(Keeping, "_measured", None)  # a second look at the linears would fail
        done = reattend.apply(whole, planted, tmp_path / "out", resume=True)
    measured_again = len(calls) - 4
    assert measured_again == len(findings(tmp_path / "whole")["selection_perplexity"]) - 3
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert findings(tmp_path / "out") == findings(tmp_path / "whole")
    assert done.layout.nbytes > plan(recipe(), planted).layout.nbytes


def test_a_budget_that_nothing_meets_is_refused_and_leaves_nothing(planted, tmp_path):
    # A rise of perplexity of 1e-12 is met by the source alone.
    with pytest.raises(Refusal, match=r"keep_budget: 1e-12 leaves no layer"):
        reattend.apply(recipe(keep="auto", keep_budget=1e-12, select=("*.2.mlp.up_proj",)), planted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_killed_between_the_last_word_and_the_rename(planted, tmp_path, monkeypatch):
    whole = recipe(keep="auto", keep_budget=0.02)
    decided = reattend.apply(whole, planted, tmp_path / "whole")

    def killed(self):
        self.sync()
        self._note("finished")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            reattend.apply(whole, planted, tmp_path / "out")
    done = reattend.apply(whole, planted, tmp_path / "out", resume=True)
    assert done.layout.nbytes == decided.layout.nbytes
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_sensitivity_outlives_a_budget_that_nothing_meets(planted):
    found = reattend.sensitivity(recipe(keep="auto", keep_budget=1e-12, select=("*.2.mlp.up_proj",)), planted)
    assert list(found["sensitivity"]) == ["model.layers.2.mlp.up_proj"]
    assert "keep_budget: 1e-12" in found["refused"]
    assert "kept" not in found


def test_a_token_whose_residual_stream_is_zero_counts_for_nothing(tmp_path):
    """The start of every window may be a padding row of zeros."""
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    ids = sample_tokens(
        read_text(SELECTION), load_tokenizer(demo.MODEL), windows=3, window=64, seed=0, bos_each=False
    )
    tensors["model.embed_tokens.weight"][ids[:, 0]] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = reattend.sensitivity(recipe(keep="auto"), folder)
    assert all(0 < error < 1 for error in found["sensitivity"].values())


def test_weights_that_are_no_numbers_are_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"layer 1.*its tensor 'self_attn.q_proj.weight' does"):
        reattend.sensitivity(recipe(keep="auto"), folder)


@pytest.mark.parametrize("texts", [{"calibration": 5}, {"calibration": {"sha256": 3}}, [1]])
def test_a_source_whose_record_of_texts_is_damaged_is_refused(tmp_path, texts):
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)
    (folder / "reattend.json").write_text(json.dumps({"texts": texts}))
    with pytest.raises(Refusal, match=r"reattend\.json: is damaged"):
        reattend.apply(recipe(keep="auto"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_told_as_that():
    with pytest.raises(Refusal, match="loss on the selection text is nan: its last norm"):
        stored_loss({}, "kept-3", lambda: torch.tensor([1.0, torch.nan]))


def test_settings_that_do_nothing_or_come_too_early(models):
    with pytest.raises(ValueError, match="keep_budget does nothing"):
        Int8(keep_budget=0.5)
    with pytest.raises(Refusal, match="keep: auto: bert is an encoder"):
        plan(recipe(keep="auto"), models("bert"))
    for wrong in ("autoo", 3, None, ["a", 1]):
        with pytest.raises(
            Refusal, match=r"^r: keep: Input should be 'auto' or Input should be a valid (tuple|string)"
        ):
            parse_step({"step": "int8", "keep": wrong}, "r")
    two = Recipe(steps=(Int8(keep="auto"), Int8()), **TEXTS)
    with pytest.raises(Refusal, match=r"steps\[1\]: .*quantised already"):
        plan(two, demo.MODEL)
    with pytest.raises(Refusal, match="sensitivity: expects"):
        reattend.sensitivity(recipe(), demo.MODEL)
    planned = plan(recipe(keep="auto"), demo.MODEL)
    assert planned.disk_bytes > demo_bytes()
    assert any("keep: auto" in remark for remark in planned.remarks)


def demo_bytes():
    return sum(tensor.nbytes for tensor in load_file(demo.MODEL / "model.safetensors").values())


@pytest.mark.parametrize(
    ("most", "least"), [(1, 0), (1, 1), (2, 1), (7, 0), (7, 1), (7, 3), (7, 6), (7, 7), (210, 209)]
)
def test_the_fewest_that_fit(most, least):
    asked = []
    assert fewest(0, most, lambda count: (asked.append(count), count >= least)[1]) == least
    assert len(asked) <= most.bit_length() + 1
    assert most not in asked


def test_the_command_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--selection",
        str(SELECTION),
        "--selection-windows",
        "2",
        "--window",
        "64",
        "--set",
        "activations=none",
    ]
    result = CliRunner().invoke(cli, ["sensitivity", str(demo.MODEL), *options, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes_after"] < report["bytes_before"]
    assert len(report["sensitivity"]) == 35
    assert not list(tmp_path.iterdir())
