"""Which pairs keep RoPE: in one layer, and in one list of frequencies for a whole model.

Dropping RoPE from component n replaces exp(i w d) by a constant at every distance d; rotating it at another
frequency w' leaves exp(i (w - w') d) to be replaced. The mean square error of the score is about
energy_n x (1 - c), c the mean cosine of the frequency that is left over the attention's distances. So a slot
of the list serves any component of any nearby frequency, and layers that need other frequencies do not go
without. The native format holds one list for all layers.

Legend: N components of a layer, F source frequencies (candidates of the list), S slots, Y layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.convert.mla.rotation import Components
from reattend.convert.mla.statistics import mean_phase


@dataclass(frozen=True)
class RopePart:
    """Components of a layer; those that keep RoPE, the frequency index each rotates at, and E[exp(i w_f d)]."""

    components: Components
    kept_S: Tensor
    pair_S: Tensor
    phase_F: Tensor


def leading(components: Components, phase_F: Tensor) -> RopePart:
    """Keep the first component of every frequency, as published (S = F)."""
    kept_S = torch.arange(0, len(components.energy_N), components.key_NGF.shape[1])
    return RopePart(components, kept_S, components.frequency_N[kept_S], phase_F)


def strongest(components: Components, phase_F: Tensor, count: int) -> RopePart:
    """Keep the `count` components that cost most to drop, at their own frequencies, ascending by index."""
    kept_S = drop_cost(components, phase_F).topk(count).indices.sort().values
    return RopePart(components, kept_S, components.frequency_N[kept_S], phase_F)


def drop_cost(components: Components, phase_F: Tensor) -> Tensor:
    """Return energy x (1 - mean cosine) per component (N,)."""
    return components.energy_N * (1 - phase_F.real[components.frequency_N])


def slot_gain(components: Components, frequency_F: Tensor, distance_T: Tensor) -> Tensor:
    """Return (N, F): by how much a slot at frequency f lowers the cost of component n, at least 0."""
    frequency_F = frequency_F.double()
    left_FF = mean_phase((frequency_F[:, None] - frequency_F).flatten(), distance_T).real.view(len(frequency_F), -1)
    kept_NF = components.energy_N[:, None] * (1 - left_FF)[components.frequency_N]
    cost_N = drop_cost(components, mean_phase(frequency_F, distance_T))
    return (cost_N[:, None] - kept_NF).clamp(min=0)


def assign_slots(gain_YNS: Tensor) -> tuple[Tensor, Tensor]:
    """Give each slot one component, the largest gains first; returns the gain per layer (Y,) and (Y, S)."""
    gain = gain_YNS.clone()
    layers, count, slots = gain.shape
    if slots > count:
        raise ValueError(f"{slots} pairs can't keep RoPE, the source has {count}")
    row_Y, total_Y = torch.arange(layers), torch.zeros(layers, dtype=gain.dtype)
    chosen_YS = torch.zeros(layers, slots, dtype=torch.long)
    for _ in range(slots):
        best_Y, index_Y = gain.flatten(1).max(1)
        component_Y, slot_Y = index_Y // slots, index_Y % slots
        total_Y += best_Y
        chosen_YS[row_Y, slot_Y] = component_Y
        gain[row_Y, component_Y] = -torch.inf
        gain[row_Y, :, slot_Y] = -torch.inf
    return total_Y, chosen_YS


def common_list(gain_YNF: Tensor, cost_Y: Tensor, slots: int, *, power: float = 1.0, sweeps: int = 1) -> Tensor:
    """Return `slots` frequency indices (ascending, with repeats) that serve all layers.

    Minimises the sum over layers of (cost not recovered)^power: greedily, then by exchanging single slots.
    Costs are mean square errors of scores in nats^2, so a layer weighs by what it loses; a power above 1 looks
    harder at the worst layers. `cost_Y` is the cost of dropping RoPE altogether.
    """
    chosen = _grow(gain_YNF, cost_Y, slots, power)
    best = _objective(gain_YNF, cost_Y, chosen, power)
    for _ in range(sweeps):
        before = best
        for slot in range(slots):
            for f in range(gain_YNF.shape[2]):
                tried = [*chosen[:slot], f, *chosen[slot + 1 :]]
                value = _objective(gain_YNF, cost_Y, tried, power)
                if value < best:
                    best, chosen = value, tried
        if best == before:
            break
    return torch.tensor(sorted(chosen))


def _grow(gain_YNF: Tensor, cost_Y: Tensor, slots: int, power: float) -> list[int]:
    free = torch.ones_like(gain_YNF[..., 0])
    left_Y, row_Y, chosen = cost_Y.clone(), torch.arange(len(cost_Y)), []
    for _ in range(slots):
        saved_YF, component_YF = (gain_YNF * free[..., None]).max(1)
        f = int((left_Y[:, None] - saved_YF).clamp(min=0).pow(power).sum(0).argmin())
        chosen.append(f)
        left_Y -= saved_YF[:, f]
        free[row_Y, component_YF[:, f]] = 0
    return chosen


def _objective(gain_YNF: Tensor, cost_Y: Tensor, chosen: list[int], power: float) -> float:
    saved_Y, _ = assign_slots(gain_YNF[..., chosen])
    return float((cost_Y - saved_Y).clamp(min=0).pow(power).sum())
