"""Annotation: rationales for the training questions, kept or rejected with a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.units import PromptUnit
from lmcot.config import FrozenTeacher, SupportingFactsTeacher
from lmcot.data.prompts import reply_sampling
from lmcot.errors import UserError
from lmcot.files import open_private, write_atomically
from lmcot.frozen.cached import Replies
from lmcot.monitor.progress import progress, say
from lmcot.records import Annotation, Completion, Failure, Usage, to_json
from lmcot.run.budgets import Losses, usage_metrics
from lmcot.run.context import Question, Run, in_units
from lmcot.run.directory import read_annotations
from lmcot.run.inputs import annotation_digest
from lmcot.run.roles import annotate_roles
from lmcot.text.answers import best, concluded_answer, f1
from lmcot.text.reading import read_answer
from lmcot.training.teachers.facts import facts_rationale

_FAILED = "failed: "
_FACTS = "supporting facts"
_SHORTENED = "supporting facts, shortened"


def annotate(run: Run, *, retry_failed: bool = False) -> list[Annotation]:
    """Writes ``rationales.jsonl``: a rationale for each question that has none there yet.

    Those of questions that have changed since, or that are gone, are not kept.

    Args:
        retry_failed: asks the teacher again where it failed before.

    Raises:
        UserError: if no rationale was kept, or distillation has begun and what failed is to be
            asked again.
    """
    teacher = run.config.teacher
    if teacher is None:
        raise UserError("annotate needs a 'teacher' section in the settings")
    if run.directory.rationales.exists() and "distill" in run.directory.begun(run.config):
        annotations = read_annotations(run.directory.rationales)
        if retry_failed and any(map(_failed, annotations)):
            raise UserError(
                "distillation has begun with the rationales that there are, so that what failed "
                "cannot be asked again here: use another --run-dir"
            )
        say("annotate: done already")
        return annotations
    made_from = {one.example.id: annotation_digest(run, one) for one in run.train}
    known = _still_right(run, made_from, retry_failed) | _begun(run, made_from)
    missing = [question for question in run.train if question.example.id not in known]
    if not missing and run.directory.rationales.exists():
        say("annotate: done already")
    elif isinstance(teacher, FrozenTeacher):
        known |= _ask_frozen(run, teacher, missing, known, made_from)
    else:
        known |= {one.example.id: _from_facts(run, teacher, one) for one in missing}
    annotations = [
        replace(known[question.example.id], made_from=made_from[question.example.id])
        for question in run.train
    ]
    lines = [json.dumps(to_json(a), ensure_ascii=False) + "\n" for a in annotations]
    write_atomically(run.directory.rationales, "".join(lines), private=True)
    run.directory.rationales_begun.unlink(missing_ok=True)
    _summarise(run, annotations)
    return annotations


def _failed(one: Annotation) -> bool:
    """Whether the teacher gave no reply."""
    return one.reason.startswith(_FAILED)


def _still_right(
    run: Run, made_from: Mapping[str, str], retry_failed: bool
) -> dict[str, Annotation]:
    """What is there of the questions as they are now, by their ids."""
    if not run.directory.rationales.exists():
        return {}
    there = {one.example_id: one for one in read_annotations(run.directory.rationales)}
    # By itself what failed is asked again only where nothing came of the whole.
    retry = retry_failed or not any(one.kept for one in there.values())
    known = {
        key: one
        for key, one in there.items()
        if key in made_from
        and one.made_from in ("", made_from[key])
        and not (retry and _failed(one))
    }
    again = sum(key not in known for key in there if key in made_from)
    new, gone = len(made_from.keys() - there.keys()), len(there.keys() - made_from.keys())
    if again or new or gone:
        say(
            f"annotate: {again} rationales are made again, since they failed or their question or "
            f"settings have changed; {new} questions are new, {gone} are gone"
        )
    return known


def _summarise(run: Run, annotations: Sequence[Annotation]) -> None:
    """Says how many were kept; refuses none."""
    kept = sum(a.kept for a in annotations)
    rejected = Counter(a.reason for a in annotations if not a.kept)
    reasons = "".join(f"; {count} rejected: {why}" for why, count in rejected.most_common())
    if not kept:
        raise UserError(
            f"no rationale was kept of {len(annotations)}{reasons}: change the settings that this "
            f"speaks of and run the same command again ('{run.directory.rationales}' has all that "
            "the teacher said)"
        )
    say(f"annotate: {kept} of {len(annotations)} rationales kept{reasons}")
    if shortened := [a.left_out for a in annotations if a.kept and a.left_out]:
        say(
            f"annotate: {len(shortened)} of them were too long and lost {sum(shortened)} sentences "
            "that the answer does not need"
        )
    if failed := sum(map(_failed, annotations)):
        say(
            f"annotate: {failed} questions have no reply of the teacher; before distillation "
            "begins, 'lmcot annotate --retry-failed' asks for them again"
        )


def _from_facts(run: Run, teacher: SupportingFactsTeacher, question: Question) -> Annotation:
    """The data set's own supporting facts as a rationale."""
    example = question.example
    made = facts_rationale(example, teacher, lambda text: not _too_long(run, text))
    if not example.gold_sentences():
        reason = "the question has no supporting facts"
    elif question.facts_cut:
        reason = "a supporting fact is outside the context's token budget"
    elif not made.fits:
        reason = _too_long(run, made.text)
    elif not made.complete:
        reason = _SHORTENED + " to the paragraph of the answer"
    else:
        reason = _SHORTENED if made.left_out else _FACTS
    kept = reason.startswith(_FACTS)
    return Annotation(
        example.id, teacher.kind, made.text, example.answer, kept, reason, left_out=made.left_out
    )


def _too_long(run: Run, rationale: str) -> str:
    # One token is EOS's.
    length = len(run.tokenizer.encode(rationale, add_special_tokens=False)) + 1
    return "longer than policy.max_new_tokens" if length > run.config.policy.max_new_tokens else ""


def _ask_frozen(
    run: Run,
    teacher: FrozenTeacher,
    questions: Sequence[Question],
    known: Mapping[str, Annotation],
    made_from: Mapping[str, str],
) -> dict[str, Annotation]:
    """The frozen LM's own rationales, by question; each is on disk as soon as it is there."""
    groups = in_units(range(len(questions)), run.config.actors.prompts_per_unit)
    units = [_unit(run, questions, rows) for rows in groups]
    losses = Losses(run.config.failures, len(run.train), "answers to the training questions")
    found: dict[str, Annotation] = {}
    kept = sum(one.kept for one in known.values())
    check_plan("annotate", annotate_roles(run.config), run.config.actors)
    with (
        run.frozen_fleet() as fleet,
        progress("annotate", total=len(run.train), unit="question", done=len(known)) as bar,
        open_private(run.directory.rationales_begun, "ab") as file,
    ):
        fleet.wait_ready()

        def keep(index: int, replies: Replies) -> None:
            run.spending.add("annotate", replies.usage)
            losses.add(one if isinstance(one, Failure) else None for one in replies.results)
            for row, result in zip(groups[index], replies.results, strict=True):
                judged = _judge(run, teacher, questions[row], result)
                annotation = replace(judged, made_from=made_from[judged.example_id])
                found[annotation.example_id] = annotation
                line = json.dumps(to_json(annotation), ensure_ascii=False) + "\n"
                file.write(line.encode())
            file.flush()
            all_kept = kept + sum(one.kept for one in found.values())
            bar.update(len(replies.results), kept=float(all_kept))

        done = run.frozen_client(fleet).map(units, on_result=keep)
    usage = sum((replies.usage for replies in done), Usage())
    run.monitor.log(0, "annotate", usage_metrics(usage))
    return found


def _unit(run: Run, questions: Sequence[Question], rows: list[int]) -> PromptUnit:
    config = run.config
    assert config.frozen is not None  # the settings were checked
    prompts = [run.templates.cot(questions[row].example) for row in rows]
    sampling = reply_sampling(run.templates.file.cot, config.frozen.rationale_limit)
    return PromptUnit(f"annotate/{rows[0]}", tuple(prompts), sampling)


def _judge(
    run: Run, teacher: FrozenTeacher, question: Question, result: Completion | Failure
) -> Annotation:
    """Keeps a rationale only where the frozen LM's own prediction is right."""
    example = question.example
    if isinstance(result, Failure):
        return Annotation(example.id, "frozen", "", "", False, _FAILED + result.reason)
    said, rationale = read_answer(result), result.text.strip()
    answer = concluded_answer(rationale)
    cut = result.finish_reason == "length" and (not answer or said.missing == "cut")
    right = bool(answer) and best(f1, answer, example.answers) >= teacher.min_f1
    if said.silent:
        reason = said.silent
    elif cut and not right:
        reason = (
            "the teacher was cut before it came to its answer: raise frozen.max_rationale_tokens"
        )
    elif not answer:
        reason = "the teacher came to no answer"
    elif not right:
        reason = "the teacher's answer is wrong"
    else:
        reason = _too_long(run, rationale) or "right answer"
    return Annotation(example.id, "frozen", rationale, answer, reason == "right answer", reason)


def _begun(run: Run, made_from: Mapping[str, str]) -> dict[str, Annotation]:
    """What the teacher replied to a session that was interrupted, by question."""
    return {
        one.example_id: one
        for one in _read_partial(run.directory.rationales_begun)
        if one.made_from == made_from.get(one.example_id)
    }


def _read_partial(path: Path) -> list[Annotation]:
    """Whole lines of an interrupted annotation; a last line that was cut is taken off the file.

    What failed is left out, to be asked again.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomically(path, whole, private=True)
    return [one for one in read_annotations(path, begun=True) if not _failed(one)]
