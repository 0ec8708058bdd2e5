"""Eq. 3 and 4: align.py against plain loops, closed forms and what must not change it."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import align
from align import alignment_loss, alignment_map, goal, progress

torch.set_num_threads(1)

B, K, D, H, W = 2, 5, 7, 3, 4
TAU, VOID = 0.2, 255


def random_case(seed=0, size=(B, H, W), void=0.25):
    """emb of any length, label with some void, unit prototypes per image, positive weights (also on void pixels)."""
    g = torch.Generator().manual_seed(seed)
    batch = size[0]
    emb = torch.randn(batch, D, *size[1:], generator=g) * (0.2 + 3 * torch.rand(batch, 1, *size[1:], generator=g))
    label = torch.randint(0, K, size, generator=g)
    label[torch.rand(size, generator=g) < void] = VOID
    prototypes = F.normalize(torch.randn(batch, K, D, generator=g), dim=-1)
    return emb, label, prototypes, 0.1 + torch.rand(size, generator=g)


def map_in_loops(emb, label, prototypes, tau):
    """Eq. 3 before its mean, in Python numbers, 0 on void; prototypes (B, K, D)."""
    losses = torch.zeros(label.shape)
    for b, i, j in (label != 255).nonzero().tolist():
        z = emb[b, :, i, j].tolist()
        length = math.sqrt(sum(a * a for a in z))
        scores = [sum(a * p for a, p in zip(z, row)) / length / tau for row in prototypes[b].tolist()]
        losses[b, i, j] = math.log(sum(math.exp(s) for s in scores)) - scores[label[b, i, j]]
    return losses


# ------------------------------------------------------------------------------------------------------------- Eq. 3


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("size", [(B, H, W), (1, H, W), (1, 1, 1)])
@pytest.mark.parametrize("per_image", [True, False])
def test_eq_3_equals_plain_loops(tau, size, per_image):
    emb, label, prototypes, weight = random_case(size=size, void=0.25 if size[1] > 1 else 0)
    prototypes = prototypes if per_image else prototypes[0]
    expected = map_in_loops(emb, label, prototypes.expand(len(emb), K, D), tau)
    torch.testing.assert_close(alignment_map(emb, label, prototypes, tau), expected, rtol=1e-5, atol=1e-6)
    for given, w in ((None, torch.ones(size)), (weight, weight), (1e-11 * weight, 1e-11 * weight)):
        mean = (w * expected).sum() / max(1e-8, w[label != VOID].sum())  # next to no weight: on the way to 0
        torch.testing.assert_close(alignment_loss(emb, label, prototypes, tau, given), mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [0.2, 1.0])
@pytest.mark.parametrize("where", ["on its own", "opposite", "on another", "between all", "orthogonal to all", "zero", "too short"])
def test_a_pixel_among_orthonormal_prototypes_has_the_closed_form(where, tau):
    prototypes, axis = torch.eye(K, D), torch.eye(D)
    pixel, expected = {
        "on its own": (3 * axis[0], math.log(1 + (K - 1) * math.exp(-1 / tau))),
        "opposite": (-axis[0], math.log(1 + (K - 1) * math.exp(1 / tau))),
        "on another": (axis[1], math.log(math.exp(1 / tau) + K - 1)),
        "between all": (prototypes.sum(0), math.log(K)),
        "orthogonal to all": (axis[K], math.log(K)),
        "zero": (0 * axis[0], math.log(K)),
        "too short": (5e-9 * axis[0], math.log(1 + (K - 1) * math.exp(-0.5 / tau))),  # divided by 1e-8 and not by its length
    }[where]
    emb = pixel.reshape(1, D, 1, 1).requires_grad_()
    loss = alignment_loss(emb, torch.zeros(1, 1, 1, dtype=torch.long), prototypes, tau)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4) and torch.isfinite(emb.grad).all()


def test_the_gradient_is_that_of_the_formula_in_double_precision_and_the_weights_get_none():
    tensors = random_case()
    emb, label, prototypes, weight = (t.requires_grad_(t.is_floating_point()) for t in tensors)
    loss = alignment_loss(emb, label, prototypes, TAU, weight)
    *got, of_weight = torch.autograd.grad(loss, (emb, prototypes, weight), allow_unused=True)
    z, p, w = (t.detach().double().requires_grad_() for t in (emb, prototypes, weight))
    cosine = torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(p, dim=2))
    each = F.cross_entropy(cosine / TAU, label, ignore_index=VOID, reduction="none")
    expected = torch.autograd.grad((w * each).sum() / w[label != VOID].sum(), (z, p))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)
    assert of_weight is None
    assert (got[0].norm(dim=1)[label != VOID] > 0).all() and (got[1].norm(dim=2) > 0).all()


def test_lengths_names_of_classes_and_the_scale_of_the_weights_leave_the_loss():
    emb, label, prototypes, weight = random_case()
    expected = alignment_loss(emb, label, prototypes, TAU, weight)
    order = torch.tensor([3, 0, 4, 1, 2])  # the new row c is the old class order[c]
    new_id = torch.full((256,), VOID)
    new_id[order] = torch.arange(K)
    scale = torch.logspace(-3, 3, B * H * W).view(B, 1, H, W)
    for e, y, p, w in ((emb * scale, label, prototypes, weight), (emb, label, 5 * prototypes, weight),
                       (emb, new_id[label], prototypes[:, order], weight), (emb, label, prototypes, 100 * weight)):
        torch.testing.assert_close(alignment_loss(e, y, p, TAU, w), expected)


def test_void_pixels_change_neither_value_nor_gradient():
    emb, label, prototypes, weight = random_case()
    void = label == VOID
    assert 0 < void.sum() < void.numel()
    other = torch.where(void[:, None], torch.randn_like(emb) * 50, emb)
    results = []
    for e, w in ((emb, weight), (other, weight.where(~void, 9.0))):
        e, p = e.clone().requires_grad_(), prototypes.clone().requires_grad_()
        loss = alignment_loss(e, label, p, TAU, w)
        results.append((loss, *torch.autograd.grad(loss, (e, p))))
    torch.testing.assert_close(*results)
    assert all((grad.movedim(1, -1)[void] == 0).all() for _, grad, _ in results)


@pytest.mark.parametrize("label_all, weight_all", [(VOID, None), (VOID, 1.0), (0, 0.0)])
def test_an_all_void_crop_or_weights_that_are_all_zero_give_zero_loss_and_zero_gradient(label_all, weight_all):
    emb, label, prototypes, weight = random_case()
    weight = None if weight_all is None else torch.full_like(weight, weight_all)
    emb.requires_grad_(), prototypes.requires_grad_()
    loss = alignment_loss(emb, torch.full_like(label, label_all), prototypes, TAU, weight)
    loss.backward()
    assert loss.item() == 0
    for grad in (emb.grad, prototypes.grad):
        assert (grad == 0).all()  # false for NaN too


@pytest.mark.parametrize("tau", [0, -0.1])
def test_a_temperature_that_is_not_positive_is_refused(tau):
    emb, label, prototypes, _ = random_case()
    with pytest.raises(ValueError, match="tau must be positive"):
        alignment_loss(emb, label, prototypes, tau)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, length", [(torch.float32, 1), (torch.bfloat16, 1), (torch.half, 60000)])
def test_the_loss_is_computed_in_float32_whatever_the_embeddings_come_in(dtype, length, autocast):
    emb, label, prototypes, weight = random_case()
    emb = (F.normalize(emb, dim=1) * length).to(dtype)  # half precision ends at 65504: a sum of squares would be inf
    prototypes = prototypes.to(dtype)
    expected = alignment_loss(emb.float() / length, label, prototypes.float(), TAU, weight)
    emb.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = alignment_loss(emb, label, prototypes, TAU, weight)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # the dtype too
    assert torch.isfinite(emb.grad).all()


@pytest.mark.parametrize("row, col", [(1, 1), (2, 4), (7, 3), (8, 8)])
def test_a_cell_has_the_label_of_the_pixel_at_its_centre(row, col):
    label = torch.arange(B * H * row * W * col).view(B, H * row, W * col)
    expected = label.unflatten(2, (W, col)).unflatten(1, (H, row))[:, :, row // 2, :, col // 2]
    assert torch.equal(align.labels_on_grid(label, torch.empty(B, D, H, W)), expected)


@pytest.mark.parametrize("size, grid", [((18, 18), (4, 4)), ((16, 18), (4, 4)), ((18, 16), (4, 4)), ((2, 4), (4, 4))])
def test_a_label_that_does_not_divide_into_cells_is_refused_with_both_sizes(size, grid):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels .* {grid[0]} x {grid[1]} cells: .* multiple"):
        align.labels_on_grid(torch.zeros(1, *size, dtype=torch.long), torch.empty(1, D, *grid))


WRONG_LABELS = {  # what is wrong: (the label made of a right one, what the sentence says)
    "uint8": (lambda label: label.byte(), "int64, not torch.uint8"),
    "int32": (lambda label: label.int(), "int64, not torch.int32"),
    "float": (lambda label: label.float(), "int64, not torch.float32"),
    "larger": (lambda label: label.repeat_interleave(2, 1).repeat_interleave(2, 2), r"\(2, 6, 8\) .* \(2, 3, 4\): call labels_on_grid"),
    "another batch": (lambda label: label[:1], r"\(1, 3, 4\) .* \(2, 3, 4\)"),
    "K": (lambda label: label.where(label != 2, K), "the id 5: ids must be 0 to 4, or 255"),
    "254": (lambda label: label.where(label != 2, 254), "the id 254"),
    "256": (lambda label: label.where(label != 2, 256), "the id 256"),
    "the last one, from behind": (lambda label: label.where(label != 2, -1), "the id -1"),
    "-100": (lambda label: label.where(label != 255, -100), "the id -100"),  # torch's own number for void
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_what_is_no_label_is_refused_in_one_sentence(kind):
    emb, label, prototypes, weight = random_case()
    spoil, said = WRONG_LABELS[kind]
    for function in (lambda y: alignment_map(emb, y, prototypes, TAU), lambda y: alignment_loss(emb, y, prototypes[0], TAU),
                     lambda y: align.distance(emb, y, prototypes[0])):
        with pytest.raises(ValueError, match=said):
            function(spoil(label))
        function(label)


def test_types_and_shapes_are_checked_and_the_ids_are_not_asked_for(monkeypatch):
    """To read an id, the program waits for a GPU. A tensor on "meta" has no ids at all: whoever asks gets an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    emb, label, prototypes, _ = (x.to("meta") for x in random_case())
    assert alignment_map(emb, label, prototypes, TAU).shape == align.distance(emb, label, prototypes).shape == (B, H, W)
    for wrong in (label.byte(), label[:1]):
        with pytest.raises(ValueError, match="a label"):
            alignment_map(emb, wrong, prototypes, TAU)


# ------------------------------------------------------------------------------------------------------------- Eq. 4


@pytest.mark.parametrize("steps", [100, 1000])
def test_progress_is_half_a_cosine_of_the_fraction_of_the_run_between_its_ends(steps):
    for fraction, expected in ((0.35, (1 - math.sqrt(0.5)) / 2), (0.5, 0.5), (0.65, (1 + math.sqrt(0.5)) / 2), (0.8, 1)):
        assert progress(round(fraction * steps), steps, 0.2, 0.8) == pytest.approx(expected, abs=1e-12)
    outside = [progress(round(fraction * steps), steps, 0.2, 0.8) for fraction in (0, 0.1, 0.2, 0.9, 1)]
    assert outside == [0, 0, 0, 1, 1] and all(isinstance(value, float) for value in outside)
    assert (progress(0, steps, 0, 1), progress(steps, steps, 0, 1)) == (0, 1)


@pytest.mark.parametrize("start, end", [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 1.1), (math.nan, 0.5)])
def test_progress_refuses_a_bad_ramp(start, end):
    with pytest.raises(ValueError, match="start"):
        progress(1, 10, start, end)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_eq_4_equals_plain_loops_over_images_and_classes(lam):
    vtp, otp = random_case()[2], random_case(seed=1)[2][0]
    got = goal(otp, vtp, lam).expand(B, K, D)
    assert lam != 1 or goal(otp, None, lam) is otp, "at 1 it is the OTP itself, and no VTP is needed"
    for b in range(B):
        for c in range(K):
            row = [(1 - lam) * v + lam * o for v, o in zip(vtp[b, c].tolist(), otp[c].tolist())]
            length = math.sqrt(sum(x * x for x in row))
            assert got[b, c].tolist() == pytest.approx([x / length for x in row], abs=1e-6)


def test_between_two_prototypes_at_a_right_angle_the_goal_has_the_closed_form():
    """Its length is 1, and the tangent of its angle to the VTP is lam / (1 - lam)."""
    vtp, otp = torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[0, 1.0, 0]])
    angles = []
    for lam in (0.0, 0.2, 0.5, 0.75):
        x, y, z = goal(otp, vtp, lam)[0, 0].tolist()
        angles.append(math.atan2(y, x))
        assert (x * x + y * y, z) == (pytest.approx(1), 0)
    assert angles == pytest.approx([0, math.atan(0.25), math.pi / 4, math.atan(3)])


def test_each_schedule_is_what_its_name_says_without_a_jump():
    shares = {name: tuple(schedule(r) for r in (0.0, 0.25, 1.0)) for name, schedule in align.SCHEDULES.items()}
    assert shares == {"otp-to-vtp": (1, 0.75, 0), "vtp-to-otp": (0, 0.25, 1), "otp": (1, 1, 1), "vtp": (0, 0, 0), "none": (None,) * 3}
