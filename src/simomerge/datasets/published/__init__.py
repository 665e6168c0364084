"""Published datasets, each in its own folder layout."""
