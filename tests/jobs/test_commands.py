"""The command line as a user meets it: verbs, exit codes, messages."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import VERBS
from jobs.__main__ import main
from jobs.arguments import add_fresh, add_recipe, make_parser, split_words
from jobs.recipes import builtin_recipes, load_recipe
from jobs.zip_code import write_zip
from pipeline.errors import ConfigError

MakePool = Callable[..., Path]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*verb.split(), "--help"])
    assert exit.value.code == 0
    assert f"winnow {verb}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("library", ["torch", "open_clip", "pyspark", "pandas"])
def test_commands_answer_before_large_libraries_are_imported(library: str) -> None:
    modules = ", ".join(module for module, _ in VERBS.values())
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert {library!r} not in sys.modules"], check=True)


def test_no_verb_and_wrong_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["scor"]) == 2
    assert "did you mean 'score'" in capsys.readouterr().err
    for words in (["eval", "downlod", "--out", "o"], ["dfn", "clibrate"], ["dfn"]):
        assert main(words) == 2
        assert "unknown verb" in (said := capsys.readouterr().err) and f"'{words[0]} " in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["score", "dfn-tny", "--pool", "p", "--out", "o"], 2, "did you mean 'dfn-tiny'"),
        (["score", "a", "b", "--pool", "p", "--out", "o"], 2, "two recipes given"),
        (["score", "none.yaml", "--pool", "p", "--out", "o"], 2, "no recipe file 'none.yaml'"),
        (["score", "dfn-tiny", "--pool", "p", "--out", ""], 2, "--out is empty"),
        (["report", ""], 2, "run is empty"),
        (["train", "--data", "p", "--out", "o"], 2, "does not train"),
        (["train", "dfn-tiny", "train.sampels=3", "--data", "p", "--out", "o"], 2, "did you mean 'samples'"),
        (["train", "dfn-tiny", "train.samples=100", "--data", "p", "--out", "o"], 2, "multiple of"),
        (["dfn", "train", "dfn-tiny", "--network", "dnf", "--clean", "p", "--out", "o"], 2, "did you mean 'dfn'"),
        (["select", "--scores", "s", "--out", "o"], 2, "has no subsets"),
        (["eval", "--model", "ViT-B-33", "--data", "d", "--out", "o"], 1, "d holds no evaluation set"),
        (["eval", "eval.tasks=[cifar11]", "--model", "m", "--data", "d", "--out", "o"], 2, "did you mean 'cifar1"),
        (["recipes", "no-such-recipe"], 2, "Known:"),
        (["dfn", "calibrate", "--scores", "none", "--by", "x", "--fraction", "0.1"], 1, "no finished scores"),
    ],
)
def test_mistakes_are_explained(
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, word in [("recipes", "dfn-tiny"), ("filters", "clip_score"), ("tasks", "imagenet1k"), ("doctor", "java")]:
        assert main([verb]) == 0
        assert word in capsys.readouterr().out


def test_builtin_recipes_are_valid_and_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in builtin_recipes():
        recipe = load_recipe(name)
        assert recipe.source
        main(["recipes", name])
        (tmp_path / f"{name}.yaml").write_text(capsys.readouterr().out)
        assert load_recipe(str(tmp_path / f"{name}.yaml")) == recipe


def test_a_subset_may_not_be_called_as_a_networks_evaluation_is() -> None:
    with pytest.raises(ConfigError, match="subset 'network-dfn' would be evaluated where a network is"):
        load_recipe("dfn-tiny", ["subsets.network-dfn=[]"])


def test_recipe_that_scores_with_a_network_it_lacks() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dfn'"):
        load_recipe("dfn-tiny", ["score.3.model=network:dfnn"])


def test_zip_is_whole_and_the_same_twice(tmp_path: Path) -> None:
    import zipfile

    num_files = write_zip(str(tmp_path / "a.zip"))
    write_zip(str(tmp_path / "b.zip"))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    assert len(names) == num_files
    for needed in ("pipeline/__init__.py", "pipeline/clip_models/winnow-vit-tiny.json", "jobs/recipes/demo.yaml"):
        assert needed in names


@pytest.mark.parametrize("words", [["r.yaml", "a=1", "--out", "x"], ["r.yaml", "--out", "x", "a=1"]])
def test_overrides_stand_before_or_after_flags(words: list[str]) -> None:
    parser = make_parser("score", "", "")
    add_recipe(parser)
    parser.add_argument("--out", required=True)
    add_fresh(parser)
    args = parser.parse_args(words)
    assert (split_words(args.words), args.out) == (("r.yaml", ["a=1"]), "x")
