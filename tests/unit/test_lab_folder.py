"""The folder of labs: what another user of the machine may have prepared there is not used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import testbed.lab.folder
from testbed.errors import InputError, LabError
from testbed.lab.folder import claim_folder, list_labs

NOBODY = 65534


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where labs are kept in a test; it is not there yet."""
    monkeypatch.setattr(testbed.lab.folder, "state_root", lambda: tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_whatever_the_umask(state: Path, umask: int) -> None:
    """Nobody but the owner looks into a lab's folder, or makes anything beside it."""
    before = os.umask(umask)
    try:
        folder = claim_folder("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(state.stat().st_mode) & 0o022 == 0
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()


def test_a_folder_that_was_open_is_closed(state: Path) -> None:
    """Our own, made by hand with a wider mode: it is taken, and closed."""
    (state / "x").mkdir(parents=True, mode=0o755)
    folder = claim_folder("x")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()


def test_links_in_a_dead_labs_folder_are_removed_and_not_followed(state: Path, tmp_path: Path) -> None:
    """What they lead to stays as it is; a lock that is a link is refused."""
    kept = tmp_path / "kept"
    (kept / "inner").mkdir(parents=True)
    (state / "x").mkdir(parents=True, mode=0o700)
    (state / "x" / "private").symlink_to(kept)
    folder = claim_folder("x")
    assert sorted(os.listdir(folder.path)) == ["api", "lock"]
    folder.remove()
    assert (kept / "inner").is_dir()
    (state / "y").mkdir(mode=0o700)
    (state / "y" / "lock").symlink_to(kept / "made")
    with pytest.raises(testbed.errors.LabError, match="state/y/lock: Too many levels of symbolic links"):
        claim_folder("y")
    assert not (kept / "made").exists()


def test_a_folder_that_is_being_looked_at_is_not_a_running_lab(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ls` locks a new folder that it finds unlocked, and removes it: `up` waits for that, and makes another one."""
    looking = claim_folder("x")
    monkeypatch.setattr(testbed.lab.folder.time, "sleep", lambda _: looking.remove())
    folder = claim_folder("x")
    assert sorted(os.listdir(folder.path)) == ["api", "lock"]
    folder.remove()


@pytest.mark.parametrize(("record", "waits"), [("{}", False), (None, True)])
def test_a_running_lab_is_said_so(
    state: Path, monkeypatch: pytest.MonkeyPatch, record: str | None, waits: bool
) -> None:  # fmt: skip
    """At once when it has its lab.json; a moment later when it may be one that is being started."""
    now, running = 0.0, claim_folder("x")

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(testbed.lab.folder.time, "monotonic", lambda: now)
    monkeypatch.setattr(testbed.lab.folder.time, "sleep", sleep)
    if record is not None:
        (running.path / "lab.json").write_text(record)
    with pytest.raises(LabError, match="a lab named 'x' is running already"):
        claim_folder("x")
    assert (now > 0) == waits
    running.remove()


def prepare(state: Path, how: str) -> Path:
    """Do what another user may do with the folder of labs, or with the folder of lab x; return which of the two."""
    what, _, wrong = how.partition(" ")
    path = state if what == "all" else state / "x"
    path.mkdir(parents=True, mode=0o700)
    match wrong:
        case "foreign":
            os.chown(path, NOBODY, NOBODY)
        case "open":
            path.chmod(0o777)
        case "link":
            path.rename(path.with_name("elsewhere"))
            path.symlink_to(path.with_name("elsewhere"))
        case "file":
            path.rmdir()
            path.touch()
    return path


@pytest.mark.root
@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("all foreign", "belongs to user 65534"),
        ("all open", "can be written by others (its mode is 0777)"),
        ("all link", "is a link"),
        ("one foreign", "belongs to user 65534"),
        ("one open", "can be written by others (its mode is 0777)"),
        ("one link", "is a link"),
    ],
)
def test_what_somebody_else_has_prepared(state: Path, how: str, wrong: str) -> None:
    """A folder that others own, can write to, or have led elsewhere is no place for a lab's sockets: it is named."""
    path = prepare(state, how)
    with pytest.raises(InputError) as caught:
        claim_folder("x")
    expected = f"{path}, where labs are kept, {wrong}: labs would not be safe there; remove it and try again"
    assert str(caught.value) == expected
    assert os.listdir(path) == []


@pytest.mark.root
def test_a_lab_that_somebody_else_claims_to_run_is_not_ended(state: Path) -> None:
    """In a folder that all may write to, as /tmp, another's lab.json would name any process at all: it is not read."""
    state.mkdir()
    state.chmod(0o1777)
    (state / "theirs").mkdir()
    (state / "theirs" / "lab.json").write_text('{"pid": 1}')
    os.chown(state / "theirs", NOBODY, NOBODY)
    records, unreadable = list_labs()
    assert records == []
    assert unreadable["theirs"].startswith(f"{state}/theirs: it belongs to user {NOBODY}, and no lab of ours does")
    claim_folder("ours").remove()
