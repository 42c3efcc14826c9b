"""The step dictionary, from end to end."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reattend
from pairs import tiny
from reattend import demo
from reattend.convert.dictionary.moments import PROJECTIONS
from reattend.errors import Refusal
from reattend.modeling.portable.configuration_reattend import wrong_dictionary
from reattend.recipes.schema import parse_recipe
from tiny_models import CONFIGS

SETTINGS = {
    "window": 32, "windows": 6, "selection_windows": 3,
    "calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT),
}  # fmt: skip
IDS = torch.randint(3, 2000, (2, 20), generator=torch.Generator().manual_seed(0))


def recipe(**step):
    return parse_recipe({"steps": [{"step": "dictionary", **step}], **SETTINGS}, "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("dictionary") / "model", num_hidden_layers=4)
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def apply(model, out, **step):
    reattend.apply(recipe(**step), model, out)
    return json.loads((out / "reattend.json").read_text())["findings"][0]


def projections(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.split(".")[-2] in PROJECTIONS}


def ranks_of(weights, groups):
    """Numerical ranks of layers' weights, stacked by `groups` of layers."""
    return [int(torch.linalg.matrix_rank(torch.cat([weights[i] for i in group]), rtol=1e-9)) for group in groups]


@pytest.mark.parametrize("solver", ["svd", "basis", "pca", "als"])
def test_the_numbers_are_within_the_budget(model, tmp_path, solver):
    found = apply(model, tmp_path / "out", solver=solver, reduction=0.3, blocks=2)
    before, after = projections(model), projections(tmp_path / "out")
    assert set(before) == set(after)
    total = sum(value.numel() for value in before.values())
    spent = 0
    for name in PROJECTIONS:
        weights = [after[f"model.layers.{i}.self_attn.{name}.weight"] for i in range(4)]
        rows, columns = weights[0].shape
        atoms = found["atoms"][name] if "atoms" in found else {"0": 0, "2": 0}
        assert solver != "pca" or set(atoms.values()) == {round(2 * 0.7 * 0.5)}
        spent += sum(atoms.values()) * (rows * columns + 2)
        together = solver == "basis" and name != "o_proj"
        groups = [(0, 1), (2, 3)] if together else [(0,), (1,), (2,), (3,)]
        said = found["ranks"][name]
        for group, rank in zip(groups, ranks_of(weights, groups), strict=True):
            promised = said[str(group[0])]
            high = len(group) * rows
            spent += high * columns if promised == "whole" else promised * (high + columns)
            if promised != "whole" and not atoms[str(group[0] // 2 * 2)]:
                assert rank == promised
    assert spent <= 0.7 * total
    assert spent > 0.66 * total
    if solver != "pca":  # its atoms make of random layers something else altogether
        assert reattend.verify(tmp_path / "out", against=model)["problems"] == []


@pytest.mark.parametrize("solver", ["pca", "als"])
def test_a_block_may_be_too_short_for_an_atom(model, tmp_path, solver):
    found = apply(model, tmp_path / "out", solver=solver, reduction=0.3, blocks=[0, 3])
    assert all(row["3"] == 0 for row in found["atoms"].values())
    assert reattend.verify(tmp_path / "out")["problems"] == []


def test_nearly_nothing_removed_changes_nearly_nothing(model, tmp_path):
    apply(model, tmp_path / "svd", solver="svd", reduction=1e-6)
    changed = [
        name for name, value in projections(tmp_path / "svd").items() if not value.equal(projections(model)[name])
    ]
    assert len(changed) <= 1


def test_a_matrix_of_low_rank_is_found_and_pays(model, tmp_path):
    """One q_proj has rank 4: it gives its numbers away, and stays exact."""
    folder = tmp_path / "model"
    tiny(folder, num_hidden_layers=4)
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = torch.randn(32, 4).double() @ torch.randn(4, 32).double() * 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = apply(folder, tmp_path / "out", reduction=0.04)
    assert 4 <= found["ranks"]["q_proj"]["2"] < 16
    others = [rank for p in PROJECTIONS for layer, rank in found["ranks"][p].items() if (p, layer) != ("q_proj", "2")]
    assert others == ["whole"] * 15
    assert torch.allclose(projections(tmp_path / "out")[name], tensors[name], atol=1e-6)


def test_layers_that_are_alike_share(tmp_path):
    """Four layers with one q_proj times a factor: one atom holds them, and the diagnostic says so."""
    folder = tiny(tmp_path / "model", num_hidden_layers=4)
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    for name in PROJECTIONS:
        for i in range(1, 4):
            first = tensors[f"model.layers.0.self_attn.{name}.weight"]
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = first * (1 + i / 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = apply(folder, tmp_path / "out", solver="pca", reduction=0.6, blocks=4, atom_share=0.85)
    assert found["energy_beyond_norms"]["q_proj"][0] > 0.4
    assert "warning" not in found
    for name, value in projections(tmp_path / "out").items():
        assert torch.allclose(value, tensors[name], atol=1e-9), name
    plain = apply(demo.MODEL, tmp_path / "demo", solver="pca", reduction=0.3)
    assert max(map(max, plain["energy_beyond_norms"].values())) < 0.1


@pytest.mark.parametrize("solver", ["svd", "basis", "pca", "als"])
def test_factors_compute_what_dense_weights_do(model, tmp_path, solver):
    """In fp64 to rounding: stored with one owner, loaded strictly by transformers alone, made dense by `load`."""
    step = {"solver": solver, "reduction": 0.3, "blocks": 2}
    apply(model, tmp_path / "dense", **step)
    found = apply(model, tmp_path / "factors", export="factors", **step)
    assert reattend.verify(tmp_path / "factors")["problems"] == []
    stock = reattend.load(tmp_path / "factors", dtype="float64", runtime="stock").model
    want = logits(reattend.load(tmp_path / "dense", dtype="float64", runtime="stock").model)
    assert torch.allclose(logits(stock), want, atol=1e-9)
    made = reattend.load(tmp_path / "factors", dtype="float64").model
    assert torch.allclose(logits(made), want, atol=1e-9)
    kept = reattend.load(tmp_path / "factors", dtype="float64", dictionary="factors").model
    assert torch.allclose(logits(kept), want, atol=1e-9)
    assert sum(p.numel() for p in kept.parameters()) < sum(p.numel() for p in made.parameters())
    kept.save_pretrained(tmp_path / "kept")
    same = load_file(tmp_path / "factors/model.safetensors")
    saved = load_file(tmp_path / "kept/model.safetensors")
    assert same.keys() == saved.keys()
    assert all(value.equal(saved[name]) for name, value in same.items())
    made.save_pretrained(tmp_path / "again")
    again = reattend.load(tmp_path / "again", dtype="float64", runtime="stock").model
    assert torch.equal(logits(again), logits(made))
    before = sum(value.numel() for value in projections(model).values())
    after = sum(v.numel() for n, v in load_file(tmp_path / "factors/model.safetensors").items() if is_attention(n))
    assert 0.66 * before < after <= 0.7 * before
    assert any("whole" in row.values() for row in found["ranks"].values()) or solver in ("pca", "als")


def is_attention(name):
    return "self_attn" in name or "dictionary" in name


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_als_takes_atoms_where_they_are_worth_their_numbers(model, tmp_path):
    """Layers that are alike but for one row of theirs take an atom and few ranks; unlike ones stay without."""
    folder = tiny(tmp_path / "model", num_hidden_layers=4)
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    alike = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)]
    for i, name in enumerate(alike[1:], 1):
        tensors[name] = tensors[alike[0]] * (1 + i / 4)
        tensors[name][i] = torch.randn(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    step = {"solver": "als", "reduction": 0.15, "blocks": 4, "atom_share": 0.25}
    found = apply(folder, tmp_path / "out", **step)
    assert found["atoms"]["o_proj"] == {"0": 1}
    assert max(found["ranks"]["o_proj"].values()) < 12  # whose factors take three quarters of the matrix
    assert all(set(found["ranks"][name].values()) == {"whole"} for name in ("q_proj", "k_proj", "v_proj"))
    after = projections(tmp_path / "out")
    assert all((after[name] - tensors[name]).norm() < 0.02 * tensors[name].norm() for name in alike)
    factors = apply(folder, tmp_path / "factors", export="factors", **step)
    assert factors == found
    given = {
        key: {n: {int(i): v for i, v in row.items()} for n, row in found[key].items()} for key in ("ranks", "atoms")
    }
    planned = reattend.plan(recipe(export="factors", **step, **given), folder)
    written = sum(spec.numel for spec in planned.result.tensors.values() if is_attention(spec.name))
    held = load_file(tmp_path / "factors/model.safetensors")
    assert written == sum(value.numel() for name, value in held.items() if is_attention(name))


def test_factors_train_and_are_healed(tmp_path):
    model = tiny(tmp_path / "model", num_hidden_layers=4)
    apply(model, tmp_path / "factors", solver="pca", export="factors", reduction=0.4, blocks=2)
    settings = {"steps": 3, "batch": 2, "micro_batch": 1, "evaluate_every": 3, "window": 32, "selection_windows": 2,
                "learning_rate": 1e-2}  # fmt: skip
    reattend.heal(
        tmp_path / "factors", tmp_path / "healed", teacher=model, text=demo.SELECT_TEXT, selection=demo.EVAL_TEXT,
        settings=settings,
    )  # fmt: skip
    assert reattend.verify(tmp_path / "healed")["problems"] == []
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("factors", "healed"))
    assert before.keys() == after.keys()
    assert any(not before[n].equal(after[n]) for n in before if "dictionary" in n)
    assert any(not before[n].equal(after[n]) for n in before if "coefficients" in n)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_families_with_biases_norms_and_windows(tmp_path, family):
    name, settings = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | {"vocab_size": 2048, "num_hidden_layers": 2})
    source = getattr(transformers, f"{name}ForCausalLM")(config).double()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    source.save_pretrained(tmp_path / "source")
    tiny(tmp_path / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / file).write_bytes((tmp_path / "tokenizer" / file).read_bytes())
    for export in ("dense", "factors"):
        apply(tmp_path / "source", tmp_path / export, export=export, reduction=0.3)
    dense, factors = (
        reattend.load(tmp_path / export, dtype="float64", runtime="stock").model for export in ("dense", "factors")
    )
    assert type(dense) is type(source)
    assert torch.allclose(logits(factors), logits(dense), atol=1e-8)


def test_what_factored_sources_are_refused(model, tmp_path):
    apply(model, tmp_path / "factors", export="factors", reduction=0.3)
    with pytest.raises(Refusal, match="dictionary 'low': expected dense or factors"):
        reattend.load(tmp_path / "factors", dictionary="low")
    again = parse_recipe({"steps": [{"step": "int8", "outliers": "smooth"}], **SETTINGS}, "test")
    with pytest.raises(Refusal, match="the source's projections are stored as factors"):
        reattend.plan(again, tmp_path / "factors")
    with pytest.raises(Refusal, match="outliers: the model's projections are stored as factors"):
        reattend.evaluate(tmp_path / "factors", demo.EVAL_TEXT, window=32, windows=1, outliers=True)
    drop = parse_recipe({"steps": [{"step": "attention_drop", "layers": [2]}], **SETTINGS}, "test")
    with pytest.raises(Refusal, match="weights that are stored as factors"):
        reattend.plan(drop, tmp_path / "factors")
    config = json.loads((tmp_path / "factors/config.json").read_text())
    for wrong, message in (
        ({"solver": "qr"}, "solver 'qr' is unknown"),
        ({"blocks": [1]}, "blocks: expected rising layers"),
        ({"atoms": [1]}, "atoms: expected q_proj, k_proj, v_proj and o_proj"),
        ({"atoms": {name: [1] for name in PROJECTIONS}}, "atoms: q_proj: expected a number for each block"),
        ({"ranks": {}}, "ranks: expected q_proj, k_proj, v_proj and o_proj"),
    ):
        assert message in wrong_dictionary(config["weight_dictionary"] | wrong, 4)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"blocks": 5}, "blocks: 5, expected 1 to 4 layers"),
        ({"blocks": [1, 2]}, "blocks: expected rising layers from 0 to below 4"),
        ({"blocks": [0, 4]}, "blocks: expected rising layers"),
        ({"reduction": 1.0}, "reduction"),
        ({"solver": "qr"}, "solver"),
        ({"ranks": {}}, "ranks: do nothing with export: dense"),
        ({"export": "factors", "ranks": {}}, "ranks: q_proj: 0: None, expected 1 to 32, or whole"),
        ({"export": "factors", "ranks": {"q_proj": {0: 33}}}, "ranks: q_proj: 0: 33, expected 1 to 32"),
        (
            {"export": "factors", "ranks": {"q_proj": dict.fromkeys(range(4), 2)}},
            "ranks: k_proj: 0: None, expected 1 to 16",
        ),
        (
            {"export": "factors", "solver": "als", "blocks": 4, "ranks": {}, "atoms": {"q_proj": {2: 1}}},
            r"atoms: q_proj: \{2: 1\}, expected 0 to a block's layers",
        ),
        (
            {"export": "factors", "solver": "als", "blocks": 4, "atoms": {}},
            "atoms: go with solver als and given ranks",
        ),
        ({"export": "factors", "ranks": {}, "atoms": {}}, "atoms: go with solver als and given ranks"),
        ({"solver": "pca", "reduction": 0.01, "atom_share": 1.0, "blocks": 4}, "atoms take 12352 numbers of 12165"),
    ],
)
def test_refused(model, step, message):
    with pytest.raises(Refusal, match=message):
        reattend.plan(recipe(**step), model)


def test_sources_that_are_refused(models, model, tmp_path):
    with pytest.raises(Refusal, match="phi3 has no separate q_proj"):
        reattend.plan(recipe(), models("phi3"))
    reattend.apply("int8", model, tmp_path / "int8")
    with pytest.raises(Refusal, match="is quantised"):
        reattend.plan(recipe(), tmp_path / "int8")
