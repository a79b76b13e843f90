# SPDX-License-Identifier: MIT
"""Measure trained runs at each tap: h, the layers inside the head, z and p.

    python eval.py                           # the newest run in runs/: a row for each tap
    python eval.py RUN RUN ...               # a row for each method: mean ± standard deviation over runs that differ in the seed alone
    python eval.py RUN RUN ... --taps        # the same with a row for each tap of each method
    python eval.py RUN --dataset cifar100    # transfer: other labelled images through the same encoder
    python eval.py RUN --probe transform     # what linear probes can tell of what was done to an image; needs no labels
    python eval.py RUN --neighbors out.png   # pictures: test images with their nearest training images; --views, --curves

Every network is frozen and in eval mode; labels are read here and nowhere else. Probes see the training images of the run
(its first --limit N, where it was given); the test images are scored once. What was measured is kept in RUN/eval.json.
"""
if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends without a traceback

import argparse
import copy
import functools
import io
import json
import math
import os
import statistics
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import projhead
import train
from train import UserError, note

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PROBED = 10_000     # images of either part that --probe transform looks at, at most


# ---------------------------------------------------------------------------- runs and features

def load_run(path, device="cpu") -> argparse.Namespace:
    """A run from its folder: .path, .args, .step of .steps, .images, and the frozen .encoder, .head and .predictor in eval mode, and
    .untrained, the encoder before the first step. Only checkpoint.pt is read. Raises UserError."""
    path = Path(path).parent if Path(path).name == "checkpoint.pt" else Path(path)
    if not (path / "checkpoint.pt").is_file():
        raise UserError(f"no checkpoint.pt in {path}: name a run's folder, or make one by python train.py")
    args, step, images, found = train.load(path / "checkpoint.pt")
    model = train.build(args)
    untrained = copy.deepcopy(model.f)
    train.restore({name: part for name, part in train.tensors(model).items() if name != "target"}, found)
    run = argparse.Namespace(path=path, args=args, step=step, images=images,
                             steps=args.epochs * (images[0] // min(args.batch_size, images[0])),
                             encoder=model.f, head=model.g, predictor=model.q, untrained=untrained)
    for module in (run.encoder, run.head, run.predictor, run.untrained):
        module.to(device).eval().requires_grad_(False)
    return run


def layers(head: nn.Module) -> list[nn.Module]:
    return [m for m in head.modules() if not list(m.children())]


def layer_name(run, tap: str) -> str:
    """The class of the layer whose output a tap inside the head is; "" for the other taps."""
    return type(layers(run.head)[int(tap[2:-1])]).__name__ if tap.startswith("g[") else ""


def taps(run, x: Tensor) -> dict[str, Tensor]:
    """{tap: (N, dim)} of normalized images x (N, 3, S, S): h, g[0], g[1] ... the layers inside the head, z, and p."""
    h, inside = run.encoder(x.contiguous(memory_format=torch.channels_last)).float(), {}
    hooks = [layer.register_forward_hook(lambda _, __, y, i=i: inside.update({f"g[{i}]": y}))
             for i, layer in enumerate(layers(run.head))]
    z = run.head(h)
    for hook in hooks:
        hook.remove()
    out = {"h": h} | {tap: y for tap, y in inside.items() if y is not z} | ({} if z is h else {"z": z})
    return out | ({"p": run.predictor(z)} if run.args.predictor != "none" else {})


@torch.no_grad()
def features(run, images: Tensor, view=None, batch_size: int = 500) -> dict[str, Tensor]:
    """{tap: float32 (M, dim)} of images uint8 (M, 3, S, S), each passed through the frozen networks once.

    run: what load_run returned, or a run's folder. view: a function uint8 (N, 3, S, S) -> normalized float32 in place of
    plain normalization. Images of another size than the run's are resized. Taps: h, g[0] ... (layers inside the head), z
    where there is a head, p where there is a prediction head. Raises UserError where there is no run or a feature is not
    finite, RuntimeError if a parameter or buffer moved.
    """
    run = run if isinstance(run, argparse.Namespace) else load_run(run)
    modules = nn.ModuleList([run.encoder, run.head, run.predictor]).eval()
    before = {k: v.clone() for k, v in modules.state_dict().items()}
    device, size, parts = next(run.encoder.parameters()).device, run.args.image_size, []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        x = view(batch) if view else train.normalize(batch.float() / 255)
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        parts.append(taps(run, x))
    if any(not torch.equal(v, before[k]) for k, v in modules.state_dict().items()):
        raise RuntimeError("the frozen networks moved during evaluation")
    found = {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}
    if not all(x.isfinite().all() for x in found.values()):
        raise UserError("the features of the run are not finite")
    return found


def untrained(run) -> argparse.Namespace:
    """The run's encoder before the first step, without a head, for features()."""
    args = argparse.Namespace(predictor="none", image_size=run.args.image_size)
    return argparse.Namespace(args=args, encoder=run.untrained, head=nn.Sequential(), predictor=nn.Identity())


# ---------------------------------------------------------------------------- probes

@torch.no_grad()
def probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[float, float, float]:
    """Multinomial logistic regression on frozen features: (test accuracy in percent, chosen l2, its held-out accuracy in percent).

    x: (M, dim), y: int64 (M,). Features are standardized by the training part. Minimizes mean cross-entropy + l2/2
    ||W||^2 (not the bias); l2 is the one of L2 that does best on a held-out fifth of the training part (the stronger of
    equals), then all of it is fitted again. The search ends early where a weaker l2 is worse by over two standard errors.
    The test labels are used once, to count. Deterministic. Raises ValueError for fewer than 5 training rows.
    """
    if len(train_x) < 5:
        raise ValueError(f"a linear probe needs at least 5 training rows, not {len(train_x)}")
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    mean, std = train_x.mean(0), train_x.std(0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)              # what varies by less is rounding of a constant
    x, test_x = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (train_x[order], test_x))    # bias: a column of 1
    classes, y = train_y[order].unique(return_inverse=True)         # a class that is not there is never predicted
    held, n = len(x) // 5, len(x)
    covariance, weights, pairs, best = (x.T @ x / n).double(), x.new_zeros(len(classes), x.shape[1]), [], None
    for l2 in L2:                                                   # each starts where the last ended
        weights, pairs = fit(x[held:], y[held:], l2, weights, pairs, covariance, tolerance=1e-5)
        right = (x[:held] @ weights.T).argmax(1) == y[:held]
        if best is None or right.sum() > best[0].sum():
            best = right, l2, weights, pairs
        lost, won = (best[0] & ~right).sum().item(), (right & ~best[0]).sum().item()
        if lost - won > 2 * (lost + won) ** 0.5:
            break
    right, l2, weights, pairs = best
    weights, _ = fit(x, y, l2, weights, pairs, covariance, tolerance=1e-7)
    hits = classes[(test_x @ weights.T).argmax(1)] == test_y
    return 100 * hits.sum().item() / len(hits), l2, 100 * right.sum().item() / len(right)


def linear_probe(*data: Tensor) -> tuple[float, float]:
    """(test accuracy in percent, chosen l2) of probe(train_x, train_y, test_x, test_y). Raises ValueError for fewer than 5 rows."""
    return probe(*data)[:2]


def fit(x: Tensor, y: Tensor, l2: float, weights: Tensor, pairs: list, covariance: Tensor, tolerance: float):
    """Minimizes mean cross-entropy + l2/2 ||W||^2 (not the last column) by L-BFGS: (weights, pairs).

    x: (M, dim), the last column 1. y: int64 (M,). weights: (classes, dim), the start. covariance: double (dim, dim),
    x^T x / M, or about that. pairs: what the last fit returned, of a problem with other rows or another l2, or []: what
    it learned of the curvature helps this one. Ends where the loss is about `tolerance` above its minimum; nearer,
    down to 1e-7, where the loss is small: there less decides.

    At W = 0 the Hessian is covariance / classes + l2 for each class, less what all classes share, which does not matter;
    L-BFGS starts from its inverse. It needs no loss values: the loss is convex.
    """
    classes, penalty = len(weights), torch.full_like(weights[0], l2)
    penalty[-1] = 0
    root = torch.linalg.cholesky(covariance / classes + (penalty + 1e-9).diag()).to(x)
    labels = torch.zeros_like(weights)                          # the part of the gradient that the labels make
    for part, label in zip(x.split(512), y.split(512)):
        labels.addmm_(F.one_hot(label, classes).T.to(x), part)
    def gradient_of(W):
        total = -labels
        for part in x.split(512):                               # 512 rows fit the processor's cache
            total.addmm_((W @ part.T).softmax(0), part)
        return total / len(x) + penalty * W
    def newton(G):                                              # the step that the Hessian at W = 0 proposes
        return torch.cholesky_solve(G.T, root).T
    pairs = [(s, d + penalty * s) for s, d in pairs]            # a step, and what it changed in the gradient
    pairs = [(s, d) for s, d in pairs if (s * d).sum() > 0]
    gradient = gradient_of(weights)
    for _ in range(1000):
        step, shares = gradient.clone(), []
        for s, d in reversed(pairs):
            shares.append((s * step).sum() / (s * d).sum())
            step -= shares[-1] * d
        step = newton(step)
        if pairs:
            s, d = pairs[-1]
            step *= (s * d).sum() / (d * newton(d)).sum()
        for s, d in pairs:
            step += (shares.pop() - (d * step).sum() / (s * d).sum()) * s
        descent, t = (gradient * step).sum().item(), 1.0
        size = (penalty * weights.square()).sum().item()        # about the loss itself, where it is small
        if descent / 2 < max(min(tolerance, 1e-7), tolerance * min(size, 1)):      # about what is left to gain
            break
        for _ in range(20):                                     # shorten a step that ends on too steep a rise
            new = weights - t * step
            new_gradient = gradient_of(new)
            rise = -(new_gradient * step).sum().item()
            if rise <= 0.5 * descent:
                break
            t *= max(0.1, descent / (descent + rise))
        s, d = new - weights, new_gradient - gradient
        weights, gradient = new, new_gradient
        if (s * d).sum() > 0:
            pairs = [*pairs[-19:], (s, d)]
    return weights, [(s, d - penalty * s) for s, d in pairs]


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int | list[int] = 20) -> float | list[float]:
    """Accuracy in percent of a majority vote of the k nearest training rows by cosine; of equals the smaller class.

    x: (M, dim), y: int64 (M,). Every vote counts the same (no weighting by distance). k is cut to the training rows; a
    list of ks gives a list of accuracies and costs one search.
    """
    ks = [min(number, len(train_x)) for number in ([k] if isinstance(k, int) else k)]
    train_x, test_x, right = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1), [0] * len(ks)
    classes = int(max(train_y.max(), test_y.max())) + 1
    for x, y in zip(test_x.split(1000), test_y.split(1000)):
        labels = train_y[(x @ train_x.T).topk(max(ks), dim=1).indices]             # N x max(ks), the nearest first
        for i, number in enumerate(ks):
            votes = labels.new_zeros(len(y), classes).scatter_add_(1, labels[:, :number], torch.ones_like(labels))
            right[i] += (votes.argmax(dim=1) == y).sum().item()
    accuracies = [100 * number / len(test_y) for number in right]
    return accuracies[0] if isinstance(k, int) else accuracies


# ---------------------------------------------------------------------------- what is measured

def load_data(run, dataset=None, data=None) -> tuple:
    """(images, labels, classes) of the training part and of the test part: the run's own, or another data set's. Of its own
    training part the images that the run was trained on. labels are (M, 1), or (M, 2) for shapes. Raises UserError."""
    args, own = run.args, dataset in (None, run.args.dataset)
    parts = [train.read_dataset(dataset or args.dataset, place(run, data), part, args.image_size, args.limit if own and part else None)
             for part in (True, False)]
    if own and train.fingerprint(parts[0][0]) != run.images:
        note(f"{run.path} was trained on {run.images[0]} other images than the {len(parts[0][0])} training images here")
    return tuple((images, labels if labels.ndim == 2 else labels[:, None], classes) for images, labels, classes in parts)


def place(run, data=None) -> str:
    """Where images are read: data, or where the run found its own, or "data"."""
    return data or run.args.data or "data"


def labelled(images: Tensor, labels: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """The images with a known label, and their labels; says on stderr how many have none."""
    known = (labels >= 0).all(1)
    if not known.all():
        note(f"{len(known) - int(known.sum())} of {len(known)} {part} images have no label, or one that no training image has: "
             "no probe sees them")
    return images[known], labels[known]


def table(run, ks=(20, 200), dataset=None, data=None, show=lambda row: None) -> list[dict]:
    """A row {tap, layer, dim, linear, held_out, knn20, ... rank, alignment, uniformity} for each tap, the untrained h last.

    held_out is the linear probe's accuracy on the fifth of the training part that chose its l2. Each row has its `spectrum`;
    that of h also, where the head has weights, the percentage of its variance `seen` by the head's first layer (projhead.seen),
    and `carrying`, how many of its features carry 99 % of a mini-batch's gradient. show(row) is called for each.
    """
    (train_images, train_labels, _), (test_images, test_labels, _) = load_data(run, dataset, data)
    all_test, args = test_images, run.args
    train_images, train_labels = labelled(train_images, train_labels, "training")
    test_images, test_labels = labelled(test_images, test_labels, "test")
    names = (" shape", " hue") if train_labels.shape[1] == 2 else ("",)
    probed = len(train_images) >= 5 and len(test_images) > 0
    if not probed:
        note("too few labels: no accuracies")
    rows = []
    for name, source in (("", run), (" untrained", untrained(run))):
        random = train.generator(0, 0, 1)               # the same views of the trained and of the untrained encoder
        def view(batch):
            return train.augment(batch, random, args.crop_scale, args.hue, args.grayscale)
        a, b = (features(source, images) if probed else None for images in (train_images, test_images))
        every = b if probed and len(test_images) == len(all_test) else features(source, all_test)
        view1, view2 = (features(source, all_test, view) for _ in "12")
        for tap in every:
            row = {"tap": tap + name, "layer": layer_name(run, tap), "dim": every[tap].shape[1]}
            for i, label in enumerate(names if probed else ()):
                four = a[tap], train_labels[:, i].to(a[tap].device), b[tap], test_labels[:, i].to(a[tap].device)
                working(f"{run.path}: {tap}{name}, linear probe{label}")
                row["linear" + label], row["l2" + label], row["held_out" + label] = probe(*four)
                working(f"{run.path}: {tap}{name}, neighbours{label}")
                row |= {f"knn{k}{label}": accuracy for k, accuracy in zip(ks, knn(*four, k=list(ks)))}
            if tap + name == "h" and any(isinstance(layer, nn.Linear) for layer in layers(run.head)):
                row["seen"] = 100 * projhead.seen(every["h"], projhead.first_weight(run.head))
                row["carrying"] = carrying(run, train_images if probed else all_test)
            row |= {"rank": projhead.effective_rank(every[tap]), "alignment": projhead.alignment(view1[tap], view2[tap]),
                    "uniformity": projhead.uniformity(every[tap]), "spectrum": spectrum(every[tap])}
            working("")
            show(row)
            rows.append(row)
    return rows


def spectrum(h: Tensor) -> list[float]:
    """The singular values number 1, 2, 4, 8 ... of h (M, D), as fractions of the first."""
    s = torch.linalg.svdvals(h.double())
    return [(s[i - 1] / s[0]).item() for i in (2**k for k in range(len(s).bit_length()))]


def carrying(run, images: Tensor, batches: int = 10) -> float:
    """How many of the D features of h carry 99 % of |dL/dh|^2 in a mini-batch; L is the run's objective. The mean over
    mini-batches of views as in training; the networks are in eval mode, and the target is the stop-gradient one."""
    model, N = train.Model(run.encoder, run.head, run.predictor, None, None), min(run.args.batch_size, len(images))
    device, counts = next(run.encoder.parameters()).device, []
    for batch in train.two_views(images, run.args, range(batches), max(1, len(images) // N), N, device):
        h = run.encoder(batch[0]).float().requires_grad_()
        train.objective(h, None, model, run.args).backward()
        counts.append(projhead.features_holding(h.grad.square().sum(dim=0)))
    return statistics.mean(counts)


# ---------------------------------------------------------------------------- what was done to an image

def rotate(x: Tensor, y: Tensor) -> Tensor:
    """x (N, 3, S, S) turned counterclockwise by y (N,) quarter turns."""
    x = x.clone()
    for k in (1, 2, 3):
        x[y == k] = x[y == k].rot90(k, (2, 3))
    return x


def flip(x: Tensor, y: Tensor) -> Tensor:
    """x (N, 3, S, S), mirrored left to right where y (N,) is 1."""
    return torch.where(y[:, None, None, None] == 1, x.flip(3), x)


def gray(x: Tensor, y: Tensor) -> Tensor:
    """x (N, 3, S, S), without colour where y (N,) is 1."""
    return torch.where(y[:, None, None, None] == 1, train.to_gray(x), x)


def quadrant(x: Tensor, y: Tensor) -> Tensor:
    """Quadrant y (N,) of x (N, 3, S, S): upper left, upper right, lower left, lower right; resized to S."""
    S = x.shape[-1]
    rows, columns = (train.resize_matrix(half[:, None, None] * (S - S // 2), y.new_full((1, 1, 1), S // 2), S, S)[:, None]
                     for half in (y // 2, y % 2))
    return rows @ x @ columns.mT


TRANSFORMS = {"rotation": (rotate, 4), "flip": (flip, 2), "gray": (gray, 2), "quadrant": (quadrant, 4)}     # and classes


def transform_table(run, dataset=None, data=None, show=lambda row: None) -> list[dict]:
    """A row {tap, layer, dim, rotation, flip, gray, quadrant} for each tap, the untrained h and chance last.

    Each cell is a linear probe's accuracy in percent, for which of the transformation's classes was done to an image.
    Every image gets one at random, the same for all taps. Only the first eval.PROBED training images of the run and
    test images are looked at, and no labels. Raises UserError for fewer than 5 training images.
    """
    train_images, test_images = (images[:PROBED] for images, _, _ in load_data(run, dataset, data))
    if len(train_images) < 5:
        raise UserError(f"--probe transform needs at least 5 training images, not {len(train_images)}")
    rows = {}
    for column, (transform, classes) in TRANSFORMS.items():
        for name, source in (("", run), (" untrained", untrained(run))):
            (a, a_y), (b, b_y) = (transformed(source, images, transform, classes, seed)
                                  for seed, images in enumerate((train_images, test_images)))
            for tap in a:
                working(f"{run.path}: {tap}{name}, {column}")
                row = rows.setdefault(tap + name, {"tap": tap + name, "layer": layer_name(run, tap), "dim": a[tap].shape[1]})
                row[column], row["l2 " + column] = linear_probe(a[tap], a_y, b[tap], b_y)
    working("")
    chance = {column: 100 / classes for column, (_, classes) in TRANSFORMS.items()}
    rows = [*rows.values(), {"tap": "chance", "layer": "", "dim": 0, **chance}]
    for row in rows:
        show(row)
    return rows


def transformed(run, images: Tensor, transform, classes: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """features() of uint8 images (M, 3, S, S), each transformed by a class of its own, and the classes (M,)."""
    random, drawn = train.generator(seed, 0, 1), []
    def view(batch):
        drawn.append(torch.randint(classes, (len(batch),), generator=random).to(batch.device))
        return train.normalize(transform(batch.float() / 255, drawn[-1]))
    return features(run, images, view), torch.cat(drawn)


# ---------------------------------------------------------------------------- tables

def measured(run, question: dict, show=lambda row: None) -> list[dict]:
    """The rows that answer the question {probe, ks, dataset, data}: from RUN/eval.json, if they are there for this checkpoint,
    else measured now and put there. show(row) is called for each."""
    if (question["dataset"] or run.args.dataset) == "folder":           # the same place may hold other images now
        root = Path(place(run, question["data"]))
        question = question | {"folder": train.listing(sorted(train.image_files(root)), root)}
    file, key, results = run.path / "eval.json", json.dumps(question), {}
    crc = zlib.crc32((run.path / "checkpoint.pt").read_bytes())
    if file.is_file() and not file.is_symlink() and file.stat().st_size < 2**20:
        try:
            kept = json.loads(file.read_text())
            results = dict(kept["results"]) if kept["checkpoint"] == crc else {}
            rows = [{str(column): math.nan if v is None else v for column, v in row.items()} for row in results.get(key, [])]
            if rows and all({"tap", "layer", "dim"} <= row.keys() and type(row["tap"]) is str and
                            all(isinstance(v, (str, int, float)) for k, v in row.items() if k != "spectrum") for row in rows):
                for row in rows:
                    show(row)
                return rows
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            results = {}                                # not ours: measured anew
    where = question["dataset"], question["data"]
    rows = table(run, question["ks"], *where, show) if question["probe"] == "labels" else transform_table(run, *where, show)
    try:
        train.write(file, train.as_json({"checkpoint": crc, "step": run.step, "results": results | {key: rows}}).encode())
    except UserError as e:                              # another's run, say: the table is shown all the same
        note(f"not kept: {e}")
    return rows


def show_line(cells: list, widths: list[int]) -> None:
    train.say("| " + " | ".join(str(cell).ljust(w) for cell, w in zip(cells, widths)) + " |")


def cell(key: str, values: list, raw: bool = False) -> str:
    """One value, or mean ± standard deviation of several, or all of them."""
    if not values or any(isinstance(v, str) for v in values):
        return values[0] if values else ""
    values = [math.nan if v is None else v for v in values]
    form = "{:.0f}" if key in ("dim", "n") else "{:.2f}" if key in ("alignment", "uniformity", "pruned") else "{:.1f}"
    if key == "dim":
        values = values[:1]
    if raw or len(values) == 1:
        return " ".join(form.format(v) for v in values)
    known = all(map(math.isfinite, values))             # Python 3.11's stdev fails on NaN
    return f"{form}±{form}".format(statistics.mean(values), statistics.stdev(values) if known else math.nan)


def columns_of(row: dict) -> list[str]:
    return [key for key in row if not key.startswith("l2") and key not in ("seen", "spectrum", "carrying")]


def one_table(run, question: dict, title: str) -> list[dict]:
    """Print the title, and a row for each tap of a run when it is measured."""
    columns, widths = [], []
    def show(row):
        if not columns:
            columns.extend(key for key in columns_of(row) if not key.startswith("held_out"))
            named = max(5, *(len(type(layer).__name__) for layer in layers(run.head)))
            widths.extend([11, named] + [max(5, len(key)) for key in columns[2:]])
            train.say(title)
            show_line(columns, widths), show_line(["-" * w for w in widths], widths)
        show_line([cell(key, [row[key]] if key in row else []) for key in columns], widths)
    return measured(run, question, show)


def many_table(runs: list, question: dict, taps: bool, raw: bool) -> None:
    """Print a row for each method, or for each tap of each: runs that differ in the seed alone are one row, sorted as given."""
    kinds = sorted({run.args.dataset for run in runs})
    if len(kinds) > 1 and not question["dataset"]:
        raise UserError(f"the runs are of different data sets, {' and '.join(kinds)}: name one for all by --dataset")
    methods, start = {}, {}                             # {flags: [(rows, metrics)]}, {encoder and images: {seed: the untrained row}}
    for run in runs:
        rows, args = measured(run, question), run.args
        head = (f"--head {args.head}",) if args.predictor == "none" else ()        # named also where it is the default
        flags = head + tuple(f for f in train.flags(args) if f not in head and not f.startswith("--seed "))
        flags += (f"--data {os.path.basename(args.data)}",) if args.dataset == "folder" else ()
        methods.setdefault((flags, *run.images), []).append((rows, metrics(run)))
        start.setdefault((args.encoder, *run.images), {})[args.seed] = rows[-1]
        if run.step < run.steps:
            note(f"{run.path} is not finished: step {run.step} of {run.steps}")
    common = set.intersection(*(set(flags) for flags, *_ in methods)) if len(methods) > 1 else set()
    def name_of(method):
        return "`" + (" ".join(flag for flag in method[0] if flag not in common) or "as above") + "`"
    def average(key, rows):
        return cell(key, [row[key] for row in rows if key in row], raw)
    def at(tap, rows):
        return [row for row in rows if row["tap"] == tap]
    lines, keys = [], columns_of(rows[0])
    for method, members in methods.items() if taps else ():
        every = [row for rows, _ in members for row in rows]
        for tap in [row["tap"] for row in members[0][0]]:
            lines.append({"flags": name_of(method), "n": len(members)} | {key: average(key, at(tap, every)) for key in keys})
    if not taps:
        wide = [key for key in keys[3:] if key.startswith(("held_out", "linear", f"knn{question['ks'][-1]}", "rank"))]
        wide = [(key, tap) for key in wide for tap in ("h", "z") if tap == "h" or key.startswith(("linear", "rank"))]
        blocks = [("untrained" + f" {encoder}, {M} images" * (len(start) > 1), [row | {"tap": "h"} for row in seeds.values()], [{}] * len(seeds))
                  for (encoder, M, _), seeds in start.items()]
        blocks += [(name_of(method), [row for rows, _ in members for row in rows], [m for _, m in members])
                   for method, members in methods.items()]
        for name, rows, extra in blocks:
            lines.append({"flags": name, "n": len(extra)} | {f"{key} {tap}": average(key, at(tap, rows)) for key, tap in wide}
                         | {"carrying": average("carrying", at("h", rows))}
                         | {key: average(key, extra) for key in ("pruned", "offdiag", "s/epoch")})
    columns = [key for key in lines[0] if any(str(line[key]) for line in lines)]
    widths = [max(len(key), *(len(str(line[key])) for line in lines)) for key in columns]
    if common:
        train.say(f"all: {' '.join(sorted(common))}")
    for cells in (columns, ["-" * w for w in widths], *([line[key] for key in columns] for line in lines)):
        show_line(cells, widths)


def metrics(run) -> dict:
    """{s/epoch, pruned, offdiag}, as far as known: the median, and the last, of the lines of metrics.jsonl."""
    lines = epochs(run)
    found = {key: lines[-1][key] for key in ("pruned", "offdiag") if lines and isinstance(lines[-1].get(key), float)}
    seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), float)]
    return found | ({"s/epoch": statistics.median(seconds)} if seconds else {})


def epochs(run) -> list[dict]:
    """The lines of a run's metrics.jsonl, one dict for each epoch; what is not one is left out."""
    lines = []
    for text in train.read_log(run.path / "metrics.jsonl", 1 + run.args.epochs)[1:]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        lines += [line] * (isinstance(line, dict) and "epoch" in line)
    return lines


def working(text: str) -> None:
    """Where a terminal waits, what is being measured; "" clears it."""
    if sys.stderr.isatty():
        note(f"\r{text[:100]:<100}\r", end="")


# ---------------------------------------------------------------------------- pictures

COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
PANELS = {"loss": "loss", "rank_h": "rank of h", "rank_z": "rank of z", "offdiag": "norm of E"}


@functools.cache
def lettering(size: int):
    """The font that comes with Pillow, of this size, or its one small font where Pillow was built without FreeType."""
    from PIL import ImageFont
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):                    # TypeError: Pillow before 10.1, where it had no size
        return ImageFont.load_default()


def letter(draw, x, y, width, text, align=0.0, size=12) -> None:
    """Draw text below y, between x and x + width: at the left (align 0), in the middle (0.5) or at the right (1).

    What is too wide loses its middle, as names often differ at their ends. The font has the letters of ASCII only:
    anything else becomes "?".
    """
    font, text = lettering(size), "".join(c if " " <= c <= "~" else "?" for c in text[:300])
    keep, short = len(text), text
    while keep and font.getlength(short) > width:
        keep -= 1
        short = text[:keep - keep // 2] + "..." + text[len(text) - keep // 2:]
    draw.text((x + align * (width - font.getlength(short)), y), short, fill="black", font=font)


def save(image, path) -> None:
    """Write a picture, all of it or nothing. Raises UserError."""
    from PIL import Image
    kind, buffer = Image.registered_extensions().get(Path(path).suffix.lower()), io.BytesIO()
    if kind not in Image.SAVE:
        raise UserError(f"{path} names no type of picture that can be written: try out.png")
    image.save(buffer, kind)
    if (Path(path).parent / "checkpoint.pt").exists():
        raise UserError(f"{path} is in a run's folder, where nothing else may lie: choose another place")
    train.write(Path(path), buffer.getbuffer())
    train.say(f"{path}: {image.width} x {image.height} pixels")


def picture(rows: list, path, title: str = "") -> None:
    """Write a grid of images to path: rows of (label, tiles), where a tile is (image, caption) or (image, caption, color).

    An image is uint8 (3, S, S), or None for an empty place; small ones are enlarged by the smallest whole factor that
    makes at least 96 pixels of them. A color frames the tile. A row without tiles is a thin line. Raises UserError for a
    path that cannot be written.
    """
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import to_pil_image
    sizes = [image.shape[-1] for _, tiles in rows for image, *_ in tiles if image is not None]
    side = math.ceil(96 / sizes[0]) * sizes[0] if sizes else 96
    left = 12 + min(100, max((10 + 10 * len(label) for label, _ in rows if label), default=0))
    width = max(left + (side + 10) * max((len(tiles) for _, tiles in rows), default=0), min(640, 24 + 10 * len(title)))
    sheet = Image.new("RGB", (width, 40 + sum(side + 26 if tiles else 10 for _, tiles in rows)), "white")
    draw, y = ImageDraw.Draw(sheet), 36
    letter(draw, 12, 8, width - 24, title, size=16)
    for label, tiles in rows:
        if not tiles:
            draw.line([(12, y + 2), (width - 12, y + 2)], fill="lightgray")
        letter(draw, 12, y + side / 2 - 8, left - 18, label, size=14)
        for x, (image, caption, *color) in zip(range(left, width, side + 10), tiles):
            if image is not None:
                sheet.paste(to_pil_image(image).resize((side, side), Image.NEAREST), (x, y))
            if color:
                draw.rectangle([x - 3, y - 3, x + side + 2, y + side + 2], outline=color[0], width=3)
            letter(draw, x - 2, y + side + 3, side + 4, caption, align=0.5)
        y += side + 26 if tiles else 10
    save(sheet, path)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Two to seven round numbers between low and high; whole ones if asked for."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 6)
    step = max(step, 1) if whole else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curves(runs: list, path) -> None:
    """Write a picture to path: loss and ranks, and the norm of E where a run has it, by epoch, a color for each run.

    runs holds (name, lines), with a dict for each epoch; a value that is missing or no finite number leaves a gap.
    Raises UserError for a path that cannot be written.
    """
    from PIL import Image, ImageDraw
    def known(line, key):
        return all(isinstance(line.get(k), (int, float)) and abs(line[k]) < 1e30 for k in ("epoch", key))
    panels = [key for key in PANELS if key != "offdiag" or any(known(line, key) for _, lines in runs for line in lines)]
    across, w, h = 2 if len(panels) == 4 else 3, 340, 260             # panels of w x h pixels, legend below
    epochs = [line["epoch"] for _, lines in runs for line in lines if known(line, "epoch")]
    x0, x1 = min(epochs + [0]), max(epochs + [1])
    bottom = math.ceil(len(panels) / across) * h
    sheet = Image.new("RGB", (2 * across * w, 2 * (bottom + 20 + 18 * math.ceil(len(runs) / across))), "white")
    draw, words = ImageDraw.Draw(sheet), []             # lines are drawn at twice the size, then words, at theirs
    for i, key in enumerate(panels):
        left, top, right, base = i % across * w + 60, i // across * h + 30, i % across * w + w - 16, i // across * h + h - 38
        values = [line[key] for _, lines in runs for line in lines if known(line, key)]
        words += [(left, top - 20, right - left, PANELS[key] if values else f"{PANELS[key]}: no values", 0.5, 14),
                  (left, base + 19, right - left, "epoch", 0.5)]
        y0, y1 = min(values + [0] * (key != "loss"), default=0), max(values, default=0)     # ranks and norms begin at 0
        room = max((y1 - y0) / 20, abs(y0) / 1000, abs(y1) / 1000)
        room = room if room > 1e-30 else 1              # where all is 0
        y0, y1 = y0 - room * (key == "loss"), y1 + room
        def place(x, y):
            return (2 * (left + (x - x0) / (x1 - x0) * (right - left)), 2 * (base - (y - y0) / (y1 - y0) * (base - top)))
        for x in ticks(x0, x1, whole=True):
            draw.line([place(x, y0), (place(x, y0)[0], 2 * base + 8)], fill="gray", width=2)
            words.append((place(x, y0)[0] / 2 - 30, base + 5, 60, f"{x:.6g}", 0.5))
        for y in ticks(y0, y1):
            draw.line([place(x0, y), place(x1, y)], fill="#e4e4e4", width=2)
            words.append((left - 58, place(x0, y)[1] / 2 - 8, 52, f"{y:.6g}", 1))
        draw.line([(2 * left, 2 * top), (2 * left, 2 * base), (2 * right, 2 * base)], fill="gray", width=2)
        for number, (_, lines) in enumerate(runs):
            piece = []
            for line in [*lines, {}]:                   # the {} ends the last piece
                if known(line, key):
                    piece.append(place(line["epoch"], line[key]))
                elif piece:
                    draw.line(piece, fill=COLORS[number % 10], width=4, joint="curve")
                    for x, y in piece if len(piece) == 1 or len(lines) < 15 else []:
                        draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=COLORS[number % 10])
                    piece = []
    for number, (name, _) in enumerate(runs):
        x, y = number % across * w + 20, bottom + 6 + number // across * 18
        draw.line([(2 * x, 2 * y + 16), (2 * x + 48, 2 * y + 16)], fill=COLORS[number % 10], width=8)
        words.append((x + 32, y, w - 60, name))
    sheet = sheet.reduce(2)
    for word in words:
        letter(ImageDraw.Draw(sheet), *word)
    save(sheet, path)


def draw_neighbors(run, path, dataset=None, data=None, n: int = 8, k: int = 8) -> None:
    """Write a picture: the first n test images, each with its k nearest training images of the run, by cosine of h and, where
    there is a head, of z. Images of the test image's class are framed. Raises UserError."""
    (train_images, train_labels, classes), (test_images, test_labels, _) = load_data(run, dataset, data)
    def name(labels):
        return classes[labels[0]] if labels[0] >= 0 else ""
    a, b, rows = features(run, train_images), features(run, test_images[:n]), []
    cosines = {tap: F.normalize(b[tap], dim=1) @ F.normalize(a[tap], dim=1).T for tap in ("h", "z") if tap in b}      # n x M each
    for i in range(len(b["h"])):
        for tap in cosines:
            tiles = [(test_images[i], f"test: {name(test_labels[i]) or 'no class'}") if tap == "h" else (None, "")]
            for j in cosines[tap][i].topk(min(k, len(a[tap]))).indices.tolist():
                same = test_labels[i, 0] >= 0 and test_labels[i, 0] == train_labels[j, 0]
                tiles.append((train_images[j], name(train_labels[j]), *["green"] * bool(same)))
            rows.append((tap, tiles))
        rows.append(("", []))
    picture(rows[:-1], path, f"{run.path}: test images and their nearest training images, framed where of the same class")


def draw_views(run, path, data=None, n: int = 8, k: int = 8) -> None:
    """Write a picture: the first n training images of the run, each with k views of it as training makes them."""
    images, args, g = load_data(run, None, data)[0][0][:n], run.args, train.generator(run.args.seed, 0, 1)
    mean, std = torch.tensor([train.MEAN, train.STD])[..., None, None]
    views = [train.augment(images, g, args.crop_scale, args.hue, args.grayscale) * std + mean for _ in range(k)]
    views = [(view.clamp(0, 1) * 255).round().to(torch.uint8) for view in views]
    rows = [("", [(image, "image")] + [(view[i], f"view {j + 1}") for j, view in enumerate(views)]) for i, image in enumerate(images)]
    picture(rows, path, f"{run.path}: images and views of them")


# ---------------------------------------------------------------------------- the command

def main() -> None:
    p = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("run", nargs="*", metavar="RUN", help="runs' folders (default: the newest in ./runs/)")
    p.add_argument("--dataset", choices=train.SIZES, help="other labelled images, through the same encoder (default: the run's)")
    p.add_argument("--data", metavar="DIR", help="where the data set lies (default: where the run found its own, else data)")
    p.add_argument("--probe", choices=["labels", "transform"], default="labels",
                   help="what linear probes are for: the labels, or rotation, flip, gray and quadrant of the image (default: labels)")
    p.add_argument("--k", type=train.number(int, 1), nargs="+", help="neighbours for kNN (default: 20 200)")
    p.add_argument("--taps", action="store_true", help="of several runs: a row for each tap")
    p.add_argument("--raw", action="store_true", help="of several runs: the value of each seed instead of mean ± standard deviation")
    p.add_argument("--json", action="store_true", help="a line of JSON for each run instead of a table")
    p.add_argument("--neighbors", metavar="PNG", help="draw test images and their nearest training images")
    p.add_argument("--views", metavar="PNG", help="draw training images and views of them")
    p.add_argument("--curves", metavar="PNG", help="draw loss, ranks and the norm of E by epoch")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is one, else cpu)")
    args = p.parse_args()
    pictures = [flag for flag in ("neighbors", "views", "curves") if getattr(args, flag)]
    for clash, why in (
            (len(pictures) > 1, "draw one picture at a time"),
            (pictures and (args.json or args.taps or args.raw or args.k or args.probe == "transform"),
             f"--{''.join(pictures)} draws a picture instead of a table"),
            (pictures and pictures != ["curves"] and len(args.run) > 1, f"--{''.join(pictures)} takes one run"),
            (pictures and pictures != ["neighbors"] and args.dataset, f"--{''.join(pictures)}: is of the run's own data set"),
            (args.k and args.probe == "transform", "--k: there is kNN in the table of label probes only"),
            (args.json and (args.taps or args.raw), "--json has all taps and values"),
            ((args.taps or args.raw) and len(args.run) < 2, "--taps and --raw are for several runs"),
            (args.probe == "transform" and len(args.run) > 1 and not args.json, "--probe transform is for one run, or with --json")):
        if clash:
            raise UserError(why)
    if not args.run:
        runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda f: f.stat().st_mtime)
        if not runs:
            raise UserError("no run in runs/: make one by python train.py, or name its folder")
        args.run = runs[-1:]
    runs = [load_run(path, train.usable(args.device)) for path in args.run]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice")
    if args.data and any((args.dataset or run.args.dataset) == "shapes" for run in runs):
        raise UserError("--data: shapes are drawn, not read: name a --dataset")
    if args.neighbors:
        return draw_neighbors(runs[0], args.neighbors, args.dataset, args.data)
    if args.views:
        return draw_views(runs[0], args.views, args.data)
    if args.curves:
        return curves([(run.path.resolve().name, epochs(run)) for run in runs], args.curves)
    question = {"probe": args.probe, "ks": args.k or [20, 200], "dataset": args.dataset, "data": args.data and os.path.abspath(args.data)}
    if args.json:
        for run in runs:
            train.say(train.as_json({"run": str(run.path), "step": run.step, "args": vars(run.args), "rows": measured(run, question)}))
    elif len(runs) > 1:
        many_table(runs, question, args.taps, args.raw)
    else:
        what = {"labels": "accuracies in percent, on test images; knn by cosine",
                "transform": "accuracy in percent of linear probes for what was done to a test image"}
        one_table(runs[0], question, f"{runs[0].path}, step {runs[0].step} of {runs[0].steps}; {what[args.probe]}")


if __name__ == "__main__":
    train.main(main)
