"""A run's files after a kill, a full disk or an editor: one sentence, or what is whole is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcot.cli import main
from lmcot.config import BudgetSettings, load_config
from lmcot.errors import UserError
from lmcot.evaluation.store import Kept
from lmcot.files import read_lines, read_object
from lmcot.frozen.cache import ReplyCache
from lmcot.monitor.metrics import read_metrics
from lmcot.records import Annotation
from lmcot.run.budgets import Spending
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.training.annotate import _read_partial

DAMAGE = [b"", b"{", b'{"annotate": ', b"\x00\xff\xfe", b"[1, 2]", b"null", b'{"a": 1} {"b": 2}']
TOY = Path(__file__).parents[3] / "configs" / "toy.yaml"


def finished(folder: Path) -> None:
    with RunDirectory(folder) as directory:
        directory.finished("annotate")


def inputs(folder: Path) -> None:
    with RunDirectory(folder) as directory:
        directory.inputs("distill")


def settings(folder: Path) -> None:
    with RunDirectory(folder) as directory:
        directory.check_config(load_config(str(TOY)))


def spending(folder: Path) -> None:
    Spending(folder / "spending.json", BudgetSettings())


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("stages.json", finished),
        ("inputs.json", inputs),
        ("config.yaml", settings),
        ("spending.json", spending),
    ],
)
def test_a_damaged_file_is_named(
    name: str, read: Callable[[Path], None], content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as told:
        read(tmp_path)
    assert name in str(told.value)
    assert "\n" not in str(told.value)


def test_fields_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "spending.json").write_text('{"annotate": {"unheard": 1}}')
    with pytest.raises(UserError, match=r"spending\.json' is damaged .*unheard.*delete it to"):
        spending(tmp_path)


@pytest.mark.parametrize("line", [b'{"example_id": "q"', b"\xff\xfe", b"[]", b'{"x": 1}'])
def test_a_damaged_rationale(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rationales.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"line 1 of .*rationales\.jsonl' is damaged"):
        read_annotations(path)


def test_lines_are_parted_by_line_feeds_alone(tmp_path: Path) -> None:
    """A text may hold U+2028, U+0085 and form feeds."""
    text = "one\u2028two\u0085three\x0cfour"
    one = Annotation("q", "frozen", text, "a", True, "right answer")
    line = json.dumps({name: getattr(one, name) for name in one.__slots__}, ensure_ascii=False)
    path = tmp_path / "rationales.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    assert [found.rationale for found in read_annotations(path)] == [text]
    assert [found.rationale for found in _read_partial(path)] == [text]


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two = b'{"step": 1, "stage": "refine"}\n', b'{"step": 2, "stage": "refine"}'
    path.write_bytes(one + two + b'\n{"step": 3, "los')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_bytes(one + two)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_bytes(one + b'{"st\n' + two + b"\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl' is damaged.*delete that"):
        read_metrics(path)


def test_lines_of_something_else_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are JSON, but lack what is read of them."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n')
    with pytest.raises(UserError, match=r"line 1 of .*metrics\.jsonl' .*it has no 'stage'"):
        read_metrics(metrics)
    partial = tmp_path / "rationales.partial.jsonl"
    partial.write_bytes(b'{"x": 1}\n')
    with pytest.raises(UserError, match=r"line 1 of .*partial\.jsonl' .*its question is annota"):
        _read_partial(partial)
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    (rollouts / "step-000001.jsonl").write_bytes(b'{"x": 1}\n')
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is damaged (it has no 'example_id')" in capsys.readouterr().err


def test_a_cache_that_was_damaged_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    written = ReplyCache(path, 10**7)
    keys = [bytes([number]) for number in range(200)]
    written.put("m", [(key, "x" * 3000) for key in keys])
    written.close()
    cache = ReplyCache(path, 10**7)
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\x55" * (path.stat().st_size - 5 * 4096))
    told = r"replies\.sqlite is damaged \(.*\): remove the file"
    with pytest.raises(UserError, match=told):
        cache.get(keys)
    with pytest.raises(UserError, match=told):
        cache.put("m", [(bytes([number, 1]), "x" * 3000) for number in range(200)])
    cache.close()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert read_object(tmp_path / "no", "") == {}
    assert read_lines(tmp_path / "no", "") == []
    with pytest.raises(UserError, match=f"'{tmp_path}' is damaged"):
        read_object(tmp_path, "")
    with pytest.raises(UserError, match=f"'{tmp_path}' cannot be read"):
        read_lines(tmp_path, "")


def test_damaged_predictions_are_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "standard.jsonl"
    good: dict[str, Any] = {"id": "a", "made_with": "m", "em": 1.0}
    lines = [json.dumps(good).encode(), b"\xff\x00", b"[]", b'"text"', b'{"id": "b", "made']
    path.write_bytes(b"\n".join(lines))
    kept = Kept(path, "m")
    assert kept.records == {"a": {"id": "a", "em": 1.0}}
    assert "3 damaged lines of" in capsys.readouterr().err
    assert path.read_text() == json.dumps({"id": "a", "em": 1.0, "made_with": "m"}) + "\n"
    assert Kept(path, "m").records.keys() == {"a"}
    assert "damaged" not in capsys.readouterr().err


def test_inspect_names_a_damaged_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "step-000001.jsonl").write_bytes(b"\xff\xfe\n")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "line 1 of" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["config --config configs/toy.yaml", "--help", "train --help"])
def test_nobody_reads_the_output(command: str) -> None:
    """As in ``lmcot inspect RUN | head -1``: it ends without a word."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lmcot.cli", *command.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=TOY.parents[1],
        check=False,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == (0 if "--help" in command else 141)  # argparse ends by itself
