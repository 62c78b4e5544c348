"""Metrics, logs, traces, progress, and the report of a run.

Start at ``metrics.py`` (it writes to ``sinks/``) and ``trace.py``; ``report.py`` draws what they wrote.
"""
