"""The report that the site shows as an example: the default study on scenes, as it was run.

The study takes minutes and its folder megabytes, so neither stands in the repository. Kept is the finished page, packed
(`nbs/results/study_scenes_report.html.xz`): without its style, which is that of `capnb.core.page`, and without its pictures,
which are scenes and are drawn again. `page()` puts it together, `picture()` draws from it what the README shows.
`python .ci/example_report.py STUDY/index.html` packs another finished page.
"""
import base64, html, io, lzma, re, sys, textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKED = ROOT / "nbs/results/study_scenes_report.html.xz"
STYLE = re.compile(r"<style>.*?</style>", re.S)
PICTURE = re.compile(r'src="(?:data:image[^"]*)?" alt="(\w+) image (\w+)-(\w+)-(\d+)-(\d+):')  # of the domain, and the scene's id


def style() -> str:
    "The style of every page of capnb."
    from capnb.core.page import Page, page_html
    return STYLE.search(page_html(Page("")))[0]


def scene_uri(domain: str, split: str, seed: int, i: int) -> str:
    "Scene `i` as the address of a picture."
    from capnb.data.scenes import Scenes
    out = io.BytesIO()
    Scenes(domain, i + 1, split=split, seed=seed)[i].load_image().save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def body() -> str: return lzma.decompress(PACKED.read_bytes()).decode()


def page() -> str:
    "The whole report, one file."
    drawn = lambda m: m[0].replace('src=""', f'src="{scene_uri(m[2], m[3], int(m[4]), int(m[5]))}"', 1)
    return PICTURE.sub(drawn, body().replace("<style></style>", style(), 1))


def pack(report: Path) -> None:
    "Keep the finished `report`."
    text = STYLE.sub("<style></style>", report.read_text(encoding="utf-8"), count=1)
    PACKED.write_bytes(lzma.compress(re.sub(r'src="data:image[^"]*"', 'src=""', text).encode(), preset=9 | lzma.PRESET_EXTREME))


LOOK = """svg{color:#21252b;--ground:#fdfdfb}.halo{paint-order:stroke;stroke:var(--ground);stroke-width:4px}text{font-family:system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{color:#e7e6e1;--ground:#15171b}}"""


def picture() -> str:
    "What the report answers and its picture, as one SVG: title, question, gained, not forgotten; gain against retention."
    text = body()
    plain = lambda s: html.unescape(re.sub("<[^>]*>", "", s))
    find = lambda pattern: re.search(pattern, text, re.S)[1]
    answers = {plain(h): re.findall("<p>(.*?)</p>", ps) for h, ps in re.findall(r"<h3>([^<]*)</h3>((?:<p>.*?</p>)+)", find('<div class="answer">(.*?)</div>'))}
    lines, y = [], 30
    def put(words, size, width, weight=400):
        nonlocal y
        for line in textwrap.wrap(words, width):
            lines.append(f'<text x="16" y="{y}" font-size="{size}" font-weight="{weight}">{html.escape(line)}</text>')
            y += round(size * 1.4)
        y += 4
    put(plain(find("<h1>(.*?)</h1>")), 22, 50, 600)
    put(plain(find('<p class="lead">(.*?)</p>')), 14, 64)
    for head in ("Gained", "Not forgotten"):
        y += 5
        put(head, 14, 60, 600)
        for p in answers[head]: put(plain(p).split(" The base")[0], 12.5, 68)
    plot = find("(<svg class=\"plot.*?</svg>)").replace("<svg ", f'<svg x="500" y="20" width="460" height="320" ', 1)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {y}" fill="currentColor"><style>{LOOK}</style>'
            f'<rect width="980" height="{y}" fill="var(--ground)"/>{"".join(lines)}{plot}</svg>\n')


if __name__ == "__main__": sys.path.insert(0, str(ROOT)); pack(Path(sys.argv[1]))
