"""Which heads of two layers look at the same tokens, and heads put into another layer's order at no cost.

Legend: H query heads, G key heads, P = H / G, D head dim, E hidden size, T tokens.
"""

import torch
from torch import Tensor


def head_similarity(weight_HTT: Tensor, leader_HTT: Tensor) -> Tensor:
    """Return cosines between the attention maps of heads, (2, H, H) fp64: rows a layer's heads, columns a leader's.

    The first table is of whole maps. Most heads rest on the first key, which makes any two alike: the second table
    leaves it out.
    """
    tables = []
    for first in (0, 1):
        ours, theirs = (maps[:, :, first:].flatten(1).double() for maps in (weight_HTT, leader_HTT))
        ours, theirs = (maps / maps.norm(dim=1, keepdim=True).clamp_min(1e-30) for maps in (ours, theirs))
        tables.append(ours @ theirs.T)
    return torch.stack(tables)


def best_map(similarity_HH: Tensor, groups: int) -> Tensor:
    """Return the leader's head (H,) that each head follows: the largest sum of similarities that can be folded.

    Heads with one key head stay together, as their values are one: groups are assigned to groups, each head to any
    head of its group's (`fold` adds up those that follow the same one).
    """
    per = len(similarity_HH) // groups
    blocks_GPGP = similarity_HH.view(groups, per, groups, per)
    best_GPG, head_GPG = blocks_GPGP.max(-1)
    chosen = assign(best_GPG.sum(1))
    return torch.cat([there * per + head_GPG[here, :, there] for here, there in enumerate(chosen)])


def assign(gain_NN: Tensor) -> list[int]:
    """Return the column of each row, all different, with the largest sum of gains (the Hungarian method, O(N^3))."""
    count = len(gain_NN)
    cost = [[0.0] * (count + 1), *([0.0, *(-value for value in row)] for row in gain_NN.tolist())]
    row_price, column_price = [0.0] * (count + 1), [0.0] * (count + 1)
    taken = [0] * (count + 1)  # the row of each column; 0: none
    for row in range(1, count + 1):
        before, taken[0], column = [0] * (count + 1), row, 0
        slack, seen = [float("inf")] * (count + 1), [False] * (count + 1)
        while taken[column]:
            seen[column], here = True, taken[column]
            for other in (c for c in range(1, count + 1) if not seen[c]):
                reduced = cost[here][other] - row_price[here] - column_price[other]
                if reduced < slack[other]:
                    slack[other], before[other] = reduced, column
            following = min((c for c in range(1, count + 1) if not seen[c]), key=slack.__getitem__)
            step = slack[following]
            for other in range(count + 1):
                if seen[other]:
                    row_price[taken[other]] += step
                    column_price[other] -= step
                else:
                    slack[other] -= step
            column = following
        while column:
            taken[column] = taken[before[column]]
            column = before[column]
    columns = {taken[column]: column - 1 for column in range(1, count + 1)}
    return [columns[row] for row in range(1, count + 1)]


def fold(value_GDX: Tensor, output_EHD: Tensor, map_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of v_proj (or of its bias) and the columns of o_proj with heads in the leader's order.

    What a head found goes through the columns of the head that it follows; those of heads that follow one are added
    up, and heads that nobody follows get zeros. Exact, as heads of one group stay in one group.
    """
    groups, heads = len(value_GDX), output_EHD.shape[1]
    per = heads // groups
    group_G = map_H.view(groups, per)[:, 0] // per
    values = torch.empty_like(value_GDX)
    values[group_G] = value_GDX
    outputs = torch.zeros_like(output_EHD).index_add(1, map_H, output_EHD)
    return values, outputs
