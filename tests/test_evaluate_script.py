"""evaluate.py as a user runs it: a checkpoint, a run folder, a folder of images, an .npz file; and what it refuses."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import save_image

import evaluate
import train
from libs.common.cli import run
from helpers import Place, tree
from libs.config import portable
from libs.data.images import write_npz


@pytest.fixture
def place(tmp_path):
    """Real images of two classes, 220 to train on and 220 others, at 32 pixels, and a random autoencoder to make features."""
    place = Place(tmp_path)
    shutil.rmtree(place.root / "images")
    tree(place.root / "images", {split: ["cat", "dog"] for split in ("train", "test")}, 110, height=40, width=40)
    place.weights = place.autoencoder()["model.vae_encoder_weights"]
    place.settings = ["dataset.img_size=32", "eval.features=autoencoder"]
    return place


@pytest.fixture
def call(place, monkeypatch, capsys):
    """call(arguments) -> (exit status, standard output, standard error) of evaluate.py in this process."""
    def call(*arguments, script=evaluate):
        monkeypatch.chdir(place.root)
        extra = ["--device", "cpu"] if script is evaluate else []
        if script is evaluate and "classifier" not in arguments:
            extra += ["--feature-weights", place.weights]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), *map(str, extra)])
        with pytest.raises(SystemExit) as e:
            run(script.main)
        return e.value.code or 0, *capsys.readouterr()
    return call


def run_folder(place):
    """An old run, with the config.txt that makes it one."""
    import yaml
    checkpoint = place.checkpoint(*place.settings, classes=["cat", "dog"])
    state = torch.load(checkpoint, weights_only=True)
    (checkpoint.parent / "config.txt").write_text(yaml.safe_dump(portable(state["config"])))
    return checkpoint.parent


def test_a_run_folder(place, call):
    folder = run_folder(place)
    status, out, err = call(folder, "--num", "204")
    assert status == 0, err
    assert "2 network calls an image, about" in out and "204 images" in out
    figures = json.loads((folder / "evaluation_epoch_000.json").read_text())
    assert figures["n"] == 204 and figures["steps"] == 2 and figures["step"] == 2 and figures["sampler"] == "ddim"
    for name in ("generated", "floor", "ceiling"):
        assert 0 <= figures[name]["fd_train"] < float("inf") and 0 <= figures[name]["recall"] <= 1
    assert figures["floor"]["fd_train"] < figures["generated"]["fd_train"]  # an untrained network
    assert "no sign of copies" in figures["memorization"]["copies"]["verdict"] in out
    assert f"{figures['generated']['fd_train']:.3f}" in out and f"{figures['ceiling']['fd_train']:.3f}" in out
    with Image.open(folder / "evaluation_epoch_000.png") as picture:
        assert picture.width > 10 * 32 * 2 and picture.height > 14 * 32 * 2
    board = EventAccumulator(str(folder / "logs")).Reload()
    event, = board.Scalars("evaluation/fd_train")
    assert event.value == pytest.approx(figures["generated"]["fd_train"], rel=1e-6) and event.step == 2
    # nothing is replaced unasked, and the same seed gives the same figures
    status, _, err = call(folder, "--num", "204")
    assert status == 2 and "--overwrite" in err
    assert call(folder, "--num", "204", "--overwrite", "--batch-size", "50")[0] == 0
    again = json.loads((folder / "evaluation_epoch_000.json").read_text())
    assert again["generated"]["fd_train"] == pytest.approx(figures["generated"]["fd_train"], rel=1e-3)


def test_images_of_a_folder_and_of_a_file_have_the_same_numbers(place, call):
    pixels = torch.randint(256, (230, 3, 32, 32), dtype=torch.uint8)
    write_npz(str(place.root / "a.npz"), pixels)
    (place.root / "pngs").mkdir()
    for i, image in enumerate(pixels):
        save_image(image / 255, place.root / "pngs" / f"{i:03d}.png")
    place.checkpoint(*place.settings)
    place.config.write_text(place.config.read_text().replace("img_size: 16", "img_size: 32")
                            + "eval: {features: autoencoder}\n")
    found = []
    for source in ("a.npz", "pngs"):
        status, out, err = call(source, "--config", place.config, "--output", f"{source}.json")
        assert status == 0, err
        found.append(json.loads((place.root / f"{source}.json").read_text()))
    assert found[0]["generated"] == found[1]["generated"] and found[0]["n"] == 220 and found[0]["n_all"][:2] == [230, 220]
    write_npz(str(place.root / "few.npz"), pixels[:150])
    for arguments, word in ((["a.npz"], "--config"), (["a.npz", "--config", place.config, "--steps", "3"], "--steps"),
                            (["few.npz", "--config", place.config], "150 images")):
        status, _, err = call(*arguments)
        assert status == 2 and word in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments, words", [
    (["--num", "50"], ["--num", "50", "200"]),
    (["--num", "0"], ["--num", "1 is the least"]),
    (["--sampler", "eular"], ["sampler", "eular", "euler"]),
    (["--steps", "11"], ["steps", "11", "10"]),
    (["--guidance-scale", "2"], ["guidance_scale", "2.0", "label_dropout"]),
    (["--features", "classifer"], ["--features", "classifer", "classifier"]),
    (["--features", "classifier"], ["classifier", "1 x 28 x 28"]),
    (["--output", "x.txt"], ["--output", "x.txt", ".json"]),
    (["--data-folder", "nowhere"], ["nowhere"]),
])
def test_what_cannot_be_evaluated(place, call, arguments, words):
    folder = run_folder(place)
    before = sorted(folder.rglob("*"))
    status, _, err = call(folder, "--num", "204", *arguments) if "--num" not in arguments else call(folder, *arguments)
    assert status == 2 and len(err.splitlines()) == 1 and all(w in err for w in words), err
    assert sorted(folder.rglob("*")) == before


def test_a_model_of_the_test_images_has_no_unseen_ones(place, call):
    status, _, err = call(place.checkpoint(*place.settings, "dataset.split=test"), "--num", "204")
    assert status == 2 and "dataset.split" in err and "--no-memorization" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("known, status", [(["dog", "cat"], 0), (["cat", "cow"], 2)])
def test_classes_are_matched_by_name(place, call, known, status):
    found, _, err = call(place.checkpoint(*place.settings, classes=known), "--num", "204", "--no-memorization")
    assert found == status and (status == 0 or "dog" in err and "cow" in err), err


def test_train_evaluates_as_it_goes(place, call, monkeypatch):
    path, saved, measure = place.config, [], train.RunFolder.evaluate

    def measure_later(*arguments):
        saved.append((place.runs / "tiny_x" / "model_final.pth.tar").exists())
        measure(*arguments)
    monkeypatch.setattr(train.RunFolder, "evaluate", measure_later)
    status, out, err = call(path, "--output", "x", "--set", "dataset.img_size=32", "--set", "train_cfg.epochs=2",
                            "--set", "eval.every=1", "--set", "eval.num=20", "--set", "eval.features=autoencoder",
                            "--set", f"model.vae_encoder_weights={place.weights}", script=train)
    assert status == 0, err
    assert saved == [False, True]  # before the last one, which could fail, all is saved
    board = EventAccumulator(str(place.runs / "tiny_x" / "logs")).Reload()
    assert [e.step for e in board.Scalars("eval/fd_train")] == [110, 220]
    assert board.Scalars("eval/fd_floor")[0].value == board.Scalars("eval/fd_floor")[1].value > 0
