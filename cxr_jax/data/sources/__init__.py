"""Data sets: a file each, and the splits of a run."""
