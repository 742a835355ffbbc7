import pytest
import torch
from torch import Tensor

from eval38.config import Precision
from eval38.embed import Encoder
from eval38.text import encode_text, group_prompts, measure_lengths
from pipeline.clip_model import open_model

PROMPTS = ["a photo of a cat, seen from far away.", "cat", "", "! !", "a cat", "мяч 球", "word " * 40]


def watch_widths(model: torch.nn.Module) -> list[int]:
    """Return a list that gets the width of every batch of tokens that the model's text tower embeds."""
    widths: list[int] = []
    tower = getattr(model, "text", model)
    tower.token_embedding.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    return widths


@pytest.mark.parametrize("architecture", ["winnow-vit-tiny", "winnow-vitamin-tiny"])
def test_a_short_prompt_runs_short_and_has_the_features_of_the_full_length(architecture: str) -> None:
    opened = open_model(architecture)
    token_ML = opened.tokenize(PROMPTS)
    widths = watch_widths(opened.model)
    with torch.inference_mode():
        full_MD = opened.model.encode_text(token_ML)
        cut_MD = torch.cat([encode_text(opened.model, row_1L) for row_1L in token_ML.split(1)])
    assert widths == [16, *measure_lengths(token_ML).tolist()] and min(widths) == 2
    assert torch.allclose(cut_MD, full_MD, atol=1e-5) and full_MD.abs().max() > 1


def test_a_tower_that_reads_padding_gets_it() -> None:
    model = open_model("winnow-vit-tiny").model
    model.attn_mask = None
    token_ML, widths = open_model("winnow-vit-tiny").tokenize(PROMPTS), watch_widths(model)
    with torch.inference_mode():
        assert torch.equal(encode_text(model, token_ML[4:5]), model.encode_text(token_ML[4:5]))
    assert widths == [16, 16] and [rows.tolist() for rows in group_prompts(model, token_ML)] == [[*range(len(PROMPTS))]]


def test_prompts_of_one_length_go_together_and_come_back_in_order() -> None:
    encoder = Encoder(open_model("winnow-vit-tiny"), device="cpu", precision="fp32")
    widths, prompts = watch_widths(encoder.opened.model), [f"{'so ' * (n % 3)}x" for n in range(1200)]
    prompts[:9] = [f"{n}" for n in range(9)]
    found_MD = encoder.encode_prompts(prompts, quiet=True)
    assert widths == [3, 4, 5]
    with torch.inference_mode():
        full_MD: Tensor = encoder.opened.model.encode_text(encoder.opened.tokenize(prompts), normalize=True)
    assert torch.allclose(found_MD, full_MD, atol=1e-6)
    assert not torch.allclose(found_MD[1:9], full_MD[:8], atol=1e-3)  # so that another order would be seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vector_does_not_depend_on_what_else_is_encoded(precision: Precision) -> None:
    """Else a result would depend on the other tasks of the command, and on where a killed one went on."""
    encoder = Encoder(open_model("winnow-vit-tiny"), device="cpu", precision=precision)
    prompts = [f"{'so ' * (n % 9)}{n}" for n in range(400)]
    image_NHW3 = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        text_MD, image_ND = encoder.encode_prompts(prompts, quiet=True), encoder.encode_images(image_NHW3)
        for few in (1, 2, 5, 17, 100):
            assert torch.equal(encoder.encode_prompts(prompts[-few:], quiet=True), text_MD[-few:])
            assert torch.equal(encoder.encode_images(image_NHW3[:few]), image_ND[:few])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tokens", "length"), [([5, 0, 7, 0, 0], 3), ([5, 6, 7, 8, 9], 5), ([0, 0, 0, 0, 0], 1), ([5, 7, 1, 1, 1], 5)]
)
def test_a_prompt_ends_at_its_last_token_that_is_not_padding(tokens: list[int], length: int) -> None:
    assert measure_lengths(torch.tensor([tokens])).tolist() == [length]
