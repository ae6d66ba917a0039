"""Pictures of every kind: the pixels that are read, what is refused and how, what is said of cropping."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms

from ldm.pictures import check_pictures, describe_fit, describe_shapes, load_picture
from ldm.settings import InputError

GREYS = np.array([[0, 17, 34, 51], [119, 136, 204, 255]], np.uint8)
WHITE = 255


def reds(picture):
    return np.asarray(picture)[..., 0].tolist()


def as_read(write, tmp_path, name):
    """Write a file, check it and read it. Returns: the pixels (H, W, 3)."""
    path = tmp_path / name
    write(path)
    (size,) = check_pictures([path])
    picture = load_picture(path)
    assert picture.mode == "RGB" and picture.size == size
    return np.asarray(picture)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, pixels, depth, colour, transparent=None):
    """pixels: (H, W) or (H, W, channels), as large as `depth` bits have them. colour: PNG's type, 0 for grey."""
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    bits = (pixels.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if transparent is not None:
        header += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_grey_png_of_any_depth(tmp_path, depth, transparent):
    top = 2**depth - 1
    values = np.array([[0, 1, top // 2, top]])
    clear = [1] if transparent else None
    found = as_read(lambda path: write_png(path, values, depth, 0, clear), tmp_path, "a.png")
    expected = np.where(transparent & (values == 1), WHITE, np.round(values * 255 / top))
    assert (found == expected[..., None]).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_colour_of_a_png_is_white(tmp_path, depth):
    pixels = np.array([[[1, 2, 3], [50, 60, 70]]]) * (257 if depth == 16 else 1)
    found = as_read(lambda path: write_png(path, pixels, depth, 2, pixels[0, 0]), tmp_path, "a.png")
    assert found[0].tolist() == [[WHITE] * 3, [50, 60, 70]]


@pytest.mark.parametrize("colour, pixel", [(4, [100, 51]), (6, [100, 100, 100, 51])])
@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_of_a_png_is_laid_on_white(tmp_path, colour, pixel, depth):
    pixels = np.array([[pixel]]) * (257 if depth == 16 else 1)
    found = as_read(lambda path: write_png(path, pixels, depth, colour), tmp_path, "a.png")
    assert abs(found - (0.2 * 100 + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind, top", [("u1", 255), ("u2", 65535), ("f4", 1)])
def test_grey_tiff_of_any_depth(tmp_path, order, inverted, kind, top):
    if inverted and (order, kind) == (">", "u2"):
        pytest.skip("Pillow does not read it")
    values = GREYS.astype(float) / 255 * top
    how = dict(photometric="miniswhite" if inverted else "minisblack", byteorder=order)
    found = as_read(lambda path: tifffile.imwrite(path, values.astype(order + kind), **how), tmp_path, "a.tif")
    assert (found == (255 - GREYS if inverted else GREYS)[..., None]).all()


def test_tiff_of_12_bits(tmp_path):
    tags = {256: (4, 2), 257: (4, 1), 258: (3, 12), 259: (3, 1), 262: (3, 1), 273: (4, 128), 278: (4, 1), 279: (4, 3)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    file = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    levels = bytes([0x80, 0x0F, 0xFF])  # 0x800, 0xfff
    found = as_read(lambda path: path.write_bytes(file.ljust(128, b"\0") + levels), tmp_path, "a.tif")
    assert found[0, :, 0].tolist() == [128, 255]


def test_deep_netpbm(tmp_path):
    deep = b"P5 2 1 4095\n" + struct.pack(">2H", 2048, 4095)
    assert as_read(lambda path: path.write_bytes(deep), tmp_path, "a.pgm")[0, :, 0].tolist() == [128, 255]
    floats = b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.2, 1)
    assert as_read(lambda path: path.write_bytes(floats), tmp_path, "a.pfm")[0, :, 0].tolist() == [51, 255]


def test_deep_jpeg2000(tmp_path):
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    assert (as_read(deep.save, tmp_path, "a.jp2") == GREYS[..., None]).all()


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
OF_MODE = {  # how far, on average, from the colours it was made of a picture is read again
    **{mode: 0 for mode in ("RGB", "RGBX", "RGBA", "RGBa", "CMYK")},
    "YCbCr": 1.5,
    "HSV": 1,
    "LAB": 4,  # which has fewer bits for blue
}


@pytest.mark.parametrize("mode", OF_MODE)
def test_colour_picture_of_any_mode(mode):
    rgb = Image.fromarray(COLOURS)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        other = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    else:
        other = rgb.convert("RGBA").convert(mode) if mode == "RGBa" else rgb.convert(mode)
    error = np.abs(np.asarray(load_picture(other), int) - COLOURS)
    assert error.mean() <= OF_MODE[mode]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I;16L", "I;16B", "F"])
def test_grey_picture_of_any_mode(mode):
    values = np.where(GREYS > 127, 255, 0).astype(np.uint8) if mode == "1" else GREYS
    if mode.startswith("I;16"):
        bytes_ = (GREYS.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        picture = Image.frombytes(mode, (4, 2), bytes_)
    else:
        picture = Image.fromarray(GREYS / np.float32(255)) if mode == "F" else Image.fromarray(values).convert(mode)
    assert picture.mode == mode and (np.asarray(load_picture(picture)) == values[..., None]).all()


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "P"])
def test_transparency_of_any_mode_is_laid_on_white(mode):
    clear, solid = (0, 0, 0, 0), (40, 40, 40, 255)
    picture = Image.new("RGBA", (2, 1), solid)
    picture.putpixel((0, 0), clear)
    if mode in ("P", "PA"):
        alpha, picture = picture.getchannel("A"), Image.new("P", (2, 1), 1)
        picture.putpalette([0, 0, 0, 40, 40, 40])
        picture.putpixel((0, 0), 0)
        picture.info["transparency"] = 0
        if mode == "PA":
            picture = picture.convert("PA")
            picture.putalpha(alpha)
    elif mode != "RGBA":
        picture = picture.convert("LA").convert(mode) if mode == "La" else picture.convert(mode)
    assert picture.mode == mode and reds(load_picture(picture)) == [[255, 40]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, suffix, orientation):
    turns = Image.Transpose
    stored = {  # upright pictures are stored like this, and marked for it to be undone
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    upright = Image.fromarray(np.kron([[0, 90, 130], [170, 210, 250]], np.ones((16, 16))).astype(np.uint8))
    picture, exif = upright.convert("RGB"), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = picture.transpose(stored[orientation]) if orientation > 1 else picture
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    for kind in (picture, grey, picture.convert("RGBA"), deep) if suffix == "tif" else (picture,):
        found = as_read(lambda path, kind=kind: kind.save(path, exif=exif), tmp_path, f"a.{suffix}")
        assert np.abs(found[8::16, 8::16, 0].astype(int) - [[0, 90, 130], [170, 210, 250]]).max() <= 4


def test_deep_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    picture = Image.fromarray(GREYS[::-1, ::-1].astype(np.uint16) * 257)
    for suffix in ("png", "tif"):
        found = as_read(lambda path: picture.save(path, exif=exif), tmp_path, f"a.{suffix}")
        assert (found == GREYS[..., None]).all()


def wide_gamut_profile():
    """An ICC profile whose red, green and blue are other colours than sRGB's: the one of a packaged photograph."""
    from dataForTrain.make_dataset import find_photo

    return Image.open(find_photo("skimage/data/rocket.jpg")).info["icc_profile"]


def test_colour_profiles_are_applied(tmp_path):
    """A profile of other colours than the picture's, one that is damaged and sRGB's own change nothing."""
    picture = Image.new("RGB", (2, 2), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = {}
    for name, profile in dict(none=None, srgb=srgb, damaged=b"profile", wide=wide_gamut_profile()).items():
        read[name] = as_read(lambda path, p=profile: picture.save(path, icc_profile=p), tmp_path, f"{name}.png")[0, 0]
    assert read["none"].tolist() == read["srgb"].tolist() == read["damaged"].tolist() == [200, 100, 50]
    assert np.abs(read["wide"].astype(int) - [230, 100, 41]).max() <= 6
    cmyk = as_read(
        lambda path: picture.convert("CMYK").save(path, icc_profile=wide_gamut_profile()), tmp_path, "cmyk.tif"
    )
    assert cmyk[0, 0].tolist() == [200, 100, 50]
    assert load_picture(tmp_path / "wide.png", profiled=False).getpixel((0, 0)) == (200, 100, 50)


GREY = Image.new("L", (2, 2), 100)


def pages(path, **how):
    GREY.save(path, save_all=True, append_images=[Image.new("L", (2, 2), 0)], **how)


def cut_off(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def huge(path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 14000, 14000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))


def write_array(kind, *values):
    return lambda path: tifffile.imwrite(path, np.array([values], kind), photometric="minisblack")


REFUSED = {
    "missing.png": (lambda path: None, "no such file"),
    "no_folder/a.png": (lambda path: None, "no such file"),
    "folder.png": (os.mkdir, "a folder, expected a picture"),
    "pipe.png": (os.mkfifo, "a pipe or a device, expected a picture"),
    "empty.png": (lambda path: path.write_bytes(b""), "not a picture that Pillow can read, for it is empty"),
    "text.png": (lambda path: path.write_text("<html>\n"), 'for it begins with "<html>"'),
    "lfs.png": (lambda path: path.write_text("version https://git-lfs\noid"), 'begins with "version https://git-lfs"'),
    "bytes.png": (lambda path: path.write_bytes(b"\xff\0\0"), "not a picture that Pillow can read; save it as a PNG"),
    "cut.png": (cut_off, "damaged or cut off"),
    "cut.jpg": (cut_off, "damaged or cut off"),
    "cut.tif": (cut_off, "damaged or cut off"),
    "cut.bmp": (cut_off, "damaged or cut off"),
    "huge.png": (huge, "196 million pixels, at most 179 are read; scale it down"),
    f"{'long' * 75}.png": (lambda path: None, "File name too long"),
    "moving.gif": (pages, "2 pictures in one file, expected one; save the one that is meant"),
    "moving.webp": (pages, "2 pictures in one file"),
    "moving.png": (pages, "2 pictures in one file"),
    "pages.tif": (pages, "2 pictures in one file"),
    "counts.tif": (write_array("i4", 0, 255), "pixels of mode I, .*; save it as a PNG of 8 or 16 bits"),
    "signed.tif": (write_array("i2", 0, 255), "pixels of mode I, "),
    "unsigned.tif": (write_array("u4", 0, 255), "pixels of mode I, "),
    "floats.tif": (write_array("f4", 0, 255), "floats from 0 to 255, expected them from 0, black, to 1, white"),
    "nan.tif": (write_array("f4", 0, np.nan), "floats from nan to nan"),
    "infinite.tif": (write_array("f4", 0, np.inf), "floats from 0 to inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_and_why(tmp_path, name):
    write, message = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"^{tmp_path / name}: .*{message}") as error:
        load_picture(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_permission_is_called_that(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    GREY.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match="a.png: no permission to read it"):
        load_picture(tmp_path / "a.png")


def test_integers_of_32_bits_in_memory_are_refused():
    with pytest.raises(InputError, match="mode I, "):
        load_picture(Image.fromarray(np.zeros((2, 2), np.int32)))


@pytest.mark.filterwarnings("error")
def test_large_pictures_are_read_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    GREY.save(tmp_path / "a.png")
    assert check_pictures([tmp_path / "a.png"]) == [load_picture(tmp_path / "a.png").size] == [(2, 2)]


def test_many_pictures_are_checked_at_once(tmp_path):
    """In threads, which share the process's filters of warnings: those are as they were."""
    before, files = list(warnings.filters), [tmp_path / f"{size}.png" for size in range(1, 30)]
    for size, file in enumerate(files, 1):
        Image.new("L", (size, 2)).save(file)
    assert check_pictures(files) == [(size, 2) for size in range(1, 30)] and warnings.filters == before
    with pytest.raises(InputError, match="none.png: no such file"):
        check_pictures([*files, tmp_path / "none.png"])


def test_previews_and_thumbnails_are_no_pages(tmp_path):
    as_read(lambda path: GREY.save(path, "MPO", save_all=True, append_images=[GREY]), tmp_path, "a.jpg")
    pages = (np.full((4, 4), 100, np.uint8), 0), (np.zeros((2, 2), np.uint8), 1)
    for name, order in {"a.tif": pages, "thumbnail_first.tif": pages[::-1]}.items():
        with tifffile.TiffWriter(tmp_path / name) as file:
            for pixels, kind in order:
                file.write(pixels, subfiletype=kind)
    first = load_picture(tmp_path / "a.tif")
    assert first.size == (4, 4) and reds(first)[0][0] == 100
    with pytest.raises(InputError, match="2 pictures in one file"):
        load_picture(tmp_path / "thumbnail_first.tif")


@pytest.mark.parametrize(
    "sizes, line",
    [
        ([(32, 32)] * 2, ""),
        ([(40, 40), (32, 32)], "pictures of 40 x 40 resized to 32 x 32"),
        ([(40, 30)], "pictures of 40 x 30 cut to their middle squares and resized to 32 x 32"),
        ([(n, n) for n in range(33, 40)], "pictures of 33 x 33, 34 x 34, 35 x 35 and more resized to 32 x 32"),
        ([(8, 8)], "pictures of 8 x 8 resized to 32 x 32; enlarged up to 4.0 times, they show less than the model"),
        ([(1, 99)], "pictures of 1 x 99 cut to their middle squares and resized to 32 x 32; enlarged up to 32.0 times"),
    ],
)
def test_cropping_is_described(sizes, line):
    assert describe_fit(sizes, 32).startswith(line) and bool(describe_fit(sizes, 32)) == bool(line)


@pytest.mark.parametrize(
    "first, second, shift, zoom",
    [
        ((128, 128), (140, 128), "0.047", "1.094"),
        ((128, 128), (100, 128), "0.140", "1.280"),
        ((128, 128), (129, 128), "0.004", "1.008"),
        ((640, 480), (480, 640), "0.167", "1.778"),
        ((640, 480), (333, 250), None, None),  # like, but for rounding
        ((640, 480), (320, 240), None, None),
    ],
)
def test_unlike_shapes_are_described(first, second, shift, zoom):
    for line in (describe_shapes(first, second), describe_shapes(second, first)):
        assert not line and not shift or f"by up to {shift} widths and zoom by up to a factor {zoom};" in line


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK"])
def test_a_model_takes_pictures_as_they_were_opened(make_model, tmp_path, mode):
    """Of any mode, turned as their tags say, as those that it opens itself."""
    model, file = make_model(), tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.radial_gradient("L").crop((0, 0, 100, 100)).convert(mode).save(file, exif=exif)
    with Image.open(file) as opened:
        own = model.encode([""], [opened]).latents
    assert torch.equal(own, model.encode([""], [load_picture(file)]).latents)
