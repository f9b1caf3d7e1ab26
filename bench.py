"""Time and memory of a training step, and of the same step with PyTorch's own encoder, in turns in this process.

    python bench.py                                                 # every script and regime: five minutes
    python bench.py --scripts mnist --regimes implicit --width 256  # flags that are not its own go to the scripts
    python bench.py --preset paper --device cuda --dtype bfloat16   # the paper's sizes, on a GPU
    python bench.py --cost out/linreg/checkpoint.pt                 # instead: K steps beside one step on all data, by a trained model

A turn runs the script's own `train` for about half a second, on the same tasks as the other turns; all of it but the journal
is measured. Mnist has drawn glyphs and imagenet synthetic features, so that no files are needed. The columns:

    ms          one training step: sampling, K refinement steps forward and backward, clipping, AdamW; median of the turns
    sampling    the part of it that draws the tasks, measured alone
    tasks/s     tasks of a step / ms
    GFLOP/s     all matrix products of a step / ms: 2 m k n for each, attention as if it had no mask, and nothing else
    % peak      GFLOP/s, of the best of all turns of a square product in the same dtype, 2,048 wide on a CPU, 8,192 on a GPU
    % width     GFLOP/s, of the best of (tokens of a refinement step, D) @ (D, 2 D), the MLP's shape, in the same dtype
    MB          peak of the tensors in a step: weights, gradients, AdamW's, tasks, activations; neither data set nor libraries
    stock       ms with nn.TransformerEncoder: context and queries as one sequence, under one joint boolean mask
    x stock     stock / ms, turn by turn; the median: how many times faster this code is
    x FLOP      products of stock / ours, for the same answers: this much of `x stock` is work that is not done
    x MB        MB of stock / ours
    x sum       ms on whole mini-batches / the sum of a step's parts, each measured alone: linear layers, attention, norms, GELU, what the
                regime does around them, sampling, AdamW; the rest is Python and small operations, and what shares the machine
    K^          slope of log ms against log K for K = 1 ... 10: 1 is linear
    MB 10/1     MB with K = 10 over MB with K = 1

With --mask none a training step draws how much of a mini-batch it sees; ms and GFLOP/s average over such draws (both sides
have the same ones). Everything about memory and K is with whole mini-batches, the most that a step can draw.
"""

import contextlib
import copy
import datetime
import functools
import importlib
import io
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import deque, namedtuple
from statistics import median
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler chats on stderr

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import common
import toposort

ALL = tuple(common.REGIMES)
SCRIPTS = {"linreg": ALL, "mnist": ALL, "imagenet": ALL, "mog_flow": ("implicit",)}  # and their regimes
FIXED = {"mnist": ["--dataset=glyphs"], "imagenet": ["--features=synthetic"], "linreg": ["--attention=softmax"]}  # no files; what the yardstick has
TURN, MOST = 0.5, 20  # a turn is this many seconds of steps, but at most so many steps
KS = range(1, 11)
NOWHERE = os.path.join(tempfile.gettempdir(), "bench-writes-nothing-here")


def get_args(argv=None):
    parser = common.Parser(prog="bench.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="default: all")
    add("--regimes", nargs="+", choices=ALL, default=ALL, help="default: all that a script has")
    add("--repeats", type=common.count, default=5, help="turns")
    add("--out", type=common.path, help="the JSON file: the table, every turn, sizes and machine (default: out/bench.json or out/cost.json)")
    add("--sampler", action="store_true", help="instead: toposort's sampler beside a plain numpy loop")
    add("--cost", type=common.path, metavar="FILE", help="instead: time, memory and error of K steps beside one step on all their data, by a checkpoint of linreg or mnist; a plot beside --out")
    add("--overwrite", action="store_true", help="replace that file")
    args, args.more = parser.parse_known_args(argv)
    args.out = args.out or f"out/{'cost' if args.cost else 'bench'}.json"
    if os.path.isdir(args.out) or (os.path.lexists(args.out) and not args.overwrite):
        common.fail(f"--out {args.out} exists: give another file" + ("" if os.path.isdir(args.out) else ", or --overwrite"))
    common.check_out(Namespace(eval=None, resume=None, overwrite=True, out=os.path.dirname(args.out) or "."))
    args.command = shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def read_flags(script, *flags):
    """A script's own args, without the line on where a run would write."""
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(script).get_args([*flags, f"--out={NOWHERE}", "--overwrite"])


def get_cost_job(args):
    """As get_jobs, for the run that --cost's checkpoint is of."""
    script = common.load_checkpoint(args.cost, None)["script"]
    if script not in ("linreg", "mnist"):
        common.fail(f"--cost {args.cost} is a checkpoint of {script}.py; it must be one of linreg.py or mnist.py")
    settings = read_flags(script, f"--eval={args.cost}", *args.more)
    return [(script, settings.regime, settings)]


def get_jobs(args):
    """-> (script, regime, the script's own args), all of them checked before any work."""
    jobs = []
    for script, regime in itertools.product(args.scripts, args.regimes):
        if regime in SCRIPTS[script]:
            jobs.append((script, regime, read_flags(script, *FIXED.get(script, []), *args.more, f"--regime={regime}")))
    if not jobs:
        common.fail(f"--regimes {' '.join(args.regimes)}: {' and '.join(args.scripts)} can only do implicit")
    return jobs


def load(script, args):
    """-> the data's name and the script's model, train(model) and sample(), whose sizes are those in `args` when they are called."""
    s = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()):
        data = [s.load(args)["id"]] if script == "imagenet" else [s.load(args)] if script == "mnist" else []
    name = data[0].name if script == "imagenet" else s.NAMES[args.dataset] if script == "mnist" else s.data_name(args)
    model = s.make_model(*data, args) if script == "imagenet" else s.make_model(args)

    def sample():
        source = [s.sample_densities(args.tasks, args)] if script == "mog_flow" else [*data, args.tasks]
        return s.sample_tasks(*source, args.steps, args)

    return name, model, lambda model: s.train(model, *data, args), sample


# ---------------------------------------------------------------- the yardstick


class Stock(common.Transformer):
    """The same function of the same weights as `common.Transformer`, by stock nn.TransformerEncoder, in its place in a model."""

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
        return x, causal  # all is done in `read`

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
        start = now(self.args.device)
        for self.iteration in range(self.args.iters):
            yield self.iteration
        self.seconds = (now(self.args.device) - start) / self.args.iters  # `train` returns it


def now(device):
    """Seconds, when all that the device was given is done."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize(*[device] * (kind == "cuda"))
    return time.perf_counter()


def milliseconds(call, times, device):
    start = now(device)
    for _ in range(times):
        call()
    return 1000 * (now(device) - start) / times


def product_speed(args, m, k, n):
    """GFLOP/s of (m, k) @ (k, n) in the dtype in use: the best of three times some 20 ms."""
    a, b = (torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for shape in ((m, k), (k, n)))
    product = lambda: a @ b
    product()
    times = 1 + int(20 / milliseconds(product, 1, args.device))
    return 2e-6 * m * k * n / min(milliseconds(product, times, args.device) for _ in range(3))


def whole_batches():
    """A context in which training draws no sizes."""
    return mock.patch.object(common, "draw_size", lambda carry, N, shape, device="cpu": torch.full(shape, N, device=device))


class FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which do not allow the gradients that a model takes inside."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation._overloadpacket in flop_registry:
            self.total += flop_registry[operation._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flop(train, model, args):
    """FLOP of the matrix products in a timed step, on average; attention as plain products, so that every kernel counts the same."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        args.iters, iters = 1, args.iters
        train(model)  # iteration 0 twice
        first, args.iters = counter.total / 2, iters
        train(model)  # iteration 0, then those that are timed
    return (counter.total - 3 * first) / iters


def peak_bytes(call, device):
    """Peak of the tensors that a call makes."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def peak_memory(train, model, args):
    """Peak MB of the tensors in two steps; the weights are there before and are added."""
    args.iters = 1
    with whole_batches():
        peak = peak_bytes(lambda: train(model), args.device)
    return (peak + sum(p.numel() * p.element_size() for p in model.parameters())) / 1e6


def measure_parts(train, model, args):
    """-> {part: milliseconds of a step}, each alone: the calls of two steps on whole mini-batches, recorded, and replayed forward and backward."""
    calls, inside = {}, []

    def record(part, owner, name):
        call = getattr(owner, name)

        def recorded(*given):
            if inside:  # of a part already
                return call(*given)
            inputs = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in given]
            calls.setdefault(part, []).append((call, inputs, torch.is_autocast_enabled(device)))
            inside.append(part)
            try:
                return call(*given)
            finally:
                inside.pop()

        return mock.patch.object(owner, name, recorded)

    def replay(part):
        for call, inputs, autocast in calls[part]:
            with torch.autocast(device, model.transformer.dtype, enabled=autocast):
                out = call(*inputs)
            if out.requires_grad:
                torch.autograd.backward(out, torch.ones_like(out))

    device = torch.device(args.device).type
    kinds = {nn.Linear: "linear layers", nn.LayerNorm: "norms", nn.GELU: "GELU"}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if type(module) in kinds:
                stack.enter_context(record(kinds[type(module)], module, "forward"))
        for block in model.transformer.blocks:
            stack.enter_context(record("attention", block, "attend"))
        for name in ("predict", "gradients", "residuals", "pull_back"):
            if hasattr(model, name):
                stack.enter_context(record("the regime", model, name))
        stack.enter_context(whole_batches())
        args.iters = 1  # and the one before the clock starts
        train(model)
    optimizer = common.make_optimizer(model, args)

    def update():
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found = {part: median(milliseconds(functools.partial(replay, part), 1, args.device) for _ in range(5)) / 2 for part in calls}
    return found | {"AdamW": median(milliseconds(update, 1, args.device) for _ in range(5))}


def measure(script, args, repeats):
    """-> what is written about one script and regime; "table" is its row of the table."""
    name, ours, train, sample = load(script, args)
    tokens = args.tasks * (args.context + (args.queries if args.regime == "implicit" else args.history * args.latent_tokens))
    K, side = args.steps, 8192 if "cuda" in args.device else 2048
    stock = copy.deepcopy(ours)
    stock.transformer = Stock(args.width, args.depth, args.heads).to(args.device)
    stock.transformer.dtype = ours.transformer.dtype

    def run(model, steps, iters):
        args.steps, args.iters = steps, iters
        return 1000 * train(model)[1]

    iters = min(MOST, max(2, round(1000 * TURN / run(ours, K, 1))))
    turns, by_k = {key: [] for key in ("ms", "whole", "stock", "sampling", "peak", "width")}, {k: [] for k in KS}
    for _ in range(repeats):
        turns["ms"].append(run(ours, K, iters))
        turns["stock"].append(run(stock, K, iters))
        turns["sampling"].append(milliseconds(sample, iters, args.device))
        turns["peak"].append(product_speed(args, side, side, side))
        turns["width"].append(product_speed(args, tokens, args.width, 2 * args.width))
        with whole_batches():
            turns["whole"].append(run(ours, K, iters))
            for k in KS:
                by_k[k].append(run(ours, k, max(1, round(iters * K / k / 3))))
    args.steps, args.iters = K, iters
    flop, stock_flop = (count_flop(train, model, args) for model in (ours, stock))
    mb, stock_mb = (peak_memory(train, model, args) for model in (ours, stock))
    k_ms, k_mb = [median(by_k[k]) for k in KS], []
    for args.steps in KS:
        k_mb.append(peak_memory(train, ours, args))
    args.steps = K
    parts = measure_parts(train, ours, args) | {"sampling": median(turns["sampling"])}
    ms = median(turns["ms"])
    speed = 1e-6 * flop / ms
    table = {
        "ms": ms, "sampling": median(turns["sampling"]), "tasks/s": 1000 * args.tasks / ms, "GFLOP/s": speed,
        "% peak": 100 * speed / max(turns["peak"]), "% width": 100 * speed / max(turns["width"]), "MB": mb, "stock": median(turns["stock"]),
        "x stock": median(theirs / mine for mine, theirs in zip(turns["ms"], turns["stock"])), "x FLOP": stock_flop / flop, "x MB": stock_mb / mb,
        "x sum": median(turns["whole"]) / sum(parts.values()), "K^": float(np.polyfit(np.log(KS), np.log(k_ms), 1)[0]), "MB 10/1": k_mb[-1] / k_mb[0],
    }  # fmt: skip
    return {
        "script": script, "regime": args.regime, "data": name, "args": args.description["args"], "table": table, "flop_per_step": flop, "parts_ms": parts,
        "iterations_per_turn": iters, "turns": turns, "by_k": {"steps": list(KS), "ms": k_ms, "MB": k_mb},
    }  # fmt: skip


# ---------------------------------------------------------------- other optimizers as rivals (--baseline of the scripts)


RATES = [10 ** (i / 2) for i in range(-6, 7)]  # learning rates that are tried; predictors divide by sqrt(dim), so good ones can be large
MARKS = sorted({round(1.25**i) for i in range(27)})  # steps on all data, up to 331, after which there is a prediction; L-BFGS makes three iterations a step
Problem = namedtuple("Problem", "predictor size loss metric")  # of a script: predictor(w (B, P), x), P, loss and metric of a prediction
Run = namedtuple("Run", "start rates steps observations")  # start(task, rate) yields predictions after these steps, from so many observations


def seen(task, k):
    """The observations of the first k mini-batches: x (B, k N, X), y (B, k N, Y)."""
    return tuple(c[:k].transpose(0, 1).flatten(1, 2) for c in (task.context_x, task.context_y))


def descend(optimizer, w, batches, objective):
    """A step of a torch.optim optimizer on each (x, y); yields w (B, P). Adam and SGD treat every number alone: tasks do not meet.

    L-BFGS takes the sum over tasks as one problem. It has the same solution, without B times the overhead.
    """
    for x, y in batches:

        def closure():
            optimizer.zero_grad()
            value = objective(w, x, y)
            value.backward()
            return value

        optimizer.step(closure)
        yield w.detach()


def adapt(w, rate, batches, objective, order=2):
    """MAML's inner loop: gradient descent from w (B, P), yields each next. To who differentiates it, first order takes slopes as constants."""
    for x, y in batches:
        slope = torch.func.grad(objective)(w, x, y)
        w = w - rate * (slope if order == 2 else slope.detach())
        yield w


def meta_loss(start, log_rate, task, problem, objective, order):
    """The loss on the queries after a step on each mini-batch, from start (P,)."""
    *_, w = adapt(start.expand(len(task.query_x), -1), log_rate.exp(), zip(task.context_x, task.context_y), objective, order)
    return problem.loss(problem.predictor(w, task.query_x), task.query_y).mean()


def meta_train(sample, problem, objective, rate, order, seconds, args):
    """MAML on the tasks that the model was trained on -> start (P,), learning rate, iterations. It begins at the rate that suits SGD."""
    start, log_rate = torch.zeros(problem.size, device=args.device), torch.tensor(math.log(rate), device=args.device)
    optimizer = torch.optim.Adam([start, log_rate])
    slopes, begin, left = torch.func.grad(meta_loss, argnums=(0, 1)), time.time(), 1.0
    for iteration in itertools.count(1):
        common.seed_all(common.TRAINING, args.seed, iteration - 1)
        start.grad, log_rate.grad = slopes(start, log_rate, sample(args.tasks, args.steps), problem, objective, order)
        optimizer.param_groups[0]["lr"] = 0.01 * left  # falls to zero with the time that is left
        optimizer.step()
        left = 1 - (time.time() - begin) / seconds
        if left <= 0:
            return start, log_rate.exp().item(), iteration


def trace(run, task, rate, args):
    """-> predictions of a run and the seconds from its start to each. A step before: caches hold what ran last, and that is another."""
    next(run.start(task, rate))
    predictions, seconds, start = [], [], now(args.device)
    for prediction in itertools.islice(run.start(task, rate), len(run.steps)):
        predictions.append(prediction)
        seconds.append(now(args.device) - start)
    return predictions, seconds


def faster(ours, row):
    """How many times sooner the model is within 1% of what a rival ends at than the rival is; None if it never is."""
    goal = 1.01 * row["mean"][row["end"]]
    mine, theirs = (next((s for s, mean in zip(r["seconds"], r["mean"]) if mean <= goal), None) for r in (ours, row))
    return theirs / mine if mine else None


@torch.no_grad()
def race(model, sample, problem, args, stream=0):
    """The model beside optimizers of the parametric regime's predictor, on the tasks of the evaluation -> race.json.

    All see the same fresh mini-batches, a step on each; those with "all data" do many steps on the observations of the first K, and stop.
    Seconds are those of B tasks solved at once, predictions included: the median of the chunks that the evaluation comes in.
    On 32 tasks that are not evaluated every rival gets the learning rate that comes first to within 1% of its lowest metric; there it ends.
    """
    results = common.read_results(args.out, args.description["script"])
    K, S, N = min(args.steps, args.eval_steps), args.eval_steps, args.context
    seconds = args.baseline_seconds or results["train_seconds"]
    objective = lambda w, x, y: problem.loss(problem.predictor(w, x), y).mean(-1).sum()  # over tasks: each has its own gradient
    fresh, whole = (range(1, S + 1), [N * k for k in range(1, S + 1)]), (MARKS, [N * K] * len(MARKS))
    (practice,) = common.evaluation_tasks(lambda B: sample(B, S), 32, stream=2000)

    def optimize(make, draw, all_data, rates=RATES):
        def start(task, rate):
            w = draw(len(task.query_x), problem.size, device=args.device).requires_grad_()
            batches = itertools.repeat(seen(task, K), MARKS[-1]) if all_data else zip(task.context_x, task.context_y)
            steps = enumerate(descend(make([w], rate), w, batches, objective), 1)
            return (problem.predictor(w, task.query_x) for step, w in steps if not all_data or step in MARKS)

        return Run(start, rates, *(whole if all_data else fresh))

    def pick(run):
        """-> learning rate and index of the first step within 1% of the lowest metric in practice."""
        curves = [torch.stack([problem.metric(p, practice.query_y).mean() for p in trace(run, practice, rate, args)[0]]) for rate in run.rates]
        curves = torch.stack(curves).nan_to_num(torch.inf)  # (rates, steps)
        end = int((curves <= 1.01 * curves.min()).any(0).nonzero()[0])
        return run.rates[int(curves[:, end].argmin())], end

    adam = functools.partial(torch.optim.Adam, fused=args.device != "mps")
    lbfgs = functools.partial(torch.optim.LBFGS, max_iter=3, max_eval=50, history_size=10, line_search_fn="strong_wolfe")
    runs, trained = {"this model": Run(lambda task, _: (p[-1] for p in common.refine(model.eval(), task)), [None], *fresh)}, {}
    for all_data, words in ((False, ""), (True, ", all data")):
        if "adam" in args.baseline:
            runs["Adam, normal start" + words] = optimize(adam, torch.randn, all_data)
            runs["Adam" + words] = optimize(adam, torch.zeros, all_data)
        if "sgd" in args.baseline:
            runs["SGD" + words] = optimize(torch.optim.SGD, torch.zeros, all_data)
    if "lbfgs" in args.baseline:
        runs["L-BFGS, all data"] = optimize(lbfgs, torch.zeros, True, [1.0])
    for order, name in ((2, "MAML"), (1, "first-order MAML")) if "maml" in args.baseline else ():
        print(f"{name}: meta-training for {seconds:.0f} s", flush=True)
        begin, rate, iterations = meta_train(sample, problem, objective, pick(optimize(torch.optim.SGD, torch.zeros, False))[0], order, seconds, args)
        trained[name] = {"seconds": seconds, "iterations": iterations}

        def start(task, rate, begin=begin):
            steps = adapt(begin.expand(len(task.query_x), -1), rate, zip(task.context_x, task.context_y), objective)
            return (problem.predictor(w, task.query_x) for w in steps)

        runs[name] = Run(start, [rate], *fresh)

    chosen, found = {name: pick(run) for name, run in runs.items()}, {name: [] for name in runs}
    for name, run in runs.items():
        if run.steps is MARKS:
            runs[name] = run._replace(steps=MARKS[: chosen[name][1] + 1])
    for task in common.evaluation_tasks(lambda B: sample(B, S), args.eval_tasks, stream=stream):
        for name, run in runs.items():
            predictions, times = trace(run, task, chosen[name][0], args)
            found[name].append([torch.stack([f(p, task.query_y).mean(1) for p in predictions], 1) for f in (problem.metric, problem.loss)] + [times])
    rows = {}
    for name, chunks in found.items():
        metrics, losses, times = zip(*chunks)
        rows[name] = common.summary(
            metrics, list(runs[name].steps), observations=runs[name].observations[: len(times[0])], seconds=[median(t) for t in zip(*times)],
            loss=common.summary(losses)["mean"], rate=chosen[name][0], end=chosen[name][1],
        )  # fmt: skip
    ours, metric = rows["this model"], results["metrics"]["id"]["name"]
    for name, row in list(rows.items())[1:]:
        row["faster"], end = faster(ours, row), row["end"]
        ratio = row["faster"]
        verdict = f"never reaches it ({min(ours['mean']):.3g} at best)" if ratio is None else f"reaches it {max(ratio, 1 / ratio):.3g} times {'faster' if ratio > 1 else 'slower'}"
        print(f"{name}: {metric} {row['mean'][end]:.3g} after {row['seconds'][end]:.3g} s, {row['observations'][end]} observations; this model {verdict}")
    same = ("script", "args", "data", "device", "machine", "dtype", "threads", "torch", "seed", "iterations", "train_seconds")
    report = {"command": args.description["command"]} | {key: results[key] for key in same}
    report |= {"batch": min(32, args.eval_tasks), "metric": metric, "meta_training": trained, "rows": rows}
    common.replace_file(os.path.join(args.out, "race.json"), lambda path: common.write_text(path, json.dumps(report, indent=1)))


# ---------------------------------------------------------------- many steps or one on all data (--cost)


COST_KS = (1, 2, 4, 8, 16, 32)
FORMS = {"steps": "K steps", "one": "one step"}


@torch.no_grad()
def measure_cost(script, args):
    """K steps on N observations each beside one step on K N, by a trained model on fixed tasks -> {"steps" or "one": its ms, MB and metric}."""
    s, K, (data, model, _, sample) = importlib.import_module(script), args.steps, load(script, args)
    metric, unit = (s.make_metric(args), "squared error") if script == "linreg" else (s.error, "error %")
    args.tasks, args.steps = 32, COST_KS[-1]
    forms = {  # of the first k mini-batches
        "steps": lambda task, k: task._replace(context_x=task.context_x[:k], context_y=task.context_y[:k]),
        "one": lambda task, k: task._replace(**{f"context_{c}": data[None] for c, data in zip("xy", seen(task, k))}),
    }
    solve = lambda task: deque(common.refine(model.eval(), task), 1)[0][-1]  # keeps the last prediction only
    found = {form: {k: ([], [], []) for k in COST_KS} for form in forms}  # ms and errors of every chunk, MB of the first
    for task in common.evaluation_tasks(lambda _: sample(), args.eval_tasks):
        for k, (form, change) in itertools.product(COST_KS, forms.items()):
            part, (ms, errors, mb) = change(task, k), found[form][k]
            if not mb:
                mb.append(peak_bytes(lambda: solve(part), args.device) / 1e6)  # and everything is warm
            start = now(args.device)
            prediction = solve(part)
            ms.append(1000 * (now(args.device) - start))
            errors.append(metric(prediction, task.query_y).mean(1))
    note = f"one step on K x {args.context} observations is outside of training for K > 1: a step saw at most {args.context}, and there were {K} steps"
    cost = {"script": script, "args": args.description["args"], "data": data, "metric": unit, "batch": 32, "note": note}
    print(note + "\n" + line("K", "", map(str, COST_KS)))
    for form, by_k in found.items():
        row = common.summary([torch.stack([torch.cat(errors) for _, errors, _ in by_k.values()], 1)], COST_KS)
        row |= {"ms": [median(ms) for ms, _, _ in by_k.values()], "MB": [mb for _, _, (mb,) in by_k.values()]}
        cost[form] = row | {f"{key}^": round(float(np.polyfit(np.log(COST_KS[-3:]), np.log(row[key][-3:]), 1)[0]), 3) + 0.0 for key in ("ms", "MB")}
        for key, values in (("ms", row["ms"]), ("MB", row["MB"]), (unit, row["mean"])):
            print(line(FORMS[form], key, values) + (f"   as K^{cost[form][key + '^']:.2f} from K = {COST_KS[-3]}" if key != unit else ""))
    return cost


def plot_cost(report, path):
    """Milliseconds, megabytes and metric against K, beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cost = report["cost"]
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 4.2))
    for ax, key in zip(axes, ("ms", "MB", "mean")):
        for (form, name), color, style in zip(FORMS.items(), common.COLORS, ("o-", "s--")):
            slope = f" (as $K^{{{cost[form][key + '^']:.2f}}}$)" if key != "mean" else ""
            ax.plot(COST_KS, cost[form][key], style, color=color, label=name + slope)
        common.log_axis(ax, "y")
        ax.set_xscale("log", base=2)
        ax.set_xticks(COST_KS, map(str, COST_KS))
        label = {"ms": f"ms for {cost['batch']} tasks", "MB": "MB beside weights and data", "mean": cost["metric"]}[key]
        ax.set(xlabel=f"K (x {cost['args']['context']} observations)", ylabel=label)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    axes[2].axvline(cost["args"]["steps"], color="0.7", lw=1, zorder=0)  # trained up to here
    title = f"{cost['script']}.py {cost['args']['regime']}, {cost['data']}; {report['machine']}, {report['threads']} thread(s), seed {cost['args']['seed']}"
    fig.suptitle(f"{title}\n{cost['note']}", fontsize=10)
    fig.tight_layout()
    common.replace_file(path, lambda path: fig.savefig(path, dpi=130, format="png"))
    plt.close(fig)


# ---------------------------------------------------------------- the sampler of causal graphs


def simulate_loop(graph, mechanism, shift, n, random):
    """The mechanisms in plain numpy, one graph, node, parent and feature at a time; rows are vectors."""
    d = len(graph)
    x = np.zeros((n, d))
    for j in range(d):
        parents = np.flatnonzero(graph[:, j])
        noise = random.normal(size=n) if shift == "in" else random.laplace(size=n)
        value = np.zeros(n)
        if mechanism == "lin":
            for i in parents:
                value += random.choice([-1, 1]) * random.uniform(*toposort.WEIGHT[shift]) * x[:, i]
        elif len(parents):
            length, scale = random.uniform(*toposort.LENGTH[shift]), random.uniform(*toposort.SCALE[shift])
            for _ in range(100):
                angle = x[:, parents] @ random.normal(size=len(parents)) / length + random.uniform(0, 2 * math.pi)
                value += scale * math.sqrt(2 / 100) * random.normal() * np.cos(angle)
        x[:, j] = value + random.uniform(-3, 3) + random.uniform(0.2, 2) * noise
    return x


def measure_samplers(repeats, B=64, d=8, n=320):
    """toposort's batched simulation beside the loop above, in turns, on the same graphs -> {mechanism: ms per data set and ratios}."""
    found = {}
    for mechanism in toposort.MECHANISMS:
        turns = []
        for turn in range(repeats):
            graph, random = toposort.erdos_renyi(B, d, "cpu"), np.random.default_rng(turn)
            start = time.process_time()
            toposort.simulate(graph, mechanism, "in", n)
            middle = time.process_time()
            for one in graph.numpy()[:8]:
                simulate_loop(one, mechanism, "in", n, random)
            turns.append((1000 * (middle - start) / B, 1000 * (time.process_time() - middle) / 8))
        ratio = median(loop / ours for ours, loop in turns)
        found[mechanism] = {"ms": median(ours for ours, _ in turns), "loop": median(loop for _, loop in turns), "ratio": ratio, "turns": turns}
        print(f"{mechanism}, {d} nodes, {n} rows: {found[mechanism]['ms']:.3f} ms of processor a data set, plain numpy loop {found[mechanism]['loop']:.3f}: {ratio:.1f} times faster")
    return found


# ---------------------------------------------------------------- main


def line(left, right, cells):
    return f"{left:9} {right:10}" + " ".join(f"{c:>9}" if isinstance(c, str) else f"{c:9.2f}" for c in cells)


def main(argv=None):
    args = get_args(argv)
    jobs = get_cost_job(args) if args.cost else get_jobs(args)
    first = jobs[0][2]
    report = {
        "command": args.command, "machine": common.machine(first.device), "device": first.device, "dtype": first.dtype, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"), "rows": [],
    }  # fmt: skip

    def write():
        try:
            os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
            common.replace_file(args.out, lambda path: common.write_text(path, json.dumps(report, indent=1)))
        except OSError as problem:
            common.fail(f"cannot write --out {args.out}: {problem.strerror}")

    if args.sampler:
        report["sampler"] = measure_samplers(args.repeats)
        return write()
    if args.cost:
        report["cost"] = measure_cost(jobs[0][0], first)
        write()
        return plot_cost(report, os.path.splitext(args.out)[0] + ".png")
    print(", ".join(f"{key} {report[key]}" for key in report if key not in ("command", "rows")) + " (columns: bench.py --help)")
    with mock.patch.object(common, "Journal", Clock):
        for script, regime, settings in jobs:
            row = measure(script, settings, args.repeats)
            if not report["rows"]:
                print(line("", "", row["table"]))
            print(line(script, regime, row["table"].values()), flush=True)
            report["rows"].append(row)
            write()
    print("against K\n" + line("", "", map(str, KS)))
    for row in report["rows"]:
        print(line(row["script"], "ms", row["by_k"]["ms"]))
        print(line(row["regime"], "MB", row["by_k"]["MB"]))
    print(f"data {', '.join(dict.fromkeys(row['data'] for row in report['rows']))}; in full: {args.out}")


if __name__ == "__main__":
    common.run(main)
