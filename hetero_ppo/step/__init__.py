"""The parts of a PPO step as values, which memory plan, residency and trace read.

Start at ``phases.py``: which role is on the device when.
"""
