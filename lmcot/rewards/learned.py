"""Learned aspects: logistic regression that was fitted to human labels, stored as JSON.

`lmcot.rewards.aspect_fit` fits it. Prediction needs no library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from lmcot.config import Aspect
from lmcot.config.base import Fraction, PositiveFloat, PositiveInt, Settings
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.storage import local_path

_Number = Annotated[float, Field(allow_inf_nan=False)]


class LearnedAspect(Settings):
    """Logistic regression on standardised features, and its accuracy on unseen questions."""

    mean: tuple[_Number, ...]
    """Mean of each feature in the labels."""
    scale: tuple[PositiveFloat, ...]
    """Standard deviation of each feature in the labels."""
    coef: tuple[_Number, ...]
    """Weight of each standardised feature."""
    intercept: _Number
    """Log-odds at the mean of all features."""
    auc: Fraction
    """Area under the ROC curve, out of fold; a question's rationales are in one fold."""
    auc_interval: tuple[Fraction, Fraction]
    """95% interval of the AUC, by a bootstrap that resamples questions."""
    labels: PositiveInt
    """Number of labelled rationales."""
    questions: PositiveInt
    """Number of questions that the labels belong to."""

    def probability(self, features: Sequence[float]) -> float:
        """``1 / (1 + exp(-(b + sum_k w_k (x_k - mean_k) / scale_k)))``, in [0, 1]."""
        terms = zip(features, self.mean, self.scale, self.coef, strict=True)
        odds = self.intercept + math.fsum((x - m) / s * w for x, m, s, w in terms)
        # By whichever exponential does not overflow.
        return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))


class LearnedModel(Settings):
    """The file that ``lmcot aspects fit`` writes."""

    format: Literal[1] = 1
    """Version of this file format."""
    features: tuple[str, ...] = Field(min_length=1)
    """Names of the features, in order (`lmcot.rewards.aspects.AspectMeter.columns`)."""
    frozen: str | None = None
    """Identity of the frozen LM that judged, if any feature is its judgement."""
    aspects: dict[Aspect, LearnedAspect] = Field(min_length=1)
    """The fitted aspects, by name."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> LearnedModel:
        for name, one in self.aspects.items():
            if {len(one.mean), len(one.scale), len(one.coef)} != {len(self.features)}:
                raise ValueError(f"aspect '{name}' has not one mean, scale and coef per feature")
        return self

    def predict(self, aspect: Aspect, features: Mapping[str, float]) -> float:
        """The probability that a rationale with these features is good in this respect."""
        return self.aspects[aspect].probability([features[name] for name in self.features])

    def check_frozen(self, identity: str | None) -> None:
        """Refuses a frozen LM other than the one whose judgements the model was fitted to.

        Raises:
            UserError: naming both.
        """
        if self.frozen is not None and identity != self.frozen:
            raise UserError(
                f"the learned aspects were fitted to the judgements of '{self.frozen}', but the "
                f"frozen LM is '{identity}': fit them again ('lmcot aspects fit') or use that LM"
            )


def load_learned(path: str | Path) -> LearnedModel:
    """Reads a model file.

    Raises:
        UserError: if the file does not exist or is not such a file.
    """
    try:
        return LearnedModel.model_validate_json(local_path(path).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the learned aspects' file '{path}' cannot be read ({reason}): give the file that "
            "'lmcot aspects fit' wrote"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise UserError(
            f"'{path}' is not a file that 'lmcot aspects fit' wrote ({where}: {problem['msg']}): "
            "fit the aspects again"
        ) from None


def save_learned(model: LearnedModel, path: Path) -> None:
    """Writes a model file, complete or not at all."""
    write_atomically(path, model.model_dump_json(indent=1) + "\n")
