"""Settings: every mistake is one sentence that names the key; what is right survives a dump."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmcot.config import (
    ASPECTS,
    NO_STAGE_DEPENDS_ON,
    TRAINING_STAGES,
    AdaptiveKl,
    AspectSettings,
    Config,
    FixedKl,
    Gae,
    Grpo,
    GuidanceRewards,
    HeadCritic,
    HubData,
    LoraSettings,
    ModelCritic,
    OpenAIFrozen,
    Rloo,
    depends,
    differences,
    dump_config,
    flat_settings,
    load_config,
    parse_config,
)
from lmcot.config.yaml_text import parse_yaml
from lmcot.errors import UserError

ROOT = Path(__file__).parents[3]
LEAST: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting", "examples": 8}},
    "policy": {"source": "random:llama"},
    "frozen": {"backend": "transformers", "source": "random:llama"},
    "teacher": {"kind": "supporting_facts"},
}
ENDPOINT = {"backend": "openai", "base_url": "http://localhost:8000/v1", "model": "m"}


def changed(key: str, value: Any) -> dict[str, Any]:
    """The least settings with one dotted key set; the value ``...`` takes it away."""
    values = copy.deepcopy(LEAST)
    *above, last = key.split(".")
    node = values
    for part in above:
        node = node.setdefault(part, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return values


def aspects(**settings: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "guidance", "aspects": settings}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(values)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


MISTAKES: list[tuple[str, Any, str]] = [
    ("polcy", {}, "unknown key 'polcy': did you mean 'policy'?"),
    ("refine.stps", 1, "unknown key 'refine.stps': did you mean 'steps'?"),
    ("refine.optimiser", {"learning_rate": 1, "momentum": 0}, "unknown key 'refine.optimiser.mom"),
    ("teacher.min_f1", 1, "unknown key 'teacher.min_f1': known keys there: filters"),
    ("data.train.exmples", 1, "unknown key 'data.train.exmples': did you mean 'examples'?"),
    ("frozen.sorce", "x", "unknown key 'frozen.sorce': did you mean 'source'?"),
    ("policy.source", ..., "the key 'policy.source' is missing: add it"),
    ("data.train", {"kind": "file"}, "the key 'data.train.path' is missing: add it"),
    ("refine.kl", {"kind": "x"}, "'refine.kl.kind' is 'x': choose one of 'fixed', 'adaptive'"),
    ("frozen.backend", "tgi", "'frozen.backend' is 'tgi': choose one of 'transformers', 'vllm'"),
    ("teacher", {}, "'teacher' needs the key 'kind' to say which variant it is"),
    ("frozen", {"source": "x"}, "'frozen' needs the key 'backend' to say which variant it is"),
    ("refine.steps", 0, "'refine.steps' is 0: it should be greater than 0"),
    ("refine.steps", "ten", "'refine.steps' is 'ten': it should be a valid integer, unable to "),
    ("refine.advantage", {"kind": "gae", "gamma": 1.5},
     "'refine.advantage.gamma' is 1.5: it should be less than or equal to 1"),
    ("refine.loss.clip", float("nan"), "'refine.loss.clip' is nan: it should be a finite number"),
    ("policy.dtype", "float16", "'policy.dtype' is 'float16': it should be 'auto', 'float32' or"),
    ("evaluate.rows", ["cot", "x"], "'evaluate.rows.1' is 'x': it should be 'standard', 'stand"),
    ("data.context.distractors", "few", "'data.context.distractors' is 'few': it should be a valid "
     "integer, unable to parse string as an integer, or it should be 'all'"),
    ("data", [], "'data' is []: it should be a mapping of keys to values"),
    ("refine.kl", 3, "'refine.kl' is 3: it should be a mapping of keys to values"),
    ("policy.top_k", 50, "policy: 'top_k' is not offered: it would bias PPO's ratio, since the "
     "learner scores the full distribution; use 'temperature'"),
    ("policy.top_p", 0.9, "policy: 'top_p' is not offered"),
    ("frozen", ..., "frozen is not set, but rewards.kind 'guidance' needs a frozen LM to judge "
     "with: add a 'frozen' section with 'backend' and its model"),
    ("teacher", ..., "refine.start_from is 'distilled', but there is no 'teacher' to distil from: "
     "add a 'teacher' section, or set refine.start_from to 'base'"),
    ("rewards", aspects(fluncy={"source": "judge"}),
     "unknown key 'rewards.aspects.fluncy': did you mean 'fluency'?"),
    ("rewards", aspects(fluency={"source": "judge", "wieght": 1}),
     "unknown key 'rewards.aspects.fluency.wieght': did you mean 'weight'?"),
    ("rewards", aspects(fluency={"source": "off", "weight": 1}),
     "rewards.aspects.fluency: an aspect that is 'off' cannot have a weight: set weight to 0"),
    ("rewards", aspects(logicality={"source": "metrics"}),
     "rewards: aspects.logicality.source is 'metrics', but there is no honest metric of "
     "logicality: set it to 'judge' or 'off'"),
    ("rewards", aspects(consistency={"source": "metrics"}),
     "rewards: aspects.consistency.source is 'metrics', but there is no honest metric of "),
    ("rewards", {"kind": "guidance", "em_weight": 0, "f1_weight": 0},
     "rewards: all weights are 0: give em_weight, f1_weight or an aspect a weight"),
    ("refine.advantage", {"normalise": True},
     "unknown key 'refine.advantage.normalise': known keys there: critic, critic_warmup_steps, "),
    ("refine.kl", {"kind": "adaptive", "coefficent": 1},
     "unknown key 'refine.kl.coefficent': did you mean 'coefficient'?"),
    ("refine.advantage", {"kind": "a2c"},
     "'refine.advantage.kind' is 'a2c': choose one of 'gae', 'rloo', 'grpo'"),
    ("refine.advantage", {"kind": "rloo", "gamma": 1.0},
     "unknown key 'refine.advantage.gamma': known keys there: kind"),
    ("refine.advantage", {"kind": "rloo", "normalise": False},
     "unknown key 'refine.advantage.normalise': known keys there: kind"),
    ("refine.advantage", {"kind": "grpo", "critic": {"kind": "head"}},
     "unknown key 'refine.advantage.critic': known keys there: kind, normalise"),
    ("refine.advantage", {"kind": "gae", "normalise": False},
     "unknown key 'refine.advantage.normalise': known keys there: critic, critic_warmup_steps, "),
    ("refine.advantage", {"kind": "gae", "critic": {"kind": "head", "source": "x"}},
     "unknown key 'refine.advantage.critic.source': known keys there: kind, learning_rate"),
    ("refine.advantage", {"kind": "gae", "critic": {"kind": "model", "learning_rate": 0}},
     "'refine.advantage.critic.learning_rate' is 0: it should be greater than 0"),
    ("refine.advantage", {"kind": "gae", "critic": {"kind": "lstm"}},
     "'refine.advantage.critic.kind' is 'lstm': choose one of 'head', 'model'"),
    ("refine", {"advantage": {"kind": "rloo"}, "samples_per_prompt": 1},
     "refine: advantage.kind 'rloo' compares a question's rationales with each other, but "
     "samples_per_prompt is 1: set it to 2 or more, or advantage.kind to 'gae'"),
    ("refine", {"advantage": {"kind": "grpo"}, "samples_per_prompt": 1},
     "refine: advantage.kind 'grpo' compares a question's rationales with each other"),
    ("refine.kl", {"kind": "fixed", "apply_to": "both"},
     "'refine.kl.apply_to' is 'both': it should be 'reward' or 'loss'"),
    ("refine.kl", {"kind": "fixed", "target": 6},
     "unknown key 'refine.kl.target': known keys there: apply_to, coefficient, kind"),
    # What had another name before: nothing is taken for something else.
    ("refine.gamma", 1.0, "unknown key 'refine.gamma': known keys there: advantage, curriculum"),
    ("refine.lam", 0.95, "unknown key 'refine.lam': known keys there: advantage, curriculum"),
    ("refine.value_clip", 0.2, "unknown key 'refine.value_clip': "),
    ("learner.micro_batch_size", 8,
     "unknown key 'learner.micro_batch_size': known keys there: attention, "),
    ("learner.zero_stage", 4, "'learner.zero_stage' is 4: it should be 0, 1, 2 or 3"),
    ("learner.tokens_per_micro_batch", 0, "'learner.tokens_per_micro_batch' is 0: it should be gr"),
    ("learner.offload", "cpu", "'learner.offload' is 'cpu': it should be 'none', 'optimiser' or "),
    ("learner", {"offload": "optimiser", "zero_stage": 0},
     "learner: offload is 'optimiser', which needs zero_stage 1 or more, but zero_stage is 0"),
    ("learner", {"offload": "optimiser_and_parameters", "zero_stage": 2},
     "learner: offload is 'optimiser_and_parameters', which needs zero_stage 3 or more, but "
     "zero_stage is 2"),
    ("policy.lora", True, "'policy.lora' is True: it should be a mapping of keys to values"),
    ("policy.lora", {"rnk": 8}, "unknown key 'policy.lora.rnk': did you mean 'rank'?"),
    ("policy.lora", {"rank": 0}, "'policy.lora.rank' is 0: it should be greater than 0"),
    ("policy.lora", {"dropout": 0.1}, "unknown key 'policy.lora.dropout': known keys there: alpha"),
    ("policy.lora", {"target_modules": "q_proj"},
     "'policy.lora.target_modules' is 'q_proj': it should be 'all-linear', or it should be a "),
    ("actors.learner.placement", "NEAR", "'actors.learner.placement' is 'NEAR': it should be 'PA"),
    ("actors.rollout.gpus", 1.5, "actors.rollout: gpus is 1.5, but an actor has a share of one GPU "
     "or several whole ones: set it to 1 or 2"),
    ("actors.rollout.cpus", 0.00005, "actors.rollout: 5e-05 CPU is less than Ray's smallest share"),
    ("actors.rollout.resources", {"GPU": 1}, "actors.rollout: resources holds 'GPU', which is "),
    ("actors.learner.count", 0, "'actors.learner.count' is 0: it should be greater than 0"),
    ("refine", {"minibatches": 9, "prompts_per_step": 4, "samples_per_prompt": 2},
     "refine: minibatches is 9, but a step has only 8 rationales (prompts_per_step x "
     "samples_per_prompt): lower it"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_key(key: str, value: Any, sentence: str) -> None:
    assert refusal(changed(key, value)).startswith(sentence)


def test_a_frozen_teacher_needs_a_frozen_lm() -> None:
    values = {**LEAST, "teacher": {"kind": "frozen"}, "rewards": {"kind": "increasing"}}
    del values["frozen"]
    assert refusal(values) == "teacher.kind is 'frozen', but there is no 'frozen' section: add one"


def test_a_key_that_is_no_text_is_refused() -> None:
    assert refusal({**LEAST, 1: 2}).startswith("'1' is 1: Keys should be strings")  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1", "the file '{}' is not valid YAML: "),
        (b"a: *b", "the file '{}' is not valid YAML: "),
        (b"a: {b: 1, b: 2}", "the file '{}' is not valid YAML: the key 'b' is given twice"),
        (b"- 1", "the file '{}' must hold a mapping of keys to values"),
        (b"", "the file '{}' must hold a mapping of keys to values"),
        (b"a: \xff", "the file '{}' cannot be read ("),
        (None, "the file '{}' does not exist: check the path"),
    ],
)
def test_a_file_that_holds_no_settings(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(sentence.format(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
    return path


def test_overrides_replace_nested_values_and_keep_their_types(file: Path) -> None:
    overrides = [
        "seed=7",
        "refine.optimiser.learning_rate=1e-5",
        "refine.kl={kind: adaptive, target: 3}",
        "refine.kl.horizon=100",
        "evaluate.rows=[cot, standard]",
        "learner.gradient_checkpointing=true",
        "actors.address=ray://head:10001",
        "data.max_train=null",
        "policy.source=a=b",
    ]
    config = load_config(file, overrides)
    assert config.seed == 7
    assert config.refine.optimiser.learning_rate == 1e-5
    assert config.refine.kl == AdaptiveKl(kind="adaptive", target=3.0, horizon=100.0)
    assert config.evaluate.rows == ("cot", "standard")
    assert config.learner.gradient_checkpointing is True
    assert config.actors.address == "ray://head:10001"
    assert config.data.max_train is None
    assert config.policy.source == "a=b"
    assert config.data.validation == load_config(file).data.validation


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "the override 'seed' is not of the form key.sub=value"),
        ("=1", "the override '=1' is not of the form key.sub=value"),
        ("refine..steps=1", "the override 'refine..steps=1' is not of the form key.sub=value"),
        ("seed=[", "the override 'seed=[' does not hold a valid YAML value"),
        ("policy.source.name=x", "the override 'policy.source.name=x' goes below 'source', which "
         "is a plain value"),
        ("refine.stps=1", "unknown key 'refine.stps': did you mean 'steps'?"),
        ("data.train={kind: file, path: none.jsonl}", "data.train.path names 'none.jsonl', which "
         "is not a file, a folder, or a pattern that matches one: check the path"),
        ("data.validation={kind: file, path: 'none-*'}", "data.validation.path names 'none-*', "
         "which is not a file, a folder, or a pattern that matches one: check the path"),
        ("refine={steps: 1, steps: 2}", "the override 'refine={steps: 1, steps: 2}' does not hold "
         "a valid YAML value"),
        ("prompts.templates=mine.yaml", "prompts.templates names 'mine.yaml', which is not a file"),
    ],
)  # fmt: skip
def test_a_wrong_override(file: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert str(caught.value) == sentence


def test_words_and_dates_are_text_and_booleans_are_still_read(file: Path) -> None:
    config = load_config(
        file,
        [
            "rewards.aspects.fluency.source=off",
            "evaluate.during.keep_best=off",
            "learner.gradient_checkpointing=yes",
            "data.train={kind: hub, name: x, split: no, config: 2024-01-31, revision: 0123456}",
        ],
    )
    assert isinstance(config.rewards, GuidanceRewards)
    assert config.rewards.aspects["fluency"].source == "off"
    assert config.evaluate.during.keep_best is False
    assert config.learner.gradient_checkpointing is True
    assert config.data.train == HubData(
        kind="hub", name="x", split="no", config="2024-01-31", revision="0123456"
    )
    assert parse_config(parse_yaml(dump_config(config))) == config


TEXTS = st.text("0123456789.eE+-_:xoyn~<=", min_size=1)


@given(TEXTS | st.sampled_from(["off", "No", "true", "null", "~", "1945-05-08", "12:30", "1e5"]))
def test_any_text_survives_a_dump(text: str) -> None:
    config = parse_config(changed("serve.name", text))
    assert parse_config(parse_yaml(dump_config(config))) == config


@pytest.mark.parametrize("path", ["q.jsonl", "", "q*", "**/q.jsonl"])
def test_a_tilde_is_the_home_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    home = tmp_path / "home"
    (home / "set").mkdir(parents=True)
    (home / "set" / "q.jsonl").write_text("{}")
    (home / "mine.yaml").write_text("")
    monkeypatch.setenv("HOME", str(home))
    overrides = [
        f"data.train={{kind: file, path: '~/set/{path}'}}",
        "prompts.templates=~/mine.yaml",
    ]
    load_config(file, overrides)
    (home / "set" / "q.jsonl").unlink()
    (home / "set").rmdir()
    with pytest.raises(UserError, match=r"data.train.path names '~/set/.*which is not a file"):
        load_config(file, overrides)


def every_settings_class() -> list[type[BaseModel]]:
    found: dict[type[BaseModel], None] = {}

    def walk(annotation: Any) -> None:
        is_settings = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_settings and annotation not in found:
            found[annotation] = None
            for info in annotation.model_fields.values():
                walk(info.annotation)
        for argument in get_args(annotation):
            walk(argument)

    walk(Config)
    return list(found)


@pytest.mark.parametrize("settings", every_settings_class())
def test_every_setting_is_documented(settings: type[BaseModel]) -> None:
    assert settings.__doc__
    tags = {"kind", "backend"}  # what a tag means, the class says
    bare = [n for n, info in settings.model_fields.items() if not info.description]
    assert not set(bare) - tags


def test_the_walk_finds_nested_and_tagged_settings() -> None:
    names = {settings.__name__ for settings in every_settings_class()}
    assert {"Config", "HubData", "AspectSettings", "AdaptiveKl", "ComputingRole"} <= names


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_with_lmcot_load_and_survive_a_dump(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_a_dump_holds_every_default() -> None:
    config = parse_config(LEAST)
    dumped = yaml.safe_load(dump_config(config))
    assert dumped["refine"]["optimiser"]["eps"] == 1e-5
    assert set(dumped["rewards"]["aspects"]) == set(ASPECTS)
    assert parse_config(dumped) == config


MORE = {
    "an endpoint": {**LEAST, "frozen": ENDPOINT},
    "other variants": {
        **LEAST,
        "policy": {"source": "random:llama", "lora": {"rank": 4}},
        "data": {
            "train": {"kind": "hub", "name": "x", "split": "train"},
            "validation": {"kind": "sample", "split": "train"},
        },
        "teacher": {"kind": "frozen", "min_f1": 0.5},
    },
    "the toy": {**LEAST, "rewards": {"kind": "increasing"}},
    "no aspects": {**LEAST, "rewards": {"aspects": {}}},
}


@pytest.mark.parametrize("values", [LEAST, *MORE.values()], ids=["the least", *MORE])
def test_to_name_any_key_with_its_value_changes_nothing(values: dict[str, Any]) -> None:
    config = parse_config(values)
    for key, value in flat_settings(config).items():
        named = copy.deepcopy(values)
        *above, last = key.split(".")
        node = named
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
        assert parse_config(named).resolved() == config.resolved(), key


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("refine.optimiser.learning_rate", 1e-5, {"refine.optimiser.eps": 1e-5}),
        ("refine.optimiser.warmup_steps", 3,
         {"refine.optimiser.learning_rate": 1e-6, "refine.optimiser.eps": 1e-5}),
        ("distill.optimiser.warmup_steps", 5,
         {"distill.optimiser.learning_rate": 3e-5, "distill.optimiser.eps": 1e-8}),
        ("refine.kl.coefficient", 0.5, {"refine.kl.kind": "fixed"}),
        ("refine.advantage.gamma", 0.9,
         {"refine.advantage.kind": "gae", "refine.advantage.critic.kind": "head"}),
        ("refine.advantage.critic.learning_rate", 0.1,
         {"refine.advantage.kind": "gae", "refine.advantage.critic.kind": "head"}),
        ("serve.ingress.replicas", 2, {}),
        ("rewards.em_weight", 2, {"rewards.kind": "guidance", "rewards.f1_weight": 0.5}),
        ("rewards.aspects.relevance.weight", 0.5,
         {"rewards.aspects.relevance.source": "metrics",
          "rewards.aspects.logicality.source": "judge",
          "rewards.aspects.fluency.source": "metrics"}),
        ("rewards.aspects.logicality.weight", 0.5,
         {"rewards.aspects.logicality.source": "judge"}),
        ("monitor.alarms.kl_above", 3.0, {"monitor.alarms.entropy_below": 0.02}),
    ],
)  # fmt: skip
def test_a_named_key_leaves_its_sections_other_defaults(
    key: str, value: Any, kept: dict[str, Any]
) -> None:
    before, after = parse_config(LEAST), parse_config(changed(key, value))
    assert {key: flat_settings(after)[key] for key in kept} == kept
    assert list(differences(before, after)) == [key]


def test_another_variant_gets_none_of_the_defaults_keys() -> None:
    config = parse_config(changed("refine.advantage.kind", "rloo"))
    assert config.refine.advantage == Rloo(kind="rloo")
    assert parse_config(changed("refine.kl.kind", "adaptive")).refine.kl == AdaptiveKl(
        kind="adaptive"
    )


def test_a_program_may_read_off_as_yaml_1_1_does() -> None:
    values = changed("rewards.aspects", yaml.safe_load("{fluency: {source: off}}"))
    assert parse_config(values) == parse_config(
        changed("rewards.aspects.fluency", {"source": "off"})
    )


def test_one_aspect_leaves_the_others_and_none_is_none() -> None:
    one = parse_config(changed("rewards.aspects.fluency", {"source": "off"})).rewards
    none = parse_config(changed("rewards.aspects", {})).rewards
    assert isinstance(one, GuidanceRewards)
    assert isinstance(none, GuidanceRewards)
    assert set(one.aspects) == set(ASPECTS)
    assert [name for name, aspect in one.aspects.items() if aspect.source == "off"] == ["fluency"]
    assert none.aspects == {}


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(LEAST).seed = 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "gae"}, Gae()),
        ({"kind": "gae", "critic": {"kind": "head"}}, Gae(critic=HeadCritic())),
        (
            {"kind": "gae", "lam": 1.0, "critic": {"kind": "model", "source": "random:llama"}},
            Gae(lam=1.0, critic=ModelCritic(kind="model", source="random:llama")),
        ),
        ({"kind": "rloo"}, Rloo(kind="rloo")),
        ({"kind": "grpo"}, Grpo(kind="grpo", normalise=True)),
        ({"kind": "grpo", "normalise": False}, Grpo(kind="grpo", normalise=False)),
    ],
)
def test_every_advantage_is_read_and_survives_a_dump(
    values: dict[str, Any], expected: Gae | Rloo | Grpo
) -> None:
    config = parse_config(changed("refine.advantage", values))
    assert config.refine.advantage == expected
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_the_papers_ppo_is_what_comes_unasked() -> None:
    """GAE with a head on the policy's own trunk, k1 in the reward, all weights trained."""
    config = parse_config(LEAST)
    assert config.refine.advantage == Gae(
        kind="gae", gamma=1.0, lam=0.95, critic=HeadCritic(kind="head", learning_rate=None)
    )
    assert config.refine.kl == FixedKl(kind="fixed", apply_to="reward")
    assert config.policy.lora is None


def test_one_rationale_a_question_is_enough_for_a_critic() -> None:
    config = parse_config(
        changed("refine", {"samples_per_prompt": 1, "advantage": {"kind": "gae"}})
    )
    assert config.refine.samples_per_prompt == 1


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
@pytest.mark.parametrize("place", ["reward", "loss"])
def test_either_kl_goes_into_reward_or_loss(kind: str, place: str) -> None:
    config = parse_config(changed("refine.kl", {"kind": kind, "apply_to": place}))
    assert (config.refine.kl.kind, config.refine.kl.apply_to) == (kind, place)


@pytest.mark.parametrize(
    ("offload", "stages"),
    [("none", (0, 1, 2, 3)), ("optimiser", (1, 2, 3)), ("optimiser_and_parameters", (3,))],
)
def test_what_can_be_offloaded_depends_on_the_stage(offload: str, stages: tuple[int, ...]) -> None:
    for stage in range(4):
        values = changed("learner", {"zero_stage": stage, "offload": offload})
        if stage in stages:
            assert parse_config(values).learner.offload == offload
        else:
            assert refusal(values).startswith(f"learner: offload is '{offload}', which needs")


def test_lora_is_read_and_survives_a_dump() -> None:
    config = parse_config(changed("policy.lora", {}))
    assert config.policy.lora == LoraSettings(rank=16, alpha=32, target_modules="all-linear")
    config = parse_config(
        changed("policy.lora", {"rank": 4, "target_modules": ["q_proj", "v_proj"]})
    )
    assert config.policy.lora is not None
    assert config.policy.lora.target_modules == ("q_proj", "v_proj")
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_vllm_has_room_for_adapters_up_to_a_rank() -> None:
    vllm = {**LEAST, "rollout": {"engine": "vllm"}}
    policy = {**LEAST["policy"], "lora": {"rank": 512}}
    assert parse_config({**vllm, "policy": policy}).policy.lora is not None
    policy["lora"] = {"rank": 513}
    assert parse_config({**LEAST, "policy": policy}).policy.lora is not None
    with pytest.raises(UserError, match=r"policy.lora.rank is 513, but vLLM takes .* 512 or lower"):
        parse_config({**vllm, "policy": policy})


def test_vllm_divides_a_model_among_the_gpus_that_its_actor_has() -> None:
    """A share of a GPU counts as one; without GPUs there are processes only."""

    def parse(parallel: int, gpus: float) -> Config:
        rollout = {"engine": "vllm", "tensor_parallel": parallel}
        return parse_config({**LEAST, "rollout": rollout, "actors": {"rollout": {"gpus": gpus}}})

    for parallel, gpus in ((1, 0.5), (1, 1), (2, 2), (2, 0)):
        assert parse(parallel, gpus).rollout.engine == "vllm"
    for parallel, gpus in ((1, 2), (2, 1), (2, 0.5), (4, 2)):
        said = rf"rollout.tensor_parallel is {parallel}, but actors.rollout.gpus is {gpus:g}: set"
        with pytest.raises(UserError, match=said):
            parse(parallel, gpus)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actors.rollout.count": 2}, "there are 2 rollout actors and 1 learners"),
        ({"actors.rollout.gpus": 0.6, "actors.learner.gpus": 0.6}, "not shares of one GPU"),
        ({"actors.rollout.gpus": 0.6}, "rollout.gpus is 0.6 and learner.gpus 0, not shares"),
        ({"refine.max_staleness": 1}, "refine.max_staleness is above 0"),
        ({"evaluate.during.every": 5}, "evaluate.during.every is above 0"),
    ],
)
def test_who_shares_a_gpu_takes_turns(changes: dict[str, Any], said: str) -> None:
    def parse(**given: Any) -> Config:
        values = copy.deepcopy(LEAST)
        for key, value in {"actors.colocate": True, **given}.items():
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        return parse_config(values)

    assert parse(**{"actors.rollout.gpus": 0.4, "actors.learner.gpus": 0.6}).actors.colocate
    with pytest.raises(UserError, match=f"actors.colocate is set, but .*{said}.*: change that"):
        parse(**changes)


def test_differences_tell_both_values() -> None:
    before = parse_config(LEAST)
    values = changed("refine.steps", 7)
    values["policy"]["lora"] = {"rank": 4}
    values["seed"] = 3
    found = differences(before, parse_config(values))
    assert found == {
        "policy.lora.alpha": (None, 32),
        "policy.lora.rank": (None, 4),
        "policy.lora.target_modules": (None, "all-linear"),
        "refine.steps": (100, 7),
        "seed": (0, 3),
    }
    assert list(found) == sorted(found)
    assert differences(before, before) == {}


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("seed", 1, ["seed"]),
        ("policy.max_new_tokens", 7, ["policy.max_new_tokens"]),
        ("policy.lora", {"rank": 4}, ["policy.lora"]),
        ("data.train.examples", 9, ["data.train.examples"]),
        ("data.validation.examples", 9, []),
        ("distill.epochs", 9, []),
        ("serve.port", 9, []),
        ("rewards", aspects(), [f"rewards.aspects.{a}." for a in sorted(ASPECTS)]),
        ("refine.kl", {"kind": "adaptive"}, ["refine.kl.horizon", "kind", "refine.kl.target"]),
        ("refine.kl", {"kind": "fixed", "apply_to": "loss"}, ["refine.kl.apply_to"]),
        ("refine.advantage", {"kind": "gae", "lam": 1.0}, ["refine.advantage.lam"]),
        ("refine.advantage", {"kind": "rloo"}, ["refine.advantage."]),
        ("refine.samples_per_prompt", 2, ["refine.samples_per_prompt"]),
        ("learner.zero_stage", 1, ["learner.zero_stage"]),
        ("learner.offload", "optimiser", ["learner.offload"]),
        ("refine.steps", 7, []),
        ("failures.max_data_share", 0.1, []),
        ("frozen.budget.max_requests", 7, []),
        ("actors.rollout.count", 7, []),
        ("actors.learner", {"placement": "SPREAD"}, []),
        ("checkpoints", {"every": 1, "keep": 9}, []),
        ("evaluate.rows", ["cot"], []),
        ("learner.tokens_per_micro_batch", 1, []),
        ("learner.share_prompts", False, []),
        ("learner.gradient_checkpointing", True, []),
        ("learner.offload_reference", True, []),
        ("learner.max_skipped_updates", 0, []),
    ],
)
def test_what_a_begun_refinement_depends_on_is_named(
    key: str, value: Any, names: list[str]
) -> None:
    before, after = parse_config(LEAST), parse_config(changed(key, value))
    found = differences(before, after)
    assert found, "else the test would show nothing"
    assert differences(after, before) == {key: (new, old) for key, (old, new) in found.items()}
    fixed = [key for key in found if depends("refine", key, before)]
    if not names:
        assert fixed == []
    assert all(any(name in key for key in fixed) for name in names)
    assert all(any(name in key for name in names) for key in fixed)


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("refine.samples_per_prompt", {"refine"}),
        ("rewards.f1_weight", {"reject", "refine"}),
        ("prompts.frozen_reads", {"reject", "refine"}),
        ("prompts.conclusion", {"reject", "refine", "evaluate"}),
        ("policy.temperature", {"reject", "refine", "evaluate"}),
        ("policy.max_new_tokens", {"annotate", "distill", "reject", "refine", "evaluate"}),
        ("policy.lora.rank", {"distill", "reject", "refine", "evaluate"}),
        ("distill.optimiser.eps", {"distill"}),
        ("prompts.demonstrations", {"distill", "reject", "refine", "evaluate"}),
        ("frozen.model", {"reject", "refine", "evaluate"}),
        ("data.max_train", {"annotate", "distill", "reject", "refine"}),
        ("data.max_validation", set()),
        ("teacher.kind", {"annotate", "distill", "reject"}),
        ("learner.zero_stage", {"distill", "reject", "refine"}),
        ("reject.samples", {"reject"}),
        ("reject.rounds", set()),
        ("frozen.concurrency", set()),
        ("refine.steps", set()),
        ("actors.learner.count", set()),
        # Those that only begin like a free one.
        ("refine.steps_more", {"refine"}),
        ("refine", {"refine"}),
    ],
)
def test_each_stage_depends_on_its_own_settings(key: str, stages: set[str]) -> None:
    config = parse_config(LEAST)
    every = ("annotate", *(stage.name for stage in TRAINING_STAGES), "evaluate")
    found = {stage for stage in every if depends(stage, key, config)}
    assert found == stages
    assert depends("sweep", key, config) == (
        key not in NO_STAGE_DEPENDS_ON and bool(stages or key == "data.max_validation")
    )


def test_what_a_frozen_teacher_says_depends_on_the_frozen_lm_and_its_prompts() -> None:
    facts = parse_config({**LEAST, "teacher": {"kind": "supporting_facts"}})
    frozen = parse_config({**LEAST, "teacher": {"kind": "frozen"}})
    for key in ("frozen.source", "prompts.templates"):
        assert not depends("annotate", key, facts)
        assert depends("annotate", key, frozen)
    assert depends("distill", "frozen.source", frozen)
    assert not depends("distill", "frozen.source", facts)


def test_a_finished_distillation_leaves_the_learner_free() -> None:
    config = parse_config(LEAST)
    assert depends("distill", "learner.zero_stage", config)
    assert not depends("distill", "learner.zero_stage", config, finished=True)
    assert depends("distill", "distill.epochs", config, finished=True)


def test_evaluating_meanwhile_makes_refinement_depend_on_the_questions() -> None:
    config = parse_config({**LEAST, "evaluate": {"during": {"every": 1}}})
    assert depends("refine", "data.max_validation", config)


def test_the_keys_that_no_stage_depends_on_exist() -> None:
    local = parse_config(LEAST).model_dump()
    endpoint = parse_config({**LEAST, "frozen": ENDPOINT}).model_dump()
    stages = {"distill": {"validation": {"share": 0.1}}, "reject": {}}
    optional = parse_config({**LEAST, **stages}).model_dump()
    frozen = {"backend": "vllm", "source": "random:llama"}
    vllm = parse_config({**LEAST, "rollout": {"engine": "vllm"}, "frozen": frozen}).model_dump()
    for key in NO_STAGE_DEPENDS_ON:
        assert any(_has(values, key) for values in (local, endpoint, optional, vllm)), key


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def sources(config: Config) -> dict[str, str]:
    rewards = config.resolved().rewards
    assert isinstance(rewards, GuidanceRewards)
    return {name: one.source for name, one in rewards.aspects.items()}


def test_an_endpoint_measures_no_fluency_unless_asked_to() -> None:
    config, local = parse_config({**LEAST, "frozen": ENDPOINT}), parse_config(LEAST)
    assert sources(local)["fluency"] == "metrics"
    assert sources(config) == {**sources(local), "fluency": "off"}
    completions = {**ENDPOINT, "api": "completions"}
    assert sources(parse_config({**LEAST, "frozen": completions})) == sources(local)


def test_settings_as_dumped_behave_with_another_frozen_lm_as_the_file_does() -> None:
    """What depends on the frozen LM is decided where it is used, not where settings are read."""
    config = parse_config({**LEAST, "frozen": ENDPOINT})
    dumped = yaml.safe_load(dump_config(config))
    assert parse_config(dumped) == config
    assert parse_config({**dumped, "frozen": LEAST["frozen"]}) == parse_config(LEAST)


@pytest.mark.parametrize("frozen", [LEAST["frozen"], ENDPOINT], ids=["local", "endpoint"])
def test_a_named_source_does_not_differ_from_the_automatic_one(frozen: dict[str, Any]) -> None:
    """Runs of before have the sources of their aspects by name."""
    config = parse_config({**LEAST, "frozen": frozen})
    named = parse_config(yaml.safe_load(dump_config(config.resolved())))
    assert named != config
    assert differences(named, config) == {}


def test_an_endpoint_keeps_the_other_rewards() -> None:
    config = parse_config(
        {**LEAST, "frozen": ENDPOINT, "rewards": {"kind": "guidance", "em_weight": 2.0}}
    ).resolved()
    assert isinstance(config.rewards, GuidanceRewards)
    assert config.rewards.em_weight == 2.0
    assert config.rewards.aspects["fluency"].source == "off"


def _guidance(**values: Any) -> dict[str, Any]:
    return {"kind": "guidance", **values}


def test_an_endpoint_cannot_measure_fluency() -> None:
    rewards = aspects(fluency={"source": "metrics"})
    assert refusal({**LEAST, "frozen": ENDPOINT, "rewards": rewards}) == (
        "rewards.aspects.fluency.source is 'metrics', but frozen.backend 'openai' with api 'chat' "
        "gives no log-likelihoods to measure it by: set it to 'judge' or 'off'"
    )
    weighed = aspects(fluency={"weight": 0.5})
    assert refusal({**LEAST, "frozen": ENDPOINT, "rewards": weighed}) == (
        "rewards.aspects.fluency.weight is 0.5, but frozen.backend 'openai' with api 'chat' gives "
        "no log-likelihoods to measure it by: set rewards.aspects.fluency.source to 'judge', or "
        "the weight to 0"
    )
    completions = {**ENDPOINT, "api": "completions"}
    parse_config({**LEAST, "frozen": completions, "rewards": weighed})
    parse_config({**LEAST, "frozen": completions, "rewards": rewards})
    parse_config({**LEAST, "frozen": completions, "rewards": _guidance(likelihood_gain_weight=0.5)})
    assert refusal(
        {**LEAST, "frozen": ENDPOINT, "rewards": _guidance(likelihood_gain_weight=0)}
    ) == (
        "rewards.likelihood_gain_weight is set, but frozen.backend 'openai' with api 'chat' gives "
        "no log-likelihoods to measure it by: leave it out"
    )


def test_an_endpoint_gives_up_before_its_unit_does() -> None:
    slow = {**ENDPOINT, "total_timeout_s": 500}
    assert "three quarters of actors.unit_timeout_s" in refusal({**LEAST, "frozen": slow})
    parse_config({**LEAST, "frozen": slow, "actors": {"unit_timeout_s": 700}})


@pytest.mark.parametrize("name", ["reward", "module:", "a b:c", "module:one.two", ":f"])
def test_a_custom_reward_is_named_in_full(name: str) -> None:
    assert "not of the form module:function" in refusal(
        {**LEAST, "rewards": _guidance(custom=name)}
    )


def test_a_custom_reward_can_be_the_only_one() -> None:
    rewards = _guidance(em_weight=0, f1_weight=0, custom="my.rewards:brevity")
    parse_config({**LEAST, "rewards": rewards})
    assert "all weights are 0" in refusal({**LEAST, "rewards": {**rewards, "custom_weight": 0}})


def test_custom_rewards_have_names_and_weights(tmp_path: Path) -> None:
    custom = {name: {"function": f"my.rewards:{name}"} for name in ("brevity", "style")}
    several = _guidance(em_weight=0, f1_weight=0, custom=custom)
    config = parse_config({**LEAST, "rewards": several})
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**LEAST, "rewards": several}))
    rewards = load_config(file, ["rewards.custom.style.weight=0.25"]).rewards
    assert isinstance(rewards, GuidanceRewards)
    weights = {name: one.weight for name, one in rewards.custom_rewards.items()}
    assert weights == {"custom/brevity": 1.0, "custom/style": 0.25}


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ({"custom": {"a": {"function": "b"}}}, "custom is 'b', which is not of the form"),
        ({"custom": {"a": {"functoin": "b:c"}}},
         "unknown key 'rewards.custom.a.functoin': did you mean 'function'?"),
        ({"custom": {"a": {"weight": 1}}}, "the key 'rewards.custom.a.function' is missing"),
        ({"custom": {"a/b": {"function": "b:c"}}}, "'a/b'"),
        ({"custom": 3}, "'rewards.custom' is 3: it should be"),
        ({"custom": {"a": {"function": "b:c"}}, "custom_weight": 0.5},
         "custom_weight is for a single custom reward, but custom names several"),
        ({"custom": {"a": {"function": "b:c", "weight": 0}}, "em_weight": 0, "f1_weight": 0},
         "all weights are 0"),
    ],
)  # fmt: skip
def test_custom_rewards_that_are_wrong_are_named(rewards: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal({**LEAST, "rewards": _guidance(**rewards)})


def test_learned_aspects_need_their_model() -> None:
    rewards = aspects(factuality={"source": "learned", "weight": 1.0})
    assert "learned_model is not set" in refusal({**LEAST, "rewards": rewards})
    parse_config({**LEAST, "rewards": {**rewards, "learned_model": "aspects.json"}})


@pytest.mark.parametrize("source", ["judge", "off"])
def test_an_endpoint_judges_fluency_or_leaves_it(source: str) -> None:
    rewards = aspects(fluency={"source": source})
    config = parse_config({**LEAST, "frozen": ENDPOINT, "rewards": rewards})
    assert isinstance(config.rewards, GuidanceRewards)
    assert config.rewards.aspects["fluency"] == AspectSettings(source=source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://x/v1", "", "http://", "http://x:1x/v1", "http://[x/v1",
        "http://me:pw@x/v1", "http://x/v1?api_key=pw", "http://x/v1#pw", "me:pw@x/v1",
        "http://x/v1/chat/completions", "http://x /v1", 7,
    ],
)  # fmt: skip
def test_an_endpoints_address_holds_nothing_else(url: Any) -> None:
    told = refusal({**LEAST, "frozen": {**ENDPOINT, "base_url": url}})
    assert told.startswith("frozen.base_url: ")
    assert "pw" not in told


@pytest.mark.parametrize(
    "key",
    [
        "sk-PASTED-h3-KEY", "gsk_8Zq2xWvT5uYbN1cR7", "AIzaSyD4iE2xVSpkLLOXoyqT", "hf_AbCdEfGh",
        "3f9a7c1e5b2d4f60", "a3f9c2e17b4d5f608192", "AKIAIOSFODNN7EXAMPLE", "", "MY KEY", 17,
    ],
)  # fmt: skip
def test_a_key_in_the_place_of_its_variables_name_is_refused(key: Any) -> None:
    told = refusal({**LEAST, "frozen": {**ENDPOINT, "api_key_env": key}})
    assert "frozen.api_key_env must be the name of an environment variable" in told.replace(
        "frozen.api_key_env: api_key_env", "frozen.api_key_env"
    )
    assert not key or str(key) not in told


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "KEY2", "my_key", "AZURE_OPENAI_API_KEY_2"])
def test_names_of_variables(name: str) -> None:
    frozen = parse_config({**LEAST, "frozen": {**ENDPOINT, "api_key_env": name}}).frozen
    assert isinstance(frozen, OpenAIFrozen)
    assert frozen.api_key_env == name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"headers": {"api-key": "pw"}}, "the header 'api-key' looks like a secret"),
        ({"headers": {"Authorization": "Bearer pw"}}, "the header 'Authorization' looks like a"),
        ({"headers": {"X-Auth-Token": "pw ${A}"}}, "the header 'X-Auth-Token' looks like a secret"),
        ({"headers": {"x": "${pw"}}, "the header 'x' holds '${' without"),
        ({"headers": {"x": "pw\n"}}, "that HTTP does not allow"),
        ({"headers": {"Host": "pw"}}, "the header 'Host', which lmcot sets itself"),
        ({"headers": "pw"}, "frozen.headers"),
        ({"headers": {"x": ["pw"]}}, "frozen.headers.x"),
        ({"query": {"api_key": "pw"}}, "the key 'api_key' looks like a secret"),
        ({"extra_body": {"a": {"password": "pw"}}}, "the key 'password' looks like a secret"),
        ({"extra_body": {"temperature": 1}}, "'temperature', which lmcot sets itself"),
        ({"extra_body": ["pw"]}, "frozen.extra_body"),
        ({"rename_parameters": {"n": "pw"}}, "frozen.rename_parameters"),
        ({"drop_parameters": ["max_tokens"]}, "frozen.drop_parameters"),
    ],
)
def test_secrets_are_not_repeated(values: dict[str, Any], said: str) -> None:
    told = refusal({**LEAST, "frozen": {**ENDPOINT, **values}})
    assert said in told.replace("holds 'Host'", "the header 'Host'")
    assert "pw" not in told


def test_headers_name_secrets_by_their_variables() -> None:
    headers = {"api-key": "${AZURE_KEY}", "Authorization": "Bearer ${MY_KEY}", "X-Title": "lmcot"}
    given = {**ENDPOINT, "headers": headers, "query": {"api-version": "2024-10-21"}}
    config = parse_config({**LEAST, "frozen": given})
    assert isinstance(config.frozen, OpenAIFrozen)
    assert config.frozen.headers == headers
    assert parse_config(yaml.safe_load(dump_config(config))) == config
