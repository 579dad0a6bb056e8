"""What a reader is asked."""

FIND_PROMPT = "Find abnormalities and support devices."
