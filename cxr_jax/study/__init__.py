"""The reader study: does the reasoning help, and whom does it mislead? From the protocol to the report."""
