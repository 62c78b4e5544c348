"""Lay out rows of text as a table with columns of equal width."""

from __future__ import annotations

from collections.abc import Sequence

#: Spaces between two columns.
GAP = "  "


def render_table(rows: Sequence[Sequence[str]], columns: str, *, rule: bool = False) -> str:
    """Return the rows as lines of text, with their cells in columns.

    Args:
        rows: Cells of every row; the first row may be a header.
        columns: One letter per column: ``l`` aligns its cells to the left, ``r`` to the right.
        rule: Whether a line of dashes follows the first row.
    """
    assert set(columns) <= {"l", "r"}, f"columns are l or r, not {columns!r}"
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        GAP.join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    return "\n".join(lines)
