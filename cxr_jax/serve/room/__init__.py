"""What a reader works with: films, readings, reports, and the pages they are shown on."""
