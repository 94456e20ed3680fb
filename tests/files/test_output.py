# SPDX-License-Identifier: Apache-2.0
"""An output folder has one owner, who changes nothing there but what is his."""

import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from optq.errors import OutputError
from optq.files import output as files
from optq.files.output import COMPLETE, PARTIAL, RESULT, output_folder
from optq.files.ownership import LOCK, OWNER, owned


def write(output, **contents):
    with output_folder(output, "a test") as folder:
        for name, content in {"config.json": "{}", **contents}.items():
            (folder / name).write_text(content)


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


HOLDER = """
import sys, time
from pathlib import Path
from optq.files.output import output_folder
with output_folder(Path(sys.argv[1]), "a test") as folder:
    (folder / "half").write_text("half")
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to tmp_path / "out"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_second_process_is_told_who_holds_the_folder_and_a_dead_one_holds_nothing(holder, tmp_path):
    output = tmp_path / "out"
    before = tree(output)
    with pytest.raises(OutputError, match=rf"process {holder.pid} on {platform.node()} since 20.*repeat the call"):
        write(output)
    assert tree(output) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    write(output)
    assert tree(output) == {"config.json": b"{}"}


def test_a_second_call_of_the_same_process_is_refused_as_well(tmp_path):
    with owned(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()} "):
        write(tmp_path)
    write(tmp_path)  # negative control
    assert not (tmp_path / LOCK).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_lock_that_its_holder_removes_before_it_is_got_holds_nothing(tmp_path, monkeypatch):
    """Else the next call would make another, and both would write. filelock 4.3 makes another itself, 4.2 gives up."""
    import fcntl

    lock, taken = fcntl.flock, []

    def flock(file, operation):
        if operation & fcntl.LOCK_EX and not taken:
            taken.append(file)
            (tmp_path / LOCK).unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with suppress(OutputError), owned(tmp_path):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(OutputError, match="is being written by"), owned(tmp_path):
            pass
    with owned(tmp_path):
        assert taken and (tmp_path / LOCK).exists()


@pytest.mark.parametrize("said", ["", "[1]", "[" * 100_000, "\0"])
def test_a_damaged_note_of_the_last_holder_holds_nobody_up(tmp_path, said):
    (tmp_path / OWNER).write_text(said)
    write(tmp_path)
    assert tree(tmp_path) == {"config.json": b"{}"}


def test_a_token_on_the_command_line_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/quantize.py", "--token", "abcdefgh", "hf_ijklmnop", "--token=qrst"])
    with owned(tmp_path):
        assert '"quantize.py --token *** *** --token=***"' in (tmp_path / OWNER).read_text()


@pytest.mark.parametrize("name", [PARTIAL, LOCK, OWNER])
def test_nothing_is_written_through_a_link(tmp_path, name):
    target = tmp_path / "precious"
    target.mkdir() if name == PARTIAL else target.write_text("precious")
    (target / "thesis" if name == PARTIAL else target).write_text("years")
    output = tmp_path / "out"
    output.mkdir()
    (output / name).symlink_to(target)
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        write(output)
    assert tree(tmp_path) == before


def test_what_somebody_puts_into_the_folders_meanwhile_stays(tmp_path, caplog):
    output = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=r"got notes.txt from elsewhere .* nothing is overwritten"),
        output_folder(output, "a test") as folder,
    ):
        (folder / "config.json").write_text("{}")
        (folder / "notes.txt").write_text("a companion")
        (output / "notes.txt").write_text("mine")
        (output / PARTIAL / "draft").write_text("mine as well")
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "config.json").exists()
    (output / "notes.txt").unlink()
    with pytest.raises(OutputError, match="not empty"):
        write(output)
    assert (output / PARTIAL / "draft").read_text() == "mine as well"


def test_a_failure_removes_what_the_call_has_written(tmp_path):
    (tmp_path / PARTIAL / "work-0123456789abcdef").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path, "a test") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("moved", range(3))
def test_moving_the_files_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, moved):
    replace, done = os.replace, []

    def crash(old, new):
        if old.parent.name == COMPLETE:
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(old)
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, a="a", b="b")
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(OutputError, match=r"not empty: it holds a, b, config\.json"):
        write(tmp_path, a="another")
    assert tree(tmp_path) == {"a": b"a", "b": b"b", "config.json": b"{}"}


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with output_folder(tmp_path / "out", "a test") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "config.json").chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "out/config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def killed_when_complete(monkeypatch, output):
    """An output folder whose files are all complete, and have no names yet."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "reveal", interrupt)
        patch.setattr(files, "tidy", lambda *arguments: None)
        with pytest.raises(KeyboardInterrupt):
            write(output, a="a", b="b")


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["bit", "missing", "no result", "half a result"])
def test_what_is_damaged_before_it_has_its_name_is_made_again(tmp_path, monkeypatch, damage, caplog):
    killed_when_complete(monkeypatch, tmp_path)
    inside = tmp_path / PARTIAL / COMPLETE
    if damage == "bit":
        (inside / "a").write_text("c")
    elif damage == "half a result":
        (inside / RESULT).write_text((inside / RESULT).read_text()[:-9])
    else:
        (inside / (RESULT if damage == "no result" else "a")).unlink()
    if damage == "no result":  # a folder of somebody else would look like that
        with pytest.raises(OutputError, match="nothing tells which call has made it"):
            write(tmp_path, a="a")
        return
    write(tmp_path, a="another")
    assert tree(tmp_path) == {"a": b"another", "config.json": b"{}"}
    assert "is damaged" in caplog.text


def test_what_is_damaged_while_files_get_their_names_is_named(tmp_path, monkeypatch):
    killed_when_complete(monkeypatch, tmp_path)
    os.replace(tmp_path / PARTIAL / COMPLETE / "a", tmp_path / "a")
    (tmp_path / PARTIAL / COMPLETE / "b").write_text("c")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"complete.b is not what .*, a for one"):
        write(tmp_path, a="a")
    assert tree(tmp_path) == before


def test_only_what_the_call_has_made_gets_a_name(tmp_path, monkeypatch):
    killed_when_complete(monkeypatch, tmp_path)
    (tmp_path / PARTIAL / COMPLETE / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path)
    assert not (tmp_path / "notes.txt").exists()
    assert (tmp_path / "a").exists()
    assert (tmp_path / PARTIAL / COMPLETE / "notes.txt").read_text() == "mine"


def test_what_is_not_optqs_does_not_keep_it_from_tidying_up(tmp_path, caplog):
    """Negative control: its own files go."""
    (tmp_path / PARTIAL / "b").mkdir(parents=True)
    for name in "ac":
        (tmp_path / PARTIAL / name).write_text("")
    files.tidy(tmp_path / PARTIAL, [tmp_path / PARTIAL / name for name in "abc"])
    assert tree(tmp_path) == {PARTIAL: False, f"{PARTIAL}/b": False}
    assert "stays, because of what else is in there: b" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files")
@pytest.mark.parametrize("name", [LOCK, OWNER, PARTIAL, f"{PARTIAL}/{COMPLETE}", f"{PARTIAL}/{COMPLETE}/{RESULT}"])
def test_nobody_waits_for_a_pipe(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match=r"is no (regular file|folder), so it is not optq's"):
        write(tmp_path)
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "x" * 300, "a\0b", "bad\udcff", "/".join("x" * 4000)])
def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(OutputError, match=r"output_dir=.* cannot be made .* nothing was done"):
        write(tmp_path / name)
    assert tree(tmp_path) == {}


def test_a_folder_stays_the_same_wherever_the_process_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with output_folder(Path("out"), "a test") as folder:
        monkeypatch.chdir(tmp_path / "elsewhere")
        (folder / "config.json").write_text("{}")
    assert tree(tmp_path / "out") == {"config.json": b"{}"}
