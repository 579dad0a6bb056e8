"""Hold one file a change of the tables, in the order that their `down_revision` gives."""
