"""What the frozen LM of a service reads: the prompts are those of training."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.answering.asking import Asking
from lmcot.config import parse_config
from lmcot.models.sources import load_tokenizer
from lmcot.records import Paragraph, Prompt

pytestmark = pytest.mark.usefixtures("model_cache")

CONTEXT = (Paragraph("Elko", ("The city straddles the Humboldt River.",)),)
QUESTION = "Which river does Elko straddle?"
RATIONALE = "Elko lies on the Humboldt."


def asking(reads: str, **frozen: Any) -> Asking:
    source = "random:llama"
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": source},
            "frozen": {"backend": "transformers", "source": source, **frozen},
            "refine": {"start_from": "base"},
            "prompts": {"frozen_reads": reads, "templates": "base"},
        }
    )
    return Asking(config, load_tokenizer(source))


def reads_passages(prompt: Prompt) -> bool:
    return any("straddles the Humboldt" in one.content for one in prompt)


@pytest.mark.parametrize(("reads", "passages"), [("passages", True), ("rationale_only", False)])
def test_a_guided_answer_rests_on_what_the_settings_let_the_frozen_lm_read(
    reads: str, passages: bool
) -> None:
    """The rationale and the question always; the small LM reads the passages in any case."""
    served = asking(reads)
    example = served.example(QUESTION, CONTEXT)
    assert example.context == CONTEXT
    prompt = served.answer_prompt(example, RATIONALE, "Be brief.")
    assert RATIONALE in prompt[-1].content
    assert QUESTION in prompt[-1].content
    assert prompt[0].content.endswith("\n\nBe brief.")
    assert reads_passages(prompt) is passages
    as_object = served.object_prompt(example, RATIONALE, "the Humboldt", '{"type": "object"}')
    assert reads_passages(as_object) is passages


def test_an_unguided_answer_reads_the_passages_in_any_case() -> None:
    served = asking("rationale_only")
    assert reads_passages(served.answer_prompt(served.example(QUESTION, CONTEXT), None))


def test_the_reply_ends_as_the_template_says(monkeypatch: pytest.MonkeyPatch) -> None:
    served = asking("rationale_only")
    file = served._templates.file
    assert file.rationale_only is not None
    ends = file.rationale_only.model_copy(update={"stop": ("END",)})
    changed = file.model_copy(update={"rationale_only": ends})
    monkeypatch.setattr(file.__class__, "for_frozen", lambda _, kind, **__: getattr(changed, kind))
    assert served.answer_sampling(True).stop == ("END",)
    assert served.answer_sampling(False).stop is None
