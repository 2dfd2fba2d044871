"""Environments: objects of a user's class, one per path, whose methods the model calls and whose state branches.

kind       the properties of a class: its tools, and the way to fork an instance
instances  creates, forks, counts and closes instances
state      connects an instance to its path: `EnvironmentState`, a `PathState`
rollouts   the environments of a trainer: rows, texts for the prompts, instances for the rewards
"""
