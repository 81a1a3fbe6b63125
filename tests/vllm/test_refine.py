"""What a run with vLLM refuses before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcot.errors import UserError
from tests.integration.runtime_cases import run


def test_an_encoder_decoder_policy_is_refused_before_anything_starts(tmp_path: Path) -> None:
    said = "rollout.engine is 'vllm', but policy.source 'random:counting-t5' is an encoder-decoder"
    with pytest.raises(UserError, match=said):
        run(tmp_path, "policy.source=random:counting-t5", "rollout.engine=vllm")
