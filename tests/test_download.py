"""download_dataset.sh as a user runs it, with a small server on this machine in place of the real one."""

import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "download_dataset.sh"
SH = shutil.which("sh")
CLIENTS = [client for client in ("curl", "wget") if shutil.which(client)]
IDS = {
    "taesd_encoder.pth": "65f85afc58480128926e52086fbf0fdc61c2c9b5",
    "taesd_decoder.pth": "5915a429fc08eba4adf62bf74f96705b8b0d5c1f",
}
TRAIN, TEST = 9, 3

pytestmark = [
    pytest.mark.skipif(os.name == "nt" or not SH, reason="needs a POSIX shell"),
    pytest.mark.skipif(not CLIENTS, reason="needs curl or wget"),
]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        content, asked = server.files.get(path), self.headers.get("Range")
        server.requests.append((path, asked))
        if content is None:
            return self.answer(404, b"not here")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if start >= len(content):
            return self.answer(416, b"", f"bytes */{len(content)}")
        span = f"bytes {start}-{len(content) - 1}/{len(content)}" if asked else None
        self.answer(206 if asked else 200, content[start:], span)

    def answer(self, code, body, content_range=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body[: self.server.cut])
        self.wfile.flush()
        self.server.stall.wait(20)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.requests, server.cut, server.stall = {}, [], None, threading.Event()
    server.stall.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "my project"  # the blank must not matter
    root.mkdir()
    shutil.copy(SCRIPT, root)
    return root


def tools(folder, *names):
    """A folder for PATH that holds these programs and what every system has."""
    folder.mkdir(exist_ok=True)
    for name in ("dirname", "mkdir", "mv", "rm", "cat", *names):
        if name == "python3":  # a wrapper, as a link to a virtual environment's Python need not work
            (folder / name).write_text(f'#!{SH}\nexec "{sys.executable}" "$@"\n')
            (folder / name).chmod(0o755)
        else:
            (folder / name).symlink_to(shutil.which(name))
    return folder


def environment(project, server, client, **more):
    path = project.parent / f"bin-{client}"
    base = f"http://127.0.0.1:{server.server_port}"
    return {
        "PATH": str(path if path.exists() else tools(path, "python3", client)),
        "HOME": str(project.parent),  # no .curlrc or .wgetrc
        "AFHQ_URL": f"{base}/afhq.zip?dl=1",
        "TAESD_URL": base,
        "AFHQ_TRAIN_COUNT": str(TRAIN),
        "AFHQ_TEST_COUNT": str(TEST),
        **more,
    }


def run(project, server, *arguments, client=CLIENTS[0], **more):
    command = [SH, str(project / "download_dataset.sh"), *arguments]
    return subprocess.run(
        command, env=environment(project, server, client, **more), cwd=project.parent,
        capture_output=True, text=True, timeout=30,
    )


def error_lines(result):
    return [line for line in result.stderr.splitlines() if line.startswith("download_dataset.sh: error: ")]


def images(prefix=""):
    names = [f"train/{kind}/{i}.png" for kind in ("cat", "dog", "wild") for i in range(3)]
    names += [f"test/{kind}/0.jpg" for kind in ("cat", "dog", "wild")]
    return {prefix + name: hashlib.sha256(name.encode()).digest() * 40 for name in names}


def make_zip(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(project):
    return project / "data/afhq_v2.zip.part"


@pytest.mark.parametrize("client", CLIENTS)
def test_afhq_is_fetched_once(project, server, client):
    members = {**images("afhq_v2/"), "__MACOSX/train/cat/._0.png": b"x", "afhq_v2/train/cat/.DS_Store": b"x",
               "afhq_v2/readme.txt": b"no image"}
    server.files["/afhq.zip"] = make_zip(members)
    result = run(project, server, "afhq", client=client)
    assert result.returncode == 0, result.stderr
    assert tree(project / "data") == images("afhq/")  # the images alone: no .part, no temporary folder
    assert stat.S_IMODE((project / "data/afhq").stat().st_mode) == stat.S_IMODE((project / "data").stat().st_mode)
    first = result.stdout.splitlines()[0]
    assert "6.5 GB" in first and "data/afhq" in first and server.requests == [("/afhq.zip", None)]

    again = run(project, server, "afhq", client=client)
    assert (again.returncode, again.stdout) == (0, "download_dataset.sh: data/afhq is already there\n")
    assert len(server.requests) == 1
    assert not (project / "pretrained").exists()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_broken_connection_keeps_the_part(project, server, client):
    content = server.files["/afhq.zip"] = make_zip(images())
    server.cut = 4000
    result = run(project, server, "afhq", client=client)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "data/afhq_v2.zip.part is kept" in line and line.endswith("run: sh ./download_dataset.sh afhq")
    assert tree(project / "data") == {"afhq_v2.zip.part": content[:4000]}

    server.cut = None
    assert run(project, server, "afhq", client=client).returncode == 0
    assert server.requests == [("/afhq.zip", None), ("/afhq.zip", "bytes=4000-")]
    assert tree(project / "data") == images("afhq/")


def test_a_whole_part_is_not_fetched_again(project, server):
    part(project).parent.mkdir()
    part(project).write_bytes(make_zip(images()))
    assert run(project, server, "afhq").returncode == 0
    assert server.requests == [] and tree(project / "data") == images("afhq/")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_without_the_zip(project, server, client):
    result = run(project, server, "afhq", client=client)
    (line,) = error_lines(result)
    assert result.returncode == 1 and f"cannot fetch http://127.0.0.1:{server.server_port}/afhq.zip" in line
    assert tree(project / "data") == {}

    # a page in its place, all of which is there already
    server.files["/afhq.zip"] = b"<html>busy</html>"
    part(project).write_bytes(b"<html>busy</html>")
    result = run(project, server, "afhq", client=client)
    assert result.returncode == 1 and server.requests[1:] == [("/afhq.zip", "bytes=17-")]
    assert "not the AFHQ v2 zip" in error_lines(result)[0] and tree(project / "data") == {}


def corrupt():
    content = bytearray(make_zip(images()))
    content[content.index(images()["train/dog/1.png"])] ^= 1
    return bytes(content)


def with_link():
    link = zipfile.ZipInfo("train/cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return make_zip({**images(), link: "../../../evil"})


@pytest.mark.parametrize(
    "content, reason",
    [
        (corrupt(), "Bad CRC-32 for file 'train/dog/1.png'"),
        (make_zip({**images(), "../evil.png": b"x"}), "'../evil.png' could land outside"),
        (make_zip({**images(), "/evil/x.png": b"x"}), "'/evil/x.png' could land outside"),
        (make_zip({**images(), "C:/evil.png": b"x"}), "'C:/evil.png' could land outside"),
        (make_zip({**images(), "train\\..\\evil.png": b"x"}), r"'train\\..\\evil.png' could land outside"),
        (with_link(), "'train/cat/link.png' could land outside"),
        (make_zip({**images(), **images("top/")}), "two members are 'train/cat/0.png'"),
        (make_zip({**images(), "train/cat/3.png": b"x"}), "10 train and 3 test images, not 9 and 3"),
    ],
    ids="crc parent absolute drive backslash link twice count".split(),
)
def test_a_zip_that_fails_its_check_is_removed(project, server, content, reason):
    server.files["/afhq.zip"] = content
    before = sorted(project.parent.rglob("evil*"))
    result = run(project, server, "afhq")
    (line,) = error_lines(result)
    assert result.returncode == 1 and reason in line and "removed, run this again to start over" in line
    assert "Traceback" not in result.stderr
    assert list((project / "data").iterdir()) == [] and sorted(project.parent.rglob("evil*")) == before


def test_an_existing_folder_is_never_touched(project, server):
    server.files["/afhq.zip"] = make_zip(images())
    mine = project / "data/afhq/train/cat/mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    result = run(project, server, "afhq")
    assert result.returncode == 1 and server.requests == []
    assert error_lines(result) == [
        "download_dataset.sh: error: data/afhq holds 1 train and 0 test images, not 9 and 3: "
        "move it away, then run this again"
    ]
    assert tree(project / "data") == {"afhq/train/cat/mine.png": b"mine"}


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_taesd_is_checked_before_it_gets_its_name(project, server):
    text = SCRIPT.read_text()
    assert "AFHQ_TRAIN_COUNT:-14336}" in text and "AFHQ_TEST_COUNT:-1467}" in text
    assert [text.count(each) for each in IDS.values()] == [1, 1]
    server.files.update({f"/{name}": b"junk" for name in IDS})
    result = run(project, server, "taesd")
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert f"git blob id {git_blob(b'junk')}, not {IDS['taesd_encoder.pth']}" in line
    assert tree(project / "pretrained") == {}


def test_taesd_is_kept_once_it_is_right(project, server):
    weights = {name: name.encode() * 1000 for name in IDS}
    script, text = project / "download_dataset.sh", SCRIPT.read_text()
    for name, content in weights.items():  # the same script for files small enough to make up here
        text = text.replace(IDS[name], git_blob(content))
        server.files[f"/{name}"] = content
    script.write_text(text)
    (project / "pretrained").mkdir()
    (project / "pretrained/taesd_decoder.pth.part").write_bytes(weights["taesd_decoder.pth"][:77])

    assert run(project, server, "taesd").returncode == 0
    assert tree(project / "pretrained") == weights
    assert server.requests == [("/taesd_encoder.pth", None), ("/taesd_decoder.pth", "bytes=77-")]
    again = run(project, server, "taesd")
    assert again.stdout.count("already there") == 2 and len(server.requests) == 2

    server.files["/afhq.zip"] = make_zip(images())
    assert run(project, server).returncode == 0  # all: what is missing
    assert server.requests[2:] == [("/afhq.zip", None)] and tree(project / "data") == images("afhq/")

    (project / "pretrained/taesd_decoder.pth").write_bytes(b"mine")
    result = run(project, server, "taesd")
    assert result.returncode == 1 and "pretrained/taesd_decoder.pth is not the official file" in error_lines(result)[0]
    assert (project / "pretrained/taesd_decoder.pth").read_bytes() == b"mine"


def stop_when(project, server, there, **more):
    """Start it, press Ctrl-C once there() is true; (exit status, stderr)."""
    process = subprocess.Popen(
        [SH, str(project / "download_dataset.sh"), "afhq"], env=environment(project, server, CLIENTS[0], **more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a suite started in the background ignores SIGINT, and a shell cannot take back what it inherits
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 10
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    return process.communicate(timeout=10)[1], process.returncode


def test_stopping_the_download_leaves_only_the_part(project, server):
    content = server.files["/afhq.zip"] = make_zip({**images(), "notes": bytes(300_000)})
    server.cut = 200_000
    server.stall.clear()
    stderr, code = stop_when(project, server, lambda: part(project).exists() and part(project).stat().st_size > 0)
    assert code == 130 and stderr.endswith("to go on run: sh ./download_dataset.sh afhq\n")
    assert list(tree(project / "data")) == ["afhq_v2.zip.part"]
    assert content.startswith(part(project).read_bytes())


def test_stopping_the_unpacking_leaves_only_the_part(project, server):
    content = make_zip({f"train/cat/{i}.png": b"x" for i in range(3000)})
    part(project).parent.mkdir()
    part(project).write_bytes(content)
    counts = {"AFHQ_TRAIN_COUNT": "3000", "AFHQ_TEST_COUNT": "0"}
    stderr, code = stop_when(project, server, lambda: any(part(project).parent.glob("afhq.unpack.*")), **counts)
    assert code == 130 and "Traceback" not in stderr
    assert tree(project / "data") == {"afhq_v2.zip.part": content}
    assert [path.name for path in (project / "data").iterdir()] == ["afhq_v2.zip.part"]

    assert run(project, server, "afhq", **counts).returncode == 0 and server.requests == []
    assert len(tree(project / "data/afhq")) == 3000


def test_usage(project, server):
    for arguments, more, reason in (
            (["imagenet"], {}, "unknown argument 'imagenet': afhq, taesd or all"),
            (["afhq", "taesd"], {}, "2 arguments: one of afhq, taesd or all"),
            (["afhq"], {"AFHQ_TEST_COUNT": "many"}, "AFHQ_TEST_COUNT 'many': whole numbers are needed")):
        result = run(project, server, *arguments, **more)
        assert result.returncode == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("download_dataset.sh: error: ") and line.endswith(reason)
    result = run(project, server, "-h")
    assert result.returncode == 0 and result.stdout.startswith("usage: sh ./download_dataset.sh [afhq|taesd|all]\n")
    assert sorted(path.name for path in project.iterdir()) == ["download_dataset.sh"]


@pytest.mark.parametrize(
    "names, reason", [(["python3"], "neither curl nor wget found"), ([CLIENTS[0] if CLIENTS else ""], "no Python 3.8")]
)
def test_a_missing_tool_is_named(project, server, names, reason):
    result = run(project, server, "afhq", PATH=str(tools(project.parent / "few", *names)))
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith(f"download_dataset.sh: error: {reason}")
