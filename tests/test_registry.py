"""Classes of users that lack what their kind needs are errors when they are registered or passed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from arpo_trl import ARPOConfig
from arpo_trl.command_line import parse_settings
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.credit import CREDITS, register_credit
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.rules import RULES, BranchDecision, BranchRule, Planned, Rounds, register_rule
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.search.index import search_tool
from arpo_trl.tools.search.providers import PROVIDERS, Provider, register_provider
from support import ANSWER, Scripted


class Alone:
    def judge(self, candidate: Any, context: Any) -> BranchDecision:
        return BranchDecision(fires=True)


@dataclass(frozen=True, kw_only=True)
class NoJudge(BranchRule):
    pass


@dataclass(frozen=True, kw_only=True)
class NoPick(Rounds):
    pass


@dataclass(frozen=True, kw_only=True)
class NoPlan(Planned):
    pass


@dataclass(frozen=True, kw_only=True)
class NoContext(BranchRule):
    def judge(self, candidate: Any) -> BranchDecision:  # type: ignore[override]
        return BranchDecision(fires=True)


@dataclass(frozen=True, kw_only=True)
class Always(BranchRule):
    def judge(self, candidate: Any, context: Any) -> BranchDecision:
        return BranchDecision(fires=True)


class NoAbove(Always):
    def most_branches(self) -> int:  # type: ignore[override]
        return 2


class OwnInit(Always):
    def __init__(self, depth: int = 3):
        pass


class NoCall(Credit):
    pass


@dataclass(frozen=True, kw_only=True)
class NoRead(Provider):
    def request(self, query: str, results: int, key: str) -> Any:
        raise AssertionError


class OwnAddress(NoRead):
    def __init__(self, url: str):
        pass

    def read(self, answer: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("register", "made", "message"),
    [
        (register_rule, Alone, r"Alone .* as the branch rule 'mine': expected a class that derives from BranchRule"),
        (register_rule, NoJudge, r"NoJudge .*: it does not define \['judge'\], which a BranchRule needs"),
        (register_rule, NoPick, r"NoPick .*: it does not define \['pick'\]"),
        (register_rule, NoPlan, r"NoPlan .*: it does not define \['plan'\]"),
        (register_rule, NoContext, r"its judge cannot be called with \['self', 'candidate', 'context'\]"),
        (register_rule, NoAbove, r"its most_branches cannot be called with \['self', 'above'\]"),
        (register_rule, OwnInit, r"OwnInit .*: its own __init__ .*branches_per_fork.*as fields under @dataclass"),
        (register_rule, print, r"print .*: expected a class that derives from BranchRule"),
        (register_credit, Alone, r"Alone .* as the credit 'mine': expected a class that derives from Credit"),
        (register_credit, NoCall, r"NoCall .*: it does not define \['__call__'\], which a Credit needs"),
        (register_provider, Alone, r"Alone .* as the search provider 'mine': expected a class that derives from Prov"),
        (register_provider, NoRead, r"NoRead .*: it does not define \['read'\], which a Provider needs"),
        (
            register_provider,
            OwnAddress,
            r"OwnAddress .*: its own __init__ does not take the fields \['base_url'\] .*Expected a frozen",
        ),
    ],
)
def test_a_class_that_lacks_a_method_is_an_error_at_its_registration(register, made, message):
    with pytest.raises(ConfigError, match=message):
        register("mine")(made)
    assert "mine" not in {*RULES.names, *CREDITS.names, *PROVIDERS.names}


@pytest.mark.parametrize(
    ("register", "decorator"),
    [(register_rule, "rule"), (register_credit, "credit"), (register_provider, "provider")],
)
def test_a_decorator_without_a_name_is_an_error(register, decorator):
    with pytest.raises(ConfigError, match=rf'@register_{decorator} has no name; .*@register_{decorator}\("my_name"\)'):
        register(NoCall)


@pytest.mark.parametrize("name", ["local", "recorded"])
def test_a_provider_cannot_have_the_name_of_a_source_without_a_service(name):
    with pytest.raises(ConfigError, match=f"The search provider '{name}' is built in"):
        register_provider(name)


def test_a_static_method_needs_no_self(monkeypatch):
    monkeypatch.setattr(RULES, "_classes", dict(RULES._classes))

    @register_rule("static")
    @dataclass(frozen=True, kw_only=True)
    class Static(BranchRule):
        @staticmethod
        def judge(candidate: Any, context: Any) -> BranchDecision:  # type: ignore[override]
            return BranchDecision(fires=True)

    assert RULES.get("static") is Static


def test_a_rule_whose_attributes_are_no_fields_and_a_credit_that_cannot_be_set_are_errors(monkeypatch):
    for registry in (RULES, CREDITS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    @register_rule("undecorated")
    class Undecorated(Alone, BranchRule):
        kinds: ClassVar[int] = 1
        branch_threshold: float = 0.0

    @register_credit("frozen")
    @dataclass(frozen=True)
    class Frozen(Credit):
        def __call__(self, trees: Any, rewards: Any, advantages: Any) -> Any:
            return advantages, None

    @register_credit("plain")
    class Plain(Credit):
        def __call__(self, trees: Any, rewards: Any, advantages: Any) -> Any:
            return advantages, None

    with pytest.raises(ConfigError, match=r"'undecorated' has the attributes \['branch_threshold'\], .*@dataclass"):
        RULES.build("undecorated", {})
    with pytest.raises(ConfigError, match=r"The credit 'frozen' is a frozen dataclass.*Remove frozen=True"):
        CREDITS.build("frozen", {})
    with pytest.raises(ConfigError, match=r"'plain' has no options. Decorate the class with @dataclass"):
        CREDITS.build("plain", {"scale": 2})


OWN = """
from dataclasses import dataclass
from arpo_trl import BranchDecision, BranchRule, Credit

@dataclass(frozen=True, kw_only=True)
class Early(BranchRule):
    until_depth: int = 2

    def judge(self, candidate, context):
        return BranchDecision(fires=candidate.depth <= self.until_depth)

@dataclass
class Scaled(Credit):
    factor: float = 1.0

    def __call__(self, trees, rewards, advantages):
        return self.factor * advantages, None

class Other:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    for registry in (RULES, CREDITS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("own_classes", None)


def test_a_configuration_file_selects_classes_by_their_import_path(tmp_path, own_module):
    settings = tmp_path / "config.yaml"
    settings.write_text(
        "output_dir: run\nuse_cpu: true\nbranch_rule: own_classes:Early\nbranch_rule_kwargs: {until_depth: 3}\n"
        "advantage_attribution: own_classes:Scaled\nadvantage_attribution_kwargs: {factor: 0.5}\n"
    )
    (config,) = parse_settings((ARPOConfig,), ["--config", str(settings)])
    assert (config.branch_rule, config.advantage_attribution) == ("own_classes:Early", "own_classes:Scaled")
    rule, credit = config.make_branch_rule(), config.make_credit()
    assert (type(rule).__name__, rule.until_depth, rule.name) == ("Early", 3, "own_classes:Early")
    assert (type(credit).__name__, credit.factor) == ("Scaled", 0.5)


def test_an_import_path_selects_the_class_that_the_module_defines_now(tmp_path, own_module):
    settings = {"branch_rule": "own_classes:Early", "advantage_attribution": "own_classes:Scaled"}
    config = ARPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert (config.make_branch_rule().until_depth, config.make_credit().factor) == (2, 1.0)
    changed = OWN.replace("until_depth: int = 2", "until_depth: int = 5").replace(
        "factor: float = 1.0", "factor: int = 3"
    )
    exec(changed, vars(sys.modules["own_classes"]))  # as a cell of a notebook that is run again
    config = ARPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert (config.make_branch_rule().until_depth, config.make_credit().factor) == (5, 3)


def test_a_program_that_selects_its_own_registered_class_by_its_file_is_told_the_name(tmp_path, own_module):
    registered = "\nfrom arpo_trl import register_rule\nregister_rule('mine')(Early)\n"
    (tmp_path / "own_classes.py").write_text(OWN + registered)
    exec(OWN + registered, {"__name__": "__main__"})
    with pytest.raises(
        ConfigError, match=r"__main__\.Early has that name.*the started .*'mine'.*own_classes\.py, line \d+"
    ):
        ARPOConfig(output_dir=str(tmp_path), use_cpu=True, branch_rule="own_classes:Early")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("moment = 'RESULT'", r"`moment` of .* is 'RESULT'; expected a Moment of arpo_trl.rollout.rules"),
        ("alarms = ['x']", r"`alarms` of .* is \['x'\]; expected a list of Alarm of arpo_trl.common.alarm"),
        (
            "first_paths = lambda self, leaves: 2.0",
            r"returned 2\.0 from `first_paths`; expected a whole number of at least 1",
        ),
        ("first_paths = lambda self, leaves: 0", r"returned 0 from `first_paths`; expected a whole number"),
    ],
)
def test_an_attribute_of_a_rule_of_another_kind_is_an_error_that_names_it(tmp_path, own_module, attribute, message):
    (tmp_path / "own_classes.py").write_text(OWN.replace("until_depth: int = 2", attribute))
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(output_dir=str(tmp_path), use_cpu=True, branch_rule="own_classes:Early")


def test_a_sampler_checks_the_moment_of_its_rule():
    made = Scripted(lambda request, context: ANSWER)
    rule = type("Named", (Always,), {"moment": "RESULT"})()
    with pytest.raises(ConfigError, match="`moment` of the branch rule 'unregistered' is 'RESULT'"):
        TreeSampler(made.engine, made.toolbox, made.protocol, replace(made.sampler.settings, rule=rule))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"branch_rule": "own_classes:Late"},
            "branch_rule contains .* has no function or class 'Late'; it has .*'Early'",
        ),
        ({"branch_rule": "no_such:Early"}, "branch_rule contains .*, but no_such cannot be imported"),
        (
            {"branch_rule": "own_classes:Other"},
            "Other .* as the branch rule .*: expected a class that derives from Br",
        ),
        (
            {"advantage_attribution": "own_classes:Early"},
            "Early .* as the credit .*: expected a class that derives from",
        ),
        ({"branch_rule": "nowhere"}, "or the import path of a class of yours, such as my_module:MyClass"),
        (
            {"branch_rule": "own_classes:Early", "branch_rule_kwargs": {"depth": 1}},
            r"branch_rule_kwargs has \['depth'\], but the branch rule 'own_classes:Early' has \['until_depth'\]",
        ),
    ],
)
def test_an_import_path_of_something_else_is_an_error(tmp_path, own_module, settings, message):
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


MEMBERS = ["vocab_size", "has_logprobs", "forward_s", "max_length", "session", "submit", "poll"]


@pytest.mark.parametrize("member", MEMBERS)
def test_an_engine_that_lacks_a_member_is_an_error_before_the_first_rollout(member):
    made = Scripted(lambda request, context: ANSWER)
    engine = type("Partial", (), {name: None for name in MEMBERS if name != member})()
    with pytest.raises(ConfigError, match=f"The engine Partial has no {member}, which the sampler needs"):
        TreeSampler(engine, made.toolbox, made.protocol, made.sampler.settings)


def test_a_source_of_search_without_the_method_is_an_error():
    with pytest.raises(ConfigError, match="The source of search_tool is a dict without a method `search`"):
        search_tool({"iron": "1538"})  # type: ignore[arg-type]
