"""Eq. 1 and 2: prototypes.py against plain loops, and what a prototype may and may not depend on."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from make_clip import make_clip

import prototypes
from prototypes import (TEMPLATES, VisualTextPrototypes, original_text_prototypes, random_prototypes,
                        shuffled_prototypes, source_mean_prototypes)

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


def random_image(seed=0, batch=B, dim=D):
    """otp (K, D), emb (B, D, H, W) and pooled (B, D), all unit, as model.py and Eq. 1 give them."""
    g = torch.Generator().manual_seed(seed)
    sizes = (K, dim), (batch, dim, H, W), (batch, dim)
    return tuple(F.normalize(torch.randn(size, generator=g), dim=1) for size in sizes)


def small_vtp():
    """A VTP module of width 16 that speaks up, as after training."""
    torch.manual_seed(0)
    module = VisualTextPrototypes(D, width=16, heads=2, layers=2)
    torch.nn.init.constant_(module.gamma, 0.5)
    return module


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


def test_random_prototypes_are_unit_rows_that_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    rows = random_prototypes(19, 64, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator belongs to training"
    assert rows.shape == (19, 64)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(19))
    assert torch.equal(rows, random_prototypes(19, 64, seed=3))
    assert not torch.allclose(rows, random_prototypes(19, 64, seed=4))
    assert (rows @ rows.T - torch.eye(19)).abs().max() < 0.7


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_prototypes_are_the_same_points_and_no_class_keeps_its_own(seed):
    otp = random_prototypes(19, 8)
    rows = shuffled_prototypes(otp, seed)
    found = (rows[:, None] == otp[None]).all(dim=2).int()  # row i is text j
    assert (found.sum(0) == 1).all() and (found.sum(1) == 1).all() and found.diagonal().sum() == 0
    assert torch.equal(rows, shuffled_prototypes(otp, seed))
    assert not torch.equal(rows, shuffled_prototypes(otp, seed + 5))


def test_source_means_equal_plain_loops_and_an_absent_class_gets_its_fallback():
    g = torch.Generator().manual_seed(0)
    batches = []
    for n in (3, 1):  # batches of different size: every pixel counts once, not every batch
        label = torch.randint(0, 3, (n, H, W), generator=g)
        label[torch.rand(n, H, W, generator=g) < 0.3] = 255
        emb = 0.01 * torch.randn(n, D, H, W, generator=g)  # short: a class whose sum is small is not an absent one
        batches.append((emb.requires_grad_(), label))
    fallback = random_prototypes(K, D)  # class 3 never occurs
    total = [[0.0] * D for _ in range(K)]
    for emb, label in batches:
        for b, i, j in (label != 255).nonzero().tolist():
            c = label[b, i, j].item()
            total[c] = [t + z for t, z in zip(total[c], emb[b, :, i, j].tolist())]
    got = source_mean_prototypes(iter(batches), fallback)
    expected = torch.tensor([norm(row) for row in total[:3]] + [fallback[3].tolist()])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)  # (K, D), float32
    assert torch.equal(got[3], fallback[3]) and not got.requires_grad
    assert torch.equal(source_mean_prototypes([(emb, torch.full_like(label, 255))], fallback), fallback)


# ------------------------------------------------------------------------------------------------------------- Eq. 2


@pytest.mark.parametrize("batch", [1, 3])
def test_eq_2_adds_gamma_times_the_answer_of_the_decoder_about_each_image_alone(batch):
    module, (otp, emb, pooled) = small_vtp(), random_image(batch=batch)
    torch.nn.init.normal_(module.gamma)
    vtp = module(otp, emb, pooled)
    assert vtp.shape == (batch, K, D) and vtp.dtype == torch.float32
    gamma, order_one = module.gamma.tolist(), math.sqrt(D)  # entries of a unit row are of order 1 / sqrt(D)
    for b in range(batch):
        tokens = torch.stack([pooled[b], *(emb[b, :, i, j] for i in range(H) for j in range(W))])
        told = module.decoder(module.query(otp * order_one)[None], module.memory(tokens * order_one)[None])
        for c, answer in enumerate(module.answer(told)[0].tolist()):
            row = norm([p + s * a for p, s, a in zip(otp[c].tolist(), gamma, answer)])
            assert vtp[b, c].tolist() == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("dim", [64, 1024])
def test_training_starts_at_the_otp(dim):
    torch.manual_seed(0)
    otp, emb, pooled = random_image(dim=dim)
    cosine = (VisualTextPrototypes(dim)(otp, emb, pooled) * otp).sum(-1)
    assert cosine.min() > 0.999
    assert (cosine < 1 - 1e-7).any(), "gamma is small, not 0"


def test_the_defaults_are_those_of_the_design():
    module = VisualTextPrototypes(32)
    layer = module.decoder.layers[0]
    assert (module.query.out_features, layer.self_attn.num_heads, len(module.decoder.layers)) == (256, 4, 3)
    assert layer.linear1.out_features == 4 * 256 and layer.norm_first
    assert isinstance(module.decoder.norm, torch.nn.LayerNorm)  # norm_first leaves the last sum as it is
    assert module.gamma.shape == (32,) and module.gamma.unique().tolist() == pytest.approx([1e-3])


def test_the_gradient_reaches_every_parameter_the_pixels_and_the_pooled_embedding_but_no_prototype():
    module, (otp, emb, pooled) = small_vtp(), random_image()
    emb.requires_grad_(), pooled.requires_grad_()
    vtp = module(otp, emb, pooled)
    (vtp * random_image(1)[0]).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (emb.grad.norm(dim=1) > 0).all() and (pooled.grad.norm(dim=1) > 0).all()
    assert otp.grad is None and not otp.requires_grad
    assert all(p.shape != otp.shape for p in module.state_dict().values()), "the OTP is an argument, never a parameter"


def test_permuted_classes_permute_the_rows_and_what_a_position_shows_matters_not_where_it_lies():
    module, (otp, emb, pooled) = small_vtp(), random_image()
    vtp = module(otp, emb, pooled)
    torch.testing.assert_close(module(otp[ORDER], emb, pooled), vtp[:, ORDER])
    shuffled = emb.flatten(2)[:, :, torch.randperm(H * W, generator=torch.Generator().manual_seed(0))].view(emb.shape)
    torch.testing.assert_close(module(otp, shuffled, pooled), vtp)
    assert not torch.allclose(module(otp, -emb, pooled), vtp, atol=1e-3)
    assert not torch.allclose(module(otp, emb, -pooled), vtp, atol=1e-3)


def test_train_mode_and_autocast_give_float32_unit_rows_as_eval_does():
    module, image = small_vtp(), random_image()
    exact = module.eval()(*image)
    first, second = module.train()(*image), module(*image)
    assert torch.equal(first, second), "no dropout"
    torch.testing.assert_close(first, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vtp = module(*image)
    torch.testing.assert_close(vtp.norm(dim=2), torch.ones(B, K))  # float32: bfloat16 has 3 digits
    assert vtp.dtype == torch.float32 and (vtp * exact).sum(-1).min() > 0.99


# ---------------------------------------------------------------------------------------------------------- the file


def test_prototypes_needs_torch_alone_outside_eq_1_and_its_demonstration_runs(capsys):
    imported = re.findall(r"^( *)(?:import|from) (\w+)", inspect.getsource(prototypes), re.M)
    assert set(imported) == {("", "torch"), ("    ", "clip")}
    prototypes._demo()
    assert "distance to OTP" in capsys.readouterr().out
