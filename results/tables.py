"""Writes the tables of both README.md, that of the project and the one here, from the JSON files beside this script: python results/tables.py

Every number between a pair of <!-- table: NAME --> and <!-- end --> comments comes from here, and a test compares. A file is
the results.json of the command that it names itself; NAME.seed1.json is that of the same command with --seed 1. Columns
"paper" quote its tables 2 to 6, at its sizes, not at ours.
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
    over_seeds = [stdev(step) / len(step) ** 0.5 if len(step) > 1 else 0 for step in zip(*(row["mean"] for row in rows))]
    over_tasks = [mean(step) for step in zip(*(row["stderr"] for row in rows))]
    inside = {key: merge([row[key] for row in rows]) for key in rows[0] if isinstance(rows[0][key], dict)}
    return rows[0] | inside | {"mean": [mean(step) for step in zip(*(row["mean"] for row in rows))], "stderr": list(map(math.hypot, over_tasks, over_seeds))}


def read(name):
    """The results of a command, averaged over the seeds that were run."""
    found = [load(path.stem) for path in (HERE / f"{name}.json", *sorted(HERE.glob(f"{name}.seed*.json")))]
    metrics, baselines = found[0]["metrics"], found[0]["baselines"]
    for split in metrics:
        metrics[split] = merge([r["metrics"][split] for r in found])
        for name in dict.fromkeys(name for r in found for name in r["baselines"][split]):  # some of causal graphs' are the model, too
            baselines[split][name] = merge([r["baselines"][split][name] for r in found if name in r["baselines"][split]])
    return found[0] | {"seeds": len(found), "cpu_seconds": mean(r["cpu_seconds"] for r in found)}


def at(row, step, digits=1, key=None):
    """Mean ± standard error of a row after `step` mini-batches; empty where the row has no such step."""
    part = row[key] if key else row
    if step not in row["steps"]:
        return ""
    i = row["steps"].index(step)
    return f"{part['mean'][i]:.{digits}f} ± {part['stderr'][i]:.{digits}f}"


def value(row, step):
    return row["mean"][row["steps"].index(step)]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def minutes(results):
    """Of the processor, for all of the run."""
    return f"{results['cpu_seconds'] / 60:.1f}"


def command(results):
    """As it would be given today: older implicit models of classes saw their whole state, regression had no clock, others moved in the span; now this takes flags."""
    args, text = results.get("args", {}), re.sub(" --(data-dir|out) [^ ]+| --overwrite", "", results["command"])
    text, edited, _ = text.partition(", edited")
    if script := re.match(r"python (linreg|mnist|imagenet)\.py", text):
        regime = args.get("regime") or (re.findall(r"--regime (\w+)", text) or ["parametric" if script[1] == "linreg" else "implicit"])[0]
        if regime == "implicit":
            text += " --state-scale 1" * (script[1] != "linreg" and "state_scale" not in args)
        else:
            text += " --decoder span" * (args.get("decoder", "span") == "span" and "--decoder" not in text)
        text += " --clock none" * (script[1] == "linreg" and args.get("clock", "none") == "none" and "--clock" not in text)
    return f"`{text}{edited}`"


# ---------------------------------------------------------------- one function a table


def quick():
    """The main commands: how long they take, what to expect, and what stands beside them after five mini-batches."""
    images, flow = ("logistic regression", "kernel ridge"), ("kernel density",)
    jobs = [
        *(("linreg" + regime, "id", 3, ("ridge, all seen",)) for regime in ("", "-explicit", "-implicit")),
        *(("mnist" + regime, "id", 1, images) for regime in ("", "-parametric", "-explicit")),
        *(("imagenet" + regime, "id", 1, images) for regime in ("", "-parametric", "-explicit")),
        *(("toposort", split, 2, ("random order",)) for split in ("rff_in_8", "lin_in_8")),
        ("mog_flow", "id", 2, flow), ("alphabets", "id", 2, flow),
    ]  # fmt: skip
    rows = []
    for name, split, digits, rivals in jobs:
        r, key = read(name), "excess" if rivals is flow else None
        m, beside = r["metrics"][split], r["baselines"][split]
        what = f"{m['name'].partition(',')[0]}{' (excess)' * bool(key)}: {m['data'].partition(' (')[0]}"
        others = "; ".join(f"{rival} {at(beside[rival], 5, digits, key).partition(' ')[0]}" for rival in rivals if rival in beside)
        rows.append([command(r), minutes(r), what, *(at(m, k, digits, key) for k in (1, 5)), others])
    rows.append(["any with `--preset paper`, one GPU", NOT_RUN] + [""] * 4)
    return table(["command", "minutes", "error", "after 1", "after 5", "beside it, after 5"], rows)


def linreg():
    """Squared error, its multiple of the oracle, and the paper at 5 steps (tables 2, 3 and 4)."""
    files = {"linreg": 0.5, "linreg-explicit": 2.6, "linreg-implicit": 6.2, "linreg-span": ""} | dict.fromkeys(("linreg-noclock", "linreg-explicit-noclock", "linreg-implicit-noclock"), "")
    found = {name: read(name) for name in files}
    rivals = found["linreg"]["baselines"]["id"]
    cells = lambda m: [*(at(m, k, 3) for k in (1, 5, 10)), f"{value(m, 5) / value(rivals['ridge, all seen'], 5):.2f}"]
    rows = [[command(r), r["seeds"], *cells(r["metrics"]["id"]), minutes(r), files[name]] for name, r in found.items()]
    rows += [[f"*{name}*", "", *cells(m), "", ""] for name, m in rivals.items()]
    return table(["command", "seeds", "1", "5", "10", "× oracle at 5", "minutes", "paper at 5"], rows)


def special():
    """Special cases of the framework, by the flags that make them, after as many steps as they are trained on."""
    names = {
        "hypernetwork": ("hypernetwork", "--regime parametric --steps 1", 1), "conditional neural process": ("cnp", "--regime explicit --steps 1", 1),
        "in-context learning": ("icl", "--regime implicit --steps 1", 1), "learned optimizer": ("grad", "--regime parametric --signal grad", 5),
    }  # fmt: skip
    rows = []
    for name, (file, flags, k) in names.items():
        found = read(f"linreg-{file}"), read(f"mnist-{file}")
        rows.append([name, f"`{flags}`", k, *(at(r["metrics"]["id"], k, digits) for r, digits in zip(found, (3, 1))), " and ".join(str(r["seeds"]) for r in found)])
    return table(["special case", "flags of `linreg.py` and `mnist.py`", "steps", "linear regression", "MNIST, error %", "seeds"], rows)


def lengths():
    """The headline rows, trained on 1, 5 and 10 mini-batches."""
    files = {
        "parametric regression": {"1": "linreg-hypernetwork", "5": "linreg", "10": "linreg-k10"},
        "the same, no clock": {"5": "linreg-noclock", "10": "linreg-k10-noclock"},
        "implicit regression": {"1": "linreg-icl", "5": "linreg-implicit", "10": "linreg-implicit-k10"},
        "the same, without one": {"5": "linreg-implicit-noclock", "10": "linreg-implicit-k10-noclock"},
        "implicit MNIST, error %": {"1": "mnist-icl", "5": "mnist", "10": "mnist-k10"},
        "the same, state seen whole": {"1": "mnist-loud-icl", "5": "mnist-loud", "10": "mnist-loud-k10"},
    }
    rows = []
    for label, names in files.items():
        for K, r in zip(names, map(read, names.values())):
            digits = 3 if r["script"] == "linreg" else 1
            rows.append([label if K == next(iter(names)) else "", K, command(r), r["seeds"], *(at(r["metrics"]["id"], k, digits) for k in (1, 2, 5, 10))])
    return table(["", "trained on", "command", "seeds", "1", "2", "5", "10"], rows)


def scaling():
    """Error far past the training length, at mini-batches of one size; the oracle has all that was seen."""
    steps, found = (1, 5, 10, 20, 50), [read(f"scaling-linreg{kind}") for kind in ("", "-explicit", "-implicit", "-noclock", "-implicit-noclock")]
    rows = [[command(r).replace(" --clock none", ""), *(at(r["metrics"]["id"], k, 3) for k in steps)] for r in found]  # the checkpoint knows
    rows.append(["*ridge, all seen*", *(at(found[0]["baselines"]["id"]["ridge, all seen"], k, 3) for k in steps)])
    return table(["squared error after", *steps], rows)


def race():
    """Rivals of the parametric regime on the same tasks, where each ends, and the model when it is as good."""
    results = load("race-linreg")
    rows = []
    for name, row in results["rows"].items():
        end = row["end"]
        ratio = "" if "faster" not in row else "never as good" if row["faster"] is None else f"{row['faster']:.2g} ×"
        rows.append([name, f"{row['mean'][end]:.3f} ± {row['stderr'][end]:.3f}", f"{1000 * row['seconds'][end]:.1f}", row["observations"][end], ratio])
    head = f"{command(results)}: {results['machine']}, {results['threads']} thread(s), {results['dtype']}, {results['batch']} tasks at once, seed {results['args']['seed']}."
    return head + "\n\n" + table(["", results["metric"], "ms", "observations seen", "its time / this model's to the same error"], rows)


def cost():
    """K steps on N observations each beside one step on K N."""
    text = []
    for name in ("cost-linreg", "cost-mnist"):
        found = load(name)
        rows = [[label, key, *(f"{v:.3g}" for v in found[form][field]), f"K^{found[form][key + '^']:.2f}" if key != found["metric"] else ""]
                for key, field in (("ms", "ms"), ("MB", "MB"), (found["metric"], "mean")) for form, label in (("steps", "K steps"), ("vote", "vote of K"), ("one", "one step"))]  # fmt: skip
        text.append(f"{command(found)}: {found['data']}, {found['args']['regime']}, {found['machine']}, {found['dtype']}.\n\n" + table(["", "", *(f"K = {k}" for k in found["steps"]["steps"]), "from K = 8"], rows))
    return "\n\n".join(text)


def ablations():
    """Short runs, three seeds; the difference from the first row of a group against its standard error."""
    found, rows = load("ablations"), []
    for group, variants in found.items():
        first = next(iter(variants.values()))
        for label, row in variants.items():
            K, last = first["trained"], row["steps"][-1]
            digits = 1 if row["name"] == "error %" else 3
            difference, noise = (row["mean"][K] - first["mean"][K], math.hypot(row["stderr"][K], first["stderr"][K]))
            verdict = "" if row is first else "tie" if abs(difference) <= 2 * noise else "better" if difference < 0 else "worse"
            rows.append([group if row is first else "", label, *(at(row, k, digits) for k in (1, K, last)), verdict, command(row)])
    rows += [[group, NOT_RUN, "", "", "", "", ""] for group in GROUPS if group not in found]
    return table(["what is varied", "value", "1", "5", "10", "against the first", "command"], rows)


def errors(files, paper):
    """Error in % of the files, one block a split, baselines below the models."""
    found, rows = [read(name) for name in files], []
    for split in found[0]["metrics"]:
        rows.append([f"**{found[0]['metrics'][split]['data']}**" + (" (out of distribution)" if split != "id" else "")])
        for r in found:
            quoted = paper.get((r["args"]["regime"], split), "") if r["args"].get("decoder") != "linear" or r["args"]["regime"] == "implicit" else ""
            rows.append([command(r), r["seeds"], *(at(r["metrics"][split], k) for k in (1, 2, 5, 10)), minutes(r) if split == "id" else "", quoted])
        beside = {name: row for r in found for name, row in r["baselines"][split].items()}  # of the same tasks in every file
        for name, row in beside.items():
            rows.append([f"*{name}*", "", *(at(row, k) for k in (1, 2, 5, 10))])
    return table(["error %", "seeds", "1", "2", "5", "10", "minutes", "paper at 1 / 5"], [row + [""] * (8 - len(row)) for row in rows])


def mnist():
    paper = {
        ("implicit", "id"): "24.9 / 12.4", ("implicit", "ood"): "31.9 / 26.1", ("parametric", "id"): "43.9 / 35.5",
        ("parametric", "ood"): "40.5 / 34.3", ("explicit", "id"): "89.2 / 88.7", ("explicit", "ood"): "90.0 / 90.0",
    }  # fmt: skip
    return errors(("mnist", "mnist-parametric", "mnist-span", "mnist-explicit"), paper)


def fmnist():
    """The other direction: trained on FashionMNIST."""
    paper = {("implicit", "id"): "22.8 / 18.8", ("implicit", "ood"): "29.1 / 16.9", ("parametric", "id"): "35.9 / 30.8", ("parametric", "ood"): "38.8 / 31.3"}
    return errors(("fmnist", "fmnist-parametric", "fmnist-explicit"), paper)


def imagenet():
    return errors(("imagenet", "imagenet-parametric", "imagenet-explicit"), {})  # other data: the paper's numbers say nothing here


def flow():
    """W2, and in brackets what it is above the floor of fresh samples; beside it the rows that a model has to beat."""
    rows = []
    for name in ("mog_flow", "alphabets"):
        results = read(name)
        for split, m in results["metrics"].items():
            beside = results["baselines"][split]

            def both(row, k):
                return f"{row['mean'][row['steps'].index(k)]:.2f} ({at(row, k, 2, 'excess')})"

            floor = next(row for key, row in beside.items() if "floor" in key)
            rows.append([
                command(results) + (", held-out letters" if split == "ood" else ""), results["seeds"], *(both(m, k) for k in (1, 5, 10)), f"{floor['mean'][0]:.2f}",
                both(beside["kernel density"], 5), both(beside["one Gaussian"], 5), minutes(results) if split == "id" else "",
            ])  # fmt: skip
    return table(["W₂ (excess)", "seeds", "after 1", "5", "10", "fresh points", "kernel density at 5", "one Gaussian at 5", "minutes"], rows)


def toposort():
    """Stage error of every column of table 5 that was run, at 1 and at K mini-batches, with the rivals at K."""
    results = read("toposort")
    K, names = results["args"]["steps"], list(results["metrics"])
    rows = [[f"this model, {k} mini-batch{'es' if k > 1 else ''}", *(at(results["metrics"][s], k, 3) for s in names)] for k in (1, K, 2 * K)]
    for name in results["baselines"][names[0]]:
        rows.append([f"*{name}*", *(at(results["baselines"][s][name], K, 3) for s in names)])
    for key, label in (("free", "free-running error"), ("violated", "share of edges violated")):
        rows.append([f"this model, {label}", *(at(results["metrics"][s], K, 3, key) for s in names)])
    where = f"{command(results)}: {results['seeds']} seed{'s' * (results['seeds'] > 1)}, {minutes(results)} minutes."
    return where + "\n\n" + table(["stage error", *(results["metrics"][s]["data"] for s in names)], rows)


def bench():
    """results/bench.json and the same at the paper's width, one row a script and regime; what is comparable are the ratios."""
    keys = {"ms": "ms", "sampling": "of it sampling", "x stock": "× stock", "x FLOP": "× products", "% peak": "% of peak", "% width": "% of its shape's", "x sum": "× its parts", "K^": "exponent in K", "MB 10/1": "memory, K 10 / 1"}
    text = []
    for name in ("bench", "bench-wide"):
        results = load(name)
        rows = [[f"`{r['script']}.py` {r['regime']}", *(f"{r['table'][key]:.3g}" for key in keys)] for r in results["rows"]]
        where = f"`{re.sub(' --(out|repeats) [^ ]+| --overwrite', '', results['command'])}`: {results['machine']}, {results['threads']} thread(s), {results['dtype']}, {results['date'][:10]}."
        text.append(where + "\n\n" + table(["a training step", *keys.values()], rows))
    return "\n\n".join(text) + sampler()


def sampler():
    results = load("sampler")
    found = {name: results[name] for name in ("lin", "rff")}
    rows = "; ".join(f"{name.upper()} {row['ms']:.2f} against {row['loop']:.2f} ms, {row['loop'] / row['ms']:.1f} times faster" for name, row in found.items())
    ours, loop = (sum(row[key] for row in found.values()) for key in ("ms", "loop"))
    return f"\n\nCausal graphs, a data set of {results['rows']} rows, {command(results)}: {rows} than a plain numpy loop; both in equal parts, as in training: {loop / ours:.1f} times."


TABLES = {"bench": bench, "quick": quick, "linreg": linreg, "special": special, "lengths": lengths, "mnist": mnist, "fmnist": fmnist, "imagenet": imagenet, "flow": flow, "toposort": toposort, "ablations": ablations, "scaling": scaling, "race": race, "cost": cost}


def fill(text):
    """The text of a page with every table made anew."""

    def replace(match):
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", replace, text, flags=re.S)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # it has no flags: --help must not write
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
