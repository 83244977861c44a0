"""The frame of a report page: style and escaping. Nothing is loaded from anywhere; scripts there are none."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Iterable, Sequence

import numpy as np
from PIL import Image

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d8dee4;--soft:#f5f7f9;--student:#0550ae;
--teacher:#b35900;--random:#6e7781;--r1:#b7e4c7;--r2:#d8f3dc;--r3:#fff3bf;--r4:#ffe0b5;--r5:#ffc9c4}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--dim:#a3abb5;--line:#353b43;--soft:#1d2126;
--student:#6cb0ff;--teacher:#ffa657;--random:#9aa4af;--r1:#1c5b37;--r2:#204a33;--r3:#54480f;--r4:#623f10;--r5:#6b2723}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.75rem;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.5rem 0 .25rem}
p{margin:.5rem 0}.dim,caption{color:var(--dim)}.lead{font-size:1.1rem}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.5rem 0}
caption{text-align:left;font-size:.9rem;padding:.25rem 0}th,td{padding:.4rem .6rem;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap}th:first-child,th.text,td.text{text-align:left}
td.text{white-space:normal;overflow-wrap:anywhere;min-width:9rem}thead th{font-size:.85rem;color:var(--dim)}
.ci{color:var(--dim);font-size:.8rem;display:block}td .big{font-weight:650;font-size:1.1rem}
.r1{background:var(--r1)}.r2{background:var(--r2)}.r3{background:var(--r3)}.r4{background:var(--r4)}
.r5{background:var(--r5)}.r1 .ci,.r2 .ci,.r3 .ci,.r4 .ci,.r5 .ci{color:inherit}
.key{color:var(--fg);display:inline-block;padding:0 .45rem;margin-right:.25rem;border-radius:.2rem;font-size:.85rem}
.swatch{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin:0 .3rem 0 .7rem;
vertical-align:-.05rem;border:1px solid var(--line)}
.strip{display:grid;grid-template-columns:9.5rem 1fr;gap:.6rem;align-items:center;margin:.35rem 0}
.strip img{width:100%;height:auto;display:block;image-rendering:pixelated;border-radius:.2rem}
.strip figcaption{font-size:.9rem;overflow-wrap:anywhere}
figure{margin:0}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:1rem}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{fill:var(--dim);font-size:10px}
svg .name{fill:var(--fg);font-size:13px}svg .rule{stroke:var(--line)}svg polyline{fill:none;stroke:var(--student);
stroke-width:1.8}svg .chance{stroke:var(--dim);stroke-dasharray:4 4}svg line.ci{stroke-width:3;stroke:var(--random)}
svg circle{fill:var(--random)}svg circle.student{fill:var(--student)}svg line.student{stroke:var(--student)}
svg circle.teacher{fill:var(--teacher)}svg line.teacher{stroke:var(--teacher)}.dots{max-width:42rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
.card{border:1px solid var(--line);border-radius:.4rem;padding:.75rem;background:var(--soft)}
.card img{width:8rem;height:auto;image-rendering:pixelated;border-radius:.2rem}.card ol{margin:.1rem 0 .5rem;
padding-left:1.4rem}.card li{font-size:.9rem}.right{font-weight:650}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.75rem;border-radius:.3rem;font-size:.8rem}
summary{cursor:pointer}
@media (max-width:40rem){.strip{grid-template-columns:1fr;gap:.15rem}th,td{padding:.35rem .4rem}h1{font-size:1.4rem}
svg .name{font-size:19px}.dots text{font-size:15px}}
@media print{body{font-size:11pt}main{max-width:none;padding:0}.card,figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}.scroll{overflow:visible}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
:root{--bg:#fff;--fg:#000;--dim:#444;--line:#bbb;--soft:#f5f7f9;--student:#0550ae;--teacher:#b35900;--random:#6e7781;
--r1:#b7e4c7;--r2:#d8f3dc;--r3:#fff3bf;--r4:#ffe0b5;--r5:#ffc9c4}}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already: `<td ...>...</td>`, or bare text for the row's heading."""
    rows = list(rows)
    wordy = [bool(rows) and i < len(rows[0]) and rows[0][i].startswith('<td class="text">') for i in range(len(head))]
    top = "".join(
        f'<th scope="col"{" class=text" if words else ""}>{escape(cell)}</th>'
        for cell, words in zip(head, wordy, strict=True)
    )
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(row[1:])}</tr>' for row in rows)
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cell(value: str, note: str = "", *, kind: str = "") -> str:
    """A number with a small note under it; both are escaped."""
    small = f'<span class="ci">{escape(note)}</span>' if note else ""
    return f'<td class="{kind}">{escape(value)}{small}</td>' if kind else f"<td>{escape(value)}{small}</td>"


def picture(array: np.ndarray, alt: str) -> str:
    """uint8 (H, W, 3) -> an <img> that holds its own PNG."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{array.shape[1]}" height="{array.shape[0]}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/png;base64,{data}">'


def strip(images: np.ndarray, name: str, alt: str, *, side: int = 64) -> str:
    """uint8 (n, H, W, 3) side by side under or beside a name; enlarged by whole pixels to about `side`."""
    grow = max(1, side // images.shape[1])
    big = images.repeat(grow, 1).repeat(grow, 2)
    joined = np.concatenate(list(big), axis=1)
    return f'<figure class="strip"><figcaption>{escape(name)}</figcaption>{picture(joined, alt)}</figure>'


def text(value: Any) -> str:
    """A cell of words."""
    return f'<td class="text">{escape(str(value))}</td>'
