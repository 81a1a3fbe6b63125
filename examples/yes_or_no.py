"""Writes 120 questions of yes or no, in StrategyQA's layout and without passages.

    python examples/yes_or_no.py questions.json

Each compares two facts of a table, which are its ``facts``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

YEARS = {
    "The Eiffel Tower was finished": 1889, "The Suez Canal was opened": 1869,
    "The first telephone was patented": 1876, "The Titanic sank": 1912,
    "The printing press reached Venice": 1469, "Columbus reached America": 1492,
    "Napoleon was defeated at Waterloo": 1815, "The Berlin Wall fell": 1989,
    "The first man walked on the Moon": 1969, "The French Revolution began": 1789,
    "Penicillin was discovered": 1928, "The first Olympic Games of our time were held": 1896,
    "The Great Fire of London burned": 1666, "The United Nations were founded": 1945,
    "Newton's Principia was printed": 1687, "The Channel Tunnel was opened": 1994,
}  # fmt: skip
CONTINENTS = {
    "Lima": "South America", "Nairobi": "Africa", "Oslo": "Europe", "Hanoi": "Asia",
    "Quito": "South America", "Accra": "Africa", "Lisbon": "Europe", "Seoul": "Asia",
    "Bogota": "South America", "Cairo": "Africa", "Vienna": "Europe", "Tehran": "Asia",
    "Santiago": "South America", "Dakar": "Africa", "Warsaw": "Europe", "Delhi": "Asia",
}  # fmt: skip
EACH = 60


def _begun(event: str) -> str:
    """An event within a sentence: names keep their capital."""
    return event[0].lower() + event[1:] if event.startswith("The ") else event


def comparisons() -> list[dict[str, Any]]:
    """Every pair of a table as a question."""
    found = [
        {
            "question": f"Is it true that {_begun(first)} before {_begun(second)}?",
            "answer": YEARS[first] < YEARS[second],
            "facts": [f"{one} in {YEARS[one]}." for one in (first, second)],
        }
        for first in YEARS
        for second in YEARS
        if first != second
    ]
    random.shuffle(found)
    return found[:EACH]


def continents() -> list[dict[str, Any]]:
    """As many pairs of cities on one continent as on two."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for first in CONTINENTS:
        for second in CONTINENTS:
            if first != second:
                same = CONTINENTS[first] == CONTINENTS[second]
                facts = [f"{one} is in {CONTINENTS[one]}." for one in (first, second)]
                question = f"Are {first} and {second} on the same continent?"
                found[same].append({"question": question, "answer": same, "facts": facts})
    for pairs in found.values():
        random.shuffle(pairs)
    return found[True][: EACH // 2] + found[False][: EACH // 2]


if __name__ == "__main__":
    random.seed(0)
    questions = [*comparisons(), *continents()]
    random.shuffle(questions)
    records = [{"qid": f"q{number}", **one} for number, one in enumerate(questions)]
    Path(sys.argv[1]).write_text(json.dumps(records, indent=1), encoding="utf-8")
