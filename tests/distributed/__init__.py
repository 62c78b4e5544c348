"""Tests of programs of several ranks."""
