# SPDX-License-Identifier: MIT
"""Train an encoder through a head, without labels.

    python train.py                                          # the demonstration: drawn shapes, a small encoder, a CPU
    python train.py --head parametric --dataset cifar10      # ResNet-18 on CIFAR-10: wants a GPU
    python train.py --head sparse --dataset cifar10 --encoder convnet --epochs 10        # minutes on a CPU
    python train.py --predictor offdiag --dataset cifar10    # Wen & Li's prediction head, a non-contrastive loss
    python train.py --predictor mlp --target ema --dataset cifar10       # in BYOL's style; --target stopgrad: SimSiam's
    torchrun --nproc-per-node 8 train.py --dataset cifar10   # many GPUs: the same run up to rounding

A run is a folder, runs/NAME: checkpoint.pt and metrics.jsonl, whose keys README.md explains. The same command
continues an interrupted run. Then: python eval.py.
"""
import os
if "OMP_WAIT_POLICY" not in os.environ:             # a waiting thread of torch's keeps its core, unless this is set
    os.environ.setdefault("GOMP_SPINCOUNT", "1000") # before torch is imported

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
import shlex
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

import projhead
from projhead import ENCODERS, HEADS, LOSSES, NORMS, PREDICTORS, fit_head, sparsity, unroll_head

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = (  # torchrun sets these, and MASTER_ADDR
    int(os.environ.get(name, default)) if "MASTER_ADDR" in os.environ else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------- the method

def objective(h: Tensor, t: Tensor | None, model, args) -> Tensor:
    """L(theta, phi) of h (2N, D), the first views of N images, then the second; t (2N, d): a slow copy's z, or None."""
    z = model.g(h)                                      # 2N x d
    loss_fn = LOSSES[args.loss] if args.tau is None else functools.partial(LOSSES[args.loss], tau=args.tau)
    if args.predictor == "none":
        z1, z2 = z.chunk(2)
        loss = loss_fn(z1, z2)                          # InfoNCE, Barlow Twins
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

    model is Model(f, g, q, target, start) of `build`; theta and phi are the optimizers of f's parameters, and of those
    of g and q. `train` sets their learning rates. Both views pass in one batch, so every BatchNorm sees both [reading].
    other is a batch like x, which the inner steps of --inner-batch other see.
    """
    h = encode(model.f, x, args)                        # 2N x D, once; heads and losses run in float32
    t, inner = target_z(model, x, args), None           # 2N x d, with --target ema
    start = model.start if args.inner_start == "reset" else None
    theta.zero_grad(), phi.zero_grad()
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
    if N % WORLD_SIZE:
        raise everywhere(UserError(f"--batch-size {N} does not divide evenly over {WORLD_SIZE} processes"))
    per_epoch = len(images) // N                        # the last short batch is left out, another one each epoch
    model = build(args, device)
    theta, phi = optimizers(model, args)
    parts = {"encoder": model.f, "head": model.g, "predictor": model.q, "theta": theta, "phi": phi}
    parts |= {"target": model.target} if model.target else {}
    run = start_run(args, images, parts, per_epoch, device)
    peak, steps = args.lr * N / 256, range(run.step, run.total)
    with signals() as caught:
        for step, (x, other) in zip(steps, two_views(images, args, steps, per_epoch, N, device)):
            lr = learning_rate(step, run.total, peak, args.warmup)
            for group in theta.param_groups + phi.param_groups:
                group["lr"] = group["scale"] * (peak if group["constant"] else lr)
            h, loss, inner = train_step(x, model, theta, phi, args, other)
            if model.target:                            # from --ema at the start to 1 at the end
                update_target(model, 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / run.total)) / 2)
            run.losses.append(torch.stack([loss, loss if inner is None else inner]))
            done, stopped = step + 1, first_signal(caught)
            ended = done % per_epoch == 0
            if ended:
                end_epoch(run, done, lr, h, model)
            elif stopped or len(run.losses) % 100 == 0:         # this makes the host wait for a GPU
                check_losses(run, done)
            due = 30 if ended else 300                          # seconds after the last checkpoint
            if stopped or done == run.total or time.perf_counter() - run.saved > due:
                save(run, done)
            if stopped and done < run.total:
                note(f"stopped after step {done} of {run.total}; this continues: {command()}")
                raise SystemExit(128 + stopped)
            tell(run, done)
    say(f"finished. Look at it: python eval.py {shlex.quote(args.out)}")


# ---------------------------------------------------------------------------- flags

SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "folder": 64}      # of the images, in pixels
PLACES = ("data", "out", "device")          # where a run lies and computes: not what it is


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
    parse.__name__ = kind.__name__                      # for argparse's message
    return parse


def parser() -> Parser:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, fraction, factor, width = p.add_argument, number(float, 0, 1), number(float, 0, 1e6), number(int, 1, 2**14)
    add("--head", choices=HEADS, help="projection head (default: parametric; with a prediction head mlp)")
    add("--depth", type=number(int, 1, 16), help="linear layers of an mlp, parametric or sparse head (default: 2)")
    add("--dim", type=width, help="width of z (default: 128; --head slice: 360/2048 of h)")
    add("--hidden", type=width, help="hidden width of the head (default: twice that of h)")
    add("--head-bn", choices=["none", "hidden", "end", "both"], help="BatchNorm behind each hidden layer of g, without "
        "affine at its end, or both (default: hidden, or none without hidden layer; with a prediction head both or end, "
        "unless --loss bn)")
    add("--head-lr", type=factor, help="the head's learning rate, times the encoder's; 0: frozen (default: 1)")
    add("--inner-steps", type=number(int, 0), metavar="K",
        help="steps on the heads before each encoder step; 0: joint training (default: 0; --head parametric: 2)")
    add("--inner-batch", choices=["same", "other"], help="of the step's images or of others (default: same)")
    add("--inner-start", choices=["warm", "reset"], help="at the last heads or at the run's first (default: warm)")
    add("--inner-gradient", choices=["envelope", "unrolled"],
        help="the encoder's: at the fitted heads, or through K plain steps (default: envelope)")
    add("--sparsity", type=number(float, 0, 1e30), metavar="LAMBDA", help="(default: 0: off; --head sparse: 0.1)")
    add("--sparsity-norm", choices=NORMS, help="its norm; the functions are in projhead.py (default: l21)")
    add("--predictor", choices=["none", *PREDICTORS], default="none", help="none: a loss between z's (default: none)")
    add("--predictor-lr", type=factor, help="its learning rate, times the encoder's (default: 1; offdiag: 10)")
    add("--predictor-schedule", choices=["cosine", "constant"], help="constant is SimSiam's (default: cosine)")
    add("--target", choices=["stopgrad", "ema"], help="p's target: SimSiam's or BYOL's (default: stopgrad)")
    add("--ema", type=fraction, help="the slow copy's momentum at the start; it ends at 1 (default: 0.99)")
    add("--loss", choices=LOSSES, help="(default: infonce; --predictor identity, offdiag: bn; with another: cosine)")
    add("--tau", type=number(float, 1e-3), help="temperature of infonce (default: 0.5)")
    add("--encoder", choices=ENCODERS, help="(default: resnet18; shapes: convnet)")
    add("--precision", choices=["float32", "bfloat16"], help="of the encoder (default: what the device computes in)")
    add("--dataset", choices=SIZES, default="shapes", help="(default: shapes, which are drawn; folder: see --data)")
    add("--data", metavar="DIR", help="where the data set lies (default: data). folder: DIR/train and DIR/test "
        "or DIR/val, else DIR, a fifth of which is for testing; subfolders are classes")
    add("--limit", type=number(int, 2), metavar="N", help="only the first N training images (default: all)")
    add("--image-size", type=number(int, 8, 512), help="to which a folder's images are cropped (default: 64)")
    add("--crop-scale", type=number(float, 0.01, 1), help="smallest area of a crop (default: 0.2; shapes: 0.5)")
    add("--hue", type=number(float, 0, 0.5), help="largest shift of the hue, in turns (default: 0.1; shapes: 0.5)")
    add("--grayscale", type=fraction, default=0.1, help="probability of a gray view (default: 0.1)")
    add("--epochs", type=number(int, 1, 10**6), help="(default: 100; a convnet 20; shapes with a convnet 8)")
    add("--batch-size", type=number(int, 2, 2**20), help="images, two views each (default: 512; a convnet 256)")
    add("--lr", type=number(float, 0, 1e30), default=0.06, help="peak for 256 images a step (default: 0.06)")
    add("--momentum", type=number(float, 0, 0.9999), default=0.9, help="(default: 0.9)")
    add("--weight-decay", type=factor, default=5e-4, help="(default: 5e-4)")
    add("--warmup", type=fraction, default=0.05, help="fraction of steps with a rising learning rate (default: 0.05)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="(default: 0)")
    add("--device", help="(default: torch's accelerator where there is one, else cpu)")
    add("--out", metavar="RUN", help="the run's folder (default: runs/NAME, made of the flags)")
    return p


def dependent(args):
    """Flags that depend on others: (flag, default, whether it has a meaning here, why not). `parse_args` sets each
    before it asks for the next, which may depend on it.

    Learning rate, momentum, decay, batch, temperature and augmentation are simclr-cifar10's for 100 epochs [code], but
    for shapes; the rest is ours [reading].
    """
    predicts, shapes = args.predictor != "none", args.dataset == "shapes"
    yield "head", "mlp" if predicts else "parametric", True, ""
    yield "encoder", "convnet" if shapes else "resnet18", True, ""
    sizes = inspect.signature(HEADS[args.head]).parameters
    head = list(HEADS[args.head](8).parameters())               # empty where there is nothing to train
    predictor = list(PREDICTORS[args.predictor](8).parameters()) if predicts else []
    small = args.encoder.startswith("convnet")
    default = "infonce" if not predicts else "bn" if args.predictor in ("identity", "offdiag") else "cosine"
    yield "loss", default, predicts or args.loss not in ("cosine", "bn"), f"{args.loss} needs a --predictor"
    yield "target", "stopgrad", predicts, "only a prediction has a target: add --predictor mlp"
    yield "ema", 0.99, args.target == "ema", "needs --target ema"
    yield "tau", 0.5, args.loss == "infonce", f"the loss {args.loss} has no temperature"
    yield "head_lr", 1.0, head, f"nothing to train in --head {args.head}"
    nothing = f"nothing to train in --predictor {args.predictor}"
    yield "predictor_lr", 10.0 if args.predictor == "offdiag" else 1.0, predictor, nothing
    yield "predictor_schedule", "cosine", predictor, nothing
    yield "inner_steps", 2 if args.head == "parametric" else 0, True, ""
    yield "inner_batch", "same", args.inner_steps, "needs --inner-steps K"
    yield "inner_start", "warm", args.inner_steps, "needs --inner-steps K"
    yield "inner_gradient", "envelope", args.inner_steps, "needs --inner-steps K"
    yield "sparsity", 0.1 if args.head == "sparse" else 0.0, True, ""
    yield "sparsity_norm", "l21", args.sparsity, "needs --sparsity LAMBDA or --head sparse"
    yield "dim", 128 if head else None, "d" in sizes, f"--head {args.head} has the encoder's width"
    yield "depth", 2, "depth" in sizes, f"--head {args.head} has a fixed number of layers"
    deep, end = "bn" in sizes and args.depth > 1, predicts and args.loss != "bn" and args.head != "reweight"
    yield "head_bn", [["none", "end"], ["hidden", "both"]][deep][end], True, ""     # lightly's, SimSiam's [reading]
    yield "hidden", None, "hidden" in sizes and args.depth != 1, f"--head {args.head} has no hidden layer"
    yield "data", "data", not shapes, "shapes are drawn, not read: name a --dataset"
    size = SIZES[args.dataset]
    own = args.dataset != "folder" and args.image_size not in (None, size)
    yield "image_size", size, not own, f"{args.dataset} has images of {size} px"
    yield "epochs", (8 if shapes else 20) if small else 100, True, ""
    yield "batch_size", 256 if small else 512, True, ""
    yield "crop_scale", 0.5 if shapes else 0.2, True, ""
    yield "hue", 0.5 if shapes else 0.1, True, ""


def parse_args(argv=None) -> argparse.Namespace:
    """The arguments, with their defaults. Raises UserError where they clash."""
    args = parser().parse_args(argv)
    for flag, default, applies, why in dependent(args):
        if getattr(args, flag) is None:
            setattr(args, flag, default if applies else None)
        elif not applies:
            raise UserError(f"--{flag.replace('_', '-')}: {why}")
    unrolled = args.inner_gradient == "unrolled"
    for clash, why in (
            (args.inner_steps and not args.head_lr and not args.predictor_lr,
             "--inner-steps: there is no trainable head to fit: add --inner-steps 0"),
            (unrolled and args.inner_batch == "other", "--inner-batch: no gradient passes through the other batch"),
            (unrolled and WORLD_SIZE > 1, "--inner-gradient: unrolled runs in one process only"),
            (args.sparsity and not args.head_lr, f"--sparsity: --head {args.head} has no weights that train")):
        if clash:
            raise UserError(why)
    bn, deep = args.head_bn, "bn" in inspect.signature(HEADS[args.head]).parameters and args.depth > 1
    for clash, why in (
            (bn in ("hidden", "both") and not deep, f"--head-bn: {bn} is behind a hidden layer, and there is none"),
            (bn == "end" and args.head == "reweight", "--head-bn: end would undo --head reweight"),
            (args.sparsity_norm == "l21-out" and bn in (("hidden", "both") if deep else ("end",)),
             "--sparsity-norm: l21-out is constant where a BatchNorm follows: add --head-bn none")):
        if clash:
            raise UserError(why)
    args.data = args.data and os.path.abspath(args.data)        # so that a run finds its images from anywhere
    args.device = args.device or default_device()
    args.out = args.out or os.path.join("runs", name_of(args))
    return args


def flags(args) -> list[str]:
    """The flags, "--name value" each, that make these arguments: those that differ from their defaults."""
    usual = vars(parser().parse_args([])) | {flag: default for flag, default, applies, _ in dependent(args) if applies}
    return [f"--{flag.replace('_', '-')} {value}" for flag, value in vars(args).items()
            if flag not in PLACES and value != usual[flag]]


def name_of(args) -> str:
    """NAME of runs/NAME: what is trained on what, the other flags that differ from their defaults, the seed."""
    data = f"folder-{os.path.basename(args.data)}" if args.dataset == "folder" else args.dataset
    first = [data, args.encoder, args.head, *([args.predictor] if args.predictor != "none" else [])]
    others = [words.strip("-").replace(" ", "") for words in flags(args)
              if words.split()[0] not in ("--dataset", "--encoder", "--head", "--predictor", "--seed")]
    return "-".join([*first, *others, f"seed{args.seed}"])


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def native_precision(device: torch.device) -> str:
    """bfloat16 where the device computes in it, not where it is emulated; else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bfloat16" if device.type == "cpu" and any(check() for check in checks if check) else "float32"


# ---------------------------------------------------------------------------- data

def load_dataset(name: str, root="data", train=True, size=64, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(images uint8 (M, 3, S, S), labels int64 (M,)), a label -1 where unknown; shapes has (M, 2): shape and hue. The
    training part of stl10 includes its unlabelled images. limit: only the first so many. Raises UserError."""
    return read_dataset(name, root, train, size, limit)[:2]


def read_dataset(name, root, train, size=64, limit=None) -> tuple[Tensor, Tensor, list[str]]:
    """load_dataset, and the names of the classes."""
    if name == "folder":
        return load_folder(Path(root), train, size, limit)
    if name == "shapes":
        images, labels = draw_shapes(10_000, seed=1) if train else draw_shapes(4_000, seed=2)
        return images[:limit], labels[:limit], SHAPES
    make, folder = {"cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
                    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python"),
                    "stl10": (torchvision.datasets.STL10, "stl10_binary")}[name]
    part = dict(split="train+unlabeled" if train else "test") if name == "stl10" else dict(train=train)
    there = (Path(root) / folder).exists()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            data = make(root, download=not there, **part)
    except Exception as e:                              # torchvision raises many kinds
        why = f"({type(e).__name__}: {e})".split("\n")[0]
        raise UserError(f"{root}/{folder} is incomplete or corrupt {why}: remove it to download again" if there else
                        f"no {folder} in {root}, and no download {why}: name its folder by --data") from None
    images, labels = torch.from_numpy(data.data), torch.tensor(data.labels if name == "stl10" else data.targets).long()
    images = images if name == "stl10" else images.permute(0, 3, 1, 2).contiguous()
    return images[:limit], labels[:limit], data.classes


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "projhead"
PIXELS = 50_000_000                 # a picture of more is not read
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP"]         # those of torchvision's IMG_EXTENSIONS


def load_folder(root: Path, train: bool, size: int, limit: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """A part of a folder of images: root/train, and root/test or root/val, in any case; without these all of root, of
    which a fifth, chosen by name, is for testing. Classes are the training part's subfolders. What cannot be read is
    named and left out; UserError where that is over 1 % of the part."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: name one of images by --data, or use --dataset shapes")
    parts = {d.name.lower(): d for d in root.iterdir() if d.is_dir()}
    train_base = parts.get("train", root)
    test = [parts[name] for name in ("test", "val", "valid", "validation") if name in parts and "train" in parts]
    base = train_base if train or not test else test[0]
    classes = sorted(d.name for d in train_base.iterdir() if d.is_dir())
    label = {d.name: classes.index(d.name) if d.name in classes else -1 for d in base.iterdir() if d.is_dir()}
    found = make_dataset(str(base), label, IMG_EXTENSIONS, allow_empty=True) if label else []      # [(path, label)]
    found += [(str(f), -1) for f in base.iterdir() if f.name.lower().endswith(IMG_EXTENSIONS)]
    found = sorted((zlib.crc32(os.path.relpath(path, base).encode(errors="replace")), path, i) for path, i in found)
    if not test:                                        # by name: no image changes sides when others come or go
        found = [(crc, path, i) for crc, path, i in found if (crc // 7 % 5 == 0) != train]
    if not found:
        raise UserError(f"no images ({' '.join(IMG_EXTENSIONS)}) in {base} to {'train' if train else 'test'} on")
    found = found[:limit]                               # in the order of a hash, so of all classes
    note(f"folder {base}: {len(found):,} images to {'train' if train else 'test'} on, {len(classes)} classes")
    images, readable = decoded([path for _, path, _ in found], size)
    return images, torch.tensor([i for *_, i in found])[readable], classes


def decoded(paths: list[str], size: int) -> tuple[Tensor, Tensor]:
    """(images uint8 (M, 3, size, size), which of the paths could be read: bool (len(paths),)), mapped from a file that
    all processes share. Its name is a hash of what it was made of. It holds the images, then a byte for each path."""
    files = [(path, os.stat(path)) for path in paths if os.path.exists(path)]       # not a link to nothing
    made_of = repr([size, len(paths), *((path, at.st_size, at.st_mtime_ns) for path, at in files)])
    file = CACHE / f"{hashlib.sha256(made_of.encode(errors='replace')).hexdigest()[:32]}.images"
    if not file.is_file():
        note(f"decoding {len(paths):,} images to {file}")
        readable, bad = bytearray(len(paths)), 0
        with replacing(file) as new, concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
            for start in range(0, len(paths), 1024):
                part = paths[start:start + 1024]
                for i, image in enumerate(pool.map(read_image, part, [size] * len(part)), start):
                    if isinstance(image, bytes):
                        readable[i] = new.write(image) > 0
                        continue
                    note(f"left out {paths[i]}: {image}")
                    bad += 1
                    if bad > 0.01 * len(paths):
                        raise UserError(f"over 1 % of {len(paths)} images cannot be read, the last {paths[i]}: {image}")
            new.write(readable)
    whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    return whole[:-len(paths)].view(-1, 3, size, size), whole[-len(paths):].bool()


def read_image(path: str, size: int) -> bytes | str:
    """The pixels (3, size, size) of an image, resized and cropped to a square; or, in a line, why it cannot be read."""
    from PIL import Image, ImageOps                     # Pillow comes with torchvision
    Image.MAX_IMAGE_PIXELS = None                       # PIXELS is the limit
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS or image.mode.startswith(("I", "F")):
                return f"{image.width} x {image.height} pixels of mode {image.mode}"
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return b"".join(band.tobytes() for band in image.split())
    except Exception as e:                              # Pillow raises many kinds
        return f"{type(e).__name__}: {e}".split("\n")[0]


def training_images(args, device) -> Tensor:
    """The images of these arguments, on the device where they fit in half of its free memory. Raises UserError."""
    if LOCAL_RANK:
        dist.barrier()                      # a machine's first process downloads or decodes, then the others read
    images, _ = load_dataset(args.dataset, args.data, True, args.image_size, args.limit)    # the labels are not used
    if WORLD_SIZE > 1 and not LOCAL_RANK:
        dist.barrier()
    wanted = args.limit or 2
    if len(images) < 0.99 * wanted:         # 1 % may be unreadable
        raise UserError(f"there are {len(images)} training images, and {wanted} are needed")
    fits = device.type != "cuda" or images.numel() < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def two_views(images, args, steps: range, per_epoch: int, N: int, device):
    """For each step (x, other), a function of (args.seed, step) alone: x (2N, 3, S, S), two views of its N images, and
    with --inner-batch other two views of N images drawn anew, else None. Each of several processes makes its part."""
    def views(chosen, g):
        part = chosen[RANK * N // WORLD_SIZE:][:N // WORLD_SIZE]
        batch = to_device(images[to_device(part, images.device)], device)
        x = [augment(batch, g, args.crop_scale, args.hue, args.grayscale, RANK, WORLD_SIZE) for view in (1, 2)]
        return torch.cat(x).contiguous(memory_format=torch.channels_last)
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == steps.start:
            order = torch.randperm(len(images), generator=generator(args.seed, epoch, 0))
        g = generator(args.seed, step, 1)
        x = views(order[i * N:(i + 1) * N], g)
        yield x, views(torch.randperm(len(images), generator=g)[:N], g) if args.inner_batch == "other" else None


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
    definition, in batch: every parameter is drawn per image, the order of the four colour operations once per call.
    The images may be one rank's part of a batch: then its parameters are that part of the whole batch's.
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

# target: BYOL's slow copy, Sequential(f, g), or None; start: the first values of phi, the parameters of g and q
Model = collections.namedtuple("Model", "f g q target start")


def build(args, device="cpu") -> Model:
    """The untrained networks of these arguments, a function of args.seed. UserError for a width that cannot be."""
    torch.manual_seed(args.seed)
    f = projhead.encoder(args.encoder, args.image_size)
    sizes = {"d": args.dim, "hidden": args.hidden, "depth": args.depth}
    sizes = {size: value for size, value in sizes.items() if value}
    if "bn" in inspect.signature(HEADS[args.head]).parameters:
        sizes["bn"] = args.head_bn in ("hidden", "both")
    try:
        g = HEADS[args.head](f.dim, **sizes)
    except ValueError as e:
        raise UserError(f"--dim {args.dim}: {e}") from None
    d = g.eval()(torch.zeros(1, f.dim)).shape[1]                # of z
    if args.head_bn in ("end", "both"):
        g = nn.Sequential(g, nn.BatchNorm1d(d, affine=False))
    q = nn.Identity() if args.predictor == "none" else PREDICTORS[args.predictor](d)
    f, g, q = (projhead.synchronized(module.to(device)).train() for module in (f, g, q))
    f = f.to(memory_format=torch.channels_last)
    target = copy.deepcopy(nn.Sequential(f, g)).requires_grad_(False) if args.target == "ema" else None
    return Model(f, g, q, target, [p.detach().clone() for p in nn.ModuleList([g, q]).parameters()])


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
    for optimizer in both if WORLD_SIZE > 1 else ():
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

@contextlib.contextmanager
def replacing(path: Path):
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
        raise UserError(f"cannot write {path}: {e.strerror or e}; what it held before is as it was") from None
    finally:
        with contextlib.suppress(OSError):                      # it is there only after an error
            temporary.unlink()


@contextlib.contextmanager
def checkpoint_errors(path: Path):
    """Whatever fails inside, the file at `path` is not a checkpoint of ours: UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:                                      # of pickle, zipfile, torch
        raise UserError(f"{path} is damaged, or not a checkpoint of ours ({type(e).__name__})") from None


def start_run(args, images: Tensor, parts: dict, per_epoch: int, device) -> argparse.Namespace:
    """A run at .step of .total: continued from its checkpoint, or new and saved at once. .log holds the lines of
    metrics.jsonl. parts: what has a state dict, by its name in a checkpoint. Raises UserError."""
    out, now = Path(args.out), time.perf_counter()
    file, log = out / "checkpoint.pt", out / "metrics.jsonl"
    run = argparse.Namespace(args=args, out=out, parts=parts, images=[len(images), zlib.crc32(images.cpu().numpy())],
                             per_epoch=per_epoch, step=0, total=args.epochs * per_epoch, losses=[],
                             began=now, epoch_began=now, said=now, saved=now)
    found = [None, {}]                                          # the checkpoint, and what of it must be the same here
    if RANK == 0 and file.exists():
        with checkpoint_errors(file):
            old = torch.load(file, map_location="cpu", weights_only=True)
            found = [old, old["args"] | {"images": old["images"]}]
    elif RANK == 0 and log.exists():
        raise UserError(f"--out {out} holds a metrics.jsonl without a checkpoint: choose another")
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(found)                       # the first process knows
    old, there = found
    if args.precision is None:                                  # a run that moves to another device keeps its own
        args.precision = there.get("precision") or native_precision(device)
    run.log = [json.dumps({
        "command": command(), "args": vars(args), "images": len(images), "python": sys.version.split()[0],
        "torch": torch.__version__, "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
        "processes": WORLD_SIZE,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)})]
    if there:
        differ = [f"{flag.replace('_', '-')} {there.get(flag)} there, {value} here"
                  for flag, value in [*vars(args).items(), ("images", run.images)]
                  if flag not in PLACES and there.get(flag) != value]
        if differ:
            raise everywhere(UserError(f"--out {out} holds another run: {'; '.join(differ)}: choose another"))
        with checkpoint_errors(file):
            for name, part in parts.items():
                part.load_state_dict(old[name])
            run.step = int(old["step"])
        run.log = log.read_text(errors="replace").splitlines()[:1 + run.step // per_epoch] if log.exists() else run.log
    else:
        save(run, 0)
    say(f"{out}: {len(images)} images of {args.image_size} px, {args.encoder} in {args.precision} on {device}, "
        f"step {run.step} of {run.total}" + f", {WORLD_SIZE} processes" * (WORLD_SIZE > 1))
    return run


def save(run, step: int) -> None:
    """Write the checkpoint. Raises UserError where a weight is not finite: what was saved before stays."""
    if RANK:                                                    # all processes have the same weights
        return
    states = {name: part.state_dict() for name, part in run.parts.items()}
    if not all(t.isfinite().all() for name in states.keys() - {"theta", "phi"} for t in states[name].values()):
        raise diverged("a weight or a BatchNorm's statistic is not finite", step, run.args)
    buffer = io.BytesIO()
    torch.save({"args": vars(run.args), "step": step, "images": run.images, **states}, buffer)
    with replacing(run.out / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())
    run.saved = time.perf_counter()


def check_losses(run, step: int) -> list[float]:
    """The means of [loss, inner loss] over the epoch's steps so far. Raises UserError for one that is not finite."""
    values = torch.stack(run.losses).cpu()                      # this waits for a GPU
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
        values /= WORLD_SIZE
    for i, loss in enumerate(values[:, 0].tolist(), step + 1 - len(values)):
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss}", i, run.args)
    return values.mean(dim=0).tolist()


def diverged(what: str, step: int, args) -> BaseException:
    return everywhere(UserError(f"{what} in step {step}: try a smaller --lr than {args.lr}"
                                f"{' or --sparsity' * bool(args.sparsity)}; {args.out} keeps what was saved before"))


def end_epoch(run, step: int, lr: float, h: Tensor, model: Model) -> None:
    """Measure the epoch and its last batch, add a line to metrics.jsonl and print it. README.md explains the keys."""
    args, (loss, inner) = run.args, check_losses(run, step)
    seconds = time.perf_counter() - run.epoch_began
    with torch.no_grad():
        z = model.g.eval()(h)
        model.g.train()
    h, z = projhead.gather(h), projhead.gather(z)
    if not (h.isfinite().all() and z.isfinite().all()):
        raise diverged("h or z is not finite", step, args)
    line = {"epoch": step // run.per_epoch, "step": step, "loss": loss, "lr": lr,
            "rank_h": projhead.effective_rank(h), "rank_z": projhead.effective_rank(z),
            "spread_h": projhead.spread(h), "spread_z": projhead.spread(z),
            "seconds": seconds, "views_per_s": len(h) * len(run.losses) / seconds}
    if args.inner_steps:
        line["inner_loss"] = inner
    if args.predictor == "offdiag":
        line["offdiag"] = model.q.E.norm().item()
    if args.predictor == "linear":
        line["moved"] = (model.q.weight.detach() - model.start[-1]).norm().item()       # q's only weight
    if args.sparsity:
        line["penalty"] = sparsity(model.g, args.sparsity_norm).item()
        line["pruned"] = projhead.fraction_pruned(model.g, h)
    if h.is_cuda:
        line["memory"] = torch.cuda.max_memory_allocated(h.device) / 2**30
    run.log.append(json.dumps({key: round(value, 6) for key, value in line.items()}))
    if RANK == 0:
        with replacing(run.out / "metrics.jsonl") as file:
            file.write("".join(line + "\n" for line in run.log).encode())
    shown = {key: line[key] for key in ("loss", "rank_h", "rank_z", "offdiag", "pruned", "views_per_s") if key in line}
    say(f"epoch {line['epoch']}/{args.epochs}  " + "  ".join(f"{key} {value:.5g}" for key, value in shown.items()))
    run.losses, run.epoch_began = [], time.perf_counter()


def tell(run, step: int) -> None:
    """Once a minute, how far the run is."""
    now = time.perf_counter()
    if now - run.said > 60:
        left = (now - run.began) / (step - run.step) * (run.total - step) / 60
        say(f"step {step}/{run.total}, {left:.0f} minutes left")
        run.said = now


def command() -> str:
    start = ["torchrun", "--nproc-per-node", str(LOCAL_WORLD_SIZE)] if WORLD_SIZE > 1 else ["python"]
    return shlex.join(start + sys.argv)


# ---------------------------------------------------------------------------- several processes, signals, the terminal

def join(args) -> torch.device:
    """This process's device; under torchrun it joins the others, by nccl on GPUs and gloo on CPUs. Raises UserError."""
    device = usable(f"cuda:{LOCAL_RANK}" if WORLD_SIZE > 1 and args.device == "cuda" else args.device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))       # one may decode, the others wait
    return device


def usable(device: str) -> torch.device:
    """The device of that name. Raises UserError where there is none."""
    try:
        x = torch.zeros(1, device=device)
        x.item()                                                # the device "meta" holds no values
        return x.device
    except Exception as e:
        raise UserError(f"--device {device}: {e}".splitlines()[0]) from None


def everywhere(error: UserError) -> BaseException:
    """An error that all processes have: the first shows it."""
    return error if RANK == 0 else SystemExit(2)


def average_gradients(optimizer, *_) -> None:
    """Before each step of an optimizer: its gradients become their means over the processes, in one message."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:
        mean = torch.cat([g.flatten() for g in gradients]) / WORLD_SIZE
        dist.all_reduce(mean)
        for g, new in zip(gradients, mean.split([g.numel() for g in gradients])):
            g.copy_(new.view_as(g))


@contextlib.contextmanager
def signals():
    """A list that will hold the first SIGINT or SIGTERM. A second one ends the process, but under torchrun, which
    passes on what its processes already have."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    def first(number, _):
        caught.append(number)
        if RANK == 0:
            os.write(2, b"\nfinishing the step, then saving (again: stop at once)\n")
        for each in numbers if WORLD_SIZE == 1 else ():
            signal.signal(each, signal.SIG_DFL)
    before = [signal.signal(number, first) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def first_signal(caught: list[int]) -> int:
    """The signal after which to stop, or 0, the same in all processes. This waits for them, not for their GPUs."""
    number = torch.tensor(caught[0] if caught else 0)
    if WORLD_SIZE > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def say(text: str, file=None) -> None:
    if RANK == 0:
        print(text, file=file, flush=True)


def note(text: str) -> None:
    say(text, file=sys.stderr)


def main(run) -> None:
    """Run a script's main function; what the user can mend is one line on stderr and exit code 2."""
    try:
        run()
    except KeyboardInterrupt:                                   # before the first step, or in eval.py
        sys.exit(130)
    except BrokenPipeError:                                     # eval.py ... | head
        os._exit(1)
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        memory = isinstance(e, MemoryError) or "to allocate" in str(e)
        lost = isinstance(e, dist.DistError) or "gloo" in str(e)
        others = WORLD_SIZE > 1 and lost                        # another process has stopped, and said why
        if isinstance(e, RuntimeError) and not memory and not others:
            raise
        if not others:
            print(f"error: {'out of memory: try a smaller --batch-size' if memory else e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(lambda: train(parse_args()))
