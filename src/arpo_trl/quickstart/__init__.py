"""A task small enough to be learned on a laptop: facts to search, questions about them, a policy built on the spot."""
