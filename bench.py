"""Time and memory of a training step, and of the same step with PyTorch's own encoder, in turns in this process.

    python bench.py                                                 # four scripts, all their regimes: eight minutes
    python bench.py --scripts mnist --regimes implicit --width 256  # flags that are not its own go to the scripts
    python bench.py --preset paper --launch graph                   # the paper's sizes, on a GPU

A turn runs the script's own `train` for about half a second, on the same tasks as the other turns; all of it but the journal
is measured. Mnist has drawn glyphs and imagenet synthetic features, so that no files are needed. Linreg has softmax attention:
PyTorch's encoder has no other. All mini-batches are seen whole, the most that a step may draw in training with --mask none, and
implicit models have --decoder linear: so every step is the same work. With --decoder solve, their default elsewhere, a step's
work grows with the mini-batches to come. The columns:

    ms          one training step: sampling, K refinement steps forward and backward, clipping, AdamW; median of the turns
    sampling    the part of it that draws the tasks, measured alone
    tasks/s     tasks of a step / ms
    GFLOP/s     all matrix products of a step / ms: 2 m k n for each, attention as if it had no mask, and nothing else
    % peak      GFLOP/s in % of the best of all turns of a square product in the same dtype, 2,048 wide on a CPU, 8,192 on a GPU
    % width     GFLOP/s in % of the best of (observations of a refinement step, D) @ (D, 2 D), the MLP's shape, in the same dtype
    MB          peak of the tensors in a step: weights, gradients, AdamW's, tasks, activations; neither data set nor libraries (of an eager step)
    x stock     ms with nn.TransformerEncoder (context and queries as one sequence, under one joint boolean mask) / ms, turn by turn;
                the median: how many times faster this code is
    x limit     x stock if attention, norms and GELU took no time here: linear layers, sampling, the regime and AdamW would be left
    x FLOP      products of stock / ours, for the same answers: this much of `x stock` is work that is not done
    x MB        MB of stock / ours
    x sum       ms / the sum of a step's parts, each measured alone: linear layers, attention, norms, GELU, what the regime does
                around them, sampling, AdamW; the rest is Python and small operations, and what shares the machine
    K^          slope of log ms against log K for K = 1 ... 10: 1 is linear
    MB 10/1     MB with K = 10 over MB with K = 1

With --launch graph this code's steps are replayed (with --compile, its blocks compiled), but not those of PyTorch's encoder, nor
the parts: `x limit` and `x sum` then compare unlike things, and `x stock` tells what both give together.
"""

import contextlib
import copy
import os
import sys
from argparse import Namespace
from functools import partial
from statistics import median
from unittest import mock

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))  # where reports.py is

import common  # before torch: it answers --help by itself
import reports

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# The scripts, with the flags by which they need no files and have the attention of the yardstick; and those of implicit models.
SCRIPTS = {"linreg": ["--attention=softmax"], "mnist": ["--dataset=glyphs"], "imagenet": ["--features=synthetic"], "mog_flow": []}
IMPLICIT = ["--decoder=linear"]
TURN, MOST = 0.5, 20  # a turn is this many seconds of steps, but at most so many steps
KS = range(1, 11)


# ---------------------------------------------------------------- flags


def get_args(argv=None):
    parser = reports.make_parser("bench.py", __doc__)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="default: all")
    parser.add_argument("--regimes", nargs="+", choices=common.REGIMES, default=list(common.REGIMES), help="default: all that a script has")
    parser.add_argument("--repeats", type=common.count, default=5, help="turns")
    return reports.parse_args(parser, argv, fixed=["--eval-tasks", "--eval-steps"])


def get_jobs(args):
    """-> (script, the script's own args), all of them checked before any work."""
    pairs = [(script, regime) for script in args.scripts for regime in args.regimes if script != "mog_flow" or regime == "implicit"]
    if not pairs:
        common.fail(f"--regimes {' '.join(args.regimes)}: {' and '.join(args.scripts)} can only do implicit")
    jobs = [(script, reports.read_flags(script, *SCRIPTS[script], *(IMPLICIT if regime == "implicit" else ()), *args.more, f"--regime={regime}")) for script, regime in pairs]
    if any(job.attention != "softmax" for _, job in jobs):
        common.fail("PyTorch's encoder has softmax attention: drop --attention")
    return jobs


# ---------------------------------------------------------------- the yardstick


class Stock(common.Transformer):
    """The same function as `common.Transformer`, on weights of its own, by stock nn.TransformerEncoder; in its place in a model."""

    def __init__(self, width, depth, heads):
        super().__init__(width, 0, heads)  # no blocks of ours, just the last norm and the dtype
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.heads, self.encoder = heads, nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x, causal, hidden=None):
        if causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)  # True: may not look
        with self.autocast(x):
            return self.norm(self.encoder(x, hidden, is_causal=causal).float())  # told so, PyTorch takes its causal kernel

    def encode(self, x, causal):
        return (x, causal), x  # all is done in `read`; for --decoder solve, the variances come from what is at hand: the cost is the same

    def read(self, x, memories, visible=None):
        (context, causal), Q = memories, x.shape[1]
        N = context.shape[1]
        hidden = torch.ones(N + Q, N + Q, dtype=torch.bool, device=x.device)
        hidden[:, :N] = False  # all see the context, and nobody a query
        if causal:
            hidden[:N, :N] = torch.ones_like(hidden[:N, :N]).triu(1)
        if visible is not None:  # each query of each task sees a part of its own
            hidden = hidden.repeat(len(x), 1, 1)
            hidden[:, N:, :N] = ~visible[:, 0]
            hidden = hidden.repeat_interleave(self.heads, 0)
        return self(torch.cat([context, x], 1), False, hidden)[:, N:]


# ---------------------------------------------------------------- measuring


class Clock(common.Journal):
    """In place of a script's journal: writes nothing and times args.iters steps, after one in which AdamW makes its state."""

    def __init__(self, model, optimizer, args):
        self.args, self.pending = args, []

    def __iter__(self):
        yield 0
        start = reports.now(self.args.device)
        for self.iteration in range(self.args.iters):
            yield self.iteration
        self.seconds = (reports.now(self.args.device) - start) / self.args.iters  # `train` returns it


def milliseconds(call, times, device):
    start = reports.now(device)
    for _ in range(times):
        call()
    return 1000 * (reports.now(device) - start) / times


def product_speed(args, m, k, n):
    """GFLOP/s of (m, k) @ (k, n) in the dtype in use: the best of three times some 20 ms."""
    a, b = (torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for shape in ((m, k), (k, n)))
    product = lambda: a @ b
    product()
    times = 1 + int(20 / milliseconds(product, 1, args.device))
    return 2e-6 * m * k * n / min(milliseconds(product, times, args.device) for _ in range(3))


def whole_batches():
    """A context in which training draws no sizes."""
    return mock.patch.object(common, "draw_size", lambda N, shape, device="cpu": torch.full(shape, N, device=device))


class FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which do not allow the gradients that a model takes inside."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation._overloadpacket in flop_registry:
            self.total += flop_registry[operation._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flop(call):
    """FLOP of the matrix products of a call; attention as plain products, so that every kernel counts the same."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        call()
    return counter.total


def peak_memory(steps, model, device):
    """Peak MB of the tensors in a training step: `steps` takes some; the weights are there before and are added."""
    return (reports.peak_bytes(steps, device) + sum(p.numel() * p.element_size() for p in model.parameters())) / 1e6


def record_parts(steps, model, device):
    """-> {part: its calls in `steps`, each a function, its inputs, and whether gradients and autocast were on}."""
    parts, inside = {}, []

    def recorder(part, call):
        def recorded(*given):
            if inside:  # of a part already
                return call(*given)
            inputs = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in given]
            parts.setdefault(part, []).append((call, inputs, torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)))
            inside.append(part)
            out = call(*given)
            inside.pop()
            return out

        return recorded

    kinds = {nn.Linear: "linear layers", nn.LayerNorm: "norms", nn.GELU: "GELU"}
    places = [(kinds[type(module)], module, "forward") for module in model.modules() if type(module) in kinds]
    places += [("attention", block, "attend") for block in model.transformer.blocks]
    places += [("the regime", model, name) for name in ("predict", "apply_to", "gradients", "pull_back", "dual", "carry_over") if hasattr(model, name)]
    places.append(("the regime", common, "residuals"))
    with contextlib.ExitStack() as patches:
        for part, owner, name in places:
            patches.enter_context(mock.patch.object(owner, name, recorder(part, getattr(owner, name))))
        steps()
    return parts


def measure_parts(two_steps, model, sample, args):
    """-> {part: milliseconds of a step}, each alone: its calls in two steps once more, forward and backward."""
    device, alone = torch.device(args.device), lambda call: median(milliseconds(call, 1, args.device) for _ in range(5))

    def replay(calls):
        for call, inputs, gradients, autocast in calls:
            with torch.set_grad_enabled(gradients), torch.autocast(device.type, model.transformer.dtype, enabled=autocast):
                out = call(*inputs)
            if out.requires_grad:
                torch.autograd.backward(out, torch.ones_like(out))

    found = {part: alone(lambda: replay(calls)) / 2 for part, calls in record_parts(two_steps, model, device).items()}
    return found | {"AdamW": alone(common.make_optimizer(model, args).step), "sampling": alone(lambda: sample(args.tasks, args.steps))}


def measure(script, args, repeats):
    """-> what is written about one script and regime; "table" is its row of the table."""
    name, ours, train, sample = reports.load(script, args)
    stock = copy.deepcopy(ours)
    stock.transformer = Stock(args.width, args.depth, args.heads).to(args.device)
    stock.transformer.dtype = ours.transformer.dtype

    def run(model, iters=1, K=args.steps, launch="eager"):
        """Milliseconds of a step; one more than `iters` are taken."""
        return 1000 * train(model, Namespace(**vars(args) | {"steps": K, "iters": iters, "launch": launch}))[1]

    launched = partial(run, ours, launch=args.launch)
    iters = min(MOST, max(2, round(1000 * TURN / launched())))
    side = 8192 if "cuda" in args.device else 2048
    turns = {key: [] for key in ("ms", "stock", "peak", "width", "by K")}
    for _ in range(repeats):
        turns["ms"].append(launched(iters))
        turns["stock"].append(run(stock, iters))
        turns["peak"].append(product_speed(args, side, side, side))
        turns["width"].append(product_speed(args, args.tasks * args.context, args.width, 2 * args.width))
        turns["by K"].append([launched(max(1, round(iters * args.steps / k / 3)), k) for k in KS])
    flop, stock_flop = (count_flop(lambda: run(model)) / 2 for model in (ours, stock))
    mb, stock_mb = (peak_memory(lambda: run(model), model, args.device) for model in (ours, stock))  # a graph's memory is hidden from the allocator's counts
    parts = measure_parts(lambda: run(ours), ours, sample, args)
    k_ms = [median(times) for times in zip(*turns["by K"])]
    k_mb = [peak_memory(lambda: run(ours, 1, k), ours, args.device) for k in KS]
    ms = median(turns["ms"])
    speed, stock_ms = 1e-6 * flop / ms, median(turns["stock"])
    left = sum(parts[part] for part in ("linear layers", "sampling", "the regime", "AdamW"))
    table = {
        "ms": ms, "sampling": parts["sampling"], "tasks/s": 1000 * args.tasks / ms, "GFLOP/s": speed,
        "% peak": 100 * speed / max(turns["peak"]), "% width": 100 * speed / max(turns["width"]), "MB": mb,
        "x stock": median(theirs / mine for mine, theirs in zip(turns["ms"], turns["stock"])), "x limit": stock_ms / left,
        "x FLOP": stock_flop / flop, "x MB": stock_mb / mb,
        "x sum": ms / sum(parts.values()), "K^": reports.exponent(KS, k_ms), "MB 10/1": k_mb[-1] / k_mb[0],
    }  # fmt: skip
    return {
        "script": script, "regime": args.regime, "data": name, "args": args.description["args"], "table": table, "flop_per_step": flop,
        "parts_ms": parts, "iterations_per_turn": iters, "turns": turns, "by_k": {"steps": list(KS), "ms": k_ms, "MB": k_mb},
    }  # fmt: skip


# ---------------------------------------------------------------- main


def main(argv=None):
    wanted = get_args(argv)
    jobs = get_jobs(wanted)
    report = reports.header(wanted, jobs[0][1]) | {"rows": []}
    print(", ".join(f"{key} {report[key]}" for key in report if key not in ("command", "rows")) + " (columns: bench.py --help)")
    with mock.patch.object(common, "Journal", Clock), whole_batches():
        for script, args in jobs:
            row = measure(script, args, wanted.repeats)
            if not report["rows"]:
                print(reports.line("", "", row["table"]))
            print(reports.line(script, args.regime, row["table"].values()), flush=True)
            report["rows"].append(row)
            common.write_json(wanted.out, report)
    print(f"data {', '.join(dict.fromkeys(row['data'] for row in report['rows']))}; in full: {wanted.out}")


if __name__ == "__main__":
    common.run(main)
