"""data.py: every data set of the field as pairs (image, label in the 19 train ids), cut into training views.

A model for unseen domains is measured across data sets, and each of them stores the same thing in its own way: other
folders, other ids, other file formats. One table (DATASETS) holds all of that knowledge, and files are read where the
download left them. What leaves this file looks the same whatever went in, so any data set can be source or target.

A training sample is a pure function of (seed, n), n its number in the run: no generator lives from one sample to the
next. So any number of workers, processes or restarts yields the same samples, and resuming is asking for a later n.

    view     a scale in 0.5 .. 2, then the first varied one of 10 windows of crop size; flip; colour jitter; blur
    cheap    Decoding a PNG costs more than all else, so nothing else may touch a whole picture: the window is chosen on
             the label and mapped back to the original pixels; that box alone is decoded, resized once and jittered.

Shapes
    image    (H, W, 3) uint8   as stored               ->  (3, crop, crop) uint8, to be normalised on the device
    label    (H, W) uint8      train ids, 255 = void   ->  (crop, crop) uint8

Not here: the drawn world behind the toy-* names (toy.py), batches (train.py), the score (evaluate.py).
`python data.py --check gta5 --data-root D` tests your own files.
`python data.py --unpack gta5 --data-root D --into E` writes them again as files that decode at once.
`python data.py` prints
    a 200x100 view of 120x160: 40% padding, colour and label agree on 100% of the rest
    Notice: however a view is scaled, cut and flipped, image and label stay on top of each other.
"""

import sys

# Every command imports this file first, so the check stands here, once, above all that an older Python has not.
# It is written in words that an older Python can read; a parser that meets newer ones ends before any sentence.
if sys.version_info < (3, 11):
    sys.exit("error: Python 3.11 or later is needed, and {} is Python {}.{}: make an environment of a later one, "
             "python3.11 -m venv env".format(sys.executable, *sys.version_info[:2]))

import argparse
import contextlib
import filecmp
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat, UnidentifiedImageError
from tqdm import tqdm

try:
    import toy
except ModuleNotFoundError:  # this file alone, lifted elsewhere: all but the toy-* names works
    toy = None

CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
           "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
COLORS = np.array([
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)], np.uint8)
VOID = 255     # no class is asked of this pixel
UNKNOWN = 254  # in a table: an id that the data set does not define
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PADDING = tuple(round(255 * mean) for mean in CLIP_MEAN)  # the colour around a view: about 0 when normalised
TOY_SCENES = {"train": 400, "val": 40}

# our reading: the abstract names no augmentation; kinds and ranges are those of the nearest recipes (RobustNet, FAMix).
SCALES = (0.5, 2.0)      # uniform
CROP_TRIES = 10          # windows looked at until one is varied enough
LARGEST = 0.75           # of the labelled pixels, for the largest class: road alone teaches little
JITTER = 0.4             # brightness, contrast and saturation are multiplied by 0.6 .. 1.4
HUE = 0.1                # turns of the colour circle, either way
BLUR = (0.5, 0.15, 1.3)  # probability, least and largest sigma in pixels
# The cores that this process may use: fewer than the machine has, in a container or a queue.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PATIENCE = 10            # bad pairs in a row that training survives
NOT_OFFICIAL = "these are not the official labels, or a program has changed them; fetch them again"


class UserError(ValueError):
    """Something that the user can mend. The message is one sentence: what, where, and the remedy."""


def check_sums(path):
    """Compare the check sums that a zip archive holds of its parts with the parts: zipfile.BadZipFile if one differs.

    torch writes its files as such archives and never looks at the sums: a flipped bit would be a wrong weight.
    """
    with zipfile.ZipFile(path) as archive:
        if part := archive.testzip():
            raise zipfile.BadZipFile(f"the check sum of {part} differs")
def print_any_name():
    """Let every name be printed. A file's name may be bytes that are no text, and a terminal may know ASCII alone.

    What cannot be written is shown as an escape, such as \\xe9. Without this, printing a name could end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a program or a test has put something else in its place
            stream.reconfigure(errors="backslashreplace")


def require(holds, sentence):
    """Refuse, in one sentence, what does not hold."""
    if not holds:
        raise UserError(sentence)


# --------------------------------------------------------------------------------------------- ids: from theirs to ours


def _table(known, ids):
    """256 entries, raw id -> train id: known ids without a class are void, others UNKNOWN, so that they get noticed."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[list(known)] = VOID
    table[list(ids)] = list(ids.values())
    return table


_CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
               27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
_SYNTHIA = {1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17, 15: 6, 16: 9, 17: 12,
            18: 14, 19: 15, 20: 16, 21: 3}
_MAPILLARY = {13: 0, 24: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10, 19: 11,
              20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18}
_MAPILLARY_B = {7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7}
_CAMVID = {0: 10, 1: 2, 2: 5, 3: 0, 4: 1, 5: 8, 6: 7, 7: 4, 8: 13, 9: 11, 10: 12}

TABLES = {
    "train": _table([VOID], {c: c for c in range(19)}),
    "gta5": _table(range(35), _CITYSCAPES),        # 34: license plate, void
    "cityscapes": _table(range(34), _CITYSCAPES),  # 255 is no label id: a file that has it holds train ids
    "synthia": _table(range(23), _SYNTHIA),
    # our reading: two conventions are in use and their scores do not compare; A is the default.
    "mapillary-A": _table(range(66), _MAPILLARY | {41: 0}),       # RobustNet, FAMix, WildNet, SHADE
    "mapillary-B": _table(range(66), _MAPILLARY | _MAPILLARY_B),  # Rein, SoMA
    "camvid": _table(range(12), _CAMVID),
}

# The 66 colours of Mapillary Vistas v1.2, in the order of its ids (its config.json; the zip of v2.0
# holds the labels of v1.2 with the same ones). They are needed to see whether a file still holds ids.
_MAPILLARY_COLOURS = (
    (165, 42, 42), (0, 192, 0), (196, 196, 196), (190, 153, 153), (180, 165, 180), (90, 120, 150),
    (102, 102, 156), (128, 64, 255), (140, 140, 200), (170, 170, 170), (250, 170, 160), (96, 96, 96),
    (230, 150, 140), (128, 64, 128), (110, 110, 110), (244, 35, 232), (150, 100, 100), (70, 70, 70),
    (150, 120, 90), (220, 20, 60), (255, 0, 0), (255, 0, 100), (255, 0, 200), (200, 128, 128),
    (255, 255, 255), (64, 170, 64), (230, 160, 50), (70, 130, 180), (190, 255, 255), (152, 251, 152),
    (107, 142, 35), (0, 170, 30), (255, 255, 128), (250, 0, 30), (100, 140, 180), (220, 220, 220),
    (220, 128, 128), (222, 40, 40), (100, 170, 30), (40, 40, 40), (33, 33, 33), (100, 128, 160),
    (142, 0, 0), (70, 100, 150), (210, 170, 100), (153, 153, 153), (128, 128, 128), (0, 0, 80),
    (250, 170, 30), (192, 192, 192), (220, 220, 0), (140, 140, 20), (119, 11, 32), (150, 0, 255),
    (0, 60, 100), (0, 0, 142), (0, 0, 90), (0, 0, 230), (0, 80, 100), (128, 64, 64), (0, 0, 110),
    (0, 0, 70), (0, 0, 192), (32, 32, 32), (120, 10, 10), (0, 0, 0))

# Label files that come with a palette, and the official colour of each id. Tables that are not here
# belong to data sets whose labels are 8-bit greyscale files (SYNTHIA, which is 16-bit, apart).
# GTA5: an id with a class has that class's colour. Two ids without a class share one: a pole group
# (18) looks like a pole and a licence plate (34) like a car. All others are any colour of no class.
PALETTES = {
    "gta5": {raw: tuple(COLORS[c].tolist()) for raw, c in _CITYSCAPES.items()}
    | {18: (153, 153, 153), 34: (0, 0, 142)},
    "mapillary": dict(enumerate(_MAPILLARY_COLOURS)),
}


def _id_table(table, mapillary):
    require(mapillary in ("A", "B"), f"there is no Mapillary convention {mapillary!r}: choose A or B.")
    return TABLES[f"mapillary-{mapillary}" if table == "mapillary" else table]


def colours(ids):
    """Train ids -> (..., 3) uint8, their colours in Cityscapes; void is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(COLORS)] = COLORS
    return palette[ids]


# --------------------------------------------------------------------------------------------- folders: where pairs lie


@dataclass(frozen=True)
class Spec:
    """How a data set is stored. A layout is (images, labels): an image and its label fill every `*` with the same text.

    {split} is the split's folder. A layout without it is one undivided pile: there is no official val split, and pairs may be withheld
    from train to be one. Images may end in .png, .jpg, .jpeg or .ppm, whatever the layout shows.

    `?` in a name is the suffix of a foggy or rainy version of a frame (WEATHER), or nothing. Foggy
    Cityscapes has three versions of each frame, and each is a pair, with the frame's label. Whoever
    wants one of the three keeps only its files in the folder.
    """

    folder: str
    table: str              # of its labels; files named ...TrainIds.png hold train ids in any data set
    layouts: tuple = ()     # in order of preference
    splits: tuple = ("train", "val")


# The suffixes of Foggy Cityscapes (_foggy_beta_0.02) and of RainCityscapes (_rain_alpha_0.02_beta_...).
# Anything else beside a picture, such as a prediction saved there (_pred), is no picture.
WEATHER = r"(?:_(?:foggy|rain)(?:_(?:alpha|beta|dropsize|pattern)_[0-9.]*[0-9])+)?"
PICTURE, LABEL = "(?i:png|jpe?g|ppm)", "(?i:png)"  # how their names end, in capitals, too

DATASETS = {
    "gta5": Spec("gta5", "gta5", (("images/{split}/*.png", "labels/{split}/*.png"), ("images/*.png", "labels/*.png")),
                 splits=("train", "valid")),
    "synthia": Spec("synthia", "synthia", (("RGB/*.png", "GT/LABELS/*.png"),)),
    # labelIds come with the download, labelTrainIds are made by a script. Fog and rain have image folders of their own.
    "cityscapes": Spec("cityscapes", "cityscapes", tuple(
        (f"leftImg8bit{weather}/{{split}}/*/*_leftImg8bit?.png", f"gtFine/{{split}}/*/*_gtFine_{kind}.png")
        for weather in ("", "_foggy", "_rain") for kind in ("labelIds", "labelTrainIds"))),
    "bdd": Spec("bdd100k", "train", (
        ("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png"),  # today's download
        ("seg/images/{split}/*.jpg", "seg/labels/{split}/*_train_id.png"),   # the old one
        ("images/{split}/*.jpg", "labels/{split}/*_train_id.png"),           # many papers' folders
        ("images/{split}/*.jpg", "labels/{split}/*.png"))),
    "mapillary": Spec("mapillary", "mapillary", (
        ("{split}/images/*.jpg", "{split}/labels/*.png"),                    # the v1.2 zip
        ("{split}/images/*.jpg", "{split}/v1.2/labels/*.png")),              # the v2.0 zip
        splits=("training", "validation")),
    "idd": Spec("idd", "train", (
        ("leftImg8bit/{split}/*/*_leftImg8bit.png", "gtFine/{split}/*/*_gtFine_labelcsTrainIds.png"),)),
    "acdc": Spec("acdc", "train", (("rgb_anon/*/{split}/*/*_rgb_anon.png", "gt/*/{split}/*/*_gt_labelTrainIds.png"),)),
    "camvid": Spec("camvid", "camvid", (("{split}/*.png", "{split}annot/*.png"),)),
} | {name: Spec("", "train") for name in (toy.DOMAINS if toy else ())}


@dataclass(frozen=True, slots=True)
class Item:
    """One pair of files. 25,000 of these take 6 MB and travel to the loader's workers."""

    dataset: str
    image: str             # a path, or "domain/split/index" of a drawn scene
    label: str             # a path, or "" for a drawn scene, whose label comes with it
    table: str             # how the label's ids are to be read
    harmful: float = 0.0   # drawn scenes only: fraction of the training scenes with wrong regions
    name: str = ""         # what fills the `*`s, joined by "/": who the pair is, in whatever folder


def list_items(name, root, split, holdout=0, harmful=0.0, withheld=None):
    """The pairs of a data set's "train" or "val" split, sorted. Opens no file, so that it answers at once.

    holdout    gta5 and synthia have no val split. With holdout = N, N pairs of train are withheld from
               it and are val: those with the smallest hash of their name. A hash spreads them over
               all places and weathers. It also belongs to the pair alone: when another pair is
               removed, this one stays where it was. Data sets that have a val split ignore holdout.
    harmful    toy-* only: see toy.py
    withheld   names (Item.name) that a finished run withheld. "val" is then exactly these pairs and
               "train" all others, whatever holdout says: files may have come or gone since.
               Drawn scenes ignore it.

    UserError: the first thing that is wrong with the folders, and how many more things are.
    """
    items, problems = _list(name, root, split, holdout, harmful, withheld)
    _raise_first(problems)
    return items


def _raise_first(problems):
    """Refuse with the first of a listing's problems, and say how many there are."""
    if problems:
        raise UserError(problems[0] + f" (And {len(problems) - 1} more: --check lists them.)" * (len(problems) > 1))


def _list(name, root, split, holdout=0, harmful=0.0, withheld=None):
    """(items, problems), for list_items, which raises the first problem, and for --check, which prints them all.

    items is None where the split is not on disk: no fault of a data set that is only wanted for its other one.
    """
    require(name in DATASETS, f"there is no data set {name!r}: choose from {', '.join(DATASETS)}.")
    require(split in ("train", "val"), f"there is no split {split!r}: choose train or val.")
    spec = DATASETS[name]
    if not spec.layouts:
        harmful = harmful if split == "train" else 0.0
        names = [f"{split}/{i}" for i in range(TOY_SCENES[split])]
        return [Item(name, f"{name}/{own}", "", "train", harmful, own) for own in names], []
    require(not harmful, f"{name}: harmful scenes (--harmful {harmful}) can only be drawn: use a toy-* source, or 0.")
    require(os.path.isdir(root), f"the data root {root} is not a folder: give --data-root the one that holds {spec.folder}/.")
    if withheld:
        return _as_withheld(name, root, split, set(withheld))
    if withheld is not None:
        holdout = 0  # the run withheld nothing, so there is no pair that it was not trained on
    undivided = any("{split}" not in images for images, _ in spec.layouts)
    if not undivided or (split == "train" and not holdout):
        return _pairs(name, root, split)

    own_val, val_problems = _pairs(name, root, "val")
    if own_val is None:
        return _withhold(name, root, split, holdout)
    if split == "val":
        return own_val, val_problems
    items, problems = _pairs(name, root, "train")
    # A val split that is on disk but broken (images/val in the place of valid) has to be mended.
    # Training without it, and without withholding others in its place, would break --holdout's word.
    return items, problems + (val_problems if not own_val else [])


def _withhold(name, root, split, holdout):
    """_list's answer for a data set without a val split on disk, from the pairs of train."""
    every, problems = _pairs(name, root, "train")
    if not every:
        return every, problems
    if not holdout:
        return None, [f"{name} has no val split on disk: give --holdout N (of a source, when it is trained on) to withhold N pairs."]
    most = len(every) if split == "val" else len(every) - 1
    require(holdout <= most,
            f"{name}: --holdout {holdout} of {len(every)} pairs leaves no train split: change it.")
    held = set(sorted(every, key=_lot)[:holdout])
    return [item for item in every if (item in held) == (split == "val")], problems


def _lot(item):
    """The lot that a pair draws for --holdout: a hash of its name.

    It is the same on every machine, which Python's own hash() is not. It depends on no other
    pair, which a place in the list does: there, one removed pair would move all that follow.
    """
    text = f"{item.dataset}/{item.name}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # names are any bytes


def _as_withheld(name, root, split, withheld):
    """_list's answer where a run's withheld names are known: "val" is these pairs, "train" all others."""
    every, problems = _pairs(name, root, "train")
    own_val, val_problems = _pairs(name, root, "val")
    if withheld <= {item.name for item in own_val or []}:  # the data set's own val split
        own_val = [item for item in own_val if item.name in withheld]
        return (every, problems) if split == "train" else (own_val, val_problems)
    if split == "train":
        return every and [item for item in every if item.name not in withheld], problems
    # The data set may have been divided since (images/valid), so both of its folders are searched.
    chosen = [item for item in [*(every or []), *(own_val or [])] if item.name in withheld]
    missing = sorted(withheld - {item.name for item in chosen})
    if missing:
        folder = os.path.join(root, DATASETS[name].folder)
        problems = [*problems, f"{name}: {len(missing)} of the {len(withheld)} pairs that the run "
                    f"withheld are not in {folder}, the first is {missing[0]}: put them back, because "
                    "scores over different pairs cannot be compared."]
    return chosen, problems


def _pairs(name, root, split):
    """_list's answer for a split on disk, from the first layout that has both images and labels."""
    spec, some_images = DATASETS[name], False
    folder = os.path.join(root, spec.folder)
    own = spec.splits[split == "val"]
    usable = [layout for layout in spec.layouts if "{split}" in layout[0] or split == "train"]
    layouts = [[part.format(split=own) for part in layout] for layout in usable]
    for images, labels in layouts:
        pictures = sorted(_walk(folder, images, PICTURE))
        masks = sorted(_walk(folder, labels, LABEL)) if pictures else []
        if masks:
            return _match(name, folder, images, labels, pictures, masks)
        some_images |= bool(pictures)
    if misnamed := _misnamed(folder, usable, split, own):
        return [], [f"{misnamed} is there, but {name}'s {split} split is called `{own}`: rename the folder, "
                    "of images and of labels."]
    what = "images but no label" if some_images else "no images"
    # Cityscapes' folders of other weathers are left unsaid.
    tree = "\n or\n".join(f"  {folder}/{images}\n  {folder}/{labels}" for images, labels in layouts[:4]).replace("?", "")
    return [] if some_images else None, [f"the {split} split of {name} has {what}; expected tree:\n{tree}"]


def _match(name, folder, images, labels, pictures, masks):
    """Pair the files of a layout -> (items, problems).

    pictures, masks: what _walk found, sorted. Both sides are looked at. A picture without a label,
    a label without a picture and two files in one place are problems: the folder is then not as
    the download left it, and which file is the right one cannot be guessed.
    """
    def expected(pattern, key):
        return os.path.join(folder, pattern.replace("?", "").replace("*", "{}").format(*key))

    table = "train" if labels.endswith("TrainIds.png") else DATASETS[name].table
    items, problems = [], []
    label_of = {}
    for path, key, _ in masks:
        if key in label_of:  # a.png beside a.PNG
            problems.append(f"{label_of[key]} and {path} are two labels for one picture: remove one.")
        label_of.setdefault(key, path)
    picture_of = {}
    for path, key, weather in pictures:
        other = picture_of.setdefault((key, weather), path)
        if other != path:  # a.png beside a.jpg
            problems.append(f"{other} and {path} are two pictures for one label: remove one.")
        elif key not in label_of:
            problems.append(f"{path} has no label: looked for {expected(labels, key)}; "
                            "fetch it or remove the image.")
        else:
            items.append(Item(name, path, label_of[key], table, name="/".join(key) + weather))
    # RainCityscapes has rain for a few of the frames, and gtFine has the labels of all of them.
    if any(weather for _, weather in picture_of):
        return items, problems
    frames = {key for key, _ in picture_of}
    for path, key, _ in masks:
        if key not in frames and not _made_from(key, frames):
            problems.append(f"{path} has no picture: looked for {expected(images, key)}; "
                            "fetch it or remove the label.")
    return items, problems


def _made_from(key, frames):
    """Whether a label was made from a frame's own, as 00001_labelTrainIds.png is from 00001.png.

    Other projects' scripts leave such files beside the labels. They are no pair's, and no problem.
    """
    *folders, last = key
    words = last.split("_")
    return any((*folders, "_".join(words[:n])) in frames for n in range(1, len(words)))


def _misnamed(folder, layouts, split, own):
    """The folder of a split under the name that another data set gives it, or None."""
    names = ("val", "valid", "validation") if split == "val" else ("train", "training")
    for pattern in (part for layout in layouts for part in layout):
        top = pattern.split("*")[0]
        for other in names if "{split}" in top else ():
            path = os.path.join(folder, top.format(split=other)).rstrip("/")
            if other != own and os.path.isdir(path):
                return path
    return None


def _walk(folder, pattern, ends):
    """(path, key, weather) of the files that match: key is what stands for the `*`s, weather what
    stands for the `?`. Each folder is listed once and no file is asked for anything: over a
    network 50,000 questions take minutes."""
    def refuse(error):  # a folder that is silently skipped would make another data set of this one
        require(isinstance(error, (FileNotFoundError, NotADirectoryError)),
                f"{error.filename} cannot be listed ({error.strerror}): see to its permissions or its disk.")

    stem = os.path.splitext(pattern)[0]
    name = re.escape(stem).replace(r"\*", "([^/.][^/]*)")  # not ._00001.png, which a Mac leaves
    # The last group is the weather. Patterns without a `?` get one that matches nothing.
    name = name.replace(r"\?", f"({WEATHER})") if "?" in stem else name + "()"
    top = os.path.join(folder, os.path.dirname(stem.split("*")[0]))
    for place, _, files in os.walk(top, onerror=refuse, followlinks=True):
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        for file in files:
            if match := re.fullmatch(rf"{name}\.{ends}", f"{below}/{file}"):
                *key, weather = match.groups()
                yield os.path.join(place, file), tuple(key), weather


def evenly(items, number):
    """So many items, evenly spaced, or all where there are fewer: neighbours in a list are often frames of one drive."""
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


# ------------------------------------------------------------------------------------------- files: from disk to arrays


def load_pair(item, mapillary="A"):
    """(image (H, W, 3) uint8, label (H, W) uint8 train ids), of one size or refused."""
    label = _open_label(item)
    image = _open_image(item, label.size)
    return np.array(image), _train_ids(item, np.asarray(label), mapillary)


def check_pairs(items, mapillary="A"):
    """Open 32 pairs in full, evenly spaced (all of a small list), so that training starts at once.
    `--check` reads them all.

    UserError: a pair that cannot be read, or no pixel with a class in any of those opened. Nothing
    else would notice the latter: a mean over no pixels is 0, and so is the loss of each step.
    """
    labelled = 0
    opened = evenly(items, 32)
    for item in opened:
        _, label = load_pair(item, mapillary)
        labelled += np.count_nonzero(label != VOID)
    if opened and not labelled:
        raise UserError(f"no pixel in {len(opened)} pairs of {opened[0].dataset} has a class, the "
                        f"first label is {opened[0].label}: {NOT_OFFICIAL}.")


def shared_memory():
    """Bytes that loader processes have to hand their batches over in: a container's default, 64 MiB, holds few."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf  # no Linux, no such limit


def check_shared_memory(workers, batch):
    """Each of the processes keeps two batches of so many bytes ready; where they do not fit, it dies of a bus error."""
    need, room = (2 * workers + 1) * batch, shared_memory()
    require(workers == 0 or need <= room, f"--workers {workers} need {need / 2 ** 20:.0f} MiB of shared memory and /dev/shm has "
            f"{room / 2 ** 20:.0f}: give fewer, or --workers 0, or the container more (docker run --shm-size 4g).")


def to_tensor(image):
    """A picture (H, W, 3) uint8 -> (3, H, W) float32, normalised."""
    import torch  # here and not above: --help and --check do without it and need not wait for it
    return normalise(torch.from_numpy(image.transpose(2, 0, 1).copy()))


def normalise(image):
    """(..., 3, H, W) uint8 on any device -> float32, normalised as CLIP's training images were. A batch travels from the
    loader to the device as bytes, which are a quarter of the floats, and is normalised there."""
    mean, std = _mean_and_std(image.device)
    return (image.float() - mean) / std


@functools.cache
def _mean_and_std(device):
    """Made once on each device: the host would wait for all of a GPU's work whenever it sends numbers of its own."""
    import torch
    return [255 * torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD)]


@functools.lru_cache(maxsize=512)
def _drawn(item):
    domain, split, index = item.image.split("/")
    return [Image.fromarray(array) for array in toy.draw(domain, split, int(index), harmful=item.harmful)[:2]]


def _open_label(item):
    """The raw ids as a Pillow image of one 8-bit channel, from a file stored as the data set ships it.

    It is not enough that the numbers are in range. Tools that shrink a PNG (optipng, pngquant) or
    copy it (ImageMagick) keep the colours and number them anew. Such a file looks the same in any
    viewer, but its numbers are positions in a new palette, and they read as other classes.
    """
    if not item.label:
        return _drawn(item)[1]
    remedy = f"use the official label files of {item.dataset}, as they were downloaded."
    with _reading(item.label) as label:
        require(label.format == "PNG", f"{item.label} is a {label.format} file and no PNG: {remedy}")
        stored = label.tile[0][3]  # as the file has it; the mode is what Pillow makes of that
        # Classes alone, with a grey palette that is checked below: so --unpack stores them.
        if item.table == "synthia" and label.mode != "P":
            return _synthia_classes(item, label, stored, remedy)
        require(label.mode in ("L", "P"), f"{item.label} is stored as {label.mode} and not as ids in "
                f"one 8-bit channel: {remedy}")
        # Of grey in 1, 2 or 4 bits Pillow makes shades over all of 0 to 255: 4-bit id 5 becomes 85.
        require(label.mode == "P" or stored == "L", f"{item.label} has fewer than 8 bits a pixel, so "
                f"a program has changed how its ids are stored: {remedy}")
        label.load()
    if label.mode == "P":
        _check_palette(item, label, remedy)
    return label


def _synthia_classes(item, label, stored, remedy):
    """SYNTHIA's label file, opened but not loaded -> its classes as an image of one 8-bit channel.

    Class and instance are 16-bit channels, high byte first. Pillow keeps the high byte of each, and
    every class becomes 0. Told that the low byte comes first, it keeps the other: the class.
    """
    require(stored == "RGB;16B", f"{item.label} is not stored as RGB with 16 bits a channel, so a program "
            f"has saved it again and its classes are lost: {remedy}")
    label.tile = [(*label.tile[0][:3], "RGB;16L")]
    label.load()
    # A program may have taken RGB for BGR. Officially, what has an instance has a class, too. So we
    # refuse a file in which most numbers stand where the class is 0. A thin sample shows that.
    sample = np.asarray(label.resize((label.width // 8 + 1, label.height // 8 + 1), Image.NEAREST))
    has_class = sample[..., 0] > 0
    has_other = (sample[..., 1:] > 0).any(-1)
    require((has_other & ~has_class).sum() <= has_class.sum(),
            f"{item.label} has its classes in another channel than the first: {remedy}")
    return label.getchannel("R")


def _check_palette(item, label, remedy):
    """Refuse a label in P mode in which an id that occurs has a colour that it should not have."""
    wrong = _wrong_colours(item.table, bytes(label.getpalette("RGB")))
    if wrong.any():  # never in official files. Counting the ids that occur takes as long as decoding
        wrong = wrong & (np.array(label.histogram()) > 0)
    require(not wrong.any(), f"{item.label} gives id {', '.join(map(str, np.flatnonzero(wrong)[:8]))} a "
            "colour that is not its own, so a program (such as optipng or ImageMagick) has numbered "
            f"the colours anew: {remedy}")


@functools.lru_cache(maxsize=64)  # nearly all files of a data set have the same palette
def _wrong_colours(table, palette):
    """(256,) bool: the ids to which this palette (bytes, RGB RGB ...) gives a wrong colour.

    Where the official files are greyscale, id n has to be grey n: the file was only given a palette.
    Where they have a palette, an id with a class has to have its own colour. An id without a class
    may have any colour that is no class's: releases differ in those, and no class is lost by it.
    """
    colour = np.frombuffer(palette[:768].ljust(768, b"\0"), np.uint8).reshape(256, 3)
    if table not in PALETTES:
        return (colour != np.arange(256)[:, None]).any(1)
    wrong = np.zeros(256, bool)  # of ids outside the table, too: those are refused whatever their colour
    tables = [TABLES[name] for name in TABLES if name.split("-")[0] == table]  # Mapillary's two
    official = PALETTES[table]
    with_class = {raw for raw in official if any(ids[raw] < len(CLASSES) for ids in tables)}
    taken = {official[raw] for raw in with_class}
    for raw in np.flatnonzero(tables[0] != UNKNOWN).tolist():
        found = tuple(colour[raw].tolist())
        wrong[raw] = found != official.get(raw) and (raw in with_class or found in taken)
    return wrong


def _open_image(item, size, box=None):
    """The picture in RGB, as Pillow's; its size has to be the label's, (w, h).

    box    (left, top, right, bottom) in whole pixels, or None for all of the picture. Pixels outside
           of it may come out black, because decoding is most of a sample's time. The picture keeps
           its size, so that a box means the same place on it as on the label.

    EXIF turns nothing: labels lie over the pixels as stored.
    """
    if not item.label:
        return _drawn(item)[0]
    with _reading(item.image) as image:
        require(image.size == size, f"{item.label} is {size[0]}x{size[1]} but its image {item.image} is "
                f"{image.width}x{image.height}: fetch the pair again or remove it.")
        if box:
            _decode_only(image, box)
        return to_rgb(image, item.image)


def _decode_only(image, box):
    """Tell Pillow to decode no more of an opened file than the box needs.

    `image.tile` is Pillow's plan for decoding: a decoder, the box of the picture that it fills,
    where in the file it begins, and its arguments.
    """
    left, top, _, bottom = box
    decoder, _, offset, arguments = image.tile[0]
    if image.format == "PNG" and not image.info.get("interlace"):
        # A PNG is a stream from top to bottom. What lies below the box can be left out, what lies
        # above it cannot.
        image.tile = [(decoder, (0, 0, image.width, bottom), offset, arguments)]
    elif image.format == "PPM" and arguments in ("RGB", ("RGB", 0, 1)):
        # The pixels lie one after another, three bytes each. So the box is found by counting.
        row = 3 * image.width  # bytes from one row to the next
        image.tile = [(decoder, box, offset + top * row + 3 * left, ("RGB", row, 1))]


def to_rgb(image, path):
    """A Pillow picture of any mode -> RGB, 8 bits a channel: of a data set, or a user's own.

    16 bits   The high byte is kept (v // 256), of grey as of colours. Pillow does so for colours
              alone. It cuts grey off at 255, and nearly all of the picture is white.
    alpha     It is left out: colours count as they are stored, also where they are transparent.
    32 bits   Whole or floating-point numbers are refused: no file says which number is white.
    """
    image.info.pop("transparency", None)  # it changes no colour, and Pillow would warn of it
    if image.mode == "RGB":
        image.load()
        return image  # convert() would copy it, though there is nothing to convert: 8 MB for GTA5
    # Older Pillows call 16-bit grey of a PNG "I", which otherwise means 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        high = np.asarray(image) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    kind = {"I": "whole", "F": "floating-point"}.get(image.mode)
    require(not kind, f"{path} holds {kind} numbers of 32 bits, and nothing says which of them is white: "
            "save it with 8 bits a channel, as PNG or JPEG.")
    return image.convert("RGB")


@contextlib.contextmanager
def _reading(path):
    try:
        with Image.open(path) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken file makes Pillow raise anything from SyntaxError to struct.error
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
        raise UserError(f"{path} cannot be read ({reason}): fetch it again or remove the pair.") from None


def _train_ids(item, raw, mapillary):
    """Ids as stored, any shape, uint8 -> uint8 train ids. An id outside the table is refused, not guessed."""
    # The same as table[raw]. translate() looks each byte up in a table, too, and takes a third of the time.
    translated = bytearray(raw.tobytes()).translate(_id_table(item.table, mapillary).tobytes())
    label = np.frombuffer(translated, np.uint8).reshape(raw.shape)
    if UNKNOWN in translated:
        strange = np.unique(raw[label == UNKNOWN]).tolist()
        raise UserError(f"{item.label}: ids {', '.join(map(str, strange[:8]))} are not in the table "
                        f"`{item.table}`: use the official label files (ids, and neither colours nor "
                        "another kind of ids).")
    return label


# ----------------------------------------------------------------------------------------- views: from files to samples


def random_view(size, crop, scale, rng):
    """A window of crop (h, w) somewhere on a picture of size (w, h) after scaling.

    -> box      what the window shows, in the *original* picture's coordinates (left, top, right, bottom), not rounded
       patch    (w, h) of the box when scaled; smaller than the crop where the scaled picture is
       offset   (x, y) of the patch in the crop; the rest is padding. Its place is random too: padding that is always
                at the bottom tells a network where the bottom is.
    """
    (width, height), (crop_h, crop_w) = size, crop
    scaled_w, scaled_h = max(1, round(width * scale)), max(1, round(height * scale))
    x, y = (int(rng.integers(min(0, room), max(0, room) + 1)) for room in (scaled_w - crop_w, scaled_h - crop_h))
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + crop_w, scaled_w), min(y + crop_h, scaled_h)
    to_w, to_h = width / scaled_w, height / scaled_h
    return (x0 * to_w, y0 * to_h, x1 * to_w, y1 * to_h), (x1 - x0, y1 - y0), (x0 - x, y0 - y)


def varied_view(label, table, crop, scale, rng):
    """The first of CROP_TRIES windows in which no class has more than LARGEST, else the most varied -> (view, patch).

    Only the label is looked at. Its raw ids are counted and the 256 counts folded by the table: cheaper at every try
    than translating the pixels. A window without any label is the worst of all.
    """
    best = None
    for _ in range(CROP_TRIES):
        view = random_view(label.size, crop, scale, rng)
        patch = label.resize(view[1], Image.NEAREST, box=view[0])  # nearest: ids have no mean
        count = np.bincount(table, weights=patch.histogram()[:256], minlength=256)[:len(CLASSES)]
        largest = count.max() / count.sum() if count.any() else math.inf
        if best is None or largest < best[0]:
            best = largest, view, patch
        if largest <= LARGEST:
            break
    return best[1:]


def colour_jitter(image, rng):
    """Brightness b, contrast c, saturation S and hue R (a turn about the grey axis) are all linear: one pass for all.

        x' = c b R S x + (1 - c) b m,   m the mean grey of the picture       (S and R leave grey as it is)
    """
    b, c, s = rng.uniform(1 - JITTER, 1 + JITTER, 3)
    turn = 2 * math.pi * rng.uniform(-HUE, HUE)
    grey = np.array([0.299, 0.587, 0.114])
    saturation = s * np.eye(3) + (1 - s) * grey  # every row of the second term is `grey`
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = math.cos(turn) * np.eye(3) + math.sin(turn) * cross + (1 - math.cos(turn)) / 3  # Rodrigues' formula
    matrix = np.column_stack([c * b * hue @ saturation, np.full(3, (1 - c) * b * grey @ ImageStat.Stat(image).mean)])
    return image.convert("RGB", matrix.ravel().tolist())


def gaussian_blur(image, rng):
    """A Pillow image, blurred with probability BLUR[0] by a Gaussian of BLUR[1] to BLUR[2] pixels, or as it was."""
    chance, least, largest = BLUR
    sigma = rng.uniform(least, largest)
    return image.filter(ImageFilter.GaussianBlur(sigma)) if rng.random() < chance else image


def training_view(item, crop, rng, mapillary="A", augment=True):
    """One pair as a random view: (image (h, w, 3) uint8, label (h, w) uint8 train ids), crop = (h, w).

    The image is to be read and not to be written to: it may be Pillow's own memory.
    """
    label = _open_label(item)
    scale = rng.uniform(*SCALES) if augment else 1.0
    (box, size, offset), patch = varied_view(label, _id_table(item.table, mapillary), crop, scale, rng)
    image = _open_image(item, label.size, _neighbourhood(box, scale, label.size))
    image = image.resize(size, Image.BILINEAR, box=box)
    label = _train_ids(item, np.asarray(patch), mapillary)
    if augment:
        if rng.random() < 0.5:
            image, label = image.transpose(Image.FLIP_LEFT_RIGHT), label[:, ::-1]
            offset = crop[1] - size[0] - offset[0], offset[1]
        image = gaussian_blur(colour_jitter(image, rng), rng)
    return _padded(image, label, crop, offset)


def _neighbourhood(box, scale, size):
    """The whole pixels, on a picture of size (w, h), of which a bilinear view of the box is made."""
    reach = max(1.0, 1 / scale)  # a bilinear pixel looks this far beyond the box
    left, top = (max(0, math.floor(edge - reach) - 1) for edge in box[:2])
    right, bottom = (min(end, math.ceil(edge + reach) + 1) for edge, end in zip(box[2:], size))
    return left, top, right, bottom


def _padded(image, label, crop, offset):
    """Pillow's image and an array of train ids, at offset (x, y) of a crop (h, w) -> two arrays of its size."""
    # Nearly always on pictures of real size. To fill a canvas first would be in vain.
    if label.shape == tuple(crop):
        return np.asarray(image), np.ascontiguousarray(label)
    # Pillow fills a canvas faster than numpy does.
    canvas = Image.new("RGB", (crop[1], crop[0]), PADDING)
    canvas.paste(image, offset)
    padded, (x, y) = np.full(crop, VOID, np.uint8), offset
    padded[y:y + label.shape[0], x:x + label.shape[1]] = label
    return np.asarray(canvas), padded


class TrainingStream:
    """Samples without end. Sample n comes from source n mod S, so sources are mixed in equal parts whatever their size;
    within a source the pairs come in a new random order each epoch. __getitem__ and __len__ are all that a DataLoader
    asks of a data set, so this is a plain class.

    A bad file met in training: the next pair of the order takes its place, and one warning names the file, for a run of
    days must not die in hour ten of one broken file among 25,000. What is bad depends on file and view alone, so sample
    n stays a function of (seed, n). If PATIENCE pairs in a row fail, it is not the files: we stop.
    """

    def __init__(self, sources, crop, seed, mapillary="A", augment=True):
        import torch
        require(sources and all(sources), "a training stream needs at least one source, and every source at least one pair.")
        self.sources, self.seed, self.mapillary, self.augment = sources, seed, mapillary, augment
        self.crop = (crop, crop) if np.isscalar(crop) else tuple(crop)
        require(min(self.crop) >= 1 and seed >= 0, f"crop {crop} has to be at least 1 pixel, seed {seed} at least 0.")
        _id_table("mapillary", mapillary)  # a wrong convention is refused here and not in hour two
        self._named = torch.zeros(len(sources), max(map(len, sources))).share_memory_()  # by all workers: one warning per file

    def __len__(self):
        """Pairs in all sources. n may be any number from 0 on."""
        return sum(map(len, self.sources))

    def locate(self, n, skip=0):
        """(source, index in its list) of sample n, or of the pair `skip` places further on in the order."""
        turn, source = divmod(n, len(self.sources))
        epoch, place = divmod(turn + skip, len(self.sources[source]))
        return source, int(_order(self.seed, source, epoch, len(self.sources[source]))[place])

    def __getitem__(self, n):
        import torch
        for skip in range(PATIENCE):
            source, index = self.locate(n, skip)
            item, rng = self.sources[source][index], np.random.default_rng([self.seed, 1, n])
            try:
                image, label = training_view(item, self.crop, rng, self.mapillary, self.augment)
                return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label)
            except UserError as problem:
                if not self._named[source, index]:
                    self._named[source, index] = 1
                    warnings.warn(f"left out in training, another pair takes its place: {problem}", stacklevel=2)
                last = problem
        raise UserError(f"{PATIENCE} training pairs in a row are bad (is the disk still there?), the last one: {last}")


@functools.lru_cache(maxsize=16)
def _order(seed, source, epoch, pairs):
    """The order of a source's pairs in an epoch, kept, because to shuffle 25,000 pairs takes 0.3 ms."""
    # [seed, 0, ...] here, [seed, 1, ...] for views: numpy pads keys with zeros, so [5, 7] is also [5, 7, 0]
    return np.random.default_rng([seed, 0, source, epoch]).permutation(pairs)


# ----------------------------------------------------------------------------------------------- python data.py --check


def check(names, root, mapillary="A"):
    """Read every pair of the data sets, print what is there and what is wrong -> the problems, one sentence each."""
    problems = []
    for name in names:
        splits = {split: _list(name, root, split) for split in ("train", "val")}
        # One of the two is enough: a target needs no train split, a source no val split.
        on_disk = {split: listed for split, listed in splits.items() if listed[0] is not None}
        for split, (items, faults) in (on_disk or {"train": ([], splits["train"][1])}).items():
            faults = faults + _report(f"{name} {split}", items, mapillary)
            for problem in faults:
                print("  PROBLEM " + problem)
            problems += faults
    print(f"\n{len(problems)} problem(s). The first: {problems[0]}" if problems else "\nall well.")
    return problems


def _report(title, items, mapillary):
    """Read all pairs of a split, on every core, and print sizes, ids and classes -> the problems."""
    with ProcessPoolExecutor() as pool:
        results = list(tqdm(pool.map(_examine, items, chunksize=8), title, len(items), unit="pair", disable=not items))
    problems = [problem for problem, _, _ in results if problem]
    print(f"\n{title}: {len(items)} pairs")
    if read := [(size, count) for problem, size, count in results if not problem]:
        table, raw_ids = items[0].table, sum(count for _, count in read)
        pixels = np.bincount(_id_table(table, mapillary), raw_ids, 256)[[*range(len(CLASSES)), VOID]]
        percent = dict(zip((*CLASSES, "void"), 100 * pixels / pixels.sum()))
        sizes = Counter(f"{w}x{h}" for (w, h), _ in read).most_common(5)
        print("  sizes  " + ", ".join(f"{size} ({number})" for size, number in sizes))
        print(f"  ids    {' '.join(map(str, np.flatnonzero(raw_ids)))} (of `{table}`)")
        print("  share  " + ", ".join(f"{c} {p:.2f} %" for c, p in percent.items() if p))
        print("  absent " + (", ".join(c for c, p in percent.items() if not p) or "none"))
        problems += _lacking(title, pixels)
    return problems


def _lacking(title, pixels):
    """Print what looks odd in a split -> a problem, if it has no class. pixels: of 19 classes and void."""
    if not pixels[:-1].any():
        return [f"{title}: no pixel of any label has a class: {NOT_OFFICIAL}."]
    absent = int((pixels[:-1] == 0).sum())
    if pixels[-1] > pixels.sum() / 2:
        print("  LOOK   more than half of all pixels are void: are these the official labels?")
    if absent > len(CLASSES) / 2:
        print(f"  LOOK   {absent} of {len(CLASSES)} classes never occur: are these the official labels?")
    return []


def _examine(item):
    """Read a pair in full -> (problem or "", (width, height), how often each raw id occurs (256))."""
    try:
        label = _open_label(item)
        image = _open_image(item, label.size)
        count = np.array(label.histogram()[:256])
        _train_ids(item, np.flatnonzero(count).astype(np.uint8), "A")  # A and B know the same ids
        return "", image.size, count
    except UserError as error:
        return str(error), None, None


# ------------------------------------------------------------------------- python data.py --unpack
#
# Eight loader processes give about 100 samples a second of GTA5 as downloaded. Most of that time
# decodes PNGs. A fast GPU asks for more. So pictures can be decoded once, before training, at the
# price of disk space.
#
# We compared these storages by `python tests/bench.py --loader`, on pictures of GTA5's size
# (1914 x 1052), on two busy cores:
#
#     storage               MB a pair   ms of a core for a sample
#     PNG, as downloaded         3.2     75
#     PNG, level 1               3.7     87
#     PNG, level 0               6.1     59
#     BMP, TIFF                  6.1     27
#     PPM                        6.1     23
#
# We chose PPM: a line of text, then the bytes of the pixels. Nothing is packed, filtered or summed,
# so the box of a view is decoded alone. Any tool opens it. TIFF and BMP hold as many bytes and are
# decoded whole. An "uncompressed" PNG still has filters and check sums over all of its bytes.
# Lossy storages would change the training.
#
# Labels stay PNG, of 8-bit ids without row filters. Filters make photographs smaller, but they only
# slow ids down. Ids without any compression would save about a tenth of a sample's time, and they
# would add a third to the bytes.

UNPACKED = ".ppm"
UNFINISHED = "unfinished"  # a folder in the target: a data set leaves it when all of its files are there
MARK = "unpacked.json"     # a file in an unpacked data set: where its files came from
GREY = [level for level in range(256) for _ in range(3)]  # a palette that shows id 7 as grey 7


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a data set and its place in the unpacked tree."""

    item: Item
    source: str   # item.image or item.label
    target: str   # where its pixels go

    @property
    def same(self):
        """Where a file that cannot be read goes: beside the target, with its own ending, so that it is listed."""
        return os.path.splitext(self.target)[0] + os.path.splitext(self.source)[1]


def unpack(names, root, into):
    """Write data sets of `root` again below `into`, as files that decode at once.

    -> the problems, one sentence each. UserError: what hinders it.

    `into` is a data root afterwards. Every training sample and every evaluated pair from it has the
    bits that it has from `root`. So a pair that cannot be read is copied as it is, with its fault:
    training leaves it out here as there. Files get their name when they are whole and were read
    back; a second call goes on after the first. Nothing below `root` is ever written.
    """
    try:
        return _unpack(list(dict.fromkeys(names)), root, into)
    except KeyboardInterrupt:
        raise UserError(f"stopped; what is written stays in {os.path.join(into, UNFINISHED)}: give the "
                        "same command again, and it goes on from there.") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or into} could not be written or read ({reason}): see to the "
                        "room on its disk or to its permissions, then give the same command again, and "
                        "it goes on from there.") from None


def _unpack(names, root, into):
    """unpack, whose callers see no other error than a UserError."""
    _check_places(names, root, into)
    todo = {name: _files_to_write(name, root, into) for name in names}
    _check_room([file for files in todo.values() for file in files], into)
    problems = []
    for name, files in todo.items():
        place = os.path.join(into, DATASETS[name].folder)
        if os.path.isdir(place):
            print(f"{name}: unpacked already, in {place}.")
            continue
        problems += _write_all(name, files, root, into)
        _finish(name, root, into)
        print(f"{name}: unpacked into {place}.")
    for problem in problems:
        print("  PROBLEM, copied as it is: " + problem)
    print(f"\nNow give --data-root {into} in the place of {root}.")
    _propose_links(root, into)
    return problems


def _propose_links(root, into):
    """Say how the other data sets get into the new data root: one root serves sources and targets."""
    folders = sorted(spec.folder for spec in DATASETS.values() if spec.layouts)
    missing = [folder for folder in folders if os.path.isdir(os.path.join(root, folder))
               and not os.path.exists(os.path.join(into, folder))]
    if missing:
        print(f"It lacks {', '.join(missing)}. Data sets that are only evaluated need no unpacking, and "
              "a link will do:")
    for folder in missing:
        print(f"  ln -s {shlex.quote(os.path.abspath(os.path.join(root, folder)))} {shlex.quote(str(into))}/")


def _check_places(names, root, into):
    """Refuse what cannot be unpacked, and a target folder in which something could be lost or mixed up."""
    for name in names:
        require(name in DATASETS, f"there is no data set {name!r}: choose from {', '.join(DATASETS)}.")
        require(DATASETS[name].layouts, f"{name} is drawn and has no files: there is nothing to unpack, "
                "leave it out.")
    require(os.path.isdir(root), f"the data root {root} is not a folder: give --data-root the one that "
            "holds the data sets.")
    require(not os.path.exists(into) or os.path.isdir(into), f"--into {into} is a file: give a folder.")

    real = os.path.realpath(into)
    require(real != os.path.realpath(root), f"--into {into} is the data root itself, whose files stay as "
            "they are: give another folder.")
    folders = {spec.folder for spec in DATASETS.values() if spec.layouts}
    for folder in sorted(folders):
        source = os.path.join(root, folder)
        inside = os.path.commonpath([real, os.path.realpath(source)]) == os.path.realpath(source)
        require(not inside, f"--into {into} lies in the data set {source}, whose files stay as they are: "
                "give another folder.")

    found = os.listdir(into) if os.path.isdir(into) else []
    for foreign in sorted(set(found) - folders - {UNFINISHED}):
        raise UserError(f"--into {into} holds {foreign}, which is no data set: give a new or an empty folder.")
    for name in names:
        _check_origin(os.path.join(root, DATASETS[name].folder), os.path.join(into, DATASETS[name].folder))
        _check_origin(os.path.join(root, DATASETS[name].folder),
                      os.path.join(into, UNFINISHED, DATASETS[name].folder))


def _check_origin(source, place):
    """Refuse to go on in a folder that was not written by --unpack from this source."""
    if not os.path.lexists(place):
        return
    came_from = _read_mark(place)
    require(came_from, f"{place} was not written by --unpack: give another --into, or move that folder away.")
    require(came_from == os.path.realpath(source), f"{place} was unpacked from {came_from} and not from "
            f"{source}: give another --into, or remove that folder.")


def _read_mark(place):
    """The data set that the files of an unpacked one came from, or None where --unpack has not been."""
    try:
        with open(os.path.join(place, MARK), encoding="utf-8") as file:
            return json.load(file)["from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files_to_write(name, root, into):
    """The files of both splits that are not in the unpacked tree yet."""
    folder = DATASETS[name].folder
    finished = os.path.isdir(os.path.join(into, folder))
    place = os.path.join(into, folder) if finished else os.path.join(into, UNFINISHED, folder)
    files = {}
    for split, items in _splits(name, root).items():
        images = []
        for item in items:
            below = [os.path.relpath(path, os.path.join(root, folder)) for path in (item.image, item.label)]
            image, label = (os.path.join(place, path) for path in below)
            image = os.path.splitext(image)[0] + UNPACKED
            images.append(image)
            files[image] = _File(item, item.image, image)
            files[label] = _File(item, item.label, label)  # once, also where three weathers share it
        # The order of the pairs decides which one is sample n. With another ending, names that have
        # dots within can sort otherwise.
        require(images == sorted(set(images)), f"pictures of {name} ({split}) would have one name or "
                f"another order as {UNPACKED} files: see that their names differ before the ending and "
                "have no other dot.")
    if finished:
        require(_pairs_below(name, root) == _pairs_below(name, into), f"{os.path.join(root, folder)} has "
                f"other pairs than {place}, which was unpacked from it: remove the latter to unpack it again.")
        return []
    return [file for file in files.values() if not _is_written(file)]


def _splits(name, root):
    """{split: its pairs} of the splits on disk. A problem of a listing is raised as list_items raises it."""
    listed = {split: _list(name, root, split) for split in ("train", "val")}
    # items is None where a split is not on disk: no fault if the other one is.
    on_disk = {split: found for split, found in listed.items() if found[0] is not None}
    for _, problems in on_disk.values() if on_disk else [listed["train"]]:
        _raise_first(problems)
    return {split: items for split, (items, _) in on_disk.items()}


def _pairs_below(name, root):
    """The listing of a data set without root and endings: equal for a data set and its unpacked copy."""
    def below(item):
        image, label = (os.path.relpath(path, root) for path in (item.image, item.label))
        return os.path.splitext(image)[0], label, item.table

    return {split: [below(item) for item in items] for split, items in _splits(name, root).items()}


def _is_written(file):
    """Whether a file is in the unpacked tree, of the source as it is now.

    An unpacked file has its source's time of change. If the source has changed since, times differ.
    """
    for path in {file.target, file.same}:
        with contextlib.suppress(OSError):
            # Not every disk keeps fractions of a second.
            if abs(os.path.getmtime(path) - os.path.getmtime(file.source)) < 2:
                return True
    return False


def _check_room(files, into):
    """Say how many bytes will be written, and refuse to begin where the disk has no room for them."""
    with ThreadPoolExecutor(CORES) as pool:
        sizes = pool.map(_bytes_of, files)
        need = sum(tqdm(sizes, "sizes", len(files), unit="file", disable=not files))
    above = os.path.abspath(into)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    free = shutil.disk_usage(above).free
    print(f"{len(files)} files to write: {need / 1e9:.3g} GB. Free in {into}: {free / 1e9:.3g} GB.",
          flush=True)
    require(need <= free, f"--into {into} lacks {(need - free) / 1e9:.3g} GB: make room there, or give a "
            "folder on a larger disk.")


def _bytes_of(file):
    """What a file will take: three bytes a pixel for a picture, its present size for a label.

    It is rounded up to 4 KiB, the block of most disks.
    """
    size = 0
    with contextlib.suppress(OSError):
        size = os.path.getsize(file.source)
    if file.source == file.item.image:
        with contextlib.suppress(UserError), _reading(file.source) as image:  # the header alone is read
            size = 3 * image.width * image.height + 32
    return -(-size // 4096) * 4096


def _write_all(name, files, root, into):
    """Write files of a data set on all cores, with a progress bar -> problems of pairs that cannot be read."""
    folder = os.path.join(into, UNFINISHED, DATASETS[name].folder)
    # Threads will do, as Pillow decodes and writes beside other threads. Processes can outlive a kill
    # of the one that started them; threads cannot.
    pool, problems = ThreadPoolExecutor(CORES), []
    try:
        for place in {folder, *(os.path.dirname(file.target) for file in files)}:
            os.makedirs(place, exist_ok=True)
        with _whole(os.path.join(folder, MARK)) as part, open(part, "w", encoding="utf-8") as mark:
            json.dump({"from": os.path.realpath(os.path.join(root, DATASETS[name].folder))}, mark)
        for problem in tqdm(pool.map(_write, files), name, len(files), unit="file", disable=not files):
            problems += [problem] if problem and problem not in problems else []
    finally:
        # After an error or Ctrl-C: otherwise all other files would be written before anybody hears of it.
        pool.shutdown(cancel_futures=True)
    return problems


def _write(file):
    """Write one file and read it back -> "", or what is wrong with a pair, whose file is copied as it is."""
    problem, pixels = "", None
    is_label = file.source == file.item.label
    try:
        label = _open_label(file.item)
        pixels = label if is_label else _open_image(file.item, label.size)
    except UserError as error:
        problem = str(error)
    place = file.same if problem else file.target
    for other in {file.target, file.same} - {place}:  # of an earlier call, when the source was another
        with contextlib.suppress(FileNotFoundError):
            os.remove(other)
    with _whole(place) as part:
        if problem:
            shutil.copyfile(file.source, part)
            equal = filecmp.cmp(file.source, part, shallow=False)
        elif is_label:
            _save_ids(pixels, file.item.table, part)
            again = _open_label(replace(file.item, label=part))
            equal = np.array_equal(np.asarray(pixels), np.asarray(again))
        else:
            pixels.save(part, "PPM")
            again = _open_image(replace(file.item, image=part), pixels.size)
            equal = ImageChops.difference(pixels, again).getbbox() is None
        require(equal, f"{place} was written and read back, and differs from {file.source}: its disk is "
                "not to be trusted, give another --into.")
        times = os.stat(file.source)
        os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))
    return problem


@contextlib.contextmanager
def _whole(path):
    """A name to write to. When all went well, the file is flushed to the disk, and then it gets the name `path`.

    So a kill or a loss of power leaves no half file under a name that counts. The number of the
    process keeps two calls apart.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def _save_ids(label, table, path):
    """Raw ids, losslessly, as a PNG with a palette: for these alone Pillow leaves the row filters out.

    The palette is the label's own, or grey n for id n. Where ids have official colours, _open_label
    takes no grey, so a label without a palette stays without one.
    """
    ids = Image.fromarray(np.asarray(label))
    palette = label.getpalette() or ([] if table in PALETTES else GREY)
    if palette:
        ids.putpalette((palette + [0] * 768)[:768])  # of fewer than 256 colours, Pillow would store fewer bits
    ids.save(path, "PNG", compress_level=1, bits=8)


def _finish(name, root, into):
    """All files are there: compare the two listings, then move the data set out of UNFINISHED."""
    unfinished, folder = os.path.join(into, UNFINISHED), DATASETS[name].folder
    equal = _pairs_below(name, root) == _pairs_below(name, unfinished)
    require(equal, f"{os.path.join(unfinished, folder)} holds other pairs than {os.path.join(root, folder)}, "
            "which has changed meanwhile: remove the former and give the same command again.")
    for place, _, files in os.walk(os.path.join(unfinished, folder)):
        for file in files:
            if file.endswith(".part"):  # of a call that was killed
                os.remove(os.path.join(place, file))
    os.rename(os.path.join(unfinished, folder), os.path.join(into, folder))
    with contextlib.suppress(OSError):  # other data sets may be in it
        os.rmdir(unfinished)


def _demo():
    classes = np.random.default_rng(0).integers(0, 19, (6, 8)).repeat(20, 0).repeat(20, 1)
    with tempfile.TemporaryDirectory() as root:
        for folder, array in (("images", COLORS[classes]), ("labels", np.array([*_CITYSCAPES], np.uint8)[classes])):
            os.makedirs(os.path.join(root, "gta5", folder))
            Image.fromarray(array).save(os.path.join(root, "gta5", folder, "00001.png"))
        item = list_items("gta5", root, "train")[0]
        image, label = training_view(item, (200, 100), np.random.default_rng(0), augment=False)
    nearest = np.abs(image[:, :, None].astype(int) - COLORS).sum(-1).argmin(-1)
    agree = (nearest == label)[label != VOID].mean()
    print(f"a 200x100 view of 120x160: {(label == VOID).mean():.0%} padding, colour and label agree on {agree:.0%} of the rest")
    print("Notice: however a view is scaled, cut and flipped, image and label stay on top of each other.")
    assert agree == 1


def main():
    """Read whole data sets and say what is wrong with them, or unpack them; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--check", nargs="+", metavar="NAME", help=f"data sets to read in full: {', '.join(DATASETS)}")
    task.add_argument("--unpack", nargs="+", metavar="NAME",
                      help="data sets to write again, below --into, as files that decode at once: for a GPU "
                      "that waits for its loader")
    parser.add_argument("--into", metavar="FOLDER", help="of --unpack: a new data root")
    parser.add_argument("--data-root", default="data", help="folder that holds one folder per data set (default: data)")
    parser.add_argument("--mapillary", default="A", choices=("A", "B"), help="66-to-19 mapping (default: A)")
    given = parser.parse_args()
    print_any_name()
    try:
        require(bool(given.unpack) == bool(given.into),
                "--unpack and --into belong together: give --unpack NAME --into FOLDER.")
        if given.check:
            sys.exit(1 if check(given.check, given.data_root, given.mapillary) else 0)
        if given.unpack:
            sys.exit(1 if unpack(given.unpack, given.data_root, given.into) else 0)
    except UserError as error:
        sys.exit(f"error: {error}")
    _demo()


if __name__ == "__main__":
    main()
