"""README.md of outputs, read by huggingface_hub's own model card."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import ModelCard

import reattend
from reattend import Refusal, demo
from reattend.reporting.card import write_card


@pytest.fixture
def out(told, tmp_path):
    return shutil.copytree(told, tmp_path / "out")


def rewritten(folder, **changes):
    """The card for other content than was measured."""
    content = json.loads((folder / "report.json").read_text())
    return ModelCard(write_card(folder, content | changes))


def test_what_stays_true_of_the_source_is_taken_over(told):
    card = ModelCard.load(told / "README.md")
    expected = {
        "license": "other", "license_name": "community", "license_link": "LICENSE.txt", "language": ["en", "fr"],
        "datasets": ["org/text"], "base_model": "org/source", "base_model_relation": "quantized",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["reattend", "int8", "compressed-tensors"],
    }  # fmt: skip
    assert card.data.to_dict() == expected
    assert "states: community" in card.text
    assert "[LICENSE.txt](LICENSE.txt), [NOTICE](NOTICE)" in card.text
    assert (told / "LICENSE.txt").read_bytes() == (told.parent / "source" / "LICENSE.txt").read_bytes()
    assert (told / "SOURCE_README.md").read_bytes() == (told.parent / "source" / "README.md").read_bytes()


def test_the_measured_perplexity_is_the_cards_result(tmp_path):
    reattend.apply("gates", demo.MODEL, tmp_path / "out")
    how = {"text": demo.EVAL_TEXT, "window": 64, "windows": 2, "dtype": "float32"}
    content = reattend.report(tmp_path / "out", against=demo.MODEL, base="org/demo", **how)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(content["evaluation"]["perplexity"], abs=1e-4)
    assert (result.metric_type, result.dataset_name) == ("perplexity", "eval.txt")
    assert result.dataset_args == {"window": 64, "windows": 2, "dtype": "float32", "bos": "none"}
    assert card.data.base_model_relation == "finetune"
    check_code(tmp_path / "out", card.text)


def test_the_repository_is_what_a_card_loads_and_serves(out):
    reattend.report(out, repository="org/the-model")
    text = ModelCard.load(out / "README.md").text
    assert text.strip().startswith("# the-model\n")
    assert 'name = "org/the-model"' in text
    assert 'reattend.load("org/the-model")' in text
    assert "vllm serve org/the-model" in text
    reattend.report(out)  # another report still knows it
    assert ModelCard.load(out / "README.md").text == text
    with pytest.raises(Refusal, match="repository 'a/b/c': not the name of a model on the Hub"):
        reattend.report(out, repository="a/b/c")


def check_code(out, text):
    """What the card says one should run runs, beside the folder."""
    blocks = text.split("```python\n")[1:]
    assert len(blocks) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        for block in blocks:
            names: dict[str, object] = {}
            exec(block.partition("```")[0], names)
            assert names["model"].config.model_type == "reattend"
            assert names["tokenizer"]("town").input_ids


def test_without_a_name_on_the_hub_there_is_no_base_model(told):
    data = rewritten(told, base=None).data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(data)


def test_a_source_without_a_card_leaves_the_licence_open(out):
    (out / "SOURCE_README.md").unlink()
    card = rewritten(out)
    assert "license" not in card.data.to_dict()
    assert "The source came without a card" in card.text


def test_an_edited_card_is_kept(out):
    with (out / "README.md").open("a") as card:
        card.write("\nA remark of its owner.\n")
    edited = hashlib.sha256((out / "README.md").read_bytes()).hexdigest()
    told = reattend.report(out, base="org/demo")
    assert told["remarks"] == ["README.md was edited, and is kept as it is; remove it to have it written anew"]
    assert hashlib.sha256((out / "README.md").read_bytes()).hexdigest() == edited
    (out / "README.md").unlink()
    assert reattend.report(out)["remarks"] == []
    assert ModelCard.load(out / "README.md").data.base_model == "org/demo"


@pytest.mark.parametrize("card", ["---\n- a list\n---\n", "---\nkey: [\n---\n"])
def test_a_source_card_that_cannot_be_read_is_named_before_anything_is_measured(sound, tmp_path, card):
    out = shutil.copytree(sound, tmp_path / "out")
    (out / "README.md").write_text(card)
    with pytest.raises(Refusal, match=r"README\.md: its metadata can't be read"):
        reattend.report(out)
    assert (out / "README.md").read_text() == card
    assert not (out / "report.json").exists()


def test_what_engines_do_as_with_the_input_is_looked_up_in_the_run_before(told):
    step = {"steps": [{"step": "heal"}]}
    runs = [
        {
            "recipe": {"steps": [{"step": "gates"}]},
            "engines": {"vllm": "through its backend", "sglang": "no: reasons"},
        },
        {"recipe": step, "engines": {"vllm": "as the input", "sglang": "as the input"}},
    ]
    last = {"transformers": "yes", "vllm": "as the input", "sglang": "as the input"}
    text = rewritten(told, earlier=runs, recipe=step, engines=last).text
    assert "| vllm | through its backend |" in text
    assert "| sglang | no: reasons |" in text
    assert "vllm serve" in text
    assert "sglang.launch_server" not in text
    assert "| vllm | as its source |" in rewritten(told, recipe=step, engines=last).text
