import math

import pytest
import torch
import transformers
from torch.nn import functional

from reattend.families.rows import FAMILIES
from reattend.healing.losses import kl_divergence, next_token_loss, outlier_excess, relative_error
from reattend.healing.objective import Objective, Recorder, see
from reattend.recipes.schema import parse_step
from tiny_models import GQA


def test_by_hand():
    # Teacher (1/2, 1/2), student (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3.
    student = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64).log()
    teacher = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert kl_divergence(student, teacher).item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12
    )
    assert kl_divergence(teacher, teacher).item() == 0
    # Temperature 2 takes the root of the odds, 1 : sqrt 3, and the result four times.
    root = math.sqrt(3)
    soft = 0.5 * math.log((1 + root) / 2) + 0.5 * math.log((1 + root) / 2 / root)
    assert kl_divergence(student, teacher, 2.0).item() == pytest.approx(4 * soft, rel=1e-12)
    assert next_token_loss(student, torch.tensor([[0]])).item() == pytest.approx(math.log(4), rel=1e-12)
    # Two tokens, one of them right: (16 / 25 + 0) / 2, and the other layer is right in both.
    theirs = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])
    ours = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    assert relative_error([ours, theirs], [theirs, theirs]).tolist() == pytest.approx([0.16])
    # Peaks 15 and 4 with limit 10: (0.5^2 + 0) / 2.
    assert outlier_excess([torch.tensor([[[-15.0, 3.0], [4.0, 1.0]]])], 10.0).tolist() == pytest.approx([0.125])


def test_against_torch_in_fp64():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    expected = functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(kl_divergence(ours, theirs), expected.sum(-1).mean(-1), rtol=1e-12, atol=0)
    entropy = functional.cross_entropy(ours.flatten(0, 1), ids.flatten(), reduction="none").view(3, 5).mean(-1)
    torch.testing.assert_close(next_token_loss(ours, ids), entropy, rtol=1e-12, atol=0)


def test_half_precision_is_widened():
    logits = torch.tensor([[[20.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    # In bfloat16 the probabilities would add up to 1 exactly, and the loss of the likely one to 0.
    assert next_token_loss(logits, torch.tensor([[0]])).item() == pytest.approx(
        math.log1p(2 * math.exp(-20)), rel=1e-3, abs=5e-9
    )
    assert relative_error([logits], [logits]).dtype == torch.float32


@pytest.fixture(scope="module")
def double_models():
    """A student and a teacher in fp64, and windows."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**GQA | {"initializer_range": 0.3})
        made.append(transformers.LlamaForCausalLM(config).double().eval())
    return *made, torch.randint(0, 96, (5, 11), generator=torch.Generator().manual_seed(2))


ALL = {"kl": 1.0, "hidden": 0.7, "labels": 0.3, "outliers": 2.0, "outlier_limit": 0.5, "temperature": 2.0}


def settings(**changes):
    return parse_step({"step": "heal", **changes}, "test")


def gradient(models, sizes, family=FAMILIES["llama"]):
    student, teacher, ids = models
    objective, watch = (
        Objective(student, family, settings(**ALL)),
        Recorder(teacher, family, settings(**ALL), teacher=True),
    )
    student.zero_grad()
    parts = []
    for micro in ids.split(sizes):
        with torch.no_grad():
            shown = see(teacher, watch, micro, "float32")
        loss, part = objective(micro, shown)
        (loss / len(ids)).backward()
        parts.append(part)
    return torch.cat([p.grad.flatten() for p in student.parameters()]), torch.stack(parts).sum(0) / len(ids)


def test_accumulated_gradient_is_that_of_the_whole_batch(double_models):
    (whole, parts), (split, parts_split) = gradient(double_models, [5]), gradient(double_models, [2, 1, 2])
    assert (whole - split).norm() < 1e-12 * whole.norm()
    torch.testing.assert_close(parts, parts_split, rtol=1e-12, atol=0)
    assert (parts > 0).all()


def test_parts_are_those_of_the_model(double_models):
    student, teacher, ids = double_models
    _, parts = gradient(double_models, [5])
    raw = {}
    for name, model in (("student", student), ("teacher", teacher)):
        inputs = []
        model.model.norm.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            output = model(ids, output_hidden_states=True, labels=ids)
        raw[name] = [*output.hidden_states[1:-1], inputs[0]], output
    (ours, output), (theirs, other) = raw["student"], raw["teacher"]
    assert parts[2].item() == pytest.approx(output.loss.item(), rel=1e-6)  # transformers computes it in fp32
    expected = torch.stack(
        [((a - b).norm(dim=-1) / b.norm(dim=-1)).square().mean() for a, b in zip(ours, theirs, strict=True)]
    )
    assert parts[1].item() == pytest.approx(expected.mean().item(), rel=1e-9)
    soft = [(logits[:, :-1] / 2).log_softmax(-1) for logits in (output.logits, other.logits)]
    kl = functional.kl_div(soft[0].flatten(0, 1), soft[1].flatten(0, 1), log_target=True, reduction="batchmean")
    assert parts[0].item() == pytest.approx(4 * kl.item(), rel=1e-9)


def test_outliers_are_those_of_attention_and_ffn_outputs(double_models):
    student, _, ids = double_models
    _, parts = gradient(double_models, [5])
    outputs = []
    for layer in student.model.layers:
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_hook(
                lambda m, i, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
    with torch.no_grad():
        student(ids)
    excess = [(output.abs().amax(-1) / 0.5 - 1).clamp_min(0).square().mean() for output in outputs]
    assert len(excess) == 4
    assert parts[3].item() == pytest.approx(torch.stack(excess).mean().item(), rel=1e-9)
