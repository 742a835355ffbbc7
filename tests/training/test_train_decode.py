import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import training.decode as decode_module
from pipeline.clip_model import open_model
from pipeline.images import MAX_PIXELS, UnreadableImage, decode_image
from training.config import Augment
from training.decode import decode_jpeg, decode_pixels
from training.images import NUM_DRAWS, choose_box, crop_image, crop_pixels, read_crop, read_image
from training.order import draw_uniform


def photo(width, height, mode="RGB"):
    """Smooth shapes with some noise and some hard edges."""
    rng = np.random.default_rng(width + height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / (7 + 5 * c) + y / (11 + 3 * c)) for c in range(3)]
    pixels = np.stack(waves, 2) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (255, 0, 0)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image, kind="JPEG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def change_size(content, width, height):
    """The JPEG with other numbers in its frame header."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
JPEG = encode(photo(90, 60))
FILES = {
    "4:2:0": JPEG,
    "4:4:4": encode(photo(91, 61), subsampling=0),
    "4:2:2": encode(photo(33, 47), subsampling=1),
    "progressive": encode(photo(90, 60), progressive=True, quality=95),
    "grey": encode(photo(90, 60, "L")),
    "cmyk": encode(photo(90, 60, "CMYK")),
    "colours of an RGB JPEG": encode(photo(90, 60), keep_rgb=True),
    "turned by EXIF": encode(photo(90, 60), exif=ORIENTED),
    "one pixel": encode(photo(1, 1)),
    "5000 x 30": encode(photo(5000, 30)),
    "bytes after the end": JPEG + b"more" * 99,
    "png": encode(photo(90, 60), "PNG"),
    "palette": encode(photo(90, 60).quantize(16), "PNG", transparency=3),
    "transparent": encode(photo(90, 60, "RGBA"), "PNG"),
    "16 bit": encode(Image.fromarray(np.arange(60 * 90, dtype=np.uint16).reshape(60, 90) * 12), "PNG"),
    "webp": encode(photo(90, 60), "WEBP"),
}
BROKEN = {
    "empty": b"",
    "text": b"no image",
    "start alone": JPEG[:3],
    "an end in the header": JPEG[:400] + b"\xff\xd9" + JPEG[402:],
    "half": JPEG[: len(JPEG) // 2],
    "without its end": JPEG[:-2],
    "bomb": change_size(JPEG, 60_000, MAX_PIXELS // 60_000 + 1),
    "long strip": encode(photo(5000, 3)),
    "no size": change_size(JPEG, 0, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows(name):
    given = decode_pixels(FILES[name])
    assert given.dtype == np.uint8 and np.array_equal(given, np.asarray(decode_image(FILES[name])))


@pytest.mark.parametrize("name", FILES)
def test_exact_crops_are_pillows_whoever_decodes(name):
    crop, image = read_crop(open_model("winnow-vit-tiny").train_transform), decode_image(FILES[name])
    for uniform in draw_uniform(0, np.arange(4), NUM_DRAWS).tolist():
        assert np.array_equal(read_image(FILES[name], crop, uniform), crop_image(image, crop, uniform))


def test_a_simplejpeg_of_other_pixels_is_not_used(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    whole = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda content, **settings: whole(content, **settings) ^ 1)
    decode_module._find_simplejpeg.cache_clear()
    assert decode_jpeg(JPEG) is None and np.array_equal(decode_pixels(JPEG), np.asarray(decode_image(JPEG)))
    decode_module._find_simplejpeg.cache_clear()


@pytest.mark.parametrize("name", BROKEN)
def test_what_pillow_refuses_is_refused_for_the_same_reason(name):
    with pytest.raises(UnreadableImage) as wanted:
        decode_image(BROKEN[name])
    with pytest.raises(UnreadableImage) as given:
        decode_pixels(BROKEN[name])
    assert str(given.value) == str(wanted.value) and given.value.reason == wanted.value.reason


def test_changed_bytes_give_pillows_pixels_or_error():
    rng, differing = np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(JPEG)
        for place in rng.integers(2, len(JPEG), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        results = []
        for decode in (decode_image, decode_pixels):
            try:
                results.append(np.asarray(decode(bytes(content))).tobytes())
            except UnreadableImage:
                results.append(None)
        assert results[0] == results[1]
        differing += results[0] != np.asarray(decode_image(JPEG)).tobytes()
    assert differing > 100


@pytest.fixture(scope="module")
def crop():
    return replace(read_crop(open_model("winnow-vit-tiny").train_transform), height_px=224, width_px=224)


@pytest.mark.parametrize("size", [(256, 340), (512, 384), (1200, 900), (224, 224), (60, 40), (1, 1), (5000, 30)])
def test_torchs_resize_is_within_1_of_pillows(crop, size):
    """Pillow resizes width and then height; from 13.0 on tall images the other way round, which two calls prevent."""
    image, differences = photo(*size), []
    for uniform in draw_uniform(0, np.arange(3), NUM_DRAWS).tolist():
        part = image.crop(choose_box(*size, crop, uniform))
        narrow = part.resize((224, part.height), Image.Resampling.BICUBIC)
        wanted = np.asarray(narrow.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        given = crop_pixels(np.array(image), crop, uniform)
        assert given.dtype == np.uint8 and given.shape == (224, 224, 3)
        differences.append(np.abs(given - wanted))
        as_is = np.abs(given - crop_image(image, crop, uniform).astype(int))
        assert (as_is > 1).mean() < 2e-4 and as_is.mean() < 0.5
    is_enlarged = min(size) < 224 * 0.9  # then what the first pass rounds otherwise counts for more in the second
    assert np.max(differences) <= 1 + is_enlarged and np.mean(differences) < 0.01
    assert np.mean(np.array(differences) > 1) < 1e-4


def test_a_file_is_read_either_way_and_augmented_alike(crop):
    chance = draw_uniform(0, np.arange(1), NUM_DRAWS)[0].tolist()
    augment = Augment(flip_prob=1.0, color_jitter=(0.2, 0.2, 0.2, 0.0), color_jitter_prob=1.0)
    for each in (crop, replace(crop, augment=augment)):
        exact, fast = (read_image(JPEG, replace(each, pixels=way), chance) for way in ("exact", "fast"))
        assert exact.shape == fast.shape == (224, 224, 3)
        assert np.abs(exact.astype(int) - fast).max() <= 6
    plain = read_image(JPEG, crop, chance)
    assert np.array_equal(plain, crop_image(decode_image(JPEG), crop, chance))
