"""Moments, rotation, selection and joint low rank, each against a direct computation."""

import math

import pytest
import torch
from test_mla_exact import plain_gqa, random_source

from reattend.calibration.fitting import output_error
from reattend.convert.mla.attention import compose
from reattend.convert.mla.closed_form import Choice, best_choice, convert_layer, position_free_form
from reattend.convert.mla.lowrank import Metric, flat_metric, joint_low_rank, output_metric
from reattend.convert.mla.rope import Rotary, default_frequencies
from reattend.convert.mla.rotation import rotate_heads
from reattend.convert.mla.selection import assign_slots, common_list, drop_cost, leading, slot_gain, strongest
from reattend.convert.mla.statistics import MomentAccumulator, TokenMoments, mean_phase, sum_by_distance

F64 = torch.float64


def moments_of(source, sequences):
    heads, groups = len(source.q_HDE), len(source.k_GDE)
    accumulator = MomentAccumulator(heads, groups, source.rotary, 40, source.scale)
    for x in sequences:
        accumulator.add(*(y[0] for y in source.project(x[None])))
    return accumulator.result()


@pytest.fixture(scope="module")
def layer():
    source = random_source(6, 3, 10, Rotary(default_frequencies(1e4, 10)), biased=True)
    x = torch.randn(4, 32, 12, dtype=F64) + 0.5
    return source, x, moments_of(source, x)


def rope_of(source, moments, count):
    width = len(source.k_GDE) * source.k_GDE.shape[1]
    parts = rotate_heads(moments.plain.mix(moments.attended, 0.5).second_ZZ[:width, :width], moments.query_HDD)
    return strongest(parts, mean_phase(source.rotary.frequency_F, moments.distance_T), count)


def test_moments_are_those_of_an_explicit_attention(layer):
    source, x, got = layer
    plain, attended, distance = (torch.zeros(s, dtype=F64) for s in ((60, 60), (60, 60), (40,)))
    for sequence in x:
        q, k, v = (y[0] for y in source.project(sequence[None]))
        z = torch.cat([k.flatten(1), v.flatten(1)], 1)
        plain += z.T @ z / 128
        angle = torch.arange(32, dtype=F64)[:, None] * source.rotary.frequency_F.double()
        turn = torch.polar(torch.ones_like(angle), angle)
        for h in range(6):
            qc, kc = (torch.complex(y[:, :5], y[:, 5:]) * turn for y in (q[:, h], k[:, h // 2]))
            for t in range(32):
                p = torch.softmax((qc[t].conj() * kc[: t + 1]).sum(1).real * source.scale, 0)
                attended += torch.einsum("t,ti,tj->ij", p, z[: t + 1], z[: t + 1]) / 6 / 128
                distance[: t + 1] += p.flip(0)
    torch.testing.assert_close(got.plain.second_ZZ, plain)
    torch.testing.assert_close(got.attended.second_ZZ, attended)
    torch.testing.assert_close(got.distance_T, distance / distance.sum())
    assert got.kv_shape == (3, 10)


def test_no_sequence_is_an_error():
    with pytest.raises(ValueError, match="no sequence"):
        MomentAccumulator(2, 1, Rotary(default_frequencies(1e4, 4)), 8, 0.5).result()


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_sums_by_distance(tokens):
    p = torch.rand(tokens, tokens, dtype=F64)
    torch.testing.assert_close(sum_by_distance(p), torch.stack([p.diagonal(-i).sum() for i in range(tokens)]))


def test_everything_kept_is_exact(layer):
    source, x, moments = layer
    rope = rope_of(source, moments, 15)
    ours = compose(source, convert_layer(moments, source.o_EHD, rope, 30, Choice()))
    torch.testing.assert_close(ours.attend(x[:1])[0], plain_gqa(source, x[0]), rtol=1e-9, atol=1e-9)


def test_error_falls_with_rank_and_with_rope(layer):
    source, x, moments = layer
    want = source.attend(x)

    def error(count, rank):
        maps = convert_layer(moments, source.o_EHD, rope_of(source, moments, count), rank, Choice())
        assert maps.key_HDL.shape == (6, 10, rank)
        return float(output_error(compose(source, maps).attend(x), want))

    by_rank = [error(15, rank) for rank in (3, 6, 9, 12)]  # values come from 12 inputs
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[-1] < 1e-18 < by_rank[-2]
    by_rope = [error(count, 60 - 2 * count) for count in (0, 5, 10, 15)]
    assert by_rope == sorted(by_rope, reverse=True)
    assert by_rope[0] > 100 * by_rope[-1]


def test_truncated_latents_against_a_direct_reference(layer):
    source, x, moments = layer
    rope = rope_of(source, moments, 4)
    maps = convert_layer(moments, source.o_EHD, rope, 13, Choice(phase_share=0.0))
    q, k, v = (y[0] for y in source.project(x[:1]))
    latent = torch.einsum("lgd,tgd->tl", maps.down_key_LGD, k) + torch.einsum("lgd,tgd->tl", maps.down_value_LGD, v)
    frequency = source.rotary.frequency_F[rope.pair_S].double()
    want = torch.zeros(32, 12, dtype=F64) + source.o_bias_E
    for h in range(6):
        rows_q, rows_k = (
            y.view(32, 4, 2)
            for y in (q[:, h] @ maps.rope_query_HRD[h].T, torch.einsum("rgd,tgd->tr", maps.rope_key_RGD, k))
        )
        for t in range(32):
            angle = (torch.arange(t + 1, dtype=F64) - t)[:, None] * frequency
            a, b = rows_k[: t + 1, :, 0], rows_k[: t + 1, :, 1]
            roped = rows_q[t, :, 0] * (a * angle.cos() - b * angle.sin()) + rows_q[t, :, 1] * (
                a * angle.sin() + b * angle.cos()
            )
            score = roped.sum(1) + latent[: t + 1] @ maps.key_HDL[h].T @ q[t, h]
            p = torch.softmax(score * source.scale, 0)
            want[t] += source.o_EHD[:, h] @ (maps.value_HDL[h] @ (p @ latent[: t + 1]) + maps.value_bias_HD[h])
    torch.testing.assert_close(compose(source, maps).attend(x[:1])[0], want, rtol=1e-9, atol=1e-9)


def test_centred_low_rank_is_optimal_in_its_metric():
    torch.manual_seed(0)
    z = torch.randn(200, 12, dtype=F64) @ torch.randn(12, 12, dtype=F64) + 3
    moments = TokenMoments(z.T @ z / 200, z.mean(0))
    root, other = torch.randn(6, 6, dtype=F64), torch.randn(6, 6, dtype=F64)
    metric = Metric(root, torch.linalg.inv(root), other, torch.linalg.inv(other))
    full = torch.block_diag(root, other)
    for rank in (1, 5, 12):
        low = joint_low_rank(moments, metric, rank, value_weight=None)
        error = ((z - (z @ low.down_LZ.T @ low.up_ZL.T + low.shift_Z)) @ full.T).square().sum()
        best = torch.linalg.svdvals((z - z.mean(0)) @ full.T)[rank:].square().sum()
        assert float(error) == pytest.approx(float(best), abs=1e-8)
    plain = joint_low_rank(moments, metric, 12, centred=False)
    assert not plain.shift_Z.any()
    torch.testing.assert_close(plain.up_ZL @ plain.down_LZ, torch.eye(12, dtype=F64), rtol=1e-8, atol=1e-8)


def test_output_metric_measures_scores_and_outputs(layer):
    source, x, moments = layer
    free = position_free_form(rope_of(source, moments, 3), 6, 0.3)
    metric = output_metric(free, moments.query_HDD, source.o_EHD, 3)
    q = torch.cat([source.project(sequence[None])[0][0] for sequence in x])
    change = torch.randn(30, dtype=F64)
    score = torch.einsum("thd,hdk,k->th", q, free, change)
    torch.testing.assert_close((metric.key_KK @ change).square().sum(), score.square().sum(1).mean())
    by_head = change.view(3, 10).repeat_interleave(2, 0)
    out = torch.einsum("ehd,hd->he", source.o_EHD, by_head)
    separate = torch.stack([out.view(3, 2, -1)[g].square().sum() for g in range(3)]).sum()
    torch.testing.assert_close((metric.value_KK @ change).square().sum(), separate)


def test_published_balance_makes_norms_equal():
    torch.manual_seed(0)
    z = torch.randn(100, 12, dtype=F64) * torch.tensor([7.0] * 6 + [0.2] * 6)
    kept = torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 1], dtype=F64))
    metric = flat_metric(TokenMoments(z.T @ z, z.mean(0)), kept)
    keys = (z[:, :6] @ metric.key_KK.T)[:, 2:]
    assert float(keys.norm(dim=0).mean()) == pytest.approx(float(z[:, 6:].norm(dim=0).mean()))


def test_phase_share_one_is_the_mean_rotation(layer):
    source, _, moments = layer
    rope = rope_of(source, moments, 0)
    q, k = torch.randn(6, 10, dtype=F64), torch.randn(3, 10, dtype=F64)
    lag = torch.arange(40, dtype=F64)
    weight = (moments.distance_T + (40 - lag) / (40 - lag).sum()) / 2
    for share in (0.0, 1.0):
        form = position_free_form(rope, 6, share)
        for h in range(6):
            turn = (
                torch.polar(torch.ones(5, 40, dtype=F64), -source.rotary.frequency_F.double()[:, None] * lag)
                @ weight.to(torch.complex128)
                if share
                else 1.0
            )
            want = (
                (torch.complex(q[h, :5], q[h, 5:]).conj() * torch.complex(k[h // 2, :5], k[h // 2, 5:]) * turn)
                .sum()
                .real
            )
            torch.testing.assert_close(q[h] @ form[h] @ k.flatten(), want)


def test_slots_at_own_frequencies_recover_the_cost(layer):
    source, _, moments = layer
    rope = rope_of(source, moments, 6)
    gain = slot_gain(rope.components, source.rotary.frequency_F, moments.distance_T)
    own = gain[torch.arange(15), rope.components.frequency_N]
    torch.testing.assert_close(own, drop_cost(rope.components, rope.phase_F))
    assert (gain <= own[:, None] + 1e-12).all()
    assert torch.equal(rope.kept_S, own.topk(6).indices.sort().values)
    assert leading(rope.components, rope.phase_F).pair_S.tolist() == [0, 1, 2, 3, 4]


def test_assignment_uses_each_component_once():
    gain = torch.tensor([[[5.0, 4.0], [3.0, 1.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]]], dtype=F64)
    total, chosen = assign_slots(gain)
    assert chosen.tolist() == [[0, 1], [0, 1]]
    assert total.tolist() == [6.0, 5.0]
    with pytest.raises(ValueError, match="the source has 3"):
        assign_slots(gain.repeat(1, 1, 2))


def test_common_list_looks_at_the_worst_layer():
    # Nine layers want frequency 0 a little, one wants frequency 1 badly.
    gain = torch.zeros(10, 2, 2, dtype=F64)
    gain[:9, 0, 0] = 1.0
    gain[9, 1, 1] = 8.0
    cost = gain.sum((1, 2))
    assert common_list(gain, cost, 1).tolist() == [0]
    assert common_list(gain, cost, 1, power=2.0).tolist() == [1]
    assert common_list(gain, cost, 2).tolist() == [0, 1]


def test_best_choice_finds_what_lowers_the_error():
    def error(choice):
        return (choice.phase_share - 0.6) ** 2 + abs(math.log(choice.value_weight)) + choice.attended_share

    choice, lowest = best_choice(error)
    assert choice == Choice(attended_share=0.5, value_weight=1.0, phase_share=0.6)
    assert lowest == pytest.approx(0.5)
