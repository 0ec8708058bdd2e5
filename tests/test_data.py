"""Tests of data.py: what is on disk comes out, whatever the layout; every sample is a function of (seed, n)."""

import math
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, PAINT, RAW, SPLITS, VOID, paint, write_png16, write_tiny
from PIL import Image

import data

ROOT = Path(data.__file__).parent
EVERY_LAYOUT = [(name, k) for name, ways in LAYOUTS.items() for k in range(len(ways))]

# ----------------------------------------------------------------------------------------------------- label tables

NAMES = """road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car
truck bus train motorcycle bicycle""".replace("_", "-").split()
IDS_OF = {  # by class, as data set papers print them; everything else that the data set knows is void
    "cityscapes": """road 7, sidewalk 8, building 11, wall 12, fence 13, pole 17, traffic-light 19, traffic-sign 20,
        vegetation 21, terrain 22, sky 23, person 24, rider 25, car 26, truck 27, bus 28, train 31, motorcycle 32,
        bicycle 33""",
    "synthia": """sky 1, building 2, road 3, sidewalk 4, fence 5, vegetation 6, pole 7, car 8, traffic-sign 9,
        person 10, bicycle 11, motorcycle 12, traffic-light 15, terrain 16, rider 17, truck 18, bus 19, train 20,
        wall 21""",
    "mapillary": """fence 3, wall 6, road 13 24, sidewalk 2 15, building 17, person 19, rider 20 21 22, sky 27,
        vegetation 30, terrain 29, pole 45 47, traffic-light 48, traffic-sign 50, bicycle 52, bus 54, car 55,
        motorcycle 57, train 58, truck 61""",
    "camvid": """sky 0, building 1, pole 2, road 3, sidewalk 4, vegetation 5, traffic-sign 6, fence 7, car 8, person 9,
        rider 10""",
    "train": ", ".join(f"{name} {i}" for i, name in enumerate(NAMES)),
}
IDS_OF["gta5"] = IDS_OF["cityscapes"]
IDS_OF["mapillary A"] = IDS_OF["mapillary"] + ", road 41"
IDS_OF["mapillary B"] = (IDS_OF["mapillary"] + ", road 7 8 10 14 23, sidewalk 9 11, pole 44, "
                         "traffic-sign 46 49")
KNOWN = {"gta5": range(35), "cityscapes": range(34), "synthia": range(23), "mapillary": range(66), "camvid": range(12),
         "train": [*range(19), 255]}


@pytest.mark.parametrize("name, mapillary", [("gta5", "A"), ("synthia", "A"), ("cityscapes", "B"), ("bdd", "A"),
                                             ("mapillary", "A"), ("mapillary", "B"), ("idd", "A"), ("acdc", "A"),
                                             ("camvid", "A")])
def test_every_raw_id_maps_to_its_class_or_void_or_is_refused(name, mapillary):
    table = name if name in KNOWN else "train"
    want = dict.fromkeys(KNOWN[table], VOID)
    for entry in IDS_OF[f"{table} {mapillary}" if name == "mapillary" else table].split(","):
        train_name, *ids = entry.split()
        want |= {int(raw): NAMES.index(train_name) for raw in ids}
    assert len(want) == len(KNOWN[table])
    item = data.Item(name, "image.png", "label.png", data.DATASETS[name].table)
    for raw in range(256):
        if raw in want:
            got = data._train_ids(item, np.full((2, 3), raw, np.uint8), mapillary)
            assert got.dtype == np.uint8 and got.shape == (2, 3) and (got == want[raw]).all(), raw
        else:
            with pytest.raises(data.UserError, match=rf"label.png: ids {raw} are not in the table"):
                data._train_ids(item, np.array([min(want), raw], np.uint8), mapillary)
    with pytest.raises(data.UserError, match="choose A or B"):
        data._train_ids(data.Item("mapillary", "", "x", "mapillary"), np.zeros(3, np.uint8), "C")


def test_names_and_colours_are_the_fields():
    assert [name.replace(" ", "-") for name in data.CLASSES] == NAMES
    assert data.COLORS.shape == (19, 3) and data.COLORS.dtype == np.uint8 and len({*map(tuple, data.COLORS)}) == 19
    assert tuple(data.COLORS[0]) == (128, 64, 128) and tuple(data.COLORS[13]) == (0, 0, 142)


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name, layout", EVERY_LAYOUT)
def test_every_layout_is_read_in_place_as_source_and_as_target(tmp_path, name, layout, split):
    pairs = write_tiny(tmp_path, name, n=5, split=split, layout=layout, seed=3)
    undivided = name == "synthia" or (name, layout) == ("gta5", 0)
    items = data.list_items(name, tmp_path, split, holdout=99 if undivided and split == "val" else 0)
    assert [(item.image, item.label) for item in items] == [pair[:2] for pair in pairs]
    for item, (_, _, classes) in zip(items, pairs):
        image, label = data.load_image(item), data.load_label(item)
        assert image.dtype == label.dtype == np.uint8 and image.shape == (48, 64, 3)
        assert (label == classes).all()
        assert np.abs(image.astype(int) - paint(classes)).mean() < (4 if item.image.endswith("jpg") else 1e-9)
    data.check_pairs(items)
    other = "val" if split == "train" else "train"
    if not undivided:
        with pytest.raises(data.UserError):  # the splits do not leak into each other
            data.list_items(name, tmp_path, other)


def test_label_ids_are_preferred_to_made_train_ids_and_all_weathers_of_a_frame_are_used(tmp_path):
    write_tiny(tmp_path, "cityscapes", n=2, layout=1, split="val", seed=1)
    assert data.list_items("cityscapes", tmp_path, "val")[0].label.endswith("_labelTrainIds.png")
    pairs = write_tiny(tmp_path, "cityscapes", n=2, layout=0, split="val", seed=2)
    items = data.list_items("cityscapes", tmp_path, "val")
    assert [item.label for item in items] == [pair[1] for pair in pairs]
    assert all((data.load_label(item) == pair[2]).all() for item, pair in zip(items, pairs))
    write_tiny(tmp_path, "cityscapes", n=2, layout=2, split="val", seed=2)
    items = data.list_items("cityscapes", tmp_path, "val")
    assert len(items) == 4 and len({item.label for item in items}) == 2


def test_other_files_in_the_folders_are_not_taken_for_pairs(tmp_path):
    write_tiny(tmp_path, "gta5", n=3)
    write_tiny(tmp_path, "cityscapes", n=2, split="val")
    for path in ("gta5/images/._00000.png", "gta5/images/Thumbs.db", "gta5/labels/77777.png", "gta5/images/readme.txt",
                 "gta5/labels/00000.jpg", "cityscapes/gtFine/val/aachen/aachen_000000_000019_gtFine_color.png"):
        (tmp_path / path).write_bytes(b"")
    assert len(data.list_items("gta5", tmp_path, "train")) == 3
    assert len(data.list_items("cityscapes", tmp_path, "val")) == 2


def test_mapillary_conventions_differ_where_they_should(tmp_path):
    write_tiny(tmp_path, "mapillary", n=1, split="val", layout=1)
    item = data.list_items("mapillary", tmp_path, "val")[0]
    Image.fromarray(np.array([[13, 41, 7, 46, 65]], np.uint8)).save(item.label)
    assert data.load_label(item).tolist() == [[0, 0, VOID, VOID, VOID]]
    assert data.load_label(item, "B").tolist() == [[0, VOID, 0, 7, VOID]]


def test_synthia_labels_are_read_right_where_pillow_alone_reads_zeros(tmp_path):
    pairs = write_tiny(tmp_path, "synthia", n=1, size=(60, 90))
    (image, label, classes), item = pairs[0], data.list_items("synthia", tmp_path, "train")[0]
    assert (data.load_label(item) == classes).all() and len(np.unique(classes)) > 15
    assert not np.asarray(Image.open(label))[..., 0].any()
    Image.fromarray(np.full((60, 90), 8, np.uint8)).save(label)  # some people store them again in 8 bits
    assert (data.load_label(item) == 13).all()


def test_pairs_are_withheld_evenly_and_train_and_val_share_none(tmp_path):
    for name in ("gta5", "synthia"):
        write_tiny(tmp_path, name, n=20, size=(8, 8))
        train, val = (data.list_items(name, tmp_path, split, holdout=5) for split in ("train", "val"))
        every = data.list_items(name, tmp_path, "train")
        assert sorted(train + val, key=lambda item: item.image) == every and len(val) == 5 and len(every) == 20
        assert [every.index(item) for item in val] == [2, 6, 10, 14, 18]
        with pytest.raises(data.UserError, match="no val split on disk: give --holdout N"):
            data.list_items(name, tmp_path, "val")
        with pytest.raises(data.UserError, match="leaves no train split"):
            data.list_items(name, tmp_path, "train", holdout=20)
        assert data.list_items(name, tmp_path, "val", holdout=20) == every


def test_a_val_split_on_disk_makes_holdout_idle(tmp_path):
    write_tiny(tmp_path, "gta5", n=3, layout=1)
    with pytest.raises(data.UserError, match="give --holdout N"):
        data.list_items("gta5", tmp_path, "val")
    write_tiny(tmp_path, "gta5", n=2, layout=1, split="val", first=3)
    assert len(data.list_items("gta5", tmp_path, "val", holdout=1)) == 2
    assert len(data.list_items("gta5", tmp_path, "train", holdout=1)) == 3


def test_listing_opens_no_file_and_items_are_light(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "gta5" / part).mkdir(parents=True)
        for i in range(1000):
            (tmp_path / "gta5" / part / f"{i:05d}.png").write_bytes(b"")
    items = data.list_items("gta5", tmp_path, "train")
    assert len(items) == 1000 and len(pickle.dumps(items)) < 250 * 1000
    assert pickle.loads(pickle.dumps(items)) == items


# ------------------------------------------------------------------------------------------------------------ errors


def error_of(call, *args, **keys):
    with pytest.raises(data.UserError) as caught:
        call(*args, **keys)
    return str(caught.value)


def test_an_unknown_data_set_is_answered_with_the_right_names():
    message = error_of(data.list_items, "citiscapes", "x", "val")
    assert "'citiscapes'" in message and all(name in message for name in data.DATASETS)
    assert {"gta5", "synthia", "cityscapes", "bdd", "mapillary", "idd", "acdc", "camvid"} <= set(data.DATASETS)


def test_a_wrong_data_root_a_wrong_split_and_harmful_files_are_refused(tmp_path):
    assert "nowhere is not a folder" in error_of(data.list_items, "gta5", tmp_path / "nowhere", "train")
    assert "choose train or val" in error_of(data.list_items, "gta5", tmp_path, "test")
    assert "use a toy-* source" in error_of(data.list_items, "gta5", tmp_path, "train", harmful=0.1)


@pytest.mark.parametrize("name, layout", EVERY_LAYOUT)
def test_a_missing_or_empty_folder_is_answered_with_what_was_looked_for_and_the_expected_tree(tmp_path, name, layout):
    split = SPLITS.get(name, {}).get("train", "train")
    image, label = LAYOUTS[name][layout](split, 0)
    for make_folder in (False, True):
        if make_folder:
            (tmp_path / {"bdd": "bdd100k"}.get(name, name) / image).parent.mkdir(parents=True)
        message = error_of(data.list_items, name, tmp_path, "train")
        assert message.startswith(f"the train split of {name} has no images: looked for {tmp_path}")
        if "foggy" not in image and "_rain" not in image:
            tree = message.split("expected tree:\n")[1]
            assert Path(label).parent.parts[0] in tree and tree.count("*") >= 2 and "?" not in tree


def test_images_without_any_label_and_an_image_without_its_label_are_named(tmp_path):
    pairs = write_tiny(tmp_path, "bdd", n=4, split="val")
    Path(pairs[1][1]).unlink()
    message = error_of(data.list_items, "bdd", tmp_path, "val")
    assert message == f"{pairs[1][0]} has no label: looked for {pairs[1][1]}; fetch it or remove the image."
    Path(pairs[3][1]).unlink()
    assert "(And 1 more: --check lists them.)" in error_of(data.list_items, "bdd", tmp_path, "val")
    shutil.rmtree(tmp_path / "bdd100k" / "labels")
    message = error_of(data.list_items, "bdd", tmp_path, "val")
    assert "has images but no label" in message and "labels/sem_seg/masks/val/*.png" in message
    pairs = write_tiny(tmp_path, "acdc", n=4)
    Path(pairs[2][1]).unlink()
    assert f"looked for {pairs[2][1]};" in error_of(data.list_items, "acdc", tmp_path, "train")


def spoil(kind, image, label):
    image, label = Path(image), Path(label)
    if kind == "size":
        Image.fromarray(np.zeros((10, 20), np.uint8)).save(label)
        return "is 20x10 but its image"
    if kind == "ids":
        Image.fromarray(np.full((48, 64), 77, np.uint8)).save(label)
        return "ids 77 are not in the table"
    if kind == "colours":
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(label)
        return "is stored as RGB and not as ids"
    path = label if kind.endswith("label") else image
    whole = path.read_bytes()
    if kind.startswith("cut"):
        path.write_bytes(whole[:len(whole) // 2])
    elif kind.startswith("flipped"):
        half = whole.index(b"IDAT") + 12
        path.write_bytes(whole[:half] + bytes(255 - b for b in whole[half:half + 40]) + whole[half + 40:])
    elif kind.startswith("text"):
        path.write_text("404 not found")
        return "cannot be read (it is no picture)"
    else:
        path.unlink()
    return "cannot be read ("


FAULTS = ["size", "ids", "colours", "cut", "cut label", "flipped", "flipped label", "text", "text label", "gone",
          "gone label"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_pair_is_found_before_training_and_named_in_one_sentence(tmp_path, kind):
    for name in ("gta5", "synthia"):
        pairs = write_tiny(tmp_path, name, n=5)
        items = data.list_items(name, tmp_path, "train")
        data.check_pairs(items)
        want = spoil(kind, *pairs[3][:2])
        if (kind, name) == ("colours", "synthia"):  # three channels are right there, of them the first counts
            continue
        message = error_of(data.check_pairs, items)
        assert want in message and message.count("\n") == 0 and message.endswith(".")
        assert pairs[3][0 if kind in ("cut", "flipped", "text", "gone") else 1] in message


def test_the_check_before_training_reads_all_of_a_small_set_and_an_even_sample_of_a_large_one(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load_pair", lambda item, *_: seen.append(item))
    data.check_pairs(list(range(20)))
    assert seen == list(range(20))
    seen.clear()
    data.check_pairs(list(range(24966)))
    assert len(seen) == 32 and set(np.diff(seen)) <= {780, 781} and seen[0] < 400 and seen[-1] > 24000


# ----------------------------------------------------------------------------------------------------- files to arrays


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "CMYK", "1"])
def test_pictures_of_any_mode_come_out_as_rgb(tmp_path, mode):
    pairs = write_tiny(tmp_path, "gta5", n=1)
    picture = Image.open(pairs[0][0]).convert(mode)
    path = Path(pairs[0][0])
    if mode == "CMYK":
        path.unlink()
        path = path.with_suffix(".jpg")
    picture.save(path)
    item = data.list_items("gta5", tmp_path, "train")[0]
    image = data.load_image(item)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - np.asarray(picture.convert("RGB"))).mean() < 5
    assert data.TrainingStream([[item]], 32, 0)[0][0].shape == (3, 32, 32)


def test_a_photo_is_not_turned_by_its_exif_tag(tmp_path):
    pairs = write_tiny(tmp_path, "bdd", n=1)
    picture = Image.open(pairs[0][0])
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(pairs[0][0], exif=exif, quality=95)
    item = data.list_items("bdd", tmp_path, "train")[0]
    assert data.load_image(item).shape[:2] == data.load_label(item).shape == (48, 64)


def test_the_tensor_is_normalised_as_clips():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    got = data.to_tensor(image)
    assert got.dtype == torch.float32 and got.shape == (3, 5, 7) and got.is_contiguous()
    for c, (mean, std) in enumerate(zip((.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))):
        assert np.allclose(got[c], (image[..., c] / 255 - mean) / std, atol=1e-5)


def test_stopping_a_png_at_the_last_row_of_the_view_changes_no_sample(tmp_path, monkeypatch):
    write_tiny(tmp_path, "gta5", n=3, size=(300, 200))
    items = data.list_items("gta5", tmp_path, "train")
    head = np.asarray(data._open_image(items[0], rows=100))
    assert (head[:100] == data.load_image(items[0])[:100]).all() and not head[100:].any()
    short = [data.TrainingStream([items], 64, 0)[n] for n in range(60)]
    whole, calls = data._open_image, []
    monkeypatch.setattr(data, "_open_image", lambda item, size=None, rows=None: calls.append(rows) or whole(item))
    for n, (image, label) in enumerate(short):
        again = data.TrainingStream([items], 64, 0)[n]
        assert torch.equal(image, again[0]) and torch.equal(label, again[1])
    assert np.mean([rows < 290 for rows in calls]) > 0.7


# -------------------------------------------------------------------------------------------------------------- views


def item_of(tmp_path, classes, image=None):
    """One gta5 pair with this label (train ids) and image (by default painted in the label's colours)."""
    pairs = write_tiny(tmp_path, "gta5", n=1)
    raw = np.vectorize(RAW["gta5"].get)(classes).astype(np.uint8)
    Image.fromarray(raw).save(pairs[0][1])
    Image.fromarray(paint(classes) if image is None else image).save(pairs[0][0])
    return data.list_items("gta5", tmp_path, "train")[0]


@pytest.fixture
def plain_colours(monkeypatch):
    monkeypatch.setattr(data, "colour_jitter", lambda image, rng: image)
    monkeypatch.setattr(data, "gaussian_blur", lambda image, rng: image)


def test_image_and_label_stay_aligned_through_scale_crop_flip_and_padding(tmp_path, plain_colours):
    # Red tells x and green tells y of the original pixel, so each pixel of a view says itself what its label should be.
    y, x = np.mgrid[:120, :200]
    classes = (5 * (y // 12) + x // 12) % 19
    item = item_of(tmp_path, classes, np.stack([x, y, 0 * x], -1).astype(np.uint8))
    flipped = padded = enlarged = 0
    for n in range(80):
        image, label = data.training_view(item, (90, 150), np.random.default_rng(n))
        inside = label != VOID
        at = image[..., :2][inside] + 0.5  # of a bilinear pixel; + 0.5: from a pixel's number to its middle
        clear = (np.abs((at + 6) % 12 - 6) > 1.3).all(-1)  # not at an edge, where nearest may take either label
        want = classes[(at[:, 1]).astype(int), (at[:, 0]).astype(int)]
        assert clear.mean() > 0.5 and (label[inside][clear] == want[clear]).all()
        along = np.diff(image[inside.any(1)][5, :, 0].astype(int))[60:90]
        flipped += along.sum() < 0
        padded += not inside.all()
        enlarged += abs(along.sum()) < 28
    assert 20 < flipped < 60 and 4 < padded < 40 and enlarged > 10


def test_scales_fill_their_range(tmp_path):
    seen = []
    for n in range(300):
        rng = np.random.default_rng(n)
        scale = rng.uniform(*data.SCALES)
        box, size, offset = data.random_view((400, 300), (100, 120), scale, rng)
        assert offset == (0, 0) and size == (120, 100)
        assert 0 <= box[0] < box[2] <= 400 and 0 <= box[1] < box[3] <= 300
        assert math.isclose(size[0] / (box[2] - box[0]), scale, rel_tol=0.01)
        seen.append((scale, box[0] / (400 - box[2] + box[0]), box[3] == 300))
    seen = np.array(seen)
    assert seen[:, 0].min() < 0.52 and seen[:, 0].max() > 1.97 and abs(seen[:, 0].mean() - 1.25) < 0.1
    assert seen[:, 1].min() < 0.02 and seen[:, 1].max() > 0.98  # windows reach both borders


def test_labels_are_never_interpolated(tmp_path):
    classes = np.where(np.random.default_rng(0).random((60, 80)) < 0.5, 2, 18)
    item = item_of(tmp_path, classes)
    for n in range(30):
        assert set(np.unique(data.training_view(item, (64, 64), np.random.default_rng(n))[1])) <= {2, 18, VOID}


def test_padding_is_void_and_says_nothing_and_its_place_varies(tmp_path):
    item = item_of(tmp_path, np.arange(30 * 40).reshape(30, 40) // 100)
    stream = data.TrainingStream([[item]], (70, 90), 0)
    tops = set()
    for n in range(20):
        image, label = stream[n]
        inside = label != VOID
        rows, columns = inside.any(1), inside.any(0)
        assert inside.sum() == rows.sum() * columns.sum()  # one rectangle
        assert 15 <= rows.sum() <= 60 and 20 <= columns.sum() <= 80
        assert image[:, ~inside].abs().max() < 0.01
        tops.add(int(rows.int().argmax()))
    assert len(tops) > 5


def test_a_class_with_over_three_quarters_of_the_labelled_pixels_makes_another_window_be_tried(tmp_path):
    classes = np.zeros((200, 200), np.uint8)
    classes[:100, :100] = np.arange(100)[:, None] // 10  # a varied corner in a world of road
    classes[100:, 100:] = VOID
    label = Image.fromarray(classes)
    varied, first_ones = [], []
    for n in range(200):
        (box, _, _), patch = data.varied_view(label, data.TABLES["train"], (50, 50), 1.0, np.random.default_rng(n))
        first_box, _, _ = data.random_view((200, 200), (50, 50), 1.0, np.random.default_rng(n))
        shares = []
        for left, top, right, bottom in (box, first_box):
            part = classes[round(top):round(bottom), round(left):round(right)]
            count = np.bincount(part[part != VOID], minlength=19)
            shares.append(count.max() / max(1, count.sum()) if count.any() else 1.0)
        assert (np.asarray(patch) == classes[round(box[1]):round(box[3]), round(box[0]):round(box[2])]).all()
        varied.append(shares[0] <= 0.75)
        first_ones.append(shares[1] <= 0.75)
        assert box == first_box or not first_ones[-1]  # a varied first window is taken as it is
    assert np.mean(first_ones) < 0.4 and np.mean(varied) > 0.9


def test_a_varied_first_window_is_taken_and_a_hopeless_label_still_gives_the_best_of_ten():
    classes = np.zeros((100, 100), np.uint8)
    classes[:8, :] = 1  # at most 16 % of a 50 x 50 window: no window is varied enough
    best, tried = [], []
    for n in range(50):
        _, patch = data.varied_view(Image.fromarray(classes), data.TABLES["train"], (50, 50), 1.0,
                                    np.random.default_rng(n))
        best.append((np.asarray(patch) == 1).sum())
        rng = np.random.default_rng(n)
        boxes = [data.random_view((100, 100), (50, 50), 1.0, rng)[0] for _ in range(10)]
        tried.append(max(50 * max(0, 8 - round(box[1])) for box in boxes))
    assert best == tried and max(best) > 300
    half = Image.fromarray((np.arange(100)[:, None] // 10 + np.zeros((100, 100))).astype(np.uint8))
    assert data.varied_view(half, data.TABLES["train"], (50, 50), 1.0, np.random.default_rng(4))[0] \
        == data.random_view((100, 100), (50, 50), 1.0, np.random.default_rng(4))
    void = Image.fromarray(np.full((60, 60), VOID, np.uint8))
    _, patch = data.varied_view(void, data.TABLES["train"], (50, 50), 1.0, np.random.default_rng(0))
    assert (np.asarray(patch) == VOID).all()


def test_colour_jitter_is_brightness_then_contrast_then_saturation_then_hue():
    picture = np.random.default_rng(1).integers(100, 140, (20, 30, 3)).astype(np.uint8)  # gray: nothing is clipped
    grey, changed = np.array([0.299, 0.587, 0.114]), []
    for n in range(40):
        rng = np.random.default_rng(n)
        got = np.asarray(data.colour_jitter(Image.fromarray(picture), rng)).astype(float)
        rng = np.random.default_rng(n)
        b, c, s = rng.uniform(0.6, 1.4, 3)
        angle = rng.uniform(-0.1, 0.1) * 2 * np.pi
        x = picture * b
        x = c * x + (1 - c) * (x @ grey).mean()
        x = s * x + (1 - s) * (x @ grey)[..., None]
        # the turn about the grey axis, in a basis of which that axis is the third
        basis = np.array([[1, -1, 0], [1, 1, -2], [1, 1, 1]]) / np.sqrt([[2], [6], [3]])
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        x = x @ (basis.T @ turn @ basis).T
        if 1 < x.min() and x.max() < 254:
            assert np.abs(got - x).max() < 1.0
            changed.append(np.abs(got - picture).mean())
    assert len(changed) > 20 and min(changed) > 1


def test_blur_happens_in_half_of_the_views_and_keeps_the_mean():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8))
    blurred = [data.gaussian_blur(picture, np.random.default_rng(n)) for n in range(200)]
    changed = [b for b in blurred if np.asarray(b).std() < 0.95 * np.asarray(picture).std()]
    assert 0.3 < len(changed) / 200 < 0.6
    assert all(abs(np.asarray(b).mean() - np.asarray(picture).mean()) < 2 for b in changed)


def test_without_augmentation_a_view_is_a_window_of_the_stored_picture(tmp_path):
    pairs = write_tiny(tmp_path, "gta5", n=1, size=(60, 80))
    item = data.list_items("gta5", tmp_path, "train")[0]
    stream = data.TrainingStream([[item]], (60, 80), 0, augment=False)
    image, label = stream[11]
    assert torch.equal(image, data.to_tensor(paint(pairs[0][2]))) and (label.numpy() == pairs[0][2]).all()


# ------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture
def sources(tmp_path):
    write_tiny(tmp_path, "gta5", n=7)
    write_tiny(tmp_path, "synthia", n=3, size=(40, 56))
    return [data.list_items(name, tmp_path, "train") for name in ("gta5", "synthia")]


def samples(stream, numbers, workers=0):
    loader = torch.utils.data.DataLoader(stream, batch_size=None, sampler=numbers, num_workers=workers)
    return [(image.clone(), label.clone()) for image, label in loader]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y))


def test_samples_are_the_same_for_any_number_of_workers_and_any_start(sources):
    numbers = list(range(12))
    whole = samples(data.TrainingStream(sources, 32, seed=5), numbers)
    assert whole[0][0].dtype == torch.float32 and whole[0][1].dtype == torch.int64 and whole[0][0].shape == (3, 32, 32)
    assert same(whole, samples(data.TrainingStream(sources, 32, seed=5), numbers, workers=2))
    assert same(whole[8:], samples(data.TrainingStream(sources, 32, seed=5), numbers[8:], workers=1))
    backwards = samples(data.TrainingStream(sources, 32, seed=5), numbers[::-1])
    assert same(whole, backwards[::-1])
    far = data.TrainingStream(sources, 32, seed=5)
    assert same([far[10 ** 7]], [data.TrainingStream(sources, 32, seed=5)[10 ** 7]])


def test_other_seeds_and_other_numbers_give_other_samples(sources):
    one, other = (samples(data.TrainingStream(sources, 32, seed=s), range(14)) for s in (5, 6))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(one, other))
    assert len({image.sum().item() for image, _ in one}) == 14


def test_no_global_random_number_is_drawn_and_none_is_used(sources):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = samples(data.TrainingStream(sources, 32, seed=5), [3])
    stream = data.TrainingStream(sources, 32, seed=5)
    again = stream[3]
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert same(first, [again]) and same(first, [stream[3]])
    torch.set_rng_state(before[0])
    random.setstate(before[2])
    for _ in range(5):
        stream[_]
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]


def test_sources_take_turns_and_every_epoch_shows_every_pair_once_in_a_new_order(sources):
    stream = data.TrainingStream(sources, 32, seed=5)
    assert len(stream) == 10
    places = [stream.locate(n) for n in range(140)]
    assert [source for source, _ in places] == [0, 1] * 70
    first = [index for source, index in places if source == 0]
    epochs = [first[i:i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({*map(tuple, epochs)}) > 5
    assert all(data.TrainingStream(sources, 32, seed=5).locate(n) == places[n] for n in (137, 2, 61))
    other = data.TrainingStream(sources, 32, seed=6)
    assert [other.locate(n) for n in range(140)] != places


def test_a_stream_needs_sources_a_crop_a_seed_and_a_convention(sources):
    for args in (([], 32, 0), ([sources[0], []], 32, 0), (sources, 0, 0), (sources, 32, -1), (sources, 32, 0, "C")):
        error_of(data.TrainingStream, *args)
    assert data.TrainingStream(sources, (16, 48), 0)[0][1].shape == (16, 48)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_file_in_training_is_named_once_and_the_next_pair_takes_its_place(tmp_path, kind):
    pairs = write_tiny(tmp_path, "gta5", n=6)
    items = data.list_items("gta5", tmp_path, "train")
    whole = samples(data.TrainingStream([items], 96, seed=1), range(24))  # a crop that shows all of a picture
    spoil(kind, *pairs[2][:2])
    stream = data.TrainingStream([items], 96, seed=1)
    bad = [n for n in range(24) if stream.locate(n)[1] == 2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spoilt = samples(stream, range(24))
    if kind not in ("cut", "cut label"):  # of a file that breaks off, views above the break are still right
        assert [n for n in range(24) if not same([whole[n]], [spoilt[n]])] == bad and len(bad) == 4
    assert len(caught) == 1 and Path(pairs[2][0]).name in str(caught[0].message)
    for n in bad:
        index = next(index for _, index in (stream.locate(n, skip) for skip in (1, 2)) if index != 2)
        rng = np.random.default_rng([1, 1, n])
        assert np.array_equal(data.training_view(items[index], (96, 96), rng)[1], spoilt[n][1].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = data.TrainingStream([items], 96, seed=1)
        assert same(spoilt, samples(again, range(24), workers=2))
    assert again._named.sum() == 1  # the workers share their knowledge of whom they have named


def test_the_pair_that_takes_a_bad_ones_place_is_of_the_same_source(sources):
    stream = data.TrainingStream(sources, 96, seed=1)
    n = next(n for n in range(0, 14, 2) if stream.locate(n)[1] == 2 and stream.locate(n, skip=1)[1] != 2)
    Path(sources[0][2].label).write_text("404 not found")
    with pytest.warns(UserWarning, match="another pair takes its place"):
        label = stream[n][1]
    rng = np.random.default_rng([1, 1, n])
    want = data.training_view(sources[0][stream.locate(n, skip=1)[1]], (96, 96), rng)[1]
    assert np.array_equal(label.numpy(), want)


def test_training_stops_when_nothing_can_be_read_any_more(tmp_path):
    write_tiny(tmp_path, "gta5", n=6)
    stream = data.TrainingStream([data.list_items("gta5", tmp_path, "train")], 32, 0)
    shutil.rmtree(tmp_path / "gta5" / "images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "10 training pairs in a row are bad" in error_of(stream.__getitem__, 0)


# ---------------------------------------------------------------------------------------------------------- toy names


def test_toy_names_are_data_sets_too():
    toy = pytest.importorskip("toy")
    assert {name for name in data.DATASETS if name.startswith("toy-")} == set(toy.DOMAINS)
    train, val = (data.list_items("toy-gta5", None, split, harmful=0.5) for split in ("train", "val"))
    assert len(train) > len(val) > 9 and not {item.image for item in train} & {item.image for item in val}
    for item, (split, harmful) in ((train[3], ("train", 0.5)), (val[3], ("val", 0.0))):
        assert item.harmful == harmful
        image, label, _ = toy.draw("toy-gta5", split, 3, harmful=harmful)
        assert (data.load_image(item) == image).all() and (data.load_label(item) == label).all()
    data.check_pairs(val[:3])
    image, label = data.TrainingStream([train], (96, 96), 0)[4]
    assert image.shape == (3, 96, 96) and len(label.unique()) > 2


# ------------------------------------------------------------------------------------------------------- command line


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "data.py", *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_check_says_what_is_there_and_ends_with_status_0(tmp_path):
    write_tiny(tmp_path, "gta5", n=5)
    write_tiny(tmp_path, "cityscapes", n=4, split="val")
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(data.list_items("cityscapes", tmp_path, "val")[0].label)
    done = run("--check", "gta5", "cityscapes", "--data-root", tmp_path, "--mosaic", tmp_path / "m.png", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("gta5 train: 5 pairs", "cityscapes val: 4 pairs", "all well"))
    assert "64x48 (5)" in done.stdout and "100%" in done.stderr
    label = np.concatenate([data.load_label(item).ravel() for item in data.list_items("cityscapes", tmp_path, "val")])
    for name, number in (("road", 0), ("void", VOID)):
        assert f"{name} {100 * (label == number).mean():.2f} %" in done.stdout
    mosaic = np.asarray(Image.open(tmp_path / "m.png"))
    drawn = PAINT[0].astype(int) // 2 + data.COLORS[0].astype(int) // 2  # road over road
    assert (np.abs(mosaic.astype(int) - drawn).max(-1) < 3).sum() > 100


def test_check_lists_every_problem_names_the_first_with_its_remedy_and_ends_with_status_1(tmp_path):
    pairs = write_tiny(tmp_path, "gta5", n=12)
    wanted = [spoil(kind, *pair[:2]) for kind, pair in zip(FAULTS[:9], pairs)]
    Path(pairs[10][1]).unlink()
    done = run("--check", "gta5", "idd", "--data-root", tmp_path, "--mosaic", tmp_path / "m.png")
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("  PROBLEM")]
    assert len(problems) == 11 and f"{pairs[10][0]} has no label" in problems[0]
    for want, pair, line in zip(wanted, pairs, problems[1:]):
        assert want in line and (pair[0] in line or pair[1] in line)
    assert "the train split of idd has no images" in problems[10]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("11 problem(s). The first: ") and last.endswith("fetch it or remove the image.")


def test_check_of_wrong_names_and_roots_ends_with_one_sentence_and_status_1(tmp_path):
    for args, want in ((("nope", "--data-root", tmp_path), "there is no data set 'nope'"),
                       (("gta5", "--data-root", tmp_path / "x"), "is not a folder")):
        done = run("--check", *args)
        assert done.returncode == 1 and want in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_importing_the_file_loads_no_torch_so_that_help_answers_at_once():
    code = "import sys, data; sys.exit('torch' in sys.modules or 'tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = run("--help")
    flags = ("--check", "--data-root", "--mosaic", "--workers")
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags)


def test_the_demonstration_runs_with_nothing_but_this_file(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path)
    done = run(cwd=tmp_path)
    assert done.returncode == 0 and "agree on 100% of the rest" in done.stdout, done.stderr


def test_the_16_bit_writer_of_these_tests_stores_what_it_is_given(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 11, 3)).astype(np.uint16)
    write_png16(tmp_path / "x.png", pixels)
    assert (np.asarray(Image.open(tmp_path / "x.png")) == pixels >> 8).all()  # Pillow's view of it: the high bytes
