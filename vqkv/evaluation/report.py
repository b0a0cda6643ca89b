"""A report folder: `report.json`, a page to read, and a plot of quality against bits."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqkv.evaluation.run import Evaluation
from vqkv.folders import check_free, replacing

#: All that is in a report's folder.
FILES = frozenset({"report.json", "report.html", "plot.png"})

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc }}
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) {{ text-align: left }}
img {{ max-width: 100% }}
blockquote {{ margin: .5rem 0 1rem; padding-left: 1rem; border-left: 3px solid #ccc }}
</style>
<h1>{title}</h1>
<p>{introduction}</p>
<table>{table}</table>
<p><img src="plot.png" alt="KL divergence against bits per value"></p>
{continuations}
</html>
"""


def write_report(
    folder: Path,
    *,
    title: str,
    introduction: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    evaluations: Sequence[Evaluation],
    continuations: dict[str, str],
    data: dict[str, Any],
) -> None:
    """Write the folder, all or nothing; an older report gives way.

    Args:
        folder: where to.
        title: of the page.
        introduction: a paragraph under it.
        columns: heads of the table.
        rows: its cells.
        evaluations: what the plot shows.
        continuations: generated texts by the name of their cache.
        data: what `report.json` holds.

    Raises:
        ArtefactError: the folder holds anything else than a report.
    """
    check_free(folder, FILES, overwrite=True)
    with replacing(folder) as work:
        text = json.dumps(data, indent=2, allow_nan=False)
        (work / "report.json").write_text(text + "\n", encoding="utf-8")
        points = [(e.text, e.scheme, e.bits_per_value, e.kl) for e in evaluations]
        plot(points, work / "plot.png")
        page = _PAGE.format(
            title=html.escape(title),
            introduction=html.escape(introduction),
            table=_row("th", columns) + "".join(_row("td", row) for row in rows),
            continuations="".join(
                f"<h2>{html.escape(name)}</h2><blockquote>{html.escape(text)}</blockquote>"
                for name, text in continuations.items()
            ),
        )
        (work / "report.html").write_text(page, encoding="utf-8")


def plot(points: Sequence[tuple[str, str, float, float]], path: Path) -> None:
    """KL against bits per value: (text, scheme, bits, KL), a colour per text."""
    # No window system is asked for, and pyplot's global state is left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, text in enumerate(dict.fromkeys(point[0] for point in points)):
        mine = [point for point in points if point[0] == text]
        axes.plot([p[2] for p in mine], [p[3] for p in mine], "o", label=text)
        for _, scheme, bits, kl in mine if index == 0 else ():
            axes.annotate(
                scheme, (bits, kl), textcoords="offset points", xytext=(5, 4), fontsize="x-small"
            )
    axes.set_yscale("log")
    axes.set_xlim(0, 1.25 * max(point[2] for point in points))
    axes.set_xlabel("bits per value")
    axes.set_ylabel("KL(exact ‖ compressed), nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
