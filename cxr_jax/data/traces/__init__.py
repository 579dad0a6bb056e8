"""Reasoning traces from reports: written by a grammar or a served model, and kept only where the parser agrees."""
