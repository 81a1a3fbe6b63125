"""examples/yes_or_no.py writes questions that lmcot reads as they are meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmcot.config.data import FileData
from lmcot.data import load_examples
from lmcot.data.tasks.boolean import BooleanTask

PROGRAM = Path(__file__).parents[3] / "examples" / "yes_or_no.py"


def test_its_questions_are_read_with_their_facts(tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    subprocess.run([sys.executable, str(PROGRAM), str(file)], check=True)
    source = FileData(kind="file", path=str(file))
    examples = load_examples(source, task=BooleanTask(), require_context=False).examples
    assert len({one.question for one in examples}) == 120
    assert 50 <= sum(one.answer == "yes" for one in examples) <= 70
    by_words = {one.question: one for one in examples}
    cities = by_words["Are Lima and Santiago on the same continent?"]
    assert (cities.answer, cities.facts) == (
        "yes", ("Lima is in South America.", "Santiago is in South America."),
    )  # fmt: skip
