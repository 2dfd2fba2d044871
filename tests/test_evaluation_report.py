import dataclasses
import json
from html.parser import HTMLParser

import matplotlib.image
import pytest

from arpo_trl.evaluation import report
from arpo_trl.evaluation.benchmarks import Benchmark, Scorer
from arpo_trl.evaluation.results import suites_of, summarise
from arpo_trl.evaluation.samples import key_of, trajectory
from arpo_trl.rollout.tree import ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource
from browser import IS_COMPLETE
from evaluating import GSM8K, called, record

HOSTILE = (
    "</pre><script>document.title='owned'</script><img src='http://evil.example/x.png' onerror=alert(1)>"
    '"><a href="javascript:alert(1)">x</a> {{ 7*7 }} &lt;b&gt; | [link](http://evil.example) <https://evil.example>'
)
VOID = {"meta", "br", "img", "input", "hr", "link"}


def results_of(*records, samples=1):
    count = len({one["number"] for one in records})
    benchmarks = {"gsm8k": summarise(GSM8K, records, questions=count, samples=samples, seed=0)}
    return {
        "model": "runs/<b>model</b>",
        "settings": {
            "samples": samples,
            "temperature": 0.6,
            "top_p": 0.95,
            "seed": 0,
            "judge_model": HOSTILE,
            "suite": None,
        },
        "versions": {"python": "3.11"},
        "git_commit": None,
        "finished": "2025-01-01T00:00:00+00:00",
        "suites": suites_of(benchmarks),
        "system_prompts": {"gsm8k": HOSTILE},
        "benchmarks": benchmarks,
    }


def page_of(*records, **settings) -> str:
    results = results_of(*records, **settings)
    return report.html(results, {page.benchmark: page for page in pages_of(*records)[:1]})


def pages_of(*records) -> list[report.SamplePage]:
    metrics = {"gsm8k": results_of(*records)["benchmarks"]["gsm8k"]["metric"]}
    return list(report.sample_pages({key_of(record): record for record in records}, metrics))


def varied():
    """Records with everything a page can show."""
    steps = [
        {"role": "assistant", "text": HOSTILE, "tokens": 5},
        called(HOSTILE, HOSTILE),
        called("python", "boom", "error"),
    ]
    steps.append({"role": "tool", "text": "No tool calls are left.", "calls": [], "tokens": 5})
    one = record(0, 1.0, level=HOSTILE, question=HOSTILE, golds=[HOSTILE], prediction=HOSTILE, trajectory=steps)
    long = record(1, 0.0, level="2", question="w" * 3000, golds=["x" * 500], prediction="y" * 500, id=HOSTILE)
    return [one, long, record(2, None, error=HOSTILE), *(record(i, float(i % 2)) for i in range(3, 30))]


class Page(HTMLParser):
    """What a page is made of: its tags, which have to be in order, and all attributes."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hidden_characters_are_symbols_in_both_reports():
    hidden = "gold \u202e\x9b2J\x1b[2J"
    steps = [{"role": "assistant", "text": hidden, "tokens": 1}, called(hidden, hidden)]
    records = [
        record(0, 1.0, level=hidden, question=hidden, golds=[hidden], prediction=hidden, trajectory=steps),
        record(1, None, error=hidden),
    ]
    page, text = page_of(*records), report.markdown(results_of(*records))
    assert not {"\u202e", "\x9b", "\x1b"} & {*page, *text}
    assert page.count("gold ‹U+202E›‹U+009B›2J␛[2J") >= 6
    assert r"gold ‹U\+202E›‹U\+009B›2J␛\[2J" in text  # as `cell` writes it


def test_hidden_characters_in_the_name_of_a_benchmark_are_symbols_too():
    records = [record(0, 1.0, question="what is seen")]
    results, (first, *_) = results_of(*records), pages_of(*records)
    hidden = "mine\x1b[2J\u202e"  # the name of a file of questions
    for part in ("benchmarks", "system_prompts"):
        results[part] = {hidden: results[part]["gsm8k"]}
    page = report.html(results, {hidden: dataclasses.replace(first, benchmark=hidden)})
    assert "what is seen" in page and not {"\x1b", "\u202e"} & {*page}


def test_whatever_a_model_wrote_is_text_on_the_page():
    page = Page(page_of(*varied()))
    assert page.open == []
    assert not {"script", "img", "iframe", "object", "link", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert (
        page.text.count("document.title='owned'") >= 6
    )  # question twice, gold, prediction, turn, result, error, level
    assert "{{ 7*7 }}" in page.text and "49" not in page.text


def test_the_page_asks_for_nothing_and_its_policy_allows_nothing():
    page = Page(page_of(*varied()))
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "poster", "srcset")]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = [value for name, value in page.attributes if "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(" not in page_of(*varied()) and "@import" not in page_of(*varied())


def test_the_page_shows_scores_levels_tools_and_each_sample():
    text = " ".join(Page(page_of(*varied())).text.split())
    for shown in (
        "GSM8K",
        "By level",
        "Score by number of tool calls",
        "1 error",
        "Tokens and seconds",
        "failed",
        "boom",
    ):
        assert shown in text
    assert "No tool calls are left." in text


def test_a_call_without_room_for_its_result_is_counted_and_its_result_is_not_shown_as_read():
    tree = RolloutTree([1])
    turn = tree.add_turn(0, [2], "<search>iron</search>", [-0.5], [0.1])
    made = ExecutedCall(
        name="search",
        arguments={"query": "iron"},
        text="a long result",
        failure=None,
        seconds=0.1,
        source=CallSource.EXECUTED,
    )
    tree.end(turn.index, (0,), StopReason.LENGTH, [made])
    steps = trajectory(tree)
    assert [step["role"] for step in steps] == ["assistant"]
    cut_off = record(0, 0.0, trajectory=steps, stop="length")
    found = summarise(GSM8K, [cut_off], questions=1, samples=1, seed=0)
    assert found["tools"]["search"]["calls"] == 1
    text = Page(page_of(cut_off)).text
    assert "The answer had no room for this result." in text and "a long result" not in text


def test_samples_without_a_verdict_count_as_failed_and_leave_a_dash_in_every_report(tmp_path):
    scores = {"math": 0.0, "em": 0.0, "judge": None}
    rows = [record(0, 1.0, scores={"math": 1.0, "em": 1.0, "judge": 1.0}), record(1, 0.0, scores=scores)]
    results = results_of(*rows)
    judged = Benchmark(name="gsm8k", title="GSM8K", suite=None, scorer=Scorer.JUDGE)
    results["benchmarks"] = {"gsm8k": summarise(judged, rows, questions=2, samples=1, seed=0)}
    row = "| GSM8K | LLM judge | — | — | 2 | 2 | 1 | 0.00 |"
    text = report.markdown(results)
    assert row in text and "- 1 sample(s) without a verdict of the judge; its score is in 0.500 – 1.000" in text
    pages = report.sample_pages({key_of(row): row for row in rows}, {"gsm8k": "judge"})
    page = report.html(results, {"gsm8k": next(pages)})
    assert '<td class="n" data-label="failed">1</td>' in page and '<td class="n" data-label="score">—</td>' in page
    assert "its score is in 0.500 – 1.000" in page
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert row in report.saved_table(tmp_path)


def test_the_page_of_several_samples_has_pass_at_k():
    text = Page(page_of(*(record(i, float(j), j) for i in range(3) for j in range(2)), samples=2)).text
    assert "pass@2" in text and "majority vote" in text


def test_a_page_without_a_single_good_sample_is_one():
    text = Page(page_of(record(0, None))).text
    assert "1 sample(s) failed and are excluded from all scores: 1 × EngineError: died" in " ".join(text.split())


def test_wrong_answers_come_first_and_every_sample_is_on_some_page():
    values = [None if i == 300 else float(i % 90 > 0) for i in range(450)]  # the wrong ones: 0, 90, 180, 270, 360
    records = [record(i, value, question=f"question-{i}-") for i, value in reversed(list(enumerate(values)))]
    pages = pages_of(*records)
    assert [len(page.samples) for page in pages] == [200, 200, 50]
    numbers = [sample["number"] for page in pages for sample in page.samples]
    assert numbers[:6] == [300, 0, 90, 180, 270, 360] and numbers[6:] == sorted(numbers[6:])
    assert sorted(numbers) == list(range(450))
    first = page_of(*records)
    assert first.count('<a href="samples-1-2.html">next</a> <a href="samples-1-3.html">last</a>') == 2
    assert "<b>page 1 of 3</b> <a" in first
    last = report.samples_html("GSM8K", pages[2])
    assert "question-449-" in last and "<b>page 3 of 3</b> <a" in last
    assert '<a href="report.html">first</a> <a href="samples-1-2.html">previous</a> </p>' in last
    assert Page(last).open == []


def test_a_page_reads_only_its_own_samples(monkeypatch):
    monkeypatch.setattr(report, "SHOWN_SAMPLES", 2)
    readings = []

    class Read(dict):
        def __getitem__(self, key):
            readings.append(key[1])
            return super().__getitem__(key)

    records = Read({key_of(one): one for one in (record(i, 1.0) for i in range(5))})
    pages = report.sample_pages(records, {"gsm8k": "math"})
    assert [sample["number"] for sample in next(pages).samples] == [0, 1]
    assert readings == [0, 1]  # the other pages are not read yet
    assert [[sample["number"] for sample in page.samples] for page in pages] == [[2, 3], [4]]
    assert readings == [0, 1, 2, 3, 4]


def test_long_texts_are_cut():
    cut = report.cut("a" * 5000 + "b" * 5000)
    assert len(cut) < 4100 and cut.startswith("a") and cut.endswith("b") and "6,000 characters" in cut


def test_the_system_prompt_is_shown():
    assert "System prompt" in Page(page_of(*varied())).text


@pytest.mark.parametrize(
    ("p", "shown"), [(0.0, "< 0.0001"), (0.00009, "< 0.0001"), (0.0001, "0.0001"), (1.0, "1.0000")]
)
def test_a_p_value_is_never_zero(p, shown):
    assert report.p_value(p) == shown


def test_the_markdown_escapes_untrusted_text():
    text = report.markdown(results_of(*varied()))
    assert "<script>" not in text and "](http" not in text.replace("\\]\\(", "")
    (row,) = [line for line in text.splitlines() if line.startswith("| GSM8K")]
    assert "| math equality | " in row


def test_a_table_is_markdown():
    assert report.pipe_table(("a", "b", "c"), [("x", "y", "1")]) == [
        "| a | b | c |",
        "| --- | --- | ---: |",
        "| x | y | 1 |",
    ]


def test_the_links_of_a_page_do_not_grow_with_the_number_of_pages():
    def size(count):
        files = ["report.html", *(f"samples-1-{i:04d}.html" for i in range(2, count + 1))]
        return len(report.samples_html("T", report.SamplePage(benchmark="b", number=1, files=files, samples=[])))

    assert size(3000) == size(1000)
    assert abs(size(1000) - size(3)) < 20  # digits


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["report", "samples"])
def test_the_pages_fit_the_width_of_a_phone_and_of_a_screen(tmp_path, tab, kind, width):
    further = dataclasses.replace(pages_of(*varied())[0], files=[f"samples-1-{i}.html" for i in range(40)])
    page = page_of(*varied()) if kind == "report" else report.samples_html(HOSTILE, further)
    path = tmp_path / f"{kind}.html"
    path.write_text(page.replace("<details>", "<details open>"), "utf-8")
    tab.open(path.as_uri(), width, 2000, ready=IS_COMPLETE)
    assert tab.run("document.documentElement.scrollWidth") <= width
    # nothing is cut either: no cell or text is wider than its box
    wide = "[...document.querySelectorAll('body *')].filter((each) => each.scrollWidth > each.clientWidth + 1"
    assert tab.run(f"{wide} && getComputedStyle(each).display !== 'inline').map((each) => each.outerHTML)") == []
    assert tab.run("document.title").startswith({"report": "Evaluation of runs/", "samples": "Samples of "}[kind])
    assert {*tab.requests} - {"about:blank"} == {path.as_uri()} and tab.errors == []
    tab.picture(tmp_path / "shot.png")
    pixels = matplotlib.image.imread(tmp_path / "shot.png")
    assert pixels.shape[:2] == (2000, width)
    inked = (pixels[:, :, :3].min(axis=2) < 0.5).mean(axis=1) > 0
    assert inked[:1500].mean() > 0.3  # lines of text all the way down
