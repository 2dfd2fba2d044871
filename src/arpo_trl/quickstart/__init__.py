"""A task that a small model learns on a laptop: facts to search, questions about them, and a model built locally."""

from arpo_trl.common.noise import hide_noise

hide_noise()  # here, since the imports of the programs already print messages
