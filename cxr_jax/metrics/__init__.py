"""Scores with intervals, the log of a run, its progress, its alarms."""
