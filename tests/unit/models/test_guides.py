"""The guide that comes with lmcot: a real model, asked as configs/guide.yaml asks it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

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


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text))


@pytest.mark.e2e
def test_it_quotes_and_concludes() -> None:
    """Its base alone does neither: it answers in words of its own."""
    config = load_config(str(ROOT / "configs" / "guide.yaml"))
    assert config.frozen is not None
    assert config.frozen.backend == "transformers"
    examples = load_examples(config.data.validation, limit=4).examples
    templates = load_templates(config.prompts.templates)
    concluded = {}
    for source in (config.policy.source, config.frozen.source):
        model, tokenizer = load_model(source, "float32")
        read = apply_context(examples, config.data.context, partial(_length, tokenizer))
        engine = GenerationEngine(model, pad_id=int(tokenizer.pad_token_id or 0))
        asked = [
            SampleRequest(
                encode(templates.rationale(one), tokenizer),
                seeds=[0],
                max_new_tokens=config.policy.max_new_tokens,
                temperature=0.0,
                eos_ids=eos_ids(model, tokenizer),
            )
            for one in read
        ]
        texts = [
            tokenizer.decode(replies[0].response_ids)
            for replies in engine.sample(asked)
            if not isinstance(replies, Failure)
        ]
        assert len(texts) == 4
        concluded[source] = sum("So the answer is" in text for text in texts)
    assert concluded[config.policy.source] >= 3
    assert concluded[config.frozen.source] <= 1
