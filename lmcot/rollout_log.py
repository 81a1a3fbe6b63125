"""The format of ``rollouts/``: a JSON line for each rationale of a step, written and read here."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcot.errors import UserError
from lmcot.files import whole_object
from lmcot.records import (
    Answer,
    Example,
    Judgement,
    LeftOut,
    Rollout,
    ScoredRollout,
    to_json,
)
from lmcot.run_files import rollout_steps, rollouts_name

if TYPE_CHECKING:
    from lmcot.storage import Place

RECORD_KEYS = (
    "example_id", "sample", "text", "response_ids", "finish_reason", "policy_version", "reward",
    "judgement",
)  # fmt: skip
"""Keys that each line has, in every version of the format."""


def encode_rollouts(
    rollouts: Sequence[Rollout],
    judgements: Sequence[Judgement],
    scored: Sequence[ScoredRollout | None],
    examples: Mapping[str, Example],
    left_out: Sequence[LeftOut] = (),
) -> bytes:
    """One line of JSON for each rationale; ``reward`` is null where it was not judged.

    Numbers that are not finite are null too, as JSON has no word for them. ``question``, ``gold``
    and ``golds`` (all right answers) stand in each line, so that it can be read by itself.
    ``left_out`` stands only in lines of questions that the step does not learn from,
    ``first_answer`` only where the small LM advises on one.

    Args:
        examples: the questions by their ids.
        left_out: for each rationale, why the step does not learn from its question, and empty if
            it does; not given: it learns from all of them.
    """
    lines = (
        _encoded(
            {
                **to_json(rollout),
                "question": examples[rollout.example_id].question,
                "gold": examples[rollout.example_id].answer,
                "golds": examples[rollout.example_id].answers,
                **_first_answer(examples[rollout.example_id]),
                "judgement": to_json(judgement),
                "reward": None if one is None else one.reward,
                "penalties": {} if one is None else one.penalties,
                **({"left_out": why} if why else {}),
            }
        )
        for rollout, judgement, one, why in zip(
            rollouts, judgements, scored, left_out or [""] * len(rollouts), strict=True
        )
    )
    return "".join(lines).encode()


def _first_answer(example: Example) -> dict[str, str]:
    return {"first_answer": example.first_answer} if example.first_answer else {}


def encode_record(rollout: Rollout) -> str:
    """One line of JSON for a rationale that is not judged yet."""
    return _encoded(to_json(rollout))


def rollout_of(record: Mapping[str, Any]) -> Rollout:
    """The rationale of a line, judged or not."""
    names = Rollout.__dataclass_fields__
    values = {name: value for name, value in record.items() if name in names}
    for name in ("prompt_ids", "response_ids", "logprobs"):
        values[name] = tuple(values[name])
    return Rollout(**values)


def decode_rows(lines: bytes, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The records of some rows of a step's lines, in the order of ``rows``."""
    found = lines.splitlines()
    return [json.loads(found[row]) for row in rows]


def read_records(path: Place, needed: Collection[str]) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, one at a time; a last line that was cut is left out.

    Args:
        needed: keys that each record must have.

    Raises:
        UserError: naming a line that is damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield whole_object(line, needed)
            except ValueError as error:
                raise UserError(
                    f"line {number} of '{path}' is damaged ({error}): delete it to see the others"
                ) from None


def read_scored(folder: Place, step: int) -> list[ScoredRollout]:
    """The judged rationales of a step, as the learners had them: none if it learnt nothing.

    Raises:
        UserError: if the file is not there, or does not hold rollouts.
    """
    path = folder / rollouts_name(step)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
        learnt = (one for one in records if one["reward"] is not None and "left_out" not in one)
        return [_scored(record) for record in learnt]
    except OSError as error:
        raise UserError(f"the rationales of step {step} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' does not hold rationales of lmcot ({error!r})") from None


def last_step(folder: Place) -> int:
    """The last step of which a ``rollouts`` folder holds rollouts.

    Raises:
        UserError: if it holds none.
    """
    steps = rollout_steps(folder)
    if not steps:
        raise UserError(f"there are no rationales (step-NNNNNN.jsonl) in '{folder}'")
    return steps[-1]


def _scored(record: Mapping[str, Any]) -> ScoredRollout:
    judgement = dict(record["judgement"])
    answer = judgement.pop("answer")
    return ScoredRollout(
        rollout_of(record),
        Judgement(**judgement, answer=Answer(**answer) if answer else None),
        record["reward"],
        record.get("penalties", {}),  # older files do not have them
    )


def _encoded(record: Mapping[str, Any]) -> str:
    """The record as a line; it is searched for NaN and infinity only where the encoder meets one.

    The encoder is many times as fast as the search.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with every NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
