"""Which films belong together: those of one study, and those of the study before it."""
