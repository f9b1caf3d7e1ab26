"""Faults that no test saw: what evaluations, timers, plots and defaults do, each against numbers made here."""

import importlib
import json
import math
import os
import shlex
from argparse import Namespace

import numpy as np
import pytest
import torch

import ablations
import bench
import common
import cost
import imagenet
import linreg
import mnist
import mog_flow
import race
import reports
import sampler
import tables
import toposort
from conftest import ROOT
from test_flow import mog_args
from test_toposort import make_model, toposort_args


# ---- evaluation


@torch.no_grad()
def test_graphs_are_evaluated_on_whole_mini_batches_after_training():
    """Trained models come in training mode, in which sizes are drawn."""
    model, args = make_model(), toposort_args(eval_tasks=8, steps=2)
    expected, _ = toposort.compare(model.eval(), args, "rff", "in", 6)
    assert toposort.compare(model.train(), args, "rff", "in", 6)[0] == expected


FLOW = dict(width=16, heads=2, depth=2, history=1, mask="causal", state="logits", attention="softmax", update="residual", clock="none", state_scale=1.0, init="random", decoder="linear", ode_steps=2, seed=0, checkpoint=None, reason="as asked", regime="implicit", dtype="float32", compile=False, points=9, steps=2, eval_tasks=3)


@torch.no_grad()
def test_flows_are_evaluated_on_whole_mini_batches_in_the_units_of_the_data(tmp_path):
    args = mog_args(out=str(tmp_path), **FLOW)
    model = mog_flow.make_model(args)
    metrics, baselines = mog_flow.evaluate(model.train(), args)
    expected = mog_flow.compare(model.eval(), args, "id", mog_flow.data_name(args), mog_flow.sample_densities, 5.0, stream=0)
    assert (metrics["id"], baselines["id"]) == expected


def test_rivals_of_flows_are_given_what_they_are_named_after(tmp_path, monkeypatch):
    args, seen = mog_args(out=str(tmp_path), **FLOW), {}
    for name in ("one_gaussian", "resample", "integrate"):
        call = getattr(mog_flow, name)
        monkeypatch.setattr(mog_flow, name, lambda *given, name=name, call=call: seen.setdefault(name, []).append(given) or call(*given))
    mog_flow.compare(mog_flow.make_model(args), args, "id", "", mog_flow.sample_densities, 5.0, stream=0)
    assert [points.shape[1] for points, _ in seen["one_gaussian"]] == [6, 12, 18, 24], "all points seen"
    smooth = [std for _, _, *std in seen["resample"]]
    assert all(smooth[:4]) and smooth[4:] == [[]] * 4, "a kernel density, then the points themselves"
    ours, exact = seen["integrate"][0][1], seen["integrate"][-1][1]
    assert torch.equal(ours, exact[:3]), "the exact field starts from the model's noise"


def test_images_are_answered_as_the_model_was_trained_to(finished):
    """The model's errors, from its checkpoint, on tasks as `sample_tasks` draws them."""
    folder = finished("imagenet")
    results, args = json.load(open(folder / "results.json")), imagenet.get_args(["--eval", str(folder / "checkpoint.pt")])
    data = imagenet.load(args)
    model = imagenet.make_model(data["id"], args).eval()
    for split, features in data.items():
        (task,) = common.evaluation_tasks(lambda B: imagenet.sample_tasks(features, B, 4, args), 4, stream=list(imagenet.NAMES).index(features.key))
        wrong = [100 * (p[-1].argmax(-1) != task.query_y.argmax(-1)).float().mean().item() for p in common.refine(model, task)]
        assert results["metrics"][split]["mean"][1:] == pytest.approx(wrong), split


def test_each_dataset_of_images_has_another_one_out_of_distribution():
    assert mnist.OTHER["mnist"] == "fmnist" and mnist.OTHER["fmnist"] == "mnist" and all(a != b for a, b in mnist.OTHER.items())


# ---- what is trained


def test_graphs_are_trained_on_one_mechanism_where_asked_in_distribution(monkeypatch):
    asked = []
    sample = toposort.sample_data
    monkeypatch.setattr(toposort, "sample_data", lambda B, n, d, shift, mechanisms, device: asked.append((shift, tuple(mechanisms))) or sample(B, n, d, shift, mechanisms, device))
    for mechanism in ("lin", "rff", "both"):
        toposort.sample_tasks(4, 2, toposort_args(mechanism=mechanism))
    assert asked == [("in", ("lin",)), ("in", ("rff",)), ("in", ("lin", "rff"))]


def test_ranges_of_causal_models_are_those_of_avici():
    assert toposort.WEIGHT == {"in": (1, 3), "out": (0.5, 4)} and toposort.LENGTH == {"in": (7, 10), "out": (5, 12)} and toposort.SCALE == {"in": (10, 20), "out": (8, 22)}


NAMES = sorted(name.removesuffix(".json") for name in os.listdir(os.path.join(ROOT, "results")) if name.endswith(".json") and ".seed" not in name and not name.startswith(("bench", "cost", "race", "sampler", "ablations", "scaling", "paper-alphabets-gpu")))


@pytest.mark.parametrize("name", NAMES)
def test_commands_have_the_flags_that_their_results_had(name, monkeypatch):
    """Whoever changes a default makes results of another program stand beside the command."""
    monkeypatch.setattr(common, "pick_device", lambda *_: ("cuda", "bfloat16", "as if there were one"))
    results = tables.read(name)
    _, script, *flags = shlex.split(tables.command(results).strip("`"))
    now, was = importlib.import_module(script.removesuffix(".py")).get_args(flags).description["args"], results["args"]
    names = {"auto": was.get("dataset") or was.get("features")}  # data are named by what was found
    unlike = {flag for flag in now.keys() & was.keys() if now[flag] != was[flag] and names.get(now[flag]) != was[flag]}
    unlike -= {"seed", "data_dir", "dtype", "device", "out"} | ({"decoder"} if was["regime"] == "implicit" else set())  # of before these had another
    unlike -= ({"init"} if was["regime"] != "implicit" else set()) | ({"hidden"} if was["regime"] != "explicit" else set())  # which it does not read
    assert not unlike, {flag: (was[flag], now[flag]) for flag in unlike}


# ---- timers


def test_turns_of_ours_and_of_the_yardstick_are_of_whole_mini_batches_in_one_dtype(monkeypatch):
    monkeypatch.setattr(bench, "TURN", 0.0)
    monkeypatch.setattr(bench, "KS", range(1, 3))
    refine, met = linreg.refine, set()
    encode = common.Parametric.encode
    monkeypatch.setattr(linreg, "refine", lambda model, task: met.add((type(model.transformer), model.transformer.dtype)) or refine(model, task))
    monkeypatch.setattr(common.Parametric, "encode", lambda self, x, y, step=0: met.add(x.shape[1]) or encode(self, x, y, step))
    flags = "--dim 4 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --steps 2 --device cpu --dtype bfloat16".split()
    bench.main(["--scripts", "linreg", "--regimes", "parametric", "--repeats", "1", "--out", "b.json", *flags])
    assert met == {5, (common.Transformer, torch.bfloat16), (bench.Stock, torch.bfloat16)}
    ((_, args),) = bench.get_jobs(Namespace(scripts=["linreg"], regimes=["parametric"], more=flags))
    _, model, train, _ = reports.load("linreg", args)
    args.iters = 3
    with bench.mock.patch.object(common, "Journal", bench.Clock), bench.whole_batches():
        assert json.load(open("b.json"))["rows"][0]["flop_per_step"] == bench.count_flop(lambda: train(model, args)) / 4


def test_parts_are_those_of_one_step_forward_and_backward(monkeypatch):
    """Each call of a part takes a second, and so does its way back."""
    seconds, weight = [0.0], torch.ones(2, requires_grad=True)

    class Part(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seconds[0] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            seconds[0] += 1
            return slope

    monkeypatch.setattr(reports, "now", lambda device: seconds[0])
    monkeypatch.setattr(bench, "record_parts", lambda *_: {"part": 6 * [(Part.apply, [weight], True, False)]})  # in two steps
    monkeypatch.setattr(common, "make_optimizer", lambda *_: Namespace(step=lambda: None))
    model = Namespace(transformer=Namespace(dtype=torch.float32))
    assert bench.measure_parts(None, model, lambda *_: None, Namespace(device="cpu", tasks=1, steps=1))["part"] == 3 * 2 * 1000


def test_products_are_timed_in_the_dtype_that_is_asked_for(monkeypatch):
    made, matmul = set(), torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: made.add((a.dtype, b.dtype)) or matmul(a, b))
    bench.product_speed(Namespace(device="cpu", dtype="bfloat16"), 4, 4, 4)
    assert made == {(torch.bfloat16, torch.bfloat16)}


def test_seconds_of_a_race_are_from_the_start_to_each_prediction(monkeypatch):
    hours = [0]
    monkeypatch.setattr(reports, "now", lambda device: hours[0])

    def start(task, rate):
        for wait in (7, 2, 1):
            hours[0] += wait
            yield torch.zeros(4, 5, 1)

    task = common.Task(None, None, None, torch.ones(4, 5, 1))
    trained = Namespace(args=Namespace(device="cpu"), metric=lambda p, y: (p - y).square().sum(-1))
    metric, seconds = race.trace(race.Run(start, None, None, None), task, None, trained)
    assert seconds == [7, 9, 10] and torch.equal(metric, torch.ones(4, 3))


def test_adam_starts_from_a_normal_where_it_says_so(finished, monkeypatch):
    begun = []
    for name in ("randn", "zeros"):
        call = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, name=name, call=call, **more: begun.append(name) or call(*given, **more))
    descend = race.descend
    monkeypatch.setattr(race, "descend", lambda optimizer, w, *rest: begun.append((type(optimizer).__name__, bool(w.any()))) or descend(optimizer, w, *rest))
    wanted = Namespace(file=str(finished("linreg") / "checkpoint.pt"), more=["--eval-steps=2", "--device=cpu"], command="")
    race.race(reports.read_checkpoint(wanted), ("adam",), 1.0)
    assert {("Adam", True), ("Adam", False)} <= {*begun}


def test_the_cost_of_an_answer_is_the_time_of_that_answer(finished, monkeypatch):
    hours = [0.0]
    monkeypatch.setattr(reports, "now", lambda device: hours[0])
    monkeypatch.setattr(reports, "peak_bytes", lambda call, device: call() is None or 1e6)
    monkeypatch.setattr(cost, "KS", (1, 2, 4))
    solve = cost.solve

    def slow(model, task, parts, classes):
        hours[0] += sum(len(x) * x.shape[2] for x, _ in parts)  # a second an observation
        return solve(model, task, parts, classes)

    monkeypatch.setattr(cost, "solve", slow)
    wanted = Namespace(file=str(finished("linreg") / "checkpoint.pt"), more=["--device=cpu"], command="")
    rows = cost.measure(reports.read_checkpoint(wanted))
    assert [row["ms"] for row in rows.values()] == [[5000, 10_000, 20_000]] * 3


def test_samplers_are_timed_each_by_its_own_time(monkeypatch):
    hours = [0.0]
    monkeypatch.setattr(sampler, "time", Namespace(process_time=lambda: hours[0]))
    monkeypatch.setattr(toposort, "simulate", lambda *_: hours.__setitem__(0, hours[0] + 64))
    monkeypatch.setattr(sampler, "simulate_loop", lambda *_: hours.__setitem__(0, hours[0] + 5))
    row = sampler.measure("lin")
    assert (row["ms"], row["loop"], row["ratio"]) == (1000, 5000, 5)


# ---- statistics


def test_ablations_are_means_over_seeds_and_their_standard_errors(monkeypatch):
    values, asked = {0: [4.0, 1.0], 1: [4.0, 2.0], 2: [4.0, 6.0]}, []
    metric = lambda seed: {"mean": values[seed], "data": "d", "name": "n", "steps": [0, 1], "tasks": 9}
    monkeypatch.setattr(ablations, "run", lambda base, change, seed: asked.append(seed) or {"metrics": {"id": metric(seed)}, "args": {"steps": 1}, "cpu_seconds": 1.0, "machine": "m", "torch": "t"})
    row = ablations.summarize("linreg.py", "")
    assert asked == [0, 1, 2] and row["mean"] == [4, 3] and row["stderr"] == pytest.approx([0, math.sqrt(7 / 3)])


def test_ablations_run_the_seed_and_the_flags_they_are_asked_for(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    monkeypatch.setattr(ablations, "whole", lambda file: commands != [])
    monkeypatch.setattr(ablations.subprocess, "run", lambda words, **_: commands.append(words) or (lambda folder: (os.makedirs(folder), open(f"{folder}/results.json", "w").write("{}")))(words[-1]) and Namespace(returncode=0))
    ablations.run("linreg.py --dim 8", "--clock none", 2)
    words = " ".join(commands[0][1:])
    assert "linreg.py --dim 8 --clock none --seed 2" in words


def test_seeds_are_merged_into_their_mean_and_both_kinds_of_noise():
    row = lambda mean, stderr: {"steps": [1], "mean": [mean], "stderr": [stderr], "w1": {"mean": [2 * mean], "stderr": [stderr]}}
    found = tables.merge([row(1.0, 0.3), row(2.0, 0.5), row(6.0, 0.4)])
    assert found["mean"] == [3] and found["w1"]["mean"] == [6] and found["stderr"] == pytest.approx([math.hypot(0.4, math.sqrt(7 / 3))])
    assert tables.merge([row(1.0, 0.3)])["stderr"] == [0.3]


# ---- plots, logs and lines


def test_an_error_plot_says_what_its_axes_curves_and_bars_are(finished, monkeypatch):
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda fig, path: figures.append(fig))
    results = json.load(open(finished("mnist") / "results.json"))
    common.plot_steps(str(finished("mnist")), results)
    axes = figures[0].axes
    for ax, (split, m) in zip(axes, results["metrics"].items()):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("mini-batches seen", m["name"])
        (bar,) = ax.containers
        assert np.allclose([(s[1, 1] - s[0, 1]) / 2 for s in bar[2][0].get_segments()], m["stderr"]) and list(bar[0].get_ydata()) == pytest.approx(m["mean"])
        for line in ax.lines:
            if line.get_label() in results["baselines"][split]:
                assert list(line.get_ydata()) == results["baselines"][split][line.get_label()]["mean"]
    (row,) = map(json.loads, open(finished("mnist") / "log.jsonl"))
    assert {line.get_label(): list(line.get_ydata()) for line in axes[-1].lines} == {f"step {k}": [loss] for k, loss in enumerate(row["loss"], 1)}


def test_losses_are_logged_in_the_order_of_the_steps(tmp_path):
    journal = common.Journal(None, None, Namespace(out=str(tmp_path), checkpoint=None))
    journal.log([torch.tensor(1.0), torch.tensor(2.0)], torch.tensor(3.0))
    assert journal.pending[0].tolist() == [1, 2, 3]


def test_lines_tell_standard_errors_and_what_is_past_training(tmp_path, capsys):
    m = {"steps": [1, 2, 3], "mean": [5.0, 4.0, 3.0], "stderr": [0.5, 0.25, 0.125], "name": "error", "data": "d"}
    args = Namespace(description={}, seed=0, out=str(tmp_path), steps=2, device="cpu", dtype="float32", checkpoint=None)
    common.write_results(args, torch.nn.Linear(1, 1), "d", 1, 1.0, {"id": m}, {"id": {"rival": m | {"steps": [3], "mean": [9.0]}}})
    assert capsys.readouterr().out.splitlines() == ["id d step 1: error 5.000 +- 0.500", "id d step 2: error 4.000 +- 0.250", "id d step 3: error 3.000 +- 0.125 (past training) | rival 9.000"]


def test_distances_are_drawn_and_printed_under_their_names(monkeypatch, capsys):
    row = lambda w2, w1: {"steps": [0, 1], "mean": [0, 0], "excess": {"mean": [w2, w2], "stderr": [0, 0]}, "w1_excess": {"mean": [w1, w1], "stderr": [0, 0]}, "data": "d", "name": "W2, 9 points"}
    metrics, baselines, figures = {"id": row(0.75, 0.5)}, {"id": {"one Gaussian": row(4.0, 2.0)}}, []
    mog_flow.report(metrics, baselines, 1)
    assert "W2 +0.750 +- 0.000; W1 +0.500 +- 0.000 | this model" in capsys.readouterr().out
    monkeypatch.setattr(common, "save_figure", lambda fig, path, dpi: figures.append(fig))
    mog_flow.plot_excess("x.png", {"metrics": metrics, "baselines": baselines, "args": {"steps": 1}})
    assert [(ax.get_ylabel()[:2], ax.lines[0].get_ydata()[1]) for ax in figures[0].axes] == [("W2", 0.75), ("W1", 0.5)]


def test_pictures_show_the_state_after_the_steps_in_their_titles(monkeypatch):
    drawn, titles = [], []
    monkeypatch.setattr(mog_flow, "draw_points", lambda ax, truth, *layers: drawn.append(layers[-1][0][0, 0]))
    monkeypatch.setattr(common, "save_figure", lambda *_, **__: None)
    generated = np.arange(4.0)[:, None, None, None] * np.ones((4, 1, 5, 2))
    mog_flow.plot_grid("x.png", np.full((4, 1, 5, 2), 7.0), generated, np.full((1, 5, 2), 9.0), 3, "")
    assert drawn == [7, 1, 2, 3, 9]
    shown = []
    monkeypatch.setattr(toposort, "draw_order", lambda ax, m, order, title: shown.append((order, title)))
    panel = {"data": "d", "true_order": "true", "orders": ["0", "1", "2", "3", "6"]}
    toposort.plot_orders("x.png", {"args": {"steps": 3, "nodes": 8}, "metrics": {"lin_in_8": panel, "rff_in_8": panel}})
    assert shown == 2 * [("true", "d, a true order"), ("1", "after 1 step"), ("3", "after 3 steps")]


def test_the_optimizer_and_what_untrained_solving_models_ask_for():
    from test_common import X, Y, settings, squared_error

    model = common.Implicit(settings(decoder="solve"), X, Y, squared_error)
    assert model.rate == 0.5 and model.log_variance.bias.exp().item() == pytest.approx(0.1) and not model.log_variance.weight.any()
    optimizer = common.make_optimizer(model, Namespace(lr=0.1))
    assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.9, 0.95), 0.01)}
