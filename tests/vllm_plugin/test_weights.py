# SPDX-License-Identifier: Apache-2.0
"""What a server's linear makes of the tensors of a checkpoint, against the dense product."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from optq.checkpoint import PackedWeight, pack
from optq.errors import CheckpointError
from optq.scheme import QuantizedWeight, trivial_groups
from optq.vllm.weights import ArrivingWeight, Run, runs_of

IN = 192
CPU = torch.device("cpu")


def packed_weight(outputs=64, bits=4, group_size=32, symmetric=True, desc_act=False, seed=0, zero_format="gptq"):
    generator = torch.Generator().manual_seed(seed)
    width = IN if group_size == -1 else group_size
    groups = -(-IN // width)
    order = trivial_groups(IN, width)
    if desc_act:
        order = order[torch.randperm(IN, generator=generator)]
    zeros = torch.full((outputs, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(1, 2**bits, (outputs, groups), generator=generator)
    quantized = QuantizedWeight(
        codes=torch.randint(2**bits, (outputs, IN), generator=generator).to(torch.uint8),
        scales=(0.5 + torch.rand(outputs, groups, generator=generator)).half().float() / 2**bits,
        zeros=zeros.to(torch.int16),
        group_of_column=order,
        bits=bits,
    )
    return pack(quantized, zero_format)


def whole(count):
    return torch.arange(count)


def arriving(outputs, inputs=slice(0, IN), dtype=torch.float32, **changes):
    settings = {"zero_format": "gptq", "device": CPU, **changes}
    return ArrivingWeight("a.linear", outputs=outputs, all_inputs=IN, inputs=inputs, dtype=dtype, **settings)


def give(weight, packed: PackedWeight, which=None, origins=whole):
    for name, tensor in packed.tensors().items():
        weight.take(name, tensor, which, origins)


def dense(packed):
    return packed.columns(0, packed.out_features)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "desc_act"),
    [(2, 32, True, False), (3, 64, False, False), (4, 128, False, True), (8, -1, True, False), (4, 80, True, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_linear_of_any_scheme_gives_the_dense_product(bits, group_size, symmetric, desc_act, dtype):
    packed = packed_weight(64, bits, group_size, symmetric, desc_act)
    weight = arriving(64, dtype=dtype)
    give(weight, packed)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = weight.product()(x), x.float() @ dense(packed)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2", "gptq:gptqmodel"])
def test_zeros_are_those_of_the_writer(zero_format):
    packed = packed_weight(64, 4, 32, symmetric=False, zero_format=zero_format)
    weight = arriving(64, zero_format=zero_format)
    give(weight, packed)
    x = torch.eye(IN)
    torch.testing.assert_close(weight.product()(x), dense(packed), rtol=0, atol=1e-5)


def origins_in(at, count, outputs):
    """As a server places a linear of `count` outputs among its own."""

    def origins(_):
        found = torch.full((outputs,), -1)
        found[at : at + count] = torch.arange(count)
        return found

    return origins


def test_fused_linears_may_differ_in_everything_and_some_may_be_dense():
    q, k = packed_weight(128, bits=4), packed_weight(64, bits=3, desc_act=True, seed=1)
    v, other = packed_weight(32, bits=8, group_size=-1, seed=2), torch.randn(48, IN)
    weight = arriving(272)
    give(weight, q, "q", origins_in(0, 128, 272))
    give(weight, v, "v", origins_in(192, 32, 272))
    weight.take("weight", other, "z", origins_in(224, 48, 272))
    give(weight, k, "k", origins_in(128, 64, 272))  # tensors come in any order
    x = torch.randn(5, IN)
    expected = torch.cat([x @ dense(part) for part in (q, k, v)] + [x @ other.T], -1)
    torch.testing.assert_close(weight.product()(x), expected, rtol=0, atol=1e-4)


def test_fused_linears_of_one_scheme_are_one_product():
    parts = [packed_weight(64, seed=seed) for seed in range(3)]
    weight = arriving(192, dtype=torch.bfloat16)
    for number, packed in enumerate(parts):
        give(weight, packed, number, origins_in(64 * number, 64, 192))
    product_ = weight.product()
    assert len(product_.parts) == 1
    x = torch.randn(2, IN).bfloat16()
    expected = torch.cat([x.float() @ dense(packed) for packed in parts], -1)
    torch.testing.assert_close(product_(x).float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("bits", "group_size", "desc_act"), [(3, 64, False), (4, 96, False), (8, 32, True), (2, -1, True)]
)
def test_processes_that_share_inputs_sum_to_the_whole(bits, group_size, desc_act):
    packed = packed_weight(64, bits, group_size, symmetric=False, desc_act=desc_act)
    x = torch.randn(4, IN)
    total = torch.zeros(4, 64)
    for rank in range(2):
        own = slice(rank * IN // 2, (rank + 1) * IN // 2)
        weight = arriving(64, inputs=own)
        give(weight, packed)
        total += weight.product()(x[:, own])
    torch.testing.assert_close(total, x @ dense(packed), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_processes_that_share_outputs_have_a_part_of_each_fused_linear(bits):
    q, k = packed_weight(128, bits, symmetric=False), packed_weight(64, bits, symmetric=False, seed=1)
    x = torch.randn(4, IN)
    for rank in range(2):
        weight = arriving(96)

        def origins_of(at, count, rank=rank):
            def origins(_):
                found = torch.full((96,), -1)
                found[at : at + count] = torch.arange(rank * count, (rank + 1) * count)
                return found

            return origins

        give(weight, q, "q", origins_of(0, 64))
        give(weight, k, "k", origins_of(64, 32))
        expected = [x @ dense(part)[:, rank * n : (rank + 1) * n] for part, n in ((q, 64), (k, 32))]
        torch.testing.assert_close(weight.product()(x), torch.cat(expected, -1), rtol=0, atol=1e-4)


def test_a_linear_that_is_fused_on_disk_is_cut_at_each_of_its_parts():
    fused = packed_weight(192, 4, symmetric=False)  # q of 128 and k of 64, over two processes
    places = torch.cat([torch.arange(64, 128), torch.arange(160, 192)])
    weight = arriving(96)
    give(weight, fused, None, lambda _: places)
    x = torch.randn(4, IN)
    torch.testing.assert_close(weight.product()(x), (x @ dense(fused))[:, places], rtol=0, atol=1e-4)


def test_outputs_that_a_vocabulary_is_padded_with_are_zeros():
    packed = packed_weight(64)
    weight = arriving(80, padded=True)
    give(weight, packed, None, origins_in(0, 64, 80))
    found = weight.product()(torch.randn(2, IN))
    assert found.shape == (2, 80)
    assert bool((found[:, 64:] == 0).all())


def test_a_checkpoint_without_g_idx_has_groups_of_neighbours():
    packed, weight = packed_weight(64, group_size=64), arriving(64)
    for name in ("qweight", "qzeros", "scales"):
        weight.take(name, getattr(packed, name), None, whole)
    torch.testing.assert_close(weight.product()(torch.eye(IN)), dense(packed), rtol=0, atol=1e-5)


def test_without_g_idx_the_config_says_how_wide_uneven_groups_are():
    packed, weight = packed_weight(64, group_size=80), arriving(64, group_sizes=(80, 32))
    for name in ("qweight", "qzeros", "scales"):
        weight.take(name, getattr(packed, name), None, whole)
    torch.testing.assert_close(weight.product()(torch.eye(IN)), dense(packed), rtol=0, atol=1e-5)


def test_a_part_of_a_vocabulary_that_is_all_padding_is_zeros():
    weight = arriving(64, padded=True)
    give(weight, packed_weight(64), None, lambda count: torch.full((64,), -1))
    assert bool((weight.product()(torch.randn(2, IN)) == 0).all())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_graphs_hold_one_call_per_product(size):
    packed = packed_weight(64)
    weight = arriving(64, dtype=torch.bfloat16)
    give(weight, packed)
    product_ = weight.product()
    x = torch.randn(size, IN).bfloat16()
    compiled = torch.compile(product_, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), product_(x))


class TestRefused:
    def test_a_part_is_missing(self):
        weight = arriving(128)
        give(weight, packed_weight(64), "q", origins_in(0, 64, 128))
        with pytest.raises(CheckpointError, match=r"a\.linear has 128 outputs.*0 … 64.*not whole"):
            weight.product()

    def test_nothing_came(self):
        with pytest.raises(CheckpointError, match="none"):
            arriving(64).product()

    @pytest.mark.parametrize("name", ["qzeros", "scales"])
    def test_a_tensor_is_missing(self, name):
        packed, weight = packed_weight(64), arriving(64)
        for part, tensor in packed.tensors().items():
            if part != name:
                weight.take(part, tensor, "q", whole)
        with pytest.raises(CheckpointError, match=rf"a\.linear \(q\).*not {name}"):
            weight.product()

    def test_the_words_are_missing(self):
        packed, weight = packed_weight(64), arriving(64)
        weight.take("scales", packed.scales, None, whole)
        with pytest.raises(CheckpointError, match="no qweight"):
            weight.product()

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("qweight", lambda t: t[:-1], "qweight has 23 rows of words, which does not fit 192 inputs"),
            ("qweight", lambda t: t[: len(t) // 2], "fit no GPTQ layout"),
            ("qweight", lambda t: t[0], r"of shape \(64,\).*2 dimensions"),
            ("qweight", lambda t: t.short(), "qweight is torch.int16"),
            ("qweight", lambda t: t.float(), "qweight is torch.float32"),
            ("qzeros", lambda t: t.float(), "qzeros is torch.float32"),
            ("qzeros", lambda t: t[:, ::2], "fit no GPTQ layout"),
            ("scales", lambda t: t.int(), "scales is torch.int32"),
            ("scales", lambda t: t.to(torch.float8_e4m3fn), "scales is torch.float8_e4m3fn"),
            ("scales", lambda t: t[:, :0], "scales is"),
            ("scales", lambda t: t[0, 0], "scales is"),
            ("g_idx", lambda t: t.float(), "g_idx is torch.float32"),
            ("g_idx", lambda t: t.bool(), "g_idx is torch.bool"),
            ("scales", lambda t: t[:, :-8], "fit no GPTQ layout"),
            ("scales", lambda t: t[:-1], "fit no GPTQ layout"),
            ("scales", lambda t: t * torch.inf, "scales: that of group 0 and output 0 is inf"),
            ("g_idx", lambda t: t[:-1], "fit no GPTQ layout"),
            ("g_idx", lambda t: t + 1, "column 160 is of group 6, and there are 6"),
            ("g_idx", lambda t: t - 1, "column 0 is of group -1"),
        ],
    )
    def test_a_damaged_tensor(self, name, change, message):
        packed, weight = packed_weight(64), arriving(64)
        with pytest.raises(CheckpointError, match=message):
            for part, tensor in packed.tensors().items():
                weight.take(part, change(tensor) if part == name else tensor, None, whole)
            weight.product()

    @pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t[:, :-1], lambda t: t[0]])
    def test_a_dense_weight_of_another_kind(self, change):
        with pytest.raises(CheckpointError, match=r"a\.linear \(q\): weight"):
            arriving(64).take("weight", change(torch.randn(64, IN)), "q", whole)

    def test_uneven_groups_without_g_idx_of_which_nothing_is_known(self):
        packed, weight = packed_weight(64, group_size=50), arriving(64, group_sizes=(32,))  # four of 192: 48 divides
        packed = replace(packed, scales=packed.scales.repeat(2, 1)[:5], qzeros=packed.qzeros.repeat(2, 1)[:5])
        for name in ("qweight", "qzeros", "scales"):
            weight.take(name, getattr(packed, name), None, whole)
        with pytest.raises(CheckpointError, match="g_idx is missing, and 5 groups of 192"):
            weight.product()

    def test_rows_and_zeros_of_different_bits(self):
        packed, weight = packed_weight(64, bits=4), arriving(64)
        for name in ("qweight", "qzeros", "scales"):
            tensor = getattr(packed, name)
            weight.take(name, tensor[: len(tensor) // 2] if name == "qweight" else tensor, None, whole)
        with pytest.raises(CheckpointError, match="by its rows qweight has 2 bits, by qzeros and scales 4"):
            weight.product()

    def test_processes_that_would_cut_words(self):
        packed = packed_weight(64, bits=3)
        weight = arriving(64, inputs=slice(0, 48))
        with pytest.raises(CheckpointError, match=r"a\.linear: inputs 0 to 48 of 3 bits.*fewer processes"):
            give(weight, packed)


@pytest.mark.parametrize(
    ("origins", "runs"),
    [
        ([0, 1, 2], [(0, 0, 3)]),
        ([-1, 4, 5, -1], [(1, 4, 6)]),
        ([4, 5, 0, 1], [(0, 4, 6), (2, 0, 2)]),
        ([-1, -1], []),
        ([3, -1, 4], [(0, 3, 4), (2, 4, 5)]),
    ],
)
def test_runs(origins, runs):
    expected = [Run(at=at, outputs=slice(start, stop)) for at, start, stop in runs]
    assert list(runs_of(torch.tensor(origins))) == expected


def test_runs_put_every_output_where_it_belongs():
    for places in product([-1, 0, 1, 2], repeat=4):
        found = torch.full((4,), -1)
        for run in runs_of(torch.tensor(places)):
            count = run.outputs.stop - run.outputs.start
            found[run.at : run.at + count] = torch.arange(run.outputs.start, run.outputs.stop)
        assert found.tolist() == list(places)
