"""`lmcot data` shows what is understood of a file of questions, before anything is made of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lmcot.config import Config, ContextSettings, DataSource
from lmcot.config.task import ExtractiveQa, TaskSettings
from lmcot.data import load_examples
from lmcot.data.context import CountTokens, apply_context, render_context
from lmcot.data.tasks import EXTRACTIVE_QA, Task, open_task
from lmcot.records import Example, SupportingFact

_LONGEST = 160
"""Characters shown of a sentence or a question."""
_WORDS = "words"
_TOKENS = "tokens of the small LM"


@dataclass(frozen=True, slots=True)
class Range:
    """A number that differs from question to question."""

    least: int
    median: float
    most: int

    @staticmethod
    def of(numbers: Sequence[int]) -> Range:
        """The range of at least one number."""
        return Range(min(numbers), median(numbers), max(numbers))

    def __str__(self) -> str:
        return f"{self.least:,} to {self.most:,}, median {self.median:,.0f}"


@dataclass(frozen=True, slots=True)
class Description:
    """What is understood of a source of questions."""

    name: str
    questions: int
    bad: int
    """Records that are no usable question."""
    problems: list[str]
    """What is wrong with the first of them."""
    without_id: int
    with_facts: int
    with_aliases: int
    types: dict[str, int]
    passages: Range
    """Passages of a question."""
    unit: str
    """What lengths are counted in."""
    lengths: dict[str, Range]
    cut: int | None = None
    """Questions whose context exceeds its budget; None: the budget is not known."""
    facts_cut: int = 0
    """Those of them that lose a supporting fact."""
    budget: int | None = None
    first: list[Example] = field(default_factory=list)


def describe_data(
    sources: Sequence[DataSource],
    config: Config | None,
    *,
    show: int,
    as_json: bool,
    task: TaskSettings | None = None,
) -> None:
    """Prints what is understood of files or data sets.

    Args:
        config: settings whose small LM counts tokens, and whose context budget is applied.
        show: number of questions of each that are shown.
        task: what the questions are, in place of the settings' task.

    Raises:
        UserError: if a source cannot be read, or holds no question.
    """
    counted = _small_lm(config) if config is not None else None
    context = config.data.context if config is not None else None
    asked = task or (ExtractiveQa() if config is None else config.task)
    needs = asked.needs_context if task or config is None else config.requires_context
    for source in sources:
        found = description(
            source, counted, context, show=show, task=open_task(asked), require_context=needs
        )
        print(json.dumps(asdict(found), ensure_ascii=False) if as_json else in_words(found))


def _small_lm(config: Config) -> CountTokens:
    from lmcot.models.sources import load_tokenizer  # imports transformers

    tokenizer = load_tokenizer(config.policy.source)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def description(
    source: DataSource,
    count_tokens: CountTokens | None,
    context: ContextSettings | None,
    *,
    show: int,
    task: Task = EXTRACTIVE_QA,
    require_context: bool = True,
) -> Description:
    """What is understood of a source; bad records are counted.

    Args:
        count_tokens: counts the small LM's tokens; None: lengths are in words.
        context: the budget of contexts, if ``count_tokens`` is given.
        task: what a question is.
        require_context: whether a question without passages is a bad record.

    Raises:
        UserError: if it cannot be read, or holds no question.
    """
    loaded = load_examples(source, on_bad="skip", task=task, require_context=require_context)
    examples = loaded.examples
    count = count_tokens or (lambda text: len(text.split()))
    cut = facts_cut = budget = None
    if count_tokens is not None and context is not None:
        reduced = apply_context(examples, context, count_tokens)
        pairs = list(zip(examples, reduced, strict=True))
        budget = context.max_tokens
        wide = context.model_copy(update={"max_tokens": 10**9})
        chosen = apply_context(examples, wide, count_tokens)
        cut = sum(a.context != b.context for a, b in zip(chosen, reduced, strict=True))
        facts_cut = sum(a.gold_sentences() != b.gold_sentences() for a, b in pairs)
    return Description(
        name=_name(source),
        questions=len(examples),
        bad=loaded.skipped,
        problems=loaded.problems,
        without_id=loaded.without_id,
        with_facts=sum(bool(one.supporting_facts or one.facts) for one in examples),
        with_aliases=sum(bool(one.aliases) for one in examples),
        types=dict(Counter(one.type for one in examples if one.type).most_common()),
        passages=Range.of([len(one.context) for one in examples]),
        unit=_TOKENS if count_tokens else _WORDS,
        lengths=_lengths(examples, count),
        cut=cut,
        facts_cut=facts_cut or 0,
        budget=budget,
        first=examples[:show],
    )


def _lengths(examples: Sequence[Example], count: CountTokens) -> dict[str, Range]:
    measured: dict[str, Callable[[Example], str]] = {
        "question": lambda one: one.question,
        "context": lambda one: render_context(one.context),
        "answer": lambda one: one.answer,
    }
    if any(one.gold_sentences() for one in examples):
        measured["supporting facts"] = lambda one: " ".join(one.gold_sentences())
    return {
        name: Range.of([count(text(one)) for one in examples]) for name, text in measured.items()
    }


def _name(source: DataSource) -> str:
    given: dict[str, Any] = source.model_dump()
    return str(given.get("path") or given.get("name") or f"{source.kind} data")


def in_words(found: Description) -> str:
    """A description for a terminal."""
    lines = [f"{found.name}: {found.questions:,} questions"]
    if found.bad:
        lines[0] += f", {found.bad:,} bad records"
        lines += [f"  bad: {problem}" for problem in found.problems]
    lines.append(
        f"  supporting facts: {found.with_facts:,} questions have some; several right answers: "
        f"{found.with_aliases:,}; no id: {found.without_id:,}"
    )
    if found.types:
        lines.append("  types: " + ", ".join(f"{k} {n:,}" for k, n in found.types.items()))
    there = found.passages.most > 0
    lines.append(f"  passages of a question: {found.passages if there else 'none'}")
    for name, length in found.lengths.items():
        if there or name != "context":
            lines.append(f"  {name}: {length} {found.unit}")
    if found.cut is not None and there:
        lines.append(
            f"  data.context.max_tokens ({found.budget:,}): {found.cut:,} contexts are cut to it; "
            f"{found.facts_cut:,} {'question loses' if found.facts_cut == 1 else 'questions lose'} "
            "a supporting fact"
        )
    for example in found.first:
        lines += ["", *_shown(example)]
    return "\n".join(lines)


def _shown(example: Example) -> Iterable[str]:
    label = f" ({example.type})" if example.type else ""
    yield f"{example.id}{label}: {_short(example.question)}"
    yield "  right answers: " + "; ".join(example.answers)
    wanted = set(example.supporting_facts)
    for passage in example.context:
        yield f"  {passage.title or '(no title)'}"
        for number, sentence in enumerate(passage.sentences):
            mark = "*" if SupportingFact(passage.title, number) in wanted else " "
            yield f"   {mark} {_short(sentence.strip())}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
