"""What an epoch costs a sample, from cached tokens and the plain way, and the search that follows from it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..activations import build, verify
from ..activations import cache as index
from ..activations import file as store
from ..activations.encoder import load_recorded, normalise, with_size
from ..activations.forward import predict
from ..activations.job import CacheJob
from ..activations.loader import Activations
from ..config import CacheSpec, SweepSpec, TrainSpec, from_dict
from ..data.images import load as load_image
from ..data.manifest import Manifest
from ..data.paths import recorded_places
from ..errors import InputError
from ..models.backbone import Backbone, prefix, prefix_sha256
from ..models.device import pick_device
from ..system import hardware
from ..system.text import Table, duration, to_plain
from ..training.folds.fold import Fold, FoldData
from . import results
from .baseline import Films, Model, Trainer, loader
from .caching import pixels_apart
from .films import readable, spread_evenly
from .measure import median, ratio_fields, run_rounds, spreads
from .records import TRAINING, TrainingResult

CLASSES, BATCH = 35, 16
# Four folds train while one validates: a sample's share of an epoch holds a quarter of a validation pass.
VALID_SHARE = 0.25
# Mini-epochs of the cached arms in a round. 96 images are 6 steps; right after another workload they measure the switch
# (its threads, its data in the caches), which is nothing in the 299 steps of a real epoch.
EPOCHS = 4
# Of a loss, training from tokens against training from pixels, both float32.
TOLERANCE, STEPS = 1e-4, 3
# The search of the main job at Indiana's size: a fifth of 7,466 images held out, four fifths of the rest train a fold.
FOLDS, SEARCH_EPOCHS, SEARCH_IMAGES = 5, 100, 4779
PLAIN, DECODED = "plain, from files", "plain, decoded"


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """Images (n) in every form the arms take them: files, pixels (n, S, S) uint8, activations (n, V, ...)."""

    tower: Backbone
    paths: list[Path]
    pixels: np.ndarray
    activations: np.ndarray
    unfreeze_blocks: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: int = CLASSES
    weights: str = ""


def fresh(tower: Backbone, manifest: Manifest, folder: Path) -> TrainingImages:
    """Every image of a manifest, encoded here and now: the plain view, float32."""
    spec = with_size(CacheSpec(weights=tower.source, dtype="float32", views=("plain",)), tower)
    build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=folder / "c.h5", device="cpu"))
    paths = [manifest.path(i) for i in range(len(manifest))]
    mean, std = tower.statistics(spec.normalize)
    return TrainingImages(
        tower=tower,
        paths=paths,
        pixels=np.stack([load_image(path, spec.preprocess)[0] for path in paths]),
        activations=np.array(store.ActivationFile(folder / "c.h5").activations),
        unfreeze_blocks=spec.unfreeze_blocks,
        mean=mean,
        std=std,
        weights=tower.source,
    )


def from_cache(cache: Path, *, count: int, images: Path | None = None, weights: str | None = None) -> TrainingImages:
    """`count` images of a cache, evenly spread over those whose file is there and unchanged; whole steps of them.

    Raises InputError where fewer than 4 are, or the weights are not those of the cache.
    """
    file = index.open_cache(cache)
    spec = from_dict(CacheSpec, file.meta["spec"])
    root = Path(file.meta["dataset"]["root"])
    ok = np.flatnonzero(file.ok)
    wanted = ok[spread_evenly(len(ok), count)] if len(ok) else ok
    places = [recorded_places(file.header.images[row], root, images) for row in wanted]
    paths = [next((place for place in some if place.is_file()), some[0]) for some in places]
    found = readable(paths, spec.preprocess)
    kept = [i for i in range(len(wanted)) if i in found and found[i][1] == file.sha256[wanted[i]]]
    kept = kept[: len(kept) - len(kept) % BATCH] if len(kept) >= BATCH else kept
    if len(kept) < 4:
        raise InputError(
            f"{cache}: of {len(wanted)} images {len(kept)} are below {images or root} as they were cached, and the "
            "plain pipeline needs at least 4; give their folder with --images."
        )
    tower = load_recorded(file.meta, weights)
    if prefix_sha256(tower.visual, spec.unfreeze_blocks) != file.meta["fingerprint_parts"]["prefix_sha256"]:
        raise InputError(f"--weights {tower.source}: not the weights {cache} was made with.")
    return TrainingImages(
        tower=tower,
        paths=[paths[i] for i in kept],
        pixels=np.stack([found[i][0] for i in kept]),
        activations=np.array(file.activations[wanted[kept]]),
        unfreeze_blocks=spec.unfreeze_blocks,
        mean=file.meta["mean"],
        std=file.meta["std"],
        classes=len(file.header.classes),
        weights=tower.source,
    )


def random_labels(n: int, classes: int = CLASSES) -> np.ndarray:
    """Labels (n, C), one in twenty positive and both signs in every class: what they say changes no time."""
    out = (np.random.default_rng(0).random((n, classes)) < 0.05).astype(np.int8)
    out[:2] = [[1], [0]]
    return out


class Arms:
    """The arms over the same images; each method is one or more mini-epochs and returns seconds a sample.

    `workers` load for the plain pipeline, as published.
    """

    def __init__(self, images: TrainingImages, device: str = "cpu", *, workers: int = 2) -> None:
        self.images, self.device, self.workers = images, pick_device(device), workers
        self.n, self.labels = len(images.paths), random_labels(len(images.paths), images.classes)
        self.activations = Activations(images.activations, self.device)
        images.tower.visual.to(self.device)
        self.films = self._films(self.n, flip=True)
        self.plain = Trainer(self._model(0.5), TrainSpec())
        kinds = (self.fold(TrainSpec(precision=kind)) for kind in ("auto", "float32"))
        # The first is what `sweep` would take here; where that is float32, there is one.
        self.folds = {f"cached, {fold.kind}": fold for fold in kinds}

    def _films(self, count: int, *, flip: bool) -> Films:
        m = self.images
        return Films(m.paths[:count], self.labels[:count], m.mean, m.std, size=m.pixels.shape[1], flip=flip)

    def _model(self, dropout: float) -> Model:
        m = self.images
        model = Model(
            m.tower.visual, m.classes, dropout=dropout, blocks=m.unfreeze_blocks, embedding=m.tower.config["embed_dim"]
        )
        return model.to(self.device)

    def fold(self, spec: TrainSpec) -> Fold:
        """A fold that trains on every image; the validation rows only have to be scorable."""
        rows, m = np.arange(self.n), self.images
        return Fold(
            m.tower.visual,
            FoldData(activations=self.activations, labels=self.labels, train_rows=rows, valid_rows=rows),
            spec,
            unfreeze_blocks=m.unfreeze_blocks,
            seed=0,
        )

    def compare(self) -> dict[str, float]:
        """How far fast and slow are apart before either is timed: stored tokens from fresh ones, losses of STEPS steps
        from tokens and from pixels (without dropout, float32), and the plain pipeline's pixels from ours.

        The steps take the fresh tokens: what rounding to float16 moves, batch norm makes larger where images are alike,
        as under random weights. Raises InputError where tokens or losses differ.
        """
        spec = TrainSpec(dropout=0.0, precision="float32")
        fold, model = self.fold(spec), self._model(0.0)
        model.head.load_state_dict(fold.tail.head.state_dict())
        slow, stored, losses = Trainer(model, spec), list[float](), list[float]()
        epochs = (fold.draw() for _ in range(STEPS))
        steps = ((draws, a, b) for draws in epochs for a, b in draws.steps)
        fold.tail.train()
        for draws, a, b in itertools.islice(steps, STEPS):
            rows, views = draws.rows[a:b], draws.views[a:b]
            x = self._normalised(rows.numpy(), views)
            with torch.no_grad():
                tokens = prefix(self.images.tower.visual, x, self.images.unfreeze_blocks)
            stored.append(_apart(self.activations.gather(rows, views), tokens))
            want = slow.step(x, self._targets(rows))
            losses.append(abs(float(fold.step(tokens, rows, draws.masks[a:b])) - want) / want)
        for what, found, allowed in (("tokens", stored, verify.TOLERANCE), ("losses", losses, TOLERANCE)):
            if not max(found) <= allowed:
                raise InputError(
                    f"cached and plain training differ in their {what} by {max(found):.1e} (allowed {allowed:g}), so "
                    "their times compare nothing; `cxrfast verify CACHE` says whether its rows are what they should be."
                )
        return {
            "largest_token_difference": max(stored),
            "largest_loss_difference": max(losses),
            "largest_pixel_difference": pixels_apart(self.films, self.images.pixels),
        }

    def _normalised(self, rows: np.ndarray, views: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, S, S) on the device from decoded pixels, mirrored where a view is the flipped one."""
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (self.images.mean, self.images.std))
        x = normalise(torch.from_numpy(self.images.pixels[rows]), mean, std)
        if views is not None:
            x = torch.where(views.reshape(-1, 1, 1, 1) == 1, x.flip(-1), x)
        return x.to(self.device)

    def _targets(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.labels)[rows].float().to(self.device)

    def _sync(self) -> float:
        """The time once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def whole(self) -> float:
        """The plain pipeline, files to step, and its validation pass."""
        began = self._sync()
        for x, y in loader(self.films, BATCH, workers=self.workers):
            self.plain.step(x.to(self.device), y.to(self.device))
        few = self._films(self._validated, flip=False)
        for x, _ in loader(few, BATCH, workers=self.workers, shuffle=False):
            self.plain.score(x.to(self.device))
        return (self._sync() - began) / self.n

    def decoded(self) -> float:
        """The plain pipeline with decoding and resizing left out."""
        began = self._sync()
        for rows in torch.randperm(self.n).split(BATCH):
            self.plain.step(self._normalised(rows.numpy()), self._targets(rows))
        for rows in torch.arange(self._validated).split(BATCH):
            self.plain.score(self._normalised(rows.numpy()))
        return (self._sync() - began) / self.n

    def cached(self, name: str) -> float:
        """From cached tokens: the mean of EPOCHS mini-epochs, each with its validation.

        One alone is a few steps right after another workload and measures the switch, not the steady state of the 299
        steps of a real epoch.
        """
        fold, began = self.folds[name], self._sync()
        for _ in range(EPOCHS):
            fold.train_epoch(fold.draw())
            predict(fold.tail, fold.activations, np.arange(self._validated))
        return (self._sync() - began) / (EPOCHS * self.n)

    @property
    def _validated(self) -> int:
        return max(1, round(self.n * VALID_SHARE))


def _apart(found: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference of a row (B, ...) relative to the row's peak."""
    found, want = found.flatten(1), want.flatten(1)
    return float(((found - want).abs().amax(1) / want.abs().amax(1)).max())


def measure(arms: Arms, rounds: int, *, on_round: Callable[[int], None] | None = None) -> TrainingResult:
    """Seconds a sample of each arm in interleaved rounds, after a check that they train alike; JSON-ready."""
    before, difference = hardware.gpu_states(), arms.compare()
    work: dict[str, Callable[[], float]] = {PLAIN: arms.whole, DECODED: arms.decoded}
    work |= {name: lambda name=name: arms.cached(name) for name in arms.folds}  # type: ignore[misc]
    for name in list(work)[1:]:  # from files there is nothing to warm up that decoded ones do not
        work[name]()
    samples, watch = run_rounds(lambda: {name: arm() for name, arm in work.items()}, rounds, on_round)
    best = next(iter(arms.folds))
    ratios = {
        "whole": ratio_fields(samples[PLAIN], samples[best]),
        "float32": ratio_fields(samples[DECODED], samples["cached, float32"]),
    }
    return {
        **results.turns(TRAINING, samples, watch, before),
        "seconds_per_sample": spreads(samples),
        "images": arms.n,
        "threads": torch.get_num_threads(),
        "device": arms.device.type,
        "weights": arms.images.weights,
        "unfreeze_blocks": arms.images.unfreeze_blocks,
        "fastest": best,
        "ratios": ratios,
        "largest_token_difference": difference["largest_token_difference"],
        "largest_loss_difference": difference["largest_loss_difference"],
        "largest_pixel_difference": int(difference["largest_pixel_difference"]),
        "extrapolated": {name: search_seconds(median(values)) for name, values in samples.items()},
    }


def search_seconds(seconds_per_sample: float) -> float:
    """Seconds of an Indiana search, extrapolated: folds x epochs x training images x a sample's share of an epoch."""
    return FOLDS * SEARCH_EPOCHS * SEARCH_IMAGES * seconds_per_sample


def describe(result: TrainingResult) -> str:
    """The result as a table a person reads."""
    rows = []
    plain = result["seconds_per_sample"][PLAIN]["median"]
    for name, s in result["seconds_per_sample"].items():
        times = [f"{1000 * s[key]:.2f}" for key in ("median", "min", "max")]
        rows.append([name, *times, f"{plain / s['median']:.2f}", duration(result["extrapolated"][name])])
    columns = ["ms a sample of an epoch", "median", "min", "max", "times as fast", "Indiana search"]
    best, whole = result["fastest"], result["ratios"]["whole"]
    fastest = result["seconds_per_sample"][best]["median"]
    lines = [
        to_plain(Table(columns=columns, rows=rows)),
        "",
        f"{PLAIN} over {best}: {results.describe_ratio(whole)} times, {whole['n']} rounds in turn; "
        f"{result['images']} images, {result['threads']} thread(s), {result['device']}, {result['machine']['cpu']}",
        results.RATIOS,
        f"checked first: losses of {STEPS} steps, cached and plain, agree within "
        f"{result['largest_loss_difference']:.1e}, stored tokens within {result['largest_token_difference']:.1e} of a "
        f"row's peak; pixels differ by at most {result['largest_pixel_difference']} grey level(s)",
        f"Indiana search, EXTRAPOLATED: {FOLDS} folds x {SEARCH_EPOCHS} epochs x {SEARCH_IMAGES:,} training images x "
        f"{1000 * fastest:.2f} ms = {duration(search_seconds(fastest))} (a sample's share holds a quarter of a "
        "validation pass)",
        f"the published pipeline trains every fold anew for each budget, {sum(SweepSpec().epochs)} epochs for "
        f"{SEARCH_EPOCHS}: its search is {sum(SweepSpec().epochs) / SEARCH_EPOCHS:g} times what its row says",
        "not in it: states on disk, the final models, the report; folds one after another, where a GPU trains them "
        "in one step and a head alone has a core each",
    ]
    if result["weights"].startswith("random:"):
        lines.append("note: random weights; they do not change the time")
    return "\n".join([*lines, *results.describe_noise(result)])
