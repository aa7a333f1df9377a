"""clean.py: sources, rules, deduplication, split, images, cache, resume; each promise has a test that can fail."""
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clean
from conftest import ROOT, SHARED, command, needs_shared


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


# --------------------------------------------------------------------------------------------------------- the helpers

def fake_vectors(prompts, *_, **__):
    """A stand-in for the encoder where meaning does not matter: bags of words, so shared words mean a high cosine."""
    def vector(word):
        return np.random.default_rng(list(word.encode())).standard_normal(384)
    x = np.stack([np.sum([vector(w) for w in p.lower().split()], axis=0) for p in prompts])
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# how a test starts clean.py in a process of its own, without the encoder
FAKED = f"""import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]
import clean, test_clean; clean.encode_cached = test_clean.fake_vectors
"""


@pytest.fixture
def cleaned(tmp_path, monkeypatch):
    """A function that runs clean.py's main() here, without the encoder, and returns (pairs, dropped, summary)."""
    monkeypatch.setattr(clean, "encode_cached", fake_vectors)

    def cleaned(*args, out="out"):
        out = tmp_path / "data" / out
        monkeypatch.setattr("sys.argv", ["clean.py", *map(str, args), "--out", str(out), "--workers", "1"])
        clean.main()
        pairs, targets, summary = clean.read_data(out)
        assert np.abs(np.linalg.norm(targets, axis=1) - 1).max() < 1e-6
        steps = summary["funnel"]
        assert steps[-1]["left"] == len(pairs) and steps[0]["left"] == len(pairs) + sum(s["removed"] for s in steps)
        if pairs["image"].drop_nulls().len():
            for image in pairs["image"]:
                assert clean.open_rgb(out / image).mode == "RGB"
        return pairs, pl.read_parquet(out / "dropped.parquet"), summary
    return cleaned


def prompts(n, start=0):
    """Prompts that no encoder finds alike: six words of their own each."""
    words = "lemon", "river", "stone", "cloud", "piano", "tiger"
    return [" ".join(f"{w}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for w in words) for i in range(start, start + n)]


def pixel(image):
    return clean.open_rgb(image).getpixel((9, 9))


def fails(run, *args, match):
    with pytest.raises(SystemExit, match=match) as e:
        run(*args, out=f"failed{time.monotonic_ns()}")  # the failed one holds its lock as long as its traceback lives
    assert isinstance(e.value.code, str) and "\n" not in e.value.code


# -------------------------------------------------------------------------------------------------------------- sources

def diffusiondb(root, layout, large=False):
    """Parts 1 and 2 of three (large: 1 and 10001), four images each, in a layout that people have. -> their prompts"""
    parts, suffix = ([1, 10_001, 3] if large else [1, 2, 3]), "webp" if large else "png"
    rows = [{"image_name": f"{p:05d}-{i}.{suffix}", "prompt": t + ", ", "part_id": p, "width": 512, "height": 512,
             "image_nsfw": 0.1, "prompt_nsfw": 0.1}
            for k, p in enumerate(parts) for i, t in enumerate(prompts(4, 4 * k))]
    root.mkdir(parents=True)
    if layout != "json":
        table = pl.DataFrame(rows).with_columns(pl.col("part_id", "width", "height").cast(pl.UInt16))
        table.write_parquet(root / f"metadata{'-large' * large}.parquet")
    for k, p in enumerate(parts[:2]):
        mine = [r for r in rows if r["part_id"] == p]
        files = {r["image_name"]: png(["red", "lime"][k]) for r in mine}
        told = {r["image_name"]: {"p": r["prompt"], "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for r in mine}
        files[f"part-{p:06d}.json"] = json.dumps(told).encode()
        parts_at = f"diffusiondb-large-part-{1 + k}" if large else "images"
        folder = root if layout in ("beside", "flat", "json") else root / parts_at
        folder.mkdir(exist_ok=True)
        if layout in ("zips", "beside", "json"):
            pack(folder / f"part-{p:06d}.zip", files)
        else:
            folder = folder if layout == "flat" else folder / f"part-{p:06d}"
            folder.mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
    return [r["prompt"].rstrip(", ") + "," for r in rows if r["part_id"] in parts[:2]]


@pytest.mark.parametrize("layout, large", [
    ("zips", False), ("beside", False), ("unzipped", False), ("flat", False), ("json", False), ("zips", True),
    ("unzipped", True)])
def test_diffusiondb(cleaned, tmp_path, layout, large):
    wanted = diffusiondb(tmp_path / "ddb", layout, large)
    pairs, dropped, summary = cleaned(tmp_path / "ddb")
    assert pairs["prompt"].to_list() == wanted and set(pairs["source"]) == {"ddb"}
    assert dict(dropped["rule"].value_counts().rows()) == ({} if layout == "json" else {"not downloaded": 4})
    for k, image in enumerate(pairs["image"]):
        red, green, _ = pixel(tmp_path / "data/out" / image)
        assert (red > 200) == (k < 4) and (green > 200) == (k >= 4), "each prompt with its own picture"


def test_diffusiondb_flags_in_metadata(cleaned, tmp_path):
    diffusiondb(tmp_path / "ddb", "zips")
    table = pl.read_parquet(tmp_path / "ddb/metadata.parquet")
    change = {0: {"image_nsfw": 2.0}, 1: {"prompt_nsfw": 0.9}, 2: {"width": 1024}, 3: {"height": 128},
              4: {"image_nsfw": 0.9}, 5: {"image_name": "../../evil.png"}}
    rows = [{**r, **change.get(i, {})} for i, r in enumerate(table.rows(named=True))]
    pl.DataFrame(rows, schema=table.schema).write_parquet(tmp_path / "ddb/metadata.parquet")
    pairs, dropped, _ = cleaned(tmp_path / "ddb")
    assert dropped["rule"].to_list()[:4] == ["nsfw", "width or height", "width or height", "not downloaded"]
    assert len(pairs) == 4
    flags = "--max-nsfw", 0.5, "--max-prompt-nsfw", 0.5, "--min-side", 64, "--max-side", 2000
    pairs, dropped, _ = cleaned(tmp_path / "ddb", *flags, out="b")
    assert dropped["rule"].to_list()[:4] == ["nsfw", "nsfw", "nsfw", "not downloaded"]
    assert len(cleaned(tmp_path / "ddb/metadata.parquet", out="c")[0]) == 4, "the metadata file names its root"
    _, dropped, _ = cleaned(tmp_path / "ddb", "--max-nsfw", 9, out="d")
    assert dropped["rule"][0] == "nsfw", "2.0 goes whatever the threshold"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl"])
def test_tables(cleaned, tmp_path, name):
    (tmp_path / "i").mkdir()
    texts = [p + end for p, end in zip(prompts(4), ['\nnew, "line"', " NUL\0 here", " émoji 🐱", " x" * 20])]
    for i in range(4):
        (tmp_path / f"i/{i}.png").write_bytes(png())
    files = [f"i/{i}.png" for i in range(3)] + [str(tmp_path / "i/3.png")]
    table = pl.DataFrame({"Caption": texts, "file_name": files})
    write = {"csv": table.write_csv, "tsv": lambda f: table.write_csv(f, separator="\t"),
             "parquet": table.write_parquet, "jsonl": table.write_ndjson}[name[2:]]
    write(tmp_path / name)
    pairs, _, _ = cleaned(tmp_path / name)
    assert pairs["prompt"].to_list() == [" ".join(t.replace("\0", " ").split()) for t in texts]
    assert set(pairs["source"]) == {"t"}
    pairs, _, _ = cleaned(tmp_path / name, "--text-only", out="text")
    assert pairs["image"].null_count() == 4 and not list((tmp_path / "data/text/images").rglob("*.jpg"))


def comfy(text):
    return json.dumps({"3": {"class_type": "KSampler", "inputs": {"positive": ["9", 0], "negative": ["7", 0]}},
                       "9": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0]}},
                       "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad hands"}},
                       "6": {"class_type": "CLIPTextEncode", "inputs": {"text": text}}})


@pytest.mark.parametrize("key, value", [
    ("parameters", "{}, <lora:foo:0.7>\nNegative prompt: bad hands\nSteps: 20, Sampler: Euler"),
    ("parameters", "{},\nSteps: 20, Sampler: Euler"),
    ("invokeai_metadata", '{{"positive_prompt": "{},", "negative_prompt": "bad"}}'),
    ("sd-metadata", '{{"image": {{"prompt": [{{"prompt": "{},"}}]}}}}'),
    ("Dream", '"{}," -s 50 -S 1'), ("prompt", comfy("TEXT,"))])
def test_png_chunks(cleaned, tmp_path, key, value):
    from PIL.PngImagePlugin import PngInfo
    (tmp_path / "pics/deep").mkdir(parents=True)
    for i, p in enumerate(prompts(3)):
        chunk = PngInfo()
        chunk.add_text(key, value.replace("TEXT", p) if key == "prompt" else value.format(p))
        (tmp_path / f"pics/deep/{i}.png").write_bytes(png(pnginfo=chunk))
    chunk.text = None
    pairs, _, _ = cleaned(tmp_path / "pics")
    assert pairs["prompt"].to_list() == [p + "," for p in prompts(3)]


def test_hostile_png_chunks(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    ring = json.dumps({"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}})
    for value in ["{", "[" * 100_000, "null", "{}", '{"1": 3}', ring]:
        chunk = PngInfo()
        chunk.add_text("prompt", value)
        assert clean.png_prompt(io.BytesIO(png(pnginfo=chunk))) is None
    assert clean.png_prompt(io.BytesIO(b"\x89PNG nonsense")) is None


@pytest.mark.parametrize("how", ["txt", "json", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("where", ["folder", "in.zip", "in.tar", "in.tgz", "folder of tars"])
def test_places(cleaned, tmp_path, how, where):
    """Sidecars and imagefolder metadata, in folders and in every archive, give the same pairs."""
    files = {}
    for i, p in enumerate(prompts(4)):
        files[f"sub/{i}.png"] = png(["red", "blue"][i % 2])
        if how == "txt":
            files[f"sub/{i}.txt"] = f"{p}\n".encode()
        elif how == "json":
            files[f"sub/{i}.json"] = json.dumps({"caption": p, "other": [1]}).encode()
    if how.startswith("metadata"):
        table = pl.DataFrame({"file_name": [f"{i}.png" for i in range(4)], "text": prompts(4)})
        files[f"sub/{how}"] = (table.write_csv() if how.endswith("csv") else table.write_ndjson()).encode()
    files["sub/broken.json"], files["sub/readme.md"] = b"{", b"x"
    if where == "folder":
        for name, content in files.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(content)
    elif where == "folder of tars":
        (tmp_path / "in").mkdir()
        pack(tmp_path / "in/a.tar", files)
        (tmp_path / "in/b.tar").write_bytes(b"not a tar" * 1000)
    else:
        pack(tmp_path / where, files)
    pairs, _, _ = cleaned(tmp_path / (where if where.startswith("in.") else "in"))
    assert pairs["prompt"].to_list() == prompts(4) and set(pairs["source"]) == {"in"}
    assert [pixel(tmp_path / "data/out" / i)[0] > 200 for i in pairs["image"]] == [True, False, True, False]


def test_sources_are_merged_and_held_out(cleaned, tmp_path, table):
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(png())
    words = prompts(60)
    words[40] = words[0] + " extra"  # near: of the held-out source, so row 0 may not be trained on
    a = table([{"image": f"{i}.png", "prompt": words[i]} for i in range(40)], "a.csv")
    b = table([{"image": f"{i}.png", "prompt": words[i]} for i in range(40, 60)], "b.csv")
    pairs, _, summary = cleaned(a, b, "--holdout-source", "b", "--threshold", 0.99, "--val-fraction", 0.2)
    assert pairs["source"].to_list() == ["a"] * 40 + ["b"] * 20
    assert (pairs.filter(pl.col("source") == "b")["split"] == "ood").all() and pairs["split"][0] == "guard"
    assert set(pairs.filter(pl.col("source") == "a")["split"]) == {"train", "val", "guard"}
    assert summary["split"]["ood"] == 20
    fails(cleaned, a, "--holdout-source", "c", match="no such source; there are: a")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.csv").write_text(a.read_text().replace(",", ",", 1))
    pairs, _, _ = cleaned(a, tmp_path / "x/a.csv", "--text-only", out="two")
    assert pairs["source"].n_unique() == 1, "all of x/a.csv are duplicates of a.csv"


# ---------------------------------------------------------------------------------------------------------------- rules

@pytest.mark.parametrize("rule, prompt, flags", [
    ("blank", "  \t ", ()), ("blank", "NaN", ()), ("blank", None, ()), ("too short", "a red cat", ()),
    ("too short", prompts(1)[0], ("--min-words", 7)), ("too long", " ".join(f"word{i}" for i in range(71)), ()),
    ("too long", "five words are in here now", ("--max-words", 5)),
    ("too many tokens", "a red cat on a mat " + "1234567890" * 8, ()),
    ("too many tokens", prompts(1)[0], ("--max-tokens", 8)), ("characters", "рыжий кот сидит на синем столе", ()),
    ("characters", "1234 5678 !!! ... 90 90", ()), ("characters", "ééé ööö ààà ççç ñññ ååå", ("--charset", "ascii"))])
def test_text_rules(cleaned, table, rule, prompt, flags):
    good = "a red cat drinks tea" + " and three more" * ("--min-words" in flags)
    path = table([{"prompt": good}, {"prompt": prompt}])
    _, dropped, _ = cleaned(path, "--text-only", *flags)
    assert dropped["rule"].to_list() == [rule]


def test_characters_are_judged_by_their_share(cleaned, table):
    good = ["a café by the sea at night", "50 % of all (red:1.2) [cats], 8k!! by the sea",
            "naïve façade über alles in señor's house", "a cat — “so small” … by the lake"]
    path = table([{"prompt": p} for p in good])
    assert len(cleaned(path, "--text-only")[0]) == 4, "spaces, digits, marks and accents are no fault"
    path = table([{"prompt": p} for p in [*good, "рыжий кот сидит на синем столе", "一 只 红 色 的 猫"]])
    assert len(cleaned(path, "--text-only", "--charset", "any", out="any")[0]) == 6


def test_repair():
    odd = ["  a\tb \n c ", "schÃ¶n", "fish &amp; chips", "a\u200bb\u00a0c\0d", None, "ﬁne", ""]
    assert clean.repair(pl.Series("p", odd)).to_list() == ["a b c", "schön", "fish & chips", "a b cd", None, "fine", ""]


def test_clip_tokens_are_exact():
    from open_clip.tokenizer import SimpleTokenizer
    rng, tokenizer = np.random.default_rng(0), SimpleTokenizer()
    words = ("masterpiece trending on artstation, it's they'll (x:1.2) 1234 8k ultra-realistic café Ünïcödé 🐱🐶 猫 "
             "<|weird|> <END_of_text> $$$ Greg Rutkowski's 'd 've ...").split()
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, 300)]
    counts = clean.clip_tokens(pl.Series("p", texts)).to_numpy()
    exact = np.array([len(tokenizer.encode(t)) + 2 for t in texts])
    short = np.array([len(t.encode()) <= 75 for t in texts])
    assert (counts[~short] == exact[~short]).all() and (exact > 77).sum() > 30
    assert (counts[short] >= exact[short]).all() and (counts[short] <= 77).all()


# -------------------------------------------------------------------------------------------------------- deduplication

def brute(x, threshold):
    """The definition, in float64."""
    kept = []
    for i in range(len(x)):
        if all(x[j].astype(np.float64) @ x[i].astype(np.float64) < threshold for j in kept):
            kept.append(i)
    return kept


def clusters(rng, n, dim, centres, noise):
    x = rng.standard_normal((centres, dim))[rng.integers(0, centres, n)] + noise * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 150), dim=st.sampled_from([2, 3, 16]),
       centres=st.integers(1, 30), noise=st.sampled_from([0, .05, .3]),
       threshold=st.sampled_from([.5, .7, .85, .99, 1.0]), block=st.sampled_from([1, 2, 7, 64, 1024]))
def test_keep_one_is_the_definition(seed, n, dim, centres, noise, threshold, block):
    """Row for row, for any block size; two dimensions and no noise make ties at the threshold, counted in float64."""
    rng = np.random.default_rng(seed)
    x = clusters(rng, n, dim, centres, noise)
    leader, cosine = clean.keep_one(x, threshold, block)
    kept = brute(x, threshold)
    assert np.flatnonzero(leader == np.arange(n)).tolist() == kept
    gone = np.setdiff1d(np.arange(n), kept)
    assert np.isin(leader[gone], kept).all() and (leader[gone] < gone).all()
    assert np.allclose(cosine[gone], (x[gone] * x[leader[gone]]).sum(1), atol=1e-6)
    assert (cosine[gone] >= threshold - 1e-6).all()
    for i in gone:  # the nearest kept row before it, ties apart
        assert cosine[i] >= max(float(x[j] @ x[i]) for j in kept if j < i) - 1e-5


@pytest.mark.parametrize("bf16", [True, False])
def test_keep_one_sees_what_bfloat16_cannot(bf16, monkeypatch):
    """Clusters whose members are all about as far apart as the threshold: the first look alone would misjudge them."""
    monkeypatch.setattr(clean, "has_bf16", lambda device: bf16)
    x = clusters(np.random.default_rng(0), 2500, 384, 5, .53)
    leader, _ = clean.keep_one(x, .8, 64)
    kept = np.flatnonzero(leader == np.arange(len(x)))
    assert kept.tolist() == brute(x, .8) and 20 < len(kept) < 2000
    exact = x.astype(np.float64) @ x[kept].T.astype(np.float64)
    for i in np.flatnonzero(leader != np.arange(len(x))):
        assert exact[i, np.searchsorted(kept, leader[i])] >= exact[i, kept < i].max() - 1e-6


def test_keep_one_never_empties_a_cluster_and_has_no_cap():
    x = np.repeat(np.eye(3, 384, dtype=np.float32), 3000, axis=0)
    leader, _ = clean.keep_one(x, 0.85)
    assert np.unique(leader).tolist() == [0, 3000, 6000] and (np.bincount(leader)[[0, 3000, 6000]] == 3000).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 120), block=st.sampled_from([1, 5, 32, 1024]))
def test_unusable_rows_go_as_if_never_there(seed, n, block):
    rng = np.random.default_rng(seed)
    x, at, broken = clusters(rng, 40, 8, 12, .3), rng.integers(0, 40, n), rng.random(n) < .3
    chain = rng.integers(0, 25, n)  # rows of one number have equal prompts
    follow = np.array([next((j for j in range(i + 1, n) if chain[j] == chain[i]), -1) for i in range(n)])
    asked = []
    leader, _ = clean.keep_one(x, .8, block, at, follow, lambda rows: (asked.extend(rows), ~broken[rows])[1])
    found = {i for i in asked if broken[i]}  # as if these had never been in the input
    left = [i for i in range(n) if i not in found]
    first = [i for i in left if not any(chain[j] == chain[i] for j in left if j < i)]
    kept = {first[i] for i in brute(x[at[first]], .8)}
    assert {i for i in range(n) if leader[i] == i} == kept and {i for i in range(n) if leader[i] >= 0} == set(first)
    assert not broken[list(kept)].any() and set(asked) >= kept | found


def at_the_threshold(n, threshold):
    """Unit vectors around n / 8 centres, most at the threshold to theirs, within what float32 cannot tell. (n, 384)"""
    rng = np.random.default_rng(0)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    centres = unit(rng.standard_normal((n // 8, 384)))
    centre, away = centres[rng.integers(0, n // 8, n)], rng.standard_normal((n, 384))
    away = unit(away - (away * centre).sum(1, keepdims=True) * centre)
    cosine = threshold + rng.uniform(-3e-7, 3e-7, (n, 1))
    x = cosine * centre + np.sqrt(1 - cosine ** 2) * away
    x[:n // 8] = centres
    return unit(x).astype(np.float32)


def test_thread_count_changes_nothing(tmp_path):
    """On vectors whose float32 cosines fall on either side of the threshold by chance: with two threads BLAS adds up in
    another order, so the raw products differ, and still the leaders and their cosines are the same."""
    code = FAKED + """import numpy as np, faiss, torch
threads, path = int(sys.argv[1]), sys.argv[2]
faiss.omp_set_num_threads(threads), torch.set_num_threads(threads)
x = test_clean.at_the_threshold(3000, .85)
leader, cosine = clean.keep_one(x, .85)
np.savez(path, leader=leader, cosine=cosine, products=x @ x.T)"""
    found = []
    for n in "1", "2":
        env = {**os.environ, **{f"{library}_NUM_THREADS": n for library in ("OMP", "OPENBLAS", "MKL")}}
        subprocess.run([sys.executable, "-c", code, n, str(tmp_path / n)], check=True, capture_output=True, env=env)
        found.append(np.load(tmp_path / f"{n}.npz"))
    one, two = found
    assert (one["leader"] == two["leader"]).all() and (one["cosine"] == two["cosine"]).all()
    assert (abs(one["products"] - .85) < 4e-7).sum() > 2000, "many pairs near the threshold"
    if (one["products"] == two["products"]).all():
        pytest.skip("one thread and two add up alike here, so this showed nothing")


def test_killed_search_goes_on(tmp_path, monkeypatch):
    """What was searched is not searched again; another threshold, or another row kept before, is another search."""
    x, calls, real, dies = clusters(np.random.default_rng(0), 600, 16, 200, .1), [], clean.Kept.candidates, 6

    def candidates(self, b):
        calls.append(len(b))
        if len(calls) == dies:
            raise KeyboardInterrupt
        return real(self, b)
    whole = clean.keep_one(x, .8, 50)
    monkeypatch.setattr(clean.Kept, "candidates", candidates)
    with pytest.raises(KeyboardInterrupt):
        clean.keep_one(x, .8, 50, journal=clean.Journal(tmp_path / "j"))
    dies, calls[:] = 0, []
    again = clean.keep_one(x, .8, 50, journal=clean.Journal(tmp_path / "j"))
    assert len(calls) == 12 - 5 and all((a == b).all() for a, b in zip(whole, again))
    calls.clear()
    clean.keep_one(x, .7, 50, journal=clean.Journal(tmp_path / "j"))
    assert len(calls) == 12
    calls.clear()
    clean.keep_one(x, .8, 50, usable=lambda rows: rows > 0, journal=clean.Journal(tmp_path / "j"))
    assert len(calls) == 12
    (tmp_path / "j").write_bytes(b"no database" * 1000)
    assert (clean.keep_one(x, .8, 50, journal=clean.Journal(tmp_path / "j"))[0] == whole[0]).all()


def test_split_never_leaks():
    rng = np.random.default_rng(0)
    x = clusters(rng, 800, 16, 300, .35)
    ood = rng.random(800) < .1
    for seed in range(3):
        group, split = clean.split_groups(x, .1, seed, ood)
        g = x @ x.T
        assert g[split == "train"][:, (split == "val") | (split == "ood")].max() < clean.GROUP_THRESHOLD
        assert ((split == "ood") == ood).all() and 0 < (split == "val").sum() <= round(.1 * (~ood).sum())
        for k in np.unique(group[split == "val"]):
            assert set(split[group == k]) == {"val"}
        held, guards = (split == "val") | (split == "ood"), split == "guard"
        assert (g[guards][:, held].max(1) >= clean.GROUP_THRESHOLD).all(), "no row is set aside without a reason"


def test_exclude_keep_and_report(cleaned, table, tmp_path, capsys):
    a, b, c, d = prompts(4)
    path = table([{"prompt": p} for p in [a, a + " extra", b, c, c.upper() + "!", d]])
    pairs, dropped, _ = cleaned(path, "--text-only")
    assert pairs["prompt"].to_list() == [a, b, c, d]
    assert dropped["rule"].to_list() == ["near-duplicate", "exact duplicate"] and dropped["cosine"][0] > .85
    assert dropped["kept"].to_list() == [0, 2] and dropped["kept_prompt"].to_list() == [a, c]
    pairs, dropped, _ = cleaned(path, "--text-only", "--keep", "longest", out="longest")
    assert pairs["prompt"].to_list() == [a + " extra", b, c.upper() + "!", d] and dropped["kept"].to_list() == [0, 2]
    avoid = table([{"prompt": b + " words"}], "eval.csv")
    pairs, dropped, _ = cleaned(path, "--text-only", "--exclude", avoid, out="exclude")
    assert b not in pairs["prompt"] and len(pairs) == 3
    assert dropped.filter(pl.col("rule") == "excluded")["cosine"].item() > .7
    flags = "--text-only", "--exclude", avoid, "--exclude-threshold", .99
    assert b in cleaned(path, *flags, out="exclude2")[0]["prompt"]
    capsys.readouterr()
    with pytest.raises(SystemExit):  # nothing is written, so read_data finds nothing
        cleaned(path, "--text-only", "--threshold-report", out="report")
    report = capsys.readouterr().out
    assert "0.85          4   <-" in report and "0.95          5" in report and repr(a + " extra") in report
    assert not (tmp_path / "data/report").exists()


def test_per_prompt(cleaned, table, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(["red", "lime", "blue", "white"][i % 4]) if i != 1 else b"broken")
    a, b = prompts(2)
    words = a, a + "!", a.upper(), a, a + " extra", b, b, a
    path = table([{"image": f"{i}.png", "prompt": p} for i, p in enumerate(words)])
    pairs, dropped, _ = cleaned(path, "--per-prompt", 3)
    assert [os.path.basename(o) for o in pairs["origin"]] == ["0.png", "2.png", "3.png", "5.png", "6.png"]
    assert pairs["prompt"].to_list() == [a] * 3 + [b] * 2
    assert dropped["rule"].to_list() == ["image unreadable", "near-duplicate", "exact duplicate"]
    assert dropped["kept"].to_list() == [None, 0, 0]
    pairs, _, _ = cleaned(path, "--per-prompt", 3, "--text-only", out="text")
    assert len(pairs) == 2, "without pictures there is nothing to keep more of"
    pairs, dropped, _ = cleaned(path, out="one")
    assert [os.path.basename(o) for o in pairs["origin"]] == ["0.png", "5.png"]


# --------------------------------------------------------------------------------------------------------------- images

def test_image_rules(cleaned, table, tmp_path):
    files = {"cut.png": png()[:60], "page.png": b"<html>", "plain.png": None, "bomb.bmp": None, "late.png": png()}
    for name, content in files.items():
        if content:
            (tmp_path / name).write_bytes(content)
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "plain.png")
    import struct
    (tmp_path / "bomb.bmp").write_bytes(struct.pack("<2sIIIIIIHH24x", b"BM", 54, 0, 54, 40, 60_000, 60_000, 1, 24))
    words = prompts(6)
    names = "cut.png", "page.png", "plain.png", "bomb.bmp", "none.png"
    path = table([{"image": n, "prompt": w} for n, w in zip(names, words)]
                 + [{"image": "late.png", "prompt": words[0]}, {"image": "", "prompt": words[5]}])
    pairs, dropped, _ = cleaned(path)
    assert dropped["rule"].to_list() == ["image unreadable", "image unreadable", "image blank", "image too large",
                                         "image missing", "image missing"]
    assert pairs["prompt"].to_list() == [words[0]], "a prompt is not lost to a broken picture where another is good"
    fails(cleaned, table([{"image": "none.png", "prompt": w} for w in words], "gone.csv"), match="image missing: 6")
    fails(cleaned, table([{"image": "page.png", "prompt": w} for w in words], "bad.csv"), match="image unreadable")


def test_stored_images(cleaned, table, tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 80).reshape(64, 80).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (500, 700), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    image = Image.open(tmp_path / "clear.png")
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.save(tmp_path / "clear.png")
    path = table([{"image": n, "prompt": p} for n, p in zip(["deep.png", "clear.png"], prompts(2))])
    pairs, _, _ = cleaned(path, "--size", 100)
    deep, clear = (clean.open_rgb(tmp_path / "data/out" / i) for i in pairs["image"])
    assert deep.size == (80, 64) and clear.size == (100, 140)
    assert pairs.select("width", "height").rows() == [(80, 64), (500, 700)]
    assert clear.getpixel((50, 70)) == (255, 255, 255), "alpha on white"
    assert 100 < np.asarray(deep).mean() < 150, "16 bits are scaled, not clipped"
    pairs, _, _ = cleaned(path, "--link", out="linked")
    assert all((tmp_path / "data/linked" / i).is_symlink() for i in pairs["image"])
    assert pairs["image"][0].endswith(".png")
    path = pack(tmp_path / "z.zip", {"a.png": png(), "a.txt": prompts(1)[0].encode()})
    fails(cleaned, path, "--link", match="--link")


# ----------------------------------------------------------------------------------------------- encoding and its cache

@needs_shared
def test_encoder_is_the_competitions():
    """The oracle: the true embeddings of the seven public prompts, to 1e-6."""
    table = clean.read_table(SHARED / "kaggle7/prompts.csv")
    submission = pl.read_csv(SHARED / "kaggle7/sample_submission.csv")
    true = submission["val"].to_numpy().reshape(-1, 384)
    ids = submission["imgId_eId"].str.replace(r"_\d+$", "").unique(maintain_order=True).to_list()
    x = clean.encode(table["prompt"], clean.load_encoder()[0])
    order = [next(i for i, p in enumerate(table["image"]) if Path(p).stem == k) for k in ids]
    assert np.abs(x[order] - true).max() < 1e-6


def test_encode_cache(tmp_path, monkeypatch):
    """Each distinct prompt once, ever; a kill costs one chunk; the bytes are those of a run that was never stopped."""
    monkeypatch.setattr(clean, "CHUNK", 8)
    words = prompts(30) + prompts(5) + ["", "a cat"]
    calls, real = [], clean.encode
    monkeypatch.setattr(clean, "encode", lambda p, *a: (calls.append(list(p)), real(p, *a))[1])
    whole = clean.encode_cached(words, cache=tmp_path / "whole")
    assert whole.dtype == np.float32 and (whole[30:35] == whole[:5]).all()
    assert sorted(sum(calls, [])) == sorted(set(words)) and len(calls) == 4
    lengths = [len(p) for p in sum(calls, [])]
    assert lengths == sorted(lengths, reverse=True), "one length-sorted pass"

    def die(p, *a):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(list(p))
        return real(p, *a)
    monkeypatch.setattr(clean, "encode", die)
    with pytest.raises(KeyboardInterrupt):
        clean.encode_cached(words, cache=tmp_path / "killed")
    done = calls[4:]
    monkeypatch.setattr(clean, "encode", lambda p, *a: (calls.append(list(p)), real(p, *a))[1])
    again = clean.encode_cached(words, cache=tmp_path / "killed")
    assert (again == whole).all() and len(calls) == 8 and not set(sum(calls[6:], [])) & set(sum(done, []))
    monkeypatch.setattr(clean, "load_encoder", lambda *a: pytest.fail("nothing is new"))
    assert (clean.encode_cached(words[::-1], cache=tmp_path / "killed") == whole[::-1]).all()
    assert clean.encode_cached([], cache=tmp_path / "killed").shape == (0, 384)


def test_damaged_cache_is_ignored(tmp_path, capsys):
    words = prompts(3)
    x = clean.encode_cached(words, cache=tmp_path)
    shard = next(tmp_path.rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:-700])
    assert (clean.encode_cached(words, cache=tmp_path) == x).all() and "damaged" in capsys.readouterr().err
    np.savez(shard, keys=np.array([{}], object), x=x)  # a pickle is never opened
    assert (clean.encode_cached(words, cache=tmp_path) == x).all()


def test_encode_precision(tmp_path):
    words = prompts(16)
    a, b = (clean.encode_cached(words, precision=p, cache=tmp_path) for p in ("fp32", "bf16"))
    assert (a != b).any() and (1 - (a * b).sum(1)).max() < 1e-3 and np.abs(np.linalg.norm(b, axis=1) - 1).max() < 1e-6


# --------------------------------------------------------------------------------------------- the command and its demo

def hashes(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".log", "summary.json")]
    return {p.relative_to(folder).as_posix(): clean.sha256(p) for p in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, command("clean.py", "--out", out).stdout


def test_demo_loses_exactly_its_dirt(demo):
    """Rule by rule: what was planted goes, for the reason it was planted, and nothing else does."""
    out, printed = demo
    raw = pl.read_csv(out.with_name("demo-raw") / "prompts.csv", infer_schema=False)
    pairs, _, summary = clean.read_data(out)
    gone = pl.read_parquet(out / "dropped.parquet").select(pl.col("image").str.extract(r"(images/[^/]*)$"), "rule")
    seen = raw.join(gone, on="image", how="left")
    planted = pl.when(~pl.col("dirt").str.starts_with("("), pl.col("dirt") != "").then("dirt")
    assert seen.filter(planted.ne_missing(pl.col("rule"))).rows() == []
    assert set(gone["rule"]) == set(clean.RULES) - {"not downloaded", "width or height", "nsfw", "excluded"}
    assert {"(rgba)", "(palette)", "(grey)", "(wrong extension)"} < set(raw["dirt"])
    assert len(raw) >= 6000 and len(pairs) >= 3500 and summary["split"]["guard"] < .25 * len(pairs)
    assert "near-duplicate" in printed
    with Image.open(out / "funnel.png") as f:
        f.load()


def test_demo_is_distinguishable(demo):
    """No two scenes and no two styles look alike: the same things drawn otherwise differ clearly."""
    import random
    from matplotlib import get_data_path
    from PIL import ImageFont
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 20)
    things = [("★", "red", "large"), ("♞", "blue", "small")]

    def draw(scene, style):
        return np.asarray(clean.draw_picture(things, "above", scene, style, 80, random.Random(0), font), float)
    for kind in ([draw(s, "flat vector art") for s in clean.SCENES], [draw("a brick wall", s) for s in clean.STYLES]):
        assert min(np.abs(a - b).mean() for i, a in enumerate(kind) for b in kind[:i]) > 5


def test_split_of_the_demo_does_not_leak(demo):
    pairs, x, summary = clean.read_data(demo[0])
    split = pairs["split"].to_numpy()
    worst = float((x[split == "train"] @ x[split == "val"].T).max())
    assert worst < .7 and abs(worst - summary["max_train_val_cosine"]) < 1e-5
    for side in pairs.filter(pl.col("split") != "guard").group_by("group").agg(pl.col("split").unique())["split"]:
        assert len(side) == 1


def test_bytes_are_reproducible(tmp_path, monkeypatch):
    for name, workers in (("a", 1), ("b", 3)):
        clean.draw_demo(tmp_path / name / "demo-raw", rows=90, dirt=96)
        monkeypatch.setattr("sys.argv", ["clean.py", "--out", str(tmp_path / name / "demo"), "--workers", str(workers)])
        clean.main()
    assert hashes(tmp_path / "a/demo-raw") == hashes(tmp_path / "b/demo-raw")
    a, b = hashes(tmp_path / "a/demo"), hashes(tmp_path / "b/demo")
    for table in "pairs.parquet", "dropped.parquet":  # these name the folder
        a.pop(table), b.pop(table)
    assert a == b and len(a) > 80
    clean.draw_demo(tmp_path / "c", rows=90, dirt=96, seed=1)
    assert hashes(tmp_path / "a/demo-raw") != hashes(tmp_path / "c")


def test_bad_input_is_one_line(raw, tmp_path, table):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("image,prompt\n")
    (tmp_path / "lie.parquet").write_text("PAR1 no")
    (tmp_path / "lie.zip").write_text("PK no")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    good = raw / "prompts.csv"
    for args, words in [
            (["none.csv"], "no such file"), ([tmp_path / "empty.csv"], "not a readable table"),
            ([tmp_path / "head.csv"], "no rows"), ([tmp_path / "lie.parquet"], "not a readable"),
            ([tmp_path / "lie.zip"], "not a readable archive"), ([tmp_path / "hollow"], "no image"),
            ([table([{"a": "b"}])], "no prompt column"), ([good, "--prompt-col", "words"], "no column 'words'"),
            ([table([{"prompt": "b"}], "p.csv")], "--text-only"), ([good, "--threshold", "0"], "--threshold"),
            ([good, "--min-words", "9", "--max-words", "3"], "--min-words"),
            ([good, "--val-fraction", "1"], "--val-fraction"), ([good, "--out", tmp_path / "full"], "--overwrite"),
            ([good, "--text-model", tmp_path / "hollow"], "model.safetensors"),
            ([good, "--min-words", "60"], "too short"), (["--download", "3m:1"], "2m:1-20"),
            (["--download", "2m:0-5"], "1 to 2000"), ([good, "--exclude", "none.csv"], "no such file")]:
        done = command("clean.py", *args, *([] if "--out" in args else ["--out", tmp_path / "out"]), ok=False)
        assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, (args, done.stderr)
    assert (tmp_path / "full/mine.txt").read_text() == "mine" and not (tmp_path / "out").exists()


def test_import_is_silent_and_help_shows_defaults():
    slow = "torch", "faiss", "open_clip", "sentence_transformers", "matplotlib", "diffusers"
    code = f"import sys, clean; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n" and done.stderr == ""
    printed = " ".join(command("clean.py", "--help").stdout.split())
    args = vars(clean.parse_args([]))
    for flag in args:
        assert flag == "input" or f"--{flag.replace('_', '-')}" in printed
    assert "(default: 0.85)" in printed and "%(default)" not in printed


# ---------------------------------------------------------------------------------------------------- resume and disks

@pytest.fixture
def world(raw, tmp_path):
    """The 200 drawn pairs several times over, 600 rows of distinct prompts, so that a run takes a while. -> table"""
    rows = pl.read_csv(raw / "prompts.csv", infer_schema=False)["image"].to_list()
    images = [str(raw / rows[i % len(rows)]) for i in range(600)]
    pl.DataFrame({"image": images, "prompt": prompts(600)}).write_csv(tmp_path / "world.csv")
    return tmp_path / "world.csv"


def test_killed_and_resumed_is_the_same(world, tmp_path, monkeypatch):
    """kill -9 while images are written: the same command ends in the same bytes and makes no finished picture again."""
    monkeypatch.setattr(clean, "encode_cached", fake_vectors)

    def run(out, kill=None):
        flags = [world, "--out", tmp_path / out, "--workers", 2, "--val-fraction", .2, "--threshold", .8]
        p = subprocess.Popen([sys.executable, "-c", FAKED + "clean.main()", *map(str, flags)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        if kill is None:
            printed = p.communicate(timeout=600)[0]
            assert p.returncode == 0, printed
            return
        log = tmp_path / f"{out}.partial/images/.log"
        while p.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= kill):
            time.sleep(.005)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        with open(log, "ab") as f:
            f.write(b'{"source": "torn')
    run("whole")
    run("killed", 250)  # the 200 pictures once, and some of them for a second row
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed.partial/images").rglob("*.jpg")}
    logged = (tmp_path / "killed.partial/images/.log").read_text().count('"sha"')
    assert 250 <= logged < 600 and not (tmp_path / "killed").exists()
    run("killed", logged + 60)
    run("killed")
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "killed") and not (tmp_path / "killed.partial").exists()
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed/images").rglob("*.jpg")}
    again = [n for n in made if n in now and now[n] != made[n]]
    assert len(again) <= len(made) - logged + 32, "only what was not in the log is made again"


@pytest.mark.parametrize("changed, order", [(range(6), [*range(6, 12), *range(6)]), (range(6, 12), range(6, 12))])
def test_leftovers_of_another_order_are_no_mixup(cleaned, table, tmp_path, monkeypatch, changed, order):
    """Row 3 of the killed run is row 5 of this one: every picture still belongs to its prompt, even where a second kill
    comes amid the overwriting, be the picture that was overwritten used elsewhere by then or not."""
    colours = [(i * 20, 255 - i * 20, 40) for i in range(12)]
    for i, c in enumerate(colours):
        (tmp_path / f"{i}.png").write_bytes(png(c))
    rows = [{"image": f"{i}.png", "prompt": p} for i, p in enumerate(prompts(12))]
    with monkeypatch.context() as m:
        m.setattr(clean, "draw_funnel", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cleaned(table(rows))
    real, made = clean.keep_image, []

    def dies(job):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(real(job))  # the file is there, its line in the log is not
        if len(made) == 5:
            raise KeyboardInterrupt
        return made[-1]
    with monkeypatch.context() as m:
        m.setattr(clean, "keep_image", dies)
        for i in changed:
            (tmp_path / f"{i}.png").write_bytes(png(colours[i], (40, 40)))
        with pytest.raises(KeyboardInterrupt):
            cleaned(table([rows[i] for i in order]))
    pairs, _, _ = cleaned(table(rows[3:] + rows[:3]))
    for image, prompt in pairs.select("image", "prompt").rows():
        wanted = colours[prompts(12).index(prompt)]
        assert np.abs(np.subtract(pixel(tmp_path / "data/out" / image), wanted)).max() < 12


def test_changed_flag_redoes_only_its_stage(cleaned, world, tmp_path, monkeypatch):
    cleaned(world)
    made = []
    monkeypatch.setattr(clean, "keep_image", lambda job: made.append(job))
    pairs, _, _ = cleaned(world, "--overwrite", "--min-words", 6, "--val-fraction", .3)
    assert len(pairs) == 600 and made == [], "no picture is decoded again"
    with pytest.raises(TypeError):
        cleaned(world, "--overwrite", "--size", 20)
    assert len(made) == 1, "another size makes them again"


def test_changed_picture_is_made_again(cleaned, table, tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    path = table([{"image": "a.png", "prompt": prompts(1)[0]}])
    cleaned(path)
    (tmp_path / "a.png").write_bytes(png("blue", (50, 50)))
    pairs, _, _ = cleaned(path, "--overwrite")
    assert pixel(tmp_path / "data/out" / pairs["image"][0])[2] > 200 and pairs["width"].item() == 50


def test_second_process_gets_one_line(cleaned, world, tmp_path):
    lock = clean.alone(tmp_path / "data/.cache/out.lock")
    with pytest.raises(SystemExit, match="another clean.py"):
        cleaned(world)
    lock.close()
    cleaned(world)


@pytest.mark.parametrize("flags, limit", [([], 200_000), ([], 20_000), (["--text-only"], 6_000)])
def test_full_disk_leaves_nothing_half_written(world, tmp_path, flags, limit):
    """A file size limit stands in for a full disk: one line, the old folder as it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); clean.run(clean.main)"
    flags = [world, "--out", tmp_path / "out", "--overwrite", "--workers", "1", *flags]
    done = subprocess.run([sys.executable, "-c", FAKED + code, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "File too large" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old.txt"]
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))


@pytest.mark.parametrize("where", ["the parent of --out", "OUT.partial"])
def test_permission_denied_is_one_line(table, tmp_path, where):
    """A folder that refuses to be written, at once or after the encoding: one line, nothing new there, the old --out as
    it was. Modes do not stop root, who is refused in sysfs."""
    closed = tmp_path / "closed" if os.geteuid() else Path("/sys/kernel")
    if os.geteuid():
        closed.mkdir(mode=0o500)
    try:
        (closed / "probe").mkdir()
    except OSError as e:
        refusal, before = e.strerror, sorted(closed.iterdir())
    else:
        (closed / "probe").rmdir()
        pytest.skip(f"{closed} lets itself be written by this user, so there is nothing to be refused")
    out = closed / "out"
    if where == "OUT.partial":
        out = tmp_path / "out"
        (tmp_path / "out.partial").symlink_to(closed)
        out.mkdir()
        (out / "old.txt").write_text("old")
    path = table([{"prompt": p} for p in prompts(3)])
    done = command("clean.py", path, "--text-only", "--overwrite", "--out", out, ok=False)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"clean.py: {out.parent}"), done.stderr
    assert refusal in done.stderr and "wrote" not in done.stdout
    assert sorted(closed.iterdir()) == before and not list(tmp_path.rglob("*.tmp"))
    assert where != "OUT.partial" or [p.name for p in out.iterdir()] == ["old.txt"]


# ------------------------------------------------------------------------------------ download, many ranks, generation

class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub for one dataset repository: HEAD and ranged GET of resolve/; the first transfer of `cut` breaks
    off half-way."""
    files, log, cut = {}, [], None

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = self.path.split("?")[0]
        name = path.partition("/resolve/main/")[2]
        commit = "0123456789abcdef0123456789abcdef01234567"
        name = name or path.partition(f"/resolve/{commit}/")[2]
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, spans = self.files[name], self.headers.get("Range", "")
        start = int(re.match(r"bytes=(\d+)-", spans)[1]) if spans else 0
        self.send_response(206 if spans else 200)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
                   "Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
        if spans:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            Hub.log.append((name, start))
            if name == Hub.cut:
                Hub.cut = None
                self.wfile.write(content[start:start + (len(content) - start) // 2])
                self.wfile.flush()
                self.connection.close()
            else:
                self.wfile.write(content[start:])


def test_download(tmp_path, monkeypatch):
    """Parts and metadata from a local server that speaks the hub's protocol, one transfer cut off; then nothing is
    fetched twice."""
    diffusiondb(tmp_path / "ddb", "zips")
    with zipfile.ZipFile(tmp_path / "ddb/images/part-000002.zip", "a") as z:
        z.writestr("noise.bin", os.urandom(30 << 20))  # the hub's client writes by 10 MB
    files = [p for p in (tmp_path / "ddb").rglob("*") if p.is_file()]
    Hub.files = {p.relative_to(tmp_path / "ddb").as_posix(): p.read_bytes() for p in files}
    Hub.files = {f"datasets/poloclub/diffusiondb/{n}": c for n, c in Hub.files.items()} | Hub.files
    Hub.cut, Hub.log = "images/part-000002.zip", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    flags, root = ["--download", "2m:1-2", "--out", tmp_path / "data/ddb"], tmp_path / "data/diffusiondb-2m"
    try:
        done = command("clean.py", *flags, "--val-fraction", .3, env=env)
        files = [p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts]
        got = {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
        assert got == {n: c for n, c in Hub.files.items() if not n.startswith("datasets")} and Hub.cut is None
        starts = [s for n, s in Hub.log if n == "images/part-000002.zip"]
        assert starts[-1] > 0, "what was interrupted goes on where it stopped"
        assert "-4" in done.stdout and len(clean.read_data(tmp_path / "data/ddb")[0]) == 8
        fetched = len(Hub.log)
        command("clean.py", *flags, "--overwrite", "--val-fraction", .3, env=env)
        assert len(Hub.log) == fetched
        done = command("clean.py", "--download", "2m:1900", "--out", tmp_path / "data/none", env=env, ok=False)
        assert "2m:1900" in done.stderr.splitlines()[-1]
    finally:
        server.shutdown()


def test_two_ranks_give_the_same_bytes(raw, tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import clean; clean.CHUNK = 32; clean.main()"
    (tmp_path / "go.py").write_text(script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launch in (("one", []), ("two", torchrun)):
        flags = [raw / "prompts.csv", "--out", tmp_path / name / "out", "--val-fraction", ".2", "--workers", "1"]
        done = subprocess.run([sys.executable, *launch, *map(str, [tmp_path / "go.py", ROOT, *flags])],
                              capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1, "rank 0 alone speaks and writes"
    assert hashes(tmp_path / "one/out") == hashes(tmp_path / "two/out")
    shards = [sorted(p.name for p in (tmp_path / n / ".cache").rglob("*.npz")) for n in ("one", "two")]
    assert shards[0] == shards[1] and len(shards[0]) == 7


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A Stable Diffusion of random weights, small enough for a test, saved to a folder."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    from open_clip.tokenizer import SimpleTokenizer
    t = SimpleTokenizer()
    own = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {own.get(k, k): v for k, v in t.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = [" ".join(m) for m, _ in sorted(t.bpe_ranks.items(), key=lambda m: m[1])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(
        block_out_channels=[4, 8], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=2)
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=49408,
        projection_dim=16))
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return folder / "pipe"


def test_generation(cleaned, pipeline, table, tmp_path, monkeypatch):
    (tmp_path / "own.png").write_bytes(png())
    path = table([{"image": "own.png" if i == 1 else "", "prompt": p} for i, p in enumerate(prompts(6))])
    flags = [path, "--generate", pipeline, "--gen-steps", 2, "--gen-batch-size", 2, "--val-fraction", .3]
    pairs, _, _ = cleaned(*flags, out="whole")
    assert pairs["prompt"].to_list() == prompts(6) and pairs["origin"].null_count() == 5
    whole = hashes(tmp_path / "data/whole")
    assert len({whole[i] for i in pairs["image"]}) == 6, "each prompt its own picture"
    real, made = clean.store_image, []

    def dies(*a, **k):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(a)
        return real(*a, **k)
    monkeypatch.setattr(clean, "store_image", dies)
    with pytest.raises(KeyboardInterrupt):
        cleaned(*flags, out="killed")
    monkeypatch.setattr(clean, "store_image", lambda *a, **k: (made.append(a), real(*a, **k))[1])
    cleaned(*flags, out="killed")
    assert hashes(tmp_path / "data/killed") == whole and len(made) <= 4 + 4, "only the unfinished batches are drawn"
    pairs, _, _ = cleaned(*flags, "--no-gen-seed-per-prompt", out="fixed")
    assert hashes(tmp_path / "data/fixed")[pairs["image"][0]] != whole[pairs["image"][0]]
    fails(cleaned, path, "--generate", tmp_path, match="cannot be loaded")


def test_generation_without_diffusers(cleaned, table, monkeypatch):
    monkeypatch.setattr(clean.importlib.util, "find_spec", lambda name: None)
    fails(cleaned, table([{"prompt": "a"}]), "--generate", "x", match="pip install diffusers")
