"""compare.py as a user runs it: samplers of one model, runs of several kinds, and the shipped tables."""

import functools
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import compare
from helpers import Place, one_line
from libs.common.errors import UsageError
from libs.config import CODE, parse_setting
from libs.data.images import ImageSet, to_uint8
from libs.evaluation.comparison import Results
from libs.evaluation.fid import fit_gaussian, frechet_distance
from libs.evaluation.report import RealImages, denoising_error, evaluate, labels_like
from libs.models import draw_images, load_model, sampling_settings
from libs.training.speed import inputs_of, operations_by_kind
from libs.training.device import fast_sampling

ROOT = Path(CODE).parent
trained_run = functools.cache(compare.TrainedRun)


class Models(Place):
    """Random latent models of two classes, and real images of them at 32 pixels."""

    def __init__(self, root):
        super().__init__(root)
        self.settings = self.latents()

    def run(self, name, *settings, classes=("cat", "dog")):
        path = self.checkpoint(*self.settings, *settings, classes=list(classes))
        return shutil.move(path, self.root / f"{name}.pth.tar")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    models = Models(tmp_path_factory.mktemp("compare"))
    models.runs = [models.run("ddpm_0", "seed=4"), models.run("ddpm_1", "seed=5", "dtype=bf16"),
                   models.run("edm_0", "model_name=EDM")]
    return models


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "SIGMAS", [0.05, 1.0, 12.0])

    def call(*arguments):
        """(what is printed, the JSON file, the lines of the Markdown file)"""
        compare.main([*map(str, arguments), "--output", str(tmp_path / "t.json"), "--device", "cpu"])
        return (capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text()),
                (tmp_path / "t.md").read_text().splitlines())
    return call


def test_samplers(models, call):
    model, wanted = models.runs[0], ["config", "heun:3", "ddim:4 eta=1"]
    out, saved, lines = call("samplers", model, *wanted, "--seeds", 2, "--num", 8)
    assert [(r["seed"], r["way"]["sampler"], r["way"]["steps"], r["network_calls"]) for r in saved["rows"]] == [
        (seed, *way) for seed in (0, 1) for way in (("ddim", 2, 2), ("heun", 3, 5), ("ddim", 4, 4))]
    assert [r["way"].get("eta") for r in saved["rows"]] == [None, None, 1] * 2

    # the last row, by hand
    network, config = load_model(str(model))
    real = RealImages(config, "cpu")
    labels = labels_like(real.test.labels, 2, 8)
    settings = sampling_settings(network, config, sampler="ddim", steps=4, eta=1)
    images = next(draw_images(network, labels, settings, seed=1))
    real.reconstruct(network, "cpu")
    report = evaluate(ImageSet(to_uint8(images), labels), real, memorization=False)
    fd, floor = report["generated"]["fd_train"], report["floor"]["fd_train"]
    assert saved["rows"][-1]["fd_train"] == pytest.approx(fd, rel=1e-6)
    assert saved["rows"][-1]["floors"] == pytest.approx(fd / floor, rel=1e-6)
    augmented, ceiling = (report[key]["fd_train"] for key in ("floor_augmented", "reconstructions"))
    assert [saved["floor_augmented"], saved["reconstructions"]] == pytest.approx([augmented, ceiling], rel=1e-6)
    assert (f"{floor:.3f}, cropped and mirrored as in training {augmented:.3f}, reconstructed by the autoencoder "
            f"{ceiling:.3f}; cpu") in lines[0]

    # the table: one line for each setting, the mean and deviation over its seeds
    assert len(lines) == 4 + 3 and lines[-1] in out and "| ddim | 4 | guidance_scale 1.0, eta 1.0 |" in lines[-1]
    recalls = saved["rows"][2]["recall"], saved["rows"][5]["recall"]
    assert f"| {statistics.mean(recalls):.3f} (± {statistics.stdev(recalls):.3f}) |" in lines[-1]

    # a further call draws only what is not there; other weights of the same name are another model
    assert call("samplers", model, *wanted, "--seeds", 2, "--num", 8)[1] == saved
    out, more, _ = call("samplers", model, "heun:3", "euler:2", "--num", 8)
    assert "1 sets of 8 images, 16 network calls" in out and more["rows"][:-1] == saved["rows"]
    before = model.read_bytes()
    models.run("ddpm_0", "seed=4")
    _, more, lines = call("samplers", model, "heun:3", "--num", 8)
    model.write_bytes(before)
    digests = {row["hash"] for row in more["rows"]}
    assert len(digests) == 2 and all(any(f"({d}) | heun | 3 |" in line for line in lines) for d in digests)


def test_runs(models, call):
    samplers = ["--sampler", "DDPM=ddim:4", "--sampler", "EDM=heun:2"]
    out, saved, lines = call("runs", *models.runs, *samplers, "--num", 20, "--seed", 3)
    assert [(r["kind"], r["network_calls"]) for r in saved["rows"]] == [("DDPM", 4), ("DDPM", 4), ("EDM", 3)]
    assert [r["kind"] for r in saved["errors"]] == ["DDPM", "DDPM", "EDM"]
    assert saved["errors"][0]["settings"] == saved["errors"][1]["settings"]  # precision makes no other kind

    # the second run's row, by hand: against all real images, whatever the number of samples
    model, config = load_model(str(models.runs[1]))
    real = RealImages(config, "cpu")
    labels = labels_like(real.test.labels, 2, 20)
    settings = sampling_settings(model, config, sampler="ddim", steps=4)
    with fast_sampling(model, torch.device("cpu"), torch.bfloat16):
        images = to_uint8(next(draw_images(model, labels, settings, seed=3)))
    drawn = fit_gaussian(real.extractor(images))
    for split in ("train", "test"):
        fd = frechet_distance(drawn, real.gaussians[split])
        assert saved["rows"][1][f"fd_{split}"] == pytest.approx(fd, rel=1e-3)
    floors = real.floors_to_all(20)
    assert {key: saved[key] for key in ("floor", "floor_augmented")} == pytest.approx(floors, rel=1e-6)
    assert f"{floors['floor']:.4g}, cropped and mirrored as in training {floors['floor_augmented']:.4g}. Mean" in lines[0]
    for split, images in (("test", real.test), ("train", real.train)):
        errors = denoising_error(model, model.encode(images.take().images / 255), images.labels, saved["sigmas"])
        assert saved["errors"][1][split] == pytest.approx(errors, rel=1e-4)

    # the arithmetic of the training: images seen, times what one costs forward and backward
    updates = torch.load(models.runs[1], weights_only=True)["step"]
    cost = sum(sum(kinds.values()) for kinds in operations_by_kind(model.model, *inputs_of(model)))
    assert saved["rows"][1]["images_seen"] == updates * 2
    assert saved["rows"][1]["training_operations"] == pytest.approx(updates * 2 * cost) and updates * cost > 0

    # the tables: one line for each kind and setting, mean and deviation over its runs
    fds = [r["fd_test"] for r in saved["rows"][:2]]
    assert fds[0] != fds[1]
    (ddpm,), (edm,) = ([line for line in lines if line.startswith(f"| {kind} ")] for kind in ("DDPM", "EDM"))
    assert f"| 2 | ddim, 4, guidance_scale 1.0 | 4 | {statistics.mean(fds):.4g} (± {statistics.stdev(fds):.4g})" in ddpm
    assert f"| 1 | heun, 2, guidance_scale 1.0 | 3 | {saved['rows'][2]['fd_test']:.4g} |" in edm
    assert lines[-1].startswith("| 12 | ") and out.endswith(lines[-1] + "\n")

    # a further setting, and a copy of a run: only the new rows are drawn
    copy = shutil.copy(models.runs[2], models.root / "copy.pth.tar")
    _, more, _ = call("runs", *models.runs, copy, *samplers, "--sampler", "EDM=euler:2", "--num", 20, "--seed", 3)
    assert more["rows"][:3] == saved["rows"] and more["errors"] == saved["errors"]
    assert [(r["kind"], r["way"]["sampler"]) for r in more["rows"][3:]] == [("EDM", "euler")]


def test_errors_alone_of_runs_with_other_settings(models, call):
    """Without --sampler; other settings are another kind; what a run never saw is not its training data."""
    runs = [models.run("few", "dataset.limit=4"), models.run("other", "dataset.limit=4", "train_cfg.lr=0.1")]
    out, saved, _ = call("runs", *runs)
    assert saved["rows"] == [] and "network calls" not in out and "±" not in out.splitlines()[-1]
    assert len({row["settings"] for row in saved["errors"]}) == 2
    model, config = load_model(str(runs[0]))
    train = RealImages(config, "cpu").train
    assert len(train) == 4
    errors = denoising_error(model, model.encode(train.take().images / 255), train.labels, saved["sigmas"])
    assert saved["errors"][0]["train"] == pytest.approx(errors, rel=1e-4)


# ---- the shipped tables

SHIPPED = [("mnist_cpu/samplers", ["rows"], compare.sampler_tables),
           ("mnist_cpu/ablations", ["errors", "rows"], compare.run_tables),
           ("mnist_cpu/models", ["errors", "rows"], compare.run_tables),
           ("mnist/samplers", ["rows"], compare.sampler_tables), ("afhq_guided/scales", ["rows"], compare.sampler_tables),
           *((f"afhq_models/{name}", ["errors", "rows"], compare.run_tables) for name in ("rates", "sampler_choice", "runs"))]


@pytest.mark.parametrize("name, lists, tables", SHIPPED)
def test_shipped_tables_are_those_of_their_rows(name, lists, tables):
    results = Results(str(ROOT / f"results/{name}.json"), lists, tables)
    assert results.text() + "\n" == (ROOT / f"results/{name}.md").read_text()


@pytest.mark.parametrize("model, texts", [("mnist_cpu", ["config", "config eta=0", "dpmpp_2m:5 eta=0", "euler:50"]),
                                          ("mnist_ddpm_cpu", ["ddim:10", "dpmpp_2m:20", "heun:20"])])
def test_the_shipped_models_are_those_that_were_compared(model, texts):
    results = Results(str(ROOT / "results/mnist_cpu/samplers.json"), ["rows"], compare.sampler_tables)
    trained = compare.TrainedRun(str(ROOT / f"pretrained/{model}.pth.tar"))
    for setting in trained.settings(texts):
        assert results.has("rows", hash=trained.hash, way=setting, seed=2)


# ---- bad input

@pytest.mark.parametrize("text, setting", [
    ("config", {}), ("ddim", {"sampler": "ddim"}),
    ("heun:3 S_churn=1e1 clip=true", {"sampler": "heun", "steps": 3, "S_churn": "1e1", "clip": True}),
    ("config guidance_interval=0,8", {"guidance_interval": [0, 8]}),
])
def test_settings(text, setting):
    assert parse_setting(text) == setting


@pytest.mark.parametrize("arguments, message", [
    (["samplers", 0, "heunn:9"], "did you mean heun"),
    (["samplers", 0, "heun:many"], "sample_cfg.steps is 'many'; it must be"),
    (["samplers", 0, "heun:9 guidance=2"], "'guidance=2' is not one of sampler, steps, guidance_scale"),
    (["samplers", 0, "heun:9 guidance_interval=3"], "a list of 2, each"),
    (["samplers", 0, "ddim:11"], "at most model.timesteps, 10"),
    (["samplers", 0, "heun:9", "--output", "t.txt"], "must end in .json"),
    (["samplers", 0, "heun:9", "--output", "no/t.json"], "cannot write into"),
    (["samplers", 0, "heun:9", "--output", "runs.json"], "is not a file of this command"),
    (["samplers", 0, "heun:9", "--output", "num.json"], "has num 9, not 2000"),
    (["samplers", 0, "heun:9", "--output", "device.json"], "has device 'cuda:0', not 'cpu'"),
    (["samplers", 0, "heun:9", "--output", "row.json"], "is not a file of this command"),
    (["samplers", 0, "heun:9", "--output", "rows.json"], "is not a file of this command"),
    (["samplers", 0, "heun:9", "--output", "floor.json"], "is not a file of this command"),
    (["samplers", 0, "heun:9", "--output", "notes.json"], "notes.md exists"),
    (["runs", 0, "--sampler", "EDM=heun:2"], "must begin with the kind of one of the runs, DDPM"),
    (["runs", 0, 2, "--sampler", "EDM=bogus:2"], "sample_cfg.sampler is 'bogus'"),
    (["runs", 0, 3], "limited.pth.tar: its dataset.limit is 3, that of"),
    (["runs", 0, 4], "pixels.pth.tar: its autoencoder is None"),
    (["runs", 0, 5], "swapped.pth.tar: its classes is ['dog', 'cat']"),
    (["runs", 5], "its classes are not those of the data set"),
])
def test_bad_input(models, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "runs.json").write_text(json.dumps({"errors": [], "rows": [], "sigmas": compare.SIGMAS}))
    row = {"hash": "0", "model": "a", "way": {"sampler": "heun", "steps": 9}, "network_calls": 17}
    facts = {"rows": [row], "num": 2000, "metric": "FD", "n": 9, "floor": 1.0, "device": "cpu", "torch": "2.4"}
    for name, value in (("num", 9), ("device", "cuda:0"), ("row", {"rows": [{"foreign": 1}]}), ("rows", 5), ("floor", "x")):
        changes = value if isinstance(value, dict) else {name: value}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | changes))
    (tmp_path / "notes.md").write_text("notes")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "TrainedRun", trained_run)
    odd = {3: ("limited", "dataset.limit=3"), 4: ("pixels", "model.use_vae=false")}
    paths = {**dict(enumerate(models.runs)), **{k: models.run(*odd[k]) for k in odd if k in arguments}}
    if 5 in arguments:
        paths[5] = models.run("swapped", classes=["dog", "cat"])
    with pytest.raises(UsageError) as error:
        compare.main([str(paths.get(x, x)) for x in arguments] + ["--device", "cpu"])
    assert message in one_line(error) and sorted(tmp_path.iterdir()) == before
    assert ("features" in capsys.readouterr().out) == ("data set" in message)  # else before the slow work
