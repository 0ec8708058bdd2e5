"""Every statement of theory.md from Eq. 8 on: attacked with random finite domains, brought to equality where it can be,
and broken by dropping one of its assumptions, so that the test shows what the assumption is for.

A finite set of pixels is a domain, so the inequalities must hold for it exactly; tolerances are for rounding alone.
"""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
import bound  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import ppar  # noqa: E402
import reweight  # noqa: E402
from data import VOID  # noqa: E402

TOL = 1e-9  # all random domains are drawn in float64
DRAWS = 200


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny tensors: handing them to several threads costs more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def units(g, *shape):
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def uniform(g, low, high):
    return low + (high - low) * torch.rand((), generator=g).item()


def random_prototypes(g, crowded=None):
    """K unit vectors, sometimes crowded together as CLIP's text is."""
    k, d = int(torch.randint(2, 9, (1,), generator=g)), int(torch.randint(2, 24, (1,), generator=g))
    common = units(g, 1, d) * uniform(g, 0, 3)
    return F.normalize(units(g, k, d) + common, dim=1)


def random_domain(g, prototypes, classes=None, n=None):
    """Pixels anywhere between their prototype and chaos, some void, some classes absent."""
    k, d = prototypes.shape
    n = n or int(torch.randint(1, 60, (1,), generator=g))
    if classes is None:
        size = int(torch.randint(1, k + 1, (1,), generator=g))
        classes = torch.randperm(k, generator=g)[:size]
    label = classes[torch.randint(0, len(classes), (n,), generator=g)]
    emb = F.normalize(prototypes[label] + uniform(g, 0, 3) * units(g, n, d), dim=1)
    if torch.rand((), generator=g) < 0.5:
        emb[: n // 3] = units(g, n // 3, d)
    label = label.where(torch.rand(n, generator=g) > 0.2, torch.tensor(VOID))
    label[-1] = classes[0]  # one labelled pixel at least (assumption 3)
    return emb, label


def class_means(value, label, k):
    return torch.stack([value[label == c].mean() for c in range(k)])


def distance(emb, label, prototypes):
    """|z_i - p_{y_i}|, (N,), 0 on void."""
    return (emb - prototypes[label.where(label != VOID, 0)]).norm(dim=-1) * (label != VOID)


def labelled_mean(value, label, weight=None):
    weight = (label != VOID).to(value.dtype) * (1.0 if weight is None else weight)
    return ((weight * value).sum() / weight.sum()).item()


def risk(emb, label, prototypes, tau, weight=None):
    return labelled_mean(bound.score_loss(emb, label, prototypes, tau), label, weight)


def alignment_radius(emb, label, prototypes, weight=None):
    return labelled_mean(distance(emb, label, prototypes), label, weight)


def prototype_gap(label, vtp, otp):
    return labelled_mean(distance(vtp[label.where(label != VOID, 0)], label, otp), label)


def own_shares(label, k, weight=None):
    """pi(y), (K,)."""
    share = torch.stack([((label == c).double() * (1.0 if weight is None else weight)).sum() for c in range(k)])
    return share / share.sum()


def lipschitz_constant(prototypes, tau):
    return bound.lipschitz_per_class(prototypes, tau).max().item()


def effective_sample_size(weight):
    return (weight.double().sum() ** 2 / (weight.double() ** 2).sum()).item()


def hoeffding(spread, n, delta):
    """Eq. 23's term."""
    return spread * math.sqrt(math.log(1 / delta) / (2 * n))


def both_bounds(prototypes, tau, source, target):
    """(left, right of Eq. 13, right of Eq. 12) from the functions of bound.py."""
    k, basis = len(prototypes), bound.span_basis(prototypes)
    hub, steep = bound.hub_loss(prototypes, tau), bound.lipschitz_per_class(prototypes, tau)
    share_s, share_t = own_shares(source[1], k), own_shares(target[1], k)
    right = bound.hub_bound(risk(*source, prototypes, tau), alignment_radius(*source, prototypes),
                            alignment_radius(*target, prototypes), bound.hub_slope(prototypes, tau).max().item(),
                            lipschitz_constant(prototypes, tau), bound.oscillation(hub, share_s, share_t),
                            bound.total_variation(share_s, share_t))
    along = class_means(distance(target[0] @ basis, target[1], prototypes @ basis), target[1], k)
    return risk(*target, prototypes, tau), bound.direct_bound(share_t, hub, steep, along), right


# ---------------------------------------------------------------------------------------------------------- Eq. 8, 9


def test_score_loss_is_the_formula_in_plain_loops_and_void_counts_for_nothing():
    g = rng(0)
    p = random_prototypes(g)
    emb, label = random_domain(g, p, n=12)
    tau, total, count = 0.3, 0.0, 0
    loss = bound.score_loss(emb, label, p, tau)
    for z, y, value in zip(emb, label.tolist(), loss.tolist()):
        if y == VOID:
            assert value == 0
            continue
        expected = math.log(sum(math.exp(float(z @ (p[c] - p[y])) / tau) for c in range(len(p))))
        assert value == pytest.approx(expected, abs=1e-12)
        total, count = total + expected, count + 1
    assert risk(emb, label, p, tau) == pytest.approx(total / count, abs=1e-12)
    without = risk(emb[label != VOID], label[label != VOID], p, tau)
    assert without == pytest.approx(risk(emb, label, p, tau), abs=1e-12)


def test_risk_is_the_alignment_loss_of_eq_3_at_the_otp():
    g = rng(1)
    p, emb = units(g, 5, 8).float(), units(g, 2, 3, 4, 8).float().permute(0, 3, 1, 2)
    label = torch.randint(0, 5, (2, 3, 4), generator=g)
    label[0, 0] = VOID
    weight = torch.rand(2, 3, 4, generator=g)
    flat = emb.permute(0, 2, 3, 1).reshape(-1, 8)
    for w in (None, weight):
        mine = risk(flat, label.flatten(), p, 0.1, None if w is None else w.flatten())
        assert mine == pytest.approx(align.alignment_loss(emb, label, p, 0.1, w).item(), rel=1e-5)


def test_oscillation_is_over_the_classes_that_occur_in_either_domain():
    hub = torch.tensor([0.1, 0.5, 2.0, -9.0])
    share_s, share_t = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    assert bound.oscillation(hub, share_s, share_t) == pytest.approx(0.4)
    assert bound.oscillation(hub, share_s, share_s) == 0


def test_wrong_pixels_are_at_most_the_risk_over_log_2_and_no_loss_exceeds_the_ceiling():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        emb, label = random_domain(g, p)
        valid = label != VOID
        wrong = ((emb @ p.T).argmax(1) != label)[valid].double().mean().item()
        assert wrong <= risk(emb, label, p, tau) / math.log(2) + TOL
        assert bound.score_loss(emb, label, p, tau).max().item() <= bound.loss_ceiling(p, tau) + TOL


def slope(z, y, p, tau):
    z = z.clone().requires_grad_()
    bound.score_loss(z[None], torch.tensor([y]), p, tau).sum().backward()
    return z.grad


def test_lipschitz_constant_against_autograd():
    """Never exceeded, nor is its local form, and approached far out in the direction of the farthest rival."""
    for seed in range(60):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.05, 1)
        steep = bound.lipschitz_per_class(p, tau)
        assert lipschitz_constant(p, tau) == pytest.approx(max(
            float((a - b).norm()) for a in p for b in p) / tau)
        for y in range(len(p)):
            z = uniform(g, 0, 3) * units(g, p.shape[1])
            size = slope(z, y, p, tau).norm()
            trust = math.exp(-bound.score_loss(z[None], torch.tensor([y]), p, tau).item())
            assert size <= (1 - trust) * steep[y] + TOL
            far = p[(p - p[y]).norm(dim=1).argmax()]
            gap = (1 - p @ far).sort().values[1].item()  # how clearly `far` wins along its own direction
            assert slope(40 * tau / gap * far, y, p, tau).norm() >= 0.999 * steep[y]


def test_loss_differences_stay_below_the_lipschitz_constant():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        a, b = units(g, 20, p.shape[1]), units(g, 20, p.shape[1])
        label = torch.randint(0, len(p), (20,), generator=g)
        rise = (bound.score_loss(a, label, p, tau) - bound.score_loss(b, label, p, tau)).abs()
        assert (rise <= bound.lipschitz_per_class(p, tau)[label] * (a - b).norm(dim=1) + TOL).all()


def test_a_lipschitz_constant_without_the_temperature_fails():
    p, tau, label = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.1, torch.tensor([0])
    rise = risk(p[1:], label, p, tau) - risk(p[:1], label, p, tau)
    assert rise > lipschitz_constant(p, 1.0) * 2  # the two points are 2 apart
    assert rise <= lipschitz_constant(p, tau) * 2


# --------------------------------------------------------------------------------------------------------- Eq. 10, 11


def test_hub_slope_is_the_gradient_at_the_prototype():
    for seed in range(40):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.05, 1)
        hub, flat, steep = bound.hub_loss(p, tau), bound.hub_slope(p, tau), bound.lipschitz_per_class(p, tau)
        for y in range(len(p)):
            assert slope(p[y], y, p, tau).norm().item() == pytest.approx(flat[y].item(), abs=1e-9)
        assert (hub > 0).all() and (hub <= math.log(len(p)) + TOL).all()
        assert (flat <= (1 - torch.exp(-hub)) * steep + TOL).all()


def test_the_loss_is_held_between_the_two_cones_at_the_prototype():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        emb, label = random_domain(g, p)
        emb, label = emb[label != VOID], label[label != VOID]
        rise = bound.score_loss(emb, label, p, tau) - bound.hub_loss(p, tau)[label]
        way = distance(emb, label, p)
        assert (rise <= bound.lipschitz_per_class(p, tau)[label] * way + TOL).all()
        assert (rise >= -bound.hub_slope(p, tau)[label] * way - TOL).all()


def test_the_slope_where_the_pixel_stands_is_enough_and_never_exceeds_the_constant():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        emb, label = random_domain(g, p)
        emb, label = emb[label != VOID], label[label != VOID]
        steep, basis = bound.local_slope(emb, label, p, tau), bound.span_basis(p)
        assert steep[0].item() == pytest.approx(slope(emb[0], int(label[0]), p, tau).norm().item(), abs=1e-9)
        rise = bound.score_loss(emb, label, p, tau) - bound.hub_loss(p, tau)[label]
        assert (rise <= steep * distance(emb @ basis, label, p @ basis) + TOL).all()
        assert (steep <= bound.lipschitz_per_class(p, tau)[label] + TOL).all()


def test_the_slope_where_another_pixel_stands_is_not_enough():
    p, tau, label = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), 0.1, torch.tensor([0])
    rise = risk(p[1:], label, p, tau) - bound.hub_loss(p, tau)[0]
    assert bound.local_slope(p[:1], label, p, tau) * 2 < rise <= bound.local_slope(p[1:], label, p, tau) * 2


def test_the_slope_at_the_prototype_is_too_small_for_the_way_up():
    p, tau = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.1
    rise = bound.score_loss(p[1:], torch.tensor([0]), p, tau) - bound.hub_loss(p, tau)[0]
    assert rise > bound.hub_slope(p, tau)[0] * 2


def test_what_is_orthogonal_to_all_differences_does_not_change_the_loss():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        basis = bound.span_basis(p)
        assert basis.shape[1] < len(p)
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=p.dtype), atol=1e-9)
        emb, label = random_domain(g, p)
        other = 2 * torch.randn(emb.shape, generator=g, dtype=torch.float64)
        other = other - other @ basis @ basis.T
        loss = bound.score_loss(emb, label, p, tau)
        assert torch.allclose(bound.score_loss(emb + other, label, p, tau), loss, atol=1e-7)
        along, way = distance(emb @ basis, label, p @ basis), distance(emb, label, p)
        assert (along <= way + TOL).all()
        valid = label != VOID
        rise = (loss - bound.hub_loss(p, tau)[label.where(valid, torch.tensor(0))])[valid]
        steep = bound.lipschitz_per_class(p, tau)[label[valid]]
        assert (rise <= steep * along[valid] + TOL).all()


def test_with_one_direction_of_the_span_left_out_the_bound_fails():
    p, tau = torch.eye(3, dtype=torch.float64), 0.1
    basis = bound.span_basis(p)
    assert basis.shape == (3, 2)
    rest = torch.tensor([[1.0], [1.0], [-2.0]], dtype=torch.float64) / 6 ** 0.5  # the span without p_1 - p_0
    emb, label = p[1:2], torch.tensor([0])  # a pixel of class 0 on the prototype of class 1
    rise = bound.score_loss(emb, label, p, tau) - bound.hub_loss(p, tau)[0]
    along = distance(emb @ rest, label, p @ rest)
    assert rise > bound.lipschitz_per_class(p, tau)[0] * along
    assert rise <= bound.lipschitz_per_class(p, tau)[0] * distance(emb @ basis, label, p @ basis)


# --------------------------------------------------------------------------------------------------------- Eq. 12, 13


def test_both_bounds_hold_on_random_domains_and_the_direct_one_is_never_larger():
    gaps, absent = 0, 0
    for seed in range(2 * DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        source, target = random_domain(g, p), random_domain(g, p)
        left, direct, right = both_bounds(p, tau, source, target)
        assert left <= direct + TOL
        assert direct <= right + 1e-7
        gaps += int((source[1] == VOID).any() and (target[1] == VOID).any())
        absent += int(set(target[1].tolist()) - set(source[1].tolist()) - {VOID} != set())
    assert gaps > 50 and absent > 50, "the draws must contain void pixels and classes that only the target has"


def test_the_hub_bound_is_an_equality_when_pixels_have_arrived_and_shares_are_opposite():
    p = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64), dim=1)
    tau = 0.2
    hub = bound.hub_loss(p, tau)
    best, worst = int(hub.argmin()), int(hub.argmax())
    source, target = ((p[c].expand(4, 3), torch.full((4,), c)) for c in (best, worst))
    left, direct, right = both_bounds(p, tau, source, target)
    assert hub[worst] - hub[best] > 0.1
    assert left == pytest.approx(right, abs=1e-12) and left == pytest.approx(direct, abs=1e-12)


def test_the_hub_bound_without_the_class_share_term_fails():
    p = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64), dim=1)
    hub = bound.hub_loss(p, 0.2)
    source, target = ((p[c].expand(4, 3), torch.full((4,), c)) for c in (int(hub.argmin()), int(hub.argmax())))
    assert risk(*target, p, 0.2) > risk(*source, p, 0.2) + 0.1  # both radii are 0


def test_without_a_common_hub_the_bound_fails():
    """Prototypes of each domain's own: all radii are 0, and the target is as wrong as can be."""
    p, tau = torch.eye(4, dtype=torch.float64), 0.1
    label = torch.arange(4)
    target_means = p.roll(1, 0)  # the target's pixels of each class sit where another class's prototype is
    emb = target_means[label]
    own_radius = alignment_radius(emb, label, target_means)
    assert own_radius == 0
    right = bound.hub_bound(risk(p, label, p, tau), alignment_radius(p, label, p), own_radius,
                            bound.hub_slope(p, tau).max().item(), lipschitz_constant(p, tau), 0.0, 0.0)
    assert risk(emb, label, p, tau) > right + 5
    left, _, right = both_bounds(p, tau, (p, label), (emb, label))
    assert left <= right  # with the common hub it holds


def test_a_radius_to_the_nearest_prototype_does_not_bound_the_risk():
    p, tau, label = torch.eye(3, dtype=torch.float64), 0.1, torch.arange(3)
    emb = p.roll(1, 0)
    nearest = torch.cdist(emb, p).amin(1).mean().item()
    assert nearest == pytest.approx(0, abs=1e-6)
    claimed = bound.hub_loss(p, tau).max() + lipschitz_constant(p, tau) * nearest
    assert risk(emb, label, p, tau) > claimed + 5


def test_void_pixels_counted_on_one_side_break_the_bound():
    """A void pixel counted as distance 0 shrinks the radius; the risk of the labelled pixels stays."""
    p, tau = torch.eye(2, dtype=torch.float64), 0.1
    emb, label = p[[1] + [0] * 99], torch.tensor([0] + [VOID] * 99)
    diluted = distance(emb, label, p).mean().item()
    assert risk(emb, label, p, tau) > bound.hub_loss(p, tau)[0] + lipschitz_constant(p, tau) * diluted
    assert risk(emb, label, p, tau) <= (bound.hub_loss(p, tau)[0] + lipschitz_constant(p, tau)
                                              * alignment_radius(emb, label, p))


# --------------------------------------------------------------------------------------------------------- Eq. 14, 15


def wasserstein(a, b):
    """W_1 between two uniform distributions on equally many points: the best of all pairings (Birkhoff's theorem)."""
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    pairings = np.array(list(itertools.permutations(range(len(a)))))
    return float(cost[np.arange(len(a)), pairings].sum(1).min()) / len(a)


def test_reach_bounds_radius_and_risk_of_an_unseen_target():
    """Two sources; S* mixes them 1:1 or takes one; target anywhere. One class at a time, then averaged over shares."""
    for seed in range(60):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        share = torch.rand(len(p), generator=g, dtype=torch.float64)
        share = share / share.sum()
        steep, left, right = bound.lipschitz_per_class(p, tau), 0.0, 0.0
        for y in range(len(p)):
            def pixels(n):
                return F.normalize(p[y] + uniform(g, 0, 2) * units(g, n, p.shape[1]), dim=1)

            first, second, target = pixels(3), pixels(3), pixels(6)
            hull = torch.cat([first, second]) if seed % 2 else first.repeat(2, 1)
            reach, label = wasserstein(target, hull), torch.full((6,), y)
            assert alignment_radius(target, label, p) <= alignment_radius(hull, label, p) + reach + TOL
            left += share[y].item() * risk(target, label, p, tau)
            right += share[y].item() * (risk(hull, label, p, tau) + steep[y].item() * reach)
            low, high = abs(alignment_radius(target, label, p) - alignment_radius(hull, label, p)), (
                alignment_radius(target, label, p) + alignment_radius(hull, label, p))
            low = max(low, (target.mean(0) - hull.mean(0)).norm().item(),
                      abs(risk(target, label, p, tau) - risk(hull, label, p, tau)) / steep[y].item())
            assert low - TOL <= reach <= high + TOL  # Eq. 15
        assert left <= right + TOL


def test_reach_is_an_equality_when_the_target_is_the_source_pushed_away_from_its_prototype():
    p = torch.eye(3, dtype=torch.float64)
    source = p[:1] + torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]]).double()  # Eq. 14 needs no unit length
    target = source + torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    label = torch.zeros(2, dtype=torch.long)
    reach = wasserstein(target, source)
    assert alignment_radius(target, label, p) == pytest.approx(alignment_radius(source, label, p) + reach)


def test_a_target_outside_the_reach_breaks_the_promise():
    p, tau = torch.eye(2, dtype=torch.float64), 0.1
    source, target, label = p[:1], p[1:], torch.tensor([0])
    for reach, kept in ((0.0, False), (wasserstein(target, source), True)):
        promised = risk(source, label, p, tau) + lipschitz_constant(p, tau) * reach
        assert (risk(target, label, p, tau) <= promised + TOL) is kept


# --------------------------------------------------------------------------------------------------------- Eq. 16, 17


def test_two_legs_and_the_debt_of_the_schedule():
    for seed in range(DRAWS):
        g = rng(seed)
        otp, tau, lam = random_prototypes(g), uniform(g, 0.03, 1), uniform(g, 0, 1)
        near = gap = far = widest = risk_near = risk_far = 0.0
        images = 3
        for _ in range(images):  # each image has its own VTP; equally many labelled pixels in each, hence plain means
            vtp = F.normalize(otp + uniform(g, 0, 2) * units(g, *otp.shape), dim=1)
            emb, label = random_domain(g, otp, n=10)
            label = label.where(label != VOID, label[-1])
            near += alignment_radius(emb, label, vtp) / images
            far += alignment_radius(emb, label, otp) / images
            gap += prototype_gap(label, vtp, otp) / images
            widest += (vtp - otp).norm(dim=1).max().item() / images
            risk_near += risk(emb, label, vtp, tau) / images
            risk_far += risk(emb, label, otp, tau) / images
        assert far <= near + gap + TOL
        assert far <= (1 - lam) * near + lam * far + (1 - lam) * gap + TOL
        assert risk_far <= risk_near + (gap + widest) / tau + TOL
        assert risk_far <= (1 - lam) * risk_near + lam * risk_far + (1 - lam) * (gap + widest) / tau + TOL


def test_two_legs_are_an_equality_when_the_pixel_stands_on_its_vtp():
    g = rng(5)
    otp, vtp = units(g, 4, 6), units(g, 4, 6)
    label = torch.tensor([0, 1, 2, 3, VOID])
    emb = torch.cat([vtp, units(g, 1, 6)])
    assert alignment_radius(emb, label, vtp) == 0
    assert alignment_radius(emb, label, otp) == pytest.approx(prototype_gap(label, vtp, otp))


def test_two_legs_with_the_vtp_of_another_image_fail():
    otp = torch.eye(2, dtype=torch.float64)
    mine, other = otp.clone(), otp.roll(1, 0)  # my VTP is the OTP; another image's are exchanged
    emb, label = other[:1], torch.tensor([0])
    near, gap = alignment_radius(emb, label, other), prototype_gap(label, mine, otp)
    assert alignment_radius(emb, label, otp) > near + gap + 1


def test_legs_of_the_loss_without_the_temperature_fail():
    otp, tau = torch.eye(2, dtype=torch.float64), 0.05
    vtp, label = otp.roll(1, 0), torch.tensor([0])
    emb = vtp[:1]
    gap, widest = prototype_gap(label, vtp, otp), (vtp - otp).norm(dim=1).max().item()
    rise = risk(emb, label, otp, tau) - risk(emb, label, vtp, tau)
    assert gap + widest < rise <= (gap + widest) / tau


@pytest.mark.parametrize("name, debt", [("progressive", 0), ("otp", 0), ("both", 0.5), ("vtp", 1), ("reversed", 1)])
def test_debt_at_the_end_of_each_schedule_is_that_of_the_table(name, debt):
    assert 1 - align.SCHEDULES[name](align.progress(100, 100, 0.1, 0.6)) == pytest.approx(debt)


# --------------------------------------------------------------------------------------------------------- Eq. 18 to 21


def within_class_covariance(weight, value, label, k):
    """sum_y pi(y) Cov_y(w, f), by its definition."""
    share, total = own_shares(label, k), 0.0
    for y in range(k):
        w, f = weight[label == y].double(), value[label == y].double()
        if len(w):
            total += share[y].item() * ((w * f).mean() - w.mean() * f.mean()).item()
    return total


def grid(x):
    return x.view(1, 1, *x.shape)


def weights_of(emb, label, p, tau_w, ramp, w_min, per_class=True):
    rel = reweight.reliability(emb.T[None, :, None], grid(label), p, tau_w)
    return reweight.learning_weights(rel, grid(label), ramp, w_min, per_class)[0, 0].double()


def test_change_of_radius_and_risk_is_the_covariance_within_classes():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.05, 1)
        emb, label = random_domain(g, p)
        w = weights_of(emb, label, p, uniform(g, 0.05, 1), uniform(g, 0, 1), uniform(g, 0, 0.9))
        for value in (distance(emb, label, p), bound.score_loss(emb, label, p, tau)):
            change = labelled_mean(value, label, w) - labelled_mean(value, label)
            assert change == pytest.approx(within_class_covariance(w, value, label, len(p)), abs=1e-5)


def test_weights_that_fall_with_the_distance_inside_each_class_never_raise_the_radius():
    for seed in range(DRAWS):
        g = rng(seed)
        p = random_prototypes(g)
        emb, label = random_domain(g, p)
        far = distance(emb, label, p)
        raw = torch.exp(-uniform(g, 0, 5) * far).clamp_min(uniform(g, 0, 0.9))
        means = class_means(raw, label, len(p)).nan_to_num(1.0)
        w = raw / means[label.where(label != VOID, torch.tensor(0))]
        assert alignment_radius(emb, label, p, w) <= alignment_radius(emb, label, p) + TOL


def test_constant_weights_or_constant_distances_leave_the_radius():
    p = torch.eye(2, dtype=torch.float64)
    emb, label = torch.stack([p[0], -p[0], p[1], -p[1]]), torch.tensor([0, 0, 1, 1])
    assert alignment_radius(emb, label, p, torch.ones(4).double()) == alignment_radius(emb, label, p)
    turned = p[[1, 1, 0, 0]] * torch.tensor([[1], [-1], [1], [-1]])  # all at distance sqrt(2) from their prototype
    w = torch.tensor([1.9, 0.1, 0.4, 1.6]).double()
    assert alignment_radius(turned, label, p, w) == pytest.approx(alignment_radius(turned, label, p))


def test_weights_that_rise_with_the_distance_raise_the_radius():
    p = torch.eye(2, dtype=torch.float64)
    emb, label = torch.stack([p[0], p[1]]), torch.tensor([0, 0])
    assert alignment_radius(emb, label, p, torch.tensor([0.5, 1.5])) > alignment_radius(emb, label, p)


def test_with_one_mean_for_all_classes_a_falling_weight_can_raise_the_radius():
    """Inside each class the weight falls with the distance; but the near class gets less than the far one."""
    p = torch.eye(3, dtype=torch.float64)
    near = F.normalize(p[:1] + torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.0, 0.2]]).double(), dim=1)
    far = F.normalize(p[1:2] + torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 3.0]]).double(), dim=1)
    emb, label = torch.cat([near, far]), torch.tensor([0, 0, 1, 1])
    raw = torch.tensor([0.2, 0.1, 1.1, 1.0]).double()
    assert alignment_radius(emb, label, p, raw / raw.mean()) > alignment_radius(emb, label, p) + 0.1
    per_class = raw / raw.view(2, 2).mean(1).repeat_interleave(2)
    assert alignment_radius(emb, label, p, per_class) < alignment_radius(emb, label, p)


def test_weights_from_the_otp_at_the_same_temperature_never_raise_the_risk():
    strict = 0
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.05, 1)
        emb, label = random_domain(g, p)
        w = weights_of(emb, label, p, tau, uniform(g, 0, 1), uniform(g, 0, 0.9))
        before, after = risk(emb, label, p, tau), risk(emb, label, p, tau, w)
        assert after <= before + 1e-5
        strict += after < before - 1e-3
    assert strict > DRAWS / 2


def test_weights_at_another_temperature_can_raise_the_risk():
    """One strong competitor against many weak ones: tau and tau_w disagree on which pixel is worse."""
    p, tau, tau_w = torch.eye(12, dtype=torch.float64), 2.0, 0.05
    strong = F.normalize(p[0] + 1.05 * p[1], dim=0)  # just lost to one rival
    weak = F.normalize(2 * p[0] + p[1:].sum(0), dim=0)  # in front of all, but hardly
    emb, label = torch.stack([strong, weak]), torch.zeros(2, dtype=torch.long)
    w = weights_of(emb, label, p, tau_w, 1.0, 0.0)
    assert risk(emb, label, p, tau, w) > risk(emb, label, p, tau) + 1e-3
    w = weights_of(emb, label, p, tau, 1.0, 0.0)
    assert risk(emb, label, p, tau, w) <= risk(emb, label, p, tau) + 1e-6


def harmful_terms(clean, harmful, target, w_clean, w_harmful):
    """(W_1 from the target to the weighted source, reach, distortion of clean pixels, harmful mass left) of one class.

    All weights are multiples of 1 / 6 of the class, so that each distribution is uniform on 6 points with repetition.
    """
    eta = len(harmful) / (len(clean) + len(harmful))
    source = torch.cat([clean.repeat_interleave(w_clean, 0), harmful.repeat_interleave(w_harmful, 0)])
    copies = 6 // len(clean)
    scale = (len(clean) + len(harmful)) / (w_clean.sum() + w_harmful.sum())  # mean weight 1
    w_c = w_clean * scale
    distortion = (w_c / w_c.mean() - 1).abs().mean().item()
    return wasserstein(target, source), wasserstein(target, clean.repeat(copies, 1)), distortion, (
        2 * eta * (w_harmful * scale).mean().item())


def test_reach_of_a_contaminated_source_under_weights():
    cases = [((3, 2), (1,)), ((2, 2), (2,)), ((1, 4), (1,)), ((5, 0), (1,)), ((3, 3), (0,)), ((0, 4), (2,))]
    for seed in range(60):
        g = rng(seed)
        w_clean, w_harmful = (torch.tensor(w) for w in cases[seed % len(cases)])
        clean, target = units(g, 2, 4), units(g, 6, 4)
        if seed % 2:
            target = clean.repeat(3, 1)  # reach = 0: what is left is what the weights and the contamination do
        w1, reach, distortion, left_over = harmful_terms(clean, units(g, 1, 4), target, w_clean, w_harmful)
        assert w1 <= reach + distortion + left_over + TOL


def test_harmful_reach_is_an_equality_for_opposite_points_and_fails_without_either_term():
    clean = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    target = clean.repeat(6, 1)
    w1, reach, distortion, left_over = harmful_terms(clean, -clean, target, torch.tensor([5]), torch.tensor([1]))
    assert reach == distortion == 0 and w1 == pytest.approx(left_over) and w1 > 0.3  # fails without the harmful term
    clean = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # hard but clean pixels, weighted away
    w1, reach, distortion, left_over = harmful_terms(clean, clean[:1], clean.repeat(3, 1), torch.tensor([6, 0]),
                                                     torch.tensor([0]))
    assert reach == left_over == 0 and w1 == pytest.approx(distortion) and w1 > 0.9  # ... and without the distortion


def test_class_shares_under_weights():
    moved = 0
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.05, 1)
        k = len(p)
        emb, label = random_domain(g, p)
        share_t = torch.rand(k, generator=g, dtype=torch.float64)
        before = own_shares(label, k)
        share_t[before == 0] = 0
        share_t = share_t / share_t.sum()
        for per_class in (True, False):
            w = weights_of(emb, label, p, tau, 1.0, 0.1, per_class)
            after = own_shares(label, k, w)
            mean = class_means(w, label, k).nan_to_num(1.0)
            shift = 0.5 * (before * (mean - 1).abs()).sum().item()
            assert bound.total_variation(after, before) == pytest.approx(shift, abs=1e-6)
            if per_class:
                assert bound.total_variation(after, before) < 1e-6
            else:
                moved += bound.total_variation(after, before) > 1e-2
            loss = bound.score_loss(emb, label, p, tau)
            per = torch.stack([(w * loss)[label == c].sum() / w[label == c].sum() for c in range(k)]).nan_to_num(0.0)
            present = after > 0
            ratio = (share_t[present] / after[present]).max().item()
            assert (share_t * per).sum().item() <= ratio * risk(emb, label, p, tau, w) * (1 + 1e-6) + 1e-6
    assert moved > DRAWS / 2


def test_a_ratio_of_shares_that_forgets_the_weights_fails():
    """A starved class: training's risk is small, the target's is not, and the unweighted ratio does not see it."""
    p, tau = torch.eye(2, dtype=torch.float64), 0.1
    emb, label = torch.cat([p[:1].repeat(9, 1), p[:1]]), torch.tensor([0] * 9 + [1])  # class 1 lies on class 0's place
    w = torch.tensor([1.1] * 9 + [0.1], dtype=torch.float64)
    before = own_shares(label, 2)
    per = torch.stack([bound.hub_loss(p, tau)[0], bound.score_loss(emb, label, p, tau)[-1]])
    wanted = (before * per).sum().item()  # the target has the shares of the unweighted source: rho = 1 without weights
    training = risk(emb, label, p, tau, w)
    assert wanted > 5 * training
    assert wanted <= (before / own_shares(label, 2, w)).max().item() * training + TOL


# --------------------------------------------------------------------------------------------------------- Eq. 22 to 24


def test_effective_sample_size_against_a_simulation():
    g = rng(7)
    for spread in (0.0, 0.5, 2.0):
        w = torch.exp(spread * torch.randn(200, generator=g, dtype=torch.float64))
        draws = torch.randn(20000, 200, generator=g, dtype=torch.float64)
        variance = ((draws @ w) / w.sum()).var().item()
        assert 1 / variance == pytest.approx(effective_sample_size(w), rel=0.05)
    assert effective_sample_size(torch.ones(50)) == pytest.approx(50)
    assert effective_sample_size(7 * w) == pytest.approx(effective_sample_size(w))
    assert effective_sample_size(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    cv = w.std(unbiased=False) / w.mean()
    assert effective_sample_size(w) == pytest.approx((200 / (1 + cv ** 2)).item())


def simulate_images(g, runs, images, cells):
    """Images whose pixels all agree with each other: their labelled counts and their values 0 or 1, (runs, images)."""
    labelled = torch.randint(1, cells + 1, (runs, images), generator=g).double()
    value = (torch.rand(runs, images, generator=g) < 0.5).double()
    return labelled, value


def test_coverage_of_the_concentration_over_images():
    """Ratio of random sums, dependent pixels: the mean 1/2 is missed by less than delta of the runs."""
    g, delta, cells, images = rng(8), 0.05, 50, 30
    labelled, value = simulate_images(g, 4000, images, cells)
    estimate = (labelled * value).sum(1) / labelled.sum(1)
    n = labelled.sum(1) ** 2 / (images * cells ** 2)
    assert (n <= labelled.sum(1) ** 2 / (labelled ** 2).sum(1) + TOL).all()
    assert (labelled.sum(1) ** 2 / (labelled ** 2).sum(1) <= images + TOL).all()
    term = torch.tensor([hoeffding(1.0, x, delta) for x in n.tolist()])
    missed = (0.5 > estimate + term).double().mean().item()
    assert missed <= delta
    assert term.mean() < 0.5, "a term that covers everything would prove nothing"


def test_counting_pixels_as_independent_breaks_the_coverage():
    g, delta, cells, images = rng(9), 0.05, 50, 30
    labelled, value = simulate_images(g, 4000, images, cells)
    estimate = (labelled * value).sum(1) / labelled.sum(1)
    term = torch.tensor([hoeffding(1.0, x, delta) for x in labelled.sum(1).tolist()])
    assert (0.5 > estimate + term).double().mean().item() > 5 * delta


def test_the_combined_source_term_lies_in_the_interval_that_the_concentration_uses():
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        emb, label = random_domain(g, p)
        emb, label = emb[label != VOID], label[label != VOID]
        slope_hub = bound.hub_slope(p, tau).max().item()
        rise = bound.score_loss(emb, label, p, tau) - bound.hub_loss(p, tau)[label]
        f = rise + slope_hub * distance(emb, label, p)
        assert f.min() >= -TOL and f.max() <= 2 * (lipschitz_constant(p, tau) + slope_hub) + TOL


def test_the_whole_chain_on_finite_domains():
    """Eq. 24 with sample = population: shares moved and pixels moved at once."""
    for seed in range(DRAWS):
        g = rng(seed)
        p, tau = random_prototypes(g), uniform(g, 0.03, 1)
        k = len(p)
        emb, label = random_domain(g, p)
        emb, label = emb[label != VOID], label[label != VOID]
        moved = F.normalize(emb + uniform(g, 0, 1) * units(g, *emb.shape), dim=1)
        reach = class_means((moved - emb).norm(dim=1), label, k).nan_to_num(0.0)  # one coupling, hence at least W_1
        share_s = own_shares(label, k)
        share_t = torch.rand(k, generator=g, dtype=torch.float64) * (share_s > 0)
        share_t = share_t / share_t.sum()
        left = (share_t * class_means(bound.score_loss(moved, label, p, tau), label, k).nan_to_num(0.0)).sum().item()
        rho = (share_t / share_s)[share_s > 0].max().item()
        paid = (share_t * bound.lipschitz_per_class(p, tau) * reach).sum().item()
        assert left <= rho * risk(emb, label, p, tau) + paid + TOL


def test_rank_correlation():
    assert bound.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert bound.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert bound.rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)  # with a tie


# ------------------------------------------------------------------------------------- the measurement of a run


class TinyNet(torch.nn.Module):
    """Stride 4, embeddings that depend on the image alone; stands for SegmentationNet."""

    encoder = SimpleNamespace(multiple=8)

    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, dim, 4, stride=4)

    def forward(self, image):
        emb = F.normalize(self.conv(image), dim=1)
        return None, emb, F.normalize(emb.mean((2, 3)), dim=1)


class TinyVTP(torch.nn.Module):
    def forward(self, otp, emb, pooled):
        return F.normalize(otp + 0.5 * pooled[:, None], dim=-1)


SIZES = [(24, 40), (21, 35), (16, 16), (24, 40), (8, 24)]  # some are no multiple of the stride, one is all void


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A Run over five small images per domain; only reading files is replaced."""
    k, dim = 6, 10
    calls, conventions = [], set()

    def list_items(name, root, split, holdout=0, harmful=0.0):
        if name == "no-val" and split == "val":
            raise data.UserError("no-val has no val split")
        shift = 0.0 if name.startswith(("src", "no-val")) else 1.0
        calls.append((name, split, holdout, harmful))
        first = 10 if split == "val" else 0
        return [SimpleNamespace(dataset=name, number=first + i, shift=shift) for i in range(len(SIZES))]

    def load_pair(item, mapillary="A"):
        conventions.add(mapillary)
        h, w = SIZES[item.number % 10]
        noise = np.random.default_rng([item.number]).random((h, w, 3))
        label = np.random.default_rng([item.number, 1]).integers(0, k - 1, (h, w)).astype(np.uint8)  # class k-1 is absent
        label[:, : w // 5] = VOID
        label = np.full_like(label, VOID) if item.number % 10 == 4 else label
        return (255 * np.clip(0.7 * noise + 0.3 * item.shift, 0, 1)).astype(np.uint8), label

    monkeypatch.setattr(data, "list_items", list_items)
    monkeypatch.setattr(data, "load_pair", load_pair)
    torch.manual_seed(4)
    config = SimpleNamespace(source=["src"], targets=["far"], data_root="unused", tau=0.1, batch=2, seed=0, holdout=0,
                             harmful=0.0, reweight="class", balance=0.0, method="ppar", mapillary="A", out=str(tmp_path))
    module = ppar.PPAR(TinyNet(dim), F.normalize(torch.randn(k, dim), dim=1), TinyVTP())
    return checkpoint.Run(module, config, 7, tmp_path), calls, conventions


def by_hand(run, items):
    """All labelled pixels at once: emb (N, D), label (N,), VTP of the pixel's image (N, K, D), image (N,)."""
    parts = []
    for number, item in enumerate(items):
        image, label = data.load_pair(item)
        image, label = data.to_tensor(image), torch.as_tensor(label).long()
        h, w = label.shape
        image = F.pad(image[None], (0, -w % 8, 0, -h % 8), mode="replicate")
        label = F.pad(label, (0, -w % 8, 0, -h % 8), value=VOID)
        with torch.no_grad():
            _, emb, pooled = run.ppar.net(image)
            vtp = run.ppar.vtp(run.ppar.otp, emb, pooled)
        label = label[2::4, 2::4].flatten()  # the centre of a 4 x 4 cell, by hand
        valid = label != VOID
        n = int(valid.sum())
        parts.append((emb[0].flatten(1).T[valid], label[valid], vtp.expand(n, -1, -1), torch.full((n,), number)))
    return [torch.cat(x) for x in zip(*parts)]


def test_the_terms_are_those_of_all_pixels_at_once(tiny):
    run, items = tiny[0], data.list_items("src", "", "train")
    domain = bound.measure(run, items)
    emb, label, vtp, _ = by_hand(run, items)
    tau, otp = 0.1, run.ppar.otp
    assert domain["images"] == 4 and torch.equal(domain["label"], label)
    assert torch.allclose(bound.shares(domain, 6), own_shares(label, 6))
    own = vtp[torch.arange(len(label)), label]
    along = (emb - otp[label]) @ bound.span_basis(otp)
    steep = torch.stack([slope(z, y, otp, tau).norm() for z, y in zip(emb, label.tolist())])
    expected = dict(risk=risk(emb, label, otp, tau), radius_otp=alignment_radius(emb, label, otp),
                    radius_vtp=(emb - own).norm(dim=1).mean().item(), gap=(own - otp[label]).norm(dim=1).mean().item(),
                    error=((emb @ otp.T).argmax(1) != label).float().mean().item(), radius_span=along.norm(dim=1).mean().item(),
                    climb=(steep * along.norm(dim=1)).mean().item())
    for name, value in expected.items():
        assert bound.mean(domain, name) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("mode, batch", [("class", 2), ("class", 3), ("batch", 3), ("image", 3)])
def test_weighted_terms_are_those_of_the_weights_of_training(tiny, mode, batch):
    """Reliability from OTP and VTP, means within batches, in plain loops; the last batch may be a small one."""
    run, items = tiny[0], data.list_items("src", "", "train")
    vars(run.config).update(reweight=mode, batch=batch)
    emb, label, vtp, image = by_hand(run, items)
    otp, own = run.ppar.otp, (torch.arange(len(label)), label)
    reliable = (torch.softmax(emb @ otp.T / 0.1, 1)[own] + torch.softmax(torch.einsum("nd,nkd->nk", emb, vtp) / 0.1, 1)[own]) / 2
    w = torch.ones(len(emb))
    for start in range(0, 4, batch):
        members = (image >= start) & (image < min(start + batch, 4))
        omega = reliable.clone()
        if mode == "image":
            for c in range(6):
                here = members & (label == c)
                omega[here] = reliable[here] / reliable[here].mean()
            for n in range(start, min(start + batch, 4)):
                omega[image == n] = omega[image == n].mean()
        for c in [None] if mode == "batch" else range(6):
            here = members if c is None else members & (label == c)
            if here.any():
                u = (omega[here] / omega[here].mean()).clamp_min(0.1)
                w[here] = u / u.mean()
    domain = bound.measure(run, items, weights=True)
    row = bound.describe(domain, domain, otp, 0.1)
    assert row["n_eff"] == pytest.approx(effective_sample_size(w), rel=1e-4)
    assert row["radius_weighted"] == pytest.approx(alignment_radius(emb, label, otp, w), rel=1e-4)
    assert row["risk_weighted"] == pytest.approx(risk(emb, label, otp, 0.1, w), rel=1e-4)
    assert (row["share_shift"] < 1e-6) is (mode != "batch") and row["holds"]


def test_a_row_is_made_of_the_sums_that_it_names(tiny):
    run = tiny[0]
    source, target = (bound.measure(run, data.list_items(*which)) for which in (("src", "", "train"), ("far", "", "val")))
    row = bound.describe(source, target, run.ppar.otp, 0.1)
    at_hub = (bound.shares(target, 6) * bound.hub_loss(run.ppar.otp, 0.1).double()).sum().item()
    assert row["right_local"] == pytest.approx(at_hub + bound.mean(target, "climb"))
    assert row["slope_measured"] * row["radius_otp"] == pytest.approx(row["risk"] - at_hub)
    assert row["n_eff"] == row["pixels"] == len(target["label"])


def test_limit_takes_evenly_spaced_images_and_a_domain_of_void_is_refused_with_its_name(tiny):
    run, items = tiny[0], data.list_items("src", "", "train")
    few = bound.measure(run, items, limit=2)
    assert bound.mean(few, "risk") == pytest.approx(bound.mean(bound.measure(run, [items[0], items[2]]), "risk"), rel=1e-6)
    with pytest.raises(data.UserError, match="src.*labelled pixel"):
        bound.measure(run, items[4:])


def test_sources_are_mixed_in_equal_parts_whatever_their_size(tiny):
    run, items = tiny[0], data.list_items("src", "", "train")
    one, two = bound.measure(run, items[:1]), bound.measure(run, items[1:4])
    means, parts = [bound.mean(d, "risk") for d in (one, two)], [bound.shares(d, 6) for d in (one, two)]
    n1, n2 = len(one["label"]), len(two["label"])
    mixed = bound.mixture([one, two])
    assert bound.mean(mixed, "risk") == pytest.approx(sum(means) / 2) and mixed["images"] == 4
    assert torch.allclose(bound.shares(mixed, 6), sum(parts) / 2)
    w = torch.cat([torch.full((n1,), 1 / n1), torch.full((n2,), 1 / n2)])
    assert bound.describe(mixed, mixed, run.ppar.otp, 0.1)["n_eff"] == pytest.approx(effective_sample_size(w), rel=1e-5)


@pytest.mark.parametrize("source", [["src"], ["src", "src-b"], ["no-val"]])
@pytest.mark.parametrize("method", ["ppar", "erm"])
def test_measuring_a_run_writes_every_term_and_finds_no_violation(tiny, capsys, source, method):
    run = tiny[0]
    vars(run.config).update(source=source, targets=["far", "src-c", "other"], method=method)
    if method == "erm":
        run.ppar.vtp, run.config.reweight = None, "none"
    report = bound.measure_run(run, limit=0)
    stored = json.loads((run.path / "bound.json").read_text())
    assert stored == json.loads(json.dumps(report))
    names = ["source"] + ["source held out"] * (source != ["no-val"]) + run.config.targets
    assert list(stored["domains"]) == names and bool(stored["notes"]) == (source == ["no-val"])
    for name, row in stored["domains"].items():
        assert row["holds"] is True and all(row["checks"].values()), (name, row["checks"])
        assert row["left"] == row["risk"] <= row["right_local"] <= row["right_direct"] <= row["right"]
        recomputed = (stored["domains"]["source"]["risk"] + row["slope"] * stored["domains"]["source"]["radius_otp"]
                      + row["lipschitz"] * row["radius_otp"] + row["osc"] * row["tv"])
        assert row["right"] == pytest.approx(recomputed), "the right side can be read off the other columns"
        assert (row["radius_vtp"] is None) == (row["gap"] is None) == (method == "erm")
        assert 0 <= row["tv"] <= 1 and row["n_eff"] <= row["pixels"] * (1 + 1e-9)
        assert row["vacuous"] is (row["right"] > row["ceiling"])
        assert ("radius_weighted" in row) == (method == "ppar" and name == "source"), "weights belong to training data"
    first = stored["domains"]["source"]
    assert first["tv"] == 0 and (first["n_eff"] < first["pixels"] or method == "erm")
    assert (run.path / "bound.png").stat().st_size > 10000
    said = capsys.readouterr().out
    assert "analysis only" in said and "BUG" not in said.upper() and "rank correlation" in said


def test_the_domains_are_read_as_the_run_was_configured(tiny):
    run, calls, conventions = tiny
    vars(run.config).update(holdout=3, harmful=0.2, mapillary="B")
    bound.measure_run(run, limit=2)
    assert calls == [("src", "train", 3, 0.2), ("src", "val", 3, 0.0), ("far", "val", 3, 0.0)] and conventions == {"B"}
    rows = json.loads((run.path / "bound.json").read_text())["domains"]
    assert all(row["images"] <= 2 for row in rows.values())


def test_a_vacuous_bound_is_called_so(tiny):
    run = tiny[0]
    assert bound.measure_run(run, limit=1)["domains"]["far"]["vacuous"] is True  # random pixels, at random places
    otp, label = run.ppar.otp, torch.randint(0, 5, (200,))
    arrived = {name: value.double() for name, value in bound.pixel_terms(otp[label], label, otp, 0.1, bound.span_basis(otp)).items()}
    arrived.update(label=label, mass=torch.ones(200).double(), weight=torch.ones(200).double(), images=1)
    row = bound.describe(arrived, arrived, otp, 0.1)
    assert row["radius_otp"] < 1e-3 and row["vacuous"] is False and row["holds"]


def test_a_violation_is_reported_and_not_hidden(tiny, capsys, monkeypatch):
    """If a right side came out too small, `holds` would say so: the check itself can fail."""
    monkeypatch.setattr(bound, "hub_bound", lambda *terms: 0.0)
    report = bound.measure_run(tiny[0], limit=0)
    assert not any(row["holds"] for row in report["domains"].values())
    assert "NO: a bug" in capsys.readouterr().out


def test_measuring_leaves_the_network_as_it_was(tiny):
    module = tiny[0].ppar
    before = {name: value.clone() for name, value in module.state_dict().items()}
    bound.measure_run(tiny[0], limit=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_demonstration(capsys):
    bound._demo()
    assert "hub bound" in capsys.readouterr().out
