"""Eq. 5 and 6: reweight.py against plain loops, worked examples, and which pixels may lose their weight."""

import math

import pytest
import torch
import torch.nn.functional as F

from reweight import centres, learning_weights, place_reliability, reliability

torch.set_num_threads(1)

B, K, H, W = 2, 4, 7, 9
VOID = 255
ORDER = [2, 0, 3, 1]  # the new class c is the old class ORDER[c]


def random_case(seed=0):
    """logits (B, K, H, W) and a label with some void."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (B, H, W), generator=g)
    label[torch.rand(B, H, W, generator=g) < 0.25] = VOID
    return 3 * torch.randn(B, K, H, W, generator=g), label


def random_reliability(seed=0):
    """omega and place in [0, 1], also on void, where nobody may look, and the label."""
    g = torch.Generator().manual_seed(seed + 100)
    return *torch.rand(2, B, H, W, generator=g), random_case(seed)[1]


def renamed(label):
    new_id = torch.full((256,), VOID)
    new_id[ORDER] = torch.arange(K)
    return new_id[label]


# ------------------------------------------------------------------------------------------------------------- Eq. 5


def test_eq_5_equals_plain_loops_over_the_pixels_and_has_no_gradient():
    logits, label = random_case()
    expected = torch.zeros(B, H, W)
    for b, i, j in (label != 255).nonzero().tolist():
        e = [math.exp(x) for x in logits[b, :, i, j].tolist()]
        p = [x / sum(e) for x in e]
        expected[b, i, j] = p[label[b, i, j]] / max(p)
    omega = reliability(logits.requires_grad_(), label)
    torch.testing.assert_close(omega, expected, rtol=1e-5, atol=1e-7)  # float32, 0 on void
    assert not omega.requires_grad and torch.equal(omega, reliability(logits, label))


@pytest.mark.parametrize("label_size, grid", [
    ((12, 17), (5, 6)), ((8, 12), (4, 3)), ((7, 9), (7, 9)), ((70, 98), (17, 24)), ((9, 5), (2, 4))])
def test_a_pixel_of_the_label_asks_the_pixel_of_logits_that_its_centre_lies_in(label_size, grid):
    """At whole ratios it makes no difference whether a corner or the centre is mapped, at others it does."""
    g = torch.Generator().manual_seed(1)
    logits, label = 3 * torch.randn(1, K, *grid, generator=g), torch.randint(0, K, (1, *label_size), generator=g)
    ratio, omega = (logits - logits.amax(1, keepdim=True)).exp(), reliability(logits, label)
    for i in range(label_size[0]):
        for j in range(label_size[1]):
            row, column = math.floor((i + 0.5) / label_size[0] * grid[0]), math.floor((j + 0.5) / label_size[1] * grid[1])
            assert omega[0, i, j] == ratio[0, label[0, i, j], row, column]
    picture = torch.arange(math.prod(grid), dtype=torch.float32).view(1, 1, *grid)  # and torch's own exact rule agrees
    cells = F.interpolate(picture, size=label_size, mode="nearest-exact")[0, 0]
    row, column = (centres(pixels, cells, "cpu") for pixels, cells in zip(label_size, grid))
    assert torch.equal(cells, picture[0, 0][row[:, None], column])


WRONG_LABELS = {  # what is wrong: (the label made of a right one, what the sentence says)
    "uint8": (lambda label: label.byte(), "int64, not torch.uint8"),
    "float": (lambda label: label.float(), "int64, not torch.float32"),
    "coarser": (lambda label: label[:, ::2], r"\(2, 4, 9\) is none of logits of shape \(2, 4, 7, 9\)"),
    "narrower": (lambda label: label[:, :, 1:], r"\(2, 7, 8\) is none of logits"),
    "one image": (lambda label: label[:1], r"\(1, 7, 9\)"), "no batch": (lambda label: label[0], r"\(7, 9\) is none"),
    "K": (lambda label: label.where(label != 2, K), "the id 4: .* 0 to 3, or 255"),
    "254": (lambda label: label.where(label != 2, 254), "the id 254"),
    "the last one, from behind": (lambda label: label.where(label != 2, -1), "the id -1"),
    "-100": (lambda label: label.where(label != 255, -100), "the id -100"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_what_is_no_label_of_the_logits_is_refused_in_one_sentence(kind):
    logits, label = random_case()
    spoil, said = WRONG_LABELS[kind]
    with pytest.raises(ValueError, match=said):
        reliability(logits, spoil(label))


def test_the_ids_are_not_asked_for():
    """To read an id, the program waits for a GPU. A tensor on "meta" has no ids at all: whoever asks gets an error."""
    logits, label = (x.to("meta") for x in random_case())
    assert weights(logits, label).shape == label.shape
    with pytest.raises(ValueError, match="int64"):
        reliability(logits, label.byte())


def test_numbers_of_another_shape_than_the_label_and_a_window_without_a_middle_are_refused():
    omega, place, label = random_reliability()
    for call in (lambda: place_reliability(omega[:, 1:], label, 3), lambda: learning_weights(omega[:1], place, label, 1.0),
                 lambda: learning_weights(omega, place[:, :, :1], label, 1.0)):
        with pytest.raises(ValueError, match=r"numbers are none of a label of shape \(2, 7, 9\)"):
            call()
    with pytest.raises(ValueError, match="side must be odd, not 4"):
        place_reliability(omega, label, 4)


def test_eq_5_on_an_example_worked_by_hand():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.4, 0.4, 0.2], [0.5, 0.4, 0.1], [0.8, 0.1, 0.1]])
    omega = reliability(p.log().T.view(1, 3, 1, 5), torch.tensor([[[0, 1, 1, 1, 255]]]))
    assert omega.flatten().tolist() == pytest.approx([1, 0.125, 1, 0.8, 0])  # a hard pixel is no doubtful one


def test_the_foremost_class_alone_has_reliability_one_and_names_and_a_constant_of_the_pixel_leave_it():
    logits, label = random_case()
    each = torch.stack([reliability(logits, torch.full_like(label, c)) for c in range(K)], dim=1)
    assert torch.equal(each == 1, F.one_hot(logits.argmax(dim=1), K).permute(0, 3, 1, 2).bool())
    assert (each > 0).all() and (each <= 1).all()
    expected = reliability(logits, label)
    torch.testing.assert_close(reliability(logits[:, ORDER], renamed(label)), expected)
    torch.testing.assert_close(reliability(logits + 20 * torch.randn(B, 1, H, W), label), expected, rtol=1e-4, atol=1e-6)
    assert reliability(100 * logits, label).isfinite().all()  # also of a network that is very certain


@pytest.mark.parametrize("side", [1, 3, 5, 17])
@pytest.mark.parametrize("void", [0.0, 0.25, 0.8])
def test_the_reliability_of_a_place_equals_plain_loops_where_borders_and_void_count_nowhere(side, void):
    omega, chance, _ = random_reliability()
    label = torch.where(chance < void, VOID, 0)
    expected, r = torch.zeros(B, H, W), side // 2
    for b, i, j in (label != 255).nonzero().tolist():
        window = [(y, x) for y in range(i - r, i + r + 1) for x in range(j - r, j + r + 1) if 0 <= y < H and 0 <= x < W]
        inside = [omega[b, y, x].item() for y, x in window if label[b, y, x] != 255]
        expected[b, i, j] = sum(inside) / len(inside)
    place = place_reliability(omega.requires_grad_(), label, side)
    torch.testing.assert_close(place, expected, rtol=1e-4, atol=1e-6)  # 0 on void
    assert not place.requires_grad


# ------------------------------------------------------------------------------------------------------------- Eq. 6


def test_eq_6_on_an_example_worked_by_hand():
    omega = torch.tensor([[[0.19, 0.20, 0.19, 0.90, 0.00, 0.00]]])
    place = torch.tensor([[[0.49, 0.49, 0.50, 0.10, 0.00, 0.00]]])
    label = torch.tensor([[[0, 1, 2, 3, 0, 255]]])
    # believed: the second itself, the third for its place, the fourth itself; the last one is void
    for ramp in (0.0, 0.5, 0.75, 1.0):
        expected = [1 - ramp, 1, 1, 1, 1 - ramp, 0]
        assert learning_weights(omega, place, label, ramp).flatten().tolist() == expected


@pytest.mark.parametrize("ramp, least", [(0.3, ()), (1.0, ()), (1, (0.6, 0.7)), (0.7, (0.0, 1.0)), (1.0, (1.1, 0.4))])
def test_eq_6_equals_plain_loops_and_has_no_gradient(ramp, least):
    omega, place, label = random_reliability()
    pixel, around = least or (0.2, 0.5)
    expected = torch.zeros(B, H, W)
    for b, i, j in (label != 255).nonzero().tolist():
        doubtful = omega[b, i, j].item() < pixel and place[b, i, j].item() < around
        expected[b, i, j] = 1 - ramp if doubtful else 1
    weight = learning_weights(omega.requires_grad_(), place.requires_grad_(), label, ramp, *least)
    torch.testing.assert_close(weight, expected)  # float32, 0 on void
    assert not weight.requires_grad


@pytest.mark.parametrize("ramp", [-0.1, 1.1, float("nan")])
def test_a_ramp_outside_zero_and_one_is_refused(ramp):
    with pytest.raises(ValueError, match="ramp"):
        learning_weights(*random_reliability(), ramp)


# --------------------------------------------------------------------------------------------- Eq. 5 and 6 together


def weights(logits, label, side=5):
    omega = reliability(logits, label)
    return learning_weights(omega, place_reliability(omega, label, side), label, 1.0)


def test_a_pole_that_the_network_does_not_see_keeps_its_weight_and_a_region_under_another_label_loses_it():
    label = torch.zeros(1, 20, 40, dtype=torch.long)
    label[:, :, 8] = 1  # a pole
    label[:, :, 20:] = 2  # the right half is labelled wrongly: the network sees class 0 everywhere
    logits = 6 * F.one_hot(torch.zeros_like(label), 3).permute(0, 3, 1, 2).float()
    weight = weights(logits, label)
    assert (weight[:, :, :20] == 1).all() and (weight[:, :, 20:] == 0).all()


def test_void_and_the_other_images_and_the_names_of_classes_leave_the_weights():
    logits, label = random_case()
    expected = weights(logits, label)
    assert 0 < expected[label != VOID].mean() < 1, "both kinds are there"
    other = torch.where((label == VOID)[:, None], 50 * torch.randn_like(logits), logits)
    assert torch.equal(weights(other, label), expected)
    assert torch.equal(weights(logits[:, ORDER], renamed(label)), expected)
    assert torch.equal(weights(logits.flip(3), label.flip(2)), expected.flip(2))
    assert torch.equal(weights(logits[1:], label[1:]), expected[1:])


def test_autocast_and_a_batch_without_labels_are_survived():
    logits, label = random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = weights(logits, label)
    assert weight.dtype == torch.float32 and torch.equal(weight, weights(logits, label))
    assert not weights(logits, torch.full_like(label, VOID)).any()  # 0, not NaN
