import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from toy_replay import filled

from crpt.files import DiskFullError, replace_file, replace_files
from crpt.replay import DatasetFullError


def _save_torch(path):
    torch.save({"w": torch.zeros(100_000)}, path)


def _save_text(path):
    path.write_text("x" * 100_000)


@pytest.mark.parametrize("save", [_save_torch, _save_text])
def test_a_full_disk_is_named_with_the_remedy_and_the_old_file_kept(tmp_path, save):
    target = tmp_path / "file"
    target.write_text("old")

    def write(path):
        path.symlink_to("/dev/full")
        save(path)

    with pytest.raises(DiskFullError, match=r"No space left.*/file could not.*make room") as error:
        replace_file(target, write)
    assert error.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def largest_file():
    """Files of this process may have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", [_save_torch, _save_text])
def test_a_file_larger_than_the_user_may_write_is_named(tmp_path, largest_file, save):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(DiskFullError, match=r"File too large.*/file could not be written"):
        replace_file(target, save)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_dataset_larger_than_the_user_may_write_is_named(tmp_path, largest_file):
    with pytest.raises(DatasetFullError, match=r"no room for .*frames\.npy.*make room"):
        filled(tmp_path / "data", capacity=largest_file)
    assert not list(tmp_path.iterdir())


def test_another_error_of_the_writer_is_not_blamed_on_the_disk(tmp_path):
    def write(path):
        path.write_text("half")
        raise RuntimeError("[enforce fail] not this time")

    with pytest.raises(RuntimeError, match="not this time"):
        replace_file(tmp_path / "file", write)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from crpt.files import replace_file

def write(path):
    path.write_text("half of something longer")
    os.kill(os.getpid(), signal.SIGKILL)

replace_file(Path(sys.argv[1]), write)
"""


def test_what_a_kill_leaves_goes_with_the_next_write(tmp_path):
    target = tmp_path / "file"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    replace_file(target, lambda path: path.write_text("new"))
    assert os.listdir(tmp_path) == ["file"]
    assert target.read_text() == "new"


def test_files_that_belong_together_are_replaced_after_all_are_written(tmp_path):
    data, sign = tmp_path / "data", tmp_path / "sign"
    replace_files({data: lambda p: p.write_text("1"), sign: lambda p: p.write_text("1")})

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError):
        replace_files({data: lambda p: p.write_text("2"), sign: full})
    assert (data.read_text(), sign.read_text()) == ("1", "1")
    assert sorted(os.listdir(tmp_path)) == ["data", "sign"]


@pytest.mark.parametrize("replacements", [0, 1, 2])
def test_a_sign_means_files_of_one_write_wherever_it_stops(tmp_path, monkeypatch, replacements):
    data, sign = tmp_path / "data", tmp_path / "sign"
    replace_files({data: lambda p: p.write_text("1"), sign: lambda p: p.write_text("1")})
    replace, left = os.replace, [replacements]

    def stopping(*paths):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", stopping)
    expected = pytest.raises(KeyboardInterrupt) if replacements < 2 else nullcontext()
    with expected:
        replace_files({data: lambda p: p.write_text("2"), sign: lambda p: p.write_text("2")})
    assert data.read_text() == ("1" if replacements == 0 else "2")
    assert sign.exists() == (replacements == 2)
