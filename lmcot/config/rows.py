"""The rows of an evaluation: `ROWS` says all that is known of each, and everything asks it.

To add a row, add a `RowSpec` to ``_TABLE``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticKnownError

from lmcot.config.prompts import GuidedKind, PromptKind
from lmcot.config.stages import BASE, TRAINED_POLICIES, Colour, stage_of_policy

if TYPE_CHECKING:
    from lmcot.records import Example  # numpy: not for the settings alone


Kind = Literal["unguided", "guided", "alone", "control"]
"""Who answers: the frozen LM by itself, the frozen LM guided by a policy, or a policy alone; a
control guides the frozen LM by something else than a policy's rationale for the question."""
Need = Literal["supporting facts", "another question", "passages"]

MOST_TRAINED: Final = "the most trained"
"""In place of a policy's name: the most trained one that there is."""
BASELINE: Final = "standard"
"""The row that all others are compared with."""
REASONING: Final = "cot"
"""The row that costs are compared with: the frozen LM does the reasoning itself."""
_ALONE: Final = "small_alone"
MASK: Final = "___"


@dataclass(frozen=True, slots=True)
class Shown:
    """What a row may show to the frozen LM in place of a rationale."""

    examples: Sequence[Example]
    """All questions of the evaluation."""
    index: int
    """Which of them is asked."""
    rationales: Mapping[str, str]
    """The greedy rationale of the row's policy for each question, by id; empty without policy."""
    seed: int
    mentions: Callable[[str, Example], Sequence[str]] = lambda text, example: example.answers
    """The right answers of a question in the spellings in which a text may hold them."""

    @property
    def example(self) -> Example:
        """The question that is asked."""
        return self.examples[self.index]

    @property
    def own(self) -> str:
        """The policy's rationale for the question."""
        return self.rationales[self.example.id]


@dataclass(frozen=True, slots=True)
class RowSpec:
    """A row of the evaluation."""

    name: str
    title: str
    """The row in words; ``{policy}`` stands for the policy's name."""
    kind: Kind
    colour: Colour
    """Of its point in the picture of accuracy against cost."""
    prompt: PromptKind | None
    """Which prompt the frozen LM gets; None if it is not asked."""
    policy: str | None = None
    """Name of the policy whose rationales the row needs, or `MOST_TRAINED`; None without."""
    shown: Callable[[Shown], str] | None = None
    """The rationale in a guided prompt; None if the row shows none."""
    needs: tuple[Need, ...] = ()
    """What the questions must have."""
    against: tuple[str, ...] = (BASELINE,)
    """Rows that the report compares it with."""
    may_vote: bool = False
    """Whether there is a row ``NAME+sc`` too, in which several samples vote."""
    votes: bool = False
    """Whether it is that row."""
    default: bool = False
    """Whether the row is evaluated if the settings name none."""
    marker: str = "o"
    """Of its point in the picture, as matplotlib names markers."""

    @property
    def voteless(self) -> str:
        """Name of the row without votes."""
        return self.name.removesuffix(_VOTES)

    @property
    def own(self) -> bool:
        """Whether the rationales that the answers rest on are the policy's own, unchanged."""
        return self.kind in ("guided", "alone")

    @property
    def rests_on_first_answer(self) -> bool:
        """Whether its prompts hold the frozen LM's first answer, where the small LM advises."""
        return self.kind != "unguided"

    @property
    def samples_replies(self) -> bool:
        """Whether the votes are replies of the frozen LM, as the row shows it no rationales."""
        return self.votes and self.shown is None

    @property
    def may_choose(self) -> bool:
        """Whether the frozen LM may choose among options in it, without writing a reply."""
        return self.prompt not in (None, "cot") and not self.samples_replies

    def policy_among(self, policies: Sequence[str]) -> str:
        """Name of the policy whose rationales the row needs; empty if it needs none.

        Args:
            policies: those that there are, least trained first.
        """
        return policies[-1] if self.policy == MOST_TRAINED else self.policy or ""

    def attempts(self, samples: int) -> int:
        """How many attempts a question has, where ``samples`` vote."""
        return samples if self.votes else 1

    def label(self, policies: Sequence[str], samples: int) -> str:
        """The row in words, for the report."""
        text = self.title.format(policy=self.policy_among(policies))
        return f"{text}, vote of {samples}" if self.votes else text


def find_row(name: str) -> RowSpec:
    """The row of a name.

    Raises:
        LookupError: if there is no such row.
    """
    if name not in ROWS:
        raise LookupError(f"there is no row '{name}': the rows are {', '.join(ROWS)}")
    return ROWS[name]


def policy_row_name(policy: str, kind: GuidedKind) -> str:
    """Name of the row in which a policy guides the frozen LM by one kind of prompt."""
    return f"{kind}_{policy}"


def default_rows() -> list[str]:
    """Names of the rows that are evaluated if the settings name none."""
    return [one.name for one in ROWS.values() if one.default]


def masked(rationale: str, golds: str | Sequence[str]) -> str:
    """The rationale with a mark wherever a right answer stands in it, in whatever case.

    An article ("A", the letter of an option) stands everywhere: it must have the answer's case.
    """
    # Longer ones first: "State of Velm" is not left as "State of ___".
    several = [golds] if isinstance(golds, str) else golds
    for gold in sorted(several, key=len, reverse=True):
        words = gold.split()
        if not words:
            continue
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
        case = re.NOFLAG if gold.strip().lower() in ("a", "an", "the") else re.IGNORECASE
        rationale = re.sub(pattern, MASK, rationale, flags=case)
    return rationale


def _own(shown: Shown) -> str:
    return shown.own


def _empty(shown: Shown) -> str:
    return ""


def _of_another_question(shown: Shown) -> str:
    """Each question gets another one's rationale, and each gives its own to another: a step around
    the circle of questions."""
    count = len(shown.examples)
    step = random.Random(f"{shown.seed}/shuffled").randrange(1, count)
    return shown.rationales[shown.examples[(shown.index + step) % count].id]


def _without_the_answer(shown: Shown) -> str:
    return masked(shown.own, shown.mentions(shown.own, shown.example))


def _supporting_facts(shown: Shown) -> str:
    return " ".join(shown.example.gold_sentences())


_POLICIES: Final = (BASE, *TRAINED_POLICIES)
"""Least trained first."""


def _in_words(policy: str) -> str:
    before = "the small LM before training"
    return before if policy == BASE else stage_of_policy(policy).policy_in_words


def _colour(policy: str) -> Colour:
    return "ink" if policy == BASE else stage_of_policy(policy).colour


def _less_trained(policy: str) -> list[str]:
    """The policies before one, the most trained first."""
    return list(reversed(_POLICIES[: _POLICIES.index(policy)]))


def _guided_by(policy: str) -> RowSpec:
    earlier = (policy_row_name(one, "guided") for one in _less_trained(policy))
    return RowSpec(
        policy_row_name(policy, "guided"),
        f"guided by {_in_words(policy)}",
        kind="guided",
        colour=_colour(policy),
        prompt="guided",
        policy=policy,
        shown=_own,
        against=(BASELINE, REASONING, *earlier),
        may_vote=True,
        default=True,
    )


def _by_rationale_only(policy: str) -> RowSpec:
    earlier = (policy_row_name(one, "rationale_only") for one in _less_trained(policy))
    # The answer may stand in the rationale: does the frozen LM do more than copy it?
    alone = () if policy == BASE else (_ALONE,)
    return RowSpec(
        policy_row_name(policy, "rationale_only"),
        f"guided by {_in_words(policy)}, without the passages",
        kind="guided",
        colour=_colour(policy),
        marker="D",
        prompt="rationale_only",
        policy=policy,
        shown=_own,
        needs=("passages",),
        against=(BASELINE, REASONING, policy_row_name(policy, "guided"), *earlier, *alone),
        may_vote=True,
    )


_TABLE = (
    RowSpec(
        "standard",
        "frozen LM answers at once",
        kind="unguided",
        colour="grey",
        prompt="standard",
        against=(),
        may_vote=True,
        default=True,
    ),
    RowSpec(
        "cot",
        "frozen LM reasons, then answers",
        kind="unguided",
        colour="orange",
        prompt="cot",
        may_vote=True,
        default=True,
    ),
    *(_guided_by(policy) for policy in _POLICIES),
    *(_by_rationale_only(policy) for policy in _POLICIES),
    RowSpec(
        _ALONE,
        "the {policy} small LM answers itself",
        kind="alone",
        colour="green",
        prompt=None,
        policy=MOST_TRAINED,
        shown=_own,
        default=True,
    ),
    RowSpec(
        "control_empty",
        "control: an empty rationale",
        kind="control",
        colour="red",
        marker="x",
        prompt="guided",
        shown=_empty,
    ),
    RowSpec(
        "control_shuffled",
        "control: the {policy} small LM's rationale for another question",
        kind="control",
        colour="red",
        marker="+",
        prompt="guided",
        policy=MOST_TRAINED,
        shown=_of_another_question,
        needs=("another question",),
    ),
    RowSpec(
        "control_masked",
        "control: the {policy} small LM's rationale, the gold answer masked out",
        kind="control",
        colour="red",
        marker="v",
        prompt="guided",
        policy=MOST_TRAINED,
        shown=_without_the_answer,
    ),
    RowSpec(
        "control_oracle",
        "control: the gold supporting facts as rationale",
        kind="control",
        colour="red",
        marker="^",
        prompt="guided",
        shown=_supporting_facts,
        needs=("supporting facts",),
    ),
    RowSpec(
        "rationale_only_empty",
        "control: the question alone, without passages or rationale",
        kind="control",
        colour="red",
        marker="X",
        prompt="rationale_only",
        shown=_empty,
        needs=("passages",),
    ),
    RowSpec(
        "rationale_only_masked",
        "control: the {policy} small LM's rationale, the gold answer masked out, "
        "without the passages",
        kind="control",
        colour="red",
        marker="<",
        prompt="rationale_only",
        policy=MOST_TRAINED,
        shown=_without_the_answer,
        needs=("passages",),
    ),
    RowSpec(
        "rationale_only_oracle",
        "control: the gold supporting facts as rationale, without the passages",
        kind="control",
        colour="red",
        marker=">",
        prompt="rationale_only",
        shown=_supporting_facts,
        against=(BASELINE, "control_oracle"),
        needs=("supporting facts", "passages"),
    ),
)
_VOTES: Final = "+sc"
_MARKERS_OF_VOTES: Final = {"o": "s", "D": "P"}


def with_votes(table: Sequence[RowSpec]) -> dict[str, RowSpec]:
    """The rows of a table by name, each that may vote followed by the one that does.

    A row of votes is compared with the votes of the row's opponents, and with the row itself; the
    baseline does not vote.
    """
    by_name = {one.name: one for one in table}
    rows: dict[str, RowSpec] = {}
    for one in table:
        rows[one.name] = one
        if not one.may_vote:
            continue
        opponents = [
            f"{name}{_VOTES}" if name != BASELINE and by_name[name].may_vote else name
            for name in one.against
        ]
        rows[one.name + _VOTES] = replace(
            one,
            name=one.name + _VOTES,
            votes=True,
            default=False,
            marker=_MARKERS_OF_VOTES.get(one.marker, "s"),
            against=tuple(dict.fromkeys([*opponents, one.name])),
        )
    return rows


ROWS: Final = with_votes(_TABLE)
"""All rows by name, in the report's order."""


def _known(name: str) -> str:
    if name not in ROWS:
        *others, last = [f"'{one}'" for one in ROWS]
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return name


Row = Annotated[str, AfterValidator(_known)]
"""The name of a row."""
