# SPDX-License-Identifier: MIT
"""Measure trained runs: what h and z know, tap by tap, or method by method over seeds.

    python eval.py                                      # the newest run in runs/: a row for h, one for z
    python eval.py RUN --taps                           # also the layers inside the head, and p
    python eval.py RUN --columns linear quadrant        # these columns only; they are listed below
    python eval.py RUN --dataset cifar100               # transfer: other labelled images through the same encoder
    python eval.py RUN --probe transform                # what was done to an image? needs no labels
    python eval.py RUN --neighbors out.png              # test images and their nearest training images; or --views
    python eval.py RUN RUN ...                          # a row for each method, the means over its seeds
    python eval.py RUN RUN ... --against "--head mlp"   # paired differences from that row
    python eval.py RUN RUN ... --plot out.svg --columns "linear hue" "linear shape"     # h and z of each method
    python eval.py RUN RUN ... --plot out.svg --columns epoch rank_z                    # a line for each method
    python eval.py RUN RUN ... --json > runs.jsonl      # a line for each run, with all that can be said of it
    python eval.py runs.jsonl --rows "--dataset cifar10 --tau 0.1"      # such lines in place of runs: some of them

Every network is frozen, in eval mode and in float32; labels are read here and nowhere else. Probes see the training
images of the run (its first --limit N); the test images are scored once. Results are kept in RUN/eval.json.
"""
import train                                # first: it sets what torch's threads do while they wait
import argparse
import contextlib
import html
import inspect
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

import projhead
from train import UserError, note, refuse

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
KS = [20, 200]      # neighbours
PROBED = 10_000     # images of either part that --probe transform looks at, at most
PIXELS = 2**19      # of a batch: 512 images of 32 x 32
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)      # Student's t, 1 to 9 degrees of freedom


class Column(NamedTuple):
    source: str         # the probe that measures it, "labels" or "transform", or "log": the last line of metrics.jsonl
    shown: str          # the taps that a table shows it for, unless --columns names it
    form: str           # how its numbers are written
    meaning: str


COLUMNS = {
    "linear": Column("labels", "h z", ".1f", "accuracy of a linear probe on the test images, in percent"),
    "l2": Column("labels", "", ".2g", "that probe's weight decay, the best on a fifth of the training images"),
    "held_out": Column("labels", "", ".1f", "accuracy on that fifth, in percent: choose a run by this one"),
    "knn": Column("labels", "h", ".1f", "knn20, knn200: accuracy of a vote of so many nearest training images"),
    "rank": Column("labels", "h z", ".1f", "effective rank of the test images' features: RankMe"),
    "carrying": Column("labels", "h", ".1f", "how many features of h carry 99 % of a mini-batch's gradient"),
    "rotation": Column("transform", "h z", ".1f", "by how many quarter turns was it turned? a linear probe"),
    "gray": Column("transform", "h z", ".1f", "was its colour taken away? a linear probe"),
    "quadrant": Column("transform", "h z", ".1f", "which quarter of an image is it? a linear probe"),
    "pruned": Column("log", "h", ".2f", "fraction of h's features that a head with --sparsity no longer reads"),
    "offdiag": Column("log", "h", ".3g", "norm of the off-diagonal entries of --predictor offdiag"),
}
KINDS = (" shape", " hue")                              # the two labels of the shapes: "linear shape", "linear hue"
PER_LABEL = ("linear", "l2", "held_out", "knn")         # what each label has a column of its own for


# ---------------------------------------------------------------------------- runs and features

class Run(NamedTuple):
    """A trained run; its networks are frozen and in eval mode."""
    path: Path
    crc: int                    # of checkpoint.pt
    args: argparse.Namespace
    images: list                # how many it was trained on, and their checksum
    step: int
    steps: int
    encoder: nn.Module
    head: nn.Module
    predictor: nn.Module


def load_run(path, device="cpu") -> Run:
    """A run from its folder, of which only checkpoint.pt is read. Raises UserError."""
    path = Path(path).parent if Path(path).name == "checkpoint.pt" else Path(path)
    file = path / "checkpoint.pt"
    try:
        checkpoint = train.read_checkpoint(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint.pt in {path}: name a run's folder, or make one by python train.py") from None
    earlier = UserError(f"{file} was made by an earlier commit, which eval.py no longer reads")
    with train.checkpoint_errors(file):
        args, images, step = argparse.Namespace(**checkpoint["args"]), checkpoint["images"], int(checkpoint["step"])
        if vars(train.parse_args([])).keys() - vars(args).keys():
            raise earlier                           # a flag of today is missing; one that is gone does no harm
        steps = args.epochs * (images[0] // min(args.batch_size, images[0]))
        try:
            model = train.build(args)
        except (KeyError, ValueError):              # a head, say, that there is no more
            raise earlier from None
        networks = [model.f, model.g, model.q]
        for network, name in zip(networks, ("encoder", "head", "predictor")):
            network.load_state_dict(checkpoint[name])
            network.to(device).eval().requires_grad_(False)
    return Run(path, checkpoint["crc"], args, images, step, steps, *networks)


def untrained(run: Run) -> Run:
    """The run's encoder before its first step, without a head."""
    f = train.build(run.args).f.to(next(run.encoder.parameters()).device).eval().requires_grad_(False)
    return run._replace(encoder=f, head=nn.Identity(), predictor=nn.Identity())


def taps(run: Run, x: Tensor) -> dict[str, Tensor]:
    """{tap: (N, dim)} of normalized images x (N, 3, S, S): h, the layers inside the head, z, p. A layer
    that returns its input, like the head of --head none, makes no tap."""
    h, inside = run.encoder(x.contiguous(memory_format=torch.channels_last)).float(), {}
    def watch(layer, tap):
        return layer.register_forward_hook(lambda layer, x, y: inside.update({tap: y}))
    layers = [module for module in run.head.modules() if not list(module.children())]
    hooks = [watch(layer, f"g[{i}] {type(layer).__name__}") for i, layer in enumerate(layers)]
    z = run.head(h)
    p = run.predictor(z)
    for hook in hooks:
        hook.remove()
    found = {"h": h} | {tap: y for tap, y in inside.items() if y is not h and y is not z}
    found |= {"z": z} if z is not h else {}
    return found | ({"p": p} if p is not z else {})


def is_inside(tap: str) -> bool:
    """Whether --taps alone shows it."""
    return tap == "p" or tap.startswith("g[")


@torch.no_grad()
def features(run, images: Tensor, view=None, inside=True) -> dict[str, Tensor]:
    """{tap: float32 (M, dim)} of images uint8 (M, 3, S, S), each passed through the frozen networks once.

    run: what load_run returned, or a run's folder. Images of another size than the run's are resized. Taps: h, those
    inside the head, "g[0] Linear" ..., z where there is a head, p where there is a prediction head; without `inside` h
    and z alone. view: a function (images uint8, a slice: which they are) -> normalized float32, in place of plain
    normalization. Raises UserError where there is no run or a feature is not finite, RuntimeError if a parameter or
    buffer moved.
    """
    run = run if isinstance(run, Run) else load_run(run)
    networks = nn.ModuleList([run.encoder, run.head, run.predictor]).eval()
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    device, size = next(run.encoder.parameters()).device, run.args.image_size
    N, parts = max(1, PIXELS // max(size, images.shape[-1]) ** 2), {}
    progress = train.Progress(len(images), sys.stderr, what="image")
    for start in range(0, len(images), N):
        rows = slice(start, start + N)
        batch = images[rows].to(device)
        x = view(batch, rows) if view else train.normalize(batch.float() / 255)
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        for tap, y in taps(run, x).items():
            if inside or not is_inside(tap):
                parts.setdefault(tap, []).append(y)
        progress(start + len(batch))
    found = {tap: torch.cat(part) for tap, part in parts.items()}
    refuse(not all(x.isfinite().all() for x in found.values()), f"the features of {run.path} are not finite")
    if any(not torch.equal(value, before[name]) for name, value in networks.state_dict().items()):
        raise RuntimeError("the frozen networks moved during evaluation")
    return found


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
    covariance = second_moment(x)
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


def second_moment(x: Tensor) -> Tensor:
    """x^T x / M of x (M, dim) in float64, on the CPU: in float32 that of collinear columns has negative eigenvalues."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(4096):
        part = projhead.on_cpu(part)
        total.addmm_(part.T, part)
    return total / len(x)


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

    x: (M, dim), y: int64 (M,). Every vote counts the same (no weighting by distance). A list of ks gives a list of
    accuracies and costs one search. Raises ValueError for k >= M: the vote of all rows would be the same everywhere.
    """
    ks = [k] if isinstance(k, int) else k
    if max(ks) >= len(train_x):
        raise ValueError(f"{max(ks)} neighbours need more than {len(train_x)} training rows")
    train_x, test_x, right = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1), [0] * len(ks)
    classes = int(max(train_y.max(), test_y.max())) + 1
    N = max(1, 50_000_000 // len(train_x))                                          # rows at a time: 200 MB of cosines
    for x, y in zip(test_x.split(N), test_y.split(N)):
        labels = train_y[(x @ train_x.T).topk(max(ks), dim=1).indices]              # N x max(ks), the nearest first
        for i, number in enumerate(ks):
            votes = labels.new_zeros(len(y), classes).scatter_add_(1, labels[:, :number], torch.ones_like(labels))
            right[i] += (votes.argmax(dim=1) == y).sum().item()
    accuracies = [100 * number / len(test_y) for number in right]
    return accuracies[0] if isinstance(k, int) else accuracies


# ---------------------------------------------------------------------------- the probes for labels

def load_data(run: Run, dataset=None, data=None) -> list[tuple]:
    """(images, labels, classes) of the training part and of the test part: the run's own, or another data set's. Of its
    own training part the images that the run was trained on. labels: (M, 1), or (M, 2) for shapes. Raises UserError."""
    own = dataset in (None, run.args.dataset)
    name, limit, root = dataset or run.args.dataset, run.args.limit if own else None, data
    if root is None and (own or "folder" not in (dataset, run.args.dataset)):      # CIFAR and STL lie side by side
        root = run.args.data
    parts = []
    for part in (True, False):
        loaded = train.load_dataset(name, root or "data", part, run.args.image_size, limit if part else None)
        parts.append((loaded[0], loaded[1].view(len(loaded[1]), -1), loaded[2]))
    if name == "folder":
        trained_on, tested = ({hash(image.numpy().tobytes()) for image in images} for images, *_ in parts)     # 64 bits
        if copies := len(trained_on & tested):
            note(f"warning: {copies} of the {len(tested)} different test images are training images too")
    if own and [len(parts[0][0]), zlib.crc32(parts[0][0].numpy())] != run.images:
        note(f"{run.path} was trained on {run.images[0]} other images than the {len(parts[0][0])} here")
    return parts


def table(run: Run, data: list[tuple], ks=KS, inside=True) -> list[dict]:
    """A row for each tap of `data`, from load_data; without `inside` for h and z alone. The untrained h is the last.

    {tap, dim; linear, l2, held_out, knn20 ... for each kind of label; rank}. The row of h also has `carrying`, where
    the head has weights. COLUMNS says what they are.
    """
    (images, labels, _), (test_images, test_labels, _) = data
    known, test_known = labelled(labels, "training"), labelled(test_labels, "test")
    kinds = KINDS if labels.shape[1] == 2 else ("",)
    if known.sum() < 5 or not test_known.any():
        note("too few labels: no accuracies")
        kinds = ()
    votes = [k for k in ks if k < known.sum()]
    if kinds and len(votes) < len(ks):
        note(f"no kNN for k of {int(known.sum())} or more, the number of training images")
    train_images, rows = images if known.all() else images[known], []
    for suffix, source in (("", run), (" untrained", untrained(run))):
        train_x = features(source, train_images, inside=inside) if kinds else {}
        test_x = features(source, test_images, inside=inside)
        progress = train.Progress(len(test_x), sys.stderr, what="tap")
        for done, (tap, x) in enumerate(test_x.items(), 1):
            row = {"tap": tap + suffix, "dim": x.shape[1]}
            for i, kind in enumerate(kinds):
                y, test_y = labels[known, i].to(x.device), test_labels[test_known, i].to(x.device)
                four = train_x[tap], y, x[test_known], test_y
                row["linear" + kind], row["l2" + kind], row["held_out" + kind] = probe(*four)
                if votes:
                    row |= {f"knn{k}{kind}": accuracy for k, accuracy in zip(votes, knn(*four, k=votes))}
            row["rank"] = projhead.effective_rank(x)
            rows.append(row)
            progress(done, tap + suffix)
    if any(isinstance(layer, nn.Linear) for layer in run.head.modules()):
        rows[0]["carrying"] = carrying(run, images)
    return rows


def labelled(labels: Tensor, part: str) -> Tensor:
    """Which rows of labels (M, kinds) are known, bool (M,); says on stderr how many are not."""
    known = (labels >= 0).all(1)
    if not known.all():
        note(f"{int((~known).sum())} of {len(known)} {part} images have no label, or one that no training image has: "
             "no probe sees them")
    return known


def carrying(run: Run, images: Tensor, batches: int = 10) -> float:
    """How many features of h carry 99 % of sum_i (dL/dh_i)^2 var(h_i) in a mini-batch; L is the run's objective. The
    mean over mini-batches of views as in training; the networks are in eval mode, and the target is the stop-gradient
    one."""
    model = train.Model(run.encoder, run.head, run.predictor, None, None)
    N, device = min(run.args.batch_size, len(images)), next(run.encoder.parameters()).device
    counts = []
    for step in range(batches):
        x, _ = train.two_views(images, run.args, step, len(images) // N, N, device)
        h = run.encoder(x).float().requires_grad_()
        train.objective(h, None, model, run.args).backward()
        counts.append(projhead.features_holding(h.grad.square().sum(dim=0) * h.detach().var(dim=0)))
    return statistics.mean(counts)


# ---------------------------------------------------------------------------- the probes for what was done to an image

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
    top, left = (half[:, None, None] * (S - S // 2) for half in (y // 2, y % 2))
    rows, columns = train.resize_matrix(top, size, S, S), train.resize_matrix(left, size, S, S)     # N x S x S each
    return rows[:, None] @ x @ columns[:, None].mT


TRANSFORMS = {"rotation": (rotate, 4), "gray": (gray, 2), "quadrant": (quadrant, 4)}    # and classes


def transform_table(run: Run, data: list[tuple], inside=True) -> list[dict]:
    """A row {tap, dim, rotation, gray, quadrant} for each tap, without `inside` for h and z alone, then for the
    untrained h and for chance.

    Each cell is a linear probe's accuracy in percent, for which of the transformation's classes was done to an image.
    Every image gets one at random, the same for all taps. Only the first PROBED training images of the run and test
    images are looked at, and no labels. Raises UserError for fewer than 5 training images.
    """
    images, test_images = (part[:PROBED] for part, _, _ in data)
    refuse(len(images) < 5, f"--probe transform needs at least 5 training images, not {len(images)}")
    rows = {}
    for suffix, source in (("", run), (" untrained", untrained(run))):
        for column, (transform, classes) in TRANSFORMS.items():
            x, y = transformed(source, images, transform, classes, 0, inside)
            test_x, test_y = transformed(source, test_images, transform, classes, 1, inside)
            progress = train.Progress(len(x), sys.stderr, what="tap")
            for done, tap in enumerate(x, 1):
                row = rows.setdefault(tap + suffix, {"tap": tap + suffix, "dim": x[tap].shape[1]})
                row[column], row["l2 " + column] = linear_probe(x[tap], y, test_x[tap], test_y)
                progress(done, f"{tap}{suffix}, {column}")
    chance = {column: 100 / classes for column, (_, classes) in TRANSFORMS.items()}
    return [*rows.values(), {"tap": "chance"} | chance]


def transformed(run: Run, images: Tensor, transform, classes: int, seed: int, inside: bool) -> tuple[dict, Tensor]:
    """features() of uint8 images (M, 3, S, S), each transformed by a class of its own, and the classes (M,)."""
    y = torch.randint(classes, (len(images),), generator=train.generator(seed, 0, 1))
    y = y.to(next(run.encoder.parameters()).device)
    def view(batch, rows):
        return train.normalize(transform(batch.float() / 255, y[rows]))
    return features(run, images, view, inside), y


# ---------------------------------------------------------------------------- what is known of a run: a line of JSON

MEASURES = (untrained, taps, features, probe, linear_probe, second_moment, fit, knn, table, labelled, carrying, rotate,
            gray, quadrant, transform_table, transformed, train.objective, train.two_views, train.augment, train.view,
            train.normalize, train.resize_matrix, train.shift_hue, train.hsv_to_rgb, train.blur_matrix, train.to_gray,
            projhead.effective_rank, projhead.features_holding, projhead.sparsity, *projhead.LOSSES.values())


def measured(run: Run, probe: str, ks: list[int], dataset=None, data=None, inside=False) -> list[dict]:
    """The rows of `table` or of `transform_table`: from RUN/eval.json where they are there for this checkpoint, this
    question and this source of MEASURES, else measured now and put there."""
    source = "".join(inspect.getsource(function) for function in MEASURES) + repr((L2, PROBED))
    made_of, file, kept, loaded = [run.crc, zlib.crc32(source.encode())], run.path / "eval.json", {}, None
    question = {"probe": probe, "ks": ks if probe == "labels" else None, "dataset": dataset, "data": data}
    if (dataset or run.args.dataset) == "folder":           # its images are part of the question: they may change
        loaded = load_data(run, dataset, data)
        question["images"] = [[zlib.crc32(x.numpy()) for x in part[:2]] for part in loaded]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # no file, or not ours: measured anew
        found = json.loads(file.read_text())
        kept = dict(found["results"]) if found["made_of"] == made_of else {}
    complete, asked = (json.dumps(question | {"inside": each}) for each in (True, inside))
    rows = kept.get(complete) or kept.get(asked)
    if not rows:
        note(f"measuring {run.path}")
        loaded = loaded or load_data(run, dataset, data)
        rows = table(run, loaded, ks, inside) if probe == "labels" else transform_table(run, loaded, inside)
        try:
            with train.replacing(file) as new:
                new.write(json.dumps({"made_of": made_of, "results": kept | {asked: rows}}).encode())
        except UserError as e:                              # another's run, say: the table is shown all the same
            note(f"not kept: {e}")
    return [row for row in rows if inside or not is_inside(row["tap"])]


def describe(run: Run) -> dict:
    """A run's line, before anything is measured: its arguments and what it logged up to its checkpoint."""
    file, log = run.path / "metrics.jsonl", []
    try:
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        log = [line for line in lines if line.get("step", 0) <= run.step]   # a killed run has logged more
    except (ValueError, AttributeError, TypeError):
        note(f"warning: {file} is not what train.py writes: nothing of it is taken")
    except OSError:                                                         # only checkpoint.pt was copied, say
        pass
    return {"run": run.path.resolve().name, "step": run.step, "steps": run.steps, "images": run.images,
            "args": vars(run.args), "log": log}


def read_lines(files: list[str]) -> list[dict]:
    """The lines of files that --json made; of two about the same run, the later one counts for all that it holds."""
    found = {}
    for file in files:
        for i, text in enumerate(Path(file).read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            try:
                line = json.loads(text)
                key = json.dumps([line["run"], line["args"], line["images"]])
                line["step"], line["steps"], line["images"][0]                              # ours has these
                [line["args"][flag] for flag in ("seed", "encoder", "image_size")]
                identity(line), flags(line), values(line, inside=True)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file}, line {i}: not what eval.py --json writes") from None
            found[key] = found.get(key, {}) | line
    return list(found.values())


# ---------------------------------------------------------------------------- methods: runs but for the seed

def identity(line: dict) -> dict:
    """What a run is: its arguments, without those of no meaning, the seed, and where it lies and computes; of a folder
    also its name and its images."""
    args = line["args"]
    what = {flag: value for flag, value in args.items() if value is not None and flag not in ("seed", *train.PLACES)}
    return what | ({"data": Path(args["data"]).name, "images": line["images"]} if args["dataset"] == "folder" else {})


def flags(line: dict) -> list[str]:
    """What a run is called, flag by flag, the head first."""
    words = line["args"]["called"].split()
    return [f"{flag} {value}" for flag, value in zip(words[::2], words[1::2])]


def methods(lines: list[dict]) -> tuple[dict, list[str]]:
    """({label: {seed: line}}, the flags that all share). A label is what else a run is called, and always its head;
    where two have one label, also what differs in their arguments. Raises UserError for a seed twice."""
    groups, named = {}, {}
    for line in lines:
        seeds = groups.setdefault(json.dumps(identity(line), sort_keys=True), {})
        other = seeds.setdefault(line["args"]["seed"], line)
        refuse(other is not line, f"{line['run']} has the flags and the seed of {other['run']}: leave one out")
    firsts = [min(seeds.values(), key=lambda line: len(flags(line))) for seeds in groups.values()]
    shared = [flag for flag in flags(firsts[0]) if all(flag in flags(line) for line in firsts)]
    common = [flag for flag in shared if not flag.startswith("--head ")]
    labels = [" ".join(flag for flag in flags(line) if flag not in common) for line in firsts]
    for label, line, seeds in zip(labels, firsts, groups.values()):
        own, alike = identity(line), [identity(other) for other, its in zip(firsts, labels) if its == label]
        for flag in sorted({flag for what in alike for flag in what}):
            if any(what.get(flag) != own.get(flag) for what in alike):
                label += f" --{flag.replace('_', '-')} {own.get(flag)}"
        named[label] = seeds
    return named, common


def values(line: dict, inside: bool) -> dict:
    """{(column, tap): value} of a line's rows, and for h of the last line of its log."""
    found, last = {}, (line["log"] or [{}])[-1]
    for row in line.get("labels", []) + line.get("transform", []):
        if inside or not is_inside(row["tap"]):
            found |= {(key, row["tap"]): value for key, value in row.items() if key != "tap"}
    logged = [name for name in COLUMNS if COLUMNS[name].source == "log" and last.get(name) is not None]
    return found | {(name, "h"): last[name] for name in logged}


def rows_of(named: dict, inside: bool) -> dict:
    """{label: {seed: values}}: the untrained encoders first, then the methods."""
    rows = {label: {seed: values(line, inside) for seed, line in seeds.items()} for label, seeds in named.items()}
    lines = [line for seeds in named.values() for line in seeds.values()]
    start, seen = {}, {(line["images"][0], line["args"]["image_size"]) for line in lines}
    for label, seeds in named.items():
        for seed, line in seeds.items():
            name = f"untrained {line['args']['encoder']}"
            if len(seen) > 1:                               # no mean over what saw other images
                name += f", {line['images'][0]} images of {line['args']['image_size']} px"
            first = {(key, "h"): value for (key, tap), value in rows[label][seed].items() if tap == "h untrained"}
            if first:
                start.setdefault(name, {})[seed] = first
    return start | rows


# ---------------------------------------------------------------------------- tables

def columns_of(typed: list[str] | None, probes: list[str], ks: list[int], shapes: bool) -> dict[str, Column]:
    """{name: column}: those of --columns, typed by whole names or first words, else those that a table shows by itself,
    of these probes and of the logs. Raises UserError for an unknown name."""
    names = {}
    for name, column in COLUMNS.items():
        for each in [f"knn{k}" for k in ks] if name == "knn" else [name]:
            for kind in KINDS if shapes and name in PER_LABEL else ("",):
                if column.source in (*probes, "log"):
                    names[each + kind] = column
    if not typed:
        hidden = f"knn{KS[0]}" if ks == KS else ""          # of typed ks all are shown
        return {name: column for name, column in names.items() if column.shown and name.split()[0] != hidden}
    chosen = {}
    for word in typed:
        meant = {name: column for name, column in names.items()
                 if word in (name, name.split()[0]) or word == "knn" and name.startswith("knn")}
        refuse(not meant, f"--columns: no column {word}; there are {', '.join(names)}")
        chosen |= meant
    return chosen


def cell(form: str, numbers: list, difference: bool = False) -> str:
    """One value, or `66.0 (sd 0.5)`; of differences `+0.5±0.2`, with the half-width of their mean's 95 % interval."""
    if len(numbers) < 2:
        return f"{numbers[0]:{'+' * difference}{form}}" if numbers else ""
    mean, n = statistics.mean(numbers), len(numbers)
    deviation = statistics.stdev(numbers)
    half_width = deviation * T95[min(n, 10) - 2] / n ** 0.5
    return f"{mean:+{form}}±{half_width:{form}}" if difference else f"{mean:{form}} (sd {deviation:{form}})"


def print_table(lines: list[list]) -> None:
    """Print rows of cells, the first of them the names of the columns. A column without any other cell is left out.
    Raises UserError where there are no rows."""
    refuse(len(lines) < 2, "no run has any of these columns")
    columns = [column for column in zip(*lines) if any(str(value) for value in column[1:])]
    widths = [max(len(str(value)) for value in column) for column in columns]
    first, *rest = zip(*columns)
    for line in (first, ["-" * width for width in widths], *rest):
        train.say("| " + " | ".join(str(value).ljust(width) for value, width in zip(line, widths)) + " |")


def one_table(line: dict, columns: dict[str, Column], inside: bool) -> None:
    """Print a row for each tap of a run."""
    found, lines = values(line, inside), [["tap", "dim", *columns]]
    for tap in dict.fromkeys(tap for name, tap in found if name in columns):
        numbers = {name: [found[name, tap]] if (name, tap) in found else [] for name in columns}
        lines.append([tap, found.get(("dim", tap), ""), *(cell(columns[name].form, numbers[name]) for name in columns)])
    train.say(f"{line['run']}, step {line['step']} of {line['steps']}; accuracies in percent, on test images")
    print_table(lines)


def many_table(named: dict, common: list[str], columns: dict[str, Column], args) -> None:
    """Print a row for each method, with --taps for each tap of each. With --against, the label of a row, all others are
    differences from it over the seeds that both have."""
    rows, lines = rows_of(named, args.taps), []
    wide = [(name, tap) for name in columns for tap in ("h", "z") if args.columns or tap in columns[name].shown.split()]
    for label, seeds in rows.items():
        here = dict.fromkeys(tap for found in seeds.values() for name, tap in found if name in columns)
        base = rows[args.against] if args.against not in (None, label) else None
        if base:
            seeds = {seed: {place: value - base[seed][place] for place, value in found.items() if place in base[seed]}
                     for seed, found in seeds.items() if seed in base}
        def text(*place):
            numbers = [found[place] for found in seeds.values() if place in found]
            return cell(columns[place[0]].form, numbers, difference=bool(base))
        start = [f"`{label}`", len(seeds)]
        if args.taps:
            lines += [[*start, tap, *(text(name, tap) for name in columns)] for tap in here if tap != "h untrained"]
        else:
            lines.append([*start, *(text(*each) for each in wide)])
    if common:
        train.say(f"all: {' '.join(common)}")
    print_table([["flags", "n", *(["tap", *columns] if args.taps else map(" ".join, wide))], *lines])
    if args.against:
        train.say(f"All but `{args.against}`: mean difference from it, paired by seed, ± half-width of its 95 % "
                  "interval (Student's t)")


# ---------------------------------------------------------------------------- plots

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")      # Okabe and Ito's


def axis(numbers: list[float]) -> list[float]:
    """Round numbers in equal steps, from the smallest or below to the largest or above."""
    low, span = min(numbers), max(numbers) - min(numbers) or 1
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span <= 5 * power * factor)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(first + 1, math.ceil(max(numbers) / step)) + 1)]


def draw(path: str, series: dict[str, list], x_name: str, y_name: str, radius: int) -> None:
    """Write an SVG of {label: [(x, y, whether its dot is filled), ...]}: lines with dots, each of its own colour."""
    xs, ys = (axis([point[i] for points in series.values() for point in points]) for i in (0, 1))
    def across(x):
        return round(75 + 435 * (x - xs[0]) / (xs[-1] - xs[0]), 1)
    def up(y):
        return round(420 - 400 * (y - ys[0]) / (ys[-1] - ys[0]), 1)
    def text(x, y, words, anchor="middle", more=""):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>'
    parts = ['<rect width="100%" height="100%" fill="white"/><path d="M75 20V420H510" fill="none" stroke="#888"/>',
             text(292, 472, x_name), text(-220, 22, y_name, more='transform="rotate(-90)"')]
    parts += [f'<path d="M{across(x)} 420v5" stroke="#888"/>{text(across(x), 442, f"{x:.4g}")}' for x in xs]
    parts += [f'<path d="M75 {up(y)}h-5" stroke="#888"/>{text(66, up(y) + 5, f"{y:.4g}", "end")}' for y in ys]
    below = 34                                              # where the legend goes on
    for i, (label, points) in enumerate(series.items()):
        colour, dash = COLOURS[i % len(COLOURS)], "7 4" if i >= len(COLOURS) else "none"
        stroke = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
        corners = " ".join(f"{across(x)},{up(y)}" for x, y, _ in points)
        parts.append(f'<polyline points="{corners}" fill="none" {stroke}/><path d="M528 {below - 5}h22" {stroke}/>')
        for x, y, filled in points:
            fill = colour if filled else "white"
            parts.append(f'<circle cx="{across(x)}" cy="{up(y)}" r="{radius}" fill="{fill}" stroke="{colour}" '
                         'stroke-width="2.5"/>')
        for words in textwrap.wrap(label, 32, break_on_hyphens=False):
            parts.append(text(558, below, words, "start"))
            below += 20
        below += 5
    if not all(filled for points in series.values() for *_, filled in points):
        parts.append(text(528, below + 10, "filled: h, hollow: z", "start"))
    height = max(490, below + 25)
    with train.replacing(Path(path)) as file:
        file.write("\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 830 {height}" width="830" '
                              f'height="{height}" font-family="sans-serif" font-size="15">',
                              *parts, "</svg>\n"]).encode())
    train.say(f"{path}: {y_name} by {x_name}")


def plot(path: str, named: dict, x_name: str, y_name: str) -> None:
    """Draw h and z of each method in two columns, or a key of metrics.jsonl by epoch: means where all seeds have it."""
    rows, places = rows_of(named, inside=False), ("h", "z")
    if x_name == "epoch":                                   # the log, with an epoch in place of a tap
        def logged(line):
            return {(key, epoch["epoch"]): value for epoch in line["log"][1:] for key, value in epoch.items()}
        rows = {label: {seed: logged(line) for seed, line in seeds.items()} for label, seeds in named.items()}
        places = sorted({epoch for seeds in rows.values() for found in seeds.values() for _, epoch in found})
    series = {}
    for label, seeds in rows.items():
        for place in places:
            pairs = [[found.get((name, place), math.nan) for name in (x_name, y_name)] for found in seeds.values()]
            x, y = map(statistics.mean, zip(*pairs))
            if math.isfinite(x + y):
                series.setdefault(f"{label} (n={len(seeds)})", []).append((x, y, place != "z"))
    refuse(not series, f"--plot: no run has both {x_name} and {y_name}")
    draw(path, series, x_name, y_name, radius=2 if x_name == "epoch" else 6)


# ---------------------------------------------------------------------------- pictures

WHITE, BLACK, GREEN = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.6, 0.3)


def picture(path: str, rows: list[list]) -> None:
    """Write a grid of tiles (image uint8 (3, S, S), the colour of its frame); small images are enlarged."""
    tiles = []
    for image, colour in [tile for row in rows for tile in row]:
        times = math.ceil(64 / image.shape[-1])
        image = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
        tile = torch.tensor(colour)[:, None, None].repeat(1, image.shape[1] + 8, image.shape[2] + 8)
        tile[:, 4:-4, 4:-4] = image / 255
        tiles.append(tile)
    with train.replacing(Path(path)) as file:
        save_image(tiles, file, format="png", nrow=len(rows[0]), pad_value=1.0)
    train.say(f"{path}: in black frames the images, beside each what is said above")


def draw_neighbors(path: str, run: Run, dataset=None, data=None, n: int = 4, k: int = 8) -> None:
    """Draw the first n test images, each with its k nearest training images by cosine of h, and of z; those of its
    class in green frames."""
    (images, labels, classes), (test_images, test_labels, _) = load_data(run, dataset, data)
    x, test_x = features(run, images, inside=False), features(run, test_images[:n], inside=False)
    rows = []
    for i, label in enumerate(test_labels[:n, 0].tolist()):
        for tap in test_x:
            cosines = F.normalize(x[tap], dim=1) @ F.normalize(test_x[tap][i], dim=0)
            near = cosines.topk(min(k, len(images))).indices.tolist()
            same = [label >= 0 and labels[j, 0].item() == label for j in near]
            rows.append([(test_images[i], BLACK), *((images[j], GREEN if s else WHITE) for j, s in zip(near, same))])
            train.say(f"row {len(rows)}: test image {i}, {classes[label] if label >= 0 else 'of no class'}, and its "
                      f"{len(near)} nearest training images by {tap}, {sum(same)} of its class in green frames")
    picture(path, rows)


def draw_views(path: str, run: Run, data=None, n: int = 4, k: int = 8) -> None:
    """Draw the first n training images of the run, each with k views of it as training makes them."""
    args, g = run.args, train.generator(run.args.seed, 0, 1)
    mean, std = torch.tensor([train.MEAN, train.STD])[..., None, None]
    images = load_data(run, None, data)[0][0][:n]
    views = [train.augment(images, g, args.crop_scale, args.hue, args.grayscale) * std + mean for _ in range(k)]
    train.say(f"rows 1 to {len(images)}: a training image each, and {k} views of it")
    picture(path, [[(image, BLACK), *((view[i].clamp(0, 1) * 255, WHITE) for view in views)]
                   for i, image in enumerate(images)])


# ---------------------------------------------------------------------------- the command

def parse_args() -> argparse.Namespace:
    first, _, rest = __doc__.split("\n", 2)
    columns = "\n".join(f"  {name:11}{column.meaning}" for name, column in COLUMNS.items())
    p = train.Parser("python eval.py", description=first, epilog=f"{rest}\ncolumns:\n{columns}", allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("run", nargs="*", type=train.path, metavar="RUN", help="Folders of runs, or files of lines that --json made. "
        "Default: the newest folder in runs/.")
    add("--rows", type=shlex.split, nargs="+", metavar="FLAGS", help="Only the runs with all of these flags of "
        "train.py, quoted as one; of several such, the runs that fit any.")
    add("--columns", nargs="+", metavar="NAME", help="Only these columns, by whole names or first words; with --plot x "
        "and y, of which x may be epoch and y a key of metrics.jsonl.")
    add("--taps", action="store_true", help="Also the layers inside the head, and p: a row for each tap.")
    add("--probe", choices=["labels", "transform"], help="Probes for the labels, or for what was done to an image. "
        "Default: what --columns needs, else labels; with --json both.")
    add("--k", type=train.number(int, 1), nargs="+", metavar="K", help="Neighbours of kNN, each a column. "
        "Default: 20 200, of which a table has the latter.")
    add("--dataset", choices=train.SIZES, help="Other labelled images to probe with. Default: the run's own.")
    add("--data", type=train.data_path, metavar="DIR",
        help="Where they lie. Default: where the run found its own, or data.")
    add("--device", default=train.default_device(), help="Default: torch's accelerator where there is one, else cpu.")
    add = p.add_mutually_exclusive_group().add_argument
    add("--against", metavar="LABEL", help="Differences from the row of this label, paired by seed.")
    add("--json", action="store_true", help="A line of JSON for each run in place of a table, with all columns.")
    add("--plot", type=train.path, metavar="SVG", help="A plot of two columns: h and z of each method.")
    add("--neighbors", type=train.path, metavar="PNG", help="A picture: test images, nearest training images.")
    add("--views", type=train.path, metavar="PNG", help="A picture: training images and views of them.")
    args = p.parse_args()
    for file, ending in ((args.plot, ".svg"), (args.neighbors, ".png"), (args.views, ".png")):
        refuse(file and not file.lower().endswith(ending), f"{file} does not end in {ending}")
    of_tables = args.rows or args.columns or args.taps or args.probe or args.k or len(args.run) > 1
    refuse((args.neighbors or args.views) and of_tables,
           "--neighbors and --views draw a picture of one run, and no table")
    refuse(args.views and args.dataset, "--views is of the run's own data set")
    refuse(args.plot and args.taps, "--plot draws h and z alone")
    refuse(args.k and args.probe == "transform", "--k: there is kNN among the label probes only")
    refuse(args.json and (args.columns or args.dataset or args.k), "--json has all columns, of the run's own data set")
    return args


def matching(found: list[tuple], rows: list[list[str]]) -> list[tuple]:
    """The pairs (line, run) with all flags of any of these rows. Raises UserError for one that fits none."""
    kept = set()
    for words in rows:
        typed = {flag: value for flag, value in vars(train.parser().parse_args(words)).items() if value is not None}
        fits = {i for i, (line, _) in enumerate(found) if typed.items() <= line["args"].items()}
        refuse(not fits, f"--rows: no run has {' '.join(words)}")
        kept |= fits
    return [found[i] for i in sorted(kept)]


def full_float32() -> None:
    """float32 means float32 on GPUs, which would shorten it to TF32 in convolutions."""
    if hasattr(torch.backends, "fp32_precision"):           # torch 2.9 and newer
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    args = parse_args()
    full_float32()
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)[-1:]
    paths, device = args.run or [str(file) for file in newest], train.usable(args.device)
    refuse(not paths, "no run in runs/: make one by python train.py, or name its folder")
    files = [path for path in paths if path.endswith(".jsonl")]
    runs = [load_run(path, device) for path in paths if path not in files]
    refuse((args.neighbors or args.views) and files, "--neighbors and --views need a run's folder")
    if args.neighbors:
        return draw_neighbors(args.neighbors, runs[0], args.dataset, args.data)
    if args.views:
        return draw_views(args.views, runs[0], args.data)

    found = [*((line, None) for line in read_lines(files)), *((describe(run), run) for run in runs)]
    found = matching(found, args.rows) if args.rows else found          # each with the run to measure, or None
    lines, ks = [line for line, _ in found], args.k or KS
    refuse(not found, f"no line in {', '.join(files)}")
    kinds = sorted({args.dataset or line["args"]["dataset"] for line in lines})
    refuse(len(kinds) > 1 and not args.json,
           f"the runs are of different data sets, {' and '.join(kinds)}: choose by --rows \"--dataset {kinds[-1]}\""
           + ", or name one to probe them all with by --dataset" * (not files))
    by_epoch = args.plot and args.columns and args.columns[0] == "epoch"
    probes = ["labels", "transform"] if args.json or args.columns else ["labels"]
    probes = [args.probe] if args.probe else probes
    columns = {} if by_epoch else columns_of(args.columns, probes, ks, kinds == ["shapes"])
    probes = [probe for probe in probes if any(column.source == probe for column in columns.values())]
    x_and_y = args.columns if by_epoch else list(columns)
    x_and_y = x_and_y if args.columns else x_and_y[:2]
    named, common = ({}, []) if args.json else methods(lines)
    refuse(files and (args.dataset or args.data or args.k),
           "--dataset, --data and --k measure anew: they need the runs' folders")
    refuse(args.data and "shapes" in kinds, "--data: shapes are drawn, not read: name a --dataset")
    refuse(args.plot and len(x_and_y) != 2, f"--plot takes two columns, x and y, not {', '.join(x_and_y)}")
    refuse(args.against and args.against not in named,
           f"--against: no row {args.against!r}; there are {', '.join(map(repr, named))}")
    for line, run in found:
        for probe in probes if run is None else ():
            refuse(probe not in line, f"the line of {line['run']} lacks --probe {probe}: it needs the run's folder")

    for line, run in found:
        if run:
            line |= {probe: measured(run, probe, ks, args.dataset, args.data, args.taps) for probe in probes}
        if line["step"] < line["steps"]:
            note(f"{line['run']} is not finished: step {line['step']} of {line['steps']}")
        if args.json:
            train.say(json.dumps(line))
    if args.plot:
        plot(args.plot, named, *x_and_y)
    elif len(found) == 1 and not args.json and not args.against:
        one_table(lines[0], columns, args.taps)
    elif not args.json:
        many_table(named, common, columns, args)


if __name__ == "__main__":
    train.main(main)
