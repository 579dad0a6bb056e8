"""What a run needs, counted from its compiled programs."""
