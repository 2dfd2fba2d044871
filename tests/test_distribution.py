import contextlib

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.base import SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.distribution import Distribution, entropy, sample
from arpo_trl.rollout.engines.generation_rules import refuse_rules, rules_of
from arpo_trl.rollout.engines.rows import RowState
from arpo_trl.rollout.engines.transformers import TransformersEngine
from support import events_of, sampling_trainer, tiny_model, tokenizer

EOS = tokenizer().eos_token_id
PROMPTS = [tokenizer().encode("the melting point of iron " * (1 + i)) for i in range(3)]
LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
CPU = torch.device("cpu")
ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": ["1"]} for i in range(2)]
)


def rows_after(ids: list[list[int]], own: int) -> RowState:
    """Rows of these ids, of which the turn itself wrote the last `own`."""
    state = RowState(CPU)
    requests = [
        TurnRequest(id=i, ids=row[: len(row) - own], max_tokens=8, probe_tokens=1, seed=i, key=(i,))
        for i, row in enumerate(ids)
    ]
    state.admit(0, requests, keep_ids=True)
    for step in range(-own, 0):
        n = len(ids)
        token = torch.tensor([row[step] for row in ids])
        state.record(n, token, torch.zeros(n), torch.zeros(int(state.in_probe(n).sum())))
    return state


def probabilities(rows: RowState, n: int = 1, **rules) -> list[list[float]]:
    made = Distribution(SamplingParams(eos_ids=(3,)), rules_of(None, rules), CPU)
    return [[round(value, 4) for value in row] for row in made(LOGITS.expand(n, 4).clone(), rows).tolist()]


def test_tokens_are_drawn_in_proportion_to_their_probability():
    # the quantiles 0.05, 0.15, … 0.95 of (0.5, 0.0, 0.3, 0.2): 5, 0, 3 and 2 of ten
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(10, 4)
    drawn = sample(probs, (torch.arange(10) + 0.5) / 10)
    assert torch.bincount(drawn, minlength=4).tolist() == [5, 0, 3, 2]


def test_a_token_of_probability_zero_is_never_drawn():
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert sample(probs, torch.tensor([0.0])).item() == 1
    assert sample(probs, torch.tensor([1.0 - 2**-24])).item() == 2


def test_entropy_of_a_warped_distribution_counts_zero_as_zero():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    values = entropy(probs, torch.tensor([True, True]))
    assert values.tolist() == pytest.approx([0.693147, 0.0], abs=1e-6)
    assert entropy(probs, torch.tensor([False, True])).shape == (1,)


def test_suppressed_tokens_have_no_probability_and_the_others_share_it():
    # without the first, 0.25 : 0.125 : 0.125
    assert probabilities(rows_after([[1, 2]], 0), suppress_tokens=[0]) == [[0.0, 0.5, 0.25, 0.25]]


def test_tokens_suppressed_at_the_beginning_are_so_in_the_rows_that_begin():
    rows = rows_after([[1, 2], [1, 2]], 1)
    rows.written[0] = 0  # a new turn next to one that has its first token behind it
    first, second = probabilities(rows, 2, begin_suppress_tokens=[0])
    assert first == [0.0, 0.5, 0.25, 0.25]
    assert second == [0.5, 0.25, 0.125, 0.125]


def test_a_turn_does_not_end_before_its_least_number_of_tokens():
    # EOS is 3; without it 0.5 : 0.25 : 0.125 = 4 : 2 : 1
    rows = rows_after([[1, 2]], 1)
    assert probabilities(rows, min_new_tokens=2) == [[0.5714, 0.2857, 0.1429, 0.0]]
    assert probabilities(rows, min_new_tokens=1) == [[0.5, 0.25, 0.125, 0.125]]
    assert probabilities(rows, min_length=3) == [[0.5714, 0.2857, 0.1429, 0.0]]
    assert probabilities(rows, min_length=2) == [[0.5, 0.25, 0.125, 0.125]]


def test_rules_that_read_ids_use_only_the_rows_own_ids():
    rows = rows_after([[0, 1, 2, 0], [2, 2]], 1)  # after "0 1 2 0" the pair "0 1" is taken, after "2 2" "2 2"
    assert probabilities(rows, 2, no_repeat_ngram_size=2) == [
        [0.6667, 0.0, 0.1667, 0.1667],
        [0.5714, 0.2857, 0.0, 0.1429],
    ]
    assert probabilities(rows, 2, bad_words_ids=[[2, 0], [1]]) == [
        [0.6667, 0.0, 0.1667, 0.1667],
        [0.0, 0.0, 0.5, 0.5],  # a row that ends in 2 may not go on with 0
    ]
    assert probabilities(rows, 2, sequence_bias=[[[2, 3], 20.0]]) == [[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 0.0, 1.0]]


def test_a_repetition_penalty_does_not_apply_to_tokens_of_a_longer_row():
    rows = rows_after([[1], [2, 2, 2]], 0)
    settings = SamplingParams(eos_ids=(3,), repetition_penalty=1e9)
    first, second = Distribution(settings, {}, CPU)(LOGITS.expand(2, 4).clone(), rows).tolist()
    assert [value == 0.0 for value in first] == [False, True, False, False]
    assert [value == 0.0 for value in second] == [False, False, True, False]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"suppress_tokens": [5, 6, 7]},
        {"begin_suppress_tokens": list(range(300))},
        {"min_new_tokens": 6},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[i] for i in range(100, 200)]},
        {"sequence_bias": [[[9], 5.0], [[9, 9], -5.0]]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_greedy_turns_are_those_of_generate_under_its_other_rules(kwargs):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    made = TransformersEngine(
        tokenizer(),
        SamplingParams(eos_ids=(EOS,), temperature=0.0),
        lambda: contextlib.nullcontext(model),
        generation_kwargs=kwargs,
    )
    with made.session():
        for i, prompt in enumerate(PROMPTS):
            made.submit(TurnRequest(id=i, ids=prompt, max_tokens=12, probe_tokens=4, seed=i, key=(i,)))
        turns = {event.id: event for event in events_of(made, len(PROMPTS)) if isinstance(event, Turn)}
    for i, prompt in enumerate(PROMPTS):
        generated = model.eval().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            **kwargs,
        )
        assert turns[i].ids == generated[0, len(prompt) :].tolist()


def test_the_models_rules_apply_if_the_run_does_not_set_them():
    theirs = GenerationConfig(suppress_tokens=[1], min_new_tokens=3, min_p=0.1, top_k=20, temperature=0.7)
    assert rules_of(theirs, None) == {"suppress_tokens": [1], "min_new_tokens": 3, "min_p": 0.1}
    assert rules_of(theirs, {"suppress_tokens": [2], "min_new_tokens": 0}, min_p=0.2) == {"suppress_tokens": [2]}
    assert rules_of(GenerationConfig(**GenerationConfig()._get_default_generation_params()), None) == {}


def test_the_models_settings_reach_the_trainers_rollouts(tmp_path):
    model = tiny_model()
    model.generation_config.suppress_tokens = list(range(100, len(tokenizer())))
    made = sampling_trainer(model, tmp_path, ROWS)
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    written = batch["completion_ids"][(batch["completion_mask"] * batch["tool_mask"]).bool()]
    assert len(written) > 50
    assert written.max() < 100


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_beams": 4}, "generation_config sets num_beams to 4, .* Set model.generation_config.num_beams to 1"),
        ({"forced_eos_token_id": 3}, "generation_config sets forced_eos_token_id to 3"),
        ({"exponential_decay_length_penalty": (3, 1.5)}, "sets exponential_decay_length_penalty"),
    ],
)
def test_a_rule_of_the_model_that_cannot_be_applied_is_refused_at_construction(theirs, message, tmp_path):
    model = tiny_model()
    for name, value in theirs.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=message):
        sampling_trainer(model, tmp_path, ROWS)


def test_a_value_that_transformers_objects_to_is_an_error_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"set no_repeat_ngram_size, and transformers rejects a value: .*positive"):
        rules_of(None, {"no_repeat_ngram_size": -1})


def test_vllm_is_not_taken_where_it_would_leave_a_rule_out():
    with pytest.raises(ConfigError, match=r"generation_config sets suppress_tokens, .* but is not passed on to vLLM"):
        refuse_rules(GenerationConfig(suppress_tokens=[1]), None, "vLLM")
    with pytest.raises(ConfigError, match="generation_kwargs sets min_tokens, which is not passed on to vLLM"):
        refuse_rules(None, {"min_tokens": 3}, "vLLM")
    refuse_rules(GenerationConfig(top_k=20, temperature=0.7, repetition_penalty=1.05), {}, "vLLM")
