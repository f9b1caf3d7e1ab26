"""One change at a time, three seeds each, in short runs: python results/ablations.py [GROUP ...]

Runs whatever out/ablations does not hold yet (more than four hours on one core; it may be stopped and started again), then
writes ablations.json and ablations.png beside this script. Groups that are named are run alone, and take the place of those
in ablations.json.

A change is a few flags, or an edit of the code, as in the README's exercises, which is made in a copy under out/ablations.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = ROOT / "out" / "ablations"
SEEDS = (0, 1, 2)
SHORT = "linreg.py --dim 8 --context 15 --iters 500"
LINREG = SHORT + " --clock none"
MNIST = "mnist.py --dim 50 --iters 300"
PLAIN = " --regime implicit --decoder linear"  # the paper's in-context learner

# The edits: (file, what stands there, what is put in its place).
EDITS = {
    "random-sizes": [("common.py", "return torch.where(torch.rand(shape, device=device) < 0.5, N, uniform)", "return uniform")],
    "two-steps": [
        ("common.py", "past = [state.detach() for state in", "past = [state.detach() if step % 2 else state for state in"),
        ("linreg.py", ".backward()", ".backward(retain_graph=True)"),  # the second loss passes the first one's graph again
    ],
    "step-0": [
        ("linreg.py", "        losses = []\n", """        losses = []
        untouched = model.predict(model.initial_state(task.query_x)[None], task.query_x)
        (objective(untouched, task.query_y) / args.steps).backward()
"""),
    ],
    "own-weights": [
        ("linreg.py", "import torch\n", "import copy\n\nimport torch\n"),
        ("linreg.py", "    return common.place(common.REGIMES[args.regime](args, args.dim, 1, loss, basis), args)", """    model = common.REGIMES[args.regime](args, args.dim, 1, loss, basis)
    model.later = nn.ModuleList(copy.deepcopy(model) for _ in range(args.steps - 1))
    for step in model.later:
        step.transformer.dtype = getattr(torch, args.dtype)
    return common.place(model, args)"""),
        ("common.py", "states = model.update(", "states = [model, *model.later][min(step, len(model.later))].update("),
    ],
    "unit-gradients": [("common.py", "torch.cat([self.gradients(r, phi) for", "torch.cat([F.normalize(self.gradients(r, phi), dim=-1) for")],
    "attention-only": [("common.py", "new = new + self.carry_over(x, wanted, query_x, visible)", "pass")],
    "carry-over-only": [("common.py", "new = new + self.carry_over(", "new = self.carry_over(")],
    "new-images": [("mnist.py", "= common.share(sample_tasks(images,", '= common.share(sample_tasks({"train": images["train"], "test": images["train"]},')],
    "loud-bias": [("mnist.py", "F.pad(x, (0, 1), value=1.0) * x", "F.pad(x, (0, 1), value=x.shape[-1] ** 0.5) * x")],
}  # fmt: skip

# What is varied -> the command of all, and each variant's flags or edit. The first variant is the one that the others are held against.
GROUPS = {
    "signal (parametric)": (LINREG, {"data": "", "grad": "--signal grad", "both": "--signal both"}),
    "history (parametric, signal grad)": (LINREG + " --signal grad", {"1": "", "3": "--history 3", "5": "--history 5"}),
    "mask (parametric)": (LINREG, {"none": "", "causal": "--mask causal"}),
    "mask (explicit)": (LINREG + " --regime explicit", {"none": "", "causal": "--mask causal"}),
    "mask (implicit, decoder linear)": (LINREG + PLAIN, {"none": "", "causal": "--mask causal"}),
    "sizes in training (parametric)": (LINREG, {"half are whole": "", "random": "random-sizes"}),
    "sizes in training (implicit, decoder linear)": (LINREG + PLAIN, {"half are whole": "", "random": "random-sizes"}),
    "latent tokens (explicit, decoder linear)": (LINREG + " --regime explicit --decoder linear", {"1": "", "4": "--latent-tokens 4", "8": "--latent-tokens 8"}),
    "output (parametric, decoder linear)": (LINREG + " --decoder linear", {"a change": "", "the next state": "--update direct"}),
    "output (implicit, decoder linear)": (LINREG + PLAIN, {"a change": "", "the next state": "--update direct"}),
    "clock (parametric)": (SHORT, {"none": "--clock none", "steps": ""}),
    "clock (explicit)": (SHORT + " --regime explicit", {"none": "--clock none", "steps": ""}),
    "clock (implicit)": (SHORT + " --regime implicit", {"none": "--clock none", "steps": ""}),
    "clock (implicit, decoder linear)": (SHORT + PLAIN, {"none": "--clock none", "steps": ""}),
    "state that a query sees (implicit, decoder linear)": (LINREG + PLAIN, {"all": "", "a tenth": "--state-scale 0.1", "none": "--state-scale 0"}),
    "attention (parametric)": (LINREG, {"linear": "", "softmax": "--attention softmax"}),
    "attention (implicit, decoder linear)": (LINREG + PLAIN, {"linear": "", "softmax": "--attention softmax", "softmax, own keys": "--attention softmax --init torch"}),
    "keys start (implicit)": (LINREG + " --regime implicit", {"as queries": "", "apart": "--init torch"}),
    "keys start (implicit, decoder linear)": (LINREG + PLAIN, {"as queries": "", "apart": "--init torch"}),
    "decoder (parametric)": (LINREG, {"solve": "", "span": "--decoder span", "linear": "--decoder linear"}),
    "decoder (explicit)": (LINREG + " --regime explicit", {"solve": "", "span": "--decoder span", "linear": "--decoder linear"}),
    "decoder (implicit)": (LINREG + " --regime implicit", {"solve": "", "linear": "--decoder linear"}),
    "residuals reach queries by (implicit)": (LINREG + " --regime implicit", {"both": "", "attention": "attention-only", "carry_over": "carry-over-only"}),
    "MNIST: decoder (parametric)": (MNIST + " --regime parametric", {"solve": "", "span": "--decoder span", "linear": "--decoder linear"}),
    "MNIST: decoder (explicit)": (MNIST + " --regime explicit", {"solve": "", "span": "--decoder span"}),
    "MNIST: basis (explicit)": (MNIST + " --regime explicit", {"fourier": "", "linear": "--basis linear --hidden 100"}),
    "MNIST: decoder (implicit)": (MNIST, {"solve": "", "linear": "--decoder linear"}),
    "MNIST: residuals reach queries by (implicit)": (MNIST, {"both": "", "attention": "attention-only", "carry_over": "carry-over-only"}),
    "MNIST: encoder, keys and queries start as (implicit, decoder linear)": (MNIST + PLAIN, {"rotations": "", "random": "--init random", "keys apart": "--init torch"}),
    "MNIST: output (implicit, decoder linear)": (MNIST + PLAIN, {"a change": "", "the next state": "--update direct"}),
    "MNIST: state that a query sees (implicit, decoder linear)": (MNIST + PLAIN, {"a tenth": "", "all": "--state-scale 1", "none": "--state-scale 0"}),
    "dtype (parametric)": (LINREG, {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}),
    "MNIST: clock (implicit)": (MNIST, {"none": "", "steps": "--clock steps"}),
    "MNIST: clock (implicit, decoder linear)": (MNIST + PLAIN, {"none": "", "steps": "--clock steps"}),
    "MNIST: dtype (implicit, decoder linear)": (MNIST + PLAIN + " --init random --state-scale 1", {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}),
    "MNIST: dtype (implicit)": (MNIST, {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}),
    "MNIST: state (implicit, decoder linear)": (MNIST + PLAIN, {"logits": "", "softmax": "--state softmax --state-scale 1", "latent": "--state latent --state-scale 1"}),
    "exercise 1: steps in training (parametric)": (LINREG, {"5": "", "1": "--steps 1 --eval-steps 10"}),
    "exercise 5: detached (parametric)": (LINREG, {"every step": "", "every other step": "two-steps"}),
    "exercise 6: a loss before any data (parametric)": (LINREG, {"no": "", "yes": "step-0"}),
    "exercise 7: weights (parametric)": (LINREG, {"shared": "", "own for each step": "own-weights"}),
    "exercise 8: gradient tokens (parametric, signal grad)": (LINREG + " --signal grad", {"as they are": "", "unit length": "unit-gradients"}),
    "MNIST, exercise 10: bias (parametric)": (MNIST + " --regime parametric", {"one more feature": "", "√dim times that": "loud-bias"}),
    "MNIST, exercise 14, the main job: queries in training (implicit)": ("mnist.py", {"test images": "", "training images": "new-images"}),
    "MNIST, exercise 15, the main job: images (implicit)": ("mnist.py", {"centred": "", "as they are": "--images raw"}),
    "MNIST, exercise 15: images (implicit, decoder linear)": (MNIST + PLAIN, {"centred": "", "as they are": "--images raw"}),
    "MNIST, exercise 15: images (parametric)": (MNIST + " --regime parametric", {"centred": "", "as they are": "--images raw"}),
}


def edited(change):
    """-> a folder with a copy of the scripts, edited; each edit must fit exactly one place."""
    folder = OUT / f"code-{change}"
    folder.mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for name, old, new in EDITS[change]:
        text = (folder / name).read_text()
        if text.count(old) != 1:
            sys.exit(f"error: {name} has {text.count(old)} times, not once: {old.strip()}")
        (folder / name).write_text(text.replace(old, new))
    return folder


def whole(file):
    """Whether these are results of a run that was not stopped early."""
    return file.exists() and (found := json.loads(file.read_text()))["iterations"] == found["args"]["iters"]


def run(base, change, seed):
    """-> the results of a finished run; starts it, or goes on with it, where there is none. `change` is flags, or the name of an edit."""
    code, flags = (edited(change), "") if change in EDITS else (ROOT, change)
    real = ["--dataset", "mnist"] * base.startswith("mnist.py")  # the default, where it is there: never drawn digits in its place
    words = [*base.split(), *real, *flags.split(), "--seed", str(seed)]
    folder = OUT / re.sub("-+", "-", "-".join(words + [change] * (code != ROOT)).replace(".py", ""))
    file = folder / "results.json"
    if not whole(file):
        where = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else ["--out", str(folder)]
        env = os.environ | {"IAI_DATA": os.path.abspath(os.environ.get("IAI_DATA") or ROOT / "data")}  # a copy finds the same data
        done = subprocess.run([sys.executable, *words, *where], cwd=code, env=env, stdout=subprocess.DEVNULL)
        if done.returncode or not whole(file):
            sys.exit(f"error: python {shlex.join(words)} ended with code {done.returncode}")
    return json.loads(file.read_text())


def summarize(base, change):
    """Mean over seeds at each step, and its standard error; the evaluation tasks are the same for all seeds."""
    found = [run(base, change, seed) for seed in SEEDS]
    metric = [r["metrics"]["id"] for r in found]
    seeds = [m["mean"] for m in metric]  # (seeds, steps)
    what = f"python {base}, edited" if change in EDITS else f"python {base} {change}".strip()
    return {
        "command": what, "args": found[0]["args"], "data": metric[0]["data"], "name": metric[0]["name"], "steps": metric[0]["steps"], "trained": found[0]["args"]["steps"],
        "seeds": seeds, "seed_numbers": SEEDS, "mean": [mean(step) for step in zip(*seeds)], "stderr": [stdev(step) / len(SEEDS) ** 0.5 for step in zip(*seeds)],
        "tasks": metric[0]["tasks"], "cpu_seconds": [r["cpu_seconds"] for r in found], "machine": found[0]["machine"], "torch": found[0]["torch"],
    }  # fmt: skip


def differ(one, other):
    """Whether two variants are more than 2.8 standard errors (5% by Student's t, three seeds each), and 2%, apart after the trained steps or later."""
    limit = lambda k: max(2.8 * math.hypot(one["stderr"][k], other["stderr"][k]), 0.02 * one["mean"][k])
    return any(abs(one["mean"][k] - other["mean"][k]) > limit(k) for k in range(one["trained"], len(one["mean"])))


def plot(rows, path):
    """The groups whose variants differ: of the others, curves lie on each other."""
    sys.path.insert(0, str(ROOT))
    import common  # here: it brings torch, which nothing else needs

    rows = {group: variants for group, variants in rows.items() if any(differ(*pair) for pair in itertools.combinations(variants.values(), 2))}
    lines = -(-len(rows) // 3)
    fig = common.Figure((10.5, 2.9 * lines))
    axes = fig.subplots(lines, 3, squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.axis("off")
    for ax, (group, variants) in zip(axes.flat, rows.items()):
        for color, marker, (label, row) in zip(common.COLORS, "osD", variants.items()):
            ax.errorbar(row["steps"][1:], row["mean"][1:], row["stderr"][1:], fmt=f"{marker}-", color=color, ms=4, lw=1.5, capsize=2, label=label)
        ax.axvline(next(iter(variants.values()))["trained"], color="0.7", lw=1, zorder=0)
        ax.set_title(textwrap.fill(group, 40), fontsize=10)
        ax.set(xlabel="mini-batches seen", ylabel=row["name"])
        if row["name"] != "error %":
            common.log_axis(ax, "y")
        ax.legend(fontsize=9)
        ax.grid(alpha=0.3)
    data = dict.fromkeys(row["data"] for variants in rows.values() for row in variants.values())
    title = f"What makes a difference: variants more than 2% apart after the trained steps (grey line): {'; '.join(data)}; seeds {', '.join(map(str, SEEDS))}"
    fig.suptitle(textwrap.fill(title, 110), fontsize=11)
    fig.tight_layout(rect=(0, 0, 1, 0.99))
    common.save_figure(fig, path, dpi=100)


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of groups need not fit its encoding
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="GROUP", help="; ".join(GROUPS))
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    names = parser.parse_args().names
    if wrong := [name for name in names if name not in GROUPS]:
        parser.error(f"{wrong[0]!r} is none of: " + "; ".join(GROUPS))
    file = HERE / "ablations.json"
    rows = json.loads(file.read_text()) if names and file.exists() else {}
    for group in names or GROUPS:
        base, variants = GROUPS[group]
        rows[group] = {label: summarize(base, change) for label, change in variants.items()}
        print(group, "; ".join(f"{label} {row['mean'][5]:.3f} +- {row['stderr'][5]:.3f}" for label, row in rows[group].items()), flush=True)
    rows = {group: rows[group] for group in GROUPS if group in rows}
    file.write_text(json.dumps(rows, indent=1))
    plot(rows, str(HERE / "ablations.png"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
