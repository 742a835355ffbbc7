import io

import numpy as np
import pytest
import torch
from PIL import Image

from eval38.embed import Encoder, build_class_vectors, decode_batches, decode_row, split_transform
from eval38.rows import LabelledImage, LostImage
from pipeline.clip_model import open_model
from pipeline.errors import ModelError
from pipeline.images import MAX_PIXELS


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
    rows = [LabelledImage(str(n), n, _encode(image)) for n, image in enumerate(images)]
    (batch,) = decode_batches(rows, encoder.geometry, batch_size=8)
    wanted_N3HW = torch.stack([encoder.opened.eval_transform(image) for image in images])
    found_N3HW = encoder.scale(batch.image_NHW3.permute(0, 3, 1, 2).contiguous().float().div(255))
    assert torch.equal(found_N3HW, wanted_N3HW)
    vector_ND = encoder.encode_images(batch.image_NHW3)
    assert torch.allclose(vector_ND.norm(dim=1), torch.ones(5)) and vector_ND.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_every_mode_is_read_as_rgb(encoder: Encoder, mode: str) -> None:
    image = _noise(1).convert("I").convert(mode) if mode == "I;16" else _noise(1).convert(mode)
    pixels = decode_row(LabelledImage("a", 0, _encode(image)), encoder.geometry)
    assert not isinstance(pixels, LostImage) and pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.array(encoder.geometry(image.convert("RGB"))))  # before it is resized


@pytest.mark.parametrize("num_rows", [0, 1, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 33, 64])
def test_batches_keep_the_order_and_account_for_every_row(encoder: Encoder, num_rows: int, batch_size: int) -> None:
    good = _encode(_noise(0))
    rows = [LabelledImage(str(n), n, b"broken" if n % 7 == 3 else good) for n in range(num_rows)]
    batches = list(decode_batches(rows, encoder.geometry, batch_size=batch_size, num_threads=2))
    labels = [label for batch in batches for label in batch.label_N.tolist()]
    lost = [row.name for batch in batches for row in batch.lost]
    assert labels == [n for n in range(num_rows) if n % 7 != 3]
    assert lost == [str(n) for n in range(num_rows) if n % 7 == 3]
    assert all(len(batch.label_N) + len(batch.lost) == batch_size for batch in batches[:-1])


def test_an_error_in_the_rows_reaches_the_caller(encoder: Encoder) -> None:
    def rows() -> "object":
        yield LabelledImage("a", 0, _encode(_noise(0)))
        raise ModelError("stop")

    with pytest.raises(ModelError, match="stop"):
        list(decode_batches(rows(), encoder.geometry, batch_size=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (_encode(_noise(2), "GIF"), "not an image"),
        (_encode(_noise(2), "JPEG")[:-400], "truncated"),
        (_encode(Image.new("1", (MAX_PIXELS // 1000 + 1, 1000))), "over the limit"),
    ],
)
def test_unreadable_image_says_why(encoder: Encoder, content: bytes, message: str) -> None:
    found = decode_row(LabelledImage("0.tar:a", 0, content), encoder.geometry)
    assert isinstance(found, LostImage) and found.reason == "unreadable_image"
    assert message in found.message and " at 0x" not in found.message


def test_prompts_of_any_script_and_length(encoder: Encoder) -> None:
    prompts = ["a cat", "", "мяч 球", "word " * 200]
    text_MD = encoder.encode_prompts(prompts, quiet=True)
    assert text_MD.shape == (4, 128) and torch.allclose(text_MD.norm(dim=1), torch.ones(4))
    assert torch.allclose(encoder.encode_prompts(prompts[:1], quiet=True), text_MD[:1], atol=1e-6)


def test_class_vectors_average_unit_prompts() -> None:
    text_MD = torch.eye(3)
    class_CD = build_class_vectors(text_MD, torch.tensor([[0, 1], [2, 2]]))
    assert torch.allclose(class_CD, torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [0.0, 0.0, 1.0]]))


def test_bf16_is_close(encoder: Encoder) -> None:
    reduced = Encoder(encoder.opened, device="cpu", precision="bf16")
    image_NHW3 = torch.from_numpy(np.stack([np.array(_noise(n, width=32, height=32)) for n in range(4)]))
    cosine_N = (reduced.encode_images(image_NHW3) * encoder.encode_images(image_NHW3)).sum(dim=1)
    assert cosine_N.dtype == torch.float32 and bool((cosine_N > 0.999).all())


def test_foreign_transform_is_refused() -> None:
    with pytest.raises(ModelError, match="does not end in ToTensor"):
        split_transform(lambda image: image)
