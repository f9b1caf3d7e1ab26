"""One change at a time, three seeds each, in short runs: python results/ablations.py

Runs whatever out/ablations does not hold yet (an hour on one core; it may be stopped and started again), then
writes ablations.json and ablations.png beside this script. `--list` only prints the commands.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
ROOT = HERE.parent
SEEDS = (0, 1, 2)
LINREG = "linreg.py --dim 8 --context 15 --iters 500"
MNIST = "mnist.py --dim 50 --iters 300"

# What is varied -> the command of all, and each variant's flags. The first variant is the one that the others are held against.
GROUPS = {
    "signal (parametric)": (LINREG, {"data": "", "grad": "--signal grad", "both": "--signal both"}),
    "history (parametric, signal grad)": (LINREG + " --signal grad", {"1": "", "3": "--history 3", "5": "--history 5"}),
    "mask (parametric)": (LINREG, {"none": "", "causal": "--mask causal"}),
    "mask (explicit)": (LINREG + " --regime explicit", {"none": "", "causal": "--mask causal"}),
    "mask (implicit)": (LINREG + " --regime implicit", {"none": "", "causal": "--mask causal"}),
    "state handed on in training (parametric)": (LINREG, {"full": "", "random": "--carry random"}),
    "state handed on in training (implicit)": (LINREG + " --regime implicit", {"full": "", "random": "--carry random"}),
    "latent tokens (explicit)": (LINREG + " --regime explicit", {"1": "", "4": "--latent-tokens 4", "8": "--latent-tokens 8"}),
    "output (parametric, decoder linear)": (LINREG + " --decoder linear", {"a change": "", "the next state": "--update direct"}),
    "output (implicit)": (LINREG + " --regime implicit", {"a change": "", "the next state": "--update direct"}),
    "attention (parametric)": (LINREG, {"linear": "", "softmax": "--attention softmax"}),
    "attention (explicit)": (LINREG + " --regime explicit", {"linear": "", "softmax": "--attention softmax"}),
    "attention (implicit)": (LINREG + " --regime implicit", {"linear": "", "softmax": "--attention softmax"}),
    "decoder (parametric)": (LINREG, {"span": "", "linear": "--decoder linear"}),
    "decoder (explicit)": (LINREG + " --regime explicit", {"span": "", "linear": "--decoder linear"}),
    "MNIST: decoder (parametric)": (MNIST + " --regime parametric", {"span": "", "linear": "--decoder linear"}),
    "MNIST: output (implicit)": (MNIST, {"a change": "", "the next state": "--update direct"}),
    "dtype (parametric)": (LINREG, {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}),
    "MNIST: dtype (implicit)": (MNIST, {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}),
    "MNIST: state (implicit)": (MNIST, {"logits": "", "softmax": "--state softmax", "latent": "--state latent"}),
}


def command(base, flags, seed):
    """-> what to run, and the folder that it writes to."""
    words = [*base.split(), *flags.split(), "--seed", str(seed)]
    return words, ROOT / "out" / "ablations" / "-".join(words).replace(".py", "").replace("---", "-").replace("--", "-")


def run(words, folder):
    """-> the results of a finished run; starts it, or goes on with it, where there is none."""
    file = folder / "results.json"
    if not file.exists():
        where = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else ["--out", str(folder)]
        done = subprocess.run([sys.executable, *words, *where], cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode or not file.exists():
            sys.exit(f"error: python {shlex.join(words)} ended with code {done.returncode}")
    return json.loads(file.read_text())


def summarize(base, flags):
    """Mean over seeds at each step, and its standard error; the evaluation tasks are the same for all seeds."""
    found = [run(*command(base, flags, seed)) for seed in SEEDS]
    metric = [r["metrics"]["id"] for r in found]
    seeds = [m["mean"] for m in metric]  # (seeds, steps)
    return {
        "command": " ".join(["python", base, flags]).strip(), "data": metric[0]["data"], "name": metric[0]["name"], "steps": metric[0]["steps"], "trained": found[0]["args"]["steps"],
        "seeds": seeds, "mean": [mean(step) for step in zip(*seeds)], "stderr": [stdev(step) / len(SEEDS) ** 0.5 for step in zip(*seeds)],
        "tasks": metric[0]["tasks"], "cpu_seconds": [r["cpu_seconds"] for r in found], "machine": found[0]["machine"], "torch": found[0]["torch"],
    }  # fmt: skip


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ("#0072B2", "#D55E00", "#009E73")
    fig, axes = plt.subplots(-(-len(rows) // 4), 4, figsize=(15, 3.1 * -(-len(rows) // 4)), squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.axis("off")
    for ax, (group, variants) in zip(axes.flat, rows.items()):
        for color, marker, (label, row) in zip(colors, "osD", variants.items()):
            ax.errorbar(row["steps"][1:], row["mean"][1:], row["stderr"][1:], fmt=f"{marker}-", color=color, ms=4, lw=1.5, capsize=2, label=label)
        ax.axvline(row["trained"], color="0.7", lw=1, zorder=0)
        ax.set_title(group, fontsize=10)
        ax.set_ylabel(row["name"], fontsize=9)
        if row["name"] != "error %":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(which="both", labelsize=8)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3, which="both")
    data = dict.fromkeys(row["data"] for variants in rows.values() for row in variants.values())
    fig.suptitle(f"error against mini-batches seen (trained on those left of the grey line): {'; '.join(data)}; seeds {', '.join(map(str, SEEDS))}", fontsize=11)
    fig.tight_layout(rect=(0, 0, 1, 0.99))
    fig.savefig(path, dpi=80)


def main():
    if sys.argv[1:] == ["--list"]:
        for words, _ in dict.fromkeys((tuple(c), str(f)) for base, variants in GROUPS.values() for flags in variants.values() for c, f in (command(base, flags, s) for s in SEEDS)):
            print(shlex.join(["python", *words]))
        return
    if sys.argv[1:]:
        sys.exit(f"error: ablations.py takes --list or nothing, not {shlex.join(sys.argv[1:])}")
    rows = {}
    for group, (base, variants) in GROUPS.items():
        rows[group] = {label: summarize(base, flags) for label, flags in variants.items()}
        print(group, "; ".join(f"{label} {row['mean'][row['trained']]:.3f} +- {row['stderr'][row['trained']]:.3f}" for label, row in rows[group].items()), flush=True)
    (HERE / "ablations.json").write_text(json.dumps(rows, indent=1))
    plot(rows, HERE / "ablations.png")


if __name__ == "__main__":
    main()
