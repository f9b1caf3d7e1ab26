"""Linear regression: its oracle and its sampler against textbook formulas."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

import common
import linreg
from conftest import call


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


def test_the_product_of_posteriors_equals_a_product_of_densities_on_a_grid():
    """One mini-batch: ridge. Several: each posterior of w.x in function space (a Gaussian process), multiplied on a grid."""
    torch.manual_seed(0)
    noise, dim, query_x = 0.7, 4, torch.randn(2, 5, 4)
    batches = [(torch.randn(2, 6, dim), torch.randn(2, 6, 1)) for _ in range(3)]
    answers = linreg.posterior_product(batches, query_x, noise)
    torch.testing.assert_close(answers[0], linreg.ridge(*batches[0], query_x, noise), rtol=1e-4, atol=1e-5)
    grid = np.linspace(-30, 30, 60_001)
    for b in range(2):
        for q, star in enumerate(query_x[b].double().numpy()):
            log = -(grid**2) / (2 * star @ star)  # the prior
            for k, (x, y) in enumerate(batches):
                a, targets = x[b].double().numpy(), 2 * y[b, :, 0].double().numpy()
                gain = np.linalg.solve(a @ a.T + noise**2 * np.eye(6), a @ star)
                mean, variance = gain @ targets, star @ star - gain @ (a @ star)
                log = log - (grid - mean) ** 2 / (2 * variance) + grid**2 / (2 * star @ star)
                density = np.exp(log - log.max())
                assert answers[k][b, q, 0].item() == pytest.approx(grid @ density / density.sum() / 2, rel=1e-3, abs=1e-4)


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
    torch.testing.assert_close(linreg.basis(task.query_x) @ w, task.query_y, rtol=1e-4, atol=1e-5)


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


def test_baselines_are_given_exactly_the_data_seen(finished):
    """Recomputed from the evaluation's own tasks, step by step."""
    results = json.load(open(finished("linreg") / "results.json"))
    args = argparse.Namespace(**results["args"], device="cpu")
    (task,) = common.evaluation_tasks(lambda B: linreg.sample_tasks(B, 4, args), 4)
    baselines = results["baselines"]["id"]
    for k in range(1, 5):
        x, y = torch.cat(list(task.context_x[:k]), 1), torch.cat(list(task.context_y[:k]), 1)
        error = 3 * (linreg.ridge(x, y, task.query_x, args.noise) - task.query_y).square().mean()
        assert baselines["ridge, all seen"]["mean"][k - 1] == pytest.approx(error.item(), rel=1e-4)
        answer = linreg.posterior_product(list(zip(task.context_x[:k], task.context_y[:k])), task.query_x, args.noise)[-1]
        error = 3 * (answer - task.query_y).square().mean()
        assert baselines["posteriors, one a batch"]["mean"][k - 1] == pytest.approx(error.item(), rel=1e-4)
    assert baselines["ridge, all seen"]["steps"] == [1, 2, 3, 4]
    assert set(baselines["ridge, first batch"]["mean"]) == {baselines["ridge, all seen"]["mean"][0]}
    assert baselines["nothing"]["mean"] == pytest.approx([3 * task.query_y.square().mean().item()] * 5, rel=1e-4)
