"""From what a user asks to what the two models read: the prompts are those of training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcot.config import Config
from lmcot.config.rows import find_row
from lmcot.data.context import select_context
from lmcot.data.prompts import reply_sampling
from lmcot.data.render import rationale_ids, tame
from lmcot.data.row_requests import frozen_prompt, row_sampling
from lmcot.data.sampler import sample_seed
from lmcot.data.values import composed
from lmcot.errors import UserError
from lmcot.frozen.templates import open_templates
from lmcot.records import Example, Message, Paragraph, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AS_OBJECT = (
    "Write this answer as one JSON object that fits the JSON schema below. Write the object only."
)


class Asking:
    """Makes the prompts of both models, by the settings that they were trained with.

    Text that looks like a special token, of the tokenizer or of any common chat template, gets a
    space inside: otherwise a question could end its own turn and begin another one.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Args: tokenizer: the reading model's; contexts are measured with the small LM's."""
        if config.frozen is None:
            raise UserError("the settings have no 'frozen' section, so nothing can answer")
        self._config = config
        self._frozen = config.frozen
        self._tokenizer = tokenizer
        self._templates = open_templates(config.prompts)
        special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
        marks = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def tame(self, text: str) -> str:
        """The text, in which nothing is a special token any more."""
        return tame(self._marks.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text))

    def _tamed(self, example: Example) -> Example:
        context = tuple(
            Paragraph(self.tame(one.title), tuple(map(self.tame, one.sentences)))
            for one in example.context
        )
        first = self.tame(example.first_answer)
        return Example(example.id, self.tame(example.question), "", context, first_answer=first)

    def example(self, question: str, context: Sequence[Paragraph]) -> Example:
        """A question with its context, cut to what the models were trained to read."""
        # Marks are broken up first: what is cut afterwards is within the budget.
        whole = self._tamed(Example("asked", composed(question.strip()), "", tuple(context)))
        if not whole.context:
            return whole
        shown = select_context(
            whole,
            self._config.data.context,
            lambda text: len(self._tokenizer.encode(text, add_special_tokens=False)),
        )
        return Example("asked", whole.question, "", shown)

    def rationale_ids(self, example: Example) -> tuple[int, ...]:
        """Token ids of the prompt that the small LM continues with a rationale."""
        chat = self._config.prompts.chat
        return rationale_ids(self._tamed(example), self._templates, self._tokenizer, chat)

    def answer_prompt(
        self, example: Example, rationale: str | None, instruction: str = ""
    ) -> Prompt:
        """The frozen LM's prompt; without a rationale it is that of the row ``standard``, which
        reads the passages whatever ``prompts.frozen_reads`` is.

        Args:
            instruction: a further instruction, put below the template's own.
        """
        tamed = self._tamed(example)
        if rationale is None:
            prompt = self._templates.standard(tamed)
        else:
            kind = self._config.prompts.guided_kind
            prompt = self._templates.guided(tamed, self.tame(rationale), kind)
        if not instruction:
            return prompt
        system = [one.content for one in prompt if one.role == "system"]
        rest = [one for one in prompt if one.role != "system"]
        return (Message("system", "\n\n".join([*system, self.tame(instruction)])), *rest)

    def first_prompt(self, example: Example) -> Prompt:
        """The frozen LM's prompt for its first answer, which the small LM advises on."""
        kind = self._config.prompts.first_answer
        return frozen_prompt(kind, self._templates, self._tamed(example), "")

    def object_prompt(
        self, example: Example, rationale: str, answer: str, schema: str, instruction: str = ""
    ) -> Prompt:
        """The frozen LM's prompt when its answer must be a JSON object."""
        asked = self.answer_prompt(example, rationale, instruction)
        wish = Message("user", f"{_AS_OBJECT}\n{self.tame(schema)}")
        return (*asked, Message("assistant", self.tame(answer)), wish)

    def object_sampling(self, max_tokens: int | None) -> Sampling:
        """Sampling of an object: greedy."""
        longest = self._config.serve.limits.object_tokens
        room = min(longest, max_tokens or longest) + self._frozen.max_thinking_tokens
        return Sampling(max_new_tokens=room)

    def shortened(self, text: str, tokens: int) -> str:
        """A text, cut to a number of tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= tokens:
            return text
        cut = str(self._tokenizer.decode(ids[:tokens], skip_special_tokens=True))
        return cut.rstrip("\ufffd").strip()

    def answer_sampling(self, guided: bool) -> Sampling:
        """Sampling of a reply: greedy."""
        kind = self._config.prompts.guided_kind if guided else "standard"
        return reply_sampling(self._templates.for_frozen(kind), self._frozen.answer_limit)

    def first_sampling(self) -> Sampling:
        """Sampling of a first answer: greedy, as long as in training."""
        row = find_row(self._config.prompts.first_answer)
        return row_sampling(row, self._config, self._templates, 0)

    @staticmethod
    def seeds(seed: int, samples: int) -> list[int]:
        """One seed for each rationale."""
        return [sample_seed(seed, "serve", number) for number in range(samples)]
