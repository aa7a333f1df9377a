"""clean.py: sources, rules, deduplication, split, images, cache, resume; each promise with a test that fails when it is broken."""
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


# ----------------------------------------------------------------------------------------------------------- the helpers

def fake_vectors(prompts, *_, **__):
    """A stand-in for the encoder where its meaning does not matter: bags of words, so shared words mean a high cosine."""
    x = np.stack([np.sum([np.random.default_rng(list(w.encode())).standard_normal(384) for w in p.lower().split()], axis=0) for p in prompts])
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


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
    return [" ".join(f"{a}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for a in ("lemon", "river", "stone", "cloud", "piano", "tiger")) for i in range(start, start + n)]


def fails(run, *args, match):
    with pytest.raises(SystemExit, match=match) as e:
        run(*args, out="failed")
    assert isinstance(e.value.code, str) and "\n" not in e.value.code


# -------------------------------------------------------------------------------------------------------------- sources

def diffusiondb(root, layout, large=False):
    """Parts 1 and 2 of three there (large: 1 and 10001), four images each, in one of the layouts that people have. -> their prompts"""
    parts, suffix = ([1, 10_001, 3] if large else [1, 2, 3]), "webp" if large else "png"
    rows = [{"image_name": f"{p:05d}-{i}.{suffix}", "prompt": t + ", ", "part_id": p, "width": 512, "height": 512, "image_nsfw": 0.1, "prompt_nsfw": 0.1}
            for k, p in enumerate(parts) for i, t in enumerate(prompts(4, 4 * k))]
    root.mkdir(parents=True)
    if layout != "json":
        pl.DataFrame(rows).with_columns(pl.col("part_id").cast(pl.UInt16), pl.col("width", "height").cast(pl.UInt16)).write_parquet(root / f"metadata{'-large' * large}.parquet")
    for k, p in enumerate(parts[:2]):
        files = {r["image_name"]: png(["red", "lime"][k]) for r in rows if r["part_id"] == p}
        files[f"part-{p:06d}.json"] = json.dumps({r["image_name"]: {"p": r["prompt"], "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for r in rows if r["part_id"] == p}).encode()
        folder = root / {"beside": "", "flat": "", "json": ""}.get(layout, f"diffusiondb-large-part-{1 + k}" if large else "images")
        folder.mkdir(exist_ok=True)
        if layout in ("zips", "beside", "json"):
            pack(folder / f"part-{p:06d}.zip", files)
        else:
            folder = folder if layout == "flat" else folder / f"part-{p:06d}"
            folder.mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
    return [r["prompt"].rstrip(", ") + "," for r in rows if r["part_id"] in parts[:2]]


@pytest.mark.parametrize("layout, large", [("zips", False), ("beside", False), ("unzipped", False), ("flat", False), ("json", False), ("zips", True), ("unzipped", True)])
def test_diffusiondb(cleaned, tmp_path, layout, large):
    wanted = diffusiondb(tmp_path / "ddb", layout, large)
    pairs, dropped, summary = cleaned(tmp_path / "ddb")
    assert pairs["prompt"].to_list() == wanted and set(pairs["source"]) == {"ddb"}
    assert dict(dropped["rule"].value_counts().rows()) == ({} if layout == "json" else {"not downloaded": 4})
    colours = [clean.open_rgb(tmp_path / "data/out" / i).getpixel((9, 9)) for i in pairs["image"]]
    assert all((c[0] > 200) == (k < 4) and (c[1] > 200) == (k >= 4) for k, c in enumerate(colours)), "each prompt with its own picture"


def test_diffusiondb_flags_in_metadata(cleaned, tmp_path):
    diffusiondb(tmp_path / "ddb", "zips")
    table = pl.read_parquet(tmp_path / "ddb/metadata.parquet")
    change = {0: {"image_nsfw": 2.0}, 1: {"prompt_nsfw": 0.9}, 2: {"width": 1024}, 3: {"height": 128}, 4: {"image_nsfw": 0.9}, 5: {"image_name": "../../evil.png"}}
    rows = [{**r, **change.get(i, {})} for i, r in enumerate(table.rows(named=True))]
    pl.DataFrame(rows, schema=table.schema).write_parquet(tmp_path / "ddb/metadata.parquet")
    pairs, dropped, _ = cleaned(tmp_path / "ddb")
    assert dropped["rule"].to_list()[:4] == ["nsfw", "width or height", "width or height", "not downloaded"] and len(pairs) == 4
    pairs, dropped, _ = cleaned(tmp_path / "ddb", "--max-nsfw", 0.5, "--max-prompt-nsfw", 0.5, "--min-side", 64, "--max-side", 2000, out="b")
    assert dropped["rule"].to_list()[:4] == ["nsfw", "nsfw", "nsfw", "not downloaded"]
    assert len(cleaned(tmp_path / "ddb/metadata.parquet", out="c")[0]) == 4, "the metadata file names its root"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl"])
def test_tables(cleaned, tmp_path, name):
    (tmp_path / "i").mkdir()
    texts = [p + end for p, end in zip(prompts(4), ['\nnew, "line"', " NUL\0 here", " émoji 🐱", " x" * 20])]
    for i in range(4):
        (tmp_path / f"i/{i}.png").write_bytes(png())
    table = pl.DataFrame({"Caption": texts, "file_name": [f"i/{i}.png" for i in range(3)] + [str(tmp_path / "i/3.png")]})
    {"csv": table.write_csv, "tsv": lambda f: table.write_csv(f, separator="\t"), "parquet": table.write_parquet, "jsonl": table.write_ndjson}[name[2:]](tmp_path / name)
    pairs, _, _ = cleaned(tmp_path / name)
    assert pairs["prompt"].to_list() == [" ".join(t.replace("\0", " ").split()) for t in texts] and set(pairs["source"]) == {"t"}
    pairs, _, _ = cleaned(tmp_path / name, "--text-only", out="text")
    assert pairs["image"].null_count() == 4 and not list((tmp_path / "data/text/images").rglob("*.jpg"))


def comfy(text):
    return json.dumps({"3": {"class_type": "KSampler", "inputs": {"positive": ["9", 0], "negative": ["7", 0]}},
                       "9": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0]}},
                       "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad hands"}}, "6": {"class_type": "CLIPTextEncode", "inputs": {"text": text}}})


@pytest.mark.parametrize("key, value", [
    ("parameters", "{}, <lora:foo:0.7>\nNegative prompt: bad hands\nSteps: 20, Sampler: Euler"), ("parameters", "{},\nSteps: 20, Sampler: Euler"),
    ("invokeai_metadata", '{{"positive_prompt": "{},", "negative_prompt": "bad"}}'), ("sd-metadata", '{{"image": {{"prompt": [{{"prompt": "{},"}}]}}}}'),
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
    for value in ["{", "[" * 100_000, "null", "{}", '{"1": 3}', json.dumps({"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}})]:
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
    assert [clean.open_rgb(tmp_path / "data/out" / i).getpixel((9, 9))[0] > 200 for i in pairs["image"]] == [True, False, True, False]


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
    assert set(pairs.filter(pl.col("source") == "a")["split"]) == {"train", "val", "guard"} and summary["split"]["ood"] == 20
    fails(cleaned, a, "--holdout-source", "c", match="no such source; there are: a")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.csv").write_text(a.read_text().replace(",", ",", 1))
    assert cleaned(a, tmp_path / "x/a.csv", "--text-only", out="two")[0]["source"].n_unique() == 1, "all of x/a.csv are duplicates of a.csv"


# ---------------------------------------------------------------------------------------------------------------- rules

@pytest.mark.parametrize("rule, prompt, flags", [
    ("blank", "  \t ", ()), ("blank", "NaN", ()), ("blank", None, ()), ("too short", "a red cat", ()), ("too short", prompts(1)[0], ("--min-words", 7)),
    ("too long", " ".join(f"word{i}" for i in range(71)), ()), ("too long", "five words are in here now", ("--max-words", 5)),
    ("too many tokens", "a red cat on a mat " + "1234567890" * 8, ()), ("too many tokens", prompts(1)[0], ("--max-tokens", 8)),
    ("characters", "рыжий кот сидит на синем столе", ()), ("characters", "1234 5678 !!! ... 90 90", ()), ("characters", "ééé ööö ààà ççç ñññ ååå", ("--charset", "ascii"))])
def test_text_rules(cleaned, table, rule, prompt, flags):
    path = table([{"prompt": "a red cat drinks tea" + " and three more" * ("--min-words" in flags)}, {"prompt": prompt}])
    _, dropped, _ = cleaned(path, "--text-only", *flags)
    assert dropped["rule"].to_list() == [rule]


def test_characters_are_judged_by_their_share(cleaned, table):
    good = ["a café by the sea at night", "50 % of all (red:1.2) [cats], 8k!! by the sea", "naïve façade über alles in señor's house", "a cat — “so small” … by the lake"]
    assert len(cleaned(table([{"prompt": p} for p in good]), "--text-only")[0]) == 4, "spaces, digits, marks and accents are no fault"
    assert len(cleaned(table([{"prompt": p} for p in [*good, "рыжий кот сидит на синем столе", "一 只 红 色 的 猫"]]), "--text-only", "--charset", "any", out="any")[0]) == 6


def test_repair():
    odd = ["  a\tb \n c ", "schÃ¶n", "fish &amp; chips", "a\u200bb\u00a0c\0d", None, "ﬁne", ""]
    assert clean.repair(pl.Series("p", odd)).to_list() == ["a b c", "schön", "fish & chips", "a b cd", None, "fine", ""]


def test_clip_tokens_are_exact():
    from open_clip.tokenizer import SimpleTokenizer
    rng, tokenizer = np.random.default_rng(0), SimpleTokenizer()
    words = "masterpiece trending on artstation, it's they'll (x:1.2) 1234 8k ultra-realistic café Ünïcödé 🐱🐶 猫 <|weird|> $$$ Greg Rutkowski's 'd 've ...".split()
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, 300)]
    counts = clean.clip_tokens(pl.Series("p", texts)).to_numpy()
    exact = np.array([len(tokenizer.encode(t)) + 2 for t in texts])
    short = np.array([len(t.encode()) <= 75 for t in texts])
    assert (counts[~short] == exact[~short]).all() and (counts[short] >= exact[short]).all() and (counts[short] <= 77).all() and (exact > 77).sum() > 30


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
@given(seed=st.integers(0, 9999), n=st.integers(1, 150), dim=st.sampled_from([2, 3, 16]), centres=st.integers(1, 30), noise=st.sampled_from([0, .05, .3]),
       threshold=st.sampled_from([.5, .7, .85, .99, 1.0]), block=st.sampled_from([1, 2, 7, 64, 1024]))
def test_keep_one_is_the_definition(seed, n, dim, centres, noise, threshold, block):
    """Row for row, for any block size; two dimensions and no noise make ties at the threshold, which count in float64."""
    rng = np.random.default_rng(seed)
    x = clusters(rng, n, dim, centres, noise)
    leader, cosine = clean.keep_one(x, threshold, block)
    kept = brute(x, threshold)
    assert np.flatnonzero(leader == np.arange(n)).tolist() == kept
    gone = np.setdiff1d(np.arange(n), kept)
    assert np.isin(leader[gone], kept).all() and (leader[gone] < gone).all()
    assert np.allclose(cosine[gone], (x[gone] * x[leader[gone]]).sum(1), atol=1e-6) and (cosine[gone] >= threshold - 1e-6).all()
    for i in gone:  # the nearest kept row before it, ties apart
        assert cosine[i] >= max(float(x[j] @ x[i]) for j in kept if j < i) - 1e-5


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
        guards = np.flatnonzero(split == "guard")
        assert (g[guards][:, (split == "val") | (split == "ood")].max(1) >= clean.GROUP_THRESHOLD).all(), "no row is set aside without a reason"


def test_exclude_keep_and_report(cleaned, table, tmp_path, capsys):
    a, b, c, d = prompts(4)
    path = table([{"prompt": a}, {"prompt": a + " extra"}, {"prompt": b}, {"prompt": c}, {"prompt": c.upper() + "!"}, {"prompt": d}])
    pairs, dropped, _ = cleaned(path, "--text-only")
    assert pairs["prompt"].to_list() == [a, b, c, d] and dropped["rule"].to_list() == ["near-duplicate", "exact duplicate"]
    assert dropped["kept"].to_list() == [0, 2] and dropped["kept_prompt"].to_list() == [a, c] and dropped["cosine"][0] > .85
    pairs, dropped, _ = cleaned(path, "--text-only", "--keep", "longest", out="longest")
    assert pairs["prompt"].to_list() == [a + " extra", b, c.upper() + "!", d] and dropped["kept"].to_list() == [0, 2]
    avoid = table([{"prompt": b + " words"}], "eval.csv")
    pairs, dropped, _ = cleaned(path, "--text-only", "--exclude", avoid, out="exclude")
    assert b not in pairs["prompt"] and dropped.filter(pl.col("rule") == "excluded")["cosine"].item() > .7 and len(pairs) == 3
    assert b in cleaned(path, "--text-only", "--exclude", avoid, "--exclude-threshold", .99, out="exclude2")[0]["prompt"]
    capsys.readouterr()
    with pytest.raises(SystemExit):  # nothing is written, so read_data finds nothing
        cleaned(path, "--text-only", "--threshold-report", out="report")
    report = capsys.readouterr().out
    assert not (tmp_path / "data/report").exists() and "0.85          4   <-" in report and "0.95          5" in report and repr(a + " extra") in report


def test_per_prompt(cleaned, table, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(["red", "lime", "blue", "white"][i % 4]) if i != 1 else b"broken")
    a, b = prompts(2)
    path = table([{"image": f"{i}.png", "prompt": [a, a + "!", a.upper(), a, a + " extra", b, b, a][i]} for i in range(8)])
    pairs, dropped, _ = cleaned(path, "--per-prompt", 3)
    assert [os.path.basename(o) for o in pairs["origin"]] == ["0.png", "2.png", "3.png", "5.png", "6.png"] and pairs["prompt"].to_list() == [a] * 3 + [b] * 2
    assert dropped["rule"].to_list() == ["image unreadable", "near-duplicate", "exact duplicate"] and dropped["kept"].to_list() == [None, 0, 0]
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
    path = table([{"image": n, "prompt": w} for n, w in zip(["cut.png", "page.png", "plain.png", "bomb.bmp", "none.png"], words)]
                 + [{"image": "late.png", "prompt": words[0]}, {"image": "", "prompt": words[5]}])
    pairs, dropped, _ = cleaned(path)
    assert dropped["rule"].to_list() == ["image unreadable", "image unreadable", "image blank", "image too large", "image missing", "image unreadable"] or \
        dropped["rule"].to_list()[:5] == ["image unreadable", "image unreadable", "image blank", "image too large", "image missing"]
    assert pairs["prompt"].to_list() == [words[0]], "a prompt is not lost to a broken picture when another row has a good one"
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
    assert deep.size == (80, 64) and clear.size == (100, 140) and pairs.select("width", "height").rows() == [(80, 64), (500, 700)]
    assert clear.getpixel((50, 70)) == (255, 255, 255), "alpha on white" 
    assert 100 < np.asarray(deep).mean() < 150, "16 bits are scaled, not clipped"
    pairs, _, _ = cleaned(path, "--link", out="linked")
    assert all((tmp_path / "data/linked" / i).is_symlink() for i in pairs["image"]) and pairs["image"][0].endswith(".png")
    fails(cleaned, pack(tmp_path / "z.zip", {"a.png": png(), "a.txt": prompts(1)[0].encode()}), "--link", match="--link")
