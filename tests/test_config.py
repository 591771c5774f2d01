"""Specs to JSON and back, refusals that name the flag, stable digests, and the published recipe as the default."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast import config
from cxr_fast.config import CacheSpec, PreprocessSpec, SweepSpec, TrainSpec
from cxr_fast.errors import InputError, SchemaError

SPECS = (PreprocessSpec, CacheSpec, TrainSpec, SweepSpec)
POSITIVE = st.floats(min_value=0, max_value=1e6, exclude_min=True, allow_subnormal=False)
SHARE = st.floats(min_value=0, max_value=1, exclude_max=True, allow_subnormal=False)

PREPROCESS = st.builds(
    PreprocessSpec,
    size=st.integers(8, 4096),
    resize=st.sampled_from(config.choices(PreprocessSpec, "resize")),
    dicom_policy=st.sampled_from(config.choices(PreprocessSpec, "dicom_policy")),
)
CACHE = st.builds(
    CacheSpec,
    weights=st.text(max_size=20),
    image_size=st.none() | st.integers(8, 2048),
    unfreeze_blocks=st.integers(0, 12),
    views=st.sampled_from([("plain",), ("plain", "flip")]),
    normalize=st.sampled_from(config.choices(CacheSpec, "normalize")),
    dtype=st.sampled_from(config.choices(CacheSpec, "dtype")),
    preprocess=PREPROCESS,
)
GAMMA = st.just(0.0) | st.floats(1, 100)
TRAIN_FIELDS = {
    "lr": POSITIVE,
    "head_lr": st.none() | POSITIVE,
    "layer_decay": st.floats(0.01, 1),
    "train_blocks": st.none() | st.integers(0, 12),
    "head_first": st.integers(0, 9),
    "weight_decay": SHARE,
    "batch_size": st.integers(2, 4096),
    "clip_norm": POSITIVE,
    "loss": st.sampled_from(config.choices(TrainSpec, "loss")),
    "focal_alpha": SHARE,
    "focal_gamma": POSITIVE,
    "asl_gamma_neg": GAMMA,
    "asl_gamma_pos": GAMMA,
    "asl_clip": SHARE,
    "ldam_margin": POSITIVE,
    "logit_adjustment": POSITIVE,
    "label_smoothing": SHARE,
    "class_weights": st.sampled_from(config.choices(TrainSpec, "class_weights")),
    "sampling": st.sampled_from(config.choices(TrainSpec, "sampling")),
    "dropout": SHARE,
    "ema": SHARE,
    "flip": st.booleans(),
    "tta": st.sampled_from(config.choices(TrainSpec, "tta")),
    "scheduler": st.sampled_from(config.choices(TrainSpec, "scheduler")),
    "plateau_factor": st.floats(0.01, 0.99),
    "plateau_patience": st.integers(0, 99),
    "patience": st.none() | st.integers(1, 99),
    "train_norm": st.booleans(),
    "precision": st.sampled_from(config.choices(TrainSpec, "precision")),
    "shuffle": st.sampled_from(config.choices(TrainSpec, "shuffle")),
    "shuffle_block": st.integers(1, 99),
    "shuffle_window": st.integers(1, 99),
}


def compatible(fields: dict[str, Any]) -> TrainSpec:
    """A spec of drawn fields; of two that exclude each other one takes its default."""
    if fields["shuffle"] == "block":
        fields |= {"sampling": "none"}
    if fields["loss"] == "focal+jaccard":
        fields |= {"label_smoothing": 0.0}
    if fields["train_blocks"] == 0:
        fields |= {"head_first": 0, "layer_decay": 1.0}
    return TrainSpec(**fields)


TRAIN = st.fixed_dictionaries(TRAIN_FIELDS).map(compatible)
SWEEP = st.builds(
    SweepSpec,
    retrain_head=st.sampled_from(["balanced", "sqrt"]),
    epochs=st.sets(st.integers(1, 999), min_size=1).map(lambda found: tuple(sorted(found))),
    folds=st.integers(2, 20),
    holdout=SHARE,
    seed=st.integers(0, 2**32 - 1),
    split_by=st.sampled_from(config.choices(SweepSpec, "split_by")),
    split=st.sampled_from(config.choices(SweepSpec, "split")),
    split_method=st.sampled_from(config.choices(SweepSpec, "split_method")),
    final=st.sampled_from(config.choices(SweepSpec, "final")),
    threshold_target=st.sampled_from(["f1", "sensitivity=0.9", "specificity=1"]),
    calibration=st.sampled_from(config.choices(SweepSpec, "calibration")),
    train=TRAIN,
)


def shuffled(value: Any, order: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = [(key, shuffled(item, order)) for key, item in value.items()]
    order.shuffle(items)
    return dict(items)


def test_the_strategies_cover_every_field() -> None:
    built = {PreprocessSpec: 3, CacheSpec: 7, TrainSpec: 32, SweepSpec: 12}
    assert {cls: len(dataclasses.fields(cls)) for cls in SPECS} == built


@given(st.one_of(PREPROCESS, CACHE, TRAIN, SWEEP))
def test_a_spec_comes_back_from_json_as_it_was(spec: Any) -> None:
    again = config.from_dict(type(spec), json.loads(config.to_json(spec)))
    assert again == spec
    assert type(again) is type(spec)
    assert hash(again) == hash(spec)
    assert config.digest(again) == config.digest(spec)
    assert config.from_dict(type(spec), json.loads(json.dumps(config.to_dict(spec), indent=1))) == spec


@given(st.one_of(PREPROCESS, CACHE, TRAIN, SWEEP), st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_keys(spec: Any, order: Any) -> None:
    values = shuffled(config.to_dict(spec), order)
    assert config.digest(values) == config.digest(spec)
    assert config.digest(config.from_dict(type(spec), values)) == config.digest(spec)


@given(st.one_of(CACHE, SWEEP), st.one_of(CACHE, SWEEP))
def test_digests_are_equal_only_for_equal_specs(one: Any, other: Any) -> None:
    assert (config.digest(one) == config.digest(other)) == (one == other)


@pytest.mark.parametrize("cls", SPECS)
def test_an_unknown_field_is_refused_by_name(cls: type) -> None:
    with pytest.raises(SchemaError, match=rf"{cls.__name__} has unknown field.*colour, zoom: .*newer"):
        config.from_dict(cls, {**config.to_dict(cls()), "zoom": 2, "colour": "red"})


def test_an_unknown_field_of_an_inner_spec_is_refused() -> None:
    values = config.to_dict(SweepSpec())
    values["train"]["momentum"] = 0.9
    with pytest.raises(SchemaError, match=r"TrainSpec has unknown field.*momentum"):
        config.from_dict(SweepSpec, values)


@pytest.mark.parametrize(("cls", "values"), [(TrainSpec, [1]), (TrainSpec, {"lr": "fast"}), (SweepSpec, {"train": 3})])
def test_damaged_values_are_an_error_of_ours(cls: type, values: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        config.from_dict(cls, values)
    assert "\n" not in str(caught.value)


BAD = [
    (PreprocessSpec, "size", (0, 7, 4097, -1)),
    (PreprocessSpec, "resize", ("stretch", "", None)),
    (PreprocessSpec, "dicom_policy", ("VOI",)),
    (CacheSpec, "image_size", (0, 7, 2049, -16)),
    (CacheSpec, "unfreeze_blocks", (-1,)),
    (CacheSpec, "views", ((), ("flip",), ("flip", "plain"), ("plain", "plain"), ("plain", "rotated"), "plain")),
    (CacheSpec, "normalize", ("openai",)),
    (CacheSpec, "dtype", ("bfloat16",)),
    (TrainSpec, "lr", (0.0, -1e-5, math.nan, math.inf)),
    (TrainSpec, "head_lr", (0.0, -1e-5, math.nan, math.inf)),
    (TrainSpec, "layer_decay", (0.0, -0.5, 1.1, math.nan)),
    (TrainSpec, "train_blocks", (-1,)),
    (TrainSpec, "head_first", (-1,)),
    (TrainSpec, "weight_decay", (-1e-9, math.nan, math.inf)),
    (TrainSpec, "batch_size", (0, 1)),
    (TrainSpec, "clip_norm", (0.0, -1.0, math.nan)),
    (TrainSpec, "loss", ("mse",)),
    (TrainSpec, "focal_alpha", (-0.1, 1.1, math.nan)),
    (TrainSpec, "focal_gamma", (-1.0, math.nan, math.inf)),
    (TrainSpec, "asl_gamma_neg", (-1.0, 0.5, math.nan, math.inf)),
    (TrainSpec, "asl_gamma_pos", (-1.0, 0.5, math.nan, math.inf)),
    (TrainSpec, "asl_clip", (-0.1, 1.0, math.nan)),
    (TrainSpec, "ldam_margin", (-0.1, math.nan, math.inf)),
    (TrainSpec, "logit_adjustment", (-0.1, math.nan, math.inf)),
    (TrainSpec, "label_smoothing", (-0.1, 1.0, math.nan)),
    (TrainSpec, "sampling", ("class", "", None)),
    (TrainSpec, "ema", (-0.1, 1.0, math.nan)),
    (TrainSpec, "tta", ("both", None)),
    (TrainSpec, "dropout", (-0.1, 1.0, math.nan)),
    (TrainSpec, "scheduler", ("cosine",)),
    (TrainSpec, "plateau_factor", (0.0, 1.0, math.nan)),
    (TrainSpec, "plateau_patience", (-1,)),
    (TrainSpec, "patience", (0, -1)),
    (TrainSpec, "precision", ("float16",)),
    (TrainSpec, "shuffle", ("none", "", None)),
    (TrainSpec, "shuffle_block", (0, -1)),
    (TrainSpec, "shuffle_window", (0, -1)),
    (SweepSpec, "epochs", ((), (0,), (5, 5), (10, 5), (1.5,), (1, 2.5))),
    (SweepSpec, "folds", (0, 1)),
    (SweepSpec, "holdout", (-0.1, 1.0, math.nan)),
    (SweepSpec, "seed", (-1, 2**32)),
    (SweepSpec, "split_by", ("study",)),
    (SweepSpec, "retrain_head", ("inverse",)),
]


@pytest.mark.parametrize(("cls", "name", "value"), [(cls, name, value) for cls, name, bad in BAD for value in bad])
def test_a_bad_value_is_refused_with_its_flag(cls: type, name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        cls(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"--{name.replace('_', '-')}: ")
    assert "\n" not in message
    assert (repr(value) if not isinstance(value, tuple) else ",".join(map(str, value))) in message


def test_specs_cannot_be_changed_or_given_by_position() -> None:
    for cls in SPECS:
        name = dataclasses.fields(cls)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), name, None)
        with pytest.raises(TypeError):
            cls(None)


def test_defaults_are_the_published_recipe() -> None:
    sweep, cache = SweepSpec(), CacheSpec()
    train = dataclasses.asdict(sweep.train)
    assert train == {
        "lr": 2e-5,
        "head_lr": None,
        "layer_decay": 1.0,
        "train_blocks": None,
        "head_first": 0,
        "weight_decay": 1e-4,
        "batch_size": 16,
        "clip_norm": 1.0,
        "loss": "focal",
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "asl_gamma_neg": 4.0,
        "asl_gamma_pos": 1.0,
        "asl_clip": 0.05,
        "ldam_margin": 1.0,
        "logit_adjustment": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "sampling": "none",
        "dropout": 0.5,
        "ema": 0.0,
        "flip": True,
        "tta": "none",
        "scheduler": "plateau",
        "plateau_factor": 0.5,
        "plateau_patience": 3,
        "patience": None,
        "train_norm": False,
        "precision": "auto",
        "shuffle": "full",
        "shuffle_block": 16,
        "shuffle_window": 64,
    }
    assert (sweep.epochs, sweep.folds, sweep.holdout, sweep.split_by) == ((30, 50, 75, 90, 100), 5, 0.2, "group")
    assert (sweep.retrain_head, sweep.final, sweep.calibration) == ("none", "best-fold", "none")
    assert (cache.weights, cache.unfreeze_blocks, cache.views) == ("biomedclip", 2, ("plain", "flip"))
    assert (cache.normalize, cache.dtype, cache.preprocess.size) == ("model", "float16", 224)


@pytest.mark.parametrize("cls", SPECS)
def test_default_is_what_the_constructor_gives(cls: type) -> None:
    spec = cls()
    assert {f.name: config.default(cls, f.name) for f in dataclasses.fields(cls)} == vars(spec)
    with pytest.raises(KeyError):
        config.default(cls, "no_such_field")


EXCLUDED = [
    ({"sampling": "balanced", "shuffle": "block"}, "--sampling", "--shuffle block"),
    ({"label_smoothing": 0.1, "loss": "focal+jaccard"}, "--label-smoothing", "--loss focal+jaccard"),
    ({"head_first": 2, "train_blocks": 0}, "--head-first", "--train-blocks 0"),
    ({"layer_decay": 0.5, "train_blocks": 0}, "--layer-decay", "--train-blocks 0"),
]


@pytest.mark.parametrize(("fields", "first", "second"), EXCLUDED)
def test_fields_that_exclude_each_other_are_refused_by_name(fields: dict[str, Any], first: str, second: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainSpec(**fields)
    assert str(caught.value) == f"{first} does not go with {second}; leave one of them out."
    for name in fields:  # either alone is taken
        TrainSpec(**{name: fields[name]})


def test_a_retrained_final_needs_a_retrained_head() -> None:
    with pytest.raises(InputError, match=r"^--final retrained: .*--retrain-head"):
        SweepSpec(final="retrained")


@pytest.mark.parametrize("cls", SPECS)
def test_every_choice_can_be_chosen(cls: type) -> None:
    several, needed = 0, {"retrained": {"retrain_head": "balanced"}}
    for f in dataclasses.fields(cls):
        if "Literal" in str(f.type):
            for value in config.choices(cls, f.name):
                assert getattr(cls(**{f.name: value}, **needed.get(value, {})), f.name) == value
                several += 1
    assert several >= 2
