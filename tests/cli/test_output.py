"""Tables on terminals of any width, and in pipes."""

from __future__ import annotations

import io

import pytest

from vqkv.cli.output import print_table

COLUMNS = ("scheme", "bits", "KL")
ROWS = [("recommended-2bit", "2", "0.0037"), ("fast-2bit", "2", "0.0605")]


def printed(monkeypatch: pytest.MonkeyPatch, width: int | None, piped_heads: bool = False) -> str:
    """On a terminal so wide, or in a pipe."""
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: width is not None)
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS, piped_heads=piped_heads)
    return stdout.getvalue()


def test_a_wide_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 80).splitlines()
    assert any("recommended-2bit" in line and "0.0037" in line for line in lines)


def test_a_narrow_terminal_gets_a_block_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, 20) == (
        "scheme  recommended-2bit\nbits    2\nKL      0.0037\n\n"
        "scheme  fast-2bit\nbits    2\nKL      0.0605\n\n"
    )


@pytest.mark.parametrize("piped_heads", [True, False])
def test_a_pipe_gets_a_line_for_each_row(
    monkeypatch: pytest.MonkeyPatch, piped_heads: bool
) -> None:
    lines = printed(monkeypatch, None, piped_heads).splitlines()
    heads = ["scheme\tbits\tKL"] if piped_heads else []
    assert lines == [*heads, *("\t".join(row) for row in ROWS)]
