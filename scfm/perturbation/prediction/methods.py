"""Predictors of changes of expression: three trivial ones, a bilinear ridge, and a ridge on features of the model."""

# Axes: P perturbations, Q perturbations to predict, G genes, F features, K components.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scfm.perturbation.prediction.measured import Measured

Targets = Sequence[tuple[str, ...]]
Predictor = Callable[[Measured, Targets], NDArray[np.float64]]

PENALTIES = tuple(10.0 ** np.arange(-3, 4))


def no_change(measured: Measured, targets: Targets) -> NDArray[np.float64]:
    return np.zeros((len(targets), len(measured.genes)))


def train_mean(measured: Measured, targets: Targets) -> NDArray[np.float64]:
    return np.tile(measured.change_PG.mean(0), (len(targets), 1))


def additive(measured: Measured, targets: Targets) -> NDArray[np.float64]:
    """Return the sum of the single changes; a gene that was not measured alone has the mean change of single genes."""
    alone: dict[str, NDArray[np.float64]] = {
        target[0]: change for target, change in zip(measured.targets, measured.change_PG) if len(target) == 1
    }
    other_G = np.mean(list(alone.values()), axis=0) if alone else measured.change_PG.mean(0)
    found = np.zeros((len(targets), len(measured.genes)))
    for row, target in enumerate(targets):
        for gene in target:
            found[row] += alone.get(gene, other_G)
    return found


def bilinear_ridge(
    measured: Measured, targets: Targets, *, n_components: int = 10, penalty: float = 0.1
) -> NDArray[np.float64]:
    """Return G W p + b, where G are the principal axes of the measured changes, and p the rows of G of the perturbed genes.

    Notes
    -----
    Ahlmann-Eltze, Huber and Anders 2025, Nature Methods, with their K and penalty. Genes outside the matrix have p = 0.
    """
    center_G = measured.change_PG.mean(0)
    centered_PG = measured.change_PG - center_G
    axes_GK = np.linalg.svd(centered_PG, full_matrices=False)[2][:n_components].T
    row_of = {gene: row for row, gene in enumerate(measured.genes)}

    def design(wanted: Targets) -> NDArray[np.float64]:
        rows = [
            sum((axes_GK[row_of[g]] for g in target if g in row_of), np.zeros(axes_GK.shape[1])) for target in wanted
        ]
        return np.stack(rows)

    train_PK, ridge = design(measured.targets), penalty * np.eye(axes_GK.shape[1])
    left = np.linalg.solve(axes_GK.T @ axes_GK + ridge, axes_GK.T @ centered_PG.T @ train_PK)
    weights_KK = np.linalg.solve(train_PK.T @ train_PK + ridge, left.T).T
    return design(targets) @ weights_KK.T @ axes_GK.T + center_G


def ridge_on_features(features: Mapping[str, NDArray[np.float64]]) -> Predictor:
    """Return a predictor: a ridge regression of changes on the features of the perturbed genes, and of interactions on
    products of features.

    Parameters
    ----------
    features
        Features of each gene, shape (F,), standardized over genes.
    """

    def predict(measured: Measured, targets: Targets) -> NDArray[np.float64]:
        singles = [row for row, target in enumerate(measured.targets) if len(target) == 1]
        pairs = [row for row, target in enumerate(measured.targets) if len(target) > 1]
        measured_alone = {measured.targets[row][0]: measured.change_PG[row] for row in singles}
        wanted = sorted(
            {gene for target in (*targets, *measured.targets) for gene in target if gene not in measured_alone}
        )
        if wanted and len(singles) > 2:
            train = np.stack([features[measured.targets[row][0]] for row in singles])
            guesses = ridge(train, measured.change_PG[singles], np.stack([features[gene] for gene in wanted]))
        else:
            guesses = np.tile(measured.change_PG.mean(0), (len(wanted), 1))
        alone = measured_alone | dict(zip(wanted, guesses))
        found = np.stack([np.sum([alone[gene] for gene in target], axis=0) for target in targets])
        together = [row for row, target in enumerate(targets) if len(target) > 1]
        if together and len(pairs) > 2:
            sums = np.stack([np.sum([alone[gene] for gene in measured.targets[row]], axis=0) for row in pairs])
            excess = measured.change_PG[pairs] - sums
            train = np.stack([_product(features, measured.targets[row]) for row in pairs])
            test = np.stack([_product(features, targets[row]) for row in together])
            found[together] += ridge(train, excess, test)
        return found

    return predict


def _product(features: Mapping[str, NDArray[np.float64]], target: tuple[str, ...]) -> NDArray[np.float64]:
    return np.prod([features[gene] for gene in target], axis=0)


def ridge(train_PF: NDArray, change_PG: NDArray, test_QF: NDArray) -> NDArray[np.float64]:
    """Ridge regression with an intercept, and the penalty with the smallest leave-one-out error, in closed form.

    Penalties are relative to the mean of the diagonal of the kernel.
    """
    center_F, center_G = train_PF.mean(0), change_PG.mean(0)
    x_PF, y_PG = train_PF - center_F, change_PG - center_G
    kernel_PP = x_PF @ x_PF.T
    unit = max(float(np.trace(kernel_PP)) / len(kernel_PP), 1e-12)
    values, vectors = np.linalg.eigh(kernel_PP)
    best: tuple[float, float] = (np.inf, PENALTIES[-1])
    for penalty in PENALTIES:
        shrink = values.clip(min=0) / (values.clip(min=0) + penalty * unit)
        # Fitting the intercept adds 1 / P to every leverage.
        hat_PP = (vectors * shrink) @ vectors.T + 1 / len(y_PG)
        left_out = (change_PG - center_G - (hat_PP - 1 / len(y_PG)) @ y_PG) / (1 - np.diag(hat_PP))[:, None].clip(
            min=1e-9
        )
        best = min(best, (float((left_out**2).sum()), penalty))
    weights_PG = np.linalg.solve(kernel_PP + best[1] * unit * np.eye(len(kernel_PP)), y_PG)
    return (test_QF - center_F) @ x_PF.T @ weights_PG + center_G


BASELINES: dict[str, Predictor] = {
    "no change": no_change,
    "train mean": train_mean,
    "additive": additive,
    "bilinear ridge": bilinear_ridge,
}
