"""One file a stage, each with ``run(config, run_dir, ...)``."""
