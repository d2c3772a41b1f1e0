"""Hostile inputs for the scripts, by the thousand: configs, checkpoints, archives, images, weight files, command lines.

python tests/fuzz.py --cases 20000 --jobs 2               about 40 minutes; case k of a seed is always the same
python tests/fuzz.py --first 4711 --cases 1 --verbose     one of them again
python tests/fuzz.py --only checkpoint image

Whatever a script is given, it ends by itself within 30 seconds and 3 GiB, with status 0, 1 or 2, without a traceback,
with at most one line on standard error, exactly one with 1 or 2, and leaves no broken file. It changes nothing outside
the folder that it is started in, and with status 2 no file that was there. Failing inputs are kept.
"""

import argparse
import copy
import io
import json
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import yaml
from PIL import Image

import scripts
from hostile import DEVICES, TEXTS, WORDS, YAML, array, damage, mutate, number, picture, word
from scripts import PROJECT, command, start

SECONDS, MEMORY = 30, 3 * 2 ** 30
KINDS = {"config": 25, "checkpoint": 25, "weights": 6, "npz": 10, "image": 14, "command": 16, "file": 4}
PROGRESS = re.compile(r"(.*: )?[\d,]+ of [\d,]+ \w+$")

# what is valid, before it is mutated; RUN is one of the runs below
TRAIN = ["train.py tiny.yaml --output a", "train.py tiny.yaml --dry-run", "train.py edm.yaml --output a -p 1",
         "train.py latent.yaml --output a"]
RUNS = ["train.py --resume RUN --set train_cfg.epochs=2", "train.py --resume RUN/epoch_000.pth.tar --set train_cfg.epochs=2",
        "train.py tiny.yaml --resume RUN --dry-run", "sample.py RUN --num 2", "sample.py RUN --num 2 --output s.npz --steps 3",
        "sample.py RUN --num 1 --output s.gif", "sample.py RUN/epoch_000.pth.tar --num 1 --output new/ --sampler heun --steps 2",
        "sample.py RUN --compare heun:2,euler:2 --output s.png", "sample.py RUN --interpolate 2 --sampler heun --steps 2",
        "export.py RUN e.pth.tar --half", "export.py RUN e.pth.tar", "evaluate.py RUN --num 4 --no-memorization --steps 2",
        "compare.py samplers RUN heun:2 --num 4", "compare.py runs RUN RUN2 --num 4 --sampler DDPM=heun:2"]
IMAGES = ["evaluate.py good.npz --config latent.yaml --num 4 --no-memorization",
          "evaluate.py split/test --config latent.yaml --num 4 --no-memorization"]
OTHERS = ["plot_results.py RUN --output figures", "plot_results.py samplers.json --output figures",
          "train_autoencoder.py autoencoder.yaml --dry-run", "train_autoencoder.py autoencoder.yaml --evaluate encoder.pth decoder.pth",
          "txt2img.py sd.yaml --ckpt sd.safetensors --prompt cat", "txt2img.py sd.yaml --ckpt sd.safetensors --prompts prompts.txt",
          "benchmark.py no.yaml --rounds 1", "train_classifier.py --data-folder images --limit 10 --output c.pth"]
FLAGS = {"train.py": "-p -c --output --resume --set --dry-run", "train_autoencoder.py": "-p -c --output --resume --set --dry-run --evaluate",
         "sample.py": "--config --labels --num --sampler --steps --guidance-scale --guidance-interval --clip --no-clip --eta "
         "--spacing --S-churn --interpolate --compare --seed --batch-size --device --output --overwrite",
         "evaluate.py": "--config --num --features --sampler --steps --guidance-scale --guidance-interval --clip --eta --spacing "
         "--S-churn --seed --batch-size --device --data-folder --no-memorization --output --overwrite",
         "compare.py": "--seeds --sampler --seed --num --output --batch-size --device", "export.py": "--half --overwrite",
         "plot_results.py": "--output --epochs --columns --overwrite",
         "txt2img.py": "--ckpt --prompt --prompts --negative-prompt --num --seed --batch-size --output --overwrite --vae --weights "
         "--sampler --steps --guidance-scale --height --width --device --dtype",
         "benchmark.py": "--compare --profile --rounds --seconds --set --json --overwrite --one",
         "train_classifier.py": "--data-folder --output --epochs --seed --limit --bf16 --overwrite"}
VAE = ("vae_encoder_weights", "vae_decoder_weights")


def prepare(base):
    """What cases start from, in base/template: images, configs, runs, and files that take long to make."""
    place = os.path.join(base, "template")
    for name, size in (("images", 36), ("split/train", 32), ("split/test", 32)):
        for k in range(4 if size == 36 else 8):
            folder = os.path.join(place, name, ["cat", "dog"][k % 2])
            os.makedirs(folder, exist_ok=True)
            image = np.random.default_rng([k, len(name)]).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(image).save(os.path.join(folder, f"{k}{['.png', '.jpg', '.gif', '.bmp'][k % 4] if size == 36 else '.png'}"))
    os.makedirs(os.path.join(base, "home"))
    os.chdir(place)
    halves = [shutil.copy(os.path.join(PROJECT, "pretrained", f"afhq_{half}.pth"), f"{half}.pth") for half in ("encoder", "decoder")]
    vae = {key: os.path.abspath(path) for key, path in zip(VAE, halves)}
    data = {"name": "ImageFolder", "data_folder": os.path.abspath("images"), "img_size": 16}
    split = data | {"data_folder": os.path.abspath("split"), "img_size": 32}
    tiny = {"devices": ["cpu"], "output_folder": "../case/runs", "dataset": data, "loader": {"batch_size": 2},
            "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10},
            "train_cfg": {"epochs": 1, "num_eval_samples": 1}, "sample_cfg": {"steps": 2}, "eval": {"features": "autoencoder"}}
    unet = {"dim": 32, "context_dim": 32, "dim_mults": [1, 2], "attn_levels": [0], "num_res_blocks": 1, "num_heads": 2}
    configs = {"tiny": tiny, "edm": tiny | {"model_name": "EDM"},
               "latent": tiny | {"dataset": split, "model": tiny["model"] | {"use_vae": True} | vae},
               "autoencoder": {"devices": ["cpu"], "output_folder": "../case/runs", "dataset": split, "model": vae},
               "sd": {"devices": ["cpu"], "model": {"unet": unet, "autoencoder": {"dim": 32, "num_res_blocks": 1},
                                                    "text_encoder": {"width": 32, "layers": 1, "heads": 2}},
                      "sample_cfg": {"steps": 2, "height": 64, "width": 64}}}
    for name, config in configs.items():
        with open(f"{name}.yaml", "w") as f:
            yaml.safe_dump(config, f, sort_keys=False)
    work = [f"train.py {name}.yaml --output {x} --set output_folder={place}/runs" for name in ("tiny", "edm", "latent") for x in "ab"]
    work += ["sample.py runs/latent_a --num 2 --output good.npz", "compare.py samplers runs/latent_a heun:2 euler:2 --num 4",
             f"{PROJECT}/tests/random_sd_checkpoint.py sd.safetensors --config sd.yaml"]
    for line in work:
        script, *arguments = line.split()
        done = command(script, *arguments, cwd=place, environment=environment(base, os.path.join(base, "prepare")))
        if done.status:
            sys.exit(f"fuzz.py: {line} fails: {done.err}")
    with open("prompts.txt", "w") as f:
        f.write("a cat\na dog\n")
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z, z.open("arr_0.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (2 ** 20, 32, 32, 3)})
        for _ in range(48):
            f.write(bytes(2 ** 26))
    with zipfile.ZipFile("runs/tiny_a/epoch_000.pth.tar") as z, zipfile.ZipFile("bomb.pth.tar", "w", zipfile.ZIP_DEFLATED,
                                                                             compresslevel=1) as out:
        for name in z.namelist():
            with out.open(name, "w", force_zip64=True) as f:
                f.write(z.read(name))
                for _ in range(50 if name.endswith("/data/0") else 0):
                    f.write(bytes(2 ** 26))
    Image.new("RGB", (13_300, 13_300)).save("bomb.png")


def environment(base, outer):
    """No network; nothing of the user's or the project's folders, which relative paths in a config would lead to."""
    proxies = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    return proxies | {"HOME": f"{base}/home", "TORCH_HOME": f"{base}/home", "MPLCONFIGDIR": f"{base}/home", "CACHE": f"{base}/cache", "CODE": f"{outer}/code"}


class Case:
    """Case k of a seed, in a folder of its own: `line`, a script and its arguments, and `notes`, what is hostile."""

    def __init__(self, seed, k):
        self.rng, self.k = random.Random(f"{seed} {k}"), k
        self.kind = self.rng.choices(list(KINDS), KINDS.values())[0]

    def build(self, base, folder):
        self.folder, self.template, self.notes, rng = folder, os.path.join(base, "template"), [], self.rng
        self.run = rng.choice(["tiny", "tiny", "edm", "latent"])
        os.makedirs(folder)
        for name in os.listdir(self.template):
            if name in ("images", "split"):
                shutil.copytree(os.path.join(self.template, name), os.path.join(folder, name))
            elif name.endswith((".yaml", ".npz", ".json", ".txt")) and name != "bomb.npz":
                shutil.copyfile(os.path.join(self.template, name), os.path.join(folder, name))
        for name in ("run", "run2"):
            shutil.copytree(f"{self.template}/runs/{self.run}_{'b' if name == 'run2' else 'a'}", f"{folder}/{name}")
        os.mkfifo(self.path("fifo"))
        for name, minor in DEVICES.items():
            device(self.path(name), minor)
        for name, target in (("loop", "loop"), ("dangling", "nowhere"), ("encoder.pth", None),
                             ("decoder.pth", None), ("sd.safetensors", None)):
            os.symlink(target or os.path.join(self.template, name), self.path(name))
        open(self.path("empty"), "w").close()
        getattr(self, self.kind)()

    def path(self, name):
        return os.path.join(self.folder, name)

    def take(self, commands):
        """One of the commands, as arguments."""
        line = self.rng.choice(commands)
        if "evaluate.py RUN" in line or line.startswith("compare"):
            self.use("latent")
        self.line = line.replace("RUN2", "run2").replace("RUN", "run").split()

    def use(self, run):
        if self.run != run:
            self.run = run
            for name in ("run", "run2"):
                shutil.rmtree(self.path(name))
                shutil.copytree(f"{self.template}/runs/{run}_{'b' if name == 'run2' else 'a'}", self.path(name))

    def read(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def write(self, name, data):
        if os.path.lexists(self.path(name)):
            os.remove(self.path(name))
        with open(self.path(name), "wb") as f:
            f.write(data)

    def times(self):
        return range(self.rng.choice([1, 1, 1, 2, 2, 3]))

    def settings(self):
        """(key, value) of every setting of a run."""
        with open(f"{self.template}/runs/{self.run}_a/config.txt") as f:
            config = yaml.safe_load(f)
        return [(f"{a}.{b}" if isinstance(x, dict) else a, y) for a, x in config.items()
                for b, y in (x.items() if isinstance(x, dict) else [(a, x)])]

    def setting(self):
        """(key, YAML value), the value often wrong."""
        key, old = self.rng.choice(self.settings())
        if self.rng.random() < 0.1:
            key = self.rng.choice(["x", "", ".", "model", "model.", ".dim", "model.dim.x", "model.x", "a" * 9999, "é", key + " ", key.upper(),
                                   "model.unet", "1", "a.b.c", ".".join("a" * 3000), key + "\n"])
        new = self.rng.choice([lambda: number(self.rng), lambda: self.rng.choice(WORDS), lambda: self.rng.choice(YAML),
                               lambda: json.dumps(self.rng.choice(TEXTS)), lambda: [number(self.rng) for _ in range(self.rng.randrange(5))],
                               lambda: number(self.rng)])()
        if key in ("train_cfg.epochs", "sample_cfg.steps") and "--dry-run" not in self.line and self.line[0] == "train.py":
            self.line.append("--dry-run")  # many epochs take long, and may
        return key, str(new)

    # ---- kinds

    def config(self):
        self.take(TRAIN * 4 + RUNS[:3] + IMAGES[:1] + OTHERS[2:4])
        names = [x for x in self.line if x.endswith(".yaml")]
        for _ in self.times():
            if self.line[0].startswith("train") and (self.rng.random() < 0.5 or not names):
                key, new = self.setting()
                self.line += ["--set", f"{key}={new}"]
                self.notes.append(f"--set {key}={new[:40]}")
                continue
            text = self.read(names[0])
            if self.rng.random() < 0.25:
                self.write(names[0], damage(self.rng, text))
                self.notes.append(f"bytes of {names[0]}")
                continue
            key, new = self.setting()
            try:
                config = yaml.safe_load(text)
                section, _, last = key.rpartition(".")
                config.setdefault(section, {})[last] = "PLACE" if section else None
                if not section:
                    config[last] = "PLACE"
                text = yaml.safe_dump(config, sort_keys=False).replace("PLACE", new)
                key, new = f"{key}:", new
            except Exception:  # it is none any more
                text = text.decode(errors="replace") + f"\n{key}: {new}\n"
            if self.rng.random() < 0.2:
                bomb = "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
                more = self.rng.choice(["\nmodel:\n  dim: 8\n", "\ndataset: {}\n", "\n---\na: 1\n", "\n? [1]\n: 2\n", "\n- 1\n", "\n1: 2\n",
                                        "\n<<: {seed: 1}\n", "\nseed: &a [*a]\n", "\n\t\n", "\nx: " + "[" * 3000, "a: &a [x]\n" + bomb,
                                        "a: &a [x]\n" + bomb + "seed: *i\n", "seed: {<<: *i}\n", "\x00", "\r\n", "\ufeff", "%YAML 9.9\n---\n"])
                text = self.rng.choice([text + more, more + text])
                new += f" and {more[:30]!r}"
            self.write(names[0], text.encode(errors="surrogatepass"))
            self.notes.append(f"{names[0]}: {key} {new[:60]}")
            if self.rng.random() < 0.03:
                os.remove(self.path(names[0]))
                self.special(names[0])

    def special(self, name):
        """Something that is no plain file under this name."""
        what = self.rng.choice(["fifo", "folder", "loop", "nowhere", "unreadable", *DEVICES])
        if what == "fifo":
            os.mkfifo(self.path(name))
        elif what == "folder":
            os.mkdir(self.path(name))
        elif what in DEVICES:
            device(self.path(name), DEVICES[what])
        elif what == "unreadable":
            os.close(os.open(self.path(name), os.O_CREAT, 0))
        else:
            os.symlink(os.path.basename(name) if what == "loop" else what, self.path(name))
        self.notes.append(f"{name} is {what}")

    def checkpoint(self):
        self.take(RUNS + RUNS[:2] * 5)
        name = self.rng.choice(["run/epoch_000.pth.tar", "run/epoch_000.pth.tar", "run/model_final.pth.tar"])
        if "resume" in str(self.line) or "epoch" in str(self.line):
            name = "run/epoch_000.pth.tar"
        elif name.startswith("run/e"):
            os.remove(self.path("run/model_final.pth.tar"))
        if self.rng.random() < 0.004:
            shutil.copyfile(f"{self.template}/bomb.pth.tar", self.path(name))
            self.notes.append("bomb")
            return
        state = torch.load(io.BytesIO(self.read(name)), weights_only=True)
        read = state if "--resume" in self.line else {k: v for k, v in state.items() if k not in ("optimizer", "scaler", "rng")}
        self.spoil(name, read)

    def spoil(self, name, state):
        """Write a mutated file of torch.save."""
        saved, how = self.read(name), self.rng.random()
        if how < 0.75:
            state = copy.deepcopy(state)
            for _ in self.times():
                try:
                    self.notes.append(mutate(self.rng, state))
                except Exception as e:
                    self.notes.append(f"({type(e).__name__})")
            out, new = io.BytesIO(), self.rng.random() < 0.95
            try:
                torch.save(state if self.rng.random() < 0.98 else self.rng.choice([[state], None, 1, (state,), torch.zeros(3)]), out,
                           _use_new_zipfile_serialization=new)
                saved = out.getvalue()
            except Exception as e:
                self.notes.append(f"(not saved: {type(e).__name__})")
        if how > 0.7:
            saved = damage(self.rng, saved)
            self.notes.append(f"bytes of {name}")
        self.write(name, saved)
        if self.rng.random() < 0.01:
            os.remove(self.path(name))
            self.special(name)

    def weights(self):
        which = self.rng.choice(["encoder.pth", "decoder.pth", "sd.safetensors", "sd.safetensors"])
        if which == "sd.safetensors":
            self.take(OTHERS[4:5])
            data = self.read(which)
            size = int.from_bytes(data[:8], "little")
            if self.rng.random() < 0.4:
                self.write(which, damage(self.rng, data))
                self.notes.append(f"bytes of {which}")
            elif self.rng.random() < 0.3:
                start, header = 8 + size, json.loads(data[8:8 + size])
                state = {k: torch.frombuffer(bytearray(data[start + v["data_offsets"][0]:start + v["data_offsets"][1]]),
                                             dtype=torch.float32).reshape(v["shape"]) for k, v in header.items() if v.get("dtype") == "F32"}
                self.write("sd.ckpt", b"")
                self.line[3] = "sd.ckpt"
                out = io.BytesIO()
                torch.save({"state_dict": state}, out)
                self.write("sd.ckpt", out.getvalue())
                self.spoil("sd.ckpt", {"state_dict": state})
            else:
                header = json.loads(data[8:8 + size])
                for _ in self.times():
                    self.notes.append(mutate_json(self.rng, header))
                text = json.dumps(header, default=str).encode(errors="replace")
                self.write(which, (len(text) if self.rng.random() < 0.95 else abs(number(self.rng)) % 2 ** 64).__int__().to_bytes(8, "little")
                           + text + data[8 + size:])
            return
        self.use("latent")
        self.take([TRAIN[3], IMAGES[0], RUNS[3], *OTHERS[2:4]])
        state = torch.load(io.BytesIO(self.read(which)), weights_only=True)
        self.spoil(which, state)
        for name in ("latent.yaml", "autoencoder.yaml"):
            self.write(name, self.read(name).replace(self.template.encode() + b"/" + which.encode(), self.path(which).encode()))
        if self.line[0] == "sample.py":
            os.remove(self.path("run/model_final.pth.tar"))
            state = torch.load(self.path("run/epoch_000.pth.tar"), weights_only=True)
            state["config"]["model"]["vae_" + which[:7] + "_weights"] = self.path(which)
            torch.save(state, self.path("run/epoch_000.pth.tar"))

    def npz(self):
        self.take(IMAGES[:1])
        how = self.rng.random()
        if how < 0.01:
            os.remove(self.path("good.npz"))
            os.symlink(f"{self.template}/bomb.npz", self.path("good.npz"))
            self.notes.append("bomb")
        elif how < 0.4:
            for _ in self.times():
                self.write("good.npz", damage(self.rng, self.read("good.npz")))
            self.notes.append("bytes of good.npz")
        else:
            out, arrays = io.BytesIO(), {"arr_0": array(self.rng)}
            if self.rng.random() < 0.3:
                arrays["arr_0"] = np.load(self.path("good.npz"))["arr_0"]
            if self.rng.random() < 0.6:
                labels = [number(self.rng) for _ in range(len(arrays["arr_0"]) if arrays["arr_0"].ndim else 1)]
                arrays["labels"] = array(self.rng) if self.rng.random() < 0.4 else np.asarray(labels)
            if self.rng.random() < 0.1:
                arrays[self.rng.choice(["x", "file", "é", "a/b", "labels"])] = array(self.rng)
            self.notes.append(", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items()))
            (np.savez if self.rng.random() < 0.8 else np.savez_compressed)(out, **{k: v for k, v in arrays.items() if k != "file"})
            self.write("good.npz", out.getvalue() if self.rng.random() < 0.8 else damage(self.rng, out.getvalue()))

    def image(self):
        self.take(TRAIN[:2] + TRAIN[3:] + IMAGES[1:] * 2 + OTHERS[3:4])
        if self.line[0] == "train_autoencoder.py":
            self.line[-2:] = f"{self.template}/encoder.pth", f"{self.template}/decoder.pth"
        folder = "split/test" if "split/test" in self.line else "images"
        if any(name in self.line for name in ("latent.yaml", "autoencoder.yaml")) and folder == "images":
            folder = self.rng.choice(["split/train", "split/train", "split/test"])
        for name in ("tiny", "latent", "autoencoder"):
            if folder != "split/test" or "evaluate.py" not in self.line:
                self.write(f"{name}.yaml", self.read(f"{name}.yaml").replace(f"{self.template}/".encode(), f"{self.folder}/".encode()))
        for _ in self.times():
            found = [os.path.join(a, f) for a, _, files in os.walk(self.path(folder)) for f in files]
            how, animal = self.rng.random(), self.rng.choice(["cat", "dog"])
            if how < 0.35 and found:
                old = os.path.relpath(self.rng.choice(sorted(found)), self.folder)
                if os.path.isfile(self.path(old)) and os.access(self.path(old), os.R_OK):
                    self.write(old, damage(self.rng, self.read(old)))
                    self.notes.append(f"bytes of {old}")
                continue
            data, ending = picture(self.rng)
            name = self.rng.choice(["z", "z", "z", "z", "\n", "é", "\udcff", ".z", "-", " ", "%s", "a" * 240, "z.tar", "\x1b[31m"]) + ending
            try:
                if how < 0.7:
                    self.write(f"{folder}/{animal}/{name}", data if self.rng.random() < 0.6 else damage(self.rng, data))
                    self.notes.append(f"{data[:4]!r} as {name[:20]!r}")
                elif how < 0.85:
                    self.special(f"{folder}/{animal}/{name}")
                elif how < 0.86:
                    os.symlink(f"{self.template}/bomb.png", self.path(f"{folder}/{animal}/{name}"))
                    self.notes.append("bomb")
                elif how < 0.93:
                    os.makedirs(self.path(f"{folder}/{self.rng.choice(['train', 'test', 'val', name, 'new', '.hidden', animal + '/sub'])}"))
                    self.notes.append("another folder")
                elif how < 0.96:
                    shutil.rmtree(self.path(f"{folder}/{animal}"))
                    self.notes.append(f"no {animal}")
                else:
                    os.chmod(self.path(f"{folder}/{animal}"), 0)
                    self.notes.append(f"{animal} cannot be read")
            except OSError as e:
                self.notes.append(f"({e.strerror})")

    def command(self):
        self.take(TRAIN[:3] + RUNS + IMAGES + OTHERS * 2)
        names = os.listdir(self.folder)
        for _ in self.times():
            flags = FLAGS[self.line[0]].split()
            how, at = self.rng.random(), self.rng.randrange(1, len(self.line))
            new = word(self.rng, names)
            if how < 0.45:
                flag = self.rng.choice(flags)
                parts = [flag, new] if self.rng.random() < 0.5 else [f"{flag}={new}"] if self.rng.random() < 0.8 else [flag]
                if flag == "--set":
                    key, new = self.setting()
                    parts = [flag, f"{key}={new}"]
                self.line += parts
            elif how < 0.8:
                old = self.line[at]
                self.line[at] = new
                parts = [old, "->", new]
            elif how < 0.9:
                parts = ["less", self.line.pop(at)] if len(self.line) > 2 else []
            else:
                self.line.insert(at, self.rng.choice([new, self.line[at]]))
                parts = ["inserted", self.line[at]]
            self.notes.append(" ".join(parts)[:60])
        if self.line[0] == "benchmark.py":  # it must not come to its measurements
            self.line[1:1] = ["no.yaml"]
        if "epochs=" in str(self.line) and self.line[0] == "train.py":
            self.line.append("--dry-run")

    def file(self):
        """JSON files of comparisons, config.txt, event files, prompts."""
        self.use("latent")
        which = self.rng.choice(["samplers.json", "samplers.json", "run/config.txt", "events", "prompts.txt", "run/sample-0.png"])
        self.take({"samplers.json": [OTHERS[1], RUNS[-2]], "prompts.txt": OTHERS[5:6]}.get(which, OTHERS[:1]))
        if which == "events":
            which = "run/logs/" + os.listdir(self.path("run/logs"))[0]
        for _ in self.times():
            how = self.rng.random()
            if how < 0.05 and os.path.isfile(self.path(which)):
                os.remove(self.path(which))
                self.special(which)
                break
            if how < 0.6 and which.endswith(".json"):
                try:
                    content = json.loads(self.read(which))
                    self.notes.append(mutate_json(self.rng, content))
                    self.write(which, json.dumps(content, default=str).encode(errors="replace"))
                    continue
                except (ValueError, RecursionError):
                    pass
            self.write(which, damage(self.rng, self.read(which)))
            self.notes.append(f"bytes of {which}")


def device(path, minor):
    """A device like /dev/null. Root gets one of its own, as a script with the right to do so would replace /dev/null."""
    if os.getuid():
        os.symlink(f"/dev/{next(name for name, number in DEVICES.items() if number == minor)}", path)
    else:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))


def mutate_json(rng, content):
    for _ in range(5):
        trial = copy.deepcopy(content)
        said = mutate(rng, trial)
        try:
            json.dumps(trial, default=str)
        except (TypeError, ValueError, RecursionError):
            continue
        content.clear()
        content.update(trial)
        return said
    return "nothing"


# ---- running

def snapshot(folders):
    """path -> size and time of change, of every file."""
    return {path: (s.st_size, s.st_mtime_ns, s.st_mode) for folder in folders for a, dirs, files in os.walk(folder)
            if not dirs.__contains__(".git") or not dirs.remove(".git")
            for path in [os.path.join(a, f) for f in files + dirs if f != "__pycache__" and not f.endswith(".pyc")]
            for s in [os.lstat(path)] if not os.path.isdir(path) or os.path.islink(path)}


def run(base, seed, k, only, keep):
    """Run a case: a dict of what happened; None for a case of no kind in `only`."""
    case = Case(seed, k)
    if only and case.kind not in only:
        return None
    torch.manual_seed(k)
    outer = os.path.join(base, f"case-{os.getpid()}")
    folder = os.path.join(outer, "case")
    shutil.rmtree(outer, ignore_errors=True)
    os.makedirs(os.path.join(outer, "beside"))
    case.build(base, folder)
    watched = [os.path.join(base, "template"), *([PROJECT] if os.access(PROJECT, os.W_OK) else [])]
    before, inside = snapshot(watched), snapshot([folder])
    script, *arguments = case.line
    wait = start(script, *arguments, cwd=folder, seconds=SECONDS, environment=environment(base, outer))
    killed = False
    while wait.process.is_alive():
        wait.process.join(0.1)
        try:
            with open(f"/proc/{wait.process.pid}/statm") as f:
                if int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MEMORY + 2 ** 30:
                    wait.process.kill()
                    killed = True
        except (OSError, IndexError):
            pass
    done = wait()
    after = snapshot([folder])
    wrong = verdict(done, killed, inside, after)
    if snapshot(watched) != before or os.listdir(os.path.join(outer, "beside")):
        wrong.append("changed something outside its folder")
    frames = re.findall(r'File "[^"]*?([^/"]+\.py)", line \d+, in (\S+)', done.err)
    last = done.err.strip().splitlines()[-1] if done.err.strip() else ""
    result = {"k": k, "kind": case.kind, "notes": "; ".join(case.notes), "line": case.line, "wrong": wrong, "status": done.status,
              "seconds": done.seconds, "memory": done.memory, "err": done.err, "out": done.out[-2000:], "last": last,
              "frame": ":".join(next((f for f in reversed(frames) if os.path.exists(find(f[0]))), frames[-1] if frames else ("", "")))}
    if wrong and keep:
        target = os.path.join(keep, str(k))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, symlinks=True, ignore=lambda a, names: [n for n in names if not os.path.isfile(os.path.join(a, n)) and not os.path.isdir(os.path.join(a, n))
                        or not os.access(os.path.join(a, n), os.R_OK)])
    for a, dirs, _ in os.walk(outer):
        for d in dirs:
            if not os.path.islink(os.path.join(a, d)):
                os.chmod(os.path.join(a, d), 0o700)
    shutil.rmtree(outer, ignore_errors=True)
    return result


def find(name):
    """A file of the project's code by its name."""
    if not FILES:
        FILES.update({f: os.path.join(a, f) for a, _, files in os.walk(os.path.join(PROJECT, "code")) for f in files})
    return FILES.get(name, "")


FILES = {}


def verdict(done, killed, before, after):
    """What is wrong with how a script ended: a list of words."""
    wrong, lines = [], [line for line in done.err.splitlines() if not PROGRESS.match(line)]
    if killed:
        wrong.append("took more than 4 GiB and was killed")
    elif done.status == -14:
        wrong.append(f"did not end in {SECONDS} s")
    elif done.status not in (0, 1, 2):
        wrong.append(f"status {done.status}")
    elif done.memory > MEMORY:
        wrong.append("took more than 3 GiB")
    if "Traceback" in done.err + done.out:
        wrong.append("traceback")
    elif len(lines) > 1 or done.status in (1, 2) and len(lines) != 1 or re.search(r"[\r\x1b]", done.err):
        wrong.append(f"{len(lines)} lines of error")
    if len(done.err) > 10_000 and "traceback" not in wrong:
        wrong.append("a line of more than 10,000 characters")
    changed = [path for path in after if after[path] != before.get(path)]
    wrong += ["leaves a half-written file" for path in after if ".partial" in path][:1]
    if done.status == 2:
        wrong += [f"changed {os.path.basename(path)} though refused" for path in before if path not in after or path in changed][:1]
    for path in changed:
        try:
            if path.endswith((".png", ".gif")):
                Image.open(path).load()
            elif path.endswith(".npz"):
                np.load(path)["arr_0"]
            elif path.endswith((".pth.tar", ".pth")):
                torch.load(path, weights_only=True)
            elif path.endswith(".json"):
                with open(path) as f:
                    json.load(f)
        except Exception as e:
            wrong.append(f"leaves a broken {os.path.splitext(path)[1]}: {type(e).__name__}")
    return wrong


def group(result):
    """Failures of one cause, as far as one can tell."""
    last = re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?|/\S+", "_", result["last"])[:100]
    return f"{result['line'][0] if not result['frame'].strip(':') else ''} {result['frame']}  {result['wrong'][0]}: {last}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=[])
    parser.add_argument("--keep", default=None, metavar="FOLDER", help="failing inputs (default: fuzz-failures in TMPDIR)")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    scripts.PRELOADED += ["matplotlib.figure", "matplotlib.backends.backend_pdf", "libs.stable_diffusion.checkpoint", "PIL.ImageDraw",
                          "tensorboard.backend.event_processing.event_accumulator"]
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8:strict", OMP_NUM_THREADS="1", PYTHONWARNINGS="")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    base = tempfile.mkdtemp(prefix="fuzz-")
    keep = os.path.abspath(args.keep) if args.keep else os.path.join(tempfile.gettempdir(), "fuzz-failures")
    os.makedirs(keep, exist_ok=True)
    try:
        return fuzz(args, base, keep)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def fuzz(args, base, keep):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # the fork server of this process would outlive the folder
        pool.submit(prepare, base).result()
    started, statuses, failures, memory, longest, count = time.time(), Counter(), {}, 0, 0, 0
    printed = started
    with ProcessPoolExecutor(args.jobs, get_context("fork")) as pool:
        numbers = range(args.first, args.first + args.cases)
        for done in pool.map(run, *zip(*[(base, args.seed, k, args.only, keep) for k in numbers]), chunksize=min(10, max(1, args.cases // args.jobs // 4))):
            if done is None:
                continue
            count += 1
            statuses[done["status"]] += 1
            memory, longest = max(memory, done["memory"] if done["memory"] == done["memory"] else 0), max(longest, done["seconds"])
            if done["wrong"]:
                failures.setdefault(group(done), []).append(done)
            if done["wrong"] or args.verbose:
                print(f"{done['k']} {done['kind']} | {done['notes'][:200]!r} | {' '.join(done['line'])[:200]!r} | {done['status']} "
                      f"{', '.join(done['wrong'])} | {done['last'][:200]} | {done['seconds']:.1f} s", flush=True)
            if args.verbose and args.cases == 1:
                print(done["out"], done["err"], sep="\n", flush=True)
            if time.time() - printed > 30:
                printed = time.time()
                print(f"{count:,} cases, {count / (printed - started):.1f} a second, {sum(map(len, failures.values()))} failures", flush=True)
    for name, group_ in sorted(failures.items(), key=lambda x: -len(x[1])):
        print(f"{len(group_):5d}  {name}  (cases {', '.join(str(x['k']) for x in group_[:5])})")
    print(f"{count:,} cases, {sum(map(len, failures.values()))} failures; statuses "
          f"{', '.join(f'{s}: {n:,}' for s, n in sorted(statuses.items()))}; most memory {memory / 2 ** 30:.1f} GiB, longest {longest:.1f} s; "
          f"{count / (time.time() - started):.1f} cases a second")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
