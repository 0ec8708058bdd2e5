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
`python data.py --check gta5 --data-root D` tests your own files. `python data.py` prints
    a 200x100 view of 120x160: 40% padding, colour and label agree on 100% of the rest
    Notice: however a view is scaled, cut and flipped, image and label stay on top of each other.
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageStat, UnidentifiedImageError
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
PATIENCE = 10            # bad pairs in a row that training survives
NOT_OFFICIAL = "these are not the official labels, or a program has changed them; fetch them again"


class UserError(ValueError):
    """Something that the user can mend. The message is one sentence: what, where, and the remedy."""


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
    from train to be one. Images may end in .png, .jpg or .jpeg, whatever the layout shows.

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
PICTURE, LABEL = "(?i:png|jpe?g)", "(?i:png)"  # how their names end, in capitals, too

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
    if problems:
        raise UserError(problems[0] + f" (And {len(problems) - 1} more: --check lists them.)" * (len(problems) > 1))
    return items


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
        if item.table == "synthia":
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


def _open_image(item, size, rows=None):
    """The picture in RGB, as Pillow's; its size has to be the label's, (w, h). With rows, a PNG, which is a stream from
    top to bottom, is decoded so far and no further. EXIF turns nothing: labels lie over the pixels as stored."""
    if not item.label:
        return _drawn(item)[0]
    with _reading(item.image) as image:
        require(image.size == size, f"{item.label} is {size[0]}x{size[1]} but its image {item.image} is "
                f"{image.width}x{image.height}: fetch the pair again or remove it.")
        if rows and image.format == "PNG" and not image.info.get("interlace"):
            codec, (left, top, right, bottom), *rest = image.tile[0]
            image.tile = [(codec, (left, top, right, min(rows, bottom)), *rest)]
        return to_rgb(image, item.image)


def to_rgb(image, path):
    """A Pillow picture of any mode -> RGB, 8 bits a channel: of a data set, or a user's own.

    16 bits   The high byte is kept (v // 256), of grey as of colours. Pillow does so for colours
              alone. It cuts grey off at 255, and nearly all of the picture is white.
    alpha     It is left out: colours count as they are stored, also where they are transparent.
    32 bits   Whole or floating-point numbers are refused: no file says which number is white.
    """
    image.info.pop("transparency", None)  # it changes no colour, and Pillow would warn of it
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
    label = _id_table(item.table, mapillary)[raw]
    strange = np.unique(raw[label == UNKNOWN]).tolist()
    require(not strange, f"{item.label}: ids {', '.join(map(str, strange[:8]))} are not in the table `{item.table}`: use the "
            "official label files (ids, and neither colours nor another kind of ids).")
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
    """One pair as a random view: (image (h, w, 3) uint8, label (h, w) uint8 train ids), crop = (h, w)."""
    label = _open_label(item)
    scale = rng.uniform(*SCALES) if augment else 1.0
    (box, size, offset), patch = varied_view(label, _id_table(item.table, mapillary), crop, scale, rng)
    reach = max(1.0, 1 / scale)  # a bilinear pixel looks this far beyond the box
    image = _open_image(item, label.size, rows=math.ceil(box[3] + reach) + 1)
    image = image.resize(size, Image.BILINEAR, box=box)
    label = _train_ids(item, np.asarray(patch), mapillary)
    if augment:
        if rng.random() < 0.5:
            image, label = image.transpose(Image.FLIP_LEFT_RIGHT), label[:, ::-1]
            offset = crop[1] - size[0] - offset[0], offset[1]
        image = gaussian_blur(colour_jitter(image, rng), rng)
    x, y = offset
    canvas = np.full((*crop, 3), PADDING, np.uint8)
    canvas[y:y + size[1], x:x + size[0]] = image
    padded = np.full(crop, VOID, np.uint8)
    padded[y:y + size[1], x:x + size[0]] = label
    return canvas, padded


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
        # [seed, 0, ...] here, [seed, 1, ...] for views: numpy pads keys with zeros, so [5, 7] is also [5, 7, 0]
        order = np.random.default_rng([self.seed, 0, source, epoch]).permutation(len(self.sources[source]))
        return source, int(order[place])

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
        _train_ids(item, np.flatnonzero(count), "A")  # A and B know the same ids
        return "", image.size, count
    except UserError as error:
        return str(error), None, None


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
    """Read whole data sets and say what is wrong with them; exit status 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", nargs="+", metavar="NAME", help=f"data sets to read in full: {', '.join(DATASETS)}")
    parser.add_argument("--data-root", default="data", help="folder that holds one folder per data set (default: data)")
    parser.add_argument("--mapillary", default="A", choices=("A", "B"), help="66-to-19 mapping (default: A)")
    given = parser.parse_args()
    print_any_name()
    if not given.check:
        return _demo()
    try:
        sys.exit(1 if check(given.check, given.data_root, given.mapillary) else 0)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
