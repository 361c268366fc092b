"""Tests; run them from the project root with `python -m pytest`."""
