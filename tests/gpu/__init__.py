"""Checks that need a GPU, and the program that runs them (``scripts/gpu_check.sh``)."""
