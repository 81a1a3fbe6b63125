"""Every layout in which public sets come: files are written in it here, and read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from lmcot.config import FileData
from lmcot.data import LoadedExamples, load_examples
from lmcot.errors import UserError
from lmcot.records import Example, Paragraph, SupportingFact

PAIRS: list[Any] = [
    ["Lake Brann", ["Lake Brann lies in Oster.", " It was dug in 1911."]],
    ["Oster", ["Oster is in the state of Velm."]],
]
CONTEXT = (
    Paragraph("Lake Brann", ("Lake Brann lies in Oster.", " It was dug in 1911.")),
    Paragraph("Oster", ("Oster is in the state of Velm.",)),
)
FACTS = (SupportingFact("Lake Brann", 0), SupportingFact("Oster", 0))
RECORD: dict[str, Any] = {
    "_id": "q1",
    "question": "In which state is Lake Brann?",
    "answer": "Velm",
    "context": PAIRS,
    "supporting_facts": [["Lake Brann", 0], ["Oster", 0]],
}
TWO = [RECORD, {**RECORD, "_id": "q2"}]
COLUMNS = {
    **{name: RECORD[name] for name in ("question", "answer")},
    "id": "q1",
    "context": {"title": [t for t, _ in PAIRS], "sentences": [s for _, s in PAIRS]},
    "supporting_facts": {"title": ["Lake Brann", "Oster"], "sent_id": [0, 0]},
}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in records)


def load(path: Path, **options: Any) -> LoadedExamples:
    return load_examples(FileData(kind="file", path=str(path)), **options)


def read(folder: Path, content: bytes, name: str = "q.jsonl") -> list[Example]:
    (folder / name).write_bytes(content)
    return load(folder / name).examples


def one(folder: Path, **changes: Any) -> Example:
    """The example of a record; a change to ... takes a field away."""
    record = {k: v for k, v in {**RECORD, **changes}.items() if v is not ...}
    (example,) = read(folder, lines(record))
    return example


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files


def parquet_of(*records: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(records)), sink)
    return sink.getvalue()


def arrow_of(new: Callable[..., Any], *records: Any) -> bytes:
    table = pyarrow.Table.from_pylist(list(records))
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def table_of(delimiter: str, *rows: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


HEAD = ["id", "Question", "answer", "context", "supporting_facts"]
ROWS = [
    ["q1", RECORD["question"], "Velm", json.dumps(PAIRS), json.dumps(RECORD["supporting_facts"])],
    ["q2", "Two\nlines, two cells?", "1945", str(PAIRS), ""],
]
JSON_CELLS = {"id": "q1", **{k: json.dumps(COLUMNS[k]) for k in ("context", "supporting_facts")},
              "question": RECORD["question"], "answer": "Velm"}  # fmt: skip
HUB_ROWS = [{**COLUMNS, "id": "q1"}, {**COLUMNS, "id": "q2"}]
FILES: dict[str, bytes] = {
    "lines.jsonl": lines(*TWO),
    "crlf.jsonl": b"\xef\xbb\xbf" + lines(*TWO).replace(b"\n", b"\r\n"),
    "utf16.jsonl": lines(*TWO).decode().encode("utf-16"),
    "utf16-without-mark.jsonl": lines(*TWO).decode().encode("utf-16-le"),
    "utf32.jsonl": lines(*TWO).decode().encode("utf-32"),
    "array.json": json.dumps(TWO).encode(),
    "pretty-array.json": json.dumps(TWO, indent=2).encode(),
    "pretty-objects.json": "\n".join(json.dumps(r, indent=2) for r in TWO).encode(),
    "data.json": json.dumps({"version": 1, "data": TWO}).encode(),
    "pretty-data.json": json.dumps({"data": TWO}, indent=1).encode(),
    "questions.json": json.dumps({"questions": TWO, "meta": {"n": 2}}).encode(),
    "nested.json": json.dumps({"data": {"questions": TWO}}).encode(),
    "split.json": json.dumps({"validation": TWO}).encode(),
    "by-id.json": json.dumps({"q1": RECORD, "q2": TWO[1]}).encode(),
    "columns.json": json.dumps({k: [r[k] for r in TWO] for k in RECORD}).encode(),
    "pandas-columns.json": json.dumps(
        {k: {str(n): r[k] for n, r in enumerate(TWO)} for k in RECORD}
    ).encode(),
    "pandas-split.json": json.dumps(
        {"columns": list(RECORD), "index": [0, 1], "data": [list(r.values()) for r in TWO]}
    ).encode(),
    "viewer.json": json.dumps({"rows": [{"row_idx": 0, "row": r} for r in TWO]}).encode(),
    "hub.parquet": parquet_of(*HUB_ROWS),
    "cells.parquet": parquet_of(JSON_CELLS, {**JSON_CELLS, "id": "q2"}),
    "hub.arrow": arrow_of(ipc.new_stream, *HUB_ROWS),
    "file.arrow": arrow_of(ipc.new_file, *HUB_ROWS),
    "comma.csv": table_of(",", HEAD, *ROWS),
    "excel.csv": b"\xef\xbb\xbf" + table_of(";", HEAD, *ROWS),
    "tab.tsv": table_of("\t", HEAD, *ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_a_files_layout_is_told_by_its_content(tmp_path: Path, name: str) -> None:
    first, second = read(tmp_path, FILES[name], name)
    assert (first.id, second.id) == ("q1", "q2")
    assert first.question == RECORD["question"]
    assert (first.answer, first.context) == ("Velm", CONTEXT)
    assert first.supporting_facts == FACTS
    assert second.context == CONTEXT
    loaded = load(tmp_path / name, limit=1)
    assert [example.id for example in loaded.examples] == ["q1"]


def test_cells_hold_line_breaks_numbers_and_what_python_writes(tmp_path: Path) -> None:
    second = read(tmp_path, FILES["comma.csv"], "q.csv")[1]
    assert (second.question, second.answer) == ("Two\nlines, two cells?", "1945")
    assert (second.context, second.supporting_facts) == (CONTEXT, ())


def zip_of(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, lines(*TWO))
    return packed.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "hub.parquet", "comma.csv"])
@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, zstd], ids=["gz", "bz2", "xz", "zst"]
)
def test_packed(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    assert [e.id for e in read(tmp_path, pack(FILES[name]))] == ["q1", "q2"]


def test_a_zip_archive_of_one_file(tmp_path: Path) -> None:
    content = zip_of("__MACOSX/q.jsonl", "q.jsonl")
    assert [e.id for e in read(tmp_path, content, "q.zip")] == ["q1", "q2"]


LONG = lines(*[{**RECORD, "_id": str(n)} for n in range(3000)])
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("gz", gzip.compress(LONG)[:-30], "is a broken gzip file ("),
    ("bz2", bz2.compress(LONG)[:-30], "is a broken bzip2 file ("),
    ("xz", lzma.compress(LONG)[:-30], "is a broken xz file ("),
    ("zst", zstd(LONG)[:-30], "is a broken zstd file ("),
    ("zip", zip_of("q.jsonl")[:-30], "is a broken zip file ("),
    ("zip", zip_of("a.jsonl", "b.jsonl"), "is a zip archive of 2 files (a.jsonl, b.jsonl): unpack"),
    ("parquet", FILES["hub.parquet"][:-30], "is a broken parquet or Arrow file ("),
    ("parquet", FILES["hub.parquet"][:400], "is a broken parquet or Arrow file ("),
    ("arrow", FILES["hub.arrow"][:400], "is a broken parquet or Arrow file ("),
    ("parquet", parquet_of({"prompt": "x", "n": 1}), "has no column 'question', only prompt, n"),
    ("csv", b"a,b\n1,2\n", "begins with neither JSON nor the head of a table with a column 'quest"),
    ("txt", b"Where is it?\n", "begins with neither JSON nor the head of a table"),
    ("csv", table_of(",", HEAD) + b'q1,"open,x\n', "is not a valid table at line 2 ("),
    ("csv", table_of(",", HEAD) + "1,Où?,x,y,z\n".encode("latin-1"), "is not UTF-8 text (line 2)"),
    ("json", b'[{"answer": "\xfc"}]', "is not UTF-8 text (line 1): convert it"),
    ("json", b"\xff\xfe[\x00]", "begins like UTF-16 text, but is not: convert it to UTF-8"),
    ("json", json.dumps({"train": TWO, "test": TWO}).encode(), "holds several lists of records ("),
    ("json", json.dumps(TWO, indent=1).encode()[:-40], "is not valid JSON at line "),
    ("jsonl", b"<!DOCTYPE html><html>404</html>", "is a page of HTML or XML"),
    ("jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ("pdf", b"%PDF-1.7\n", "is a PDF document, which is not a file of questions"),
    ("bin", b"\x01\x02\x03\x00", "is a binary file of an unknown kind"),
    ("tar", b"q.jsonl".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 248, "is a tar archive"),
]


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
@pytest.mark.parametrize(("suffix", "content", "sentence"), BAD_FILES)
def test_what_is_wrong_with_a_file_is_not_told_of_a_record(
    tmp_path: Path, suffix: str, content: bytes, sentence: str, on_bad: str
) -> None:
    path = tmp_path / f"q.{suffix}"
    path.write_bytes(content)
    said = refusal(path, on_bad=on_bad)
    assert said.startswith(f"{path} {sentence}")
    assert "on_bad_record" not in said


def test_a_wrapper_of_nothing_holds_no_questions(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('{"data": []}')
    assert "holds no questions" in refusal(tmp_path / "q.json")


def test_a_line_that_is_cut_off_or_of_another_encoding_says_so(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines(*TWO)[:-50])
    assert "and the file ends in it; fetch the file again, or set" in refusal(path)
    path.write_bytes(lines({**RECORD, "answer": "Malmö"}).decode().encode("latin-1"))
    assert "q.jsonl:1: the line is not UTF-8 text; convert the file to UTF-8" in refusal(path)


def test_rows_of_another_length_are_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(table_of(",", HEAD, ["q0", "x"], [], *ROWS))
    assert "q.csv:2: the row has 2 cells, but 5 columns; correct the record" in refusal(path)
    loaded = load(path, on_bad="skip")
    assert ([e.id for e in loaded.examples], loaded.skipped) == (["q1", "q2"], 1)


# Folders and patterns


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    shards = tmp_path / "a" / "shards"
    shards.mkdir(parents=True)
    for name, number in (("train-1.jsonl", 1), ("train-0.jsonl.gz", 0), ("train-2.parquet", 2)):
        record = {**COLUMNS, "id": str(number)}
        content = parquet_of(record) if name.endswith("parquet") else lines(record)
        (shards / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "dataset_info.json", ".hidden.jsonl", "_SUCCESS"):
        (shards / name).write_text("no question")
    assert [e.id for e in load(shards).examples] == ["0", "1", "2"]
    assert [e.id for e in load(shards / "*.jsonl*").examples] == ["0", "1"]
    assert [e.id for e in load(shards, limit=1).examples] == ["0"]
    assert [e.id for e in load(tmp_path / "**/train-[12].*").examples] == ["1", "2"]


def test_a_folder_that_the_datasets_library_saved(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(HUB_ROWS)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "set"))
    assert "several splits" in refusal(tmp_path / "set")
    assert [e.id for e in load(tmp_path / "set" / "train").examples] == ["q1", "q2"]


def test_files_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_bytes(lines(RECORD))
    assert "holds files of several splits (train, validation): name one file" in refusal(tmp_path)
    assert len(load(tmp_path / "train*").examples) == 1


# Ids


@pytest.mark.parametrize(
    ("fields", "identity"),
    [
        ({"id": 17}, "17"),
        ({"_id": "a", "id": "b"}, "b"),
        ({"_id": {"$oid": "5a8b57f2"}}, "5a8b57f2"),
        ({"qid": "x"}, "x"),
        ({"question_id": 0}, "0"),
        ({"query_id": "y", "id": None}, "y"),
    ],
)
def test_an_id_by_other_names(tmp_path: Path, fields: dict[str, Any], identity: str) -> None:
    assert one(tmp_path, **{"_id": ..., **fields}).id == identity


def test_a_record_without_an_id_gets_one_of_its_content(tmp_path: Path) -> None:
    anonymous = {name: value for name, value in RECORD.items() if name != "_id"}
    other = {**anonymous, "question": "Where is it?"}
    (tmp_path / "q.jsonl").write_bytes(lines(anonymous, other))
    loaded = load(tmp_path / "q.jsonl")
    first, second = loaded.examples
    assert first.id != second.id
    assert loaded.without_id == 2
    assert [e.id for e in read(tmp_path, lines(other, anonymous))] == [second.id, first.id]
    (tmp_path / "q.jsonl").write_bytes(lines(anonymous, other, anonymous))
    assert ":3: the whole question occurs a second time, first at " in refusal(tmp_path / "q.jsonl")


# Answers


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answer": ["Velm", "State of Velm", "VELM", " "]}, ("Velm", "State of Velm")),
        ({"answer": '["Velm", "State of Velm"]'}, ("Velm", "State of Velm")),
        ({"answer": "[1, 2]"}, ("[1, 2]",)),
        ({"answer": True}, ("yes",)),
        ({"answer": False}, ("no",)),
        ({"answer": 1945}, ("1945",)),
        ({"answer": 0}, ("0",)),
        ({"answer": 3.5}, ("3.5",)),
        ({"answer": 1945.0}, ("1945.0", "1945")),
        ({"answer": "A\u030a"}, ("\u00c5",)),
        ({"answer": "Velm", "answer_aliases": ["State of Velm"]}, ("Velm", "State of Velm")),
        ({"answer": "Velm", "answers": ["Velm", "Velmland"]}, ("Velm", "Velmland")),
        ({"answer": ..., "golden_answers": ["Velm", "Velmland"]}, ("Velm", "Velmland")),
        ({"answer": ..., "possible_answers": '["Velm", "Velmland"]'}, ("Velm", "Velmland")),
        ({"answer": ..., "answers": {"text": ["Velm", "Velm"], "answer_start": [1, 7]}}, ("Velm",)),
        ({"answer": ..., "answers": [{"text": "Velm", "answer_start": 1}]}, ("Velm",)),
        ({"answer": {"value": "Velm", "aliases": ["Velmland"], "type": "Entity",
                     "normalized_aliases": ["velm", "velm land"], "matched_wiki_entity_name": "X"}},
         ("Velm", "Velmland", "velm land")),
        ({"answer": ..., "output": [{"answer": "Velm", "provenance": []}]}, ("Velm",)),
        ({"answer": {"spans": ["Velm", "Oster"], "number": "", "date": {}}}, ("Velm", "Oster")),
        ({"answer": "Velm", "output": "a prediction", "target": "x"}, ("Velm",)),
    ],
)  # fmt: skip
def test_all_right_answers(
    tmp_path: Path, fields: dict[str, Any], answers: tuple[str, ...]
) -> None:
    assert one(tmp_path, **fields).answers == answers


def test_a_number_is_what_the_file_says(tmp_path: Path) -> None:
    text = lines(RECORD).replace(b'"Velm", "context"', b'12.50, "context"')
    assert read(tmp_path, text)[0].answers == ("12.50",)
    rows = parquet_of({**COLUMNS, "answer": 1945.0})
    assert read(tmp_path, rows)[0].answers == ("1945", "1945.0")


# Contexts


@pytest.mark.parametrize(
    ("fields", "titles"),
    [
        ({"context": json.dumps(PAIRS)}, ["Lake Brann", "Oster"]),
        ({"context": str(PAIRS)}, ["Lake Brann", "Oster"]),
        ({"context": [json.dumps(pair) for pair in PAIRS]}, ["Lake Brann", "Oster"]),
        ({"context": dict(PAIRS)}, ["Lake Brann", "Oster"]),
        ({"context": COLUMNS["context"]}, ["Lake Brann", "Oster"]),
        ({"context": [{"title": t, "sentences": s} for t, s in PAIRS]}, ["Lake Brann", "Oster"]),
        ({"context": [{"title": t, "content": s} for t, s in PAIRS]}, ["Lake Brann", "Oster"]),
        ({"context": ..., "metadata": {"context": PAIRS}}, ["Lake Brann", "Oster"]),
    ],
)
def test_contexts_of_sentences(tmp_path: Path, fields: dict[str, Any], titles: list[str]) -> None:
    example = one(tmp_path, **fields)
    assert [p.title for p in example.context] == titles
    assert example.context == CONTEXT
    assert example.supporting_facts == FACTS


TEXTS: list[Any] = [[title, "".join(sentences)] for title, sentences in PAIRS]
SPLIT = [
    ("Lake Brann", ("Lake Brann lies in Oster.", "It was dug in 1911.")),
    ("Oster", ("Oster is in the state of Velm.",)),
]
BARE = [("", sentences) for _, sentences in SPLIT]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"context": TEXTS}, SPLIT),
        ({"context": dict(TEXTS)}, SPLIT),
        ({"context": [{"title": t, "text": x} for t, x in TEXTS]}, SPLIT),
        ({"context": {"title": [t for t, _ in TEXTS], "text": [x for _, x in TEXTS]}}, SPLIT),
        ({"context": ..., "ctxs": [{"title": t, "text": x, "score": 1} for t, x in TEXTS]}, SPLIT),
        ({"context": ..., "retrieval_result": [{"id": 1, "contents": f'"{t}"\n{x}'}
                                               for t, x in TEXTS]}, SPLIT),
        ({"context": ..., "documents": [{"document": {"contents": f"{t}\n{x}"}, "score": 1}
                                        for t, x in TEXTS]}, SPLIT),
        ({"context": "\n\n".join(f"Passage {n}:\n{t}\n{x}" for n, (t, x) in enumerate(TEXTS, 1))},
         SPLIT),
        ({"context": [x for _, x in TEXTS]}, BARE),
        ({"context": "\n\n".join(x for _, x in TEXTS)}, BARE),
        ({"context": ..., "passage": TEXTS[0][1]}, BARE[:1]),
        ({"context": TEXTS[0][1], "title": "Lake Brann"}, SPLIT[:1]),
        ({"context": {"title": "Lake Brann", "text": TEXTS[0][1]}}, SPLIT[:1]),
        ({"context": [[None, ["One.", None]]]}, [("", ("One.", ""))]),
    ],
)  # fmt: skip
def test_contexts_of_texts(
    tmp_path: Path, fields: dict[str, Any], expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    example = one(tmp_path, supporting_facts=..., **fields)
    assert [(p.title, p.sentences) for p in example.context] == expected


WHOLE = (*FACTS[:1], SupportingFact("Lake Brann", 1), *FACTS[1:])


@pytest.mark.parametrize(
    "fields",
    [
        {"supporting_facts": ["Lake Brann", "Oster"]},
        {"supporting_facts": [["Lake Brann", None], {"title": "Oster"}]},
        {"context": TEXTS},
        {"context": [{"title": t, "text": x, "is_supporting": True} for t, x in TEXTS],
         "supporting_facts": ...},
    ],
)  # fmt: skip
def test_a_fact_without_a_sentence_supports_its_whole_passage(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    assert one(tmp_path, **fields).supporting_facts == WHOLE


@pytest.mark.parametrize(
    "facts",
    [
        json.dumps(RECORD["supporting_facts"]),
        COLUMNS["supporting_facts"],
        [{"title": "Lake Brann", "sentence_id": 0}, {"title": "Oster", "sent_idx": 0}],
        [["Lake Brann", 0.0], ["Oster", 0.0]],
    ],
)
def test_facts_of_single_sentences(tmp_path: Path, facts: object) -> None:
    assert one(tmp_path, supporting_facts=facts).supporting_facts == FACTS


def test_official_squad_and_ms_marco(tmp_path: Path) -> None:
    paragraph = {
        "context": TEXTS[0][1],
        "qas": [
            {"id": n, "question": f"{n}?", "answers": [{"text": "Oster", "answer_start": 19}]}
            for n in ("a", "b")
        ],
    }
    article = {"title": "Lake_Brann", "paragraphs": [paragraph]}
    squad = read(tmp_path, json.dumps({"version": "1.1", "data": [article]}).encode())
    assert [(e.id, e.question, e.answer) for e in squad] == [
        ("a", "a?", "Oster"),
        ("b", "b?", "Oster"),
    ]
    assert squad[0].context[0] == Paragraph("Lake_Brann", SPLIT[0][1])
    marco = {
        "query": "where?",
        "query_id": 3,
        "answers": ["Oster"],
        "passages": {
            "is_selected": [0, 1],
            "passage_text": [x for _, x in TEXTS],
            "url": ["u", "v"],
        },
    }
    (example,) = read(tmp_path, lines(marco))
    assert (example.id, example.question, example.answers) == ("3", "where?", ("Oster",))
    assert example.gold_sentences() == SPLIT[1][1]


def test_text_is_read_in_its_composed_form(tmp_path: Path) -> None:
    example = one(tmp_path, question="A\u030a?", context=[["A\u030a", ["A\u030a."]]],
                  supporting_facts=[["A\u030a", 0]])  # fmt: skip
    assert (example.question, example.gold_sentences()) == ("\u00c5?", ("\u00c5.",))
