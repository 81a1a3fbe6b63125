"""A stage's inputs, by their content: a file that is edited within a run is a changed setting."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcot.config import FileTeacher, GuidanceRewards, depends, digested_settings, training_stage
from lmcot.data.demonstrations import DEMONSTRATIONS_KEY, demonstrations_digest
from lmcot.data.tasks.users_own import own_source
from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.rewards.custom import AbsentReward, CustomReward, load_customs
from lmcot.storage import place

if TYPE_CHECKING:
    from lmcot.run.context import Question, Run


def example_digest(example: Example) -> str:
    """A digest of everything in an example that models or comparisons see."""
    passages = [text for one in example.context for text in (one.title, *one.sentences)]
    facts = [f"{fact.title}\x1f{fact.sent_id}" for fact in example.supporting_facts]
    parts = [(example.id, example.question), example.answers, passages, facts]
    if example.facts:
        parts.append(example.facts)
    return _digest("\x1e".join("\x1f".join(part) for part in parts))


def examples_digest(examples: Iterable[Example]) -> str:
    """A digest of the examples and their order."""
    return _digest(" ".join(map(example_digest, examples)))


def annotation_digest(run: Run, question: Question) -> str:
    """A digest of everything that a question's rationale depends on."""
    # The questions and rationales themselves count, wherever they come from.
    settings = {
        key: value
        for key, value in digested_settings(run.config, "annotate").items()
        if not key.startswith(("data.", "teacher.path"))
    }
    templates = run.templates.as_text(rationale_only=False)
    asked = templates if depends("annotate", "prompts.templates", run.config) else ""
    known: list[Any] = [example_digest(question.example), question.facts_cut, settings, asked]
    if isinstance(run.config.teacher, FileTeacher):
        brought = run.brought.get(question.example.id, ())
        known.append([[one.rationale, one.answer] for one in brought])
    return _digest(json.dumps(known, sort_keys=True))


def contents(run: Run, stage: str) -> dict[str, str]:
    """A text for each input of a stage, which changes with the input's content."""
    known = training_stage(stage)
    alone = known.judges and run.config.prompts.guided_kind == "rationale_only"
    found = {
        "data.train": _questions(run.train),
        "prompts.templates": _digest(
            run.templates.file.as_text(rationale_only=alone, advice=run.config.prompts.advises)
        ),
    }
    if run.demonstrations is not None:
        found[DEMONSTRATIONS_KEY] = demonstrations_digest(run.demonstrations)
    if own := run.config.task.functions:
        found["task"] = _digest("".join(own_source("task", one) for one in own))
    if known.evaluates and run.config.evaluate.during.every:
        found["data.validation"] = _questions(run.validation)
    rewards = run.config.rewards
    if known.judges and isinstance(rewards, GuidanceRewards):
        customs = load_customs(rewards, run.functions)
        sources = [_source(one.reward, run.functions) for one in customs]
        if sources and not any(isinstance(one.reward, AbsentReward) for one in customs):
            found["rewards.custom"] = _digest("".join(sources))
        if rewards.learned_model is not None:
            found["rewards.learned_model"] = _digest(place(rewards.learned_model).read_text())
    return found


def check_contents(run: Run) -> None:
    """Compares the inputs with those that stages of this run have read.

    Raises:
        UserError: naming the first input that has another content.
    """
    for stage in run.directory.begun(run.config):
        recorded = run.directory.inputs(stage)
        if not recorded:
            continue
        now = contents(run, stage)
        for key in sorted(recorded.keys() & now.keys()):
            if recorded[key] != now[key]:
                raise UserError(
                    f"{key} has changed since the stage '{stage}' of the run "
                    f"directory '{run.directory.home}' read it ({recorded[key]} then, {now[key]} "
                    "now): put the content back, or use another --run-dir"
                )


def check_functions(run: Run) -> None:
    """Checks that a stage that judges has the custom rewards of the program that began the run.

    Raises:
        UserError: naming one that is not there.
    """
    if isinstance(run.config.rewards, GuidanceRewards):
        for one in load_customs(run.config.rewards, run.functions):
            if isinstance(one.reward, AbsentReward):
                raise one.reward.error


def _questions(questions: Sequence[Question]) -> str:
    digest = examples_digest(one.example for one in questions)
    return f"{len(questions)} questions with digest {digest}"


def _source(reward: CustomReward, given: Mapping[str, CustomReward]) -> str:
    """The text of the module that a custom reward is defined in; of the function alone if the
    calling program gives it, whose text changes for other reasons."""
    of = reward if reward in given.values() else inspect.getmodule(reward)
    try:
        return inspect.getsource(of) if of is not None else ""
    except (OSError, TypeError):  # made by a program, or a callable object
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
