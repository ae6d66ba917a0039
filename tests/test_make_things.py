"""Rendered things: which are held out, what is drawn, which side is lit, what the rows say, what is refused."""

import math
import re
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from cldm.dataset import read_data, read_rows
from dataForTrain import make_things, solids
from dataForTrain.make_things import choose_things, describe_change, draw_scene, draw_surface, list_pairs
from dataForTrain.solids import Solid, Studio, View, read_obj, read_things
from ldm.files import ROOT
from ldm.settings import InputError, override

CORNERS = [(x, y, z) for x in (0, 2) for y in (0, 1) for z in (0, 1)]
SIDES = ["1 3 4 2", "5 7 8 6", "1 2 6 5", "3 4 8 7", "1 3 7 5"]  # wound either way
BOX = "mtllib box.mtl\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + "usemtl grey\n"
BOX += "".join(f"f {side}\n" for side in SIDES) + "usemtl red\nf 2 4 8 6\n"  # the side at z = 1
MTL = "newmtl grey\nKd 0.5 0.5 0.5\nnewmtl red\nKd 0.9 0.1 0.1\n"
rendered = pytest.mark.skipif(find_spec("mitsuba") is None, reason="needs mitsuba")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of an archive of sixteen boxes; the last but one is flat."""
    monkeypatch.setattr(make_things, "MODELS", 16)
    (tmp_path / "package").mkdir()
    with zipfile.ZipFile(tmp_path / "package" / "Boxes.sh3f", "w") as archive:
        lines = ["name=Boxes"]
        for i in reversed(range(1, 17)):
            name = f"boxes/box{i:02d}"
            values = {"name": "Box", "model": f"/{name}/box.obj", "creator": "Ren\\u00e9", "width": 2, "depth": 1}
            values["height"] = 0.05 if i == 15 else 1
            lines += [f"{key}#{i}={value}" for key, value in values.items()]
            archive.writestr(f"{name}/box.obj", BOX)
            archive.writestr(f"{name}/box.mtl", MTL)
        archive.writestr(solids.CATALOG, "\n".join(lines).encode("latin-1"))
    return tmp_path / "package"


def run(folder, out, *arguments):
    small = "pairs=3", "validation=1", "test=1", "image_size=16", "samples=4", "copies=2"
    make_things.main(override(make_things.settings, [f"folder={folder}", f"out_dir={out}", *small, *arguments]))


def test_catalogs_tell_authors_and_order(folder):
    things = read_things(folder)
    assert [thing.name for thing in things] == [f"boxes/box{i:02d}" for i in range(1, 17)]
    assert things[14].size == (2, 0.05, 1) and {thing.author for thing in things} == {"René"}


def test_every_eighth_thing_is_held_out_and_flat_ones_are_left_out(folder):
    things = read_things(folder)
    groups = {group: [thing.name[-2:] for thing in choose_things(things, group)] for group in make_things.FILES}
    assert groups["test"] == ["08", "16"] and groups["validation"] == ["07"]
    assert [thing.name for thing in choose_things(things, "test", "box08")] == ["boxes/box08"]
    assert groups["training"] == [f"{i:02d}" for i in range(1, 15) if i not in (7, 8)]


def test_a_scene_depends_on_its_number_alone():
    assert draw_scene(1, "training", 5, 30) == draw_scene(1, "training", 5, 30)
    others = [
        draw_scene(*key, 30) for key in [(1, "training", 5), (2, "training", 5), (1, "test", 5), (1, "training", 6)]
    ]
    assert len({studio for studio, _ in others}) == 4
    assert draw_scene(1, "test", 5, 180)[1][0] == draw_scene(1, "test", 5, 30)[1][0]


@pytest.mark.parametrize("turn", [30, 180])
def test_numbers_fill_their_ranges(turn):
    changes = []
    for number in range(300):
        _, views = draw_scene(0, "training", number, turn)
        changes += [describe_change(views[i], views[j]) for i, j in list_pairs("training", views, turn)]
    low, high = np.min(changes, 0), np.max(changes, 0)
    ranges = [(-turn, turn), (-12, 12), (0.8, 1.25), (0, 360), (25, 65)]
    for least, most, (start, end) in zip(low, high, ranges):
        assert start <= least < start + 0.05 * (end - start) and end - 0.05 * (end - start) < most <= end


def test_turn_height_and_distance_are_changes_and_the_light_is_where_it_is():
    a, b = View(350, 20, 1.0, 300, 40), View(370, 15, 1.25, 10, 60)
    assert describe_change(a, b) == [20, -5, 1.25, 10, 60]
    assert describe_change(b, a) == [-20, 5, 0.8, 300, 40]
    far = View(381, 15, 1.25, 10, 60)  # from the first, not from the second
    assert list_pairs("training", [a, b, far], 30) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert list_pairs("test", [a, b], 30) == [(0, 1)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copied_pair_is_mirrored_and_turns_the_other_way_or_has_other_colours(tmp_path, mirrored):
    grey = Image.linear_gradient("L").rotate(90)
    for name in "ab":
        Image.merge("RGB", [grey, grey.rotate(180), grey.transpose(Image.Transpose.ROTATE_90)]).save(
            tmp_path / f"{name}.png"
        )
    row = dict(source=[20.0, 5.0, 1.1, 90.0, 40.0], target="b.png", reference="a.png", prompt="", thing="box")
    copied = make_things.copy_pair(tmp_path, row, 3, mirrored, (2, 0, 1))
    assert copied["source"] == ([-20.0, 5.0, 1.1, 270.0, 40.0] if mirrored else row["source"])
    assert (copied["thing"], copied["reference"]) == ("box", "a_3.png")
    still = make_things.copy_pair(tmp_path, row | {"source": [0, 0, 1, 0, 25]}, 3, mirrored, (2, 0, 1))
    assert still["source"] == [0, 0, 1, 0, 25]
    before, after = (np.asarray(Image.open(tmp_path / own["target"])) for own in (row, copied))
    assert (after == (before[:, ::-1] if mirrored else before)[..., [2, 0, 1]]).all() and (after != before).any()


def test_surfaces_are_plain_or_cut_from_photographs(tmp_path):
    photo = Image.merge("RGB", [Image.linear_gradient("L")] * 3)
    photo.save(tmp_path / "photo.png")
    rng = make_things.random.Random(0)
    drawn = [np.asarray(draw_surface(rng, [tmp_path / "photo.png"])) for _ in range(40)]
    plain = [np.ptp(picture, axis=(0, 1)).max() == 0 for picture in drawn]
    assert 4 < sum(plain) < 20
    assert all(picture.shape == (256, 256, 3) for picture, own in zip(drawn, plain) if not own)


def test_a_box_is_read_with_normals_on_the_side_of_its_triangles():
    parts = read_obj(BOX)
    assert [len(parts[name][0]) for name in ("grey", "red")] == [30, 6]
    positions, normals, _ = parts["red"]
    assert set(positions[:, 2]) == {1} and np.abs(normals[:, 2]).tolist() == pytest.approx([1] * 6)
    for positions, normals, _ in parts.values():
        corners = positions.reshape(-1, 3, 3)
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (
            np.einsum("nk,nik->ni", across, normals.reshape(-1, 3, 3)) > 0.99 * np.linalg.norm(across, axis=1)[:, None]
        ).all()


def test_given_normals_are_turned_round_and_shallow_edges_are_shaded_round():
    given = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0.6 0 -0.8\nvt 0.25 0.75\nf 1/1/1 2/1/1 3/1/1\n"
    _, normals, coordinates = read_obj(given)[""]
    assert normals == pytest.approx(np.tile([-0.6, 0, 0.8], (3, 1))) and coordinates.tolist() == [[0.25, 0.75]] * 3
    for lift, expected in ((0.3, True), (3, False)):  # a fold of 17 and of 72 degrees
        fold = f"v 0 0 0\nv 0 1 0\nv -1 0 0\nv 1 0 {-lift}\nf 1 2 3\nf 1 4 2\n"
        normals = read_obj(fold)[""][1]
        assert np.allclose(normals[0], normals[3]) == expected


def test_triangles_without_area_are_left_out():
    assert len(read_obj("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 2 0 0\nf 1 2 3\nf 1 2 4\n")[""][0]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["turn=181"], 'setting "turn": expected a finite number from 0 to 180, got 181'),
        (["pairs=0"], 'setting "pairs": expected a whole number from 1'),
        (["folder=no/where"], 'setting "folder": 0 models in no/where; expected the 16 of Debian'),
        (["only=ball"], 'setting "only": expected a part of names, got "ball", which is in none of training'),
        (["photos=train,gravel"], 'setting "photos": .*gravel.png is held out of training'),
        (["photos=no/where"], "no/where: no such folder"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_and_a_broken_archive_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(solids, "find_spec", lambda name: None)
    solids.load_mitsuba.cache_clear()
    with pytest.raises(InputError, match="mitsuba is not installed .pip install -r dataForTrain/requirements.txt"):
        run(folder, tmp_path / "out")
    (folder / "other.sh3f").write_bytes(b"PK")
    with pytest.raises(InputError, match="other.sh3f: cannot be read as an archive"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_gone_on_with(tmp_path):
    s = override(make_things.settings, [f"out_dir={tmp_path}"])
    make_things.hold_folder(s, [])
    make_things.hold_folder(override(s, ["pairs=9", "processes=2"]), [])
    with pytest.raises(InputError, match=r"made with turn=30.0 \(now 20.0\); give the same, or choose another out_dir"):
        make_things.hold_folder(override(s, ["turn=20"]), [])
    with pytest.raises(InputError, match=r"made with photographs=0 \(now 1\)"):
        make_things.hold_folder(s, [tmp_path])


def test_an_archive_of_other_models_is_named(folder, tmp_path):
    with zipfile.ZipFile(folder / "other.sh3f", "w") as archive:
        archive.writestr(solids.CATALOG, "name#1=x\nmodel#1=/x/x.obj\nwidth#1=1\ndepth#1=1\nheight#1=1")
    with pytest.raises(InputError, match="other.sh3f: an entry without 'creator'; expected the archives of"):
        run(folder, tmp_path / "out")


@pytest.mark.skipif(not (ROOT / "outputs" / "furniture").is_dir(), reason="needs the furniture, as docs/things.md says")
def test_every_model_is_listed_with_its_author_and_use():
    things = read_things(ROOT / "outputs" / "furniture")
    marks = dict.fromkeys(things, "†")
    for group, mark in (("training", ""), ("validation", "°"), ("test", "*")):
        marks |= dict.fromkeys(choose_things(things, group), mark)
    text = (ROOT / "dataForTrain" / "THINGS.md").read_text(encoding="utf-8").replace("\\", "").replace("\n  ", " ")
    listed = set()
    for archive, section in re.findall(r"^## (\S+):.*\n((?:(?!## ).*\n)*)", text, re.M):
        for author, own in re.findall("^- (.*?): (.*)", section, re.M):
            listed |= {(archive, author, name) for name in own.split(", ")}
    assert listed == {(t.archive.stem, t.author, t.name.split("/")[1] + mark) for t, mark in marks.items()}


@pytest.fixture
def box(folder):
    return Solid(read_things(folder)[0])


def see(solid, view, size=48):
    grey, studio = Image.new("RGB", (8, 8), (150, 150, 150)), Studio(4, 0, 0.2, (1, 1, 1), (0.2, 0.2, 0.2))
    return np.asarray(solids.render_view(solid, studio, view, grey, grey, size, 16, 0), float)


@rendered
@pytest.mark.slow
def test_a_positive_turn_is_counterclockwise_from_above_and_light_at_90_comes_from_the_right(box):
    assert (box.radius, box.height) == pytest.approx((0.5, 1 / math.sqrt(5)))
    middles = []
    for turn in (-40, 0, 40):
        picture = see(box, View(turn, 20, 1, 0, 45))
        red = picture[..., 0] > 2 * picture[..., 1]
        middles.append(np.nonzero(red)[1].mean())
    assert middles[0] < middles[1] - 3 and middles[1] + 3 < middles[2] and abs(middles[1] - 23.5) < 1
    lit = [see(box, View(0, 20, 1, light, 30))[24:40] for light in (90, 270)]
    left, right = ([picture[:, part].mean() for picture in lit] for part in (slice(0, 8), slice(40, 48)))
    assert left[0] < 0.8 * left[1] and right[1] < 0.8 * right[0]


@rendered
@pytest.mark.slow
def test_a_mirror_image_is_what_is_rendered_of_a_mirrored_change(box):
    """The box is the same on both sides of its middle."""
    one, other = (see(box, View(turn, 20, 1, light, 40)) for turn, light in ((30, 60), (-30, 300)))
    assert np.abs(one[:, ::-1] - other).mean() < 3 < np.abs(one - other).mean()


@rendered
@pytest.mark.slow
def test_distance_and_height_move_the_camera(box):
    def extent(view):
        picture = see(box, view)
        return np.ptp(np.nonzero(picture[..., 0] > 2 * picture[..., 1]), axis=1)

    near, far, above = (extent(View(0, h, d, 0, 45)) for h, d in ((20, 1), (20, 1.25), (50, 1)))
    assert far[1] == pytest.approx(near[1] / 1.25, abs=2) and above[0] < 0.8 * near[0]


@rendered
@pytest.mark.slow
def test_pictures_depend_on_the_seed_alone_and_are_rendered_once(folder, tmp_path):
    run(folder, tmp_path / "one", "pairs=9")
    run(folder, tmp_path / "two", "pairs=3")
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("two/**/*.png")}
    assert len(kept) == 3 * 3 + 2 + 2  # those of training and two copies
    run(folder, tmp_path / "two", "pairs=9", "processes=2")
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.glob("two/**/*.png")}.items()
    files = {file.relative_to(tmp_path / "one") for file in tmp_path.glob("one/**/*.*")}
    assert files == {file.relative_to(tmp_path / "two") for file in tmp_path.glob("two/**/*.*")}
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    data = read_data(tmp_path / "one")
    first, second = data.train[:2]
    assert len(data.train) == 3 * 9 and (first.target, first.reference) == (second.reference, second.target)
    assert data.names == ["turn", "height", "distance", "light", "light height"]
    assert data.periods == [None, None, None, 360, None] and data.absolute == [False, False, False, True, True]
    assert read_rows(tmp_path / "one" / "test" / "targets.json")[0].load()[0].size == (16, 16)
