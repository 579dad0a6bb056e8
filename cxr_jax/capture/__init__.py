"""Thought capture: what readers say or type over a film, written down, corrected, labelled, made into rows."""
