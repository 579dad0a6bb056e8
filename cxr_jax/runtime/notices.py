"""What the program tells every user of its output, in one place."""

NOT_FOR_DIAGNOSIS = "Research use only. Not for diagnosis."
