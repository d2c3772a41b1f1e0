"""MobileNet, the judge of photographs: the weights that ship, the original, what it recognises, the report's rows."""

import json
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import compare
import evaluate as script
from evaluate import table
from helpers import Evil, Place, one_line, picture
from libs import UsageError, config, load_model
from libs.data.images import ImageSet, to_uint8
from libs.datasets import build_dataset
from libs.evaluation import report
from libs.evaluation.features import load_extractor
from libs.evaluation.fid import fit_gaussian, frechet_distance
from libs.evaluation.mobilenet import KINDS, WEIGHTS, load_mobilenet, recognised
from libs.evaluation.report import RealImages, evaluate

README = Path(WEIGHTS).parent / "README.md"


@pytest.fixture(scope="module")
def network():
    return load_mobilenet()


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("mobilenet")


def pictures(n, side):
    return torch.stack([torch.from_numpy(np.array(picture(k, side, side))) for k in range(n)]).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- the weights

def test_the_shipped_file_is_the_one_in_the_readme(extractor):
    digest = sha256(Path(WEIGHTS).read_bytes()).hexdigest()
    assert digest in README.read_text() and os.path.getsize(WEIGHTS) < 3e6
    assert (extractor.name, extractor.metric, extractor.dim) == ("mobilenet", "FD (MobileNet)", 768)
    assert extractor.hash == digest[:12]


def test_the_network_agrees_with_the_original(real_data, network):
    """The original's probabilities are of 8 bits, so that several classes can be first: any of them is right."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="pip install ai-edge-litert")
    original = interpreter.Interpreter(os.path.join(real_data, "imagenet", "mobilenet_v1_0.75_192_quant.tflite"))
    original.allocate_tensors()
    (source,), (output,) = original.get_input_details(), original.get_output_details()
    cats, _, _ = build_dataset("AFHQ", "test", os.path.join(real_data, "afhq"), 128, (0, 255))
    hits, same = [], []
    for images in ImageSet(cats.images, size=128).batches(50):
        resized = interpolate(images.float(), (192, 192), mode="bilinear", antialias=True).round().byte()
        for logits, image in zip(network(images), resized.permute(0, 2, 3, 1)):
            original.set_tensor(source["index"], image[None].contiguous().numpy())
            original.invoke()
            probabilities = torch.from_numpy(original.get_tensor(output["index"])[0])
            hits.append(probabilities[logits.argmax()] == probabilities.max())
            same.append(logits.argmax() == probabilities.argmax())
    assert len(hits) == 400 and sum(hits) >= 0.99 * 400 and sum(same) >= 0.97 * 400


def test_the_original_on_pictures_that_need_no_data(network):
    """Its first classes and their probabilities, in 1/256. They need the weights, input, padding and rounding."""
    classes = [721, 645, 2, 531, 645, 645, 819, 819, 2, 721, 853, 819]
    shares = [21, 29, 30, 25, 48, 36, 99, 61, 29, 30, 33, 38]
    found = network(pictures(12, 192)).softmax(1)
    assert found.argmax(1).tolist() == classes
    assert (found.max(1).values * 256 - torch.tensor(shares)).abs().max() < 5


def test_weights_of_another_network(tmp_path):
    with pytest.raises(UsageError, match="no file .*nowhere.pth") as error:
        load_mobilenet("nowhere.pth")
    one_line(error)
    path, mark, saved = tmp_path / "x.pth", tmp_path / "mark", torch.load(WEIGHTS, weights_only=True)
    short = {**saved, "weights": {k: v for k, v in saved["weights"].items() if k != "head.bias"}}
    for content, words in (({"weights": {"x": Evil(mark)}}, "is not a file of tests/mobilenet_weights.py"),
                           ({"weights": saved["weights"]}, "is not a file of"), (short, "of another architecture")):
        torch.save(content, path)
        with pytest.raises(UsageError, match=words) as error:
            load_extractor("mobilenet", weights=str(path))
        one_line(error)
    assert not mark.exists()


# ---------------------------------------------------------------- its features

def test_features(network, extractor):
    images = pictures(5, 192)
    found = extractor(images)
    assert found.shape == (5, 768) and found.dtype == torch.float32 and 0 <= found.min() and found.max() <= 6
    spread = found.std(0).mean()  # between images: what a distance is made of
    assert spread > 0.05
    assert torch.allclose(network.head(found), network(images), rtol=1e-4, atol=1e-4)
    assert (network.features(images / 255) - found).abs().max() < 1e-3 * spread  # floats in [0, 1]
    assert (extractor(images[3:]) - found[3:]).abs().max() < 1e-3 * spread  # whatever the batch
    grey = images[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_a_picture_of_another_size_is_resized_as_by_pillow(extractor):
    """Whose bilinear interpolation is antialiased: what is too fine for 192 x 192 is averaged, not picked."""
    images = pictures(5, 192)
    found, spread = extractor(images), extractor(images).std(0).mean()
    twice = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (extractor(twice) - found).abs().mean() < 0.25 * spread  # nearly the same picture
    noise = torch.randint(256, (2, 3, 500, 300), dtype=torch.uint8)
    small = [np.array(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((192, 192), Image.Resampling.BILINEAR))
             for x in noise]
    want = extractor(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
    assert (extractor(noise) - want).abs().mean() < 0.05 * spread
    assert extractor(pictures(2, 28)).shape == (2, 768)


# ---------------------------------------------------------------- what it recognises

def test_the_share_of_images_whose_first_class_is_of_their_label():
    classes = ["cat", "dog", "teapot", "wild"]
    logits = torch.zeros(8, 1001)
    # class k of ImageNet is column k + 1: tabby, Egyptian cat, cougar; Chihuahua, sea lion; any; lion, tench
    for row, column in enumerate([282, 286, 287, 152, 151, 500, 292, 1]):
        logits[row, column] = 5
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    assert recognised(logits, labels, classes) == pytest.approx(4 / 7)  # teapots are not judged
    assert recognised(logits[5:6], labels[5:6], classes) is None
    assert recognised(torch.zeros(1, 1001), torch.tensor([0]), classes) == 0  # background first


def test_the_classes_are_those_of_imagenets_list(real_data):
    names = (Path(real_data) / "imagenet" / "imagenet_labels.txt").read_text().splitlines()[1:]
    found = {kind: [names[k].split(",")[0] for k in KINDS[kind]] for kind in KINDS}
    assert found["cat"] == ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"]
    assert (found["dog"][0], found["dog"][-1], len(found["dog"])) == ("Chihuahua", "Mexican hairless", 118)
    assert found["wild"] == ["timber wolf", "white wolf", "red wolf", "red fox", "kit fox", "Arctic fox", "grey fox",
                             "cougar", "lynx", "leopard", "snow leopard", "jaguar", "lion", "tiger", "cheetah"]


# ---------------------------------------------------------------- the report

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A random latent model of two classes, judged by what judges photographs by default.

    Half of the test images of each class show, for this test, what their label says.
    """
    monkeypatch.setattr(config, "CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    place = Place(tmp_path)
    settings = [s for s in place.latents(4) if not s.startswith("eval")]
    place.model = str(place.checkpoint(*settings, classes=["cat", "dog"]))
    place.config = load_model(place.model)[1]
    place.real = RealImages(place.config, "cpu")
    first = place.real.extractor.network(place.real.test.take().images).argmax(1) - 1
    for label, name in enumerate(place.real.train.classes):
        monkeypatch.setitem(KINDS, name, first[place.real.test.labels == label][:2].tolist())
    place.share = recognised_by_hand(place.real, place.real.test.take().images)
    assert 0.5 <= place.share < 1
    return place


def recognised_by_hand(real, images):
    first = real.extractor.network(images).argmax(1) - 1
    return sum(int(k) in KINDS[real.train.classes[y]] for k, y in zip(first, real.test.labels)) / len(first)


def test_a_report_between_floor_reconstructions_and_noise(place, tmp_path, capsys):
    script.main([place.model, "--num", "8", "--no-memorization", "--device", "cpu", "--output",
                 str(tmp_path / "x.json")])
    figures, out = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    names = ["generated", "floor", "floor_augmented", "reconstructions", "ceiling"]
    assert figures["extractor"] == "mobilenet" and figures["floor"]["recognised"] == pytest.approx(place.share)
    title, row = [line for line in out.splitlines() if " generated " in line or line.startswith("recognised")]
    assert title.split() == ["generated", "test", "images", "augmented", "reconstructed", "noise"]
    assert row.split()[-5:] == [f"{figures[name]['recognised']:.2%}" for name in names]

    # reconstructions, by hand: all test images through the autoencoder
    real, model, images = place.real, load_model(place.model)[0], place.real.test.take().images
    rebuilt = to_uint8(model.postprocess(model.encode(images / 255)))
    distance = frechet_distance(fit_gaussian(real.extractor(rebuilt)), fit_gaussian(real.subset("train", 8)))
    assert figures["reconstructions"]["fd_train"] == pytest.approx(distance, rel=1e-3)
    assert figures["reconstructions"]["recognised"] == pytest.approx(recognised_by_hand(real, rebuilt))
    assert figures["reconstructions"]["fd_train"] != pytest.approx(figures["floor"]["fd_train"], rel=1e-2)

    # images as a source have no autoencoder, and without labels nothing to be recognised as
    found = evaluate(ImageSet(images), real, memorization=False)
    assert "reconstructions" not in found and "reconstructed" not in "".join(table(found))
    assert "recognised" in found["floor"] and "recognised" not in found["generated"]
    real.reconstruct(model, "cpu")
    found = evaluate(real.test, real, memorization=False)
    assert found["generated"]["recognised"] == pytest.approx(place.share) and "reconstructions" in found


@pytest.mark.parametrize("command", ["samplers", "runs"])
def test_compare_has_a_column(place, tmp_path, command):
    setting = ["heun:2"] if command == "samplers" else ["--sampler", "DDPM=heun:2"]
    compare.main([command, place.model, *setting, "--num", "8", "--device", "cpu", "--output",
                  str(tmp_path / "t.json")])
    saved, lines = json.loads((tmp_path / "t.json").read_text()), (tmp_path / "t.md").read_text().splitlines()
    share, floors = saved["rows"][0]["recognised"], saved["recognised"]
    assert 0 <= share <= 1 and floors["floor"] == pytest.approx(place.share) and "reconstructions" in floors
    assert f"recognised of the test images {place.share:.2%}, cropped and mirrored" in lines[0]
    column = [title.strip() for title in lines[2].split("|")].index("recognised")
    assert lines[4].split("|")[column].strip() == f"{100 * share:.2f} %" and "label accuracy" not in lines[2]


@pytest.mark.parametrize("name, judge", [("MNIST", "classifier"), ("FashionMNIST", "mobilenet"),
                                         ("CIFAR10", "mobilenet"), ("AFHQ", "mobilenet")])
def test_who_judges_by_default(monkeypatch, name, judge):
    def stop(name, *_):
        raise UsageError(name)

    monkeypatch.setattr(report, "load_extractor", stop)
    with pytest.raises(UsageError, match=judge):
        RealImages(config.complete_config({"dataset": {"name": name}}), "cpu")
