"""Environments: objects of a user's class, one per path, whose methods the model calls and whose state branches.

kind         the properties of a class: its tools, and the way to fork an instance
worker       the thread in which the methods of an object run
differences  where two states or texts differ, for messages and logs
instances    creates, forks, counts, reuses and closes instances
state        connects an instance to its path: `EnvironmentState`, a `PathState`
"""
