"""Static W8A8: rounding and ranges by hand, the whole against a model written out in numpy, and what is refused."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama
from w8a8_reference import OFF_TIES, Llama

import reattend
from reattend import demo
from reattend.calibration.tokens import sample_tokens
from reattend.errors import Failure, Refusal
from reattend.evaluation import outlier_statistics, static_perplexity, static_quantization, w8a8_simulation
from reattend.evaluation.static_quantization import ActivationRange, rounded_activation, rounded_weight
from reattend.evaluation.w8a8_simulation import static_w8a8
from reattend.families.rows import FAMILIES
from reattend.texts.reading import read_text
from reattend.texts.windows import read_windows
from tiny_models import write_model

IDS = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(0))


def sharpened(folder, family):
    """A tiny model in fp64 whose attention is not even."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "c_attn" in name:
            weight.data *= 40
    return model, FAMILIES[family]


@pytest.fixture
def in_fp64(monkeypatch):
    """Norms and rotations in fp64, which stock takes through fp32, and activations off their ties: no rounding hangs on a bit."""

    def rotations(self, x, position_ids):
        width = 2 * len(self.inv_freq)
        steps = torch.arange(0, width, 2, dtype=torch.float64) / width
        angle = position_ids[..., None] * self.config.rope_parameters["rope_theta"] ** -steps
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def norm(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def off_ties(x, low, high):
        return rounded_activation(x + OFF_TIES * (max(high, 0.0) - min(low, 0.0)), low, high)

    for module in (w8a8_simulation, static_quantization):
        monkeypatch.setattr(module, "rounded_activation", off_ties)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotations)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)


def test_rounding_by_hand():
    weight = torch.tensor([[127.0, -63.4], [0.5, 1.5]])
    assert rounded_weight(weight).tolist() == [[127, -63], [0, 2]]
    assert rounded_weight(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    # 255 steps of 0.1 from -5.1: zero is code 51
    x = torch.tensor([-9.0, -5.1, -0.06, 0.0, 0.04, 20.4, 99.0], dtype=torch.float64)
    expected = [-5.1, -5.1, -0.1, 0, 0, 20.4, 20.4]
    assert rounded_activation(x, -5.1, 20.4).tolist() == pytest.approx(expected, abs=1e-12)
    # a range on one side of zero takes zero in: 0 .. 255
    assert rounded_activation(torch.tensor([100.4, 300.0, -1.0]), 50.0, 255.0).tolist() == [100, 255, 0]
    assert rounded_activation(torch.tensor([-100.4, 7.0]), -255.0, -50.0).tolist() == [-100, 0]
    masked = rounded_activation(torch.tensor([-torch.inf, torch.nan, 1.0]), 0.0, 255.0)
    assert masked[0] == -torch.inf
    assert masked[1].isnan()


def test_ranges_follow_with_momentum():
    found = ActivationRange()
    for low, high in ((-1.0, 2.0), (-3.0, 1.0), (-2.0, 12.0)):
        found.see([torch.tensor([low, 0.1]), torch.tensor([high, -torch.inf])])
    # low: -1, 0.9 * -1 + 0.1 * -3 = -1.2, 0.9 * -1.2 - 0.2; high: 2, 1.9, 0.9 * 1.9 + 1.2
    assert found.low == pytest.approx(-1.28)
    assert found.high == pytest.approx(2.91)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_on_the_grid_stay_as_they_are(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (31, 17), generator=generator)
    weight[3, 4] = 127
    codes = torch.randint(0, 256, (63, 17), generator=generator) - 100
    codes[0, :2] = torch.tensor([-100, 155])
    weight, codes = weight.to(dtype) / 8, codes.to(dtype) * 4
    assert torch.equal(rounded_weight(weight), weight)
    assert torch.equal(rounded_activation(codes, -400.0, 620.0), codes)


def test_a_model_on_the_grid_runs_exactly(models):
    """The lossless limit of a whole linear: weights and inputs on the grid, ranges that cover them."""
    model, family = sharpened(models("llama"), "llama")
    linear = model.model.layers[0].mlp.down_proj
    generator = torch.Generator().manual_seed(2)
    linear.weight.data = torch.randint(-127, 128, linear.weight.shape, generator=generator).double() / 16
    linear.weight.data[0, 0] = 127 / 16
    codes = torch.randint(0, 256, (5, linear.in_features), generator=generator).double() - 30
    codes[0, :2] = torch.tensor([-30.0, 225.0])
    expected = linear(codes)
    with static_w8a8(model, family) as simulation:
        linear(codes)
        simulation.freeze()
        assert torch.equal(linear(codes), expected)
        assert not torch.equal(linear(codes + 0.3), linear.forward(codes + 0.3))


@pytest.mark.usefixtures("in_fp64")
@pytest.mark.parametrize("scores", [1 << 23, 4 * 40 * 7])
def test_the_simulation_equals_a_model_written_out(models, monkeypatch, scores):
    monkeypatch.setattr(outlier_statistics, "_SCORES", scores)
    model, family = sharpened(models("llama"), "llama")
    reference = Llama(model)
    exact = model(IDS[5:]).logits
    with static_w8a8(model, family) as simulation, torch.inference_mode():
        for ids in IDS[:4]:
            ours, theirs = model(ids[None]).logits[0].numpy(), reference.logits(ids.numpy())
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        simulation.freeze()
        reference.calibrating = False
        for ids in IDS[4:]:
            ours, theirs = model(ids[None]).logits[0].numpy(), reference.logits(ids.numpy())
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    off = np.abs(ours - exact[0].detach().numpy()).max() / np.abs(ours).max()
    assert 1e-4 < off < 0.5  # rounding was seen at all


def test_ranges_are_fixed_once_they_are_frozen(models):
    model, family = sharpened(models("llama"), "llama")
    with static_w8a8(model, family) as simulation, torch.inference_mode():
        model(IDS[:1])
        simulation.freeze()
        before = model(IDS[1:2]).logits
        model(IDS[2:3])
        assert torch.equal(model(IDS[1:2]).logits, before)
        simulation.calibrating = True
        model(IDS[2:3])
        simulation.freeze()
        assert not torch.equal(model(IDS[1:2]).logits, before)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2"])
def test_a_model_is_afterwards_what_it_was(models, family):
    model, row = sharpened(models(family), family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    before = model(IDS[:1]).logits
    with static_w8a8(model, row) as simulation, torch.inference_mode():
        model(IDS[:1])
        simulation.freeze()
        inside = model(IDS[:1]).logits
    assert torch.isfinite(inside).all()
    assert not torch.equal(inside, before)
    assert torch.equal(model(IDS[:1]).logits, before)
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_is_what_it_was_also_after_an_error(models):
    model, family = sharpened(models("llama"), "llama")
    before, implementation = model(IDS[:1]).logits, model.config._attn_implementation

    def fail(module, args):
        raise IndexError("in the middle")

    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="in the middle"), static_w8a8(model, family), torch.inference_mode():
        model(IDS[:1])
    hook.remove()
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(IDS[:1]).logits, before)


@pytest.mark.usefixtures("in_fp64")
def test_evaluate_equals_the_model_written_out():
    """From the texts to the number: the windows drawn, momentum, and the measured windows."""
    report = reattend.evaluate(
        demo.MODEL, demo.EVAL_TEXT, window=48, windows=3, dtype="float64",
        outliers=True, static_calibration=demo.SELECT_TEXT,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    reference = Llama(transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float64))
    drawn = sample_tokens(read_text(demo.SELECT_TEXT), tokenizer, windows=16, window=48)
    for ids in drawn.numpy():
        reference.logits(ids)
    reference.calibrating = False
    cut = read_windows(read_text(demo.EVAL_TEXT), tokenizer, window=48, windows=3, bos_each=False)
    losses = [reference.loss(np.array(ids)) for ids in cut.ids]
    expected = float(np.exp(np.mean(losses)))
    assert report["outliers"]["static_w8a8_perplexity"] == pytest.approx(expected, rel=1e-6)
    error = expected * np.std(losses, ddof=1) / 3**0.5
    assert report["outliers"]["static_w8a8_perplexity_stderr"] == pytest.approx(error, rel=1e-4)
    assert report["perplexity"] != pytest.approx(expected, rel=1e-4)
    assert report["static_calibration_sha256"] == read_text(demo.SELECT_TEXT).sha256


def evaluated(model=demo.MODEL, **options):
    options = {"window": 64, "windows": 2, "outliers": True, "static_calibration": demo.SELECT_TEXT} | options
    return reattend.evaluate(model, demo.EVAL_TEXT, **options)


def test_refusals(models, sound, tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.evaluation.perplexity.load", lambda *a, **k: pytest.fail("the model is loaded"))
    (tmp_path / "piece.txt").write_text(demo.EVAL_TEXT.read_text("utf-8")[3000:9000].upper(), "utf-8")
    (tmp_path / "short.txt").write_text("one or two words, but no window of sixty-four tokens")
    for options, words in (
        ({"outliers": False}, "ask for outliers too"),
        ({"static_calibration": demo.EVAL_TEXT}, "shares text with the measured text"),
        ({"static_calibration": tmp_path / "piece.txt"}, "piece.txt: shares text with the measured text"),
        ({"static_calibration": tmp_path / "absent.txt"}, r"absent\.txt: No such file"),
        ({"static_calibration": tmp_path / "short.txt"}, r"short\.txt: .* fewer than one window"),
        ({"static_calibration": demo.SELECT_TEXT, "window": 512}, "16 are asked for"),
        ({"model": models("bert")}, "bert is an encoder"),
        ({"model": models("mixtral")}, "mixtral has experts"),
        ({"model": sound}, "quantised already"),
        ({"against": sound}, "quantised already"),
    ):
        with pytest.raises(Refusal, match=words) as caught:
            evaluated(**options)
        assert "\n" not in str(caught.value)


def test_weights_on_the_disk_are_refused():
    model = reattend.load(demo.MODEL, offload=True).model
    with (
        pytest.raises(Refusal, match=r"layer 0, self_attn\.q_proj: .* in memory"),
        static_w8a8(model, FAMILIES["llama"]),
    ):
        pytest.fail("it was simulated")
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in model.modules())


def test_a_simulation_that_breaks_down_is_a_failure_that_says_so(monkeypatch):
    monkeypatch.setattr("reattend.evaluation.w8a8_simulation.rounded_weight", lambda weight: weight * torch.nan)
    with pytest.raises(Failure, match="in static W8A8: its logits hold NaN"):
        evaluated(windows=1)


def test_gemma2_is_refused_by_name(tmp_path):
    from reattend.evaluation.subject import Subject

    folder = write_model("gemma2", tmp_path / "gemma2")
    subject = Subject("gemma2", reattend.load(folder).model, FAMILIES["gemma2"])
    with pytest.raises(Refusal, match="gemma2 in static W8A8: attention 'eager'"):
        static_perplexity.static_perplexity(subject, IDS[:1], IDS[:1], lambda *a: None)
    assert subject.model.config._attn_implementation == "eager"
