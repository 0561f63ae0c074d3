"""Can a classifier tell the guide's draws from exact ones?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .estimate import Estimate, evenly, scaled

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["c2st"]

C2ST_DRAWS = 2000  # of each kind: the null sd of the accuracy is then .008


def c2st(tree: DataTree, reference: DataTree) -> Estimate:
    """Classifier two-sample test: cross-validated accuracy in telling the guide's draws from exact.

    The better of two classifiers, each over five folds on 2,000 draws of each kind in sds of the
    reference: a quadratic logistic regression (location, scale, correlation) and boosted trees
    (shape, modes). A half means indistinguishable; the Bayes classifier would reach (1 + TV) / 2.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2017)
        https://arxiv.org/abs/1610.06545
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler
    from threadpoolctl import threadpool_limits

    quadratic = make_pipeline(
        PolynomialFeatures(2, include_bias=False), StandardScaler(), LogisticRegression()
    )
    classifiers = (quadratic, HistGradientBoostingClassifier(random_state=0))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    values, count = [], 0
    for a, b in zip(*scaled(tree, reference), strict=True):
        count = min(C2ST_DRAWS, len(a), len(b))
        both = np.concatenate([evenly(a, count), evenly(b, count)])
        label = np.repeat([0, 1], count)
        # one thread: OpenMP threads that wait for one another are a hundred times slower on a
        # machine that has other work to do
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.filterwarnings("ignore", category=UserWarning)  # convergence of the logistic
            scores = [cross_val_score(c, both, label, cv=folds).mean() for c in classifiers]
        values.append(max(scores))
    accuracy = np.array(values)
    return Estimate(accuracy, np.sqrt(accuracy * (1 - accuracy) / (2 * count)))
