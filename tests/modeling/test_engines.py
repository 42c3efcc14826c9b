"""What vLLM's and SGLang's transformers backends ask of a model, held against the portable ones.

No engine runs here: a stand-in calls the models as those backends do. It brings its own attention, built from what a
call hands over and from the module's attributes alone, and splits weights over two processes by the config's plan.
"""

import ast
import copy
import fnmatch
import inspect
import textwrap
import threading

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from reattend.modeling.portable.configuration_reattend import ReattendConfig
from reattend.modeling.portable.latent_reattend import ReattendLatentAttention
from reattend.modeling.portable.modeling_reattend import ReattendAttention, ReattendForCausalLM, ReattendModel
from reattend.modeling.portable.modeling_reattend_bert import ReattendBertSelfAttention
from reattend.modeling.portable.modeling_reattend_opt import ReattendOPTAttention
from reattend.modeling.portable.sharing_reattend import ReattendFollower
from tiny_models import GQA

IDS = torch.randint(3, 96, (1, 18), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(18)[None]
LAYERS = 4
RANKS = {name: [3, None, 2, 3] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
ATOMS = {name: [2] for name in RANKS}
PARTS = {
    "plain": {},
    "sliding": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gates": {"attention_gates": {"kind": "elementwise"}},
    "one gate per head": {"attention_gates": {"kind": "all_heads_linear"}},
    "sharing": {"attention_sharing": [None, None, 1, 0]},
    "drop": {"attention_drop": [2]},
    "dictionary": {"weight_dictionary": {"solver": "pca", "blocks": [0], "atoms": ATOMS, "ranks": RANKS}},
}
SPLIT = [name for name in PARTS if name != "dictionary"]  # whose attention no plan splits


def model(parts):
    torch.manual_seed(0)
    keys = GQA | {"head_dim": 8, "num_hidden_layers": LAYERS, "initializer_range": 0.3}
    return ReattendForCausalLM(ReattendConfig(**keys | PARTS[parts])).double().eval()


def engine(module, query, key, value, attention_mask, scaling=None, sliding_window=None, calls=None, **kwargs):
    """Attention as an engine has it: of one sequence, causal by itself, whatever mask is handed over."""
    calls.append((module.layer_idx, scaling == module.scaling, query.shape[0]))
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * module.scaling
    back = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
    seen = (back >= 0) & (back < (sliding_window or back.numel()))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@torch.no_grad()
@pytest.mark.parametrize("parts", PARTS)
def test_a_backend_that_brings_its_own_attention_computes_the_model(parts):
    own = model(parts)
    expected = own.model(IDS).last_hidden_state
    AttentionInterface.register("engine", engine)
    own.set_attn_implementation("engine")
    calls = []
    found = own.model(IDS, use_cache=False, position_ids=POSITIONS, calls=calls)
    dropped = own.config.attention_drop or []
    assert calls == [(layer, True, 1) for layer in range(LAYERS) if layer not in dropped]
    assert found.cache is None
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [ReattendAttention, ReattendFollower, ReattendLatentAttention, ReattendOPTAttention, ReattendBertSelfAttention],
)
def test_attention_is_found_by_reading_its_forward(kind):
    """vLLM 0.33 (models/transformers/fusers/attention.py) looks for one call of what the interface gave, in `forward`.

    The scale handed over has to be a constant or an attribute of the module, which it reads in advance.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    looked_up = {
        node.targets[0].id for node in assigned if "ALL_ATTENTION_FUNCTIONS.get_interface(" in ast.unparse(node.value)
    }
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in looked_up
    ]
    assert len(calls) == 1
    (scale,) = (word.value for word in calls[0].keywords if word.arg == "scaling")
    assert ast.unparse(scale) in ("self.scaling", "1.0")


@pytest.mark.parametrize("parts", PARTS)
def test_the_base_model_is_built_without_weights_and_named_as_the_checkpoint(parts):
    own = model(parts)
    with torch.device("meta"):
        base = ReattendModel(own.config)
    assert all(tensor.is_meta for tensor in [*base.parameters(), *base.buffers()])
    stored = {name.removeprefix("model.") for name in own.state_dict() if name != "lm_head.weight"}
    assert stored == set(base.state_dict())
    assert base._supports_attention_backend


@pytest.mark.parametrize("parts", PARTS)
def test_every_entry_of_the_plans_is_of_the_model(parts):
    own = model(parts).model
    named = [name for name, _ in own.named_modules()]
    for pattern in own._tp_plan:
        assert fnmatch.filter(named, pattern) or pattern_is_of_an_option(pattern), pattern
    for name in own.config.base_model_pp_plan:
        assert isinstance(getattr(own, name), nn.Module)
    assert [name for name, module in own.named_children() if isinstance(module, nn.ModuleList)] == ["layers"]


def pattern_is_of_an_option(pattern):
    """Entries for modules that other configs have are skipped by the engines."""
    return ".gate." in pattern or "_norm" in pattern


@torch.no_grad()
@pytest.mark.parametrize("parts", SPLIT)
def test_two_processes_compute_what_one_does(parts):
    """Columns and rows are split as the plan says; what rows give is summed. Each process holds half of the heads."""
    own = model(parts)
    expected = own.model(IDS).last_hidden_state
    plan = {name: how for name, how in own.model._tp_plan.items() if how in ("colwise", "rowwise")}
    halves = [Half(copy.deepcopy(own.model), plan, rank) for rank in range(2)]
    barrier, shared = threading.Barrier(2), [{}, {}]
    found = [None, None]

    def run(rank):
        halves[rank].meet(barrier, shared)
        with torch.no_grad():
            found[rank] = halves[rank].model(IDS, use_cache=False, position_ids=POSITIONS).last_hidden_state

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert halves[0].split >= {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"}
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-9)


class Half:
    """A model of which one process holds half of the linear layers that a plan names."""

    def __init__(self, held, plan, rank):
        self.model, self.rank, self.split, self.rows = held, rank, set(), []
        for name, module in held.named_modules():
            how = next((how for pattern, how in plan.items() if fnmatch.fnmatch(name, pattern)), None)
            if how is None or not isinstance(module, nn.Linear):
                continue
            self.split.add(name.split(".", 2)[2])
            dim = 0 if how == "colwise" else 1
            module.weight = nn.Parameter(module.weight.chunk(2, dim)[rank].clone())
            if how == "colwise" and module.bias is not None:
                module.bias = nn.Parameter(module.bias.chunk(2)[rank].clone())
            if how == "rowwise":
                self.rows.append((name, module))
                if module.bias is not None and rank:
                    module.bias = None  # it is added once

    def meet(self, barrier, shared):
        """Sum what the two processes' rows give."""

        def add(name):
            def hook(module, args, output):
                shared[self.rank][name] = output
                barrier.wait(20)
                total = shared[0][name] + shared[1][name]
                barrier.wait(20)
                return total

            return hook

        for name, module in self.rows:
            module.register_forward_hook(add(name))


@torch.no_grad()
@pytest.mark.parametrize(
    "clipped", [{"gamma": -0.03}, {"gamma": [[-0.02] * 4] * LAYERS, "zeta": 1.02}], ids=["one", "per head"]
)
def test_an_engine_that_would_leave_clipping_out_is_refused(clipped):
    torch.manual_seed(0)
    keys = GQA | {"head_dim": 8, "num_hidden_layers": LAYERS}
    own = ReattendForCausalLM(ReattendConfig(**keys, clipped_softmax=clipped)).eval()
    AttentionInterface.register("engine", engine)
    own.set_attn_implementation("engine")
    with pytest.raises(ValueError, match="clipped softmax runs with attn_implementation"):
        own.model(IDS, use_cache=False, calls=[])
