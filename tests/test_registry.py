"""Classes of users that lack what their kind needs are errors when they are registered or passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

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


class NoCall(Credit):
    pass


@dataclass(frozen=True, kw_only=True)
class NoRead(Provider):
    def request(self, query: str, results: int, key: str) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("register", "made", "message"),
    [
        (register_rule, Alone, r"Alone .* as the branch rule 'mine': expected a class that derives from BranchRule"),
        (register_rule, NoJudge, r"NoJudge .*: it does not define \['judge'\], which a BranchRule needs"),
        (register_rule, NoPick, r"NoPick .*: it does not define \['pick'\]"),
        (register_rule, NoPlan, r"NoPlan .*: it does not define \['plan'\]"),
        (register_rule, NoContext, r"its judge cannot be called with \['self', 'candidate', 'context'\]"),
        (register_rule, print, r"print .*: expected a class that derives from BranchRule"),
        (register_credit, Alone, r"Alone .* as the credit 'mine': expected a class that derives from Credit"),
        (register_credit, NoCall, r"NoCall .*: it does not define \['__call__'\], which a Credit needs"),
        (register_provider, Alone, r"Alone .* as the search provider 'mine': expected a class that derives from Prov"),
        (register_provider, NoRead, r"NoRead .*: it does not define \['read'\], which a Provider needs"),
    ],
)
def test_a_class_that_lacks_a_method_is_an_error_at_its_registration(register, made, message):
    with pytest.raises(ConfigError, match=message):
        register("mine")(made)
    assert "mine" not in {*RULES.names, *CREDITS.names, *PROVIDERS.names}


def test_a_static_method_needs_no_self(monkeypatch):
    monkeypatch.setattr(RULES, "_classes", dict(RULES._classes))

    @register_rule("static")
    @dataclass(frozen=True, kw_only=True)
    class Static(BranchRule):
        @staticmethod
        def judge(candidate: Any, context: Any) -> BranchDecision:  # type: ignore[override]
            return BranchDecision(fires=True)

    assert RULES.get("static") is Static


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
