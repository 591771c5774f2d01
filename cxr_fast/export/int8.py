"""Choose the int8 weights of block matrices from images, and the order in which matrices leave int8.

ONNX Runtime gives a whole tensor one range and each row of a weight one step, so a few large values cost all others
their digits. Exact changes of the float graph take that away: a layer norm and the rows of the values also shift and
scale their outputs by channel (SmoothQuant, Xiao et al. 2022, with a shift), and the hidden units of an MLP are sorted
into groups, each divided by its largest value of that token. The weights are then rounded one column after the other,
and what a column loses is made up for in those that follow (GPTQ, Frantar et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..activations.encoder import normalise
from ..models.backbone import prefix
from ..training.run_folder import Run

IMAGES = 64  # the weights are chosen on
POWER = 0.5  # of a channel's range in its scale; the rest is its weight's (LOG: 0.3 to 0.75 tried)
GROUPS, WORTH = 6, 0.95  # hidden units in at most so many groups; another one must take the error below so much of it
ALIGN = 32  # hidden units, of which a group has a multiple
DAMPING = 0.01  # of the mean square of the inputs, added to each
PAIR = 128  # of two neighbours' weights of one sign: AVX2 adds up 255 times each in 16 bits, which hold 32,767
LEAST = 0.17  # GELU goes down to minus this; a group of hidden units is divided by no less
DRAWS = 4  # random mixtures of the classes whose change each matrix is judged by
Plan = Mapping[str, "Matrix"]  # by the name of the node, `blocks.3.fc2`
KINDS = ("qkv", "proj", "fc1", "fc2")
OnProgress = Callable[[int, int], None]  # matrices done, of how many


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix (O, I) of a block in int8, for inputs x' = (x - shift) * scale, (I,) each, which the graph computes.

    `weight` and `bias` give the float product of x'; `groups` says which inputs share a range; `whole` int8 times
    `steps` (groups, O), each for its inputs, is about `weight`. With `by_token` each group of inputs is divided by its
    largest value of that token first, and the product multiplied by it.
    """

    shift: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    groups: tuple[np.ndarray, ...]
    whole: np.ndarray
    steps: np.ndarray
    by_token: bool = False

    def rows(self, index: np.ndarray) -> Matrix:
        """Return the matrix of some of the outputs."""
        bias = None if self.bias is None else self.bias[index]
        return replace(
            self, weight=self.weight[index], bias=bias, whole=self.whole[index], steps=self.steps[:, index]
        )  # fmt: skip

    def columns(self, group: int) -> Matrix:
        """Return the matrix of one group of the inputs, with the whole bias."""
        index = self.groups[group]
        return replace(
            self, shift=self.shift[index], scale=self.scale[index], weight=self.weight[:, index],
            groups=(np.arange(len(index)),), whole=self.whole[:, index], steps=self.steps[group : group + 1],
        )  # fmt: skip


def module_of(block: Any, kind: str) -> Any:
    """Return the linear layer of a block: qkv, proj, fc1 or fc2."""
    return getattr(block.attn if kind in ("qkv", "proj") else block.mlp, kind)


def tokens(run: Run, pixels: np.ndarray) -> torch.Tensor:
    """Compute the frozen activations before the first block, (n, T, D) float32, of uint8 pixels (n, S, S)."""
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return prefix(run.visual, normalise(torch.from_numpy(pixels), mean, std), len(run.visual.trunk.blocks))


def choose(run: Run, pixels: np.ndarray, on_progress: OnProgress) -> dict[str, Matrix]:
    """Choose every block matrix, by the name of its node (`blocks.3.fc2`), on uint8 images (n, S, S)."""
    plan: dict[str, Matrix] = {}
    trunk = run.visual.trunk
    depth = len(trunk.blocks)
    cut = depth - run.info["unfreeze_blocks"]
    total = 4 * (cut + (depth - cut) * len(run.members))
    with torch.inference_mode():
        x = tokens(run, pixels)
        for i in range(cut):
            x = _choose_block(plan, f"blocks.{i}", trunk, i, x)
            on_progress(len(plan), total)
        for k, member in enumerate(run.members):
            y = x
            for i in range(cut, depth):
                y = _choose_block(plan, f"{member_prefix(run, k)}blocks.{i}", member.visual.trunk, i, y)
                on_progress(len(plan), total)
    return plan


def member_prefix(run: Run, k: int) -> str:
    """Return what the names of the nodes of member k's tail begin with."""
    several = len(run.members) > 1 or run.info["train"].get("tta") == "flip"
    return f"member{k}." if several else ""


def answers_first_only(trunk: Any, i: int) -> bool:
    """Say whether block i has to answer for the class token alone."""
    return i == len(trunk.blocks) - 1 and trunk.global_pool == "token"


def _choose_block(plan: dict[str, Matrix], name: str, trunk: Any, i: int, x: torch.Tensor) -> torch.Tensor:
    """Choose the matrices of one block from its inputs (n, T, D); the block's outputs."""
    block, first = trunk.blocks[i], answers_first_only(trunk, i)
    inputs: dict[str, torch.Tensor] = {}

    def keep(kind: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            inputs[kind] = args[0][:, :1] if first else args[0]

        return hook

    handles = [module_of(block, kind).register_forward_pre_hook(keep(kind)) for kind in KINDS]
    try:
        y: torch.Tensor = block(x)
    finally:
        for handle in handles:
            handle.remove()
    for kind in KINDS[1:] if first else KINDS:
        plan[f"{name}.{kind}"] = _choose_matrix(kind, *_weight(block, kind), inputs[kind])
    return y


def _weight(block: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (O, I) and bias (O,), zeros where there is none, with the layer scale behind it."""
    linear = module_of(block, kind)
    weight = linear.weight.detach().float()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
    behind = {"proj": getattr(block.ls1, "gamma", None), "fc2": getattr(block.ls2, "gamma", None)}.get(kind)
    return (weight, bias) if behind is None else (weight * behind.detach()[:, None], bias * behind.detach())


def plain(block: Any, kind: str) -> Matrix:
    """Return a block's matrix for float: nothing is shifted, scaled or sorted, and there are no rounded weights."""
    weight, bias = (tensor.numpy() for tensor in _weight(block, kind))
    none = np.zeros(weight.shape[1], np.float32)
    return Matrix(
        shift=none, scale=none + 1, weight=weight, bias=None if module_of(block, kind).bias is None else bias,
        groups=(np.arange(len(none)),), whole=np.empty((len(weight), 0), np.int8),
        steps=np.ones((1, len(weight)), np.float32),
    )  # fmt: skip


def round_plainly(run: Run) -> dict[str, Matrix]:
    """Return every block matrix, each weight rounded by itself and nothing else changed, by the name of its node."""
    plan: dict[str, Matrix] = {}
    depth = len(run.visual.trunk.blocks)
    for k, member in enumerate(run.members):
        for i, block in enumerate(member.visual.trunk.blocks):
            start = member_prefix(run, k) if i >= depth - run.info["unfreeze_blocks"] else ""
            for kind in KINDS:
                matrix = plain(block, kind)
                steps = _steps(torch.from_numpy(matrix.weight), _partners(matrix.groups), matrix.groups[0]).numpy()
                whole = np.round(matrix.weight / steps[:, None]).astype(np.int8)
                plan[f"{start}blocks.{i}.{kind}"] = replace(matrix, whole=whole, steps=steps[None])
    return plan


def _choose_matrix(kind: str, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> Matrix:
    """Choose one matrix from inputs (n, T, I)."""
    width = weight.shape[1]
    x = x.flatten(0, 1)
    if kind == "fc2":  # behind GELU, through which neither shift nor scale can be taken
        shift, scale = torch.zeros(width), torch.ones(width)
        groups = _groups(x.amax(0).clamp_min(0), weight.square().sum(0))
    else:
        shift = x.mean(0)
        scale = _scale((x - shift).abs().amax(0), weight.norm(dim=0))
        groups = (np.arange(width),)
    x = (x - shift) * scale
    weight, bias = weight / scale, bias + weight @ shift
    partners = _partners(groups)
    steps = torch.stack([_steps(weight, partners, group) for group in groups])
    each = torch.empty(width, dtype=torch.long)
    for k, group in enumerate(groups):
        each[group] = k
    whole = round_weight(weight, steps[each].T, x.T @ x, partners)
    return Matrix(
        shift=shift.numpy(), scale=scale.numpy(), weight=weight.numpy(), bias=bias.numpy(), groups=groups,
        whole=whole.numpy().astype(np.int8), steps=steps.numpy(), by_token=kind == "fc2",
    )  # fmt: skip


def _scale(ranges: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scale of each input (I,), of its range and the length of its weights: less range, more weight, as POWER says."""
    scale = weights.clamp_min(1e-12) ** (1 - POWER) / ranges.clamp_min(1e-6) ** POWER
    return (scale / scale.median()).clamp(1e-3, 1e3)


def _groups(ranges: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Sort inputs by range (I,) into groups with the least error, the sum of range squared times weights squared (I,).

    The borders are found by trying all, on a raster of ALIGN; a group more must be worth it.
    """
    order = torch.argsort(ranges, stable=True)
    top = (ranges[order].double() + LEAST).square()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), weights[order].double().cumsum(0)])
    points = [*range(0, len(order), ALIGN), len(order)]

    def cost(a: int, b: int) -> float:
        return float(top[points[b] - 1] * (below[points[b]] - below[points[a]]))

    pair = {(a, b): cost(a, b) for b in range(1, len(points)) for a in range(b)}
    best: dict[int, tuple[float, tuple[int, ...]]] = {b: (pair[0, b], (b,)) for b in range(1, len(points))}
    end = len(points) - 1
    chosen = best[end]
    for _ in range(1, GROUPS):
        best = {
            b: min((best[a][0] + pair[a, b], (*best[a][1], b)) for a in best if a < b) for b in best if min(best) < b
        }
        if end not in best or best[end][0] > WORTH**2 * chosen[0]:
            break
        chosen = best[end]
    borders = [0, *(points[b] for b in chosen[1])]
    index = order.numpy()
    if len(borders) == 2:
        return (np.arange(len(index)),)
    return tuple(np.sort(index[a:b]) for a, b in pairwise(borders))


def _steps(weight: torch.Tensor, partners: np.ndarray, group: np.ndarray) -> torch.Tensor:
    """The step of each row (O,) that the weights of a group fit in, with a little room for what GPTQ adds."""
    one, other = weight[:, group], weight[:, partners[group]]
    alone = one.abs().amax(1) / 127
    above, below = one.clamp_min(0) + other.clamp_min(0), one.clamp_max(0) + other.clamp_max(0)
    together = torch.maximum(above, -below).amax(1) / (PAIR - 2)
    return torch.maximum(alone, together).clamp_min(1e-30)


def _partners(groups: tuple[np.ndarray, ...]) -> np.ndarray:
    """For each input (I,) the one beside it in its group, or itself at an odd end: see PAIR."""
    out = np.empty(sum(map(len, groups)), np.int64)
    for group in groups:
        beside = np.minimum(np.arange(len(group)) ^ 1, len(group) - 1)
        out[group] = group[beside]
    return out


def round_weight(
    weight: torch.Tensor, steps: torch.Tensor, squares: torch.Tensor, partners: np.ndarray, *, slab: int = 128
) -> torch.Tensor:
    """Round weight (O, I) to whole steps (O, I) for inputs whose products summed are `squares` (I, I).

    GPTQ: inputs in falling order of size, each one's rounding error spread over those that follow as the inverse of
    `squares` says; without correlation it is plain rounding. A row that plain rounding serves better has that. -127 to
    127, and two `partners` (I,) of one sign at most PAIR together, so that no CPU's sums of two products overflow.
    """
    plain, widths = (weight / steps).round(), steps
    size = squares.diagonal()
    damped = squares + DAMPING * size.mean().clamp_min(1e-12) * torch.eye(len(size))
    order = torch.argsort(size, descending=True, stable=True)
    # The inverse is upper.T @ upper: one factor of the squares in the other order, inverted, is the same as two more.
    factor = torch.linalg.cholesky(damped[order][:, order].flip(0, 1))
    upper = torch.linalg.solve_triangular(factor, torch.eye(len(size)), upper=False).flip(0, 1)
    left, steps = weight[:, order].clone(), steps[:, order]
    whole = torch.zeros_like(left)
    place = torch.argsort(order)[torch.from_numpy(partners)[order]]  # of each one's partner, in the order of work
    for start in range(0, left.shape[1], slab):
        end = min(start + slab, left.shape[1])
        lost = torch.empty(len(left), end - start)
        for j in range(start, end):
            other = whole[:, place[j]]
            least = -(PAIR + other.clamp_max(0)).clamp_max(127)
            most = (PAIR - other.clamp_min(0)).clamp_max(127)
            whole[:, j] = (left[:, j] / steps[:, j]).round().clamp(least, most)
            lost[:, j - start] = (left[:, j] - whole[:, j] * steps[:, j]) / upper[j, j]
            left[:, j:end] -= lost[:, j - start, None] * upper[j, j:end]
        left[:, end:] -= lost @ upper[start:end, end:]
    out = torch.empty_like(whole)
    out[:, order] = whole
    better = _lost(plain * widths - weight, squares) < _lost(out * widths - weight, squares)
    return torch.where((better & _fits(plain, partners))[:, None], plain, out)


def _lost(error: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The squared error of each output (O,) over the inputs whose products summed are `squares`, by weights' errors."""
    return ((error @ squares) * error).sum(1)


def _fits(whole: torch.Tensor, partners: np.ndarray) -> torch.Tensor:
    """Whether the weights of each output (O,) keep to -127 to 127, and partners of one sign to PAIR together."""
    other = whole[:, torch.from_numpy(partners)]
    alone = torch.from_numpy(partners == np.arange(len(partners)))
    high = torch.where(alone, whole, whole.clamp_min(0) + other.clamp_min(0))
    low = torch.where(alone, whole, whole.clamp_max(0) + other.clamp_max(0))
    return (whole.abs() <= 127).all(1) & (high <= PAIR).all(1) & (low >= -PAIR).all(1)


def emulate(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """Slow twin of the graph's product: (n, T, I) to (n, T, O), each image and group by its own range as it comes."""
    x = (x - torch.from_numpy(matrix.shift)) * torch.from_numpy(matrix.scale)
    out = torch.zeros(()) if matrix.bias is None else torch.from_numpy(matrix.bias)
    for group, steps in zip(matrix.groups, torch.from_numpy(matrix.steps), strict=True):
        part = x[..., group]
        largest = part.amax(-1, keepdim=True).clamp_min(LEAST) if matrix.by_token else torch.ones(())
        part = part / largest
        low = part.amin((1, 2), keepdim=True).clamp_max(0)
        step = ((part.amax((1, 2), keepdim=True).clamp_min(0) - low) / 255).clamp_min(1e-30)
        zero = (-low / step).round()
        part = (((part / step).round() + zero).clamp(0, 255) - zero) * step
        rounded = torch.from_numpy(matrix.whole[:, group]).float() * steps[:, None]
        out = out + functional.linear(part, rounded) * largest
    return out


def order(run: Run, plan: Plan, pixels: np.ndarray) -> list[str]:
    """Sort block matrices (`10.fc2`) by what float gains over its cost, the number of products, the most first."""
    trunk = run.visual.trunk

    def products(name: str) -> int:
        i, kind = name.split(".")
        rows = 1 if answers_first_only(trunk, int(i)) else trunk.patch_embed.num_patches
        return rows * int(module_of(trunk.blocks[int(i)], kind).weight.numel())

    gain = gains(run, plan, pixels)
    return sorted(gain, key=lambda name: (-gain[name] / products(name), name))


def gains(run: Run, plan: Plan, pixels: np.ndarray) -> dict[str, float]:
    """Measure, for each block matrix, the mean squared change of a class's logit that it alone in int8 makes.

    To first order, on uint8 images (n, S, S): its error times the slope of DRAWS random mixtures of the classes.
    """
    out: dict[str, float] = {}
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    x = normalise(torch.from_numpy(pixels), mean, std)
    generator = torch.Generator().manual_seed(0)
    for k, member in enumerate(run.members):
        lost: dict[str, torch.Tensor] = {}
        ends: dict[str, torch.Tensor] = {}
        with _watched(run, k, plan, lost, ends), torch.enable_grad():
            logits = member.head(functional.normalize(member.visual(x.clone().requires_grad_()), dim=-1))
        share = 1 / (DRAWS * logits.shape[1] * len(run.members) ** 2)
        for draw in range(DRAWS):
            signs = torch.randint(0, 2, logits.shape[1:], generator=generator) * 2.0 - 1
            slopes = torch.autograd.grad((logits * signs).sum(), list(ends.values()), retain_graph=draw < DRAWS - 1)
            for name, slope in zip(ends, slopes, strict=True):
                change = (slope * lost[name]).flatten(1).sum(1)
                out[name] = out.get(name, 0.0) + share * float(change.square().mean())
    return out


@contextmanager
def _watched(
    run: Run, k: int, plan: Plan, lost: dict[str, torch.Tensor], ends: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Meanwhile keep each product of member k's tower, and what int8 would have added to it."""
    trunk = run.members[k].visual.trunk
    cut = len(trunk.blocks) - run.info["unfreeze_blocks"]
    handles = []

    def keep(name: str, matrix: Matrix, first: bool, behind: Any) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            with torch.no_grad():
                exact = output if behind is None else output * behind
                error = emulate(matrix, args[0][:, :1] if first else args[0]) - (exact[:, :1] if first else exact)
                error = error if behind is None else error / behind
                lost[name] = functional.pad(error, (0, 0, 0, output.shape[1] - 1)) if first else error
            ends[name] = output

        return hook

    for i, block in enumerate(trunk.blocks):
        start, first = member_prefix(run, k) if i >= cut else "", answers_first_only(trunk, i)
        for kind in KINDS[1:] if first else KINDS:
            gamma = {"proj": getattr(block.ls1, "gamma", None), "fc2": getattr(block.ls2, "gamma", None)}.get(kind)
            hook = keep(f"{i}.{kind}", plan[f"{start}blocks.{i}.{kind}"], first, gamma)
            handles.append(module_of(block, kind).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
