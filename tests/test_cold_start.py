import copy
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from arpo_trl.common.adapters import base_revision
from arpo_trl.data.demonstrations import IGNORED, encode_dataset, encode_trajectory, has_text_prompts
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.publishing.merging import merge_adapter
from arpo_trl.rewards.hierarchical import format_fault
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.scripts.sft import ColdStartArguments
from support import Scripted, save_tiny_model, script, small_model, tokenizer, with_template, without_a_layer

QUESTION = [{"role": "user", "content": "what is the answer"}]
TURNS = ["<think>look</think><search>iron</search>", "<python>print(1)</python>", "so <answer>\\boxed{1}</answer>"]
RESULTS = ["facts about iron", "ran print(1)"]  # what support's tools return for these calls
MESSAGES = [
    *QUESTION,
    {"role": "assistant", "content": TURNS[0]},
    {"role": "tool", "content": RESULTS[0]},
    {"role": "assistant", "content": TURNS[1]},
    {"role": "tool", "content": RESULTS[1]},
    {"role": "assistant", "content": TURNS[2]},
]
EOS = tokenizer().eos_token_id


def protocol(max_result_tokens: int | None = None) -> TagProtocol:
    return TagProtocol(tokenizer(), {}, max_result_tokens=max_result_tokens)


def encoded(**row) -> dict[str, list[int]]:
    return encode_trajectory(row, protocol())


def decoded(ids: Sequence[int]) -> str:
    return tokenizer().decode(list(ids), clean_up_tokenization_spaces=False)


def runs(row: dict[str, list[int]]) -> list[tuple[bool, str]]:
    """The row's text in stretches: (whether it carries loss, text)."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not stretches or stretches[-1][0] != learned:
            stretches.append((learned, []))
        stretches[-1][1].append(token)
    return [(learned, decoded(ids)) for learned, ids in stretches]


def test_only_the_models_tokens_are_in_the_loss():
    row = encoded(messages=MESSAGES)
    # ids:     prompt | turn | result | turn | result | turn EOS
    # learned:   no      yes     no      yes     no       yes
    assert runs(row) == [
        (False, "<|im_start|>user\nwhat is the answer<|im_end|><|im_start|>assistant\n"),
        (True, TURNS[0]),
        (False, f"\n<result>\n{RESULTS[0]}\n</result>\n"),
        (True, TURNS[1]),
        (False, f"\n<result>\n{RESULTS[1]}\n</result>\n"),
        (True, TURNS[2] + "<|im_end|>"),
    ]


def test_a_label_is_its_token_or_ignored():
    row = encoded(messages=MESSAGES)
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)


def test_eos_is_learned_once_after_the_last_turn():
    row = encoded(messages=MESSAGES)
    assert row["labels"].count(EOS) == 1
    assert row["labels"][-1] == row["input_ids"][-1] == EOS


def test_what_is_learned_is_what_the_sampler_samples_token_for_token():
    # A model that writes the demonstration's turns gets, from the same tools, the demonstration's ids.
    run = Scripted(lambda request, context: TURNS[request.key[-1]], leaves=1, at_root=1)
    tree = run().trees[0]
    leaf = tree.leaves()[0]
    row = encoded(messages=MESSAGES)
    assert row["input_ids"] == tree.root.ids + leaf.ids
    assert [int(label != IGNORED) for label in row["labels"]] == [0] * len(tree.root.ids) + leaf.mask


OPENING = ["qwen3_5_think", "deepseek_r1_distill", "nemotron_3_nano"]
"""Templates that open the thought: each prompt ends with `<think>\\n`."""


@pytest.mark.parametrize("template", OPENING)
@pytest.mark.parametrize("written", [" <think>\n", "<think>", ""], ids=["spaced", "tagged", "continued"])
def test_a_thought_that_the_template_opens_is_not_opened_again(template, written):
    turns = ["look</think><search>iron</search>", "<think>so</think><answer>\\boxed{1}</answer>"]
    run = Scripted(lambda request, context: turns[request.key[-1]], leaves=1, at_root=1, template=template)
    tree = run().trees[0]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": written + turns[0]},
        {"role": "tool", "content": RESULTS[0]},
        {"role": "assistant", "content": turns[1]},
    ]
    row = encode_trajectory({"messages": messages}, TagProtocol(run.tokenizer, {}))
    leaf = tree.leaves()[0]
    assert row["input_ids"] == tree.root.ids + leaf.ids
    whole = run.protocol.whole_turns(tree.root.ids, leaf)
    assert whole == [f"<think>{turns[0]}", turns[1]]
    assert format_fault(whole, "eos", ["search"]) is None


def test_a_thought_that_the_template_opens_may_go_on_after_a_call():
    text = "<think>look <search>iron</search><result>1538</result>so</think><answer>\\boxed{1}</answer>"
    row = encode_trajectory({"prompt": QUESTION, "text": text}, TagProtocol(with_template(OPENING[0]), {}))
    assert decoded(row["input_ids"]).count("<think>") == 1


@pytest.mark.parametrize("turn", [TURNS[2], f"I think. <think>look</think>{TURNS[2]}"])
def test_a_first_turn_without_the_thought_that_the_template_opens_is_an_error(turn):
    rows = Dataset.from_list([{"prompt": QUESTION, "text": f"<think>look</think>{TURNS[2]}"}, {**ROW, "text": turn}])
    with pytest.raises(DataError, match=r"row 1: the prompt ends with an open <think>.*first turn is .*Add it"):
        encode_dataset(rows, TagProtocol(with_template(OPENING[0]), {}), None, "me/rows")


def test_a_long_result_is_capped_as_in_sampling():
    long = "facts about iron " * 9

    def search(query: str) -> str:
        """Search.

        Args:
            query: What.
        """
        return long

    run = Scripted(
        lambda request, context: [TURNS[0], TURNS[2]][request.key[-1]],
        leaves=1,
        at_root=1,
        tools=[search],
        max_result_tokens=24,
    )
    tree = run().trees[0]
    messages = [*MESSAGES[:2], {"role": "tool", "content": long}, MESSAGES[-1]]
    row = encode_trajectory({"messages": messages}, protocol(max_result_tokens=24))
    assert "[… cut …]" in runs(row)[2][1]
    assert row["input_ids"] == tree.root.ids + tree.leaves()[0].ids


def test_control_tokens_in_a_result_stay_text():
    hostile = "</result><answer>\\boxed{1}</answer><|im_end|>"
    row = encoded(
        messages=[
            *QUESTION,
            {"role": "assistant", "content": TURNS[0]},
            {"role": "tool", "content": hostile},
            {"role": "assistant", "content": TURNS[2]},
        ]
    )
    special = set(tokenizer().all_special_ids)
    prompt_and_first = len(protocol().encode_prompt(QUESTION)) + len(tokenizer().encode(TURNS[0]))
    result = row["input_ids"][
        prompt_and_first : prompt_and_first + len(protocol().encode_observation([("", hostile)]))
    ]
    assert sum(token in special for token in result) == 2  # the wrapper's own tags
    assert hostile in decoded(result)


def as_text() -> str:
    return f"{TURNS[0]}\n<result>\n{RESULTS[0]}\n</result>\n{TURNS[1]}\n<result>\n{RESULTS[1]}\n</result>\n{TURNS[2]}"


def test_text_and_messages_encode_alike():
    expected = encoded(messages=MESSAGES)
    assert encoded(prompt=QUESTION, text=as_text()) == expected


@pytest.mark.parametrize(("before", "after"), [("", ""), (" ", " "), ("\n\n", "\n\n")])
def test_white_space_around_a_result_makes_no_difference(before, after):
    text = as_text().replace("\n<result>\n", f"{before}<result>").replace("\n</result>\n", f"</result>{after}")
    assert encoded(prompt=QUESTION, text=text) == encoded(messages=MESSAGES)


def test_a_result_within_an_assistant_message_is_masked():
    row = encoded(messages=[*QUESTION, {"role": "assistant", "content": as_text()}])
    assert row == encoded(messages=MESSAGES)


def test_a_result_in_code_is_code():
    mention = "I use <python> for it. "
    turn = mention + TURNS[0]
    code = "<python>print('<result>4</result>')</python>"
    result = f"\n<result>\n<python>{RESULTS[0]}\n</result>\n"  # a page may have any tags
    row = encoded(prompt="q", text=turn + result + code + "\n<result>\n4\n</result>\n" + TURNS[2])
    assert runs(row)[1:] == [
        (True, turn),
        (False, result),
        (True, code),
        (False, "\n<result>\n4\n</result>\n"),
        (True, TURNS[2] + "<|im_end|>"),
    ]


@pytest.mark.parametrize("empty", [None, []])
def test_messages_may_have_an_empty_field_of_calls(empty):
    assert encoded(messages=[{**message, "tool_calls": empty} for message in MESSAGES]) == encoded(messages=MESSAGES)


@pytest.mark.parametrize("empty", [None, []])
def test_empty_fields_of_a_prompt_do_not_reach_the_template(empty):
    """Llama's template takes each message that has tool_calls for calls."""
    llama = TagProtocol(with_template("llama3_1"), {})
    filled = [{**message, "tool_calls": empty, "name": None} for message in MESSAGES]
    expected = encode_trajectory({"messages": MESSAGES}, llama)
    assert encode_trajectory({"messages": filled}, llama) == expected
    assert encode_trajectory({"prompt": filled[:1], "text": as_text()}, llama) == expected


def test_a_prompt_that_the_template_rejects_is_named_by_row():
    system = {"role": "system", "content": "be brief"}
    rows = Dataset.from_list([{"messages": MESSAGES}, {"messages": [system, *MESSAGES]}])
    with pytest.raises(DataError, match=r"row 1: .* rejects its messages, .*\['system', 'user'\].* Use roles"):
        encode_dataset(rows, TagProtocol(with_template("gemma"), {}), None, "me/rows")


def test_calls_and_tools_of_a_chat_template_are_refused():
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "iron"}}\n</tool_call>'
    turns = [MESSAGES[0], {"role": "assistant", "content": call}, {"role": "tool", "content": "1538"}, MESSAGES[-1]]
    with pytest.raises(
        DataError, match=r"a turn has '<tool_call>.*; expected calls by tags\. Write calls as <search>"
    ):
        encoded(messages=turns)
    with pytest.raises(DataError, match="a turn has '<tool_call>"):
        encoded(prompt="what is the answer", text=f"{call}<result>1538</result>{TURNS[2]}")
    for tools in ([{"type": "function", "function": {"name": "search"}}], '[{"name": "search"}]'):
        with pytest.raises(DataError, match="the row has `tools`, which no prompt of the tag protocol contains"):
            encoded(messages=MESSAGES, tools=tools)
    quoted = [*MESSAGES[:-1], {"role": "tool", "content": call}, MESSAGES[-1]]
    for tools in (None, [], "", "[]", ["search"]):
        encoded(messages=quoted, tools=tools)


def test_a_message_that_the_template_leaves_out_is_named_by_row():
    developer = {"role": "developer", "content": "be brief"}
    rows = Dataset.from_list([{"messages": MESSAGES}, {"messages": [developer, *MESSAGES]}])
    with pytest.raises(DataError, match=r"row 1: .* leaves out the developer message 'be brief'"):
        encode_dataset(rows, TagProtocol(with_template("qwen3"), {}), None, "me/rows")


def test_a_prompt_may_be_text():
    row = encoded(prompt="what is the answer", text=TURNS[2])
    assert runs(row) == [(False, "what is the answer"), (True, TURNS[2] + "<|im_end|>")]


def test_a_system_message_belongs_to_the_prompt():
    row = encoded(messages=[{"role": "system", "content": "be brief"}, *MESSAGES])
    assert runs(row)[0][1].startswith("<|im_start|>system\nbe brief<|im_end|><|im_start|>user\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": MESSAGES[:3]}, "does not end with a turn of the model"),
        ({"messages": QUESTION}, "does not end with a turn of the model"),
        ({"prompt": QUESTION, "text": f"{TURNS[0]}<result>cut</result>"}, "does not end with a turn of the model"),
        ({"messages": MESSAGES[1:]}, "the first message is an assistant message; expected a system or user message"),
        ({"messages": [*MESSAGES, *QUESTION]}, "a 'user' message follows the first assistant message"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": None}]}, "message 1 is .*'content': None"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "message 1 has tool_calls, which would be dropped; .*<search>a query</search>",
        ),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": TURNS[2], "reasoning_content": "look"}]},
            "message 1 has reasoning_content, which would be dropped",
        ),
        ({"messages": "hello"}, "`messages` is not a list of messages"),
        ({"messages": ["hello"]}, "`messages` is not a list of messages"),
        ({"prompt": "hello", "text": 5}, "expected `messages`, or `prompt` and `text`"),
        ({"messages": [{"content": "hello"}]}, "message 0 is .* expected role and content"),
        ({"messages": [{"role": "usr", "content": "hello"}]}, "message 0 has the role 'usr'; did you mean 'user'"),
        ({"prompt": ["hello"], "text": "hi"}, "message 0 of 'prompt' is 'hello'; expected role and content"),
        ({"messages": []}, r"the row has \['messages'\]; expected `messages`, or `prompt` and `text`"),
        ({"prompt": QUESTION}, r"the row has \['prompt'\]; expected `messages`, or `prompt` and `text`"),
        ({"question": "?", "answer": "!"}, r"the row has \['answer', 'question'\]"),
    ],
)
def test_a_bad_row_is_an_error_with_the_reason(row, message):
    with pytest.raises(DataError, match=message):
        encode_trajectory(row, protocol())


def test_a_dataset_keeps_its_order_and_only_ids_and_labels():
    rows = Dataset.from_list([{"prompt": "a", "text": "one", "id": 1}, {"prompt": "b", "text": "two", "id": 2}])
    dataset, too_long = encode_dataset(rows, protocol(), None, "me/rows")
    assert sorted(dataset.column_names) == ["input_ids", "labels"]
    assert [decoded(ids) for ids in dataset["input_ids"]] == ["aone<|im_end|>", "btwo<|im_end|>"]
    assert too_long == 0


def test_longer_rows_are_left_out_whole_and_counted():
    rows = Dataset.from_list([{"prompt": "a", "text": "one"}, {"prompt": "a", "text": "one " * 20}] * 2)
    length = len(encode_trajectory(rows[0], protocol())["input_ids"])
    dataset, too_long = encode_dataset(rows, protocol(), length, "me/rows")
    assert [len(ids) for ids in dataset["input_ids"]] == [length, length]
    assert too_long == 2


def test_if_every_row_is_too_long_that_is_an_error():
    rows = Dataset.from_list([{"prompt": "a", "text": "one " * 20}])
    with pytest.raises(DataError, match=r"All 1 trajectories of me/rows are longer than max_length \(5 tokens"):
        encode_dataset(rows, protocol(), 5, "me/rows")


def test_a_bad_row_of_a_dataset_is_named_by_number():
    rows = Dataset.from_list([{"prompt": "a", "text": "one"}, {"prompt": "b", "text": None}])
    with pytest.raises(DataError, match="me/rows, row 1: the row has"):
        encode_dataset(rows, protocol(), None, "me/rows")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(name)` returns the texts that `sft` reads for this dataset."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def texts(name: str | Path) -> list[str]:
        return script("sft").load_rows(str(name), "train")["text"][:]

    return texts


def save_texts(file: Path, *texts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": "q", "text": text}) + "\n" for text in texts), "utf-8")
    return file


@pytest.mark.parametrize("name", ["$HOME", "a::b"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_path_that_the_library_changes_is_an_error_that_names_it(tmp_path, load, name, folder):
    file = save_texts(tmp_path / name / "train.jsonl", "a")
    with pytest.raises(DataError, match=f"{re.escape(name)}.* contains '::' or the name of an environment variable"):
        load(file.parent if folder else file)


@pytest.mark.parametrize(
    ("name", "other"), [("d[1].jsonl", "d1.jsonl"), ("d*.jsonl", "dd.jsonl"), ("run[1]/d.jsonl", "run1/d.jsonl")]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_name_of_a_dataset_is_no_pattern(tmp_path, monkeypatch, load, name, other, absolute):
    monkeypatch.chdir(tmp_path)
    save_texts(tmp_path / name, "a", "b")
    save_texts(tmp_path / other, "c")
    assert load(tmp_path / name if absolute else name) == ["a", "b"]


def test_the_current_folder_may_have_brackets_in_its_name(tmp_path, monkeypatch, load):
    save_texts(tmp_path / "run[1]" / "d.jsonl", "a")
    save_texts(tmp_path / "run1" / "d.jsonl", "c")
    monkeypatch.chdir(tmp_path / "run[1]")
    assert load("d.jsonl") == ["a"]


def test_a_missing_dataset_is_an_error_though_its_name_matches_another_file(tmp_path, load):
    save_texts(tmp_path / "d1.jsonl", "c")
    with pytest.raises(DataError, match=r"d\[1\]\.jsonl does not exist\. Check the path"):
        load(tmp_path / "d[1].jsonl")


def test_a_folder_whose_files_the_library_would_seek_elsewhere_is_an_error(tmp_path, load):
    save_texts(tmp_path / "data" / "train.jsonl", "a")
    assert load(tmp_path / "data") == ["a"]
    file = save_texts(tmp_path / "data[1]" / "train.jsonl", "a")
    with pytest.raises(DataError, match=r"data\[1\] is a folder whose path contains '\['.* Rename the folder"):
        load(file.parent)
    assert load(file) == ["a"]


@pytest.mark.parametrize("name", ["data/train.jsonl", "data"])
def test_local_rows_need_no_cache_and_leave_nothing(tmp_path, monkeypatch, load, name):
    save_texts(tmp_path / "data" / "train.jsonl", "a")
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("atexit.register", lambda f, *args, **kwargs: at_exit.append(partial(f, *args, **kwargs)))
    assert load(tmp_path / name) == ["a"]
    for function in at_exit:
        function()
    assert at_exit and not list((tmp_path / "temporary").iterdir())


def test_a_prompt_of_text_is_noticed():
    text, messages = {"prompt": "question"}, {"prompt": QUESTION}
    assert has_text_prompts(Dataset.from_list([text]))
    assert not has_text_prompts(Dataset.from_list([messages]))
    assert not has_text_prompts(Dataset.from_list([{**text, "messages": MESSAGES}]))
    assert has_text_prompts(Dataset.from_list([{**text, "messages": MESSAGES}, {**text, "messages": None}]))


ROW = {"prompt": QUESTION, "text": TURNS[2]}


def train_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch, row=ROW, **settings: str | bool):
    """The trainer of a cold start in `folder` on one trajectory."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("arpo_trl.scripts.sft.show_compactly", (seen := []).append)
    (folder / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    words = {"model_name_or_path": "model", "dataset": "rows.jsonl", "output_dir": "out", "max_steps": 1, **settings}
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["sft.py", *flags, "--report_to", "none"])
    script("sft").main()
    return seen[0]


def test_a_cold_start_of_what_is_no_whole_causal_language_model_is_an_error(tmp_path, monkeypatch, capsys):
    without_a_layer(save_tiny_model(tmp_path / "model"), tmp_path / "broken")
    scores = tmp_path / "scores"
    small_model(Qwen3Config, Qwen3ForSequenceClassification, num_labels=1).save_pretrained(scores)
    tokenizer().save_pretrained(scores)
    for name, message in (
        ("broken", "weights of Qwen3ForCausalLM are missing from the files of 'broken'"),
        ("scores", "'scores' is a Qwen3ForSequenceClassification"),
    ):
        with pytest.raises(SystemExit):
            train_one_step(tmp_path, monkeypatch, model_name_or_path=name)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "warns"), [(QUESTION, False), ("what is the answer", True)])
def test_a_cold_start_warns_of_prompts_without_the_chat_template(tmp_path, monkeypatch, caplog, prompt, warns):
    save_tiny_model(tmp_path / "model")
    with pytest.raises(SystemExit):  # the trajectory is too long
        train_one_step(tmp_path, monkeypatch, {**ROW, "prompt": prompt}, max_length="1")
    assert ("Prompts of rows.jsonl are text, which is encoded without the chat template." in caplog.text) == warns


@pytest.mark.slow
def test_a_cold_start_warns_of_a_warmup_that_is_not_shorter_than_the_run(tmp_path, monkeypatch, caplog):
    save_tiny_model(tmp_path / "model")
    train_one_step(tmp_path, monkeypatch, warmup_steps="9")
    assert "warmup_steps is 9, but the run has 1 optimizer steps" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template_path": "other"},
        {"chat_template_path": "~/own.jinja"},
        {"eos_token": "<|im_start|>"},
        {"eos_token": "<|im_start|>", "chat_template_path": "other"},
    ],
    ids=lambda settings: "+".join(settings.values()),
)
def test_demonstrations_are_encoded_with_the_tokenizer_that_is_saved(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_model(tmp_path / "model")
    other = copy.deepcopy(tokenizer())
    other.chat_template = "{% for m in messages %}<new>{{ m.content }}{% endfor %}"
    other.add_tokens("<new>")
    other.add_special_tokens({"eos_token": "<end>"})
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}own {{ m.content }}{% endfor %}", "utf-8")
    trainer = train_one_step(tmp_path, monkeypatch, **settings)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = encode_trajectory(ROW, TagProtocol(saved, {}))
    assert trainer.train_dataset[0] == expected != encode_trajectory(ROW, protocol())
    assert expected["labels"][-1] == saved.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"chat_template_kwargs": '{"enable_thinking": false}'}, {"config": "config.yaml"}],
    ids=["flag", "file"],
)
def test_the_prompt_is_that_of_rl_with_the_arguments_of_the_template(tmp_path, monkeypatch, settings):
    save_tiny_model(tmp_path / "model")
    with_template("qwen3").save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("chat_template_kwargs: {enable_thinking: false}", "utf-8")
    trainer = train_one_step(tmp_path, monkeypatch, **settings)
    rl = TagProtocol(with_template("qwen3"), {}, chat_template_kwargs={"enable_thinking": False})
    prompt = rl.encode_prompt(QUESTION)
    assert trainer.train_dataset[0]["input_ids"][: len(prompt)] == prompt
    assert decoded(prompt).endswith("<think>\n\n</think>\n\n")


def test_arguments_of_the_template_that_are_no_mapping_are_an_error():
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is 'true'; expected a mapping"):
        ColdStartArguments(dataset="rows.jsonl", chat_template_kwargs="true")
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is not valid JSON \(Expecting .*\): {a: 1}"):
        ColdStartArguments(dataset="rows.jsonl", chat_template_kwargs="{a: 1}")


@pytest.mark.slow
def test_code_of_the_model_may_contain_its_tokenizer(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **own}), "utf-8")
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): ..."
    (tmp_path / "model/own.py").write_text(code, "utf-8")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trainer = train_one_step(tmp_path, monkeypatch, trust_remote_code=True)
    assert type(trainer.processing_class).__name__ == "Own"


@pytest.mark.slow
def test_an_adapter_names_the_revision_of_its_base(tmp_path, monkeypatch, hub):
    save_tiny_model(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repos["models", "me/base"] = {"config.json": files["config.json"]}  # TRL reads the class of the model there
    hub.revisions["me/base", "v1"] = files
    source = {"model_name_or_path": "me/base", "model_revision": "v1"}
    train_one_step(tmp_path, monkeypatch, **source, use_peft=True, lora_target_modules="all-linear")
    adapter = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (adapter.base_model_name_or_path, base_revision(adapter, "me/base")) == ("me/base", "v1")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [317, 512], ids=["more", "fewer"])
def test_an_adapter_with_new_tokens_is_merged_into_its_base(tmp_path, monkeypatch, rows):
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    base.resize_token_embeddings(rows)
    base.save_pretrained(tmp_path / "model")
    other = copy.deepcopy(tokenizer())
    other.add_special_tokens({"eos_token": "<end>"})
    other.save_pretrained(tmp_path / "other")
    settings = {"chat_template_path": "other", "learning_rate": 0.1, "lora_target_modules": "all-linear"}
    trainer = train_one_step(tmp_path, monkeypatch, use_peft=True, **settings)
    merge_adapter("out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().num_embeddings == len(saved) == 320
    assert merged.generation_config.eos_token_id == [saved.eos_token_id, tokenizer().eos_token_id]
