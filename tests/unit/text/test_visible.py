"""What of a model's text is its reply."""

from __future__ import annotations

import time

import pytest

from lmcot.text.visible import opens_thinking, visible_reply

BLANK = ("\n\n",)


@pytest.mark.parametrize(
    ("raw", "text", "thinking"),
    [
        ("Velm", "Velm", ""),
        ("<think>\nHm.\n</think>\n\nVelm", "Velm", "Hm."),
        ("<think>\r\nHm.\r\n</think>\r\n\r\nVelm", "Velm", "Hm."),
        ("<think>\n\n</think>\n\nVelm", "Velm", ""),
        ("<thinking>Hm.</thinking>Velm", "Velm", "Hm."),
        ("<THINK>Hm.</THINK> Velm", " Velm", "Hm."),
        ("<reasoning>Hm.</reasoning>\nVelm", "Velm", "Hm."),
        ("<thought>Hm.</thought>\nVelm", "Velm", "Hm."),
        ('<think duration="3">Hm.</think>Velm', "Velm", "Hm."),
        ("[THINK]Hm.[/THINK]Velm", "Velm", "Hm."),
        ("\u25c1think\u25b7Hm.\u25c1/think\u25b7Velm", "Velm", "Hm."),
        ("<seed:think>Hm.</seed:think>Velm", "Velm", "Hm."),
        (
            "<|begin_of_thought|>Hm.<|end_of_thought|>\n"
            "<|begin_of_solution|>Velm<|end_of_solution|>",
            "Velm",
            "Hm.",
        ),
        (
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Velm<|END_RESPONSE|>",
            "Velm",
            "Hm.",
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
            "Velm<|return|>",
            "Velm",
            "Hm.<|end|><|start|>assistant",
        ),
        ("<|channel|>final<|message|>Velm", "Velm", ""),
        ("<|channel|>analysis<|message|>Hm. So", "", "Hm. So"),
        ("analysisWe need it.assistantfinalVelm", "Velm", "We need it."),
        ("analysisWe need", "", "We need"),
        ("analysis of variance", "analysis of variance", ""),
        ("<|channel>thought\nHm.<channel|>Velm", "Velm", "Hm."),
        ("Here is my thought process: Hm. Here is my response: Velm", " Velm", "Hm."),
        # The prompt opened it.
        ("Hm. It could be Parrow.\n</think>\n\nVelm", "Velm", "Hm. It could be Parrow."),
        # It has no end.
        ("<think>\nHm. So", "", "Hm. So"),
        ("Sure. <think>Hm. So", "Sure. ", "Hm. So"),
        # It names its own tags, or comes several times.
        ("<think>A <think> tag.</think>Velm", "Velm", "A  tag."),
        ("<think>One.</think>Velm<think>Two.</think>", "Velm", "One.Two."),
        ("<think>With </think> it ends.</think>Velm", "Velm", "With  it ends."),
    ],
)
def test_hidden_thinking_is_no_part_of_the_reply(raw: str, text: str, thinking: str) -> None:
    found = visible_reply(raw)
    assert (found.text, found.thinking) == (text, thinking)


def test_what_a_prompt_opened_and_the_limit_cut_is_all_thinking() -> None:
    found = visible_reply("Hm. So", thinking=True)
    assert (found.text, found.thinking) == ("", "Hm. So")
    assert visible_reply("Hm.</think>Velm", thinking=True).text == "Velm"


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("[THINK]", True),
        ("Use <think> for your thoughts.\nassistant:", False),
    ],
)
def test_a_prompt_that_ends_within_thinking(prompt: str, opens: bool) -> None:
    assert opens_thinking(prompt) is opens


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Velm<|im_end|>", "Velm"),
        ("Velm</s>", "Velm"),
        ("Velm<|im_end", "Velm"),
        ("Velm<|", "Velm"),
        ("Velm</s><s>", "Velm"),
        ("<s> Velm", " Velm"),
        ("<pad> Velm", " Velm"),
        ("<pad><pad>Velm<eos>", "Velm"),
        ("Velm<end_of_turn>\n<start_of_turn>user\nAnd?", "Velm"),
        ("Velm<|eot_id|>", "Velm"),
        ("Velm<|endoftext|>Another text. The answer is Parrow.", "Velm"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nVelm", "Velm"),
        ("<|im_start|>assistant\nVelm<|im_end|>\n<|im_start|>user\nAnd?", "Velm"),
        ("<start_of_turn>model\nVelm", "Velm"),
        ("<\uff5cAssistant\uff5c>Velm<\uff5cend\u2581of\u2581sentence\uff5c>", "Velm"),
        ("[/INST] Velm [INST] And?", " Velm "),
        ("<|assistant|>\nVelm\n<|user|>\nAnd?", "Velm\n"),
        ("<extra_id_0> Velm", " Velm"),
        ("a <b and c> d | e", "a <b and c> d | e"),
        ("x <|> y", "x <|> y"),
    ],
)
def test_special_tokens_as_text_are_no_part_of_the_reply(raw: str, text: str) -> None:
    assert visible_reply(raw).text == text


def test_a_tokenizer_s_own_special_tokens_are_none_either() -> None:
    assert visible_reply("Velm[STOP]", special_tokens=["[STOP]"]).text == "Velm"


@pytest.mark.parametrize(
    ("raw", "text", "stopped"),
    [
        ("Velm\n\nQuestion: And?", "Velm", True),
        ("\n\nVelm\n\nAnd", "Velm", True),
        ("\r\n\r\nVelm\r\n\r\nAnd", "Velm", True),
        (" \n \n  Velm", "  Velm", False),
        ("<think>\n\nHm.\n\n</think>\n\nVelm", "Velm", False),
        ("<think>\n\nHm.", "", False),
        (
            "<|channel|>analysis<|message|>A\n\nB<|channel|>final<|message|>\n\nVelm\n\nC",
            "Velm",
            True,
        ),
    ],
)
def test_stop_strings_hold_for_the_reply_alone(raw: str, text: str, stopped: bool) -> None:
    found = visible_reply(raw, BLANK)
    assert (found.text, found.stopped) == (text, stopped)


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think></think>", "<think ", "<", "<|", "<|a", "\n", "\r\n", " ",
     "</s>", "<|channel|>", "<|channel|>analysis", "<|channel|>analysis<|message|>",
     "<|im_start|>  ", "[think]", "analysis", "A\n\n", "<|channel|>final <|a|>",
     "Here is my response:"],
)  # fmt: skip
def test_reading_takes_linear_time(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            visible_reply(text, BLANK)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(320_000) < 16 * max(seconds(40_000), 0.002)
