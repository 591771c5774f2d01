"""Every choice that changes a result, as frozen dataclasses with their defaults, to and from JSON.

Defaults live here and nowhere else: the command line reads them from these fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .errors import InputError, SchemaError

T = TypeVar("T")

# Statistics a backbone was trained with; BiomedCLIP uses OpenAI's, the published pipeline ImageNet's.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
# The config beside a set of weights, by which it is known: of open_clip; of timm and transformers.
WEIGHT_CONFIGS = ("open_clip_config.json", "config.json")
VIEWS = ("plain", "flip")
# At 2,048 pixels the attention scores of a film take 13 GB in each trained block of a ViT-B/16 (16,385 tokens).
IMAGE_SIZES = (8, 2048)

# What may be done to a film without a reader seeing it, in words: the yardstick of what fp16 and int8 may change.
JPEG_95, ONE_PIXEL = "jpeg_95", "one_pixel"
FILM_CHANGES = {JPEG_95: "JPEG 95", ONE_PIXEL: "one pixel"}

# Stands on every page, card, overlay and table that shows a figure or a probability.
NOTICE = "Research use only. Not a medical device; not for diagnosis or treatment."

# How the names of an unfinished file, and of the index of a cache in shards, end.
PARTIAL, SHARDS = ".partial", ".shards.json"


def to_dict(spec: Any) -> dict[str, Any]:
    """The fields of a spec as JSON-ready values."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(spec))))


def to_json(spec: Any) -> str:
    """Canonical JSON of a spec: sorted keys, no spaces; what `digest` hashes."""
    return json.dumps(dataclasses.asdict(spec), sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """sha256 (hex) of a spec, or of any JSON value, in canonical form."""
    if dataclasses.is_dataclass(value):
        text = to_json(value)
    else:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild a spec; lists become the tuples they were. Raises SchemaError on a field this version lacks."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise SchemaError(f"{cls.__name__} must be a JSON object, not {type(values).__name__}.")
    if extra := sorted(set(values) - known):
        raise SchemaError(f"{cls.__name__} has unknown field(s) {', '.join(extra)}: written by a newer cxr-fast.")
    try:
        return cls(**{name: _coerce(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise SchemaError(f"{cls.__name__} holds a value of the wrong type ({error}).") from error


def _coerce(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return None if value is None else _coerce(inner[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value)
    return float(value) if hint is float and isinstance(value, int) else value


def choices(cls: type, name: str) -> tuple[str, ...]:
    """The values a `Literal` field takes, in order; click's choices come from here."""
    hint = typing.get_type_hints(cls)[name]
    return tuple(str(arg) for arg in typing.get_args(hint))


def default(cls: type, name: str) -> Any:
    """The default of one field of a spec."""
    for f in dataclasses.fields(cls):
        if f.name == name:
            return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    raise KeyError(name)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_choices(spec: Any) -> None:
    for name, hint in typing.get_type_hints(type(spec)).items():
        if typing.get_origin(hint) is Literal and getattr(spec, name) not in typing.get_args(hint):
            allowed = ", ".join(str(arg) for arg in typing.get_args(hint))
            raise InputError(f"{_flag(name)}: {getattr(spec, name)!r} is not one of {allowed}.")


def _require(ok: bool, name: str, value: Any, need: str) -> None:
    if not ok:
        raise InputError(f"{_flag(name)}: {value!r} must be {need}.")


def _setting(default: Any, help: str) -> Any:
    """A field with the help that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How an image file becomes uint8 grey pixels (size, size); normalisation is part of the model.

    >>> PreprocessSpec(resize="pad").size
    224
    """

    size: int = 224
    resize: Literal["squash", "crop", "pad"] = _setting("squash", "How a film becomes a square.")
    dicom_policy: Literal["voi", "raw", "minmax"] = _setting("voi", "How DICOM intensities become grey levels.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(8 <= self.size <= 4096, "size", self.size, "between 8 and 4096")


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What decides the bytes of an activation file, together with the weights' hash.

    `image_size` is what is asked for; what a file was made with is `preprocess.size`.

    >>> CacheSpec(unfreeze_blocks=1, preprocess=PreprocessSpec(resize="crop")).views
    ('plain', 'flip')
    """

    weights: str = _setting("biomedclip", "biomedclip, a hub id, a local folder, or random:SEED[:timm_arch].")
    image_size: int | None = _setting(None, "Pixels a side of what the model sees.  [default: the model's own]")
    unfreeze_blocks: int = _setting(2, "Blocks left to train; 0 caches embeddings and trains the head alone.")
    views: tuple[str, ...] = _setting(VIEWS, "Views to cache: plain, or plain,flip.")
    normalize: Literal["model", "imagenet"] = _setting("model", "Channel statistics: the model's own, or ImageNet's.")
    dtype: Literal["float16", "float32"] = _setting("float16", "Stored precision.")
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)

    def __post_init__(self) -> None:
        _check_choices(self)
        size, low, high = self.image_size, *IMAGE_SIZES
        _require(size is None or low <= size <= high, "image_size", size, f"between {low} and {high}")
        _require(self.unfreeze_blocks >= 0, "unfreeze_blocks", self.unfreeze_blocks, "0 or more")
        known = set(self.views) <= set(VIEWS) and len(set(self.views)) == len(self.views)
        _require(known and self.views[:1] == ("plain",), "views", ",".join(self.views), "'plain' or 'plain,flip'")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How one fold is trained: AdamW on focal loss (Lin et al. 2017), the published recipe's defaults.

    `focal+jaccard` is 0.7 focal and 0.3 soft Jaccard; `asl` the asymmetric loss (Ridnik et al. 2021); `ldam` cross
    entropy with a margin for positives that grows as a class gets rare (Cao et al. 2019). `head_lr` and `layer_decay`
    give head and blocks rates of their own; `head_first` is LP-FT (Kumar et al. 2022). `logit_adjustment` is that of
    Menon et al. 2021. With `sampling` an epoch has as many draws as films, with replacement: a film belongs to its
    rarest finding, one without a finding to "none", and each of these is drawn equally often (`balanced`) or by the
    square root of its number of films (`sqrt`). `ema` averages the weights after each step; at step t its decay is
    min(`ema`, (1 + t) / (10 + t)), so that a short run is averaged over the steps it has. `class_weights` weighs a
    class by one over its share of positives in training, or by the square root of that, mean 1. `flip` draws the
    cached flipped view for half the samples; `train_norm` trains final norm, attention pooling and projection too.

    `shuffle` is the order of an epoch: `full`, any; or `block`, for caches that are read from disk: the training rows
    in file order are cut into blocks of `shuffle_block`, the blocks are permuted, and all rows of `shuffle_window`
    blocks at a time are. 16 rows of a ViT-B/16, both views, are 9.7 MB side by side: 50 ms of a spinning disk at
    200 MB/s, against 8 ms to seek them. 64 blocks make a window of 1,024 rows, 310 MB of one view each, from 64 places
    in the file: where that is sorted by a finding of half the images, its share in a window varies by 0.06.

        >>> TrainSpec(lr=1e-4, loss="bce").batch_size
        16
    """

    lr: float = _setting(2e-5, "Learning rate of AdamW.")
    head_lr: float | None = _setting(None, "Learning rate of the head; --lr is then that of the blocks.")
    layer_decay: float = _setting(1.0, "Multiply the rate by this for each block below the last.")
    train_blocks: int | None = _setting(None, "Blocks to train, at most those the cache leaves; 0 is the head alone.")
    head_first: int = _setting(0, "Epochs that train the head alone, before blocks and head are trained.")
    weight_decay: float = _setting(1e-4, "Weight decay of AdamW.")
    batch_size: int = _setting(16, "Images per step.")
    clip_norm: float = _setting(1.0, "Gradient norm limit.")
    loss: Literal["focal", "focal+jaccard", "bce", "asl", "ldam"] = _setting(
        "focal", "Loss; focal+jaccard is 0.7 focal and 0.3 soft Jaccard, asl the asymmetric loss, ldam has margins."
    )
    focal_alpha: float = _setting(0.25, "Focal loss: weight of positives.")
    focal_gamma: float = _setting(2.0, "Focal loss: focusing exponent.")
    asl_gamma_neg: float = _setting(4.0, "Asymmetric loss: focusing exponent of negatives.")
    asl_gamma_pos: float = _setting(1.0, "Asymmetric loss: focusing exponent of positives.")
    asl_clip: float = _setting(0.05, "Asymmetric loss: negatives below this probability cost nothing.")
    ldam_margin: float = _setting(1.0, "LDAM: margin of the rarest class, in logits.")
    logit_adjustment: float = _setting(
        0.0, "Add this times the log odds of each class's share of positives to the logits in the loss."
    )
    label_smoothing: float = _setting(0.0, "Share of each label that is spread evenly over yes and no.")
    class_weights: Literal["none", "inverse", "sqrt"] = _setting(
        "none", "Weigh rare classes up: by one over their share, or its square root."
    )
    sampling: Literal["none", "balanced", "sqrt"] = _setting(
        "none", "Draw films by their rarest finding: each film once, every finding equally often, or between the two."
    )
    dropout: float = _setting(0.5, "Dropout in the head.")
    ema: float = _setting(0.0, "Decay of the weights' running average, which is then the model; 0 averages nothing.")
    flip: bool = True
    tta: Literal["none", "flip"] = _setting(
        "none", "Score the plain view, or the mean of plain and flipped (test-time augmentation)."
    )
    scheduler: Literal["plateau", "none"] = _setting("plateau", "Learning-rate schedule on validation macro AUC.")
    plateau_factor: float = _setting(0.5, "Plateau: what the rate is multiplied by.")
    plateau_patience: int = _setting(3, "Plateau: epochs without a better AUC that it waits.")
    patience: int | None = _setting(None, "Stop a fold after this many epochs without a better AUC.")
    train_norm: bool = _setting(False, "Train the final norm, attention pooling and projection too.")
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "Arithmetic of training; validation of the chosen model is always float32."
    )
    shuffle: Literal["full", "block"] = _setting(
        "full", "Order of an epoch: any, or neighbours in the file together, for caches read from disk."
    )
    shuffle_block: int = _setting(16, "--shuffle block: neighbouring rows that stay together, read in one go.")
    shuffle_window: int = _setting(64, "--shuffle block: blocks from all over the file whose rows are mixed.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(0 < self.lr < math.inf, "lr", self.lr, "positive")
        _require(self.head_lr is None or 0 < self.head_lr < math.inf, "head_lr", self.head_lr, "positive")
        _require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        _require(self.train_blocks is None or self.train_blocks >= 0, "train_blocks", self.train_blocks, "0 or more")
        _require(self.head_first >= 0, "head_first", self.head_first, "0 or more")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 (batch norm needs two samples)")
        _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        _require(0 <= self.focal_alpha <= 1, "focal_alpha", self.focal_alpha, "in [0, 1]")
        _require(0 <= self.focal_gamma < math.inf, "focal_gamma", self.focal_gamma, "0 or more")
        for name in ("asl_gamma_neg", "asl_gamma_pos"):  # between 0 and 1 a clipped negative's gradient is not finite
            value = getattr(self, name)
            _require(value == 0 or 1 <= value < math.inf, name, value, "0, or at least 1")
        _require(0 <= self.asl_clip < 1, "asl_clip", self.asl_clip, "in [0, 1)")
        _require(0 <= self.ldam_margin < math.inf, "ldam_margin", self.ldam_margin, "0 or more")
        _require(0 <= self.logit_adjustment < math.inf, "logit_adjustment", self.logit_adjustment, "0 or more")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(0 <= self.ema < 1, "ema", self.ema, "in [0, 1)")
        _require(0 < self.plateau_factor < 1, "plateau_factor", self.plateau_factor, "in (0, 1)")
        _require(self.plateau_patience >= 0, "plateau_patience", self.plateau_patience, "0 or more")
        for name in ("shuffle_block", "shuffle_window"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.patience is None or self.patience >= 1, "patience", self.patience, "at least 1")
        self._check_together()

    def _check_together(self) -> None:
        """Raise InputError for fields that exclude each other, by their names."""
        for wrong, first, second in (
            (self.sampling != "none" and self.shuffle == "block", "--sampling", "--shuffle block"),
            (self.label_smoothing and self.loss == "focal+jaccard", "--label-smoothing", "--loss focal+jaccard"),
            (self.head_first and self.train_blocks == 0, "--head-first", "--train-blocks 0"),
            (self.layer_decay < 1 and self.train_blocks == 0, "--layer-decay", "--train-blocks 0"),
        ):
            if wrong:
                raise InputError(f"{first} does not go with {second}; leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """The search around the fold: hold-out, folds, epoch budgets, the final model, thresholds.

    `split_method` draws what `split` leaves open. `threshold_target` is `f1`, `sensitivity=0.9`, `specificity=0.9`, or
    a JSON object of one for each class named (the others take f1); thresholds and calibration come from out-of-fold
    predictions. `retrain_head` is classifier re-training (Kang et al. 2020): fresh heads, at the chosen budget and the
    head's rate, on embeddings of each fold's trained blocks.

        >>> SweepSpec(epochs=(5, 10), folds=3, train=TrainSpec(dropout=0.2)).final
        'best-fold'
    """

    epochs: tuple[int, ...] = _setting(
        (30, 50, 75, 90, 100), "Budgets of the search; one run per fold passes through all of them."
    )
    folds: int = _setting(5, "Folds of the cross-validation.")
    holdout: float = _setting(0.2, "Share of the groups kept out until the end.")
    seed: int = _setting(0, "Decides splits, initialisation and every draw.")
    split_by: Literal["group", "image"] = _setting(
        "group", "What may not be shared between folds; image splits views of one patient."
    )
    split: Literal["column", "published", "drawn"] = _setting(
        "column",
        "Take hold-out and training from the column split where there is one (the rest is drawn), from the data set's "
        "published lists, or draw everything.",
    )
    split_method: Literal["balanced", "iterative"] = _setting(
        "balanced",
        "How groups are drawn: each class's share of images and of groups near what was asked, or by groups alone, as "
        "before.",
    )
    retrain_head: Literal["none", "balanced", "sqrt"] = _setting(
        "none", "After the search train each fold's head again on its frozen blocks, films drawn so (cRT)."
    )
    final: Literal["best-fold", "refit", "ensemble", "retrained"] = _setting(
        "best-fold",
        "The final model: the best fold's, one trained on all folds, the folds' mean, or that of retrained heads.",
    )
    threshold_target: str = _setting(
        "f1", "f1, sensitivity=X or specificity=X, per class, out of fold; or a CSV file of class,target."
    )
    calibration: Literal["none", "platt", "isotonic"] = _setting("none", "Calibration per class, fitted out of fold.")
    train: TrainSpec = field(default_factory=TrainSpec)

    def __post_init__(self) -> None:
        _check_choices(self)
        rising = all(a < b for a, b in zip(self.epochs, self.epochs[1:], strict=False))
        # A fold trains until it meets its last budget, which no fraction ever is.
        ok = bool(self.epochs) and rising and self.epochs[0] >= 1 and all(isinstance(e, int) for e in self.epochs)
        _require(
            ok,
            "epochs",
            ",".join(map(str, self.epochs)),
            "rising whole numbers of at least 1, such as 30,50,75",
        )
        _require(self.folds >= 2, "folds", self.folds, "at least 2")
        _require(0 <= self.holdout < 1, "holdout", self.holdout, "in [0, 1)")
        if self.final == "retrained" and self.retrain_head == "none":
            raise InputError("--final retrained: no head is trained again; add --retrain-head balanced.")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 4294967295")
        _require(
            self.threshold_goal is not None,
            "threshold_target",
            self.threshold_target,
            "f1, sensitivity=X or specificity=X with X in (0, 1]",
        )

    @property
    def threshold_goal(self) -> tuple[str, float] | None:
        """(`f1`, 0), (`sensitivity`, 0.9) or (`specificity`, 0.9); None where the text is none of these."""
        return (parse_target(self.threshold_target) or {}).get("")


def parse_target(text: str) -> dict[str, tuple[str, float]] | None:
    """The goal of each class that a threshold target names, and under "" of all others: (`f1`, 0), (`sensitivity`,
    0.9) or (`specificity`, 0.9). A JSON object names classes, and the others take `f1`. None where it is no target."""
    if text.startswith("{"):
        try:
            rows = {name: str(target) for name, target in json.loads(text).items()}
        except ValueError:
            return None
        each = {name: None if target.startswith("{") else parse_target(target) for name, target in rows.items()}
        goals = {"": ("f1", 0.0), **{name: goal[""] for name, goal in each.items() if goal}}
        return goals if len(goals) == len(rows) + 1 else None
    if text == "f1":
        return {"": ("f1", 0.0)}
    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        return None
    return {"": (name, share)} if name in ("sensitivity", "specificity") and 0 < share <= 1 else None


# What sweeps did before a field of the spec was there, where today's default is another.
FORMER = {"split_method": "iterative"}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How one sweep is asked for, beside the recipe: on what it computes, from which weights, over what grid.

    `residency` is `auto`, `device`, `host` or `stream`; `weights` None are the cache's; `grid` holds `NAME=A,B` or
    `NAME=A..B`, and `trials` is how many random draws of it are trained, None for every combination. Files are
    `holdout_list` (an image or group a line) and `corrections` (marked labels); `split_from` is an earlier run.

        >>> SweepOptions(device="cpu", grid=("lr=1e-5,2e-5",)).overwrite
        False
    """

    device: str = "auto"
    residency: str = "auto"
    weights: str | None = None
    grid: tuple[str, ...] = ()
    trials: int | None = None
    overwrite: bool = False
    holdout_list: str | None = None
    split_from: str | None = None
    corrections: str | None = None
