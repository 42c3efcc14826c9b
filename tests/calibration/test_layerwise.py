import pytest
import torch
import transformers
from torch import nn

from reattend.calibration.layerwise import layer_passes
from reattend.calibration.moments import Point, layer_moments
from reattend.families import FAMILIES
from tiny_models import CONFIGS

IDS = {"calibration": torch.arange(60).reshape(3, 20) + 3, "selection": torch.arange(40).reshape(2, 20) + 30}


def load(folder, family, **options):
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


def hidden_states(model, ids):
    """Every layer's input and the last one's output, by one ordinary forward pass of transformers."""
    seen = []
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    layers = model.get_submodule(name)
    hooks = [layer.register_forward_hook(lambda m, a, o: seen.extend([a[0], o])) for layer in layers]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [*seen[::2], seen[-1]]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_hidden_states_equal_those_of_a_whole_forward_pass(models, family):
    model = load(models(family), family)
    expected = {name: hidden_states(model, ids) for name, ids in IDS.items()}
    for current in layer_passes(model, FAMILIES[family], IDS):
        for name, states in current.hidden.items():
            torch.testing.assert_close(states, expected[name][current.index], rtol=1e-5, atol=1e-6)
    for name, states in current.hidden.items():
        torch.testing.assert_close(states, expected[name][-1], rtol=1e-5, atol=1e-6)
    after = hidden_states(model, IDS["selection"])  # the layers are back in their places
    assert all(torch.equal(a, b) for a, b in zip(after, expected["selection"], strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bert"])
def test_moments_of_an_offloaded_model_equal_those_in_memory(models, family, tmp_path):
    folder = models(family)
    attention = {"gpt2": "attn.c_attn", "bert": "attention.self.key"}.get(family, "self_attn.k_proj")
    points = [Point(attention), Point(attention, "output")]
    found = []
    for options in ({}, {"device_map": {"": "disk"}, "offload_folder": tmp_path}):
        model = load(folder, family, **options)
        offloaded = any(p.device.type == "meta" for p in model.parameters())
        assert offloaded == bool(options)
        found.append([layer_moments(current, points) for current in layer_passes(model, FAMILIES[family], IDS)])
        assert any(p.device.type == "meta" for p in model.parameters()) == offloaded  # nothing stays behind
    for here, there in zip(*found, strict=True):
        for point in points:
            for name, value in here[point].items():
                torch.testing.assert_close(there[point][name], value, rtol=1e-9, atol=1e-12)


def test_moments_are_those_of_the_activations(models):
    model = load(models("llama"), "llama")
    rows = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: rows.append(a[0][0].double()))
    with torch.inference_mode():
        for ids in IDS.values():
            for window in ids:
                model(window[None])
    handle.remove()
    x = torch.cat(rows)
    point = Point("mlp.down_proj")
    passes = [layer_moments(current, [point]) for current in layer_passes(model, FAMILIES["llama"], IDS)]
    found = passes[1][point]
    assert found["count"] == 100
    torch.testing.assert_close(found["second"], x.T @ x / 100, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["mean"], x.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["absmax"], x.abs().amax(0), rtol=1e-5, atol=1e-7)


def test_a_failing_consumer_leaves_the_model_whole(models, tmp_path):
    model = load(models("llama"), "llama", device_map={"": "disk"}, offload_folder=tmp_path)
    passes = layer_passes(model, FAMILIES["llama"], IDS)
    next(passes)
    passes.close()
    assert all(p.device.type == "meta" for p in model.parameters())
    whole = load(models("llama"), "llama")
    with torch.inference_mode():
        assert torch.equal(model(IDS["selection"]).logits, whole(IDS["selection"]).logits)


def test_windows_of_two_lengths_are_refused(models):
    model = load(models("llama"), "llama")
    with pytest.raises(ValueError, match="one length"):
        next(layer_passes(model, FAMILIES["llama"], {"a": IDS["selection"], "b": IDS["selection"][:, :5]}))
