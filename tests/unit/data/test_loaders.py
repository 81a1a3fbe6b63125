from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from lmcot.config import CountingData, FileData, HubData, SampleData
from lmcot.data import LoadedExamples, load_examples
from lmcot.errors import UserError
from lmcot.records import Paragraph, SupportingFact

GOOD: dict[str, Any] = {
    "id": "q1",
    "question": "Who wrote it?",
    "answer": "Ann",
    "type": "bridge",
    "level": None,
    "context": [{"title": "T", "sentences": ["", " Ann wrote it."]}],
    "supporting_facts": [{"title": "T", "sent_id": 1}],
}
HOTPOTQA: dict[str, Any] = {
    "_id": "h1",
    "question": "Who wrote it?",
    "answer": "Ann",
    "type": "bridge",
    "level": "hard",
    "context": [["T", ["It is a book.", " Ann wrote it."]], ["U", ["Other."]]],
    "supporting_facts": [["T", 1], ["T", 7]],
}
WIKI2 = {**HOTPOTQA, "_id": "w1", "evidences": [["it", "author", "Ann"]]}
MUSIQUE: dict[str, Any] = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "T", "paragraph_text": "Other text.", "is_supporting": False},
        {
            "idx": 1,
            "title": "T",
            "paragraph_text": "It is a book. Ann wrote it.",
            "is_supporting": True,
        },
    ],
    "question": "Who wrote it?",
    "question_decomposition": [{"id": 1, "question": "it >> author"}],
    "answer": "Ann",
    "answer_aliases": ["Anne"],
    "answerable": True,
}


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def load(folder: Path, content: bytes, **options: Any) -> LoadedExamples:
    path = folder / "questions"
    path.write_bytes(content)
    file_format = options.pop("format", "auto")
    return load_examples(FileData(kind="file", path=str(path), format=file_format), **options)


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


# The sources


@pytest.mark.parametrize(("split", "count"), [("train", 256), ("validation", 128)])
def test_the_shipped_sample(split: Any, count: int) -> None:
    loaded = load_examples(SampleData(kind="sample", split=split))
    assert (len(loaded.examples), loaded.skipped, loaded.problems) == (count, 0, [])
    for example in loaded.examples:
        assert example.dataset == "hotpotqa"
        assert len(example.context) == 10
        assert len(example.gold_sentences()) == len(set(example.supporting_facts)) >= 2
    assert [
        e.id for e in load_examples(SampleData(kind="sample", split=split), limit=3).examples
    ] == [e.id for e in loaded.examples[:3]]


def test_the_sample_ships_with_its_attribution() -> None:
    text = (resources.files("lmcot.data") / "samples" / "ATTRIBUTION.md").read_text("utf-8")
    assert "CC BY-SA" in text
    assert "Yang" in text


def test_the_splits_do_not_overlap() -> None:
    train, validation = (
        {e.id for e in load_examples(SampleData(kind="sample", split=split)).examples}
        for split in ("train", "validation")
    )
    assert not train & validation


def test_counting() -> None:
    loaded = load_examples(CountingData(kind="counting", examples=3))
    assert [e.id for e in loaded.examples] == ["counting-1", "counting-2", "counting-3"]
    assert loaded.examples[1].question == "Write increasing numbers from 2."
    assert {(e.answer, e.context) for e in loaded.examples} == {("", ())}
    assert len(load_examples(CountingData(kind="counting"), limit=5).examples) == 5


def test_json_lines(tmp_path: Path) -> None:
    (example,) = load(tmp_path, jsonl(GOOD)).examples
    assert example.context == (Paragraph("T", ("", " Ann wrote it.")),)
    assert example.supporting_facts == (SupportingFact("T", 1),)
    assert example.gold_sentences() == ("Ann wrote it.",)
    assert (example.type, example.level, example.dataset) == ("bridge", "", "")


@pytest.mark.parametrize("file_format", ["auto", "hotpotqa"])
@pytest.mark.parametrize("packed", [False, True])
def test_hotpotqa(tmp_path: Path, file_format: str, packed: bool) -> None:
    content = json.dumps([HOTPOTQA, {**HOTPOTQA, "_id": "h2"}], indent=1).encode()
    content = gzip.compress(content, mtime=0) if packed else content
    first, second = load(tmp_path, content, format=file_format).examples
    assert (first.id, first.dataset, first.level, second.id) == ("h1", "hotpotqa", "hard", "h2")
    assert first.context[0] == Paragraph("T", ("It is a book.", " Ann wrote it."))
    assert first.gold_sentences() == ("Ann wrote it.",)


@pytest.mark.parametrize("file_format", ["auto", "2wikimultihopqa"])
def test_2wikimultihopqa(tmp_path: Path, file_format: str) -> None:
    (example,) = load(tmp_path, json.dumps([WIKI2]).encode(), format=file_format).examples
    assert (example.id, example.dataset) == ("w1", "2wikimultihopqa")
    assert example.gold_sentences() == ("Ann wrote it.",)


@pytest.mark.parametrize("file_format", ["auto", "musique"])
def test_musique(tmp_path: Path, file_format: str) -> None:
    (example,) = load(tmp_path, jsonl(MUSIQUE), format=file_format).examples
    assert example.dataset == "musique"
    assert example.context == (
        Paragraph("T", ("Other text.",)),
        Paragraph("T (2)", ("It is a book.", "Ann wrote it.")),
    )
    assert example.gold_sentences() == ("It is a book.", "Ann wrote it.")


def test_facts_by_paragraph_tell_namesakes_apart(tmp_path: Path) -> None:
    context = [{"title": t, "sentences": [s]} for t, s in (("T", "a"), ("T", "b"), ("T (2)", "c"))]
    facts = [{"title": "T", "sent_id": 0, "para_idx": 1}]
    record = {**GOOD, "context": context, "supporting_facts": facts}
    (example,) = load(tmp_path, jsonl(record)).examples
    assert [p.title for p in example.context] == ["T", "T (3)", "T (2)"]
    assert example.gold_sentences() == ("b",)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(jsonl(GOOD), mtime=0),
        b"\xef\xbb\xbf" + jsonl(GOOD),
        b"\n  \n" + jsonl(GOOD) + b"\r\n\n",
        json.dumps({**GOOD, "question": "Line\u2028break?"}, ensure_ascii=False).encode(),
        b"\n [" + json.dumps(GOOD).encode() + b" ]\n",
        jsonl(without(GOOD, "supporting_facts")),
        jsonl({**GOOD, "supporting_facts": None}),
        jsonl({**GOOD, "supporting_facts": []}),
    ],
)
def test_harmless_variety(tmp_path: Path, content: bytes) -> None:
    assert [e.id for e in load(tmp_path, content).examples] == ["q1"]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    records = [{**GOOD, "id": str(n)} for n in range(3)]
    broken_later = jsonl(*records) + b"{oops\n"
    assert [e.id for e in load(tmp_path, broken_later, limit=2).examples] == ["0", "1"]
    array = json.dumps(records).encode()[:-1] + b", oops"
    assert [e.id for e in load(tmp_path, array, limit=2).examples] == ["0", "1"]


# What is wrong with a record

MALFORMED: list[tuple[Any, str]] = [
    ({**GOOD, "id": " "}, "the field 'id' must be a non-empty string or a whole number"),
    ({**GOOD, "id": 7.5}, "the field 'id' must be a non-empty string or a whole number"),
    (without(GOOD, "question"), "the field 'question' is missing"),
    ({**GOOD, "question": " "}, "the field 'question' must be a non-empty string"),
    (without(GOOD, "answer"), "the field 'answer' is missing"),
    ({**GOOD, "answer": None}, "the field 'answer' is missing"),
    ({**GOOD, "answer": ["", " "]}, "the field 'answer' must hold an answer that is not empty"),
    ({**GOOD, "answer": {"text": []}}, "the field 'answer' must hold an answer that is not empty"),
    ({**GOOD, "answer": "\ud800"}, "the field 'answer' must hold text, numbers, or lists of them"),
    ({**GOOD, "answer": float("nan")}, "the field 'answer' is not a finite number"),
    (without(GOOD, "context"), "the field 'context' is missing"),
    ({**GOOD, "context": []}, "the field 'context' is empty"),
    ({**GOOD, "context": " "}, "the field 'context' is empty"),
    ({**GOOD, "context": 3}, "the field 'context' must be a list"),
    ({**GOOD, "context": [{"title": "T", "sentences": [" "]}]}, "the context holds no text"),
    (
        {**GOOD, "context": [GOOD["context"][0], {"title": "T", "sentences": 3}]},
        "paragraph 2 of the context must be a title and a list of sentences",
    ),
    (
        {**GOOD, "context": [["T"]]},
        "paragraph 1 of the context must be a title and a list of sentences",
    ),
    (
        {**GOOD, "context": [["T", ["a", 3]]]},
        "paragraph 1 of the context must be a title and a list of sentences",
    ),
    (
        {**GOOD, "context": {"title": ["T", "U"], "sentences": [["a"]]}},
        "the columns of 'context' must be lists of the same length",
    ),
    ({**GOOD, "supporting_facts": "T"}, "the field 'supporting_facts' must be a list"),
    (
        {**GOOD, "supporting_facts": [["T", 0], ["T", "0"]]},
        "supporting fact 2 must be a title and a sentence's index",
    ),
    (
        {**GOOD, "supporting_facts": [["T", -1]]},
        "supporting fact 1 must be a title and a sentence's index",
    ),
    (
        {**GOOD, "supporting_facts": [["T", True]]},
        "supporting fact 1 must be a title and a sentence's index",
    ),
    (
        {**GOOD, "supporting_facts": [{"title": "T", "sent_id": 0, "para_idx": 1}]},
        "supporting fact 1 has a para_idx outside the context",
    ),
    ([GOOD], "a record must be a JSON object"),
    ("text", "a record must be a JSON object"),
    ({**GOOD, "id": "first"}, "the id 'first' occurs a second time"),
    (
        {**MUSIQUE, "answerable": False},
        "the question is marked as not answerable",
    ),
    ({**MUSIQUE, "paragraphs": []}, "the field 'paragraphs' is empty"),
    (
        {**MUSIQUE, "paragraphs": [{"title": "T"}]},
        "paragraph 1 of the context must be a title and a list of sentences, or a title and a text",
    ),
]
BROKEN_LINES: list[tuple[bytes, str]] = [
    (b'{"id": }\n', "the line is not valid JSON (Expecting value at column 8)"),
    (b'{"id": "\xff"}\n', "the line is not UTF-8 text"),
    (b"[" * 100_000 + b"\n", "the line is JSON nested too deeply"),
    (b'{"id": ' + b"1" * 5000 + b"}\n", "the line is JSON nested too deeply, or with a number of"),
]


@pytest.mark.parametrize(
    ("line", "problem"), [*((jsonl(r), problem) for r, problem in MALFORMED), *BROKEN_LINES]
)
def test_a_bad_line_is_refused_or_skipped(tmp_path: Path, line: bytes, problem: str) -> None:
    content = jsonl({**GOOD, "id": "first"}) + b"\n" + line + jsonl({**GOOD, "id": "last"})
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'questions'}:3: {problem}")
    assert message.endswith(", or set data.on_bad_record to 'skip'")
    loaded = load(tmp_path, content, on_bad="skip")
    assert [e.id for e in loaded.examples] == ["first", "last"]
    assert loaded.skipped == 1
    assert loaded.problems[0].startswith(f"{tmp_path / 'questions'}:3: {problem}")


def test_a_bad_record_of_an_array_is_named_by_place_and_id(tmp_path: Path) -> None:
    content = json.dumps([HOTPOTQA, {**HOTPOTQA, "_id": "h2", "answer": ""}, 3]).encode()
    with pytest.raises(UserError, match=r"questions: record 2 \(id 'h2'\): the field 'answer' mu"):
        load(tmp_path, content)
    loaded = load(tmp_path, content, on_bad="skip")
    assert (len(loaded.examples), loaded.skipped) == (1, 2)
    assert loaded.problems[1].endswith("questions: record 3: a record must be a JSON object")


def test_only_the_first_problems_are_kept(tmp_path: Path) -> None:
    loaded = load(tmp_path, jsonl(GOOD, *[{}] * 20), on_bad="skip")
    assert (loaded.skipped, len(loaded.problems)) == (20, 5)


def test_bad_records_only(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds bad records only; the first: .*:1: the field 'ques"
    ):
        load(tmp_path, jsonl({}, {}), on_bad="skip")


# What is wrong with a file


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no questions"),
        (b" \n\n", "holds no questions"),
        (b"[ ]", "holds no questions"),
        (gzip.compress(b"", mtime=0), "holds no questions"),
        (b'[{"_id": 1},\n {"_id" 2}]', "is not valid JSON at line 2, column 9 (Expecting ':'"),
        (b'[{"_id": 1} {"_id": 2}]', "is not valid JSON at line 1, column 13 (expected ','"),
        (b'[{"_id": 1}', "is not valid JSON at line 1, column 12 (expected ','"),
        (b'[{"_id": 1},', "is not valid JSON at line 1, column 13 (Expecting value"),
        (b'[{"_id": 1}]\n[]', "is not valid JSON at line 2, column 1 (text after the array"),
        (b"[" * 100_000, "is JSON nested too deeply"),
        (b'["\xff"]', "is not UTF-8 text"),
        (gzip.compress(jsonl(GOOD), mtime=0)[:-20], "is a broken gzip file"),
        (gzip.compress(jsonl(GOOD), mtime=0)[:10] + b"rubbish", "is a broken gzip file"),
    ],
)
def test_a_broken_file(tmp_path: Path, content: bytes, sentence: str, on_bad: str) -> None:
    if b"_id" in content:
        content = content.replace(b'{"_id": 1}', json.dumps(HOTPOTQA).encode())
        sentence = sentence.split(", column")[0]
    with pytest.raises(UserError) as caught:
        load(tmp_path, content, on_bad=on_bad)
    assert sentence in str(caught.value)
    assert str(tmp_path / "questions") in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none' does not exist: check the path"):
        load_examples(FileData(kind="file", path=str(tmp_path / "none")))
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds no file of questions"):
        load_examples(FileData(kind="file", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("file_format", "content", "sentence"),
    [
        ("hotpotqa", jsonl(HOTPOTQA), "is not one JSON array, as its format asks"),
        ("2wikimultihopqa", jsonl(WIKI2), "is not one JSON array, as its format asks"),
        ("jsonl", json.dumps([GOOD]).encode(), "is not JSON lines, as its format asks"),
        ("musique", json.dumps([MUSIQUE]).encode(), "is not JSON lines, as its format asks"),
        ("musique", jsonl(GOOD), ":1: the field 'paragraphs' is missing"),
    ],
)
def test_another_format(tmp_path: Path, file_format: str, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, content, format=file_format)


# The hub, from local folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


HUB_HOTPOTQA = {
    **without(HOTPOTQA, "_id"),
    "id": "h1",
    "context": {"title": ["T", "U"], "sentences": [["It is a book.", " Ann wrote it."], ["O."]]},
    "supporting_facts": {"title": ["T"], "sent_id": [1]},
}
HUB_2WIKI = {
    **HUB_HOTPOTQA,
    "context": [{"title": "T", "content": ["It is a book.", "Ann wrote it."]}],
}


@pytest.mark.parametrize(
    ("record", "gold"),
    [
        (HUB_HOTPOTQA, ("Ann wrote it.",)),
        (HUB_2WIKI, ("Ann wrote it.",)),
        (GOOD, ("Ann wrote it.",)),
        (MUSIQUE, ("It is a book.", "Ann wrote it.")),
    ],
)
def test_hub_layouts(hub: Path, record: dict[str, Any], gold: tuple[str, ...]) -> None:
    (hub / "train.jsonl").write_bytes(jsonl(record, {**record, "id": "other"}))
    source = HubData(kind="hub", name=str(hub), split="train")
    first, second = load_examples(source).examples
    assert (first.id, second.id) == (record["id"], "other")
    assert first.gold_sentences() == gold
    assert len(load_examples(source, limit=1).examples) == 1


def test_a_bad_hub_record_is_named(hub: Path) -> None:
    bad = {**HUB_HOTPOTQA, "id": "h2", "answer": ""}
    (hub / "train.jsonl").write_bytes(jsonl(HUB_HOTPOTQA, bad))
    source = HubData(kind="hub", name=str(hub), split="train")
    with pytest.raises(UserError, match=r"\(train\): record 2 \(id 'h2'\): the field 'answer' mu"):
        load_examples(source)
    assert load_examples(source, on_bad="skip").skipped == 1


def test_hub_errors_are_one_sentence(hub: Path) -> None:
    (hub / "train.jsonl").write_bytes(jsonl(HUB_HOTPOTQA))
    for change in ({"split": "none"}, {"config": "none"}, {"name": str(hub / "none")}):
        values = {"kind": "hub", "name": str(hub), "split": "train", **change}
        with pytest.raises(UserError, match="cannot be loaded from the hub") as caught:
            load_examples(HubData.model_validate(values))
        assert "\n" not in str(caught.value)


def test_a_broken_hub_file(hub: Path) -> None:
    (hub / "train.jsonl").write_bytes(b'{"id": 1,\n')
    with pytest.raises(UserError, match="cannot be loaded from the hub"):
        load_examples(HubData(kind="hub", name=str(hub), split="train"))


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, **options: Any) -> None:
        assert (name, config) == ("hotpotqa/hotpot_qa", "distractor")
        assert options == {"split": "validation", "revision": "abc"}
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubData(
        kind="hub",
        name="hotpotqa/hotpot_qa",
        config="distractor",
        split="validation",
        revision="abc",
    )
    with pytest.raises(UserError, match=r"\(ConnectionError: no route\): check name, config"):
        load_examples(source)


def test_importing_data_is_cheap() -> None:
    code = (
        "import sys, lmcot.data; print([m for m in "
        "('torch', 'transformers', 'datasets', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_file_serves_both_parts(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    records = [GOOD | {"id": f"q{n}", "question": f"Where is {n}?"} for n in range(400)]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))

    def ids(part: Any, **options: Any) -> set[str]:
        source = FileData(kind="file", path=str(path), part=part, **options)
        return {one.id for one in load_examples(source).examples}

    train, validation = ids("train"), ids("validation")
    assert train | validation == ids("all")
    assert not train & validation
    assert 20 < len(validation) < 60
    assert validation < ids("validation", held_out=0.5)
    more = [GOOD | {"id": f"r{n}", "question": f"where is  {n}?"} for n in range(400)]
    path.write_text("".join(json.dumps(one) + "\n" for one in more))
    assert ids("validation") == {"r" + one[1:] for one in validation}, "the words decide"
