"""compare_samplers.py as a user runs it: a table of ways and seeds, which a second call only adds to."""

import json
import sys

import pytest

import compare_samplers
from libs.common.cli import run
from helpers import Place
from libs.drawing import draw_images
from libs.evaluation.report import RealImages, evaluate, labels_like
from libs.data.images import ImageSet, to_uint8
from libs.models import load_model


@pytest.fixture
def place(tmp_path):
    """A random latent model of two classes, and real images of them at 32 pixels."""
    place = Place(tmp_path)
    place.settings = place.latents()
    place.model = place.checkpoint(*place.settings, classes=["cat", "dog"])
    return place


@pytest.fixture
def call(place, monkeypatch, capsys):
    def call(*arguments, model=None):
        monkeypatch.chdir(place.root)
        monkeypatch.setattr(sys, "argv", ["compare_samplers.py", str(model or place.model),
                                          *map(str, arguments), "--num", "8", "--device", "cpu"])
        with pytest.raises(SystemExit) as e:
            run(compare_samplers.main)
        return e.value.code or 0, *capsys.readouterr()
    return call


def test_rows_are_what_evaluation_says(place, call):
    status, out, err = call("config", "heun:3", "ddim:4 eta=1", "--seeds", "2", "--output", "t.json")
    assert status == 0, err
    saved = json.loads((place.root / "t.json").read_text())
    assert [(r["seed"], r["way"]["sampler"], r["way"]["steps"], r["network_calls"]) for r in saved["rows"]] == [
        (seed, *way) for seed in (0, 1) for way in (("ddim", 2, 2), ("heun", 3, 5), ("ddim", 4, 4))]
    assert [r["way"].get("eta") for r in saved["rows"]] == [None, None, 1] * 2

    # the last row, by hand
    model, config = load_model(str(place.model))
    real = RealImages(config, "cpu")
    labels = labels_like(real.test.labels, 2, 8)
    images = next(draw_images(model, labels, {"sampler": "ddim", "steps": 4, "eta": 1}, seed=1))
    report = evaluate(ImageSet(to_uint8(images), labels), real, memorization=False)
    assert saved["rows"][-1]["fd_train"] == pytest.approx(report["generated"]["fd_train"], rel=1e-6)
    assert saved["rows"][-1]["floors"] == pytest.approx(
        report["generated"]["fd_train"] / report["floor"]["fd_train"], rel=1e-6)

    # the table: one line a way, the mean over its seeds
    lines = (place.root / "t.md").read_text().splitlines()
    assert len(lines) == 4 + 3 and lines[-1] in out and "| ddim | 4 | guidance_scale 1.0, eta 1.0 |" in lines[-1]
    mean = (saved["rows"][2]["recall"] + saved["rows"][5]["recall"]) / 2
    assert f"| {mean:.3f} (±" in lines[-1]


def test_a_second_call_adds(place, call):
    assert call("heun:3", "--output", "t.json")[0] == 0
    first = json.loads((place.root / "t.json").read_text())["rows"]
    assert "nothing is left" in call("heun:3", "--output", "t.json")[1]
    status, out, _ = call("heun:3", "euler:2", "--output", "t.json")
    assert status == 0 and out.startswith("1 sets of 8 images, 16 network calls")
    rows = json.loads((place.root / "t.json").read_text())["rows"]
    assert rows[:1] == first and [r["way"]["sampler"] for r in rows] == ["heun", "euler"]
    other = place.checkpoint(*place.settings, classes=["cat", "dog"])  # new weights, same name
    status, out, _ = call("heun:3", "heun:3", "--output", "t.json", model=other)
    assert status == 0 and out.startswith("1 sets")
    lines = [line for line in (place.root / "t.md").read_text().splitlines() if "| heun | 3 |" in line]
    hashes = [row["hash"] for row in json.loads((place.root / "t.json").read_text())["rows"] if
              row["way"]["sampler"] == "heun"]
    assert [h in line for h, line in zip(hashes, lines, strict=True)] == [True, True]  # no mean of two models


def test_numbers_are_numbers(place, call):
    assert call("heun:3 S_churn=1e1 guidance_scale=1", "heun:3 S_churn=10 guidance_scale=1.0", "--output", "t.json")[0] == 0
    row, = json.loads((place.root / "t.json").read_text())["rows"]
    assert row["way"]["S_churn"] == 10


@pytest.mark.parametrize("arguments, says", [
    (["heunn:9"], "did you mean heun"),
    (["heun:many"], "'heun:many' is no way to draw"),
    (["heun:0"], "steps: 0"),
    (["heun:9 guidance=2"], "'guidance=2' is no setting; guidance_scale"),
    (["heun:9 guidance_interval=3"], "is no way to draw"),
    (["heun:9 guidance_scale=abc"], "sample_cfg.guidance_scale is 'abc'; it must be"),
    (["ddim clip=maybe"], "sample_cfg.clip is 'maybe'; it must be"),
    (["ddim:11"], "at most model.timesteps, 10"),
    (["ddim guidance_scale=2"], "needs a model that was trained with model.label_dropout"),
    (["heun:9", "--output", "t.txt"], "must end in .json"),
    (["heun:9", "--output", "no/t.json"], "cannot write into"),
    (["heun:9", "--output", "other.json"], "is no file of compare_samplers.py"),
    (["heun:9", "--output", "num.json"], "has num 9, not 8"),
    (["heun:9", "--output", "notes.json"], "notes.md exists"),
])
def test_bad_input(place, call, arguments, says):
    (place.root / "other.json").write_text('{"a": 1}')
    (place.root / "num.json").write_text('{"num": 9, "rows": []}')
    (place.root / "notes.md").write_text("mine")
    before = place.files()
    status, out, err = call(*arguments)
    assert status == 2 and says in err and len(err.splitlines()) == 1, err
    assert [f for f in place.files() if ".features" not in f] == before
