"""What is raised for a file of weights that cannot be used."""

from __future__ import annotations


class WeightsError(ValueError):
    """The file is damaged, or holds another network; the message is one plain clause without the file's name."""
