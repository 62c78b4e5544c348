"""Helpers that test modules share: the tiny chain of runs (``chain``), programs of several ranks (``ranks``), and small models and data."""
