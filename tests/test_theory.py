"""Every statement of theory.md from Eq. 8 on: attacked with random finite domains, brought to equality where it can be,
and broken by dropping one of its assumptions, so that the test shows what the assumption is for.

A finite set of pixels is a domain, so the inequalities must hold for it exactly; tolerances are for rounding alone.
"""

import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import align
import bound
import checkpoint
import data
import ppar
import reweight
from data import VOID

TOL = 1e-9  # all random domains are drawn in float64
OPPOSITE = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # two prototypes, 2 apart


def rng(seed):
    return torch.Generator().manual_seed(seed)


def units(g, *shape):
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def uniform(g, low, high):
    return low + (high - low) * torch.rand((), generator=g).item()


def random_shares(g, allowed):
    share = torch.rand(len(allowed), generator=g, dtype=torch.float64) * allowed
    return share / share.sum()


def random_domain(g, p, n=None):
    """Pixels (emb, label) anywhere between their prototype and chaos; some classes do not occur."""
    k, d = p.shape
    n = n or int(torch.randint(1, 60, (1,), generator=g))
    classes = torch.randperm(k, generator=g)[:int(torch.randint(1, k + 1, (1,), generator=g))]
    label = classes[torch.randint(0, len(classes), (n,), generator=g)]
    emb = F.normalize(p[label] + uniform(g, 0, 3) * units(g, n, d), dim=1)
    if torch.rand((), generator=g) < 0.5:
        emb[: n // 3] = units(g, n // 3, d)
    return emb, label


def for_random_draws(statement):
    """A test that statement(g, p, tau), a generator of (name, smaller side, larger side), is right whatever p and tau."""
    def test():
        for seed in range(200):
            g = rng(seed)
            k, d = int(torch.randint(2, 9, (1,), generator=g)), int(torch.randint(2, 24, (1,), generator=g))
            p = F.normalize(units(g, k, d) + uniform(g, 0, 3) * units(g, 1, d), dim=1)  # crowded at times, as CLIP's text is
            for name, small, large in statement(g, p, uniform(g, 0.03, 1)):
                small, large = (torch.as_tensor(x, dtype=torch.float64) for x in (small, large))
                assert (small <= large + TOL).all(), f"{name}, seed {seed}"
    return test


def mean(value, weight=None):
    return (value.mean() if weight is None else (weight * value).sum() / weight.sum()).item()


def risk(emb, label, p, tau, weight=None):
    return mean(bound.score_loss(emb, label, p, tau), weight)


def distance(emb, label, p):
    return (emb - p[label]).norm(dim=1)


def radius(emb, label, p, weight=None):
    return mean(distance(emb, label, p), weight)


def by_class(value, label, k):
    """Mean of value in each class, (K,), 0 where there is none."""
    return torch.stack([value[label == c].mean() for c in range(k)]).nan_to_num(0.0)


def shares(label, k, weight=None):
    """pi(y), (K,)."""
    total = torch.bincount(label, weight, k).double()
    return total / total.sum()


def describe(p, tau, source, target):
    return bound.describe(*(bound.pixel_terms(*domain, p, tau) for domain in (source, target)), p, tau)


def effective_sample_size(weight):
    return (weight.sum() ** 2 / (weight ** 2).sum()).item()


# ------------------------------------------------------------------------------------------------ Eq. 8 to 11, 25


def test_score_loss_is_the_formula_in_plain_loops_and_the_alignment_loss_of_eq_3():
    g = rng(1)
    p, emb, weight = units(g, 5, 8).float(), units(g, 2, 3, 4, 8).float(), torch.rand(2, 3, 4, generator=g)
    label = torch.randint(0, 5, (2, 3, 4), generator=g)
    label[0, 0] = VOID
    loss = bound.score_loss(emb.flatten(0, 2), label.flatten(), p, 0.3)
    for z, y, value in zip(emb.flatten(0, 2), label.flatten().tolist(), loss.tolist()):
        expected = 0 if y == VOID else math.log(sum(math.exp(float(z @ (p[c] - p[y])) / 0.3) for c in range(5)))
        assert value == pytest.approx(expected, abs=1e-5)
    valid = (label != VOID).flatten()
    expected = align.alignment_loss(emb.permute(0, 3, 1, 2), label, p, 0.3, weight).item()
    assert mean(loss[valid], weight.flatten()[valid]) == pytest.approx(expected, rel=1e-5)


@for_random_draws
def test_what_holds_for_every_single_pixel(g, p, tau):
    emb, label = random_domain(g, p)
    other, basis = units(g, *emb.shape), bound.span_basis(p)
    (hub, flat), steep = (x[label] for x in bound.hub_terms(p, tau)), bound.lipschitz_per_class(p, tau)[label]
    loss, local = bound.score_loss(emb, label, p, tau), bound.local_slope(emb, label, p, tau)
    way, along, rise = distance(emb, label, p), distance(emb @ basis, label, p @ basis), loss - hub
    yield "Eq. 8: a wrong pixel's loss is at least log 2", math.log(2) * ((emb @ p.T).argmax(1) != label), loss
    yield "Eq. 8: no loss exceeds the ceiling", loss, bound.loss_ceiling(p, tau)
    yield "Eq. 9", (loss - bound.score_loss(other, label, p, tau)).abs(), steep * (emb - other).norm(dim=1)
    yield "Eq. 9 at a point", local, (1 - torch.exp(-loss)) * steep
    yield "Eq. 10 upwards", rise, steep * way
    yield "Eq. 10 downwards", -rise, flat * way
    yield "Eq. 10, the loss at the hub", hub, math.log(len(p))
    yield "Eq. 10, it is not negative", 0, hub
    yield "Eq. 10, the slope at the hub", flat, (1 - torch.exp(-hub)) * steep
    yield "Eq. 11", rise, steep * along
    yield "Eq. 11, the visible part", along, way
    yield "Eq. 25", rise, local * along
    unseen = 2 * torch.randn(emb.shape, generator=g, dtype=torch.float64)
    moved = bound.score_loss(emb + unseen - unseen @ basis @ basis.T, label, p, tau)
    yield "Eq. 11, what is orthogonal to all differences", (moved - loss).abs(), 1e-7
    yield "Eq. 11, the basis is orthonormal", (basis.T @ basis - torch.eye(basis.shape[1])).abs(), 0
    yield "Eq. 11, its size", basis.shape[1], len(p) - 1


def slope(z, y, p, tau):
    z = z.clone().requires_grad_()
    bound.score_loss(z[None], torch.tensor([y]), p, tau).sum().backward()
    return z.grad.norm().item()


@for_random_draws
def test_slopes_are_those_of_autograd_and_approach_the_constant_far_out_towards_the_farthest_rival(g, p, tau):
    y, z = int(torch.randint(0, len(p), (1,), generator=g)), uniform(g, 0, 3) * units(g, p.shape[1])
    label, steep, at_hub = torch.tensor([y]), bound.lipschitz_per_class(p, tau)[y].item(), bound.hub_terms(p, tau)[1][y]
    yield "ceiling", bound.loss_ceiling(p, tau), max(math.log(sum(math.exp(float((c - q).norm()) / tau) for c in p)) for q in p)
    yield "Eq. 9", abs(steep - max(float((c - p[y]).norm()) for c in p) / tau), 0
    yield "Eq. 10", abs(slope(p[y], y, p, tau) - at_hub), 0
    yield "Eq. 25", abs(slope(z, y, p, tau) - bound.local_slope(z[None], label, p, tau)), 0
    far = p[(p - p[y]).norm(dim=1).argmax()]
    gap = (1 - p @ far).sort().values[1].item()  # how clearly `far` wins along its own direction
    yield "Eq. 9 is sharp", 0.999 * steep, slope(40 * tau / gap * far, y, p, tau)


def test_smaller_constants_fail():
    tau, label = 0.1, torch.tensor([0])  # a pixel of class 0 on the prototype of class 1
    rise = risk(OPPOSITE[1:], label, OPPOSITE, tau) - bound.hub_terms(OPPOSITE, tau)[0][0].item()
    assert 2 * bound.lipschitz_per_class(OPPOSITE, 1.0)[0] < rise  # Eq. 9: the temperature belongs to it
    assert bound.hub_terms(OPPOSITE, tau)[1][0] * 2 < rise  # Eq. 10: the slope at the hub is for the way down alone
    assert bound.local_slope(OPPOSITE[:1], label, OPPOSITE, tau) * 2 < rise  # Eq. 25: the slope where another pixel stands
    assert rise <= bound.local_slope(OPPOSITE[1:], label, OPPOSITE, tau) * 2
    p, rest = torch.eye(3).double(), torch.tensor([[1.0], [1.0], [-2.0]]).double() / 6 ** 0.5  # Eq. 11, without p_1 - p_0
    rise = risk(p[1:2], label, p, tau) - bound.hub_terms(p, tau)[0][0]
    for basis, enough in ((rest, False), (bound.span_basis(p), True)):
        assert bool(rise <= bound.lipschitz_per_class(p, tau)[0] * distance(p[1:2] @ basis, label, p @ basis)) is enough
    for small, size in ((0.6e-6, 1), (1.5e-6, 2)):  # a direction is one from a millionth of the largest on; below is rounding
        assert bound.span_basis(torch.tensor([[0, 0], [1, 0], [0, small]], dtype=torch.float64)).shape == (2, size)


def test_the_loss_has_one_minimum_beyond_the_prototype_and_away_from_its_competitors():
    """Descent on the sphere from two starts ends where theory.md says, and no other unit vector has a smaller loss."""
    for seed in range(20):
        g = rng(seed)
        k, tau = int(torch.randint(2, 7, (1,), generator=g)), uniform(g, 0.2, 1)
        p, z, label = units(g, k, 6), units(g, 2, k, 6), torch.arange(k)
        for _ in range(1000):
            compete = (z @ p.T / tau).masked_fill(torch.eye(k).bool(), -math.inf).softmax(dim=2)
            away = p - compete @ p  # the gradient but for its sign and a factor
            z = F.normalize(z + tau * away, dim=2)
        assert torch.allclose(z, F.normalize(away, dim=2), atol=1e-9) and torch.allclose(z[0], z[1], atol=1e-9)
        least = bound.score_loss(z[0], label, p, tau)
        assert (least < bound.hub_terms(p, tau)[0]).all(), "the prototype itself is not the minimum"
        assert all((least <= bound.score_loss(units(g, k, 6), label, p, tau)).all() for _ in range(100))
        if k == 2:
            assert (z[0] * p).sum(dim=1).tolist() == pytest.approx([((1 - p[0] @ p[1]).item() / 2) ** 0.5] * 2)
    assert round(math.degrees(math.acos(((1 - 0.8) / 2) ** 0.5))) == 72


# --------------------------------------------------------------------------------------------------------- Eq. 12 to 17


@for_random_draws
def test_both_bounds_hold_and_the_direct_one_is_never_larger(g, p, tau):
    source, (emb, label) = random_domain(g, p[:-1]), random_domain(g, p)
    label[0] = len(p) - 1  # a class that only the target has
    row = describe(p, tau, source, (emb, label))
    yield "the left side", abs(row["left"] - risk(emb, label, p, tau)), 0
    yield "Eq. 25", row["left"], row["right_local"]
    yield "Eq. 13", row["right_local"], row["right_direct"]
    yield "Eq. 12", row["right_direct"], row["right"]
    yield "the column", not row["holds"], False


def test_the_hub_bound_is_an_equality_for_pixels_that_have_arrived_and_fails_without_the_term_of_the_class_shares():
    p = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64), dim=1)
    hub = bound.hub_terms(p, 0.2)[0]
    for a, b in itertools.product(range(3), repeat=2):  # the source is of class a alone, the target of class b
        row = describe(p, 0.2, *((p[c].expand(4, 3), torch.full((4,), c)) for c in (a, b)))
        assert row["osc"] == pytest.approx(abs(hub[a] - hub[b]).item()), "over the classes that occur in either domain"
        assert row["tv"] == (a != b) and row["holds"] and row["vacuous"] is False
        assert row["left"] == pytest.approx(row["right_direct"], abs=1e-12)
        if hub[b] >= hub[a]:
            assert row["left"] == pytest.approx(row["right"], abs=1e-12)
    assert hub.max() - hub.min() > 0.1


def test_without_a_common_hub_the_bound_fails():
    """Prototypes of each domain's own: all radii are 0, and the target is as wrong as can be."""
    p, tau, label = torch.eye(4).double(), 0.1, torch.arange(4)
    emb = p.roll(1, 0)  # the target's pixels of each class sit where another class's prototype is
    assert radius(p, label, p) == radius(emb, label, emb) == 0
    assert risk(emb, label, p, tau) > risk(p, label, p, tau) + 5
    assert describe(p, tau, (p, label), (emb, label))["holds"]  # with the common hub it holds


def wasserstein(a, b):
    """W_1 between two uniform distributions on equally many points: the best of all pairings (Birkhoff's theorem)."""
    cost = (a[:, None] - b).norm(dim=2).numpy()
    pairings = np.array(list(itertools.permutations(range(len(a)))))
    return float(cost[np.arange(len(a)), pairings].sum(1).min()) / len(a)


@for_random_draws
def test_reach_bounds_radius_and_risk_of_an_unseen_target(g, p, tau):
    """Two sources; S* mixes them 1:1 or takes one; target anywhere; one class, since Eq. 14 is a mean over classes."""
    y = int(torch.randint(0, len(p), (1,), generator=g))
    first, second, target = (F.normalize(p[y] + uniform(g, 0, 2) * units(g, n, p.shape[1]), dim=1) for n in (3, 3, 6))
    hull = torch.cat([first, second]) if uniform(g, 0, 1) < 0.5 else first.repeat(2, 1)
    reach, label, steep = wasserstein(target, hull), torch.full((6,), y), bound.lipschitz_per_class(p, tau)[y]
    far, near = radius(target, label, p), radius(hull, label, p)
    yield "Eq. 14, radius", far, near + reach
    yield "Eq. 14, risk", risk(target, label, p, tau), risk(hull, label, p, tau) + steep * reach
    yield "Eq. 15, above", reach, far + near
    yield "Eq. 15, loss", abs(risk(target, label, p, tau) - risk(hull, label, p, tau)) / steep, reach
    yield "Eq. 15, means", (target.mean(0) - hull.mean(0)).norm(), reach


def legs(otp, goal, emb, label, tau):
    """Of the pixels of one image with its goal: (to OTP, to goal, debt, largest debt of a class, loss at OTP, at goal)."""
    far, near, debt = distance(emb, label, otp), distance(emb, label, goal), distance(goal[label], label, otp)
    losses = (bound.score_loss(emb, label, prototypes, tau) for prototypes in (otp, goal))
    return far, near, debt, (goal - otp).norm(dim=1).max(), *losses


@for_random_draws
def test_the_debt_of_a_goal_on_the_arc(g, otp, tau):
    lam, images = uniform(g, 0, 1), []
    for _ in range(3):  # each image has its own VTP
        vtp = F.normalize(otp + uniform(g, 0, 2) * units(g, *otp.shape), dim=1)
        goal, half = (align.goal(otp, vtp[None], share)[0] for share in (lam, 0.5))
        gap, debt, middle = ((x - otp).norm(dim=1) for x in (vtp, goal, half))
        length = ((1 - lam) * vtp + lam * otp).norm(dim=1)
        yield "Eq. 16, length", (length ** 2 - 1 + lam * (1 - lam) * gap ** 2).abs(), 0
        yield "Eq. 16, arc", debt, torch.minimum((1 - lam) / length, torch.ones(())) * gap
        yield "Eq. 16, the whole gap", debt, gap
        yield "half way, from below", gap / 2, middle
        yield "half way, from above", middle, gap / 2 ** 0.5
        images.append([x.mean().item() for x in legs(otp, goal, *random_domain(g, otp, n=10), tau)])
    far, near, debt, widest, risk_far, risk_near = np.mean(images, axis=0)
    yield "Eq. 16", far, near + debt
    yield "Eq. 17", risk_far, risk_near + (debt + widest) / tau


def test_two_legs_are_an_equality_on_the_goal_and_fail_with_that_of_another_image_or_without_the_temperature():
    g, label = rng(5), torch.arange(4)
    otp, vtp = units(g, 4, 6), units(g, 4, 6)
    far, near, debt, *_ = legs(otp, vtp, vtp, label, 0.1)
    assert torch.equal(far, debt) and near.max() == 0
    otp, vtp, label = OPPOSITE, -OPPOSITE, label[:1]  # the pixel stands on the VTP of class 0, which is the OTP of class 1
    far, near, debt, widest, risk_far, risk_near = legs(otp, vtp, vtp[:1], label, 0.05)
    assert far > near + distance(otp[label], label, otp) + 1  # the debt of an image whose VTP is its OTP
    assert debt + widest < risk_far - risk_near <= (debt + widest) / 0.05


@pytest.mark.parametrize("name, owed", [("otp-to-vtp", 1), ("vtp", 1), ("vtp-to-otp", 0), ("otp", 0)])
def test_debt_at_the_end_of_each_schedule_is_that_of_the_text(name, owed):
    """In parts of the gap, for a VTP at a right angle to its OTP."""
    otp, vtp = torch.eye(2, dtype=torch.float64)[:1], torch.eye(2, dtype=torch.float64)[None, 1:]
    goal = align.goal(otp, vtp, align.SCHEDULES[name](align.progress(100, 100, 0.05, 0.3)))
    assert ((goal - otp).norm() / (vtp - otp).norm()).item() == pytest.approx(owed, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- Eq. 18 to 24


def weights_of(score, label, place, ramp):
    """(omega, w) of Eq. 5 and 6 as reweight.py computes them, for scores (N, K) and places (N,) of whatever reliability."""
    omega = reweight.reliability(score.T[None, :, None], label[None, None])
    return omega[0, 0], reweight.learning_weights(omega, place[None, None], label[None, None], ramp)[0, 0].double()


@for_random_draws
def test_what_weights_do_to_a_mean(g, p, tau):
    emb, label = random_domain(g, p)
    k, ramp, loss = len(p), uniform(g, 0, 1), bound.score_loss(emb, label, p, tau)
    omega, step = weights_of(emb @ p.T / tau, label, torch.rand(len(label), generator=g), ramp)
    yield "Eq. 19, margin", (omega.log() + loss + (emb @ p.T / tau).log_softmax(1).amax(1)).abs(), 1e-5
    decoder, b = 5 * torch.randn(len(label), k, generator=g, dtype=torch.float64), uniform(g, 0, 1)
    both = weights_of((1 - b) * decoder + b * emb @ p.T / tau, label, omega, 1.0)[0]
    alone = weights_of(decoder, label, omega, 1.0)[0]
    yield "Eq. 19, both margins", -both.log(), -(1 - b) * alone.log() - b * omega.log() + 1e-5  # omega is float32
    for w in (step, torch.rand(len(label), generator=g).double()):
        for f in (distance(emb, label, p), loss):
            w_y, f_y, wf_y = (by_class(x, label, k) for x in (w, f, w * f))
            total = (shares(label, k) * (wf_y - w_y * f_y + (w_y - mean(w)) * f_y)).sum() / mean(w)
            yield "Eq. 18", abs(mean(f, w) - mean(f) - total), 0
    doubtful = step < 1
    if theta := mean(doubtful.double()):
        change = ramp * theta / (1 - ramp * theta)
        for f in (distance(emb, label, p), loss):
            yield "Eq. 18, steps", abs(mean(f, step) - mean(f) + change * (mean(f[doubtful]) - mean(f))), 0
        yield "Eq. 19, pixel", math.log(5), loss[doubtful]
        yield "Eq. 19", change * (math.log(5) - mean(loss)), mean(loss) - mean(loss, step)


def test_what_breaks_eq_18_and_19():
    far, label, w = (torch.tensor(x) for x in ([0.1, 0.2, 1.2, 1.3], [0, 0, 1, 1], [0.2, 0.1, 1.0, 0.9]))
    assert mean(far, w) > mean(far) + 0.1  # a weight that falls inside every class, and moves the shares
    p, tau, label = torch.eye(2).double(), 0.5, torch.zeros(2, dtype=torch.long)
    emb = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64), dim=1)  # arrived, half way
    decoder = torch.tensor([[0.0, 9.0], [9.0, 0.0]], dtype=torch.float64)  # doubts the better one
    w = weights_of((emb @ p.T / tau + decoder) / 2, label, torch.zeros(2), 1.0)[1]
    assert w.tolist() == [0, 1] and risk(emb, label, p, tau) < math.log(5)
    assert risk(emb, label, p, tau, w) > risk(emb, label, p, tau) + 0.1


def harmful_terms(clean, harmful, target, w_clean, w_harmful):
    """(W_1 from target to weighted source, reach, clean mass lost, harmful mass left); weights are whole numbers, 6 in all."""
    w_clean, w_harmful = torch.tensor(w_clean), torch.tensor(w_harmful, dtype=torch.long)
    source = torch.cat([clean.repeat_interleave(w_clean, 0), harmful.repeat_interleave(w_harmful, 0)])
    lost = 1 - w_clean.double().mean().item() / max(w_clean.max(), *w_harmful.tolist(), 0).item()  # the largest weight is 1
    return wasserstein(target, source), wasserstein(target, clean.repeat(6 // len(clean), 1)), lost, w_harmful.sum().item() / 6


@for_random_draws
def test_reach_of_a_contaminated_source_under_weights(g, p, tau):
    cases = [((3, 2), (1,)), ((2, 2), (2,)), ((1, 4), (1,)), ((5, 0), (1,)), ((3, 3), (0,)), ((0, 4), (2,)),
             ((2, 2, 0), (2, 0, 0)), ((2, 2, 2), (0, 0, 0)), ((2, 2, 0), (0, 2, 0))]  # the last ones are steps
    w_clean, w_harmful = cases[int(torch.randint(0, 9, (1,), generator=g))]
    clean, harmful = units(g, len(w_clean), 4), units(g, len(w_harmful), 4)
    for target in (units(g, 6, 4), clean.repeat(6 // len(clean), 1)):  # reach = 0: what weights and contamination do is left
        w1, reach, lost, left_over = harmful_terms(clean, harmful, target, w_clean, w_harmful)
        yield "Eq. 20", w1, reach + 2 * max(lost, left_over)
    eta, a, b = uniform(g, 0.01, 0.99), uniform(g, 0, 0.98), uniform(g, 0, 1)  # removed of the clean and of the harmful ones
    after = eta * (1 - b) / ((1 - eta) * (1 - a) + eta * (1 - b))
    yield "what a step takes", abs(eta - after - eta * (1 - eta) * (b - a) / (1 - a - eta * (b - a))), 0
    yield "it pays if and only if", ((max(a, after) < eta) != (b > a and a < eta)), False


def test_harmful_reach_is_an_equality_for_opposite_points_and_fails_without_either_term():
    clean = OPPOSITE[:1]
    w1, reach, lost, left_over = harmful_terms(clean, -clean, clean.repeat(6, 1), [3], [3])
    assert reach == lost == 0 and w1 == pytest.approx(2 * left_over) and w1 == 1  # fails without the harmful term
    w1, reach, lost, left_over = harmful_terms(OPPOSITE, clean, OPPOSITE.repeat(3, 1), [6, 0], [0])  # hard but clean
    assert reach == left_over == 0 and w1 == pytest.approx(2 * lost) and w1 == 1  # ... and without the clean mass lost


@for_random_draws
def test_class_shares_under_weights(g, p, tau):
    k, (emb, label), target = len(p), random_domain(g, p), random_domain(g, p)
    before, loss, share_t = shares(label, k), bound.score_loss(emb, label, p, tau), random_shares(g, shares(label, k) > 0)
    for w in (torch.rand(len(label), generator=g).double(), (torch.rand(len(label), generator=g) < 0.5).double()):
        w[0] = 1.0
        after, w_y = shares(label, k, w), by_class(w, label, k)
        shift = bound.total_variation(after, before)
        yield "Eq. 21, shift", abs(shift - 0.5 * (before * (w_y / mean(w) - 1).abs()).sum()), 0
        yield "Eq. 21, no more than what was taken", shift, 1 - mean(w)
        risks, present = (by_class(w * loss, label, k) / w_y).nan_to_num(0.0), after > 0
        ratio = (share_t / after)[present].max().item()
        yield "Eq. 21, ratio", (share_t * risks)[present].sum(), ratio * mean(loss, w)
        weighted = dict(bound.pixel_terms(emb, label, p, tau), mass=w)
        row = bound.describe(weighted, bound.pixel_terms(*target, p, tau), p, tau)
        tv = bound.total_variation(before, shares(target[1], k)) + shift
        yield "Eq. 12 from the weighted source", row["left"], row["right"]
        yield "the price of the shift", row["right"], row["right"] + row["osc"] * (tv - row["tv"])


def test_a_ratio_of_shares_that_forgets_the_weights_fails():
    """A starved class: training's risk is small, the target's is not, and the unweighted ratio does not see it."""
    p, tau, label = torch.eye(2).double(), 0.1, torch.tensor([0] * 9 + [1])
    emb, w = p[[0] * 10], torch.tensor([1.0] * 9 + [0.05], dtype=torch.float64)  # class 1 lies on class 0's place
    wanted, training = risk(emb, label, p, tau), risk(emb, label, p, tau, w)  # the target has the shares of the source
    assert wanted > 5 * training  # rho = 1 without weights
    assert wanted <= (shares(label, 2) / shares(label, 2, w)).max().item() * training + TOL
    w[-1] = 0  # the whole class is gone: Eq. 21 is an equality
    assert bound.total_variation(shares(label, 2, w), shares(label, 2)) == pytest.approx(1 - mean(w))


def test_effective_sample_size_against_a_simulation():
    g = rng(7)
    for spread in (0.0, 0.5, 2.0):
        w = torch.exp(spread * torch.randn(200, generator=g, dtype=torch.float64))
        sample = torch.randn(10000, 200, generator=g, dtype=torch.float64)
        assert 1 / ((sample @ w) / w.sum()).var().item() == pytest.approx(effective_sample_size(w), rel=0.06)
        step = (w > 1).double() if spread else w
        assert effective_sample_size(step) == pytest.approx(step.sum().item()), "what is kept"


def test_counting_pixels_as_independent_breaks_the_coverage():
    """Ratio of random sums over 30 images whose pixels all agree: the mean 1/2 is missed by less than delta = 0.05 of the runs."""
    g = rng(8)
    weight = 50 * torch.rand(4000, 30, generator=g, dtype=torch.float64)  # of each image in all, at most 50
    value = (torch.rand(4000, 30, generator=g) < 0.5).double()
    short = 0.5 - (weight * value).sum(1) / weight.sum(1)
    n, kish = weight.sum(1) ** 2 / (30 * 50 ** 2), weight.sum(1) ** 2 / (weight ** 2).sum(1)
    assert (n <= kish + TOL).all() and (kish <= 30 + TOL).all()
    term, pixels = (torch.sqrt(math.log(1 / 0.05) / (2 * size)) for size in (n, weight.sum(1)))
    assert (short > term).double().mean() <= 0.05 and term.mean() < 0.5, "a term that covers everything would prove nothing"
    assert (short > pixels).double().mean() > 5 * 0.05


@for_random_draws
def test_the_whole_chain_on_finite_domains(g, p, tau):
    k, (emb, label) = len(p), random_domain(g, p)
    w = (torch.rand(len(label), generator=g) < 0.8).double().clamp_min(uniform(g, 0.1, 1))
    moved = F.normalize(emb + uniform(g, 0, 1) * units(g, *emb.shape), dim=1)
    loss, w_y = bound.score_loss(moved, label, p, tau), by_class(w, label, k).clamp_min(TOL)
    reach = by_class(w * (moved - emb).norm(dim=1), label, k) / w_y  # one coupling, hence at least W_1
    share_s, share_t = shares(label, k, w), random_shares(g, shares(label, k) > 0)
    left = (share_t * by_class(w * loss, label, k) / w_y).sum()
    rho, paid = (share_t / share_s)[share_s > 0].max(), (share_t * bound.lipschitz_per_class(p, tau) * reach).sum()
    yield "Eq. 24", left, rho * risk(emb, label, p, tau, w) + paid


def test_rank_correlation_with_a_tie():
    assert bound.rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)


# ------------------------------------------------------------------------------------------- the measurement of a run

SIZES = [(24, 40), (21, 35), (16, 16), (24, 40), (8, 24)]  # some are no multiple of the stride, the last one is all void
K = 6


class Tiny(torch.nn.Module):
    """Stands for PPAR: stride 4, logits and embeddings that depend on the image alone, with VTP or without."""

    def __init__(self):
        super().__init__()
        self.decoder, self.conv, self.asks_vtp = torch.nn.Conv2d(3, K, 4, stride=4), torch.nn.Conv2d(3, 10, 4, stride=4), True
        self.otp = F.normalize(torch.randn(K, 10), dim=1)
        self.net = SimpleNamespace(encoder=SimpleNamespace(multiple=8))

    def forward(self, image):
        emb = F.normalize(self.conv(image), dim=1)
        vtp = F.normalize(self.otp + 0.5 * F.normalize(emb.mean((2, 3)), dim=1)[:, None], dim=-1)
        return ppar.Output(self.decoder(image), emb, *((vtp, emb.roll(1, dims=1)) if self.asks_vtp else ()))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """(a Run, five small images of its source, what was read); only reading files is replaced."""
    calls = []

    def list_items(name, root, split, holdout=0, harmful=0.0):
        if name == "no-val" and split == "val":
            raise data.UserError("no-val has no val split")
        calls.append((name, split, holdout, harmful))
        return [SimpleNamespace(dataset=name, number=i + 10 * (split == "val")) for i in range(len(SIZES))]

    def load_pair(item, mapillary):
        assert mapillary == "B"
        (h, w), draw = SIZES[item.number % 10], np.random.default_rng([item.number, len(item.dataset)])
        label = draw.integers(0, K - 1, (h, w)).astype(np.uint8)  # class K - 1 is absent
        label[:, :w if item.number % 10 == 4 else w // 5] = VOID
        return draw.integers(0, 256, (h, w, 3)).astype(np.uint8), label

    monkeypatch.setattr(data, "list_items", list_items)
    monkeypatch.setattr(data, "load_pair", load_pair)
    torch.manual_seed(4)
    config = SimpleNamespace(source=["src"], targets=["far"], data_root="unused", tau=0.1, seed=0, holdout=3, harmful=0.2,
                             reweight=True, judge_text=0.3, text_weight=0.3, method="ppar", mapillary="B", out=str(tmp_path),
                             amp="fp32")
    return checkpoint.Run(Tiny(), config, 7, tmp_path), list_items("src", "", "train"), calls


def weights_by_hand(score, label):
    """Eq. 5 and 6 at the centres of the 4 x 4 cells, pixel by pixel: score (K, H, W), label (H, W)."""
    ratio, weight = score.softmax(0) / score.softmax(0).amax(0), []
    omega = torch.tensor([[ratio[c, i, j] if c != VOID else math.nan for j, c in enumerate(row)] for i, row in enumerate(label.tolist())])
    for i, j in itertools.product(range(2, len(label), 4), range(2, label.shape[1], 4)):
        place = omega[max(i - 4, 0):i + 5, max(j - 4, 0):j + 5].nanmean()
        weight.append(0.0 if omega[i, j] < 0.2 and place < 0.5 else 1.0)
    return torch.tensor(weight)


def by_hand(run, items):
    """All labelled pixels at once: emb (N, D), label (N,), VTP of the pixel's image (N, K, D), weight (N,)."""
    parts = []
    for item in items:
        image, label = data.load_pair(item, "B")
        h, w = label.shape
        image = F.pad(data.to_tensor(image)[None], (0, -w % 8, 0, -h % 8), mode="replicate")
        label = F.pad(torch.as_tensor(label).long(), (0, -w % 8, 0, -h % 8), value=VOID)
        with torch.no_grad():
            logits, emb, vtp, clip_emb = run.ppar(image)
        score = 0.7 * logits + 0.3 * torch.einsum("kd,bdhw->bkhw", run.ppar.otp, clip_emb) / 0.1
        weight = weights_by_hand(score[0].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2), label)
        label = label[2::4, 2::4].flatten()  # the centre of a 4 x 4 cell, by hand
        emb, weight, label = emb[0].flatten(1).T[label != VOID], weight[label != VOID], label[label != VOID]
        parts.append((emb, label, vtp.expand(len(label), -1, -1), weight))
    return [torch.cat(x) for x in zip(*parts)]


def test_the_terms_are_those_of_all_pixels_at_once(tiny):
    run, items, _ = tiny
    domain, (emb, label, vtp, _), otp, tau = bound.measure(run, items, 0), by_hand(run, items), run.ppar.otp, 0.1
    own, hub = vtp[torch.arange(len(label)), label], bound.hub_terms(otp, tau)[0][label]
    along = distance(emb @ bound.span_basis(otp), label, otp @ bound.span_basis(otp))
    steep = torch.tensor([slope(z, y, otp, tau) for z, y in zip(emb, label.tolist())])
    expected = dict(left=risk(emb, label, otp, tau), radius_otp=radius(emb, label, otp), radius_span=mean(along),
                    radius_vtp=mean((emb - own).norm(dim=1)), gap=mean((own - otp[label]).norm(dim=1)),
                    error=mean(((emb @ otp.T).argmax(1) != label).float()), right_local=mean(hub + steep * along),
                    right_direct=mean(hub + bound.lipschitz_per_class(otp, tau)[label] * along),
                    slope_measured=(risk(emb, label, otp, tau) - mean(hub)) / radius(emb, label, otp),
                    images=4, pixels=len(label), n_eff=len(label))
    row = bound.describe(domain, domain, otp, tau)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(bound.shares(domain, K), shares(label, K))


def test_weighted_terms_are_those_of_the_weights_of_training(tiny):
    run, items, _ = tiny
    (emb, label, _, w), otp = by_hand(run, items), run.ppar.otp
    domain = bound.measure(run, items, 0, weights=True)
    row = bound.describe(domain, domain, otp, 0.1)
    assert 0.1 < mean(w) < 0.9, "some are kept, some are not"
    expected = dict(n_eff=w.sum().item(), radius_weighted=radius(emb, label, otp, w), risk_weighted=risk(emb, label, otp, 0.1, w),
                    share_shift=bound.total_variation(shares(label, K), shares(label, K, w)))
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert torch.equal(domain["weight"], w) and 0.01 < row["share_shift"] <= 1 - mean(w) and row["holds"]


def test_limit_takes_evenly_spaced_images_and_a_domain_of_void_is_refused_with_its_name(tiny):
    run, items, _ = tiny
    assert torch.equal(bound.measure(run, items, 2)["left"], bound.measure(run, [items[0], items[2]], 0)["left"])
    with pytest.raises(data.UserError, match="src.*labelled pixel"):
        bound.measure(run, items[4:], 0)


def test_sources_are_mixed_in_equal_parts_whatever_their_size(tiny):
    run, items, _ = tiny
    parts = bound.measure(run, items[:1], 0), bound.measure(run, items[1:4], 0)
    mixed = bound.mixture(parts)
    row = bound.describe(mixed, mixed, run.ppar.otp, 0.1)
    assert row["left"] == pytest.approx(sum(bound.mean(d, "left") for d in parts) / 2) and row["images"] == 4
    assert torch.allclose(bound.shares(mixed, K), sum(bound.shares(d, K) for d in parts) / 2)
    assert row["n_eff"] == pytest.approx(4 / sum(1 / len(d["label"]) for d in parts), rel=1e-5)


@pytest.mark.parametrize("source", [["src"], ["src", "src-b"], ["no-val"]])
@pytest.mark.parametrize("method", ["ppar", "erm"])
def test_measuring_a_run_writes_every_term_and_finds_no_violation(tiny, capsys, source, method):
    run, _, calls = tiny
    vars(run.config).update(source=source, targets=["far", "src-c", "other"], method=method)
    if method == "erm":
        run.ppar.asks_vtp, run.config.reweight = False, False
    before = {name: value.clone() for name, value in run.ppar.state_dict().items()}
    report = bound.measure_run(run)
    stored, said = json.loads((run.path / "bound.json").read_text()), capsys.readouterr().out
    assert stored == report
    held_out, first = source != ["no-val"], stored["domains"]["source"]
    assert list(stored["domains"]) == ["source", *["source held out"] * held_out, *run.config.targets]
    assert ("no held-out source row" in said) is not held_out
    shown = ("analysis only", "rank correlation", "over the 3 targets", "every inequality holds: yes", *(f"\n{key} " for key in first))
    assert all(text in said for text in shown)
    val = [(name, "val", 3, 0.0) for name in source * held_out + run.config.targets]
    assert calls[1:] == [(name, "train", 3, 0.2) for name in source] + val, "read as the run was configured"
    for name, row in stored["domains"].items():
        assert row["holds"] is True and row["left"] <= row["right_local"] <= row["right_direct"] <= row["right"]
        source_side, shift = first["left"] + row["slope"] * first["radius_otp"], row["osc"] * row["tv"]
        assert row["right"] == pytest.approx(source_side + row["lipschitz"] * row["radius_otp"] + shift), "read off the columns"
        assert row["vacuous"] is True, "random pixels, at random places"
        assert ("radius_vtp" in row) == ("gap" in row) == (method == "ppar")
        assert ("radius_weighted" in row) == (method == "ppar" and name == "source"), "weights belong to training data"
        assert all(f"{row[key]:.3f}" in said for key in ("left", "right", "radius_otp", "tv"))
    assert first["tv"] == 0 and (first["n_eff"] < 0.99 * first["pixels"]) is (method == "ppar")
    assert all(torch.equal(value, before[name]) for name, value in run.ppar.state_dict().items())


def test_bars_of_the_figure_add_up_to_the_right_side_and_to_the_two_legs_and_marks_are_the_columns(tiny, monkeypatch):
    import bound_figure
    drawn, report = [], bound.measure_run(tiny[0], 2)
    monkeypatch.setattr(bound_figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    bound_figure.draw(report, tiny[0].path / "bound.png")
    rows = report["domains"].values()
    assert drawn[0].get_size_inches().tolist() == [13, 2.2 + 0.5 * len(rows)]  # half an inch for each bar
    for axis, sums, marks in zip(drawn[0].axes, (("right",), ("radius_vtp", "gap")),
                                 (("left", "right_direct", "right_local", "ceiling"), ("radius_otp", "radius_span")), strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in axis.containers[-1]]  # of the last part, which begins where the others end
        assert ends == pytest.approx([sum(row[name] for name in sums) for row in rows], rel=1e-5)
        assert [[*line.get_xdata()] for line in axis.lines] == [[row[name] for row in rows] for name in marks]


def test_a_violation_is_reported_and_not_hidden(tiny, capsys, monkeypatch):
    """If a right side came out a little too small, `holds` would say so: the check itself can fail."""
    run, items, _ = tiny
    domain = bound.measure(run, items, 0)
    right = domain["mass"] * bound.describe(domain, domain, run.ppar.otp, 0.1)["right"]
    for name, value in dict(left=domain["right_local"], right_local=domain["right_direct"], right_direct=right,
                            radius_otp=domain["radius_vtp"] + domain["gap"]).items():
        slack = 1e-5 * max(1, bound.mean(dict(domain, value=value), "value"))  # for the rounding of float32
        rows = [bound.describe(domain, dict(domain, **{name: value.double() + x * slack}), run.ppar.otp, 0.1) for x in (0.9, 1.1)]
        assert [row["holds"] for row in rows] == [True, False], name
    monkeypatch.setattr(bound, "hub_bound", lambda *terms: 0.0)
    rows = bound.measure_run(run, 2)["domains"].values()
    assert all(row["holds"] is False and row["images"] == 2 for row in rows)
    assert "NO: a bug" in capsys.readouterr().out


def test_the_command_thins_evenly_by_a_flag_and_shows_a_bar_for_each_domain(tiny, capsys):
    run, items, _ = tiny
    assert bound.parse(["RUN"]).limit == 200 and bound.parse(["RUN", "--limit", "0"]).limit == 0
    for limit, images in ((2, 2), (0, 4), (9, 4)):  # the fifth picture is all void
        rows = bound.measure_run(run, limit)["domains"].values()
        assert {row["images"] for row in rows} == {images}
        said = capsys.readouterr().err
        assert all(f"{name}: 100%" in said for name in ("src", "src held out", "far"))
    with pytest.raises(data.UserError, match="--limit -1"):
        bound.measure_run(run, -1)
    bound.measure(run, items, 1)
    assert capsys.readouterr().err == ""  # a library call is silent


def test_a_signal_and_memory_that_runs_out_end_the_measurement_in_a_sentence_and_leave_the_report_of_before(tiny, monkeypatch):
    run, _, _ = tiny
    (run.path / "bound.json").write_text("of before")
    for trouble, words in ((lambda: os.kill(os.getpid(), signal.SIGTERM), "stopped by a signal: .* has not been changed"),
                           (lambda: torch.empty(2 ** 60, dtype=torch.uint8), "out of memory: .* --limit N")):
        monkeypatch.setattr(ppar, "look", lambda *words, trouble=trouble: trouble())
        with pytest.raises(data.UserError, match=words):
            bound.measure_run(run)
        assert (run.path / "bound.json").read_text() == "of before"


def test_the_terms_are_measured_with_the_precision_of_the_run(tiny, monkeypatch):
    run, items, _ = tiny
    seen, look = [], ppar.look
    monkeypatch.setattr(ppar, "look", lambda *words: seen.append(torch.is_autocast_enabled("cpu")) or look(*words))
    for run.config.amp in ("fp32", "bf16"):
        bound.measure(run, items, 1)
    assert seen == [False, True]
