# SPDX-License-Identifier: MIT
"""The heads of self-supervised learning, and what is optimized through them.

    x1, x2     two views of an image     (N, 3, H, W)
    h = f(x)   encoder                   (N, D)    kept after training; its parameters are theta
    z = g(h)   projection head           (N, d)    discarded; the parameters of g and q are phi
    p = q(z)   prediction head           (N, d)    discarded; without one the loss is between z's

    1  NoHead, LinearHead, MLP, nt_xent     SimCLR (2002.05709)             the heads that all others are compared with
    2  fit_head, unroll_head                Gupta et al. 2022 (2212.11491)  the head, a parametric component of InfoNCE
    3  SparseHead, sparsity                 Song et al. 2023 (2307.08913)   a regularizer makes the head sparse
    4  OffDiagonal, bn_mse                  Wen & Li 2022 (2205.06226)      identity start, off-diagonal entries train
    5  MLPPredictor, negative_cosine        SimSiam (2011.10566), BYOL (2006.07733)
       barlow                               Barlow Twins (2103.03230)       a loss without negatives
    6  SliceHead, ReweightHead              DirectCLR (2110.09348), Xue et al. (2403.11391): heads without weights
       LinearPredictor                      the control for OffDiagonal
    7  effective_rank, spread, ...          measures; RankMe (2210.02885)

Each docstring names its source: [paper] the paper states it, [code] a constant or formula of released code, [reading]
our choice where the sources that we had are silent. "Needs" names what else to copy with a class or function.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


# ---------------------------------------------------------------------------- 1  SimCLR

class ConvNet(nn.Sequential):
    """A small encoder that trains in minutes on a CPU: (N, 3, H, W) -> (N, widths[-1]), H and W at least 8. [reading]

    A stage is convolution, pooling (not in the last), BatchNorm, ReLU. Like ResNet-18 it has 512 features, more than
    z's 128: room for what the loss does not ask for.
    """

    def __init__(self, widths=(16, 32, 64, 512)):
        layers, width = [], 3
        for i, w in enumerate(widths):
            layers += [nn.Conv2d(width, w, 3, padding=1, bias=False)]
            layers += [nn.MaxPool2d(2)] if i < len(widths) - 1 else []
            layers += [nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            width = w
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dim = width


def encoder(arch: str = "resnet18", image_size: int = 32) -> nn.Module:
    """The encoder f, without a classifier: (N, 3, S, S) -> (N, f.dim), S = image_size.

    arch is a key of ENCODERS; ValueError for another. The ResNets are torchvision's, with its names. For CIFAR SimCLR
    (appendix B.9) has a first convolution of 3x3, stride 1, and no max-pool [paper]; we take that stem up to 64 px
    [reading]. Needs ENCODERS, ConvNet.
    """
    if arch not in ENCODERS:
        raise ValueError(f"unknown encoder {arch!r}: choose from {', '.join(ENCODERS)}")
    f = ENCODERS[arch]()
    if isinstance(f, ConvNet):
        return f
    if image_size <= 64:
        f.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        f.maxpool = nn.Identity()
    f.dim = f.fc.in_features
    f.fc = nn.Identity()
    return f


class NoHead(nn.Sequential):
    """z = h: (N, D) -> (N, D). SimCLR's control: the loss acts on the representation itself. [paper]"""

    def __init__(self, D: int):
        super().__init__()


class MLP(nn.Sequential):
    """z = W2 relu(BN(W1 h)) + b2: (N, D) -> (N, d). SimCLR's head with one hidden layer [paper].

    hidden is 2 D unless given [reading], and d is 128: for ResNet-18 this is the 512-1024-128 of simclr-cifar10 [code].
    bn: a BatchNorm after each hidden layer, whose Linear then has no bias, as in SimCLR's and lightly's heads [code];
    simclr-cifar10's and solo-learn's have none [code]. depth is the number of linear layers: Gupta et al. study the
    head's layers [paper]; without a hidden one bn has no effect. Raises ValueError for depth < 1, and with bn for N = 1
    in training.
    """

    def __init__(self, D: int, d: int = 128, hidden: int | None = None, depth: int = 2, bn: bool = True):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        width, layers = D, []
        for _ in range(depth - 1):
            layers += [nn.Linear(width, hidden or 2 * D, bias=not bn)]
            width = hidden or 2 * D
            layers += [nn.BatchNorm1d(width), nn.ReLU()] if bn else [nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, d))


class LinearHead(MLP):
    """z = W h + b: (N, D) -> (N, d). SimCLR's linear head [paper]; the bias is ours [reading]. Needs MLP."""

    def __init__(self, D: int, d: int = 128):
        super().__init__(D, d, depth=1)


def nt_xent(z1: Tensor, z2: Tensor, tau: float = 0.5) -> Tensor:
    """InfoNCE as in SimCLR: -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ), mean over the 2N anchors i. [paper]

    z1, z2: (N, d), row n of both from the same image. s is cosine similarity; j is the other view of i's image. Each
    anchor has 2N - 1 candidates: the pair (i, i) is masked, not subtracted. Under torch.distributed the candidates are
    those of all processes, and N must be the same in each. tau > 0; 0.5 is simclr-cifar10's [code]. Returns a scalar
    >= 0, in float32 or better; call it outside autocast. Needs gather, rank, _float32.
    """
    N, first = len(z1), 2 * len(z1) * rank()                        # the first of this process's candidates
    z = F.normalize(_float32(torch.cat([z1, z2])), dim=1)           # 2N x d
    logits = z @ gather(z).T / tau                                  # 2N x 2N, or 2N x (2N * processes)
    anchor = torch.arange(2 * N, device=z.device)
    logits = logits.index_put((anchor, first + anchor), logits.new_full((), -torch.inf))
    return F.cross_entropy(logits, first + anchor.roll(N))          # the positive: the other view


# ---------------------------------------------------------------------------- 2  Gupta et al. 2022

def fit_head(loss_fn, optimizer: torch.optim.Optimizer, steps: int, start: list[Tensor] | None = None) -> Tensor:
    """The head as a parametric component of the InfoNCE objective: `steps` inner steps on phi, with h held fixed.

        min over theta of L(theta, phi*(theta)),   phi*(theta) = argmin over phi of L(theta, phi)

    loss_fn() computes L from detached h; optimizer holds phi alone: the encoder stays as it is. The caller then makes
    one step on theta, with phi held fixed (train_step in train.py). start: the values from which phi starts, its
    momentum 0; None: where it is. Where the head has a BatchNorm, each inner step moves its running statistics too,
    which `start` leaves as they are. Returns the loss that the last inner step started from (a detached scalar). Raises
    ValueError for steps < 1, and for a start of other shapes than phi.

    The paper makes the head a component of InfoNCE and derives another optimization from that [paper]. The equation is
    ours, and so are gradient steps, their number and start [reading]. At phi* dL/dphi = 0, hence dL(theta, phi*(theta))
    /dtheta = dL/dtheta there (the envelope theorem): no implicit differentiation. Short of phi* a term is missing;
    unroll_head has it. Behind a stop-gradient both levels do not minimize one L, and the inner steps are a heuristic.

    Were L the loss of all images, fitting and joint training would have the same minimizers and differ in their path
    alone. On a batch, after 2 steps dL/dtheta is nearly joint training's, and 20 steps fit phi to that batch (a test
    shows both). InfoNCE is free of the last layer's scale: with weight decay on phi there is no minimizer. Needs
    _restart.
    """
    _restart(optimizer, steps, start)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
    return loss.detach()


def unroll_head(loss_fn, heads: nn.Module, optimizer, steps: int, start=None) -> tuple[Tensor, Tensor]:
    """L(theta, phi_K(theta)), to be differentiated by theta through K = steps plain gradient steps on phi. [reading]

    loss_fn() computes L from h with its gradient and from `heads`, whose parameters are phi. A step is SGD's without
    momentum, with the optimizer's learning rate and weight decay; phi ends as phi_K. start: as in fit_head. Returns
    L(theta, phi_K) with its graph, and the loss that the last step started from. Raises what fit_head raises. Needs
    _restart.
    """
    _restart(optimizer, steps, start)
    call = nn.Module()                                      # functional_call takes a module: this one calls a function
    call.heads, call.forward = heads, lambda function: function()
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: group_of[p] for name, p in call.named_parameters()}
    phi = {name: p.detach().clone().requires_grad_() for name, p in call.named_parameters()}
    for _ in range(steps):
        inner = torch.func.functional_call(call, phi, (loss_fn,))
        gradients = torch.autograd.grad(inner, phi.values(), create_graph=True)
        phi = {name: p - groups[name]["lr"] * (gradient + groups[name]["weight_decay"] * p)
               for (name, p), gradient in zip(phi.items(), gradients)}
    with torch.no_grad():
        for name, p in call.named_parameters():
            p.copy_(phi[name])
    return torch.func.functional_call(call, phi, (loss_fn,)), inner.detach()


@torch.no_grad()
def _restart(optimizer: torch.optim.Optimizer, steps: int, start: list[Tensor] | None) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    phi = [p for group in optimizer.param_groups for p in group["params"]]
    if start is not None and [p.shape for p in phi] != [first.shape for first in start]:
        raise ValueError(f"start must be {len(phi)} tensors, of the shapes of the optimizer's parameters")
    for p, first in zip(phi, start or ()):
        p.copy_(first)
        optimizer.state[p].get("momentum_buffer", torch.zeros(())).zero_()


# ---------------------------------------------------------------------------- 3  Song et al. 2023

class SparseHead(MLP):
    """An MLP head, (N, D) -> (N, d), with a regularization term that constrains its sparsity [paper]:

        L = L_ssl + lambda * head.penalty()  [reading]

    The paper's SparseHead is the term itself, which adds to any SSL method [paper]; `sparsity` is it, for any head. The
    paper's form is not known to us. Ours is a norm of the first layer's weight, whose default pushes whole columns, one
    for each input feature, towards zero [reading]: the paper assumes that only a subset of features is necessary to
    minimize a mini-batch's loss [paper]. Needs MLP, sparsity.
    """

    def penalty(self, norm: str = "l21") -> Tensor:
        """R(W) of the first layer, a scalar >= 0; norm is a key of NORMS. [reading]"""
        return sparsity(self, norm)


def sparsity(head: nn.Module, norm: str = "l21") -> Tensor:
    """R(W), a scalar >= 0, of the first linear layer W (out, in) of any head; norm is a key of NORMS. [reading]

    "l21" is sum_i ||W_:,i|| / ||W||_F over input features i: 1 to sqrt(in), NaN where W is 0. Without the division
    ("l21-plain", the group lasso) shrinking all of W lowers R, and costs nothing where a normalization follows. Where a
    BatchNorm follows, the scale of each row of W is free (but for its eps), and R is that of W with unit rows: then the
    plain norms are the others times sqrt(out). R still changes where z does not: if h_i is scaled by s and W_:,i by
    1/s, as the encoder's last BatchNorm allows; in a head without BatchNorm, if W's row is and W2's column by 1/s.
    ValueError for another norm and for a head without linear layer. Needs NORMS, first_weight.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    W, free_rows = first_weight(head)
    return NORMS[norm](F.normalize(W, dim=1) if free_rows else W)


def first_weight(head: nn.Module) -> tuple[Tensor, bool]:
    """The weight (out, in) of the head's first linear layer, and whether a BatchNorm follows it, which makes the scale
    of its rows free. Raises ValueError where there is none."""
    layers = [m for m in head.modules() if not list(m.children())]
    for layer, after in zip(layers, [*layers[1:], None]):
        if isinstance(layer, nn.Linear):
            return layer.weight, isinstance(after, nn.modules.batchnorm._BatchNorm)
    raise ValueError("the head has no linear layer")


def fraction_pruned(head: nn.Module, h: Tensor) -> float:
    """The fraction, 0 to 1, of input features whose ||W_:,i|| sd(h_i) is below 1e-3 of the largest: W is the head's
    first layer, sd over the rows of h (M, D). ValueError where there is none. Needs first_weight. [reading]"""
    W, free_rows = first_weight(head)
    W = W.detach() * h.std(dim=0)                   # the same where a scale moves from h_i to W_:,i, as z is
    columns = (F.normalize(W, dim=1) if free_rows else W).norm(dim=0)   # and, before a BatchNorm, where a row is scaled
    return (columns < 1e-3 * columns.max()).float().mean().item()


# ---------------------------------------------------------------------------- 4  Wen & Li 2022

class OffDiagonal(nn.Module):
    """p = z + z (A * (1 - I))^T: (N, d) -> (N, d). An identity-initialized linear prediction head, A = 0, with only its
    off-diagonal entries trainable. [paper]

    Why it prevents dimensional collapse [paper]: a feature that one neuron has learned stands in, through the head, for
    the same feature in a second neuron (substitution); the second then learns the weaker features faster
    (acceleration). A test shows both, in the paper's simple setting. The diagonal is 1 by construction, whatever the
    optimizer does to A. Train A without weight decay, which would bring the head back to the identity by itself
    [reading]. In the simple setting A's learning rate is at most the encoder's [paper]; train.py's is ten times
    [reading].
    """

    def __init__(self, d: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(d, d))
        self.register_buffer("mask", 1 - torch.eye(d), persistent=False)

    @property
    def E(self) -> Tensor:
        """The off-diagonal part (d, d), its diagonal 0. Row j: how much of each other feature is added to feature j."""
        return self.A * self.mask

    def forward(self, z: Tensor) -> Tensor:
        return z + z @ self.E.T


def bn_mse(p: Tensor, z: Tensor, eps: float = 1e-12) -> Tensor:
    """||BN(p) - stopgrad BN(z)||^2 / d, mean over the batch: Wen & Li's loss with output normalization [paper]; 1/d is
    ours [reading].

    p (N, d) is of one view, z (N, d) of the other. BN is BatchNorm without affine, over the rows of all processes. The
    value is 2 - 2 * (mean correlation), 0 to 4, for any d. Raises ValueError for N = 1. Needs batch_norm.
    eps is small on purpose [reading]: with torch's 1e-5 a run of 40 epochs shrank z until eps hid it, and collapsed.
    """
    return F.mse_loss(batch_norm(p, eps), batch_norm(z.detach(), eps))


def batch_norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    """(N, d) -> (N * processes, d): all processes' rows, standardized in each feature. Needs gather, _float32."""
    return F.batch_norm(gather(_float32(z)), None, None, training=True, eps=eps)


# ---------------------------------------------------------------------------- 5  SimSiam, BYOL, Barlow Twins

class MLPPredictor(nn.Sequential):
    """p = W2 relu(BN(W1 z)): (N, d) -> (N, d), the form of SimSiam's and BYOL's predictor. [paper]

    The hidden width is d/4 [reading]. train.py puts a BatchNorm without affine before it, at g's end (--head-bn).
    Raises ValueError for N = 1 in training.
    """

    def __init__(self, d: int):
        hidden = max(1, d // 4)
        super().__init__(
            nn.Linear(d, hidden, bias=False),               # N x d/4
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, d),                           # N x d
        )


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, stopgrad(z)), mean over the batch, -1 to 1: SimSiam's loss [paper]. p (N, d) is of one view, z (N, d) of
    the other. Needs _float32."""
    return -F.cosine_similarity(_float32(p), _float32(z.detach()), dim=1).mean()


def barlow(z1: Tensor, z2: Tensor, lambd: float = 0.005) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2, C = BN(z1)^T BN(z2) / N (d, d): Barlow Twins, lambd too [paper].

    z1, z2: (N, d), row n of both from the same image. BN is BatchNorm without affine, and C a correlation, over all
    processes' rows. Returns a scalar >= 0. Raises ValueError for N = 1. Needs batch_norm.
    """
    a, b = batch_norm(z1), batch_norm(z2)
    C = a.T @ b / len(a)
    return (1 - C.diagonal()).square().sum() + lambd * (C - C.diagonal().diag()).square().sum()


# ---------------------------------------------------------------------------- 6  heads without weights, and a control

class SliceHead(nn.Module):
    """z = h[:, :d]: (N, D) -> (N, d), no weights. DirectCLR (2110.09348). [code]

    d is 360 of 2048 [code], and that fraction of any other D unless given [reading]. ValueError for d outside 1 to D.
    """

    def __init__(self, D: int, d: int | None = None):
        super().__init__()
        self.d = max(1, 360 * D // 2048) if d is None else d
        if not 1 <= self.d <= D:
            raise ValueError(f"cannot keep {d} of {D} features")

    def forward(self, h: Tensor) -> Tensor:
        return h[:, :self.d]


class ReweightHead(nn.Module):
    """z_i = kappa^-i h_i for i = 0 to D - 1, fixed: (N, D) -> (N, D). Xue et al. (2403.11391); kappa 1.05. [code]"""

    def __init__(self, D: int, kappa: float = 1.05):
        super().__init__()
        self.register_buffer("weight", kappa ** -torch.arange(float(D)), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight


class LinearPredictor(nn.Linear):
    """p = W z: (N, d) -> (N, d), all entries trainable, at random at first: the control for OffDiagonal. [reading]"""

    def __init__(self, d: int):
        super().__init__(d, d, bias=False)


# ---------------------------------------------------------------------------- 7  measures

def effective_rank(h: Tensor) -> float:
    """exp(entropy of the normalized singular values) of h (M, D): from 1 to min(M, D). RankMe (2210.02885) [paper].
    Needs on_cpu."""
    h = on_cpu(h if len(h) > h.shape[1] else h.T)
    s = torch.linalg.eigvalsh(h.T @ h).clamp(min=0).sqrt()          # the singular values, with less work
    s = s / s.sum().clamp(min=1e-300)                               # all zeros have rank 1
    return torch.special.entr(s).sum().exp().item()


def spread(z: Tensor) -> float:
    """sqrt(mean ||u||^2 - ||mean u||^2) of z's unit rows u (M, d): 0 where all point one way, 1 where they cancel.
    [reading] Needs on_cpu."""
    z = F.normalize(on_cpu(z), dim=1)
    return (z.square().sum(dim=1).mean() - z.mean(dim=0).square().sum()).clamp(min=0).sqrt().item()


def features_holding(energy: Tensor, fraction: float = 0.99) -> int:
    """How few features hold that fraction of an energy >= 0 (D,), largest first; 0 where all of it is 0. [reading]
    Needs on_cpu."""
    held = on_cpu(energy).sort(descending=True).values.cumsum(0)
    return int((held < fraction * held[-1]).sum()) + 1 if held[-1] > 0 else 0


def on_cpu(x: Tensor) -> Tensor:
    """x in float64, on the CPU: other devices may not have it."""
    return x.cpu().double()


# ---------------------------------------------------------------------------- 8  many processes, precision

def world_size() -> int:
    """How many processes train together, under torch.distributed; else 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0. Needs world_size."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(z: Tensor) -> Tensor:
    """(N, d) -> (N * processes, d): the rows of all processes under torch.distributed, z itself without. N is the same
    in each. The gradient flows back to the process of each row, summed over processes: if each one's loss is the mean
    over its own rows, or the loss of all, the mean of their gradients is the whole batch's. Needs world_size, _Gather.
    """
    return _Gather.apply(z) if world_size() > 1 else z


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, z.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, which trains on GPUs only (that branch has not run here), and the same on a CPU: statistics over the
    whole batch, of all processes. Needs gather, _float32."""

    def forward(self, x):
        if x.is_cuda or not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        M, dtype, x = dist.get_world_size() * x.numel() / x.shape[1], x.dtype, _float32(x)
        mean = gather(x.mean(dims)[None]).mean(0)
        x = x - mean.view(shape)
        var = gather(x.square().mean(dims)[None]).mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum), self.running_var.lerp_(var * M / (M - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        x = x * (var + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(dtype)


def synchronized(module: nn.Module) -> nn.Module:
    """The module; under torch.distributed each BatchNorm becomes a SyncBatchNorm. Needs world_size, SyncBatchNorm."""
    if world_size() > 1:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for m in module.modules():
            if isinstance(m, nn.SyncBatchNorm):
                m.__class__ = SyncBatchNorm
    return module


def _float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


# ---------------------------------------------------------------------------- what the flags of train.py name

ENCODERS = {
    "convnet": ConvNet,                                         # D = 512
    "convnet128": lambda: ConvNet((16, 32, 64, 128)),          # D = 128, no more than z has
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
}
HEADS: dict[str, type] = {
    "none": NoHead,
    "linear": LinearHead,
    "mlp": MLP,
    "parametric": MLP,           # the same network; train.py makes inner steps its default
    "sparse": SparseHead,
    "slice": SliceHead,
    "reweight": ReweightHead,
}
PREDICTORS: dict[str, type] = {
    "identity": nn.Identity,     # no prediction head: the control
    "offdiag": OffDiagonal,
    "linear": LinearPredictor,
    "mlp": MLPPredictor,
}
LOSSES = {"infonce": nt_xent, "barlow": barlow, "cosine": negative_cosine, "bn": bn_mse}
NORMS = {                        # of W (out, in)
    "l21": lambda W: W.norm(dim=0).sum() / W.norm(),             # over input features: whole columns
    "l1": lambda W: W.abs().sum() / W.norm(),                    # over single weights
    "l21-plain": lambda W: W.norm(dim=0).sum(),                  # group lasso
    "l1-plain": lambda W: W.abs().sum(),                         # lasso
}
