"""zip_submission.py as a user runs it, on small made-up projects."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import PROJECT

SCRIPT = Path(PROJECT) / "zip_submission.py"
FILES = {
    "README.md": "read me",
    "requirements.txt": "torch",
    "download_dataset.sh": "echo",
    "code/train.py": '#!/usr/bin/env python3\n"""Run it."""\nDATA = "../data"\n',
    "code/libs/unet.py": "x = 1 / 2\n",
    "configs/mnist.yaml": "output_folder: ../logs\n",
    "writeup/report.pdf": "%PDF-1.7",
    "results/samples.png": "a picture",
}
PACKED = {
    "README.md", "requirements.txt", "code/train.py", "code/libs/unet.py", "code/configs/mnist.yaml",
    "writeup/report.pdf", "results/samples.png",
}


def put(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "my project"
    root.mkdir()
    shutil.copy(SCRIPT, root)
    put(root, FILES)
    try:
        (root / "code/configs").symlink_to("../configs")
    except OSError:  # Windows without the right to make links: what git puts there
        put(root, {"code/configs": "../configs"})
    return root


def run(project, *arguments):
    return subprocess.run(  # from another folder: where it is started must not matter
        [sys.executable, str(project / "zip_submission.py"), *map(str, arguments)],
        cwd=project.parent, capture_output=True, text=True, timeout=60,
    )


def content(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {info.filename: archive.read(info) for info in archive.infolist()}


def refused(project, *arguments):
    """The reasons, after a check that nothing was written."""
    before = sorted(project.rglob("*"))
    result = run(project, *arguments)
    assert result.returncode == 2 and result.stdout == "" and sorted(project.rglob("*")) == before
    lines = result.stderr.splitlines()
    prefix = "zip_submission.py: error: "
    assert lines and all(line.startswith(prefix) for line in lines), result.stderr
    return [line[len(prefix):] for line in lines]


def test_the_three_folders_with_the_configs(project):
    result = run(project)
    assert result.returncode == 0, result.stderr
    packed = content(project / "submission.zip")
    assert set(packed) == PACKED
    assert packed["code/configs/mnist.yaml"] == b"output_folder: ../logs\n"  # the file, not the link
    assert packed["code/train.py"] == FILES["code/train.py"].encode()
    assert "packed    code: 3 file(s)" in result.stdout and "7 files" in result.stdout.splitlines()[-1]
    assert not list(project.glob(".submission*"))


def test_names_that_were_not_filled_in(project):
    put(project, {"writeup/report.tex": r"\author{Names: to be filled in}"})
    warning, _, last = run(project).stdout.splitlines()[-3:]
    assert warning.startswith("warning: writeup/report.tex") and last.startswith("wrote ")
    put(project, {"writeup/report.tex": r"\author{Ada, Grace}"})
    assert "warning" not in run(project, "--overwrite").stdout


@pytest.mark.parametrize("kind", ["missing", "text", "folder"])
def test_configs_without_a_link(project, kind):
    link = project / "code/configs"
    link.unlink()
    if kind == "text":
        link.write_text("../configs")
    if kind == "folder":
        put(project, {"code/configs/own.yaml": "lr: 1"})
    assert run(project).returncode == 0
    configs = {"code/configs/own.yaml"} if kind == "folder" else {"code/configs/mnist.yaml"}
    names = set(content(project / "submission.zip"))
    assert names == PACKED - {"code/configs/mnist.yaml"} | configs


def test_what_stays_behind_is_listed(project):
    stays = {
        "code/libs/__pycache__/unet.pyc": "cache",
        "code/.ipynb_checkpoints/a.py": "hidden",
        "code/.env": "hidden",
        "code/data/mnist.gz": "no data, logs or models",
        "results/logs/log.txt": "no data, logs or models",
        "results/models/a.bin": "no data, logs or models",
        "results/final.pth.tar": "weights",
        "results/a.pt": "weights",
        "results/b.safetensors": "weights",
        "results/events.out.tfevents.17.host": "training log",
        **{f"code/{name}": "secret" for name in (
            "id_rsa", "id_ed25519.pub", "key.pem", "server.key", "secrets.env", "secrets.yaml", "Credentials.json",
            "credentials-me.json", "a.p12", "kubeconfig", "_netrc")},
        **{f"results/{name}": "weights or data" for name in (
            "a.bin", "a.onnx", "a.h5", "a.pkl", "a.pickle", "a.joblib", "a.msgpack", "a.tflite", "a.gguf")},
        **{f"results/{name}": "archive" for name in ("a.zip", "a.tar", "a.tar.gz", "a.7z")},
        "results/big.npz": "array over 1 MB",
    }
    put(project, {name: bytes(1_100_000 if "big" in name else 1) for name in stays})
    put(project, {"logs/run/model.pth.tar": "x", "data/afhq/a.png": "x", "tests/test_a.py": "'/a/b/'"})
    put(project, {"results/small.npz": "x", "code/libs/models/__init__.py": "", "code/libs/models/unet.py": ""})
    result = run(project)
    assert result.returncode == 0, result.stderr
    kept = {"results/small.npz", "code/libs/models/__init__.py", "code/libs/models/unet.py"}
    assert set(content(project / "submission.zip")) == PACKED | kept
    listed = [line for line in result.stdout.splitlines() if line.startswith("left out")]
    assert len(listed) == len(stays)
    for name, why in stays.items():
        shown = name if "left out  " + name in result.stdout else name.rpartition("/")[0]
        assert any(line.startswith(f"left out  {shown} (") and why in line for line in listed), name


def test_links_are_followed_for_files_only(project):
    put(project, {"elsewhere/curve.png": "a curve"})
    try:
        (project / "results/curve.png").symlink_to("../elsewhere/curve.png")
    except OSError:
        pytest.skip("no right to make links")
    (project / "results/all").symlink_to("../elsewhere")
    (project / "results/dead.png").symlink_to("nowhere")
    result = run(project)
    packed = content(project / "submission.zip")
    assert set(packed) == PACKED | {"results/curve.png"} and packed["results/curve.png"] == b"a curve"
    assert "results/all (link to a folder)" in result.stdout and "results/dead.png (dead link)" in result.stdout
    assert f"followed  results/curve.png -> {project / 'elsewhere/curve.png'}" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no right to make links")
def test_links_out_of_the_project(project, tmp_path):
    put(tmp_path, {"private/passwd.txt": "root:x", "private/README.md": "mine"})
    put(project, {".git/config": "token", "keys/id_rsa": "a key"})
    (project / "README.md").unlink()
    for name, target in {"code/passwd.txt": "private/passwd.txt", "code/private": "private",
                         "README.md": "private/README.md", "results/up": "."}.items():
        (project / name).symlink_to(tmp_path / target)
    (project / "code/notes.txt").symlink_to("../.git/config")  # within, but under a name that says nothing
    (project / "code/b.txt").symlink_to("../keys/id_rsa")
    result = run(project)
    assert set(content(project / "submission.zip")) == PACKED - {"README.md"}
    for name in ("code/passwd.txt", "code/private", "README.md", "results/up"):
        assert f"left out  {name} (link out of the project)" in result.stdout
    assert "code/notes.txt (hidden)" in result.stdout and "code/b.txt (by its name a secret)" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no right to make links")
@pytest.mark.parametrize("name", ["code", "writeup", "results", "configs"])
def test_a_whole_folder_elsewhere(project, tmp_path, name):
    (project / name).rename(tmp_path / "elsewhere")
    (project / name).symlink_to("../elsewhere")
    assert refused(project) == [f"{name}/ is a link out of the project: put the folder itself there"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_opened(project):
    for name in ("code/pipe.py", "code/libs/pipe.yaml", "results/pipe", "writeup/a.pdf"):
        os.mkfifo(project / name)
    (project / "code/link.py").symlink_to("pipe.py")
    result = run(project)
    assert set(content(project / "submission.zip")) == PACKED and result.stdout.count("(no regular file)") == 5


@pytest.mark.parametrize("output", ["code/train.py", "results/samples.png", "submission"])
def test_a_source_file_is_no_output(project, output):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    (reason,) = refused(project, "--output", project / output, "--overwrite")
    assert output in reason and "must end in .zip" in reason
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_the_model_is_no_output(project):
    put(project, {"model.zip": "weights"})
    (reason,) = refused(project, "--model", project / "model.zip", "--output", project / "model.zip", "--overwrite")
    assert "not be the model" in reason and (project / "model.zip").read_bytes() == b"weights"


@pytest.mark.parametrize("folder", ["logs/run", "results"])
def test_one_model(project, folder):
    put(project, {f"{folder}/final.pth.tar": "weights", "results/other.pth.tar": "weights"})
    assert refused(project, "--model", "none.pth") == ["--model none.pth: no such file"]
    assert run(project, "--model", project / folder / "final.pth.tar").returncode == 0
    packed = content(project / "submission.zip")
    assert set(packed) == PACKED | {"results/model/final.pth.tar"}
    assert packed["results/model/final.pth.tar"] == b"weights"


def test_the_shipped_model_where_none_is_named(project):
    put(project, {"pretrained/mnist_cpu.pth.tar": "weights", "logs/run/final.pth.tar": "mine"})
    output = run(project).stdout
    assert content(project / "submission.zip")["results/model/mnist_cpu.pth.tar"] == b"weights"
    assert "warning: the model is the one that ships" in output and "yours to write: UNet.forward" in output
    result = run(project, "--overwrite", "--model", project / "logs/run/final.pth.tar")
    assert "the one that ships" not in result.stdout and "yours to write" in result.stdout
    assert set(content(project / "submission.zip")) == PACKED | {"results/model/final.pth.tar"}


def test_overwriting_has_to_be_asked_for(project):
    out = project / "results/mine.zip"
    assert run(project, "--output", out).returncode == 0 and set(content(out)) == PACKED
    (reason,) = refused(project, "--output", out)
    assert reason == f"{out} is there already: --overwrite replaces it"
    put(project, {"results/new.txt": "new"})
    assert run(project, "--output", out, "--overwrite").returncode == 0
    assert set(content(out)) == PACKED | {"results/new.txt"}  # and not the old zip
    assert "must be a file in a folder that exists" in refused(project, "--output", project / "no/x.zip")[0]


ABSOLUTE = [  # file, text, line, path
    ("code/a.py", 'x = 1\ny = "/user/classes/proj1"\n', 2, "/user/classes/proj1"),
    ("code/b.py", "f(\n  a,\n  root='~/data')\n", 3, "~/data"),
    ("code/c.py", "x = r'C:\\data\\x'\n", 1, r"C:\data\x"),
    ("code/d.py", "x = f'/home/{user}/data'\n", 1, "/home/"),
    ("code/e.py", "x = '/scratch/' + name\ny = 'file:///home/me/x'\n", 1, "/scratch/"),
    ("code/e.py", "x = '/scratch/' + name\ny = 'file:///home/me/x'\n", 2, "file:///home/me/x"),
    ("code/i.py", "x = b'/home/me/x'\n", 1, "/home/me/x"),
    ("code/j.py", "x = 1\nf(' /home/me/x')\n", 2, " /home/me/x"),
    ("code/k.ini", "[data]\nroot = /home/me/x\n", 2, "/home/me/x"),
    ("code/l.cfg", "root=~/x\n", 1, "~/x"),
    ("code/m.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": ["in /a/b"]}, {
        "cell_type": "code", "source": ["import x\n", "x.open(\"/home/me/x\")"]}]}), 2, "/home/me/x"),
    ("code/f.sh", "#!/bin/sh\ncd /home/me/code\n", 2, "/home/me/code"),
    ("code/g.sh", 'D="/home/me"\n', 1, "/home/me"),
    ("code/h.sh", "P=$P:/opt/bin\n", 1, "/opt/bin"),
    ("configs/a.yaml", "lr: 1\nd:\n  folder: /data/afhq  # mine\n", 3, "/data/afhq"),
    ("configs/b.yaml", 'a: [x, "/data"]\n', 1, "/data"),
    ("configs/c.yaml", "a: C:\\data\n", 1, r"C:\data"),
]


def test_absolute_paths_are_named(project):
    put(project, {name: text for name, text, _, _ in ABSOLUTE})
    put(project, {"code/z.py": "x = 1\nif x\n", "code/y.ipynb": "[1]", "code/x.json": "[" * 100_000})
    reasons = refused(project)
    for name, _, line, path in ABSOLUTE:
        assert f"{name}:{line}: absolute path {path!r}: use one relative to code/" in reasons
    assert any(reason.startswith("code/z.py:2: cannot be read") for reason in reasons)
    assert any(reason.startswith("code/y.ipynb:1: cannot be read") for reason in reasons)
    assert len(reasons) == len(ABSOLUTE) + 2


def test_what_only_looks_like_an_absolute_path(project):
    put(
        project,
        {
            "code/a.py": "\n".join(
                [
                    "#!/usr/bin/env python3",
                    '"""Not /user/classes/proj1."""',
                    "# cd /home/me/code",
                    'a = ["https://host/a/b", "a/b", "/", "/name", "../data/x", "./x", "/dev/null", "/proc/self/status"]',
                    r'b = [r"/\w+/[a-z]/", r"\d:/", "1:/", "~", "key: /", "http://h:80/x"]',
                    'c = a + "/b/c" + f"{a}/b/c"',
                ]
            ),
            "configs/a.yaml": "# /data/x\nurl: https://host/a/b\nratio: 9/8\ncsv: a/b/c\nout: ../logs\nx: ~\ny: 1e-4 # /a/b\n",
            "code/run.sh": '#!/bin/sh\ncd "$(dirname "$0")"/../x || exit\nls $HOME/x "${A}/b" a/b >/dev/null 2>/dev/null\n'
            "sed -n '/from/,/to/p' x; curl https://host/a\n",
            "writeup/report.tex": "/home/me/x",
            "results/notes.sh": "cd /home/me",
        },
    )
    assert run(project).returncode == 0, run(project).stderr
    assert len(content(project / "submission.zip")) == len(PACKED) + 5


def test_missing_contents(project):
    (project / "results/samples.png").rename(project / "results/samples.pt")
    assert refused(project) == ["results/ holds no file to hand in"]
    put(project, {"writeup/report.pdf": "\\documentclass"})
    assert refused(project) == ["writeup/*.pdf: no PDF there, the report must be one"]
    shutil.rmtree(project / "writeup")
    assert refused(project) == ["writeup/ is missing: the zip must hold it as writeup/"]


def test_a_zip_over_50_mb(project):
    put(project, {"results/noise.png": random.Random(0).randbytes(50_100_000)})
    (reason,) = refused(project)
    assert reason.startswith("submission.zip would have 50.1 MB, over 50 MB; the largest file is results/noise.png (50.1 MB)")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="such names cannot be made here")
def test_names_that_other_systems_lack(project):
    names = ["results/epoch_12:30.png", "results/what?/a.png", "results/a\\b.png", "results/a.", "results/aux.txt",
             "code/CON", "results/Samples.png"]
    put(project, {name: "x" for name in names})
    reasons = refused(project)
    assert len(reasons) == len(names)
    for part in ("epoch_12:30.png", "what?", "a\\b.png", "a.", "aux.txt", "CON"):
        assert any(f"the name {part!r} is not allowed on Windows" in reason for reason in reasons), part
    assert any("are one file on Windows and macOS" in reason and "'results/samples.png'" in reason
               and "'results/Samples.png'" in reason for reason in reasons)
