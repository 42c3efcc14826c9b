import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from pairs import QUICK, TEXTS, heal, tiny, weights
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import DeadEndError, Refusal
from reattend.evaluation.unused import check_unused
from reattend.families.source import source_of
from reattend.healing.batches import batch_of
from reattend.healing.parameters import optimiser_for
from reattend.modeling.loading import load, load_tokenizer
from reattend.recipes.schema import parse_recipe, parse_step
from reattend.texts.reading import read_text


def header(folder):
    with (folder / "model.safetensors").open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def windows_of(text, folder, count):
    return sample_tokens(read_text(text), load_tokenizer(folder), windows=count, window=QUICK["window"])


def perplexity(folder, dtype="float32"):
    """The mean over windows of the selection text, by transformers' own loss."""
    model, _ = load(folder, dtype=dtype, runtime="stock")
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss for ids in windows_of(TEXTS["selection"], folder, 3)]
    return math.exp(torch.stack(losses).double().mean())


@pytest.fixture(scope="module")
def healed(student, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "out"
    return out, heal(student, out, teacher, steps=40, warmup=4, evaluate_every=20, learning_rate=2e-2)


def test_it_learns(healed, student):
    _, found = healed
    assert found["curve"]["kl"][0] > 0.6
    assert max(found["curve"]["kl"][-4:]) < 0.6 * found["curve"]["kl"][0]
    assert found["curve"]["loss"] == found["curve"]["kl"]
    assert found["kept_step"] == 40


def test_only_values_change(healed, student):
    out, _ = healed
    assert header(out) == header(student)
    before, after = weights(student), weights(out)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((student / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (student / file).read_bytes()


def test_what_is_evaluated_is_what_is_written(healed, student):
    out, found = healed
    assert found["selection_perplexity"]["40"] == pytest.approx(perplexity(out), rel=1e-5)
    assert found["selection_perplexity"]["0"] == pytest.approx(perplexity(student), rel=1e-5)


def test_eval_refuses_both_texts_and_those_of_the_teacher(healed, student, tmp_path):
    out, _ = healed
    for text, purpose in ((TEXTS["text"], "calibration"), (TEXTS["selection"], "selection")):
        with pytest.raises(Refusal, match=f"shares text with the {purpose} text"):
            check_unused(read_text(text), out)
    other = {}
    for purpose, word in (("text", "first"), ("selection", "second")):
        other[purpose] = tmp_path / f"{word}.txt"
        other[purpose].write_text(" ".join(f"{word}{n}" for n in range(900)))
    heal(student, tmp_path / "again", out, steps=1, **other)
    with pytest.raises(Refusal, match="shares text with the teacher's earlier calibration text"):
        check_unused(read_text(TEXTS["text"]), tmp_path / "again")


def test_first_losses_are_those_of_the_models(student, teacher, tmp_path):
    found = heal(student, tmp_path / "out", teacher, steps=1, labels=0.5)
    text = read_text(TEXTS["text"])
    count = len(load_tokenizer(student)(text.content).input_ids) // QUICK["window"]
    every = windows_of(TEXTS["text"], student, count)  # all windows, so in the text's order
    ids = every[batch_of(0, 4, count, seed=0)]
    ours, theirs = (load(folder, dtype="float32", runtime="stock").model for folder in (student, teacher))
    with torch.no_grad():
        output, soft = ours(ids, labels=ids), theirs(ids).logits[:, :-1].log_softmax(-1)
        kl = torch.nn.functional.kl_div(
            output.logits[:, :-1].log_softmax(-1), soft, log_target=True, reduction="none"
        )
    expected = {"kl": kl.sum(-1).mean().item(), "labels": output.loss.item()}
    for name, value in expected.items():
        assert found["curve"][name] == pytest.approx([value], rel=1e-5)
    assert found["curve"]["loss"] == pytest.approx([expected["kl"] + 0.5 * expected["labels"]], rel=1e-5)


def test_new_tensors_alone_then_all(student, teacher, tmp_path):
    new = ["*.mlp.*", "model.norm.weight"]
    heal(student, tmp_path / "new", teacher, steps=4, new=new, new_steps=4, new_learning_rate=1e-2)
    heal(student, tmp_path / "all", teacher, steps=4, new=new, new_steps=2, warmup=0)
    before = weights(student)
    for name, value in weights(tmp_path / "new").items():
        assert torch.equal(value, before[name]) == (".mlp." not in name and name != "model.norm.weight"), name
    assert not any(torch.equal(value, before[name]) for name, value in weights(tmp_path / "all").items())


def test_train_limits_what_is_trained(student, teacher, tmp_path):
    heal(student, tmp_path / "out", teacher, train=["*.o_proj.weight"])
    before = weights(student)
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, before[name]) == (not name.endswith("o_proj.weight")), name


def test_best_weights_are_kept_not_the_last(student, teacher, tmp_path):
    """With a warm-up over all steps the rate rises until it does harm."""
    late = {"steps": 12, "warmup": 12, "learning_rate": 0.3, "evaluate_every": 1, "clip_norm": None, "save_every": 5}
    found = heal(student, tmp_path / "out", teacher, **late)
    measured, perplexities = found["selection_loss"], found["selection_perplexity"]
    assert 0 < found["kept_step"] < 12
    assert measured["12"] > 1.3 * measured[str(found["kept_step"])] == 1.3 * min(measured.values())
    assert perplexity(tmp_path / "out") == pytest.approx(perplexities[str(found["kept_step"])], rel=1e-5)
    last = heal(student, tmp_path / "last", teacher, **late, keep="last")
    assert last["kept_step"] == 12
    assert last["curve"] == found["curve"]
    assert perplexity(tmp_path / "last") == pytest.approx(perplexities["12"], rel=1e-5)


def test_where_no_step_helps_the_input_stays(teacher, tmp_path):
    found = heal(teacher, tmp_path / "out", None, outliers=1.0, outlier_limit=1e-3, kl=0.0, learning_rate=1.0)
    assert found["kept_step"] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()


def test_a_loss_that_is_no_number_ends_the_run(student, teacher, tmp_path):
    with pytest.raises(DeadEndError, match=r"heal: step \d+: the loss.*lower learning_rate"):
        heal(student, tmp_path / "out", teacher, learning_rate=1e30, clip_norm=None, warmup=0, evaluate_every=9)
    assert not any(tmp_path.iterdir())


def test_penalty_brings_outliers_down(student, teacher, tmp_path):
    found = heal(student, tmp_path / "out", None, kl=0.0, outliers=1.0, outlier_limit=0.05, steps=20, windows=4)
    assert found["curve"]["outliers"][-1] < 0.5 * found["curve"]["outliers"][0]


def test_hidden_states_come_closer(student, teacher, tmp_path):
    found = heal(student, tmp_path / "out", teacher, kl=0.0, hidden=1.0, steps=20, windows=4)
    assert found["curve"]["hidden"][-1] < 0.7 * found["curve"]["hidden"][0]


def test_recomputing_changes_nothing(student, teacher, tmp_path):
    plain, again = (
        heal(student, tmp_path / str(flag), teacher, outliers=0.1, outlier_limit=0.1, hidden=0.1, recompute=flag)
        for flag in (False, True)
    )
    assert plain == again
    assert (tmp_path / "False/model.safetensors").read_bytes() == (tmp_path / "True/model.safetensors").read_bytes()


def test_micro_batches_change_rounding_only(student, teacher, tmp_path):
    curves = [heal(student, tmp_path / str(m), teacher, micro_batch=m)["curve"]["loss"] for m in (1, 3)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_bf16_follows_float32(student, teacher, tmp_path):
    exact, half = (heal(student, tmp_path / p, teacher, precision=p)["curve"]["kl"] for p in ("float32", "bf16"))
    assert exact != half
    assert half == pytest.approx(exact, rel=0.05)


def test_no_random_number_is_drawn(student, teacher, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    heal(student, tmp_path / "out", teacher, steps=2)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("train", [["*"], ["model.embed_tokens.weight"]])
def test_tied_weights_that_are_stored_twice_stay_equal(student, teacher, tmp_path, train):
    twice = shutil.copytree(student, tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    heal(twice, tmp_path / "out", teacher, train=train)
    after = weights(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_untied_head_is_trained_by_labels_without_a_teacher(tmp_path):
    model = tiny(tmp_path / "model", tie_word_embeddings=False)
    found = heal(model, tmp_path / "out", None, kl=0.0, labels=1.0, steps=12)
    assert found["curve"]["labels"][-1] < found["curve"]["labels"][0]
    assert not torch.equal(weights(model)["lm_head.weight"], weights(tmp_path / "out")["lm_head.weight"])


def test_decay_by_kind():
    """With no gradient AdamW multiplies by 1 - rate x decay."""
    names = ("layers.0.q_proj.weight", "layers.0.norm.weight", "layers.0.q_proj.bias")
    made = {
        name: torch.nn.Parameter(torch.ones(2, 2) if "q_proj.weight" in name else torch.ones(2)) for name in names
    }
    optimiser = optimiser_for(made, parse_step({"step": "heal", "weight_decay": 0.1, "norm_decay": 0.3}, "test"))
    for parameter in made.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert [parameter.flatten()[0].item() for parameter in made.values()] == pytest.approx([0.9, 0.7, 1.0])


def test_as_a_step_of_a_recipe_the_input_is_the_teacher(teacher, tmp_path):
    """int8_layout and such are lossless; mla at half the cache is not, and heal brings it back."""
    step = {"step": "mla", "latent_rank": 12, "rope_dim": 4, "refit": False}
    texts = {"calibration": str(TEXTS["text"]), "selection": str(TEXTS["selection"])}
    healing = {
        "step": "heal",
        **{k: v for k, v in QUICK.items() if k not in ("window", "selection_windows")},
        "steps": 10,
        "windows": 4,
    }

    shared = {**texts, "window": 32, "windows": 8, "selection_windows": 3}
    reattend.apply(parse_recipe({**shared, "steps": [step, healing]}, "test"), teacher, tmp_path / "both")
    reattend.apply(parse_recipe({**shared, "steps": [step]}, "test"), teacher, tmp_path / "mla")
    found = json.loads((tmp_path / "both" / "reattend.json").read_text())["findings"]
    assert len(found) == 2
    assert found[1]["curve"]["kl"][-1] < 0.8 * found[1]["curve"]["kl"][0]
    assert source_of(open_checkpoint(tmp_path / "both")).family.model_type == "deepseek_v3"
    # The same as healing the output of the first step towards its source.
    heal(tmp_path / "mla", tmp_path / "after", teacher, steps=10, windows=4)
    assert (tmp_path / "both/model.safetensors").read_bytes() == (tmp_path / "after/model.safetensors").read_bytes()


def test_new_gates_are_trained_first(teacher, tmp_path):
    """On a portable model with gates and clipped softmax; the code beside the weights stays as it is."""
    steps = [{"step": "gates"}, {"step": "clipped_softmax", "alpha": 0.1}]
    reattend.apply(parse_recipe({"window": 32, "steps": steps}, "test"), teacher, tmp_path / "gated")
    before = weights(tmp_path / "gated")
    gates = [name for name in before if ".gate." in name]
    assert gates
    found = heal(
        tmp_path / "gated",
        tmp_path / "out",
        teacher,
        outliers=1.0,
        outlier_limit=0.5,
        new=["*.gate.*"],
        new_steps=6,
        keep="last",
    )
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, before[name]) == (name not in gates), name
    assert found["curve"]["outliers"][0] > 0
    for file in (tmp_path / "gated").glob("*.py"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
