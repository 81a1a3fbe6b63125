"""Settings of what a run shows while it works, and what it warns about."""

from __future__ import annotations

from pydantic import Field

from lmcot.config.base import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Settings


class AlarmSettings(Settings):
    """Limits beyond which a person would want to know. Unset (null) switches an alarm off.

    Metrics that are noisy from step to step are compared by their mean over the last steps.
    """

    kl_above: PositiveFloat | None = 50.0
    """KL to the reference, nats per rationale, of one step: the policy runs away from it."""
    kl_below: float | None = Field(default=-0.5, lt=0)
    """Mean KL to the reference, nats per rationale: if it stays below 0, the policy does not sample
    from the distribution that it is scored under."""
    entropy_below: PositiveFloat | None = 0.02
    """Mean entropy, nats per token: the policy writes the same for every question."""
    equal_groups_above: Fraction | None = 0.9
    """Mean share of the questions whose rationales all have one reward: nothing is learnt from
    them."""
    filled_share_below: Fraction | None = 0.5
    """Mean number of questions that steps learnt from, as a share of those that they want, where
    ``refine.filter`` leaves some out."""
    cut_share_above: Fraction | None = 0.5
    """Mean share of the rationales that were cut at ``policy.max_new_tokens``."""
    empty_answers_above: Fraction | None = 0.1
    """Mean share of the frozen LM's replies that hold no answer."""
    cut_answers_above: Fraction | None = 0.5
    """Mean share of the frozen LM's replies that were cut before they gave their answer."""
    failed_share_above: Fraction | None = 0.05
    """Share of a step's rationales that could not be judged."""
    sampler_kl_above: PositiveFloat | None = 0.02
    """Mean KL between sampler and learner, nats per token: their arithmetic differs, or the
    sampler's policy was too old."""
    effective_sample_size_below: Fraction | None = 0.5
    """Mean effective sample size of the importance weights, as a share of the tokens: a few tokens
    outweigh the others, since the sampler's policy was too old."""
    clip_fraction_above: Fraction | None = 0.5
    """Mean share of the tokens whose ratio was clipped: the policy moves too far within a step."""
    idle_learner_above: Fraction | None = 0.5
    """Mean share of the time that the learner waits for rationales, where both overlap
    (``refine.max_staleness`` of 1 or more)."""
    idle_rollout_above: Fraction | None = 0.5
    """Mean share of the time that the rollout actors have no work, where both overlap."""
    not_finite: bool = True
    """Metrics that are not finite, and updates that were skipped for that reason."""


class MonitorSettings(Settings):
    """TensorBoard, Ray's metrics (Prometheus) and alarms."""

    ray_metrics: bool = True
    """Also publish the metrics as Ray metrics, for Prometheus to read."""
    histograms_every: NonNegativeInt = 5
    """Steps between two histograms in TensorBoard; 0: none."""
    samples_every: NonNegativeInt = 10
    """Steps between two sets of rationales shown as text in TensorBoard; 0: none."""
    samples: PositiveInt = 3
    """Number of rationales in each set."""
    alarms: AlarmSettings = AlarmSettings()
    """Limits beyond which a step's metrics raise an alarm."""
