"""The portable models: the source's numbers with every option off, and what transformers' own tests ask of a model."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from reattend.families.portable import PORTABLE
from reattend.modeling.portable import modeling_reattend, modeling_reattend_bert, modeling_reattend_opt
from reattend.modeling.portable.attention_reattend import GATE_KINDS
from reattend.modeling.portable.configuration_reattend import ReattendConfig
from tiny_models import CONFIGS

MODULES = {"opt": modeling_reattend_opt, "bert": modeling_reattend_bert}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "opt")
FAMILIES = (*DECODERS, "bert")
CLIPPED = {"zeta": 1.02, "gamma": [[-0.001, -0.01, -0.02, 0.0], [-0.03, 0.0, -0.001, -0.02]]}
IDS = torch.randint(3, 96, (3, 30), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(3, 30, dtype=torch.int64)
LEFT[0, :13] = 0
LEFT[1, :29] = 0  # one key alone
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 5.0],
                 "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip


def stock(family, **changes):
    name, settings = CONFIGS[family]
    head = "ForMaskedLM" if family == "bert" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(config)
    for parameter in model.parameters():  # large enough for attention to matter
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    return model.double().eval()


def portable(family, model, **parts):
    """The portable form of a stock model, made without the converter: another way to the same thing."""
    module = MODULES.get(family, modeling_reattend)
    classes = PORTABLE["reattend" if family not in MODULES else f"reattend_{family}"]
    keys = model.config.to_dict()
    if family not in MODULES:
        biased = family == "qwen2"
        sliding = family == "mistral"
        types = keys.get("layer_types") or ["sliding_attention" if sliding else "full_attention"] * 2
        keys |= {"layer_types": types, "attention_bias": biased, "qk_norm": family == "qwen3"}
        keys["sliding_window"] = keys.get("sliding_window") if "sliding_attention" in types else None
    config_class = getattr(module, classes.config)
    known = {key: keys[key] for key in config_class().to_dict() if key in keys and key != "model_type"}
    config = config_class(**{**known, **parts, "architectures": [classes.headed]})
    torch.manual_seed(1)
    made = getattr(module, classes.headed)(config)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(".gate." in name for name in missing)
    for name, parameter in made.named_parameters():
        if ".gate." in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    return made.double().eval()


def full(family, kind="mlp"):
    """A model with all options on."""
    return portable(family, stock(family), attention_gates={"kind": kind}, clipped_softmax=CLIPPED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_option_off_is_the_source_to_the_bit(family, implementation):
    model = stock(family)
    ours = portable(family, model)
    for each in (model, ours):
        each.set_attn_implementation(implementation)
    seen = torch.ones_like(LEFT) if implementation == "eager" else LEFT  # stock eager: NaN in fp64 with padding
    with torch.no_grad():
        theirs = model(IDS, attention_mask=seen, output_hidden_states=True)
        found = ours(IDS, attention_mask=seen, output_hidden_states=True)
    assert torch.equal(found.logits, theirs.logits)
    for a, b in zip(found.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_is_the_source_to_the_bit(rope):
    model = stock("llama", rope_parameters=ROPES[rope] | {"rope_theta": 500.0})
    ours = portable("llama", model)
    assert ours.config.rope_parameters["rope_type"] == rope
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


def test_windows_by_layer_are_the_source_to_the_bit():
    model = stock("qwen3", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ours = portable("qwen3", model)
    assert ours.config.layer_types == ["full_attention", "sliding_attention"]
    with torch.no_grad():
        assert torch.equal(ours(IDS, attention_mask=LEFT).logits, model(IDS, attention_mask=LEFT).logits)


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_and_clipping_are_what_stock_computes_with_them_laid_in(family, kind):
    """Stock code, its attention function replaced by one that clips by a plain formula and applies the gate."""
    model = stock(family)
    ours = portable(family, model, attention_gates={"kind": kind}, clipped_softmax=CLIPPED)
    gates = [module.gate for module in ours.modules() if hasattr(module, "gate")]
    inputs = {}

    def keep(module, args, kwargs):
        inputs[module.layer_idx] = args[0] if args else kwargs["hidden_states"]

    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    for module in attentions:
        module.register_forward_pre_hook(keep, with_kwargs=True)

    def laid_in(module, query, key, value, mask, scaling=None, **_):
        per = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(per, 1), value.repeat_interleave(per, 1)
        score = torch.einsum("bhsd,bhtd->bhst", query, key) * scaling
        weight = torch.where(mask, score, -torch.inf).softmax(-1)
        gamma = torch.tensor(CLIPPED["gamma"][module.layer_idx]).double()[:, None, None]
        weight = ((CLIPPED["zeta"] - gamma) * weight + gamma).clamp(0, 1)
        found = torch.einsum("bhst,bhtv->bshv", weight, value)
        return gates[module.layer_idx](inputs[module.layer_idx], found), None

    AttentionInterface.register("laid_in", laid_in)
    AttentionMaskInterface.register("laid_in", lambda *a, **k: sdpa_mask(*a, **k | {"allow_is_causal_skip": False,
                                                                                  "allow_is_bidirectional_skip": False}))  # fmt: skip
    model.set_attn_implementation("laid_in")
    expected = model(IDS).logits
    for implementation in ("sdpa", "eager"):
        ours.set_attn_implementation(implementation)
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-10, atol=1e-10)
    plain = portable(family, stock(family))(IDS).logits
    assert float(((plain - expected).norm() / expected.norm()).detach()) > 0.01  # the parts matter here


@pytest.mark.parametrize("family", DECODERS)
def test_generation_agrees_in_every_way_it_is_run(family):
    model = full(family)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    rows = IDS[:, :9]
    greedy = model.generate(rows, **how)
    assert torch.equal(greedy, model.generate(rows, use_cache=False, **how))
    assert torch.equal(greedy, model.generate(rows, cache_implementation="static", **how))
    beams = model.generate(rows, num_beams=3, **how)
    assert torch.equal(beams, model.generate(rows, num_beams=3, use_cache=False, **how))
    helper = copy.deepcopy(model)
    assert torch.equal(greedy[:1], model.generate(rows[:1], assistant_model=helper, **how))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "reattend"])
def test_left_padded_rows_generate_what_they_do_alone(family, implementation):
    from reattend.modeling.attention_backend import register_attention

    register_attention()
    model = full(family)
    model.set_attn_implementation(implementation)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(IDS, attention_mask=LEFT, **how)
    for row, seen in enumerate(LEFT):
        alone = model.generate(IDS[row : row + 1, seen.bool()], **how)
        assert torch.equal(together[row, 30:], alone[0, int(seen.sum()) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_and_through_our_kernels_are_the_same(family):
    from reattend.modeling.attention_backend import register_attention

    register_attention()
    gradients = []
    for implementation, checkpointing in itertools.product(("sdpa", "reattend"), (False, True)):
        model = full(family)
        model.set_attn_implementation(implementation)
        for module in model.modules():  # drawn numbers would differ between the runs
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        model.train()
        if family == "opt":
            for module in model.modules():
                if hasattr(module, "dropout"):
                    module.dropout = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, attention_mask=LEFT, labels=IDS.where(LEFT.cumsum(1) > 1, -100)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for name, grad in gradients[0].items() if ".gate." in name)
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_compiles_whole(family):
    model = full(family)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", DECODERS)
def test_an_engine_that_brings_its_own_attention_gets_what_it_needs(family):
    """As vLLM's transformers backend runs a model: on meta first, one call per layer, no cache, positions given."""
    model = portable(family, stock(family), attention_gates={"kind": "elementwise"})
    with torch.device("meta"):
        base = type(model.base_model)(model.config)
    assert all(parameter.is_meta for parameter in base.parameters())
    calls = []

    def engine(module, query, key, value, attention_mask, scaling=None, instances=None, **kwargs):
        calls.append((module.layer_idx, scaling, instances, query.shape[0]))
        per = query.shape[1] // key.shape[1]
        score = query @ key.repeat_interleave(per, 1).transpose(-1, -2) * scaling
        score = score + torch.full(score.shape[-2:], -torch.inf).double().triu(1)
        return (score.softmax(-1) @ value.repeat_interleave(per, 1)).transpose(1, 2), None

    expected = model.base_model(IDS[:1]).last_hidden_state
    AttentionInterface.register("engine", engine)
    model.set_attn_implementation("engine")
    positions = {} if family == "opt" else {"position_ids": torch.arange(30)[None]}
    found = model.base_model(IDS[:1], use_cache=False, instances="kept", **positions).last_hidden_state
    assert [call[0] for call in calls] == [0, 1]
    assert {call[2] for call in calls} == {"kept"}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert model._supports_attention_backend
    if family != "opt":
        plan = model.config.base_model_tp_plan
        assert plan["layers.*.self_attn.gate.proj"] == "colwise"
        assert set(model.config.base_model_pp_plan) == {"embed_tokens", "layers", "norm"}


def test_clipping_is_refused_where_nothing_clips():
    model = full("llama")
    AttentionInterface.register("engine_without", lambda *a, **k: None)
    model.set_attn_implementation("engine_without")
    with pytest.raises(ValueError, match="clipped softmax runs with attn_implementation 'eager' or 'sdpa'"):
        model(IDS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clipped_softmax": {"gamma": [[0.0]]}}, "one per head in a list per layer"),
        ({"clipped_softmax": {"gamma": 0.1}}, "a gamma above 0"),
        ({"clipped_softmax": {"gamma": -0.1, "zeta": 0.9}}, "zeta is below 1"),
        ({"reattend_format": 2}, "reattend_format is 2, and this code knows 1"),
    ],
)
def test_a_config_that_asks_for_the_impossible_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ReattendConfig(**CONFIGS["llama"][1], **keys)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # both in PEFT
@pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")
def test_adapters_train_on_it():
    import peft

    model = full("llama").float()
    before = model(IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.testing.assert_close(adapted(IDS).logits, before)
    adapted(IDS, labels=IDS).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    prefix = peft.get_peft_model(
        full("llama").float(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert prefix(IDS).logits.shape == before.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_again_and_nothing_is_drawn_anew(family, tmp_path):
    model = full(family).float()
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not (info["missing_keys"])
    assert not (info["unexpected_keys"])
    assert not (info["mismatched_keys"])
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    placed = type(model).from_pretrained(tmp_path, dtype="auto", device_map={"": "cpu"})
    on_disk = type(model).from_pretrained(
        tmp_path, dtype="auto", device_map={"": "disk"}, offload_folder=tmp_path / "o"
    )
    with torch.no_grad():
        for other in (placed, on_disk):
            assert torch.equal(other.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_starts_with_gates_half_open_and_gamma_as_configured(family):
    model = full(family)
    fresh = type(model)(model.config)
    for index, module in enumerate(m for m in fresh.modules() if hasattr(m, "gate")):
        assert not bool(module.gate.bias.any())
        assert module.gate.weight.std() < 0.1
        assert module.gamma.tolist() == pytest.approx(CLIPPED["gamma"][index])
