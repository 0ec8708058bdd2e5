"""Eq. 3 and 4: align.py against plain loops, closed forms and what must not change it."""

import ast
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import align
from align import VOID, alignment_loss, alignment_map, progress, progressive_alignment_map

torch.set_num_threads(1)

B, K, D, H, W = 2, 5, 7, 3, 4
TAU = 0.2


def random_case(seed=0, batch=B, void=0.25):
    """emb of any length, label with some void, unit prototypes per image, positive weights (also on void pixels)."""
    g = torch.Generator().manual_seed(seed)
    emb = torch.randn(batch, D, H, W, generator=g) * (0.2 + 3 * torch.rand(batch, 1, H, W, generator=g))
    label = torch.randint(0, K, (batch, H, W), generator=g)
    label[torch.rand(batch, H, W, generator=g) < void] = VOID
    prototypes = F.normalize(torch.randn(batch, K, D, generator=g), dim=-1)
    weight = 0.1 + torch.rand(batch, H, W, generator=g)
    return emb, label, prototypes, weight


def loss_in_loops(emb, label, prototypes, tau, weight=None):
    """Eq. 3 in Python numbers; prototypes (B, K, D)."""
    total, mass = 0.0, 0.0
    for b in range(emb.shape[0]):
        for i in range(emb.shape[2]):
            for j in range(emb.shape[3]):
                y = label[b, i, j].item()
                if y == 255:
                    continue
                z = emb[b, :, i, j].tolist()
                length = math.sqrt(sum(a * a for a in z))
                scores = [sum(a * p for a, p in zip(z, row)) / length / tau for row in prototypes[b].tolist()]
                w = 1.0 if weight is None else weight[b, i, j].item()
                total += w * (math.log(sum(math.exp(s) for s in scores)) - scores[y])
                mass += w
    return total / mass


# ------------------------------------------------------------------------------------------------------------- Eq. 3


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_eq_3_equals_plain_loops(tau, weighted):
    emb, label, prototypes, weight = random_case()
    weight = weight if weighted else None
    loss = alignment_loss(emb, label, prototypes, tau, weight)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_in_loops(emb, label, prototypes, tau, weight), rel=1e-5)


def test_the_gradient_is_that_of_the_formula_in_double_precision():
    emb, label, prototypes, weight = random_case()
    emb.requires_grad_(), prototypes.requires_grad_()
    got = torch.autograd.grad(alignment_loss(emb, label, prototypes, TAU, weight), (emb, prototypes))
    z, p = emb.detach().double().requires_grad_(), prototypes.detach().double().requires_grad_()
    cosine = torch.stack([torch.einsum("dhw,kd->hwk", F.normalize(z, dim=1)[b], F.normalize(p, dim=2)[b])
                          for b in range(B)])
    valid = label != VOID
    each = -(cosine / TAU).log_softmax(-1)[valid].gather(1, label[valid][:, None])[:, 0]
    expected = torch.autograd.grad((each * weight[valid]).sum() / weight[valid].double().sum(), (z, p))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_a_pixel_on_its_prototype_among_orthonormal_ones_has_the_closed_form(tau):
    prototypes = torch.eye(K, D)
    label = torch.arange(K).view(1, 1, K)
    emb = 3 * prototypes.T.reshape(1, D, 1, K)  # pixel k points at prototype k
    expected = math.log(1 + (K - 1) * math.exp(-1 / tau))
    assert alignment_loss(emb, label, prototypes, tau).item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    wrong = math.log(math.exp(1 / tau) + K - 1)  # a pixel on another prototype: its own cosine is 0
    assert alignment_loss(emb, (label + 1) % K, prototypes, tau).item() == pytest.approx(wrong, rel=1e-5)


@pytest.mark.parametrize("tau", [0.07, 1.0])
@pytest.mark.parametrize("where", ["between all prototypes", "orthogonal to all"])
def test_equal_cosines_give_log_k_at_every_temperature(where, tau):
    prototypes = torch.eye(K, D)
    direction = prototypes.sum(0) if where == "between all prototypes" else torch.eye(D)[K]
    emb = direction.view(1, D, 1, 1).expand(1, D, H, W)
    label = torch.randint(0, K, (1, H, W), generator=torch.Generator().manual_seed(0))
    assert alignment_loss(emb, label, prototypes, tau).item() == pytest.approx(math.log(K), rel=1e-5)


def test_one_set_of_prototypes_equals_a_copy_for_every_image():
    emb, label, prototypes, weight = random_case()
    one = prototypes[0]
    copies = one.expand(B, K, D)
    torch.testing.assert_close(alignment_loss(emb, label, one, TAU, weight),
                               alignment_loss(emb, label, copies, TAU, weight))


def test_every_image_is_compared_with_its_own_prototypes():
    emb, label, prototypes, _ = random_case()
    per_image = align.cosine_similarity_map(emb, prototypes)
    for b in range(B):
        torch.testing.assert_close(per_image[b], align.cosine_similarity_map(emb[b:b + 1], prototypes[b])[0])
    assert not torch.allclose(per_image[1], align.cosine_similarity_map(emb, prototypes[0])[1], atol=0.1)


def test_the_similarity_is_a_cosine():
    emb, _, prototypes, _ = random_case()
    sim = align.cosine_similarity_map(emb, prototypes)
    assert sim.shape == (B, K, H, W) and sim.abs().max() <= 1 + 1e-6
    on_top = prototypes[:, 2, :, None, None].expand(B, D, H, W) * 7
    torch.testing.assert_close(align.cosine_similarity_map(on_top, prototypes)[:, 2], torch.ones(B, H, W))
    torch.testing.assert_close(align.cosine_similarity_map(-on_top, prototypes * 5)[:, 2], -torch.ones(B, H, W))


def test_relabelled_classes_leave_the_loss():
    emb, label, prototypes, weight = random_case()
    order = torch.tensor([3, 0, 4, 1, 2])  # the new row c is the old class order[c]
    new_id = torch.full((256,), VOID)
    new_id[order] = torch.arange(K)
    torch.testing.assert_close(alignment_loss(emb, new_id[label], prototypes[:, order], TAU, weight),
                               alignment_loss(emb, label, prototypes, TAU, weight))


def test_scaled_embeddings_leave_the_loss():
    emb, label, prototypes, weight = random_case()
    scale = torch.logspace(-3, 3, B * H * W).view(B, 1, H, W)
    torch.testing.assert_close(alignment_loss(emb * scale, label, prototypes, TAU, weight),
                               alignment_loss(emb, label, prototypes, TAU, weight))


def test_void_pixels_change_neither_value_nor_gradient():
    emb, label, prototypes, weight = random_case()
    void = label == VOID
    assert 0 < void.sum() < void.numel()
    other = torch.where(void[:, None], torch.randn_like(emb) * 50, emb)
    other_weight = torch.where(void, torch.full_like(weight, 9.0), weight)
    results = []
    for e, w in ((emb, weight), (other, other_weight)):
        e, p = e.clone().requires_grad_(), prototypes.clone().requires_grad_()
        loss = alignment_loss(e, label, p, TAU, w)
        results.append((loss, *torch.autograd.grad(loss, (e, p))))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][2], results[1][2])
    assert all((grad.movedim(1, -1)[void] == 0).all() for _, grad, _ in results)
    assert (results[0][1].movedim(1, -1)[~void] != 0).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_is_the_weighted_mean_of_its_halves(weighted):
    emb, label, prototypes, weight = random_case(batch=4)
    weight = weight if weighted else None
    mass = (label != VOID) * (1.0 if weight is None else weight)
    expected = 0
    for s in (slice(0, 1), slice(1, 4)):
        part = alignment_loss(emb[s], label[s], prototypes[s], TAU, None if weight is None else weight[s])
        expected = expected + part * mass[s].sum() / mass.sum()
    torch.testing.assert_close(alignment_loss(emb, label, prototypes, TAU, weight), expected)


def test_only_the_ratio_of_the_weights_counts():
    emb, label, prototypes, weight = random_case()
    torch.testing.assert_close(alignment_loss(emb, label, prototypes, TAU, 100 * weight),
                               alignment_loss(emb, label, prototypes, TAU, weight))
    torch.testing.assert_close(alignment_loss(emb, label, prototypes, TAU, torch.full_like(weight, 0.5)),
                               alignment_loss(emb, label, prototypes, TAU))


@pytest.mark.parametrize("why", ["all void", "all void, weighted", "all weights zero"])
@pytest.mark.parametrize("per_image", [False, True])
def test_an_all_void_crop_gives_zero_loss_and_zero_gradient(why, per_image):
    emb, label, prototypes, weight = random_case(void=0.0)
    if why.startswith("all void"):
        label = torch.full_like(label, VOID)
    weight = {"all void": None, "all void, weighted": weight, "all weights zero": torch.zeros_like(weight)}[why]
    emb.requires_grad_()
    prototypes = (prototypes if per_image else prototypes[0]).clone().requires_grad_()
    loss = alignment_loss(emb, label, prototypes, TAU, weight)
    loss.backward()
    assert loss.item() == 0
    for grad in (emb.grad, prototypes.grad):
        assert (grad == 0).all()  # false for NaN too


def test_one_all_void_image_does_not_dilute_the_others():
    emb, label, prototypes, _ = random_case(void=0.0)
    label[1] = VOID
    torch.testing.assert_close(alignment_loss(emb, label, prototypes, TAU),
                               alignment_loss(emb[:1], label[:1], prototypes[:1], TAU))


def test_a_batch_of_one_and_a_single_pixel_work():
    emb, label, prototypes, weight = random_case(batch=1, void=0.0)
    assert alignment_loss(emb, label, prototypes, TAU, weight).item() == pytest.approx(
        loss_in_loops(emb, label, prototypes, TAU, weight), rel=1e-5)
    one = (emb[:, :, :1, :1], label[:, :1, :1], prototypes)
    assert alignment_loss(*one, TAU).item() == pytest.approx(loss_in_loops(*one, TAU), rel=1e-5)


def test_the_gradient_reaches_pixels_and_prototypes_and_not_the_weights():
    emb, label, prototypes, weight = random_case()
    emb.requires_grad_(), prototypes.requires_grad_(), weight.requires_grad_()
    alignment_loss(emb, label, prototypes, TAU, weight).backward()
    labelled = label != VOID
    assert (emb.grad.norm(dim=1)[labelled] > 0).all()
    assert (prototypes.grad.norm(dim=2) > 0).all()
    assert weight.grad is None


@pytest.mark.parametrize("tau", [0, 0.0, -0.1])
def test_a_temperature_that_is_not_positive_is_refused(tau):
    emb, label, prototypes, _ = random_case()
    with pytest.raises(ValueError, match="tau must be positive"):
        alignment_loss(emb, label, prototypes, tau)


def test_bfloat16_embeddings_give_a_float32_loss_near_the_exact_one():
    emb, label, prototypes, weight = random_case()
    exact = alignment_loss(emb, label, prototypes, TAU, weight)
    rounded = alignment_loss(emb.bfloat16(), label, prototypes.bfloat16(), TAU, weight)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("per_image", [False, True])
def test_autocast_does_not_lower_the_precision(per_image):
    emb, label, prototypes, weight = random_case()
    prototypes = prototypes if per_image else prototypes[0]
    exact = alignment_loss(emb, label, prototypes, TAU, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment_loss(emb, label, prototypes, TAU, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


def test_a_long_half_precision_embedding_does_not_overflow():
    emb, label, prototypes, weight = random_case()
    emb = F.normalize(emb, dim=1).half() * 60000  # half precision ends at 65504: a sum of squares is inf
    emb.requires_grad_()
    loss = alignment_loss(emb, label, prototypes.half(), TAU, weight)
    loss.backward()
    assert torch.isfinite(emb.grad).all()
    expected = alignment_loss(emb.detach().float() / 60000, label, prototypes.half().float(), TAU, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_a_zero_embedding_is_as_far_from_every_prototype():
    prototypes = torch.eye(K, D)
    emb = torch.zeros(1, D, 1, 1, requires_grad=True)
    loss = alignment_loss(emb, torch.zeros(1, 1, 1, dtype=torch.long), prototypes, TAU)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(K)) and torch.isfinite(emb.grad).all()


# ------------------------------------------------------------------------------------------------------------- Eq. 4


def test_progress_has_its_ends_and_its_midpoint():
    assert progress(0, 100, 0.2, 0.8) == 0 and progress(20, 100, 0.2, 0.8) == 0 and progress(10, 100, 0.2, 0.8) == 0
    assert progress(50, 100, 0.2, 0.8) == pytest.approx(0.5)
    assert progress(80, 100, 0.2, 0.8) == pytest.approx(1, abs=1e-12) and progress(100, 100, 0.2, 0.8) == 1
    assert progress(35, 100, 0.2, 0.8) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))  # a quarter of the way
    assert progress(0, 10, 0, 1) == 0 and progress(5, 10, 0, 1) == pytest.approx(0.5) and progress(10, 10, 0, 1) == 1
    assert isinstance(progress(3, 10, 0, 1), float)


def test_progress_rises_without_a_jump_and_without_a_kink():
    start, end, n = 0.1, 0.6, 3000
    values = [progress(step, n, start, end) for step in range(n + 1)]
    slope = [b - a for a, b in zip(values, values[1:])]
    bend = [b - a for a, b in zip(slope, slope[1:])]
    width = (end - start) * n  # steps of the ramp
    assert min(slope) >= 0
    assert max(slope) <= 1.001 * math.pi / 2 / width  # a jump would be far higher
    assert max(map(abs, bend)) <= 1.001 * math.pi ** 2 / 2 / width ** 2  # a kink, as of a linear ramp, is 1 / width


@pytest.mark.parametrize("start, end", [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_progress_refuses_a_bad_ramp(start, end):
    with pytest.raises(ValueError, match="start"):
        progress(1, 10, start, end)


def test_progress_depends_on_the_fraction_of_the_run_alone():
    for step in range(11):
        assert progress(step, 10, 0.1, 0.7) == progress(100 * step, 1000, 0.1, 0.7)


def test_the_map_has_the_loss_of_every_pixel_and_zero_on_void():
    emb, label, vtp, weight = random_case()
    loss, valid = alignment_map(emb, label, vtp, TAU), label != VOID
    assert loss.shape == label.shape and (loss[~valid] == 0).all() and (loss[valid] > 0).all()
    w = weight * valid
    assert ((w * loss).sum() / w.sum()).item() == pytest.approx(loss_in_loops(emb, label, vtp, TAU, weight), rel=1e-5)


def test_eq_4_mixes_the_two_goals_and_touches_none_whose_factor_is_zero():
    emb, label, vtp, _ = random_case()
    otp = random_case(seed=1)[2][0].requires_grad_()
    emb.requires_grad_(), vtp.requires_grad_()
    maps = [alignment_map(emb, label, p, TAU) for p in (vtp, otp)]
    assert (maps[0] - maps[1]).abs().max() > 0.05
    for lam in (0.0, 0.3, 0.5, 1.0):
        got = progressive_alignment_map(emb, label, None if lam == 0 else otp, None if lam == 1 else vtp, lam, TAU)
        torch.testing.assert_close(got, (1 - lam) * maps[0] + lam * maps[1])
    got = progressive_alignment_map(emb, label, otp, vtp, 0.5, TAU)
    got.sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (emb, vtp, otp))


@pytest.mark.parametrize("name, expected", [("progressive", (0, 0.25, 1)), ("reversed", (1, 0.75, 0)),
                                            ("otp", (1, 1, 1)), ("vtp", (0, 0, 0)), ("both", (0.5, 0.5, 0.5))])
def test_each_schedule_is_what_its_name_says(name, expected):
    assert tuple(align.SCHEDULES[name](r) for r in (0.0, 0.25, 1.0)) == expected


def test_there_are_five_schedules():
    assert set(align.SCHEDULES) == {"progressive", "reversed", "otp", "vtp", "both"}


# ---------------------------------------------------------------------------------------------------------- the file


def test_align_needs_torch_alone_and_its_demonstration_runs(capsys):
    tree = ast.parse(inspect.getsource(align))
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"math", "torch"}
    align._demo()
    assert "lambda 1.00" in capsys.readouterr().out
