"""Flow matching, distances and letters against independent references; smoke runs; wrong use."""

import argparse
import itertools
import json
import math

import numpy as np
import pytest
import torch

import alphabets
import common
import mog_flow
from conftest import TINY
from mog_flow import Density
from test_wrong_use import refused


def mog_args(**changes):
    return argparse.Namespace(**(dict(dim=2, max_clusters=5, device="cpu", solver="heun", ode_steps=10, context=6, queries=7, steps=3) | changes))


# ---------------------------------------------------------------- path and target


def test_path_goes_from_noise_to_data_and_the_target_is_its_derivative():
    torch.manual_seed(0)
    x0, x1, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 1, requires_grad=True)
    assert torch.equal(mog_flow.path(x0, x1, torch.zeros(4, 1))[0], x0)
    assert torch.equal(mog_flow.path(x0, x1, torch.ones(4, 1))[0], x1)
    xt, velocity = mog_flow.path(x0, x1, t)
    slope = torch.stack([torch.autograd.grad(xt[:, i].sum(), t, retain_graph=True)[0][:, 0] for i in range(3)], 1)
    assert torch.allclose(velocity, slope, atol=1e-6)


def test_tasks_hold_points_on_the_path_and_their_target():
    """With one tiny cluster x_1 is known, so that x_0 can be had back from x_t, and x_1 - x_0 be compared with the target."""
    torch.manual_seed(0)
    centre = torch.tensor([[[0.7, -0.4]]])
    task = mog_flow.sample_tasks(Density(centre, torch.tensor([1]), torch.tensor([0.0])), 3, mog_args(queries=50))
    xt, t = task.query_x[..., :2], task.query_x[..., 4:5]
    x0 = (xt - t * centre) / (1 - t)
    assert torch.allclose(task.query_y, centre - x0, atol=1e-3)
    assert 0.3 < t.mean() < 0.7 and t.min() < 0.1 and t.max() > 0.9
    assert task.context_x.shape[:3] == (3, 1, 6) and torch.equal(task.context_x[..., 4], torch.ones(3, 1, 6))  # data are at t = 1
    assert torch.allclose(task.context_x[..., :2], centre.expand(3, 1, 6, 2)) and not task.context_y.any()


def test_mixtures_have_the_papers_sizes():
    torch.manual_seed(0)
    density = mog_flow.sample_densities(4000, mog_args(max_clusters=3))
    assert sorted(density.count.unique().tolist()) == [1, 2, 3]
    assert abs(mog_flow.UNIT * density.centres.std() - 5) < 0.1
    one = Density(density.centres[:1], torch.tensor([1]), density.std)
    points = mog_flow.UNIT * (mog_flow.draw(one, 20_000) - density.centres[:1, :1])
    assert abs(points.std() - 0.3) < 0.01 and points.mean().abs() < 0.02
    two = Density(torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([2]), torch.tensor([0.0]))
    drawn = mog_flow.draw(two, 10_000)
    assert drawn.max() == 1 and abs(drawn.mean() - 0.5) < 0.03  # the padding is never drawn, the others are equally likely


def test_the_guess_of_the_data_is_a_regression_on_the_path():
    """If data are N(0, I), x_1 is best guessed by a line through x_t whose slope least squares finds."""
    x0, x1 = torch.randn(2, 20_000, 1)
    for t in (0.2, 0.5, 0.9):
        xt, _ = mog_flow.path(x0, x1, t)
        guess = mog_flow.embed(xt, torch.full_like(xt, t))[:, 1:2]
        assert torch.allclose(guess, (xt * x1).sum() / xt.square().sum() * xt, atol=0.12)


# ---------------------------------------------------------------- exact field and solvers


def test_exact_field_is_the_mean_velocity_of_all_paths_through_a_point():
    """Against brute force: x_0 = (x - t x_1) / (1 - t) for many x_1, weighted by the noise density at x_0."""
    torch.manual_seed(0)
    density = Density(torch.tensor([[[0.8, 0.1], [-0.6, 0.5], [9.0, 9.0]]]), torch.tensor([2]), torch.tensor([0.3]))
    x1 = mog_flow.draw(density, 400_000)[0].double()
    for t in (0.1, 0.5, 0.7):
        x = torch.tensor([[0.2, 0.1], [-0.5, 0.4]])
        expected = []
        for point in x.double():
            x0 = (point - t * x1) / (1 - t)
            weight = torch.softmax(-x0.square().sum(-1) / 2, 0)
            expected.append((weight[:, None] * (x1 - x0)).sum(0))
        field = mog_flow.exact_field(density, x[None], torch.full((1, 2, 1), t))[0]
        assert torch.allclose(field.double(), torch.stack(expected), atol=0.03), t


def gaussian_field(mean, covariance):
    """v(x, t) = mean + (t C - (1 - t) I) ((1 - t)^2 I + t^2 C)^-1 (x - t mean): the field of a single Gaussian, any covariance."""
    eye = torch.eye(len(mean)).double()

    def field(x, t):
        s = float(t.flatten()[0])
        gain = (s * covariance - (1 - s) * eye) @ torch.linalg.inv((1 - s) ** 2 * eye + s**2 * covariance)
        return mean + (x - s * mean) @ gain.T

    return field


@pytest.mark.parametrize("solver, steps, tolerance", [("euler", 400, 0.02), ("midpoint", 40, 0.005), ("heun", 40, 0.005)])
def test_solvers_carry_noise_to_a_gaussian_in_closed_form(solver, steps, tolerance):
    """The exact flow is affine, so n points arrive with the noise's own mean and covariance, transformed by C^(1/2)."""
    torch.manual_seed(0)
    mean, root = torch.tensor([0.5, -1.0]).double(), torch.tensor([[0.8, 0.3], [0.3, 0.5]]).double()
    noise = torch.randn(1, 500, 2).double()
    points = mog_flow.integrate(gaussian_field(mean, root @ root), noise, mog_args(solver=solver, ode_steps=steps))
    assert torch.allclose(points, mean + noise @ root, atol=10 * tolerance)
    assert torch.allclose(points[0].T.cov(), root @ noise[0].T.cov() @ root, atol=tolerance)
    assert torch.allclose(points[0].mean(0), mean + noise[0].mean(0) @ root, atol=tolerance)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_have_their_order(solver, order):
    """dx / dt = t - x has the solution t - 1 + (x_0 + 1) exp(-t); halving the step divides the error by 2^order."""
    x = torch.tensor([[[1.0]]]).double()
    ends = [mog_flow.integrate(lambda x, t: t - x, x, mog_args(solver=solver, ode_steps=n)) for n in (40, 80)]
    error = [abs(end - 2 / math.e).item() for end in ends]
    assert abs(math.log2(error[0] / error[1]) - order) < 0.25


def test_exact_field_of_one_cluster_is_the_gaussian_one():
    torch.manual_seed(0)
    mean, t = torch.tensor([0.5, -1.0]), torch.full((1, 9, 1), 0.6)
    x = torch.randn(1, 9, 2)
    field = mog_flow.exact_field(Density(mean[None, None], torch.tensor([1]), torch.tensor([0.3])), x, t)
    assert torch.allclose(field.double(), gaussian_field(mean.double(), 0.09 * torch.eye(2).double())(x.double(), t), atol=1e-5)


def test_generating_with_memories_equals_the_greedy_loop():
    """One Euler step of size 1 from t = 0: noise + the velocity that `common.refine` gives, with the same mini-batches."""
    torch.manual_seed(0)
    args = mog_args(width=16, heads=2, depth=2, history=2, mask="none", state="logits", attention="softmax", update="residual", clock="steps", state_scale=0.5, init="rotation", decoder="linear", solver="euler", ode_steps=1, seed=0, checkpoint=None, reason="as asked", out="nowhere")
    args.regime, args.dtype, args.compile = "implicit", "float32", False
    model = mog_flow.make_model(args).eval()
    batches, noise = torch.randn(3, 4, 6, 2), torch.randn(4, 7, 2)
    task = common.Task(*mog_flow.observe(batches), mog_flow.embed(noise, torch.zeros(4, 7, 1)), None)
    with torch.no_grad():
        *_, velocity = common.refine(model, task)
        generated = mog_flow.generate(model, batches, noise, args)
    assert torch.allclose(generated, noise + velocity[0], atol=1e-5)
    assert not torch.allclose(generated, mog_flow.generate(model, batches[:2], noise, args), atol=1e-5)  # it reads the last one


# ---------------------------------------------------------------- distances and the rows beside the model


@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_equals_brute_force_over_permutations(n, p):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n, 3)), rng.normal(size=(2, n, 3))
    found = mog_flow.wasserstein(torch.tensor(a), torch.tensor(b), p)
    for i in range(2):
        best = min(np.mean([np.linalg.norm(a[i, j] - b[i, s[j]]) ** p for j in range(n)]) for s in itertools.permutations(range(n)))
        assert found[i].item() == pytest.approx(best ** (1 / p), abs=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_in_one_dimension_is_sorting(p):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 60, 1)), 2 * rng.normal(size=(1, 60, 1)) + 1
    expected = np.mean(np.abs(np.sort(a[0, :, 0]) - np.sort(b[0, :, 0])) ** p) ** (1 / p)
    assert mog_flow.wasserstein(torch.tensor(a), torch.tensor(b), p).item() == pytest.approx(expected, abs=1e-9)


def test_bandwidth_is_the_likeliest_by_the_textbook_density():
    """Against torch.distributions on points drawn with the same seed: no bandwidth of the grid does better."""
    args, n = mog_args(max_clusters=2), 40
    found = mog_flow.best_bandwidth(mog_flow.sample_densities, n, args)
    common.seed_all(common.EVALUATION, 1000, n)
    density = mog_flow.sample_densities(32, args)
    fresh, points = mog_flow.draw(density, 256), mog_flow.draw(density, n)

    def likelihood(std):
        each = torch.distributions.Normal(points[:, None], std).log_prob(fresh[:, :, None]).sum(-1)  # (B, fresh, n)
        return (each.logsumexp(-1) - math.log(n)).mean().item()

    grid = 0.06 * 10 ** np.linspace(-0.5, 1.5, 13)
    assert found == pytest.approx(max(grid, key=likelihood), rel=1e-5)
    assert grid[0] < found < grid[-1]


def test_one_gaussian_has_the_points_mean_and_covariance():
    torch.manual_seed(0)
    points = torch.randn(1, 300, 2) @ torch.tensor([[2.0, 0.5], [0.0, 0.3]]) + 4
    drawn = mog_flow.one_gaussian(points, 200_000)[0]
    assert torch.allclose(drawn.mean(0), points[0].mean(0), atol=0.03)
    assert torch.allclose(drawn.T.cov(), points[0].T.cov(), atol=0.05)


@torch.no_grad()
def test_an_evaluation_equals_one_by_hand(tmp_path):
    """34 tasks, the first ones of two draws of 32, after two of six mini-batches; in the units of the data."""
    flags = dict(width=16, heads=2, depth=2, history=2, mask="none", state="logits", attention="softmax", update="residual", clock="none", state_scale=1.0, init="random", decoder="linear", ode_steps=2, seed=0, checkpoint=None, reason="as asked")
    args = mog_args(regime="implicit", dtype="float32", compile=False, points=9, eval_tasks=34, out=str(tmp_path), **flags)
    model, rows = mog_flow.make_model(args).eval(), []
    m, beside = mog_flow.compare(model, args, "id", "mixtures", mog_flow.sample_densities, 5.0, stream=7)
    bandwidth = mog_flow.best_bandwidth(mog_flow.sample_densities, 12, args)
    for index, count in enumerate((32, 2)):
        common.seed_all(common.EVALUATION, 7, index)
        density = mog_flow.sample_densities(32, args)
        batches = [mog_flow.draw(density, 6) for _ in range(6)]
        truth, *fresh = (mog_flow.draw(density, 9) for _ in range(5))
        points = mog_flow.generate(model, batches[:2], torch.randn_like(truth), args)
        mog_flow.resample(batches[0], 9, 0.1)  # the kernel density after one mini-batch comes first
        kernel = mog_flow.resample(torch.cat(batches[:2], 1), 9, bandwidth)
        distance = lambda x, p: mog_flow.wasserstein(5 * x, 5 * truth, p)
        floor = [sum(distance(x, p) for x in fresh) / 4 for p in (2, 1)]
        each = [distance(points, 2), distance(points, 1), distance(points, 2) - floor[0], distance(points, 1) - floor[1], distance(kernel, 2) - floor[0]]
        rows.append(torch.stack(each)[:, :count])
        if index == 0:
            saved = np.load(tmp_path / "points_id.npz")
            for name, value in (("truth", truth), ("batches", torch.stack(batches)[:, :8]), ("generated", points)):
                found = saved[name][2] if name == "generated" else saved[name]
                torch.testing.assert_close(torch.tensor(found), 5 * value[:8] if name != "batches" else 5 * value, rtol=1e-3, atol=1e-3)
    found = (m, m["w1"], m["excess"], m["w1_excess"])
    for part, row in zip(found, torch.cat(rows, 1)):
        assert part["mean"][2] == pytest.approx(row.mean().item(), rel=1e-4) and part["stderr"][2] == pytest.approx(row.std().item() / 34**0.5, rel=1e-4)
    assert beside["kernel density"]["excess"]["mean"][1] == pytest.approx(torch.cat(rows, 1)[4].mean().item(), rel=1e-4)
    assert m["steps"] == [0, 1, 2, 3, 4, 6] and m["name"] == "W2, 9 points"


# ---------------------------------------------------------------- letters


def test_training_samples_only_training_letters(monkeypatch):
    """Seen from outside: what `train` draws, turned and scaled back, is the ink of a training letter, and each of them occurs."""
    seen = []
    monkeypatch.setattr(mog_flow, "train", lambda model, args, sample: seen.append(sample(400, args)))
    alphabets.train(None, argparse.Namespace(device="cpu"))
    density, names = seen[0], set()
    glyphs = {letter: alphabets.glyph(letter) for letter in alphabets.LETTERS + alphabets.HELD_OUT}
    for centres, count in zip(density.centres, density.count):
        radius = centres[:count].norm(dim=1)
        radius = radius / radius.max()  # turning and scaling leave the pixels' relative distances from the centre
        fits = [name for name, g in glyphs.items() if len(g) == count and torch.allclose(g.norm(dim=1) / g.norm(dim=1).max(), radius, atol=1e-4)]
        assert len(fits) == 1
        names.add(fits[0])
    assert names == set(alphabets.LETTERS) and len(names) == 20 and set(alphabets.HELD_OUT) == set("DHNTXY")


def test_glyphs_are_letters():
    tall, wide = alphabets.glyph("I"), alphabets.glyph("W")
    assert tall.abs().max() == 1 and wide.abs().max() == 1  # the longer side from -1 to 1, the aspect kept
    assert tall[:, 0].max() < 0.3 and wide[:, 1].max() < 1 <= wide[:, 0].max()
    ink = alphabets.glyph("T")
    assert (ink[:, 1] > 0.8).sum() > 3 * (ink[:, 1] < -0.8).sum()  # the bar is up
    hole = alphabets.glyph("O").norm(dim=1)
    assert hole.min() > 0.4


def test_letters_are_turned_and_scaled():
    torch.manual_seed(0)
    args = argparse.Namespace(device="cpu")
    density = alphabets.make_sampler("I", args)(500, args)
    size = alphabets.UNIT * density.centres.norm(dim=-1).amax(1) / alphabets.glyph("I").norm(dim=1).max()
    assert 1.5 <= size.min() < 1.7 and 4.3 < size.max() <= 4.5  # 3 * U(0.5, 1.5)
    top = density.centres[:, 0] / density.centres[:, 0].norm(dim=1, keepdim=True)
    assert top.mean(0).norm() < 0.15  # every direction


def test_letters_are_evaluated_where_their_split_says_in_their_units(monkeypatch):
    seen = {}
    monkeypatch.setattr(mog_flow, "compare", lambda model, args, split, data, sample, unit, stream: (seen.update({split: (data, sample(400, args), unit, stream)}), ({}, {}))[1])
    alphabets.evaluate(None, mog_args())
    for split, letters in (("id", alphabets.LETTERS), ("ood", alphabets.HELD_OUT)):
        data, density, unit, _ = seen[split]
        assert data == f"letters {letters}" and set(density.count.tolist()) == {len(alphabets.glyph(letter)) for letter in letters}
        assert unit * density.std.item() == pytest.approx(0.05) and 4 < unit * density.centres.norm(dim=-1).amax() < 4.5 * 2**0.5
    assert seen["id"][3] != seen["ood"][3], "no random numbers in common"


def test_letters_are_never_mirrored():
    glyph = alphabets.glyph("F")
    for centres in alphabets.make_sampler("F", mog_args())(20, mog_args()).centres:
        turn = torch.linalg.lstsq(glyph, centres).solution
        assert torch.allclose(turn @ turn.T, turn.det() * torch.eye(2), atol=1e-4)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "script, flags",
    [(mog_flow, "--max-clusters 3 --solver euler"), (mog_flow, "--dim 5 --mask none --history 2"), (alphabets, "--state latent --solver midpoint")],
)
def test_smoke(script, flags, tmp_path, capsys, pictures):
    out = tmp_path / "run"
    script.main([*TINY["mog_flow"].split(), *flags.split(), "--out", str(out)])
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    splits = ["id", "ood"] if script is alphabets else ["id"]
    assert list(results["metrics"]) == splits and results["iterations"] == 2
    for split in splits:
        m, floor = results["metrics"][split], results["baselines"][split][mog_flow.FLOOR]
        assert m["steps"] == [0, 1, 2] and m["tasks"] == 3
        assert all(map(math.isfinite, m["mean"] + m["stderr"] + m["w1"]["mean"] + m["excess"]["stderr"]))
        assert all(w1 <= w2 + 1e-9 for w1, w2 in zip(m["w1"]["mean"], m["mean"]))
        assert np.allclose(np.array(m["mean"]) - floor["mean"], m["excess"]["mean"])
        assert f"{split} beyond the floor" in printed
    drawn = ["error.png", "excess.png", *(f"grid_{split}.png" for split in splits), *(f"refinement_{split}.gif" for split in splits)]
    assert all((out / file).stat().st_size > 5000 for file in drawn)


def test_plots_are_redrawn_from_the_files_alone(tmp_path, capsys, pictures):
    out = tmp_path / "run"
    mog_flow.main([*TINY["mog_flow"].split(), "--out", str(out)])
    before = (out / "grid_id.png").read_bytes()
    for file in ("checkpoint.pt", "grid_id.png"):
        (out / file).unlink()
    mog_flow.main(["--plot-only", str(out)])
    assert (out / "grid_id.png").read_bytes() == before
    points = (out / "points_id.npz").read_bytes()
    middle = len(points) // 2
    for damaged in (b"PK not a zip", points[:middle], points[:middle] + b"0123456789" + points[middle + 10 :]):
        (out / "points_id.npz").write_bytes(damaged)
        refused(capsys, "points_id.npz is missing or damaged", "mog_flow", "--plot-only", out, tiny=False)
    results = json.loads((out / "results.json").read_text())
    del results["metrics"]["id"]["excess"]
    (out / "results.json").write_text(json.dumps(results))
    refused(capsys, "nothing is drawn", "mog_flow", "--plot-only", out, tiny=False)


def test_points_and_solver_can_be_changed_without_training_anew(tmp_path):
    out = tmp_path / "run"
    mog_flow.main([*TINY["mog_flow"].split(), "--out", str(out)])
    mog_flow.main(["--eval", str(out / "checkpoint.pt"), "--points", "5", "--solver", "euler", "--ode-steps", "3"])
    usual, results = (json.loads((folder / "results.json").read_text()) for folder in (out, out / "eval"))
    assert results["args"] == usual["args"] | dict(points=5, solver="euler", ode_steps=3), "says how it was trained"
    assert results["metrics"]["id"]["name"] == "W2, 5 points" and results["iterations"] == 2


def test_no_draw_of_an_evaluation_depends_on_how_many_tasks_it_has(tmp_path, monkeypatch):
    """Neither the model's nor a rival's: what is drawn for task 32, the first of the second chunk."""
    distance, drawn = mog_flow.wasserstein, {}
    for tasks in (33, 35):
        drawn[tasks] = []
        monkeypatch.setattr(mog_flow, "wasserstein", lambda a, b, p: (drawn[tasks].append((len(a), a[0], b[0])), distance(a, b, p))[1])
        mog_flow.main([*TINY["mog_flow"].split(), "--eval-tasks", str(tasks), "--out", str(tmp_path / str(tasks))])
    assert {size for size, *_ in drawn[33]} == {32, 1} and {size for size, *_ in drawn[35]} == {32, 3}
    for (_, *one), (_, *other) in zip(drawn[33], drawn[35], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", ("mog_flow", "alphabets"))
@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--regime parametric", "--regime implicit only"),
        ("--regime explicit", "--regime implicit only"),
        ("--state softmax", "no softmax"),
        ("--decoder solve", "--decoder linear"),
        ("--signal grad", "--signal data"),
        ("--solver rk45", "invalid choice"),
        ("--ode-steps 0", "at least 1"),
        ("--points 1", "at least 2"),
    ],
)
def test_wrong_use(script, flags, reason, capsys):
    refused(capsys, reason, script, flags)


def test_mixtures_refuse_what_has_no_picture(capsys):
    refused(capsys, "at least 2", "mog_flow", "--dim 1")


def test_points_of_another_run_are_not_drawn(tmp_path, capsys):
    for k in "12":
        mog_flow.main([*TINY["mog_flow"].split(), "--steps", k, "--out", str(tmp_path / k)])
    (tmp_path / "1" / "points_id.npz").replace(tmp_path / "2" / "points_id.npz")
    refused(capsys, "of another run", "mog_flow", "--plot-only", tmp_path / "2", tiny=False)
