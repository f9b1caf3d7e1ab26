"""Topological order of causal graphs, inferred by finding leaves again and again (sec. 9.4; table 5).

A task is a causal model on `--nodes` variables: a random graph and, for each node, a function of its parents plus noise.
From rows of data alone, standardised, the model says which nodes are leaves (have no child), and refines its answer over
K mini-batches of `--context` rows. Removing the likeliest leaf and asking again orders all nodes, last ones first. The
metric is the stage error: how often the node that is to be removed is no leaf.

    python toposort.py                                 # 8 nodes (tested on 12, too): RFF 0.35 after 1 step, 0.26 after 5; 15 minutes on one core
    python toposort.py --preset paper --launch graph   # 20 nodes; tested on 20 and on 50; two minutes of training on an H100
"""

import collections
import itertools
import math
from functools import partial

import common  # before torch: it answers --help by itself
from common import Task, refine

import torch
import torch.nn as nn

MECHANISMS = ("lin", "rff")
TRAINED_ON = {"both": MECHANISMS, "lin": ("lin",), "rff": ("rff",)}
# 20 and 50 nodes are the paper's; the rest is our choice.
PRESETS = {"paper": dict(nodes=20, eval_nodes=50, tasks=32, width=64, heads=4, iters=8000, lr=1e-3)}


def get_args(argv=None):
    parser = common.make_parser("toposort", __doc__)
    add = parser.add_argument_group("causal graphs").add_argument
    add("--nodes", type=common.number(int, 3), default=8, help="nodes of the graphs that are trained on")
    add("--eval-nodes", type=common.number(int, 3), default=12, help="a second size to evaluate at")
    add("--mechanism", choices=TRAINED_ON, default="both", help="train on linear functions, on random Fourier features, or on both")
    parser.set_defaults(regime="implicit", steps=5, context=32, tasks=8, iters=4500, lr=3e-3, decoder="linear", width=32, depth=2, eval_tasks=100)
    args = common.parse_args(parser, PRESETS, argv)
    if args.regime != "implicit":
        common.fail(f"--regime {args.regime} needs a predictor with parameters or a latent; leaf logits are refined by --regime implicit only")
    if args.state != "logits":
        common.fail(f"--state {args.state}: a node's state is its leaf logit (use --state logits)")
    if args.decoder != "linear":
        common.fail(f"--decoder {args.decoder}: a row has no target that a prediction could miss (use --decoder linear)")
    if args.mask != "none":
        common.fail("--mask causal: rows and nodes are sets that attend to each other both ways (use --mask none)")
    if args.queries is not None:
        common.fail("--queries: every node of a graph is a query; set their number with --nodes")
    if args.tasks % len(TRAINED_ON[args.mechanism]):
        common.fail(f"--tasks {args.tasks} is odd: with --mechanism both, half of the graphs are LIN and half RFF")
    if args.steps * args.context == 1:
        common.fail("--steps 1 --context 1: a single row has no variance to divide by")
    return args


# ---------------------------------------------------------------- the data
#
# Every family of graphs returns B of them on d nodes as booleans (B, d, d), True at [i, j] for i -> j, with parents before
# children: upper triangles. `sample_data` shuffles the nodes afterwards.


def erdos_renyi(B, d, device):
    """Every pair is joined independently; 1, 2 or 3 edges a node are expected."""
    edges = torch.randint(1, 4, (B, 1, 1), device=device)
    return (torch.rand(B, d, d, device=device) < (2 * edges / (d - 1)).clamp(max=0.99)).triu(1)


def scale_free_in(B, d, device):
    """Barabasi and Albert's growth: node t sends 1, 2 or 3 edges to earlier nodes, likelier to those that many point to.

    A few nodes have many parents, and the only leaf is the oldest node.
    """
    edges, graph = torch.randint(1, 4, (B, 1), device=device), torch.zeros(B, d, d, dtype=torch.bool, device=device)
    for t in range(1, d):
        rate = 1 + graph[:, :t, :t].sum(1)
        arrival = torch.empty(B, t, device=device).exponential_() / rate  # the first in a race: drawn without replacement
        graph[:, t, :t] = arrival.argsort(1).argsort(1) < edges
    return graph.flip(1, 2)


def scale_free_out(B, d, device):
    """The same, with every edge turned round: a few nodes have many children, and most nodes are leaves."""
    return scale_free_in(B, d, device).mT.flip(1, 2)


def lattice(d, dim):
    """The smallest torus of `dim` dimensions with V >= d vertices: who is next to whom (V, V)."""
    side = math.ceil(round(d ** (1 / dim), 6))
    vertex = torch.arange(side**dim).view([side] * dim)
    graph = torch.zeros(side**dim, side**dim, dtype=torch.bool)
    for axis in range(dim):
        graph[vertex, vertex.roll(-1, axis)] = True
    return graph | graph.mT


def watts_strogatz(B, d, device, rewire=0.3):
    """A torus of 2 or 3 dimensions; 30% of the edges get another end; vertices are deleted at random until d are left."""
    parts, flat = [], int((torch.rand(B) < 0.5).sum())
    for dim, size in ((2, flat), (3, B - flat)):
        torus, each = lattice(d, dim).to(device), torch.arange(size, device=device)
        graph = (torus | torch.eye(len(torus), device=device).bool()).repeat(size, 1, 1)  # with loops, so that none is drawn below
        for a, b in torus.triu(1).nonzero().tolist():
            best, end = torch.rand(size, len(torus), device=device).masked_fill(graph[:, a], -1).max(1)  # no double edges
            end = torch.where((torch.rand(size, device=device) < rewire) & (best >= 0), end, b)
            graph[:, a, b] = graph[:, b, a] = False
            graph[each, a, end] = graph[each, end, a] = True
        kept = torch.rand(size, len(torus), device=device).argsort(1)[:, :d].sort(1)[0]
        parts.append(take(graph, kept))
    return torch.cat(parts).triu(1)


def stochastic_blocks(B, d, device, edges=2, damp=0.1):
    """5 or 10 groups of random sizes (one may be empty); 2 edges a node; pairs across groups are joined ten times more rarely.

    Small graphs have too few pairs within groups for that: nearly all are joined, and those across as often as it takes.
    """
    groups = (5 * torch.randint(1, 3, (B, 1), device=device)).clamp(max=d)
    cut = torch.rand(B, d, device=device).argsort(1).argsort(1) < groups - 1  # a new group begins here
    group = cut.cumsum(1).gather(1, torch.rand(B, d, device=device).argsort(1))
    same = group[:, :, None] == group[:, None]
    within, across = (pairs.triu(1).sum((1, 2), keepdim=True) for pairs in (same, ~same))  # how many pairs there are
    inside = (edges * d / (within + damp * across)).clamp(max=0.99)  # the chance of a pair of one group
    outside = (edges * d - inside * within) / across
    return (torch.rand(B, d, d, device=device) < torch.where(same, inside, outside)).triu(1)


# In and out of distribution. Families and ranges are those of the simulators of AVICI and causica, which related work uses, too.
FAMILIES = {"in": (erdos_renyi, scale_free_in, scale_free_out), "out": (watts_strogatz, stochastic_blocks)}
WEIGHT = {"in": (1, 3), "out": (0.5, 4)}  # of an edge of a linear model; its sign is random
LENGTH, SCALE = {"in": (7, 10), "out": (5, 12)}, {"in": (10, 20), "out": (8, 22)}  # of random Fourier features


def simulate(graph, mechanism, shift, n, features=100):
    """n rows of each graph (B, d, d), an upper triangle -> (B, n, d) in float64: raw values may span eight digits.

    x_j = f_j(parents) + bias + noise. lin: weighted sum. rff: 100 random Fourier features of all parents jointly, drawn for
    each node: nearly a draw from a Gaussian process. Noise is Gaussian in distribution and Laplace out of it.
    """
    (B, d, _), device = graph.shape, graph.device
    draw = dict(dtype=torch.float64, device=device)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(B, *shape, **draw)
    noise = torch.randn(B, n, d, **draw) if shift == "in" else torch.distributions.Laplace(torch.zeros((), **draw), 1.0).sample((B, n, d))
    x = uniform(-3, 3, 1, d) + uniform(0.2, 2, 1, d) * noise
    if mechanism == "lin":
        sign = 2 * torch.randint(2, (B, d, d), device=device) - 1
        weight = graph * sign * uniform(*WEIGHT[shift], d, d)
        for j in range(1, d):
            x[..., j] += (x[..., :j] @ weight[:, :j, j, None])[..., 0]
        return x
    length, scale = uniform(*LENGTH[shift], d, 1), uniform(*SCALE[shift], d, 1)
    phase = uniform(0, 2 * math.pi, d, features).float()  # cosines are most of the work, and bounded: float32 will do
    alpha = (scale * (2 / features) ** 0.5 * torch.randn(B, d, features, **draw)).float()
    angle = torch.empty(B, n, features, device=device)  # one buffer for all nodes: new ones would take half as long again
    for j in range(1, d):  # what a root gets is a constant, which standardising removes
        w = graph[:, :j, j, None] / length[:, j, None] * torch.randn(B, j, features, **draw)
        torch.baddbmm(phase[:, j, None], x[..., :j].float(), w.float(), out=angle)
        x[..., j] += (alpha[:, j, None] @ angle.cos_().mT)[:, 0]
    return x


def columns(x, nodes):
    """Columns nodes (B, m) of x (..., B, n, d) -> (..., B, n, m)."""
    return x.gather(-1, nodes[:, None].expand(*x.shape[:-1], nodes.shape[1]))


def take(graph, nodes):
    """The subgraph (B, m, m) of some nodes (B, m), in their order."""
    return columns(columns(graph, nodes).mT, nodes).mT


def sample_data(B, n, d, shift, mechanisms, device):
    """B causal models, as many of each family and mechanism as can be -> raw data (B, n, d), graphs (B, d, d)."""
    share = -(-B // len(FAMILIES[shift]))
    graph = torch.cat([family(share, d, device) for family in FAMILIES[shift]])
    graph = graph[torch.randperm(len(graph), device=device)[:B]]
    x = torch.cat([simulate(part, mechanism, shift, n) for part, mechanism in zip(graph.tensor_split(len(mechanisms)), mechanisms)])
    order = torch.rand(B, d, device=device).argsort(1)  # or a model reads the answer off the columns
    return columns(x, order), take(graph, order)


def standardise(x):
    """Each column (B, n, d) to mean 0 and variance 1: raw, the variance alone gives most of a linear order away."""
    x = x - x.mean(1, keepdim=True)
    return (x / x.std(1, keepdim=True).clamp(min=1e-12)).float()


# ---------------------------------------------------------------- the task


def leaves(graph):
    """Nodes without a child: (B, d, d) -> (B, d)."""
    return ~graph.any(2)


def remove_leaves(graph, count):
    """Which nodes (B, d) are left when `count` (B,) random leaves were removed one by one."""
    alive = torch.ones(graph.shape[:2], dtype=torch.bool, device=graph.device)
    for i in range(graph.shape[1] - 2):
        leaf = alive & leaves(graph & alive[:, None])
        pick = torch.rand(leaf.shape, device=graph.device).masked_fill(~leaf, -1).argmax(1, keepdim=True)
        alive = alive.scatter(1, pick, i >= count[:, None])
    return alive


def sample_tasks(B, K, args):
    """B causal models, each at a random stage of its elimination. Queries are nodes: query_x says which are left, query_y
    which of these are leaves (both (B, d)); context_x (K, B, N, d) are rows, and context_y is empty.
    """
    raw, graph = sample_data(B, K * args.context, args.nodes, "in", TRAINED_ON[args.mechanism], args.device)
    alive = remove_leaves(graph, torch.randint(args.nodes - 1, (B,), device=args.device))
    rows = standardise(raw).unflatten(1, (K, -1)).transpose(0, 1)
    return Task(rows, rows[..., :0], alive, alive & leaves(graph & alive[:, None]))


def loss(logits, leaf, alive):
    """-log P(the removed node is a leaf) if a node is drawn by the softmax of the logits (..., B, d) of those alive -> (..., B).

    Our choice: one node is removed at a time, and any leaf will do. A yes or no for each node, as in FiP (Scetbon et al.,
    2024), which the paper follows, learned far less in short trials.
    """
    logits = logits.masked_fill(~alive, -math.inf)
    return logits.logsumexp(-1) - logits.masked_fill(~leaf, -math.inf).logsumexp(-1)


def error(logits, leaf, alive):
    """1 where the likeliest leaf is none: (B, d) -> (B,)."""
    return 1 - leaf.gather(1, logits.masked_fill(~alive, -math.inf).argmax(1, keepdim=True))[:, 0].float()


# ---------------------------------------------------------------- the model


def inverse(a):
    """Of symmetric positive definite matrices. On a GPU nothing waits for a check, and a CUDA graph can hold it."""
    factor = torch.linalg.cholesky_ex(a)[0]
    half = torch.linalg.solve_triangular(factor, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), upper=False)
    return half.mT @ half


def precision(x, alive, ridge=1e-4):
    """The inverse covariance (B, d, d), in float64, of centred rows x (B, n, d) with 0 for removed nodes, which get a 1 on the diagonal."""
    covariance = x.double().mT @ x.double() / x.shape[1]
    return inverse(covariance + torch.diag_embed(torch.where(alive, ridge, 1.0).double()))


def linear_residual(x, alive):
    """What linear regression on the other nodes leaves of each value, at unit size, and its log size: two (B, n, d)."""
    x = (x - x.mean(1, keepdim=True)) * alive[:, None]
    matrix = precision(x, alive)
    size = matrix.diagonal(dim1=1, dim2=2)[:, None].rsqrt()
    return (x.double() @ matrix * size).float(), size.log().float().expand_as(x)


def kernel_residual(x, alive, ridge=0.1):
    """The same of kernel regression, fitted to the other rows; tripled, to be of order one.

    Ridge regression with the kernel exp(4 (mean - 1)), the mean over the other nodes of Gaussian kernels one unit wide: sums
    of functions of single nodes come cheapest, then of few. Leaving a row out has a closed form: its residual is
    (A^-1 y)_r / (A^-1)_rr with A the kernel matrix plus the ridge.
    """
    each = torch.exp((x[:, :, None] - x[:, None]).square() / -2) * alive[:, None, None]  # (B, n, n, d)
    mean = (each.sum(-1, keepdim=True) - each) / (alive.sum(1) - 1).view(-1, 1, 1, 1)
    kernel = torch.exp(4 * (mean - 1)).permute(0, 3, 1, 2)
    solved = inverse(kernel + ridge * torch.eye(x.shape[1], device=x.device))  # (B, d, n, n)
    residual = ((solved @ x.mT[..., None])[..., 0] / solved.diagonal(dim1=2, dim2=3)).mT
    return 3 * residual, (residual.square().mean(1, keepdim=True) + 1e-5).log().div(2).expand_as(x)


def relations(x, alive):
    """How nodes go together, two by two (B, d, d, 4): their correlation, their partial one given all other nodes, and both sizes."""
    x = (x - x.mean(1, keepdim=True)) * alive[:, None]
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    matrix = precision(x, alive)
    scale = matrix.diagonal(dim1=1, dim2=2).rsqrt()
    pairs = torch.stack([x.mT @ x / x.shape[1], (-matrix * scale[:, None] * scale[:, :, None]).float()], -1)
    return torch.cat([pairs, pairs.abs()], -1)


class LeafPredictor(nn.Module):
    """The implicit regime (eq. 8) on a table: the state is one leaf logit a node, refined by attention over rows and nodes.

    Our choice: beside its value and the state, a cell holds what two regressions on the other nodes leave of the value, and a
    node is told how it goes together with each other one. From values alone (FiP) a model stayed near chance in trials of
    90 seconds; with the residuals it was far below where functions are nonlinear, with the relations where they are linear.

    Tokens are the cells of a column, which attend to each other; their mean (of every other number) and maximum (of the
    rest), plus those of its relations, make the node's token, and nodes attend to each other. Nothing tells rows or nodes apart but their values. With one step the
    state is a constant input.
    """

    causal, shows_residuals, size = False, False, None  # what `common.mini_batches` asks

    def __init__(self, args):
        super().__init__()
        self.history, self.depth, D = args.history, args.depth, args.width
        self.adds, self.scale = args.update == "residual", args.state_scale
        self.initial = nn.Parameter(torch.zeros(()))  # one for all nodes, which have no names
        self.cell = nn.Sequential(nn.Linear(5 + args.history, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.relation = nn.Sequential(nn.Linear(4, D), nn.GELU(), nn.Linear(D, D))
        self.clock = nn.Parameter(0.02 * torch.randn(D)) if args.clock == "steps" else None
        self.transformer = common.Transformer(D, 2 * args.depth, args.heads, args.attention, args.init)  # first over rows, then over nodes
        self.decoder = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 1))

    def initial_state(self, alive):
        return self.initial.expand(alive.shape)  # (B, d)

    def predict(self, states, alive):
        return states

    def encode(self, x, y, step=0):
        return x  # as it is: cells hold the state, too

    def update(self, past, x, alive, step=0):
        """The last H states (B, d) and rows x (B, N, d) of the nodes alive (B, d), after `step` mini-batches -> the next states (1, B, d)."""
        B, N, d = x.shape
        inputs = [x, *linear_residual(x, alive), *kernel_residual(x, alive), *(self.scale * state[:, None].expand_as(x) for state in past)]
        h = self.cell(torch.stack(inputs, -1)).transpose(1, 2).reshape(B * d, N, -1)
        if self.clock is not None:
            h = h + self.clock / (step + 1)
        others = alive[:, None] & ~torch.eye(d, dtype=torch.bool, device=x.device)  # (B, d, d)
        related = self.relation(relations(x, alive)) * others[..., None]  # to itself and to removed nodes 0, which maxima include
        related = torch.cat([related[..., ::2].sum(2) / others.sum(2, keepdim=True), related[..., 1::2].amax(2)], -1)
        with self.transformer.autocast(x):
            for block in self.transformer.blocks[: self.depth]:
                h, _ = block(h)
            h = related + torch.cat([h[..., ::2].mean(1), h[..., 1::2].amax(1)], -1).view(B, d, -1)
            for block in self.transformer.blocks[self.depth :]:
                h, _ = block(h, visible=alive[:, None, None])  # removed nodes are no keys
        logits = self.decoder(self.transformer.norm(h.float()))[..., 0]
        return (past[-1] + logits if self.adds else logits)[None]


# ---------------------------------------------------------------- training


def make_model(args):
    common.seed_all(common.WEIGHTS, args.seed)
    return common.place(LeafPredictor(args), args)


def train(model, args):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()

    def step():
        """Draws tasks and leaves the gradients of their K losses in the parameters -> the losses and the metric."""
        task = common.share(sample_tasks(args.tasks, args.steps, args))
        losses = []
        for prediction in refine(model, task):  # (1, B, d)
            step_loss = loss(prediction, task.query_y, task.query_x).mean()
            (step_loss / args.steps).backward()  # at once: memory does not grow with K
            losses.append(step_loss.detach())
        return losses, error(prediction[0].detach(), task.query_y, task.query_x).mean()

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

OURS = "this model"
SLOW = ("vote, no state", "one step on all rows", "largest kernel R2", "smallest kernel R2")  # evaluated at K only


def infer(model, batches):
    """Leaf logits (B, m) after the mini-batches (k, B, N, m)."""
    alive = torch.ones(batches.shape[1], batches.shape[3], dtype=torch.bool, device=batches.device)
    predictions = [model.initial_state(alive)[None], *refine(model, Task(batches, batches[..., :0], alive, None))]
    return predictions[-1][0]


def roll_out(score, graph, luck=None):
    """Removes the node of the largest score(nodes left (B, m)) -> (B, m) until one is left.

    The stage error is 1 where that node is no leaf of the graph that is left. Given luck (B, d, d), a random true leaf, drawn
    by it, is then removed in its place. -> mean error over the d - 1 stages (B,), the order (B, d), sources first
    """
    B, d, _ = graph.shape
    nodes, wrong, removed = torch.arange(d, device=graph.device).expand(B, d), 0.0, []
    for m in range(d, 1, -1):
        leaf = leaves(take(graph, nodes))
        pick = score(nodes).argmax(1, keepdim=True)
        right = leaf.gather(1, pick)
        wrong = wrong + (~right[:, 0]).double() / (d - 1)
        if luck is not None:
            pick = torch.where(right, pick, luck[:, m - 1, :m].masked_fill(~leaf, -1).argmax(1, keepdim=True))
        removed.append(nodes.gather(1, pick))
        nodes = nodes[torch.ones_like(leaf).scatter(1, pick, False)].view(B, m - 1)
    return wrong, torch.cat([nodes, *removed[::-1]], 1)


def violated(graph, order):
    """The share of edges that an order (B, d) turns round; 0 where there is no edge."""
    place = order.argsort(1)
    return (graph & (place[:, :, None] > place[:, None])).sum((1, 2)) / graph.sum((1, 2)).clamp(min=1).double()


def unexplained(x):
    """1 - R^2 of linear regression on the other columns: x (B, n, m) -> (B, m). Two columns tie, up to rounding."""
    alive = torch.ones_like(x[:, 0], dtype=torch.bool)
    left = 1 / precision(x - x.mean(1, keepdim=True), alive, ridge=1e-9).diagonal(dim1=1, dim2=2)
    return left / x.double().var(1, correction=0).clamp(min=1e-12)


def kernel_unexplained(x):
    """The log of the same for kernel regression, the mean over mini-batches: x (k, B, N, m) -> (B, m)."""
    rows = x.flatten(0, 1)
    _, log_size = kernel_residual(rows, torch.ones_like(rows[:, 0], dtype=torch.bool))
    variance = rows.double().var(1, correction=0).clamp(min=1e-12)
    return (2 * log_size[:, 0] - variance.log()).unflatten(0, x.shape[:2]).mean(0)


def contenders(model, raw, batches, luck):
    """What is compared, on the same graphs and rows: name -> score(k, nodes (B, m)) -> (B, m), the largest of which is removed."""
    seen = lambda k, nodes: columns(batches[:k], nodes)  # (k, B, N, m)
    pooled = lambda k, nodes: seen(k, nodes).transpose(0, 1).flatten(1, 2)  # (B, k N, m)
    return {
        OURS: lambda k, nodes: infer(model, seen(k, nodes)),
        "vote, no state": lambda k, nodes: sum(infer(model, batch[None]).softmax(-1) for batch in seen(k, nodes)) / k,
        "one step on all rows": lambda k, nodes: torch.cat([infer(model, few[None]) for few in pooled(k, nodes).split(8)]),  # in parts, for memory
        "random order": lambda k, nodes: luck[:, nodes.shape[1] - 1, : nodes.shape[1]],  # another one at every stage
        "largest R2": lambda k, nodes: -unexplained(pooled(k, nodes)),
        "smallest R2": lambda k, nodes: unexplained(pooled(k, nodes)),
        "largest kernel R2": lambda k, nodes: -kernel_unexplained(seen(k, nodes)),
        "smallest kernel R2": lambda k, nodes: kernel_unexplained(seen(k, nodes)),
        "largest raw variance": lambda k, nodes: raw.var(1).gather(1, nodes),  # of all rows at every k, what standardising them takes away
    }


@torch.no_grad()
def compare(model, args, mechanism, shift, nodes):
    """Stage errors and violated edges after 0 ... K and 2 K mini-batches -> metric and baselines for results.json.

    Rows are standardised with those of all 2 K mini-batches, for every contender alike.
    """
    model.eval()
    K, rows, results = args.steps, collections.defaultdict(list), {}
    every = [*range(1, K + 1), 2 * K]
    steps = {OURS: [0, *every]} | dict.fromkeys(SLOW, [K])  # what is not named here: every
    stream = 4 * nodes + 2 * MECHANISMS.index(mechanism) + list(FAMILIES).index(shift)
    for index, first in enumerate(range(0, args.eval_tasks, 32)):
        common.seed_all(common.EVALUATION, stream, index)  # always 32 graphs, then cut: they do not depend on --eval-tasks
        drawn = *sample_data(32, 2 * K * args.context, nodes, shift, [mechanism], args.device), torch.rand(32, nodes, nodes, device=args.device)
        raw, graph, luck = (part[: args.eval_tasks - first] for part in drawn)
        batches = standardise(raw).unflatten(1, (2 * K, -1)).transpose(0, 1)  # (2K, B, N, d)
        for name, score in contenders(model, raw, batches, luck).items():
            found, orders = [], []
            for k in steps.get(name, every):
                forced, _ = roll_out(partial(score, k), graph, luck)
                free, order = roll_out(partial(score, k), graph)
                found.append(torch.stack([forced, free, violated(graph, order)]))  # (3, B)
                orders.append(order[0].tolist())
            rows[name].append(torch.stack(found, -1))  # (3, B, steps)
            if name == OURS and first == 0:  # the first graph is drawn
                _, true = roll_out(lambda left: leaves(take(graph, left)).float(), graph)
                picture = dict(edges=graph[0].nonzero().tolist(), true_order=true[0].tolist(), orders=orders)
    for name, chunks in rows.items():
        forced, *others = (common.summary([values], steps.get(name, every)) for values in torch.cat(chunks, 1))  # of (tasks, steps)
        results[name] = forced | {key: {"mean": row["mean"], "stderr": row["stderr"]} for key, row in zip(("free", "violated"), others)}
    return results.pop(OURS) | picture | {"name": "stage error", "data": f"{mechanism.upper()} {shift}, {nodes} nodes"}, results


def evaluate(model, args):
    """All of table 5's columns: both mechanisms, in and out of distribution, at the size trained on and at a larger one."""
    metrics, baselines = {}, {}
    sizes = dict.fromkeys((args.nodes, args.eval_nodes))  # which may be the same
    for nodes, shift, mechanism in itertools.product(sizes, FAMILIES, MECHANISMS):
        split = f"{mechanism}_{shift}_{nodes}"
        metrics[split], baselines[split] = compare(model, args, mechanism, shift, nodes)
    return metrics, baselines


# ---------------------------------------------------------------- plot


def draw_order(ax, m, order, title):
    """A graph on a line in a given order: edges that point backwards are orange and below the line. Nodes are numbered in a true order."""
    edges, d = [(order.index(a), order.index(b)) for a, b in m["edges"]], len(order)
    for start, end in edges:
        color = common.COLORS[1] if start > end else "0.45"
        style = dict(arrowstyle="-|>", connectionstyle="arc3,rad=-0.45", color=color, shrinkA=8, shrinkB=8)
        ax.annotate("", (end, 0), (start, 0), arrowprops=style)
    for i, node in enumerate(order):
        name = m["true_order"].index(node) + 1
        ax.text(i, 0, name, ha="center", va="center", fontsize=8, bbox=dict(boxstyle="circle,pad=0.25", fc="white", ec="0.3"))
    ax.set(xlim=(-0.7, d - 0.3), ylim=(-0.3 * d, 0.3 * d))
    ax.set_title(f"{title}: {sum(start > end for start, end in edges)} of {len(edges)} edges wrong", fontsize=10)
    ax.axis("off")


@common.drawing
def plot_orders(path, results):
    """The first graph of each evaluation at the size trained on: a true order, and those inferred from 1 and from K mini-batches."""
    K, size = results["args"]["steps"], results["args"]["nodes"]
    panels = [m for split, m in results["metrics"].items() if split.endswith(f"_{size}")]
    shown = sorted({1, K})
    fig = common.Figure((4.2 * (1 + len(shown)), 2.6 * len(panels)))
    for m, row in zip(panels, fig.subplots(len(panels), 1 + len(shown))):
        draw_order(row[0], m, m["true_order"], f"{m['data']}, a true order")
        for ax, k in zip(row[1:], shown):
            draw_order(ax, m, m["orders"][k], f"after {k} step{'s' * (k > 1)}")
    fig.suptitle("the first evaluation graph of each kind; edges that the order turns round are orange", fontsize=10)
    fig.tight_layout()
    common.save_figure(fig, path, dpi=100)


def plot(out):
    results = common.read_results(out, "toposort")
    common.plot_steps(out, results)
    plot_orders(f"{out}/orders.png", results)
    print(f"plots: {out}/error.png, orders.png")


# ---------------------------------------------------------------- main


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, args)
    metrics, baselines = evaluate(model, args)
    data = f"causal graphs, {args.nodes} nodes, {' and '.join(m.upper() for m in TRAINED_ON[args.mechanism])}"
    common.write_results(args, model, data, iterations, seconds, metrics, baselines)
    plot(args.out)


if __name__ == "__main__":
    common.run(main)
