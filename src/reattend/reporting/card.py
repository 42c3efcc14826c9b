"""README.md of an output: the model card that the Hub shows."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reattend.checkpoint.index import CARD, REPORT, REPORT_TEXT, SOURCE_CARD
from reattend.errors import Refusal
from reattend.reporting.document import code, table
from reattend.reporting.figures import comparison, how_measured, rows

# Of the source's card: what stays true of the output.
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_LICENCES = re.compile(r"(?i)^(licen[cs]e|copying|notice|use_policy)([._-].*)?$")
_QUANTIZED = {"int8", "int8_layout", "int8_attention"}
_INPUT = "as the input"  # what a step says whose output engines treat as they do its source
_LIBRARIES = {"compressed-tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
_SERVE = {"vllm": "vllm serve", "sglang": "python -m sglang.launch_server --model-path"}


def check_name(what: str, name: str | None) -> None:
    """Raise `Refusal` for what can't be the name of a model on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        raise Refusal(f"{what} {name!r}: not the name of a model on the Hub, such as org/name") from error


@dataclass(frozen=True)
class _Card:
    """What a card is written from: the output's folder, its report's content, its config, the source's metadata."""

    folder: Path
    content: dict[str, Any]
    config: dict[str, Any]
    source: dict[str, Any]

    @property
    def steps(self) -> list[str]:
        """The names of all steps that made the model, in order, those of earlier runs included."""
        recipes = [run["recipe"] for run in [*self.content["earlier"], self.content]]
        return [step["step"] for recipe in recipes for step in recipe["steps"]]

    @property
    def base(self) -> str | None:
        """The base model on the Hub, where it is known."""
        base = self.content["base"]
        return None if base is None else base["model"]

    @property
    def name(self) -> str:
        """What the model is loaded by: its repository, or the folder's own name."""
        return self.content.get("repository") or self.folder.resolve().name

    @property
    def title(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def relation(self) -> str:
        """The Hub's word for what the model is to its base."""
        return "quantized" if _QUANTIZED & set(self.steps) else "finetune"

    @property
    def own_code(self) -> bool:
        """Whether transformers runs the code beside the weights."""
        return str(self.config.get("model_type", "")).startswith("reattend")

    @property
    def library(self) -> str | None:
        """The library that reads the quantised weights."""
        return _LIBRARIES.get(str((self.config.get("quantization_config") or {}).get("quant_method")))

    @property
    def auto(self) -> str:
        """The class of transformers that loads the model with its head."""
        named = (self.config.get("architectures") or [""])[0]
        return "AutoModelForMaskedLM" if "MaskedLM" in named else "AutoModelForCausalLM"


def write_card(folder: Path, content: dict[str, Any]) -> str:
    """Return the card of the output in `folder` for its report's `content`."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    card = _Card(folder, content, config, source_metadata(folder))
    parts = [*_begin(card), *_measured(card), *_use(card), *_serving(card), *_limits(card), *_licence(card)]
    return f"---\n{_metadata(card)}\n---\n\n" + "\n\n".join(parts) + "\n"


def source_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of the card that came with an output's source; nothing where none came.

    Raises `Refusal` for a card whose metadata can't be read.
    """
    from huggingface_hub import ModelCard

    path = folder / SOURCE_CARD
    if not path.is_file() and not (folder / REPORT).exists():
        path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"{path}: its metadata can't be read ({reason}); repair or remove it") from error
    found: dict[str, Any] = card.data.to_dict()
    return found


def _metadata(card: _Card) -> str:
    from huggingface_hub import ModelCardData

    kept = {key: card.source[key] for key in _KEPT if key in card.source}
    kind = "fill-mask" if card.auto == "AutoModelForMaskedLM" else "text-generation"
    data = ModelCardData(
        base_model=card.base,
        library_name="transformers",
        tags=[
            "reattend",
            *dict.fromkeys(step.replace("_", "-") for step in card.steps),
            *filter(None, [card.library]),
        ],
        **_results(card),
        **({"pipeline_tag": kind} | kept),
        **({"base_model_relation": card.relation} if card.base else {}),
    )
    text: str = data.to_yaml(line_break="\n")
    return text


def _results(card: _Card) -> dict[str, Any]:
    """Return the perplexity as the Hub's model index takes it, and the name that it stands under."""
    from huggingface_hub import EvalResult

    found = card.content["evaluation"] or {}
    if "perplexity" not in found:
        return {}
    result = EvalResult(
        task_type="text-generation",
        dataset_type=Path(found["text"]).stem,
        dataset_name=found["text"],
        dataset_args={key: found[key] for key in ("window", "windows", "dtype", "bos")},
        metric_type="perplexity",
        metric_name="perplexity",
        metric_value=round(found["perplexity"], 4),
    )
    return {"model_name": card.title, "eval_results": [result]}


def _begin(card: _Card) -> Iterator[str]:
    yield f"# {card.title}"
    base = card.content["base"]
    source = "A model" if base is None else f"[{base['model']}](https://huggingface.co/{base['model']})"
    at = f" at revision `{base['revision']}`" if base and base["revision"] else ""
    steps = ", ".join(f"`{step}`" for step in card.steps)
    yield f"{source}{at}, rewritten after training by reattend {card.content['reattend']}: {steps}."
    for run in [*card.content["earlier"], card.content]:
        yield code(yaml.safe_dump(_given(run["recipe"]), sort_keys=False, allow_unicode=True).splitlines(), "yaml")


def _given(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the keys that say nothing."""
    told = {key: value for key, value in recipe.items() if value not in (None, "") and key != "evaluate"}
    return told | {"steps": [{k: v for k, v in step.items() if v is not None} for step in recipe["steps"]]}


def _measured(card: _Card) -> Iterator[str]:
    yield "## Measured"
    yield table(("", "before", "after"), rows(card.content))
    found = list(comparison(card.content))
    if found:
        yield table(("against its source", ""), found)
    yield how_measured(card.content)
    yield f"All that was measured, plots, and the commands that measure it again: [{REPORT_TEXT}]({REPORT_TEXT})."


def _use(card: _Card) -> Iterator[str]:
    trust = ", trust_remote_code=True" if card.own_code else ""
    yield "## Use"
    if card.library:
        yield f"transformers needs `{card.library}` beside it (`pip install {card.library}`)."
    name = json.dumps(card.name)
    yield code(
        [
            f"from transformers import {card.auto}, AutoTokenizer",
            "",
            f"name = {name}  # this folder, or the repository's name",
            f'model = {card.auto}.from_pretrained(name, dtype="auto"{trust})',
            f"tokenizer = AutoTokenizer.from_pretrained(name{trust})",
        ],
        "python",
    )
    yield "On the kernels of `reattend` (`pip install reattend`):"
    yield code(["import reattend", "", f"model, tokenizer = reattend.load({name})"], "python")


def _serving(card: _Card) -> Iterator[str]:
    yield "## Engines"
    engines = _engines(card.content)
    yield table(("engine", "serves it"), engines.items())
    flag = " --trust-remote-code" if card.own_code else ""
    served = [
        f"{command} {card.name}{flag}"
        for engine, command in _SERVE.items()
        if not engines.get(engine, "no").startswith(("no", "?"))
    ]
    if served:
        yield code(served)


def _engines(content: dict[str, Any]) -> dict[str, str]:
    """Return engine -> yes, how, or why not; what is as the input is looked up where that was written."""
    told = dict(content["engines"])
    for run in reversed(content["earlier"]):
        told = {
            name: (run.get("engines") or {}).get(name, how) if how == _INPUT else how for name, how in told.items()
        }
    return {name: "as its source" if how == _INPUT else how for name, how in told.items()}


def _limits(card: _Card) -> Iterator[str]:
    yield "## Limits"
    gaps = card.content["not_measured"]
    lines = [f"- Not measured: {', '.join(gaps)}."] if gaps else []
    lines.append("- Measured on text alone: what the change does to other tasks, languages and lengths is not known.")
    yield "\n".join(lines)
    texts = card.content["texts"]
    if texts:
        yield "Texts that calibration, training or the choice of parameters used: it must not be measured on them."
        yield table(("purpose", "text", "sha256"), [_text(card, *entry) for entry in texts.items()])


def _text(card: _Card, purpose: str, digest: str) -> tuple[str, str, str]:
    name = card.content["recipe"].get(purpose)
    return purpose, str(name or "not named"), f"`{digest}`"


def _licence(card: _Card) -> Iterator[str]:
    yield "## Licence"
    files = sorted(path.name for path in card.folder.iterdir() if path.is_file() and _LICENCES.match(path.name))
    stated = card.source.get("license_name") or card.source.get("license")
    lines = [f"The source's card states: {stated}." if stated else "The source came without a card that states one."]
    if files:
        lines.append("Its licence files are copied: " + ", ".join(f"[{name}]({name})" for name in files) + ".")
    if (card.folder / SOURCE_CARD).is_file():
        lines.append(f"Its card is [{SOURCE_CARD}]({SOURCE_CARD}).")
    yield " ".join(lines)
