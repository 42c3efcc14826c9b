import itertools

import pytest
import torch

from reattend.convert.attention_sharing.formulas import assign, best_map, fold, head_similarity


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_assignment_is_the_best_of_all(count):
    gain = torch.randn(count, count)
    best = max(itertools.permutations(range(count)), key=lambda p: sum(float(gain[i, j]) for i, j in enumerate(p)))
    assert assign(gain) == list(best)


def test_assignment_of_many():
    order = torch.randperm(40)
    gain = torch.rand(40, 40)
    gain[torch.arange(40), order] += 1
    assert assign(gain) == order.tolist()


def test_similarity_by_hand():
    """Two heads that rest on the first key alike and look elsewhere otherwise: 0.81 + 0.01 x 0 over 0.82."""
    ours = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]]])
    theirs = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.0, 0.1]]])
    whole, rest = head_similarity(ours, theirs)
    assert float(whole[0, 0]) == pytest.approx(1.81 / 1.82)
    assert float(rest[0, 0]) == 0.0
    assert float(head_similarity(ours, ours)[1, 0, 0]) == pytest.approx(1.0)


def test_the_map_keeps_groups_together():
    """Heads 0 and 1 share values. Head 0 is most like leader's 3, head 1 like leader's 0: 3 and 2 add up to more."""
    similarity = torch.tensor([
        [0.5, 0.1, 0.2, 0.9],
        [0.8, 0.1, 0.7, 0.6],
        [0.6, 0.5, 0.1, 0.3],
        [0.6, 0.4, 0.2, 0.1],
    ])  # fmt: skip
    assert best_map(similarity, 2).tolist() == [3, 2, 0, 0]
    assert best_map(similarity, 1).tolist() == [3, 0, 0, 0]
    assert best_map(similarity, 4).tolist() == assign(similarity)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_folding_is_exact(groups):
    heads, width, hidden, tokens = 4, 3, 6, 7
    per = heads // groups
    v, o = torch.randn(groups, width, hidden).double(), torch.randn(hidden, heads, width).double()
    x, weights = torch.randn(tokens, hidden).double(), torch.randn(heads, tokens, tokens).double().softmax(-1)
    # a map as `best_map` gives it: groups to groups, heads to any head there
    chosen = torch.randperm(groups)
    map_H = torch.cat([chosen[g] * per + torch.randint(per, (per,)) for g in range(groups)])
    want = sum(weights[map_H[h]] @ (x @ v[h // per].T) @ o[:, h].T for h in range(heads))
    v_folded, o_folded = fold(v, o, map_H)
    got = sum(weights[h] @ (x @ v_folded[h // per].T) @ o_folded[:, h].T for h in range(heads))
    assert torch.allclose(got, want, rtol=0, atol=1e-13)
