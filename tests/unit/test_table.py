"""The renderer of every table in the terminal."""

from __future__ import annotations

from hetero_ppo.table import render_table


def test_cells_stand_in_columns() -> None:
    rows = [("role", "GiB", "note"), ("actor", "12.5", ""), ("critic", "3.25", "ends here")]
    assert render_table(rows, "lrl").splitlines() == [
        "role     GiB  note",
        "actor   12.5",
        "critic  3.25  ends here",
    ]
    assert render_table(rows[:2], "lrl", rule=True).splitlines()[1] == "-" * len("actor  12.5  note")
