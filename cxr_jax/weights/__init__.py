"""Files of parameters, in and out: Hugging Face folders, our checkpoints, PEFT adapters."""
