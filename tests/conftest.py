"""Shared by all tests: this file puts ``tests/`` on the import path."""
