"""Every statement of theory.md from Eq. 8 on: attacked with random finite domains, brought to equality where it can be,
and broken by dropping one of its assumptions, so that the test shows what the assumption is for.

A finite set of pixels is a domain, so the inequalities must hold for it exactly; tolerances are for rounding alone.
"""

import itertools
import json
import math
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
                assert (torch.as_tensor(small) <= torch.as_tensor(large) + TOL).all(), f"{name}, seed {seed}"
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


def constant(p, tau):
    """L of Eq. 9."""
    return bound.lipschitz_per_class(p, tau).max().item()


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
    yield "Eq. 23, the length of f's interval", rise + flat * way, 2 * (steep + flat)
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
    yield "Eq. 9", abs(steep - max(float((c - p[y]).norm()) for c in p) / tau), 0
    yield "Eq. 10", abs(slope(p[y], y, p, tau) - at_hub), 0
    yield "Eq. 25", abs(slope(z, y, p, tau) - bound.local_slope(z[None], label, p, tau)), 0
    far = p[(p - p[y]).norm(dim=1).argmax()]
    gap = (1 - p @ far).sort().values[1].item()  # how clearly `far` wins along its own direction
    yield "Eq. 9 is sharp", 0.999 * steep, slope(40 * tau / gap * far, y, p, tau)


def test_smaller_constants_fail():
    tau, label = 0.1, torch.tensor([0])  # a pixel of class 0 on the prototype of class 1
    rise = risk(OPPOSITE[1:], label, OPPOSITE, tau) - bound.hub_terms(OPPOSITE, tau)[0][0].item()
    assert constant(OPPOSITE, 1.0) * 2 < rise <= constant(OPPOSITE, tau) * 2  # Eq. 9: the temperature belongs to it
    assert bound.hub_terms(OPPOSITE, tau)[1][0] * 2 < rise  # Eq. 10: the slope at the hub is for the way down alone
    assert bound.local_slope(OPPOSITE[:1], label, OPPOSITE, tau) * 2 < rise  # Eq. 25: the slope where another pixel stands
    assert rise <= bound.local_slope(OPPOSITE[1:], label, OPPOSITE, tau) * 2
    p, rest = torch.eye(3).double(), torch.tensor([[1.0], [1.0], [-2.0]]).double() / 6 ** 0.5  # Eq. 11, without p_1 - p_0
    rise = risk(p[1:2], label, p, tau) - bound.hub_terms(p, tau)[0][0]
    for basis, enough in ((rest, False), (bound.span_basis(p), True)):
        assert bool(rise <= constant(p, tau) * distance(p[1:2] @ basis, label, p @ basis)) is enough


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
    assert hub.min() > 0 and hub.max() - hub.min() > 0.1


def test_without_a_common_hub_the_bound_fails():
    """Prototypes of each domain's own: all radii are 0, and the target is as wrong as can be."""
    p, tau, label = torch.eye(4).double(), 0.1, torch.arange(4)
    emb = p.roll(1, 0)  # the target's pixels of each class sit where another class's prototype is
    assert radius(p, label, p) == radius(emb, label, emb) == 0
    assert risk(emb, label, p, tau) > risk(p, label, p, tau) + 5
    assert describe(p, tau, (p, label), (emb, label))["holds"]  # with the common hub it holds


def test_a_radius_to_the_nearest_prototype_or_one_that_counts_void_does_not_bound_the_risk():
    p, tau, label = torch.eye(3).double(), 0.1, torch.arange(3)
    emb = p.roll(1, 0)
    nearest = (emb[:, None] - p).norm(dim=2).amin(1).mean().item()
    diluted = radius(emb, label, p) / 100  # 99 void pixels for each labelled one, counted as distance 0
    rise, steep = risk(emb, label, p, tau) - bound.hub_terms(p, tau)[0].max().item(), constant(p, tau)
    assert max(steep * nearest, steep * diluted) + 5 < rise <= steep * radius(emb, label, p)


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
    yield "Eq. 15, distance", abs(far - near), reach
    yield "Eq. 15, loss", abs(risk(target, label, p, tau) - risk(hull, label, p, tau)) / steep, reach
    yield "Eq. 15, means", (target.mean(0) - hull.mean(0)).norm(), reach


def test_reach_is_an_equality_for_a_source_pushed_away_from_its_prototype_and_a_target_outside_it_breaks_the_promise():
    p, tau, label = torch.eye(3).double(), 0.1, torch.zeros(2, dtype=torch.long)
    source = p[:1] + torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]]).double()  # Eq. 14 needs no unit length
    target = source + torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    assert radius(target, label, p) == pytest.approx(radius(source, label, p) + wasserstein(target, source))
    source, target = p[[0, 0]], p[[1, 1]]
    for reach, kept in ((0.0, False), (wasserstein(target, source), True)):
        assert (risk(target, label, p, tau) <= risk(source, label, p, tau) + constant(p, tau) * reach) is kept


def legs(otp, vtp, emb, label, tau):
    """Of the pixels of one image with its VTP: (to OTP, to VTP, gap, largest gap of a class, loss at OTP, at VTP)."""
    far, near, gap = distance(emb, label, otp), distance(emb, label, vtp), distance(vtp[label], label, otp)
    losses = (bound.score_loss(emb, label, goal, tau) for goal in (otp, vtp))
    return far, near, gap, (vtp - otp).norm(dim=1).max(), *losses


@for_random_draws
def test_two_legs_and_the_debt_of_the_schedule(g, otp, tau):
    lam, images = uniform(g, 0, 1), []
    for _ in range(3):  # each image has its own VTP
        vtp = F.normalize(otp + uniform(g, 0, 2) * units(g, *otp.shape), dim=1)
        images.append([x.mean().item() for x in legs(otp, vtp, *random_domain(g, otp, n=10), tau)])
    far, near, gap, widest, risk_far, risk_near = np.mean(images, axis=0)
    for name, there, here, debt in (("Eq. 16", far, near, gap), ("Eq. 17", risk_far, risk_near, (gap + widest) / tau)):
        yield name, there, here + debt
        yield f"{name}, schedule", there, (1 - lam) * here + lam * there + (1 - lam) * debt


def test_two_legs_are_an_equality_on_the_vtp_and_fail_with_that_of_another_image_or_without_the_temperature():
    g, label = rng(5), torch.arange(4)
    otp, vtp = units(g, 4, 6), units(g, 4, 6)
    far, near, gap, *_ = legs(otp, vtp, vtp, label, 0.1)
    assert torch.equal(far, near + gap) and near.max() == 0
    otp, vtp, label = OPPOSITE, -OPPOSITE, label[:1]  # the pixel stands on the VTP of class 0, which is the OTP of class 1
    far, near, gap, widest, risk_far, risk_near = legs(otp, vtp, vtp[:1], label, 0.05)
    assert far > near + distance(otp[label], label, otp) + 1  # the gap of an image whose VTP is its OTP
    assert gap + widest < risk_far - risk_near <= (gap + widest) / 0.05


@pytest.mark.parametrize("name, debt", [("progressive", 0), ("otp", 0), ("both", 0.5), ("vtp", 1), ("reversed", 1)])
def test_debt_at_the_end_of_each_schedule_is_that_of_the_table(name, debt):
    assert 1 - align.SCHEDULES[name](align.progress(100, 100, 0.1, 0.6)) == pytest.approx(debt)


# --------------------------------------------------------------------------------------------------------- Eq. 18 to 21


def weights_of(emb, label, p, tau_w, ramp, w_min, per_class=True):
    """Eq. 5 and 6 as reweight.py computes them."""
    omega = reweight.reliability(emb.T[None, :, None], label[None, None], p, tau_w)
    return reweight.learning_weights(omega, label[None, None], ramp, w_min, per_class)[0, 0].double()


@for_random_draws
def test_what_learning_weights_do_to_radius_and_risk(g, p, tau):
    emb, label = random_domain(g, p)
    far, loss = distance(emb, label, p), bound.score_loss(emb, label, p, tau)
    for tau_w in (tau, uniform(g, 0.05, 1)):
        w = weights_of(emb, label, p, tau_w, uniform(g, 0, 1), uniform(g, 0, 0.9))
        for name, f in (("radius", far), ("risk", loss)):
            w_y, f_y, wf_y = (by_class(x, label, len(p)) for x in (w, f, w * f))
            covariance = (shares(label, len(p)) * (wf_y - w_y * f_y)).sum().item()
            yield f"Eq. 18, {name}", abs(mean(f, w) - mean(f) - covariance), 1e-5
        if tau_w == tau:
            yield "Eq. 19", mean(loss, w), mean(loss) + 1e-5
    raw = torch.exp(-uniform(g, 0, 5) * far).clamp_min(uniform(g, 0, 0.9))
    falling, rising = (x / by_class(x, label, len(p))[label] for x in (raw, 1 / raw))
    yield "Eq. 18, weights that fall with the distance", mean(far, falling), mean(far)
    yield "Eq. 18, weights that rise with the distance", mean(far), mean(far, rising)


def test_with_one_mean_for_all_classes_a_falling_weight_can_raise_the_radius():
    """Inside each class the weight falls with the distance; but the near class gets less than the far one."""
    far, label, raw = (torch.tensor(x) for x in ([0.1, 0.2, 1.2, 1.3], [0, 0, 1, 1], [0.2, 0.1, 1.1, 1.0]))
    assert mean(far, raw / raw.mean()) > mean(far) + 0.1
    assert mean(far, raw / by_class(raw, label, 2)[label]) < mean(far)


def test_weights_at_another_temperature_can_raise_the_risk():
    """One strong competitor against many weak ones: tau and tau_w disagree on which pixel is worse."""
    p, tau = torch.eye(12).double(), 2.0
    strong = F.normalize(p[0] + 1.05 * p[1], dim=0)  # just lost to one rival
    weak = F.normalize(2 * p[0] + p[1:].sum(0), dim=0)  # in front of all, but hardly
    emb, label = torch.stack([strong, weak]), torch.zeros(2, dtype=torch.long)
    other, same = (risk(emb, label, p, tau, weights_of(emb, label, p, tau_w, 1.0, 0.0)) for tau_w in (0.05, tau))
    assert other > risk(emb, label, p, tau) + 1e-3 > same + 1e-3


def harmful_terms(clean, harmful, target, w_clean, w_harmful):
    """(W_1 from target to weighted source, reach, distortion of clean pixels, harmful mass left); weights are sixths."""
    w_clean, w_harmful = torch.tensor(w_clean), torch.tensor(w_harmful)
    source = torch.cat([clean.repeat_interleave(w_clean, 0), harmful.repeat_interleave(w_harmful, 0)])
    distortion = (w_clean / w_clean.double().mean() - 1).abs().mean().item()
    left_over = 2 * (w_harmful.sum() / (w_clean.sum() + w_harmful.sum())).item()
    return wasserstein(target, source), wasserstein(target, clean.repeat(6 // len(clean), 1)), distortion, left_over


@for_random_draws
def test_reach_of_a_contaminated_source_under_weights(g, p, tau):
    cases = [((3, 2), (1,)), ((2, 2), (2,)), ((1, 4), (1,)), ((5, 0), (1,)), ((3, 3), (0,)), ((0, 4), (2,))]
    clean, harmful = units(g, 2, 4), units(g, 1, 4)
    weights = cases[int(torch.randint(0, 6, (1,), generator=g))]
    for target in (units(g, 6, 4), clean.repeat(3, 1)):  # reach = 0: what weights and contamination do is left
        w1, reach, distortion, left_over = harmful_terms(clean, harmful, target, *weights)
        yield "Eq. 20", w1, reach + distortion + left_over


def test_harmful_reach_is_an_equality_for_opposite_points_and_fails_without_either_term():
    clean = OPPOSITE[:1]
    w1, reach, distortion, left_over = harmful_terms(clean, -clean, clean.repeat(6, 1), [5], [1])
    assert reach == distortion == 0 and w1 == pytest.approx(left_over) and w1 > 0.3  # fails without the harmful term
    w1, reach, distortion, left_over = harmful_terms(OPPOSITE, clean, OPPOSITE.repeat(3, 1), [6, 0], [0])  # hard but clean
    assert reach == left_over == 0 and w1 == pytest.approx(distortion) and w1 > 0.9  # ... and without the distortion


@for_random_draws
def test_class_shares_under_weights(g, p, tau):
    k, (emb, label) = len(p), random_domain(g, p)
    before, loss = shares(label, k), bound.score_loss(emb, label, p, tau)
    share_t = random_shares(g, before > 0)
    for per_class in (True, False):
        w = weights_of(emb, label, p, tau, 1.0, 0.1, per_class)
        after, w_y = shares(label, k, w), by_class(w, label, k)
        shift = bound.total_variation(after, before)
        yield "Eq. 21, shift", abs(shift - 0.5 * (before * (w_y - 1).abs()).sum()), 1e-6
        yield "Eq. 21, means per class", shift * per_class, 1e-6
        risks, present = by_class(w * loss, label, k) / w_y, after > 0
        ratio = (share_t / after)[present].max().item()
        yield "Eq. 21, ratio", (share_t * risks)[present].sum(), ratio * mean(loss, w) * (1 + 1e-6) + 1e-6


def test_a_ratio_of_shares_that_forgets_the_weights_fails():
    """A starved class: training's risk is small, the target's is not, and the unweighted ratio does not see it."""
    p, tau, label = torch.eye(2).double(), 0.1, torch.tensor([0] * 9 + [1])
    emb, w = p[[0] * 10], torch.tensor([1.1] * 9 + [0.1], dtype=torch.float64)  # class 1 lies on class 0's place
    wanted, training = risk(emb, label, p, tau), risk(emb, label, p, tau, w)  # the target has the shares of the source
    assert wanted > 5 * training  # rho = 1 without weights
    assert wanted <= (shares(label, 2) / shares(label, 2, w)).max().item() * training + TOL


# --------------------------------------------------------------------------------------------------------- Eq. 22 to 24


def test_effective_sample_size_against_a_simulation():
    g = rng(7)
    for spread in (0.0, 0.5, 2.0):
        w = torch.exp(spread * torch.randn(200, generator=g, dtype=torch.float64))
        sample = torch.randn(10000, 200, generator=g, dtype=torch.float64)
        assert 1 / ((sample @ w) / w.sum()).var().item() == pytest.approx(effective_sample_size(w), rel=0.06)
        cv = w.std(unbiased=False) / w.mean()
        assert effective_sample_size(w) == pytest.approx((200 / (1 + cv ** 2)).item())


def simulate_images(seed, runs=4000, images=30, cells=50):
    """Images whose pixels all agree: labelled cells, and by how much the mean 1/2 of a pixel's 0 or 1 is underestimated."""
    g = rng(seed)
    labelled = torch.randint(1, cells + 1, (runs, images), generator=g).double()
    value = (torch.rand(runs, images, generator=g) < 0.5).double()
    return labelled, 0.5 - (labelled * value).sum(1) / labelled.sum(1)


def test_coverage_of_the_concentration_over_images():
    """Ratio of random sums, dependent pixels: the mean 1/2 is missed by less than delta = 0.05 of the runs."""
    labelled, short = simulate_images(8)
    n, kish = labelled.sum(1) ** 2 / (30 * 50 ** 2), labelled.sum(1) ** 2 / (labelled ** 2).sum(1)
    assert (n <= kish + TOL).all() and (kish <= 30 + TOL).all()
    term = torch.sqrt(math.log(1 / 0.05) / (2 * n))
    assert (short > term).double().mean() <= 0.05 and term.mean() < 0.5, "a term that covers everything would prove nothing"


def test_counting_pixels_as_independent_breaks_the_coverage():
    labelled, short = simulate_images(9)
    assert (short > torch.sqrt(math.log(1 / 0.05) / (2 * labelled.sum(1)))).double().mean() > 5 * 0.05


@for_random_draws
def test_the_whole_chain_on_finite_domains(g, p, tau):
    """Sample = population: shares moved and pixels moved at once."""
    k, (emb, label) = len(p), random_domain(g, p)
    moved = F.normalize(emb + uniform(g, 0, 1) * units(g, *emb.shape), dim=1)
    reach = by_class((moved - emb).norm(dim=1), label, k)  # one coupling, hence at least W_1
    share_s = shares(label, k)
    share_t = random_shares(g, share_s > 0)
    left = (share_t * by_class(bound.score_loss(moved, label, p, tau), label, k)).sum()
    rho, paid = (share_t / share_s)[share_s > 0].max(), (share_t * bound.lipschitz_per_class(p, tau) * reach).sum()
    yield "Eq. 24", left, rho * risk(emb, label, p, tau) + paid


def test_rank_correlation_with_a_tie():
    assert bound.rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)


# ------------------------------------------------------------------------------------------- the measurement of a run

SIZES = [(24, 40), (21, 35), (16, 16), (24, 40), (8, 24)]  # some are no multiple of the stride, the last one is all void
K = 6


class Tiny(torch.nn.Module):
    """Stands for PPAR: stride 4, embeddings that depend on the image alone, with VTP or without."""

    def __init__(self):
        super().__init__()
        self.conv, self.asks_vtp = torch.nn.Conv2d(3, 10, 4, stride=4), True
        self.otp = F.normalize(torch.randn(K, 10), dim=1)
        self.net = SimpleNamespace(encoder=SimpleNamespace(multiple=8))

    def forward(self, image):
        emb = F.normalize(self.conv(image), dim=1)
        vtp = F.normalize(self.otp + 0.5 * F.normalize(emb.mean((2, 3)), dim=1)[:, None], dim=-1)
        return ppar.Output(None, emb, vtp if self.asks_vtp else None)


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
    config = SimpleNamespace(source=["src"], targets=["far"], data_root="unused", tau=0.1, batch=2, seed=0, holdout=3,
                             harmful=0.2, reweight="class", balance=0.0, method="ppar", mapillary="B", out=str(tmp_path))
    return checkpoint.Run(Tiny(), config, 7, tmp_path), list_items("src", "", "train"), calls


def by_hand(run, items):
    """All labelled pixels at once: emb (N, D), label (N,), VTP of the pixel's image (N, K, D), image (N,)."""
    parts = []
    for number, item in enumerate(items):
        image, label = data.load_pair(item, "B")
        h, w = label.shape
        image = F.pad(data.to_tensor(image)[None], (0, -w % 8, 0, -h % 8), mode="replicate")
        label = F.pad(torch.as_tensor(label).long(), (0, -w % 8, 0, -h % 8), value=VOID)
        with torch.no_grad():
            _, emb, vtp = run.ppar(image)
        label = label[2::4, 2::4].flatten()  # the centre of a 4 x 4 cell, by hand
        emb, label = emb[0].flatten(1).T[label != VOID], label[label != VOID]
        parts.append((emb, label, vtp.expand(len(label), -1, -1), torch.full_like(label, number)))
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


@pytest.mark.parametrize("mode, batch", [("class", 2), ("class", 3), ("batch", 3), ("image", 3)])
def test_weighted_terms_are_those_of_the_weights_of_training(tiny, mode, batch):
    """Reliability from OTP and VTP, means within batches, in plain loops; the last batch may be a small one."""
    run, items, _ = tiny
    vars(run.config).update(reweight=mode, batch=batch)
    (emb, label, vtp, image), otp = by_hand(run, items), run.ppar.otp
    scores = torch.stack([emb @ otp.T, torch.einsum("nd,nkd->nk", emb, vtp)]) / 0.1
    reliable = scores.softmax(2).mean(0)[torch.arange(len(label)), label]
    w = torch.ones(len(emb))
    for start in range(0, 4, batch):
        members, omega = (image >= start) & (image < start + batch), reliable.clone()
        classes = [members & (label == c) for c in label[members].unique()]
        if mode == "image":
            for here in classes:
                omega[here] = reliable[here] / reliable[here].mean()
            for n in range(start, start + batch):
                omega[image == n] = omega[image == n].mean()
        for here in [members] if mode == "batch" else classes:
            u = (omega[here] / omega[here].mean()).clamp_min(0.1)
            w[here] = u / u.mean()
    domain = bound.measure(run, items, 0, weights=True)
    row = bound.describe(domain, domain, otp, 0.1)
    moved = bound.total_variation(shares(label, K), shares(label, K, w))
    expected = dict(n_eff=effective_sample_size(w), radius_weighted=radius(emb, label, otp, w),
                    risk_weighted=risk(emb, label, otp, 0.1, w), share_shift=moved)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (row["share_shift"] < 1e-6) is (mode != "batch") and row["holds"]


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
    w = torch.cat([torch.full((len(d["label"]),), 1 / len(d["label"])) for d in parts])
    assert row["n_eff"] == pytest.approx(effective_sample_size(w), rel=1e-5)


@pytest.mark.parametrize("source", [["src"], ["src", "src-b"], ["no-val"]])
@pytest.mark.parametrize("method", ["ppar", "erm"])
def test_measuring_a_run_writes_every_term_and_finds_no_violation(tiny, capsys, source, method):
    run, _, calls = tiny
    vars(run.config).update(source=source, targets=["far", "src-c", "other"], method=method)
    if method == "erm":
        run.ppar.asks_vtp, run.config.reweight = False, "none"
    before = {name: value.clone() for name, value in run.ppar.state_dict().items()}
    report = bound.measure_run(run)
    stored, said = json.loads((run.path / "bound.json").read_text()), capsys.readouterr().out
    assert stored == report and (run.path / "bound.png").stat().st_size > 10000
    held_out, first = source != ["no-val"], stored["domains"]["source"]
    assert list(stored["domains"]) == ["source", *["source held out"] * held_out, *run.config.targets]
    assert ("no held-out source row" in said) is not held_out
    shown = ("analysis only", "rank correlation", "every inequality holds: yes", *(f"\n{key} " for key in first))
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


def test_a_violation_is_reported_and_not_hidden(tiny, capsys, monkeypatch):
    """If a right side came out a little too small, `holds` would say so: the check itself can fail."""
    run, items, _ = tiny
    domain = bound.measure(run, items, 0)
    right = domain["mass"] * bound.describe(domain, domain, run.ppar.otp, 0.1)["right"]
    for name, value in dict(left=domain["right_local"], right_local=domain["right_direct"], right_direct=right,
                            radius_otp=domain["radius_vtp"] + domain["gap"]).items():
        assert bound.describe(domain, dict(domain, **{name: value + 1e-3}), run.ppar.otp, 0.1)["holds"] is False, name
    monkeypatch.setattr(bound, "hub_bound", lambda *terms: 0.0)
    rows = bound.measure_run(run, 2)["domains"].values()
    assert all(row["holds"] is False and row["images"] == 2 for row in rows)
    assert "NO: a bug" in capsys.readouterr().out


def test_demonstration(capsys):
    bound._demo()
    assert "right_direct" in capsys.readouterr().out
