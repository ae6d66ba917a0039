"""The page: what it says is what the scripts leave, what strangers may send it, and all of it in a browser."""

import csv
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zipfile
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
from matplotlib.figure import Figure
from PIL import Image

import generate
import gradio_control
import invert
from cldm import page
from cldm.model import load_model, save_model
from ldm.files import unpack
from ldm.pictures import load_picture
from ldm.settings import InputError, override, run_script

CHROMIUM = shutil.which("chromium")
LEARNED = dict(control_low=[-1.0], control_high=[1.0], error_scale=[0.1], error_floor=[0.01], prompts=["a cup"])


@pytest.fixture
def folder(make_model, tmp_path):
    model = make_model()
    model.control_net.register_to_config(**LEARNED)
    save_model(model, tmp_path / "control")
    return tmp_path / "control"


@pytest.fixture
def s(folder, tmp_path):
    (tmp_path / "uploads").mkdir()
    s = override(gradio_control.settings, [f"model_path={folder}", "ddim_steps=2", "draws=4", "max_pictures=6"])
    s.uploads = str(tmp_path / "uploads")
    return s


def last(steps):
    return [*steps][-1]


def offered(html, name):
    """Returns: the bytes that a link of the page downloads."""
    return b64decode(re.search(rf'download="{name}" href="data:[\w/]+;base64,([^"]+)"', html)[1])


def test_a_drawing_is_that_of_generate(s, folder, tmp_path):
    html = last(page.draw(load_model(folder), s, "a cup", None, 3, 0.5))
    arguments = [f"model_path={folder}", f"out_dir={tmp_path / 'out'}", "prompt=a cup", "seed=3", "ddim_steps=2"]
    run_script(generate.main, generate.settings, [*arguments, "control=0.5", "device=cpu"])
    drawn = Image.open(io.BytesIO(offered(html, "drawing.png")))
    assert drawn.tobytes() == Image.open(tmp_path / "out" / "control_001.png").tobytes() and "outside" not in html
    assert "outside_range" in last(page.draw(load_model(folder), s, "a cup", None, 3, 1.3))


def test_a_prompt_that_training_did_not_know_is_told(s, folder, picture):
    model = load_model(folder)
    model.control_net.register_to_config(prompts=["a cup"])
    for prompt, known in (("a cup", True), ("a cap", False)):
        for html in (
            last(page.draw(model, s, prompt, None, 3, 0.5)),
            last(page.read_picture(model, s, None, str(picture), prompt, None)),
        ):
            assert ("not one of the 1 that this control was trained with" in html) != known
    last(page.read_picture(model, s, None, str(picture), None, ""))
    assert page.tell_prompts(model, ["a cup", *map(str, range(99))]).count("not one of") == page.NAMED


def test_a_strip_over_a_circle_has_no_number_twice(make_model, s, monkeypatch):
    model, drawn = make_model(periods=[10.0]), {}
    model.control_net.register_to_config(control_mean=[5.0], control_low=[0.0], control_high=[10.0])
    monkeypatch.setattr(page, "draw_strip", lambda panels: drawn.update(panels) or Figure())
    last(page.draw_range(model, s, "", None, 0, "control", 7.0))
    assert [title.split()[1] for title in drawn] == [f"{10 * i / 7:+.3g}" for i in range(7)]


def test_a_reading_is_that_of_invert(s, folder, picture, tmp_path):
    html = last(page.read_picture(load_model(folder), s, None, str(picture), "a cup", ""))
    given = [f"model_path={folder}", f"out_dir={tmp_path / 'out'}", "prompt=a cup", "draws=4", "device=cpu"]
    run_script(invert.main, invert.settings, [*given, f"target_image_path={picture}"])
    ours, theirs = json.loads(offered(html, "result.json")), json.loads((tmp_path / "out" / "result.json").read_text())
    assert ours.pop("target") == picture.name
    del theirs["target"], theirs["seconds"], ours["seconds"]
    assert ours == theirs
    assert Image.open(io.BytesIO(offered(html, "figure.png"))).size == (1000, 560)


def test_a_known_number_stays(make_model, s, picture):
    model = make_model(2, "reference")
    model.control_net.register_to_config(control_low=[-1.0, -1.0], control_high=[1.0, 1.0])
    html = last(page.read_picture(model, s, str(picture), str(picture), "", "control 2=0.25"))
    assert json.loads(offered(html, "result.json"))["control"][1] == 0.25 and "<td>given</td>" in html
    with pytest.raises(InputError, match="picture A: none"):
        last(page.read_picture(model, s, None, str(picture), "", ""))


def make_zip(file, **members):
    """members: {name: content}. Returns: the path of the zip."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def test_many_are_read_as_invert_reads_them(s, folder, picture, tmp_path):
    rows = [{"target": f"p/{i}.png", "prompt": "a cup", "time": f"2020-01-0{3 - i}"} for i in range(3)]
    members = {"d/p/0.png": picture.read_bytes(), "d/p/1.png": b"no picture", "d/p/2.png": picture.read_bytes()}
    index = "\n".join(map(json.dumps, rows))
    packed = make_zip(tmp_path / "many.zip", **members, **{"d/prompt.json": index})
    steps = [*page.read_many(load_model(folder), s, [str(packed)], None, None, "ignored")]
    assert "0 of 3 read" in steps[0] and "3 of 3 read" in steps[-1] and os.listdir(s.uploads) == []
    zipfile.ZipFile(packed).extractall(tmp_path)
    given = [f"model_path={folder}", f"out_dir={tmp_path / 'out'}", "draws=4", "device=cpu"]
    run_script(invert.main, invert.settings, [*given, f"targets={tmp_path / 'd' / 'prompt.json'}"])
    theirs = list(csv.reader((tmp_path / "out" / "results.csv").open(newline="")))
    ours = list(csv.reader(io.StringIO(offered(steps[-1], "results.csv").decode())))
    assert (
        ours == [[cell.replace(f"{tmp_path}/", "") for cell in row] for row in theirs] and ours[2][-1] == "unreadable"
    )
    assert "not a picture that Pillow can read" in steps[-1] and s.uploads not in steps[-1]


def test_an_uploaded_folder_is_read_though_only_its_files_come(make_model, s, picture, tmp_path):
    """As gradio hands them on, without places; picture A, which the page deletes after a while, is copied."""
    rows = [{"target": f"pictures/{i}.png", "reference": "pictures/a.png", "prompt": ""} for i in range(2)]
    (tmp_path / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    files = [shutil.copy(picture, tmp_path / f"{name}.png") for name in "01a"]
    model = make_model(1, "reference")
    model.control_net.register_to_config(control_low=[-1.0], control_high=[1.0])
    steps = [*page.read_many(model, s, None, [str(tmp_path / "prompt.json"), *files], None, "")]
    assert "2 of 2 read" in steps[-1] and "unreadable" not in steps[-1] and "not read:" not in steps[-1]
    (tmp_path / "b").mkdir()
    files.append(shutil.copy(picture, tmp_path / "b" / "1.png"))
    with pytest.raises(InputError, match="1.png: 2 files are called so"):
        last(page.read_many(model, s, None, [str(tmp_path / "prompt.json"), *files], None, ""))

    steps = page.read_many(model, s, files[:1], None, str(files[2]), "")
    next(steps)
    Path(files[2]).unlink()
    assert "unreadable" not in last(steps)


def test_a_strip_over_large_numbers_shows_all(make_model, s, monkeypatch):
    model, drawn = make_model(), {}
    model.control_net.register_to_config(control_low=[1990.0], control_high=[2020.0])
    monkeypatch.setattr(page, "draw_strip", lambda panels: drawn.update(panels) or Figure())
    last(page.draw_range(model, s, "", None, 0, "control", 2000.0))
    assert [float(title.split()[1]) for title in drawn] == [1990 + 5 * i for i in range(7)]


def test_loose_files_of_one_name_are_all_read(s, folder, picture, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(picture, tmp_path / name / "x.png")
    steps = page.read_many(
        load_model(folder), s, [str(tmp_path / name / "x.png") for name in "ab"], None, None, "a cup"
    )
    assert {row[0] for row in csv.reader(io.StringIO(offered(last(steps), "results.csv").decode()))} >= {
        "x.png",
        "b/x.png",
    }


@pytest.mark.parametrize(
    "members, expected",
    [
        ({"../x.png": b""}, "has ../x.png in it, which lies outside"),
        ({"/x.png": b""}, "has /x.png in it, which lies outside"),
        ({"x.png": bytes(10_000)}, "1 files of 0 MB in all, at most 3"),
        ({f"{i}.png": b"" for i in range(4)}, "4 files of 0 MB in all, at most 3"),
    ],
)
def test_a_zip_that_asks_for_too_much_is_refused(tmp_path, members, expected):
    with pytest.raises(InputError, match=expected):
        unpack(make_zip(tmp_path / "bad.zip", **members), tmp_path / "to", 3, 9_999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.zip"]


def test_what_is_no_zip_is_refused(tmp_path):
    packed = make_zip(tmp_path / "cut.zip", ä=bytes(1000))
    for content in (b"no zip", packed.read_bytes()[:-30], packed.read_bytes().replace("ä".encode(), b"\xff\xff")):
        packed.write_bytes(content)
        with pytest.raises(InputError, match="cut.zip: cannot be unpacked"):
            unpack(packed, tmp_path / "to", 3, 9_999)


@pytest.mark.parametrize("outside", ["/etc/hostname", "../../x.png"])
def test_rows_cannot_name_files_of_the_machine(s, folder, tmp_path, outside):
    row = {"target": outside, "prompt": "a cup"}
    packed = make_zip(tmp_path / "many.zip", **{"prompt.json": json.dumps(row)})
    with pytest.raises(InputError, match="lies outside of what was uploaded"):
        last(page.read_many(load_model(folder), s, [str(packed)], None, None, ""))


def test_pictures_in_several_zips_are_all_read(s, folder, picture, tmp_path):
    zips = [str(make_zip(tmp_path / f"{name}.zip", **{"1.png": picture.read_bytes()})) for name in "ab"]
    html = last(page.read_many(load_model(folder), s, [*zips, str(picture)], None, None, "a cup"))
    names = {row["file"] for row in csv.DictReader(io.StringIO(offered(html, "results.csv").decode()))}
    assert names == {"a/1.png", "b/1.png", picture.name}
    row = json.dumps({"target": "1.png", "prompt": "a cup"})
    members = {"prompt.json": row, "1.png": picture.read_bytes(), "2.png": b"", "notes.txt": b"", "._2.png": b""}
    some = make_zip(tmp_path / "some.zip", **members)
    assert "not read:</b> 2.png, notes.txt<" in last(page.read_many(load_model(folder), s, [str(some)], None, None, ""))
    packed = make_zip(tmp_path / "two.zip", **{f"{name}/prompt.json": row for name in "ab"})
    with pytest.raises(InputError, match="a/prompt.json, b/prompt.json: more than one prompt.json"):
        last(page.read_many(load_model(folder), s, [str(packed)], None, None, ""))


def test_a_number_that_is_none_is_named(s, folder):
    with pytest.raises(InputError, match="control: expected a finite number, got null"):
        last(page.draw(load_model(folder), s, None, None, 0, None))


def test_a_visitor_cannot_name_a_file_of_the_machine(s, picture, tmp_path):
    own = tmp_path / "uploads" / "own.png"
    shutil.copy(picture, own)
    receive = partial(gradio_control.receive, s, {picture})
    assert receive(None) is None
    assert receive(SimpleNamespace(path=str(own))) == str(own)
    assert receive(SimpleNamespace(path=str(picture))) == str(picture)  # an example
    for path in ("/etc/hostname", f"{s.uploads}/../other.png", None):
        with pytest.raises(InputError, match="not uploaded"):
            receive(SimpleNamespace(path=path))


def test_more_than_max_pictures_are_refused(s, folder, picture, tmp_path):
    packed = make_zip(tmp_path / "many.zip", **{f"{i}.png": picture.read_bytes() for i in range(7)})
    with pytest.raises(InputError, match="7 pictures, at most 6"):
        last(page.read_many(load_model(folder), s, [str(packed)], None, None, ""))


def test_what_visitors_name_is_no_html():
    assert "<b>" not in page.tell_error("<b>") + page.tabulate(["<b>"], [["<b>"]]) + page.show(b"", "<b>")


def run_page(where, arguments):
    tempfile.tempdir = str(where)
    run_script(gradio_control.main, gradio_control.settings, arguments)


@pytest.fixture
def served(tmp_path):
    """serve(model, *arguments) -> the address of its page; the forked process that serves it; its temporary folder."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    where = tmp_path / "served"
    where.mkdir()
    running = []

    def serve(model, *arguments):
        save_model(model, where / "control")
        arguments = [f"model_path={where / 'control'}", f"port={address.rpartition(':')[2]}", *arguments]
        process = get_context("fork").Process(target=run_page, args=(where, arguments))
        process.start()
        running.append(process)
        while process.is_alive():
            with suppress(OSError):
                urlopen(address).close()
                return address, process, where
            time.sleep(0.1)
        raise AssertionError(process.exitcode)

    yield serve
    for process in running:
        process.kill()


@pytest.fixture
def pair_page(served, make_model, picture, tmp_path):
    model = make_model(2, "reference", periods=[None, 10.0])
    ranges = dict(control_low=[-1.0, 0.0], control_high=[1.0, 10.0], control_mean=[0.0, 5.0])
    names = dict(control_names=["turn", "hour"], control_units=["degrees", "h"], prompts=[""])
    model.control_net.register_to_config(**ranges, **names, error_scale=[0.1] * 2, error_floor=[0.01] * 2)
    row = dict(source=[0.5, 2], reference=picture.name, target=picture.name, prompt="")
    (tmp_path / "examples.json").write_text(json.dumps(row))
    return served(
        model,
        f"examples={tmp_path / 'examples.json'}",
        "draws=4",
        "ddim_steps=2",
        "max_upload_mb=1",
        "max_megapixels=1",
    )


@pytest.fixture
def visitor():
    """A page of a real browser, and a list of what it asked of other machines."""
    sync_api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if not CHROMIUM:
        pytest.skip("no chromium; see .ci/run")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, elsewhere = browser.new_page(viewport=dict(width=1240, height=900)), []
        tab.set_default_timeout(120_000)
        tab.on("request", lambda own: re.match("data:|blob:|http://127.0.0.1:", own.url) or elsewhere.append(own.url))
        yield tab, elsewhere
        browser.close()


def download(tab, name):
    """Returns: the bytes of a file that a click on its name downloads."""
    with tab.expect_download() as download:
        tab.get_by_role("link", name=name).locator("visible=true").click()
    return open(download.value.path(), "rb").read()


@pytest.mark.slow
def test_a_visit(pair_page, visitor, picture, tmp_path):
    (address, process, where), (tab, elsewhere) = pair_page, visitor
    tab.goto(address)
    files, drawing = tab.locator("input[type=file]"), tab.locator(".drawing img")
    first = drawing.get_attribute("src")
    tab.get_by_role("slider").first.press("ArrowRight")
    tab.wait_for_function("first => document.querySelector('.drawing img').src != first", arg=first)
    assert Image.open(io.BytesIO(download(tab, "drawing.png"))).size == (32, 32)
    tab.get_by_label("number input for hour").fill("11")
    tab.get_by_text("hour +1 h").wait_for()  # round
    tab.get_by_role("button", name="Strip").click()
    assert Image.open(io.BytesIO(download(tab, "strip.png"))).width > 1000

    tab.get_by_role("tab", name="Read").click()
    tab.locator("tr.tr-body").locator("visible=true").click()
    result = json.loads(download(tab, "result.json"))
    assert (result["reference"], result["target"], len(result["std"])) == (picture.name, picture.name, 2)
    tab.get_by_label("numbers that are known").fill("hour=2.5")
    tab.get_by_role("button", name="Read", exact=True).click()
    tab.get_by_text("given").wait_for()
    assert json.loads(download(tab, "result.json"))["control"][1] == 2.5
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:-40])
    tab.get_by_label("Remove Image").locator("visible=true").last.click()
    files.nth(2).set_input_files(damaged)
    tab.get_by_role("button", name="Read", exact=True).click()
    with pytest.raises(InputError) as said:
        load_picture(damaged)
    tab.get_by_text(f"error: {str(said.value).replace(f'{tmp_path}/', '')}").wait_for()

    tab.get_by_role("tab", name="Many").click()
    many = make_zip(tmp_path / "many.zip", **{f"{i}.png": picture.read_bytes() for i in range(5)})
    files.nth(3).set_input_files(many)
    files.nth(5).set_input_files(picture)
    tab.get_by_role("button", name="Read all").click()
    table = list(csv.DictReader(io.StringIO(download(tab, "results.csv").decode())))
    assert [row["file"] for row in table] == [f"{i}.png" for i in range(5)] and tab.locator("tr").count() >= 6

    assert not elsewhere
    (uploads,) = where.glob("page-*")
    assert any(file.name == "damaged.png" for file in uploads.rglob("*"))
    process.terminate()
    process.join(60)
    assert process.exitcode in (0, 130) and not uploads.exists()


def memory(process):
    """Returns: the megabytes that a process holds."""
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


@pytest.mark.slow
def test_visitors_at_once_each_get_their_own(served, make_model):
    client = pytest.importorskip("gradio_client")
    model = make_model()
    model.control_net.register_to_config(**LEARNED)
    address, process, _ = served(model, "ddim_steps=2")
    clients = [client.Client(address, verbose=False) for _ in range(4)]

    def draw(i, seed):
        html = clients[i % 4].submit("a cup", None, seed, i / 50, api_name="/draw").result()
        return b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', html)[1])

    asked = json.dumps({"data": [None, {"path": "/etc/hostname"}, "a cup", ""]}).encode()
    begun = json.load(urlopen(Request(f"{address}/gradio_api/call/read", asked, {"Content-Type": "application/json"})))
    answer = urlopen(f"{address}/gradio_api/call/read/{begun['event_id']}").read()
    assert b"event: error" in answer and b"hostname" not in answer
    alone = [draw(i, 1) for i in range(50)]
    before = memory(process)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(50), [1] * 50))
    assert together == alone and len({*alone}) > 25
    assert memory(process) < before + 20
