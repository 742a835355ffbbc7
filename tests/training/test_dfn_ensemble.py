import shutil

import pytest
import torch

from pipeline.clip_model import open_model
from pipeline.errors import ConfigError, ModelError, StageError
from pipeline.images import decode_image
from training.captioned import TrainSet, as_sets, read_sets
from training.config import TrainConfig
from training.ensemble import interpolate, write_ensemble
from training.retrieval import measure_heldout, measure_recall
from training.run import plan_run, train
from training.start import find_start

TINY = {"model": "winnow-vit-tiny", "samples": 64, "batch_size": 32}


@pytest.fixture(scope="module")
def runs(squares, tmp_path_factory):
    """Two runs of one architecture."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("before", "after")]
    for seed, folder in enumerate(folders):
        train(TrainConfig(**TINY, seed=seed), data=str(squares), out=str(folder), quiet=True)
    return [str(folder) for folder in folders]


def states(runs):
    return [torch.load(f"{run}/checkpoint.pt", weights_only=True)["state_dict"] for run in runs]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_opens_as_a_model(runs, tmp_path, share):
    write_ensemble(str(tmp_path), before=runs[0], after=runs[1], share=share, architecture="winnow-vit-tiny")
    before, after = states(runs)
    for name, tensor in open_model(str(tmp_path)).model.state_dict().items():
        wanted = [before[name], after[name]][int(share)] if share in (0, 1) else 0.7 * before[name] + 0.3 * after[name]
        assert torch.equal(tensor, wanted), name


def test_half_precision_is_mixed_in_single_and_counts_are_those_after():
    before = {"w": torch.tensor([1.0, -0.0]).half(), "n": torch.tensor(3)}
    after = {"w": torch.tensor([1.001, 5.0]).half(), "n": torch.tensor(8)}
    mixed = interpolate(before, after, 0.25)
    exact = 0.75 * before["w"].double() + 0.25 * after["w"].double()
    assert torch.equal(mixed["w"], exact.half()) and mixed["w"].dtype == torch.float16
    assert mixed["n"] == 8


def test_weights_of_two_architectures_are_refused():
    with pytest.raises(ModelError, match="differ in v, w"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(3), "v": torch.zeros(1)}, 0.5)


def test_recall_equals_a_plain_count(runs, tmp_path, write_shards, square_rows):
    """By open_clip's own transform, and counting one image and one caption at a time."""
    opened = open_model(runs[1])
    index = read_sets(as_sets(str(write_shards(tmp_path, square_rows(48)))), tokenize=opened.tokenize, quiet=True)
    index.caption_N[:16:2] = index.caption_N[1:16:2]  # rows that share a caption
    own, captions = index.caption_N.tolist(), sorted(set(index.caption_N.tolist()))
    images = torch.stack([opened.eval_transform(decode_image(image)) for _, image in square_rows(48)])
    with torch.no_grad():
        image_ND = opened.model.encode_image(images, normalize=True)
        text_UD = opened.model.encode_text(torch.from_numpy(index.token_UL[captions]).long(), normalize=True)
    cosine = {(n, c): float(image_ND[n] @ text_UD[k]) for n in range(48) for k, c in enumerate(captions)}
    right_images = sum(max(captions, key=lambda c: cosine[n, c]) == own[n] for n in range(48))
    right_texts = sum(own[max(range(48), key=lambda n: cosine[n, c])] == c for c in captions)
    recall = measure_recall(opened, index)
    assert (recall.pairs, recall.captions) == (48, 40)
    assert recall.image_to_text == pytest.approx(right_images / 48) and right_images
    assert recall.text_to_image == pytest.approx(right_texts / 40) and right_texts


def test_held_out_pairs_are_measured(runs, squares, tmp_path, write_shards):
    config = TrainConfig(**TINY, heldout=20)
    recalls = measure_heldout(config, data=str(squares), models=runs, quiet=True)
    assert [(r.pairs, r.captions) for r in recalls] == [(20, 20), (20, 20)]
    broken = write_shards(tmp_path, [("a", b"x"), ("b", b"y"), ("c", b"z")])
    with pytest.raises(StageError, match="none of 2 held-out images"):
        measure_heldout(TrainConfig(**TINY, heldout=2), data=str(broken), models=runs[:1], quiet=True)


def test_a_run_starts_from_given_weights(runs, squares, tmp_path):
    """With a learning rate that moves nothing, what comes out is what went in."""
    config = TrainConfig(**TINY, learning_rate=1e-30)
    manifest = train(config, data=str(squares), out=str(tmp_path / "out"), init=runs[1], quiet=True)
    assert set(manifest.parents) == {"data", "weights"} and manifest.config["model"] == "winnow-vit-tiny"
    wanted, got = states([runs[1], str(tmp_path / "out")])
    assert all(torch.allclose(wanted[name], got[name], atol=1e-7) for name in wanted)


def test_sets_are_accounted_one_by_one(squares, tmp_path, write_shards, square_rows):
    other = write_shards(tmp_path / "other", [*square_rows(5), ("bad", b"x")])
    sets = [TrainSet("a", as_sets(str(squares))[0].urls, 1), TrainSet("b", as_sets(str(other))[0].urls, 1)]
    manifest = train(TrainConfig(**TINY | {"samples": 128}), data=sets, out=str(tmp_path / "out"), quiet=True)
    assert manifest.config["sets"] == [["a", 1], ["b", 1]] and set(manifest.parents) == {"a", "b"}
    other_way = plan_run(TrainConfig(**TINY | {"samples": 128}), sets[::-1])
    assert other_way.identity != manifest.identity  # rows are numbered in the order of the sets
    assert manifest.counts["a"].kept == 256
    assert (manifest.counts["b"].kept, manifest.counts["b"].failed) == (5, {"unreadable_image": 1})


@pytest.mark.parametrize(
    ("model", "init", "error", "message"),
    [
        ("winnow-vit-tiny", "openai", ConfigError, "pretrained tag of winnow-vit-tiny"),
        ("winnow-vit-small", "RUN", ConfigError, "is a winnow-vit-tiny, not a winnow-vit-small"),
        ("winnow-vit-tiny@RUN/checkpoint.pt", "RUN", ConfigError, "names weights and so does init"),
        ("winnow-vit-tiny", "absent/folder", ModelError, "absent/folder"),
        ("winnow-vit-tiny", "OUT", ModelError, "into itself"),
        ("winnow-vit-tiny", "OUT/../BASE/.", ModelError, "into itself"),
    ],
)
def test_a_start_that_does_not_fit_says_so(runs, tmp_path, model, init, error, message):
    model, init = (
        text.replace("RUN", runs[0]).replace("OUT", str(tmp_path)).replace("BASE", tmp_path.name)
        for text in (model, init)
    )
    with pytest.raises(error, match=message):
        find_start(model, init, out=str(tmp_path))


@pytest.mark.parametrize("place", ["RUN/checkpoint.pt", "LINK", "RUN/../first/checkpoint.pt"])
@pytest.mark.parametrize("how", ["model", "init", "lock_text"])
def test_a_run_does_not_start_from_a_file_of_its_own_folder(runs, tmp_path, how, place):
    out = tmp_path / "first"
    shutil.copytree(runs[0], out)
    (tmp_path / "link.pt").symlink_to(out / "checkpoint.pt")
    file = place.replace("RUN", str(out)).replace("LINK", str(tmp_path / "link.pt"))
    given = {"model": "winnow-vit-tiny", "init": None} | {how: f"winnow-vit-tiny@{file}"}
    with pytest.raises(ModelError, match=r"into itself: .* Copy them to another folder"):
        find_start(**given, out=str(out))
    find_start(**given, out=str(tmp_path))
    find_start(**given, out=str(tmp_path / "absent"))


def test_a_file_as_init_is_told_how_to_be_named(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"say winnow-vit-tiny@.*checkpoint\.pt"):
        find_start("winnow-vit-tiny", f"{runs[0]}/checkpoint.pt", out=str(tmp_path))


def test_a_tag_alone_belongs_to_the_architecture(tmp_path):
    assert find_start("ViT-B-32-quickgelu", "openai", out=str(tmp_path)).model == "ViT-B-32-quickgelu/openai"
