"""The part of OpenAI's API that a model of one room can keep: models and chat completions, the rest refused aloud."""
