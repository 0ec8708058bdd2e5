"""Eq. 5 and 6: reweight.py against plain loops, and the means and shares that it promises to keep."""

import ast
import inspect
import math
import threading

import pytest
import torch
import torch.nn.functional as F

import reweight
from align import alignment_loss
from reweight import VOID, image_reliability, learning_weights, reliability

torch.set_num_threads(1)

B, K, D, H, W = 2, 4, 6, 3, 5
TAU = 0.3
SIZES = [(3, 5), (6, 10), (7, 11), (10, 9), (16, 33)]  # on the grid; finer by a whole factor; finer by no whole factor


def random_case(size=(H, W), seed=0, batch=B, void=0.25):
    """emb of any length on the H x W grid, label of `size` with some void, unit prototypes per image."""
    g = torch.Generator().manual_seed(seed)
    emb = torch.randn(batch, D, H, W, generator=g) * (0.2 + 3 * torch.rand(batch, 1, H, W, generator=g))
    label = torch.randint(0, K, (batch, *size), generator=g)
    label[torch.rand(batch, *size, generator=g) < void] = VOID
    return emb, label, F.normalize(torch.randn(batch, K, D, generator=g), dim=-1)


def random_reliability(seed=0, size=(9, 11), batch=4, classes=K, void=0.2):
    """rel in [0, 1], 0 on void, class 0 far more frequent than the others and far easier."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, *size), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.6] = 0
    label[torch.rand(label.shape, generator=g) < void] = VOID
    rel = torch.rand(label.shape, generator=g) * torch.where(label == 0, 1.0, 0.3)
    return rel * (label != VOID), label


def reliability_in_loops(emb, label, prototypes, tau):
    """Eq. 5 in Python numbers; prototypes (B, K, D); every pixel of the label asks the cell of the grid it lies in."""
    h, w = emb.shape[2:]
    height, width = label.shape[1:]
    rel = torch.zeros(label.shape)
    for b in range(len(label)):
        for y in range(height):
            for x in range(width):
                c = label[b, y, x].item()
                if c == 255:
                    continue
                z = emb[b, :, math.floor(y * h / height + 1e-9), math.floor(x * w / width + 1e-9)].tolist()
                length = math.sqrt(sum(a * a for a in z))
                e = [math.exp(sum(a * p for a, p in zip(z, row)) / length / tau) for row in prototypes[b].tolist()]
                rel[b, y, x] = e[c] / sum(e)
    return rel


def weights_in_loops(rel, label, ramp, w_min, per_class=True):
    """Eq. 6 in Python numbers: a dict of lists, one per class (or one for all)."""
    groups = {}
    for position in (label != 255).nonzero().tolist():
        position = tuple(position)
        groups.setdefault(label[position].item() if per_class else "all", []).append(position)
    weight = torch.zeros(rel.shape)
    for positions in groups.values():
        omega = [rel[p].item() for p in positions]
        mean = sum(omega) / len(omega)
        w = [max(w_min, 1 + ramp * (o / mean - 1)) for o in omega]
        mean = sum(w) / len(w)
        for p, value in zip(positions, w):
            weight[p] = value / mean
    return weight


def as_two_processes(work, *tensors):
    """work(reduce, *halves) for both halves of the batch at once, each in a thread that stands for a process.

    reduce(x) waits for the other process and gives the sum, as an all-reduce does. -> both results, joined.
    """
    barrier, slots, results, errors = threading.Barrier(2, timeout=20), [None, None], [None, None], []

    def process(rank):
        def reduce(x):
            slots[rank] = x.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        try:
            results[rank] = work(reduce, *(t.chunk(2)[rank] for t in tensors))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return torch.cat(results)


# ------------------------------------------------------------------------------------------------------------- Eq. 5


@pytest.mark.parametrize("size", SIZES)
def test_eq_5_equals_plain_loops_over_the_pixels_and_their_cells(size):
    emb, label, prototypes = random_case(size)
    rel = reliability(emb, label, prototypes, TAU)
    assert rel.shape == label.shape and rel.dtype == torch.float32
    torch.testing.assert_close(rel, reliability_in_loops(emb, label, prototypes, TAU), rtol=1e-4, atol=1e-6)


def test_one_set_of_prototypes_equals_a_copy_for_every_image_in_eq_5():
    emb, label, prototypes = random_case((7, 11))
    torch.testing.assert_close(reliability(emb, label, prototypes[0], TAU),
                               reliability(emb, label, prototypes[0].expand(B, K, D), TAU))


def test_reliability_is_the_likelihood_that_the_alignment_loss_takes_the_log_of():
    emb, label, prototypes = random_case()
    rel = reliability(emb, label, prototypes, TAU)[label != VOID]
    torch.testing.assert_close(-rel.log().mean(), alignment_loss(emb, label, prototypes, TAU))


@pytest.mark.parametrize("tau", [0.01, 0.3, 5.0])
def test_reliability_lies_between_zero_and_one_and_is_zero_on_void(tau):
    emb, label, prototypes = random_case((7, 11))
    rel = reliability(emb, label, prototypes, tau)
    assert (rel >= 0).all() and (rel <= 1).all()
    assert (rel[label == VOID] == 0).all() and (rel[label != VOID] > 0).any()


def test_the_reliabilities_of_all_labels_of_a_pixel_sum_to_one():
    emb, label, prototypes = random_case()
    total = sum(reliability(emb, torch.full_like(label, c), prototypes, TAU) for c in range(K))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_pixel_on_its_prototype_is_reliable_and_on_another_one_is_not():
    prototypes = torch.eye(K, D)
    emb = prototypes.T.reshape(1, D, 1, K)
    label = torch.arange(K).view(1, 1, K)
    right = 1 / (1 + (K - 1) * math.exp(-1 / TAU))
    assert reliability(emb, label, prototypes, TAU)[0, 0].tolist() == pytest.approx([right] * K)
    wrong = 1 / (math.exp(1 / TAU) + K - 1)
    assert reliability(emb, (label + 1) % K, prototypes, TAU)[0, 0].tolist() == pytest.approx([wrong] * K)


def test_relabelled_classes_and_scaled_embeddings_leave_the_reliability():
    emb, label, prototypes = random_case((7, 11))
    expected = reliability(emb, label, prototypes, TAU)
    order = torch.tensor([2, 0, 3, 1])
    new_id = torch.full((256,), VOID)
    new_id[order] = torch.arange(K)
    scale = torch.logspace(-3, 3, B * H * W).view(B, 1, H, W)
    torch.testing.assert_close(reliability(emb * scale, new_id[label], prototypes[:, order], TAU), expected)


def test_the_reliability_of_a_pixel_does_not_depend_on_the_rest_of_the_batch():
    emb, label, prototypes = random_case((7, 11))
    joined = reliability(emb, label, prototypes, TAU)
    torch.testing.assert_close(joined[1:], reliability(emb[1:], label[1:], prototypes[1:], TAU))


def test_reliability_has_no_gradient():
    emb, label, prototypes = random_case()
    assert not reliability(emb.requires_grad_(), label, prototypes.requires_grad_(), TAU).requires_grad


@pytest.mark.parametrize("per_image", [False, True])
def test_autocast_does_not_lower_the_precision_of_eq_5(per_image):
    emb, label, prototypes = random_case((7, 11))
    prototypes = prototypes if per_image else prototypes[0]
    exact = reliability(emb, label, prototypes, TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rel = reliability(emb, label, prototypes, TAU)
        assert rel.dtype == torch.float32
        torch.testing.assert_close(rel, exact, rtol=1e-6, atol=0)


def test_half_precision_embeddings_are_judged_in_float32():
    emb, label, prototypes = random_case((7, 11))
    long = F.normalize(emb, dim=1).half() * 60000
    rel = reliability(long, label, prototypes.half(), TAU)
    assert rel.dtype == torch.float32
    expected = reliability(long.float() / 60000, label, prototypes.half().float(), TAU)
    torch.testing.assert_close(rel, expected, rtol=1e-5, atol=1e-7)


def test_the_length_of_a_prototype_does_not_matter_in_eq_5():
    emb, label, prototypes = random_case()
    torch.testing.assert_close(reliability(emb, label, 3 * prototypes, TAU), reliability(emb, label, prototypes, TAU))


@pytest.mark.parametrize("tau", [0, -0.1])
def test_eq_5_refuses_a_temperature_that_is_not_positive(tau):
    with pytest.raises(ValueError, match="tau must be positive"):
        reliability(*random_case(), tau)


def test_an_all_void_batch_has_reliability_zero():
    emb, label, prototypes = random_case()
    assert (reliability(emb, torch.full_like(label, VOID), prototypes, TAU) == 0).all()


# ------------------------------------------------------------------------------------------------------ image level


def test_image_reliability_equals_plain_loops():
    rel, label = random_reliability()
    mean = {c: sum(values) / len(values) for c in range(K) if (values := rel[label == c].tolist())}
    got = image_reliability(rel, label)
    for b in range(len(rel)):
        relative = [rel[tuple([b, *p])].item() / mean[label[tuple([b, *p])].item()]
                    for p in (label[b] != 255).nonzero().tolist()]
        expected = (label[b] != 255) * (sum(relative) / len(relative))
        torch.testing.assert_close(got[b], expected.float(), rtol=1e-5, atol=0)


def test_an_image_of_easy_classes_is_no_reliable_image():
    label = torch.tensor([[[0, 0]], [[1, 1]]])
    rel = torch.tensor([[[0.9, 0.9]], [[0.1, 0.1]]])  # class 0 is easy
    torch.testing.assert_close(image_reliability(rel, label), torch.ones(2, 1, 2))
    worse = torch.tensor([[[0.9, 0.9]], [[0.9, 0.1]], [[0.9, 0.5]]])  # the same class everywhere
    got = image_reliability(worse, torch.zeros(3, 1, 2, dtype=torch.long))[:, 0, 0]
    assert got[0] > got[2] > got[1]


def test_image_reliability_is_zero_on_void_and_finite_for_an_all_void_image():
    rel, label = random_reliability()
    label[1], rel[1] = VOID, 0
    got = image_reliability(rel, label)
    assert torch.isfinite(got).all() and (got[label == VOID] == 0).all() and (got[label != VOID] > 0).all()


def test_image_reliability_of_half_a_batch_in_each_of_two_processes_is_that_of_the_whole():
    rel, label = random_reliability()
    label[0][label[0] == 3] = VOID  # a class that only ...
    label[1][label[1] == 3] = VOID  # ... the second process sees
    got = as_two_processes(lambda reduce, r, y: image_reliability(r, y, reduce), rel, label)
    torch.testing.assert_close(got, image_reliability(rel, label), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------- Eq. 6


def test_eq_6_on_an_example_worked_by_hand():
    rel = torch.tensor([[[0.0, 1.0, 0.2, 0.2, 0.0]]])
    label = torch.tensor([[[0, 0, 1, 1, 255]]])
    # class 0: mean omega 0.5, omega / mean = 0 and 2, clipped to 0.1 and 2, mean 1.05
    # class 1: omega / mean = 1 and 1
    weight = learning_weights(rel, label, ramp=1.0, w_min=0.1)
    assert weight.flatten().tolist() == pytest.approx([0.1 / 1.05, 2 / 1.05, 1, 1, 0])
    # half of the way: 1 + 0.5 * (0 - 1) = 0.5 and 1.5, mean 1
    assert learning_weights(rel, label, 0.5, 0.1).flatten().tolist() == pytest.approx([0.5, 1.5, 1, 1, 0])


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("ramp, w_min", [(0.3, 0.0), (0.7, 0.5), (1.0, 0.0), (1.0, 0.1), (1.0, 0.9)])
def test_eq_6_equals_plain_loops(ramp, w_min, per_class):
    rel, label = random_reliability()
    got = learning_weights(rel, label, ramp, w_min, per_class)
    assert got.shape == label.shape and got.dtype == torch.float32
    torch.testing.assert_close(got, weights_in_loops(rel, label, ramp, w_min, per_class), rtol=1e-4, atol=1e-6)


def test_means_per_class_are_the_default():
    rel, label = random_reliability()
    torch.testing.assert_close(learning_weights(rel, label, 1.0, 0.1), learning_weights(rel, label, 1.0, 0.1, True))
    assert not torch.allclose(learning_weights(rel, label, 1.0, 0.1), learning_weights(rel, label, 1.0, 0.1, False))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ramp, w_min", [(0.4, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_the_mean_is_one_in_every_class_also_where_a_class_is_absent_or_a_single_pixel(seed, ramp, w_min):
    rel, label = random_reliability(seed, classes=19)
    label[label == 7] = VOID  # absent
    label[label == 11] = VOID
    label[0, 0, 0], rel[0, 0, 0] = 11, 0.01  # a single pixel, and a hard one
    weight = learning_weights(rel, label, ramp, w_min)
    present = label[label != VOID].unique().tolist()
    assert 7 not in present and 11 in present and len(present) > 10
    for c in present:
        assert weight[label == c].double().mean().item() == pytest.approx(1, abs=1e-5)
    assert weight[0, 0, 0].item() == pytest.approx(1, abs=1e-6)
    assert (weight[label == VOID] == 0).all() and (weight >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_over_all_labelled_pixels_is_one_with_one_mean_per_batch(seed):
    rel, label = random_reliability(seed)
    weight = learning_weights(rel, label, 1.0, 0.1, per_class=False)
    assert weight[label != VOID].double().mean().item() == pytest.approx(1, abs=1e-5)
    assert (weight[label == VOID] == 0).all()


def test_void_pixels_count_in_no_mean():
    rel, label = random_reliability()
    void = label == VOID
    for per_class in (True, False):
        expected = learning_weights(rel, label, 1.0, 0.1, per_class)
        got = learning_weights(torch.where(void, torch.full_like(rel, 9.0), rel), label, 1.0, 0.1, per_class)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("per_class", [True, False])
def test_at_ramp_zero_every_weight_is_one(per_class):
    rel, label = random_reliability()
    weight = learning_weights(rel, label, 0.0, 0.1, per_class)
    assert torch.equal(weight, (label != VOID).float())


@pytest.mark.parametrize("per_class", [True, False])
def test_before_the_last_division_no_weight_is_below_w_min(per_class):
    rel, label = random_reliability()
    w_min = 0.4
    weight = learning_weights(rel, label, 1.0, w_min, per_class)
    for c in range(K) if per_class else ["all"]:
        inside = weight[label == c if per_class else label != VOID]
        r = rel[label == c if per_class else label != VOID]
        divisor = (r / r.mean()).clamp_min(w_min).mean()
        assert (inside * divisor).min().item() == pytest.approx(w_min, rel=1e-4)  # reached, and not passed
    assert learning_weights(rel, label, 1.0, 0.0, per_class)[label != VOID].min() < 0.1


@pytest.mark.parametrize("per_class", [True, False])
def test_a_more_reliable_pixel_of_the_class_never_gets_a_smaller_weight(per_class):
    rel, label = random_reliability()
    weight = learning_weights(rel, label, 1.0, 0.2, per_class)
    for c in range(K):
        inside = weight[label == c][rel[label == c].argsort()]
        assert (inside.diff() >= 0).all() and inside[-1] > inside[0]


def test_means_per_class_keep_the_shares_of_the_classes_and_one_mean_per_batch_does_not():
    rel, label = random_reliability()  # class 0 is easy, the others are hard
    labelled = label != VOID

    def share(weight, c):
        return (weight[label == c].double().sum() / weight[labelled].double().sum()).item()

    before = [share(labelled.float(), c) for c in range(K)]
    kept = [share(learning_weights(rel, label, 1.0, 0.1), c) for c in range(K)]
    shifted = [share(learning_weights(rel, label, 1.0, 0.1, per_class=False), c) for c in range(K)]
    assert kept == pytest.approx(before, abs=1e-6)
    assert shifted[0] > before[0] + 0.05 and all(shifted[c] < before[c] - 0.01 for c in (1, 2, 3))


def test_relabelled_classes_leave_the_weights():
    rel, label = random_reliability()
    new_id = torch.full((256,), VOID)
    new_id[:K] = torch.tensor([18, 3, 0, 7])
    torch.testing.assert_close(learning_weights(rel, new_id[label], 1.0, 0.1), learning_weights(rel, label, 1.0, 0.1))


def test_scaled_reliabilities_leave_the_weights():
    rel, label = random_reliability()
    torch.testing.assert_close(learning_weights(rel * 1e-3, label, 1.0, 0.1), learning_weights(rel, label, 1.0, 0.1))


def test_learning_weights_have_no_gradient():
    rel, label = random_reliability()
    assert not learning_weights(rel.requires_grad_(), label, 1.0, 0.1).requires_grad


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("ramp, w_min", [(1.0, 0.1), (0.5, 0.0)])
def test_half_a_batch_in_each_of_two_processes_gives_the_weights_of_the_whole_batch(per_class, ramp, w_min):
    rel, label = random_reliability()
    for image in (0, 1):  # a class that only the second process sees
        label[image][label[image] == 3] = VOID
        rel[image][label[image] == VOID] = 0
    whole = learning_weights(rel, label, ramp, w_min, per_class)
    got = as_two_processes(lambda reduce, r, y: learning_weights(r, y, ramp, w_min, per_class, reduce), rel, label)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=0)
    alone = torch.cat([learning_weights(r, y, ramp, w_min, per_class) for r, y in zip(rel.chunk(2), label.chunk(2))])
    assert not torch.allclose(alone, whole, rtol=1e-3)  # so the reduction was needed


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("w_min", [0.0, 0.1])
def test_reliabilities_that_are_all_zero_leave_every_weight_at_one(per_class, ramp, w_min):
    _, label = random_reliability()
    weight = learning_weights(torch.zeros(label.shape), label, ramp, w_min, per_class)
    torch.testing.assert_close(weight, (label != VOID).float())


def test_one_class_without_any_reliability_does_not_touch_the_others():
    rel, label = random_reliability()
    rel[label == 2] = 0
    weight = learning_weights(rel, label, 1.0, 0.0)
    assert (weight[label == 2] == 1).all()
    torch.testing.assert_close(weight * (label != 2), weights_in_loops(rel, label.where(label != 2, torch.tensor(255)),
                                                                       1.0, 0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_class", [True, False])
def test_an_all_void_batch_has_weight_zero(per_class):
    rel, label = random_reliability()
    assert (learning_weights(torch.zeros_like(rel), torch.full_like(label, VOID), 1.0, 0.1, per_class) == 0).all()


def test_a_batch_of_one_image_works():
    rel, label = random_reliability(batch=1)
    torch.testing.assert_close(learning_weights(rel, label, 1.0, 0.1), weights_in_loops(rel, label, 1.0, 0.1),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ramp, w_min", [(-0.1, 0.1), (1.1, 0.1), (float("nan"), 0.1), (1.0, -0.1), (1.0, 1.0)])
def test_a_ramp_or_w_min_outside_its_range_is_refused(ramp, w_min):
    rel, label = random_reliability()
    with pytest.raises(ValueError, match="ramp .* w_min"):
        learning_weights(rel, label, ramp, w_min)


def test_the_ends_of_the_ranges_are_allowed():
    rel, label = random_reliability()
    for ramp, w_min in ((0, 0), (1, 0), (1, 0.999)):
        assert torch.isfinite(learning_weights(rel, label, ramp, w_min)).all()


# ---------------------------------------------------------------------------------------------------------- the file


def test_reweight_needs_torch_alone_and_its_demonstration_runs(capsys):
    tree = ast.parse(inspect.getsource(reweight))
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch"}
    reweight._demo()
    assert "share of the rare class" in capsys.readouterr().out
