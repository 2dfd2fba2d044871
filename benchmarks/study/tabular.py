"""Part a: training on the tabular task, with the package's sampler, rules and credits. Accuracies are exact.

All arms take the same number of steps with the same number of executed calls in each. A step samples prompts until its
call budget is spent, and the next step subtracts the excess. So arms differ only in how they use their calls. Arms
with the same seed use common random numbers and are compared seed by seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch

from arpo_trl import ARPOConfig
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.batch import GroupRequest, TreeSettings
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.toolbox import ToolBox

from . import files
from .arms import Arm
from .baselines import GroupAdvantages
from .task import SCENARIOS, TURN, TabularEngine, TabularProtocol, Task, compute, executed_calls, look_up


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The length of a tabular run: steps, executed calls in each, and Adam's learning rate."""

    steps: int = 10
    calls_per_step: int = 50
    learning_rate: float = 0.12


@dataclass
class _Adam:
    """Adam with the usual constants, for one array."""

    rate: float
    step: int = 0
    first: Any = 0.0
    second: Any = 0.0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """The update of the parameters for gradient ascent."""
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        first, second = self.first / (1 - 0.9**self.step), self.second / (1 - 0.99**self.step)
        return self.rate * first / (np.sqrt(second) + 1e-8)


class _Run:
    """The sampler of one arm, and the calls that it has executed."""

    def __init__(self, task: Task, config: ARPOConfig, seed: int, toolbox: ToolBox):
        self.task, self.seed = task, seed
        self.engine = TabularEngine(task)
        assert config.initial_rollouts is not None  # the configuration has set it
        settings = TreeSettings(
            num_generations=config.num_generations,
            initial_rollouts=config.initial_rollouts,
            max_completion_length=1000,
            max_length=1001,
            max_tool_calls=task.calls,
            entropy_probe_tokens=1,
            rule=config.make_branch_rule(),
            schedule=RolloutSchedule.ROUNDS,
        )
        protocol = cast(ToolProtocol, TabularProtocol(task))
        self.sampler = TreeSampler(self.engine, toolbox, protocol, settings, score=lambda _, tree: scores(task, tree))
        self.calls = 0
        self.chains: list[int] = []
        """The number of sequential turns of each group."""

    def sample(self, logits: np.ndarray, step: int, calls: int) -> list[RolloutTree]:
        """Sample prompts of this step until `calls` calls have been executed since the start; at least one prompt."""
        self.engine.load(logits)
        kinds = np.random.default_rng((self.seed, step))
        trees: list[RolloutTree] = []
        while self.calls < calls or not trees:
            kind = kinds.choice(len(self.task.shares), p=self.task.shares)
            request = GroupRequest(id=len(trees), prompt_ids=[int(kind)])
            rollout = self.sampler.sample([request], seed=(self.seed, step))
            trees += rollout.trees
            self.chains += rollout.turns_in_sequence
            self.calls += executed_calls(rollout.trees)
        return trees


def train(task: Task, config: ARPOConfig, seed: int, budget: Budget) -> dict[str, Any]:
    """Train with these settings from the task's first policy. Returns its exact accuracies and its costs."""
    start, credit, advantages_of = time.process_time(), config.make_credit(), GroupAdvantages(config)
    logits, adam, accuracies = task.logits, _Adam(budget.learning_rate), [task.value(task.logits)]
    prompts = 0
    with ToolBox([look_up, compute]) as toolbox:
        run = _Run(task, config, seed, toolbox)
        rule = run.sampler.settings.rule
        for step in range(budget.steps):
            trees = run.sample(logits, step, (step + 1) * budget.calls_per_step)
            rewards = torch.tensor([reward for tree in trees for reward in scores(task, tree)])
            per_token, weights = credit(trees, rewards, advantages_of(trees, rewards))
            if rule.learns:
                rule.learn([rule.lesson(trees, rewards.tolist())])
            logits = logits + adam(policy_gradient(task, logits, trees, per_token, weights))
            accuracies.append(task.value(logits))
            prompts += len(trees)
    return {
        "accuracy": accuracies[-1],
        "calls": run.calls,
        "calls_per_prompt": run.calls / prompts,
        "turns_in_sequence": mean(run.chains),
        "cpu_seconds": time.process_time() - start,
        "accuracies": [round(value, 5) for value in accuracies],
    }


def finished(path: Path, budget: Budget) -> dict[str, Any]:
    """Seed → result: what the file of an arm holds for this budget."""
    content = files.read(path) or {}
    return content["runs"] if content.get("budget") == asdict(budget) else {}


def run(path: Path, scenario: str, arm: Arm, seeds: Iterable[str], budget: Budget) -> None:
    """Train an arm with these seeds and add the results to its file."""
    torch.set_num_threads(1)
    task = SCENARIOS[scenario]
    config = arm.config(task.calls)
    made = {seed: train(task, config, int(seed), budget) for seed in sorted(seeds, key=int)}
    runs = finished(path, budget) | made
    files.write(path, {"arm": arm.as_row(), "scenario": scenario, "budget": asdict(budget), "runs": runs})


def scores(task: Task, tree: RolloutTree) -> list[float]:
    return [task.reward(leaf) for leaf in tree.leaves()]


def policy_gradient(
    task: Task,
    logits: np.ndarray,
    trees: Sequence[RolloutTree],
    advantages: torch.Tensor,
    weights: torch.Tensor | None,
) -> np.ndarray:
    """(seen states, A): the gradient that the loss type "grpo" climbs: the mean over each leaf's tokens, then leaves.

    Args:
        advantages: (B,) or (B, T), as a credit returns them.
        weights: (B, T) or None.
    """
    leaves = [leaf.ids for tree in trees for leaf in tree.leaves()]
    tokens = np.zeros((len(leaves), max(map(len, leaves))), dtype=np.int64)
    for row, ids in enumerate(leaves):
        tokens[row, : len(ids)] = ids
    mask = (tokens >= TURN).astype(float)
    if weights is not None:
        mask = mask * weights.numpy()
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    given = advantages.numpy() if advantages.dim() == 2 else advantages.numpy()[:, None]
    factors = given * mask / lengths / len(leaves)
    rows, columns = np.nonzero(tokens >= TURN)
    kinds, states, actions = task.read(tokens[rows, columns])
    scores_of = -task.probabilities(logits)[kinds, states]
    scores_of[np.arange(len(actions)), actions] += 1.0
    gradient = np.zeros_like(logits)
    np.add.at(gradient, task.seen[states], factors[rows, columns][:, None] * scores_of)
    return gradient
