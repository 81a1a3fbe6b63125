"""The run that every stage works with: settings, directory, questions, prompts, the cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

from lmcot import run_files
from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.frozen_client import FrozenClient
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.config import (
    BudgetSettings,
    Config,
    DataSource,
    FileTeacher,
    GivenDemonstrations,
    flat_settings,
)
from lmcot.data.context import apply_context
from lmcot.data.demonstrations import SetApart
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import PromptTemplates
from lmcot.data.rationale_file import BroughtRationale, read_rationales
from lmcot.data.render import rationale_ids
from lmcot.data.tasks import Task, open_task
from lmcot.errors import UserError
from lmcot.frozen.needs import cost_in_words
from lmcot.frozen.templates import open_templates
from lmcot.models.generation.vllm_start import check_vllm
from lmcot.models.sources import load_tokenizer
from lmcot.monitor.metrics import Monitor
from lmcot.monitor.progress import say
from lmcot.records import Example
from lmcot.rewards.aspects import AspectMeter
from lmcot.rewards.custom import CustomReward, load_customs
from lmcot.rewards.first_check import check_frozen
from lmcot.run.budgets import Spending
from lmcot.run.demonstrations import given_demonstrations, write_demonstrations
from lmcot.run.directory import RunDirectory
from lmcot.run.estimate import record
from lmcot.run.first_answers import FirstAnswers, open_first_answers
from lmcot.run.fit import TRAIN, VALIDATION, Need, lack_of, left_out, needs_of
from lmcot.run.inputs import check_contents
from lmcot.run.interruption import Interruption
from lmcot.run.presence import check_presence, what_is_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lmcot.storage import Place

_Item = TypeVar("_Item")


@dataclass(slots=True)
class Question:
    """An example as the models see it."""

    example: Example
    """The example, with its context reduced."""
    facts_cut: bool
    """Whether the token budget removed a supporting fact."""


@dataclass
class Run:
    """One run, which is opened once and passed to each stage."""

    config: Config
    directory: RunDirectory
    monitor: Monitor
    interruption: Interruption
    functions: Mapping[str, CustomReward] = field(default_factory=dict)
    """Custom rewards of the program that runs the stages, by the names that the settings call
    them."""
    templates: PromptTemplates = field(init=False)
    spending: Spending = field(init=False)
    effective: Config = field(init=False)
    """The settings that actors work with, which include the demonstrations in full, and what was
    learned about an endpoint."""
    demonstrations: GivenDemonstrations | None = field(init=False)
    """The demonstrations that were made of questions; None: those of the templates file."""
    left_out: dict[str, str] = field(init=False, default_factory=dict)
    """For each data set that was read, a sentence on the questions that were left out."""
    _told: set[str] = field(init=False, default_factory=set)
    """Components that were already reported as not measured."""

    def __post_init__(self) -> None:
        budget = self.config.frozen.budget if self.config.frozen else BudgetSettings()
        self.spending = Spending(self.directory.path / run_files.SPENDING, budget)
        self.demonstrations = given_demonstrations(
            self.config, self.directory, lambda: self.tokenizer
        )
        self.effective = self.config.showing(self.demonstrations).resolved()
        self.templates = open_templates(self.effective.prompts)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The small LM's tokenizer."""
        return load_tokenizer(self.config.policy.source)

    @cached_property
    def task(self) -> Task:
        """What a question is, and how its answer is compared."""
        return open_task(self.config.task)

    @cached_property
    def train(self) -> list[Question]:
        """The training questions, with reduced contexts."""
        data = self.config.data
        return self._questions(TRAIN, data.train, data.max_train)

    @cached_property
    def validation(self) -> list[Question]:
        """The validation questions, with reduced contexts."""
        data = self.config.data
        return self._questions(VALIDATION, data.validation, data.max_validation)

    @cached_property
    def first_answers(self) -> FirstAnswers:
        """The frozen LM's first answers, where the small LM advises on them."""
        return open_first_answers(self)

    @cached_property
    def brought(self) -> dict[str, list[BroughtRationale]]:
        """The rationales of the teacher ``file``, by their question's id; none of other teachers.

        Raises:
            UserError: if the file cannot be read, or has ids of no training question.
        """
        teacher = self.config.teacher
        if not isinstance(teacher, FileTeacher):
            return {}
        found: dict[str, list[BroughtRationale]] = {one.example.id: [] for one in self.train}
        unknown: list[str] = []
        for one in read_rationales(teacher.path):
            if one.example_id in found:
                found[one.example_id].append(one)
            else:
                unknown.append(one.example_id)
        if unknown:
            told = (
                f"{len(unknown)} rationales of '{teacher.path}' (teacher.path) have ids of none of "
                f"the {len(self.train)} training questions, the first: '{unknown[0]}'"
            )
            if teacher.unknown_ids == "refuse":
                raise UserError(
                    f"{told}; check data.train and data.max_train, or set teacher.unknown_ids to "
                    "'ignore'"
                )
            say(f"{told}; they are ignored")
        return found

    def check_inputs(self) -> None:
        """Reads the data and the tokenizers, and tries an endpoint with requests like the run's.

        A mistake must not cost the start of a cluster.

        Raises:
            UserError: if data, small LM, frozen LM, learned aspects or a custom reward are wrong.
        """
        if self.config.rewards.kind == "guidance":
            AspectMeter(self.config.rewards)  # reads the learned model, if there is one
            load_customs(self.config.rewards, self.functions)
        if self.config.rollout.engine == "vllm":
            check_vllm(
                "rollout.engine is 'vllm'",
                "set it to 'transformers'",
                "policy.source",
                self.config.policy.source,
            )
        self._check_frozen()
        for questions, key in ((self.train, TRAIN), (self.validation, VALIDATION)):
            say(f"{key}: {len(questions)} questions")
            for told in what_is_left_out(self.config, [one.example for one in questions], key):
                say(told)
        check_presence(self.config, [question.example for question in self.train])
        if "distill" not in self.directory.begun(self.config):
            _ = self.brought  # after that, they are not read again

    def _check_frozen(self) -> None:
        """Tries an endpoint with requests like the run's, which are counted for the stage
        ``check``.

        Of a spent budget nothing is asked: what needs no more requests still works.
        """
        if self.spending.nothing_left:
            say("the frozen LM's budget is spent: its endpoint is not checked")
            return
        checked = check_frozen(
            self.effective, self.templates, "run", partial(self.spending.add, "check")
        )
        self.effective = checked.config
        for notice in checked.notices:
            say(notice)
        if checked.usage.sent:
            say(f"the frozen LM's endpoint was checked: {cost_in_words(checked.usage)}")

    def rationale_prompt(self, example: Example) -> tuple[int, ...]:
        """Token ids of the prompt that the small LM answers with a rationale."""
        return rationale_ids(example, self.templates, self.tokenizer, self.config.prompts.chat)

    def tell_unmeasured(self, components: Iterable[tuple[str, str]]) -> None:
        """Says once for each component of weight 0 that it cannot always be measured, and why."""
        for name, reason in components:
            if name not in self._told:
                self._told.add(name)
                say(f"{name} (weight 0) is left out where it cannot be measured; first: {reason}")

    def _questions(self, kind: str, source: DataSource, limit: int | None) -> list[Question]:
        data = self.config.data
        apart = SetApart(self.demonstrations)
        loaded = load_examples(
            source, limit=limit, on_bad=data.on_bad_record, leaves_out=apart.__contains__,
            task=self.task, require_context=self.config.requires_context,
        )  # fmt: skip
        if loaded.skipped:
            say(f"skipped {loaded.skipped} bad records, the first: {loaded.problems[0]}")
        if loaded.without_id:
            say(f"{loaded.without_id} questions have no id: theirs are made of their content")
        tokenizer = self.tokenizer
        reduced = apply_context(
            loaded.examples,
            data.context,
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )
        questions = [
            Question(after, after.gold_sentences() != before.gold_sentences())
            for before, after in zip(loaded.examples, reduced, strict=True)
        ]
        return self._fitting(kind, questions, loaded.left_out)

    @cached_property
    def _needs(self) -> list[Need]:
        return needs_of(self.config, self.templates, self.tokenizer)

    def _fitting(self, kind: str, questions: list[Question], shown: int) -> list[Question]:
        """The questions that fit the models; those left out are named here and in the report.

        Args:
            shown: number of questions that were left out before, as demonstrations.
        """
        fitting, lacks = [], []
        for question in questions:
            lack = lack_of(question.example, kind, self._needs)
            if lack:
                lacks.append(f"{question.example.id}: {lack}")
            else:
                fitting.append(question)
        share = self.config.failures.max_data_share
        told = [
            f"{shown} questions of {kind}: shown as demonstrations, left out" if shown else "",
            left_out(lacks, len(questions), kind, share),
        ]
        self.left_out[kind] = "; ".join(filter(None, told))
        if self.left_out[kind]:
            say(self.left_out[kind])
        return fitting

    def frozen_fleet(self) -> Fleet[FrozenActor]:
        """The frozen LM's actors."""
        config = self.effective
        if config.frozen is None:
            raise UserError("this stage needs the frozen LM, but there is no 'frozen' section")
        self.spending.check()
        role = config.actors.frozen
        return Fleet(
            "frozen-LM", FrozenActor, role, config.actors,
            arguments={
                "settings": config.frozen, "prompts": self.config.prompts, "threads": role.threads,
            },
            calls_at_once=config.frozen.calls_at_once,
            check=self.interruption.check,
        )  # fmt: skip

    def frozen_client(self, fleet: Fleet[FrozenActor]) -> FrozenClient:
        """Asks the frozen LM for the driver, which keeps the fleet up while it waits."""

        def check() -> None:
            self.interruption.check()
            fleet.keep_up()

        actors = self.config.actors
        return FrozenClient(
            fleet.handles,
            limit_s=actors.unit_timeout_s,
            attempts=actors.max_attempts,
            check=check,
        )

    def rollout_fleet(self, source: str, *, trains: bool = False) -> Fleet[RolloutActor]:
        """Actors that sample from the small LM, which starts as ``source``.

        Args:
            trains: whether the learner will publish versions to them.
        """
        actors, role = self.config.actors, self.config.actors.rollout
        return Fleet(
            "rollout", RolloutActor, role, actors,
            arguments={
                "policy": self.config.policy, "source": source, "prompts": self.config.prompts,
                "threads": role.threads, "rollout": self.config.rollout,
                "trains": trains, "verify": actors.verify_weights,
                "rests": trains and actors.colocate,
            },
            calls_at_once=self.config.rollout.calls_at_once,
            guest=actors.learner if trains and actors.colocate else None,
            check=self.interruption.check,
        )  # fmt: skip

    def reward_fleet(self) -> Fleet[RewardActor]:
        """Actors that judge rationales, to be set up with the frozen LM's handles and the drawn
        demonstrations."""
        # Without the demonstrations: Ray keeps a large argument apart from the actor, and could not
        # restart the actor once it is gone.
        config = self.effective.model_copy(update={"prompts": self.config.prompts})
        return Fleet(
            "reward", RewardActor, self.config.actors.reward, self.config.actors,
            arguments={"config": config, "functions": self.functions},
            check=self.interruption.check,
        )  # fmt: skip


@contextmanager
def open_run(
    config: Config,
    home: Place,
    *,
    varied: Collection[str] = (),
    functions: Mapping[str, CustomReward] | None = None,
) -> Iterator[Run]:
    """Opens a run directory, checks the settings against it, and joins or starts the cluster.

    Args:
        varied: settings whose values differ in the runs beside this one, if that is known.
        functions: custom rewards of the calling program, by the names that the settings call them.

    Raises:
        UserError: before anything starts, if settings, data, model or directory are wrong.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory(home))
        for difference in directory.check_config(config):
            say(f"resumed with another {difference}")
        hparams = flat_settings(config)
        monitor = stack.enter_context(
            Monitor(directory.path, config.monitor, hparams=hparams, varied=varied)
        )
        interruption = Interruption(also=directory.check_owner)
        run = Run(config, directory, monitor, interruption, functions or {})
        stack.callback(run.spending.save)
        run.check_inputs()
        check_contents(run)
        write_demonstrations(run.demonstrations, directory)
        directory.write_config(config)
        if config.estimate is not None:
            record(directory.path, config, len(run.train), len(run.validation))
        stack.enter_context(ray_cluster(config.actors))
        stack.enter_context(interruption)  # after Ray, which sets a handler for SIGTERM
        yield run


def in_units(items: Sequence[_Item], size: int) -> list[list[_Item]]:
    """Consecutive groups of at most ``size``."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
