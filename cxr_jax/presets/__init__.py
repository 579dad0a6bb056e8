"""The configs of the three tasks by name: what `--config=rl`, `sft` and `evaluate` mean."""
