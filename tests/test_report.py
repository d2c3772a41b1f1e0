"""writeup/build.py: every number of the report comes from a results file."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

WRITEUP = Path(__file__).resolve().parent.parent / "writeup"


@pytest.fixture
def build():
    spec = importlib.util.spec_from_file_location("build", WRITEUP / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "RESULTS", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"n": 12000, "rows": [{"fd": 0.12345}, {"fd": 3e-7}], "share": 0.5}))
    (tmp_path / "b.txt").write_text("text encoder, worst: 0 (at most 1)\nencoder, worst: 3.4e-06 (at most 1)\nspeed: 1,234.5 a second\n")
    return build


@pytest.mark.parametrize("source, text", [
    (r"\val{a.json}{n}{,}", "12,000"),
    (r"\val{a.json}{rows.0.fd}{.2f} and \val{a.json}{rows.1.fd}{.0e}", "0.12 and 3e-7"),
    (r"\val{a.json}{share*100}{.0f}\,\%", r"50\,\%"),
    (r"\val{a.json}{n/60}{.0f}", "200"),
    (r"\val{a.json}{n*1e-3}{.1f}", "12.0"),
    (r"\val{b.txt}{encoder, worst: }{.1e}", "3.4e-6"),
    (r"\val{b.txt}{text encoder, worst: }{.0f}", "0"),
    (r"\val{b.txt}{speed: }{.1f}", "1234.5"),
])
def test_a_number_is_that_of_its_file(results, source, text):
    assert results.fill(source) == text


@pytest.mark.parametrize("source", [r"\val{a.json}{m}{}", r"\val{a.json}{rows.2.fd}{}", r"\val{a.json}{n.m}{}",
                                    r"\val{b.txt}{worst: }{}"])
def test_a_number_that_is_not_there_stops_the_build(results, source):
    with pytest.raises(SystemExit) as error:
        results.fill(source)
    assert "build.py: " in str(error.value)


def test_the_report_can_be_filled(build):
    text = build.fill((WRITEUP / "report.tex").read_text())
    assert not re.search(r"\\(val|rows)\{", text)
    for row in json.loads((build.RESULTS / "benchmark.json").read_text())["rows"][:3]:  # as an example: one table
        assert f" & {row['images_per_s']:.1f} & {row['peak_memory'] / 2 ** 30:.2f} & " in text
    assert len(re.findall(r"\\includegraphics", text)) == len(
        [name for name in re.findall(r"\\includegraphics\[[^]]*\]\{([^}]*)\}", text) if (build.RESULTS / name).is_file()])


def test_help_builds_nothing(build, monkeypatch):
    monkeypatch.setattr(build, "fill", lambda text: pytest.fail("the build was started"))
    with pytest.raises(SystemExit) as done:
        build.main(["--help"])
    assert done.value.code == 0


def test_the_report_names_files_that_exist():
    source = (WRITEUP / "report.tex").read_text().replace("\\_", "_")
    names = {name for text in re.findall(r"\\code\{([^}]*)\}", source)
             for name in re.findall(r"(?<![\w/])[\w./]*\w\.(?:py|yaml|md|json|txt)\b", text)}
    assert len(names) > 15
    root = WRITEUP.parent
    for name in names - {"config.txt"}:
        assert any((folder / name).exists() for folder in (root, root / "code", root / "configs")), name
