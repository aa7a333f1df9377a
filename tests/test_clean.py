"""clean.py: sources, rules, deduplication, split, images, cache, resume; each promise with a test that fails when it is broken."""
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest
from PIL import Image

import clean
from conftest import command


def png(colour="red", size=(32, 24), **kwargs):
    out = io.BytesIO()
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (1, 2, 3))  # not of one colour
    image.save(out, "PNG", **kwargs)
    return out.getvalue()


def pack(path, members):
    """{name: bytes} -> a zip or tar at path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as t:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    return path


# ------------------------------------------------------------------------------------------------------------- archives

@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_archive_in_place(tmp_path, name):
    path = pack(tmp_path / name, {"b/two.png": png("blue"), "./one.PNG": png("red"), "note.txt": b"x"})
    assert clean.list_members(path) == ["b/two.png", "one.PNG"] and clean.list_members(path, (".txt",)) == ["note.txt"]
    assert clean.open_rgb(f"{path}::b/two.png").getpixel((5, 5)) == (0, 0, 255)
    assert clean.open_rgb(io.BytesIO(png("lime"))).getpixel((5, 5)) == (0, 255, 0)
    with pytest.raises(FileNotFoundError):
        clean.open_rgb(f"{path}::three.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == [name], "nothing is unpacked"


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_hostile_members(tmp_path, name):
    evil = ["../up.png", "a/../../up.png", "/etc/abs.png", "C:/win.png", "back\\slash.png", "~/home.png"]
    path = pack(tmp_path / name, {"good.png": png(), **{n: png() for n in evil}})
    assert clean.list_members(path) == ["good.png"]
    for n in evil:
        with pytest.raises(FileNotFoundError):
            clean.open_rgb(f"{path}::{n}")


def test_archive_bombs(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", {"good.png": png(), "bomb.png": bytes(1 << 22)})
    assert clean.list_members(path) == ["good.png"], "packed a thousand times smaller"
    with pytest.raises(ValueError, match="200 times"):
        clean.list_members(pack(tmp_path / "b.tgz", {"bomb.png": bytes(1 << 24), "good.png": png()}))
    monkeypatch.setattr(clean, "MAX_MEMBER", 10)
    assert clean.list_members(pack(tmp_path / "c.zip", {"large.png": png()})) == []


def test_forked_workers_read_their_own_bytes(tmp_path):
    import multiprocessing
    colours = ["red", "lime", "blue", "white"]
    path = pack(tmp_path / "a.tar", {f"{c}.png": png(c, (200, 200)) for c in colours})
    clean.open_rgb(f"{path}::red.png")  # opened in the parent
    with multiprocessing.get_context("fork").Pool(4) as pool:
        jobs = [f"{path}::{c}.png" for c in colours] * 30
        found = [i.getpixel((9, 9)) for i in pool.map(clean.open_rgb, jobs, chunksize=1)]
    assert found == [Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in colours] * 30
