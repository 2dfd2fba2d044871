import math

import pytest
import torch
from datasets import Dataset

from arpo_trl.errors import DataError
from arpo_trl.training.answers import answer_probabilities, check_answers, reference, texts
from support import EXACT, save_tiny_model
from test_baselines import ROWS, scripted, trainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_reference_is_the_first_accepted_answer():
    assert reference("iron", 0) == reference(["iron", "Fe"], 0) == "iron"
    for answer in (None, [], "", " ", [3], 3, math.nan, {"text": "iron"}):
        with pytest.raises(DataError, match=r"Row 4: answer is .*; expected non-empty text"):
            reference(answer, 4)


def test_braces_in_an_answer_are_text():
    assert texts("<answer>{answer}</answer>", [{"answer": "{answer} {0}"}]) == ["<answer>{answer} {0}</answer>"]


def test_a_dataset_without_answers_is_an_error_at_the_start():
    check_answers([ROWS, Dataset.from_list([{"prompt": "evaluated"}]), None], "igpo")
    check_answers([None], "igpo")
    with pytest.raises(DataError, match=r"The credit 'igpo' needs reference answers, .* no column 'answer'"):
        check_answers([Dataset.from_list([{"prompt": "what is 1"}])], "igpo")
    check_answers([ROWS.to_iterable_dataset()], "igpo")
    with pytest.raises(DataError, match="Row 0: answer is None"):
        check_answers([Dataset.from_list([{"prompt": "what is 1"}]).to_iterable_dataset()], "igpo")


@pytest.mark.parametrize("forward", ["off", "on"])
def test_probabilities_are_those_of_a_forward_pass_of_each_path(model_path, tmp_path, forward):
    made = trainer(
        model_path, tmp_path, scripted(), advantage_attribution="igpo", shared_prefix_forward=forward, **EXACT
    )
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    assert batch["advantages"].dim() == 2 and batch["advantages"].isfinite().all()
    trees = made._last.rollout.trees
    for number, (tree, found) in enumerate(zip(trees, made._credit.answer_probabilities, strict=True)):
        assert sorted(found) == [0, *(node.index for node in tree.observations())]
        answer = made._tokenizer(f"<answer>\\boxed{{{number}}}</answer>", add_special_tokens=False)["input_ids"]
        for node, probability in found.items():
            logprobs = made._logprobs_of([*tree.ids_to(node), *answer])[-len(answer) :]
            assert probability == pytest.approx(math.exp(sum(logprobs) / len(answer)), rel=1e-4)


def test_ranks_with_fewer_rows_take_as_many_forwards(model_path, tmp_path):
    made = trainer(model_path, tmp_path, scripted())
    made.model.train()
    made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    seen = []

    def score(ids, mask, answer, answer_mask):
        seen.append(len(ids))
        return torch.zeros(answer.shape)

    (tree, _) = made._last.rollout.trees
    (found,) = answer_probabilities([tree], ["iron"], made._tokenizer, score, lambda number: number + 3)
    assert seen == [len(found) + 3]
    assert set(found.values()) == {1.0}


def test_evaluation_does_not_compute_them(model_path, tmp_path):
    made = trainer(model_path, tmp_path, scripted(), advantage_attribution="igpo", num_generations_eval=4)
    made.model.eval()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    assert batch["advantages"].dim() == 1


def test_igpo_trains_with_the_real_engine(model_path, tmp_path):
    made = trainer(model_path, tmp_path, advantage_attribution="igpo", max_completion_length=24, max_steps=1)
    made.train()
    assert made.state.global_step == 1
