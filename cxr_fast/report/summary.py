"""What a report is made of: a run's description, its evaluation and its history, and the summary of the three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.labels import describe_rules
from ..metrics import calibration
from ..metrics.figures import HEADLINE
from ..metrics.intervals import FEW as BEHIND
from ..system.text import Figure, counted
from ..training.operating_points import describe_two_means

# run.json, an evaluation, a comparison, or a part of one.
Record = Mapping[str, Any]

PARTS = {"train": "Training", "out_of_fold": "Validation (out of fold)", "holdout": "Hold-out"}
PARTS |= {"external": "These films"}  # those of `evaluate`, which no run has
# The headline figures as rows of a table.
FIGURES = {key: name if name == "mAP" else name[0].upper() + name[1:] for key, name in HEADLINE.items()}
FIGURES |= {key: f"{FIGURES[key]}, lower is better" for key in ("brier", "ece")}
FEW = 10
BEST = 5
TIERS = {
    "excellent": "AUC 0.85 or more",
    "good": "0.70 to 0.85",
    "fair": "0.60 to 0.70",
    "poor": "below 0.60",
    "insufficient data": "no positive or no negative",
}
LACKING = "insufficient data"
# The bootstrap sums in another order than `headline`.
ROUNDING = 1e-12


def as_figure(found: Record | None, digits: int = 3, *, signed: bool = False) -> Figure:
    """A figure of an evaluation (value, and perhaps low and high) as a cell of a table; None is undefined.

    Where the interval is over fewer classes than the value, the cell says over how many, and their mean.
    """
    found = found or {"value": None}
    value, over = found["value"], found.get("over") or {"classes": None, "value": None}
    other = value is not None and over["value"] is not None and abs(over["value"] - value) > ROUNDING
    return Figure(
        value=value,
        low=found.get("low"),
        high=found.get("high"),
        digits=digits,
        signed=signed,
        over=over["classes"] if other else None,
        over_value=over["value"] if other else None,
    )


def of_classes(part: Record) -> str:
    """`33 of 35`: how many classes a mean is taken over."""
    return f"{part['classes_defined']} of {part['classes_total']}"


def behind_intervals(part: Record) -> str:
    """`11 of 14`: how many classes the interval of a mean is over; empty where there is none."""
    over = part["figures"].get("macro_auc", {}).get("over")
    return f"{over['classes']} of {over['classes'] + len(over['left_out'])}" if over else ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a page or a card of one run may say; `evaluation` None where the predictions could not be judged.

    `title` is the run folder's name; `files` are its model files, by `settings.model_files`; `missing` are lines about
    what is not there and why; `unknown_labels` None where the labels could not be read.
    """

    run: Record
    evaluation: Record | None
    history: Sequence[Record] = ()
    missing: Sequence[str] = ()
    unknown_labels: int | None = None
    plots: Mapping[str, bytes] = field(default_factory=dict)
    title: str = ""
    files: Sequence[Record] = ()

    @property
    def label_rules(self) -> str:
        """How blank and uncertain labels counted, as a sentence; empty where the data set had no such choice."""
        return describe_rules(self.run["cache"]["dataset"])

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.run["cache"]["dataset"]["name"])

    @property
    def warning(self) -> str:
        """What must be said in red; empty where the figures are about real radiographs and real weights."""
        if not self.run["provenance"]:
            return ""
        said = str(self.run["provenance"])
        return f"{said[0].upper()}{said[1:]}: no figure here says anything about real radiographs or real BiomedCLIP."

    @property
    def parts(self) -> Record:
        """Figures of training, validation and hold-out, as far as the run has them."""
        return {} if self.evaluation is None else self.evaluation["parts"]

    @property
    def named_parts(self) -> Record:
        """`parts` in the order of PARTS, by their titles."""
        return {title: self.parts[name] for name, title in PARTS.items() if self.parts.get(name)}

    @property
    def groupings(self) -> Record:
        """Figures of each view and of each subgroup, by what they are divided by."""
        if self.evaluation is None:
            return {}
        found = {"View": self.evaluation["views"], **self.evaluation["subgroups"]}
        return {title: parts for title, parts in found.items() if parts}

    @property
    def groups_are_studies(self) -> bool:
        """Whether every group counts as one study."""
        studies = {} if self.evaluation is None else self.evaluation["studies"]["parts"]
        return all(part["n"] == part["groups"] for part in studies.values())

    @property
    def calibrated(self) -> str:
        """How the probabilities were calibrated; empty where they were not."""
        fitted = self.run["calibration"]
        return calibration.describe(fitted, len(self.run["classes"])) if fitted else ""

    @property
    def two_means(self) -> Record | None:
        """Macro AUC out of fold, pooled and as the mean of the folds; None where there is none."""
        return None if self.evaluation is None else self.evaluation.get("out_of_fold_auc")

    @property
    def two_means_text(self) -> str:
        """The same as a sentence."""
        return describe_two_means(self.two_means) if self.two_means else ""

    @property
    def old_validation(self) -> str:
        """The history's arithmetic, in a run of an earlier version whose other tables are of another; else empty."""
        if "validated_in" in self.run or self.run["precision"] == "float32":
            return ""
        said = f"validated in {self.run['precision']}, as this run was trained"
        return f"{said}; the tables of folds and budgets are of float32"

    @property
    def rows(self) -> Sequence[Record]:
        """One row per class; none without an evaluation."""
        return [] if self.evaluation is None else self.evaluation["per_class"]

    @property
    def judged_on(self) -> str:
        """What the rows of classes are figures of, as a word of a title."""
        of = None if self.evaluation is None else self.evaluation["per_class_of"]
        words = {"holdout": "the hold-out", "out_of_fold": "validation, out of fold", "train": "training images"}
        words |= {"external": "these films"}
        return words.get(str(of), str(of))

    @property
    def confidence(self) -> str:
        """How the intervals were made, as a sentence."""
        made = self.evaluation
        if made is None or not made["resamples"]:
            return ""
        return (
            f"In brackets: {100 * made['level']:.0f} % intervals of {made['resamples']:,} bootstrap resamples of "
            f"{made['unit']}s (all images of a {made['unit']} together), widened for few {made['unit']}s (Hesterberg "
            f"2015); seed {made['seed']}. The interval of a mean is over one set of classes, those with positives and "
            f"negatives in at least {BEHIND} {made['unit']}s; where that leaves classes out, how many are left and "
            "their mean stand before it."
        )

    def summary(self) -> list[str]:
        """Three sentences: what was trained, how well it does, and how far that can be trusted."""
        return [self._trained(), self._found(), self._trust()]

    def _trained(self) -> str:
        run = self.run
        images, chosen = run["images"], run["chosen"]
        views = (
            "; each score is the mean of both views, plain and mirrored" if run["train"].get("tta") == "flip" else ""
        )
        return (
            f"{images['used']:,} images of {images['groups']:,} groups, {len(run['classes'])} classes, "
            f"{run['trainable']['total']:,} trained parameters: the search chose "
            f"{counted(chosen['epochs'], 'epoch')} and fold {chosen['fold'] + 1}, on validation alone, and the final "
            "model is "
            f"{FINALS.get(run['final']['kind'], run['final']['kind'])}{views}."
        )

    def _found(self) -> str:
        if part := self.parts.get("holdout"):
            start = f"On the {part['n']:,} held-out images, which took no part in any choice,"
        elif part := self.parts.get("out_of_fold"):
            start = f"There is no hold-out; on the {part['n']:,} images scored out of fold, which also chose the model,"
        else:
            return "The saved predictions could not be judged, so there are no figures."
        figures = part["figures"]
        named = {"macro_auc": "macro AUC", "map": "mAP", "macro_f1": "macro F1"}
        found = [f"{name} is {as_figure(figures[key])}" for key, name in named.items()]
        found[0] += f" over {of_classes(part)} classes"
        return f"{start} {_listed(found)}."

    def _trust(self) -> str:
        if not self.rows:
            return "Classes: no figures."
        if len(self.rows) == 1:
            return f"Its one class has {self.rows[0]['positives']:,} positives there: {self.rows[0]['tier']}."
        few = self.frequent()
        if not few:
            return f"Of {len(self.rows)} classes, {self._tiers()}; none has {FEW} positives there, too few to judge."
        rare = len(self.rows) - len(few)
        other = f", and {rare} {'have' if rare > 1 else 'has'} too few to judge alone" if rare else ""
        mean = f"over the {len(few)} with at least {FEW} positives there the mean AUC is "
        mean += str(Figure(value=self.frequent_auc()))
        return f"Of {len(self.rows)} classes, {self._tiers()}; {mean}{other}."

    def tier_counts(self) -> list[str]:
        """How many classes are in each tier: `6 excellent (AUC 0.85 or more)`."""
        tiers = [row["tier"] for row in self.rows]
        return [f"{tiers.count(tier)} {tier} ({meaning})" for tier, meaning in TIERS.items()]

    def _tiers(self) -> str:
        """`6 are excellent, 8 good and 7 without the positives or negatives for an AUC`."""
        tiers = [str(row["tier"]) for row in self.rows]
        (first, count), *others = ((tier, tiers.count(tier)) for tier in TIERS if tier in tiers)
        words = [f"{count} {'are' if count > 1 else 'is'} {first}", *(f"{n} {tier}" for tier, n in others)]
        words[-1] = words[-1].replace(LACKING, "without the positives or negatives for an AUC")
        return _listed(words)

    def frequent(self) -> list[Record]:
        """The rows of classes with at least FEW positives."""
        return [row for row in self.rows if row["positives"] >= FEW]

    def frequent_auc(self) -> float | None:
        """Mean AUC of those classes."""
        values = [row["auc"]["value"] for row in self.frequent() if row["auc"]["value"] is not None]
        return sum(values) / len(values) if values else None

    def ranked(self) -> list[Record]:
        """The rows of classes, best AUC first, undefined ones last."""
        return sorted(
            self.rows, key=lambda row: -1.0 if row["auc"]["value"] is None else row["auc"]["value"], reverse=True
        )

    def best_and_worst(self) -> tuple[list[Record], list[Record]]:
        """Up to five classes of highest AUC, best first, and up to five others of lowest, worst first.

        Of those with at least FEW positives, where there are any: an AUC of one positive leads by luck.
        """
        known = [row for row in self.ranked() if row["auc"]["value"] is not None]
        known = [row for row in known if row["positives"] >= FEW] or known
        best = known[: min(BEST, -(-len(known) // 2))]
        return best, known[len(best) :][::-1][:BEST]


FINALS = {
    "best-fold": "the best fold's",
    "refit": "one trained on all folds' images",
    "ensemble": "the mean of the folds' models",
    "retrained": "the mean of the folds' models, their heads trained again",
}


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
