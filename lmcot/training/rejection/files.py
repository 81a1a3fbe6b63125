"""The files of a round: what was sampled and judged is on disk as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmcot.files import drop_cut_line, open_private, private_folder, write_atomically
from lmcot.records import Rollout
from lmcot.rollout_log import RECORD_KEYS, encode_record, read_records, rollout_of
from lmcot.run_files import round_name

Record = Mapping[str, Any]
"""A line of a round's file: as in ``rollouts/``, with ``kept`` and ``reason``, and without the
prompt's tokens and the log-probabilities, which nothing reads."""
Key = tuple[str, int]
"""Names a sampled rationale: its question and its sample."""
_OF_A_ROLLOUT: Final = ("example_id", "sample", "text", "prompt_ids", "response_ids")
_OF_A_RECORD: Final = (*RECORD_KEYS, "kept", "reason")


def key_of(record: Record) -> Key:
    """The key of a line."""
    return record["example_id"], record["sample"]


def failed(record: Record) -> bool:
    """Whether a rationale could not be judged."""
    return record["reward"] is None


class RoundFiles:
    """The files of one round.

    While it is at work, ``round-N.sampled.jsonl`` has each rationale as soon as it is sampled, and
    ``round-N.judged.jsonl`` as soon as it is judged. When all are, ``round-N.jsonl`` replaces both,
    with what was kept and why the others were not, and ``round-N.md`` has the table.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.whole = folder / round_name(number)
        self.table = self.whole.with_suffix(".md")
        self._sampled = self.whole.with_suffix(".sampled.jsonl")
        self._judged = self.whole.with_suffix(".judged.jsonl")

    def sampled(self) -> Iterator[Rollout]:
        """What an interrupted session sampled."""
        return map(rollout_of, self._begun(self._sampled, _OF_A_ROLLOUT))

    def judged(self) -> dict[Key, Record]:
        """What an interrupted session judged; failures are left out, to be tried again."""
        lines = self._begun(self._judged, _OF_A_RECORD)
        return {key_of(one): one for one in lines if not failed(one)}

    def add_sampled(self, rollouts: Iterable[Rollout]) -> None:
        """Writes rationales that were just sampled."""
        self._append(self._sampled, "".join(map(encode_record, rollouts)))

    def add_judged(self, records: Iterable[Record]) -> None:
        """Writes rationales that were just judged."""
        self._append(self._judged, _lines(records))

    def finish(self, records: Sequence[Record], table: str) -> None:
        """Writes the round's result in place of what was written on the way."""
        write_atomically(self.table, table, private=True)
        write_atomically(self.whole, _lines(records), private=True)
        for path in (self._sampled, self._judged):
            path.unlink(missing_ok=True)

    def result(self) -> list[Record]:
        """The lines of a round whose rationales are chosen.

        Raises:
            UserError: naming a line that is damaged.
        """
        return list(read_records(self.whole, _OF_A_RECORD))

    def _append(self, path: Path, lines: str) -> None:
        private_folder(self.folder)
        with open_private(path, "ab") as file:
            file.write(lines.encode())

    def _begun(self, path: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return iter(())
        drop_cut_line(path)
        return read_records(path, needed)


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
