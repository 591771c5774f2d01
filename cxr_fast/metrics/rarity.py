"""Mean AUC and average precision by how frequent a class is: head, medium and tail, as in the CXR-LT challenges."""

from __future__ import annotations

import numpy as np

from .figures import auc, average_precision, macro, prevalence

# Head: more than a tenth of the known labels are positive; tail: less than a hundredth; medium: between.
HEAD, TAIL = 0.10, 0.01
GROUPS = ("head", "medium", "tail")
BORDERS = {
    "head": f"more than {100 * HEAD:g} % positive",
    "medium": f"{100 * TAIL:g} to {100 * HEAD:g} % positive",
    "tail": f"less than {100 * TAIL:g} % positive",
}


def class_groups(labels: np.ndarray) -> np.ndarray:
    """The group of each class, (C,) of GROUPS, by its share of positives among known labels (N, C)."""
    share = np.nan_to_num(prevalence(labels))
    return np.where(share > HEAD, "head", np.where(share < TAIL, "tail", "medium"))


def group_maps(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float | int]:
    """mAP of each group of classes and how many classes with both signs it is a mean of: `head_map`, `head_classes`,
    ...; labels (N, C) with 1, 0, -1 unknown, scores (N, C) of any scale.

    `groups` (C,) are those of `class_groups`, by default of these very labels. NaN where a group has no such class.
    """
    found, group = average_precision(labels, scores), class_groups(labels) if groups is None else groups
    out: dict[str, float | int] = {}
    for name in GROUPS:
        mean, count = macro(found[group == name])
        out |= {f"{name}_map": mean, f"{name}_classes": count}
    return out


def group_means(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float | int]]:
    """Return `auc` and `map` of each of GROUPS that has classes, how many (`classes_total`), and how many of them have
    both signs in these labels (`classes_defined`); NaN where none has. Arguments as in `group_maps`."""
    areas, precisions = auc(labels, scores), average_precision(labels, scores)
    out: dict[str, dict[str, float | int]] = {}
    for name in GROUPS:
        chosen = groups == name
        if chosen.any():
            area, count = macro(areas[chosen])
            counts = {"classes_defined": count, "classes_total": int(chosen.sum())}
            out[name] = {**counts, "auc": area, "map": macro(precisions[chosen])[0]}
    return out
