"""Sources of scores: reward functions in separate processes, and reward models whose golden scores prove that their bits are unchanged.

Start at ``function.py`` for functions and at ``golden.py`` for golden scores.
"""
