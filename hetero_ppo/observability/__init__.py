"""Metrics, traces, progress, and the report of a run.

Start at ``metrics.py`` and ``trace.py``; ``report.py`` draws what they wrote.
"""
