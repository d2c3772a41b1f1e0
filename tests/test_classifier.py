"""The digit classifier: the weights that are shipped, and the script that makes them."""

import os

import pytest
import torch

import train_classifier
from helpers import one_line
from libs import UsageError, build_dataset
from libs.evaluation.classifier import WEIGHTS, DigitClassifier, accuracy, file_hash, load_classifier


def test_shipped_weights():
    model = load_classifier()
    assert os.path.getsize(WEIGHTS) < 2e6 and file_hash() == file_hash(WEIGHTS) == "7e51cffca5c0"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert 0.996 <= model.test_accuracy <= 1 and "60000 digits" in model.recipe
    x = torch.rand(3, 1, 28, 28)
    features = model.features(x)
    assert features.shape == (3, model.feature_dim) and model(x).shape == (3, 10)
    assert torch.allclose(model(x), model.head(features), atol=1e-5)


def test_shipped_weights_read_digits(mnist_folder):
    test = build_dataset("MNIST", "test", mnist_folder)[0]
    model = load_classifier()
    # five hundred digits spread over all, two standard errors of slack
    images, labels = test.images[::20], test.labels[::20]
    p = model.test_accuracy
    assert accuracy(model, images, labels) >= p - 2 * (p * (1 - p) / len(labels)) ** 0.5
    # the features do what a Frechet distance needs: hardly a channel is dead, hardly a value zero
    f = model.features(images.float() / 255)
    assert (f.std(0) > 1e-3).float().mean() > 0.95
    assert (f > 0).float().mean() > 0.8


def test_missing_and_wrong_files(tmp_path):
    good = {"state_dict": DigitClassifier().state_dict(), "test_accuracy": 0.5, "recipe": "none"}
    contents = {
        "text": b"not weights\n",
        "other": {**good, "state_dict": {"x": torch.zeros(1)}},
        "bare": good["state_dict"],
        "object": {**good, "recipe": DigitClassifier()},  # would need code to run: weights_only refuses it
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        what = "is of another architecture" if name == "other" else "is not a file of train_classifier.py"
        with pytest.raises(UsageError, match=f"{name} {what}") as e:
            load_classifier(path)
        one_line(e)
    with pytest.raises(UsageError, match="no file"):
        load_classifier(tmp_path / "nowhere.pth")


def test_the_script_trains_and_refuses_to_overwrite(mnist_folder, tmp_path, capsys, monkeypatch):
    test = build_dataset("MNIST", "test", mnist_folder)[0]
    test.images, test.labels = test.images[:500], test.labels[:500]  # for both splits: it need not learn
    monkeypatch.setattr(train_classifier, "build_dataset", lambda *arguments: (test, 10, (1, 28, 28)))
    out = tmp_path / "c.pth"
    args = ["--data-folder", mnist_folder, "--output", str(out), "--epochs", "1", "--limit", "500"]
    train_classifier.main(args)
    assert "test accuracy" in capsys.readouterr().out
    model = load_classifier(out)
    assert model.recipe.startswith("500 digits, 1 epochs") and os.listdir(tmp_path) == ["c.pth"]
    # the recorded accuracy is that of the weights in the file
    assert accuracy(model, test.images, test.labels) == pytest.approx(model.test_accuracy, abs=5e-4)
    with pytest.raises(UsageError, match="--output: .*c.pth exists; .*--overwrite"):
        train_classifier.main(args)
    with pytest.raises(UsageError, match="--epochs: .*from 1 to 10"):
        train_classifier.main(["--epochs", "0"])


def test_augmented_digits_are_the_same_digits(mnist_folder):
    test = build_dataset("MNIST", "test", mnist_folder)[0]
    x = test.images[:500].float() / 255
    moved = train_classifier.augment(x)
    assert (moved - x).abs().mean() > 0.02 and 0 <= moved.min() and moved.max() <= 1
    assert (load_classifier()(moved).argmax(1) == test.labels[:500]).float().mean() > 0.97
