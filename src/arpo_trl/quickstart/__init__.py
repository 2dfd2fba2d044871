"""A task that a small model learns on a laptop: facts to search, questions about them, and a model built locally."""
