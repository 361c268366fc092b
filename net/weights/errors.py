"""What is raised for a file of weights that cannot be used, and for a network that has no place in another's format."""

from __future__ import annotations


class WeightsError(ValueError):
    """The file is damaged or of another network, or none can be made; the message is a clause without its name."""
