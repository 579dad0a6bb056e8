"""The reading room: a server for readers (the page) and for programs (an OpenAI-compatible API), on one engine."""
