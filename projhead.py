# SPDX-License-Identifier: MIT
"""The heads of self-supervised learning: what they are, and what is optimized through them.

    x1, x2  two views of an image        (N, 3, H, W)
    h = f(x)   encoder                   (N, D)    kept after training; its parameters are theta
    z = g(h)   projection head           (N, d)    discarded; the parameters of g and q are phi
    p = q(z)   prediction head           (N, d)    discarded; without one the loss is contrastive

    none, linear, mlp         SimCLR (2002.05709)               the heads that the others are read against
    fit_head -> parametric    Gupta et al. 2022 (2212.11491)    the head as a part of the objective: phi is fitted first
    sparsity -> sparse        Song et al. 2023 (2307.08913)     a penalty that makes the head sparse
    OffDiagonal -> offdiag    Wen & Li 2022 (2205.06226)        starts as the identity, only off-diagonal entries train
    MLPPredictor -> mlp       SimSiam (2011.10566), BYOL (2006.07733)
    slice, reweight           DirectCLR (2110.09348), Xue et al. (2403.11391): heads without weights
    topk, discrete            Ouyang et al. (2503.00507): heads that pass on less of h
    directpred                Tian et al. (2102.06810): a prediction head that is computed, not trained

Each docstring says where it comes from: [paper] the paper states it, [code] a constant or formula of released
code, [reading] our choice where the paper is not known to us to say. Nothing here reads a file or knows a data set.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


# ---------------------------------------------------------------------------- encoders: x -> h

class ConvNet(nn.Sequential):
    """A small encoder that trains in minutes on a CPU: (N, 3, H, W) -> (N, 128). [reading]

    Each stage is convolution, pooling, BatchNorm, ReLU; pooling before BatchNorm leaves a quarter of the work.
    """
    dim = 128

    def __init__(self, widths=(16, 32, 64, 128)):
        layers, width = [], 3
        for i, w in enumerate(widths):
            layers += [nn.Conv2d(width, w, 3, padding=1, bias=False)]
            layers += [nn.MaxPool2d(2)] if i < len(widths) - 1 else []
            layers += [nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            width = w
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def encoder(arch: str = "resnet18", image_size: int = 32) -> nn.Module:
    """The encoder f: (N, 3, image_size, image_size) -> (N, encoder.dim), without a classifier.

    resnet18, resnet34 and resnet50 are torchvision's, with torchvision's parameter names. Up to 64 px the stem is
    SimCLR's for CIFAR, a 3x3 convolution of stride 1 and no max-pool (its appendix B.9 [paper]). Raises ValueError for another arch.
    """
    if arch == "convnet":
        return ConvNet()
    if arch not in ("resnet18", "resnet34", "resnet50"):
        raise ValueError(f"unknown encoder {arch!r}: choose from convnet, resnet18, resnet34, resnet50")
    f = getattr(torchvision.models, arch)(weights=None)
    if image_size <= 64:
        f.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        f.maxpool = nn.Identity()
    f.dim = f.fc.in_features
    f.fc = nn.Identity()
    return f


# ---------------------------------------------------------------------------- projection heads: h -> z

class NoHead(nn.Sequential):
    """z = h: (N, D) -> (N, D), SimCLR's control: the loss sits on the representation itself. [paper]"""

    def __init__(self, D: int):
        super().__init__()


class LinearHead(nn.Sequential):
    """z = W h: (N, D) -> (N, d). SimCLR's linear head [paper]; no bias [reading]."""

    def __init__(self, D: int, d: int = 128):
        super().__init__(nn.Linear(D, d, bias=False))


class MLP(nn.Sequential):
    """z = W2 relu(W1 h): (N, D) -> (N, d). SimCLR's head with one hidden layer [paper].

    hidden is 2 D unless given [reading], and d 128: for ResNet-18 the 512-1024-128 of simclr-cifar10 [code].
    """

    def __init__(self, D: int, d: int = 128, hidden: int | None = None):
        hidden = hidden or 2 * D
        super().__init__(
            nn.Linear(D, hidden),   # N x hidden
            nn.ReLU(),
            nn.Linear(hidden, d),   # N x d
        )


class SliceHead(nn.Sequential):
    """z = h[:, :d]: (N, D) -> (N, d), DirectCLR; no weights. [code]

    d is 360 of 2048 [code], and that share of any other D unless given [reading]. Raises ValueError for d outside 1 to D.
    """

    def __init__(self, D: int, d: int | None = None):
        d = max(1, 360 * D // 2048) if d is None else d
        if not 1 <= d <= D:
            raise ValueError(f"cannot keep {d} of {D} features")
        super().__init__(Slice(d))


class Slice(nn.Module):
    """The first d columns: (N, D) -> (N, d)."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d

    def forward(self, h: Tensor) -> Tensor:
        return h[:, :self.d]


class ReweightHead(nn.Sequential):
    """z_i = kappa^-i h_i, i = 0 to D - 1, fixed: (N, D) -> (N, D), Xue et al. 2024; kappa 1.05. [code]"""

    def __init__(self, D: int, kappa: float = 1.05):
        super().__init__(Reweight(D, kappa))


class Reweight(nn.Module):
    """Multiplies column i by kappa^-i: (N, D) -> (N, D)."""

    def __init__(self, D: int, kappa: float):
        super().__init__()
        self.register_buffer("weight", kappa ** -torch.arange(float(D)), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight


class TopKHead(nn.Sequential):
    """z = W2 top_k(relu(W1 h)): (N, D) -> (N, d), the sparse head of Ouyang et al. 2025. [code]

    Of the M = hidden features of a row the k largest are kept. M is 2 D, k an eighth of M, unless given [reading]; the
    width d of the output is that of our other heads, where theirs is D [reading]. k > M raises RuntimeError in forward.
    """

    def __init__(self, D: int, d: int = 128, hidden: int | None = None, k: int | None = None):
        hidden = hidden or 2 * D
        super().__init__(
            nn.Linear(D, hidden),               # N x M
            nn.ReLU(),
            TopK(k or max(1, hidden // 8)),     # N x M, k of them not 0
            nn.Linear(hidden, d),               # N x d
        )


class TopK(nn.Module):
    """Keeps the k largest of each row and sets the others to 0: (N, M) -> (N, M)."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        values, columns = x.topk(self.k, dim=1)
        return torch.zeros_like(x).scatter(1, columns, values)


class DiscreteHead(nn.Sequential):
    """z = round(tanh(BN(W2 relu(W1 h)))) to L levels: (N, D) -> (N, d), the discretized head of Ouyang et al. 2025. [code]

    The BatchNorm is ours [reading]: without it all outputs of a fresh MLP are near 0 and round to the same level. So is
    L = 5 [reading], and the widths are those of MLP. Raises ValueError for levels < 2.
    """

    def __init__(self, D: int, d: int = 128, hidden: int | None = None, levels: int = 5):
        hidden = hidden or 2 * D
        super().__init__(
            nn.Linear(D, hidden),               # N x hidden
            nn.ReLU(),
            nn.Linear(hidden, d),               # N x d
            nn.BatchNorm1d(d, affine=False),
            nn.Tanh(),
            Round(levels),                      # N x d
        )


class Round(nn.Module):
    """Rounds x in [-1, 1] to L levels 1 / (L // 2) apart; the gradient passes straight through: (N, d) -> (N, d).

    From -1 to 1 for odd L; an even L lacks the topmost level [reading]. Raises ValueError for levels < 2.
    """

    def __init__(self, levels: int):
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, not {levels}")
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        x = (self.levels - 1) / 2 * x - (0.5 if self.levels % 2 == 0 else 0)
        return (x + (x.round() - x).detach()) / (self.levels // 2)


# ---------------------------------------------------------------------------- prediction heads: z -> p

class OffDiagonal(nn.Module):
    """p = z + z (A * (1 - I))^T: (N, d) -> (N, d), Wen & Li 2022. [paper]

    A linear prediction head that starts as the identity (A = 0) and trains only its off-diagonal entries. The
    diagonal is 1 by construction, whatever the optimizer does to A. Train A without weight decay, since decay
    would itself bring the head back to the identity [reading]. In the paper's simple setting the rate of A is not
    larger than the encoder's [paper]; on short runs on real images we take it larger (train.py --predictor-lr).
    """

    def __init__(self, d: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(d, d))
        self.register_buffer("mask", 1 - torch.eye(d), persistent=False)

    @property
    def E(self) -> Tensor:
        """The off-diagonal part of the head, (d, d) with a zero diagonal; row j is how neuron j borrows from others."""
        return self.A * self.mask

    def forward(self, z: Tensor) -> Tensor:
        return z + z @ self.E.T


class LinearPredictor(nn.Linear):
    """p = W z: (N, d) -> (N, d), all entries trainable, from the usual random start. [reading]"""

    def __init__(self, d: int):
        super().__init__(d, d, bias=False)


class MLPPredictor(nn.Sequential):
    """p = W2 relu(BN(W1 z)): (N, d) -> (N, d), the predictor of SimSiam and BYOL [paper]; hidden width d/4 [reading]."""

    def __init__(self, d: int):
        super().__init__(
            nn.Linear(d, max(1, d // 4), bias=False),   # N x d/4
            nn.BatchNorm1d(max(1, d // 4)),
            nn.ReLU(),
            nn.Linear(max(1, d // 4), d),               # N x d
        )


class DirectPred(nn.Module):
    """p = W z, W = U diag(max(sqrt(s / s_max) + eps, 1e-4)) U^T: (N, d) -> (N, d), Tian et al. 2021. [code]

    Not trained: s, U are the eigenpairs of F, which after each step becomes rho F + (1 - rho) E[z z^T]; rho 0.3, eps
    0.01 [code]. That update is made in forward, in training mode, once p is computed (so in each inner step as well); E is
    the mean over the batch, both views, not centred, and F is 0, hence W = (1 + eps) I, at the start [reading].
    """

    def __init__(self, d: int, rho: float = 0.3, eps: float = 0.01):
        super().__init__()
        self.rho, self.eps = rho, eps
        self.register_buffer("F", torch.zeros(d, d))

    @property
    def W(self) -> Tensor:
        """The head as a symmetric matrix (d, d), without a gradient."""
        s, U = torch.linalg.eigh(self.F.double())       # ascending; float32 may fail where many are 0
        s = s.clamp(min=1e-30)                          # rounding makes some negative; where F = 0 all are equal
        return (U * ((s / s[-1]).sqrt() + self.eps).clamp(min=1e-4) @ U.T).to(self.F.dtype)

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            W, rows = self.W, gather(z.to(self.F.dtype))
            if self.training:
                self.F.lerp_(rows.T @ rows / len(rows), 1 - self.rho)
        return z.to(W.dtype) @ W


# ---------------------------------------------------------------------------- losses

def _at_least_float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def gather(z: Tensor) -> Tensor:
    """(N, d) -> (N * ranks, d): the rows of all ranks under torch.distributed, z itself without.

    The gradient flows back to the rank of each row, summed over ranks: so if every rank's loss is the mean over its
    own rows, or the loss of all rows, the mean of the ranks' gradients is the gradient of the whole batch's loss.
    """
    return _Gather.apply(z) if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else z


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


def nt_xent(z1: Tensor, z2: Tensor, tau: float = 0.5) -> Tensor:
    """InfoNCE as in SimCLR: -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ), s cosine, mean over 2N anchors. [paper]

    z1, z2: (N, d), row i of both from the same image; normalized here. Each anchor has 2N - 1 candidates: the pair
    (i, i) is masked out, not subtracted. Call it outside autocast. Under torch.distributed each rank computes its own
    rows against the gathered batch.
    """
    N = len(z1)
    z = F.normalize(_at_least_float32(torch.cat([z1, z2])), dim=1)   # 2N x d
    everything = gather(z)                                           # 2N * ranks x d
    first = 2 * N * dist.get_rank() if len(everything) > 2 * N else 0
    logits = z @ everything.T / tau                                  # 2N x 2N * ranks
    own = torch.arange(2 * N, device=z.device)
    logits = logits.index_put((own, own + first), logits.new_full((), -torch.inf))
    return F.cross_entropy(logits, own.roll(N) + first)              # anchor i's positive: the other view of its image


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, stopgrad(z)), mean over the batch; p, z (N, d); in [-1, 1]. SimSiam, and BYOL up to constants. [paper]"""
    return -F.cosine_similarity(_at_least_float32(p), _at_least_float32(z.detach()), dim=1).mean()


def bn_mse(p: Tensor, z: Tensor) -> Tensor:
    """||BN(p) - stopgrad BN(z)||^2 / d, mean over the batch: Wen & Li's output normalization. [paper]

    p, z: (N, d). BN is BatchNorm over the N rows (under torch.distributed over those of all ranks), without affine
    parameters or running statistics. The 1/d is ours [reading]: it makes the value 2 - 2 * (mean correlation), the
    scale of a cosine loss, whatever d is.
    """
    def bn(a):
        return F.batch_norm(gather(_at_least_float32(a)), None, None, training=True)
    return F.mse_loss(bn(p), bn(z.detach()))


# ---------------------------------------------------------------------------- what else is optimized, and how

def sparsity(head: nn.Module, norm: str = "l21", layer: int = 0) -> Tensor:
    """The penalty R(W) of Song et al. 2023, to be added to any loss as lambda * R; W (out, in) is a Linear of the head.

    The paper adds a term that constrains the head's sparsity [paper]. Which norm and which layer are a [reading]:
    "l21"        sum_i ||W_:,i|| / ||W||_F    selects input features: between 1 and sqrt(in)
    "l21-out"    sum_j ||W_j,:|| / ||W||_F    selects output units
    "l1"         sum_ij |W_ij|   / ||W||_F    selects single weights
    "l21-plain"  sum_i ||W_:,i||              not scale-free: where a normalization follows, it only shrinks W
    Raises ValueError for another norm, or where the head has no such Linear.
    """
    W = linear_weight(head, layer)
    if norm == "l21":
        return W.norm(dim=0).sum() / W.norm()
    if norm == "l21-out":
        return W.norm(dim=1).sum() / W.norm()
    if norm == "l1":
        return W.abs().sum() / W.norm()
    if norm == "l21-plain":
        return W.norm(dim=0).sum()
    raise ValueError(f"unknown norm {norm!r}: choose from l21, l21-out, l1, l21-plain")


def linear_weight(head: nn.Module, layer: int = 0) -> Tensor:
    """The weight (out, in) of the head's Linear number `layer`, from 0; raises ValueError where there is none."""
    weights = [m.weight for m in head.modules() if isinstance(m, nn.Linear)]
    if not 0 <= layer < len(weights):
        raise ValueError(f"the head has no Linear layer {layer}: it has {len(weights)}")
    return weights[layer]


def share_pruned(head: nn.Module, layer: int = 0) -> float:
    """The share of input features of that Linear whose column norm is below 1e-3 of the largest [reading]; in [0, 1]."""
    columns = linear_weight(head, layer).detach().norm(dim=0)
    return (columns < 1e-3 * columns.max()).float().mean().item()


def matrix_information(h: Tensor, z: Tensor) -> Tensor:
    """I = H(K_h) + H(K_z) - H(K_h * K_z), H(K) = -log(||K||_F^2 / N^2), to be added to any loss as lambda * I. [code]

    K = Z Z^T (N, N) of unit rows: the matrix information of h (N, D) and z (N, d), Ouyang et al. 2025.
    """
    def H(K):
        return -(K.square().sum() / len(K) ** 2).log()
    h, z = (F.normalize(gather(_at_least_float32(a)), dim=1) for a in (h, z))
    K_h, K_z = h @ h.T, z @ z.T
    return H(K_h) + H(K_z) - H(K_h * K_z)


def fit_head(loss_fn, optimizer: torch.optim.Optimizer, steps: int, wait: bool = True) -> float:
    """The head as a parametric component of the objective, Gupta et al. 2022: `steps` inner steps on phi.

    Once the encoder has run, loss_fn() computes the loss from detached h, and optimizer holds phi alone; so the
    encoder, its buffers included, stays as it is. The encoder step that follows holds phi fixed. Returns the loss that the
    last of the steps started from; without `wait` as a tensor, since a float has to wait for the GPU.
    The paper formulates the head as a component of InfoNCE and derives another optimization from it [paper]; ours
    is bilevel [reading]: V(theta) = min over phi of L(theta, phi), by warm-started gradient steps on the same batch.
    Where both levels minimize the same L, as with InfoNCE, dV/dtheta = dL/dtheta at the minimizing phi (the envelope
    theorem): no implicit differentiation is owed. Behind a stop-gradient there is no such L, and the steps are a
    heuristic. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
    return loss.item() if wait else loss.detach()


# ---------------------------------------------------------------------------- measures

def effective_rank(h: Tensor) -> float:
    """exp(entropy of the normalized singular values) of h (M, D), as RankMe (2210.02885) [paper]; from 1 to min(M, D)."""
    h = (h if len(h) > h.shape[1] else h.T).double()
    s = torch.linalg.eigvalsh(h.T @ h).clamp(min=0).sqrt()     # the singular values, far faster on a GPU
    s = s / s.sum().clamp(min=1e-300)       # all zeros have rank 1
    return torch.special.entr(s).sum().exp().item()


def seen(h: Tensor, W: Tensor, share: float = 0.99) -> float:
    """The share of the variance of h (M, D) that a layer W (out, D) looks at, in [0, 1]. [reading]

    That in the span of the fewest right singular vectors of W which hold `share` of ||W||_F^2: its row space, in effect.
    """
    _, s, V = torch.linalg.svd(W.double(), full_matrices=False)
    k = int((s.square().cumsum(0) < share * s.square().sum()).sum()) + 1
    h = h.double() - h.double().mean(dim=0)
    return ((h @ V[:k].T).square().sum() / h.square().sum()).item()


def spread(z: Tensor) -> float:
    """How far the rows of z (M, d) are from one direction: sqrt(1 - ||mean of unit rows||^2); 0 is collapsed, at most 1. [reading]"""
    return (1 - F.normalize(z.double(), dim=1).mean(dim=0).square().sum()).clamp(min=0).sqrt().item()


def alignment(z1: Tensor, z2: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere, Wang & Isola (2005.10242) [paper]; (M, d) each; 0 to 4."""
    return (F.normalize(z1, dim=1) - F.normalize(z2, dim=1)).square().sum(dim=1).mean().item()


def uniformity(z: Tensor) -> float:
    """log mean exp(-2 ||z_i - z_j||^2) over pairs on the unit sphere, Wang & Isola [paper]; z (M, d); 0 is collapsed."""
    z = F.normalize(z, dim=1)
    M = len(z)
    total = sum((-4 + 4 * rows @ z.T).double().exp().sum() for rows in z.split(1024))   # ||a - b||^2 = 2 - 2 a.b
    return ((total - M) / (M * (M - 1))).log().item()                                   # without the pairs (i, i)


HEADS: dict[str, type] = {
    "none": NoHead,
    "linear": LinearHead,
    "mlp": MLP,
    "parametric": MLP,   # fitted by fit_head: another optimization of the same network
    "sparse": MLP,       # plus lambda * sparsity: another objective for the same network
    "slice": SliceHead,
    "reweight": ReweightHead,
    "topk": TopKHead,
    "discrete": DiscreteHead,
}
PREDICTORS: dict[str, type] = {
    "identity": nn.Identity,   # no prediction head: the control
    "offdiag": OffDiagonal,
    "linear": LinearPredictor,
    "mlp": MLPPredictor,
    "directpred": DirectPred,
}
