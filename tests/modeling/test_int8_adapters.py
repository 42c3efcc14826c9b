"""LoRA adapters of PEFT on int8 layers."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

import reattend
from reattend.modeling.int8 import Int8Linear, fuse_linears

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(2, 34)[None]
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for recipe in ("int8", "int8-weights"):
        reattend.apply(recipe, models("llama"), folder / recipe)
    return folder


def adapted(model, dropout=0.0):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=dropout)).train()


def started(model):
    """Give B numbers as well: it begins at zero, where A gets no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1
    return model


def gradients(model):
    model(IDS, labels=IDS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def test_gradients_are_those_of_the_dequantised_model(models, folders):
    ours = started(adapted(reattend.load(folders / "int8-weights", dtype="float32").model))
    plain = reattend.load(models("llama"), dtype="float32").model
    with safe_open(folders / "int8" / "model.safetensors", "pt") as stored:  # the same codes, unpacked
        for name in (name.removesuffix("_scale") for name in stored.keys() if name.endswith("_scale")):  # noqa: SIM118
            weight = stored.get_tensor(name).float() * stored.get_tensor(f"{name}_scale").float()
            plain.get_parameter(name).data = weight
    got, want = gradients(ours), gradients(started(adapted(plain)))
    assert got.keys() == want.keys()
    assert len(got) == 2 * 2 * len(TARGETS)
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_reaches_every_adapter_and_no_code(folders, dropout):
    model = adapted(reattend.load(folders / "int8", dtype="float32").model, dropout)
    codes = {name: value.clone() for name, value in model.named_buffers() if "codes" in name}
    assert codes
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert all(float(p.grad.norm()) > 0 for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(value, codes[name]) for name, value in model.named_buffers() if name in codes)


def test_an_adapter_is_saved_and_loaded(folders, tmp_path):
    model = started(adapted(reattend.load(folders / "int8", dtype="float32").model)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(reattend.load(folders / "int8", dtype="float32").model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_merging_is_refused_instead_of_lost(folders):
    model = started(adapted(reattend.load(folders / "int8", dtype="float32").model)).eval()
    with pytest.raises(RuntimeError, match="keep the adapter"):
        copy.deepcopy(model).merge_and_unload()


def test_dora_trains(folders):
    """It reads the weight's numbers at the start."""
    base = reattend.load(folders / "int8", dtype="float32").model
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    model = started(get_peft_model(base, config)).train()
    assert all(float(value.norm()) > 0 for value in gradients(model).values())


def test_gradients_pass_joined_and_single_layers_alike():
    def layers():
        generator = torch.Generator().manual_seed(2)
        block = torch.nn.Module()
        for name, outputs in (("q_proj", 6), ("k_proj", 4), ("v_proj", 5)):
            codes = torch.randint(-127, 128, (outputs, 16), dtype=torch.int8, generator=generator)
            setattr(block, name, Int8Linear(codes, torch.rand(outputs, generator=generator) * 0.01))
        return block

    single, joined = layers(), layers()
    assert fuse_linears(joined) == 1
    found = []
    for block in (single, joined):
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        sum(getattr(block, name)(x).square().sum() for name in ("q_proj", "k_proj", "v_proj")).backward()
        found.append(x.grad)
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(block, name).weight, getattr(single, name).weight)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
