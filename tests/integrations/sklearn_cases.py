"""What scikit-learn runs through joblib, one function each: all return what is to be the same under every backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import loguniform
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, LatentDirichletAllocation, SparseCoder
from sklearn.ensemble import (
    BaggingClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.experimental import enable_halving_search_cv, enable_iterative_imputer  # noqa: F401
from sklearn.feature_selection import RFECV
from sklearn.impute import IterativeImputer
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LassoCV, LogisticRegression, Ridge, SGDClassifier
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    StratifiedShuffleSplit,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn_data import breast_cancer, covertype_like, diabetes, digits

#: With how many workers the tests run; more by hand, with ``SHMPOOL_TEST_JOBS=4``.
JOBS = int(os.environ.get("SHMPOOL_TEST_JOBS") or 2)


class Case(NamedTuple):
    """A function to run under a backend, and whether that is to run it in processes."""

    run: Callable[[], Any]
    in_processes: bool


CASES: dict[str, Case] = {}


def case(*, in_processes: bool = True) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a case under its function's name."""

    def register(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[run.__name__] = Case(run, in_processes)
        return run

    return register


def tree(**parameters: Any) -> DecisionTreeClassifier:
    return DecisionTreeClassifier(max_depth=4, random_state=0, **parameters)


# ---- forests ---------------------------------------------------------------------------------------------------------


@case()
def random_forest_classifier() -> Any:
    x, y = digits()
    return RandomForestClassifier(40, random_state=0, oob_score=True, n_jobs=JOBS).fit(x, y)


@case()
def random_forest_of_a_large_set() -> Any:
    x, y = covertype_like()
    forest = RandomForestClassifier(
        6, max_depth=6, max_samples=2000, class_weight="balanced", random_state=0, n_jobs=JOBS
    )
    return forest.fit(x, y)


@case()
def random_forest_regressor() -> Any:
    x, y = diabetes()
    return RandomForestRegressor(12, random_state=0, n_jobs=JOBS).fit(x, y)


@case()
def extra_trees_classifier() -> Any:
    x, y = covertype_like()
    return ExtraTreesClassifier(6, max_depth=6, random_state=0, n_jobs=JOBS).fit(x, y)


@case()
def extra_trees_regressor() -> Any:
    x, y = diabetes()
    return ExtraTreesRegressor(12, random_state=0, n_jobs=JOBS).fit(x, y)


@case()
def isolation_forest() -> Any:
    x, _ = breast_cancer()
    return IsolationForest(n_estimators=8, random_state=0, n_jobs=JOBS).fit(x).decision_function(x)


@case(in_processes=False)  # votes are added up in one array: require="sharedmem"
def predictions_of_a_forest() -> Any:
    x, y = digits()
    rx, ry = diabetes()
    forest = RandomForestClassifier(8, random_state=0, n_jobs=1).fit(x, y).set_params(n_jobs=JOBS)
    regressor = RandomForestRegressor(8, random_state=0, n_jobs=1).fit(rx, ry)
    regressor.set_params(n_jobs=JOBS)
    # Floating-point sums in the order in which threads come: equal only up to that.
    return forest.predict(x), forest.predict_proba(x).round(9), regressor.predict(rx).round(9)


# ---- searches and validation -----------------------------------------------------------------------------------------


@case()
def grid_search() -> Any:
    x, y = breast_cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    grid = {"logisticregression__C": [0.01, 0.1, 1.0], "standardscaler__with_mean": [True, False]}
    return GridSearchCV(model, grid, cv=3, return_train_score=True, n_jobs=JOBS).fit(x, y)


@case()
def grid_search_of_a_large_set() -> Any:
    x, y = covertype_like()
    return GridSearchCV(GaussianNB(), {"var_smoothing": [1e-9, 1e-2]}, cv=2, n_jobs=JOBS).fit(x, y)


@case()
def halving_grid_search() -> Any:
    x, y = digits()
    grid = {"max_depth": [2, 4, 8], "min_samples_leaf": [1, 5]}
    search = HalvingGridSearchCV(tree(), grid, cv=3, factor=3, random_state=0, n_jobs=JOBS)
    return search.fit(x, y)


@case()
def randomized_search() -> Any:
    x, y = breast_cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    distributions = {"logisticregression__C": loguniform(1e-2, 1e1)}
    search = RandomizedSearchCV(
        model, distributions, n_iter=5, cv=3, scoring=["accuracy", "roc_auc"], refit="roc_auc",
        random_state=0, n_jobs=JOBS,
    )  # fmt: skip
    return search.fit(x, y)


@case()
def scores() -> Any:
    x, y = digits()
    return cross_val_score(tree(), x, y, cv=5, n_jobs=JOBS)


@case()
def several_scorers() -> Any:
    x, y = breast_cancer()
    return cross_validate(
        tree(), x, y, cv=4, scoring=["accuracy", "f1", "roc_auc", "neg_log_loss"],
        return_train_score=True, return_estimator=True, return_indices=True, n_jobs=JOBS,
    )  # fmt: skip


@case()
def cross_validated_predictions() -> Any:
    x, y = digits()
    probabilities = cross_val_predict(tree(), x, y, cv=3, method="predict_proba", n_jobs=JOBS)
    return probabilities, cross_val_predict(tree(), x, y, cv=3, n_jobs=JOBS)


@case()
def importance_by_permutation() -> Any:
    x, y = breast_cancer()
    return permutation_importance(tree().fit(x, y), x, y, n_repeats=2, random_state=0, n_jobs=JOBS)


@case()
def search_inside_of_validation() -> Any:
    x, y = breast_cancer()
    forest = RandomForestClassifier(4, max_depth=3, random_state=0, n_jobs=JOBS)
    search = GridSearchCV(forest, {"max_features": [2, 5]}, cv=2, n_jobs=JOBS)
    return cross_val_score(search, x, y, cv=2, n_jobs=JOBS)


@case()
def significance_by_permutation() -> Any:
    x, y = breast_cancer()
    return permutation_test_score(
        GaussianNB(), x, y, cv=2, n_permutations=6, random_state=0, n_jobs=JOBS
    )


@case()
def curves() -> Any:
    x, y = digits()
    sizes = learning_curve(tree(), x, y, train_sizes=[0.3, 0.6, 1.0], cv=2, n_jobs=JOBS)
    depths = validation_curve(
        tree(), x, y, param_name="max_depth", param_range=[1, 3, 5], cv=2, n_jobs=JOBS
    )
    return sizes, depths


@case()
def selection_of_features() -> Any:
    x, y = breast_cancer()
    return RFECV(tree(), step=6, cv=StratifiedShuffleSplit(3, random_state=0), n_jobs=JOBS).fit(
        x, y
    )


# ---- estimators made of others ---------------------------------------------------------------------------------------


@case()
def bagging() -> Any:
    x, y = digits()
    bags = BaggingClassifier(tree(), 8, max_features=0.5, random_state=0, n_jobs=JOBS).fit(x, y)
    return bags, bags.predict(x), bags.predict_proba(x)


@case()
def one_classifier_a_class() -> Any:
    x, y = digits()
    rest = OneVsRestClassifier(LinearSVC(random_state=0, max_iter=50, tol=1), n_jobs=JOBS)
    return rest.fit(x, y)


@case()
def one_classifier_a_pair_of_classes() -> Any:
    x, y = digits()
    return OneVsOneClassifier(GaussianNB(), n_jobs=JOBS).fit(x, y)


@case()
def stacking() -> Any:
    x, y = breast_cancer()
    layers = [("tree", tree()), ("bayes", GaussianNB())]
    stack = StackingClassifier(layers, LogisticRegression(), cv=3, n_jobs=JOBS).fit(x, y)
    return stack, stack.predict(x)


@case()
def voting() -> Any:
    x, y = breast_cancer()
    vote = VotingClassifier([("tree", tree()), ("bayes", GaussianNB())], n_jobs=JOBS).fit(x, y)
    return vote, vote.predict(x)


@case()
def calibration() -> Any:
    x, y = breast_cancer()
    return CalibratedClassifierCV(GaussianNB(), cv=3, n_jobs=JOBS).fit(x, y).predict_proba(x)


@case()
def columns() -> Any:
    x, _ = breast_cancer()
    parts = [("scaled", StandardScaler(), [0, 1, 2]), ("spanned", MinMaxScaler(), slice(3, 30))]
    return ColumnTransformer(parts, n_jobs=JOBS).fit_transform(x)


@case()
def union_of_features() -> Any:
    x, _ = digits()
    union = FeatureUnion([("pca", PCA(4, random_state=0)), ("span", MinMaxScaler())], n_jobs=JOBS)
    return union.fit_transform(x), union


@case()
def one_regressor_an_output() -> Any:
    x, _ = diabetes()
    return MultiOutputRegressor(Ridge(), n_jobs=JOBS).fit(x[:, 3:], x[:, :3])


@case()
def imputation_by_bags() -> Any:
    x, _ = diabetes()
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.05, np.nan, x)[:, :3]
    bags = BaggingRegressor(Ridge(), 4, random_state=0, n_jobs=JOBS)
    return IterativeImputer(bags, max_iter=1, tol=10, random_state=0).fit_transform(holes)


# ---- others ----------------------------------------------------------------------------------------------------------


@case()
def topics() -> Any:
    x, _ = digits()
    model = LatentDirichletAllocation(4, max_iter=3, random_state=0, n_jobs=JOBS)
    return model.fit_transform(x)


@case()
def sparse_codes() -> Any:
    x, _ = digits()
    coder = SparseCoder(x[:20], transform_n_nonzero_coefs=3, n_jobs=JOBS)
    return coder.transform(x[20:120])


@case()
def neighbours_in_a_tree() -> Any:
    x, y = breast_cancer()
    nearest = KNeighborsClassifier(algorithm="kd_tree", n_jobs=JOBS).fit(x, y)
    outliers = LocalOutlierFactor(10, algorithm="ball_tree", n_jobs=JOBS)
    return nearest.predict_proba(x), outliers.fit_predict(x), outliers.negative_outlier_factor_


@case(in_processes=False)  # compiled code, with threads of its own
def neighbours_by_brute_force() -> Any:
    x, y = digits()
    nearest = KNeighborsClassifier(algorithm="brute", n_jobs=JOBS).fit(x, y)
    outliers = LocalOutlierFactor(10, algorithm="brute", n_jobs=JOBS)
    return nearest.predict(x), outliers.fit_predict(x), outliers.negative_outlier_factor_


@case(in_processes=False)  # asks for backend="threading" by name
def distances() -> Any:
    x, _ = digits()
    return [
        pairwise_distances(x, metric=metric, n_jobs=JOBS)
        for metric in ("euclidean", "cosine", "manhattan")
    ]


@case(in_processes=False)  # the classes' weights are written into one array: require="sharedmem"
def stochastic_gradient_descent() -> Any:
    x, y = digits()
    return SGDClassifier(max_iter=5, tol=None, random_state=0, n_jobs=JOBS).fit(x, y)


@case()  # prefer="threads" is but a wish, and who names a backend has another
def path_of_coefficients() -> Any:
    x, y = diabetes()
    return LassoCV(cv=3, n_jobs=JOBS).fit(x, y)
