"""Tests of ppar.py: Eq. 7 put together from Eq. 3 to 6, and what each switch does and does not compute."""

import pytest
import torch
import torch.nn.functional as F
from workbench import CPU, TERMS, assert_close, configured, one_batch, one_step

import align
import ppar
import prototypes
import reweight
from data import CLASSES
from model import load_clip

torch.set_num_threads(1)


@pytest.mark.parametrize("step, ramp", [(0, 0.0), (2, 0.5), (6, 1.0)])
def test_the_full_loss_and_its_gradient_are_equation_7_put_together_from_equations_3_to_6(step, ramp, world):
    config = configured(world, "--w-align", 0.7, "--tau", 0.2)
    image, label = one_batch(config, world)
    row, grads, module = one_step(config, image, label, step)
    assert row["ramp"] == pytest.approx(ramp) and row["lam"] == pytest.approx(ramp)

    module.zero_grad(set_to_none=True)
    logits, emb, vtp = module(image)
    grid = label[:, 8::16, 8::16]  # the label at the centre of each cell of stride 16

    def weight(y):
        omega = [reweight.reliability(emb, y, p, 0.2) for p in (module.otp, vtp)]
        return reweight.learning_weights((omega[0] + omega[1]) / 2, y, ramp)

    w = weight(label)
    full = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    seg = (w * F.cross_entropy(full, label, ignore_index=255, reduction="none")).sum() / w.sum()
    to_vtp, to_otp = (align.alignment_loss(emb, grid, p, 0.2, weight(grid)) for p in (vtp, module.otp))
    goal = 0.7 * ((1 - ramp) * to_vtp + ramp * to_otp)
    own = 0.2 * align.alignment_loss(emb, grid, vtp, 0.2)
    (seg + goal + own).backward()
    expected = [t.item() for t in (seg + goal + own, seg, goal, own)]
    assert [row[name] for name in TERMS] == pytest.approx(expected, abs=2e-5)
    assert_close(grads, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, 2e-4)
    alone = ppar.reliability(ppar.Output(logits, emb, None), module.otp, label, 0.2)  # without a VTP
    assert torch.equal(alone, reweight.reliability(emb, label, module.otp, 0.2))


@pytest.mark.parametrize("kind", ["text", "random", "shuffled"])
def test_build_takes_the_prototypes_that_the_flag_names_and_a_vtp_of_twice_the_width(kind, world):
    config = configured(world, "--prototypes", kind, "--seed", 1)
    module = ppar.build(config)[0]
    text = prototypes.original_text_prototypes(load_clip(config.clip)[0], CLASSES)
    controls = dict(random=prototypes.random_prototypes(*text.shape, 1), shuffled=prototypes.shuffled_prototypes(text, 1))
    assert torch.equal(module.otp, controls.get(kind, text))
    assert module.vtp.query.out_features == 2 * module.net.arch["width"]


PARTS = {  # what a switch promises not to compute
    "vtp": (prototypes.VisualTextPrototypes, "forward"), "alignment": (align, "alignment_map"),
    "progressive": (align, "progressive_alignment_map"), "reliability": (reweight, "reliability"),
    "weights": (reweight, "learning_weights"), "image": (reweight, "image_reliability"),
}


@pytest.mark.parametrize("flags, step, unused", [
    ("--method erm", 2, "vtp alignment progressive reliability weights image"),
    ("--align none --w-vtp 0", 2, "vtp alignment progressive image"),
    ("--align none", 2, "progressive image"), ("--align otp --w-vtp 0", 2, "vtp image"),
    ("--reweight none", 2, "reliability weights image"), ("", 2, "image"), ("--reweight image", 2, ""),
    ("", 0, "reliability weights image"),  # weights wait for the ramp: an untrained network has no opinion
])
def test_a_switch_that_is_off_computes_nothing_and_one_that_is_on_does(flags, step, unused, world, monkeypatch):
    config = configured(world, *flags.split())
    image, label = one_batch(config, world)
    called = set()
    for name, (owner, attribute) in PARTS.items():
        def spy(*args, real=getattr(owner, attribute), name=name, **more):
            called.add(name)
            return real(*args, **more)

        monkeypatch.setattr(owner, attribute, spy)
    row, _, module = one_step(config, image, label, step)
    assert called == set(PARTS) - set(unused.split())
    assert ("align" in row) == ("progressive" in called)
    assert (module.vtp is not None) == ("vtp" in called)


@pytest.mark.parametrize("flags", ["", "--align otp", "--w-vtp 0", "--align reversed --w-vtp 0"])
def test_every_trainable_part_gets_a_gradient_at_every_step_and_the_otp_none(flags, world):
    """DistributedDataParallel waits for ever for one that gets none."""
    config = configured(world, *flags.split())
    image, label = one_batch(config, world)
    module = None
    for step in (0, 2, 7):
        _, grads, module = one_step(config, image, label, step, module)
        assert set(grads) == {n for n, p in module.named_parameters() if p.requires_grad}
        assert all((grad != 0).any() for name, grad in grads.items() if not name.startswith("vtp."))
    assert not module.otp.requires_grad and module.otp.grad is None


def test_the_balance_is_the_count_of_the_class_to_the_power_so_at_one_every_class_has_the_same_say(world):
    label = torch.tensor([[[0, 0, 0, 2], [2, 255, 0, 1]]])
    for power in (0.5, 1.0):
        config = configured(world, "--method", "erm", "--balance", power)
        got = ppar.learning_weights(None, None, label, config, ramp=1.0)
        expected = [[n ** -power for n in row] for row in ([4, 4, 4, 2], [2, 1, 4, 1])]
        expected[1][1] = 0  # void
        assert torch.allclose(got, torch.tensor([expected]))
    doubled = ppar.learning_weights(None, None, label, config, ramp=1.0, reduce=lambda x: 2 * x)  # two equal processes
    assert torch.allclose(doubled, got / 2)


def test_distance_is_to_the_prototype_of_the_own_class_and_zero_on_void():
    emb, label = torch.randn(2, 5, 2, 3), torch.tensor([[[0, 1, 255], [2, 2, 0]], [[1, 1, 1], [255, 0, 2]]])
    goals = torch.randn(2, 3, 5)
    for given in (goals, goals[1]):
        got = ppar.distance(emb, label, given)
        for b, i, j in torch.ones(2, 2, 3).nonzero().tolist():
            own = (given if given.dim() == 2 else given[b])[label[b, i, j] % 255]
            expected = 0 if label[b, i, j] == 255 else (emb[b, :, i, j] - own).norm().item()
            assert got[b, i, j].item() == pytest.approx(expected, abs=1e-6)


def test_a_look_at_a_picture_pads_the_label_with_void_and_a_cell_has_the_label_of_its_centre(world):
    module = ppar.build(configured(world))[0]
    image, label = torch.randn(3, 50, 70), torch.randint(0, 19, (50, 70))
    out, padded, grid = ppar.look(module, image, label)
    assert padded.shape == (1, 64, 96) and torch.equal(padded[0, :50, :70], label)
    assert (padded[0, 50:] == 255).all() and (padded[0, :, 70:] == 255).all()
    assert out.emb.shape[2:] == grid.shape[1:] == (4, 6) and grid.device == CPU and not out.emb.requires_grad
    assert torch.equal(grid[0, :3, :4], label[8:50:16, 8:70:16])


def test_the_demonstration_shows_the_wrong_label_losing_its_weight(capsys):
    ppar._demo()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("lambda") for line in lines)
