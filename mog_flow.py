"""Flow matching in context on mixtures of Gaussians; the vector field is refined over mini-batches (sec. 9.4; table 6).

A task is a mixture in `--dim` dimensions: 1 to `--max-clusters` equal clusters, means ~ N(0, 5^2), std 0.3. On the path
x_t = (1 - t) x_0 + t x_1 from noise x_0 to a point x_1 of the mixture, the model infers the velocity E[x_1 - x_0 | x_t]
from `--context` points of the mixture, and refines it with each further mini-batch. Following it from t = 0 to 1
generates points. K is the number of mini-batches behind a velocity, not the number of steps of the ODE solver.

    python mog_flow.py                              # 2-d, up to 10 clusters
    python mog_flow.py --dim 5
    python mog_flow.py --preset paper               # up to 100 clusters; one GPU
"""

import collections
import math
import os

import numpy as np
import torch
import torch.nn as nn
from scipy.optimize import linear_sum_assignment

import common
from common import Task, refine

PRESETS = {"paper": dict(max_clusters=100, context=100, queries=256, tasks=128, width=256, depth=4, heads=4, iters=50_000, lr=3e-4, points=512)}
SPREAD, STD = 5.0, 0.3  # paper: of the means, and of a cluster
UNIT = SPREAD  # models see points divided by this, so that data and the noise that flows start from are alike in size

# What a task's points are drawn from: equal Gaussians around the first `count` (B,) of `centres` (B, C, d); std (B,).
Density = collections.namedtuple("Density", "centres count std")


def add_flow_flags(parser):
    """Flags of flow matching; alphabets.py has them too."""
    add = parser.add_argument_group("flow matching").add_argument
    add("--solver", choices=SOLVERS, default="heun", help="fixed-step ODE solver; midpoint and heun read the field twice a step")
    add("--ode-steps", type=common.count, default=10, help="steps of the solver from noise (t = 0) to data (t = 1)")
    add("--points", type=common.number(int, 2), default=256, help="generated and true points per task in W2 and W1, which depend on it")


def refuse(args):
    """What the shared flags allow and a flow does not."""
    if args.regime != "implicit":
        common.fail(f"--regime {args.regime} would need a fixed or latent-conditioned vector field; flows are refined by --regime implicit only")
    if args.state == "softmax":
        common.fail("--state softmax is for classes; a velocity has no softmax")


def get_args(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("mixtures of Gaussians").add_argument
    add("--dim", type=common.count, default=2, help="dimension of the points")
    add("--max-clusters", type=common.count, default=10, help="a task has 1 to this many clusters")
    add_flow_flags(parser)
    parser.set_defaults(regime="implicit", steps=5, context=64, queries=128, tasks=16, iters=2500, lr=2e-3, eval_tasks=128)
    args = common.parse_args(parser, PRESETS, argv)
    if not args.plot_only:
        refuse(args)
    return args


# ---------------------------------------------------------------- the task


def sample_densities(B, args):
    """B mixtures, in the model's units. That all clusters of a mixture weigh the same is our choice."""
    centres = SPREAD / UNIT * torch.randn(B, args.max_clusters, args.dim, device=args.device)
    count = torch.randint(1, args.max_clusters + 1, (B,), device=args.device)
    return Density(centres, count, torch.full((B,), STD / UNIT, device=args.device))


def draw(density, n):
    """n points of each density (B, n, d)."""
    centres, count, std = density
    index = (torch.rand(len(count), n, device=count.device) * count[:, None]).long()
    points = centres.gather(1, index[..., None].expand(-1, -1, centres.shape[-1]))
    return points + std[:, None, None] * torch.randn_like(points)


def path(x0, x1, t):
    """The linear path and its velocity, which is the target: x_t and dx_t / dt."""
    return (1 - t) * x0 + t * x1, x1 - x0


def embed(x, t):
    """Points x (..., d) at times t (..., 1) as the model's inputs x: (..., 2d + 1). Data are at t = 1.

    Beside x and t, the guess of x_1 that is best if all data were N(0, I): it is where to look among the context's points.
    """
    return torch.cat([x, t, t * x / (t**2 + (1 - t) ** 2)], -1)


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
    centres, count, std = density[0][:, None], density.count[:, None, None], density.std[:, None, None]
    variance = (1 - t) ** 2 + (t * std) ** 2  # of x_t within a cluster (B, Q, 1)
    offset = x[:, :, None] - t[..., None] * centres  # (B, Q, C, d)
    logits = -offset.square().sum(-1) / (2 * variance)
    logits = logits.masked_fill(torch.arange(centres.shape[2], device=x.device) >= count, -math.inf)
    slope = (t * std**2 - (1 - t)) / variance
    return (logits.softmax(-1)[..., None] * (centres + slope[..., None] * offset)).sum(2)


def euler(field, x, t, h):
    return x + h * field(x, t)


def midpoint(field, x, t, h):
    return x + h * field(x + h / 2 * field(x, t), t + h / 2)


def heun(field, x, t, h):
    v = field(x, t)
    return x + h / 2 * (v + field(x + h * v, t + h))


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun}


def integrate(field, x, args):
    """Follows field(x, t) from noise x (B, n, d) at t = 0 to t = 1."""
    for i in range(args.ode_steps):
        t = torch.full_like(x[..., :1], i / args.ode_steps)
        x = SOLVERS[args.solver](field, x, t, 1 / args.ode_steps)
    return x


def generate(model, batches, x, args):
    """Noise x (B, n, d) -> points, each velocity refined with all `batches` (k, B, N, d), whose keys and values are computed once."""
    memories = [model.encode(*observe(batch)) for batch in batches]

    def field(x, t):
        query_x = embed(x, t)
        past = [model.initial_state(query_x)] * model.history
        for memory in memories:  # `refine`, with the mini-batches encoded beforehand
            past = past[1:] + [model.carry(model.read(past, memory, query_x))]
        return model.predict(past[-1][None], query_x)[0]

    return integrate(field, x, args)


# ---------------------------------------------------------------- training


def make_model(args, dim=None):
    common.seed_all(common.WEIGHTS, args.seed)
    dim = dim or args.dim
    model = common.REGIMES[args.regime](args, 2 * dim + 1, dim, loss)
    with torch.no_grad():  # choice: attention starts out as similarity, its queries made with the weights of its keys
        for block in model.transformer.blocks:
            block.query.weight.copy_(block.key_value.weight[: args.width])
            block.query.bias.zero_()
            block.key_value.bias.zero_()
    return common.place(model, args)


def train(model, args, sample=sample_densities):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()
    for iteration in journal:
        common.seed_all(common.TRAINING, args.seed, iteration)
        common.set_learning_rate(optimizer, iteration, args)
        task = sample_tasks(sample(args.tasks, args), args.steps, args)
        losses = []
        for prediction in refine(model, task):  # (1, B, Q, d)
            step_loss = loss(prediction, task.query_y).mean()
            (step_loss / args.steps).backward()  # at once: memory does not grow with K
            losses.append(step_loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        journal.log(losses, losses[0] - losses[-1])  # the metric: what refinement gains, most noise cancelled
    return journal.iteration, journal.seconds


# ---------------------------------------------------------------- evaluation


def wasserstein(a, b, p):
    """Exact W_p between n and n points: ( min over pairings of the mean distance^p )^(1/p). a, b (B, n, d) -> (B,)."""
    costs = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy() ** p
    return torch.tensor([cost[linear_sum_assignment(cost)].mean() ** (1 / p) for cost in costs])


def kernels(points, std=0.0):
    """A kernel density estimate on points (B, N, d); with std 0, the points themselves."""
    B, N, _ = points.shape
    return Density(points, torch.full((B,), N, device=points.device), torch.full((B,), std, device=points.device))


def log_likelihood(density, x):
    """Mean over x (B, n, d) of the log density, all components in use -> (B,)."""
    std, (_, C, d) = density.std[:, None, None], density.centres.shape
    logits = -torch.cdist(x, density.centres).square() / (2 * std**2)
    return (logits.logsumexp(-1) - d * std[..., 0].log() - math.log(C) - d / 2 * math.log(2 * math.pi)).mean(1)


def best_bandwidth(sample, n, args):
    """Of the kernel density estimate from n points: the likeliest for fresh points of 32 separate tasks."""
    common.seed_all(common.EVALUATION, 1000, n)
    density = sample(32, args)
    points, fresh = draw(density, n), draw(density, 256)
    grid = (float(density.std[0]) * torch.logspace(-0.5, 1.5, 13)).tolist()
    return max(grid, key=lambda std: float(log_likelihood(kernels(points, std), fresh).mean()))


def one_gaussian(points, n):
    """n draws from the Gaussian with the mean and covariance of points (B, N, d)."""
    mean = points.mean(1, keepdim=True)
    covariance = (points - mean).mT @ (points - mean) / points.shape[1] + 1e-6 * torch.eye(points.shape[-1], device=points.device)
    return mean + torch.randn(len(points), n, points.shape[-1], device=points.device) @ torch.linalg.cholesky(covariance).mT


@torch.no_grad()
def evaluate(model, args, sample=sample_densities, unit=UNIT, stream=0, floor_draws=4):
    """W2, W1 and the excess over the floor after 0 ... 2K fresh mini-batches, for the model and for what stands beside it.

    Every row is compared with the same true points; the floor is what as many fresh points of the true density get, the mean
    over `floor_draws` draws. -> metric and baselines for results.json, and the points of the first tasks for the pictures.
    """
    model.eval()
    steps, n = list(range(2 * args.steps + 1)), args.points
    bandwidth = [best_bandwidth(sample, k * args.context, args) for k in steps[1:]]
    rows, pictures = collections.defaultdict(list), None
    for index, first in enumerate(range(0, args.eval_tasks, 32)):
        common.seed_all(common.EVALUATION, stream, index)  # always 32 tasks, then cut: the tasks do not depend on --eval-tasks
        density = sample(32, args)
        batches = torch.stack([draw(density, args.context) for _ in steps[1:]])  # (2K, B, N, d)
        truth, noise, *fresh = draw(density, n), torch.randn(32, n, density.centres.shape[-1], device=args.device), *(draw(density, n) for _ in range(floor_draws))
        seen = [batches[:k].transpose(0, 1).flatten(1, 2) for k in steps[1:]]  # (B, k * N, d)
        answers = {
            "this model": [generate(model, batches[:k], noise, args) for k in steps],
            "fresh samples (floor)": fresh,
            "exact field, same solver": [integrate(lambda x, t: exact_field(density, x, t), noise, args)],
            "kernel density": [draw(kernels(points, std), n) for points, std in zip(seen, bandwidth)],
            "context resampled": [draw(kernels(points), n) for points in seen],
            "one Gaussian": [one_gaussian(points, n) for points in seen],
        }
        cut = min(32, args.eval_tasks - first)
        for name, points in answers.items():
            distances = [torch.stack([unit * wasserstein(x[:cut], truth[:cut], p) for x in points], 1) for p in (2, 1)]
            rows[name].append(torch.stack(distances))  # (2, tasks, steps)
        if pictures is None:
            pictures = dict(batches=batches, generated=torch.stack(answers["this model"]), truth=truth)
            pictures = {name: unit * points[:, :8].cpu().numpy() if points.ndim == 4 else unit * points[:8].cpu().numpy() for name, points in pictures.items()}
    rows = {name: torch.cat(chunks, 1) for name, chunks in rows.items()}
    floor = rows["fresh samples (floor)"].mean(-1, keepdim=True)
    rows["fresh samples (floor)"] = floor

    def summarize(row, steps, **extra):
        values = rows[row].expand(-1, -1, len(steps))
        named = {"w1": values[1], "excess": values[0] - floor[0], "w1_excess": values[1] - floor[1]}  # paired by task
        extra |= {key: {k: v for k, v in common.summary([value]).items() if k in ("mean", "stderr")} for key, value in named.items()}
        return common.summary([values[0]], steps, **extra)

    metric = summarize("this model", steps, name=f"W2, {n} points")
    everywhere = ("fresh samples (floor)", "exact field, same solver")
    baselines = {name: summarize(name, steps if name in everywhere else steps[1:]) for name in rows if name != "this model"}
    return metric, baselines, pictures


def data_name(args):
    return f"mixtures of up to {args.max_clusters} Gaussians, dim {args.dim}"


# ---------------------------------------------------------------- plot


def plot_grid(path, pictures, K, title):
    """Tasks x {context, 1 step, K / 2, K, truth}; the truth is grey under every column."""
    import matplotlib.pyplot as plt

    batches, generated, truth = (pictures[name] for name in ("batches", "generated", "truth"))
    shown = sorted({1, max(1, K // 2), K})
    fig, axes = plt.subplots(6, len(shown) + 2, figsize=(1.9 * (len(shown) + 2), 11.2), squeeze=False)
    for i, row in enumerate(axes):
        first, rest = batches[0, i], batches[1:K, i].reshape(-1, truth.shape[-1])
        columns = [(f"first mini-batch\n(then {K - 1} more)", first, "C1")]
        columns += [(f"after {k} step{'s' * (k > 1)}", generated[k, i], "C0") for k in shown] + [("truth", truth[i], "0.35")]
        for ax, (name, points, color) in zip(row, columns):
            grey = rest if color == "C1" else truth[i]
            ax.scatter(grey[:, 0], grey[:, 1], s=5, color="#fbd9b5" if color == "C1" else "0.85", lw=0)
            ax.scatter(points[:, 0], points[:, 1], s=4, color=color, lw=0)
            frame(ax, truth[i])
            if i == 0:
                ax.set_title(name, fontsize=9)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout(h_pad=0.3, w_pad=0.3)
    common.replace_file(path, lambda temporary: fig.savefig(temporary, dpi=90, format="png"))
    plt.close(fig)


def frame(ax, truth):
    """Axes around the true points, equal in both directions, without ticks."""
    (low_x, low_y), (high_x, high_y) = truth[:, :2].min(0), truth[:, :2].max(0)
    half = 0.6 * max(high_x - low_x, high_y - low_y) + 0.3
    ax.set(xlim=((low_x + high_x) / 2 - half, (low_x + high_x) / 2 + half), ylim=((low_y + high_y) / 2 - half, (low_y + high_y) / 2 + half))
    ax.set(xticks=[], yticks=[], aspect="equal")


def plot_gif(path, pictures, K, title):
    """Points generated from the same noise after 0, 1, ... K mini-batches, moving from each to the next; new context in orange."""
    import matplotlib.pyplot as plt
    from PIL import Image

    batches, generated, truth = (pictures[name] for name in ("batches", "generated", "truth"))
    fig, axes = plt.subplots(2, 4, figsize=(8, 4.5))
    dots, news = [], []
    for i, ax in enumerate(axes.flat):
        ax.scatter(truth[i, :, 0], truth[i, :, 1], s=5, color="0.88", lw=0)
        news.append(ax.scatter([], [], s=14, color="C1", marker="x", lw=0.9))
        dots.append(ax.scatter([], [], s=4, color="C0", lw=0))
        frame(ax, truth[i])
    frames = [(k, 0.0) for k in [0] * 4] + [(k, move) for k in range(K) for move in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1)] + [(K - 1, 1.0)] * 8
    heading = fig.suptitle("")
    fig.tight_layout(rect=(0, 0, 1, 0.97))
    images = []
    for k, move in frames:
        ease = move * move * (3 - 2 * move)
        heading.set_text(f"{title}: {k + (move == 1)} mini-batch{'es' * (k + (move == 1) != 1)} read")
        for i in range(len(dots)):
            dots[i].set_offsets((1 - ease) * generated[k, i, :, :2] + ease * generated[k + 1, i, :, :2])
            news[i].set_offsets(batches[k, i, :, :2] if move < 1 else np.empty((0, 2)))
        fig.canvas.draw()
        images.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB").quantize(32))
    common.replace_file(path, lambda t: images[0].save(t, "GIF", save_all=True, append_images=images[1:], duration=120, loop=0))
    plt.close(fig)


def plot_excess(path, results):
    """W2 and W1 beyond the floor against the step, with the oracle rows: how far from as good as fresh points."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2 * len(results["metrics"]), figsize=(4.4 * 2 * len(results["metrics"]), 3.7), squeeze=False)
    panels = [(split, key) for split in results["metrics"] for key in ("excess", "w1_excess")]
    for ax, (split, key) in zip(axes[0], panels):
        m = results["metrics"][split]
        ax.errorbar(m["steps"], m[key]["mean"], m[key]["stderr"], fmt="o-", color="C0", lw=2, capsize=3, label="this model", zorder=3)
        for i, (name, b) in enumerate(results["baselines"][split].items(), 1):
            ax.plot(b["steps"], b[key]["mean"], ls=("--", ":", "-.")[i % 3], marker=".", color=f"C{i}", label=name)
        ax.axvline(results["args"]["steps"], color="0.7", lw=1, zorder=0)
        top = max(results["baselines"][split]["one Gaussian"][key]["mean"])
        ax.set(title=f"{split}: {m['data']}", xlabel="mini-batches seen", ylabel=f"{'W2' if key == 'excess' else 'W1'} beyond fresh samples")
        ax.set_ylim(-0.1 * top, 1.4 * top)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    common.replace_file(path, lambda temporary: fig.savefig(temporary, dpi=110, format="png"))
    plt.close(fig)


def plot(out, script="mog_flow"):
    results = common.read_results(out, script)
    common.plot_steps(out, results)
    plot_excess(os.path.join(out, "excess.png"), results)
    K, drawn = results["args"]["steps"], ["error.png", "excess.png"]
    for split in results["metrics"]:
        if results["args"].get("dim", 2) == 1:
            continue
        with np.load(os.path.join(out, f"points_{split}.npz")) as pictures:
            pictures = dict(pictures)
        plot_grid(os.path.join(out, f"grid_{split}.png"), pictures, K, results["metrics"][split]["data"])
        plot_gif(os.path.join(out, f"refinement_{split}.gif"), pictures, K, results["metrics"][split]["data"])
        drawn += [f"grid_{split}.png", f"refinement_{split}.gif"]
    print(f"plots in {out}: {', '.join(drawn)}")


# ---------------------------------------------------------------- main


def report(metrics, baselines, K):
    """The excess over the floor at step K, row by row: W2 itself says little, since its floor depends on --points."""
    for split, m in metrics.items():
        for name, row in [("this model", m), *baselines[split].items()]:
            cells = [f"{row[key]['mean'][row['steps'].index(k)]:+.3f} +- {row[key]['stderr'][row['steps'].index(k)]:.3f}" for key in ("excess", "w1_excess") for k in (1, K)]
            print(f"{split} beyond the floor, steps 1 and {K}: W2 {cells[0]}, {cells[1]}; W1 {cells[2]}, {cells[3]} | {name}")


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, args)
    metric, baselines, pictures = evaluate(model, args)
    metrics, baselines = {"id": metric | {"data": data_name(args)}}, {"id": baselines}
    np.savez_compressed(os.path.join(args.out, "points_id.npz"), **pictures)
    common.write_results(args, model, data_name(args), iterations, seconds, metrics, baselines)
    report(metrics, baselines, args.steps)
    plot(args.out)


if __name__ == "__main__":
    main()
