"""Programs for optimum-quanto and transformers, unchanged, on Quantal."""

import transformers
from user_scripts import QUANTAL, assert_close, both, outputs


def test_text_classification() -> None:
    if transformers.__version__.startswith("4."):  # optimum-quanto 0.2.7 fits no later one
        ours, theirs = both("text_classification.py")
        assert_close(ours["float"], theirs["float"], 0)
        for name in ("qint8 None", "qint4 None"):
            assert_close(ours[name], theirs[name], 1e-5)
        assert_close(ours["qint8 qint8"], theirs["qint8 qint8"], 0.02)
    else:
        (ours,) = outputs("text_classification.py", on=(QUANTAL,))
    assert ours["float"][0] > 0.95
    for name in ("qint8 None", "qint4 None", "qint8 qint8"):
        assert ours[name]["same"]
        assert ours[name]["accuracy"] > 0.9
