"""The arms that the study compares. Rules and credits come from the registries, so new ones are included.

`OF_RULES` has the rules with several variants. All other rules run with N = M/4 and their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from arpo_trl import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.credit import CREDITS
from arpo_trl.rollout.rules import RULES

LEAVES = 8
GRPO, COIN = "GRPO", "random"
OF_RULES: Mapping[str, list[dict[str, Any]]] = {
    "schedule": [{"leaves": 6, "roots": 1, "options": {"widths": [1, 3, 2]}}, {}],
}
BASELINES: Mapping[str, dict[str, Any]] = {
    "mean": {},
    "score_norm": {"advantage_baseline": "score_norm"},
    "score_norm, capped": {"advantage_baseline": "score_norm", "score_norm_cap": 3.0},
    "running": {"advantage_baseline": "running"},
}
"""Baselines, and their settings in `ARPOConfig`."""
MAIN_BASELINES = ("mean", "score_norm")
OF_GOAL = "as is"
"""The scenario of part a in which the rules' differences are to be resolved."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One combination: M leaves from N roots, a branch rule, a credit and a baseline.

    Arm(leaves=8, roots=2, rule="random", credit="soft", baseline="mean")
    """

    leaves: int = LEAVES
    roots: int = LEAVES // 4
    rule: str = COIN
    options: dict[str, Any] = field(default_factory=dict)
    credit: str = "soft"
    baseline: str = "mean"
    dynamic: bool = False
    """DAPO's dynamic sampling: groups in which all rewards are equal are rolled out again."""
    shares: bool = False
    """Paths of a group with the same history of calls share the next call (`share_calls: history`)."""

    @property
    def sampling(self) -> str:
        """The name of the sampling: "GRPO M = 8" without branches, otherwise the rule and N."""
        if self.roots == self.leaves:
            base = f"{GRPO} M = {self.leaves}"
        elif widths := self.options.get("widths"):
            base = f"{self.rule} {'-'.join(map(str, widths))}"
        else:
            base = " ".join([self.rule, *map(str, self.options.values()), f"N = {self.roots}"])
        return f"{base}{', dynamic' * self.dynamic}{', shared calls' * self.shares}"

    @property
    def name(self) -> str:
        return f"{self.sampling}, {self.credit}, {self.baseline}"

    def settings(self) -> dict[str, Any]:
        """The arm as settings of `ARPOConfig`, without those that have their default.

        Raises:
            ConfigError: The package has no such rule, credit or setting.
        """
        RULES.get(self.rule)
        CREDITS.get(self.credit)
        chosen: dict[str, Any] = {"num_generations": self.leaves, "initial_rollouts": self.roots}
        if self.roots < self.leaves:
            chosen |= {"branch_rule": self.rule} | ({"branch_rule_kwargs": self.options} if self.options else {})
        if self.credit == "once":
            chosen["shared_prefix_weight"] = "once"
        elif self.credit != "soft":
            chosen["advantage_attribution"] = self.credit
        chosen |= BASELINES[self.baseline] | ({"dynamic_sampling_rounds": 3} if self.dynamic else {})
        chosen |= {"share_calls": "history"} if self.shares else {}
        known = {one.name for one in fields(ARPOConfig)}
        if missing := sorted(chosen.keys() - known):
            raise ConfigError(f"ARPOConfig has no settings {missing}.")
        return chosen

    def config(self, calls: int) -> ARPOConfig:
        """The configuration of one group a step, with at most `calls` results on a path."""
        return ARPOConfig(
            "runs/study",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=self.leaves,
            max_tool_calling_iterations=calls,
            **self.settings(),
        )

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"sampling": self.sampling, "name": self.name}


PAPER = Arm(rule="threshold")
"""The rule, the credit and the baseline of the paper."""


def grpo(leaves: int) -> dict[str, Any]:
    """The arguments of an arm without branches."""
    return {"leaves": leaves, "roots": leaves}


def branching(rule: str) -> list[dict[str, Any]]:
    """The arguments of the arms with this rule, one for each of its variants."""
    return [{"rule": rule} | variant for variant in OF_RULES.get(rule, [{}])]


def tabular_arms() -> list[Arm]:
    """All rules × credits × the main baselines, the other baselines with the credit "soft", and GRPO × baselines.

    Credits that read the update's entropies or answers are left out, because the task has neither.
    """
    credits = [name for name in CREDITS.names if not _reads_the_model(name)]
    whole = [Arm(**grpo(leaves), baseline=baseline) for leaves in (LEAVES, LEAVES // 2) for baseline in BASELINES]
    return whole + [
        Arm(**sampling, credit=credit, baseline=baseline)
        for rule in RULES.names
        for sampling in branching(rule)
        for credit in credits
        for baseline in BASELINES
        if credit == "soft" or baseline in MAIN_BASELINES
    ]


def _reads_the_model(credit: str) -> bool:
    kind = CREDITS.get(credit)
    return kind.reads_entropies or kind.reads_answers


TRAINED = (*MAIN_BASELINES, "score_norm, capped")
_TRAINED_RULES = (COIN, "threshold", "ranked", "schedule")
_SAMPLINGS = (grpo(LEAVES), grpo(LEAVES // 2), *(branching(rule)[0] for rule in _TRAINED_RULES))


def frozen_arms() -> list[Arm]:
    """The trained samplings × the baselines, and the rule "random" with every credit."""
    crossed = [Arm(**sampling, baseline=baseline) for sampling in _SAMPLINGS for baseline in MAIN_BASELINES]
    return crossed + [Arm(credit=credit) for credit in CREDITS.names if credit != "soft"]


def trained_arms() -> list[Arm]:
    """The samplings × the baselines, GRPO with dynamic sampling, and two arms with shared calls.

    Sharing changes no result of these tools, so the shared arms measure only the calls that it saves.
    """
    crossed = [Arm(**sampling, baseline=baseline) for sampling in _SAMPLINGS for baseline in TRAINED]
    shared = Arm(**branching("schedule")[0], baseline="score_norm", shares=True)
    return [*crossed, Arm(**grpo(LEAVES), dynamic=True), shared, Arm(**grpo(LEAVES), shares=True)]


def seeds_of(arm: Arm, most: int, least: int) -> int:
    """The number of seeds of an arm: `most` for the main comparisons and the paper's rule, `least` for the others."""
    compared = arm.roots == arm.leaves or arm.rule in (COIN, "schedule")
    extra = arm.dynamic or (arm.shares and arm.roots == arm.leaves)
    main = compared and not extra and arm.baseline in MAIN_BASELINES
    return most if main or arm == PAPER else least


def tabular_seeds_of(arm: Arm, scenario: str, most: int, least: int) -> int:
    """The number of seeds of an arm of part a: `most` for the goal's comparison of rules, `least` for the others."""
    return most if scenario == OF_GOAL and compares_rules(arm) else least


def compares_rules(arm: Arm) -> bool:
    """Whether the arm belongs to part a's comparison of the rules: the credit "soft" with the main baselines."""
    return arm.credit == "soft" and arm.baseline in MAIN_BASELINES
