"""evaluate.py as a user runs it: a checkpoint, a run folder, a folder of images, an .npz file; and what it refuses."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.utils import save_image

import evaluate
from helpers import Place, one_line, tree
from libs import UsageError, config
from libs.data.images import write_npz
from libs.evaluation.features import AutoencoderExtractor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Real images of two classes, 220 to train on and 220 others, at 32 pixels; features that cost nothing."""
    place = Place(tmp_path_factory.mktemp("place"))
    shutil.rmtree(place.root / "images")
    tree(place.root / "images", {split: ["cat", "dog"] for split in ("train", "test")}, 110, height=40, width=40)
    settings = yaml.safe_load(place.config.read_text())
    settings["dataset"]["img_size"] = 32
    settings["eval"] = {"features": "autoencoder"}
    settings["model"]["vae_encoder_weights"] = str(place.autoencoder()["model.vae_encoder_weights"])
    place.config.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CACHE", str(place.root / "cache"))
        patch.setattr(AutoencoderExtractor, "_features", lambda self, x: adaptive_avg_pool2d(x.float(), 4).flatten(1))
        yield place


@pytest.fixture
def run_folder(place, tmp_path):
    """A run folder, as of an old run, with the config.txt that makes it one."""
    checkpoint = place.checkpoint(classes=["cat", "dog"])
    shutil.copy(place.config, checkpoint.parent / "config.txt")
    return shutil.move(checkpoint.parent, tmp_path / "run")


def measure(*arguments):
    evaluate.main([*map(str, arguments), "--device", "cpu"])


def refused(words, *arguments):
    with pytest.raises(UsageError, match=words) as error:
        measure(*arguments)
    one_line(error)


def test_a_checkpoint_without_configuration(place, run_folder, tmp_path):
    """Such as the course's script writes them: with --config, which a checkpoint of ours refuses."""
    state = torch.load(run_folder / "epoch_000.pth.tar", weights_only=True)
    torch.save({"state_dict": state["state_dict"]}, tmp_path / "bare.pth.tar")
    settings = yaml.safe_load(place.config.read_text())
    settings["model"]["num_classes"] = 2
    (tmp_path / "course.yaml").write_text(yaml.safe_dump(settings))
    measure(tmp_path / "bare.pth.tar", "--config", tmp_path / "course.yaml", "--num", 12, "--no-memorization", "--output",
            tmp_path / "bare.json")
    assert json.loads((tmp_path / "bare.json").read_text())["n"] == 12
    refused("bare.pth.tar holds no configuration; .*--config", tmp_path / "bare.pth.tar")
    refused("--config: .*epoch_000.pth.tar has a configuration of its own", run_folder, "--config", place.config)


def test_a_run_folder(run_folder, capsys):
    measure(run_folder, "--num", 204)
    out = capsys.readouterr().out
    assert "2 network calls an image" in out and "204 images" in out
    figures = json.loads((run_folder / "evaluation_epoch_000.json").read_text())
    assert figures["n"] == 204 and figures["steps"] == 2 and figures["step"] == 2 and figures["sampler"] == "ddim"
    for name in ("generated", "floor", "floor_augmented", "ceiling"):
        assert 0 <= figures[name]["fd_train"] < float("inf") and 0 <= figures[name]["recall"] <= 1
    assert figures["floor"]["fd_train"] < figures["generated"]["fd_train"]  # an untrained network
    assert "no sign of copies" in figures["memorization"]["copies"]["verdict"] in out
    assert f"{figures['generated']['fd_train']:.3f}" in out and f"{figures['ceiling']['fd_train']:.3f}" in out
    with Image.open(run_folder / "evaluation_epoch_000.png") as picture:
        assert picture.width > 10 * 32 * 2 and picture.height > 14 * 32 * 2
    event, = EventAccumulator(str(run_folder / "logs")).Reload().Scalars("evaluation/fd_train")
    assert event.value == pytest.approx(figures["generated"]["fd_train"], rel=1e-6) and event.step == 2
    # nothing is replaced unasked, and the same seed gives the same figures
    refused("evaluation_epoch_000.json exists; .*--overwrite", run_folder, "--num", 204)
    measure(run_folder, "--num", 204, "--overwrite", "--batch-size", 50, "--no-memorization")
    again = json.loads((run_folder / "evaluation_epoch_000.json").read_text())
    assert again["generated"]["fd_train"] == pytest.approx(figures["generated"]["fd_train"], rel=1e-3)


def test_a_folder_and_a_file_of_the_same_images_have_the_same_numbers(place, tmp_path):
    pixels, found = torch.randint(256, (230, 3, 32, 32), dtype=torch.uint8), []
    write_npz(str(tmp_path / "a.npz"), pixels)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(pixels):
        save_image(image / 255, tmp_path / "pngs" / f"{i:03d}.png")
    for source in ("a.npz", "pngs"):
        measure(tmp_path / source, "--config", place.config, "--output", tmp_path / f"{source}.json",
                "--no-memorization")
        found.append(json.loads((tmp_path / f"{source}.json").read_text()))
    assert found[0]["generated"] == found[1]["generated"]
    assert found[0]["n"] == 220 and found[0]["n_all"] == [230, 220, 220]
    write_npz(str(tmp_path / "few.npz"), pixels[:150])
    refused("--config: .*a.npz holds images", tmp_path / "a.npz")
    refused("--steps: .*a.npz holds images", tmp_path / "a.npz", "--config", place.config, "--steps", 3)
    refused("images in .*few.npz: 150 is too few", tmp_path / "few.npz", "--config", place.config, "--output",
            tmp_path / "x.json")


@pytest.mark.parametrize("arguments, words", [
    (["--num", 50], "--num: 50 is too few .* 200"),
    (["--sampler", "eular"], "sampler.*eular"),
    (["--features", "classifer"], "--features: .*classifer.*classifier"),
    (["--features", "classifier"], "classifier: images are .* B x 1 x 28 x 28"),
    (["--output", "x.txt"], "--output: x.txt must end in .json"),
    (["--data-folder", "nowhere"], "nowhere"),
])
def test_what_cannot_be_evaluated(run_folder, arguments, words):
    before = sorted(run_folder.rglob("*"))
    refused(words, run_folder, "--num", 204, *arguments)
    assert sorted(run_folder.rglob("*")) == before


def test_a_model_of_the_test_images_has_no_unseen_ones(place, tmp_path):
    refused("dataset.split: .*--no-memorization", place.checkpoint("dataset.split=test"), "--output", tmp_path / "x.json")


def test_classes_are_matched_by_name(place, tmp_path):
    options = ["--num", 12, "--no-memorization", "--output", tmp_path / "x.json"]
    measure(place.checkpoint(classes=["dog", "cat"]), *options)
    refused("class dog .* none of the model's .*cow", place.checkpoint(classes=["cat", "cow"]), *options, "--overwrite")
