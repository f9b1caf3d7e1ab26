"""A trained model beside optimizers of the parametric regime's predictor, on the tasks of its evaluation (sec. 5.2).

    python results/race.py out/linreg/checkpoint.pt --eval-steps 20      # a checkpoint of linreg.py or mnist.py
    python results/race.py out/mnist/checkpoint.pt --baseline adam,maml --baseline-seconds 60

Adam (from a normal start and from zero), SGD and MAML (of second and of first order) take a step on each fresh mini-batch, as the
model does. L-BFGS goes over the observations of the first K until it stands still. Seconds are those of 32 tasks solved at once,
predictions included: the median of the chunks that the evaluation comes in. On 32 tasks that are not evaluated every rival gets
the learning rate that comes first to within 1% of its lowest metric; there it ends. Flags that are not its own go to the script.
"""

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
import textwrap
import time
from collections import namedtuple
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import bench
import common

import torch

RIVALS = ("adam", "sgd", "lbfgs", "maml")
RATES = [10 ** (i / 2) for i in range(-6, 7)]  # learning rates that are tried; predictors divide by sqrt(dim), so good ones can be large
MARKS = sorted({round(1.25**i) for i in range(27)})  # L-BFGS: steps, of three iterations each, after which there is a prediction

Problem = namedtuple("Problem", "predictor size loss metric")  # of a script: predictor(w (B, P), x), P, loss and metric of a prediction
Run = namedtuple("Run", "start rates steps observations")  # start(task, rate) yields predictions after these steps, from so many observations


def predictor_on(basis, y_dim):
    """The parametric regime's predictor as a function: weights w (..., P), x (..., Q, X) -> (..., Q, Y)."""
    return lambda w, x: basis(x) @ w.unflatten(-1, (y_dim, -1)).mT


def rivals(text):
    """An argparse type: some of RIVALS, with commas between."""
    if wrong := [name for name in text.split(",") if name not in RIVALS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(RIVALS)}")
    return tuple(dict.fromkeys(text.split(",")))


def get_args(argv=None):
    def add_flags(add):
        add("file", type=common.path, metavar="FILE", help="the checkpoint")
        add("--baseline", type=rivals, metavar="LIST", default=RIVALS, help="some of adam,sgd,lbfgs,maml (default: all)")
        add("--baseline-seconds", type=common.number(float, 0, strict=True), metavar="SECONDS", help="meta-training of maml, of each order (default: as long as the model was trained)")

    return bench.read_args("results/race.py", __doc__, add_flags, "out/race.json", argv)


# ---------------------------------------------------------------- the rivals


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


# ---------------------------------------------------------------- the race


def trace(run, task, rate, args):
    """-> predictions of a run and the seconds from its start to each. A step before: caches hold what ran last, and that is another."""
    next(run.start(task, rate))
    predictions, seconds, start = [], [], bench.now(args.device)
    for prediction in itertools.islice(run.start(task, rate), len(run.steps)):
        predictions.append(prediction)
        seconds.append(bench.now(args.device) - start)
    return predictions, seconds


def faster(ours, row):
    """How many times sooner the model is within 1% of what a rival ends at than the rival is; None if it never is."""
    goal = 1.01 * row["mean"][row["end"]]
    mine, theirs = (next((s for s, mean in zip(r["seconds"], r["mean"]) if mean <= goal), None) for r in (ours, row))
    return theirs / mine if mine else None


@torch.no_grad()
def race(model, sample, problem, names, seconds, args, stream):
    """-> a row for the model and for each rival that is named, and how MAML was trained; sample(B, K) draws tasks."""
    K, S, N = min(args.steps, args.eval_steps), args.eval_steps, args.context
    objective = lambda w, x, y: problem.loss(problem.predictor(w, x), y).mean(-1).sum()  # over tasks: each has its own gradient
    fresh = range(1, S + 1), [N * k for k in range(1, S + 1)]
    (practice,) = common.evaluation_tasks(lambda B: sample(B, S), 32, stream=2000)

    def optimize(make, draw, rates=RATES):
        def start(task, rate):
            w = draw(len(task.query_x), problem.size, device=args.device).requires_grad_()
            for w in descend(make([w], rate), w, zip(task.context_x, task.context_y), objective):
                yield problem.predictor(w, task.query_x)

        return Run(start, rates, *fresh)

    def start_lbfgs(task, rate):
        w = torch.zeros(len(task.query_x), problem.size, device=args.device).requires_grad_()
        optimizer = torch.optim.LBFGS([w], rate, max_iter=3, max_eval=50, history_size=10, line_search_fn="strong_wolfe")
        for step, w in enumerate(descend(optimizer, w, itertools.repeat(common.seen(task, K), MARKS[-1]), objective), 1):
            if step in MARKS:
                yield problem.predictor(w, task.query_x)

    def pick(run):
        """-> learning rate and index of the first step within 1% of the lowest metric in practice."""
        curves = [torch.stack([problem.metric(p, practice.query_y).mean() for p in trace(run, practice, rate, args)[0]]) for rate in run.rates]
        curves = torch.stack(curves).nan_to_num(torch.inf)  # (rates, steps)
        end = int((curves <= 1.01 * curves.min()).any(0).nonzero()[0])
        return run.rates[int(curves[:, end].argmin())], end

    runs, trained = {"this model": Run(lambda task, _: (p[-1] for p in common.refine(model.eval(), task)), [None], *fresh)}, {}
    if "adam" in names:
        adam = functools.partial(torch.optim.Adam, fused=True)
        runs |= {"Adam, normal start": optimize(adam, torch.randn), "Adam": optimize(adam, torch.zeros)}
    sgd = optimize(torch.optim.SGD, torch.zeros)
    if "sgd" in names:
        runs["SGD"] = sgd
    if "lbfgs" in names:
        runs["L-BFGS, all data"] = Run(start_lbfgs, [1.0], MARKS, [N * K] * len(MARKS))
    first_rate = pick(sgd)[0] if "maml" in names else None
    for order, name in ((2, "MAML"), (1, "first-order MAML")) if "maml" in names else ():
        print(f"{name}: meta-training for {seconds:.0f} s", flush=True)
        begin, rate, iterations = meta_train(sample, problem, objective, first_rate, order, seconds, args)
        trained[name] = {"seconds": seconds, "iterations": iterations}

        def start(task, rate, begin=begin):
            for w in adapt(begin.expand(len(task.query_x), -1), rate, zip(task.context_x, task.context_y), objective):
                yield problem.predictor(w, task.query_x)

        runs[name] = Run(start, [rate], *fresh)

    chosen, found = {name: pick(run) for name, run in runs.items()}, {name: [] for name in runs}
    for task in common.evaluation_tasks(lambda B: sample(B, S), args.eval_tasks, stream=stream):
        for name, run in runs.items():
            predictions, times = trace(run, task, chosen[name][0], args)
            found[name].append([torch.stack([f(p, task.query_y).mean(1) for p in predictions], 1) for f in (problem.metric, problem.loss)] + [times])
    rows = {}
    for name, chunks in found.items():
        metrics, losses, times = zip(*chunks)
        rate, end = chosen[name]
        extra = dict(observations=runs[name].observations, seconds=[median(t) for t in zip(*times)], rate=rate, end=end)
        rows[name] = common.summary(metrics, list(runs[name].steps), loss=common.summary(losses)["mean"], **extra)
        if name != "this model":
            rows[name]["faster"] = faster(rows["this model"], rows[name])
    return rows, trained


def say(rows, metric):
    """One line a rival: where it ends, and how many times faster the model gets there."""
    best = min(rows["this model"]["mean"])
    for name, row in list(rows.items())[1:]:
        ratio, end = row["faster"], row["end"]
        verdict = f"never reaches it ({best:.3g} at best)" if ratio is None else f"reaches it {max(ratio, 1 / ratio):.3g} times {'faster' if ratio > 1 else 'slower'}"
        print(f"{name}: {metric} {row['mean'][end]:.3g} after {row['seconds'][end]:.3g} s, {row['observations'][end]} observations; this model {verdict}")


def plot(report, path):
    """The metric against seconds, and against observations seen."""
    plt = common.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.6), sharey=True)
    for (name, row), color in zip(report["rows"].items(), common.COLORS):
        style = dict(color=color, marker="o", markevery=[row["end"]], lw=2.5 if name == "this model" else 1.3, label=name)
        if len(set(row["observations"])) == 1:  # all steps see the same: it stops where it ends
            end = row["end"]
            axes[0].plot(row["seconds"][: end + 1], row["mean"][: end + 1], **style)
            axes[1].plot(row["observations"][end], row["mean"][end], **style | dict(markevery=None))
        else:
            axes[0].plot(row["seconds"], row["mean"], **style)
            axes[1].plot(row["observations"], row["mean"], **style)
    args = report["args"]
    axes[0].set(xlabel=f"seconds for {report['batch']} tasks at once", ylabel=report["metric"])
    axes[1].set(xlabel="observations seen, a task (grey: what this model is trained up to)")
    axes[1].axvline(args["steps"] * args["context"], color="0.7", lw=1, zorder=0)
    for ax in axes:
        common.log_axis(ax, "x")
        common.log_axis(ax, "y")
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=9, handlelength=4)
    title = f"{report['script']}.py {args['regime']}, trained for {report['train_seconds']:.0f} s: {report['data']}"
    where = f"{report['machine']}, {report['threads']} thread(s), seed {args['seed']}; marks: where it ends, as picked on other tasks"
    fig.suptitle("\n".join(textwrap.fill(words, 140) for words in (title, where)), fontsize=10)
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    common.save_figure(fig, path)


def main(argv=None):
    wanted = get_args(argv)
    script, args = bench.read_checkpoint(wanted)
    data, model, _, sample = bench.load(script, args)
    metric, unit, stream = bench.scoring(script, args)
    s = importlib.import_module(script)
    y_dim = 1 if script == "linreg" else s.CLASSES
    problem = Problem(predictor_on(s.basis, y_dim), s.basis(torch.zeros(args.dim)).numel() * y_dim, s.loss, metric)
    iterations, seconds = common.trained(args)
    if not (wanted.baseline_seconds or seconds) and "maml" in wanted.baseline:
        common.fail(f"{wanted.file} was not trained yet: say with --baseline-seconds how long maml may be")
    report = bench.header(wanted, args) | {
        "script": script, "args": args.description["args"], "data": data, "iterations": iterations,
        "train_seconds": round(seconds, 1), "batch": min(32, args.eval_tasks), "metric": unit,
    }  # fmt: skip
    report["rows"], report["meta_training"] = race(model, sample, problem, wanted.baseline, wanted.baseline_seconds or seconds, args, stream)
    say(report["rows"], unit)
    common.write_json(wanted.out, report)
    plot(report, os.path.splitext(wanted.out)[0] + ".png")


if __name__ == "__main__":
    common.run(main)
