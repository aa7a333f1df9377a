"""
The demo that clean.py draws and cleans when it gets no INPUT: a small synthetic set of images with prompts, with known
corrupted rows among them. Drawn once into data/demo-raw, reproducible to the byte from the seed.
"""
import json
import random
import re
import struct
import sys

import polars as pl
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from clean import atomic, encode_cached, keep_one, remove

NOUNS = """☀ sun|☁ cloud|☂ umbrella|☃ snowman|☄ comet|★ star|☎ telephone|☘ shamrock|☠ skull|☢ radiation sign
☣ biohazard sign|☥ egyptian ankh|☪ islamic crescent|☭ hammer and sickle|☮ peace sign|☯ yin yang|☸ dharma wheel
☹ sad face|☺ happy face|☽ crescent moon|♀ female symbol|♂ male symbol|♄ planet saturn|♆ trident|♈ aries ram
♊ gemini twins|♌ leo lion|♍ virgo maiden|♎ libra balance|♏ scorpion|♐ archer's arrow|♓ pisces fishes|♚ king
♛ queen's crown|♜ castle tower|♝ bishop|♞ horse|♟ pawn|♠ spade|♥ heart|♦ diamond|♣ clover|♨ hot spring|♪ musical note
♻ recycling arrows|♿ wheelchair|⚀ gambling die|⚑ flag|⚒ hammer|⚓ anchor|⚔ crossed swords|⚖ scales of justice|⚗ alembic
⚘ tulip|⚙ gear|⚛ atom|⚜ fleur-de-lis|⚠ warning triangle|⚡ lightning bolt|⚭ wedding rings|⚰ coffin|⚱ urn|✂ scissors
✇ tape reel|✈ airplane|✉ envelope|✌ peace fingers|✍ writing hand|✎ pencil|✒ fountain pen|✓ check mark|✗ cross mark
✠ maltese cross|✡ star of david|✪ sheriff badge|✱ asterisk|✿ blossom|❄ snowflake|❝ quotation mark|❢ exclamation mark
❦ ivy leaf|☕ cup of coffee|☞ pointing finger|⌂ house|⌨ keyboard|⏏ eject button|🐭 mouse|🐮 cow|🐱 cat|🐵 monkey|😇 angel
😈 devil|😎 man in sunglasses|😭 crying baby|😱 screaming face|😴 sleeping person|😷 doctor in a mask|😡 angry man|😍 lover
😋 hungry boy|😘 kiss|∞ infinity loop|∫ integral|≈ water ripple|▲ pyramid|□ square window|○ ring|⬢ hexagon|➔ arrow
↻ reload arrow|€ euro|£ british pound|¥ japanese yen|$ dollar|& ampersand|@ email sign|# hashtag|% percent
? question mark|© copyright|Ω omega|π pi|λ lambda|א hebrew aleph|† dagger|7 number seven|8 number eight"""
COLOURS = "red orange yellow green teal blue purple pink brown gray black white".split()
SIZES = {"tiny": 0.24, "small": 0.34, "large": 0.48, "huge": 0.62}
PLACES = {  # name: where the first two things are
    "above": ((.5, .27), (.5, .73)), "below": ((.5, .73), (.5, .27)), "beside": ((.27, .5), (.73, .5)),
    "behind": ((.4, .4), (.58, .58)), "inside": ((.5, .5), (.5, .5))}
SCENES = {  # name: colour behind; draw_scene draws the rest
    "a starry night sky": "#0b1030", "a checkerboard floor": "white", "zebra stripes": "white",
    "a green meadow": "#6fbf4a", "a desert at sunset": "#f29b5b", "a blue ocean": "#2b6fb5", "a brick wall": "#a6452f",
    "polka dot wallpaper": "#f7c6d9", "thick fog": "#c9ccd1", "snowy hills": "#a9d4f2", "a rainbow": "#d9ecff",
    "a rainy window": "#66788a", "a city skyline": "#33264d", "stage curtains": "#8a1020", "graph paper": "#fdfdf5",
    "burning flames": "#3a0a00"}
STYLES = ["pencil sketch", "neon glow", "blurry photo", "pixel art", "tile mosaic", "comic book", "embossed metal",
          "watercolor", "framed poster", "old photograph", "oval portrait", "flat vector art"]


def draw_scene(scene, s, rng):
    """A background of s x s pixels for one of SCENES, drawn in strips of w pixels: strip i begins at pixel a."""
    image, w = Image.new("RGB", (s, s), SCENES[scene]), max(6, s // 8)
    draw = ImageDraw.Draw(image)
    for i, a in enumerate(range(0, s, w)):
        other = range(i % 2 * w, s, 2 * w)  # every other place along the strip, as bricks lie
        if scene == "a starry night sky":
            for x, y in dots(rng, s, 6):
                draw.rectangle((x, y, x + 1, y + 1), fill="#fff8c0")
        elif scene == "a checkerboard floor":
            for j in other:
                draw.rectangle((j, a, j + w - 1, a + w - 1), fill="#222222")
        elif scene == "zebra stripes":
            draw.line((2 * a - s, 0, 2 * a, s), fill="black", width=w // 2)
        elif scene == "a green meadow":
            for x, y in dots(rng, s, 9):
                draw.line((x, y, x + 2, y - 6), fill="#2f7d1f")
        elif scene == "a desert at sunset":
            draw.rectangle((0, a, s, a + w), fill="#d9b36c" if a > s * .6 else (250 - 2 * a, 110 + a, 90))
        elif scene == "a blue ocean":
            for j in range(0, s, w):
                draw.arc((j, a, j + w, a + w), 0, 180, fill="#a8dcff")
        elif scene == "a brick wall":
            draw.line((0, a, s, a), fill="#e6d9c9")
            for j in other:
                draw.line((j, a, j, a + w), fill="#e6d9c9")
        elif scene == "polka dot wallpaper":
            for j in range(i % 2 * w // 2, s, 2 * w):
                draw.ellipse((j, a, j + w * .7, a + w * .7), fill="white")
        elif scene == "thick fog":
            left, right = rng.randrange(-s, s), rng.randrange(s, 2 * s)
            draw.ellipse((left, a, right, a + s // 3), fill=(215 + i, 217 + i, 220 + i))
        elif scene == "snowy hills":
            draw.ellipse((a - s // 3, s * .55 + i % 3 * 5, a + s // 3, s * 1.4), fill="white", outline="#8fb3cc")
        elif scene == "a rainbow":
            bow = i * 4 - 8, i * 4 + 4, s + 8 - i * 4, 2 * s - i * 4
            draw.arc(bow, 180, 360, width=4, fill=COLOURS[i % 6])
        elif scene == "a rainy window":
            for x, y in dots(rng, s, 6):
                draw.line((x, y, x - 3, y + 9), fill="#c4d8ea")
        elif scene == "a city skyline":
            top = rng.randrange(s // 4, s * 3 // 4)
            draw.rectangle((a, top, a + w - 2, s), fill="#14101f")
            draw.point([(x, y) for y in range(top + 3, s, 6) for x in (a + 2, a + w - 5)], fill="#ffd95a")
        elif scene == "stage curtains":
            draw.rectangle((a, 0, a + w // 2, s), fill="#c4293b")
        elif scene == "graph paper":
            draw.line((0, a, s, a), fill="#9cc3e6")
            draw.line((a, 0, a, s), fill="#9cc3e6")
        elif scene == "burning flames":
            top = rng.randrange(s // 5, s // 2)
            draw.polygon([(a - w, s), (a + w // 2, top), (a + 2 * w, s)], fill="#ff7a00")
            draw.polygon([(a - w / 2, s), (a + w // 2, top + s // 3), (a + w, s)], fill="#ffd21f")
    return image


def dots(rng, s, n):
    return [(rng.randrange(s), rng.randrange(s)) for _ in range(n)]


def apply_style(image, style):
    """Redraw an image in one of STYLES; colours stay recognisable."""
    def plain(colour):
        return Image.new("RGB", image.size, colour)

    s = image.width
    edges = ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES))
    if style == "pencil sketch":
        return Image.blend(Image.blend(image, plain("white"), .45), edges.convert("RGB"), .45)
    if style == "neon glow":
        dark, bright = image.point(lambda v: v // 3), image.point(lambda v: min(255, v + 110))
        return Image.composite(dark, bright, edges.filter(ImageFilter.BoxBlur(1)))
    if style == "blurry photo":
        return image.filter(ImageFilter.GaussianBlur(s / 50))
    if style == "pixel art":
        return image.resize((s // 3, s // 3), Image.BOX).resize((s, s), Image.NEAREST)
    if style == "tile mosaic":
        image = image.resize((s // 4, s // 4), Image.BOX).resize((s, s), Image.NEAREST)
        for a in range(0, s, 4):
            ImageDraw.Draw(image).line((0, a, s, a), fill="#dddddd")
            ImageDraw.Draw(image).line((a, 0, a, s), fill="#dddddd")
    if style == "comic book":
        image = Image.composite(ImageOps.posterize(image, 2), plain("black"), edges.point(lambda v: 255 * (v > 150)))
        ImageDraw.Draw(image).rectangle((0, 0, s - 1, s - 1), outline="black", width=max(3, s // 16))
    if style == "embossed metal":
        return Image.blend(image, image.filter(ImageFilter.EMBOSS), .55)
    if style == "watercolor":
        return Image.blend(image.filter(ImageFilter.ModeFilter(5)), plain("white"), .3)
    if style == "framed poster":
        ImageDraw.Draw(image).rectangle((0, 0, s - 1, s - 1), outline="white", width=max(3, s // 16))
    if style == "old photograph":
        return Image.blend(image, ImageOps.colorize(image.convert("L"), "#2b1a08", "#f2dfb8"), .6)
    if style == "oval portrait":
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).ellipse((1, 1, s - 2, s - 2), fill=255)
        return Image.composite(image, plain("#4a3320"), mask)
    return image


def draw_image(things, place, scene, style, s, rng, font):
    """things: [(glyph, colour, size name), ...], one to three -> an RGB image of s x s pixels."""
    image = draw_scene(scene, s, rng)
    spots = [*PLACES[place], (.8, .8)]
    scales = (.8, 1.35, 1) if place == "inside" else (1, 1, 1)
    for i in ([1, 0, 2] if place == "inside" else [0, 1, 2])[:len(things)]:  # who is painted first is covered
        glyph, colour, size = things[i]
        pen = font.font_variant(size=max(10, round(SIZES[size] * scales[i] * s)))
        x, y = ((at + rng.uniform(-.03, .03)) * s for at in spots[i])
        rim = "white" if colour not in ("white", "yellow", "pink") else "black"  # so that no scene swallows a thing
        ImageDraw.Draw(image).text((x, y), glyph, font=pen, fill=colour, anchor="mm", stroke_width=1, stroke_fill=rim)
    return apply_style(image, style)


def invent(rng, nouns):
    """-> (prompt, things, place, scene, style): a prompt and what draw_image draws for it."""
    picks = rng.sample(nouns, rng.choice([2, 2, 3]))
    place, scene, style = rng.choice(list(PLACES)), rng.choice(list(SCENES)), rng.choice(STYLES)
    things = [(glyph, rng.choice(COLOURS), rng.choice(list(SIZES))) for glyph, _ in picks]
    words = [f"a {size} {colour} {noun}" for (_, noun), (_, colour, size) in zip(picks, things)]
    what = f"{words[0]} {place} {words[1]}" + (f" and {words[2]}" if len(words) > 2 else "")
    prompt = rng.choice([f"{what}, {scene}, {style}", f"{style} of {what} with {scene}",
                         f"{scene} and {what}, {style}", f"{what} in front of {scene}, {style}"])
    return prompt, things, place, scene, style


def draw_demo(folder, rows=5600, corrupted=800, seed=0):
    """Draw images with prompts into folder/ -> path of prompts.csv, with image, prompt and `rule`: the rule that must
    drop the row (empty: it must survive; "(...)": corrupted in a way that must survive). `corrupted` more rows: 5 in 16
    exact duplicates, 5 in 16 near-duplicates, the rest of every other kind. What is there already is not drawn again;
    demo.json marks the folder as ours, and prompts.csv, written last, as finished."""
    made = {"rows": rows, "corrupted": corrupted, "seed": seed}
    if folder.exists():
        mark = json.loads((folder / "demo.json").read_text()) if (folder / "demo.json").is_file() else None
        if mark == made and (folder / "prompts.csv").is_file():
            return folder / "prompts.csv"
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
        files = [f for f in files if not re.fullmatch(r"\.[^/]+\.\d+\.tmp", f)]  # of a killed run
        if files and mark is None or not all(re.fullmatch(r"images/\d{5}\.\w+|prompts\.csv|demo\.json", f) for f in files):
            sys.exit(f"{folder}: not drawn by the demo, or with other files in it; move it away, or choose another --out")
        remove(folder, ["demo.json"])
    (folder / "images").mkdir(parents=True)
    with atomic(folder / "demo.json", "w") as f:
        json.dump(made, f)
    from matplotlib import get_data_path
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 20)
    nouns = [entry.split(" ", 1) for entry in NOUNS.replace("\n", "|").split("|")]
    rng, table = random.Random(seed), []

    # invent more than are needed and leave out what the encoder finds alike, so that exactly the planted rows are dropped
    need = rows + corrupted * 3 // 8
    invented = [invent(rng, nouns) for _ in range(need * 9 // 8 + 20)]
    leader, _ = keep_one(encode_cached([w[0] for w in invented], cache=folder.parent / ".cache"), 0.83)
    invented = [w for i, w in enumerate(invented) if leader[i] == i][:need]
    if len(invented) < need:
        sys.exit(f"the demo has no {need:,} images with different prompts; ask for fewer")
    images = ((prompt, draw_image(*what, rng.randrange(64, 97), rng, font)) for prompt, *what in invented)

    def add(prompt, rule="", image=None, suffix=".png", kind="PNG", quality=75):
        path = folder / f"images/{len(table):05d}{suffix}"
        table.append((f"images/{path.name}", prompt, rule))
        if image is not None:
            image.save(path, kind, quality=quality)
        return path

    # clean rows; one image in ten lies about its extension or is not plain RGB, and must survive
    for i in tqdm(range(rows), desc="drawing", unit="image", disable=rows < 1000):
        prompt, image = next(images)
        if i % 40 == 0:
            add(prompt, "(rgba)", image.convert("RGBA"))
        elif i % 40 == 10:
            add(prompt, "(palette)", image.quantize(64))
        elif i % 40 == 20:
            add(prompt, "(grey)", image.convert("L"))
        elif i % 40 == 30:
            add(prompt, "(wrong extension)", image, ".jpg")
        else:
            add(prompt, "", image)

    # duplicates, exact and near by turns
    for i, (file, prompt, _) in enumerate(rng.sample([row for row in table if not row[2]], corrupted * 5 // 8)):
        image = Image.open(folder / file).convert("RGB")
        if i % 2:
            spaced, marked = f"  {prompt.replace(' ', '   ')}\t", f"{prompt.replace(',', ' ;')} !!"
            add([prompt.upper(), spaced, marked, prompt.title()][i // 2 % 4], "exact duplicate", image)
        else:
            swapped = prompt.replace(" and ", " with ") + " image"
            add([f"a picture of {prompt}", f"{prompt}, high quality", swapped][i // 2 % 3], "near-duplicate", image)

    # every other kind by turns
    blank = "", "   ", "NaN", "null", "nan"
    foreign = ("一只红色的猫 坐在 蓝色 的 桌子 上 , 水彩 画", "рыжий кот сидит на синем столе у окна",
               "قطة حمراء تجلس على طاولة زرقاء كبيرة", "a 🐱 and a 🐶 on a 🐭 🐹 🐰 🦊 🐻 🐼")
    bomb = struct.pack("<2sIIIIIIHH24x", b"BM", 54, 0, 54, 40, 60_000, 60_000, 1, 24)  # claims 60000 x 60000 pixels
    for i in range(corrupted * 3 // 8):
        prompt, image = next(images)
        n, kind = divmod(i, 12)
        path = add(*[
            (" ".join(prompt.split()[:3]), "too short", image), (", ".join([prompt] * 8), "too long", image),
            (f"{prompt}, seed {'0123456789' * 8}", "too many tokens", image), (blank[n % 5], "blank", image),
            (foreign[n % 4], "characters", image), (prompt, "image unreadable", image), (prompt, "image unreadable"),
            (prompt, "image missing"), (prompt, "image too large"),
            (prompt, "image blank", Image.new("RGB", image.size, COLOURS[n % 12])),
            *[(prompt, "(wrong extension)", image, ".webp", "JPEG", 95)] * 2][kind])
        if kind == 5:
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])  # truncated
        elif kind == 6:
            path.write_text("<html>404 not found</html>")
        elif kind == 8:
            path.write_bytes(bomb)
    with atomic(folder / "prompts.csv") as f:
        f.write(pl.DataFrame(table, schema=["image", "prompt", "rule"], orient="row").write_csv().encode())
    return folder / "prompts.csv"
