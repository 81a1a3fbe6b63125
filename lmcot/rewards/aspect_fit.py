"""Fits aspects to human labels, and measures how well a score separates the labels.

Everything counts by question: folds keep a question's rationales together, and intervals
resample questions, because rationales of one question are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcot.errors import UserError
from lmcot.rewards.learned import LearnedAspect

Array = NDArray[np.float64]
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_FOLDS = 5
MIN_QUESTIONS = 10
"""Questions that each class must come from: two per fold."""


class UnfitLabels(UserError):
    """Labels from which nothing can be learned."""


def fit_aspect(features: Array, labels: Sequence[bool], questions: Sequence[str]) -> LearnedAspect:
    """Logistic regression (L2) on standardised features, with its out-of-fold AUC.

    Args:
        features: shape (labels, features), finite.
        labels: whether each rationale is good in this respect.
        questions: the id of each rationale's question.

    Raises:
        UnfitLabels: if a class is missing or comes from too few questions.
        UserError: if scikit-learn is not installed.
    """
    y = np.asarray(labels, dtype=bool)
    _check_classes(y, questions)
    scores = out_of_fold(features, labels, questions)
    fitted = _fitted(features, y, _strength(features, y, np.asarray(questions)))
    scaler, regression = fitted[0], fitted[-1]
    return LearnedAspect(
        mean=tuple(scaler.mean_.tolist()),
        scale=tuple(scaler.scale_.tolist()),
        coef=tuple(regression.coef_[0].tolist()),
        intercept=float(regression.intercept_[0]),
        auc=auc(scores, labels),
        auc_interval=auc_interval(scores, labels, questions),
        labels=len(labels),
        questions=len(set(questions)),
    )


def out_of_fold(features: Array, labels: Sequence[bool], questions: Sequence[str]) -> Array:
    """The probability that a model fitted without a rationale's question gives it: shape (n,).

    The strength of the penalty is chosen inside each fold's training questions.
    """
    y, groups = np.asarray(labels, dtype=bool), np.asarray(questions)
    scores = np.zeros(len(y))
    for train, test in folds(y, groups):
        strength = _strength(features[train], y[train], groups[train])
        fitted = _fitted(features[train], y[train], strength)
        scores[test] = fitted.predict_proba(features[test])[:, 1]
    return scores


def folds(labels: NDArray[np.bool_], questions: NDArray[Any]) -> list[tuple[Any, Any]]:
    """Five splits into training and test indices, balanced; no question is in both."""
    splitter = _sklearn().model_selection.StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=0)
    return list(splitter.split(np.zeros(len(labels)), labels, questions))


def auc(scores: Sequence[float] | Array, labels: Sequence[bool]) -> float:
    """Area under the ROC curve: the share of pairs in which the good one scores higher; ties count
    half."""
    wins = _wins(np.asarray(scores), np.asarray(labels, dtype=bool))
    return float(wins.mean())


def auc_interval(
    scores: Sequence[float] | Array,
    labels: Sequence[bool],
    questions: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95% percentile interval of the AUC by a bootstrap that resamples questions.

    A resample without both classes has no AUC and is left out.
    """
    y = np.asarray(labels, dtype=bool)
    wins = _wins(np.asarray(scores), y)
    names, group = np.unique(np.asarray(questions), return_inverse=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    good, bad = drawn[:, group[y]].astype(float), drawn[:, group[~y]].astype(float)
    pairs = good.sum(1) * bad.sum(1)
    won = np.einsum("rg,gb,rb->r", good, wins, bad, optimize=True)
    values = won[pairs > 0] / pairs[pairs > 0]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _wins(scores: Array, labels: NDArray[np.bool_]) -> Array:
    """1, 1/2 or 0 for each good rationale against each bad one: shape (good, bad)."""
    difference = scores[labels][:, None] - scores[~labels][None, :]
    wins: Array = (np.sign(difference) + 1) / 2
    return wins


def _check_classes(labels: NDArray[np.bool_], questions: Sequence[str]) -> None:
    for value in (True, False):
        found = {question for question, y in zip(questions, labels, strict=True) if y == value}
        if len(found) < MIN_QUESTIONS:
            raise UnfitLabels(
                f"only {len(found)} questions are labelled {str(value).lower()}, but "
                f"{MIN_QUESTIONS} of true and of false each are needed: label more"
            )


def _strength(features: Array, labels: NDArray[np.bool_], questions: NDArray[Any]) -> float:
    """The inverse penalty C whose out-of-fold probabilities have the least log-loss."""
    splits = folds(labels, questions)

    def loss(strength: float) -> float:
        total = 0.0
        for train, test in splits:
            fitted = _fitted(features[train], labels[train], strength)
            given = fitted.predict_proba(features[test])[np.arange(len(test)), labels[test] * 1]
            total -= float(np.log(np.maximum(given, 1e-12)).sum())
        return total

    return min(_STRENGTHS, key=loss)


def _fitted(features: Array, labels: NDArray[np.bool_], strength: float) -> Any:
    sklearn = _sklearn()
    regression = sklearn.linear_model.LogisticRegression(C=strength, max_iter=1000)
    scaler = sklearn.preprocessing.StandardScaler()
    return sklearn.pipeline.make_pipeline(scaler, regression).fit(features, labels)


def _sklearn() -> Any:
    """scikit-learn, which is imported here because only fitting needs it."""
    try:
        import sklearn.linear_model
        import sklearn.model_selection
        import sklearn.pipeline
        import sklearn.preprocessing
    except ImportError:
        raise UserError(
            "fitting aspects needs scikit-learn: run pip install 'lmcot[aspects]'"
        ) from None
    return sklearn
