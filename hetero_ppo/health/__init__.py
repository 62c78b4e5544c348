"""Checks that look at a step and stop a run before it spoils its weights.

Start at ``mismatch.py``: log-probs of generator and trainer that are too far apart.
"""
