from arpo_trl.common.tags import plain_spans, without

TOOLS, CODE = ("search", "python"), ("python",)


def spoken(text: str) -> str:
    return without(text, plain_spans(text, TOOLS, CODE))


def test_code_is_text_up_to_its_closing_tag() -> None:
    assert spoken("<python>a<search></python><search>b</search>") == "<python></python><search>b</search>"
    assert spoken("<python>a</search>b") == "<python>"
    assert spoken("<search><python>a</python></search>") == "<search><python>a</python></search>"  # no call of its own


def test_a_tag_that_prose_names_is_text_where_a_call_follows() -> None:
    assert spoken("use <search>: <search>a</search>") == "use : <search>a</search>"
    assert spoken("use <python>: <search>a</search>") == "use : <search>a</search>"
    assert spoken("use <search> a") == "use <search> a"  # no call follows: it was meant as one
    assert spoken("<search>a <search>b</search>") == "<search>a <search>b</search>"


def test_without_tools_nothing_is_read() -> None:
    assert plain_spans("<search>a</search>", (), ()) == []


def test_a_flood_of_tags_is_read_in_one_pass() -> None:
    flood = "a <search>" * 100_000 + "</search>"
    assert len(plain_spans(flood, TOOLS, CODE)) == 99_999
