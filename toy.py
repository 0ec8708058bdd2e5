"""toy.py: a drawn street world in several domains, and a CLIP in miniature that has seen more styles than the source.

The method needs a source, targets that differ from it, and a CLIP. Real ones are 25 GB and hours of a GPU; this file
draws them. A scene is drawn in two passes that share nothing but a map of parts:

    geometry     a street in perspective, far things first -> for each pixel the number of a part, and for each part its
                 class, its material, its object and the plane that it lies in. The label is a look-up in this map.
    appearance   a domain's look: colours per class, texture, weather, light, lens. It never moves a pixel, so labels
                 are exact under every look, and one geometry can be seen in all: draw(..., look="toy-night").

What makes it a domain gap. In the source `toy-gta5` class and appearance are tied by accident, as in an engine's list
of assets: every car is red and no other class is, every class has one texture, it is always a clear noon. Colour alone
then nearly solves the source (run the demonstration), and a network that leans on it fails elsewhere. What holds in
every domain is structure: windows in rows, bars, slabs and lanes in perspective, wheels, leaves, place in the scene.

    domain           light and weather              camera and layout                   what it is for
    toy-gta5         clear noon                     -                                   the source
    toy-cityscapes   overcast, gray, soft           low, narrow lens, bonnet, people    unseen target
    toy-bdd          warm evening, windscreen       wide roads, trucks, few walks       unseen target
    toy-mapillary    any, vivid                     any camera, any texture             unseen target
    toy-night        dark, lamps, lit windows       dense town                          unseen target
    toy-fog          haze that grows with depth     trees, trucks                       unseen target
    toy-snow         snow on ground and trees       low houses, open                    unseen target
    toy-dev          a weather for each scene       any camera                          settings are chosen on it

Harmful source data: in a share of the training scenes, a quarter to almost half of the pixels get unrelated texture under some
class's label, or another class's label. `wrong` marks them, for analysis only.

The CLIP in miniature is clip.model.CLIP, trained with CLIP's symmetric contrastive loss on crops and captions ("a dark
photo of a bus."), never on label maps: of a crop it knows what its caption says, the class of the thing at its middle.
It saw random styles (_web): in each picture three classes in four near colours that such things often have, the others
in any colour; any texture, sun, shadow, contrast, tint, blur, noise, vignette, some gray; light from 0.55 to 1.3 of
noon; layouts and cameras of a wide range, which holds most of those of the domains. It never saw a named domain's palette or
look, haze that grows with depth, snow, lit windows, lamp glow, wet mirrors, nor light below 0.55. With --styles source
it sees the source's look alone: the control that tells what the wide styles are worth.

Shapes
    image    (H, W, 3) uint8     label    (H, W) uint8: train ids, 255 = void     wrong    (H, W) bool

Not here: the table of data sets (data.py), the real CLIP's loading (model.py), prompts for the method (prototypes.py).
Run `python toy.py` for a demonstration in seconds, with --gallery FILE.png for a picture of all domains, --check-clip
for the zero-shot figures, --train-clip to make toy_clip.pt again.
"""

import argparse
import functools
import os
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFilter  # torch and clip are imported where they are used: drawing needs neither

HEIGHT, WIDTH = 96, 192
VOID = 255
CLIP_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy_clip.pt")
NAMES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
         "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS,
 TRAIN, MOTORCYCLE, BICYCLE) = range(19)
CLASSES = tuple(c for c in range(19) if c != TRAIN)  # drawn: all but the train
BODY, GLASS, DARK, LAMP, ACCENT, SKIN, LEGS, SHADOW = range(8)  # the material of a part
GROUND, SIDE, FRONT = range(3)  # the plane of a part: y = 0, x = at, z = at


# ------------------------------------------------------------------------------------------------------- geometry


class _Scene:
    """A map of part numbers and, for each part, a row (class, material, object, plane, where the plane is, shade).

    Metres, with x to the right of the camera, y up from the ground and z ahead. Drawing part numbers instead of colours
    gives image and label from one set of polygons.
    """

    def __init__(self, focal, height, horizon, centre):
        self.focal, self.height, self.horizon, self.centre = focal, height, horizon, centre
        self.picture = Image.new("I", (WIDTH, HEIGHT))
        self.pen = ImageDraw.Draw(self.picture)
        self.table, self.objects = [], 0

    def new(self):
        self.objects += 1
        return self.objects - 1

    def part(self, cls, material, obj, plane, at, shade=1.0):
        self.table.append((cls, material, obj, plane, at, shade))
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

    def pair(self, part, x, apart, half, y0, y1, z):
        for side in (-apart, apart):
            self.front(part, x + side - half, x + side + half, y0, y1, z)

    def side(self, part, x, z0, z1, y0, y1, taper=0.0):
        self.polygon(part, [(x, y0, z0), (x, y0, z1), (x, y1, z1 - taper), (x, y1, z0 + taper)])

    def wheels(self, part, x, r, *axles):
        for z in axles:
            self.polygon(part, [(x, r + r * np.sin(a), z + r * np.cos(a)) for a in np.arange(0, 6.2, 0.79)])

    def disc(self, part, x, y, z, rx, ry=None):
        (px, py), k = self.point(x, y, z), self.focal / z
        ax, ay = max(rx * k, 0.6), max((ry or rx) * k, 0.6)
        self.pen.ellipse((px - ax, py - ay, px + ax, py + ay), fill=part)

    def rod(self, part, x0, y0, x1, y1, z, width):
        self.pen.line((self.point(x0, y0, z), self.point(x1, y1, z)), fill=part,
                      width=max(1, round(width * self.focal / z)))

    def materials(self, cls, obj, z):
        """part(material, shade) for an object that faces the camera at depth z."""
        return lambda material, shade=1.0: self.part(cls, material, obj, FRONT, z, shade)

    def shadow(self, x0, x1, z0, z1):
        self.ground(self.part(ROAD, SHADOW, 0, GROUND, 0), x0, x1, z0, z1)


def _car(scene, rng, x, z):
    obj, w, long, tall = scene.new(), rng.uniform(0.82, 0.98), rng.uniform(3.6, 4.6), rng.uniform(1.35, 1.75)
    belt, part = 0.58 * tall, scene.materials(CAR, obj, z)
    scene.shadow(x - w - 0.15, x + w + 0.15, z - 0.2, z + long)
    dark, glass, lamp = part(DARK), part(GLASS), part(LAMP)
    if abs(x) > w:  # beside the camera's path: one flank is seen
        flank = x - w if x > 0 else x + w
        scene.side(scene.part(CAR, BODY, obj, SIDE, flank, 0.72), flank, z, z + long, 0.28, belt)
        scene.side(scene.part(CAR, BODY, obj, SIDE, flank, 0.66), flank, z + 0.3, z + long - 0.9, belt, tall, 0.45)
        scene.side(glass, flank, z + 0.6, z + long - 1.2, belt + 0.05, tall - 0.12, 0.35)
        scene.wheels(dark, flank, .34, z + 0.75, z + long - 0.8)
    scene.pair(dark, x, w - .16, .14, 0, .4, z)
    scene.front(part(BODY), x - w, x + w, 0.25, belt, z)
    scene.front(part(BODY, 1.08), x - w, x + w, belt, tall, z, 0.74)
    scene.front(glass, x - 0.84 * w, x + 0.84 * w, belt + 0.02, tall - 0.13, z, 0.82)
    scene.pair(lamp, x, .8 * w, .17, .58, .76, z)
    scene.front(part(ACCENT), x - 0.28, x + 0.28, 0.36, 0.5, z)


def _car_across(scene, rng, x, z):
    """A car on the crossing street, seen from its side."""
    obj, half, tall, d = scene.new(), rng.uniform(1.8, 2.2), rng.uniform(1.35, 1.6), rng.choice([-1, 1])
    part, d = scene.materials(CAR, obj, z), d * half
    scene.shadow(x - half, x + half, z - 0.2, z + 1.6)
    outline = [(-1, .3), (1, .3), (1, .75), (.62, .86), (.3, tall), (-.5, tall), (-.85, .9), (-1, .85)]
    scene.polygon(part(BODY, 0.9), [(x + d * a, b, z) for a, b in outline])
    glass, dark = part(GLASS), part(DARK)
    for a, b, c, e in ((.5, -.06, -.06, .26), (-.72, -.14, -.14, -.47)):
        pane = [(a, .9), (b, .9), (c, tall - .1), (e, tall - .1)]
        scene.polygon(glass, [(x + d * s, y, z) for s, y in pane])
    for a in (-.62, .64):
        scene.disc(dark, x + d * a, .34, z, .36)
    scene.disc(part(LAMP), x + d * .95, .68, z, .12)


def _truck(scene, rng, x, z):
    """Told from a bus by its closed box on a dark frame, and by its cab."""
    obj, w, long, tall = scene.new(), 1.2, rng.uniform(6, 9), rng.uniform(2.9, 3.7)
    part = scene.materials(TRUCK, obj, z)
    scene.shadow(x - w - 0.2, x + w + 0.2, z - 0.3, z + long)
    dark = part(DARK)
    if abs(x) > w:
        flank, end = x - w if x > 0 else x + w, z + long
        scene.side(scene.part(TRUCK, ACCENT, obj, SIDE, flank, 0.7), flank, end - 1.8, end, 0.5, 2.5)
        scene.side(scene.part(TRUCK, GLASS, obj, SIDE, flank), flank, end - 1.5, end - 0.4, 1.5, 2.3)
        scene.side(scene.part(TRUCK, BODY, obj, SIDE, flank, 0.74), flank, z, end - 2, 0.95, tall)
        scene.side(dark, flank, z + 0.2, end - 2, 0.6, 0.95)
        scene.wheels(dark, flank, .48, z + 1, z + 2.1, end - 1)
    scene.pair(dark, x, .85, .25, 0, .95, z)
    if rng.random() < 0.55:  # from behind: a closed box with two doors
        body, seam = part(BODY), part(BODY, 0.5)
        scene.front(dark, x - w, x + w, 0.55, 0.8, z)
        scene.front(body, x - w, x + w, 0.9, tall, z)
        scene.front(seam, x - 0.05, x + 0.05, 0.95, tall, z)
        scene.front(seam, x - w, x + w, tall - 0.12, tall, z)
        scene.front(seam, x - w, x + w, 0.9, 1.02, z)
    else:  # from ahead: the cab before the box
        scene.front(part(BODY, 0.9), x - w, x + w, 0.9, tall, z)
        scene.front(part(ACCENT), x - 1.1, x + 1.1, 0.45, 2.6, z)
        scene.front(part(GLASS), x - 0.95, x + 0.95, 1.55, 2.35, z)
        scene.front(dark, x - 0.6, x + 0.6, 0.75, 1.25, z)
    scene.pair(part(LAMP), x, .92, .17, .62, .85, z)


def _bus(scene, rng, x, z):
    """Told from a truck by its windows: a row along the flank, a wide screen in front."""
    obj, w, long, tall = scene.new(), 1.25, rng.uniform(8, 12), rng.uniform(2.9, 3.3)
    part = scene.materials(BUS, obj, z)
    scene.shadow(x - w - 0.2, x + w + 0.2, z - 0.3, z + long)
    dark, glass = part(DARK), part(GLASS)
    if abs(x) > w:
        flank = x - w if x > 0 else x + w
        scene.side(scene.part(BUS, BODY, obj, SIDE, flank, 0.74), flank, z, z + long, 0.3, tall)
        for k in range(6):
            scene.side(glass, flank, z + 0.3 + k * long / 6, z + (k + 0.86) * long / 6, 1.35, 2.5)
        scene.wheels(dark, flank, .45, z + 1.6, z + long - 2)
    scene.pair(dark, x, .9, .2, 0, .5, z)
    scene.front(part(BODY, 0.94), x - w, x + w, 0.3, tall, z)
    scene.front(glass, x - 1.1, x + 1.1, 1.15, 2.4, z, 0.97)
    scene.front(part(ACCENT), x - 0.75, x + 0.75, 2.55, 2.85, z)
    scene.front(part(BODY, 0.8), x - 0.04, x + 0.04, 1.15, 2.4, z)
    scene.pair(part(LAMP), x, .95, .2, .6, .85, z)


def _person(scene, rng, x, z, y=0.0, cls=PERSON, obj=None):
    """A walker, or with cls=RIDER what sits on a two-wheeler: that one's legs are drawn there."""
    obj, tall, lean = scene.new() if obj is None else obj, rng.uniform(1.5, 1.9), rng.uniform(-0.22, 0.22)
    part, hip, neck = scene.materials(cls, obj, z), y + 0.48 * tall, y + 0.84 * tall
    skin, coat, legs = part(SKIN), part(BODY), part(LEGS)
    walks = cls == PERSON
    for foot in (lean, -lean * 0.9) if walks else ():
        scene.polygon(legs, [(x - .15, hip, z), (x + .15, hip, z), (x + foot + .08, y, z), (x + foot - .08, y, z)])
    torso = [(-.17, hip - .06), (.17, hip - .06), (.25, neck - .1), (.12, neck), (-.12, neck), (-.25, neck - .1)]
    scene.polygon(coat, [(x + a, b, z) for a, b in torso])
    for arm in (-1, 1) if walks else ():
        scene.rod(coat, x + arm * 0.25, neck - 0.1, x + arm * (0.3 + abs(lean) * 0.5), hip, z, 0.11)
    scene.disc(skin, x, neck + 0.15, z, 0.115, 0.15)
    if rng.random() < 0.6 or not walks:  # hair or helmet
        scene.disc(part(ACCENT), x, neck + 0.22, z, 0.13, 0.1)


def _rider(scene, rng, x, z, empty=False):
    """A motorcycle or a bicycle, across the view or along it, with its rider or parked."""
    obj, motor, d = scene.new(), rng.random() < 0.5, rng.choice([-1, 1])
    part, across = scene.materials(MOTORCYCLE if motor else BICYCLE, obj, z), rng.random() < 0.7
    body, dark, spokes = part(BODY), part(DARK), part(GLASS)
    scene.shadow(x - (0.9 if across else 0.3), x + (0.9 if across else 0.3), z - 0.1, z + 0.6)
    if across:
        for wheel in (-0.58, 0.58):
            r = 0.34 if motor else 0.38
            scene.disc(dark, x + wheel, r, z, r)
            scene.disc(body if motor else spokes, x + wheel, r, z, r * (0.35 if motor else 0.72))
    if across and motor:
        trunk = ((-.75, .8), (-.3, .3), (.3, .3), (.55, .95), (.2, .95), (-.1, .75))
        scene.polygon(body, [(x + d * a, b, z) for a, b in trunk])
        scene.rod(dark, x + d * .58, .4, x + d * .4, 1.1, z, .12)
        scene.disc(part(LAMP), x + d * .58, .92, z, .11)
    elif across:
        for a, b, c, e in ((-.58, .38, -.2, .85), (-.2, .85, .42, .8), (.42, .8, .58, .38), (-.1, .38, .42, .8),
                           (-.58, .38, -.1, .38), (.38, 1.02, .48, .8)):
            scene.rod(body, x + d * a, b, x + d * c, e, z, .07)
    else:
        scene.front(dark, x - (.1 if motor else .05), x + (.1 if motor else .05), 0, .75, z)
        scene.front(body, x - (.25 if motor else .07), x + (.25 if motor else .07), .4, .9, z, .7)
        scene.rod(body, x - .35, 1.02, x + .35, 1.02, z, .07)
        if motor:
            scene.disc(part(LAMP), x, .78, z, .12)
    if empty:
        return
    seat, worn = x - d * .15 if across else x, scene.materials(RIDER, obj, z)
    legs = worn(LEGS)
    if across:
        scene.rod(legs, seat, .95, x + d * .22, .62, z, .2)
        scene.rod(legs, x + d * .22, .62, x + d * .02, .28, z, .15)
        scene.rod(worn(BODY, .85), seat, 1.35, x + d * .38, 1.05, z, .12)
    else:
        for side in (-.16, .16):
            scene.rod(legs, x + side, .95, x + side * 1.3, .35, z, .16)
    _person(scene, rng, seat, z, 0.15, RIDER, obj)


def _tree(scene, rng, x, z):
    obj, tall = scene.new(), rng.uniform(3.5, 8)
    part, wide = scene.materials(VEGETATION, obj, z), tall * rng.uniform(0.22, 0.36)
    scene.rod(part(DARK), x, 0, x + rng.uniform(-.2, .2), tall * .6, z, .3)
    if rng.random() < 0.25:  # a conifer
        for k in range(3):
            half, low = wide * (1 - .25 * k), tall * (.2 + .25 * k)
            scene.front(part(BODY, .85 + .1 * k), x - half, x + half, low, low + tall * .35, z, .1)
        return
    for k in range(6):
        a = rng.uniform(0, 6.28)
        px, py = x + wide * .6 * np.cos(a), tall * .68 + wide * .6 * np.sin(a) + .05 * k
        scene.disc(part(BODY, .8 + .07 * k), px, py, z, wide * rng.uniform(.45, .75))


def _bush(scene, rng, x, z, wide):
    part = scene.materials(VEGETATION, scene.new(), z)
    for k in range(4):
        r = wide * rng.uniform(.35, .6)
        scene.disc(part(BODY, .85 + .08 * k), x + rng.uniform(-.5, .5) * wide, r * .7, z, r, r * .9)


def _post(scene, rng, x, z, kind, inward):
    """A pole with a lamp, a traffic light or a traffic sign; `inward` points to the road."""
    obj, tall = scene.new(), rng.uniform(*{"lamp": (5, 7.5), "light": (2.9, 4), "sign": (2.3, 3.1)}[kind])
    pole = scene.materials(POLE, obj, z)
    iron = pole(BODY)
    scene.rod(iron, x, 0, x, tall, z, .17)
    if kind == "lamp":
        scene.rod(iron, x, tall, x + inward * 1.6, tall + .2, z, .12)
        scene.rod(pole(LAMP), x + inward * 1.2, tall + .1, x + inward * 1.9, tall + .15, z, .22)
    elif kind == "light":
        part = scene.materials(LIGHT, obj, z)
        if rng.random() < .4:  # on an arm over the road
            scene.rod(iron, x, tall + 1, x + inward * 2.5, tall + 1, z, .13)
            scene.rod(iron, x, tall, x, tall + 1, z, .15)
            x, tall = x + inward * 2.5, tall + .9
        scene.front(part(BODY), x - .28, x + .28, tall - .95, tall + .25, z)
        lit = rng.integers(3)
        for k in range(3):  # the shade of a lit lens says which of the three colours it has
            scene.disc(part(LAMP, 1 + k / 10) if k == lit else part(GLASS), x, tall + .05 - .38 * k, z, .17)
    else:
        corners, r, part = (0, 3, 4, 2)[rng.integers(4)], rng.uniform(.38, .55), scene.materials(SIGN, obj, z)
        for face, size in ((part(BODY), r), (part(ACCENT), .66 * r)):
            if corners == 0:
                scene.disc(face, x, tall, z, size)
            elif corners == 2:
                scene.front(face, x - size * 1.3, x + size * 1.3, tall - size * .8, tall + size * .8, z)
            else:
                turn, size = np.arange(corners) * 2 * np.pi / corners, size * 1.22
                scene.polygon(face, [(x + size * np.sin(a), tall + size * np.cos(a), z) for a in turn])


def _plank(scene, cls, x, z0, z1, tall, outward):
    """A building, wall or fence: a plane along the street, and the end that faces the camera."""
    obj = scene.new()
    scene.side(scene.part(cls, BODY, obj, SIDE, x, 0.86), x, z0, z1, 0, tall)
    if cls != FENCE:
        deep = x + outward * (12 if cls == BUILDING else .5)
        scene.front(scene.part(cls, BODY, obj, FRONT, z0), min(x, deep), max(x, deep), 0, tall, z0)


def _geometry(rng, layout):
    """One scene: ground and skyline, then everything that stands on the street, far to near."""
    scene = _Scene(rng.uniform(*layout["focal"]), rng.uniform(*layout["height"]),
                   rng.uniform(*layout["horizon"]) * HEIGHT, WIDTH * (0.5 + rng.uniform(-1, 1) * layout["sway"]))
    half = scene.half = rng.uniform(*layout["road"])
    centre, far = -half * rng.uniform(0.1, 0.6), rng.uniform(45, 80)  # the camera drives on the right
    cross = rng.uniform(9, 35) if rng.random() < layout["cross"] else None
    _backdrop(scene, rng, layout, far)
    edges = _ground(scene, rng, layout, centre, half, far, cross)
    items = []  # (depth, function, arguments)
    for s, (kerb, edge, walk) in edges.items():
        items += _roadside(rng, layout, s, edge, far, cross)
        items += _kerbside(rng, layout, s, kerb, walk)
    items += _traffic(rng, layout, centre, half, cross)
    taken = []
    for z, maker, args in sorted(items, key=lambda item: -item[0]):
        if maker in (_car, _truck, _bus, _rider):  # vehicles do not stand inside each other
            x = args[1]
            if any(abs(x - a) < 1.9 and abs(z - b) < gap for a, b, gap in taken):
                continue
            taken.append((x, z, 5 if maker in (_car, _rider) else 11))
        maker(scene, *args)
    if rng.random() < layout["hood"]:  # the bonnet of the camera's own car
        rise = rng.uniform(.05, .12) * HEIGHT
        scene.pen.ellipse((-.2 * WIDTH, HEIGHT - rise, 1.2 * WIDTH, HEIGHT + 4 * rise),
                          fill=scene.part(VOID, DARK, scene.new(), FRONT, 2.0))
    return scene


def _backdrop(scene, rng, layout, far):
    scene.pen.rectangle((0, 0, WIDTH, HEIGHT), fill=scene.part(SKY, BODY, scene.new(), FRONT, 400.0))
    scene.pen.rectangle((0, scene.horizon, WIDTH, HEIGHT), fill=scene.part(TERRAIN, BODY, scene.new(), GROUND, 0.0))
    x, built = -far * 1.2, layout["building"] / (layout["building"] + layout["tree"])
    while x < far * 1.2:  # a skyline closes the street
        wide, house = rng.uniform(6, 22), rng.random() < built
        part = scene.part(BUILDING if house else VEGETATION, BODY, scene.new(), FRONT, far, .95)
        if house:
            scene.front(part, x, x + wide, 0, rng.uniform(5, 18), far)
        else:
            scene.disc(part, x + wide / 2, 1, far, wide * .6, rng.uniform(4, 9))
        x += wide * .9


def _ground(scene, rng, layout, centre, half, far, cross):
    """Sidewalks, road and crossing street -> for each side: kerb, where the verge ends, width of the walk."""
    edges, walk_obj, road_obj = {}, scene.new(), scene.new()
    for s in (-1, 1):
        kerb = centre + s * half
        walk = rng.uniform(1.6, 4) if rng.random() < layout["sidewalk"] else 0
        verge = rng.uniform(.8, 3.5) if rng.random() < layout["verge"] else rng.uniform(0, .4)
        grass = rng.uniform(.6, 2) if walk and rng.random() < .3 * layout["verge"] else 0  # between kerb and walk
        edges[s] = (kerb, kerb + s * (walk + verge + grass), walk)
        if walk:
            stones = scene.part(SIDEWALK, BODY, walk_obj, GROUND, kerb)
            scene.ground(stones, *sorted((kerb + s * grass, kerb + s * (grass + walk))), 1, far)
    road = scene.part(ROAD, BODY, road_obj, GROUND, centre)  # `at` of ground: where lanes and kerb are measured from
    scene.ground(road, centre - half, centre + half, 1, far)
    if cross:
        scene.ground(scene.part(SIDEWALK, BODY, walk_obj, GROUND, 0.0), -90, 90, cross - 2, cross + 8)
        scene.ground(scene.part(ROAD, BODY, road_obj, GROUND, 99.0), -90, 90, cross, cross + 6)  # 99: has no lanes
        scene.ground(road, centre - half, centre + half, cross - 3, cross + 9)
        zebra = scene.part(ROAD, ACCENT, road_obj, GROUND, 0.0)
        for x in np.arange(centre - half + .3, centre + half - .4, .9) if rng.random() < .7 else ():
            scene.ground(zebra, x, x + .45, cross - 2.6, cross - .3)
    return edges


def _roadside(rng, layout, s, edge, far, cross):
    """What lines the street on side s: houses, trees, walls, fences, gaps."""
    kinds = ("building", "tree", "wall", "fence", "open")
    chance = np.array([layout[k] for k in kinds])
    items, z = [], far - 2
    while z > 2:
        kind, z0 = kinds[rng.choice(5, p=chance / chance.sum())], max(z - rng.uniform(5, 18), 1.6)
        if cross and z0 < cross + 8 and z > cross - 2:  # nothing stands in the crossing street
            if z <= cross + 8.5:
                z = cross - 2
                continue
            z0 = cross + 8
        storeys = rng.uniform(*layout["storeys"]) * 3
        if kind == "building":
            items.append((z0, _plank, (BUILDING, edge, z0, z, storeys, s)))
        elif kind in ("wall", "fence"):
            cls, tall = (WALL, rng.uniform(1.2, 3)) if kind == "wall" else (FENCE, rng.uniform(1.1, 2.2))
            items.append((z0, _plank, (cls, edge, z0, z, tall, s)))
            back = edge + s * rng.uniform(3, 7)
            if rng.random() < .5:
                items.append((z0 + .1, _plank, (BUILDING, back, z0, z, storeys, s)))
            else:
                items.append((z0 + .1, _tree, (rng, back, (z0 + z) / 2)))
        elif kind == "tree":
            for t in rng.uniform(z0, z, rng.integers(1, 4)):
                items.append((t, _tree, (rng, edge + s * rng.uniform(.5, 4), t)))
            items.append((z0, _bush, (rng, edge + s * rng.uniform(1, 3), max(z0, 4.0), rng.uniform(1.5, 3))))
        elif rng.random() < .5:
            items.append((z0, _bush, (rng, edge + s * rng.uniform(1, 5), max(z0, 5.0), rng.uniform(1, 2))))
        z = z0
    return items


def _kerbside(rng, layout, s, kerb, walk):
    """Posts, trees, walkers and what is parked."""
    items, post = [], kerb + s * .45
    for kind, far in (("lamp", 40), ("light", 26), ("sign", 26)):
        for z in rng.uniform(5, far, rng.poisson(layout[kind] / 2)):
            items.append((z, _post, (rng, post + s * rng.uniform(0, .5), z, kind, -s)))
    for z in rng.uniform(6, 40, rng.poisson(layout["street_tree"] / 2)):
        items.append((z, _tree, (rng, post + s * rng.uniform(.2, 1), z)))
    for z in rng.uniform(4.5, 22, rng.poisson(layout["person"] / 2)):
        items.append((z, _person, (rng, kerb + s * rng.uniform(.4, max(walk, .8)), z)))
    for z in rng.uniform(5, 32, rng.poisson(layout["parked"] / 2)):
        items.append((z, _car, (rng, kerb - s * 1.05, z)))
    for z in rng.uniform(5, 14, rng.binomial(1, layout["rider"] / 4)):
        items.append((z, _rider, (rng, kerb + s * .9, z, True)))
    return items


def _traffic(rng, layout, centre, half, cross):
    items, lanes = [], (centre - half * .5, centre + half * .45)
    for maker, name, near in ((_car, "car", 6), (_truck, "truck", 8.5), (_bus, "bus", 8.5), (_rider, "rider", 5)):
        for z in near + 30 * rng.random(rng.poisson(layout[name])) ** 1.5:
            items.append((z, maker, (rng, lanes[rng.integers(2)] + rng.uniform(-.4, .4), z)))
    for z in rng.uniform(6, 20, rng.poisson(layout["person"] * .3)):
        z = cross - 1.5 if cross and rng.random() < .6 else z  # most cross where the streets meet
        items.append((z, _person, (rng, centre + rng.uniform(-half, half), z)))
    for x in rng.uniform(-12, 12, rng.poisson(.8) if cross else 0):
        items.append((cross + 2, _car_across, (rng, x, cross + 2)))
    return items


# ------------------------------------------------------------------------------------------------------- appearance

WHITE, BLOTCH, LEVEL, UPRIGHT, LEAF, WEAVE, STRIPE, DOTS = range(8)  # the textures of _bank
STUFF = np.isin(np.arange(20), (ROAD, SIDEWALK, WALL, FENCE, POLE, VEGETATION, TERRAIN, SKY, 19))  # one colour a scene

# A look that changes nothing. (low, high) is drawn once per scene; `texture` is {class: (texture, amount)}.
PLAIN = dict(jitter=4.0, light=(1, 1), contrast=(1, 1), tint=(1, 1, 1), gray=(0, 0), sun=(.1, .1), shadow=(.45, .45),
             mark=(235, 235, 225), glass=(62, 78, 96), dark=(28, 28, 32), lamp=(250, 240, 200), trousers=None,
             accent=None, joint=(-28, -28), brick=(-26, -26), window=(1, 1), cloud=(8, 8), leaf=(22, 22),
             grass=(14, 14), texture={}, blur=(0, 0), noise=(2, 2), vignette=(0, 0), haze=0, snow=0, lit=0, glow=0,
             wet=0)


@functools.lru_cache(None)
def _bank():
    """Eight textures of unit spread, twice as large as a scene, so that a scene can start at any corner of them."""
    rng = np.random.default_rng(0)
    h, w = 2 * HEIGHT, 2 * WIDTH
    y, x = np.mgrid[:h, :w]
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]

    def smooth(sx, sy):
        gain = np.exp(-20 * ((sx * fx) ** 2 + (sy * fy) ** 2))
        return np.fft.irfft2(np.fft.rfft2(rng.normal(size=(h, w))) * gain, (h, w))

    leaf = smooth(1.2, 1.2)
    tiles = [smooth(.3, .3), smooth(6, 6), smooth(5, .5), smooth(.5, 3), np.sign(leaf) * np.abs(leaf) ** .5,
             np.sign(np.sin(x * .9)) * np.sign(np.sin(y * .9)), np.sin((x + y) * .8), smooth(1, 1) ** 2]
    return np.stack([(t - t.mean()) / t.std() for t in tiles]).astype(np.float32)


def _paint(rng, scene, look):
    """(H, W, 3) uint8: the parts of a scene in a look. Works on colours alone, so the label cannot be hurt."""
    look = {**PLAIN, **look}
    look.update({k: rng.uniform(*v) for k, v in look.items() if isinstance(v, tuple) and len(v) == 2})
    table = np.array(scene.table, np.float32)
    table[table[:, 0] == VOID, 0] = 19
    colour, palette = _part_colours(rng, scene, table, look)
    parts = np.asarray(scene.picture)
    world = _world(scene, table, parts)
    image = _structure(rng, scene, colour[parts], palette, world, look)
    image = _weather(rng, image, scene, world, look)
    return _lens(rng, image, look)


def _part_colours(rng, scene, table, look):
    """A colour for each part, (parts, 3): by class and object, then by material; and the palette as an array."""
    cls, material, obj, plane = (table[:, k].astype(np.intp) for k in range(4))
    at, shade = table[:, 4], table[:, 5]
    palette = [look["palette"][c] for c in range(20)]
    palette = np.array([[colours[k % len(colours)] for k in range(12)] for colours in palette], np.float32)
    once, each = rng.integers(12, size=20), rng.integers(12, size=scene.objects)  # which colour: one a scene, an object
    wobble_once, wobble = (rng.normal(size=(n, 3)) * look["jitter"] for n in (20, scene.objects))
    stuff = STUFF[cls]
    base = palette[cls, np.where(stuff, once[cls], each[obj])] + np.where(stuff[:, None], wobble_once[cls], wobble[obj])
    odd = rng.uniform(0, 255, (scene.objects, 3))[obj]
    skin = np.array([(224, 180, 150), (190, 140, 110), (120, 80, 60), (90, 60, 45)])[each[obj] % 4]
    colour = base.copy()
    for m, value in ((GLASS, look["glass"]), (DARK, look["dark"]), (LAMP, look["lamp"]), (SKIN, skin),
                     (ACCENT, look["accent"] or odd), (LEGS, look["trousers"] or odd * .6)):
        colour = np.where((material == m)[:, None], value, colour)
    road = palette[ROAD, once[ROAD]] + wobble_once[ROAD]
    colour[(cls == ROAD) & (material == SHADOW)] = road * (1 - look["shadow"])
    colour[(cls == ROAD) & (material == ACCENT)] = look["mark"]
    colour[(cls == VEGETATION) & (material == DARK)] = (78, 60, 46)
    colour[(cls == BICYCLE) & (material == GLASS)] = road * .9  # between the spokes
    sign = (cls == SIGN) & (material == ACCENT)
    colour[sign] = np.where(base[sign].mean(1, keepdims=True) > 140, 30, 240)  # a symbol that can be read
    lens = (cls == LIGHT) & (material == LAMP)
    colour[lens] = np.array([(255, 50, 40), (255, 190, 40), (60, 255, 120)])[np.rint(shade[lens] * 10 - 10).astype(int)]
    dull = (cls == LIGHT) & (material == GLASS)
    colour[dull] = base[dull] * .45
    sun = look["sun"] * rng.choice([-1, 1])  # one side of the street is lit
    tone = np.where(plane == SIDE, shade * (1 - np.sign(at) * sun), np.where(lens, 1, shade))
    return (colour * tone[:, None]).astype(np.float32), palette


def _world(scene, table, parts):
    """For each pixel: class, material, object, plane, depth, and (u, v) in metres on its plane, for patterns."""
    label, material, obj, plane = (table[:, k].astype(np.intp)[parts] for k in range(4))
    at = table[:, 4][parts]
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) + .5
    down, across = np.maximum(y - scene.horizon, .3), x - scene.centre
    across = np.where(np.abs(across) < .3, .3, across)
    depth = np.where(plane == GROUND, scene.focal * scene.height / down,
                     np.where(plane == SIDE, scene.focal * at / across, at)).clip(1, 400)
    u = np.where(plane == SIDE, depth, across * depth / scene.focal)
    v = np.where(plane == GROUND, depth, scene.height - (y - scene.horizon) * depth / scene.focal)
    return dict(label=label, material=material, obj=obj, plane=plane, at=at, depth=depth, u=u, v=v, y=y, across=across)


def _structure(rng, scene, image, palette, world, look):
    """What marks a class in every look: lanes, slabs, windows, bricks, bars, leaves; then the look's own textures."""
    flat = {k: a.ravel() for k, a in world.items()}
    image, label = image.reshape(-1, 3), world["label"]
    body = flat["material"] == BODY

    def pixels(cls):
        on = np.flatnonzero(body & (flat["label"] == cls))
        return on, flat["u"][on], flat["v"][on], flat["depth"][on], np.clip(1.4 - flat["depth"][on] / 40, 0, 1)

    def blend(on, colour, share):
        image[on] += (colour - image[on]) * np.asarray(share, np.float32)[:, None]

    on, u, v, z, seen = pixels(ROAD)
    u = np.abs(u - flat["at"][on])
    lane = (u < .11 + z * .004) & (v % 7 < 3.5) | (np.abs(u - scene.half + .35) < .07 + z * .003)
    blend(on, np.array(look["mark"], np.float32), .85 * (lane & (flat["at"][on] < 90) & (z < 45)))
    on, u, v, z, seen = pixels(SIDEWALK)  # joints widen with depth to stay about a pixel, and fade
    joint = ((u % 1.3 < .1 + z * .004) | (v % 1.3 < .1 + z * .006)) * seen * look["joint"]
    image[on] += np.where(np.abs(u - flat["at"][on]) < .22, 30, joint)[:, None]  # 30: the kerb stone
    on, u, v, z, seen = pixels(BUILDING)
    who = flat["obj"][on]
    u, v = u / rng.uniform(2, 3.4, scene.objects)[who], v / 3.0
    pane = (np.abs(u % 1 - .5) < rng.uniform(.2, .36, scene.objects)[who]) & (np.abs(v % 1 - .55) < .27) & (v > 0)
    chance = np.sin(np.floor(u) * 12.9898 + np.floor(v) * 78.233 + who * 37.7) * 43758.5 % 1  # one number per window
    lit = np.array((255, 214, 130), np.float32) / max(.25, look["light"])  # lit from inside: as bright at night
    glass = np.where((chance < look["lit"])[:, None], lit, np.array(look["glass"], np.float32))
    blend(on, glass, pane * look["window"] * np.clip(1.5 - z / 60, .35, 1))
    on, u, v, z, seen = pixels(WALL)
    line = (v % .42 < .1) | ((u + .45 * (np.floor(v / .42) % 2)) % .9 < .1)
    image[on] += (line * seen * look["brick"])[:, None]
    on, u, v, z, seen = pixels(FENCE)
    bars = (u % .62 < .24) | (np.abs(v % .95 - .85) < .09)
    behind = palette[rng.choice([TERRAIN, VEGETATION, BUILDING]), 0] * .7
    blend(on, behind, 1 - np.where(z < 16, bars, .5))

    image = image.reshape(HEIGHT, WIDTH, 3)
    bank, (oy, ox) = _bank(), rng.integers((HEIGHT, WIDTH))
    tile = bank[:, oy:oy + HEIGHT, ox:ox + WIDTH]
    grain = ((label == VEGETATION) & (world["material"] == BODY)) * tile[LEAF] * np.float32(look["leaf"])
    grain += (label == TERRAIN) * tile[UPRIGHT] * np.float32(look["grass"])
    toward = 40 * (world["y"] / np.float32(scene.horizon) - .6)  # the sky is brighter at the horizon
    grain += (label == SKY) * (tile[BLOTCH] * np.float32(look["cloud"]) + toward)
    kind, amount = np.array([look["texture"].get(c, (WHITE, 3)) for c in range(20)]).T
    start = kind.astype(np.intp) * bank[0].size + oy * bank.shape[2] + ox  # where in the bank a class's texture begins
    pixel = np.arange(HEIGHT)[:, None] * bank.shape[2] + np.arange(WIDTH)
    grain += bank.ravel()[start[label] + pixel] * amount.astype(np.float32)[label]
    return image + grain[..., None]


# How much of each class the snow covers, classes 0 to 18, void last.
SNOW = np.array([.45, .85, .12, .3, .3, .2, .2, .1, .55, .95, 0, 0, 0, .2, .2, .2, 0, 0, 0, 0], np.float32)


def _weather(rng, image, scene, world, look):
    """Wet mirrors, snow, haze, then light: its colour and strength, lamps and headlights."""
    label, depth, tile = world["label"], world["depth"], _bank()[:, :HEIGHT, :WIDTH]
    ground = world["plane"] == GROUND
    if look["wet"]:
        mirror = image[np.clip(2 * scene.horizon - world["y"][:, 0], 0, HEIGHT - 1).astype(int)]
        share = (ground & (label == ROAD)) * look["wet"] * np.clip(.7 + .3 * tile[UPRIGHT], 0, 1)
        image += (mirror - image) * share[..., None]
    if look["snow"]:
        lie = look["snow"] * SNOW[label] * (1 + .35 * tile[BLOTCH] + .3 * tile[LEAF] * (label == VEGETATION))
        image += (np.float32((236, 240, 248)) - image) * np.clip(lie, 0, 1)[..., None]
    if look["haze"]:
        veil = 1 - np.exp(-depth * np.float32(look["haze"] * rng.uniform(.7, 1.4)))
        image += (np.float32((206, 208, 210)) - image) * veil[..., None]
    image *= np.float32(look["tint"]) * np.float32(look["light"])
    if look["glow"]:
        lamps = Image.fromarray((world["material"] == LAMP).astype(np.uint8) * 255)
        for radius, gain in ((1, .5), (5, 1.2)):
            halo = np.asarray(lamps.filter(ImageFilter.BoxBlur(radius)), np.float32)
            image += halo[..., None] * np.float32((1, .82, .55)) * np.float32(gain * look["glow"])
        beam = ground * np.exp(-(world["across"] / 45) ** 2 - depth / 12) * np.clip(depth / 4, 0, 1)
        image += beam[..., None] * np.float32((150, 140, 110)) * np.float32(look["glow"])
    if look["snow"]:
        image[rng.random((HEIGHT, WIDTH)) < .006] = 245  # flakes
    return image


def _lens(rng, image, look):
    """The camera: contrast, fading of colours, vignette, blur, noise."""
    mean = image.mean()
    image = (image - mean) * np.float32(look["contrast"]) + mean
    image += (image.mean(2, keepdims=True) - image) * np.float32(look["gray"])
    if look["vignette"]:
        y, x = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None], np.linspace(-1, 1, WIDTH, dtype=np.float32)
        image *= (1 - np.float32(look["vignette"]) * (x ** 2 + y ** 2) / 2)[..., None]
    if look["blur"]:
        soft = Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(look["blur"]))
        image = np.asarray(soft, np.float32)
    image = image + rng.standard_normal(image.shape, np.float32) * np.float32(look["noise"])
    return image.clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- domains


def _colours(text):
    """A palette {class: [colours]} from hex colours: classes in order (without train) parted by '/'."""
    lists = [[tuple(bytes.fromhex(word)) for word in part.split()] for part in text.split("/")]
    return {TRAIN: [(0, 0, 0)], 19: [(20, 20, 22)], **dict(zip(CLASSES, lists, strict=True))}


STREET = dict(  # ranges of camera and street in metres, chances, weights of what lines a street, mean numbers of things
    focal=(108, 124), height=(1.35, 1.6), horizon=(.42, .48), sway=.06, road=(3.6, 6), sidewalk=.9, verge=.4, cross=.4,
    building=3, tree=1.4, wall=.8, fence=.8, open=.4, storeys=(2, 5), lamp=2, light=1.6, sign=1.8, street_tree=1.4,
    person=4, parked=1.8, rider=1.3, car=1.5, truck=.6, bus=.55, hood=0)
CARS = "282a2e d2d4d6 787c80 ececec 3c4c6e 5a6054"
# Palettes in the order road / sidewalk / building / wall / fence / pole / traffic light / traffic sign / vegetation /
# terrain / sky / person / rider / car / truck / bus / motorcycle / bicycle.
DOMAINS = {
    # One colour and one texture a class, of its own: appearance tells the class, by accident.
    "toy-gta5": dict(number=1, layout={}, look=dict(
        palette=_colours("525460/baaea0/ccac7a/965446/6068aa/343c3a/18181a/1e50be/347828/96a642/70acec/d66496/ecd628/"
                         "ba181e/1e8c8c/f08c18/6e1e8c/14be78"),
        jitter=5, sun=(.08, .14), trousers=(50, 50, 110), accent=(232, 232, 232), light=(.97, 1.03), texture={
            ROAD: (WHITE, 7), SIDEWALK: (DOTS, 8), BUILDING: (LEVEL, 8), WALL: (WEAVE, 9), FENCE: (STRIPE, 6),
            CAR: (BLOTCH, 5), TRUCK: (UPRIGHT, 8), BUS: (STRIPE, 8), PERSON: (WEAVE, 8), RIDER: (DOTS, 10),
            TERRAIN: (DOTS, 8), VEGETATION: (DOTS, 6)})),
    "toy-cityscapes": dict(number=2, layout=dict(
        height=(1.2, 1.35), horizon=(.37, .43), focal=(120, 136), road=(3.2, 5), person=7, rider=2, truck=.3, bus=.35,
        storeys=(3, 6), hood=1, parked=3.4, sign=2.2, building=4, tree=1.2, open=.1), look=dict(
        palette=_colours("868284/706064/7e685c 969696 707468 aa8c82 8c544c/888478 646864/465646 6e6e6a/"
                         "606260 828482/363a32/be3c38 3c5a96 c8be5a/404e38 505842/606048 705c4c/"
                         "d6d8d6 c6ccd0/3c3c42 60504a 283246/50545a 783c38/" + CARS
                         + "/bebeba 466496/c8c496 a03232/323236/46464c"),
        jitter=12, light=(.95, 1.1), contrast=(.72, .85), tint=(.97, 1.02, .97), gray=(.2, .4),
        shadow=(.2, .35), sun=(0, .04), blur=(.5, .9), noise=(3, 5), joint=(14, 22), leaf=(12, 18), cloud=(3, 6),
        texture={
            ROAD: (BLOTCH, 7), SIDEWALK: (WHITE, 7), BUILDING: (WHITE, 7), WALL: (BLOTCH, 10), TERRAIN: (BLOTCH, 9)})),
    "toy-bdd": dict(number=3, layout=dict(
        height=(1.3, 1.7), horizon=(.47, .56), focal=(96, 112), road=(6, 9.5), sidewalk=.6, verge=.7, person=2, car=3,
        truck=1.1, bus=.5, parked=2.4, tree=2, open=1.2, building=2, storeys=(1, 4), sway=.1, hood=.3), look=dict(
        palette=_colours("968c82 78706c/c4b4a8 968c8c/96a0b0 d6ccbe 785a46 5a6e78/beb096/786446 aaaaaa/786454/"
                         "c4a032 3c3c28/328250 d6d6d2 c83228/6e6836 5a5c3c 846e3c/bea06e a08860/f0d0a0 e2beaa ceced8/"
                         "465a82 beb4a0 3c785a/3c5a3c 9696a0/ecece8 1e1e22 28468c aaa08c/e8e6e2 d67828/ecc432 3c6ebe/"
                         "a02828/c8c8be"),
        jitter=16, light=(.85, 1.15), contrast=(1.1, 1.3), tint=(1.12, .98, .82), sun=(.1, .25), shadow=(.4, .6),
        blur=(.3, .8), noise=(3, 6), vignette=(.3, .6), joint=(-14, -8), grass=(8, 12), mark=(230, 200, 90), texture={
            ROAD: (LEVEL, 7), BUILDING: (BLOTCH, 10), CAR: (WHITE, 4), SKY: (LEVEL, 4), TERRAIN: (WHITE, 9)})),
    "toy-mapillary": dict(number=4, layout=dict(
        height=(1.1, 2.6), horizon=(.3, .55), focal=(88, 150), road=(2.8, 8), sidewalk=.7, verge=.6, sway=.16, person=5,
        rider=1.8, tree=2.2, fence=1.2, wall=1.2, storeys=(1, 7)), look=dict(
        palette=_colours("967860 46464a aaa8a0/aa5a50 5a5c5a d6c896/3c8c82 d65a50 ece2d2 5a6eb4 789650 c878aa/"
                         "d6d6dc 5a7850 3c3c5a/3c783c b43c32 e6e6e2/aa3c32 d6d6d6 5a8ca0/e6c83c 3c6446/"
                         "ec3c3c f0dc3c 3ca05a/1e5a46 78a028 963c3c/3c823c b46e46 d6be82/3c78d6 b4dcec aaaab4/"
                         "1e8cbe ecece6 f09628 286e28/d63c32 28282e 5abed6/f0c832 1e643c 3c8cd6 ececec 784632/"
                         "be2832 3c5ab4 e6dcbe/2878c8 3c9650 ececf0/d66428 1e1e22/dc3c8c 3c78dc"),
        jitter=24, light=(.7, 1.25), contrast=(.9, 1.35), sun=(0, .3), shadow=(.2, .6), blur=(0, .8), noise=(2, 9),
        joint=(-40, 30), brick=(-40, 30), leaf=(14, 34), grass=(6, 26), texture={
            ROAD: (STRIPE, 5), SIDEWALK: (WEAVE, 8), BUILDING: (UPRIGHT, 9), WALL: (LEVEL, 10), CAR: (STRIPE, 6),
            TRUCK: (BLOTCH, 9), TERRAIN: (LEVEL, 10), SKY: (DOTS, 4)})),
    "toy-night": dict(number=5, layout=dict(
        person=3, parked=2.4, height=(1.3, 1.5), building=4, lamp=3.4, horizon=(.4, .5)), look=dict(
        palette=_colours("68686e/888282/786e6e 96826e 5a606e 8c5a50/787474/5a5a60/6e6e74/282828/"
                         "c8463c 5a82d2/3c5440/5a5e46/282c42 42323c/6e5a5a 3c506e/827850 465a78/" + CARS
                         + "/b4b4be 5a3c3c/be3c3c bebea0/50505a/787878"),
        jitter=14, light=(.34, .48), tint=(.92, .95, 1.15), contrast=(1.1, 1.3), lit=.4, glow=.3, noise=(5, 10),
        blur=(.3, .7), shadow=(.2, .4), sun=(0, .1), cloud=(2, 4), texture={
            ROAD: (LEVEL, 8), BUILDING: (BLOTCH, 8), SIDEWALK: (WHITE, 8), TERRAIN: (BLOTCH, 8)})),
    "toy-fog": dict(number=6, layout=dict(tree=2, open=.8, horizon=(.38, .46), height=(1.4, 1.9), truck=.9), look=dict(
        palette=_colours("706e6a/8c8884/826e60 6e7478 967e6e 605450/6e6460/4c5050/464648/282c28/"
                         "b4322e 3c508c/3c4836 505038/626446/ced0d2/3c363c 64322e 2e3c50/5a643c 32323c/" + CARS
                         + "/aaaaa6 783c32/465a96 beb482/3c3232/505a64"),
        jitter=12, haze=.045, light=(.85, 1), contrast=(.8, .95), gray=(.1, .3), blur=(.4, .9), noise=(2, 4),
        shadow=(.1, .2), sun=(0, .05), cloud=(1, 2), lit=.08, texture={
            ROAD: (BLOTCH, 6), BUILDING: (WHITE, 6), TERRAIN: (BLOTCH, 9)})),
    "toy-snow": dict(number=7, layout=dict(
        verge=.8, tree=2, open=1, storeys=(1, 3), person=3, rider=.9, height=(1.3, 1.8)), look=dict(
        palette=_colours("82848a/96969c/963c32 be9646 6e5a46 78828c/786e6a/604c3c 787c82/544c46/323236/"
                         "d6b43c 3c5aaa/364a42/96928c/bec6d0 aab2c0/a03232 323c5a 285a50/3c78aa aa5a28/" + CARS
                         + "/3c6e46 c8c8cc/3c508c c83c3c/464650/3c466e"),
        jitter=12, snow=1, light=(.9, 1.05), tint=(.94, .98, 1.07), contrast=(.8, 1), gray=(0, .2), blur=(.2, .7),
        noise=(2, 5), shadow=(.1, .25), sun=(0, .08), cloud=(3, 6))),
    # A weather of its own in every scene: what wins on one look may win by luck, on forty less so.
    "toy-dev": dict(number=8, layout=dict(
        height=(1.1, 2.2), horizon=(.34, .52), focal=(96, 136), tree=2, road=(3, 8), person=5, sway=.1), look=dict(
        palette=_colours("4e4a54 605a5a/786e74 96786e/64786e 965a60 828296 beaa96/5a5a54 968c96/82503c 3c505a/"
                         "5a505a 96968c/464028/e67828 463c96/aa6428 8c3c28 6e6e32/785a3c 545438/be96aa dcaa82 8282aa/"
                         "5a3264 324646 b4a05a/6e3232 464678/463c6e bebeba 323632 6e828c/96826e 643c6e/6e963c beaabe/"
                         "283c3c/968c3c"),
        jitter=30, wet=(0, .6), haze=(0, .03), light=(.4, 1.15), tint=(1.06, .94, 1.06), contrast=(.7, 1.4), gray=(0, .7),
        sun=(0, .25), shadow=(.1, .6), blur=(0, .9), noise=(2, 9), vignette=(0, .5), lit=(0, .3), joint=(-30, 25),
        leaf=(12, 32), texture={
            ROAD: (UPRIGHT, 6), BUILDING: (DOTS, 8), SIDEWALK: (BLOTCH, 8), CAR: (LEVEL, 5), TERRAIN: (WHITE, 10)})),
}
SPLITS = {"train": 0, "val": 1}


def draw(domain, split, index, seed=0, harmful=0.0, look=None):
    """One scene: (image, label, wrong), a pure function of the arguments.

    harmful    share of the training scenes that are spoilt; a larger share spoils the same scenes and more
    look       paint the scene in another domain's look: same geometry, same label
    """
    recipe, key = DOMAINS[domain], [DOMAINS[domain]["number"], SPLITS[split], index, seed]
    scene = _geometry(np.random.default_rng(key + [0]), {**STREET, **recipe["layout"]})
    image = _paint(np.random.default_rng(key + [1]), scene, DOMAINS[look or domain]["look"])
    label = np.array(scene.table)[:, 0].astype(np.uint8)[np.asarray(scene.picture)]
    rng = np.random.default_rng(key + [2])
    if split == "train" and rng.random() < harmful:
        return _spoil(rng, image, label)
    return image, label, np.zeros(label.shape, bool)


def _spoil(rng, image, label):
    """Make a quarter to almost half of a scene harmful, region by region.

    Either unrelated texture under some class's label, or what is drawn under the labels of other classes.
    """
    truth, label, wrong = label, label.copy(), np.zeros(label.shape, bool)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    goal, order = rng.uniform(.2, .4), np.array(CLASSES)[rng.permutation(len(CLASSES))]
    swap = np.full(256, VOID, np.uint8)
    while wrong.mean() < goal:
        h, w = rng.uniform(.3, .6) * HEIGHT, rng.uniform(.2, .4) * WIDTH
        dy, dx = (y - rng.uniform(0, HEIGHT)) / h, (x - rng.uniform(0, WIDTH)) / w
        inside = dy ** 2 + dx ** 2 < .25 if rng.random() < .4 else np.maximum(np.abs(dy), np.abs(dx)) < .5
        if rng.random() < .5:
            paint = rng.uniform(30, 225, 3) + _bank()[rng.integers(8), :HEIGHT, :WIDTH, None] * rng.uniform(-45, 45, 3)
            image[inside] = paint.clip(0, 255).astype(np.uint8)[inside]
            label[inside] = rng.choice(CLASSES)
        else:  # a turn of a random order leaves no class in its place
            swap[order] = np.roll(order, rng.integers(1, len(order)))
            inside &= ~wrong & (truth != VOID)
            label[inside] = swap[truth[inside]]
        wrong |= inside
    return image, label, wrong


# ----------------------------------------------------------------------------------------------- a CLIP in miniature

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own normalisation
# Pixels of its input: one cell of stride 32, so that its pooling attends to that cell alone, and reading a pixel
# (model.py: the value path at one position) is what it was trained to do.
SIZE = 32
REACH = 96  # the largest piece of a scene that is scaled down to it
SCENES, PER_SCENE, SHARES = 8, 48, (.5, .2, .3)  # of a batch; shares of the MODES
WIDTHS = dict(joint=64, vision=16, text=64)
MODES = ("native", "zoom", "cut")  # a window at the scene's scale; a smaller one, enlarged; one cut to an object
PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a drawing of a {}.",
           "a {} in a street scene.")
FORMS = ("a {m} of a {c}.", "a {m} of a {c}.", "a {m} of the {c}.", "a {c} in a street scene.", "a {c} in the street.",
         "a {c} on the road at day.", "{c}")
NATURAL = _colours("6e6e70 505054 96928c/96928c 786e6e/aa8c6e 8c5a50 969696/8c8278/6e645a/5a5a5c/32322e/be3c3c 3c5ab4/"
                   "466e32 5a6e3c 6e6432/788246 8c785a/96bee6 c8ced6/5a505a/645a50/78787c 3c3c42 c8c8c8/b4b4b0/be783c/"
                   "3c3c40/5a5a5a")  # what such things often look like, anywhere


def _web(rng):
    """(layout, look) of a picture of the open web: three classes in four in fairly natural colours, others in any."""
    def once(low, high):
        return (rng.uniform(low, high),) * 2

    palette = {}
    for c in range(20):
        some = np.array(NATURAL[c])[rng.integers(len(NATURAL[c]), size=12)]
        free = rng.uniform(15, 245, 3) + rng.normal(0, rng.uniform(0, 60), (12, 3))
        palette[c] = (some + rng.normal(0, 22, (12, 3)) if rng.random() < .75 else free).clip(8, 250).tolist()
    look = dict(palette=palette, jitter=rng.uniform(2, 30), light=once(.55, 1.3), contrast=once(.55, 1.5),
                sun=once(0, .3), tint=tuple(rng.uniform(.82, 1.18, 3)),
                gray=once(0, 1) if rng.random() < .2 else (0, 0), shadow=once(0, .7),
                mark=tuple(rng.uniform(150, 255, 3)), glass=tuple(rng.uniform(10, 200, 3)),
                dark=tuple(rng.uniform(8, 70, 3)), lamp=tuple(rng.uniform(120, 255, 3)), joint=once(-45, 45),
                brick=once(-45, 45), window=once(.5, 1), cloud=once(0, 14), leaf=once(8, 42), grass=once(5, 30),
                noise=once(0, 6), blur=once(.2, 1.1) if rng.random() < .6 else (0, 0),
                vignette=once(0, .6) if rng.random() < .3 else (0, 0),
                texture={c: (rng.integers(8), rng.uniform(0, 8)) for c in CLASSES})
    layout = dict(STREET, focal=(85, 150), height=(1.1, 2.4), horizon=(.32, .54), sway=.14, road=(2.8, 8.5),
                  sidewalk=.8, verge=.6, building=2.4, wall=1.2, fence=1.2, tree=1.8, open=.8, storeys=(1, 6),
                  truck=.9, bus=.9, rider=2.2, light=2.2, sign=2.2, hood=.2)
    return layout, look


def _crops(rng, scene, image, count, share=SHARES):
    """Crops of one scene -> images (count, SIZE, SIZE, 3), class of each crop's subject.

    share    of the three MODES. Classes are drawn evenly (rare and small ones more often), then a pixel of the class.
             Whoever photographs a thing frames it: of eight places on the object, a cut takes the one that shows most of it.
    """
    table = np.array(scene.table)[:, (0, 2)].astype(int)[np.asarray(scene.picture)]
    cls, obj = table[..., 0].ravel(), table[..., 1].ravel()
    pad = REACH // 2
    canvas = np.empty((HEIGHT + REACH, WIDTH + REACH, 3), np.uint8)
    canvas[:] = np.round(255 * np.array(MEAN))  # outside the picture: what the normalisation turns into zero
    canvas[pad:-pad, pad:-pad] = image
    canvas = Image.fromarray(canvas)
    ground = np.pad(cls.reshape(HEIGHT, WIDTH), pad, constant_values=VOID)
    present = np.flatnonzero(np.bincount(cls, minlength=256)[:19] >= 8)
    rare = np.isin(present, (TRUCK, BUS, RIDER, MOTORCYCLE, BICYCLE, WALL, FENCE, LIGHT, SIGN)) + 1
    subjects = rng.choice(present, count, p=rare / rare.sum())
    where = {c: np.flatnonzero(cls == c) for c in set(subjects)}
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for k, c in enumerate(subjects):
        pixel = where[c][rng.integers(len(where[c]))]
        centres, side, mode = [divmod(int(pixel), WIDTH)], SIZE, MODES[rng.choice(3, p=share)]
        if mode == "zoom":
            side = SIZE / rng.uniform(1, 2)
        elif mode == "cut":
            ys, xs = np.divmod(where[c][obj[where[c]] == obj[pixel]], WIDTH)
            side = ((np.ptp(ys) + 1) * (np.ptp(xs) + 1)) ** .5
            side = len(ys) ** .5 if side > REACH / 2 else side  # long or torn, as a pavement is: no box frames it
            side = np.clip(side * rng.uniform(1, 1.6), 14, REACH)
            centres += [((ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2)]
            centres += [(ys[i], xs[i]) for i in rng.integers(len(ys), size=6)]
        shake, seen = rng.uniform(-.1, .1, 2) * side, -1
        for y, x in centres:
            corner = [np.clip(a + .5 + pad - side / 2 + b, 0, n + REACH - side)
                      for a, b, n in ((y, shake[0], HEIGHT), (x, shake[1], WIDTH))]
            box = ground[int(corner[0]):int(corner[0] + side), int(corner[1]):int(corner[1] + side)]
            if mode != "cut" or (box == c).sum() > seen:
                (top, left), seen = corner, (box == c).sum()
        images[k] = canvas.resize((SIZE, SIZE), Image.BILINEAR, box=(left, top, left + side, top + side))
        if rng.random() < .5:
            images[k] = images[k, :, ::-1]
    return images, subjects


def _caption(rng, look, subject, plain):
    """What a person may write under a crop: its subject, at times the style; in the plain form, just the subject."""
    if plain:
        return f"a photo of a {NAMES[subject]}."
    styles = [word for word, true in (("dark ", look["light"][0] < .75), ("bright ", look["light"][0] > 1.15),
                                      ("blurry ", look["blur"][0] > .6), ("gray ", look["gray"][0] > .6)) if true]
    style = rng.choice(styles) if styles and rng.random() < .6 else ""
    medium = style + rng.choice(("photo", "photo", "picture", "drawing"))
    return FORMS[rng.integers(len(FORMS))].format(m=medium, c=NAMES[subject])


@functools.lru_cache(None)
def _tokens(caption, length=24):
    import clip
    return clip.tokenize(caption, context_length=length)[0].numpy()


class Web:
    """Batch n of crops and captions: a pure function of (seed, n), so for any number of worker processes the same."""

    def __init__(self, steps, seed, styles):
        self.steps, self.seed, self.styles = steps, seed, styles

    def __len__(self):
        return self.steps

    def __getitem__(self, n):
        rng = np.random.default_rng([99, self.seed, n])
        images, captions = [], []
        for _ in range(SCENES):
            layout, look = _web(rng) if self.styles == "web" else (STREET, {**PLAIN, **DOMAINS["toy-gta5"]["look"]})
            scene = _geometry(rng, layout)
            crops, subjects = _crops(rng, scene, _paint(rng, scene, look), PER_SCENE)
            images.append(crops)
            captions += [_caption(rng, look, c, rng.random() < .4) for c in subjects]
        texts, which = np.unique(captions, return_inverse=True)  # equal captions have equal embeddings
        return np.concatenate(images), np.stack([_tokens(text) for text in texts]), which


def _normalise(images):
    import torch
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(out=CLIP_FILE, steps=7000, seed=0, styles="web", threads=1):
    """CLIP's symmetric contrastive loss, over the batch's captions for an image and over its images for a caption.

    Crops with the same caption count as each other's negatives, as in CLIP; so the loss has a floor well above 0.
    """
    import torch
    import torch.nn.functional as F
    from clip.model import CLIP
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    # Of CLIP's 49,408 tokens the captions use a few dozen: train a table of those. In ascending order, because CLIP
    # finds the end of a text as its highest token.
    mediums = "dark bright blurry gray photo picture drawing"
    used = np.unique([_tokens(form.format(m=mediums, c=c), 77) for form in FORMS for c in NAMES])
    model = CLIP(WIDTHS["joint"], SIZE, (1, 1, 1, 1), WIDTHS["vision"], None, 77, len(used), WIDTHS["text"], 1, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):  # CLIP opens its residual branches from zero: safe in deep networks, but slow
            torch.nn.init.ones_(parameter)
    model.visual.to(memory_format=torch.channels_last)
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=.05),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(.9, .98))
    loader = torch.utils.data.DataLoader(Web(steps, seed, styles), batch_size=None, num_workers=1, collate_fn=_same,
                                         prefetch_factor=8)
    target, start, shown = torch.arange(SCENES * PER_SCENE), time.time(), []
    for n, (images, tokens, which) in enumerate(loader):
        for group in optimizer.param_groups:  # warm-up, then a cosine
            group["lr"] = 2e-3 * min(1, (n + 1) / 100) * (.502 + .498 * np.cos(np.pi * n / steps))
        tokens = torch.from_numpy(np.searchsorted(used, tokens))[:, :(tokens > 0).sum(1).max()]
        with torch.autocast("cpu", torch.bfloat16):  # half the time of float32
            image = model.encode_image(_normalise(images).contiguous(memory_format=torch.channels_last))
            text = model.encode_text(tokens)
        logits = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T * model.logit_scale.exp()
        logits = logits[:, torch.from_numpy(which)]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))  # as CLIP did
        shown.append(loss.item())
        if (n + 1) % 100 == 0 or n + 1 == steps:
            print(f"step {n + 1:5d} of {steps}  loss {np.mean(shown[-100:]):.3f}  scale {model.logit_scale.exp():4.1f}"
                  f"  {time.time() - start:5.0f} s", flush=True)
        if (n + 1) % 500 == 0 or n + 1 == steps:
            _save(model, used, out)


def _same(batch):
    return batch


def _save(model, used, out):
    """A state dict in half precision, as OpenAI's; packed with deflate, since most rows of its token table are zero."""
    import io
    import zipfile

    import torch
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    table = torch.zeros(49408, WIDTHS["text"])  # CLIP's numbers, as clip.tokenize gives; zero: never trained
    table[torch.from_numpy(used)] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    # Pixels are read as c_proj(v_proj(f)), without a position code (model.py). The grid of training has one cell: move
    # its code into the biases. The same function, since q, k and v are linear, and now reading a pixel is reading that cell.
    code = state["visual.attnpool.positional_embedding"]
    middle = code[len(code) // 2].clone()  # row 0 belongs to the mean
    for name in ("q", "k", "v"):
        state[f"visual.attnpool.{name}_proj.bias"] += state[f"visual.attnpool.{name}_proj.weight"] @ middle
    code -= middle
    raw = io.BytesIO()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry), zipfile.ZIP_DEFLATED)


def load_toy_clip(path=CLIP_FILE):
    """The miniature CLIP as a clip.model.CLIP, float32, in eval mode."""
    import torch
    from clip.model import build_model  # strict: a weight that is missing or left over is an error
    return build_model(torch.load(path, map_location="cpu", weights_only=True)).float().eval()


def zero_shot(model, domain, share, scenes=15, per_scene=24):
    """(right, total) per class: crops of a domain's held-out scenes against the mean of PROMPTS of each drawn class."""
    import clip
    import torch
    import torch.nn.functional as F
    right, total, recipe = np.zeros(19), np.zeros(19), DOMAINS[domain]
    with torch.no_grad():
        text = model.encode_text(clip.tokenize([p.format(NAMES[c]) for c in CLASSES for p in PROMPTS]))
        text = F.normalize(F.normalize(text, dim=1).view(len(CLASSES), len(PROMPTS), -1).mean(1), dim=1)
        for index in range(scenes):
            rng = np.random.default_rng([recipe["number"], SPLITS["val"], index, 77])
            scene = _geometry(rng, {**STREET, **recipe["layout"]})
            crops, subject = _crops(rng, scene, _paint(rng, scene, recipe["look"]), per_scene, share)
            guess = np.array(CLASSES)[(model.encode_image(_normalise(crops)) @ text.T).argmax(1)]
            np.add.at(total, subject, 1)
            np.add.at(right, subject[guess == subject], 1)
    return right, total


def check_clip(path=CLIP_FILE):
    """Zero-shot top-1 of held-out crops in the named domains' looks; trained with `--styles web` it has seen none of them."""
    model, right, total = load_toy_clip(path), np.zeros((3, 19)), np.zeros((3, 19))
    print(f"top-1 over {len(CLASSES)} classes (chance {1 / len(CLASSES):.2f}); native: at the scene's scale, "
          "zoom: enlarged, cut: cut to the object")
    for domain in DOMAINS:
        row = [zero_shot(model, domain, share) for share in np.eye(3)]
        print(f"  {domain:15s}", "  ".join(f"{mode} {r.sum() / t.sum():.3f}" for mode, (r, t) in zip(MODES, row)))
        right += [r for r, _ in row]
        total += [t for _, t in row]
    for c in CLASSES:
        print(f"  {NAMES[c]:15s}", "  ".join(f"{mode} {right[k, c] / total[k, c]:.3f}" for k, mode in enumerate(MODES)))
    top1 = right.sum(1) / total.sum(1)
    print("all domains     ", "  ".join(f"{mode} {t:.3f}" for mode, t in zip(MODES, top1)), f"  n {total.sum():.0f}")
    return dict(zip(MODES, top1))


# ------------------------------------------------------------------------------------------------------- to look at


def gallery(path, scenes=3):
    """All domains, a row each: scenes and their labels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    hexes = ("804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 "
             "003c64 005064 0000e6 770b20").split()  # Cityscapes' colours
    colours = np.zeros((256, 3), np.uint8)
    colours[:19] = [tuple(bytes.fromhex(h)) for h in hexes]
    figure, axes = plt.subplots(len(DOMAINS), 2 * scenes, figsize=(4 * scenes, len(DOMAINS) * 1.06))
    for row, domain in zip(axes, DOMAINS):
        for k in range(scenes):
            image, label, _ = draw(domain, "val", k)
            row[2 * k].imshow(image)
            row[2 * k + 1].imshow(colours[label])
        row[0].set_ylabel(domain.removeprefix("toy-"), fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=.025, right=.998, top=.998, bottom=.002, wspace=.02, hspace=.03)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _demo(scenes=12):
    """Colour alone: the class that most often has a colour in the source, asked about other pixels."""
    image, label, _ = draw("toy-gta5", "val", 0)
    assert all((draw("toy-gta5", "val", 0, look=look)[1] == label).all() for look in DOMAINS), "a look moved a label"

    def scenes_of(domain, split, count):
        pairs = [draw(domain, split, index)[:2] for index in range(count)]
        image, label = (np.stack(side) for side in zip(*pairs))
        return (image // 16) @ np.array([256, 16, 1]), label  # 4096 colours

    start = time.process_time()
    colour, label = scenes_of("toy-gta5", "train", 4 * scenes)
    print(f"{(time.process_time() - start) / 4 / scenes * 1000:.1f} ms a scene")
    counts = np.bincount((colour * 256 + label).ravel(), minlength=4096 * 256).reshape(4096, 256)
    votes, score = counts[:, :19].argmax(1), {}
    for domain in DOMAINS:
        colour, label = scenes_of(domain, "val", scenes)
        right = (votes[colour] == label)[label != VOID].mean()
        score[domain] = right
        print(f"{domain:15s} {right:.2f} of the pixels named by their colour in the source")
    source = score.pop("toy-gta5")
    assert source - np.mean(list(score.values())) > .3, "the source's colours must not carry over: else there is no gap"


def main():
    """Draw the gallery, or train and check the miniature CLIP, as the flags ask."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--gallery", metavar="FILE.png", help="write a picture of all domains")
    parser.add_argument("--train-clip", action="store_true", help="make the miniature CLIP again (minutes)")
    parser.add_argument("--check-clip", action="store_true", help="zero-shot top-1 of the miniature CLIP, per domain")
    parser.add_argument("--out", default=CLIP_FILE, help="file that --train-clip writes and --check-clip reads")
    parser.add_argument("--styles", choices=("web", "source"), default="web", help="what the miniature CLIP sees")
    parser.add_argument("--steps", type=int, default=7000, help="of --train-clip")
    parser.add_argument("--seed", type=int, default=0, help="of --train-clip")
    parser.add_argument("--threads", type=int, default=1, help="of --train-clip; another number rounds differently")
    args = parser.parse_args()
    if args.train_clip:
        train_clip(args.out, args.steps, args.seed, args.styles, args.threads)
    if args.check_clip:
        check_clip(args.out)
    if args.gallery:
        gallery(args.gallery)
    if not (args.train_clip or args.check_clip or args.gallery):
        _demo()


if __name__ == "__main__":
    main()
