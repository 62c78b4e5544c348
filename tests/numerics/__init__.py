"""Tests of numbers in one process, against transformers, torch or values worked out by hand."""
