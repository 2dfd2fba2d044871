"""Every fault in a user's file results in an error that names its place."""

import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from arpo_trl.command_line import parse_settings
from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.common.user_files import MAX_DEPTH, expect, json_lines, parse_json, read_yaml
from arpo_trl.common.yaml_values import as_yaml
from arpo_trl.data.files import read_file
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.errors import CheckpointError, ConfigError, DataError
from arpo_trl.evaluation.benchmarks import BENCHMARKS, custom_benchmark, load_questions, local_benchmarks
from arpo_trl.evaluation.comparison import compare
from arpo_trl.evaluation.report import saved_table
from arpo_trl.evaluation.runner import RunFolder
from arpo_trl.evaluation.samples import Records, repair
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.publishing.model_card import Card
from arpo_trl.publishing.trained_settings import EvaluationSettings
from arpo_trl.rewards.judge import LLMJudge
from arpo_trl.runs.checkpoints import STATE_FILE, SavedState
from arpo_trl.tools.search.cache import SearchCache
from arpo_trl.tools.search.index import LocalIndex, RecordedSearch
from evaluating import called, record

DEEP_JSON = "[" * 5000 + "]" * 5000
HOSTILE = {
    "cut off": b'{"a": [1, 2',
    "not UTF-8": b"\xff\xfe{}",
    "deep": DEEP_JSON.encode(),
    "deep where Python can read it": b"[" * 300 + b"]" * 300,
    "another value": b'"text"',
    "a list": b"[1]",
    "empty": b"",
    "a huge number": b"1" * 10_000,
    "null": b"null",
}


def refused_by_model_card(file: str):
    def read(path: Path):
        (path.parent / "training_config.yaml").touch()
        (path.parent / file).write_bytes(path.read_bytes())
        Card.of(path.parent, "me/it")

    return read


def in_folder(name: str, read):
    def write(path: Path):
        (path.parent / name).write_bytes(path.read_bytes())
        read(path.parent)

    return write


READERS = {
    "rows": lambda path: list(read_file(path.rename(path.with_suffix(".jsonl")))),
    "a list of rows": lambda path: list(read_file(path)),
    "passages": lambda path: LocalIndex.open(path.rename(path.with_suffix(".jsonl"))),
    "recorded searches": RecordedSearch,
    "a saved index": in_folder("search_index.json", LocalIndex.load),
    "samples": lambda path: list(Records(path).values()),
    "results": in_folder("results.json", lambda folder: compare(folder, folder)),
    "results for a card": in_folder("results.json", saved_table),
    "a run's description": in_folder("run.json", lambda folder: RunFolder(folder, {"a": 1}, resume=True)),
    "verdicts": lambda path: LLMJudge("http://h/v1", "wise", cache=path),
    "a checkpoint's state": in_folder(STATE_FILE, SavedState.of),
    "a card's adapter": refused_by_model_card("adapter_config.json"),
    "a card's history": refused_by_model_card("trainer_state.json"),
    "settings": lambda path: parse_settings([EvalSettings], ["--config", str(path)]),
}


FINE = {("rows", "empty"), ("verdicts", "empty"), ("samples", "empty"), ("passages", "another value")}


@pytest.mark.parametrize(("reader", "content"), [pair for pair in product(READERS, HOSTILE) if pair not in FINE])
def test_every_reader_names_the_file(tmp_path, reader, content):
    (tmp_path / "given.json").write_bytes(HOSTILE[content])
    with pytest.raises((DataError, ConfigError, CheckpointError)) as caught:
        READERS[reader](tmp_path / "given.json")
    assert str(tmp_path) in str(caught.value) or "There is no" in str(caught.value)


NAMED = {
    "dataset": lambda name: load_arpo_dataset(name),
    "data": lambda name: load_questions(BENCHMARKS["gsm8k"], name),
    "file": lambda name: load_questions(custom_benchmark({**CUSTOM, "file": name})),
    "path": lambda name: list(Records(name).values()),
    "a": lambda name: compare(name, name),
    "folder": saved_table,
    "model or adapter": EvaluationSettings.of_run,
    "search_index": LocalIndex.open,
    "search_recorded": RecordedSearch,
    "search_cache": SearchCache,
    "judge_cache": lambda name: LLMJudge("http://h/v1", "wise", cache=name),
}
"""Setting or argument → what reads the path in it."""
CUSTOM = {"name": "mine", "question": "q", "answer": "a", "scorer": "qa_f1"}


@pytest.mark.parametrize("setting", NAMED)
@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("x" * 300 + ".jsonl", "too long"), ("x\0y", "embedded null")],
)
def test_a_name_that_the_system_refuses_is_an_error_that_names_its_setting(setting, name, reason):
    with pytest.raises(DataError, match=f"^{setting} is 'x.* which the system refuses: .*{reason}.*. Check the path"):
        NAMED[setting](name)


@pytest.mark.parametrize(
    "read",
    [
        lambda name: load_pretrained("tokenizer", name, AutoTokenizer.from_pretrained),
        lambda name: list(read_trees(name)),
        lambda name: LocalIndex(["a passage"]).save(name),
        LocalIndex.load,
        LocalIndex.open,
        lambda name: RunFolder(name, {}, resume=False),
    ],
)
def test_a_name_that_is_too_long_is_an_error_of_this_package(read):
    with pytest.raises((ConfigError, DataError), match=r"x{50}"):
        read("x" * 300)


def test_a_benchmark_of_ones_own_may_have_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text("")
    mine = custom_benchmark({**CUSTOM, "name": "x" * 300, "file": "mine.jsonl"})
    assert local_benchmarks(tmp_path, [mine]) == [BENCHMARKS["gsm8k"]]


@pytest.mark.parametrize("name", [None, 3, []])
@pytest.mark.parametrize(
    "read",
    [
        lambda name: list(Records(name).values()),
        lambda name: compare(name, name),
        saved_table,
        lambda name: RunFolder(name, {}, resume=False),
    ],
)
def test_a_name_that_is_neither_text_nor_a_path_is_an_error(read, name):
    with pytest.raises(DataError, match=rf"(path|a|folder) is {re.escape(repr(name))}; expected a name as text or as"):
        read(name)


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        (int, "1", "x is '1'; expected int"),
        (int, True, "x is True; expected int"),
        (int, 1.0, "x is 1.0; expected int"),
        (str | None, 1, r"x is 1; expected str \| None"),
        ([int], {}, r"x is \{\}; expected a list"),
        ([float], [1, 2.5, None], r"x\[2\] is None; expected float"),
        ({"a": int}, [], r"x is \[\]; expected named values"),
        ({"a": int}, {"b": 1}, r"x has no 'a'; it has \['b'\]"),
        ({"a?": [{"b": str}]}, {"a": [{"b": "c"}, {"b": 1}]}, r"x.a\[1\].b is 1; expected str"),
        (str, ["\u202e" * 200, 1][:1], r"expected str"),
    ],
)
def test_a_value_of_another_shape_is_named(shape, value, message):
    with pytest.raises(DataError, match=message):
        expect(value, shape, "x")


def test_values_of_the_expected_shape():
    shape = {"a": int, "b?": float | None, "c": [[str]], "d": dict, "e": bool, "f": float}
    expect({"a": 1, "c": [["x"], []], "d": {1: 2}, "e": True, "f": 1, "more": object()}, shape, "x")


def nested(depth: int) -> str:
    return '{"a": [' * (depth // 2) + "1" + "]}" * (depth // 2)


def test_values_may_be_nested_as_deep_as_can_be_printed():
    assert repr(parse_json(nested(MAX_DEPTH), "x")).startswith("{'a': [{'a'")
    assert parse_json("[" + "[]," * 10_000 + "[]]", "x")[-1] == []
    with pytest.raises(DataError, match="x: lists and mappings are nested more than 100 deep"):
        parse_json(nested(MAX_DEPTH + 2), "x")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 3000])
def test_yaml_may_be_nested_as_deep(tmp_path, depth):
    (tmp_path / "a.yaml").write_text(nested(depth))
    with pytest.raises(DataError, match=r"a\.yaml: lists and mappings are nested more than 100 deep"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(nested(40))
    assert yaml.safe_dump(read_yaml(tmp_path / "a.yaml"))


def test_aliases_cannot_turn_a_short_yaml_file_into_billions_of_values(tmp_path):
    path = tmp_path / "a.yaml"
    levels = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]  # 2⁵⁹ lists
    path.write_text("\n".join(["a0: &a0 [1]", *levels]))
    with pytest.raises(DataError, match=r"a\.yaml: it has more than 100,000 values on one level. Check its aliases"):
        read_yaml(path)
    path.write_text("a: &a [*a]")  # a list that contains itself
    with pytest.raises(DataError, match=r"a\.yaml: lists and mappings are nested more than 100 deep"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: [", "? [a]\n: b", "a: !!python/object:os.system x", "\x07"])
def test_invalid_yaml_names_the_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=r"a\.yaml is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_a_key_that_is_set_twice_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nbase: &base {x: 1}\nmore: {<<: *base, x: 2}\nseed: 2\n")
    with pytest.raises(DataError, match=r"a\.yaml is not valid YAML: 'seed' is set twice, again in line 4"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("base: &base {x: 1}\nmore: {<<: *base, x: 2}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"x": 1}, "more": {"x": 2}}


@pytest.mark.parametrize(("written", "number"), [("010", 8), ("1:30", 90), ("-0_17", -15), ("1:30.5", 90.5)])
def test_a_number_that_only_yaml_1_1_reads_so_is_an_error(tmp_path, written, number):
    (tmp_path / "a.yaml").write_text(f"seed: 1\nmost: [{written}]\n")
    with pytest.raises(DataError, match=f"{written} in line 2 is the number {number} in YAML 1.1. Write {number}, or"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"most: '{written}'\n")
    assert read_yaml(tmp_path / "a.yaml") == {"most": written}


def test_an_exponent_makes_a_number_with_or_without_a_point(tmp_path):
    (tmp_path / "a.yaml").write_text("[1e-6, 1.5e-6, -2E3, .5e1, 1e+3, 0, 00, 0x10, 1_000, 1e5x]")
    assert read_yaml(tmp_path / "a.yaml") == [1e-6, 1.5e-6, -2000.0, 5.0, 1000.0, 0, 0, 16, 1000, "1e5x"]


def test_dates_in_yaml_are_texts_as_in_json(tmp_path):
    (tmp_path / "a.yaml").write_text("[2024-07-26, 2024-02-30, 2024-07-26 10:00:00]")
    assert read_yaml(tmp_path / "a.yaml") == ["2024-07-26", "2024-02-30", "2024-07-26 10:00:00"]


@pytest.mark.parametrize(
    "value", ["2024-07-26", "1e-6", "010", "1:30", "on", "x: y", "null", 1e-6, math.inf, 10, None, [1, "2"]]
)
def test_what_is_written_as_yaml_is_read_as_it_was(tmp_path, value):
    (tmp_path / "a.yaml").write_text(as_yaml({"b": value, "a": 1}))
    assert list(read_yaml(tmp_path / "a.yaml").items()) == [("b", value), ("a", 1)]


def test_lines_are_counted_with_blank_ones_and_bad_ones_can_be_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\n[\n\xff\n2')
    bad: list[str] = []
    assert list(json_lines(path, bad)) == [(1, {"a": "\u2028"}), (5, 2)]
    assert [problem.split("a.jsonl, ")[1][:14] for problem in bad] == ["line 3: not va", "line 4 is not "]
    with pytest.raises(DataError, match=r"cannot be read: .*Is a directory"):
        list(json_lines(tmp_path))


BROKEN_SAMPLES = {
    "task": 5,
    "question": None,
    "scores": {"math": "good"},
    "trajectory": [{"role": "tool", "text": "x"}],
    "tokens": {"prompt": 1},
    "seconds": "long",
    "number": [1],
}


@pytest.mark.parametrize("key", BROKEN_SAMPLES)
def test_a_sample_with_a_broken_part_is_named_and_mended_by_sampling_again(tmp_path, key):
    whole = record(0, 1.0, trajectory=[called("python")])
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(whole) + "\n" + json.dumps({**whole, "sample": 1, key: BROKEN_SAMPLES[key]}) + "\n")
    with pytest.raises(DataError, match=rf"samples\.jsonl, line 2: not a sample of an evaluation: .*{key}.* Resume"):
        list(Records(path).values())
    assert repair(path) == ({("gsm8k", 0, 0)}, [])


def test_a_state_of_a_checkpoint_with_a_broken_part_is_named(tmp_path):
    state = {"step": 1, "written": 1.5, "between_generations": True, "owes_evaluation": False}
    state |= {"identity": {}, "versions": {}, "files": {}, "passes": 0, "steps_in_pass": 1}
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    assert SavedState.of(tmp_path).step == 1
    (tmp_path / STATE_FILE).write_text(json.dumps(state | {"files": [1]}))
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE}.files is \[1\]; expected dict"):
        SavedState.of(tmp_path)
