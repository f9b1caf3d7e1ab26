"""Linear regression, inferred and refined over mini-batches (sec. 9.1; tables 2, 3 and 4).

A task is a vector w ~ N(0, I) in `--dim` dimensions: y = w.x + noise, x ~ N(0, I). Each refinement step sees a fresh
mini-batch of `--context` observations. The metric is the squared error on held-out queries, whose floor is noise^2.

    python linreg.py                                # parametric: 0.51 after one step, as the oracle; 0.28 after 5, oracle 0.275
    python linreg.py --regime explicit              # the same; each takes 4 to 6 minutes on one core
    python linreg.py --regime implicit              # the same
    python linreg.py --method paper                 # as the paper does it, as far as flags allow: 1.3 and 0.35
"""

import common  # before torch: it answers --help by itself
from common import Task, refine

import torch
import torch.nn as nn

# Two heads of 128 numbers: a head that is narrower than x cannot compare two x.
PRESETS = {"paper": dict(dim=100, context=100, queries=100, tasks=32, width=256, depth=4, heads=2, hidden=512, iters=5000, lr=1e-3)}


def get_args(argv=None):
    parser = common.make_parser("linreg", __doc__, eval_steps=True)
    add = parser.add_argument_group("linear regression").add_argument
    add("--dim", type=common.count, default=16, help="dimension of x")
    add("--noise", type=common.number(float, 1e-3), default=0.5, help="standard deviation of the noise")
    parser.set_defaults(regime="parametric", steps=5, context=31, queries=32, tasks=32, iters=3500, lr=3e-3, attention="linear", clock="steps")
    args = common.parse_args(parser, PRESETS, argv)
    if args.state == "softmax":
        common.fail("--state softmax is for classes; a regression has no softmax")
    return args


# ---------------------------------------------------------------- the task


def sample_tasks(B, K, args):
    """B tasks with K mini-batches. Targets are divided by sqrt(dim), so that all a model sees is of order one."""
    dim, unit = args.dim, args.dim**-0.5
    w = torch.randn(B, dim, 1, device=args.device)

    def observe(n):
        x = torch.randn(B, n, dim, device=args.device)
        return x, (x @ w + args.noise * torch.randn(B, n, 1, device=args.device)) * unit

    query_x, query_y = observe(args.queries)
    context_x, context_y = zip(*(observe(args.context) for _ in range(K)))
    return Task(torch.stack(context_x), torch.stack(context_y), query_x, query_y)


def basis(x):
    """What the weights of the parametric regime are applied to: x (..., dim), at unit size."""
    return x * x.shape[-1] ** -0.5


def loss(prediction, y):
    return (prediction - y).square().sum(-1)


def objective(prediction, y):
    """The training loss of one step: the log of the mean squared error of each prefix, then their mean; predictions (T, B, Q, 1).

    A first step that sees one observation errs more than fifty times as much as the last step, and a plain sum would mostly train
    the first. The log gives all the same say. It is maximum likelihood (sec. 8) under Gaussian noise whose variance is
    fitted for each prefix and step.
    """
    return common.average(loss(prediction, y).mean((1, 2))).log().mean()  # average: over the ranks of torchrun, if any


def make_metric(args):
    return lambda prediction, y: args.dim * loss(prediction, y)  # in the units of the paper: y = w.x + noise


# ---------------------------------------------------------------- training


def make_model(args):
    common.seed_all(common.WEIGHTS, args.seed)
    return common.place(common.REGIMES[args.regime](args, args.dim, 1, loss, basis), args)


def train(model, args):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    squared_error = make_metric(args)
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()

    def step():
        """Draws tasks and leaves the gradients of their K losses in the parameters -> the losses and the metric."""
        task = common.share(sample_tasks(args.tasks, args.steps, args))
        losses = []
        for prediction in refine(model, task):  # (T, B, Q, 1)
            step_loss = objective(prediction, task.query_y)
            (step_loss / args.steps).backward()  # at once: memory does not grow with K
            losses.append(step_loss.detach())
        return losses, squared_error(prediction[-1].detach(), task.query_y).mean()

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


def ridge(x, y, query_x, noise):
    """Posterior mean prediction under w ~ N(0, I): x (B, n, dim), y (B, n, 1) -> (B, Q, 1), in the units of x and y."""
    x, y, dim = x.double(), y.double() * x.shape[-1] ** 0.5, x.shape[-1]
    w = torch.linalg.solve(x.mT @ x + noise**2 * torch.eye(dim, device=x.device), x.mT @ y)
    return (query_x.double() @ w * dim**-0.5).float()


def posterior_product(batches, query_x, noise):
    """A reference for states of one number a query: list of k mini-batches x (B, N, dim), y (B, N, 1) -> k answers (B, Q, 1).

    Each mini-batch alone gives w.x a Gaussian posterior; the answer multiplies those of the batches so far and divides by
    the prior that they share. It knows how sure each batch was of w.x, and nothing of other directions.
    """
    dim, x_star = query_x.shape[-1], query_x.double()
    prior = 1 / x_star.square().sum(-1, keepdim=True)  # precisions (B, Q, 1)
    precision, weighted, answers = prior, 0.0, []
    for x, y in batches:
        x, y = x.double(), y.double() * dim**0.5
        across = x_star @ torch.linalg.inv(x.mT @ x / noise**2 + torch.eye(dim, device=x.device))  # covariance of w.x_star with w (B, Q, dim)
        own = 1 / (across * x_star).sum(-1, keepdim=True)
        weighted = weighted + own * (across @ x.mT @ y / noise**2)
        precision = precision + own - prior
        answers.append((weighted / precision).float() * dim**-0.5)
    return answers


def evaluate(model, args):
    """The model after 0 ... S fresh mini-batches (--eval-steps, or 2K) beside the Bayes-optimal answer to exactly the data seen so far."""
    steps, metric = list(range(1, args.eval_steps + 1)), make_metric(args)
    ours, oracle, product, nothing = [], [], [], []
    for task in common.evaluation_tasks(lambda B: sample_tasks(B, args.eval_steps, args), args.eval_tasks):
        ours.append(common.evaluate(model, task, metric))
        score = lambda answers: torch.stack([metric(a, task.query_y).mean(1) for a in answers], 1)
        oracle.append(score(ridge(*common.seen(task, k), task.query_x, args.noise) for k in steps))
        product.append(score(posterior_product(zip(task.context_x, task.context_y), task.query_x, args.noise)))
        nothing.append(score([torch.zeros_like(task.query_y)]))
    metrics = {"id": common.summary(ours, name="squared error", data=data_name(args))}
    baselines = {
        "ridge, all seen": common.summary(oracle, steps),
        "posteriors, one a batch": common.summary(product, steps),
        "ridge, first batch": common.summary([o[:, :1].expand_as(o) for o in oracle], steps),
        "nothing": common.summary([n.expand(-1, len(steps) + 1) for n in nothing]),
    }
    return metrics, {"id": baselines}


def data_name(args):
    return f"linear regression, dim {args.dim}, noise {args.noise:g}"


# ---------------------------------------------------------------- main


def plot(out):
    common.plot_steps(out, common.read_results(out, "linreg"), log_scale=True)
    print(f"plot: {out}/error.png")


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, args)
    metrics, baselines = evaluate(model, args)
    common.write_results(args, model, data_name(args), iterations, seconds, metrics, baselines)
    plot(args.out)


if __name__ == "__main__":
    common.run(main)
