"""The bench: its yardstick computes what our transformer does, its counts are those made by hand, its times are those of steps."""

import json
import math
import os
import signal
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

import torch.nn.functional as F

import bench
import common
import linreg
import mnist
from conftest import call
from test_common import K, close, copied, make, task  # noqa: F401 (task is a fixture)
from test_wrong_use import refused

TOY = "--dim 4 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --steps 2 --device cpu"


@pytest.fixture(autouse=True)
def same_handler():
    """Reading flags takes over Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def stock(model):
    """The same model with the yardstick in place of our transformer, weights copied."""
    theirs = bench.Stock(8, 2, 2)
    for layer, block in zip(theirs.encoder.layers, model.transformer.blocks, strict=True):
        layer.load_state_dict(copied(block).state_dict())
    theirs.norm.load_state_dict(model.transformer.norm.state_dict())
    model.transformer = theirs
    return model


@pytest.mark.parametrize("mask", ("none", "causal"))
@pytest.mark.parametrize("regime", common.REGIMES)
def test_the_yardstick_does_the_same_maths(task, regime, mask):  # noqa: F811
    """Training predictions of all steps, and the gradients of everything around the transformer."""
    answers = []
    for change in (lambda model: model, stock):
        model = change(make(regime, mask=mask, width=8, depth=2, heads=2)).train()
        torch.manual_seed(3)  # the same draws of sizes
        predictions = list(common.refine(model, task))
        sum((p - task.query_y).square().mean() for p in predictions).backward()
        gradients = [p.grad for name, p in model.named_parameters() if not name.startswith("transformer.") and p.grad is not None]
        answers.append([*predictions, *gradients])
    assert len(answers[0]) > K
    for ours, theirs in zip(*answers, strict=True):
        close(ours, theirs, 1e-4)


def test_products_are_counted_as_by_hand():
    """Implicit regression: every weight costs a product forward and two backward, but for inputs that need no gradient."""
    flags = "--dim 3 --context 5 --queries 4 --tasks 2 --width 8 --depth 2 --steps 3 --device cpu".split()
    wanted = Namespace(scripts=["linreg"], regimes=["implicit"], more=flags)
    ((_, _, args),) = bench.get_jobs(wanted)
    D, L, n, q, tasks, steps, x = args.width, args.depth, args.context, args.queries, args.tasks, args.steps, args.dim
    _, model, train, _ = bench.load("linreg", args)
    args.iters = 3
    with bench.mock.patch.object(common, "Journal", bench.Clock), bench.whole_batches():
        counted = bench.count_flop(train, model, args)
    queries = L * (D * D + 2 * n * D + D * D + 4 * D * D) + D  # query, scores and values, out, MLP; decoder; of each query
    context = L * 2 * D * D + (L - 1) * (D * D + 2 * n * D + D * D + 4 * D * D)  # keys and values; of each observation
    per_step = 3 * (q * queries + n * context) + 2 * (q + n) * (x + 1) * D  # nothing flows back into [x, y]
    initial = q * (x + 1) * D  # but into the first state, which is trained
    sampling = (steps * n + q) * x
    assert counted == 2 * tasks * (steps * per_step + initial + sampling)


def test_memory_counts_what_lives_at_the_same_time():
    def train(_):
        for _ in range(3):  # one after the other
            torch.empty(500_000)
        return torch.empty(250_000), torch.empty(250_000)  # 2 MB together

    weights = torch.nn.Linear(999, 250)  # 1 MB
    assert bench.peak_memory(train, weights, Namespace(device="cpu", iters=0)) == pytest.approx(3, rel=0.01)


def test_the_clock_times_all_steps_but_the_first(monkeypatch):
    hours, seen = [0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: hours[0])
    clock = bench.Clock(None, None, Namespace(iters=3, device="cpu"))
    for iteration in clock:
        seen.append(iteration)
        hours[0] += (100, 1, 2, 6)[len(seen) - 1]
    assert seen == [0, 0, 1, 2] and clock.seconds == 3


def test_a_product_has_a_speed():
    args = Namespace(device="cpu", dtype="float32")
    start = time.perf_counter()
    speed = bench.product_speed(args, 64, 32, 128)
    assert 2e-9 * 64 * 32 * 128 / (time.perf_counter() - start) < speed < 1e5


@pytest.mark.parametrize("script,drawn", [("linreg", ""), ("mnist", "glyphs (drawn"), ("imagenet", "synthetic"), ("mog_flow", "")])
def test_every_script_is_driven_by_its_own_training(script, drawn, monkeypatch):
    monkeypatch.setattr(mnist, "draw_glyphs", lambda characters, size, seed: (np.eye(28, dtype=np.uint8) * np.arange(20, 40)[:, None, None], np.arange(20) % 10))
    monkeypatch.setattr(common, "Journal", bench.Clock)
    ((_, _, args),) = bench.get_jobs(Namespace(scripts=[script], regimes=["implicit"], more=TOY.split()))
    name, model, train, sample = bench.load(script, args)
    assert drawn in name and sample().context_x.shape[:3] == (2, 4, 5)
    args.steps, args.iters = 3, 2
    before = [p.clone() for p in model.parameters()]
    last, seconds = train(model)
    assert last == 1 and seconds > 0 and sample().context_x.shape[:3] == (3, 4, 5)
    assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters())) and os.listdir() == []


def test_table_and_file_say_the_same(monkeypatch, capsys):
    """What is printed, what is written and what follows from what."""
    monkeypatch.setattr(bench, "TURN", 0.0)
    monkeypatch.setattr(bench, "KS", range(1, 3))
    monkeypatch.setattr(bench, "product_speed", lambda args, m, k, n: 50.0 if m == n else 40.0)
    journal, draw_size = common.Journal, common.draw_size
    bench.main(f"--scripts linreg mog_flow --regimes explicit implicit --repeats 3 --out new/b.json {TOY}".split())
    assert (common.Journal, common.draw_size) == (journal, draw_size), "everything is as it was"
    assert os.listdir() == ["new"] and os.listdir("new") == ["b.json"], "no run was written"
    report, printed = json.load(open("new/b.json")), capsys.readouterr().out
    assert report["machine"] in printed and f"threads {report['threads']}" in printed and report["dtype"] in printed
    rows = {(row["script"], row["regime"]): row for row in report["rows"]}
    assert len(rows) == 3 and ("mog_flow", "implicit") in rows, "a flow has one regime"
    for (script, regime), row in rows.items():
        table, turns = row["table"], row["turns"]
        assert all(math.isfinite(value) and (value > 0 or key == "K^") for key, value in table.items())  # the slope is noise at toy size
        assert row["args"]["regime"] == regime and row["args"]["width"] == 8 and row["data"] in printed
        assert all(len(turn) == 3 for turn in turns.values()) and table["ms"] == sorted(turns["ms"])[1] and table["sampling"] < table["ms"]
        assert table["x stock"] == sorted(theirs / mine for mine, theirs in zip(turns["ms"], turns["stock"]))[1]
        assert table["tasks/s"] == pytest.approx(4000 / table["ms"]) and table["GFLOP/s"] == pytest.approx(1e-6 * row["flop_per_step"] / table["ms"])
        assert table["% width"] == pytest.approx(1.25 * table["% peak"]) == pytest.approx(2.5 * table["GFLOP/s"])
        assert (table["x FLOP"] > 1) == (regime == "implicit"), "the yardstick computes more where there are queries"
        parts = {"linear layers", "attention", "norms", "GELU", "the regime", "sampling", "AdamW"}
        assert row["parts_ms"].keys() == parts and all(ms > 0 for ms in row["parts_ms"].values())
        assert table["x sum"] == pytest.approx(sorted(turns["whole"])[1] / sum(row["parts_ms"].values()))
        assert row["by_k"]["steps"] == [1, 2] and table["MB 10/1"] == row["by_k"]["MB"][1] / row["by_k"]["MB"][0]
        assert any(line.split()[:3] == [script, regime, f"{table['ms']:.2f}"] for line in printed.splitlines())


# ---------------------------------------------------------------- other optimizers as rivals


def objective(predictor, loss):
    return lambda w, x, y: loss(predictor(w, x), y).mean(-1).sum()


@pytest.mark.parametrize("make,rate", [(torch.optim.Adam, 0.1), (torch.optim.SGD, 30.0)])
def test_all_tasks_at_once_are_as_each_alone(make, rate):
    """A step on each mini-batch, against torch.optim on one task's weight and bias with PyTorch's cross-entropy."""
    dim, batches = 3, [(torch.randn(4, 9, 3), F.one_hot(torch.randint(10, (4, 9)), 10).float()) for _ in range(5)]
    start = torch.randn(4, (dim + 1) * 10)
    w = start.clone().requires_grad_()
    *_, found = bench.descend(make([w], rate), w, batches, objective(mnist.predictor, mnist.loss))
    for b in range(4):
        weight, bias = (p.clone().requires_grad_() for p in (start[b, : dim * 10].view(dim, 10), start[b, dim * 10 :]))
        optimizer = make([weight, bias], rate)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy((x[b] @ weight + bias) / dim**0.5, y[b].argmax(-1)).backward()
            optimizer.step()
        torch.testing.assert_close(found[b], torch.cat([weight.flatten(), bias]).detach(), rtol=1e-3, atol=1e-4)


def test_lbfgs_over_all_tasks_reaches_least_squares_of_each():
    x, y = torch.randn(5, 20, 4), torch.randn(5, 20, 1)
    w = torch.zeros(5, 4, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=5, max_eval=50, history_size=10, line_search_fn="strong_wolfe")
    *_, found = bench.descend(lbfgs, w, [(x, y)] * 20, objective(linreg.predictor, linreg.loss))
    torch.testing.assert_close(found, 2 * torch.linalg.lstsq(x, y).solution[..., 0], rtol=1e-3, atol=1e-4)  # the predictor divides by 2


def maml(predictor, loss, size):
    problem = bench.Problem(predictor, size, loss, None)
    return lambda start, log_rate, task, order: bench.meta_loss(start, log_rate, task, problem, objective(predictor, loss), order)


def test_second_order_slopes_are_those_of_finite_differences_and_first_order_ones_are_not():
    torch.manual_seed(0)
    y = lambda *shape: F.one_hot(torch.randint(10, shape), 10).double()
    task = common.Task(torch.randn(3, 4, 6, 2).double(), y(3, 4, 6), torch.randn(4, 5, 2).double(), y(4, 5))
    value, start, log_rate = maml(mnist.predictor, mnist.loss, 30), torch.randn(30).double(), torch.tensor(1.0).double()
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
    start, value = torch.randn(P).double(), maml(linreg.predictor, linreg.loss, P)
    by_order = {1: 0, 2: 0}
    for b in range(B):
        (H, c), (H_query, c_query) = ((2 / len(y) * x.T @ x / P, 2 / len(y) * x.T @ y[:, 0] / P**0.5) for x, y in ((task.context_x[0, b], task.context_y[0, b]), (task.query_x[b], task.query_y[b])))
        slope = H_query @ (start - a * (H @ start - c)) - c_query
        by_order[1] = by_order[1] + slope / B
        by_order[2] = by_order[2] + (slope - a * H @ slope) / B
    for order, expected in by_order.items():
        torch.testing.assert_close(torch.func.grad(value)(start, torch.tensor(math.log(a)).double(), task, order), expected)


def test_meta_training_finds_the_mean_of_the_tasks():
    """All tasks have the same weights: then the best start is these."""
    truth = torch.tensor([1.0, -2.0])

    def sample(B, K):
        x = torch.randn(K + 1, B, 8, 2)
        y = (x @ truth / 2**0.5)[..., None]
        return common.Task(x[:-1], y[:-1], x[-1], y[-1])

    problem = bench.Problem(linreg.predictor, 2, linreg.loss, None)
    args = Namespace(tasks=4, steps=1, seed=0, device="cpu")
    start, rate, iterations = bench.meta_train(sample, problem, objective(linreg.predictor, linreg.loss), 0.01, 2, 2.0, args)
    assert iterations > 100 and rate > 0 and (start - truth).norm() < 0.7 * truth.norm()


def test_how_many_times_faster():
    ours = {"mean": [9, 3, 2.01, 1.5], "seconds": [1, 2, 3, 4]}
    rival = lambda *mean: {"mean": list(mean), "seconds": [10 * (i + 1) for i in range(len(mean))], "end": len(mean) - 1}
    assert bench.faster(ours, rival(8, 4, 3)) == 30 / 2
    assert bench.faster(ours, rival(8, 2.005, 2)) == 20 / 3, "both within 1% of what it ends at"
    assert bench.faster(ours, rival(8, 1.4)) is None


RACERS = {"adam": 4, "sgd": 2, "lbfgs": 1, "maml": 2}  # curves of each


@pytest.mark.parametrize("script,regime", [("linreg", "parametric"), ("linreg", "explicit"), ("mnist", "implicit"), ("imagenet", "implicit")])
def test_a_race_of_all_rivals_on_the_tasks_of_the_evaluation(script, regime, monkeypatch, capsys):
    monkeypatch.setattr(bench, "MARKS", [1, 2, 7])
    monkeypatch.setattr(bench, "RATES", [0.1, 1.0, 1e30])
    call(script, f"--regime {regime} --out run")
    call(script, "--eval run/checkpoint.pt --eval-steps 3 --baseline adam,sgd,lbfgs,maml --baseline-seconds 0.05", tiny=False)
    printed, report, results = capsys.readouterr().out, json.load(open("run/eval/race.json")), json.load(open("run/eval/results.json"))
    rows, evaluated = report["rows"], results["metrics"]["id"]
    assert len(rows) == 1 + sum(RACERS.values()) and report["metric"] == evaluated["name"] and report["data"] == results["data"]
    assert rows["this model"]["mean"] == pytest.approx(evaluated["mean"][1:]), "the same tasks"
    assert {name: run["seconds"] for name, run in report["meta_training"].items()} == {"MAML": 0.05, "first-order MAML": 0.05}
    for name, row in rows.items():
        assert row["observations"] == ([10] * (row["end"] + 1) if "all data" in name else [5, 10, 15]), "K = 2 mini-batches of 5"
        assert len(row["mean"]) == len(row["loss"]) == len(row["seconds"]) == len(row["observations"]) == len(row["steps"])
        assert all(map(math.isfinite, row["mean"] + row["loss"])) and row["seconds"] == sorted(row["seconds"])
        assert script != "linreg" or row["rate"] != 1e30, "picked by what it does"
        assert name == "this model" or (any(line.startswith(f"{name}: ") for line in printed.splitlines()) and row["faster"] == bench.faster(rows["this model"], row))
    before = os.path.getmtime("run/eval/race.png")
    call(script, "--plot-only run/eval", tiny=False)
    assert os.path.getmtime("run/eval/race.png") > before


def test_some_rivals_in_a_training_run(monkeypatch):
    monkeypatch.setattr(bench, "MARKS", [1, 2])
    call("linreg", "--baseline sgd,lbfgs --out run")
    assert set(json.load(open("run/race.json"))["rows"]) == {"this model", "SGD", "SGD, all data", "L-BFGS, all data"}
    call("linreg", "--overwrite --seed 1 --out run")
    assert not os.path.exists("run/race.json"), "of the run before"


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("script", ("linreg", "mnist"))
def test_cost_of_steps_beside_one_on_all(script, finished, monkeypatch, capsys):
    monkeypatch.setattr(bench, "COST_KS", (1, 2, 4))
    bench.main(["--cost", str(finished(script) / "checkpoint.pt"), "--out", "new/c.json"])
    report, evaluated = json.load(open("new/c.json")), json.load(open(finished(script) / "results.json"))["metrics"]["id"]
    cost, printed = report["cost"], capsys.readouterr().out
    assert os.path.exists("new/c.png") and cost["note"] in printed and cost["data"] == evaluated["data"] and cost["metric"] == evaluated["name"]
    assert cost["steps"]["mean"] == pytest.approx([evaluated["mean"][k] for k in (1, 2, 4)]), "the evaluation's own tasks"
    assert cost["one"]["mean"][0] == pytest.approx(cost["steps"]["mean"][0]) and cost["one"]["mean"][1:] != cost["steps"]["mean"][1:]
    assert cost["one"]["MB"][2] > 1.5 * cost["one"]["MB"][0] and cost["steps"]["MB"][2] < 1.2 * cost["steps"]["MB"][0]
    for form in ("steps", "one"):
        for key in ("ms", "MB"):
            assert cost[form][f"{key}^"] == pytest.approx(np.polyfit(np.log([1, 2, 4]), np.log(cost[form][key]), 1)[0], abs=1e-3)


def test_cost_of_another_script_is_refused(finished, capsys):
    refused(capsys, "toposort", "bench", "--cost", finished("toposort") / "checkpoint.pt", tiny=False)


WRONG = [  # flags, what the line must name
    ("--cost nothing.pt", "nothing.pt"),
    ("--scripts linear", "--scripts"),
    ("--regimes magic", "--regimes"),
    ("--scripts mog_flow --regimes explicit", "mog_flow"),
    ("--repeats 0", "--repeats"),
    ("--device cuda:99", "cuda:99"),
    ("--dtype float8", "--dtype"),
    ("--preset huge", "--preset"),
    ("--width 9", "--heads"),
    ("--scripts linreg mnist --noise 1", "--noise"),  # mnist has none
    ("--wide 9", "--wide"),
    ("--resume folder", "--resume"),
    ("--out here", "here exists"),
    ("--out here/there.json", "here"),
    ("--out folder --overwrite", "folder exists"),
    ("--out=", "--out"),
    ("stray", "stray"),
]


@pytest.mark.parametrize("flags,culprit", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_use(flags, culprit, capsys):
    os.mkdir("folder")
    with open("here", "w") as f:
        f.write("mine")
    refused(capsys, culprit, "bench", flags, tiny=False)
