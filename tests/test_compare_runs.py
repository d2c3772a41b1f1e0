"""compare_runs.py as a user runs it: kinds of runs, their samples and their errors of denoising."""

import json
import shutil
import statistics
import sys

import pytest
import torch

import compare_runs
from libs.common.cli import run
from helpers import Place
from libs.drawing import draw_images
from libs.evaluation.report import RealImages, denoising_error, labels_like
from libs.evaluation.fid import FeatureStatistics, frechet_distance
from libs.data.images import to_uint8
from libs.models import load_model


@pytest.fixture
def place(tmp_path):
    """Two random DDPMs and an EDM of one autoencoder's latents, and real images of 32 pixels."""
    place = Place(tmp_path)
    place.settings = place.latents()
    place.runs = [place.run("ddpm_0", "seed=4"), place.run("ddpm_1", "seed=5", "dtype=bf16"), place.run("edm_0", "model_name=EDM")]
    return place


def make_run(place, name, *settings, classes=("cat", "dog")):
    path = place.checkpoint(*place.settings, *settings, classes=list(classes))
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
    assert saved["errors"][0]["settings"] == saved["errors"][1]["settings"]  # a machine's precision makes no other kind

    # the second run's row, by hand: more samples than there are test images, and training images
    model, config = load_model(str(place.root / place.runs[1]))
    real = RealImages(config, "cpu")
    labels = labels_like(real.test.labels, 2, 20)
    images = to_uint8(next(draw_images(model, labels, {"sampler": "ddim", "steps": 4}, seed=3)))
    drawn = FeatureStatistics(real.extractor.dim).update(real.extractor(images))
    for split in ("train", "test"):
        assert saved["rows"][1][f"fd_{split}"] == pytest.approx(frechet_distance(drawn, real.statistics[split]), rel=1e-3)
    floors = []
    for draw in range(5):
        features = real.like_test("train", 20, draw)
        floors.append(frechet_distance(FeatureStatistics(features.shape[1]).update(features), real.statistics["test"]))
    assert saved["floor"] == pytest.approx(statistics.mean(floors), rel=1e-6)
    for split, images in (("test", real.test), ("train", real.train)):
        errors = denoising_error(model, model.encode(images.take().images / 255), images.labels, saved["sigmas"])
        assert saved["errors"][1][split] == pytest.approx(errors, rel=1e-4)

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
    assert "EDM, 4 images seen, held out |" in out and "network calls" not in out
    assert json.loads((place.root / "e.json").read_text())["rows"] == []


def test_fewer_samples_than_test_images(place, call):
    """The distance is to all of them all the same."""
    assert call(place.runs[0], "--way", "DDPM=ddpm", "--num", 10, "--output", "f.json")[0] == 0
    row, = json.loads((place.root / "f.json").read_text())["rows"]
    assert row["way"]["steps"] == 10  # all timesteps, written out
    model, config = load_model(str(place.root / place.runs[0]))
    real = RealImages(config, "cpu")
    images = to_uint8(next(draw_images(model, labels_like(real.test.labels, 2, 10), {"sampler": "ddpm"}, seed=0)))
    drawn = FeatureStatistics(real.extractor.dim).update(real.extractor(images))
    assert row["fd_test"] == pytest.approx(frechet_distance(drawn, real.statistics["test"]), rel=1e-3)


def test_limit_and_settings(place, call):
    """What a run never saw is not its training data; other settings are another kind."""
    runs = [place.run("few", "dataset.limit=4"), place.run("other", "dataset.limit=4", "train_cfg.lr=0.1")]
    status, out, err = call(*runs, "--output", "l.json")
    assert status == 0, err
    saved = json.loads((place.root / "l.json").read_text())
    assert len({row["settings"] for row in saved["errors"]}) == 2 and "±" not in out.splitlines()[-1]
    model, config = load_model(str(place.root / runs[0]))
    train = RealImages(config, "cpu").train
    assert len(train) == 4
    errors = denoising_error(model, model.encode(train.take().images / 255), train.labels, saved["sigmas"])
    assert saved["errors"][0]["train"] == pytest.approx(errors, rel=1e-4)


def test_refusals(place, call):
    limited = place.run("limited", "dataset.limit=3")
    torch.save({k: v + 1 for k, v in torch.load(place.root / "encoder.pth").items()}, place.root / "encoder2.pth")
    latents = place.run("latents", f"model.vae_encoder_weights={place.root / 'encoder2.pth'}")
    pixels = place.run("pixels", "model.use_vae=false")
    swapped = place.run("swapped", "seed=9", classes=["dog", "cat"])
    (place.root / "x.json").write_text("{}")
    (place.root / "y.json").write_text('{"errors": [], "rows": [], "num": 3}')
    before = place.files()
    for arguments, word in ((["--way", "VAE=heun:2"], "VAE"), (["--way", "EDM=heun:0"], "steps"),
                            (["--way", "DDPM=bogus:2"], "bogus"), ([limited], "limited.pth.tar: its dataset.limit is 3"),
                            ([latents], "latents.pth.tar: what it diffuses"), ([pixels], "pixels.pth.tar: what it diffuses"),
                            ([swapped], "swapped.pth.tar: its classes"), (["--num", "9"], "10 is the least"),
                            (["--output", "x.json"], "x.json is no file"), (["--output", "x.txt"], "x.txt"),
                            (["--output", "y.json"], "y.json has num 3, not 2000")):
        status, _, err = call(*place.runs, *arguments)
        assert status == 2 and word in err and len(err.splitlines()) == 1, (arguments, err)
    for runs, word in (([pixels, *place.runs], "what it diffuses is not what pixels"),
                       ([place.runs[0], place.runs[0].replace("_0", "_0b")], "is the same run as ddpm_0.pth.tar"),
                       ([swapped], "its classes are not those of the data set"),
                       ([place.runs[0], "--way", "EDM=heun:2"], "none of the runs is of the kind EDM")):
        shutil.copy(place.root / "ddpm_0.pth.tar", place.root / "ddpm_0b.pth.tar")
        status, _, err = call(*runs)
        assert status == 2 and word in err and len(err.splitlines()) == 1, (runs, err)
    assert [f for f in place.files() if ".features" not in f and "0b" not in f] == before


Place.run = make_run
