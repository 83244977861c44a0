"""The report page's style sheet: light, dark, phone and print, in one place.

Text has at least 4.5:1 and lines at least 3:1 against what lies under them, in both colour schemes.
"""

from __future__ import annotations

LIGHT = """color-scheme:light;--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d8dee4;--soft:#f5f7f9;--link:#0550ae;
--c0:#0550ae;--c1:#b35900;--c2:#0f766e;--c3:#7c3aed;--c4:#b4235a;--c5:#6b6b00;--c6:#7a4a21;--none:#6e7781;
--r1:#b7e4c7;--r2:#d8f3dc;--r3:#fff3bf;--r4:#ffe0b5;--r5:#ffc9c4"""
DARK = """color-scheme:dark;--bg:#14171b;--fg:#e6e9ed;--dim:#a3abb5;--line:#353b43;--soft:#1d2126;--link:#6cb0ff;
--c0:#6cb0ff;--c1:#ffa657;--c2:#4fd1c5;--c3:#c4a7ff;--c4:#ff8fb3;--c5:#d7d15a;--c6:#d9b08c;--none:#9aa4af;
--r1:#1c5b37;--r2:#204a33;--r3:#54480f;--r4:#623f10;--r5:#6b2723"""
TONE_RULES = "".join(
    f"svg .curve.{n},svg .bar.{n}{{stroke:var({v})}}svg .dot.{n},svg .area.{n}{{fill:var({v})}}"
    for n, v in [*((f"c{i}", f"--c{i}") for i in range(7)), ("random", "--none")]
)

STYLE = (
    f":root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0;letter-spacing:-.01em}
h2{font-size:1.3rem;line-height:1.3;margin:2.75rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.75rem 0 .25rem}
p{margin:.5rem 0;max-width:46rem}.dim,caption{color:var(--dim)}.small{font-size:.875rem}.lead{font-size:1.15rem}
a{color:var(--link)}
nav ol{list-style:none;margin:1rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;font-size:.95rem}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.5rem 0}
.scroll:focus-visible,a:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;min-width:min(100%,40rem);font-variant-numeric:tabular-nums}
.heard{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
h3 .small{font-weight:400}
caption{text-align:left;font-size:.875rem;padding:.25rem 0}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:middle}
th:first-child,th.text,td.text{text-align:left}th:first-child{padding-left:0}
tbody th{font-weight:600;position:sticky;left:0;background:var(--bg)}
td.text{white-space:normal;overflow-wrap:anywhere;min-width:8rem;max-width:44rem}
thead th{font-size:.85rem;color:var(--dim);vertical-align:bottom}
.ci{color:var(--dim);font-size:.8rem;display:block}.big{font-weight:650;font-size:1.1rem}
.plot>div{display:flex;align-items:center;gap:.75rem;justify-content:flex-start;text-align:right}
.plot>div>span{min-width:5.5rem}
.r1{background:var(--r1)}.r2{background:var(--r2)}.r3{background:var(--r3)}.r4{background:var(--r4)}
.r5{background:var(--r5)}.r1 .ci,.r2 .ci,.r3 .ci,.r4 .ci,.r5 .ci{color:inherit}
.key{color:var(--fg);display:inline-block;padding:0 .45rem;margin:0 .25rem .25rem 0;border-radius:.2rem;
font-size:.85rem}
.swatch{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin-right:.35rem;
vertical-align:-.05rem;border:1px solid var(--line)}
.legend{list-style:none;margin:.25rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem}
.legend svg{display:inline-block;margin-right:.4rem;vertical-align:middle}
figure{margin:0}figcaption{font-size:.9rem;overflow-wrap:anywhere}
.strip{display:grid;grid-template-columns:9.5rem 1fr;gap:.6rem;align-items:center;margin:.35rem 0}
.strip img{width:100%;height:auto;display:block;image-rendering:pixelated;border-radius:.2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1.5rem 1.25rem}
.chart figcaption{font-weight:600}
svg{height:auto;display:block;overflow:visible;max-width:100%}.chart svg:not(.sample){width:100%}
@media (min-width:62rem){.beside{display:grid;grid-template-columns:minmax(0,29rem) minmax(0,1fr);gap:1rem;
align-items:center}.beside table{min-width:0}}
.strip-plot,.strip-axis{max-width:none;flex:none}
.radar{max-width:36rem}.radar>svg{width:100%}.radar .legend{justify-content:center}
svg text{fill:var(--dim);font-size:11px}svg .name{fill:var(--fg);font-size:14px}
svg .tick{paint-order:stroke;stroke:var(--bg);stroke-width:4px}
svg .rule{stroke:var(--line)}svg .ring{fill:none;stroke:var(--line)}
svg .chance{stroke:var(--dim);stroke-dasharray:3 3}
svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}svg .bar{stroke-width:3}svg .area{fill-opacity:.12}
"""
    + TONE_RULES
    + """
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(14.5rem,100%),1fr));gap:1rem}
.wide{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(27rem,100%),1fr));gap:1rem}
.card{border:1px solid var(--line);border-radius:.4rem;padding:.75rem;background:var(--soft);min-width:0}
.card img{width:100%;height:auto;display:block;border-radius:.2rem}.card p{margin:.35rem 0;font-size:.95rem;
overflow-wrap:anywhere}.card>img{max-width:8rem}.card img.tiny,.boxes img.tiny{image-rendering:pixelated}
.card ol{margin:.1rem 0 .5rem;padding-left:1.4rem}.card li{font-size:.9rem;overflow-wrap:anywhere}
.card .right{font-weight:650}
.query{display:grid;grid-template-columns:6.5rem 1fr;gap:.75rem;align-items:start}
.near{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:.4rem;list-style:none}
.card .near{margin:.1rem 0 .6rem;padding:0}.card .near li{font-size:.75rem;line-height:1.25}.near .dim{display:block}
.boxes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(9rem,45%),1fr));gap:.75rem;
margin:.5rem 0 1.25rem}
.boxes .frame{position:relative}.boxes img{width:100%;height:auto;display:block;border-radius:.2rem}
.boxes svg{position:absolute;inset:0;width:100%;height:100%}
.boxes rect{fill:none;stroke-width:2.5;vector-effect:non-scaling-stroke}
svg rect.truth{stroke:#fff}.boxes .under{stroke:#000;stroke-width:4.5;stroke-opacity:.6}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.75rem;border-radius:.3rem;font-size:.8rem}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--link)}
@media (max-width:40rem){.strip{grid-template-columns:1fr;gap:.1rem}th,td{padding:.35rem .45rem}h1{font-size:1.5rem}
h2{margin-top:2.25rem}.lead{font-size:1.05rem}svg .name{font-size:17px}.radar svg text{font-size:19px}
.query{grid-template-columns:1fr}.query>div:first-child{display:grid;grid-template-columns:6rem 1fr;gap:.75rem}}
@media print{body{font-size:10pt}main{max-width:none;padding:0}nav{display:none}
.card,figure,tr,.boxes{break-inside:avoid}h2,h3,h2+p,h3+p{break-after:avoid}.scroll{overflow:visible}
th,td{padding:.25rem .35rem}td.text{min-width:0}.ci{font-size:.75rem}table{font-size:.85rem}
tbody th{position:static;white-space:normal}thead th{white-space:normal}
details::details-content{content-visibility:visible;block-size:auto}details:not(.long) summary{list-style:none}
details.long{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
"""
    + f":root{{{LIGHT};--fg:#000;--dim:#444;--line:#bbb}}}}\n"
)
