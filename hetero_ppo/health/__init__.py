"""Checks that examine a step's metrics, and stop a run before it spoils its weights.

Start at ``check.py``, the interface; ``monitor.py`` runs the checks. A new rule is one file here and one line in ``registry.py``.
"""
