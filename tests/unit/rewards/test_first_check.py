"""What a run, a service and a fit of aspects ask of the frozen LM before they start."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.config import Config, parse_config
from lmcot.data.prompts import load_templates
from lmcot.errors import UserError
from lmcot.rewards.first_check import Asker, check_frozen
from tests.support.endpoint import Call, Endpoint, completion


def config(endpoint: Endpoint, **changes: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {
                "backend": "openai", "base_url": endpoint.url, "model": "m", "max_retries": 0,
                "max_answer_tokens": 7, "max_rationale_tokens": 50,
            },
            "teacher": {"kind": "frozen"},
            "rewards": {
                "kind": "guidance",
                "aspects": {"factuality": {"source": "judge", "weight": 1.0}},
            },
            "evaluate": {"rows": ["guided_base", "cot+sc"]},
        }
        | changes
    )  # fmt: skip


def judged(call: Call) -> bool:
    return "logprobs" in call.body


@pytest.mark.parametrize(
    ("asker", "limits", "judges"),
    [("run", {7, 50}, True), ("serve", {7}, False), ("fit", {7}, True)],
)
def test_each_asker_sends_the_forms_that_it_will_send(
    endpoint: Endpoint, asker: Asker, limits: set[int], judges: bool
) -> None:
    """Answers are short and rationales long; only what judges asks for a yes or no."""
    endpoint.respond = lambda call: completion(call, "No", {"No": -0.1, "Yes": -3.0})
    checked = check_frozen(config(endpoint), load_templates("default"), asker)
    assert checked.usage.sent == len(endpoint.calls)
    asked = [call for call in endpoint.calls if not judged(call)]
    if asker != "run":  # a run also looks whether the endpoint samples
        assert len(asked) == 1, "one of each form"
    assert limits <= {call.body["max_tokens"] for call in asked}
    assert any(map(judged, endpoint.calls)) == judges


def test_a_service_asks_as_it_will_ask(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: completion(call, "Velm")
    given = config(endpoint, prompts={"frozen_reads": "rationale_only"})
    check_frozen(given, load_templates("default"), "serve")
    asked = str(endpoint.calls[0].body["messages"])
    assert "student's reasoning: Velm lies" in asked
    assert "It lies on the river" not in asked


def test_a_service_needs_no_judge(endpoint: Endpoint) -> None:
    """A component that an endpoint cannot measure ends a run, and is nothing to a service."""
    endpoint.respond = lambda call: completion(call, "Velm")
    templates, given = load_templates("default"), config(endpoint)
    with pytest.raises(UserError, match=r"rewards\.aspects\.factuality has the weight 1, but it"):
        check_frozen(given, templates)
    assert check_frozen(given, templates, "serve").config.rewards == given.resolved().rewards
