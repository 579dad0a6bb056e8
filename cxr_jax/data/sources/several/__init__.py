"""Several sources in one run: mixtures that train, named sets that are looked at."""
