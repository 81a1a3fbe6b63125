"""What questions lack is said, or refused, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.config import Config, parse_config
from lmcot.errors import UserError
from lmcot.records import Example, Paragraph, SupportingFact
from lmcot.run.presence import check_presence, what_is_left_out

BARE = Example("bare", "Who?", "Ott", ())
WHOLE = Example(
    "whole", "Who?", "Ott", (Paragraph("Ott", ("Ott did.",)),), (SupportingFact("Ott", 0),)
)


def config(**settings: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:t5"},
            "frozen": {"backend": "transformers", "source": "random:t5"},
            "refine": {"start_from": "base"},
            **settings,
        }
    )


def test_a_teacher_without_its_facts_is_refused() -> None:
    by_facts = config(teacher={"kind": "supporting_facts"})
    with pytest.raises(UserError, match="has any: set it"):
        check_presence(by_facts, [BARE])
    check_presence(by_facts, [BARE, WHOLE])
    check_presence(by_facts, [Example("told", "Who?", "Ott", (), facts=("Ott did.",))])
    check_presence(config(), [BARE])


def test_a_weight_on_what_takes_passages_is_refused() -> None:
    weighed = config(rewards={"aspects": {"factuality": {"weight": 0.3}}})
    with pytest.raises(UserError, match=r"factuality.weight is set, but 1 of 2 questions"):
        check_presence(weighed, [BARE, WHOLE])
    check_presence(weighed, [WHOLE])
    judged = {"factuality": {"weight": 0.3, "source": "judge"}}
    check_presence(config(rewards={"aspects": judged}), [BARE])


def test_what_goes_without_passages_is_said() -> None:
    assert what_is_left_out(config(), [WHOLE], "data.train") == []
    told = what_is_left_out(config(), [BARE, WHOLE], "data.train")
    assert told[0].startswith("data.train: 1 of 2 questions have no passages")
    assert "'closed_book' does not" in told[1]
    (told_of_all,) = what_is_left_out(config(task="boolean"), [BARE], "data.validation")
    assert told_of_all.startswith("data.validation: no question has passages")
    several = {"kind": "frozen", "samples": 2, "temperature": 1.0}
    assert "the shortest is kept" in what_is_left_out(config(teacher=several), [BARE], "x")[-1]
    toy = config(rewards={"kind": "increasing"}, frozen=None)
    assert what_is_left_out(toy, [BARE], "data.train") == []
