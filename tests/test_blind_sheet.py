"""blind_sheet.py: its pairs are balanced, and agreement is counted as by hand."""

import itertools
import json
from collections import Counter

import pytest
import torch

import blind_sheet
from helpers import one_line, tree
from libs import UsageError
from libs.data.images import write_npz


def test_every_combination_is_shown_as_often():
    names = ["a", "b", "c", "d", "e"]
    pairs = blind_sheet.draw_pairs(names)
    assert Counter(map(frozenset, pairs)) == {frozenset(pair): 4 for pair in itertools.combinations(names, 2)}
    left = Counter(left for left, _ in pairs)
    assert all(3 <= left[name] <= 13 for name in names)  # of 16
    assert pairs == blind_sheet.draw_pairs(names)


def test_agreement():
    key = {"sets": {"good": {"recognised": 0.9, "fd_train": 1, "kd": 2}, "bad": {"recognised": 0.5, "fd_train": 2, "kd": 1}},
           "pairs": [["good", "bad"], ["bad", "good"], ["good", "bad"], ["good", "bad"]]}
    found = blind_sheet.compare(key, "LRLR")  # good, good, good, bad
    assert found["wins"] == {"good": 0.75, "bad": 0.25}
    assert found["agree"] == {"recognised": 0.75, "fd_train": 0.75, "kd": 0.25}


def test_drawn_and_scored(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "data", {"train": ["cat"], "test": ["cat"]}, per_class=6, width=128, height=128)
    write_npz(str(tmp_path / "noise.npz"), torch.randint(256, (5, 3, 128, 128), dtype=torch.uint8))
    monkeypatch.setattr(blind_sheet, "PAIRS", 3)
    monkeypatch.setattr("libs.config.CACHE", str(tmp_path))
    folder, answers, output = tmp_path / "blind", tmp_path / "answers.txt", tmp_path / "blind.json"
    blind_sheet.main(["draw", str(folder), "--data", str(tmp_path / "data"), "--set", f"noise={tmp_path / 'noise.npz'}"])
    assert sorted(path.name for path in folder.iterdir()) == ["00.png", "01.png", "02.png", "key.json"]
    key = json.loads((folder / "key.json").read_text())
    assert list(key["sets"]) == ["photographs", "reconstructions", "noise"]
    assert {content["images"] for content in key["sets"].values()} == {5}  # of the smallest set
    assert key["sets"]["photographs"]["fd_train"] < key["sets"]["noise"]["fd_train"]

    answers.write_text("L\nR\n")
    with pytest.raises(UsageError) as error:
        blind_sheet.main(["score", str(folder), str(answers), "--output", str(output)])
    assert "3 lines" in one_line(error)
    answers.write_text("L\nR\nl\n")
    blind_sheet.main(["score", str(folder), str(answers), "--output", str(output)])
    assert json.loads(output.read_text())["answers"] == "LRL" and "agree" in capsys.readouterr().out
    with pytest.raises(UsageError):
        blind_sheet.main(["draw", str(folder)])

    samples = ["--samples-only", "--set", f"noise={tmp_path / 'noise.npz'}"]
    with pytest.raises(UsageError) as error:
        blind_sheet.main(["draw", str(tmp_path / "samples"), *samples])
    assert "two --set" in one_line(error)
    blind_sheet.main(["draw", str(tmp_path / "samples"), "--data", str(tmp_path / "data"), *samples,
                      "--set", f"again={tmp_path / 'noise.npz'}"])
    assert list(json.loads((tmp_path / "samples" / "key.json").read_text())["sets"]) == ["noise", "again"]
