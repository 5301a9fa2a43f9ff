"""The page's rules and its one script. Light and dark follow the reader's setting; paper is always light.

Nothing is wider than the page: pictures shrink, tables scroll inside boxes that the keyboard reaches. The script adds a
filter to the table of rows; without it the table is simply whole.
"""

from collections.abc import Mapping

from attnpred.report.look import DARK, LIGHT
from attnpred.report.svg import RULES, colours


def _variables(palette: Mapping[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in palette.items()) + "}"


STYLE = (
    _variables(LIGHT)
    + f"@media screen and (prefers-color-scheme:dark){{{_variables(DARK)}}}"
    + """
:root{color-scheme:light dark}
@media print{:root{color-scheme:light}.scroll{overflow:visible}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem);max-width:84rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.3rem;margin-top:2.5rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.2rem 0 .5rem}summary h3{display:inline}
p,li{max-width:75ch}a{color:var(--link)}.quiet,figcaption,small{color:var(--quiet)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:0;list-style:none}
nav a,summary{display:inline-block;padding:.3rem 0}summary{display:list-item;cursor:pointer}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
.scroll{overflow-x:auto;max-width:100%;margin:1rem 0;border:1px solid var(--line);border-radius:.4rem}
.rows{max-height:80vh;overflow:auto}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;padding:.5rem .7rem;color:var(--quiet);position:sticky;left:0;max-width:min(75ch,calc(100vw - 2.5rem))}
th,td{padding:.35rem .7rem;text-align:left;vertical-align:top;white-space:nowrap;border-top:1px solid var(--line)}
thead th{background:var(--panel)}tbody th{font-weight:600;background:var(--page)}
th:first-child{position:sticky;left:0;z-index:1;min-width:min(11rem,34vw);max-width:min(18rem,42vw);white-space:normal;overflow-wrap:anywhere;
box-shadow:inset -1px 0 var(--line)}
.rows thead th{position:sticky;top:0;z-index:2}.rows thead th:first-child{z-index:3}
td pre{margin:.3rem 0;white-space:pre-wrap;max-width:60ch;overflow-wrap:anywhere;font-size:.8rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem;margin:1rem 0}
.first{grid-template-columns:minmax(0,1fr)}.first svg.chart{max-width:40rem}
@media (min-width:46rem){.first{grid-template-columns:repeat(2,minmax(0,1fr))}}
figure{margin:0;padding:.7rem;background:var(--page);border:1px solid var(--line);border-radius:.4rem}
figcaption{font-size:.875rem;margin-top:.4rem}figcaption b{color:var(--ink)}
svg.chart{display:block;width:100%;max-width:34rem;height:auto;margin:auto}.pixels{image-rendering:pixelated}
label{display:block;margin:.75rem 0}input{font:inherit;padding:.35rem .5rem;max-width:100%;color:var(--ink);
background:var(--page);border:1px solid var(--quiet);border-radius:.3rem}
"""
    + RULES
    + colours({name: f"var(--{name})" for name in LIGHT})
)

SCRIPT = """
const table = document.getElementById("rows");
if (table) {
  const rows = [...table.tBodies[0].rows];
  const words = rows.map(row => [...row.cells].slice(0, -1).map(cell => cell.textContent).join(" ").toLowerCase());
  const label = document.createElement("label");
  const input = document.createElement("input");
  const said = document.createElement("span");
  label.append("Show rows with these words: ", input, " ", said);
  input.type = "search";
  said.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\\s+/);
    rows.forEach((row, i) => { row.hidden = !wanted.every(word => words[i].includes(word)); });
    said.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " rows";
  });
  table.parentElement.before(label);
}
"""
