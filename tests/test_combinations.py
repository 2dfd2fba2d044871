"""Settings drawn at random: each combination is refused at the start, or it trains, packs exactly and resumes."""

import functools
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from arpo_trl.config import LOSS_TYPES, ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.credit import CREDITS
from arpo_trl.rollout.engines.base import TurnRequest
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules import RULES
from arpo_trl.training.trainer import ARPOTrainer
from learning_ranks import trainer
from support import ANSWER, EXACT, ON_CPU, save_tiny_model

pytestmark = pytest.mark.slow

# Without top_entropy_quantile: copies of a token are equally uncertain, so rounding decides which are in the quantile.
CHOICES: dict[str, list[Any]] = {
    "entropy_probe_tokens": [1, 5],
    "dynamic_sampling_rounds": [1],
    "gradient_accumulation_steps": [2, 3],
    "num_iterations": [2],
    "loss_type": list(LOSS_TYPES),
    "importance_sampling_level": ["turn", "sequence"],
    "clip_keeps_gradient": [True],
    "advantage_baseline": ["score_norm", "batch", "running"],
    "scale_rewards": ["batch", "none"],
    "shared_prefix_weight": ["once"],
    "share_calls": ["history"],
    "tool_cache": [True],
    "beta": [0.04],
    "mask_truncated_completions": [True],
    "off_policy_mask_threshold": [0.5],
    "epsilon_high": [0.3],
    "delta": [1.5],
    "multi_objective_aggregation": ["normalize_then_sum"],
    "gradient_checkpointing": [True, False],
    "max_completion_length": [40],
    "max_tool_calling_iterations": [2, 3, None],
    "max_tool_result_tokens": [16],
    "pad_to_multiple_of": [8],
}


def drawn(seed: int) -> dict[str, Any]:
    """A branch rule, a credit, and some of the other settings; the rest have their defaults."""
    draws = random.Random(seed)
    leaves = draws.choice([4, 6, 8])
    return {
        "num_generations": leaves,
        "initial_rollouts": draws.randint(1, leaves),
        "per_device_train_batch_size": draws.choice([1, 2]) * leaves,
        "branch_rule": draws.choice(RULES.own),
        "advantage_attribution": draws.choice(sorted({*CREDITS.own} - {"igpo", "once"})),  # answers; its own setting
        **{name: draws.choice(values) for name, values in CHOICES.items() if draws.random() < 1 / 3},
    }


def script(request: TurnRequest, context: str) -> ScriptedTurn:
    """Half of the turns search; some calls are malformed, some turns too long."""
    draws = random.Random(request.seed)
    calls = ["<search>iron</search>", f"<search>tin {request.seed % 5}</search>", "<search> </search>"]
    texts = [*calls, f"{request.seed % 1000} {ANSWER}", ANSWER, "word " * 40]
    return ScriptedTurn(text=draws.choice(texts), entropies=[draws.random() * 2], ends=draws.random() < 0.95)


def search(query: str) -> str:
    """Search for facts.

    Args:
        query: What to look for.
    """
    return f"facts about {query}"


search.deterministic = True


def by_length(turns: list[list[str]], **_: Any) -> list[float]:
    return [float(len("".join(texts)) % 3) for texts in turns]


def of_some(completions: list[Any], **_: Any) -> list[float | None]:
    return [None if i % 5 == 4 else 0.5 * (i % 2) for i in range(len(completions))]


def trained(model: str, folder: Path, settings: dict[str, Any], *, resume: bool = False, **more: Any) -> ARPOTrainer:
    made = trainer(
        model,
        folder,
        rewards=[by_length, of_some],
        tools=[search],
        script=script,
        **{"max_steps": 2, "rollout_schedule": "rounds", **EXACT, **settings, **more},
    )
    made.train(resume_from_checkpoint=resume)
    return made


def weights(made: ARPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def is_accepted(settings: dict[str, Any]) -> bool:
    try:
        ARPOConfig("/tmp/unused", **ON_CPU, **settings)
    except ConfigError:
        return False
    return True


@functools.cache
def accepted(count: int) -> list[dict[str, Any]]:
    """The first combinations that are not refused."""
    return list(itertools.islice(filter(is_accepted, map(drawn, itertools.count())), count))


def test_every_combination_is_a_configuration_or_a_named_error():
    assert 60 < sum(is_accepted(drawn(seed)) for seed in range(100)) < 90


@pytest.mark.parametrize("number", range(12))
def test_a_combination_trains_packs_exactly_and_resumes(number, model, tmp_path):
    settings = accepted(12)[number] | {"peft_config": LoraConfig(r=2) if number % 3 == 0 else None}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(model, tmp_path / "whole", settings, shared_prefix_forward="on", **saving)
    assert all(value.isfinite().all() for value in weights(whole).values())
    padded = trained(model, tmp_path / "padded", settings, shared_prefix_forward="off")
    for packed_step, padded_step in zip(whole.state.log_history[:2], padded.state.log_history[:2], strict=True):
        for name in ("loss", "grad_norm"):
            assert packed_step[name] == pytest.approx(padded_step[name], rel=1e-3, abs=1e-5), (name, settings)
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "resumed/checkpoint-1")
    resumed = trained(model, tmp_path / "resumed", settings, resume=True, shared_prefix_forward="on", **saving)
    found = weights(resumed)
    assert all(torch.equal(value, found[name]) for name, value in weights(whole).items()), settings
