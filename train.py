# SPDX-License-Identifier: MIT
"""Train an encoder through a head, without labels.

    python train.py                                        # the demonstration: drawn shapes, a small encoder, a CPU
    python train.py --head parametric --dataset cifar10    # ResNet-18 on CIFAR-10: wants a GPU
    python train.py --head sparse --dataset cifar10 --encoder convnet --epochs 10        # minutes on a CPU
    python train.py --predictor offdiag --dataset cifar10  # Wen & Li's prediction head, a loss without negatives
    python train.py --predictor mlp --predictor-schedule constant --dataset cifar10      # in SimSiam's style
    python train.py --predictor mlp --target ema --dataset cifar10                       # in BYOL's style
    python train.py --dataset folder --data DIR            # your images: DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg
    torchrun --nproc-per-node 8 train.py --dataset cifar10 # many GPUs: the same run up to rounding

f is the encoder, h = f(x) its representation, z = g(h) the projection of head g, p = q(z) of prediction head q. A run
is a folder, runs/NAME: checkpoint.pt, and metrics.jsonl, whose keys the docstring of end_epoch explains. The same
command continues an interrupted run. Accuracies come from python eval.py.
"""
import os
if "OMP_WAIT_POLICY" not in os.environ:                 # both before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # threads that wait give up their core
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # large tensors in huge pages, on Linux: fewer page faults

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
import mmap
import shlex
import signal
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import projhead
from projhead import ENCODERS, HEADS, LOSSES, NORMS, PREDICTORS, fit_head, rank, sparsity, unroll_head, world_size


# ---------------------------------------------------------------------------- the method

def objective(h: Tensor, t: Tensor | None, model, args) -> Tensor:
    """L(theta, phi) of h (2N, D), the first views of N images, then the second; t (2N, d): a slow copy's z, or None."""
    z = model.g(h)                                      # 2N x d
    loss_fn = LOSSES[args.loss]
    if args.loss == "infonce":
        loss_fn = functools.partial(loss_fn, tau=args.tau)
    if args.predictor == "none":
        z1, z2 = z.chunk(2)
        loss = loss_fn(z1, z2)
    else:
        p1, p2 = model.q(z).chunk(2)
        t1, t2 = (z if t is None else t).detach().chunk(2)      # the stop-gradient
        loss = (loss_fn(p1, t2) + loss_fn(p2, t1)) / 2  # each view is the target once; for Wen & Li [reading]
    if args.sparsity:                                   # Song et al.: + lambda R(W), as SparseHead.penalty
        loss = loss + args.sparsity * sparsity(model.g, args.sparsity_norm)
    return loss


def train_step(x: Tensor, model, theta, phi, args, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step on x (2N, 3, S, S), the first views of N images and then the second. Returns h (2N, D) and the loss,
    detached, and the loss that the last inner step started from, or None.

    model is `build`'s; theta and phi are the optimizers of f's parameters, and of those of g and q. `train` sets their
    learning rates. Both views pass in one batch, so every BatchNorm sees both [reading]. other is a batch like x, which
    the inner steps of --inner-batch other see.
    """
    h = encode(model.f, x, args)                        # 2N x D, once; heads and losses run in float32
    t = target_z(model, x, args)                        # 2N x d, with --target ema
    inner = None
    start = list(model.start.parameters()) if args.inner_start == "reset" else None
    theta.zero_grad()
    phi.zero_grad()
    if args.inner_gradient == "unrolled":               # Gupta et al.: L(theta, phi_K(theta)), through the inner steps
        heads = nn.ModuleList([model.g, model.q])
        loss, inner = unroll_head(lambda: objective(h, t, model, args), heads, phi, args.inner_steps, start)
    else:
        if args.inner_steps:                            # Gupta et al.: phi alone, with h held fixed
            h0, t0 = h.detach(), t
            if other is not None:
                with torch.no_grad():
                    h0, t0 = encode(model.f, other, args), target_z(model, other, args)
            inner = fit_head(lambda: objective(h0, t0, model, args), phi, args.inner_steps, start)
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
def target_z(model, x: Tensor, args) -> Tensor | None:
    """z (2N, d) of BYOL's slow copy of f and g, which `update_target` moves; None without it."""
    return model.target[1](encode(model.target[0], x, args)) if model.target else None


def train(args) -> None:
    """Train one run from start to end. Raises UserError; on SIGINT or SIGTERM it finishes the step, saves and raises
    SystemExit(130 or 143)."""
    device = join(args)
    images = training_images(args, device)              # uint8 M x 3 x S x S
    N = min(args.batch_size, len(images))               # images a step, over all processes
    per_epoch = len(images) // N                        # the last short batch is left out, another one each epoch
    refuse(N % world_size(), f"--batch-size {N} does not divide evenly over {world_size()} processes")
    refuse(world_size() > 1 and args.inner_gradient == "unrolled",
           "--inner-gradient: unrolled runs in one process only")
    model = build(args, device)
    theta, phi = optimizers(model, args)
    run = start_run(args, images, model, theta, phi, per_epoch, device)
    peak, progress = args.lr * N / 256, Progress(run.total, done=run.step)
    with stop_signal() as caught:
        for step in range(run.step, run.total):
            lr = learning_rate(step, run.total, peak, args.warmup)
            for group in theta.param_groups + phi.param_groups:
                group["lr"] = group["scale"] * (peak if group["constant"] else lr)
            x, other = two_views(images, args, step, per_epoch, N, device)
            h, loss, inner = train_step(x, model, theta, phi, args, other)
            if model.target:                            # from --ema at the start to 1 at the end
                update_target(model, 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / run.total)) / 2)
            run.losses.append(torch.stack([loss, loss if inner is None else inner]))
            stopping = bool(caught)                     # a signal from here on stops the next step
            end_step(run, step + 1, h, stopping)
            progress(step + 1, run.shown)
            if stopping and step + 1 < run.total:
                note(f"stopped after step {step + 1} of {run.total}; this continues: {command()}")
                raise SystemExit(128 + caught[0])
    say(f"finished. Look at it: python eval.py {shlex.quote(args.out)}")


# ---------------------------------------------------------------------------- flags

SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "folder": 64}      # of the images, in pixels
PLACES = ("data", "out", "device", "called")        # arguments that are no part of what a run is


class UserError(Exception):
    """Something the user can mend; shown as one line on stderr, exit code 2."""


def refuse(clash, why: str) -> None:
    if clash:
        raise UserError(why)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__                      # for argparse's message
    return parse


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return os.path.expanduser(text)                     # a shell leaves the ~ of --out=~/run as it is


def data_path(text: str) -> str:
    return os.path.abspath(path(text))                  # so that a run finds its images from anywhere


def parser() -> Parser:
    """What was not typed is None: `parse_args` has the defaults."""
    first, _, rest = __doc__.split("\n", 2)
    p = Parser("python train.py", usage="%(prog)s [--flag value ...]", description=first, epilog=rest,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fraction, factor, width = number(float, 0, 1), number(float, 0, 1e6), number(int, 1, 2**14)
    add = p.add_argument_group("head, z = g(h): discarded after training").add_argument
    add("--head", choices=HEADS, help="Projection head g: parametric is an mlp fitted by inner steps, sparse one "
        "with a penalty. Default: parametric; mlp with a prediction head.")
    add("--depth", type=number(int, 1, 16), help="Linear layers of an mlp, parametric or sparse head. Default: 2.")
    add("--hidden", type=width, help="Width of the hidden layers of the head. Default: twice that of h.")
    add("--dim", type=width, help="Width of z. Default: 128; with --head slice 360/2048 of h.")
    add("--head-bn", choices=["none", "hidden", "end", "both"], help="BatchNorm after each hidden layer, at the end "
        "(without affine), or both. Default: hidden, or none without such a layer; with a prediction head both, or "
        "end, unless --loss bn.")
    add("--head-lr", type=factor, help="Learning rate of g, times the encoder's; 0 leaves it random. Default: 1.")
    add = p.add_argument_group("Gupta et al.: the head as a component of the objective").add_argument
    add("--inner-steps", type=number(int, 0), metavar="K", help="K, the number of steps on g and q alone before each "
        "step on the encoder alone; 0 is joint training. Default: 2 with --head parametric, else 0.")
    add("--inner-batch", choices=["same", "other"], help="Images of inner steps: the step's, or others. Default: same.")
    add("--inner-start", choices=["warm", "reset"], help="Start of the inner steps: the last g and q, or the "
        "run's first. Default: warm.")
    add("--inner-gradient", choices=["envelope", "unrolled"], help="Gradient of the encoder: at the fitted g and q, "
        "or through K plain inner steps. Default: envelope.")
    add = p.add_argument_group("Song et al.: a sparse head").add_argument
    add("--sparsity", type=number(float, 0, 1e30), metavar="LAMBDA", help="Weight of the penalty on the head's first "
        "layer; 0 is off. Default: 0.1 with --head sparse, else 0.")
    add("--sparsity-norm", choices=NORMS, help="The penalty; NORMS in projhead.py has each in a line. Default: l21.")
    add = p.add_argument_group("Wen & Li, SimSiam, BYOL: a prediction head, p = q(z)").add_argument
    add("--predictor", choices=["none", *PREDICTORS], help="Prediction head q: offdiag is Wen & Li's; identity, "
        "its control, predicts z of one view by z of the other; none has a loss between z's. Default: none.")
    add("--predictor-lr", type=factor, help="Learning rate of q, times the encoder's. Default: 1; 10 for offdiag.")
    add("--predictor-schedule", choices=["cosine", "constant"], help="Schedule of q's learning rate; SimSiam's "
        "is constant. Default: cosine.")
    add("--target", choices=["stopgrad", "ema"], help="What p predicts: the other view's z (SimSiam), or that "
        "of a slow copy of f and g (BYOL). Default: stopgrad.")
    add("--ema", type=fraction, help="Momentum of the slow copy at the start; it ends at 1. Default: 0.99.")
    add = p.add_argument_group("loss").add_argument
    add("--loss", choices=LOSSES, help="Loss; cosine and bn need a prediction head. Default: infonce; bn with "
        "--predictor identity or offdiag, cosine with another.")
    add("--tau", type=number(float, 1e-3), help="Temperature of infonce. Default: 0.5.")
    add = p.add_argument_group("data and views").add_argument
    add("--dataset", choices=SIZES, help="Images: shapes are drawn, folder is your own. Default: shapes.")
    add("--data", type=data_path, metavar="DIR", help="Folder of the data set, which is downloaded if it is not there. "
        "For --dataset folder: DIR/train/CLASS and DIR/test/CLASS, or DIR/CLASS, a fifth for testing. Default: data.")
    add("--limit", type=number(int, 2), metavar="N", help="Train on N images only: the first, of a folder some of each "
        "class. Default: all.")
    add("--image-size", type=number(int, 8, 512), help="Pixels to which a folder's images are cut. Default: 64.")
    add("--crop-scale", type=number(float, 0.01, 1), help="Smallest area of a crop. Default: 0.2; 0.5 for shapes.")
    add("--hue", type=number(float, 0, 0.5), help="Largest shift of the hue, in turns. Default: 0.1; 0.5 for shapes.")
    add("--grayscale", type=fraction, help="Probability that a view is gray. Default: 0.1.")
    add = p.add_argument_group("optimization").add_argument
    add("--encoder", choices=ENCODERS, help="Encoder f. Default: resnet18; convnet for shapes.")
    add("--precision", choices=["float32", "bfloat16"], help="What the encoder computes in; head and loss are float32. "
        "Default: bfloat16 where the device computes in it.")
    add("--epochs", type=number(int, 1, 10**6), help="Default: 100; 20 with a convnet, or 8 if on shapes.")
    add("--batch-size", type=number(int, 2, 2**20), help="Images in a step, two views each. Default: 512; convnet 256.")
    add("--lr", type=number(float, 0, 1e30), help="Peak learning rate at batch 256, scaled to others. Default: 0.06.")
    add("--momentum", type=number(float, 0, 0.9999), help="Momentum of SGD. Default: 0.9.")
    add("--weight-decay", type=factor, help="Weight decay of SGD. Default: 5e-4.")
    add("--warmup", type=fraction, help="Fraction of the steps in which the learning rate rises. Default: 0.05.")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0, 10**6), help="Of weights, order and views. Default: 0.")
    add("--device", help="What computes: cpu, cuda, mps ... Default: torch's accelerator, else cpu.")
    add("--out", type=path, metavar="RUN", help="Folder of the run. Default: runs/NAME, made of the flags.")
    return p


def parse_args(argv=None) -> argparse.Namespace:
    """The arguments, each with its default, in the order in which they depend on each other. UserError for a clash.

    Learning rate, momentum, decay, batch, temperature and augmentation are simclr-cifar10's for 100 epochs [code], but
    for shapes; the rest is ours [reading].
    """
    typed = {flag: value for flag, value in vars(parser().parse_args(argv)).items() if value is not None}
    args = argparse.Namespace()
    def default(flag, value, applies=True, why=""):     # as typed, else the default; None where it has no meaning
        refuse(flag in typed and not applies, f"--{flag.replace('_', '-')}: {why}")
        setattr(args, flag, typed.get(flag, value if applies else None))

    default("predictor", "none")
    predicts, trains = args.predictor != "none", args.predictor not in ("none", "identity")
    default("head", "mlp" if predicts else "parametric")
    sizes, weights = inspect.signature(HEADS[args.head]).parameters, issubclass(HEADS[args.head], projhead.MLP)
    default("depth", 2, "depth" in sizes, f"--head {args.head} has a fixed number of layers")
    deep = "depth" in sizes and args.depth > 1
    default("hidden", None, deep, f"--head {args.head} has no hidden layer")
    default("dim", 128 if weights else None, "d" in sizes, f"--head {args.head} has the encoder's width")
    default("head_lr", 1.0, weights, f"nothing to train in --head {args.head}")
    default("predictor_lr", 10.0 if args.predictor == "offdiag" else 1.0, trains, "no prediction head to train")
    default("predictor_schedule", "cosine", trains, "no prediction head to train")
    default("target", "stopgrad", predicts, "only a prediction has a target: add --predictor mlp")
    default("ema", 0.99, args.target == "ema", "needs --target ema")
    default("loss", "infonce" if not predicts else "bn" if args.predictor in ("identity", "offdiag") else "cosine")
    refuse(args.loss in ("cosine", "bn") and not predicts, f"--loss: {args.loss} needs a --predictor")
    default("tau", 0.5, args.loss == "infonce", f"the loss {args.loss} has no temperature")

    end = predicts and args.loss != "bn" and args.head != "reweight"
    default("head_bn", ("both" if end else "hidden") if deep else ("end" if end else "none"))
    hidden_bn, end_bn = args.head_bn in ("hidden", "both"), args.head_bn in ("end", "both")
    refuse(hidden_bn and not deep, f"--head-bn: {args.head_bn} follows a hidden layer, and there is none")
    refuse(end_bn and args.head == "reweight", f"--head-bn: {args.head_bn} would undo --head reweight")

    default("inner_steps", 2 if args.head == "parametric" else 0)
    refuse(args.inner_steps and not args.head_lr and not args.predictor_lr,
           "--inner-steps: there is no trainable head to fit: add --inner-steps 0")
    default("inner_batch", "same", args.inner_steps, "needs --inner-steps K")
    default("inner_start", "warm", args.inner_steps, "needs --inner-steps K")
    default("inner_gradient", "envelope", args.inner_steps, "needs --inner-steps K")
    unrolled = args.inner_gradient == "unrolled"
    refuse(unrolled and args.inner_batch == "other", "--inner-batch: no gradient passes through the other batch")

    default("sparsity", 0.1 if args.head == "sparse" else 0.0)
    refuse(args.sparsity and not args.head_lr, f"--sparsity: --head {args.head} has no weights that train")
    default("sparsity_norm", "l21", args.sparsity, "needs --sparsity LAMBDA or --head sparse")

    default("dataset", "shapes")
    shapes, size = args.dataset == "shapes", SIZES[args.dataset]
    default("data", data_path("data"), not shapes, "shapes are drawn, not read: name a --dataset")
    other_size = args.dataset != "folder" and typed.get("image_size", size) != size
    default("image_size", size, not other_size, f"{args.dataset} has images of {size} px")
    default("crop_scale", 0.5 if shapes else 0.2)
    default("hue", 0.5 if shapes else 0.1)
    default("encoder", "convnet" if shapes else "resnet18")
    small = args.encoder.startswith("convnet")
    default("epochs", (8 if shapes else 20) if small else 100)
    default("batch_size", 256 if small else 512)
    for flag, value in {"limit": None, "grayscale": 0.1, "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4,
                        "warmup": 0.05, "seed": 0, "device": default_device(), "precision": None}.items():
        default(flag, value)                            # start_run sets the precision, by the device or the checkpoint

    words = {flag: value for flag, value in ({"head": args.head} | typed).items() if flag not in ("seed", *PLACES)}
    args.called = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in words.items())
    data = f"folder-{os.path.basename(args.data)}" if args.dataset == "folder" else args.dataset
    others = [f"{flag.replace('_', '-')}{value}" for flag, value in words.items()
              if flag not in ("dataset", "encoder", "head")]
    name = "-".join([data, args.encoder, args.head, *others, f"seed{args.seed}"])
    refuse("out" not in typed and len(os.fsencode(name)) > 200, "--out: these flags make too long a name: give one")
    default("out", os.path.join("runs", name))
    return args


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def native_precision(device: torch.device) -> str:
    """bfloat16 where the device computes in it, not where it is emulated; else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bfloat16" if device.type == "cpu" and any(check() for check in checks if check) else "float32"


# ---------------------------------------------------------------------------- data

def load_dataset(name: str, root="data", train=True, size=64, limit: int | None = None):
    """(images uint8 (M, 3, S, S), labels int64 (M,), names of the classes); a label is -1 where unknown, and shapes has
    labels (M, 2): shape and hue. The training part of stl10 includes its unlabelled images. size: of a folder's images;
    limit: only the first so many. Raises UserError."""
    if name == "folder":
        return load_folder(Path(root), train, size, limit)
    if name == "shapes":
        images, labels = draw_shapes(10_000, seed=1) if train else draw_shapes(4_000, seed=2)
        return images[:limit], labels[:limit], SHAPES
    make = getattr(torchvision.datasets, name.upper())
    part = dict(split="train+unlabeled" if train else "test") if name == "stl10" else dict(train=train)
    root = Path(root).parent if Path(root).name == make.base_folder else Path(root)     # its own folder may be named
    try:
        data = make(root, download=not (root / make.base_folder).exists(), **part)      # and checks the files, once
    except Exception as e:                              # torchvision raises many kinds
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        raise UserError(f"no whole {make.base_folder} in {root}, no download ({why}): name its folder by --data") from e
    images, labels = torch.from_numpy(data.data), torch.tensor(data.labels if name == "stl10" else data.targets).long()
    images = images if name == "stl10" else images.permute(0, 3, 1, 2).contiguous()
    return images[:limit], labels[:limit], data.classes


TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")      # a folder's parts
IGNORED = ("@eaDir", "__MACOSX", "#recycle", "#snapshot", "lost+found")     # like names with a dot: thumbnails, copies
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP"]                     # those of torchvision's IMG_EXTENSIONS


def load_folder(root: Path, train: bool, size: int, limit: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """A part of a folder of images; `folder_parts` has the rules. What was found is said when it is to train on."""
    refuse(not root.is_dir(), f"no folder {root}: name one of images by --data, or use --dataset shapes")
    training, testing, classes, findings = folder_parts(root)
    for line in findings if train else ():
        note(line)
    files = (training if train else testing)[:limit]    # in the order of a hash, so of all classes
    refuse(not files, f"no images ({' '.join(IMG_EXTENSIONS)}) in {root} to {'train' if train else 'test'} on")
    refuse(len(files) < (limit or 0), f"there are {len(files)} training images, and {limit} are needed")
    images, readable = decoded([path for _, path, _ in files], size)
    refuse(not len(images), f"no image in {root} to {'train' if train else 'test'} on could be read")
    label = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([label.get(name, -1) for *_, name in files])
    if lost := [name for name in classes if label[name] in labels and label[name] not in labels[readable]]:
        note(f"warning: no image could be read of {listed(lost)}")
    return images, labels[readable], classes


def folder_parts(root: Path) -> tuple[list, list, list[str], list[str]]:
    """(training files, test files, names of the classes, what there is to say); a file is as in `scan`.

    Where root has a TRAIN and a TEST subfolder, in any case, these are the parts; of several TESTs it is the first with
    labelled images of the training classes. Otherwise all of root is the set, or its TRAIN where nothing else holds
    images; then a fifth of it is for testing. Classes are the set's subfolders that hold images.
    """
    below = [root / name for name in visible(os.listdir(root)) if (root / name).is_dir()]
    inside = {folder.name.lower(): folder for folder in below}
    base = next((inside[name] for name in TRAIN if name in inside), root)
    tests = [inside[name] for name in TEST if name in inside and base != root]
    if not tests and any(scan(folder)[0] for folder in below if folder != base):
        base = root                                     # a class may be called train
    training, others, folders = scan(base)
    classes = sorted({name for *_, name in training} - {""})
    for test in tests:
        testing, others_there, _ = scan(test)
        if {name for *_, name in testing} & set(classes):
            others += others_there
            break
    else:
        test, testing = None, [file for file in training if is_held_out(file[0])]
        training = [file for file in training if not is_held_out(file[0])]
    seen = {name for *_, name in testing}
    strange, unseen = sorted(seen - {"", *classes}), sorted(set(classes) - seen)
    beside = [folder.name for folder in below if base != root and folder not in (base, test, *(() if test else tests))]
    loose = sum(name == "" for *_, name in training)
    empty, like_parts = folders - set(classes), [c for c in classes if c.lower().startswith(("train", "test", "val"))]
    return training, testing, classes, [line for applies, line in (
        (True, f"folder {base}: {len(training):,} images of {len(classes)} classes to train on, {len(testing):,} of "
               f"{len(classes) - len(unseen)} classes to test on, "
               + (f"in {test}" if test else "a fifth, by a hash of their names")),
        (tests and not test, f"warning: no labelled images of these classes in {listed(t.name for t in tests)}"),
        (beside, f"left out, beside the parts: {listed(beside)}"),
        (loose and classes, f"warning: {loose:,} images to train on are in no class folder"),
        (others, f"left out, of no type that is read: {listed(f'{n:,} {kind}' for kind, n in others.items())}"),
        (empty, f"warning: no images in {listed(sorted(empty))}: not taken as classes"),
        (not classes, "warning: no classes, as no subfolder holds images: there will be no accuracies"),
        (len(classes) == 1, f"warning: one class, {listed(classes)}" + f": is {root} a level too high?" * (not test)),
        (strange, f"warning: in {test} are no classes of the training part, hence without a label: {listed(strange)}"),
        (unseen, f"warning: classes without a test image: {listed(unseen)}"),
        (not testing, "warning: no images to test on: a fifth of so few may be none"),
        (like_parts, f"warning: classes that are named like parts: {listed(like_parts)}")) if applies]


def scan(folder: Path) -> tuple[list[tuple[int, str, str]], collections.Counter, set[str]]:
    """The images in a folder and, at any depth, in its subfolders: (hash of the path below it, path, name of the
    subfolder or ""), in the order of the hashes; how many other files there are of each kind; the subfolders' names.
    Links are followed to files and to subfolders, but not to folders below those."""
    found, others = [], collections.Counter()
    def cannot(e):
        others[f"{e.filename} ({e.strerror})"] += 1
    names = [name for name in visible(os.listdir(folder)) if (folder / name).is_dir()]
    for name in ["", *names]:
        for at, below, files in os.walk(folder / name, onerror=cannot):
            below[:] = visible(below) if name else []
            for path in (Path(at, file) for file in visible(files)):
                if path.suffix.lower() in IMG_EXTENSIONS:
                    key = path.relative_to(folder).as_posix()           # the same on all systems
                    found.append((zlib.crc32(key.encode(errors="replace")), str(path), name))
                else:
                    others[path.suffix.lower() or "without an extension"] += 1
    return sorted(found), others, set(names)


def visible(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(".") and name not in IGNORED)


def is_held_out(name_hash: int) -> bool:
    """A fifth of the names: no image changes sides when others come or go. // 7 makes it independent of the order."""
    return name_hash // 7 % 5 == 0


def listed(names) -> str:
    names = list(names)
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def decoded(paths: list[str], size: int) -> tuple[Tensor, Tensor]:
    """(images uint8 (M, 3, size, size), which of the paths could be read: bool (len(paths),)). Both are read-only maps
    of a file that all processes share, so they may be larger than memory: writing to them ends the process.

    The file holds the images, then a byte for each path. Its name is a hash of what it was made of, and how; it may be
    deleted. Raises UserError where over 1 % and over 10 of the images cannot be read, or the file not be written.
    """
    stats = [os.stat(path) for path in paths if os.path.exists(path)]               # not a link to nothing
    changed = [(at.st_size, at.st_mtime_ns, at.st_ctime_ns) for at in stats]
    made_of = repr([inspect.getsource(read_image), size, paths, changed])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")       # some containers have no home
    refuse(home.startswith("~"), "no home folder for decoded images: name a folder for them by XDG_CACHE_HOME")
    file = Path(home, "projhead", f"{hashlib.sha256(made_of.encode(errors='replace')).hexdigest()[:32]}.images")
    if not mapped(file, len(paths), size):
        note(f"decoding {len(paths):,} images to {file}")
        readable, bad = bytearray(len(paths)), 0
        progress = Progress(len(paths), sys.stderr, "image")
        with (replacing(file, "; another folder can be named by XDG_CACHE_HOME") as new, warnings.catch_warnings(),
              concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count())) as pool):
            warnings.simplefilter("ignore")             # of Pillow, about what is odd in a file
            for start in range(0, len(paths), 1024):
                part = paths[start:start + 1024]
                for i, image in enumerate(pool.map(read_image, part, [size] * len(part)), start):
                    if isinstance(image, bytes):
                        new.write(image)
                        readable[i] = True
                        continue
                    note(f"left out {paths[i]}: {image}")
                    bad += 1
                    refuse(bad > max(10, 0.01 * len(paths)),
                           f"over 1 % of {len(paths)} images cannot be read, the last {paths[i]}: {image}")
                progress(start + len(part))
            new.write(readable)
    images, readable = mapped(file, len(paths), size)
    if len(images) < len(paths):
        note(f"left out {len(paths) - len(images)} of {len(paths):,} images in all, which cannot be read")
    return images, readable


def mapped(file: Path, count: int, size: int) -> tuple[Tensor, Tensor] | None:
    """What `decoded` returns, from its file; None where that is not there or not whole."""
    if not file.is_file() or file.stat().st_size < count:
        return None
    with open(file, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # torch's, that it cannot be written to
        whole = torch.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    pixels, readable = whole[:len(whole) - count], whole[len(whole) - count:].bool()
    shape = int(readable.sum()), 3, size, size
    return (pixels.view(shape), readable) if len(pixels) == math.prod(shape) else None


def read_image(path: str, size: int) -> bytes | str:
    """The pixels (3, size, size) of an image, resized and cropped to a square; or, in a line, why it cannot be read."""
    from PIL import Image, ImageOps                     # Pillow comes with torchvision
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                return f"pixels of mode {image.mode}: convert to 8 bits"
            image.draft("RGB", (2 * size, 2 * size))    # a JPEG is read at a fraction of its size, at least this one
            with contextlib.suppress(Exception):        # a tag that cannot be read costs the turn, not the image
                image = ImageOps.exif_transpose(image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return b"".join(band.tobytes() for band in image.split())
    except MemoryError:
        raise
    except Exception as e:                              # Pillow raises many kinds
        return f"{type(e).__name__}: {e}".split("\n")[0]


def training_images(args, device) -> Tensor:
    """The images of these arguments, on the device where they fit in half of its free memory. Raises UserError."""
    later = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if later:
        dist.barrier()                      # a machine's first process downloads or decodes, then the others read
    images, *_ = load_dataset(args.dataset, args.data, True, args.image_size, args.limit)   # the labels are not used
    if world_size() > 1 and not later:
        dist.barrier()
    wanted = 2 if args.dataset == "folder" else args.limit or 2         # load_folder knows what it could not read
    refuse(len(images) < wanted, f"there are {len(images)} training images, and {wanted} are needed")
    fits = device.type != "cuda" or images.numel() < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def two_views(images, args, step: int, per_epoch: int, N: int, device) -> tuple[Tensor, Tensor | None]:
    """(x, other) of a step, a function of (args.seed, step) alone: x (2N, 3, S, S) are two views of its N images, and
    other, with --inner-batch other, two views of N images drawn anew, else None."""
    epoch, i = divmod(step, per_epoch)
    g = generator(args.seed, step, 1)
    x = views(images, order_of(args.seed, epoch, len(images))[i * N:(i + 1) * N], g, args, device)
    if args.inner_batch != "other":
        return x, None
    return x, views(images, torch.randperm(len(images), generator=g)[:N], g, args, device)


def views(images, chosen: Tensor, g: torch.Generator, args, device) -> Tensor:
    """(2N, 3, S, S): the first views of the N chosen images, then the second. Each of several processes makes its part,
    with the random numbers of that part."""
    mine = to_device(chosen.chunk(world_size())[rank()], images.device)
    batch = to_device(images[mine], device)
    both = [augment(batch, g, args.crop_scale, args.hue, args.grayscale, rank(), world_size()) for _ in (1, 2)]
    return torch.cat(both).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1)
def order_of(seed: int, epoch: int, M: int) -> Tensor:
    return torch.randperm(M, generator=generator(seed, epoch, 0))


def generator(seed: int, step: int, which: int) -> torch.Generator:
    """Random numbers of their own for each (seed, step); `which` is 0 for an epoch's order, 1 for a step's batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + 2 * step + which) % 2**32)


def to_device(x: Tensor, device) -> Tensor:
    """x on the device; the copy does not make the host wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


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


def augment(images: Tensor, generator, crop_scale=0.2, hue=0.1, grayscale=0.1, rank=0, ranks=1) -> Tensor:
    """One random view per image in SimCLR's manner: uint8 (N, 3, S, S) -> normalized float32 (N, 3, S, S).

    Crop of crop_scale to 1 of the area, resized back; flip; with probability 0.8 brightness, contrast and saturation
    by a factor in 0.6 to 1.4 and a hue shift up to +-hue turns; gray with probability grayscale; these are
    simclr-cifar10's [code]. Above 64 px a Gaussian blur with probability 0.5 [reading]. Each is torchvision's own
    definition, in batch: every parameter is drawn per image, the order of the four colour operations once per call. The
    generator is a CPU's, so that views are the same on all devices.
    The images may be one rank's part of a batch: then its parameters are that part of the whole batch's.
    """
    N, S, device = len(images), images.shape[-1], images.device
    def uniform(low, high, *shape):
        drawn = torch.rand(*shape, N * ranks, generator=generator)
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
    order = torch.randperm(4, generator=generator).tolist()
    blurred, sigma = torch.zeros(N), torch.ones(N)
    if S > 64:
        blurred, sigma = (uniform(0, 1) < 0.5).float(), uniform(0.1, 2)
    drawn = torch.stack([top, height, left, width, flip, sigma, *factors, shift, gray, blurred])
    drawn = to_device(drawn, device)[..., None, None, None]                    # 12 x N x 1 x 1 x 1
    if device.type != "cpu":
        return view(images, drawn, order)
    parts = zip(images.split(64), drawn.split(64, dim=1))       # small parts stay in the CPU's cache: twice as fast
    threads = torch.get_num_threads()
    each = map if threads == 1 else view_threads(threads).map
    return torch.cat(list(each(lambda part: view(*part, order), parts)))


@functools.cache
def view_threads(count: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads with one thread of torch's each: they do not wait for each other in each operation, as torch's own do."""
    return concurrent.futures.ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


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
    """(N, out, size): cuts start .. start + length (N, 1, 1) from `size` pixels, and antialiased resizing to `out`."""
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
    k = h[:, None] + torch.arange(5, 0, -2, device=h.device)[:, None, None]
    k = k.remainder_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)              # in place: each new tensor costs a CPU
    return k.mul_(chroma[:, None]).neg_().add_(value[:, None])                  # page faults


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (N, 3, H, W) in [0, 1] by shift (N, 1, 1, 1) turns, value and saturation kept."""
    (r, g, b), value = x.unbind(1), x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    h = torch.where(value == r, (g - b) / divisor,
                    torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor))
    return hsv_to_rgb(h + 6 * shift[:, 0], chroma, value)


# ---------------------------------------------------------------------------- models and optimizers

# target: BYOL's slow copy, Sequential(f, g), or None; start: a copy of ModuleList([g, q]) before the first step
Model = collections.namedtuple("Model", "f g q target start")


def build(args, device="cpu") -> Model:
    """The untrained networks of these arguments, a function of args.seed. UserError for a width that cannot be."""
    torch.manual_seed(args.seed)
    f = projhead.encoder(args.encoder, args.image_size)
    sizes = {"d": args.dim, "hidden": args.hidden, "depth": args.depth,
             "bn": args.head_bn in ("hidden", "both") if args.depth else None}
    try:
        g = HEADS[args.head](f.dim, **{size: value for size, value in sizes.items() if value is not None})
    except ValueError as e:
        raise UserError(f"--dim {args.dim}: {e}") from None
    d = g.eval()(torch.zeros(1, f.dim)).shape[1]                # of z; some heads choose it
    if args.head_bn in ("end", "both"):
        g = nn.Sequential(g, nn.BatchNorm1d(d, affine=False))
    q = nn.Identity() if args.predictor == "none" else PREDICTORS[args.predictor](d)
    f, g, q = (projhead.synchronized(module.to(device)).train() for module in (f, g, q))
    f = f.to(memory_format=torch.channels_last)
    target = copy.deepcopy(nn.Sequential(f, g)).requires_grad_(False) if args.target == "ema" else None
    return Model(f, g, q, target, copy.deepcopy(nn.ModuleList([g, q])).requires_grad_(False))


def optimizers(model: Model, args) -> list[torch.optim.SGD]:
    """SGD on theta and on phi, apart so that either can move alone. `train` sets a group's learning rate: `scale` times
    the schedule's, or times its peak where `constant`."""
    f = {"params": list(model.f.parameters()), "scale": 1.0, "constant": False}
    g = {"params": list(model.g.parameters()), "scale": args.head_lr or 0.0, "constant": False}
    q = {"params": list(model.q.parameters()), "scale": args.predictor_lr or 0.0,
         "constant": args.predictor_schedule == "constant"}
    if args.predictor == "offdiag":
        q["weight_decay"] = 0.0                                 # decay alone would bring the head back to the identity
    fused = next(model.f.parameters()).is_cuda
    both = [torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay, fused=fused)
            for groups in ([f], [g, q])]
    for optimizer in both if world_size() > 1 else ():
        optimizer.register_step_pre_hook(average_gradients)
    return both


@torch.no_grad()
def update_target(model: Model, momentum: float) -> None:
    """BYOL's moving average of the parameters; BatchNorm's buffers are the copy's own, which is in train mode too."""
    for p, fast in zip(model.target.parameters(), nn.Sequential(model.f, model.g).parameters()):
        p.lerp_(fast, 1 - momentum)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear over the first warmup * total steps, then a half cosine down to zero."""
    rising = warmup * total
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


# ---------------------------------------------------------------------------- a run's files

def start_run(args, images: Tensor, model: Model, theta, phi, per_epoch: int, device) -> argparse.Namespace:
    """A run that is continued from its checkpoint, or a new one, saved at once. Raises UserError.

    .parts: what has a state dict, by its name in a checkpoint; .images: their number and checksum; .log: the lines of
    metrics.jsonl; .losses: [loss, inner loss] of the steps that were not looked at yet, .seen: of those that were.
    """
    parts = {"encoder": model.f, "head": model.g, "predictor": model.q, "theta": theta, "phi": phi}
    parts |= {"target": model.target} if model.target else {}
    run = argparse.Namespace(
        args=args, parts=parts, images=[len(images), zlib.crc32(images.cpu().numpy())], per_epoch=per_epoch, step=0,
        total=args.epochs * per_epoch, losses=[], seen=[], shown="", saved=time.perf_counter())
    file, log = Path(args.out, "checkpoint.pt"), Path(args.out, "metrics.jsonl")
    found = [read_checkpoint(file) if rank() == 0 and file.exists() else None]
    refuse(rank() == 0 and log.exists() and not found[0],
           f"--out {args.out} holds a metrics.jsonl without a checkpoint: choose another")
    if world_size() > 1:
        dist.broadcast_object_list(found)                       # the machines need not share a disk
    old = found[0]
    if args.precision is None:                                  # a run that moves to another device keeps its own
        args.precision = old["args"].get("precision") if old else native_precision(device)
    if old:
        refuse_another(run, old)
        with checkpoint_errors(file):
            for name, part in parts.items():
                part.load_state_dict(old[name])
            run.step = int(old["step"])
    else:
        save(run, 0)
    run.log = [json.dumps({
        "command": command(), "args": vars(args), "images": len(images), "python": sys.version.split()[0],
        "torch": torch.__version__, "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
        "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)})]
    if log.exists():
        run.log = log.read_text(errors="replace").splitlines()[:1 + run.step // per_epoch] or run.log
    say(f"{args.out}: {len(images)} images of {args.image_size} px, {args.encoder} in {args.precision} on {device}, "
        f"step {run.step} of {run.total}" + f", {world_size()} processes" * (world_size() > 1))
    if per_epoch < 10:
        N = min(args.batch_size, len(images))
        note(f"warning: only {per_epoch} step(s) an epoch, of {N} images: a smaller --batch-size makes more")
    run.epoch_began = time.perf_counter()
    return run


def refuse_another(run, old: dict) -> None:
    """UserError where the checkpoint is of another run; where only drawings differ in a bit, as they do between CPUs of
    other instructions, a warning."""
    there, here = old["args"] | {"images": old["images"]}, vars(run.args) | {"images": run.images}
    if run.args.dataset == "shapes" and there["images"] != run.images and there["images"][0] == run.images[0]:
        note("warning: the shapes were drawn in other bits there: this run is not the same to the last bit")
        there["images"] = run.images
    differ = [f"{flag.replace('_', '-')} {there.get(flag)} there, {value} here" for flag, value in here.items()
              if flag not in PLACES and there.get(flag) != value]
    refuse(differ, f"--out {run.args.out} holds another run: {'; '.join(differ)}: choose another")


def read_checkpoint(file: Path) -> dict:
    """What a checkpoint holds; reading it runs no code. Raises UserError, and OSError where it may not be read."""
    with checkpoint_errors(file):
        content = file.read_bytes()
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        checkpoint["args"].items(), checkpoint["images"][1], int(checkpoint["step"])        # ours has these
        return checkpoint | {"crc": zlib.crc32(content)}


@contextlib.contextmanager
def checkpoint_errors(file: Path):
    """UserError for what fails inside by the content of the file, or for want of memory. An OSError is passed on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # of torch, about old kinds of files
            yield
    except Exception as e:                                      # of pickle, zipfile, torch
        if isinstance(e, (UserError, OSError)):
            raise
        if out_of_memory(e):
            raise UserError(f"out of memory: {file} could not be read") from None
        raise UserError(f"{file} is damaged, or not a checkpoint of ours ({type(e).__name__})") from None


@contextlib.contextmanager
def replacing(path: Path, hint: str = ""):
    """A new file beside `path` that takes its name at the end, synced to disk; after an error `path` is as it was.
    Raises UserError where it cannot be written, as on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        kept = "; what it held before is as it was" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {e.strerror or e}{kept}{hint}") from None
    finally:
        with contextlib.suppress(OSError):                      # it is there only after an error
            temporary.unlink()


def save(run, step: int) -> None:
    """Write the checkpoint. Raises UserError where a weight is not finite: what was saved before stays."""
    if rank():                                                  # all processes have the same weights
        return
    states = {name: part.state_dict() for name, part in run.parts.items()}
    if not all(t.isfinite().all() for name in states.keys() - {"theta", "phi"} for t in states[name].values()):
        raise diverged("a weight or a BatchNorm's statistic is not finite", step, run.args)
    buffer = io.BytesIO()
    torch.save({"args": vars(run.args), "step": step, "images": run.images, **states}, buffer)
    with replacing(Path(run.args.out, "checkpoint.pt")) as file:
        file.write(buffer.getbuffer())
    run.saved = time.perf_counter()


def end_step(run, done: int, h: Tensor, stopping: bool) -> None:
    """After `done` steps look at the losses, end the epoch and save, each where it is due. Raises UserError for a loss
    that is not finite."""
    ended = done % run.per_epoch == 0
    if ended or stopping or h.device.type == "cpu" or len(run.losses) == 100:
        values = torch.stack(run.losses).cpu()                  # this waits for a GPU
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        for i, loss in enumerate(values[:, 0].tolist(), done + 1 - len(values)):
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss}", i, run.args)
        run.seen.append(values)
        run.losses, run.shown = [], f"loss {values[-1, 0]:.2f}"
    if ended:
        end_epoch(run, done, h)
    due = 30 if ended else 300                                  # seconds after the last checkpoint
    if stopping or done == run.total or time.perf_counter() - run.saved > due:
        save(run, done)


def diverged(what: str, step: int, args) -> UserError:
    return UserError(f"{what} in step {step}: try a smaller --lr than {args.lr}"
                     f"{' or --sparsity' * bool(args.sparsity)}; {args.out} keeps what was saved before")


def end_epoch(run, step: int, h: Tensor) -> None:
    """Add a line to metrics.jsonl and print it. The keys, of which each run has those that it has a use for:

    epoch, step       counted from 1
    loss, inner_loss  means over the epoch's steps since the run was started here: of the objective, and of where the
                      last inner step started from
    lr                the encoder's learning rate in the last step
    rank_h, rank_z    effective rank (RankMe) of the last batch's h and z, both views, 1 to their width
    spread_h, spread_z  their spread on the sphere: 0 where all are one, the collapse; at most 1
    offdiag           Frobenius norm of E, the off-diagonal entries of --predictor offdiag
    penalty, pruned   R(W) of the head's first layer, without lambda; the fraction of its input features with no weight
    seconds           of the epoch's steps since the run was started here, with checkpoints, without this line
    views_per_s       the views of those steps, two of each image, over these seconds
    memory            the most that tensors took on a GPU so far, in GiB

    The first line has the command, args (with their defaults), images (their number), python, torch and torchvision
    (versions), threads, processes, device.
    """
    args, g, q, values = run.args, run.parts["head"], run.parts["predictor"], torch.cat(run.seen)
    seconds = time.perf_counter() - run.epoch_began
    with torch.no_grad():
        z = g.eval()(h)
        g.train()
    h, z = projhead.gather(h), projhead.gather(z)
    if not (h.isfinite().all() and z.isfinite().all()):
        raise diverged("h or z is not finite", step, args)
    loss, inner = values.mean(dim=0).tolist()
    line = {"epoch": step // run.per_epoch, "step": step, "loss": loss,
            "lr": run.parts["theta"].param_groups[0]["lr"],
            "rank_h": projhead.effective_rank(h), "rank_z": projhead.effective_rank(z),
            "spread_h": projhead.spread(h), "spread_z": projhead.spread(z),
            "seconds": seconds, "views_per_s": len(h) * len(values) / seconds,
            "inner_loss": inner if args.inner_steps else None,
            "offdiag": q.E.norm().item() if args.predictor == "offdiag" else None,
            "penalty": sparsity(g, args.sparsity_norm).item() if args.sparsity else None,
            "pruned": projhead.fraction_pruned(g, h) if args.sparsity else None,
            "memory": torch.cuda.max_memory_allocated(h.device) / 2**30 if h.is_cuda else None}
    line = {key: round(value, 6) for key, value in line.items() if value is not None}
    run.log.append(json.dumps(line))
    if rank() == 0:
        with replacing(Path(args.out, "metrics.jsonl")) as file:
            file.write("".join(text + "\n" for text in run.log).encode())
    shown = {key: line[key] for key in ("loss", "rank_h", "rank_z", "offdiag", "pruned", "views_per_s") if key in line}
    say(f"epoch {line['epoch']}/{args.epochs}  " + "  ".join(f"{key} {value:.5g}" for key, value in shown.items()))
    if line["spread_z"] < 0.01:
        note(f"warning: z has collapsed, its spread is {line['spread_z']:.4f} of at most 1: all images look the same")
    run.seen, run.epoch_began = [], time.perf_counter()


def command() -> str:
    each = os.environ.get("LOCAL_WORLD_SIZE", "N")
    return shlex.join((["torchrun", "--nproc-per-node", each] if world_size() > 1 else ["python"]) + sys.argv)


# ---------------------------------------------------------------------------- several processes, signals, the terminal

def join(args) -> torch.device:
    """This process's device; under torchrun it joins the others, by nccl on GPUs and gloo on CPUs. Raises UserError."""
    torchrun = {"MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()         # it sets them all
    several = torchrun and int(os.environ["WORLD_SIZE"] or 1) > 1
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if several and args.device == "cuda" else args.device
    device = usable(gpu)
    if several and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        print(f"process {os.environ['RANK']} waits for {os.environ['WORLD_SIZE']} processes at "
              f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}", file=sys.stderr, flush=True)
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))   # one may decode, the others wait
        except (RuntimeError, ValueError) as e:
            raise UserError(f"process {os.environ['RANK']} cannot join the others: {e}".splitlines()[0]) from None
    return device


def usable(device: str) -> torch.device:
    """The device of that name. Raises UserError where there is none."""
    try:
        x = torch.zeros(1, device=device)
        x.item()                                                # the device "meta" holds no values
        return x.device
    except Exception as e:
        raise UserError(f"--device {device}: {e}".splitlines()[0]) from None


def average_gradients(optimizer, *_) -> None:
    """Before each step of an optimizer: its gradients become their means over the processes, in one message."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:
        mean = torch.cat([g.flatten() for g in gradients]) / world_size()
        dist.all_reduce(mean)
        for g, new in zip(gradients, mean.split([g.numel() for g in gradients])):
            g.copy_(new.view_as(g))


@contextlib.contextmanager
def stop_signal():
    """A list that will hold the first SIGINT or SIGTERM; a second one ends the process. Only in a single process, whose
    main thread this is."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    def first(number, _):
        caught.append(number)
        os.write(2, b"\nfinishing the step, then saving (again: stop at once)\n")
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
    own = world_size() == 1 and threading.current_thread() is threading.main_thread()
    before = [signal.signal(number, first) for number in numbers] if own else []
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler or signal.SIG_DFL)


def say(text: str, file=None, end: str = "\n") -> None:
    """Print by the first process; on a terminal over what Progress has left there."""
    if rank() == 0:
        file = file or sys.stdout
        print(text.ljust(79) if file.isatty() else text, file=file, end=end, flush=True)


def note(text: str) -> None:
    say(text, sys.stderr)


class Progress:
    """Says how far a loop is: on a terminal a line that is redrawn once a second, in a log a line a minute, the first
    after ten seconds."""

    def __init__(self, total: int, file=None, what: str = "step", done: int = 0):
        self.total, self.file, self.what, self.first = total, file or sys.stdout, what, done
        self.began = self.said = time.perf_counter()
        self.terminal = self.file.isatty()
        self.due = 1 if self.terminal else 10

    def __call__(self, done: int, text: str = "") -> None:
        now = time.perf_counter()
        if now - self.said < self.due or done == self.total:
            return
        minutes = (now - self.began) / (done - self.first) * (self.total - done) / 60
        words = f"{self.what} {done:,}/{self.total:,}", text, f"{math.ceil(minutes)} min left"
        say("  ".join(filter(None, words)), self.file, end="\r" if self.terminal else "\n")
        self.said, self.due = now, 1 if self.terminal else 60


def out_of_memory(e: BaseException) -> bool:
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(e)


def main(run, hint: str = "") -> None:
    """Run a script's main function; what the user can mend is one line on stderr and exit code 2."""
    try:
        run()
    except KeyboardInterrupt:                                   # before the first step, in eval.py, under torchrun
        sys.exit(130)
    except BrokenPipeError:                                     # eval.py ... | head
        os._exit(1)
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        lost = world_size() > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e))     # another one said why
        if out_of_memory(e):
            print(f"error: out of memory{hint}", file=sys.stderr)
        elif isinstance(e, RuntimeError) and not lost:
            raise
        elif not lost:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(lambda: train(parse_args()), ": try a smaller --batch-size")
