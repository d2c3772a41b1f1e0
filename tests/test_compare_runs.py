"""compare_runs.py as a user runs it: kinds of runs, their samples and their errors of denoising."""

import json
import shutil
import statistics
import sys

import pytest
import torch

import compare_runs
from cli import run
from helpers import Place, tree
from libs.drawing import draw_images
from libs.evaluation import RealImages, denoising_error, evaluate, labels_like
from libs.images import ImageSet, to_uint8
from libs.models import load_model


@pytest.fixture
def place(tmp_path):
    """Two random DDPMs and an EDM of one autoencoder's latents, and real images of 32 pixels."""
    place = Place(tmp_path)
    shutil.rmtree(place.root / "images")
    tree(place.root / "images", {split: ["cat", "dog"] for split in ("train", "test")}, 6, height=40, width=40)
    place.settings = ["dataset.img_size=32", "eval.features=autoencoder",
                      *(f"{k}={v}" for k, v in place.autoencoder().items())]
    place.runs = [place.run("ddpm_0"), place.run("ddpm_1"), place.run("edm_0", "model_name=EDM")]
    return place


def make_run(place, name, *settings):
    path = place.checkpoint(*place.settings, *settings, classes=["cat", "dog"])
    shutil.move(path, place.root / f"{name}.pth.tar")
    return f"{name}.pth.tar"


@pytest.fixture
def call(place, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.chdir(place.root)
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as e:
            run(compare_runs.main)
        return e.value.code or 0, *capsys.readouterr()
    return call


def test_rows_and_tables(place, call):
    status, out, err = call(*place.runs, "--way", "DDPM=ddim:4", "--way", "EDM=heun:2", "--num", 20, "--seed", 3,
                            "--output", "t.json")
    assert status == 0, err
    saved = json.loads((place.root / "t.json").read_text())
    assert [(r["kind"], r["network_calls"]) for r in saved["rows"]] == [("DDPM", 4), ("DDPM", 4), ("EDM", 3)]
    assert [r["kind"] for r in saved["errors"]] == ["DDPM", "DDPM", "EDM"]

    # the second run's row, by hand
    model, config = load_model(str(place.root / place.runs[1]))
    real = RealImages(config, "cpu")
    labels = labels_like(real.test.labels, 2, 20)
    images = next(draw_images(model, labels, {"sampler": "ddim", "steps": 4}, seed=3))
    report = evaluate(ImageSet(to_uint8(images), labels), real, memorization=False)
    assert report["n"] == 12 and saved["rows"][1]["fd_test"] == pytest.approx(report["fd_test_all"], rel=1e-4)
    assert saved["rows"][1]["recall"] == report["generated"]["recall"]
    x = model.encode(real.test.take().images / 255)
    errors = denoising_error(model, x, real.test.labels, saved["sigmas"])
    assert saved["errors"][1]["test"] == pytest.approx(errors, rel=1e-4)
    x = model.encode(real.train.take().images / 255)
    assert saved["errors"][1]["train"] == pytest.approx(denoising_error(model, x, real.train.labels, saved["sigmas"]), rel=1e-4)

    # the tables: one line a kind and way, mean and deviation over its runs
    lines = (place.root / "t.md").read_text().splitlines()
    fds = [r["fd_test"] for r in saved["rows"][:2]]
    assert fds[0] != fds[1]
    (ddpm,), (edm,) = ([line for line in lines if line.startswith(f"| {kind} ")] for kind in ("DDPM", "EDM"))
    assert f"| 2 | ddim, 4, guidance_scale 1.0 | 4 | {statistics.mean(fds):.4g} (± {statistics.stdev(fds):.4g})" in ddpm
    assert f"| 1 | heun, 2, guidance_scale 1.0 | 3 | {saved['rows'][2]['fd_test']:.4g} |" in edm
    assert lines[-1].startswith("| 12 | ") and out.endswith(lines[-1] + "\n")

    # a further way: only its rows are drawn
    before = dict(saved)
    status, _, err = call(*place.runs, "--way", "DDPM=ddim:4", "--way", "EDM=heun:2", "--way", "EDM=euler:2", "--num", 20,
                          "--seed", 3, "--output", "t.json")
    assert status == 0, err
    saved = json.loads((place.root / "t.json").read_text())
    assert saved["rows"][:3] == before["rows"] and saved["errors"] == before["errors"]
    assert [(r["kind"], r["way"]["sampler"]) for r in saved["rows"][3:]] == [("EDM", "euler")]


def test_errors_alone(place, call):
    status, out, err = call(place.runs[2], "--output", "e.json")
    assert status == 0, err
    assert "EDM, 4 images seen, held out" in out and "network calls" not in out
    assert json.loads((place.root / "e.json").read_text())["rows"] == []


def test_refusals(place, call):
    other = place.run("other", "dataset.limit=3")
    torch.save({k: v + 1 for k, v in torch.load(place.root / "encoder.pth").items()}, place.root / "encoder2.pth")
    latents = place.run("latents", f"model.vae_encoder_weights={place.root / 'encoder2.pth'}")
    (place.root / "x.json").write_text("{}")
    for arguments, word in ((["--way", "VAE=heun:2"], "VAE"), (["--way", "EDM=heun:0"], "steps"),
                            (["--way", "DDPM=bogus:2"], "bogus"), ([other], "other.pth.tar"), ([latents], "another autoencoder"),
                            (["--output", "x.json"], "x.json"), (["--output", "x.txt"], "x.txt")):
        status, _, err = call(*place.runs, *arguments)
        assert status == 2 and word in err and len(err.splitlines()) == 1, (arguments, err)
    status, _, err = call(place.runs[0], "--way", "EDM=heun:2")
    assert status == 2 and "none of the runs is of the kind EDM" in err


Place.run = make_run
