"""The method, against references that share no code with it: loops, nn.TransformerEncoderLayer, autograd one by one."""

import argparse
import gc
import itertools
import math
import os
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Task, Transformer, refine

B, K, N, Q, X, Y = 3, 4, 6, 5, 4, 2
SIGNALS = ("data", "grad", "both")
IMPLICIT = [*(("linear", state) for state in ("logits", "softmax", "latent")), ("solve", "logits"), ("solve", "softmax")]  # decoder and state


def squared_error(prediction, y):
    return (prediction - y).square().sum(-1)


def softmax_cross_entropy(prediction, y):
    return -(y * prediction.log_softmax(-1)).sum(-1)


def identity(x):
    """The basis of a linear predictor."""
    return x


def settings(**changes):
    args = argparse.Namespace(
        history=1, mask="causal", latent_tokens=1, signal="data", decoder="linear", state="logits", attention="softmax", update="residual", clock="none", state_scale=1.0, init="random",
        width=8, depth=2, heads=2, basis="linear", hidden=6,
    )  # fmt: skip
    vars(args).update(changes)
    return args


def make(regime, loss=squared_error, **changes):
    """A model whose every parameter is random, so that nothing is hidden by a zero."""
    args = settings(**changes)
    torch.manual_seed(0)
    model = common.REGIMES[regime](args, X, Y, loss, identity)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn_like(p))
        if args.decoder != "linear":  # random steps along all observations would diverge
            wanted = model.log_variance if regime == "implicit" else model.decoder
            wanted.weight.mul_(0.05)
            wanted.bias.mul_(0.05)
    return model


@pytest.fixture
def task():
    torch.manual_seed(1)
    return Task(torch.randn(K, B, N, X), torch.randn(K, B, N, Y), torch.randn(B, Q, X), torch.randn(B, Q, Y))


def updated(model, past, x, y, query_x, step=0):
    return model.update(past, model.encode(x, y, step), query_x, step)


def past_states(model, task):
    """H different states, as they are in the middle of a run."""
    first = model.initial_state(task.query_x)
    return [first + 0.3 * torch.randn_like(first) for _ in range(model.history)]


def residuals(model, state, x, y):
    return common.residuals(model.loss, model.predict(state[None], x)[0], y)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("attention", ("softmax", "linear"))
@pytest.mark.parametrize("decoder", ("linear", "span", "solve"))
@pytest.mark.parametrize("history", (1, 3))
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_one_causal_pass_equals_a_loop_over_prefixes(task, regime, signal, history, decoder, attention):
    model = make(regime, signal=signal, history=history, decoder=decoder, attention=attention)
    x, y, past = task.context_x[0], task.context_y[0], past_states(model, task)
    at_once = updated(model.train(), past, x, y, task.query_x)
    assert len(at_once) == N
    model.eval()
    for n in range(1, N + 1):
        alone = updated(model, past, x[:, :n], y[:, :n], task.query_x)
        assert len(alone) == 1
        close(at_once[n - 1], alone[0])


@pytest.mark.parametrize("decoder", ("linear", "solve"))
@pytest.mark.parametrize("attention", ("softmax", "linear"))
@pytest.mark.parametrize("history", (1, 3))
def test_implicit_queries_under_their_own_prefixes_equal_a_loop_over_queries(task, history, attention, decoder, monkeypatch):
    """Each query is solved alone, in evaluation mode, on the context cut where the mask cuts it."""
    model = make("implicit", history=history, attention=attention, decoder=decoder).train()
    x, past = task.context_x[0], past_states(model, task)
    y = torch.randn(B, N, 2 * Y) if decoder == "solve" else task.context_y[0]  # residuals, too
    lengths = torch.randint(1, N + 1, (B, Q, 1))
    monkeypatch.setattr(common, "draw_size", lambda *_, **__: lengths)
    together = updated(model, past, x, y, task.query_x)[0]
    model.eval()
    for b in range(B):
        for q in range(Q):
            n = lengths[b, q, 0]
            one = slice(b, b + 1), slice(q, q + 1)
            alone = updated(model, [s[one] for s in past], x[b : b + 1, :n], y[b : b + 1, :n], task.query_x[one])
            close(together[one], alone[0])


@pytest.mark.parametrize("regime", ("parametric", "explicit", "implicit"))
def test_a_clock_tells_how_many_mini_batches_came_before(task, regime):
    with_clock, without = (make(regime, clock=clock, history=2).eval() for clock in ("steps", "none"))
    x, y = task.context_x[0], task.context_y[0]
    past = past_states(without, task)
    early, late = ([updated(model, past, x, y, task.query_x, step) for model in (with_clock, without)] for step in (0, 3))
    assert (early[0] - late[0]).abs().max() > 1e-4 and torch.equal(early[1], late[1])

    past = [with_clock.initial_state(task.query_x)] * 2
    for step, prediction in enumerate(refine(with_clock, task)):
        states = updated(with_clock, past, task.context_x[step], task.context_y[step], task.query_x, step)
        close(prediction, with_clock.predict(states, task.query_x))
        past = [past[1], states[-1]]

    past, with_clock.clock.data = past_states(without, task), with_clock.clock.data / 4
    quarter = updated(with_clock, past, x, y, task.query_x, 0)
    with_clock.clock.data *= 4
    close(quarter, updated(with_clock, past, x, y, task.query_x, 3))


def test_with_a_clock_observations_say_how_far_to_trust_them_by_what_came_before(task):
    """Where the decoder solves, the variance is that of observations alone: they need the clock as much as queries do."""
    x, y = task.context_x[0], torch.randn(B, N, 2 * Y)
    for clock in ("steps", "none"):
        model = make("implicit", decoder="solve", clock=clock)
        nn.init.normal_(model.log_variance.weight)
        early, late = (model.train().encode(x, y, step)[2] for step in (0, 3))  # where queries see parts, nothing is solved yet
        assert torch.equal(early[..., :-1], late[..., :-1]), "what residuals ask for is the same"
        assert ((early[..., -1] - late[..., -1]).abs().max() > 1e-4) == (clock == "steps")
        for silent in (model.decoder.weight, model.decoder.bias):  # what is left of an update is what they carry over
            nn.init.zeros_(silent)
        past = past_states(model.eval(), task)
        early, late = (updated(model, past, x, y, task.query_x, step) for step in (0, 3))
        assert ((early - late).abs().max() > 1e-4) == (clock == "steps")

    model = make("implicit", decoder="linear", clock="steps").eval()  # only queries see it
    early, late = (model.encode(x, y[..., :Y], step)[0] for step in (0, 3))
    assert all(torch.equal(a, b) for one, other in zip(early, late) for a, b in zip(one, other))


def test_half_of_the_prefixes_are_whole_and_each_query_and_task_draws_its_own(task, monkeypatch):
    model, seen = make("implicit").train(), []
    monkeypatch.setattr(model.transformer, "read", lambda tokens, memories, visible: seen.append(visible) or tokens)
    for _ in range(300):
        updated(model, [model.initial_state(task.query_x)], task.context_x[0], task.context_y[0], task.query_x)
    visible = torch.stack(seen)
    assert visible.shape == (300, B, 1, Q, N) and visible.dtype == torch.bool
    lengths = visible.sum(-1).flatten(0, 2)
    assert bool((visible == (torch.arange(N) < visible.sum(-1, keepdim=True))).all()), "a prefix, not a subset"
    shares = torch.stack([(lengths == n).float().mean() for n in range(N + 1)])
    expected = torch.tensor([0] + [1 / 2 / N] * (N - 1) + [1 / 2 + 1 / 2 / N])
    assert shares[0] == 0 and (shares - expected).abs().max() < 0.03
    lengths = visible.sum(-1).view(300, B, Q)
    assert (lengths[:, :, :1] != lengths).any(0)[:, 1:].all() and (lengths[:, :1] != lengths).any(0)[1:].all(), "queries or tasks share a length"


@pytest.mark.parametrize("mask", ("causal", "none"))
@pytest.mark.parametrize("decoder,state", IMPLICIT)
def test_an_implicit_prediction_does_not_change_when_other_queries_do(task, mask, decoder, state):
    model = make("implicit", mask=mask, decoder=decoder, state=state, history=2)

    def predictions(query_x):
        torch.manual_seed(5)  # the same prefixes
        return torch.stack(list(refine(model, task._replace(query_x=query_x))))

    changed = task.query_x.clone()
    changed[:, 1:] = torch.randn(B, Q - 1, X)
    before, after = predictions(task.query_x), predictions(changed)
    close(before[..., 0, :], after[..., 0, :])
    assert (before[..., 1:, :] - after[..., 1:, :]).abs().amin() > 1e-6, "the changed queries must have changed"


@pytest.mark.parametrize("regime", common.REGIMES)
def test_the_order_of_the_context_matters_only_under_a_causal_mask(task, regime):
    order = torch.randperm(N)
    shuffled = task._replace(context_x=task.context_x[:, :, order], context_y=task.context_y[:, :, order])
    for mask, same in (("none", True), ("causal", False)):
        model = make(regime, mask=mask, signal="data" if regime == "implicit" else "both").eval()
        difference = torch.stack([(a - b).abs().max() for a, b in zip(refine(model, task), refine(model, shuffled))])
        assert bool((difference < 1e-4).all()) if same else bool((difference > 1e-3).any()), (mask, difference)


@pytest.mark.parametrize("regime", common.REGIMES)
def test_without_a_mask_training_draws_one_length_for_the_whole_batch(task, regime):
    """The training pass equals evaluation on some common prefix, and all lengths occur."""
    model = make(regime, mask="none")
    past, (x, y) = [model.initial_state(task.query_x)], (task.context_x[0], task.context_y[0])
    on_prefix = torch.stack([model.predict(updated(model.eval(), past, x[:, :n], y[:, :n], task.query_x), task.query_x) for n in range(1, N + 1)])
    model.train()
    first = task._replace(context_x=x[None], context_y=y[None])
    matches = [(next(refine(model, first)) - on_prefix).flatten(1).abs().amax(1) < 1e-5 for _ in range(100)]
    matches = torch.stack(matches)
    assert (matches.sum(1) == 1).all() and matches.any(0).all()


@pytest.mark.parametrize("regime", common.REGIMES)
def test_where_steps_are_replayed_all_mini_batches_have_the_size_that_is_set(task, regime):
    model = make(regime, mask="none").train()
    model.size, model.encode = N - 2, lambda x, y, step: (x, y)
    assert [x.shape[1] for x, _ in common.mini_batches(model, task)] == [N - 2] * K
    assert [x.shape[1] for x, _ in common.mini_batches(model.eval(), task)] == [N] * K


@pytest.mark.parametrize("most", (1, 5, 16, 17, 100, 256))
def test_replayed_steps_have_at_most_sixteen_sizes_and_half_are_whole(most):
    sizes = [common.rounded_size(most) for _ in range(2000)]
    assert 1 <= min(sizes) and max(sizes) == most and min(len(set(sizes)), 16) == len(set(sizes)) >= min(most, 9)
    assert 0.45 < sizes.count(most) / 2000 and (most < 5 or sizes.count(most) / 2000 < 0.65)


def test_a_state_of_several_latent_tokens_uses_them_all(task):
    model = make("explicit", mask="none", latent_tokens=3, history=2).eval()
    x, y, (older, newest) = task.context_x[0], task.context_y[0], past_states(model, task)
    assert newest.shape == (B, 6 * Y)
    states = updated(model, [older, newest], x, y, task.query_x)
    slots = [model.state(part) + age for state, ages in zip((older, newest), model.age) for part, age in zip(state.chunk(3, 1), ages)]
    h = model.transformer(torch.cat([torch.stack(slots, 1), model.observation(torch.cat([x, y], -1))], 1), False)
    close(states, torch.cat([part + model.decoder(h[:, i]) for i, part in enumerate(newest.chunk(3, 1), 3)], 1)[None])
    prediction = model.predict(states, task.query_x)
    assert prediction.shape == (1, B, Q, Y)
    (gradient,) = torch.autograd.grad(prediction.square().sum(), states)
    assert (gradient.unflatten(-1, (3, 4)).abs().amax(-1) > 0).all()
    alike = updated(model, [torch.zeros(B, 6 * Y)] * 2, x, y, task.query_x)[0].unflatten(-1, (3, 4))
    assert (alike[:, 0] - alike[:, 1]).abs().max() > 1e-5, "tokens whose parts of the state are equal still differ"


# ---------------------------------------------------------------- the transformer


def copied(block):
    """PyTorch's own pre-norm layer with the weights of ours."""
    width = block.norm1.normalized_shape[0]
    layer = nn.TransformerEncoderLayer(width, block.heads, block.mlp[0].out_features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
    for theirs, ours in (
        (layer.self_attn.out_proj, block.out), (layer.linear1, block.mlp[0]), (layer.linear2, block.mlp[2]),
        (layer.norm1, block.norm1), (layer.norm2, block.norm2),
    ):  # fmt: skip
        theirs.load_state_dict(ours.state_dict())
    return layer


def random_transformer(width=16, depth=3, heads=4, attention="softmax"):
    torch.manual_seed(2)
    transformer = Transformer(width, depth, heads, attention)
    with torch.no_grad():
        for p in transformer.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return transformer


@pytest.mark.parametrize("causal", (False, True))
def test_our_transformer_equals_pytorchs_encoder_layers(causal):
    ours, x = random_transformer(), torch.randn(B, 9, 16)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None  # PyTorch: True where one may not look
    one = ours.blocks[0]
    close(one(x, causal=causal)[0], copied(one)(x, src_mask=hidden))
    expected = x
    for block in ours.blocks:
        expected = copied(block)(expected, src_mask=hidden)
    close(ours(x, causal), ours.norm(expected), 1e-4)


def test_keys_start_equal_to_queries_where_asked():
    torch.manual_seed(0)
    for init in ("torch", "random", "rotation"):
        models = Transformer(8, 2, 2, init=init), common.REGIMES["implicit"](settings(init=init), X, Y).transformer
        for block in (block for model in models for block in model.blocks):
            assert torch.equal(block.key_value.weight[:8], block.query.weight) == (init != "torch")


def test_a_rotation_keeps_the_angles_between_inputs():
    torch.manual_seed(0)
    model = common.REGIMES["implicit"](settings(init="rotation", heads=1), X, Y)
    x = torch.randn(B, N, X + Y)
    tokens = model.observation(x) - model.observation.bias
    close(tokens @ tokens.mT, x @ x.mT, 1e-5)
    for block in model.transformer.blocks:
        q, k = block.query(tokens) - block.query.bias, block.memory(tokens)[0][:, 0] - block.key_value.bias[: len(block.query.bias)]
        close(q @ k.mT, x @ x.mT, 1e-5)


@pytest.mark.parametrize("causal", (False, True))
def test_context_and_queries_equal_pytorchs_encoder_under_one_joint_mask(causal):
    """Queries see a prefix of the context of their own, not each other and not themselves; the context sees no query."""
    ours, context, queries = random_transformer(), torch.randn(B, N, 16), torch.randn(B, Q, 16)
    visible = torch.arange(N) < torch.randint(1, N + 1, (B, Q, 1))
    joint = torch.zeros(B, N + Q, N + Q, dtype=torch.bool)
    joint[:, :N, :N] = torch.ones(N, N, dtype=torch.bool).tril() if causal else True
    joint[:, N:, :N] = visible
    x = torch.cat([context, queries], 1)
    for block in ours.blocks:
        x = copied(block)(x, src_mask=~joint.repeat_interleave(block.heads, 0))
    close(ours.read(queries, ours.encode(context, causal)[0], visible[:, None]), ours.norm(x[:, N:]), 1e-4)


@pytest.mark.parametrize("N", (5, 256))  # by plain products; more by torch's kernel
def test_attention_in_bfloat16_is_that_of_float32(N):
    q, k, v = (torch.randn(2, 2, N, 8, requires_grad=True) for _ in range(3))
    some = torch.rand(2, 1, N, N) < 0.5
    some[..., 0] = True
    for visible, causal in ((None, False), (None, True), (some, False)):
        exact = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)
        found = common.softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), visible, causal)
        close(found.float(), exact, 0.05)
        for ours, theirs in zip(torch.autograd.grad(found.float().square().sum(), (q, k, v)), torch.autograd.grad(exact.square().sum(), (q, k, v))):
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_linear_attention_equals_a_loop_over_tokens_and_what_they_see():
    q, k, v = torch.randn(B, 2, 5, 4), torch.randn(B, 2, 5, 4), torch.randn(B, 2, 5, 4)
    some = torch.rand(B, 1, 5, 5) < 0.6
    some[..., 0] = True
    for visible, causal in ((None, False), (None, True), (some, False)):
        found = common.linear_attention(q, k, v, visible, causal)
        for b, h, i in itertools.product(range(B), range(2), range(5)):
            seen = [j for j in range(5) if (j <= i or not causal) and (visible is None or visible[b, 0, i, j])]
            close(found[b, h, i], sum((q[b, h, i] @ k[b, h, j]) / 2 * v[b, h, j] for j in seen) / len(seen))


def test_one_layer_of_linear_attention_takes_a_step_of_gradient_descent():
    """Keys x, values y: a query reads off x . w after one step on the mean squared error from w = 0 (von Oswald et al., 2023a)."""
    x, y, query, w = torch.randn(B, 1, N, X), torch.randn(B, 1, N, 1), torch.randn(B, 1, Q, X), torch.zeros(B, X, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad((x[:, 0] @ w - y[:, 0]).square().mean(1).sum(), w)
    close(common.linear_attention(query, x, y)[:, 0], query[:, 0] @ -gradient / 2 * X**-0.5)


@pytest.mark.parametrize("batch", [(3,), (2, 4)])
def test_solving_by_cholesky_equals_solving_by_elimination_gradients_too(batch):
    a, b, gradient = torch.randn(*batch, 6, 6).double(), torch.randn(*batch, 6, 2).double(), torch.randn(*batch, 6, 2).double()
    a = a @ a.mT + torch.eye(6)
    a[0, ..., 2:, :2] = a[0, ..., :2, 2:] = 0  # blocks, as of a prefix and of what lies beyond it
    answers = []
    for solve in (common.Solve.apply, torch.linalg.solve):
        inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
        x = solve(*inputs)
        answers.append([x, *torch.autograd.grad(x, inputs, gradient)])
    for ours, expected in zip(*answers, strict=True):
        close(ours, expected)


def test_a_system_without_a_cholesky_factor_gives_nan_and_others_beside_it_an_answer():
    a = torch.stack([torch.eye(2), -torch.eye(2), 2 * torch.eye(2)])
    x = common.Solve.apply(a, torch.ones(3, 2, 1))
    assert x[1].isnan().all() and x[::2].flatten().tolist() == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("attention", ("softmax", "linear"))
def test_what_is_carried_over_equals_a_regression_for_each_query_on_what_it_sees(attention):
    """In the dual form of Gaussian processes, in numpy."""
    model = make("implicit", decoder="solve", attention=attention)
    query_x, x, wanted = torch.randn(B, Q, X), torch.randn(B, N, X), torch.randn(B, N, Y + 1)
    own = torch.arange(N) < torch.randint(1, N + 1, (B, 1, Q, 1))
    kernel = {"softmax": lambda a, b: np.exp(-((a - b) ** 2).sum() / X), "linear": lambda a, b: a @ b / X}[attention]
    for visible in (None, own):
        found = model.carry_over(x, model.dual(x, wanted) if visible is None else wanted, query_x, visible)
        for b, i in itertools.product(range(B), range(Q)):
            n = N if visible is None else int(visible[b, 0, i].sum())
            query, keys, asked = query_x[b, i].numpy(), x[b, :n].numpy(), wanted[b, :n].numpy()
            system = np.array([[kernel(a, c) for c in keys] for a in keys]) + np.diag(np.exp(asked[:, -1]) + 1e-3)
            expected = np.array([kernel(query, c) for c in keys]) @ np.linalg.solve(system, asked[:, :-1])
            close(found[b, i], torch.tensor(expected, dtype=torch.float32), 1e-4)


def test_what_is_carried_over_is_what_solved_weights_predict():
    """With the linear kernel, implicit and parametric models make the same of what observations want."""
    wanted, x, query_x = torch.randn(B, N, Y + 1), torch.randn(B, N, X), torch.randn(B, Q, X)
    implicit, parametric = make("implicit", decoder="solve", attention="linear"), make("parametric", decoder="solve", mask="none")
    weights = parametric.pull_back(x * X**-0.5, wanted)
    close(implicit.carry_over(x, implicit.dual(x, wanted), query_x, None), parametric.apply_to(query_x * X**-0.5, weights)[0], 1e-4)


def test_implicit_refinement_without_corrections_is_ridge_regression_of_what_is_left(task):
    """With the linear kernel and one variance for all, each mini-batch adds the ridge regression of its residuals, weights in numpy."""
    model, noise = make("implicit", decoder="solve", attention="linear", mask="none").eval(), 0.3
    with torch.no_grad():
        for p in (model.initial, *model.decoder.parameters(), model.log_variance.weight):
            p.zero_()
        model.log_variance.bias.fill_(math.log(noise - 1e-3))
        model.rate.fill_(0.5)
    weights = np.zeros((B, X, Y))
    for prediction, x, y in zip(refine(model, task), task.context_x.numpy(), task.context_y.numpy()):
        for b in range(B):
            weights[b] += np.linalg.solve(x[b].T @ x[b] + X * noise * np.eye(X), x[b].T @ (y[b] - x[b] @ weights[b]))
        close(prediction[0].double(), torch.tensor(task.query_x.numpy() @ weights), 1e-4)


@pytest.mark.parametrize("regime", ("parametric", "explicit", "implicit"))
def test_the_attention_asked_for_is_the_one_that_runs(task, regime):
    for attention in ("softmax", "linear"):
        blocks = make(regime, attention=attention).transformer.blocks
        assert all(block.attend is getattr(common, f"{attention}_attention") for block in blocks)


# ---------------------------------------------------------------- gradients as inputs


@pytest.mark.parametrize("loss", (squared_error, softmax_cross_entropy))
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_gradients_of_observations_equal_autograd_one_by_one(task, regime, loss):
    model = make(regime, loss, signal="grad")
    x, y = task.context_x[0], F.one_hot(torch.randint(Y, (B, N)), Y).float()
    state = torch.randn(B, model.theta0.numel())
    with torch.no_grad():  # as in evaluation
        at_once = model.gradients(residuals(model, state, x, y), model.basis(x))
    for b in range(B):
        for n in range(N):
            one = state[b].clone().requires_grad_()
            value = loss(model.predict(one[None, None], x[b, n : n + 1][None]), y[b, n : n + 1]).squeeze()
            close(at_once[b, n], torch.autograd.grad(value, one)[0], 1e-4)


@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_nothing_backpropagates_through_gradient_inputs(task, regime):
    model, seen = make(regime, signal="grad"), []
    compute = model.gradients
    model.gradients = lambda *a: seen.append(compute(*a)) or seen[-1]
    updated(model, past_states(model, task), task.context_x[0], task.context_y[0], None)
    assert len(seen) == 1 and not seen[0].requires_grad


@pytest.mark.parametrize("decoder", ("linear", "span", "solve"))
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_the_signal_decides_what_the_update_may_read(task, regime, signal, decoder):
    """`grad` reads targets through their gradients only: with a loss that ignores them, they make no difference."""
    model = make(regime, lambda prediction, y: prediction.sum(-1) * 0, signal=signal, decoder=decoder).eval()
    x, y, past = task.context_x[0], task.context_y[0], past_states(model, task)
    same = torch.equal(updated(model, past, x, y, None), updated(model, past, x, y + 1, None))
    assert same == (signal == "grad")


@pytest.mark.parametrize("mask", ("causal", "none"))
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_the_transformer_says_how_to_change_the_newest_state(task, regime, mask):
    model = make(regime, mask=mask, history=3).eval()
    past, change = past_states(model, task), torch.randn(model.theta0.numel())
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.decoder.bias.copy_(change)
    close(updated(model, past, task.context_x[0], task.context_y[0], task.query_x)[0], past[-1] + change)


# ---------------------------------------------------------------- updates in the span of the data


@pytest.mark.parametrize("mask", ("causal", "none"))
@pytest.mark.parametrize("loss", (squared_error, softmax_cross_entropy))
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_gradient_descent_is_a_special_case_of_the_span(task, regime, loss, mask):
    """Cotangents -eta dL/dprediction give eta steps of gradient descent on the summed loss of each prefix."""
    model, eta = make(regime, loss, decoder="span", mask=mask).train(), 0.3
    x, y = task.context_x[0], F.one_hot(torch.randint(Y, (B, N)), Y).float()
    past = past_states(model, task)
    model.decoder.forward = lambda h: -eta * residuals(model, past[-1], x, y)
    new = updated(model, past, x, y, task.query_x)  # (T, B, P)
    expected = []
    for n in range(1, N + 1):
        state = past[-1].detach().requires_grad_()
        total = loss(model.predict(state[None], x[:, :n]), y[:, :n]).sum()
        expected.append(past[-1] - eta * torch.autograd.grad(total, state)[0])
    close(new, torch.stack(expected if mask == "causal" else expected[-1:]), 1e-4)


@pytest.mark.parametrize("mask", ("causal", "none"))
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_the_solved_change_is_that_of_weighted_least_squares(task, regime, mask):
    """It minimizes sum_i |change of prediction i - wanted i|^2 / (variance_i + 0.001) + |change|^2 over all changes of the weights: by stacked equations."""
    model, wanted, x = make(regime, decoder="solve", mask=mask).train(), torch.randn(B, N, Y + 1), task.context_x[0]
    found = model.pull_back(model.basis(x).detach(), wanted)
    assert len(found) == (N if mask == "causal" else 1)
    for n, b in itertools.product(range(1, N + 1) if mask == "causal" else [N], range(B)):
        phi, loud = model.basis(x[b, :n]).detach().double(), (wanted[b, :n, -1:].double().exp() + 1e-3) ** -0.5
        stacked = torch.cat([loud * phi, torch.eye(phi.shape[1], dtype=torch.float64)])
        best = torch.linalg.lstsq(stacked, F.pad(loud * wanted[b, :n, :-1], (0, 0, 0, phi.shape[1]))).solution
        close(found[n - 1 if mask == "causal" else 0, b].detach(), best.T.float().flatten(), 1e-4)


def test_one_solved_step_can_be_the_oracle_of_linear_regression(task):
    """From the weights 0, asked for the targets, with the variance of their noise."""
    model, (x, y) = make("parametric", decoder="solve", mask="none").eval(), (task.context_x[0], task.context_y[0])
    posterior = torch.linalg.solve(x.mT @ x + 0.3 * torch.eye(X), x.mT @ y)
    close(model.pull_back(x, torch.cat([y, torch.full((B, N, 1), 0.3 - 1e-3).log()], -1))[0], posterior.mT.flatten(1), 1e-4)


@pytest.mark.parametrize("decoder", ("span", "solve"))
@pytest.mark.parametrize("regime", ("parametric", "explicit"))
def test_each_cotangent_is_of_the_observation_that_it_is_pulled_back_at(task, regime, decoder):
    """Without a mask the order of the observations makes no difference, which it would if tokens and inputs were out of step."""
    model, order = make(regime, decoder=decoder, mask="none", history=2).eval(), torch.randperm(N)
    x, y, past = task.context_x[0], task.context_y[0], past_states(model, task)
    straight = updated(model, past, x, y, None)
    close(updated(model, past, x[:, order], y[:, order], None), straight)
    assert (updated(model, past, x[:, order], y, None) - straight).abs().max() > 1e-3


def test_tokens_see_the_residuals_of_each_past_state_and_nothing_else_of_them(task):
    """Oldest first, beside the observation; so two states with the same residuals are the same to the model."""
    model = make("parametric", decoder="span", mask="none", history=3).eval()
    x, y, past = task.context_x[0], task.context_y[0], past_states(model, task)
    wrong = torch.cat([2 * (model.predict(state[None], x)[0] - y) for state in past], -1)
    tokens = model.observation(torch.cat([x, y], -1)) + model.residual(wrong)
    close(updated(model, past, x, y, None), past[-1] + model.pull_back(x, model.decoder(model.transformer(tokens, False))))


@pytest.mark.parametrize("decoder", ("span", "solve"))
def test_a_trained_basis_learns_from_predictions_and_not_from_updates(task, decoder):
    model = make("explicit", decoder=decoder).train()
    states = updated(model, past_states(model, task), task.context_x[0], task.context_y[0], None)
    learning = [model.decoder.weight, model.basis.input.weight]
    g = torch.autograd.grad(states.square().sum(), learning, retain_graph=True, allow_unused=True)
    assert g[0].abs().max() > 0 and g[1] is None
    assert torch.autograd.grad(model.predict(states, task.query_x).square().sum(), learning[1])[0].abs().max() > 0


def test_the_untrained_basis_is_a_rotation_or_a_gaussian_kernel():
    """A prediction at x' moves by basis(x) . basis(x') times what is asked for at x."""
    x, other = torch.randn(2, 7, X)
    phi = common.Basis(X, 8, "linear")
    close(phi(x) - phi(torch.zeros(X)), (phi.input.weight @ x.T).T * 8**-0.5)
    close((phi(x) - phi(torch.zeros(X))).norm(dim=-1), x.norm(dim=-1) * X**-0.5)
    phi = common.Basis(X, 100_000, "fourier")
    close((phi(x) * phi(other)).sum(-1), (-(x - other).square().sum(-1) / X).exp(), 0.02)


@pytest.mark.parametrize("regime", ("parametric", "explicit", "implicit"))
def test_the_output_is_a_change_of_the_state_or_the_next_state(task, regime):
    """The same weights either way: what the two return differs by the newest state."""
    x, y, past = task.context_x[0], task.context_y[0], past_states(make(regime, history=3), task)
    residual, direct = (updated(make(regime, update=update, history=3).eval(), past, x, y, task.query_x) for update in ("residual", "direct"))
    close(residual, past[-1] + direct)


def test_an_untrained_update_stays_where_it_is(task):
    for regime in ("parametric", "explicit"):
        for decoder in ("linear", "span", "solve"):
            torch.manual_seed(0)
            model = common.REGIMES[regime](settings(decoder=decoder), X, Y, squared_error, identity).eval()
            past = past_states(model, task)
            assert torch.equal(updated(model, past, task.context_x[0], task.context_y[0], None)[0], past[-1])


def test_how_much_of_its_state_a_query_sees(task):
    """A state shown at half its size is the model shown half the state; at 0 there is a change that does not depend on it."""
    x, y = task.context_x[0], task.context_y[0]
    whole, half, hidden = (make("implicit", update="direct", state_scale=scale, history=2).eval() for scale in (1.0, 0.5, 0.0))
    past = [torch.randn(*whole.initial_state(task.query_x).shape) for _ in range(2)]
    close(updated(half, past, x, y, task.query_x), updated(whole, [0.5 * state for state in past], x, y, task.query_x))
    close(updated(hidden, past, x, y, task.query_x), updated(hidden, [7 * state for state in past], x, y, task.query_x))
    assert (updated(whole, past, x, y, task.query_x) - updated(half, past, x, y, task.query_x)).abs().max() > 1e-3


def test_a_softmax_state_is_read_as_probabilities_and_kept_as_logits(task):
    """The same weights on logits that are probabilities already; and the prediction is the state itself."""
    on_logits, on_softmax = make("implicit", update="direct").eval(), make("implicit", update="direct", state="softmax").eval()
    state, rest = torch.randn(B, Q, Y), (task.context_x[0], task.context_y[0], task.query_x)
    new = updated(on_softmax, [state], *rest)
    close(new, updated(on_logits, [state.softmax(-1)], *rest))
    assert (new - updated(on_logits, [state], *rest)).abs().max() > 1e-3
    assert torch.equal(on_softmax.predict(new, task.query_x), new)
    model = make("implicit", history=2, state="softmax").eval()
    past = [torch.randn(B, Q, Y) for _ in range(2)]
    close(updated(model, [past[0] + 3, past[1]], *rest), updated(model, past, *rest))  # what all logits share is not in probabilities, old or new


def test_every_past_state_is_read(task):
    for regime in common.REGIMES:
        model = make(regime, history=3).eval()
        past = [s.detach().requires_grad_() for s in past_states(model, task)]
        states = updated(model, past, task.context_x[0], task.context_y[0], task.query_x)
        read = torch.autograd.grad(states.square().sum(), past)
        assert all(g.abs().max() > 1e-6 for g in read), regime


# ---------------------------------------------------------------- the greedy loop


CASES = [
    dict(regime="parametric", signal="both", history=2), dict(regime="parametric", signal="grad", mask="none"),
    dict(regime="explicit", signal="both", history=2), dict(regime="explicit", signal="data", mask="none", latent_tokens=2),
    dict(regime="parametric", decoder="span", history=2), dict(regime="parametric", decoder="span", signal="grad", mask="none"),
    dict(regime="explicit", decoder="span", signal="both"), dict(regime="explicit", decoder="solve", mask="none"),
    dict(regime="parametric", decoder="solve", signal="both"), dict(regime="explicit", decoder="solve", mask="none", basis="fourier"),
    dict(regime="implicit", history=2), dict(regime="implicit", state="latent", mask="none"), dict(regime="implicit", state="softmax"),
]  # fmt: skip


def gradients_of(model):
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_no_gradient_crosses_a_step(task, case):
    """The greedy loop's gradient is the sum of K gradients of one step, each from states that are plain numbers."""
    model = make(**case).train()
    torch.manual_seed(7)
    states, batches, update, encode = [model.initial_state(task.query_x)] * model.history, [], model.update, model.encode

    def recorded(past, batch, *given):
        new = update(past, batch, *given)
        states.append(new[-1])
        return new

    def drawn(x, y, step):
        batches.append((x, y))  # as many observations as were drawn
        return encode(x, y, step)

    model.update, model.encode = recorded, drawn
    for prediction in refine(model, task):
        squared_error(prediction, task.query_y).mean().backward()
    greedy, model.update, model.encode = gradients_of(model), update, encode

    torch.manual_seed(7)
    expected = [torch.zeros_like(g) for g in greedy]
    for k in range(K):
        past = [torch.tensor(s.tolist()) for s in states[k : k + model.history]]  # numbers, without any graph
        past = past if k else [model.initial_state(task.query_x)] * model.history
        new = updated(model, past, *batches[k], task.query_x)
        squared_error(model.predict(new, task.query_x), task.query_y).mean().backward()
        expected = [e + g for e, g in zip(expected, gradients_of(model))]
    for (name, _), g, e in zip(model.named_parameters(), greedy, expected):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("attention", ("softmax", "linear"))
@pytest.mark.parametrize("state", ("logits", "softmax"))
@pytest.mark.parametrize("loss", (squared_error, softmax_cross_entropy))
def test_observations_show_the_residuals_that_they_have_as_queries(task, loss, state, attention):
    """Each observation alone is taken through the mini-batches before its own; gradients are those of tokens made of plain numbers."""
    model = make("implicit", loss, decoder="solve", state=state, attention=attention, history=2, mask="none", clock="steps", state_scale=0.5).eval()
    seen = []  # mini-batches: x (B, N, X), y and residuals (B, N, 2 Y)

    def predict(query_x, rows=slice(None)):
        past = [model.initial_state(query_x)] * 2
        for step, (x, y) in enumerate(seen):
            past = [past[1], updated(model, past, x[rows], y[rows], query_x, step)[0].detach()]
        return model.predict(past[1][None], query_x)[0]

    for prediction, x, y in zip(refine(model, task), task.context_x, task.context_y):
        loss(prediction, task.query_y).mean().backward()
        wrong = torch.zeros(B, N, Y)
        for b, n in itertools.product(range(B), range(N)):
            own = predict(x[b : b + 1, n : n + 1], slice(b, b + 1)).detach().requires_grad_()
            (wrong[b, n],) = torch.autograd.grad(loss(own, y[b : b + 1, n : n + 1]).sum(), own)[0][0]
        seen.append((x, torch.cat([y, wrong], -1)))
        close(prediction[0], predict(task.query_x), 1e-4)
    greedy = gradients_of(model)

    past, expected = [model.initial_state(task.query_x)] * 2, [torch.zeros_like(g) for g in greedy]
    for step, (x, y) in enumerate(seen):
        new = updated(model, past, x, y, task.query_x, step)
        loss(model.predict(new, task.query_x), task.query_y).mean().backward()
        past, expected = [past[1].detach(), new[0].detach()], [e + g for e, g in zip(expected, gradients_of(model))]
    for g, e in zip(greedy, expected):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4)


def test_a_query_shows_no_residual(task):
    """The encoder's columns for residuals make no difference to what a query reads from the same keys and values."""
    model = make("implicit", decoder="solve").eval()
    past, x = past_states(model, task), task.context_x[0]
    batch = model.encode(x, torch.randn(B, N, 2 * Y))
    before = model.update(past, batch, task.query_x)
    with torch.no_grad():
        model.observation.weight[:, -Y:] += 1
    assert torch.equal(model.update(past, batch, task.query_x), before)


def test_observations_are_followed_as_the_queries_are(task):
    """In training, too, the residual is that of the prediction which a query at the same x has: sizes are drawn once for both."""
    model, seen = make("implicit", decoder="solve", mask="none").train(), []
    encode = model.encode
    model.encode = lambda x, y, step: seen.append(y) or encode(x, y, step)
    sizes = set()
    for _ in range(20):
        seen.clear()
        *_, before, _ = refine(model, task._replace(query_x=task.context_x[-1]))
        last = seen[-1]  # (B, n, 2 Y)
        sizes.add(last.shape[1])
        close(last[..., Y:], 2 * (before[0] - task.context_y[-1])[:, : last.shape[1]], 1e-4)
    assert len(sizes) > 2


@pytest.mark.parametrize("regime,more", [*((regime, {}) for regime in common.REGIMES), ("implicit", dict(decoder="solve"))])
def test_memory_does_not_grow_with_the_number_of_steps(task, regime, more):
    """Counts the tensors that autograd holds for a backward pass when each step yields."""
    model = make(regime, history=2, **more).train()
    alive, counts = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for prediction in refine(model, task):
            gc.collect()
            counts.append(len(alive))
            squared_error(prediction, task.query_y).mean().backward()
    assert counts[0] > 0 and max(counts[1:]) <= counts[0]


def test_observations_to_come_are_refined_a_mini_batch_at_a_time(task):
    """So that memory does not grow with K; without gradients. A mini-batch is encoded once, and its system solved once, for all that read it."""
    model, calls, sizes = make("implicit", decoder="solve").eval(), [], []
    encode, dual, update = model.encode, model.dual, model.update
    model.encode = lambda x, y, step: calls.append("encode") or encode(x, y, step)
    model.dual = lambda *given: calls.append("dual") or dual(*given)
    model.update = lambda past, batch, query_x, step: sizes.append((query_x.shape[1], torch.is_grad_enabled())) or update(past, batch, query_x, step)
    list(refine(model, task))
    assert sizes == sum(([(Q, True), *[(N, False)] * later] for later in reversed(range(K))), [])
    assert calls == ["encode", "dual"] * K


@pytest.mark.parametrize("regime,more", [*((regime, {}) for regime in common.REGIMES), ("implicit", dict(decoder="solve"))])
def test_each_step_reads_its_own_mini_batch_and_the_state_before(task, regime, more):
    """Changing mini-batch k leaves the predictions before it alone and changes those from k on: the state carries it."""
    model = make(regime, **more).eval()
    before = torch.stack(list(refine(model, task)))
    changed = task.context_y.clone()
    changed[2] += 1
    after = torch.stack(list(refine(model, task._replace(context_y=changed))))
    moved = (before - after).flatten(1).abs().amax(1)
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-6).all()


@pytest.mark.parametrize("case", [*CASES, dict(regime="implicit", decoder="solve"), dict(regime="implicit", decoder="solve", mask="none", attention="linear")], ids=lambda case: "-".join(map(str, case.values())))
def test_every_parameter_learns_and_the_initial_state_with_them(task, case):
    model = make(**case).train()
    for prediction in refine(model, task):
        squared_error(prediction, task.query_y).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("regime,signal", [("parametric", "both"), ("explicit", "both"), ("implicit", "data")])
def test_states_and_gradient_inputs_stay_in_float32_under_bfloat16(task, regime, signal):
    model = make(regime, signal=signal, history=2).train()
    model.transformer.dtype = torch.bfloat16
    inside, states, gradients = [], [], []
    model.transformer.blocks[0].mlp[0].register_forward_hook(lambda *call: inside.append(call[-1].dtype))
    predict = model.predict
    model.predict = lambda s, x: states.append(s.dtype) or predict(s, x)
    if signal == "both":
        compute = model.gradients
        model.gradients = lambda *a: gradients.append(compute(*a)) or gradients[-1]
    for prediction in refine(model, task):
        assert prediction.dtype == torch.float32
        squared_error(prediction, task.query_y).mean().backward()
    assert set(inside) == {torch.bfloat16}, "the transformer must really run in bfloat16"
    assert set(states) == {torch.float32} and {g.dtype for g in gradients} <= {torch.float32}
    if gradients:  # not rounded on the way either
        assert (gradients[0] != gradients[0].bfloat16().float()).any()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_state_handed_on_is_that_of_the_whole_mini_batch(task):
    """Of the states after each prefix, under a causal mask; older ones move up."""
    model, seen = make("parametric", history=2).train(), []

    def update(past, batch, query_x, step):
        seen.append([float(state.detach()[0, 0]) for state in past])
        prefix = 10.0 * step + torch.arange(N)
        return prefix[:, None, None].expand(N, *past[0].shape)

    model.update = update
    list(refine(model, task))
    last = N - 1
    assert seen[1:] == [[seen[0][0], last], [last, 10 + last], [10 + last, 20 + last]]


# ---------------------------------------------------------------- seeds, files, evaluation


def test_the_explicit_predictor_learns_at_a_fraction_of_the_rate_and_every_parameter_once():
    args = argparse.Namespace(lr=0.5, iters=100, device="cpu")
    for regime in common.REGIMES:
        model = make(regime)
        optimizer = common.make_optimizer(model, args)
        common.set_learning_rate(optimizer, 40, args)
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(list(model.parameters()))
        full = rates[model.transformer.norm.weight]
        assert 0 < full < 0.5
        for name, p in model.named_parameters():
            assert rates[p] == pytest.approx(full * (0.03 if name.startswith("basis.") else 1))


def test_the_rate_warms_up_over_a_twentieth_and_falls_to_zero_by_a_cosine():
    args, groups = argparse.Namespace(lr=2.0, iters=200), [{"share": 0.5}]
    rates = [common.set_learning_rate(argparse.Namespace(param_groups=groups), i, args) or groups[0]["lr"] for i in range(200)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and max(rates) == pytest.approx(1)
    assert rates[104] == pytest.approx(0.5) and rates[199] == pytest.approx(0) and rates[10:] == sorted(rates[10:], reverse=True)


def test_seeds_are_a_function_of_stream_seed_and_index():
    def draw(*key):
        common.seed_all(*key)
        return torch.randn(4).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(a, b, c) for a in (1, 2, 3) for b in range(3) for c in range(3)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    common.replace_file(str(path), lambda f: f.write(b"old"))

    def killed(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.replace_file(str(path), killed)
    assert path.read_text() == "old"
    with pytest.raises(SystemExit):  # a signal in the middle
        common.replace_file(str(path), lambda f: (f.write(b"ne"), sys.exit(130)))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    common.replace_file(str(path), lambda f: f.write(b"new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_evaluation_starts_at_the_initial_state_and_averages_over_queries(task):
    model = make("parametric").train()
    values = common.evaluate(model, task, squared_error)
    assert values.shape == (B, K + 1)
    initial = task.query_x @ model.theta0.view(Y, X).T
    close(values[:, 0], squared_error(initial, task.query_y).mean(1).detach())


@pytest.mark.parametrize("mask", ("causal", "none"))
@pytest.mark.parametrize("regime", common.REGIMES)
def test_evaluation_reads_whole_mini_batches(task, regime, mask):
    """After each step, the last observation of its mini-batch makes a difference, for every task and query."""
    model = make(regime, mask=mask).train()
    before = common.evaluate(model, task, lambda prediction, y: prediction.sum(-1))
    for k in range(K):
        changed = task.context_y.clone()
        changed[k, :, -1] += 1
        after = common.evaluate(model.train(), task._replace(context_y=changed), lambda prediction, y: prediction.sum(-1))
        moved = (after - before).abs() > 1e-6
        assert not moved[:, : k + 1].any() and moved[:, k + 1].all()


def test_summary_is_the_mean_and_its_standard_error_over_tasks():
    values = torch.randn(50, 3)
    found = common.summary([values[:20], values[20:]], name="n")
    assert found["tasks"] == 50 and found["steps"] == [0, 1, 2] and found["name"] == "n"
    close(torch.tensor(found["mean"]), values.mean(0))
    close(torch.tensor(found["stderr"]), values.std(0) / 50**0.5)


def test_evaluation_tasks_do_not_depend_on_how_many_are_asked_for():
    def sample(n):
        x = torch.randn(n, 2)
        return Task(x.expand(1, 1, n, 2).transpose(1, 2), x.expand(1, 1, n, 2).transpose(1, 2), x, x)

    few = torch.cat([t.query_x for t in common.evaluation_tasks(sample, 40)])
    many = torch.cat([t.query_x for t in common.evaluation_tasks(sample, 100)])
    other = torch.cat([t.query_x for t in common.evaluation_tasks(sample, 40, stream=1)])
    assert few.shape == (40, 2) and many.shape == (100, 2) and torch.equal(few, many[:40])
    assert len(many.unique(dim=0)) == 100 and not torch.isin(other, many).any()
