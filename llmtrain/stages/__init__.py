"""One file per job, each with `run(cfg) -> exit code`."""
