"""Save a run, find its newest checkpoint, load it, and keep as many as the configuration says.

Start at ``manager.py``.
"""
