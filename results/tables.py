"""Writes the tables of both README.md, that of the project and the one here, from the JSON files beside this script: python results/tables.py

Every number between a pair of <!-- table: NAME --> and <!-- end --> comments comes from here, and a test compares. A file is
the results.json of the command that it names itself; NAME.seed1.json is that of the same command with --seed 1. Columns
and rows "paper" quote its tables 2 to 6, at its sizes, not at ours.
"""

import argparse
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

from ablations import GROUPS

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
NOT_RUN = "not run"


def load(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def merge(rows):
    """The same row of several seeds, averaged, and so are rows inside of it, such as the excess of a W2.

    Seeds share their evaluation tasks: a standard error holds the tasks' and the seeds'. Rivals that no seed touches stay as they are.
    """
    means, stderrs = (list(zip(*(row[key] for row in rows))) for key in ("mean", "stderr"))  # a tuple a step, of all seeds
    over_seeds = [stdev(step) / len(step) ** 0.5 if len(step) > 1 else 0 for step in means]
    inside = {key: merge([row[key] for row in rows]) for key in rows[0] if isinstance(rows[0][key], dict)}
    return rows[0] | inside | {"mean": list(map(mean, means)), "stderr": list(map(math.hypot, map(mean, stderrs), over_seeds))}


def read(file):
    """The results of a command, averaged over the seeds that were run."""
    found = [load(path.stem) for path in (HERE / f"{file}.json", *sorted(HERE.glob(f"{file}.seed*.json")))]
    metrics, baselines = found[0]["metrics"], found[0]["baselines"]
    for split in metrics:
        metrics[split] = merge([r["metrics"][split] for r in found])
        for name in dict.fromkeys(name for r in found for name in r["baselines"][split]):  # some of causal graphs' are the model, too
            baselines[split][name] = merge([r["baselines"][split][name] for r in found if name in r["baselines"][split]])
    return found[0] | {"file": file, "seeds": len(found), "cpu_seconds": mean(r["cpu_seconds"] for r in found)}


def value(row, step):
    return row["mean"][row["steps"].index(step)]


def at(row, step, digits=1, key=None):
    """Mean ± standard error of a row after `step` mini-batches; empty where the row has no such step."""
    if step not in row["steps"]:
        return ""
    part, i = row[key] if key else row, row["steps"].index(step)
    return f"{part['mean'][i]:.{digits}f} ± {part['stderr'][i]:.{digits}f}"


def cells(row, steps, digits=1, key=None):
    return [at(row, step, digits, key) for step in steps]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def minutes(results):
    """Of the processor, for all of the run; with a GPU those that training took, and its name, which is lost if evaluation was elsewhere."""
    replayed = results.get("args", {}).get("launch") == "graph"  # which takes a GPU
    gpu = "an " + results["machine"].removeprefix("NVIDIA ").split()[0] if results["device"] != "cpu" else "a GPU" * replayed
    return f"{results['train_seconds'] / 60:.1f} on {gpu}" if gpu else f"{results['cpu_seconds'] / 60:.1f}"


def command(results):
    """The command that gives these results with today's defaults. Older files have others: no clock in regression, --decoder
    span, and for implicit models of images --state-scale 1 --init random.

    Files "...-linear" are of implicit models from before these had another decoder.
    """
    text, edited, _ = re.sub(" --(data-dir|out) [^ ]+| --overwrite| --seed 0", "", results["command"]).partition(", edited")
    args, script = results.get("args", {}), text.split()[1]
    implicit = args.get("regime", "implicit") == "implicit"
    if implicit and script in ("mnist.py", "imagenet.py"):
        text += "".join(f" --{flag.replace('_', '-')} {value}" for flag, value in (("state_scale", "1"), ("init", "random")) if flag not in args)
    if "-linear" in results.get("file", ""):
        before, text = text, re.sub("(?<=--eval out/)[^/]+", results["file"].removeprefix("scaling-"), text)  # its checkpoint knows
        text += " --decoder linear" * (text == before)
    if " --eval " in text and args.get("launch") == "graph":  # trained on a GPU
        text, edited = f"python {script} --preset {args['preset']} --launch graph", ", then --eval on a CPU"
    if not implicit and args["decoder"] == "span" and "--decoder" not in text:
        text += " --decoder span"
    if script == "linreg.py" and args.get("clock", "none") == "none" and not re.search("--(clock|method)", text):
        text += " --clock none"
    return f"`{text}{edited}`"


# Tables 2 to 4 of the paper after 1, 5 and 10 steps: linear regression, MNIST, from there FashionMNIST, FashionMNIST, from there MNIST.
QUOTED = {
    ("parametric", "grad"): ("51.3 / 4.1 / 0.5", "76.2 / 48.6 / 39.7", "66.7 / 51.8 / 43.5", "63.8 / 41.6 / 38.1", "79.9 / 49.5 / 40.7"),
    ("parametric", "data"): ("16.3 / 0.5 / 0.3", "43.9 / 35.5 / 36.6", "40.5 / 34.3 / 35.3", "35.9 / 30.8 / 29.8", "38.8 / 31.3 / 29.1"),
    ("parametric", "both"): ("25.1 / 0.6 / 0.4", "52.3 / 39.2 / 32.0", "48.2 / 37.5 / 32.0", "37.7 / 32.0 / 30.5", "41.9 / 33.4 / 30.3"),
    ("explicit", "grad"): ("55.5 / 9.4 / 2.9", "90.4 / 86.9 / 81.4", "90.8 / 84.4 / 78.9", "88.2 / 70.8 / 56.4", "89.3 / 76.4 / 65.7"),
    ("explicit", "data"): ("19.7 / 2.6 / 2.4", "89.2 / 88.7 / 88.8", "90.0 / 90.0 / 90.0", "90.0 / 90.0 / 90.1", "90.3 / 90.2 / 90.2"),
    ("explicit", "both"): ("24.4 / 2.6 / 2.1", "72.5 / 67.1 / 75.1", "62.9 / 58.3 / 69.5", "51.1 / 47.5 / 45.1", "61.2 / 57.7 / 54.4"),
    ("implicit", "data"): ("14.8 / 6.2 / 4.7", "24.9 / 12.4 / 9.7", "31.9 / 26.1 / 24.2", "22.8 / 18.8 / 17.8", "29.1 / 16.9 / 15.7"),
}


def quoted(results):
    """What the paper has for the data of a run, in the order of its metrics; nothing where these are not the paper's."""
    args = results["args"]
    mine = {"linreg": slice(1), "fmnist": slice(3, 5), "auto": slice(1, 3), "mnist": slice(1, 3)}.get(args.get("dataset", results["script"]))
    return QUOTED[args["regime"], args["signal"]][mine] if mine else [""] * len(results["metrics"])


# ---------------------------------------------------------------- one function a table


def quick():
    """The main commands: how long they take, what to expect, and what stands beside them after five mini-batches."""
    images, flow = ("logistic regression", "kernel ridge"), ("kernel density",)
    jobs = [
        *(("linreg" + regime, "id", 3, ("ridge, all seen",)) for regime in ("", "-explicit", "-implicit")),
        *((script + regime, "id", 1, images) for script in ("mnist", "imagenet") for regime in ("", "-parametric", "-explicit")),
        *(("toposort", split, 2, ("random order",)) for split in ("rff_in_8", "lin_in_8")),
        *((script, "id", 2, flow) for script in ("mog_flow", "alphabets")),
        ("paper-linreg-implicit-gpu", "id", 3, ("ridge, all seen",)),
        *((f"paper-{data}-gpu", "id", 1, images) for data in ("mnist", "fmnist", "method-mnist")),
        *(("paper-toposort-gpu", split, 2, ("random order",)) for split in ("rff_in_20", "lin_in_20")),
        *((f"paper-{script}-gpu", "id", 2, flow) for script in ("mog_flow", "alphabets")),
    ]
    rows = []
    for name, split, digits, rivals in jobs:
        r, key = read(name), "excess" if rivals is flow else None
        m, beside = r["metrics"][split], r["baselines"][split]
        what = f"{m['name'].partition(',')[0]}{' (excess)' * bool(key)}: {m['data'].partition(' (')[0]}"
        others = "; ".join(f"{rival} {at(beside[rival], 5, digits, key).partition(' ')[0]}" for rival in rivals if rival in beside)
        rows.append([command(r), minutes(r), what, *cells(m, (1, 5), digits, key), others])
    rows.append(["any other with `--preset paper`, one GPU", NOT_RUN] + [""] * 4)
    return table(["command", "minutes", "error", "after 1", "after 5", "baselines after 5"], rows)


def linreg():
    """Squared error, its multiple of the oracle after 5, and the paper's after 1, 5 and 10 (tables 2, 3 and 4)."""
    files = ["linreg", "linreg-explicit", "linreg-implicit", "linreg-implicit-linear", "linreg-span", "linreg-noclock", "linreg-explicit-noclock", "linreg-implicit-noclock", "linreg-implicit-linear-noclock"]
    rivals = read("linreg")["baselines"]["id"]
    numbers = lambda m: [*cells(m, (1, 5, 10), 3), f"{value(m, 5) / value(rivals['ridge, all seen'], 5):.2f}"]
    rows = [[command(r), r["seeds"], *numbers(r["metrics"]["id"]), minutes(r), *quoted(r)] for r in map(read, files)]
    rows += [[f"*{name}*", "", *numbers(m), "", ""] for name, m in rivals.items()]
    return table(["command", "seeds", "1", "5", "10", "× oracle at 5", "minutes", "paper at 1 / 5 / 10"], rows)


def at_paper_sizes(files):
    """Tasks of the paper's dimensions and mini-batches, models of laptop size and (-gpu) of the paper preset; beside them its own errors (tables 2 to 4, rows "data")."""
    rows = []
    for r in map(read, files):
        for (split, m), theirs in zip(r["metrics"].items(), quoted(r)):
            rival, digits = ("ridge, all seen", 3) if r["script"] == "linreg" else ("kernel ridge", 1)
            first = [command(r), r["seeds"], minutes(r)] if split == "id" else ["the same, out of distribution", "", ""]
            rows.append([*first, m["data"], *cells(m, (1, 5, 10), digits), theirs, f"{rival} {value(r['baselines'][split][rival], 5):.{digits}f}"])
    return table(["command", "seeds", "minutes", "data", "after 1", "5", "10", "paper after 1 / 5 / 10", "baselines after 5"], rows)


def paper():
    files = [f"paper-linreg{kind}" for kind in ("", "-explicit", "-implicit", "-implicit-gpu")]
    files += [f"paper-mnist{kind}" for kind in ("-parametric", "-explicit", "", "-gpu")]
    return at_paper_sizes([*files, "paper-method-mnist-gpu", "paper-fmnist-gpu", "paper-method-fmnist-gpu"])


def variants():
    """More of the same: read off one token, trained for longer, on images that are not centred, a wider model for as long, and small models trained on FashionMNIST."""
    files = ["paper-linreg-implicit-linear", *(f"paper-mnist{kind}" for kind in ("-linear", "-long", "-wide", "-raw", "-raw-gpu"))]
    return at_paper_sizes([*files, *(f"paper-fmnist{kind}" for kind in ("", "-long", "-raw", "-raw-gpu"))])


def signals():
    """The paper's tables 2 to 4 row by row, each beside ours at its task sizes."""

    def ours(row, digits):
        return f"{value(row, 1):.{digits}f} / {at(row, 5, digits)} / {value(row, 10):.{digits}f}"

    rows = []
    for (regime, signal), theirs in QUOTED.items():
        end = f"-{signal}" * (signal != "data")
        files = "paper-linreg" + f"-{regime}" * (regime != "parametric"), *(f"paper-{data}" + f"-{regime}" * (regime != "implicit") for data in ("mnist", "fmnist"))
        found = [read(file + end)["metrics"].values() if (HERE / f"{file}{end}.json").exists() else None for file in files]
        mine = [[ours(m, 1 + 2 * (i == 0)) for m in metrics] if metrics else [NOT_RUN] * (1 + (i > 0)) for i, metrics in enumerate(found)]
        rows += [[regime, signal, "here", *sum(mine, [])], ["", "", "paper", *theirs]]
    for label, kind in (("here, preset paper", ""), ("here, preset and method paper", "method-")):
        large = [ours(m, 1) for data in ("mnist", "fmnist") for m in read(f"paper-{kind}{data}-gpu")["metrics"].values()]
        regression = NOT_RUN if kind else ours(read("paper-linreg-implicit-gpu")["metrics"]["id"], 3)
        rows.insert(-1, ["", "", label, regression, *large])
    return table(["regime", "signal", "", "linear regression", "MNIST", "→ FashionMNIST", "FashionMNIST", "→ MNIST"], rows)


def method():
    """The paper's choices, all at once, beside this code's."""
    pairs = {
        "method-linreg-parametric": "linreg", "method-linreg-explicit": "linreg-explicit", "method-linreg-implicit": "linreg-implicit",
        "method-mnist-parametric": "mnist-parametric", "method-mnist-parametric-slow": "mnist-parametric", "paper-method-mnist-parametric-gpu": "paper-mnist-parametric",
        "method-mnist-explicit": "mnist-explicit", "method-mnist-implicit": "mnist", "paper-method-mnist-gpu": "paper-mnist-gpu", "paper-method-fmnist-gpu": "paper-fmnist-gpu",
    }  # fmt: skip
    rows = []
    for theirs, ours in ((read(name), read(pair)) for name, pair in pairs.items()):
        m, digits = theirs["metrics"]["id"], 3 if theirs["script"] == "linreg" else 1
        beside = " / ".join(f"{value(ours['metrics']['id'], k):.{digits}f}" for k in (1, 5, 10))
        rows.append([command(theirs), theirs["seeds"], minutes(theirs), m["name"], *cells(m, (1, 5, 10), digits), beside])
    return table(["command", "seeds", "minutes", "error", "after 1", "5", "10", "this code's choices after 1 / 5 / 10"], rows)


def special():
    """Special cases of the framework, by the flags that make them, after as many steps as they are trained on."""
    rows = []
    for name, files, flags, k in (
        ("hypernetwork", ("linreg-hypernetwork", "mnist-hypernetwork"), "`--regime parametric --steps 1`", 1),
        ("conditional neural process", ("linreg-cnp", "mnist-cnp"), "`--regime explicit --steps 1`", 1),
        ("in-context learning", ("linreg-icl-linear", "mnist-linear-loud-icl"), "`--regime implicit --decoder linear --steps 1`", 1),
        ("learned optimizer", ("linreg-grad", "mnist-grad"), "`--regime parametric --signal grad`", 5),
    ):
        regression, images = map(read, files)
        errors = at(regression["metrics"]["id"], k, 3), at(images["metrics"]["id"], k)
        rows.append([name, flags, k, *errors, f"{regression['seeds']} and {images['seeds']}"])
    return table(["special case", "flags of `linreg.py` and `mnist.py`", "steps", "linear regression", "MNIST, error %", "seeds"], rows)


def lengths():
    """The headline rows, trained on 1, 5 and 10 mini-batches."""
    files = {
        "parametric regression": ("linreg-hypernetwork", "linreg", "linreg-k10"),
        "parametric regression, no clock": ("linreg-noclock", "linreg-k10-noclock"),
        "implicit regression": ("linreg-icl", "linreg-implicit", "linreg-implicit-k10"),
        "the same, read off one token": ("linreg-icl-linear", "linreg-implicit-linear", "linreg-implicit-linear-k10"),
        "the same, no clock": ("linreg-implicit-linear-noclock", "linreg-implicit-linear-k10-noclock"),
        "implicit MNIST, error %": ("mnist-k1", "mnist", "mnist-k10"),
        "the same, read off one token, from random weights, state seen whole": ("mnist-linear-loud-icl", "mnist-linear-loud", "mnist-linear-loud-k10"),
    }
    rows = []
    for label, names in files.items():
        for r in map(read, names):
            digits = 3 if r["script"] == "linreg" else 1
            rows.append([label, r["args"]["steps"], command(r), r["seeds"], *cells(r["metrics"]["id"], (1, 2, 5, 10), digits)])
            label = ""  # once is enough
    return table(["", "trained on", "command", "seeds", "1", "2", "5", "10"], rows)


def scaling():
    """Error far past the training length, at mini-batches of one size; the oracle has all that was seen."""
    steps, found = (1, 5, 10, 20, 50), [read(f"scaling-linreg{kind}") for kind in ("", "-explicit", "-implicit", "-implicit-linear", "-noclock", "-implicit-linear-noclock")]
    rows = [[command(r).replace(" --clock none", ""), *cells(r["metrics"]["id"], steps, 3)] for r in found]  # the checkpoint knows
    rows.append(["*ridge, all seen*", *cells(found[0]["baselines"]["id"]["ridge, all seen"], steps, 3)])
    return table(["squared error after", *steps], rows)


def race():
    """Rivals of the parametric regime on the same tasks, where each ends, and the model when it is as good."""
    r, rows = load("race-linreg"), []
    for name, row in r["rows"].items():
        end, step = row["end"], row["steps"][row["end"]]
        ratio = "" if "faster" not in row else "never as good" if row["faster"] is None else f"{row['faster']:.2g} ×"
        rows.append([name, at(row, step, 3), f"{1000 * row['seconds'][end]:.1f}", row["observations"][end], ratio])
    head = f"{command(r)}: {r['machine']}, {r['threads']} thread(s), {r['dtype']}, {r['batch']} tasks at once, seed {r['args']['seed']}."
    return head + "\n\n" + table(["", r["metric"], "ms", "observations seen", "its time / this model's to the same error"], rows)


def cost():
    """K steps on N observations each beside one step on K N."""
    text = []
    for r in (load("cost-linreg"), load("cost-mnist")):
        rows = []
        for key, field in (("ms", "ms"), ("MB", "MB"), (r["metric"], "mean")):
            for form, label in (("steps", "K steps"), ("vote", "vote of K"), ("one", "one step")):
                growth = "" if field == "mean" else f"K^{r[form][key + '^']:.2f}"
                rows.append([label, key, *(f"{v:.3g}" for v in r[form][field]), growth])
        text.append(f"{command(r)}: {r['data']}, {r['args']['regime']}, {r['machine']}, {r['dtype']}.")
        text.append(table(["", "", *(f"K = {k}" for k in r["steps"]["steps"]), "from K = 8"], rows))
    return "\n\n".join(text)


def ablations():
    """Short runs, three seeds; the difference from the first row of a group against its standard error: 2.8 of them are 5% by Student's t."""
    found, rows = load("ablations"), []
    for group, variants in found.items():
        first = next(iter(variants.values()))
        for label, row in variants.items():
            row["file"] = "ablations-linear" if "--decoder linear" in GROUPS[group][0] and "--decoder" not in row["command"] else "ablations"
            K, last = first["trained"], row["steps"][-1]
            difference, noise = (row["mean"][K] - first["mean"][K], math.hypot(row["stderr"][K], first["stderr"][K]))
            verdict = "" if row is first else "tie" if abs(difference) <= 2.8 * noise else "better" if difference < 0 else "worse"
            digits = 1 if row["name"] == "error %" else 3
            rows.append([group if row is first else "", label, *cells(row, (1, K, last), digits), verdict, command(row)])
    rows += [[group, NOT_RUN, "", "", "", "", ""] for group in GROUPS if group not in found]
    return table(["what is varied", "value", "1", "5", "10", "against the first", "command"], rows)


def errors(files):
    """Error in % of the files, each with what the paper has; one block a split, baselines below the models."""
    found, rows = list(map(read, files)), []
    for i, (split, m) in enumerate(found[0]["metrics"].items()):
        rows.append([f"**{m['data']}**" + (" (out of distribution)" if split != "id" else ""), *[""] * 7])
        for r in found:
            rows.append([command(r), r["seeds"], *cells(r["metrics"][split], (1, 2, 5, 10)), minutes(r) if split == "id" else "", quoted(r)[i]])
        beside = {name: row for r in found for name, row in r["baselines"][split].items()}  # of the same tasks in every file
        rows += [[f"*{name}*", "", *cells(row, (1, 2, 5, 10)), "", ""] for name, row in beside.items()]
    return table(["error %", "seeds", "1", "2", "5", "10", "minutes", "paper at 1 / 5 / 10"], rows)


def mnist():
    return errors(("mnist", "mnist-raw", "mnist-linear", "mnist-linear-random", "mnist-parametric", "mnist-span", "mnist-explicit"))


def fmnist():
    """The other direction: trained on FashionMNIST."""
    return errors(("fmnist", "fmnist-linear", "fmnist-parametric", "fmnist-explicit"))


def imagenet():
    """Other data: the paper's numbers say nothing here."""
    return errors(("imagenet", "imagenet-linear", "imagenet-linear-random", "imagenet-parametric", "imagenet-explicit"))


def flow():
    """W2, and in brackets what it is above the floor of fresh samples; beside it the rows that a model has to beat."""
    both, rows = lambda row, k: f"{value(row, k):.2f} ({at(row, k, 2, 'excess')})", []
    for r in map(read, ("mog_flow", "paper-mog_flow", "paper-mog_flow-gpu", "paper-mog_flow-5d", "alphabets", "paper-alphabets-gpu")):
        for split, m in r["metrics"].items():
            beside = r["baselines"][split]
            rows.append([
                command(r) + (", held-out letters" if split == "ood" else ""), r["seeds"], *(both(m, k) for k in (1, 5, 10)), f"{beside['fresh samples (floor)']['mean'][0]:.2f}",
                *(both(beside["kernel density"], k) for k in (1, 5, 10)), at(beside["exact field, same solver"], 5, 2, "excess"),
                at(beside["one Gaussian"], 5, 2, "excess"), minutes(r) if split == "id" else "",
            ])  # fmt: skip
    return table(["W₂ (excess)", "seeds", "after 1", "5", "10", "fresh points", "kernel density at 1", "5", "10", "exact field (excess)", "one Gaussian (excess)", "minutes"], rows)


def generation():
    """Table 6 of the paper: W2 / W1, beside those of as many fresh points, and of rivals after 5."""
    both = lambda row, k: f"{value(row, k):.2f} / {row['w1']['mean'][row['steps'].index(k)]:.2f}"
    plane, space = ("1.12 / 0.58", "0.90 / 0.38", "0.81 / 0.32"), ("3.27 / 1.82", "2.50 / 1.05", "2.37 / 0.95")  # after 1, 5 and 10
    letters, held_out = ("0.28 / 0.20", "0.31 / 0.22", "0.29 / 0.21"), ("0.78 / 0.64", "0.72 / 0.58", "0.67 / 0.54")
    rows = []
    for name, split, paper in (
        ("paper-mog_flow", "id", plane), ("paper-mog_flow-gpu", "id", plane), ("paper-mog_flow-5d", "id", space),
        ("alphabets", "id", letters), ("paper-alphabets-gpu", "id", letters), ("alphabets", "ood", held_out), ("paper-alphabets-gpu", "ood", held_out),
    ):  # fmt: skip
        r = read(name)
        m, beside = r["metrics"][split], r["baselines"][split]
        rivals = (both(beside[name], 5) for name in ("fresh samples (floor)", "exact field, same solver", "kernel density", "context resampled"))
        rows.append([m["data"], r["args"]["points"], *(both(m, k) for k in (1, 5, 10)), *rivals, *paper])
    return table(["W₂ / W₁", "points", "after 1", "5", "10", "fresh points", "exact field", "kernel density at 5", "resampled at 5", "paper after 1", "5", "10"], rows)


def toposort(name="toposort", paper=None, rivals=None):
    """Stage error of every column of table 5, at 1, K and 2 K mini-batches, with (some) rivals at K; and the paper's own, {mini-batches: cells}."""
    r = read(name)
    K, metrics, baselines = r["args"]["steps"], r["metrics"].values(), r["baselines"].values()
    batches = lambda k: f"{k} mini-batch{'es' if k > 1 else ''}"
    rows = [[f"this model, {batches(k)}", *(at(m, k, 3) for m in metrics)] for k in (1, K, 2 * K)]
    rows += [[f"the paper's, {batches(k)}", *cells.split()] for k, cells in (paper or {}).items()]
    rows += [[f"*{name}*", *(at(beside[name], K, 3) for beside in baselines)] for name in rivals or next(iter(baselines))]
    for key, label in (("free", "free-running error"), ("violated", "share of edges violated")):
        rows.append([f"this model, {label}", *(at(m, K, 3, key) for m in metrics)])
    where = f"{command(r)}: {r['seeds']} seed{'s' * (r['seeds'] > 1)}; minutes: {minutes(r)}."
    return where + "\n\n" + table(["stage error", *(m["data"] for m in metrics)], rows)


def graphs():
    """The same at the paper's sizes, beside its table 5; then a smaller model, on other graphs."""
    one, five, ten = ".52 .43 .64 .51 .70 .66 .78 .69", ".52 .35 .68 .33 .66 .56 .74 .67", ".44 .37 .66 .61 .64 .52 .77 .73"
    small = toposort("paper-toposort", rivals=("vote, no state", "one step on all rows", "random order"))
    return toposort("paper-toposort-gpu", {1: one, 5: five, 10: ten}) + "\n\n" + small


def bench():
    """results/bench.json, implicit models that solve, the paper's width, and a GPU, one row a script and regime; what is comparable are the ratios."""
    columns = ("ms", "sampling", "x stock", "x limit", "x FLOP", "% peak", "% width", "x sum", "K^", "MB 10/1")
    text = []
    for r in (load("bench"), load("bench-solve"), load("bench-wide"), load("bench-gpu")):
        unlike = ("x limit", "x sum") if r["device"] != "cpu" else ()  # replayed steps, and parts that were launched one by one
        rows = [[f"`{row['script']}.py` {row['regime']}", *("" if key in unlike else f"{row['table'][key]:.3g}" for key in columns)] for row in r["rows"]]
        text.append(f"{command(r)}: {r['machine']}, {r['threads']} thread(s), {r['dtype']}, {r['date'][:10]}.")
        text.append(table(["a training step", *columns], rows))
    return "\n\n".join([*text, sampler()])


def sampler():
    r = load("sampler")
    found = {"LIN": r["lin"], "RFF": r["rff"]}
    rows = "; ".join(f"{name} {row['ms']:.2f} against {row['loop']:.2f} ms, {row['loop'] / row['ms']:.1f} times faster" for name, row in found.items())
    ours, loop = (sum(row[key] for row in found.values()) for key in ("ms", "loop"))
    what = f"Causal graphs, a data set of {r['rows']} rows, {command(r)}: {rows} than a plain numpy loop"
    return f"{what}; both in equal parts, as in training: {loop / ours:.1f} times."


TABLES = {f.__name__: f for f in (bench, quick, linreg, paper, signals, variants, method, special, lengths, mnist, fmnist, imagenet, flow, generation, toposort, graphs, ablations, scaling, race, cost)}


def fill(text):
    """The text of a page with every table made anew."""
    anew = lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", anew, text, flags=re.S)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # it has no flags: --help must not write
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
