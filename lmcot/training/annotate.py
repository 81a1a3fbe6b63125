"""Annotation: rationales for the training questions, kept or rejected with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from lmcot.config import FrozenTeacher, SupportingFactsTeacher
from lmcot.config.teachers import Teacher
from lmcot.data.row_requests import plain_prompt, without_text
from lmcot.errors import UserError
from lmcot.files import open_private, write_atomically
from lmcot.monitor.progress import say
from lmcot.records import Annotation, to_json
from lmcot.run.context import Run
from lmcot.run.directory import read_annotations
from lmcot.run.inputs import annotation_digest
from lmcot.training.choosing import choose
from lmcot.training.filters import Filters, prompt_labels
from lmcot.training.rationale_table import answers_shown, counts_of_reasons, rationale_table
from lmcot.training.reasons import RIGHT, failed, is_good
from lmcot.training.teachers import facts, file
from lmcot.training.teachers.frozen import FrozenTeaching, Key, key_of

_FIRST: Final = 64
"""Replies after which a teacher of which nothing was kept is worth a warning."""
_TRY: Final = (
    "a larger frozen LM, another prompt (prompts.templates, prompts.demonstrations, "
    "teacher.demonstrations), several samples (teacher.samples with teacher.temperature), hints "
    "(teacher.rationalise), or a laxer measure (teacher.right_by and teacher.min_f1)"
)


def annotate(run: Run, *, retry_failed: bool = False) -> list[Annotation]:
    """Writes ``rationales.jsonl``: rationales for each question that has none there yet.

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
        if retry_failed and any(map(failed, annotations)):
            raise UserError(
                "distillation has begun with the rationales that there are, so that what failed "
                "cannot be asked again here: use another --run-dir"
            )
        say("annotate: done already")
        return annotations
    made_from = {one.example.id: annotation_digest(run, one) for one in run.train}
    known = _still_right(run, made_from, retry_failed) | _begun(run, made_from)
    added = _add_missing(run, teacher, known, made_from)
    done = not added and run.directory.rationales.exists()
    if done:
        say("annotate: done already")
        annotations = _in_order(run, known)
    else:
        annotations = _chosen(run, teacher, known)
    annotations = [replace(one, made_from=made_from[one.example_id]) for one in annotations]
    write_atomically(run.directory.rationales, _lines(annotations), private=True)
    run.directory.rationales_begun.unlink(missing_ok=True)
    _summarise(run, teacher, annotations, new=not done)
    return annotations


def filters_of(run: Run, teacher: Teacher) -> Filters:
    """The filters that a run's rationales pass."""

    def fits(rationale: str) -> bool:
        # One token is EOS's.
        length = len(run.tokenizer.encode(rationale, add_special_tokens=False)) + 1
        return length <= run.config.policy.max_new_tokens

    return Filters(teacher.filters, fits, prompt_labels(run.templates.file.cot.user), run.task)


def _add_missing(
    run: Run, teacher: Teacher, known: dict[Key, Annotation], made_from: Mapping[str, str]
) -> bool:
    """Adds the rationales that are not known; False if none were missing."""
    filters = filters_of(run, teacher)
    if isinstance(teacher, FrozenTeacher):
        return _ask(run, FrozenTeaching(run, teacher, filters), known, made_from)
    there = {key[0] for key in known}
    missing = [one for one in run.train if one.example.id not in there]
    for question in missing:
        prompt = plain_prompt(run.templates, without_text(question.example))
        if isinstance(teacher, SupportingFactsTeacher):
            found = [facts.taken(question, teacher, filters, prompt)]
        else:
            brought = run.brought.get(question.example.id, ())
            found = file.taken(question.example, brought, teacher, filters, prompt)
        known.update((key_of(one), one) for one in found)
    return bool(missing)


def _ask(
    run: Run,
    teaching: FrozenTeaching,
    known: dict[Key, Annotation],
    made_from: Mapping[str, str],
) -> bool:
    """Asks the frozen LM for what is missing; each reply is on disk as soon as it is there."""
    if not teaching.missing(known):
        return False
    warned = False
    with open_private(run.directory.rationales_begun, "ab") as partial:

        def keep(unit: list[Annotation]) -> None:
            nonlocal warned
            dated = [replace(one, made_from=made_from[one.example_id]) for one in unit]
            partial.write(_lines(dated).encode())
            partial.flush()
            known.update((key_of(one), one) for one in dated)
            if not warned and len(known) >= _FIRST and not any(map(is_good, known.values())):
                warned = True
                said = answers_shown((one.example for one in run.train), known.values())
                say(
                    f"annotate: nothing good among the first {len(known)} rationales"
                    f"{counts_of_reasons(known.values())}{said}; it may be better to "
                    f"interrupt this, and to try in another --run-dir {_TRY}"
                )

        teaching.ask(known, keep)
    return True


def _chosen(run: Run, teacher: Teacher, known: Mapping[Key, Annotation]) -> list[Annotation]:
    by_question: dict[str, list[Annotation]] = {}
    for one in _in_order(run, known):
        by_question.setdefault(one.example_id, []).append(one)
    best_by = "first" if isinstance(teacher, SupportingFactsTeacher) else teacher.best_by
    examples = [one.example for one in run.train]
    return choose(examples, by_question, best_by, teacher.filters.near_duplicates, RIGHT)


def _in_order(run: Run, known: Mapping[Key, Annotation]) -> list[Annotation]:
    """The known rationales, question by question; those with a hint come after those without."""
    places = {one.example.id: place for place, one in enumerate(run.train)}
    return [known[key] for key in sorted(known, key=lambda key: (places[key[0]], key[1:]))]


def _lines(annotations: Iterable[Annotation]) -> str:
    return "".join(json.dumps(to_json(one), ensure_ascii=False) + "\n" for one in annotations)


def _still_right(
    run: Run, made_from: Mapping[str, str], retry_failed: bool
) -> dict[Key, Annotation]:
    """What is there of the questions as they are now."""
    if not run.directory.rationales.exists():
        return {}
    there = {key_of(one): one for one in read_annotations(run.directory.rationales)}
    # By itself what failed is asked again only where nothing came of the whole.
    retry = retry_failed or not any(one.kept for one in there.values())
    known = {
        key: one
        for key, one in there.items()
        if key[0] in made_from
        and one.made_from in ("", made_from[key[0]])
        and not (retry and failed(one))
    }
    ids = {key[0] for key in there}
    again = sum(key not in known for key in there if key[0] in made_from)
    new, gone = len(made_from.keys() - ids), len(ids - made_from.keys())
    if again or new or gone:
        say(
            f"annotate: {again} rationales are made again, since they failed or their question or "
            f"settings have changed; {new} questions are new, {gone} are gone"
        )
    return known


def _summarise(run: Run, teacher: Teacher, annotations: Sequence[Annotation], *, new: bool) -> None:
    """Writes the table, and says what was kept if some are new; refuses none."""
    examples = [one.example for one in run.train]
    table = rationale_table(examples, annotations)
    write_atomically(run.directory.rationales_table, table, private=True)
    kept, reasons = sum(one.kept for one in annotations), counts_of_reasons(annotations)
    if not kept:
        said, advice = "", "change the settings that this speaks of"
        if not isinstance(teacher, SupportingFactsTeacher):
            said = answers_shown(examples, annotations)
        if isinstance(teacher, FrozenTeacher):
            advice += f", or try {_TRY},"
        raise UserError(
            f"no rationale was kept of {len(annotations)}{reasons}{said}: {advice} and run the "
            f"same command again ('{run.directory.rationales}' has all that the teacher said)"
        )
    if not new:
        return
    say(f"annotate: {kept} of {len(annotations)} rationales kept{reasons}")
    say(table.rstrip())
    if shortened := [one.left_out for one in annotations if one.kept and one.left_out]:
        say(
            f"annotate: {len(shortened)} of them were too long and lost {sum(shortened)} sentences "
            "that the answer does not need"
        )
    if lost := sum(map(failed, annotations)):
        say(
            f"annotate: {lost} questions have no reply of the teacher; before distillation "
            "begins, 'lmcot annotate --retry-failed' asks for them again"
        )


def _begun(run: Run, made_from: Mapping[str, str]) -> dict[Key, Annotation]:
    """What the teacher replied to a session that was interrupted."""
    return {
        key_of(one): one
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
    return [one for one in read_annotations(path, begun=True) if not failed(one)]
