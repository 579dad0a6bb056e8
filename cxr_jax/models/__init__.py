"""Model families as data and functions: a folder each, and the layers they share."""
