"""The memory of a run: a plan before it starts, and a ledger while it runs.

Start at ``plan.py``. Both count what ``step/kinds.py`` names.
"""
