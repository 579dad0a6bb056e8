"""Readers that are programs: they log in and read over HTTP, as people would, and their server may be killed."""
