"""Two model files on the same labelled films: differences with paired intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..metrics.rarity import class_groups
from ..report.class_means import rarity_classes
from ..report.comparison import SCHEMA, describe_differences
from ..report.evaluation import LEVEL
from ..training.run_folder import clean
from .evaluation import FigureSpec, Source
from .films import Answers

Side = tuple[Source, Answers]


def compare_models(a: Side, b: Side, names: tuple[str, str], spec: FigureSpec) -> dict[str, Any]:
    """Compare B with A on the films that both answered and the classes that both have, by paired bootstrap over groups;
    the keys of `report.comparison.compare_runs`, and `classes_of_one`: classes that only one model has.

    Raises InputError where no film or no class is common, and where all films are of one group.
    """
    one, two = a[0], b[0]
    common = [name for name in one.matched.names if name in two.matched.names]
    if not common:
        raise InputError(f"{names[0]} and {names[1]} have no class of these films in common; evaluate each alone.")
    rows = a[1].answered & b[1].answered
    scored, other = one.score(a[1], rows), two.score(b[1], rows)
    here, there = ([side.matched.names.index(name) for name in common] for side in (one, two))
    labels = scored.labels[:, here]
    both = type(scored)(of=scored.of, labels=labels, probs=scored.probs[:, here], columns=scored.columns)
    sides = ((both.probs, one.limits[here]), (other.probs[:, there], two.limits[there]))
    kinds = class_groups(labels)
    figures = describe_differences(both, sides, common, kinds, spec.resampling)
    figures["rarity_classes"] = rarity_classes(labels, kinds, common)
    found: dict[str, Any] = {"schema": SCHEMA, "a": names[0], "b": names[1], "part": "external"}
    found |= {f"provenance_{key}": side.predictor.warning for key, side in (("a", one), ("b", two))}
    found |= {"level": LEVEL, "resamples": spec.resamples, "seed": spec.seed, "unit": "group"}
    found |= {"images": int(rows.sum()), "groups": len(set(scored.columns["group"].tolist()))}
    found |= {"only_a": int(np.sum(a[1].answered & ~rows)), "only_b": int(np.sum(b[1].answered & ~rows))}
    found["classes_of_one"] = sorted(set(one.matched.names) ^ set(two.matched.names))
    return dict(clean(found | figures))
