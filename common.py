"""Iterative amortized inference (Mittal et al., 2025): what all six scripts share.

Read in this order: `refine`, the greedy loop, and `mini_batches`, what it is fed; `Parametric`, `Explicit`, `Implicit`,
the three regimes; `Transformer`.
The second half (flags, files, evaluation, plots) is plumbing; of the method it has `make_optimizer`, `replayed` and `evaluate`.

Shapes: B tasks, K steps (one mini-batch each), N observations in a mini-batch (the context), Q queries, D width,
T prefixes of a mini-batch solved in one pass (N for parametric and explicit models in causal training, else 1), H past states,
P numbers in a state (implicit: of a query), X and Y numbers in an input and in a target, F basis functions; S tokens that
attend or read, C numbers a head. Equations, sections and figures are the paper's.
"""

import argparse
import collections
import contextlib
import glob
import json
import math
import os
import platform
import shlex
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path

if {"-h", "--help"} & {*sys.argv[1:]}:  # argparse will answer and leave: stand-ins spare the seconds that torch takes
    from unittest.mock import MagicMock

    inner = ("distributed", "nn", "nn.attention", "nn.functional", "utils._python_dispatch", "utils.flop_counter")
    heavy = ["numpy", "scipy.optimize", "matplotlib", "matplotlib.figure", "matplotlib.ticker", "torch", *(f"torch.{name}" for name in inner)]
    sys.modules.update(dict.fromkeys(heavy, MagicMock()))

handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves at once while these load, without a traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: nothing is shown on a screen
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tqdm import tqdm

signal.signal(signal.SIGINT, handler)

# A batch of tasks: context_x (K, B, N, X), context_y (K, B, N, Y), query_x (B, Q, X), query_y (B, Q, Y).
# Targets are always vectors: one number for regression, one-hot for classes.
Task = collections.namedtuple("Task", "context_x context_y query_x query_y")


# ---------------------------------------------------------------- the greedy loop


def refine(model, task):
    """Refines a solution over the K mini-batches of `task` (eqs. 7 and 8); yields a prediction after each of them.

    A prediction is (T, B, Q, Y), where T counts the prefixes of the mini-batch that were solved in the same pass, so
    that it broadcasts against `task.query_y`. States are detached between steps: the loss of each yielded prediction
    may be backpropagated at once, and its graph is freed before the next step (greedy training, eqs. 9 and 19-22).
    """
    past = [model.initial_state(task.query_x)] * model.history  # oldest first
    for step, batch in enumerate(mini_batches(model, task)):
        states = model.update(past, batch, task.query_x, step)  # (T, B, ...)
        yield model.predict(states, task.query_x)
        past = [state.detach() for state in [*past[1:], states[-1]]]  # after the whole mini-batch (implicit, in causal training: the prefix that a query drew)


def mini_batches(model, task):
    """The mini-batches of `task` one by one, x (B, n, X) and y (B, n, Y), as encoded by `model.encode` for `model.update`.

    They hold all N observations or, in training without a mask, as many as are drawn, for all tasks alike (sec. 11.4).

    For implicit models with `--decoder solve` y is (B, n, 2 Y): the targets, then the residuals of the observations' own
    predictions. In this regime only queries have predictions. So each observation is a query of all mini-batches before its own,
    and meets them as the task's queries do, at the same sizes: its residual tells how far these have come. Here all observations
    to come meet each mini-batch in turn; on a stream, keeping earlier mini-batches would give the same numbers.
    """
    K, _, N, _ = task.context_x.shape
    sizes = [model.size or int(draw_size(N, ())) for _ in range(K)] if model.training and not model.causal else [N] * K
    batches = [(x[:, :n], y[:, :n]) for x, y, n in zip(task.context_x, task.context_y, sizes)]
    pasts = [[model.initial_state(x)] * model.history for x, _ in batches] if model.shows_residuals else []  # of the observations of each
    for step, (x, y) in enumerate(batches):
        if model.shows_residuals:
            y = torch.cat([y, residuals(model.loss, model.predict(pasts[step][-1][None], x)[0], y)], -1)
        batch = model.encode(x, y, step)
        yield batch
        with torch.no_grad():
            for later in range(step + 1, len(pasts)):  # one at a time: memory does not grow with K
                pasts[later] = [*pasts[later][1:], model.update(pasts[later], batch, batches[later][0], step)[-1]]


def residuals(loss, predictions, y):
    """Gradient of each observation's loss in its prediction: 2 (prediction - y) for squares, sum(y) softmax(prediction) - y for cross-entropy.

    Predictions and y are (B, N, Y), and so is the result. It is an input of the model, as the gradients are: nothing flows
    back into it.
    """
    with torch.enable_grad():
        predictions = predictions.detach().requires_grad_()
        return torch.autograd.grad(loss(predictions, y).sum(), predictions)[0]


def draw_size(N, shape, device="cpu"):
    """Context sizes for training, one a step (or one a query): half of them uniform in 1 ... N, the other half N.

    In evaluation states come from whole mini-batches. A model that in training met only the poorer states of random
    prefixes trusts its state too little later on.
    """
    uniform = torch.randint(1, N + 1, shape, device=device)
    return torch.where(torch.rand(shape, device=device) < 0.5, N, uniform)


# ---------------------------------------------------------------- the masked transformer


def softmax_attention(q, k, v, visible=None, causal=False):
    """softmax(q . k / sqrt(C)) v over the visible tokens; q (B, heads, S, C), k and v (B, heads, N, C), visible a boolean mask or None."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:  # two plain products beat the kernel while attention maps fit the cache
        scores = ((q * q.shape[-1] ** -0.5) @ k.mT).float()
        visible = prefixes(scores) if causal else visible
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)


def prefixes(scores):
    """The causal mask (S, N) of scores (B, heads, S, N): token i sees tokens up to i."""
    return torch.ones_like(scores[0, 0], dtype=torch.bool).tril()


def linear_attention(q, k, v, visible=None, causal=False):
    """Attention without the softmax: the mean over the visible tokens of (q . k) v, divided by sqrt(C).

    Weights may be negative and grow with x, so that one layer can take a step of gradient descent on a least-squares
    problem (von Oswald et al., 2023a). Softmax attention averages: right for classes, slow to learn for regression.
    """
    q = q * q.shape[-1] ** -0.5
    if visible is None and not causal:
        return q @ (k.mT @ v / k.shape[-2])  # the sums over tokens first: time and memory are linear in N
    scores = q @ k.mT
    visible = prefixes(scores) if causal else visible
    return (scores * visible) @ v / visible.sum(-1, keepdim=True)


class Block(nn.Module):
    """Pre-norm transformer block, in the open.

    `nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True)` does the same.
    """

    def __init__(self, width, heads, attention="softmax"):
        super().__init__()
        self.heads = heads
        self.attend = linear_attention if attention == "linear" else softmax_attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, S, C)

    def memory(self, h):
        """Keys and values of normed tokens h (B, N, D), for any token that reads them."""
        k, v = self.key_value(h).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(self, x, memory=None, visible=None, causal=False):
        """Tokens x (B, S, D) read `memory` or, without one, attend to each other -> (B, S, D), and that memory.

        `visible` is a boolean mask (B, 1, S, N), True where they may look.
        """
        h = self.norm1(x)
        q = self.split(self.query(h))
        memory = memory or self.memory(h)
        a = self.attend(q, *memory, visible, causal)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), memory


class Transformer(nn.Module):
    """A stack of blocks without positions: a mini-batch is a set. Runs in `self.dtype`, takes and returns float32.

    Unless `init` is "torch", attention starts by similarity, which shortens the plateau of in-context learning: keys start as
    queries, either both random projections ("random") or both rotations, which keep angles ("rotation"). Not good for wide
    heads where tokens see themselves: nothing is as similar to a token as it is.
    """

    def __init__(self, width, depth, heads, attention="softmax", init="torch"):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        for block in self.blocks if init != "torch" else ():
            if init == "rotation":
                nn.init.orthogonal_(block.query.weight)
            with torch.no_grad():
                block.key_value.weight[:width] = block.query.weight
        self.norm = nn.LayerNorm(width)
        self.dtype = torch.float32

    def autocast(self, x):
        return torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, x, causal):
        """Self-attention over the tokens x (B, S, D) -> (B, S, D)."""
        with self.autocast(x):
            for block in self.blocks:
                x, _ = block(x, causal=causal)
        return self.norm(x.float())

    def encode(self, x, causal):
        """Context tokens x (B, N, D) -> the keys and values of every layer, and what enters the last. No query plays a part."""
        (*inner, last), memories = self.blocks, []
        with self.autocast(x):
            for block in inner:
                x, memory = block(x, causal=causal)
                memories.append(memory)
            h = last.norm1(x)
            return memories + [last.memory(h)], h.float()  # what the last layer would make of the context is not needed

    def read(self, x, memories, visible=None):
        """Query tokens x (B, Q, D) read the context in every layer, and never each other -> (B, Q, D)."""
        with self.autocast(x):
            for block, memory in zip(self.blocks, memories):
                x, _ = block(x, memory, visible)
        return self.norm(x.float())


# ---------------------------------------------------------------- the three regimes


class Parametric(nn.Module):
    """The state is the weights of a predictor on fixed basis functions of x: learned optimizers and hypernetworks (eq. 7).

    basis(x (..., X)) -> (..., F) is a plain function of the script; the prediction is basis(x) @ weights.T, weights (Y, F).
    loss(prediction, y) -> (...), one number per observation, is the loss whose gradients the model sees.
    """

    size = None  # of all mini-batches of a training step, where `replayed` sets it; else each draws its own
    shows_residuals = False  # `update` computes its own: with weights they are at hand

    def __init__(self, args, x_dim, y_dim, loss, basis):
        super().__init__()
        self.loss, self.basis, self.y_dim = loss, basis, y_dim
        self.history, self.causal = args.history, args.mask == "causal"
        self.span, self.solve, self.adds = args.decoder != "linear", args.decoder == "solve", args.update == "residual"  # solved changes are in the span, too
        D, P = args.width, basis(torch.zeros(x_dim)).shape[-1] * y_dim
        self.theta0 = nn.Parameter(torch.zeros(P))
        self.observation = nn.Linear(x_dim + y_dim, D) if args.signal in ("data", "both") else None
        self.gradient = nn.Linear(self.history * P, D) if args.signal in ("grad", "both") else None
        if self.span:  # a state is seen by what it gets wrong, and never as weights
            self.residual = nn.Linear(self.history * y_dim, D)
            self.decoder = nn.Linear(D, y_dim + self.solve)
        else:
            self.slots = args.latent_tokens  # tokens that hold the state; more than 1 only for explicit, without a mask
            self.state = nn.Linear(P // self.slots, D)
            self.age = nn.Parameter(0.02 * torch.randn(self.history, self.slots, D))  # tells these tokens apart, and past states from the current one
            self.decoder = nn.Linear(D, P // self.slots)
        self.clock = nn.Parameter(0.02 * torch.randn(D)) if args.clock == "steps" else None
        self.transformer = Transformer(D, args.depth, args.heads, args.attention)
        nn.init.zeros_(self.decoder.weight)  # the untrained change is none: no step starts by throwing the state away (--update direct does)
        nn.init.zeros_(self.decoder.bias)

    def initial_state(self, query_x):
        return self.theta0.expand(len(query_x), -1)  # (B, P)

    def predict(self, states, x):
        """States (T, B, P) applied to inputs x (B, Q, X) -> (T, B, Q, Y)."""
        return self.apply_to(self.basis(x), states)

    def apply_to(self, phi, states):
        """basis(x) @ weights.T, all prefixes in one product, in the order whose backward pass is much faster on a CPU."""
        weights = states.unflatten(-1, (self.y_dim, -1)).transpose(0, 1).flatten(1, 2)  # (B, T Y, F)
        return (weights @ phi.mT).unflatten(1, (len(states), -1)).transpose(0, 1).mT

    def gradients(self, wrong, phi):
        """Gradient of each observation's loss at the state, by the chain rule: (B, N, Y) and (B, N, F) -> (B, N, P)."""
        return (wrong[..., None] * phi[..., None, :]).flatten(2)

    def pull_back(self, phi, wanted):
        """What tokens want of the predictions on phi = basis(x) (B, N, F), as a change of the weights, for each prefix -> (T, B, P).

        "span": wanted (B, N, Y), taken back by the Jacobian's transpose, as gradient descent does with -dL/dprediction.
        "solve": wanted (B, N, Y + 1), the last the log of a variance: how far the others may be missed. The smallest change
        of the weights that does so, J^T (J J^T + diag(variance))^-1 wanted: the posterior mean under noise of that variance.
        """
        N = phi.shape[1]
        prefix = torch.ones(1, N, device=phi.device)  # (T, N)
        if self.causal and self.training:
            prefix = prefix.expand(N, N).tril()
        parts = prefix[..., None] * wanted[:, None, :, : self.y_dim]  # (B, T, N, Y)
        if self.solve:
            kernel = (phi @ phi.mT)[:, None] * (prefix[..., None] * prefix[:, None])  # (B, T, N, N), cut to the prefix: beyond it parts are 0 and stay 0
            parts = Solve.apply(kernel + noise(wanted[:, None, :, -1]), parts)
        change = parts.mT.flatten(1, 2) @ phi  # (B, T Y, F): all prefixes in one product
        return change.unflatten(1, (len(prefix), -1)).flatten(2).transpose(0, 1)

    def encode(self, x, y, step=0):
        """A mini-batch x (B, N, X), y (B, N, Y) for `update`: as it is, since tokens depend on the state."""
        return x, y

    def update(self, past, batch, query_x, step=0):
        """h_phi of eq. 7: the last H states (B, P) and a mini-batch, after `step` others -> states after each prefix (T, B, P), whatever the queries."""
        x, y = batch
        with torch.no_grad():  # a trained basis learns from what is predicted, not from how it is updated
            phi = self.basis(x)
        wrong, tokens = [residuals(self.loss, self.apply_to(phi, state[None])[0], y) for state in past], 0
        if self.observation is not None:
            tokens = tokens + self.observation(torch.cat([x, y], -1))  # (B, N, D)
        if self.gradient is not None:
            tokens = tokens + self.gradient(torch.cat([self.gradients(r, phi) for r in wrong], -1))
        if self.span:
            tokens = tokens + self.residual(torch.cat(wrong, -1))
        if self.clock is not None:
            tokens = tokens + self.clock / (step + 1)  # the weight of a new mini-batch in an average of all
        if self.span:
            change = self.pull_back(phi, self.decoder(self.transformer(tokens, self.causal)))
        else:
            change = self.read_off(past, tokens)
        return past[-1] + change if self.adds else change

    def read_off(self, past, tokens):
        """The paper's decoder: states are tokens before those of the observations (B, N, D), and outputs a change of the weights, or new ones (--update direct) -> (T, B, P)."""
        B, H = len(tokens), self.history
        states = self.state(torch.stack(past, 1).view(B, H, self.slots, -1)) + self.age  # (B, H, slots, D)
        before = H * self.slots  # tokens before those of the observations
        h = self.transformer(torch.cat([states.flatten(1, 2), tokens], 1), self.causal)  # (B, before + N, D)
        if self.causal:  # at observation t: the state inferred from the first t observations (fig. 5)
            return self.decoder(h[:, before:] if self.training else h[:, -1:]).transpose(0, 1)
        return self.decoder(h[:, before - self.slots : before]).reshape(1, B, -1)  # at the current state's own tokens (fig. 7)


class Explicit(Parametric):
    """The state is a latent that a trained network reads, as its last layer: conditional neural processes, iterated (eq. 7)."""

    def __init__(self, args, x_dim, y_dim, loss, basis=None):
        super().__init__(args, x_dim, y_dim, loss, Basis(x_dim, args.hidden, args.basis))


class Basis(nn.Module):
    """All layers but the last of f_gamma(x, z): x (..., X) -> (..., hidden), or twice as many. The last layer's weights are z.

    A network of x with a latent beside it has to approximate products, which even w.x needs; this one can do all that a
    linear predictor can. It starts as one, on rotated x ("linear"), or as a kernel machine: random Fourier features of the Gaussian
    kernel ("fourier"; Rahimi and Recht, 2007) exp(-|x - x'|^2 / X), for x whose numbers are of order one.
    """

    def __init__(self, x_dim, hidden, kind):
        super().__init__()
        self.fourier = kind == "fourier"
        self.input = nn.Linear(x_dim, hidden)
        layers = range(0 if self.fourier else 2)
        self.up = nn.ModuleList(nn.Linear(hidden, hidden) for _ in layers)
        self.down = nn.ModuleList(nn.Linear(hidden, hidden) for _ in layers)
        if self.fourier:
            nn.init.normal_(self.input.weight, std=(2 / x_dim) ** 0.5)
        else:  # other random matrices would mix every change with noise of its own size
            nn.init.orthogonal_(self.input.weight, gain=max(1, hidden / x_dim) ** 0.5)
        for p in self.down.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        h = self.input(x)
        for up, down in zip(self.up, self.down):
            h = h + down(F.gelu(up(h)))
        features = torch.cat([h.cos(), h.sin()], -1) if self.fourier else h
        return features.mul_(h.shape[-1] ** -0.5)  # in place: it is the largest tensor of a step


class Solve(torch.autograd.Function):
    """Solve.apply(a, b) is a^-1 b for symmetric positive definite a (..., N, N) and b (..., N, C), by one Cholesky factor for both passes.

    On a GPU torch.linalg.solve takes hundreds of small kernels. Nothing waits for a check: a matrix that has no factor gives
    NaN, and so a loss that is not finite, which the journal names.
    """

    @staticmethod
    def forward(ctx, a, b):
        factor, failed = torch.linalg.cholesky_ex(a)
        factor = factor.masked_fill(failed[..., None, None] != 0, math.nan)
        x = substitute(factor, b)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        factor, x = ctx.saved_tensors
        gradient = substitute(factor, gradient)
        return -gradient @ x.mT, gradient


def substitute(factor, b):
    """(L L^T)^-1 b of a triangular factor L."""
    return torch.linalg.solve_triangular(factor.mT, torch.linalg.solve_triangular(factor, b, upper=False), upper=True)


def noise(log_variance):
    """(..., N) -> diagonal matrices of variances (..., N, N). With less than 0.001 float32 may not solve."""
    return (log_variance.exp() + 1e-3).diag_embed()


def gaussian_kernel(a, b):
    """exp(-|a - b|^2 / X) of all pairs, a (B, Q, X) and b (B, N, X) -> (B, Q, N): that of `Basis` ("fourier") in the limit of many features."""
    return ((2 * a @ b.mT - a.square().sum(-1)[..., None] - b.square().sum(-1)[..., None, :]) / a.shape[-1]).exp()


def linear_kernel(a, b):
    """a . b / X of all pairs."""
    return a @ b.mT / a.shape[-1]


class Implicit(nn.Module):
    """The state is each query's own prediction, refined by a transformer that reads the mini-batch (eq. 8).

    With --decoder solve the mini-batch's tokens hold residuals (`mini_batches`), and say how far each is to be trusted. Kernel
    ridge regression carries the residuals over to the queries, and what these read corrects the result.
    """

    size = None  # of all mini-batches of a training step, where `replayed` sets it; else each draws its own

    def __init__(self, args, x_dim, y_dim, loss=None, basis=None):
        super().__init__()
        self.loss, self.kind = loss, args.state
        self.history, self.shows_residuals, self.causal = args.history, args.decoder == "solve", args.mask == "causal"
        # Logits outgrow the one-hot labels that share their encoder: a query is shown --state-scale of them.
        self.adds, self.scale = args.update == "residual", args.state_scale
        D, P = args.width, (args.width if args.state == "latent" else y_dim)
        self.initial = nn.Parameter(torch.zeros(P))
        self.observation = nn.Linear(x_dim + (2 if self.shows_residuals else 1) * y_dim, D)
        if args.init == "rotation":  # tokens start as much alike as their inputs are
            nn.init.orthogonal_(self.observation.weight)
        # Queries share the encoder of the observations [x, y]; a latent is no y and gets its own (sec. 11.1).
        self.query = nn.Linear(x_dim + D, D) if args.state == "latent" else self.observation
        self.query_embedding = nn.Parameter(0.02 * torch.randn(D))
        self.clock = nn.Parameter(0.02 * torch.randn(D)) if args.clock == "steps" else None
        self.older = nn.Linear((self.history - 1) * P, D) if self.history > 1 else None
        self.transformer = Transformer(D, args.depth, args.heads, args.attention, args.init)
        self.decoder = nn.Linear(D, y_dim)
        if self.shows_residuals:
            self.kernel = linear_kernel if args.attention == "linear" else gaussian_kernel
            self.rate = nn.Parameter(torch.tensor(0.5))  # half a residual of a square, 2 (p - y), is all of the error
            self.log_variance = nn.Linear(D, 1)
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, math.log(0.1))

    def initial_state(self, query_x):
        return self.initial.expand(*query_x.shape[:2], -1)  # (B, Q, P)

    def predict(self, states, query_x):
        """States (T, B, Q, P) -> predictions (T, B, Q, Y)."""
        return self.decoder(states) if self.kind == "latent" else states

    def encode(self, x, y, step=0):
        """A mini-batch x (B, N, X), y (B, N, Y or 2 Y), after `step` others -> what queries read of it, whatever they are.

        The keys and values of every layer, x, and with --decoder solve what the observations want (B, N, Y + 1). Where every
        query sees all of them, that is solved for already, once (B, N, Y).
        """
        tokens = self.observation(torch.cat([x, y], -1))
        if self.shows_residuals and self.clock is not None:
            tokens = tokens + self.clock / (step + 1)  # how far a residual is to be trusted depends on what came before
        memories, h = self.transformer.encode(tokens, self.causal)
        if not self.shows_residuals:
            return memories, x, None
        wanted = torch.cat([-self.rate * y.chunk(2, -1)[1], self.log_variance(h)], -1)
        return memories, x, wanted if self.training and self.causal else self.dual(x, wanted)

    def dual(self, x, wanted):
        """What observations want of their own predictions -> weights for them, (k(x, x) + diag(variance))^-1 wanted (B, N, Y).

        wanted (B, N, Y + 1) holds changes and the log of a variance, as in `Parametric.pull_back`. With k = phi . phi,
        k(query_x, x) times these weights is what the change of the predictor's weights does to predictions there, too. Here
        k needs no finite phi.
        """
        return Solve.apply(self.kernel(x, x) + noise(wanted[..., -1]), wanted[..., :-1])

    def carry_over(self, x, wanted, query_x, visible):
        """Kernel ridge regression from observations to queries -> (B, Q, Y). Where `visible` is None, `wanted` are the weights of `dual`."""
        to_query = self.kernel(query_x, x)  # (B, Q, N)
        if visible is None:
            return to_query @ wanted
        seen = visible[:, 0]  # (B, Q, N): a system for each query (B, Q, N, N); what it does not see gets weight 0
        system = self.kernel(x, x)[:, None] * (seen[..., None] & seen[:, :, None]) + noise(wanted[..., -1])[:, None]
        return Solve.apply(system, (to_query * seen)[..., None])[..., 0] @ wanted[..., :-1]

    def update(self, past, batch, query_x, step=0):
        """r_gamma of eq. 8: the last H states (B, Q, P) and an encoded mini-batch, after `step` others -> the next states (1, B, Q, P)."""
        (memories, x, wanted), visible = batch, None
        if self.training and self.causal:  # each query sees a random prefix of its own (fig. 6)
            (B, Q, _), N = query_x.shape, x.shape[1]
            size = own(draw_size(N, (RANKS * B, Q, 1), x.device))  # drawn for the tasks of all ranks, to keep this one's
            visible = (torch.arange(N, device=x.device) < size)[:, None]  # (B, 1, Q, N)
        *older, newest = (state.softmax(-1) if self.kind == "softmax" else state for state in past)
        shown = torch.cat([query_x, self.scale * newest], -1)
        shown = F.pad(shown, (0, self.query.in_features - shown.shape[-1]))  # zeros in place of an observation's residual
        tokens = self.query(shown) + self.query_embedding  # (B, Q, D)
        if self.older is not None:
            tokens = tokens + self.older(self.scale * torch.cat(older, -1))
        if self.clock is not None:
            tokens = tokens + self.clock / (step + 1)  # the weight of a new mini-batch in an average of all
        h = self.transformer.read(tokens, memories, visible)
        new = h if self.kind == "latent" else self.decoder(h)
        if self.shows_residuals:
            new = new + self.carry_over(x, wanted, query_x, visible)
        return (past[-1] + new if self.adds else new)[None]


REGIMES = {"parametric": Parametric, "explicit": Explicit, "implicit": Implicit}


# ---------------------------------------------------------------- how a program ends


def fail(message, code=2, leave=sys.exit):
    """Ends the program with one line on stderr."""
    for bar in list(tqdm._instances):
        bar.close()  # or it would draw itself once more, below the line
    print("error:", *str(message).splitlines(), file=sys.stderr)
    leave(code)


@contextlib.contextmanager
def or_fail(message, *how):
    """Whatever goes wrong inside ends the program with this line: what is damaged shows in a dozen kinds of exceptions."""
    try:
        yield
    except Exception as problem:
        fail(f"{message} ({textwrap.shorten(str(problem) or repr(problem), 100)})", *how)


class Outlet:
    """stdout or stderr. A run outlives its reader (`| head`, or `| tee`, which the same Ctrl-C ends): what comes after that is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *given):
        try:
            return call(*given)
        except OSError as problem:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # also for what Python flushes when it exits
            if not isinstance(problem, BrokenPipeError):  # a full disk
                raise


def run(main):
    """What a script does when it is started: what its own checks could not foresee ends in one line, too."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130))
    sys.stderr = Outlet(sys.stderr or open(os.devnull, "w"))  # it may be closed, as by 2>&-
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not fit its encoding
        sys.stdout = Outlet(sys.stdout)
    try:
        main()
        print(end="", flush=True)
    except OSError as problem:  # a file that may not be read, a name that is too long, a full disk
        fail(problem)
    except (MemoryError, RuntimeError) as problem:
        if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):  # no compiler, or one that is too old
            fail(f"--compile failed: run without it ({textwrap.shorten(str(problem), 100)})")
        if isinstance(problem, RuntimeError) and not any(word in str(problem) for word in ("allocate", "overflow")):
            raise
        fail("not enough memory for this: fewer tasks, steps, observations, queries, nodes or points, or a smaller --width or --batch, need less")


# ---------------------------------------------------------------- several ranks
#
# Under torchrun every rank draws the random numbers of all tasks and keeps those of its own share: all generators stay in
# step, and N ranks make the optimizer steps that one would make. Rank 0 alone writes and evaluates.

with or_fail("RANK and WORLD_SIZE are not those of a rank: start with torchrun, or unset them"):
    RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= RANK < RANKS:
        raise ValueError(f"rank {RANK} of {RANKS}")


def join():
    """The ranks meet when rank 0 is ready to train: alone, it checks the flags and downloads the data. The others print nothing."""
    if RANK:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout = open(os.devnull, "w")
    if RANKS > 1:  # signals are agreed on between CPUs, without waiting for a GPU
        with or_fail(f"the {RANKS} ranks cannot meet: start them with torchrun, or unset WORLD_SIZE and RANK"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")


def own(x, dim=0):
    """This rank's share of what was drawn for all tasks."""
    return x.chunk(RANKS, dim)[RANK]


def share(task):
    return Task(own(task.context_x, 1), own(task.context_y, 1), own(task.query_x), own(task.query_y))


def all_reduce(x, kind="SUM"):
    if RANKS > 1:
        # os._exit, at once: an orderly exit would wait for the rank that died
        with or_fail("another rank died; the last checkpoint is kept: go on with --resume DIR", 1, os._exit):
            dist.all_reduce(x, getattr(dist.ReduceOp, kind))
    return x


def average(x):
    """The mean of x over ranks. Its gradient is that of this rank's x alone: `average_gradients` will average that, too."""
    mean = all_reduce(x.detach() / RANKS)
    return x + (mean - x).detach() if x.requires_grad else mean


def average_gradients(model):
    """In place of the gradients of this rank's tasks, those of all tasks: one message."""
    if RANKS > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(average(nn.utils.parameters_to_vector(gradients)), gradients)


# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # with the script's own defaults, where there are any
        told = action.default is None or action.nargs == 0 or "default" in action.help
        return action.help if told else f"{action.help} (default: %(default)s)"


def number(kind, low):
    """An argparse type: a finite number of at least `low`."""
    high = 2**31 if kind is int else math.inf

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be at least {low} and below {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for what argparse says of a text that is no number
    return parse


def path(text):
    """An argparse type: a path that is not empty, as one from an unset shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


count = number(int, 1)

# --method paper: those of the paper's choices that are flags and not the default of every script.
PAPER = dict(decoder="linear", update="direct", attention="softmax", clock="none", state_scale=1.0, init="torch", basis="linear", history=1)


def make_parser(script, doc, eval_steps=False):
    """The flags that all scripts share; a script adds its own and sets the defaults that are missing here."""
    parser = Parser(prog=f"{script}.py", description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("the method").add_argument
    add("--regime", choices=REGIMES, help="what persists between steps: weights, a latent, or each query's prediction")
    add("--method", choices=("ours", "paper"), default="ours", help=f"paper: what the paper does, as far as flags allow ({' '.join(spell(*choice) for choice in PAPER.items())})")
    add("--steps", type=count, help="K, refinement steps; each sees a fresh mini-batch")
    add("--signal", choices=("data", "grad", "both"), default="data", help="what tokens carry: observations, their gradients, or both")
    add("--mask", choices=("causal", "none"), default="none", help="causal: all context sizes in one pass; none: one random size a step")
    add("--history", type=count, default=1, help="H, how many of the last states (and gradients) the model sees")
    add("--decoder", choices=("solve", "span", "linear"), default="solve", help="how a state is updated: the least change that does what tokens ask of predictions (implicit: by kernel ridge regression), what the Jacobian makes of it (not implicit), or what is read off one token, as in the paper")
    add("--update", choices=("residual", "direct"), default="residual", help="the model's output is a change of the state, or the next state (for --decoder linear)")
    add("--state", choices=("logits", "softmax", "latent"), default="logits", help="what an implicit query's state is: logits, shown to it as such or as probabilities, or a vector that is decoded")
    add("--state-scale", type=number(float, 0), default=1.0, help="what an implicit query is shown of its state is times this; 0 hides it, and less than 1 is for logits")
    add("--init", choices=("torch", "random", "rotation"), default="random", help="what an implicit model starts as: PyTorch's weights; these with keys equal to queries; or that with rotations, which keep angles, for keys, queries and (not in toposort.py) the encoder of observations")
    add("--clock", choices=("none", "steps"), default="none", help="steps: tell the model how many mini-batches came before")
    add("--basis", choices=("linear", "fourier"), default="linear", help="what the explicit regime's trained basis functions of x start as")
    add("--hidden", type=count, default=64, help="how many of them (frequencies, of a cosine and a sine each); the latent has a weight for each and each number in y")
    add("--latent-tokens", type=count, default=1, help="tokens that the latent is spread over, with --decoder linear --mask none; they divide --hidden")
    add = parser.add_argument_group("the transformer").add_argument
    add("--width", type=count, default=64, help="D, numbers in a token")
    add("--depth", type=count, default=3, help="layers (toposort.py: so many over rows, then so many over nodes)")
    add("--heads", type=count, default=2, help="attention heads; they divide the width")
    add("--attention", choices=("softmax", "linear"), default="softmax", help="linear: without the softmax, for least-squares problems; with it implicit models solve with the linear kernel, else with a Gaussian one")
    add = parser.add_argument_group("training and evaluation").add_argument
    add("--context", type=count, help="N, observations in a mini-batch")
    add("--queries", type=count, help="Q, held-out observations that a task is scored on")
    add("--tasks", type=count, help="B, tasks per optimizer step")
    add("--iters", type=count, help="optimizer steps")
    add("--lr", type=number(float, 1e-12), help="peak learning rate (warm-up, then cosine)")
    add("--eval-tasks", type=number(int, 2), default=256, help="fixed tasks that the evaluation averages over")
    if eval_steps:
        add("--eval-steps", type=count, metavar="S", help="mini-batches that the evaluation goes up to (default: 2K)")
    add("--seed", type=number(int, 0), default=0, help="seeds weights and training data; evaluation tasks never change")
    add("--preset", choices=("laptop", "paper"), default="laptop", help="the scale: laptop, the defaults, or the paper's, for one GPU")
    add = parser.add_argument_group("the machine and the files").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the transformer; states and losses stay in float32")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster on a GPU")
    add("--launch", choices=("eager", "graph"), default="eager", help="graph: a GPU replays each training step as a whole, several times faster; its mini-batches then share one of at most 16 sizes")
    add("--out", type=path, help="folder for checkpoint, log, results and plots (default: out/<script>-<what differs from the defaults>)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", type=path, metavar="DIR", help="go on with the run in DIR")
    add("--eval", type=path, metavar="FILE", help="evaluate a checkpoint without training")
    add("--plot-only", type=path, metavar="DIR", help="redraw the plots of the run in DIR from its JSON")
    return parser


# Where a run takes place is no part of what it is. It may be resumed and evaluated with other flags of these ...
MACHINE = {"device", "compile", "out", "overwrite", "resume", "eval", "plot_only", "data_dir"}
# ... and of these, of its arithmetic and its evaluation, which are kept if they are not given again.
FREE = MACHINE | {"dtype", "eval_tasks", "eval_steps", "eval_nodes", "points", "solver", "ode_steps"}


def spell(flag, value):
    return f"--{flag.replace('_', '-')}={value}"


def parse_args(parser, presets, argv=None):
    """Reads the flags and checks all that can be checked before any work. Exits with code 2 and one line if it fails.

    A flag is what is given, or else what the checkpoint (or the preset, or the method) has, or else the script's default.
    args.checkpoint holds what --resume or --eval loaded, else None; args.description what the run is, for its files.
    """
    argv, script = sys.argv[1:] if argv is None else argv, parser.prog.removesuffix(".py")
    if RANK:
        if {word.partition("=")[0] for word in argv} & {"--eval", "--plot-only", "-h", "--help"}:
            sys.exit()  # nothing to train
        join()
    unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
    given = {flag: value for flag, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    if "plot_only" in given and len(given) > 1:
        fail("--plot-only DIR only redraws: give it alone")
    if "resume" in given and given.keys() & {"eval", "out", "overwrite"}:
        fail("--resume DIR goes on in DIR, with the same flags: drop --eval, --out and --overwrite")
    checkpoint, before = None, presets.get(given.get("preset"), {}) | (PAPER if given.get("method") == "paper" else {})
    if "resume" in given or "eval" in given:
        file = given.get("eval") or os.path.join(given["resume"], "checkpoint.pt")
        checkpoint = load_checkpoint(file, script)
        before = checkpoint["args"]
        parser.error = lambda message: fail(f"{file} is damaged, or of another version of {script}.py: {message}")
    words = [spell(flag, value) for flag, value in before.items() if value is not None]
    args = parser.parse_args([*words, *argv])  # of two of a kind, the later counts
    if args.plot_only:
        return args
    what = {flag: value for flag, value in vars(args).items() if flag not in MACHINE}
    if checkpoint:
        for flag, value in what.items():  # also where another version of the script wrote it, without this flag
            if flag not in FREE and value != before.get(flag):
                fail(f"{spell(flag, value)} does not fit {file}, which has {before.get(flag, 'no such flag')}")
    check(args, given)
    if "eval_steps" in what:
        args.eval_steps = args.eval_steps or 2 * args.steps
    args.device, args.dtype, args.reason = pick_device(args.device, args.dtype)
    if args.launch == "graph" and args.device.startswith("cpu") and not args.eval:
        fail("--launch graph needs a GPU; without one, start a run with --launch eager")
    name = [script, *(f"{flag}_{given[flag]}" for flag in sorted(given.keys() - MACHINE) if given[flag] != before.get(flag, parser.get_default(flag)))]
    usual = os.path.join(os.path.dirname(args.eval), "eval") if args.eval else "out/" + "-".join(name)
    args.out_given, args.out = bool(args.out), args.resume or args.out or usual
    check_out(args)
    command = shlex.join(["python", f"{script}.py", *argv])
    if args.resume:  # a run keeps its own, and what is changed for its evaluation
        command = " ".join([checkpoint["command"], *(spell(flag, given[flag]) for flag in sorted(given.keys() & (FREE - MACHINE)))])
    args.checkpoint, args.description = checkpoint, {"command": command, "script": script, "args": what}
    return args


def check(args, given):
    """Refuses what contradicts itself, with the reason."""
    only = dict(state="implicit", state_scale="implicit", init="implicit", basis="explicit", hidden="explicit")
    for flag, regime in only.items():
        if flag in given and args.regime != regime:
            fail(f"{spell(flag, given[flag])} is for --regime {regime}")
    implicit, linear = args.regime == "implicit", args.decoder == "linear"
    slots = args.regime == "explicit" and linear and args.mask == "none"
    refusals = (
        (args.width % args.heads, f"--width {args.width} is not divisible by --heads {args.heads}"),
        (args.launch == "graph" and RANKS > 1, "--launch graph is for one process: start it without torchrun, or with --launch eager"),
        (args.tasks % RANKS and not args.eval, f"--tasks {args.tasks} is not divisible by the {RANKS} ranks that share them"),
        (args.hidden % args.latent_tokens, f"--hidden {args.hidden} is not divisible by --latent-tokens {args.latent_tokens}"),
        (args.latent_tokens > 1 and not slots, "--latent-tokens above 1 needs --regime explicit --decoder linear --mask none"),
        (implicit and args.signal != "data", f"--signal {args.signal}: --regime implicit has no parameters to take gradients of (use --signal data)"),
        (implicit and args.decoder not in ("solve", "linear"), f"--decoder {args.decoder} is for --regime parametric and explicit"),
        (args.update == "direct" and not linear, "--update direct needs --decoder linear: what tokens ask for is a change"),
        (implicit and args.state == "latent" and not linear, "--state latent needs --decoder linear: what tokens ask for is a change of a prediction"),
    )
    for wrong, reason in refusals:
        if wrong:
            fail(reason)


CPUINFO = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""  # what Linux says of the processor


def pick_device(device, dtype):
    """-> device, dtype (as text) and the reason for the dtype."""
    if device.startswith("cuda:") and RANKS > 1:
        fail(f"--device {device}: each of the {RANKS} ranks takes a GPU of its own (use --device cuda)")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and RANKS > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"
    with or_fail(f"--device {device} is not there, or has no float64, which evaluations need"):
        kind = torch.zeros(1, device=device).double().device.type
        if kind not in ("cpu", "cuda"):
            raise ValueError("use cpu or cuda")
    if dtype != "auto":
        return device, dtype, "as asked"
    # torch.cuda.is_bf16_supported() is true on chips that only emulate bfloat16: ask for the hardware generation.
    # Where a CPU has it, steps took 0.5 to 0.95 times as long as in float32.
    on_cpu = "avx512_bf16" in CPUINFO or "amx_bf16" in CPUINFO
    native = torch.cuda.get_device_capability(device) >= (8, 0) if kind == "cuda" else on_cpu
    return device, "bfloat16" if native else "float32", "native on this chip" if native else "this chip has no bfloat16 of its own"


RUN_FILES = ("checkpoint.pt", "log.jsonl", "results.json", "points_*.npz", "error.png", "excess.png", "orders.png", "grid_*.png", "refinement_*.gif")


def check_out(args):
    """Refuses a folder that cannot be written or that holds another run; makes nothing yet."""
    held = [pattern for pattern in RUN_FILES if glob.glob(pattern, root_dir=args.out)]
    if args.eval and {"checkpoint.pt", "log.jsonl"} & {*held}:
        fail(f"--out {args.out} holds this or another run, whose files an evaluation would replace: give another folder")
    if held and not (args.resume or args.overwrite or RANK):
        resume = "" if args.eval else " --resume goes on with it,"
        fail(f"{args.out} already holds a run: --overwrite replaces it,{resume} another --out leaves it alone")
    out = Path(args.out).absolute()
    existing = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fail(f"cannot write to --out {args.out}: {existing} is not a folder that may be written")


# ---------------------------------------------------------------- files, seeds, the training journal


WEIGHTS, TRAINING, EVALUATION = 1, 2, 3  # streams of random numbers, kept apart


def seed_all(stream, seed, index=0):
    """Seeds every draw that follows. Training data are a function of (seed, iteration), so resuming replays them."""
    torch.manual_seed(int(np.random.SeedSequence((stream, seed, index)).generate_state(1, np.uint64)[0]) >> 1)


def replace_file(path, write):
    """Calls write(binary file) and moves the file into place: a kill or a full disk leaves the old file or the new one."""
    try:
        with or_fail(f"cannot write {path}; what was there before is kept"):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path + ".tmp", "wb") as f:
                write(f)
            os.replace(path + ".tmp", path)
    finally:  # a signal may have come, too
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")


def write_json(path, content):
    replace_file(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def read_log(out, last=math.inf):
    """Its rows up to iteration `last`."""
    path = os.path.join(out, "log.jsonl")
    if not os.path.exists(path):  # stopped before the first row
        return []
    with or_fail(f"{path} is damaged"), open(path) as f:
        rows = [{key: row[key] for key in ("iteration", "loss", "metric", "lr", "seconds")} for row in map(json.loads, f)]
        return [row for row in rows if row["iteration"] <= last]


def load_checkpoint(path, script):
    """A dict of tensors and primitives, of any script if that is None; loading runs no code of the file."""
    kinds = dict(script=str, command=str, args=dict, iteration=int, train_seconds=float, cpu_seconds=float, model=dict, optimizer=dict, pending=list)
    with or_fail(f"{path} is missing, damaged or no checkpoint of this project"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := [key for key, kind in kinds.items() if not isinstance(checkpoint[key], kind)]:
            raise ValueError(f"{wrong[0]} is not what it should be")
        args, rows = checkpoint["args"], checkpoint["pending"]
        if checkpoint["iteration"] < 1 or not all(isinstance(flag, str) for flag in args) or any(len(row) != args["steps"] + 1 for row in rows):
            raise ValueError("its numbers contradict each other")
    if script and checkpoint["script"] != script:
        fail(f"{path} is a checkpoint of {checkpoint['script']}.py, not of {script}.py")
    return checkpoint


def place(model, args):
    """The model on its device and in its dtype, with the checkpoint's weights if there are any. Prints device, dtype and where the run writes to."""
    if args.checkpoint:
        with or_fail("the checkpoint's weights do not fit the model that its flags describe"):
            model.load_state_dict(args.checkpoint["model"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every size of a context, and training draws them
    model.to(args.device).transformer.dtype = getattr(torch, args.dtype)
    if args.compile:
        compile_blocks(model.transformer)
    print(f"device {args.device}, dtype {args.dtype} ({args.reason}), {torch.get_num_threads()} threads; writes to {args.out}")
    return model


def compile_blocks(transformer):
    """For contexts of any size. By default torch.compile gives up after eight versions: with and without gradients, a memory, a mask ..."""
    torch._dynamo.config.cache_size_limit = 64
    for block in transformer.blocks:
        block.compile(dynamic=True)


def make_optimizer(model, args):
    """AdamW. The explicit regime's predictor learns at 3% of the rate: the transformer that updates its weights has to keep up with it."""
    shares = {1.0: [], 0.03: []}  # which parameters learn at this share of the rate
    for name, p in model.named_parameters():
        shares[0.03 if name.startswith("basis.") else 1.0].append(p)
    groups = [{"params": params, "share": share} for share, params in shares.items() if params]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def replayed(step, model, args):
    """--launch graph: `step` as a CUDA graph, which a GPU replays without waiting for Python to launch thousands of small kernels.

    step() draws tasks, leaves gradients in the parameters and returns tensors. A graph's shapes are fixed, so all mini-batches of
    a training step get one size. There are at most 16 sizes, and a graph for each, made when it is drawn first.
    """
    if args.launch == "eager":
        return step
    graphs, pool = {}, torch.cuda.graph_pool_handle()  # one pool for all: they never run at the same time
    side = torch.cuda.Stream(args.device)  # and one stream to set them up: each keeps workspaces

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(args.device), torch.random.fork_rng([args.device]):  # the replay draws what this would have drawn
            torch.cuda.synchronize(args.device)
            with torch.cuda.stream(side):
                step()  # sets up what cannot be captured
            model.zero_grad()
            with torch.cuda.graph(graph, pool):
                result = step()
        return graph, result, [p.grad for p in model.parameters()]

    def replay():
        model.size = args.context if model.causal else rounded_size(args.context)
        if model.size not in graphs:
            with or_fail("--launch graph: this step cannot be captured (use --launch eager)"):
                graphs[model.size] = capture()
        graph, result, gradients = graphs[model.size]
        graph.replay()
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = gradient
        return result

    return replay


def rounded_size(N):
    """`draw_size` for all mini-batches of a training step, rounded up to one of at most 16 sizes."""
    unit = -(-N // 16)
    return min(N, -(-int(draw_size(N, ())) // unit) * unit)


def set_learning_rate(optimizer, iteration, args):
    """Linear warm-up over 5% of the run, then a cosine to zero."""
    done, warm = (iteration + 1) / args.iters, 0.05
    scale = done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * scale * group["share"]


class Journal:
    """Iterates over a run's optimizer steps: progress bar, log.jsonl, checkpoint.pt, signals. Knows nothing of training.

    Ctrl-C ends training early, and what there is gets evaluated; SIGTERM (a cluster wants its machine back) saves and leaves.

    for iteration in journal:
        ...
        journal.log(losses, metric)
    """

    every, save_seconds = 50, 60  # iterations between rows of the log, seconds between checkpoints

    def __init__(self, model, optimizer, args):
        self.model, self.optimizer, self.args = model, optimizer, args
        self.path = os.path.join(args.out, "checkpoint.pt")
        self.iteration, self.seconds, self.stop = 0, 0.0, 0  # stop: the signal that came, if any
        self.rows, self.pending = [], []  # of the log; what the next of them will average
        if args.checkpoint:
            with or_fail(f"{self.path} is damaged: its optimizer state does not fit"):
                optimizer.load_state_dict(args.checkpoint["optimizer"])
                self.iteration, self.seconds = args.checkpoint["iteration"], args.checkpoint["train_seconds"]
                self.pending = [row.to(args.device) for row in args.checkpoint["pending"]]
            self.rows = read_log(args.out, self.iteration)  # what came after it will be replayed
        elif not RANK:
            with or_fail(f"cannot write to --out {args.out}"):
                os.makedirs(args.out, exist_ok=True)

    def __iter__(self):
        self.handlers = {signum: signal.signal(signum, self.interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
        if not RANK:
            join()
        all_reduce(torch.zeros(1))  # the others have loaded their data, too, before the clock starts
        start, saved = time.time() - self.seconds, time.time()
        self.bar = tqdm(total=self.args.iters, initial=self.iteration, unit="it", dynamic_ncols=True, disable=RANK > 0)
        try:
            # A signal to one rank stops all of them after the same iteration.
            while not (stop := all_reduce(torch.tensor(self.stop), "MAX")) and self.iteration < self.args.iters:
                yield self.iteration
                self.iteration += 1
                due = self.iteration % self.every == 0 or self.iteration == self.args.iters
                if due:
                    self.check_finite()  # waits for a GPU, whose work the clock has to count
                self.seconds = time.time() - start
                self.bar.update()
                if self.iteration == 1:  # not before: what cannot run at all leaves the run alone that --overwrite replaces
                    self.save()
                    for folder in (self.args.out, os.path.join(self.args.out, "eval")) if self.args.overwrite and not RANK else ():
                        for name in (name for pattern in RUN_FILES[1:] for name in glob.glob(pattern, root_dir=folder)):
                            os.unlink(os.path.join(folder, name))
                if due:
                    self.flush()
                if time.time() - saved > self.save_seconds:
                    self.save()
                    saved = time.time()
            if self.iteration:
                self.save()
        finally:  # whatever goes wrong in the body of the loop
            self.bar.close()
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)
        if RANKS > 1:
            dist.destroy_process_group()  # with `stop` alive: torch 2.6 hangs now and then if the last message is for gloo to free
        stop = max(int(stop), self.stop)  # one may have come during the last save; SIGTERM is the larger
        if not self.iteration:
            fail("stopped before the first iteration: nothing was saved", 128 + stop)
        how = f"stopped after {self.iteration} of {self.args.iters} iterations; go on with" if stop else "trained; evaluated now, or later by"
        print(f"{how} --resume {shlex.quote(self.args.out)}")
        if stop == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        if RANK:  # evaluation is for rank 0
            os._exit(0)  # at once: with an orderly exit gloo's threads now and then ended in an abort

    def interrupt(self, signum, _):
        self.stop = signum
        signal.signal(signal.SIGINT, self.handlers[signal.SIGINT])  # a second Ctrl-C does not wait for the end of the iteration

    def log(self, losses, metric):
        """losses: one tensor per refinement step, as many in every iteration; metric: a tensor. Fetched from the device only now and then."""
        self.pending.append(average(torch.stack([*losses, metric])))

    def check_finite(self):
        """Ends the run before a bad loss or a bad weight can replace the last good checkpoint."""
        finite = [bool(row.isfinite().all()) for row in self.pending]
        finite.append(all(p.isfinite().all() for p in self.model.parameters()))  # which spoil the iteration to come
        if not all(finite):
            bad = self.iteration - len(self.pending) + 1 + finite.index(False)
            kept = f"; {self.path} holds the last good state" if self.iteration > 1 else ""
            fail(f"loss or weights are not finite at iteration {bad}{kept} (a lower --lr may help)")

    def flush(self):
        *losses, metric = torch.stack(self.pending).mean(0).tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        self.rows.append({"iteration": self.iteration, "loss": losses, "metric": metric, "lr": lr, "seconds": round(self.seconds, 2)})
        self.pending = []
        self.bar.set_postfix_str(f"loss {losses[-1]:.4f} metric {metric:.3g}")
        if not RANK:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            replace_file(os.path.join(self.args.out, "log.jsonl"), lambda f: f.write(text.encode()))

    def save(self):
        self.check_finite()
        content = {
            **self.args.description, "iteration": self.iteration, "train_seconds": self.seconds, "cpu_seconds": cpu_seconds(self.args),
            "trained_on": trained_on(self.args, self.iteration),
            "pending": self.pending, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        if not RANK:
            replace_file(self.path, lambda f: torch.save(content, f))


def trained(args):
    """Iterations and seconds of training behind the checkpoint of --eval."""
    return args.checkpoint["iteration"], args.checkpoint["train_seconds"]


def cpu_seconds(args):
    """Processor time of this process and of those behind its checkpoint, if there is one."""
    return time.process_time() + (args.checkpoint["cpu_seconds"] if args.checkpoint else 0.0)


# ---------------------------------------------------------------- evaluation, results, plot


def evaluation_tasks(sample, total, stream=0, chunk=32):
    """Yields `total` tasks in chunks drawn by sample(B); on one kind of device they depend on `stream` alone, not on --seed or --tasks."""
    for index, first in enumerate(range(0, total, chunk)):
        seed_all(EVALUATION, stream, index)
        task = sample(chunk)
        left = total - first
        yield Task(task.context_x[:, :left], task.context_y[:, :left], task.query_x[:left], task.query_y[:left])


@torch.no_grad()
def evaluate(model, task, metric):
    """metric(prediction, y) -> (B, Q) after 0, 1, ..., K mini-batches, averaged over queries -> (B, K + 1)."""
    model.eval()
    initial = model.predict(model.initial_state(task.query_x)[None], task.query_x)
    return torch.stack([metric(p[-1], task.query_y).mean(1) for p in (initial, *refine(model, task))], 1)


def seen(task, k):
    """The observations of the first k mini-batches: x (B, k N, X), y (B, k N, Y)."""
    return tuple(c[:k].transpose(0, 1).flatten(1, 2) for c in (task.context_x, task.context_y))


def summary(chunks, steps=None, **extra):
    """Chunks of (tasks, steps) values -> mean and standard error over tasks, ready for results.json."""
    values = torch.cat(chunks).double().cpu()
    steps = list(range(values.shape[1])) if steps is None else steps
    stderr = values.std(0) / len(values) ** 0.5
    return extra | {"steps": steps, "mean": values.mean(0).tolist(), "stderr": stderr.tolist(), "tasks": len(values)}


def surroundings(args):
    """For results.json: numbers without a machine cannot be compared."""
    where = {"device": args.device, "machine": machine(args.device), "dtype": args.dtype}
    return where | {"ranks": RANKS, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def trained_on(args, iteration):
    """The surroundings in which this iteration was made: these, or those of the checkpoint (None: it is from before they were kept)."""
    before = args.checkpoint
    return before.get("trained_on") if before and before["iteration"] == iteration else surroundings(args)


def machine(device):
    """The name of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in CPUINFO.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(args, model, data, iterations, seconds, metrics, baselines):
    """Writes results.json and prints a line for each split and step."""
    results = args.description | {
        "data": data, **surroundings(args), "trained_on": trained_on(args, iterations), "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()), "iterations": iterations,
        "train_seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds(args), 1),  # the latter evaluation included
        "metrics": metrics, "baselines": baselines,
    }  # fmt: skip
    write_json(os.path.join(args.out, "results.json"), results)
    for split, m in metrics.items():
        for step, mean, stderr in zip(m["steps"], m["mean"], m["stderr"]):
            beside = ", ".join(f"{name} {b['mean'][b['steps'].index(step)]:.3f}" for name, b in baselines[split].items() if step in b["steps"])
            note = " (past training)" if step > args.steps else ""
            print(f"{split} {m['data']} step {step}: {m['name']} {mean:.3f} +- {stderr:.3f}{note}" + (f" | {beside}" if beside else ""))


def read_results(out, script):
    path = os.path.join(out, "results.json")
    with or_fail(f"{path} is missing, damaged or not of {script}.py"), open(path) as f:
        results = json.load(f)
        if results["script"] != script or not results.keys() >= {"args", "metrics", "baselines"}:
            raise ValueError(f"a run of {results['script']}.py")
    return results


# The first seven are told apart by the colour-blind, too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#999999")


def log_axis(ax, which):
    """Makes an axis ("x" or "y") of what is drawn so far logarithmic, with ticks in plain numbers: the fewer, the more decades it spans."""
    ax.set(**{f"{which}scale": "log"})
    low, high = getattr(ax, f"get_{which}lim")()
    subs = range(1, 10) if high < 5 * low else (1, 2, 3, 5) if high < 50 * low else (1, 2, 5) if high < 500 * low else (1,)
    locator = LogLocator(subs=subs) if high > 3 * low else MaxNLocator(6)
    getattr(ax, f"{which}axis").set(major_locator=locator, major_formatter="{x:g}", minor_formatter=NullFormatter())


def save_figure(fig, path, dpi=160):
    replace_file(path, lambda f: fig.savefig(f, dpi=dpi, format="png"))


drawing = or_fail("nothing is drawn: results.json or log.jsonl is damaged, or they are of different runs")


@drawing
def plot_steps(out, results, log_scale=False):
    """error.png: the metric against the step, with baselines, one panel a split; and the training loss of each step.

    A split is in distribution, out of it, or a family of tasks that its data name describes.
    """
    args, metrics, log = results["args"], results["metrics"], read_log(out, results["iterations"])  # more, if it was resumed and not evaluated
    K, panels = args["steps"], len(metrics) + bool(log)
    columns = 3 if panels > 5 else panels
    rows = -(-panels // columns)
    fig = Figure(figsize=(3.5 * columns, 3.2 * rows + 0.8), layout="constrained")
    legend = {}  # one for all panels: label -> what it stands for
    for panel, (split, m) in enumerate(metrics.items(), 1):
        ax = fig.add_subplot(rows, columns, panel)
        first = int(log_scale)  # what is said before any data, and baselines that stay far behind, would take half of the axis
        ax.errorbar(*(m[key][first:] for key in ("steps", "mean", "stderr")), fmt="o-", color=COLORS[0], lw=2, ms=5, capsize=3, label="this model", zorder=3)
        for i, (name, b) in enumerate(results["baselines"][split].items(), 1):
            style = dict(ls=("--", ":", "-.", (0, (5, 1)))[i % 4], marker="." if len(b["steps"]) > 1 else "D", color=COLORS[i % len(COLORS)])
            if log_scale and min(b["mean"]) > 1.5 * m["mean"][1]:
                ax.plot([], [], label=f"{name} (off the scale)", **style)
            else:
                ax.plot(b["steps"], b["mean"], label=name, **style)
        ax.axvline(K, color="0.7", lw=1, zorder=0, label="trained up to here")
        where = "in distribution: " if split == "id" else "out of distribution: " if split.startswith("ood") else ""
        ax.set_title(textwrap.fill(where + m["data"], 42), fontsize=10)
        ax.set(xlabel="mini-batches seen", ylabel=m["name"])
        if log_scale and max(m["mean"][first:]) > 0:
            log_axis(ax, "y")
        ax.locator_params("x", integer=True)
        ax.grid(alpha=0.3)
        legend |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    fig.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=1 + columns, fontsize=9)
    if log:
        ax = fig.add_subplot(rows, columns, panels)
        for k in range(K):
            color = colormaps["viridis"](k / max(K, 2))
            label = f"step {k + 1}" if K <= 10 or k in (0, K // 2, K - 1) else None
            ax.plot([row["iteration"] for row in log], [row["loss"][k] for row in log], "." * (len(log) == 1) + "-", color=color, lw=1, label=label)
        ax.set_title("training loss of each step", fontsize=10)
        ax.set(xlabel="iteration", ylabel="loss")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, ncols=2 if K > 5 else 1)
    kind = args["regime"] + (f", signal {args['signal']}" if args["regime"] != "implicit" else "") + f", decoder {args['decoder']}"
    kind += ", with a clock" if args.get("clock") == "steps" else ""
    title = f"{results['script']}.py trained on {results['data']}: {kind}, {results['iterations']} iterations, seed {results['seed']}"
    fig.suptitle(textwrap.fill(title, 40 * columns), fontsize=11)
    save_figure(fig, os.path.join(out, "error.png"))
