"""A few of the hostile inputs of fuzz.py: each script ends by itself, in one line, and harms nothing."""

import pytest

import fuzz


@pytest.mark.filterwarnings("ignore")
def test_hostile_inputs(tmp_path):
    fuzz.prepare(str(tmp_path))
    done = [fuzz.attempt(str(tmp_path), 1, k, [], str(tmp_path / "kept")) for k in range(24)]
    assert {case["status"] for case in done} >= {0, 2}
    wrong = [case["text"] for case in done if case["wrong"]]
    assert not wrong, "\n".join(wrong)
