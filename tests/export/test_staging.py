"""An export is there whole or not at all."""

import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.staging import CERTIFICATE, staged


def test_appears_at_the_end(tmp_path):
    target = tmp_path / "runs" / "export"
    with staged(target) as staging:
        (staging / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / CERTIFICATE).write_text("{}")
    with pytest.raises(RuntimeError, match="halfway"), staged(target) as staging:
        (staging / "file").write_text("half")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == [CERTIFICATE]


def test_an_earlier_export_is_replaced_whole(tmp_path):
    target = tmp_path / "export"
    for name in ("first", "second"):
        with staged(target) as staging:
            (staging / CERTIFICATE).write_text("{}")
            (staging / name).write_text(name)
    assert {path.name for path in target.iterdir()} == {CERTIFICATE, "second"}
    assert list(tmp_path.iterdir()) == [target]


def test_other_peoples_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an export of keras_gemma_ft"), staged(tmp_path):
        raise AssertionError("the block must not run")
    with pytest.raises(UserError, match="this is a file"), staged(tmp_path / "thesis.tex"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_unwritable_place_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="choose a directory you may write to"),
        staged(tmp_path / "file" / "below"),
    ):
        raise AssertionError("the block must not run")
