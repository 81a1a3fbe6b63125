from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lmcot.config import ASPECTS, Aspect, PromptSettings, SampleData
from lmcot.data import encode, load_examples, load_templates, render, render_context
from lmcot.data.render import parted, render_plain
from lmcot.errors import UserError
from lmcot.frozen.templates import open_templates
from lmcot.records import Example, Message, Paragraph, Prompt

DEFAULT = load_templates("default")
EXAMPLE = Example(
    "x", "Who wrote {answer}?", "Ann", (Paragraph("Title {0}", ("Ann wrote {rationale}.",)),)
)
CONTEXT = "Title {0}: Ann wrote {rationale}."


def test_rationale_prompt() -> None:
    system, user = DEFAULT.rationale(EXAMPLE)
    assert system.role == "system"
    assert "So the answer is" in system.content
    assert user == Message("user", f"{CONTEXT}\n\nQuestion: Who wrote {{answer}}?\nReasoning:")


def test_standard_prompt_without_demonstrations() -> None:
    _, user = DEFAULT.standard(EXAMPLE)
    assert (
        user.content
        == f"Context:\n{CONTEXT}\n\nQuestion: Who wrote {{answer}}?\nThe answer in a few words:"
    )


def test_guided_prompt_does_not_read_the_rationale_as_a_template() -> None:
    rationale = "{question} {0} {} {context} {{x}} \\1 \\g<0> %s $x"
    user = DEFAULT.showing(1).guided(EXAMPLE, rationale)[-1]
    assert user.content == (
        f"Context:\n{CONTEXT}\n\nQuestion: Who wrote {{answer}}?\n"
        f"A student's reasoning: {rationale}\nThe answer in a few words:"
    )


def test_the_prompt_without_the_context_holds_nothing_of_it() -> None:
    """Demonstrations neither: their form is that of the question."""
    shown = DEFAULT.showing(2)
    prompt = shown.guided(EXAMPLE, "Because {context}.", "rationale_only")
    assert prompt[-1].content == (
        "Question: Who wrote {answer}?\nA student's reasoning: Because {context}.\n"
        "The answer in a few words:"
    )
    assert [one.role for one in prompt] == [one.role for one in shown.guided(EXAMPLE, "")]
    assert not any("Context:" in one.content or CONTEXT in one.content for one in prompt)
    first = DEFAULT.file.demonstrations[0]
    assert prompt[1].content.startswith(f"Question: {first.question}\n")
    assert (first.rationale in prompt[1].content, prompt[2].content) == (True, first.answer)


@pytest.mark.parametrize("name", ["default", "base"])
def test_a_file_without_the_prompt_without_context_takes_it_from_the_guided_one(
    tmp_path: Path, name: str
) -> None:
    """Files of earlier versions are read, and come to the wording of those that ship."""
    shipped = load_templates(name)
    values = shipped.file.model_dump(mode="json")
    for later in ("rationale_only", "advice", "advised"):
        del values[later]
    old = load_templates(written(tmp_path, values))
    text, own = (one.file.for_frozen("rationale_only") for one in (old, shipped))
    assert (text.user, text.assistant) == (own.user, own.assistant)
    before, after = (json.loads(one.file.as_text(rationale_only=False)) for one in (old, shipped))
    assert before == after == values, "what was made with the old file is not made again"
    assert "rationale_only" in json.loads(shipped.file.as_text(rationale_only=True))


SHIPPED = ("base", "boolean", "closed_book", "counting", "default", "free_text", "multiple_choice",
           "numeric")  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_advice_shows_both_models_the_first_answer(name: str) -> None:
    settings = PromptSettings(templates=name, guidance="advice", demonstrations=0)
    templates = open_templates(settings)
    answered = replace(EXAMPLE, first_answer="Bob {rationale}")
    small = templates.rationale(answered)[-1].content
    large = templates.guided(answered, "No, {answer}.")[-1].content
    alone = templates.guided(answered, "No, {answer}.", "rationale_only")[-1].content
    assert all("Bob {rationale}" in text for text in (small, large, alone))
    assert all("No, {answer}." in text for text in (large, alone))
    assert (
        "Bob" not in templates.standard(answered)[-1].content + templates.cot(answered)[0].content
    )
    assert CONTEXT not in alone
    plain = replace(templates, advises=False)
    assert plain.rationale(answered) == plain.rationale(EXAMPLE)
    assert plain.guided(answered, "x") == plain.guided(EXAMPLE, "x")


def test_without_a_first_answer_its_paragraph_goes_also_in_demonstrations() -> None:
    templates = open_templates(PromptSettings(guidance="advice", demonstrations=1))
    assert "First answer" not in templates.rationale(EXAMPLE)[-1].content
    shown = templates.guided(replace(EXAMPLE, first_answer="Bob"), "No.")
    first = DEFAULT.file.demonstrations[0]
    assert ["First answer" in one.content for one in shown] == [False, False, False, True]
    assert f"A student's advice: {first.rationale}" in shown[1].content
    assert shown[2] == Message("assistant", first.answer)


def test_advice_needs_templates_of_its_own(tmp_path: Path, values: dict[str, Any]) -> None:
    del values["advised"]
    path = written(tmp_path, values)
    assert open_templates(PromptSettings(templates=path)).file.advised is None
    with pytest.raises(UserError, match="lack the key 'advised': add it"):
        open_templates(PromptSettings(templates=path, guidance="advice"))


def test_a_context_beside_other_fields_goes_alone(tmp_path: Path, values: dict[str, Any]) -> None:
    values["rationale_only"] = None
    values["guided"]["user"] = "Read {context}: {question}\n\nThink: {rationale}"
    own = load_templates(written(tmp_path, values)).file.for_frozen("rationale_only")
    assert own.user == "Read : {question}\n\nThink: {rationale}"


def test_demonstrations_alternate_and_come_before_the_question() -> None:
    for prompt in (
        DEFAULT.showing(2).standard(EXAMPLE),
        DEFAULT.showing(2).cot(EXAMPLE),
        DEFAULT.showing(2).guided(EXAMPLE, "Because."),
    ):
        assert [m.role for m in prompt] == [
            "system", "user", "assistant", "user", "assistant", "user",
        ]  # fmt: skip
    first = DEFAULT.file.demonstrations[0]
    assert DEFAULT.showing(1).standard(EXAMPLE)[2].content == first.answer
    assert DEFAULT.showing(1).cot(EXAMPLE)[2].content == first.rationale
    guided = DEFAULT.showing(1).guided(EXAMPLE, "Because.")
    assert first.rationale in guided[1].content
    assert guided[2].content == first.answer


def test_the_conclusion_of_rationales_may_be_hidden_from_the_frozen_lm() -> None:
    hidden, shown = (
        open_templates(PromptSettings(conclusion=conclusion, demonstrations=1))
        for conclusion in ("hidden", "shown")
    )
    first = DEFAULT.file.demonstrations[0]
    facts, conclusion = first.rationale.removesuffix(" So the answer is no."), "So the answer is"
    assert facts != first.rationale
    for kind in ("guided", "rationale_only"):
        prompt = hidden.guided(EXAMPLE, "It is late. So the answer is two.", kind)
        assert not any(conclusion in one.content for one in prompt)
        assert facts in prompt[1].content
        assert prompt[2].content == first.answer
        assert "reasoning: It is late.\n" in prompt[-1].content
        assert prompt == shown.guided(EXAMPLE, "It is late.", kind)[:1] + prompt[1:], "one system"
    # Who reasons itself concludes itself, and the small LM is asked as ever.
    assert hidden.cot(EXAMPLE) == shown.cot(EXAMPLE)
    assert hidden.standard(EXAMPLE) == shown.standard(EXAMPLE)
    assert hidden.rationale(EXAMPLE) == shown.rationale(EXAMPLE)


def test_more_demonstrations_than_there_are() -> None:
    with pytest.raises(UserError, match=r"prompts.demonstrations is 5, but .*'default' hold 4"):
        DEFAULT.showing(5)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_every_aspect_has_its_own_question(aspect: Aspect) -> None:
    system, user = DEFAULT.judge(EXAMPLE, "Because {criterion}.", aspect)
    assert "yes or no" in system.content
    assert user.content.endswith(f"Because {{criterion}}.\n\n{ASPECTS[aspect].question}")
    assert user.content.endswith("?")
    assert len({spec.question for spec in ASPECTS.values()}) == len(ASPECTS)


def test_templates_may_ask_another_question_about_an_aspect(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    values["judge"]["aspects"] = {"fluency": "Is it German?"}
    templates = load_templates(written(tmp_path, values))
    assert templates.judge(EXAMPLE, "So.", "fluency")[-1].content.endswith("\n\nIs it German?")
    assert (
        templates.judge(EXAMPLE, "So.", "relevance")[-1]
        == DEFAULT.judge(EXAMPLE, "So.", "relevance")[-1]
    )


def test_the_default_demonstrations() -> None:
    demonstrations = DEFAULT.file.demonstrations
    assert 3 <= len(demonstrations) <= 4
    assert any(d.answer in ("yes", "no") for d in demonstrations)
    for d in demonstrations:
        assert d.rationale.endswith(f" So the answer is {d.answer}.")
        facts = d.rationale.removesuffix(f" So the answer is {d.answer}.")
        assert facts == " ".join(s for p in d.context for s in p.sentences)
        assert sum(len(f"{p.title} {' '.join(p.sentences)}".split()) for p in d.context) <= 30


def test_the_default_wording_is_short() -> None:
    for kind in ("rationale", "standard", "cot", "guided", "rationale_only", "judge"):
        assert len(getattr(DEFAULT.file, kind).system.split()) <= 16


def test_no_context_leaves_no_gap() -> None:
    toy = Example("counting-1", "Write increasing numbers from 1.", "", ())
    assert DEFAULT.rationale(toy)[1].content.startswith("Question: Write")


@given(st.text(), st.text(), st.sampled_from(list(ASPECTS)))
def test_any_text_goes_in_as_it_is(question: str, rationale: str, aspect: Aspect) -> None:
    example = Example("x", question, "a", (Paragraph("T", ("s.",)),))
    criterion = DEFAULT.file.judge.aspects[aspect]
    assert DEFAULT.judge(example, rationale, aspect)[1].content == (
        f"T: s.\n\nQuestion: {question}\nReasoning: {rationale}\n\n{criterion}"
    )


def test_shipped_questions_all_make_prompts() -> None:
    for example in load_examples(SampleData(kind="sample", split="validation")).examples:
        user = DEFAULT.showing(2).guided(example, "Because.")[-1].content
        assert user.startswith(f"Context:\n{render_context(example.context)}")
        assert example.question.strip() in user


def test_templates_travel_to_actors() -> None:
    assert pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT


# Files of one's own


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(DEFAULT.file.model_dump(mode="json"))


def written(folder: Path, values: object) -> str:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path, values: dict[str, Any]) -> None:
    values["standard"] = {"user": 'JSON {"q": 1} {} {question}', "assistant": "{answer}"}
    own = load_templates(written(tmp_path, values))
    assert own.standard(EXAMPLE) == (Message("user", 'JSON {"q": 1} {} Who wrote {answer}?'),)


CHANGES: list[tuple[str, Any, str]] = [
    ("guided.user", None, "the key 'guided.user' is missing: add it"),
    ("judge", None, "the key 'judge' is missing: add it"),
    ("cot.asistant", "x", "unknown key 'cot.asistant': remove it"),
    ("rationale.assistant", "x", "unknown key 'rationale.assistant': remove it"),
    ("guided.user", "{question}", "'guided.user' lacks the field {rationale}: add it"),
    (
        "rationale_only.user",
        "{context} {question} {rationale}",
        "'rationale_only.user' has the field {context}, but it may hold {question}, {rationale}",
    ),
    ("judge.user", "{question} {rationale}", "'judge.user' lacks the field {criterion}: add it"),
    (
        "standard.user",
        "{question} {answer}",
        "'standard.user' has the field {answer}, but it may hold {context}, {question}",
    ),
    (
        "cot.assistant",
        "{criterion}",
        "'cot.assistant' has the field {criterion}, but it may hold {answer}, {rationale}",
    ),
    (
        "cot.system",
        "{question}",
        "'cot.system' has the field {question}, but it may hold no fields",
    ),
    ("demonstrations.1.answer", None, "the key 'demonstrations.1.answer' is missing: add it"),
    ("demonstrations.0.context.0.sentences", [], "'demonstrations.0.context.0.sentences' is wrong"),
    ("standard.user", ["{question}"], "'standard.user' is wrong: input should be a valid string"),
    (
        "judge.aspects",
        {"beauty": "x?"},
        "'judge.aspects.beauty' is wrong: input should be",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), CHANGES)
def test_a_wrong_file_is_named_with_its_key(
    tmp_path: Path, values: dict[str, Any], key: str, value: Any, sentence: str
) -> None:
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        node = node[int(parent) if parent.isdigit() else parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    path = written(tmp_path, values)
    with pytest.raises(UserError) as caught:
        load_templates(path)
    assert str(caught.value).startswith(f"the templates file '{path}': {sentence}")


def test_files_that_are_no_templates(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_templates(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="must hold a mapping"):
        load_templates(written(tmp_path, ["x"]))
    with pytest.raises(
        UserError,
        match="no templates named 'defualt': use one of base, boolean, ",
    ):
        load_templates("defualt")


# Rendering

PROMPT: Prompt = (
    Message("system", "be brief"),
    Message("user", "q1"),
    Message("assistant", "a1"),
    Message("user", "q2"),
)
PLAIN = "be brief\n\nq1\na1\n\nq2\n"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    names = ["<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*names, "be", "brief", "q1", "a1", "q2"])}
    raw = RawTokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=template,
    )


def test_plain_text_without_a_chat_template() -> None:
    assert render(PROMPT, tokenizer(), "auto") == PLAIN
    assert render(PROMPT, tokenizer(CHATML), "never") == PLAIN


def test_plain_replies_follow_a_colon_on_its_own_line() -> None:
    """The space before a reply belongs to its first token, so a prompt ends without it."""
    prompt = tuple(
        Message(one.role, f"{one.content}:" if one.role == "user" else one.content)
        for one in PROMPT
    )
    assert render_plain(prompt) == "be brief\n\nq1: a1\n\nq2:"
    assert [parted(before, "x") for before in ("q2:", "q2\n", "")] == [" x", "x", "x"]
    assert parted("q2:", " x") == " x"


def test_plain_text_takes_the_tokenizers_own_special_tokens() -> None:
    expected = [0, 6, 7, 8, 9, 10, 1]
    assert encode(PROMPT, tokenizer(), "auto") == expected
    assert encode(PROMPT, tokenizer(CHATML), "never") == expected


def test_the_chat_template_is_used_and_opens_the_reply() -> None:
    assert render(PROMPT, tokenizer(CHATML), "auto") == (
        "<s><system> be brief <user> q1 <assistant> a1 <user> q2 <assistant>"
    )


def test_special_tokens_come_once() -> None:
    ids = encode(PROMPT, tokenizer(CHATML), "auto")
    assert ids == [0, 3, 6, 7, 4, 8, 5, 9, 4, 10, 5]


def test_a_template_without_system_role_gets_the_line_with_the_question() -> None:
    assert render(PROMPT, tokenizer(NO_SYSTEM), "auto") == "[be brief\n\nq1][a1][q2]"


def test_a_template_that_refuses_everything() -> None:
    with pytest.raises(UserError, match=r"refuses the prompt \(no\): set prompts.chat to 'never'"):
        render(PROMPT, tokenizer("{{ raise_exception('no') }}"), "auto")


def test_hidden_thinking_is_switched_off() -> None:
    template = "{% if enable_thinking is false %}quiet{% else %}<think>{% endif %}"
    assert render(PROMPT, tokenizer(template), "auto") == "quiet"


def test_a_demonstrations_answer_is_what_stands_there(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    for number, answer in enumerate(("no", "1945", "3.50", "1945-05-08")):
        text = yaml.safe_dump(values).replace("answer: ", f"answer: {answer} # ")
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        shown = load_templates(str(path)).file.demonstrations
        assert {demonstration.answer for demonstration in shown} == {answer}
