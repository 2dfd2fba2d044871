"""The quickstart's corpus, questions, demonstrations, tokenizer and model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from arpo_trl.common.shipped import CONFIGS, shipped_file
from arpo_trl.errors import ConfigError
from arpo_trl.quickstart import stages
from arpo_trl.quickstart.__main__ import _arguments, main
from arpo_trl.quickstart.corpus import ALIASES, TOPICS, Quantity, passages
from arpo_trl.quickstart.demonstrations import NO_NOISE, Failures, NoiseRates, make_demonstrations
from arpo_trl.quickstart.heldout import score_of
from arpo_trl.quickstart.model import TAGS, build_model, build_tokenizer, quickstart_texts, save_cold_start_base
from arpo_trl.quickstart.report import accuracy_lines
from arpo_trl.quickstart.stages import _tree_to_show
from arpo_trl.quickstart.task import Measured, read_lines, write_lines
from arpo_trl.quickstart.tasks import make_tasks, parse_question
from arpo_trl.tools.python import sandbox
from arpo_trl.tools.search.index import LocalIndex, search_tool
from support import until
from test_view import logged, save


@pytest.fixture(scope="module")
def search() -> Callable[[str], str]:
    return search_tool(LocalIndex(passages()), top_k=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(quickstart_texts())


def task(question: str, answer: str = "") -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": question}], "answer": [answer], "task": "math", "id": "x"}


def calls(row: dict[str, Any], tool: str) -> list[str]:
    """What the demonstration passed to `tool`, call by call."""
    turns = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return [
        turn.removeprefix(f"<{tool}>").removesuffix(f"</{tool}>") for turn in turns if turn.startswith(f"<{tool}>")
    ]


def boxed(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"].removeprefix("<answer>\\boxed{").removesuffix("}</answer>")


def run(code: str) -> str:
    """What CPython prints, for code that this project wrote itself."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().strip()


# --- corpus ---


def test_only_a_line_feed_ends_a_line_of_the_data(tmp_path):
    rows = ["one\u2028line", {"another": "\x85one"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert read_lines(tmp_path / "rows.jsonl") == rows


def test_the_corpus_is_some_hundred_distinct_sentences_and_always_the_same() -> None:
    texts = passages()
    assert 300 <= len(texts) == len(set(texts)) <= 600
    assert all(text.endswith(".") and "\n" not in text for text in texts)
    assert texts == passages()


def test_every_alias_points_to_an_entity_and_is_not_an_entity() -> None:
    titles = {title for topic in TOPICS for title in topic.titles}
    assert set(ALIASES.values()) <= titles
    assert titles.isdisjoint(ALIASES)


def test_a_search_finds_both_passages_of_an_entity_in_either_order(
    search: Callable[[str], str],
) -> None:
    for topic in TOPICS:
        asked_page: Counter[int] = Counter()
        for title in topic.titles:
            pages = [line.partition(": ")[2] for line in search(f"{topic.asked} of {title}").split("\n")]
            asked = topic.asked_sentence.format(title, topic.asked_quantities[title])
            other = topic.other_sentence.format(title, topic.other_quantities[title])
            assert sorted(pages) == sorted([asked, other])
            asked_page[pages.index(asked)] += 1
        assert min(asked_page[0], asked_page[1]) >= len(topic.titles) / 5


def test_a_search_for_an_alias_finds_only_where_to_look(search: Callable[[str], str]) -> None:
    assert search("melting point of Stannum") == "Page 1: Stannum is only another name; look under Tin."
    for alias, title in ALIASES.items():
        assert search(alias) == f"Page 1: {alias} is only another name; look under {title}."


@pytest.mark.parametrize(
    ("quantity", "expression", "value"),
    [
        (Quantity("232", " °C"), "232", 232),
        (Quantity("505", " K"), "(505-273)", 232),  # 505 − 273
        (Quantity("1000", " ft"), "1000*0.3048", 304.8),
        (Quantity("2.38", " million km²"), "2.38*1000", 2380),
        (Quantity("1953", ""), "1953", 1953),
    ],
)
def test_a_quantity_converts_as_its_python_does(quantity: Quantity, expression: str, value: float) -> None:
    assert quantity.expression == expression
    assert quantity.converted == pytest.approx(value)
    assert quantity.converted == eval(expression)
    assert quantity.needs_conversion == (quantity.unit in (" K", " ft", " million km²"))


# --- tasks ---


def test_train_and_heldout_questions_share_no_pair_of_entities() -> None:
    def pair(row: dict[str, Any]) -> frozenset[str]:
        question = parse_question(row["prompt"][0]["content"])
        return frozenset(ALIASES.get(name, name) for name in (question.first, question.second))

    train, heldout = make_tasks(seed=0, n_train=2400, n_heldout=600)
    assert (len(train), len(heldout)) == (2400, 600)
    pairs = [pair(row) for row in train + heldout]
    assert len(set(pairs)) == 3000
    assert all(len(names) == 2 for names in pairs)
    assert len({row["id"] for row in train + heldout}) == 3000


def test_questions_are_of_every_topic_both_operations_and_often_need_more_than_two_searches() -> None:
    questions = [parse_question(row["prompt"][0]["content"]) for row in make_tasks(1, 1000, 0)[0]]
    assert {question.asked for question in questions} == {"melting point", "height", "area"}
    assert 400 < sum(question.operation == "plus" for question in questions) < 600
    assert 150 < sum(question.first in ALIASES or question.second in ALIASES for question in questions) < 500


def test_the_same_seed_makes_the_same_tasks_and_another_seed_others() -> None:
    assert make_tasks(3, 50, 10) == make_tasks(3, 50, 10)
    assert make_tasks(3, 50, 10) != make_tasks(4, 50, 10)


def test_more_tasks_than_pairs_is_an_error_with_the_number_of_pairs() -> None:
    with pytest.raises(ConfigError, match=r"n_train \(5000\) \+ n_heldout \(400\) is more than the \d+ pairs"):
        make_tasks(0, 5000, 400)


def test_text_in_another_form_is_not_a_question() -> None:
    with pytest.raises(ValueError, match="Not a quickstart question: 'How high is Denali\\?'"):
        parse_question("How high is Denali?")


# --- demonstrations ---


@pytest.mark.slow
def test_every_question_can_be_solved_with_the_tools_in_at_most_five_calls(search: Callable[[str], str]) -> None:
    train, heldout = make_tasks(seed=0, n_train=2400, n_heldout=600)
    tasks = train + heldout
    for row, solved in zip(tasks, make_demonstrations(tasks, search, 0, len(tasks), NO_NOISE), strict=True):
        searches, (code,) = calls(solved, "search"), calls(solved, "python")
        results = {message["content"] for message in solved["messages"] if message["role"] == "tool"}
        assert results == {search(query) for query in searches} | {run(code)}
        assert 2 <= len(searches) <= 4
        assert boxed(solved) == run(code) == row["answer"][0]


def test_an_alias_and_a_foreign_unit_are_resolved(search: Callable[[str], str]) -> None:
    # The corpus gives the melting points of tungsten and tin, 3422 and 232 °C, in °C or in K.
    tungsten, tin = (TOPICS[0].asked_quantities[name] for name in ("Tungsten", "Tin"))
    (solved,) = make_demonstrations(
        [task("melting point of Wolfram minus that of Tin in °C?")], search, 0, 1, NO_NOISE
    )
    assert calls(solved, "search") == ["melting point of Wolfram", "melting point of Tungsten", "melting point of Tin"]
    assert calls(solved, "python") == [f"print(round({tungsten.expression}-{tin.expression}))"]
    assert boxed(solved) == "3190"  # 3422 − 232
    assert [message["role"] for message in solved["messages"]] == ["user", *(["assistant", "tool"] * 4), "assistant"]
    assert {message["name"] for message in solved["messages"] if message["role"] == "tool"} == {"search", "python"}


def test_each_kind_of_noise_makes_its_own_mistake(search: Callable[[str], str]) -> None:
    def demonstrate(question: str, **noise: float) -> dict[str, Any]:
        rates = {name: noise.get(name, 0.0) for name in NoiseRates.__dataclass_fields__}
        return make_demonstrations([task(question)], search, 0, 1, NoiseRates(**rates))[0]

    in_kelvin = [name for name, quantity in TOPICS[0].asked_quantities.items() if quantity.unit == " K"]
    first, second = in_kelvin[:2]
    a, b = (TOPICS[0].asked_quantities[name].digits for name in (first, second))
    question = f"melting point of {first} plus that of {second} in °C?"
    boiling = [TOPICS[0].other_quantities[name].expression for name in (first, second)]

    assert calls(demonstrate(question), "python") == [f"print(round(({a}-273)+({b}-273)))"]
    assert calls(demonstrate(question, forget_unit=1.0), "python") == [f"print(round({a}+{b}))"]
    assert calls(demonstrate(question, wrong_operation=1.0), "python") == [f"print(round(({a}-273)-({b}-273)))"]
    assert calls(demonstrate(question, wrong_snippet=1.0), "python") == [f"print(round({boiling[0]}+{boiling[1]}))"]

    hasty = demonstrate(question, answer_directly=1.0)
    assert calls(hasty, "python") == []
    assert boxed(hasty) == a

    skipping = demonstrate("height of McKinley plus that of Eiger in m?", skip_second_query=1.0)
    assert calls(skipping, "search") == ["height of McKinley", "height of Eiger"]
    eiger = TOPICS[1].asked_quantities["Eiger"].expression
    assert calls(skipping, "python") == [f"print(round(1858+{eiger}))"]  # the other number on the Eiger's pages


def test_with_the_default_noise_about_a_third_of_the_demonstrations_is_right(search: Callable[[str], str]) -> None:
    tasks, _ = make_tasks(seed=0, n_train=1500, n_heldout=0)
    rows = make_demonstrations(tasks, search, 0, 1500)
    assert 0.25 < sum(boxed(row) == t["answer"][0] for row, t in zip(rows, tasks, strict=True)) / 1500 < 0.45


FAILURES = {"search": ["search: down", "search: late"], "python": ["python: down"]}


def test_a_failed_call_is_retried_until_it_succeeds(search: Callable[[str], str]) -> None:
    tasks, _ = make_tasks(seed=0, n_train=300, n_heldout=0)
    rows = make_demonstrations(tasks, search, 0, 300, NO_NOISE, Failures(rate=0.3, texts=FAILURES))
    made: Counter[str] = Counter()
    for row, solved in zip(tasks, rows, strict=True):
        assert boxed(solved) == row["answer"][0]
        messages = solved["messages"]
        for call, result, following in zip(messages[1::2], messages[2::2], messages[3::2], strict=False):
            made[result["content"] if result["content"].startswith(result["name"]) else "useful"] += 1
            if result["content"] in FAILURES[result["name"]]:
                assert following == call
    # Each of the 300 paths needs 3 to 5 useful calls, and of all calls 0.3 fail.
    assert 0.27 < 1 - made["useful"] / made.total() < 0.33
    assert set(made) == {"useful", "search: down", "search: late", "python: down"}


def test_a_policy_that_gives_up_on_every_failure_solves_nothing(search: Callable[[str], str]) -> None:
    noise = dataclasses.replace(NO_NOISE, give_up=1.0)
    question = task("melting point of Wolfram minus that of Tin in °C?")
    failures = Failures(rate=1.0, texts={**FAILURES, "search": ["down"]})
    (row,) = make_demonstrations([question], search, 0, 1, noise, failures)
    assert calls(row, "search") == ["melting point of Wolfram", "melting point of Tin"]
    assert calls(row, "python") == ["print(round(0-0))"]
    assert [m["content"] for m in row["messages"] if m["role"] == "tool"] == ["down", "down", "python: down"]
    assert boxed(row) == "0"


def test_where_no_call_fails_the_demonstrations_are_those_without_failures(search: Callable[[str], str]) -> None:
    tasks, _ = make_tasks(seed=0, n_train=40, n_heldout=0)
    rows = make_demonstrations(tasks, search, 0, 40)
    never = Failures(rate=0.0, texts=FAILURES)
    assert make_demonstrations(tasks, search, 0, 40, NoiseRates(give_up=1.0), never) == rows


def test_the_same_seed_makes_the_same_demonstrations_and_a_second_round_makes_fresh_mistakes(
    search: Callable[[str], str],
) -> None:
    tasks, _ = make_tasks(seed=0, n_train=40, n_heldout=0)
    rows = make_demonstrations(tasks, search, 5, 80)
    assert rows == make_demonstrations(tasks, search, 5, 80)
    assert rows != make_demonstrations(tasks, search, 6, 80)
    assert [row["messages"][0] for row in rows[:40]] == [row["messages"][0] for row in rows[40:]]
    assert rows[:40] != rows[40:]


# --- tokenizer ---


@pytest.mark.parametrize(
    "text", ["Tin melts at 505 K.", "  two\n\n spaces\t", "emoji 🧪, 漢字, ﬁ", "".join(map(chr, range(256))), ""]
)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tags_are_special_tokens_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    for tag in TAGS:
        assert tokenizer.encode(tag) == [tokenizer.convert_tokens_to_ids(tag)]
        assert tag in tokenizer.all_special_tokens
    assert len(tokenizer.encode("14692")) == 5
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) <= 1000


def test_the_chat_template_renders_every_role_in_few_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "tool")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "".join(
        f"<|im_start|>{role}\n{role[0]}<|im_end|>" for role in ("system", "user", "assistant", "tool")
    ) + ("<|im_start|>assistant\n")
    prompt = [{"role": "user", "content": "height of Denali plus that of Hood in m?"}]
    # <|im_start|> user ⏎ height _of _Denali _plus _that _of _Hood _in _m ? <|im_end|> <|im_start|> assistant ⏎
    assert len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) == 17


# --- settings ---


@pytest.mark.parametrize(
    ("task", "config", "said"),
    [
        ("search", "quickstart_shop", "it is one of arpo-trl quickstart --task shop."),
        ("shop", "quickstart", "it is one of arpo-trl quickstart --task search."),
        ("search", "branch_treshold: 0.5", "There is no setting 'branch_treshold'; did you mean 'branch_threshold'?"),
        ("search", "learning_rate: fast", "learning_rate is 'fast'; expected"),
        ("search", "num_generations: 8\nenv: {ARPO_TEST: a}\ninitial_rollouts: 9", "initial_rollouts"),
    ],
)
def test_settings_of_stage_2_that_it_would_refuse_are_found_before_stage_1(
    tmp_path: Path, task: str, config: str, said: str
) -> None:
    file = tmp_path / "mine.yaml"
    if ":" in config:
        file.write_text(config, "utf-8")
    else:
        file = shipped_file(CONFIGS, config)
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=re.escape(said)):
        stages.run(task, tmp_path / "out", seed=0, config=file)
    assert not (tmp_path / "out").exists()
    assert os.environ == before


# --- model ---


def test_the_model_is_tiny_and_the_same_for_the_same_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    state = torch.get_rng_state()
    model, same, other = (build_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert 0.3e6 < model.num_parameters() < 0.7e6
    assert model.config.max_position_embeddings == 4096
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_an_untrained_model_prefers_tokens_that_followed_the_same_tokens_before(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # ids: r0 … r19 r0 … r19, so that from the second r1 on, the next token is known to one who copies.
    generator = torch.Generator().manual_seed(0)
    model = build_model(tokenizer, seed=0).eval()
    with torch.no_grad():
        ranks = []
        for _ in range(20):
            once = torch.randperm(len(tokenizer), generator=generator)[:20]
            logits = model(torch.cat([once, once])[None]).logits[0, 21:39]
            right = logits.gather(1, once[2:, None])
            ranks.append((logits > right).sum(1))
    # Without copying, a token's rank is spread evenly over the vocabulary of 1,000: a median near 500.
    assert torch.cat(ranks).median() < 100


def test_the_saved_base_loads_like_any_checkpoint(tmp_path: Path) -> None:
    save_cold_start_base(tmp_path, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = build_model(tokenizer, seed=2)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, expected.model.layers[1].self_attn.q_proj.weight)
    assert tokenizer.chat_template is not None
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.encode("</search>") == [tokenizer.convert_tokens_to_ids("</search>")]


# --- held-out questions ---


def test_held_out_accuracy_counts_a_bad_format_as_wrong_and_other_answers_by_their_task() -> None:
    records = [
        {"fault": None, "scores": {"math": 1.0, "em": 0.0}},
        {"fault": "truncated", "scores": {"math": 1.0, "em": 1.0}},
        {"fault": None, "scores": {"f1": 0.5, "f1_paper": 0.25, "em": 0.0}},
        {"fault": None, "scores": {"math": 0.0, "em": 0.0}},
    ]
    measured = Measured(trees=[], scores=[score_of(record) for record in records])
    assert measured.accuracy == 0.375  # (1 + 0 + 0.5 + 0) / 4


# --- command ---


def test_without_isolation_only_the_shop_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "ISOLATING", (sandbox.Tier.UNSAFE,))
    monkeypatch.setattr(stages, "run", lambda task, *_, **__: started.append(task))
    monkeypatch.setattr("sys.argv", ["arpo-trl quickstart"])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("SandboxError: unsafe: the sandbox does not isolate") and line.endswith("--task shop.")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.argv", ["arpo-trl quickstart", "--task", "shop"])
    main()
    assert started == ["shop"]


@pytest.mark.slow
def test_a_stage_that_fails_ends_in_the_line_of_its_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        stages.launch("sft", stages.SFT_CONFIG, "--max_steps", "two")
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert said.endswith("\nConfigError: max_steps is 'two'; expected an integer.\n")


ENDLESS = """
from functools import partial
from arpo_trl.cli import main
from arpo_trl.quickstart import stages
stages.N_DEMONSTRATIONS = 64
stages.TASKS["search"] = stages.replace(stages.SEARCH, prepare=partial(stages.prepare, n_train=8, n_heldout=2))
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of processes as on Linux")
def test_a_terminated_quickstart_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDLESS, "quickstart", "--output", str(tmp_path / "q")]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []

    def trains() -> bool:
        assert process.poll() is None
        family[:] = process.children(recursive=True)
        return any(each.cmdline()[1:3] == ["-m", "arpo_trl.scripts.sft"] for each in family)

    try:
        until(trains, 120.0)
        process.terminate()
        assert process.wait(60.0) == 128 + signal.SIGTERM
        assert psutil.wait_procs(family, timeout=60.0)[1] == []
    finally:
        for each in (*family, process):
            with contextlib.suppress(psutil.Error):
                each.kill()


# --- report ---


@pytest.mark.parametrize(
    ("words", "overwrites"), [([], False), ([""], True), (["true"], True), (["True"], True), (["false"], False)]
)
def test_an_earlier_quickstart_is_overwritten_with_or_without_the_word_true(
    words: list[str], overwrites: bool
) -> None:
    flag = ["--overwrite_output_dir", *filter(None, words)] if words else []
    assert _arguments([*flag, "--seed", "1"]).overwrite_output_dir is overwrites


def test_each_set_of_questions_has_a_line_of_its_own() -> None:
    history = [{"step": 1, "reward": 0.5}, {"step": 1, "eval_arpo/accuracy": 0.9}, {"step": 2, "reward": 0.75}]
    summary = {"accuracy_before": 0.25, "accuracy_after": 0.75}
    whole, watched = "accuracy, all held-out questions", "accuracy, those watched in training"
    assert accuracy_lines(history, summary) == {whole: [(0, 0.25), (2, 0.75)], watched: [(1, 0.9)]}
    assert accuracy_lines(history[:1], summary) == {whole: [(0, 0.25), (1, 0.75)]}


def test_the_tree_that_is_shown_forks_even_if_later_ones_do_not(tmp_path: Path) -> None:
    assert _tree_to_show(tmp_path / "trajectories") is None
    for step, text, rewards in (
        (1, "iron", [1.0, -1.0]),
        (2, "gold", [1.0, -1.0]),
        (3, "lead", [1.0, 1.0]),
        (4, "cut off", [1.0, -1.0]),  # both turns after the result are "cut off"
    ):
        save(tmp_path, dataclasses.replace(logged(step, text=text), rewards=rewards), name=f"step-00000{step}")
    shown = _tree_to_show(tmp_path / "trajectories")
    assert shown is not None and shown.step == 2  # the last one with two different turns and two rewards
    for step in (1, 2):
        (tmp_path / f"trajectories/step-00000{step}-rank0.jsonl").unlink()
    shown = _tree_to_show(tmp_path / "trajectories")
    assert shown is not None and shown.step == 3  # a fork before different rewards
