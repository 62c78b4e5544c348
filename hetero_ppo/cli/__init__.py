"""The console script ``hetero-ppo``: one module for each command, and the launcher around torchrun's.

Start at ``main.py``.
"""
