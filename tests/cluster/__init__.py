"""Several processes as one run, on the real engines: MPI for training and evaluation, Dask for preprocessing."""
