import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_dicom import GRADIENT, SMOOTH, damaged_jpeg, prepare

from radiographs import errors


def save_image(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_images_are_read_as_a_dicom_file_of_their_pixels(tmp_path, write_dicom, name, dtype):
    pixels = (GRADIENT * (200 if dtype == np.uint16 else 1)).astype(dtype)
    image, size = prepare(save_image(tmp_path / name, pixels))
    expected, _ = prepare(write_dicom(tmp_path / "a.dcm", pixels))
    np.testing.assert_array_equal(image, expected)
    assert size == (64, 64)


def test_a_jpeg_file_is_read(tmp_path):
    image, size = prepare(save_image(tmp_path / "a.jpg", GRADIENT.astype(np.uint8), quality=95))
    assert size == (64, 64) and np.abs(image - GRADIENT / 189).max() < 0.05


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_colour_image_becomes_its_luminance_with_a_note(tmp_path, recwarn, suffix):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :, 0], pixels[32:, :, 1] = 200, 200  # red above green
    image, _ = prepare(save_image(tmp_path / f"a.{suffix}", pixels))
    assert image[5, 5] == 0 and image[60, 60] == 1
    assert "is a colour image" in str(recwarn[0].message)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped(tmp_path, mode):
    picture = Image.fromarray(GRADIENT.astype(np.uint8)).convert(mode)
    picture.putalpha(Image.new("L", (64, 64), 0))  # all of it transparent
    picture.save(tmp_path / "a.png")
    image, _ = prepare(tmp_path / "a.png")
    np.testing.assert_allclose(image, GRADIENT / 189, atol=1e-6)


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, :16] = 200  # its left, which becomes its top
    image, size = prepare(save_image(tmp_path / "a.jpg", pixels, exif=exif))
    assert size == (64, 32) and image[:12].min() > 0.9 > 0.1 > image[20:].max()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_file_with_white_at_0_is_inverted(tmp_path, dtype):
    path = save_image(tmp_path / "a.tif", GRADIENT.astype(dtype))
    content = bytearray(path.read_bytes())
    entry = content.index(struct.pack("<HHI", 262, 3, 1))  # photometric interpretation
    content[entry + 8:entry + 10] = struct.pack("<H", 0)
    path.write_bytes(content)
    image, _ = prepare(path)
    np.testing.assert_allclose(image, 1 - GRADIENT / 189, atol=1e-6)


def test_a_tiff_file_of_several_pages_is_read_with_a_note(tmp_path, recwarn):
    pages = [Image.fromarray((GRADIENT + page).astype(np.uint8)) for page in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    prepare(tmp_path / "a.tif")
    assert "has 3 frames; only the first is used" in str(recwarn[0].message)


def test_a_tiff_file_of_64_bit_offsets_is_read(tmp_path):
    path = save_image(tmp_path / "a.tif", GRADIENT.astype(np.uint8), big_tiff=True)
    np.testing.assert_allclose(prepare(path)[0], GRADIENT / 189, atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_truncated_image_is_refused_with_the_reason(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    content = save_image(tmp_path / name, noise).read_bytes()
    (tmp_path / name).write_bytes(content[:len(content) // 2])
    with pytest.raises(errors.UnreadableImage, match="is damaged"):
        prepare(tmp_path / name)


@pytest.mark.parametrize("side", [6000, 20000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side, monkeypatch):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(errors.UnreadableImage, match="declares .*33,554,432"):
        prepare(tmp_path / "a.png")


def test_kinds_are_told_apart_by_content(tmp_path, write_dicom):
    pixels = GRADIENT.astype(np.uint8)
    path = save_image(tmp_path / "a.png", pixels).rename(tmp_path / "a.dcm")
    other = write_dicom(tmp_path / "b.dcm", pixels).rename(tmp_path / "b.png")
    np.testing.assert_array_equal(prepare(path)[0], prepare(other)[0])


# 16 bits with colour or alpha


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(path, samples, *others, interlaced=False):
    """A PNG file of 16 bits from samples (height, width, number), every row by another filter."""
    height, width, number = samples.shape
    kind = {2: 4, 3: 2, 4: 6}[number]
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    above = np.vstack([rows[:1] * 0, rows[:-1]])
    left = np.pad(rows, ((0, 0), (2 * number, 0)))[:, :rows.shape[1]]
    filtered = [rows, rows - left, rows - above, rows - (left + above) // 2]
    lines = [bytes([y % 4]) + (filtered[y % 4][y] % 256).astype(np.uint8).tobytes()
             for y in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(others)
                     + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b""))
    return path


TEN_BITS = (GRADIENT * 5).astype(np.uint16)  # 0..945, in four values of the high byte
ALPHA = np.full((64, 64), 65535, np.uint16)


@pytest.mark.parametrize("samples", [
    [TEN_BITS, ALPHA], [TEN_BITS] * 3, [TEN_BITS] * 3 + [ALPHA]], ids=["LA", "RGB", "RGBA"])
def test_png_images_of_16_bits_keep_their_low_byte(tmp_path, samples):
    path = write_png(tmp_path / "a.png", np.stack(samples, -1))
    image, size = prepare(path)
    assert size == (64, 64)
    np.testing.assert_allclose(image, GRADIENT / 189, atol=1e-5)


@pytest.mark.parametrize("number", [3, 4])
@pytest.mark.parametrize("options", [
    {}, {"byteorder": ">"}, {"compression": "deflate"}, {"rowsperstrip": 10}, {"tile": (32, 32)}])
def test_tiff_images_of_16_bits_keep_their_low_byte(tmp_path, options, number):
    samples = np.stack([TEN_BITS] * 3 + [ALPHA], -1)[..., :number]
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", **options,
                     extrasamples=["unassalpha"] if number == 4 else None)
    image, _ = prepare(tmp_path / "a.tif")
    np.testing.assert_allclose(image, GRADIENT / 189, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"photometric": "rgb", "planarconfig": "separate"},
    {"photometric": "rgb", "planarconfig": "separate", "compression": "deflate"},
    {"photometric": "separated", "planarconfig": "contig"}])
def test_tiff_images_of_16_bits_that_pillow_would_shorten_are_refused(tmp_path, options):
    axis, count = (-1, 4) if options["planarconfig"] == "contig" else (0, 3)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([TEN_BITS] * count, axis), **options)
    with pytest.raises(errors.UnreadableImage, match="16 bits in an arrangement"):
        prepare(tmp_path / "a.tif")


# Orientation, pages and metadata


def grey_tiff(*pages, order="<"):
    """An uncompressed TIFF file of `pages` (pixels, {tag: value})."""
    content = bytearray({"<": b"II*\0", ">": b"MM\0*"}[order] + bytes(4))
    link = 4
    for pixels, tags in pages:
        start = len(content)
        content += pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        struct.pack_into(order + "I", content, link, len(content))
        tags = {256: pixels.shape[1], 257: pixels.shape[0], 258: 8 * pixels.itemsize, 259: 1,
                262: 1, 273: start, 277: 1, 278: pixels.shape[0], 279: pixels.nbytes, **tags}
        content += struct.pack(order + "H", len(tags))
        for tag in sorted(tags):
            content += struct.pack(order + "HHII", tag, 4, 1, tags[tag])
        link = len(content)
        content += bytes(4)
    return bytes(content)


TALL = np.add.outer(3 * np.arange(40), np.arange(24)).astype(np.uint8)  # 40 high, 24 wide
TURNED = {  # how the pixels of TALL are stored under each orientation
    1: TALL, 2: TALL[:, ::-1], 3: TALL[::-1, ::-1], 4: TALL[::-1], 5: TALL.T,
    6: np.rot90(TALL), 7: TALL[::-1, ::-1].T, 8: np.rot90(TALL, -1)}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind, dtype", [
    ("tif", np.uint8), ("tif", np.uint16), ("png", np.uint8), ("png", np.uint16),
    ("jpg", np.uint8)])
def test_every_orientation_is_turned_upright(tmp_path, orientation, dtype, kind):
    pixels = TURNED[orientation].astype(dtype, "C") * dtype(200 if dtype == np.uint16 else 1)
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "tif":
        (tmp_path / "a.tif").write_bytes(grey_tiff((pixels, {274: orientation})))
    else:
        Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif, quality=100)
    image, size = prepare(tmp_path / f"a.{kind}")
    expected, _ = prepare(save_image(tmp_path / "upright.png", TALL))
    assert size == (40, 24)
    np.testing.assert_allclose(image, expected, atol=0.03 if kind == "jpg" else 1e-5)


def test_a_reduced_page_of_a_tiff_file_is_passed_over(tmp_path, recwarn):
    reduced = (TALL[::4, ::4].copy(), {254: 1})
    for pages in ([reduced, (TALL, {})], [reduced, reduced, (TALL, {254: 0}), reduced],
                  [reduced, (TALL, {254: 1})]):  # all marked, so the largest
        (tmp_path / "a.tif").write_bytes(grey_tiff(*pages))
        image, size = prepare(tmp_path / "a.tif")
        assert size == (40, 24) and not recwarn.list
    (tmp_path / "a.tif").write_bytes(grey_tiff(reduced, (TALL, {}), (TALL.T.copy(), {})))
    with pytest.warns(errors.ImageWarning, match="has 2 frames"):
        assert prepare(tmp_path / "a.tif")[1] == (40, 24)


LARGE_PROFILE = zlib.compress(bytes(2**28))  # 256 MB
BROKEN = {
    "huge profile": chunk(b"iCCP", b"icc\0\0" + LARGE_PROFILE),
    "broken profile": chunk(b"iCCP", b"icc\0\0no zlib"),
    "huge text": chunk(b"zTXt", b"text\0\0" + LARGE_PROFILE),
    "huge XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE_PROFILE),
    "broken EXIF": chunk(b"eXIf", b"II*\0\xff\xff\xff\x7fjunk"),
    "wrong sum": chunk(b"tEXt", b"a\0b")[:-4] + b"junk",
    "broken resolution": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("error::radiographs.ImageWarning", "ignore:Corrupt EXIF")
def test_broken_metadata_refuse_no_png_image(tmp_path, name):
    content = save_image(tmp_path / "a.png", GRADIENT.astype(np.uint8)).read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + BROKEN[name] + content[33:])
    np.testing.assert_allclose(prepare(tmp_path / "a.png")[0], GRADIENT / 189, atol=1e-6)


def segment(marker, data):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.parametrize("data", [
    segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7fjunk"), segment(0xE1, b"Exif\0\0MM"),
    segment(0xE1, b"Exif\0\0" + bytes(40)), segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(60000)),
    segment(0xE2, b"ICC_PROFILE\0"), segment(0xE2, b"MPF\0II*\0\xff\xff\xff\x7f"),
    segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='99'"),
    segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff")])
def test_broken_metadata_refuse_no_jpeg_image(tmp_path, data):
    content = save_image(tmp_path / "a.jpg", GRADIENT.astype(np.uint8), quality=95).read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:2] + data + content[2:])
    assert np.abs(prepare(tmp_path / "a.jpg")[0] - GRADIENT / 189).max() < 0.05


@pytest.mark.parametrize("tag", [34675, 34665, 34853, 700, 33723, 34377, 305, 282, 330])
def test_broken_metadata_refuse_no_tiff_image(tmp_path, tag):
    (tmp_path / "a.tif").write_bytes(grey_tiff((GRADIENT.astype(np.uint8), {tag: 0x7FFFFFF0})))
    np.testing.assert_allclose(prepare(tmp_path / "a.tif")[0], GRADIENT / 189, atol=1e-6)


# JPEG files


@pytest.mark.parametrize("mode", ["L", "RGB", "progressive"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_jpeg_image_that_lost_a_part_is_refused(tmp_path, mode, number):
    pixels = SMOOTH[..., 0] if mode == "L" else SMOOTH
    content = damaged_jpeg(pixels, progressive=mode == "progressive")[number]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(errors.UnreadableImage, match="is damaged .*(Corrupt|Premature end)"):
        prepare(tmp_path / "a.jpg")


def test_bytes_between_the_parts_of_a_jpeg_image_are_a_remark(tmp_path):
    content = save_image(tmp_path / "a.jpg", GRADIENT.astype(np.uint8), quality=95).read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:-2] + bytes(10) + content[-2:])
    with pytest.warns(errors.ImageWarning, match="bytes .* that do not belong to it"):
        image, _ = prepare(tmp_path / "a.jpg")
    assert np.abs(image - GRADIENT / 189).max() < 0.05
    (tmp_path / "a.jpg").write_bytes(content[:-2] + bytes(100) + content[-2:])
    with pytest.raises(errors.UnreadableImage, match="extraneous bytes"):
        prepare(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["CMYK", "RGB"])
def test_jpeg_images_of_other_colours_are_read(tmp_path, kind):
    picture = Image.fromarray(GRADIENT.astype(np.uint8)).convert(kind)
    picture.save(tmp_path / "a.jpg", quality=95)
    assert prepare(tmp_path / "a.jpg")[0].std() > 0.1


# Other kinds


@pytest.mark.parametrize("format, name", [
    ("WEBP", "WebP"), ("BMP", "BMP"), ("GIF", "GIF"), ("JPEG2000", "JPEG 2000"), ("AVIF", "HEIF")])
@pytest.mark.parametrize("suffix", ["dcm", "png"])
def test_images_of_other_kinds_are_named_as_what_they_are(tmp_path, format, name, suffix):
    if format not in Image.registered_extensions().values():
        pytest.skip(f"Pillow has no {format} here")
    save_image(tmp_path / f"a.{suffix}", GRADIENT.astype(np.uint8), format=format)
    with pytest.raises(errors.UnreadableImage, match=f"is a {name} image, .*save it as PNG"):
        prepare(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("text", ["BMI,age", "RIFFRAFF", "GIF", "hello"])
def test_a_text_that_begins_like_an_image_is_no_image(tmp_path, text):
    (tmp_path / "a.dcm").write_text(text + 100 * " x")
    with pytest.raises(errors.UnreadableImage, match="is not a DICOM file"):
        prepare(tmp_path / "a.dcm")
