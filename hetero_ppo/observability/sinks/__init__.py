"""Destinations of a step's metrics, one file per sink.

Start at ``base.py``, the interface. A new sink is one file here and one line in ``registry.py``.
"""
