"""The configuration of a run: its fields, its checks, and the numbers that follow from it.

Start at ``schema/kinds.py``; ``load.py`` reads a file, ``checks.py`` refuses what cannot work, ``derived.py`` computes batches.
"""
