"""Eq. 1 and 2: prototypes.py against plain loops, and what a prototype may and may not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F
from make_clip import make_clip
from workbench import unit_rows

from prototypes import TEMPLATES, original_text_prototypes, shuffled_prototypes, source_prototypes, visual_text_prototypes

torch.set_num_threads(1)

NAMES = ("road", "traffic light", "car", "sky")
PROMPTS = ("a photo of a {}.", "the {} at night", "{}")
ORDER = [2, 0, 3, 1]
B, K, D, H, W = 2, 4, 24, 3, 5


@pytest.fixture(scope="module")
def clip_model():
    return make_clip("vit", layers=1)


def norm(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def random_image(seed=0, batch=B):
    """otp (K, D), unit rows, and emb (B, D, H, W) of any length, as CLIP's image tower gives it."""
    g = torch.Generator().manual_seed(seed)
    otp = F.normalize(torch.randn(K, D, generator=g), dim=1)
    return otp, torch.randn(batch, D, H, W, generator=g) * (0.2 + 3 * torch.rand(batch, 1, H, W, generator=g))


# ------------------------------------------------------------------------------------------------------------- Eq. 1


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_eq_1_equals_plain_loops_and_every_template_has_one_vote(prompts, clip_model):
    from clip import tokenize

    class Shouting:
        """The same text tower in double precision, but the first prompt of every call is a hundred times as long."""

        token_embedding, context_length = clip_model.token_embedding, clip_model.context_length

        @staticmethod
        def encode_text(tokens):
            return clip_model.encode_text(tokens).double() * torch.tensor([100.0] + [1.0] * (len(tokens) - 1))[:, None]

    expected = []
    for name in NAMES:
        texts = [tokenize(prompt.replace("{}", name)) for prompt in prompts]
        votes = [norm(clip_model.encode_text(text)[0].tolist()) for text in texts]
        expected.append(norm([sum(column) / len(votes) for column in zip(*votes)]))
    for tower in (clip_model, Shouting):
        otp = original_text_prototypes(tower, NAMES, prompts)
        torch.testing.assert_close(otp, torch.tensor(expected), rtol=1e-4, atol=1e-6)  # (K, 48), float32
        assert not otp.requires_grad


def test_the_default_templates_are_used_in_any_order_and_permuted_names_permute_the_distinct_rows(clip_model):
    assert len(TEMPLATES) == len(set(TEMPLATES)) and all(t.count("{}") == 1 for t in TEMPLATES)
    otp = original_text_prototypes(clip_model, NAMES)
    permuted = original_text_prototypes(clip_model, [NAMES[i] for i in ORDER], TEMPLATES[::-1])
    torch.testing.assert_close(permuted, otp[ORDER])
    assert (otp @ otp.T - torch.eye(len(NAMES))).max() < 0.9999


def test_a_clip_with_a_short_context_gets_short_prompts():
    model = make_clip("vit", layers=1, context=16)
    assert original_text_prototypes(model, NAMES).shape == (4, 48)


# ---------------------------------------------------------------------------------------------------- the controls


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_prototypes_are_the_same_points_and_no_class_keeps_its_own(seed):
    otp = unit_rows(19, 8)
    rows = shuffled_prototypes(otp, seed)
    found = (rows[:, None] == otp[None]).all(dim=2).int()  # row i is text j
    assert (found.sum(0) == 1).all() and (found.sum(1) == 1).all() and found.diagonal().sum() == 0
    assert torch.equal(rows, shuffled_prototypes(otp, seed))
    assert not torch.equal(rows, shuffled_prototypes(otp, seed + 5))


def batches(number=4):
    """Embeddings and labels of some batches: class 3 in none, class 2 in the third alone, some void."""
    g = torch.Generator().manual_seed(3)
    for n in range(number):
        emb = torch.randn(B, D, H, W, generator=g) * (0.2 + 3 * torch.rand(B, 1, H, W, generator=g))
        label = torch.randint(0, 3 if n == 2 else 2, (B, H, W), generator=g)
        label[torch.rand(B, H, W, generator=g) < 0.3] = 255
        yield emb, label


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_naive_prototypes_equal_plain_loops_over_batches_classes_and_pixels(momentum):
    otp = unit_rows(K, D)
    expected, got, seen = otp.tolist(), otp, torch.zeros(K, dtype=torch.bool)
    for emb, label in batches():
        for c in range(K):
            own = [norm(emb[b, :, i, j].tolist()) for b, i, j in (label == c).nonzero().tolist()]
            if own:
                mean = norm([sum(column) / len(own) for column in zip(*own)])
                old = expected[c] if seen[c] else mean  # at first sight, nothing of the text stays
                expected[c] = norm([momentum * a + (1 - momentum) * b for a, b in zip(old, mean)])
        got, seen = source_prototypes(got, seen, emb.requires_grad_(), label, momentum)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert not got.requires_grad
    assert seen.tolist() == [True, True, True, False] and torch.equal(got[3], otp[3]), "a class that was never seen keeps its text"
    start = source_prototypes(otp, torch.zeros(K, dtype=torch.bool), emb, label)  # 0.9 is the default
    assert all(map(torch.equal, start, source_prototypes(otp, torch.zeros(K, dtype=torch.bool), emb, label, 0.9)))


def test_a_batch_without_labels_leaves_naive_prototypes_and_two_processes_make_those_of_one():
    emb, label = next(batches(1))
    otp, seen = unit_rows(K, D), torch.tensor([True, False, False, False])
    rows, after = source_prototypes(otp, seen, emb, torch.full_like(label, 255))
    assert torch.equal(rows, otp) and torch.equal(after, seen)
    label[0] = 255  # the first process has nothing
    sums = []
    for part in (slice(0, 1), slice(1, 2)):
        source_prototypes(otp, seen, emb[part], label[part], reduce=lambda x: sums.append(x) or x)
    whole = source_prototypes(otp, seen, emb, label)
    for part in (slice(0, 1), slice(1, 2)):
        rows, after = source_prototypes(otp, seen, emb[part], label[part], reduce=lambda x: sum(sums))
        torch.testing.assert_close(rows, whole[0])
        assert torch.equal(after, whole[1])


# ------------------------------------------------------------------------------------------------------------- Eq. 2


def vtp_in_loops(otp, emb, tau, beta, kappa):
    """Eq. 2 in Python numbers."""
    rows = []
    for image in emb:
        cells = [norm(image[:, i, j].tolist()) for i in range(H) for j in range(W)]
        believed = []
        for z in cells:
            e = [math.exp(sum(a * p for a, p in zip(z, row)) / tau) for row in otp.tolist()]
            believed.append([x / sum(e) for x in e])
        for c, text in enumerate(otp.tolist()):
            seen = norm([sum(a[c] * z[d] for a, z in zip(believed, cells)) for d in range(D)])
            share = sum(a[c] for a in believed) / len(cells)
            m = beta * share / (share + kappa)
            rows.append(norm([(1 - m) * p + m * v for p, v in zip(text, seen)]))
    return torch.tensor(rows).view(len(emb), K, D)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tau, beta, kappa", [(0.07, 0.7, 0.02), (0.5, 1.0, 0.3), (0.2, 0.3, 1e-3)])
def test_eq_2_equals_plain_loops_over_images_classes_and_cells_and_has_no_gradient(batch, tau, beta, kappa):
    otp, emb = random_image(batch=batch)
    expected = vtp_in_loops(otp, emb, tau, beta, kappa)
    vtp = visual_text_prototypes(otp.requires_grad_(), emb.requires_grad_(), tau, beta, kappa)
    torch.testing.assert_close(vtp, expected, rtol=1e-4, atol=1e-5)  # float32
    assert not vtp.requires_grad and torch.equal(vtp, visual_text_prototypes(otp, emb, tau, beta, kappa))


def test_cells_that_show_padding_leave_the_vtp_and_half_a_cell_counts_half():
    otp, emb = random_image()
    shown = torch.ones(B, H, W)
    torch.testing.assert_close(visual_text_prototypes(otp, emb, 0.2, shown=shown), visual_text_prototypes(otp, emb, 0.2))
    shown[:, :, 3:] = 0
    image_alone = visual_text_prototypes(otp, emb[..., :3], 0.2)
    for padding in (emb, emb.index_fill(3, torch.tensor([3, 4]), 1.0)):  # whatever CLIP makes of it
        torch.testing.assert_close(visual_text_prototypes(otp, padding, 0.2, shown=shown), image_alone)
    assert not torch.allclose(visual_text_prototypes(otp, emb, 0.2), image_alone, atol=1e-2)
    twice = torch.cat([emb, emb[:, :, :1]], dim=2)  # a row that counts half, two times
    shown = torch.ones(B, H + 1, W)
    shown[:, [0, -1]] = 0.5
    torch.testing.assert_close(visual_text_prototypes(otp, twice, 0.2, shown=shown), visual_text_prototypes(otp, emb, 0.2))
    assert visual_text_prototypes(otp, emb, 0.2, shown=torch.zeros(B, H, W)).isfinite().all()


def test_eq_2_on_an_example_worked_by_hand():
    """Every cell looks away from all four texts, in one direction: each class gets a quarter of the image."""
    otp, emb = torch.eye(K, D), torch.zeros(1, D, H, W)
    emb[:, K] = 3.0
    half = dict(beta=0.8, kappa=0.25)  # kappa is the share at which a class moves half of beta
    for more, m in ((dict(), 0.7 * 0.25 / 0.27), (half, 0.4), (dict(beta=0), 0), (dict(beta=1, kappa=0), 1)):
        expected = F.normalize((1 - m) * otp + m * torch.eye(D)[K], dim=1)
        torch.testing.assert_close(visual_text_prototypes(otp, emb, 0.1, **more)[0], expected)


def test_a_class_moves_as_far_as_the_image_shows_it_and_one_that_is_absent_keeps_its_text():
    otp, shift = torch.eye(K, D), torch.eye(D)[K]
    label = torch.tensor([[0] * 11 + [1] * 3 + [2]]).view(1, H, W)  # class 3 has no cell
    emb = F.normalize(otp[label] + shift, dim=3).permute(0, 3, 1, 2)
    vtp = visual_text_prototypes(otp, emb, 0.05)[0]
    moved = (vtp - otp).norm(dim=1).tolist()
    assert moved[0] > moved[1] > moved[2] > 0.3 and moved[3] < 1e-3
    to_own = (vtp @ F.normalize(otp + shift, dim=1).T).diagonal()  # where the pixels of the class are
    assert (to_own[:3] > 0.9).all() and to_own[3] == pytest.approx(math.sqrt(0.5), abs=1e-3)


def test_names_of_classes_places_of_cells_lengths_and_the_other_images_leave_the_vtp():
    otp, emb = random_image()
    vtp = visual_text_prototypes(otp, emb, 0.07)
    torch.testing.assert_close(visual_text_prototypes(otp[ORDER], emb, 0.07), vtp[:, ORDER])
    shuffled = emb.flatten(2)[:, :, torch.randperm(H * W, generator=torch.Generator().manual_seed(0))].view(emb.shape)
    for other in (shuffled, emb.repeat(1, 1, 2, 3), emb * torch.logspace(-3, 3, H * W).view(1, 1, H, W)):
        torch.testing.assert_close(visual_text_prototypes(otp, other, 0.07), vtp)
    torch.testing.assert_close(visual_text_prototypes(otp, emb[1:], 0.07), vtp[1:])
    assert not torch.allclose(vtp[0], vtp[1], atol=1e-2), "one set per image"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, length", [(torch.float32, 1), (torch.bfloat16, 1), (torch.half, 60000)])
def test_the_vtp_is_computed_in_float32_whatever_the_embeddings_come_in(dtype, length, autocast):
    otp, emb = random_image()
    emb = (F.normalize(emb, dim=1) * length).to(dtype)  # half precision ends at 65504: a sum of squares would be inf
    expected = visual_text_prototypes(otp, emb.float() / length, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        vtp = visual_text_prototypes(otp, emb, 0.07)
    torch.testing.assert_close(vtp, expected, rtol=1e-5, atol=1e-6)  # the dtype too
    torch.testing.assert_close(vtp.norm(dim=2), torch.ones(B, K))
