"""Files that are whole or not there, and locks."""

import os
import subprocess
import sys

import pytest

from diffjax import files


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as file:
        file.write("Größe")
        file.flush()
        assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    assert path.read_bytes() == "Größe".encode() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "before")
    with pytest.raises(type(error)), files.replacing(path, "wb", tag="0-of-2") as file:
        file.write(b"after")
        assert (tmp_path / "a.txt.0-of-2.part").exists()
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_move_that_fails_leaves_no_other_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        files.write_text(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_rows_of_a_damaged_log_are_those_of_its_sound_lines(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    bad = [bytes(40), b"\xff\xfe", b'{"step": 1', b"[1]", b'{"loss": 1.0}', b'{"step": "1"}', b'{"step": true}']
    lines = [b'{"step": 1, "loss": 0.5}', *bad, b"", b'{"step": 2, "note": "\xc3\x9f"}']
    path.write_bytes(b"\n".join([*lines, b'{"step": 3, "lo']))
    assert files.read_rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "note": "ß"}]
    assert [r.getMessage().split(", line ")[1] for r in caplog.records] == ["2, 3, 4, 5, 6, 7, 8"]
    assert str(path) in caplog.text
    caplog.clear()
    path.write_bytes(b"\n".join([bytes(4)] * 20 + [b'{"step": 3, "loss": 1.0}']))
    assert files.read_rows(path) == [{"step": 3, "loss": 1.0}] and "7, 8 and 12 more" in caplog.text
    caplog.clear()
    path.write_bytes(b'{"step": 1}\n{"st')
    assert files.read_rows(path) == [{"step": 1}] and not caplog.records


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from diffjax import files\n"
        "with files.locked(sys.argv[1], lambda owner: SystemExit(f'taken by {owner}')): print('mine')"
    )
    other = lambda: subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], capture_output=True, text=True)
    with files.locked(tmp_path / "lock", ValueError):
        refused = other()
        assert refused.returncode == 1 and f"taken by {os.getpid()} on " in refused.stderr
    assert other().stdout == "mine\n"
    with files.locked(tmp_path / "lock", ValueError):
        pass
