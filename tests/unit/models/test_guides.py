"""The guide that comes with lmcot: a real model, asked as configs/guide.yaml asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcot.config import load_config
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.sources import eos_ids, load_model
from lmcot.records import Failure

ROOT = Path(__file__).parents[3]


@pytest.mark.e2e
def test_it_quotes_and_concludes() -> None:
    """Its base alone does not: it answers in words of its own."""
    config = load_config(str(ROOT / "configs" / "guide.yaml"))
    model, tokenizer = load_model(config.policy.source, config.policy.dtype)
    examples = apply_context(
        load_examples(config.data.validation, limit=2).examples,
        config.data.context,
        lambda text: len(tokenizer.encode(text)),
    )
    templates = load_templates(config.prompts.templates)
    asked = [
        SampleRequest(
            encode(templates.rationale(one), tokenizer),
            seeds=[0],
            max_new_tokens=config.policy.max_new_tokens,
            temperature=0.0,
            eos_ids=eos_ids(model, tokenizer),
        )
        for one in examples
    ]
    replies = GenerationEngine(model, pad_id=int(tokenizer.pad_token_id or 0)).sample(asked)
    for example, reply in zip(examples, replies, strict=True):
        assert not isinstance(reply, Failure)
        text = tokenizer.decode(reply[0].response_ids)
        quoted, concluded, _ = text.partition("So the answer is")
        assert concluded, text
        words = quoted.replace(":", " ").split()
        passages = " ".join(str(paragraph) for paragraph in example.context)
        assert sum(word in passages for word in words) > 0.8 * len(words), text
