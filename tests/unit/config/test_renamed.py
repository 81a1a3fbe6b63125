"""Keys that had another place: settings of earlier versions are read as they were meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot.cli import main
from lmcot.config import (
    Config,
    GuidanceRewards,
    Penalties,
    differences,
    digested_settings,
    dump_config,
    flat_settings,
    load_config,
    parse_config,
    renamed_settings,
)
from lmcot.config.renamed import REMOVED
from lmcot.errors import UserError
from lmcot.run.directory import RunDirectory

BEFORE = (Path(__file__).parent / "data" / "config-0.1.0.yaml").read_text(encoding="utf-8")
"""What a run of the quickstart wrote before the length penalties were settings of the rewards."""
LEAST: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
    "policy": {"source": "random:llama"},
    "rewards": {"kind": "increasing"},
    "refine": {"start_from": "base"},
}


def quickstart() -> Config:
    return load_config(Path(__file__).parents[3] / "configs" / "quickstart.yaml")


def penalties(config: Config) -> Penalties:
    return config.rewards.penalties


def test_a_run_of_before_has_the_settings_of_its_file() -> None:
    assert "length_penalty" in BEFORE
    changed = differences(parse_config(yaml.safe_load(BEFORE)), quickstart())
    later = {"teacher.shorten": (True, False), "learner.attention": ("auto", "model")}
    assert changed == later, "keys that came later"


def test_a_key_that_came_later_changes_no_digest_until_it_is_set() -> None:
    """A digest binds results to the settings; a new key would be a new setting."""
    unset = quickstart()
    later = {"frozen.chat", "prompts.conclusion"}
    assert later < flat_settings(unset).keys()
    assert not later & digested_settings(unset, "evaluate").keys()
    assert unset.frozen is not None
    frozen = unset.frozen.model_copy(update={"chat": "never"})
    changed = unset.model_copy(update={"frozen": frozen})
    assert differences(unset, changed) == {"frozen.chat": (None, "never")}
    assert digested_settings(changed, "evaluate")["frozen.chat"] == "never"


def test_a_run_of_before_resumes(tmp_path: Path) -> None:
    """Refinement has begun, and depends on both places of the keys."""
    (tmp_path / "config.yaml").write_text(BEFORE)
    (tmp_path / "stages.json").write_text('{"distill": {}, "refine": {}}')
    with RunDirectory(tmp_path) as directory:
        assert directory.begun(quickstart()) == ["distill", "refine"]
        assert directory.check_config(quickstart()) == []


def test_sources_of_policies_have_a_mapping() -> None:
    config = parse_config({**LEAST, "evaluate": {"refined": "runs/mine/best", "distilled": None}})
    assert config.evaluate.given_source("refined") == "runs/mine/best"
    assert config.evaluate.given_source("distilled") is None
    with pytest.raises(UserError, match=r"unknown key 'evaluate\.policies\.refind': did you mean"):
        parse_config({**LEAST, "evaluate": {"policies": {"refind": "x"}}})


def test_a_changed_penalty_of_a_run_of_before_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(BEFORE)
    values["refine"]["length_penalty"] = 0.25
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "stages.json").write_text('{"refine": {}}')
    with (
        RunDirectory(tmp_path) as directory,
        pytest.raises(UserError, match=r"another value of rewards\.penalties\.length:"),
    ):
        directory.check_config(quickstart())


def test_old_keys_are_read() -> None:
    old = {"missing_end_penalty": 0.25, "length_penalty": 0.5, "length_free": 0.75}
    config = parse_config({**LEAST, "refine": {**LEAST["refine"], **old}})
    assert penalties(config) == Penalties(missing_end=0.25, length=0.5, length_free=0.75)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    without = {key: value for key, value in LEAST.items() if key != "rewards"}
    frozen = {"backend": "transformers", "source": "random:llama"}
    refine = {**LEAST["refine"], "length_penalty": 1.0}
    config = parse_config({**without, "frozen": frozen, "refine": refine})
    assert config.rewards == GuidanceRewards(penalties=Penalties(length=1.0))


def test_of_both_keys_the_new_one_holds_over_an_old_default() -> None:
    values = yaml.safe_load(BEFORE)
    values["rewards"]["penalties"] = {"length": 0.5}
    assert penalties(parse_config(values)) == Penalties(length=0.5)
    values["refine"]["length_penalty"] = 0.25
    expected = "refine.length_penalty is now rewards.penalties.length, but both are set: remove"
    with pytest.raises(UserError, match=expected):
        parse_config(values)


@pytest.mark.parametrize("rewards", ["custom", ["custom"], {"penalties": 3}])
def test_what_is_no_mapping_is_refused_by_its_own_key(rewards: Any) -> None:
    values = {**LEAST, "rewards": rewards, "refine": {"start_from": "base", "length_free": 0.5}}
    with pytest.raises(UserError, match="rewards"):
        parse_config(values)


def test_the_new_key_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    override = "refine.missing_end_penalty=0.5"
    told = "refine.missing_end_penalty is now rewards.penalties.missing_end: rename it"
    assert renamed_settings(file) == []
    [sentence] = renamed_settings(file, [override])
    assert sentence.startswith(told)
    assert main(["config", "--config", str(file), override]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"lmcot: {sentence}\n"
    assert yaml.safe_load(shown.out)["rewards"]["penalties"]["missing_end"] == 0.5


@pytest.mark.parametrize(("key", "constant"), REMOVED.items())
def test_a_key_that_became_a_constant_is_ignored(key: str, constant: Any, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    same, other = f"{key}={constant}", f"{key}={constant / 2}"
    assert load_config(file, [same]) == load_config(file, [other]) == load_config(file)
    assert renamed_settings(file, [same]) == []
    assert renamed_settings(file, [other]) == [
        f"{key} is no longer a setting and is ignored (it is always {constant}): remove it"
    ]


def test_aspects_that_were_judged_before_stand() -> None:
    """Scores on disk are marked with these settings; a mark that differs has them made again."""
    rewards = parse_config(yaml.safe_load(BEFORE)).resolved().rewards
    before = yaml.safe_load(BEFORE)["rewards"]
    assert (
        rewards.model_dump(mode="json", exclude={"penalties", "choice_probability_weight"})
        == before
    )
    assert quickstart().resolved().rewards == rewards
