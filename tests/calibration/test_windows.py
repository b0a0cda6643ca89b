from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.calibration.stubs import BOS, StubTokenizer, token, write_text
from vqkv.calibration import Text, calibration_windows, read_text, text_windows
from vqkv.errors import TextError
from vqkv.models import load_model
from vqkv.texts import bundled_text


def text(content: str, name: str = "some.txt") -> Text:
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


def windows_of(content: str, *args: Any, bos: bool = False, **kwargs: Any) -> list[list[int]]:
    tokenizer: Any = StubTokenizer(bos)
    return [w.tolist() for w in text_windows(tokenizer, text(content), *args, **kwargs)]


ALPHABET = "".join(chr(97 + i % 26) for i in range(2000))
TOKENS = [token(c) for c in ALPHABET]


@given(tokens=st.integers(1, 200), context=st.integers(1, 50), skip=st.integers(0, 30))
def test_windows_are_the_text_cut_up(tokens: int, context: int, skip: int) -> None:
    windows = windows_of(ALPHABET, tokens, context, skip)
    assert list(chain(*windows)) == TOKENS[skip : skip + tokens]
    assert all(len(window) == context for window in windows[:-1])
    assert 1 <= len(windows[-1]) <= context


def test_windows_are_token_ids() -> None:
    tokenizer: Any = StubTokenizer()
    (window,) = text_windows(tokenizer, text("abc"), 3, 8)
    assert window.dtype == torch.int64 and window.shape == (3,)


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    windows = windows_of(ALPHABET, 10, 4, skip=1, bos=True)
    assert [len(window) for window in windows] == [4, 4, 2]
    assert all(window[0] == BOS for window in windows)
    assert list(chain(*(window[1:] for window in windows))) == TOKENS[1:8]


def test_only_a_beginning_of_a_long_text_is_tokenized() -> None:
    tokenizer: Any = StubTokenizer()
    text_windows(tokenizer, text(ALPHABET * 100), 50, 25)
    assert tokenizer.longest_call < 1000


def test_a_text_of_long_tokens_is_read_far_enough() -> None:
    class Words(StubTokenizer):
        def __call__(self, text: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"input_ids": [len(word) for word in text.split()]}

    tokenizer: Any = Words()
    (window,) = text_windows(tokenizer, text(("x" * 500 + " ") * 200), 100, 100)
    assert window.tolist() == [500] * 100


def test_texts_share_equally_and_the_first_take_what_is_left() -> None:
    tokenizer: Any = StubTokenizer()
    texts = [text("a" * 50), text("b" * 50), text("c" * 50)]
    windows = [w.tolist() for w in calibration_windows(tokenizer, texts, 32, 8)]
    a, b, c = map(token, "abc")
    assert windows == [[a] * 8, [a] * 3, [b] * 8, [b] * 3, [c] * 8, [c] * 2]


def test_too_short_a_text_says_what_it_has_and_what_it_needs() -> None:
    with pytest.raises(TextError, match=r"'some\.txt' has 5 tokens, needed are 12: 12 in windows"):
        windows_of("hello", 12, 6)
    with pytest.raises(TextError, match=r"needed are 9: 5 in windows of 5 after the first 4"):
        windows_of("hello", 5, 5, skip=4)


@pytest.mark.parametrize(("tokens", "context", "skip"), [(0, 8, 0), (8, 0, 0), (8, 8, -1)])
def test_numbers_that_make_no_windows(tokens: int, context: int, skip: int) -> None:
    with pytest.raises(TextError, match=f"given tokens {tokens}, context {context}, skip {skip}"):
        windows_of(ALPHABET, tokens, context, skip)


def test_a_window_has_room_for_more_than_bos() -> None:
    with pytest.raises(TextError, match="context from 2"):
        windows_of(ALPHABET, 8, 1, bos=True)


def test_no_texts_or_fewer_tokens_than_texts() -> None:
    tokenizer: Any = StubTokenizer()
    with pytest.raises(TextError, match="at least one text"):
        calibration_windows(tokenizer, [], 8, 8)
    with pytest.raises(TextError, match="2 texts need at least one token each, given 1"):
        calibration_windows(tokenizer, [text("a"), text("b")], 1, 8)


def test_reading_a_text(tmp_path: Path) -> None:
    path = tmp_path / "héllo.txt"
    path.write_bytes("né\r\n".encode())
    found = read_text(path)
    assert found == Text("héllo.txt", "né\r\n", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_path_does_as_well_as_a_text(tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.txt", 100)
    tokenizer: Any = StubTokenizer()
    by_path = text_windows(tokenizer, str(path), 60, 20)
    assert all(map(torch.equal, by_path, text_windows(tokenizer, read_text(path), 60, 20)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text '.*bad\.txt' cannot be read: No such file"),
        (b"", r"bad\.txt' is empty"),
        (b" \n\t", r"bad\.txt' is empty"),
        (b"abc\xff", r"bad\.txt' is not UTF-8: byte 0xff at 3 .*; convert it"),
    ],
    ids=["missing", "empty", "blank", "not-utf-8"],
)
def test_unreadable_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(path)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="Is a directory"):
        read_text(tmp_path)


@pytest.mark.slow
def test_the_demo_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = load_model("demo")
    path = bundled_text("emma")
    windows = text_windows(tokenizer, path, 20_000, 2048)
    whole = tokenizer(path.read_text(), verbose=False)["input_ids"]
    assert torch.cat(windows).tolist() == whole[:20_000]
    assert not caplog.records
