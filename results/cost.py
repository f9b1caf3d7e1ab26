"""K steps on N observations each, a vote of K one-step answers, and one step on all K N observations, by a trained model.

    python results/cost.py out/mnist/checkpoint.pt      # a checkpoint of linreg.py or mnist.py

Time, memory and error for K = 1 ... 32, on the tasks of the evaluation, 32 at once. A vote is the mean of what the model says
(of its probabilities, for classes) after each mini-batch alone: no state is handed on. Memory is the peak of the tensors beside
weights and data. Flags that are not its own go to the script. Writes a JSON file, and a plot beside it.
"""

import itertools
import os
import sys
import textwrap
from collections import defaultdict
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import reports

import torch

KS = (1, 2, 4, 8, 16, 32)
FORMS = {"steps": "K steps", "vote": "vote of K", "one": "one step"}


def get_args(argv=None):
    parser = reports.make_parser("results/cost.py", __doc__)
    parser.add_argument("file", type=common.path, metavar="FILE", help="the checkpoint")
    return reports.parse_args(parser, argv, fixed=["--eval-steps"])


def split(task, form, k):
    """The first k mini-batches of a task as the model is given them: a list of (x (steps, B, n, X), y) to refine over."""
    x, y = task.context_x[:k], task.context_y[:k]
    if form == "steps":
        return [(x, y)]
    if form == "vote":
        return list(zip(x.split(1), y.split(1)))
    x, y = common.seen(task, k)
    return [(x[None], y[None])]


def solve(model, task, parts, classes):
    """The mean over parts of the last prediction (of its probabilities, for classes) -> (B, Q, Y)."""
    total = 0
    for x, y in parts:
        for prediction in common.refine(model, task._replace(context_x=x, context_y=y)):
            pass  # the last one counts, and no other is kept
        total = total + (prediction[-1].softmax(-1) if classes else prediction[-1])
    return total / len(parts)


@torch.no_grad()
def measure(trained):
    """-> for each form its ms and MB at every K, its error with standard error, and the slopes of log ms and log MB over the last three K."""
    model, device, classes = trained.model, trained.args.device, trained.report["script"] == "mnist"
    ms, errors, mb = defaultdict(list), defaultdict(list), {}  # by form and K: of every chunk of tasks; MB of the first
    for task in trained.tasks(KS[-1]):
        solve(model, task, split(task, "steps", 1), classes)  # caches hold the tasks that were drawn, or the first form pays for that
        for form, k in itertools.product(FORMS, KS):
            parts = split(task, form, k)
            if (form, k) not in mb:
                mb[form, k] = reports.peak_bytes(lambda: solve(model, task, parts, classes), device) / 1e6  # and everything is warm
            start = reports.now(device)
            prediction = solve(model, task, parts, classes)
            ms[form, k].append(1000 * (reports.now(device) - start))
            errors[form, k].append(trained.metric(prediction, task.query_y).mean(1))
    rows = {}
    for form in FORMS:
        row = common.summary([torch.stack([torch.cat(errors[form, k]) for k in KS], 1)], KS)
        row |= {"ms": [median(ms[form, k]) for k in KS], "MB": [mb[form, k] for k in KS]}
        rows[form] = row | {f"{key}^": reports.exponent(KS[-3:], row[key][-3:]) for key in ("ms", "MB")}
    return rows


def plot(report, path):
    """Milliseconds, megabytes and metric against K."""
    fig = common.Figure((10.5, 3.8))
    axes = fig.subplots(1, 3)
    labels = {"ms": f"ms for {report['batch']} tasks", "MB": "MB beside weights and data", "mean": report["metric"]}
    for ax, (key, label) in zip(axes, labels.items()):
        for (form, name), color, style in zip(FORMS.items(), common.COLORS, ("o-", "^:", "s--")):
            slope = f" (as $K^{{{report[form][key + '^']:.2f}}}$)" if key != "mean" else ""
            ax.plot(KS, report[form][key], style, color=color, label=name + slope)
        common.log_axis(ax, "y")
        ax.set_xscale("log", base=2)
        ax.set_xticks(KS, map(str, KS))
        ax.set(xlabel=f"K (x {report['args']['context']} observations)", ylabel=label)
        ax.grid(alpha=0.3)
    axes[2].axvline(report["args"]["steps"], color="0.7", lw=1, zorder=0, label="trained up to here")
    for ax in axes:
        ax.legend(fontsize=9, title=None if ax is axes[2] else f"slopes from K = {KS[-3]}", title_fontsize=9)
    where = f"{report['machine']}, {report['threads']} thread(s), seed {report['args']['seed']}"
    title = f"{report['script']}.py {report['args']['regime']}, decoder {report['args']['decoder']}, {report['data']}; {where}\n"
    fig.suptitle(title + textwrap.fill(report["note"], 120), fontsize=10)
    fig.tight_layout()
    common.save_figure(fig, path)


def main(argv=None):
    wanted = get_args(argv)
    trained = reports.read_checkpoint(wanted)
    N = trained.args.context
    note = f"one step on K x {N} observations is outside of training for K > 1: a step saw at most {N}, and there were {trained.args.steps} steps"
    report = trained.report | {"note": note} | measure(trained)
    print(note + "\n" + reports.line("K", "", map(str, KS)))
    for (form, name), key in itertools.product(FORMS.items(), ("ms", "MB", "mean")):
        print(reports.line(name, key, report[form][key]))
    common.write_json(wanted.out, report)
    plot(report, os.path.splitext(wanted.out)[0] + ".png")


if __name__ == "__main__":
    common.run(main)
