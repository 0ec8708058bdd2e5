"""Eq. 1 and 2: prototypes.py against plain loops, and what a prototype may and may not depend on."""

import ast
import inspect
import math

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
B, K, D, H, W = 2, 4, 24, 3, 5


@pytest.fixture(scope="module")
def clip_model():
    return make_clip("vit", layers=1)


def norm(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def random_image(seed=0, batch=B):
    """otp (K, D), emb (B, D, H, W) and pooled (B, D), all unit, as model.py and Eq. 1 give them."""
    g = torch.Generator().manual_seed(seed)
    return (F.normalize(torch.randn(K, D, generator=g), dim=1),
            F.normalize(torch.randn(batch, D, H, W, generator=g), dim=1),
            F.normalize(torch.randn(batch, D, generator=g), dim=1))


def small_vtp(seed=0, gamma=None):
    """A VTP module of width 16; gamma makes it speak up, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VisualTextPrototypes(D, width=16, heads=2, layers=2)
    if gamma is not None:
        torch.nn.init.constant_(module.gamma, gamma)
    return module


# ------------------------------------------------------------------------------------------------------------- Eq. 1


def test_eq_1_equals_plain_loops(clip_model):
    from clip import tokenize

    expected = []
    for name in NAMES:
        votes = []
        for prompt in PROMPTS:
            with torch.no_grad():
                votes.append(norm(clip_model.encode_text(tokenize(prompt.replace("{}", name)))[0].tolist()))
        expected.append(norm([sum(column) / len(votes) for column in zip(*votes)]))
    otp = original_text_prototypes(clip_model, NAMES, PROMPTS)
    assert otp.shape == (len(NAMES), 48)
    torch.testing.assert_close(otp, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_every_template_has_one_vote_whatever_the_length_of_its_embedding(clip_model):
    class Shouting:
        """The same text tower, but the first prompt of every call comes out a hundred times as long."""

        token_embedding, context_length = clip_model.token_embedding, clip_model.context_length

        @staticmethod
        def encode_text(tokens):
            return clip_model.encode_text(tokens) * torch.tensor([100.0] + [1.0] * (len(tokens) - 1))[:, None]

    torch.testing.assert_close(original_text_prototypes(Shouting, NAMES, PROMPTS),
                               original_text_prototypes(clip_model, NAMES, PROMPTS))


def test_otp_rows_are_unit_float32_distinct_and_frozen(clip_model):
    clip_model.requires_grad_(True)
    otp = original_text_prototypes(clip_model, NAMES)
    clip_model.requires_grad_(False)
    assert otp.dtype == torch.float32 and not otp.requires_grad
    torch.testing.assert_close(otp.norm(dim=1), torch.ones(len(NAMES)))
    assert (otp @ otp.T - torch.eye(len(NAMES))).max() < 0.9999


def test_the_default_templates_are_used_and_each_has_one_place_for_the_name(clip_model):
    assert len(TEMPLATES) == len(set(TEMPLATES)) and all(t.count("{}") == 1 for t in TEMPLATES)
    torch.testing.assert_close(original_text_prototypes(clip_model, NAMES),
                               original_text_prototypes(clip_model, NAMES, TEMPLATES))


def test_permuted_names_permute_the_rows_and_the_order_of_templates_does_not_matter(clip_model):
    otp = original_text_prototypes(clip_model, NAMES, PROMPTS)
    order = [2, 0, 3, 1]
    permuted = original_text_prototypes(clip_model, [NAMES[i] for i in order], PROMPTS[::-1])
    torch.testing.assert_close(permuted, otp[order])


def test_with_one_template_the_otp_is_the_embedding_of_the_text(clip_model):
    from clip import tokenize

    otp = original_text_prototypes(clip_model, NAMES, ["a photo of a {}."])
    with torch.no_grad():
        text = clip_model.encode_text(tokenize([f"a photo of a {name}." for name in NAMES]))
    torch.testing.assert_close(otp, F.normalize(text, dim=1))


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
    assert torch.equal(rows, shuffled_prototypes(otp, seed)) and not torch.equal(rows, shuffled_prototypes(otp, seed + 5))


def test_source_means_equal_plain_loops_and_an_absent_class_gets_its_fallback():
    g = torch.Generator().manual_seed(0)
    batches = []
    for n in (3, 1):  # batches of different size: every pixel counts once, not every batch
        label = torch.randint(0, 3, (n, H, W), generator=g)
        label[torch.rand(n, H, W, generator=g) < 0.3] = 255
        batches.append((F.normalize(torch.randn(n, D, H, W, generator=g), dim=1), label))
    fallback = random_prototypes(K, D)  # class 3 never occurs
    total = [[0.0] * D for _ in range(K)]
    for emb, label in batches:
        for b, i, j in (label != 255).nonzero().tolist():
            c = label[b, i, j].item()
            total[c] = [t + z for t, z in zip(total[c], emb[b, :, i, j].tolist())]
    got = source_mean_prototypes(iter(batches), fallback)
    assert got.shape == (K, D) and got.dtype == torch.float32
    torch.testing.assert_close(got[:3], torch.tensor([norm(row) for row in total[:3]]), rtol=1e-4, atol=1e-6)
    assert torch.equal(got[3], fallback[3])


def test_source_means_of_all_void_batches_are_the_fallback_and_carry_no_gradient():
    fallback = random_prototypes(K, D)
    emb = torch.randn(1, D, H, W, requires_grad=True)
    assert torch.equal(source_mean_prototypes([(emb, torch.full((1, H, W), 255))], fallback), fallback)
    assert not source_mean_prototypes([(emb, torch.zeros(1, H, W, dtype=torch.long))], fallback).requires_grad


# ------------------------------------------------------------------------------------------------------------- Eq. 2


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_vtp_is_one_set_of_unit_rows_per_image(batch):
    vtp = small_vtp(gamma=0.5)(*random_image(batch=batch))
    assert vtp.shape == (batch, K, D) and vtp.dtype == torch.float32
    torch.testing.assert_close(vtp.norm(dim=2), torch.ones(batch, K))


def test_eq_2_adds_gamma_times_the_answer_channel_by_channel():
    module, (otp, emb, pooled) = small_vtp(), random_image()
    torch.nn.init.normal_(module.gamma)
    seen = []
    module.answer.register_forward_hook(lambda _, __, output: seen.append(output))
    vtp = module(otp, emb, pooled)
    answer, gamma = seen[0].tolist(), module.gamma.tolist()
    for b in range(B):
        for c in range(K):
            row = norm([p + s * a for p, s, a in zip(otp[c].tolist(), gamma, answer[b][c])])
            assert vtp[b, c].tolist() == pytest.approx(row, abs=1e-5)


def test_the_decoder_reads_the_pooled_embedding_and_every_position_at_order_one():
    module, (otp, emb, pooled) = small_vtp(), random_image()
    seen = {}
    module.memory.register_forward_pre_hook(lambda _, args: seen.update(memory=args[0]))
    module.query.register_forward_pre_hook(lambda _, args: seen.update(query=args[0]))
    module(otp, emb, pooled)
    tokens = [[pooled[b], *(emb[b, :, i, j] for i in range(H) for j in range(W))] for b in range(B)]
    expected = torch.stack([torch.stack(t) for t in tokens])
    torch.testing.assert_close(seen["memory"], expected * math.sqrt(D))
    torch.testing.assert_close(seen["query"], otp * math.sqrt(D))
    assert seen["memory"].square().mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dim", [64, 512, 1024])
def test_training_starts_at_the_otp(dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = VisualTextPrototypes(dim)
        otp = random_prototypes(19, dim)
        emb, pooled = F.normalize(torch.randn(2, dim, 4, 4), dim=1), F.normalize(torch.randn(2, dim), dim=1)
    cosine = (module(otp, emb, pooled) * otp).sum(-1)
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


def test_the_prototypes_of_an_image_depend_on_that_image_alone():
    module, (otp, emb, pooled) = small_vtp(gamma=0.5), random_image()
    before = module(otp, emb, pooled)
    torch.testing.assert_close(module(otp, emb[:1], pooled[:1]), before[:1])
    emb, pooled = emb.clone(), pooled.clone()
    emb[1], pooled[1] = emb[1].flip(0), pooled[1].flip(0)
    after = module(otp, emb, pooled)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_permuted_classes_permute_the_rows():
    module, (otp, emb, pooled) = small_vtp(gamma=0.5), random_image()
    order = [3, 1, 0, 2]
    torch.testing.assert_close(module(otp[order], emb, pooled), module(otp, emb, pooled)[:, order])


def test_where_a_position_lies_does_not_matter_what_it_shows_does():
    module, (otp, emb, pooled) = small_vtp(gamma=0.5), random_image()
    shuffled = emb.flatten(2)[:, :, torch.randperm(H * W, generator=torch.Generator().manual_seed(0))].view(emb.shape)
    torch.testing.assert_close(module(otp, shuffled, pooled), module(otp, emb, pooled))
    assert not torch.allclose(module(otp, -emb, pooled), module(otp, emb, pooled), atol=1e-3)


def test_two_calls_in_train_mode_give_the_same_numbers_as_eval():
    module, image = small_vtp(gamma=0.5), random_image()
    with torch.no_grad():
        first, second = module.train()(*image), module.train()(*image)
        evaluated = module.eval()(*image)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, evaluated)


def test_under_autocast_the_prototypes_are_float32_unit_rows_near_the_exact_ones():
    module, image = small_vtp(gamma=0.5), random_image()
    exact = module(*image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vtp = module(*image)
    assert vtp.dtype == torch.float32
    torch.testing.assert_close(vtp.norm(dim=2), torch.ones(B, K))
    assert (vtp * exact).sum(-1).min() > 0.99


# ---------------------------------------------------------------------------------------------------------- the file


def test_prototypes_needs_torch_alone_outside_eq_1_and_its_demonstration_runs(capsys):
    tree = ast.parse(inspect.getsource(prototypes))

    def imported(nodes):
        nodes = list(nodes)
        names = {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
        return names | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}

    assert imported(tree.body) == {"torch"} and imported(ast.walk(tree)) == {"torch", "clip"}
    prototypes._demo()
    assert "distance to OTP" in capsys.readouterr().out
