"""Tiny random models with generated tokenizers: they test code paths, not language."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcot.errors import UserError
from lmcot.files import finished_folder
from lmcot.process import accelerator_named

_FORM = 3
"""Version in the cached folder's name; raise it when the models built here change."""
_KINDS = ("llama", "t5", "counting-llama", "counting-t5")
_WORDS = (
    "the a of in and is was are born city country film band album river year first people "
    "context question answer reason step by so yes no which who what when where"
)
_SPECIAL = ["<pad>", "</s>", "<unk>"]


def build_random_model(kind: str, cache: Path) -> Path:
    """The folder of a random model, which is built if it is not in the cache.

    Kinds: ``llama`` and ``t5`` have a tokenizer trained on generated sentences;
    ``counting-llama`` and ``counting-t5`` only know the digits and the words of the toy task.

    Raises:
        UserError: if there is no such kind.
    """
    if kind not in _KINDS:
        raise UserError(f"there is no model 'random:{kind}': choose one of {', '.join(_KINDS)}")
    folder = cache / "models" / f"random-{kind}-{_FORM}"
    if not folder.is_dir():
        t5 = kind.endswith("t5")
        counting = kind.startswith("counting-")
        tokenizer = _counting_tokenizer() if counting else _text_tokenizer(ends=t5)
        model = _t5(tokenizer) if t5 else _llama(tokenizer)
        # save_pretrained imports DeepSpeed.
        with finished_folder(folder, replaces=False) as partial, accelerator_named():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _counting_tokenizer() -> PreTrainedTokenizerFast:
    words = ["write", "increasing", "numbers", "from", "."]
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *map(str, range(10)), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer)


def _text_tokenizer(*, ends: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on generated sentences; ``ends`` appends EOS to a text, as T5 does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    if ends:
        tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
        )
    return _wrap(tokenizer)


def _sentences() -> list[str]:
    words = _WORDS.split()
    generator = random.Random(0)
    return [" ".join(generator.choices(words, k=12)).capitalize() + "." for _ in range(200)]


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )


def _t5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.1,
            feed_forward_proj="gated-gelu",
            # At the default of 1 the initial logits are so large that only one token is drawn.
            initializer_factor=0.1,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
