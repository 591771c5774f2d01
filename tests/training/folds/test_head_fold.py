"""The head's step written by hand is autograd's; folds side by side are folds one by one."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cxr_fast.activations.forward import predict
from cxr_fast.activations.loader import Activations
from cxr_fast.errors import InputError, Interrupted
from cxr_fast.models.heads import Custom
from cxr_fast.training.folds import head_fold
from cxr_fast.training.folds.fold import Epoch, Fold, FoldData, Snapshot
from cxr_fast.training.folds.head_fold import HeadFold, fit_side_by_side
from cxr_fast.training.folds.loop import Recorder, fit
from tests.helpers import toys
from tests.helpers.toys import CPU, SPEC, TRAIN, VALID, make, same

# Batch norm subtracts these, so that their gradient is zero in exact arithmetic, as it is in HeadFold. Autograd leaves
# rounding there, which AdamW divides by its own size: in Fold they wander by up to a learning rate a step, and the
# running means behind follow ten times slower.
BIASES = ("head.0.bias", "head.4.bias")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plainly(monkeypatch: pytest.MonkeyPatch, steps: Callable[..., torch.Tensor] = head_fold._steps) -> None:
    monkeypatch.setattr(head_fold, "_compiled", lambda: steps)


def without_rounding(fold: Any) -> Any:
    """A Fold whose biases before batch norms get the gradient of exact arithmetic: none."""
    for name in BIASES:
        fold.named()[name].register_hook(torch.zeros_like)
    return fold


def agree(fold: Fold, other: Fold, *, lr: float, steps: int) -> None:
    """Weights, statistics and answers alike within float32: an entry may differ by 1 % of what the learning rate could
    have moved it, one in ten thousand by more (its gradient is nothing but rounding), and answers by 2e-5."""
    theirs, far, count = other.tail.state_dict(), 0, 0
    for name, tensor in fold.tail.state_dict().items():
        apart = (tensor - theirs[name]).abs() > 0.01 * lr * steps + 1e-6 * theirs[name].abs()
        far, count = far + int(apart.sum()), count + apart.numel()
    assert far <= count / 10_000, f"{far} of {count} entries"
    answers = [predict(f.tail, f.activations, VALID) for f in (fold, other)]
    np.testing.assert_allclose(*answers, rtol=0, atol=2e-5)


# The step.


@pytest.mark.parametrize("clip", [1e-3, 1e9])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("weights", ["none", "inverse", "sqrt"])
@pytest.mark.parametrize(
    ("loss", "gamma"),
    [(loss, gamma) for loss in ("focal", "focal+jaccard") for gamma in (0.0, 0.5, 2.0, 3.0)] + [("bce", 2.0)],
)
def test_a_head_fold_trains_as_autograd_does(
    loss: str, gamma: float, weights: str, dropout: float, clip: float
) -> None:
    changes: dict[str, Any] = {"class_weights": weights, "focal_gamma": gamma, "dropout": dropout, "clip_norm": clip}
    spec = dataclasses.replace(SPEC, loss=loss, weight_decay=0.01, **changes)  # type: ignore[arg-type]
    fast, slow = make(HeadFold, spec), without_rounding(make(Fold, spec))
    (drawn, again) = fast.draw(), slow.draw()
    assert [b - a for a, b in drawn.steps] == [8, 8, 9]
    for name in ("rows", "views", "masks"):
        assert torch.equal(getattr(drawn, name), getattr(again, name))
    one = dataclasses.replace(drawn, steps=drawn.steps[:1], rows=drawn.rows[:8])
    assert fast.train_epoch(one) == pytest.approx(slow.train_epoch(one), rel=1e-5, abs=1e-7)
    agree(fast, slow, lr=spec.lr, steps=1)
    for name, moment in slow.named().items():
        for key in ("exp_avg", "exp_avg_sq"):
            want, got = slow.optimizer.state[moment][key], fast.optimizer.state[fast.named()[name]][key]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    for _ in range(2):
        ours, theirs = fast.run_epoch(), slow.run_epoch()
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4, abs=1e-7)
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-4, abs=1e-6)
        assert ours.valid_auc == pytest.approx(theirs.valid_auc, abs=1e-9)
    agree(fast, slow, lr=spec.lr, steps=7)
    assert torch.equal(fast.generator.get_state(), slow.generator.get_state())
    for name, tensor in fast.tail.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == slow.tail.state_dict()[name] == 7
    assert {int(s["step"]) for s in fast.optimizer.state.values()} == {7}


def test_answers_agree_as_closely_as_the_rounding_in_those_biases_lets_them() -> None:
    spec = dataclasses.replace(SPEC, lr=2e-5)
    fast, slow = make(HeadFold, spec), make(Fold, spec)
    for _ in range(10):
        ours, theirs = fast.run_epoch(), slow.run_epoch()
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
    moved = dict(slow.tail.named_parameters())["head.0.bias"] - dict(fast.tail.named_parameters())["head.0.bias"]
    assert float(moved.detach().abs().max()) > spec.lr, "rounding moves a bias, else this test says nothing"
    answers = [predict(fold.tail, fold.activations, VALID) for fold in (fast, slow)]
    np.testing.assert_allclose(*answers, rtol=0, atol=2e-5)


def test_the_tiny_clip_above_does_act_and_the_huge_one_does_not() -> None:
    moved = []
    for clip in (1e-3, 1e9):
        fold = make(HeadFold, dataclasses.replace(SPEC, clip_norm=clip))
        fold.train_epoch(fold.draw())
        moved.append(float(fold.gradient.norm()))
    assert moved[0] == pytest.approx(1e-3, rel=1e-2)
    assert moved[1] > 0.01


def test_biases_before_batch_norm_get_no_gradient_and_only_decay() -> None:
    fold = make(HeadFold, dataclasses.replace(SPEC, weight_decay=0.1))
    before = {name: dict(fold.tail.named_parameters())[name].detach().clone() for name in BIASES}
    fold.train_epoch(fold.draw())
    for name, start in before.items():
        p = dict(fold.tail.named_parameters())[name]
        torch.testing.assert_close(p.detach(), start * (1 - SPEC.lr * 0.1) ** 3, rtol=1e-6, atol=0)
        assert not fold.optimizer.state[p]["exp_avg_sq"].any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("length", [1.0, 7.0])
def test_it_trains_on_the_embedding_that_it_is_asked_about_whatever_its_length(dtype: str, length: float) -> None:
    folds = [make(kind, activations=Activations(toys.embeddings(dtype, length), CPU)) for kind in (HeadFold, Fold)]
    without_rounding(folds[1])
    losses = [[fold.run_epoch().train_loss for _ in range(2)] for fold in folds]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    agree(*folds, lr=SPEC.lr, steps=6)


def test_images_without_any_known_label_and_batches_of_them_are_trained_past() -> None:
    mostly = np.full_like(toys.labels(), -1)
    mostly[VALID] = toys.labels()[VALID]
    mostly[TRAIN[0]], mostly[TRAIN[1]] = 1, 0
    for loss in ("focal", "focal+jaccard"):
        spec = dataclasses.replace(SPEC, loss=loss)  # type: ignore[arg-type]
        fast, slow = make(HeadFold, spec, labels=mostly), without_rounding(make(Fold, spec, labels=mostly))
        assert fast.run_epoch().train_loss == pytest.approx(slow.run_epoch().train_loss, rel=1e-4, abs=1e-7)
        agree(fast, slow, lr=spec.lr, steps=3)


@pytest.mark.parametrize("loss", ["focal", "bce", "focal+jaccard"])
def test_the_loss_of_saturated_logits_stays_finite(loss: str) -> None:
    for gamma in (0.0, 0.5, 2.0):
        fold = make(HeadFold, dataclasses.replace(SPEC, loss=loss, focal_gamma=gamma))  # type: ignore[arg-type]
        with torch.no_grad():
            fold.tail.head[-1].weight.mul_(3000)
        assert np.isfinite(fold.train_epoch(fold.draw()))
        assert fold.flat.isfinite().all()


def test_the_number_of_steps_taken_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = []
    for chunk in (1, 2, 256):
        monkeypatch.setattr(head_fold, "CHUNK", chunk)
        folds.append(make(HeadFold))
        folds[-1].train_epoch(folds[-1].draw())
    assert same(folds[0], folds[1])
    assert same(folds[0], folds[2])


# TorchScript.


def uncertain() -> np.ndarray:
    """The toys' labels, some of which are uncertain."""
    out = toys.labels().copy()
    out[(np.random.default_rng(9).random(out.shape) < 0.3) & (out >= 0)] = -2
    for part in (TRAIN, VALID):
        out[part[0]], out[part[1]] = 1, 0
    return out


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["focal", "bce", "focal+jaccard", "asl", "ldam"])
def test_a_head_fold_trains_on_uncertain_labels_as_autograd_does(loss: str, smoothing: float) -> None:
    changes: dict[str, Any] = {"loss": loss, "label_smoothing": 0.0 if loss == "focal+jaccard" else smoothing}
    spec = dataclasses.replace(SPEC, class_weights="sqrt", **changes)
    fast, slow = make(HeadFold, spec, labels=uncertain()), without_rounding(make(Fold, spec, labels=uncertain()))
    for _ in range(2):
        ours, theirs = fast.run_epoch(), slow.run_epoch()
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4, abs=1e-7)
    agree(fast, slow, lr=spec.lr, steps=6)
    unknown = make(HeadFold, spec, labels=np.maximum(uncertain(), -1))
    assert unknown.run_epoch().train_loss != fast.history[0].train_loss, "an uncertain label is trained on"


def test_an_uncertain_label_is_unknown_in_validation() -> None:
    marked, masked = toys.labels().copy(), toys.labels().copy()
    rows = VALID[2:6]
    marked[rows], masked[rows] = -2, -1
    one, other = make(Fold, labels=marked), make(Fold, labels=masked)
    ours, theirs = one.run_epoch(), other.run_epoch()
    assert (ours.valid_auc, ours.valid_loss) == (theirs.valid_auc, theirs.valid_loss)
    assert same(one, other), "validation rows are not trained on"


def test_a_loss_of_one_s_own_is_given_no_soft_targets() -> None:
    data = FoldData(
        activations=Activations(toys.embeddings(), CPU),
        labels=uncertain(),
        train_rows=TRAIN,
        valid_rows=VALID,
        custom=Custom(loss=lambda logits, labels: logits.mean()),
    )
    with pytest.raises(InputError, match=r"^loss: .*--uncertain unknown, positive or negative\.$"):
        Fold(toys.bare(), data, SPEC, unfreeze_blocks=0, seed=0)


@pytest.mark.parametrize("loss", ["focal", "bce", "focal+jaccard"])
def test_torchscript_and_plain_python_give_the_same_bits(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(head_fold._compiled(), torch.jit.ScriptFunction), "this torch has no TorchScript: drop it"
    for gamma in (0.5, 2.0):
        spec = dataclasses.replace(SPEC, loss=loss, focal_gamma=gamma)  # type: ignore[arg-type]
        scripted, plain = make(HeadFold, spec), make(HeadFold, spec)
        for _ in range(2):
            scripted.run_epoch()
        with monkeypatch.context() as patch:
            plainly(patch)
            for _ in range(2):
                plain.run_epoch()
        assert same(scripted, plain)


@pytest.mark.parametrize("error", [AttributeError("no jit"), RuntimeError("cannot compile")])
def test_without_torchscript_the_plain_version_is_used(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise error

    monkeypatch.setattr(torch.jit, "script", refuse)
    assert head_fold._compiled.__wrapped__() is head_fold._steps  # type: ignore[attr-defined]
    monkeypatch.delattr(torch.jit, "script")
    assert head_fold._compiled.__wrapped__() is head_fold._steps  # type: ignore[attr-defined]


@pytest.mark.parametrize("scripted", [True, False])
def test_a_step_is_adamw_on_the_gradient_it_leaves(scripted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not scripted:
        plainly(monkeypatch)
    fold = make(HeadFold, dataclasses.replace(SPEC, weight_decay=0.1, batch_size=64))
    before = fold.flat.clone()
    fold.train_epoch(fold.draw())
    g = fold.gradient.double()
    assert g.any()
    torch.testing.assert_close(fold.mean.double(), 0.1 * g, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(fold.square.double(), 0.001 * g * g, rtol=1e-4, atol=1e-15)
    want = before.double() * (1 - SPEC.lr * 0.1) - SPEC.lr * g / (g.abs() + 1e-8)
    torch.testing.assert_close(fold.flat.double(), want, rtol=1e-5, atol=1e-3 * SPEC.lr)
    assert {int(s["step"]) for s in fold.optimizer.state.values()} == {1}


def test_a_step_that_leaves_adamw_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*arguments: Any) -> torch.Tensor:
        flat = arguments[4][0]
        kept = flat.clone()
        total = head_fold._steps(*arguments)
        flat.copy_(kept)
        return total

    plainly(monkeypatch, without)
    with pytest.raises(InputError, match="3 of 3 weight matrices did not change"):
        fit(make(HeadFold), (1,), Recorder())
    with pytest.raises(InputError, match="3 of 3 weight matrices did not change"):
        together([make(HeadFold)], (1,))


# States.


def handed_over(fold: Fold, kind: type[Fold], spec: Any = SPEC) -> Any:
    out = make(kind, spec) if kind is HeadFold else without_rounding(make(kind, spec))
    out.restore(*fold.state())
    return out


def trained(kind: type[Fold], epochs: int, spec: Any = SPEC) -> Any:
    return more(make(kind, spec), epochs)


def more(fold: Any, epochs: int) -> Any:
    for _ in range(epochs):
        fold.run_epoch()
    return fold


def test_a_restored_head_fold_goes_on_bit_for_bit() -> None:
    spec = dataclasses.replace(SPEC, plateau_patience=0, patience=50)
    straight = trained(HeadFold, 4, spec)
    assert same(more(handed_over(trained(HeadFold, 2, spec), HeadFold, spec), 2), straight)


def test_states_pass_between_head_fold_and_fold_and_back() -> None:
    straight = trained(HeadFold, 3)
    fold = more(handed_over(trained(HeadFold, 1), Fold), 1)
    back = more(handed_over(fold, HeadFold), 1)
    got, want = ([e.train_loss for e in f.history] for f in (back, straight))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    agree(back, straight, lr=SPEC.lr, steps=9)
    states = [make(kind).state() for kind in (Fold, HeadFold)]
    assert states[0][0].keys() == states[1][0].keys()
    assert states[0][1] == states[1][1]


def test_parameters_and_moments_stay_in_the_flat_arrays_after_a_restore() -> None:
    fold = handed_over(trained(Fold, 1), HeadFold)
    for _ in range(2):
        parameters = fold.tail.trainable()
        for flat, tensors in (
            (fold.flat, [p.data for p in parameters]),
            (fold.mean, [fold.optimizer.state[p]["exp_avg"] for p in parameters]),
            (fold.square, [fold.optimizer.state[p]["exp_avg_sq"] for p in parameters]),
            (fold.flat, fold.parts),
            (fold.gradient, fold.gradient_parts),
        ):
            starts = itertools.accumulate((t.numel() * 4 for t in tensors), initial=flat.data_ptr())
            assert [t.data_ptr() for t in tensors] == list(starts)[:-1]
            assert sum(t.numel() for t in tensors) == flat.numel()
        fold.run_epoch()


def test_a_state_is_a_copy() -> None:
    fold = trained(HeadFold, 1)
    tensors, _ = fold.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    fold.run_epoch()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())


# Side by side.


def together(
    folds: Sequence[Fold], budgets: Sequence[int], threads: int = 2, **calls: Any
) -> tuple[list[list[Snapshot]], list[list[Epoch]]]:
    """Snapshots and told epochs of each fold."""
    snapshots: list[list[Snapshot]] = [[] for _ in folds]
    told: list[list[Epoch]] = [[] for _ in folds]
    place = {id(fold): i for i, fold in enumerate(folds)}
    recorder = Recorder(
        epoch=lambda fold, epoch: told[place[id(fold)]].append(epoch),
        snapshot=lambda fold, snapshot: snapshots[place[id(fold)]].append(snapshot),
    )
    fit_side_by_side(folds, budgets, dataclasses.replace(recorder, **calls), threads=threads)
    return snapshots, told


def alike(ours: Sequence[Snapshot], theirs: Sequence[Snapshot]) -> bool:
    return [(s.budget, s.epoch) for s in ours] == [(s.budget, s.epoch) for s in theirs] and all(
        np.array_equal(a.probabilities, b.probabilities)
        and list(a.state) == list(b.state)
        and all(torch.equal(tensor, b.state[name]) for name, tensor in a.state.items())
        for a, b in zip(ours, theirs, strict=True)
    )


def five(spec: Any = SPEC) -> list[Any]:
    return [make(HeadFold, spec, fold=k) for k in range(5)]


STOPPING = dataclasses.replace(SPEC, patience=2, plateau_patience=0)


@pytest.mark.parametrize("spec", [SPEC, STOPPING], ids=["to the end", "early stopping"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_folds_side_by_side_are_folds_one_by_one_to_the_last_bit(threads: int, spec: Any) -> None:
    budgets = (1, 3, 4, 9)
    folds, alone = five(spec), five(spec)
    snapshots, told = together(folds, budgets, threads)
    for k in range(5):
        one: list[Snapshot] = []
        history = fit(alone[k], budgets, toys.keep(one))
        assert same(folds[k], alone[k])
        assert alike(snapshots[k], one)
        assert told[k] == folds[k].history
        assert len(history) == len(told[k])
        assert folds[k].stopped == (len(history) < 9)
    if spec is STOPPING:
        assert len({len(t) for t in told}) > 1, "every fold stopped at the same epoch"
        assert min(len(t) for t in told) < 9


def test_snapshots_already_taken_are_not_taken_again_and_a_finished_fold_only_hands_over() -> None:
    done, begun = trained(HeadFold, 3), make(HeadFold)
    done.taken, begun.taken = {1}, {3}
    snapshots, told = together([done, begun], (1, 3))
    assert [s.budget for s in snapshots[0]] == [3]
    assert [s.budget for s in snapshots[1]] == [1]
    assert [len(t) for t in told] == [0, 3]


def test_callbacks_come_one_at_a_time_the_snapshot_before_its_epoch() -> None:
    inside, calls = threading.Lock(), list[tuple[int, str]]()

    def note(fold: Fold, what: str) -> None:
        assert inside.acquire(blocking=False), "two callbacks at once"
        calls.append((fold.number, what))
        inside.release()

    folds = five()
    together(
        folds,
        (1, 2),
        3,
        epoch=lambda fold, e: note(fold, f"epoch {e.epoch}"),
        snapshot=lambda fold, s: note(fold, f"snapshot {s.budget}"),
    )
    for k in range(5):
        assert [what for f, what in calls if f == k] == ["snapshot 1", "epoch 1", "snapshot 2", "epoch 2"]


def test_the_fold_least_far_on_goes_first() -> None:
    seen = list[tuple[int, int]]()
    together(five(), (3,), 1, epoch=lambda fold, e: seen.append((e.epoch, fold.number)))
    assert seen == [(epoch, k) for epoch in (1, 2, 3) for k in range(5)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_in_one_fold_reaches_the_caller_and_stops_the_others(threads: int) -> None:
    folds = five()
    folds[2] = make(HeadFold, dataclasses.replace(SPEC, lr=1e36), fold=2)
    with pytest.raises(InputError, match=r"training diverged in epoch 1 .*--lr"):
        together(folds, (100_000,), threads)
    assert all(fold.epoch < 100_000 for fold in folds)
    assert threading.active_count() == 1 or all("work" not in t.name for t in threading.enumerate())


@pytest.mark.parametrize("which", ["epoch", "snapshot"])
def test_an_error_in_a_callback_reaches_the_caller(which: str) -> None:
    def fail(fold: Fold, _: object) -> None:
        if fold.number == 1:
            raise InputError("disk full")

    folds = five()
    with pytest.raises(InputError, match=r"^disk full$"):
        together(folds, (1, 100_000), **{which: fail})
    assert all(fold.epoch < 100_000 for fold in folds)


def test_stop_is_seen_between_two_chunks_and_ends_all_folds() -> None:
    asked = itertools.count()
    folds = five()
    with pytest.raises(Interrupted):
        together(folds, (100_000,), stop=lambda: next(asked) >= 7)
    assert 5 <= sum(fold.epoch for fold in folds) <= 7


def test_the_number_of_threads_is_as_before_whatever_happened() -> None:
    torch.set_num_threads(2)
    try:
        together(five()[:2], (1,), 2)
        assert torch.get_num_threads() == 2
        with pytest.raises(Interrupted):
            together(five()[:2], (1,), 2, stop=lambda: True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_step_is_compiled_once_and_before_there_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    where, script = list[threading.Thread](), torch.jit.script

    def watched(function: Any) -> Any:
        where.append(threading.current_thread())
        return script(function)

    head_fold._compiled.cache_clear()
    monkeypatch.setattr(torch.jit, "script", watched)
    filters = list(warnings.filters)
    together(five(), (1,), 2)
    # Silencing warnings is not safe across threads: the loser's filters would stay for good.
    assert where == [threading.main_thread()]
    assert warnings.filters == filters
