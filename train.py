# SPDX-License-Identifier: MIT
"""Train an encoder through a head, without labels.

    python train.py                                          # the demonstration: drawn shapes, a small encoder, a CPU
    python train.py --head parametric --dataset cifar10      # ResNet-18 on CIFAR-10: wants a GPU
    python train.py --head sparse --dataset cifar10 --encoder convnet --epochs 10        # minutes on a CPU
    python train.py --predictor offdiag --dataset cifar10    # Wen & Li's prediction head, a non-contrastive loss
    python train.py --predictor mlp --target ema --dataset cifar10        # in BYOL's style; --target stopgrad: SimSiam's
    torchrun --nproc-per-node 8 train.py --dataset cifar10   # many GPUs: the same run up to rounding

A run is a folder, runs/NAME: checkpoint.pt and metrics.jsonl, whose keys README.md explains. The same command
continues an interrupted run. Then: python eval.py.
"""
if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C during the imports ends without a traceback

import os
if "OMP_WAIT_POLICY" not in os.environ:                 # torch's threads spin while they wait, and keep other processes from
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # the cores; it reads this when it is imported

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import hashlib
import inspect
import io
import json
import math
import re
import secrets
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import projhead
from projhead import ENCODERS, HEADS, LOSSES, NORMS, PREDICTORS, fit_head, sparsity, unroll_head

RANK, RANKS, LOCAL_RANK, LOCAL_RANKS = (    # torchrun sets these, and MASTER_ADDR
    int(os.environ.get(name, default)) if "MASTER_ADDR" in os.environ else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------- the method

def objective(h: Tensor, t: Tensor | None, model, args) -> Tensor:
    """L(theta, phi) of h (2N, D), the first views of N images and then the second; t (2N, d): the slow copy's z, or None."""
    z = model.g(h)                                      # 2N x d
    loss_fn = LOSSES[args.loss] if args.tau is None else functools.partial(LOSSES[args.loss], tau=args.tau)
    if args.predictor == "none":
        z1, z2 = z.chunk(2)
        loss = loss_fn(z1, z2)                          # InfoNCE
    else:
        p1, p2 = model.q(z).chunk(2)
        t1, t2 = (z if t is None else t).detach().chunk(2)              # stop-gradient
        loss = (loss_fn(p1, t2) + loss_fn(p2, t1)) / 2  # each view is the target once; for Wen & Li [reading]
    if args.sparsity:                                   # Song et al.: + lambda R(W), as SparseHead.penalty
        loss = loss + args.sparsity * sparsity(model.g, args.sparsity_norm)
    return loss


def train_step(x: Tensor, model, theta, phi, args, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step on x (2N, 3, S, S), the first views of N images and then the second. Returns h (2N, D) and the loss,
    detached, and the loss that the last inner step started from, or None.

    model is Model(f, g, q, target, start) of `build`; theta and phi are the optimizers of f's parameters, and of those of g and
    q. `train` sets their learning rates. Both views pass in one batch, so every BatchNorm sees both [reading]. other is a
    batch like x, for the inner steps of --inner-batch other.
    """
    h = encode(model.f, x, args)                        # 2N x D, once; heads and losses run in float32
    t, inner = slow(model, x, args), None               # 2N x d, with --target ema
    start = model.start if args.inner_start == "reset" else None
    theta.zero_grad(), phi.zero_grad()
    if args.inner_gradient == "unrolled":               # Gupta et al. read to the letter: through the inner steps
        loss, inner = unroll_head(lambda: objective(h, t, model, args), nn.ModuleList([model.g, model.q]), phi, args.inner_steps, start)
    elif args.inner_steps:                              # Gupta et al.: phi alone, with h held fixed
        with torch.no_grad():
            fixed = (h.detach(), t) if other is None else (encode(model.f, other, args), slow(model, other, args))
        inner = fit_head(lambda: objective(*fixed, model, args), phi, args.inner_steps, start)
        phi.zero_grad()
    if args.inner_gradient != "unrolled":
        loss = objective(h, t, model, args)
    loss.backward()
    theta.step()
    if not args.inner_steps:
        phi.step()                                      # joint training: phi in the same step
    return h.detach(), loss.detach(), inner


def encode(f: nn.Module, x: Tensor, args) -> Tensor:
    """h = f(x) in float32; the encoder, and nothing else, computes in args.precision."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        h = f(x)
    return h.float() if h.dtype == torch.bfloat16 else h


@torch.no_grad()
def slow(model, x: Tensor, args) -> Tensor | None:
    """z of BYOL's slow copy of f and g, which `follow` updates: (2N, d), or None without --target ema."""
    return model.target[1](encode(model.target[0], x, args)) if model.target else None


def train(args) -> None:
    """Train one run from start to end. Raises UserError; on SIGINT or SIGTERM it finishes the step, saves and raises
    SystemExit(130 or 143)."""
    device, out = join(args), Path(args.out)
    with locked(out):
        checkpoint = claim(out, args)
        images = training_images(args, device)          # uint8 M x 3 x S x S
        N = min(args.batch_size, len(images))           # images a step, over all processes
        per_epoch = len(images) // N                    # the last short batch is left out, another one each epoch
        total = args.epochs * per_epoch
        model = build(args, device)
        theta, phi = optimizers(model, args)
        run = Run(args, images, model, theta, phi, total, per_epoch)
        start = run.start(checkpoint)
        with signals() as caught:
            for step, (x, other) in enumerate(two_views(images, args, range(start, total), per_epoch, N, device), start):
                peak = args.lr * N / 256
                lr = learning_rate(step, total, peak, args.warmup)
                for group in theta.param_groups + phi.param_groups:
                    group["lr"] = group["scale"] * (peak if group["constant"] else lr)
                h, loss, inner = train_step(x, model, theta, phi, args, other)
                if model.target:                        # from --ema at the start to 1 at the end
                    follow(model, 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / total)) / 2)
                run.after(step, lr, h, loss, inner, first_signal(caught))
        run.finish()


# ---------------------------------------------------------------------------- flags

SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "folder": 64}      # of the images, in pixels
PLACES = ("data", "out", "device")        # where a run lies and computes: not what it is


class UserError(Exception):
    """Something the user can mend; shown as one line on stderr, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser() -> Parser:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    fraction, width = number(float, 0, 1), number(int, 1, 2**14)
    p.add_argument("--head", choices=HEADS, help="projection head; parametric is an mlp with --inner-steps 2, sparse one with "
                   "--sparsity 0.1 (default: parametric; with a prediction head: mlp)")
    p.add_argument("--depth", type=number(int, 1, 16), help="linear layers of an mlp, parametric or sparse head (default: 2)")
    p.add_argument("--predictor", choices=["none", *PREDICTORS], default="none",
                   help="prediction head; none: the loss is contrastive; identity: p = z (default: none)")
    p.add_argument("--loss", choices=LOSSES, help="(default: infonce; with --predictor identity or offdiag bn, with another cosine)")
    p.add_argument("--target", choices=["stopgrad", "ema"],
                   help="what a prediction is compared with: SimSiam's or BYOL's (default: stopgrad)")
    p.add_argument("--ema", type=fraction, help="the slow copy's momentum at the start; it ends at 1 (default: 0.99)")
    p.add_argument("--tau", type=number(float, 1e-3), help="temperature of infonce (default: 0.5)")
    p.add_argument("--inner-steps", type=number(int, 0), metavar="K",
                   help="steps on the heads before each encoder step; 0: joint training (default: 0; --head parametric: 2)")
    p.add_argument("--inner-batch", choices=["same", "other"],
                   help="what the inner steps see: the step's own batch, or one of other images, encoded once (default: same)")
    p.add_argument("--inner-start", choices=["warm", "reset"],
                   help="where they start: from the last step's heads, or from the run's first (default: warm)")
    p.add_argument("--inner-gradient", choices=["envelope", "unrolled"],
                   help="the encoder's gradient: at the fitted heads, or through the inner steps (default: envelope)")
    p.add_argument("--head-lr", type=number(float, 0, 1e6),
                   help="the head's learning rate, times the encoder's; 0: a frozen random head (default: 1)")
    p.add_argument("--predictor-lr", type=number(float, 0, 1e6), help="the prediction head's, likewise (default: 1; offdiag: 10)")
    p.add_argument("--predictor-schedule", choices=["cosine", "constant"],
                   help="of the prediction head's learning rate; constant is SimSiam's (default: cosine, as the encoder's)")
    p.add_argument("--projector-bn", choices=["yes", "no"],
                   help="end g in a BatchNorm without affine (default: yes with a prediction head, unless --loss bn)")
    p.add_argument("--sparsity", type=number(float, 0, 1e30), metavar="LAMBDA",
                   help="weight of the sparsity penalty; 0: off (default: 0; --head sparse: 0.1)")
    p.add_argument("--sparsity-norm", choices=NORMS, help="its norm; the functions are in projhead.py (default: l21)")
    p.add_argument("--dim", type=width, help="width of z (default: 128; --head slice: 360/2048 of h)")
    p.add_argument("--hidden", type=width, help="hidden width of the head (default: twice that of h)")
    p.add_argument("--encoder", choices=ENCODERS, help="(default: resnet18; for --dataset shapes convnet)")
    p.add_argument("--dataset", choices=SIZES, default="shapes",
                   help="shapes is drawn; cifar10, cifar100 and stl10 are downloaded (default: shapes)")
    p.add_argument("--data", metavar="DIR", help="where the data set lies (default: data). folder: DIR/train and DIR/test or DIR/val, "
                   "else DIR, a fifth of which is kept for testing; subfolders are classes")
    p.add_argument("--limit", type=number(int, 2), metavar="N", help="only the first N training images (default: all)")
    p.add_argument("--image-size", type=number(int, 8, 512), help="a folder's images are resized and cropped to this (default: 64)")
    p.add_argument("--epochs", type=number(int, 1, 10**6), help="(default: 100; convnet 20; shapes with convnet 12)")
    p.add_argument("--batch-size", type=number(int, 2), help="images a step, two views each (default: 512; convnet: 256)")
    p.add_argument("--lr", type=number(float, 0, 1e30),
                   help="the encoder's peak learning rate for 256 images a step, scaled with the batch (default: 0.06)")
    p.add_argument("--momentum", type=number(float, 0, 0.9999), help="(default: 0.9)")
    p.add_argument("--weight-decay", type=number(float, 0, 1e6), help="(default: 5e-4)")
    p.add_argument("--warmup", type=fraction, help="fraction of the steps in which the learning rate rises (default: 0.05)")
    p.add_argument("--crop-scale", type=number(float, 0.01, 1), help="smallest area of a crop (default: 0.2; shapes 0.5)")
    p.add_argument("--hue", type=number(float, 0, 0.5), help="largest shift of the hue, in turns (default: 0.1; shapes 0.5)")
    p.add_argument("--grayscale", type=fraction, help="probability of a gray view (default: 0.1)")
    p.add_argument("--seed", type=number(int, 0, 10**6), default=0, help="(default: 0)")
    p.add_argument("--precision", choices=["float32", "bfloat16"],
                   help="of the encoder (default: bfloat16 where the device computes in it, else float32)")
    p.add_argument("--device", help="(default: torch's accelerator where there is one, else cpu)")
    p.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/NAME, made of the flags)")
    return p


def defaults(args) -> dict:
    """What a flag is where it is not given; some follow from those above them.

    Learning rate, momentum, weight decay, batch, temperature and grayscale are those of simclr-cifar10 for 100 epochs
    [code]; the rest is ours [reading]. README.md reports what was tried.
    """
    paired, shapes, small = args.predictor != "none", args.dataset == "shapes", args.encoder in ("convnet", "convnet128")
    return dict(
        head="mlp" if paired else "parametric",
        encoder="convnet" if shapes else "resnet18",
        loss="infonce" if not paired else "bn" if args.predictor in ("identity", "offdiag") else "cosine",
        target="stopgrad" if paired else None,
        ema=0.99 if args.target == "ema" else None,
        tau=0.5 if args.loss == "infonce" else None,
        head_lr=1.0 if trainable(HEADS, args.head) else None,
        predictor_lr=(10.0 if args.predictor == "offdiag" else 1.0) if trainable(PREDICTORS, args.predictor) else None,
        predictor_schedule="cosine" if trainable(PREDICTORS, args.predictor) else None,
        inner_steps=2 if args.head == "parametric" else 0,
        inner_batch="same" if args.inner_steps else None,
        inner_start="warm" if args.inner_steps else None,
        inner_gradient="envelope" if args.inner_steps else None,
        projector_bn="yes" if paired and args.loss != "bn" else "no",
        sparsity=0.1 if args.head == "sparse" else 0.0,
        sparsity_norm="l21" if args.sparsity else None,
        dim=128 if trainable(HEADS, args.head) else None,
        hidden=None,
        depth=2 if takes(args.head, "depth") else None,
        data="data" if not shapes else None,
        image_size=SIZES[args.dataset],
        epochs=(12 if shapes else 20) if small else 100,
        batch_size=256 if small else 512,
        lr=0.06,
        momentum=0.9,
        weight_decay=5e-4,
        warmup=0.05,
        crop_scale=0.5 if shapes else 0.2,
        hue=0.5 if shapes else 0.1,
        grayscale=0.1,
    )


def default_device() -> str:
    return str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"


def computes_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16 itself, rather than by way of float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device == "cpu" else ()
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def trainable(kinds: dict, name: str) -> bool:
    return name in kinds and any(True for _ in kinds[name](8).parameters())


def takes(head: str, size: str) -> bool:
    return head in HEADS and size in inspect.signature(HEADS[head]).parameters


def parse_args(argv=None) -> argparse.Namespace:
    """The arguments, with their defaults. Raises UserError where they clash."""
    args = parser().parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value is not None}
    for flag in defaults(args):                         # each anew: some follow from those before them
        if getattr(args, flag) is None:
            setattr(args, flag, defaults(args)[flag])
    args.device = args.device or default_device()
    args.precision = args.precision or ("bfloat16" if computes_bfloat16(args.device) else "float32")
    frozen = not args.head_lr and not args.predictor_lr
    for clash, flag, why in (
            (args.predictor == "none" and args.loss in ("cosine", "bn"), "loss", f"{args.loss} needs a prediction: add --predictor mlp, or identity for p = z"),
            (args.predictor == "none", "target", "only a prediction is compared with a target: add --predictor mlp"),
            (args.target != "ema", "ema", "needs --target ema"),
            (args.loss != "infonce", "tau", f"the loss {args.loss} has no temperature"),
            (not trainable(HEADS, args.head), "head_lr", f"there is nothing to train in --head {args.head}"),
            (not trainable(PREDICTORS, args.predictor), "predictor_lr", f"there is nothing to train in --predictor {args.predictor}"),
            (not trainable(PREDICTORS, args.predictor), "predictor_schedule", f"there is nothing to train in --predictor {args.predictor}"),
            (not args.inner_steps, "inner_batch", "needs --inner-steps K or --head parametric"),
            (not args.inner_steps, "inner_start", "needs --inner-steps K or --head parametric"),
            (not args.inner_steps, "inner_gradient", "needs --inner-steps K or --head parametric"),
            (args.inner_gradient == "unrolled" and args.inner_batch == "other", "inner_batch",
             "the other batch is encoded without a gradient: there is nothing to unroll"),
            (args.inner_gradient == "unrolled" and RANKS > 1, "inner_gradient", "unrolled runs in one process"),
            (args.inner_steps and frozen, "inner_steps", "there is no trainable head to fit"),
            (args.inner_steps and frozen, "head_lr", "a frozen head cannot be fitted: add --inner-steps 0, or use --head mlp"),
            (args.sparsity and not trainable(HEADS, args.head), "sparsity", f"--head {args.head} has no weights to make sparse"),
            (args.sparsity and not args.head_lr, "sparsity", "a frozen head cannot become sparse"),
            (args.sparsity and not args.head_lr, "head_lr", "a frozen head cannot become sparse"),
            (not args.sparsity, "sparsity_norm", "needs --sparsity LAMBDA or --head sparse"),
            (not takes(args.head, "d"), "dim", f"--head {args.head} has the encoder's width"),
            (not takes(args.head, "hidden"), "hidden", f"--head {args.head} has no hidden layer"),
            (args.depth == 1, "hidden", "a head of --depth 1 has no hidden layer"),
            (not takes(args.head, "depth"), "depth", f"--head {args.head} has a fixed number of layers"),
            (args.dataset != "folder", "image_size", f"{args.dataset} has images of {SIZES[args.dataset]} px"),
            (args.dataset == "shapes", "data", "shapes are drawn, not read: name a --dataset")):
        if clash and flag in given:
            raise UserError(f"--{flag.replace('_', '-')}: {why}")
    args.data = args.data and os.path.abspath(args.data)        # so that a run finds its images from anywhere
    if args.out is None:
        name = [args.dataset, *([os.path.basename(args.data)] if args.dataset == "folder" else []), args.encoder, args.head]
        name += [args.predictor] * (args.predictor != "none") + [words.strip("-").replace(" ", "") for words in flags(args)
                 if not words.startswith(("--dataset", "--encoder", "--head ", "--predictor ", "--seed"))]
        args.out = os.path.join("runs", "-".join([*name, f"seed{args.seed}"]))
    return args


def flags(args) -> list[str]:
    """The flags, "--name value" each, that make these arguments: those that differ from their defaults."""
    usual = {"dataset": "shapes", "predictor": "none", "limit": None, "seed": 0, "precision": args.precision} | defaults(args)
    return [f"--{flag.replace('_', '-')} {value}" for flag, value in vars(args).items() if flag not in PLACES and value != usual[flag]]


# ---------------------------------------------------------------------------- data

def load_dataset(name: str, root="data", train: bool = True, size: int = 64, limit: int | None = None, create: bool = True) -> tuple:
    """(images uint8 (M, 3, S, S), labels int64 (M,)), labels -1 where unknown; shapes has (M, 2): shape and hue.

    cifar10, cifar100 and stl10 (whose training part includes the unlabelled images) are torchvision's. For folder see
    `load_folder`; its images are resized to `size`. limit: only the first so many training images. With `create` what is
    absent is downloaded, and a folder's decoded images are kept in CACHE; without, nothing is written. Raises UserError.
    """
    return read_dataset(name, root, train, size, limit, create)[:2]


def read_dataset(name, root, train, size, limit=None, create=False) -> tuple[Tensor, Tensor, list[str]]:
    """load_dataset, and the names of the classes."""
    if name == "folder":
        return load_folder(Path(root), train, size, limit, create)
    if name == "shapes":
        images, labels, classes = *draw_shapes(*((10_000, 1) if train else (4_000, 2))), SHAPES
    else:
        images, labels, classes = load_torchvision(name, root, train, create)
    if train and limit:
        check_limit(limit, name, len(images))
        images, labels = images[:limit], labels[:limit]
    return images, labels, classes


def load_torchvision(name: str, root, train: bool, create: bool) -> tuple[Tensor, Tensor, list[str]]:
    """One of torchvision's data sets, downloaded with `create`. Raises UserError."""
    make, folder = {"cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
                    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python"),
                    "stl10": (torchvision.datasets.STL10, "stl10_binary")}[name]
    part = dict(split="train+unlabeled" if train else "test") if name == "stl10" else dict(train=train)
    there, missing = (Path(root) / folder).exists(), [d for d in (Path(root), *Path(root).parents) if not d.exists()]
    if not there and not create:
        raise UserError(f"no {folder} in {root}: name its folder by --data")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            data = make(root, download=not there, **part)
    except Exception as e:          # torchvision raises many kinds here: RuntimeError, URLError, EOFError, UnpicklingError ...
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        for made in missing:                                    # torchvision has made it, and nothing is in it
            with contextlib.suppress(OSError):
                made.rmdir()
        if there:
            raise UserError(f"{Path(root) / folder} is incomplete or corrupt ({why}); remove it to download again") from None
        raise UserError(f"no {folder} in {root}, and no download ({why}); name its folder by --data, or use --dataset shapes") from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.labels if name == "stl10" else data.targets).long()
    if name != "stl10":
        images = images.permute(0, 3, 1, 2).contiguous()
    if labels.min() < -1 or labels.max() >= len(data.classes):
        raise UserError(f"{Path(root) / folder} has labels out of range: {labels.min()} to {labels.max()}")
    return images, labels, data.classes


def check_limit(limit: int, name: str, M: int) -> None:
    if limit > M:
        raise UserError(f"--limit {limit}: {name} has {M} training images")


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "projhead"
PIXELS = 50_000_000                 # a picture of more is not read
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP"]         # those of torchvision's IMG_EXTENSIONS


def load_folder(root: Path, train: bool, size: int, limit: int | None, create: bool) -> tuple[Tensor, Tensor, list[str]]:
    """A part of a folder of images: root/train, and root/test or root/val, in any case; without these all of root, of which
    a fifth, chosen by name, is for testing. Classes are the subfolders that hold training images.

    What cannot be read is named on stderr and left out; UserError where that is over 1 % of the part.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: name one of images by --data, or use --dataset shapes")
    parts = {d.name.lower(): d for d in root.iterdir() if d.is_dir()}
    test = next((parts[name] for name in ("test", "val", "valid", "validation") if name in parts), None)
    root = parts.get("train", root)
    bases = [root, test] if test and "train" in parts else [root, root]
    files = {base: list(image_files(base)) for base in bases}
    found = []                                          # [(path, its class's name or None)] of either part
    for base, training in zip(bases, (True, False)):
        paths = files[base]
        crc = {f: zlib.crc32(str(f.relative_to(base)).encode(errors="replace")) for f in paths}
        paths = sorted(paths, key=lambda f: (crc[f], f))        # mixed, so that the first N are of all classes
        if bases[0] is bases[1]:                        # an image does not change sides when others come or go
            paths = [f for f in paths if (crc[f] // 7 % 5 == 0) != training]
        found.append([(f, f.relative_to(base).parts[0] if f.parent != base else None) for f in paths])
    classes = sorted({name for _, name in found[0] if name is not None})
    wanted = found[0 if train else 1]
    if not wanted:
        raise UserError(f"no images ({' '.join(torchvision.datasets.folder.IMG_EXTENSIONS)}) in {bases[not train]} to "
                        f"{'train' if train else 'test'} on")
    if train:
        if limit:
            check_limit(limit, "the folder", len(wanted))
            wanted = wanted[:limit]
        note(f"folder {root}: {len(found[0]):,} training and {len(found[1]):,} test images, {len(classes)} classes")
    images, readable = decoded([f for f, _ in wanted], bases[not train], size, create)
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for _, name in wanted])
    return images, labels[readable], classes


def image_files(base: Path):
    """The files below base that have an image's name, also behind links; a folder is entered once."""
    entered = set()
    for folder, subfolders, names in os.walk(base, followlinks=True):
        at = os.stat(folder)
        if (at.st_dev, at.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((at.st_dev, at.st_ino))
        subfolders.sort()
        files = (Path(folder, name) for name in names if name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS))
        yield from (f for f in files if f.is_file())


def listing(paths, base: Path, *more) -> str:
    """A hash of the paths below base, sizes and times of these files, in this order, and of what else it is to depend on."""
    made_of = [(str(f.relative_to(base)), s.st_size, s.st_mtime_ns) for f in paths for s in [f.stat()]]
    return hashlib.sha256(repr((*more, made_of)).encode(errors="surrogatepass")).hexdigest()[:32]


def decoded(paths: list[Path], base: Path, size: int, create: bool) -> tuple[Tensor, Tensor]:
    """(images uint8 (M, 3, size, size), which of the paths could be read: bool (len(paths),)), mapped from a file in CACHE.

    The file's name is a hash of what it was made of: paths below base, sizes, times. It holds a byte for each path, then the
    images. It is written as NAME.tmp, under a lock, and renamed when whole. Without `create` the images go to memory.
    """
    file = CACHE / f"{listing(paths, base, size)}.images"
    def parts(whole):
        return whole[len(paths):].view(-1, 3, size, size), whole[:len(paths)].bool()
    def mapped():
        whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        if len(whole) != len(paths) + int(whole[:len(paths)].sum()) * 3 * size**2:
            file.unlink()                               # it was cut short: made anew next time
            raise UserError(f"{file} was damaged and has been removed: start again")
        return parts(whole)
    if file.is_file():
        return mapped()
    if not create:
        decode(paths, size, pixels := io.BytesIO())
        return parts(torch.frombuffer(pixels.getbuffer(), dtype=torch.uint8))
    temporary = file.with_suffix(".tmp")
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as f:
            lock(f.fileno(), wait=True)
            if not file.is_file():                      # else another process was decoding, and has finished
                f.truncate(0)
                decode(paths, size, f)
                f.flush()
                os.replace(temporary, file)
    except (OSError, UserError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, UserError):
            raise
        raise UserError(f"cannot keep the decoded images in {CACHE}: {e.strerror}; set XDG_CACHE_HOME to a folder with more room") from None
    return mapped()


def decode(paths: list[Path], size: int, file) -> None:
    """Write a byte for each path, 1 where it can be read, and then the pixels of those. Raises UserError where over 1 % cannot."""
    readable, bad = bytearray(len(paths)), 0
    file.write(readable)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        for start in range(0, len(paths), 1024):
            for i, image in enumerate(pool.map(lambda f: read_image(f, size), paths[start:start + 1024]), start):
                if isinstance(image, bytes):
                    readable[i] = file.write(image) > 0
                    continue
                bad += 1
                if bad > 0.01 * len(paths):
                    pool.shutdown(cancel_futures=True)
                    raise UserError(f"{bad} images cannot be read, over 1 % of {len(paths)}, the last {paths[i]}: {image}")
                note(f"left out {paths[i]}: {image}")
            if sys.stderr.isatty():
                note(f"\rdecoded {min(start + 1024, len(paths)):,} of {len(paths):,} images" + "\n" * (start + 1024 >= len(paths)), end="")
    file.seek(0)
    file.write(readable)


def read_image(path: Path, size: int) -> bytes | str:
    """The pixels (3, size, size) of an image, resized and cropped to a square; or, in a line, why it cannot be read."""
    from PIL import Image, ImageOps                     # Pillow comes with torchvision
    try:
        Image.MAX_IMAGE_PIXELS = None                   # PIXELS is the limit
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                return f"{image.width} x {image.height} pixels"
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                return "floating-point pixels"
            if image.mode.startswith("I"):              # 16 bits, which Pillow would clip
                x = torchvision.transforms.functional.pil_to_tensor(image.convert("I")) // 257
                image = torchvision.transforms.functional.to_pil_image(x.clamp(0, 255).to(torch.uint8))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return b"".join(band.tobytes() for band in image.split())
    except Exception as e:                              # Pillow raises many kinds
        return f"{type(e).__name__}: {e}".split("\n")[0]


def training_images(args, device) -> Tensor:
    """The images of these arguments, on the device where they fit in half of its free memory."""
    if LOCAL_RANK:                                      # the first process of each machine downloads or decodes, then the others read
        dist.barrier()
    images, _ = load_dataset(args.dataset, args.data, True, args.image_size, args.limit)       # the labels are not looked at
    if RANKS > 1 and not LOCAL_RANK:
        dist.barrier()
    if len(images) < 2:
        raise UserError(f"{len(images)} images are no training set: a loss needs at least two")
    if device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)


def fingerprint(images: Tensor) -> list[int]:
    """The number of images and a checksum of their bytes: what they are, wherever they lie."""
    crc = 0
    for part in images.cpu().contiguous().split(4096):
        crc = zlib.crc32(part.numpy(), crc)
    return [len(images), crc]


def two_views(images, args, steps: range, per_epoch: int, N: int, device):
    """For each step (x, other), a function of (args.seed, step) alone: x (2N, 3, S, S) are two views of its N images, and other,
    with --inner-batch other, two views of N images drawn anew; else None.

    Of several processes each makes its part of the batch.
    """
    def views(chosen, g):
        part = chosen[RANK * N // RANKS:][:N // RANKS]
        batch = to_device(images[to_device(part, images.device)], device)
        x = [augment(batch, g, args.crop_scale, args.hue, args.grayscale, RANK, RANKS) for _ in "12"]
        return torch.cat(x).contiguous(memory_format=torch.channels_last)
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == steps.start:
            order = torch.randperm(len(images), generator=generator(args.seed, epoch, 0))
        g = generator(args.seed, step, 1)
        x = views(order[i * N:(i + 1) * N], g)
        yield x, views(torch.randperm(len(images), generator=g)[:N], g) if args.inner_batch == "other" else None


def generator(seed: int, step: int, which: int) -> torch.Generator:
    """Random numbers of their own for each (seed, step); `which` is 0 for an epoch's order, 1 for a step's augmentation."""
    return torch.Generator().manual_seed((seed * 1_000_003 + 2 * step + which) % 2**32)


def to_device(x: Tensor, device) -> Tensor:
    """x on the device; the copy does not make the host wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear over the first warmup * total steps, then a half cosine down to zero."""
    rising = warmup * total
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


SHAPES = ["disc", "triangle", "square", "star", "disc, hollow", "triangle, hollow", "square, hollow", "star, hollow"]


def draw_shapes(M: int, seed: int) -> tuple[Tensor, Tensor]:
    """M drawings, uint8 (M, 3, 32, 32), with labels (M, 2): which of 8 shapes (disc, triangle, square or star, filled
    or hollow; any angle, place and size) and which of 6 hues it is painted in, on a gray ground."""
    g = torch.Generator().manual_seed(seed)
    def uniform(low, high):
        return low + (high - low) * torch.rand(M, 1, 1, generator=g)
    labels = torch.stack([torch.randint(8, (M,), generator=g), torch.randint(6, (M,), generator=g)], dim=1)
    outline, hollow, hue = labels[:, 0, None, None] % 4, labels[:, 0, None, None] // 4, labels[:, 1, None, None]
    radius, saturation, value, ground = uniform(8, 14), uniform(0.5, 1), uniform(0.5, 1), uniform(0.1, 0.9)
    y = torch.arange(32.)[:, None] - 15.5 - uniform(-3, 3)
    x = torch.arange(32.)[None, :] - 15.5 - uniform(-3, 3)
    r, angle = torch.hypot(x, y), torch.atan2(y, x) + uniform(0, 2 * math.pi)
    def polygon(k):                         # the distance from the centre to the edge of a regular k-gon, by angle
        return math.cos(math.pi / k) / torch.cos(torch.remainder(angle, 2 * math.pi / k) - math.pi / k)
    edge = torch.stack([torch.full_like(angle, 0.85), polygon(3), polygon(4), 0.65 + 0.35 * torch.cos(5 * angle)])
    edge = radius * edge.gather(0, outline[None].expand(1, M, 32, 32))[0]
    paint = (edge - r + 0.5).clamp(0, 1) - hollow * (0.55 * edge - r + 0.5).clamp(0, 1)
    images = torch.lerp(ground[:, None], hsv_to_rgb(hue.float(), value * saturation, value), paint[:, None])
    return (images * 255).round().to(torch.uint8), labels


# ---------------------------------------------------------------------------- augmentation: in batch, per image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, of each channel, for every data set


def augment(images: Tensor, generator: torch.Generator, crop_scale=0.2, hue=0.1, grayscale=0.1, rank=0, ranks=1) -> Tensor:
    """One random view per image in SimCLR's manner: uint8 (N, 3, S, S) -> normalized float32 (N, 3, S, S).

    Crop of crop_scale to 1 of the area, resized back; flip; with probability 0.8 brightness, contrast and saturation
    by a factor in 0.6 to 1.4 and a hue shift up to +-hue turns; gray with probability grayscale; above 64 px a
    Gaussian blur with probability 0.5. Each is torchvision's own definition, but for floats and in batch: every
    parameter is drawn per image, only the order of the four colour operations once per call. Grayscale 0.1 is
    simclr-cifar10's [code]; the other constants are ours [reading].
    Drawn on the generator's device; with a CPU generator the views are the same on every device. The images may be
    the share of one rank: then the parameters are that share of those of the whole batch.
    """
    N, S, device = len(images), images.shape[-1], images.device
    def uniform(low, high, *shape):
        drawn = torch.rand(*shape, N * ranks, generator=generator, device=generator.device)
        return low + (high - low) * drawn[..., rank * N:(rank + 1) * N]
    area, ratio = uniform(crop_scale, 1, 10) * S * S, uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights <= S) & (widths <= S)               # the first of ten tries that fits, else all of the image
    first = fits.byte().argmax(dim=0, keepdim=True)
    height, width = (torch.where(fits.any(0), a.gather(0, first)[0].clamp(min=1), S) for a in (heights, widths))
    top, left = ((uniform(0, 1) * (S - a + 1)).floor() for a in (height, width))
    flip = (uniform(0, 1) < 0.5).float()
    applied = (uniform(0, 1) < 0.8).float()
    factors, shift = 1 + applied * uniform(-0.4, 0.4, 3), applied * uniform(-hue, hue)
    gray = (uniform(0, 1) < grayscale).float()
    order = torch.randperm(4, generator=generator, device=generator.device).tolist()
    blurred, sigma = ((uniform(0, 1) < 0.5).float(), uniform(0.1, 2)) if S > 64 else (gray, gray)
    drawn = torch.stack([top, height, left, width, flip, sigma, *factors, shift, gray, blurred])
    drawn = to_device(drawn, device)[..., None, None, None]                    # 12 x N x 1 x 1 x 1
    at_once = N if device.type == "cuda" else 64        # on a CPU small parts that stay in its cache: twice as fast
    return torch.cat([view(*part, order) for part in zip(images.split(at_once), drawn.split(at_once, dim=1))])


def view(images: Tensor, parameters: Tensor, order: list[int]) -> Tensor:
    """The views that `parameters` (12, N, 1, 1, 1) describe; order: of brightness, contrast, saturation, hue."""
    N, S = len(images), images.shape[-1]
    top, height, left, width, flip, sigma = parameters[:6, :, 0]                          # N x 1 x 1 each
    brightness, contrast, saturation, shift, gray, blurred = parameters[6:]               # N x 1 x 1 x 1 each
    # Crop, flip and resize are two matrices per image, one for the rows and one for the columns.
    rows, columns = resize_matrix(top, height, S, S), resize_matrix(left, width, S, S)
    columns = torch.where(flip > 0, columns.flip(1), columns)
    x = images.to(torch.float32) / 255
    x = rows[:, None] @ (x.reshape(N, 3 * S, S) @ columns.mT).reshape(N, 3, S, S)
    jitter = [lambda x: x.mul_(brightness).clamp_(0, 1),
              lambda x: to_gray(x).mean(dim=(1, 2, 3), keepdim=True).lerp(x, contrast).clamp_(0, 1),
              lambda x: to_gray(x).lerp(x, saturation).clamp_(0, 1),
              lambda x: shift_hue(x, shift)]
    for i in order:
        x = jitter[i](x)
    x = x.lerp_(to_gray(x), gray)
    if S > 64:
        kernel = blur_matrix(sigma, S)
        x = torch.lerp(x, kernel[:, None] @ x @ kernel[:, None].mT, blurred)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """(x - MEAN) / STD of x in [0, 1], (N, 3, S, S)."""
    mean, std = to_device(torch.tensor([MEAN, STD], dtype=x.dtype), x.device)
    return (x - mean[:, None, None]) / std[:, None, None]


def resize_matrix(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """(N, out, size): cuts start .. start + length (N, 1, 1) from `size` pixels and resizes that to `out`, antialiased."""
    scale = length / out
    centre = (torch.arange(out, device=start.device) + 0.5)[:, None] * scale              # N x out x 1
    source = torch.arange(size, device=start.device) + 0.5 - start                        # N x 1 x size
    weight = (1 - (source - centre).abs() / scale.clamp(min=1)).clamp(min=0)              # a triangle around the centre
    weight = weight * ((source > 0) & (source < length))
    return weight / weight.sum(dim=2, keepdim=True)


def blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """(N, size, size): a Gaussian of sigma (N, 1, 1) pixels over a tenth of the image, reflected at the edges."""
    radius = size // 20
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    source = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)                 # size x taps
    weight = torch.softmax(-0.5 * (offset / sigma) ** 2, dim=2).expand(-1, size, -1)      # N x size x taps
    return torch.zeros(len(sigma), size, size, device=sigma.device).scatter_add_(2, source.expand_as(weight), weight)


def to_gray(x: Tensor) -> Tensor:
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def hsv_to_rgb(h: Tensor, chroma: Tensor, value: Tensor) -> Tensor:
    """h in sixths of a turn, chroma = value * saturation: (N, H, W) each -> (N, 3, H, W)."""
    k = torch.remainder(h[:, None] + torch.arange(5, 0, -2, device=h.device)[:, None, None], 6)
    return value[:, None] - chroma[:, None] * (2 - (k - 2).abs()).clamp(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (N, 3, H, W) in [0, 1] by shift (N, 1, 1, 1) turns, value and saturation kept."""
    (r, g, b), value = x.unbind(1), x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    h = torch.where(value == r, (g - b) / divisor,
                    torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor))
    return hsv_to_rgb(h + 6 * shift[:, 0], chroma, value)


# ---------------------------------------------------------------------------- models and optimizers

# target: BYOL's slow copy, Sequential(f, g), or None; start: the first values of phi, the parameters of g and q
Model = collections.namedtuple("Model", "f g q target start")
MODULES = ("encoder", "head", "predictor", "target")            # their names in a checkpoint


def build(args, device="cpu") -> Model:
    """The untrained networks of these arguments, a function of args.seed. Raises UserError for a width the head cannot have."""
    torch.manual_seed(args.seed)
    f = projhead.encoder(args.encoder, args.image_size)
    sizes = {size: getattr(args, flag) for flag, size in (("dim", "d"), ("hidden", "hidden"), ("depth", "depth")) if getattr(args, flag)}
    try:
        g = HEADS[args.head](f.dim, **sizes)
    except ValueError as e:
        raise UserError(f"--dim {args.dim}: {e}") from None
    d = g.eval()(torch.zeros(1, f.dim)).shape[1]                # of z
    g.train()
    if args.projector_bn == "yes":
        g = nn.Sequential(g, nn.BatchNorm1d(d, affine=False))
    q = nn.Identity() if args.predictor == "none" else PREDICTORS[args.predictor](d)
    f, g, q = (projhead.synchronized(module.to(device)) for module in (f, g, q))
    f = f.to(memory_format=torch.channels_last)
    target = copy.deepcopy(nn.Sequential(f, g)).requires_grad_(False) if args.target == "ema" else None
    return Model(f, g, q, target, [p.detach().clone() for p in nn.ModuleList([g, q]).parameters()])


def optimizers(model: Model, args) -> tuple[torch.optim.SGD, torch.optim.SGD]:
    """SGD on theta and on phi, apart so that either can move alone; each group's learning rate is `scale` times the schedule's."""
    made = []
    for parts in ([(model.f, 1.0)], [(model.g, args.head_lr), (model.q, args.predictor_lr)]):
        groups = [{"params": list(module.parameters()), "scale": scale or 0.0,
                   "constant": module is model.q and args.predictor_schedule == "constant"} for module, scale in parts]
        if args.predictor == "offdiag" and len(groups) == 2:
            groups[1]["weight_decay"] = 0.0                     # decay would bring the head back to the identity by itself
        cuda = next(model.f.parameters()).is_cuda
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=cuda)
        for p in parameters(optimizer):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if RANKS > 1:
            optimizer.register_step_pre_hook(average_gradients)
        made.append(optimizer)
    return tuple(made)


def parameters(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def follow(model: Model, momentum: float) -> None:
    """BYOL's moving average of the parameters. BatchNorm's buffers are the copy's own: it runs in train mode, on its batches."""
    for slow, fast in zip(model.target.parameters(), nn.Sequential(model.f, model.g).parameters()):
        slow.lerp_(fast, 1 - momentum)


def tensors(model: Model, theta=None, phi=None) -> dict[str, dict[str, Tensor]]:
    """All that a checkpoint holds of the networks and of the optimizers' momentum, by name; not copied."""
    parts = {name: module.state_dict() for name, module in zip(MODULES, model) if module is not None}
    for name, optimizer in (("theta", theta), ("phi", phi)):
        if optimizer:
            parts[name] = {str(i): optimizer.state[p]["momentum_buffer"] for i, p in enumerate(parameters(optimizer))}
    return parts


# ---------------------------------------------------------------------------- a run's files

OURS = r"checkpoint\.pt|metrics\.jsonl|eval\.json"            # the files of a run; each is first written as .NAME.HEX.tmp


def write(path: Path, data) -> None:
    """Replace the file by these bytes or leave it as it is: to a new file beside it, synced to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:                                        # a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {e.strerror}; what it held before is as it was") from None


def save(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


def load(path: Path) -> tuple[argparse.Namespace, int, list, dict]:
    """The arguments, step, fingerprint of the images and tensors of a checkpoint, on the CPU, without running what it holds.

    It is compared with what its own arguments build: each tensor's name, shape and type, all values finite. Raises UserError.
    """
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with zipfile.ZipFile(path) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise ValueError("compressed")
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=str(path).isprintable())
        args, step, images = (checkpoint.pop(key) for key in ("args", "step", "images"))
        args = checked(args)
        with torch.device("meta"):                              # shapes and types, without memory
            model = build(args, "meta")
            expected = tensors(model, *optimizers(model, args))
        size = sum(t.nbytes for part in expected.values() for t in part.values())
        if not (size <= path.stat().st_size <= 2 * size + 2**20):
            raise ValueError("size")
        if type(step) is not int or step < 0 or [type(i) for i in images] != [int, int] or checkpoint.keys() != expected.keys():
            raise ValueError("contents")
        for name, part in expected.items():
            if checkpoint[name].keys() != part.keys():
                raise ValueError(name)
            for key, t in part.items():
                ours = checkpoint[name][key]
                if type(ours) is not Tensor or (ours.layout, ours.dtype, ours.shape) != (t.layout, t.dtype, t.shape):
                    raise ValueError(f"{name} {key}")
                if not ours.isfinite().all():
                    raise ValueError(f"{name} {key} is not finite")
    except Exception as e:
        raise UserError(f"{path} is not a checkpoint of ours ({type(e).__name__})") from None
    return args, step, images, checkpoint


def checked(saved: dict) -> argparse.Namespace:
    """A checkpoint's arguments, if they are what their own flags give. Raises ValueError, UserError or others."""
    args = parse_args([])
    if saved.keys() != vars(args).keys() or any(type(v) not in (str, int, float, type(None)) for v in saved.values()):
        raise ValueError("other flags")
    if any(type(saved[k]) is not str for k in PLACES if k != "data" or saved["dataset"] != "shapes"):
        raise ValueError("places")
    words = [word for flag in flags(argparse.Namespace(**saved)) for word in flag.split(" ", 1)]
    args = parse_args(words)
    if any(repr(saved[k]) != repr(v) for k, v in vars(args).items() if k not in PLACES):
        raise ValueError("values")
    return argparse.Namespace(**saved)


@torch.no_grad()
def restore(expected: dict, found: dict) -> None:
    """Copy the tensors of a checkpoint into those of `tensors(...)`."""
    for name, part in expected.items():
        for key, t in part.items():
            t.copy_(found[name][key])


def lock(file: int, wait: bool = False) -> None:
    """Lock an open file or folder, until it is closed or the process ends. Raises BlockingIOError where another process has it."""
    import fcntl
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass                                                    # a file system without locks


@contextlib.contextmanager
def locked(out: Path):
    """The run's folder, made if need be, for this process alone; removed at the end if nothing was put there. Raises UserError."""
    if RANK:
        yield
        return
    made, folder = [], None
    try:
        try:
            made = [p for p in (out, *out.parents) if not p.exists()]
            out.mkdir(parents=True, exist_ok=True)
            folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            lock(folder)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process is training there") from None
        except OSError as e:
            raise UserError(f"--out {out}: {e.strerror}") from None
        yield
    finally:
        if folder is not None:
            os.close(folder)
        for p in made:
            with contextlib.suppress(OSError):
                p.rmdir()


def claim(out: Path, args) -> tuple | None:
    """What `load` reads of a run that is to be continued, None for a new one. Raises UserError if `out` holds anything else."""
    found = None
    if RANK == 0:
        entries = list(os.scandir(out))
        for entry in entries:
            if not re.fullmatch(rf"{OURS}|\.({OURS})\.[0-9a-f]{{16}}\.tmp", entry.name) or not entry.is_file(follow_symlinks=False):
                raise UserError(f"--out {out} holds {entry.name}, which no run of ours does: move it away, or choose another")
        if (out / "checkpoint.pt").exists():
            found = load(out / "checkpoint.pt")
            old = vars(found[0])
            differ = [f"--{k.replace('_', '-')} {old[k]} there, {v} here"
                      for k, v in vars(args).items() if k not in PLACES and old[k] != v]
            if differ:
                why = " (the learning rate's schedule depends on the epochs)" * (old["epochs"] != args.epochs)
                raise UserError(f"--out {out} holds another run: {'; '.join(differ)}{why}: choose another")
        elif (out / "metrics.jsonl").exists():
            raise UserError(f"--out {out} holds a metrics.jsonl without a checkpoint: choose another")
        for entry in entries:
            if entry.name.endswith(".tmp"):
                os.unlink(entry)                                # of a process that was killed
    return all_tell(found)[0]                                   # the first process knows


class Run:
    """The losses and files of a run while it trains: what is not the method."""

    def __init__(self, args, images, model, theta, phi, total: int, per_epoch: int):
        self.out, self.args, self.model, self.total, self.per_epoch = Path(args.out), args, model, total, per_epoch
        self.images, self.device = fingerprint(images), next(model.f.parameters()).device
        self.tensors, self.warned, self.saved_at = tensors(model, theta, phi), False, 0.0
        found = all_tell(self.images)
        if any(i != found[0] for i in found):
            numbers = ", ".join(str(i[0]) for i in found)
            raise everywhere(UserError(f"the processes have different images: {numbers} of them, or other bytes"))

    def start(self, checkpoint: tuple | None) -> int:
        """The step to start from: 0, with the first files written, or the checkpoint's."""
        step, N = 0, min(self.args.batch_size, self.images[0])
        if N % RANKS:
            raise everywhere(UserError(f"--batch-size {N} does not divide evenly over {RANKS} processes"))
        if checkpoint:
            _, step, images, found = checkpoint
            if images != self.images:
                raise everywhere(UserError(f"--out {self.out} was trained on {images[0]} other images than the {self.images[0]} here: "
                                           "choose another"))
            restore(self.tensors, found)
        first = {"command": command(), "args": vars(self.args), "images": self.images[0], "python": sys.version.split()[0],
                 "torch": torch.__version__, "torchvision": torchvision.__version__, "threads": torch.get_num_threads(), "processes": RANKS,
                 "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)}
        self.log = read_log(self.out / "metrics.jsonl", 1 + step // self.per_epoch) if step else []
        self.log = self.log or [json.dumps(first)]
        if not checkpoint:
            self.save(0)
        if step < self.total:
            self.write_log()
            say(f"{self.out}: {self.images[0]} images of {self.args.image_size} px, {self.args.encoder}, {self.total - step} steps of "
                f"{N} images on {self.device}" + f", {RANKS} processes" * (RANKS > 1))
        self.first = step
        self.pending, self.losses, self.began, self.since = [], [], time.perf_counter(), time.perf_counter()
        return step

    def after(self, step: int, lr: float, h: Tensor, loss: Tensor, inner: Tensor | None, stopped: int) -> None:
        """What follows a step: its loss is kept, and looked at later, since a look waits for the GPU. At the end of an epoch the
        log is written; then, or when a signal has come, the checkpoint."""
        self.pending.append((step + 1, lr, torch.stack([loss, loss if inner is None else inner])))
        epoch, i = divmod(step + 1, self.per_epoch)             # complete epochs, and steps after them
        eta = (time.perf_counter() - self.began) / (step + 1 - self.first) * (self.total - step - 1)
        if step == self.first and eta > 3600 and self.device.type == "cpu":
            note(f"this will take about {eta / 3600:.0f} hours on this CPU; --encoder convnet --epochs 10 takes minutes")
        if sys.stdout.isatty():
            say(f"\repoch {step // self.per_epoch + 1}/{self.args.epochs}  step {step % self.per_epoch + 1}/{self.per_epoch}  "
                f"ETA {clock(eta)} ", end="")
        if i and not stopped and len(self.pending) < 100:
            return
        self.losses += self.look()
        if i == 0:
            self.end_epoch(epoch, step + 1, lr, h, eta)
        if stopped or step + 1 == self.total or i == 0 and time.perf_counter() - self.saved_at > 30:
            self.save(step + 1, lr)
        if stopped and step + 1 < self.total:
            note(f"\nstopped after step {step + 1} of {self.total}; this continues: {command()}")
            raise SystemExit(128 + stopped)
        if i == 0:
            self.losses, self.since = [], time.perf_counter()

    def look(self) -> list[list[float]]:
        """[loss, inner loss] of the pending steps, means over the processes. Raises UserError for a loss that is not finite."""
        values = torch.stack([value for _, _, value in self.pending]).double().cpu()
        if RANKS > 1:
            dist.all_reduce(values)
            values /= RANKS
        for (step, lr, _), loss in zip(self.pending, values[:, 0].tolist()):
            if not math.isfinite(loss):
                raise everywhere(self.diverged(f"the loss is {loss}", step, lr))
        self.pending = []
        return values.tolist()

    def diverged(self, what: str, step: int, lr: float) -> UserError:
        return UserError(f"{what} in step {step}, at a learning rate of {lr:.3g}: try a smaller --lr than {self.args.lr}{' or --sparsity' * bool(self.args.sparsity)}; "
                         f"{self.out} keeps what was saved before")

    def end_epoch(self, epoch: int, step: int, lr: float, h: Tensor, eta: float) -> None:
        """Measure the last batch, add a line to metrics.jsonl and print it."""
        args, (f, g, q, *_) = self.args, self.model
        with torch.no_grad():
            z = g.eval()(h)
            g.train()
        h, z = projhead.gather(h), projhead.gather(z)
        if not (h.isfinite().all() and z.isfinite().all()):
            raise everywhere(self.diverged("h or z is not finite", step, lr))
        loss, inner = torch.tensor(self.losses).mean(dim=0).tolist()
        line = {"epoch": epoch, "step": step, "loss": loss} | ({"inner_loss": inner} if args.inner_steps else {}) | {"lr": lr}
        for name, features in (("h", h), ("z", z)):
            line |= {f"rank_{name}": projhead.effective_rank(features), f"spread_{name}": projhead.spread(features)}
        if args.predictor == "offdiag":
            line["offdiag"] = q.E.norm().item()
        if args.predictor == "linear":
            line["moved"] = (q.weight.detach() - self.model.start[-1]).norm().item()
        if args.sparsity:
            line |= {"penalty": sparsity(g, args.sparsity_norm).item(), "pruned": projhead.fraction_pruned(g, h)}
        seconds = time.perf_counter() - self.since
        speed = 2 * min(args.batch_size, self.images[0]) * len(self.losses) / seconds
        line |= {"seconds": seconds, "views_per_s": speed, "memory": peak_memory(self.device)}
        self.log.append(as_json(line))
        self.write_log()
        extra = "".join(f"  {k} {line[k]:.3f}" for k in ("offdiag", "pruned") if k in line)
        say("\r" * sys.stdout.isatty() + f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  rank h {line['rank_h']:.1f} z {line['rank_z']:.1f}"
            f"{extra}  {speed:.0f} views/s  ETA {clock(eta)}")
        low = min(line["spread_h"], line["spread_z"])
        if low < 0.05 and not self.warned:
            self.warned = True
            note(f"warning: the features collapse: their spread is {low:.2g} after epoch {epoch}, where 0 is one point")

    def write_log(self) -> None:
        if RANK == 0:
            write(self.out / "metrics.jsonl", "".join(line + "\n" for line in self.log).encode())

    def save(self, step: int, lr: float = 0.0) -> None:
        if not all(bool(t.isfinite().all()) for part in self.tensors.values() for t in part.values()):
            raise everywhere(self.diverged("a weight or a BatchNorm's statistic is not finite", step, lr))
        args = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in vars(self.args).items()}     # UTF-8
        if RANK == 0:
            save(self.out / "checkpoint.pt", {"args": args, "step": step, "images": self.images, **self.tensors})
        self.saved_at = time.perf_counter()

    def finish(self) -> None:
        finished, took = self.first >= self.total, clock(time.perf_counter() - self.began)
        what = f"{self.out} is finished: {self.args.epochs} epochs" if finished else f"done in {took}"
        say(f"{what}. Look at it: python eval.py {shlex.quote(str(self.out))}")


def read_log(path: Path, count: int) -> list[str]:
    """The first `count` lines of metrics.jsonl, or fewer."""
    lines = []
    if path.is_file():
        with open(path, "rb") as file:
            while len(lines) < count and (line := file.readline(2**16)).endswith(b"\n"):
                lines.append(line.decode(errors="replace").rstrip("\n"))
    return lines


def as_json(value) -> str:
    """JSON in one line, floats to six digits after the point; NaN and infinities are null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None, parse_float=lambda v: round(float(v), 6)))


def command() -> str:
    return shlex.join((["torchrun", "--nproc-per-node", str(LOCAL_RANKS)] if RANKS > 1 else ["python"]) + sys.argv)


def peak_memory(device) -> float:
    """GiB that the device (on a CPU this process) has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:                                         # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


# ---------------------------------------------------------------------------- several processes, signals, the terminal

def join(args) -> torch.device:
    """This process's device; under torchrun it joins the others, by nccl on GPUs and gloo on CPUs."""
    device = usable(f"cuda:{LOCAL_RANK}" if RANKS > 1 and args.device == "cuda" else args.device)
    if RANKS > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def usable(device: str) -> torch.device:
    """The device of that name. Raises UserError where there is none."""
    try:
        x = torch.zeros(1, device=device)
        x.item()                                                # the device "meta" holds no values
        return x.device
    except Exception as e:
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}") from None


def all_tell(value) -> list:
    """What each process has, in all of them."""
    values = [value]
    if RANKS > 1:
        dist.all_gather_object(values := [None] * RANKS, value)
    return values


def everywhere(error: UserError) -> BaseException:
    """An error that all processes have: the first shows it."""
    return error if RANK == 0 else SystemExit(2)


def average_gradients(optimizer, *_) -> None:
    """Before each step of an optimizer: its gradients become their means over the processes, in one message."""
    gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
    if gradients:
        mean = torch.cat([g.flatten() for g in gradients]) / RANKS
        dist.all_reduce(mean)
        for g, new in zip(gradients, mean.split([g.numel() for g in gradients])):
            g.copy_(new.view_as(g))


@contextlib.contextmanager
def signals():
    """A list that will hold the first SIGINT or SIGTERM; the next one ends the process. The handlers are restored at the end.

    Python runs a handler only between two operations, and a backward pass is one: so a thread says at once that the step is
    being finished, and ends the process on a second signal.
    """
    caught, before, ends = [], {}, os.pipe()
    os.set_blocking(ends[1], False)
    def watch():
        seen = 0
        while number := os.read(ends[0], 1):
            if number[0] not in before:                         # a SIGCHLD, say, which another module handles
                continue
            seen += 1
            if seen == 1:
                note("\nfinishing the step, then saving")
            elif RANKS == 1:                                    # torchrun passes on what has come already
                os._exit(128 + number[0])
    watcher = threading.Thread(target=watch, daemon=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: caught.append(number))
    old = signal.set_wakeup_fd(ends[1])
    watcher.start()
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old)
        os.close(ends[1])
        watcher.join()
        os.close(ends[0])


def first_signal(caught: list[int]) -> int:
    """The signal after which to stop, or 0. All processes stop after the same step; this waits for processes, not for GPUs."""
    number = caught[0] if caught else 0
    if RANKS > 1:
        dist.all_reduce(number := torch.tensor(number), dist.ReduceOp.MAX)
        number = int(number)
    return number


def printable(text) -> str:
    """The text with control characters, as of hostile file names, written as escapes; line breaks at its ends stay."""
    text = str(text)
    core = text.strip("\r\n")
    return text.replace(core, "".join(c if c.isprintable() else repr(c)[1:-1] for c in core)) if core else text


def say(text: str, end: str = "\n") -> None:
    if RANK == 0:
        print(printable(text), end=end, flush=True)


def note(text: str, end: str = "\n") -> None:
    if RANK == 0:
        print(printable(text), end=end, file=sys.stderr, flush=True)


def main(run) -> None:
    """Run a script's main function; what the user can mend is one line on stderr and exit code 2."""
    try:
        run()
    except BrokenPipeError:                                     # eval.py ... | head
        os._exit(1)
    except (UserError, OSError) as e:
        print(f"error: {printable(e)}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or "to allocate" in str(e):
            print("error: out of memory: try a smaller --batch-size", file=sys.stderr)
            sys.exit(2)
        if RANKS > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            sys.exit(2)                                         # another process has stopped, and said why
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(lambda: train(parse_args()))
