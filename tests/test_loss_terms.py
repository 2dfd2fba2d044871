import math

import pytest
import torch
from trl import GRPOTrainer

from arpo_trl import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.training.loss_terms import LossTerms, mean_over_turns
from support import EXACT, ON_CPU, save_tiny_model
from test_baselines import ROWS, scripted, trainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_turns_value_is_its_mean_over_its_trained_tokens():
    values = torch.tensor([[1.0, 3.0, 9.0, 4.0], [5.0, 7.0, 2.0, 4.0]])
    trained = torch.tensor([[True, True, False, True], [False, True, True, False]])
    # row 0: turns (1, 3) and (4); row 1: one turn (7, 2). A turn does not go on in the next row
    assert mean_over_turns(values, trained).tolist() == [[2.0, 2.0, 9.0, 4.0], [5.0, 4.5, 4.5, 4.0]]
    assert mean_over_turns(values, torch.zeros_like(trained)).tolist() == values.tolist()


def batch(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    ones = torch.ones(1, 3, dtype=torch.long)
    return {"completion_mask": ones, "tool_mask": ones, "advantages": torch.tensor([1.0]), **changed}


def ratios_and_gradient(
    terms: LossTerms, old: list[float], advantages: list[float]
) -> tuple[list[float], list[float]]:
    """PPO's clipped loss with ε = .2 of logprobs −1: the ratios, and minus the gradient for each logprob."""
    logprobs = torch.full((1, 3), -1.0, requires_grad=True)
    given = batch(old_per_token_logps=torch.tensor([old]), advantages=torch.tensor([advantages]))
    terms.apply(given, logprobs)
    ratio = torch.exp(logprobs - given["old_per_token_logps"])
    value = torch.min(ratio * given["advantages"], ratio.clamp(0.8, 1.2) * given["advantages"])
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    return ratio[0].tolist(), gradient[0].tolist()


def test_above_the_clip_range_a_positive_advantage_keeps_the_gradient_of_the_bound():
    old = [-1 - math.log(1.5), -1 - math.log(1.5), -1 - math.log(1.1)]  # ratios 1.5, 1.5 and 1.1
    ppo = LossTerms(per_turn=False, keeps_above=None)
    ratios, gradient = ratios_and_gradient(ppo, old, [2.0, -2.0, 2.0])
    assert ratios == pytest.approx([1.5, 1.5, 1.1])
    assert gradient == pytest.approx([0.0, -3.0, 2.2])
    keeps = LossTerms(per_turn=False, keeps_above=1.2)
    ratios, gradient = ratios_and_gradient(keeps, old, [2.0, -2.0, 2.0])
    assert ratios == pytest.approx([1.2, 1.5, 1.1], abs=2e-4)
    assert gradient == pytest.approx([2.4, -3.0, 2.2], abs=5e-4)  # 1.2 · 2 in place of 0


def test_the_tokens_of_a_turn_share_its_ratio_and_keep_their_own_gradients():
    terms = LossTerms(per_turn=True, keeps_above=None)
    # log-ratios .1, −.1 and .3 of one turn: mean .1
    ratios, gradient = ratios_and_gradient(terms, [-1.1, -0.9, -1.3], [1.0, 1.0, 1.0])
    assert ratios == pytest.approx([math.exp(0.1)] * 3)
    assert gradient == pytest.approx([math.exp(0.1)] * 3)


def test_a_batch_of_the_sampling_policy_is_unchanged():
    terms = LossTerms(per_turn=True, keeps_above=1.2)
    given = batch()
    assert terms.apply(given, torch.zeros(1, 3)) is None
    assert "old_per_token_logps" not in given


def test_without_settings_there_are_no_terms():
    assert not LossTerms(per_turn=False, keeps_above=None)
    assert LossTerms(per_turn=True, keeps_above=None)


def loss_and_gradient(made, given) -> tuple[float, torch.Tensor]:
    made.model.zero_grad()
    loss = made._compute_loss(made.model, given)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])


def drifted(made, by: float) -> dict:
    """A batch that a policy sampled whose logprobs were lower by 0, `by`, 0, `by`, … along each path."""
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    given = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1)
    width = given["completion_ids"].size(1)
    with torch.no_grad(), made._loss_tokens(given["completion_mask"] * given["tool_mask"]):
        logprobs, _, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, width)
    return given | {"old_per_token_logps": logprobs - by * (torch.arange(width) % 2)}


@pytest.mark.parametrize("forward", ["off", "on"])
def test_turn_ratios_reach_the_loss_of_trl(model_path, tmp_path, forward):
    exact = {"shared_prefix_forward": forward, **EXACT}
    turns = trainer(model_path, tmp_path / "a", scripted(), importance_sampling_level="turn", epsilon=0.9, **exact)
    given = drifted(turns, 0.5)
    mask = given["completion_mask"] * given["tool_mask"]
    plain = trainer(model_path, tmp_path / "b", scripted(), epsilon=0.9, **exact)
    plain.model.train()
    plain.current_gradient_accumulation_steps = 1
    # By hand: with these old logprobs each token's own ratio is its turn's.
    drift = 0.5 * (torch.arange(mask.size(1)) % 2).expand(mask.shape)
    by_hand = given | {"old_per_token_logps": given["old_per_token_logps"] + drift - mean_over_turns(drift, mask != 0)}
    ours, gradient = loss_and_gradient(turns, given)
    expected, wanted = loss_and_gradient(plain, by_hand)
    assert ours == pytest.approx(expected, abs=5e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
    _, of_tokens = loss_and_gradient(plain, given)
    assert (gradient - of_tokens).abs().max() > 0.01


def test_a_kept_gradient_reaches_the_weights_and_is_counted(model_path, tmp_path):
    keeps = trainer(model_path, tmp_path / "a", scripted(), clip_keeps_gradient=True, **EXACT)
    given = drifted(keeps, 1.0) | {"advantages": torch.ones(8)}
    before = given["old_per_token_logps"].clone()
    value, gradient = loss_and_gradient(keeps, given)
    plain = trainer(model_path, tmp_path / "b", scripted(), **EXACT)
    plain.model.train()
    plain.current_gradient_accumulation_steps = 1
    expected, wanted = loss_and_gradient(plain, given)
    assert value == pytest.approx(expected, abs=1e-3)  # PPO's value
    assert (gradient - wanted).abs().max() > 1e-4  # not its gradient
    assert torch.equal(given["old_per_token_logps"], before)  # the batch itself is used again by later epochs
    mask = (given["completion_mask"] * given["tool_mask"]).bool()
    above = (torch.arange(mask.size(1)) % 2 == 1).expand(mask.shape) & mask
    (share,) = keeps._metrics["train"]["arpo/update/kept_above_clip"]
    assert share == pytest.approx(float(above.sum() / mask.sum()))


@pytest.mark.parametrize("keeps", [False, True])
def test_the_mask_of_off_policy_rows_reads_the_drift_of_the_policy(model_path, tmp_path, monkeypatch, keeps):
    settings = {"clip_keeps_gradient": keeps, "off_policy_mask_threshold": 0.005, "loss_type": "bnpo", **EXACT}
    made = trainer(model_path, tmp_path, scripted(), **settings)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    monkeypatch.setattr(
        GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logprobs, torch.ones(1, 2), None)
    )
    one, two = torch.ones(1, 1, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)
    made._compute_loss(
        made.model,
        {"prompt_ids": one, "prompt_mask": one, "completion_ids": two, "completion_mask": two, "tool_mask": two}
        | {"old_per_token_logps": torch.tensor([[-2.1, -0.8]]), "advantages": torch.tensor([[1.0, -1.0]])},
    ).backward()
    assert logprobs.grad is not None
    # Log-ratios 1.1 and −.2: mean KL (−1.1 + .2) / 2 < .005, so that no token is dropped. With log 1.2 in place of the
    # 1.1 it would be (−.182 + .2) / 2 > .005, and the second token would be dropped.
    assert logprobs.grad[0].tolist() == pytest.approx([-0.6 * keeps, math.exp(-0.2) / 2], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'; expected one of"),
        ({"clip_keeps_gradient": True, "loss_type": "sapo"}, "clip_keeps_gradient is set, but loss_type is 'sapo'"),
        (
            {"clip_keeps_gradient": True, "importance_sampling_level": "sequence"},
            "importance_sampling_level 'sequence'",
        ),
        (
            {"clip_keeps_gradient": True, "beta": 0.1},
            "beta is 0.1, but use_bias_correction_kl .* Set .*: false, or beta",
        ),
        ({"importance_sampling_level": "turn", "loss_type": "vespo"}, "'turn', but loss_type 'vespo' weights whole"),
    ],
)
def test_settings_that_cannot_work_are_errors(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(str(tmp_path), **ON_CPU, **settings)
