"""The values of settings with fixed choices, and names of environment variables. Pure: no torch, no TRL, no engine."""

from __future__ import annotations

from enum import StrEnum

VLLM_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable with the servers' key, if they require one. vLLM's own servers read the same variable."""


class RolloutSchedule(StrEnum):
    """When the sampler processes finished turns and tool results."""

    OVERLAP = "overlap"
    """Process each result when it arrives."""
    ROUNDS = "rounds"
    """Process tool results together when no turn is decoding: reproducible bit for bit."""


class AdvantageBaseline(StrEnum):
    """The baseline that is subtracted from the reward of a leaf."""

    MEAN = "mean"
    """The mean of its group, by TRL."""
    SCORE_NORM = "score_norm"
    """The mean of its group, weighted by estimates of the leaves' squared score norms."""
    BATCH = "batch"
    """The mean of the batch."""
    RUNNING = "running"
    """A moving average over earlier batches."""


class ImportanceSamplingLevel(StrEnum):
    """The tokens that share one importance ratio."""

    TOKEN = "token"
    """Each token has its own."""
    TURN = "turn"
    """The tokens of a turn: its mean log-ratio."""
    SEQUENCE = "sequence"
    """The tokens of a path: its mean log-ratio."""


class ShareCalls(StrEnum):
    """Whether paths of one prompt share the executions of tool calls."""

    OFF = "off"
    """Each call of a path runs, unless the cache or an identical call in flight answers it."""
    HISTORY = "history"
    """Paths with the same history of calls share one execution of the next identical call."""


class ProtocolKind(StrEnum):
    """The protocol of a model's tool calls."""

    TAGS = "tags"
    """`TagProtocol`."""
    CHAT_TEMPLATE = "chat_template"
    """`ChatTemplateProtocol`."""


class SharedPrefixForward(StrEnum):
    """Whether the update computes shared tokens only once."""

    AUTO = "auto"
    """If this is exact and saves time; otherwise TRL's padded batch. If it is not exact, one warning contains the
    reason."""
    ON = "on"
    """Always; an error at start-up if this is not exact."""
    OFF = "off"
    """TRL's padded batch."""


class StaleTokens(StrEnum):
    """The treatment of tokens of rollouts ahead that would be staler than `max_staleness`."""

    WAIT = "wait"
    """They are not sampled: the rollout starts later."""
    DROP = "drop"
    """They are sampled, but not trained."""


class WeightSync(StrEnum):
    """The transfer of weights to vLLM servers."""

    NCCL = "nccl"
    """TRL's transfer from GPU to GPU."""
    DISK = "disk"
    """The trainer saves them to a shared folder, from which the servers load them."""
