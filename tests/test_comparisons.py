"""The programs in results/ that set a trained model beside something else: rivals, one large step, a plain loop."""

import itertools
import json
import math
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import cost
import linreg
import mnist
import race
import reports
import sampler
from test_wrong_use import refused


# ---------------------------------------------------------------- other optimizers as rivals


@pytest.mark.parametrize("make,rate", [(torch.optim.Adam, 0.1), (torch.optim.SGD, 30.0)])
def test_all_tasks_at_once_are_as_each_alone(make, rate):
    """A step on each mini-batch, against torch.optim on one task's weight and bias with PyTorch's cross-entropy."""
    dim, batches = 3, [(torch.randn(4, 9, 3), F.one_hot(torch.randint(10, (4, 9)), 10).float()) for _ in range(5)]
    start = torch.randn(4, (dim + 1) * 10)
    w = start.clone().requires_grad_()
    *_, found = race.descend(make([w], rate), w, batches, race.Problem(mnist, dim, 10).objective)
    for b in range(4):
        weight, bias = (p.clone().requires_grad_() for p in start[b].view(10, dim + 1).split((dim, 1), -1))
        optimizer = make([weight, bias], rate)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy((x[b] @ weight.T + bias[:, 0]) / dim**0.5, y[b].argmax(-1)).backward()
            optimizer.step()
        torch.testing.assert_close(found[b], torch.cat([weight, bias], -1).flatten().detach(), rtol=1e-3, atol=1e-4)


def test_lbfgs_over_all_tasks_reaches_least_squares_of_each():
    x, y = torch.randn(5, 20, 4), torch.randn(5, 20, 1)
    w = torch.zeros(5, 4, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=5, max_eval=50, history_size=10, line_search_fn="strong_wolfe")
    *_, found = race.descend(lbfgs, w, [(x, y)] * 20, race.Problem(linreg, 4, 1).objective)
    torch.testing.assert_close(found, 2 * torch.linalg.lstsq(x, y).solution[..., 0], rtol=1e-3, atol=1e-4)  # the predictor divides by 2


def maml(script, x_dim, y_dim):
    problem = race.Problem(script, x_dim, y_dim)
    return lambda start, log_rate, task, order: race.meta_loss(start, log_rate, task, problem, order)


def test_second_order_slopes_are_those_of_finite_differences_and_first_order_ones_are_not():
    torch.manual_seed(0)
    y = lambda *shape: F.one_hot(torch.randint(10, shape), 10).double()
    task = common.Task(torch.randn(3, 4, 6, 2).double(), y(3, 4, 6), torch.randn(4, 5, 2).double(), y(4, 5))
    value, start, log_rate = maml(mnist, 2, 10), torch.randn(30).double(), torch.tensor(1.0).double()
    slopes = {order: torch.func.grad(value, argnums=(0, 1))(start, log_rate, task, order) for order in (1, 2)}
    h = 1e-5
    for i in range(30):
        shift = h * torch.eye(30)[i].double()
        expected = (value(start + shift, log_rate, task, 2) - value(start - shift, log_rate, task, 2)) / (2 * h)
        assert slopes[2][0][i].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)
    expected = (value(start, log_rate + h, task, 2) - value(start, log_rate - h, task, 2)) / (2 * h)
    assert slopes[2][1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (slopes[1][0] - slopes[2][0]).norm() > 0.01 * slopes[2][0].norm()


def test_slopes_of_one_step_on_a_quadratic_as_by_hand():
    """w' = w - a (H w - b): of second order the slope at w' goes back through I - a H, of first order it is taken as it is."""
    torch.manual_seed(0)
    B, N, P, a = 3, 7, 4, 0.3
    task = common.Task(*(torch.randn(*shape).double() for shape in ((1, B, N, P), (1, B, N, 1), (B, 5, P), (B, 5, 1))))
    start, value = torch.randn(P).double(), maml(linreg, P, 1)
    by_order = {1: 0, 2: 0}
    for b in range(B):
        (H, c), (H_query, c_query) = ((2 / len(y) * x.T @ x / P, 2 / len(y) * x.T @ y[:, 0] / P**0.5) for x, y in ((task.context_x[0, b], task.context_y[0, b]), (task.query_x[b], task.query_y[b])))
        slope = H_query @ (start - a * (H @ start - c)) - c_query
        by_order[1] = by_order[1] + slope / B
        by_order[2] = by_order[2] + (slope - a * H @ slope) / B
    for order, expected in by_order.items():
        torch.testing.assert_close(torch.func.grad(value)(start, torch.tensor(math.log(a)).double(), task, order), expected)


def test_meta_training_finds_the_mean_of_the_tasks(monkeypatch):
    """All tasks have the same weights: then the best start is these. A clock that ticks once an iteration: machines differ."""
    ticks = itertools.count()
    monkeypatch.setattr(race, "time", Namespace(time=lambda: next(ticks)))
    truth = torch.tensor([1.0, -2.0])

    def sample(B, K):
        x = torch.randn(K + 1, B, 8, 2)
        y = (x @ truth / 2**0.5)[..., None]
        return common.Task(x[:-1], y[:-1], x[-1], y[-1])

    args = Namespace(tasks=4, steps=1, seed=0, device="cpu")
    start, rate, iterations = race.meta_train(sample, race.Problem(linreg, 2, 1), 0.01, 2, 400, args)
    assert iterations == 400 and rate > 0 and (start - truth).norm() < 0.7 * truth.norm()


def test_how_many_times_faster():
    ours = {"mean": [9, 3, 2.01, 1.5], "seconds": [1, 2, 3, 4]}
    rival = lambda *mean: {"mean": list(mean), "seconds": [10 * (i + 1) for i in range(len(mean))], "end": len(mean) - 1}
    assert race.faster(ours, rival(8, 4, 3)) == 30 / 2
    assert race.faster(ours, rival(8, 2.005, 2)) == 20 / 3, "both within 1% of what it ends at"
    assert race.faster(ours, rival(8, 1.4)) is None


CURVES = {"adam": 2, "sgd": 1, "lbfgs": 1, "maml": 2}  # of each rival


@pytest.mark.parametrize("names", ("adam,sgd,lbfgs,maml", "sgd,lbfgs", "maml"))
@pytest.mark.parametrize("script", ("linreg", "mnist"))
def test_a_race_on_the_tasks_of_the_evaluation(script, names, finished, monkeypatch, capsys, pictures):
    monkeypatch.setattr(race, "MARKS", [1, 2, 7])
    monkeypatch.setattr(race, "RATES", [0.1, 1.0, 1e30])
    race.main([str(finished(script) / "checkpoint.pt"), "--eval-steps", "4", "--baseline", names, "--baseline-seconds", "0.05", "--out", "new/race.json"])
    printed, report, results = capsys.readouterr().out, json.load(open("new/race.json")), json.load(open(finished(script) / "results.json"))
    rows, evaluated = report["rows"], results["metrics"]["id"]
    assert sorted(os.listdir("new")) == ["race.json", "race.png"] and report["metric"] == evaluated["name"] and report["data"] == results["data"]
    assert len(rows) == 1 + sum(CURVES[name] for name in names.split(","))
    assert rows["this model"]["mean"] == pytest.approx(evaluated["mean"][1:]), "the same tasks"
    assert {name: run["seconds"] for name, run in report["meta_training"].items()} == ({"MAML": 0.05, "first-order MAML": 0.05} if "maml" in names else {})
    for name, row in rows.items():
        assert row["observations"] == ([10] * 3 if "all data" in name else [5, 10, 15, 20]), "K = 2 mini-batches of 5"
        assert len(row["mean"]) == len(row["seconds"]) == len(row["observations"]) == len(row["steps"])
        assert all(map(math.isfinite, row["mean"])) and row["seconds"] == sorted(row["seconds"])
        assert script != "linreg" or row["rate"] != 1e30, "picked by what it does"
        assert name == "this model" or (any(line.startswith(f"{name}: ") for line in printed.splitlines()) and row["faster"] == race.faster(rows["this model"], row))


def test_rivals_are_tuned_on_other_tasks_and_see_what_the_file_says(finished, monkeypatch):
    """Of 5 observations a mini-batch in three dimensions, K = 2: what runs predict, by hand; and the end is picked from given curves."""
    curves, met = {0.1: [2.5, 3.0, 2.0, 2.0], 1.0: [4.0, 2.01, 5.0, 5.0]}, []
    monkeypatch.setattr(race, "RATES", list(curves))
    monkeypatch.setattr(race, "MARKS", [1, 2, 3, 30])
    monkeypatch.setattr(race, "meta_train", lambda *_: (torch.ones(3), 0.7, 5))

    def trace(run, task, rate, trained):
        met.append((run, task, rate, [p.detach() for p in run.start(task, rate)]))
        return torch.tensor(curves.get(rate, [1.0] * 4)).expand(len(task.query_x), -1), [0.0] * 4

    monkeypatch.setattr(race, "trace", trace)
    wanted = Namespace(file=str(finished("linreg") / "checkpoint.pt"), more=["--eval-steps=4", "--device=cpu"], command="")
    trained = reports.read_checkpoint(wanted)
    rows, _ = race.race(trained, ("sgd", "lbfgs", "maml"), 1.0)
    assert (rows["SGD"]["rate"], rows["SGD"]["end"]) == (1.0, 1), "the first to within 1% of the lowest"
    (evaluated,) = trained.tasks(4)
    for run, task, rate, predictions in met:
        x, y, queries = task.context_x[0] / 3**0.5, task.context_y[0], task.query_x / 3**0.5
        assert len(task.query_x) == 32 or torch.equal(task.query_x, evaluated.query_x)
        assert len(task.query_x) < 32 or not torch.isin(task.query_x, evaluated.query_x).any(), "picked on others"
        if run.steps is race.MARKS:
            x, y = common.seen(task, 2)
            torch.testing.assert_close(predictions[-1], queries @ torch.linalg.lstsq(x / 3**0.5, y).solution, rtol=1e-2, atol=1e-2)
        elif rate == 0.7:
            start = torch.ones(3, 1)
            torch.testing.assert_close(predictions[0], queries @ (start - 0.7 * 2 / 5 * x.mT @ (x @ start - y)))
    assert {rate for _, _, rate, _ in met} == {None, 0.1, 1.0, 0.7}


# ---------------------------------------------------------------- many steps or one


@pytest.mark.parametrize("script", ("linreg", "mnist"))
def test_cost_of_steps_beside_one_on_all(script, finished, monkeypatch, capsys, pictures):
    monkeypatch.setattr(cost, "KS", (1, 2, 4))
    solve, classes = cost.solve, set()
    monkeypatch.setattr(cost, "solve", lambda *args: (classes.add(args[-1]), solve(*args))[1])
    cost.main([str(finished(script) / "checkpoint.pt"), "--out", "new/c.json"])
    assert classes == {script == "mnist"}, "what is averaged over mini-batches are probabilities, or numbers"
    report, evaluated = json.load(open("new/c.json")), json.load(open(finished(script) / "results.json"))["metrics"]["id"]
    steps, vote, one = (report[form] for form in ("steps", "vote", "one"))
    assert os.path.exists("new/c.png") and report["note"] in capsys.readouterr().out
    assert report["data"] == evaluated["data"] and report["metric"] == evaluated["name"]
    assert steps["mean"] == pytest.approx([evaluated["mean"][k] for k in (1, 2, 4)]), "the evaluation's own tasks"
    assert vote["mean"][0] == pytest.approx(steps["mean"][0]) == one["mean"][0]
    assert script == "mnist" or one["mean"][1:] != steps["mean"][1:], "errors of few answers may agree"
    assert one["MB"][2] > 1.5 * one["MB"][0] and vote["MB"][2] < 1.4 * vote["MB"][0]
    assert script == "mnist" or steps["MB"][2] < 1.4 * steps["MB"][0], "residuals (mnist) take predictions for all observations to come"
    for row in (steps, vote, one):
        for key in ("ms", "MB"):
            assert row[f"{key}^"] == pytest.approx(np.polyfit(np.log([1, 2, 4]), np.log(row[key]), 1)[0], abs=1e-3)


def test_a_vote_is_the_mean_of_one_step_answers():
    """Against a model whose answer is the mean of the mini-batch's labels plus the state that it is handed: the vote has no state."""

    class Mean(torch.nn.Module):
        history, causal, shows_residuals = 1, True, False
        initial_state = lambda self, query_x: torch.zeros(*query_x.shape[:2], 3)
        encode = lambda self, x, y, step: y
        update = lambda self, past, batch, query_x, step: (past[-1] + batch.mean(1, keepdim=True))[None]
        predict = lambda self, states, query_x: states

    task = common.Task(torch.randn(4, 2, 5, 6), torch.randn(4, 2, 5, 3), torch.randn(2, 7, 6), None)
    means = task.context_y[:3].mean(2)[:, :, None].expand(3, 2, 7, 3)
    for form, expected in (("steps", means.sum(0)), ("vote", means.mean(0)), ("one", means.mean(0))):
        torch.testing.assert_close(cost.solve(Mean(), task, cost.split(task, form, 3), classes=False), expected)
    torch.testing.assert_close(cost.solve(Mean(), task, cost.split(task, "vote", 3), classes=True), means.softmax(-1).mean(0))


# ---------------------------------------------------------------- a batched sampler or a loop


def test_both_samplers_are_timed(monkeypatch, capsys):
    for name, value in dict(REPEATS=3, GRAPHS=2, NODES=3, ROWS=5).items():
        monkeypatch.setattr(sampler, name, value)
    sampler.main(["--out", "s.json"])
    report, printed = json.load(open("s.json")), capsys.readouterr().out
    for mechanism in ("lin", "rff"):
        row = report[mechanism]
        assert len(row["turns"]) == 3 and row["ms"] == sorted(ours for ours, _ in row["turns"])[1]
        assert row["ratio"] == sorted(loop / ours for ours, loop in row["turns"])[1] and f"{row['ratio']:.1f} times" in printed


# ---------------------------------------------------------------- wrong use


WRONG = [  # program, flags, what the line must name
    ("race", "", "FILE"),
    ("race", "nothing.pt", "nothing.pt"),
    ("race", "TOPOSORT", "toposort"),
    ("race", "LINREG --baseline nonsense", "nonsense"),
    ("race", "LINREG --baseline adam,,sgd", "--baseline"),
    ("race", "LINREG --baseline=", "--baseline"),
    ("race", "LINREG --baseline-seconds 0", "--baseline-seconds"),
    ("race", "LINREG --eval-steps 0", "--eval-steps"),
    ("race", "LINREG --steps 3", "--steps"),
    ("race", "LINREG --out here", "here exists"),
    ("cost", "nothing.pt", "nothing.pt"),
    ("cost", "TOPOSORT", "toposort"),
    ("cost", "LINREG --wide 3", "--wide"),
    ("cost", "LINREG --eval-tasks 40", "--eval-tasks"),
    ("cost", "LINREG --eval-steps 8", "--eval-steps"),
    ("cost", "LINREG --eval other.pt", "--eval"),
    ("cost", "LINREG --out LINREG --overwrite", "not to be replaced"),
    ("cost", "LINREG --out here/there.json", "here"),
    ("sampler", "--wide 3", "--wide"),
    ("sampler", "stray", "stray"),
    ("sampler", "--nodes 20", "--nodes"),
]


@pytest.mark.parametrize("program,flags,culprit", WRONG, ids=[f"{program} {flags}" for program, flags, _ in WRONG])
def test_wrong_use(program, flags, culprit, finished, capsys):
    with open("here", "w") as f:
        f.write("mine")
    for name in ("linreg", "toposort"):
        flags = flags.replace(name.upper(), str(finished(name) / "checkpoint.pt"))
    refused(capsys, culprit, program, flags, tiny=False)


