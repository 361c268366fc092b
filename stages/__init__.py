"""One file a stage, each with a function ``run``, and what several share: setup, batches, start, trained."""
