"""The network: its layers, its eight-layer list, and the backends that compute it."""
