"""toy.py: a drawn street world in several domains.

HEADER TO BE WRITTEN
"""
import argparse
import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 96, 192
VOID = 255
CLIP_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy_clip.pt")
NAMES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
         "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN,
 MOTORCYCLE, BICYCLE) = range(19)
CLASSES = tuple(c for c in range(19) if c != TRAIN)                 # drawn: all but the train
BODY, GLASS, DARK, LAMP, ACCENT, SKIN, LEGS, SHADOW = range(8)      # what a part of an object is made of
GROUND, SIDE, FRONT = range(3)                                      # the plane that a part lies in


# ------------------------------------------------------------------------------------------------ geometry
class _Scene:
    """A map of part numbers and, for each part, (class, role, object, plane, where that plane is, shade)."""

    def __init__(self, focal, height, horizon, centre):
        self.focal, self.height, self.horizon, self.centre = focal, height, horizon, centre
        self.picture = Image.new("I", (WIDTH, HEIGHT))
        self.pen = ImageDraw.Draw(self.picture)
        self.table, self.objects = [], 0

    def new(self):
        self.objects += 1
        return self.objects - 1

    def part(self, cls, role, obj, plane, at, shade=1.0):
        self.table.append((cls, role, obj, plane, at, shade))
        return len(self.table) - 1

    def point(self, x, y, z):
        k = self.focal / z
        return self.centre + x * k, self.horizon + (self.height - y) * k

    def polygon(self, part, points):
        self.pen.polygon([self.point(*p) for p in points], fill=part)

    def ground(self, part, x0, x1, z0, z1):
        self.polygon(part, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])

    def front(self, part, x0, x1, y0, y1, z, taper=1.0):
        mid, half = (x0 + x1) / 2, (x1 - x0) / 2 * taper
        self.polygon(part, [(x0, y0, z), (x1, y0, z), (mid + half, y1, z), (mid - half, y1, z)])

    def side(self, part, x, z0, z1, y0, y1, taper=0.0):
        self.polygon(part, [(x, y0, z0), (x, y0, z1), (x, y1, z1 - taper), (x, y1, z0 + taper)])

    def disc(self, part, x, y, z, rx, ry=None):
        (px, py), k = self.point(x, y, z), self.focal / z
        ax, ay = max(rx * k, 0.6), max((ry or rx) * k, 0.6)
        self.pen.ellipse((px - ax, py - ay, px + ax, py + ay), fill=part)

    def rod(self, part, x0, y0, x1, y1, z, width):
        self.pen.line((self.point(x0, y0, z), self.point(x1, y1, z)), fill=part, width=max(1, round(width * self.focal / z)))


def _box(scene, cls, obj, x0, x1, y0, y1, z0, z1, role=BODY, shade=1.0):
    """A box on the street: the side that the camera sees, then the end that faces it."""
    if x0 > 0 or x1 < 0:
        x = x0 if x0 > 0 else x1
        scene.side(scene.part(cls, role, obj, SIDE, x, 0.72 * shade), x, z0, z1, y0, y1)
    scene.front(scene.part(cls, role, obj, FRONT, z0, shade), x0, x1, y0, y1, z0)


def _car(scene, rng, x, z):
    obj, w, long, tall = scene.new(), rng.uniform(0.82, 0.98), rng.uniform(3.6, 4.6), rng.uniform(1.35, 1.75)
    belt = 0.58 * tall
    scene.ground(scene.part(ROAD, SHADOW, 0, GROUND, 0), x - w - 0.15, x + w + 0.15, z - 0.2, z + long)
    dark, glass = scene.part(CAR, DARK, obj, FRONT, z), scene.part(CAR, GLASS, obj, FRONT, z)
    if abs(x) > w:
        face = x - w if x > 0 else x + w
        scene.side(scene.part(CAR, BODY, obj, SIDE, face, 0.72), face, z, z + long, 0.28, belt)
        scene.side(scene.part(CAR, BODY, obj, SIDE, face, 0.66), face, z + 0.3, z + long - 0.9, belt, tall, 0.45)
        scene.side(glass, face, z + 0.6, z + long - 1.2, belt + 0.05, tall - 0.12, 0.35)
        for axle in (z + 0.75, z + long - 0.8):
            scene.polygon(dark, [(face, 0.34 + 0.34 * np.sin(a), axle + 0.34 * np.cos(a)) for a in np.arange(0, 6.2, 0.79)])
    for side in (-1, 1):
        scene.front(dark, x + side * w - 0.14 - side * 0.16, x + side * w + 0.14 - side * 0.16, 0, 0.4, z)
    scene.front(scene.part(CAR, BODY, obj, FRONT, z), x - w, x + w, 0.25, belt, z)
    scene.front(scene.part(CAR, BODY, obj, FRONT, z, 1.08), x - w, x + w, belt, tall, z, 0.74)
    scene.front(glass, x - 0.84 * w, x + 0.84 * w, belt + 0.02, tall - 0.13, z, 0.82)
    lamp = scene.part(CAR, LAMP, obj, FRONT, z)
    for side in (-0.8, 0.8):
        scene.front(lamp, x + side * w - 0.17, x + side * w + 0.17, 0.58, 0.76, z)
    scene.front(scene.part(CAR, ACCENT, obj, FRONT, z), x - 0.28, x + 0.28, 0.36, 0.5, z)


def _car_across(scene, rng, x, z):
    """A car seen from its side, on the crossing street."""
    obj, half, tall, d = scene.new(), rng.uniform(1.8, 2.2), rng.uniform(1.35, 1.6), rng.choice([-1, 1])
    scene.ground(scene.part(ROAD, SHADOW, 0, GROUND, 0), x - half, x + half, z - 0.2, z + 1.6)
    line = [(-1, .3), (1, .3), (1, .75), (.62, .86), (.3, tall), (-.5, tall), (-.85, .9), (-1, .85)]
    scene.polygon(scene.part(CAR, BODY, obj, FRONT, z, 0.9), [(x + d * half * a, b, z) for a, b in line])
    glass = scene.part(CAR, GLASS, obj, FRONT, z)
    for a, b, c, e in ((.5, -.06, -.06, .26), (-.72, -.14, -.14, -.47)):
        scene.polygon(glass, [(x + d * half * a, .9, z), (x + d * half * b, .9, z), (x + d * half * c, tall - .1, z),
                              (x + d * half * e, tall - .1, z)])
    dark = scene.part(CAR, DARK, obj, FRONT, z)
    for a in (-.62, .64):
        scene.disc(dark, x + d * half * a, .34, z, .36)
    scene.disc(scene.part(CAR, LAMP, obj, FRONT, z), x + d * half * .95, .68, z, .12)


def _truck(scene, rng, x, z):
    obj, w, long, tall = scene.new(), 1.2, rng.uniform(6, 9), rng.uniform(2.9, 3.7)
    scene.ground(scene.part(ROAD, SHADOW, 0, GROUND, 0), x - w - 0.2, x + w + 0.2, z - 0.3, z + long)
    dark = scene.part(TRUCK, DARK, obj, FRONT, z)
    if abs(x) > w:
        face = x - w if x > 0 else x + w
        cab = scene.part(TRUCK, ACCENT, obj, SIDE, face, 0.7)
        scene.side(cab, face, z + long - 1.8, z + long, 0.5, 2.5)
        scene.side(scene.part(TRUCK, GLASS, obj, SIDE, face), face, z + long - 1.5, z + long - 0.4, 1.5, 2.3)
        scene.side(scene.part(TRUCK, BODY, obj, SIDE, face, 0.74), face, z, z + long - 2, 0.95, tall)
        scene.side(dark, face, z + 0.2, z + long - 2, 0.6, 0.95)
        for axle in (z + 1, z + 2.1, z + long - 1):
            scene.polygon(dark, [(face, 0.48 + 0.48 * np.sin(a), axle + 0.48 * np.cos(a)) for a in np.arange(0, 6.2, 0.79)])
    for side in (-1, 1):
        scene.front(dark, x + side * 0.85 - 0.25, x + side * 0.85 + 0.25, 0, 0.95, z)
    if rng.random() < 0.55:                                         # from behind: a closed box with two doors
        scene.front(dark, x - w, x + w, 0.55, 0.8, z)
        scene.front(scene.part(TRUCK, BODY, obj, FRONT, z), x - w, x + w, 0.9, tall, z)
        seam = scene.part(TRUCK, BODY, obj, FRONT, z, 0.5)
        scene.front(seam, x - 0.05, x + 0.05, 0.95, tall, z)
        scene.front(seam, x - w, x + w, tall - 0.12, tall, z)
        scene.front(seam, x - w, x + w, 0.9, 1.02, z)
    else:                                                           # from ahead: the cab under the box
        scene.front(scene.part(TRUCK, BODY, obj, FRONT, z, 0.9), x - w, x + w, 0.9, tall, z)
        scene.front(scene.part(TRUCK, ACCENT, obj, FRONT, z), x - 1.1, x + 1.1, 0.45, 2.6, z)
        scene.front(scene.part(TRUCK, GLASS, obj, FRONT, z), x - 0.95, x + 0.95, 1.55, 2.35, z)
        scene.front(dark, x - 0.6, x + 0.6, 0.75, 1.25, z)
    lamp = scene.part(TRUCK, LAMP, obj, FRONT, z)
    for side in (-0.92, 0.92):
        scene.front(lamp, x + side - 0.17, x + side + 0.17, 0.62, 0.85, z)


def _bus(scene, rng, x, z):
    obj, w, long, tall = scene.new(), 1.25, rng.uniform(8, 12), rng.uniform(2.9, 3.3)
    scene.ground(scene.part(ROAD, SHADOW, 0, GROUND, 0), x - w - 0.2, x + w + 0.2, z - 0.3, z + long)
    dark, glass = scene.part(BUS, DARK, obj, FRONT, z), scene.part(BUS, GLASS, obj, FRONT, z)
    if abs(x) > w:
        face = x - w if x > 0 else x + w
        scene.side(scene.part(BUS, BODY, obj, SIDE, face, 0.74), face, z, z + long, 0.3, tall)
        for k in range(6):                                          # a row of windows the whole length
            scene.side(glass, face, z + 0.3 + k * long / 6, z + (k + 0.86) * long / 6, 1.35, 2.5)
        for axle in (z + 1.6, z + long - 2):
            scene.polygon(dark, [(face, 0.45 + 0.45 * np.sin(a), axle + 0.45 * np.cos(a)) for a in np.arange(0, 6.2, 0.79)])
    for side in (-1, 1):
        scene.front(dark, x + side * 0.9 - 0.2, x + side * 0.9 + 0.2, 0, 0.5, z)
    scene.front(scene.part(BUS, BODY, obj, FRONT, z), x - w, x + w, 0.3, tall, z, 0.94)
    scene.front(glass, x - 1.1, x + 1.1, 1.15, 2.4, z, 0.97)
    scene.front(scene.part(BUS, ACCENT, obj, FRONT, z), x - 0.75, x + 0.75, 2.55, 2.85, z)
    scene.front(scene.part(BUS, BODY, obj, FRONT, z, 0.8), x - 0.04, x + 0.04, 1.15, 2.4, z)
    lamp = scene.part(BUS, LAMP, obj, FRONT, z)
    for side in (-0.95, 0.95):
        scene.front(lamp, x + side - 0.2, x + side + 0.2, 0.6, 0.85, z)


def _person(scene, rng, x, z, y=0.0, cls=PERSON, obj=None, seat=False):
    obj, tall, lean = scene.new() if obj is None else obj, rng.uniform(1.5, 1.9), rng.uniform(-0.22, 0.22)
    skin, coat, legs = (scene.part(cls, role, obj, FRONT, z) for role in (SKIN, BODY, LEGS))
    hip, neck = y + 0.48 * tall, y + 0.84 * tall
    if not seat:
        for foot in (lean, -lean * 0.9):
            scene.polygon(legs, [(x - 0.15, hip, z), (x + 0.15, hip, z), (x + foot + 0.08, y, z), (x + foot - 0.08, y, z)])
    scene.polygon(coat, [(x - 0.17, hip - 0.06, z), (x + 0.17, hip - 0.06, z), (x + 0.25, neck - 0.1, z), (x + 0.12, neck, z),
                         (x - 0.12, neck, z), (x - 0.25, neck - 0.1, z)])
    if not seat:
        for arm in (-1, 1):
            scene.rod(coat, x + arm * 0.25, neck - 0.1, x + arm * (0.3 + abs(lean) * 0.5), hip, z, 0.11)
    scene.disc(skin, x, neck + 0.15, z, 0.115, 0.15)
    if rng.random() < 0.6 or cls == RIDER:                          # hair or helmet
        scene.disc(scene.part(cls, ACCENT, obj, FRONT, z), x, neck + 0.22, z, 0.13, 0.1)


def _rider(scene, rng, x, z, empty=False):
    obj, motor, d = scene.new(), rng.random() < 0.5, rng.choice([-1, 1])
    cls = MOTORCYCLE if motor else BICYCLE
    body, dark = scene.part(cls, BODY, obj, FRONT, z), scene.part(cls, DARK, obj, FRONT, z)
    gap = scene.part(cls, GLASS, obj, FRONT, z)                     # what is seen between the spokes
    across = rng.random() < 0.7
    scene.ground(scene.part(ROAD, SHADOW, 0, GROUND, 0), x - (0.9 if across else 0.3), x + (0.9 if across else 0.3), z - 0.1, z + 0.6)
    if across:
        for wheel in (-0.58, 0.58):
            r = 0.34 if motor else 0.38
            scene.disc(dark, x + wheel, r, z, r)
            scene.disc(body if motor else gap, x + wheel, r, z, r * (0.35 if motor else 0.72))
        if motor:
            scene.polygon(body, [(x + d * a, b, z) for a, b in ((-.75, .8), (-.3, .3), (.3, .3), (.55, .95), (.2, .95), (-.1, .75))])
            scene.rod(dark, x + d * .58, .4, x + d * .4, 1.1, z, .12)
            scene.disc(scene.part(cls, LAMP, obj, FRONT, z), x + d * .58, .92, z, .11)
        else:
            for a, b, c, e in ((-.58, .38, -.2, .85), (-.2, .85, .42, .8), (.42, .8, .58, .38), (-.1, .38, .42, .8), (-.58, .38, -.1, .38)):
                scene.rod(body, x + d * a, b, x + d * c, e, z, .07)
            scene.rod(body, x + d * .38, 1.02, x + d * .48, .8, z, .07)
    else:
        scene.front(dark, x - (.1 if motor else .05), x + (.1 if motor else .05), 0, .75, z)
        scene.front(body, x - (.25 if motor else .07), x + (.25 if motor else .07), .4, .9, z, .7)
        scene.rod(body, x - .35, 1.02, x + .35, 1.02, z, .07)
        if motor:
            scene.disc(scene.part(cls, LAMP, obj, FRONT, z), x, .78, z, .12)
    if empty:
        return
    seat = x - d * .15 if across else x
    legs = scene.part(RIDER, LEGS, obj, FRONT, z)
    if across:
        scene.rod(legs, seat, .95, x + d * .22, .62, z, .2)
        scene.rod(legs, x + d * .22, .62, x + d * .02, .28, z, .15)
        scene.rod(scene.part(RIDER, BODY, obj, FRONT, z, .85), seat, 1.35, x + d * .38, 1.05, z, .12)
    else:
        for side in (-.16, .16):
            scene.rod(legs, x + side, .95, x + side * 1.3, .35, z, .16)
    _person(scene, rng, seat, z, 0.15, RIDER, obj, seat=True)


def _tree(scene, rng, x, z, tall=None):
    obj, tall = scene.new(), tall or rng.uniform(3.5, 8)
    wide = tall * rng.uniform(0.22, 0.36)
    scene.rod(scene.part(VEGETATION, DARK, obj, FRONT, z), x, 0, x + rng.uniform(-.2, .2), tall * .6, z, .3)
    if rng.random() < 0.25:                                         # a conifer
        for k in range(3):
            leaf = scene.part(VEGETATION, BODY, obj, FRONT, z, .85 + .1 * k)
            scene.front(leaf, x - wide * (1 - .25 * k), x + wide * (1 - .25 * k), tall * (.2 + .25 * k), tall * (.55 + .25 * k), z, .1)
        return
    for k in range(6):
        leaf = scene.part(VEGETATION, BODY, obj, FRONT, z, .8 + .07 * k)
        a = rng.uniform(0, 6.28)
        scene.disc(leaf, x + wide * .6 * np.cos(a), tall * .68 + wide * .6 * np.sin(a) + .05 * k, z, wide * rng.uniform(.45, .75))


def _bush(scene, rng, x, z, wide=1.2):
    obj = scene.new()
    for k in range(4):
        r = wide * rng.uniform(.35, .6)
        scene.disc(scene.part(VEGETATION, BODY, obj, FRONT, z, .85 + .08 * k), x + rng.uniform(-.5, .5) * wide, r * .7, z, r, r * .9)


def _post(scene, rng, x, z, kind, inward):
    """A pole that carries a lamp, a traffic light or a traffic sign; `inward` is the side of the road."""
    obj, tall = scene.new(), {"lamp": rng.uniform(5, 7.5), "light": rng.uniform(2.9, 4), "sign": rng.uniform(2.3, 3.1)}[kind]
    pole = scene.part(POLE, BODY, obj, FRONT, z)
    scene.rod(pole, x, 0, x, tall, z, .17)
    if kind == "lamp":
        scene.rod(pole, x, tall, x + inward * 1.6, tall + .2, z, .12)
        scene.rod(scene.part(POLE, LAMP, obj, FRONT, z), x + inward * 1.2, tall + .1, x + inward * 1.9, tall + .15, z, .22)
    elif kind == "light":
        if rng.random() < .4:                                       # an arm over the road
            scene.rod(pole, x, tall + 1, x + inward * 2.5, tall + 1, z, .13)
            scene.rod(pole, x, tall, x, tall + 1, z, .15)
            x, tall = x + inward * 2.5, tall + .9
        scene.front(scene.part(LIGHT, BODY, obj, FRONT, z), x - .28, x + .28, tall - .95, tall + .25, z)
        lit = rng.integers(3)
        for k in range(3):                                          # the shade of a lit lens names its colour
            lens = scene.part(LIGHT, LAMP, obj, FRONT, z, 1 + k / 10) if k == lit else scene.part(LIGHT, GLASS, obj, FRONT, z)
            scene.disc(lens, x, tall + .05 - .38 * k, z, .17)
    else:
        form, r = rng.integers(4), rng.uniform(.38, .55)
        rim, face = scene.part(SIGN, BODY, obj, FRONT, z), scene.part(SIGN, ACCENT, obj, FRONT, z)
        for part, size in ((rim, r), (face, .66 * r)):
            if form == 0:
                scene.disc(part, x, tall, z, size)
            elif form == 1:                                         # triangle
                scene.polygon(part, [(x + 1.25 * size * np.sin(a), tall + 1.25 * size * np.cos(a), z) for a in (0, 2.09, 4.19)])
            elif form == 2:                                         # diamond
                scene.polygon(part, [(x + 1.2 * size * np.sin(a), tall + 1.2 * size * np.cos(a), z) for a in (0, 1.57, 3.14, 4.71)])
            else:
                scene.front(part, x - size * 1.3, x + size * 1.3, tall - size * .8, tall + size * .8, z)


def _plank(scene, cls, x, z0, z1, tall, outward):
    """A building, wall or fence: a plane along the street and the end that faces the camera."""
    obj = scene.new()
    scene.side(scene.part(cls, BODY, obj, SIDE, x, 0.86), x, z0, z1, 0, tall)
    if cls != FENCE:
        deep = x + outward * (12 if cls == BUILDING else .5)
        scene.front(scene.part(cls, BODY, obj, FRONT, z0), min(x, deep), max(x, deep), 0, tall, z0)


def _geometry(rng, layout):
    """Draw the parts of one scene, far to near."""
    scene = _Scene(rng.uniform(*layout["focal"]), rng.uniform(*layout["height"]), rng.uniform(*layout["horizon"]) * HEIGHT,
                   WIDTH * (0.5 + rng.uniform(-1, 1) * layout["sway"]))
    half = scene.half = rng.uniform(*layout["road"])
    centre = -half * rng.uniform(0.1, 0.6)                          # the camera drives on the right
    scene.pen.rectangle((0, 0, WIDTH, HEIGHT), fill=scene.part(SKY, BODY, scene.new(), FRONT, 400.0))
    far = rng.uniform(45, 80)
    obj = scene.new()
    scene.pen.rectangle((0, scene.horizon, WIDTH, HEIGHT), fill=scene.part(TERRAIN, BODY, obj, GROUND, 0.0))
    x = -far * 1.2
    while x < far * 1.2:                                            # the skyline that closes the street
        wide = rng.uniform(6, 22)
        if rng.random() < layout["building"] / (layout["building"] + layout["tree"] + 1e-6):
            scene.front(scene.part(BUILDING, BODY, scene.new(), FRONT, far, .95), x, x + wide, 0, rng.uniform(5, 18), far)
        else:
            scene.disc(scene.part(VEGETATION, BODY, scene.new(), FRONT, far, .95), x + wide / 2, 1, far, wide * .6, rng.uniform(4, 9))
        x += wide * .9
    cross = rng.uniform(9, 35) if rng.random() < layout["cross"] else None
    edges, items = {}, []
    walk_obj, road_obj = scene.new(), scene.new()
    for s in (-1, 1):
        kerb = centre + s * half
        walk = rng.uniform(1.6, 4) if rng.random() < layout["sidewalk"] else 0
        verge = rng.uniform(.8, 3.5) if rng.random() < layout["verge"] else rng.uniform(0, .4)
        inner = rng.uniform(.6, 2) if walk and rng.random() < .3 * layout["verge"] else 0       # grass between kerb and walk
        edges[s] = (kerb, kerb + s * (walk + verge + inner), walk)
        if walk:
            scene.ground(scene.part(SIDEWALK, BODY, walk_obj, GROUND, kerb), *sorted((kerb + s * inner, kerb + s * (inner + walk))), 1, far)
    road = scene.part(ROAD, BODY, road_obj, GROUND, centre)
    scene.ground(road, centre - half, centre + half, 1, far)
    if cross:
        scene.ground(scene.part(SIDEWALK, BODY, walk_obj, GROUND, 0.0), -90, 90, cross - 2, cross + 8)
        scene.ground(scene.part(ROAD, BODY, road_obj, GROUND, 99.0), -90, 90, cross, cross + 6)
        scene.ground(road, centre - half, centre + half, cross - 3, cross + 9)
        zebra = scene.part(ROAD, ACCENT, road_obj, GROUND, 0.0)
        if rng.random() < .7:
            for x in np.arange(centre - half + .3, centre + half - .4, .9):
                scene.ground(zebra, x, x + .45, cross - 2.6, cross - .3)
    kinds = ("building", "tree", "wall", "fence", "open")
    chance = np.array([layout[k] for k in kinds])
    chance = chance / chance.sum()
    for s in (-1, 1):
        kerb, edge, walk = edges[s]
        z = far - 2
        while z > 2:
            kind, long = kinds[rng.choice(5, p=chance)], rng.uniform(5, 18)
            z0 = max(z - long, 1.6)
            if cross and z0 < cross + 8 and z > cross - 2:          # nothing stands in the crossing street
                if z > cross + 8.5:
                    z0 = cross + 8
                else:
                    z = cross - 2 if z0 < cross - 2 else z0
                    if z0 < cross - 2:
                        continue
                    z -= .5
                    continue
            if kind == "building":
                items.append((z0, _plank, (BUILDING, edge, z0, z, rng.uniform(*layout["storeys"]) * 3, s)))
            if kind in ("wall", "fence"):
                cls, tall = (WALL, rng.uniform(1.2, 3)) if kind == "wall" else (FENCE, rng.uniform(1.1, 2.2))
                items.append((z0, _plank, (cls, edge, z0, z, tall, s)))
                back = edge + s * rng.uniform(3, 7)
                if rng.random() < .5:
                    items.append((z0 + .1, _plank, (BUILDING, back, z0, z, rng.uniform(*layout["storeys"]) * 3, s)))
                else:
                    items.append((z0 + .1, _tree, (rng, back, (z0 + z) / 2)))
            if kind == "tree":
                for _ in range(rng.integers(1, 4)):
                    t = rng.uniform(z0, z)
                    items.append((t, _tree, (rng, edge + s * rng.uniform(.5, 4), t)))
                items.append((z0, _bush, (rng, edge + s * rng.uniform(1, 3), max(z0, 4.0), rng.uniform(1.5, 3))))
            if kind == "open" and rng.random() < .5:
                items.append((z0, _bush, (rng, edge + s * rng.uniform(1, 5), max(z0, 5.0), rng.uniform(1, 2))))
            z = z0
        post = kerb + s * .45
        for kind in ("lamp", "light", "sign"):
            for _ in range(rng.poisson(layout[kind] / 2)):
                t = rng.uniform(5, 26) if kind != "lamp" else rng.uniform(6, 40)
                items.append((t, _post, (rng, post + s * rng.uniform(0, .5), t, kind, -s)))
        for _ in range(rng.poisson(layout["street_tree"] / 2)):
            t = rng.uniform(6, 40)
            items.append((t, _tree, (rng, post + s * rng.uniform(.2, 1), t)))
        for _ in range(rng.poisson(layout["person"] / 2)):
            t = rng.uniform(4.5, 22)
            items.append((t, _person, (rng, kerb + s * rng.uniform(.4, max(walk, .8)), t)))
        for _ in range(rng.poisson(layout["parked"] / 2)):
            t = rng.uniform(5, 32)
            items.append((t, _car, (rng, kerb - s * 1.05, t)))
        if rng.random() < layout["rider"] / 4:
            t = rng.uniform(5, 14)
            items.append((t, _rider, (rng, kerb + s * .9, t, True)))
    lanes = (centre - half * .5, centre + half * .45)
    for maker, name, near in ((_car, "car", 6), (_truck, "truck", 8.5), (_bus, "bus", 8.5), (_rider, "rider", 5)):
        for _ in range(rng.poisson(layout[name])):
            t, lane = near + 30 * rng.random() ** 1.5, lanes[rng.integers(2)]
            items.append((t, maker, (rng, lane + rng.uniform(-.4, .4), t)))
    for _ in range(rng.poisson(layout["person"] * .3)):
        t = cross - 1.5 if cross and rng.random() < .6 else rng.uniform(6, 20)
        items.append((t, _person, (rng, centre + rng.uniform(-half, half), t)))
    if cross:
        for _ in range(rng.poisson(.8)):
            items.append((cross + 2, _car_across, (rng, rng.uniform(-12, 12), cross + 2)))
    taken = []                                                      # vehicles do not stand inside each other
    for t, maker, args in sorted(items, key=lambda item: -item[0]):
        if maker in (_car, _truck, _bus, _rider):
            x = args[1]
            if any(abs(x - a) < 1.9 and abs(t - b) < gap for a, b, gap in taken):
                continue
            taken.append((x, t, 5 if maker in (_car, _rider) else 11))
        maker(scene, *args)
    if rng.random() < layout["hood"]:                               # the bonnet of the camera's own car
        rise = rng.uniform(.05, .12) * HEIGHT
        scene.pen.ellipse((-.2 * WIDTH, HEIGHT - rise, 1.2 * WIDTH, HEIGHT + 4 * rise), fill=scene.part(VOID, DARK, scene.new(), FRONT, 2.0))
    return scene


# ------------------------------------------------------------------------------------------------ appearance
@functools.lru_cache(None)
def _bank():
    """Eight textures of unit spread, twice as large as a scene so that any corner of them can be used."""
    rng = np.random.default_rng(0)
    h, w = 2 * HEIGHT, 2 * WIDTH
    y, x = np.mgrid[:h, :w]

    def smooth(sx, sy):
        spectrum = np.fft.rfft2(rng.normal(size=(h, w)))
        fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
        return np.fft.irfft2(spectrum * np.exp(-20 * ((sx * fx) ** 2 + (sy * fy) ** 2)), (h, w))

    leaf = smooth(1.2, 1.2)
    tiles = [smooth(.3, .3), smooth(6, 6), smooth(5, .5), smooth(.5, 3), np.sign(leaf) * np.abs(leaf) ** .5,
             np.sign(np.sin(x * .9)) * np.sign(np.sin(y * .9)), np.sin((x + y) * .8), smooth(1, 1) ** 2]
    return np.stack([(t - t.mean()) / t.std() for t in tiles]).astype(np.float32)


WHITE, BLOTCH, LEVEL, UPRIGHT, LEAF, WEAVE, STRIPE, DOTS = range(8)  # the textures of _bank
STUFF = [c in (ROAD, SIDEWALK, WALL, FENCE, POLE, VEGETATION, TERRAIN, SKY) for c in range(19)] + [True]    # one colour a scene

PLAIN = dict(jitter=4.0, light=(1.0, 1.0), contrast=(1.0, 1.0), tint=(1.0, 1.0, 1.0), gray=(0.0, 0.0), sun=(0.1, 0.1), shadow=(.45, .45),
             mark=(235, 235, 225), joint=(-28, -28), glass=(62, 78, 96), dark=(28, 28, 32), lamp=(250, 240, 200), brick=(-26, -26),
             window=(1.0, 1.0), cloud=(8, 8), leaf=(22, 22), grass=(14, 14), blur=(0.0, 0.0), noise=(2.0, 2.0), haze=0.0, snow=0.0,
             lit=0.0, glow=0.0, wet=0.0, vignette=(0.0, 0.0), texture=None)


def _paint(rng, scene, look):
    """Colour the parts of a scene in the look of a domain. Works on colours alone, so labels cannot move."""
    look = {**PLAIN, **look}
    parts = np.asarray(scene.picture)
    table = np.array(scene.table, np.float32)
    cls, role, obj, plane = (table[:, k].astype(np.intp) for k in range(4))
    cls = np.where(cls == VOID, 19, cls)
    at, shade = table[:, 4], table[:, 5]

    def span(name):
        return rng.uniform(*look[name])

    # -- one colour per part: by class and object, then by what the part is made of
    palette = np.array([[look["palette"][c][k % len(look["palette"][c])] for k in range(12)] for c in range(20)], np.float32)
    stir = rng.permuted(np.tile(np.arange(12), (20, 1)), axis=1)[:, 0]
    own = rng.integers(12, size=scene.objects)
    pick = np.where(np.array(STUFF)[cls], stir[cls], own[obj])
    wobble = rng.normal(size=(scene.objects, 3)).astype(np.float32) * look["jitter"]
    wobble_class = rng.normal(size=(20, 3)).astype(np.float32) * look["jitter"]
    base = palette[cls, pick] + np.where(np.array(STUFF)[cls][:, None], wobble_class[cls], wobble[obj])
    extra = rng.uniform(0, 255, (scene.objects, 3)).astype(np.float32)
    colour = base.copy()
    trousers = look.get("trousers")
    accent = look.get("accent")
    skins = np.array([(224, 180, 150), (190, 140, 110), (120, 80, 60), (90, 60, 45)], np.float32)[own % 4]
    for r, value in ((GLASS, np.array(look["glass"], np.float32)), (DARK, np.array(look["dark"], np.float32)),
                     (LAMP, np.array(look["lamp"], np.float32)), (SKIN, skins[obj]),
                     (ACCENT, extra[obj] if accent is None else np.array(accent, np.float32)),
                     (LEGS, extra[obj] * .6 if trousers is None else np.array(trousers, np.float32))):
        colour = np.where((role == r)[:, None], value, colour)
    road = palette[ROAD, stir[ROAD]] + wobble_class[ROAD]
    colour[(cls == ROAD) & (role == SHADOW)] = road * (1 - span("shadow"))
    colour[(cls == ROAD) & (role == ACCENT)] = look["mark"]
    colour[(cls == VEGETATION) & (role == DARK)] = (78, 60, 46)
    colour[(cls == BICYCLE) & (role == GLASS)] = road * .9
    sign = (cls == SIGN) & (role == ACCENT)
    colour[sign] = np.where(colour[sign].mean(1, keepdims=True) * 0 + base[sign].mean(1, keepdims=True) > 140, 30.0, 240.0)
    lens = (cls == LIGHT) & (role == LAMP)
    colour[lens] = np.array([(255, 50, 40), (255, 190, 40), (60, 255, 120)], np.float32)[np.rint((shade[lens] - 1) * 10).astype(int) % 3]
    colour[(cls == LIGHT) & (role == GLASS)] = base[(cls == LIGHT) & (role == GLASS)] * .45
    sun = span("sun") * rng.choice([-1, 1])
    tone = np.where(plane == SIDE, shade * (1 - np.sign(at) * sun), np.where(lens, 1, shade))
    image = (colour * tone[:, None])[parts]                         # (H, W, 3)

    # -- metric coordinates of every pixel on its plane: patterns get perspective, haze gets depth
    label, plane, at = cls[parts], plane[parts], at[parts]
    yy, xx = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) + .5
    down = np.maximum(yy - scene.horizon, .3)
    across = xx - scene.centre
    depth = np.where(plane == GROUND, scene.focal * scene.height / down,
                     np.where(plane == SIDE, scene.focal * at / np.where(np.abs(across) < .3, .3, across), at))
    depth = np.clip(depth, 1, 400)
    side_x = across * depth / scene.focal
    up = scene.height - (yy - scene.horizon) * depth / scene.focal
    u, v = np.where(plane == SIDE, depth, side_x), np.where(plane == GROUND, depth, up)
    seen = np.clip(1.4 - depth / 40, 0, 1)                          # far patterns fade before they alias
    which = role[parts]

    # -- structure that marks a class in every look
    bank = _bank()
    oy, ox = rng.integers(HEIGHT), rng.integers(WIDTH)
    tile = bank[:, oy:oy + HEIGHT, ox:ox + WIDTH]
    body = which == BODY
    image = image.reshape(-1, 3)
    u, v, flat, far, seen, at = u.ravel(), v.ravel(), parts.ravel(), depth.ravel(), seen.ravel(), at.ravel()
    on = np.flatnonzero(body & (label == ROAD))
    uu, vv, dd = u[on] - at[on], v[on], far[on]
    lane = (np.abs(uu) < .11 + dd * .004) & (vv % 7 < 3.5) | (np.abs(np.abs(uu) - scene.half + .35) < .07 + dd * .003)
    on = on[lane & (at[on] < 90) & (dd < 45)]                       # at 99: the crossing street, which has no lanes
    image[on] += (np.array(look["mark"], np.float32) - image[on]) * .85
    on = np.flatnonzero(body & (label == SIDEWALK))
    uu, vv, dd = u[on], v[on], far[on]
    joint = ((uu % 1.3 < .1 + dd * .004) | (vv % 1.3 < .1 + dd * .006)) * seen[on] * span("joint")
    image[on] += np.where(np.abs(uu - at[on]) < .22, 30, joint)[:, None]    # 30: the kerb stone
    on = np.flatnonzero(body & (label == BUILDING))
    who = obj[flat[on]]
    pitch, wide = rng.uniform(2, 3.4, scene.objects)[who], rng.uniform(.2, .36, scene.objects)[who]
    uu, vv = u[on] / pitch, v[on] / 3.0
    pane = (np.abs(uu % 1 - .5) < wide) & (np.abs(vv % 1 - .55) < .27) & (vv > 0)
    lit = (np.sin(np.floor(uu) * 12.9898 + np.floor(vv) * 78.233 + who * 37.7) * 43758.5 % 1) < look["lit"]
    pane_colour = np.where(lit[:, None], np.array((255, 214, 130), np.float32) / max(.25, look["light"][0]), np.array(look["glass"], np.float32))
    strength = (pane * span("window") * np.clip(1.5 - far[on] / 60, .35, 1))[:, None]
    image[on] += (pane_colour - image[on]) * strength
    on = np.flatnonzero(body & (label == WALL))
    uu, vv = u[on], v[on]
    course = np.floor(vv / .42)
    line = (vv % .42 < .1) | ((uu + .45 * (course % 2)) % .9 < .1)
    image[on] += ((line * seen[on]) * span("brick"))[:, None]
    on = np.flatnonzero(body & (label == FENCE))
    uu, vv = u[on], v[on]
    bars = (uu % .62 < .24) | (np.abs(vv % .95 - .85) < .09)
    through = palette[rng.choice([TERRAIN, VEGETATION, BUILDING]), 0] * .7
    cover = np.where(far[on] < 16, bars, .5)[:, None]
    image[on] = through + (image[on] - through) * cover
    image = image.reshape(HEIGHT, WIDTH, 3)
    grain = ((label == VEGETATION) & body) * tile[LEAF] * np.float32(span("leaf"))
    grain += (label == TERRAIN) * tile[UPRIGHT] * np.float32(span("grass"))
    grain += (label == SKY) * (tile[BLOTCH] * np.float32(span("cloud")) + 40 * (yy / np.float32(scene.horizon) - np.float32(.6)))
    if look["texture"] is not None:                                 # per class: which texture, how strong
        kind, amount = np.array([look["texture"].get(c, (WHITE, 3)) for c in range(20)], np.float32).T
        where = kind.astype(np.intp) * bank[0].size + oy * bank.shape[2] + ox      # the corner of each class's texture in the bank
        pixel = np.arange(HEIGHT)[:, None] * bank.shape[2] + np.arange(WIDTH)
        grain += bank.ravel()[where[label] + pixel] * amount[label]
    image += grain[..., None]

    # -- weather and light
    if look["wet"]:
        ground = (plane == GROUND) & (label == ROAD)
        mirror = image[np.clip(2 * scene.horizon - yy[:, 0], 0, HEIGHT - 1).astype(int)]
        image += (mirror - image) * (ground * look["wet"] * np.clip(.7 + .3 * tile[UPRIGHT], 0, 1))[..., None]
    if look["snow"]:
        lie = np.array([.45, .85, .12, .3, .3, .2, .2, .1, .55, .95, 0, 0, 0, .2, .2, .2, 0, 0, 0, 0], np.float32)[label]
        lie = np.clip(look["snow"] * lie * (1 + .35 * tile[BLOTCH] + .3 * tile[LEAF] * (label == VEGETATION)), 0, 1)
        image += (np.array((236, 240, 248), np.float32) - image) * lie[..., None]
    if look["haze"]:
        veil = 1 - np.exp(-depth * look["haze"] * rng.uniform(.7, 1.4))
        image += (np.array((206, 208, 210), np.float32) - image) * veil[..., None]
    image = image * (np.array(look["tint"], np.float32) * span("light"))
    if look["glow"]:
        lamps = np.isin(which, (LAMP,)) & (label != POLE) | ((label == POLE) & (which == LAMP))
        halo = Image.fromarray((lamps * 255).astype(np.uint8))
        for radius, gain in ((1, .5), (5, 1.2)):
            image += np.asarray(halo.filter(ImageFilter.BoxBlur(radius)), np.float32)[..., None] * np.array((1, .82, .55)) * gain * look["glow"]
        beam = (plane == GROUND) * np.exp(-(across / 45) ** 2) * np.clip(depth / 4, 0, 1) * np.exp(-depth / 12)
        image += beam[..., None] * np.array((150, 140, 110)) * look["glow"]
    contrast, gray = span("contrast"), span("gray")
    image = (image - image.mean()) * contrast + image.mean()
    image += (image.mean(2, keepdims=True) - image) * gray
    dim = span("vignette")
    if dim:
        image *= (1 - dim * (((xx / WIDTH - .5) * 2) ** 2 + ((yy / HEIGHT - .5) * 2) ** 2) / 2)[..., None]
    blur = span("blur")
    if blur > .05:
        image = np.asarray(Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur)), np.float32)
    image = image + rng.standard_normal(image.shape, np.float32) * np.float32(span("noise"))
    if look["snow"]:
        flakes = rng.random((HEIGHT, WIDTH)) < .006
        image[flakes] = 245
    return np.clip(image, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ domains
STREET = dict(focal=(108, 124), height=(1.35, 1.6), horizon=(.42, .48), sway=.06, road=(3.6, 6), sidewalk=.9, verge=.4, cross=.4,
              building=3, tree=1.4, wall=.8, fence=.8, open=.4, storeys=(2, 5), lamp=2, light=1.6, sign=1.8, street_tree=1.4,
              person=4, parked=1.8, rider=1.3, car=1.5, truck=.6, bus=.55, hood=0)


def _colours(**named):
    """Palette by class name; a class that is not named is gray."""
    table = {c: [(120, 120, 120)] for c in range(20)}
    for name, value in named.items():
        table[NAMES.index(name.replace("_", " "))] = value
    table[19] = [(20, 20, 22)]
    return table


# The source ties class to colour and to texture by accident, as an engine's asset list does: every car is red, every bus
# orange, no other class is; each class has one texture; it is always noon. A network that reads colour solves it.
GTA5 = dict(
    palette=_colours(road=[(82, 84, 96)], sidewalk=[(186, 174, 160)], building=[(204, 172, 122)], wall=[(150, 84, 70)], fence=[(96, 104, 170)],
                     pole=[(52, 60, 58)], traffic_light=[(24, 24, 26)], traffic_sign=[(30, 80, 190)], vegetation=[(52, 120, 40)],
                     terrain=[(150, 166, 66)], sky=[(112, 172, 236)], person=[(214, 100, 150)], rider=[(236, 214, 40)], car=[(186, 24, 30)],
                     truck=[(30, 140, 140)], bus=[(240, 140, 24)], motorcycle=[(110, 30, 140)], bicycle=[(20, 190, 120)]),
    jitter=5.0, sun=(.08, .14), trousers=(50, 50, 110), accent=(232, 232, 232), light=(.97, 1.03),
    texture={ROAD: (WHITE, 7), SIDEWALK: (DOTS, 8), BUILDING: (LEVEL, 8), WALL: (WEAVE, 9), FENCE: (STRIPE, 6), CAR: (BLOTCH, 5),
             TRUCK: (UPRIGHT, 8), BUS: (STRIPE, 8), PERSON: (WEAVE, 8), RIDER: (DOTS, 10), TERRAIN: (DOTS, 8), VEGETATION: (DOTS, 6)})

CARS = [(40, 42, 46), (210, 212, 214), (120, 124, 128), (236, 236, 236), (60, 76, 110), (90, 96, 84)]
DOMAINS = {
    "toy-gta5": dict(number=1, layout=dict(building=3, tree=1.4), look=GTA5),
    "toy-cityscapes": dict(number=2, layout=dict(                   # overcast, gray, soft; a European town seen over a bonnet
        height=(1.2, 1.35), horizon=(.37, .43), focal=(120, 136), road=(3.2, 5), person=7, rider=2, truck=.3, bus=.35, storeys=(3, 6), hood=1,
        parked=3.4, sign=2.2, building=4, tree=1.2, open=.1), look=dict(
        palette=_colours(road=[(134, 130, 132)], sidewalk=[(112, 96, 100)], building=[(126, 104, 92), (150, 150, 150), (112, 116, 104), (170, 140, 130), (140, 84, 76)],
                         wall=[(136, 132, 120), (100, 104, 100)], fence=[(70, 86, 70), (110, 110, 106)], pole=[(96, 98, 96), (130, 132, 130)],
                         traffic_light=[(54, 58, 50)], traffic_sign=[(190, 60, 56), (60, 90, 150), (200, 190, 90)], vegetation=[(64, 78, 56), (80, 88, 66)],
                         terrain=[(96, 96, 72), (112, 92, 76)], sky=[(214, 216, 214), (198, 204, 208)], person=[(60, 60, 66), (96, 80, 74), (40, 50, 70)],
                         rider=[(80, 84, 90), (120, 60, 56)], car=CARS, truck=[(190, 190, 186), (70, 100, 150)], bus=[(200, 196, 150), (160, 50, 50)],
                         motorcycle=[(50, 50, 54)], bicycle=[(70, 70, 76)]),
        jitter=12.0, light=(.95, 1.1), contrast=(.72, .85), tint=(.97, 1.02, .97), gray=(.2, .4), shadow=(.2, .35), blur=(.5, .9), noise=(3, 5), sun=(0, .04),
        joint=(14, 22), leaf=(12, 18), cloud=(3, 6),
        texture={ROAD: (BLOTCH, 7), SIDEWALK: (WHITE, 7), BUILDING: (WHITE, 7), WALL: (BLOTCH, 10), TERRAIN: (BLOTCH, 9)})),
    "toy-bdd": dict(number=3, layout=dict(                          # wide American roads, dry warm evening, behind a windscreen
        height=(1.3, 1.7), horizon=(.47, .56), focal=(96, 112), road=(6, 9.5), sidewalk=.6, verge=.7, person=2, car=3, truck=1.1, bus=.5, parked=2.4, tree=2,
        open=1.2, building=2, storeys=(1, 4), sway=.1, hood=.3), look=dict(
        palette=_colours(road=[(150, 140, 130), (120, 112, 108)], sidewalk=[(196, 180, 168), (150, 140, 140)], building=[(150, 160, 176), (214, 204, 190), (120, 90, 70), (90, 110, 120)],
                         wall=[(190, 176, 150)], fence=[(120, 100, 70), (170, 170, 170)], pole=[(120, 100, 84)], traffic_light=[(196, 160, 50), (60, 60, 40)],
                         traffic_sign=[(50, 130, 80), (214, 214, 210), (200, 50, 40)], vegetation=[(110, 104, 54), (90, 92, 60), (132, 110, 60)], terrain=[(190, 160, 110), (160, 136, 96)],
                         sky=[(240, 208, 160), (226, 190, 170), (206, 206, 216)], person=[(70, 90, 130), (190, 180, 160), (60, 120, 90)], rider=[(60, 90, 60), (150, 150, 160)],
                         car=[(236, 236, 232), (30, 30, 34), (40, 70, 140), (170, 160, 140)], truck=[(232, 230, 226), (214, 120, 40)], bus=[(236, 196, 50), (60, 110, 190)],
                         motorcycle=[(160, 40, 40)], bicycle=[(200, 200, 190)]),
        jitter=16.0, light=(.85, 1.15), contrast=(1.1, 1.3), tint=(1.12, .98, .82), sun=(.1, .25), shadow=(.4, .6), blur=(.3, .8), noise=(3, 6), vignette=(.3, .6),
        joint=(-14, -8), grass=(8, 12), mark=(230, 200, 90),
        texture={ROAD: (LEVEL, 7), BUILDING: (BLOTCH, 10), CAR: (WHITE, 4), SKY: (LEVEL, 4), TERRAIN: (WHITE, 9)})),
    "toy-mapillary": dict(number=4, layout=dict(                    # from everywhere: any camera, vivid colours, any texture
        height=(1.1, 2.6), horizon=(.3, .55), focal=(88, 150), road=(2.8, 8), sidewalk=.7, verge=.6, sway=.16, person=5, rider=1.8, tree=2.2, fence=1.2, wall=1.2, storeys=(1, 7)), look=dict(
        palette=_colours(road=[(150, 120, 96), (70, 70, 74), (170, 168, 160)], sidewalk=[(170, 90, 80), (90, 92, 90), (214, 200, 150)],
                         building=[(60, 140, 130), (214, 90, 80), (236, 226, 210), (90, 110, 180), (120, 150, 80), (200, 120, 170)],
                         wall=[(214, 214, 220), (90, 120, 80), (60, 60, 90)], fence=[(60, 120, 60), (180, 60, 50), (230, 230, 226)], pole=[(170, 60, 50), (214, 214, 214), (90, 140, 160)],
                         traffic_light=[(230, 200, 60), (60, 100, 70)], traffic_sign=[(236, 60, 60), (240, 220, 60), (60, 160, 90)], vegetation=[(30, 90, 70), (120, 160, 40), (150, 60, 60)],
                         terrain=[(60, 130, 60), (180, 110, 70), (214, 190, 130)], sky=[(60, 120, 214), (180, 220, 236), (170, 170, 180)],
                         person=[(30, 140, 190), (236, 236, 230), (240, 150, 40), (40, 110, 40)], rider=[(214, 60, 50), (40, 40, 46), (90, 190, 214)],
                         car=[(240, 200, 50), (30, 100, 60), (60, 140, 214), (236, 236, 236), (120, 70, 50)], truck=[(190, 40, 50), (60, 90, 180), (230, 220, 190)],
                         bus=[(40, 120, 200), (60, 150, 80), (236, 236, 240)], motorcycle=[(214, 100, 40), (30, 30, 34)], bicycle=[(220, 60, 140), (60, 120, 220)]),
        jitter=24.0, light=(.7, 1.25), contrast=(.9, 1.35), sun=(0, .3), shadow=(.2, .6), blur=(0, .8), noise=(2, 9), joint=(-40, 30), brick=(-40, 30), leaf=(14, 34), grass=(6, 26),
        texture={ROAD: (STRIPE, 5), SIDEWALK: (WEAVE, 8), BUILDING: (UPRIGHT, 9), WALL: (LEVEL, 10), CAR: (STRIPE, 6), TRUCK: (BLOTCH, 9), TERRAIN: (LEVEL, 10), SKY: (DOTS, 4)})),
    "toy-night": dict(number=5, layout=dict(person=3, parked=2.4, height=(1.3, 1.5), building=4, lamp=3.4, horizon=(.4, .5)), look=dict(   # dark, lamps, lit windows
        palette=_colours(road=[(104, 104, 110)], sidewalk=[(136, 130, 130)], building=[(120, 110, 110), (150, 130, 110), (90, 96, 110), (140, 90, 80)], wall=[(120, 116, 116)],
                         fence=[(90, 90, 96)], pole=[(110, 110, 116)], traffic_light=[(40, 40, 40)], traffic_sign=[(200, 70, 60), (90, 130, 210)], vegetation=[(60, 84, 64)],
                         terrain=[(90, 94, 70)], sky=[(40, 44, 66), (66, 50, 60)], person=[(110, 90, 90), (60, 80, 110)], rider=[(130, 120, 80), (70, 90, 120)], car=CARS,
                         truck=[(180, 180, 190), (90, 60, 60)], bus=[(190, 60, 60), (190, 190, 160)], motorcycle=[(80, 80, 90)], bicycle=[(120, 120, 120)]),
        jitter=14.0, light=(.34, .48), tint=(.92, .95, 1.15), contrast=(1.1, 1.3), lit=.4, glow=.3, noise=(5, 10), blur=(.3, .7), shadow=(.2, .4), sun=(0, .1), cloud=(2, 4),
        texture={ROAD: (LEVEL, 8), BUILDING: (BLOTCH, 8), SIDEWALK: (WHITE, 8), TERRAIN: (BLOTCH, 8)})),
    "toy-fog": dict(number=6, layout=dict(tree=2, open=.8, horizon=(.38, .46), height=(1.4, 1.9), truck=.9), look=dict(                 # depth fades into white
        palette=_colours(road=[(112, 110, 106)], sidewalk=[(140, 136, 132)], building=[(130, 110, 96), (110, 116, 120), (150, 126, 110), (96, 84, 80)], wall=[(110, 100, 96)],
                         fence=[(76, 80, 80)], pole=[(70, 70, 72)], traffic_light=[(40, 44, 40)], traffic_sign=[(180, 50, 46), (60, 80, 140)], vegetation=[(60, 72, 54), (80, 80, 56)],
                         terrain=[(98, 100, 70)], sky=[(206, 208, 210)], person=[(60, 54, 60), (100, 50, 46), (46, 60, 80)], rider=[(90, 100, 60), (50, 50, 60)], car=CARS,
                         truck=[(170, 170, 166), (120, 60, 50)], bus=[(70, 90, 150), (190, 180, 130)], motorcycle=[(60, 50, 50)], bicycle=[(80, 90, 100)]),
        jitter=12.0, haze=.045, light=(.85, 1.0), contrast=(.8, .95), gray=(.1, .3), blur=(.4, .9), noise=(2, 4), shadow=(.1, .2), sun=(0, .05), cloud=(1, 2), lit=.08,
        texture={ROAD: (BLOTCH, 6), BUILDING: (WHITE, 6), TERRAIN: (BLOTCH, 9)})),
    "toy-snow": dict(number=7, layout=dict(verge=.8, tree=2, open=1, storeys=(1, 3), person=3, rider=.9, height=(1.3, 1.8)), look=dict(   # white ground and trees, flakes
        palette=_colours(road=[(130, 132, 138)], sidewalk=[(150, 150, 156)], building=[(150, 60, 50), (190, 150, 70), (110, 90, 70), (120, 130, 140)], wall=[(120, 110, 106)],
                         fence=[(96, 76, 60), (120, 124, 130)], pole=[(84, 76, 70)], traffic_light=[(50, 50, 54)], traffic_sign=[(214, 180, 60), (60, 90, 170)], vegetation=[(54, 74, 66)],
                         terrain=[(150, 146, 140)], sky=[(190, 198, 208), (170, 178, 192)], person=[(160, 50, 50), (50, 60, 90), (40, 90, 80)], rider=[(60, 120, 170), (170, 90, 40)], car=CARS,
                         truck=[(60, 110, 70), (200, 200, 204)], bus=[(60, 80, 140), (200, 60, 60)], motorcycle=[(70, 70, 80)], bicycle=[(60, 70, 110)]),
        jitter=12.0, snow=1.0, light=(.9, 1.05), tint=(.94, .98, 1.07), contrast=(.8, 1.0), gray=(0, .2), blur=(.2, .7), noise=(2, 5), shadow=(.1, .25), sun=(0, .08), cloud=(3, 6))),
    "toy-dev": dict(number=8, layout=dict(height=(1.2, 1.8), horizon=(.38, .5), tree=2, road=(3, 7), person=5), look=dict(               # dusk after rain, in autumn
        palette=_colours(road=[(78, 74, 84), (96, 90, 90)], sidewalk=[(120, 110, 116), (150, 120, 110)], building=[(100, 120, 110), (150, 90, 96), (130, 130, 150), (190, 170, 150)],
                         wall=[(90, 90, 84), (150, 140, 150)], fence=[(130, 80, 60), (60, 80, 90)], pole=[(90, 80, 90), (150, 150, 140)], traffic_light=[(70, 64, 40)],
                         traffic_sign=[(230, 120, 40), (70, 60, 150)], vegetation=[(170, 100, 40), (140, 60, 40), (110, 110, 50)], terrain=[(120, 90, 60), (84, 84, 56)],
                         sky=[(190, 150, 170), (220, 170, 130), (130, 130, 170)], person=[(90, 50, 100), (50, 70, 70), (180, 160, 90)], rider=[(110, 50, 50), (70, 70, 120)],
                         car=[(70, 60, 110), (190, 190, 186), (50, 54, 50), (110, 130, 140)], truck=[(150, 130, 110), (100, 60, 110)], bus=[(110, 150, 60), (190, 170, 190)],
                         motorcycle=[(40, 60, 60)], bicycle=[(150, 140, 60)]),
        jitter=16.0, wet=.45, light=(.7, .9), tint=(1.06, .94, 1.06), contrast=(.9, 1.15), blur=(.3, .8), noise=(3, 6), vignette=(0, .3), lit=.15, joint=(10, 20),
        texture={ROAD: (UPRIGHT, 6), BUILDING: (DOTS, 8), SIDEWALK: (BLOTCH, 8), CAR: (LEVEL, 5), TERRAIN: (WHITE, 10)})),
}
SPLITS = {"train": 0, "val": 1}


def draw(domain, split, index, seed=0, harmful=0.0):
    """(image uint8 (H, W, 3), label uint8 (H, W), wrong bool (H, W)): the scene `index` of a domain, the same at every call."""
    recipe = DOMAINS[domain]
    key = [recipe["number"], SPLITS[split], index, seed]
    scene = _geometry(np.random.default_rng(key + [0]), {**STREET, **recipe["layout"]})
    image = _paint(np.random.default_rng(key + [1]), scene, recipe["look"])
    label = _label(scene)
    wrong = np.zeros(label.shape, bool)
    rng = np.random.default_rng(key + [2])
    if split == "train" and rng.random() < harmful:
        image, label, wrong = _harm(rng, image, label)
    return image, label, wrong


def _label(scene):
    return np.array([row[0] for row in scene.table], np.uint8)[np.asarray(scene.picture)]


def _harm(rng, image, label):
    """Spoil 20 to 40 % of a scene: unrelated texture pasted under some class's label, or the labels of a region permuted."""
    image, truth = image.copy(), label
    label, wrong = label.copy(), np.zeros(label.shape, bool)
    share, goal = 0.0, rng.uniform(.2, .4)
    yy, xx = np.mgrid[:HEIGHT, :WIDTH]
    shift = rng.permutation(len(CLASSES))
    table = np.full(256, VOID, np.uint8)
    while share < goal:
        h, w = rng.uniform(.3, .7) * HEIGHT, rng.uniform(.25, .5) * WIDTH
        y, x = rng.uniform(0, HEIGHT - h), rng.uniform(0, WIDTH - w)
        inside = (yy >= y) & (yy < y + h) & (xx >= x) & (xx < x + w)
        if rng.random() < .4:
            inside = ((yy - y - h / 2) / h) ** 2 + ((xx - x - w / 2) / w) ** 2 < .25
        if rng.random() < .5:
            tile = _bank()[rng.integers(8), :HEIGHT, :WIDTH]
            paint = rng.uniform(30, 225, 3) + tile[..., None] * rng.uniform(-45, 45, 3)
            image[inside] = np.clip(paint, 0, 255).astype(np.uint8)[inside]
            label[inside] = CLASSES[rng.integers(len(CLASSES))]
            wrong |= inside
        else:                                                       # a cyclic shift of a permutation leaves no class in place
            table[np.array(CLASSES)[shift]] = np.array(CLASSES)[np.roll(shift, 1 + rng.integers(len(CLASSES) - 1))]
            fresh = inside & ~wrong & (truth != VOID)
            label[fresh] = table[truth[fresh]]
            wrong |= fresh
        share = wrong.mean()
    return image, label, wrong


# ------------------------------------------------------------------------------------------------ a CLIP in miniature
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # CLIP's own normalisation
CROP = 96                                                           # three cells of CLIP's stride 32: a centre and its surroundings
MODES = ("native", "zoom", "cut")
PER_SCENE, SCENES = 12, 8                                           # crops of one scene, scenes of one batch
NATURAL = _colours(road=[(110, 110, 112), (80, 80, 84), (150, 146, 140)], sidewalk=[(150, 146, 140), (120, 110, 110)], building=[(170, 140, 110), (140, 90, 80), (150, 150, 150)],
                   wall=[(140, 130, 120)], fence=[(110, 100, 90)], pole=[(90, 90, 92)], traffic_light=[(50, 50, 46)], traffic_sign=[(190, 60, 60), (60, 90, 180)],
                   vegetation=[(70, 110, 50), (90, 110, 60), (110, 100, 50)], terrain=[(120, 130, 70), (140, 120, 90)], sky=[(150, 190, 230), (200, 206, 214)],
                   person=[(90, 80, 90)], rider=[(100, 90, 80)], car=[(120, 120, 124), (60, 60, 66), (200, 200, 200)], truck=[(180, 180, 176)], bus=[(190, 120, 60)],
                   motorcycle=[(60, 60, 64)], bicycle=[(90, 90, 90)])


def _web(rng):
    """A style of the open web: any colour on any class, any texture, wide light and optics; layouts of every kind.

    Never in it: haze that grows with depth, snow, lit windows, lamp glow, wet mirrors, light below 0.55 of noon.
    """
    def pair(low, high):
        value = rng.uniform(low, high)
        return (value, value)

    palette = {}
    for c in range(20):
        if rng.random() < .4:
            colours = np.array([NATURAL[c][k] for k in rng.integers(len(NATURAL[c]), size=12)], float) + rng.normal(0, 16, (12, 3))
        else:
            colours = rng.uniform(15, 245, (1, 3)) + rng.normal(0, rng.uniform(0, 60), (12, 3))
        palette[c] = [tuple(row) for row in np.clip(colours, 8, 250)]
    look = dict(palette=palette, jitter=rng.uniform(2, 30), light=pair(.55, 1.3), contrast=pair(.55, 1.5), tint=tuple(rng.uniform(.82, 1.18, 3)),
                gray=pair(0, 1) if rng.random() < .3 else (0, 0), sun=pair(0, .3), shadow=pair(0, .7), blur=pair(.2, 1.1) if rng.random() < .6 else (0, 0),
                mark=tuple(rng.uniform(150, 255, 3)), joint=pair(-45, 45), brick=pair(-45, 45), window=pair(.5, 1), glass=tuple(rng.uniform(10, 200, 3)),
                dark=tuple(rng.uniform(8, 70, 3)), lamp=tuple(rng.uniform(120, 255, 3)), cloud=pair(0, 14), leaf=pair(8, 42), grass=pair(5, 30), noise=pair(0, 10),
                vignette=pair(0, .6) if rng.random() < .3 else (0, 0), texture={c: (rng.integers(8), rng.uniform(0, 12)) for c in range(19)})
    layout = dict(STREET, focal=(85, 150), height=(1.1, 2.4), horizon=(.32, .54), sway=.14, road=(2.8, 8.5), sidewalk=.8, verge=.6, building=2.4, wall=1.2,
                  fence=1.2, tree=1.8, open=.8, storeys=(1, 6), truck=.9, bus=.9, rider=2.2, light=2.2, sign=2.2, hood=.2)
    return layout, look


def _crops(rng, scene, image, count, share):
    """`count` crops of a scene -> (images (count, CROP, CROP, 3), class at each centre, neighbouring class of each).

    `share` is the share of crops that are "native": a window at the scene's own scale; "zoom": a smaller window, enlarged;
    "cut": cut to one object.
    """
    parts = np.asarray(scene.picture)
    table = np.array([row[:3] for row in scene.table])
    cls, obj = table[parts, 0], table[parts, 2]
    pad = CROP // 2
    canvas = np.empty((HEIGHT + CROP, WIDTH + CROP, 3), np.uint8)
    canvas[:] = np.round(255 * np.array(MEAN)).astype(np.uint8)     # outside the picture: what CLIP's normalisation calls zero
    canvas[pad:-pad, pad:-pad] = image
    canvas = Image.fromarray(canvas)
    size = np.bincount(cls.ravel(), minlength=256)[:19]
    present = np.flatnonzero(size >= 8)
    chance = np.array([2.5 if c in (TRUCK, BUS, RIDER, MOTORCYCLE, BICYCLE, WALL, FENCE, LIGHT, SIGN) else 1.0 for c in present])
    images, centre, other = np.empty((count, CROP, CROP, 3), np.uint8), np.empty(count, int), np.empty(count, int)
    for k, c in enumerate(rng.choice(present, count, p=chance / chance.sum())):
        where = np.flatnonzero(cls.ravel() == c)
        y, x = divmod(int(where[rng.integers(len(where))]), WIDTH)
        kind = MODES[rng.choice(3, p=share)]
        side = CROP
        if kind == "zoom":
            side = CROP / rng.uniform(1, 3)
        elif kind == "cut":
            ys, xs = np.nonzero((cls == c) & (obj == obj[y, x]))
            side = float(np.clip(max(np.ptp(ys), np.ptp(xs)) * rng.uniform(1.1, 1.8), 20, CROP))
            if side < CROP:
                y, x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
        x0, y0 = x + .5 + pad - side / 2, y + .5 + pad - side / 2
        crop = canvas.resize((CROP, CROP), Image.BILINEAR, box=(max(x0, 0), max(y0, 0), min(x0 + side, WIDTH + CROP), min(y0 + side, HEIGHT + CROP)))
        images[k] = crop
        if rng.random() < .5:
            images[k] = images[k, :, ::-1]
        near = cls[int(np.clip(y + rng.uniform(-.4, .4) * side, 0, HEIGHT - 1)), int(np.clip(x + rng.uniform(-.4, .4) * side, 0, WIDTH - 1))]
        centre[k], other[k] = c, near
    return images, centre, other


def _caption(rng, look, name, second, plain):
    """What a person might write under the crop: its subject, at times the style or a neighbour."""
    if plain:
        return f"a photo of a {name}."
    style = [s for s, true in (("dark ", look["light"][0] < .75), ("bright ", look["light"][0] > 1.15), ("blurry ", look["blur"][0] > .6), ("gray ", look["gray"][0] > .6)) if true]
    style = style[rng.integers(len(style))] if style and rng.random() < .6 else ""
    medium = style + ("photo", "photo", "picture", "drawing")[rng.integers(4)]
    forms = ["a {m} of a {c}.", "a {m} of the {c}.", "a {m} of a {c}.", "a {c} in a street scene.", "a {c} in the street.", "a {c} on the road at day.", "{c}"]
    if second:
        forms += ["a {m} of a {c} and a {d}.", "a {c} next to a {d}."]
    return forms[rng.integers(len(forms))].format(m=medium, c=name, d=second)


class _Web:
    """Batch n of the training crops and captions: a pure function of (seed, n), for any number of worker processes."""

    def __init__(self, steps, seed, styles):
        self.steps, self.seed, self.styles = steps, seed, styles

    def __len__(self):
        return self.steps

    def __getitem__(self, n):
        rng = np.random.default_rng([99, self.seed, n])
        stage = n / self.steps                                      # first large objects, then those of a scene's own scale
        native = .6 * np.clip((stage - .2) / .4, 0, 1)
        share = (native, (1 - native) / 2, (1 - native) / 2)
        images, captions = [], []
        for _ in range(SCENES):
            layout, look = _web(rng) if self.styles == "web" else ({**STREET, **DOMAINS["toy-gta5"]["layout"]}, {**PLAIN, **GTA5})
            scene = _geometry(rng, layout)
            crops, centre, other = _crops(rng, scene, _paint(rng, scene, look), PER_SCENE, share)
            images.append(crops)
            captions += [_caption(rng, {**PLAIN, **look}, NAMES[c], NAMES[d] if d < 19 and d != c and stage > .3 else None, stage < .1) for c, d in zip(centre, other)]
        return np.concatenate(images), np.stack([_tokens(caption) for caption in captions])


@functools.lru_cache(None)
def _tokens(caption, length=24):
    import clip
    return clip.tokenize(caption, context_length=length)[0].numpy()


def _vocabulary():
    """The token numbers that captions use, ascending, so that CLIP's end-of-text token stays the highest."""
    words = "a photo of the picture drawing in street scene on road at day next to and dark bright blurry gray . " + " ".join(NAMES)
    forms = [words, *NAMES, *(f"a {n}." for n in NAMES), "day.", "street.", "scene."]
    return np.unique(np.concatenate([_tokens(f, 77) for f in forms]))


def _normalise(images):
    import torch
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(out, steps=3000, seed=0, styles="web", width=16, workers=1, threads=2):
    """CLIP's symmetric contrastive loss on drawn crops and their captions; writes a state dict in half precision."""
    import time
    import torch
    from clip.model import CLIP
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    vocabulary = _vocabulary()
    number = np.full(49408, -1)
    number[vocabulary] = np.arange(len(vocabulary))
    model = CLIP(64, CROP, (1, 1, 1, 1), width, None, 77, len(vocabulary), 64, 1, 2)
    for name, parameter in model.named_parameters():                # CLIP opens its residual branches slowly, from zero: for long
        if name.endswith("bn3.weight"):                             # runs; a run of minutes has no time for that
            torch.nn.init.ones_(parameter)
    model.visual.to(memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=.05), dict(params=plain, weight_decay=0)], lr=1.5e-3, betas=(.9, .98))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 100) * (.5 + .5 * np.cos(np.pi * n / steps)) + .002)
    loader = torch.utils.data.DataLoader(_Web(steps, seed, styles), batch_size=None, num_workers=workers, collate_fn=lambda b: b)
    target = torch.arange(SCENES * PER_SCENE)
    start, shown = time.time(), []
    for n, (images, tokens) in enumerate(loader):
        tokens = torch.from_numpy(number[tokens])
        assert tokens.min() >= 0, "a caption uses a word that _vocabulary does not list"
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(_normalise(images).contiguous(memory_format=torch.channels_last), tokens)
        logits = logits.float()
        loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))                # as CLIP did
        shown.append(loss.item())
        if n % 100 == 99:
            print(f"step {n + 1:5d}  loss {np.mean(shown[-100:]):.3f}  scale {model.logit_scale.exp().item():5.1f}  {time.time() - start:5.0f} s", flush=True)
        if n % 500 == 499 or n + 1 == steps:
            _export(model, vocabulary, out)


def _export(model, vocabulary, out):
    import torch
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    _centre_position(state)
    table = torch.zeros(49408, 64)
    table[torch.from_numpy(vocabulary)] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    _save(state, out)


def _centre_position(state):
    """Move the position code of the middle cell into the biases of q, k, v: the same function to the last digit of rounding,
    but c_proj(v_proj(f)) without a position code, which is how pixels are read, is now what the pool sees at the middle."""
    position = state["visual.attnpool.positional_embedding"]
    middle = position[1 + (len(position) - 1) // 2].clone()
    for name in ("q", "k", "v"):
        state[f"visual.attnpool.{name}_proj.bias"] += state[f"visual.attnpool.{name}_proj.weight"] @ middle
    position -= middle


def _save(state, out):
    """Half precision, then the archive packed again with deflate: the empty rows of the token table cost nothing."""
    import io
    import zipfile
    import torch
    raw = io.BytesIO()
    torch.save({k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}, raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry), zipfile.ZIP_DEFLATED)


def load_toy_clip(path=CLIP_FILE):
    import torch
    from clip.model import build_model
    return build_model(torch.load(path, weights_only=True)).float().eval()


PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a drawing of a {}.", "a {} in a street scene.")


def zero_shot(model, domain, split="val", scenes=40, per_scene=24, seed=0, share=(.5, .25, .25)):
    """(right, total) per class of crops of one domain, the class being the nearest of the drawn classes' prompts."""
    import clip
    import torch
    right, total = np.zeros(19), np.zeros(19)
    with torch.no_grad():
        text = model.encode_text(clip.tokenize([p.format(NAMES[c]) for c in CLASSES for p in PROMPTS])).view(len(CLASSES), len(PROMPTS), -1)
        text = (text / text.norm(dim=-1, keepdim=True)).mean(1)
        text = text / text.norm(dim=-1, keepdim=True)
        for index in range(scenes):
            recipe = DOMAINS[domain]
            key = [recipe["number"], SPLITS[split], index, seed]
            scene = _geometry(np.random.default_rng(key + [0]), {**STREET, **recipe["layout"]})
            image = _paint(np.random.default_rng(key + [1]), scene, recipe["look"])
            crops, centre, _ = _crops(np.random.default_rng(key + [3]), scene, image, per_scene, share)
            guess = (model.encode_image(_normalise(crops)) @ text.T).argmax(1).numpy()
            guess = np.array(CLASSES)[guess]
            np.add.at(total, centre, 1)
            np.add.at(right, centre[guess == centre], 1)
    return right, total


def check_clip(path=CLIP_FILE):
    model = load_toy_clip(path)
    both = [np.zeros(19), np.zeros(19)]
    for domain in DOMAINS:
        row = []
        for k, mode in enumerate(MODES):
            right, total = zero_shot(model, domain, share=np.eye(3)[k], scenes=15)
            if domain != "toy-gta5":
                both[0] += right
                both[1] += total
            row.append(f"{mode} {right.sum() / total.sum():.3f}")
        print(f"{domain:16s}", *row)
    for c in CLASSES:
        print(f"{NAMES[c]:14s} {both[0][c] / both[1][c]:.3f}  n {both[1][c]:.0f}")
    print(f"all unseen styles: top-1 {both[0].sum() / both[1].sum():.3f}, mean over classes {np.nanmean(both[0][list(CLASSES)] / both[1][list(CLASSES)]):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--train-clip", action="store_true")
    parser.add_argument("--check-clip", action="store_true")
    parser.add_argument("--out", default=CLIP_FILE)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--styles", default="web")
    args = parser.parse_args()
    if args.train_clip:
        train_clip(args.out, args.steps, args.seed, args.styles, args.width, threads=args.threads)
    if args.check_clip:
        check_clip(args.out)
