"""A few of the hostile inputs of fuzz.py: each script ends by itself, in one line, and harms nothing."""

import fuzz


def test_hostile_inputs(tmp_path):
    fuzz.prepare(str(tmp_path))
    done = [fuzz.attempt(str(tmp_path), 0, k, [], str(tmp_path / "kept")) for k in range(60)]
    assert len({case["status"] for case in done}) > 1, "no input was refused, or none was taken"
    wrong = [case["text"] for case in done if case["wrong"]]
    assert not wrong, "\n".join(wrong)
