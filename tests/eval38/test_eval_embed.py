import io
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from eval38 import embed
from eval38.embed import (
    Embedder,
    Encoder,
    Seen,
    decode_batches,
    decode_row,
    keep_float32,
    see_images,
    spell_prompts,
    split_transform,
)
from eval38.rows import ImageRow, LostImage
from pipeline.clip_model import open_model
from pipeline.errors import ModelError
from pipeline.images import MAX_ASPECT, MAX_PIXELS

TF32_SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)


def _encode(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def _noise(seed: int, *, width: int = 50, height: int = 41) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(open_model("winnow-vit-tiny"), device="cpu", precision="fp32")


def test_images_get_the_bits_of_the_models_transform(encoder: Encoder) -> None:
    images = [_noise(seed, width=30 + seed) for seed in range(5)]
    rows = [ImageRow(str(n), _encode(image), n) for n, image in enumerate(images)]
    (batch,) = decode_batches(rows, encoder.geometry, batch_size=8)
    wanted_N3HW = torch.stack([encoder.opened.eval_transform(image) for image in images])
    found_N3HW = encoder.scale(batch.image_NHW3.permute(0, 3, 1, 2).contiguous().float().div(255))
    assert torch.equal(found_N3HW, wanted_N3HW)
    vector_ND = encoder.encode_images(batch.image_NHW3)
    assert torch.allclose(vector_ND.norm(dim=1), torch.ones(5)) and vector_ND.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_every_mode_is_read_as_rgb(encoder: Encoder, mode: str) -> None:
    image = _noise(1).convert("I").convert(mode) if mode == "I;16" else _noise(1).convert(mode)
    pixels = decode_row(ImageRow("a", _encode(image), 0), encoder.geometry)
    assert not isinstance(pixels, LostImage) and pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.array(encoder.geometry(image.convert("RGB"))))  # before it is resized


@pytest.mark.parametrize("num_rows", [0, 1, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 33, 64])
def test_batches_keep_the_order_and_account_for_every_row(encoder: Encoder, num_rows: int, batch_size: int) -> None:
    good = _encode(_noise(0))
    rows = [ImageRow(str(n), b"broken" if n % 7 == 3 else good, n) for n in range(num_rows)]
    batches = list(decode_batches(rows, encoder.geometry, batch_size=batch_size, num_threads=2))
    labels = [truth for batch in batches for truth in batch.truths]
    lost = [row.name for batch in batches for row in batch.lost]
    assert labels == [n for n in range(num_rows) if n % 7 != 3]
    assert lost == [str(n) for n in range(num_rows) if n % 7 == 3]
    assert all(len(batch.truths) + len(batch.lost) == batch_size for batch in batches[:-1])


def test_reading_ahead_is_bounded_by_bytes(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PIECE_BYTES", 3 << 20)
    monkeypatch.setattr(embed, "BYTES_AHEAD", 8 << 20)
    image = _encode(_noise(0))
    lock, made, gone, most = threading.Lock(), 0, 0, 0

    class Content(bytes):
        def __del__(self) -> None:
            nonlocal gone
            with lock:
                gone += 1

    def rows() -> Iterator[ImageRow[int]]:
        nonlocal made, most
        for n in range(40):
            with lock:
                made += 1
                most = max(most, made - gone)
            yield ImageRow(str(n), Content(image + bytes(1 << 20)), n)

    batches = list(decode_batches(rows(), encoder.geometry, batch_size=20, num_threads=1))
    assert [truth for batch in batches for truth in batch.truths] == list(range(40))
    assert 3 <= most <= 14, "8 MiB ahead, a piece just read, one just decoded"


def test_an_error_in_the_rows_reaches_the_caller(encoder: Encoder) -> None:
    def rows() -> "object":
        yield ImageRow("a", _encode(_noise(0)), 0)
        raise ModelError("stop")

    with pytest.raises(ModelError, match="stop"):
        list(decode_batches(rows(), encoder.geometry, batch_size=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (b"", "unreadable_image", "not an image"),
        (_encode(_noise(2), "GIF"), "unreadable_image", "not an image"),
        (_encode(_noise(2), "JPEG")[:-400], "unreadable_image", "truncated"),
        (_encode(Image.new("1", (MAX_PIXELS // 1000 + 1, 1000))), "oversized_image", "over the limit"),
        (_encode(Image.new("1", (MAX_ASPECT + 1, 1))), "oversized_image", "longer than 256 times"),
    ],
)
def test_an_image_that_is_lost_says_why(encoder: Encoder, content: bytes, reason: str, message: str) -> None:
    found = decode_row(ImageRow("0.tar:a", content, 0), encoder.geometry)
    assert isinstance(found, LostImage) and found.reason == reason
    assert message in found.message and " at 0x" not in found.message


def test_prompts_of_any_script_and_length(encoder: Encoder) -> None:
    prompts = ["a cat", "", "мяч 球", "word " * 200]
    text_MD = encoder.encode_prompts(prompts, quiet=True)
    assert text_MD.shape == (4, 128) and torch.allclose(text_MD.norm(dim=1), torch.ones(4))
    assert torch.allclose(encoder.encode_prompts(prompts[:1], quiet=True), text_MD[:1], atol=1e-6)


def test_prompts_are_spelled_by_class_and_template() -> None:
    found = spell_prompts(["red", "green"], ["a {c} {x} {c}", "{c}!"])
    assert found == ["a red {x} red", "red!", "a green {x} green", "green!"]


def test_class_vectors_average_unit_prompts(encoder: Encoder) -> None:
    model = Embedder(encoder, quiet=True)
    class_CD = model.embed_classes(["cat", "dog"], ["a {c}", "{c}s"])
    text_MD = encoder.encode_prompts(["a cat", "cats", "a dog", "dogs"], quiet=True)
    wanted_CD = torch.nn.functional.normalize(torch.stack([text_MD[:2].mean(0), text_MD[2:].mean(0)]), dim=1)
    assert torch.allclose(class_CD, wanted_CD, atol=1e-6)


def test_a_prompt_is_read_once(encoder: Encoder) -> None:
    model = Embedder(encoder, quiet=True)
    first_MD = model.embed_texts(["a", "b", "a"])
    second_MD = model.embed_texts(["c", "b", "a"])
    assert len(model._text_MD) == 3 and model.embed_texts([]).shape == (0, 128)
    assert torch.equal(first_MD[0], first_MD[2]) and torch.equal(second_MD[1:], first_MD[[1, 0]])
    assert torch.allclose(second_MD, encoder.encode_prompts(["c", "b", "a"], quiet=True), atol=1e-6)


def test_a_set_is_seen_in_order_in_one_pass(encoder: Encoder) -> None:
    rows = [ImageRow(str(n), _encode(_noise(n)), f"truth {n}") for n in range(7)]
    lost = LostImage("gone", "missing_image", "why")
    (seen,) = see_images([*rows[:4], lost, *rows[4:]], [encoder], batch_size=3, name="toy", quiet=True)
    assert isinstance(seen, Seen)
    assert seen.truths == tuple(f"truth {n}" for n in range(7)) and seen.lost == (lost,)
    (batch,) = decode_batches(rows, encoder.geometry, batch_size=7)
    assert torch.allclose(seen.image_ND, encoder.encode_images(batch.image_NHW3), atol=1e-6)


def test_bf16_is_close(encoder: Encoder) -> None:
    reduced = Encoder(encoder.opened, device="cpu", precision="bf16")
    image_NHW3 = torch.from_numpy(np.stack([np.array(_noise(n, width=32, height=32)) for n in range(4)]))
    cosine_N = (reduced.encode_images(image_NHW3) * encoder.encode_images(image_NHW3)).sum(dim=1)
    assert cosine_N.dtype == torch.float32 and bool((cosine_N > 0.999).all())
    prompts = ["a cat", "a dog", "a photo of many things"]
    found_MD, wanted_MD = (one.encode_prompts(prompts, quiet=True) for one in (reduced, encoder))
    assert bool(((found_MD * wanted_MD).sum(dim=1) > 0.999).all()) and not torch.equal(found_MD, wanted_MD)


def test_vectors_that_are_not_finite_are_no_result() -> None:
    """torch's argmax takes NaN for the best class: a model that diverged would have a score."""
    opened = open_model("winnow-vit-tiny")
    with torch.no_grad():
        opened.model.positional_embedding.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite in fp32"):
        Encoder(opened, device="cpu", precision="fp32").encode_prompts(["a"], quiet=True)


def test_foreign_transform_is_refused() -> None:
    with pytest.raises(ModelError, match="does not end in ToTensor"):
        split_transform(lambda image: image)


@pytest.fixture(params=[True, False])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The switches, on or off; as they were after the test."""
    before = [switch.allow_tf32 for switch in TF32_SWITCHES]
    for switch in TF32_SWITCHES:
        switch.allow_tf32 = request.param
    yield request.param
    for switch, allowed in zip(TF32_SWITCHES, before, strict=True):
        switch.allow_tf32 = allowed


def test_a_model_runs_without_tf32_and_the_switches_are_put_back(encoder: Encoder, tf32: bool) -> None:
    seen: list[bool] = []
    hook = encoder.opened.model.visual.register_forward_hook(
        lambda *_: seen.extend(switch.allow_tf32 for switch in TF32_SWITCHES)
    )
    encoder.encode_images(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    hook.remove()
    assert seen == [False, False] and [switch.allow_tf32 for switch in TF32_SWITCHES] == [tf32, tf32]
    with pytest.raises(RuntimeError), keep_float32():
        raise RuntimeError
    assert [switch.allow_tf32 for switch in TF32_SWITCHES] == [tf32, tf32]
