"""The commands: parse, call one library function, print its report."""

from pathlib import Path
from typing import Any

import click

from reattend import processes
from reattend.cli.console import progress, show
from reattend.cli.evaluating import evaluate
from reattend.cli.publishing import push
from reattend.cli.recipes import as_json, recipes
from reattend.cli.reporting import report
from reattend.cli.streams import tell
from reattend.errors import Failure, Refusal

resume = click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
device = click.option("--device", default="cpu", show_default=True, help="Where tensors are computed: cpu, cuda:0.")
calibration = click.option("--calibration", metavar="TEXT", help="Calibration text (a file, or dataset:PATH).")
selection = click.option("--selection", metavar="TEXT", help="Another text, to choose parameters on.")
windows = click.option("--windows", type=click.IntRange(1), help="Windows drawn from the calibration text.")
selection_windows = click.option("--selection-windows", type=click.IntRange(1), help="Windows of the other text.")
evaluate_on = click.option(
    "--evaluate", metavar="TEXT", help="A third text: measure OUT on it, and write its report."
)
window = click.option("--window", type=click.IntRange(2), help="Tokens in a window.")
_SETTINGS = ("calibration", "selection", "windows", "selection_windows", "window")  # those of the recipe


parameters = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the step (YAML)."
)


def _text_options(command: Any) -> Any:
    """The options of commands that calibrate."""
    for option in (as_json, window, selection_windows, windows, selection, calibration, device):
        command = option(command)
    return command


def _run_options(command: Any) -> Any:
    """The options that `apply` and `convert` share."""
    return resume(overwrite(evaluate_on(_text_options(command))))


@click.command()
@click.argument("model")
@as_json
def inspect(model: str, as_json: bool) -> None:
    """Say what MODEL (a folder or a Hub id) is, and which steps apply to it."""
    from reattend.pipeline.inspection import inspect as look

    show(look(model), as_json=as_json)


@click.command()
@click.argument("recipe")
@click.argument("model")
@window
@as_json
def plan(recipe: str, model: str, window: int | None, as_json: bool) -> None:
    """Say what RECIPE would do to MODEL, from headers alone; nothing is written."""
    import reattend
    from reattend.recipes.schema import load_recipe

    asked = load_recipe(recipe)
    asked = asked if window is None else asked.model_copy(update={"window": window})
    summary = reattend.plan(asked, model).summary()
    if not as_json:
        for step in summary["steps"]:
            step["changes"] = _digest(step["changes"])
    show(summary, as_json=as_json)


def _digest(changes: list[dict[str, Any]], most: int = 8) -> list[str]:
    def text(tensors: list[dict[str, Any]], shown: int = 3) -> str:
        named = [f"{t['name']} {t['dtype']} {t['shape']}" for t in tensors[:shown]]
        return ", ".join(named) + (f" and {len(tensors) - shown} more" if len(tensors) > shown else "")

    def line(reads: list[dict[str, Any]], writes: list[dict[str, Any]]) -> str:
        return f"{text(reads)} -> {'the same, other values' if writes == reads else text(writes)}"

    lines = [line(**change) for change in changes[:most]]
    rest = len(changes) - most
    return lines + ([f"and {rest} more: --json lists all"] if rest > 0 else [])


def _with_settings(recipe: Any, options: dict[str, Any]) -> Any:
    """Take the recipe's own settings out of the options; return the recipe with those that were given."""
    from reattend.recipes.schema import override

    settings = {key: options.pop(key) for key in _SETTINGS}
    return override(recipe, {key: value for key, value in settings.items() if value is not None})


def _evaluated(recipe: Any, text: str | None) -> Any:
    """Return the recipe with another text to evaluate on, if one was given."""
    from reattend.recipes.schema import override

    if text is None:
        return recipe
    given = {} if recipe.evaluate is None else recipe.evaluate.model_dump()
    return override(recipe, {"evaluate": {**given, "text": text}})


def _apply(recipe: Any, model: str, out: str, options: dict[str, Any]) -> None:
    import reattend

    recipe = _evaluated(_with_settings(recipe, options), options.pop("evaluate"))
    as_json = options.pop("as_json")
    with progress() as report:
        done = reattend.apply(recipe, model, out, progress=report, **options)
    _show_done(done, model, out, as_json)


def _show_done(done: Any, model: str, out: str, as_json: bool) -> None:
    from reattend.pipeline.execution import read_findings

    if processes.rank():
        return
    summary = done.summary()
    keys = ("bytes_before", "bytes_after", "ratio", "remarks")
    findings = [found for found in read_findings(Path(out)) if found]
    shown: dict[str, Any] = {"out": out, "model": model, **{key: summary[key] for key in keys}}
    if findings:
        shown["findings"] = findings
    if done.recipe.evaluate is not None:
        from reattend.reporting.figures import summary
        from reattend.reporting.record import read_report

        shown["measured"] = summary(read_report(Path(out)) or {})
    show(shown, as_json=as_json)


@click.command()
@click.argument("recipe")
@click.argument("model")
@click.argument("out")
@_run_options
def apply(recipe: str, model: str, out: str, **options: Any) -> None:
    """Write MODEL rewritten by RECIPE (a YAML file or a built-in name) to the folder OUT."""
    from reattend.recipes.schema import load_recipe

    _apply(load_recipe(recipe), model, out, options)


@click.command()
@click.argument("step")
@click.argument("model")
@click.argument("out")
@parameters
@_run_options
def convert(step: str, model: str, out: str, settings: tuple[str, ...], **options: Any) -> None:
    """Apply one STEP, such as int8: a recipe of one step."""
    from reattend.recipes.schema import parse_recipe

    recipe = parse_recipe({"steps": [{"step": step, **_settings(settings)}]}, "convert")
    _apply(recipe, model, out, options)


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--teacher", metavar="BASE", help="The model to follow: before surgery (a folder or a Hub id).")
@click.option("--text", required=True, metavar="FILE", help="UTF-8 file to train on, or dataset:PATH.")
@click.option(
    "--selection", required=True, metavar="TEXT", help="Another text, on which the best weights are chosen."
)
@parameters
@window
@selection_windows
@device
@resume
@overwrite
@as_json
def heal(
    model: str,
    out: str,
    settings: tuple[str, ...],
    window: int | None,
    selection_windows: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune MODEL after surgery, towards BASE, and write it to the folder OUT (also under torchrun)."""
    import reattend

    shared = {"window": window, "selection_windows": selection_windows}
    given = _settings(settings) | {key: value for key, value in shared.items() if value is not None}
    with progress() as report:
        done = reattend.heal(model, out, settings=given, progress=report, **options)
    _show_done(done, model, out, as_json)


@click.command()
@click.argument("model")
@parameters
@_text_options
def sensitivity(model: str, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure what int8 in each linear layer of MODEL costs, and what `keep: auto` would keep; nothing is written."""
    import reattend
    from reattend.recipes.schema import parse_recipe

    step = {"step": "int8", "keep": "auto", **_settings(settings)}
    recipe = _with_settings(parse_recipe({"steps": [step]}, "sensitivity"), options)
    with progress() as report:
        found = reattend.sensitivity(recipe, model, progress=report, **options)
    show(found, as_json=as_json)


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
    from reattend.recipes.schema import parse_yaml

    chosen = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise Refusal(f"--set {setting}: expected KEY=VALUE")
        if key == "step":
            raise Refusal(f"--set {setting}: the command says which step it is")
        if key in chosen:
            raise Refusal(f"--set {setting}: {key} is set twice")
        chosen[key] = parse_yaml(value, f"--set {setting}")
    return chosen


@click.command()
@click.argument("out")
@click.option("--against", metavar="MODEL", help="The source, to compare logits with.")
@as_json
def verify(out: str, against: str | None, as_json: bool) -> None:
    """Load OUT strictly in a fresh process, without reattend, and check keys, numbers and logits."""
    import reattend

    report = reattend.verify(out, against=against)
    show(report, as_json=as_json)
    _fail_on(report["problems"], out)
    if against is None and not as_json:
        tell("logits were not compared: pass --against MODEL")


def _fail_on(problems: list[str], out: str) -> None:
    if problems:
        raise Failure(f"{out}: {len(problems)} problems, the first: {problems[0]}")


@click.command()
@click.option("--out", default="demo-output", show_default=True, help="Folder for the converted model.")
@overwrite
@as_json
def demo(out: str, overwrite: bool, as_json: bool) -> None:
    """Convert, verify and evaluate the bundled model, offline."""
    import reattend
    from reattend import demo as bundled

    planned = reattend.apply("int8", bundled.MODEL, out, overwrite=overwrite)
    tell("converted; verifying in a fresh process ...")
    checked = reattend.verify(out, against=bundled.MODEL)
    with progress() as report:
        measured = reattend.evaluate(
            out, bundled.EVAL_TEXT, against=bundled.MODEL, window=bundled.WINDOW, dtype="float32", progress=report
        )
    sizes = {"bytes_before": planned.checkpoint.nbytes, "bytes_after": planned.layout.nbytes}
    show({"out": str(Path(out).resolve()), **sizes, **checked, **measured}, as_json=as_json)
    _fail_on(checked["problems"], out)


COMMANDS = (inspect, plan, apply, convert, heal, verify, evaluate, report, push, sensitivity, recipes, demo)
