"""Attention from tables of products, against decoding the keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkv.kernels import recording, select, using
from vqkv.kernels.attend import Block, Reading, attend
from vqkv.kernels.attend.commuted import from_table, pays, product_table
from vqkv.kernels.attend.commuting import CommutingKeys, as_complex, summed
from vqkv.kernels.attend.naive import products
from vqkv.kernels.pack import pack
from vqkv.layouts import Layout, Segment

DIM = 16


def layout(heads: int = 2, stages: int = 3, size: int = 8, dim: int = DIM) -> Layout:
    bits = 2 * (size.bit_length() - 1)
    segment = Segment(heads, 1, dim, stages, bits, heads)
    return Layout(heads, dim, (segment,), rope="pre", pairs_whole=True, commuting=True)


def coded_keys(seed: int, tokens: int = 40, first: int = 0, scales: int = 2) -> CommutingKeys:
    """Random keys of 2 rows and 2 heads at positions `first`, `first + 1`, ..."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(64, (2, 2, tokens, 3), generator=generator, dtype=torch.int32)
    angles = 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    angles = (first + torch.arange(tokens, dtype=torch.float64)).outer(angles)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return CommutingKeys(
        packed=pack(codes, 6, layout()),
        units=torch.randn(2, 3, 8, DIM, generator=generator).half(),
        scale=torch.rand(2, scales, tokens, generator=generator),
        turns=turns.expand(2, -1, -1),
        order=torch.randperm(DIM, generator=generator),
    )


def test_decoding_adds_up_units_scales_and_turns_them() -> None:
    keys = coded_keys(0, first=5)
    first, second = keys.indices().split(3, -1)
    units = as_complex(keys.units.float())
    row, head, token = 1, 0, 7
    key = sum(
        units[head, s, int(first[row, head, token, s])]
        + 1j * units[head, s, int(second[row, head, token, s])]
        for s in range(3)
    )
    assert isinstance(key, torch.Tensor)
    key = key * keys.turns[row, token] * keys.scale[row, head, token]
    expected = torch.empty(DIM)
    expected[keys.order] = torch.view_as_real(key).flatten()
    torch.testing.assert_close(keys.decoded()[row, head, token], expected)


def test_tables_of_a_batch_are_looked_up_row_by_row() -> None:
    tables, indices = torch.randn(2, 3, 4, 8, DIM), torch.randint(8, (2, 3, 5, 4))
    found = summed(tables, indices)
    expected = sum(tables[1, 2, s, indices[1, 2, 3, s]] for s in range(4))
    torch.testing.assert_close(found[1, 2, 3], expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 100), st.sampled_from([1, 2]))
def test_scores_from_tables_are_scores_of_decoded_keys(first: int, seed: int, scales: int) -> None:
    """Of queries that are turned already, at any position of the keys."""
    keys = coded_keys(seed, first=first, scales=scales)
    q = torch.randn(2, 2, 3, DIM, generator=torch.Generator().manual_seed(seed))
    scores = from_table(product_table(q, keys), keys)
    torch.testing.assert_close(scores, products(q, keys), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_the_naive_kernel_of_the_same_blocks(rows: int) -> None:
    """Coded blocks, one of exact tokens among them; queries see parts, and one sees none."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 2, rows, DIM, generator=generator)
    one = coded_keys(2)
    keys: list[torch.Tensor | CommutingKeys] = [
        one,
        torch.randn(2, 2, 9, DIM, generator=generator),
        coded_keys(3)._replace(units=one.units, order=one.order),
    ]
    blocks = []
    for part in keys:
        count = part.shape[2] if isinstance(part, torch.Tensor) else part.packed.shape[2]
        visible = torch.rand(2, 1, rows, count, generator=generator) < 0.6
        visible[1, :, 0] = False
        blocks.append(Block(part, torch.randn(2, 2, count, DIM, generator=generator), visible))
    reading = Reading(layout(), 1)
    with recording() as ran:
        output = attend(query, blocks, 0.25, reading)
    assert [name for name in ran if name.startswith("attend")] == ["attend.commuted"]
    with using(attend="naive"):
        expected = attend(query, blocks, 0.25, reading)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert bool((output[1, :, 0] == 0).all())


def test_other_layouts_and_shared_heads_are_refused_with_reasons() -> None:
    assert select("attend", Reading(layout(), 1), "cpu").kernel.name == "commuted"
    shared = select("attend", Reading(layout(), 3), "cpu")
    assert shared.kernel.name == "naive"
    assert "3 query heads read a KV head" in shared.refused["attend.commuted"]
    other = select("attend", Reading(replace(layout(), commuting=False), 1), "cpu")
    assert other.refused["attend.commuted"] == "keys are not sums of units that commute with RoPE"


@pytest.mark.parametrize(("stages", "least"), [(10, 481), (21, 1009)])
def test_a_table_pays_for_one_row_of_long_texts(stages: int, least: int) -> None:
    wide = layout(stages=stages, size=64, dim=128)
    assert pays(wide, 1, least)
    assert not pays(wide, 1, least - 1)
    assert not pays(wide, 2, 10**6)
