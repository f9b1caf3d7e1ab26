"""Flow matching in context on mixtures of Gaussians; the vector field is refined over mini-batches (sec. 9.6; table 6).

A task is a mixture in `--dim` dimensions: 1 to `--max-clusters` equal clusters, means ~ N(0, 5^2), std 0.3. On the path
x_t = (1 - t) x_0 + t x_1 from noise x_0 to a point x_1 of the mixture, the model infers the velocity E[x_1 - x_0 | x_t]
from `--context` points of the mixture, and refines it with each further mini-batch. Following it from t = 0 to 1
generates points. K is the number of mini-batches behind a velocity, not the number of steps of the ODE solver.

    python mog_flow.py                                 # 2-d, up to 10 clusters: W2 0.31 above fresh points after 1 step, 0.07 after 5; 21 minutes on one core
    python mog_flow.py --dim 5
    python mog_flow.py --preset paper --launch graph   # up to 100 clusters; two minutes of training on an H100
"""

import collections
import itertools
import math
from functools import partial

import common  # before torch: it answers --help by itself
from common import Task, refine

import numpy as np
import torch
import torch.nn as nn
from scipy.optimize import linear_sum_assignment

# Up to 100 clusters are the paper's; width, depth and heads are those of related work; the rest is our choice.
PRESETS = {"paper": dict(max_clusters=100, context=200, queries=256, tasks=32, width=256, depth=4, heads=4, iters=6000, lr=1e-3, points=512)}
SPREAD, STD = 5.0, 0.3  # the paper's standard deviations: of the means, and of a cluster
UNIT = SPREAD  # models see points divided by this, so that data and the noise that flows start from are alike in size

# What a task's points are drawn from: equal Gaussians around the first `count` (B,) of `centres` (B, C, d), of one `std`.
Density = collections.namedtuple("Density", "centres count std")


def parse_flow_args(parser, presets, argv):
    """common.parse_args with the flags of flow matching, and without what the shared flags allow and a flow does not; for alphabets.py, too."""
    add = parser.add_argument_group("flow matching").add_argument
    add("--solver", choices=("euler", "midpoint", "heun"), default="heun", help="fixed-step ODE solver; all but euler read the field twice a step")
    add("--ode-steps", type=common.count, default=8, help="steps of the solver from noise (t = 0) to data (t = 1)")
    add("--points", type=common.number(int, 2), default=256, help="generated and true points per task in W2 and W1, which depend on it")
    args = common.parse_args(parser, presets, argv)
    if args.regime != "implicit":
        common.fail(f"--regime {args.regime} needs a predictor with parameters or a latent; a flow's velocities are refined by --regime implicit only")
    if args.state == "softmax":
        common.fail("--state softmax is for classes; a velocity has no softmax")
    if args.decoder != "linear":
        common.fail(f"--decoder {args.decoder}: an observation is a point, and has no velocity that a prediction could miss (use --decoder linear)")
    return args


def get_args(argv=None):
    parser = common.make_parser("mog_flow", __doc__)
    add = parser.add_argument_group("mixtures of Gaussians").add_argument
    add("--dim", type=common.number(int, 2), default=2, help="dimension of the points")
    add("--max-clusters", type=common.count, default=10, help="a task has 1 to this many clusters")
    parser.set_defaults(regime="implicit", steps=5, context=100, queries=64, tasks=8, iters=8000, lr=3e-3, decoder="linear", history=3, eval_tasks=200)
    return parse_flow_args(parser, PRESETS, argv)


# ---------------------------------------------------------------- the task


def sample_densities(B, args):
    """B mixtures, in the model's units. That all clusters of a mixture weigh the same is our choice."""
    centres = SPREAD / UNIT * torch.randn(B, args.max_clusters, args.dim, device=args.device)
    count = torch.randint(1, args.max_clusters + 1, (B,), device=args.device)
    return Density(centres, count, torch.tensor(STD / UNIT))


def draw(density, n):
    """n points of each density (B, n, d)."""
    centres, count, std = density
    index = (torch.rand(len(count), n, device=count.device) * count[:, None]).long()
    points = centres.take_along_dim(index[..., None], 1)
    return points + std * torch.randn_like(points)


def path(x0, x1, t):
    """The linear path and its velocity, which is the target: x_t and dx_t / dt."""
    return (1 - t) * x0 + t * x1, x1 - x0


def embed(x, t):
    """Points x (..., d) at times t (..., 1) as the model's inputs x (..., 2d + 9). Data are at t = 1.

    Beside x and t: the best guess of x_1 if all data were N(0, I), which is where to look among the context's points; and
    waves of t, since the velocity is a sum of points with coefficients that change with t, steeply towards t = 1.
    """
    waves = math.pi * t * torch.arange(1, 5, device=t.device)
    return torch.cat([x, t * x / (t**2 + (1 - t) ** 2), t, waves.sin(), waves.cos()], -1)


def observe(points):
    """Points (..., N, d) as observations [x, y]: at time 1, and of no velocity."""
    return embed(points, torch.ones_like(points[..., :1])), torch.zeros_like(points)


def sample_tasks(density, K, args):
    """K mini-batches of points and, as queries, points on their way at times t ~ U(0, 1)."""
    context_x, context_y = observe(torch.stack([draw(density, args.context) for _ in range(K)]))
    x1 = draw(density, args.queries)
    x0, t = torch.randn_like(x1), torch.rand_like(x1[..., :1])
    xt, velocity = path(x0, x1, t)
    return Task(context_x, context_y, embed(xt, t), velocity)


def loss(prediction, y):
    return (prediction - y).square().sum(-1)


# ---------------------------------------------------------------- the flow


def exact_field(density, x, t):
    """E[x_1 - x_0 | x_t = x] of a mixture, which is what a perfect model infers: x (B, Q, d), t (B, Q, 1) -> (B, Q, d)."""
    centres, count, std = density.centres[:, None], density.count[:, None, None], density.std
    variance = (1 - t) ** 2 + (t * std) ** 2  # of x_t within a cluster (B, Q, 1)
    offset = x[:, :, None] - t[..., None] * centres  # (B, Q, C, d)
    logits = -offset.square().sum(-1) / (2 * variance)
    logits = logits.masked_fill(torch.arange(centres.shape[2], device=x.device) >= count, -math.inf)
    slope = (t * std**2 - (1 - t)) / variance
    return (logits.softmax(-1)[..., None] * (centres + slope[..., None] * offset)).sum(2)


def integrate(field, x, args):
    """Follows field(x, t) from noise x (B, n, d) at t = 0 to t = 1, by Euler's method or one of its two corrections of second order."""
    h = 1 / args.ode_steps
    for i in range(args.ode_steps):
        t = torch.full_like(x[..., :1], i / args.ode_steps)
        v = field(x, t)
        if args.solver == "midpoint":  # the velocity half a step ahead
            v = field(x + h / 2 * v, t + h / 2)
        elif args.solver == "heun":  # the mean of those at both ends of the step
            v = (v + field(x + h * v, t + h)) / 2
        x = x + h * v
    return x


def generate(model, batches, x, args):
    """Noise x (B, n, d) -> points, each velocity refined with all `batches` (k, B, N, d), whose keys and values are computed once."""
    memories = [model.encode(*observe(batch)) for batch in batches]

    def field(x, t):
        query_x = embed(x, t)
        past = [model.initial_state(query_x)] * model.history
        for step, memory in enumerate(memories):  # `refine`, with the mini-batches encoded beforehand
            past = [*past[1:], model.update(past, memory, query_x, step=step)[-1]]
        return model.predict(past[-1][None], query_x)[0]

    return integrate(field, x, args)


# ---------------------------------------------------------------- training


def make_model(args):
    common.seed_all(common.WEIGHTS, args.seed)
    return common.place(common.Implicit(args, 2 * args.dim + 9, args.dim), args)


def train(model, args, sample=sample_densities):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()

    def step():
        """Draws tasks and leaves the gradients of their K losses in the parameters -> the losses and the metric."""
        task = common.share(sample_tasks(sample(args.tasks, args), args.steps, args))
        losses = []
        for prediction in refine(model, task):  # (1, B, Q, d)
            step_loss = loss(prediction, task.query_y).mean()
            (step_loss / args.steps).backward()  # at once: memory does not grow with K
            losses.append(step_loss.detach())
        return losses, losses[0] - losses[-1]  # the metric: what refinement gains, most noise cancelled

    step = common.replayed(step, model, args)  # itself, or with --launch graph a CUDA graph of it
    for iteration in journal:
        common.seed_all(common.TRAINING, args.seed, iteration)
        common.set_learning_rate(optimizer, iteration, args)
        losses, metric = step()
        common.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        journal.log(losses, metric)
    return journal.iteration, journal.seconds


# ---------------------------------------------------------------- evaluation

OURS, FLOOR, EXACT = "this model", "fresh samples (floor)", "exact field, same solver"  # the latter two have seen no context


def wasserstein(a, b, p):
    """Exact W_p between n and n points: ( min over pairings of the mean distance^p )^(1/p). a, b (B, n, d) -> (B,)."""
    costs = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy() ** p
    return torch.tensor([cost[linear_sum_assignment(cost)].mean() ** (1 / p) for cost in costs])


def best_bandwidth(sample, n, args):
    """Of kernel density estimates from n points, the bandwidth likeliest for fresh points of 32 separate tasks."""
    common.seed_all(common.EVALUATION, 1000, n)
    density = sample(32, args)
    squares = torch.cdist(draw(density, 256), draw(density, n)).square()  # (B, fresh, n)
    likelihood = lambda std: float((-squares / (2 * std**2)).logsumexp(-1).mean()) - density.centres.shape[-1] * math.log(std)
    return max((float(density.std) * np.logspace(-0.5, 1.5, 13)).tolist(), key=likelihood)


def resample(points, n, std=0.0):
    """n draws from the kernel density estimate of points (B, N, d); with std 0, from the points themselves."""
    B, N, _ = points.shape
    return draw(Density(points, torch.full((B,), N, device=points.device), std), n)


def one_gaussian(points, n):
    """n draws from the Gaussian with the mean and covariance of points (B, N, d)."""
    (B, N, d), mean = points.shape, points.mean(1, keepdim=True)
    centred = (points - mean).double()
    covariance = centred.mT @ centred / N + 1e-6 * torch.eye(d, device=points.device)  # N may be below d
    return mean + torch.randn(B, n, d, device=points.device) @ torch.linalg.cholesky(covariance).float().mT


@torch.no_grad()
def compare(model, args, split, data, sample, unit, stream):
    """W2 and W1 to the same true points after 0 ... K, 1.5 K and 2 K fresh mini-batches -> metric and baselines for results.json.

    The floor is the mean over four draws of as many fresh points; the excess over it is what counts, and is taken task by
    task. Saves the points of the first tasks for the pictures.
    """
    model.eval()
    K, n, rows, results = args.steps, args.points, collections.defaultdict(list), {}
    every = sorted({*range(1, K + 1), 3 * K // 2, 2 * K})
    bandwidth = [best_bandwidth(sample, k * args.context, args) for k in every]
    for index, first in enumerate(range(0, args.eval_tasks, 32)):
        common.seed_all(common.EVALUATION, stream, index)  # always 32 tasks, cut at the end: no draw depends on --eval-tasks
        density, cut = sample(32, args), args.eval_tasks - first
        batches = torch.stack([draw(density, args.context) for _ in range(2 * K)])  # (2K, 32, N, d)
        truth, *fresh = (draw(density, n) for _ in range(5))
        noise = torch.randn_like(truth)
        seen = [batches[:k].transpose(0, 1).flatten(1, 2) for k in every]  # (32, k N, d)
        answers = {
            OURS: [generate(model, batches[:k, :cut], noise[:cut], args) for k in [0, *every]],
            FLOOR: fresh,
            EXACT: [integrate(partial(exact_field, density), noise, args)],
            "kernel density": [resample(points, n, std) for points, std in zip(seen, bandwidth)],
            "context resampled": [resample(points, n) for points in seen],
            "one Gaussian": [one_gaussian(points, n) for points in seen],
        }
        for name, points in answers.items():
            rows[name].append(unit * torch.stack([torch.stack([wasserstein(x[:cut], truth[:cut], p) for x in points], -1) for p in (2, 1)]))  # (2, B, steps)
        if first == 0:
            pictures = dict(batches=batches, generated=torch.stack(answers[OURS]), truth=truth)
            pictures = {name: unit * points[..., : min(8, cut), :, :].cpu().numpy() for name, points in pictures.items()}
            common.replace_file(f"{args.out}/points_{split}.npz", lambda f: np.savez_compressed(f, **pictures))
    floor = torch.cat(rows[FLOOR], 1).mean(-1, keepdim=True)  # (2, tasks, 1)
    for name, chunks in rows.items():
        steps = [0, *every] if name in (OURS, FLOOR, EXACT) else every
        row = floor if name == FLOOR else torch.cat(chunks, 1)
        measures = torch.cat([row, row - floor]).expand(-1, -1, len(steps))  # W2, W1 and either beyond the floor
        w2, *others = (common.summary([values], steps) for values in measures)
        results[name] = w2 | {key: {"mean": row["mean"], "stderr": row["stderr"]} for key, row in zip(("w1", "excess", "w1_excess"), others)}
    return results.pop(OURS) | {"name": f"W2, {n} points", "data": data}, results


def evaluate(model, args):
    metric, baselines = compare(model, args, "id", data_name(args), sample_densities, UNIT, stream=0)
    return {"id": metric}, {"id": baselines}


def data_name(args):
    return f"mixtures of up to {args.max_clusters} Gaussians, dim {args.dim}"


# ---------------------------------------------------------------- plot


def draw_points(ax, truth, *layers):
    """Layers [points (n, 2), colour] on a square around the true points (n, 2)."""
    ax.clear()
    for points, color in layers:
        ax.scatter(*points.T, s=5, color=color, lw=0)
    low, high = truth.min(0), truth.max(0)
    (x, y), half = (low + high) / 2, 0.6 * (high - low).max() + 0.1
    ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[], aspect="equal")


def plot_grid(path, batches, generated, truth, K, title):
    """Tasks x {context, 1 step, K / 2, K, truth}; the truth is grey under all generated points."""
    shown, tasks = sorted({1, (K + 1) // 2, K}), min(6, len(truth))
    names = [f"context: first\nmini-batch (of {K})", *(f"after {k} step{'s' * (k > 1)}" for k in shown), "truth"]
    fig = common.Figure((1.9 * len(names), 1.9 * tasks + 0.6))
    axes = fig.subplots(tasks, len(names), squeeze=False)
    for i, row in enumerate(axes):
        draw_points(row[0], truth[i], (batches[1:K, i].reshape(-1, 2), "#fbd0a0"), (batches[0, i], "C1"))
        for ax, k in zip(row[1:], shown):
            draw_points(ax, truth[i], (truth[i], "0.85"), (generated[k, i], "C0"))
        draw_points(row[-1], truth[i], (truth[i], "0.3"))
    for ax, name in zip(axes[0], names):
        ax.set_title(name, fontsize=9)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout(h_pad=0.3, w_pad=0.3)
    common.save_figure(fig, path, dpi=90)


def plot_gif(path, batches, generated, truth, K, title):
    """What the same noise becomes after 0, 1, ... K mini-batches, moving from each to the next; the new context in orange."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    fig = common.Figure((8, 4.5))
    axes, canvas = fig.subplots(2, 4, subplot_kw=dict(xticks=[], yticks=[])), FigureCanvasAgg(fig)
    fig.subplots_adjust(0.01, 0.01, 0.99, 0.92, 0.02, 0.02)
    images, pauses = [], {0: 700, 0.25: 80, 0.5: 80, 0.75: 80, 1: 1000}  # how far points have moved: shown for how many ms
    for k, move in itertools.product(range(K), pauses):
        moved = (1 - move) * generated[k] + move * generated[k + 1]
        context = batches[k] if move < 1 else batches[k, :, :0]
        for ax, true, new, points in zip(axes.flat, truth, context, moved):
            draw_points(ax, true, (true, "0.88"), (new, "C1"), (points, "C0"))
        seen = k + (move > 0)
        fig.suptitle(f"{title}: {seen} mini-batch{'es' * (seen != 1)} read")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(32))
    options = dict(save_all=True, append_images=images[1:], duration=[*pauses.values()] * K, loop=0)
    common.replace_file(path, lambda f: images[0].save(f, "GIF", **options))


@common.drawing
def plot_excess(path, results):
    """W2 and W1 beyond the floor against the step: how far each row is from being as good as fresh points."""
    panels = list(itertools.product(results["metrics"], (("excess", "W2"), ("w1_excess", "W1"))))
    fig = common.Figure((4.4 * len(panels), 3.7))
    axes = fig.subplots(1, len(panels))
    for ax, (split, (key, distance)) in zip(axes, panels):
        m, beside = results["metrics"][split], results["baselines"][split]
        ax.errorbar(m["steps"], m[key]["mean"], m[key]["stderr"], fmt="o-", color=common.COLORS[0], lw=2, capsize=3, label=OURS, zorder=3)
        for i, (name, b) in enumerate(beside.items(), 1):
            ax.plot(b["steps"], b[key]["mean"], ls=("--", ":", "-.")[i % 3], marker=".", color=common.COLORS[i], label=name)
        ax.axvline(results["args"]["steps"], color="0.7", lw=1, zorder=0)
        top = max(beside["one Gaussian"][key]["mean"] + m[key]["mean"][1:])  # step 0 has seen nothing and would dwarf the rest
        ax.set_title(f"{split}: {m['data']}", fontsize=9)
        ax.set(xlabel="mini-batches seen", ylabel=f"{distance} beyond fresh samples", ylim=(-0.1 * top, 1.2 * top))
        ax.locator_params("x", integer=True)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    common.save_figure(fig, path, dpi=110)


def plot(out, script="mog_flow"):
    results = common.read_results(out, script)
    common.plot_steps(out, results)
    plot_excess(f"{out}/excess.png", results)
    for split, m in results["metrics"].items():
        path = f"{out}/points_{split}.npz"
        with common.or_fail(f"{path} is missing or damaged, or of another run"), np.load(path) as file:
            points = [file[name] for name in ("batches", "generated", "truth")]
            if (len(points[1]), f"W2, {points[2].shape[1]} points") != (len(m["steps"]), m["name"]):
                raise ValueError("other steps or points than in results.json")
            title = m["data"] + (" (the first two dimensions)" if points[0].shape[-1] > 2 else "")
            points = [p[..., :2] for p in points]
            plot_grid(f"{out}/grid_{split}.png", *points, results["args"]["steps"], title)
            plot_gif(f"{out}/refinement_{split}.gif", *points, results["args"]["steps"], title)
    print(f"plots: {out}/error.png, excess.png, grid_*.png, refinement_*.gif")


# ---------------------------------------------------------------- main


def report(metrics, baselines, K):
    """The excess over the floor, row by row: W2 itself says little, since its floor depends on --points."""
    shown = sorted({1, K})
    for split, m in metrics.items():
        for name, row in {OURS: m, **baselines[split]}.items():
            at = [row["steps"].index(k) for k in shown]
            w2, w1 = (", ".join(f"{d['mean'][i]:+.3f} +- {d['stderr'][i]:.3f}" for i in at) for d in (row["excess"], row["w1_excess"]))
            print(f"{split} beyond the floor after {' and '.join(map(str, shown))}: W2 {w2}; W1 {w1} | {name}")


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, args)
    metrics, baselines = evaluate(model, args)
    common.write_results(args, model, data_name(args), iterations, seconds, metrics, baselines)
    report(metrics, baselines, args.steps)
    plot(args.out)


if __name__ == "__main__":
    common.run(main)
