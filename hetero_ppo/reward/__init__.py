"""Where scores come from: reward functions in processes of their own, and reward models with golden scores that prove their bits.

Start at ``function.py`` and ``golden.py``.
"""
