"""What a source that is itself an output says about the runs that made it."""

from typing import Any

from reattend.checkpoint.index import MANIFEST, Checkpoint, read_json
from reattend.errors import Refusal

_RUN = ("reattend", "recipe", "source", "engines", "findings")


def earlier_runs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the runs behind a checkpoint, the first one first: version, recipe, source's fingerprint,
    engines, findings.

    Raises `Refusal` for a damaged `reattend.json`.
    """
    if MANIFEST not in checkpoint.sizes:
        return []
    manifest = read_json(checkpoint.files, checkpoint.sizes, MANIFEST)
    earlier = manifest.get("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(run, dict) for run in earlier):
        raise Refusal(f"{checkpoint.files.name}/{MANIFEST}: is damaged")
    return [*earlier, {key: manifest.get(key) for key in _RUN}]


def earlier_base(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Return the model on the Hub, and its commit, that a checkpoint says it was made from; None if it says none."""
    if MANIFEST not in checkpoint.sizes:
        return None
    base = read_json(checkpoint.files, checkpoint.sizes, MANIFEST).get("base")
    if base is not None and not (isinstance(base, dict) and isinstance(base.get("model"), str)):
        raise Refusal(f"{checkpoint.files.name}/{MANIFEST}: is damaged")
    return base
