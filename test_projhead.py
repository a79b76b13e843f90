# SPDX-License-Identifier: MIT
"""Oracles, the field's recurring bugs, and the papers' claims, executable: pytest, some three minutes on one core."""
import copy
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from torch import nn

import eval as evaluation
import projhead
import train
from projhead import HEADS, PREDICTORS

HERE = Path(__file__).parent
torch.set_num_threads(1)        # tiny tensors; a forked child has no more, and the bits depend on it
double = torch.float64


def randn(*shape, seed=0, dtype=double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Each test in a folder of its own, with 40 + 20 drawings where a user has 10,000 + 4,000."""
    real, sets = train.load_dataset, {part: train.draw_shapes(40 if part else 20, seed=int(part)) for part in (True, False)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_dataset", lambda name, root="data", train=True, size=64:
                        sets[train] if name == "shapes" else real(name, root, train, size))


def run(flags="", out="run"):
    """Train in this process: 4 steps of 8 images unless the flags say otherwise."""
    train.train(train.parse_args(f"--limit 16 --batch-size 8 --epochs 2 --out {out} {flags}".split()))
    return torch.load(f"{out}/checkpoint.pt", weights_only=True)


def flat(checkpoint, *names):
    return torch.cat([v.double().flatten() for name in names or ("encoder", "head", "predictor")
                      for v in checkpoint[name].values()] + [torch.zeros(1, dtype=double)])


# ---------------------------------------------------------------------------- losses

def naive_nt_xent(z1, z2, tau):
    z = [v / v.norm() for v in [*z1, *z2]]
    total, N = 0.0, len(z1)
    for i in range(2 * N):
        candidates = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * N) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[(i + N) % (2 * N)]) / tau) / candidates)
    return total / (2 * N)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("N", [1, 3, 8])     # the batch size is that of the tensors
def test_nt_xent_is_the_triple_loop(N, tau):
    z1, z2 = randn(N, 5), randn(N, 5, seed=1)
    assert projhead.nt_xent(z1, z2, tau).item() == pytest.approx(naive_nt_xent(z1, z2, tau), abs=1e-12)


@pytest.mark.parametrize("tau, value", [(0.1, 2.2483984631e-4), (0.5, 0.5643035000), (1.0, 1.1407751963)])
def test_nt_xent_reference_values(tau, value):
    i, j = torch.arange(4, dtype=double)[:, None], torch.arange(8, dtype=double)
    a = 0.7 * i * (j + 1) + 0.3 * j
    assert projhead.nt_xent(a.sin(), (a + 0.25 * (i + 2 * j).cos()).sin(), tau).item() == pytest.approx(value, abs=1e-10)


def test_nt_xent_masks_the_pair_with_itself():
    same = torch.ones(6, 4)
    assert projhead.nt_xent(same, same).item() == pytest.approx(math.log(2 * 6 - 1), abs=1e-6)
    z1, z2 = randn(6, 4, dtype=torch.float32), randn(6, 4, seed=1, dtype=torch.float32).requires_grad_()
    loss = projhead.nt_xent(z1, z2, tau=0.001)          # exp(1 / 0.001) overflows float32
    loss.backward()
    assert loss.isfinite() and z2.grad.isfinite().all()
    assert torch.autograd.gradcheck(projhead.nt_xent, (randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()))


def test_half_precision_in_float32_out():
    p, z = randn(8, 4, dtype=torch.float32).bfloat16(), randn(8, 4, seed=1, dtype=torch.float32).bfloat16()
    for loss in (projhead.nt_xent, projhead.negative_cosine, projhead.bn_mse):
        assert loss(p, z).dtype == torch.float32
        assert loss(p, z).item() == pytest.approx(loss(p.double(), z.double()).item(), abs=1e-5)


def test_negative_cosine_and_bn_mse():
    p, z = randn(7, 4).requires_grad_(), randn(7, 4, seed=1).requires_grad_()
    cosine = -sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(p, z)) / 7
    bn = lambda a: (a - a.mean(0)) / (a.var(0, unbiased=False) + 1e-5).sqrt()
    assert projhead.negative_cosine(p, z).item() == pytest.approx(cosine, abs=1e-12)
    assert projhead.bn_mse(p, z).item() == pytest.approx((bn(p) - bn(z)).square().sum(1).mean().item() / 4, abs=1e-12)
    assert projhead.bn_mse(3 * z + 1, z).item() == pytest.approx(0, abs=1e-9)
    for loss in (projhead.negative_cosine, projhead.bn_mse):
        p.grad = z.grad = None
        loss(p, z).backward()
        assert z.grad is None and p.grad.abs().sum() > 0     # the target is behind a stop-gradient


# ---------------------------------------------------------------------------- encoders and heads

@pytest.mark.parametrize("arch, D", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("convnet", 128)])
def test_encoder(arch, D):
    f = projhead.encoder(arch)
    assert f.dim == D and f(torch.rand(2, 3, 32, 32)).shape == (2, D)
    if arch != "convnet":       # the CIFAR stem for small images, torchvision's own above 64 px
        assert f.conv1.kernel_size == (3, 3) and f.conv1.stride == (1, 1) and isinstance(f.maxpool, nn.Identity)
        large = projhead.encoder(arch, 96)
        assert large.conv1.kernel_size == (7, 7) and isinstance(large.maxpool, nn.MaxPool2d)
        theirs = getattr(torchvision.models, arch)(weights=None)
        assert theirs.load_state_dict(large.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]


def test_heads_and_predictors_map_rows_to_rows():
    for name, head in HEADS.items():
        width = {"none": 16, "reweight": 16, "slice": 2}.get(name, 128)
        assert head(16)(torch.randn(4, 16)).shape == (4, width), name
    for name, predictor in PREDICTORS.items():
        assert predictor(16)(torch.randn(4, 16)).shape == (4, 16), name


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.5), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.5),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5)])
def test_offdiag_starts_as_the_identity_and_keeps_its_diagonal(optimizer):
    q, z = projhead.OffDiagonal(6), torch.randn(5, 6)
    assert torch.equal(q(z), z)                         # to the last bit
    step = optimizer(q.parameters())
    for i in range(5):
        step.zero_grad()
        projhead.negative_cosine(q(z), torch.randn(5, 6)).backward()
        step.step()
    W = q(torch.eye(6)).T                               # the whole head as a matrix
    assert torch.equal(W.diagonal(), torch.ones(6)) and torch.equal(W - torch.eye(6), q.E)
    assert q.E.abs().sum() > 0.1
    j, r = 2, 4
    assert torch.allclose(q(z)[:, j] - z[:, j], sum(q.E[j, r] * z[:, r] for r in range(6) if r != j), atol=1e-6)


def test_offdiag_entries_do_not_decay():
    """With a rate of zero for the loss's gradient there is nothing but decay: huge decay must leave A alone."""
    a, b = (run(f"--predictor offdiag --weight-decay {decay} --lr 0.01", f"decay{decay}") for decay in (0, 1))
    groups = b["optimizer_gq"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1, 0]
    assert a["predictor"]["A"].abs().sum() > 0 and b["predictor"]["A"].abs().sum() > 0


# ---------------------------------------------------------------------------- the neighbours

def test_slice_and_reweight_are_their_formulas():
    h = randn(5, 12)
    assert torch.equal(projhead.SliceHead(12, 4)(h), torch.stack([row[:4] for row in h]))
    for D, d in ((2048, 360), (512, 90), (128, 22), (2, 1)):
        assert projhead.SliceHead(D)(torch.zeros(1, D)).shape == (1, d)
    for bad in (0, 13):
        with pytest.raises(ValueError):
            projhead.SliceHead(12, bad)
    for kappa in (1.05, 2.0):
        z = projhead.ReweightHead(12, kappa)(h)
        assert all(z[n, i].item() == pytest.approx(h[n, i].item() / kappa ** i, rel=1e-6) for n in range(5) for i in range(12))
    assert projhead.ReweightHead(2048)(torch.ones(1, 2048)).isfinite().all()
    for head in (projhead.SliceHead(12), projhead.ReweightHead(12)):
        assert not list(head.parameters()) and not head.state_dict()


def test_topk_keeps_the_k_largest_and_their_gradient():
    head, h = projhead.TopKHead(6, 3, hidden=10, k=4).double(), randn(5, 6)
    x = head[1](head[0](h)).detach().requires_grad_()
    kept = torch.stack([torch.stack([v if v in sorted(row)[-4:] else 0 * v for v in row]) for row in x])
    assert torch.equal(head[2](x), kept) and torch.allclose(head(h), kept @ head[3].weight.T + head[3].bias)
    weight = randn(5, 10, seed=1)
    assert torch.equal(torch.autograd.grad((head[2](x) * weight).sum(), x)[0][kept > 0], weight[kept > 0])
    assert torch.equal(torch.autograd.grad((kept * weight).sum(), x)[0][kept > 0], weight[kept > 0])
    assert projhead.TopKHead(16)[2].k == 4 and projhead.TopKHead(1)[2].k == 1


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 33])
def test_discrete_rounds_to_its_levels_with_the_gradient_straight_through(levels):
    x = torch.linspace(-1, 1, 997, dtype=double).requires_grad_()
    z = projhead.Round(levels)(x)
    grid = [(i - levels // 2) / (levels // 2) for i in range(levels)]
    middle = (grid[0] + grid[-1]) / 2
    naive = torch.tensor([min(grid, key=lambda v: abs(middle + (grid[-1] - grid[0]) / 2 * a - v)) for a in x.tolist()], dtype=double)
    assert torch.allclose(z.unique(), torch.tensor(grid, dtype=double)) and (z.detach() - naive).abs().gt(1e-9).sum() <= levels
    z.sum().backward()                                  # as if nothing were rounded: the slope of the scaling
    assert torch.allclose(x.grad, torch.full_like(x, (levels - 1) / 2 / (levels // 2)))


def test_discrete_head_uses_its_levels_from_the_start():
    torch.manual_seed(0)
    head, h = projhead.DiscreteHead(128), torch.rand(64, 128).requires_grad_()
    z = head(h)
    assert z.unique().tolist() == [-1, -0.5, 0, 0.5, 1] and torch.equal(z, (2 * nn.Sequential(*list(head)[:5])(h)).round() / 2)
    projhead.nt_xent(*z.chunk(2)).backward()
    assert h.grad.isfinite().all() and head[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError):
        projhead.DiscreteHead(8, levels=1)


def test_directpred_is_its_formula():
    q, moments = projhead.DirectPred(5, rho=0.4, eps=0.02).double(), torch.zeros(5, 5, dtype=double)
    for step in range(4):
        z = randn(7, 5, seed=step)
        z[:, 3:] = z[:, :2] @ randn(2, 2, seed=9)       # of rank 3: two eigenvalues are 0 but for rounding
        p = q(z.requires_grad_())
        W = 1.02 * torch.eye(5, dtype=double)           # before anything has been seen
        if step:
            s, U = torch.linalg.eigh(moments)
            entries = [max(math.sqrt(max(v, 0) / max(s.tolist())) + 0.02, 1e-4) for v in s.tolist()]
            W = sum(e * torch.outer(u, u) for e, u in zip(entries, U.T))
        assert torch.allclose(p, torch.stack([W @ row for row in z]), atol=1e-6)
        assert torch.allclose(torch.autograd.grad(p[0, 0], z)[0][0], W[0], atol=1e-6)      # through z, not through W
        moments = 0.4 * moments + 0.6 * sum(torch.outer(row, row) for row in z.detach()) / 7
        assert torch.allclose(q.F, moments, atol=1e-12)
    q.eval()(z)
    assert torch.allclose(q.F, moments, atol=1e-12) and q.state_dict().keys() == {"F"} and not list(q.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert projhead.DirectPred(5)(z.detach().bfloat16()).isfinite().all()


def test_matrix_information_is_the_double_loop():
    h, z = randn(6, 5).requires_grad_(), randn(6, 3, seed=1).requires_grad_()
    def entropy(*several):
        return -math.log(sum(math.prod(F.cosine_similarity(a[i], a[j], dim=0).item() for a in several) ** 2
                             for i in range(6) for j in range(6)) / 36)
    value = projhead.matrix_information(h, z)
    assert value.item() == pytest.approx(entropy(h) + entropy(z) - entropy(h, z), abs=1e-12)
    value.backward()
    assert h.grad.abs().sum() > 0 and z.grad.abs().sum() > 0
    assert projhead.matrix_information(h, torch.ones(6, 2)).item() == pytest.approx(0, abs=1e-6)   # a constant z knows nothing of h


# ---------------------------------------------------------------------------- the head as a part of the objective

def bilevel():
    """A small problem whose inner part is convex: f linear with BatchNorm, g linear, logits g(h1) h2^T, and a ridge on g."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to(double)
    g = nn.Linear(4, 4, bias=False).to(double)
    x1 = randn(10, 6)
    x = torch.cat([x1, x1 + 0.5 * randn(10, 6, seed=1)])
    def loss(h):
        h1, h2 = h.chunk(2)
        return F.cross_entropy(g(h1) @ h2.T, torch.arange(10)) + 0.05 * g.weight.square().sum()
    return f, g, lambda: f(x), loss


def test_fit_head_lowers_the_loss_and_leaves_the_encoder_alone():
    f, g, encode, loss = bilevel()
    h = encode().detach()
    before, state = loss(h).item(), copy.deepcopy(f.state_dict())
    optimizer = torch.optim.SGD(g.parameters(), 0.1)
    losses = [projhead.fit_head(lambda: loss(h), optimizer, 3) for _ in range(3)]
    assert isinstance(losses[0], float) and before > losses[0] > losses[1] > losses[2]
    assert all(torch.equal(v, state[k]) for k, v in f.state_dict().items())     # parameters and buffers
    assert all(p.grad is None for p in f.parameters())
    with pytest.raises(ValueError):
        projhead.fit_head(lambda: loss(h), optimizer, 0)


def test_envelope_theorem():
    """dV/dtheta of V(theta) = min over phi of L(theta, phi), numerically, is dL/dtheta at the fitted phi, and only there."""
    f, g, encode, loss = bilevel()
    start, weight = copy.deepcopy(g.state_dict()), f[0].weight
    direction = randn(*weight.shape, seed=5)
    def fit(steps):
        g.load_state_dict(start)
        h = encode().detach()
        if steps:
            projhead.fit_head(lambda: loss(h), torch.optim.SGD(g.parameters(), 0.1, momentum=0.9), steps)
    def V(t):
        with torch.no_grad():
            weight.add_(t * direction)
        fit(500)
        value = loss(encode()).item()
        with torch.no_grad():
            weight.sub_(t * direction)
        return value
    numerical = (V(1e-4) - V(-1e-4)) / 2e-4
    def encoder_gradient(steps):
        fit(steps)
        return (torch.autograd.grad(loss(encode()), weight)[0] * direction).sum().item()
    assert encoder_gradient(500) == pytest.approx(numerical, rel=1e-5)
    assert abs(encoder_gradient(0) - numerical) > 0.05 * abs(numerical)


@pytest.mark.parametrize("flags", ["--head parametric", "--head linear", "--head mlp --predictor offdiag", "--head sparse"])
def test_inner_steps_move_the_heads_alone_and_encode_once(flags, monkeypatch):
    calls, moved, fit = [], [], projhead.fit_head
    forward = projhead.ConvNet.forward
    monkeypatch.setattr(projhead.ConvNet, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    def watched(loss_fn, optimizer, steps, wait):
        assert not wait                                 # a GPU would stand still
        before = {k: v.clone() for k, v in calls[-1].state_dict().items()}
        phi = [p.clone() for group in optimizer.param_groups for p in group["params"]]
        last = fit(loss_fn, optimizer, steps, wait)
        moved.append(any(not torch.equal(a, b) for a, b in zip(phi, (p for gr in optimizer.param_groups for p in gr["params"]))))
        assert all(torch.equal(v, before[k]) for k, v in calls[-1].state_dict().items())
        return last
    monkeypatch.setattr(projhead, "fit_head", watched)
    run(flags + " --inner-steps 3 --warmup 0")
    assert len(calls) == 4 and moved == [True] * 4      # one forward of the encoder for each of the four steps


def test_frozen_random_head_stays():
    a = run("--head mlp --head-lr 0 --weight-decay 0.1")
    g = train.build(train.argparse.Namespace(**a["args"]))[1]
    assert all(torch.equal(v, g.state_dict()[k]) for k, v in a["head"].items())


# ---------------------------------------------------------------------------- sparsity

def test_sparsity_values():
    head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    head[0].weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert projhead.sparsity(head).item() == pytest.approx(1)               # one column holds everything
    assert projhead.sparsity(head, "l21-out").item() == pytest.approx(7 / 5)
    assert projhead.sparsity(head, "l1").item() == pytest.approx(7 / 5)
    assert projhead.sparsity(head, "l21-plain").item() == pytest.approx(5)
    assert projhead.share_pruned(head) == 0.5
    head[2].weight.data.fill_(1)
    assert projhead.sparsity(head, layer=1).item() == pytest.approx(math.sqrt(2))
    projhead.sparsity(head).backward()                                      # a zero column has a gradient, not NaN
    assert head[0].weight.grad.isfinite().all()
    for bad in (lambda: projhead.sparsity(head, "l3"), lambda: projhead.sparsity(head, layer=2),
                lambda: projhead.sparsity(projhead.NoHead(4))):
        with pytest.raises(ValueError):
            bad()


def test_the_scale_free_penalty_prunes_and_the_plain_one_only_shrinks():
    """Ten input features, of which three tell the images apart; the loss normalizes, so the scale of W is free."""
    torch.manual_seed(0)
    signal = torch.randn(64, 3)
    def fitted(norm, lambd):
        torch.manual_seed(0)
        head = projhead.MLP(10, 8)
        optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        start = projhead.linear_weight(head).detach().norm().item()
        for step in range(600):
            optimizer.param_groups[0]["lr"] = train.learning_rate(step, 600, 0.05, 0.05)
            views = [torch.cat([signal + 0.1 * torch.randn(64, 3), torch.randn(64, 7)], dim=1) for _ in "12"]
            loss = projhead.nt_xent(*(head(v) for v in views)) + lambd * projhead.sparsity(head, norm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        W = projhead.linear_weight(head).detach()
        return projhead.share_pruned(head), W.norm(dim=0), W.norm().item() / start
    share, columns, _ = fitted("l21", 0.1)
    assert 0.5 <= share <= 0.7 and (columns[:3] > 1e-3 * columns.max()).all()   # of the seven, no signal
    share, _, shrunk = fitted("l21-plain", 0.1)
    assert share == 0 and shrunk < 0.7


def test_the_penalty_is_part_of_the_objective():
    c, d = run("--head mlp", "c"), run("--head mlp --information 0.5", "d")
    assert not torch.equal(c["head"]["0.weight"], d["head"]["0.weight"])
    a, b = run("--head mlp", "a"), run("--head mlp --sparsity 3", "b")
    line_a, line_b = (json.loads(Path(r, "metrics.jsonl").read_text().splitlines()[1]) for r in "ab")
    assert line_b["loss"] == pytest.approx(line_a["loss"] + 3 * line_b["penalty"], rel=0.05)
    assert not torch.equal(a["head"]["0.weight"], b["head"]["0.weight"])
    assert projhead.sparsity(nn.Sequential(torch.nn.Linear(1, 1))).item() == 1


# ---------------------------------------------------------------------------- measures

def test_effective_rank_alignment_uniformity():
    assert projhead.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert projhead.effective_rank(torch.outer(torch.rand(9), torch.rand(4))) == pytest.approx(1, abs=1e-4)
    p = torch.tensor([3.0, 1.0]) / 4
    assert projhead.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(-(p * p.log()).sum()))
    a, b = randn(50, 6), randn(50, 6, seed=1)
    assert projhead.alignment(a, 2 * a) == pytest.approx(0) and projhead.alignment(a, -a) == pytest.approx(4)
    assert projhead.alignment(a, b) == pytest.approx((F.normalize(a) - F.normalize(b)).norm(dim=1).square().mean().item())
    pairs = torch.pdist(F.normalize(a)).square()
    assert projhead.uniformity(a) == pytest.approx((-2 * pairs).exp().mean().log().item(), abs=1e-9)


def test_seen_and_spread():
    h = randn(200, 6) * torch.tensor([1, 2, 3, 1, 1, 1.0]) + 5
    W = torch.zeros(8, 6, dtype=double)
    W[0, 1], W[1, 2], W[2, 5] = 3, 4, 0.1               # the last holds less than 1 %
    variance = h.var(0)
    assert projhead.seen(h, W) == pytest.approx(((variance[1] + variance[2]) / variance.sum()).item())
    assert projhead.seen(h, W, 0.9999) > projhead.seen(h, W) > projhead.seen(h, W, 0.5)
    assert projhead.seen(h, torch.eye(6)) == pytest.approx(1)
    assert projhead.spread(torch.ones(5, 3)) == pytest.approx(0, abs=1e-7) and projhead.spread(torch.eye(4) - 0.25) == pytest.approx(1)
    assert projhead.spread(torch.tensor([[2.0, 0], [0, 3]])) == pytest.approx(math.sqrt(0.5))


# ---------------------------------------------------------------------------- augmentation

def test_resize_matrix_is_torchvisions_resized_crop():
    x = torch.rand(6, 3, 32, 32, dtype=double)
    boxes = [(0, 0, 32, 32), (3, 5, 20, 14), (31, 0, 1, 32), (10, 10, 7, 9), (0, 12, 16, 20), (7, 1, 25, 25)]
    for out in (32, 12):
        for image, (top, left, height, width) in zip(x, boxes):
            rows, columns = (train.resize_matrix(torch.full((1, 1, 1), float(a)), torch.full((1, 1, 1), float(n)), 32, out)[0].double()
                             for a, n in ((top, height), (left, width)))
            theirs = TF.resized_crop(image, top, left, height, width, [out, out], antialias=True)
            assert torch.allclose(rows @ image @ columns.T, theirs, atol=1e-6)


def test_blur_matrix_is_torchvisions():
    x, sigma = torch.rand(1, 3, 96, 96), 1.3
    kernel = train.blur_matrix(torch.full((1, 1, 1), sigma), 96)[:, None]
    assert torch.allclose(kernel @ x @ kernel.mT, TF.gaussian_blur(x, [9, 9], [sigma, sigma]), atol=1e-6)


def test_colour_operations_are_torchvisions():
    x, shift = torch.rand(8, 3, 16, 16), torch.linspace(-0.5, 0.5, 8)
    x[0] = 0.3                                          # gray has no hue
    for image, moved, by in zip(x, train.shift_hue(x, shift[:, None, None, None]), shift):
        assert torch.allclose(moved, TF.adjust_hue(image, by.item()), atol=1e-5)
    assert torch.allclose(train.to_gray(x), TF.rgb_to_grayscale(x), atol=1e-6)


def replay(images, seed, crop_scale, hue, grayscale):
    """augment() again, image by image, with torchvision's functions and the same random numbers in the same order."""
    g, N, S = torch.Generator().manual_seed(seed), len(images), images.shape[-1]
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, N, generator=g)
    area, ratio = uniform(crop_scale, 1, 10) * S * S, uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    place, flip, applied = [uniform(0, 1), uniform(0, 1)], uniform(0, 1) < 0.5, uniform(0, 1) < 0.8
    factors, shift, gray = 1 + uniform(-0.4, 0.4, 3), uniform(-hue, hue), uniform(0, 1) < grayscale
    order, views = torch.randperm(4, generator=g).tolist(), []
    blurred, sigma = (uniform(0, 1) < 0.5, uniform(0.1, 2)) if S > 64 else (torch.zeros(N), None)
    for n, image in enumerate(images):
        boxes = [(round((a / r).sqrt().item()), round((a * r).sqrt().item())) for a, r in zip(area[:, n], ratio[:, n])]
        height, width = next((b for b in boxes if max(b) <= S), (S, S))
        top, left = int(place[0][n] * (S - height + 1)), int(place[1][n] * (S - width + 1))
        x = TF.resized_crop(image.float() / 255, top, left, height, width, [S, S], antialias=True)
        x = TF.horizontal_flip(x) if flip[n] else x
        operations = [lambda x: TF.adjust_brightness(x, factors[0, n].item()), lambda x: TF.adjust_contrast(x, factors[1, n].item()),
                      lambda x: TF.adjust_saturation(x, factors[2, n].item()), lambda x: TF.adjust_hue(x, shift[n].item())]
        for i in order if applied[n] else []:
            x = operations[i](x)
        x = TF.rgb_to_grayscale(x, 3) if gray[n] else x
        x = TF.gaussian_blur(x, [2 * (S // 20) + 1] * 2, [sigma[n].item()] * 2) if blurred[n] else x
        views.append(TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return torch.stack(views)


@pytest.mark.parametrize("seed, size, crop", [(0, 32, 0.3), (1, 32, 0.3), (2, 32, 0.3), (3, 32, 1.0), (4, 96, 0.3)])
def test_augment_is_torchvision_image_by_image(seed, size, crop):
    images = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    images = F.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    ours = train.augment(images, torch.Generator().manual_seed(seed), crop, 0.2, 0.2)
    theirs = replay(images, seed, crop, 0.2, 0.2)
    assert torch.allclose(ours, theirs, atol=2e-3)      # hue is steep near gray
    assert (ours - theirs).abs().mean() < 1e-6


@pytest.mark.parametrize("size", [32, 96])
def test_the_ranks_share_one_batch_of_views(size):
    images = torch.randint(0, 256, (70, 3, size, size), dtype=torch.uint8)
    whole = train.augment(images, torch.Generator().manual_seed(0))
    shares = [train.augment(images[35 * r:35 * r + 35], torch.Generator().manual_seed(0), rank=r, ranks=2) for r in range(2)]
    assert torch.allclose(torch.cat(shares), whole, atol=1e-6)


@pytest.mark.parametrize("size", [32, 96])
def test_every_image_gets_its_own_view(size):
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8).expand(32, -1, -1, -1)
    x = train.augment(images, torch.Generator().manual_seed(0))
    assert x.shape == images.shape and x.dtype == torch.float32 and x.isfinite().all()
    assert torch.pdist(x.flatten(1)).min() > 1
    again = train.augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and not torch.equal(x, train.augment(images, torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------------------- training

@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("predictor", ["none", *PREDICTORS])
def test_every_combination_trains_saves_and_evaluates(head, predictor):
    for loss in ["infonce"] if predictor == "none" else ["infonce", "cosine", "bn"]:
        checkpoint = run(f"--head {head} --predictor {predictor} --loss {loss} --epochs 1", loss)
        assert checkpoint["step"] == 2 and flat(checkpoint).isfinite().all()
        assert not torch.equal(flat(checkpoint, "encoder"), torch.cat([
            *(v.double().flatten() for v in train.build(train.argparse.Namespace(**checkpoint["args"]))[0].state_dict().values()),
            torch.zeros(1, dtype=double)]))
        features = evaluation.features(loss, train.load_dataset("shapes", train=False)[0])
        layers = head != "none" or predictor != "none" and loss != "bn"     # the last for its --projector-bn
        expected = ["h"] + ["z"] * layers + ["p"] * (predictor != "none")
        assert [tap for tap in features if not tap.startswith("g")] == expected
    if head == "mlp" or predictor == "none":
        rows = evaluation.table(evaluation.load_run(loss))
        assert rows[0]["spectrum"][0] == 1 and len(rows[0]["spectrum"]) == 5 and rows[0]["spectrum"] == sorted(rows[0]["spectrum"])[::-1]
        assert rows[-1]["tap"] == "h untrained" and {"linear shape", "linear hue", "knn20 shape", "rank"} <= rows[0].keys()


METHODS = ["--head mlp", "--head parametric --inner-steps 2", "--head sparse", "--head mlp --predictor mlp --target ema",
           "--head mlp --predictor offdiag", "--head discrete --predictor directpred"]


def same_run(a, b):
    names = [n for n in ("encoder", "head", "predictor", "target") if (n in torch.load(f"{a}/checkpoint.pt"))]
    bits = [flat(torch.load(f"{r}/checkpoint.pt", weights_only=True), *names) for r in (a, b)]
    logs = [[json.loads(line) for line in Path(r, "metrics.jsonl").read_text().splitlines()] for r in (a, b)]
    return torch.equal(*bits) and [line.get("epoch") for line in logs[0]] == [line.get("epoch") for line in logs[1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", METHODS)
def test_a_signal_saves_after_the_step_and_the_printed_command_continues(flags, number, monkeypatch, capsys):
    flags = f"{flags} --limit 40 --batch-size 8 --epochs 2".split()
    train.train(train.parse_args([*flags, "--out", "whole"]))
    views, handlers = train.views, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    def interrupted(images, args, steps, *rest):
        for step, x in zip(steps, views(images, args, steps, *rest)):
            if step == 7:                               # in the middle of the second epoch
                signal.raise_signal(number)
                assert signal.getsignal(number) == signal.SIG_DFL    # a second one would quit at once
            yield x
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--out", "parts"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.train(train.parse_args(sys.argv[1:]), interrupted)
    assert stop.value.code == 128 + number and [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load("parts/checkpoint.pt", weights_only=True)["step"] == 8 and not same_run("whole", "parts")
    command = capsys.readouterr().err.split("this continues: ")[1]
    train.train(train.parse_args(shlex.split(command)[2:]))
    assert same_run("whole", "parts")


def in_a_child(action, seconds=None):
    """Run it in a forked process; SIGKILL that after `seconds`. Returns whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("flags", [METHODS[0], METHODS[1], METHODS[3]])
def test_killed_at_random_moments_it_ends_with_the_same_bits(flags):
    def whole(out):
        run(flags + " --epochs 12", out)
    began = time.perf_counter()
    assert in_a_child(lambda: whole("whole"))
    lasts, moments, kills = time.perf_counter() - began, random.Random(0), 0
    while kills < 7 or not in_a_child(lambda: whole("parts")):
        kills += not in_a_child(lambda: whole("parts"), moments.uniform(0, lasts))
        if same_run("whole", "parts") if Path("parts/checkpoint.pt").exists() else False:
            shutil.rmtree("parts")                      # it was done: again
    assert same_run("whole", "parts")


@pytest.mark.parametrize("killer", ["fsync", "replace", "replaced"])
def test_killed_while_it_writes(killer):
    run("--head mlp --epochs 3", "whole")
    def dies_at(count):
        real, calls = getattr(os, killer.removesuffix("d")), []
        def deadly(*args):
            calls.append(args)
            if killer == "replaced":
                real(*args)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return None if killer == "replaced" else real(*args)
        setattr(os, killer.removesuffix("d"), deadly)
        run("--head mlp --epochs 3", "parts")
    for count in (3, 4, 1, 2):                          # the log's and the checkpoint's, after an epoch and at the start
        assert not in_a_child(lambda: dies_at(count))
        for line in Path("parts/metrics.jsonl").read_text().splitlines():
            json.loads(line)
        evaluation.load_run("parts")
    run("--head mlp --epochs 3", "parts")
    assert same_run("whole", "parts")


def test_a_full_disk_loses_nothing(capsys):
    run("--head mlp --epochs 4", "whole")
    save, limits = train.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(path, checkpoint):
        if checkpoint["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        save(path, checkpoint)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "save", full)
        train.main(lambda: run("--head mlp --epochs 4", "parts"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: cannot write parts/checkpoint.pt: File too large") and error.count("\n") == 1
    assert torch.load("parts/checkpoint.pt", weights_only=True)["step"] == 4 and not list(Path("parts").glob("*.tmp"))
    run("--head mlp --epochs 4", "parts")
    assert same_run("whole", "parts")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


HOSTILE = {
    "code": lambda c: Bomb(),
    "code inside": lambda c: c | {"extra": Bomb()},
    "a list": lambda c: [1, 2],
    "no args": lambda c: {k: v for k, v in c.items() if k != "args"},
    "no head": lambda c: {k: v for k, v in c.items() if k != "head"},
    "no step": lambda c: {k: v for k, v in c.items() if k != "step"},
    "a wild step": lambda c: c | {"step": -7},
    "a step in words": lambda c: c | {"step": "two"},
    "args of another kind": lambda c: c | {"args": c["args"] | {"hue": "blue"}},
    "args out of range": lambda c: c | {"args": c["args"] | {"dim": 10**12}},
    "args unknown": lambda c: c | {"args": c["args"] | {"shell": "ls"}},
    "a missing key": lambda c: c | {"encoder": {k: v for k, v in c["encoder"].items() if k != "0.weight"}},
    "another shape": lambda c: c | {"encoder": c["encoder"] | {"0.weight": torch.zeros(16, 3, 5, 5)}},
    "an encoder of words": lambda c: c | {"encoder": "resnet"},
    "another arch": lambda c: c | {"encoder": projhead.encoder("resnet18").state_dict()},
    "another head": lambda c: c | {"head": projhead.LinearHead(128).state_dict()},
    "another arch in args": lambda c: c | {"args": c["args"] | {"encoder": "resnet18"}},
}


@pytest.mark.parametrize("name", [*HOSTILE, "cut short", "empty", "noise", "an optimizer of another shape"])
def test_a_hostile_checkpoint_is_refused_in_one_line(name, capsys, monkeypatch):
    checkpoint, path = run("--head mlp") | {"step": 2}, Path("run/checkpoint.pt")      # half done, so that it continues
    whole = path.read_bytes()
    if name in HOSTILE:
        torch.save(HOSTILE[name](checkpoint), path)
    elif name.startswith("an optimizer"):
        checkpoint["optimizer_f"]["state"][0]["momentum_buffer"] = torch.zeros(2)
        torch.save(checkpoint, path)
    else:
        path.write_bytes({"cut short": whole[:len(whole) // 2], "empty": b"", "noise": random.Random(0).randbytes(5000)}[name])
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["eval.py", "run"])
    actions = [lambda: run("--head mlp")] + [evaluation.main] * (not name.startswith("an optimizer"))
    for action in actions:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(action)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert path.read_bytes() == before and not Path("ran").exists()


def test_eval_reads_whole_checkpoints_of_a_run_that_is_being_written():
    checkpoint = run("--head mlp")
    def filled(value):
        return checkpoint | {"encoder": {k: torch.full_like(v, value) for k, v in checkpoint["encoder"].items()}}
    def writes():
        for i in range(10**6):
            train.save(Path("run/checkpoint.pt"), filled(i % 2))
    train.save(Path("run/checkpoint.pt"), filled(0))
    reader, seen = os.getpid(), set()
    writer = os.fork()
    if writer == 0:
        try:
            writes()
        finally:
            os._exit(1)
    for _ in range(60):
        values = flat({"encoder": evaluation.load_run("run").encoder.state_dict()}, "encoder")[:-1].unique()
        assert len(values) == 1
        seen.add(values.item())
    os.kill(writer, signal.SIGKILL), os.waitpid(writer, 0)
    assert seen == {0.0, 1.0} and reader == os.getpid()


def test_out_of_memory_names_the_batch_size(monkeypatch, capsys):
    def forward(self, x):
        return torch.empty(2**60)                       # the CPU allocator's own error
    monkeypatch.setattr(projhead.ConvNet, "forward", forward)
    monkeypatch.setattr(sys, "argv", "train.py --head mlp --limit 16 --batch-size 16 --out run".split())
    with pytest.raises(SystemExit) as stop:
        train.main(train.run)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error == "error: out of memory with --batch-size 16: try --batch-size 8\n"


def test_a_collapsing_run_warns_once_and_goes_on(capsys):
    run("--predictor identity --loss cosine --projector-bn no --lr 10 --limit 40 --epochs 30")
    error = capsys.readouterr().err
    assert error.startswith("warning: the features collapse: their spread is 0.0") and error.count("\n") == 1


def test_ema_is_an_average_and_keeps_its_own_buffers():
    a = run("--head mlp --predictor mlp --target ema --ema 1")
    f, g, _ = train.build(train.argparse.Namespace(**a["args"]))
    slow, untrained = a["target"], nn.Sequential(f, g).state_dict()
    assert all(torch.equal(v, untrained[k]) for k, v in slow.items() if "running" not in k and "num" not in k)
    assert not torch.equal(slow["0.2.running_mean"], untrained["0.2.running_mean"])
    b = run("--head mlp --predictor mlp --target ema --ema 0 --epochs 1", "b")     # momentum 0 and then 1/2: in between
    assert not torch.equal(b["target"]["0.0.weight"], b["encoder"]["0.weight"])


RANK_WORKER = """
import sys, torch, train
build, augment = train.build, train.augment     # in float64, where rounding does not grow into a difference
train.build = lambda args: [m.double() for m in build(args)]
train.augment = lambda *args: augment(*args).double()
train.load_dataset = lambda *_: train.draw_shapes(40, 1)
for number, flags in enumerate(sys.argv[2:]):
    train.train(train.parse_args([*flags.split(), "--out", f"{sys.argv[1]}{number}"]))
if train.RANKS > 1: torch.distributed.destroy_process_group()
"""


def test_two_processes_train_what_one_does(tmp_path):
    """5 steps of 8 images, on gloo: the number of processes changes the speed, not the result."""
    common = "--limit 40 --batch-size 8 --epochs 1 --lr 3 --warmup 0 "
    flags = [common + f for f in ("--head mlp", "--head parametric --inner-steps 2", "--head sparse",
                                  "--head mlp --predictor mlp --target ema", "--head linear --predictor offdiag")]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    def start(out, **env):
        return subprocess.Popen([sys.executable, "-c", RANK_WORKER, out, *flags], cwd=tmp_path,
                                env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | env)
    workers = [start("two", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
               for rank in "01"] + [start("one")]
    assert [w.wait(120) for w in workers] == [0, 0, 0]
    for number in range(len(flags)):
        one, two = (torch.load(f"{name}{number}/checkpoint.pt", weights_only=True) for name in ("one", "two"))
        names = [n for n in one if n in ("encoder", "head", "predictor", "target")]
        untrained = dict(zip(names, map(nn.Module.state_dict, train.build(train.argparse.Namespace(**one["args"])))))
        assert one["step"] == two["step"] == 5
        assert (flat(one, "encoder") - flat(untrained, "encoder")).abs().max() > 0.01
        assert torch.allclose(flat(one, *names), flat(two, *names), rtol=0, atol=1e-10), flags[number]
        a, b = ([json.loads(line) for line in Path(f"{name}{number}/metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))
        assert b[0]["processes"] == 2 and len(b) == 2
        for key in ("loss", "rank_h", "rank_z", "spread_z"):
            assert a[1][key] == pytest.approx(b[1][key], abs=2e-6), key


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(train, "RANKS", 2)
    with pytest.raises(train.UserError, match="15 does not divide evenly over 2 processes"):
        train.train(train.parse_args(["--batch-size", "15"]))


def test_a_leftover_world_size_is_not_torchrun():
    code = "import train; assert (train.RANK, train.RANKS) == (0, 1)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | {"WORLD_SIZE": "2", "RANK": "x"}, check=True)


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a device, "meta" standing in for a GPU; reading a value of it raises anyway.
    A constant built there, as by new_tensor, is seen by newer torch only (2.15 yes, 2.11 no)."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        built_there = func is torch.ops.aten.lift_fresh.default and args[0].device.type == "meta"
        if built_there or to_host and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            raise AssertionError(f"{func} waits")
        return func(*args, **kwargs)


@pytest.mark.parametrize("flags", ["--head parametric", "--head sparse --predictor offdiag", "--predictor mlp", "--dataset stl10 --encoder resnet18"])
def test_nothing_in_a_step_waits_for_the_device(flags):
    args = train.parse_args(flags.split())
    f, g, q = (m.to("meta") for m in train.build(args))
    images = torch.zeros(100, 3, args.image_size, args.image_size, dtype=torch.uint8, device="meta")
    optimizer = torch.optim.SGD([*g.parameters(), *q.parameters()], 0.1, momentum=0.9)
    with NoWaiting():
        for x in train.views(images, args, range(2), 2, 50, torch.device("meta")):
            h = f(x)
            def objective():
                z = g(h.detach())
                loss = {"infonce": projhead.nt_xent, "bn": projhead.bn_mse, "cosine": projhead.negative_cosine}[args.loss](*q(z).chunk(2))
                return loss + projhead.sparsity(g) if args.sparsity else loss
            assert projhead.fit_head(objective, optimizer, 2, wait=False).device.type == "meta"
        with pytest.raises(AssertionError):
            torch.zeros(1).to("meta")
    with pytest.raises(RuntimeError):
        projhead.fit_head(objective, optimizer, 2)


def test_training_does_not_read_labels(monkeypatch):
    class Poison:
        def __getattribute__(self, name):
            raise AssertionError("a label was read")
    images = train.load_dataset("shapes")[0]
    a = run("--head mlp", "a")
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: (images, Poison()))
    assert torch.equal(flat(run("--head mlp", "b")), flat(a))


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[10] == 2.0 and rates[0] < rates[5] < rates[9] < 2 and rates[99] < 0.001
    assert rates[55] == pytest.approx(1.0) and all(b <= a for a, b in zip(rates[10:], rates[11:]))


def test_a_set_smaller_than_a_batch_is_one_batch():
    checkpoint = run("--limit 5 --batch-size 64 --head mlp")
    assert checkpoint["step"] == 2
    assert run("--limit 13 --batch-size 5 --epochs 1 --head mlp", "b")["step"] == 2     # the short batch is left out


def test_metrics_and_checkpoint_say_what_was_run():
    run("--head sparse --predictor offdiag --inner-steps 1", "m")
    first, *epochs = [json.loads(line) for line in Path("m/metrics.jsonl").read_text().splitlines()]
    assert {"command", "args", "torch", "torchvision", "python", "device", "processes", "threads", "images"} == first.keys()
    keys = {"epoch", "step", "loss", "inner_loss", "lr", "rank_h", "rank_z", "spread_h", "spread_z", "offdiag", "penalty", "pruned",
            "seconds", "views_per_s", "overhead", "memory"}
    assert all(line.keys() == keys for line in epochs) and epochs[1]["offdiag"] > 0
    assert all(0 < line["overhead"] < 1 and 0.01 < line["memory"] < 1000 for line in epochs)
    readme = (HERE / "README.md").read_text()
    for key in keys | first.keys():
        assert f"`{key}`" in readme, f"README.md does not explain {key}"


def test_the_encoder_of_a_checkpoint_loads_without_us():
    checkpoint = run("--head mlp --encoder resnet18 --limit 4 --batch-size 2 --epochs 1")
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    theirs.load_state_dict(checkpoint["encoder"])
    run_ = evaluation.load_run("run")
    images = train.load_dataset("shapes", train=False)[0]
    h = theirs.eval()(train.normalize(images.float() / 255))
    assert torch.allclose(h, evaluation.features(run_, images)["h"], atol=1e-4)


# ---------------------------------------------------------------------------- evaluation

def test_evaluation_moves_nothing():
    checkpoint, before = run("--head mlp"), Path("run/checkpoint.pt").read_bytes()
    frozen = evaluation.load_run("run")
    images = train.load_dataset("shapes")[0]
    alone, together = evaluation.features(frozen, images, batch_size=1), evaluation.features(frozen, images)
    assert torch.allclose(alone["z"], together["z"], atol=1e-5)      # running statistics, not those of the batch
    evaluation.table(frozen)
    assert all(torch.equal(v, checkpoint["encoder"][k]) for k, v in frozen.encoder.state_dict().items())
    assert not any(p.requires_grad for p in frozen.encoder.parameters())
    assert Path("run/checkpoint.pt").read_bytes() == before
    def drift(x, forward=frozen.encoder.forward):
        frozen.encoder[2].running_mean.add_(1)
        return forward(x)
    frozen.encoder.forward = drift
    with pytest.raises(RuntimeError):
        evaluation.features(frozen, images)


def blobs(M, seed, classes=4, dim=6, noise=1.0):
    y = torch.randint(classes, (M,), generator=torch.Generator().manual_seed(seed))
    return (randn(classes, dim, seed=99)[y] * 2 + noise * randn(M, dim, seed=seed + 1)).float(), y


def test_linear_probe_converges_and_never_sees_the_test_labels():
    (x, y), (tx, ty) = blobs(400, 0), blobs(300, 10)
    accuracy, l2 = evaluation.linear_probe(x, y, tx, ty)
    assert accuracy > 90 and l2 in evaluation.L2 and (accuracy, l2) == evaluation.linear_probe(x, y, tx, ty)
    by_class = [evaluation.linear_probe(x, y, tx, torch.full_like(ty, c)) for c in range(4)]
    assert sum(a for a, _ in by_class) == pytest.approx(100, abs=1e-3) and {b for _, b in by_class} == {l2}
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert evaluation.linear_probe(x, shuffled, tx, ty)[0] < 50     # nothing to learn: near chance, 25
    x = torch.cat([x, torch.ones(400, 1), x[:, :1] + 1e-3 * x[:, 1:2]], 1).double()     # constant, and nearly the same
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    W = evaluation.fit_logistic(x, y, 4, 1e-3).requires_grad_()
    loss = F.cross_entropy(F.linear(x, W[:, :-1], W[:, -1]), y) + 1e-3 / 2 * W[:, :-1].square().sum()
    assert torch.autograd.grad(loss, W)[0].abs().max() < 1e-3


def test_knn_is_the_naive_vote():
    (x, y), (tx, ty) = blobs(60, 0, noise=3), blobs(40, 10, noise=3)
    for k in (1, 5, 500):
        right = 0
        for a, label in zip(tx, ty):
            near = sorted(range(60), key=lambda i: -float(F.cosine_similarity(a, x[i], dim=0)))[:k]
            votes = [sum(int(y[i]) == c for i in near) for c in range(4)]
            right += votes.index(max(votes)) == int(label)
        assert evaluation.knn(x, y, tx, ty, k) == pytest.approx(100 * right / 40)


def test_transformations_are_torchvisions_image_by_image():
    for S in (32, 9):
        x = torch.rand(16, 3, S, S)
        half, y = S // 2, torch.arange(16) % 4
        corners = [(0, 0), (0, S - half), (S - half, 0), (S - half, S - half)]
        naive = {"rotation": lambda image, k: TF.rotate(image, 90.0 * k),
                 "flip": lambda image, k: TF.horizontal_flip(image) if k else image,
                 "gray": lambda image, k: TF.rgb_to_grayscale(image, 3) if k else image,
                 "quadrant": lambda image, k: TF.resized_crop(image, *corners[k], half, half, [S, S], antialias=True)}
        assert naive.keys() == evaluation.TRANSFORMS.keys()
        for name, (transform, classes) in evaluation.TRANSFORMS.items():
            before, some = x.clone(), y % classes
            theirs = torch.stack([naive[name](image, k) for image, k in zip(x, some.tolist())])
            assert torch.allclose(transform(x, some), theirs, atol=1e-5), (name, S)
            assert torch.equal(x, before) and not torch.allclose(theirs, x)


def test_transform_probes_read_what_can_be_read_and_nothing_else(monkeypatch):
    """Four corners of a fixed colour each tell every transformation apart; noise tells none but gray."""
    corners = F.interpolate(randn(1, 3, 2, 2, seed=3).sigmoid() * 255, scale_factor=8)
    noise = lambda M, seed: torch.randint(0, 256, (M, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    sets = {"corners": lambda M, seed: (corners + noise(M, seed) / 8 - 16).clamp(0, 255).to(torch.uint8), "noise": noise}
    f = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12)).eval()
    for data in ("corners", "noise"):
        def load(name, root, part, size):
            return sets[data](1200 if part else 600, seed=int(part)), None          # no labels
        monkeypatch.setattr(train, "load_dataset", load)
        args = train.argparse.Namespace(dataset=data, data="", image_size=16, limit=1000, predictor="none")
        some = train.argparse.Namespace(args=args, encoder=f, untrained=copy.deepcopy(f), head=nn.Sequential(nn.Identity(), nn.Tanh()),
                                        predictor=nn.Identity())
        rows = {row["tap"]: row for row in evaluation.transform_table(some)}
        assert list(rows) == ["h", "g[0]", "z", "h untrained", "chance"] and rows["g[0]"]["layer"] == "Identity"
        for name in evaluation.TRANSFORMS:
            if data == "corners":
                assert rows["h"][name] > 99, name
            elif name != "gray":
                assert abs(rows["h"][name] - rows["chance"][name]) < 8, name
        assert rows["h"] | {"tap": ""} == rows["h untrained"] | {"tap": ""} == evaluation.transform_table(some)[0] | {"tap": ""}
        assert [rows["chance"][name] for name in evaluation.TRANSFORMS] == [25, 50, 50, 25]


def test_transform_probes_from_the_command_line_without_labels(tmp_path, monkeypatch, capsys):
    from PIL import Image
    (tmp_path / "flat").mkdir()
    for i in range(30):
        Image.new("RGB", (9, 12), (5 * i, 200, 3 * i)).save(tmp_path / "flat" / f"{i}.png")
    run(f"--dataset folder --data {tmp_path}/flat --image-size 16 --encoder convnet --limit 6 --batch-size 4 --predictor mlp")
    seen, features = set(), evaluation.features
    monkeypatch.setattr(evaluation, "features", lambda run, images, view: seen.add(len(images)) or features(run, images, view))
    monkeypatch.setattr(evaluation, "PROBED", 5)
    tests = len(train.load_dataset("folder", tmp_path / "flat", train=False)[0])
    capsys.readouterr()
    for words in ("run --probe transform --json", "run --probe transform"):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words.split()])
        evaluation.main()
        out = capsys.readouterr().out
        if "--json" in words:
            rows = json.loads(out)["rows"]
    assert seen == {5, min(5, tests)}
    assert {"h", "z", "p", "h untrained", "chance"} <= {row["tap"] for row in rows}
    lines = out.splitlines()
    assert lines[1].split() == ["tap", "layer", "dim", *evaluation.TRANSFORMS] and len(lines) == 2 + len(rows)
    assert lines[-1].split() == ["chance", "0", "25.0", "50.0", "50.0", "25.0"]


@pytest.mark.parametrize("head, limit, n", [("mlp", 16, 8), ("mlp", 5, 8), ("none", 16, 8), ("mlp", 16, 1)])
def test_neighbors_are_drawn_in_their_places(head, limit, n, monkeypatch, capsys):
    from PIL import Image
    run(f"--head {head} --limit {limit} --batch-size 4", "drawn")
    Path("out.png").write_text("the file that was named is replaced")
    before = {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file() and f.name != "out.png"}
    if n == 8:
        monkeypatch.setattr(sys, "argv", "eval.py drawn --neighbors out.png".split())
        evaluation.main()
    else:
        evaluation.draw_neighbors(evaluation.load_run("drawn"), "out.png", n=n)
    assert before == {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file() and f.name != "out.png"}
    picture = torchvision.transforms.functional.pil_to_tensor(Image.open("out.png"))
    (train_images, _), (test_images, _) = train.load_dataset("shapes"), train.load_dataset("shapes", train=False)
    frozen, k, taps = evaluation.load_run("drawn"), min(limit, 8), ["h"] if head == "none" else ["h", "z"]
    a, b = evaluation.features(frozen, train_images[:limit]), evaluation.features(frozen, test_images)
    outer = 8 * (n > 1)                                 # make_grid does not frame a single block
    assert picture.shape == (3, outer + n * (34 * len(taps) + 2 + outer), 2 * outer + 34 * (k + 2) + 2)
    for i in range(n):
        for r, tap in enumerate(taps):
            top = outer + i * (34 * len(taps) + 2 + outer) + 2 + 34 * r
            near = sorted(range(limit), key=lambda j: -F.cosine_similarity(a[tap][j], b[tap][i], dim=0).item())[:k]
            white = torch.full_like(test_images[0], 255)
            for c, image in enumerate([white if r else test_images[i], white, *train_images[near]]):
                assert torch.equal(picture[:, top:top + 32, outer + 2 + 34 * c:outer + 34 + 34 * c], image), (i, tap, c)


# ---------------------------------------------------------------------------- data, files and flags

def test_shapes_are_drawn_the_same_and_apart():
    (a, labels), (b, _) = train.draw_shapes(64, seed=1), train.draw_shapes(64, seed=1)
    assert torch.equal(a, b) and a.shape == (64, 3, 32, 32) and a.dtype == torch.uint8
    assert labels.shape == (64, 2) and labels[:, 0].unique().tolist() == list(range(8)) and labels[:, 1].max() == 5
    assert not torch.equal(a, train.draw_shapes(64, seed=2)[0])


def test_folder_with_and_without_classes(tmp_path, monkeypatch):
    from PIL import Image
    for i in range(40):
        place = tmp_path / "pictures" / "cat dog".split()[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        mode, size = [("RGB", (40, 30)), ("L", (9, 9)), ("RGBA", (64, 80)), ("P", (33, 33))][i % 4]
        Image.new("RGB", size, (6 * i,) * 3).convert(mode).save(place / f"{i}.png")
    images, labels = train.load_dataset("folder", tmp_path / "pictures", size=24)
    tests, _ = train.load_dataset("folder", tmp_path / "pictures", train=False, size=24)
    assert images.shape[1:] == (3, 24, 24) and len(images) + len(tests) == 40 and 4 <= len(tests) <= 12 and sorted(labels.unique()) == [0, 1]
    shutil.copytree(tmp_path / "pictures", tmp_path / "more")
    for i in range(30):                 # others that come do not move an image from training to testing
        Image.new("RGB", (8, 8), (250, 0, i)).save(tmp_path / "more" / "cat" / f"new{i}.png")
    tests_of_more = {x.numpy().tobytes() for x in train.load_dataset("folder", tmp_path / "more", train=False, size=24)[0]}
    assert not tests_of_more & {x.numpy().tobytes() for x in images} and len(tests_of_more) > len(tests)
    flat_images, unknown = train.load_dataset("folder", tmp_path / "pictures" / "cat")
    assert 12 <= len(flat_images) <= 19 and (unknown == -1).all()
    split = tmp_path / "split"          # a class that is missing in test does not shift the others
    (split / "train").mkdir(parents=True), (split / "test").mkdir()
    for part, classes in (("train", "abc"), ("test", "ac")):
        for c in classes:
            (split / part / c).mkdir()
            Image.new("RGB", (8, 8)).save(split / part / c / "1.png")
    assert sorted(train.load_dataset("folder", split)[1].tolist()) == [0, 1, 2]
    assert sorted(train.load_dataset("folder", split, train=False)[1].tolist()) == [0, 2]
    folder = f"--dataset folder --data {tmp_path}/pictures --image-size 24 --encoder convnet --limit 8 --head mlp"
    resident = run(folder)
    assert "linear" in evaluation.table(evaluation.load_run("run"))[0]
    run(f"--dataset folder --data {tmp_path}/pictures/cat --encoder convnet --limit 4 --batch-size 4 --head mlp", "b")
    assert "linear" not in evaluation.table(evaluation.load_run("b"))[0]
    rows = evaluation.table(evaluation.load_run("run"))
    monkeypatch.setattr(train, "IN_MEMORY", 0)          # decoded in each epoch, by workers or not: the same bits
    for workers in (0, 2):
        assert isinstance(train.load_dataset("folder", tmp_path / "pictures")[0], train.Folder)
        assert torch.equal(flat(run(f"{folder} --workers {workers}", f"stream{workers}")), flat(resident))
    assert evaluation.table(evaluation.load_run("run")) == rows


def pictures(folder, good, bad=0):
    """000.png and so on, red in the class a and blue in b, and then some that are cut short."""
    from PIL import Image
    for i in range(good + bad):
        file = Path(folder, "ab"[i % 2], f"{i:03}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), [(200, 30, i % 99), (i % 99, 30, 200)][i % 2]).save(file)
        if i >= good:
            file.write_bytes(file.read_bytes()[:40])


def test_what_an_image_can_be():
    from PIL import Image
    Path("all").mkdir()
    x = torch.arange(16 * 20).view(16, 20) * 200
    Image.frombytes("I;16", (20, 16), bytes(b for v in x.flatten().tolist() for b in (v % 256, v // 256))).save("all/deep.png")
    Image.new("L", (1, 1), 77).save("all/tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                    # to be turned by a quarter
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 40, 20))
    half.save("all/turned.jpg", exif=exif)
    for mode in ("1", "LA", "P", "RGBA", "CMYK", "F"):
        Image.new(mode, (33, 70)).save(f"all/{mode}.{'tiff' if mode in 'CMYKF' else 'png'}")
    read = {f.name: train.read_image(f, 16) for f in Path("all").iterdir()}
    assert len(read) == 9 and all(v.shape == (3, 16, 16) and v.dtype == torch.uint8 for v in read.values())
    assert torch.equal(read["tiny.png"], torch.full((3, 16, 16), 77, dtype=torch.uint8))
    assert (read["deep.png"][0].float() - F.interpolate(x[None, None] / 257, (16, 20))[0, 0, :, 2:18]).abs().max() < 2
    assert read["turned.jpg"][:, :, 10:].float().mean() > 250 and read["turned.jpg"][:, :, :6].float().mean() < 5


@pytest.mark.parametrize("memory", [2**30, 0])
def test_a_bad_image_is_skipped_and_named_once(memory, monkeypatch, capsys):
    pictures("few", 250)
    monkeypatch.setattr(train, "IN_MEMORY", 0)
    cut, link = (train.load_dataset("folder", Path("few").resolve(), part)[0].paths[3] for part in (True, False))
    cut.write_bytes(cut.read_bytes()[:40]), link.unlink(), link.symlink_to("nowhere")
    monkeypatch.setattr(train, "IN_MEMORY", memory)
    train.train(train.parse_args("--dataset folder --data few --encoder convnet --head mlp --batch-size 99 --epochs 3 --out run".split()))
    error, log = capsys.readouterr().err, [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert error.startswith(f"skipped {cut}: ") and error.count("\n") == 1 and log[-1]["skipped"] == 1
    assert evaluation.table(evaluation.load_run("run"))[0]["linear"] == 100       # the labels are still those of the images
    assert sorted(line.split(":")[0] for line in capsys.readouterr().err.splitlines()) == sorted([f"skipped {cut}", f"skipped {link}"])


@pytest.mark.parametrize("memory", [2**30, 0])
def test_many_bad_images_stop_the_run(memory, monkeypatch, capsys):
    monkeypatch.setattr(train, "IN_MEMORY", memory)
    pictures("half", 20, 20)
    with pytest.raises(train.UserError, match="images cannot be read, over 1 % of the folder, the last .*/half/[ab]/0"):
        run("--dataset folder --data half --encoder convnet --head mlp")
    assert not Path("run/metrics.jsonl").exists() or len(Path("run/metrics.jsonl").read_text().splitlines()) == 1


def test_two_images_in_all():
    pictures("two", 3)                                  # and one that is kept for testing, were there five
    assert run("--dataset folder --data two --encoder convnet --head mlp --limit 2")["step"] == 2


def test_labels_out_of_range(monkeypatch):
    broken = train.argparse.Namespace(data=torch.zeros(3, 32, 32, 3, dtype=torch.uint8).numpy(), targets=[0, 10, 3], classes=range(10))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **__: broken)
    with pytest.raises(train.UserError, match="labels out of range: 0 to 10"):
        train.load_dataset("cifar10")


BAD = """
--head wrong                                | --head --heads mlp
--head none --head-lr 1                     | --head none --head parametric --inner-steps 0 --head-lr -1
--head none --inner-steps 1                 | --head none --sparsity 1
--head slice --head-lr 1                    | --head reweight --inner-steps 1
--head slice --sparsity 1                   | --head reweight --sparsity 1
--head slice --dim 999                      | --head reweight --dim 64
--head none --information 1                 | --head mlp --dim 20000
--head slice --hidden 64                    | --predictor directpred --predictor-lr 2
--head none --dim 64                        | --head linear --hidden 64
--head mlp --sparsity-norm l1               | --head mlp --sparsity-layer 0
--head sparse --sparsity-layer 7            | --head sparse --head-lr 0
--head parametric --head-lr 0               | --head mlp --head-lr 0 --inner-steps 2
--loss cosine                               | --loss bn --head mlp
--target ema                                | --predictor mlp --ema 0.9
--predictor mlp --tau 0.5                   | --predictor identity --predictor-lr 2
--tau 0                                     | --tau nan
--lr inf                                    | --lr -1
--epochs 0                                  | --epochs 1.5
--batch-size 1                              | --limit 1
--limit 99999999                            | --seed -1
--dataset mnist                             | --image-size 64
--device cuda:99                            | --device nonsense
--device meta                               | --dataset folder --data occupied
--dataset folder --data nowhere             | --dataset folder --data empty
--dataset cifar10 --data nowhere/at/all     | --dataset cifar10 --data corrupt
--out occupied                              | --out finished --head mlp --lr 0.5
--crop-scale 0                              | --hue 0.6
--grayscale 2                               | --warmup 1.1
--momentum 1                                | extra words
"""


@pytest.mark.parametrize("flags", [flags.strip() for line in BAD.strip().splitlines() for flags in line.split("|")])
def test_bad_input_is_one_line_and_loses_nothing(flags, monkeypatch, capsys):
    run("--head mlp", "finished")
    for folder in ("empty", "occupied", "corrupt/cifar-10-batches-py"):
        Path(folder).mkdir(parents=True)
    Path("occupied/thesis.tex").write_text("chapter 1")
    Path("corrupt/cifar-10-batches-py/data_batch_1").write_text("noise")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    before = {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}
    capsys.readouterr()
    base = ["--limit", "16", "--batch-size", "8", "--epochs", "2"] if "finished" in flags else []
    with pytest.raises(SystemExit) as stop:
        train.main(lambda: train.train(train.parse_args([*base, *flags.split()])))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()} == before


def test_random_values_for_every_flag_are_taken_or_refused_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"})
    values = ["", "-1", "0", "1", "2", "0.5", "1e-9", "nan", "inf", "-inf", "1e999", "1e308", "1" + 40 * "0", "0x10", "mlp", "none", "ä", "a b",
              "--", "%s", "None", "True", "[]", "../..", "~"]
    draw, refused, messages = random.Random(0), 0, set()
    for _ in range(1500):
        words = [w for flag in draw.sample(flags, draw.randint(1, 3)) for w in (flag, draw.choice(values))]
        try:
            args = train.parse_args(words)              # any other exception is a bug of ours
            assert args.epochs >= 1 and args.batch_size >= 2 and 0 <= args.hue <= 0.5 and math.isfinite(args.lr), words
            assert args == train.parse_args(words)
        except train.UserError as e:
            refused += 1
            messages.add(str(e))
            assert "\n" not in str(e) and str(e), words
    assert len(flags) > 30 and 500 < refused < 1500 and len(messages) > 200
    before = sorted(Path(".").rglob("*"))
    for words in (["--out", "x" * 300], ["--out", "/proc/nothing/here"], ["--data", "x" * 300, "--dataset", "folder"], ["--device", "ä"]):
        with pytest.raises(SystemExit) as stop:
            train.main(lambda: train.train(train.parse_args(words)))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, (words, error)
    assert sorted(Path(".").rglob("*")) == before


def test_views_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "train.py --show-views views.png".split())
    train.run()
    from PIL import Image
    picture = torchvision.transforms.functional.pil_to_tensor(Image.open("views.png"))
    assert picture.shape == (3, 8 * 34 + 2, 9 * 34 + 2) and list(Path(".").iterdir()) == [Path("views.png")]
    images = train.load_dataset("shapes")[0][:8]
    for row, image in enumerate(images):
        tiles = [picture[:, 2 + 34 * row:34 + 34 * row, 2 + 34 * c:34 + 34 * c] for c in range(9)]
        assert (tiles[0].int() - image).abs().max() <= 1 and torch.pdist(torch.stack(tiles).float().flatten(1)).min() > 50
    for name in ("no/where.png", "views.nonsense", "views.png/x.png"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--show-views", name])
        with pytest.raises(SystemExit):
            train.main(train.run)
        assert capsys.readouterr().err.startswith("error: ")


def test_the_benchmark_prints_its_ratios(monkeypatch, capsys):
    before = sorted(Path(".").rglob("*"))
    for flags in ("--head mlp", "--head none --workers 0"):
        train.benchmark(train.parse_args(f"{flags} --limit 16 --batch-size 8 --benchmark".split()))
        out = capsys.readouterr().out
        ratios = re.findall(r"([\d.]+) (?:times|of it)", out)
        assert len(ratios) == 3 + ("--inner-steps 5" in out) and all(float(r) > 0 for r in ratios), out
        assert ("--inner-steps 5" in out) == ("mlp" in flags) and out.count("views/s") == 5
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize("words", ["", "nowhere", "empty", "broken", "run --device cuda:99", "run --k 0", "run --wrong",
                                   "run --probe transform --k 20", "run --probe colour", "tiny --probe transform",
                                   "run --neighbors no/where.png", "run --neighbors empty", "run --neighbors run/checkpoint.pt",
                                   "run --neighbors a.png --json", "run --neighbors a.png --probe transform"])
def test_eval_refuses_in_one_line(words, monkeypatch, capsys):
    Path("empty").mkdir(), Path("broken").mkdir()
    Path("broken/checkpoint.pt").write_bytes(b"junk")
    if words.startswith(("run", "tiny")):
        run("--head mlp" + " --limit 4 --batch-size 4" * words.startswith("tiny"), words.split()[0])
    before = {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}
    monkeypatch.setattr(sys, "argv", ["eval.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        train.main(evaluation.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()} == before


def test_a_diverging_run_stops_and_keeps_what_it_has(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(lambda: run("--head none --lr 1e30 --warmup 0 --epochs 3"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.match(r"error: the loss is (nan|inf) in step 2, at a learning rate of 2\.92e\+28: .*\n$", error), error
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0
    assert flat(torch.load("run/checkpoint.pt", weights_only=True)).isfinite().all()


def test_a_finished_run_says_so_and_stays(capsys):
    run("--head mlp")
    before = Path("run/checkpoint.pt").read_bytes()
    run("--head mlp")
    assert "is finished" in capsys.readouterr().out and Path("run/checkpoint.pt").read_bytes() == before


def test_the_readmes_commands_parse(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    help_text = capsys.readouterr().out
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`((?:python|--)[^`]*)`", (HERE / "README.md").read_text())
    spans = ["python train.py " + span if span.startswith("--") else span for span in spans]
    commands = [c.strip() for line in lines + spans for c in line.split("&&") if "train.py" in c and "--help" not in c]
    assert len(commands) > 20
    for command in commands:
        words = re.sub(r"\b(FLAGS|DIR|K|LAMBDA|S)\b", lambda m: {"FLAGS": ""}.get(m[0], "1"), command)
        words = shlex.split(words)[2:]
        if words and words[-1].startswith("--"):        # a flag that is named without a value
            assert words[-1] in help_text, words
        else:
            train.parse_args(words)


def test_the_readme_quotes_projhead_as_it_is():
    code, quoted = (HERE / "projhead.py").read_text(), 0
    for block in re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        for part in block.strip("\n").split("\n\n"):
            assert any(textwrap.indent(part, " " * indent) in code for indent in (0, 4, 8)), part
            quoted += 1
    assert quoted >= 5


def test_names_that_others_rely_on():
    assert HEADS.keys() >= {"none", "linear", "mlp", "parametric", "sparse", "slice", "reweight", "topk", "discrete"}
    assert PREDICTORS.keys() >= {"identity", "offdiag", "linear", "mlp", "directpred"}
    for name in projhead.__dict__.values():
        if callable(name) and getattr(name, "__module__", "") == "projhead" and not name.__name__.startswith("_"):
            assert name.__doc__, name
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "projhead.py").read_text(), re.M)
    assert set(imports) == {"torch", "torchvision"}


# ---------------------------------------------------------------------------- Wen & Li's simple setting
# Two neurons f_j(X) = sum_p <w_j, X_p>^3 on four patches, with projhead's own OffDiagonal and bn_mse.
# Gradient descent on the population loss, in four dimensions without error: w_1 and w_2 start in R^d, the gradient stays in
# span(v_1, v_2, w_1, w_2), and the loss knows the data by the covariances of f alone, of degree 6 in X, which the batch has.
# Many starts at once: BN is by column and the head's mask is block-diagonal, so each two columns are a problem of their own.

WL, WL_D, WL_ALPHA, WL_NOISE = 32, 64, (2.5, 1.0), 0.4    # starts of each kind, d, (alpha_1, alpha_2), noise per coordinate
WL_STEPS, WL_ETA, WL_EVERY = 3000, 0.1, 10                # the head's rate is the encoder's, eta_E = eta; every 10th is kept
WL_WITHOUT = ["nothing", "head", "stop-gradient", "normalization"]


def wen_li_starts(seed):
    """(2 WL, 2, 4): w_j ~ N(0, I/d) in the basis v_1, v_2 and two more directions; w_1 is the neuron that leads on v_1.

    The first WL are separated, as about 3 % of the draws are; the last WL as drawn, where w_2 is mostly too near to w_1
    on v_1, or too weak on v_2, for these steps.
    """
    W = torch.randn(6000, 2, WL_D, generator=torch.Generator().manual_seed(seed)) / WL_D ** 0.5
    swap = W[:, 1, 0].abs() > W[:, 0, 0].abs()
    W[swap] = W[swap].flip(1)
    c = W[..., :2].abs() * WL_D ** 0.5                                           # 6000 x neuron x feature, each |N(0, 1)|
    separated = ((c[:, 1, 0] < 0.5 * c[:, 0, 0])                                 # w_1 leads on v_1, by a factor of 2
                 & (c[:, 1, 1] > 1) & (c[:, 1, 1] > 2 * c[:, 1, 0])              # w_2 is not too weak on v_2 ...
                 & (c[..., 1] < 3.5 * c[..., 0]).all(1))                         # ... and v_1 still wins, up to 2.5^1.5 = 3.95
    W = torch.cat([W[separated][:WL], W[:WL]])
    return torch.cat([W[..., :2], torch.linalg.cholesky(W[..., 2:] @ W[..., 2:].mT)], dim=-1)


def wen_li_views():
    """X1, X2 (384, 4, 4): every l, sign, mask and noise once. Patches 0, 1 are z v_l; 2, 3 noise, orthogonal to v_1, v_2."""
    X, kept = [], []
    for l, sign, mask, k, flip in itertools.product([0, 1], [1, -1], itertools.combinations(range(4), 2), range(8), [1, -1]):
        z, angle = sign * WL_ALPHA[l], math.pi / 4 * k    # 8 points on a circle have the moments of a Gaussian, up to ...
        a, b = (48 ** (1 / 6) * WL_NOISE * f(angle) for f in (math.cos, math.sin))       # ... the 6th: 48 E cos^6 = 15
        X.append([[z * (l == 0), z * (l == 1), 0, 0]] * 2 + [[0, 0, a, b], [0, 0, flip * a, flip * b]])
        kept.append([[p in mask] for p in range(4)])
    X, kept = torch.tensor(X), torch.tensor(kept)
    return X * kept, X * ~kept                            # complementary masks


def wen_li_neurons(X, w):
    return (X @ w.T).pow(3).sum(dim=1)                    # (N, P, 4), (columns, 4) -> N x columns


@functools.cache
def wen_li(without, seed=0):
    """c (times, 2 WL, neuron, feature) = <w_j, v_l>; E (times, 2 WL, 2, 2); the norms of the last w (2 WL, neuron)."""
    w = wen_li_starts(seed).flatten(0, 1).requires_grad_()                       # 2S x 4: S = 2 WL problems
    S, X1, X2 = 2 * WL, *wen_li_views()
    head = projhead.OffDiagonal(2 * S)
    head.mask *= torch.block_diag(*[torch.ones(2, 2)] * S) * (without != "head")         # masked all over, p = z
    loss_fn = projhead.bn_mse if without != "normalization" else lambda p, z: F.mse_loss(p, z.detach())
    optimizer = torch.optim.SGD([w, head.A], lr=WL_ETA)                          # no weight decay
    c, E = [], []
    for t in range(WL_STEPS + 1):
        if t % WL_EVERY == 0:
            c.append(w.detach().view(S, 2, 4)[..., :2].clone())
            E.append(head.E.detach().view(S, 2, S, 2)[range(S), :, range(S)])
        z1, z2 = wen_li_neurons(X1, w), wen_li_neurons(X2, w)
        p1 = head(z1)
        loss = loss_fn(p1, z2)
        if without == "stop-gradient":                    # both terms: the gradient of ||BN p - BN z||^2
            loss = loss + loss_fn(z2, p1)
        optimizer.zero_grad()
        (S * loss).backward()                             # the mean over columns, times S: of each problem its own loss
        optimizer.step()
    return torch.stack(c), torch.stack(E), w.detach().view(S, 2, 4).norm(dim=-1)


def wen_li_outcome(c, norm):
    """(2 WL,) each: one neuron ends on v_1 and the other on v_2; both end on v_1, dimensional collapse."""
    on = (c[-1].abs() > 0.7 * norm[..., None]) & (norm[..., None] > 0.5)         # neuron x feature
    return on.any(1).all(1) & on.any(2).all(1), on[..., 0].all(1)


@pytest.mark.parametrize("without", WL_WITHOUT)
def test_wen_li(without):
    """Head, stop-gradient and normalization together: both features. Without any one of them: not."""
    c, E, norm = wen_li(without)
    both, collapsed = wen_li_outcome(c, norm)
    print(f"\nwithout {without}: both features in {both[:WL].sum()} of {WL} separated starts, {both[WL:].sum()} of {WL} as drawn; "
          f"both neurons on v_1 in {collapsed[:WL].sum()}, {collapsed[WL:].sum()}; median |w| {norm.median():.2f}"
          f"\n  step  <w1,v1>  <w1,v2>  <w2,v1>  <w2,v2>     E_21     E_12    (start 0)")
    for t in (0, 20, 50, 100, 200, 300, 500, 1000, 2000, 3000):
        i = t // WL_EVERY
        print(f"{t:6}" + "".join(f"{x:9.3f}" for x in [*c[i, 0].flatten(), E[i, 0, 1, 0], E[i, 0, 0, 1]]))
    both, collapsed, drawn = both[:WL].sum(), collapsed[:WL].sum(), collapsed[WL:].sum()
    if without == "nothing":
        assert both >= 24 and collapsed <= 2 and drawn <= 12      # seen with seeds 0 to 4: 26 to 31, 0, 3 to 9
    elif without == "normalization":
        assert both == 0 and norm.max() < 0.4                     # the loss shrinks w, from 1: complete collapse
    else:
        assert both <= 1 and collapsed >= 28 and drawn >= 16      # seen with seeds 0 to 2: 0, 31 to 32, 19 to 29


def test_wen_li_the_head_leaves_the_identity_and_returns():
    """E_21 grows until E_21 f_1 outweighs f_2 on v_1's samples, w_2 then leaves v_1 for v_2, and E_21 goes back to 0."""
    c, E, norm = wen_li("nothing")
    learned = wen_li_outcome(c, norm)[0][:WL].nonzero().flatten()
    E21, c = E[:, learned, 1, 0].abs(), c[:, learned].abs()
    peak, n = E21.argmax(dim=0), range(len(learned))
    substituted = E21[peak, n] * (c[peak, n, 0, 0] / c[peak, n, 1, 0]) ** 3      # |E_21 f_1| / |f_2| where l = 1
    print(f"\n|E_21| at its peak {E21[peak, n].min():.3f} to {E21[peak, n].max():.3f}, at the end up to {E21[-1].max():.4f}; "
          f"|E_21 f_1 / f_2| on v_1 at the peak {substituted.min():.1f} to {substituted.max():.1f}; "
          f"peak at step {peak.min() * WL_EVERY} to {peak.max() * WL_EVERY}")
    assert len(learned) >= 24 and (c[-1, :, 1, 1] > 0.5).all()                   # w_2 it is that takes v_2
    assert E21[peak, n].min() > 0.05 and (substituted > 3).sum() >= len(learned) - 2    # seed 1: 0.8 in one of 31
    assert (E21[-1] < 0.1 * E21[peak, n]).all() and E[-1, learned].abs().max() < 0.02


def test_wen_li_batch_has_the_covariances_of_the_population():
    w = randn(2, 4, dtype=torch.float32)
    c, R = w[:, :2] ** 3, WL_NOISE ** 2 * w[:, 2:] @ w[:, 2:].T                  # E <w_j, xi> <w_k, xi> = R_jk
    f1, f2 = (wen_li_neurons(X, w) for X in wen_li_views())
    features = (c * torch.tensor(WL_ALPHA) ** 6 / 2) @ c.T                       # l is 1 or 2, with probability 1/2
    noise = 9 * R.diag()[:, None] * R.diag() * R + 6 * R ** 3                    # E <w_j, xi>^3 <w_k, xi>^3
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(f1.T @ f1 / len(f1), 4 / 3 * features + noise)                         # n of the 2 patches are in X1: E n^2 = 4/3
    close(f1.T @ f2 / len(f1), 2 / 3 * features)                                 # E n (2 - n) = 2/3
    assert f1.mean(dim=0).abs().max() < 1e-4
