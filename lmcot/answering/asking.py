"""From what a user asks to what the two models read: the prompts are those of training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmcot import run_files
from lmcot.config import Config, load_config
from lmcot.data.context import select_context
from lmcot.data.prompts import load_templates, reply_sampling
from lmcot.data.render import encode, tame
from lmcot.data.sampler import sample_seed
from lmcot.errors import UserError
from lmcot.frozen.needs import cost_in_words
from lmcot.monitor.progress import say
from lmcot.records import Example, Message, Paragraph, Prompt, Sampling
from lmcot.rewards.first_check import check_frozen
from lmcot.storage import reaching
from lmcot.text.sentences import split_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lmcot.storage import Place

Context = str | Sequence[Mapping[str, str] | tuple[str, str] | Paragraph]
"""A text, or passages: ``{"title", "text"}``, pairs of the two, or paragraphs."""

_AS_OBJECT = (
    "Write this answer as one JSON object that fits the JSON schema below. Write the object only."
)
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class Pair:
    """A trained pair, as a run directory holds it."""

    config: Config
    source: str
    """Model source of the small LM."""
    version: str
    """Which policy of which run it is, for people."""


def open_pair(run_dir: Place, policy: str | None = None, overrides: Sequence[str] = ()) -> Pair:
    """The most trained policy of a run, with the run's settings.

    Args:
        policy: ``refined``, ``distilled``, ``best`` or ``base`` instead.
        overrides: ``key.sub=value``, in place of the run's.

    Raises:
        UserError: if that is no run directory, or has no such policy, or no frozen LM.
    """
    file = run_dir / run_files.CONFIG
    with reaching(run_dir):
        there = file.is_file()
        run_files.check_format(run_dir)
        found = policy or run_files.most_trained(run_dir)
        if found and not run_files.holds_model(run_dir / found):
            found = None
    if not there:
        raise UserError(f"'{run_dir}' is no run directory: it has no config.yaml")
    config = load_config(str(file), list(overrides))
    if config.frozen is None:
        raise UserError(f"the run in '{run_dir}' has no frozen LM: there is nobody to answer")
    if policy == "base":
        return Pair(config, config.policy.source, f"base of {run_dir.name}")
    if found is None:
        raise UserError(
            f"'{run_dir}' holds no {policy or 'trained'} policy: train one with 'lmcot train', or "
            "ask for the policy 'base'"
        )
    return Pair(config, str(run_dir / found), f"{found} of {run_dir.name}")


def learned(pair: Pair) -> Pair:
    """The pair with what its endpoint was found to take: parameters that it refuses are renamed
    or left out. A local model is not asked, only looked for.

    Raises:
        UserError: if the endpoint does not answer, or there is no such model.
    """
    templates = load_templates(pair.config.prompts.templates)
    checked = check_frozen(pair.config, templates, "serve")
    for notice in checked.notices:
        say(notice)
    if checked.usage.sent:
        say(f"the frozen LM's endpoint was asked first: {cost_in_words(checked.usage)}")
    return replace(pair, config=checked.config)


def paragraphs(context: Context) -> tuple[Paragraph, ...]:
    """A context as passages; a text has one for each block between blank lines.

    Raises:
        ValueError: if a passage has neither title nor text.
    """
    if isinstance(context, str):
        blocks = [("", block) for block in _BLANK_LINES.split(context)]
    else:
        blocks = [_title_and_text(one) for one in context if not isinstance(one, Paragraph)]
        if len(blocks) < len(context):
            return tuple(_paragraph(*_title_and_text(one)) for one in context)
    return tuple(_paragraph(title, text) for title, text in blocks if title.strip() or text.strip())


def _title_and_text(one: Mapping[str, str] | tuple[str, str] | Paragraph) -> tuple[str, str]:
    if isinstance(one, Paragraph):
        return one.title, " ".join(one.sentences)
    if isinstance(one, Mapping):
        if "text" not in one:
            raise ValueError("a passage needs a 'text', and may have a 'title'")
        return one.get("title", ""), one["text"]
    title, text = one
    return title, text


def _paragraph(title: str, text: str) -> Paragraph:
    return Paragraph(title.strip(), tuple(split_sentences(" ".join(text.split()))))


class Asking:
    """What is asked of both models, by the settings that they were trained with.

    Text that looks like a special token, of the tokenizer or of any common chat template, gets a
    space put into it, or a question could end its own turn and begin another.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Args: tokenizer: of the model that reads; contexts are measured with the small LM's."""
        if config.frozen is None:
            raise UserError("there is no 'frozen' section: nobody could answer")
        self._config = config
        self._frozen = config.frozen
        self._tokenizer = tokenizer
        self._templates = load_templates(config.prompts.templates)
        special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
        marks = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def tame(self, text: str) -> str:
        """The text without special tokens."""
        return tame(self._marks.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text))

    def _tamed(self, example: Example) -> Example:
        context = tuple(
            Paragraph(self.tame(one.title), tuple(map(self.tame, one.sentences)))
            for one in example.context
        )
        return Example(example.id, self.tame(example.question), "", context)

    def example(self, question: str, context: Context) -> Example:
        """A question with its context, cut to what the models were trained to read."""
        # Marks are broken up first: what is cut afterwards is within the budget.
        whole = self._tamed(Example("asked", question.strip(), "", paragraphs(context)))
        if not whole.context:
            return whole
        shown = select_context(
            whole,
            self._config.data.context,
            lambda text: len(self._tokenizer.encode(text, add_special_tokens=False)),
        )
        return Example("asked", whole.question, "", shown)

    def rationale_ids(self, example: Example) -> list[int]:
        """Token ids that the small LM goes on from."""
        prompt = self._templates.rationale(self._tamed(example))
        return encode(prompt, self._tokenizer, self._config.prompts.chat)

    def answer_prompt(
        self, example: Example, rationale: str | None, instruction: str = ""
    ) -> Prompt:
        """What the frozen LM is asked; without a rationale as in the row ``standard``.

        Args:
            instruction: what else it is to observe; stands below the template's own.
        """
        shown, tamed = self._config.prompts.demonstrations, self._tamed(example)
        if rationale is None:
            prompt = self._templates.standard(tamed, shown)
        else:
            prompt = self._templates.guided(tamed, self.tame(rationale), shown)
        if not instruction:
            return prompt
        system = [one.content for one in prompt if one.role == "system"]
        rest = [one for one in prompt if one.role != "system"]
        return (Message("system", "\n\n".join([*system, self.tame(instruction)])), *rest)

    def object_prompt(
        self, example: Example, rationale: str, answer: str, schema: str, instruction: str = ""
    ) -> Prompt:
        """What the frozen LM is asked when its answer is to be a JSON object."""
        asked = self.answer_prompt(example, rationale, instruction)
        wish = Message("user", f"{_AS_OBJECT}\n{self.tame(schema)}")
        return (*asked, Message("assistant", self.tame(answer)), wish)

    def object_sampling(self, max_tokens: int | None) -> Sampling:
        """How it writes an object: greedy."""
        longest = self._config.serve.limits.object_tokens
        room = min(longest, max_tokens or longest) + self._frozen.max_thinking_tokens
        return Sampling(max_new_tokens=room)

    def shortened(self, text: str, tokens: int) -> str:
        """A text cut to so many tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= tokens:
            return text
        cut = str(self._tokenizer.decode(ids[:tokens], skip_special_tokens=True))
        return cut.rstrip("\ufffd").strip()

    def answer_sampling(self, guided: bool) -> Sampling:
        """How it replies: greedy."""
        file = self._templates.file
        template = file.guided if guided else file.standard
        return reply_sampling(template, self._frozen.answer_limit)

    @staticmethod
    def seeds(seed: int, samples: int) -> list[int]:
        """Seeds of so many rationales."""
        return [sample_seed(seed, "serve", number) for number in range(samples)]
