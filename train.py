# SPDX-License-Identifier: MIT
"""Train an encoder through a head, without labels: augment, encode, project, predict, loss, step.

    python train.py                                          # the demonstration: drawn shapes, a small encoder, a CPU
    python train.py --head parametric --dataset cifar10      # ResNet-18 on CIFAR-10: wants a GPU
    python train.py --dataset cifar10 --encoder convnet --limit 10000 --epochs 10 --head sparse      # minutes on a CPU
    python train.py --dataset cifar10 --predictor offdiag    # Wen & Li's prediction head, a non-contrastive loss
    python train.py --dataset cifar10 --predictor mlp --target ema     # BYOL; --target stopgrad is SimSiam
    torchrun --nproc-per-node 8 train.py --dataset cifar10   # many GPUs: faster, to the same result

A run is a folder, runs/NAME: checkpoint.pt and metrics.jsonl, whose keys README.md explains. The same command
continues an interrupted run. Then: python eval.py.
"""
import argparse
import collections
import contextlib
import copy
import io
import json
import math
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import projhead
from projhead import HEADS, PREDICTORS

SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "folder": 64}
ENCODERS = ["convnet", "resnet18", "resnet34", "resnet50"]
FIXED = ["none", "slice", "reweight"]       # projection heads without weights
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, of each channel, for every data set
IN_MEMORY = 4 * 2**30       # bytes: a folder of images is decoded once if it is no larger than this, else in each epoch
SKIPPED = set()             # the paths of the images of a folder that could not be read
RANK, RANKS, LOCAL_RANK, LOCAL_RANKS = (    # torchrun sets these, and MASTER_ADDR
    int(os.environ.get(name, default)) if "MASTER_ADDR" in os.environ else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
WORKERS = min(16, os.cpu_count() // LOCAL_RANKS)


class UserError(Exception):
    """Something the user can mend; shown as one line on stderr, exit code 2."""


# ---------------------------------------------------------------------------- arguments

def recommended(args) -> dict:
    """What a flag is when it is not given: the recommended run for this data set, encoder, head and prediction head.

    Rate, momentum, weight decay, batch, temperature and grayscale are those of simclr-cifar10 for 100 epochs [code]; the
    rest, and all that depends on a head, is ours [reading], chosen by what README.md reports.
    """
    shapes, small, paired = args.dataset == "shapes", args.encoder == "convnet", args.predictor != "none"
    return dict(
        loss={"none": "infonce", "identity": "bn", "offdiag": "bn"}.get(args.predictor, "cosine"),
        target="stopgrad" if paired else None,
        ema=0.99 if args.target == "ema" else None,
        tau=0.5 if args.loss == "infonce" else None,
        inner_steps=2 if args.head == "parametric" else 0,
        head_lr=None if args.head in FIXED else 1.0,
        predictor_lr={"none": None, "identity": None, "directpred": None, "offdiag": 10.0}.get(args.predictor, 1.0),
        projector_bn="yes" if paired and args.loss != "bn" else "no",
        sparsity=0.5 if args.head == "sparse" else 0.0,
        sparsity_norm="l21" if args.sparsity else None,
        sparsity_layer=0 if args.sparsity else None,
        information=0.0,
        dim=None if args.head in FIXED else 128,
        hidden=None,
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


def number(kind, low, high=math.inf):
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(argv=None) -> argparse.Namespace:
    """The arguments, each flag that was not given filled in from recommended(). Raises UserError where they clash."""
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    many, width, share = number(int, 1), number(int, 1, 2**14), number(float, 0, 1)
    p.add_argument("--head", choices=HEADS, help="projection head (default: parametric; with a predictor mlp)")
    p.add_argument("--predictor", choices=["none", *PREDICTORS], default="none", help="prediction head; none: contrastive")
    p.add_argument("--loss", choices=["infonce", "cosine", "bn"], help="default: infonce; with a predictor bn or cosine")
    p.add_argument("--target", choices=["stopgrad", "ema"], help="what a prediction is compared with (SimSiam or BYOL)")
    p.add_argument("--ema", type=share, help="where the moving average's momentum starts; it ends at 1 (default: 0.99)")
    p.add_argument("--tau", type=number(float, 1e-3), help="temperature of infonce (default: 0.5)")
    p.add_argument("--inner-steps", type=number(int, 0), metavar="K", help="steps on the head before each encoder step; 0: joint")
    p.add_argument("--head-lr", type=number(float, 0), help="head's rate as a multiple of the encoder's; 0: a frozen random head")
    p.add_argument("--predictor-lr", type=number(float, 0), help="likewise for the prediction head")
    p.add_argument("--projector-bn", choices=["yes", "no"], help="end g in BatchNorm without affine (default: with a predictor, unless --loss bn)")
    p.add_argument("--sparsity", type=number(float, 0), metavar="LAMBDA", help="weight of the sparsity penalty; 0: off")
    p.add_argument("--sparsity-norm", choices=["l21", "l21-out", "l1", "l21-plain"], help="see projhead.sparsity")
    p.add_argument("--sparsity-layer", type=number(int, 0), help="which Linear of the head (default: 0, the first)")
    p.add_argument("--information", type=number(float, 0), metavar="LAMBDA", help="weight of the matrix information of h and z; 0: off")
    p.add_argument("--dim", type=width, help="width of z (default: 128; slice: 360/2048 of the encoder's)")
    p.add_argument("--hidden", type=width, help="hidden width of the head (default: twice that of h)")
    p.add_argument("--dataset", choices=SIZES, default="shapes", help="shapes is drawn here; cifar10, cifar100, stl10 download")
    p.add_argument("--data", default="data", metavar="DIR", help="where the data set lies (default: data)")
    p.add_argument("--limit", type=number(int, 2), metavar="N", help="only the first N training images")
    p.add_argument("--image-size", type=number(int, 8, 512), help="for folder: images are resized to this (default: 64)")
    p.add_argument("--encoder", choices=ENCODERS, help="default: convnet for shapes, else resnet18")
    p.add_argument("--epochs", type=many)
    p.add_argument("--batch-size", type=number(int, 2), help="images per step; each gives two views")
    p.add_argument("--lr", type=number(float, 0), help="peak rate for 256 images a step; scaled with the batch size")
    p.add_argument("--momentum", type=number(float, 0, 0.9999))
    p.add_argument("--weight-decay", type=number(float, 0))
    p.add_argument("--warmup", type=share, help="share of the steps in which the rate rises")
    p.add_argument("--crop-scale", type=number(float, 0.01, 1), help="smallest area of a crop")
    p.add_argument("--hue", type=number(float, 0, 0.5), help="largest shift of the hue, in turns")
    p.add_argument("--grayscale", type=share, help="probability of a gray view")
    p.add_argument("--seed", type=number(int, 0, 10**6), default=0)
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoder; not faster everywhere (README.md)")
    p.add_argument("--workers", type=number(int, 0, 256), help="processes that decode a folder's images (default: one per core, at most 16)")
    p.add_argument("--benchmark", action="store_true", help="train for a moment to print speeds, and keep nothing")
    p.add_argument("--show-views", metavar="PNG", help="draw images and the views made of them instead of training")
    p.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/NAME, made of the flags)")
    args = p.parse_args(argv)

    given = {flag for flag, value in vars(args).items() if value is not None}
    args.head = args.head or ("parametric" if args.predictor == "none" else "mlp")
    args.encoder = args.encoder or ("convnet" if args.dataset == "shapes" else "resnet18")
    changed = []
    for flag in recommended(args):
        value = recommended(args)[flag]                 # anew each time: some defaults follow from those before them
        if getattr(args, flag) is None:
            setattr(args, flag, value)
        elif getattr(args, flag) != value:
            changed += [flag]

    def clash(when, flag, why):
        if when and flag in given:
            raise UserError(f"--{flag.replace('_', '-')}: {why}")
    alone, frozen = args.predictor == "none", not args.head_lr and not args.predictor_lr
    clash(alone and args.loss != "infonce", "loss", f"{args.loss} needs a prediction head: --predictor identity is none")
    clash(alone, "target", "only a prediction is compared with a target: add --predictor mlp")
    clash(args.target != "ema", "ema", "needs --target ema")
    clash(args.loss != "infonce", "tau", f"the loss {args.loss} has no temperature")
    clash(args.head in FIXED, "head_lr", f"there is nothing to train in --head {args.head}")
    clash(args.predictor_lr is None or args.predictor in ("none", "identity", "directpred"), "predictor_lr", "this prediction head has no weights")
    clash(args.inner_steps and frozen, "inner_steps", "there is no trainable head to fit")
    clash(args.inner_steps and frozen, "head_lr", "a frozen head cannot be fitted: add --inner-steps 0, or use --head mlp")
    clash(args.head in ("none", "reweight"), "dim", f"--head {args.head} has the encoder's width")
    clash(args.head in (*FIXED, "linear"), "hidden", f"--head {args.head} has no hidden layer")
    clash(args.sparsity and args.head in FIXED, "sparsity", f"--head {args.head} has no weights to make sparse")
    clash(args.sparsity and not args.head_lr, "sparsity", "a frozen head cannot become sparse")
    clash(args.information and args.head == "none", "information", "without a head z is h")
    clash(not args.sparsity, "sparsity_norm", "needs --sparsity LAMBDA or --head sparse")
    clash(not args.sparsity, "sparsity_layer", "needs --sparsity LAMBDA or --head sparse")
    clash(args.dataset != "folder", "image_size", f"{args.dataset} has images of {SIZES[args.dataset]} px")
    if args.head == "sparse" and not args.head_lr:
        raise UserError("--head-lr: a frozen head cannot become sparse")
    data = [Path(args.data).resolve().name] if args.dataset == "folder" else []
    name = [args.dataset, *data, args.encoder, args.head] + ([args.predictor] if args.predictor != "none" else [])
    name += [f"{flag}{getattr(args, flag)}".replace("_", "-") for flag in ["limit"] * bool(args.limit) + changed]
    args.out = args.out or os.path.join("runs", "-".join([*name, f"seed{args.seed}"]))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.workers = WORKERS if args.workers is None else args.workers
    if args.dataset == "folder":
        args.data = str(Path(args.data).resolve())      # so that a run knows its images from anywhere
    return args


# ---------------------------------------------------------------------------- data

def load_dataset(name: str, root="data", train: bool = True, size: int = 64) -> tuple:
    """Images uint8 (M, 3, S, S) and labels int64 (M,), -1 where unknown; shapes has (M, 2): shape and hue.

    cifar10, cifar100 and stl10 (whose training part includes the unlabelled images) are downloaded to root when
    absent. folder is root/train and root/test, or, without these, root with a fifth, chosen by name, for testing; its images
    are resized to size and cropped to a square; subfolders, if any, are classes. What of it cannot be read is left out
    and named on stderr. Above IN_MEMORY bytes the images are a Folder, to be read by batches(). Raises UserError.
    """
    if name == "shapes":
        return draw_shapes(10_000, seed=1) if train else draw_shapes(4_000, seed=2)
    if name == "folder":
        return load_folder(Path(root), train, size)
    make, folder = {"cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
                    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python"),
                    "stl10": (torchvision.datasets.STL10, "stl10_binary")}[name]
    part = dict(split="train+unlabeled" if train else "test") if name == "stl10" else dict(train=train)
    there = (Path(root) / folder).exists()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            data = make(root, download=not there, **part)
    except Exception as e:      # torchvision raises many kinds here: RuntimeError, URLError, EOFError, UnpicklingError ...
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        if there:
            raise UserError(f"{Path(root) / folder} is incomplete or corrupt ({why}); remove it to download again") from None
        raise UserError(f"no {folder} in {root}, and no download ({why}); name its folder by --data, or use --dataset shapes") from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.labels if name == "stl10" else data.targets).long()
    if name != "stl10":
        images = images.permute(0, 3, 1, 2).contiguous()
    if labels.min() < -1 or labels.max() >= len(data.classes):
        raise UserError(f"{Path(root) / folder} has labels out of range: {labels.min()} to {labels.max()}")
    return images, labels


class Folder(torch.utils.data.Dataset):
    """Images to be decoded when they are asked for: uint8 (3, size, size) each, resized and cropped to a square.

    folder[i] is (image, bad) with bad = {}, or, where image i cannot be read, the next one that can and {i: why}.
    folder[slice or mask or indices] is a Folder. `bad` collects the numbers that batches() has met.
    """

    def __init__(self, paths: list[Path], size: int, allowed: float):
        self.paths, self.size, self.allowed, self.bad = paths, size, allowed, set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if not isinstance(i, int):
            return Folder([self.paths[j] for j in torch.arange(len(self))[i].tolist()], self.size, self.allowed)
        bad = {}
        while len(bad) <= min(self.allowed, len(self)):  # beyond that batches() stops
            try:
                return read_image(self.paths[i], self.size), bad
            except Exception as e:                      # Pillow raises many kinds
                bad[i] = f"{type(e).__name__}: {e}".split("\n")[0]
                i = (i + 1) % len(self)
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), bad

    @staticmethod
    def collate(items):
        return torch.stack([image for image, _ in items]), {i: why for _, bad in items for i, why in bad.items()}

    @staticmethod
    def work(_):                            # signals are for the main process, which ends its workers
        signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_image(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps         # Pillow comes with torchvision
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):      # 16 bits, which Pillow would clip
            x = torchvision.transforms.functional.pil_to_tensor(image.convert("I")) // 257
            image = torchvision.transforms.functional.to_pil_image(x.clamp(0, 255).to(torch.uint8))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torchvision.transforms.functional.pil_to_tensor(image)


def batches(images, indices, device, workers: int = 0):
    """images[i] for each i of `indices`, index tensors (N,), as uint8 (N, 3, S, S) on the device.

    images is a tensor, or a Folder, which worker processes decode ahead of time. Names each unreadable image once on
    stderr; raises UserError when they are above 1 % of the folder.
    """
    if isinstance(images, Tensor):
        yield from (images[i.to(images.device, non_blocking=True)].to(device, non_blocking=True) for i in indices)
        return
    for batch, bad in torch.utils.data.DataLoader(
            images, batch_sampler=(i.tolist() for i in indices), collate_fn=Folder.collate, num_workers=workers,
            worker_init_fn=Folder.work, prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda"):
        images.bad |= bad.keys()
        for i, why in bad.items():
            if len(images.bad) > images.allowed:
                raise UserError(f"{len(images.bad)} images cannot be read, over 1 % of the folder, the last {images.paths[i]}: {why}")
            if images.paths[i] not in SKIPPED:
                print(f"skipped {images.paths[i]}: {why}", file=sys.stderr)
            SKIPPED.add(images.paths[i])
        yield batch.to(device, non_blocking=True)


def load_folder(root: Path, train: bool, size: int):
    if not root.is_dir():
        raise UserError(f"no folder {root}: name one of images by --data, or use --dataset shapes")
    split = (root / "train").is_dir() and (root / "test").is_dir()
    base = root / ("train" if train else "test") if split else root
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    paths = [f for f in base.rglob("*") if f.suffix.lower() in kinds and not f.is_dir()]
    number = {f: zlib.crc32(str(f.relative_to(base)).encode(errors="replace")) for f in paths}
    paths.sort(key=lambda f: (number[f], f))            # mixed, so that the first N are of all classes
    allowed = 0.01 * len(paths)
    if train:
        SKIPPED.clear()
    if not split:                                       # by name: an image does not change sides when others come or go
        paths = [f for f in paths if (number[f] // 7 % 5 == 0) != train]
    if not paths:
        raise UserError(f"no images ({' '.join(kinds)}) in {base} to {'train' if train else 'test'} on")
    top = root / "train" if split else root
    classes = {name: i for i, name in enumerate(sorted(d.name for d in top.iterdir() if d.is_dir()))}
    labels = torch.tensor([classes.get(f.relative_to(base).parts[0], -1) for f in paths])
    images = Folder(paths, size, allowed)
    if len(paths) * 3 * size**2 > IN_MEMORY:
        return images, labels
    numbers = torch.arange(len(paths)).split(64)
    everything = torch.cat(list(batches(images, numbers, torch.device("cpu"), WORKERS if len(paths) > 1000 else 0)))
    return everything[readable(images)], labels[readable(images)]


def readable(images) -> Tensor:
    """bool (M,): False for the images of a Folder that batches() could not read; all True of a tensor."""
    return torch.tensor([i not in getattr(images, "bad", ()) for i in range(len(images))])


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

def augment(images: Tensor, generator: torch.Generator, crop_scale=0.2, hue=0.1, grayscale=0.1, rank=0, ranks=1) -> Tensor:
    """One random view per image by SimCLR's augmentation: uint8 (N, 3, S, S) -> normalized float32 (N, 3, S, S).

    Crop of crop_scale to 1 of the area, resized back; flip; with probability 0.8 brightness, contrast and saturation
    by a factor in 0.6 to 1.4 and a hue shift up to +-hue turns; gray with probability grayscale; above 64 px a
    Gaussian blur with probability 0.5. Each is torchvision's own definition, but for floats and in batch: every
    parameter is drawn per image, only the order of the four colour operations once per call.
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
    drawn = drawn.to(device, non_blocking=True)[..., None, None, None]                    # 12 x N x 1 x 1 x 1
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
    mean, std = torch.tensor([MEAN, STD]).to(x.device, x.dtype, non_blocking=True)
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


# ---------------------------------------------------------------------------- pure functions of (seed, step)

def stream(seed: int, step: int, which: int) -> torch.Generator:
    """An own generator for each (seed, step); `which` is 0 for the order of an epoch's images, 1 for augmentation."""
    return torch.Generator().manual_seed((seed * 1_000_003 + 2 * step + which) % 2**32)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear over the first warmup * total steps, then a half cosine down to zero."""
    rising = warmup * total
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


# ---------------------------------------------------------------------------- models and checkpoints

def build(args) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The untrained encoder f, projection head g and prediction head q of these arguments: a function of args.seed.
    Raises UserError where the head cannot have the width args.dim."""
    torch.manual_seed(args.seed)
    f = projhead.encoder(args.encoder, args.image_size)
    sizes = {flag: getattr(args, name) for flag, name in (("d", "dim"), ("hidden", "hidden")) if getattr(args, name)}
    try:
        g = HEADS[args.head](f.dim, **sizes)
    except ValueError as e:
        raise UserError(f"--dim {args.dim}: {e}") from None
    d = g.eval()(torch.zeros(1, f.dim)).shape[1]        # of z
    g.train()
    if args.projector_bn == "yes":
        g.append(nn.BatchNorm1d(d, affine=False))
    q = nn.Identity() if args.predictor == "none" else PREDICTORS[args.predictor](d)
    return f, g, q


def write(path: Path, data) -> None:
    """Replace the file by these bytes or leave it as it is: to a temporary file beside, synced to disk, then renamed."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:                                # a full disk
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}; what it held before is as it was") from None


def save(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """The checkpoint at path, on the CPU, without running anything that it holds. Raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        args, step = checkpoint["args"], checkpoint["step"]
        flags = {k: v for k, v in args.items() if v is not None and v is not False and (k != "image_size" or args["dataset"] == "folder")}
        parsed = vars(parse_args([f"--{k.replace('_', '-')}" + (f"={v}" if v is not True else "") for k, v in flags.items()]))
        if not args.items() <= parsed.items() or not isinstance(step, int) or step < 0:
            raise ValueError
    except Exception as e:
        raise UserError(f"{path} is not a checkpoint of ours ({type(e).__name__})") from None
    return {**checkpoint, "args": parsed}


def restore(checkpoint: dict, parts: dict, path: Path) -> None:
    """Load the states of the modules and optimizers of `parts`. Raises UserError where one is missing or does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
            for p, state in getattr(part, "state", {}).items():         # an optimizer does not look at shapes itself
                if state["momentum_buffer"].shape != p.shape:
                    raise ValueError
    except Exception as e:
        raise UserError(f"{path} does not fit its own arguments ({name}: {type(e).__name__})") from None


def usable(device: str) -> torch.device:
    """The device of that name. Raises UserError where there is none."""
    try:
        x = torch.zeros(1, device=device)
        x.item()                                        # the device "meta" holds no values
        return x.device
    except Exception as e:
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}") from None


def claim(out: Path, args) -> dict | None:
    """None for a new run, the checkpoint of one to be continued; raises UserError if `out` holds anything else."""
    if (out / "checkpoint.pt").exists():
        checkpoint = load(out / "checkpoint.pt")
        old = checkpoint["args"]
        free = ["out", "device", "compile", "workers", "benchmark", "show_views"] + ["data"] * (args.dataset != "folder")
        differ = [f"--{k.replace('_', '-')} {old[k]} there, {v} here" for k, v in vars(args).items() if k not in free and old[k] != v]
        if differ:
            raise UserError(f"{out} holds another run ({'; '.join(differ)}): choose another --out")
        return checkpoint
    if out.exists() and (not out.is_dir() or any(f.suffix != ".tmp" for f in out.iterdir())):
        raise UserError(f"{out} holds something else than a run: choose another --out")
    return None


# ---------------------------------------------------------------------------- several processes (torchrun)

def join(args) -> torch.device:
    """This process's device; under torchrun it joins the others, by nccl on GPUs and gloo on CPUs."""
    device = usable(f"cuda:{LOCAL_RANK}" if RANKS > 1 and args.device == "cuda" else args.device)
    if RANKS > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def first_decides(make):
    """make() of the first process, for all of them: what it returns, or its UserError or OSError."""
    result = [None, None]
    if RANK == 0:
        try:
            result[0] = make()
        except (UserError, OSError) as e:
            result[1] = e
    if RANKS > 1:
        dist.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]


def average_gradients(optimizer, *_) -> None:
    """Before each step of an optimizer: its gradients become their means over the processes, in one message."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    mean = torch.cat([g.flatten() for g in gradients]) / RANKS
    dist.all_reduce(mean)
    for g, new in zip(gradients, mean.split([g.numel() for g in gradients])):
        g.copy_(new.view_as(g))


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, which trains on GPUs only, and the same on a CPU: statistics over the whole batch, of all processes."""

    def forward(self, x):
        if x.is_cuda or not self.training:
            return super().forward(x)
        dims, shape, M = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2), RANKS * x.numel() / x.shape[1]
        mean = projhead.gather(x.mean(dims)[None]).mean(0)
        x = x - mean.view(shape)
        var = projhead.gather(x.square().mean(dims)[None]).mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum), self.running_var.lerp_(var * M / (M - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        x = x * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def synchronized(module: nn.Module) -> nn.Module:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)        # the same parameters under the same names
    for m in module.modules():
        if isinstance(m, nn.SyncBatchNorm):
            m.__class__ = SyncBatchNorm
    return module


# ---------------------------------------------------------------------------- training

def views(images, args, steps: range, per_epoch: int, batch_size: int, device):
    """For each step the two views of its images, one batch (2N, 3, S, S): a function of (args.seed, step) alone."""
    N = batch_size // RANKS                             # this process's share
    def indices():
        for step in steps:
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == steps.start:
                order = torch.randperm(len(images), generator=stream(args.seed, epoch, 0))
            yield order[i * batch_size + RANK * N:][:N]
    for step, batch in zip(steps, batches(images, indices(), device, args.workers)):
        numbers = stream(args.seed, step, 1)
        x = [augment(batch, numbers, args.crop_scale, args.hue, args.grayscale, RANK, RANKS) for _ in "12"]
        yield torch.cat(x).contiguous(memory_format=torch.channels_last)


class Watch:
    """The losses and times of steps, without waiting for a GPU: there a moment is an event, and a loss is read once it has arrived."""

    def __init__(self, device, advice: str):
        self.cuda, self.advice, self.pending = device.type == "cuda", advice, collections.deque()
        self.reset()

    def reset(self):
        self.since, self.network, self.loss = time.perf_counter(), 0.0, 0.0     # seconds, seconds, sum over steps

    def moment(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        self.begin = self.moment()

    def stop(self, step: int, rate: float, loss: Tensor):
        self.pending.append((step, rate, loss.detach().to("cpu", non_blocking=True), self.begin, self.moment()))
        self.look(wait=False)

    def look(self, wait: bool):
        """Take in the steps that are done, or all of them. Raises UserError for a loss that is not finite."""
        while self.pending and (wait or not self.cuda or self.pending[0][-1].query()):
            step, rate, loss, begin, end = self.pending.popleft()
            if self.cuda:
                end.synchronize()
            self.network += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self.loss += loss.item()
            if not math.isfinite(loss.item()):
                raise self.diverged(f"the loss is {loss.item()}", step, rate)

    def diverged(self, what: str, step: int, rate: float) -> UserError:
        return UserError(f"{what} in step {step}, at a learning rate of {rate:.3g}: {self.advice}")


@contextlib.contextmanager
def signal_handlers_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals() -> list[int]:
    """A list that will hold the first SIGINT or SIGTERM."""
    caught = []
    def catch(number, _):
        caught.append(number)
        for number in (signal.SIGINT, signal.SIGTERM) if RANKS == 1 else ():    # torchrun passes on what has come already
            signal.signal(number, signal.SIG_DFL)                               # a second one quits at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


@signal_handlers_restored()
def train(args, views=views) -> None:
    """The whole run of these arguments: everything that a paper would print as pseudo-code is in the loop below.

    views: what makes a step's input, to be replaced by --benchmark. Raises UserError; on SIGINT and SIGTERM it
    finishes the step, saves and raises SystemExit(130 or 143).
    """
    if args.batch_size % RANKS:
        raise UserError(f"--batch-size {args.batch_size} does not divide evenly over {RANKS} processes")
    out, device = Path(args.out), join(args)
    say = print if RANK == 0 else lambda *_, **__: None
    checkpoint = first_decides(lambda: claim(out, args))
    if LOCAL_RANK:                                      # the first process of each machine downloads, then the others read
        try:
            dist.barrier()
        except RuntimeError:
            raise UserError("the first process has stopped") from None
    images, _ = load_dataset(args.dataset, args.data, True, args.image_size)    # the labels are not looked at
    if RANKS > 1 and not LOCAL_RANK:
        dist.barrier()
    if args.limit and args.limit > len(images):
        raise UserError(f"--limit {args.limit}: {args.dataset} has {len(images)} training images")
    images = images[:args.limit]
    if isinstance(images, Tensor):
        images = images.to(device)
    if len(images) < max(2, RANKS):
        raise UserError(f"{len(images)} images are no training set for {RANKS} processes: a loss needs at least two")
    if checkpoint and checkpoint.get("images") != len(images):
        raise UserError(f"{out} was trained on {checkpoint.get('images')} images, and there are {len(images)} now: choose another --out")
    batch_size = min(args.batch_size, len(images) // RANKS * RANKS)
    per_epoch = len(images) // batch_size               # the last short batch is left out, another one each epoch
    total, peak = args.epochs * per_epoch, args.lr * batch_size / 256

    # Models: the encoder f (theta), the heads g and q (phi), and BYOL's slow copy of f and g.
    f, g, q = (m.to(device) for m in build(args))
    f = f.to(memory_format=torch.channels_last)
    if args.sparsity:
        try:
            projhead.linear_weight(g, args.sparsity_layer)
        except ValueError as e:
            raise UserError(f"--sparsity-layer {args.sparsity_layer}: {e}") from None
    if RANKS > 1:
        f, g, q = synchronized(f), synchronized(g), synchronized(q)
    target = copy.deepcopy(nn.Sequential(f, g)).requires_grad_(False) if args.target == "ema" else None
    modules = {"encoder": f, "head": g, "predictor": q} | ({"target": target} if target else {})

    # Optimizers: theta and phi apart, so that either can move alone. Each rate is a multiple of the schedule's.
    sgd = dict(lr=peak, momentum=args.momentum, weight_decay=args.weight_decay, fused=device.type == "cuda")
    optimizer_f = torch.optim.SGD([{"params": f.parameters(), "scale": 1.0}], **sgd)
    groups = [{"params": list(g.parameters()), "scale": args.head_lr},
              {"params": list(q.parameters()), "scale": args.predictor_lr}]
    if args.predictor == "offdiag":
        groups[1]["weight_decay"] = 0.0                 # decay would itself bring the head back to the identity
    groups = [group for group in groups if group["params"]]
    optimizer_gq = torch.optim.SGD(groups, **sgd) if groups else None
    optimizers = {"optimizer_f": optimizer_f} | ({"optimizer_gq": optimizer_gq} if groups else {})
    for optimizer in optimizers.values() if RANKS > 1 else ():
        optimizer.register_step_pre_hook(average_gradients)

    start = checkpoint["step"] if checkpoint else 0
    if start >= total:
        return say(f"{out} is finished: {args.epochs} epochs. Look at it: python eval.py {shlex.quote(str(out))}")
    if checkpoint:
        restore(checkpoint, modules | optimizers, out / "checkpoint.pt")
    def save_state(step):
        if RANK == 0:
            out.mkdir(parents=True, exist_ok=True)
            save(out / "checkpoint.pt", {"args": vars(args), "step": step, "images": len(images),
                                         **{name: part.state_dict() for name, part in (modules | optimizers).items()}})
    if not checkpoint:
        save_state(0)
    log = start_log(out / "metrics.jsonl", args, start // per_epoch, device, len(images))
    if args.compile:
        f.compile()

    def amp():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    pair = {"infonce": lambda p, z: projhead.nt_xent(p, z.detach(), args.tau),
            "cosine": projhead.negative_cosine, "bn": projhead.bn_mse}[args.loss]

    def objective(h, t=None):
        """L(theta, phi) of h (2N, D), the views one after the other, in float32; t: the slow copy's z. Also returns z."""
        with amp():
            z = g(h)                                    # 2N x d
            p = q(z)                                    # 2N x d
        if args.predictor == "none":
            loss = projhead.nt_xent(*z.chunk(2), args.tau)
        else:
            (p1, p2), (z1, z2) = p.chunk(2), (z if t is None else t).chunk(2)
            loss = (pair(p1, z2) + pair(p2, z1)) / 2    # both ways round [reading]; each detaches its second argument
        if args.sparsity:
            loss = loss + args.sparsity * projhead.sparsity(g, args.sparsity_norm, args.sparsity_layer)
        if args.information:
            loss = loss + args.information * projhead.matrix_information(h, z)
        return loss, z

    watch, stop = Watch(device, f"try a smaller --lr than {args.lr}; {out} keeps what was saved before"), catch_signals()
    say(f"{out}: {len(images)} images of {args.image_size} px, {args.encoder}, {total - start} steps of {batch_size} images on "
        f"{device}" + f", {RANKS} processes" * (RANKS > 1), flush=True)
    f.train(), g.train(), q.train()
    began, total_inner, warned = time.perf_counter(), 0.0, False
    for step, x in enumerate(views(images, args, range(start, total), per_epoch, batch_size, device), start):
        epoch, i = divmod(step, per_epoch)
        rate = learning_rate(step, total, peak, args.warmup)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

        # Both views in one batch: BatchNorm sees both, where SimSiam and BYOL run one after the other.
        watch.start()
        with amp():
            h = f(x)                                    # 2N x D
            t = None
            if target:
                with torch.no_grad():
                    t = target(x)                       # 2N x d

        if args.inner_steps:                            # phi alone, h held fixed
            total_inner += projhead.fit_head(lambda: objective(h.detach(), t)[0], optimizer_gq, args.inner_steps, wait=False)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss, z = objective(h, t)
        loss.backward()
        optimizer_f.step()                              # theta
        if optimizer_gq and not args.inner_steps:
            optimizer_gq.step()                         # joint training: phi in the same step

        if target:  # Parameters are averaged. BatchNorm's buffers are the copy's own: it runs in train mode, on its batches.
            m = 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / total)) / 2
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), nn.Sequential(f, g).parameters()):
                    slow.lerp_(fast, 1 - m)

        watch.stop(step + 1, rate, loss)
        eta = (time.perf_counter() - began) / (step + 1 - start) * (total - step - 1)
        if step == start and eta > 3600 and device.type == "cpu":
            say(f"this will take about {eta / 3600:.0f} hours on this CPU; "
                "--encoder convnet --limit 10000 --epochs 10 takes minutes", file=sys.stderr)
        if sys.stdout.isatty():
            say(f"\repoch {epoch + 1}/{args.epochs}  step {i + 1}/{per_epoch}  ETA {clock(eta)} ", end="", flush=True)
        stopped = stop[0] if stop else 0
        if RANKS > 1:                                   # all stop after the same step; this waits for processes, not for GPUs
            dist.all_reduce(stopped := torch.tensor(stopped), dist.ReduceOp.MAX)
            stopped = stopped.item()
        if i + 1 < per_epoch and not stopped:
            continue

        # The end of an epoch: measure the last batch, log, save.
        watch.look(wait=True)
        if not all(p.isfinite().all() for m in modules.values() for p in m.parameters()):
            raise watch.diverged("a weight is not finite", step + 1, rate)
        if i + 1 == per_epoch:
            done = step + 1 - max(start, epoch * per_epoch)
            means = torch.tensor([watch.loss, float(total_inner)], dtype=torch.float64) / done / RANKS
            h, z = projhead.gather(h.detach()), projhead.gather(z.detach())
            if RANKS > 1:
                dist.all_reduce(means)
            line = {"epoch": epoch + 1, "step": step + 1, "loss": means[0].item()}
            if args.inner_steps:
                line["inner_loss"] = means[1].item()
            line["lr"] = rate
            for name, features in (("h", h), ("z", z)):
                line |= {f"rank_{name}": projhead.effective_rank(features), f"spread_{name}": projhead.spread(features)}
            if args.predictor == "offdiag":
                line["offdiag"] = q.E.norm().item()
            if args.sparsity:
                line["penalty"] = projhead.sparsity(g, args.sparsity_norm, args.sparsity_layer).item()
                line["pruned"] = projhead.share_pruned(g, args.sparsity_layer)
            if args.dataset == "folder":
                line["skipped"] = len(SKIPPED)
            seconds = time.perf_counter() - watch.since
            line |= {"seconds": seconds, "views_per_s": 2 * batch_size * done / seconds,
                     "overhead": 1 - watch.network / seconds, "memory": peak_memory(device)}
            log.append(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}))
            if RANK == 0:
                write(out / "metrics.jsonl", "".join(line + "\n" for line in log).encode())
            extra = "".join(f"  {k} {line[k]:.3f}" for k in ("offdiag", "pruned") if k in line)
            say(("\r" if sys.stdout.isatty() else "") + f"epoch {epoch + 1}/{args.epochs}  loss {line['loss']:.4f}  "
                f"rank h {line['rank_h']:.1f} z {line['rank_z']:.1f}{extra}  {line['views_per_s']:.0f} views/s "
                f"({100 * line['overhead']:.0f} % overhead)  ETA {clock(eta)}", flush=True)
            low = min(line["spread_h"], line["spread_z"])
            if low < 0.05 and not warned:
                warned = True
                say(f"warning: the features collapse: their spread is {low:.2g} after epoch {epoch + 1}, where 0 is one point", file=sys.stderr)
        save_state(step + 1)
        if stopped and step + 1 < total:
            say(f"\nstopped after step {step + 1} of {total}; this continues: {command()}", file=sys.stderr)
            raise SystemExit(128 + stopped)
        watch.reset()
        total_inner = 0.0
    say(f"done in {clock(time.perf_counter() - began)}. Look at it: python eval.py {shlex.quote(str(out))}")


def show_views(args) -> None:
    """Write a picture to args.show_views: eight images, each at the left of eight views of it as training sees them."""
    images, _ = load_dataset(args.dataset, args.data, True, args.image_size)
    batch, numbers = next(batches(images, [torch.arange(min(8, len(images)))], torch.device("cpu"))), stream(args.seed, 0, 1)
    views = [augment(batch, numbers, args.crop_scale, args.hue, args.grayscale) for _ in range(8)]
    x = torch.stack([normalize(batch.float() / 255), *views], dim=1).flatten(0, 1)        # 8 * 9 x 3 x S x S
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    try:
        torchvision.utils.save_image((x * std + mean).clamp(0, 1), args.show_views, nrow=9)
    except ValueError as e:
        raise UserError(f"--show-views {args.show_views}: {e}") from None
    print(f"{args.show_views}: images, and to the right of each eight views of it")


def benchmark(args) -> None:
    """Print the speeds that README.md quotes, from short runs of train() itself: medians of five interleaved rounds."""
    if RANKS > 1:
        raise UserError("--benchmark runs in one process")
    images, device = load_dataset(args.dataset, args.data, True, args.image_size)[0], usable(args.device)
    if isinstance(images, Folder):
        raise UserError(f"--benchmark needs images that fit in memory: {args.data} has {len(images)}")
    args.limit = min(len(images), args.limit or args.batch_size * (40 if device.type == "cuda" or args.encoder == "convnet" else 4))
    args.batch_size, images = min(args.batch_size, args.limit), images[:args.limit].to(device)
    per_epoch, args.epochs = args.limit // args.batch_size, 2       # the first epoch warms up
    variants = {"training": (views, {}), "ready": (ready_views, {}), "pillow": (pillow_views, {})}
    if args.head_lr:
        variants |= {"joint": (views, {"inner_steps": 0}), "inner": (views, {"inner_steps": 5})}
    speeds = collections.defaultdict(list)
    for _ in range(5):
        for name, (how, changes) in variants.items():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                train(argparse.Namespace(**vars(args) | changes | {"out": folder + "/run"}), how)
                line = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1])
            speeds[name].append(line["views_per_s"])
        for name, how in (("views alone", views), ("pillow alone", pillow_views)):
            began = time.perf_counter()
            for x in how(images, args, range(per_epoch), per_epoch, args.batch_size, device):
                pass
            x.sum().item()                              # waits for the device
            speeds[name].append(2 * args.batch_size * per_epoch / (time.perf_counter() - began))
    def ratio(a, b):                                    # of the rounds, since the machine's speed drifts between them
        return statistics.median(x / y for x, y in zip(speeds[a], speeds[b]))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{args.encoder}, {args.image_size} px, {per_epoch} steps of {args.batch_size} images, on {device}, {torch.get_num_threads()} "
          f"threads, {args.workers} workers\n"
          f"views alone            {median['views alone']:8.0f} views/s\n"
          f"  torchvision, Pillow  {median['pillow alone']:8.0f} views/s: ours are {ratio('views alone', 'pillow alone'):.1f} times as fast\n"
          f"training               {median['training']:8.0f} views/s, {2000 * args.batch_size / median['training']:.1f} ms a step\n"
          f"  on ready views       {median['ready']:8.0f} views/s: training reaches {ratio('training', 'ready'):.3f} of it\n"
          f"  torchvision, Pillow  {median['pillow']:8.0f} views/s: ours is {ratio('training', 'pillow'):.2f} times as fast")
    if args.head_lr:
        print(f"--inner-steps 5 takes {ratio('joint', 'inner'):.3f} times the time of joint training")
    print(f"peak memory {peak_memory(device):.2f} GiB")


def ready_views(images, args, steps, per_epoch, batch_size, device):
    """One batch of views, again and again: what remains is the network."""
    x = next(views(images, args, steps, per_epoch, batch_size, device))
    yield from (x for _ in steps)


class Pairs(torch.utils.data.Dataset):
    """Two views of image i by torchvision's transforms on Pillow images: how it is usually done."""

    def __init__(self, images, args):
        T = torchvision.transforms
        self.images, self.view = images.cpu(), T.Compose([
            T.ToPILImage(), T.RandomResizedCrop(args.image_size, (args.crop_scale, 1)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, args.hue)], 0.8), T.RandomGrayscale(args.grayscale),
            T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view(self.images[i]), self.view(self.images[i])


def pillow_views(images, args, steps, per_epoch, batch_size, device):
    loader = torch.utils.data.DataLoader(Pairs(images, args), batch_size, shuffle=True, drop_last=True, num_workers=args.workers,
                                         pin_memory=device.type == "cuda", persistent_workers=args.workers > 0)
    for _ in range(len(steps) // per_epoch):
        for x1, x2 in loader:
            yield torch.cat([x1, x2]).to(device, non_blocking=True, memory_format=torch.channels_last)


def start_log(path: Path, args, epochs: int, device, M: int) -> list[str]:
    """The lines of metrics.jsonl: its first, written for a new run, and as many epochs as the checkpoint has."""
    first = {"command": command(), "args": vars(args), "images": M,
             "python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
             "processes": RANKS, "threads": torch.get_num_threads()}
    lines = path.read_text(errors="replace").splitlines()[:1 + epochs] if epochs and path.exists() else []
    lines = lines or [json.dumps(first)]
    if RANK == 0:
        write(path, "".join(line + "\n" for line in lines).encode())
    return lines


def command() -> str:
    return shlex.join((["torchrun", "--nproc-per-node", str(LOCAL_RANKS)] if RANKS > 1 else ["python"]) + sys.argv)


def peak_memory(device) -> float:
    """GiB that the device (on a CPU this process) has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}" if seconds >= 3600 else \
        f"{int(seconds // 60)}:{int(seconds % 60):02}"


def main(run) -> None:
    """Run a script's main function; what the user can mend is one line on stderr and exit code 2."""
    try:
        run()
    except (UserError, OSError) as e:
        if LOCAL_RANK == 0:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run() -> None:
    args = parse_args()
    try:
        (benchmark if args.benchmark else show_views if args.show_views else train)(args)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or "to allocate" in str(e):
            raise UserError(f"out of memory with --batch-size {args.batch_size}: try --batch-size {max(2, args.batch_size // 2)}") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(run)
