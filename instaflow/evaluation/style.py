"""The page's style: system fonts, light and dark, narrow screens, print."""

# slot 0 is the teacher's; the same slots in svg.marker, so that shape and colour say the same
LIGHT = ("#59636f", "#0b6cb3", "#cc4a0a", "#0a8566", "#8656ad", "#9a7100", "#b83a72")
DARK = ("#a9b4c0", "#5ab0f0", "#ff8d52", "#3fc79f", "#c29ae6", "#dcb041", "#f083b4")

SLOTS = 4 * len(LIGHT)
"""Of models on a page that can be told apart: four shapes of each colour."""

_LIGHT = """
  --page: #fbfaf8; --panel: #ffffff; --ink: #1c2024; --soft: #5c646d; --line: #dfe1e3; --grid: #ecedee;
  --best: #e7f1e4; --bell: #e4e7ea; --idle: #b9bfc5; --shade: #d5d8db; color-scheme: light;"""
_DARK = """
  --page: #15181b; --panel: #1d2125; --ink: #e8eaec; --soft: #a3abb3; --line: #363c42; --grid: #2a2f34;
  --best: #263a2a; --bell: #31373d; --idle: #59626b; --shade: #0d1012; color-scheme: dark;"""


def _palette(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


STYLE = (
    f":root {{{_LIGHT} {_palette(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK} {_palette(DARK)} }} }}\n"
    + "\n".join(f".c{i} {{ --c: var(--c{i % len(LIGHT)}); }}" for i in range(SLOTS))
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 4px; letter-spacing: -0.015em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 56px 0 8px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0 0 4px; }
section > h3 { margin: 24px 0 8px; }
p { margin: 0 0 12px; max-width: 70ch; }
b { font-weight: 600; }
p, li, figcaption, .cards > div { overflow-wrap: anywhere; }
.soft, figcaption, .protocol dt { color: var(--soft); }
.small, figcaption { font-size: 0.86rem; line-height: 1.45; }
figcaption { margin-top: 6px; max-width: 70ch; }
.lead { font-size: 1.2rem; line-height: 1.45; margin: 20px 0 20px; }
.panel, .cards > div { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
figure { margin: 16px 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin: 16px 0; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 16px; margin: 16px 0; }
.two > *, .three > * { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; }
.after { margin-top: 12px; }
.cards .value { font-size: 1.55rem; line-height: 1.2; font-weight: 600; letter-spacing: -0.02em; }
.cards .label { font-size: 0.86rem; }

svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
text.tick, text.note { fill: var(--soft); }
text.tick { font-size: 11.5px; }
text.note { font-size: 11px; paint-order: stroke; stroke: var(--panel); stroke-width: 4px; }
text.axis { fill: var(--ink); }
path { fill: none; }
.grid { stroke: var(--grid); } .frame { stroke: var(--soft); stroke-opacity: 0.6; }
.rule { stroke: var(--soft); stroke-dasharray: 4 4; }
.line { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; stroke-opacity: 0.35; }
.thin { stroke: var(--c); stroke-width: 1.3; stroke-opacity: 0.85; }
.dot { fill: var(--c); stroke: var(--panel); stroke-width: 1.2; }
.chord { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
.start { fill: var(--panel); stroke: var(--soft); stroke-width: 1.4; }
.end { fill: var(--c); stroke: var(--panel); stroke-width: 1; }
.step { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; }
.cross { stroke: var(--ink); stroke-width: 1.8; }
.bell { fill: var(--bell); }

.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 12px 0 0;
  padding: 0; font-size: 0.9rem; }
.panel .legend { margin: 0 0 10px; }
.legend svg { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; margin-right: 5px; }

/* A shade at the right edge, hidden by what scrolls with the table once its end is reached. */
.scroll { overflow-x: auto; background-repeat: no-repeat; background-position: right;
  background-image: linear-gradient(to left, var(--panel) 50%, transparent),
    linear-gradient(to left, var(--shade), transparent);
  background-size: 48px 102%, 16px 99%; background-attachment: local, scroll; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); font-size: 0.82rem; line-height: 1.25; vertical-align: bottom; }
th.wrap { white-space: normal; min-width: 84px; }
th:first-child, td:first-child, .left { text-align: left; }
thead th { border-bottom: 1px solid var(--line); }
.many { font-size: 0.78rem; } .many th { font-size: 0.7rem; } .many th, .many td { padding: 5px 4px; }
@media screen and (min-width: 1100px) { .panel:has(.many) { margin: 0 -48px; } }
@media screen and (min-width: 1240px) { .panel:has(.many) { margin: 0 -100px; } }
.many th.wrap { min-width: 44px; } .many :is(.best, .near) { padding: 1px 4px; margin: 0 -4px; }
tr.new td { border-top: 1px solid var(--line); }
td svg { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; margin-right: 6px; }
.ranked td { border-top: 1px solid var(--grid); vertical-align: baseline; }
.ranked td:first-child, .ranked th:first-child { padding-left: 0; }
.ranked td:nth-child(2), .ranked th.left { text-align: left; }
.ranked .group th { text-align: left; padding-top: 14px; } .group span { position: sticky; left: 0; }
td small { display: block; font-size: 0.86em; line-height: 1.2; color: var(--soft); }
.near { background: var(--best); border-radius: 5px; padding: 1px 6px; margin: 0 -6px; }
.best { background: var(--best); border-radius: 5px; padding: 1px 6px; margin: 0 -6px; font-weight: 700; }

.gallery { display: grid; grid-template-columns: 152px repeat(var(--n), minmax(0, 1fr));
  gap: 4px 5px; align-items: center; }
.gallery .head { font-size: 0.72rem; line-height: 1.2; color: var(--soft); align-self: end;
  padding-bottom: 4px; overflow-wrap: anywhere; }
.gallery .number { display: none; }
.gallery .text { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 10; overflow: hidden; }
.name span { white-space: nowrap; }
.name, .stage b { overflow-wrap: anywhere; }
.gallery .name { font-size: 0.9rem; line-height: 1.25; }
.gallery .gap { grid-column: 1 / -1; height: 5px; }
.gallery img, .gaps img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px;
  aspect-ratio: 1; object-fit: contain; }
ol.prompts { display: none; }
.name svg { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; margin-right: 5px; }

.story { list-style: none; counter-reset: part; margin: 16px 0; padding: 0; display: grid; gap: 14px; }
.story > li { counter-increment: part; display: grid; grid-template-columns: 40px 1fr; }
.story > li::before { content: counter(part); font-size: 1.35rem; line-height: 1.2; color: var(--soft);
  font-weight: 600; }
.story p { margin: 0 0 6px; }
.found { border-left: 3px solid var(--c, var(--line)); padding-left: 12px; }

.gaps { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 14px 12px; }
.gaps .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.gaps figure { margin: 0; } .gaps figcaption { font-size: 0.78rem; line-height: 1.3; }

.strip { margin: 0 0 10px; }
.strip div { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 2px; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: 2px; }
.strip figcaption { margin-top: 2px; font-size: 0.78rem; }
details { margin: 16px 0; } summary { cursor: pointer; font-weight: 500; padding: 6px 0; }
details h3 { margin: 18px 0 6px; }

.stage { display: grid; grid-template-columns: 130px 1fr 92px; gap: 0 14px; padding: 7px 0;
  border-top: 1px solid var(--line); align-items: baseline; }
.stage:first-child { border-top: 0; }
.stage .took { text-align: right; font-variant-numeric: tabular-nums; }
.track { height: 8px; border-radius: 4px; background: var(--grid); margin: 4px 0; position: relative; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 4px;
  background: var(--c, var(--idle)); }
.protocol { display: grid; grid-template-columns: 190px 1fr; gap: 4px 16px; margin: 0; font-size: 0.9rem; }
.protocol dd { margin: 0; overflow-wrap: anywhere; }
.protocol.aims { grid-template-columns: 1fr 1fr; }

@media (max-width: 720px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 1.6rem; } h2 { margin-top: 44px; } .lead { font-size: 1.08rem; }
  .two, .three { grid-template-columns: minmax(0, 1fr); }
  .panel { padding: 12px; }
  svg text { font-size: 14px; } text.tick { font-size: 13px; } text.note { font-size: 13px; }
  .cards { grid-template-columns: 1fr 1fr; } .cards .value { font-size: 1.35rem; }
  .gallery { grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 3px; }
  .gallery .name { grid-column: 1 / -1; margin-top: 8px; } .gallery .corner, .gallery .gap { display: none; }
  .gallery .head { text-align: center; padding: 0; } .gallery .text { display: none;
  } .gallery .number { display: inline; }
  ol.prompts { display: block; font-size: 0.86rem; color: var(--soft); margin: 12px 0 0; padding-left: 22px; }
  :is(td, th):first-child, .ranked :is(td, th):nth-child(2) { position: sticky; left: 0; background: var(--panel); }
  td:first-child, .ranked td.name { white-space: normal; overflow-wrap: anywhere; min-width: 112px; max-width: 40vw; }
  .ranked :is(td, th):first-child { position: static; background: none; min-width: 0; }
  .ranked td.name { min-width: 126px; } .ranked td.name svg { float: left; margin-top: 3px; }
  th, td { padding: 5px 9px; }
  .stage { grid-template-columns: 1fr auto; } .stage .what { grid-row: 2; grid-column: 1 / -1; }
  .story > li { grid-template-columns: 28px 1fr; }
  .protocol, .protocol.aims { grid-template-columns: 1fr; } .protocol dd { margin-bottom: 8px; }
}
@media print {
  html { font-size: 10.5pt; } body { background: #fff; font-size: 10.5pt; } main { max-width: none; padding: 0; }
  .panel, .cards > div, .story > li, .stage, .gaps figure, figure { break-inside: avoid;
  } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; background: none; } table { font-size: 0.8rem; }
  th, td { padding: 3px 5px; } th.wrap { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
