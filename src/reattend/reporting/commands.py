"""The commands that measure a report's numbers again, as one would type them."""

from typing import Any

_QUOTED = {"OUT": '"$OUT"', "MODEL": '"$MODEL"', "TEXT": '"$TEXT"'}


def commands(content: dict[str, Any]) -> dict[str, str]:
    """Return section of the report -> shell command whose `--json` holds its numbers.

    They name the output, its source and the text by shell variables: see `variables`.
    """
    found = {"after": f"reattend inspect {_QUOTED['OUT']}"}
    if content["before"] is not None:
        found["before"] = f"reattend inspect {_QUOTED['MODEL']}"
    compared = content["verification"].get("logits_error") is not None
    found["verification"] = f"reattend verify {_QUOTED['OUT']}" + (_against() if compared else "")
    if content["evaluation"] is not None:
        found["evaluation"] = _evaluation(content)
    if any(content["findings"]):
        found["findings"] = _again(content)
    return {section: f"{command} --json" for section, command in found.items()}


def _against() -> str:
    return f" --against {_QUOTED['MODEL']}"


def _evaluation(content: dict[str, Any]) -> str:
    evaluation = content["evaluation"]
    compared = "base_perplexity" in evaluation or "base_outliers" in evaluation
    parts = [f"reattend eval {_QUOTED['OUT']}{_against() if compared else ''} --text {_QUOTED['TEXT']}"]
    for name, value in content["evaluated_with"].items():
        if value is True:
            parts.append(f"--{name}")
        elif value not in (None, False, "cpu"):  # the device that is taken by itself
            parts.append(f"--{name} {value}")
    return " ".join(parts)


def _again(content: dict[str, Any]) -> str:
    """What calibration found is found again by the run itself."""
    texts = [key for key in ("calibration", "selection") if key in content["texts"]]
    return " ".join(
        ['reattend apply "$OUT/recipe.yaml"', _QUOTED["MODEL"], '"$AGAIN"', *(f'--{t} "${t.upper()}"' for t in texts)]
    )


def variables(content: dict[str, Any]) -> dict[str, str]:
    """Return what each shell variable of the commands stands for."""
    base, evaluation = content["base"], content["evaluation"]
    found = {"OUT": "this folder, or repository"}
    revision = f" at revision {base['revision']}" if base and base["revision"] else ""
    model = f"{base['model']}{revision}" if base and not content["earlier"] else "the model that was rewritten"
    found["MODEL"] = f"{model} (fingerprint {content['source'][:16]})"
    if evaluation is not None:
        found["TEXT"] = f"{evaluation['text']} (sha256 {evaluation['text_sha256']})"
    if any(content["findings"]):
        found["AGAIN"] = "a new folder: its reattend.json holds the findings"
        for purpose in ("calibration", "selection"):
            if purpose in content["texts"]:
                name = content["recipe"].get(purpose) or "the text"
                found[purpose.upper()] = f"{name} (sha256 {content['texts'][purpose]})"
    return found
