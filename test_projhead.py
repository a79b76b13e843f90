# SPDX-License-Identifier: MIT
"""Oracles, the field's recurring bugs, and the papers' claims, executable: python -m pytest, a minute on one core."""
import argparse
import contextlib
import copy
import functools
import importlib.util
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
import statistics
import struct
import sys
import textwrap
import time
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from torch import nn

import eval as evaluation
import projhead
import train
from projhead import ENCODERS, HEADS, LOSSES, NORMS, PREDICTORS

HERE = Path(__file__).parent
double = torch.float64
draw_shapes = train.draw_shapes
SETS = {10_000: draw_shapes(40, seed=1), 4_000: draw_shapes(20, seed=0)}       # in place of a user's drawings


def randn(*shape, seed=0, dtype=double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Each test in a folder of its own, with few drawings, a cache of its own, one thread, and float32."""
    torch.set_num_threads(1)        # tiny tensors; a forked child has no more, and the bits depend on it
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "draw_shapes", lambda M, seed: SETS[M])
    monkeypatch.setattr(train, "native_precision", lambda device: "float32")


@pytest.fixture
def hasty(monkeypatch):
    """A checkpoint at the end of each epoch, without the 30 seconds between two."""
    save = train.save
    def forgetful(run, step):
        save(run, step)
        run.saved -= 100
    monkeypatch.setattr(train, "save", forgetful)


def parsed(flags):
    return train.parse_args(f"--encoder convnet128 {flags}".split())


def run(flags="", out="run"):
    """Train in this process: 4 steps of 8 images, a narrow encoder, unless the flags say otherwise."""
    usual = "--encoder convnet128 --limit 16 --batch-size 8 --epochs 2"
    train.train(train.parse_args([*f"{usual} {flags}".split(), "--out", str(out)]))
    return saved(out)


def stopped(flags="", at=2, out="run"):
    """As `run`, but a signal comes in that step."""
    count = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "first_signal", lambda caught: signal.SIGTERM * (next(count) == at))
        run(flags, out)
    return saved(out)


def saved(out="run"):
    return torch.load(f"{out}/checkpoint.pt", weights_only=True)


def untrained(checkpoint):
    return train.build(argparse.Namespace(**checkpoint["args"]))


def tensors(part, *path):
    """{path: tensor} of all that a checkpoint holds: the networks and the optimizers' momentum."""
    if torch.is_tensor(part):
        return {path: part}
    items = part.items() if isinstance(part, dict) else ()
    return {k: t for key, value in items for k, t in tensors(value, *path, key).items()}


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) for key, t in a.items())


def log_of(out="run"):
    log = Path(out, "metrics.jsonl")                    # which is there from the end of the first epoch on
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def same_run(a, b, *but):
    """Whether two runs' networks, momentum and logs agree to the last bit, but for some keys of the log."""
    timed = ("seconds", "views_per_s", "memory", "command", "args", *but)
    logs = [[{k: v for k, v in line.items() if k not in timed} for line in log_of(r)] for r in (a, b)]
    return same_bits(saved(a), saved(b)) and logs[0] == logs[1]


def doubled(model):
    """The model in float64, where rounding hides nothing."""
    return train.Model(*(m if m is None else m.double() for m in model[:4]), [p.double() for p in model.start])


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def networks(flags):
    """(args, model, theta, phi), in float64."""
    args = parsed(flags)
    model = doubled(train.build(args))
    return args, model, *train.optimizers(model, args)


def ends(action, capsys, besides=("folder ", "decoding ", "left out ", "measuring ")):
    """(exit code, stderr) of a script's main function, which ends without a traceback or more than one line of errors.
    Lines of stderr that begin with one of `besides` are left out."""
    capsys.readouterr()
    code = 0
    try:
        train.main(action)
    except SystemExit as stop:
        code = stop.code
    error = "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith(besides))
    ok = code in (0, 2) and (code == 2) == error.startswith("error: ") and (code == 0 or error.count("\n") == 1)
    assert ok, (code, error)
    return code, error


def one_line_error(action, capsys, *words, besides=("measuring ",)):
    """The line with these words that a script ends with, exit code 2; nothing else is on stderr, but for `besides`."""
    code, error = ends(action, capsys, besides)
    assert code == 2 and all(word in error for word in words), (code, error)
    return error


def files():
    return {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}


def forked(action, name="child", rank=0, ranks=1):
    """A child process that runs a script's main function, its stderr in the file `name`; code 70 is a traceback."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(60)
        sys.stderr, sys.stdout = open(name, "w", buffering=1), open(os.devnull, "w")
        os.dup2(sys.stderr.fileno(), 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        train.RANK, train.RANKS, train.LOCAL_RANK, train.LOCAL_RANKS = rank, ranks, rank, ranks
        train.main(action)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """How the child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def two_processes(action, monkeypatch):
    """Run it in two forked processes that form a gloo group; their exit codes and what they wrote to stderr."""
    with socket.socket() as s, monkeypatch.context() as patch:
        s.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_ADDR", "127.0.0.1"), patch.setenv("MASTER_PORT", str(s.getsockname()[1]))
        s.close()
        codes = [ended(pid) for pid in [forked(action, f"rank{rank}.err", rank, 2) for rank in (0, 1)]]
    return codes, [Path(f"rank{rank}.err").read_text() for rank in (0, 1)]


def evaluates(monkeypatch, capsys, *words, **kwargs):
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    return ends(evaluation.main, capsys, **kwargs)


def colour(i):
    return (200, 30 + i // 99, i % 99) if i % 2 == 0 else (i % 99, 30 + i // 99, 200)


def pictures(folder, good, bad=0, classes="ab", size=(12, 9)):
    """000.png and so on, red in the class a and blue in b, and then some that are cut short."""
    from PIL import Image
    for i in range(good + bad):
        file = Path(folder, classes[i % len(classes)], f"{i:03}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour(i)).save(file)
        if i >= good:
            file.write_bytes(file.read_bytes()[:40])


# ---------------------------------------------------------------------------- losses

def naive_nt_xent(z1, z2, tau=0.5):
    z = [v / v.norm() for v in [*z1.detach(), *z2.detach()]]
    total, N = 0.0, len(z1)
    for i in range(2 * N):
        candidates = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * N) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[(i + N) % (2 * N)]) / tau) / candidates)
    return total / (2 * N)


def naive_cosine(p, z):
    return -sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(p, z)) / len(p)


def naive_bn(p, z):
    bn = lambda a: (a - a.mean(0)) / (a.var(0, unbiased=False) + 1e-12).sqrt()
    return (bn(p) - bn(z)).square().sum(1).mean().item() / p.shape[1]


def naive_barlow(z1, z2, lambd=0.005):
    N, d = z1.shape
    bn = [[(v - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() for v in c] for z in (z1, z2) for c in z.detach().T]
    C = [[sum(a * b for a, b in zip(bn[i], bn[d + j])) / N for j in range(d)] for i in range(d)]
    return sum((1 - C[i][i]) ** 2 if i == j else lambd * C[i][j] ** 2 for i in range(d) for j in range(d)).item()


NAIVE = {"infonce": naive_nt_xent, "barlow": naive_barlow, "cosine": naive_cosine, "bn": naive_bn}


@pytest.mark.parametrize("N", [2, 3, 8])             # the batch size is that of the tensors
@pytest.mark.parametrize("name, options", [
    ("infonce", {}), ("infonce", {"tau": 0.1}), ("infonce", {"tau": 1.0}), ("cosine", {}), ("bn", {}), ("barlow", {}),
    ("barlow", {"lambd": 1.0})])
def test_a_loss_is_its_naive_loops(name, options, N):
    loss = functools.partial(LOSSES[name], **options)
    p, z = randn(N, 4).requires_grad_(), (3 * randn(N, 4, seed=1) + 1).requires_grad_()
    assert loss(p, z).item() == pytest.approx(NAIVE[name](p, z, **options), rel=1e-9)
    loss(p, z).backward()
    assert (z.grad is None) == (name in ("cosine", "bn"))               # their target is behind a stop-gradient
    assert torch.autograd.gradcheck(loss, (p, z.requires_grad_(z.grad is not None)))
    p, z = p.detach().bfloat16(), z.detach().bfloat16()                 # half precision in, float32 out
    assert loss(p, z).dtype == torch.float32
    assert loss(p, z).item() == pytest.approx(loss(p.double(), z.double()).item(), rel=1e-5)


def test_losses_at_the_extremes():
    p, z = randn(6, 4, dtype=torch.float32).requires_grad_(), randn(6, 4, seed=1, dtype=torch.float32)
    loss = projhead.nt_xent(p, z, tau=0.001)            # exp(1 / 0.001) overflows float32
    loss.backward()
    assert loss.isfinite() and p.grad.isfinite().all()
    for scale in (1e3, 1e-4):                           # small z do not hide under an epsilon, nor do large ones pay
        scaled = projhead.bn_mse(scale * p, scale * z)
        assert scaled.item() == pytest.approx(projhead.bn_mse(p, z).item(), rel=1e-3)


@pytest.mark.parametrize("bad", [
    lambda: projhead.bn_mse(torch.ones(1, 4), torch.ones(1, 4)),
    lambda: projhead.barlow(torch.ones(1, 4), torch.ones(1, 4)),
    lambda: projhead.encoder("lenet"),
    lambda: projhead.MLP(8, depth=0),
    lambda: projhead.SliceHead(12, 0),
    lambda: projhead.SliceHead(12, 13),
    lambda: projhead.DiscreteHead(8, levels=1),
    lambda: projhead.fit_head(None, torch.optim.SGD(nn.Linear(2, 2).parameters()), 0),
    lambda: projhead.unroll_head(None, None, torch.optim.SGD(nn.Linear(2, 2).parameters()), 0),
    lambda: projhead.sparsity(projhead.MLP(8), "l3"),
    lambda: projhead.sparsity(projhead.NoHead(8)),
    lambda: projhead.fraction_pruned(projhead.NoHead(8), torch.ones(4, 8))])
def test_what_cannot_be_is_a_value_error(bad):
    with pytest.raises(ValueError):
        bad()


# ---------------------------------------------------------------------------- encoders and heads

@pytest.mark.parametrize("arch, D", [
    ("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("convnet", 512), ("convnet128", 128)])
def test_encoder(arch, D):
    with torch.device("meta"):
        small, large = projhead.encoder(arch), projhead.encoder(arch, 96)
        for size, f in ((32, small), (96, large)):
            assert f.dim == D and f(torch.zeros(2, 3, size, size)).shape == (2, D)
        if "convnet" not in arch:                       # the CIFAR stem for small images, torchvision's own above 64 px
            stem = [(f.conv1.kernel_size[0], f.conv1.stride[0], type(f.maxpool)) for f in (small, large)]
            assert stem == [(3, 1, nn.Identity), (7, 2, nn.MaxPool2d)]
            theirs = getattr(torchvision.models, arch)().state_dict()
            shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
            assert {key: value.shape for key, value in large.state_dict().items()} == shapes


def test_heads_and_predictors_map_rows_to_rows():
    for name, head in HEADS.items():
        width = {"none": 16, "reweight": 16, "slice": 2}.get(name, 128)
        assert head(16)(torch.randn(4, 16)).shape == (4, width), name
    for name, predictor in PREDICTORS.items():
        assert predictor(16)(torch.randn(4, 16)).shape == (4, 16), name


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [projhead.MLP, projhead.SparseHead])
def test_an_mlp_of_any_depth_is_its_formula(kind, depth):
    head, h = kind(6, 4, hidden=9, depth=depth).double(), randn(5, 6)
    z, parameters = h, list(head.parameters())
    for W, b in zip(parameters[::2], parameters[1::2]):
        z = (z if z is h else z.relu()) @ W.T + b
    assert torch.allclose(head(h), z)
    widths = [6] + [9] * (depth - 1) + [4]
    assert [W.shape for W in parameters[::2]] == list(zip(widths[1:], widths))
    assert [p.shape for p in kind(6).parameters()] == [(12, 6), (12,), (128, 12), (128,)]


def test_linear_is_an_mlp_of_depth_1_to_the_last_bit():
    """So that --head linear is the joint control of --head parametric --depth 1."""
    linear, mlp = (train.build(parsed(flags)).g for flags in ("--head linear", "--head mlp --depth 1"))
    h = torch.randn(5, 128)
    assert same_bits(linear.state_dict(), mlp.state_dict()) and torch.equal(linear(h), mlp(h))


def test_offdiag_starts_as_the_identity_and_keeps_its_diagonal():
    q, z = projhead.OffDiagonal(6), torch.randn(5, 6)
    assert torch.equal(q(z), z)                         # to the last bit
    optimizer = torch.optim.AdamW(q.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        projhead.negative_cosine(q(z), torch.randn(5, 6)).backward()
        optimizer.step()
    assert q.E.diagonal().eq(0).all() and q.E.abs().sum() > 0.1
    assert torch.allclose(q(z), torch.stack([row + q.E @ row for row in z]), atol=1e-6)


def test_offdiag_entries_do_not_decay_and_all_else_does():
    args, model, theta, phi = networks("--head mlp --predictor offdiag --weight-decay 0.5 --lr 0.1")
    nn.init.normal_(model.q.A)
    before = copy.deepcopy(model)
    for p in train.parameters(theta) + train.parameters(phi):
        p.grad = torch.zeros_like(p)                    # nothing but decay moves anything
    theta.step(), phi.step()
    for module, old, factor in zip(model, before, (0.95, 0.95, 1)):             # f, g, q
        assert all(torch.allclose(p, factor * q) for p, q in zip(module.parameters(), old.parameters()))


# ---------------------------------------------------------------------------- other papers' heads

def test_slice_and_reweight_are_their_formulas():
    h = randn(5, 12)
    assert torch.equal(projhead.SliceHead(12, 4)(h), h[:, :4])
    for D, d in ((2048, 360), (512, 90), (128, 22), (2, 1)):
        assert projhead.SliceHead(D).d == d
    for kappa, head in ((1.05, projhead.ReweightHead(12)), (2.0, projhead.ReweightHead(12, 2.0))):
        assert torch.allclose(head(h), torch.stack([h[:, i] / kappa ** i for i in range(12)], dim=1), rtol=1e-6)
        assert not list(head.parameters()) and not head.state_dict()


def test_topk_keeps_the_k_largest_and_their_gradient():
    head, h = projhead.TopKHead(6, 3, hidden=10, k=4).double(), randn(5, 6).requires_grad_()
    head[0].bias.data += 2                              # more than k are positive
    x = (h @ head[0].weight.T + head[0].bias).relu()
    largest = x >= x.sort(dim=1).values[:, -4:-3]
    z = (x * largest) @ head[2].weight.T + head[2].bias
    assert torch.allclose(head(h), z)
    of = [h, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(head(h).norm(), of), torch.autograd.grad(z.norm(), of))
    assert projhead.TopKHead(16).k == 4 and projhead.TopKHead(1).k == 1


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 33])
def test_discrete_rounds_to_its_levels_with_the_gradient_straight_through(levels):
    head, h = projhead.DiscreteHead(6, 4, levels=levels).double(), randn(999, 6).requires_grad_()
    grid = torch.tensor([(i - levels // 2) / (levels // 2) for i in range(levels)], dtype=double)
    exact = F.batch_norm(head[2](head[0](h).relu()), None, None, training=True).tanh()
    exact = (grid[0] + grid[-1]) / 2 + (grid[-1] - grid[0]) / 2 * exact         # -1 to 1 becomes the grid's range
    z = head(h)
    assert torch.allclose(z.unique(), grid)             # all its levels are used from the start
    assert (z - exact).abs().max() <= 0.5 / (levels // 2) + 1e-9                # each time the nearest one
    weight = randn(999, 4, seed=1)
    assert torch.allclose(*(torch.autograd.grad((weight * value).sum(), h)[0] for value in (z, exact)))


@pytest.mark.parametrize("options, rho, eps", [((), 0.3, 0.01), ((0.4, 0), 0.4, 0)])
def test_directpred_is_its_formula(options, rho, eps):
    q, F_hat, W = projhead.DirectPred(5, *options).double(), 0, (1 + eps) * torch.eye(5, dtype=double)
    for step in range(4):
        z = randn(7, 5, seed=step)
        z[:, 3:] = z[:, :2] @ randn(2, 2, seed=9)       # of rank 3: two eigenvalues are 0 but for rounding
        p = q(z.requires_grad_())
        assert torch.allclose(p, z @ W, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(p[0, 0], z)[0][0], W[0], atol=1e-6)      # through z, not through W
        F_hat = rho * F_hat + (1 - rho) * sum(torch.outer(row, row) for row in z.detach()) / 7
        assert torch.allclose(q.F_hat, F_hat, atol=1e-12)
        s, U = torch.linalg.eigh(F_hat)
        W = U @ ((s.clamp(min=0) / s.max()).sqrt() + eps).clamp(min=1e-4).diag() @ U.T
    q.eval()(z)
    assert torch.allclose(q.F_hat, F_hat, atol=1e-12) and not list(q.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert projhead.DirectPred(5)(z.bfloat16()).isfinite().all()


# ---------------------------------------------------------------------------- the objective and the step

def naive_penalty(W, norm):
    columns, rows = ([math.sqrt(sum(v * v for v in line)) for line in M.tolist()] for M in (W.T, W))
    whole = math.sqrt(sum(c * c for c in columns))
    single = sum(abs(v) for line in W.tolist() for v in line)
    return {"l21": sum(columns) / whole, "l21-plain": sum(columns), "l21-out": sum(rows) / whole,
            "l1": single / whole, "l1-plain": single}[norm]


@pytest.mark.parametrize("flags", [
    "--head none", "--head mlp --tau 0.2", "--head sparse --sparsity 0.3", "--predictor identity --loss infonce",
    "--loss barlow --head mlp --dim 9", "--predictor mlp --loss barlow --dim 9", "--predictor mlp",
    "--predictor offdiag --sparsity 2 --sparsity-norm l1", "--predictor directpred --loss infonce --tau 1",
    "--predictor linear --loss bn --target ema", "--predictor offdiag --loss cosine --target ema --head sparse"])
def test_the_objective_is_its_equation(flags):
    args, model, *_ = networks(flags)
    if args.predictor == "offdiag":
        nn.init.normal_(model.q.A)
    fresh, other = copy.deepcopy(model), copy.deepcopy(model)           # directpred's forward changes it
    h, t = randn(10, 128).requires_grad_(), randn(10, args.dim, seed=1) if args.target == "ema" else None
    loss, z = train.objective(h, t, model, args), other.g(h)
    naive = (lambda a, b: naive_nt_xent(a, b, args.tau)) if args.loss == "infonce" else NAIVE[args.loss]
    if args.predictor == "none":
        expected = naive(z[:5], z[5:])
        inputs = [h, *fresh.g.parameters()]
        assert torch.autograd.gradcheck(lambda *_: train.objective(h, t, fresh, args), inputs, fast_mode=True)
    else:                                               # each view predicts the other, as a constant
        p, t = other.q(z), z.detach() if t is None else t
        expected = (naive(p[:5], t[5:]) + naive(p[5:], t[:5])) / 2
        constant = train.objective(h, t, fresh, args)
        assert torch.allclose(*(torch.autograd.grad(value, h, retain_graph=True)[0] for value in (loss, constant)))
    if args.sparsity:
        expected += args.sparsity * naive_penalty(projhead.first_weight(model.g), args.sparsity_norm)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("flags", [
    "--head mlp", "--head none", "--loss barlow --head mlp", "--predictor mlp --target ema",
    "--head sparse --inner-steps 1", "--head parametric --inner-steps 3",
    "--head linear --predictor offdiag --inner-steps 2",
    "--head parametric --inner-start reset", "--head mlp --inner-steps 2 --inner-batch other",
    "--predictor mlp --target ema --inner-steps 2 --inner-batch other --inner-start reset",
    "--head mlp --inner-steps 2 --inner-gradient unrolled",
    "--predictor linear --inner-steps 3 --inner-gradient unrolled --inner-start reset"])
def test_two_steps_are_gradient_descent_written_out(flags):
    """Joint: theta and phi from the same gradient. Inner steps: phi alone K times at fixed h, of this batch or another,
    from where it is or from the start; then theta alone at that phi, or, unrolled, through those steps."""
    args, model, theta, phi = networks(flags + " --momentum 0 --weight-decay 0 --lr 0.1")
    f, g, q, target, start = by_hand = copy.deepcopy(model)
    heads = nn.ModuleList([g, q])
    heads.forward = lambda h, t: train.objective(h, t, by_hand, args)
    def L(h, t, w):                                     # w in place of the heads' parameters
        return torch.func.functional_call(heads, dict(zip(dict(heads.named_parameters()), w)), (h, t))
    for step in range(2):
        x = randn(8, 3, 16, 16, seed=step)
        other = randn(8, 3, 16, 16, seed=9) if args.inner_batch == "other" else None
        h_out, loss_out, inner_out = train.train_step(x, model, theta, phi, args, other)
        h, t, inner = f(x), target(x).detach() if target else None, None
        h0, t0 = (h, t) if other is None else (f(other), target(other).detach() if target else None)
        first = start if args.inner_start == "reset" else heads.parameters()
        w = [p.detach().clone().requires_grad_() for p in first]
        for _ in range(args.inner_steps):
            inner = L(h0, t0, w)
            w = [p - 0.1 * d for p, d in zip(w, torch.autograd.grad(inner, w, create_graph=True))]
        if args.inner_gradient != "unrolled":
            w = [p.detach().requires_grad_() for p in w]
        loss, at = L(h, t, w), [*f.parameters(), *w]
        rates = [0.1 for _ in f.parameters()] + [0.0 if args.inner_steps else 0.1 for _ in w]
        new = [(p - rate * d).detach() for p, rate, d in zip(at, rates, torch.autograd.grad(loss, at))]
        for p, value in zip([*f.parameters(), *heads.parameters()], new):
            p.data = value
        assert torch.allclose(h_out, h, rtol=0, atol=1e-12) and not h_out.requires_grad
        assert loss_out.item() == pytest.approx(loss.item(), rel=1e-12) and not loss_out.requires_grad
        assert inner_out is None if inner is None else inner_out.item() == pytest.approx(inner.item(), rel=1e-12)
        ours, theirs = (tensors({k: m.state_dict() for k, m in train.modules(n).items()}) for n in (model, by_hand))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)    # BatchNorm's count: a batch is encoded once


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_is_the_encoders_alone(precision):
    args = parsed(f"--head mlp --predictor mlp --target ema --precision {precision}")
    model, seen = train.build(args), {}
    for name, module in (("f", model.f[0]), ("slow f", model.target[0][0]), ("g", model.g[0]), ("q", model.q[0])):
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
    x = randn(16, 3, 32, 32, dtype=torch.float32)
    h, loss, _ = train.train_step(x, model, *train.optimizers(model, args), args)
    half = getattr(torch, precision)
    assert seen == {"f": half, "slow f": half, "g": torch.float32, "q": torch.float32}
    assert h.dtype == loss.dtype == torch.float32


# ---------------------------------------------------------------------------- the head as a part of the objective

def bilevel():
    """A small problem, its inner part convex: f linear with BatchNorm, g linear, logits g(h1) h2^T, a ridge on g."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).to(double)
    g = nn.Linear(4, 4, bias=False).to(double)
    x1 = randn(10, 6)
    x = torch.cat([x1, x1 + 0.5 * randn(10, 6, seed=1)])
    def loss(h):
        h1, h2 = h.chunk(2)
        return F.cross_entropy(g(h1) @ h2.T, torch.arange(10)) + 0.05 * g.weight.square().sum()
    return f, g, lambda: f(x), loss


def test_fit_head_lowers_the_loss_and_starts_again_without_momentum():
    _, g, encode, loss = bilevel()
    h, start, optimizer = encode().detach(), [g.weight.detach().clone()], torch.optim.SGD(g.parameters(), 0.1, 0.9)
    losses = [projhead.fit_head(lambda: loss(h), optimizer, 3) for _ in range(3)]
    assert not losses[0].requires_grad and losses[0] > losses[1] > losses[2]
    assert projhead.fit_head(lambda: loss(h), optimizer, 3, start) == losses[0]


@pytest.mark.parametrize("steps, momentum, decay", [(1, 0, 0), (3, 0, 0), (3, 0, 0.2), (500, 0.9, 0)])
def test_envelope_theorem(steps, momentum, decay):
    """dV/dtheta of V(theta) = min over phi of L(theta, phi), numerically, is dL/dtheta at the fitted phi, and only
    there. What unroll_head differentiates is L(theta, phi_K(theta)), for any K; at the fitted phi the two are one."""
    f, g, encode, loss = bilevel()
    weight, start, direction = f[0].weight, [g.weight.detach().clone()], randn(4, 6, seed=5)
    optimizer = torch.optim.SGD(g.parameters(), 0.1, momentum, weight_decay=decay)
    def V(t):                                           # at theta + t * direction, phi fitted by so many steps
        weight.data += t * direction
        h = encode()
        inner = projhead.fit_head(lambda: loss(h.detach()), optimizer, steps, start)
        weight.data -= t * direction
        return loss(h), inner
    def along(value):
        return (torch.autograd.grad(value, weight)[0] * direction).sum().item()
    numerical = (V(1e-4)[0] - V(-1e-4)[0]).item() / 2e-4
    value, inner = V(0)
    fitted, envelope = g.weight.detach().clone(), along(value)
    assert abs(envelope / numerical - 1) < 1e-5 if steps == 500 else abs(envelope / numerical - 1) > 0.01
    plain, h = torch.optim.SGD(g.parameters(), 0.1, 0.9, weight_decay=decay), encode()  # its momentum is left out
    unrolled = projhead.unroll_head(lambda: loss(h), g, plain, min(steps, 5), None if steps == 500 else start)
    assert along(unrolled[0]) == pytest.approx(numerical, rel=1e-5)
    torch.testing.assert_close((*unrolled, g.weight), (value, inner, fitted), rtol=1e-9, atol=0)


def test_what_inner_steps_do_to_the_encoders_gradient():
    """After some joint training: the mean cosine of dL/dtheta after K inner steps with that at K = 0, and the losses of
    the step's batch and of the other one."""
    args = parsed("--head mlp --tau 0.1 --inner-steps 2 --inner-batch other")
    joint = parsed("--head mlp --tau 0.1")
    model, images = train.build(joint), draw_shapes(1024, seed=1)[0]
    theta, phi = train.optimizers(model, joint)
    views = train.two_views(images, args, range(56), 32, 32, torch.device("cpu"))
    for x, _ in itertools.islice(views, 50):
        train.train_step(x, model, theta, phi, joint)
    starts = {"warm": [p.detach().clone() for p in train.parameters(phi)], "reset": model.start}
    kinds = [(0, "same", "warm"), *itertools.product((2, 20), ("same", "other"), ("warm", "reset"))]
    rows = {kind: [] for kind in kinds}
    for x, other in views:
        h = {"same": model.f(x), "other": model.f(other).detach()}
        for K, batch, start in kinds:
            for p, first in zip(train.parameters(phi), starts[start]):
                p.data.copy_(first)
            if K:
                fixed = h[batch].detach()
                projhead.fit_head(lambda: train.objective(fixed, None, model, joint), phi, K, starts[start])
            own, others = (train.objective(h[batch], None, model, joint) for batch in h)
            gradient = torch.autograd.grad(own, train.parameters(theta), retain_graph=True)
            gradient = torch.cat([d.flatten() for d in gradient])
            if K == 0:
                joint_gradient = gradient
            cosine = F.cosine_similarity(gradient, joint_gradient, dim=0)
            rows[K, batch, start].append([cosine.item(), own.item(), others.item()])
    mean = {kind: torch.tensor(values).mean(dim=0).tolist() for kind, values in rows.items()}
    print("\n K  batch  start  cosine   loss  of the other batch")
    for (K, batch, start), (cosine, own, others) in mean.items():
        print(f"{K:2}  {batch:5}  {start:5}  {cosine:6.2f}  {own:5.2f}  {others:5.2f}")
    _, *before = mean[0, "same", "warm"]
    for batch, start in itertools.product(("same", "other"), ("warm", "reset")):
        cosine, own, others = mean[20, batch, start]
        assert cosine < mean[2, batch, start][0] - 0.2
        assert (mean[2, batch, start][0] > 0.95) == (start == "warm")   # then 2 steps are nearly joint training
        fitted, fresh = (own, others) if batch == "same" else (others, own)
        assert fitted < min(before) - 0.2 and fresh > max(before) - 0.05        # 20 fit phi to that batch alone


def test_frozen_random_head_stays():
    a = run("--head mlp --predictor offdiag --head-lr 0 --weight-decay 0.1")
    for name, module in zip(("encoder", "head", "predictor"), untrained(a)):
        assert all(torch.equal(a[name][k], p) == (name == "head") for k, p in module.named_parameters())


# ---------------------------------------------------------------------------- sparsity

@pytest.mark.parametrize("norm", NORMS)
def test_the_norms_are_plain_loops(norm):
    head = projhead.SparseHead(5, 3, hidden=7).double()
    assert head.penalty(norm).item() == pytest.approx(naive_penalty(head[0].weight, norm))
    assert head.penalty(norm) == projhead.sparsity(head, norm) and head.penalty() == head.penalty("l21")


def test_a_zero_column_is_pruned_and_has_a_gradient():
    head, h = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)), torch.tensor([[1.0, 5], [3, 7], [2, 0]])
    head[0].weight.data = 1e-5 * torch.tensor([[3.0, 0], [4, 1]])
    assert projhead.fraction_pruned(head, h) == 0
    assert projhead.fraction_pruned(head, h * torch.tensor([1, 0])) == 0.5      # that feature never varies
    head[0].weight.data[:, 1] = 0
    assert projhead.fraction_pruned(head, h) == 0.5
    projhead.sparsity(head).backward()
    assert head[0].weight.grad.isfinite().all() and head[2].weight.grad is None


def test_the_scale_free_penalty_prunes_and_the_plain_one_only_shrinks():
    """Ten input features, of which three tell the images apart; the loss normalizes, so the scale of W is free."""
    torch.manual_seed(0)
    signal = torch.randn(64, 3)
    def fitted(norm):
        torch.manual_seed(0)
        head = projhead.SparseHead(10, 8)
        optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        start = head[0].weight.norm().item()
        for step in range(600):
            optimizer.param_groups[0]["lr"] = train.learning_rate(step, 600, 0.05, 0.05)
            views = [torch.cat([signal + 0.1 * torch.randn(64, 3), torch.randn(64, 7)], dim=1) for _ in "12"]
            loss = projhead.nt_xent(*(head(v) for v in views)) + 0.1 * head.penalty(norm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        W = head[0].weight.detach()
        return projhead.fraction_pruned(head, views[0]), W.norm(dim=0), W.norm().item() / start
    pruned, columns, _ = fitted("l21")
    assert 0.5 <= pruned <= 0.7 and (columns[:3] > 1e-3 * columns.max()).all()          # of the seven, no signal
    pruned, _, shrunk = fitted("l21-plain")
    assert pruned == 0 and shrunk < 0.7


# ---------------------------------------------------------------------------- measures

def test_rank_spread_alignment_uniformity():
    for M in (2, 5, 50, 1100):                          # uniformity goes by 1024 rows
        a, b = randn(M, 6) + 0.5, randn(M, 6, seed=1)
        u, v, s = F.normalize(a), F.normalize(b), torch.linalg.svdvals(a)
        assert projhead.effective_rank(a) == pytest.approx(torch.special.entr(s / s.sum()).sum().exp().item())
        assert projhead.spread(a) == pytest.approx(u.std(dim=0, correction=0).norm().item())
        assert projhead.alignment(a, b) == pytest.approx((u - v).norm(dim=1).square().mean().item())
        assert projhead.uniformity(a) == pytest.approx((-2 * torch.pdist(u).square()).exp().mean().log().item())
    for same in (torch.zeros(9, 4), torch.ones(9, 4)):
        assert projhead.uniformity(same) == projhead.spread(same) == 0 and math.isnan(projhead.uniformity(same[:1]))
        assert projhead.effective_rank(same) == pytest.approx(1, abs=1e-4)


def test_seen_and_features_holding():
    h, W = randn(200, 6) @ randn(6, 6, seed=1) + 5, randn(8, 6, seed=2)
    x, (_, s, V) = (h - h.mean(0)) / h.std(0), torch.linalg.svd(W * h.std(0))
    held = s.square().cumsum(0) / s.square().sum()
    for fraction, k in ((0.5, 2), (0.9, 3), (0.99, 5)):
        assert held[k - 2] < fraction <= held[k - 1]    # so k directions hold it
        expected = (x @ V[:k].T).square().sum() / x.square().sum()
        assert projhead.seen(h, W, fraction) == pytest.approx(expected.item())
    assert projhead.seen(h, W) == projhead.seen(h, W, 0.99) and math.isnan(projhead.seen(torch.ones(4, 6), W))
    energy = torch.tensor([3.0, 4, 0, 1, 2])
    assert [projhead.features_holding(energy, held) for held in (0.1, 0.4, 0.41, 0.7, 0.71, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert projhead.features_holding(torch.zeros(5)) == 0 and projhead.features_holding(torch.ones(200)) == 198


def test_variance_fractions_are_their_definition():
    a, labels = randn(30, 5), torch.arange(30) ** 2 % 7                         # four classes, not equally large
    b = a + 0.5 * randn(30, 5, seed=1)
    def variance(rows):
        return rows.var(dim=0, correction=0).sum().item()
    means = torch.stack([(a + b)[labels == label].mean(0) / 2 for label in labels])     # of each image's class
    total = variance(torch.cat([a, b]))
    image, between = (a - b).square().sum().item() / 60 / total, variance(means) / total
    fractions = projhead.variance_fractions(a.float(), b.float(), labels)
    assert fractions == pytest.approx((image, 1 - image - between, between), abs=1e-6)
    assert all(map(math.isnan, projhead.variance_fractions(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))))


def test_measures_are_functions_of_the_network():
    """Feature i of h times s, by the last BatchNorm, and column i of W1 over s: z is as it was, and so are they."""
    _, model, *_ = networks("--head sparse --hidden 16")
    bn, W = [m for m in model.f.modules() if isinstance(m, nn.BatchNorm2d)][-1], model.g[0].weight.data
    W[:, :32] *= 1e-4                                   # some are pruned
    x, scale = randn(40, 3, 16, 16), 10 ** randn(128, seed=1)
    def measured():
        h = model.f(x).detach()
        return model.g(h), projhead.fraction_pruned(model.g, h), projhead.seen(h, W)
    z, *before = measured()
    for values, by in ((bn.weight.data, scale), (bn.bias.data, scale), (W, 1 / scale)):
        values *= by
    again, *after = measured()
    assert torch.allclose(z, again, atol=1e-9) and after == pytest.approx(before)
    assert before[0] == 0.25 and 0.1 < before[1] < 0.99


# ---------------------------------------------------------------------------- augmentation

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
        operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for i in order if applied[n] else []:
            x = operations[i](x, [*factors[:, n], shift[n]][i].item())
        x = TF.rgb_to_grayscale(x, 3) if gray[n] else x
        x = TF.gaussian_blur(x, [2 * (S // 20) + 1] * 2, [sigma[n].item()] * 2) if blurred[n] else x
        views.append(TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return torch.stack(views)


@pytest.mark.parametrize("seed, size, crop", [
    (0, 32, 0.3), (1, 32, 0.3), (2, 32, 0.02), (3, 32, 1.0), (4, 96, 0.3)])
def test_augment_is_torchvision_image_by_image(seed, size, crop):
    images = torch.randint(0, 256, (24, 3, size, size), generator=torch.Generator().manual_seed(seed))
    images = F.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    images[0] = 70                                      # gray has no hue
    ours = train.augment(images, torch.Generator().manual_seed(seed), crop, 0.2, 0.2)
    theirs = replay(images, seed, crop, 0.2, 0.2)
    assert torch.allclose(ours, theirs, atol=2e-3)      # hue is steep near gray
    assert (ours - theirs).abs().mean() < 1e-6


@pytest.mark.parametrize("size", [32, 96])
def test_every_image_gets_its_own_view_and_the_ranks_share_one_batch(size):
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8).expand(70, -1, -1, -1)
    whole = train.augment(images, torch.Generator().manual_seed(0))
    assert torch.pdist(whole.flatten(1)).min() > 1
    parts = [train.augment(half, torch.Generator().manual_seed(0), rank=r, ranks=2)
             for r, half in enumerate(images.chunk(2))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_two_views_are_of_the_same_images_and_a_function_of_seed_and_step(monkeypatch):
    images = SETS[10_000][0][:23]
    def views(start, stop, flags="--inner-batch other", images=images):
        args = parsed(f"--seed 3 --inner-steps 1 {flags}")
        pairs = train.two_views(images, args, range(start, stop), 4, 5, torch.device("cpu"))
        return [x if other is None else torch.cat([x, other]) for x, other in pairs]
    whole = views(0, 9)                                 # two epochs of 4 steps, and one of the third
    assert all(torch.equal(a, b) for a, b in zip(views(6, 9), whole[6:]))       # as a run that starts there
    assert all(torch.equal(x, both[:10]) for x, both in zip(views(0, 9, "--inner-batch same"), whole))
    same = images[:1].expand(23, -1, -1, -1)
    x = torch.cat(views(0, 9, images=same) + views(0, 9, "--inner-batch other --seed 5", same))
    assert torch.pdist(x.unflatten(0, (-1, 5)).flatten(1)).min() > 1    # they differ between seeds, steps and views
    monkeypatch.setattr(train, "augment", lambda batch, *_: batch)
    numbered = torch.arange(23, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    x = torch.stack(views(0, 12, images=numbered))[:, :, 0, 0, 0]               # steps x images
    assert torch.equal(x[:, :5], x[:, 5:10]) and torch.equal(x[:, 10:15], x[:, 15:])
    assert (x[:, :5] != x[:, 10:15]).any(dim=1).all()
    epochs, others = x[:, :5].reshape(3, 20), x[:, 10:15]
    assert all(len(set(row)) == len(row) for row in epochs.tolist() + others.tolist())          # no image comes twice
    assert len(epochs.unique(dim=0)) == 3 and len(others.unique(dim=0)) == 12
    assert len(epochs.unique()) > 20 and len(others.unique()) > 15              # an epoch leaves out another part


# ---------------------------------------------------------------------------- training

COMBINATIONS = [flags.strip() for line in """
--head none                        | --head linear                      | --head sparse --depth 3 --sparsity-norm l1
--head parametric --depth 3 --inner-gradient unrolled                   | --head mlp --depth 1 --inner-steps 1
--head slice --dim 40              | --head reweight --loss barlow      | --head topk --hidden 40
--head discrete                    | --predictor identity               | --predictor offdiag --precision bfloat16
--predictor linear --head linear   | --predictor mlp --head topk --predictor-schedule constant
--predictor directpred --head slice| --predictor identity --loss cosine --head none
--predictor offdiag --loss infonce --head parametric --depth 1 --inner-start reset
--predictor linear --loss bn --head reweight                            | --predictor offdiag
--predictor mlp --loss bn --target ema --head discrete                  | --head none --predictor offdiag --loss cosine
--predictor mlp --loss barlow --target ema --head sparse --depth 1 --inner-steps 1 --inner-batch other
--predictor directpred --loss infonce --target ema
""".strip().splitlines() for flags in line.split("|")]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_combinations_train_save_and_evaluate(flags):
    checkpoint = run(flags + " --epochs 1")
    args, start = argparse.Namespace(**checkpoint["args"]), untrained(checkpoint)
    assert checkpoint["step"] == 2
    for name, module in zip(("encoder", "head", "predictor"), start):
        for key, p in module.named_parameters():        # what can be trained was; a bias before a BatchNorm cannot
            moved = not torch.equal(checkpoint[name][key], p) or "bias" in key
            assert moved and checkpoint[name][key].isfinite().all(), (name, key)
    frozen = evaluation.load_run("run")
    features = evaluation.features(frozen, SETS[4_000][0])
    layers = args.head != "none" or args.projector_bn == "yes"
    assert [tap for tap in features if tap[0] != "g"] == ["h"] + ["z"] * layers + ["p"] * (args.predictor != "none")
    with torch.no_grad():                               # the taps are the networks' own outputs
        h = frozen.encoder(train.normalize(SETS[4_000][0].float() / 255))
        assert torch.allclose(features["h"], h, atol=1e-5)
        assert not layers or torch.allclose(features["z"], frozen.head(h), atol=1e-4)
        assert args.predictor == "none" or torch.allclose(features["p"], frozen.predictor(frozen.head(h)), atol=1e-4)


def test_the_combinations_cover_everything():
    args = [parsed(flags) for flags in COMBINATIONS]
    assert {a.head for a in args} == HEADS.keys() and {a.predictor for a in args} == PREDICTORS.keys() | {"none"}
    assert {a.loss for a in args} == LOSSES.keys() and {a.target for a in args} == {None, "stopgrad", "ema"}
    assert {a.depth for a in args} == {None, 1, 2, 3} and 20 <= len(args) <= 25
    for flag, values in (("batch", "same other"), ("start", "warm reset"), ("gradient", "envelope unrolled")):
        assert {getattr(a, f"inner_{flag}") for a in args} == {None, *values.split()}


METHODS = ["--head mlp", "--head parametric --inner-steps 2", "--head sparse --depth 3", "--predictor mlp --target ema",
           "--head mlp --predictor offdiag", "--head discrete --predictor directpred",
           "--head parametric --inner-batch other --inner-start reset", "--head parametric --inner-gradient unrolled"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("flags, number, at", [*zip(METHODS, 4 * SIGNALS, [7, 4, 0, 8, 5, 7, 2, 6])])
def test_a_signal_saves_after_the_step_and_the_printed_command_continues(flags, number, at, monkeypatch, capsys):
    flags = f"{flags} --encoder convnet128 --limit 40 --batch-size 8 --epochs 2".split()
    train.train(train.parse_args([*flags, "--out", "whole"]))
    two_views, handlers = train.two_views, [*map(signal.getsignal, SIGNALS)]
    def interrupted(images, args, steps, *rest):
        for step, x in zip(steps, two_views(images, args, steps, *rest)):
            if step == at:
                signal.raise_signal(number)
            yield x
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--out", "parts"])
    monkeypatch.setattr(train, "two_views", interrupted)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.train(train.parse_args(sys.argv[1:]))
    assert stop.value.code == 128 + number and [*map(signal.getsignal, SIGNALS)] == handlers
    assert saved("parts")["step"] == at + 1 and not same_run("whole", "parts")
    command = capsys.readouterr().err.split("this continues: ")[1]
    monkeypatch.setattr(train, "two_views", two_views)
    train.train(train.parse_args(shlex.split(command)[2:]))
    assert same_run("whole", "parts", "loss", "inner_loss")             # which are means over the steps since


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    def stuck(images, args, steps, *rest):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
        yield
    monkeypatch.setattr(train, "two_views", stuck)
    assert ended(forked(lambda: run("--head mlp"))) == -signal.SIGINT and saved()["step"] == 0
    assert Path("child").read_text().strip() == "finishing the step, then saving (again: stop at once)"


@pytest.mark.parametrize("flags", [METHODS[1], METHODS[3]])
def test_killed_at_random_moments_it_ends_with_the_same_bits(flags, hasty):
    def training(out):
        return forked(lambda: run(flags + " --epochs 4", out))
    began = time.perf_counter()
    assert ended(training("whole")) == 0
    lasts, moments, kills = time.perf_counter() - began, random.Random(0), 0
    while kills < 4:
        child = training("parts")
        time.sleep(moments.uniform(0, lasts))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL), Path("child").read_text()
        kills += code != 0
        if Path("parts/checkpoint.pt").exists() and same_run("whole", "parts"):
            shutil.rmtree("parts")                      # it was done: again
    assert ended(training("parts")) == 0 and same_run("whole", "parts")


@pytest.mark.parametrize("killer", ["fsync", "replace", "replaced"])
def test_killed_while_it_writes(killer, hasty):
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
    for count in (1, 2, 3, 4):                          # the checkpoint's and the log's, at the start and later
        assert ended(forked(lambda: dies_at(count))) == -signal.SIGKILL
        if Path("parts/metrics.jsonl").exists():
            assert log_of("parts")
        if Path("parts/checkpoint.pt").exists():
            evaluation.load_run("parts")
    run("--head mlp --epochs 3", "parts")
    assert same_run("whole", "parts") and len(list(Path("parts").glob("[!.]*"))) == 2


@pytest.fixture
def clock(monkeypatch):
    """run(flags) at so many seconds a step: the steps after which a checkpoint was written."""
    now, saves, two_views, save = [0.0], [], train.two_views, train.save
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "save", lambda run, step: saves.append(step) or save(run, step))
    def trained(flags, seconds, kill_at=None, anew=True):
        def slowly(images, args, steps, *rest):
            for step, x in zip(steps, two_views(images, args, steps, *rest)):
                now[0] += seconds
                if step == kill_at:
                    signal.raise_signal(signal.SIGTERM)
                yield x
        monkeypatch.setattr(train, "two_views", slowly)
        shutil.rmtree("run", ignore_errors=True) if anew else None
        saves.clear()
        with pytest.raises(SystemExit) if kill_at is not None else contextlib.nullcontext():
            run(f"--head none --batch-size 8 {flags}")
        return saves
    return trained


def test_when_a_checkpoint_is_written(clock):
    """At the start, the end, on a signal, at an epoch's end if the last is over 30 s old, within one if over 300 s."""
    assert clock("--epochs 7", 10) == [0, 4, 8, 12, 14]         # two steps, 20 seconds, in an epoch
    assert clock("--epochs 7", 0.1) == [0, 14] and clock("--epochs 3", 40) == [0, 2, 4, 6]
    assert clock("--limit 40 --epochs 2", 110) == [0, 3, 5, 8, 10]
    assert clock("--epochs 2", 0.1, kill_at=2) == [0, 3] and clock("--limit 40 --epochs 2", 110, kill_at=1) == [0, 2]
    assert clock("--limit 40 --epochs 2", 110, anew=False) == [5, 8, 10]         # continued


def test_progress_is_printed_once_a_minute(clock, capsys):
    clock("--limit 40 --batch-size 2 --epochs 2", 13)
    lines = re.findall(r"^step (\d+)/40, (\d+) minutes left$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in lines] == [*range(5, 41, 5)]      # 65 seconds
    assert lines[0][1] == "8" and lines[-1][1] == "0"


def test_a_full_disk_loses_nothing(hasty, capsys):
    run("--head mlp --epochs 4", "whole")
    save, limits = train.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(run, step):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        save(run, step)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "save", full)
            error = one_line_error(lambda: run("--head mlp --epochs 4", "parts"), capsys, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "parts/checkpoint.pt" in error and saved("parts")["step"] == 4 and not list(Path("parts").glob(".*"))
    run("--head mlp --epochs 4", "parts")
    assert same_run("whole", "parts")


def test_eval_reads_whole_checkpoints_of_a_run_that_is_being_written():
    checkpoint = run("--head mlp")
    def write(value):
        encoder = {k: torch.full_like(v, value) for k, v in checkpoint["encoder"].items()}
        with train.replacing(Path("run/checkpoint.pt")) as file:
            torch.save(checkpoint | {"encoder": encoder}, file)
    write(0)
    seen, writer = [], forked(lambda: [write(i % 2) for i in range(10**6)])
    try:
        while len(seen) < 20 or len(set(seen)) < 2 and len(seen) < 200:
            values = torch.cat([v.flatten() for v in evaluation.load_run("run").encoder.state_dict().values()]).unique()
            assert len(values) == 1
            seen.append(values.item())
    finally:
        os.kill(writer, signal.SIGKILL), ended(writer)
    assert set(seen) == {0.0, 1.0}


def test_out_of_memory_names_the_batch_size(monkeypatch, capsys):
    monkeypatch.setattr(projhead.ConvNet, "forward", lambda self, x: torch.empty(2**60))        # torch's own error
    one_line_error(lambda: run("--head mlp"), capsys, "--batch-size")


def test_ema_is_an_average_that_ends_at_the_start_of_its_slope(monkeypatch):
    """BYOL's schedule, from --ema to 1, and its average; the slow copy's BatchNorm buffers are its own."""
    momenta, follow = [], train.follow
    def watched(model, momentum):
        before = copy.deepcopy(model.target)
        follow(model, momentum)
        momenta.append(momentum)
        moving = [*model.f.parameters(), *model.g.parameters()]
        for slow, old, fast in zip(model.target.parameters(), before.parameters(), moving):
            assert torch.allclose(slow, momentum * old + (1 - momentum) * fast, atol=1e-6)
        assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.target.named_buffers())
    monkeypatch.setattr(train, "follow", watched)
    a = run("--head mlp --predictor mlp --target ema --ema 0.5 --epochs 10")
    assert momenta == pytest.approx([1 - 0.5 * (1 + math.cos(math.pi * k / 20)) / 2 for k in range(20)])
    assert momenta[0] == 0.5 and momenta == sorted(momenta) and momenta[-1] > 0.99
    for key in ("2.running_mean", "0.weight"):
        assert not torch.equal(a["target"][f"0.{key}"], a["encoder"][key])
    b = run("--predictor mlp --target ema --ema 1", "b")                # never moves, but for what its batches tell it
    start = untrained(b).target.state_dict()
    assert all(torch.equal(v, start[k]) == ("running" not in k and "num" not in k) for k, v in b["target"].items())


def test_learning_rate_and_its_scales(monkeypatch):
    rates = [train.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[10] == 2.0 and rates[0] < rates[5] < rates[9] < 2 and rates[99] < 0.001
    assert rates[55] == pytest.approx(1.0) and all(b <= a for a, b in zip(rates[10:], rates[11:]))
    assert train.learning_rate(0, 10, 2.0, 0) == 2
    assert all(0 < train.learning_rate(k, 10, 2.0, 1) <= 2 for k in range(10))
    seen, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda x, model, theta, phi, *rest: seen.append(
        [group["lr"] for group in theta.param_groups + phi.param_groups]) or train_step(x, model, theta, phi, *rest))
    peak = 0.5 * 8 / 256
    lr = [train.learning_rate(step, 4, peak, 0.3) for step in range(4)]
    for schedule in ("cosine", "constant"):             # constant: SimSiam's predictor
        seen.clear()
        scales = "--lr 0.5 --head-lr 3 --predictor-lr 7 --warmup 0.3"
        run(f"--predictor offdiag {scales} --predictor-schedule {schedule}", schedule)
        assert seen == [pytest.approx([rate, 3 * rate, 7 * (peak if schedule == "constant" else rate)]) for rate in lr]
        assert [line["lr"] for line in log_of(schedule)[1:]] == pytest.approx([lr[1], lr[3]], abs=1e-6)


def test_two_processes_train_what_one_does(monkeypatch):
    """5 steps of 8 images, on gloo, in float64, where rounding does not grow into a difference."""
    build, augment = train.build, train.augment
    monkeypatch.setattr(train, "build", lambda *args: doubled(build(*args)))
    monkeypatch.setattr(train, "augment", lambda *args: augment(*args).double())
    flags = ["--head mlp", "--head parametric --inner-steps 2 --inner-batch other --inner-start reset", "--head sparse",
             "--head mlp --predictor mlp --target ema", "--head linear --predictor offdiag", "--head mlp --loss barlow",
             "--predictor directpred --loss infonce"]
    def everything(name):
        for number, each in enumerate(flags):
            run(f"--limit 40 --epochs 1 --lr {0.3 if 'barlow' in each else 3} --warmup 0 {each}", f"{name}{number}")
    codes, errors = two_processes(lambda: everything("two"), monkeypatch)
    assert codes == [0, 0], errors
    everything("one")
    for number, each in enumerate(flags):
        one, two = saved(f"one{number}"), saved(f"two{number}")
        assert one["step"] == two["step"] == 5
        assert max((one["encoder"][k] - p).abs().max() for k, p in untrained(one).f.named_parameters()) > 0.01
        a, b = tensors(one), tensors(two)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=0, atol=1e-5 if "directpred" in each else 1e-9), (each, key)
        (_, a), (first, b) = log_of(f"one{number}"), log_of(f"two{number}")
        assert first["processes"] == 2
        for key in a.keys() - {"seconds", "views_per_s", "memory"}:
            assert a[key] == pytest.approx(b[key], abs=2e-6), (each, key)


def test_two_processes_in_bfloat16(monkeypatch):
    flags = "--head mlp --precision bfloat16"
    codes, errors = two_processes(lambda: run(flags, "two"), monkeypatch)
    assert codes == [0, 0], errors
    run(flags, "one")
    for one, two in zip(log_of("one")[1:], log_of("two")[1:]):
        assert one["loss"] == pytest.approx(two["loss"], abs=0.02)
    assert {t.dtype for t in saved("two")["encoder"].values()} == {torch.float32, torch.int64}


def test_the_gradient_of_a_gathered_loss_is_that_of_the_whole_batch(monkeypatch):
    """Losses that differ between the processes, where a symmetric test is blind: each has its own rows and weights."""
    z, weights = randn(6, 4), randn(2, 6, 4, seed=1)
    def whole(x):
        return sum((w * x.square()).sum() for w in weights) / 2
    def one_rank():
        torch.distributed.init_process_group("gloo")
        mine = z[3 * train.RANK:][:3].clone().requires_grad_()
        gathered = projhead.gather(mine)
        assert torch.equal(gathered, z)
        (weights[train.RANK] * gathered.square()).sum().backward()
        x = z.clone().requires_grad_()
        expected = torch.autograd.grad(whole(x), x)[0][3 * train.RANK:][:3]
        assert torch.allclose(mine.grad / 2, expected)  # the mean over the processes, as average_gradients takes it
    codes, errors = two_processes(one_rank, monkeypatch)
    assert codes == [0, 0], errors


@pytest.mark.parametrize("case, line", [
    ("rank 0 has no data", "error: no such drawing"), ("rank 1 has no data", "error: no such drawing"),
    ("an odd batch", "error: --batch-size 15 does not divide evenly over 2 processes"),
    ("rank 1 fails", "error: out of luck")])
def test_errors_of_any_rank_are_one_line(case, line, monkeypatch):
    step = train.train_step
    def fails(when, why):
        if case == when:
            raise train.UserError(why)
    def draw(M, seed):
        return fails(f"rank {train.RANK} has no data", "no such drawing") or SETS[M]
    monkeypatch.setattr(train, "draw_shapes", draw)
    monkeypatch.setattr(train, "train_step", lambda *x: fails(f"rank {train.RANK} fails", "out of luck") or step(*x))
    codes, errors = two_processes(lambda: run(f"--head mlp --batch-size {15 if 'odd' in case else 8}"), monkeypatch)
    assert codes == [2, 2] and errors["rank 1" in case] == line + "\n" and errors["rank 1" not in case] == ""


def fresh():
    """train.py, imported anew."""
    spec = importlib.util.spec_from_file_location("fresh", HERE / "train.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_what_train_reads_from_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4"), monkeypatch.setenv("RANK", "3")      # left over: that is not torchrun
    assert [fresh().RANK, fresh().RANKS, fresh().LOCAL_RANK] == [0, 1, 0]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert [fresh().RANK, fresh().RANKS, fresh().LOCAL_RANK] == [3, 4, 0]
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.setenv(name, given[name]) if name in given else monkeypatch.delenv(name, raising=False)
        assert fresh() and os.environ.get("GOMP_SPINCOUNT") == expected
    source = (HERE / "train.py").read_text()            # torch reads it when it is imported
    assert source.index("GOMP_SPINCOUNT") < source.index("import torch")


def test_a_run_without_what_only_posix_has(monkeypatch):
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)    # its import now fails
    for name in ("O_NOFOLLOW", "O_DIRECTORY", "fork", "getuid", "setpgid"):
        monkeypatch.delattr(os, name)
    windows = fresh()
    monkeypatch.setattr(windows, "draw_shapes", lambda M, seed: SETS[M])
    monkeypatch.setattr(windows, "CACHE", Path("cache"))
    pictures("p", 40)
    for out, data in (("a", "shapes"), ("b", "folder --data p")):
        flags = f"--dataset {data} --head mlp --encoder convnet128 --limit 8 --batch-size 4 --epochs 2 --out {out}"
        windows.train(windows.parse_args(flags.split()))
        windows.train(windows.parse_args(flags.split()))
        assert saved(out)["step"] == 4 and len(log_of(out)) == 3
        assert all("memory" not in line and line["views_per_s"] > 0 for line in log_of(out)[1:])


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a device, and float64 there. "meta" stands for a GPU; reading a value
    of it raises anyway. A constant built there, as by new_tensor, is seen by newer torch only (2.15, not 2.11)."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        built_there = func is torch.ops.aten.lift_fresh.default and args[0].device.type == "meta"
        moved = to_host and torch.device(kwargs.get("device") or args[0].device) != args[0].device
        if built_there or moved or "linalg_eigh" in str(func):
            raise AssertionError(f"{func} waits")
        out = func(*args, **kwargs)
        for t in torch.utils._pytree.tree_leaves(out):
            assert not (torch.is_tensor(t) and t.dtype == double and t.device.type == "meta"), f"{func} makes float64"
        return out


@pytest.mark.parametrize("flags", [
    "--head parametric", "--head sparse --predictor offdiag", "--predictor mlp --target ema", "--head topk",
    "--head discrete --predictor linear --loss infonce", "--dataset stl10 --encoder resnet18", "--loss barlow",
    "--inner-batch other --inner-start reset", "--inner-gradient unrolled", "--predictor directpred"])
def test_nothing_in_a_step_waits_for_the_device(flags, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # which knows no "meta"
    args, meta, losses = parsed(flags), torch.device("meta"), []
    model = train.build(args, meta)
    theta, phi = train.optimizers(model, args)
    images = torch.zeros(100, 3, args.image_size, args.image_size, dtype=torch.uint8, device=meta)
    with NoWaiting():
        for x, other in train.two_views(images, args, range(2), 2, 50, meta):
            if args.predictor == "directpred":          # the one exception: its eigh is the CPU's, and waits
                with pytest.raises((AssertionError, NotImplementedError)):
                    train.train_step(x, model, theta, phi, args)
                return
            h, loss, inner = train.train_step(x, model, theta, phi, args, other)
            if model.target:
                train.follow(model, 0.9)
            losses.append(torch.stack([loss, loss if inner is None else inner]))
            assert loss.device.type == h.device.type == "meta" and (inner is None) == (not args.inner_steps)
        for waits in (lambda: torch.zeros(1).to("meta"), lambda: h.double()):
            with pytest.raises(AssertionError):
                waits()
    with pytest.raises(Exception):                      # this would wait
        train.look(losses, 2, args)


def test_a_run_keeps_its_precision(monkeypatch, capsys):
    for precision in ("bfloat16", "float32"):
        monkeypatch.setattr(train, "native_precision", lambda device: precision)
        assert run("--head mlp", precision)["args"]["precision"] == precision
        stopped("--head mlp", out=f"{precision} moves")
    assert not same_bits(saved("bfloat16"), saved("float32"))
    for native, out in (("float32", "bfloat16"), ("bfloat16", "float32")):
        monkeypatch.setattr(train, "native_precision", lambda device: native)
        other = f"--head mlp --precision {native}"
        one_line_error(lambda: run(other, f"{out} moves"), capsys, f"{out} there, {native} here")
        assert same_bits(run("--head mlp", f"{out} moves"), saved(out))


@pytest.mark.parametrize("flags", ["--head parametric --inner-batch other", "--head sparse --predictor offdiag",
                                   "--head mlp --loss barlow", "--head discrete --predictor linear --loss infonce"])
def test_views_encoder_and_objective_stay_on_a_gpu(flags, monkeypatch):
    """On a fake GPU, which has no values but refuses to mix devices; torch's backward pass would need a real one."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(fake_tensor.FakeTensor, "tolist", lambda x: [0, 1, 2, 3])       # the order of the colour operations
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)               # built there, so it is there
    args, gpu = parsed(flags), torch.device("cuda")
    with fake_tensor.FakeTensorMode():
        with gpu:
            model = train.build(args, gpu)
        for source in (gpu, torch.device("cpu")):       # where the images lie
            images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8, device=source)
            x, other = next(train.two_views(images, args, range(2), 2, 16, gpu))
            h = train.encode(model.f, x, args)
            loss = train.objective(h, None, model, args)
            assert {t.device.type for t in (x, h, loss, *[other] * (other is not None))} == {"cuda"}
        with pytest.raises(Exception):
            train.objective(h.to("cpu"), None, model, args)


def test_training_does_not_read_labels(monkeypatch):
    class Poison:
        def __getattribute__(self, name):
            raise AssertionError("a label was read")
    a = run("--head mlp", "a")
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: (SETS[10_000][0][:16], Poison()))
    assert same_bits(run("--head mlp", "b"), a)


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert run("--limit 5 --batch-size 64 --head mlp")["step"] == 2 and log_of()[0]["images"] == 5
    assert run("--limit 13 --batch-size 5 --epochs 1 --head mlp", "b")["step"] == 2     # the short batch is left out


def test_a_run_of_other_flags_or_images_is_not_continued(monkeypatch, capsys):
    run("--head mlp")
    before = files()
    differ = "holds another run", "epochs 2 there, 3 here", "lr 0.06 there, 0.5 here"
    one_line_error(lambda: run("--head mlp --epochs 3 --lr 0.5"), capsys, *differ)
    images = SETS[10_000][0].clone()
    images[3, 0, 5, 5] += 1
    monkeypatch.setattr(train, "draw_shapes", lambda M, seed: (images, SETS[M][1]))
    one_line_error(lambda: run("--head mlp"), capsys, "images")
    assert files() == before
    Path("run/checkpoint.pt").unlink()
    one_line_error(lambda: run("--head mlp"), capsys, "metrics.jsonl without a checkpoint")


def test_metrics_and_checkpoint_say_what_was_run(monkeypatch):
    seen, train_step = [], train.train_step
    def watched(*args):
        out = train_step(*args)
        seen.append([out[1].item(), out[2].item(), out[0]])
        return out
    monkeypatch.setattr(train, "train_step", watched)
    checkpoint = run("--head sparse --predictor offdiag --inner-steps 1", "m")
    first, *epochs = log_of("m")
    assert first.keys() == set("command args torch torchvision python device processes threads images".split())
    keys = set("epoch step loss inner_loss lr rank_h rank_z spread_h spread_z offdiag penalty pruned "
               "seconds views_per_s".split())
    assert all(line.keys() == keys for line in epochs) and len(epochs) == 2
    for line, steps in zip(epochs, (seen[:2], seen[2:])):                  # means over the epoch's steps
        for key, values in zip(("loss", "inner_loss"), zip(*steps)):
            assert line[key] == pytest.approx(statistics.mean(values), abs=1e-6)
        assert line["rank_h"] == pytest.approx(projhead.effective_rank(steps[-1][2]), abs=1e-5)
        assert line["spread_h"] == pytest.approx(projhead.spread(steps[-1][2]), abs=1e-5)
    A = checkpoint["predictor"]["A"]
    assert 0 < epochs[1]["offdiag"] == pytest.approx((A - A.diag().diag()).norm().item(), abs=1e-5)
    assert epochs[1]["penalty"] == pytest.approx(naive_penalty(checkpoint["head"]["0.weight"], "l21"), abs=1e-4)
    checkpoint = run("--predictor linear --inner-steps 1", "l")
    W, start = checkpoint["predictor"]["weight"], untrained(checkpoint).q.weight
    assert log_of("l")[-1]["moved"] == pytest.approx((W - start).norm().item(), abs=1e-5) and not torch.equal(W, start)
    for key in keys | first.keys() | {"moved", "memory"}:
        assert f"`{key}`" in readme(), f"README.md does not explain {key}"


def test_the_encoder_of_a_checkpoint_loads_without_us():
    checkpoint = run("--head mlp --encoder resnet18 --limit 2 --batch-size 2 --epochs 1")
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    theirs.load_state_dict(checkpoint["encoder"])
    images = SETS[4_000][0][:4]
    with torch.no_grad():
        h = theirs.eval()(train.normalize(images.float() / 255))
    assert torch.allclose(h, evaluation.features("run", images)["h"], atol=1e-4)


def test_a_diverging_run_stops_and_keeps_what_it_has(monkeypatch, capsys):
    error = one_line_error(lambda: run("--head none --lr 1e30 --warmup 0 --epochs 3"), capsys, "--lr than 1e+30")
    assert re.search(r"the loss is (nan|inf) in step 2\b", error)
    for i, flags in enumerate(("mlp --lr 3e5", "none --lr 3e5", "linear --lr 1e12",
                               "linear --limit 8 --lr 1e30 --head-lr 1e6",
                               "mlp --limit 8 --lr 1e-9 --head-lr 1e6 --weight-decay 1e6")):
        ends(lambda: run(f"--warmup 0 --epochs 4 --head {flags}", f"run{i}"), capsys)
    checkpoints = [torch.load(file) for file in Path(".").glob("run*/checkpoint.pt")]
    assert len(checkpoints) == 6 and sorted(c["step"] for c in checkpoints)[0] == 0
    assert all(v.isfinite().all() for c in checkpoints for name in ("encoder", "head") for v in c[name].values())


def test_a_finished_run_says_so_and_stays(capsys):
    run("--head mlp")
    before = files()
    run("--head mlp")
    assert "finished" in capsys.readouterr().out and files() == before


# ---------------------------------------------------------------------------- evaluation

@pytest.fixture
def quick(monkeypatch):
    """A number of the features and labels in place of the probe's; the list of what it was asked."""
    asked = []
    def number(x, y, test_x, test_y):
        asked.append((x, y, test_x, test_y))
        return x.std().item() * (1 + y[0].item()), 0.1, 50.0
    monkeypatch.setattr(evaluation, "probe", number)
    return asked


def test_evaluation_moves_nothing():
    checkpoint, before = run("--head mlp --hidden 16 --dim 8"), Path("run/checkpoint.pt").read_bytes()
    frozen, images = evaluation.load_run("run"), SETS[10_000][0]
    assert not any(m.training for m in (frozen.encoder, frozen.head, frozen.predictor, frozen.untrained))
    alone, together = evaluation.features(frozen, images, batch_size=1), evaluation.features(frozen, images)
    assert torch.allclose(alone["z"], together["z"], atol=1e-5)      # running statistics, not those of the batch
    evaluation.table(frozen)
    start = untrained(checkpoint).f.state_dict()
    for module, state in ((frozen.encoder, checkpoint["encoder"]), (frozen.head, checkpoint["head"]),
                          (frozen.untrained, start)):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        assert not any(m.training for m in module.modules())
    assert Path("run/checkpoint.pt").read_bytes() == before
    large = F.interpolate(images.float(), (50, 50)).to(torch.uint8)
    x = train.normalize(TF.resize(large.float() / 255, [32, 32], antialias=True))
    assert torch.allclose(evaluation.features("run", large)["h"], frozen.encoder(x), atol=1e-4)
    def drift(x, forward=frozen.encoder.forward):
        frozen.encoder[2].running_mean.add_(1)
        return forward(x)
    frozen.encoder.forward = drift
    with pytest.raises(RuntimeError):
        evaluation.features(frozen, images)
    frozen.encoder.forward = lambda x: x.flatten(1) * math.nan
    with pytest.raises(train.UserError):
        evaluation.features(argparse.Namespace(**vars(frozen) | {"head": nn.Sequential()}), images)


def linear_data(rows=600, dim=20, classes=7, correlated=False, strength=0.6):
    """(train_x, train_y, test_x, test_y): labels drawn from a planted linear model; 1000 test rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows + 1000, dim, generator=g)
    logits = strength * x @ torch.randn(dim, classes, generator=g)
    y = (logits - torch.rand(len(x), classes, generator=g).log().neg().log()).argmax(1)
    if correlated:
        x = (x @ torch.randn(dim, dim, generator=g) + 1).relu()
    return x[:rows], y[:rows], x[rows:], y[rows:]


def optimum(x, y, l2, classes):
    """(weights with the bias last, loss) at the minimum, in float64, by torch's LBFGS without a change of variables."""
    x, W = F.pad(x.double(), (0, 1), value=1.0), torch.zeros(classes, x.shape[1] + 1, dtype=double, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=5000, max_eval=20000, tolerance_grad=1e-8, tolerance_change=0,
                                  history_size=50, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W.T, y) + l2 / 2 * W[:, :-1].square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return W.detach(), closure().item()


@pytest.mark.parametrize("l2, dim, correlated", [
    (1e-1, 20, True), (1e-3, 20, False), (1e-3, 20, True), (1e-5, 20, True), (1e-3, 100, False)])
def test_the_probe_reaches_the_optimum(l2, dim, correlated):
    """The loss in excess of the least is at most ten times the tolerance: 1e-3 in the search, 1e-5 at the end."""
    x, y, test_x, test_y = linear_data(dim=dim, correlated=correlated)
    x, test_x = (x - x.mean(0)) / x.std(0), F.pad((test_x - x.mean(0)) / x.std(0), (0, 1), value=1.0).double()
    W, lowest = optimum(x, y, l2, 7)
    x = F.pad(x, (0, 1), value=1.0)
    covariance, cold = (x.T @ x / len(x)).double(), torch.zeros(7, dim + 1)
    warm = evaluation.fit(x[120:], y[120:], 10 * l2, cold, covariance, tolerance=1e-4)
    expected, right = (test_x @ W.T).softmax(1), ((test_x @ W.T).argmax(1) == test_y).sum().item()
    for tolerance, apart, rows in ((1e-4, 6e-3, 8), (1e-6, 1e-3, 2)):
        for start in (cold, warm):
            weights = evaluation.fit(x, y, l2, start, covariance, tolerance=tolerance).double()
            loss = F.cross_entropy(x.double() @ weights.T, y) + l2 / 2 * weights[:, :-1].square().sum()
            assert lowest - 1e-9 <= loss < lowest + 10 * tolerance
            logits = test_x @ weights.T
            assert (logits.softmax(1) - expected).abs().mean() < apart
            assert abs((logits.argmax(1) == test_y).sum().item() - right) <= rows       # of 1000
    assert cold.count_nonzero() == 0


@pytest.mark.parametrize("dim, correlated, rows", [(20, True, 1), (100, False, 2)])
def test_the_probe_agrees_with_a_search_written_out(dim, correlated, rows):
    train_x, train_y, test_x, test_y = linear_data(dim=dim, correlated=correlated)
    accuracy, l2, held_out = evaluation.probe(train_x, train_y, test_x, test_y)
    mean, std = train_x.mean(0), train_x.std(0)
    x, test_x = (train_x - mean) / std, F.pad((test_x - mean) / std, (0, 1), value=1.0).double()
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    held, kept, scores = order[:120], order[120:], {}
    for each in evaluation.L2:
        W, _ = optimum(x[kept], train_y[kept], each, 7)
        right = (F.pad(x[held], (0, 1), value=1.0).double() @ W.T).argmax(1) == train_y[held]
        scores[each] = 100 * right.float().mean().item()
    W, _ = optimum(x, train_y, l2, 7)                   # all of the training part, with the l2 that was chosen
    expected = 100 * ((test_x @ W.T).argmax(1) == test_y).float().mean().item()
    assert accuracy == pytest.approx(expected, abs=0.11)                                            # one row of 1000
    near = rows * 100 / 120 + 0.01
    assert held_out == pytest.approx(scores[l2], abs=near) and scores[l2] >= max(scores.values()) - near


def test_the_probe_never_sees_the_test_labels():
    x, y, test_x, test_y = linear_data(rows=300, strength=0.3)
    accuracy, l2 = evaluation.linear_probe(x, y, test_x, test_y)
    assert (accuracy, l2) == evaluation.linear_probe(x, y, test_x, test_y) == evaluation.probe(x, y, test_x, test_y)[:2]
    by_class = [evaluation.probe(x, y, test_x, torch.full_like(test_y, c)) for c in range(7)]
    assert sum(a for a, *_ in by_class) == pytest.approx(100, abs=1e-3)     # one prediction a row, whatever its label
    assert len({tuple(rest) for _, *rest in by_class}) == 1
    alone = [evaluation.probe(x, y, test_x[i:i + 1], test_y[i:i + 1])[0] for i in range(20)]     # nor other test rows
    assert statistics.mean(alone) == pytest.approx(evaluation.probe(x, y, test_x[:20], test_y[:20])[0], abs=1e-3)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert evaluation.linear_probe(x, shuffled, test_x, test_y)[0] < 25     # nothing to learn: near chance, 14


def test_the_probe_bears_scale_constant_columns_and_missing_classes():
    x, y, test_x, test_y = linear_data()
    expected = evaluation.probe(x, y, test_x, test_y)
    for value in (0.0, 0.1, 1234.5):
        a, b = (torch.cat([part * 100 + 7, torch.full((len(part), 2), value)], 1) for part in (x, test_x))
        got = evaluation.probe(a, y, b, test_y)
        assert got[0] == pytest.approx(expected[0], abs=0.21) and got[1] == expected[1]
    mostly_4, fours = torch.cat([y[:50], torch.full((30,), 4)]), 100 * (test_y == 4).float().mean().item()
    assert evaluation.probe(torch.zeros(80, 3), mostly_4, torch.ones(1000, 3), test_y)[0] == pytest.approx(fours)
    some, there = (y != 2) & (y != 6), (test_y != 2) & (test_y != 6)
    assert evaluation.probe(x[some], y[some], test_x[~there], test_y[~there])[0] == 0
    lonely = y % 2                                      # a class that only the held-out fifth has
    lonely[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[0]] = 5
    assert evaluation.probe(x, lonely, test_x, test_y % 2)[0] > 55
    with pytest.raises(ValueError, match="at least 5"):
        evaluation.probe(x[:4], y[:4], test_x, test_y)
    assert 0 <= evaluation.probe(x[:5], y[:5], test_x, test_y)[0] < 50
    four = linear_data(rows=100, dim=300, classes=3)    # more columns than rows; and what can be told without an error
    assert 40 < evaluation.probe(*four)[0] < 100
    far, test_far = (torch.cat([a, 1000 * F.one_hot(b, 7)], 1) for a, b in ((x, y), (test_x, test_y)))
    assert evaluation.probe(far, y, test_far, test_y)[0] == 100


def test_knn_is_the_naive_vote():
    train_x, train_y, test_x, test_y = four = linear_data(rows=100)
    test_x, test_y = test_x[:100], test_y[:100]
    def naive(k):
        right = 0
        for x, y in zip(test_x, test_y):
            cosines = F.cosine_similarity(x.double()[None], train_x.double(), dim=1).tolist()
            near = sorted(range(100), key=lambda i: -cosines[i])[:k]
            votes = [sum(int(train_y[i]) == c for i in near) for c in range(7)]
            right += votes.index(max(votes)) == int(y)
        return pytest.approx(100 * right / 100)
    ks = [20, 1, 2, 50, 1000]
    assert evaluation.knn(train_x, train_y, test_x, test_y, k=ks) == [naive(k) for k in ks]
    assert evaluation.knn(*four, k=ks) == [evaluation.knn(*four, k=k) for k in ks]
    assert evaluation.knn(*four) == evaluation.knn(*four, k=20)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])      # of equals the smaller class
    y, test = torch.tensor([3, 1, 3, 1]), torch.tensor([[2.0, 0.0]])
    assert evaluation.knn(x, y, test, torch.tensor([1]), k=[1, 2, 3, 4]) == [0, 100, 0, 100]
    assert evaluation.knn(x, y, test, torch.tensor([7])) == 0


def test_the_table_measures_what_its_columns_say(quick):
    checkpoint = run("--head mlp --predictor mlp --hidden 16 --dim 8")
    frozen, first = evaluation.load_run("run"), untrained(checkpoint).f.eval()
    images, labels, test_images, test_labels = (x[:n] for M, n in ((10_000, 16), (4_000, 20)) for x in SETS[M])
    own = [x for part in evaluation.load_data(frozen) for x in part[:2]]
    assert all(torch.equal(*pair) for pair in zip(own, (images, labels, test_images, test_labels)))
    g, args = train.generator(0, 0, 1), frozen.args
    x = [train.normalize(part.float() / 255) for part in (images, test_images)]
    x += [train.augment(test_images, g, args.crop_scale, args.hue, args.grayscale) for _ in "12"]     # of both encoders
    with torch.no_grad():
        a, b, one, two = (evaluation.taps(frozen, each) | {"h untrained": first(each)} for each in x)
    rows = evaluation.table(frozen, ks=(3, 5))
    assert [row["tap"] for row in rows] == ["h", "g[0]", "g[1]", "g[2]", "z", "p", "h untrained"]
    assert [row["layer"] for row in rows] == ["", "Linear", "ReLU", "Linear", "", "", ""]
    close = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
    for row in rows:
        tap = row["tap"]
        for i, label in enumerate((" shape", " hue")):
            four = a[tap], labels[:, i], b[tap], test_labels[:, i]
            assert (row["linear" + label], row["l2" + label], row["held_out" + label]) == close(evaluation.probe(*four))
            assert [row[f"knn{k}{label}"] for k in (3, 5)] == evaluation.knn(*four, k=[3, 5])
            fractions = row["within image"], row["within class" + label], row["between classes" + label]
            assert fractions == close(projhead.variance_fractions(one[tap], two[tap], test_labels[:, i]))
            assert sum(fractions) == pytest.approx(1)
        assert row["dim"] == b[tap].shape[1] and row["rank"] == close(projhead.effective_rank(b[tap]))
        assert row["centred rank"] == close(projhead.effective_rank(b[tap] - b[tap].mean(0)))
        assert row["alignment"] == close(projhead.alignment(one[tap], two[tap]))
        assert row["uniformity"] == close(projhead.uniformity(b[tap]))
    assert rows[0]["seen"] == close(100 * projhead.seen(b["h"], projhead.first_weight(frozen.head)))
    assert 1 <= rows[0]["carrying"] <= 128 and not any("seen" in row or "carrying" in row for row in rows[1:])
    assert evaluation.table(frozen, ks=(3, 5), inside=False) == [rows[0], rows[4], rows[6]]        # h and z alone


def test_measures_are_of_the_run_and_not_of_its_parameters(quick):
    """Feature i of h times s, by the last BatchNorm, and column i of W1 over s: z is as it was, and so are they."""
    run("--head sparse --hidden 16 --limit 40")
    frozen, scale = evaluation.load_run("run"), 10 ** randn(128, seed=1).float()
    bn = [m for m in frozen.encoder.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    def measured():
        x, row = evaluation.features(frozen, SETS[4_000][0]), evaluation.table(frozen, inside=False)[0]
        pruned = projhead.fraction_pruned(frozen.head, x["h"])
        return x["z"], pruned, row["seen"], row["carrying"], row["rank"]
    frozen.head[0].weight[:, ::4] = 0
    z, *before, rank = measured()
    with torch.no_grad():
        bn.weight *= scale
        bn.bias *= scale
        frozen.head[0].weight /= scale
    again, *after, other = measured()
    assert torch.allclose(z, again, atol=1e-4) and abs(rank - other) > 1
    assert after == pytest.approx(before, rel=1e-3) and before[0] >= 0.25 and before[1] < 99 and 1 < before[2] <= 96


def test_carrying_counts_the_features_with_a_gradient():
    run("--head linear"), run("--head slice --dim 9", "sliced")
    frozen, images = evaluation.load_run("run"), SETS[10_000][0][:16]
    some = evaluation.features(frozen, images)["h"].std(0).argsort(descending=True)[:4]
    weight = frozen.head[0].weight.clone()
    for looked_at in (1, 4):                            # by the head
        frozen.head[0].weight.zero_()[:, some[:looked_at]] = weight[:, some[:looked_at]]
        counted = evaluation.carrying(frozen, images)
        assert counted == 1 if looked_at == 1 else 1 < counted <= 4
    assert 3 < evaluation.carrying(evaluation.load_run("sliced"), images) <= 9


# ---------------------------------------------------------------------------- what was done to an image

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
    def noise(M, seed):
        return torch.randint(0, 256, (M, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    def corner(M, seed):
        return (corners + noise(M, seed) / 8 - 16).clamp(0, 255).to(torch.uint8)
    f = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12)).eval()
    head = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Tanh())
    for data, draw in (("corners", corner), ("noise", noise)):
        def load(name, root, part, size, limit=None):
            images = draw(1000 if part else 600, seed=int(part))
            return images, torch.full((len(images),), -1), []       # no labels
        monkeypatch.setattr(train, "read_dataset", load)
        args = argparse.Namespace(dataset=data, data="", image_size=16, limit=1000, predictor="none")
        some = argparse.Namespace(args=args, encoder=f, untrained=copy.deepcopy(f), head=head, path=Path("run"),
                                  predictor=nn.Identity(), images=[0, 0])
        rows = {row["tap"]: row for row in evaluation.transform_table(some, inside=data == "corners")}
        for name in evaluation.TRANSFORMS:
            if data == "corners":
                assert rows["h"][name] > 99, name
            elif name != "gray":
                assert abs(rows["h"][name] - rows["chance"][name]) < 8, name
        assert rows["h"] | {"tap": ""} == rows["h untrained"] | {"tap": ""}
        assert [rows["chance"][name] for name in evaluation.TRANSFORMS] == [25, 50, 50, 25]
        assert list(rows) == ["h", *["g[1]"] * (data == "corners"), "z", "h untrained", "chance"]
        assert data == "noise" or rows["g[1]"]["layer"] == "Tanh"


def evaluated(words, monkeypatch, capsys):
    """What `eval.py words` prints."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *shlex.split(words)])
    capsys.readouterr()
    evaluation.main()
    return capsys.readouterr().out


def cells(out):
    """The rows of a printed table, as dicts."""
    lines = [[cell.strip() for cell in line[1:-1].split(" |")] for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], (cell.strip("`") for cell in line))) for line in lines[2:]]


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", text)]


def test_transform_probes_from_the_command_line_without_labels(monkeypatch, capsys):
    pictures("flat", 30, classes=[""])
    run(SMALL + "flat --image-size 16 --limit 6 --batch-size 4 --depth 1")
    seen, features = set(), evaluation.features
    def recorded(run, images, view):
        seen.add(len(images))
        return features(run, images, view)
    for name, value in (("features", recorded), ("PROBED", 5), ("L2", (0.1,))):
        monkeypatch.setattr(evaluation, name, value)
    tests = len(train.load_dataset("folder", "flat", train=False)[0])
    rows = json.loads(evaluated("run --probe transform --json", monkeypatch, capsys))["rows"]
    assert seen == {5, min(5, tests)} and [row["tap"] for row in rows][-2:] == ["h untrained", "chance"]
    lines = cells(evaluated("run --probe transform", monkeypatch, capsys))
    assert [line["tap"] for line in lines] == [row["tap"] for row in rows]
    assert list(lines[-1].values())[-4:] == ["25.0", "50.0", "50.0", "25.0"]
    assert all(numbers(line[name]) == pytest.approx([row[name]], abs=0.051)
               for line, row in zip(lines, rows) for name in evaluation.TRANSFORMS)


# ---------------------------------------------------------------------------- tables

def test_many_runs_are_one_table(quick, monkeypatch, capsys):
    for name, flags in (("b", "--head mlp --seed 1"), ("a", "--head mlp --seed 0"), ("c", "--head none"),
                        ("d", "--predictor offdiag --seed 2")):
        run(flags, name)
    def printed(words):
        return evaluated(words, monkeypatch, capsys)
    lines = [json.loads(line) for line in printed("a b c d --json").splitlines()]
    assert [line["run"] for line in lines] == list("abcd") and all(line["step"] == 4 for line in lines)
    assert [line["args"] for line in lines] == [saved(name)["args"] for name in "abcd"]
    rows = {line["run"]: {row["tap"]: row for row in line["rows"]} for line in lines}
    def of(key, tap, *runs):                            # mean and standard deviation
        values = [rows[name][tap][key] for name in runs]
        return [statistics.mean(values), *([statistics.stdev(values)] if len(runs) > 1 else [])]
    out = printed("d a c b")                            # as given, seeds together
    shared = out.splitlines()[0].removeprefix("all: ")
    assert sorted(re.findall(r"--\S+ \S+", shared)) == [
        "--batch-size 8", "--encoder convnet128", "--epochs 2", "--limit 16", "--precision float32"]
    lines = cells(out)
    names = ["untrained convnet128", "--predictor offdiag", "--head mlp", "--head none"]
    assert [line["flags"] for line in lines] == names
    assert [line["n"] for line in lines] == ["3", "1", "2", "1"]        # the untrained encoder of seed 0 once
    for key in ("linear shape", "linear hue", "knn200 hue", "rank"):
        for tap in "h" if "knn" in key else "hz":
            assert numbers(lines[2][f"{key} {tap}"]) == pytest.approx(of(key, tap, "a", "b"), abs=0.051), key
            expected = of(key, tap, "c") if tap == "h" else []
            assert numbers(lines[3][f"{key} {tap}"]) == pytest.approx(expected, abs=0.051)
        assert numbers(lines[0][f"{key} h"]) == pytest.approx(of(key, "h untrained", "a", "b", "d"), abs=0.051)
    assert numbers(lines[1]["offdiag h"]) == pytest.approx([log_of("d")[-1]["offdiag"]], abs=0.051)
    assert numbers(lines[2]["carrying h"]) == pytest.approx(of("carrying", "h", "a", "b"), abs=0.051)
    assert lines[3]["carrying h"] == lines[0]["carrying h"] == lines[2]["offdiag h"] == ""
    assert not {"knn200 hue z", "held_out hue z", "linear hue p", "knn20 hue h"} & lines[0].keys()
    taps = [line for line in cells(printed("a b c --taps")) if "mlp" in line["flags"]]
    assert [line["tap"] + line["layer"] for line in taps] == ["h", "g[0]Linear", "g[1]ReLU", "z", "h untrained"]
    assert numbers(taps[3]["rank"]) == pytest.approx(of("rank", "z", "a", "b"), abs=0.051)
    lines = cells(printed("a b --columns alignment 'centred rank' within"))
    assert list(lines[0]) == ["flags", "n"] + [f"{key} {tap}" for key in (
        "centred rank", "alignment", "within image", "within class shape", "within class hue") for tap in "hz"]
    assert numbers(lines[1]["within class hue z"]) == pytest.approx(of("within class hue", "z", "a", "b"), abs=0.0051)
    run("--head none --limit 8", "few")                 # its probes see fewer images: no mean over both
    lines = cells(printed("a few"))
    assert [line["flags"] for line in lines][:2] == [f"untrained convnet128, {M} images" for M in (16, 8)]
    assert numbers(lines[0]["rank h"]) == pytest.approx(of("rank", "h untrained", "a"), abs=0.051)


def test_columns_of_one_run(quick, monkeypatch, capsys):
    run("--head linear", "runs/new"), run("--head none", "runs/old")
    os.utime("runs/old/checkpoint.pt", (0, 0))
    def printed(words=""):
        return evaluated(words, monkeypatch, capsys)
    out, again = printed(), printed("runs/new/checkpoint.pt")           # the newest run is the default
    assert out == again and out.startswith("runs/new, step 4 of 4;")
    rows = json.loads(printed("--json"))["rows"]
    usual = ["linear shape", "knn20 shape", "linear hue", "knn20 hue", "rank", "within image", "within class shape",
             "between classes shape", "within class hue", "between classes hue"]
    for words, keys in (("", usual), ("--columns knn200 rank", ["knn200 shape", "knn200 hue", "rank"]),
                        ("--columns seen 'knn200 hue'", ["knn200 hue", "seen"])):
        lines = cells(printed(words))
        assert [line["tap"] for line in lines] == [row["tap"] for row in rows] == ["h", "z", "h untrained"]
        assert list(lines[0]) == ["tap", "dim", *keys]
        for line, row in zip(lines, rows):
            assert all(numbers(line[key]) == pytest.approx([row[key]] if key in row else [], abs=0.051) for key in keys)
    one_line_error(lambda: printed("--columns rank l"), capsys, "no column l;", "centred rank")


def student(t, df):
    """The probability of a |t| below t, by the trapezoidal rule."""
    x = torch.linspace(0, t, 20_001, dtype=double)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    return 2 * torch.trapezoid(scale * (1 + x ** 2 / df) ** (-(df + 1) / 2), x).item()


def test_differences_are_paired_by_seed(monkeypatch, capsys):
    assert [student(t, df) for df, t in enumerate(evaluation.T95, 1)] == pytest.approx([0.95] * 9, abs=1e-3)
    h = {"--head mlp": {0: 50.0, 1: 60, 2: 71, 7: 99}, "--head linear": {2: 70.0, 0: 49, 1: 61, 5: 0},
         "--head none": {1: 50.0, 2: 71}, "--predictor mlp": {2: 72.0, 3: 1}, "--predictor offdiag": {8: 10.0, 9: 20}}
    def measured(run, question):
        name = next(name for name in h if name in f"--head {run.args.head} --predictor {run.args.predictor}".replace(
            "--head mlp --predictor none", "--head mlp").replace("--head mlp --predictor", "--predictor"))
        value = h[name][run.args.seed]
        row = {"tap": "h", "layer": "", "dim": 4, "linear": value}
        head = [] if name == "--head none" else [row | {"tap": "z", "linear": 2 * value}]
        return [row, *head, row | {"tap": "h untrained", "linear": 5.0 + run.args.seed}]
    monkeypatch.setattr(evaluation, "measured", measured)
    runs = [argparse.Namespace(args=parsed(f"{name} --seed {seed}"), path=Path("none"), step=8, steps=8, images=[9, 9])
            for name, seeds in h.items() for seed in seeds]
    def printed(against, taps=False):
        evaluation.many_table(runs, {"ks": [20], "dataset": None}, None, taps, against)
        lines = cells(capsys.readouterr().out)
        return {line["flags"] + (" " + line["tap"] if taps else ""): line for line in lines}
    lines = printed("--head mlp")
    assert list(lines) == ["untrained convnet128", *h]
    assert [line["n"] for line in lines.values()] == ["4", "4", "3", "2", "1", "0"]
    def naive(a, b, t):
        d = [a[seed] - b[seed] for seed in a if seed in b]
        mean = sum(d) / len(d)
        return [mean, t * math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))]
    mlp = h["--head mlp"]
    assert numbers(lines["--head mlp"]["linear h"]) == pytest.approx([70, statistics.stdev(mlp.values())], abs=0.051)
    assert lines["--head linear"]["linear h"] == "-0.3±2.9"
    for name, t in (("--head linear", 4.30), ("--head none", 12.71)):
        assert numbers(lines[name]["linear h"]) == pytest.approx(naive(h[name], mlp, t), abs=0.06)
    start = {seed: 5.0 + seed for seed in (0, 1, 2, 7)}
    assert numbers(lines["untrained convnet128"]["linear h"]) == pytest.approx(naive(start, mlp, 3.18), abs=0.1)
    assert lines["--predictor mlp"]["linear h"] == "+1.0" and lines["--predictor offdiag"]["linear h"] == ""
    assert lines["--head linear"]["linear z"] == "-0.7±5.7" and lines["--head none"]["linear z"] == ""
    taps = printed("--head mlp", taps=True)
    assert taps["--head linear z"]["linear"] == "-0.7±5.7"
    assert taps["--head mlp z"]["linear"] == lines["--head mlp"]["linear z"]
    assert evaluation.cell("linear", [*range(12)], True) == "+5.5±2.4"      # 2.26 * 3.6 / 12 ** 0.5
    plain = printed(None)
    assert plain["--head linear"]["linear h"] == "45.0±31.2" and plain["--head linear"]["n"] == "4"
    one_line_error(lambda: printed("--head mpl"), capsys, "no row '--head mpl'", "'--head none'")


def test_what_was_measured_is_kept_beside_the_checkpoint(monkeypatch, capsys):
    run("--head linear --epochs 3"), run("--head linear --epochs 3 --seed 1", "more")
    calls = []
    def table(run, ks, dataset, data, inside):
        calls.append((dataset, data, inside))
        weight = 100 * run.encoder[0].weight.sigmoid().mean().item()
        row = {"tap": "h", "layer": "", "dim": 3, f"knn{ks[0]}": weight, "rank": math.nan}
        return [row, *[row | {"tap": "g[0]"}] * inside, row | {"tap": "z"}]
    monkeypatch.setattr(evaluation, "table", table)
    def text(words="run --taps"):
        return evaluated(words, monkeypatch, capsys)
    first = text()
    assert text() == first and len(calls) == 1 and cells(first)[0]["rank"] == "nan" and "g[0]" in first
    other = text("run --k 3")                           # another question is measured, and kept as well
    assert "knn3 " in other and text("run --k 3") == other and text() == first and len(calls) == 2
    both = text("run more")                             # what has all taps has h and z too
    assert len(calls) == 3 and calls[-1][-1] is False and text("run more") == both and len(calls) == 3
    assert "g[0]" in text("more run --taps") and len(calls) == 4 and calls[-1][-1] is True
    assert text("run more") == both and len(calls) == 4
    old, checkpoint = evaluation.load_run("run"), saved()
    checkpoint["encoder"]["0.weight"] += 1
    torch.save(checkpoint, "run/checkpoint.pt")         # another checkpoint
    changed = text()
    assert changed != first and len(calls) == 5
    evaluation.measured(old, {"probe": "labels", "ks": [20, 200], "dataset": None, "data": None, "inside": True})
    assert text() == changed and len(calls) == 7        # what was read before it is not kept in its name
    crc, calls[:] = zlib.crc32(Path("run/checkpoint.pt").read_bytes()), []
    pairs = (1, {}), (str(crc), {}), (crc, 3), (crc, "text"), (crc, None), (crc, [1]), (crc, {"other": []})
    junk = ["", "[]", "null", "{", '{"results": 3}', "\udcff"]
    junk += [json.dumps({"checkpoint": number, "results": results}) for number, results in pairs]
    for each in junk:
        Path("run/eval.json").write_bytes(each.encode(errors="surrogateescape"))
        assert text() == changed
    assert len(calls) == len(junk) and text() == changed and len(calls) == len(junk)
    row = json.loads(text("run --json"), parse_constant=lambda word: pytest.fail(word))["rows"][0]
    assert row["rank"] is None and len(calls) == len(junk)
    text("run --dataset cifar10 --data there"), text("run --dataset cifar10 --data there")
    assert calls[len(junk):] == [("cifar10", os.path.abspath("there"), False)]       # the same question of other data
    text("run --dataset folder --data there"), text("run --dataset folder --data there")
    assert len(calls) == len(junk) + 3                  # a folder's images may have changed: always anew
    run("--head linear --epochs 3 --seed 1", "more")    # a finished run that holds it is still one of ours
    Path("run/eval.json").unlink(), Path("run/eval.json").mkdir()
    code, error = evaluates(monkeypatch, capsys, "run")
    assert code == 0 and error.startswith("not kept: cannot write run/eval.json")


def test_transfer_to_a_folder_of_pictures(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "L2", (0.1,))
    run("--head linear --dim 8")
    pictures("pictures", 60, size=(50, 40))
    before = files()
    asked = "run --dataset folder --data pictures --json"
    rows = json.loads(evaluated(asked, monkeypatch, capsys))["rows"]
    assert [row["tap"] for row in rows] == ["h", "z", "h untrained"] and rows[0]["linear"] == 100       # red and blue
    assert {f for f in files() if f not in before} == {Path("run/eval.json")}
    (images, labels, classes), (tests, *_) = evaluation.load_data(evaluation.load_run("run"), "folder", "pictures")
    assert images.shape[1:] == (3, 32, 32) and labels.shape == (len(images), 1) and classes == ["a", "b"]
    assert 16 < len(images) < 60 and len(images) + len(tests) == 60     # not the run's --limit
    code, error = evaluates(monkeypatch, capsys, "run", "--dataset", "folder")      # without --data: ./data
    assert code == 2 and error.startswith("error: no folder data")
    seen = []
    for M in (40, 60):
        pictures("data", M)                             # more in the same place
        seen.append(evaluated("run --dataset folder", monkeypatch, capsys))
    assert seen[0] != seen[1]
    run(SMALL + "pictures --image-size 16 --epochs 1", "other")
    code, error = evaluates(monkeypatch, capsys, "run", "other")
    assert code == 2 and "folder and shapes" in error
    Path("pictures").rename("moved")                    # data that moved
    code, error = evaluates(monkeypatch, capsys, "other")
    assert code == 2 and f"no folder {Path('pictures').absolute()}" in error
    assert evaluates(monkeypatch, capsys, "other", "--data", "moved") == (0, "")
    shutil.rmtree("data/a")
    code, error = evaluates(monkeypatch, capsys, "other", "--data", "data")
    assert code == 0 and "other images" in error


# ---------------------------------------------------------------------------- pictures

def sheet_of(path):
    from PIL import Image
    return torchvision.transforms.functional.pil_to_tensor(Image.open(path))


def packed(image):
    return (image.int() * torch.tensor([65536, 256, 1])[:, None, None]).sum(0)


def places(sheet, image, times=3):
    """The (y, x) at which the image, enlarged by a whole factor, lies in the packed sheet."""
    tile = packed(image).repeat_interleave(times, 0).repeat_interleave(times, 1)
    S, middle = len(tile), len(tile) // 2
    found = (sheet == tile[middle, middle]).nonzero() - middle
    found = found[((found >= 0) & (found <= torch.tensor(sheet.shape) - S)).all(1)]
    for y, x in ((0, 0), (S - 1, S - 1), *((S * i // 7, S * j // 7) for i in range(1, 7) for j in range(1, 7))):
        found = found[sheet[found[:, 0] + y, found[:, 1] + x] == tile[y, x]]
    return [(y, x) for y, x in found.tolist() if torch.equal(sheet[y:y + S, x:x + S], tile)]


@pytest.mark.parametrize("head, limit", [("mlp", 16), ("none", 5)])
def test_neighbors_are_drawn_in_their_places(head, limit, monkeypatch, capsys):
    run(f"--head {head} --limit {limit} --batch-size 4", "drawn")
    before = files()
    Path("out.png").write_text("the file that was named is replaced")
    evaluated("drawn --neighbors out.png", monkeypatch, capsys)
    assert {f: data for f, data in files().items() if f.name != "out.png"} == before
    sheet, frozen = packed(sheet_of("out.png")), evaluation.load_run("drawn")
    (images, labels), (test_images, test_labels) = SETS[10_000], SETS[4_000]
    a, b = evaluation.features(frozen, images[:limit]), evaluation.features(frozen, test_images)
    corners = [places(sheet, image) for image in test_images[:8]]
    assert all(len(corner) == 1 for corner in corners) and corners == sorted(corners)
    for i in (0, 3, 7):
        (top, left), = corners[i]
        for tap in ("h",) if head == "none" else ("h", "z"):
            cosine = F.normalize(a[tap], dim=1) @ F.normalize(b[tap][i], dim=0)
            near, x = cosine.topk(min(8, limit)).indices.tolist(), left
            for rank, j in enumerate(near):             # in one row, the nearest at the left
                found = [(y, x_) for y, x_ in places(sheet, images[j])
                         if x_ > x and (y == top if tap == "h" or rank else y > top)]
                assert found, (i, tap, j)
                top, x = found[0]
                framed = (sheet[top - 3:top, x:x + 96] == 128 * 256).all().item()           # green
                assert framed == (labels[j, 0] == test_labels[i, 0]).item()


def test_views_are_drawn_beside_their_images(monkeypatch, capsys):
    run("--head none --seed 3")
    before = set(files())
    evaluated("run --views views.png", monkeypatch, capsys)
    sheet, column, images = sheet_of("views.png"), set(), SETS[10_000][0][:8]
    assert set(files()) - before == {Path("views.png")}
    (mean, std), g = torch.tensor([train.MEAN, train.STD])[..., None, None], train.generator(3, 0, 1)
    views = [train.augment(images, g, 0.5, 0.5, 0.1) * std + mean for _ in range(8)]        # as in training
    for i, image in enumerate(images):
        (y, x), = places(packed(sheet), image)
        column.add(x)
        drawn = [sheet[:, y:y + 96, x + 106 * k:x + 106 * k + 96].float() for k in range(1, 9)]
        assert all(torch.equal(v, v[:, ::3, ::3].repeat_interleave(3, 1).repeat_interleave(3, 2)) for v in drawn)
        assert all((v[:, ::3, ::3] - 255 * view[i]).abs().max() < 1 for v, view in zip(drawn, views))
        assert torch.pdist(torch.stack(drawn).flatten(1)).min() > 50
    assert len(column) == 1


def test_pictures_have_words_and_a_size():
    image = SETS[10_000][0][0]
    for S, times in ((32, 3), (96, 1), (50, 2)):
        tile = F.interpolate(image[None], (S, S))[0]
        first = [(tile, "a caption"), (None, ""), (tile, "x" * 300, "red")]
        evaluation.picture([("row", first), ("", []), ("", [(tile, "ä\n%s")])], "p.png", "title")
        sheet = sheet_of("p.png")
        found = places(packed(sheet), tile, times)
        assert len(found) == 3 and found[0][0] == found[1][0] < found[2][0] and found[0][1] == found[2][1] < found[1][1]
        (y, x), size = found[0], S * times
        assert (sheet[:, :y - 8] < 128).any()                                       # the title
        assert (sheet[:, y + size:y + size + 20, x:x + size] < 128).any()           # the caption
        assert (sheet[:, y:y + size, 12:x - 6] < 128).any()                         # the row's label
    evaluation.picture([], "empty.png")
    assert sheet_of("empty.png").min() == 255


# ---------------------------------------------------------------------------- eval.py and what it cannot do

EVAL_BAD = """
                                  | nowhere                             | empty
broken                            | run broken                          | run --device cuda:99
run --k 0                         | run --wrong                         | run --probe colour
run --probe transform --k 20      | tiny --probe transform              | run --probe transform --columns rank
run --neighbors run/checkpoint.pt | run --neighbors empty               | run --neighbors run/checkpoint.pt/a.png
run --neighbors a.nonsense        | run --neighbors a.png --json        | run --neighbors a.png --probe transform
run --neighbors a.png --k 3       | run --neighbors a.png --columns rank| run tiny --neighbors a.png --taps
run tiny --views a.png            | run --views a.png --neighbors b.png | run --views a.png --dataset cifar10
run run                           | run tiny run/checkpoint.pt          | run --columns nothing
run --dataset shapes --data x     | run --dataset folder --data nowhere | run --dataset cifar10 --data nowhere
run --data x                      | run --taps --json                   | run --against "--head mlp"
run tiny --taps --json            | run --json --columns rank           | run tiny --json --against "--head mlp"
"""


def test_eval_refuses_in_one_line(quick, monkeypatch, capsys):
    Path("empty").mkdir(), Path("broken").mkdir()
    Path("broken/checkpoint.pt").write_bytes(b"junk")
    run("--head mlp"), run("--head mlp --limit 4 --batch-size 4", "tiny")
    before = files()
    for words in (words.strip() for line in EVAL_BAD.strip("\n").splitlines() for words in line.split("|")):
        monkeypatch.setattr(sys, "argv", ["eval.py", *shlex.split(words)])
        one_line_error(evaluation.main, capsys)
        assert files() == before, words


@pytest.mark.parametrize("place, unknown", [("test/c", 5), ("test", 9), ("test/images", 9)])
def test_test_images_without_a_label_are_counted(place, unknown, quick, monkeypatch, capsys):
    """One class of the test part is misspelt, or none has a name, as in Tiny-ImageNet."""
    pictures("p/train", 20), pictures("q", 9)
    for name in "ab":
        Path("p/train", name, "images").mkdir()
        for file in Path("p/train", name).glob("*.png"):
            file.rename(file.parent / "images" / file.name)
    Path("p", place).mkdir(parents=True)
    for file in Path("q").glob("*/*.png"):
        aside = unknown == 9 or file.parent.name == "a"
        target = Path("p", place, file.name) if aside else Path("p/test/b", file.name)
        target.parent.mkdir(parents=True, exist_ok=True), file.rename(target)
    run(SMALL + "p --image-size 16")
    code, error = evaluates(monkeypatch, capsys, "run")
    assert code == 0 and error.startswith(f"{unknown} of 9 test images have no label")
    assert error.count("\n") == (2 if unknown == 9 else 1)      # and that there are no accuracies
    assert all(test_y.tolist() == [1] * 4 and len(test_x) == 4 for _, _, test_x, test_y in quick)
    assert len(quick) == (0 if unknown == 9 else 3)             # h, z, and the untrained h


def test_measures_of_nothing(quick, monkeypatch, capsys):
    gray = torch.full((40, 3, 32, 32), 99, dtype=torch.uint8), SETS[10_000][1]
    one = {10_000: SETS[10_000], 4_000: [x[:1] for x in SETS[4_000]]}
    for name, key, sets in (("same", "seen", {10_000: gray, 4_000: gray}), ("one", "uniformity", one)):
        monkeypatch.setattr(train, "draw_shapes", lambda M, seed: sets[M])
        for seed in "01":
            run(f"--head mlp --seed {seed}", name + seed)
        text = evaluated(f"{name}0 --json", monkeypatch, capsys)
        row = json.loads(text, parse_constant=lambda word: pytest.fail(word))["rows"][0]
        assert row["tap"] == "h" and row[key] is None
        for words in ("", "--taps"):                    # the undefined value of two seeds has no mean
            lines = cells(evaluated(f"{name}0 {name}1 --columns '{key}' {words}", monkeypatch, capsys))
            assert any("nan±nan" in line.values() for line in lines)


# ---------------------------------------------------------------------------- data, files and flags

def test_shapes_are_drawn_the_same_and_apart():
    (a, labels), (b, _) = draw_shapes(64, seed=1), draw_shapes(64, seed=1)
    assert torch.equal(a, b) and a.shape == (64, 3, 32, 32) and a.dtype == torch.uint8
    assert labels.shape == (64, 2) and labels[:, 0].unique().tolist() == list(range(8)) and labels[:, 1].max() == 5
    assert not torch.equal(a, draw_shapes(64, seed=2)[0])


SMALL = "--dataset folder --head mlp --encoder convnet128 --data "


def test_folder_with_and_without_classes():
    from PIL import Image
    for i in range(40):
        place = Path("pictures", "cat dog".split()[i % 2])
        place.mkdir(parents=True, exist_ok=True)
        mode, size = [("RGB", (40, 30)), ("L", (9, 9)), ("RGBA", (64, 80)), ("P", (33, 33))][i % 4]
        Image.new("RGB", size, (6 * i,) * 3).convert(mode).save(place / f"{i}.png")
    images, labels = train.load_dataset("folder", "pictures", size=24)
    tests, _ = train.load_dataset("folder", "pictures", train=False, size=24)
    assert images.shape[1:] == (3, 24, 24) and len(images) + len(tests) == 40 and 4 <= len(tests) <= 12
    assert labels.tolist() == [round(x.float().mean().item() / 6) % 2 for x in images]      # 6 i is the gray of image i
    shutil.copytree("pictures", "more")
    for i in range(30):                 # others that come do not move an image from training to testing
        Image.new("RGB", (8, 8), (250, 0, i)).save(f"more/cat/new{i}.png")
    tests_of_more = {x.numpy().tobytes() for x in train.load_dataset("folder", "more", train=False, size=24)[0]}
    assert not tests_of_more & {x.numpy().tobytes() for x in images} and len(tests_of_more) > len(tests)
    flat_images, unknown = train.load_dataset("folder", "pictures/cat")
    assert 12 <= len(flat_images) <= 19 and (unknown == -1).all()
    for part, classes in (("train", "abc"), ("test", "ac")):         # a class that test lacks does not shift the others
        for c in classes:
            Path("split", part, c).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(f"split/{part}/{c}/1.png")
    assert sorted(train.load_dataset("folder", "split")[1].tolist()) == [0, 1, 2]
    assert sorted(train.load_dataset("folder", "split", train=False)[1].tolist()) == [0, 2]
    run(SMALL + "pictures --image-size 24 --limit 8 --epochs 1")
    run(SMALL + "pictures/cat --limit 4 --batch-size 4 --epochs 1", "b")
    assert "linear" in evaluation.table(evaluation.load_run("run"))[0]
    assert "linear" not in evaluation.table(evaluation.load_run("b"))[0]


def both_parts(folder):
    return (train.read_dataset("folder", folder, part, 16) for part in (True, False))


@pytest.mark.parametrize("names", ["train val", "Train Test", "TRAIN Validation", "train valid"])
def test_layouts_of_folders(names, capsys):
    first, second = names.split()
    pictures(f"p/{first}", 12), pictures(f"p/{second}", 6)
    (images, labels, classes), (tests, test_labels, _) = both_parts("p")
    assert (len(images), len(tests), classes) == (12, 6, ["a", "b"])
    assert labels.tolist().count(0) == 6 and test_labels.tolist().count(1) == 3
    assert (images[labels == 0][:, 0] > 150).all() and (tests[test_labels == 1][:, 2] > 150).all()
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("folder ")]
    expected = ["12 images to train on, 2 classes", "6 images to test on, 2 classes"]
    assert [note.split(": ")[1] for note in notes] == expected


def test_a_training_part_alone_and_links():
    pictures("p/Train", 30), Path("p/other").mkdir()
    pictures("q", 30), Path("q/a").rename("red"), Path("q/a").symlink_to("../red")
    for folder in "pq":
        (images, labels, classes), (tests, *_) = both_parts(folder)
        assert classes == ["a", "b"] and 0 < labels.sum() < len(labels)
        assert len(images) + len(tests) == 30 and len(tests) > 2


def test_what_an_image_can_be():
    from PIL import Image
    Path("all").mkdir()
    Image.new("L", (1, 1), 77).save("all/tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                    # to be turned by a quarter
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 40, 20))
    half.save("all/turned.jpg", exif=exif)
    for mode in ("1", "LA", "P", "RGBA", "CMYK", "F", "I;16"):
        Image.new(mode, (33, 70)).save(f"all/{mode}.{'tiff' if mode in 'CMYKF' else 'png'}")
    read = {f.name: train.read_image(str(f), 16) for f in Path("all").iterdir()}
    for mode in ("F.tiff", "I;16.png"):                 # floats and 16 bits have no range of their own: refused by name
        assert re.fullmatch(r"33 x 70 pixels of mode \S+", read.pop(mode))
    read = {name: torch.tensor(list(pixels), dtype=torch.uint8).view(3, 16, 16) for name, pixels in read.items()}
    assert len(read) == 7 and torch.equal(read["tiny.png"], torch.full((3, 16, 16), 77, dtype=torch.uint8))
    assert read["turned.jpg"][:, :, 10:].float().mean() > 250 and read["turned.jpg"][:, :, :6].float().mean() < 5


def test_a_bad_image_is_left_out_and_named(capsys):
    pictures("few", 300)
    images, _ = train.load_dataset("folder", "few", size=16)
    names = {colour(i): Path("few", "ab"[i % 2], f"{i:03}.png") for i in range(300)}
    cut, dangling = (names[tuple(image[:, 0, 0].tolist())] for image in images[3:5])
    cut.write_bytes(cut.read_bytes()[:40]), dangling.unlink(), dangling.symlink_to("nowhere")
    capsys.readouterr()
    train.train(train.parse_args(f"{SMALL} few --image-size 16 --batch-size 99 --epochs 3 --out run".split()))
    named = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(named) == 2 and str(cut) in named[0] and str(dangling) in named[1]
    assert log_of()[0]["images"] == len(images) - 2
    kept, labels = train.load_dataset("folder", "few", size=16)
    assert torch.equal(kept, torch.cat([images[:3], images[5:]]))
    assert [int(image[2, 0, 0] == 200) for image in kept] == labels.tolist()        # still those of the images
    tests, test_labels = train.load_dataset("folder", "few", False, size=16)
    a, b = (evaluation.features("run", x)["h"] for x in (kept, tests))
    assert evaluation.linear_probe(a, labels, b, test_labels)[0] == 100


def test_many_bad_images_stop_the_run():
    pictures("half", 20, 20)
    with pytest.raises(train.UserError, match="over 1 % of .* cannot be read, the last .*half/[ab]/0"):
        run(SMALL + "half")
    assert not Path("run").exists() and not list(train.CACHE.iterdir())


def test_two_images_in_all():
    pictures("two", 3)                                  # and one that is kept for testing, were there five
    assert run(SMALL + "two --limit 2")["step"] == 2


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_pictures_that_are_none(tmp_path, monkeypatch, capsys):
    from PIL import EpsImagePlugin, Image
    (tmp_path / "bin").mkdir(), Path("all").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n"), (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n" + b"showpage\n" * 40 + b"%%EOF\n"
    Path("all/eps.png").write_bytes(eps)
    with contextlib.suppress(Exception):                # Pillow itself starts the program
        Image.open("all/eps.png").load()
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    Image.new("RGB", (99, 99)).save("all/cut.jpg"), os.truncate("all/cut.jpg", 300)
    Path("all/huge.png").write_bytes(png(60_000, 60_000)), Path("all/long.png").write_bytes(png(2**31 - 1, 1))
    Path("all/header.png").write_bytes(png(7_000, 7_000)[:60]), Path("all/empty.png").touch()
    Image.new("RGB", (9, 9)).save("all/gif.png", "GIF")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons = {f.name: train.read_image(str(f), 16) for f in sorted(Path("all").iterdir())}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 * 2**10      # KiB; header.png has 147 MiB
    assert len(reasons) == 7 and all(re.fullmatch(".+", why) for why in reasons.values()), reasons
    assert not (tmp_path / "ran").exists() and "60000 x 60000 pixels" in reasons["huge.png"]
    pictures("few", 20), shutil.copy("all/cut.jpg", "few/a"), shutil.copy("all/eps.png", "few/b")
    for part in (True, False):
        with contextlib.suppress(train.UserError):      # over 1 % of them: refused, and nothing is left of it
            train.load_dataset("folder", "few", part, 16)
    assert not (tmp_path / "ran").exists() and not list(train.CACHE.glob(".*"))


def test_pictures_are_decoded_once_and_no_more_than_asked_for(monkeypatch, capsys):
    pictures("p", 150)
    seen, read = [], train.read_image
    monkeypatch.setattr(train, "read_image", lambda path, size: seen.append(path) or read(path, size))
    def load(size=16):
        return train.load_dataset("folder", "p", True, size, limit=100)
    images, labels = load()
    assert len(seen) == len(images) == 100
    again = load()
    assert len(seen) == 100 and torch.equal(again[0], images) and torch.equal(again[1], labels)
    shutil.copy(seen[1], seen[0])                       # another picture in its place
    other = load()[0]
    assert len(seen) == 200 and not torch.equal(other, images) and load(8)[0].shape[-1] == 8
    def dies(path, size):
        os.kill(os.getpid(), signal.SIGKILL) if path == seen[50] else None
        return read(path, size)
    with monkeypatch.context() as patch:                # killed while it decodes: the next one starts anew
        patch.setattr(train, "read_image", dies)
        assert ended(forked(lambda: load(9))) == -signal.SIGKILL
    assert len(load(9)[0]) == 100
    Path("file").touch()
    for where in ("file", "file/below"):
        monkeypatch.setattr(train, "CACHE", Path(where))
        one_line_error(lambda: load(10), capsys, "cannot write", where, besides=("folder ", "decoding "))


def test_data_that_moved(capsys):
    flags = SMALL.replace("--data", "--image-size 16 --limit 24 --data")
    pictures("p", 40), pictures("q", 41), run(flags + "p", "whole")
    stopped(flags + "p", at=3, out="part")
    shutil.copytree("part", "linked"), Path("p").rename("moved"), Path("link").symlink_to("moved")
    one_line_error(lambda: run(flags + "p", "part"), capsys, "--data")
    before = files()
    one_line_error(lambda: run(flags + "q", "part"), capsys, "images", besides=("folder ", "decoding "))
    assert files() == before
    for out, data in (("part", "moved"), ("linked", "link")):
        assert same_bits(run(flags + data, out), saved("whole"))


BAD = """
--head wrong | --head --heads mlp | --head none --head-lr 1
--head none --head parametric --inner-steps 0 --head-lr -1 | --head none --inner-steps 1 | --head none --sparsity 1
--head slice --head-lr 1 | --head reweight --inner-steps 1 | --head slice --sparsity 1 | --head reweight --sparsity 1
--head slice --dim 999 | --head reweight --dim 64 | --head mlp --dim 20000 | --depth 0 | --head slice --hidden 64
--predictor directpred --predictor-lr 2 | --head none --dim 64 | --head linear --hidden 64 | --head linear --depth 2
--head topk --depth 3 | --head mlp --depth 1 --hidden 64 | --head none --depth 1 | --head mlp --sparsity-norm l1
--head sparse --sparsity-norm l3 | --head sparse --head-lr 0 | --head mlp --sparsity 1 --head-lr 0
--head parametric --head-lr 0 | --head mlp --head-lr 0 --inner-steps 2 | --head mlp --inner-batch other
--head parametric --inner-steps 0 --inner-start reset | --head mlp --inner-gradient unrolled
--head parametric --inner-gradient unrolled --inner-batch other | --predictor-schedule constant
--predictor identity --predictor-schedule cosine | --loss cosine | --loss bn --head mlp | --loss barlow --tau 0.5
--precision float16 | --target ema | --predictor mlp --ema 0.9 | --predictor mlp --tau 0.5
--predictor identity --predictor-lr 2 | --tau 0 | --tau nan | --lr inf | --lr -1 | --epochs 0 | --epochs 1.5
--batch-size 1 | --limit 1 | --limit 99999999 | --seed -1 | --dataset mnist | --image-size 64 | --device cuda:99
--device nonsense | --device meta | --dataset folder --data occupied | --dataset folder --data nowhere
--dataset folder --data empty | --dataset cifar10 --data nowhere/at/all | --dataset cifar10 --data corrupt
--out finished --head mlp --lr 0.5 | --out occupied/thesis.tex | --out occupied/thesis.tex/below
--out /proc/nothing/here | --crop-scale 0 | --hue 0.6 | --grayscale 2 | --warmup 1.1 | --momentum 1 | extra words
--dataset shapes --data x | --epochs 1000000000000000 | --batch-size 1e400 | --lr 1e308 --epochs 3
"""


def test_bad_input_is_one_line_and_loses_nothing(monkeypatch, capsys):
    run("--head mlp", "finished")
    for folder in ("empty", "occupied", "corrupt/cifar-10-batches-py"):
        Path(folder).mkdir(parents=True)
    Path("occupied/thesis.tex").write_text("chapter 1")
    Path("corrupt/cifar-10-batches-py/data_batch_1").write_text("noise")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    before = files()
    for flags in (flags.strip() for line in BAD.strip().splitlines() for flags in line.split("|")):
        base = "--encoder convnet128 --limit 16 --batch-size 8 --epochs 2" * ("finished" in flags)
        one_line_error(lambda: train.train(train.parse_args(f"{base} {flags}".split())), capsys)
        assert files() == before, flags
    monkeypatch.setattr(train, "RANKS", 2)
    one_line_error(lambda: parsed("--inner-gradient unrolled"), capsys, "--inner-gradient", "one process")


def test_random_values_for_every_flag_are_taken_or_refused_in_one_line(capsys):
    assert all("default" in action.help for action in train.parser()._actions if action.dest != "help")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"})
    words = "-1 0 1 2 0.5 1e-9 nan inf -inf 1e999 1e308 0x10 mlp none ä -- %s None True [] ../.. ~"
    values = [*words.split(), "", "a b", "1" + 40 * "0"]
    draw, refused, messages = random.Random(0), 0, set()
    for _ in range(500):
        words = [w for flag in draw.sample(flags, draw.randint(1, 3)) for w in (flag, draw.choice(values))]
        try:
            args = train.parse_args(words)              # any other exception is a bug of ours
            assert args.epochs >= 1 and args.batch_size >= 2 and 0 <= args.hue <= 0.5 and math.isfinite(args.lr), words
            assert args == train.parse_args(words)
        except train.UserError as e:
            refused += 1
            messages.add(str(e))
            assert "\n" not in str(e) and str(e), words
    assert len(flags) <= 38 and 150 < refused < 500 and len(messages) > 80
    before = sorted(Path(".").rglob("*"))
    for words in (["--out", "x" * 300], ["--data", "x" * 300, "--dataset", "folder"], ["--device", "ä"]):
        one_line_error(lambda: train.train(train.parse_args(words)), capsys)
    assert sorted(Path(".").rglob("*")) == before


# ---------------------------------------------------------------------------- checkpoints and folders that are not ours

class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_files_that_are_no_checkpoints(monkeypatch, capsys):
    checkpoint = stopped("--head mlp")
    whole, path = Path("run/checkpoint.pt").read_bytes(), Path("run/checkpoint.pt")
    def put(**changes):
        torch.save(checkpoint | changes, path)
    def part(name, key, value):
        return put(**{name: checkpoint[name] | {key: value}})
    for name, make in {
            "code": lambda: torch.save(Bomb(), path), "code in a list": lambda: torch.save([1, Bomb()], path),
            "code in args": lambda: part("args", "lr", Bomb()), "a list": lambda: torch.save([1, 2], path),
            "code among tensors": lambda: part("encoder", "0.weight", Bomb()),
            "other keys": lambda: torch.save({"model": checkpoint["encoder"]}, path),
            **{f"no {key}": lambda key=key: torch.save({k: v for k, v in checkpoint.items() if k != key}, path)
               for key in ("images", "step", "head")}, "no arguments": lambda: put(args={}),
            "another shape": lambda: part("head", "0.weight", torch.ones(3, 3)),
            "another layer": lambda: part("encoder", "99.bias", torch.ones(3)),
            "cut": lambda: path.write_bytes(whole[:99_999]), "cut at the end": lambda: path.write_bytes(whole[:-1]),
            "empty": lambda: path.write_bytes(b""), "noise": lambda: path.write_bytes(random.Random(0).randbytes(5000)),
            "a folder": lambda: (path.unlink(), path.mkdir())}.items():
        make()
        before = files()
        for code, error in (ends(lambda: run("--head mlp"), capsys), evaluates(monkeypatch, capsys, "run")):
            assert code == 2 and "run" in error, (name, error)
        assert files() == before, name
    assert not Path("ran").exists()


def test_what_else_lies_in_a_runs_folder_stays(capsys):
    run("--head mlp", "whole")
    Path("run").mkdir(), Path("run/thesis.tex").write_text("chapter 1")
    stopped("--head mlp")
    leftover = Path("run/.checkpoint.pt.0123456789abcdef.tmp")          # of a process that was killed
    leftover.write_text("half")
    assert same_bits(run("--head mlp"), saved("whole")) and log_of()
    assert Path("run/thesis.tex").read_text() == "chapter 1" and leftover.read_text() == "half"


# ---------------------------------------------------------------------------- Wen & Li's simple setting
# Two neurons f_j(X) = sum_p <w_j, X_p>^3 on four patches. The population loss knows the data by f's covariances, which
# have a closed form, and its gradient flow from w_1, w_2 in R^64 stays in span(v_1, v_2, w_1, w_2): y (..., 10) holds
# w_1, w_2 in that basis, then E_12 and E_21. A plain step is a time of WL_ETA, for the head too.

WL, WL_DRAWN, WL_ALPHA, WL_NOISE = 32, 256, torch.tensor([2.5, 1.0], dtype=double), 0.4         # starts of each kind
WL_ETA, WL_STEPS = 0.1, (3000, 30_000, 300_000, 3_000_000)
WL_WITHOUT = ["nothing", "head", "stop-gradient", "normalization"]


def wen_li_starts():
    """(WL + WL_DRAWN, 10): w_j ~ N(0, I/64), w_1 the one that leads on v_1. First the separated, then any, as drawn."""
    W = randn(6000, 2, 64) / 8
    W = W.take_along_dim(W[..., :1].abs().argsort(dim=1, descending=True), dim=1)
    c = 8 * W[..., :2].abs()                                    # 6000 x neuron x feature, each |N(0, 1)|
    separated = (c[:, 1, 0] < 0.5 * c[:, 0, 0]) & (c[:, 1, 1] > 1) & (c[:, 1, 1] > 2 * c[:, 1, 0])
    separated &= (c[..., 1] < 3.5 * c[..., 0]).all(1)           # v_1 still wins: about 3 % of the draws
    W = torch.cat([W[separated][:WL], W[:WL_DRAWN]])
    w = torch.cat([W[..., :2], torch.linalg.cholesky(W[..., 2:] @ W[..., 2:].mT)], dim=-1)
    return F.pad(w.flatten(1), (0, 2))                          # E = 0, the identity


def wen_li_flow(y, without):
    """dy/dt, minus the gradient of sum_j E (BN F_j(X1) - BN G_j(X2))^2 / 2. BN has no epsilon."""
    def features(w, u):                     # half the samples have v_1, half v_2; n of its two patches are in X1 ...
        return w[..., :2] ** 3 * WL_ALPHA ** 6 / 2 @ (u[..., :2] ** 3).mT
    def own(w):                             # ... and E n^2 = 4/3, E n (2 - n) = 2/3; here E f_j(X1) f_k(X1)
        R = WL_NOISE ** 2 * w[..., 2:] @ w[..., 2:].mT          # E <w_j, xi> <w_k, xi>; of their cubes 9 r r R + 6 R^3
        r = R.diagonal(dim1=-2, dim2=-1)
        return 4 / 3 * features(w, w) + 9 * r[..., None] * r[..., None, :] * R + 6 * R ** 3
    y = y.detach().requires_grad_()
    w, E = y[..., :8].unflatten(-1, (2, 4)), y[..., 8:] * (without != "head")
    u = w if without == "stop-gradient" else w.detach()
    H = torch.eye(2, dtype=double) + E.diag_embed().flip(-1)    # ((1, E_12), (E_21, 1))
    pp, pz, zz = (C.diagonal(dim1=-2, dim2=-1) for C in (H @ own(w) @ H.mT, H @ features(w, u) * 2 / 3, own(u)))
    loss = (pp + zz) / 2 - pz if without == "normalization" else 1 - pz * (pp * zz) ** -0.5
    return -torch.autograd.grad(loss.sum(), y)[0]


@functools.cache
def wen_li(without):
    """y (n, starts, 10), a start's steps being its own, and y (4, starts, 10) at WL_STEPS. By Rosenbrock's method ROS2,
    as E's rate is stiff, up to 800; the first-order y + h k1 tells the error of a step."""
    y, I, path, at = wen_li_starts(), torch.eye(10, dtype=double), [], []
    t, h = 0 * y[:, :1], 0 * y[:, :1] + WL_ETA
    for steps in WL_STEPS:
        while (left := steps * WL_ETA - t).max() > 0:
            step = torch.minimum(h, left)
            f = wen_li_flow(torch.cat([y[None], y + 1e-6 * I[:, None]]), without)       # at y, and beside it
            A = I - (1 - 0.5 ** 0.5) * step[..., None] * ((f[1:] - f[0]) / 1e-6).permute(1, 2, 0)
            k1 = torch.linalg.solve(A, f[0])
            k2 = torch.linalg.solve(A, wen_li_flow(y + step * k1, without) - 2 * k1)
            error = (step * (k1 + k2) / 2).abs().amax(1, keepdim=True) / 3e-3
            good, longer = error <= 1, step * (0.8 * error ** -0.5).nan_to_num(0.2).clamp(0.2, 5)
            t, y = torch.where(good, t + step, t), torch.where(good, y + step * (1.5 * k1 + 0.5 * k2), y)
            h = torch.where(good & (h >= left), torch.maximum(h, longer), longer)       # cut short here: h stays
            path.append(y)
        at.append(y)
    return torch.stack(path), torch.stack(at)


def wen_li_outcome(y):
    """Whether one neuron is on v_1 and the other on v_2; whether both are on v_1, dimensional collapse."""
    w = y[..., :8].unflatten(-1, (2, 4))
    norm = w.norm(dim=-1, keepdim=True)
    on = (w[..., :2].abs() > 0.7 * norm) & (norm > 0.5)         # neuron x feature
    return on.any(-2).all(-1) & on.any(-1).all(-1), on[..., 0].all(-1)


@pytest.mark.parametrize("without", WL_WITHOUT)
def test_wen_li_flow_is_the_gradient_through_projhead(without):
    """On samples with these covariances: every feature, sign, noise and mask once."""
    y, X1, X2 = (wen_li_starts()[:40] + 0.1 * randn(40, 10)).requires_grad_(), [], []
    signs, masks = (1, -1), set(itertools.permutations([0, 0, 1, 1]))
    for l, sign, k, flip, mask in itertools.product((0, 1), signs, range(8), signs, masks):
        X, mask, angle = torch.zeros(4, 4, dtype=double), torch.tensor(mask)[:, None], math.pi / 4 * k
        X[:2, l] = sign * WL_ALPHA[l]                           # patches 0 and 1; 2 and 3 are noise
        X[2:, 2:] = 48 ** (1 / 6) * WL_NOISE * torch.tensor([math.cos(angle), math.sin(angle)], dtype=double)
        X[3] *= flip                                            # 8 angles: a Gaussian's moments to 48 E cos^6 = 15
        X1, X2 = X1 + [X * mask], X2 + [X * (1 - mask)]
    p, z = ((torch.stack(X) @ y[:, :8].reshape(-1, 4).T).pow(3).sum(dim=1) for X in (X1, X2))   # two columns a start
    A = torch.block_diag(*y[:, 8:].diag_embed().flip(-1)) * (without != "head")
    p = torch.func.functional_call(projhead.OffDiagonal(80).double(), {"A": A}, p)
    loss = F.mse_loss(p, z.detach()) if without == "normalization" else projhead.bn_mse(p, z)
    loss = 40 * (loss + projhead.bn_mse(z, p) * (without == "stop-gradient"))   # which is a mean over columns
    torch.testing.assert_close(wen_li_flow(y, without), -torch.autograd.grad(loss, y)[0], rtol=1e-6, atol=1e-8)


def test_wen_li_flow_agrees_with_plain_steps():
    y = wen_li_starts()
    for _ in range(WL_STEPS[0]):
        y = y + WL_ETA * wen_li_flow(y, "nothing")              # at their edge of stability
    differ = (wen_li("nothing")[1][0] - y)[:, :8].abs().amax(dim=1)
    print(f"\nafter {WL_STEPS[0]} plain steps w differs by {differ.median():.4f}, 90 % {differ.quantile(0.9):.4f}")
    assert differ.median() < 0.05 and differ.quantile(0.9) < 0.3


@pytest.mark.parametrize("without", WL_WITHOUT)
def test_wen_li(without):
    """Head, stop-gradient and normalization together: both features, in time. Without any one of them: not."""
    y = wen_li(without)[1]
    (both, drawn), (collapsed, lost) = ((part.sum(1).tolist() for part in outcome.split([WL, WL_DRAWN], dim=1))
                                        for outcome in wen_li_outcome(y))
    norm = y[-1, :, :8].unflatten(1, (2, 4)).norm(dim=-1)
    print(f"\nwithout {without}, after {WL_STEPS} steps: both features in {both} of {WL} separated starts, {drawn} of "
          f"{WL_DRAWN} as drawn; both neurons on v_1 in {collapsed}, {lost}; |w| {norm.min():.2f} to {norm.max():.2f}")
    if without == "nothing":                                    # as drawn, it is a matter of time for most
        assert both[0] >= 22 and both[-1] >= 31 and drawn[0] <= 95 and drawn[-1] >= 145 and drawn == sorted(drawn)
    elif without == "normalization":                            # w shrinks, from 1: complete collapse
        assert both[-1] == drawn[-1] == 0 and norm.max() < 0.4
    else:                                                       # time is of little help
        assert collapsed[-1] >= 30 and lost[-1] >= 160 and drawn[-1] - drawn[0] <= 30


def test_wen_li_the_head_leaves_the_identity_and_returns():
    """In starts that collapse without the head, and learn both features with it."""
    path, at = wen_li("nothing")
    saved = wen_li_outcome(at[-1])[0] & wen_li_outcome(wen_li("head")[1][-1])[1]
    E, separated, drawn = path[:, saved, 8:].abs().amax(dim=2), saved[:WL].sum(), saved[WL:].sum()
    most, last = E.amax(dim=0), E[-1].max()
    print(f"\n{separated} of {WL} separated starts, {drawn} of {WL_DRAWN} as drawn; |E| up to {most.min():.3f} to "
          f"{most.max():.3f}, the last {last:.0e}")
    assert separated >= 30 and drawn >= 75 and most.min() > 0.02 and last < 0.02


# ---------------------------------------------------------------------------- what README.md and others rely on

def readme():
    return (HERE / "README.md").read_text()


def test_the_readmes_commands_parse(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    helps = capsys.readouterr().out
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", readme(), re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`((?:python|--)[^`]*)`", readme())
    commands = [c.strip() for line in lines + spans for c in line.split("&&") if re.match(r"\s*(python |torchrun |--)", c) and "--help" not in c]
    class Parsed(Exception):
        pass
    monkeypatch.setattr(evaluation, "load_run", lambda *_: (_ for _ in ()).throw(Parsed))
    assert sum("train.py" in c for c in commands) > 5 and any("eval.py" in c for c in commands)
    for command in commands:
        words = re.sub(r"\b(FLAGS|DIR|K|LAMBDA|S|N)\b", lambda m: {"FLAGS": ""}.get(m[0], "1"), command).replace("...", "")
        words = shlex.split(words)
        while words and words[0].startswith(("python", "torchrun", "-m", "--nproc")) or words and words[0].isdigit():
            words.pop(0)
        script = words.pop(0) if words and words[0].endswith(".py") else None
        if script == "eval.py":
            monkeypatch.setattr(sys, "argv", ["eval.py", *([] if words and not words[0].startswith("--") else ["run"]), *words])
            with pytest.raises(Parsed):
                evaluation.main()
        elif script in ("train.py", "test_projhead.py"):
            train.parse_args(words)
        elif len(words) == 1 and words[0].startswith("--"):                # a flag that is named without a value
            monkeypatch.setattr(sys, "argv", ["eval.py", "--help"])
            with pytest.raises(SystemExit):
                evaluation.main()
            assert words[0] in helps + capsys.readouterr().out + "--nproc-per-node", words
        elif words and words[0].startswith("--"):
            try:
                train.parse_args(words)
            except train.UserError:                     # then it is one of eval.py's
                monkeypatch.setattr(sys, "argv", ["eval.py", "run", *words])
                with pytest.raises(Parsed):
                    evaluation.main()


def test_the_readme_quotes_the_code_as_it_is():
    code, quoted = "".join((HERE / name).read_text() for name in ("projhead.py", "train.py")), 0
    for block in re.findall(r"```py\n(.*?)```", readme(), re.S):
        for part in block.strip("\n").split("\n\n"):
            assert any(textwrap.indent(part, " " * indent) in code for indent in (0, 4, 8, 12)), part
            quoted += 1
    assert quoted >= 3


def test_the_readmes_links_and_pictures_exist():
    local = [link for link in re.findall(r'(?:\]\(|src=")([^)"]+)', readme()) if not link.startswith("http")]
    assert ".github/neighbors.png" in local and all((HERE / link).is_file() for link in local)


def test_the_readmes_code_runs_as_it_stands():
    section = re.search(r"^#+ *Copy it.*?\n(.*?)(?=^## |\Z)", readme(), re.S | re.M | re.I)[1]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_names_that_others_rely_on():
    assert HEADS.keys() >= {"none", "linear", "mlp", "parametric", "sparse", "slice", "reweight", "topk", "discrete"}
    assert PREDICTORS.keys() >= {"identity", "offdiag", "linear", "mlp", "directpred"} and LOSSES.keys() >= {"infonce", "cosine", "bn"}
    assert ENCODERS.keys() >= {"convnet", "resnet18", "resnet34", "resnet50"} and NORMS.keys() >= {"l21", "l1"}
    for name in ("encoder nt_xent negative_cosine bn_mse fit_head sparsity effective_rank spread alignment uniformity seen gather "
                 "features_holding fraction_pruned first_weight").split():
        assert getattr(projhead, name).__doc__, name
    for kind in [*HEADS.values(), *PREDICTORS.values()]:
        assert kind.__doc__, kind
    imports = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / "projhead.py").read_text(), re.M)
    assert set(imports) == {"torch", "torchvision"}


