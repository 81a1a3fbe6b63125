"""Describes each metric, for TensorBoard, Prometheus and docs/metrics.md alike.

``python -m lmcot.monitor.catalogue`` prints the tables of docs/metrics.md.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from lmcot.rewards.aspects import aspect_component
from lmcot.rewards.components import COMPONENTS

_COMPONENTS = (*(one.name for one in COMPONENTS), aspect_component("NAME"), "custom", "custom/NAME")

CATALOGUE = {
    # -- evaluation
    "evaluation/*/em": "Exact match of the frozen LM's answers to validation questions, percent: "
    "`guided` by the policy after that many steps of refinement (`evaluate.during`), or a row of "
    "the report, logged at its run's latest step.",
    "evaluation/*/f1": "F1 of those answers, percent.",
    "evaluation/*/inclusion": "Share of those answers that hold the gold answer, percent.",
    "evaluation/*/n": "Questions that were answered.",
    "evaluation/*/empty": "Those of them whose answer was empty.",
    "evaluation/*/cut": "Those whose reply was cut before its answer.",
    # -- reward
    "reward/mean": "Mean reward of the judged rationales, less penalties: what PPO maximises, "
    "before the KL penalty.",
    "reward/std": "Standard deviation of those rewards; 0: there is nothing to learn from.",
    "reward/min": "Smallest reward of the judged rationales.",
    "reward/max": "Greatest reward of the judged rationales.",
    "reward/equal_groups": "Share of the questions whose judged rationales all got one reward (of "
    "those with several; where none has, 1 if the whole step has one reward, else 0); a group "
    "baseline learns nothing from them.",
    "reward/score": "Mean reward of the rationales that are learnt from, as PPO takes it: scaled "
    "(`refine.scale_rewards`) and clipped (`refine.reward_clip`).",
    "component/*": "Mean of one component of the reward, before its weight: "
    f"{', '.join(f'`{name}`' for name in _COMPONENTS)}, whichever the settings include.",
    "penalty/*": "Mean penalty: `length` and `missing_end` of `rewards.penalties`.",
    # -- kl
    "kl": "KL of the policy to the reference, nats per rationale: the mean over rationales of the "
    "summed log-ratio (k1).",
    "kl/k3": "The same per token by the estimate that is never negative (k3).",
    "kl/coefficient": "Weight of the KL penalty after the step; the adaptive controller moves it.",
    "kl/negative": "1 where `kl` is below 0, else 0. Now and then that is noise; if it lasts, it "
    "means that the policy samples from another distribution than it is scored under.",
    "kl/negative_count": "Rationales whose own summed log-ratio is below 0, by more than rounding.",
    # -- loss
    "loss": "Distillation: negative log-likelihood of the teacher's rationales, nats per token.",
    "loss/answer": "Distillation: negative log-likelihood of the right answers "
    "(`distill.answer_task`), nats per token, before its weight.",
    "loss/validation": "Distillation: the same of the rationales that are kept out "
    "(`distill.validation`), by the policy after that step.",
    "loss/validation_answer": "The same of their answers.",
    "loss/policy": "The policy's loss (`refine.loss`), averaged as `refine.loss.aggregation` says. "
    "Its value tells little: at the start of a step it follows from the advantages' mean, and "
    "CISPO's from the log-probabilities too.",
    "loss/value": "The critic's clipped squared error, mean over tokens, before its coefficient.",
    # -- policy
    "policy/entropy": "Entropy of the policy, nats per token.",
    "policy/clip_fraction": "Share of the tokens whose ratio was clipped, at either side. With PPO "
    "and GSPO they add nothing to the gradient; with CISPO they do, at the bound's weight.",
    "policy/clip_fraction_low": "The same at the lower bound (`clip_low`): with PPO and GSPO, "
    "tokens of negative advantage that have become less likely.",
    "policy/clip_fraction_high": "The same at the upper bound (`clip_high`): with PPO and GSPO, "
    "tokens of positive advantage that have become more likely.",
    "policy/dual_clip_fraction": "Share of the tokens whose loss was bounded by "
    "`refine.loss.dual_clip`, where that is set.",
    "policy/approx_kl": "KL of the policy to what it was at the start of the step, nats per token "
    "(k3); `refine.target_kl` bounds it.",
    "policy/ratio_min": "Smallest ratio current / proximal probability of a token, on any learner.",
    "policy/ratio_max": "Greatest ratio of a token, on any learner.",
    # -- sampler
    "sampler/gap": "Greatest difference between the sampler's and the learner's log-probability of "
    "a token: arithmetic that differs, or staleness.",
    "sampler/kl": "KL of the sampler to the learner's policy, nats per token (k3).",
    "sampler/importance_weight": "Mean importance weight proximal / behaviour that corrects for "
    "it, truncated at `refine.importance_cap`; 1 where both agree.",
    "sampler/capped_share": "Share of the tokens whose weight was truncated there.",
    "sampler/effective_sample_size": "Effective sample size of these weights as a share of the "
    "tokens, (sum w)^2 / (n sum w^2): 1 where all weights are equal. GSPO weighs whole rationales "
    "by the geometric mean of their tokens' weights, which varies less.",
    # -- value
    "value/mean": "Mean of the critic's values.",
    "value/return": "Mean of the returns that the critic learns.",
    "value/explained_variance": "1 - Var(return - value) / Var(return): 1 is perfect, 0 as good as "
    "a constant.",
    # -- optimiser
    "optimiser/grad_norm": "Global norm of the gradient before clipping, mean over the updates "
    "that were applied.",
    "optimiser/learning_rate": "Highest learning rate of the step's last update.",
    "optimiser/updates": "Optimiser updates applied.",
    "optimiser/skipped_updates": "Updates skipped because a loss or gradient was not finite.",
    "optimiser/stopped_early": "1 where `refine.target_kl` ended the step's updates, else 0.",
    # -- response
    "response/length": "Mean length of the rationales, in tokens.",
    "response/length_max": "Length of the longest rationale, in tokens.",
    "response/cut_share": "Share of the rationales that were cut at `policy.max_new_tokens`.",
    "response/contains_gold": "Share of the judged rationales that hold the gold answer: expected "
    "of a good rationale; `copied` in the evaluation tells whether the rationale is more "
    "than a hint.",
    # -- answer
    "answer/empty_share": "Share of the frozen LM's answers to judged rationales that were "
    "empty though the reply had ended; they count as wrong.",
    "answer/cut_share": "Share of them that were cut at `frozen.max_answer_tokens` before the "
    "answer. (A reply cut within hidden thinking is a failure, not an answer.)",
    # -- batch
    "batch/rationales": "Rationales sampled for the step.",
    "batch/judged_share": "Share of them that could be judged; the others are left out.",
    "batch/failed": "Rationales that could not be judged.",
    "batch/unmeasured": "Components of weight 0 that could not be measured, over all "
    "rationales; they are left out of the means.",
    "batch/dropped": "Judged rationales that cannot be learnt from: empty, or (with a group "
    "baseline) the only ones of their question.",
    "batch/tokens": "Response tokens that were learnt from.",
    "batch/no_backward": "Share of these tokens that needed no backward pass, since all advantages "
    "of their question were 0 and nothing else (critic, entropy bonus, KL in the loss) learns from "
    "them. They count in every mean.",
    "batch/staleness": "Number of updates by which the policy that sampled was older than the one "
    "that learns.",
    # -- filter
    "filter/asked": "Questions that the step asked, with `refine.filter`.",
    "filter/refilled": "Those of them that it asked in place of others.",
    "filter/right": "Questions that were left out because all their rationales were right.",
    "filter/wrong": "Those left out because the task reward of all their rationales was 0.",
    "filter/equal": "Those left out because their rationales measured the same in another way.",
    "filter/few": "Those left out because fewer than two of their rationales could be judged.",
    "filter/filled": "Questions that the step learnt from, as a share of "
    "`refine.prompts_per_step`; 0: it learnt nothing.",
    # -- curriculum
    "curriculum/solved": "Questions that rest because they were solved (`refine.curriculum`), when "
    "the step drew its own.",
    "curriculum/unsolved": "Those that rest because they were never solved.",
    "curriculum/passed": "Questions whose turn had come, but which rested: the step passed them "
    "over.",
    "curriculum/woken": "Questions that were woken early, for there were too few others.",
    # -- rejection
    "rejection/sampled": "Rationales sampled in the round (stage `reject`, a line for each round).",
    "rejection/kept": "Those of them that are kept, and learnt.",
    "rejection/kept_share": "Share of the questions of which at least one is kept.",
    "rejection/solved_share": "Share of the questions of which at least one led the frozen LM to a "
    "right answer, whether or not it passed the filters.",
    "rejection/pass_at_*": "Mean probability that of so many samples of a question at least one is "
    "right: the unbiased estimate (Chen et al. 2021), over questions whose samples were all "
    "judged.",
    "rejection/reward_kept": "Mean reward of the kept rationales.",
    # -- frozen
    "frozen/requests": "Requests to the frozen LM.",
    "frozen/cache_hit_rate": "Share of them that the cache answered.",
    "frozen/tokens": "Tokens that the frozen LM read and wrote for the other requests.",
    # -- speed
    "speed/run": "Response tokens sampled per second of the step: the run as a whole.",
    "speed/rollout": "Response tokens per second from the batch's opening to its last rationale, "
    "all rollout actors together.",
    "speed/learner": "Response tokens learnt per second of learning, all learners together.",
    "speed/read": "Distillation: tokens of prompts and rationales, padding left out, per second of "
    "learning.",
    "speed/frozen": "Tokens read and written per second of work, for each of the frozen LM's "
    "actors.",
    # -- seconds
    "seconds/step": "The step from end to end: `publish` + `wait` + `learn`.",
    "seconds/publish": "Until the learners had published their weights and the next batches were "
    "opened.",
    "seconds/wait": "Until the step's batch was judged, while the learner waits.",
    "seconds/learn": "The learners' step.",
    "seconds/validate": "Distillation: a validation, with writing the policy if it is the best.",
    "seconds/sample": "From the batch's opening to its last rationale; may lie before the step.",
    "seconds/judge": "From there to its last judgement; may lie before the step.",
    "seconds/driver": "CPU time of the driver in the step.",
    "seconds/recovery": "Longest time that a lost actor or learner took to return, so far.",
    # -- idle
    "idle/rollout": "Share of the step in which rollout actors had no work.",
    "idle/reward": "The same of the reward actors.",
    "idle/frozen": "The same of the frozen LM's actors.",
    "idle/learner": "The same of the learners: `seconds/wait` over `seconds/step`.",
    # -- queue
    "queue/sample": "Units that wait for a rollout actor at the end of the step.",
    "queue/judge": "Units that wait for a reward actor.",
    "queue/learn": "Judged batches that wait for the learner.",
    # -- health
    "health/lost_units": "Failed attempts at units, so far in this stage.",
    "health/actor_restarts": "Actors that came back after a loss, so far.",
    "health/learner_restarts": "Restarts of the learners, so far.",
    # -- memory
    "memory/driver": "Memory of the driver in MiB, without shared memory.",
    "memory/rollout": "Memory of the rollout actors on the driver's node in MiB, without shared "
    "memory; those of other runs there count too.",
    "memory/reward": "The same of the reward actors.",
    "memory/frozen": "The same of the frozen LM's actors.",
    "memory/learner": "The same of the learners.",
    "memory/object_store": "Used part of the cluster's object store, in MiB.",
    "memory/node_share": "Used share of the memory of the driver's node.",
    # -- alarm
    "alarm/*": "1 while the alarm NAME is raised, else 0; see below.",
}
"""Each metric's description, by its name or a pattern of names."""

GROUPS = {
    "evaluation": "Evaluation",
    "reward": "Reward and its parts",
    "kl": "KL to the reference",
    "loss": "Losses",
    "policy": "The policy's update",
    "sampler": "Sampler and learner",
    "value": "The critic",
    "optimiser": "The optimiser",
    "response": "Rationales",
    "answer": "The frozen LM's answers",
    "batch": "The step's batch",
    "filter": "Questions that are left out",
    "curriculum": "Questions that rest",
    "rejection": "Rejection sampling",
    "frozen": "The frozen LM",
    "speed": "Tokens per second",
    "seconds": "Seconds",
    "idle": "Idle shares",
    "queue": "Queues",
    "health": "Losses and restarts",
    "memory": "Memory",
    "alarm": "Alarms",
}
"""The tables of the page, in its order; ``component`` and ``penalty`` are with the reward."""

VARYING = ("seconds/", "idle/", "queue/", "speed/", "memory/", "health/", "alarm/idle")
"""Prefixes of metrics that may differ between runs with the same seed (timing, memory, health)."""


def describe(name: str) -> str:
    """A metric's description; empty if the metric is not known."""
    found = CATALOGUE.get(name)
    if found is not None:
        return found
    return next((text for key, text in CATALOGUE.items() if fnmatchcase(name, key)), "")


def tables() -> str:
    """The metrics as Markdown tables, one for each group."""
    parts = []
    for group, title in GROUPS.items():
        members = [name for name in CATALOGUE if _group(name) == group]
        rows = [f"| `{name.replace('*', 'NAME')}` | {CATALOGUE[name]} |" for name in members]
        parts.append("\n".join([f"### {title}", "", "| metric | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _group(name: str) -> str:
    group = name.partition("/")[0]
    return "reward" if group in ("component", "penalty") else group


if __name__ == "__main__":
    print(tables(), end="")
