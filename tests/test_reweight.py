"""Eq. 5 and 6: reweight.py against plain loops, and the means and shares that it promises to keep."""

import inspect
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import reweight
from reweight import VOID, image_reliability, learning_weights, reliability

torch.set_num_threads(1)

B, K, D, H, W = 2, 4, 6, 3, 5
TAU = 0.3


def random_case(size=(7, 11)):
    """emb of any length on the H x W grid, label of `size` with some void, unit prototypes per image."""
    g = torch.Generator().manual_seed(0)
    emb = torch.randn(B, D, H, W, generator=g) * (0.2 + 3 * torch.rand(B, 1, H, W, generator=g))
    label = torch.randint(0, K, (B, *size), generator=g)
    label[torch.rand(B, *size, generator=g) < 0.25] = VOID
    return emb, label, F.normalize(torch.randn(B, K, D, generator=g), dim=-1)


def random_reliability(seed=0, batch=4, classes=K):
    """omega in [0, 1], also on void, where nobody may look; class 0 far more frequent than the others and far easier."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, 9, 11), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.6] = 0
    label[torch.rand(label.shape, generator=g) < 0.2] = VOID
    return torch.rand(label.shape, generator=g) * torch.where(label == 0, 1.0, 0.3), label


def renamed(label, *ids):
    """label with class c under the name ids[c]; void stays void."""
    return torch.tensor([*ids] + [VOID] * (256 - len(ids)))[label]


def reliability_in_loops(emb, label, prototypes, tau):
    """Eq. 5 in Python numbers; prototypes (B, K, D); every pixel of the label asks the cell of the grid it lies in."""
    height, width = label.shape[1:]
    omega = torch.zeros(label.shape)
    for b, y, x in (label != 255).nonzero().tolist():
        z = emb[b, :, math.floor(y * H / height + 1e-9), math.floor(x * W / width + 1e-9)].tolist()
        length = math.sqrt(sum(a * a for a in z))
        e = [math.exp(sum(a * p for a, p in zip(z, row)) / length / tau) for row in prototypes[b].tolist()]
        omega[b, y, x] = e[label[b, y, x]] / sum(e)
    return omega


def weights_in_loops(omega, label, ramp, w_min, per_class=True):
    """Eq. 6 in Python numbers, within each class or over all labelled pixels."""
    groups = {}
    for position in map(tuple, (label != 255).nonzero().tolist()):
        groups.setdefault(label[position].item() if per_class else "all", []).append(position)
    weight = torch.zeros(omega.shape)
    for positions in groups.values():
        mean = sum(omega[p].item() for p in positions) / len(positions)
        u = [max(w_min, 1 + ramp * (omega[p].item() / mean - 1)) for p in positions]
        for p, value in zip(positions, u):
            weight[p] = value / (sum(u) / len(u))
    return weight


def as_two_processes(work, *tensors):
    """work(*halves, reduce) for both halves of the batch, each in a thread that stands for a process, joined."""
    barrier, slots = threading.Barrier(2, timeout=20), [None, None]

    def process(rank):
        def reduce(x):  # waits for the other process and gives the sum, as an all-reduce does
            slots[rank] = x.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return work(*(t.chunk(2)[rank] for t in tensors), reduce)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(process, (0, 1))))


# ------------------------------------------------------------------------------------------------------------- Eq. 5


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (7, 11), (10, 9), (16, 33)])  # H, W; twice; no whole factor
@pytest.mark.parametrize("per_image", [True, False])
def test_eq_5_equals_plain_loops_over_the_pixels_and_their_cells_and_has_no_gradient(size, per_image):
    emb, label, prototypes = random_case(size)
    prototypes = prototypes if per_image else prototypes[0]
    omega = reliability(emb.requires_grad_(), label, prototypes.requires_grad_(), TAU)
    expected = reliability_in_loops(emb, label, prototypes.expand(B, K, D), TAU)
    torch.testing.assert_close(omega, expected, rtol=1e-4, atol=1e-6)  # float32, 0 on void
    assert not omega.requires_grad


@pytest.mark.parametrize("tau", [0.01, 0.3, 5.0])
def test_the_reliabilities_of_all_labels_of_a_pixel_lie_between_zero_and_one_and_sum_to_one(tau):
    emb, label, prototypes = random_case()
    each = torch.stack([reliability(emb, torch.full_like(label, c), prototypes, tau) for c in range(K)])
    assert (each >= 0).all() and (each <= 1).all()
    torch.testing.assert_close(each.sum(0), torch.ones(label.shape))


def test_a_pixel_on_its_prototype_is_reliable_and_on_another_one_is_not():
    prototypes = torch.eye(K, D)
    emb = prototypes.T.reshape(1, D, 1, K)
    label = torch.arange(K).view(1, 1, K)
    right = 1 / (1 + (K - 1) * math.exp(-1 / TAU))
    assert reliability(emb, label, prototypes, TAU)[0, 0].tolist() == pytest.approx([right] * K)
    wrong = 1 / (math.exp(1 / TAU) + K - 1)
    assert reliability(emb, (label + 1) % K, prototypes, TAU)[0, 0].tolist() == pytest.approx([wrong] * K)


def test_lengths_and_the_names_of_classes_leave_the_reliability():
    emb, label, prototypes = random_case()
    order = [1, 3, 0, 2]
    scale = torch.logspace(-3, 3, B * H * W).view(B, 1, H, W)
    changed = torch.empty_like(prototypes)
    changed[:, order] = 3 * prototypes  # class c is now order[c]
    torch.testing.assert_close(reliability(emb * scale, renamed(label, *order), changed, TAU),
                               reliability(emb, label, prototypes, TAU))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, length", [(torch.float32, 1), (torch.bfloat16, 1), (torch.half, 60000)])
def test_reliability_is_computed_in_float32_whatever_the_embeddings_come_in(dtype, length, autocast):
    emb, label, prototypes = random_case()
    emb = (F.normalize(emb, dim=1) * length).to(dtype)  # half precision ends at 65504: a sum of squares would be inf
    prototypes = prototypes.to(dtype)
    expected = reliability(emb.float() / length, label, prototypes.float(), TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        omega = reliability(emb, label, prototypes, TAU)
    torch.testing.assert_close(omega, expected, rtol=1e-5, atol=1e-7)  # the dtype too


@pytest.mark.parametrize("tau", [0, -0.1])
def test_eq_5_refuses_a_temperature_that_is_not_positive(tau):
    with pytest.raises(ValueError, match="tau must be positive"):
        reliability(*random_case(), tau)


def test_image_reliability_equals_plain_loops_also_beside_an_all_void_image():
    omega, label = random_reliability()
    label[1] = VOID
    mean = {c: sum(values) / len(values) for c in range(K) if (values := omega[label == c].tolist())}
    got = image_reliability(omega, label)
    for b in range(len(omega)):
        relative = [o / mean[c] for o, c in zip(omega[b].flatten().tolist(), label[b].flatten().tolist()) if c != 255]
        expected = (label[b] != 255) * (sum(relative) / max(len(relative), 1))
        torch.testing.assert_close(got[b], expected.float(), rtol=1e-5, atol=0)


def test_an_image_of_easy_classes_is_no_reliable_image():
    easy = image_reliability(torch.tensor([[[0.9, 0.9]], [[0.1, 0.1]]]), torch.tensor([[[0, 0]], [[1, 1]]]))
    torch.testing.assert_close(easy, torch.ones(2, 1, 2))
    one_class = torch.tensor([[[0.9, 0.9]], [[0.9, 0.1]], [[0.9, 0.5]]])
    got = image_reliability(one_class, torch.zeros(3, 1, 2, dtype=torch.long))[:, 0, 0]
    assert got[0] > got[2] > got[1]


# ------------------------------------------------------------------------------------------------------------- Eq. 6


def test_eq_6_on_an_example_worked_by_hand():
    omega = torch.tensor([[[0.0, 1.0, 0.2, 0.2, 0.0]]])
    label = torch.tensor([[[0, 0, 1, 1, 255]]])
    # class 0: mean omega 0.5, omega / mean = 0 and 2, clipped to 0.1 (the default) and 2, mean 1.05
    # class 1: omega / mean = 1 and 1
    assert learning_weights(omega, label, 1.0).flatten().tolist() == pytest.approx([0.1 / 1.05, 2 / 1.05, 1, 1, 0])
    # half of the way: 1 + 0.5 * (0 - 1) = 0.5 and 1.5, mean 1
    assert learning_weights(omega, label, 0.5).flatten().tolist() == pytest.approx([0.5, 1.5, 1, 1, 0])


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("ramp, w_min", [(0.3, 0.0), (0.7, 0.5), (1.0, 0.0), (1.0, 0.1), (1.0, 0.999)])
def test_eq_6_equals_plain_loops_and_has_no_gradient(ramp, w_min, per_class):
    for batch in (4, 1):
        omega, label = random_reliability(batch=batch)
        weight = learning_weights(omega.requires_grad_(), label, ramp, w_min, per_class)
        expected = weights_in_loops(omega, label, ramp, w_min, per_class)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)  # float32, 0 on void
        assert not weight.requires_grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ramp, w_min", [(0.4, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_the_mean_is_one_also_in_a_class_of_a_single_pixel_and_more_reliable_pixels_never_get_less(seed, ramp, w_min):
    omega, label = random_reliability(seed, classes=19)
    label[(label == 7) | (label == 11)] = VOID  # 7 is absent
    label[0, 0, 0], omega[0, 0, 0] = 11, 0.01  # a single pixel, and a hard one
    everywhere = label.where(label == VOID, 0)
    for group, per_class in ((label, True), (everywhere, False)):
        weight = learning_weights(omega, label, ramp, w_min, per_class)
        for c in set(group.unique().tolist()) - {VOID}:
            inside = weight[group == c]
            assert inside.double().mean().item() == pytest.approx(1, abs=1e-5)
            assert (inside[omega[group == c].argsort()].diff() >= 0).all() and (inside >= 0).all()


def test_means_per_class_keep_the_shares_of_the_classes_and_one_mean_per_batch_does_not():
    omega, label = random_reliability()  # class 0 is easy, the others are hard

    def shares(weight):
        return [(weight[label == c].double().sum() / weight[label != VOID].double().sum()).item() for c in range(K)]

    before = shares((label != VOID).float())
    assert shares(learning_weights(omega, label, 1.0, 0.1)) == pytest.approx(before, abs=1e-6)
    shifted = shares(learning_weights(omega, label, 1.0, 0.1, per_class=False))
    assert shifted[0] > before[0] + 0.05 and all(shifted[c] < before[c] - 0.01 for c in (1, 2, 3))


def test_the_names_of_classes_and_the_scale_of_the_reliabilities_leave_the_weights():
    omega, label = random_reliability()
    torch.testing.assert_close(learning_weights(1e-3 * omega, renamed(label, 18, 3, 0, 7), 1.0, 0.1),
                               learning_weights(omega, label, 1.0, 0.1))


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("w_min", [0.0, 0.1])
def test_at_ramp_zero_and_where_all_reliabilities_are_zero_every_weight_is_one(w_min, per_class):
    omega, label = random_reliability()
    ones = (label != VOID).float()
    assert torch.equal(learning_weights(omega, label, 0.0, w_min, per_class), ones)
    for ramp in (0.0, 0.5, 1.0):
        torch.testing.assert_close(learning_weights(0 * omega, label, ramp, w_min, per_class), ones)


def test_one_class_without_any_reliability_does_not_touch_the_others():
    omega, label = random_reliability()
    weight = learning_weights(omega.where(label != 2, 0.0), label, 1.0, 0.0)
    assert (weight[label == 2] == 1).all()
    torch.testing.assert_close(weight[label != 2], learning_weights(omega, label, 1.0, 0.0)[label != 2])


@pytest.mark.parametrize("work", [
    image_reliability,
    lambda omega, label, reduce=None: learning_weights(omega, label, 1.0, 0.1, True, reduce),
    lambda omega, label, reduce=None: learning_weights(omega, label, 0.5, 0.0, False, reduce),
], ids=["image reliability", "weights per class", "weights per batch"])
def test_half_a_batch_in_each_of_two_processes_gives_what_the_whole_batch_gives(work):
    omega, label = random_reliability()
    label[:2][label[:2] == 3] = VOID  # a class that only the second process sees
    whole = work(omega, label)
    torch.testing.assert_close(as_two_processes(work, omega, label), whole, rtol=1e-6, atol=0)
    alone = torch.cat([work(o, y) for o, y in zip(omega.chunk(2), label.chunk(2))])
    assert not torch.allclose(alone, whole, rtol=1e-3)  # so the reduction was needed


@pytest.mark.parametrize("per_class", [True, False])
def test_an_all_void_batch_has_reliability_and_weight_zero(per_class):
    emb, label, prototypes = random_case()
    label = torch.full_like(label, VOID)
    omega = reliability(emb, label, prototypes, TAU)
    for got in (omega, image_reliability(omega, label), learning_weights(omega, label, 1.0, 0.1, per_class)):
        assert (got == 0).all()


@pytest.mark.parametrize("ramp, w_min", [(-0.1, 0.1), (1.1, 0.1), (float("nan"), 0.1), (1.0, -0.1), (1.0, 1.0)])
def test_a_ramp_or_w_min_outside_its_range_is_refused(ramp, w_min):
    with pytest.raises(ValueError, match="ramp .* w_min"):
        learning_weights(*random_reliability(), ramp, w_min)


# ---------------------------------------------------------------------------------------------------------- the file


def test_reweight_needs_torch_alone_and_its_demonstration_runs(capsys):
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", inspect.getsource(reweight), re.M)) == {"torch"}
    reweight._demo()
    assert "share of the rare class" in capsys.readouterr().out
