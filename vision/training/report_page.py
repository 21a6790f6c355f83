"""The frame of report.html: styles for light and dark screens and for print, and a script that sorts tables.

The page refers to no other file, font or address. Without JavaScript only the sorting is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d1d9e0; --ground: #fff; --card: #f6f8fa;
  --bar: #b6d4f5; --good: #1a7f37; --bad: #cf222e; --open: #9a6700; --warn: #fff8c5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --ground: #0d1117;
  --card: #151b23; --bar: #1f4a7a; --good: #3fb950; --bad: #f85149; --open: #d29922; --warn: #3a3000; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 0.6rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
p { margin: 0.5rem 0; overflow-wrap: anywhere; }
.state { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.tiles { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 1rem 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.9rem; }
dt { color: var(--soft); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
nav { font-size: 0.9rem; }
a { color: var(--soft); margin-right: 0.8rem; }
.warnings { background: var(--warn); border: 1px solid var(--open); border-radius: 6px; padding: 0.6rem 2rem; }
.warnings li { overflow-wrap: anywhere; }
figure { margin: 0.8rem 0; break-inside: avoid; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: 0.9rem; color: var(--soft); }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th { text-align: left; cursor: pointer; white-space: nowrap; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0.3rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: break-word; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.share { background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share)); min-width: 7rem; }
summary { cursor: pointer; color: var(--soft); padding: 0.3rem 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.8rem;
  overflow-x: auto; margin: 0.2rem 0 0.8rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: 0.85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } pre { white-space: pre-wrap; }
  .share { print-color-adjust: exact; } nav { display: none; } }
"""

_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const column = head.cellIndex, body = head.closest("table").tBodies[0];
  const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const compare = (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
  const byNumber = (a, b) => parseFloat(value(a)) - parseFloat(value(b));
  const rows = [...body.rows], numbers = rows.every(row => row.cells[column].dataset.sort !== undefined);
  head.dataset.down = head.dataset.down === "1" ? "" : "1";
  rows.sort(numbers ? byNumber : compare);
  body.append(...(head.dataset.down ? rows.reverse() : rows));
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => part.open = true));
"""


def page(title: str, header: str, sections: Mapping[str, str]) -> str:
    """A whole HTML document. The title and the names of the sections are text; the rest is HTML already."""
    links = " ".join(f"<a href='#s{number}'>{escape(name)}</a>" for number, name in enumerate(sections))
    body = "\n".join(
        f"<section id='s{number}'><h2>{escape(name)}</h2>\n{content}</section>"
        for number, (name, content) in enumerate(sections.items())
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{header}\n<nav>{links}</nav>\n{body}\n"
        f"<footer>Written by mixerzoo from the files of the run folder.</footer>\n<script>{_SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )
