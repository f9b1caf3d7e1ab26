"""The bench: its yardstick computes what our transformer does, its counts are those made by hand, its times are those of steps."""

import itertools
import json
import math
import os
from argparse import Namespace

import numpy as np
import pytest
import torch

import bench
import common
import linreg
import mnist
import reports
from test_common import K, close, copied, make, task  # noqa: F401 (task is a fixture)
from test_wrong_use import refused

TOY = "--dim 4 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --steps 2 --device cpu"


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


def test_what_the_regime_does_is_recorded(task):  # noqa: F811
    model = make("parametric", decoder="solve", signal="both")
    parts = bench.record_parts(lambda: list(common.refine(model, task)), model, torch.device("cpu"))
    names = [call.__name__ for call, *_ in parts["the regime"]]
    assert {name: names.count(name) for name in names} == dict.fromkeys(("apply_to", "residuals", "gradients", "pull_back", "predict"), K)


def test_observations_to_come_are_recorded_without_gradients(task):  # noqa: F811
    """With --decoder solve those of every mini-batch that is left are refined, beside the queries."""
    model = make("implicit", decoder="solve", mask="none")
    parts = bench.record_parts(lambda: list(common.refine(model, task)), model, torch.device("cpu"))
    carried, solved = ([gradients for call, _, gradients, _ in parts["the regime"] if call.__name__ == name] for name in ("carry_over", "dual"))
    assert (carried.count(True), carried.count(False)) == (K, K * (K - 1) // 2) and solved == [True] * K


def test_products_are_counted_as_by_hand():
    """Implicit regression: every weight costs a product forward and two backward, but for inputs that need no gradient."""
    flags = "--dim 3 --context 5 --queries 4 --tasks 2 --width 8 --depth 2 --steps 3 --device cpu".split()
    wanted = Namespace(scripts=["linreg"], regimes=["implicit"], more=flags)
    ((_, args),) = bench.get_jobs(wanted)
    D, L, n, q, tasks, steps, x = args.width, args.depth, args.context, args.queries, args.tasks, args.steps, args.dim
    _, model, train, _ = reports.load("linreg", args)
    args.iters = 3
    with bench.mock.patch.object(common, "Journal", bench.Clock), bench.whole_batches():
        counted = bench.count_flop(lambda: train(model, args)) / 4  # one before the clock starts
    queries = L * (D * D + 2 * n * D + D * D + 4 * D * D) + D  # query, scores and values, out, MLP; decoder; of each query
    context = L * 2 * D * D + (L - 1) * (D * D + 2 * n * D + D * D + 4 * D * D)  # keys and values; of each observation
    per_step = 3 * (q * queries + n * context) + 2 * (q + n) * (x + 1) * D  # nothing flows back into [x, y]
    initial = q * (x + 1) * D  # but into the first state, which is trained
    sampling = (steps * n + q) * x
    assert counted == 2 * tasks * (steps * per_step + initial + sampling)


def test_memory_counts_what_lives_at_the_same_time():
    def train():
        for _ in range(3):  # one after the other
            torch.empty(500_000)
        return torch.empty(250_000), torch.empty(250_000)  # 2 MB together

    weights = torch.nn.Linear(999, 250)  # 1 MB
    assert bench.peak_memory(train, weights, "cpu") == pytest.approx(3, rel=0.01)


def test_the_clock_times_all_steps_but_the_first(monkeypatch):
    hours, seen = [0], []
    monkeypatch.setattr(reports.time, "perf_counter", lambda: hours[0])
    clock = bench.Clock(None, None, Namespace(iters=3, device="cpu"))
    for iteration in clock:
        seen.append(iteration)
        hours[0] += (100, 1, 2, 6)[len(seen) - 1]
    assert seen == [0, 0, 1, 2] and clock.seconds == 3


def test_the_speed_of_a_product_is_that_of_the_fastest_turn(monkeypatch):
    clock = iter(np.cumsum([0, 0.010, 0, 0.012, 0, 0.006, 0, 0.009]))  # one product, then three turns of three
    monkeypatch.setattr(reports, "now", lambda device: next(clock))
    assert bench.product_speed(Namespace(device="cpu", dtype="float32"), 64, 32, 128) == pytest.approx(2 * 64 * 32 * 128 / 0.002 / 1e9)
    assert not [*clock]


@pytest.mark.parametrize("script,drawn", [("linreg", ""), ("mnist", "glyphs (drawn"), ("imagenet", "synthetic"), ("mog_flow", "")])
def test_every_script_is_driven_by_its_own_training(script, drawn, monkeypatch):
    monkeypatch.setattr(mnist, "draw_glyphs", lambda characters, size, seed: (np.eye(28, dtype=np.uint8) * np.arange(20, 40)[:, None, None], np.arange(20) % 10))
    monkeypatch.setattr(common, "Journal", bench.Clock)
    ((_, args),) = bench.get_jobs(Namespace(scripts=[script], regimes=["implicit"], more=TOY.split()))
    name, model, train, sample = reports.load(script, args)
    assert drawn in name and sample(args.tasks, args.steps).context_x.shape[:3] == (2, 4, 5)
    args.steps, args.iters = 3, 2
    before = [p.clone() for p in model.parameters()]
    last, seconds = train(model, args)
    assert last == 1 and seconds > 0 and sample(args.tasks, args.steps).context_x.shape[:3] == (3, 4, 5)
    assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters())) and os.listdir() == []


def test_table_and_file_say_the_same(monkeypatch, capsys):
    """What is printed, what is written and what follows from what."""
    monkeypatch.setattr(bench, "TURN", 0.0)
    monkeypatch.setattr(bench, "KS", range(1, 4))
    square, wide = (itertools.cycle(speeds) for speeds in ([30.0, 50.0, 40.0], [40.0, 10.0, 20.0]))
    monkeypatch.setattr(bench, "product_speed", lambda args, m, k, n: next(square if m == n else wide))
    sample, drawn = linreg.sample_tasks, []
    monkeypatch.setattr(linreg, "sample_tasks", lambda B, K, args: (drawn.append(K), sample(B, K, args))[1])
    journal, draw_size = common.Journal, common.draw_size
    bench.main(f"--scripts linreg mog_flow --regimes explicit implicit --repeats 3 --out new/b.json {TOY}".split())
    assert (common.Journal, common.draw_size) == (journal, draw_size), "everything is as it was"
    assert os.listdir() == ["new"] and os.listdir("new") == ["b.json"], "no run was written"
    report, printed = json.load(open("new/b.json")), capsys.readouterr().out
    assert report["machine"] in printed and f"threads {report['threads']}" in printed and report["dtype"] in printed
    rows = {(row["script"], row["regime"]): row for row in report["rows"]}
    assert len(rows) == 3 and ("mog_flow", "implicit") in rows, "a flow has one regime"
    assert drawn.count(3) >= 2 * (2 * 3 + 2), "two models, two steps at least in each of three turns and for the memory"
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
        assert table["x sum"] == pytest.approx(table["ms"] / sum(row["parts_ms"].values()))
        fixed = sum(row["parts_ms"][part] for part in parts - {"attention", "norms", "GELU"})
        assert table["x limit"] == pytest.approx(sorted(turns["stock"])[1] / fixed)
        assert row["by_k"]["steps"] == [1, 2, 3] and table["MB 10/1"] == row["by_k"]["MB"][2] / row["by_k"]["MB"][0]
        assert any(line.split()[:3] == [script, regime, f"{table['ms']:.2f}"] for line in printed.splitlines())


WRONG = [  # flags, what the line must name
    ("--scripts linear", "--scripts"),
    ("--regimes magic", "--regimes"),
    ("--scripts mog_flow --regimes explicit", "mog_flow"),
    ("--repeats 0", "--repeats"),
    ("--device cuda:99", "cuda:99"),
    ("--dtype float8", "--dtype"),
    ("--preset huge", "--preset"),
    ("--width 9", "--heads"),
    ("--scripts linreg mnist --noise 1", "--noise"),  # mnist has none
    ("--scripts mnist --regime explicit", "--regime"),
    ("--wide 9", "--wide"),
    ("--resume folder", "--resume"),
    ("--eval-tasks 8", "--eval-tasks"),
    ("--out here", "here exists"),
    ("--out other.json", "other.png exists"),
    ("--out /dev/null --overwrite", "/dev/null"),
    ("--out here/there.json", "here"),
    ("--out folder --overwrite", "folder is not to be replaced"),
    ("--out=", "--out"),
    ("--attention linear", "drop --attention"),
    ("stray", "stray"),
]


@pytest.mark.parametrize("flags,culprit", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_use(flags, culprit, capsys):
    os.mkdir("folder")
    for name in ("here", "other.png"):
        with open(name, "w") as f:
            f.write("mine")
    refused(capsys, culprit, "bench", flags, tiny=False)
