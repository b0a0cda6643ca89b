from __future__ import annotations

import torch

from vqkv.states import CHUNK_TOKENS, States


def numbered(tokens: int) -> torch.Tensor:
    return torch.arange(tokens, dtype=torch.float64).view(-1, 1, 1).expand(-1, 2, 3)


def test_chunks_start_afresh_and_are_fp32() -> None:
    states = States.of(numbered(CHUNK_TOKENS + 5))
    for _ in range(2):
        chunks = list(states.chunks())
        assert [len(chunk) for chunk in chunks] == [CHUNK_TOKENS, 5]
        assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert torch.equal(torch.cat(chunks), numbered(CHUNK_TOKENS + 5).float())


def test_map_applies_to_each_chunk() -> None:
    states = States.of(numbered(4)).map(lambda x: 2 * x).map(lambda x: x + 1)
    assert states.tokens == 4
    assert torch.cat(list(states.chunks()))[:, 0, 0].tolist() == [1, 3, 5, 7]


def test_samples_are_in_order_without_repeats_and_do_not_depend_on_chunks() -> None:
    x = numbered(100)
    whole = States.of(x).sample(30, seed=1)[:, 0, 0]
    parts = States(100, lambda: iter(x.float().split([1, 49, 50]))).sample(30, seed=1)[:, 0, 0]
    assert torch.equal(whole, parts)
    assert len(whole.unique()) == 30 and torch.equal(whole, whole.sort().values)
    assert not torch.equal(whole, States.of(x).sample(30, seed=2)[:, 0, 0])


def test_a_sample_is_at_most_everything() -> None:
    assert torch.equal(States.of(numbered(7)).sample(30, seed=0), numbered(7).float())
