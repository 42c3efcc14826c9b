"""The converted layers run beside the source's: nothing drifts in the exact limit, and what drifts is made up for."""

import pytest
import torch
import transformers

from reattend import demo
from reattend.calibration.fitting import Schedule, output_error
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.convert.mla.attention import compose, read_source
from reattend.convert.mla.calibration import (
    Conversion,
    convert,
    gather_moments,
    read_moments,
    slots_of_all,
)
from reattend.convert.mla.exact import same_cache
from reattend.convert.mla.geometry import read_geometry
from reattend.convert.mla.prefix import Prefix, read_attention, stored_attention
from reattend.families.source import source_of

LINES = demo.SELECT_TEXT.read_text().splitlines()


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def source():
    return source_of(open_checkpoint(demo.MODEL))


@pytest.fixture(scope="module")
def texts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    ids = torch.tensor(tokenizer("\n".join(LINES)).input_ids[: 128 * 60]).view(60, 128)
    return {"calibration": ids[:56], "selection": ids[56:]}


def test_behind_exact_layers_the_states_are_the_sources(model, source, texts):
    geometry = read_geometry(source)
    maps = same_cache(geometry.heads, geometry.kv_heads, geometry.head_dim)
    prefix, attention = None, None
    for layer in layer_passes(model, source.family, texts):
        prefix = prefix or Prefix(layer.hidden)
        before = {text: states.clone() for text, states in layer.hidden.items()}
        expected = prefix.inputs(layer)
        read = {text: [] for text in texts}
        layer.run([("self_attn", lambda m, a, k, o, s=read, c=layer: s[c.text].append(k["hidden_states"]))])
        for text in texts:
            torch.testing.assert_close(expected[text], torch.cat(read[text]), rtol=1e-3, atol=1e-3)
            missing = prefix.missing(before)[text]
            assert float(missing.norm() / before[text].norm()) < 1e-4
        tensors = dict(layer.module.get_submodule("self_attn").state_dict())
        own = read_source(tensors, geometry.head_dim, geometry.rotary, geometry.scale)
        attention = compose(own, maps)
        again = read_attention(stored_attention(attention), own, maps.pair_P)
        x = expected["selection"][:1]
        torch.testing.assert_close(again.attend(x), attention.to(torch.float32).attend(x))
        prefix.advance(layer, attention)
        for text, states in layer.hidden.items():
            assert float((prefix.states[text] - states).norm() / states.norm()) < 1e-4


def test_layers_that_know_of_each_others_errors_end_nearer_to_the_source(model, source, texts):
    geometry = read_geometry(source)
    few = {"calibration": texts["calibration"]}
    moments = [
        read_moments(gather_moments(layer, geometry, 128)) for layer in layer_passes(model, source.family, few)
    ]
    pair_S, kept_YS = slots_of_all(moments, geometry, 4, None)
    how = Conversion(geometry, 8, True, Schedule(steps=16))
    far, prefix = {}, None
    for together in (False, True):
        for layer in layer_passes(model, source.family, texts):
            prefix = prefix if layer.index else Prefix(layer.hidden)
            rope = (pair_S, kept_YS[layer.index])
            attention, errors = convert(layer, moments[layer.index], rope, how, prefix if together else None)
            assert errors["refit"] <= errors["closed_form"]
            prefix.advance(layer, attention)
        far[together] = float(output_error(prefix.states["selection"], layer.hidden["selection"]))
    assert far[True] < 0.96 * far[False]
