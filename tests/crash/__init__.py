"""Kills, damage and failing disks: what a run survives. The long form: ``python -m tests.crash --help``."""
