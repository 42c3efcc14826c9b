"""Our attention inside transformers' models: the same logits as sdpa, in every way that a model is run."""

import logging

import pytest
import torch
import transformers
from torch import nn

import reattend
from reattend.kernels import attention as kernels
from reattend.modeling.attention_backend import attend, attention_ranges, register_attention, seen_by
from tiny_models import CONFIGS, write_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
WIDTH = 40
IDS = torch.randint(3, 96, (3, WIDTH), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(3, WIDTH, dtype=torch.int64)
LEFT[0, :13] = 0
LEFT[1, : WIDTH - 1] = 0  # one key alone
RIGHT = LEFT.flip(1)
HOLES = torch.ones(3, WIDTH, dtype=torch.int64)
HOLES[0, 5:9] = 0


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()
    register_attention()


def models(family, dtype=torch.float64, **changes):
    """A tiny model with stock attention and with ours, of the same weights, large enough for attention to matter."""
    name, settings = CONFIGS[family]
    made = []
    for implementation in ("eager" if family == "gemma2" else "sdpa", "reattend"):  # sdpa has no soft caps
        config = getattr(transformers, f"{name}Config")(**settings | changes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
        made.append(model.to(dtype).eval())
    return made


def compare(ours, stock, dtype=torch.float64):
    limit = 1e-9 if dtype == torch.float64 else 0.03
    assert float((ours - stock).norm() / stock.norm()) < limit


@pytest.fixture
def through_ranges(monkeypatch):
    """Make masks compact also where a CPU wouldn't need them, as they are on a GPU."""
    from reattend.modeling import attention_backend

    def has_ranges(q_length, rest):
        return real(q_length, {**rest, "device": "cuda"})

    real = attention_backend._has_ranges
    monkeypatch.setattr(attention_backend, "_has_ranges", has_ranges)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT, HOLES], ids=["whole", "left", "right", "holes"])
@pytest.mark.parametrize("compact", [False, True], ids=["sdpa's masks", "ranges"])
def test_logits_are_those_of_sdpa(family, mask, compact, request):
    if compact:
        request.getfixturevalue("through_ranges")
    stock, ours = models(family, **({"sliding_window": 9} if family == "mistral" else {}))
    with torch.inference_mode():
        want, got = (model(IDS, attention_mask=mask, use_cache=False).logits for model in (stock, ours))
    seen = slice(None) if mask is None else mask.bool()
    compare(got[seen], want[seen])
    assert got.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
@pytest.mark.parametrize("compact", [False, True], ids=["sdpa's masks", "ranges"])
def test_chunks_over_a_cache(family, cache, mask, compact, request):
    if compact:
        request.getfixturevalue("through_ranges")
    stock, ours = models(family, **({"sliding_window": 9} if family == "mistral" else {}))
    found = []
    for model in (stock, ours):
        held = (
            transformers.DynamicCache(config=model.config) if cache == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=64)
        )  # fmt: skip
        parts, start = [], 0
        for size in (22, 5, 1, 1, 11):
            seen = None if mask is None else mask[:, : start + size]
            with torch.inference_mode():
                parts.append(
                    model(IDS[:, start : start + size], attention_mask=seen, cache=held, use_cache=True).logits
                )
            start += size
        found.append(torch.cat(parts, 1))
    rows = slice(None) if mask is None else mask.bool()
    compare(found[1][rows], found[0][rows])


def test_the_compiled_kernel_runs_in_prefill(monkeypatch):
    from reattend.kernels.attention import native

    if native.unavailable():
        pytest.skip(native.unavailable())
    calls = []
    real = native.attention
    monkeypatch.setattr(native, "attention", lambda *a, **k: (calls.append(a[0].shape), real(*a, **k))[1])
    _, ours = models("llama", torch.bfloat16)
    exact = models("llama")[0].double()
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    with torch.inference_mode():
        for mask in (None, LEFT):
            got, want = (m(IDS, attention_mask=mask, use_cache=False).logits.double() for m in (ours, exact))
            rows = slice(None) if mask is None else mask.bool()
            compare(got[rows], want[rows], torch.bfloat16)
    assert len(calls) == 2 * ours.config.num_hidden_layers


def test_generation_of_a_padded_batch_is_that_of_single_runs():
    _, ours = models("qwen2")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = ours.generate(IDS, attention_mask=LEFT, **options)
    for row, first in enumerate((13, WIDTH - 1, 0)):
        assert torch.equal(ours.generate(IDS[row : row + 1, first:], **options)[0], batch[row, first:])
    for more in ({"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        stock, ours = models("qwen2")
        texts = [model.generate(IDS, attention_mask=LEFT, **options, **more) for model in (stock, ours)]
        assert torch.equal(*texts)


def test_assisted_decoding_takes_back_what_was_guessed(through_ranges):
    """Several queries over a cache that is cut again and again: repeated prompts make guesses that come true in part."""
    stock, ours = models("llama")
    prompt = IDS[:1, :8].repeat(1, 4)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = stock.generate(prompt, **options)
    assert torch.equal(ours.generate(prompt, prompt_lookup_num_tokens=4, **options), want)


def test_soft_caps():
    """Gemma 2, whose stock attention is eager, and computes its softmax in fp32: in fp64 its masks overflow."""
    stock, ours = models("gemma2", torch.float32, sliding_window=9, attn_logit_softcapping=3.0)
    with torch.inference_mode():
        want, got = (
            model(IDS, attention_mask=RIGHT, use_cache=False).logits[RIGHT.bool()] for model in (stock, ours)
        )
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_sinks():
    settings = CONFIGS["mixtral"][1] | {
        "head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]
    }  # fmt: skip
    found = []
    for name in ("eager", "reattend"):
        model = transformers.GptOssForCausalLM._from_config(
            transformers.GptOssConfig(**settings), attn_implementation=name
        )
        for parameter in model.eval().parameters():
            torch.manual_seed(parameter.numel())
            nn.init.normal_(parameter, 0.0, 0.3)
        with torch.inference_mode():
            found.append(model(IDS, attention_mask=LEFT, use_cache=False).logits[LEFT.bool()].double())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-5


def test_gradients_reach_the_weights():
    grads = []
    for model in models("llama"):
        model.train()
        model(IDS, attention_mask=LEFT, labels=IDS, use_cache=False).loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    compare(grads[1], grads[0])


def test_dropout_and_additive_masks_run_through_sdpa(caplog, monkeypatch):
    _, ours = models("llama", attention_dropout=0.5)
    ours.train()
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(3)
        first = ours(IDS, use_cache=False).logits
        torch.manual_seed(4)
        assert not torch.equal(ours(IDS, use_cache=False).logits, first)
    assert "attention: sdpa, because of dropout" in [record.message for record in caplog.records]
    _, ours = models("mistral", torch.bfloat16, attention_dropout=0.5, sliding_window=9)
    out = []
    for compact in (True, False):
        if not compact:  # the same through sdpa's own mask
            monkeypatch.setattr("reattend.modeling.attention_backend._has_ranges", lambda *a: False)
        torch.manual_seed(3)
        out.append(ours.train()(IDS, attention_mask=LEFT, use_cache=False).logits[LEFT.bool()])
    assert torch.equal(*out)
    stock, ours = models("llama")
    bias = torch.randn(3, 1, WIDTH, WIDTH, dtype=torch.float64).masked_fill(
        ~torch.ones(WIDTH, WIDTH).bool().tril(), -torch.inf
    )
    with torch.inference_mode():
        compare(*(model(IDS, attention_mask=bias, use_cache=False).logits for model in (ours, stock)))


def test_a_keyword_that_is_not_computed_raises():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="position_bias"):
        attend(nn.Module(), q, q, q, None, position_bias=q)


def test_masks_are_compact_only_where_they_say_all():
    sizes = {"batch_size": 3, "q_length": WIDTH, "kv_length": WIDTH, "device": "cpu", "dtype": torch.bfloat16}
    assert attention_ranges(**sizes) is None
    left = attention_ranges(**sizes, attention_mask=LEFT.bool())
    assert left[:, 0, 0].tolist() == [[13, 40, 0, 0], [39, 40, 0, 0], [0, 40, 0, 0]]
    right = attention_ranges(**sizes, attention_mask=RIGHT.bool())
    assert right[:, 0, 0].tolist() == [[0, 27, 0, 0], [0, 1, 0, 0], [0, 40, 0, 0]]
    stock = transformers.masking_utils.sdpa_mask(**sizes, attention_mask=HOLES.bool())
    assert torch.equal(attention_ranges(**sizes, attention_mask=HOLES.bool()), stock)
    assert attention_ranges(**sizes | {"dtype": torch.float32}, attention_mask=LEFT.bool()).dtype == torch.bool
    for mask in (LEFT, RIGHT):
        want = transformers.masking_utils.sdpa_mask(**sizes, attention_mask=mask.bool())
        got = seen_by(attention_ranges(**sizes, attention_mask=mask.bool()), torch.zeros(3, 1, WIDTH, 1), WIDTH)
        assert torch.equal(got, want)


def test_it_can_be_compiled():
    stock, ours = models("qwen2", torch.bfloat16)
    compiled = torch.compile(ours, backend="eager")  # traces all of it, and needs no compiler
    with torch.inference_mode():
        for mask in (None, LEFT):
            rows = slice(None) if mask is None else mask.bool()
            got, want = (m(IDS, attention_mask=mask, use_cache=False).logits[rows] for m in (compiled, stock))
            compare(got, want, torch.bfloat16)


WINDOWED = (
    "qwen2_moe",
    "phimoe",
    "olmoe",
)  # the first two pass no window, the third passes one without a mask for it


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask_says_the_window_and_not_a_keyword(family, dtype, request):
    if dtype == torch.float32:
        request.getfixturevalue("through_ranges")
    name = {"qwen2_moe": "Qwen2Moe", "phimoe": "Phimoe", "olmoe": "Olmoe"}[family]
    settings = CONFIGS["mixtral"][1] | {"sliding_window": 9, "num_experts": 3, "moe_intermediate_size": 24}
    settings |= {"use_sliding_window": True}
    settings |= {"layer_types": ["sliding_attention", "full_attention"]} if family == "qwen2_moe" else {}
    found = []
    for implementation in ("sdpa", "reattend"):
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
        for parameter in model.eval().parameters():
            torch.manual_seed(parameter.numel())
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.1)
        with torch.inference_mode():
            found.append(model.to(dtype)(IDS, use_cache=False).logits.double())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_mask_that_its_model_edits_is_sdpas():
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4, "device": "cpu", "dtype": torch.bfloat16}
    assert attention_ranges(**sizes, allow_is_causal_skip=False).dtype == torch.bool
    assert attention_ranges(**sizes | {"kv_length": 9}, q_offset=5)[0, 0, 0].tolist() == [0, 9, 5, 0]
    window = attention_ranges(**sizes, local_size=3)
    assert (window[0, 0, 0].tolist(), window.window) == ([0, 4, 0, 3], 3)
    assert attention_ranges(**sizes, local_size=4) is None


def test_autocast_casts_as_for_sdpa():
    found = []
    for model in models("qwen2", torch.float32):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found.append(model(IDS, attention_mask=LEFT, use_cache=False).logits[LEFT.bool()].double())
    compare(found[1], found[0], torch.bfloat16)


def test_masks_of_one_row_and_refused_combinations():
    q = torch.randn(3, 2, WIDTH, 8)
    module = nn.Module()
    row = LEFT.bool()[:, None, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, row)
    torch.testing.assert_close(attend(module, q, q, q, row)[0], want.transpose(1, 2))
    with pytest.raises(ValueError, match="sinks, soft caps and clipping are not computed with dropout"):
        attend(module, q, q, q, None, dropout=0.1, s_aux=torch.zeros(2))


def test_packed_sequences_keep_apart():
    """Position ids that start anew mean sequences in one row: the mask function is then another."""
    positions = torch.cat([torch.arange(15), torch.arange(WIDTH - 15)])[None].expand(3, -1)
    stock, ours = models("llama", torch.bfloat16)
    with torch.inference_mode():
        got, want = (m(IDS, position_ids=positions, use_cache=False).logits for m in (ours, stock))
        alone = ours(IDS[:, 15:], use_cache=False).logits
    compare(got, want, torch.bfloat16)
    compare(got[:, 15:], alone, torch.bfloat16)


def test_load_runs_it(tmp_path, monkeypatch):
    folder = write_model("llama", tmp_path / "model")
    assert reattend.load(folder).model.config._attn_implementation == "reattend"
    assert reattend.load(folder, runtime="stock").model.config._attn_implementation == "sdpa"
    model = reattend.load(folder).model
    model.save_pretrained(tmp_path / "again")
    assert "reattend" not in (tmp_path / "again" / "config.json").read_text()
    assert kernels.attention is not None
