"""The steps that write portable models, from end to end."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import reattend
from reattend import demo
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.index import open_checkpoint
from reattend.convert.clipped_softmax.transform import ClippedSoftmax
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.modeling.loading import load_tokenizer
from reattend.modeling.portable.attention_reattend import GATE_KINDS
from reattend.pipeline import verification
from reattend.pipeline.inspection import inspect
from reattend.recipes.schema import parse_recipe
from reattend.texts.reading import read_text
from tiny_models import CONFIGS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "bert")
STEPS = {
    "portable": [{"step": "portable"}],
    **{kind: [{"step": "gates", "kind": kind, "openness": 0.3}] for kind in GATE_KINDS},
    "alpha 0": [{"step": "clipped_softmax", "alpha": 0.0}],
    "both": [{"step": "gates", "openness": 0.9}, {"step": "clipped_softmax", "alpha": 0.0}],
}
IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def recipe(steps, **settings):
    return parse_recipe({"steps": steps, **settings}, "test")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models in fp64 with weights large enough for attention to matter."""
    place = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        name, settings = CONFIGS[family]
        torch.manual_seed(0)
        head = "ForMaskedLM" if family == "bert" else "ForCausalLM"
        model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
        model.save_pretrained(place / family)
    return place


def logits(folder, runtime="stock"):
    model = reattend.load(folder, dtype="float64", runtime=runtime).model
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_at_their_start_steps_change_no_logit(sources, family, tmp_path):
    expected = logits(sources / family)
    for name, steps in STEPS.items():
        reattend.apply(recipe(steps), sources / family, tmp_path / name)
        for runtime in ("stock", "auto"):
            error = (logits(tmp_path / name, runtime) - expected).abs().max()
            assert float(error) < 1e-10, (name, runtime)


@pytest.fixture(scope="module")
def probed(models, sources, tmp_path_factory):
    """What a process that can't import reattend finds in outputs of all families, and how far logits are off."""
    place = tmp_path_factory.mktemp("probed")
    all_on = [{"step": "gates", "kind": "mlp"}, {"step": "clipped_softmax", "alpha": 0.5, "length": 32}]
    folders = {}
    for family in FAMILIES:
        reattend.apply(recipe(all_on), models(family), place / f"{family}-out")
        reattend.apply(recipe([{"step": "gates"}, {"step": "int8"}]), models(family), place / f"{family}-int8")
        folders |= {f"{family}{kind}": place / f"{family}{kind}" for kind in ("-out", "-int8")}
        folders[f"{family}-source"] = models(family)
    found = verification._probe(folders, IDS[0].tolist(), place)
    return place, found


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_load_without_reattend_and_compute_what_they_do_with_it(probed, family):
    place, found = probed
    assert [found[f"{family}-{kind}"] for kind in ("out", "int8", "source")] == [[], [], []]
    model = reattend.load(place / f"{family}-out", dtype="float32").model
    assert model.config._attn_implementation == "reattend"
    with torch.no_grad():
        ours = model(IDS[:1]).logits[0]
    theirs = torch.load(place / f"{family}-out.pt", weights_only=True)["logits"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 0 < verification._errors(place / f"{family}-out.pt", place / f"{family}-source.pt")[0] < 0.2
    assert verification._errors(place / f"{family}-int8.pt", place / f"{family}-source.pt")[0] < 0.05


def test_int8_of_a_gated_model_leaves_the_gates_and_runs_on_our_kernels(probed):
    place, _ = probed
    config = json.loads((place / "llama-int8/config.json").read_text())
    assert config["attention_gates"] == {"kind": "linear"}
    tensors = load_file(place / "llama-int8/model.safetensors")
    assert tensors["model.layers.0.self_attn.gate.weight"].dtype == torch.bfloat16
    model = reattend.load(place / "llama-int8", dtype="float32").model
    with torch.no_grad():
        ours = model(IDS[:1]).logits[0]
    theirs = torch.load(place / "llama-int8.pt", weights_only=True)["logits"]
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01


def test_an_output_says_what_it_is(models, tmp_path):
    planned = reattend.plan(recipe([{"step": "gates", "kind": "elementwise"}]), models("qwen3")).summary()
    # 2 layers, 4 heads of 16 channels, 32 inputs and a bias
    added = 2 * 4 * 16 * 33
    assert planned["parameters_after"] - planned["parameters_before"] == added
    assert f"gates add {added} parameters; before training they change nothing" in planned["remarks"]
    assert planned["engines"]["transformers"] == "yes, with trust_remote_code=True"
    reattend.apply(recipe([{"step": "gates", "kind": "elementwise"}]), models("qwen3"), tmp_path / "out")
    seen = inspect(tmp_path / "out")
    assert seen["family"] == "reattend"
    assert seen["features"] == ["gates", "qk_norm"]
    assert seen["steps"]["gates"] == "no: config.json: attention_gates: the source has gates already"
    assert seen["steps"]["clipped_softmax"] == seen["steps"]["int8"] == "yes"
    assert (tmp_path / "out/notes/extra.txt").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    before = json.loads((models("qwen3") / "config.json").read_text())
    moved = {
        "model_type",
        "architectures",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "sliding_window",
    }
    assert {k: v for k, v in config.items() if k in before and k not in moved} == {
        k: v for k, v in before.items() if k not in moved
    }


def test_gates_that_read_the_norm_too_are_kept_out_of_its_smoothing(probed, models):
    place, _ = probed
    producers = [feed.producer for feed in source_of(open_checkpoint(place / "llama-out")).family.feeds]
    assert "input_layernorm" not in producers
    assert "input_layernorm" in [f.producer for f in source_of(open_checkpoint(models("llama"))).family.feeds]


TEXTS = {"calibration": str(demo.SELECT_TEXT), "windows": 2, "window": 96}


def test_gamma_is_chosen_per_head_by_what_it_removes(tmp_path):
    steps = [{"step": "clipped_softmax", "epsilon": 0.01}]
    reattend.apply(recipe(steps, **TEXTS), demo.MODEL, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    gamma = torch.tensor(config["clipped_softmax"]["gamma"])
    assert gamma.shape == (5, 6)
    assert bool((gamma <= 0).all())
    assert bool((gamma < 0).any())
    assert len(gamma.unique()) > 5
    findings = json.loads((tmp_path / "out/reattend.json").read_text())["findings"][0]
    removed = torch.tensor(findings["removed_share_per_layer"])
    assert float(removed.max()) <= 0.01
    # Measured again by stock eager attention of the source, on the same text.
    text = read_text(str(demo.SELECT_TEXT))
    tokens = sample_tokens(text, load_tokenizer(demo.MODEL), windows=2, window=96)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        demo.MODEL, dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        weights = torch.stack(model(tokens, output_attentions=True).attentions)  # layers, windows, heads, S, T
    zeroed = (1 - gamma[:, None, :, None, None]) * weights + gamma[:, None, :, None, None] <= 0
    share = torch.where(zeroed, weights, 0).sum((1, 3, 4)) / (2 * 96)
    torch.testing.assert_close(share, removed, rtol=0.02, atol=1e-5)
    report = reattend.verify(tmp_path / "out", against=demo.MODEL)
    assert report["problems"] == []
    assert 0 < report["logits_error"] < 0.05


def edited(folder, out, **keys):
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in (config | keys).items() if v is not ...}))
    return out


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"auto_map": {"AutoConfig": "mine.Config"}}, "auto_map: the source brings code of its own"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "has no portable form"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "has no portable form"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "none", "rope_theta": 1e4}},
            "rope_type 'none' is unknown to transformers",
        ),
        ("llama", {"rms_norm_eps": "small"}, "config.json: transformers can't read it"),
        ("phi3", {}, "phi3 has no portable form"),
        ("gemma2", {}, "gemma2 has no portable form"),
    ],
)
def test_what_has_no_portable_form_is_refused_in_one_line(models, tmp_path, family, keys, message):
    folder = edited(models(family), tmp_path / "in", **keys)
    for steps in ([{"step": "portable"}], [{"step": "gates"}], [{"step": "clipped_softmax"}]):
        with pytest.raises(Refusal, match=message) as caught:
            reattend.apply(recipe(steps), folder, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"step": "gates", "kind": "round"}], "kind"),
        ([{"step": "gates", "openness": 1.0}], "openness"),
        ([{"step": "gates", "openness": 0}], "openness"),
        (
            [{"step": "gates"}, {"step": "gates"}],
            r"steps\[1\]: config.json: attention_gates: the source has gates already",
        ),
        ([{"step": "clipped_softmax"}] * 2, "clipped already"),
        ([{"step": "int8"}, {"step": "gates"}], "quantise after"),
        ([{"step": "clipped_softmax", "epsilon": 0.1, "alpha": 0.5}], "leave out alpha and length"),
        ([{"step": "clipped_softmax", "alpha": -1.0}], "alpha"),
        ([{"step": "clipped_softmax", "zeta": 0.5}], "zeta"),
        ([{"step": "clipped_softmax", "epsilon": 0.1}], "calibration: the recipe needs a text"),
        ([{"step": "clipped_softmax"}, {"step": "int8_attention"}], "reattend clips its softmax"),
        ([{"step": "int8_attention"}, {"step": "clipped_softmax"}], "quantised attention does not clip"),
        ([{"step": "gates"}, {"step": "mla"}], "mla: reattend"),
    ],
)
def test_steps_that_make_no_sense_are_refused_in_one_line(models, tmp_path, steps, message):
    with pytest.raises(Refusal, match=message):
        reattend.apply(recipe(steps, window=64), models("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_code_that_is_not_ours_is_never_run(models, tmp_path):
    reattend.apply("gates", models("llama"), tmp_path / "out")
    code = tmp_path / "out/attention_reattend.py"
    code.write_bytes(code.read_bytes() + b"\nraise SystemExit('ran')\n")
    with pytest.raises(Refusal, match=r"attention_reattend.py: is not the code of this version of reattend"):
        reattend.verify(tmp_path / "out")
    assert reattend.load(tmp_path / "out").model  # by the code that is installed
    code.unlink()
    with pytest.raises(Refusal, match=r"attention_reattend.py"):
        reattend.verify(tmp_path / "out")
    with pytest.raises(Refusal, match="auto_map is not that of reattend"):
        reattend.load(edited(tmp_path / "out", tmp_path / "other", auto_map={"AutoModel": "evil.Model"}))
    with pytest.raises(Refusal, match="reattend_format is 7"):
        reattend.load(edited(tmp_path / "out", tmp_path / "newer", reattend_format=7))
    with pytest.raises(Refusal, match="architectures"):
        reattend.load(edited(tmp_path / "out", tmp_path / "class", architectures=["LlamaForCausalLM"]))


def test_a_tokenizer_without_a_class_needs_no_trust(tmp_path):
    reattend.apply("portable", demo.MODEL, tmp_path / "out")
    file = tmp_path / "out/tokenizer_config.json"
    settings = json.loads(file.read_text())
    expected = reattend.load(tmp_path / "out").tokenizer("a river runs")
    settings.pop("tokenizer_class")
    file.write_text(json.dumps(settings))
    assert reattend.load(tmp_path / "out").tokenizer("a river runs").input_ids == expected.input_ids


def test_portable_outputs_are_evaluated_like_any_other(tmp_path):
    reattend.apply("gates", demo.MODEL, tmp_path / "out")
    found = reattend.evaluate(tmp_path / "out", demo.EVAL_TEXT, against=demo.MODEL, window=96, windows=2)
    assert found["delta"] == pytest.approx(0, abs=1e-3)
    assert found["runtime"] == "transformers"


def test_what_clipping_is_meant_for_is_kept():
    step = ClippedSoftmax(alpha=2.0, length=256)
    source = source_of(open_checkpoint(demo.MODEL))
    part = step.parts(source, {})["clipped_softmax"]
    assert part == {"zeta": 1.0, "gamma": -2 / 256, "alpha": 2.0, "length": 256}
    assert any("a head that looks at 128 tokens or more alike is silenced" in remark for remark in step.check(source))
