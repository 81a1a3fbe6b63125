"""The transformers backend, on tiny random models of both architectures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcot.config import PromptSettings, TransformersFrozen
from lmcot.data.render import encode
from lmcot.frozen.local import _Reader
from lmcot.frozen.protocol import FrozenLM
from lmcot.frozen.transformers_backend import TransformersLM
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import FinishReason, Generated
from lmcot.models.generation.stopping import StopStrings
from lmcot.models.sources import load_model
from lmcot.records import (
    Choice,
    Completion,
    Failure,
    FailureKind,
    Message,
    Prompt,
    Sampling,
    Score,
)

WORDS = ["<pad>", "</s>", "<unk>", "yes", "no", "Yes", "No", *"abcdefghijklmnopqrstuvwxyz"]
PROMPTS: list[Prompt] = [
    (Message("user", text),) for text in ("a b c", "d", "e f g h i j k l m n", "o p a")
]
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads only get into each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _model(kind: str) -> PreTrainedModel:
    torch.manual_seed(2)
    common: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        model: Any = T5ForConditionalGeneration(
            T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **sizes, **common)
        )
        # Embeddings as large as T5's drown what the layers add, and every token repeats itself.
        model.shared.weight.data.mul_(0.1)
        model.lm_head.weight.data.mul_(0.5)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                bos_token_id=None,
                **common,
            )
        )
        # Weights as small as Llama's would make every token as likely as the next.
        for parameter in model.parameters():
            parameter.data.mul_(6.0)
    return model.eval()


def _lm(kind: str, **changes: Any) -> TransformersLM:
    settings: dict[str, Any] = {"identity": kind, "chat": "never", "max_batch_tokens": 1000}
    model = changes.pop("model", None) or _model(kind)
    return TransformersLM(model, _tokenizer(), **(settings | changes))


@torch.inference_mode()
def _loglikelihood_by_hand(model: PreTrainedModel, prompt: list[int], tail: list[int]) -> float:
    """One token at a time, one row, no padding, no cache."""
    total = 0.0
    for position, token in enumerate(tail):
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[0, *tail[:position]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *tail[:position]]])).logits
        total += float(torch.log_softmax(logits[0, -1], -1)[token])
    return total


@torch.inference_mode()
def _greedy_by_hand(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length and tokens[-1:] != [1]:
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[0, *tokens]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def _texts(found: list[Completion | Failure]) -> list[str]:
    assert all(isinstance(one, Completion) for one in found)
    return [one.text for one in found if isinstance(one, Completion)]


def _scores(found: list[Score | Failure]) -> list[float]:
    assert all(isinstance(one, Score) for one in found)
    return [one.logprob for one in found if isinstance(one, Score)]


def _choices(found: list[Choice | Failure]) -> list[list[float]]:
    assert all(isinstance(one, Choice) for one in found)
    return [list(one.probabilities.values()) for one in found if isinstance(one, Choice)]


both = pytest.mark.parametrize("kind", ["llama", "t5"])


@both
def test_score_equals_a_hand_loop_whatever_the_padding(kind: str) -> None:
    """[1] [5] logits at t-1 predict token t; padding changes nothing."""
    tokenizer, texts = _tokenizer(), ["a b c d e", "f", "g h", "yes no yes"]
    lm = _lm(kind)
    together = lm.score(PROMPTS, texts)
    for prompt, text, logprob in zip(PROMPTS, texts, _scores(together), strict=True):
        ids, tail = encode(prompt, tokenizer, "never"), tokenizer.encode(text)
        assert logprob == pytest.approx(_loglikelihood_by_hand(_model(kind), ids, tail), abs=1e-4)
        assert logprob == pytest.approx(_scores(lm.score([prompt], [text]))[0], abs=1e-4)
    first = together[0]
    assert isinstance(first, Score)
    assert (first.tokens, first.tokens_in) == (5, 3 + 5)


@both
def test_choice_is_the_softmax_of_scores_over_both_spellings(kind: str) -> None:
    lm = _lm(kind)
    chosen = lm.choose(PROMPTS, ("yes", "no"))
    for pair, mass in zip(_choices(chosen), _masses(lm, ("yes", "Yes", "no", "No")), strict=True):
        yes = (mass[0] + mass[1]) / sum(mass)
        assert pair == pytest.approx([yes, 1 - yes], abs=1e-4)
    assert isinstance(chosen[0], Choice)
    # One pass over the prompt tells all.
    assert (chosen[0].tokens_in, chosen[0].tokens_out) == (3, 0)


@both
def test_choice_of_several_tokens_sums_their_log_likelihoods(kind: str) -> None:
    lm = _lm(kind)
    chosen = lm.choose(PROMPTS, ("yes a", "no", "12"))
    found = _choices(chosen)
    spelled = ("yes a", "Yes a", "no", "No", "12")
    for shares, mass in zip(found, _masses(lm, spelled), strict=True):
        wanted = [mass[0] + mass[1], mass[2] + mass[3], mass[4]]
        assert shares == pytest.approx([one / sum(mass) for one in wanted], abs=1e-4)
    assert isinstance(chosen[0], Choice)
    # The prompt once, and the first tokens of "yes a" and of "Yes a".
    assert (chosen[0].tokens_in, chosen[0].tokens_out) == (3 + 2, 0)


def _masses(lm: TransformersLM, texts: Sequence[str]) -> list[list[float]]:
    """For each prompt the likelihood of each text."""
    columns = [_scores(lm.score(PROMPTS, [text] * len(PROMPTS))) for text in texts]
    return [[math.exp(logprob) for logprob in row] for row in zip(*columns, strict=True)]


@both
def test_greedy_equals_a_hand_loop_whatever_the_generation_config_says(kind: str) -> None:
    """[3] What a model's own generation_config smuggles in has no effect."""
    model = _model(kind)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=9.0, min_length=5)
    found = _lm(kind, model=model).generate(PROMPTS, GREEDY)
    tokenizer = _tokenizer()
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = encode(prompt, tokenizer, "never")
        tokens = _greedy_by_hand(_model(kind), ids, 6)
        assert isinstance(one, Completion)
        assert one.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (one.tokens_in, one.tokens_out) == (len(ids), len(tokens))
        assert one.finish_reason == ("stop" if tokens[-1] == 1 else "length")


@both
def test_the_token_budget_changes_neither_results_nor_their_order(kind: str) -> None:
    wide, narrow = _lm(kind), _lm(kind, max_batch_tokens=1)
    prompts = [*PROMPTS, *_equally_long(10)]
    with _tokens_of_passes(narrow) as narrow_passes, _tokens_of_passes(wide) as wide_passes:
        found = narrow.choose(prompts, ("yes", "no"))
        expected = wide.choose(prompts, ("yes", "no"))
    assert len(narrow_passes) > len(wide_passes)
    for one, other in zip(_choices(expected), _choices(found), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert wide.generate(prompts, GREEDY) == narrow.generate(prompts, GREEDY)


@both
def test_no_pass_reads_more_than_the_budget_and_none_a_token_again(kind: str) -> None:
    """[5] A call reads each prompt, and what it writes but for the last tokens."""
    lm, prompts = _lm(kind, max_batch_tokens=100), _equally_long(20)
    # A decoder reads its start token, once more when its source is encoded.
    once = 20 * (LENGTH + (2 if kind == "t5" else 0))
    with _tokens_of_passes(lm) as passes:
        assert len(_choices(lm.choose(prompts, ("yes", "no")))) == 20
        assert max(passes) <= 100
        assert sum(passes) == once
        passes.clear()
        written = lm.generate(prompts, GREEDY)
        after = [one.tokens_out - 1 for one in written if isinstance(one, Completion)]
        assert len(after) == 20
        assert max(passes) <= 100
        assert sum(passes) == once + sum(after)
        passes.clear()
        mixed = [*PROMPTS, *prompts]
        assert len(_texts(lm.generate(mixed, GREEDY))) == 24
        assert len(_choices(lm.choose(mixed, ("yes a", "no", "12")))) == 24
        assert max(passes) <= 100, "padding counts"


def test_what_prompts_begin_with_alike_is_read_once() -> None:
    """From 32 tokens on; so is one prompt that several continuations stand behind."""
    model = _model("llama")
    model.config.max_position_embeddings = 128
    lm = _lm("llama", model=model)
    first, second = ((Message("user", "a b c d " * 10 + end),) for end in ("e", "f g"))
    with _tokens_of_passes(lm) as passes:
        together = _choices(lm.choose([first, second], ("yes", "no")))
        assert sum(passes) == 40 + 1 + 2
        passes.clear()
        lm.choose([first], ("yes a", "no"))
        # Behind the shared 40 tokens: "e", "e yes" and "e Yes".
        assert sum(passes) == 40 + 1 + 2 + 2
    apart = [_choices(lm.choose([prompt], ("yes", "no")))[0] for prompt in (first, second)]
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert together[0] != pytest.approx(together[1], abs=1e-4)


LENGTH = 14


def _equally_long(count: int) -> list[Prompt]:
    """Prompts of 14 tokens that begin differently."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [(Message("user", " ".join((letters[n:] + letters)[:LENGTH])),) for n in range(count)]


@contextmanager
def _tokens_of_passes(lm: TransformersLM) -> Iterator[list[int]]:
    """How many tokens, with padding, each pass of the encoder and of the decoder reads."""
    seen: list[int] = []
    assert isinstance(lm._engine, GenerationEngine)
    handles = [
        module.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
        for module in lm._engine.model.modules()
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == len(WORDS)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@both
def test_sampling_repeats_with_its_seed_in_any_company(kind: str) -> None:
    lm = _lm(kind)
    seeded = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
    together = _texts(lm.generate(PROMPTS, seeded))
    assert together == [_texts(lm.generate([prompt], seeded))[0] for prompt in PROMPTS]
    other = Sampling(max_new_tokens=8, temperature=1.0, seed=6)
    assert together != _texts(lm.generate(PROMPTS, other))
    unseeded = Sampling(max_new_tokens=8, temperature=1.0)
    assert len({*_texts(lm.generate(PROMPTS[:1] * 8, unseeded))}) > 1


@both
def test_the_text_ends_before_the_first_stop_string(kind: str) -> None:
    lm = _lm(kind)
    free = _texts(lm.generate(PROMPTS, GREEDY))
    stop = free[0].split()[1]
    stopped = lm.generate(PROMPTS, Sampling(max_new_tokens=6, stop=(stop, "never said")))
    for text, one in zip(free, stopped, strict=True):
        assert isinstance(one, Completion)
        assert one.text == text.split(stop)[0]
        assert one.finish_reason == "stop" or stop not in text
    assert isinstance(stopped[0], Completion)
    assert stopped[0].tokens_out == 2


BLANK = "\n\n"


def _thinking_tokenizer(special: bool) -> PreTrainedTokenizerFast:
    tokenizer = _tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.add_tokens([BLANK])
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast, *words: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


def _sampled(ids: Sequence[int], finish: FinishReason) -> Generated:
    return Generated(tuple(ids), (0.0,) * len(ids), finish)


@pytest.mark.parametrize("special", [True, False])
def test_stop_strings_do_not_hold_for_hidden_thinking(special: bool) -> None:
    """Whether or not the tags are special tokens of the tokenizer."""
    tokenizer = _thinking_tokenizer(special)
    reader = _Reader(tokenizer, _ids(tokenizer, "a"), (BLANK,))
    rule = StopStrings(tokenizer, (BLANK,), reader.stopped)
    words = ("<think>", "a", BLANK, "b", "</think>", BLANK, "c", BLANK, "d", "</s>")
    ids = _ids(tokenizer, *words)
    assert [rule(ids[: end + 1]) for end in range(len(ids))] == [False] * 7 + [True] * 3
    found = reader.completion(_sampled(ids[:8], "stop"), 1)
    assert (found.text.strip(), found.thinking.split(), found.finish_reason) == (
        "c", ["a", "b"], "stop",
    )  # fmt: skip
    assert "</s>" not in reader.completion(_sampled(ids, "eos"), 1).text


def test_thinking_that_the_prompt_opened_and_the_limit_cut_is_no_reply() -> None:
    tokenizer = _thinking_tokenizer(special=True)
    reader = _Reader(tokenizer, _ids(tokenizer, "a", "<think>"), ())
    cut = reader.completion(_sampled(_ids(tokenizer, "b", "c"), "length"), 2)
    assert (cut.text, cut.thinking, cut.finish_reason) == ("", "b c", "length")
    whole = reader.completion(_sampled(_ids(tokenizer, "b", "</think>", "c"), "eos"), 2)
    assert (whole.text.strip(), whole.thinking) == ("c", "b")


@pytest.mark.parametrize(
    ("template", "chat", "stop", "ends"),
    [
        (None, "auto", None, True),
        ("{{ messages[0].content }}", "auto", None, False),
        ("{{ messages[0].content }}", "never", None, True),
        ("{{ messages[0].content }}", "auto", (BLANK,), True),
        (None, "auto", (), False),
    ],
)
def test_a_blank_line_ends_a_reply_where_prompts_are_plain_text(
    template: str | None, chat: Literal["auto", "never"], stop: tuple[str, ...] | None, ends: bool
) -> None:
    tokenizer = _thinking_tokenizer(special=True)
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # It says "c", then blank lines for ever.
    letter, blank = _ids(tokenizer, "c", BLANK)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[letter, 1] = 9.0
        model.model.embed_tokens.weight[blank, 1] = 9.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[letter, 0] = 1.0
        model.lm_head.weight[blank, 1] = 9.0
    lm = TransformersLM(model, tokenizer, identity="t", chat=chat, max_batch_tokens=64)
    (found,) = lm.generate([(Message("user", "a"),)], Sampling(max_new_tokens=6, stop=stop))
    assert isinstance(found, Completion)
    assert found.text.strip() == "c"
    assert (found.tokens_out, found.finish_reason) == ((2, "stop") if ends else (6, "length"))


@pytest.mark.usefixtures("model_cache")
@pytest.mark.parametrize(
    ("own", "of_all", "framed"),
    [
        (None, "auto", True),
        ("never", "auto", False),
        (None, "never", False),
        ("auto", "never", True),
    ],
)
def test_the_frozen_lm_has_its_own_say_on_the_chat_template(
    own: Literal["auto", "never"] | None,
    of_all: Literal["auto", "never"],
    framed: bool,
    tmp_path: Path,
) -> None:
    model, tokenizer = load_model("random:llama", "float32")
    tokenizer.chat_template = "a a a a {{ messages[0].content }} a a a a"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = TransformersFrozen(
        backend="transformers", source=str(tmp_path / "model"), dtype="float32", chat=own
    )
    lm = TransformersLM.open(settings, PromptSettings(chat=of_all))
    (found,) = lm.generate([(Message("user", "b"),)], Sampling(max_new_tokens=1))
    assert isinstance(found, Completion)
    assert (found.tokens_in > 8) == framed


def test_what_does_not_fit_into_the_positions_fails_alone() -> None:
    lm = _lm("llama")
    long: Prompt = (Message("user", "a " * 40),)
    mixed = [PROMPTS[0], long, PROMPTS[1]]
    generated = lm.generate(mixed, GREEDY)
    chosen = lm.choose(mixed, ("yes", "no"))
    scored = lm.score(mixed, ["a", "b", "c"])
    several = lm.choose(mixed, ("yes a", "no"))
    for found in (generated, chosen, scored, several):
        failure = found[1]
        assert isinstance(failure, Failure)
        assert failure.kind is FailureKind.PERMANENT
        assert "32 positions" in failure.reason
        assert not isinstance(found[0], Failure)
        assert not isinstance(found[2], Failure)
    assert generated[0] == lm.generate(PROMPTS[:1], GREEDY)[0]


def test_relative_positions_have_no_limit() -> None:
    long: Prompt = (Message("user", "a " * 600),)
    assert isinstance(_lm("t5").generate([long], Sampling(max_new_tokens=2))[0], Completion)


def test_an_empty_batch_and_an_empty_prompt() -> None:
    lm = _lm("llama")
    assert lm.generate([], GREEDY) == lm.choose([], ("yes", "no")) == lm.score([], []) == []
    assert isinstance(lm.generate([()], GREEDY)[0], Failure)


def test_a_continuation_is_parted_from_the_prompt_by_white_space_once() -> None:
    """A tokenizer that keeps white space shows where it goes."""
    letters = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", " ", "\n", *"abyes:"])}
    characters = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    lm = TransformersLM(
        _model("llama"), tokenizer, identity="x", chat="never", max_batch_tokens=100
    )
    yes = [letters[c] for c in "yes"]
    assert lm._continuation_ids([letters["b"], letters[":"]], "yes") == [letters[" "], *yes]
    assert lm._continuation_ids([letters[":"], letters["\n"]], "yes") == yes
    assert lm._continuation_ids([letters[":"]], " yes") == [letters[" "], *yes]


def test_identity_and_size() -> None:
    lm: FrozenLM = _lm("llama")
    assert lm.identity == "llama"
    assert lm.parameters == sum(p.numel() for p in _model("llama").parameters())
