"""If this fails, a bad option costs the user a model load before it is noticed, or ends in a traceback."""

import pytest

from bench.prefill.__main__ import PHOTOGRAPH, parse

CASES = [
    (["--preset", "70b"], "'70b'"),
    (["--image", "absent.jpg"], "No such file"),
    (["--image", "README.md"], "cannot be read as an image"),
    (["--image", "HALF"], "cannot be read as an image"),
    (["--json", "bench"], "is a folder"),
    (["--json", "/proc/prefill.json"], "cannot be written"),
    (["--batch", "0"], "at least 1"),
    (["--batch", "two"], "'two'"),
    (["--rounds", "-1"], "at least 1"),
    (["--budget", "nan"], "above 0"),
    (["--modes", "fast"], "'fast'"),
    (["--model", "absent"], "has no config.json"),
    (["--family", "qwen"], "'qwen'"),
    (["--family", "llava-onevision", "--preset", "13b"], "got '13b'"),
    (["--family", "llava-next", "--images", "2"], "got ['images']"),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=str)
def test_bad_input_is_named_before_anything_is_loaded(arguments, words, tmp_path, capsys):
    """By `parse`, before torch is imported."""
    whole = PHOTOGRAPH.read_bytes()
    (half := tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="2"):
        parse([str(half) if argument == "HALF" else argument for argument in arguments])
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert words in said
