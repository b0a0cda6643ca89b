from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vqkv.calibration import Spool
from vqkv.errors import ArtefactError, StateError
from vqkv.states import CHUNK_TOKENS, States


def random_states(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, tokens, 4, generator=generator).to(dtype)


def read(states: States) -> torch.Tensor:
    return torch.cat(list(states.chunks()))


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """`[1, H, T, D]` as `[T, H, D]`."""
    return x[0].transpose(0, 1)


def fill(spool: Spool, windows: list[torch.Tensor]) -> None:
    for x in windows:
        spool.append(0, "keys", x)
        spool.append(0, "values", -x)
        spool.finish_window()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_come_back_without_the_sinks_of_each_window(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    windows = [random_states(9, 1, dtype), random_states(7, 2, dtype)]
    spool = Spool(tmp_path, sinks=3)
    fill(spool, windows)
    expected = torch.cat([tokens_of(x)[3:] for x in windows]).float()
    for stream, sign in (("keys", 1), ("values", -1)):
        states = spool.states(0, stream)  # type: ignore[arg-type]
        assert states.tokens == 10
        assert read(states).dtype == torch.float32
        assert torch.equal(read(states), sign * expected)
    size = torch.empty(0, dtype=dtype).itemsize
    assert (tmp_path / "0.keys.raw").stat().st_size == 10 * 2 * 4 * size


def test_rows_of_a_batch_follow_each_other(tmp_path: Path) -> None:
    x = torch.cat([random_states(5, 1), random_states(5, 2)])
    spool = Spool(tmp_path, sinks=1)
    spool.append(0, "keys", x)
    spool.finish_window()
    expected = torch.cat([tokens_of(x[:1])[1:], tokens_of(x[1:])[1:]])
    assert torch.equal(read(spool.states(0, "keys")), expected)


def test_chunks_are_bounded_and_start_afresh(tmp_path: Path) -> None:
    x = random_states(CHUNK_TOKENS + 100)
    spool = Spool(tmp_path, sinks=0)
    fill(spool, [x])
    states = spool.states(0, "keys")
    assert [len(chunk) for chunk in states.chunks()] == [CHUNK_TOKENS, 100]
    assert torch.equal(read(states), read(states))
    assert torch.equal(states.sample(50, 3), States.of(tokens_of(x)).sample(50, 3))


def test_a_window_shorter_than_the_sinks_adds_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, sinks=4)
    fill(spool, [random_states(3), random_states(6, 1)])
    assert (spool.windows, spool.tokens) == (2, 2)
    assert torch.equal(read(spool.states(0, "keys")), tokens_of(random_states(6, 1))[4:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    spool = Spool(tmp_path, sinks=1)
    fill(spool, [random_states(5)])
    x = random_states(5, 1)
    x[0, 1, 3, 2] = bad
    with pytest.raises(StateError, match=rf"values of layer 7 in window 1 .* {bad} at \[2, 1, 2\]"):
        spool.append(7, "values", x)


def test_a_stream_keeps_its_form(tmp_path: Path) -> None:
    spool = Spool(tmp_path, sinks=0)
    spool.append(0, "keys", random_states(2))
    with pytest.raises(StateError, match=r"0\.keys: the spool holds .*float32.*float16"):
        spool.append(0, "keys", random_states(2).half())


def test_a_stream_that_was_never_spooled(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="keys of layer 3: there are no tokens"):
        Spool(tmp_path, sinks=0).states(3, "keys")


def test_reopening_cuts_off_the_unfinished_window(tmp_path: Path) -> None:
    windows = [random_states(6, seed) for seed in range(3)]
    spool = Spool(tmp_path, sinks=1)
    fill(spool, windows[:2])
    spool.append(0, "keys", windows[2])
    with (tmp_path / "0.values.raw").open("ab") as file:
        file.write(b"half a tok")
    (tmp_path / "9.keys.raw").write_bytes(b"of an unfinished first window")
    again = Spool(tmp_path, sinks=1)
    assert (again.windows, again.tokens) == (2, 10)
    assert not (tmp_path / "9.keys.raw").exists()
    fill(again, windows[2:])
    fill(whole := Spool(tmp_path / "whole", sinks=1), windows)
    for stream in ("keys", "values"):
        assert torch.equal(read(again.states(0, stream)), read(whole.states(0, stream)))


def test_reopening_before_any_window_was_finished(tmp_path: Path) -> None:
    Spool(tmp_path, sinks=0).append(0, "keys", random_states(4))
    spool = Spool(tmp_path, sinks=0)
    assert spool.windows == 0
    fill(spool, [random_states(4)])
    assert torch.equal(read(spool.states(0, "keys")), tokens_of(random_states(4)))


def test_damage_is_noticed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, sinks=0)
    fill(spool, [random_states(8)])
    path = tmp_path / "0.keys.raw"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match=r"0\.keys\.raw: damaged, it ends too early"):
        read(spool.states(0, "keys"))
    with pytest.raises(ArtefactError, match=r"0\.keys\.raw: damaged, it has not the 256 bytes"):
        Spool(tmp_path, sinks=0)
    (tmp_path / "index.json").write_text(json.dumps({"windows": 1}))
    with pytest.raises(ArtefactError, match=r"index\.json: damaged"):
        Spool(tmp_path, sinks=0)
