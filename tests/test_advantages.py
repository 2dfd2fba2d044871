import pytest
import torch
from accelerate import Accelerator

from arpo_trl.training.advantages import z_scores
from support import EXACT, save_tiny_model
from test_baselines import ROWS, scripted, trainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_z_scores_are_over_the_chosen_values():
    values, chosen = torch.tensor([[1.0, 9.0], [3.0, 2.0]]), torch.tensor([[True, False], [True, True]])
    # 1, 3 and 2 have the mean 2 and the sample deviation 1
    assert z_scores(values, chosen, Accelerator()).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("chosen", [[False, False], [True, False], [True, True]])
def test_values_that_do_not_differ_have_no_z_scores(chosen):
    assert z_scores(torch.tensor([3.0, 3.0]), torch.tensor(chosen), Accelerator()).tolist() == [0.0, 0.0]


def test_values_that_differ_by_rounding_have_no_z_scores():
    values = torch.full((1000,), 0.1)  # their sum rounds, so the computed variance is not 0
    assert z_scores(values, torch.ones(1000, dtype=torch.bool), Accelerator()).abs().max() == 0


@pytest.mark.parametrize("forward", ["off", "on"])
def test_entropies_are_compared_over_all_trained_tokens_of_the_batch(model_path, tmp_path, forward):
    made = trainer(
        *(model_path, tmp_path, scripted()),
        **{"advantage_attribution": "aepo", "scale_rewards": "none", "shared_prefix_forward": forward, **EXACT},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    visible = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = made.model(ids, attention_mask=visible).logits[:, -width - 1 : -1] / made.temperature
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    trained = (batch["completion_mask"] * batch["tool_mask"]) != 0
    own = entropies[trained]
    z = torch.where(trained, (entropies - own.mean()) / own.std(), 0.0)
    rewards = made._last_rewards.view(2, 4)
    of_leaf = (rewards - rewards.mean(dim=1, keepdim=True)).view(8, 1)
    torch.testing.assert_close(batch["advantages"], of_leaf * (1 + 0.2 * z), atol=1e-3, rtol=1e-3)
    assert of_leaf.any()


def test_evaluation_needs_no_entropies(model_path, tmp_path):
    made = trainer(model_path, tmp_path, scripted(), advantage_attribution="aepo", num_generations_eval=4, **EXACT)
    made.model.eval()
    assert made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])["advantages"].dim() == 1
