"""Solid things under a lamp: models of Debian's sweethome3d-furniture, read from its archives and path-traced.

The axes are those of the models: x to the right, y up, z towards the camera. Angles about the vertical are in degrees,
counterclockwise as seen from above; the camera stands at 0, its right is at 90.
"""

import math
import re
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter
from scipy.sparse import csr_array

from ldm.settings import InputError

CATALOG = "PluginFurnitureCatalog.properties"
PACKAGE = "sweethome3d-furniture 1.8"
CREASE = math.cos(math.radians(45))  # faces that meet at less than this angle are shaded as one round surface
TEXTURE = 512  # pixels of a texture's longer side at most
GAMMA = 2.2  # colours of materials are meant for a screen
METAL = 2.0  # a highlight that is this many times as light as the colour is that of a metal
DULL = 10.0  # highlights of a lower exponent (Blinn-Phong's) are as wide as diffuse light
GLOSS = 0.2  # of the light is reflected by what is no metal, at most
FIELD_DEG = 35.0  # of view
FILL = 0.72  # of the frame's width, that a thing's bounding cylinder takes at distance 1
LAMP_DISTANCE = 10.0  # in sizes of the thing
BOUNCES = 6


@dataclass(frozen=True)
class Thing:
    name: str  # "blendswap-cc-0/armchair"
    title: str  # "Armchair"
    author: str
    archive: Path
    file: str  # in the archive
    size: tuple  # width, height, depth, cm
    rotation: tuple  # nine numbers, the rows of a matrix that puts the model upright


@dataclass(frozen=True)
class View:
    turn: float  # of the thing, degrees
    height: float  # of the camera, degrees above the horizon
    distance: float  # of the camera; 1: the thing takes FILL of the frame
    light: float  # azimuth of the lamp, degrees
    light_height: float  # degrees above the horizon


@dataclass(frozen=True)
class Studio:
    """What stays as it is while the View changes. Colours are linear (R, G, B)."""

    table: float  # half its side, in sizes of the thing
    table_turn: float  # degrees
    lamp_radius: float  # in sizes of the thing: how soft shadows are
    lamp: tuple  # light of a white surface that faces it
    sky: tuple  # light of a white surface in shadow


def read_things(folder):
    """Returns: the Things of all archives (*.sh3f) in a folder and below it, sorted by name. Raises: InputError."""
    things = []
    for archive in sorted(Path(folder).rglob("*.sh3f")):
        try:
            with zipfile.ZipFile(archive) as opened:
                text = opened.read(CATALOG).decode("latin-1")
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{archive}: cannot be read as an archive with a {CATALOG} ({error})") from None
        entries = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", text, re.M):
            entries.setdefault(number, {})[key] = value
        try:
            things += [read_thing(archive, entry) for entry in entries.values()]
        except (KeyError, ValueError) as error:
            found = f"an entry without {error}" if isinstance(error, KeyError) else f"an entry that has {error}"
            raise InputError(f"{archive}: {found}; expected the archives of docs/things.md alone") from None
    return sorted(things, key=lambda thing: thing.name)


def read_thing(archive, entry):
    """Returns: the Thing of a catalog's entry, {key: text}."""
    file = entry["model"].lstrip("/")
    size = tuple(float(entry[key]) for key in ("width", "height", "depth"))
    rotation = tuple(map(float, entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()))
    author = entry["creator"].encode("latin-1").decode("unicode_escape")
    return Thing(str(Path(file).parent), entry["name"], author, archive, file, size, rotation)


def read_obj(text):
    """Read the triangles of a Wavefront OBJ file, without those of no area; polygons become fans.

    Returns: {material: (positions (3N, 3), normals (3N, 3), texture coordinates (3N, 2))}, three rows a triangle.
    """
    columns, faces, corners = {"v": [], "vt": [], "vn": []}, [], []  # of each triangle its material, and three corners
    material = ""
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key in columns:
            columns[key].append(rest.split()[: 2 if key == "vt" else 3])
        elif key == "usemtl":
            material = rest.strip()
        elif key == "f":
            polygon = [(corner + "//").split("/")[:3] for corner in rest.split()]
            for second, third in zip(polygon[1:], polygon[2:]):
                faces.append(material)
                corners += [polygon[0], second, third]
    index = np.array([[int(number or 0) for number in corner] for corner in corners]) - 1  # -1: none is given
    v, vt, vn = (np.array(own or np.zeros((0, 2 if key == "vt" else 3)), float) for key, own in columns.items())
    positions = v[index[:, 0]].reshape(-1, 3, 3)
    across = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    normals = find_normals(across, index[:, 0], np.vstack([vn, np.zeros(3)])[index[:, 2]])
    coordinates, names = np.vstack([vt, np.zeros(2)])[index[:, 1]].reshape(-1, 3, 2), np.array(faces)
    solid = np.linalg.norm(across, axis=1) > 1e-9 * np.ptp(v, axis=0).max() ** 2
    found = {}
    for name in dict.fromkeys(faces):
        own = solid & (names == name)
        if own.any():
            found[name] = tuple(part[own].reshape(-1, part.shape[-1]) for part in (positions, normals, coordinates))
    return found


def find_normals(across, vertices, given):
    """Find what each corner's surface faces, on the side that its triangle faces.

    across: (N, 3) at right angles to the triangles, as long as twice their area. vertices: (3N,), the corners' indices.
    given: (3N, 3), 0 where a file has none. Returns: (N, 3, 3) unit vectors.
    """

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-30)

    flat, given = unit(across), unit(given).reshape(-1, 3, 3)
    at = csr_array((np.ones(len(vertices)), (np.arange(len(vertices)), vertices)))
    corner, other = (at @ at.T).nonzero()  # of one vertex
    alike = (flat[corner // 3] * flat[other // 3]).sum(-1)
    near = np.abs(alike) > CREASE
    smooth = np.zeros((len(vertices), 3))
    np.add.at(smooth, corner[near], across[other[near] // 3] * np.sign(alike[near])[:, None])
    smooth, flat = unit(smooth).reshape(-1, 3, 3), flat[:, None]
    side = (given * flat).sum(-1, keepdims=True)
    return np.where(np.abs(side) > 0.1, given * np.sign(side), smooth)


def read_mtl(text):
    """Returns: {material: {key: text}} of a Wavefront MTL file."""
    materials, own = {}, {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            own = materials.setdefault(rest.strip(), {})
        else:
            own[key] = rest.strip()
    return materials


@lru_cache(1)
def load_mitsuba():
    """Returns: the module mitsuba, on one thread, so that the same seed gives the same picture. Raises: InputError."""
    if find_spec("mitsuba") is None:
        raise InputError("package mitsuba is not installed (pip install -r dataForTrain/requirements.txt)")
    import drjit
    import mitsuba

    mitsuba.set_variant("scalar_rgb")
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    drjit.set_thread_count(1)
    return mitsuba


def make_texture(pixels, raw=False):
    """Returns: mitsuba's dict of a texture of (H, W) or (H, W, 3) bytes; raw: they are no colours."""
    return {"type": "bitmap", "bitmap": load_mitsuba().Bitmap(np.array(pixels)), "raw": raw}


def make_material(material, read):
    """Returns: mitsuba's dict of a material.

    material: {key: text} of an MTL file. read: from a texture's name to its bytes, None for one that is missing.
    """

    def values(key, default):
        return [float(number) for number in material.get(key, default).split()]

    color, shine = (np.clip(values(key, "0 0 0"), 0, 1) ** GAMMA for key in ("Kd", "Ks"))
    opacity, picture = min(1.0, max(0.0, values("d", "1")[-1])), None
    if content := read(material.get("map_Kd", "")):
        picture = Image.open(BytesIO(content)).convert("RGBA")
        picture.thumbnail((TEXTURE, TEXTURE), Image.Resampling.LANCZOS)
    metal = picture is None and shine.mean() > METAL * color.mean()
    if metal:
        color = shine
    reflectance = {"type": "rgb", "value": np.clip(color, 0.01, 0.9).tolist()}
    if picture:
        reflectance = make_texture(np.asarray(picture.convert("RGB")))
    surface = {"type": "diffuse", "reflectance": reflectance}
    if shine.any() and (exponent := values("Ns", "1")[0]) > DULL:
        polish = {"type": "roughconductor", "material": "none", "alpha": max(0.15, math.sqrt(2 / (exponent + 2)))}
        polish["specular_reflectance"] = {"type": "rgb", "value": (shine if metal else np.ones(3)).tolist()}
        weight = 0.9 if metal else GLOSS * shine.mean()
        surface = {"type": "blendbsdf", "weight": weight, "bsdf_0": surface, "bsdf_1": polish}
    surface = {"type": "twosided", "surface": surface}
    if picture and picture.getchannel("A").getextrema()[0] < 255:
        pixels = (np.asarray(picture.getchannel("A")) * opacity).astype(np.uint8)
        return {"type": "mask", "opacity": make_texture(pixels, raw=True), "surface": surface}
    return {"type": "mask", "opacity": opacity, "surface": surface} if opacity < 1 else surface


class Solid:
    """A Thing's meshes, upright, standing on y = 0 about the vertical axis, the larger of width and height 1."""

    def __init__(self, thing):
        with zipfile.ZipFile(thing.archive) as archive:
            names = {name.casefold(): name for name in archive.namelist()}

            def read(name):
                path = str(Path(thing.file).parent / name).replace("\\", "/")
                return archive.read(names[path.casefold()]) if path.casefold() in names else None

            text = read(Path(thing.file).name).decode("latin-1")
            library = re.search(r"^mtllib (.*?)\s*$", text, re.M)[1]
            materials, upright = read_mtl(read(library).decode("latin-1")), np.reshape(thing.rotation, (3, 3)).T
            parts = {name: (p @ upright, n @ upright, c) for name, (p, n, c) in read_obj(text).items()}
            points = np.vstack([positions for positions, *_ in parts.values()])
            low, high = points.min(0), points.max(0)
            foot = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
            radius, height = np.hypot(*(points - foot)[:, [0, 2]].T).max(), high[1] - low[1]
            scale = 1 / max(2 * radius, height)
            self.radius, self.height, self.meshes = scale * radius, scale * height, []
            for name, (positions, normals, coordinates) in parts.items():
                material = make_material(materials.get(name, {"Kd": "0.8 0.8 0.8"}), read)
                self.meshes.append(make_mesh(scale * (positions - foot), normals, coordinates, material))


def make_mesh(positions, normals, coordinates, material):
    """positions, normals: (3N, 3), coordinates: (3N, 2), three rows a triangle. Returns: mitsuba's mesh."""
    mi = load_mitsuba()
    properties = mi.Properties()
    properties["mesh_bsdf"] = mi.load_dict(material)
    count = len(positions)
    mesh = mi.Mesh("part", count, count // 3, has_vertex_normals=True, has_vertex_texcoords=True, props=properties)
    values = mi.traverse(mesh)
    for key, own in (("positions", positions), ("normals", normals), ("texcoords", coordinates * [1, -1] + [0, 1])):
        values[f"vertex_{key}"] = own.ravel().astype(np.float32)
    values["faces"] = np.arange(count, dtype=np.uint32)
    values.update()
    return mesh


def direction(azimuth, height):
    """Returns: (3,), the unit vector towards an azimuth and a height, degrees."""
    a, h = math.radians(azimuth), math.radians(height)
    return np.array([math.sin(a) * math.cos(h), math.sin(h), math.cos(a) * math.cos(h)])


def render_view(solid, studio, view, floor, background, size, samples, seed):
    """Path-trace a Solid on a table before a picture, from which it takes no light.

    floor, background: PIL; the background is twice as wide as what is seen of it. samples: a pixel.
    Returns: PIL picture, size x size.
    """
    mi = load_mitsuba()
    transform, tangent = mi.ScalarTransform4f, math.tan(math.radians(FIELD_DEG / 2))
    h = math.radians(view.height)
    reach = max(solid.radius, solid.height * math.cos(h) / 2 + solid.radius * math.sin(h))
    middle = np.array([0, solid.height / 2, 0])
    eye = middle + view.distance * reach / (FILL * tangent) * direction(-view.turn, view.height)
    lamp = LAMP_DISTANCE * direction(view.light - view.turn, view.light_height)  # all but the thing is turned, back
    table = transform().rotate([0, 1, 0], studio.table_turn - view.turn).rotate([1, 0, 0], -90).scale(studio.table)
    bright = np.array(studio.lamp) * (LAMP_DISTANCE / studio.lamp_radius) ** 2
    scene = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": BOUNCES, "hide_emitters": True},
        "sensor": {
            "type": "perspective",
            "fov": FIELD_DEG,
            "to_world": transform().look_at(origin=eye.tolist(), target=middle.tolist(), up=[0, 1, 0]),
            "sampler": {"type": "multijitter", "sample_count": samples},
            "film": {
                "type": "hdrfilm",
                "width": size,
                "height": size,
                "pixel_format": "rgba",
                "rfilter": {"type": "box"},  # a speck stays one pixel
            },
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": list(studio.sky)}},
        "lamp": {
            "type": "sphere",
            "center": lamp.tolist(),
            "radius": studio.lamp_radius,
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": bright.tolist()}},
        },
        "table": {
            "type": "rectangle",
            "to_world": table,
            "surface": {"type": "twosided", "surface": {"type": "diffuse", "reflectance": make_texture(floor)}},
        },
    }
    scene |= {f"part{i}": mesh for i, mesh in enumerate(solid.meshes)}
    light = np.array(mi.render(mi.load_dict(scene), seed=seed))
    top = min(size, round(size / 2 * (1 + math.tan(h) / tangent)))  # its middle is at the horizon, while that is near
    behind = background.resize((2 * size, 2 * size)).crop((size // 2, top, size // 2 + size, top + size))
    behind = np.array(mi.Bitmap(np.array(behind)).convert(component_format=mi.Struct.Type.Float32, srgb_gamma=False))
    light = mi.Bitmap((light[..., :3] + (1 - light[..., 3:]) * behind).astype(np.float32))
    picture = Image.fromarray(np.array(light.convert(component_format=mi.Struct.Type.UInt8, srgb_gamma=True)))
    return ImageChops.darker(picture, picture.filter(ImageFilter.RankFilter(3, 6)))  # without specks of chance
