"""Search ranks passages by BM25 in a fixed order; recorded results match exactly first, then approximately."""

import importlib
import json
import runpy
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arpo_trl.cli import main
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.tools.search import index as index_module
from arpo_trl.tools.search.index import NOTHING_FOUND, LocalIndex, RecordedSearch, search_tool
from arpo_trl.tools.search.words import STOP_WORDS, tokenize
from arpo_trl.tools.spec import tool_spec

PASSAGES: list[str | Mapping[str, str]] = [
    {"title": "Iron", "text": "Iron is a metal with a density of 7.874 grams per cubic centimetre."},
    {"title": "Gold", "text": "Gold is a metal with a density of 19.3 grams per cubic centimetre."},
    {"title": "Curaçao", "text": "The island's capital is Willemstad."},
    "A passage without a title, about rivers.",
]


@pytest.fixture
def index() -> LocalIndex:
    return LocalIndex(PASSAGES)


def test_words_are_folded_and_common_ones_left_out() -> None:
    assert tokenize("What is the density of Curaçao's VITAMIN C?") == ["density", "curacao", "vitamin", "c"]


def test_letters_in_other_forms_of_unicode_are_the_same_letters() -> None:
    assert tokenize("ℝ 𝐀𝐁 Foo™ ㎆ Euler'S") == tokenize("R AB FooTM MB Euler") == ["r", "ab", "footm", "mb", "euler"]
    assert LocalIndex(["The norm on ℝ", "gold"]).search("R", 2) == ["The norm on ℝ"]


def test_the_passage_that_shares_the_rarest_words_comes_first(index: LocalIndex) -> None:
    assert index.search("density of gold", 2) == [
        "Gold: Gold is a metal with a density of 19.3 grams per cubic centimetre.",
        "Iron: Iron is a metal with a density of 7.874 grams per cubic centimetre.",
    ]


def test_accents_and_case_do_not_matter(index: LocalIndex) -> None:
    assert index.search("CURACAO capital", 1) == ["Curaçao: The island's capital is Willemstad."]


def test_passages_that_share_no_word_are_left_out(index: LocalIndex) -> None:
    assert len(index.search("rivers", 10)) == 1


@pytest.mark.parametrize("query", ["", "   ", "???", "the of", "zzz", "\0", "数"])
def test_a_query_without_matches_returns_a_message(index: LocalIndex, query: str) -> None:
    assert search_tool(index)(query) == NOTHING_FOUND


def test_searches_that_find_nothing_are_a_warning_once(index: LocalIndex, caplog: pytest.LogCaptureFixture) -> None:
    search = search_tool(index)
    for number in range(49):  # one in eight finds something, which is more than a tenth
        search("metal" if number % 8 == 0 else "zzz")
    assert caplog.messages == []
    for _ in range(100):
        search("zzz")
    (message,) = caplog.messages
    assert message.startswith("45 of the last 50 searches found nothing, and the model got 'No search results found.'")


def test_ties_keep_the_order_of_the_passages() -> None:
    index = LocalIndex([f"river number{i}" for i in range(50)])
    assert index.search("river", 5) == [f"river number{i}" for i in range(5)]


def test_results_are_numbered_pages_each_on_a_line_and_cut() -> None:
    search = search_tool(LocalIndex(["river one\nflows on", "river " + "x" * 50]), top_k=2, max_chars=20)
    # The shorter passage (in words) first. Cut to 20 = 6 ("river ") + 12 + 2 (" …").
    assert search("river") == "Page 1: river xxxxxxxxxxxx …\nPage 2: river one flows on"


def test_results_are_limited_to_the_requested_number(index: LocalIndex) -> None:
    assert search_tool(index, top_k=1)("metal density").count("Page ") == 1


def test_the_tool_can_be_offered_to_a_model(index: LocalIndex) -> None:
    spec = tool_spec(search_tool(index))
    assert (spec.name, spec.single_text_parameter) == ("search", "query")


def test_a_saved_index_answers_as_before(index: LocalIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    loaded = LocalIndex.load(tmp_path / "index")
    assert len(loaded) == len(index) == 4
    for query in ("density of gold", "curacao", "rivers", "zzz", "metal"):
        assert loaded.search(query, 3) == index.search(query, 3)


@pytest.mark.parametrize("name", ["passages.txt", "passages.json", "passages.csv"])
def test_passages_in_another_format_are_an_error_with_the_expected_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Iron melts at 1538 °C.\n", "utf-8")
    with pytest.raises(DataError, match=r"is no \.jsonl file; expected one passage per line"):
        LocalIndex.open(tmp_path / name)


def test_an_index_is_not_saved_over_the_files_that_it_reads(index: LocalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    opened = LocalIndex.open(str(tmp_path))
    with pytest.raises(ConfigError, match=r"contains the index that is to be saved there\. Choose another folder"):
        opened.save(tmp_path / ".." / tmp_path.name)
    assert len(LocalIndex.open(str(tmp_path))) == len(index)


def test_an_index_is_not_saved_where_it_would_not_be_read(index: LocalIndex, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"dog"\n')
    with pytest.raises(ConfigError, match=r"has \.jsonl files, which would be read in place of the index"):
        index.save(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.jsonl is a file\. Choose a folder"):
        index.save(tmp_path / "a.jsonl")


def test_a_path_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('"dog"\n')
    assert LocalIndex.open("~/a.jsonl").search("dog", 1) == ["dog"]


def test_a_saved_index_can_be_saved_again(index: LocalIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "first")
    LocalIndex.load(tmp_path / "first").save(tmp_path / "second")
    assert LocalIndex.load(tmp_path / "second").search("rivers", 1) == ["A passage without a title, about rivers."]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["_Ranking.save", "_StoredTexts.write"])
def test_a_killed_rebuild_leaves_the_earlier_index(
    index: LocalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    index.save(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"arpo_trl.tools.search.index.{method}", killed)
        LocalIndex(["dog", "cat"]).save(tmp_path)
    assert LocalIndex.load(tmp_path).search("density of gold", 3) == index.search("density of gold", 3)
    assert LocalIndex(["dog", "cat"]).save(tmp_path) == len(index)
    assert LocalIndex.load(tmp_path).search("dog", 3) == ["dog"]


def test_an_index_is_refused_while_another_takes_its_place(
    index: LocalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.common.files.REPLACING_S", 0.0)  # this thread is the one that replaces it
    index.save(tmp_path)
    moved: list[Path] = []
    replace = Path.replace

    def move(path: Path, target: Path) -> Path:
        with pytest.raises(DataError, match="is not a saved search index"):
            LocalIndex.load(tmp_path)
        moved.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", move)
    LocalIndex(["dog", "cat"]).save(tmp_path)
    assert len(moved) >= 4 and moved[-1].name == "search_index.json"


def test_several_may_save_and_load_the_same_index_at_the_same_time(index: LocalIndex, tmp_path: Path) -> None:
    """A thread opens the lock for itself, as a process does."""
    other = LocalIndex([*(f"passage {number}" for number in range(50)), "density of gold"])
    expected = {tuple(of.search("density of gold", 2)) for of in (index, other)}

    def save_and_load(number: int) -> tuple[str, ...]:
        (index if number % 2 else other).save(tmp_path)
        return tuple(LocalIndex.load(tmp_path).search("density of gold", 2))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(save_and_load, range(24)))
    assert set(found) <= expected
    assert not (tmp_path / ".partial").exists()


def test_a_replaced_index_still_answers_where_it_is_open(index: LocalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    opened = LocalIndex.load(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert LocalIndex([*"abcdefgh", "dog"]).save(tmp_path) == 4
    assert opened.search("density of gold", 3) == index.search("density of gold", 3)
    assert LocalIndex.load(tmp_path).search("dog", 3) == ["dog"]
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / ".partial").exists()


def test_the_command_says_that_it_replaces_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jsonl").write_text('"dog"\n')
    (tmp_path / "two.jsonl").write_text('"cat"\n"cow"\n')
    for name, end in (("two", ""), ("one", "; they replace an index of 2 passages")):
        monkeypatch.setattr(
            "sys.argv", ["arpo-trl", "index", str(tmp_path / f"{name}.jsonl"), str(tmp_path / "index")]
        )
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.strip().endswith(f"passages indexed in {tmp_path / 'index'}{end}")


def test_an_index_is_silent(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    LocalIndex(PASSAGES).save(tmp_path / "index")
    LocalIndex.load(tmp_path / "index").search("gold", 1)
    assert capfd.readouterr() == ("", "")


def test_a_jsonl_file_contains_a_string_or_an_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(map(json.dumps, PASSAGES)) + "\n\n")
    assert LocalIndex.open(path).search("gold density", 3) == LocalIndex(PASSAGES).search("gold density", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"fine"\n{"text": ', r"line 2: not valid JSON"),
        ('"fine"\n\n{"body": "x"}', r"line 3: expected .* got keys \['body'\]"),
        ("5", r"line 1: expected .* got int"),
        ('{"text": "x", "title": 5}', r"line 1: expected"),
        ("", "has no passages"),
    ],
)
def test_a_broken_jsonl_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        LocalIndex.open(path)


def test_an_index_needs_passages_with_words() -> None:
    with pytest.raises(DataError, match="at least one passage"):
        LocalIndex([])
    with pytest.raises(DataError, match="contains a search word"):
        LocalIndex(["???", ""])


def test_a_title_may_be_the_first_line_of_the_contents() -> None:
    contents = ['"Iron"\nIt melts at 1538 °C.', "No title."]
    index = LocalIndex([{"contents": text} for text in contents])
    assert index.search("iron", 1) == ["Iron: It melts at 1538 °C."]
    assert index.search("title", 1) == ["No title."]


def test_chinese_and_japanese_are_searched_for_by_character() -> None:
    index = LocalIndex(["铁的熔点是1538度", "金的密度", "水は100度で沸騰する"])
    assert tokenize("铁的A4熔") == ["铁", "的", "a4", "熔"]
    assert index.search("熔点", 3) == ["铁的熔点是1538度"]
    assert index.search("沸騰", 1) == ["水は100度で沸騰する"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ภูเขาไฟ ๑๒ ที่", ["ภู", "เ", "ข", "า", "ไ", "ฟ", "๑๒", "ที่"]),  # Thai
        ("ວຽງຈັນ", ["ວ", "ຽ", "ງ", "ຈັ", "ນ"]),  # Lao
        ("မန္တလေး", ["မ", "န္", "တ", "လေး"]),  # Burmese
        ("ភ្នំពេញ", ["ភ្", "នំ", "ពេ", "ញ"]),  # Khmer
        ("हिमालय किला, की।", ["हिमालय", "किला", "की"]),  # Hindi
        ("কলকাতা", ["কলকাতা"]),  # Bengali
        ("தமிழ்", ["தமிழ்"]),  # Tamil
        ("Café Й ё שָׁלוֹם مُحَمَّد ❤️ 5️⃣", ["cafe", "и", "е", "שלום", "محمد", "5"]),  # here the marks are accents
    ],
)
def test_the_vowels_of_indian_and_south_east_asian_scripts_belong_to_their_words(text: str, words: list[str]) -> None:
    assert tokenize(text) == words


def test_words_that_differ_in_a_vowel_are_different() -> None:
    index = LocalIndex(["कमल एक फूल है", "कमाल एक नाम है", "दिल्ली भारत की राजधानी है"])
    assert index.search("कमाल", 3) == ["कमाल एक नाम है"]
    assert index.search("किला", 3) == []


def test_an_index_is_opened_from_every_supported_source(tmp_path: Path, index: LocalIndex) -> None:
    folder = tmp_path / "passages"
    folder.mkdir()
    for number, passage in enumerate(PASSAGES):
        (folder / f"{number}.jsonl").write_text(json.dumps(passage))
    index.save(tmp_path / "saved")
    for source in (folder, tmp_path / "saved", str(tmp_path / "saved")):
        opened = LocalIndex.open(source)
        assert (len(opened), opened.search("metal density", 4)) == (4, index.search("metal density", 4))
    assert len(LocalIndex.open(folder / "0.jsonl")) == 1


def test_an_index_is_opened_from_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "arpo_trl.net.hub_dataset.load_from_hub",
        lambda name, split: iter([{"id": "1", "contents": f"{name} {split}"}]),
    )
    assert LocalIndex.open("somebody/wiki").search("wiki", 1) == ["somebody/wiki train"]


def test_a_dataset_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is not a local file or folder"):
        LocalIndex.open("nobody/nothing")


def test_an_index_of_another_version_is_refused_with_the_remedy(tmp_path: Path, index: LocalIndex) -> None:
    index.save(tmp_path)
    (tmp_path / "search_index.json").write_text('{"format": 99}')
    with pytest.raises(
        DataError, match=r"another version: \{'format': 99\}, not 3\. Build it again: .*arpo-trl index"
    ):
        LocalIndex.open(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves a broken file open
@pytest.mark.parametrize("file", ["passages.txt", "passage_ends.npy", "data.csc.index.npy", "vocab.index.json"])
def test_an_incomplete_index_is_refused(tmp_path: Path, index: LocalIndex, file: str) -> None:
    index.save(tmp_path)
    path = tmp_path / file
    for damage in (lambda: path.write_bytes(b"x"), lambda: path.write_bytes(b"PK\x03\x04"), path.unlink):
        damage()
        with pytest.raises(DataError, match="is an incomplete search index"):
            LocalIndex.load(tmp_path)


def test_a_saved_index_is_searched_by_many_threads_at_once(tmp_path: Path) -> None:
    LocalIndex([f"passage{i} " + "x" * i for i in range(200)]).save(tmp_path)
    index = LocalIndex.load(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: index.search(f"passage{i % 200}", 1), range(2000)))
    assert found == [[f"passage{i % 200} " + "x" * (i % 200)] for i in range(2000)]


def test_a_folder_without_a_saved_index_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a saved search index"):
        LocalIndex.load(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        LocalIndex.open(tmp_path / "missing.jsonl")


# Recorded results.

RECORDED = {
    "capital of France": "Page 1: Paris is the capital.\nPage 2: France lies\nin Europe.",
    "search query: Who wrote Hamlet?": "Page 1: Shakespeare wrote it.",
    "capital of Atlantis": NOTHING_FOUND,
    "plain": "text that is not in pages",
}


def recorded(tmp_path: Path, content: object = None) -> RecordedSearch:
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps(RECORDED if content is None else content))
    return RecordedSearch(path)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("capital of France", "Page 1: Paris is the capital.\nPage 2: France lies in Europe."),
        ("  CAPITAL  of france ", "Page 1: Paris is the capital.\nPage 2: France lies in Europe."),
        ("who wrote hamlet?", "Page 1: Shakespeare wrote it."),
        ("search query: who wrote hamlet?", "Page 1: Shakespeare wrote it."),
        ("plain", "Page 1: text that is not in pages"),
        ("capital of Atlantis", NOTHING_FOUND),  # it was asked, and nothing was found
    ],
)
def test_a_recorded_query_gets_its_own_result(tmp_path: Path, query: str, text: str) -> None:
    assert search_tool(recorded(tmp_path))(query) == text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("Hamlet author", "Page 1: Shakespeare wrote it."),
        ("Atlantis capital city", "Page 1: Paris is the capital.\nPage 2: France lies in Europe."),
        ("who wrote", "Page 1: Shakespeare wrote it."),
        ("who is it", NOTHING_FOUND),
        ("???", NOTHING_FOUND),
    ],
)
def test_another_query_gets_the_nearest_recorded_result(tmp_path: Path, query: str, text: str) -> None:
    assert search_tool(recorded(tmp_path))(query) == text


def test_recorded_pages_are_limited_to_the_requested_number(tmp_path: Path) -> None:
    assert search_tool(recorded(tmp_path), top_k=1)("capital of France") == "Page 1: Paris is the capital."


def test_recordings_that_found_nothing_are_a_recording(tmp_path: Path) -> None:
    search = search_tool(recorded(tmp_path, {"a query": NOTHING_FOUND}))
    assert (search("a query"), search("another query")) == (NOTHING_FOUND, NOTHING_FOUND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "contains an empty object"),
        (["a"], "contains list"),
        ({"a query": ["x"]}, "query 'a query': the result is list; expected a string"),
    ],
)
def test_a_recording_with_another_format_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recorded(tmp_path, content)


@pytest.mark.parametrize(
    "query", ["x" * 3000, "search query: " + "x" * 3000, "x " * 1500, "iron " + " " * 3000 + "gold", "iron \ud800"]
)
def test_each_recorded_query_finds_its_own_result(tmp_path: Path, query: str) -> None:
    # the other would be the nearest, or shares no word
    assert search_tool(recorded(tmp_path, {query: "its own", "iron gold x": "another's"}))(query) == "Page 1: its own"


def test_of_queries_that_are_the_same_the_first_counts_and_different_results_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"Iron": "first", " iron": "second", "search query: IRON": "third", "gold": "same", "Gold ": "same"}
    source = recorded(tmp_path, content)
    assert source.search("IRON", 5) == ["first"]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{tmp_path / 'recorded.json'} has queries that differ from an earlier one only in case")
    assert "but have another result (2), such as ' iron' and 'Iron'. The first result counts." in message


def test_an_invalid_or_missing_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        RecordedSearch(tmp_path / "broken.json")
    with pytest.raises(DataError, match="cannot be read"):
        RecordedSearch(tmp_path / "missing.json")


def test_the_stop_words_are_those_of_bm25s_and_question_words():
    """Saved indexes hold the words that are left: another list needs another `LocalIndex.FORMAT`."""
    from bm25s.stopwords import STOPWORDS_EN

    assert set(STOPWORDS_EN) < STOP_WORDS and len(STOP_WORDS) == 33 + 18


def test_a_query_that_would_take_hours_is_cut():
    """Sorting a run of accents takes time that grows with the square of its length: of 600,000, some 200 s."""
    index = LocalIndex(["alpha", "beta"])
    assert search_tool(index)("beta " + "a" + "\u0301\u0316" * 300_000) == "Page 1: beta"


def test_jax_is_not_started_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would take three quarters of the memory, before the first tensor of the model."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("")
    (tmp_path / "jax/lax.py").write_text("def top_k(*_):\n    raise SystemExit('jax takes the GPU')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("bm25s", "jax")]:
            monkeypatch.delitem(sys.modules, name)

    forget()
    with pytest.raises(SystemExit, match="jax takes the GPU"):  # bm25s does this when it is imported
        importlib.import_module("bm25s")
    forget()
    runpy.run_path(str(index_module.__file__))
    assert "jax" not in sys.modules
    assert not sys.modules["bm25s.selection"].JAX_IS_AVAILABLE
    importlib.import_module("jax.lax")  # and whoever uses it finds it afterwards
    forget()
