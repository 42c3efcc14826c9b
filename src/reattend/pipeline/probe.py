"""Run by `verify` as a script of its own, where `reattend` can't be imported: stock transformers only.

Usage: probe.py IDS.json NAME=MODEL .. Loads one model after the other strictly, checks keys, numbers and index,
and saves, beside the ids (one window, 1-D), what is wrong as NAME.json and, as NAME.pt, the `logits` of the ids and
what each layer put out (`layers`, a list, the last one after the final norm).
"""

import gc
import json
import math
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _Barrier(MetaPathFinder):
    """Makes the import of reattend fail, so that the proof does not lean on it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse reattend, leave everything else to the other finders."""
        if name.partition(".")[0] == "reattend":
            raise ImportError("reattend must not be needed to load its output")


def _files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))


def _check_numbers(folder: Path) -> list[str]:
    import torch
    from safetensors import safe_open

    problems, total = [], 0
    for file in _files(folder):
        with safe_open(folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                tensor = shard.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    problems.append(f"{file}: tensor {name!r} holds NaN or inf")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        promised = json.loads(index.read_text("utf-8"))["metadata"]["total_size"]
        if promised != total:
            problems.append(f"{index.name}: total_size {promised}, the headers add up to {total}")
    return problems


def _places(folder: Path, scratch: Path) -> dict[str, Any]:
    """Leave the weights of a model on the disk that would not fit into memory."""
    import psutil
    from safetensors import safe_open

    numbers = 0
    for file in _files(folder):
        with safe_open(folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                packed = 4 if name.endswith(".weight_packed") else 1  # 8-bit codes in words of 32
                numbers += packed * math.prod(shard.get_slice(name).get_shape())
    if 4 * numbers < 0.8 * psutil.virtual_memory().available:
        return {}
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise SystemExit("it does not fit into memory, and quantised weights can't be offloaded to the disk")
    return {"device_map": {"": "disk"}, "offload_folder": scratch}


def _load(folder: Path, scratch: Path) -> tuple[Any, list[str]]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, trust = _loader(json.loads((folder / "config.json").read_text("utf-8")))
    options = {"dtype": "float32", "output_loading_info": True, "trust_remote_code": trust}
    model, info = kind.from_pretrained(folder, **options, **_places(folder, scratch))
    problems = [
        f"{kind_}: {sorted(map(str, info[kind_]))[0]} (of {len(info[kind_])})"
        for kind_ in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind_)
    ]
    for parameter in model.parameters():  # bitsandbytes' loader leaves some in their stored dtype
        if parameter.is_floating_point() and parameter.device.type != "meta":
            parameter.data = parameter.data.float()
    return model.eval(), problems


def _loader(config: dict[str, Any]) -> tuple[Any, bool]:
    """Return what loads a config's architecture, and whether by the folder's code: that of a portable model alone.

    `verify` has looked at its code. Code that another folder brings along is never run.
    """
    import transformers

    names: list[str] = config.get("architectures") or []
    if not config["model_type"].startswith("reattend"):
        return getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM, False
    (auto,) = (auto for auto, name in config["auto_map"].items() if name.endswith(f".{names[0]}"))
    return getattr(transformers, auto), True


def _outputs(model: Any, ids: list[int]) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return {"logits": logits[0].float(), "layers": [hidden[0].float() for hidden in output.hidden_states[1:]]}


def _probe(folder: Path, ids: list[int], place: Path) -> None:
    import torch

    scratch = place.with_suffix(".offload")
    scratch.mkdir()
    problems = _check_numbers(folder)
    model, unloaded = _load(folder, scratch)
    out = _outputs(model, ids)
    if not torch.isfinite(out["logits"]).all():
        problems.append("logits hold NaN or inf")
    torch.save(out, place.with_suffix(".pt"))
    place.with_suffix(".json").write_text(json.dumps(problems + unloaded))


def main() -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    ids, *models = sys.argv[1:]
    for model in models:
        name, _, folder = model.partition("=")
        _probe(Path(folder), json.loads(Path(ids).read_text()), Path(ids).with_name(name))
        gc.collect()  # the next model has the memory to itself


if __name__ == "__main__":
    sys.meta_path.insert(0, _Barrier())
    main()
