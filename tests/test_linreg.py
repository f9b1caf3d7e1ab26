"""Linear regression: its oracle and sampler against textbook formulas, and all that a run promises to keep or to repeat."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import linreg
from conftest import ROOT, TINY, call


def settings(**changes):
    args = argparse.Namespace(dim=4, noise=0.5, context=7, queries=6, steps=3, eval_tasks=40, device="cpu")
    vars(args).update(changes)
    return args


# ---------------------------------------------------------------- the oracle and the sampler


def test_the_ridge_oracle_is_the_bayesian_posterior_mean():
    """A rank-one Kalman update an observation, from w ~ N(0, I), in numpy; and the normal equations."""
    torch.manual_seed(0)
    noise, (x, y, query_x) = 0.7, (torch.randn(3, 9, 4), torch.randn(3, 9, 1), torch.randn(3, 5, 4))
    found = linreg.ridge(x, y, query_x, noise).numpy()[..., 0]
    for b in range(3):
        mean, covariance = np.zeros(4), np.eye(4)
        for n in range(9):
            a, target = x[b, n].double().numpy(), 2 * y[b, n, 0].item()  # 2 = sqrt(dim): targets come divided by it
            gain = covariance @ a / (a @ covariance @ a + noise**2)
            mean, covariance = mean + gain * (target - a @ mean), covariance - np.outer(gain, a @ covariance)
        np.testing.assert_allclose(found[b], query_x[b].numpy() @ mean / 2, rtol=1e-4, atol=1e-5)
        a, targets = x[b].double().numpy(), 2 * y[b, :, 0].double().numpy()
        w = np.linalg.inv(a.T @ a + noise**2 * np.eye(4)) @ a.T @ targets
        np.testing.assert_allclose(found[b], query_x[b].numpy() @ w / 2, rtol=1e-4, atol=1e-5)


def test_the_oracle_reaches_the_noise_floor_and_never_beats_it_by_chance():
    args = settings(context=2000, queries=500)
    torch.manual_seed(0)
    task = linreg.sample_tasks(16, 1, args)
    answer = linreg.ridge(task.context_x[0], task.context_y[0], task.query_x, args.noise)
    error = linreg.make_metric(args)(answer, task.query_y).mean().item()
    assert error == pytest.approx(args.noise**2, rel=0.06)


def test_moments_of_the_sampler_in_scaled_and_in_paper_units():
    args = settings(dim=8, context=50, queries=50)
    torch.manual_seed(0)
    task = linreg.sample_tasks(4000, 2, args)
    assert task.context_x.shape == (2, 4000, 50, 8) and task.query_y.shape == (4000, 50, 1)
    expected = (8 + 0.5**2) / 8
    for x, y in ((task.context_x, task.context_y), (task.query_x, task.query_y)):
        assert x.var().item() == pytest.approx(1, rel=0.01) and y.var().item() == pytest.approx(expected, rel=0.05)
    nothing = linreg.make_metric(args)(torch.zeros_like(task.query_y), task.query_y).mean(1)
    assert abs(nothing.mean().item() - (8 + 0.5**2)) < 4 * nothing.std().item() / 4000**0.5
    # One w a task: a least squares fit on one mini-batch leaves only noise on the other, and on the queries.
    w = torch.linalg.lstsq(task.context_x[0], task.context_y[0]).solution
    for x, y in ((task.context_x[1], task.context_y[1]), (task.query_x, task.query_y)):
        left = 8 * (x @ w - y).square().mean().item()
        assert left == pytest.approx(0.5**2 * (1 + 8 / (50 - 8 - 1)), rel=0.05)
    assert not torch.equal(task.context_x[0], task.context_x[1])


def test_the_fixed_predictor_fits_the_task_exactly():
    """With the task's own w as parameters, what is left is noise: prediction and targets are in the same units."""
    args = settings(noise=1e-6)
    torch.manual_seed(0)
    w = torch.randn(3, 4, 1)  # sample_tasks draws w first
    torch.manual_seed(0)
    task = linreg.sample_tasks(3, 1, args)
    torch.testing.assert_close(linreg.predictor(w[..., 0], task.query_x), task.query_y, rtol=1e-4, atol=1e-5)


def test_the_first_mini_batches_and_the_queries_of_the_evaluation_do_not_depend_on_k_or_seed():
    def tasks(K, seed):
        common.seed_all(common.TRAINING, seed)  # whatever was drawn before
        return list(common.evaluation_tasks(lambda B: linreg.sample_tasks(B, K, settings()), 40))

    for few, many in zip(tasks(2, 0), tasks(5, 1), strict=True):
        assert torch.equal(few.query_x, many.query_x) and torch.equal(few.query_y, many.query_y)
        assert torch.equal(few.context_x, many.context_x[:2]) and torch.equal(few.context_y, many.context_y[:2])


def test_training_data_depend_on_seed_and_iteration(monkeypatch, tmp_path):
    def tasks(seed):
        seen, sample = [], linreg.sample_tasks
        monkeypatch.setattr(linreg, "sample_tasks", lambda *a: seen.append(sample(*a)) or seen[-1])
        call("linreg", f"--seed {seed} --out out{len(os.listdir())}")
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        return seen

    first, again, other = tasks(0), tasks(0), tasks(1)
    assert len(first) == 4  # three iterations, one evaluation chunk
    for a, b, c in zip(first, again, other):
        assert torch.equal(a.query_y, b.query_y) and torch.equal(a.context_x, b.context_x)
        assert torch.equal(a.query_y, c.query_y) == (a is first[-1])  # only the evaluation ignores --seed
    assert not torch.equal(first[0].query_y, first[1].query_y)


def test_printed_baselines_are_the_oracle_on_exactly_the_data_seen(finished):
    """Recomputed from the evaluation's own tasks, step by step."""
    results = json.load(open(finished("linreg") / "results.json"))
    args = argparse.Namespace(**results["args"], device="cpu")
    (task,) = common.evaluation_tasks(lambda B: linreg.sample_tasks(B, 4, args), 4)
    baselines = results["baselines"]["id"]
    for k in range(1, 5):
        x, y = torch.cat(list(task.context_x[:k]), 1), torch.cat(list(task.context_y[:k]), 1)
        error = 3 * (linreg.ridge(x, y, task.query_x, args.noise) - task.query_y).square().mean()
        assert baselines["ridge, all seen"]["mean"][k - 1] == pytest.approx(error.item(), rel=1e-4)
    assert baselines["ridge, all seen"]["steps"] == [1, 2, 3, 4]
    assert set(baselines["ridge, first batch"]["mean"]) == {baselines["ridge, all seen"]["mean"][0]}
    assert baselines["nothing"]["mean"] == pytest.approx([3 * task.query_y.square().mean().item()] * 5, rel=1e-4)


# ---------------------------------------------------------------- stop, resume, evaluate, redraw


TWENTY = "--iters 20 --history 2 --carry random --signal both"  # all that could keep a hidden state


def contents(folder):
    """Everything in a run that must repeat: weights, optimizer, log, results; without times and folders."""
    checkpoint = torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)
    results = json.load(open(os.path.join(folder, "results.json")))
    rows = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    for row in rows:
        del row["seconds"]
    for key in ("command", "train_seconds"):
        del results[key]
    del checkpoint["train_seconds"]
    return checkpoint, results, rows


def assert_same_run(a, b):
    (checkpoint_a, results_a, rows_a), (checkpoint_b, results_b, rows_b) = contents(a), contents(b)
    assert identical(checkpoint_a, checkpoint_b)
    assert results_a == results_b
    assert rows_a == rows_b


def identical(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_twenty_iterations_equal_ten_an_interrupt_and_ten_more(monkeypatch, capsys):
    monkeypatch.setattr(common.Journal, "every", 4)  # so that the interrupt falls between two rows of the log
    call("linreg", TWENTY, "--out straight")
    sample, calls = linreg.sample_tasks, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return sample(*args)

    monkeypatch.setattr(linreg, "sample_tasks", interrupted)
    call("linreg", TWENTY, "--out broken")
    assert "stopped after 10 of 20" in capsys.readouterr().out
    assert json.load(open("broken/results.json"))["iterations"] == 10, "Ctrl-C evaluates"
    assert os.path.exists("broken/error.png"), "and plots"
    call("linreg", "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def python(*words):
    return [sys.executable, *map(str, words)]


def test_ctrl_c_at_a_random_moment_of_a_real_process_loses_nothing():
    flags = [*TINY["linreg"].split(), *TWENTY.split(), "--iters", "300"]
    call("linreg", *flags, "--out straight", tiny=False)
    process = subprocess.Popen(python(os.path.join(ROOT, "linreg.py"), *flags, "--out", "broken"), stderr=subprocess.PIPE, text=True, bufsize=1)
    seen = ""
    while "/300" not in seen:  # the bar: training has begun
        seen += process.stderr.read(1)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in rest, rest
    stopped = torch.load("broken/checkpoint.pt", weights_only=True)["iteration"]
    assert 0 < stopped < 300 and json.load(open("broken/results.json"))["iterations"] == stopped
    subprocess.run(python(os.path.join(ROOT, "linreg.py"), "--resume", "broken"), check=True, capture_output=True, timeout=60)
    assert_same_run("straight", "broken")


def test_resuming_a_finished_run_changes_nothing(finished, finished_copy):
    folder = finished_copy("linreg")
    call("linreg", "--resume", folder, tiny=False)
    assert_same_run(finished("linreg"), folder)


def test_evaluating_a_checkpoint_reproduces_its_results(finished, finished_copy):
    folder = finished_copy("linreg")
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    call("linreg", "--eval", folder / "checkpoint.pt", tiny=False)
    trained, again = (json.load(open(f)) for f in (folder / "results.json", folder / "eval" / "results.json"))
    for key in ("metrics", "baselines", "iterations", "parameters", "train_seconds", "seed"):
        assert again[key] == trained[key]
    assert before == {f: (folder / f).read_bytes() for f in before}
    call("linreg", "--eval", folder / "checkpoint.pt", "--out more --eval-tasks 50", tiny=False)
    assert json.load(open("more/results.json"))["metrics"]["id"]["tasks"] == 50


def test_plots_are_redrawn_from_the_json_alone(finished_copy):
    folder = finished_copy("linreg")
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    (folder / "error.png").unlink()
    call("linreg", "--plot-only", folder, tiny=False)
    assert before == {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    results = json.load(open(folder / "results.json"))
    results["metrics"]["id"]["mean"][1] += 1
    json.dump(results, open(folder / "results.json", "w"))
    call("linreg", "--plot-only", folder, tiny=False)
    assert (folder / "error.png").read_bytes() != before["error.png"]


# ---------------------------------------------------------------- losses that are no number


def stops(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        call("linreg", *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def finite(checkpoint):
    return all(w.isfinite().all() for w in checkpoint["model"].values())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    sample, calls = linreg.sample_tasks, []

    def spoiled(*args):
        task = sample(*args)
        calls.append(1)
        if len(calls) == 8:
            task.context_y[1, 2, 3] = float("nan")
        return task

    monkeypatch.setattr(linreg, "sample_tasks", spoiled)
    monkeypatch.setattr(common.Journal, "save_seconds", 0)
    assert "iteration 8" in stops(capsys, "--iters 20 --out run")
    kept = torch.load("run/checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 7 and finite(kept) and not os.path.exists("run/results.json")


@pytest.mark.parametrize("iters", (8, 20), ids=("last-iteration", "mid-run"))
def test_an_update_that_spoils_the_weights_is_not_saved(iters, monkeypatch, capsys):
    """The loss of the same iteration is still finite: it was computed before the update."""
    clip, calls = nn.utils.clip_grad_norm_, []

    def spoiled(parameters, most):
        parameters = list(parameters)
        clip(parameters, most)
        calls.append(1)
        if len(calls) == 8:
            parameters[0].grad.fill_(float("nan"))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spoiled)
    monkeypatch.setattr(common.Journal, "save_seconds", 0)
    assert "iteration" in stops(capsys, f"--iters {iters} --out run")
    kept = torch.load("run/checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 7 and finite(kept)


def test_a_learning_rate_beyond_reason_stops_the_run(capsys):
    assert "iteration" in stops(capsys, "--iters 20 --lr 1e30 --out run")
    kept = torch.load("run/checkpoint.pt", weights_only=True) if os.path.exists("run/checkpoint.pt") else {"model": {}}
    assert finite(kept)
