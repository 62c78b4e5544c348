"""Metrics, traces, progress, and the report of a run.

Start at ``metrics.py`` (``sinks/`` is where it writes to) and ``trace.py``; ``report.py`` draws what they wrote.
"""
