"""ppar.py: Eq. 7 put together from Eq. 3 to 6 in plain loops, and what each switch does and does not compute."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from workbench import CPU, configured, numbers, one_batch, unit_rows

import align
import data
import ppar
import prototypes
import reweight
import train
from data import CLASSES
from model import load_clip

torch.set_num_threads(1)

B, K, D, H, W = 2, 4, 6, 16, 48  # label; emb at stride 8, logits at stride 4
TAU, JUDGE = 0.3, 0.4  # temperature, and the share of the text score in the second opinion


def settings(**more):
    """The numbers of a step in the middle of a run."""
    return {**dict(lam=0.7, ramp=0.6, tau=TAU, judge_text=JUDGE, balance=0.5, w_align=0.7), **more}


def random_case():
    """Output, otp and label (B, H, W): the left third as decoder and CLIP's copy have it, the rest at random, some void."""
    g = torch.Generator().manual_seed(0)
    emb, clip_emb = (F.normalize(torch.randn(B, D, H // n, W // n, generator=g), dim=1) for n in (8, 16))
    otp, vtp = (F.normalize(torch.randn(*size, D, generator=g), dim=-1) for size in ((K,), (B, K)))
    out = ppar.Output(4 * torch.randn(B, K, H // 4, W // 4, generator=g), emb, vtp, clip_emb)
    label = torch.randint(0, K, (B, H, W), generator=g)
    label[:, :, :W // 3] = at_label(second_opinion(out, otp).argmax(dim=1))[:, :, :W // 3]
    label[torch.rand(B, H, W, generator=g) < 0.2] = 255
    return out, otp, label


def at_label(x):
    """Each cell of logits' grid as the 4 x 4 pixels of the label that lie in it."""
    return x.repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)


def cross_entropy(scores, y):
    return math.log(sum(math.exp(s) for s in scores)) - scores[y]


def resized(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def second_opinion(out, otp):
    """log q of Eq. 5: decoder, and the text score of CLIP's copy."""
    text = resized(torch.einsum("bdhw,kd->bkhw", out.clip_emb, otp), out.logits.shape[2:]) / TAU
    return (1 - JUDGE) * out.logits + JUDGE * text


def weights_in_loops(out, otp, label, ramp, balance):
    """Eq. 5 and 6 in Python numbers, and the same with the balance of the classes."""
    p = at_label(second_opinion(out, otp).softmax(dim=1))
    labelled = [tuple(place) for place in (label != 255).nonzero().tolist()]
    omega = {(b, i, j): (p[b, label[b, i, j], i, j] / p[b, :, i, j].max()).item() for b, i, j in labelled}
    weight = {}
    for b, i, j in labelled:  # the window: a cell of 8 pixels to each side
        around = [omega[b, y, x] for y in range(i - 8, i + 9) for x in range(j - 8, j + 9) if (b, y, x) in omega]
        doubtful = omega[b, i, j] < 0.2 and sum(around) / len(around) < 0.5
        weight[b, i, j] = 1 - ramp * doubtful
    count = [sum(w for at, w in weight.items() if label[at] == c) for c in range(K)]
    return weight, {at: w * max(1, count[label[at]]) ** -balance for at, w in weight.items()}


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_the_terms_of_equation_7_equal_plain_loops_of_equations_3_to_6(ramp, lam, balance):
    out, otp, label = random_case()
    terms = ppar.objective(out, otp, label, **settings(lam=lam, ramp=ramp, balance=balance))
    assert list(terms) == ["seg", "align"]

    weight, balanced = weights_in_loops(out, otp, label, ramp, balance)
    logits, goal = resized(out.logits, (H, W)), F.normalize((1 - lam) * out.vtp + lam * otp, dim=2)
    cells = [(b, i, j) for b, i, j in weight if i % 8 == j % 8 == 4]  # the pixels in the middle of a cell
    losses = {(b, i, j): cross_entropy(logits[b, :, i, j].tolist(), label[b, i, j]) for b, i, j in weight}
    cosine = torch.einsum("bdhw,bkd->bkhw", out.emb, goal)
    to_goal = {(b, i, j): cross_entropy((cosine[b, :, i // 8, j // 8] / TAU).tolist(), label[b, i, j]) for b, i, j in cells}
    for name, weights, parts, share in (("seg", balanced, losses, 1), ("align", weight, to_goal, 0.7)):
        mean = sum(weights[place] * loss for place, loss in parts.items()) / sum(weights[place] for place in parts)
        assert terms[name].item() == pytest.approx(share * mean, rel=1e-4)
    if ramp:  # the case is no empty one: some of the doubtful lose their weight
        assert 0.02 < sum(w < 1 for w in weight.values()) / len(weight) < 0.9


@pytest.mark.parametrize("label_all", [255, 1])
def test_a_batch_without_labels_and_one_without_weight_have_finite_losses_and_gradients(label_all):
    (logits, emb, vtp, clip_emb), otp, label = random_case()
    logits = (logits * 0 + torch.tensor([90.0, 0, 0, 0]).view(1, K, 1, 1)).requires_grad_()  # all of it is doubted
    out = ppar.Output(logits, emb.requires_grad_(), vtp, clip_emb)
    terms = ppar.objective(out, otp, torch.full_like(label, label_all), **settings(ramp=1.0))
    sum(terms.values()).backward()
    assert [term.item() for term in terms.values()] == [0, 0]
    assert (logits.grad == 0).all() and (emb.grad == 0).all()  # false for NaN, too


@pytest.mark.parametrize("balance", [0, 0.5])
def test_half_a_batch_in_each_of_two_processes_gives_what_the_whole_batch_gives(balance):
    out, otp, label = random_case()
    label[0, :, 20:] = 255  # of one half less counts
    barrier, slots = threading.Barrier(2, timeout=20), [None, None]

    def work(part, reduce=None):
        leaves = [x[part].clone().requires_grad_() for x in out[:2]]
        mine = ppar.Output(*leaves, out.vtp[part], out.clip_emb[part])
        terms = ppar.objective(mine, otp, label[part], **settings(balance=balance), reduce=reduce)
        sum(terms.values()).backward()
        return torch.stack(list(terms.values())), *(x.grad for x in leaves)

    def process(rank):
        def reduce(x):  # waits for the other process and gives the sum, as an all-reduce does
            slots[rank] = x.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return work(slice(rank, rank + 1), reduce)

    whole = work(slice(None))
    with ThreadPoolExecutor(2) as pool:
        terms, *grads = zip(*pool.map(process, (0, 1)))
    torch.testing.assert_close((sum(terms), *map(torch.cat, grads)), whole, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(sum(work(slice(n, n + 1))[0] for n in (0, 1)), whole[0], rtol=0.1)  # so it was needed


def test_the_prediction_mixes_decoder_and_text_in_the_share_that_the_flag_says():
    out, otp, _ = random_case()
    text = resized(torch.einsum("bdhw,kd->bkhw", out.emb, otp) / TAU, out.logits.shape[2:])
    logits, emb = out.logits.requires_grad_(), 5 * out.emb.requires_grad_()  # the length says nothing
    for beta in (0, 0.4, 1):
        got = ppar.prediction(logits, emb, otp, tau=TAU, text_weight=beta)
        torch.testing.assert_close(got, (1 - beta) * out.logits.detach() + beta * text, rtol=1e-4, atol=1e-5)
        assert not got.requires_grad


# ---------------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("kind", ["text", "shuffled"])
def test_build_takes_the_prototypes_that_the_flag_names_and_the_same_network_for_every_method(kind, world):
    config = configured(world, "--prototypes", kind, "--seed", 1)
    module, plain = train.build(config)[0], train.build(configured(world, "--method", "erm", "--seed", 1))[0]
    text = prototypes.original_text_prototypes(load_clip(config.clip)[0], CLASSES)
    assert torch.equal(module.otp, dict(text=text, shuffled=prototypes.shuffled_prototypes(text, 1))[kind])
    assert (module.tau, module.beta) == (config.tau_assign, config.beta)
    torch.testing.assert_close(module.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)


class Tower(torch.nn.Module):
    """In place of CLIP: notes what it is shown, and every cell of `multiple` pixels is embedded as its mean colours."""

    def __init__(self, multiple):
        super().__init__()
        self.multiple, self.seen = multiple, []

    def forward(self, image):
        self.seen.append(image)
        return None, F.avg_pool2d(image, self.multiple)


@pytest.mark.parametrize("multiple, size, half", [(32, (32, 160), (32, 64)), (14, (70, 98), (28, 56))])
def test_the_vtp_looks_at_half_the_image_in_a_size_that_the_tower_takes(multiple, size, half):
    tower, otp, image = Tower(multiple), unit_rows(K, 3), torch.randn(B, 3, *size)
    vtp, emb = ppar.PPAR(torch.nn.Identity(), otp, tower, TAU).ask_frozen_clip(image)
    small = F.interpolate(image, size=half, mode="bilinear", align_corners=False, antialias=True)
    assert len(tower.seen) == 1 and torch.equal(tower.seen[0], small)
    assert torch.equal(emb, F.avg_pool2d(small, multiple)) and torch.equal(vtp, prototypes.visual_text_prototypes(otp, emb, TAU))


@pytest.mark.parametrize("flags", ["", "--align otp --no-reweight", "--align vtp --freeze 0", "--align vtp-to-otp"])
def test_every_trainable_part_gets_a_gradient_at_every_step_and_clip_and_the_otp_none(flags, world):
    config = configured(world, *flags.split())  # DistributedDataParallel waits for ever for one that gets none
    (image, label), module = one_batch(config, world), train.build(config)[0].train()
    before = {name: t.clone() for name, t in module.state_dict().items() if not name.startswith("net.")}
    assert {name.split(".")[0] for name in before} == ({"otp", "seen", "clip"} if "no-reweight" not in flags else {"otp", "seen"})
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for step in (0, 2, 7):
        module.zero_grad(set_to_none=True)
        sum(ppar.objective(module(image), module.otp, label, **numbers(config, step)).values()).backward()
        for name, p in module.named_parameters():
            assert (p.grad is not None) == p.requires_grad <= name.startswith("net."), name
            assert not p.requires_grad or (p.grad != 0).any(), name
        optimizer.step()
    assert all(torch.equal(module.state_dict()[name], t) for name, t in before.items())
    if module.clip is not None:  # CLIP's tower as the file has it, though the network's has moved
        theirs, own = load_clip(config.clip)[0].visual.state_dict(), module.clip.visual.state_dict()
        assert all(torch.equal(theirs[name], own[name]) for name in own)


def test_padding_is_found_wherever_the_image_lies_on_the_canvas_and_no_pixel_of_the_image_is_taken_for_it(world):
    items, found = data.list_items("gta5", str(world["root"]), "train"), 0
    module = ppar.PPAR(torch.nn.Identity(), unit_rows(K, 3))
    for n in range(12):  # scales from 0.5 on: 36 x 50 pixels in a crop of 96 x 128
        image, label = data.training_view(items[n % len(items)], (96, 128), np.random.default_rng(n))
        image = image.copy()  # a view without padding is read-only
        y, x = (int(values[len(values) // 2]) for values in np.nonzero((image != np.array(data.PADDING)).any(axis=2)))
        image[y, x] = data.PADDING  # a pixel in the midst of the image that happens to have the colour
        shown = ppar.shows_image(data.to_tensor(image)[None], module.padding)[0]
        inside = np.zeros(label.shape, bool)  # the rectangle around all that has another colour
        rows, columns = np.nonzero((image != np.array(data.PADDING)).any(axis=2))
        inside[rows.min():rows.max() + 1, columns.min():columns.max() + 1] = True
        assert torch.equal(shown.bool(), torch.as_tensor(inside)) and (label[~inside] == 255).all()
        found += not inside.all()
    assert found > 3 and (ppar.shows_image(torch.randn(1, 3, 8, 8), module.padding) == 1).all()


@pytest.mark.parametrize("mask_padding", [False, True])
def test_eq_2_gets_the_share_of_each_cell_that_shows_the_image_if_the_flag_says_so_and_beta(mask_padding):
    otp, image = unit_rows(K, 3), torch.randn(B, 3, 32, 64)
    module = ppar.PPAR(torch.nn.Identity(), otp, Tower(4), TAU, 0.4, mask_padding)
    image[:, :, :, 36:] = module.padding  # half a cell of 8 pixels is left: cells of 4 at half the size
    image[1, :, :8] = module.padding
    vtp, emb = module.ask_frozen_clip(image)
    shown = torch.ones(B, 4, 8)
    shown[:, :, 5:], shown[:, :, 4], shown[1, 0] = 0, 0.5, 0
    expected = prototypes.visual_text_prototypes(otp, emb, TAU, 0.4, shown=shown if mask_padding else None)
    torch.testing.assert_close(vtp, expected, rtol=0, atol=0)


def test_naive_prototypes_take_the_place_of_the_text_in_goal_and_prediction_and_come_back_from_a_state_dict():
    out, otp, label = random_case()
    module, text = ppar.PPAR(torch.nn.Identity(), otp.clone()), otp
    module.follow_source(out.emb, label)
    grid = align.labels_on_grid(label, out.emb)
    mean = torch.stack([out.emb.permute(0, 2, 3, 1)[grid == c].mean(dim=0) for c in range(K)])
    torch.testing.assert_close(module.otp, F.normalize(mean, dim=1))
    assert module.seen.all() and not torch.allclose(module.otp, text, atol=0.1)
    twin = ppar.PPAR(torch.nn.Identity(), text.clone())
    twin.load_state_dict(module.state_dict())
    for either in (module, twin):
        either.follow_source(out.emb.flip(0), label)
    assert torch.equal(module.otp, twin.otp) and torch.equal(module.seen, twin.seen)


PARTS = dict(  # what a switch promises not to compute
    vtp=(prototypes, "visual_text_prototypes"), alignment=(align, "alignment_map"), cosine=(align, "cosine_similarity_map"),
    reliability=(reweight, "reliability"), place=(reweight, "place_reliability"), weights=(reweight, "learning_weights"))


@pytest.mark.parametrize("flags, step, unused", [
    ("--method erm", 2, "vtp alignment cosine reliability place weights"),
    ("--align none --no-reweight", 2, "vtp alignment cosine reliability place weights"), ("--align none", 2, "alignment"),
    ("--align otp --no-reweight", 2, "vtp reliability place weights"), ("--no-reweight", 2, "reliability place weights"), ("", 2, ""),
    ("", 0, "reliability place weights"),  # weights wait for the ramp: an untrained network has no opinion
])
def test_a_switch_that_is_off_computes_nothing_and_one_that_is_on_does(flags, step, unused, world, monkeypatch):
    config = configured(world, *flags.split())
    (image, label), called = one_batch(config, world), set()
    for name, (owner, attribute) in PARTS.items():
        def spy(*args, real=getattr(owner, attribute), name=name, **more):
            called.add(name)
            return real(*args, **more)

        monkeypatch.setattr(owner, attribute, spy)
    module = train.build(config)[0]
    out = module(image)
    terms, at = ppar.objective(out, module.otp, label, **numbers(config, step)), train.schedule(config, step)
    assert called == set(PARTS) - set(unused.split())
    assert ("align" in terms) == ("alignment" in called) == (at["lam"] is not None)
    assert (out.vtp is not None) == (module.clip is not None) == ("vtp" in called)


def test_the_easier_goal_is_measured_over_labelled_cells_and_over_the_trusted_ones():
    out, otp, label = random_case()
    vtp = torch.randn(B, K, D, generator=torch.Generator().manual_seed(1))  # with these, the shares differ
    out = out._replace(vtp=F.normalize(vtp, dim=-1))
    got = ppar.compare_goals(out, otp, label, tau=TAU, judge_text=JUDGE)
    weight, _ = weights_in_loops(out, otp, label, ramp=1.0, balance=0)
    cells, sums, trusted = [at for at in weight if at[1] % 8 == at[2] % 8 == 4], dict.fromkeys(got, 0.0), 0
    for b, i, j in cells:
        z, y, numbers_of = out.emb[b, :, i // 8, j // 8], label[b, i, j], {}
        for name, goal in (("otp", otp), ("vtp", out.vtp[b])):
            numbers_of[name] = (z - goal[y]).norm().item(), cross_entropy((goal @ z / TAU).tolist(), y)
            sums["radius_" + name] += numbers_of[name][0]
            sums["loss_" + name] += numbers_of[name][1]
        if weight[b, i, j] == 1:
            trusted += 1
            sums["nearer_vtp"] += numbers_of["vtp"][0] < numbers_of["otp"][0]
            sums["easier_vtp"] += numbers_of["vtp"][1] < numbers_of["otp"][1]
    expected = {name: value / (trusted if name.endswith("er_vtp") else len(cells)) for name, value in sums.items()}
    assert got == pytest.approx(expected, rel=1e-5) and 0.2 < trusted / len(cells) < 0.9
    assert 0 < got["nearer_vtp"] < 1 and 0 < got["easier_vtp"] < 1 and got["nearer_vtp"] != got["easier_vtp"]
    alone = ppar.compare_goals(ppar.Output(*out[:2]), otp, label, tau=TAU, judge_text=JUDGE)
    assert alone == {name: got[name] for name in ("radius_otp", "loss_otp")}
    void = ppar.compare_goals(out, otp, torch.full_like(label, 255), tau=TAU, judge_text=JUDGE)
    assert set(void.values()) == {0}


def test_distance_is_to_the_prototype_of_the_own_class_and_zero_on_void():
    emb, label = torch.randn(2, 5, 2, 3), torch.tensor([[[0, 1, 255], [2, 2, 0]], [[1, 1, 1], [255, 0, 2]]])
    goals = torch.randn(2, 3, 5)
    for given in (goals, goals[1]):
        got = align.distance(emb, label, given)
        for b, i, j in torch.ones(2, 2, 3).nonzero().tolist():
            own = (given if given.dim() == 2 else given[b])[label[b, i, j] % 255]
            expected = 0 if label[b, i, j] == 255 else (emb[b, :, i, j] - own).norm().item()
            assert got[b, i, j].item() == pytest.approx(expected, abs=1e-6)


def test_a_look_at_a_picture_pads_the_label_with_void_and_a_cell_has_the_label_of_its_centre(world):
    module = train.build(configured(world))[0]
    image, label = torch.randn(3, 50, 70), torch.randint(0, 19, (50, 70))
    out, padded, grid = ppar.look(module, image, label.numpy().astype(np.uint8))
    assert padded.shape == (1, 64, 96) and torch.equal(padded[0, :50, :70], label)
    assert (padded[0, 50:] == 255).all() and (padded[0, :, 70:] == 255).all()
    assert out.emb.shape[2:] == grid.shape[1:] == (4, 6) and grid.device == CPU and not out.emb.requires_grad
    assert torch.equal(grid[0, :3, :4], label[8:50:16, 8:70:16])
