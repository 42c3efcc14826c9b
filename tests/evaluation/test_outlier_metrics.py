"""Outlier metrics against direct formulas, planted outliers, and stock transformers' own attention weights."""

import json
import shutil
from collections import defaultdict

import pytest
import torch
import transformers
from click.testing import CliRunner

import reattend
from reattend import demo
from reattend.cli import cli
from reattend.errors import Refusal
from reattend.evaluation import outlier_statistics
from reattend.evaluation.outlier_statistics import inf_norm, kurtosis, sink_sums
from reattend.evaluation.outliers import OutlierMeter
from reattend.families.rows import FAMILIES, WITH_QUERY_LATENT
from reattend.kernels.attention import Options

IDS = torch.randint(3, 96, (3, 100), generator=torch.Generator().manual_seed(0))


def load(folder, family, attention="sdpa", sharper=100):
    """A tiny model in fp64 whose attention is not even."""
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    dtype = torch.float32 if family == "mixtral" else torch.float64  # its experts take no fp64
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if any(part in name for part in ("q_proj", "query", "c_attn", "qkv_proj")):
            weight.data *= sharper
    return model


def measured(model, family, windows=IDS):
    meter = OutlierMeter(model, FAMILIES[family])
    with meter.watching(), torch.inference_mode():
        for ids in windows:
            model(ids[None])
    return meter.report()


def test_inf_norm_and_kurtosis_by_hand():
    # mean -1/2, deviations 3/2, -1/2, 3/2, -5/2: m2 = 11/4, m4 = 197/16
    x = torch.tensor([[1.0, -1.0], [1.0, -3.0]])
    assert inf_norm(x) == 3
    assert kurtosis(x) == pytest.approx(197 / 16 / (121 / 16 + 1e-6), rel=1e-12)
    assert kurtosis(torch.full((4,), 7.0)) == 0
    assert inf_norm(torch.tensor([-0.5, 0.25])) == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kurtosis_of_many_numbers(dtype):
    x = torch.randn(63, 1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10 + 300
    x[5, 7] = 5000
    x = x.to(dtype)
    values = x.double().numpy().ravel()
    central = values - values.mean()
    assert kurtosis(x) == pytest.approx((central**4).mean() / (central**2).mean() ** 2, rel=1e-9)
    assert inf_norm(x) == float(x.double().abs().max())
    assert kurtosis(torch.randn(100, 1000, generator=torch.Generator().manual_seed(1))) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("row", [*FAMILIES.values(), WITH_QUERY_LATENT], ids=lambda row: row.model_type)
def test_every_row_names_its_outputs(row):
    def turned(name):
        return row.linears[name][::-1] if "conv1d" in row.features else row.linears[name]

    assert turned(row.attention_output)[0] == "hidden"
    assert "experts" in row.features or turned(row.feed_forward_output)[0] == "hidden"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "opt", "gpt2", "bert"])
def test_figures_are_those_of_the_modules(models, family):
    """By hooks on whatever the layers are made of, found by class, and direct formulas."""
    model, seen = load(models(family), family), defaultdict(list)
    row = FAMILIES[family]
    prefix = row.prefix + row.layer

    def keep(name):
        return lambda module, args, output: seen[name].append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    report = measured(model, family)
    for hook in hooks:
        hook.remove()

    def means(name):
        outputs = [output.double() for output in seen[name]]
        central = [(output - output.mean()).flatten() for output in outputs]
        kurtoses = [(c**4).mean() / ((c**2).mean() ** 2 + 1e-6) for c in central]
        return (sum(float(o.abs().max()) for o in outputs) / 3, float(sum(kurtoses)) / 3)

    watched = {}
    for index in range(2):
        for what, name in (("attention_output", f".{row.attention_output}"), ("layer_output", "")):
            watched[f"{prefix}.{index}{name}"] = norms = means(f"{prefix}.{index}{name}")
            assert report[f"{what}_max_inf_norm"][index] == pytest.approx(norms[0], rel=1e-12)
            assert report[f"{what}_kurtosis"][index] == pytest.approx(norms[1], rel=1e-9)
        if family != "mixtral":
            name = f"{prefix}.{index}.{row.feed_forward_output}"
            watched[name] = means(name)
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    norms = [name for name in norms if name.startswith(row.prefix) and not name.endswith(("q_norm", "k_norm"))]
    assert len(norms) == 5
    watched |= {name: means(name) for name in norms}
    worst = max(watched, key=lambda name: watched[name][0])
    # of BERT's layers the output is that of the layer's last norm
    assert watched[report["max_inf_norm_module"]][0] == watched[worst][0]
    assert report["max_inf_norm"] == pytest.approx(watched[worst][0], rel=1e-12)
    average = sum(figures[1] for figures in watched.values()) / len(watched)
    assert report["average_kurtosis"] == pytest.approx(average, rel=1e-9)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_planted_outlier_is_found_where_it_is(models, layer):
    model = load(models("opt"), "opt")
    output = model.model.decoder.layers[layer].self_attn.out_proj
    before = measured(model, "opt")
    output.weight.data.zero_()
    output.bias.data.zero_()
    output.bias.data[7] = -123.0
    report = measured(model, "opt")
    assert report["attention_output_max_inf_norm"][layer] == 123
    # one number of 32 is a, the others 0: m2 = a^2 31 / 32^2, m4 / m2^2 = (31^3 + 1) / (32 * 31)
    assert report["attention_output_kurtosis"][layer] == pytest.approx((31**3 + 1) / (32 * 31), rel=1e-6)
    assert before["attention_output_max_inf_norm"][layer] < 1
    assert report["max_inf_norm"] == pytest.approx(123, abs=1)
    assert report["max_inf_norm_module"] in [f"model.decoder.layers.{behind}" for behind in range(layer, 2)]
    assert report["layer_output_max_inf_norm"][layer] == pytest.approx(123, abs=1)
    if layer == 1:
        assert report["layer_output_max_inf_norm"][0] == before["layer_output_max_inf_norm"][0]
    assert report["average_kurtosis"] > before["average_kurtosis"]


@pytest.mark.parametrize("scores", [1 << 23, 4 * 100 * 7, 1])
@pytest.mark.parametrize("family", ["llama", "opt", "bert", "mistral", "gpt2"])
def test_sink_mass_is_that_of_stock_attention_weights(models, family, scores, monkeypatch):
    """In blocks of all queries, of 7 and of 1; mistral's window is shorter than the text."""
    monkeypatch.setattr(outlier_statistics, "_SCORES", scores)
    report = measured(load(models(family), family), family)
    eager = load(models(family), family, "eager")
    with torch.inference_mode():
        maps = [eager(ids[None], output_attentions=True).attentions for ids in IDS]
    for layer in range(2):
        weight = torch.cat([window[layer] for window in maps])[:, :, 1:]
        mass = weight[..., 0].mean((0, 2))
        # stock takes the softmax in fp32
        assert report["sink_mass"][layer] == pytest.approx(float(mass.mean()), rel=1e-6)
        assert report["sink_mass_max_head"][layer] == pytest.approx(float(mass.max()), rel=1e-6)
        first = (weight.argmax(-1) == 0).double().mean()
        assert report["first_token_share"][layer] == pytest.approx(float(first), rel=1e-9)
    assert report["sink_mass_max_head"][0] > report["sink_mass"][0]


def test_weights_of_a_clipped_softmax(monkeypatch):
    monkeypatch.setattr(outlier_statistics, "_SCORES", 50)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, 9, 8, generator=generator, dtype=torch.float64) for h in (4, 2))
    gamma = torch.tensor([-0.1, -0.2, 0.0, -1.0], dtype=torch.float64)
    score = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    soft = score.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf).softmax(-1)
    wide = gamma[:, None, None]
    expected = ((1 - wide) * soft + wide).clamp(0, 1)[:, :, 1:]
    found = sink_sums(query, key, Options(gamma=gamma))
    torch.testing.assert_close(found.mass, expected[..., 0].sum((0, 2)), rtol=1e-12, atol=1e-12)
    largest = (expected[..., 0] == expected.amax(-1)) & (expected[..., 0] > 0)  # a row of zeros has no largest
    assert found.largest.tolist() == largest.double().sum((0, 2)).tolist()
    assert found.queries == 8


def test_a_model_runs_as_before_afterwards(models):
    model = reattend.load(models("mistral")).model
    before, implementation = model(IDS[:1]).logits, model.config._attn_implementation
    measured(model, "mistral")
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(IDS[:1]).logits, before)


def test_int8_models_and_models_on_the_disk(models, sound):
    source = measured(reattend.load(models("llama")).model, "llama")
    offloaded = measured(reattend.load(models("llama"), offload=True).model, "llama")
    assert offloaded == source
    converted = measured(reattend.load(sound).model, "llama")
    assert converted != source
    assert converted["sink_mass"] == pytest.approx(source["sink_mass"], rel=0.05)
    assert converted["max_inf_norm"] == pytest.approx(source["max_inf_norm"], rel=0.05)


def test_sink_mass_of_latent_attention(tmp_path):
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, q_lora_rank=None,
        first_k_dense_replace=2, n_routed_experts=4, max_position_embeddings=128, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    report = measured(reattend.load(tmp_path, dtype="float64").model, "deepseek_v3")
    eager = load(tmp_path, "deepseek_v3", "eager", sharper=1)
    with torch.inference_mode():
        maps = [eager(ids[None], output_attentions=True).attentions for ids in IDS]
    for layer in range(2):
        mass = torch.cat([window[layer] for window in maps])[:, :, 1:, 0].mean((0, 2))
        assert report["sink_mass_max_head"][layer] == pytest.approx(float(mass.max()), rel=1e-6)


def evaluated(model=demo.MODEL, **options):
    return reattend.evaluate(model, demo.EVAL_TEXT, **({"window": 64, "windows": 2, "dtype": "float32"} | options))


def test_evaluate_reports_both_models_and_changes_nothing_else(sound):
    plain = evaluated(against=demo.MODEL)
    report = evaluated(against=demo.MODEL, outliers=True)
    assert report["outliers"] == report["base_outliers"]
    assert {key: value for key, value in report.items() if not key.endswith("outliers")} == plain
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    ids = tokenizer(demo.EVAL_TEXT.read_text("utf-8")).input_ids[:128]
    model = reattend.load(demo.MODEL, dtype="float32").model
    assert report["outliers"] == measured(model, "llama", torch.tensor(ids).view(2, 64))
    assert "base_outliers" not in evaluated(outliers=True)


def bert_with_tokenizer(folder):
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    for file in demo.MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_an_encoder_has_outliers_alone(tmp_path):
    folder = bert_with_tokenizer(tmp_path / "bert")
    report = evaluated(folder, outliers=True, against=folder)
    assert report["outliers"] == report["base_outliers"]
    assert len(report["outliers"]["sink_mass"]) == 2
    assert not report.keys() & {"perplexity", "tokens", "bits_per_byte", "kl_mean", "base_perplexity"}
    assert report["windows"] == 2
    with pytest.raises(Refusal, match="bert is an encoder, perplexity is not defined for it"):
        evaluated(folder)


def test_the_command():
    line = ["eval", str(demo.MODEL), "--text", str(demo.EVAL_TEXT), "--window", "32", "--windows", "1", "--json"]
    static = ["--static-calibration", str(demo.SELECT_TEXT)]
    done = CliRunner(catch_exceptions=False).invoke(cli, [*line, "--outliers", *static])
    report = json.loads(done.stdout)
    assert report["outliers"]["static_w8a8_perplexity"] > 1
    assert report["outliers"]["static_w8a8_perplexity_stderr"] is None
    assert report["static_calibration"] == str(demo.SELECT_TEXT)
    refused = CliRunner().invoke(cli, [*line, *static])
    assert isinstance(refused.exception, Refusal)
    assert "outliers" in str(refused.exception)
