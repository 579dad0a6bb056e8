"""Reading with a model: loading, sampling, generation, chat."""
