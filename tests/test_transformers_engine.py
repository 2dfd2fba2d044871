import contextlib
import copy
import gc
import math
import re
import weakref

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3ForCausalLM

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines import slots
from arpo_trl.rollout.engines import transformers as transformers_engine
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.protocols import ContentEncoder
from support import events_of, sampling_trainer, small_model, tiny_model, tokenizer

PROMPTS = [tokenizer().encode("the melting point of iron " * (1 + i % 4)) for i in range(10)]


def louder(model):
    """The model with larger weights, so that its distributions are not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def engine(model, *, stop=(), eos=None, context=contextlib.nullcontext, most_rows=None, smaller="", **settings):
    """An engine that has been compared with the model's plain forward."""
    made = TransformersEngine(
        tokenizer(),
        SamplingParams(
            eos_ids=(tokenizer().eos_token_id if eos is None else eos,), stop_strings=tuple(stop), **settings
        ),
        lambda: context(model),
        most_rows=most_rows,
        smaller=smaller or "Sample fewer turns at a time, or shorter ones.",
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
        for event in events_of(made, len(requests)):
            (turns if isinstance(event, Turn) else probes)[event.id] = event
    return turns, probes


def requests(which=range(10), max_tokens=24, probe=5):
    return [
        TurnRequest(
            id=i, ids=PROMPTS[i], max_tokens=max_tokens - 2 * (i % 5), probe_tokens=probe, seed=100 + i, key=(i,)
        )
        for i in which
    ]


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


def test_the_tokens_of_a_turn_do_not_depend_on_other_turns(model):
    together, _ = run(model, requests())
    alone, _ = run(model, requests([3]))
    assert alone[3].ids == together[3].ids
    torch.testing.assert_close(torch.tensor(alone[3].logprobs), torch.tensor(together[3].logprobs), atol=1e-5, rtol=0)


def test_a_turn_that_joins_later_samples_the_same_tokens_as_alone(model):
    made = engine(model)
    turns = {}
    with made.session():
        first, *rest = requests()
        made.submit(first)
        waiting = list(rest)
        while len(turns) < 10:
            if waiting:
                made.submit(waiting.pop())  # one more before every step
            for event in made.poll(0.0):
                if isinstance(event, Turn):
                    turns[event.id] = event
    together, _ = run(model, requests())
    assert {i: turn.ids for i, turn in turns.items()} == {i: turn.ids for i, turn in together.items()}


def test_greedy_sampling_equals_generate(model):
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


def test_a_diverged_model_is_an_error_and_no_text(model):
    broken = copy.deepcopy(model)
    made = engine(broken)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(EngineError, match="probabilities are NaN: its weights have diverged"):
        finish(made, requests([0]))


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
        made.submit(
            TurnRequest(id=7, ids=PROMPTS[7], max_tokens=3, probe_tokens=4, seed=1, key=(7,))
        )  # ends before its fourth token
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
    made = TransformersEngine(tokenizer(), SamplingParams(eos_ids=(eos,)), lambda: contextlib.nullcontext(model))
    with made.session():
        made.submit(requests([2])[0])
        turns = [event for event in events_of(made, 1) if isinstance(event, Turn)]
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
def test_stop_strings_are_found_in_any_tokenization_and_ids_stay_as_sampled(pieces):
    tok = tokenizer()
    encode = ContentEncoder(tok)
    special = tok.convert_tokens_to_ids(pieces[0])
    ids = [special] if len(pieces) == 1 else [token for piece in pieces for token in encode(piece)]
    tail = tok.encode(" never written", add_special_tokens=False)
    model = tiny_model()
    made = engine(model, stop=["</search>", "</python>"], temperature=0.0)
    script(model, ids + tail)
    turns, _ = finish(made, [TurnRequest(id=0, ids=PROMPTS[0], max_tokens=60, probe_tokens=5, seed=1, key=(0,))])
    assert turns[0].stop is TurnStop.STOP_STRING
    text = tok.decode(turns[0].ids)
    # ids are exactly those sampled up to the token that completes the stop string
    assert turns[0].ids == (ids + tail)[: len(turns[0].ids)]
    assert "</search>" in text
    assert "</search>" not in tok.decode(turns[0].ids[:-1])


def test_a_token_that_may_end_a_stop_string_transfers_no_more_of_a_longer_turn(monkeypatch):
    """A turn of 40 tokens, each of which could end `</search>`, with room for 60 tokens or for 600."""
    (token,) = ContentEncoder(tokenizer())(">")
    moved = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: moved.append(tensor.numel()) or tolist(tensor))
    counts = []
    for room in (60, 600):
        model = tiny_model()
        made = engine(model, stop=["</search>"], temperature=0.0)
        script(model, [token] * 39 + [tokenizer().eos_token_id])
        moved.clear()
        request = TurnRequest(id=0, ids=PROMPTS[0], max_tokens=room, probe_tokens=5, seed=1, key=(0,))
        turns, probes = finish(made, [request])
        assert turns[0].ids == [token] * 39 + [tokenizer().eos_token_id]
        assert len(turns[0].logprobs) == 40
        assert probes[0].entropies == turns[0].entropies
        counts.append(sum(moved))
    # A step transfers the row, six facts and 11 ids: nine characters and two; an event the 40 tokens and 5 entropies.
    assert counts[0] == counts[1] <= 40 * (1 + 6 + 11) + 2 * 40 + 2 * 5


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


def test_polling_outside_a_session_is_an_error(model):
    with pytest.raises(EngineError, match="session"):
        engine(model).poll(0.0)


def test_a_turn_may_have_one_token(model):
    request = TurnRequest(id=0, ids=PROMPTS[0], max_tokens=1, probe_tokens=5, seed=1, key=(0,))
    turns, _ = finish(engine(model), [request])
    assert len(turns[0].ids) == len(turns[0].logprobs) == 1


def test_a_request_without_room_is_refused(model):
    with pytest.raises(EngineError, match="expected at least 1 of each"):
        engine(model).submit(TurnRequest(id=0, ids=PROMPTS[0], max_tokens=0, probe_tokens=5, seed=1, key=(0,)))


def test_a_session_that_fails_leaves_nothing_behind(model):
    made = engine(model)
    with pytest.raises(RuntimeError), made.session():
        made.submit(requests([0])[0])
        raise RuntimeError
    with made.session():
        assert made.poll(0.0) == []


# Memory --------------------------------------------------------------------------------------------------------------


def holding(made, request=0):
    """Weak references to all that a session holds after two steps of a turn, one of it kept for others."""
    made.submit(requests([request])[0])
    made.poll(0.0)
    made.poll(0.0)
    cache, state = made._cache, made._state
    made._retained.keep(99, cache.read(0, 4))
    kept = [states for layer in made._retained.layers(99) for states in layer]
    buffers = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert len(buffers) == len(kept) == 2 * 2  # two layers' keys and values
    return [weakref.ref(tensor) for tensor in (*buffers, *kept, state.uniforms)]


def test_a_session_frees_its_buffers_when_it_closes_without_waiting_for_the_garbage_collector(model):
    made = engine(model)
    gc.disable()
    try:
        with made.session():
            held = holding(made)
        assert all(tensor() is None for tensor in held)
    finally:
        gc.enable()


def test_a_session_that_fails_frees_its_buffers_while_its_traceback_lives(model):
    made = engine(model)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="somewhere in the model") as failed, made.session():
            held = holding(made)
            layer = made._cache.layers[0]  # which the traceback keeps, as it would the frames of the model's forward
            raise RuntimeError("somewhere in the model")
        assert failed.value.__traceback__ is not None
        assert layer.nbytes == 0
        assert all(tensor() is None for tensor in held)
    finally:
        gc.enable()


def test_a_rollout_beyond_memory_is_an_error_before_it_with_its_size_and_the_settings_to_lower(monkeypatch):
    # two layers × 2 (keys, values) × 1 head × 16 × 4 bytes: 128 bytes for each row, position and layer
    made = engine(tiny_model(), smaller="Lower this and that.")
    monkeypatch.setattr(slots, "free_bytes", lambda device: 128 * 4 * 128 - 1)
    asked = [
        TurnRequest(id=i, ids=PROMPTS[0], max_tokens=128 - len(PROMPTS[0]), probe_tokens=4, seed=i, key=(i,))
        for i in range(4)
    ]
    needed = r"needs 0\.00 GiB on cpu for the keys and values of 4 rows × 128 positions × 2 layers"
    with made.session():
        for request in asked:
            made.submit(request)
        with pytest.raises(EngineError, match=rf"{needed}.* 0\.00 GiB are free\. Lower this and that\."):
            made.poll(0.0)
    with made.session():  # three rows are reserved as four, unless no more than three can ever be asked for
        for request in asked[:3]:
            made.submit(request)
        with pytest.raises(EngineError, match=needed):
            made.poll(0.0)
    made = engine(tiny_model(), most_rows=3)
    with made.session():
        for request in asked[:3]:
            made.submit(request)
        made.poll(0.0)
        assert made._cache.nbytes == 128 * 3 * 128 * 2


def test_a_trainers_rollout_without_room_names_the_settings_to_lower(tmp_path, monkeypatch):
    rows = Dataset.from_list([{"prompt": f"the melting point of {i}", "answer": ["1"]} for i in range(4)])
    made = sampling_trainer(tiny_model(), tmp_path, rows, gradient_accumulation_steps=2)
    monkeypatch.setattr(slots, "free_bytes", lambda device: 1000)
    lower = (
        r"0\.00 GiB are free\. Lower per_device_train_batch_size × steps_per_generation \(8 × 2 completions .*\), "
        r"per_device_eval_batch_size \(16\) or max_completion_length \(24\), or let vLLM sample"
    )
    with pytest.raises(EngineError, match=lower):
        made.train()


def test_running_out_of_memory_is_an_error_with_a_remedy(model):
    made = engine(model, smaller="Lower this and that.")

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with made.session():
        made.submit(requests([0])[0])
        made.poll(0.0)
        hook = model.lm_head.register_forward_hook(forward)
        try:
            with pytest.raises(
                EngineError, match=r"Memory on cpu ran out .* GiB \(CUDA out .*\)\. Lower this and that"
            ):
                made.poll(0.0)
        finally:
            hook.remove()


def test_memory_that_a_cpu_does_not_have_is_the_same_error(model):
    made = engine(model)
    with made.session():
        made.submit(
            TurnRequest(id=0, ids=PROMPTS[0], max_tokens=1 << 45, probe_tokens=4, seed=0, key=(0,))
        )  # 128 TiB for its random numbers alone
        with pytest.raises(
            EngineError, match=r"Memory on cpu ran out .*Sample fewer turns at a time, or shorter ones"
        ):
            made.poll(0.0)


def test_the_memory_of_sampling_is_logged_once_and_as_a_warning_if_large(model, monkeypatch, caplog):
    # 4 rows × 32 positions × 2 layers × 128 bytes = 32 KiB, and 1 GiB of finished turns at the most
    said = r"4 rows × 32 positions × 2 layers × 128 bytes = 0\.00 GiB on cpu, and finished turns .* 1\.00 GiB"
    for free, level in ((1 << 40, "INFO"), (1 << 30, "WARNING")):
        made = engine(model, most_rows=4)
        monkeypatch.setattr(transformers_engine, "free_bytes", lambda device, free=free: free)
        caplog.clear()
        with caplog.at_level("INFO", logger=transformers_engine.__name__):
            finish(made, requests([0]))
            finish(made, requests([1]))
        lines = [record for record in caplog.records if re.search(said, record.getMessage())]
        assert [record.levelname for record in lines] == [level]


@pytest.mark.parametrize("bounds", [{"PREFILL_PAIRS": 300}, {"PREFILL_TOKENS": 10}, {"PREFILL_PAIRS": 1}])
def test_a_prefill_is_read_in_parts_that_stay_within_its_bounds(model, monkeypatch, bounds):
    whole, _ = run(model, requests())
    for name, bound in bounds.items():
        monkeypatch.setattr(transformers_engine, name, bound)
    made = engine(model)
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((kwargs["input_ids"].shape, kwargs["attention_mask"].shape)),
        with_kwargs=True,
    )
    try:
        parts, _ = finish(made, requests())
    finally:
        hook.remove()
    prefills = [(ids, mask) for ids, mask in read if ids[1] > 1]
    assert all(ids.numel() <= bounds.get("PREFILL_TOKENS", 1 << 20) for ids, _ in prefills)
    # a mask is as wide as a block of 32 keys at the least
    assert all(mask.numel() <= bounds.get("PREFILL_PAIRS", 1 << 20) * 32 for _, mask in prefills)
    assert {i: turn.ids for i, turn in parts.items()} == {i: turn.ids for i, turn in whole.items()}
    for i, turn in parts.items():
        torch.testing.assert_close(torch.tensor(turn.logprobs), torch.tensor(whole[i].logprobs), atol=1e-5, rtol=0)


def test_buffers_and_masks_grow_in_blocks_up_to_the_maximum_number_of_rows():
    cache = slots.SlotCache(1, most_rows=6, way_out="")
    sizes = []
    for rows, positions in ((1, 10), (3, 64), (5, 65), (6, 200), (7, 200)):
        cache.reserve(rows, positions)
        sizes.append((cache.max_rows, cache.max_positions))
    assert sizes == [(1, 32), (4, 64), (6, 96), (6, 224), (8, 224)]
    cache.aim(slice(0, 1), torch.zeros(1, 1, dtype=torch.long), 65)
    assert cache.length == 96


def test_prompts_of_one_token_are_sampled_together(model):
    same = [TurnRequest(id=i, ids=PROMPTS[0][:1], max_tokens=6, probe_tokens=2, seed=i, key=(i,)) for i in range(3)]
    turns, _ = run(model, same)
    for i in range(3):
        assert run(model, same[i : i + 1])[0][i].ids == turns[i].ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_its_memory_back_after_a_session():
    made = engine(tiny_model().to("cuda"))
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    finish(made, requests())
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert all(now <= then + (1 << 20) for now, then in zip(after, before, strict=True))  # a kernel kept 1 KiB


# Autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_logprobs_are_those_of_a_full_forward_under_it(dtype, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)

    @contextlib.contextmanager
    def autocast(model):
        with torch.autocast("cpu", dtype=dtype):
            yield model

    turns, _ = run(model, requests(), context=autocast)
    off = []
    for i, turn in turns.items():
        with torch.autocast("cpu", dtype=dtype):
            expected = reference(model, PROMPTS[i], turn.ids)
        chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        off.append((torch.tensor(turn.logprobs) - chosen).abs())
    assert torch.cat(off).mean() < 0.02


# What is kept --------------------------------------------------------------------------------------------------------


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
            first = next(event for event in events_of(made, 1) if isinstance(event, Turn))
            assert first.stop is (TurnStop.STOP_STRING if by_tag else TurnStop.EOS)
            read.clear()
            ids = PROMPTS[0] + first.ids + tok.encode(" a result of some length")
            for i in (1, 2):  # the turn that goes on, and its branch
                made.submit(TurnRequest(id=i, ids=ids, max_tokens=10, probe_tokens=5, seed=i, key=(0, i), after=0))
            turns = {event.id: event for event in events_of(made, 2) if isinstance(event, Turn)}
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


def test_a_turn_that_continues_after_a_stop_string_reads_nothing_again(model, monkeypatch):
    last = run(model, requests([0]))[0][0].ids[6]
    made = engine(model, stop=[tokenizer().decode([last])])
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        with made.session():
            made.submit(requests([0])[0])
            first = next(event for event in events_of(made, 1) if isinstance(event, Turn))
            read.clear()
            ids = PROMPTS[0] + first.ids
            made.submit(TurnRequest(id=1, ids=ids, max_tokens=5, probe_tokens=2, seed=3, key=(0, 0), after=0))
            rest = next(event for event in events_of(made, 1) if isinstance(event, Turn))
    finally:
        hook.remove()
    assert set(read) == {(1, 1)}  # no prefill
    turn = first.followed_by(rest)
    expected = reference(model, PROMPTS[0], turn.ids)
    chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-4, rtol=1e-4)


def test_equal_prompts_are_read_once(model):
    made = engine(model)
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        same = [
            TurnRequest(id=i, ids=PROMPTS[3], max_tokens=12, probe_tokens=5, seed=100 + i, key=(i,)) for i in range(4)
        ]
        turns, _ = finish(made, same)
    finally:
        hook.remove()
    assert read[0] == (1, len(PROMPTS[3]) - 1)
    for i in range(4):
        alone, _ = run(model, same[i : i + 1])
        assert alone[i].ids == turns[i].ids
    assert len({tuple(turn.ids) for turn in turns.values()}) == 4
