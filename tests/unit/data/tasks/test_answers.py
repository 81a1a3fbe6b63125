"""How each task reads answers out of texts, and compares them."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from lmcot.config.task import FreeText, TaskChoice
from lmcot.data.tasks import EXTRACTIVE_QA, Scores, Task, open_task
from lmcot.data.tasks.free_text import rouge_l
from lmcot.data.tasks.numeric import numbers_in
from lmcot.errors import UserError
from lmcot.records import Completion, Example
from lmcot.text.answers import best, exact_match, f1, inclusion
from lmcot.text.vote import vote

OPTIONS = "What do plants take in?\n(A) oxygen\n(B) carbon\n(C) carbon dioxide\n(D) a stone"


def task(**settings: object) -> Task:
    return open_task(TypeAdapter(TaskChoice).validate_python(settings))


def example(answer: str, *aliases: str, question: str = "?") -> Example:
    return Example("q", question, answer, (), aliases=aliases)


def test_extractive_answers_are_compared_as_ever_with_the_best_of_all_golds() -> None:
    golds = ("Grey Sea", "Sea of Ott")
    for answer in ("the sea of Ott", "Ott", "a Grey Sea far away", ""):
        found = EXTRACTIVE_QA.scores(answer, example(*golds))
        wanted = (best(metric, answer, golds) for metric in (exact_match, f1, inclusion))
        assert (found.em, found.f1, found.inclusion) == tuple(wanted)


@pytest.mark.parametrize(
    ("text", "answer", "stated"),
    [
        ("Yes.", "yes", False),
        ("no, they are not", "no", False),
        ("True", "yes", False),
        ("A snail is slow. So the answer is no.", "no", True),
        ("It said yes at first. The answer is false.", "no", True),
        ("I think that yes, it could.", "yes", False),
        ("One says yes, the other no.", "", False),
        ("Nobody knows.", "", False),
    ],
)
def test_boolean_answers(text: str, answer: str, stated: bool) -> None:
    boolean = task(kind="boolean")
    found = boolean.read(text, "Is it?")
    assert (found.answer, found.stated) == (answer, stated)
    assert found.missing == ("" if answer else "empty")
    assert boolean.scores(found.answer, example("yes")).em == (answer == "yes")


def test_a_boolean_answer_that_was_cut_before_it_was_said() -> None:
    boolean = task(kind="boolean")
    assert boolean.read("Some say yes and", "Is it?", cut=True).missing == "cut"
    assert boolean.read("Yes, because the", "Is it?", cut=True).answer == "yes"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("Option D", "D"),
        ("C) carbon dioxide", "C"),
        ("carbon dioxide", "C"),
        ("They take in carbon dioxide", "C"),
        ("The answer is (A) oxygen, not (C).", "A"),
        ("Plants need (A) less. So the answer is C.", "C"),
        ("oxygen and carbon dioxide", ""),
        ("E", ""),
    ],
)
def test_multiple_choice_answers(text: str, answer: str) -> None:
    found = task(kind="multiple_choice").read(text, OPTIONS)
    assert found.answer == answer
    right = example("C", "carbon dioxide", question=OPTIONS)
    assert task(kind="multiple_choice").scores(found.answer, right).em == (answer == "C")
    texts = task(kind="multiple_choice", answers="texts")
    assert (
        texts.read(text, OPTIONS).answer
        == ({"A": "oxygen", "B": "carbon", "C": "carbon dioxide", "D": "a stone", "": ""}[answer])
    )
    assert texts.scores("C", example("carbon dioxide", "C", question=OPTIONS)).em == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("72", "72"),
        ("$1,234.50", "1234.5"),
        ("-3", "-3"),
        ("\u22123 degrees", "-3"),
        ("16 - 3 - 4 = 9 eggs. 9 * 2 = $18", "18"),
        ("5+3", "3"),
        ("The answer is 18. She sells 3 more.", "18"),
        ("So the answer is 5 + 3 = 8.", "8"),
        ("Then it is 7.\n#### 1,000", "1000"),
        ("one half is 1/2", "1/2"),
        ("3/4 of it", "0.75"),
        ("2.5 million people", "2500000"),
        ("50%", "50"),
        ("no number", ""),
    ],
)
def test_numeric_answers(text: str, answer: str) -> None:
    found = task(kind="numeric").read(text, "How many?")
    wanted = "0.5" if answer == "1/2" else answer
    assert found.answer == wanted
    if answer:
        assert task(kind="numeric").scores(found.answer, example(wanted)).em == 1


def test_numeric_answers_are_compared_as_numbers() -> None:
    exact, near = task(kind="numeric"), task(kind="numeric", tolerance=0.01)
    share = task(kind="numeric", relative_tolerance=0.1)
    assert exact.scores("72.00 clips", example("72")).em == 1
    assert exact.scores("72.005", example("72")).em == 0
    assert near.scores("72.005", example("72")).em == 1
    assert share.scores("79", example("72")).em == 1
    assert share.scores("80", example("72")).em == 0
    assert exact.scores("", example("72")).em == 0
    assert exact.scores("0.333", example("1/3")).em == 0
    found = vote(["2", "2.0", "20"], key=exact.key)
    assert found.answer == "2"
    assert found.share == pytest.approx(2 / 3)


def test_a_number_that_was_cut_may_go_on() -> None:
    numeric = task(kind="numeric")
    assert numeric.read("So the answer is 12", "?", cut=True).missing == "cut"
    assert numeric.read("So the answer is 12. That", "?", cut=True).missing == ""
    assert numeric.read("First there are 12 and", "?", cut=True).missing == "cut"


def test_the_spellings_of_a_number_are_masked() -> None:
    found = task(kind="numeric").mentions("It is $1,234 or 1234.0, not 12.", example("1234"))
    assert set(found) == {"1234", "$1,234", "1234.0"}


def test_numbers_are_found_in_linear_time() -> None:
    assert numbers_in("1," * 50_000)
    assert numbers_in("9" * 100_000)
    assert numbers_in("- " * 50_000) == []


def test_free_text_is_compared_by_a_metric() -> None:
    assert rouge_l("the cat sat down", "a cat lay down") == pytest.approx(2 * 2 / 6)
    free = task(kind="free_text", right_from=0.6)
    found = free.read("First this. So the answer is that yeast makes gas.", "Why?")
    assert (found.answer, found.stated) == ("that yeast makes gas.", True)
    right = free.scores(found.answer, example("Yeast makes gas.", "It is the gas."))
    assert right.em == 1
    assert right.f1 == pytest.approx(6 / 7)
    assert free.scores("nothing of it", example("Yeast makes gas.")).em == 0
    words = task(kind="free_text", metric="f1")
    assert words.scores("gas makes yeast", example("yeast makes gas")).f1 == 1


def shares_a_word(answer: str, golds: tuple[str, ...]) -> float:
    return float(bool(set(answer.split()) & set(" ".join(golds).split())))


def fails(answer: str, golds: tuple[str, ...]) -> float:
    raise RuntimeError("out of order")


def too_much(answer: str, golds: tuple[str, ...]) -> float:
    return 7.0


class NotATask:
    pass


def test_free_text_is_compared_by_the_users_function() -> None:
    free = task(kind="free_text", metric=f"{__name__}:shares_a_word")
    assert free.scores("gas and more", example("yeast makes gas")) == Scores(1.0, 1.0, 0.0)
    with pytest.raises(UserError, match="raised RuntimeError: out of order"):
        task(kind="free_text", metric=f"{__name__}:fails").scores("a", example("b"))
    with pytest.raises(UserError, match="from 0 to 1"):
        task(kind="free_text", metric=f"{__name__}:too_much").scores("a", example("b"))


def test_code_that_is_not_there_or_no_task_is_refused() -> None:
    with pytest.raises(ValidationError, match="module:function"):
        FreeText(kind="free_text", metric="bleu")
    with pytest.raises(UserError, match="has no function 'nothing'"):
        task(kind="free_text", metric=f"{__name__}:nothing")
    with pytest.raises(UserError, match="cannot be imported"):
        task(kind="custom", name="no_such_module_here:Task")
    with pytest.raises(UserError, match="derive it from"):
        task(kind="custom", name=f"{__name__}:NotATask")


def test_the_reply_is_read_by_the_task() -> None:
    said = task(kind="boolean").answer(Completion("False.", 3, 2, "stop"), "Is it?")
    assert (said.text, said.extracted, said.tokens_out) == ("False.", "no", 2)
    assert task(kind="numeric").stated("Then 3. So the answer is 4.", "?") == "4"
    assert task(kind="numeric").stated("Then 3.", "?") == ""
