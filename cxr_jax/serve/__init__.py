"""The server of the reading room: an engine that reads, an API, the pages."""
