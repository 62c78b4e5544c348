"""Tests of single modules. Most take less than a second."""
