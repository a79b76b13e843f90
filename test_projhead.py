# SPDX-License-Identifier: MIT
"""Oracles, the field's recurring bugs, and the papers' claims, executable: pytest, under three minutes on two cores."""
import copy
import json
import math
import re
import shlex
import subprocess
import sys
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


WORKER = """
import sys, torch, torch.distributed as dist, projhead
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
x1, x2 = (torch.randn(6, 5, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
W = (torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + rank * 0).requires_grad_()
mine = slice(3 * rank, 3 * rank + 3)
loss = projhead.nt_xent(x1[mine] @ W.T, x2[mine] @ W.T, 0.3)
loss.backward()
dist.all_reduce(W.grad); loss = loss.detach(); dist.all_reduce(loss)
if rank == 0: torch.save([loss / 2, W.grad / 2], sys.argv[3])
dist.destroy_process_group()
"""


def test_nt_xent_gathers_with_exact_gradients(tmp_path):
    where = [f"file://{tmp_path}/meet", f"{tmp_path}/out.pt"]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *where], cwd=HERE) for rank in range(2)]
    assert [w.wait(60) for w in workers] == [0, 0]
    W = randn(4, 5, seed=2).requires_grad_()
    loss = projhead.nt_xent(randn(6, 5) @ W.T, randn(6, 5, seed=1) @ W.T, 0.3)
    loss.backward()
    loss2, grad2 = torch.load(where[1])
    assert torch.allclose(loss2, loss, atol=1e-12) and torch.allclose(grad2, W.grad, atol=1e-12)


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
        assert head(16)(torch.randn(4, 16)).shape == (4, 16 if name == "none" else 128), name
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
    def watched(loss_fn, optimizer, steps):
        before = {k: v.clone() for k, v in calls[-1].state_dict().items()}
        phi = [p.clone() for group in optimizer.param_groups for p in group["params"]]
        last = fit(loss_fn, optimizer, steps)
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
    rows = evaluation.table(evaluation.load_run(loss))
    assert rows[-1]["tap"] == "h untrained" and {"linear shape", "linear hue", "knn20 shape", "rank"} <= rows[0].keys()


@pytest.mark.parametrize("flags", ["--head mlp", "--head parametric --inner-steps 2", "--head sparse",
                                   "--head mlp --predictor mlp --target ema", "--head mlp --predictor offdiag"])
def test_an_interrupted_run_continues_to_the_same_bits(flags, monkeypatch):
    whole, save = run(flags + " --epochs 3", "whole"), train.save
    def dies(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(flags + " --epochs 3", "parts")
    monkeypatch.setattr(train, "save", save)
    parts = run(flags + " --epochs 3", "parts")
    names = [n for n in whole if n in ("encoder", "head", "predictor", "target")]
    assert torch.equal(flat(whole, *names), flat(parts, *names))
    logs = [[json.loads(line) for line in Path(r, "metrics.jsonl").read_text().splitlines()] for r in ("whole", "parts")]
    assert [line["epoch"] for line in logs[1][1:]] == [1, 2, 3]
    assert [line["loss"] for line in logs[0][1:]] == [line["loss"] for line in logs[1][1:]]


def test_ema_is_an_average_and_keeps_its_own_buffers():
    a = run("--head mlp --predictor mlp --target ema --ema 1")
    f, g, _ = train.build(train.argparse.Namespace(**a["args"]))
    slow, untrained = a["target"], nn.Sequential(f, g).state_dict()
    assert all(torch.equal(v, untrained[k]) for k, v in slow.items() if "running" not in k and "num" not in k)
    assert not torch.equal(slow["0.2.running_mean"], untrained["0.2.running_mean"])
    b = run("--head mlp --predictor mlp --target ema --ema 0 --epochs 1", "b")     # momentum 0 and then 1/2: in between
    assert not torch.equal(b["target"]["0.0.weight"], b["encoder"]["0.weight"])


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
    assert {"command", "args", "torch", "torchvision", "python", "device", "threads", "images"} == first.keys()
    keys = {"epoch", "step", "loss", "inner_loss", "lr", "rank_h", "rank_z", "offdiag", "penalty", "pruned", "seconds", "views_per_s"}
    assert all(line.keys() == keys for line in epochs) and epochs[1]["offdiag"] > 0
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


# ---------------------------------------------------------------------------- data, files and flags

def test_shapes_are_drawn_the_same_and_apart():
    (a, labels), (b, _) = train.draw_shapes(64, seed=1), train.draw_shapes(64, seed=1)
    assert torch.equal(a, b) and a.shape == (64, 3, 32, 32) and a.dtype == torch.uint8
    assert labels.shape == (64, 2) and labels[:, 0].unique().tolist() == list(range(8)) and labels[:, 1].max() == 5
    assert not torch.equal(a, train.draw_shapes(64, seed=2)[0])


def test_folder_with_and_without_classes(tmp_path):
    from PIL import Image
    for i in range(10):
        place = tmp_path / "pictures" / "cat dog".split()[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        mode, size = [("RGB", (40, 30)), ("L", (9, 9)), ("RGBA", (64, 80)), ("P", (33, 33))][i % 4]
        Image.new(mode, size, i * 20 if mode in "LP" else (i * 20,) * len(mode)).save(place / f"{i}.png")
    images, labels = train.load_dataset("folder", tmp_path / "pictures", size=24)
    tests, _ = train.load_dataset("folder", tmp_path / "pictures", train=False, size=24)
    assert images.shape == (8, 3, 24, 24) and tests.shape == (2, 3, 24, 24) and sorted(labels.unique()) == [0, 1]
    flat_images, unknown = train.load_dataset("folder", tmp_path / "pictures" / "cat")
    assert len(flat_images) == 4 and (unknown == -1).all()
    split = tmp_path / "split"          # a class that is missing in test does not shift the others
    (split / "train").mkdir(parents=True), (split / "test").mkdir()
    for part, classes in (("train", "abc"), ("test", "ac")):
        for c in classes:
            (split / part / c).mkdir()
            Image.new("RGB", (8, 8)).save(split / part / c / "1.png")
    assert sorted(train.load_dataset("folder", split)[1].tolist()) == [0, 1, 2]
    assert sorted(train.load_dataset("folder", split, train=False)[1].tolist()) == [0, 2]
    run(f"--dataset folder --data {tmp_path}/pictures --image-size 24 --encoder convnet --limit 8 --head mlp")
    assert "linear" in evaluation.table(evaluation.load_run("run"))[0]
    run(f"--dataset folder --data {tmp_path}/pictures/cat --encoder convnet --limit 4 --batch-size 4 --head mlp", "b")
    assert "linear" not in evaluation.table(evaluation.load_run("b"))[0]


BAD = """
--head wrong                                | --head --heads mlp
--head none --head-lr 1                     | --head none --head parametric --inner-steps 0 --head-lr -1
--head none --inner-steps 1                 | --head none --sparsity 1
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


@pytest.mark.parametrize("words", ["", "nowhere", "empty", "broken", "run --device cuda:99", "run --k 0", "run --wrong"])
def test_eval_refuses_in_one_line(words, monkeypatch, capsys):
    Path("empty").mkdir(), Path("broken").mkdir()
    Path("broken/checkpoint.pt").write_bytes(b"junk")
    if words.startswith("run"):
        run("--head mlp")
    monkeypatch.setattr(sys, "argv", ["eval.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        train.main(evaluation.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error


def test_a_diverging_run_stops_and_keeps_what_it_has(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(lambda: run("--head none --lr 1e30 --warmup 0 --epochs 3"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the loss is nan") and error.count("\n") == 1
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


def test_names_that_others_rely_on():
    assert HEADS.keys() >= {"none", "linear", "mlp", "parametric", "sparse"}
    assert PREDICTORS.keys() >= {"identity", "offdiag", "linear", "mlp"}
    for name in projhead.__dict__.values():
        if callable(name) and getattr(name, "__module__", "") == "projhead" and not name.__name__.startswith("_"):
            assert name.__doc__, name
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "projhead.py").read_text(), re.M)
    assert set(imports) == {"torch", "torchvision"}
