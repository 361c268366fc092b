"""A small museum of kernels: each operation from the obvious way to the one ``net.cpu`` uses, checked and timed."""
