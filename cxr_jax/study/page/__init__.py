"""The report of a study: one page without a network, figures drawn in Python."""
