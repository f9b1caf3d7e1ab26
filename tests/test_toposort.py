"""Causal graphs, mechanisms, the leaf predictor and recursive removal against loops, brute force and known cases."""

import argparse
import itertools
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import common
import toposort
from sampler import simulate_loop
from common import Task, refine
from test_wrong_use import refused

SHIFTS = {family: shift for shift, families in toposort.FAMILIES.items() for family in families}


def toposort_args(**changes):
    sizes = dict(nodes=6, context=12, steps=3, width=16, depth=2, heads=2, history=1, seed=0)
    plain = dict(mechanism="both", attention="softmax", update="residual", clock="none", state_scale=1.0, init="random", device="cpu", dtype="float32", compile=False, checkpoint=None, reason="as asked", out="nowhere")
    return argparse.Namespace(**(sizes | plain | changes))


def make_model(**changes):
    """An untrained model whose state matters: weights away from their small start."""
    model = toposort.make_model(toposort_args(**changes)).eval()
    with torch.no_grad():
        model.initial.fill_(0.7)
    return model


def children(graph, node, left):
    return [other for other in left if graph[node, other]]


# ---------------------------------------------------------------- a plain simulator, one data set at a time


@pytest.mark.parametrize("shift", ("in", "out"))
@pytest.mark.parametrize("mechanism", toposort.MECHANISMS)
def test_the_sampler_agrees_with_a_plain_loop(mechanism, shift):
    """Spread of the nodes of a diamond with a tail: quartiles, over many causal models, of the log of the standard deviation."""
    graph = np.zeros((5, 5), bool)
    for a, b in ((0, 1), (0, 2), (1, 3), (2, 3), (3, 4)):
        graph[a, b] = True
    batched = toposort.simulate(torch.tensor(graph).expand(1500, 5, 5), mechanism, shift, 60).std(1).log()
    random = np.random.default_rng(0)
    looped = torch.tensor(np.stack([simulate_loop(graph, mechanism, shift, 60, random) for _ in range(400)])).std(1).log()
    q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert (batched.quantile(q, 0) - looped.quantile(q, 0)).abs().max() < 0.25
    assert batched.dtype == torch.float64


def test_linear_weights_are_found_again_by_regression_on_the_parents():
    graph = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool().expand(40, 3, 3)
    x = toposort.simulate(graph, "lin", "in", 4000)
    y, parents = x[..., 2:], torch.cat([x[..., :2], torch.ones_like(x[..., :1])], -1)
    fit = torch.linalg.lstsq(parents, y).solution[..., 0]  # (40, 3): two weights and the bias
    noise = (y - parents @ fit[..., None]).std((1, 2))
    assert 0.95 < fit[:, :2].abs().min() < 1.4 and 2.6 < fit[:, :2].abs().max() < 3.2
    assert 0.3 < (fit[:, :2] > 0).double().mean() < 0.7 and fit[:, 2].abs().max() < 3.4
    assert 0.19 < noise.min() < 0.5 and 1.6 < noise.max() < 2.1
    assert 0.9 < (x[:, :, 0].std(1) / 2).max() < 1.05, "a root is bias and noise alone"


def test_fourier_features_have_the_covariance_of_a_gaussian_process():
    """One parent: over many mechanisms with length 8 and scale 15, f(a) f(b) averages 15^2 exp(-(a - b)^2 / (2 8^2))."""
    length, scale = toposort.LENGTH["in"], toposort.SCALE["in"]
    try:
        toposort.LENGTH["in"], toposort.SCALE["in"] = (8, 8), (15, 15)
        x = toposort.simulate(torch.tensor([[0, 1], [0, 0]]).bool().expand(6000, 2, 2), "rff", "in", 2)
    finally:
        toposort.LENGTH["in"], toposort.SCALE["in"] = length, scale
    a, y = x[..., 0], x[..., 1]
    expected = 225 * torch.exp(-(a[:, 0] - a[:, 1]).square() / 128)
    assert abs((y[:, 0] * y[:, 1]).mean() / (expected.mean() + 3) - 1) < 0.08, "3 is the variance of the bias"


@pytest.mark.parametrize("shift", ("in", "out"))
def test_noise_is_gaussian_in_and_laplace_out_of_distribution(shift):
    x = toposort.simulate(torch.zeros(200, 2, 2, dtype=torch.bool), "rff", shift, 2000)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    assert abs(z.pow(4).mean() - (3 if shift == "in" else 6)) < 0.3
    size = x.std(1) / (1 if shift == "in" else math.sqrt(2))  # of Laplace noise, sigma is the scale
    assert 0.15 < size.min() < 0.3 and 1.9 < size.max() < 2.2 and abs(size.mean() - 1.1) < 0.1


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("family", SHIFTS, ids=lambda family: family.__name__)
@pytest.mark.parametrize("d", (3, 8, 20, 50))
def test_graphs_have_no_cycle_and_the_right_shape(family, d):
    graph = family(5, d, "cpu")
    assert graph.shape == (5, d, d) and graph.dtype == torch.bool and not graph.tril().any()
    assert len(family(1, d, "cpu")) == 1


DENSITY = {"erdos_renyi": 1.9, "scale_free_in": 1.9, "scale_free_out": 1.9, "watts_strogatz": 1.9, "stochastic_blocks": 1.95}
LEAVES = {"erdos_renyi": 0.29, "scale_free_in": 0.05, "scale_free_out": 0.56, "watts_strogatz": 0.14, "stochastic_blocks": 0.27}


@pytest.mark.parametrize("family", SHIFTS, ids=lambda family: family.__name__)
def test_density_and_share_of_leaves_at_20_nodes(family):
    """As measured on igraph's rules."""
    graph = family(400, 20, "cpu")
    assert graph.sum((1, 2)).double().mean() / 20 == pytest.approx(DENSITY[family.__name__], rel=0.1)
    assert toposort.leaves(graph).double().mean() == pytest.approx(LEAVES[family.__name__], abs=0.04)


@pytest.mark.parametrize("d", (8, 12))
def test_blocks_are_no_sparser_in_small_graphs(d):
    assert toposort.stochastic_blocks(1000, d, "cpu").sum((1, 2)).double().mean() / d == pytest.approx(2, abs=0.06)


def test_scale_free_in_has_one_leaf_and_hubs_of_parents_and_out_is_its_mirror():
    inward, outward = toposort.scale_free_in(300, 20, "cpu"), toposort.scale_free_out(300, 20, "cpu")
    assert (toposort.leaves(inward).sum(1) == 1).all()
    most_parents, most_children = (graph.sum(1).amax(1).double().mean() for graph in (inward, inward.mT))
    assert most_parents > 3 * most_children and outward.sum(2).amax(1).double().mean() > 3 * outward.sum(1).amax(1).double().mean()
    edges = inward.sum((1, 2))
    assert set(edges.tolist()) == {e * 20 - e * (e + 1) // 2 for e in (1, 2, 3)}, "node t sends min(e, t) edges"
    assert ((outward.sum(1) > 0).sum(1) == 19).all(), "all but the first have a parent"


def test_attachment_prefers_nodes_that_many_point_to():
    """Third node, one edge each: the first node has one pointer more than the second, so it is chosen with probability 2 / 3."""
    graph = toposort.scale_free_in(12_000, 3, "cpu").flip(1, 2)
    one = graph[graph.sum((1, 2)) == 2]
    assert len(one) > 3000 and one[:, 2, 0].double().mean() == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("d,dim,vertices,edges", [(8, 2, 9, 18), (8, 3, 8, 12), (20, 2, 25, 50), (20, 3, 27, 81), (50, 3, 64, 192), (64, 3, 64, 192)])
def test_lattices_are_tori(d, dim, vertices, edges):
    graph = toposort.lattice(d, dim)
    assert len(graph) == vertices and torch.equal(graph, graph.T) and not graph.diagonal().any()
    assert graph.triu().sum() == edges and len(set(graph.sum(1).tolist())) == 1


def test_rewiring_keeps_the_number_of_edges_and_moves_three_in_ten(monkeypatch):
    """With as many vertices as nodes nothing is deleted, so that every edge of the torus can be looked for."""
    torus = toposort.lattice(27, 3)
    pairs = torus.triu().nonzero().tolist()
    monkeypatch.setattr(toposort, "lattice", lambda d, dim: torus)
    graph = toposort.watts_strogatz(60, 27, "cpu")
    assert (graph.sum((1, 2)) == len(pairs)).all(), "no edge is lost, doubled or a loop"
    kept = torch.stack([graph[:, a, b] for a, b in pairs]).double().mean()
    assert kept == pytest.approx(0.7, abs=0.05)
    assert torch.equal(toposort.watts_strogatz(2, 27, "cpu", rewire=0.0)[0].nonzero(), torch.tensor(pairs))


def test_blocks_are_denser_inside():
    """Neighbours of a neighbour are joined far oftener than in a random graph of that density."""
    blocks = toposort.stochastic_blocks(300, 20, "cpu")
    blocks = (blocks | blocks.mT).double()
    triangles = (blocks @ blocks * blocks).sum() / (blocks @ blocks * (1 - torch.eye(20))).sum()
    assert triangles > 1.6 * blocks.mean()


# ---------------------------------------------------------------- data sets and tasks


@pytest.mark.parametrize("shift", ("in", "out"))
def test_columns_are_shuffled_with_their_graph(shift):
    """Columns that an edge joins go together: the labels must follow the columns."""
    torch.manual_seed(1)
    raw, graph = toposort.sample_data(300, 100, 6, shift, ["lin"], "cpu")
    assert raw.shape == (300, 100, 6) and graph.shape == (300, 6, 6)
    assert (graph.tril() & ~graph.triu()).any(0).any(), "not in topological order any more"
    ends = toposort.leaves(graph).double().mean(0)
    assert ends.max() - ends.min() < 0.13, "no column is likelier to be a leaf than another"
    correlation = torch.stack([torch.corrcoef(x.T).abs() for x in raw])
    joined = graph | graph.mT
    assert correlation[joined].mean() > correlation[~joined & ~torch.eye(6, dtype=torch.bool)].mean() + 0.1


def test_every_family_and_mechanism_has_its_share(monkeypatch):
    counts = []
    families = [lambda B, d, device, family=family: (counts.append((family.__name__, B)), family(B, d, device))[1] for family in toposort.FAMILIES["in"]]
    monkeypatch.setitem(toposort.FAMILIES, "in", families)
    simulate = toposort.simulate
    monkeypatch.setattr(toposort, "simulate", lambda graph, mechanism, shift, n: (counts.append((mechanism, len(graph))), simulate(graph, mechanism, shift, n))[1])
    toposort.sample_data(12, 5, 5, "in", toposort.MECHANISMS, "cpu")
    assert counts == [("erdos_renyi", 4), ("scale_free_in", 4), ("scale_free_out", 4), ("lin", 6), ("rff", 6)]


def test_standardised_columns_have_mean_0_and_variance_1_even_if_constant():
    x = torch.tensor([1e-3, 1.0, 1e8], dtype=torch.float64) * torch.randn(2, 50, 3, dtype=torch.float64) + 7
    x[0, :, 1] = 3.0
    z = toposort.standardise(x)
    assert z.dtype == torch.float32 and z.mean(1).abs().max() < 1e-5 and z.isfinite().all()
    assert torch.allclose(z.std(1), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), atol=1e-4)


@pytest.mark.parametrize("family", SHIFTS, ids=lambda family: family.__name__)
def test_leaf_labels_after_removal_equal_brute_force(family):
    graph = toposort.take(family(30, 7, "cpu"), torch.rand(30, 7).argsort(1))
    count = torch.arange(30) % 6
    alive = toposort.remove_leaves(graph, count)
    labels = alive & toposort.leaves(graph & alive[:, None])
    assert ((~alive).sum(1) == count).all()
    for g, left, found in zip(graph, alive, labels):
        left = left.nonzero().flatten().tolist()
        gone = [node for node in range(7) if node not in left]
        assert found.nonzero().flatten().tolist() == [node for node in left if not children(g, node, left)]
        assert not any(g[a, b] for a in gone for b in left), "nobody goes before its children"


def test_all_leaves_are_removed_equally_often():
    graph = torch.zeros(3000, 4, 4, dtype=torch.bool)
    graph[:, 0, 3] = True
    gone = ~toposort.remove_leaves(graph, torch.ones(3000).long())
    assert torch.allclose(gone.double().mean(0), torch.tensor([0, 1, 1, 1]).double() / 3, atol=0.04)


def test_tasks_have_their_shapes_and_all_stages():
    task = toposort.sample_tasks(200, 3, toposort_args())
    assert task.context_x.shape == (3, 200, 12, 6) and task.context_y.shape == (3, 200, 12, 0) and task.context_x.dtype == torch.float32
    assert task.query_x.shape == task.query_y.shape == (200, 6)
    assert set(task.query_x.sum(1).tolist()) == {2, 3, 4, 5, 6}, "at every stage two nodes or more are left"
    assert not (task.query_y & ~task.query_x).any() and task.query_y.any(1).all()
    rows = task.context_x.transpose(0, 1).flatten(1, 2)
    assert rows.mean(1).abs().max() < 1e-4 and torch.allclose(rows.std(1), torch.ones(200, 6), atol=1e-3)


def test_every_mechanism_meets_every_family(monkeypatch):
    """Families are told apart by their leaves: one graph in three has the single leaf of `scale_free_in`, another mostly leaves."""
    met, simulate = {}, toposort.simulate
    monkeypatch.setattr(toposort, "simulate", lambda graph, mechanism, *rest: (met.update({mechanism: toposort.leaves(graph).sum(1)}), simulate(graph, mechanism, *rest))[1])
    toposort.sample_data(300, 2, 20, "in", toposort.MECHANISMS, "cpu")
    for count in met.values():
        assert (count == 1).double().mean() == pytest.approx(1 / 3, abs=0.12) and (count > 9).double().mean() == pytest.approx(0.25, abs=0.12)


# ---------------------------------------------------------------- the model


def dataset(B=3, K=3, N=12, d=6):
    raw, graph = toposort.sample_data(B, K * N, d, "in", toposort.MECHANISMS, "cpu")
    return toposort.standardise(raw).unflatten(1, (K, N)).transpose(0, 1), graph


def test_masked_nodes_are_as_good_as_deleted():
    model, (x, _) = make_model(), dataset()
    nodes = torch.tensor([[0, 2, 5], [1, 2, 3], [3, 4, 5]])
    alive = torch.zeros(3, 6, dtype=torch.bool).scatter(1, nodes, True)
    with torch.no_grad():
        masked = [p[0].gather(1, nodes) for p in refine(model, Task(x, x[..., :0], alive, None))]
        deleted = [p[0] for p in refine(model, Task(*(2 * [toposort.columns(x, nodes)]), torch.ones(3, 3, dtype=torch.bool), None))]
        other = torch.where(alive[:, None], x, 5 * torch.randn_like(x))
        changed = [p[0].gather(1, nodes) for p in refine(model, Task(other, x[..., :0], alive, None))]
    for a, b, c in zip(masked, deleted, changed):
        assert (a - b).abs().max() < 1e-5 and (a - c).abs().max() < 1e-5 and a.std() > 1e-3


def test_nodes_and_rows_have_no_order():
    model, (x, _) = make_model(), dataset()
    nodes, rows = torch.randperm(6).expand(3, 6), torch.randperm(12)
    with torch.no_grad():
        plain = toposort.infer(model, x)
        assert torch.allclose(toposort.infer(model, toposort.columns(x, nodes)), plain.gather(1, nodes), atol=1e-5)
        assert torch.allclose(toposort.infer(model, x[:, :, rows]), plain, atol=1e-5)
        assert not torch.allclose(toposort.infer(model, x[:2]), plain, atol=1e-4), "the third mini-batch is read"


@pytest.mark.parametrize("n,d", [(2, 3), (40, 11)])
def test_one_model_fits_all_sizes(n, d):
    x, _ = dataset(N=n, d=d)
    with torch.no_grad():
        assert toposort.infer(make_model(), x).shape == (3, d)


def test_one_step_is_the_model_without_a_state():
    """The learned initial state is a constant input of every cell: moved into the bias, the same network has no state."""
    model, (x, _) = make_model(), dataset(K=1)
    plain = make_model()
    with torch.no_grad():
        first, scale = plain.cell[0], model.initial.item()
        first.bias += scale * first.weight[:, -1]
        first.weight[:, -1] = 0
        expected = toposort.infer(model, x)
        assert torch.allclose(expected, toposort.infer(plain, x), atol=1e-5)
        plain.initial.fill_(-3.0)
        assert torch.allclose(expected, toposort.infer(plain, x) + scale + 3, atol=1e-5), "the state is only added to"


def test_how_much_of_its_logit_a_node_sees():
    """At half the scale a change is that of half the logits; at none it does not depend on them."""
    (x, _), state, alive = dataset(K=1), torch.randn(3, 6), torch.ones(3, 6, dtype=torch.bool)

    @torch.no_grad()
    def change(scale, state):
        torch.manual_seed(0)
        return make_model(state_scale=scale).update([state], x[0], alive)[0] - state

    assert torch.allclose(change(0.5, state), change(1.0, state / 2), atol=1e-5)
    assert torch.allclose(change(0.0, state), change(0.0, 7 * state), atol=1e-5)
    assert not torch.allclose(change(0.5, state), change(1.0, state), atol=1e-4)


def test_the_state_matters_and_no_gradient_passes_through_it():
    """The gradient of step 2's loss equals that of a single step from the same numbers."""
    model, (x, graph) = make_model(), dataset(K=2)
    alive, leaf = torch.ones(3, 6, dtype=torch.bool), toposort.leaves(graph)
    first, second = refine(model, Task(x, x[..., :0], alive, None))
    weights = [w for name, w in model.named_parameters() if name != "initial"]
    through = torch.autograd.grad(toposort.loss(second, leaf, alive).mean(), weights)
    for past, same in ((first[0].detach(), True), (torch.zeros(3, 6), False)):
        alone = torch.autograd.grad(toposort.loss(model.update([past], x[1], alive), leaf, alive).mean(), weights)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(through, alone)) == same


def test_linear_residual_equals_regressions_one_node_at_a_time():
    x, _ = dataset(K=1, N=60, d=4)
    alive = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]]).bool()
    residual, size = toposort.linear_residual(x[0], alive)
    for b in range(3):
        left = alive[b].nonzero().flatten()
        z = (x[0, b][:, left] - x[0, b][:, left].mean(0)).double().numpy()
        for i, node in enumerate(left):
            rest, y = np.delete(z, i, 1), z[:, i]
            weights = np.linalg.solve(rest.T @ rest / 60 + 1e-4 * np.eye(rest.shape[1]), rest.T @ y / 60)
            left_over = y - rest @ weights
            variance = y @ left_over / 60 + 1e-4
            assert np.allclose(residual[b, :, node], left_over / math.sqrt(variance), atol=2e-3)
            assert size[b, 0, node] == pytest.approx(math.log(variance) / 2, abs=1e-3)


def test_kernel_residual_equals_leaving_rows_out_one_by_one():
    x, _ = dataset(K=1, N=15, d=4)
    alive = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]]).bool()
    residual, size = toposort.kernel_residual(x[0], alive)
    for b in range(3):
        left = alive[b].nonzero().flatten().tolist()
        for node in left:
            rest = x[0, b][:, [other for other in left if other != node]].double().numpy()
            y = x[0, b, :, node].double().numpy()
            kernel = np.exp(4 * np.exp(-((rest[:, None] - rest[None]) ** 2) / 2).mean(-1) - 4)
            for row in range(15):
                others = [r for r in range(15) if r != row]
                fit = np.linalg.solve(kernel[np.ix_(others, others)] + 0.1 * np.eye(14), y[others])
                assert residual[b, row, node] == pytest.approx(3 * (y[row] - kernel[row, others] @ fit), abs=2e-3)
            assert size[b, 0, node] == pytest.approx(math.log(float(residual[b, :, node].square().mean()) / 9 + 1e-5) / 2, abs=1e-3)


def test_relations_equal_correlations_of_what_regressions_leave():
    """A ridge is as good as more rows, one a node, that are 0 elsewhere."""
    x, _ = dataset(K=1, N=60, d=5)
    alive = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    found = toposort.relations(x[0], alive)
    assert torch.equal(found[..., 2:], found[..., :2].abs())
    for b in range(3):
        left = alive[b].nonzero().flatten().tolist()
        z = x[0, b].double().numpy()
        rows = np.concatenate([(z - z.mean(0)) / z.std(0), (60 * 1e-4) ** 0.5 * np.eye(5)])
        for i, j in itertools.permutations(left, 2):
            assert found[b, i, j, 0] == pytest.approx(np.corrcoef(z[:, i], z[:, j])[0, 1], abs=1e-3)
            rest = rows[:, [k for k in left if k not in (i, j)]]
            r, s = (rows[:, k] - rest @ np.linalg.lstsq(rest, rows[:, k], rcond=None)[0] for k in (i, j))
            assert found[b, i, j, 1] == pytest.approx(r @ s / np.sqrt((r @ r) * (s @ s)), abs=1e-3)


def test_loss_is_minus_the_log_of_the_chance_to_remove_a_leaf():
    logits, leaf, alive = torch.randn(5, 4), torch.tensor([[1, 0, 1, 0]] * 5).bool(), torch.tensor([[1, 1, 1, 0]] * 5).bool()
    p = logits[:, :3].double().exp() / logits[:, :3].double().exp().sum(1, keepdim=True)
    assert torch.allclose(toposort.loss(logits, leaf, alive).double(), -(p[:, 0] + p[:, 2]).log(), atol=1e-5)
    wrong = toposort.error(torch.tensor([[1.0, 2, 0, 9], [3.0, 2, 0, 9]]), leaf[:2], alive[:2])
    assert wrong.tolist() == [1, 0], "a removed node is never chosen"


@torch.no_grad()
def test_the_newest_state_is_changed_and_older_ones_and_the_clock_are_seen():
    (x, _), alive, (old, new) = dataset(K=1), torch.ones(3, 6, dtype=torch.bool), torch.randn(2, 3, 6)

    def update(*past, step=0, **changes):
        return make_model(history=2, clock="steps", **changes).update(past, x[0], alive, step)[0]

    plain = update(old, new)
    assert torch.allclose(update(old, new, update="direct") + new, plain, atol=1e-5)
    assert not torch.allclose(update(new, new), plain, atol=1e-4) and not torch.allclose(update(old, new, step=1), plain, atol=1e-4)


# ---------------------------------------------------------------- recursive removal and measures


def test_an_oracle_makes_no_error():
    graph = torch.cat([toposort.take(family(20, 7, "cpu"), torch.rand(20, 7).argsort(1)) for family in SHIFTS])
    for forced in (True, False):
        error, order = toposort.roll_out(lambda nodes: toposort.leaves(toposort.take(graph, nodes)).float(), graph, torch.rand(100, 7, 7) if forced else None)
        assert error.abs().max() == 0 and toposort.violated(graph, order).max() == 0
    assert (order.sort(1)[0] == torch.arange(7)).all()


@pytest.mark.parametrize("forced", (True, False))
def test_removal_equals_a_loop_over_graphs(forced):
    graph = toposort.take(toposort.erdos_renyi(40, 6, "cpu"), torch.rand(40, 6).argsort(1))
    taste, luck = torch.rand(40, 6), torch.rand(40, 6, 6)
    error, order = toposort.roll_out(lambda nodes: taste.gather(1, nodes), graph, luck if forced else None)
    for b in range(40):
        left, wrong, removed = list(range(6)), 0, []
        while len(left) > 1:
            pick = max(left, key=lambda node: taste[b, node])
            true = [node for node in left if not children(graph[b], node, left)]
            if pick not in true:
                wrong += 1
                if forced:
                    pick = max(true, key=lambda node: luck[b, len(left) - 1, left.index(node)])
            left.remove(pick)
            removed.append(pick)
        assert error[b] == pytest.approx(wrong / 5) and order[b].tolist() == left + removed[::-1]


def test_violated_edges_equal_a_count():
    graph, order = toposort.erdos_renyi(30, 5, "cpu"), torch.rand(30, 5).argsort(1)
    graph[0] = False
    found = toposort.violated(graph, order)
    for g, o, share in zip(graph, order.tolist(), found):
        edges = g.nonzero().tolist()
        assert share == pytest.approx(sum(o.index(a) > o.index(b) for a, b in edges) / max(1, len(edges)))
    assert found[0] == 0


RANDOM = {("in", 20): (0.55, 0.475), ("out", 20): (0.665, 0.545)}  # known stage errors of a random choice, forced and free


@pytest.mark.parametrize("shift", ("in", "out"))
def test_chance_at_20_nodes(shift):
    families = toposort.FAMILIES[shift]
    graph = torch.cat([family(600, 20, "cpu") for family in families])
    luck = torch.rand(len(graph), 20, 20)
    for forced, known in zip((True, False), RANDOM[shift, 20]):
        error, order = toposort.roll_out(lambda nodes: torch.rand(nodes.shape), graph, luck if forced else None)
        assert error.mean() == pytest.approx(known, abs=0.03)
    assert toposort.violated(graph, order).mean() == pytest.approx(0.5, abs=0.02)


def contenders(B=40, d=6, K=2, N=40, mechanism="lin"):
    raw, graph = toposort.sample_data(B, 2 * K * N, d, "in", [mechanism], "cpu")
    batches = toposort.standardise(raw).unflatten(1, (2 * K, N)).transpose(0, 1)
    return toposort.contenders(make_model(), raw, batches, torch.rand(B, d, d)), raw, batches, graph


def test_r2_rules_equal_least_squares():
    scores, _, batches, _ = contenders(B=3)
    nodes = torch.tensor([[0, 1, 3, 5], [5, 2, 1, 0], [4, 3, 2, 1]])
    large = scores["largest R2"](2, nodes)
    assert torch.equal(large, -scores["smallest R2"](2, nodes))
    for b in range(3):
        x = toposort.columns(batches[:2], nodes).transpose(0, 1).flatten(1, 2)[b].double().numpy()
        x = x - x.mean(0)
        r2 = []
        for i in range(4):
            rest = np.delete(x, i, 1)
            fit = rest @ np.linalg.lstsq(rest, x[:, i], rcond=None)[0]
            r2.append(1 - ((x[:, i] - fit) ** 2).sum() / (x[:, i] ** 2).sum())
        assert np.allclose(large[b] + 1, r2, atol=1e-6)


@torch.no_grad()
def test_rivals_see_the_same_rows_and_no_state():
    scores, _, batches, _ = contenders(B=4)
    model, nodes = make_model(), torch.arange(6).expand(4, 6)
    each = torch.stack([toposort.infer(model, batches[k : k + 1]).softmax(-1) for k in range(2)])
    assert torch.allclose(scores["vote, no state"](2, nodes), each.mean(0), atol=1e-5)
    rows = torch.cat([batches[0], batches[1]], 1)[None]
    assert torch.allclose(scores["one step on all rows"](2, nodes), toposort.infer(model, rows), atol=1e-5)
    assert torch.equal(scores["one step on all rows"](1, nodes), scores[toposort.OURS](1, nodes))
    assert torch.allclose(scores[toposort.OURS](2, nodes), toposort.infer(model, batches[:2]))


def test_raw_variance_gives_linear_orders_away():
    """The trap that standardising avoids."""
    scores, raw, batches, graph = contenders(B=150)
    errors = {name: toposort.roll_out(lambda nodes: scores[name](2, nodes), graph, torch.rand(150, 6, 6))[0].mean() for name in ("largest raw variance", "random order")}
    assert errors["largest raw variance"] < 0.25 < 0.4 < errors["random order"]
    assert torch.allclose(batches.transpose(0, 1).flatten(1, 2).var(1), torch.ones(150, 6), atol=1e-4)


def test_kernel_r2_rules_compare_what_is_left_with_what_there_was():
    scores, _, batches, _ = contenders(B=3)
    nodes = torch.tensor([[0, 1, 3, 5], [5, 2, 1, 0], [4, 3, 2, 1]])
    left = [(toposort.kernel_residual(x, torch.ones(3, 4).bool())[0] / 3).var(1, correction=0) / x.var(1, correction=0) for x in toposort.columns(batches[:2], nodes)]
    found = scores["smallest kernel R2"](2, nodes)
    assert torch.allclose(found.float(), torch.stack(left).log().mean(0), atol=0.05)
    assert torch.equal(found, -scores["largest kernel R2"](2, nodes))


@torch.no_grad()
def test_an_evaluation_equals_one_by_hand():
    """34 graphs, the first ones of two draws of 32; after three of six mini-batches; forced, free and violated."""
    model, args, rows = make_model(), toposort_args(eval_tasks=34), []
    m, beside = toposort.compare(model, args, "lin", "out", 6)
    for index, count in enumerate((32, 2)):
        common.seed_all(common.EVALUATION, 4 * 6 + 1, index)
        (raw, graph), luck = toposort.sample_data(32, 6 * 12, 6, "out", ["lin"], "cpu"), torch.rand(32, 6, 6)
        x = toposort.standardise(raw).unflatten(1, (6, 12)).transpose(0, 1)
        score = lambda nodes: toposort.infer(model, toposort.columns(x[:3], nodes))
        free, order = toposort.roll_out(score, graph)
        rows.append(torch.stack([toposort.roll_out(score, graph, luck)[0], free, toposort.violated(graph, order)])[:, :count])
    for found, row in zip((m, m["free"], m["violated"]), torch.cat(rows, 1)):
        assert found["mean"][3] == pytest.approx(row.mean().item(), abs=0.015) and found["stderr"][3] == pytest.approx(row.std().item() / 34**0.5, abs=0.01)
    assert m["steps"] == [0, 1, 2, 3, 6] and m["tasks"] == 34 and beside["vote, no state"]["steps"] == [3]


def test_wrong_edges_are_orange_and_nodes_numbered_in_the_true_order():
    ax = common.Figure().subplots()
    toposort.draw_order(ax, dict(edges=[[5, 7], [7, 6]], true_order=[5, 7, 6]), [7, 5, 6], "after 1 step")
    arrows, names = [t.arrow_patch for t in ax.texts if not t.get_text()], [t.get_text() for t in ax.texts if t.get_text()]
    assert [to_hex(a.get_edgecolor()).upper() == common.COLORS[1] for a in arrows] == [True, False]
    assert names == ["2", "1", "3"] and ax.get_title() == "after 1 step: 1 of 2 edges wrong"


# ---------------------------------------------------------------- runs


def test_a_small_model_learns():
    """Three nodes in a few seconds: far below chance on fresh graphs, and further mini-batches help."""
    args = toposort.get_args("--nodes 3 --context 16 --steps 2 --width 16 --depth 1 --heads 1 --tasks 16 --iters 200 --mechanism rff --eval-tasks 128 --device cpu --out here".split())
    model = toposort.make_model(args)
    toposort.train(model, args)
    m, beside = toposort.compare(model, args, "rff", "in", 3)
    assert m["mean"][2] + 3 * m["stderr"][2] < beside["random order"]["mean"][1] and m["mean"][3] < m["mean"][1]


def test_results_hold_all_columns_and_measures(finished):
    results = json.load(open(finished("toposort") / "results.json"))
    assert list(results["metrics"]) == [f"{m}_{shift}_{d}" for d in (4, 5) for shift in ("in", "out") for m in ("lin", "rff")]
    for split, m in results["metrics"].items():
        rows = [m, *results["baselines"][split].values()]
        assert all(len(row[key]["mean"]) == len(row[key]["stderr"]) == len(row["steps"]) for row in rows for key in ("free", "violated"))
        assert all(0 <= value <= 1 for row in rows for part in (row, row["free"], row["violated"]) for value in part["mean"])
        place = {node: i for i, node in enumerate(m["true_order"])}
        assert all(place[a] < place[b] for a, b in m["edges"]) and all(sorted(order) == sorted(place) for order in m["orders"])
    assert (finished("toposort") / "orders.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--regime parametric", "--regime implicit only"),
        ("--regime explicit", "--regime implicit only"),
        ("--state softmax", "--state logits"),
        ("--state latent", "--state logits"),
        ("--mask causal", "--mask none"),
        ("--tasks 3", "--tasks"),
        ("--decoder solve", "--decoder linear"),
        ("--queries 4", "--nodes"),
        ("--steps 1 --context 1", "single row"),
        ("--nodes 2", "--nodes"),
        ("--eval-nodes 2", "--eval-nodes"),
        ("--mechanism cubic", "--mechanism"),
    ],
)
def test_wrong_use(flags, reason, capsys):
    refused(capsys, reason, "toposort", flags)
