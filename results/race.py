"""A trained model beside optimizers of the parametric regime's predictor, on the tasks of its evaluation (sec. 5.2).

    python results/race.py out/linreg/checkpoint.pt --eval-steps 20      # a checkpoint of linreg.py or mnist.py
    python results/race.py out/mnist/checkpoint.pt --baseline adam,maml --baseline-seconds 60

Adam (from a normal start and from zero), SGD and MAML (of second and of first order) take a step on each fresh mini-batch, as the
model does. L-BFGS goes over the observations of the first K until it stands still. Seconds are those of 32 tasks solved at once,
predictions included: the median of the chunks that the evaluation comes in. Where a rival ends, and with which rate, is picked on 32
tasks that are not evaluated: the first step at which any rate is within 1% of the lowest metric of all, and the best rate there.
Flags that are not its own go to the script.
"""

import argparse
import functools
import itertools
import math
import os
import sys
import textwrap
import time
from collections import namedtuple
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import reports

import torch

RIVALS = ("adam", "sgd", "lbfgs", "maml")
RATES = [10 ** (i / 2) for i in range(-6, 7)]  # learning rates that are tried; predictors divide by sqrt(dim), so good ones can be large
MARKS = sorted({round(1.25**i) for i in range(27)})  # L-BFGS: steps, of three iterations each, after which there is a prediction

Run = namedtuple("Run", "start rates steps observations")  # start(task, rate) yields predictions after these steps, from so many observations


class Problem:
    """What rivals solve: the parametric regime's predictor with weights w (B, P), on a script's basis and for its loss."""

    def __init__(self, script, x_dim, y_dim):
        self.script, self.y_dim, self.size = script, y_dim, script.basis(torch.zeros(x_dim)).numel() * y_dim

    def predict(self, w, x):
        """Weights w (B, P), x (B, Q, X) -> (B, Q, Y)."""
        return self.script.basis(x) @ w.unflatten(-1, (self.y_dim, -1)).mT

    def objective(self, w, x, y):
        """Summed over tasks: each has its own gradient."""
        return self.script.loss(self.predict(w, x), y).mean(-1).sum()


def rivals(text):
    """An argparse type: some of RIVALS, with commas between."""
    if wrong := [name for name in text.split(",") if name not in RIVALS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(RIVALS)}")
    return tuple(dict.fromkeys(text.split(",")))


def get_args(argv=None):
    parser = reports.make_parser("results/race.py", __doc__)
    add, seconds = parser.add_argument, common.number(float, 1e-9)
    add("file", type=common.path, metavar="FILE", help="the checkpoint")
    add("--baseline", type=rivals, metavar="LIST", default=RIVALS, help="some of adam,sgd,lbfgs,maml (default: all)")
    add("--baseline-seconds", type=seconds, metavar="SECONDS", help="meta-training of maml, of each order (default: as long as the model was trained)")
    return reports.parse_args(parser, argv)


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
    """SGD as MAML trains through it: steps from w (B, P), yields each next. With order 1 slopes count as constants when it is differentiated."""
    for x, y in batches:
        slope = torch.func.grad(objective)(w, x, y)
        w = w - rate * (slope if order == 2 else slope.detach())
        yield w


def meta_loss(start, log_rate, task, problem, order):
    """The loss on the queries after a step on each mini-batch, from start (P,)."""
    start = start.expand(len(task.query_x), -1)
    *_, w = adapt(start, log_rate.exp(), zip(task.context_x, task.context_y), problem.objective, order)
    return problem.script.loss(problem.predict(w, task.query_x), task.query_y).mean()


def meta_train(sample, problem, rate, order, seconds, args):
    """MAML on the tasks that the model was trained on -> start (P,), learning rate, iterations. It begins at the rate that suits SGD."""
    start, log_rate = torch.zeros(problem.size, device=args.device), torch.tensor(math.log(rate), device=args.device)
    optimizer = torch.optim.Adam([start, log_rate])
    slopes, begin, left = torch.func.grad(meta_loss, argnums=(0, 1)), time.time(), 1.0
    for iteration in itertools.count(1):
        common.seed_all(common.TRAINING, args.seed, iteration - 1)
        start.grad, log_rate.grad = slopes(start, log_rate, sample(args.tasks, args.steps), problem, order)
        optimizer.param_groups[0]["lr"] = 0.01 * left  # falls to zero with the time that is left
        optimizer.step()
        left = 1 - (time.time() - begin) / seconds
        if left <= 0:
            return start, log_rate.exp().item(), iteration


# ---------------------------------------------------------------- the race


def trace(run, task, rate, trained):
    """-> the metric of each prediction of a run (B, steps), and the seconds from its start to each. A step before: caches hold what ran last."""
    device, predictions, seconds = trained.args.device, [], []
    next(run.start(task, rate))
    start = reports.now(device)
    for prediction in run.start(task, rate):
        predictions.append(prediction)
        seconds.append(reports.now(device) - start)
    return torch.stack([trained.metric(p, task.query_y).mean(1) for p in predictions], 1), seconds


def faster(ours, row):
    """How many times sooner the model is within 1% of what a rival ends at than the rival is; None if it never is."""
    goal = 1.01 * row["mean"][row["end"]]
    mine, theirs = (next((s for s, mean in zip(r["seconds"], r["mean"]) if mean <= goal), None) for r in (ours, row))
    return theirs / mine if mine else None


@torch.no_grad()
def race(trained, names, seconds):
    """-> a row for the model and for each rival that is named, and how MAML was trained, for so many seconds."""
    args = trained.args
    K, S, N = min(args.steps, args.eval_steps), args.eval_steps, args.context
    (practice,) = common.evaluation_tasks(lambda B: trained.sample(B, S), 32, stream=2000)
    problem = Problem(trained.script, practice.query_x.shape[-1], practice.query_y.shape[-1])
    mini_batches = lambda task: zip(task.context_x, task.context_y)
    fresh = list(range(1, S + 1)), [N * k for k in range(1, S + 1)]  # steps, and observations seen by then

    def rival(make, begin, rates, batches=mini_batches, steps=fresh[0], observations=fresh[1]):
        """The run of an optimizer make([w], rate) from w = begin(B, P), with a step on each of batches(task)."""

        def start(task, rate):
            w = begin(len(task.query_x), problem.size, device=args.device).requires_grad_()
            for step, w in enumerate(descend(make([w], rate), w, batches(task), problem.objective), 1):
                if step in steps:
                    yield problem.predict(w, task.query_x)

        return Run(start, rates, steps, observations)

    def pick(run):
        """-> learning rate and index of the first step within 1% of the lowest metric in practice."""
        curves = torch.stack([trace(run, practice, rate, trained)[0].mean(0) for rate in run.rates]).nan_to_num(torch.inf)  # (rates, steps)
        end = int((curves <= 1.01 * curves.min()).any(0).nonzero()[0])
        return run.rates[int(curves[:, end].argmin())], end

    sgd = rival(torch.optim.SGD, torch.zeros, RATES)
    runs, training = {"this model": Run(lambda task, _: (p[-1] for p in common.refine(trained.model, task)), [None], *fresh)}, {}
    if "adam" in names:
        adam = functools.partial(torch.optim.Adam, fused=True)
        runs |= {"Adam, normal start": rival(adam, torch.randn, RATES), "Adam": rival(adam, torch.zeros, RATES)}
    if "sgd" in names:
        runs["SGD"] = sgd
    if "lbfgs" in names:
        lbfgs = functools.partial(torch.optim.LBFGS, max_iter=3, max_eval=50, history_size=10, line_search_fn="strong_wolfe")
        all_data = lambda task: itertools.repeat(common.seen(task, K), MARKS[-1])
        runs["L-BFGS, all data"] = rival(lbfgs, torch.zeros, [1.0], all_data, MARKS, [N * K] * len(MARKS))
    if "maml" in names:
        first_rate, _ = pick(sgd)
        for order, name in ((2, "MAML"), (1, "first-order MAML")):
            print(f"{name}: meta-training for {seconds:.0f} s", flush=True)
            start, rate, iterations = meta_train(trained.sample, problem, first_rate, order, seconds, args)
            runs[name] = rival(torch.optim.SGD, lambda B, P, device, start=start: start.repeat(B, 1), [rate])
            training[name] = {"seconds": seconds, "iterations": iterations}

    chosen, found = {name: pick(run) for name, run in runs.items()}, {name: [] for name in runs}
    for task in trained.tasks(S):
        for name, run in runs.items():
            metrics, times = trace(run, task, chosen[name][0], trained)
            if name == "this model" and trained.model.shows_residuals:  # one run would also charge an answer after k for observations that come later
                cut = lambda k: task._replace(context_x=task.context_x[:k], context_y=task.context_y[:k])
                times = list(itertools.accumulate((trace(run, cut(k), None, trained)[1][-1] for k in fresh[0]), max))
            found[name].append((metrics, times))
    rows = {}
    for name, run in runs.items():
        (rate, end), (metrics, times) = chosen[name], zip(*found[name])
        rows[name] = common.summary(metrics, run.steps, observations=run.observations, rate=rate, end=end)
        rows[name]["seconds"] = [median(chunks) for chunks in zip(*times)]
        if name != "this model":
            rows[name]["faster"] = faster(rows["this model"], rows[name])
    return rows, training


def plot(report, path):
    """The metric against seconds, and against observations seen, of which L-BFGS has all from the start."""
    fig = common.Figure((10.5, 5.2))
    axes = fig.subplots(1, 2, sharey=True)
    for (name, row), color in zip(report["rows"].items(), common.COLORS):
        style = dict(marker="o", markevery=[row["end"]], color=color, lw=2.5 if name == "this model" else 1.3, ls="--" if "first-order" in name else "-", label=name)
        stop = row["end"] + 1 if "L-BFGS" in name else None  # it stands still from there on
        for ax, key in zip(axes, ("seconds", "observations")):
            ax.plot(row[key][:stop], row["mean"][:stop], **style)
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
    fig.suptitle("\n".join(textwrap.fill(words, 120) for words in (title, where)), fontsize=10)
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    common.save_figure(fig, path)


def main(argv=None):
    wanted = get_args(argv)
    trained = reports.read_checkpoint(wanted)
    _, seconds = common.trained(trained.args)
    rows, training = race(trained, wanted.baseline, wanted.baseline_seconds or seconds)
    report = trained.report | {"rows": rows, "meta_training": training}
    for name, row in list(rows.items())[1:]:
        end, ratio = row["end"], row["faster"]
        verdict = f"{ratio:.3g} times as long as this model takes to it" if ratio else "this model never reaches it"
        print(f"{name}: {report['metric']} {row['mean'][end]:.3g} after {row['seconds'][end]:.3g} s,", end=" ")
        print(f"{row['observations'][end]} observations; {verdict}")
    common.write_json(wanted.out, report)
    plot(report, os.path.splitext(wanted.out)[0] + ".png")


if __name__ == "__main__":
    common.run(main)
