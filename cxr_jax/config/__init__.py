"""Every key of a run's config: what it is, its type, its range."""
