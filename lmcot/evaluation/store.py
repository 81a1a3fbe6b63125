"""The files of an evaluation, and which results they lack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmcot.config import TRAINING_STAGES, Config, digested_settings
from lmcot.config.rows import RowSpec
from lmcot.data.tasks.users_own import own_source
from lmcot.evaluation.predictions import Prediction, Rationales
from lmcot.evaluation.rows import chooses
from lmcot.files import open_private, write_atomically
from lmcot.monitor.progress import say
from lmcot.records import Example, Judgement
from lmcot.run.context import Run
from lmcot.run.inputs import example_digest, examples_digest
from lmcot.storage import place, versions_of

_ASPECT = "aspect/"


@dataclass(frozen=True, slots=True)
class AspectScores:
    """Scores of one question's rationale by aspect, 0 to 1."""

    id: str
    scores: dict[str, float]

    @classmethod
    def of(cls, question: str, judgement: Judgement) -> AspectScores:
        """The aspects among a judgement's components."""
        components = judgement.components
        return cls(
            question,
            {k.removeprefix(_ASPECT): v for k, v in components.items() if k.startswith(_ASPECT)},
        )


def policy_sources(run: Run) -> dict[str, str]:
    """The model source of each policy that the run has, least trained first."""
    settings, directory = run.config.evaluate, run.directory
    sources = {"base": run.config.policy.source}
    for stage in TRAINING_STAGES:
        given = settings.given_source(stage.policy)
        if given is not None:
            sources[stage.policy] = given
        elif directory.finished(stage.name):
            sources[stage.policy] = str(directory.policy(stage.policy))
    return sources


class EvaluationFiles:
    """The folder ``predictions/``: a file for each row, and files for each policy.

    A policy has ``rationales/POLICY.jsonl`` (greedy), ``rationales/POLICY+sc.jsonl`` (sampled) and
    ``aspects/POLICY.jsonl``.
    """

    def __init__(
        self,
        run: Run,
        policies: Mapping[str, str],
        rows: Sequence[RowSpec],
        examples: Sequence[Example],
    ) -> None:
        """Reads the files; lines that were made with other settings or weights are dropped."""
        self.examples = examples
        self._config = config = run.config
        self._policies = list(policies)
        folder = run.directory.predictions
        draws = (config.evaluate.samples, config.evaluate.temperature)
        questions = {one.id: example_digest(one) for one in examples}

        def kept(name: str, policy: str, *more: Any, rationale_only: bool = False) -> Kept:
            source = policies[policy] if policy else ""
            templates = run.templates.as_text(rationale_only=rationale_only)
            mark = fingerprint(config, source, templates, *more)
            found = Kept(folder / f"{name}.jsonl", mark, questions)
            if found.dropped:
                say(
                    f"evaluate: {found.dropped} lines of {name} were made with other settings, "
                    "weights or questions: these are made again"
                )
            return found

        needed = {(row.policy_among(self._policies), row.votes) for row in rows}
        order = [(name, sampled) for name in policies for sampled in (False, True)]
        self.rationales = {
            (policy, sampled): kept(
                f"rationales/{policy}{'+sc' if sampled else ''}",
                policy,
                *(draws if sampled else ()),
            )
            for policy, sampled in order
            if (policy, sampled) in needed
        }
        self.rows = rows
        self._predictions = {
            row.name: kept(
                row.name,
                row.policy_among(self._policies),
                row.name,
                *(draws if row.votes else ()),
                *(["by probability"] if chooses(config, row) else ()),
                # Which rationale it shows depends on all questions.
                *([examples_digest(examples)] if "another question" in row.needs else ()),
                rationale_only=row.prompt == "rationale_only",
            )
            for row in rows
        }
        judged = config.rewards.kind == "guidance" and config.evaluate.aspect_questions
        # No aspect depends on the penalties, which runs of before had elsewhere.
        settings = config.resolved().rewards.model_dump(mode="json", exclude={"penalties"})
        self.aspects = {
            policy: kept(f"aspects/{policy}", policy, settings)
            for policy, sampled in self.rationales
            if judged and not sampled
        }

    @property
    def total(self) -> int:
        """Number of lines of all files together, once they are complete."""
        judged = min(self._config.evaluate.aspect_questions, len(self.examples))
        files = len(self.rationales) + len(self.rows)
        return files * len(self.examples) + len(self.aspects) * judged

    def missing(self) -> int:
        """Number of lines that the files lack."""
        return (
            sum(len(self.unwritten(*key)) for key in self.rationales)
            + sum(len(self.unanswered(row)) for row in self.rows)
            + sum(len(self.unjudged(policy)) for policy in self.aspects)
        )

    def unwritten(self, policy: str, sampled: bool) -> list[int]:
        """Indices of the questions without a rationale of a policy."""
        return self._absent(self.rationales[policy, sampled], len(self.examples))

    def predictions(self, row: RowSpec) -> Kept:
        """The file of a row's predictions."""
        return self._predictions[row.name]

    def unanswered(self, row: RowSpec) -> list[int]:
        """Indices of the questions without a prediction in a row."""
        return self._absent(self.predictions(row), len(self.examples))

    def unjudged(self, policy: str) -> list[int]:
        """Indices of the questions whose rationale is to be judged and has no scores."""
        return self._absent(self.aspects[policy], self._config.evaluate.aspect_questions)

    def _absent(self, kept: Kept, limit: int) -> list[int]:
        return [at for at, one in enumerate(self.examples[:limit]) if one.id not in kept.records]

    def texts(self, row: RowSpec) -> dict[str, list[str]]:
        """What the row's policy wrote, by question; empty for rows that read no rationales."""
        policy = row.policy_among(self._policies)
        if not policy:
            return {}
        records = self.rationales[policy, row.votes].records
        return {key: record["texts"] for key, record in records.items()}

    def rationales_for(self, row: RowSpec, question: str) -> Rationales | None:
        """What a row's policy wrote for a question; None for rows that read no rationales."""
        policy = row.policy_among(self._policies)
        if not policy:
            return None
        return Rationales(**self.rationales[policy, row.votes].records[question])

    def rationale(self, policy: str, question: str) -> Rationales:
        """A policy's greedy rationale."""
        return Rationales(**self.rationales[policy, False].records[question])

    def predicted(self, row: RowSpec) -> list[Prediction]:
        """A row's predictions, in the order of the questions."""
        records = self.predictions(row).records
        return [Prediction(**records[one.id]) for one in self.examples]

    def aspect_means(self) -> dict[str, dict[str, float]]:
        """Mean scores of each policy by aspect, and ``n``."""
        found = {}
        for policy, kept in self.aspects.items():
            scores = [record["scores"] for record in kept.records.values()]
            # Not every rationale has every aspect: one of weight 0 may not have been measured.
            names = dict.fromkeys(name for one in scores for name in one)
            values = {name: [one[name] for one in scores if name in one] for name in names}
            if values:
                means = {name: sum(given) / len(given) for name, given in values.items()}
                found[policy] = {**means, "n": float(len(scores))}
        return found


class Kept:
    """A file of records, one JSON line for each question, that grows during the work.

    A line is on disk when `add` returns; a line that a kill cut short is dropped. Lines that were
    made with other settings or weights are dropped too, so that results are never mixed.
    """

    def __init__(self, path: Path, mark: str, questions: Mapping[str, str] | None = None) -> None:
        """Reads the lines of the file, if there is one.

        Args:
            mark: names everything that the records depend on, but the questions.
            questions: digest of each question's content, by id; lines of other questions, and of
                questions that have changed, are dropped. Unset: lines of any question are kept.
        """
        self.path = path
        self.dropped = 0
        """Number of lines that were made with other settings, weights or questions."""
        self._mark = mark
        self._questions = questions
        self.records: dict[str, dict[str, Any]] = {}
        *whole, tail = path.read_bytes().split(b"\n") if path.exists() else [b""]
        lines = [*whole, *([tail] if tail else [])]
        damaged = 0
        for line in lines:
            try:
                record = json.loads(line)
                made_with, key = str(record.pop("made_with")), str(record["id"])
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += line is not tail
                continue
            if questions is not None and key not in questions:
                continue
            if made_with == self._made_with(key):
                self.records[key] = record
            else:
                self.dropped += 1
        if damaged:
            say(f"{damaged} damaged lines of '{path}' are dropped: their questions are done again")
        if tail or len(lines) != len(self.records):
            self.finish(list(self.records))

    def add(self, records: Iterable[Any], **changes: Any) -> None:
        """Appends records (dataclasses with an ``id``); ``changes`` replace fields of theirs."""
        found = [asdict(one) | changes for one in records]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_private(self.path, "ab") as file:
            file.write("".join(map(self._line, found)).encode())
        self.records.update({one["id"]: one for one in found})

    def finish(self, order: Sequence[str]) -> None:
        """Puts the lines of these questions into this order, and drops all others."""
        self.records = {key: self.records[key] for key in order if key in self.records}
        lines = "".join(map(self._line, self.records.values()))
        write_atomically(self.path, lines, private=True)

    def _line(self, record: dict[str, Any]) -> str:
        made_with = self._made_with(record["id"])
        return json.dumps({**record, "made_with": made_with}, ensure_ascii=False) + "\n"

    def _made_with(self, key: str) -> str:
        return self._mark if self._questions is None else f"{self._mark}/{self._questions[key]}"


def fingerprint(config: Config, source: str, *more: Any) -> str:
    """A digest that changes with the settings that a file depends on and the policy's weights.

    Args:
        source: of the policy; empty for files that depend on no policy.
        more: anything else that the file depends on.
    """
    settings = digested_settings(config, "evaluate")
    more = (*more, *(own_source("task", own) for own in config.task.functions))
    weights = [
        (name, *version)
        for name, version in (versions_of(place(source)) if source else {}).items()
        if name.endswith(".safetensors") and "/" not in name
    ]
    text = json.dumps([settings, source, weights, more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
