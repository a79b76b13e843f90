# SPDX-License-Identifier: MIT
"""What a trained run knows, tap by tap: h, the layers inside the head, z and p.

    python eval.py                # the newest run in runs/
    python eval.py RUN --json     # the same table as one line of JSON
    python eval.py RUN --probe transform     # what linear probes can tell of what was done to an image; needs no labels
    python eval.py RUN --neighbors out.png   # a picture instead: test images with their nearest training images

Every network is frozen and in eval mode; labels are read here and nowhere else. A linear probe and a kNN see only the
training images of the run (its first --limit N, where it was given); the test images are scored once.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import train
from projhead import alignment, effective_rank, linear_weight, seen, uniformity
from train import UserError

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PROBED = 10_000     # images of either part that --probe transform looks at, at most


# ---------------------------------------------------------------------------- runs and features

def load_run(path, device="cpu") -> argparse.Namespace:
    """A run from its folder: .args, .step, and the frozen .encoder, .head and .predictor in eval mode, and .untrained,
    the encoder before the first step. Only checkpoint.pt is read. Raises UserError."""
    path = Path(path)
    if not (path / "checkpoint.pt").is_file():
        raise UserError(f"no checkpoint.pt in {path}: name a run's folder, or make one by python train.py")
    checkpoint = train.load(path / "checkpoint.pt")
    run = argparse.Namespace(path=path, args=argparse.Namespace(**checkpoint["args"]), step=checkpoint["step"])
    try:
        run.untrained, _, _ = train.build(run.args)
        run.encoder, run.head, run.predictor = train.build(run.args)
    except (RuntimeError, MemoryError) as e:
        raise UserError(f"cannot build the networks of {path}: {type(e).__name__}") from None
    train.restore(checkpoint, {name: getattr(run, name) for name in ("encoder", "head", "predictor")}, path / "checkpoint.pt")
    for module in (run.untrained, run.encoder, run.head, run.predictor):
        module.to(device).eval().requires_grad_(False)
    return run


def taps(run, x: Tensor) -> dict[str, Tensor]:
    """{tap: (N, dim)} of normalized images x (N, 3, S, S): h, g[0], g[1] ... the head's layers, z, and p."""
    out = {"h": run.encoder(x.contiguous(memory_format=torch.channels_last)).float()}
    z = out["h"]
    for i, layer in enumerate(run.head):
        z = layer(z)
        out["z" if i + 1 == len(run.head) else f"g[{i}]"] = z
    if run.args.predictor != "none":
        out["p"] = run.predictor(z)
    return out


@torch.no_grad()
def features(run, images: Tensor, view=None, batch_size: int = 500) -> dict[str, Tensor]:
    """{tap: float32 (M, dim)} of images, each passed through the frozen networks once.

    run: what load_run returned, or a run's folder. images: uint8 (M, 3, S, S), or a train.Folder of M. view: a function
    uint8 (N, 3, S, S) -> normalized float32 that replaces plain normalization. Taps: h, g[0] ... (layers inside the head), z, p; z is absent where g has no layer,
    p where there is no prediction head. Raises RuntimeError if a parameter or buffer moved.
    """
    run = run if isinstance(run, argparse.Namespace) else load_run(run)
    modules = nn.ModuleList([run.encoder, run.head, run.predictor]).eval()
    before = {k: v.clone() for k, v in modules.state_dict().items()}
    device, parts = next(run.encoder.parameters()).device, []
    for batch in train.batches(images, torch.arange(len(images)).split(batch_size), device, train.WORKERS):
        parts.append(taps(run, view(batch) if view else train.normalize(batch.float() / 255)))
    if any(not torch.equal(v, before[k]) for k, v in modules.state_dict().items()):
        raise RuntimeError("the frozen networks moved during evaluation")
    return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}


def untrained(run) -> argparse.Namespace:
    """The run's encoder before the first step, without a head, for features()."""
    return argparse.Namespace(args=argparse.Namespace(predictor="none"), encoder=run.untrained,
                              head=nn.Sequential(), predictor=nn.Identity())


def layer_name(run, tap: str) -> str:
    """The class of the layer whose output a tap inside the head is; "" for the other taps."""
    return type(run.head[int(tap[2:-1])]).__name__ if tap.startswith("g[") else ""


# ---------------------------------------------------------------------------- probes

def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[float, float]:
    """Multinomial logistic regression on frozen features: (accuracy in percent, chosen l2).

    x: (M, dim), y: int64 (M,). Features are standardized by the training part. Minimizes mean cross-entropy +
    l2/2 ||W||^2 (not the bias) by L-BFGS to convergence; l2 is the one of eval.L2 that does best on a held-out
    fifth of the training part (the stronger of equals), then all of it is fitted again. The test labels are used
    once, to count. Deterministic. Raises ValueError for fewer than 5 training rows.
    """
    if len(train_x) < 5:
        raise ValueError(f"a linear probe needs at least 5 training rows, not {len(train_x)}")
    mean, std = train_x.mean(0), train_x.std(0)
    std = torch.where(std > 0, std, 1)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    axes = torch.linalg.eigh((train_x.T @ train_x).double()).eigenvectors.to(train_x)   # a rotation: it leaves the problem
    train_x, test_x = train_x @ axes, test_x @ axes                 # as it is and makes the scaling in fit_logistic a good one
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    held, kept = order[:len(order) // 5], order[len(order) // 5:]
    classes = int(train_y.max()) + 1
    scores, weights = [], None
    for l2 in L2:                                       # from strong to weak, each starting where the last ended
        weights = fit_logistic(train_x[kept], train_y[kept], classes, l2, weights)
        scores.append(accuracy(weights, train_x[held], train_y[held]))
    l2 = L2[scores.index(max(scores))]
    return accuracy(fit_logistic(train_x, train_y, classes, l2), test_x, test_y), l2


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """The weights (classes, dim + 1), bias last, that minimize mean cross-entropy + l2/2 ||W||^2.

    x: (M, dim) with uncorrelated columns. L-BFGS runs on V where W = V * scale, scale^-2 being about the curvature
    of each column; this takes some 40 evaluations where plain L-BFGS takes over 600.
    """
    scale = F.pad((x.square().mean(0) / classes + l2).rsqrt(), (0, 1), value=1.0)
    V = (x.new_zeros(classes, x.shape[1] + 1) if start is None else start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS([V], max_iter=1000, tolerance_grad=1e-4, tolerance_change=1e-9,
                                  history_size=20, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        W = V * scale
        loss = F.cross_entropy(F.linear(x, W[:, :-1], W[:, -1]), y) + l2 / 2 * W[:, :-1].square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    return (V * scale).detach()


def accuracy(weights: Tensor, x: Tensor, y: Tensor) -> float:
    return 100 * (F.linear(x, weights[:, :-1], weights[:, -1]).argmax(1) == y).float().mean().item()


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> float:
    """Accuracy in percent of a majority vote of the k nearest training rows by cosine; of equals the smaller class.

    x: (M, dim), y: int64 (M,). Every vote counts the same (no weighting by distance). k is cut to the training rows.
    """
    train_x, test_x, right = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1), 0
    classes = int(max(train_y.max(), test_y.max())) + 1
    for x, y in zip(test_x.split(1000), test_y.split(1000)):
        nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1).indices     # N x k
        votes = F.one_hot(train_y[nearest], classes).sum(dim=1)                 # N x classes
        right += (votes.argmax(dim=1) == y).sum().item()
    return 100 * right / len(test_y)


# ---------------------------------------------------------------------------- the table

def load_data(run, data=None) -> tuple:
    """(images, labels) of the training part and of the test part; of the former the images that the run was trained on."""
    args = run.args
    (images, labels), test = (train.load_dataset(args.dataset, data or args.data, part, args.image_size) for part in (True, False))
    return (images[:args.limit], labels), test


def table(run, ks=(20, 200), data=None) -> list[dict]:
    """A row {tap, dim, linear, knn20, ... rank, alignment, uniformity} for each tap, the untrained h last.

    Each also has its `spectrum`, and that of h has `seen`, the percentage of its variance that the head's first layer
    looks at (projhead.seen).
    """
    args = run.args
    (train_images, train_labels), (test_images, test_labels) = load_data(run, data)
    train_labels = train_labels[:args.limit]
    if train_labels.ndim == 1:
        train_labels, test_labels = train_labels[:, None], test_labels[:, None]
    known, known_test = (train_labels >= 0).all(1), (test_labels >= 0).all(1)
    train_images, train_labels = train_images[known], train_labels[known]
    probed = len(train_images) >= 5 and bool(known_test.any())
    if probed:
        test_images, test_labels = test_images[known_test], test_labels[known_test]
    random_numbers = train.stream(0, 0, 1)
    def view(batch):
        return train.augment(batch, random_numbers, args.crop_scale, args.hue, args.grayscale)
    rows = []
    for name, source in (("", run), (" untrained", untrained(run))):
        a = features(source, train_images) if probed else None
        b, view1, view2 = features(source, test_images), features(source, test_images, view), features(source, test_images, view)
        good, good_test = train.readable(train_images), train.readable(test_images)
        for tap in b:
            row = {"tap": tap + name, "layer": layer_name(source, tap), "dim": b[tap].shape[1]}
            for i, label in enumerate({"shapes": (" shape", " hue")}.get(args.dataset, ("",)) if probed else ()):
                labels, labels_test = train_labels[good, i].to(a[tap].device), test_labels[good_test, i].to(a[tap].device)
                four = a[tap][good], labels, b[tap][good_test], labels_test
                row["linear" + label], row["l2" + label] = linear_probe(*four)
                row |= {f"knn{k}{label}": knn(*four, k=k) for k in ks}
            if tap == "h" and any(isinstance(layer, nn.Linear) for layer in source.head):
                row["seen"] = 100 * seen(b["h"], linear_weight(source.head))
            row |= {"rank": effective_rank(b[tap]), "alignment": alignment(view1[tap], view2[tap]),
                    "uniformity": uniformity(b[tap]), "spectrum": spectrum(b[tap])}
            rows.append(row)
    return rows


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


def transform_table(run, data=None) -> list[dict]:
    """A row {tap, layer, dim, rotation, flip, gray, quadrant} for each tap, the untrained h and chance last.

    Each cell is a linear probe's accuracy in percent, for which of the transformation's classes was done to an image.
    Every image gets one at random, the same for all taps. Only the first eval.PROBED training images of the run and
    test images are looked at, and no labels. Raises UserError for fewer than 5 training images.
    """
    train_images, test_images = (images[:PROBED] for images, _ in load_data(run, data))
    if len(train_images) < 5:
        raise UserError(f"--probe transform needs at least 5 training images, not {len(train_images)}")
    rows = {}
    for column, (transform, classes) in TRANSFORMS.items():
        for name, source in (("", run), (" untrained", untrained(run))):
            (a, a_y), (b, b_y) = (transformed(source, images, transform, classes, seed)
                                  for seed, images in enumerate((train_images, test_images)))
            for tap in a:
                first = {"tap": tap + name, "layer": layer_name(source, tap), "dim": a[tap].shape[1]}
                row = rows.setdefault(tap + name, first)
                row[column], row["l2 " + column] = linear_probe(a[tap], a_y, b[tap], b_y)
    chance = {column: 100 / classes for column, (_, classes) in TRANSFORMS.items()}
    return [*rows.values(), {"tap": "chance", "layer": "", "dim": 0, **chance}]


def spectrum(h: Tensor) -> list[float]:
    """The singular values number 1, 2, 4, 8 ... of h (M, D), as shares of the first."""
    s = torch.linalg.svdvals(h.double())
    return [round((s[i - 1] / s[0]).item(), 5) for i in (2**k for k in range(len(s).bit_length()))]


def transformed(run, images: Tensor, transform, classes: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """features() of uint8 images (M, 3, S, S), each transformed by a class of its own, and the classes (M,)."""
    generator, drawn = train.stream(seed, 0, 1), []
    def view(batch):
        drawn.append(torch.randint(classes, (len(batch),), generator=generator).to(batch.device))
        return train.normalize(transform(batch.float() / 255, drawn[-1]))
    return features(run, images, view), torch.cat(drawn)


# ---------------------------------------------------------------------------- a picture

def draw_neighbors(run, path, data=None, n: int = 8, k: int = 8) -> None:
    """Writes a picture to path: the first n test images, each with its k nearest training images of the run by cosine.

    A block per test image: on the left the image; beside it its neighbours by h, and below these by z where there is
    a head, nearest first. Raises UserError for a file type that cannot be written, OSError for a path that cannot.
    """
    (train_images, _), (test_images, _) = load_data(run, data)
    a, b, nearest = features(run, train_images), features(run, test_images[:n]), {}
    for tap in ("h", "z") if "z" in b else ("h",):
        cosine = F.normalize(b[tap], dim=1) @ F.normalize(a[tap], dim=1).T
        nearest[tap] = cosine.topk(min(k, len(a[tap])), dim=1).indices.tolist()         # n x k
    def pick(images, numbers):
        return next(train.batches(images, [torch.tensor(numbers)], torch.device("cpu")))
    blocks = []
    for i, query in enumerate(pick(test_images, range(len(b["h"])))):
        blank = torch.full_like(query, 255)
        rows = [[query if tap == "h" else blank, blank, *pick(train_images, nearest[tap][i])] for tap in nearest]
        blocks.append(make_grid(torch.stack(sum(rows, [])) / 255, nrow=len(rows[0]), padding=2, pad_value=1))
    try:
        save_image(make_grid(blocks, nrow=1, padding=8, pad_value=1), path)
    except ValueError as e:
        raise UserError(f"--neighbors {path}: {e}") from None


def main() -> None:
    p = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's folder (default: the newest in runs/)")
    p.add_argument("--data", metavar="DIR", help="where the data set lies, if it has moved since")
    p.add_argument("--probe", choices=["labels", "transform"], default="labels",
                   help="what linear probes are for: the labels, or rotation, flip, gray and quadrant of the image")
    p.add_argument("--neighbors", metavar="PNG", help="draw test images and their nearest training images; no table")
    p.add_argument("--k", type=train.number(int, 1), nargs="+", help="neighbours for kNN (default: 20 200)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true", help="the same as one line of JSON")
    args = p.parse_args()
    if args.k and (args.neighbors or args.probe == "transform"):
        raise UserError("--k: there is kNN in the table of label probes only")
    if args.neighbors and (args.json or args.probe == "transform"):
        raise UserError("--neighbors: draws a picture instead of a table")
    if args.run is None:
        runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda f: f.stat().st_mtime)
        if not runs:
            raise UserError("no run in runs/: make one by python train.py, or name its folder")
        args.run = runs[-1].parent
    run = load_run(args.run, train.usable(args.device))
    if args.neighbors:
        draw_neighbors(run, args.neighbors, args.data)
        print(f"{args.neighbors}: test images, each with the training images nearest by cosine of h and, below, of z")
        return
    rows = transform_table(run, args.data) if args.probe == "transform" else table(run, args.k or (20, 200), args.data)
    if args.json:
        print(json.dumps({"run": str(run.path), "step": run.step, "args": vars(run.args), "rows": rows}))
        return
    columns = [key for key in rows[0] if not key.startswith("l2") and key not in ("seen", "spectrum")]
    cells = [columns] + [[f"{v:.{2 if key in ('alignment', 'uniformity') else 1}f}" if isinstance(v, float) else str(v)
                          for key, v in row.items() if key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    what = {"labels": "accuracies in percent, knn by cosine, rank, alignment and uniformity on test images",
            "transform": "accuracy in percent of linear probes for what was done to a test image"}
    print(f"{run.path}, step {run.step}; {what[args.probe]}")
    for line in cells:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


if __name__ == "__main__":
    train.main(main)
