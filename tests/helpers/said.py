"""What a reading document says, for tests of what becomes of it."""

AT = "2026-11-30T12:00:00Z"


def said(reading):
    """What a document says: label -> (state, side), of the labels that it mentions."""
    return {
        row["label"]: (row["state"], row["side"])
        for row in reading["findings"]
        if row["state"] != "not_mentioned"
    }
