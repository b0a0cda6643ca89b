from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import pytest
import torch

from vqkv import registry
from vqkv.errors import KernelError, RegistryError
from vqkv.kernels import KERNELS, Kernel, recording, select, using
from vqkv.kernels.encode import encode
from vqkv.kernels.select import _select, anywhere
from vqkv.layouts import Layout

LAYOUT = Layout.of_codebook(2, 1, 4, 3)
X, BOOKS = torch.zeros(5, 2, 3), torch.zeros(2, 1, 4, 3)

Add = Callable[[Kernel], Kernel]


@pytest.fixture
def add() -> Iterator[Add]:
    added: list[str] = []

    def register(kernel: Kernel) -> Kernel:
        name = f"{kernel.op}.{kernel.name}"
        added.append(name)
        return KERNELS.register(name, kernel)

    yield register
    for name in added:
        KERNELS.unregister(name)


def never(layout: Layout, device: torch.device) -> str:
    return f"no {layout.head_dim}s on {device.type}"


def constant(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    return torch.full((*x.shape[:2], 1), 3, dtype=torch.int32)


def broken(x: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("a kernel that accepts and then fails")


def test_the_fastest_that_can_run_is_chosen_and_the_others_say_why(add: Add) -> None:
    add(Kernel("encode", "quick", constant, anywhere, speed=1000))
    add(Kernel("encode", "picky", constant, never, speed=2000))
    selection = select("encode", LAYOUT, "cpu")
    assert selection.kernel.name == "quick"
    assert selection.refused["encode.picky"] == "no 6s on cpu"
    assert selection.refused["encode.naive"] == "slower than quick"
    with recording() as ran:
        assert (encode(X, BOOKS) == 3).all()
    assert ran == ["encode.quick"]


def test_a_kernel_that_goes_away_is_forgotten(add: Add) -> None:
    KERNELS.register("encode.quick", Kernel("encode", "quick", constant, anywhere, speed=1000))
    assert select("encode", LAYOUT, "cpu").kernel.name == "quick"
    KERNELS.unregister("encode.quick")
    assert select("encode", LAYOUT, "cpu").kernel.name != "quick"


def test_one_can_be_asked_for(add: Add) -> None:
    add(Kernel("encode", "quick", constant, anywhere, speed=1000))
    with using(encode="naive"), recording() as ran:
        assert (encode(X, BOOKS) == 0).all()
        assert select("encode", LAYOUT, "cpu").refused["encode.quick"] == "'naive' was asked for"
    assert ran == ["encode.naive"]
    assert select("encode", LAYOUT, "cpu").kernel.name == "quick"


def test_asking_is_undone_by_an_exception() -> None:
    before = select("encode", LAYOUT, "cpu").kernel.name
    with pytest.raises(ZeroDivisionError), using(encode="naive"):
        raise ZeroDivisionError
    assert select("encode", LAYOUT, "cpu").kernel.name == before


def test_asking_for_one_that_refuses_is_an_error_with_its_reason(add: Add) -> None:
    add(Kernel("encode", "picky", constant, never, speed=2000))
    with (
        using(encode="picky"),
        pytest.raises(KernelError, match=r"encode\.picky: no 6s on cpu") as error,
    ):
        encode(X, BOOKS)
    assert "encode.naive: 'picky' was asked for" in str(error.value)


def test_asking_for_one_that_does_not_exist_lists_near_misses() -> None:
    with pytest.raises(KernelError, match=r"called encode\.naiv\. Did you mean 'encode\.naive'"):
        using(encode="naiv").__enter__()


def test_a_kernel_that_fails_raises(add: Add) -> None:
    add(Kernel("encode", "broken", broken, anywhere, speed=1000))
    with pytest.raises(ZeroDivisionError, match="accepts and then fails"):
        encode(X, BOOKS)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout.of_codebook(1, 1, 2, 977)  # that no other test has
    with caplog.at_level(logging.INFO, "vqkv.kernels.select"), using(encode="naive"):
        for _ in range(3):
            select("encode", layout, "cpu")
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "encode on cpu runs naive"
    ]


def test_recordings_nest() -> None:
    with using(encode="naive"), recording() as outer:
        encode(X, BOOKS)
        with recording() as inner:
            encode(X, BOOKS)
    assert (outer, inner) == (["encode.naive"] * 2, ["encode.naive"])
    encode(X, BOOKS)
    assert len(outer) == 2


def test_a_broken_plugin_kernel_is_warned_of_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("encode.plugged", "no_such_module:KERNEL", "vqkv.kernels")
    monkeypatch.setattr(
        registry, "entry_points", lambda *, group: [point] if group == point.group else []
    )
    _select.cache_clear()
    with pytest.warns(UserWarning, match=r"encode\.plugged is left out: .*No module named"):
        refused = select("encode", LAYOUT, "cpu").refused
    assert "does not load" in refused["encode.plugged"]
    with using(encode="plugged"), pytest.raises(RegistryError, match="does not load"):
        select("encode", LAYOUT, "cpu")
    _select.cache_clear()
