"""Settings of what a run shows of itself while it goes on, and of what it warns of."""

from __future__ import annotations

from pydantic import Field

from lmcot.config.base import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Settings


class AlarmSettings(Settings):
    """From where on a person would want to know. Unset (null) switches an alarm off.

    What is noisy from step to step is compared by its mean over the last ``window`` steps.
    """

    window: PositiveInt = 5
    """Steps that noisy metrics are averaged over."""
    clears_after: PositiveInt = 20
    """Steps without its cause after which an alarm clears; it may be told again then."""
    kl_above: PositiveFloat | None = 50.0
    """KL to the reference, nats per rationale, of one step: the policy runs away from it."""
    kl_below: float | None = Field(default=-0.5, lt=0)
    """Mean KL to the reference, nats per rationale: below 0 for long, the policy does not sample
    from the distribution that it is scored under."""
    entropy_below: PositiveFloat | None = 0.02
    """Mean entropy, nats per token: the policy writes the same whatever it is asked."""
    equal_groups_above: Fraction | None = 0.9
    """Mean share of the questions whose rationales all have one reward: nothing is learnt there."""
    cut_share_above: Fraction | None = 0.5
    """Mean share of the rationales that were cut at ``policy.max_new_tokens``."""
    empty_answers_above: Fraction | None = 0.1
    """Mean share of the frozen LM's replies that hold no answer."""
    cut_answers_above: Fraction | None = 0.5
    """Mean share of the frozen LM's replies that were cut before their answer was said."""
    failed_share_above: Fraction | None = 0.05
    """Share of a step's rationales that could not be judged."""
    sampler_kl_above: PositiveFloat | None = 0.02
    """Mean KL between what sampled the rationales and the learner, nats per token: their
    arithmetic differs, or the policy was too old."""
    idle_learner_above: Fraction | None = 0.5
    """Mean share of the time that the learner waits for rationales, where both overlap
    (``refine.max_staleness`` of 1 or more)."""
    idle_rollout_above: Fraction | None = 0.5
    """Mean share of the time that the rollout actors have no work, likewise."""
    not_finite: bool = True
    """Metrics that are no finite numbers, and updates that were skipped for that."""


class MonitorSettings(Settings):
    """TensorBoard, Ray's metrics (Prometheus) and alarms."""

    ray_metrics: bool = True
    """Give out the metrics as Ray's own too, for Prometheus to read."""
    histograms_every: NonNegativeInt = 5
    """Steps between two histograms in TensorBoard; 0: none."""
    samples_every: NonNegativeInt = 10
    """Steps between two looks at rationales as text in TensorBoard; 0: none."""
    samples: PositiveInt = 3
    """Rationales in one such look."""
    alarms: AlarmSettings = AlarmSettings()
    """From where on a step's metrics are worth a warning."""
