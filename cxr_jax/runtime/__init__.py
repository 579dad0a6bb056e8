"""The machine that a run stands on, with no medical word: processes, signals, folders, checkpoints, devices."""
