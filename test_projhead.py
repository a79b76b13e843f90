# SPDX-License-Identifier: MIT
"""Oracles, the field's recurring bugs, and the papers' claims, executable: python -m pytest, a minute on one core."""
import argparse
import contextlib
import copy
import faulthandler
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "draw_shapes", lambda M, seed: SETS[M])
    monkeypatch.setattr(train, "native_precision", lambda device: "float32")


def parsed(flags):
    return train.parse_args(f"--encoder convnet128 {flags}".split())


def run(flags="", out="run"):
    """Train in this process: 4 steps of 8 images, a narrow encoder, unless the flags say otherwise."""
    usual = "--encoder convnet128 --limit 16 --batch-size 8 --epochs 2"
    train.train(train.parse_args([*f"{usual} {flags}".split(), "--out", str(out)]))
    return saved(out)


def stopped(flags="", at=2, out="run"):
    """As `run`, but a signal comes in that step; also in each of several processes."""
    caught, count, train_step = [], itertools.count(1), train.train_step
    def watched(*args):
        caught.extend([signal.SIGTERM] * (next(count) == at))
        return train_step(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "stop_signal", lambda: contextlib.nullcontext(caught))
        patch.setattr(train, "train_step", watched)
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
    timed = ("seconds", "views_per_s", "command", "args", *but)
    logs = [[{k: v for k, v in line.items() if k not in timed} for line in log_of(r)] for r in (a, b)]
    return same_bits(saved(a), saved(b)) and logs[0] == logs[1]


def doubled(model):
    """The model in float64, where rounding hides nothing."""
    return train.Model(*(m if m is None else m.double() for m in model))


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def networks(flags):
    """(args, model, theta, phi), in float64."""
    args = parsed(flags)
    model = doubled(train.build(args))
    return args, model, *train.optimizers(model, args)


def ends(action, capsys, besides=("folder ", "decoding ", "left out ", "measuring ", "warning: ")):
    """(exit code, stderr but for lines that begin with one of `besides`) of a script: at most one line of error."""
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


def one_line_error(action, capsys, *words, besides=("measuring ", "warning: ")):
    """The line with these words that a script ends with, exit code 2; nothing else is on stderr, but for `besides`."""
    code, error = ends(action, capsys, besides)
    assert code == 2 and all(word in error for word in words), (code, error)
    return error


def files():
    return {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}


needs_fork = pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "fork"), reason="torch forks on Linux only")


def forked(action, name="child", rank=0, ranks=1):
    """A child process that runs a script's main function, its stderr in the file `name`; code 70 is a traceback."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(60), faulthandler.disable()
        sys.stderr, sys.stdout = open(name, "w", buffering=1), open(os.devnull, "w")
        os.dup2(sys.stderr.fileno(), 2)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):       # as torchrun does
            os.environ[name] = str(rank if "RANK" in name else ranks)
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
    """The exit codes of two forked processes that form a gloo group, and the errors that they wrote to stderr."""
    with socket.socket() as s, monkeypatch.context() as patch:
        s.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_ADDR", "127.0.0.1"), patch.setenv("MASTER_PORT", str(s.getsockname()[1]))
        s.close()
        codes = [ended(pid) for pid in [forked(action, f"rank{rank}.err", rank, 2) for rank in (0, 1)]]
    errors = [Path(f"rank{rank}.err").read_text() for rank in (0, 1)]
    return codes, [re.sub(r"(process|warning:) .*\n", "", error) for error in errors]


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


def standardized(z, eps):
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt()


def naive_barlow(z1, z2, lambd=0.005):
    C, d = standardized(z1, 1e-5).T @ standardized(z2, 1e-5) / len(z1), range(z1.shape[1])
    return sum((1 - C[i, i]) ** 2 if i == j else lambd * C[i, j] ** 2 for i in d for j in d).item()


NAIVE = {"infonce": naive_nt_xent, "barlow": naive_barlow,
         "cosine": lambda p, z: -sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(p, z)) / len(p),
         "bn": lambda p, z: (standardized(p, 1e-12) - standardized(z, 1e-12)).square().mean().item()}


@pytest.mark.parametrize("N", [2, 3, 8])             # the batch size is that of the tensors
@pytest.mark.parametrize("name, options", [
    ("infonce", {}), ("infonce", {"tau": 0.1}), ("cosine", {}), ("bn", {}), ("barlow", {}), ("barlow", {"lambd": 1.0})])
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
    for scale in (1e3, 1e-4):                           # small z do not hide under an epsilon
        assert torch.allclose(projhead.bn_mse(scale * p, scale * z), projhead.bn_mse(p, z), rtol=1e-3)


ONE = torch.ones(1, 4)


@pytest.mark.parametrize("bad", [
    lambda: projhead.bn_mse(ONE, ONE), lambda: projhead.barlow(ONE, ONE), lambda: projhead.MLP(4)(ONE),
    lambda: projhead.encoder("lenet"), lambda: projhead.MLP(8, depth=0),
    lambda: projhead.SliceHead(12, 0), lambda: projhead.SliceHead(12, 13),
    *(functools.partial(fit, None, torch.optim.SGD(nn.Linear(2, 2).parameters()), *rest)        # phi: 2 x 2, 2
      for fit in (projhead.fit_head, functools.partial(projhead.unroll_head, None))
      for rest in ((0,), (1, []), (1, [torch.ones(1, 2), torch.ones(2)]), (1, 3 * [torch.ones(2, 2)]))),
    lambda: projhead.sparsity(projhead.MLP(8), "l3"), lambda: projhead.sparsity(projhead.NoHead(8)),
    lambda: projhead.fraction_pruned(projhead.NoHead(4), ONE)])
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


def test_heads_map_rows_to_rows():
    for name, head in HEADS.items():
        width = {"none": 16, "reweight": 16, "slice": 2}.get(name, 128)
        assert head(16)(torch.randn(4, 16)).shape == (4, width), name
        assert repr(head(128)) == repr(train.build(parsed(f"--head {name}")).g)      # a class's defaults are train.py's
    h = randn(5, 12)
    assert torch.equal(projhead.SliceHead(12, 4)(h), h[:, :4])
    assert [projhead.SliceHead(D).d for D in (2048, 512, 128, 2)] == [360, 90, 22, 1]
    for kappa, head in ((1.05, projhead.ReweightHead(12)), (2.0, projhead.ReweightHead(12, 2.0))):
        assert torch.allclose(head(h), torch.stack([h[:, i] / kappa ** i for i in range(12)], dim=1), rtol=1e-6)
        assert not list(head.parameters()) and not head.state_dict()
    for bn, hidden, end in (("none", False, 0), ("hidden", True, 0), ("end", False, 1), ("both", True, 1)):
        g = nn.Sequential(projhead.MLP(128, depth=3, bn=hidden), *[nn.BatchNorm1d(128, affine=False)] * end)
        assert repr(g if end else g[0]) == repr(train.build(parsed(f"--head mlp --depth 3 --head-bn {bn}")).g)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("bn", [True, False])
def test_an_mlp_of_any_depth_is_its_layers(bn, depth):
    head = projhead.SparseHead(6, 4, hidden=9, depth=depth, **{} if bn else {"bn": False})
    layers, h = [], torch.randn(5, 6)
    for width in (6, 9, 9)[:depth - 1]:
        layers += [nn.Linear(width, 9, bias=not bn), *[nn.BatchNorm1d(9)] * bn, nn.ReLU()]
    plain = nn.Sequential(*layers, nn.Linear(9 if layers else 6, 4))
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head(h), plain(h))
    assert [p.shape for p in projhead.MLP(6).parameters()] == [(12, 6), (12,), (12,), (128, 12), (128,)]


def test_offdiag_starts_as_the_identity_keeps_its_diagonal_and_does_not_decay():
    q, z = projhead.OffDiagonal(6), torch.randn(5, 6)
    assert torch.equal(q(z), z)                         # to the last bit
    nn.init.normal_(q.A)
    H = q.A.detach().clone().fill_diagonal_(1)
    assert torch.allclose(q(z), torch.stack([H @ row for row in z]), atol=1e-6) and torch.equal(q.E, H - torch.eye(6))
    _, model, *both = networks("--head mlp --predictor offdiag --weight-decay 0.5 --lr 0.1")
    nn.init.normal_(model.q.A)
    before = copy.deepcopy(model)
    for optimizer in both:
        for p in parameters(optimizer):
            p.grad = torch.zeros_like(p)                # nothing but decay moves anything
        optimizer.step()
    for module, old, factor in zip(model, before, (0.95, 0.95, 1)):             # f, g, q
        assert all(torch.allclose(p, factor * q) for p, q in zip(module.parameters(), old.parameters()))


# ---------------------------------------------------------------------------- the objective and the step

def naive_penalty(W, norm, unit_rows=False):
    W = torch.stack([w / w.norm() for w in W]) if unit_rows else W              # where a BatchNorm follows
    columns = [math.sqrt(sum(v * v for v in column)) for column in W.T.tolist()]
    total = sum(columns) if norm.startswith("l21") else sum(abs(v) for row in W.tolist() for v in row)
    return total if norm.endswith("plain") else total / math.sqrt(sum(c * c for c in columns))


@pytest.mark.parametrize("flags", [
    "--head none", "--head mlp --tau 0.2 --head-bn none", "--head sparse --sparsity 0.3 --sparsity-norm l1-plain",
    "--head sparse --head-bn end --sparsity-norm l1", "--predictor mlp", "--loss barlow --head mlp --dim 9",
    "--predictor mlp --loss barlow --dim 9 --head-bn none", "--predictor offdiag --sparsity 2",
    "--predictor identity --loss infonce", "--predictor linear --loss infonce --tau 1 --sparsity 1 --head-bn none",
    "--predictor linear --loss bn --target ema", "--predictor offdiag --loss cosine --target ema --head sparse",
    "--head linear --head-bn end --sparsity 2 --sparsity-norm l21-plain"])
def test_the_objective_is_its_equation(flags):
    args, model, *_ = networks(flags)
    if args.predictor == "offdiag":
        nn.init.normal_(model.q.A)
    h, t = randn(10, 128).requires_grad_(), randn(10, args.dim, seed=1) if args.target == "ema" else None
    loss, z = train.objective(h, t, model, args), model.g(h)
    naive = (lambda a, b: naive_nt_xent(a, b, args.tau)) if args.loss == "infonce" else NAIVE[args.loss]
    if args.predictor == "none":
        expected = naive(z[:5], z[5:])
        inputs = [h, *model.g.parameters()]
        assert torch.autograd.gradcheck(lambda *_: train.objective(h, t, model, args), inputs, fast_mode=True)
    else:                                               # each view predicts the other, as a constant
        p, t = model.q(z), z.detach() if t is None else t
        expected = (naive(p[:5], t[5:]) + naive(p[5:], t[:5])) / 2
        constant = train.objective(h, t, model, args)
        assert torch.allclose(*(torch.autograd.grad(value, h, retain_graph=True)[0] for value in (loss, constant)))
    if args.sparsity:                                   # a BatchNorm behind the first layer makes its rows free
        free_rows = args.head_bn in ("hidden", "both") or args.head == "linear"
        W = next(model.g.parameters())
        expected += args.sparsity * naive_penalty(W, args.sparsity_norm, free_rows)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("flags", [
    "--head mlp --head-bn none", "--head none", "--loss barlow --head mlp", "--predictor mlp --target ema",
    "--head sparse --inner-steps 1", "--inner-steps 3 --head-bn none", "--head parametric --inner-start reset",
    "--head linear --predictor offdiag --inner-steps 2", "--inner-batch other --head-bn end",
    "--predictor mlp --target ema --inner-steps 2 --inner-batch other --inner-start reset",
    "--head mlp --inner-steps 2 --inner-gradient unrolled --head-bn none",
    "--predictor linear --inner-steps 3 --inner-gradient unrolled --inner-start reset"])
def test_two_steps_are_gradient_descent_written_out(flags):
    """Joint, theta and phi from one gradient; else phi alone K times at fixed h, then theta alone, or through them."""
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
        first = (start if args.inner_start == "reset" else heads).parameters()
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
        ours, theirs = (nn.ModuleList(each[:4]).state_dict() for each in (model, by_hand))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)    # BatchNorm's count: a batch is encoded once


def test_bfloat16_is_the_encoders_alone():
    args = parsed("--head mlp --predictor mlp --target ema --precision bfloat16")
    model, seen = train.build(args), {}
    for name, module in (("f", model.f[0]), ("slow f", model.target[0][0]), ("g", model.g[0]), ("q", model.q[0])):
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
    x = randn(16, 3, 32, 32, dtype=torch.float32)
    h, loss, _ = train.train_step(x, model, *train.optimizers(model, args), args)
    half, single = torch.bfloat16, torch.float32
    assert seen == {"f": half, "slow f": half, "g": single, "q": single} and h.dtype == loss.dtype == single


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


def test_inner_steps_start_again_without_momentum():
    _, g, encode, loss = bilevel()
    h, start, optimizer = encode().detach(), [g.weight.detach().clone()], torch.optim.SGD(g.parameters(), 0.1, 0.9)
    losses = [projhead.fit_head(lambda: loss(h), optimizer, 3) for _ in range(2)]       # the second goes on
    assert not losses[0].requires_grad
    assert [projhead.fit_head(lambda: loss(h), optimizer, steps, start) for steps in (3, 6)] == losses


@pytest.mark.parametrize("steps, momentum, decay", [(1, 0, 0), (3, 0, 0), (3, 0, 0.2), (500, 0.9, 0)])
def test_envelope_theorem(steps, momentum, decay):
    """The numerical derivative of min over phi of L is dL/dtheta at the fitted phi alone; unroll_head's for any K."""
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
    """After some joint training 2 steps leave dL/dtheta nearly as it is, and 20 fit phi to their batch alone."""
    flags = "--head mlp --tau 0.1"
    joint, other_batch = parsed(flags), parsed(f"{flags} --inner-steps 2 --inner-batch other")
    model, images = train.build(joint), draw_shapes(1024, seed=1)[0]
    theta, phi = train.optimizers(model, joint)
    for step in range(50):
        train.train_step(train.two_views(images, joint, step, 32, 32, "cpu")[0], model, theta, phi, joint)
    start, rows = [p.detach().clone() for p in parameters(phi)], []
    for step in range(50, 54):
        h, other = (model.f(x) for x in train.two_views(images, other_batch, step, 32, 32, "cpu"))
        for K in (0, 2, 20):
            projhead._restart(phi, 1, start)
            if K:
                projhead.fit_head(lambda: train.objective(h.detach(), None, model, joint), phi, K)
            loss, of_other = (train.objective(each, None, model, joint) for each in (h, other))
            gradients = torch.autograd.grad(loss, parameters(theta), retain_graph=True)
            gradient = torch.cat([d.flatten() for d in gradients])
            first = gradient if K == 0 else first
            rows.append([F.cosine_similarity(gradient, first, dim=0).item(), loss.item(), of_other.item()])
    before, two, twenty = torch.tensor(rows).view(4, 3, 3).mean(dim=0)
    fitted, fresh = twenty[1:] - before[1:]
    print(f"\ncosine {two[0]:.2f} after 2 steps and {twenty[0]:.2f} after 20, which change the batch's loss by "
          f"{fitted:+.2f}, another's by {fresh:+.2f}")
    assert two[0] > 0.95 and twenty[0] < two[0] - 0.3 and fitted < -0.2 and fresh > -0.1


# ---------------------------------------------------------------------------- sparsity

@pytest.mark.parametrize("bn", [False, True])
def test_a_zero_column_is_pruned_and_has_a_gradient(bn):
    head, h = projhead.SparseHead(2, 3, hidden=2, bn=bn), torch.tensor([[1.0, 5], [3, 7], [2, 0]])
    head[0].weight.data = 1e-5 * torch.tensor([[3.0, 0], [4, 1]])
    assert projhead.fraction_pruned(head, h) == 0
    constant = torch.stack([h[:, 0], torch.full((3,), 9.0)], dim=1)
    assert projhead.fraction_pruned(head, constant) == 0.5
    head[0].weight.data[:, 1] = 0
    penalty = head.penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(1) and head[0].weight.grad.isfinite().all()         # l21 of one column
    assert projhead.fraction_pruned(head, h) == 0.5
    head[0].weight.data = torch.tensor([[1.0, 0], [1e-5, 1e-5]])
    assert projhead.fraction_pruned(head, h) == (0 if bn else 0.5)              # a BatchNorm makes the small row count
    head[0].weight.data[:, 1] *= 1e5                    # the scale of a feature may move into its column
    assert projhead.fraction_pruned(head, h * torch.tensor([1, 1e-5])) == (0 if bn else 0.5)


def test_the_scale_free_penalty_prunes_and_the_plain_one_only_shrinks():
    """Ten input features, of which three tell the images apart; the loss normalizes, so the scale of W is free."""
    torch.manual_seed(0)
    signal = torch.randn(64, 3)
    def fitted(norm, bn):
        torch.manual_seed(0)
        head = projhead.SparseHead(10, 8, bn=bn)
        optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        start = head[0].weight.norm().item()
        for step in range(300):
            optimizer.param_groups[0]["lr"] = train.learning_rate(step, 300, 0.05, 0.05)
            views = [torch.cat([signal + 0.1 * torch.randn(64, 3), torch.randn(64, 7)], dim=1) for _ in "12"]
            loss = projhead.nt_xent(*(head(v) for v in views)) + 0.1 * head.penalty(norm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        W = head[0].weight.detach()
        return projhead.fraction_pruned(head, views[0]), W.norm(dim=0), W.norm().item() / start
    for norm, bn in (("l21", False), ("l21", True), ("l21-plain", True)):       # with unit rows both are free of scale
        pruned, columns, _ = fitted(norm, bn)
        assert 0.5 <= pruned <= 0.7 and (columns[:3] > 1e-3 * columns.max()).all()          # of the seven, no signal
    pruned, _, shrunk = fitted("l21-plain", False)
    assert pruned == 0 and shrunk < 0.7


# ---------------------------------------------------------------------------- measures

def test_rank_spread_and_features_holding():
    for M in (2, 5, 50):
        a = randn(M, 6) + 0.5
        s = torch.linalg.svdvals(a)
        assert projhead.effective_rank(a) == pytest.approx(torch.special.entr(s / s.sum()).sum().exp().item())
        assert projhead.spread(a) == pytest.approx(F.normalize(a).std(dim=0, correction=0).norm().item())
    for same in (torch.zeros(9, 4), torch.ones(9, 4)):
        assert projhead.spread(same) == 0 and projhead.effective_rank(same) == pytest.approx(1, abs=1e-4)
    energy = torch.tensor([3.0, 4, 0, 1, 2])
    assert [projhead.features_holding(energy, held) for held in (0.1, 0.4, 0.41, 0.7, 0.71, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert projhead.features_holding(torch.zeros(5)) == 0 and projhead.features_holding(torch.ones(200)) == 198


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


@pytest.mark.parametrize("seed, size, crop, N", [
    (0, 32, 0.3, 70), (1, 32, 0.02, 24), (2, 32, 1.0, 24), (3, 96, 0.3, 24), (4, 96, 0.3, 24)])
def test_augment_is_torchvision_image_by_image(seed, size, crop, N):
    images = torch.randint(0, 256, (N, 3, size, size), generator=torch.Generator().manual_seed(seed))
    images = F.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    images[0] = 70                                      # gray has no hue
    ours = train.augment(images, torch.Generator().manual_seed(seed), crop, 0.2, 0.2)
    theirs = replay(images, seed, crop, 0.2, 0.2)
    assert torch.allclose(ours, theirs, atol=2e-3)      # hue is steep near gray
    assert (ours - theirs).abs().mean() < 1e-6


def test_two_views_are_of_the_same_images_and_a_function_of_seed_and_step(monkeypatch):
    images = SETS[10_000][0][:23]
    def views(start, stop, flags="--inner-batch other", images=images):
        args = parsed(f"--seed 3 --inner-steps 1 {flags}")
        pairs = (train.two_views(images, args, step, 4, 5, torch.device("cpu")) for step in range(start, stop))
        return [x if other is None else torch.cat([x, other]) for x, other in pairs]
    whole = views(0, 9)                                 # two epochs of 4 steps, and one of the third
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

COMBINATIONS = [
    *(f"--head {head}" for head in HEADS), *(f"--predictor {predictor}" for predictor in PREDICTORS),
    *(f"--predictor mlp --loss {loss} --target ema --head linear" for loss in LOSSES),
    "--head mlp --loss barlow --depth 1 --inner-steps 1", "--predictor offdiag --precision bfloat16 --head slice",
    "--predictor offdiag --loss infonce --head parametric --depth 3 --inner-start reset",
    "--predictor linear --loss cosine --head sparse --depth 3 --inner-steps 1 --inner-batch other",
    "--predictor mlp --loss bn --head none", "--head parametric --inner-gradient unrolled", "--head mlp --head-bn none",
    "--head sparse --depth 3 --head-bn both", "--head linear --head-bn end --sparsity 1 --inner-steps 1",
    "--predictor mlp --target ema --head-bn none"]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_combinations_train_save_and_evaluate(flags):
    checkpoint = run(flags + " --epochs 1")
    for name, module in zip(("encoder", "head", "predictor"), untrained(checkpoint)):
        for key, p in module.named_parameters():        # what can be trained was; a bias before a BatchNorm cannot
            moved = not torch.equal(checkpoint[name][key], p) or "bias" in key
            assert moved and checkpoint[name][key].isfinite().all(), (name, key)
    features = evaluation.features("run", SETS[4_000][0])
    assert "h" in features and ("p" in features) == (checkpoint["args"]["predictor"] not in ("none", "identity"))


def before_each_step(monkeypatch, action, learning_rate=train.learning_rate):
    """From now on action(step) is called before each step."""
    def watched(step, *rest):
        action(step)
        return learning_rate(step, *rest)
    monkeypatch.setattr(train, "learning_rate", watched)


@pytest.mark.parametrize("flags, number, at", [
    ("--head sparse --predictor offdiag", signal.SIGINT, 0), ("--predictor mlp --target ema", signal.SIGTERM, 4),
    ("--predictor linear --inner-steps 1 --inner-gradient unrolled", signal.SIGINT, 7),
    ("--head parametric --inner-batch other --inner-start reset", signal.SIGTERM, 8),
    ("--head none", signal.SIGINT, 2.5)])               # between two steps: the second one still sees it
def test_a_signal_saves_and_the_printed_command_continues(flags, number, at, monkeypatch, capsys):
    flags, handlers = f"--limit 40 {flags}", [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
    run(flags, "whole")                                 # two epochs of 5 steps
    before_each_step(monkeypatch, lambda step: signal.raise_signal(number) if step == at else None)
    def between(progress, done, *_):
        return done - 0.5 == at and signal.raise_signal(number)
    monkeypatch.setattr(train.Progress, "__call__", between)
    usual = "train.py --encoder convnet128 --batch-size 8 --epochs 2 --out parts"
    monkeypatch.setattr(sys, "argv", f"{usual} {flags}".split())
    with pytest.raises(SystemExit) as stop:
        train.train(train.parse_args())
    assert stop.value.code == 128 + number and saved("parts")["step"] == math.ceil(at) + 1
    assert handlers == [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
    command = capsys.readouterr().err.split("this continues: ")[1]
    before_each_step(monkeypatch, lambda step: None)
    train.train(train.parse_args(shlex.split(command)[2:]))
    assert same_run("whole", "parts", "loss", "inner_loss")             # which are means over the steps since


@needs_fork
def test_killed_at_any_moment_it_ends_with_the_same_bits(monkeypatch):
    flags, began, save = "--predictor mlp --target ema --inner-steps 1 --epochs 4", time.perf_counter(), train.save
    def hasty(run, step):                               # without the 30 seconds between two checkpoints
        save(run, step)
        run.saved -= 100
    monkeypatch.setattr(train, "save", hasty)
    run(flags, "whole")
    lasts, moments = time.perf_counter() - began, random.Random(0)
    Path("parts").mkdir(), Path("parts/thesis.tex").write_text("chapter 1")
    def dies_in_sync(number):
        count = itertools.count(1)
        monkeypatch.setattr(os, "fsync", lambda _: next(count) == number and os.kill(os.getpid(), signal.SIGKILL))
        run(flags, "parts")
    for number in (1, 2, 3, 5):                         # in the first checkpoint, the log, the checkpoint after it
        assert ended(forked(lambda: dies_in_sync(number))) == -signal.SIGKILL
    for _ in range(4):
        child = forked(lambda: run(flags, "parts"))
        time.sleep(moments.uniform(0, lasts / 3))
        os.kill(child, signal.SIGKILL)
        assert ended(child) in (0, -signal.SIGKILL), Path("child").read_text()
    run(flags, "parts")
    assert same_run("whole", "parts") and Path("parts/thesis.tex").read_text() == "chapter 1"
    assert {file.name for file in Path("parts").glob("[!.]*")} == {"checkpoint.pt", "metrics.jsonl", "thesis.tex"}


@needs_fork
def test_a_full_disk_loses_nothing_and_a_second_signal_ends_the_process(monkeypatch):
    flags = "--head mlp --epochs 4"
    def full():
        import resource                                 # which Windows has not
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        run(flags, "parts")
    run(flags, "whole"), stopped(flags, at=4, out="parts")
    assert ended(forked(full)) == 2
    error = "error: cannot write parts/checkpoint.pt: File too large; what it held before is as it was\n"
    assert Path("child").read_text().endswith(error)
    assert saved("parts")["step"] == 4 and not list(Path("parts").glob(".*"))
    assert run(flags, "parts") and same_run("whole", "parts")
    def twice(step):
        signal.raise_signal(signal.SIGTERM), time.sleep(0.01)           # Python calls the handler of the first
        signal.raise_signal(signal.SIGINT), time.sleep(60)
    before_each_step(monkeypatch, twice)
    assert ended(forked(lambda: run("--head mlp"))) == -signal.SIGINT and saved()["step"] == 0
    assert Path("child").read_text().splitlines()[-1] == "finishing the step, then saving (again: stop at once)"


def test_when_a_checkpoint_is_written_and_progress_told(monkeypatch, capsys):
    """At the start, the end, at an epoch's end if the last is over 30 s old, and within an epoch if over 300 s."""
    now, saves, save, tick = [0.0], [], train.save, [0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "save", lambda run, step: saves.append(step) or save(run, step))
    before_each_step(monkeypatch, lambda step: now.append(now.pop() + tick[0]))
    def saves_of(flags, seconds):                       # in each step
        tick[0] = seconds
        saves.clear(), run(f"--head none {flags}", f"run {flags}")
        return saves
    assert saves_of("--epochs 7", 10) == [0, 4, 8, 12, 14]      # two steps, 20 seconds, in an epoch
    assert saves_of("--epochs 3", 40) == [0, 2, 4, 6] and saves_of("--epochs 2", 0.1) == [0, 4]
    assert saves_of("--limit 40 --epochs 2", 110) == [0, 3, 5, 8, 10]
    capsys.readouterr()
    saves_of("--limit 40 --batch-size 2 --epochs 2", 13)        # the first after 10 seconds, then each 60
    told = re.findall(r"^step (\d+)/40  loss -?\d+\.\d\d  (\d+) min left$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in told] == [1, *range(6, 40, 5)] and [told[0][1], told[-1][1]] == ["9", "1"]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    began, progress = now[0], train.Progress(1200, terminal, "image", done=1000)
    for i in range(1, 401):
        now[0] = began + i / 2
        progress(1000 + i // 2, "loss 4.91")
    *lines, rest = terminal.getvalue().split("\r")      # one a second, which covers the one before
    assert [len(line) for line in lines] == 199 * [79] and rest == ""
    assert lines[0].startswith("image 1,001/1,200  loss 4.91  4 min")   # of 199 images, not of 1,200


def test_ema_is_an_average_of_byols_schedule(monkeypatch):
    """From --ema to 1, along a half cosine; the slow copy's BatchNorm buffers are its own."""
    momenta, follow = [], train.update_target
    def watched(model, momentum):
        momenta.append(momentum)
        before, fast = copy.deepcopy(model.target), nn.Sequential(model.f, model.g)
        follow(model, momentum)
        average = [momentum * old + (1 - momentum) * new for old, new in zip(before.parameters(), fast.parameters())]
        torch.testing.assert_close([*model.target.parameters()], average)
        assert all(map(torch.equal, model.target.buffers(), before.buffers()))
    monkeypatch.setattr(train, "update_target", watched)
    slow = run("--head mlp --predictor mlp --target ema --ema 0.5 --epochs 10")["target"]["0.2.running_mean"]
    assert momenta == pytest.approx([1 - 0.5 * (1 + math.cos(math.pi * k / 20)) / 2 for k in range(20)])
    assert slow.any() and not torch.equal(slow, saved()["encoder"]["2.running_mean"])


@needs_fork
def test_two_processes_train_what_one_does(monkeypatch):
    """3 steps of 8 images, on gloo, in float64, where rounding does not grow into a difference."""
    build, augment = train.build, train.augment
    monkeypatch.setattr(train, "build", lambda *args: doubled(build(*args)))
    monkeypatch.setattr(train, "augment", lambda *args: augment(*args).double())
    flags = ["--inner-batch other --inner-start reset", "--head mlp --loss barlow --head-bn end",
             "--predictor mlp --target ema", "--head sparse --predictor offdiag",
             "--predictor linear --loss infonce --head-bn none --sparsity 0.1"]
    def everything(name):
        for number, each in enumerate(flags):
            run(f"--limit 24 --epochs 1 --lr 0.3 --warmup 0 {each}", f"{name}{number}")
    codes, errors = two_processes(lambda: everything("two"), monkeypatch)
    assert codes == [0, 0], errors
    everything("one")
    for number, each in enumerate(flags):
        one, two = f"one{number}", f"two{number}"
        torch.testing.assert_close(tensors(saved(one)), tensors(saved(two)), rtol=0, atol=1e-9)
        (_, one), (first, two) = log_of(one), log_of(two)
        two.update({key: one[key] for key in ("seconds", "views_per_s")})
        assert first["processes"] == 2 and one == pytest.approx(two, abs=2e-6), each


@needs_fork
def test_two_processes_sum_the_gradients_of_gathered_losses_and_continue_in_bfloat16(monkeypatch):
    """The losses differ between the processes: a symmetric test is blind."""
    z, weights, flags = randn(6, 4), randn(2, 6, 4, seed=1), "--head mlp --precision bfloat16"
    def one_rank():
        train.join(parsed("--device cpu"))
        with train.stop_signal():                      # torchrun's own signals end a process at once
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        mine = slice(3 * projhead.rank(), 3 * projhead.rank() + 3)
        rows = z[mine].clone().requires_grad_()
        (weights[projhead.rank()] * projhead.gather(rows).square()).sum().backward()
        assert torch.allclose(rows.grad, (2 * weights.sum(0) * z)[mine])        # average_gradients divides it by 2
        stopped(flags, out="two"), run(flags, "two")
    codes, errors = two_processes(one_rank, monkeypatch)
    assert codes == [0, 0], errors
    assert {t.dtype for t in run(flags, "one")["encoder"].values()} == {torch.float32, torch.int64}
    assert log_of("one")[2]["loss"] == pytest.approx(log_of("two")[2]["loss"], abs=0.02)


@needs_fork
@pytest.mark.parametrize("rank, where, line", [
    (0, "load_dataset", "out of luck"), (1, "train_step", "out of luck"),
    (0, "", "--batch-size 15 does not divide evenly over 2 processes")])
def test_an_error_of_any_rank_is_one_line(rank, where, line, monkeypatch):
    real, join = getattr(train, where, None), train.join
    def fails(*args):
        if projhead.rank() == rank:
            raise train.UserError(line)
        return real(*args)
    def joins(args):                                    # none ends before both have joined
        device, _ = join(args), Path(f"joined{projhead.rank()}").touch()
        while len(list(Path().glob("joined*"))) < 2:
            time.sleep(0.01)
        return device
    monkeypatch.setattr(train, "join", joins)
    monkeypatch.setattr(train, where, fails, raising=False)
    codes, errors = two_processes(lambda: run(f"--head mlp --batch-size {8 if where else 15}"), monkeypatch)
    both = rank == 0 and not where                      # each says what each finds
    assert codes == [2, 2] and errors[rank] == f"error: {line}\n" and errors[1 - rank] == (errors[rank] if both else "")


def fresh():
    """train.py, imported anew."""
    spec = importlib.util.spec_from_file_location("fresh", HERE / "train.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_what_torchrun_sets_makes_several_processes_and_what_train_sets(monkeypatch, capsys):
    asked, torchrun = [], {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "7"}
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, **_: asked.append(backend))
    for missing in ("MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE", ""):     # the rest is left over in a shell
        with monkeypatch.context() as patch:
            for name, value in torchrun.items():
                patch.setenv(name, value) if name != missing else patch.delenv(name, raising=False)
            assert train.join(parsed("--device cpu")) == torch.device("cpu") and bool(asked) == (missing == "")
    assert asked == ["gloo"] and capsys.readouterr().err == "process 1 waits for 4 processes at here:7\n"
    def gone(*_, **__):
        raise RuntimeError("closed by peer")
    with monkeypatch.context() as patch:
        for name, value in torchrun.items():
            patch.setenv(name, value)
        patch.setattr(train.dist, "init_process_group", gone)
        one_line_error(lambda: train.join(parsed("--device cpu")), capsys, "process 1 cannot join the others: closed",
                       besides=("process ",))
    source = (HERE / "train.py").read_text()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, False)
        assert source.index(name) < source.index("import torch")        # which reads it
    assert fresh() and os.environ["GOMP_SPINCOUNT"] == "1000" and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_without_posix_without_distributed_without_labels_and_in_a_thread(monkeypatch):
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)    # its import now fails
    for name in ("O_NOFOLLOW", "O_DIRECTORY", "fork", "getuid", "setpgid"):
        monkeypatch.delattr(os, name, raising=False)
    windows = fresh()
    pictures("p", 20)
    for _ in "12":
        windows.train(windows.parse_args(f"{SMALL} p --limit 8 --batch-size 4 --epochs 2 --out other".split()))
    assert saved("other")["step"] == 4 and len(log_of("other")) == 3
    run("--head mlp --predictor mlp --inner-steps 1", "usual")
    for module in (train, projhead):                    # as in a torch that was built without it
        monkeypatch.setattr(module, "dist", argparse.Namespace(is_available=lambda: False))
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: (SETS[10_000][0][:16], None, None))
    thread = threading.Thread(target=train.main, args=[lambda: run("--head mlp --predictor mlp --inner-steps 1")])
    thread.start(), thread.join()
    assert same_run("usual", "run")


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a device, and float64 there; "meta" stands for a GPU."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        built_there = func is torch.ops.aten.lift_fresh.default and args[0].device.type == "meta"       # torch 2.15 on
        if built_there or to_host and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            raise AssertionError(f"{func} waits")
        out = func(*args, **kwargs)
        for t in torch.utils._pytree.tree_leaves(out):
            assert not (torch.is_tensor(t) and t.dtype == double and t.device.type == "meta"), f"{func} makes float64"
        return out


@pytest.mark.parametrize("flags, place", [              # place: of the images, which may stay on the CPU
    ("--predictor linear --loss infonce", "cpu"), ("--head sparse --predictor offdiag", "meta"),
    ("--dataset stl10 --predictor mlp --target ema", "meta"), ("--inner-batch other --inner-start reset", "cpu"),
    ("--head reweight --loss barlow", "meta"), ("--inner-gradient unrolled --head-bn none", "meta")])
def test_nothing_in_a_step_waits_for_the_device(flags, place, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # which knows no "meta"
    args, meta = parsed(flags), torch.device("meta")
    model = train.build(args, meta)
    theta, phi = train.optimizers(model, args)
    images = torch.zeros(100, 3, args.image_size, args.image_size, dtype=torch.uint8, device=place)
    with NoWaiting():
        for step in range(2):
            x, other = train.two_views(images, args, step, 2, 10, meta)
            h, loss, inner = train.train_step(x, model, theta, phi, args, other)
            if model.target:
                train.update_target(model, 0.9)
            assert loss.device.type == h.device.type == "meta"


def test_a_run_that_is_finished_or_another_stays_and_keeps_its_precision(monkeypatch, capsys):
    assert run("--limit 5 --batch-size 64 --head mlp", "one batch")["step"] == 2        # of a set that is smaller
    assert run("--limit 13 --batch-size 5 --epochs 1 --head mlp", "b")["step"] == 2     # the short batch is left out
    run("--head mlp")
    before = files()
    run("--head mlp")
    assert "finished" in capsys.readouterr().out
    differ = "holds another run", "epochs 2 there, 3 here", "lr 0.06 there, 0.5 here"
    one_line_error(lambda: run("--head mlp --epochs 3 --lr 0.5"), capsys, *differ)
    monkeypatch.setattr(train, "draw_shapes", lambda M, seed: [x.flip(0) for x in SETS[M]])
    code, error = ends(lambda: run("--head mlp"), capsys, ("warning: 2 steps",))        # of other instructions, say
    assert code == 0 and error.startswith("warning: the shapes were drawn in other bits there") and files() == before
    flags, found = f"{SMALL}p --image-size 16 --batch-size 8 --limit 8", ("folder ", "decoding ", "warning: ")
    pictures("p", 20), run(flags, "folder"), pictures("p", 20, classes="cd")
    one_line_error(lambda: run(flags, "folder"), capsys, "holds another run", "images [8, ", besides=found)
    Path("run/checkpoint.pt").unlink()
    one_line_error(lambda: run("--head mlp"), capsys, "metrics.jsonl without a checkpoint")
    before = run("--head mlp", "float32")
    monkeypatch.setattr(train, "native_precision", lambda device: "bfloat16")
    whole, _ = run("--head mlp", "whole"), stopped("--head mlp", out="moves")
    monkeypatch.setattr(train, "native_precision", lambda device: "float32")
    one_line_error(lambda: run("--head mlp --precision float32", "moves"), capsys, "bfloat16 there, float32 here")
    Path("moves/metrics.jsonl").write_text("")          # then it gets its header again
    assert same_bits(run("--head mlp", "moves"), whole) and not same_bits(whole, before)
    assert "command" in log_of("moves")[0]


def test_the_learning_rates_of_the_steps_and_what_the_log_says(monkeypatch):
    steps, train_step = [], train.train_step            # of each the learning rates of f, g and q, h, and the losses
    def watched(x, model, theta, phi, *rest):
        out = train_step(x, model, theta, phi, *rest)
        steps.append((tuple(group["lr"] for group in theta.param_groups + phi.param_groups), *out))
        return out
    monkeypatch.setattr(train, "train_step", watched)
    sparse = run("--head sparse --predictor offdiag --inner-steps 1", "sparse")
    first, _, line = log_of("sparse")
    (_, _, loss1, inner1), (last, h, loss2, inner2) = steps[2:4]        # those of the second epoch
    A = sparse["predictor"]["A"]
    g = evaluation.load_run("sparse").head              # in eval mode, and measuring moved nothing in it:
    assert sparse["head"]["1.num_batches_tracked"] == 8                         # a pass for each step of theta or phi
    for written, expected in (
            (line["loss"], (loss1 + loss2) / 2), (line["inner_loss"], (inner1 + inner2) / 2),
            (line["rank_h"], projhead.effective_rank(h)), (line["rank_z"], projhead.effective_rank(g(h))),
            (line["spread_h"], projhead.spread(h)), (line["spread_z"], projhead.spread(g(h))),
            (line["offdiag"], (A - A.diag().diag()).norm()), (line["lr"], last[0]),
            (line["penalty"], naive_penalty(sparse["head"]["0.weight"], "l21", unit_rows=True))):
        assert 0 != written == pytest.approx(float(expected), abs=1e-4)
    assert first.keys() == set("command args torch torchvision python device processes threads images".split())
    explained = set(re.findall(r"\w+", train.end_epoch.__doc__.replace(", _z", ", spread_z")))
    assert {*first, *line, "memory"} <= explained
    peak = 0.5 * 8 / 256                                # warmup: 1.2 of the 4 steps
    lr = [peak / 2.2, peak * 2 / 2.2, *(peak * (1 + math.cos(math.pi * (step - 1.2) / 2.8)) / 2 for step in (2, 3))]
    flags = "--predictor offdiag --lr 0.5 --head-lr 3 --predictor-lr 7 --warmup 0.3 --predictor-schedule"
    steps.clear(), run(f"{flags} cosine", "cosine"), run(f"{flags} constant", "constant")       # which is SimSiam's
    expected = [(rate, 3 * rate, 7 * rate) for rate in lr] + [(rate, 3 * rate, 7 * peak) for rate in lr]
    assert [step[0] for step in steps] == [pytest.approx(rates) for rates in expected]
    assert [line["lr"] for line in log_of("cosine")[1:]] == pytest.approx([lr[1], lr[3]], abs=1e-6)


def test_the_encoder_loads_without_us_and_a_random_head_stays():
    theirs, images = torchvision.models.resnet18(), SETS[4_000][0][:4]
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    theirs.load_state_dict(run("--head none --encoder resnet18 --limit 2 --batch-size 2 --epochs 1")["encoder"])
    h = theirs.eval()(train.normalize(images.float() / 255))
    assert torch.allclose(h, evaluation.features("run", images)["h"], atol=1e-4)
    a = run("--head mlp --predictor offdiag --head-lr 0 --weight-decay 0.1", "frozen")
    for name, module in zip(("encoder", "head", "predictor"), untrained(a)):
        assert all(torch.equal(a[name][k], p) == (name == "head") for k, p in module.named_parameters())


def test_a_run_that_diverges_stops_and_one_that_cannot_learn_is_warned_of(monkeypatch, capsys):
    one_line_error(lambda: run("--head none --lr 1e30 --warmup 0"), capsys, "the loss is ", "in step 2", "--lr")
    assert saved()["step"] == 0
    train_step = train.train_step
    for part, why in (("f", "a weight or a BatchNorm's statistic"), ("g", "h or z")):
        def overflows(x, model, *rest):                 # in the last step, whose loss does not show it
            out = train_step(x, model, *rest)
            next(getattr(model, part).parameters()).data.fill_(math.inf)
            return out
        monkeypatch.setattr(train, "train_step", overflows)
        one_line_error(lambda: run("--limit 8 --epochs 1", part), capsys, f"{why} is not finite in step 1")
        assert saved(part)["step"] == 0
    def collapses(x, model, *rest):
        model.g[-1].weight.data.zero_()
        return train_step(x, model, *rest)
    monkeypatch.setattr(train, "train_step", collapses)
    run("--head mlp --limit 9 --batch-size 2 --lr 0 --epochs 2", "collapsed")
    few, collapsed, _ = capsys.readouterr().err.splitlines()
    assert few.startswith("warning: only 4 step(s) an epoch, of 2 images")
    assert collapsed.startswith("warning: z has collapsed")


# ---------------------------------------------------------------------------- evaluation

@pytest.fixture
def quick(monkeypatch):
    """Numbers of the features and labels in place of the probe's, which takes long."""
    monkeypatch.setattr(evaluation, "probe", lambda x, y, test_x, test_y: (
        x.std().item() * (1 + y[0].item()), test_x.mean().item(), 100 * len(test_y) + test_y.sum().item()))


def test_evaluation_moves_nothing(quick):
    checkpoint, before = run("--head mlp --hidden 16 --dim 8"), files()
    frozen, images = evaluation.load_run("run"), SETS[10_000][0]
    first, data = evaluation.untrained(frozen), evaluation.load_data(frozen)
    evaluation.table(frozen, data), evaluation.transform_table(frozen, data)
    for module, state in ((frozen.encoder, checkpoint["encoder"]), (frozen.head, checkpoint["head"]),
                          (first.encoder, untrained(checkpoint).f.state_dict())):
        assert not any(m.training for m in module.modules()) and same_bits(module.state_dict(), state)
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert files() == before
    large = F.interpolate(images.float(), (50, 50)).to(torch.uint8)
    x = train.normalize(TF.resize(large.float() / 255, [32, 32], antialias=True))
    assert torch.allclose(evaluation.features("run", large)["h"], frozen.encoder(x), atol=1e-4)
    for bn in (frozen.encoder[2], frozen.head[1]):      # a BatchNorm that drifts
        bn.training, bn.train = True, lambda mode: None
        with pytest.raises(RuntimeError):
            evaluation.features(frozen, images)
        bn.training = False
    frozen.head[0].weight.fill_(math.nan)
    with pytest.raises(train.UserError):
        evaluation.features(frozen, images)


def linear_data(rows=600, dim=20):
    """(train_x, train_y, test_x, test_y): labels drawn from a planted linear model of 7 classes; 1100 test rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows + 1100, dim, generator=g)
    logits = 0.6 * x @ torch.randn(dim, 7, generator=g)
    y = (logits - torch.rand(len(x), 7, generator=g).log().neg().log()).argmax(1)
    x = (x @ torch.randn(dim, dim, generator=g) + 1).relu()             # correlated columns
    return x[:rows], y[:rows], x[rows:], y[rows:]


@pytest.mark.parametrize("dim", [10, 40])
def test_the_probe_agrees_with_a_search_written_out(dim, monkeypatch):
    """And its fits are where the gradient of what they minimize is 0, which is convex."""
    def checked(x, y, l2, start, covariance, tolerance, fit=evaluation.fit):
        weights = fit(x, y, l2, start, covariance, tolerance)
        W = weights.double().requires_grad_()
        (F.cross_entropy(x.double() @ W.T, y) + l2 / 2 * W[:, :-1].square().sum()).backward()
        assert W.grad.abs().max() < (3e-3 if tolerance > 1e-6 else 1e-4)        # in the search, at its end
        return weights
    monkeypatch.setattr(evaluation, "fit", checked)
    x, y, test_x, test_y = data = linear_data(dim=dim)
    accuracy, l2, held_out = evaluation.probe(*data)
    x, test_x = (F.pad((part - x.mean(0)) / x.std(0), (0, 1), value=1.0).double() for part in (x, test_x))
    held, kept = torch.randperm(600, generator=torch.Generator().manual_seed(0)).split([120, 480])
    def percent(fitted_to, l2, x, y):
        start, covariance = x.new_zeros(7, dim + 1), evaluation.second_moment(x)
        W = evaluation.fit(*fitted_to, l2, start, covariance, 1e-9)
        return 100 * ((x @ W.T).argmax(1) == y).double().mean().item()
    scores = {l2: percent((x[kept], y[kept]), l2, x[held], y[held]) for l2 in evaluation.L2}
    assert accuracy == pytest.approx(percent((x, y), l2, test_x, test_y), abs=0.1)      # one row of 1100
    near = 200 / 120 + 0.01                             # two rows of 120
    assert held_out == pytest.approx(scores[l2], abs=near) and scores[l2] >= max(scores.values()) - near


def test_the_probe_never_sees_test_labels_and_bears_odd_data(monkeypatch):
    x, y, test_x, test_y = linear_data(rows=300)
    by_class = [evaluation.probe(x, y, test_x, torch.full_like(test_y, c)) for c in range(7)]
    assert sum(a for a, *_ in by_class) == pytest.approx(100)           # one prediction a row, whatever its label
    assert len({tuple(chosen) for _, *chosen in by_class}) == 1
    x, y, test_x, test_y = four = linear_data()
    accuracy, l2, _ = evaluation.probe(*four)
    for value in (0.0, 0.1, 1234.5):
        a, b = (F.pad(100 * part + 7, (0, 2), value=value) for part in (x, test_x))
        assert evaluation.probe(a, y, b, test_y)[:2] == (pytest.approx(accuracy, abs=0.21), l2)
    mostly_4, fours = torch.where(torch.arange(600) % 3 > 0, 4, y), 100 * (test_y == 4).double().mean().item()
    assert evaluation.probe(0 * x, mostly_4, 0 * test_x + 1, test_y)[:2] == (pytest.approx(fours), evaluation.L2[0])
    some, others = (y != 2) & (y != 6), (test_y == 2) | (test_y == 6)
    assert evaluation.probe(x[some], y[some], test_x[others], test_y[others])[0] == 0
    assert evaluation.probe(*linear_data(rows=5))[0] > 14       # more columns than rows
    y, test_y = x[:, :7].argmax(1), test_x[:, :7].argmax(1)     # no noise: a weak l2 does best
    assert evaluation.probe(x, y, test_x, test_y)[1] < evaluation.L2[1]
    with pytest.raises(ValueError, match="at least 5"):
        evaluation.probe(x[:4], y[:4], test_x, test_y)
    x = randn(6000, 1, dtype=torch.float32) @ randn(1, 300, seed=1, dtype=torch.float32)        # collinear columns
    monkeypatch.setattr(evaluation, "L2", (1e-5,))
    assert evaluation.probe(x[:5000], x[:5000, 0] > 0, x[5000:], x[5000:, 0] > 0)[0] > 99


def test_knn_is_the_naive_vote():
    x, y, test_x, test_y = four = linear_data(rows=29)
    nearest = F.cosine_similarity(test_x[:, None], x[None], dim=2).argsort(dim=1, descending=True)
    def naive(k):                                       # of equals the smaller class
        votes = [labels.bincount(minlength=7).argmax() for labels in y[nearest[:, :k]]]
        return pytest.approx(100 * (torch.stack(votes) == test_y).double().mean().item())
    assert evaluation.knn(*four, k=[20, 1, 2, 28]) == [naive(k) for k in (20, 1, 2, 28)]
    assert evaluation.knn(*four) == naive(20)
    with pytest.raises(ValueError, match="29 training rows"):           # the same vote everywhere
        evaluation.knn(*four, k=[1, 29])


def test_the_table_measures_what_its_columns_say(quick, capsys):
    checkpoint = run("--head mlp --predictor mlp --hidden 16 --dim 8")
    frozen, first = evaluation.load_run("run"), untrained(checkpoint).f.eval()
    (images, labels), (test_images, test_labels) = [x[:16] for x in SETS[10_000]], SETS[4_000]
    x = [train.normalize(part.float() / 255) for part in (images, test_images)]
    with torch.no_grad():
        a, b = (evaluation.taps(frozen, each) | {"h untrained": first(each)} for each in x)
        h, y = frozen.encoder(x[1]), frozen.head[0][1](b["g[0] Linear"])
        own = {"h": h, "g[1] BatchNorm1d": y, "z": frozen.head(h), "p": frozen.predictor(b["z"])}
    assert all(torch.allclose(b[tap], y, atol=1e-5) for tap, y in own.items())
    data = evaluation.load_data(frozen)
    rows = evaluation.table(frozen, data, ks=[3, 15])
    assert "no kNN" not in capsys.readouterr().err
    inside = ["g[0] Linear", "g[1] BatchNorm1d", "g[2] ReLU", "g[3] Linear"]
    assert [row["tap"] for row in rows] == ["h", *inside, "z", "p", "h untrained"]
    close = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
    for row in rows:
        tap = row["tap"]
        for i, label in enumerate((" shape", " hue")):
            four = a[tap], labels[:, i], b[tap], test_labels[:, i]
            assert (row["linear" + label], row["l2" + label], row["held_out" + label]) == close(evaluation.probe(*four))
            assert [row[f"knn{k}{label}"] for k in (3, 15)] == evaluation.knn(*four, k=[3, 15])
        assert row["dim"] == b[tap].shape[1] and row["rank"] == close(projhead.effective_rank(b[tap]))
        assert ("carrying" in row) == (tap == "h")
    assert rows[0]["carrying"] == evaluation.carrying(frozen, images)
    few = evaluation.table(frozen, data, ks=[3, 16], inside=False)      # h and z alone; no vote of all 16 images
    assert "no kNN" in capsys.readouterr().err
    assert few == [{key: row[key] for key in row if "knn15" not in key} for row in (rows[0], rows[5], rows[7])]


def test_carrying_counts_the_features_with_a_gradient():
    """Of the network, whatever its parameterization: the last BatchNorm times s, the columns of W1 over s."""
    run("--head linear"), run("--head slice --dim 9", "sliced")
    frozen, images = evaluation.load_run("run"), SETS[10_000][0][:16]
    bn, scale = [m for m in frozen.encoder.modules() if isinstance(m, nn.BatchNorm2d)][-1], 10 ** randn(128).float()
    before = evaluation.carrying(frozen, images)
    for values, by in ((bn.weight, scale), (bn.bias, scale), (frozen.head[0].weight, 1 / scale)):
        values *= by
    assert evaluation.carrying(frozen, images) == pytest.approx(before, rel=1e-3) and 9 < before < 128
    assert 3 < evaluation.carrying(evaluation.load_run("sliced"), images) <= 9


# ---------------------------------------------------------------------------- what was done to an image

@pytest.mark.parametrize("S", [32, 9])
def test_transformations_are_torchvisions_image_by_image(S):
    x, half, k = torch.rand(16, 3, S, S), S // 2, torch.arange(16) % 4
    corners = [(0, 0), (0, S - half), (S - half, 0), (S - half, S - half)]
    naive = {"rotation": lambda image, k: TF.rotate(image, 90.0 * k),
             "gray": lambda image, k: TF.rgb_to_grayscale(image, 3) if k else image,
             "quadrant": lambda image, k: TF.resized_crop(image, *corners[k], half, half, [S, S], antialias=True)}
    for name, (transform, classes) in evaluation.TRANSFORMS.items():
        before, some = x.clone(), k % classes
        theirs = torch.stack([naive[name](*pair) for pair in zip(x, some.tolist())])
        assert torch.allclose(transform(x, some), theirs, atol=1e-5) and torch.equal(x, before), name


@pytest.mark.parametrize("data", ["corners", "noise"])
def test_transform_probes_read_what_can_be_read_and_nothing_else(data, monkeypatch):
    """Four corners of a fixed colour each tell every transformation apart; noise tells none but gray. No labels."""
    corners = F.interpolate(randn(1, 3, 2, 2, seed=3).sigmoid() * 223, scale_factor=8)
    images = torch.randint(0, 256, (1600, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = (corners + images // 8 if data == "corners" else images).to(torch.uint8)
    images[600:800] = images[1400:] = 0                 # what is not looked at
    parts = [(part, None, None) for part in images.split(800)]
    monkeypatch.setattr(evaluation, "PROBED", 600), monkeypatch.setattr(evaluation, "PIXELS", 250 * 16**2)
    monkeypatch.setattr(evaluation, "untrained", lambda run: run._replace(head=nn.Identity()))
    f = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12)).eval()
    g, args = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Tanh()), parsed("--dataset folder --image-size 16")
    some = evaluation.Run(Path("run"), 0, args, [0, 0], 1, 1, f, g, nn.Identity())
    rows = {row["tap"]: row for row in evaluation.transform_table(some, parts)}
    assert list(rows) == ["h", "g[1] Tanh", "z", "h untrained", "chance"]
    for name, chance in {"rotation": 25, "gray": 50, "quadrant": 25}.items():
        assert rows["chance"][name] == chance and rows["h"][name] == rows["h untrained"][name]
        assert rows["h"][name] > 99 if data == "corners" else name == "gray" or abs(rows["h"][name] - chance) < 8
    (_, y), (_, test_y) = (evaluation.transformed(some, part, evaluation.gray, 2, i, False)
                           for i, (part, *_) in enumerate(parts))
    assert not torch.equal(y, test_y)                   # the test images' classes are others
    seen = []
    f.register_forward_pre_hook(lambda module, x: seen.append(len(x[0])))
    for size in (16, 8, 32):                            # batches are so many pixels, of the image's or the network's
        evaluation.features(some, torch.zeros(300, 3, size, size, dtype=torch.uint8))
    monkeypatch.setattr(evaluation, "PIXELS", 1)
    evaluation.features(some, images[:2])
    assert seen == [250, 50, 250, 50, 62, 62, 62, 62, 52, 1, 1]


# ---------------------------------------------------------------------------- tables

@pytest.fixture
def evaluated(monkeypatch, capsys):
    """A function: what `eval.py words` prints."""
    def printed(words=""):
        monkeypatch.setattr(sys, "argv", ["eval.py", *shlex.split(words)])
        capsys.readouterr()
        evaluation.main()
        return capsys.readouterr().out
    return printed


def cells(out):
    """The rows of a printed table, as dicts."""
    lines = [[cell.strip() for cell in line[1:-1].split(" |")] for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], (cell.strip("`") for cell in line))) for line in lines[2:]]


def a_line(flags, seed=0, h=1.0, z=None, start=None, log=(), **args):
    """A run's line of JSON: at each tap the same number in some columns, one more in `gray` of the other probe."""
    args = vars(parsed(f"{flags} --seed {seed}")) | {"precision": "float32"} | args
    taps = {"h": h, "z": z, "h untrained": start}
    def rows(more, *columns):
        return [{"tap": tap, "dim": 4} | dict.fromkeys(columns, value + more) for tap, value in taps.items()
                if value is not None]
    return {"run": f"{flags} {seed}", "step": 8, "steps": 8, "images": [9, 9], "log": list(log),
            "args": {flag: value for flag, value in args.items() if value != "gone"},
            "labels": rows(0, "linear hue", "held_out hue", "knn20 hue", "knn200 hue"), "transform": rows(1, "gray")}


def written(*lines, to="x.jsonl"):
    Path(to).write_text("".join(json.dumps(line) + "\n" for line in lines))


def column(out, name="flags"):
    return [line[name] for line in cells(out)]


def test_the_tables_of_the_command_line_from_runs_and_from_their_lines(quick, evaluated, capsys):
    run("--head mlp --predictor offdiag", "runs/new"), run("--head none --limit 8", "runs/old")
    os.utime("runs/old/checkpoint.pt", (0, 0))
    assert evaluated() == evaluated("runs/new/checkpoint.pt") and evaluated().startswith("new, step 4 of 4;")
    both = evaluated("runs/new runs/old --json --taps")
    new, old = map(json.loads, both.splitlines())
    assert [new[key] for key in ("run", "step", "log")] == ["new", 4, log_of("runs/new")] and old["steps"] == 2
    assert all(new[key] == saved("runs/new")[key] for key in ("args", "images"))
    numbers, usual = evaluation.values(new, inside=True), ["linear shape", "linear hue", "rank", "carrying", "offdiag"]
    inside = ["g[0] Linear", "g[1] BatchNorm1d", "g[2] ReLU"]           # and no kNN, as there are 16 images
    for words, taps, keys in (("", ["h", "z", "h untrained"], usual), (
            "--columns rank carrying --taps", ["h", *inside, "z", "p", "h untrained"], ["rank", "carrying"])):
        lines = cells(evaluated(words))
        assert [line["tap"] for line in lines] == taps and list(lines[0]) == ["tap", "dim", *keys]
        for line, (tap, key) in zip([line for line in lines for _ in keys], itertools.product(taps, keys)):
            form = evaluation.COLUMNS[key.split()[0]].form
            assert line[key] == (f"{numbers[key, tap]:{form}}" if (key, tap) in numbers else "")
    assert [*cells(evaluated("--probe transform"))[3].values()][:5] == ["chance", "", "25.0", "50.0", "25.0"]
    several = evaluated("runs/new runs/old")
    first = [f"untrained convnet128, {M} images of 32 px" for M in (16, 8)]     # no mean over what saw other images
    assert column(several) == [*first, "--head mlp --predictor offdiag --limit 16", "--head none --limit 8"]
    assert column(several, "offdiag h") == ["", "", f"{new['log'][-1]['offdiag']:.3g}", ""]
    Path("x.jsonl").write_text(both)
    shutil.move("runs", "elsewhere")
    assert evaluated("x.jsonl") == several == evaluated("x.jsonl x.jsonl")      # the same line twice is one
    assert evaluated("x.jsonl --json") == both and "linear hue by linear shape" in evaluated("x.jsonl --plot A.SVG")
    for words in ("--taps", "--probe transform", "--columns gray 'linear hue' pruned",
                  "--against '--head none --limit 8'", "--rows '--predictor offdiag'"):
        assert evaluated(f"x.jsonl {words}") == evaluated(f"elsewhere/new elsewhere/old {words}"), words
    with pytest.raises(SystemExit):
        evaluated("--help")
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in evaluation.COLUMNS)


def test_many_runs_are_one_table_and_differences_are_paired_by_seed(evaluated, capsys):
    h = {"--head mlp": {0: 50.0, 1: 60, 2: 71, 7: 99}, "--head linear": {2: 70.0, 0: 49, 1: 61, 5: 0},
         "--head none": {1: 50.0, 2: 72}, "--head mlp --predictor mlp": {2: 72.0, 3: 1},
         "--head mlp --predictor offdiag": {8: 10.0, 9: 20}}
    written(*(a_line(flags, seed, value, None if "none" in flags else 2 * value, 5.0 + seed)
              for flags, seeds in h.items() for seed, value in seeds.items()))
    def table(words=""):
        out = evaluated(f"x.jsonl {words}")
        first, *_, last = out.splitlines()
        assert first == "all: --encoder convnet128" and ("±" in out) == ("Student" in last) == ("against" in words)
        return {key: [line[key] for line in cells(out)] for key in cells(out)[0]}
    z = ["140.0 (sd 42.3)", "90.0 (sd 62.4)", "", "73.0 (sd 100.4)", "30.0 (sd 14.1)"]
    means = ["9.4 (sd 3.4)", "70.0 (sd 21.2)", "45.0 (sd 31.2)", "61.0 (sd 15.6)", "36.5 (sd 50.2)", "15.0 (sd 7.1)"]
    assert table() == {"flags": ["untrained convnet128", *h], "n": list("844222"), "linear hue h": means,
                       "linear hue z": ["", *z], "knn200 hue h": means}
    assert table("--columns knn20")["knn20 hue z"] == ["", *z]
    difference, taps = (table(f"{words} --against '--head mlp'") for words in ("", "--taps"))
    assert difference["n"] == list("443210")            # the seeds that both have
    assert difference["linear hue h"] == ["-62.5±28.8", "70.0 (sd 21.2)", "-0.3±2.9", "-4.5±69.9", "+1.0", ""]
    assert difference["linear hue z"] == ["", z[0], "-0.7±5.7", "", "+2.0", ""]
    assert taps["tap"][:5] == list("hhzhz") and taps["linear hue"][3:5] == ["-0.3±2.9", "-0.7±5.7"]
    alone = "x.jsonl --rows '--head mlp --seed 7'"
    assert "Student" in evaluated(f"{alone} --against '--head mlp'") and "Student" not in evaluated(alone)
    one_line_error(lambda: table("--against '--head mpl'"), capsys, "no row '--head mpl'", "'--head none'")
    for df, t in enumerate(evaluation.T95, 1):
        x = torch.linspace(-t, t, 20_001, dtype=double)
        assert torch.trapezoid(torch.distributions.StudentT(df).log_prob(x).exp(), x) == pytest.approx(0.95, abs=1e-3)
    for numbers, plain, difference in (
            ([], "", ""), ([1.0], "1.0", "+1.0"), ([*range(12)], "5.5 (sd 3.6)", "+5.5±2.4")):
        assert [evaluation.cell(".1f", numbers, each) for each in (False, True)] == [plain, difference]


def test_rows_are_what_runs_are_and_labels_what_was_typed(evaluated, capsys):
    def flags(*lines):
        out = [written(*lines), evaluated("x.jsonl")][1]
        return out.splitlines()[0] * out.startswith("all"), list(zip(column(out), column(out, "n")))
    tau, mlp = "--tau 0.1 --epochs 3", a_line("--tau 0.1 --epochs 3 --head mlp")
    other_order, spelt = a_line(f"--head mlp {tau}", 1), a_line("--head mlp --loss infonce --epochs 3 --tau .1", 2)
    shared = "all: --tau 0.1 --encoder convnet128 --epochs 3"
    assert flags(mlp, other_order, spelt, a_line(f"--head none {tau}")) == (
        shared, [("--head mlp", "3"), ("--head none", "1")])            # the head stays, shared or not
    assert flags(mlp, other_order) == (shared, [("--head mlp", "2")])
    half = a_line(f"--head mlp {tau}", precision="bfloat16")            # another run, typed alike
    assert flags(mlp, half, other_order) == (
        shared, [("--head mlp --precision float32", "2"), ("--head mlp --precision bfloat16", "1")])
    written(*(a_line("--dataset folder", seed, data=f"/{seed}/set") for seed in (0, 1)))       # a folder that was moved
    assert column(evaluated("x.jsonl --columns gray"), "n") == ["2"]
    one, other = (a_line("--dataset folder", seed, start=2, data="/a/set") for seed in (0, 1))
    written(one, other | {"images": [9, 8]})            # other images in a folder of that name
    assert column(evaluated("x.jsonl --columns gray"), "n")[1:] == ["1", "1"]
    written(one, a_line("--dataset folder --image-size 16", start=3, data="/a/set"))
    assert column(evaluated("x.jsonl"))[:2] == [f"untrained convnet128, 9 images of {size} px" for size in (64, 16)]
    written(mlp, mlp | {"run": "a copy"})
    one_line_error(lambda: evaluated("x.jsonl"), capsys, "a copy", mlp["run"], "leave one out")


def test_lines_that_do_not_hold_what_is_asked_and_some_rows(evaluated, capsys):
    part, one, other = a_line("--head mlp", 0, 7.0), a_line("--head none"), a_line("--head mlp")
    written(part, one)
    assert [json.loads(line) for line in evaluated("x.jsonl --json").splitlines()] == [part, one]
    del part["transform"]
    written(part | {"step": 4}), written(other, to="y.jsonl")
    assert "1.0" in evaluated("x.jsonl y.jsonl") and "7.0" in evaluated("y.jsonl x.jsonl")      # the later one counts
    assert "gray" in evaluated("y.jsonl x.jsonl --columns gray")        # for all that it holds
    for words, error in (
            ("x.jsonl --probe transform", "--probe transform"), ("x.jsonl --columns gray", "--probe transform"),
            ("x.jsonl --json", "--probe transform"), ("x.jsonl --columns carrying offdiag", "no"),
            *((f"x.jsonl {words}", "runs' folders") for words in ("--dataset cifar10", "--data there", "--k 3"))):
        one_line_error(lambda: evaluated(words), capsys, error, besides=("--head",))        # is not finished
    whole = json.dumps(one).encode()
    for content, error in ((b"", "no line in"), (b"3\n", "line 1"), (b'{"run": 1}', "line 1"),
                           *((json.dumps(one | {"labels": rows}).encode(), "line 1") for rows in (None, [{"dim": 3}])),
                           (whole.replace(b'"seed"', b'"need"'), "line 1"), ("{}".encode("utf-16"), "line 1"),
                           (whole + b"\n" + whole[:99], "line 2")):
        Path("x.jsonl").write_bytes(content)
        one_line_error(lambda: evaluated("x.jsonl"), capsys, "x.jsonl", error)
    written(*(a_line(flags) | {"run": i} for i, flags in enumerate((
        "--head mlp --tau 0.1", "--head mlp", "--head none --tau 0.1 --hue 0 --dataset cifar10 --data y"))))
    for rows, expected in (
            ("'--tau .1'", [0, 2]), ("'--head mlp'", [0, 1]), ("'--head mlp --tau .1' '--hue 0 --head none'", [0, 2]),
            ("'--data y --dataset cifar10'", [2]), ("'--head none' '--tau 0.5'", [1, 2]),
            ("'--tau 0.1' '--head mlp'", [0, 1, 2]), ("''", [0, 1, 2])):
        lines = evaluated(f"x.jsonl --json --rows {rows}").splitlines()
        assert [json.loads(line)["run"] for line in lines] == expected, rows
    for rows, error in (("'--tau 0.1' '--tau 0.2'", "no run has --tau 0.2"), ("--wrong", ""), ("mlp", "mlp"),
                        ("'--head topk'", "topk"), ("\"--head 'mlp\"", "--rows")):
        one_line_error(lambda: evaluated(f"x.jsonl --rows {rows}"), capsys, error)


def test_what_was_measured_is_kept_by_the_source_that_measures(evaluated, monkeypatch, capsys):
    """MEASURES has all of eval.py's functions that the tables call, at any depth."""
    functions = {name: f for name, f in vars(evaluation).items() if getattr(f, "__module__", "") == "eval"}
    todo = reached = {evaluation.table, evaluation.transform_table}
    while todo:
        source = "".join(map(evaluation.inspect.getsource, todo))
        todo = {f for name, f in functions.items() if re.search(rf"(?<![.\w]){name}\(", source)} - reached
        reached = reached | todo
    reached |= {transform for transform, _ in evaluation.TRANSFORMS.values()}
    assert reached - set(evaluation.MEASURES) <= {evaluation.is_inside, evaluation.load_run, evaluation.Run}
    run("--head linear"), pictures("there", 20)
    calls, edited, getsource = [], [], evaluation.inspect.getsource
    def table(run, data, ks, inside):
        calls.append(len(data[0][0]))
        row = {"tap": "h", "dim": 3, "rank": run.encoder[0].weight.sum().item(), f"knn{ks[-1]} hue": 3.0}
        return [row, *[row | {"tap": "g[0] Linear"}] * inside, row | {"tap": "z"}]
    monkeypatch.setattr(evaluation, "table", table)
    monkeypatch.setattr(evaluation.inspect, "getsource", lambda f: getsource(f) + "#" * (f.__name__ in edited))
    def measured(words="", times=1):                    # how often it is measured when it is asked twice
        calls.clear()
        out = evaluated(f"run {words}")
        assert evaluated(f"run {words}") == out and len(calls) == times, (words, calls)
        return out
    first, few = measured("--taps"), measured(times=0)  # what has all taps has h and z too
    assert "g[0]" in first and "g[0]" not in few
    assert "knn3 " in measured("--k 3") and measured(times=0) == few    # both are kept
    for name, times in (("probe", 1), ("effective_rank", 1), ("nt_xent", 1), ("plot", 0), ("cell", 0)):
        edited.append(name)                             # an edited probe is measured anew, an edited plot is not
        assert measured(times=times) == few
    monkeypatch.setattr(evaluation, "L2", (1.0,))
    assert measured() == few
    measured("--dataset folder --data there"), shutil.copy("there/b/001.png", "there/a/000.png")
    measured("--dataset folder --data there"), measured("--dataset folder --data there/.", times=0)
    old, checkpoint = evaluation.load_run("run"), saved()
    checkpoint["encoder"]["0.weight"] += 1
    torch.save(checkpoint, "run/checkpoint.pt")         # another checkpoint
    changed = measured()
    evaluation.measured(old, "labels", evaluation.KS)
    assert measured() == changed != few                 # what was read before is not kept in its name
    kept = json.loads(Path("run/eval.json").read_text())
    for junk in ("{", "null", '{"results": 3}', json.dumps(kept | {"results": 3})):
        Path("run/eval.json").write_text(junk)
        assert measured() == changed
    Path("run/eval.json").unlink(), Path("run/eval.json").mkdir()
    code, error = evaluates(monkeypatch, capsys, "run")
    assert code == 0 and error.startswith("not kept: cannot write run/eval.json")


def test_transfer_to_a_folder_of_pictures(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "L2", (0.1,))
    run("--head linear --dim 8"), pictures("pictures", 60, size=(50, 40))
    rows = evaluation.measured(evaluation.load_run("run"), "labels", [3], "folder", "pictures")
    assert [row["tap"] for row in rows] == ["h", "z", "h untrained"] and rows[0]["linear"] == 100       # red and blue
    (images, labels, classes), (tests, *_) = evaluation.load_data(evaluation.load_run("run"), "folder", "pictures")
    assert images.shape[1:] == (3, 32, 32) and labels.shape == (len(images), 1) and classes == ["a", "b"]
    assert 16 < len(images) < 60 and len(images) + len(tests) == 60     # not the run's --limit
    run(SMALL + "pictures --image-size 16 --epochs 1", "other")
    Path("pictures").rename("data"), pictures("moved", 90)
    for words, expected, text in (
            ("run other", 2, "folder and shapes"), ("run other --dataset folder --data data --k 3", 0, ""),
            ("other --data moved --k 3", 0, "other images"), ("other", 2, f"no folder {Path('pictures').absolute()}")):
        code, error = evaluates(monkeypatch, capsys, *words.split())
        assert code == expected and text in error and bool(text) == bool(error), words
    roots, other = [], evaluation.load_run("other")
    monkeypatch.setattr(train, "load_dataset", lambda name, root, *_: roots.append(root) or (images, labels, classes))
    cifar = other._replace(args=parsed("--dataset cifar10 --data there"))
    for asked in ((other,), (other, "cifar10"), (other, "cifar10", "here"), (cifar, "cifar100"), (cifar, "folder")):
        evaluation.load_data(*asked)                    # CIFAR's sets lie side by side, a folder elsewhere
    assert roots[::2] == [os.path.abspath("pictures"), "data", "here", os.path.abspath("there"), "data"]


# ---------------------------------------------------------------------------- pictures

def test_plots_have_their_dots_at_the_means(evaluated, monkeypatch, capsys):
    import xml.etree.ElementTree as ET
    drawn, draw = [], evaluation.draw
    monkeypatch.setattr(evaluation, "draw", lambda *args, **more: drawn.append(args[1]) or draw(*args, **more))
    def parts(name, attribute=None):                    # of the file
        found = [part for part in ET.parse("a.svg").getroot() if part.tag.endswith(f"}}{name}")]
        return [part.attrib[attribute] if attribute else part.text for part in found]
    log = [[{"command": ""}, *({"epoch": e, "rank_z": e * by} for e in (1, 2, 3))] for by in (2, 4)]
    written(a_line("--head mlp", 0, 10, 20, 4, log[0]), a_line("--head mlp", 1, 20, 40, 6, log[1]),
            a_line("--head none", 0, 30, None, 4, called="--encoder convnet128 --head <none>&"),
            a_line("--head linear", 5, None, 50), a_line("--head linear", 6, 20, 70))           # no dot for h
    assert "a.svg: gray by linear hue" in evaluated("x.jsonl --plot a.svg --columns 'linear hue' gray")    # both probes
    assert drawn == [{"untrained convnet128 (n=2)": [(5, 6, True)], "--head linear (n=2)": [(60, 61, False)],
                      "--head mlp (n=2)": [(15, 16, True), (30, 31, False)], "--head <none>& (n=1)": [(30, 31, True)]}]
    assert {*drawn[0], "linear hue", "gray"} < set(parts("text")) and parts("text")[-1] == "filled: h, hollow: z"
    evaluated("x.jsonl --plot a.svg --columns epoch rank_z")
    assert drawn[1:] == [{"--head mlp (n=2)": [(1, 3, True), (2, 6, True), (3, 9, True)]}]
    assert parts("polyline", "points") == ["75.0,370.0 292.5,220.0 510.0,70.0"] and "epoch" in parts("text")
    assert parts("text")[2:-1] == ["1", "1.5", "2", "2.5", "3", "2", "4", "6", "8", "10"]
    for words, error in (("epoch pruned", "no run has both"), ("gray", "two columns"), ("gray offdiag", "no run has")):
        one_line_error(lambda: evaluated(f"x.jsonl --plot b.svg --columns {words}"), capsys, error)
    assert not Path("b.svg").exists()
    draw("a.svg", {f"row {i}": [(i, i, True)] for i in range(40)}, "x", "y", 6)         # all of a long legend is there
    assert max(map(float, parts("text", "y"))) < float(ET.parse("a.svg").getroot().attrib["height"])
    for numbers in ([0, 100], [-3.0, 7.2], [5], [66.1, 66.10000000000001], [1e-5, 0.1], [9e8, 9e8 + 1]):
        ticks = evaluation.axis(numbers)
        assert ticks == sorted(ticks) and 2 <= len(ticks) <= 8 and ticks[0] < ticks[-1]
        assert ticks[0] <= min(numbers) + 1e-9 and ticks[-1] >= max(numbers) - 1e-9


@pytest.mark.parametrize("head, limit", [("mlp", 16), ("none", 5)])
def test_neighbors_and_views_are_those_images(head, limit, evaluated, monkeypatch):
    run(f"--head {head} --limit {limit} --batch-size 4 --seed 3")
    frozen, before, shown, picture = evaluation.load_run("run"), files(), [], evaluation.picture
    monkeypatch.setattr(evaluation, "picture", lambda path, rows: shown.extend(rows) or picture(path, rows))
    said = evaluated("run --neighbors out.png").splitlines()
    assert {f: data for f, data in files().items() if f.name != "out.png"} == before
    (images, labels), (tests, test_labels) = [x[:limit] for x in SETS[10_000]], SETS[4_000]
    a, b = evaluation.features(frozen, images), evaluation.features(frozen, tests)
    where = itertools.product(range(4), ["h"] if head == "none" else ["h", "z"])
    for line, ((first, frame), *tiles), (i, tap) in zip(said, shown, where):
        near = F.cosine_similarity(a[tap], b[tap][i][None]).argsort(descending=True)[:8]    # of 5 images all
        same = (labels[near, 0] == test_labels[i, 0]).tolist()
        assert torch.equal(first, tests[i]) and frame == evaluation.BLACK
        assert torch.equal(torch.stack([image for image, _ in tiles]), images[near])
        assert [frame == evaluation.GREEN for _, frame in tiles] == same
        assert f"test image {i}, {train.SHAPES[test_labels[i, 0]]}" in line and f"by {tap}, {sum(same)} of" in line
    assert len(shown) == len(said) - 1 == (4 if head == "none" else 8)
    shown.clear(), evaluated("run --views out.png")     # the file that was named is replaced
    (mean, std), g = torch.tensor([train.MEAN, train.STD])[..., None, None], train.generator(3, 0, 1)
    views = [255 * (train.augment(images[:4], g, 0.5, 0.5, 0.1) * std + mean) for _ in range(8)]      # as in training
    found = torch.stack([torch.stack([image for image, _ in tiles]) for tiles in shown], 1)
    assert (found - torch.stack([images[:4], *views])).abs().max() < 1


@pytest.mark.parametrize("S, times", [(32, 2), (96, 1)])
def test_a_picture_is_a_grid_of_framed_tiles(S, times):
    from PIL import Image
    images, size = (99 * randn(2, 3, 3, S, S)).to(torch.uint8), S * times + 8
    evaluation.picture("p.png", [[(image, evaluation.GREEN) for image in row] for row in images])
    page = TF.pil_to_tensor(Image.open("p.png"))
    assert page.shape == (3, 2 * (size + 2) + 2, 3 * (size + 2) + 2)
    tiles = page[:, 2:, 2:].unfold(1, size, size + 2).unfold(2, size, size + 2).permute(1, 2, 0, 3, 4)
    assert torch.equal(tiles[..., 4:-4:times, 4:-4:times], images)
    assert (tiles[..., :4, :] - 255 * torch.tensor(evaluation.GREEN)[:, None, None]).abs().max() < 1


# ---------------------------------------------------------------------------- eval.py and what it cannot do

EVAL_BAD = """
nowhere | empty | broken | run run | run tiny run/checkpoint.pt | run --device cuda:99 | run --k 0 | run nowhere.jsonl
run --wrong | run --probe colour | run --probe transform --k 20 | run --columns nothing | run --columns pruned epoch
run --probe transform --columns rank | run --json --columns rank | run --json --k 3 | run --json --dataset shapes
run tiny --json --against x | run --rows '--seed 5' | run --against x | run --data x | run --data ''
run --neighbors run/checkpoint.pt/a.png | run --neighbors run/checkpoint.pt | run.jsonl --neighbors a.png
run --neighbors a.png --k 3 | run tiny --views a.png | run --views a.png --dataset cifar10
run --neighbors a.png --probe transform | run --neighbors a.png --columns rank | run --views a.png --rows '--seed 0'
run --plot a.png | run --plot a.svg --columns rank | run --plot a.svg --taps
"""
EVAL_BAD_LATE = ("tiny --probe transform", "run --dataset folder --data nowhere", "run --plot nowhere/run/a.svg",
                 "run --dataset cifar10 --data nowhere", "run --columns pruned", "run tiny --columns offdiag --taps")


def test_eval_refuses_in_one_line_and_before_it_measures(quick, evaluated, monkeypatch, capsys):
    import runpy
    Path("empty").mkdir(), Path("broken").mkdir(), Path("broken/checkpoint.pt").write_bytes(b"junk")
    run("--head mlp"), run("--head mlp --limit 4 --batch-size 4", "tiny")
    Path("run.jsonl").write_text(evaluated("run --json")), Path("nowhere").write_text("a file")
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measured", lambda *_: pytest.fail("measured"))
        for words in EVAL_BAD.replace("\n", "|").split("|"):            # and without any, as there is no runs/
            one_line_error(lambda: evaluated(words), capsys)
            assert files() == before, words
    for words in EVAL_BAD_LATE:
        one_line_error(lambda: evaluated(words), capsys, besides=("measuring ", "warning: ", "too few", "no kNN"))
    monkeypatch.setattr(projhead.ConvNet, "forward", lambda self, x: torch.empty(2**60))
    monkeypatch.setattr(sys, "argv", ["eval.py", "run", "--k", "3"])    # eval.py has no --batch-size to advise
    script = functools.partial(runpy.run_path, str(HERE / "eval.py"), run_name="__main__")
    assert one_line_error(script, capsys) == "error: out of memory\n"


@pytest.mark.parametrize("change, words", [
    ({"projector": 3}, None), ({"called": "gone"}, "earlier commit"), ({"head_bn": "gone"}, "earlier commit"),
    ({"head": "topk"}, "earlier commit"), ({"encoder": "vit"}, "earlier commit"), ({"hidden": 3}, "damaged")])
def test_checkpoints_of_other_commits(change, words, capsys):
    checkpoint = run("--head mlp")
    args = {flag: value for flag, value in (checkpoint["args"] | change).items() if value != "gone"}
    torch.save(checkpoint | {"args": args}, "run/checkpoint.pt")
    if words:
        one_line_error(lambda: evaluation.load_run("run"), capsys, words, "run/checkpoint.pt")
    else:
        frozen = evaluation.load_run("run/checkpoint.pt")
        assert evaluation.describe(frozen)["log"] == log_of() != evaluation.describe(frozen._replace(step=3))["log"]
        capsys.readouterr()
        for junk in ("null", '"x"', "{", '{"step": "6"}'):              # a log that is not ours is none, as it says
            Path("run/metrics.jsonl").write_text(junk)
            assert evaluation.describe(frozen)["log"] == []
            assert "warning: run/metrics.jsonl is not what" in capsys.readouterr().err
        Path("run/metrics.jsonl").unlink()
        assert evaluation.describe(frozen)["log"] == [] and not capsys.readouterr().err
        assert same_bits(frozen.encoder.state_dict(), checkpoint["encoder"]) and frozen.step == frozen.steps == 4


@pytest.mark.filterwarnings("error")
def test_float32_is_not_shortened_on_gpus(evaluated):
    new = hasattr(torch.backends, "fp32_precision")     # torch 2.9 and newer
    conv, name = (torch.backends.cudnn.conv, "fp32_precision") if new else (torch.backends.cudnn, "allow_tf32")
    setattr(conv, name, "tf32" if new else True), written(a_line("--head mlp"))
    evaluated("x.jsonl")
    assert getattr(conv, name) == ("ieee" if new else False)            # and so it stays, for all tests


@pytest.mark.parametrize("some", [True, False])
def test_images_without_a_label_are_counted(some, quick, monkeypatch, capsys):
    """One class of the test part is misspelt, and its images are copies of training images; or there are no classes."""
    for part, n, classes in (("train", 20, ["a/images", "b/images"]), ("test", 9, "0b")) if some else (("", 30, [""]),):
        pictures(Path("p", part), n, classes=classes)
    run(SMALL + "p --image-size 16 --limit 16")
    code, error = evaluates(monkeypatch, capsys, "run", besides=("folder ", "decoding ", "measuring "))
    assert code == 0 and "test images have no label" in error and ("no accuracies" in error) != some
    assert ("5 of 9 test" if some else "16 of 16 training") in error
    assert ("warning: 6 of the 9 different test images are training images too" in error) == some
    rows = evaluation.measured(evaluation.load_run("run"), "labels", [1])
    held_out, vote = (404, 100) if some else (None, None)               # four blue images are left, all of class 1
    assert {(row.get("held_out"), row.get("knn1")) for row in rows} == {(held_out, vote)}


# ---------------------------------------------------------------------------- data, files and flags

SMALL = "--dataset folder --head mlp --encoder convnet128 --data "


def both_parts(folder):
    """(images, labels, classes) of the part for training and of that for testing; the odd classes are blue."""
    parts = [train.load_dataset("folder", folder, part, 16) for part in (True, False)]
    assert all(torch.equal(images[:, 2, 0, 0] == 200, labels % 2 == 1) for images, labels, classes in parts if classes)
    return parts


def said(folder, capsys):
    """What is said of a folder, and of each part the number of images of each class."""
    capsys.readouterr()
    labels = [train.load_dataset("folder", folder, part, 16)[1] for part in (True, False)]
    counts = [each[each >= 0].bincount().tolist() for each in labels]
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("decoding ")]
    return lines, *counts


@pytest.mark.parametrize("first, second", [("train", "val"), ("TRAIN", "Validation"), ("Training", "testing")])
def test_a_folder_with_two_parts(first, second, capsys):
    pictures(f"p/{first}", 12, classes="abcd"), pictures(f"p/{second}", 6, classes="ad"), pictures("p/extra", 2)
    pictures(f"p/{second}", 1, classes="A")
    (line, *more), *counts = said("p", capsys)
    assert counts == [[3, 3, 3, 3], [3, 0, 0, 3]] and more == [
        "left out, beside the parts: extra",
        f"warning: in p/{second} are no classes of the training part, hence without a label: A",
        "warning: classes without a test image: b, c"]
    assert line == f"folder p/{first}: 12 images of 4 classes to train on, 7 of 2 classes to test on, in p/{second}"


@pytest.mark.parametrize("test", ["nothing", "unlabelled", "of other classes"])
def test_the_first_test_part_with_labelled_images_is_taken(test, capsys):
    """As in Tiny-ImageNet and ImageNet; without one a fifth of the training part is for testing."""
    Path("p/test/images").mkdir(parents=True)
    pictures("p/train", 40, classes=["a/images", "b/images"]), pictures("p/val", 6)
    pictures("p/test", 0 if test == "nothing" else 5, classes=["images"] if test == "unlabelled" else "xy")
    lines, *counts = said("p", capsys)
    assert counts == [[20, 20], [3, 3]] and lines[0].endswith("6 of 2 classes to test on, in p/val")
    shutil.rmtree("p/val")
    lines, first, second = said("p", capsys)
    assert sum(first + second) == 40 and 3 < sum(second) < 14 and "a fifth, by a hash of their names" in lines[0]
    assert lines[1:] == ["warning: no labelled images of these classes in test"]


def test_copies_are_not_there_and_what_is_odd_in_a_folder_is_said(monkeypatch, capsys):
    pictures("p", 40)
    clean, at = both_parts("p"), Path("p/.ipynb_checkpoints")
    for image in [*Path("p").rglob("*.png")]:           # of macOS, of a NAS, of an archive, of Jupyter
        for copy_of in (image.with_name(f"._{image.name}"), image.parent / "@eaDir" / image.name / "thumb.png",
                        Path("p/__MACOSX/p/a", image.name), image.parent / at.name / image.name):
            copy_of.parent.mkdir(parents=True, exist_ok=True), shutil.copy(image, copy_of)
    at.mkdir(), Path("p/lost+found").mkdir(), Path("p/.DS_Store").touch()
    assert len(said("p", capsys)[0]) == 1
    for (images, labels, _), (again, same, _) in zip(clean, both_parts("p")):
        assert torch.equal(images, again) and torch.equal(labels, same)
    pictures("transport", 40, classes=["airplane", "bus", "car", "train"])
    lines, *counts = said("transport", capsys)
    assert [sum(pair) for pair in zip(*counts)] == [10] * 4             # a class may be called train
    assert lines[1:] == ["warning: classes that are named like parts: train"]
    pictures("outer/inner/train", 9), pictures("outer/inner/test", 9)
    lines, *_ = said("outer", capsys)
    assert lines[1] == "warning: one class, inner: is outer a level too high?"
    pictures("types", 10), Path("types/b").rename("types/c"), Path("types/b").mkdir()
    for name in ("b/1.gif", "b/2.gif", "a/1.jfif", "a/README"):
        Path("types", name).touch()
    lines, *_ = said("types", capsys)
    assert lines[1:] == ["left out, of no type that is read: 1 .jfif, 1 without an extension, 2 .gif",
                         "warning: no images in b: not taken as classes"]
    pictures("cut", 20, classes="a"), pictures("cut", 0, 4, classes="b")
    assert said("cut", capsys)[0][-1].startswith("warning: no image could be read of b")
    with monkeypatch.context() as patch:
        patch.setattr(train, "is_held_out", lambda _: False)
        assert train.folder_parts(Path("types"))[-1][-1].startswith("warning: no images to test on")
    pictures("flat", 9, classes=[""]), pictures("loose", 9, classes=["", "a", "b"])
    assert "warning: no classes" in said("flat", capsys)[0][1]
    assert re.fullmatch("warning: [23] images to train on are in no class folder", said("loose", capsys)[0][1])


def test_a_fifth_of_a_folder_is_for_testing_by_posix_names_alone():
    pictures("p/Train", 30, classes=["a/deep", "b"]), Path("p/other").mkdir(), pictures("flat", 30, classes=[""])
    pictures("links", 30, classes=["a", "val"]), Path("links/a").rename("red"), Path("links/a").symlink_to("../red")
    for folder, expected in (("p", ["a", "b"]), ("flat", []), ("links", ["a", "val"])):     # val beside no train
        (images, labels, classes), (tests, test_labels, _) = both_parts(folder)
        assert classes == expected and len(images) + len(tests) == 30 and 2 < len(tests) < 12
        assert classes or (labels == -1).all() and (test_labels == -1).all()
    pictures("links", 90, classes=["a", "val"])         # more come: no image moves from training to testing
    tests_of_more = both_parts("links")[1][0]
    assert not {image.numpy().tobytes() for image in tests_of_more} & {image.numpy().tobytes() for image in images}
    found, _, _ = train.scan(Path("p/Train"))
    assert found == sorted((zlib.crc32(path[8:].encode()), path, path[8]) for _, path, _ in found)
    assert [train.is_held_out(n) for n in (0, 6, 7, 34, 35, 3_000_000_001)] == [True, True, False, False, True, False]


def test_what_an_image_can_be(monkeypatch):
    from PIL import Image, ImageOps
    for name in ("1.png", "L.png", "LA.png", "P.png", "RGBA.png", "CMYK.tiff", "F.tiff", "I;16.png"):
        Image.new(name.split(".")[0], (33, 70)).save(name)
        read = train.read_image(name, 16)               # floats and 16 bits have no range of their own
        assert "convert to 8 bits" in read if name[0] in "FI" else len(read) == 3 * 16 * 16
    Path("empty.png").touch(), Image.new("RGB", (9, 9)).save("gif.png", "GIF")
    assert all(isinstance(train.read_image(name, 16), str) for name in ("empty.png", "gif.png"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, in place of a huge image
        assert "DecompressionBomb" in train.read_image("P.png", 16)
    half, turned = Image.new("RGB", (800, 600)), Image.Exif()
    half.paste((255, 255, 255), (0, 0, 800, 300))       # the upper half
    turned[0x0112] = 6
    half.save("half.jpg", exif=turned)
    sizes, fit = [], ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda image, *rest: sizes.append(image.size) or fit(image, *rest))
    good = train.read_image("half.jpg", 16)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: 1 / 0)        # by a tag of the wrong type
    untold = train.read_image("half.jpg", 16)
    assert good[0] < 5 and good[15] > 250 and untold[0] > 250 and untold[15] > 250 and untold[-1] < 5
    assert sizes == [(75, 100), (100, 75)]              # an eighth of 800 x 600, over twice 16
    os.truncate("half.jpg", os.path.getsize("half.jpg") * 2 // 3)
    assert "truncated" in train.read_image("half.jpg", 16)


@needs_fork
def test_pictures_are_decoded_once_into_a_map_that_nobody_can_write_to(monkeypatch):
    pictures("p", 30)
    images, labels, _ = train.load_dataset("folder", "p", True, 16)
    file, = Path("../cache/projhead").iterdir()
    content = file.read_bytes()
    assert content == images.numpy().tobytes() + b"\1" * len(labels)
    assert ended(forked(lambda: images.fill_(0))) in (-signal.SIGSEGV, -signal.SIGBUS) and file.read_bytes() == content
    with open(file, "r+b") as f:
        f.write(b"\7")                                  # it is the file, and no copy of it
    assert images[0, 0, 0, 0] == 7
    pictures("p", 150)
    seen, read = [], train.read_image
    monkeypatch.setattr(train, "read_image", lambda path, size: seen.append(path) or read(path, size))
    def load(size=16):
        return train.load_dataset("folder", "p", True, size, limit=100)[0]
    images = load()
    assert torch.equal(load(), images) and len(seen) == len(images) == 100
    images = images.clone()                             # the file must not shrink under a map
    for damage in (lambda file: os.truncate(file, 0), lambda file: file.write_bytes(bytes(file.stat().st_size))):
        for file in Path("../cache/projhead").iterdir():           # which then is not whole
            damage(file)
        assert torch.equal(load(), images)
    shutil.copy(seen[1], seen[0])                       # another picture in its place
    assert not torch.equal(load(), images) and len(seen) == 400 and load(8).shape[-1] == 8
    with monkeypatch.context() as patch:                # killed while it decodes: the next one starts anew
        patch.setattr(train, "read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert ended(forked(lambda: load(9))) == -signal.SIGKILL
    assert len(load(9)) == 100


def test_where_nothing_can_be_written(monkeypatch, capsys):
    pictures("p", 30), Path("file").touch()
    flags, kwargs = SMALL + "p --image-size 16", {"besides": ("folder ", "decoding ")}
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    error = one_line_error(lambda: run(flags), capsys, "cannot write file/", "XDG_CACHE_HOME", **kwargs)
    assert "what it held before" not in error
    monkeypatch.delenv("XDG_CACHE_HOME"), monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    one_line_error(lambda: run(flags), capsys, "no home folder", "XDG_CACHE_HOME", **kwargs)       # a container


def test_paths_as_they_are_typed_and_shapes_as_they_are_drawn(monkeypatch, capsys):
    home, roots = Path("home").absolute(), []
    monkeypatch.setenv("HOME", str(home)), monkeypatch.setenv("USERPROFILE", str(home))
    args = train.parse_args(["--dataset=cifar10", "--out=~/r", "--data=~/d"])
    assert (args.out, args.data) == (str(home / "r"), str(home / "d"))
    for flag in ("--data", "--out"):
        one_line_error(lambda: train.parse_args(["--dataset=cifar10", flag, ""]), capsys, flag, "empty path")
    def dataset(root, train, download):
        roots.append((root, download))
        return argparse.Namespace(data=torch.zeros(5, 32, 32, 3).byte().numpy(), targets=[*range(5)], classes=[])
    dataset.base_folder = "cifar-10-batches-py"
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", dataset), Path("d/cifar-10-batches-py").mkdir(parents=True)
    for root in ("d", "d/cifar-10-batches-py", "other"):
        images, labels, _ = train.load_dataset("cifar10", root, limit=3)
        assert images.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 2]
    assert roots == [(Path("d"), False), (Path("d"), False), (Path("other"), True)]
    (a, labels), (b, _), (other, _) = (draw_shapes(64, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == (64, 3, 32, 32) and a.dtype == torch.uint8
    assert labels.shape == (64, 2) and labels[:, 0].unique().tolist() == list(range(8)) and labels[:, 1].max() == 5


def test_a_bad_image_is_left_out_and_data_may_move(capsys):
    pictures("few", 300)
    whole, *_ = train.load_dataset("folder", "few", size=16)
    names = {colour(i): Path("few", "ab"[i % 2], f"{i:03}.png") for i in range(300)}
    cut, dangling = (names[tuple(image[:, 0, 0].tolist())] for image in whole[3:5])
    os.truncate(cut, 40), dangling.unlink(), dangling.symlink_to("nowhere")
    capsys.readouterr()
    (images, labels, _), _ = both_parts("few")
    named = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert str(cut) in named[0] and str(dangling) in named[1] and named[2].startswith("left out 2 of ")
    assert torch.equal(images, torch.cat([whole[:3], whole[5:]])) and len(labels) == len(images)
    both_parts("few")                                   # from the cache: it is said again
    assert "left out 2 of " in capsys.readouterr().err
    assert run(SMALL + "few --image-size 16 --limit 20 --batch-size 4 --epochs 1", "ten may be bad")["images"][0] == 18
    pictures("many", 185, 15)
    for limit, error in ((150, "over 1 % of .* cannot be read, the last .*many/[ab]/1[89]"),
                         (300, "there are [0-9]+ training images, and 300 are needed")):
        with pytest.raises(train.UserError, match=error):
            run(f"{SMALL}many --limit {limit}")
    assert not Path("run").exists() and len(list(Path("../cache/projhead").iterdir())) == 4
    pictures("ten/train", 20), pictures("ten/test", 0, 10)
    with pytest.raises(train.UserError, match="no image in ten to test on could be read"):
        both_parts("ten")
    flags = SMALL.replace("--data", "--image-size 16 --limit 24 --data")
    pictures("p", 40)
    run(flags + "p", "whole"), stopped(flags + "p", at=3, out="part")
    Path("p").rename("moved"), Path("link").symlink_to("moved")
    one_line_error(lambda: run(flags + "p", "part"), capsys, "--data")
    assert same_bits(run(flags + "link", "part"), saved("whole"))


BAD = """
--head wrong         | --heads mlp         | --epochs 1.5            | --tau nan             | --limit 1
--dataset mnist      | --limit 99999999    | --device cuda:99        | --device meta         | --data x
--loss cosine        | --loss bn           | --loss barlow --tau 0.5 | --target ema          | --image-size 64
--head none --dim 64 | --head slice --dim 999     | --head linear --hidden 64      | --head mlp --depth 1 --hidden 64
--head linear --depth 3        | --head mlp --sparsity-norm l1   | --head sparse --head-lr 0  | --tau inf
--head none --inner-steps 1    | --head reweight --head-bn end   | --head none --head-lr 1  | --head none --head-bn both
--head mlp --inner-batch other | --head mlp --inner-start reset  | --head mlp --inner-gradient unrolled
--predictor mlp --ema 0.9      | --predictor mlp --tau 0.5       | --inner-gradient unrolled --inner-batch other
--predictor identity --predictor-lr 2          | --predictor identity --predictor-schedule constant
--dataset folder --data nowhere                | --dataset folder --data occupied
--dataset cifar10 --data nowhere/at/all        | --dataset cifar10 --data corrupt
--out occupied/thesis.tex  | --epochs 10000000000  | --head none --sparsity 1  | --head parametric --head-lr 0
"""


def test_bad_flags_are_one_line_and_lose_nothing(monkeypatch, capsys):
    for folder in ("occupied", "corrupt/cifar-10-batches-py"):
        Path(folder).mkdir(parents=True)
    Path("occupied/thesis.tex").write_text("chapter 1")
    Path("corrupt/cifar-10-batches-py/data_batch_1").write_text("noise")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    before = files()
    for flags in re.split(r"[|\n]", BAD.strip()):
        error = one_line_error(lambda: train.train(train.parse_args(flags.split())), capsys,
                               besides=("folder ", "warning: ", "left out"))
        assert files() == before, (flags, error)
    monkeypatch.setattr(projhead.ConvNet, "forward", lambda self, x: torch.empty(2**60))        # out of memory
    one_line_error(lambda: run("--head mlp"), capsys, "out of memory")
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "training_images", lambda *_: SETS[4_000][0])
    one_line_error(lambda: run("--inner-gradient unrolled"), capsys, "--inner-gradient", "one process")


def test_flags_have_defaults_and_help_and_name_the_run(capsys, monkeypatch):
    one = dict(head="parametric", depth=2, hidden=None, dim=128, head_bn="hidden", head_lr=1, inner_steps=2,
               inner_batch="same", inner_start="warm", inner_gradient="envelope", sparsity=0, sparsity_norm=None,
               predictor="none", predictor_lr=None, predictor_schedule=None, target=None, ema=None, loss="infonce",
               tau=0.5, dataset="shapes", data=None, limit=None, image_size=32, crop_scale=0.5, hue=0.5, grayscale=0.1,
               encoder="convnet", precision=None, epochs=8, batch_size=256, lr=0.06, momentum=0.9, weight_decay=5e-4,
               warmup=0.05, seed=0, device=train.default_device(), called="--head parametric",
               out=os.path.join("runs", "shapes-convnet-parametric-seed0"))
    joint = dict(inner_steps=0, inner_batch=None, inner_start=None, inner_gradient=None)
    predicts = joint | dict(head="mlp", head_bn="both", predictor_lr=1, predictor_schedule="cosine", target="stopgrad")
    cosine, bn = predicts | dict(loss="cosine", tau=None), predicts | dict(loss="bn", tau=None, head_bn="hidden")
    reads = dict(data=os.path.abspath("data"), crop_scale=0.2, hue=0.1, encoder="resnet18", epochs=100, batch_size=512)
    fixed = joint | dict(depth=None, dim=None, head_bn="none", head_lr=None)
    for flags, differ in {
            "": {}, "--head mlp": joint, "--head sparse": joint | dict(sparsity=0.1, sparsity_norm="l21"),
            "--head linear": fixed | dict(dim=128, head_lr=1), "--head none": fixed, "--head slice": fixed,
            "--head mlp --depth 1": joint | dict(head_bn="none"), "--head reweight --predictor mlp": cosine | fixed,
            "--head linear --predictor mlp": cosine | dict(depth=None, head_bn="end"),
            "--predictor mlp": cosine, "--predictor linear --target ema": cosine | dict(target="ema", ema=0.99),
            "--predictor offdiag": bn | dict(predictor_lr=10),
            "--predictor identity": bn | dict(predictor_lr=None, predictor_schedule=None),
            "--predictor mlp --loss bn": bn, "--loss barlow": dict(tau=None), "--dataset cifar10": reads,
            "--dataset stl10 --encoder convnet": reads | dict(
                image_size=96, encoder="convnet", epochs=20, batch_size=256),
            "--dataset folder --data a/b": reads | dict(image_size=64, data=os.path.abspath("a/b"))}.items():
        args, typed = vars(train.parse_args(flags.split())), dict(zip(*[iter(flags.replace("-", "").split())] * 2))
        names = "called", "out", *(typed.keys() - {"data"})
        assert args | dict.fromkeys(names) == one | differ | dict.fromkeys(names)
        assert all(str(args[flag]) == typed[flag] for flag in typed if flag != "data") and args.keys() == one.keys()
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(line in text for line in train.__doc__.splitlines() if line.startswith("    "))
    _, *actions = train.parser()._actions
    assert {a.dest for a in actions} | {"called"} == vars(train.parse_args([])).keys()
    assert all(re.search(r"Default: .*\.$", a.help) and f"\n  {a.option_strings[0]} " in text for a in actions)
    monkeypatch.setattr(nn.Module, "__init__", lambda self: pytest.fail("a network is built to parse flags"))
    typed = ["--tau 0.10", "--dataset folder", "--data some/cats", "--encoder convnet", "--seed 3", "--lr 0.1"]
    for order, out in ((typed, ""), (typed[::-1], ""), ([*typed, "--out there", "--device cpu"], "there")):
        args = train.parse_args(" ".join(order).split())
        assert args.called == "--head parametric --tau 0.1 --dataset folder --encoder convnet --lr 0.1"
        assert args.out == (out or os.path.join("runs", "folder-cats-convnet-parametric-tau0.1-lr0.1-seed3"))
    assert parsed("--predictor offdiag").called == "--head mlp --predictor offdiag --encoder convnet128"
    long = "--dataset folder --data " + 180 * "x"
    one_line_error(lambda: parsed(long), capsys, "--out")
    assert parsed(f"{long} --out short").out == "short" and not files()


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_files_that_are_no_checkpoints(monkeypatch, capsys, recwarn):
    checkpoint, path = stopped("--head mlp"), Path("run/checkpoint.pt")
    whole = path.read_bytes()
    def part(name, key, value):
        return checkpoint | {name: checkpoint[name] | {key: value}}
    contents = [
        b"", pickle.dumps({"args": 1}), pickle.dumps(checkpoint["args"], 2), b"noise" * 1000,
        whole[:99_999], whole[:-1], Bomb(), part("args", "lr", Bomb()),
        [1, 2], {"model": checkpoint["encoder"]}, checkpoint | {"args": {}},
        *({k: v for k, v in checkpoint.items() if k != key} for key in ("images", "step", "head")),
        part("head", "0.weight", torch.ones(3, 3)), part("encoder", "99.bias", torch.ones(3))]
    for number, content in enumerate(contents):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = files()
        for code, error in (ends(lambda: run("--head mlp"), capsys), evaluates(monkeypatch, capsys, "run")):
            assert code == 2 and "run" in error, (number, error)
        assert files() == before and not recwarn.list, (number, recwarn.list)
    assert not Path("ran").exists()


@pytest.mark.parametrize("where, error, words", [
    (Path, PermissionError(13, "Permission denied", "run/checkpoint.pt"), "Permission denied: 'run/checkpoint.pt'"),
    (torch, MemoryError(), "out of memory"), (torch, OSError(5, "Input/output error"), "Input/output error"),
    (torch, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(where, error, words, monkeypatch, capsys):
    stopped("--head mlp")
    def fails(*_, **__):
        raise error
    monkeypatch.setattr(where, "load" if where is torch else "read_bytes", fails)
    assert "damaged" not in one_line_error(lambda: run("--head mlp"), capsys, words)


# ---------------------------------------------------------------------------- Wen & Li's simple setting
# Two neurons f_j(X) = sum_p <w_j, X_p>^3 on four patches, two of +-alpha_l v_l, two of noise. The population loss has a
# closed form, by f's covariances, and its gradient flow from w_1, w_2 in R^64 stays in span(v_1, v_2, w_1, w_2): y
# (..., 10) holds w_1, w_2 in that basis, then E_12 and E_21. A plain step is a time of WL_ETA, for the head too.

WL, WL_DRAWN, WL_ALPHA, WL_NOISE = 32, 256, torch.tensor([2.5, 1.0], dtype=double), 0.4     # starts of each kind, sizes
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
    """y (n, starts, 10), each start in steps of ROS2 of its own, as E is stiff; and y (4, starts, 10) at WL_STEPS."""
    y, I, path, at = wen_li_starts(), torch.eye(10, dtype=double), [], []
    t, h = 0 * y[:, :1], 0 * y[:, :1] + WL_ETA
    for end in (steps * WL_ETA for steps in WL_STEPS):
        while (on := t[:, 0] < end).any():                      # the starts that are not there yet
            now, step = y[on], torch.minimum(h[on], end - t[on])
            f = wen_li_flow(torch.cat([now[None], now + 1e-6 * I[:, None]]), without)   # at now, and beside it
            A = I - (1 - 0.5 ** 0.5) * step[..., None] * ((f[1:] - f[0]) / 1e-6).permute(1, 2, 0)
            k1 = torch.linalg.solve(A, f[0])
            k2 = torch.linalg.solve(A, wen_li_flow(now + step * k1, without) - 2 * k1)
            error = (step * (k1 + k2) / 2).abs().amax(1, keepdim=True) / 3e-3
            good, longer = error <= 1, step * (0.8 * error ** -0.5).nan_to_num(0.2).clamp(0.2, 5)
            cut = good & (h[on] > step)                         # cut short here: h stays
            h[on], t[on] = torch.where(cut, torch.maximum(h[on], longer), longer), t[on] + good * step
            y = y.index_put((on,), torch.where(good, now + step * (1.5 * k1 + 0.5 * k2), now))
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


def test_wen_li_flow_agrees_with_plain_steps(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WL_STEPS", (1000,))
    y = wen_li_starts()
    for _ in range(1000):
        y = y + WL_ETA * wen_li_flow(y, "nothing")              # through projhead, by the test above
    differ = (wen_li.__wrapped__("nothing")[1][0] - y)[:, :8].abs().amax(dim=1)
    print(f"\nafter 1000 plain steps w differs by {differ.median():.4f}, 90 % {differ.quantile(0.9):.4f}")
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


def test_wen_li_substitution_acceleration_and_the_heads_return():
    """In starts that collapse without the head, and learn both features with it."""
    path, at = wen_li("nothing")
    saved = wen_li_outcome(at[-1])[0] & wen_li_outcome(wen_li("head")[1][-1])[1]
    path, separated, drawn = path[:, saved], saved[:WL].sum(), saved[WL:].sum()
    E = path[..., 8:].abs()
    most, last = E.amax(dim=(0, 2)), E[-1].max()
    # substitution: on samples with v_1, E_21 f_1 outweighs f_2
    # acceleration: w_2 grows faster on v_2 than on v_1, at E_21's peak, and seldom with E = 0 there
    substituted = (E[..., 1] * path[..., 0].abs() ** 3 > path[..., 4].abs() ** 3).any(dim=0).sum()
    peak = path[E[..., 1].argmax(dim=0), torch.arange(len(most))]
    growth = [(wen_li_flow(y, "nothing") / y)[:, 4:6] for y in (peak, F.pad(peak[:, :8], (0, 2)))]     # of log |w_2|
    faster, faster_without = ((on[:, 1] > on[:, 0]).sum() for on in growth)
    print(f"\n{separated} of {WL} separated starts, {drawn} of {WL_DRAWN} as drawn: substitution in {substituted}, "
          f"acceleration in {faster}, with E = 0 there in {faster_without}; |E| up to {most.min():.3f} to "
          f"{most.max():.3f}, the last {last:.0e}")
    assert separated >= 30 and drawn >= 75 and most.min() > 0.02 and last < 0.02
    assert substituted > 0.8 * len(most) and faster > 0.95 * len(most) and faster_without < 0.4 * len(most)


# ---------------------------------------------------------------------------- what README.md and others rely on

DOCS = [HERE / "README.md", HERE / ".github" / "RESULTS.md"]


def docs():
    return "\n".join(file.read_text(encoding="utf-8") for file in DOCS)


def test_the_documents_commands_parse(monkeypatch, capsys):
    """Those of its blocks, and each span that begins with python or a flag, by the script that has its flags."""
    def evaluates(words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words])
        evaluation.parse_args()
    for parses in (evaluates, train.parse_args):
        with pytest.raises(SystemExit):
            parses(["--help"])
    flags = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    blocks = re.findall(r"```sh\n(.*?)```", docs(), re.S)
    lines = re.split(r"\n|&&", re.sub(r"#.*", "", "\n".join(blocks)))
    spans = re.findall(r"`((?:python|--)[^`]*)`", re.sub(r"```.*?```", "", docs(), flags=re.S))
    scripts = []
    for command in lines + spans:
        command = re.sub(r"\bFLAGS\b|\.\.\.|; done", "", command).replace("$head", "mlp").replace("$seed", "1")
        command = re.sub(r"\b(DIR|S|N)\b", "1", command)
        script, words = re.fullmatch(r"(?:.*?(train|eval)\.py)?(.*)", command.strip(), re.S).groups()
        words = shlex.split(words)
        scripts.append(script)
        if script == "eval":
            evaluates(words if "RUN" in words else ["run", *words])
        elif script == "train":
            train.parse_args(words) if words != ["--help"] else None
        elif len(words) == 1 and words[0].startswith("--"):             # a flag that is named without a value
            assert words[0] in flags
        elif words and words[0].startswith("--"):
            try:
                train.parse_args(words)
            except train.UserError:                     # then they are eval.py's
                evaluates(["run", *words])
    assert scripts.count("train") > 5 and scripts.count("eval") > 3


def test_the_documents_links_and_pictures_exist():
    links = [(file, link) for file in DOCS for link in re.findall(r'(?:\]\(|src=")([^)"]+)', file.read_text("utf-8"))]
    local = [file.parent / link for file, link in links if not link.startswith("http")]
    assert HERE / ".github/neighbors.png" in local and all(path.is_file() for path in local)


def test_the_results_are_what_their_commands_print(evaluated, monkeypatch, tmp_path):
    """Each table below a command on .github/runs.jsonl, and each figure that is there."""
    text, count = DOCS[1].read_text("utf-8"), 0
    monkeypatch.chdir(HERE)
    for command, table in re.findall(r"`python eval\.py (\.github/runs\.jsonl[^`]*)`.*\n+((?:\|.*\n)*)", text):
        file = re.search(r"--plot (\S+)", command)
        if file:
            evaluated(command.replace(file[1], str(tmp_path / "again.svg")))
            assert (tmp_path / "again.svg").read_bytes() == Path(file[1]).read_bytes(), command
        else:
            printed = [line for line in evaluated(command).splitlines(True) if line.startswith("|")]
            assert "".join(printed) == table, command
        count += 1
    assert count == text.count("`python eval.py .github/") > 5


def test_the_readmes_code_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", DOCS[0].read_text("utf-8"), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_docstrings_name_what_else_to_copy():
    """After "Needs" stands each name of projhead.py that a class or function uses itself."""
    imports = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / "projhead.py").read_text(), re.M)
    assert set(imports) == {"torch", "torchvision"}
    own = {name: value for name, value in vars(projhead).items() if getattr(value, "__module__", "") == "projhead"}
    public = [value for name, value in own.items() if not value.__name__.startswith(("_", "<"))]
    assert all(value.__doc__ for value in public)
    own |= {name: None for name in ("ENCODERS", "NORMS")}
    for name, value in own.items():
        if value and value.__doc__:
            code = re.sub(r'""".*?"""|#.*?\n', "", evaluation.inspect.getsource(value), flags=re.S)
            used = {other for other in own if re.search(rf"(?<![.\w]){other}\b", code)} - {name}
            assert used <= set(re.findall(r"\w+", re.split(r"Needs\s", value.__doc__)[-1])), (name, used)
