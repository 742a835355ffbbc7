import pytest
import torch

from pipeline.clip_model import open_model
from training.text import can_cut, encode_text, group_by_length, share_of_tokens


def backward(model, features_BD):
    model.zero_grad()
    (features_BD * torch.arange(features_BD.numel()).view_as(features_BD).cos()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["winnow-vit-tiny", "winnow-vitamin-tiny"])
@pytest.mark.parametrize(
    "captions", [["a cat", "two dogs"], ["", ""], ["a! b", "!! !"], ["word " * 40, "a", "two " * 9, "b"]]
)
def test_cut_captions_have_the_features_and_gradients_of_padded_ones(name, captions):
    opened = open_model(name)
    model, token_BL = opened.model, opened.tokenize(captions)
    assert can_cut(model) and min(length for _, length in group_by_length(token_BL)) == 8
    wanted_BD, given_BD = model.encode_text(token_BL, normalize=True), encode_text(model, token_BL)
    assert torch.allclose(given_BD, wanted_BD, rtol=0, atol=1e-6)
    wanted, given = backward(model, wanted_BD), backward(model, given_BD)
    assert wanted.keys() == given.keys() and any("positional_embedding" in key for key in given)
    for key in wanted:
        assert torch.allclose(given[key], wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()))
    assert model.state_dict().keys() == open_model(name).model.state_dict().keys()


def test_every_row_is_in_the_group_of_its_length():
    token_BL = torch.zeros(5, 20, dtype=torch.long)
    for row, end in enumerate([1, 9, 7, 19, 8]):
        token_BL[row, 0], token_BL[row, end] = 9, 8  # what lies between are tokens of `!`, which is 0 as padding is
    groups = {length: rows.tolist() for rows, length in group_by_length(token_BL)}
    assert groups == {8: [0, 2], 16: [1, 4], 20: [3]}
    assert share_of_tokens(token_BL.numpy()) == (2 * 8 + 2 * 16 + 20) / 100


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_towers_that_look_at_padding_are_left_alone(name):
    with torch.device("meta"):
        import open_clip

        tower = open_clip.model._build_text_tower(8, open_clip.get_model_config(name)["text_cfg"])
    assert not can_cut(torch.nn.ModuleDict({"text": tower}))
