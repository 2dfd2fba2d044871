import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3ForCausalLM

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines import transformers as transformers_engine
from arpo_trl.rollout.engines.base import Probe, SamplingSettings, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.distribution import entropy, sample
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.protocol import ContentEncoder
from support import small_model, tiny_model, tokenizer

PROMPTS = [tokenizer().encode("the melting point of iron " * (1 + i % 4)) for i in range(10)]


def louder(model):
    """The model with larger weights, so that its distributions are not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def engine(model, *, stop=(), eos=None, context=contextlib.nullcontext, generation_kwargs=None, **settings):
    """An engine that has been compared with the model's plain forward."""
    made = TransformersEngine(
        tokenizer(),
        SamplingSettings((tokenizer().eos_token_id if eos is None else eos,), tuple(stop), **settings),
        lambda: context(model),
        generation_kwargs=generation_kwargs,
    )
    made.check()
    return made


def run(model, requests, **settings):
    """Everything that happened, turns by id and probes by id."""
    return finish(engine(model, **settings), requests)


def finish(made, requests):
    turns, probes = {}, {}
    with made.session():
        for request in requests:
            made.submit(request)
        while made.pending:
            for event in made.poll(0.0):
                (turns if isinstance(event, Turn) else probes)[event.id] = event
    return turns, probes


def requests(which=range(10), max_tokens=24, probe=5):
    return [TurnRequest(i, PROMPTS[i], max_tokens - 2 * (i % 5), probe, seed=100 + i, key=(i,)) for i in which]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return louder(tiny_model())


def reference(model, prompt, ids):
    """Logprobs (T, V) of a full forward over the prompt and what was sampled."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].float()
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(),
        lambda: small_model(Qwen2Config, Qwen2ForCausalLM),
        lambda: small_model(LlamaConfig, LlamaForCausalLM),
    ],
    ids=["qwen3", "qwen2", "llama"],
)
def test_logprobs_and_entropies_are_those_of_a_full_forward(make):
    model = louder(make())
    turns, _ = run(model, requests())
    assert len(turns) == 10
    for i, turn in turns.items():
        expected = reference(model, PROMPTS[i], turn.ids)
        chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-4, rtol=1e-4)
        entropies = -(expected.exp() * expected).sum(-1)[:5]
        torch.testing.assert_close(torch.tensor(turn.entropies), entropies, atol=1e-4, rtol=1e-4)


def test_a_repeated_run_is_bit_identical(model):
    assert run(model, requests()) == run(model, requests())


def test_what_a_turn_samples_does_not_depend_on_its_neighbours(model):
    together, _ = run(model, requests())
    alone, _ = run(model, requests([3]))
    assert alone[3].ids == together[3].ids
    torch.testing.assert_close(torch.tensor(alone[3].logprobs), torch.tensor(together[3].logprobs), atol=1e-5, rtol=0)


def test_a_turn_that_joins_later_samples_what_it_would_have_alone(model):
    made = engine(model)
    turns = {}
    with made.session():
        first, *rest = requests()
        made.submit(first)
        waiting = list(rest)
        while made.pending or waiting:
            if waiting:
                made.submit(waiting.pop())  # one more before every step
            for event in made.poll(0.0):
                if isinstance(event, Turn):
                    turns[event.id] = event
    together, _ = run(model, requests())
    assert {i: turn.ids for i, turn in turns.items()} == {i: turn.ids for i, turn in together.items()}


def test_greedy_is_what_generate_gives(model):
    turns, _ = run(model, requests(), temperature=0.0)
    for i, turn in turns.items():
        with torch.no_grad():
            generated = model.generate(
                torch.tensor([PROMPTS[i]]),
                attention_mask=torch.ones(1, len(PROMPTS[i]), dtype=torch.long),
                do_sample=False,
                max_new_tokens=len(turn.ids),
            )
        assert generated[0, len(PROMPTS[i]) :].tolist() == turn.ids


def test_each_turn_has_its_own_length_budget(model):
    turns, _ = run(model, requests())
    for request in requests():
        turn = turns[request.id]
        assert 1 <= len(turn.ids) <= request.max_tokens
        assert (turn.stop is TurnStop.LENGTH) <= (len(turn.ids) == request.max_tokens)
        assert len(turn.logprobs) == len(turn.ids)


def test_a_probe_comes_once_after_k_tokens_and_never_with_the_end(model):
    made = engine(model)
    with made.session():
        for request in requests([0, 1], max_tokens=9, probe=4):
            made.submit(request)
        made.submit(TurnRequest(7, PROMPTS[7], 3, 4, seed=1, key=(7,)))  # ends before its fourth token
        seen = []
        for step in range(1, 20):
            seen += [(step, event) for event in made.poll(0.0)]
    probes = [(step, event.id, len(event.entropies)) for step, event in seen if isinstance(event, Probe)]
    assert probes == [(4, 0, 4), (4, 1, 4)]
    by_id = {event.id: event for _, event in seen if isinstance(event, Turn)}
    assert len(by_id[7].entropies) == 3
    for _, event in seen:
        if isinstance(event, Probe):
            assert event.entropies == by_id[event.id].entropies


def test_eos_ends_a_turn_and_stays_in_its_ids(model):
    eos = run(model, requests([2]))[0][2].ids[3]  # make the fourth token it samples the end
    made = TransformersEngine(tokenizer(), SamplingSettings((eos,)), lambda: contextlib.nullcontext(model))
    with made.session():
        made.submit(requests([2])[0])
        turns = []
        while made.pending:
            turns += [event for event in made.poll(0.0) if isinstance(event, Turn)]
    first = turns[0].ids.index(eos)
    assert turns[0].stop is TurnStop.EOS
    assert first == len(turns[0].ids) - 1


def script(model, texts_ids):
    """Has the model write the given ids whatever it is asked, by a head that looks only at the position."""
    start = len(PROMPTS[0])

    def forward(input_ids, position_ids, **kwargs):
        model.__class__.forward(model, input_ids=input_ids, position_ids=position_ids, **kwargs)
        logits = torch.full((*input_ids.shape, model.config.vocab_size), -1e4)
        for row in range(input_ids.size(0)):
            step = int(position_ids[row, -1]) - start + 1
            logits[row, -1, texts_ids[min(max(step, 0), len(texts_ids) - 1)]] = 0.0
        return type("Output", (), {"logits": logits})()

    model.forward = forward


@pytest.mark.parametrize(
    "pieces",
    [
        ["</search>"],  # one special token
        ["<", "/", "sea", "rch", ">"],  # split over tokens
        ["x</sea", "rch>\n\n and more"],  # its end merged with what follows
    ],
    ids=["special", "split", "merged"],
)
def test_stop_strings_are_found_however_they_are_tokenised_and_ids_stay_as_sampled(pieces):
    tok = tokenizer()
    encode = ContentEncoder(tok)
    special = tok.convert_tokens_to_ids(pieces[0])
    ids = [special] if len(pieces) == 1 else [token for piece in pieces for token in encode(piece)]
    tail = tok.encode(" never written", add_special_tokens=False)
    model = tiny_model()
    made = engine(model, stop=["</search>", "</python>"], temperature=0.0)
    script(model, ids + tail)
    turns, _ = finish(made, [TurnRequest(0, PROMPTS[0], 60, 5, 1, (0,))])
    assert turns[0].stop is TurnStop.STOP_STRING
    text = tok.decode(turns[0].ids)
    # ids are exactly those sampled up to the token that completes the stop string
    assert turns[0].ids == (ids + tail)[: len(turns[0].ids)]
    assert "</search>" in text
    assert "</search>" not in tok.decode(turns[0].ids[:-1])


def test_warpers_shape_the_distribution_that_logprobs_and_entropies_speak_of(model):
    turns, _ = run(model, requests(), top_k=2, temperature=0.7)
    for turn in turns.values():
        assert all(value <= 0.6932 for value in turn.entropies)  # at most ln 2 with two tokens
    plain, _ = run(model, requests([0]), temperature=0.7)
    expected = torch.log_softmax(
        model(torch.tensor([PROMPTS[0] + plain[0].ids])).logits[0, len(PROMPTS[0]) - 1 : -1].float() / 0.7, -1
    )
    chosen = expected.gather(1, torch.tensor(plain[0].ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(plain[0].logprobs), chosen.detach(), atol=1e-4, rtol=1e-4)


def test_a_repetition_penalty_counts_the_prompt_and_the_turn(model):
    turns, _ = run(model, requests([0, 1, 2]), repetition_penalty=1e9, temperature=0.0)
    for i, turn in turns.items():
        assert not set(turn.ids) & set(PROMPTS[i])
        assert len(set(turn.ids)) == len(turn.ids)


def test_no_forward_makes_logits_for_more_than_one_position_per_row(model):
    made = engine(model)
    widths = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    try:
        finish(made, requests())
    finally:
        hook.remove()
    assert set(widths) == {1}


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


def test_the_model_is_left_as_it_was(model):
    model.train()
    run(model, requests([0]))
    assert model.training
    model.eval()


def test_attention_that_takes_no_mask_is_replaced_for_the_session():
    made = small_model(LlamaConfig, LlamaForCausalLM)
    made.set_attn_implementation("eager")
    eager, _ = run(louder(made), requests())
    made.set_attn_implementation("sdpa")
    sdpa, _ = run(made, requests())
    assert {i: turn.ids for i, turn in eager.items()} == {i: turn.ids for i, turn in sdpa.items()}


def test_polling_outside_a_session_says_so(model):
    with pytest.raises(EngineError, match="session"):
        engine(model).poll(0.0)


def test_a_request_without_room_is_refused(model):
    with pytest.raises(EngineError, match="must be ≥ 1"):
        engine(model).submit(TurnRequest(0, PROMPTS[0], 0, 5, 1, (0,)))


def test_a_session_that_fails_leaves_nothing_behind(model):
    made = engine(model)
    with pytest.raises(RuntimeError), made.session():
        made.submit(requests([0])[0])
        raise RuntimeError
    assert made.pending == 0
    with made.session():
        assert made.poll(0.0) == []


def continued(model, monkeypatch, retained_bytes, *, by_tag=True):
    """Two turns after one that stopped at a tag (or by EOS, without tags), and the tokens that each forward read."""
    monkeypatch.setattr(transformers_engine, "RETAINED_BYTES", retained_bytes)
    tok = tokenizer()
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    last = run(model, requests([0]))[0][0].ids[6]
    made = engine(model, stop=[tok.decode([last])]) if by_tag else engine(model, eos=last)
    try:
        with made.session():
            made.submit(requests([0])[0])
            events = [event for _ in range(30) if made.pending for event in made.poll(0.0)]
            first = next(event for event in events if isinstance(event, Turn))
            assert first.stop is (TurnStop.STOP_STRING if by_tag else TurnStop.EOS)
            read.clear()
            ids = PROMPTS[0] + first.ids + tok.encode(" a result of some length")
            for i in (1, 2):  # the turn that goes on, and its branch
                made.submit(TurnRequest(i, ids, 10, 5, seed=i, key=(0, i), after=0))
            turns = {}
            while made.pending:
                turns |= {event.id: event for event in made.poll(0.0) if isinstance(event, Turn)}
    finally:
        hook.remove()
    return turns, read, len(ids), len(first.ids)


@pytest.mark.parametrize("by_tag", [True, False])
def test_what_a_turn_computed_is_not_computed_again_by_those_that_continue_it(model, monkeypatch, by_tag):
    kept, read, length, first = continued(model, monkeypatch, 1 << 30, by_tag=by_tag)
    # one prefill for both, of the first turn's last token and the result less its last
    assert read[0] == (1, length - len(PROMPTS[0]) - first)
    assert set(read[1:]) <= {(2, 1), (1, 1)}
    dropped, read, length, _ = continued(model, monkeypatch, 0, by_tag=by_tag)
    assert read[0] == (1, length - 1)
    assert {i: turn.ids for i, turn in kept.items()} == {i: turn.ids for i, turn in dropped.items()}
    for i, turn in kept.items():
        torch.testing.assert_close(
            torch.tensor(turn.logprobs), torch.tensor(dropped[i].logprobs), atol=1e-4, rtol=1e-4
        )


def test_equal_prompts_are_read_once(model):
    made = engine(model)
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        same = [TurnRequest(i, PROMPTS[3], 12, 5, seed=100 + i, key=(i,)) for i in range(4)]
        turns, _ = finish(made, same)
    finally:
        hook.remove()
    assert read[0] == (1, len(PROMPTS[3]) - 1)
    for i in range(4):
        alone, _ = run(model, same[i : i + 1])
        assert alone[i].ids == turns[i].ids
    assert len({tuple(turn.ids) for turn in turns.values()}) == 4
