"""K steps on N observations each, a vote of K one-step answers, and one step on all K N observations, by a trained model.

    python results/cost.py out/mnist/checkpoint.pt      # a checkpoint of linreg.py or mnist.py

Time, memory and error for K = 1 ... 32, on the tasks of the evaluation, 32 at once. A vote is the mean of what the model says
(of its probabilities, for classes) after each mini-batch alone: no state is handed on. Memory is the peak of the tensors beside
weights and data. Flags that are not its own go to the script. Writes a JSON file, and a plot beside it.
"""

import itertools
import os
import sys
from collections import deque
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import bench
import common
from bench import line

import numpy as np
import torch

KS = (1, 2, 4, 8, 16, 32)
FORMS = {"steps": "K steps", "vote": "vote of K", "one": "one step"}


def get_args(argv=None):
    def add_flags(add):
        add("file", type=common.path, metavar="FILE", help="the checkpoint")

    return bench.read_args("results/cost.py", __doc__, add_flags, "out/cost.json", argv)


def split(task, form, k):
    """The first k mini-batches of a task as the model is given them: a list of (x (steps, B, n, X), y) to refine over."""
    x, y = task.context_x[:k], task.context_y[:k]
    if form == "steps":
        return [(x, y)]
    return list(zip(x.split(1), y.split(1))) if form == "vote" else [tuple(part[None] for part in common.seen(task, k))]


def solve(model, task, parts, classes):
    """The mean over parts of the last prediction (of its probabilities, for classes) -> (B, Q, Y)."""
    answers = (deque(common.refine(model, task._replace(context_x=x, context_y=y)), 1)[0][-1] for x, y in parts)  # keeps the last only
    return sum(answer.softmax(-1) if classes else answer for answer in answers) / len(parts)


@torch.no_grad()
def measure(model, sample, metric, classes, args, stream):
    """-> for each form its ms and MB at every K, its error with standard error, and the slopes of log ms and log MB over the last three K."""
    model.eval()
    found = {form: {k: ([], [], []) for k in KS} for form in FORMS}  # ms and errors of every chunk, MB of the first
    for task in common.evaluation_tasks(lambda B: sample(B, KS[-1]), args.eval_tasks, stream):
        for k, form in itertools.product(KS, FORMS):
            parts, (ms, errors, mb) = split(task, form, k), found[form][k]
            if not mb:
                mb.append(bench.peak_bytes(lambda: solve(model, task, parts, classes), args.device) / 1e6)  # and everything is warm
            start = bench.now(args.device)
            prediction = solve(model, task, parts, classes)
            ms.append(1000 * (bench.now(args.device) - start))
            errors.append(metric(prediction, task.query_y).mean(1))
    rows = {}
    for form, by_k in found.items():
        rows[form] = common.summary([torch.stack([torch.cat(errors) for _, errors, _ in by_k.values()], 1)], KS)
        rows[form] |= {"ms": [median(ms) for ms, _, _ in by_k.values()], "MB": [mb for _, _, (mb,) in by_k.values()]}
        for key in ("ms", "MB"):
            rows[form][f"{key}^"] = round(float(np.polyfit(np.log(KS[-3:]), np.log(rows[form][key][-3:]), 1)[0]), 3) + 0.0
    return rows


def plot(report, path):
    """Milliseconds, megabytes and metric against K."""
    plt = common.pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 4.2))
    for ax, key in zip(axes, ("ms", "MB", "mean")):
        for (form, name), color, style in zip(FORMS.items(), common.COLORS, ("o-", "^:", "s--")):
            slope = f" (as $K^{{{report[form][key + '^']:.2f}}}$)" if key != "mean" else ""
            ax.plot(KS, report[form][key], style, color=color, label=name + slope)
        common.log_axis(ax, "y")
        ax.set_xscale("log", base=2)
        ax.set_xticks(KS, map(str, KS))
        label = {"ms": f"ms for {report['batch']} tasks", "MB": "MB beside weights and data", "mean": report["metric"]}[key]
        ax.set(xlabel=f"K (x {report['args']['context']} observations)", ylabel=label)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    axes[2].axvline(report["args"]["steps"], color="0.7", lw=1, zorder=0)  # trained up to here
    title = f"{report['script']}.py {report['args']['regime']}, {report['data']}; {report['machine']}, {report['threads']} thread(s), seed {report['args']['seed']}"
    fig.suptitle(f"{title}\n{report['note']}", fontsize=10)
    fig.tight_layout()
    common.save_figure(fig, path)


def main(argv=None):
    wanted = get_args(argv)
    script, args = bench.read_checkpoint(wanted)
    data, model, _, sample = bench.load(script, args)
    metric, unit, stream = bench.scoring(script, args)
    note = f"one step on K x {args.context} observations is outside of training for K > 1: a step saw at most {args.context}, and there were {args.steps} steps"
    report = bench.header(wanted, args) | {"script": script, "args": args.description["args"], "data": data, "metric": unit, "batch": min(32, args.eval_tasks), "note": note}
    report |= measure(model, sample, metric, script == "mnist", args, stream)
    print(note + "\n" + line("K", "", map(str, KS)))
    for form, name in FORMS.items():
        for key, values in (("ms", "ms"), ("MB", "MB"), (unit, "mean")):
            print(line(name, key, report[form][values]) + (f"   as K^{report[form][key + '^']:.2f} from K = {KS[-3]}" if key != unit else ""))
    common.write_json(wanted.out, report)
    plot(report, os.path.splitext(wanted.out)[0] + ".png")


if __name__ == "__main__":
    common.run(main)
