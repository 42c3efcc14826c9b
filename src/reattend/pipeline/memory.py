"""How much memory calibration takes at least, from headers alone."""

from collections.abc import Sequence

from reattend.calibration.shared_attention import awaited_after
from reattend.families.source import Source, numbers

# Resident bytes of a Python process with torch and the copy buffers; scripts/bench/streaming saw 0.33 GB in all.
PROCESS_BYTES = 400_000_000
_NUMBER_BYTES = 4  # calibration on a CPU computes in fp32


def calibration_bytes(source: Source, tokens: Sequence[int]) -> dict[str, int]:
    """Return the peak bytes of calibration on a CPU, with the weights held in memory or offloaded to the disk.

    `tokens` counts those of each text. Counted are the process, the weights (offloaded: first those outside the
    layers, without the head, then one layer) and the hidden states of all windows, a text's twice while they are
    gathered, with the queries and keys that followers wait for. Not counted: what the step itself keeps (the moments
    of `mla` and the inputs and outputs it fits on, up to eight times the hidden states; a few thousand rows per
    linear for smoothing), the activations of one window, and pages of the checkpoint that are mapped while it is
    loaded, which the system takes back at need.
    """
    layers = [_numbers(source, source.layer_prefix(layer)) for layer in range(source.num_layers)]
    head = _numbers(source, f"{source.family.head}.")
    outside = source.parameters - sum(layers) - head
    states = [count * source.size("hidden") for count in tokens]
    gathered = max(sum(states[:text]) + 2 * size for text, size in enumerate(states))
    running = sum(states) + sum(tokens) * _left_for_followers(source)
    found = {
        "weights_held": source.parameters + max(gathered, running),
        "weights_offloaded": max(outside + gathered, max(layers) + running),
    }
    return {name: PROCESS_BYTES + _NUMBER_BYTES * count for name, count in found.items()}


def _left_for_followers(source: Source) -> int:
    """The most numbers per token that leaders leave for layers to come."""
    leaders = source.config.get("attention_sharing") or []
    most = max((len(awaited_after(layer, leaders)) for layer in range(len(leaders))), default=0)
    return most * (source.size("q") + source.size("kv"))


def _numbers(source: Source, prefix: str) -> int:
    return sum(numbers(spec, source.config) for name, spec in source.tensors.items() if name.startswith(prefix))
