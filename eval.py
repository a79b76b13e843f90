# SPDX-License-Identifier: MIT
"""Measure trained runs: what h and z know, or every tap of the networks.

    python eval.py                           # the newest run in runs/: a row for h, one for z
    python eval.py RUN --taps                # also for the layers inside the head, and for p
    python eval.py RUN --columns linear rank               # these columns only; all of them: --json
    python eval.py RUN RUN ...               # a row for each method: mean±standard deviation over seeds
    python eval.py RUN RUN ... --against "--head mlp"      # paired differences from that row
    python eval.py RUN --dataset cifar100    # transfer: other labelled images through the same encoder
    python eval.py RUN --probe transform     # what linear probes can tell of what was done to an image; needs no labels
    python eval.py RUN --neighbors out.png   # a picture: test images with their nearest training images; or --views

Every network is frozen, in eval mode and in float32; labels are read here and nowhere else. Probes see the training
images of the run (its first --limit N); the test images are scored once. Results are kept in RUN/eval.json.
"""
import train                                # first: it sets what torch's threads do while they wait
import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import statistics
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import projhead
from train import UserError, note

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PROBED = 10_000     # images of either part that --probe transform looks at, at most
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)       # Student's t at 97.5 %, 1 to 9 degrees of freedom


# ---------------------------------------------------------------------------- runs and features

def load_run(path, device="cpu") -> argparse.Namespace:
    """A run from its folder: .path, .args, .step of .steps, .images, the frozen .encoder, .head and .predictor in eval
    mode, and .untrained, the encoder before the first step. Only checkpoint.pt is read. Raises UserError."""
    path = Path(path).parent if Path(path).name == "checkpoint.pt" else Path(path)
    file = path / "checkpoint.pt"
    if not file.is_file():
        raise UserError(f"no checkpoint.pt in {path}: name a run's folder, or make one by python train.py")
    content = file.read_bytes()
    with train.checkpoint_errors(file):
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        args = argparse.Namespace(**vars(train.parse_args([])) | checkpoint["args"])        # older runs lack some flags
        images, step = checkpoint["images"], int(checkpoint["step"])
        model, steps = train.build(args), args.epochs * (images[0] // min(args.batch_size, images[0]))
        untrained = copy.deepcopy(model.f)
        parts = {"encoder": model.f, "head": model.g, "predictor": model.q}
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    for module in (*parts.values(), untrained):
        module.to(device).eval().requires_grad_(False)
    return argparse.Namespace(path=path, crc=zlib.crc32(content), args=args, step=step, steps=steps, images=images,
                              untrained=untrained, **parts)


def layers(head: nn.Module) -> list[nn.Module]:
    return [m for m in head.modules() if not list(m.children())]


def taps(run, x: Tensor) -> dict[str, Tensor]:
    """{tap: (N, dim)} of normalized images x (N, 3, S, S): h, g[0], g[1] ... (the layers inside the head), z, and p."""
    h, inside = run.encoder(x.contiguous(memory_format=torch.channels_last)).float(), {}
    hooks = [layer.register_forward_hook(lambda _, __, y, tap=f"g[{i}] {type(layer).__name__}": inside.update({tap: y}))
             for i, layer in enumerate(layers(run.head))]
    z = run.head(h)
    for hook in hooks:
        hook.remove()
    out = {"h": h} | {tap: y for tap, y in inside.items() if y is not z and y is not h} | ({} if z is h else {"z": z})
    return out | ({"p": run.predictor(z)} if run.args.predictor != "none" else {})


@torch.no_grad()
def features(run, images: Tensor, view=None, batch_size: int = 500) -> dict[str, Tensor]:
    """{tap: float32 (M, dim)} of images uint8 (M, 3, S, S), each passed through the frozen networks once.

    run: what load_run returned, or a run's folder. view: a function uint8 (N, 3, S, S) -> normalized float32 in place
    of plain normalization. Images of another size than the run's are resized. Taps: h, g[0] ... (layers inside the
    head), z where there is a head, p where there is a prediction head. Raises UserError where there is no run or a
    feature is not finite, RuntimeError if a parameter or buffer moved.
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
    found = {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}
    if not all(x.isfinite().all() for x in found.values()):
        raise UserError("the features of the run are not finite")
    if any(not torch.equal(v, before[k]) for k, v in modules.state_dict().items()):
        raise RuntimeError("the frozen networks moved during evaluation")
    return found


def trained_and_not(run) -> list[tuple[str, argparse.Namespace]]:
    """(suffix of a tap's name, what features() takes): the run, and its encoder before the first step, with no head."""
    args = argparse.Namespace(predictor="none", image_size=run.args.image_size)
    start = argparse.Namespace(args=args, encoder=run.untrained, head=nn.Sequential(), predictor=nn.Identity())
    return [("", run), (" untrained", start)]


# ---------------------------------------------------------------------------- probes

def probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[float, float, float]:
    """Logistic regression on frozen features: (test accuracy in percent, chosen l2, its held-out accuracy in percent).

    x: (M, dim), y: int64 (M,). Features are standardized by the training part. Minimizes mean cross-entropy + l2/2
    ||W||^2 (not the bias); l2 is the one of L2 that does best on a held-out fifth of the training part (the stronger of
    equals), then all of it is fitted again. The search ends where a weaker l2 is worse by over two standard errors.
    The test labels are used once, to count. Deterministic. Raises ValueError for fewer than 5 training rows.
    """
    if len(train_x) < 5:
        raise ValueError(f"a linear probe needs at least 5 training rows, not {len(train_x)}")
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    mean, std = train_x.mean(0), train_x.std(0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)              # what varies by less is rounding of a constant
    x, test_x = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (train_x[order], test_x))    # 1: the bias
    classes, y = train_y[order].unique(return_inverse=True)         # a class that is not there is never predicted
    held, weights, best = len(x) // 5, x.new_zeros(len(classes), x.shape[1]), None
    covariance = projhead.on_cpu(x.T @ x / len(x))
    for l2 in L2:                                                   # each starts where the last ended
        weights = fit(x[held:], y[held:], l2, weights, covariance, tolerance=1e-5)
        right = (x[:held] @ weights.T).argmax(1) == y[:held]
        if best is None or right.sum() > best[0].sum():
            best = right, l2, weights
        lost, won = (best[0] & ~right).sum().item(), (right & ~best[0]).sum().item()
        if lost - won > 2 * (lost + won) ** 0.5:
            break
    right, l2, weights = best
    weights = fit(x, y, l2, weights, covariance, tolerance=1e-7)
    hits = classes[(test_x @ weights.T).argmax(1)] == test_y
    return 100 * hits.sum().item() / len(hits), l2, 100 * right.sum().item() / len(right)


def linear_probe(*data: Tensor) -> tuple[float, float]:
    """(test accuracy in percent, chosen l2) of probe(train_x, train_y, test_x, test_y); its errors."""
    return probe(*data)[:2]


def fit(x: Tensor, y: Tensor, l2: float, weights: Tensor, covariance: Tensor, tolerance: float) -> Tensor:
    """The minimum (classes, dim) of mean cross-entropy + l2/2 ||W||^2 (not the last column) by L-BFGS, from `weights`.

    x: (M, dim), the last column 1. y: int64 (M,). covariance: double (dim, dim) on the CPU, x^T x / M or about that.
    At W = 0 a class's Hessian is H = covariance / classes + l2; with H = R R^T, W = U R^-1 it is the identity, for U.
    Ends where no entry of the gradient exceeds `tolerance`, or a step changes the loss by less.
    """
    penalty = torch.full_like(covariance[0], l2)
    penalty[-1] = 1e-9
    R = torch.linalg.cholesky(covariance / len(weights) + penalty.diag()).to(x)
    U = (weights @ R).requires_grad_()
    optimizer = torch.optim.LBFGS([U], max_iter=1000, history_size=20, tolerance_grad=tolerance,
                                  tolerance_change=tolerance, line_search_fn="strong_wolfe")
    def loss():
        optimizer.zero_grad()
        W = torch.linalg.solve_triangular(R, U, upper=False, left=False)
        total = F.cross_entropy(x @ W.T, y) + l2 / 2 * W[:, :-1].square().sum()
        total.backward()
        return total
    optimizer.step(loss)
    return torch.linalg.solve_triangular(R, U.detach(), upper=False, left=False)


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k=20) -> float | list[float]:
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

def load_data(run, dataset=None, data=None) -> list[tuple]:
    """(images, labels, classes) of the training part and of the test part: the run's own, or another data set's. Of its
    own training part the images that the run was trained on. labels: (M, 1), or (M, 2) for shapes. Raises UserError."""
    args, own, parts = run.args, dataset in (None, run.args.dataset), []
    for part in (True, False):
        limit = args.limit if own and part else None
        root = data or (args.data if own or "folder" not in (dataset, args.dataset) else None) or "data"
        images, labels, classes = train.read_dataset(dataset or args.dataset, root, part, args.image_size, limit)
        parts.append((images, labels.view(len(labels), -1), classes))
    if own and [len(parts[0][0]), zlib.crc32(parts[0][0].numpy())] != run.images:
        note(f"{run.path} was trained on {run.images[0]} other images than the {len(parts[0][0])} here")
    return parts


def table(run, ks=(20, 200), dataset=None, data=None, inside=True) -> list[dict]:
    """A row for each tap (without `inside` for h and z alone), the untrained h last.

    {tap, dim; linear, l2, held_out, knn20 ... for each kind of label; rank}. held_out is the linear probe's accuracy on
    the fifth of the training part that chose its l2. The row of h also has `carrying`, where the head has weights.
    """
    (all_images, train_labels, _), (test_images, test_labels, _) = load_data(run, dataset, data)
    train_images, train_labels = labelled(all_images, train_labels, "training")
    known = (test_labels >= 0).all(1)
    _, labels = labelled(test_images, test_labels, "test")
    names = (" shape", " hue") if labels.shape[1] == 2 else ("",)
    if len(train_images) < 5 or not len(labels):
        note("too few labels: no accuracies")
        names = ()
    rows = []
    for name, source in trained_and_not(run):
        a = features(source, train_images) if names else None
        b = features(source, test_images)
        for tap in [tap for tap in b if inside or tap in ("h", "z")]:
            x, device = b[tap], b[tap].device
            row = {"tap": tap + name, "dim": x.shape[1]}
            for i, label in enumerate(names):
                four = a[tap], train_labels[:, i].to(device), x[known], labels[:, i].to(device)
                row["linear" + label], row["l2" + label], row["held_out" + label] = probe(*four)
                row |= {f"knn{k}{label}": accuracy for k, accuracy in zip(ks, knn(*four, k=list(ks)))}
            row["rank"] = projhead.effective_rank(x)
            if tap + name == "h" and any(isinstance(layer, nn.Linear) for layer in layers(run.head)):
                row["carrying"] = carrying(run, all_images)
            rows.append(row)
    return rows


def random_views(args, seed: int):
    """A function uint8 (N, 3, S, S) -> normalized views as in training; made anew, it gives the same ones again."""
    return functools.partial(train.augment, generator=train.generator(seed, 0, 1), crop_scale=args.crop_scale,
                             hue=args.hue, grayscale=args.grayscale)


def labelled(images: Tensor, labels: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """The images with a known label, and their labels; says on stderr how many have none."""
    known = (labels >= 0).all(1)
    if not known.all():
        note(f"{int((~known).sum())} of {len(known)} {part} images have no label, or one that no training image has: "
             "no probe sees them")
    return images[known], labels[known]


def carrying(run, images: Tensor, batches: int = 10) -> float:
    """How many features of h carry 99 % of sum_i (dL/dh_i)^2 var(h_i) in a mini-batch; L is the run's objective. The
    mean over mini-batches of views as in training; the networks are in eval mode, and the target is the stop-gradient
    one."""
    model = train.Model(run.encoder, run.head, run.predictor, None, None)
    N = min(run.args.batch_size, len(images))
    device, counts = next(run.encoder.parameters()).device, []
    for x, _ in train.two_views(images, run.args, range(batches), max(1, len(images) // N), N, device):
        h = run.encoder(x).float().requires_grad_()
        train.objective(h, None, model, run.args).backward()
        counts.append(projhead.features_holding(h.grad.square().sum(dim=0) * h.detach().var(dim=0)))
    return statistics.mean(counts)


# ---------------------------------------------------------------------------- what was done to an image

def rotate(x: Tensor, y: Tensor) -> Tensor:
    """x (N, 3, S, S) turned counterclockwise by y (N,) quarter turns."""
    x = x.clone()
    for k in (1, 2, 3):
        x[y == k] = x[y == k].rot90(k, (2, 3))
    return x


def gray(x: Tensor, y: Tensor) -> Tensor:
    """x (N, 3, S, S), without colour where y (N,) is 1."""
    return torch.where(y[:, None, None, None] == 1, train.to_gray(x), x)


def quadrant(x: Tensor, y: Tensor) -> Tensor:
    """Quadrant y (N,) of x (N, 3, S, S): upper left, upper right, lower left, lower right; resized to S."""
    S = x.shape[-1]
    size = y.new_full((1, 1, 1), S // 2)
    rows, columns = (train.resize_matrix(half[:, None, None] * (S - S // 2), size, S, S)[:, None]
                     for half in (y // 2, y % 2))
    return rows @ x @ columns.mT


TRANSFORMS = {"rotation": (rotate, 4), "gray": (gray, 2), "quadrant": (quadrant, 4)}    # and classes


def transform_table(run, dataset=None, data=None, inside=True) -> list[dict]:
    """A row {tap, dim, rotation, gray, quadrant} for each tap (without `inside` for h and z alone), the
    untrained h and chance last.

    Each cell is a linear probe's accuracy in percent, for which of the transformation's classes was done to an image.
    Every image gets one at random, the same for all taps. Only the first eval.PROBED training images of the run and
    test images are looked at, and no labels. Raises UserError for fewer than 5 training images.
    """
    parts, rows = [images[:PROBED] for images, _, _ in load_data(run, dataset, data)], {}
    if len(parts[0]) < 5:
        raise UserError(f"--probe transform needs at least 5 training images, not {len(parts[0])}")
    for column, (transform, classes) in TRANSFORMS.items():
        for name, source in trained_and_not(run):
            (a, a_y), (b, b_y) = (transformed(source, images, transform, classes, i) for i, images in enumerate(parts))
            for tap in [tap for tap in a if inside or tap in ("h", "z")]:
                begun = {"tap": tap + name, "dim": a[tap].shape[1]}
                row = rows.setdefault(tap + name, begun)
                row[column], row["l2 " + column] = linear_probe(a[tap], a_y, b[tap], b_y)
    chance = {column: 100 / classes for column, (_, classes) in TRANSFORMS.items()}
    return [*rows.values(), {"tap": "chance", "dim": 0, **chance}]


def transformed(run, images: Tensor, transform, classes: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """features() of uint8 images (M, 3, S, S), each transformed by a class of its own, and the classes (M,)."""
    random, drawn = train.generator(seed, 0, 1), []
    def view(batch):
        drawn.append(torch.randint(classes, (len(batch),), generator=random).to(batch.device))
        return train.normalize(transform(batch.float() / 255, drawn[-1]))
    return features(run, images, view), torch.cat(drawn)


# ---------------------------------------------------------------------------- tables

def measured(run, question: dict) -> list[dict]:
    """The rows that answer the question {probe, ks, dataset, data, inside}: from RUN/eval.json, if they are there for
    this checkpoint, else measured now and put there (a folder's images may change: always now)."""
    file, key, results = run.path / "eval.json", json.dumps(question), {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # no file, or not ours: measured anew
        kept = json.loads(file.read_text())
        results = dict(kept["results"]) if kept["checkpoint"] == run.crc else {}
    complete = json.dumps(question | {"inside": True})
    key = complete if complete in results else key
    if key in results and (question["dataset"] or run.args.dataset) != "folder":
        return [row for row in results[key] if question["inside"] or not row["tap"].startswith(("g[", "p"))]
    note(f"measuring {run.path}")
    where = question["dataset"], question["data"], question["inside"]
    rows = transform_table(run, *where) if question["probe"] == "transform" else table(run, question["ks"], *where)
    try:
        with train.replacing(file) as new:
            new.write(json.dumps({"checkpoint": run.crc, "step": run.step, "results": results | {key: rows}}).encode())
    except UserError as e:                              # another's run, say: the table is shown all the same
        note(f"not kept: {e}")
    return rows


def cell(key: str, values: list, difference: bool = False) -> str:
    """One value, or mean±standard deviation; of differences the half-width of their mean's 95 % interval instead."""
    if not values or isinstance(values[0], str):
        return values[0] if values else ""
    fractions = ("pruned",)
    digits = 0 if key == "dim" else 2 if key.split()[0] in fractions else 1
    mean, n = f"{statistics.mean(values):{'+' * difference}.{digits}f}", len(values)
    if n == 1 or key == "dim":
        return mean
    deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean}±{deviation * (T95[min(n, 10) - 2] / n**0.5 if difference else 1):.{digits}f}"


def shown(keys, columns: list[str] | None, usual: tuple) -> list[str]:
    """The keys that --columns names, by a whole name or its first word; without it the usual ones. Raises UserError."""
    keys = [key for key in keys if not key.startswith("l2")]
    unknown = [name for name in columns or () if not any(name in (key, key.split()[0]) for key in keys)]
    if unknown:
        raise UserError(f"--columns: no column {unknown[0]}; there are {', '.join(keys)}")
    return [key for key in keys if key in (columns or usual) or key.split()[0] in (columns or usual)]


def print_table(lines: list[list]) -> None:
    """Print rows of cells, the first of them the names of the columns. A column without any other cell is left out."""
    columns = [column for column in zip(*lines) if any(str(value) for value in column[1:])]
    widths = [max(len(str(value)) for value in column) for column in columns]
    first, *rest = zip(*columns)
    for line in (first, ["-" * width for width in widths], *rest):
        train.say("| " + " | ".join(str(value).ljust(width) for value, width in zip(line, widths)) + " |")


def one_table(run, question: dict, columns: list[str] | None) -> None:
    """Print a row for each tap."""
    rows = measured(run, question)
    usual = ("linear", f"knn{question['ks'][0]}", "rank", *TRANSFORMS)
    keys = ["tap", "dim", *shown(list(rows[0])[2:], columns, usual)]
    train.say(f"{run.path}, step {run.step} of {run.steps}; accuracies in percent, on test images")
    print_table([keys, *([cell(key, [row[key]] if key in row else []) for key in keys] for row in rows)])


def collect(runs: list, question: dict) -> tuple[dict, list[str]]:
    """({flags of a method: {seed: {(column, tap): value}}}, the flags that all share); the untrained encoders first."""
    kinds = sorted({run.args.dataset for run in runs})
    if len(kinds) > 1 and not question["dataset"]:
        raise UserError(f"the runs are of different data sets, {' and '.join(kinds)}: name one for all by --dataset")
    start, methods, several = {}, {}, len({run.images[0] for run in runs}) > 1
    for run in runs:
        args, rows = run.args, measured(run, question)
        head = [f"--head {args.head}"] if args.predictor == "none" else []         # named also where it is the default
        flags = head + [flag for flag in train.flags(args) if flag not in head and not flag.startswith("--seed ")]
        flags += [f"--data {os.path.basename(args.data)}"] if args.dataset == "folder" else []
        values = {(key, row["tap"]): value for row in rows for key, value in row.items() if key != "tap"}
        if args.seed in methods.get(tuple(flags), {}):
            raise UserError(f"{run.path} has the flags and the seed of another run here: leave one out")
        logged = {(key, "h"): value for key, value in last_epoch(run).items()}
        methods.setdefault(tuple(flags), {})[args.seed] = values | logged
        start.setdefault(f"untrained {args.encoder}" + f", {run.images[0]} images" * several, {})[args.seed] = {
            (key, "h"): value for (key, tap), value in values.items()
            if tap == "h untrained"}
        if run.step < run.steps:
            note(f"{run.path} is not finished: step {run.step} of {run.steps}")
    common = set.intersection(*map(set, methods)) if len(methods) > 1 else set()
    named = {" ".join(flag for flag in flags if flag not in common) or "as above": seeds
             for flags, seeds in methods.items()}
    return start | named, sorted(common)


def last_epoch(run) -> dict:
    """What the run's last line of metrics.jsonl says of its heads, as far as known."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        line = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
        return {key: line[key] for key in ("pruned", "offdiag", "moved") if key in line}
    return {}


def many_table(runs: list, question: dict, columns: list[str] | None, taps: bool, against: str | None) -> None:
    """Print a row for each method, or for each tap of each: runs that differ in the seed alone are one row. With
    `against`, the flags of a row as this table prints them, the others are differences from it over shared seeds."""
    methods, common = collect(runs, question)
    if against and against not in methods:
        raise UserError(f"--against: no row {against!r}; there are {', '.join(map(repr, methods))}")
    base = methods.get(against, {})
    def values(name, column):
        own = {seed: found[column] for seed, found in methods[name].items() if column in found}
        if against in (None, name):
            return list(own.values())
        return [value - base[seed][column] for seed, value in own.items() if column in base.get(seed, {})]
    every = list(dict.fromkeys(column for seeds in methods.values() for found in seeds.values() for column in found))
    usual = ("linear", "held_out", f"knn{question['ks'][-1]}", "rank", "carrying", "pruned", "offdiag", "moved")
    keys = dict.fromkeys(key for key, _ in every if key != "dim")
    keys = shown(list(keys), columns, (*usual, *TRANSFORMS))
    of_z = [key for key in keys if columns or not key.startswith(("held_out", "knn"))]
    wide = [(key, tap) for key in keys for tap in ("h", "z") if (key, tap) in every and (tap == "h" or key in of_z)]
    lines = [["flags", "n", *(("tap", *keys) if taps else (f"{key} {tap}" for key, tap in wide))]]
    for name, seeds in methods.items():
        difference = against not in (None, name)
        n = len(seeds.keys() & base.keys() if difference else seeds)
        for tap in dict.fromkeys(tap for found in seeds.values() for _, tap in found) if taps else ("",):
            cells = [(key, tap) for key in keys] if taps else wide
            lines.append([f"`{name}`", n, *([tap] if taps else []),
                          *(cell(key, values(name, (key, tap)), difference) for key, tap in cells)])
    if common:
        train.say(f"all: {' '.join(common)}")
    print_table(lines)


# ---------------------------------------------------------------------------- pictures

def letter(draw, x, y, width, text, align=0.0, size=12) -> None:
    """Draw text below y, between x and x + width, at the left (align 0) or in the middle (0.5); cut where too wide."""
    from PIL import ImageFont
    font = ImageFont.load_default(size)
    while text and font.getlength(text) > width:
        text = text[:-1]
    draw.text((x + align * (width - font.getlength(text)), y), text, fill="black", font=font)


def picture_type(path) -> str:
    """Pillow's name for the type of picture that path names. Raises UserError where it can write none such."""
    from PIL import Image
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{path} names no type of picture that can be written: try out.png")
    return kind


def picture(rows: list, path, title: str = "") -> None:
    """Write a grid of images to path: rows of (label, tiles), a tile being (image, caption) or (image, caption, color).

    An image is uint8 (3, S, S), or None for an empty place; small ones are enlarged by the smallest whole factor that
    makes at least 96 pixels of them. A color frames the tile. A row without tiles is a thin line. Raises UserError for
    a path that cannot be written.
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
    with train.replacing(Path(path)) as file:
        sheet.save(file, picture_type(path))
    train.say(f"{path}: {sheet.width} x {sheet.height} pixels")


def draw_neighbors(run, path, dataset=None, data=None, n: int = 8, k: int = 8) -> None:
    """Write a picture: the first n test images, each with its k nearest training images of the run, by cosine of h and,
    where there is a head, of z. Images of the test image's class are framed. Raises UserError."""
    (train_images, train_labels, classes), (test_images, test_labels, _) = load_data(run, dataset, data)
    def name(labels):
        return classes[labels[0]] if labels[0] >= 0 else ""
    a, b, rows = features(run, train_images), features(run, test_images[:n]), []
    cosines = {tap: F.normalize(b[tap], dim=1) @ F.normalize(a[tap], dim=1).T for tap in ("h", "z") if tap in b}
    for i in range(len(b["h"])):
        for tap in cosines:
            tiles = [(test_images[i], name(test_labels[i]) or "no class") if tap == "h" else (None, "")]
            for j in cosines[tap][i].topk(min(k, len(a[tap]))).indices.tolist():
                same = test_labels[i, 0] >= 0 and test_labels[i, 0] == train_labels[j, 0]
                tiles.append((train_images[j], name(train_labels[j]), *["green"] * bool(same)))
            rows.append((tap, tiles))
        rows.append(("", []))
    picture(rows[:-1], path, f"{run.path}: test images, then their nearest training images, framed if of one class")


def draw_views(run, path, data=None, n: int = 8, k: int = 8) -> None:
    """Write a picture: the first n training images of the run, each with k views of it as training makes them."""
    args = run.args
    images, _ = train.load_dataset(args.dataset, data or args.data, True, args.image_size, args.limit)
    images, view = images[:n], random_views(args, args.seed)
    mean, std = torch.tensor([train.MEAN, train.STD])[..., None, None]
    views = [((view(images) * std + mean).clamp(0, 1) * 255).round().to(torch.uint8) for _ in range(k)]
    rows = [("", [(image, "image"), *((each[i], f"view {j}") for j, each in enumerate(views, 1))])
            for i, image in enumerate(images)]
    picture(rows, path, f"{run.path}: images and views of them")


# ---------------------------------------------------------------------------- the command

def main() -> None:
    p = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("run", nargs="*", metavar="RUN", help="runs' folders (default: the newest in ./runs/)")
    p.add_argument("--dataset", choices=train.SIZES, help="other labelled images, same encoder (default: the run's)")
    p.add_argument("--data", metavar="DIR", help="where it lies (default: where the run found its own, else data)")
    p.add_argument("--probe", choices=["labels", "transform"], default="labels",
                   help="for the labels, or for rotation, gray and quadrant of an image (default: labels)")
    p.add_argument("--k", type=train.number(int, 1), nargs="+", help="neighbours for kNN (default: 20 200)")
    p.add_argument("--columns", nargs="+", metavar="NAME", help="to print, by name or first word (default: some)")
    p.add_argument("--taps", action="store_true", help="also the layers inside the head, and p: a row for each tap")
    p.add_argument("--against", metavar="FLAGS", help="of several runs: differences from the row with these flags, "
                   "over shared seeds, with the half-width of their mean's 95 %% t interval")
    p.add_argument("--json", action="store_true", help="a line of JSON for each run, with all columns, and no table")
    p.add_argument("--neighbors", metavar="PNG", help="draw test images and their nearest training images")
    p.add_argument("--views", metavar="PNG", help="draw training images and views of them")
    p.add_argument("--device", default=train.default_device(), help="(default: torch's accelerator, else cpu)")
    args = p.parse_args()
    drawn, table = args.neighbors or args.views, args.taps or args.against or args.columns
    for clash, why in (
            (args.neighbors and args.views, "draw one picture at a time"),
            (drawn and (args.json or table or args.k or args.probe == "transform"),
             "--neighbors and --views draw a picture instead of a table"),
            (drawn and len(args.run) > 1, "--neighbors and --views take one run"),
            (args.views and args.dataset, "--views is of the run's own data set"),
            (args.k and args.probe == "transform", "--k: there is kNN in the table of label probes only"),
            (args.json and table, "--json has all taps and columns"),
            (args.against and len(args.run) < 2, "--against is for several runs")):
        if clash:
            raise UserError(why)
    if drawn:
        picture_type(drawn)                 # before anything is measured
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
    data = args.data and os.path.abspath(args.data)
    question = {"probe": args.probe, "ks": args.k or [20, 200], "dataset": args.dataset, "data": data,
                "inside": args.taps or args.json}
    if args.neighbors:
        draw_neighbors(runs[0], args.neighbors, args.dataset, args.data)
    elif args.views:
        draw_views(runs[0], args.views, args.data)
    elif args.json:
        for run in runs:
            rows = [{key: None if isinstance(value, float) and not math.isfinite(value) else value
                     for key, value in row.items()} for row in measured(run, question)]        # JSON has no NaN
            log = run.path / "metrics.jsonl"
            log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            train.say(json.dumps({"run": run.path.name, "step": run.step, "steps": run.steps, "images": run.images,
                                  "args": vars(run.args), "log": log, args.probe: rows}))
    elif len(runs) > 1:
        many_table(runs, question, args.columns, args.taps, args.against)
    else:
        one_table(runs[0], question, args.columns)


if __name__ == "__main__":
    train.main(main)
