"""Settings and flags of anybody's making: one line says what is wrong, before time or memory are spent on it."""

import json
import os

import pytest
import torch

from scripts import PROJECT, command, tiny_project

TRAIN = ("--dry-run", "--set", "devices=[cpu]")
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(9))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a config (tiny.yaml) and a checkpoint (model_final.pth.tar) of a training with it."""
    root = tmp_path_factory.mktemp("hostile")
    tiny_project(root, 20, train_cfg={"epochs": 1, "num_eval_samples": 1}, sample_cfg={"steps": 2})
    trained = command("train.py", "tiny.yaml", "--output", "a", cwd=root)
    assert trained.status == 0, trained.err
    (root / "runs" / "tiny_a" / "model_final.pth.tar").rename(root / "model_final.pth.tar")
    return root


def refused(place, script, *arguments, words=(), **options):
    """One line, status 2, with these words; nothing new in the folder, no memory to speak of."""
    before = set(place.rglob("*"))
    ended = command(script, *arguments, cwd=place, **options)
    new = set(place.rglob("*")) - before
    for path in filter(os.path.isfile, new):
        path.unlink()  # else the next one is in its way
    assert ended.status == 2 and len(ended.message) < 2500, ended
    assert all(str(word) in ended.message for word in words), ended
    assert ended.memory < 3 * 2 ** 30 and not new, (ended, new)


def train(place, setting, *words, more=()):
    refused(place, "train.py", "tiny.yaml", *TRAIN, *more, "--set", setting, words=words)


# ---- YAML

@pytest.mark.parametrize("text, words", [
    (BOMB, ["is no YAML", "too many values"]),
    ("model: &a {dim: *a}", ["is no YAML", "too many values"]),
    ("model: {dim: 8}\nseed: 1\nmodel: {dim: 16}", ["line 3", "'model'", "twice"]),
    ("model:\n  dim: 8\n  dim: 16", ["line 3", "'dim'", "twice"]),
    ("model: " + "[" * 3000, ["is no YAML"]),
    ("seed: " + "- " * 3000, ["is no YAML"]),
    ("# " + "x" * 2_000_000, ["100,000 characters"]),
    ("seed: !!bool perhaps", ["is no YAML"]),
    ("seed: !!timestamp x", ["is no YAML"]),
    ("seed: " + "9" * 5000, ["is no YAML"]),
    ("seed: 0x" + "f" * 50_000, ["seed is "]),
    ("output_folder: [" + "x, " * 2000 + "]", ["output_folder is ['x'"]),
    ('output_folder: "a\\0b"', ["output_folder is 'a\\x00b'"]),
    ("model_name: " + "x" * 90_000, ["model_name is 'xxx", "DDPM"]),
], ids=lambda x: x[:12] if isinstance(x, str) else "")
def test_yaml(place, tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    refused(place, "train.py", tmp_path / "bad.yaml", "--dry-run", words=words)


def test_anchors_and_merge_keys_still_work(place):
    (place / "anchors.yaml").write_text(
        f"train_cfg: &few {{epochs: 3, lr: 0.1}}\nmodel: {{dim: 8, dim_mults: &two [1, 2], attn_levels: *two}}\n"
        "loader: {<<: {batch_size: 3}, batch_size: 2}\n"
        f"dataset: {{name: ImageFolder, data_folder: {place}/images, img_size: 16}}\n")
    ended = command("train.py", "anchors.yaml", *TRAIN, "--set", "model.attn_levels=[]", cwd=place)
    assert ended.status == 0 and "batch_size: 2" in ended.out and "epochs: 3" in ended.out, ended


@pytest.mark.parametrize("kind, words", [("folder", "no file"), ("pipe", "no file"), ("device", "no file"),
                                         ("unreadable", "cannot be read (")])
def test_a_config_is_a_regular_file(place, tmp_path, kind, words):
    path = {"folder": tmp_path, "device": "/dev/zero", "unreadable": "/proc/self/mem"}.get(kind, tmp_path / "pipe")
    if kind == "pipe":
        os.mkfifo(path)
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    refused(place, "train.py", path, "--dry-run", words=[path, words])


@pytest.mark.parametrize("value, words", [("[" * 3000, "no YAML value"), ("!!bool x", "no YAML value"),
                                          (list(range(3000)), "it must be an integer"), ("9" * 5000, "no YAML value")])
def test_set(place, value, words):
    train(place, f"model.dim={value}", "model.dim", words)


def test_the_other_readers_of_yaml(place):
    (place / "bomb.yaml").write_text(BOMB)
    refused(place, "txt2img.py", "bomb.yaml", "--ckpt", "x", "--prompt", "x", words=["bomb.yaml", "too many values"])
    refused(place, "train_autoencoder.py", "bomb.yaml", words=["bomb.yaml", "too many values"])
    for setting, words in ((f"heun:{'[' * 3000}", "no YAML value"), ("heun:" + "9" * 5000, "no YAML value"),
                           ("heun:", "steps="), (f"heun eta={'[1]' * 9000}", "no YAML value")):
        refused(place, "compare.py", "samplers", "model_final.pth.tar", setting, words=[words])


def test_an_alias_bomb_in_a_checkpoint(place):
    state, bomb = torch.load(place / "model_final.pth.tar", weights_only=True), ["x"] * 9
    for _ in range(9):
        bomb = [bomb] * 9
    for section, key in (("model", "dim_mults"), (None, "seed"), (None, "model_name"), ("train_cfg", None)):
        config = json.loads(json.dumps(state["config"]))
        (config[section] if section and key else config)[key or section] = bomb
        torch.save({**state, "config": config}, place / "bomb.pth.tar")
        refused(place, "sample.py", "bomb.pth.tar", words=[f"config: {'.'.join(filter(None, (section, key)))} is "])


def test_a_checkpoint_without_a_number_of_classes(place):
    state = torch.load(place / "model_final.pth.tar", weights_only=True)
    state["config"]["model"]["num_classes"] = None
    torch.save(state, place / "null.pth.tar")
    refused(place, "sample.py", "null.pth.tar", words=["model.num_classes is null"])


# ---- sizes

@pytest.mark.parametrize("setting, words", [
    ("model.dim=800000", "8 to 8192"), ("model.dim=8192", "memory: "), ("model.context_dim=100000000000", "100000"),
    ("model.timesteps=10000000000000", "100000"), ("dataset.img_size=100000000", "8 to 4096"),
    ("train_cfg.num_eval_samples=1000000000", "1 to 10000"), ("loader.batch_size=1000000000000", "1 to 1000000"),
    (f"model.dim_mults={[1] * 10000}".replace(" ", ""), ""), (f"model.dim_mults={[1] * 65}", "up to 64"),
    ("sample_cfg.steps=1000000000", "1 to 10000"), ("loader.num_workers=1e400", ""),
    ("train_cfg.accumulate=" + "9" * 400, "1 to 100000"), ("model.patch_size=1000000000", "1 to 512")])
def test_sizes(place, setting, words):
    train(place, setting, setting.split("=")[0] if "memory" not in words else "model.dim", words)


def test_extreme_noise_levels(place):
    for setting in ("rho=1e-300", "sigma_max=1e300", "P_mean=1e308", "sigma_min=1e-300"):
        train(place, f"model.{setting}", f"model.{setting.split('=')[0]} is", more=["--set", "model_name=EDM"])


@pytest.mark.parametrize("arguments, words", [
    (["--num", "1000000000"], ["memory: drawing 2,000,000,000 images", "lower --num"]),
    (["--num", "1000000000", "--output", "x.npz"], ["memory: ", "lower --num"]),
    (["--num", "1" + "0" * 30], ["--num", "10^9"]), (["--batch-size", "1" + "0" * 30], ["--batch-size", "10^9"]),
    (["--steps", "1000000000"], ["steps", "1 to 10000"]), (["--labels", "9" * 30], ["--labels"]),
    (["--labels", "9" * 100_000], ["--labels"]),
    (["--guidance-scale", "nan"], ["guidance_scale"]), (["--guidance-interval", "nan,inf"], ["guidance_interval"]),
    (["--guidance-interval", "x" * 100_000], ["guidance_interval"]), (["--eta", "1e400"], ["eta"]),
    (["--seed", "1e400"], ["--seed"]), (["--device", "meta"], ["--device is 'meta'", "cuda:0"]),
    (["--device", "cpu:99"], ["--device"]), (["--device", "privateuseone"], ["--device"]),
    (["--device", "x" * 100_000], ["--device"]), (["--output", "images", "--overwrite"], ["--output"]),
    (["--output", "new\nline.jpg"], ["new\\nline.jpg"]), (["--output", "no\nwhere/x.png"], ["no\\nwhere"])],
    ids=lambda x: x[0][:12] + "=" + x[-1][:12])
def test_sample(place, arguments, words):
    refused(place, "sample.py", "model_final.pth.tar", *arguments, words=words)


def test_other_scripts_sizes(place):
    for script, *arguments in (["evaluate.py", "model_final.pth.tar", "--no-memorization"],
                               ["compare.py", "samplers", "model_final.pth.tar", "heun:2"],
                               ["compare.py", "runs", "model_final.pth.tar"]):
        refused(place, script, *arguments, "--num", 10 ** 9, words=["memory: ", "lower --num"])
    (place / "sd.safetensors").touch()
    for flag, words in (("height=16384", "memory: "), ("height=" + "9" * 30 + "2", "height"), ("num=1000000000", "--num"),
                        ("device=meta", "devices"), ("guidance-scale=nan", "guidance_scale"), ("steps=10000000", "steps")):
        refused(place, "txt2img.py", os.path.join(PROJECT, "configs/sd15.yaml"), "--ckpt", "sd.safetensors", "--prompt",
                "x", f"--{flag}", words=[words])
    refused(place, "benchmark.py", "tiny.yaml", "--seconds", "nan", words=["--seconds"])
    refused(place, "benchmark.py", "tiny.yaml", "--seconds", "1e400", words=["--seconds"])
    refused(place, "train_autoencoder.py", "tiny.yaml", "--set", "loader.batch_size=9999999", words=["loader.batch_size"])


# ---- the surroundings

@pytest.mark.parametrize("names", ["WORLD_SIZE=x", "WORLD_SIZE=0", "WORLD_SIZE=-1", "WORLD_SIZE=", "RANK=1", "RANK=-1",
                                   "LOCAL_RANK=x", "WORLD_SIZE=2 RANK=2"])
def test_environment(place, names):
    environment = dict(pair.split("=") for pair in names.split())
    refused(place, "train.py", "tiny.yaml", *TRAIN, environment=environment, words=["WORLD_SIZE", "torchrun"])


def test_a_name_with_a_newline(place):
    for script, *arguments in (["train.py", "a\nb.yaml"], ["sample.py", "a\nb.pth.tar"], ["sample.py", "x", "--a\nb"],
                               ["evaluate.py", "a\nb.npz", "--config", "tiny.yaml", "--output", "x\ny.json/z.json"]):
        refused(place, script, *arguments, words=["\\n"])


def test_a_name_that_is_no_text(place):
    ended = command("sample.py", "model_final.pth.tar", "--num", "1", "--output", "\udcff.npz", cwd=place,
                    environment={"PYTHONIOENCODING": "utf-8:strict"})
    assert ended.status == 0 and "\\udcff.npz" in ended.out, ended


# ---- compare.py's results

def test_a_foreign_output_is_noticed_before_the_features(place):
    text = '{"rows": ' + "[" * 100_000
    (place / "r.json").write_text(text)
    ended = command("compare.py", "samplers", "model_final.pth.tar", "heun:2", "--output", "r.json", cwd=place)
    assert ended.status == 2 and "is not a file of this command" in ended.message and "features" not in ended.out
    assert (place / "r.json").read_text() == text


def test_plot_results_of_anything(place):
    for text in ("[" * 100_000, '{"rows": 5, "n": 1, "floor": 1}', '{"rows": [], "n": 1, "floor": null}', "[]"):
        (place / "r.json").write_text(text)
        refused(place, "plot_results.py", "r.json", words=["r.json is no file of compare.py"])
    for text in (BOMB, "loader: {batch_size: x}\nmodel_name: DDPM\ntrain_cfg: {num_eval_samples: 0}"):
        (place / "run").mkdir(exist_ok=True)
        (place / "run" / "config.txt").write_text(text)
        refused(place, "plot_results.py", "run", words=["run is no run folder"])
