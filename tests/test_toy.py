"""test_toy.py: the drawn world is the same for everybody, its labels are exact, its gap is real, its CLIP is a CLIP."""

import subprocess
import sys
from pathlib import Path

import clip
import model
import numpy as np
import pytest
import toy
import toy_clip
import torch
from data import UserError
from prototypes import TEMPLATES

TARGETS = [name for name in toy.DOMAINS if name != "toy-gta5"]


@pytest.fixture(scope="module")
def scenes():
    return {name: [toy.draw(name, "train", index)[:2] for index in range(30)] for name in toy.DOMAINS}


# Mean of image, label and wrong over 12 training scenes with harmful=0.3: what toy_clip.pt and the committed rows saw.
DRAWN = {"toy-gta5": (115.947, 3.5358, .1013), "toy-cityscapes": (109.475, 23.4136, .0313),
         "toy-bdd": (119.183, 10.4813, .1089), "toy-mapillary": (126.653, 4.3765, .1260),
         "toy-night": (49.903, 3.6988, .1078), "toy-fog": (140.244, 4.5917, .0861),
         "toy-snow": (161.897, 4.7155, .1516), "toy-dev": (101.069, 4.6734, .2179),
         "toy-dev-2": (78.6189, 4.0364, .1235), "toy-dev-3": (100.3787, 4.3531, .1378), "toy-dev-4": (90.2953, 4.0821, .1261)}


@pytest.mark.parametrize("name", toy.DOMAINS)
def test_the_pixels_are_those_of_the_committed_weights_and_rows(name):
    drawn = [np.mean(arrays) for arrays in zip(*(toy.draw(name, "train", index, harmful=.3) for index in range(12)))]
    assert np.abs(np.subtract(drawn, DRAWN[name])).max() < .002, np.round(drawn, 4)  # Pillows differ in a few pixels


def test_scenes_are_the_same_bits_in_another_process_and_order_whatever_the_global_generator(capsys):
    code = ("import hashlib, toy\nfor name, index in {}:\n    arrays = toy.draw(name, 'train', index, harmful=1.0)\n"
            "    print(hashlib.sha256(b''.join(a.tobytes() for a in arrays)).hexdigest())")
    pairs = [(name, index) for name in ("toy-gta5", "toy-snow") for index in (0, 5)]
    exec(code.format(pairs))
    command = [sys.executable, "-c", code.format(pairs[::-1])]  # its global generator starts from another state
    there = subprocess.check_output(command, cwd=Path(toy.__file__).parent, text=True).split()
    assert len(set(there)) == 4 and there == capsys.readouterr().out.split()[::-1]


def test_domain_split_index_and_seed_each_give_another_scene(scenes):
    base = dict(domain="toy-gta5", split="train", index=1, seed=0)
    others = [base | change for change in (dict(split="val"), dict(index=2), dict(seed=1), dict(domain="toy-bdd"))]
    assert len({toy.draw(**arguments)[1].tobytes() for arguments in (base, *others)}) == 5
    train = {label.tobytes() for _, label in scenes["toy-gta5"]}
    assert not train & {toy.draw("toy-gta5", "val", index)[1].tobytes() for index in range(30)}


@pytest.mark.parametrize("name", toy.DOMAINS)
def test_scenes_have_the_promised_form_and_every_drawn_class(scenes, name):
    layout, look = toy.DOMAINS[name]["layout"], toy.DOMAINS[name]["look"]
    assert set(layout) <= set(toy.STREET) and set(look) <= {*toy.PLAIN, "palette"}  # a mistyped key would change nothing
    images, labels = map(np.stack, zip(*scenes[name]))
    assert images.shape == (*labels.shape, 3) == (30, toy.HEIGHT, toy.WIDTH, 3)
    assert images.dtype == labels.dtype == np.uint8
    counts = np.stack([np.bincount(label.ravel(), minlength=256) for label in labels])
    assert set(np.flatnonzero(counts.sum(0))) - {toy.VOID} == set(toy.CLASSES)
    assert counts.sum(0)[list(toy.CLASSES)].min() >= 30
    assert ((counts[:, :19] >= 20).mean(0) >= 1 / 4).sum() >= 12  # as many classes are common


def test_labels_are_the_same_under_every_look_while_images_differ():
    images, labels, _ = zip(*(toy.draw("toy-gta5", "val", 0, look=look) for look in toy.DOMAINS))
    assert all((label == labels[0]).all() for label in labels)
    assert len({image.tobytes() for image in images}) == len(images)


def test_painting_a_class_in_one_flat_colour_gives_the_label_back():
    """The image's edges are the label's, to the pixel: paint by class and nothing else, and read the classes again."""
    shades = {c: [(10 + 12 * c,) * 3] for c in range(20)}
    none = dict.fromkeys(("sun", "shadow", "joint", "brick", "window", "cloud", "leaf", "grass", "noise"), (0, 0))
    flat = dict(none, palette=shades, jitter=0, mark=shades[toy.ROAD][0], texture={c: (0, 0) for c in range(20)})
    rng = np.random.default_rng(3)
    scene = toy.Scene(rng, toy.STREET)
    label = scene.column(0)
    scene.table = [(cls, toy.BODY, obj, toy.FRONT, 10.0, 1.0) for cls, _, obj, _, _, _ in scene.table]
    image = toy.paint(rng, scene, flat)[..., 0].astype(int)
    plain = ~np.isin(label, (toy.SKY, toy.FENCE, toy.SIDEWALK, toy.ROAD, toy.VOID))  # these keep a pattern of their own
    assert plain.mean() > .2 and (np.abs(image - (10 + 12 * label))[plain] <= 1).all()


def test_the_share_of_harmful_scenes_is_the_flag_and_grows_by_adding():
    def spoilt(split, share):
        return {index for index in range(120) if toy.draw("toy-gta5", split, index, harmful=share)[2].any()}

    few, more = spoilt("train", .1), spoilt("train", .3)
    assert few < more and 4 <= len(few) <= 22 and 24 <= len(more) <= 50  # 3 standard deviations
    assert not spoilt("train", 0) and not spoilt("val", 1)  # validation is never spoilt


def test_wrong_marks_all_that_was_changed_and_a_fifth_or_more_of_the_scene():
    shares = []
    for index in range(20):
        image, label, _ = toy.draw("toy-gta5", "train", index)
        bad_image, bad_label, wrong = toy.draw("toy-gta5", "train", index, harmful=1.0)
        assert (image[~wrong] == bad_image[~wrong]).all() and (label[~wrong] == bad_label[~wrong]).all()
        changed = (label != bad_label) | (image != bad_image).any(2)
        assert changed[wrong].mean() > .9  # a class's own label under alien texture can be the old one
        assert set(np.unique(bad_label)) <= {*toy.CLASSES, toy.VOID}
        shares.append(wrong.mean())
    assert .2 <= min(shares) and max(shares) < .6 and .25 < np.mean(shares) < .45


def test_colour_alone_tells_the_class_in_the_source_and_nowhere_else():
    score = toy._demo(scenes=8)
    assert score["toy-gta5"] > .8 and max(score[name] for name in TARGETS) < .55


def test_every_scene_of_the_development_domain_has_a_weather_of_its_own(scenes):
    spread = {name: np.std([image.mean() for image, _ in pairs]) for name, pairs in scenes.items()}  # of the brightness
    looks = [spread.pop(name) for name in [*spread] if name.startswith("toy-dev")]
    assert min(looks) > 1.5 * max(spread[name] for name in set(spread) - {"toy-mapillary"})


def test_the_embedded_clip_is_small_in_half_precision_and_knows_every_word_of_the_templates():
    assert Path(model.TOY_CLIP).stat().st_size < 10e6
    state = torch.load(model.TOY_CLIP, weights_only=True)
    assert all(v.dtype == torch.float16 and torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    rows = state["token_embedding.weight"].float().norm(dim=1)
    tokens = clip.tokenize([t.format(toy_clip.CLASSES[c]) for t in TEMPLATES for c in toy.CLASSES])
    assert (rows[tokens] > 0).all() and (rows == 0).sum() > 49000  # what was never trained is zero


def test_a_file_of_an_earlier_version_gets_its_mark_by_a_command_and_keeps_every_bit(tmp_path, monkeypatch, capsys):
    committed, path = torch.load(model.TOY_CLIP), tmp_path / "old.pt"
    old = {name: tensor for name, tensor in committed.items() if name != "computed_as"}
    assert len(old) == len(committed) - 1 and bytes(committed["computed_as"].tolist()).endswith(b"QuickGELU, heads of width 64")
    torch.save(old, path)
    with pytest.raises(UserError, match="old.pt has not the towers"):
        model.load_clip(str(path))
    monkeypatch.setattr(sys, "argv", ["toy_clip.py", "--mark", "--out", str(path)])
    for _ in range(2):  # the second time changes nothing
        toy_clip.main()
        marked = torch.load(path)
        assert [*marked] == [*committed] and all(torch.equal(marked[name], committed[name]) for name in committed)
    assert path.stat().st_size < 4e6  # compressed, as the committed one is
    assert "153 tensors as they were" in capsys.readouterr().out
    assert "0 left over; QuickGELU" in model.load_clip(str(path))[1] and [*tmp_path.iterdir()] == [path]

    other = {**old, "ln_final.weight": torch.zeros(65)}  # what another tower computes, no mark must claim
    torch.save(other, path)
    with pytest.raises(SystemExit, match=f"error: {path} was not made by toy_clip.py .*it gets no mark"):
        toy_clip.main()
    assert model.MARK not in torch.load(path)


def test_the_embedded_clip_names_crops_in_styles_that_it_never_saw(monkeypatch, capsys):
    """A floor for a sample of crops (chance 0.06); the figures to quote are those of `python toy_clip.py --check`."""
    monkeypatch.setattr(sys, "argv", ["toy_clip.py"])
    toy_clip.main()
    rows = [line.rsplit(None, 9) for line in capsys.readouterr().out.splitlines()[1:-1]]
    top1 = {row[0].strip(): dict(zip(row[1:7:2], map(float, row[2:7:2]))) for row in rows}
    assert set(top1) == {*toy.DOMAINS, *(toy_clip.CLASSES[c] for c in toy.CLASSES), "all domains"}
    assert np.mean([top1[name]["cut"] for name in TARGETS]) > .5
    assert top1["all domains"] == pytest.approx(dict(native=.540, zoom=.568, cut=.716), abs=.01)


@pytest.mark.parametrize("styles, pixels, texts, words, order", [("web", 108.746, 141, 16059691, 29365),
                                                                 ("source", 112.831, 126, 14054291, 22176)])
def test_a_batch_of_the_web_is_a_function_of_its_number(styles, pixels, texts, words, order):
    first, again, other = (toy_clip.web_batch(n, 0, styles) for n in (2, 2, 3))
    assert all((a == b).all() for a, b in zip(first, again))
    assert first[0].shape == other[0].shape == (384, 32, 32, 3) and (first[0] != other[0]).any()
    images, tokens, which = first  # those that toy_clip.pt was trained on, to a few pixels
    assert images.float().mean().item() == pytest.approx(pixels, abs=.02)
    assert (len(tokens), tokens.sum(), which.sum(), which.max() + 1) == (texts, words, order, texts)


def test_the_web_never_shows_weather_and_lamps_that_only_targets_have():
    looks = [toy_clip._web(np.random.default_rng(index))[1] for index in range(50)]
    assert not {"haze", "snow", "lit", "glow", "wet"} & set().union(*looks)
    assert min(look["light"][0] for look in looks) >= .55


def test_training_writes_a_file_that_loads_as_the_function_that_was_trained(tmp_path, monkeypatch, capsys):
    kept, save, out = [], toy_clip._save, str(tmp_path / "clip.pt")
    monkeypatch.setattr(toy_clip, "SCENES", 2)
    monkeypatch.setattr(toy_clip, "_save", lambda *args: kept.extend(args) or save(*args))
    monkeypatch.setattr(sys, "argv", ["toy_clip.py", "--train", "--steps", "2", "--out", out])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests keep theirs
    with torch.random.fork_rng():
        toy_clip.main()
    assert float(capsys.readouterr().out.split()[5]) == pytest.approx(5.018, abs=.02)
    (net, used, _), small = kept, model.load_clip(out)[0]
    assert (small.visual.attnpool.positional_embedding[1:] == 0).all()  # in the biases: pixels are read without a code
    image, tokens = torch.randn(4, 3, 32, 32), clip.tokenize(["a dark photo of a bus.", "sky"])
    with torch.no_grad():
        for got, want in ((small.encode_image(image), net.eval().encode_image(image)),
                          (small.encode_text(tokens), net.encode_text(torch.searchsorted(used, tokens)))):
            torch.testing.assert_close(got, want, rtol=.01, atol=.01)
