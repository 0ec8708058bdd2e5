"""Tests of data.py: what is on disk comes out, whatever the layout; every sample is a function of (seed, n)."""

import hashlib
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    FOLDERS,
    LABEL_COLOURS,
    LAYOUTS,
    RAW,
    SPLITS,
    VOID,
    official_palette,
    paint,
    write_png,
    write_png16,
    write_tiny,
)
from PIL import Image

import data

ROOT = Path(data.__file__).parent
EVERY_LAYOUT = [(name, k) for name, ways in LAYOUTS.items() for k in range(len(ways))]


def written(root, name="gta5", split="train", **keys):
    """A tiny data set on disk -> (its items, write_tiny's pairs)."""
    pairs = write_tiny(root, name, split=split, **keys)
    return data.list_items(name, root, split), pairs


def error_of(call, *args, **keys):
    with pytest.raises(data.UserError) as caught:
        call(*args, **keys)
    return str(caught.value)


def write_ids(item, ids):
    """An item's label file, ids (H, W), in the coding that its data set ships."""
    if item.table == "synthia":
        write_png16(item.label, np.stack([ids, 5 * (ids > 0), 0 * ids], -1).astype(np.uint16))
        return
    picture = Image.fromarray(ids.astype(np.uint8))
    if item.dataset in LABEL_COLOURS:
        picture.putpalette(official_palette(item.dataset))
    picture.save(item.label)


# ------------------------------------------------------------------------------------------- ids, layouts, errors

KNOWN = {"gta5": range(35), "cityscapes": range(34), "synthia": range(23), "mapillary": range(66), "camvid": range(12),
         "train": [*range(19), VOID]}  # the ids that a data set defines; those without a class are void
MAPILLARY = {"A": {2: 1, 20: 12, 22: 12, 24: 0, 41: 0, 47: 5},  # beside those of conftest.RAW
             "B": {2: 1, 20: 12, 22: 12, 24: 0, 47: 5, 7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7}}


@pytest.mark.parametrize("name, mapillary", [(name, "A") for name in LAYOUTS] + [("mapillary", "B")])
def test_every_raw_id_maps_to_its_class_or_void_or_is_refused(tmp_path, name, mapillary):
    table = name if name in RAW else "train"
    want = dict.fromkeys(KNOWN[table], VOID) | {raw: train_id for train_id, raw in RAW[table].items()}
    want |= MAPILLARY[mapillary] if name == "mapillary" else {}
    assert len(want) == len(KNOWN[table])
    item = data.Item(name, str(tmp_path / "image.png"), str(tmp_path / "label.png"), data.DATASETS[name].table)

    def read(ids):
        write_ids(item, np.array([ids]))
        Image.new("RGB", (len(ids), 1)).save(item.image)
        return data.load_pair(item, mapillary)[1]

    assert read([*want]).tolist() == [[*want.values()]]
    for raw in {*range(256)} - {*want}:
        assert f"label.png: ids {raw} are not in the table" in error_of(read, [min(want), raw])
    assert name != "mapillary" or "choose A or B" in error_of(data.load_pair, item, "C")


def test_names_and_colours_are_the_fields():
    assert ", ".join(data.CLASSES) == (
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
        "rider, car, truck, bus, train, motorcycle, bicycle")
    assert data.COLORS.shape == (19, 3) and data.COLORS.dtype == np.uint8 and len({*map(tuple, data.COLORS)}) == 19
    assert tuple(data.COLORS[0]) == (128, 64, 128) and tuple(data.COLORS[13]) == (0, 0, 142)
    official = pytest.importorskip("cityscapesscripts.helpers.labels").trainId2label
    assert [(official[c].name, official[c].color) for c in range(19)] == [*zip(data.CLASSES, map(tuple, data.COLORS))]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name, layout", EVERY_LAYOUT)
def test_every_layout_is_read_in_place_as_source_and_as_target(tmp_path, name, layout, split):
    pairs = write_tiny(tmp_path, name, n=5, split=split, layout=layout, seed=3)
    undivided = name == "synthia" or (name, layout) == ("gta5", 0)
    items = data.list_items(name, tmp_path, split, holdout=5 if undivided and split == "val" else 0)
    assert [(item.image, item.label) for item in items] == [pair[:2] for pair in pairs]
    for item, (_, _, classes) in zip(items, pairs):
        image, label = data.load_pair(item)
        assert image.dtype == label.dtype == np.uint8 and image.shape == (48, 64, 3)
        assert (label == classes).all()
        assert np.abs(image.astype(int) - paint(classes)).mean() < (4 if item.image.endswith("jpg") else 1e-9)
    if not undivided:  # the splits do not leak into each other
        error_of(data.list_items, name, tmp_path, "val" if split == "train" else "train")


def test_label_ids_are_preferred_to_made_train_ids_and_all_weathers_of_a_frame_are_used(tmp_path):
    written(tmp_path, "cityscapes", n=2, layout=1, seed=1)
    items, pairs = written(tmp_path, "cityscapes", n=2, layout=0, seed=2)
    assert [item.label for item in items] == [pair[1] for pair in pairs]
    items, _ = written(tmp_path, "cityscapes", n=2, layout=2, seed=2)
    assert len(items) == 4 and len({item.label for item in items}) == 2


def test_listing_takes_no_other_file_for_a_pair_opens_none_and_gives_light_items(tmp_path):
    written(tmp_path, "cityscapes", n=2)
    names = [f"gta5/{part}/{i:05d}.png" for part in ("images", "labels") for i in range(1000)]
    for path in (*names, "gta5/images/._00000.png", "gta5/images/Thumbs.db", "gta5/images/readme.txt", "gta5/labels/00000.jpg",
                 "gta5/labels/00000_labelTrainIds.png", "gta5/labels/00001_color.png",
                 "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json",
                 "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png",
                 "cityscapes/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit_pred.png",
                 "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_color.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert len(data.list_items("cityscapes", tmp_path, "train")) == 2
    items = data.list_items("gta5", tmp_path, "train")
    assert len(items) == 1000 and len(pickle.dumps(items)) < 250 * 1000
    assert pickle.loads(pickle.dumps(items)) == items


@pytest.mark.parametrize("name", ["gta5", "synthia"])
def test_the_pairs_with_the_smallest_hashes_are_withheld_where_there_is_no_val_split(tmp_path, name):
    every, _ = written(tmp_path, name, n=20, size=(8, 8))
    train, val = (data.list_items(name, tmp_path, split, holdout=5) for split in ("train", "val"))
    lots = {item.name: hashlib.sha256(f"{name}/{item.name}".encode()).hexdigest() for item in every}
    assert {item.name for item in val} == {*sorted(lots, key=lots.get)[:5]}
    assert val == sorted(val, key=lambda item: item.image)
    assert train == [item for item in every if item not in val] and len(train) == 15
    assert [item.name for item in every] == [Path(item.image).stem for item in every]
    assert data.list_items(name, tmp_path, "val", holdout=20) == every
    assert "no val split on disk: give --holdout N" in error_of(data.list_items, name, tmp_path, "val")
    assert "leaves no train split" in error_of(data.list_items, name, tmp_path, "train", holdout=20)
    message = error_of(data.list_items, name, tmp_path, "val", holdout=21)
    assert "--holdout 21 of 20 pairs leaves no train split" in message
    for split, n in (("val", 2), ("train", 3)):  # a val split on disk makes holdout idle
        written(tmp_path / "divided", "gta5", n=n, layout=1, split=split)
        assert len(data.list_items("gta5", tmp_path / "divided", split, holdout=1)) == n


def test_the_hash_of_a_name_is_the_same_on_every_machine_and_spreads_over_the_list(tmp_path):
    items = [data.Item("gta5", "", "", "gta5", name=f"{i:05d}") for i in range(1, 24967)]
    assert data._lot(items[0]) == "%s" % hashlib.sha256(b"gta5/00001").hexdigest()
    held = sorted(items, key=data._lot)[:500]
    places = np.sort([int(item.name) for item in held])
    assert [item.name for item in held[:3]] == ["17589", "06445", "20860"]
    assert (np.histogram(places, 10, (0, 24967))[0] > 25).all()  # 50 in each tenth, give or take
    odd = data.Item("gta5", "", "", "gta5", name="\udcff")  # a name of bytes that are no UTF-8
    assert data._lot(odd) != data._lot(items[0])


def test_removing_a_pair_moves_no_other_one_between_train_and_held_out(tmp_path):
    every, _ = written(tmp_path, n=40, size=(8, 8))
    held = [item.name for item in data.list_items("gta5", tmp_path, "val", holdout=10)]
    for gone in every:
        for path in (gone.image, gone.label):
            Path(path).rename(path + ".away")
        now = {item.name for item in data.list_items("gta5", tmp_path, "val", holdout=10)}
        # the removed pair was withheld: one more takes its place. It was trained on: nothing changes
        assert {*held} - {gone.name} <= now and len(now) == 10
        for path in (gone.image, gone.label):
            Path(path + ".away").rename(path)


def test_a_run_scores_the_pairs_that_it_withheld_whatever_has_come_or_gone_since(tmp_path):
    every, _ = written(tmp_path, n=10, size=(8, 8), first=5)
    names = [item.name for item in data.list_items("gta5", tmp_path, "val", holdout=4)]
    written(tmp_path, n=5, size=(8, 8))  # five that the run never saw
    keys = dict(holdout=7, withheld=names)
    val, train = (data.list_items("gta5", tmp_path, split, **keys) for split in ("val", "train"))
    assert [item.name for item in val] == names and len(train) == 11
    assert not {item.name for item in train} & {*names}
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert [item.name for item in data.list_items("gta5", tmp_path / "moved", "val", withheld=names)] == names
    for item in val[:3:2]:
        Path(item.image).unlink()
        Path(item.label).unlink()
    assert len(data.list_items("gta5", tmp_path, "train", **keys)) == 11
    message = error_of(data.list_items, "gta5", tmp_path, "val", **keys)
    assert message.startswith(f"gta5: 2 of the 4 pairs that the run withheld are not in {tmp_path}/gta5, "
                              f"the first is {names[0]}: ")
    # a run that withheld nothing has no pair to be scored on
    message = error_of(data.list_items, "gta5", tmp_path, "val", holdout=3, withheld=[])
    assert "no val split on disk" in message
    assert len(data.list_items("gta5", tmp_path, "train", holdout=3, withheld=())) == 13
    written(tmp_path, "cityscapes", n=2)
    # The names of a val split on disk may be given, too. Here, pairs of train have the same names.
    own, _ = written(tmp_path, "cityscapes", n=2, split="val")
    names = [item.name for item in own]
    assert data.list_items("cityscapes", tmp_path, "val", withheld=names) == own
    assert len(data.list_items("cityscapes", tmp_path, "train", withheld=names)) == 2


def test_names_say_which_pair_it_is_and_not_where_it_lies(tmp_path):
    names = {name: written(tmp_path, name, n=2)[0][1].name for name in LAYOUTS}
    assert names == {"gta5": "00001", "synthia": "0000001", "cityscapes": "bochum/bochum_000001_000019",
                     "bdd": "00000001-0a", "mapillary": "key-1_x", "idd": "1/000001",
                     "acdc": "night/GOPR01/GOPR_000001", "camvid": "0001TP_000001"}
    assert data.list_items("toy-gta5", None, "train")[17].name == "train/17"
    assert data.list_items("toy-gta5", None, "val", withheld=["train/3"])[0].name == "val/0"


def test_wrong_names_roots_splits_and_harmful_files_are_refused(tmp_path):
    message = error_of(data.list_items, "citiscapes", "x", "val")
    assert "'citiscapes'" in message and all(name in message for name in (*LAYOUTS, *data.DATASETS))
    assert "nowhere is not a folder" in error_of(data.list_items, "gta5", tmp_path / "nowhere", "train")
    assert "choose train or val" in error_of(data.list_items, "gta5", tmp_path, "test")
    with mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied", "val/bonn")):  # refused, and not skipped
        assert "val/bonn cannot be listed (Permission denied)" in error_of(data.list_items, "cityscapes", tmp_path, "val")
    assert "use a toy-* source" in error_of(data.list_items, "gta5", tmp_path, "train", harmful=0.1)


@pytest.mark.parametrize("name, layout", EVERY_LAYOUT)
def test_a_missing_or_empty_folder_is_answered_with_what_was_looked_for_and_the_expected_tree(tmp_path, name, layout):
    image, label = LAYOUTS[name][layout](SPLITS.get(name, {}).get("train", "train"), 0)
    for folder in (tmp_path, (tmp_path / FOLDERS.get(name, name) / image).parent):
        folder.mkdir(parents=True, exist_ok=True)
        message = error_of(data.list_items, name, tmp_path, "train")
        assert message.startswith(f"the train split of {name} has no images; expected tree:\n  {tmp_path}")
        if "foggy" not in image and "_rain" not in image:
            tree = message.split("expected tree:\n")[1]
            assert Path(label).parent.parts[0] in tree and tree.count("*") >= 2 and "?" not in tree


def test_images_without_any_label_and_an_image_without_its_label_are_named(tmp_path):
    for name in ("acdc", "bdd"):
        _, pairs = written(tmp_path, name, n=4)
        Path(pairs[1][1]).unlink()
        message = error_of(data.list_items, name, tmp_path, "train")
        assert message == f"{pairs[1][0]} has no label: looked for {pairs[1][1]}; fetch it or remove the image."
    Path(pairs[3][1]).unlink()
    assert "(And 1 more: --check lists them.)" in error_of(data.list_items, "bdd", tmp_path, "train")
    shutil.rmtree(tmp_path / "bdd100k" / "labels")
    message = error_of(data.list_items, "bdd", tmp_path, "train")
    assert "has images but no label" in message and "labels/sem_seg/masks/train/*.png" in message


WRONG = {"size": ((10, 20), "is 20x10 but its image"), "ids": ((48, 64), "ids 77 are not in the table"),
         "colours": (None, None)}


def spoil(kind, item):
    """Break one file of a pair -> (its path, what must be said of it)."""
    path = Path(item.image if kind in ("cut", "flipped", "text", "gone") else item.label)
    whole, says = path.read_bytes(), "cannot be read ("
    if kind == "colours":
        Image.new("RGB", (64, 48)).save(path)
        says = "is stored as RGB and not as ids"
        if item.table == "synthia":
            says = "is not stored as RGB with 16 bits"
    elif kind in WRONG:
        shape, says = WRONG[kind]
        write_ids(item, np.full(shape, 77 if kind == "ids" else 3))
    elif kind.startswith("cut"):
        path.write_bytes(whole[:len(whole) // 2])
    elif kind.startswith("flipped"):
        start = whole.index(b"IDAT") + 12
        path.write_bytes(whole[:start] + bytes(255 - b for b in whole[start:start + 40]) + whole[start + 40:])
    elif kind.startswith("text"):
        path.write_text("404 not found")
        says = "cannot be read (it is no picture)"
    else:
        path.unlink()
    return str(path), says


FAULTS = [*WRONG, *(kind + part for kind in ("cut", "flipped", "text", "gone") for part in ("", " label"))]


def test_the_check_before_training_reads_all_of_a_small_set_and_an_even_sample_of_a_large_one(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load_pair", lambda item, *_: (seen.append(item), np.zeros(1, np.uint8)))
    data.check_pairs(list(range(20)))
    data.check_pairs(list(range(100, 25066)))
    assert seen[:20] == list(range(20)) and len(seen) == 52 and {*np.diff(seen[20:])} <= {780, 781} and seen[20] < 500


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "CMYK", "1"])
def test_pictures_of_any_mode_come_out_as_rgb_and_are_not_turned_by_their_exif_tag(tmp_path, mode):
    path = Path(write_tiny(tmp_path, "gta5", n=1)[0][0])
    picture, exif = Image.open(path).convert(mode), Image.Exif()
    exif[0x0112] = 6  # labels lie over the pixels as stored
    path.unlink()
    picture.save(path.with_suffix(".jpg" if mode == "CMYK" else ".png"), exif=exif)
    item = data.list_items("gta5", tmp_path, "train")[0]
    image = data.load_pair(item)[0]
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - np.asarray(picture.convert("RGB"))).mean() < 5
    assert data.training_view(item, (32, 32), np.random.default_rng(0))[0].shape == (32, 32, 3)


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """data.py --check in this process, without others: name -> (its problems, what it printed)."""
    monkeypatch.setattr(data, "ProcessPoolExecutor", ThreadPoolExecutor)
    return lambda name: (data.check([name], tmp_path), capsys.readouterr().out)


# ----------------------------------------------------------------- codings: numbers that are no ids

TRAIN_IDS = (255, 0, 3, 13, 18)
IDS = {"gta5": (0, 7, 12, 26, 34), "mapillary": (65, 13, 24, 30, 55), "cityscapes": (3, 7, 12, 26, 0),
       "camvid": (11, 3, 1, 8, 0), "synthia": (0, 3, 21, 8, 11),
       "bdd": TRAIN_IDS, "idd": TRAIN_IDS, "acdc": TRAIN_IDS}


def pair(root, name, ids=None):
    """A pair whose label holds five ids in their official coding -> (item, the ids (48, 64))."""
    [item], _ = written(root, name, n=1)
    numbers = np.resize(np.repeat(ids or IDS[name], 100), (48, 64))
    write_ids(item, numbers)
    return item, numbers


def number_anew(item, depth, order):
    """What optipng, pngquant and ImageMagick do: the same colours at other places of a shorter palette."""
    picture = Image.open(item.label)
    numbers = np.asarray(picture)
    palette = picture.getpalette() if picture.mode == "P" else np.repeat(np.arange(256), 3)
    colours = np.array(palette).reshape(-1, 3)
    kept = order(np.unique(numbers).tolist())
    before = np.asarray(picture.convert("RGB"))
    write_png(item.label, np.vectorize(kept.index)(numbers), depth, colours[kept].ravel().tolist())
    assert (np.asarray(Image.open(item.label).convert("RGB")) == before).all()  # it looks as it did


@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("order", [sorted, lambda ids: sorted(ids)[::-1], lambda ids: [*ids[2:], *ids[:2]]])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "synthia"])
def test_a_label_whose_colours_were_numbered_anew_is_refused(tmp_path, name, order, depth):
    item, _ = pair(tmp_path, name)
    number_anew(item, depth, order)
    for look in (data.load_pair, lambda item: data.check_pairs([item]),
                 lambda item: data.training_view(item, (32, 32), np.random.default_rng(0))):
        message = error_of(look, item)
        assert re.fullmatch(rf"{re.escape(item.label)} gives id [\d, ]+ a colour that is not its own, so a "
                            r"program .* has numbered the colours anew: "
                            rf"use the official label files of {name}, as they were downloaded\.", message)
    assert data._examine(item)[0] == message  # --check says the same


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "synthia"])
def test_only_8_bit_ids_in_a_png_are_a_label(tmp_path, name):
    item, numbers = pair(tmp_path, name)
    want = data.load_pair(item)[1]
    grey = Image.fromarray(numbers.astype(np.uint8))
    for mode in ("RGB", "RGBA", "LA", "CMYK", "F", "1"):
        grey.convert(mode).save(item.label, "PNG" if mode not in ("CMYK", "F") else "TIFF")
        says = "is a TIFF file and no PNG" if mode in ("CMYK", "F") else "and not as ids in one 8-bit channel"
        assert says in error_of(data.load_pair, item), mode
    for kind in ("JPEG", "BMP", "WEBP", "TIFF", "GIF"):
        grey.save(item.label, kind, **dict(lossless=True) if kind == "WEBP" else {})
        assert f"is a {kind} file and no PNG" in error_of(data.load_pair, item)
    for depth in (1, 2, 4, 16):  # numbers as they are: of 4 bits, Pillow makes 0, 17, 34, ...
        write_png(item.label, numbers % 2 ** min(depth, 8), depth)
        message = error_of(data.load_pair, item)
        assert ("fewer than 8 bits" if depth in (2, 4) else "ids in one 8-bit channel") in message
    grey.save(item.label, transparency=7)
    if name in ("gta5", "mapillary"):  # a greyscale file of ids is as good as one with a palette
        assert (data.load_pair(item)[1] == want).all()
    write_png(item.label, numbers)
    assert (data.load_pair(item)[1] == want).all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "synthia"])
def test_a_palette_does_no_harm_where_each_id_that_occurs_has_its_own_colour(tmp_path, name):
    item, numbers = pair(tmp_path, name)
    want = data.load_pair(item)[1]
    palette = official_palette(name) if name in LABEL_COLOURS else np.repeat(np.arange(256), 3).tolist()
    palette += [0] * (768 - len(palette))
    occurs = np.unique(numbers)
    for change in ({}, {14: (1, 2, 3)}, {14: palette[3 * occurs[1]:][:3]}):  # 14 does not occur
        other = palette.copy()
        for raw, colour in change.items():
            other[3 * raw:3 * raw + 3] = colour
        write_png(item.label, numbers, 8, other)
        assert (data.load_pair(item)[1] == want).all()
    write_png(item.label, numbers, 8, palette[:3 * (occurs.max() + 1)])  # optipng leaves the rest away
    assert (data.load_pair(item)[1] == want).all()
    Image.open(item.label).save(item.label, transparency=0)
    assert (data.load_pair(item)[1] == want).all()
    for raw in np.unique(numbers[want != VOID]):
        other = palette.copy()
        other[3 * raw + 2] ^= 1  # one shade of blue
        write_png(item.label, numbers, 8, other)
        assert f"gives id {raw} a colour that is not its own" in error_of(data.load_pair, item)


def test_void_ids_may_have_any_colour_that_is_no_class_s(tmp_path):
    for name, void, car in (("gta5", 4, 26), ("mapillary", 65, 55)):
        item, numbers = pair(tmp_path, name, ids=(void, car))
        for colour in ((0, 0, 0), (20, 20, 20), (0, 0, 142), (128, 64, 128)):
            palette = official_palette(name)
            palette[3 * void:3 * void + 3] = colour
            write_png(item.label, numbers, 8, palette)
            if colour in ((0, 0, 0), (20, 20, 20)):
                assert (data.load_pair(item)[1] == np.where(numbers == car, 13, VOID)).all()
            else:
                assert f"gives id {void} a colour" in error_of(data.load_pair, item)


def test_official_colours_are_the_fields():
    colours = {name: [tuple(bytes.fromhex(word)) for word in words] for name, words in LABEL_COLOURS.items()}
    assert {name: len(rows) for name, rows in colours.items()} == {"gta5": 35, "mapillary": 66}
    assert data.PALETTES["mapillary"] == dict(enumerate(colours["mapillary"]))
    assert data.PALETTES["gta5"] == {raw: colours["gta5"][raw] for raw in data.PALETTES["gta5"]}
    assert {*data.PALETTES["gta5"]} == {*RAW["gta5"].values(), 18}
    for name in colours:  # a palette as released is good for every id, also for those without a class
        assert not data._wrong_colours(name, bytes(official_palette(name))).any()
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    theirs = {label.id: label.color for label in official if label.id >= 0} | {34: (0, 0, 142)}
    # Of all ids, `static` (4) alone differs: (20, 20, 20) in GTA5. Both are good.
    assert {raw for raw, colour in theirs.items() if colour != colours["gta5"][raw]} == {4}
    theirs = [c for raw in range(35) for c in theirs[raw]]
    assert not data._wrong_colours("gta5", bytes(theirs)).any()


def test_synthia_labels_have_16_bits_and_their_classes_in_the_first_channel(tmp_path):
    item, classes = pair(tmp_path, "synthia")
    want = data.load_pair(item)[1]
    instance = np.where(classes == 8, 300, 0)  # cars have one, and all else has none
    none = 0 * classes
    for channels in ((classes, instance, none), (classes, none, none), (classes, classes, classes)):
        write_png16(item.label, np.stack(channels, -1).astype(np.uint16))
        assert (data.load_pair(item)[1] == want).all()
    for channels in ((instance, classes, none), (none, classes, none), (none, instance, classes)):
        write_png16(item.label, np.stack(channels, -1).astype(np.uint16))
        message = error_of(data.load_pair, item)
        assert "has its classes in another channel than the first" in message
    write_png16(item.label, np.stack([classes, instance, none], -1).astype(np.uint16))
    Image.open(item.label).save(item.label)  # of each channel, Pillow keeps the high byte
    assert (np.asarray(Image.open(item.label))[..., 0] == 0).all()
    message = error_of(data.load_pair, item)
    assert "is not stored as RGB with 16 bits a channel, so a program has saved it again" in message
    for depth in (8, 16):
        write_png(item.label, classes, depth)
        assert "is not stored as RGB with 16 bits" in error_of(data.load_pair, item)
    write_png16(item.label, np.zeros((48, 64, 3), np.uint16))
    assert "no pixel in 1 pairs of synthia has a class" in error_of(data.check_pairs, [item])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_source_without_any_labelled_pixel_is_refused_before_training_and_by_check(tmp_path, name, checked):
    items, _ = written(tmp_path, name, n=3)
    for item in items:
        write_ids(item, np.full((48, 64), RAW.get(name, RAW["train"])[VOID]))
    message = error_of(data.check_pairs, items)
    assert message.startswith(f"no pixel in 3 pairs of {name} has a class, the first label is {items[0].label}")
    assert "fetch them again" in message and message.endswith(".") and "\n" not in message
    problems, printed = checked(name)
    assert len(problems) == 1 and f"  PROBLEM {name} train: no pixel of any label has a class: " in printed
    write_ids(items[2], np.full((48, 64), RAW.get(name, RAW["train"])[0]))  # one is enough
    data.check_pairs(items)
    problems, printed = checked(name)
    assert not problems and "all well." in printed
    assert "  LOOK   more than half of all pixels are void: are these the official labels?" in printed
    assert "  LOOK   18 of 19 classes never occur: are these the official labels?" in printed
    table = RAW.get(name, RAW["train"])
    ten = [raw for train_id, raw in table.items() if train_id != VOID][:10]
    for item in items:  # no word where 9 classes are absent and less than half is void
        write_ids(item, np.resize([*ten, *[table[VOID]] * 9], (48, 64)))
    assert "LOOK" not in checked(name)[1]


# --------------------------------------------------------------------------- pictures of any coding


def test_16_bit_pictures_keep_their_high_byte_and_32_bit_ones_are_refused(tmp_path):
    [item], _ = written(tmp_path, n=1)
    shades = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    want = (shades // 256).astype(np.uint8)[..., None].repeat(3, 2)
    write_png(item.image, shades, 16)
    assert (data.load_pair(item)[0] == want).all() and want.max() == 255
    write_png16(item.image, shades[..., None].repeat(3, 2))  # the same picture in colour
    assert (data.load_pair(item)[0] == want).all()
    write_png(item.image, shades, 16)
    view, _ = data.training_view(item, (48, 64), np.random.default_rng(0), augment=False)
    assert (view == want).all()
    for kind, mode, says in ((np.float32, "F", "floating-point"), (np.int32, "I", "whole")):
        Image.fromarray((shades / 2).astype(kind), mode).save(item.image, "TIFF")
        message = error_of(data.load_pair, item)
        assert message == (f"{item.image} holds {says} numbers of 32 bits, and nothing says which of them is "
                           "white: save it with 8 bits a channel, as PNG or JPEG.")
        assert message == error_of(data.training_view, item, (32, 32), np.random.default_rng(0))
    older = Image.fromarray(shades.astype(np.int32))  # how an older Pillow opens 16-bit grey
    older.format = "PNG"
    assert older.mode == "I" and (np.asarray(data.to_rgb(older, "x")) == want).all()


def test_transparency_of_a_picture_is_left_out_and_its_stored_colours_count(tmp_path):
    [item], pairs = written(tmp_path, n=1)
    want = paint(pairs[0][2])
    alpha = np.linspace(0, 255, 48 * 64).astype(np.uint8).reshape(48, 64, 1)
    Image.fromarray(np.concatenate([want, alpha], -1)).save(item.image)
    assert (data.load_pair(item)[0] == want).all()
    picture = Image.fromarray(want).quantize(32)
    want = np.asarray(picture.convert("RGB"))
    picture.save(item.image, transparency=bytes(range(0, 256, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (data.load_pair(item)[0] == want).all()


# ---------------------------------------------------------------------- pairs, seen from both sides


def test_a_label_without_a_picture_is_named_in_sources_targets_and_by_check(tmp_path, checked):
    for name in ("gta5", "bdd", "acdc", "camvid", "mapillary"):
        split = "train" if name == "gta5" else "val"
        items, pairs = written(tmp_path, name, n=4, split=split)
        Path(pairs[1][0]).unlink()
        message = error_of(data.list_items, name, tmp_path, split)
        assert message == (f"{pairs[1][1]} has no picture: looked for {pairs[1][0]}; "
                           "fetch it or remove the label.")
        Path(pairs[2][0]).unlink()
        assert "(And 1 more: --check lists them.)" in error_of(data.list_items, name, tmp_path, split)
        problems, printed = checked(name)
        assert len(problems) == 2 and message in problems and f"{name} {split}: 2 pairs" in printed


def test_two_pictures_or_two_labels_of_one_pair_are_named(tmp_path, checked):
    for name, end in (("gta5", ".jpg"), ("bdd", ".png"), ("idd", ".jpeg"), ("cityscapes", ".PNG")):
        items, _ = written(tmp_path, name, n=2)
        double = Path(items[1].image).with_suffix(end)
        Image.new("RGB", (64, 48)).save(double)
        first, second = sorted([items[1].image, str(double)])
        assert error_of(data.list_items, name, tmp_path, "train") == (
            f"{first} and {second} are two pictures for one label: remove one.")
        problems, printed = checked(name)
        assert len(problems) == 1 and f"{name} train: 2 pairs" in printed
        double.unlink()
        double = Path(items[1].label).with_suffix(".PNG")
        shutil.copy(items[1].label, double)
        assert error_of(data.list_items, name, tmp_path, "train") == (
            f"{double} and {items[1].label} are two labels for one picture: remove one.")
        double.unlink()
        assert data.list_items(name, tmp_path, "train") == items


@pytest.mark.parametrize("name, layout", EVERY_LAYOUT)
def test_labels_and_pictures_may_end_in_capitals(tmp_path, name, layout):
    items, _ = written(tmp_path, name, n=2, layout=layout)
    for path in {path for item in items for path in (item.image, item.label)}:
        Path(path).rename(Path(path).with_suffix(Path(path).suffix.upper()))
    loud = data.list_items(name, tmp_path, "train")
    assert [item.label for item in loud] == [str(Path(item.label).with_suffix(".PNG")) for item in items]
    assert [(item.name, item.table) for item in loud] == [(item.name, item.table) for item in items]
    data.check_pairs(loud)


def test_each_weather_of_a_frame_is_a_pair_and_other_files_beside_it_are_none(tmp_path):
    items, _ = written(tmp_path, "cityscapes", n=2, layout=3)
    folder = Path(items[0].image).parent
    stem = Path(items[0].image).name.replace("_foggy_beta_0.01.png", "")
    rain = "_rain_alpha_0.01_beta_0.005_dropsize_0.01_pattern_1"
    suffixes = ["_foggy_beta_0.005", "_foggy_beta_0.02", rain]
    others = ["_pred", "_foggy_beta_0.02_pred", "_foggy", "_foggy_beta_0.02_color", "_copy", "2"]
    for suffix in (*suffixes, *others):
        shutil.copy(items[0].image, folder / f"{stem}{suffix}.png")
    found = data.list_items("cityscapes", tmp_path, "train")
    frame = "aachen/aachen_000000_000019"
    names = {item.name for item in found if "aachen" in item.image}
    assert names == {frame + suffix for suffix in (*suffixes, "_foggy_beta_0.01")} and len(found) == 5
    assert len({item.label for item in found}) == 2
    for item in found:  # RainCityscapes shows a few of the frames, and the labels are there for all
        if "bochum" in item.image:
            Path(item.image).unlink()
    assert len(data.list_items("cityscapes", tmp_path, "train")) == 4
    clear, _ = written(tmp_path, "cityscapes", n=2)  # where the clear pictures are, they are taken
    for suffix in ("_pred", "_color", "_foggy"):
        shutil.copy(clear[0].image, Path(clear[0].image).with_stem(Path(clear[0].image).stem + suffix))
    assert data.list_items("cityscapes", tmp_path, "train") == clear


@pytest.mark.parametrize("name, own, other, layout", [
    ("gta5", "valid", "val", 1), ("bdd", "val", "valid", 0), ("bdd", "val", "validation", 1),
    ("cityscapes", "val", "valid", 0), ("camvid", "val", "valid", 0),
    ("mapillary", "validation", "val", 0), ("mapillary", "training", "train", 1)])
def test_a_split_under_another_data_sets_name_is_pointed_out(tmp_path, name, own, other, layout, checked):
    split = "train" if own.startswith("train") else "val"
    written(tmp_path, name, n=2, split=split, layout=layout)
    for folder in sorted(tmp_path.rglob(f"{own}*"), reverse=True):
        if folder.is_dir() and folder.name in (own, f"{own}annot"):
            folder.rename(folder.with_name(folder.name.replace(own, other)))
    message = error_of(data.list_items, name, tmp_path, split)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}\S*/{other}\S* is there, but {name}'s {split} split is "
                        rf"called `{own}`: rename the folder, of images and of labels\.", message)
    assert message in checked(name)[0]
    if name == "gta5":  # neither does --holdout stand in for it
        written(tmp_path, name, n=3, layout=layout)
        for wanted in ("train", "val"):
            assert error_of(data.list_items, name, tmp_path, wanted, holdout=1) == message
        assert len(data.list_items(name, tmp_path, "train")) == 3


# -------------------------------------------------------------------------------------------------------------- views


def test_image_and_label_stay_aligned_no_label_is_interpolated_and_padding_says_nothing(tmp_path, monkeypatch):
    # Red tells x and green tells y of the original pixel, so each pixel of a view says itself what its label should be.
    monkeypatch.setattr(data, "colour_jitter", lambda image, rng: image)
    monkeypatch.setattr(data, "gaussian_blur", lambda image, rng: image)
    y, x = np.mgrid[:120, :200]
    classes = (5 * (y // 12) + x // 12) % 19
    [item], _ = written(tmp_path, n=1)
    Image.fromarray(np.vectorize(RAW["gta5"].get)(classes).astype(np.uint8)).save(item.label)
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(item.image)
    seen = []
    for n in range(80):
        image, label = data.training_view(item, (90, 150), np.random.default_rng(n))
        inside = label != VOID
        at = image[..., :2][inside] + 0.5  # of a bilinear pixel; + 0.5: from a pixel's number to its middle
        near = [classes[(at[:, 1] + dy).clip(0, 119).astype(int), (at[:, 0] + dx).clip(0, 199).astype(int)]
                for dx in (-1.3, 1.3) for dy in (-1.3, 1.3)]  # one and the same but at an edge, where nearest takes either
        assert (label[inside] == near).any(0).all() and (image[~inside] == (123, 117, 104)).all()  # CLIP's mean
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside.sum() == len(rows) * len(columns)  # one rectangle
        along = np.diff(image[rows[5], :, 0].astype(int))[60:90].sum()
        seen.append((along < 0, abs(along) < 28, not inside.all(), rows[0], columns[0]))
    flipped, enlarged, padded, top, left = np.array(seen).T
    assert 20 < flipped.sum() < 60 and enlarged.sum() > 10 and 4 < padded.sum() < 40
    assert len({*top}) > 5 and len({*left}) > 5  # the place of the padding varies


def plain_view(item, crop, rng):
    """training_view as it is meant, and slow: both files decoded in full, every pixel translated, always a canvas."""
    label, image = Image.open(item.label), Image.open(item.image).convert("RGB")
    scale, table = rng.uniform(*data.SCALES), data.TABLES[item.table]
    (box, size, (x, y)), patch = data.varied_view(label, table, crop, scale, rng)
    image, label = image.resize(size, Image.BILINEAR, box=box), table[np.asarray(patch)]
    if rng.random() < 0.5:
        image, label, x = image.transpose(Image.FLIP_LEFT_RIGHT), label[:, ::-1], crop[1] - size[0] - x
    image = data.gaussian_blur(data.colour_jitter(image, rng), rng)
    canvas, padded = np.full((*crop, 3), (123, 117, 104), np.uint8), np.full(crop, VOID, np.uint8)
    canvas[y:y + size[1], x:x + size[0]], padded[y:y + size[1], x:x + size[0]] = image, label
    return canvas, padded


@pytest.mark.parametrize("kind", ["png", "jpg", "ppm", "RGBA", "P", "L.ppm", "16 bit.ppm"])
def test_a_view_of_a_partly_decoded_picture_has_the_bits_of_a_plain_one(tmp_path, kind):
    [item], _ = written(tmp_path, n=1, size=(150, 240), cell=5)
    mode, ending = {"RGBA": ("RGBA", "png"), "P": ("P", "png"), "L.ppm": ("L", "ppm")}.get(kind, ("RGB", kind[-3:]))
    noise = np.random.default_rng(0).integers(0, 256, (150, 240, 3), dtype=np.uint8)  # each pixel matters
    path = Path(item.image).with_suffix("." + ending)
    Path(item.image).unlink()
    Image.fromarray(noise).convert(mode).save(path)
    if kind == "16 bit.ppm":  # two bytes a colour, so that its pixels are not where those of eight bits are
        path.write_bytes(b"P6 240 150 65535 " + noise.astype(">u2").tobytes())
    [item] = data.list_items("gta5", tmp_path, "train")
    for n in range(40):
        crop = ((60, 80), (150, 100), (200, 260))[n % 3]  # the whole view, at times all of the rows, mostly padding
        got, want = (view(item, crop, np.random.default_rng(n)) for view in (data.training_view, plain_view))
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want)), n


def test_scales_fill_their_range_and_windows_their_picture():
    seen = []
    for n in range(300):
        rng = np.random.default_rng(n)
        scale = rng.uniform(*data.SCALES)
        (left, top, right, bottom), size, offset = data.random_view((400, 300), (100, 120), scale, rng)
        assert offset == (0, 0) and size == (120, 100)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert math.isclose(120 / (right - left), scale, rel_tol=0.01)
        seen.append((scale, left / (400 - right + left)))
    scale, place = np.array(seen).T
    assert scale.min() < 0.52 and scale.max() > 1.97 and abs(scale.mean() - 1.25) < 0.1
    assert place.min() < 0.02 and place.max() > 0.98  # windows reach both borders


def test_the_first_of_ten_windows_without_a_class_of_over_three_quarters_is_taken_or_else_the_most_varied():
    world = np.zeros((200, 200), np.uint8)
    world[:100, :100] = np.arange(100)[:, None] // 10  # a varied corner in a world of road
    world[100:, 100:] = VOID
    strip = np.zeros((100, 100), np.uint8)
    strip[:8] = 1  # at most 16 % of a window: none is varied enough
    for classes, least in ((world, 5), (strip, 10), (np.full((60, 60), VOID, np.uint8), 1)):
        taken = set()
        for n in range(60):
            rng, shares = np.random.default_rng(n), []
            views = [data.random_view(classes.shape, (50, 50), 1.0, rng) for _ in range(10)]
            parts = [classes[int(top):int(bottom), int(left):int(right)] for (left, top, right, bottom), _, _ in views]
            for part in parts:
                count = np.bincount(part[part != VOID], minlength=19)
                shares.append(count.max() / count.sum() if count.any() else math.inf)  # no label: the worst
            best = next((k for k, share in enumerate(shares) if share <= 0.75), int(np.argmin(shares)))
            view, patch = data.varied_view(Image.fromarray(classes), data.TABLES["train"], (50, 50), 1.0, np.random.default_rng(n))
            assert view == views[best] and (np.asarray(patch) == parts[best]).all()
            taken.add(best)
        assert len(taken) >= least


def test_colour_jitter_is_brightness_then_contrast_then_saturation_then_hue():
    picture = np.random.default_rng(1).integers(100, 140, (20, 30, 3)).astype(np.uint8)  # gray: nothing is clipped
    grey, changed = np.array([0.299, 0.587, 0.114]), []
    # the turn of hue is about the grey axis, in a basis of which that axis is the third
    basis = np.array([[1, -1, 0], [1, 1, -2], [1, 1, 1]]) / np.sqrt([[2], [6], [3]])
    for n in range(40):
        got = np.asarray(data.colour_jitter(Image.fromarray(picture), np.random.default_rng(n))).astype(float)
        rng = np.random.default_rng(n)
        b, c, s = rng.uniform(0.6, 1.4, 3)
        angle = rng.uniform(-0.1, 0.1) * 2 * np.pi
        x = c * b * picture + (1 - c) * b * (picture @ grey).mean()
        x = s * x + (1 - s) * (x @ grey)[..., None]
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


def test_without_augmentation_a_view_is_a_window_of_the_stored_picture_normalised_as_clips(tmp_path):
    items, pairs = written(tmp_path, n=1, size=(60, 80))
    image, label = data.TrainingStream([items], (60, 80), 0, augment=False)[11]
    assert image.is_contiguous() and (image.permute(1, 2, 0).numpy() == paint(pairs[0][2])).all()
    assert torch.equal(data.normalise(torch.stack([image, image]))[1], data.to_tensor(paint(pairs[0][2])))
    mean, std = np.array([(.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)])
    assert np.allclose(data.normalise(image).permute(1, 2, 0), (paint(pairs[0][2]) / 255 - mean) / std, atol=1e-5)
    assert (label.numpy() == pairs[0][2]).all()


# ------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture
def sources(tmp_path):
    return [written(tmp_path, "gta5", n=7)[0], written(tmp_path, "synthia", n=3)[0]]


def samples(stream, numbers, workers=0):
    loader = torch.utils.data.DataLoader(stream, batch_size=None, sampler=numbers, num_workers=workers)
    return [(image.clone(), label.clone()) for image, label in loader]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y))


def test_samples_are_the_same_for_any_number_of_workers_and_any_start_and_draw_no_global_random_number(sources):
    def sampled(numbers, workers=0):
        return samples(data.TrainingStream(sources, 32, seed=5), numbers, workers)

    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    whole = [data.TrainingStream(sources, 32, seed=5)[n] for n in range(12)]
    assert states == [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    assert whole[0][0].dtype == whole[0][1].dtype == torch.uint8 and whole[0][0].shape == (3, 32, 32)
    assert same(whole, sampled(range(12))) and same(whole, sampled(range(12), workers=2))
    assert same(whole[8:], sampled(range(8, 12), workers=1))
    assert same(whole, sampled(range(11, -1, -1))[::-1]) and same(sampled([10 ** 7]), sampled([10 ** 7]))
    assert len({image.sum().item() for image, _ in whole}) == 12
    other = samples(data.TrainingStream(sources, 32, seed=6), range(12))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, other))


def test_sources_take_turns_and_every_epoch_shows_every_pair_once_in_a_new_order(sources):
    stream = data.TrainingStream(sources, 32, seed=5)
    places = [stream.locate(n) for n in range(140)]
    assert [source for source, _ in places] == [0, 1] * 70 and len(stream) == 10
    epochs = np.array([index for source, index in places if source == 0]).reshape(10, 7)
    assert (np.sort(epochs) == np.arange(7)).all() and len(np.unique(epochs, axis=0)) > 5
    assert [data.TrainingStream(sources, 32, seed=6).locate(n) for n in range(140)] != places


def test_a_stream_needs_sources_a_crop_a_seed_a_convention_and_files(tmp_path, sources):
    for args in (([], 32, 0), ([sources[0], []], 32, 0), (sources, 0, 0), (sources, 32, -1), (sources, 32, 0, "C")):
        error_of(data.TrainingStream, *args)
    stream = data.TrainingStream(sources, (16, 48), 0)
    assert stream[0][1].shape == (16, 48)
    shutil.rmtree(tmp_path / "gta5" / "images")
    with pytest.warns(UserWarning, match="another pair takes its place"):
        assert "10 training pairs in a row are bad" in error_of(stream.__getitem__, 0)


@pytest.mark.parametrize("source, kind", [(source, kind) for source in (0, 1) for kind in FAULTS])
def test_a_bad_file_is_found_before_training_and_in_it_named_once_and_replaced_by_the_next_pair(sources, source, kind):
    stream = data.TrainingStream(sources, 96, seed=1)  # a crop that shows all of a picture
    bad, whole = [n for n in range(28) if stream.locate(n) == (source, 2)], samples(stream, range(28))
    data.check_pairs(sources[source])
    path, says = spoil(kind, sources[source][2])
    message = error_of(data.check_pairs, sources[source])
    assert says in message and path in message and message.count("\n") == 0 and message.endswith(".")
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        spoilt = samples(stream, range(28))
    assert len(caught) == 1
    assert [n for n in range(28) if not same([whole[n]], [spoilt[n]])] == bad and len(bad) > 1
    for n in bad:
        index = next(index for _, index in (stream.locate(n, skip) for skip in (1, 2)) if index != 2)
        want = data.training_view(sources[source][index], (96, 96), np.random.default_rng([1, 1, n]))[1]
        assert np.array_equal(want, spoilt[n][1].numpy())
    stream = data.TrainingStream(sources, 96, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(spoilt, samples(stream, range(28), workers=2))
        warnings.simplefilter("error")
        assert same(spoilt, samples(stream, range(28)))  # the workers have told whom they named


def test_toy_names_are_data_sets_too():
    toy = pytest.importorskip("toy")
    assert {name for name in data.DATASETS if name.startswith("toy-")} == set(toy.DOMAINS)
    lists = {split: data.list_items("toy-gta5", None, split, harmful=0.5) for split in ("train", "val")}
    assert len(lists["train"]) > len(lists["val"]) > 9
    for (split, items), harmful in zip(lists.items(), (0.5, 0.0)):
        drawn = toy.draw("toy-gta5", split, 3, harmful=harmful)
        assert all((a == b).all() for a, b in zip(data.load_pair(items[3]), drawn)) and items[3].harmful == harmful
    image, label = data.TrainingStream([lists["train"]], (96, 96), 0)[4]
    assert image.shape == (3, 96, 96) and len(label.unique()) > 2


# ------------------------------------------------------------------------------------------------------- command line


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "data.py", *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_check_says_what_is_there_and_ends_with_status_0(tmp_path):
    written(tmp_path, n=5)
    items, _ = written(tmp_path, "cityscapes", n=4, split="val")
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(items[0].label)
    done = run("--check", "gta5", "cityscapes", "--data-root", tmp_path)
    assert done.returncode == 0, done.stderr
    label = np.stack([data.load_pair(item)[1] for item in items])
    for text in ("gta5 train: 5 pairs", "cityscapes val: 4 pairs", "64x48 (5)", "all well",
                 f"road {100 * (label == 0).mean():.2f} %", f"void {100 * (label == VOID).mean():.2f} %"):
        assert text in done.stdout


def test_check_lists_every_problem_names_the_first_with_its_remedy_and_ends_with_status_1(tmp_path):
    items, pairs = written(tmp_path, n=12)
    wanted = [spoil(kind, item) for kind, item in zip(FAULTS[:9], items)]
    Path(pairs[10][1]).unlink()
    done = run("--check", "gta5", "idd", "--data-root", tmp_path)
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("  PROBLEM")]
    assert len(problems) == 11 and f"{pairs[10][0]} has no label" in problems[0]
    assert all(path in line and says in line for (path, says), line in zip(wanted, problems[1:]))
    assert "the train split of idd has no images" in problems[10]
    assert re.fullmatch(r"11 problem\(s\)\. The first: .* fetch it or remove the image\.", done.stdout.splitlines()[-1])
    for args, want in ((("nope", "--data-root", tmp_path), "there is no data set 'nope'"),
                       (("gta5", "--data-root", tmp_path / "x"), "is not a folder")):
        done = run("--check", *args)
        assert done.returncode == 1 and want in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_demonstration_runs_with_nothing_but_this_file(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path)
    done = run(cwd=tmp_path)
    assert done.returncode == 0 and "agree on 100% of the rest" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------- unpacking


def tree(root):
    """{path: (content, time of change)} of all files below a folder."""
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(Path(root).rglob("*")) if path.is_file()}


def same_bits(name, root, into, splits=("train", "val"), **keys):
    """Whether both data roots have the same pairs, the same training samples and the same pictures to evaluate."""
    for split in splits:
        old, new = (data.list_items(name, place, split, **keys) for place in (root, into))
        streams = [data.TrainingStream([items], (40, 50), seed=3) for items in (old, new)]
        if not same(*(samples(stream, range(3 * len(old))) for stream in streams)):
            return False
        if not all(np.array_equal(a, b) for pair in zip(old, new) for a, b in zip(*map(data.load_pair, pair))):
            return False
    return True


UNPACKED = [("gta5", 0), ("gta5", 1), ("bdd", 0), ("mapillary", 1), ("cityscapes", 0), ("cityscapes", 2),
            ("synthia", 0), ("acdc", 0)]


@pytest.mark.parametrize("name, layout", UNPACKED)
def test_an_unpacked_data_set_gives_the_bits_of_the_original_which_is_untouched(tmp_path, name, layout):
    root, into = tmp_path / "data", tmp_path / "new" / "unpacked"
    undivided = name == "synthia" or (name, layout) == ("gta5", 0)
    for split in ("train",) if undivided else ("train", "val"):
        write_tiny(root, name, n=5, split=split, layout=layout)
        if layout == 2:  # a second weather: pairs that share a label
            write_tiny(root, name, n=5, split=split, layout=0)
    before = tree(root)
    done = run("--unpack", name, "--data-root", root, "--into", into)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree(root) == before
    assert same_bits(name, root, into, **(dict(holdout=2) if undivided else {}))
    folder = data.DATASETS[name].folder
    got = {path for path in tree(into) if path != f"{folder}/unpacked.json"}
    items = [item for split in ("train", "val") for item in data.list_items(name, root, split, holdout=2)]
    assert got == {str(Path(item.image).with_suffix(".ppm").relative_to(root)) for item in items} | {
        str(Path(item.label).relative_to(root)) for item in items}
    pictures = [path for path in got if path.endswith(".ppm")]
    assert len(pictures) == len(items) and all((into / path).stat().st_size == 48 * 64 * 3 + 13 for path in pictures)
    assert f"GB. Free in {into}: " in done.stdout and f"{name}: unpacked into {into}/{folder}." in done.stdout


@pytest.mark.parametrize("name", ["gta5", "cityscapes"])
def test_unpacked_labels_are_not_larger_than_ids_need_and_one_without_a_palette_is_still_accepted(tmp_path, name):
    items, _ = written(tmp_path / "d", name, n=2, size=(200, 300))
    grey = Image.fromarray(np.asarray(Image.open(items[0].label)))  # as a program that knows no palette saves it
    grey.save(items[0].label)
    assert data.unpack([name], tmp_path / "d", tmp_path / "e") == []
    assert same_bits(name, tmp_path / "d", tmp_path / "e", ["train"])
    labels = [Image.open(item.label) for item in data.list_items(name, tmp_path / "e", "train")]
    # P: stored without row filters
    assert [label.mode for label in labels] == (["L", "P"] if name == "gta5" else ["P", "P"])
    assert all(Path(label.filename).stat().st_size < 200 * 300 / 10 for label in labels)


def test_several_sets_are_unpacked_at_once_and_links_to_the_others_are_proposed(tmp_path):
    for name, split in (("gta5", "train"), ("bdd", "train"), ("cityscapes", "val")):
        write_tiny(tmp_path / "d", name, n=3, split=split)
    done = run("--unpack", "gta5", "bdd", "--data-root", tmp_path / "d", "--into", tmp_path / "e")
    assert done.returncode == 0 and done.stdout.endswith(f"\n  ln -s {tmp_path}/d/cityscapes {tmp_path}/e/\n"), done
    subprocess.run(done.stdout.splitlines()[-1], shell=True, check=True)
    assert same_bits("cityscapes", tmp_path / "d", tmp_path / "e", ["val"])
    assert same_bits("gta5", tmp_path / "d", tmp_path / "e", ["train"])
    assert same_bits("bdd", tmp_path / "d", tmp_path / "e", ["train"])
    files = tree(tmp_path / "e")
    again = run("--unpack", "gta5", "bdd", "--data-root", tmp_path / "d", "--into", tmp_path / "e")
    assert again.returncode == 0 and "gta5: unpacked already" in again.stdout and tree(tmp_path / "e") == files


def test_a_pair_that_cannot_be_read_is_copied_as_it_is_so_that_training_leaves_it_out_here_as_there(tmp_path):
    items, _ = written(tmp_path / "d", n=len(FAULTS) + 1)
    wanted = [spoil(kind, item) for kind, item in zip(FAULTS, items) if not kind.startswith("gone")]
    done = run("--unpack", "gta5", "--data-root", tmp_path / "d", "--into", tmp_path / "e")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    problems = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    for path, says in wanted:
        if "77" not in says:  # ids are read in training: the file of the label is as good as any
            assert any(path in line and says in line for line in problems), (path, problems)
    assert len(problems) == len(wanted) - 1
    lists = [data.list_items("gta5", tmp_path / place, "train") for place in "de"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old, new = (samples(data.TrainingStream([items], 60, seed=2), range(40)) for items in lists)
    assert same(old, new)


def in_the_middle(root, into, number):
    """Unpack gta5, and stop the process by this signal when some pictures are there -> (exit status, its last line)."""
    # Each file takes its time, so that no machine is done before the signal comes.
    # A shell that starts the tests in the background has told its children to ignore Ctrl-C: not this one.
    slowly = ("import signal, time, data; write = data._write; data.CORES = 2\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "def wait(file):\n    time.sleep(0.05)\n    return write(file)\n"
              "data._write = wait; data.main()")
    command = [sys.executable, "-c", slowly, "--unpack", "gta5", "--data-root", str(root), "--into", str(into)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len([*into.rglob("*.ppm")]) < 3:
        time.sleep(0.005)
    process.send_signal(number)
    says = process.communicate(timeout=120)[1]
    return process.returncode, says.strip().split("\n")[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_unpacking_that_is_cut_off_leaves_no_half_file_that_counts_and_goes_on_where_it_was(tmp_path, number):
    root, into = tmp_path / "d", tmp_path / "e"
    write_tiny(root, "gta5", n=40, size=(300, 400))
    status, says = in_the_middle(root, into, number)
    folder = into / "unfinished" / "gta5"
    number_of_files = 80
    assert status == (-9 if number == signal.SIGKILL else 1)
    if number == signal.SIGINT:
        assert says == (f"error: stopped; what is written stays in {into}/unfinished: give the same command again, "
                        "and it goes on from there.")
    assert "has no images" in error_of(data.list_items, "gta5", into, "train")  # nobody trains on a part of it
    first = {path: path.stat().st_ino for path in folder.rglob("0*.p[pn][mg]")}
    assert 3 <= len(first) < number_of_files
    for path in first:
        Image.open(path).load()  # it is whole
    (folder / "images" / "00039.ppm.1.part").write_bytes(b"P6\n400 300\n255\nhalf")  # as a kill leaves it
    done = run("--unpack", "gta5", "--data-root", root, "--into", into)
    assert done.returncode == 0 and f"{number_of_files - len(first)} files to write" in done.stdout
    for path, inode in first.items():
        assert (into / "gta5" / path.relative_to(folder)).stat().st_ino == inode  # not written again
    assert same_bits("gta5", root, into, ["train"]) and sorted(path.name for path in into.iterdir()) == ["gta5"]
    assert not [*into.rglob("*.part")]


def test_a_source_that_changes_between_two_calls_is_written_anew_or_refused(tmp_path, monkeypatch):
    items, _ = written(tmp_path / "d", n=4)
    whole = Path(items[1].image).read_bytes()
    spoil("cut", items[1])
    with monkeypatch.context() as patch:
        patch.setattr(data, "_finish", mock.Mock(side_effect=data.UserError("killed")))
        assert error_of(data.unpack, ["gta5"], tmp_path / "d", tmp_path / "e") == "killed"
    kept = tmp_path / "e" / "unfinished" / "gta5" / "images" / "00001.png"
    assert kept.exists()
    Path(items[1].image).write_bytes(whole)  # fetched again
    os.utime(items[1].image, (10 ** 9, 10 ** 9))
    assert data.unpack(["gta5"], tmp_path / "d", tmp_path / "e") == []
    assert same_bits("gta5", tmp_path / "d", tmp_path / "e", ["train"])
    write_tiny(tmp_path / "d", "gta5", n=1, first=4)
    assert "has other pairs than" in error_of(data.unpack, ["gta5"], tmp_path / "d", tmp_path / "e")


def test_unpacking_refuses_what_it_must_not_touch_or_cannot_hold(tmp_path, monkeypatch):
    d, e = tmp_path / "d", tmp_path / "e"
    items, _ = written(d, n=3)
    (tmp_path / "link").symlink_to(d)
    (tmp_path / "file").write_text("")
    places = {d: "is the data root itself", tmp_path / "link": "is the data root itself",
              d / "gta5": "lies in the data set", d / "gta5" / "new": "lies in the data set",
              tmp_path / "file": "is a file", tmp_path: "holds d, which is no data set"}
    for place, says in places.items():
        assert says in error_of(data.unpack, ["gta5"], d, place)
    names = {"toy-gta5": "is drawn and has no files", "gta": "there is no data set 'gta'", "idd": "has no images"}
    for name, says in names.items():
        assert says in error_of(data.unpack, [name], d, e)
    usage = shutil.disk_usage(tmp_path)._replace(free=20000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        message = error_of(data.unpack, ["gta5"], d, e)
        assert f"--into {e} lacks 2.92e-05 GB: make room there" in message  # 3 x (12 + 4) KiB but 20 KB
    written(e, n=1)
    assert f"{e}/gta5 was not written by --unpack" in error_of(data.unpack, ["gta5"], d, e)
    shutil.rmtree(e)
    with monkeypatch.context() as patch:  # what is read back is compared
        patch.setattr(data, "_save_ids", lambda label, table, path: Image.new("L", label.size).save(path, "PNG"))
        assert "read back, and differs from" in error_of(data.unpack, ["gta5"], d, e)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        message = error_of(data.unpack, ["gta5"], d, e)
        assert "No space left on device" in message and "give the same command again" in message
        assert message.count("\n") == 0
    assert not [*e.rglob("*.part")] and data.unpack(["gta5"], d, e) == []
    written(tmp_path / "other", n=3)
    assert "was unpacked from" in error_of(data.unpack, ["gta5"], tmp_path / "other", e)
    Path(items[1].label).unlink()
    assert error_of(data.unpack, ["gta5"], d, tmp_path / "f") == error_of(data.list_items, "gta5", d, "train")
    for args in (("--unpack", "gta5"), ("--into", e)):
        assert "--unpack and --into belong together" in run(*args).stderr
