"""toy.py: a drawn street world in several domains with exact labels: a source, and targets that differ from it.

The method needs a source, targets and a CLIP. Real ones are 25 GB and hours of a GPU; this file draws the data, and
toy_clip.py makes the CLIP. A picture is drawn in two passes that share nothing but a map of parts:

    Scene    a street in perspective, far things first -> for each pixel the number of a part, and for each part its
             class, its material, its object and the plane that it lies in. The label is a look-up in this map.
    paint    a domain's look: colours per class, texture, weather, light, lens. It never moves a pixel, so labels
             are exact under every look, and one scene can be seen in all: draw(..., look="toy-night").

What makes it a domain gap: in the source `toy-gta5` appearance tells the class by accident. Every car is red and no
other class is, every class has one texture, it is always a clear noon. A network that leans on this fails elsewhere.
What holds everywhere is structure: windows in rows, bars, slabs and lanes in perspective, wheels, leaves, place.

Shapes
    image    (H, W, 3) uint8     label    (H, W) uint8: train ids, 255 = void     wrong    (H, W) bool: see _spoil

Not here: the miniature CLIP (toy_clip.py), the table of data sets (data.py), a picture of all domains (figures.py).
`python toy.py` prints how far colour alone gets in each domain:
    toy-gta5        0.92 of the pixels named by their colour in the source
    ...
    Notice: in the source colour gives the class away, elsewhere it does not: whoever learns colours fails.
"""

import functools
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 96, 192
VOID = 255
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS,
 TRAIN, MOTORCYCLE, BICYCLE) = range(19)
CLASSES = tuple(c for c in range(19) if c != TRAIN)  # drawn: all but the train
# The material of a part; the last four shine.
BODY, GLASS, DARK, ACCENT, SKIN, LEGS, SHADOW, MARK, TRUNK, SPOKES, SYMBOL, UNLIT, LAMP, RED, AMBER, GREEN = range(16)
GROUND, SIDE, FRONT = range(3)  # the plane of a part: y = 0, x = at, z = at


class Scene:
    """A street in metres, with x to the right of the camera, y up from the ground and z ahead.

    It is a map of part numbers and, for each part, a row (class, material, object, plane, where the plane is, shade):
    one set of polygons gives image and label. begin() says whose parts the shapes are that follow, and where their
    points are measured from; a shape without a depth of its own faces the camera.
    """

    def __init__(self, rng, layout):
        self.rng, self.layout = rng, layout
        self.focal, self.height = rng.uniform(*layout["focal"]), rng.uniform(*layout["height"])
        self.horizon = rng.uniform(*layout["horizon"]) * HEIGHT
        self.centre = WIDTH * (0.5 + rng.uniform(-1, 1) * layout["sway"])
        self.picture = Image.new("I", (WIDTH, HEIGHT))
        self.pen = ImageDraw.Draw(self.picture)
        self.table, self.objects = {}, 0  # row -> number of the part
        self.half = rng.uniform(*layout["road"])
        self.middle = -self.half * rng.uniform(0.1, 0.6)  # of the road: the camera drives on the right
        self.far = rng.uniform(45, 80)
        self.cross = rng.uniform(9, 35) if rng.random() < layout["cross"] else None
        self.backdrop()
        items = [item for side in self.pavement() for item in self.beside(*side)]  # (depth, method, arguments)
        rooms, taken = {self.car: 5, self.rider: 5, self.truck: 11, self.bus: 11}, []
        for z, maker, args in sorted([*items, *self.traffic()], key=lambda item: -item[0]):
            room = rooms.get(maker, 0)  # vehicles do not stand inside each other; what has no room is in nobody's way
            if not room or all(abs(args[0] - x) >= 1.9 or abs(z - behind) >= gap for x, behind, gap in taken):
                taken.append((args[0], z, room))
                maker(*args)
        if rng.random() < layout["hood"]:  # the bonnet of the camera's own car
            rise = rng.uniform(.05, .12) * HEIGHT
            self.begin(VOID, 2.0)
            self.pen.ellipse((-.2 * WIDTH, HEIGHT - rise, 1.2 * WIDTH, HEIGHT + 4 * rise), fill=self.part(DARK))

    def begin(self, cls, z=0.0, x=0.0, scale=1, new=True):
        """A new object at (x, 0, z), or a part of another class of the last one; scale -1 mirrors it."""
        self.objects += new
        self.owner, self.z, self.x, self.scale = (cls, self.objects - 1), z, x, scale

    def part(self, material, shade=1.0, plane=FRONT, at=None, owner=None):
        cls, obj = (ROAD, 0) if material == SHADOW else owner or self.owner
        row = cls, material, obj, plane, self.z if at is None else at, shade
        return self.table.setdefault(row, len(self.table))

    def column(self, k):
        """(H, W): entry k of the row of each pixel's part."""
        return np.array(list(self.table))[:, k].astype(int)[np.asarray(self.picture)]

    def point(self, x, y, z=0.0):
        k = self.focal / (self.z + z)
        return self.centre + (self.x + self.scale * x) * k, self.horizon + (self.height - y) * k

    def face(self, material, points, *rest):
        self.pen.polygon([self.point(*p) for p in points], fill=self.part(material, *rest))

    def ground(self, material, x0, x1, z0, z1, at=0.0, owner=None):
        self.face(material, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], 1.0, GROUND, at, owner)

    def side(self, material, x, z0, z1, y0, y1, taper=0.0, shade=None):
        """A plane along the street; without a shade it is lit as if it faced the camera."""
        light = () if shade is None else (shade, SIDE, self.x + x)
        self.face(material, [(x, y0, z0), (x, y0, z1), (x, y1, z1 - taper), (x, y1, z0 + taper)], *light)

    def front(self, material, half, y0, y1, taper=1.0, shade=1.0, places=(0,)):
        for x in places:
            self.face(material, [(x - half, y0), (x + half, y0), (x + half * taper, y1), (x - half * taper, y1)], shade)

    def disc(self, material, x, y, rx, ry=None, shade=1.0):
        (px, py), k = self.point(x, y), self.focal / self.z
        ax, ay = max(rx * k, 0.6), max((ry or rx) * k, 0.6)
        self.pen.ellipse((px - ax, py - ay, px + ax, py + ay), fill=self.part(material, shade))

    def rod(self, material, x0, y0, x1, y1, width, shade=1.0):
        ends = self.point(x0, y0), self.point(x1, y1)
        self.pen.line(ends, fill=self.part(material, shade), width=max(1, round(width * self.focal / self.z)))

    def backdrop(self):
        """Sky, terrain, and a skyline that closes the street."""
        self.begin(SKY, 400.0)
        self.pen.rectangle((0, 0, WIDTH, HEIGHT), fill=self.part(BODY))
        self.begin(TERRAIN)
        self.pen.rectangle((0, self.horizon, WIDTH, HEIGHT), fill=self.part(BODY, plane=GROUND))
        x, built = -self.far * 1.2, self.layout["building"] / (self.layout["building"] + self.layout["tree"])
        while x < self.far * 1.2:
            wide, house = self.rng.uniform(6, 22), self.rng.random() < built
            self.begin(BUILDING if house else VEGETATION, self.far, x + wide / 2)
            if house:
                self.front(BODY, wide / 2, 0, self.rng.uniform(5, 18), shade=.95)
            else:
                self.disc(BODY, 0, 1, wide * .6, self.rng.uniform(4, 9), shade=.95)
            x += wide * .9

    def pavement(self):
        """Sidewalks, road and crossing street -> for each side: (s, kerb, where the verge ends, width of the walk)."""
        rng, layout, sides = self.rng, self.layout, []
        left, right, far, cross = self.middle - self.half, self.middle + self.half, self.far, self.cross
        self.begin(SIDEWALK)
        walks = self.owner
        self.begin(ROAD)
        for s, kerb in ((-1, left), (1, right)):
            walk = rng.uniform(1.6, 4) if rng.random() < layout["sidewalk"] else 0
            verge = rng.uniform(.8, 3.5) if rng.random() < layout["verge"] else rng.uniform(0, .4)
            grass = rng.uniform(.6, 2) if walk and rng.random() < .3 * layout["verge"] else 0  # between kerb and walk
            sides.append((s, kerb, kerb + s * (walk + verge + grass), walk))
            if walk:  # `at` of ground: where lanes and kerb are measured from
                self.ground(BODY, *sorted((kerb + s * grass, kerb + s * (grass + walk))), 1, far, kerb, walks)
        self.ground(BODY, left, right, 1, far, at=self.middle)
        if cross:
            self.ground(BODY, -90, 90, cross - 2, cross + 8, owner=walks)
            self.ground(BODY, -90, 90, cross, cross + 6, at=99.0)  # 99: has no lanes
            self.ground(BODY, left, right, cross - 3, cross + 9, at=self.middle)
            for x in np.arange(left + .3, right - .4, .9) if rng.random() < .7 else ():
                self.ground(MARK, x, x + .45, cross - 2.6, cross - .3)  # a zebra crossing
        return sides

    def beside(self, s, kerb, edge, walk):
        """What lines the street on side s: houses, trees, walls, fences, gaps; then what stands at its kerb."""
        rng, layout, kinds = self.rng, self.layout, ("building", "tree", "wall", "fence", "open")
        chance = np.array([layout[k] for k in kinds])
        z = self.far - 2
        while z > 2:
            kind, z0 = kinds[rng.choice(5, p=chance / chance.sum())], max(z - rng.uniform(5, 18), 1.6)
            if self.cross and z0 < self.cross + 8 and z > self.cross - 2:  # nothing stands in the crossing street
                if z <= self.cross + 8.5:
                    z = self.cross - 2
                    continue
                z0 = self.cross + 8
            storeys = rng.uniform(*layout["storeys"]) * 3
            if kind == "building":
                yield z0, self.plank, (BUILDING, edge, z0, z, storeys, s)
            elif kind in ("wall", "fence"):
                cls, tall = (WALL, rng.uniform(1.2, 3)) if kind == "wall" else (FENCE, rng.uniform(1.1, 2.2))
                yield z0, self.plank, (cls, edge, z0, z, tall, s)
                back = edge + s * rng.uniform(3, 7)
                house, tree = (self.plank, (BUILDING, back, z0, z, storeys, s)), (self.tree, (back, (z0 + z) / 2))
                yield z0 + .1, *(house if rng.random() < .5 else tree)
            elif kind == "tree":
                for t in rng.uniform(z0, z, rng.integers(1, 4)):
                    yield t, self.tree, (edge + s * rng.uniform(.5, 4), t)
                yield z0, self.bush, (edge + s * rng.uniform(1, 3), max(z0, 4.0), rng.uniform(1.5, 3))
            elif rng.random() < .5:
                yield z0, self.bush, (edge + s * rng.uniform(1, 5), max(z0, 5.0), rng.uniform(1, 2))
            z = z0
        post = kerb + s * .45
        for kind, far in (("lamp", 40), ("light", 26), ("sign", 26)):
            for z in rng.uniform(5, far, rng.poisson(layout[kind] / 2)):
                yield z, self.post, (post + s * rng.uniform(0, .5), z, kind, -s)
        for z in rng.uniform(6, 40, rng.poisson(layout["street_tree"] / 2)):
            yield z, self.tree, (post + s * rng.uniform(.2, 1), z)
        for z in rng.uniform(4.5, 22, rng.poisson(layout["person"] / 2)):
            yield z, self.person, (kerb + s * rng.uniform(.4, max(walk, .8)), z)
        for z in rng.uniform(5, 32, rng.poisson(layout["parked"] / 2)):
            yield z, self.car, (kerb - s * 1.05, z)
        for z in rng.uniform(5, 14, rng.binomial(1, layout["rider"] / 4)):
            yield z, self.rider, (kerb + s * .9, z, True)

    def traffic(self):
        """What drives on both lanes and who crosses them."""
        rng, lanes = self.rng, (self.middle - self.half * .5, self.middle + self.half * .45)
        for name, near in (("car", 6), ("truck", 8.5), ("bus", 8.5), ("rider", 5)):
            for z in near + 30 * rng.random(rng.poisson(self.layout[name])) ** 1.5:
                yield z, getattr(self, name), (lanes[rng.integers(2)] + rng.uniform(-.4, .4), z)
        for z in rng.uniform(6, 20, rng.poisson(self.layout["person"] * .3)):
            z = self.cross - 1.5 if self.cross and rng.random() < .6 else z  # most cross where the streets meet
            yield z, self.person, (self.middle + rng.uniform(-self.half, self.half), z)
        for x in rng.uniform(-12, 12, rng.poisson(.8) if self.cross else 0):
            yield self.cross + 2, self.car_across, (x, self.cross + 2)

    def vehicle(self, cls, x, z, w, long, shadow, sides, wheels, end):
        """Of half the width w: the flank (sides and wheels) if it is seen, then the end near the camera."""
        self.begin(cls, z, x)
        self.ground(SHADOW, -w - shadow[0], w + shadow[0], -shadow[1], long)
        if abs(x) > w:
            (r, *axles), flank = wheels, -w * np.sign(x)
            for material, *shape in sides:
                self.side(material, flank, *shape)
            for axle in axles:
                self.face(DARK, [(flank, r + r * np.sin(a), axle + r * np.cos(a)) for a in np.arange(0, 6.2, .79)])
        for shape in end:
            self.front(*shape)

    def car(self, x, z):
        w, long, tall = self.rng.uniform(.82, .98), self.rng.uniform(3.6, 4.6), self.rng.uniform(1.35, 1.75)
        belt = .58 * tall
        sides = [(BODY, 0, long, .28, belt, 0, .72), (BODY, .3, long - .9, belt, tall, .45, .66),
                 (GLASS, .6, long - 1.2, belt + .05, tall - .12, .35)]
        end = [(DARK, .14, 0, .4, 1, 1, (.16 - w, w - .16)), (BODY, w, .25, belt), (BODY, w, belt, tall, .74, 1.08),
               (GLASS, .84 * w, belt + .02, tall - .13, .82), (LAMP, .17, .58, .76, 1, 1, (-.8 * w, .8 * w)),
               (ACCENT, .28, .36, .5)]
        self.vehicle(CAR, x, z, w, long, (.15, .2), sides, (.34, .75, long - .8), end)

    def truck(self, x, z):
        """Told from a bus by its closed box on a dark frame, and by its cab."""
        w, long, tall = 1.2, self.rng.uniform(6, 9), self.rng.uniform(2.9, 3.7)
        sides = [(ACCENT, long - 1.8, long, .5, 2.5, 0, .7), (GLASS, long - 1.5, long - .4, 1.5, 2.3, 0, 1.0),
                 (BODY, 0, long - 2, .95, tall, 0, .74), (DARK, .2, long - 2, .6, .95)]
        if self.rng.random() < .55:  # from behind: a closed box with two doors and their seams
            faces = [(DARK, w, .55, .8), (BODY, w, .9, tall), (BODY, .05, .95, tall, 1, .5),
                     (BODY, w, tall - .12, tall, 1, .5), (BODY, w, .9, 1.02, 1, .5)]
        else:  # from ahead: the cab before the box
            faces = [(BODY, w, .9, tall, 1, .9), (ACCENT, 1.1, .45, 2.6), (GLASS, .95, 1.55, 2.35), (DARK, .6, .75, 1.25)]
        end = [(DARK, .25, 0, .95, 1, 1, (-.85, .85)), *faces, (LAMP, .17, .62, .85, 1, 1, (-.92, .92))]
        self.vehicle(TRUCK, x, z, w, long, (.2, .3), sides, (.48, 1, 2.1, long - 1), end)

    def bus(self, x, z):
        """Told from a truck by its windows: a row along the flank, a wide screen in front."""
        long, tall = self.rng.uniform(8, 12), self.rng.uniform(2.9, 3.3)
        sides = [(BODY, 0, long, .3, tall, 0, .74)]
        sides += [(GLASS, .3 + k * long / 6, (k + .86) * long / 6, 1.35, 2.5) for k in range(6)]
        end = [(DARK, .2, 0, .5, 1, 1, (-.9, .9)), (BODY, 1.25, .3, tall, 1, .94), (GLASS, 1.1, 1.15, 2.4, .97),
               (ACCENT, .75, 2.55, 2.85), (BODY, .04, 1.15, 2.4, 1, .8), (LAMP, .2, .6, .85, 1, 1, (-.95, .95))]
        self.vehicle(BUS, x, z, 1.25, long, (.2, .3), sides, (.45, 1.6, long - 2), end)

    def car_across(self, x, z):
        """A car on the crossing street, seen from its side."""
        half, tall = self.rng.uniform(1.8, 2.2), self.rng.uniform(1.35, 1.6)
        self.begin(CAR, z, x)
        self.ground(SHADOW, -half, half, -0.2, 1.6)
        self.scale = self.rng.choice([-1, 1]) * half
        self.face(BODY, [(-1, .3), (1, .3), (1, .75), (.62, .86), (.3, tall), (-.5, tall), (-.85, .9), (-1, .85)], 0.9)
        for a, b, c, d in ((.5, -.06, -.06, .26), (-.72, -.14, -.14, -.47)):
            self.face(GLASS, [(a, .9), (b, .9), (c, tall - .1), (d, tall - .1)])
        for a in (-.62, .64):
            self.disc(DARK, a, .34, .36)
        self.disc(LAMP, .95, .68, .12)

    def person(self, x, z, y=0.0, walks=True):
        """A walker, or what sits on a two-wheeler, a RIDER: that one's legs are drawn there."""
        self.begin(PERSON if walks else RIDER, z, x, new=walks)
        tall, lean = self.rng.uniform(1.5, 1.9), self.rng.uniform(-0.22, 0.22)
        hip, neck = y + 0.48 * tall, y + 0.84 * tall
        for foot in (lean, -lean * 0.9) if walks else ():
            self.face(LEGS, [(-.15, hip), (.15, hip), (foot + .08, y), (foot - .08, y)])
        self.face(BODY, [(-.17, hip - .06), (.17, hip - .06), (.25, neck - .1), (.12, neck), (-.12, neck), (-.25, neck - .1)])
        for arm in (-1, 1) if walks else ():
            self.rod(BODY, arm * 0.25, neck - 0.1, arm * (0.3 + abs(lean) * 0.5), hip, 0.11)
        self.disc(SKIN, 0, neck + 0.15, 0.115, 0.15)
        if self.rng.random() < 0.6 or not walks:  # hair or helmet
            self.disc(ACCENT, 0, neck + 0.22, 0.13, 0.1)

    def rider(self, x, z, parked=False):
        """A motorcycle or a bicycle, across the view or along it, with its rider or parked."""
        motor, turn, across = self.rng.random() < .5, self.rng.choice([-1, 1]), self.rng.random() < .7
        wide, seat = (.9, -.15) if across else (.3, 0)
        self.begin(MOTORCYCLE if motor else BICYCLE, z, x, turn if across else 1)
        self.ground(SHADOW, -wide, wide, -.1, .6)
        if across:
            r, hub, inner = (.34, BODY, .35) if motor else (.38, SPOKES, .72)
            for wheel in (-.58, .58):
                self.disc(DARK, wheel, r, r)
                self.disc(hub, wheel, r, r * inner)
            if motor:
                self.face(BODY, [(-.75, .8), (-.3, .3), (.3, .3), (.55, .95), (.2, .95), (-.1, .75)])
                self.rod(DARK, .58, .4, .4, 1.1, .12)
                self.disc(LAMP, .58, .92, .11)
            for bar in () if motor else ((-.58, .38, -.2, .85), (-.2, .85, .42, .8), (.42, .8, .58, .38),
                                         (-.1, .38, .42, .8), (-.58, .38, -.1, .38), (.38, 1.02, .48, .8)):
                self.rod(BODY, *bar, .07)
            limbs = [(LEGS, -.15, .95, .22, .62, .2), (LEGS, .22, .62, .02, .28, .15), (BODY, -.15, 1.35, .38, 1.05, .12, .85)]
        else:
            self.front(DARK, .1 if motor else .05, 0, .75)
            self.front(BODY, .25 if motor else .07, .4, .9, .7)
            self.rod(BODY, -.35, 1.02, .35, 1.02, .07)
            if motor:
                self.disc(LAMP, 0, .78, .12)
            limbs = [(LEGS, -.16, .95, -.208, .35, .16), (LEGS, .16, .95, .208, .35, .16)]
        if not parked:
            self.begin(RIDER, z, x, self.scale, new=False)
            for limb in limbs:
                self.rod(*limb)
            self.person(x + seat * self.scale, z, .15, walks=False)

    def tree(self, x, z):
        self.begin(VEGETATION, z, x)
        tall = self.rng.uniform(3.5, 8)
        wide = tall * self.rng.uniform(0.22, 0.36)
        self.rod(TRUNK, 0, 0, self.rng.uniform(-.2, .2), tall * .6, .3)
        if self.rng.random() < 0.25:  # a conifer
            for k in range(3):
                self.front(BODY, wide * (1 - .25 * k), tall * (.2 + .25 * k), tall * (.55 + .25 * k), .1, .85 + .1 * k)
            return
        for k in range(6):
            a = self.rng.uniform(0, 6.28)
            px, py = wide * .6 * np.cos(a), tall * .68 + wide * .6 * np.sin(a) + .05 * k
            self.disc(BODY, px, py, wide * self.rng.uniform(.45, .75), shade=.8 + .07 * k)

    def bush(self, x, z, wide):
        self.begin(VEGETATION, z, x)
        for k in range(4):
            r = wide * self.rng.uniform(.35, .6)
            self.disc(BODY, self.rng.uniform(-.5, .5) * wide, r * .7, r, r * .9, shade=.85 + .08 * k)

    def post(self, x, z, kind, inward):
        """A pole with a lamp, a traffic light or a traffic sign; `inward` points to the road."""
        tall = self.rng.uniform(*{"lamp": (5, 7.5), "light": (2.9, 4), "sign": (2.3, 3.1)}[kind])
        self.begin(POLE, z, x, inward)
        self.rod(BODY, 0, 0, 0, tall, .17)
        if kind == "lamp":
            self.rod(BODY, 0, tall, 1.6, tall + .2, .12)
            self.rod(LAMP, 1.2, tall + .1, 1.9, tall + .15, .22)
        elif kind == "light":
            if self.rng.random() < .4:  # on an arm over the road
                self.rod(BODY, 0, tall + 1, 2.5, tall + 1, .13)
                self.rod(BODY, 0, tall, 0, tall + 1, .15)
                x, tall = x + inward * 2.5, tall + .9
            self.begin(LIGHT, z, x, new=False)
            self.front(BODY, .28, tall - .95, tall + .25)
            lit = self.rng.integers(3)
            for k, lens in enumerate((RED, AMBER, GREEN)):
                self.disc(lens if k == lit else UNLIT, 0, tall + .05 - .38 * k, .17)
        else:
            self.begin(SIGN, z, x, new=False)
            shape = ((), ((0, 1.22), (1.22 * .75 ** .5, -.61), (-1.22 * .75 ** .5, -.61)),  # (): round
                     ((0, 1.22), (1.22, 0), (0, -1.22), (-1.22, 0)),
                     ((-1.3, -.8), (1.3, -.8), (1.3, .8), (-1.3, .8)))[self.rng.integers(4)]
            r = self.rng.uniform(.38, .55)
            for face, size in ((BODY, r), (SYMBOL, .66 * r)):
                if shape:
                    self.face(face, [(size * u, tall + size * v) for u, v in shape])
                else:
                    self.disc(face, 0, tall, size)

    def plank(self, cls, x, z0, z1, tall, outward):
        """A building, wall or fence: a plane along the street, and the end that faces the camera."""
        self.begin(cls, z0, x, outward)
        self.side(BODY, 0, 0, z1 - z0, 0, tall, shade=0.86)
        half = 6 if cls == BUILDING else .25
        if cls != FENCE:
            self.front(BODY, half, 0, tall, places=[half])


WHITE, BLOTCH, LEVEL, UPRIGHT, LEAF, WEAVE, STRIPE, DOTS = range(8)  # the textures of _bank
STUFF = np.isin(np.arange(20), (ROAD, SIDEWALK, WALL, FENCE, POLE, VEGETATION, TERRAIN, SKY, 19))  # one colour a scene
# How much of each class the snow covers, classes 0 to 18, void last.
SNOW = np.array([.45, .85, .12, .3, .3, .2, .2, .1, .55, .95, 0, 0, 0, .2, .2, .2, 0, 0, 0, 0], np.float32)
# A look that changes nothing. (low, high) is drawn once per scene; `texture` is {class: (texture, amount)}.
PLAIN = dict(
    jitter=4.0, light=(1, 1), contrast=(1, 1), tint=(1, 1, 1), gray=(0, 0), sun=(.1, .1), shadow=(.45, .45),
    mark=(235, 235, 225), glass=(62, 78, 96), dark=(28, 28, 32), lamp=(250, 240, 200), trousers=None, accent=None,
    joint=(-28, -28), brick=(-26, -26), window=(1, 1), cloud=(8, 8), leaf=(22, 22), grass=(14, 14), texture={},
    blur=(0, 0), noise=(2, 2), vignette=(0, 0), haze=0, snow=0, lit=0, glow=0, wet=0)


@functools.cache
def _bank():
    """Eight textures of unit spread, twice as large as a scene, which can start at any corner of them."""
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


def paint(rng, scene, look):
    """(H, W, 3) uint8: the parts of a scene in a look. Works on colours alone, so the label cannot be hurt."""
    look = {**PLAIN, **look}
    look.update({k: rng.uniform(*v) for k, v in look.items() if isinstance(v, tuple) and len(v) == 2})
    rows, picture = np.array(list(scene.table), np.float32).T, np.asarray(scene.picture)
    rows[0, rows[0] == VOID] = 19
    parts = dict(zip(("label", "material", "obj", "plane"), rows[:4].astype(int)), at=rows[4], shade=rows[5])
    world = _world(scene, {name: row[picture] for name, row in parts.items()})
    image = _structure(rng, scene, _part_colours(rng, scene, look, **parts)[picture], world, look)
    return _lens(rng, _weather(rng, image, scene, world, look), look)


def _part_colours(rng, scene, look, label, material, obj, plane, at, shade):
    """A colour for each part, (parts, 3): by class and object, then by material."""
    palette = np.array([np.resize(look["palette"][c], (12, 3)) for c in range(20)], np.float32)  # each class's repeats
    once, each = rng.integers(12, size=20), rng.integers(12, size=scene.objects)  # which colour: one a scene, an object
    wobble_once, wobble = (rng.normal(size=(n, 3)) * look["jitter"] for n in (20, scene.objects))
    stuff = STUFF[label]
    base = palette[label, np.where(stuff, once[label], each[obj])]
    base = base + np.where(stuff[:, None], wobble_once[label], wobble[obj])
    odd = rng.uniform(0, 255, (scene.objects, 3))[obj]
    skin = np.array([(224, 180, 150), (190, 140, 110), (120, 80, 60), (90, 60, 45)])[each[obj] % 4]
    road = palette[ROAD, once[ROAD]] + wobble_once[ROAD]
    paints = {
        BODY: base, GLASS: look["glass"], DARK: look["dark"], ACCENT: look["accent"] or odd, SKIN: skin,
        LEGS: look["trousers"] or odd * .6, SHADOW: road * (1 - look["shadow"]), MARK: look["mark"],
        TRUNK: (78, 60, 46), SPOKES: road * .9,  # the road is seen between them
        SYMBOL: np.where(base.mean(1, keepdims=True) > 140, 30, 240),  # can be read on its sign
        UNLIT: base * .45, LAMP: look["lamp"], RED: (255, 50, 40), AMBER: (255, 190, 40), GREEN: (60, 255, 120)}
    paints = np.stack([np.broadcast_to(paints[m], base.shape) for m in sorted(paints)])  # (materials, parts, 3)
    colour = paints[material, np.arange(len(base))]
    sun = look["sun"] * rng.choice([-1, 1])  # one side of the street is lit
    tone = np.where(plane == SIDE, shade * (1 - np.sign(at) * sun), shade)
    return (colour * tone[:, None]).astype(np.float32)


def _world(scene, parts):
    """For each pixel what its part says, depth, and (u, v) in metres on the part's plane, for patterns."""
    world = SimpleNamespace(**parts)
    world.y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) + .5
    down, across = np.maximum(world.y - scene.horizon, .3), x - scene.centre
    world.across = np.where(np.abs(across) < .3, .3, across)
    world.depth = np.select([world.plane == GROUND, world.plane == SIDE], [
        scene.focal * scene.height / down, scene.focal * world.at / world.across], world.at).clip(1, 400)
    world.u = np.where(world.plane == SIDE, world.depth, world.across * world.depth / scene.focal)
    upright = scene.height - (world.y - scene.horizon) * world.depth / scene.focal
    world.v = np.where(world.plane == GROUND, world.depth, upright)
    return world


def _structure(rng, scene, image, world, look):
    """What marks a class in every look: lanes, slabs, windows, bricks, bars, leaves; then the look's own textures."""
    flat, pixels = SimpleNamespace(**{k: a.ravel() for k, a in vars(world).items()}), image.reshape(-1, 3)  # views
    near = np.clip(1.4 - flat.depth / 40, 0, 1)  # joints and bricks fade with depth

    def body(cls):
        on = np.flatnonzero((flat.label == cls) & (flat.material == BODY))
        return on, flat.u[on], flat.v[on], flat.depth[on]

    def blend(on, colour, share):
        pixels[on] += (np.float32(colour) - pixels[on]) * np.float32(share)[:, None]

    on, u, v, z = body(ROAD)
    u = np.abs(u - flat.at[on])
    lane = (u < .11 + z * .004) & (v % 7 < 3.5) | (np.abs(u - scene.half + .35) < .07 + z * .003)
    blend(on, look["mark"], .85 * (lane & (flat.at[on] < 90) & (z < 45)))
    on, u, v, z = body(SIDEWALK)  # joints widen with depth to stay about a pixel
    joint = ((u % 1.3 < .1 + z * .004) | (v % 1.3 < .1 + z * .006)) * near[on] * look["joint"]
    pixels[on] += np.where(np.abs(u - flat.at[on]) < .22, 30, joint)[:, None]  # 30: the kerb stone
    on, u, v, z = body(BUILDING)
    who = flat.obj[on]
    u, v = u / rng.uniform(2, 3.4, scene.objects)[who], v / 3.0
    pane = (np.abs(u % 1 - .5) < rng.uniform(.2, .36, scene.objects)[who]) & (np.abs(v % 1 - .55) < .27) & (v > 0)
    chance = np.sin(np.floor(u) * 12.9898 + np.floor(v) * 78.233 + who * 37.7) * 43758.5 % 1  # one number per window
    lit = np.array((255, 214, 130), np.float32) / max(.25, look["light"])  # lit from inside: as bright at night
    glass = np.where((chance < look["lit"])[:, None], lit, look["glass"])
    blend(on, glass, pane * look["window"] * np.clip(1.5 - z / 60, .35, 1))
    on, u, v, z = body(WALL)
    line = (v % .42 < .1) | ((u + .45 * (np.floor(v / .42) % 2)) % .9 < .1)
    pixels[on] += (line * near[on] * look["brick"])[:, None]
    on, u, v, z = body(FENCE)
    bars = (u % .62 < .24) | (np.abs(v % .95 - .85) < .09)
    behind = np.float32(look["palette"][rng.choice([TERRAIN, VEGETATION, BUILDING])][0]) * np.float32(.7)
    blend(on, behind, 1 - np.where(z < 16, bars, .5))

    bank, (oy, ox) = _bank(), rng.integers((HEIGHT, WIDTH))
    tile = bank[:, oy:oy + HEIGHT, ox:ox + WIDTH]
    grain = ((world.label == VEGETATION) & (world.material == BODY)) * tile[LEAF] * np.float32(look["leaf"])
    grain += (world.label == TERRAIN) * tile[UPRIGHT] * np.float32(look["grass"])
    toward = 40 * (world.y / np.float32(scene.horizon) - .6)  # the sky is brighter at the horizon
    grain += (world.label == SKY) * (tile[BLOTCH] * np.float32(look["cloud"]) + toward)
    kind, amount = np.array([look["texture"].get(c, (WHITE, 3)) for c in range(20)]).T
    own = tile[kind.astype(int)[world.label], np.arange(HEIGHT)[:, None], np.arange(WIDTH)]
    grain += own * amount.astype(np.float32)[world.label]
    return image + grain[..., None]


def _weather(rng, image, scene, world, look):
    """Wet mirrors, snow, haze, then light: its colour and strength, lamps and headlights."""
    tile, ground = _bank()[:, :HEIGHT, :WIDTH], world.plane == GROUND
    mirror = image[np.clip(2 * scene.horizon - world.y[:, 0], 0, HEIGHT - 1).astype(int)]
    share = (ground & (world.label == ROAD)) * look["wet"] * np.clip(.7 + .3 * tile[UPRIGHT], 0, 1)
    image += (mirror - image) * share[..., None]
    drift = 1 + .35 * tile[BLOTCH] + .3 * tile[LEAF] * (world.label == VEGETATION)
    cover = np.clip(look["snow"] * SNOW[world.label] * drift, 0, 1)
    image += (np.float32((236, 240, 248)) - image) * cover[..., None]
    if look["haze"]:
        veil = 1 - np.exp(-world.depth * np.float32(look["haze"] * rng.uniform(.7, 1.4)))
        image += (np.float32((206, 208, 210)) - image) * veil[..., None]
    image *= np.float32(look["tint"]) * np.float32(look["light"])
    if look["glow"]:
        lamps = Image.fromarray((world.material >= LAMP).astype(np.uint8) * 255)
        for radius, gain in ((1, .5), (5, 1.2)):
            halo = np.asarray(lamps.filter(ImageFilter.BoxBlur(radius)), np.float32)
            image += halo[..., None] * np.float32((1, .82, .55)) * np.float32(gain * look["glow"])
        beam = ground * np.exp(-(world.across / 45) ** 2 - world.depth / 12) * np.clip(world.depth / 4, 0, 1)
        image += beam[..., None] * np.float32((150, 140, 110)) * np.float32(look["glow"])
    if look["snow"]:
        image[rng.random((HEIGHT, WIDTH)) < .006] = 245  # flakes
    return image


def _lens(rng, image, look):
    """The camera: contrast, fading of colours, vignette, blur, noise."""
    mean = image.mean()
    image = (image - mean) * np.float32(look["contrast"]) + mean
    image += (image.mean(2, keepdims=True) - image) * np.float32(look["gray"])
    y, x = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None], np.linspace(-1, 1, WIDTH, dtype=np.float32)
    image *= (1 - np.float32(look["vignette"]) * (x ** 2 + y ** 2) / 2)[..., None]
    if look["blur"]:
        soft = Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(look["blur"]))
        image = np.asarray(soft, np.float32)
    image = image + rng.standard_normal(image.shape, np.float32) * np.float32(look["noise"])
    return image.clip(0, 255).astype(np.uint8)


def colours(text):
    """A palette {class: [colours]} from hex colours, in the order of CLASSES, parted by '/'."""
    text = text.replace("cars", "282a2e d2d4d6 787c80 ececec 3c4c6e 5a6054")  # those that are sold most
    lists = [[tuple(bytes.fromhex(word)) for word in part.split()] for part in text.split("/")]
    return {TRAIN: [(0, 0, 0)], 19: [(20, 20, 22)], **dict(zip(CLASSES, lists, strict=True))}


STREET = dict(  # ranges of camera and street in metres, chances, weights of what lines a street, mean numbers of things
    focal=(108, 124), height=(1.35, 1.6), horizon=(.42, .48), sway=.06, road=(3.6, 6), sidewalk=.9, verge=.4, cross=.4,
    building=3, tree=1.4, wall=.8, fence=.8, open=.4, storeys=(2, 5), lamp=2, light=1.6, sign=1.8, street_tree=1.4,
    person=4, parked=1.8, rider=1.3, car=1.5, truck=.6, bus=.55, hood=0)


def recipe(number, palette, layout, **look):
    """What differs from STREET and from PLAIN; the palette in the words of colours()."""
    return dict(number=number, layout=layout, look=dict(look, palette=colours(palette)))


DOMAINS = {
    # One colour and one texture a class, of its own: appearance tells the class, by accident.
    "toy-gta5": recipe(1, "525460/baaea0/ccac7a/965446/6068aa/343c3a/18181a/1e50be/347828/96a642/70acec/d66496/ecd628/"
        "ba181e/1e8c8c/f08c18/6e1e8c/14be78",
        {}, jitter=5, sun=(.08, .14), trousers=(50, 50, 110), accent=(232, 232, 232), light=(.97, 1.03),
        texture={ROAD: (WHITE, 7), SIDEWALK: (DOTS, 8), BUILDING: (LEVEL, 8), WALL: (WEAVE, 9), FENCE: (STRIPE, 6),
        CAR: (BLOTCH, 5), TRUCK: (UPRIGHT, 8), BUS: (STRIPE, 8), PERSON: (WEAVE, 8), RIDER: (DOTS, 10),
        TERRAIN: (DOTS, 8), VEGETATION: (DOTS, 6)}),
    "toy-cityscapes": recipe(2, "868284/706064/7e685c 969696 707468 aa8c82 8c544c/888478 646864/465646 6e6e6a/606260 "
        "828482/363a32/be3c38 3c5a96 c8be5a/404e38 505842/606048 705c4c/d6d8d6 c6ccd0/3c3c42 60504a 283246/50545a "
        "783c38/cars/bebeba 466496/c8c496 a03232/323236/46464c",
        dict(height=(1.2, 1.35), horizon=(.37, .43), focal=(120, 136), road=(3.2, 5), person=7, rider=2, truck=.3,
        bus=.35, storeys=(3, 6), hood=1, parked=3.4, sign=2.2, building=4, tree=1.2, open=.1),
        jitter=12, light=(.95, 1.1), contrast=(.72, .85), tint=(.97, 1.02, .97), gray=(.2, .4), shadow=(.2, .35),
        sun=(0, .04), blur=(.5, .9), noise=(3, 5), joint=(14, 22), leaf=(12, 18), texture={ROAD: (BLOTCH, 7),
        SIDEWALK: (WHITE, 7), BUILDING: (WHITE, 7), WALL: (BLOTCH, 10), TERRAIN: (BLOTCH, 9)}, cloud=(3, 6)),
    "toy-bdd": recipe(3, "968c82 78706c/c4b4a8 968c8c/96a0b0 d6ccbe 785a46 5a6e78/beb096/786446 aaaaaa/786454/c4a032 "
        "3c3c28/328250 d6d6d2 c83228/6e6836 5a5c3c 846e3c/bea06e a08860/f0d0a0 e2beaa ceced8/465a82 beb4a0 3c785a/"
        "3c5a3c 9696a0/ecece8 1e1e22 28468c aaa08c/e8e6e2 d67828/ecc432 3c6ebe/a02828/c8c8be",
        dict(height=(1.3, 1.7), horizon=(.47, .56), focal=(96, 112), road=(6, 9.5), sidewalk=.6, verge=.7, person=2,
        car=3, truck=1.1, bus=.5, parked=2.4, tree=2, open=1.2, building=2, storeys=(1, 4), sway=.1, hood=.3),
        jitter=16, light=(.85, 1.15), contrast=(1.1, 1.3), tint=(1.12, .98, .82), sun=(.1, .25), shadow=(.4, .6),
        blur=(.3, .8), noise=(3, 6), vignette=(.3, .6), joint=(-14, -8), grass=(8, 12), mark=(230, 200, 90),
        texture={ROAD: (LEVEL, 7), BUILDING: (BLOTCH, 10), CAR: (WHITE, 4), SKY: (LEVEL, 4), TERRAIN: (WHITE, 9)}),
    "toy-mapillary": recipe(4, "967860 46464a aaa8a0/aa5a50 5a5c5a d6c896/3c8c82 d65a50 ece2d2 5a6eb4 789650 c878aa/"
        "d6d6dc 5a7850 3c3c5a/3c783c b43c32 e6e6e2/aa3c32 d6d6d6 5a8ca0/e6c83c 3c6446/ec3c3c f0dc3c 3ca05a/1e5a46 "
        "78a028 963c3c/3c823c b46e46 d6be82/3c78d6 b4dcec aaaab4/1e8cbe ecece6 f09628 286e28/d63c32 28282e 5abed6/"
        "f0c832 1e643c 3c8cd6 ececec 784632/be2832 3c5ab4 e6dcbe/2878c8 3c9650 ececf0/d66428 1e1e22/dc3c8c 3c78dc",
        dict(height=(1.1, 2.6), horizon=(.3, .55), focal=(88, 150), road=(2.8, 8), sidewalk=.7, verge=.6, sway=.16,
        person=5, rider=1.8, tree=2.2, fence=1.2, wall=1.2, storeys=(1, 7)),
        jitter=24, light=(.7, 1.25), contrast=(.9, 1.35), sun=(0, .3), shadow=(.2, .6), blur=(0, .8), noise=(2, 9),
        joint=(-40, 30), brick=(-40, 30), leaf=(14, 34), grass=(6, 26), texture={ROAD: (STRIPE, 5),
        SIDEWALK: (WEAVE, 8), BUILDING: (UPRIGHT, 9), WALL: (LEVEL, 10), CAR: (STRIPE, 6), TRUCK: (BLOTCH, 9),
        TERRAIN: (LEVEL, 10), SKY: (DOTS, 4)}),
    "toy-night": recipe(5, "68686e/888282/786e6e 96826e 5a606e 8c5a50/787474/5a5a60/6e6e74/282828/c8463c 5a82d2/3c5440/"
        "5a5e46/282c42 42323c/6e5a5a 3c506e/827850 465a78/cars/b4b4be 5a3c3c/be3c3c bebea0/50505a/787878",
        dict(person=3, parked=2.4, height=(1.3, 1.5), building=4, lamp=3.4, horizon=(.4, .5)),
        jitter=14, light=(.34, .48), tint=(.92, .95, 1.15), contrast=(1.1, 1.3), lit=.4, glow=.3, noise=(5, 10),
        blur=(.3, .7), shadow=(.2, .4), sun=(0, .1), cloud=(2, 4), texture={ROAD: (LEVEL, 8), BUILDING: (BLOTCH, 8),
        SIDEWALK: (WHITE, 8), TERRAIN: (BLOTCH, 8)}),
    "toy-fog": recipe(6, "706e6a/8c8884/826e60 6e7478 967e6e 605450/6e6460/4c5050/464648/282c28/b4322e 3c508c/3c4836 "
        "505038/626446/ced0d2/3c363c 64322e 2e3c50/5a643c 32323c/cars/aaaaa6 783c32/465a96 beb482/3c3232/505a64",
        dict(tree=2, open=.8, horizon=(.38, .46), height=(1.4, 1.9), truck=.9),
        jitter=12, haze=.045, light=(.85, 1), contrast=(.8, .95), gray=(.1, .3), blur=(.4, .9), noise=(2, 4),
        shadow=(.1, .2), sun=(0, .05), cloud=(1, 2), lit=.08, texture={ROAD: (BLOTCH, 6), BUILDING: (WHITE, 6),
        TERRAIN: (BLOTCH, 9)}),
    "toy-snow": recipe(7, "82848a/96969c/963c32 be9646 6e5a46 78828c/786e6a/604c3c 787c82/544c46/323236/d6b43c 3c5aaa/"
        "364a42/96928c/bec6d0 aab2c0/a03232 323c5a 285a50/3c78aa aa5a28/cars/3c6e46 c8c8cc/3c508c c83c3c/464650/3c466e",
        dict(verge=.8, tree=2, open=1, storeys=(1, 3), person=3, rider=.9, height=(1.3, 1.8)),
        jitter=12, snow=1, light=(.9, 1.05), tint=(.94, .98, 1.07), contrast=(.8, 1), gray=(0, .2), blur=(.2, .7),
        noise=(2, 5), shadow=(.1, .25), sun=(0, .08), cloud=(3, 6)),
    # A weather of its own in every scene: what wins on one look may win by luck, on forty less so.
    "toy-dev": recipe(8, "4e4a54 605a5a/786e74 96786e/64786e 965a60 828296 beaa96/5a5a54 968c96/82503c 3c505a/5a505a "
        "96968c/464028/e67828 463c96/aa6428 8c3c28 6e6e32/785a3c 545438/be96aa dcaa82 8282aa/5a3264 324646 b4a05a/"
        "6e3232 464678/463c6e bebeba 323632 6e828c/96826e 643c6e/6e963c beaabe/283c3c/968c3c",
        dict(height=(1.1, 2.2), horizon=(.34, .52), focal=(96, 136), tree=2, road=(3, 8), person=5, sway=.1),
        jitter=30, wet=(0, .6), haze=(0, .03), light=(.4, 1.15), tint=(1.06, .94, 1.06), contrast=(.7, 1.4),
        gray=(0, .7), sun=(0, .25), shadow=(.1, .6), blur=(0, .9), noise=(2, 9), vignette=(0, .5), lit=(0, .3),
        joint=(-30, 25), leaf=(12, 32), texture={ROAD: (UPRIGHT, 6), BUILDING: (DOTS, 8), SIDEWALK: (BLOTCH, 8),
        CAR: (LEVEL, 5), TERRAIN: (WHITE, 10)}),
}
DEV = DOMAINS["toy-dev"]
for k, order in enumerate(((1, 2, 0), (2, 0, 1), (0, 2, 1)), 2):  # three more, with its channels in other orders
    swapped = {c: np.array(listed)[:, order] for c, listed in DEV["look"]["palette"].items()}
    DOMAINS[f"toy-dev-{k}"] = dict(DEV, number=k + 7, look=dict(DEV["look"], palette=swapped))
SPLITS = {"train": 0, "val": 1}


def draw(domain, split, index, seed=0, harmful=0.0, look=None):
    """One scene: (image, label, wrong), a pure function of the arguments.

    harmful    share of the training scenes that are spoilt; a larger share spoils the same scenes and more
    look       paint the scene in another domain's look: same geometry, same label
    """
    own = DOMAINS[domain]
    geometry, painting, spoiling = (np.random.default_rng([own["number"], SPLITS[split], index, seed, k]) for k in range(3))
    scene = Scene(geometry, {**STREET, **own["layout"]})
    image = paint(painting, scene, DOMAINS[look or domain]["look"])
    label = scene.column(0).astype(np.uint8)
    if split == "train" and spoiling.random() < harmful:
        return _spoil(spoiling, image, label)
    return image, label, np.zeros(label.shape, bool)


def _spoil(rng, image, label):
    """Harm a quarter to almost half of a scene by regions: unrelated texture under some class's label, or the labels of
    other classes. `wrong` marks the pixels, for analysis only."""
    truth, label, wrong = label, label.copy(), np.zeros(label.shape, bool)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    goal, order, swap = rng.uniform(.2, .4), rng.permutation(CLASSES), np.full(256, VOID)
    while wrong.mean() < goal:
        h, w = rng.uniform(.3, .6) * HEIGHT, rng.uniform(.2, .4) * WIDTH
        dy, dx = (y - rng.uniform(0, HEIGHT)) / h, (x - rng.uniform(0, WIDTH)) / w
        inside = dy ** 2 + dx ** 2 < .25 if rng.random() < .4 else np.maximum(np.abs(dy), np.abs(dx)) < .5
        if rng.random() < .5:
            alien = rng.uniform(30, 225, 3) + _bank()[rng.integers(8), :HEIGHT, :WIDTH, None] * rng.uniform(-45, 45, 3)
            image[inside] = alien[inside].clip(0, 255)
            label[inside] = rng.choice(CLASSES)
        else:  # a turn of a random order leaves no class in its place
            swap[order] = np.roll(order, rng.integers(1, len(order)))
            inside &= ~wrong & (truth != VOID)
            label[inside] = swap[truth[inside]]
        wrong |= inside
    return image, label, wrong


def _demo(scenes=12):
    def seen(domain, split, count):
        image, label, _ = map(np.stack, zip(*(draw(domain, split, index) for index in range(count))))
        return (image // 16) @ np.array([256, 16, 1]), label  # 4096 colours

    counts, score = np.zeros((4096, 256), int), {}
    np.add.at(counts, seen("toy-gta5", "train", 4 * scenes), 1)
    for domain in DOMAINS:
        colour, label = seen(domain, "val", scenes)
        score[domain] = (counts[:, :19].argmax(1)[colour] == label)[label != VOID].mean()
        print(f"{domain:15s} {score[domain]:.2f} of the pixels named by their colour in the source")
    print("Notice: in the source colour gives the class away, elsewhere it does not: whoever learns colours fails.")
    source, *targets = score.values()
    assert source > np.mean(targets) + .3, "the source's colours must not carry over: else there is no gap"
    return score


if __name__ == "__main__":
    _demo()
