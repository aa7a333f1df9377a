"""clean.py: archives, images, sources, rules, encoding, deduplication, split, interruption; one test for a promise."""
import bz2
import gzip
import http.server
import io
import json
import lzma
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clean
import demo
from conftest import ODD_NAME, ROOT, SHARED, chart_texts, command, needs_shared, png, put, unit


def prompts(n):  # six words of their own each, so no encoder finds them alike
    words = "lemon", "river", "stone", "cloud", "piano", "tiger"
    return [" ".join(f"{w}{chr(97 + i // 26)}{chr(97 + i % 26)}" for w in words) for i in range(n)]


def write_pairs(folder, n, size=(32, 24)):  # n images, each of its own colour -> the path of a table of them
    table = pl.DataFrame({"image": [f"{i}.png" for i in range(n)], "prompt": prompts(n)}).write_csv().encode()
    return put(folder, {f"{i}.png": png(i * 0x10305, size) for i in range(n)} | {"pairs.csv": table}) / "pairs.csv"


def pixel(image):
    return clean.open_rgb(image).getpixel((9, 9))


def npy(x):
    np.save(out := io.BytesIO(), x)
    return out.getvalue()


def parquet(table):
    table.write_parquet(out := io.BytesIO())
    return out.getvalue()


def hashes(folder):  # of every file but caches, locks, and summary.json, which holds --out
    files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return {f: clean.sha256(folder / f) for f in files if not re.search(r"\.cache/|log\.jsonl|summary\.json|funnel|\.lock", f)}


def bag_of_words(prompts, *_):  # in place of the encoder: prompts that share words have a high cosine
    words = [[np.random.default_rng(list(w.encode())).standard_normal(384) for w in p.split()] for p in prompts]
    return unit(np.stack([np.sum(w, axis=0) for w in words]))


@pytest.fixture
def cleaned(tmp_path, monkeypatch):
    """A function that runs clean.py's main() in this process, with bag_of_words -> pairs, dropped, summary."""
    monkeypatch.setattr(clean, "load_encoder", lambda *_: (mock.Mock(), {}))
    monkeypatch.setattr(clean, "encode", bag_of_words)

    def cleaned(*args, out="out"):
        out = tmp_path / "data" / out
        monkeypatch.setattr("sys.argv", ["clean.py", "--workers", "1", "--out", str(out), *map(str, args)])
        clean.main()
        pairs, targets, summary = clean.read_data(out)
        assert np.abs(np.linalg.norm(targets, axis=1) - 1).max() < 1e-6
        return pairs, pl.read_parquet(out / "dropped.parquet"), summary
    return cleaned


def fails(run, *args, match="", error=SystemExit, **kwargs):  # pytest.raises would keep the lock on --out alive
    try:
        run(*args, **kwargs)
    except error as e:
        assert re.search(match, str(e)) and (error is not SystemExit or "\n" not in str(e)), str(e)
    else:
        pytest.fail(f"{args} did not fail")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_archives_are_read_in_place(tmp_path, name):
    evil = ["../up.png", "a/../../up.png", "/etc/abs.png", "C:/win.png", "back\\slash.png", "~/home.png"]
    files = {"b/two.png": os.urandom(200_000), "./one.png": os.urandom(200_000)}
    path = put(tmp_path / name, {**files, **dict.fromkeys(evil, png())})
    images = clean.read_source(path)["image"].to_list()
    assert images == [f"{path}::b/two.png", f"{path}::one.png"]
    with multiprocessing.get_context("fork").Pool(3) as pool:  # they must not share the file position of this process
        found = pool.map(clean.open_bytes, images * 40, chunksize=1)
    assert [file.read() for file in found] == [*files.values()] * 40
    for member in ["three.png", *evil]:
        with pytest.raises(FileNotFoundError):
            clean.open_bytes(f"{path}::{member}")
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing is unpacked"


def test_archive_bombs(tmp_path, monkeypatch):
    def names(name, files):
        return clean.open_archive(str(put(tmp_path / name, files)), os.getpid())[1]
    assert names("a.zip", {"good.png": png(), "bomb.png": bytes(1 << 22)}) == ["good.png"]
    put(tmp_path / "a.lzma.zip", {"a.png": png()}, zipfile.ZIP_LZMA)  # whose decompressor knows no limit
    assert not clean.open_archive(str(tmp_path / "a.lzma.zip"), os.getpid())[1]
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as f:
        f.writelines([bytes(1 << 20)] * 512)
    liar = bytearray((tmp_path / "liar.zip").read_bytes())
    struct.pack_into("<I", liar, liar.rindex(b"PK\1\2") + 24, 1 << 20)  # unpacks to 512 MB, says 1 MB
    (tmp_path / "liar.zip").write_bytes(liar)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(zipfile.BadZipFile):
        clean.open_archive(str(tmp_path / "liar.zip"), os.getpid())[0]("a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    with pytest.raises(ValueError, match="200 times"):
        names("b.tgz", {"bomb.png": bytes(1 << 24), "good.png": png()})
    for n, header in enumerate((tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME) * 3):  # of 1 GB, which tarfile would read
        (member := tarfile.TarInfo("x")).type, member.size = header, 1 << 30
        with [gzip, bz2, lzma][n % 3].open(path := tmp_path / f"{n}.tar", "wb") as f:
            f.write(member.tobuf() + bytes(1 << 22))
        with pytest.raises(ValueError, match="a header of more than"):
            clean.open_archive(str(path), os.getpid())
    monkeypatch.setattr(clean, "MAX_MEMBER", 10)
    assert names("c.zip", {"large.png": png()}) == names("c.tar", {"large.png": png()}) == []


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tgz", "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_raises_the_promised_errors_only(tmp_path, kind):
    """Bytes changed at random, in half of the cases in the header, and files cut off."""
    rng, path, archive = np.random.default_rng(0), tmp_path / kind, clean.is_archive(kind)
    if archive:
        files = {"a.png": png(), "ä" * 60 + ".txt": rng.bytes(600), "b.json": b'{"caption": "x"}'}
        put(path, files, zipfile.ZIP_DEFLATED)
    else:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(path, kind)
    whole = path.read_bytes()
    for n in range(250):
        damaged = bytearray(whole)
        for i in rng.integers(0, [len(whole), 80][n % 2], rng.integers(1, 6)):
            damaged[i] = rng.integers(256)
        path.write_bytes(damaged[:rng.integers(1, 5) * len(whole) // 2])
        clean.open_archive.cache_clear()
        with suppress(*clean.ARCHIVE_ERRORS if archive else [clean.BadImage]):
            clean.read_place(path, "x") if archive else clean.open_rgb(path).getpixel((0, 0))


def test_images_look_as_a_person_sees_them():
    upright, exif, palette = Image.new("RGB", (20, 10), "blue"), Image.Exif(), Image.new("P", (20, 10), 3)
    exif[0x112] = 6  # to be turned by 90 degrees
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    deep = np.full((10, 20), 32_896, np.uint16)
    for image, kind, options, seen in [
            (Image.new("RGBA", (20, 10), (255, 0, 0, 128)), "WEBP", {"lossless": True}, (255, 127, 127)),
            (Image.new("LA", (20, 10), (9, 0)), "PNG", {}, (255, 255, 255)), (palette, "GIF", {}, (9, 9, 9)),
            (palette, "PNG", {"transparency": 3}, (255, 255, 255)), (upright, "PNG", {"exif": exif}, (0, 0, 255)),
            (Image.fromarray(deep), "PNG", {}, (128,) * 3), (Image.fromarray(deep // 257), "TIFF", {}, (128,) * 3),
            (upright, "GIF", {"save_all": True, "append_images": [palette]}, (0, 0, 255))]:
        image.save(file := io.BytesIO(), kind, **options)
        found = clean.open_rgb(file)
        assert found.mode == "RGB" and found.size == ((10, 20) if "exif" in options else (20, 10))
        assert np.abs(np.subtract(found.getpixel((9, 9)), seen)).max() <= 1, (kind, options)


def picture(kind, size=(32, 24), **kwargs):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    image.save(out := io.BytesIO(), kind, **kwargs)
    return out.getvalue()


def scans(n):  # a progressive JPEG whose last scan is repeated: each is decoded over all pixels
    Image.linear_gradient("L").resize((3000, 2500)).save(out := io.BytesIO(), "JPEG", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda"):-2] * n + b"\xff\xd9"


def tile(side):  # a TIFF of 32 x 24 in one tile, which is decoded whole
    tags = [(256, 32), (257, 24), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, side ** 2)]
    return b"".join([b"II*\0", struct.pack("<IH", 8, len(tags)), *(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)])


@pytest.mark.parametrize("data, rule", [
    (picture("EPS"), "unreadable"), (picture("ICO"), "unreadable"), (picture("ICNS", (32, 32)), "unreadable"),
    (picture("PNG", (70_000, 64)), "too large"), (picture("PNG", (8001, 8001)), "too large"), (scans(300), "too large"),
    (tile(26_000), "too large"), (b"", "unreadable"), (scans(2), None), (picture("JPEG2000"), None)])
def test_odd_images_are_dropped_by_a_rule(tmp_path, data, rule):
    found = clean.keep_image((put(tmp_path / "in", {"x.png": data}) / "x.png", tmp_path, 336))
    assert found.get("rule") == (rule and f"image {rule}")


@pytest.mark.parametrize("metadata", ["metadata.parquet", "metadata-large.parquet", None])
@pytest.mark.parametrize("place", ["images/part-{p:06d}.zip", "part-{p:06d}.zip", "images/part-{p:06d}", "",
                                   "diffusiondb-large-part-{k}/part-{p:06d}"])
def test_diffusiondb(cleaned, tmp_path, place, metadata):
    """Parts 1 and 10001 of three, in every layout that people have; the last row has a hostile name."""
    parts = [1] * 4 + [10_001] * 4 + [3, 3, 10_001]
    rows = [{"image_name": f"{p}-{i}.png", "prompt": text + ", ", "part_id": p, "image_nsfw": .1, "width": 512}
            for i, (p, text) in enumerate(zip(parts, prompts(11)))]
    rows[-1]["image_name"] = "../part-000001/1-0.png"
    for k, p in enumerate((1, 10_001)):
        mine = {r["image_name"]: {"p": r["prompt"], "se": 1} for r in rows[:8] if r["part_id"] == p}
        files = {f"part-{p:06d}.json": json.dumps(mine).encode(), **dict.fromkeys(mine, png(["red", "lime"][k]))}
        put(tmp_path / "ddb" / place.format(p=p, k=k + 1), files)
    if metadata:
        pl.DataFrame(rows).with_columns(pl.col("part_id").cast(pl.UInt16)).write_parquet(tmp_path / "ddb" / metadata)
    pairs, dropped, _ = cleaned(tmp_path / "ddb")
    assert pairs["prompt"].to_list() == [p + "," for p in prompts(8)] and set(pairs["source"]) == {"ddb"}
    assert dropped["rule"].to_list() == (["not downloaded"] * 3 if metadata else [])
    assert [pixel(tmp_path / "data/out" / i)[0] > 200 for i in pairs["image"]] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("how", ["txt", "json", "metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("where", ["in", "in.zip", "in.tar", "in.tgz", "in/a.tar"])
def test_tables_and_sidecars_in_folders_and_archives(cleaned, tmp_path, how, where):
    """All give the same pairs, their text repaired, whatever is damaged beside them; a table does so by itself too."""
    odd = {'\nnew,\t "line" ': ' new, "line"', "\0 NUL": " NUL", " schÃ¶n &amp; ﬁne 🐱": " schön & fine 🐱", " ": ""}
    texts, images = [p + end for p, end in zip(prompts(4), odd)], [f"{i}.png" for i in range(4)]
    table, content = pl.DataFrame({"file_name": images, "Caption": texts}), io.BytesIO()
    files = {f"sub/{n}": png(["red", "blue"][i % 2]) for i, n in enumerate(images)} | {"sub/broken.json": b"{"}
    files |= {} if where == "in.zip" else {"sub/\udcff.png": png()}  # not UTF-8; no zip has such a name
    if "metadata" in how:
        {"csv": table.write_csv, "tsv": partial(table.write_csv, separator="\t"), "parquet": table.write_parquet,
         "jsonl": table.write_ndjson}[how[9:]](content)
        files[f"sub/{how}"] = content.getvalue()
    else:
        files |= {f"sub/{i}.{how}": (t if how == "txt" else json.dumps({"caption": t, "other": [1]})).encode()
                  for i, t in enumerate(texts)}
    put(tmp_path / where, files)
    put(tmp_path / "in", {"b.tar": b"not a tar" * 1000} if where == "in/a.tar" else {})
    put(tmp_path / "in", {"old/images/log.jsonl": b"", "old/images/ab/0.png": png("blue")})  # what clean.py made is no input
    for source in [where.removesuffix("/a.tar"), *[f"in/sub/{how}"] * (where == "in" and "metadata" in how)]:
        pairs, dropped, _ = cleaned(tmp_path / source, "--overwrite")
        assert not dropped["image"].str.contains("/old/").any()
        assert pairs["prompt"].to_list() == [p + end for p, end in zip(prompts(4), odd.values())]
        assert [pixel(tmp_path / "data/out" / i)[0] > 200 for i in pairs["image"]] == [True, False, True, False]


CAT, LONG, DOG, MAN = "a red cat drinks tea", "a red cat drinks tea now", "a big dog eats cake", "a fat man sells books"
RULES = {  # flags: prompts, the rule that drops each (None: it stays), and more columns
    "": [(None, "no prompt"), ("  \t ", "blank"), ("NaN", "blank"), ("a red cat", "too short"),
         ("word " * 71, "too long"),
         ("a cat on a mat " + "1234567890" * 8, "too many tokens"), ("рыжий кот сидит на столе", "characters"),
         ("1234 5678 !!! 1 ... 90 90", "characters"), ("but one \ufffd", "undecodable"),
         ("naïve façade über alles in señor's house", None),
         ("50 % of all (red:1.2) [cats], 8k!! by the lake", None), ("one cat — so small — on a hill", None)],
    "--min-words 6": [(CAT, "too short"), (LONG, None)], "--max-words 5": [(LONG, "too long"), (CAT, None)],
    "--max-tokens 7": [(LONG, "too many tokens"), (CAT, None)],
    "--charset ascii": [("ééé ööö ààà ççç ñññ ååå", "characters"), (CAT, None)],
    "--charset any": [("1 2 3 4 5 6", "characters"), ("рыжий кот сидит на столе", None), ("一 只 红 色 的", None)],
    "--min-side 300 --max-side 600": [(CAT, "width or height", {"width": 299, "height": 400}),
                                      (DOG, "width or height", {"width": 400, "height": 601}),
                                      (MAN, None, {"width": 300, "height": 600})],
    "--max-nsfw .5": [(CAT, "nsfw", {"image_nsfw": .6}), (DOG, "nsfw", {"prompt_nsfw": .6}), (MAN, None)],
    "--max-nsfw 9": [(CAT, "nsfw", {"image_nsfw": 2.}), (MAN, None)]}


@pytest.mark.parametrize("flags", RULES)
def test_text_rules(cleaned, tmp_path, flags):
    rows = [{"prompt": p, **dict(*more)} for p, _, *more in RULES[flags]]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    pairs, dropped, _ = cleaned(tmp_path / "a.parquet", "--text-only", *flags.split())
    assert dropped["rule"].to_list() == [rule for _, rule, *_ in RULES[flags] if rule]
    assert pairs["prompt"].to_list() == [p for p, rule, *_ in RULES[flags] if not rule]


def test_clip_tokens_are_exact():
    from open_clip.tokenizer import SimpleTokenizer
    rng, tokenizer = np.random.default_rng(0), SimpleTokenizer()
    words = ("masterpiece trending on artstation, it's they'll (x:1.2) 1234 8k ultra-realistic café Ünïcödé 🐱🐶 猫 "
             "<|weird|> <END_of_text> $$$ Greg Rutkowski's 'd 've ...").split()
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, 300)]
    found = clean.clip_tokens(pl.Series(texts), 77).to_numpy()
    exact = np.array([len(tokenizer.encode(t)) + 2 for t in texts])
    assert (found[found > 0] == exact[found > 0]).all() and (exact[found == 0] <= 77).all() and (exact > 77).sum() > 30


@needs_shared
def test_encoders_named_by_files_never_come_from_the_hub(tmp_path):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        do_GET = do_HEAD = lambda self: asked.append(self.path) or self.send_error(404)  # noqa: E731
        log_message = print
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {**os.environ, "HF_ENDPOINT": f"http://localhost:{server.server_port}", "HF_HUB_OFFLINE": "0",
               "HF_HOME": str(tmp_path)}
        for sha in (None, "0" * 64):
            asked.clear()
            code = f"import clean; clean.find_encoder('org/name', {sha!r})"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
            assert done.stderr.startswith("--text-model org/name: ") and bool(asked) == (not sha), (sha, done.stderr, asked)
        server.shutdown()


def test_encoder_is_the_competitions():
    words = pl.read_csv(SHARED / "kaggle7/prompts.csv")["prompt"]
    true = pl.read_csv(SHARED / "kaggle7/sample_submission.csv")["val"].to_numpy().reshape(7, 384)
    assert np.abs(clean.encode(words, clean.load_encoder()[0]) - true).max() < 1e-6


def test_encode_cached(tmp_path, monkeypatch, capsys):
    """Each distinct prompt is encoded once, ever; a kill costs one chunk; the result is the same to the byte."""
    words, cache = prompts(30) + prompts(5) + ["", "a cat"], tmp_path / "killed"
    monkeypatch.setattr(clean, "CHUNK", 8)
    with mock.patch.object(clean, "encode", wraps=clean.encode) as encode:
        whole = clean.encode_cached(words, cache=tmp_path / "whole")
        assert sorted(sum((call.args[0] for call in encode.call_args_list), [])) == sorted(set(words))
        assert whole.dtype == np.float32 and np.abs(whole - clean.encode(words, clean.load_encoder()[0])).max() < 1e-6
        encode.side_effect = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt]
        fails(clean.encode_cached, words, cache=cache, error=KeyboardInterrupt)
        encode.side_effect = [mock.DEFAULT, mock.DEFAULT]  # the two of four chunks that are left, and nothing after
        assert (clean.encode_cached(words, cache=cache) == whole).all()
        assert (clean.encode_cached(words[::-1], cache=cache) == whole[::-1]).all()
    a, b, *_ = sorted(cache.rglob("*.npz"))
    a.write_bytes(a.read_bytes()[:-700])
    np.savez(b, keys=np.array([{}], object), x=whole)  # a pickle is never opened
    assert (clean.encode_cached(words, cache=cache) == whole).all()
    assert capsys.readouterr().err.count("damaged cache file ignored") == 2


def clusters(rng, n, dim, noise, centres=30):
    x = rng.standard_normal((centres, dim))[rng.integers(0, centres, n)]
    return unit(x + noise * rng.standard_normal((n, dim)))


def greedy(x, threshold):  # the definition of keep_one in float64 -> the rows that are kept, all cosines (N, N)
    cosine, kept = x.astype(np.float64) @ x.T.astype(np.float64), []
    for i, row in enumerate(cosine):
        kept += [i] if (row[kept] < threshold).all() else []
    return kept, cosine


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 120), dim=st.integers(2, 16), noise=st.sampled_from([0, .05, .3]),
       threshold=st.one_of(st.floats(.1, .999), st.just(1.1), st.sampled_from([.5, 1])), data=st.data())
def test_keep_one_is_the_definition(seed, n, dim, noise, threshold, data):
    """Row by row, for any threshold and block size, exact ties at the threshold included."""
    x = clusters(rng := np.random.default_rng(seed), n, dim, noise)
    if threshold in (.5, 1):
        x = rng.choice([-.5, .5], (n, 4)).astype(np.float32)  # all cosines are multiples of 1/2, without rounding
    leader, cosine = clean.keep_one(x, threshold, data.draw(st.integers(1, n), "block"))
    kept, exact = greedy(x, threshold)
    assert np.flatnonzero(leader == np.arange(n)).tolist() == kept
    assert not (np.triu(exact[kept][:, kept], 1) >= threshold).any(), "no two kept rows are near"
    for i in np.setdiff1d(np.arange(n), kept):
        before = [j for j in kept if j < i]
        assert leader[i] in before and exact[i, before].max() >= threshold, "a kept row is near each dropped one"
        assert abs(cosine[i] - exact[i, leader[i]]) < 1e-6 and cosine[i] > exact[i, before].max() - 1e-6, "the nearest"


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_block_size_and_threads_change_nothing(bf16, monkeypatch):
    """Most cosines are at the threshold within what float32 can tell, so sums in another order would decide."""
    import torch
    monkeypatch.setattr(clean, "has_bf16", lambda device: bf16)
    rng, threshold, n, threads = np.random.default_rng(0), .85, 2000, torch.get_num_threads()
    centres = unit(rng.standard_normal((n // 8, 384))).astype(np.float64)
    centre, away = centres[rng.integers(0, n // 8, n)], rng.standard_normal((n, 384))
    away = unit(away - (away * centre).sum(1, keepdims=True) * centre)
    cosine = threshold + rng.uniform(-3e-7, 3e-7, (n, 1))
    x = unit(np.concatenate([centres, cosine * centre + np.sqrt(1 - cosine ** 2) * away]))
    kept, exact = greedy(x, threshold)
    for block, count in (1024, 1), (1024, 2), (64, 2), (len(x), 1):
        torch.set_num_threads(count)
        leader, _ = clean.keep_one(x, threshold, block)
        assert np.flatnonzero(leader == np.arange(len(x))).tolist() == kept and n // 8 < len(kept) < len(x)
        assert exact[np.arange(len(x)), leader].min() > threshold - 1e-12, "the leader that is named is near enough"
    torch.set_num_threads(threads)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 100), k=st.integers(1, 4))
def test_unusable_rows_are_dropped_as_if_never_there(seed, n, k):
    """The definition: select, drop the selected rows that are unusable from the input, start again."""
    rng = np.random.default_rng(seed)
    x, bad = clusters(rng, 40, 8, .3, 12), rng.random(n) < .3
    key, at = rng.integers(0, 25, n), rng.integers(0, 40, n)  # one prompt in two wordings has two vectors
    rows, tried, unusable, asked = list(range(n)), set(), [-1], []
    while unusable:
        same = {key[r]: [s for s in rows if key[s] == key[r]] for r in rows}
        first = [images[0] for images in same.values()]
        chosen = [r for i in greedy(x[at[first]], .8)[0] for r in same[key[first[i]]][:k]] if first else []
        unusable = [r for r in chosen if bad[r]]
        tried, rows = tried.union(chosen), [r for r in rows if r not in unusable]
    store = mock.Mock(add=lambda sources: asked.extend(map(int, sources)) or [
        {"rule": "image unreadable"} if bad[int(s)] else {"file": s} for s in sources])
    left = pl.DataFrame({"at": at, "key": key, "image": [str(i) for i in range(n)]})
    args = clean.parse_args(["--threshold", ".8", "--per-prompt", str(k)])
    rule, leader, cosine, facts = clean.select_rows(left, x, store, args)
    assert [i for i in range(n) if rule[i] is None] == sorted(chosen)
    assert np.flatnonzero(rule == "image unreadable").tolist() == [i for i in range(n) if i not in rows]
    assert sorted(asked) == sorted(tried) == sorted(facts), "no image is decoded twice, or in vain"
    for i in np.flatnonzero(rule == "near-duplicate"):
        assert leader[i] in chosen and abs(x[at[i]] @ x[at[leader[i]]] - cosine[i]) < 1e-6 and cosine[i] > .8 - 1e-6
    for i in np.flatnonzero(rule == "exact duplicate"):
        assert leader[i] in chosen and leader[i] == leader[same[key[i]][0]] and same[key[i]][0] < i


def test_split_never_leaks():
    rng = np.random.default_rng(0)
    x, ood, names = clusters(rng, 800, 16, .35, 300), rng.random(800) < .1, [f"prompt {i}" for i in range(800)]
    for seed, threshold in (0, .7), (1, .7), (2, .8):
        group, split = clean.split_groups(x, names, .1, seed, threshold, ood)
        (leaders, exact), held = greedy(x, threshold), (split == "val") | (split == "ood")
        assert exact[split == "train"][:, held].max() < threshold
        assert exact[split == "guard"][:, held].max(1).min() >= threshold, "no row is set aside without a reason"
        assert ((split == "ood") == ood).all() and 0 < (split == "val").sum() <= round(.1 * (~ood).sum())
        assert np.unique(group).tolist() == leaders
        assert not np.isin(group[split == "val"], group[split != "val"]).any(), "groups stay whole"
        assert [(clean.split_groups(x, names, .1, s, threshold, ood)[1] == split).all() for s in (seed, 9)] == [True, False]


def test_count_near_is_exact():
    """In blocks of any size, with a cosine that is the threshold to the last bit, and rows that stand for several."""
    x, times = clusters(np.random.default_rng(1), 300, 8, .4, 60), np.random.default_rng(2).integers(0, 4, 300)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    for threshold in (.5, float(clean.pair_cosines(x[:1], x[1:2])[0])):
        counts = (exact >= threshold) @ times
        for block, span in (1024, 16384), (7, 13):
            assert (clean.count_near(x, times, threshold, block, span) == counts).all()
    assert not clean.count_near(x, times * 0, .5).any()


def test_weights_and_a_validation_that_stays(raw, tmp_path):
    """`weight` is 1 / number of training rows near the prompt, of mean 1 over them. Other thresholds and another order of
    rows keep most of the validation prompts; --val-from takes exactly another folder's, and nothing near them trains."""
    table = pl.read_csv(raw / "prompts.csv").select(pl.concat_str(pl.lit(f"{raw}/"), "image").alias("image"), "prompt")
    table.write_csv(tmp_path / "a.csv")
    table.sample(fraction=1, shuffle=True, seed=1).write_csv(tmp_path / "b.csv")
    made = {}
    for name, flags in (("a", []), ("b", ["--threshold", .8, "--balance-threshold", .6]),
                        ("c", ["--val-from", tmp_path / "a", "--threshold", .8, "--seed", 3])):
        command("clean.py", tmp_path / f"{'a' if name == 'a' else 'b'}.csv", "--out", tmp_path / name, "--size", 32,
                "--val-fraction", .2, "--workers", 1, *flags)
        made[name] = pairs, targets, _ = clean.read_data(tmp_path / name)
        train, x = (pairs["split"] == "train").to_numpy(), targets.astype(np.float64)
        near = (x @ x[train].T >= (.6 if name == "b" else .5)).sum(1).clip(1)
        own = (pairs["split"] != "val").to_numpy() | (name != "c")
        assert np.allclose(pairs["weight"].filter(own), (1 / near / (1 / near[train]).mean())[own])
        assert (x[train] @ x[(pairs["split"] == "val").to_numpy()].T).max() < .7
    (a, x, _), (b, *_), (c, z, _) = made.values()
    val = {name: set(p.filter(split="val")["prompt"]) for name, (p, *_) in made.items()}
    assert len(val["a"] & val["b"]) > .7 * len(val["a"]), "a permutation would keep a fifth"
    same = ["image", "prompt", "source", "width", "height", "origin", "weight"]
    assert a.filter(split="val").select(same).equals(c.filter(split="val").select(same))
    assert (x[(a["split"] == "val").to_numpy()] == z[(c["split"] == "val").to_numpy()]).all()
    for image in c["image"]:
        assert (tmp_path / "c" / image).is_file()
    gone = pl.read_parquet(tmp_path / "c/dropped.parquet").filter(rule="excluded")
    assert val["c"] <= set(gone["prompt"]) and gone["cosine"].min() >= .7
    shutil.copytree(tmp_path / "a", tmp_path / "odd")
    next((tmp_path / "odd" / image).unlink() for image in a.filter(split="val")["image"])
    shutil.copytree(tmp_path / "a", tmp_path / "other")
    summary = json.loads((tmp_path / "other/summary.json").read_text())
    (tmp_path / "other/summary.json").write_text(json.dumps(summary | {"text_model": {"name": "x", "sha256": ""}}))
    command("clean.py", tmp_path / "a.csv", "--out", tmp_path / "text", "--text-only", "--val-from", tmp_path / "odd")
    assert clean.read_data(tmp_path / "text")[0]["image"].null_count() == len(clean.read_data(tmp_path / "text")[0])
    for other, word in ((tmp_path / "odd", "not all of their images"), (tmp_path / "other", "targets are x's"),
                        (raw, "not a finished"), (tmp_path / "none", "no such file"), (tmp_path / "c", "overlaps")):
        done = command("clean.py", tmp_path / "a.csv", "--out", tmp_path / "c", "--val-from", other, "--overwrite", ok=False)
        assert word in done.stderr


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 60), m=st.integers(1, 60), k=st.integers(1, 8), data=st.data())
def test_top_k_is_exact_with_and_without_faiss(seed, n, m, k, data):  # keys are equal, or alike beyond float32
    rng, (dim, noise) = np.random.default_rng(seed), data.draw(st.sampled_from([(2, .2), (384, .2), (384, 1e-6)]))
    queries, keys = unit(rng.standard_normal((n, dim))), clusters(rng, m, dim, noise, 4)[rng.integers(0, m, m)]
    rows = np.argsort(-(exact := (queries[:, None].astype(np.float64) * keys).sum(2)), axis=1, kind="stable")[:, :k]
    for missing in "none", "faiss":
        with pytest.MonkeyPatch.context() as m:
            m.setitem(sys.modules, missing, None)
            cosine, found = clean.top_k(queries, keys, k)
        assert (found == rows).all() and np.abs(cosine - np.take_along_axis(exact, rows, 1)).max() < 1e-12


def test_selection_through_the_command(cleaned, table, tmp_path, capsys):
    """Both kinds of duplicates, --per-prompt, --exclude, two sources of which one is held out, --threshold-report."""
    write_pairs(tmp_path, 7)
    a, b, c, d = prompts(4)
    path = table([{"image": f"{i}.png", "prompt": p} for i, p in enumerate([a, a + " extra", b, c, c + "!", c, d])])
    near = table([{"image": "0.png", "prompt": b + " words"}], "near.csv")
    pairs, dropped, _ = cleaned(path)
    assert pairs["prompt"].to_list() == [a, b, c, d] and dropped["cosine"][0] > .85
    assert cleaned(path, "--val-fraction", 0, out="all")[2]["split"] == {"train": 4, "val": 0, "guard": 0, "ood": 0}
    assert [row[2:5] for row in dropped.rows()] == [("near-duplicate", 0, a)] + [("exact duplicate", 2, c)] * 2
    assert cleaned(path, "--per-prompt", 2, out="two")[0]["prompt"].to_list() == [a, b, c, c, d]
    pairs, dropped, _ = cleaned(path, "--exclude", near, out="exclude")
    assert pairs["prompt"].to_list() == [a, c, d] and dropped.filter(rule="excluded")["cosine"].item() > .7
    pairs, _, summary = cleaned(path, near, "--holdout-source", "near", "--threshold", .99, out="held")
    assert pairs["source"].to_list() == ["pairs"] * 5 + ["near"] and pairs["split"][5] == "ood"
    assert pairs.filter(prompt=b)["split"].item() == "guard" and summary["split"]["ood"] == 1
    fails(cleaned, path, "--threshold-report", out="report", match="not a finished data folder")
    report = capsys.readouterr().out
    assert "0.85          4   <-" in report and "0.95          5" in report and repr(a + " extra") in report
    assert not list((tmp_path / "data").glob("report*"))


def test_images_are_named_by_their_content(cleaned, table, tmp_path):
    """Whatever order, log and leftovers a run finds, each prompt gets its own image, and equal images share a file."""
    path, out = write_pairs(tmp_path, 12), tmp_path / "data/out"
    put(tmp_path, {"5.png": png(9, (500, 700)), "6.png": png(9, (70_000, 2)), "11.png": png(0),
                   "7.png": b"P6 9000 9000 9 "})  # a header without pixels: decoding would say "unreadable"
    pairs, dropped, _ = cleaned(path)
    image, size = pairs["image"].to_list(), pairs.select("width", "height").rows()
    assert dropped["rule"].to_list() == ["image too large"] * 2 and len(set(image)) == 9 and image[0] == image[9]
    assert size[4:6] == [(32, 24), (500, 700)] and Image.open(out / image[5]).size == (336, 470), "never enlarged"
    assert cleaned(table(pl.read_csv(path).reverse().to_dicts(), "r.csv"), out="r")[0]["image"].to_list() == image[::-1]
    # other flags decode nothing again, but for another size, here on a disk without hard links
    with mock.patch.object(clean, "store_image", side_effect=AssertionError):
        pairs, _, _ = cleaned(path, "--overwrite", "--min-words", 6, "--val-fraction", .3)
    assert pairs["image"].to_list() == image and (pairs["split"] == "val").sum() == 3
    with mock.patch.object(os, "link", side_effect=PermissionError):
        pairs, _, _ = cleaned(path, "--overwrite", "--size", 20)
    assert {min(Image.open(out / i).size) for i in pairs["image"]} == {20}
    # an interrupted run, of whose log half is lost and one line torn; then an image is replaced under its name
    with mock.patch.object(clean, "draw_funnel", side_effect=KeyboardInterrupt):
        fails(cleaned, path, out="again", error=KeyboardInterrupt)
    log = tmp_path / "data/again.partial/images/log.jsonl"
    log.write_bytes(log.read_bytes()[:log.stat().st_size // 2])
    put(tmp_path, {"3.png": png("white", (50, 50))})
    pairs, _, _ = cleaned(path, out="again")
    assert pixel(tmp_path / "data/again" / pairs["image"][3]) == (255, 255, 255) and pairs["width"][3] == 50
    cleaned(path, out="fresh")
    assert hashes(tmp_path / "data/again") == hashes(tmp_path / "data/fresh")


def test_killed_and_resumed_is_the_same(cleaned, tmp_path):
    """Ctrl-C and kill -9 while images are written, then the same command: nothing that was finished is made again."""
    path, out = write_pairs(tmp_path, 250, (900, 500)), tmp_path / "data/killed"
    flags, log = [path, "--val-fraction", ".2"], tmp_path / "data/killed.partial/images/log.jsonl"
    cleaned(*flags, out="whole")
    for by, count in (signal.SIGINT, 40), (signal.SIGKILL, 100):
        p = subprocess.Popen([sys.executable, ROOT / "clean.py", *flags, "--out", out, "--workers", "2"], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while p.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= count):
            time.sleep(.005)
        os.killpg(p.pid, by) if by == signal.SIGINT else p.kill()  # its workers end with it, which closes the pipe
        printed = p.communicate(timeout=100)[0]
        assert "Traceback" not in printed and ("interrupted; run the same" in printed) == (by == signal.SIGINT), printed
    lines = log.read_bytes().splitlines(keepends=True)
    assert 90 < len(lines) < 250 and not out.exists()
    made = {f: os.stat(log.parents[1] / f).st_mtime_ns for f in [json.loads(i)[1]["file"] for i in lines if i.strip()]}
    log.write_bytes(b"".join(lines) + b'["torn')
    cleaned(*flags, out="killed")
    assert hashes(out) == hashes(tmp_path / "data/whole") and not out.with_name("killed.partial").exists()
    assert all(os.stat(out / f).st_mtime_ns == t for f, t in made.items())


def test_sweep_spares_what_is_being_written(tmp_path, monkeypatch):
    """A process that sweeps away what killed ones left removes nothing of a living one, up to its rename."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import clean; clean.sweep({str(tmp_path)!r})"
    sweep = [sys.executable, "-c", code]
    monkeypatch.setattr(clean.os, "replace", lambda a, b, real=os.replace: subprocess.run(sweep) and real(a, b))
    (tmp_path / ".a.1.tmp").write_text("killed")
    with clean.atomic(tmp_path / "a", "w") as f:
        f.write("whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "whole")]


def test_kill_between_the_two_renames(cleaned, tmp_path):
    path, out, rename = write_pairs(tmp_path, 12), tmp_path / "data/out", Path.rename
    cleaned(path)
    before = hashes(out)

    def killed(path, target):
        return 1 / 0 if path.suffix == ".partial" else rename(path, target)
    with mock.patch.object(Path, "rename", killed):
        fails(cleaned, path, "--overwrite", "--size", 20, error=ZeroDivisionError)
    assert not out.exists()
    fails(cleaned, path, "--min-words", 60)
    assert hashes(out) == before, "any next run puts the old folder back"
    cleaned(path, "--overwrite", "--size", 20)
    cleaned(path, "--size", 20, out="other")
    assert hashes(out) == hashes(tmp_path / "data/other") != before
    assert not list((tmp_path / "data").glob("*.old"))


@pytest.mark.parametrize("mine, inputs, match", [
    ("mine/images/a", "pairs.csv", "not made by clean.py"), ("mine", "pairs.csv", "not made by clean.py"),
    ("mine/a", "data/mine", "overlaps with the input"), ("mine/deep/a", "data", "overlaps with the input"),
    ("mine.old/a", "data/mine.old", "overlaps with the input"), ("out/a", "pairs.csv", "with other files in it"),
    ("out/images/ab/photo.jpg", "pairs.csv", "with other files in it"),
    ("mine.partial/a", "pairs.csv", "not made by clean.py"), ("mine.old/a", "pairs.csv", "not made by clean.py"),
    ("mine-raw/a", "", "not drawn by the demo")])
def test_overwrite_never_deletes_what_is_not_ours(cleaned, tmp_path, mine, inputs, match):
    cleaned(write_pairs(tmp_path, 2))
    put(tmp_path / "data", {mine: b"precious", **({"mine/summary.json": b"{}"} if "images" in mine else {})})
    before, out = hashes(tmp_path / "data"), re.split(r"[/.-]", mine)[0]
    fails(cleaned, *(tmp_path / i for i in inputs.split()), "--overwrite", out=out, match=match)
    assert hashes(tmp_path / "data") == before


@pytest.mark.parametrize("out, size, workers, limit, match", [
    ("new", 336, 2, 20_000, r"/\w+\.jpg"), ("out", 20, 1, 20_000, "log.jsonl"), ("out", 20, 1, 200_000, "targets.npy")])
def test_full_disk_leaves_the_old_folder(cleaned, tmp_path, out, size, workers, limit, match):
    path, limits = write_pairs(tmp_path, 200), resource.getrlimit(resource.RLIMIT_FSIZE)
    Image.effect_noise((300, 300), 90).save(tmp_path / "0.png")
    cleaned(path)
    before, flags = hashes(tmp_path / "data/out"), [path, "--overwrite", "--size", size, "--workers", workers]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # stands in for a full disk
        fails(cleaned, *flags, out=out, match=match + r": cannot be written \(File too large\)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert hashes(tmp_path / "data/out") == before and not list((tmp_path / "data").rglob("*.tmp"))
    assert len(cleaned(*flags, out=out)[0]) == 200, "with room again, the same command resumes"


def test_generation(cleaned, table, tmp_path):
    """With a Stable Diffusion of random weights that is small enough for a test; its images differ by their seeds."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    files = {"vocab.json": b'{"<|startoftext|>": 0, "<|endoftext|>": 1}', "merges.txt": b"#version: 0.2\n"}
    folder = put(tmp_path / "diffusion", files)
    text = CLIPTextConfig(hidden_size=16, num_attention_heads=2, vocab_size=2, num_hidden_layers=1)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4,), sample_size=16, norm_num_groups=2, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), unet=unet, feature_extractor=None,
        text_encoder=CLIPTextModel(text), scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=CLIPTokenizer(*(str(folder / name) for name in files), model_max_length=77), safety_checker=None,
        requires_safety_checker=False).save_pretrained(folder, safe_serialization=True)
    write_pairs(tmp_path, 2)
    path = table([{"image": "1.png" if i == 1 else "", "prompt": p} for i, p in enumerate(prompts(6))])
    flags = path, "--generate", folder, "--gen-steps", 2, "--gen-batch-size", 2
    pairs, _, _ = cleaned(*flags, out="whole")
    assert pairs["origin"].null_count() == 5 and pairs["image"].n_unique() == 6, "each prompt has an image of its own"
    with mock.patch.object(clean, "store_image", wraps=clean.store_image) as store_image:
        store_image.side_effect = [mock.DEFAULT] * 4 + [KeyboardInterrupt]  # 1.png, one batch, half of the next
        fails(cleaned, *flags, out="killed", error=KeyboardInterrupt)
        store_image.side_effect = [mock.DEFAULT] * 3
        cleaned(*flags, out="killed")
    assert hashes(tmp_path / "data/killed") == hashes(tmp_path / "data/whole")
    fails(cleaned, path, "--generate", tmp_path, out="none", match="cannot be loaded")


def test_demo_loses_exactly_its_corrupted_rows(tmp_path, monkeypatch):
    """Rule by rule, with the real encoder: every planted row is dropped by the rule it was planted for, no other is."""
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "draw_demo", partial(demo.draw_demo, rows=160, corrupted=128))
    monkeypatch.setattr("sys.argv", ["clean.py", "--out", str(out), "--workers", "1"])
    clean.main()
    drawn = pl.read_csv(tmp_path / "demo-raw/prompts.csv", infer_schema=False)
    planted = drawn.filter(~pl.col("rule").fill_null("").str.contains(r"^(\(|$)")).select("image", "rule")
    dropped = pl.read_parquet(out / "dropped.parquet").select(pl.col("image").str.extract(r"(images/[^/]*)$"), "rule")
    assert dropped.sort("image").rows() == planted.sort("image").rows() and len(drawn) == 288
    pairs, x, summary = clean.read_data(out)
    counts = {s["rule"]: s["removed"] for s in summary["funnel"] if s["removed"]}
    assert counts == dict(planted["rule"].value_counts().rows()) and len(counts) == 11
    train, val = (x[pairs["split"].to_numpy() == s] for s in ("train", "val"))
    assert (train @ val.T).max() < .7 and abs((train @ val.T).max() - summary["max_train_val_cosine"]) < 1e-5
    Image.open(out / "funnel.png").load()


def test_funnel_chart(tmp_path):
    """It shows the rules that removed something, in order, and names the data set whatever its name."""
    steps = [{"rule": rule, "removed": n, "left": left} for rule, n, left in
             (("raw", 0, 4000), ("blank", 0, 4000), ("nsfw", 3000, 1000), ("too long", 2, 998))]
    figure = clean.draw_funnel(steps, "mine", tmp_path / "funnel.png")
    assert {"mine: 4,000 in → 998 kept", "3,000  (75.0%)"} < set(chart_texts(figure))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["nsfw", "too long"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3000, 2] and figure.axes[0].yaxis_inverted()
    assert "no rule" in chart_texts(clean.draw_funnel(steps[:2], ODD_NAME, tmp_path / "funnel.png"))


def test_user_errors_are_one_line_and_bugs_a_traceback(cleaned, table, tmp_path, monkeypatch):
    good, out, hollow = write_pairs(tmp_path, 3), tmp_path / "data/out", tmp_path / "hollow"
    put(tmp_path, {"empty.csv": b"", "head.csv": b"image,prompt\n", "lie.zip": b"PK no"})
    hollow.mkdir(mode=0o500)
    (link := tmp_path / "link").symlink_to(hollow)
    evil = put(tmp_path / "evil", {"model.safetensors": b"", "modules.json": '[{"type": "\\u0065vil.Thing", "path": ""}]'})
    dense = put(tmp_path / "dense", {"model.safetensors": b"", "config.json": '{"activation_function": "os.abort"}',
                                     "modules.json": '[{"type": "sentence_transformers.models.Dense", "path": ""}]'})
    closed = hollow if os.geteuid() else Path("/sys/kernel")  # permission bits do not stop root
    pl.DataFrame({"image": [1], "prompt": ["a"]}).write_parquet(tmp_path / "bytes.parquet")
    pl.DataFrame({"image": ["a"], "prompt": [{"en": "a", "de": "b"}]}).write_parquet(tmp_path / "fields.parquet")
    pl.select(prompt=pl.repeat("a", 20_000_001)).write_parquet(tmp_path / "many.parquet")
    os.mkfifo(tmp_path / "pipe.csv")
    bare = put(tmp_path / "bare", {"0.png": png(), "1.png": png(), "2.heic": b"x"})
    alike = table([{"image": "0.png", "prompt": p} for p in ("one two red six ten", "one two red six")], "alike.csv")
    for args, match in [
            ([tmp_path / "empty.csv"], "no rows"), ([tmp_path / "head.csv"], "no rows"),
            ([good, "--limit", 0], "--limit 0"), ([""], "'': no such file"),
            ([tmp_path / "lie.zip"], "not a readable archive"), ([tmp_path / "bytes.parquet"], "image holds Int64"),
            ([tmp_path / "many.parquet", "--text-only"], "more than 20,000,000 rows"),
            ([tmp_path / "fields.parquet"], r"has the fields en, de; pick one: --prompt-col prompt\.en$"),
            ([tmp_path / "pipe.csv"], "not a regular file"),
            ([bare], r"\(no prompt: 2\): .* read: 1 × \.heic \(pip inst"),
            (["none.csv"], "no such file"), ([table([{"text": "b"}], "b.csv")], "no column for the image.*--text-only"),
            ([hollow], "no image and no table"), ([good, "--prompt-col", "words"], "no column words among: image"),
            ([good, "--threshold", 0], "--threshold 0.0"), ([good, "--val-fraction", 1], "--val-fraction 1.0"),
            ([good, "--seed", -1], "--seed -1"), ([good, "--per-prompt", 10 ** 30], "--per-prompt"),
            ([good, "--threshold", "nan"], "--threshold nan"), ([good, "--out", "."], "--out .: must name a new folder"),
            ([good, "--out", link], "a link"),
            ([good, "--min-words", 9, "--max-words", 3], "--min-words 9 is above --max-words 3"),
            ([good, "--text-model", hollow], "no model.safetensors"), ([good, "--text-model", evil], "module evil.Thing"),
            ([good, "--text-model", dense], "has a module os.abort"), ([good, "--min-words", 60], "no row .*short: 3"),
            ([good, "--generate", "x", "--text-only"], "leave one"), ([good, "--holdout-source", "c"], "are: pairs$"),
            ([alike, "--threshold", 1.1, "--min-words", 4], "no validation rows: the 2 rows are one group"),
            ([good, "--out", alike / "out"], r"cannot be written \("),
            ([good, "--out", closed / "out"], f"^{closed}/.*cannot be written")]:
        fails(cleaned, *args, match=match)
    assert not out.exists()
    code = "import clean, sys; lock = clean.hold(sys.argv[1]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, out], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        fails(cleaned, good, match="another process is writing there")
        other.communicate(b"\n")
    pairs, zipped = cleaned(good)[0], put(tmp_path / "x.zip", {"a.npy": npy(np.eye(3))}).read_bytes()
    for name, content, match in [
            ("summary.json", b'{"format": 1}', r"summary.json.format .*--overwrite"), ("summary.json", b"[]", "summary.json is"),
            ("summary.json", b"{", "damaged"), ("pairs.parquet", b"PAR1", "damaged"), ("targets.npy", b"", "damaged"),
            *[("targets.npy", npy(x), match) for x, match in [
                (np.zeros((3, 384), np.float32), "3 of 3 embeddings are not"), (np.eye(3, 384), "float64"),
                (np.full((3, 384), np.nan, np.float32), "3 of 3"), (np.eye(2, 384, dtype=np.float32), "3 pairs, 2 targets"),
                (np.array([{}]), "damaged")]], ("targets.npy", zipped, "targets.npy"),
            ("targets.npy", npy(np.eye(3, 100, dtype=np.float32)), r"float32 \(3, 100\)"),
            *[("pairs.parquet", parquet(pairs.with_columns(**{k: pl.lit(v)})), f"pairs.parquet: {k}") for k, v in [
                ("image", "../../x.jpg"), ("image", 1), ("split", "test"), ("prompt", None), ("group", 0.5)]]]:
        before = (out / name).read_bytes()
        fails(clean.read_data, put(out, {name: content}), match=match)
        put(out, {name: before})
    monkeypatch.setattr(clean, "text_rules", lambda args: wrods)  # noqa: F821, a typo in a rule of somebody's own
    fails(cleaned, good, out="bug", error=NameError, match="wrods")
