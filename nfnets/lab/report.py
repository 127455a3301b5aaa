"""The report: one HTML file with everything in it, made of the records and pictures that lie in a directory."""

import base64
import html
import pathlib
import shlex
from typing import Any

from nfnets.files import write_file
from nfnets.lab import records

_STYLE = """
:root { --ink: #1b1b1b; --soft: #5c5c5c; --paper: #fff; --card: #f6f6f4; --line: #ddd; --link: #0b5cad;
  --holds: #1a7f4b; --fails: #b3261e; --open: #7a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a9a9a6; --paper: #161616; --card: #202020;
  --line: #3a3a3a; --link: #7fb8ff; --holds: #63d297; --fails: #ff8f85; --open: #e6c15c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 0 0 .25rem; } a { color: var(--link); }
article { border-top: 2px solid var(--line); margin-top: 2rem; padding-top: 1.25rem; }
.soft { color: var(--soft); font-size: .9rem; } .claim { font-size: 1.05rem; margin: .5rem 0; }
.verdict { font-weight: 600; white-space: nowrap; }
.holds { color: var(--holds); } .fails { color: var(--fails); } .open { color: var(--open); }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .75rem 0; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 36rem) { .paper { display: none; } .verdict, td.number { white-space: normal; }
  img { width: 44rem; max-width: none; }
  th, td { padding-right: .4rem; } }
"""
_CLASSES = {"holds": "holds", "does not hold": "fails", "cannot be told here": "open"}


def write(directory: pathlib.Path) -> pathlib.Path:
  """Writes report.html with a page for each record in `directory` whose picture is there; returns its path. Raises OSError."""
  path = directory / "report.html"
  write_file(path, page(stored(directory)).encode())
  return path


def stored(directory: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
  """The records in a directory with their pictures, in the order of the table of experiments, unknown ones last."""
  from nfnets.lab.experiments import names

  order = {name: number for number, name in enumerate(names())}
  found = []
  for file in sorted(directory.glob("*.json")):
    record, picture = records.read(file), file.with_suffix(".png")
    if record is not None and picture.is_file():
      found.append((record, picture.read_bytes()))
  return sorted(found, key=lambda pair: order.get(pair[0]["name"], len(order)))


def page(experiments: list[tuple[dict[str, Any], bytes]]) -> str:
  """The whole HTML text; it refers to nothing outside itself."""
  rows = "".join(
    f'<tr><td><a href="#{_text(record["name"])}">{_text(record["title"])}</a></td>'
    f'<td class="paper">{_text(record["paper"])}</td><td>{_verdict(record["verdict"])}</td></tr>'
    for record, _ in experiments
  )
  articles = "".join(_article(record, picture) for record, picture in experiments)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>Laboratory of normalizer-free networks</title><style>{_STYLE}</style></head><body>"
    "<h1>Why networks train without normalization: published claims, measured</h1>"
    '<p class="soft">Each criterion is fixed in code. A claim holds if the whole 95 % bootstrap '
    "interval over seeds lies within its criterion, and does not hold if all of it lies outside. With three seeds the interval "
    "is about their range, which holds the true mean three times out of four.</p>"
    f'<div class="scroll"><table><tr><th>experiment</th><th class="paper">paper</th><th>verdict</th></tr>{rows}</table></div>'
    f"{articles}</body></html>\n"
  )


def _article(record: dict[str, Any], picture: bytes) -> str:
  settings, image = record["settings"], base64.b64encode(picture).decode()
  command = f"python -m launch.lab {_text(record['name'])} --scale={_text(settings['scale'])} --seeds={settings['seeds']}"
  command += f" {_text(shlex.join(['--model=' + settings['model']]))}" if settings["model"] else ""
  command += f" {_text(record['options'])}" if record["options"] else ""
  listed = "".join(f"<li>{_text(note)}</li>" for note in record["notes"])
  return (
    f'<article id="{_text(record["name"])}"><h2>{_text(record["title"])}</h2>'
    f'<p class="soft">{_text(record["paper"])}, {_text(record["section"])}</p>'
    f'<p class="claim">{_text(record["claim"])} {_verdict(record["verdict"])}</p>'
    f'<figure><img alt="{_text(record["caption"])}" src="data:image/png;base64,{image}">'
    f"<figcaption>{_text(record['caption'])}</figcaption></figure>"
    f"{_findings(record['findings'])}{_findings(record['yours'], 'of your model')}<ul>{listed}</ul>"
    f"<details><summary>All that was measured</summary>{_table(record['rows'])}</details>"
    f'<p class="soft"><code>{command}</code><br>'
    f"{record['seconds']:.0f} s on {_text(record['machine'])}, {_text(record['date'])}</p></article>"
  )


def _findings(findings: list[dict[str, Any]], of: str = "part of the claim") -> str:
  if not findings:
    return ""
  rows = "".join(
    f"<tr><td>{_text(finding['claim'])}</td><td>{_text(finding['criterion'])}</td>"
    f'<td class="number">{figure(finding)}</td><td>{_verdict(finding["verdict"])}</td></tr>'
    for finding in findings
  )
  head = f"<tr><th>{of}</th><th>criterion</th><th>measured [95 % interval]</th><th>verdict</th></tr>"
  return f'<div class="scroll"><table>{head}{rows}</table></div>'


def figure(finding: dict[str, Any]) -> str:
  """A mean with its interval, as "1.02 [1.01, 1.03]"; words where there are no numbers."""
  if finding["mean"] is None:
    return "no finite number"
  if finding["low"] is None:
    return f"{number(finding['mean'])} (no interval)"
  return f"{number(finding['mean'])} [{number(finding['low'])}, {number(finding['high'])}]"


def number(value: Any) -> str:
  """A number with three digits that count, with its interval where it has one; a text as it is; a dash for what is missing."""
  if isinstance(value, dict):
    return figure(value)
  if value is None:
    return "–"
  if isinstance(value, bool | int | str):
    return str(value)
  return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _table(rows: list[dict[str, Any]]) -> str:
  if not rows:
    return ""
  head = "".join(f"<th>{_text(column)}</th>" for column in rows[0])
  body = "".join(
    "<tr>" + "".join(f'<td class="number">{_text(number(value))}</td>' for value in row.values()) + "</tr>" for row in rows
  )
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _verdict(verdict: str) -> str:
  return f'<span class="verdict {_CLASSES.get(verdict, "open")}">{_text(verdict)}</span>'


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
