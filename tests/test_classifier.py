"""The digit classifier: the weights that are shipped, and the script that makes them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from libs import UsageError, build_dataset
from libs.evaluation.classifier import WEIGHTS, DigitClassifier, accuracy, file_hash, load_classifier

CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code")


@pytest.fixture(scope="module")
def mnist(real_data, tmp_path_factory):
    """A copy: the original is read only and its files are packed."""
    root = tmp_path_factory.mktemp("mnist")
    (root / "MNIST" / "raw").mkdir(parents=True)
    source = os.path.join(real_data, "mnist", "MNIST", "raw")
    for name in os.listdir(source):
        shutil.copyfile(os.path.join(source, name), root / "MNIST" / "raw" / name)
    return str(root)


def run(*args):
    env = dict(os.environ, OMP_NUM_THREADS="2")
    return subprocess.run([sys.executable, "train_classifier.py", *map(str, args)], cwd=CODE, env=env,
                          capture_output=True, text=True, timeout=300)


def assert_one_line_error(done, *words):
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("train_classifier.py: error: ")
    for word in words:
        assert word in done.stderr


def test_shapes_and_other_sizes():
    model = DigitClassifier().eval()
    x = torch.rand(3, 1, 28, 28)
    features = model.features(x)
    assert features.shape == (3, model.feature_dim) and model(x).shape == (3, 10)
    assert torch.allclose(model(x), model.head(features), atol=1e-5)
    for shape in ((3, 1, 32, 32), (3, 3, 28, 28)):
        with pytest.raises(ValueError, match="28 x 28"):
            model(torch.rand(shape))


def test_shipped_weights_load():
    model = load_classifier()
    assert os.path.getsize(WEIGHTS) < 2e6
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert 0.996 <= model.test_accuracy <= 1
    assert "60000 digits" in model.recipe
    assert len(file_hash()) == 12 and file_hash() == file_hash(WEIGHTS)


def test_shipped_weights_read_digits(mnist):
    test = build_dataset("MNIST", "test", mnist)[0]
    model = load_classifier()
    # a thousand digits spread over all, two standard errors of slack
    images, labels = test.images[::10], test.labels[::10]
    p = model.test_accuracy
    assert accuracy(model, images, labels) >= p - 2 * (p * (1 - p) / len(labels)) ** 0.5
    # the features do what a Frechet distance needs: hardly a channel is dead, hardly a value zero
    f = model.features(images.float() / 255)
    assert (f.std(0) > 1e-3).float().mean() > 0.95
    assert (f > 0).float().mean() > 0.8


def test_missing_and_wrong_files(tmp_path):
    good = {"state_dict": DigitClassifier().state_dict(), "test_accuracy": 0.5, "recipe": "none"}
    contents = {
        "empty": b"",
        "text": b"not weights\n",
        "list": [1, 2],
        "other": {"state_dict": {"x": torch.zeros(1)}, "test_accuracy": 0.5, "recipe": ""},
        "bare": good["state_dict"],
        "unrated": {k: good[k] for k in ("state_dict", "recipe")},
        "object": {**good, "recipe": DigitClassifier()},  # would need code to run: weights_only refuses it
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UsageError, match=f"{name} is not a file of train_classifier.py") as e:
            load_classifier(path)
        assert "\n" not in str(e.value)
    whole = open(WEIGHTS, "rb").read()
    (tmp_path / "cut").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UsageError, match="cut is not a file"):
        load_classifier(tmp_path / "cut")
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(UsageError, match="no file"):
            load_classifier(path)
        with pytest.raises(UsageError, match="cannot be read"):
            file_hash(path)


def test_script_writes_and_refuses_to_overwrite(mnist, tmp_path):
    out = tmp_path / "new" / "c.pth"
    out.parent.mkdir()
    args = ("--data-folder", mnist, "--output", out, "--epochs", 1, "--limit", 500)
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert f"writing {out}" in done.stdout and "test accuracy" in done.stdout
    model = load_classifier(out)
    assert model.recipe.startswith("500 digits, 1 epochs")
    assert os.listdir(out.parent) == ["c.pth"]
    # the recorded accuracy is that of the weights in the file
    test = build_dataset("MNIST", "test", mnist)[0]
    assert accuracy(model, test.images, test.labels) == pytest.approx(model.test_accuracy, abs=5e-4)

    before = file_hash(out)
    assert_one_line_error(run(*args), "--output", str(out), "--overwrite")
    assert file_hash(out) == before
    done = run(*args, "--overwrite", "--seed", 1)
    assert done.returncode == 0 and file_hash(out) != before


def test_script_refuses_at_once(tmp_path):
    out = tmp_path / "c.pth"
    for name in ("epochs", "limit"):
        assert_one_line_error(run("--output", out, f"--{name}", 0), f"--{name}", "1 is the least")
    assert_one_line_error(run("--output", out, "--epochs", "many"), "--epochs", "many")
    (tmp_path / "file").touch()
    assert_one_line_error(run("--output", tmp_path / "file" / "c.pth"), "file")
    assert_one_line_error(run("--output", out, "--data-folder", tmp_path / "file"), "file")
    assert_one_line_error(run("--output", tmp_path), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["file"]
